"""What the benchmark needs of the machine: cores, descriptors, ports, and how busy it is."""

from __future__ import annotations

import os
import platform
import resource
import socket
import statistics
import tempfile
import time
from pathlib import Path


def cores() -> tuple[int, int]:
    """The core for the proxies, and the one for load, backend and driver; the same if it must.

    Of those that this process may use now: to be asked before it binds itself to one.
    """
    usable = sorted(os.sched_getaffinity(0))
    return usable[0], usable[-1] if len(usable) < 2 else usable[1]


def raise_descriptor_limit(wanted: int) -> int:
    """Let this process and its children have `wanted` open files; how many they may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (max(wanted, hard), hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        except (ValueError, OSError):
            continue
        return limit
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def process_tree(root: int) -> list[int]:
    """The process ids of `root` and of all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        # The name, in brackets, may itself hold spaces and brackets.
        parent = int(stat.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(entry.name))
    tree, todo = [], [root]
    while todo:
        pid = todo.pop()
        tree.append(pid)
        todo.extend(children.get(pid, ()))
    return tree


def rss_kib(pids: list[int]) -> int:
    """The resident memory of these processes, in KiB."""
    page_kib = resource.getpagesize() // 1024
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page_kib for pid in pids)


def cpu_s(pid: int) -> float:
    """The CPU time of a process with all its threads, in seconds; 0 if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def busy_s(wanted: tuple[int, ...]) -> float:
    """For how long these cores have been busy, all together, in seconds since the machine began."""
    return sum(_busy_ticks()[core] for core in wanted) / os.sysconf("SC_CLK_TCK")


def busy_percent(wanted: tuple[int, ...], seconds: float = 1.0) -> dict[int, float]:
    """How busy these cores are with whatever runs now."""
    first, began = _busy_ticks(), time.monotonic()
    time.sleep(seconds)
    second, ticks = _busy_ticks(), (time.monotonic() - began) * os.sysconf("SC_CLK_TCK")
    return {core: min(100.0, 100 * (second[core] - first[core]) / ticks) for core in wanted}


def _busy_ticks() -> dict[int, int]:
    found = {}
    for line in Path("/proc/stat").read_text().splitlines():
        name, *values = line.split()
        if name[:3] == "cpu" and name[3:].isdecimal():
            ticks = [int(value) for value in values[:8]]
            found[int(name[3:])] = sum(ticks) - ticks[3] - ticks[4]  # neither idle nor waiting
    return found


def sync_us(folder: Path, times: int = 50) -> float:
    """How long the disk takes to make 4 KiB durable: the median, in microseconds."""
    taken = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(times):
            file.write(bytes(4096))
            file.flush()
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - began)
    return 1e6 * statistics.median(taken)


def file_system(folder: Path) -> str:
    """The type of the file system that `folder` is on."""
    best, kind = -1, "unknown"
    where = str(folder.resolve())
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, mounted_kind = line.split()[:3]
        inside = where == mount or where.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= best:
            best, kind = len(mount), mounted_kind
    return kind


def description(folder: Path) -> dict[str, str | int | float]:
    """The machine, without its name."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": os.cpu_count() or 0,
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python": platform.python_version(),
        "disk": file_system(folder),
        "disk_sync_us": round(sync_us(folder), 1),
    }

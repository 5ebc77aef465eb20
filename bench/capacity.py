"""How much it takes for how many streams: the tables of docs/capacity.md, out of what was measured.

python bench/capacity.py    puts them into the page again, from docs/performance.md as it is
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from tables import number, put_into, table

DOCS = Path(__file__).resolve().parent.parent / "docs"

#: Chunks a second of each stream, and where docs/performance.md has the CPU time of one.
CHUNK_ROWS = {4: ": 5,000 streams", 20: ", 1,000 x 20/s", 50: ", 100 x 50/s"}
RATES = tuple(CHUNK_ROWS)
STREAMS = (1_000, 10_000, 100_000, 1_000_000)

# What is assumed.
ANSWER_CHUNKS = 500
#: The part of a core that is planned with: the rest is for peaks, and for a proxy that is missing.
BUSY = 0.6
PROXY_CORES = 16
#: net.ipv4.ip_local_port_range as Linux has it, 32768 to 60999.
LOCAL_PORTS = 28_232
#: To MongoDB, of each process (mongo_pool.POOL_SIZE).
POOL_SIZE = 4
#: File descriptors of a process that are no stream's (connections.RESERVE).
OTHER_FILES = 128

# What tests/faults measured in their long form, with a MongoDB 8.2 of three members (see the page).
DELIVERY_US = 25.6
BILL_US = 8.95
BILL_BYTES = 240
FIND_US = 187.0
BILLS_PER_REQUEST = 2

US = 1e6
KIB_PER_MIB, KIB_PER_GIB = 1024, 1024**2
DAY_S, GB = 86_400, 1e9


@dataclass(frozen=True)
class Costs:
    """What was measured: CPU time in us, memory in KiB and MiB, disk in bytes."""

    chunk_us: dict[int, float]
    stream_us: float
    delivery_us: float
    idle_mib: float
    stream_kib: float
    unread_kib: float
    journal_bytes: float
    bill_us: float
    find_us: float
    bill_bytes: float

    def busy_us(self, rate: int) -> float:
        """CPU time that a stream of so many chunks a second takes in a second."""
        per_request = self.stream_us + self.delivery_us
        return rate * self.chunk_us[rate] + rate / ANSWER_CHUNKS * per_request

    def streams_per_process(self, rate: int) -> int:
        """How many keep one core as busy as is planned."""
        return math.floor(BUSY * US / self.busy_us(rate))


@dataclass(frozen=True)
class Fleet:
    """What so many streams of so many chunks a second take."""

    costs: Costs
    streams: int
    rate: int

    @property
    def requests_per_s(self) -> float:
        return self.streams * self.rate / ANSWER_CHUNKS

    @property
    def busy_cores(self) -> float:
        return self.streams * self.costs.busy_us(self.rate) / US

    @property
    def processes(self) -> int:
        return math.ceil(self.busy_cores / BUSY)

    @property
    def proxies(self) -> int:
        return math.ceil(self.processes / PROXY_CORES)

    def memory_gib(self, stream_kib: float) -> float:
        """Of all processes; `stream_kib`: of a stream that is read, or of one that is not."""
        kib = self.processes * self.costs.idle_mib * KIB_PER_MIB + self.streams * stream_kib
        return kib / KIB_PER_GIB

    @property
    def files_per_process(self) -> int:
        return math.ceil(2 * self.streams / self.processes) + OTHER_FILES

    @property
    def streams_per_proxy(self) -> int:
        return math.ceil(self.streams / self.proxies)

    @property
    def addresses(self) -> int:
        """How many of backends each proxy needs, for its local ports to be enough."""
        return math.ceil(self.streams_per_proxy / LOCAL_PORTS)

    @property
    def bills_per_s(self) -> float:
        return self.requests_per_s * BILLS_PER_REQUEST

    @property
    def mongodb_connections(self) -> int:
        return self.processes * POOL_SIZE

    @property
    def cores_for_lines(self) -> float:
        """Of MongoDB's primary."""
        return self.bills_per_s * self.costs.bill_us / US

    @property
    def cores_for_keys(self) -> float:
        """At most: if each request leads to a look-up of its key."""
        return self.requests_per_s * self.costs.find_us / US

    @property
    def journals_gb_a_day(self) -> float:
        return self.requests_per_s * self.costs.journal_bytes * DAY_S / GB

    @property
    def bills_gb_a_day(self) -> float:
        """Before compression, and without indexes."""
        return self.bills_per_s * self.costs.bill_bytes * DAY_S / GB


def costs_of(performance: str, operations: str) -> Costs:
    """From the text of docs/performance.md and docs/operations.md.

    Raises KeyError if the first has no figures of llmproxy.
    """
    rows = _rows(performance)

    def of(row: str) -> float:
        return rows[row]["llmproxy"]

    growth = re.search(r"(\d+) bytes per request in a journal", operations)
    assert growth is not None
    soak = rows["100,000 streams: CPU \u00b5s each"]
    return Costs(
        chunk_us={rate: of(f"CPU \u00b5s per chunk{row}") for rate, row in CHUNK_ROWS.items()},
        stream_us=max(soak["2nd fifth"], soak["last fifth"]),
        delivery_us=DELIVERY_US,
        idle_mib=of("memory idle, MiB"),
        stream_kib=of("memory per stream, of 5,000, KiB"),
        unread_kib=of("memory of one that is not, KiB"),
        journal_bytes=int(growth[1]),
        bill_us=BILL_US,
        find_us=FIND_US,
        bill_bytes=BILL_BYTES,
    )


def _rows(page: str) -> dict[str, dict[str, float]]:
    """The numbers of all tables, by the first cell of the row, and by the head of the column."""
    found = {}
    head: list[str] = []
    for line in page.splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        else:
            pairs = zip(head, cells, strict=True)
            found[name] = {column: _number(cell) for column, cell in pairs}
    return found


def _number(cell: str) -> float:
    try:
        return float(cell.replace(",", ""))
    except ValueError:
        return math.nan


def text(costs: Costs) -> str:
    """The part of the page that is computed, in Markdown."""
    fleets = [Fleet(costs, streams, rate) for rate in RATES for streams in STREAMS]
    return "\n\n".join(
        [
            _short(costs),
            "What was measured:",
            _inputs(costs),
            f"One process on one core that is {BUSY:.0%} busy:".replace("%", " %"),
            _process(costs),
            "What runs, for all streams together:",
            _running(fleets),
            "What is around it:",
            _around(fleets) + "\n",
        ]
    )


def _short(costs: Costs) -> str:
    proxies = [Fleet(costs, STREAMS[-1], rate).proxies for rate in RATES]
    words = [f"{count} at {rate} chunks/s" for count, rate in zip(proxies, RATES, strict=True)]
    return (
        f"In short: {STREAMS[-1]:,} streams at once take {', '.join(words[:-1])} and {words[-1]}"
        f" of such proxies. CPU\nfor chunks is what gives out first."
    )


def _inputs(costs: Costs) -> str:
    performance, growth = "performance.md, ", "operations.md, Growth"
    long_form = "`make faults`"
    rows = [
        *(
            (
                f"CHUNK, at {rate} chunks/s",
                number(us),
                f"us of CPU, {performance}{CHUNK_ROWS[rate].strip(', :')}",
            )
            for rate, us in costs.chunk_us.items()
        ),
        ("STREAM", number(costs.stream_us), f"us of CPU, {performance}Soak; 5 chunks are in it"),
        ("DELIVERY", number(costs.delivery_us), f"us of CPU of a proxy, {long_form}"),
        ("IDLE", number(costs.idle_mib), f"MiB of a process, {performance}memory idle"),
        ("READ", number(costs.stream_kib), f"KiB of a stream, {performance}of 5,000"),
        (
            "UNREAD",
            number(costs.unread_kib),
            f"KiB of one that is not, {performance}slow readers",
        ),
        ("JOURNAL", number(costs.journal_bytes), f"bytes of disk for a request, {growth}"),
        ("LINE", number(costs.bill_us), f"us of CPU of MongoDB's primary for a line, {long_form}"),
        ("FIND", number(costs.find_us), f"us of CPU of the primary for a key, {long_form}"),
        ("SIZE", number(costs.bill_bytes), f"bytes of a line in MongoDB, {long_form}"),
    ]
    head = ["name", "what, and where it is from", "value"]
    return table(head, [(name, what, value) for name, value, what in rows], left=2)


def _process(costs: Costs) -> str:
    rows = []
    for rate in RATES:
        streams = costs.streams_per_process(rate)
        one = Fleet(costs, streams, rate)
        cells = (rate, costs.busy_us(rate), streams, streams * rate, one.requests_per_s)
        memory = one.memory_gib(costs.stream_kib) * 1024, one.memory_gib(costs.unread_kib) * 1024
        rows.append([number(cell) for cell in (*cells, *memory)])
    head = ["chunks/s", "us of CPU/s a stream", "streams", "chunks/s in all", "requests/s"]
    return table([*head, "memory, MiB", "none read, MiB"], rows, left=0)


def _running(fleets: list[Fleet]) -> str:
    rows = [
        [
            number(cell)
            for cell in (
                each.rate,
                each.streams,
                each.requests_per_s,
                each.busy_cores,
                each.processes,
                each.proxies,
                each.memory_gib(each.costs.stream_kib),
                each.memory_gib(each.costs.unread_kib),
                each.journals_gb_a_day,
            )
        ]
        for each in fleets
    ]
    head = ["chunks/s", "streams", "requests/s", "cores busy", "processes"]
    head += [f"proxies of {PROXY_CORES}", "memory, GiB", "none read, GiB", "journals, GB/day"]
    return table(head, rows, left=0)


def _around(fleets: list[Fleet]) -> str:
    rows = [
        [
            number(cell)
            for cell in (
                each.rate,
                each.streams,
                each.files_per_process,
                each.streams_per_proxy,
                each.addresses,
                each.mongodb_connections,
                each.bills_per_s,
                each.cores_for_lines,
                each.cores_for_keys,
                each.bills_gb_a_day,
            )
        ]
        for each in fleets
    ]
    head = ["chunks/s", "streams", "descriptors a process", "streams a proxy", "backend addresses"]
    head += ["MongoDB connections"]
    return table(
        [*head, "lines/s", "cores for lines", "cores for keys", "lines, GB/day"], rows, left=0
    )


def write() -> None:
    """Put the tables into the page."""
    pages = [(DOCS / name).read_text() for name in ("performance.md", "operations.md")]
    try:
        costs = costs_of(*pages)
    except KeyError as error:
        raise SystemExit(f"docs/performance.md has no {error} of llmproxy") from error
    put_into(DOCS / "capacity.md", text(costs), "capacity")
    print("written: docs/capacity.md")


if __name__ == "__main__":
    write()

"""`make bench`: what the proxy costs, beside other proxies, in one run on one machine.

Each target runs alone on one core; the clients (load.c), the stand-in LLM server (backend.c) and
this driver run on another. A session starts one target, takes every measurement once, and stops
it; the sessions of the targets take turns, so that what else the machine does hits all of them.
Every session of llmproxy ends with a comparison of its bills with the backend's own count.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import capacity
import goals
import machine
import plot
import profiling
import report
import slow
import soak
import tables
import targets
import workers
from measurements import FULL, QUICK, Closed, Measurement, Plan, Streams
from result import Result, Runs
from sessions import BUILD, DIRECT, Bench, Figures, build
from targets import HERE, Missing, Target

RESULTS = HERE / "results"
DOCS = HERE.parent / "docs"
#: One stream takes two descriptors of a proxy.
DESCRIPTORS_PER_STREAM = 2
SPARE_DESCRIPTORS = 1024
USUAL = ("llmproxy", "nginx", "sglang-router")


def fitting(plan: Plan, target: Target | None, most_streams: int) -> Plan:
    """The plan, without what the target can't take, and what the limit of open files forbids."""
    most = float("inf") if target is None else target.most_chunks_per_s

    def fits(what: Measurement) -> bool:
        if isinstance(what, Closed):
            return True
        return what.streams <= most_streams and what.streams * what.rate <= most

    return replace(
        plan,
        always=tuple(filter(fits, plan.always)),
        growth=tuple(what for what in plan.growth if fits(what)),
    )


def one_session(bench: Bench, target: Target | None, plan: Plan, number: int) -> dict[str, Figures]:
    """All the figures of one session, by the measurement's key."""
    found: dict[str, Figures] = {}
    with bench.session(target) as session:
        if session.running.pid is not None:
            found["idle"] = {"rss_kib": machine.rss_kib(session.running.pids())}
        todo = plan.always + (plan.growth if number < plan.growth_sessions else ())
        # Few streams before many: else closing those of one measurement is counted in the next.
        for what in sorted(todo, key=lambda what: what.size):
            found[what.key] = session.measure(what)
            print(f"  {what.key:18} {report.brief(found[what.key])}", flush=True)
    return found


def available(wanted: Sequence[str]) -> list[Target | None]:
    """The targets that can be had here; a line for each that can't."""
    found: list[Target | None] = [None]
    for target in targets.all_targets():
        if target.name in wanted:
            try:
                target.version = target.prepare()
            except Missing as why:
                print(f"{target.name}: skipped. {why}")
                continue
            found.append(target)
    return found


def run(bench: Bench, plan: Plan, chosen: list[Target | None], most_streams: int) -> Runs:
    """All sessions of all targets, in turns."""
    runs: Runs = {}
    for number in range(plan.sessions):
        for target in list(chosen):
            name = DIRECT if target is None else target.name
            print(f"{name} ({number + 1} of {plan.sessions})", flush=True)
            try:
                fit = fitting(plan, target, most_streams)
                runs.setdefault(name, []).append(one_session(bench, target, fit, number))
            except Missing as why:
                print(f"{name}: skipped. {why}")
                chosen.remove(target)
    return runs


def tell_noise() -> dict[int, float]:
    """Warn if the cores are not ours alone."""
    busy = machine.busy_percent(machine.cores())
    for core, percent in busy.items():
        if percent > 5:
            print(
                f"WARNING: core {core} is {percent:.0f} % busy with something else; "
                "compare the ratios, not the figures"
            )
    return busy


def descriptors_for(plan: Plan) -> tuple[int, int]:
    """The limit of open files that could be had, and how many streams it allows."""
    streams = max(what.streams for what in plan.growth)
    wanted = DESCRIPTORS_PER_STREAM * streams + SPARE_DESCRIPTORS
    limit = machine.raise_descriptor_limit(wanted)
    most = (limit - SPARE_DESCRIPTORS) // DESCRIPTORS_PER_STREAM
    if limit < wanted:
        print(
            f"WARNING: only {limit} open files are allowed (ulimit -n), {wanted} are needed: "
            f"no measurement with more than {most} streams"
        )
    return limit, most


def slow_readers(bench: Bench, chosen: Sequence[Target | None]) -> dict[str, Figures]:
    """What a stream costs that is not read, with each proxy."""
    found = {}
    for target in chosen:
        # What can't take the chunks of the other measurements would take minutes for these.
        if target is None or target.most_chunks_per_s < float("inf"):
            continue
        print(f"{target.name}: slow readers", flush=True)
        try:
            found[target.name] = slow.measure(bench, target)
        except Missing as why:
            print(f"{target.name}: skipped. {why}")
            continue
        print(slow.brief(found[target.name]), flush=True)
    return found


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="bench/run.py")
    parser.add_argument("--quick", action="store_true", help="8 minutes instead of 25")
    parser.add_argument("--litellm", action="store_true", help="measure LiteLLM too")
    parser.add_argument("--only", metavar="NAMES", help="these targets, with commas between them")
    parser.add_argument("--sessions", type=int, help="how often each target is measured")
    parser.add_argument("--publish", action="store_true", help="put the results into docs/")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--workers", action="store_true", help="two workers, nothing else")
    parts.add_argument("--slow", action="store_true", help="slow readers, nothing else")
    parts.add_argument("--profile", action="store_true", help="profile llmproxy, nothing else")
    parts.add_argument("--soak", action="store_true", help="memory over many requests, alone")
    parser.add_argument("--soak-requests", type=int, default=soak.REQUESTS, metavar="N")
    parser.add_argument("--soak-streams", type=int, default=soak.STREAMS, metavar="N")
    options = parser.parse_args(arguments)
    if min(options.soak_requests, options.soak_streams) < soak.SHORTEST:
        parser.error(f"a soak takes {soak.SHORTEST} requests and as many streams, or more")
    return options


def main() -> None:
    """Do what the command line says; exits with an error if bills were wrong."""
    options = options_of()
    plan = QUICK if options.quick else FULL
    if options.sessions:
        plan = replace(plan, sessions=options.sessions)
    names = [*USUAL, *(["litellm"] if options.litellm else [])]
    wanted = options.only.split(",") if options.only else names
    if options.workers:
        wanted = ["llmproxy"]
    known = [target.name for target in targets.all_targets()]
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"no such target: {', '.join(unknown)}; there are {', '.join(known)}")

    build()
    RESULTS.mkdir(exist_ok=True)
    limit, most_streams = descriptors_for(plan)
    cores = target_core, other_core = machine.cores()
    if target_core == other_core:
        print("WARNING: there is only one core; proxies and clients share it")
    busy = tell_noise()
    os.sched_setaffinity(0, {other_core})
    # On the disk that the project is on: /tmp may be memory, where nothing is ever durable.
    with tempfile.TemporaryDirectory(prefix="run-", dir=BUILD) as folder:
        bench = Bench(Path(folder), limit, cores)
        if options.profile:
            profile(bench, Path(folder))
        elif options.soak:
            long_run(bench, Path(folder), options)
        else:
            compare(bench, Path(folder), options, plan, wanted, busy, most_streams)
    if bench.wrong_bills:
        raise SystemExit(f"WRONG BILLS in {len(bench.wrong_bills)} session(s)")


def compare(
    bench: Bench,
    folder: Path,
    options: argparse.Namespace,
    plan: Plan,
    wanted: Sequence[str],
    busy: dict[int, float],
    most_streams: int,
) -> None:
    """The measurements beside other proxies, those of slow readers, and those of workers."""
    everything = not (options.workers or options.slow)
    about = machine.description(folder)
    chosen = available(wanted)
    result = Result(
        about=about,
        busy_before={str(core): round(percent, 1) for core, percent in busy.items()},
        versions={target.name: target.version for target in chosen if target is not None},
        quick=options.quick,
        runs={},
    )
    if everything:
        each_s = plan.seconds + 4 * plan.sessions
        minutes = 1 + plan.sessions / 2 + (len(chosen) * each_s + (len(chosen) - 1) * 80) / 60
        print(f"about {minutes:.0f} minutes")
    if everything or options.slow:
        result.slow.update(slow_readers(bench, chosen))
    if "llmproxy" in wanted and (everything or options.workers):
        closed = workers.QUICK if options.quick else workers.FULL
        result.workers.update(workers.measure(bench, closed, plan.sessions))
    if everything:
        result.runs.update(run(bench, plan, chosen, most_streams))
    result = replace(result, checked=bench.checked, wrong_bills=len(bench.wrong_bills))
    page = report.text(result)
    name = "latest" if everything else "slow" if options.slow else "workers"
    picture = plot.draw(result) if everything else ""
    write(name, result.to_json(), page, picture)
    if options.publish and everything and not bench.wrong_bills:
        into_docs("results", page, "performance.svg", picture)


def long_run(bench: Bench, folder: Path, options: argparse.Namespace) -> None:
    """The soak."""
    about = machine.description(folder)
    phases = soak.run(bench, folder, options.soak_requests, options.soak_streams)
    about["version"] = targets.llmproxy().prepare()
    wrong = len(bench.wrong_bills)
    page = f"{goals.text(soak.goals(phases, wrong))}\n\n{soak.text(about, phases)}\n"
    picture = soak.draw(phases)
    write("soak", soak.to_json(about, phases, wrong), page, picture)
    if options.publish and not wrong:
        page += "\n![Memory over requests and over streams](soak.svg)\n"
        into_docs("soak", page, "soak.svg", picture)


def write(name: str, figures: str, page: str, picture: str) -> None:
    """Print the results, and write them down."""
    print("\n" + page)
    for kind, content in (("json", figures), ("md", page), ("svg", picture)):
        if content:
            (RESULTS / f"{name}.{kind}").write_text(content)
            print(f"written: bench/results/{name}.{kind}")


def into_docs(block: str, page: str, name: str, picture: str) -> None:
    """Put the results into the documentation."""
    tables.put_into(DOCS / "performance.md", page, block)
    (DOCS / name).write_text(picture)
    print(f"written: docs/performance.md, docs/{name}")
    capacity.write()


def profile(bench: Bench, folder: Path) -> None:
    """Where the time of llmproxy goes, per request and per chunk."""
    closed, streams = Closed(32, 2.0, 20.0), Streams(100, 50, 1.0, 30.0)
    for what, unit in ((closed, "request"), (streams, "chunk")):
        output = folder / f"{what.key}.profile"
        target = targets.wrapped_llmproxy("sampled.py", output)
        with bench.session(target) as session:
            assert session.running.pid is not None
            with profiling.sampling(session.running.pid, output):
                figures = session.measure(what)
            text = profiling.text(output, unit, figures)
        (RESULTS / f"profile-{unit}.txt").write_text(text)
        print(text)
        print(f"written: bench/results/profile-{unit}.txt")


if __name__ == "__main__":
    main()

"""The benchmark's own sums: medians, goals, the verdict on a long run, tables and pictures.

Nothing is measured here; `make bench` does that.
"""

from __future__ import annotations

import json
import random
import sqlite3
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import bills
import goals
import plot
import pytest
import report
import soak
import tables
import workers
from drift import drift
from result import Result
from run import options_of
from sessions import Bench

ABOUT: dict[str, str | int | float] = {
    "cpu": "a <fast> one",
    "cores": 2,
    "system": "Linux 6",
    "python": "3.11",
    "disk": "ext4",
    "disk_sync_us": 200.0,
}
TROUBLES = {"lost": 0, "wrong": 0, "refused": 0, "reconnects": 0}


def closed(per_s: float, cpu_us: float, p50: float, **changed: float) -> dict[str, float]:
    found = {"count": 100, "per_s": per_s, "cpu_us": cpu_us, "rss_kib": 70_000, "p50": p50}
    busy = {"target_cpu_pct": 90, "load_cpu_pct": 5, "backend_cpu_pct": 5, "others_pct": 3}
    return {**found, "p99": 2 * p50, **busy, **TROUBLES, **changed}


def streams(cpu_us: float, gap_ms: float = 250, rss_kib: float = 200_000, **changed: float) -> Any:
    times = {"ttft_p50": 900, "ttft_p99": 2000, "gap_p50": 1000 * gap_ms, "together_pct": 0}
    found = {**closed(5000, cpu_us, 0), **times, "gap_p99": 1000 * gap_ms, "rss_kib": rss_kib}
    return {**found, **changed}


def session(per_s: float, request_us: float, p50: float, chunk_us: float, many: Any) -> Any:
    return {
        "idle": {"rss_kib": 66_000},
        "closed-32": closed(per_s, request_us, p50),
        "closed-1": closed(per_s, request_us, p50),
        "streams-100x50": streams(chunk_us, 20),
        "streams-1000x20": streams(chunk_us, 50),
        "streams-10x4": streams(chunk_us),
        "streams-5000x4": many,
    }


def a_result(many: Any = None, sessions: int = 1, **changed: Any) -> Result:
    many = many or streams(12)
    runs = {
        "direct": [session(200_000, 0, 50, 0, streams(0))] * sessions,
        "llmproxy": [session(16_000, 60, 950, 14, many)] * sessions,
        "nginx": [session(70_000, 8, 60, 10, streams(10))] * sessions,
        "sglang-router": [session(15_000, 56, 100, 12, streams(16))] * sessions,
    }
    found: dict[str, Any] = {
        "about": ABOUT,
        "busy_before": {"0": 1.0, "1": 0.0},
        "versions": {"llmproxy": "0"},
        "quick": True,
        "runs": runs,
        "slow": {"llmproxy": {"slow_kib": 60, "read_kib": 25, "held": 400, "streams": 400}},
        "workers": {"2 workers": {"per_s": 3000, "speedup": 1.9}},
        "checked": 4,
    }
    found["slow"]["llmproxy"]["lost"] = 0
    return Result(**{**found, **changed})


def verdicts(result: Result) -> dict[str, bool | None]:
    return {goal.what: goal.reached for goal in goals.goals(result)}


def missed(result: Result) -> list[str]:
    return [what for what, reached in verdicts(result).items() if not reached]


# -- goals -------------------------------------------------------------------------------------


def test_goals_that_are_reached():
    assert missed(a_result()) == []


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (a_result(streams(12, gap_ms=501)), "gap p99 with 5,000 streams of 4 chunks/s, ms"),
        (a_result(streams(12, rss_kib=390_700)), "memory with 5,000 streams, MB"),
        (a_result(streams(12, lost=1)), "streams lost of 5,000"),
        (a_result(streams(12, wrong=1)), "streams lost of 5,000"),
        (a_result(wrong_bills=1), "sessions with wrong bills"),
        (
            a_result(workers={"2 workers": {"per_s": 3000, "speedup": 1.7}}),
            "requests/s of 2 workers, as a multiple of 1, on two whole cores",
        ),
    ],
)
def test_a_goal_that_is_missed(result: Result, expected: str):
    assert missed(result) == [expected]
    assert f"| {expected}" in report.text(result)
    assert "MISSED" in report.text(result)


def test_goals_are_compared_with_the_others_of_the_same_run():
    result = a_result()
    slower = [session(1_700, 565, 1_530, 36, streams(49))]
    changed = a_result(runs={**result.runs, "llmproxy": slower})
    assert missed(changed) == [
        "requests/s, as a multiple of sglang-router's",
        "CPU per chunk, 100 x 50/s, as a multiple of nginx's",
        "CPU per chunk, 1,000 x 20/s, as a multiple of nginx's",
        "median latency added at 1 connection, ms",
    ]


def test_what_was_not_measured_is_neither_reached_nor_missed():
    result = a_result(slow={}, workers={}, runs={"llmproxy": [{"idle": {"rss_kib": 1}}]}, checked=0)
    assert set(verdicts(result).values()) == {None}
    assert "MISSED" not in report.text(result)


def test_cpu_per_chunk_does_not_count_if_the_proxy_was_late():
    result = a_result()
    result.runs["llmproxy"][0]["streams-1000x20"]["together_pct"] = 60
    found = verdicts(result)
    assert found["CPU per chunk, 1,000 x 20/s, as a multiple of nginx's"] is None
    assert found["CPU per chunk, 100 x 50/s, as a multiple of nginx's"]
    assert "llmproxy in streams-1000x20 (60 %)" in report.text(result)


def test_slow_readers_count_only_if_the_backend_was_held_up():
    figures = {"slow_kib": 10.0, "read_kib": 9.0, "held": 100, "streams": 400, "lost": 0}
    found = verdicts(a_result(slow={"llmproxy": figures}))
    assert found["memory of a stream whose client does not read, KiB"] is None


def test_streams_that_are_lost_in_one_session_of_several_are_not_averaged_away():
    result = a_result(sessions=3)
    result.runs["llmproxy"][1] = session(16_000, 60, 950, 14, streams(12, lost=2))
    (goal,) = [goal for goal in goals.goals(result) if goal.what == "streams lost of 5,000"]
    assert goal.found == 2


# -- tables ------------------------------------------------------------------------------------


def test_the_report_says_whose_limit_it_was():
    result = a_result()
    assert "WARNING" not in report.text(result)
    result.runs["nginx"][0]["closed-32"].update(load_cpu_pct=48, backend_cpu_pct=47)
    assert "nginx in closed-32 (95 %)" in report.text(result)


def test_the_report_says_that_the_machine_was_not_its_own():
    result = a_result()
    for figures in result.runs["llmproxy"][0].values():
        figures["others_pct"] = 90
    assert "WARNING" not in report.text(result)  # in a few measurements
    for name in ("nginx", "direct"):
        for figures in result.runs[name][0].values():
            figures["others_pct"] = 60
    assert "other processes took so much" in report.text(result)


def test_the_report_has_a_column_for_each_target_and_all_figures_are_in_the_json():
    result = a_result(sessions=2)
    assert "|  direct | llmproxy |  nginx | sglang-router |" in report.text(result)
    found = json.loads(result.to_json())
    assert found["medians"]["nginx"]["closed-32"]["per_s"] == 70_000
    assert len(found["runs"]["nginx"]) == 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "-"), (0.0, "0"), (0.123, "0.12"), (12.34, "12.3"), (1234.5, "1,234"), (7.0, "7")],
)
def test_numbers(value: float | None, expected: str):
    assert tables.number(value) == expected


def test_results_go_between_their_own_marks(tmp_path: Path):
    page = tmp_path / "page.md"
    marks = "<!-- {0}: begin -->\nold\n<!-- {0}: end -->\n"
    page.write_text("a\n" + marks.format("results") + "b\n" + marks.format("soak") + "c\n")
    tables.put_into(page, "new\n", "soak")
    assert page.read_text().count("old") == 1
    assert "soak: begin -->\n\nnew\n\n<!-- soak: end -->\nc\n" in page.read_text()
    with pytest.raises(SystemExit):
        tables.put_into(page, "new\n", "nothing")


def test_the_documentation_has_the_marks():
    text = (Path(__file__).parent.parent / "docs" / "performance.md").read_text()
    for name in ("results", "soak"):
        assert text.count(f"<!-- {name}: begin -->") == text.count(f"<!-- {name}: end -->") == 1


# -- workers -----------------------------------------------------------------------------------


def case(per_s: float, cpu_us: float, others_pct: float) -> dict[str, float]:
    return {
        "per_s": per_s,
        "cpu_us": cpu_us,
        "load_cpu_pct": others_pct / 2,
        "backend_cpu_pct": others_pct / 2,
    }


def test_two_workers_that_take_all_that_is_left_are_twice_as_fast_on_two_whole_cores():
    # 500 us each; clients and server take 20 % of one of the two cores: 1.8 / 500 us.
    found = workers.compare(
        {
            workers.ALONE: [case(2000, 500, 10)],
            workers.ONE: [case(2000, 500, 10)],
            workers.TWO: [case(3600, 500, 20)],
        }
    )
    assert found[workers.TWO]["possible_per_s"] == pytest.approx(3600)
    assert found[workers.TWO]["speedup"] == pytest.approx(2)
    assert found[workers.ONE]["speedup"] == pytest.approx(2000 / 3800 * 2)
    assert found[workers.TWO]["others_us"] == pytest.approx(0.2 / 3600 * 1e6)
    assert "speedup" not in found[workers.ALONE]
    assert "2 workers" in workers.text(found)


def test_the_proxy_has_a_core_of_its_own_unless_both_are_for_everything(tmp_path: Path):
    bench = Bench(tmp_path, 1024, (3, 5))
    assert set(bench.apart.target) == {3}
    assert set(bench.apart.others) == {5}
    assert set(bench.shared.target) == set(bench.shared.others) == {3, 5}


def test_a_case_that_could_not_be_measured_is_left_out():
    found = workers.compare({workers.ALONE: [case(2000, 500, 10), case(2200, 480, 10)]})
    assert found[workers.ALONE]["per_s"] == 2100


# -- the long run ------------------------------------------------------------------------------


def memory(step: float, noise: float = 200, spikes: int = 0) -> list[tuple[float, float]]:
    """A hundred samples over a million requests: it settles, and then grows by `step` KiB each."""
    chance = random.Random(1)
    found = []
    for i in range(100):
        warm = 4000 * min(i, 10) / 10
        found.append((10_000.0 * (i + 1), 66_000 + warm + step * i + chance.uniform(0, noise)))
    for i in range(spikes):
        done, value = found[95 - 4 * i]
        found[95 - 4 * i] = done, value + 50_000
    return found


@pytest.mark.parametrize(
    ("samples", "flat"),
    [
        (memory(0), True),
        (memory(-50), True),
        (memory(0, spikes=5), True),  # somebody looked at the metrics, or garbage was not collected
        (memory(10, noise=0), True),  # 1 KiB for 1,000 requests
        (memory(50), False),  # 5 bytes for each request
        (memory(500, spikes=5), False),
    ],
)
def test_memory_is_flat_if_it_does_not_grow_after_the_beginning(samples: Any, flat: bool):
    assert drift(samples, *soak.ALLOWED["rss_kib"]).flat is flat


def test_the_slope_of_a_leak():
    found = drift(memory(50), 2048, 0.03)
    assert found.slope == pytest.approx(500, rel=0.05)  # KiB for 100,000 requests
    assert found.growth == pytest.approx(50 * 60, rel=0.05)  # from the 30th to the 90th sample


def test_too_few_samples_give_no_verdict():
    with pytest.raises(ValueError, match="too few"):
        drift(memory(0)[:9], 1, 0)


def phase(unit: str, step: float) -> soak.Phase:
    samples = []
    for done, rss_kib in memory(step):
        inside = {"blocks": 310_000 + rss_kib % 7, "objects": 1}
        samples.append({"done": done, **closed(1700, 560, 900), "rss_kib": rss_kib, **inside})
    return soak.Phase(unit, 600.0, samples)


def test_the_soak_tells_which_of_its_goals_were_reached():
    phases = [phase("requests", 0), phase("streams", 60)]
    reached = {goal.what: goal.reached for goal in soak.goals(phases, wrong_bills=0)}
    assert [what for what, is_reached in reached.items() if not is_reached] == [
        "growth of resident memory, MiB, over 1,000,000 streams"
    ]
    text = soak.text({**ABOUT, "version": "0"}, phases)
    assert "1,000,000 requests in 10.0 minutes" in text
    assert text.count("GROWS") == 1
    found = json.loads(soak.to_json(ABOUT, phases, 0))
    assert found["drifts"]["streams"]["rss_kib"]["growth"] > 2048


@pytest.mark.parametrize("total", [10, 25, 99, 100, 2000, 1_000_000])
def test_a_soak_of_any_size_has_samples_enough(total: int):
    assert total / soak.portion(total) >= soak.SHORTEST


def test_a_soak_that_is_too_short_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        options_of(["--soak", "--soak-streams", "9"])
    assert "10 requests" in capsys.readouterr().err


# -- pictures ----------------------------------------------------------------------------------


def texts(picture: str) -> set[str]:
    """What is written in a picture; raises if it is no XML."""
    root = ElementTree.fromstring(picture)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    numbers = [one for element in root.iter() for one in element.attrib.values()]
    assert not any("nan" in one or "inf" in one for one in numbers)
    return {element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")}


def test_the_comparison_is_drawn_with_all_targets_and_variants():
    result = a_result()
    runs = {**result.runs, "llmproxy-<odd>": result.runs["llmproxy"]}
    words = texts(plot.draw(a_result(runs=runs)))
    assert {"nginx", "llmproxy-<odd>", "CPU µs per streamed chunk", "5,000"} <= words


def test_a_comparison_without_streams_is_drawn_too():
    result = a_result(runs={"nginx": [{"closed-32": closed(70_000, 8, 60)}]})
    assert "CPU µs per request, 32 connections" in texts(plot.draw(result))


@pytest.mark.parametrize("step", [0, 60])
def test_the_soak_is_drawn(step: float):
    words = texts(soak.draw([phase("requests", step), phase("streams", step)]))
    assert {"resident memory, MiB", "requests", "streams", "1,000,000"} <= words


# -- bills -------------------------------------------------------------------------------------


def test_bills_are_compared_with_the_backends_count(tmp_path: Path):
    path = tmp_path / "db.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(
        """
        CREATE TABLE ledger (state, outcome, status, prompt, completion);
        CREATE TABLE event_oneoff (product, quantity);
        INSERT INTO ledger VALUES ('settled', 'complete', 200, 5, 7),
                                  ('settled', 'refused', NULL, 0, 0);
        INSERT INTO event_oneoff VALUES ('bench/BENCH/prompt', 5), ('bench/BENCH/completion', 7);
        """
    )
    connection.close()
    stats = {"requests": 1, "prompt": 5, "completion": 7, "broken": 0}
    assert bills.check(path, stats).endswith("1 requests, 5 + 7 tokens; 1 not sent")
    for wrong in ({"completion": 8}, {"requests": 2}):
        with pytest.raises(bills.WrongBills):
            bills.check(path, {**stats, **wrong})

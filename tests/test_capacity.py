"""docs/capacity.md: its tables are what its formulas make of what was measured."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import capacity
import pytest
from capacity import Costs, Fleet, costs_of

from llmproxy.connections import RESERVE
from llmproxy.storage.mongo_pool import POOL_SIZE

DOCS = Path(__file__).parent.parent / "docs"
PERFORMANCE, OPERATIONS, PAGE = (
    (DOCS / name).read_text() for name in ("performance.md", "operations.md", "capacity.md")
)
#: Round ones: 20 chunks/s of 25 us, and 20/500 requests/s of 1,000 us, are 540 us/s.
COSTS = Costs(
    chunk_us={4: 30.0, 20: 25.0, 50: 40.0},
    stream_us=900.0,
    delivery_us=100.0,
    idle_mib=64.0,
    stream_kib=16.0,
    unread_kib=64.0,
    journal_bytes=300.0,
    bill_us=10.0,
    find_us=200.0,
    bill_bytes=250.0,
)


def test_the_tables_on_the_page_are_those_of_the_figures_on_the_other_pages() -> None:
    block = PAGE.partition("<!-- capacity: begin -->")[2].partition("<!-- capacity: end -->")[0]
    computed = capacity.text(costs_of(PERFORMANCE, OPERATIONS))
    assert block.strip() == computed.strip(), "put them in again: python bench/capacity.py"


def test_all_figures_are_found_and_are_numbers() -> None:
    costs = costs_of(PERFORMANCE, OPERATIONS)
    values = [*costs.chunk_us.values(), costs.stream_us, costs.idle_mib, costs.stream_kib]
    values += [costs.unread_kib, costs.journal_bytes]
    assert all(math.isfinite(value) and value > 0 for value in values)


def test_a_table_s_column_is_found_by_its_name() -> None:
    swapped = PERFORMANCE.replace("| direct | llmproxy |", "| llmproxy | direct |")
    assert math.isnan(costs_of(swapped, OPERATIONS).idle_mib)
    with pytest.raises(KeyError):
        costs_of(PERFORMANCE.replace("llmproxy |", "other |"), OPERATIONS)


def test_what_a_million_streams_take() -> None:
    fleet = Fleet(COSTS, 1_000_000, 20)
    assert fleet.requests_per_s == 40_000
    assert fleet.busy_cores == pytest.approx(540)
    assert fleet.processes == 900
    assert fleet.proxies == 57
    assert fleet.memory_gib(COSTS.stream_kib) == pytest.approx(900 / 16 + 1_000_000 / 65_536)
    assert fleet.files_per_process == 2_223 + 128
    assert fleet.streams_per_proxy == 17_544
    assert fleet.addresses == 1
    assert fleet.mongodb_connections == 3_600
    assert fleet.bills_per_s == 80_000
    assert fleet.cores_for_lines == pytest.approx(0.8)
    assert fleet.cores_for_keys == pytest.approx(8.0)
    assert fleet.journals_gb_a_day == pytest.approx(40_000 * 300 * 86_400 / 1e9)
    assert fleet.bills_gb_a_day == pytest.approx(80_000 * 250 * 86_400 / 1e9)


def test_a_process_has_as_many_streams_as_keep_its_core_busy() -> None:
    assert COSTS.streams_per_process(20) == 1_111
    assert Fleet(COSTS, 1_111, 20).processes == 1
    assert Fleet(COSTS, 1_112, 20).processes == 2


def test_slow_streams_need_more_addresses_than_fast_ones() -> None:
    cheap = replace(COSTS, chunk_us={4: 1.0, 20: 25.0, 50: 40.0})
    assert Fleet(cheap, 50_000, 4).addresses == 2
    assert Fleet(cheap, 28_232, 4).addresses == 1
    assert Fleet(cheap, 28_233, 4).addresses == 2


def test_the_formulas_on_the_page_have_the_constants_of_the_sums() -> None:
    formulas = PAGE.partition("## The formulas")[2].partition("<!--")[0]
    assert f"streams x chunks/s / {capacity.ANSWER_CHUNKS}\n" in formulas
    assert f"cores busy / {capacity.BUSY}, rounded up" in formulas
    assert f"processes / {capacity.PROXY_CORES}, rounded up" in formulas
    assert (
        f"streams of a proxy (all processes of one machine) / {capacity.LOCAL_PORTS:,}, rounded up"
        in formulas
    )
    assert f"2 x streams / processes, rounded up, + {capacity.OTHER_FILES}" in formulas
    assert f"processes x {capacity.POOL_SIZE}, to MongoDB" in formulas
    assert capacity.POOL_SIZE == POOL_SIZE
    assert f"requests/s x {capacity.BILLS_PER_REQUEST}, into MongoDB" in formulas
    assert capacity.OTHER_FILES == RESERVE

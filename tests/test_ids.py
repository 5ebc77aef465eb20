"""Request ids are UUIDs of version 7, sorted by time."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid

from llmproxy.ids import new_request_id


def test_an_id_is_a_uuid_of_version_7_in_its_usual_spelling():
    for _ in range(1000):
        text = new_request_id()
        parsed = uuid.UUID(text)
        assert str(parsed) == text
        assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)


def test_an_id_begins_with_the_milliseconds_since_1970():
    before = time.time_ns() // 1_000_000
    stamp = uuid.UUID(new_request_id()).int >> 80
    assert before <= stamp <= time.time_ns() // 1_000_000


def test_ids_sort_by_time(monkeypatch):
    made = []
    for moment_ms in (0, 1, 999, 1_000, 1_700_000_000_000, 1_700_000_000_001, 2**48 - 1):
        monkeypatch.setattr(time, "time_ns", lambda ms=moment_ms: ms * 1_000_000)
        made.append(new_request_id())
    assert made == sorted(made)


def test_ids_of_the_same_moment_differ_in_all_their_random_bits(monkeypatch):
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_000_000)
    numbers = [uuid.UUID(new_request_id()).int for _ in range(2000)]
    assert len(set(numbers)) == 2000
    sometimes = 0
    for number in numbers:
        sometimes |= number ^ numbers[0]
    assert sometimes.bit_count() == 74  # 12 + 62: RFC 9562 section 5.7


FORKED = """
import os
from llmproxy.ids import new_request_id
new_request_id()
child = os.fork()
os.write(1, "".join(new_request_id()[15:] + chr(10) for _ in range(300)).encode())
if child:
    os.waitpid(child, 0)
"""


def test_a_child_process_has_ids_of_its_own():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, check=True)
    ids = done.stdout.split()
    assert len(set(ids)) == len(ids) == 600

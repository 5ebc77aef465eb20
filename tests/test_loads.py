"""Numbers that several processes share."""

from __future__ import annotations

import os
import subprocess
import sys

from llmproxy.loads import GONE, Loads


def test_who_holds_the_fewest_takes_the_next_one_and_nobody_waits_for_the_dead() -> None:
    loads = Loads.create(3)
    loads.set(0, 5)
    assert loads.take_turn(0)
    assert loads.take_turn(0)  # nobody else is there
    loads.set(2, 4)
    assert (loads.take_turn(0), loads.take_turn(2)) == (False, True)
    assert loads.take_turn(2)  # it still holds fewer
    loads.set(2, GONE)
    assert loads.take_turn(0)
    loads.close()


def test_those_who_hold_as_many_take_turns() -> None:
    loads = Loads.create(2)
    loads.set(0, 3)
    loads.set(1, 3)
    taken = []
    for _ in range(6):
        taken.append(0 if loads.take_turn(0) else 1)
        assert taken[-1] == 0 or loads.take_turn(1)
    assert taken == [0, 1, 0, 1, 0, 1]
    loads.close()


def test_one_worker_alone_always_has_its_turn() -> None:
    loads = Loads.create(1)
    loads.set(0, 7)
    assert all(loads.take_turn(0) for _ in range(3))
    loads.close()


def test_another_process_sees_and_changes_the_same_numbers() -> None:
    loads = Loads.create(2)
    loads.set(0, 7)
    text = f"""
from llmproxy.loads import Loads
loads = Loads({loads.descriptor})
loads.set(1, 8)
assert not loads.take_turn(1) and loads.take_turn(0)
loads.set(1, 6)
"""
    subprocess.run([sys.executable, "-c", text], pass_fds=[loads.descriptor], check=True)
    assert (loads.take_turn(0), loads.take_turn(1)) == (False, True)
    descriptor = loads.descriptor
    loads.close()
    assert not os.path.exists(f"/proc/self/fd/{descriptor}")

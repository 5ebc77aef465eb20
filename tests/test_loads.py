"""Numbers that several processes share."""

from __future__ import annotations

import os
import subprocess
import sys

from llmproxy.loads import GONE, Loads


def test_the_worker_that_holds_the_fewest_is_told_so_and_nobody_waits_for_the_dead() -> None:
    loads = Loads.create(3)
    loads.set(0, 5)
    assert loads.is_least(0)
    loads.set(2, 5)
    assert loads.is_least(0)
    loads.set(2, 4)
    assert (loads.is_least(0), loads.is_least(2)) == (False, True)
    loads.set(2, GONE)
    assert loads.is_least(0)
    loads.close()


def test_another_process_sees_and_changes_the_same_numbers() -> None:
    loads = Loads.create(2)
    loads.set(0, 7)
    text = f"""
from llmproxy.loads import Loads
loads = Loads({loads.descriptor})
loads.set(1, 8)
assert loads.is_least(0) and not loads.is_least(1)
loads.set(1, 6)
"""
    subprocess.run([sys.executable, "-c", text], pass_fds=[loads.descriptor], check=True)
    assert (loads.is_least(0), loads.is_least(1)) == (False, True)
    descriptor = loads.descriptor
    loads.close()
    assert not os.path.exists(f"/proc/self/fd/{descriptor}")

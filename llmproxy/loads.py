"""How many connections each worker holds: numbers in memory that all of them share.

A client's connection stays with the worker that accepted it, for hours maybe. The kernel gives it
to whoever asks first, and in a rush that is always the same one.
"""

from __future__ import annotations

import mmap
import os

#: The number of a worker that is not there: nobody waits for it.
GONE = 2**31 - 1
_SIZE = 4


class Loads:
    """One number for each worker, which it writes itself; the supervisor writes `GONE`."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, 0)
        self._numbers = memoryview(self._memory).cast("i")

    @classmethod
    def create(cls, count: int) -> Loads:
        """For `count` workers, none of which is there yet. Raises OSError."""
        descriptor = os.memfd_create("llmproxy-loads")
        os.ftruncate(descriptor, count * _SIZE)
        loads = cls(descriptor)
        for number in range(count):
            loads.set(number, GONE)
        return loads

    def set(self, number: int, connections: int) -> None:
        """Worker `number` holds so many."""
        self._numbers[number] = connections

    def is_least(self, number: int) -> bool:
        """Whether no other worker holds fewer than this one."""
        return self._numbers[number] <= min(self._numbers)

    def close(self) -> None:
        """Give the memory back."""
        self._numbers.release()
        self._memory.close()
        os.close(self.descriptor)

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
    """One number for each worker, which it writes itself; the supervisor writes `GONE`.

    The last number tells who has taken a connection last.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, 0)
        self._numbers = memoryview(self._memory).cast("i")

    @classmethod
    def create(cls, count: int) -> Loads:
        """For `count` workers, none of which is there yet. Raises OSError."""
        descriptor = os.memfd_create("llmproxy-loads")
        os.ftruncate(descriptor, (count + 1) * _SIZE)
        loads = cls(descriptor)
        for number in range(count + 1):
            loads.set(number, GONE)
        return loads

    def set(self, number: int, connections: int) -> None:
        """Worker `number` holds so many."""
        self._numbers[number] = connections

    def take_turn(self, number: int) -> bool:
        """Whether a connection that comes is this worker's: no other one holds fewer, or as many
        without having taken the last one."""
        *held, last = self._numbers
        mine = held[number]
        others = min(held[:number] + held[number + 1 :], default=GONE)
        if mine > others or (mine == others and last == number):
            return False
        self._numbers[-1] = number
        return True

    def close(self) -> None:
        """Give the memory back."""
        self._numbers.release()
        self._memory.close()
        os.close(self.descriptor)

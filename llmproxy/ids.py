"""Request ids: UUID version 7 (RFC 9562 section 5.7), so that they sort by time."""

from __future__ import annotations

import os
import time

_VERSION_AND_VARIANT = 0x7 << 76 | 0x2 << 62
_RANDOM = (1 << 80) - 1 & ~(0xF << 76 | 0x3 << 62)
_BATCH = 256
# Random numbers for the next ids, as each question to the kernel takes half a microsecond. Those
# that a child process begins with are its parent's.
_numbers: list[int] = []
os.register_at_fork(after_in_child=_numbers.clear)


def new_request_id() -> str:
    """A fresh id, for example `01936b1e-6f2a-7c3d-9a41-5b0c7d8e9f10`."""
    if not _numbers:
        _fill()
    bits = time.time_ns() // 1_000_000 << 80 | _VERSION_AND_VARIANT | _numbers.pop()
    text = f"{bits:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _fill() -> None:
    random = os.urandom(10 * _BATCH)
    _numbers.extend(
        int.from_bytes(random[at : at + 10]) & _RANDOM for at in range(0, len(random), 10)
    )

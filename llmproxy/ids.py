"""Request ids: UUID version 7 (RFC 9562 section 5.7), so that they sort by time."""

from __future__ import annotations

import os
import time


def new_request_id() -> str:
    """A fresh id, for example `01936b1e-6f2a-7c3d-9a41-5b0c7d8e9f10`."""
    bits = time.time_ns() // 1_000_000 << 80 | int.from_bytes(os.urandom(10))
    bits = bits & ~(0xF << 76) | 0x7 << 76  # version
    bits = bits & ~(0x3 << 62) | 0x2 << 62  # variant
    text = f"{bits:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"

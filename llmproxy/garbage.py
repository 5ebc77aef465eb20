"""Python's collector of garbage, for a process with many streams.

What a request leaves is freed at once, as nothing in it refers to itself (errors' tracebacks do,
and little else). So there is hardly ever anything to collect, while to look for it takes the longer
the more streams there are, and all of them stand still meanwhile.
"""

from __future__ import annotations

import gc

#: How many objects more than before make it look at the young ones; how often it looks at all that
#: were made since the last look at everything; and how often at everything.
THRESHOLDS = (10_000, 10, 20)


def collect_rarely() -> None:
    """Leave out what there is now, which stays, and look for garbage less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)

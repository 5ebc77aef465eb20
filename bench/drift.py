"""Whether a figure stays where it is, in a long series of samples."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

#: The first fifth is left out: caches fill, and the allocator finds its size.
FIFTHS = 5
SLOPE_UNIT = 100_000

Sample = tuple[float, float]


@dataclass(frozen=True)
class Drift:
    """`early` and `late`: the medians of the second and of the last fifth. `slope`: the median of
    the slopes between any two samples after the first fifth, for 100,000 done. `allowed`: how much
    more than early late may be."""

    early: float
    late: float
    slope: float
    allowed: float

    @property
    def growth(self) -> float:
        return self.late - self.early

    @property
    def flat(self) -> bool:
        return self.growth <= self.allowed


def drift(samples: Sequence[Sample], least: float, part: float) -> Drift:
    """Of (done, value) pairs in their order, ten or more. Allowed is the larger of `least` and of
    `part` of the early median. Medians, so that a few samples in the middle of something don't
    count."""
    if len(samples) < 2 * FIFTHS:
        raise ValueError(f"{len(samples)} samples are too few")
    size = len(samples) // FIFTHS
    later = samples[size:]
    early = statistics.median(value for _, value in later[:size])
    late = statistics.median(value for _, value in samples[-size:])
    slopes = [(b - a) / (y - x) for (x, a), (y, b) in combinations(later, 2) if y > x]
    slope = SLOPE_UNIT * statistics.median(slopes)
    return Drift(early, late, slope, max(least, part * early))

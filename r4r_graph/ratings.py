"""Rating scales, what was observed on them, and what is predicted on them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from r4r_graph.errors import DataError, SettingError

Readout = Literal["mean", "median", "mode"]
"""How one number is read out of a rating distribution."""

READOUTS: tuple[Readout, ...] = ("mean", "median", "mode")

_LONGEST_SCALE = 100


@dataclass(frozen=True, slots=True)
class RatingStats:
    """Statistics of *all* earlier ratings on one side of a pair."""

    count: int = 0
    mean: float | None = None
    """None without earlier ratings, never nan."""
    spread: float | None = None
    """Population standard deviation; None without earlier ratings."""

    @classmethod
    def of(cls, ratings: Sequence[float]) -> Self:
        """Statistics of the ratings given."""
        return cls.from_sums(len(ratings), sum(ratings), sum(r * r for r in ratings))

    @classmethod
    def from_sums(cls, count: int, total: float, squares: float) -> Self:
        """Statistics from the count, the sum and the sum of squares."""
        if count == 0:
            return cls()
        mean = total / count
        return cls(count, mean, math.sqrt(max(0.0, squares / count - mean * mean)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RatingScale:
    """An ordered list of rating values, such as 1 to 5.

    Observed ratings may lie between the values; predicted distributions sit on them.
    """

    values: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)

    def __post_init__(self) -> None:
        """Refuse what is no ordered scale."""
        rising = all(a < b for a, b in itertools.pairwise(self.values))
        sound = rising and all(map(math.isfinite, self.values))
        if len(self.values) < 2 or not sound or len(set(self.labels)) < len(self.values):
            raise SettingError(
                f"bad rating scale {list(self.values)}: needs at least two values, each larger "
                "than the one before"
            )

    @classmethod
    def parse(cls, text: str | Sequence[float]) -> Self:
        """A scale from `"1-5"`, `"0.5,1,1.5"` or a list of numbers.

        Raises:
            SettingError: not a scale.
        """
        if not isinstance(text, str):
            return cls(tuple(float(v) for v in text))
        try:
            if "," in text:
                return cls(tuple(float(v) for v in text.split(",")))
            low, high = (int(v) for v in text.split("-"))
            if high - low > _LONGEST_SCALE:
                raise SettingError(f"bad rating scale {text!r}: more than {_LONGEST_SCALE} values")
            return cls(tuple(float(v) for v in range(low, high + 1)))
        except ValueError as error:
            if isinstance(error, SettingError):
                raise
            raise SettingError(
                f"bad rating scale {text!r}: write it as 1-5 or as 0.5,1,1.5,2"
            ) from None

    @property
    def low(self) -> float:
        """The smallest value."""
        return self.values[0]

    @property
    def high(self) -> float:
        """The largest value."""
        return self.values[-1]

    @property
    def labels(self) -> tuple[str, ...]:
        """How each value is written in prompts and in the model's answer."""
        return tuple(f"{v:g}" for v in self.values)

    def check(self, rating: float) -> float:
        """`rating`, if it lies within the scale.

        Raises:
            DataError: it does not.
        """
        if not self.low <= rating <= self.high:
            raise DataError(
                f"rating {rating:g} is off the scale {self.low:g} to {self.high:g}; "
                "declare another scale if these reviews use one"
            )
        return rating


@dataclass(frozen=True, slots=True)
class RatingDistribution:
    """Probabilities over a scale's values, and the read-outs defined on them."""

    scale: RatingScale
    probabilities: tuple[float, ...]
    """One probability a value, summing to 1."""
    mass: float = 1.0
    """Raw probability of the scale's tokens before masking: a health signal, near 1 after
    training."""

    def __post_init__(self) -> None:
        """Refuse what is no distribution over the scale."""
        p = self.probabilities
        sound = len(p) == len(self.scale.values) and all(math.isfinite(v) and v >= 0 for v in p)
        if not sound or not math.isclose(sum(p), 1.0, abs_tol=1e-3):
            raise ValueError(f"not a distribution over {self.scale.labels}: {p}")

    @property
    def mean(self) -> float:
        """Expected value."""
        return sum(v * p for v, p in zip(self.scale.values, self.probabilities, strict=True))

    @property
    def median(self) -> float:
        """Interpolated median: an inner value's mass is spread evenly over its cell, half of it
        towards either neighbour. An end value keeps its mass: no rating lies beyond it, and of
        those around it nearly all are the end itself."""
        values, cells = self.scale.values, []
        for i, (value, p) in enumerate(zip(values, self.probabilities, strict=True)):
            below = value - values[i - 1] if 0 < i < len(values) - 1 else 0.0
            above = values[i + 1] - value if 0 < i < len(values) - 1 else 0.0
            cells.append((value - below / 2, value, p / 2))
            cells.append((value, value + above / 2, p / 2))
        # From both ends: they differ where exactly half of the mass lies below a gap without any.
        backwards = [(end, start, p) for start, end, p in reversed(cells)]
        return (_halfway(cells) + _halfway(backwards)) / 2

    @property
    def mode(self) -> float:
        """Most probable value; the lower one on a tie."""
        best = max(self.probabilities)
        return self.scale.values[self.probabilities.index(best)]

    @property
    def entropy(self) -> float:
        """Shannon entropy in nats."""
        return -sum(p * math.log(p) for p in self.probabilities if p > 0) + 0.0

    @property
    def confidence(self) -> float:
        """The mode's probability."""
        return max(self.probabilities)

    def read(self, readout: Readout) -> float:
        """One number out of the distribution."""
        return {"mean": self.mean, "median": self.median, "mode": self.mode}[readout]

    @classmethod
    def mix(cls, parts: Sequence[RatingDistribution]) -> RatingDistribution:
        """The equal-weight mixture of distributions over one scale."""
        n = len(parts)
        columns = zip(*(part.probabilities for part in parts), strict=True)
        mixed = tuple(sum(column) / n for column in columns)
        return cls(parts[0].scale, mixed, sum(part.mass for part in parts) / n)

    def to_dict(self) -> dict[str, float]:
        """Value (as written in prompts) to probability."""
        return dict(zip(self.scale.labels, self.probabilities, strict=True))


def _halfway(cells: Iterable[tuple[float, float, float]]) -> float:
    """Where half of the mass is passed, over cells of (start, end, mass) in order."""
    passed = 0.0
    place = 0.0
    for start, end, mass in cells:
        if mass > 0 and passed + mass >= 0.5 - 1e-12:
            return start + (end - start) * (0.5 - passed) / mass
        passed += mass
        place = end
    return place

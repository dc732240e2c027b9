"""A calibration: makes a predictor's distributions as sure as they may be.

    p' = softmax(log p / T + b)

One temperature T and one bias b a rating value, fitted on validation rows (temperature scaling
with the biases of vector scaling: Guo et al. 2017, arXiv 1706.04599). It is a JSON file beside the
predictor's adapter, and the engine applies it to every distribution that this adapter returns. A
calibration belongs to a scale and to the weights that it was fitted to.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from r4r_graph.caches import write_atomically
from r4r_graph.errors import DataError, ModelError, SettingError
from r4r_graph.loglinear import fit_weights
from r4r_graph.ratings import RatingDistribution, RatingScale

CALIBRATION_FILE = "calibration.json"
"""Its name beside the adapter."""

FORMAT = 1
"""Version of the file's format."""

LEAST_PROBABILITY = 1e-12
"""A probability below this, zero included, has this one's logarithm."""

LEAST_INVERSE = 0.05
"""The least 1/T of a fit: a predictor that is worse than none is flattened, never turned around."""

_LEAST_L2 = 1e-6  # a value that never occurs would have a bias without end
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CalibrationFacts:
    """How a calibration was fitted."""

    rows: int
    """Validation rows that it was fitted on."""
    nll_before: float
    """Mean negative log-likelihood (nats) of those rows as the predictor alone has it."""
    nll_after: float
    """The same, each half of the rows with a calibration fitted on the other half. Where that was
    no improvement, the identity is stored."""
    split_digest: str
    """Digest of the rows."""
    weights_digest: str = ""
    """Digest of the adapter's weights."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Temperature and biases for the distributions over one scale."""

    values: tuple[float, ...]
    """The scale's values."""
    temperature: float = 1.0
    """Above 1 flattens, below 1 sharpens."""
    bias: tuple[float, ...] = ()
    """Added to each value's log-probability; empty: zeros."""
    facts: CalibrationFacts | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Refuse what is no calibration.

        Raises:
            SettingError: no scale, no temperature above 0, not one finite bias a value.
        """
        RatingScale(self.values)
        if not self.bias:
            object.__setattr__(self, "bias", (0.0,) * len(self.values))
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise SettingError(f"bad temperature {self.temperature}: must be above 0")
        if len(self.bias) != len(self.values) or not all(map(math.isfinite, self.bias)):
            raise SettingError(
                f"bad biases {list(self.bias)}: one finite number for each of {len(self.values)} "
                "values"
            )

    @property
    def scale(self) -> RatingScale:
        """The scale that it is for."""
        return RatingScale(self.values)

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return self.temperature == 1.0 and not any(self.bias)

    def check_scale(self, scale: RatingScale) -> None:
        """Refuse another scale.

        Raises:
            ModelError: this calibration is for other values.
        """
        if scale.values != self.values:
            ours, theirs = (", ".join(s.labels) for s in (self.scale, scale))
            raise ModelError(
                f"the predictor's calibration is for the ratings {ours}, and asked for are "
                f"{theirs}; ask on its scale, calibrate again, or remove {CALIBRATION_FILE} from "
                "the adapter"
            )

    def apply(self, distribution: RatingDistribution) -> RatingDistribution:
        """The calibrated distribution; its `mass` is kept.

        Raises:
            ModelError: it is over another scale.
        """
        self.check_scale(distribution.scale)
        if self.is_identity:
            return distribution
        scores = [
            math.log(max(p, LEAST_PROBABILITY)) / self.temperature + bias
            for p, bias in zip(distribution.probabilities, self.bias, strict=True)
        ]
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        whole = math.fsum(weights)
        probabilities = tuple(weight / whole for weight in weights)
        return RatingDistribution(distribution.scale, probabilities, distribution.mass)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as in the file."""
        return {
            "format": FORMAT,
            "values": list(self.values),
            "temperature": self.temperature,
            "bias": list(self.bias),
            "facts": asdict(self.facts) if self.facts is not None else None,
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Self:
        """The calibration back from `to_dict`.

        Raises:
            ModelError: it is none, or one of a later format.
        """
        version = tree.get("format")
        if version != FORMAT or isinstance(version, bool):
            raise ModelError(f"format {version!r} is not known here, only {FORMAT}")
        try:
            facts = tree.get("facts")
            return cls(
                _numbers(tree["values"]),
                _number(tree["temperature"]),
                _numbers(tree["bias"]),
                None if facts is None else CalibrationFacts(**facts),
            )
        except KeyError as error:
            raise ModelError(f"no {error}") from None
        except (TypeError, OverflowError, SettingError) as error:
            raise ModelError(str(error)) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; whoever reads meanwhile sees the old one or this one, never a part.

        Raises:
            OSError: it could not be written; an old one is still there.
        """
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The calibration in a file.

        Raises:
            ModelError: it cannot be read; the message names it.
        """
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(tree, dict):
                raise ModelError("not a JSON object")
            return cls.from_dict(tree)
        except (OSError, ValueError, ModelError) as error:
            raise ModelError(
                f"the calibration {path} cannot be used: {error}; calibrate again, or remove it"
            ) from error


def calibrated(probabilities: Floats, calibration: Calibration) -> Floats:
    """What `Calibration.apply` makes of many distributions (n, values)."""
    logs = np.log(np.maximum(probabilities, LEAST_PROBABILITY))
    scores = logs / calibration.temperature + np.asarray(calibration.bias)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def fit_calibration(
    probabilities: Floats, targets: Floats, scale: RatingScale, *, l2: float
) -> Calibration:
    """The calibration with the least mean negative log-likelihood plus l2 ((1/T - 1)^2 + |b|^2).

    In a = 1/T and b the distribution softmax(a log p + b) is log-linear, so the problem is convex
    and has one minimum, which Newton's method finds. The same rows give the same calibration.

    Args:
        probabilities: distributions over the scale (n, values), none missing.
        targets: the truth as weights on the values (n, values), each row summing to 1.
        scale: the rating values.
        l2: pull towards the identity; at least 1e-6 is used.

    Raises:
        DataError: there are no rows.
        SettingError: `l2` is negative.
    """
    if len(targets) == 0:
        raise DataError("no rows to calibrate on")
    if not l2 >= 0:
        raise SettingError(f"bad l2 {l2}: must be 0 or more")
    logs = np.log(np.maximum(probabilities, LEAST_PROBABILITY))
    pull = max(l2, _LEAST_L2)
    rows, values = logs.shape
    each = np.broadcast_to(np.eye(values), (rows, values, values))
    features = np.concatenate([logs[:, :, None], each], axis=2)
    identity = np.concatenate([[1.0], np.zeros(values)])
    theta = fit_weights(features, targets, identity, pull)
    if theta[0] < LEAST_INVERSE:  # convex: the least value within the bound lies on the bound
        bound, free = identity.copy(), np.ones(values + 1, dtype=bool)
        bound[0], free[0] = LEAST_INVERSE, False
        theta = fit_weights(features, targets, bound, pull, free)
    return Calibration(scale.values, float(1.0 / theta[0]), tuple(theta[1:].tolist()))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _numbers(values: Any) -> tuple[float, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is no list of numbers")
    return tuple(map(_number, values))

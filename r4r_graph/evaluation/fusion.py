"""A fusion of a predictor's distributions with what the averages say, in a handful of numbers.

    fusion = fit_fusion(predictions, validation, source, scale)
    fused = fuse(fusion, predictions, targets, source, scale)

    p' = softmax(a log p + b + (c user + d item) z + e spread z^2)

z is a value's place on the scale from -1 to 1; `user` and `item` are both sides' shrunk biases and
`spread` is that of the user's ratings, in halves of the scale. A fusion says how much of an error
is left to history statistics after reading; beside the same fusion of a predictor that reads no
words, it says what the words add. It is fitted on rows that no training saw, and is no part of the
experts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from r4r_graph.caches import write_atomically
from r4r_graph.calibration import LEAST_PROBABILITY
from r4r_graph.errors import DataError, SettingError
from r4r_graph.evaluation.floors import HistoryStats
from r4r_graph.evaluation.metrics import Floats, missing, readings, soft_targets
from r4r_graph.evaluation.predictions import Predictions
from r4r_graph.evaluation.targets import digest_targets
from r4r_graph.evidence import SHRINKAGE
from r4r_graph.loglinear import fit_weights, shares
from r4r_graph.ratings import RatingScale
from r4r_graph.reviews import ReviewSource
from r4r_graph.schema import Review

TERMS = ("log_probability", "user", "item", "spread")
"""What is weighed, beside a bias a value."""

LEAST_ROWS = 30

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Pulls towards the predictor as it is that are tried: few rows need a strong one, or the fusion
learns those rows."""

_FOLDS = 5


@dataclass(frozen=True, slots=True)
class Fusion:
    """The numbers of a fusion."""

    values: tuple[float, ...]
    """The scale's values."""
    centre: float
    """Mean rating of the rows it was fitted on; biases are distances from it."""
    weights: tuple[float, ...]
    """One for each of `TERMS`."""
    bias: tuple[float, ...]
    """One a value."""
    pull: float
    """Towards the predictor as it is."""
    rows: int
    digest: str
    """Of the rows it was fitted on."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        row = asdict(self) | {"weights": dict(zip(TERMS, self.weights, strict=True))}
        write_atomically(Path(path), json.dumps(row, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Back from `save`.

        Raises:
            DataError: it cannot be read; the message names it.
        """
        try:
            row = json.loads(Path(path).read_text(encoding="utf-8"))
            weights = tuple(float(row["weights"][name]) for name in TERMS)
            found = cls(
                tuple(map(float, row["values"])),
                float(row["centre"]),
                weights,
                tuple(map(float, row["bias"])),
                float(row["pull"]),
                int(row["rows"]),
                str(row["digest"]),
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"the fusion {path} cannot be used: {error}") from None
        if len(found.bias) != len(found.values):
            raise DataError(f"the fusion {path} cannot be used: not one bias a value")
        return found


def fit_fusion(
    predictions: Predictions,
    targets: Sequence[Review],
    source: ReviewSource,
    scale: RatingScale,
    *,
    pull: float | None = None,
) -> Fusion:
    """The fusion with the least negative log-likelihood on these rows.

    Args:
        predictions: of the targets, as distributions; rows without one are left out.
        targets: rows that neither training nor the final test uses.
        source: holds the histories.
        scale: the rating values.
        pull: towards the predictor as it is; None takes the one of `STRENGTHS` whose likelihood on
            rows left out of the fit is greatest (five folds).

    Raises:
        DataError: the predictions are no distributions, or too few.
    """
    probabilities = _distributions(predictions)
    known = ~missing(probabilities)
    if int(known.sum()) < LEAST_ROWS:
        raise DataError(
            f"a fusion needs {LEAST_ROWS} rows with a distribution, and {predictions.name} has "
            f"{int(known.sum())}"
        )
    truths = np.array([target.rating for target in targets], dtype=np.float64)
    centre = float(truths[known].mean())
    features = _features(probabilities[known], _some(targets, known), source, scale, centre)
    start = np.zeros(features.shape[2])
    start[0] = 1.0
    soft = soft_targets(truths[known], scale)
    if pull is None:
        pull = min(STRENGTHS, key=lambda tried: _loss_left_out(features, soft, start, tried))
    weights = fit_weights(features, soft, start, max(pull, 1e-6))
    return Fusion(
        scale.values,
        centre,
        tuple(weights[: len(TERMS)].tolist()),
        tuple(weights[len(TERMS) :].tolist()),
        pull,
        int(known.sum()),
        digest_targets(_some(targets, known)),
    )


def fuse(
    fusion: Fusion,
    predictions: Predictions,
    targets: Sequence[Review],
    source: ReviewSource,
    scale: RatingScale,
) -> Predictions:
    """The fused predictions, named `NAME fused`. What was no prediction stays none.

    Raises:
        DataError: the predictions are no distributions, or these rows are those it was fitted on.
        SettingError: the fusion is for another scale.
    """
    if fusion.values != scale.values:
        raise SettingError(f"the fusion is for the values {fusion.values}, not {scale.values}")
    if fusion.digest == digest_targets(targets):
        raise DataError("these are the rows that the fusion was fitted on: score it on others")
    probabilities = _distributions(predictions)
    known = ~missing(probabilities)
    fused = np.full_like(probabilities, np.nan)
    features = _features(probabilities[known], _some(targets, known), source, scale, fusion.centre)
    fused[known] = shares(features, np.array([*fusion.weights, *fusion.bias]))
    return replace(
        predictions,
        name=f"{predictions.name} fused",
        points=readings(fused, scale),
        probabilities=fused,
        rationales=(),
        mass=None,
    )


def _loss_left_out(features: Floats, targets: Floats, start: Floats, pull: float) -> float:
    """Negative log-likelihood of rows by weights that were fitted on the others, in nats."""
    # Rows come in some order, which is none of the folds' business.
    fold = np.random.default_rng(0).permutation(len(features)) % _FOLDS
    found = 0.0
    for left_out in range(_FOLDS):
        out = fold == left_out
        weights = fit_weights(features[~out], targets[~out], start, pull)
        likely = np.log(np.maximum(shares(features[out], weights), LEAST_PROBABILITY))
        found -= float((targets[out] * likely).sum())
    return found / len(features)


def _features(
    probabilities: Floats,
    targets: Sequence[Review],
    source: ReviewSource,
    scale: RatingScale,
    centre: float,
) -> Floats:
    """Features (n, values, terms and biases)."""
    stats = HistoryStats.of(targets, source)
    half = (scale.high - scale.low) / 2.0
    place = (np.asarray(scale.values) - scale.low) / half - 1.0
    spread = np.nan_to_num(stats.user.spread) / half
    rows, values = probabilities.shape
    biases = np.broadcast_to(np.eye(values), (rows, values, values))
    terms = [
        np.log(np.maximum(probabilities, LEAST_PROBABILITY)),
        np.outer(stats.user.bias(centre, SHRINKAGE) / half, place),
        np.outer(stats.item.bias(centre, SHRINKAGE) / half, place),
        np.outer(spread, place**2),
    ]
    return np.concatenate([np.stack(terms, axis=2), biases], axis=2)


def _distributions(predictions: Predictions) -> Floats:
    if predictions.probabilities is None:
        raise DataError(
            f"{predictions.name} predicts numbers: a fusion weighs distributions over the scale"
        )
    return predictions.probabilities


def _some(targets: Sequence[Review], known: Any) -> list[Review]:
    return [target for target, there in zip(targets, known.tolist(), strict=True) if there]


def fusions_by_name(texts: Sequence[str], names: Sequence[str]) -> Mapping[str, Fusion]:
    """From `NAME=FILE` to the fusions of the sets of those names.

    Raises:
        SettingError: a text of another form, or a name that none of `names` is.
        DataError: a file cannot be read.
    """
    found = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or name not in names:
            raise SettingError(
                f"bad --fusion {text!r}: write it as NAME=FILE, NAME one of {', '.join(names)}"
            )
        found[name] = Fusion.load(path)
    return found

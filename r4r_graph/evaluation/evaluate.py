"""One evaluation: predictions of targets against the truth, against floors, against each other.

    report = evaluate(targets, source, [Contender(predictions)], scale=scale)

All floors are computed on the same rows from the same history, and every comparison is paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np

from r4r_graph.errors import DataError, MissingExtraError, SettingError
from r4r_graph.evaluation.boosting import boosting_predictions
from r4r_graph.evaluation.floors import HistoryStats, floor_predictions
from r4r_graph.evaluation.metrics import (
    RESAMPLES,
    Floats,
    PointScores,
    Scores,
    bootstrap,
    errors,
    mean,
    missing,
    paired_difference,
    root_mean_square,
    score,
    score_points,
)
from r4r_graph.evaluation.predictions import Predictions
from r4r_graph.evaluation.probes import NOT_APPLICABLE
from r4r_graph.evaluation.ranking import ranking, ranking_differences
from r4r_graph.evaluation.reliability import reliability
from r4r_graph.evaluation.report import (
    Difference,
    EvaluationReport,
    PredictorReport,
    Probe,
    RankingScores,
    RowFacts,
    WordsReport,
)
from r4r_graph.evaluation.slices import slices
from r4r_graph.evaluation.targets import check_distinct, digest_targets, earlier_reviews
from r4r_graph.ratings import READOUTS, RatingScale, Readout
from r4r_graph.reviews import ReviewSource
from r4r_graph.schema import Review

SHOWN_FAILURES = 20
REFERENCE = "shrunk_bias"
"""The floor that slices are held against."""


@dataclass(frozen=True)
class Contender:
    """A set of predictions, and what is known of how they came about."""

    predictions: Predictions
    probes: tuple[Predictions, ...] = ()
    """The same rows under other conditions; see `evaluation.probes`."""
    words: WordsReport | None = None


@dataclass(frozen=True)
class Settings:
    """How an evaluation counts."""

    scale: RatingScale = field(default_factory=RatingScale)
    ks: tuple[int, ...] = (1, 3, 5, 10)
    """Lengths of the top of a ranking."""
    liked: float | None = None
    """From which rating on an item is liked, for the hit rate; None: three quarters up the scale
    (4 on 1-5)."""
    seed: int = 0
    resamples: int = RESAMPLES

    def __post_init__(self) -> None:
        """Refuse what cannot be counted with."""
        if not self.ks or any(k < 1 for k in self.ks):
            raise SettingError(f"bad setting ks={self.ks}: whole numbers, 1 or more")
        if self.resamples < 1:
            raise SettingError(f"bad setting resamples={self.resamples}: must be 1 or more")


def evaluate(
    targets: Sequence[Review],
    source: ReviewSource,
    contenders: Sequence[Contender],
    *,
    settings: Settings | None = None,
    train: Sequence[Review] | None = None,
    drawn_from: int | None = None,
    sample_seed: int | None = None,
) -> EvaluationReport:
    """Score predictions beside all floors.

    Args:
        targets: the rows scored; their ratings are the truth.
        source: holds the histories, from which the floors are computed as of each target's time.
        contenders: sets of predictions, one prediction a target; the first is what the others are
            compared with.
        settings: how to count.
        train: what the floors are fitted on; None: all reviews earlier than every target.
        drawn_from: how many targets there were before a sample was drawn.
        sample_seed: the seed that drew it.

    Raises:
        DataError: no contenders, two of one name, not one prediction a target, a target that no
            prediction could tell from another or that is a training row, or nothing to fit on.
    """
    how = settings or Settings()
    check_distinct(targets)
    _check_contenders(contenders, len(targets))
    train = earlier_reviews(source, targets) if train is None else train
    truths = np.array([target.rating for target in targets], dtype=np.float64)
    histories = HistoryStats.of(targets, source)
    floors = floor_predictions(targets, source, train)
    notes = []
    try:
        floors |= boosting_predictions(targets, source, train, seed=how.seed)
    except MissingExtraError as error:
        notes.append(f"left out: {error}")
    for contender in contenders:
        notes += [
            f"left out: {probe.name} under {probe.condition}, as no row has a rating both ways"
            for probe in contender.probes
            if not _comparable(contender.predictions, probe)
        ]
    rows = _Rows(how, truths, [target.user_id for target in targets], floors, histories)
    first = contenders[0].predictions
    return EvaluationReport(
        facts=RowFacts(
            rows=len(targets),
            targets=len(targets) if drawn_from is None else drawn_from,
            seed=sample_seed,
            digest=digest_targets(targets),
            users=len({target.user_id for target in targets}),
            items=len({target.item_id for target in targets}),
            first=min(target.timestamp for target in targets),
            last=max(target.timestamp for target in targets),
            train_rows=len(train),
        ),
        scale=how.scale.values,
        floors={
            name: score_points(truths, points, how.scale, seed=how.seed, resamples=how.resamples)
            for name, points in floors.items()
        },
        ranking_floors={name: rows.ranked(points) for name, points in floors.items()},
        predictors=tuple(rows.report(each, first, targets) for each in contenders),
        notes=tuple(notes),
    )


class Shared(TypedDict):
    """What every bootstrap of an evaluation is given."""

    seed: int
    resamples: int


@dataclass(frozen=True)
class _Rows:
    """The scored rows, and everything that predictions of them are held against."""

    how: Settings
    truths: Floats
    users: Sequence[str]
    floors: Mapping[str, Floats]
    histories: HistoryStats

    def report(
        self, contender: Contender, first: Predictions, targets: Sequence[Review]
    ) -> PredictorReport:
        """What is found of one contender."""
        mine, how = contender.predictions, self.how
        shared: Shared = {"seed": how.seed, "resamples": how.resamples}
        points = mine.points
        scores: Scores | dict[Readout, PointScores]
        if mine.probabilities is None:
            scores = {r: score_points(self.truths, points[r], how.scale, **shared) for r in points}
            trust = None
        else:
            scores = score(self.truths, mine.probabilities, how.scale, **shared)
            trust = reliability(self.truths, mine.probabilities, how.scale, **shared)
        return PredictorReport(
            name=mine.name,
            scores=scores,
            against={
                name: {r: self.difference(points[r], floor) for r in READOUTS}
                for name, floor in self.floors.items()
            },
            against_first={
                r: self.difference(points[r], first.points[r])
                for r in READOUTS
                if mine is not first
            },
            slices=slices(
                self.truths,
                points,
                self.floors[REFERENCE],
                self.histories,
                how.scale,
                **shared,
            ),
            ranking=self.ranked(points["mean"]),
            ranking_against={
                name: ranking_differences(
                    self.users, self.truths, points["mean"], floor, how.scale, ks=how.ks, **shared
                )
                for name, floor in self.floors.items()
            },
            reliability=trust,
            failures=_failures(mine, targets),
            probes=tuple(
                self.probe(mine, probe) for probe in contender.probes if _comparable(mine, probe)
            ),
            words=contender.words,
            mass=None if mine.mass is None else float(np.nanmean(mine.mass)),
            condition=mine.condition,
            model=mine.model,
        )

    def ranked(self, points: Floats) -> tuple[RankingScores, ...]:
        """How the points order each user's rows."""
        how = self.how
        return ranking(
            self.users,
            self.truths,
            points,
            how.scale,
            ks=how.ks,
            liked=how.liked,
            seed=how.seed,
            resamples=how.resamples,
        )

    def difference(self, one: Floats, other: Floats) -> Difference:
        """Errors of one prediction less those of the other, paired."""
        return _difference(self.truths, (one, one), (other, other), self.how)

    def probe(self, mine: Predictions, probe: Predictions) -> Probe:
        """The rows once more under a condition, less as they are; rows that it does not apply to
        are in neither. See `_comparable`."""
        assert probe.probabilities is not None
        applies = np.array([reason != NOT_APPLICABLE for reason in probe.reasons])
        truths = self.truths[applies]
        before = {readout: mine.points[readout][applies] for readout in READOUTS}
        after = {readout: probe.points[readout][applies] for readout in READOUTS}
        shared: Shared = {"seed": self.how.seed, "resamples": self.how.resamples}
        moved = np.abs(after["mean"] - before["mean"])
        return Probe(
            condition=probe.condition,
            rows=int(applies.sum()),
            missing=int(missing(after["mean"]).sum()),
            moved=bootstrap(mean, moved[~missing(moved)], **shared),
            scores=score(truths, probe.probabilities[applies], self.how.scale, **shared),
            difference=_difference(
                truths,
                (after["median"], after["mean"]),
                (before["median"], before["mean"]),
                self.how,
            ),
        )


def _comparable(mine: Predictions, probe: Predictions) -> bool:
    """Whether any row has a distribution as it is and under the condition."""
    distributions = mine.probabilities is not None and probe.probabilities is not None
    both = ~missing(mine.points["mean"]) & ~missing(probe.points["mean"])
    return distributions and bool(both.any())


def _difference(
    truths: Floats, one: tuple[Floats, Floats], other: tuple[Floats, Floats], how: Settings
) -> Difference:
    """Of each pair the first is read for the MAE, the second for the RMSE."""
    (near, square), (other_near, other_square) = (
        tuple(errors(truths, points, how.scale) for points in pair) for pair in (one, other)
    )
    shared: Shared = {"seed": how.seed, "resamples": how.resamples}
    return Difference(
        mae=paired_difference(near, other_near, mean, **shared),
        rmse=paired_difference(square, other_square, root_mean_square, **shared),
    )


def _failures(predictions: Predictions, targets: Sequence[Review]) -> tuple[str, ...]:
    found = [
        f"{target.user_id} / {target.item_id}: {reason}"
        for target, reason in zip(targets, predictions.reasons, strict=True)
        if reason is not None
    ]
    return tuple(found[:SHOWN_FAILURES])


def check_names(names: Sequence[str]) -> None:
    """Refuse two sets of predictions of one name.

    Raises:
        DataError: there are such.
    """
    if len(set(names)) < len(names):
        raise DataError(f"two sets of predictions have one name: {', '.join(names)}")


def _check_contenders(contenders: Sequence[Contender], rows: int) -> None:
    if not contenders:
        raise DataError("no predictions to evaluate")
    check_names([contender.predictions.name for contender in contenders])
    for contender in contenders:
        for each in (contender.predictions, *contender.probes):
            for readout in READOUTS:
                if len(each.points[readout]) != rows:
                    raise DataError(
                        f"{each.name!r} has {len(each.points[readout])} predictions for {rows} "
                        "targets"
                    )

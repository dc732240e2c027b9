"""What an evaluation found: plain frozen figures, without a word on how they are shown.

Every figure that depends on which rows were drawn is an `Estimate` with its 95 % bootstrap
interval, and every comparison is paired: both sides on the same rows, resampled together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from r4r_graph.evaluation.metrics import Estimate, PointScores, Scores
from r4r_graph.ratings import Readout

Verdict = Literal["better", "worse", "undecided"]


@dataclass(frozen=True, slots=True)
class Difference:
    """Errors of one prediction less those of another, on the same rows. Below zero is better."""

    mae: Estimate
    rmse: Estimate

    def verdict(self, metric: Literal["mae", "rmse"]) -> Verdict:
        """`better` or `worse` only where zero is outside the interval."""
        estimate = self.mae if metric == "mae" else self.rmse
        if not estimate.excludes_zero:
            return "undecided"
        return "better" if estimate.high < 0 else "worse"


@dataclass(frozen=True, slots=True)
class RowFacts:
    """Which rows were scored."""

    rows: int
    targets: int
    """Rows in the file of targets, of which `rows` were drawn."""
    seed: int | None
    """Of the drawing; None where all rows were taken."""
    digest: str
    """Over the rows' users, items and times: two evaluations with one digest scored one sample."""
    users: int
    items: int
    first: float
    """Earliest and latest time of a target (unix seconds)."""
    last: float
    train_rows: int
    """Reviews that the floors were fitted on."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of the rows, and how the predictions do there."""

    by: str
    """`cold start`, `reviews by the user`, `reviews of the item` or `true rating`."""
    label: str
    rows: int
    missing: int
    mae: Estimate
    """Of the median read-out."""
    rmse: Estimate
    """Of the mean read-out."""
    difference: Difference
    """Against the floor `shrunk_bias`: MAE of the median, RMSE of the mean read-out."""


@dataclass(frozen=True, slots=True)
class RankingScores:
    """How well predictions order each user's held-out items; see `evaluation.ranking`."""

    k: int
    users: int
    ndcg: Estimate
    hit_rate: Estimate


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Predicted probabilities of about one size, and how often what they foretold came true."""

    low: float
    high: float
    count: int
    """Probabilities in the bin: every row has one for each value of the scale."""
    predicted: float
    """Their mean; nan in an empty bin."""
    observed: float
    """Share of them that came true; nan in an empty bin."""


@dataclass(frozen=True, slots=True)
class Reliability:
    """Whether the probabilities can be taken at their word."""

    bins: tuple[ReliabilityBin, ...]
    expected_error: float
    """Mean distance between predicted and observed, weighted by the bins' counts."""
    coverage: Mapping[str, Estimate]
    """Nominal level (`0.5`, `0.8`, ...) to the share of truths inside that central interval."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The same rows rated once more with something taken away or exchanged."""

    condition: str
    """See `evaluation.probes.CONDITIONS`."""
    rows: int
    missing: int
    moved: Estimate
    """Mean distance between the mean read-outs with and without the change, rating units."""
    scores: Scores
    """Under the condition."""
    difference: Difference
    """Under the condition less as it is: MAE of the median, RMSE of the mean read-out. Above zero
    the change hurts."""


@dataclass(frozen=True, slots=True)
class WordScore:
    """How near texts come to what they are held against, and how near to the wrong thing."""

    name: str
    """`similarity`, `bleurt`, `judge` or `phrase overlap`; with `, same item` where the floor is
    another user's review of the same item."""
    rows: int
    failed: int
    """Rows that could not be scored; they are left out of the figures and counted here."""
    value: Estimate
    floor: Estimate
    """The same texts, each held against another row's."""
    difference: Estimate
    """Value less floor, paired; not above zero: the texts know nothing of their own row."""


@dataclass(frozen=True, slots=True)
class RationaleForm:
    """Form of the rationales; shares of the rows that have one."""

    rows: int
    empty: int
    """Rows without a rationale; not in the shares."""
    leaks: Estimate
    """Share that names a rating."""
    repeats: Estimate
    """Share that repeats a sentence or a run of words."""
    malformed: Estimate
    """Share with any fault of form, repeats included."""
    distinct: float
    """Share of different texts among the rationales."""
    words: tuple[float, float, float]
    """5th percentile, median and 95th percentile of the length in words."""
    examples: tuple[str, ...]
    """Findings, at most twenty, as `row 3: stars: 'five stars'`."""


@dataclass(frozen=True, slots=True)
class WordsReport:
    """Quality of what was written. A part that was not asked for is None or empty."""

    form: RationaleForm | None = None
    rationales: tuple[WordScore, ...] = ()
    """Rationales against the review that the user wrote later."""
    summaries: WordScore | None = None
    """Aspect summaries against the teacher's."""


@dataclass(frozen=True, slots=True)
class PredictorReport:
    """One set of predictions, held against the floors."""

    name: str
    scores: Scores | Mapping[Readout, PointScores]
    """Point scores alone where the predictions are no distributions."""
    against: Mapping[str, Mapping[Readout, Difference]]
    """Floor (or `boosting_squared`, `boosting_absolute`) to read-out to difference."""
    against_first: Mapping[Readout, Difference]
    """Against the first set of predictions; empty for that one itself."""
    slices: tuple[Slice, ...]
    ranking: tuple[RankingScores, ...]
    """Of the mean read-out, one a k; empty where no user has two held-out items."""
    ranking_against: Mapping[str, tuple[Estimate, ...]]
    """Floor to the paired difference in NDCG, one a k; above zero is better."""
    reliability: Reliability | None
    failures: tuple[str, ...]
    """Reasons of rows without a prediction, as `user / item: reason`, at most twenty."""
    probes: tuple[Probe, ...] = ()
    words: WordsReport | None = None
    mass: float | None = None
    """Mean raw probability of the rating tokens before masking; None where it is not known."""
    condition: str = "as_is"
    """Under which the predictions were made."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Base model, adapters and prompt digests, where they are known."""

    def point_scores(self, readout: Readout) -> PointScores:
        """Scores of one read-out, whatever kind of predictions these are."""
        if isinstance(self.scores, Scores):
            return PointScores(
                self.scores.rows,
                self.scores.missing,
                self.scores.mae[readout],
                self.scores.rmse[readout],
            )
        return self.scores[readout]


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Everything one evaluation found. `to_dict()` is the `--json` object."""

    facts: RowFacts
    scale: tuple[float, ...]
    floors: Mapping[str, PointScores]
    ranking_floors: Mapping[str, tuple[RankingScores, ...]]
    predictors: tuple[PredictorReport, ...]
    notes: tuple[str, ...] = ()
    """What was left out and why, such as a floor whose extra is not installed."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a figure that does not exist is None."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and value != value:
        return None
    return value

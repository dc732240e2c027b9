"""Evaluation reports made by hand: no figure in them was computed from anything."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from r4r_graph.evaluation.metrics import Estimate, PointScores, Scores
from r4r_graph.evaluation.report import (
    Difference,
    EvaluationReport,
    PredictorReport,
    Probe,
    RankingScores,
    RationaleForm,
    Reliability,
    ReliabilityBin,
    RowFacts,
    Slice,
    WordScore,
    WordsReport,
)
from r4r_graph.ratings import READOUTS, Readout

NAN = float("nan")
FLOORS = (
    "global_mean",
    "global_median",
    "user_mean",
    "item_mean",
    "user_item_mean",
    "shrunk_bias",
    "boosting_squared",
    "boosting_absolute",
)
HOSTILE = (
    "<script>alert(1)</script> <http://x.y> a|b `c` *d* _e_ [f](g) ![h][i]\nj\r\x1b[31mk"
    "\u200fl\u202em \\| &amp; &#124; $n$ # ~o~ 'p' \"q\""
)
"""What must stay text wherever it is shown."""


def around(value: float, width: float = 0.04) -> Estimate:
    return Estimate(value, value - width, value + width)


def difference(mae: Estimate, rmse: Estimate | None = None) -> Difference:
    return Difference(mae, mae if rmse is None else rmse)


BETTER = difference(Estimate(-0.111, -0.171, -0.051), Estimate(-0.112, -0.172, -0.052))
WORSE = difference(Estimate(0.113, 0.053, 0.173), Estimate(0.114, 0.054, 0.174))
UNDECIDED = difference(Estimate(-0.015, -0.075, 0.045), Estimate(0.016, -0.044, 0.076))


def scores(mae: float, rmse: float, missing: int = 0, rows: int = 300) -> Scores:
    order: tuple[Readout, ...] = ("median", "mean", "mode")
    return Scores(
        rows=rows,
        missing=missing,
        mae={r: around(mae + 0.011 * at) for at, r in enumerate(order)},
        rmse={r: around(rmse + 0.013 * at, 0.06) for at, r in enumerate(READOUTS)},
        nll=around(1.234),
        coverage=around(0.813, 0.021),
    )


def slices() -> tuple[Slice, ...]:
    verdicts = itertools.cycle((BETTER, UNDECIDED, WORSE))
    parts = [
        *(("cold start", label) for label in ("none", "user", "item", "both")),
        *(("reviews by the user", label) for label in ("0", "1-4", "5-9", "30 or more")),
        *(("reviews of the item", label) for label in ("0", "1-4", "5-9", "30 or more")),
        *(("true rating", f"{value}") for value in range(1, 6)),
    ]
    found = [
        Slice(by, label, 60 + at, at % 3, around(0.5 + at / 30), around(0.8 + at / 30), verdict)
        for at, ((by, label), verdict) in enumerate(zip(parts, verdicts))  # noqa: B905
    ]
    few = difference(Estimate(-0.222, NAN, NAN), Estimate(-0.223, NAN, NAN))
    found[3] = Slice(
        "cold start", "both", 7, 0, Estimate(0.501, NAN, NAN), Estimate(0.802, NAN, NAN), few
    )
    return tuple(found)


def reliability() -> Reliability:
    counts = (900, 200, 120, 80, 60, 50, 40, 30, 20, 0)
    bins = [
        ReliabilityBin(
            at / 10,
            (at + 1) / 10,
            count,
            at / 10 + 0.047 if count else NAN,
            at / 11 + 0.033 if count else NAN,
        )
        for at, count in enumerate(counts)
    ]
    coverage = {
        "0.5": around(0.551, 0.031),
        "0.8": around(0.700, 0.041),
        "0.9": around(0.957, 0.022),
    }
    return Reliability(tuple(bins), 0.043, coverage)


def probes(rows: int = 300) -> tuple[Probe, ...]:
    still = difference(Estimate(0.001, -0.002, 0.003), Estimate(-0.001, -0.003, 0.002))
    found = (
        ("without_rationale", Estimate(0.004, 0.003, 0.005), still),
        ("swapped_rationale", Estimate(0.309, 0.269, 0.349), WORSE),
        ("true_review", Estimate(0.518, 0.478, 0.558), BETTER),
        ("averages_only", Estimate(0.207, 0.167, 0.247), UNDECIDED),
    )
    return tuple(
        Probe(condition, rows, at, moved, scores(0.7, 1.0, at), change)
        for at, (condition, moved, change) in enumerate(found)
    )


def words() -> WordsReport:
    return WordsReport(
        form=RationaleForm(
            rows=296,
            empty=4,
            leaks=around(0.021, 0.01),
            repeats=around(0.052, 0.02),
            malformed=around(0.063, 0.03),
            distinct=0.917,
            words=(21.0, 34.5, 58.0),
            examples=("row 3: stars: 'five stars'", "row 17: repeats: 'it is good'"),
        ),
        rationales=(
            WordScore("similarity", 296, 0, around(0.412), around(0.301), around(0.111, 0.02)),
            WordScore("judge", 290, 6, around(0.613), around(0.598), around(0.015, 0.03)),
        ),
        summaries=WordScore(
            "phrase overlap", 199, 1, around(0.354), around(0.102), around(0.252, 0.03)
        ),
    )


def ranking(ndcg: float) -> tuple[RankingScores, ...]:
    return tuple(
        RankingScores(k, 45, around(ndcg + k / 100, 0.033), around(ndcg - 0.1 + k / 50, 0.055))
        for k in (1, 5)
    )


def against(*differences: Difference) -> dict[str, dict[Readout, Difference]]:
    cycle = itertools.cycle(differences)
    return {
        name: dict.fromkeys(READOUTS, each)
        for name, each in zip(FLOORS, cycle)  # noqa: B905
    }


def predictor(name: str = "ours", **changes: Any) -> PredictorReport:
    """A set of predictions of which everything is known."""
    known: dict[str, Any] = {
        "name": name,
        "scores": scores(0.633, 0.944, missing=2),
        "against": against(BETTER, BETTER, UNDECIDED, WORSE),
        "against_first": {},
        "slices": slices(),
        "ranking": ranking(0.741),
        "ranking_against": {
            "global_mean": (around(0.083, 0.02), around(0.084, 0.03)),
            "shrunk_bias": (around(0.006, 0.02), around(-0.087, 0.03)),
        },
        "reliability": reliability(),
        "failures": ("u7 / i9: out of memory", "u8 / i2: the row was stopped"),
        "probes": probes(),
        "words": words(),
        "mass": 0.987,
        "model": {"base": "smollm2-135m", "adapters": {"predictor": "3f2a9c", "reasoner": "b17e"}},
    }
    return PredictorReport(**(known | changes))


def points_only(name: str = "from a file", *, alike: bool = False) -> PredictorReport:
    """Point predictions, of which little can be said."""
    by: Mapping[Readout, PointScores] = {
        readout: PointScores(300, 0, around(0.712 + 0.01 * at * (not alike)), around(1.017, 0.05))
        for at, readout in enumerate(READOUTS)
    }
    return PredictorReport(
        name=name,
        scores=by,
        against=against(UNDECIDED),
        against_first={},
        slices=(),
        ranking=(),
        ranking_against={},
        reliability=None,
        failures=(),
    )


def report(*predictors: PredictorReport, **changes: Any) -> EvaluationReport:
    """A report on some predictors; one that has everything by default."""
    floors = {
        name: PointScores(300, 0, around(0.655 + at / 50), around(0.971 + at / 40, 0.06))
        for at, name in enumerate(FLOORS)
    }
    known: dict[str, Any] = {
        "facts": RowFacts(300, 4321, 7, "c0ffee12", 210, 187, 1.3e9, 1.4e9, 21987),
        "scale": (1.0, 2.0, 3.0, 4.0, 5.0),
        "floors": floors,
        "ranking_floors": {"global_mean": ranking(0.655), "shrunk_bias": ranking(0.722)},
        "predictors": predictors or (predictor(),),
        "notes": ("left out: a floor that nobody installed",),
    }
    return EvaluationReport(**(known | changes))


def full() -> EvaluationReport:
    """Two sets of predictions with all there is."""
    other = predictor(
        "without rationale",
        scores=scores(0.677, 0.988),
        against=against(UNDECIDED, WORSE),
        against_first=dict.fromkeys(READOUTS, WORSE),
        condition="without_rationale",
        words=None,
    )
    return report(predictor(), other)


def hostile() -> EvaluationReport:
    """A report in which every text that is not ours is `HOSTILE`."""
    named = predictor(
        HOSTILE,
        failures=(HOSTILE, f"| - [x](y) {HOSTILE}"),
        slices=(Slice(HOSTILE, HOSTILE, 5, 0, around(0.4), around(0.5), UNDECIDED),),
        probes=(Probe(HOSTILE, 5, 0, around(0.4), scores(0.7, 1.0), UNDECIDED),),
        words=WordsReport(
            form=RationaleForm(
                5, 0, around(0.1), around(0.1), around(0.1), 1.0, (1, 2, 3), (HOSTILE,)
            ),
            rationales=(WordScore(HOSTILE, 5, 0, around(0.4), around(0.3), around(0.1)),),
        ),
        model={HOSTILE: {HOSTILE: HOSTILE}},
        condition=HOSTILE,
    )
    other = predictor(f"_{HOSTILE}", against_first=dict.fromkeys(READOUTS, UNDECIDED))
    floors = {HOSTILE: PointScores(300, 0, around(0.6), around(0.9))}
    facts = RowFacts(300, 300, None, HOSTILE, 1, 1, 1e99, NAN, 5)
    return report(named, other, facts=facts, floors=floors, notes=(HOSTILE,))


def estimates(value: Any) -> Iterator[Estimate]:
    """Every figure in a report."""
    if isinstance(value, Estimate):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from estimates(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from estimates(entry)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from estimates(getattr(value, name))

"""Planted predictors: each must be seen for what it is."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from r4r_graph import Review
from r4r_graph.errors import DataError, SettingError
from r4r_graph.evaluation.boosting import BOOSTINGS
from r4r_graph.evaluation.evaluate import Contender, Settings, evaluate
from r4r_graph.evaluation.floors import FLOORS
from r4r_graph.evaluation.metrics import Floats, Scores, readings, soft_targets
from r4r_graph.evaluation.predictions import Predictions
from r4r_graph.evaluation.probes import NOT_APPLICABLE
from r4r_graph.evaluation.report import EvaluationReport, PredictorReport
from r4r_graph.ratings import RatingScale
from r4r_graph.reviews import TableReviewSource

SCALE = RatingScale()
HOW = Settings(resamples=300)


def make_world(seed: int = 0) -> tuple[list[Review], list[Review]]:
    """Earlier reviews and targets; good items get good ratings, with some noise."""
    dice = random.Random(seed)
    reviews = []
    for n in range(900):
        user, item = dice.randrange(40), dice.randrange(30)
        rating = min(5, max(1, 1 + item % 5 + dice.choice([-1, 0, 0, 1])))
        reviews.append(Review(f"u{user}", f"i{item}", float(rating), 1000.0 + n, text="Words."))
    distinct = {(r.user_id, r.item_id): r for r in reviews}
    ordered = sorted(distinct.values(), key=lambda r: r.timestamp)
    return ordered[:-150], ordered[-150:]


EARLIER, TARGETS = make_world()
SOURCE = TableReviewSource.from_reviews([*EARLIER, *TARGETS])
TRUTHS = np.array([t.rating for t in TARGETS])


def predictions(
    name: str, probabilities: Floats, condition: str = "as_is", reasons: tuple[str, ...] = ()
) -> Predictions:
    lost = np.isnan(probabilities).any(axis=1)
    why = reasons or tuple("scripted failure" if gone else None for gone in lost)
    return Predictions(
        name, readings(probabilities, SCALE), probabilities, why, condition=condition
    )


def run(*contenders: Contender) -> EvaluationReport:
    return evaluate(TARGETS, SOURCE, contenders, settings=HOW)


def only(contender: Contender) -> PredictorReport:
    [found] = run(contender).predictors
    return found


PERFECT = soft_targets(TRUTHS, SCALE)
UNIFORM = np.full((len(TARGETS), 5), 0.2)


def test_a_perfect_predictor_is_better_than_everything() -> None:
    found = only(Contender(predictions("perfect", PERFECT)))
    assert isinstance(found.scores, Scores)
    for readout in ("mean", "mode"):
        assert found.scores.mae[readout].value == found.scores.rmse[readout].value == 0
    assert found.scores.nll.value == 0
    assert set(found.against) == {*FLOORS, *BOOSTINGS}
    for floor in found.against.values():
        assert floor["mean"].verdict("rmse") == floor["mode"].verdict("mae") == "better"
    assert all(score.ndcg.value == pytest.approx(1.0) for score in found.ranking)
    assert found.reliability is not None
    assert found.reliability.expected_error == 0
    assert found.failures == ()


def test_a_constant_predictor_ranks_like_chance_and_is_as_good_as_its_floor() -> None:
    constant = float(np.mean([r.rating for r in EARLIER]))
    probabilities = soft_targets(np.full(len(TARGETS), constant), SCALE)
    report = run(Contender(predictions("constant", probabilities)))
    [found] = report.predictors
    against = found.against["global_mean"]["mean"]
    assert against.mae.value == pytest.approx(0, abs=1e-9)
    assert against.verdict("rmse") == "undecided"
    assert found.against["item_mean"]["mean"].verdict("rmse") == "worse"
    by_chance = report.ranking_floors["global_mean"]
    for mine, floor in zip(found.ranking, by_chance, strict=True):
        assert mine.ndcg.value == pytest.approx(floor.ndcg.value)


def test_failures_on_half_of_the_rows_are_errors_and_are_shown() -> None:
    half = PERFECT.copy()
    half[::2] = np.nan
    found = only(Contender(predictions("half", half)))
    assert isinstance(found.scores, Scores)
    assert found.scores.missing == 75
    assert found.scores.mae["mean"].value == pytest.approx(75 * 4 / 150)
    assert found.against["global_mean"]["mean"].verdict("mae") == "worse"
    assert len(found.failures) == 20
    first = TARGETS[0]
    assert found.failures[0] == f"{first.user_id} / {first.item_id}: scripted failure"


def test_who_ignores_the_rationale_is_seen() -> None:
    own = predictions("deaf", PERFECT * 0.6 + 0.08)
    deaf = Contender(
        own,
        tuple(
            predictions("deaf", own.probabilities, name)  # type: ignore[arg-type]
            for name in ("without_rationale", "swapped_rationale", "true_review")
        ),
    )
    for probe in only(deaf).probes:
        assert probe.moved.value == probe.moved.high == 0
        assert probe.difference.verdict("mae") == probe.difference.verdict("rmse") == "undecided"

    shuffled = PERFECT[np.random.default_rng(0).permutation(len(TARGETS))]
    listening = Contender(
        predictions("listening", PERFECT),
        (predictions("listening", shuffled, "swapped_rationale"),),
    )
    [probe] = only(listening).probes
    assert probe.moved.low > 0.5
    assert probe.difference.verdict("mae") == probe.difference.verdict("rmse") == "worse"


def test_rows_that_a_condition_does_not_apply_to_are_in_no_comparison() -> None:
    some = UNIFORM.copy()
    some[:100] = np.nan
    reasons = (*[NOT_APPLICABLE] * 100, *[None] * 50)
    probe = predictions("x", some, "true_review", reasons)  # type: ignore[arg-type]
    [found] = only(Contender(predictions("x", UNIFORM), (probe,))).probes
    assert (found.rows, found.missing, found.moved.value) == (50, 0, 0.0)
    assert found.difference.mae.value == found.difference.rmse.value == 0


def test_a_failure_under_a_condition_is_an_error_there() -> None:
    some = UNIFORM.copy()
    some[:30] = np.nan
    [found] = only(
        Contender(predictions("x", UNIFORM), (predictions("x", some, "true_review"),))
    ).probes
    assert (found.rows, found.missing) == (150, 30)
    assert found.difference.verdict("mae") == "worse"
    assert found.moved.value == 0


def test_a_probe_that_rated_no_row_is_named_and_costs_no_report() -> None:
    nothing = np.full_like(UNIFORM, np.nan)
    never = (NOT_APPLICABLE,) * len(TARGETS)
    probes = (
        predictions("x", nothing, "true_review", never),
        predictions("x", UNIFORM, "without_texts"),
    )
    report = run(Contender(predictions("x", UNIFORM), probes))
    assert [probe.condition for probe in report.predictors[0].probes] == ["without_texts"]
    assert report.notes == ("left out: x under true_review, as no row has a rating both ways",)


def test_sets_are_compared_with_the_first() -> None:
    report = run(
        Contender(predictions("perfect", PERFECT)), Contender(predictions("uniform", UNIFORM))
    )
    first, second = report.predictors
    assert first.against_first == {}
    assert second.against_first["mean"].verdict("rmse") == "worse"


def test_points_alone_are_scored_as_points() -> None:
    points = {readout: TRUTHS.copy() for readout in ("mean", "median", "mode")}
    points["mode"][0] = math.nan
    given = Predictions("points", points, reasons=(None,) * len(TARGETS))  # type: ignore[arg-type]
    found = only(Contender(given))
    assert not isinstance(found.scores, Scores)
    assert found.scores["mean"].mae.value == 0
    assert found.scores["mode"].missing == 1
    assert found.reliability is None


def test_facts_and_json() -> None:
    report = evaluate(
        TARGETS,
        SOURCE,
        [Contender(predictions("x", UNIFORM))],
        settings=HOW,
        drawn_from=999,
        sample_seed=3,
    )
    facts = report.facts
    assert (facts.rows, facts.targets, facts.seed, facts.train_rows) == (150, 999, 3, len(EARLIER))
    assert (facts.first, facts.last) == (TARGETS[0].timestamp, TARGETS[-1].timestamp)
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["floors"]["item_mean"]["rmse"]["value"] == report.floors["item_mean"].rmse.value
    assert list(plain["floors"]) == [*FLOORS, *BOOSTINGS]


def test_the_same_rows_give_the_same_report() -> None:
    def make() -> EvaluationReport:
        return run(Contender(predictions("x", PERFECT * 0.5 + 0.1)))

    assert make() == make()


def test_floors_come_from_strictly_earlier_reviews_alone() -> None:
    """Whatever is written at or after a target's time, its floors stay the same."""
    later = [Review(t.user_id, f"new{n}", 1.0, t.timestamp) for n, t in enumerate(TARGETS) if n % 2]
    after = [Review("u1", f"i{n}", 1.0, 9e9) for n in range(30)]
    more = TableReviewSource.from_reviews([*EARLIER, *TARGETS[-1:], *after, *later[-1:]])
    fewer = TableReviewSource.from_reviews([*EARLIER, *TARGETS[-1:]])
    last = TARGETS[-1:]
    one = [Contender(predictions("x", UNIFORM[-1:]))]
    for floor, scores in evaluate(last, more, one, settings=HOW, train=EARLIER).floors.items():
        same = evaluate(last, fewer, one, settings=HOW, train=EARLIER).floors[floor]
        assert scores.mae.value == same.mae.value


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run(), "no predictions to evaluate"),
        (lambda: run(*[Contender(predictions("x", UNIFORM))] * 2), "have one name: x, x"),
        (lambda: run(Contender(predictions("x", UNIFORM[1:]))), "149 predictions for 150"),
        (
            lambda: evaluate([], SOURCE, [Contender(predictions("x", UNIFORM))]),
            "no targets to evaluate on",
        ),
        (
            lambda: evaluate(
                TARGETS, SOURCE, [Contender(predictions("x", UNIFORM))], train=TARGETS
            ),
            "targets are training rows of the floors too",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


def test_settings_are_checked() -> None:
    with pytest.raises(SettingError, match="ks"):
        Settings(ks=(0,))
    with pytest.raises(SettingError, match="resamples"):
        Settings(resamples=0)

"""The calibration step: what it fits on, what it reports, and what it never loses."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune import calibrate as step
from finetune.calibrate import CalibrationReport, calibrate_predictor
from finetune.settings import CalibrationSettings, Recipe, SplitSettings
from finetune.splits import make_splits, read_targets
from r4r_graph.calibration import Calibration, fit_calibration
from r4r_graph.engine.base import RateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.engine.local import load_local_engine
from r4r_graph.errors import DataError, EngineFailure, NotReadyError, RequestError, SettingError
from r4r_graph.evaluation import FLOORS, soft_targets
from r4r_graph.jobs import JobProgress
from r4r_graph.schema import AspectSummary, Review

Make = Callable[..., BatchingEngine]
OLD = Calibration((1.0, 2.0, 3.0, 4.0, 5.0), 3.0, (0.5, 0.0, 0.0, 0.0, -0.5))
FLAT = [1.0, 1.0, 1.0, 1.0, 1.0]


def reviews() -> list[Review]:
    dice = random.Random(0)
    return [
        Review(
            f"u{at % 23}",
            f"i{at % 19}",
            float(dice.choice((1, 2, 3, 4, 4, 5, 5, 5))),
            1000.0 + at,
            f"Title {at % 19}",
            f"word{at}",
        )
        for at in range(400)
    ]


def name(target: Review) -> tuple[str, str, float]:
    return target.user_id, target.item_id, target.timestamp


def said_of(target: Review) -> str:
    """A rationale that tells the test's predictor which row this is."""
    return f"Row {target.timestamp:g} rated {target.rating:g} here."


@pytest.fixture
def recipe(tiny_adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Splits of 400 reviews, a rationale for each validation row, and a random predictor."""
    rows = [review.to_dict() for review in reviews()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "reviews.parquet")
    made = Recipe(
        reviews=tmp_path / "reviews.parquet",
        work=tmp_path / "work",
        history=3,
        splits=SplitSettings(train=0.5, validation=0.4),
    )
    make_splits(made)
    shutil.copytree(tiny_adapters / "predictor", made.adapters / "predictor")
    rationales = {name(t): said_of(t) for t in read_targets(made, "validation")}
    summaries = {r.key: AspectSummary(positive=(r.text,)) for r in reviews()}
    monkeypatch.setattr(step, "read_rationales", lambda *_: rationales)
    monkeypatch.setattr(step, "read_summaries", lambda *_: summaries)
    return made


def row_of(request: RateRequest) -> tuple[float, int]:
    """Time and true rating, out of the rationale."""
    _, _, after = request.messages[-1].content.partition("Row ")
    when, _, rest = after.partition(" rated ")
    return float(when), int(rest.split()[0])


def overconfident(request: RateRequest) -> list[float]:
    """Almost certain of one rating, which is the true one in two rows of three."""
    when, rating = row_of(request)
    shown = rating if when % 3 else rating % 5 + 1
    return [0.96 if value == shown else 0.01 for value in (1, 2, 3, 4, 5)]


def honest(request: RateRequest) -> list[float]:
    """How often each rating occurs."""
    return [1 / 8, 1 / 8, 1 / 8, 2 / 8, 3 / 8]


def stored(recipe: Recipe) -> Calibration:
    return Calibration.load(recipe.adapters / "predictor" / "calibration.json")


def predictor_of(make: Make, rate: Callable[[RateRequest], list[float]]) -> BatchingEngine:
    return make(adapters=("predictor",), rate=rate)


# What it measures --------------------------------------------------------------------------------


def test_an_overconfident_predictor_is_calibrated(recipe: Recipe, fake: Make) -> None:
    report = calibrate_predictor(recipe, engine=predictor_of(fake, overconfident))
    rows = len(read_targets(recipe, "validation"))
    assert report.helped
    assert report.calibration.temperature > 1.5
    assert report.after.nll.value < report.before.nll.value - 0.2
    assert report.gain.high < 0
    assert report.gain.value == pytest.approx(report.after.nll.value - report.before.nll.value)
    assert report.before.coverage.value < report.after.coverage.value
    assert (report.rows, report.before.missing, report.without_rationale) == (rows, 0, 0)
    assert tuple(report.floors) == FLOORS
    assert all(found.rows == rows and found.missing == 0 for found in report.floors.values())

    assert stored(recipe) == report.calibration
    facts = stored(recipe).facts
    assert facts is not None
    assert facts.rows == rows
    assert facts.nll_before == pytest.approx(report.before.nll.value)
    assert facts.nll_after == pytest.approx(report.after.nll.value)
    kept = json.loads((recipe.work / "runs" / "calibrate" / "report.json").read_text())
    assert kept == json.loads(json.dumps(report.to_dict()))


def test_errors_before_are_those_of_the_predictor(recipe: Recipe, fake: Make) -> None:
    """By hand: wrong in every third row, by one, or by four where five was shown as one."""
    report = calibrate_predictor(recipe, engine=predictor_of(fake, overconfident))
    targets = read_targets(recipe, "validation")
    wrong = [(4 if t.rating == 5 else 1) if t.timestamp % 3 == 0 else 0 for t in targets]
    assert report.before.mae["mode"].value == pytest.approx(np.mean(wrong))
    assert report.before.rmse["mode"].value == pytest.approx(np.sqrt(np.mean(np.square(wrong))))


def test_where_it_does_not_help_the_identity_is_stored(recipe: Recipe, fake: Make) -> None:
    report = calibrate_predictor(with_settings(recipe, l2=0.0), engine=predictor_of(fake, honest))
    assert not report.helped
    assert report.after.nll.value >= report.before.nll.value
    assert stored(recipe).is_identity
    assert stored(recipe).facts is not None
    # A fit judged on its own rows would have claimed a gain.
    targets = read_targets(recipe, "validation")
    p = np.repeat([honest(RateRequest(()))], len(targets), axis=0)
    weights = soft_targets(np.array([t.rating for t in targets]), recipe.rating_scale)
    fitted = fit_calibration(p, weights, recipe.rating_scale, l2=0.0)
    own = -(weights * np.log([fitted.apply(distribution(p[0])).probabilities])).sum(1).mean()
    assert own < report.before.nll.value


def test_the_same_recipe_gives_the_same_report(recipe: Recipe, fake: Make) -> None:
    def again() -> CalibrationReport:
        made = calibrate_predictor(recipe, engine=predictor_of(fake, overconfident), resume=False)
        return replace(made, seconds=0.0)

    assert again() == again()


def test_rows_that_fail_are_errors_and_shown(recipe: Recipe, fake: Make) -> None:
    """A guard: neither perfect nor left out."""

    def sometimes(request: RateRequest) -> list[float]:
        if row_of(request)[0] % 10 == 0:
            raise RequestError("too long")
        return overconfident(request)

    whole = calibrate_predictor(recipe, engine=predictor_of(fake, overconfident))
    report = calibrate_predictor(recipe, engine=predictor_of(fake, sometimes), resume=False)
    failed = sum(t.timestamp % 10 == 0 for t in read_targets(recipe, "validation"))
    assert report.rows == whole.rows
    assert report.before.missing == report.after.missing == failed > 0
    for scores, without in ((report.before, whole.before), (report.after, whole.after)):
        assert scores.mae["mean"].value > without.mae["mean"].value
        assert scores.nll.value > without.nll.value
    facts = stored(recipe).facts
    assert facts is not None
    assert facts.rows == whole.rows - failed


# What it reads -----------------------------------------------------------------------------------


def test_no_prompt_holds_the_target_or_anything_later(recipe: Recipe, fake: Make) -> None:
    seen: list[tuple[float, str]] = []

    def look(request: RateRequest) -> list[float]:
        seen.append((row_of(request)[0], " ".join(m.content for m in request.messages)))
        return overconfident(request)

    calibrate_predictor(recipe, engine=predictor_of(fake, look))
    words = {review.timestamp: review.text for review in reviews()}
    assert len(seen) == len(read_targets(recipe, "validation"))
    for when, prompt in seen:
        told = {t for t, word in words.items() if word in prompt.split() or f"{word}." in prompt}
        assert told
        assert max(told) < when


def test_with_and_without_rationales(
    recipe: Recipe, fake: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = read_targets(recipe, "validation")
    some = {name(t): said_of(t) for t in targets[::2]}
    monkeypatch.setattr(step, "read_rationales", lambda *_: some)
    report = calibrate_predictor(recipe, engine=predictor_of(fake, overconfident))
    assert (report.rows, report.without_rationale) == (len(some), len(targets) - len(some))

    def bare(request: RateRequest) -> list[float]:
        assert "Row " not in request.messages[-1].content
        return FLAT

    off = with_settings(recipe, with_rationale=False)
    report = calibrate_predictor(off, engine=predictor_of(fake, bare))
    assert (report.rows, report.without_rationale) == (len(targets), 0)


def test_rows_at_most(recipe: Recipe, fake: Make) -> None:
    asked: list[float] = []

    def look(request: RateRequest) -> list[float]:
        asked.append(row_of(request)[0])
        return overconfident(request)

    few = with_settings(recipe, rows=60)
    report = calibrate_predictor(few, engine=predictor_of(fake, look))
    assert report.rows == len(asked) == 60
    first, asked[:] = sorted(asked), []
    calibrate_predictor(few, engine=predictor_of(fake, look), resume=False)
    assert sorted(asked) == first
    calibrate_predictor(replace(few, seed=1), engine=predictor_of(fake, look))
    assert sorted(asked[60:]) != first


def test_too_few_rows_are_counted(
    recipe: Recipe, fake: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = read_targets(recipe, "validation")
    engine = predictor_of(fake, lambda _: pytest.fail("nothing should be rated"))
    few = {name(t): said_of(t) for t in targets[:9]}
    monkeypatch.setattr(step, "read_rationales", lambda *_: few)
    without = len(targets) - 9
    with pytest.raises(
        DataError, match=f"needs 50 validation rows and there are 9; {without} validation rows have"
    ):
        calibrate_predictor(recipe, engine=engine)

    def refuse(_: RateRequest) -> list[float]:
        raise RequestError("a prompt of 9999 tokens")

    off = with_settings(recipe, with_rationale=False)
    reason = f"there are 0; {len(targets)} could not be rated .RequestError: a prompt of 9999"
    with pytest.raises(DataError, match=reason):
        calibrate_predictor(off, engine=predictor_of(fake, refuse))
    assert not (recipe.adapters / "predictor" / "calibration.json").exists()


def test_without_a_predictor(recipe: Recipe, fake: Make) -> None:
    with pytest.raises(SettingError, match="no adapter 'predictor'"):
        calibrate_predictor(recipe, engine=fake(adapters=("reasoner",)))
    shutil.rmtree(recipe.adapters)
    with pytest.raises(NotReadyError, match="run the step predictor first"):
        calibrate_predictor(recipe, engine=predictor_of(fake, overconfident))


# Stopped, failed, done before --------------------------------------------------------------------


class Stop(RuntimeError):
    """Ends a run from its progress callback."""


def test_a_stopped_run_goes_on_and_rates_no_row_twice(recipe: Recipe, fake: Make) -> None:
    asked: list[float] = []

    def look(request: RateRequest) -> list[float]:
        asked.append(row_of(request)[0])
        return overconfident(request)

    def stop(now: JobProgress) -> None:
        if now.done == 70:
            raise Stop

    with pytest.raises(Stop):
        calibrate_predictor(recipe, engine=predictor_of(fake, look), on_progress=stop)
    written = sum(
        pq.read_metadata(part).num_rows for part in recipe.work.rglob("distributions-*/part-*")
    )
    assert written >= 70
    asked.clear()
    report = calibrate_predictor(recipe, engine=predictor_of(fake, look))
    assert len(asked) == report.rows - written
    straight = calibrate_predictor(recipe, engine=predictor_of(fake, overconfident), resume=False)
    assert report.calibration == straight.calibration
    assert report.before == straight.before

    asked.clear()
    assert calibrate_predictor(recipe, engine=predictor_of(fake, look)).after == report.after
    assert asked == [], "all of it was there"


def test_another_predictor_or_prompt_is_rated_anew(
    recipe: Recipe, fake: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def look(request: RateRequest) -> list[float]:
        asked.append(row_of(request)[0])
        return overconfident(request)

    def rated(changed: Recipe) -> bool:
        asked.clear()
        calibrate_predictor(changed, engine=predictor_of(fake, look))
        return bool(asked)

    assert rated(recipe)
    assert not rated(with_settings(recipe, l2=0.5)), "the fit's own settings change no distribution"
    assert rated(replace(recipe, history=2))
    assert rated(replace(recipe, budgets={"side": 256}))
    monkeypatch.setattr(step, "read_summaries", lambda *_: {})
    assert rated(recipe)


def test_a_failed_run_loses_no_calibration(recipe: Recipe, fake: Make) -> None:
    OLD.save(recipe.adapters / "predictor" / "calibration.json")

    def fail(request: RateRequest) -> list[float]:
        raise ValueError("out of memory")

    with pytest.raises(EngineFailure, match="out of memory"):
        calibrate_predictor(recipe, engine=predictor_of(fake, fail))
    assert stored(recipe) == OLD
    report = calibrate_predictor(recipe, engine=predictor_of(fake, overconfident))
    assert report.before.missing == 0, "a failure of the engine is not kept as the row's own"
    assert stored(recipe) == report.calibration != OLD


# On a model --------------------------------------------------------------------------------------


@pytest.fixture
def local(recipe: Recipe, tiny_base: Path) -> Recipe:
    """The recipe on the tiny model."""
    made = replace(recipe, base=str(tiny_base), history=2, device="cpu", threads=1)
    return with_settings(made, rows=60)


def test_a_calibration_is_never_fitted_on_top_of_an_earlier_one(local: Recipe) -> None:
    first = calibrate_predictor(local)
    assert first.helped
    assert max(map(abs, first.calibration.bias)) > 0.1
    again = calibrate_predictor(local, resume=False)
    same_calibration(again, first)
    assert again.before.nll.value == pytest.approx(first.before.nll.value, abs=1e-4)

    engine, notes = load_local_engine(local.base, local.adapters, device="cpu")
    with engine, pytest.raises(SettingError, match="applies the predictor's calibration already"):
        calibrate_predictor(local, engine=engine)
    assert not any("other weights" in note for note in notes)

    bare, _ = load_local_engine(local.base, local.adapters, device="cpu", calibrated=False)
    with bare:
        given = calibrate_predictor(local, engine=bare, resume=False)
    same_calibration(given, first)


def test_at_inference_the_engine_rates_as_the_report_says(local: Recipe) -> None:
    report = calibrate_predictor(local)
    [part] = local.work.rglob("distributions-*/part-*.parquet")
    row = pq.read_table(part).to_pylist()[0]
    target = Review(row["user_id"], row["item_id"], row["rating"], row["as_of"])
    engine, _ = load_local_engine(local.base, local.adapters, device="cpu")
    with engine:
        evidence = step.target_evidence(
            target, step.review_source(local), step.read_summaries(local), engine.meter, local
        )
        predictor = step.Predictor(engine, local.rating_scale, local.token_budgets)
        [found] = predictor.rate(evidence, [said_of(target)])
    wanted = report.calibration.apply(distribution(row["distribution"]))
    assert found.distribution.probabilities == pytest.approx(wanted.probabilities, abs=1e-5)


def with_settings(recipe: Recipe, **settings: Any) -> Recipe:
    return replace(recipe, calibrate=CalibrationSettings(**settings))


def same_calibration(one: CalibrationReport, other: CalibrationReport) -> None:
    """Up to what a batch's shape does to float32."""
    first, second = one.calibration, other.calibration
    assert first.temperature == pytest.approx(second.temperature, rel=1e-3)
    assert first.bias == pytest.approx(second.bias, abs=1e-3)


def distribution(p: Any) -> Any:
    from r4r_graph.ratings import RatingDistribution, RatingScale

    return RatingDistribution(RatingScale(), tuple(map(float, p)))

"""Fusion: learns what is planted, adds nothing where there is nothing, and refuses misuse."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from r4r_graph.errors import DataError, SettingError
from r4r_graph.evaluation.fusion import (
    STRENGTHS,
    TERMS,
    Fusion,
    fit_fusion,
    fuse,
    fusions_by_name,
)
from r4r_graph.evaluation.metrics import readings
from r4r_graph.evaluation.predictions import Predictions
from r4r_graph.loglinear import fit_weights, shares
from r4r_graph.ratings import RatingScale
from r4r_graph.reviews import TableReviewSource
from r4r_graph.schema import Review
from tests.commands import R4r
from tests.scripted import review

FIVE = RatingScale()


def history(seed: int) -> tuple[list[Review], list[Review]]:
    """Reviews of good and bad items by all users, and later targets that the items decide."""
    dice = random.Random(seed)
    goodness = {f"i{i}": 1 + i % 5 for i in range(20)}
    earlier = [
        review(f"u{u}", item, u + 1, min(5, max(1, good + dice.choice((-1, 0, 0, 1)))))
        for item, good in goodness.items()
        for u in range(12)
    ]
    later = [
        review(f"w{n}", item, 40 + n, good) for n in range(6) for item, good in goodness.items()
    ]
    return earlier, later


def predictions(probabilities: np.ndarray, name: str = "ours") -> Predictions:
    return Predictions(name=name, points=readings(probabilities, FIVE), probabilities=probabilities)


def flat(rows: int) -> np.ndarray:
    return np.full((rows, 5), 0.2)


def rmse(found: Predictions, targets: list[Review]) -> float:
    truths = np.array([target.rating for target in targets])
    return float(np.sqrt(np.nanmean((found.points["mean"] - truths) ** 2)))


@pytest.fixture(scope="module")
def rows() -> tuple[TableReviewSource, list[Review], list[Review]]:
    earlier, later = history(1)
    return TableReviewSource.from_reviews(earlier), later[::2], later[1::2]


def test_it_learns_what_the_items_averages_say(
    rows: tuple[TableReviewSource, list[Review], list[Review]],
) -> None:
    source, fitted, others = rows
    blank = predictions(flat(len(fitted)))
    fusion = fit_fusion(blank, fitted, source, FIVE)
    weights = dict(zip(TERMS, fusion.weights, strict=True))
    assert weights["item"] > 3
    assert abs(weights["user"]) < 0.2  # these users have rated nothing yet
    fused = fuse(fusion, predictions(flat(len(others))), others, source, FIVE)
    assert fused.name == "ours fused"
    assert rmse(fused, others) < 0.6 < 1.3 < rmse(blank, fitted)


def test_a_predictor_that_knows_is_left_as_it_is(
    rows: tuple[TableReviewSource, list[Review], list[Review]],
) -> None:
    source, fitted, others = rows
    sure = [
        np.stack([0.9 * np.eye(5)[int(t.rating) - 1] + 0.02 for t in part])
        for part in (fitted, others)
    ]
    fusion = fit_fusion(predictions(sure[0]), fitted, source, FIVE)
    assert fusion.weights[0] > 1
    fused = fuse(fusion, predictions(sure[1]), others, source, FIVE)
    assert fused.probabilities is not None
    assert (fused.probabilities.argmax(1) == sure[1].argmax(1)).all()


def test_what_failed_stays_missing(
    rows: tuple[TableReviewSource, list[Review], list[Review]],
) -> None:
    source, fitted, others = rows
    some = flat(len(fitted))
    some[3] = np.nan
    fusion = fit_fusion(predictions(some), fitted, source, FIVE)
    assert fusion.rows == len(fitted) - 1
    theirs = flat(len(others))
    theirs[5] = np.nan
    fused = fuse(fusion, predictions(theirs), others, source, FIVE)
    assert fused.probabilities is not None
    assert np.flatnonzero(np.isnan(fused.probabilities).any(1)).tolist() == [5]
    assert np.isnan(fused.points["median"][5])


def test_the_file_and_what_it_refuses(
    rows: tuple[TableReviewSource, list[Review], list[Review]], tmp_path: Path
) -> None:
    source, fitted, others = rows
    fusion = fit_fusion(predictions(flat(len(fitted))), fitted, source, FIVE)
    fusion.save(tmp_path / "fusion.json")
    assert Fusion.load(tmp_path / "fusion.json") == fusion
    assert set(json.loads((tmp_path / "fusion.json").read_text())["weights"]) == set(TERMS)
    assert fusions_by_name([f"ours={tmp_path / 'fusion.json'}"], ["ours"]) == {"ours": fusion}
    with pytest.raises(SettingError, match="NAME one of ours"):
        fusions_by_name(["theirs=x"], ["ours"])
    for broken in ("", "[]", "{}", json.dumps({"values": [1, 2]})):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(DataError, match=r"broken\.json cannot be used"):
            Fusion.load(tmp_path / "broken.json")
    with pytest.raises(DataError, match="the rows that the fusion was fitted on"):
        fuse(fusion, predictions(flat(len(fitted))), fitted, source, FIVE)
    with pytest.raises(SettingError, match="is for the values"):
        fuse(fusion, predictions(flat(len(others))), others, source, RatingScale.parse("1-4"))
    with pytest.raises(DataError, match="needs 30 rows"):
        fit_fusion(predictions(flat(9)), fitted[:9], source, FIVE)
    numbers = replace(predictions(flat(len(fitted))), probabilities=None)
    with pytest.raises(DataError, match="predicts numbers"):
        fit_fusion(numbers, fitted, source, FIVE)


def test_the_weights_are_the_minimum() -> None:
    """No step in any direction is better."""
    dice = np.random.default_rng(2)
    features = dice.normal(size=(80, 4, 3))
    targets = np.eye(4)[dice.integers(0, 4, 80)]
    start = np.array([1.0, 0.0, 0.5])

    def loss(at: np.ndarray) -> float:
        q = shares(features, at)
        likelihood = np.log(q[targets.astype(bool)]).mean()
        return float(0.01 * np.square(at - start).sum() - likelihood)

    best = fit_weights(features, targets, start, 0.01)
    for direction in dice.normal(size=(50, 3)):
        assert loss(best) <= loss(best + 1e-3 * direction)
    held = fit_weights(features, targets, start, 0.01, np.array([False, True, True]))
    assert held[0] == 1.0
    assert loss(best) < loss(held)


def test_the_command_fits_and_evaluate_uses_it(r4r: R4r, tmp_path: Path) -> None:
    earlier, later = history(3)
    fitted, others = later[::2], later[1::2]

    def write(name: str, some: list[dict[str, object]]) -> Path:
        (tmp_path / name).write_text("\n".join(map(json.dumps, some)), encoding="utf-8")
        return tmp_path / name

    reviews = write("reviews.jsonl", [r.to_dict() for r in (*earlier, *later)])
    files = []
    for name, part in (("fitted", fitted), ("others", others)):
        files.append(write(f"{name}.jsonl", [r.to_dict() for r in part]))
        rows = [
            {"user_id": r.user_id, "item_id": r.item_id, "as_of": r.timestamp,
             "distribution": [0.2] * 5}
            for r in part
        ]  # fmt: skip
        files.append(write(f"{name}-predictions.jsonl", rows))
    out = tmp_path / "fusion.json"
    done = r4r(
        "fuse", "--reviews", reviews, "--targets", files[0], "--predictions", files[1], "-o", out
    )
    assert done.code == 0, done.err
    assert "fitted on 60 rows: log_probability" in done.out
    done = r4r(
        "evaluate", "--reviews", reviews, "--targets", files[2], "--out", tmp_path / "out",
        "--predictions", f"ours={files[3]}", "--fusion", f"ours={out}", "--resamples", 50, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    plain, fused = json.loads(done.out)["predictors"]
    assert (plain["name"], fused["name"]) == ("ours", "ours fused")
    error = [one["scores"]["rmse"]["mean"]["value"] for one in (plain, fused)]
    assert error[1] < 0.6 < error[0]


def test_few_rows_teach_a_fusion_little_that_others_do_not_bear_out() -> None:
    """Ratings by lot, and a predictor that knows as much: a fusion can only do harm."""
    known = np.array([0.05, 0.2, 0.5, 0.2, 0.05])
    harm = {"chosen": 0.0, "weak": 0.0}
    for seed in range(6):
        dice = np.random.default_rng(seed)
        lots = iter(dice.choice(5, size=400, p=known) + 1)
        earlier = [review(f"u{n % 40}", f"i{n % 9}", n + 1, next(lots)) for n in range(120)]
        later = [review(f"u{n % 40}", f"i{n % 9}", 200 + n, next(lots)) for n in range(240)]
        source = TableReviewSource.from_reviews(earlier)
        fitted, others = later[:40], later[40:]
        right = [predictions(np.tile(known, (len(part), 1))) for part in (fitted, others)]
        for name, pull in (("chosen", None), ("weak", min(STRENGTHS))):
            fusion = fit_fusion(right[0], fitted, source, FIVE, pull=pull)
            fused = fuse(fusion, right[1], others, source, FIVE)
            harm[name] += rmse(fused, others) - rmse(right[1], others)
    assert harm["chosen"] < 0.7 * harm["weak"]

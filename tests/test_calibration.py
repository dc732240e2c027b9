"""Calibrations: what they do to a distribution, their file, and the fit."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r4r_graph.calibration import (
    CALIBRATION_FILE,
    Calibration,
    CalibrationFacts,
    calibrated,
    fit_calibration,
)
from r4r_graph.engine.adapters import check_adapter, find_adapters
from r4r_graph.engine.model_files import file_digest
from r4r_graph.engine.weights import find_base
from r4r_graph.errors import DataError, ModelError, SettingError
from r4r_graph.ratings import RatingDistribution, RatingScale
from tests.tiny import make_adapter

TWO = RatingScale((1.0, 2.0))
FIVE = RatingScale()
FACTS = CalibrationFacts(120, 1.25, 1.125, "ab" * 16, "cd" * 16)
SOME = Calibration(FIVE.values, 1.7, (0.25, -0.5, 0.0, 0.125, 0.3), FACTS)


def over(scale: RatingScale, *p: float, mass: float = 1.0) -> RatingDistribution:
    return RatingDistribution(scale, p, mass)


# What it does ------------------------------------------------------------------------------------


def test_a_temperature_takes_roots() -> None:
    after = Calibration(TWO.values, 2.0).apply(over(TWO, 0.2, 0.8))
    assert after.probabilities == pytest.approx((1 / 3, 2 / 3), abs=1e-12)


def test_a_bias_multiplies_odds() -> None:
    after = Calibration(TWO.values, 1.0, (0.0, math.log(3))).apply(over(TWO, 0.5, 0.5))
    assert after.probabilities == pytest.approx((0.25, 0.75), abs=1e-12)


def test_temperature_comes_before_bias() -> None:
    after = Calibration(TWO.values, 2.0, (0.0, math.log(2))).apply(over(TWO, 0.2, 0.8))
    assert after.probabilities == pytest.approx((1 / 5, 4 / 5), abs=1e-12)


def test_the_identity_changes_nothing_at_all() -> None:
    before = over(FIVE, 0.0, 0.1, 0.2, 0.3, 0.4, mass=0.7)
    assert Calibration(FIVE.values).is_identity
    assert Calibration(FIVE.values).apply(before) is before
    assert not SOME.is_identity
    assert not Calibration(FIVE.values, 1.0001).is_identity
    assert not Calibration(TWO.values, 1.0, (0.0, 1e-9)).is_identity


def test_the_mass_is_kept() -> None:
    assert SOME.apply(over(FIVE, 0.1, 0.2, 0.3, 0.3, 0.1, mass=0.31)).mass == 0.31


@pytest.mark.parametrize("temperature", [0.02, 1.0, 50.0])
def test_zeros_and_certainty(temperature: float) -> None:
    calibration = replace(SOME, temperature=temperature)
    for p in ((0.0, 0.0, 0.0, 0.0, 1.0), (0.5, 0.0, 0.5, 0.0, 0.0)):
        after = calibration.apply(over(FIVE, *p))
        assert sum(after.probabilities) == pytest.approx(1.0, abs=1e-12)
        assert all(q >= 0 for q in after.probabilities)
    sure = calibration.apply(over(FIVE, 0.0, 0.0, 0.0, 0.0, 1.0))
    assert sure.mode == 5


def test_another_scale_is_refused() -> None:
    halves = RatingScale.parse("1,1.5,2,2.5,3")
    with pytest.raises(
        ModelError, match=r"for the ratings 1, 2, 3, 4, 5, and asked for are 1, 1\.5"
    ):
        SOME.apply(over(halves, 0.2, 0.2, 0.2, 0.2, 0.2))
    with pytest.raises(ModelError, match=r"calibrate again, or remove calibration\.json"):
        SOME.check_scale(TWO)
    SOME.check_scale(FIVE)


@pytest.mark.parametrize(
    ("values", "temperature", "bias"),
    [
        ((1.0,), 1.0, (0.0,)),
        ((2.0, 1.0), 1.0, (0.0, 0.0)),
        ((1.0, 2.0), 0.0, (0.0, 0.0)),
        ((1.0, 2.0), -1.0, (0.0, 0.0)),
        ((1.0, 2.0), math.inf, (0.0, 0.0)),
        ((1.0, 2.0), math.nan, (0.0, 0.0)),
        ((1.0, 2.0), 1.0, (0.0,)),
        ((1.0, 2.0), 1.0, (0.0, math.nan)),
    ],
)
def test_what_is_no_calibration(values: Any, temperature: float, bias: Any) -> None:
    with pytest.raises(SettingError, match="bad "):
        Calibration(values, temperature, bias)


def test_many_at_once_are_the_same_as_one_by_one() -> None:
    rows = np.random.default_rng(0).dirichlet([0.3] * 5, size=50)
    rows[0] = [0, 0, 0, 0, 1]
    together = calibrated(rows, SOME)
    alone = [SOME.apply(over(FIVE, *row)).probabilities for row in rows.tolist()]
    assert together == pytest.approx(np.array(alone), abs=1e-12)
    assert calibrated(rows[1:], Calibration(FIVE.values)) == pytest.approx(rows[1:], abs=1e-11)


# The file ----------------------------------------------------------------------------------------


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    file = tmp_path / CALIBRATION_FILE
    SOME.save(file)
    loaded = Calibration.load(file)
    assert loaded == SOME
    assert loaded.facts == FACTS
    assert json.loads(file.read_text())["format"] == 1
    assert Calibration.from_dict(Calibration(TWO.values).to_dict()).facts is None


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / CALIBRATION_FILE
    SOME.save(file)

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        Calibration(FIVE.values).save(file)
    assert Calibration.load(file) == SOME
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "format 2 is not known here"),
        ({"format": None}, "format None"),
        ({"temperature": 0}, "bad temperature"),
        ({"temperature": "1"}, "'1' is no number"),
        ({"temperature": True}, "True is no number"),
        ({"temperature": 10**400}, "too large"),
        ({"bias": [0.0]}, "bad biases"),
        ({"bias": "00000"}, "no list of numbers"),
        ({"values": [5, 4, 3, 2, 1]}, "bad rating scale"),
        ({"facts": {"rows": 1}}, "missing"),
        ({"facts": []}, "mapping"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    file = tmp_path / CALIBRATION_FILE
    file.write_text(json.dumps(SOME.to_dict() | change))
    with pytest.raises(ModelError, match=f"{file} cannot be used: .*{reason}"):
        Calibration.load(file)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', "\udcff"])
def test_what_is_no_such_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / CALIBRATION_FILE
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=f"{file} cannot be used"):
        Calibration.load(file)
    with pytest.raises(ModelError, match="nowhere"):
        Calibration.load(tmp_path / "nowhere")


# Beside an adapter -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter without a calibration; not to be changed."""
    out = tmp_path_factory.mktemp("plain") / "predictor"
    return make_adapter(tiny_base, out, expert="predictor", seed=3, prompt_digest="p")


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "predictor"))


def test_a_predictor_brings_its_calibration(adapter: Path) -> None:
    bare = find_adapters({"predictor": adapter})["predictor"]
    assert bare.calibration is None
    SOME.save(adapter / CALIBRATION_FILE)
    found = find_adapters({"predictor": adapter})["predictor"]
    assert found.calibration == SOME
    assert found.digest != bare.digest
    ignored = find_adapters({"predictor": adapter}, calibrated=False)["predictor"]
    assert ignored.calibration is None
    assert ignored.digest == bare.digest


def test_a_damaged_calibration_is_no_silent_none(adapter: Path) -> None:
    file = adapter / CALIBRATION_FILE
    file.write_text("{}")
    with pytest.raises(ModelError, match=f"{file} cannot be used"):
        find_adapters({"predictor": adapter})
    assert find_adapters({"predictor": adapter}, calibrated=False)["predictor"].calibration is None


def test_other_experts_have_none(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "reasoner"))
    (folder / "r4r.json").unlink()
    (folder / CALIBRATION_FILE).write_text("{}")
    assert find_adapters({"reasoner": folder})["reasoner"].calibration is None


def test_a_calibration_of_other_weights_is_noted(adapter: Path, tiny_base: Path) -> None:
    base = find_base(tiny_base)

    def notes() -> list[str]:
        return check_adapter(find_adapters({"predictor": adapter})["predictor"], base, "p")

    ours = file_digest(adapter / "adapter_model.safetensors")
    for digest in ("", ours):
        facts = replace(FACTS, weights_digest=digest)
        replace(SOME, facts=facts).save(adapter / CALIBRATION_FILE)
        assert notes() == []
    replace(SOME, facts=None).save(adapter / CALIBRATION_FILE)
    assert notes() == []
    SOME.save(adapter / CALIBRATION_FILE)
    [note] = notes()
    assert "calibrated with other weights" in note


# The fit -----------------------------------------------------------------------------------------


def drawn(truth: Calibration, rows: int, seed: int = 0) -> tuple[Any, Any]:
    """Distributions, and ratings drawn from what `truth` makes of them (as weights)."""
    dice = np.random.default_rng(seed)
    said = dice.dirichlet([0.8] * len(truth.values), size=rows)
    meant = calibrated(said, truth)
    places = (meant.cumsum(axis=1) < dice.random((rows, 1))).sum(axis=1)
    return said, np.eye(len(truth.values))[np.minimum(places, len(truth.values) - 1)]


def loss(calibration: Calibration, said: Any, targets: Any, l2: float) -> float:
    """The objective, written down anew."""
    p = calibrated(said, calibration)
    pull = (1 / calibration.temperature - 1) ** 2 + sum(b * b for b in calibration.bias)
    return float(-(targets * np.log(p)).sum(axis=1).mean() + l2 * pull)


def test_the_fit_finds_what_was_planted() -> None:
    truth = Calibration(FIVE.values, 1.8, (0.4, 0.1, -0.6, -0.2, 0.3))
    found = fit_calibration(*drawn(truth, 40_000), FIVE, l2=0.0)
    assert found.temperature == pytest.approx(1.8, abs=0.06)
    assert found.bias == pytest.approx(truth.bias, abs=0.06)


def test_no_neighbour_of_the_fit_is_better() -> None:
    said, targets = drawn(Calibration(FIVE.values, 0.6, (1.0, 0, 0, -1.0, 0)), 300)
    best = fit_calibration(said, targets, FIVE, l2=0.01)
    least = loss(best, said, targets, 0.01)
    assert least < loss(Calibration(FIVE.values), said, targets, 0.01) - 0.05
    dice = np.random.default_rng(1)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            moves = size * dice.standard_normal(6)
            inverse = max(1 / best.temperature + moves[0], 0.06)
            bias = tuple(b + m for b, m in zip(best.bias, moves[1:], strict=True))
            assert loss(Calibration(FIVE.values, 1 / inverse, bias), said, targets, 0.01) > least


def test_fractions_are_shared_between_their_neighbours() -> None:
    """By hand: a single row of 1.25 wants odds of 3 to 1."""
    targets = np.array([[0.75, 0.25]])
    found = fit_calibration(np.array([[0.5, 0.5]]), targets, TWO, l2=0.0)
    assert found.apply(over(TWO, 0.5, 0.5)).probabilities == pytest.approx((0.75, 0.25), abs=1e-4)


def test_the_same_rows_give_the_same_calibration() -> None:
    rows = drawn(SOME, 200)
    assert fit_calibration(*rows, FIVE, l2=0.01) == fit_calibration(*rows, FIVE, l2=0.01)


def test_the_pull_draws_to_the_identity() -> None:
    rows = drawn(Calibration(FIVE.values, 2.0, (1, 0, 0, 0, -1)), 500)
    free, pulled, held = (fit_calibration(*rows, FIVE, l2=l2) for l2 in (0.0, 0.1, 1e6))
    assert max(map(abs, free.bias)) > max(map(abs, pulled.bias)) > 1e-3
    assert held.temperature == pytest.approx(1.0, abs=1e-4)
    assert held.bias == pytest.approx((0.0,) * 5, abs=1e-4)
    with pytest.raises(SettingError, match="bad l2"):
        fit_calibration(*rows, FIVE, l2=-1.0)
    with pytest.raises(SettingError, match="bad l2"):
        fit_calibration(*rows, FIVE, l2=math.nan)


def test_a_rating_that_never_occurs_keeps_a_finite_bias() -> None:
    said, targets = drawn(Calibration(FIVE.values), 400)
    seen = targets[:, 0] == 0
    found = fit_calibration(said[seen], targets[seen], FIVE, l2=0.0)
    assert found.apply(over(FIVE, 0.2, 0.2, 0.2, 0.2, 0.2)).probabilities[0] < 1e-3


def test_a_predictor_that_is_always_wrong_is_flattened_not_turned_around() -> None:
    said = np.array([[0.9, 0.1], [0.1, 0.9]] * 40)
    found = fit_calibration(said, said[:, ::-1].round(), TWO, l2=0.0)
    assert found.temperature == pytest.approx(20.0)
    assert found.apply(over(TWO, 0.9, 0.1)).mode == 1


def test_certain_and_wrong_stays_finite() -> None:
    said = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    targets = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    found = fit_calibration(said, targets, TWO, l2=0.0)
    assert found.temperature > 2
    assert loss(found, said, targets, 0.0) < 0.6
    with pytest.raises(DataError, match="no rows"):
        fit_calibration(said[:0], targets[:0], TWO, l2=0.0)

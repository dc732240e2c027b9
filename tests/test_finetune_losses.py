"""The loss of rating experts, against values worked out by hand and against inference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from finetune.settings import RatingLoss
from finetune.sft.losses import RatingLogProbs, rating_log_probs, rating_loss
from r4r_graph.engine.decoding import RatingReadout
from r4r_graph.ratings import RatingScale

FIVE = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


def _log_probs(*p: float, mass: float = 1.0) -> RatingLogProbs:
    masked = torch.tensor([p]).log()
    return RatingLogProbs(masked + math.log(mass), masked)


def _terms(log_probs: RatingLogProbs, target: list[float], rating: float) -> dict[str, float]:
    _, terms = rating_loss(
        log_probs, torch.tensor([target]), torch.tensor([rating]), FIVE, RatingLoss()
    )
    return {name: float(value) for name, value in terms.items()}


def test_terms_by_hand() -> None:
    terms = _terms(_log_probs(0.1, 0.2, 0.3, 0.3, 0.1), [0, 0, 0, 1, 0], 4.0)
    assert terms["cross_entropy"] == pytest.approx(-math.log(0.3))
    # cumulative .1 .3 .6 .9 against 0 0 0 1
    assert terms["emd"] == pytest.approx(0.01 + 0.09 + 0.36 + 0.01)
    assert terms["squared_error"] == pytest.approx((3.1 - 4.0) ** 2)
    assert terms["absolute_error"] == pytest.approx(0.3 + 0.4 + 0.3 + 0.0 + 0.1)


def test_a_fraction_is_learned_from_both_neighbours() -> None:
    terms = _terms(_log_probs(0.1, 0.2, 0.3, 0.3, 0.1), [0, 0, 0.5, 0.5, 0], 3.5)
    assert terms["cross_entropy"] == pytest.approx(-math.log(0.3))
    perfect = _terms(_log_probs(1e-9, 1e-9, 0.5, 0.5, 1e-9), [0, 0, 0.5, 0.5, 0], 3.5)
    assert perfect["emd"] == pytest.approx(0, abs=1e-6)
    assert perfect["squared_error"] == pytest.approx(0, abs=1e-6)


def test_cross_entropy_alone_sees_mass_lost_outside_the_scale() -> None:
    whole = _terms(_log_probs(0.1, 0.2, 0.3, 0.3, 0.1), [0, 0, 0, 1, 0], 4.0)
    lost = _terms(_log_probs(0.1, 0.2, 0.3, 0.3, 0.1, mass=0.1), [0, 0, 0, 1, 0], 4.0)
    assert lost["cross_entropy"] == pytest.approx(whole["cross_entropy"] + math.log(10))
    assert {k: v for k, v in lost.items() if k != "cross_entropy"} == pytest.approx(
        {k: v for k, v in whole.items() if k != "cross_entropy"}
    )


def test_ordinal_terms_prefer_the_nearer_miss() -> None:
    near = _terms(_log_probs(0.01, 0.01, 0.01, 0.96, 0.01), [0, 0, 0, 0, 1], 5.0)
    far = _terms(_log_probs(0.96, 0.01, 0.01, 0.01, 0.01), [0, 0, 0, 0, 1], 5.0)
    assert near["cross_entropy"] == pytest.approx(far["cross_entropy"])
    for name in ("emd", "squared_error", "absolute_error"):
        assert near[name] < far[name]


def test_weights_add_the_terms_up() -> None:
    log_probs = _log_probs(0.1, 0.2, 0.3, 0.3, 0.1)
    target, rating = torch.tensor([[0.0, 0, 0, 1, 0]]), torch.tensor([4.0])
    weights = RatingLoss(cross_entropy=2.0, emd=3.0, squared_error=5.0, absolute_error=7.0)
    total, terms = rating_loss(log_probs, target, rating, FIVE, weights)
    wanted = sum(getattr(weights, name) * term for name, term in terms.items())
    assert torch.allclose(total, wanted)


@pytest.mark.parametrize("scale", ["1-5", "1-10", "0.5,1,1.5,2,10"])
def test_it_is_the_twin_of_the_readout_of_inference(scale: str, tiny_engine: Any) -> None:
    """Same logits, same distribution and mass, also where a rating takes several tokens."""
    grammars = tiny_engine._backend._grammars
    readout = RatingReadout(grammars, RatingScale.parse(scale))
    generator = torch.Generator().manual_seed(1)
    vocabulary = max(grammars.token_text) + 8
    prefixes = {probe[:at] for probe in readout.probes for at in range(len(probe) + 1)}
    logits = {p: torch.randn((3, vocabulary), generator=generator) for p in prefixes}
    trained = rating_log_probs(readout, logits)
    for row in range(3):
        read = readout.read({p: torch.log_softmax(v[row], -1) for p, v in logits.items()})
        assert trained.masked[row].exp().tolist() == pytest.approx(
            list(read.probabilities), abs=1e-5
        )
    assert (trained.raw.exp().sum(1) <= 1 + 1e-6).all()


def test_gradients_are_finite_where_a_rating_has_no_chance() -> None:
    logits = torch.tensor([[60.0, -60.0, 0.0, -60.0, -60.0]], requires_grad=True)
    masked = torch.log_softmax(logits, -1)
    weights = RatingLoss(cross_entropy=1, emd=1, squared_error=1, absolute_error=1)
    total, _ = rating_loss(
        RatingLogProbs(masked, masked),
        torch.tensor([[0.0, 1, 0, 0, 0]]),
        torch.tensor([2.0]),
        FIVE,
        weights,
    )
    total.sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()

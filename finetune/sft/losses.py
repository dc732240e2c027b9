"""The loss of a rating expert, on the tokens that spell the ratings.

The forward pass is that of inference: logits at the open places of the scale's automaton
(`RatingReadout`). Two readings of them serve: the raw log-probability of each rating among *all*
tokens, which cross-entropy raises so that no mass is lost outside the scale; and the distribution
masked to the scale, which is what inference reads, for the ordinal terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.settings import RatingLoss
from r4r_graph.engine.decoding import RatingReadout

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class RatingLogProbs:
    """What a batch says of each value of the scale; both of shape (rows, values)."""

    raw: torch.Tensor
    """Log-probability of the rating's tokens among all tokens."""
    masked: torch.Tensor
    """Log-probability within the scale, as at inference."""


def rating_log_probs(
    readout: RatingReadout, logits: Mapping[tuple[int, ...], torch.Tensor]
) -> RatingLogProbs:
    """Log-probabilities of the values from the logits (rows, vocabulary) after each open prefix.

    The differentiable twin of `RatingReadout.read`.
    """
    import torch

    values = len(readout.scale.values)
    raw: list[Any] = [[] for _ in range(values)]
    masked: list[Any] = [[] for _ in range(values)]

    def walk(branch: Any, raw_so_far: Any, masked_so_far: Any) -> None:
        tokens = list(branch.steps)
        log_probs = torch.log_softmax(logits[branch.prefix].float(), dim=-1)[:, tokens]
        within = torch.log_softmax(log_probs, dim=-1)
        for at, token in enumerate(tokens):
            step = branch.steps[token]
            onward = raw_so_far + log_probs[:, at], masked_so_far + within[:, at]
            if isinstance(step, int):
                raw[step].append(onward[0])
                masked[step].append(onward[1])
            else:
                walk(step, *onward)

    walk(readout.root, 0.0, 0.0)

    def columns(parts: list[Any]) -> torch.Tensor:
        # A value may be spelled in several ways.
        return torch.stack([torch.logsumexp(torch.stack(ways), 0) for ways in parts], dim=1)

    return RatingLogProbs(columns(raw), columns(masked))


def rating_loss(
    log_probs: RatingLogProbs,
    targets: torch.Tensor,
    ratings: torch.Tensor,
    values: torch.Tensor,
    weights: RatingLoss,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Each row's loss (rows,), and its terms by name, unweighted.

    Args:
        log_probs: of the batch.
        targets: weights on the values, (rows, values); a fraction lies on two neighbours.
        ratings: true ratings, (rows,).
        values: the scale, (values,), rising.
        weights: of the terms.

    Terms: `cross_entropy`, soft, over all tokens. `emd`, the squared distance between cumulative
    distributions, in units of the scale's gaps (Hou et al., arXiv 1611.05916). `squared_error` of
    the mean. `absolute_error`, the expected distance to the true rating, whose minimum is the
    median.
    """
    p = log_probs.masked.exp()
    gaps = values[1:] - values[:-1]
    steps = (p.cumsum(1) - targets.cumsum(1))[:, :-1]
    terms = {
        "cross_entropy": -(targets * log_probs.raw).sum(1),
        "emd": (steps**2 * gaps).sum(1),
        "squared_error": ((p * values).sum(1) - ratings) ** 2,
        "absolute_error": (p * (values - ratings[:, None]).abs()).sum(1),
    }
    total = sum(getattr(weights, name) * term for name, term in terms.items())
    assert not isinstance(total, int)
    return total, terms

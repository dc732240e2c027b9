"""Log-linear distributions over a few values: softmax over the values of features times weights.

Calibration and fusion are such models. Their mean negative log-likelihood is convex in the weights,
and with a pull towards a starting point it has one minimum, which Newton's method finds: the same
rows give the same weights.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_STEPS = 100


def shares(features: Floats, weights: Floats) -> Floats:
    """The distributions (n, values) of features (n, values, k) under weights (k,)."""
    scores = features @ weights
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def fit_weights(
    features: Floats,
    targets: Floats,
    start: Floats,
    pull: float,
    free: npt.NDArray[np.bool_] | None = None,
) -> Floats:
    """The weights with the least mean negative log-likelihood plus pull |weights - start|^2.

    Args:
        features: (n, values, k).
        targets: the truth as weights on the values (n, values), each row summing to 1.
        start: (k,), where the search begins and what the weights are drawn to.
        pull: above 0, or what never occurs would have a weight without end.
        free: which weights may move (k,); None: all. The others stay where they start.
    """
    moving = np.ones(len(start), dtype=bool) if free is None else free
    weights = start.copy()

    def loss_of(at: Floats, q: Floats) -> float:
        likelihood = (targets * np.log(np.maximum(q, 1e-300))).sum(axis=1).mean()
        return float(pull * np.square(at - start).sum() - likelihood)

    q = shares(features, weights)
    loss = loss_of(weights, q)
    for _ in range(_STEPS):
        expected = np.einsum("nv,nvk->nk", q, features)
        wanted = np.einsum("nv,nvk->nk", targets, features)
        gradient = (expected - wanted).mean(axis=0) + 2.0 * pull * (weights - start)
        apart = features - expected[:, None, :]
        hessian = np.einsum("nv,nvj,nvk->jk", q, apart, apart) / len(q)
        hessian += 2.0 * pull * np.eye(len(start))
        step = np.zeros(len(start))
        step[moving] = np.linalg.solve(hessian[np.ix_(moving, moving)], gradient[moving])
        decrement = float(step @ gradient)
        if decrement < 1e-14:
            break
        length = 1.0
        while True:
            tried = weights - length * step
            tried_q = shares(features, tried)
            tried_loss = loss_of(tried, tried_q)
            if tried_loss <= loss - 0.25 * length * decrement or length < 1e-8:
                break
            length /= 2.0
        if tried_loss >= loss:  # as low as rounding lets it get
            break
        weights, q, loss = tried, tried_q, tried_loss
    return weights

"""How good a rating expert is on its validation rows, beside the floors on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.domains import floors
from finetune.settings import Recipe
from finetune.splits import read_targets
from r4r_graph.evaluation import Estimate, PointScores, score, score_points
from r4r_graph.ratings import READOUTS
from r4r_graph.schema import Review


def rating_tables(
    recipe: Recipe, targets: Sequence[Review], read: Sequence[Sequence[float]]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Tables for a card.

    Args:
        recipe: scale, reviews and training rows.
        targets: the validation rows.
        read: for each of them the probabilities of the scale's values and, last, the raw mass.
    """
    scale = recipe.rating_scale
    rows = np.asarray(read, dtype=np.float64)
    truths = np.array([target.rating for target in targets])
    scores = score(truths, rows[:, :-1], scale, seed=recipe.seed)
    table = [_row(f"this expert, {name}", scores.mae[name], scores.rmse[name]) for name in READOUTS]
    by_floor = floors(recipe, targets, read_targets(recipe, "train"))
    for name, points in by_floor.items():
        found: PointScores = score_points(truths, points, scale, seed=recipe.seed)
        table.append(_row(name.replace("_", " "), found.mae, found.rmse))
    facts = [
        {
            "rows": len(targets),
            "negative log-likelihood": _shown(scores.nll),
            "coverage of the 80 % interval": _shown(scores.coverage),
            "raw mass on ratings": f"{rows[:, -1].mean():.4f}",
        }
    ]
    return [
        ("Error on validation rows, with 95 % bootstrap intervals", table),
        ("Calibration on the same rows", facts),
    ]


def _row(name: str, mae: Estimate, rmse: Estimate) -> dict[str, str]:
    return {"predictor": name, "MAE": _shown(mae), "RMSE": _shown(rmse)}


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"

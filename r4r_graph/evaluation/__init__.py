"""How good predictions are: metrics with intervals, and floors to hold them against."""

from r4r_graph.evaluation.floors import FLOORS, Floors, HistoryStats, floor_predictions
from r4r_graph.evaluation.metrics import (
    Estimate,
    PointScores,
    Scores,
    bootstrap,
    covered,
    errors,
    likelihood_losses,
    mean,
    paired_difference,
    readings,
    root_mean_square,
    score,
    score_points,
    soft_targets,
    stack,
)

__all__ = [
    "FLOORS",
    "Estimate",
    "Floors",
    "HistoryStats",
    "PointScores",
    "Scores",
    "bootstrap",
    "covered",
    "errors",
    "floor_predictions",
    "likelihood_losses",
    "mean",
    "paired_difference",
    "readings",
    "root_mean_square",
    "score",
    "score_points",
    "soft_targets",
    "stack",
]

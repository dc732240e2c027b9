"""How good predictions are: metrics with intervals, floors to hold them against, and their words.

`evaluate` makes the report; `targets` and `predictions` are what goes in, `contenders` rates with
adapters and `probes` asks what they use; `metrics`, `floors`, `boosting`, `slices`, `ranking` and
`reliability` count; `words` looks at what was written; `rendering` shows a report.
`docs/evaluation.md` says what each figure means.
"""

from r4r_graph.evaluation.contenders import AdapterSet, WordChecks, run_adapters, words_of
from r4r_graph.evaluation.evaluate import Contender, Settings, evaluate
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
from r4r_graph.evaluation.predictions import Predictions, read_predictions
from r4r_graph.evaluation.report import EvaluationReport, PredictorReport
from r4r_graph.evaluation.targets import draw, load_targets, record_sample

__all__ = [
    "FLOORS",
    "AdapterSet",
    "Contender",
    "Estimate",
    "EvaluationReport",
    "Floors",
    "HistoryStats",
    "PointScores",
    "Predictions",
    "PredictorReport",
    "Scores",
    "Settings",
    "WordChecks",
    "bootstrap",
    "covered",
    "draw",
    "errors",
    "evaluate",
    "floor_predictions",
    "likelihood_losses",
    "load_targets",
    "mean",
    "paired_difference",
    "read_predictions",
    "readings",
    "record_sample",
    "root_mean_square",
    "run_adapters",
    "score",
    "score_points",
    "soft_targets",
    "stack",
    "words_of",
]

"""`r4r fuse`: weigh a predictor's distributions with what the averages say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from r4r_graph.cli.options import ItemsOption, ReviewsOption, ScaleOption, out


def fuse(
    reviews: ReviewsOption,
    targets: Annotated[
        Path, typer.Option(help="Validation rows, with their true ratings: a file of reviews.")
    ],
    predictions: Annotated[
        Path, typer.Option(help="Distributions of these rows: what `bulk` or `evaluate` wrote.")
    ],
    file: Annotated[Path, typer.Option("--out", "-o", help="The JSON file to write.")],
    items: ItemsOption = None,
    scale: ScaleOption = "1-5",
) -> None:
    """Fit a fusion on validation rows, for `evaluate --fusion NAME=FILE`."""
    from r4r_graph.evaluation.fusion import TERMS, fit_fusion
    from r4r_graph.evaluation.predictions import read_predictions
    from r4r_graph.evaluation.targets import load_targets
    from r4r_graph.ratings import RatingScale
    from r4r_graph.reviews import load_items, open_reviews

    values = RatingScale.parse(scale)
    rows = load_targets(targets, values)
    source = open_reviews(reviews, scale=values, items=load_items(items) if items else None)
    read = read_predictions(predictions, rows, values, name=predictions.name)
    fusion = fit_fusion(read, rows, source, values)
    fusion.save(file)
    weights = ", ".join(
        f"{name} {weight:.3f}" for name, weight in zip(TERMS, fusion.weights, strict=True)
    )
    out.print(f"fitted on {fusion.rows} rows: {weights}; wrote {file}", markup=False)

"""What history statistics say of a target, as a distribution: a soft target for the predictor.

One rating is a noisy lesson in how ratings follow from averages. Two classifiers have learned it
from every row of the training part, gradient boosting and a logistic regression; the mean of their
distributions teaches a predictor more a row than the single ratings do (distillation: Hinton et al.
2015, arXiv 1503.02531). No word is read, and nothing of it is left at inference but what the
predictor learned.

Each row's distribution comes from a fit on other rows of its domain's training part (`FOLDS`
parts by lot), so that it never holds the row's own rating.

scikit-learn fits both, and is an extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.domains import by_domain, review_source
from finetune.settings import Recipe
from finetune.splits import training_ends
from r4r_graph.errors import DataError, MissingExtraError
from r4r_graph.evaluation.boosting import FIT_ROWS, history_features
from r4r_graph.evaluation.floors import Floors
from r4r_graph.evaluation.metrics import Floats, soft_targets
from r4r_graph.evaluation.targets import by_lot
from r4r_graph.ratings import RatingScale
from r4r_graph.reviews import ReviewSource
from r4r_graph.schema import Review

FOLDS = 5

LEAST_ROWS = 30
"""Training rows that a domain must have."""

# Chosen on the last fifth by time of the training parts of one dense and one sparse data set. There
# the mean of the two has an RMSE of 0.738 and 0.765, boosting alone 0.738 and 0.768, the regression
# alone 0.743 and 0.765; deeper trees without a pull (8 leaves) 0.750 and 0.769.
_LEARNING_RATE = 0.05
_LEAVES = 4
_ROUNDS = 100
_TREE_PULL = 5.0
_REGRESSION_PULL = 20.0

Key = tuple[str, str, float]


def statistical_estimates(
    recipe: Recipe, targets: Sequence[Review]
) -> dict[Key, tuple[float, ...]]:
    """Distributions over the recipe's scale by (user, item, time), for targets of the training
    part.

    Raises:
        DataError: a domain has too few training rows.
        MissingExtraError: scikit-learn is not installed.
    """
    ends = training_ends(recipe)
    source, scale = review_source(recipe), recipe.rating_scale
    earlier = by_domain(recipe, source)
    found: dict[Key, tuple[float, ...]] = {}
    for domain, asked in by_domain(recipe, targets).items():
        if not asked:
            continue
        known = [review for review in earlier[domain] if review.timestamp < ends[domain]]
        if len(known) < LEAST_ROWS:
            raise DataError(
                f"{len(known)} training rows{f' of {domain}' if domain else ''} are too few to say "
                f"what averages tell (at least {LEAST_ROWS}); set the predictor's estimate_share "
                "and averages_estimate_share to 0"
            )
        rows = _crossed(by_lot(known, recipe.seed, "estimates")[:FIT_ROWS], asked, source, scale)
        keys = ((t.user_id, t.item_id, float(t.timestamp)) for t in asked)
        found.update(zip(keys, map(tuple, rows.tolist()), strict=True))
    return found


def _crossed(
    known: Sequence[Review], asked: Sequence[Review], source: ReviewSource, scale: RatingScale
) -> Floats:
    """Distributions (n, values) of the rows asked for, each by a fit without its own fold."""
    floors = Floors.fit(known, source)
    folds = {review.key: at % FOLDS for at, review in enumerate(known)}
    of_known = np.array([folds[review.key] for review in known])
    of_asked = np.array([folds.get(review.key, 0) for review in asked])
    seen, shown = history_features(known, source, floors), history_features(asked, source, floors)
    told = np.isfinite(seen).any(axis=0)  # scikit-learn's bins need one value in each column
    weights = soft_targets(np.array([review.rating for review in known]), scale)
    found = np.zeros((len(asked), len(scale.values)))
    for fold in range(FOLDS):
        wanted = of_asked == fold
        if wanted.any():
            others = of_known != fold
            models = _fitted(seen[others][:, told], weights[others])
            for model in models:
                places = np.asarray(model.classes_, dtype=np.intp)
                rows = np.zeros((int(wanted.sum()), len(scale.values)))
                rows[:, places] = model.predict_proba(shown[wanted][:, told])
                found[wanted] += rows / len(models)
    return found


def _fitted(features: Floats, weights: Floats) -> list[Any]:
    """Classifiers of the scale's places; a rating between two values counts for both in part."""
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
        from sklearn.impute import SimpleImputer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise MissingExtraError("soft targets from history statistics", "evaluation") from None

    rows, places = np.nonzero(weights)
    shares = weights[rows, places]
    boosting = HistGradientBoostingClassifier(
        learning_rate=_LEARNING_RATE,
        max_leaf_nodes=_LEAVES,
        max_iter=_ROUNDS,
        l2_regularization=_TREE_PULL,
        early_stopping=False,
        random_state=0,
    )
    # What is unknown stands at the mean, and that it is unknown in a column of its own.
    regression = make_pipeline(
        SimpleImputer(add_indicator=True),
        StandardScaler(),
        LogisticRegression(C=1 / _REGRESSION_PULL, max_iter=1000),
    )
    return [
        boosting.fit(features[rows], places, sample_weight=shares),
        regression.fit(features[rows], places, logisticregression__sample_weight=shares),
    ]

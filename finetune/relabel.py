"""Labels for a data set without a teacher: our own summaries, mended (self-training).

    make_summaries(recipe)          # by a summarizer that learned on other data
    relabel(recipe)                 # work/relabelled/films.parquet, for domains.films.aspects

A summarizer that learned on one data set finds phrases in another, yet tells praise from blame
badly there, and adds phrases that it knows. Both can be mended without a teacher, out of the data
set's own words and ratings:

- A phrase stays where most of its words stand in the review.
- Its side is what it does to ratings: a ridge regression over words and pairs of words, fitted on
  the reviews of the training part, says by how many spreads a phrase raises a rating or lowers it.
  Where a phrase says little, the review's own rating decides (`RATING_WEIGHT`).

What a writer looks for (values) has to share words with the review as well, and may not be blame;
what is said to be lacking is looked for.

scikit-learn fits the regression, and is an extra.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from finetune.domains import by_domain, domains, review_source
from finetune.settings import Recipe
from finetune.splits import training_ends
from finetune.summaries import read_summaries
from r4r_graph.errors import DataError, MissingExtraError, SettingError
from r4r_graph.evaluation.words.labels import normalized
from r4r_graph.evaluation.words.overlap import content_words
from r4r_graph.jobs import write_table
from r4r_graph.schema import AspectSummary, Review

SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.float64()),
        *((name, pa.list_(pa.string())) for name in ("positive", "negative", "values")),
    ]
)
"""Columns of a file of labels, as `domains.<name>.aspects` takes them: ids without the name."""

RATING_WEIGHT = 0.2
"""How much a rating one spread above the mean speaks for praise, where a phrase that raises ratings
by one spread counts 1. Of 0 to 1, this meets the sides of 13,000 phrases of a teacher best
(balanced accuracy 0.73; 0.70 without)."""

LEAST_REVIEWS = 200
"""Reviews with words that a data set's training part must have."""

_STEM = 5
_TRAILING = re.compile(r"\b(?:a|an|and|as|at|but|by|for|from|in|of|on|or|out|the|to|with)$", re.I)
_LACK = re.compile(r"^(?:lacks?|lacking|lack of|no|not enough|without)\s+(?:of\s+)?(.+)$", re.I)


@dataclass(frozen=True, slots=True)
class RelabelReport:
    """What became of the summaries."""

    folder: Path
    reviews: int
    """Summaries that were there."""
    labels: int
    """Left: those with a phrase of praise or blame."""
    phrases: int
    """Of praise and blame, before."""
    kept: int
    moved: int
    """Of those kept, from one side to the other."""
    seconds: float


def relabel(recipe: Recipe) -> RelabelReport:
    """Mend the summaries in `work/summaries` of each data set without labels of its own, into
    `work/relabelled/NAME.parquet`. Only reviews of the training part are labelled.

    Raises:
        NotReadyError: there are no splits or no summaries yet.
        SettingError: every data set has labels.
        DataError: a data set has too few reviews to learn from.
        MissingExtraError: scikit-learn is not installed.
    """
    started = time.monotonic()
    summaries, ends = read_summaries(recipe), training_ends(recipe)
    folder = recipe.folder("relabelled")
    every = by_domain(recipe, review_source(recipe))
    unlabelled = [name for name, domain in domains(recipe).items() if domain.aspects is None]
    if not unlabelled:
        raise SettingError("every data set has labels: there is none to relabel")
    found: list[tuple[Review, Mended]] = []
    for name in unlabelled:
        known = [review for review in every[name] if review.timestamp < ends[name]]
        sides = fit_sides([review for review in known if review.text.strip()])
        done = [review for review in known if review.key in summaries]
        mended = [(review, mend(summaries[review.key], review, sides)) for review in done]
        rows = [_row(name, review, label.summary) for review, label in mended if label.worth]
        folder.mkdir(parents=True, exist_ok=True)
        write_table(pa.Table.from_pylist(rows, SCHEMA), folder / f"{name or 'reviews'}.parquet")
        found += mended
    return RelabelReport(
        folder,
        reviews=len(found),
        labels=sum(label.worth for _, label in found),
        phrases=sum(label.phrases for _, label in found),
        kept=sum(label.kept for _, label in found),
        moved=sum(label.moved for _, label in found),
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class Sides:
    """What a data set's words do to its ratings."""

    model: Any
    """Texts to ratings (scikit-learn)."""
    empty: float
    """The rating of no words."""
    mean: float
    spread: float

    def slant(self, phrases: Sequence[str]) -> list[float]:
        """By how many spreads each phrase raises a rating."""
        if not phrases:
            return []
        found = (self.model.predict(list(phrases)) - self.empty) / self.spread
        return [float(value) for value in found]

    def leaning(self, rating: float) -> float:
        """What a review's own rating adds to its phrases' slants."""
        return RATING_WEIGHT * (rating - self.mean) / self.spread


def fit_sides(reviews: Sequence[Review]) -> Sides:
    """Fit what words do to ratings.

    Raises:
        DataError: there are too few reviews, or all have one rating.
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import Ridge
        from sklearn.pipeline import make_pipeline
    except ImportError:
        raise MissingExtraError("the step `relabel`", "evaluation") from None
    if len(reviews) < LEAST_REVIEWS:
        raise DataError(
            f"{len(reviews)} reviews with words are too few to learn what words do to ratings "
            f"(at least {LEAST_REVIEWS})"
        )
    ratings = np.array([review.rating for review in reviews])
    if not ratings.std():
        raise DataError("all reviews have one rating: nothing tells praise from blame")
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True)
    model = make_pipeline(words, Ridge(alpha=2.0))
    model.fit([review.text for review in reviews], ratings)
    empty = float(model.predict([""])[0])
    return Sides(model, empty, float(ratings.mean()), float(ratings.std()))


@dataclass(frozen=True, slots=True)
class Mended:
    """A summary as it should have been."""

    summary: AspectSummary
    phrases: int
    kept: int
    moved: int

    @property
    def worth(self) -> bool:
        """Whether there is anything to learn from it."""
        return bool(self.summary.positive or self.summary.negative)


def mend(summary: AspectSummary, review: Review, sides: Sides) -> Mended:
    """The summary with only what stands in the review, praise and blame on their sides."""
    there = _stems(f"{review.title} {review.text}")
    was = dict.fromkeys(summary.positive, True)
    was |= {phrase: False for phrase in summary.negative if phrase not in was}
    phrases = [phrase for phrase in was if _stands_in(phrase, there, 2 / 3)]
    leaning = sides.leaning(review.rating)
    praised = {
        phrase: slant + leaning > 0
        for phrase, slant in zip(phrases, sides.slant(phrases), strict=True)
    }
    positive = tuple(phrase for phrase in phrases if praised[phrase])
    negative = tuple(phrase for phrase in phrases if not praised[phrase])
    wanted = [phrase for phrase in summary.values if _stands_in(phrase, there, 1 / 2)]
    values = [
        phrase
        for phrase, slant in zip(wanted, sides.slant(wanted), strict=True)
        if slant >= 0 and phrase not in negative
    ]
    values += [match[1].capitalize() for phrase in negative if (match := _LACK.match(phrase))]
    moved = sum(praised[phrase] != was[phrase] for phrase in phrases)
    mended = normalized(AspectSummary(positive, negative, tuple(values)))
    return Mended(mended, len(was), len(phrases), moved)


def _stands_in(phrase: str, there: set[str], share: float) -> bool:
    """Whether so many of the phrase's words are the text's, and it is no piece of a phrase."""
    stems = _stems(phrase)
    if not stems or _TRAILING.search(phrase.strip()):
        return False
    return sum(stem in there for stem in stems) >= share * len(stems)


def _stems(text: str) -> set[str]:
    return {word[:_STEM] for word in content_words(text)}


def _row(name: str, review: Review, label: AspectSummary) -> dict[str, Any]:
    """A row of `SCHEMA`; in a table of several data sets ids bear the name of theirs."""
    borne = f"{name}/" if name else ""
    user, item = (bearing.removeprefix(borne) for bearing in (review.user_id, review.item_id))
    found = {"user_id": user, "item_id": item, "timestamp": float(review.timestamp)}
    return found | label.to_dict()

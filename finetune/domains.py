"""One data set or several: what a recipe's reviews are, and which of them belong together.

Experts for films and for music may be trained together. Each data set is then a *domain* with a
name, and its users and items bear it (`films/u1`), so that everything after this module sees one
table of reviews. Time is each domain's own: each is split by its own first and last reviews. What
is fitted to one domain, such as floors, says nothing of another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from finetune.settings import Domain, Recipe
from r4r_graph.errors import NotReadyError
from r4r_graph.evaluation.floors import FLOORS, floor_predictions
from r4r_graph.evaluation.metrics import Floats
from r4r_graph.evaluation.words.labels import Labels, read_aspects
from r4r_graph.ratings import RatingScale, RatingStats
from r4r_graph.reviews import TableReviewSource, load_items, load_reviews
from r4r_graph.reviews.table import REVIEW_SCHEMA
from r4r_graph.schema import Item, Review

ALONE = ""
"""Name of the only domain, whose ids bear no name."""


def domains(recipe: Recipe) -> dict[str, Domain]:
    """The recipe's data sets by name."""
    if recipe.domains:
        return dict(recipe.domains)
    return {ALONE: Domain(recipe.reviews, recipe.items, recipe.teacher.aspects)}


def domain_of(recipe: Recipe, review: Review) -> str:
    """To which of them a review of the combined table belongs."""
    return review.user_id.partition("/")[0] if recipe.domains else ALONE


def by_domain(recipe: Recipe, reviews: Iterable[Review]) -> dict[str, list[Review]]:
    """The reviews of each domain, in their order; a domain without any has an empty list."""
    found: dict[str, list[Review]] = {name: [] for name in domains(recipe)}
    for review in reviews:
        found[domain_of(recipe, review)].append(review)
    return found


def in_turns(parts: Iterable[Sequence[Review]]) -> list[Review]:
    """The parts' reviews, one of each part in turn, so that a beginning of the list is balanced;
    a part that ends leaves its turns to the others."""
    lists = [list(part) for part in parts]
    longest = max(map(len, lists), default=0)
    return [part[at] for at in range(longest) for part in lists if at < len(part)]


def review_source(recipe: Recipe) -> TableReviewSource:
    """All reviews of the recipe, indexed; read once a process.

    Raises:
        DataError: they cannot be read; it names the file.
    """
    named = tuple((name, domain.reviews, domain.items) for name, domain in domains(recipe).items())
    files = [path for _, *paths in named for path in paths if path is not None]
    stamps = tuple(path.stat().st_mtime_ns for path in files if path.exists())
    return _load(named, recipe.scale, stamps)


def read_labels(recipe: Recipe, *, confident_only: bool) -> Labels:
    """The labels of all domains: ready-made ones, or what the teacher wrote.

    Raises:
        NotReadyError: no domain names any, and the teacher has written none yet.
        DataError: see `read_aspects`.
    """
    found: Labels = {}
    for name, domain in domains(recipe).items():
        if domain.aspects is not None:
            labels = read_aspects(domain.aspects, confident_only=confident_only)
            for (user, item, when), summary in labels.items():
                found[_bearing(name, user), _bearing(name, item), when] = summary
    if found or has_labels(recipe):
        return found
    folder = recipe.folder("labels") / "aspects"
    if not any(folder.glob("part-*.parquet")):
        raise NotReadyError(
            f"{folder} holds no labels; run the step `teacher` first, or name ready-made ones in "
            "teacher.aspects"
        )
    return read_aspects(folder, confident_only=confident_only)


def has_labels(recipe: Recipe) -> bool:
    """Whether any domain brings ready-made labels."""
    return any(domain.aspects is not None for domain in domains(recipe).values())


def floors(recipe: Recipe, targets: Sequence[Review], train: Sequence[Review]) -> dict[str, Floats]:
    """Each floor's predictions of the targets (n,), fitted on the training rows of their domain.

    Raises:
        DataError: a domain has targets, but no training rows.
    """
    source = review_source(recipe)
    fit_on = by_domain(recipe, train)
    found = {name: np.full(len(targets), np.nan) for name in FLOORS}
    of = np.array([domain_of(recipe, target) for target in targets])
    for domain, some in by_domain(recipe, targets).items():
        if some:
            for name, points in floor_predictions(some, source, fit_on[domain]).items():
                found[name][of == domain] = points
    return found


@lru_cache(maxsize=2)
def _load(
    named: tuple[tuple[str, Path, Path | None], ...], scale: str, stamps: tuple[int, ...]
) -> TableReviewSource:
    """`stamps` are the files' times of change: what was written anew is read anew."""
    parsed, tables = RatingScale.parse(scale), []
    alone: dict[str, TableReviewSource] = {}
    catalogue: dict[str, Item] = {}
    for name, reviews, items in named:
        known = load_items(items) if items is not None else {}
        if name == ALONE:
            return load_reviews(reviews, scale=parsed, items=known or None)
        for item in known.values():
            borne = replace(item, item_id=_bearing(name, item.item_id))
            catalogue[borne.item_id] = borne
        alone[name] = load_reviews(reviews, scale=parsed)
        rows = [_borne(name, review) for review in alone[name]]
        tables.append(pa.Table.from_pylist(rows, REVIEW_SCHEMA))
    return _DomainsSource(pa.concat_tables(tables), catalogue, alone)


class _DomainsSource(TableReviewSource):
    """One table of all domains' reviews, in which the overall mean is each domain's own: at
    inference an expert meets one data set at a time, with the mean of that one."""

    def __init__(
        self,
        table: pa.Table,
        items: Mapping[str, Item],
        alone: Mapping[str, TableReviewSource],
    ) -> None:
        super().__init__(table, items)
        self._alone = dict(alone)

    def overall_stats(
        self, before: float, *, without_pair: tuple[str, str] | None = None
    ) -> RatingStats:
        """Statistics of the ratings of the pair's domain; of all domains without a pair."""
        if without_pair is None:
            return super().overall_stats(before)
        domain, _, user_id = without_pair[0].partition("/")
        if domain not in self._alone:
            return super().overall_stats(before, without_pair=without_pair)
        item_id = without_pair[1].partition("/")[2]
        return self._alone[domain].overall_stats(before, without_pair=(user_id, item_id))


def _borne(name: str, review: Review) -> Mapping[str, Any]:
    ids = {"user_id": _bearing(name, review.user_id), "item_id": _bearing(name, review.item_id)}
    return review.to_dict() | ids


def _bearing(name: str, id_: str) -> str:
    return id_ if name == ALONE else f"{name}/{id_}"

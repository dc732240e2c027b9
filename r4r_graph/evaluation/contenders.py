"""From adapters to contenders: rates the targets with a set of adapters, and probes its words.

    contender = run_adapters(AdapterSet("ours", "work/adapters"), targets, load, "evaluation/")

Everything it computes is a job in a folder of its own, `out/NAME/CONDITION`, and goes on where it
was stopped.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from r4r_graph.engine.adapters import NONE, SHIPPED
from r4r_graph.errors import DataError, R4RError, SettingError
from r4r_graph.evaluation.evaluate import Contender
from r4r_graph.evaluation.metrics import RESAMPLES
from r4r_graph.evaluation.predictions import Predictions
from r4r_graph.evaluation.probes import (
    AS_IS,
    BY_ITSELF,
    CONDITIONS,
    Rationales,
    rate_targets,
    written,
)
from r4r_graph.evaluation.report import WordScore, WordsReport
from r4r_graph.evaluation.targets import by_lot
from r4r_graph.evaluation.words.labels import Labels, label_key
from r4r_graph.evaluation.words.likeness import TextScorer, score_summaries, score_texts
from r4r_graph.evaluation.words.rationales import rationale_form
from r4r_graph.jobs import Columns, JobProgress, digest_rows, read_job, run_job
from r4r_graph.ratings import RatingScale
from r4r_graph.recommender import Recommender
from r4r_graph.reviews import ListedReviews, ReviewSource
from r4r_graph.schema import AspectSummary, Review

Load = Callable[[str], Recommender]
"""Opens a recommender with the adapters in a folder, with those `shipped`, or with `none`."""

Tell = Callable[[str, JobProgress], None]
"""Told what is being done, and how far it is."""

SUMMARY_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        *((name, pa.list_(pa.string())) for name in ("positive", "negative", "values")),
        ("error", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """A set of experts to evaluate."""

    name: str
    folder: str
    """With `summarizer/`, `reasoner/` and `predictor/`; or `shipped`, or `none` (the base model
    alone)."""
    condition: str = AS_IS
    """Under which it rates: that which its predictor was trained for."""

    @classmethod
    def parse(cls, text: str) -> AdapterSet:
        """From `FOLDER`, `NAME=FOLDER` or `NAME=FOLDER@CONDITION`; the folder may be `shipped`
        or `none`.

        Raises:
            SettingError: no such folder or condition, or a name that is no file name.
        """
        name, equals, rest = text.partition("=")
        if not equals:
            name, rest = "", text
        folder, at, condition = rest.rpartition("@")
        if not at or (condition not in (AS_IS, *CONDITIONS) and Path(rest).is_dir()):
            folder, condition = rest, AS_IS
        if condition not in (AS_IS, *BY_ITSELF):
            raise SettingError(
                f"bad adapters {text!r}: a set rates under one of {', '.join((AS_IS, *BY_ITSELF))}"
            )
        if folder not in (NONE, SHIPPED) and not Path(folder).is_dir():
            raise SettingError(
                f"bad adapters {text!r}: {folder!r} is no folder (nor {SHIPPED} or {NONE})"
            )
        plain = {NONE: "base", SHIPPED: SHIPPED}
        name = name or plain.get(folder) or Path(folder).resolve().name
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith((".", "_")):
            raise SettingError(
                f"bad adapters {text!r}: the name {name!r} is to name a folder too; use letters, "
                "digits, '.', '-' and '_'"
            )
        return cls(name, folder, condition)


@dataclass(frozen=True)
class WordChecks:
    """What is asked of the words."""

    scorers: tuple[TextScorer, ...] = ()
    """How near a rationale comes to the review that was written later."""
    labels: Labels | None = None
    """A teacher's aspect summaries, to hold the summarizer's against."""
    summaries: int = 200
    """Labelled reviews to summarize at most."""
    resamples: int = RESAMPLES
    """Of the bootstrap."""


def run_adapters(
    adapters: AdapterSet,
    targets: Sequence[Review],
    load: Load,
    out: str | os.PathLike[str],
    *,
    probes: Sequence[str] = (),
    checks: WordChecks | None = None,
    seed: int = 0,
    concurrency: int = 64,
    tell: Tell | None = None,
    **knobs: Any,
) -> Contender:
    """Rate the targets with a set of adapters, under its own condition and under those probed.

    Args:
        adapters: the set.
        targets: the rows.
        load: opens a recommender with a set's adapters; it is closed again.
        out: the folder of the evaluation; this set's is `out/NAME`.
        probes: conditions to rate under besides; see `evaluation.probes.CONDITIONS`.
        checks: what to ask of the words; None: their form alone.
        seed: decides what is sampled, who gets whose rationale, and which labelled reviews are
            summarized.
        concurrency: rows in flight.
        tell: told what is being done.
        **knobs: other fields of `Knobs`.

    Raises:
        SettingError: an unknown condition.
        DataError: too few labelled reviews are from the time of the targets.
        InputError: the folder holds the job of other rows, adapters or settings.
    """
    folder, checks = Path(out) / adapters.name, checks or WordChecks()
    for condition in probes:
        if condition not in CONDITIONS:
            raise SettingError(f"unknown probe {condition!r}; there are: {', '.join(CONDITIONS)}")

    with load(adapters.folder) as recommender:
        # Looked for now: hours of rating are not to end in an error about labels.
        labelled = _labelled(recommender, targets, checks, seed)

        def rated(condition: str, texts: Rationales | None = None) -> Predictions:
            return rate_targets(
                recommender,
                targets,
                folder,
                name=adapters.name,
                condition=condition,
                own=texts,
                seed=seed,
                concurrency=concurrency,
                on_progress=_named(tell, f"{adapters.name} {condition}"),
                **knobs,
            )

        own = rated(adapters.condition)
        texts = written(own, targets) if any(own.rationales) else None
        # A set that rates without rationales has none to exchange.
        wanted = [
            condition
            for condition in probes
            if condition != own.condition and (texts is not None or condition in BY_ITSELF)
        ]
        found = tuple(rated(condition, texts) for condition in wanted)
        summaries = None
        if labelled:
            tell_summaries = _named(tell, f"{adapters.name} summaries")
            made = _summarized(recommender, list(labelled), folder, concurrency, tell_summaries)
            teacher = list(labelled.values())
            summaries = score_summaries(made, teacher, seed=seed, resamples=checks.resamples)
        words = words_of(
            own,
            targets,
            recommender.reviews,
            recommender.experts.scale,
            checks.scorers,
            summaries,
            seed=seed,
            resamples=checks.resamples,
        )
    return Contender(own, found, words)


def words_of(
    predictions: Predictions,
    targets: Sequence[Review],
    source: ReviewSource | None,
    scale: RatingScale,
    scorers: Sequence[TextScorer] = (),
    summaries: WordScore | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> WordsReport | None:
    """What the predictions' words are like; None where nothing was written or asked.

    A rationale is held against the review that the user wrote of the item later, where that has
    words; of several rationales a row, the first. Whatever names its item comes nearer to that
    review than to one of another item, so it is also held against what another user wrote of the
    same item at that time or later: only above that one does it know the person.
    """
    texts: list[str | None] = []
    titles: list[list[str]] = []
    for target, rationales in zip(targets, predictions.rationales, strict=True):
        known = _titles(target, source)
        texts += rationales or [None]
        titles += [known] * max(1, len(rationales))
    form = rationale_form(texts, titles=titles, scale=scale, seed=seed, resamples=resamples)
    firsts = [rationales[0] if rationales else None for rationales in predictions.rationales]
    later = [target.text for target in targets]
    others = [_by_another(target, source, seed) for target in targets] if scorers else []
    found: list[WordScore] = []
    for scorer in scorers:
        for against, name in ((None, scorer.name), (others, f"{scorer.name}, same item")):
            score = score_texts(
                scorer, firsts, later, against, name=name, seed=seed, resamples=resamples
            )
            found += [] if score is None else [score]
    if form is None and not found and summaries is None:
        return None
    return WordsReport(form, tuple(found), summaries)


def _by_another(
    target: Review, source: ReviewSource | None, seed: int, limit: int = 1000
) -> str | None:
    """What another user wrote of the item, not before the target: the rationale cannot have read
    it. None where nobody did."""
    if source is None:
        return None
    latest = source.item_history(target.item_id, math.inf, limit, without_user=target.user_id)
    unread = [r for r in latest if r.timestamp >= target.timestamp and r.text.strip()]
    return by_lot(unread, seed, target.key)[0].text if unread else None


def _titles(target: Review, source: ReviewSource | None, limit: int = 50) -> list[str]:
    """Titles that the rationale may name: a title with a number in it is no rating."""
    if source is None:
        return [target.title]
    when, user, item = target.timestamp, target.user_id, target.item_id
    earlier = source.user_history(user, when, limit, without_item=item)
    return [source.item(item, when).title, *(review.title for review in earlier)]


def _labelled(
    recommender: Recommender, targets: Sequence[Review], checks: WordChecks, seed: int
) -> dict[Review, AspectSummary]:
    """Labelled reviews from the time of the targets, which nothing that was trained on earlier ones
    ever saw, and their labels; empty where none are given."""
    source, labels = recommender.reviews, checks.labels
    if labels is None:
        return {}
    if not isinstance(source, ListedReviews):
        raise DataError(
            f"{type(source).__name__} cannot list its reviews, so those that a teacher labelled "
            "cannot be found: load them as a table or a database"
        )
    since = min(target.timestamp for target in targets)
    known = {
        review.key: review
        for review in source
        if review.timestamp >= since and review.text.strip() and label_key(review) in labels
    }
    rows = by_lot(known.values(), seed, "summaries")[: checks.summaries]
    if len(rows) < 2:
        raise DataError(
            f"{len(rows)} of the labelled reviews are from the time of the targets; summaries are "
            "held against labels that no training saw, so give labels of later reviews"
        )
    return {review: labels[label_key(review)] for review in rows}


def _summarized(
    recommender: Recommender,
    rows: Sequence[Review],
    folder: Path,
    concurrency: int,
    on_progress: Callable[[JobProgress], None] | None,
) -> list[AspectSummary | None]:
    """This summarizer's summaries; None where one failed."""
    source = recommender.reviews
    assert source is not None  # `_labelled` has read it

    async def summarize(review: Review) -> Columns:
        columns: Columns = {"key": review.key, "error": None}
        try:
            kind = source.item(review.item_id, None).category
            made = await recommender.experts.summarizer.asummarize(review, kind)
        except R4RError as error:
            return columns | {"error": f"{type(error).__name__}: {error}"}
        return columns | made.summary.to_dict()

    model = recommender.experts.model_card()
    run_job(
        rows,
        summarize,
        folder / "summaries",
        schema=SUMMARY_SCHEMA,
        manifest={
            "rows": digest_rows(review.key for review in rows),
            "budgets": asdict(recommender.experts.budgets),
            "base": model["base_digest"],
            "adapter": model["adapters"]["summarizer"],
            "prompt": model["prompts"]["summarizer"],
        },
        concurrency=concurrency,
        on_progress=on_progress,
    )
    return [
        None if row["error"] else AspectSummary.from_dict(row)
        for row in read_job(folder / "summaries")
    ]


def _named(tell: Tell | None, what: str) -> Callable[[JobProgress], None] | None:
    return None if tell is None else lambda now: tell(what, now)

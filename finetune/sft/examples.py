"""Training rows of each expert, as token ids.

Prompts come from the functions that render them at inference (`r4r_graph.experts`), through the
same tokenizer arithmetic (`HubTokenMeter`), so a trained expert meets at inference exactly what it
was trained on. A text expert's completion is its answer and the token that ends the turn; a rating
expert's is the rating's tokens, and its target a distribution.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from finetune.rows import Summaries, target_evidence
from finetune.settings import RatingTrainingSettings, Recipe
from finetune.teacher.labels import fit_summary
from r4r_graph.engine.aspects import format_aspects
from r4r_graph.engine.tokens import HubTokenMeter, opening_of
from r4r_graph.errors import DataError
from r4r_graph.evaluation.metrics import soft_targets
from r4r_graph.evidence import Evidence
from r4r_graph.experts import predictor_prompt, reasoner_prompt, summarizer_prompt
from r4r_graph.schema import AspectSummary, Review


@dataclass(frozen=True, slots=True)
class Example:
    """One training row."""

    prompt: tuple[int, ...]
    """Token ids up to where the answer begins."""
    completion: tuple[int, ...]
    """Token ids to learn. For a rating expert: none; `target` says it all."""
    target: tuple[float, ...] | None = None
    """For a rating expert: weights on the scale's values, summing to 1."""
    rating: float | None = None
    """The true rating behind `target`."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def summarizer_examples(
    pairs: Iterable[tuple[Review, str, AspectSummary]], meter: HubTokenMeter, recipe: Recipe
) -> Iterator[Example]:
    """(review, kind, the teacher's summary) -> review to summary. Empty reviews and summaries
    teach nothing and are passed over."""
    budgets = recipe.token_budgets
    for review, kind, summary in pairs:
        if review.text.strip() and any(summary.to_dict().values()):
            messages, _ = summarizer_prompt(review, kind, recipe.rating_scale, meter, budgets)
            short = fit_summary(summary, meter, budgets)  # at inference it would be cut
            yield Example(meter.prompt(messages), meter.answer(format_aspects(short)))


def reasoner_examples(kept: Iterable[Mapping[str, Any]], meter: HubTokenMeter) -> Iterator[Example]:
    """Rows of `kept.parquet`, evidence parsed -> evidence to rationale."""
    for row in kept:
        prompt = meter.prompt(reasoner_prompt(row["evidence"], meter))
        yield Example(prompt, meter.answer(row["rationale"]))


def reward_examples(
    targets: Sequence[Review],
    source: Any,
    summaries: Summaries,
    meter: HubTokenMeter,
    recipe: Recipe,
    settings: RatingTrainingSettings,
) -> Iterator[Example]:
    """The predictor's rows with the target's true review in the rationale's slot (paper, reward
    model): the one prompt that may hold the target's own words."""
    texts = {_key(target): target.text for target in targets}
    yield from rating_examples(targets, texts, source, summaries, meter, recipe, settings)


def rating_examples(
    targets: Sequence[Review],
    rationales: Mapping[tuple[str, str, float], str],
    source: Any,
    summaries: Summaries,
    meter: HubTokenMeter,
    recipe: Recipe,
    settings: RatingTrainingSettings,
    estimates: Mapping[tuple[str, str, float], Sequence[float]] | None = None,
) -> Iterator[Example]:
    """Histories with ratings, and a rationale where there is one -> distribution.

    Each row's own dice decide whether it is shown without its rationale, and without the words of
    its histories (`rationale_dropout`, `text_dropout`). Where there are `estimates`, they are the
    settings' `estimate_share` of the target.
    """
    share = settings.estimate_share if estimates is not None else 0.0
    for target in targets:
        evidence = target_evidence(target, source, summaries, meter, recipe)
        dice = random.Random(f"{recipe.seed} {target.key}")
        without_rationale = dice.random() < settings.rationale_dropout
        if dice.random() < settings.text_dropout:
            evidence = evidence.without_texts()
        rationale = None if without_rationale else rationales.get(_key(target))
        example = rating_example(evidence, rationale, target.rating, meter, recipe)
        if share and estimates is not None and example.target is not None:
            pairs = zip(example.target, estimates[_key(target)], strict=True)
            mixed = tuple((1 - share) * own + share * said for own, said in pairs)
            example = replace(example, target=mixed)
        yield example


def rating_example(
    evidence: Evidence,
    rationale: str | None,
    rating: float,
    meter: HubTokenMeter,
    recipe: Recipe,
) -> Example:
    """One row of a rating expert."""
    scale = recipe.rating_scale
    messages = predictor_prompt(evidence, rationale, scale, meter, recipe.token_budgets)
    [target] = soft_targets(np.array([scale.check(rating)]), scale).tolist()
    return Example(meter.prompt(messages), (), tuple(target), rating)


def within_length(
    examples: Iterable[Example], limit: int, max_left_out: float
) -> tuple[list[Example], int]:
    """The examples of at most `limit` tokens, and how many were longer. A row is never cut: what
    would be lost is the end, which is what is to be learned.

    Raises:
        DataError: the share of longer rows is above `max_left_out`.
    """
    kept, left_out = [], 0
    for example in examples:
        if len(example) <= limit:
            kept.append(example)
        else:
            left_out += 1
    if left_out > max_left_out * (len(kept) + left_out):
        raise DataError(
            f"{left_out} of {len(kept) + left_out} rows are longer than max_length={limit} tokens, "
            f"and their answers would be cut; raise max_length, or lower history or the budgets "
            f"(up to {max_left_out:.0%} may be left out: max_left_out)"
        )
    return kept, left_out


def context_length(prompt: Sequence[int], opening: Sequence[int]) -> int:
    """How many tokens precede the task's turn: up to the last place where `opening` stands, as
    PEFT finds where an activated LoRA begins."""
    if (at := opening_of(prompt, opening)) < 0:
        raise DataError("a prompt without the tokens that open its task")
    return at


def _key(target: Review) -> tuple[str, str, float]:
    return target.user_id, target.item_id, float(target.timestamp)

"""The loop that one would write first, to measure ours against: a row at a time, no batching.

For each pair it scans a pandas frame for both histories, writes the rationale with transformers'
`generate` at batch 1, and rates in a separate forward pass over the whole prompt. Model, adapters
(through PEFT, as it is), prompts, summaries and decoding are ours, so that only the way differs.
It is no straw man: summaries come out of a dictionary, and the logits are computed at the last
position alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
)

from r4r_graph.experts import (
    NO_REPEAT,
    Experts,
    predictor_prompt,
    reasoner_prompt,
    whole_sentences,
)
from r4r_graph.graph.outcome import evidence_of
from r4r_graph.graph.recall import recall
from r4r_graph.graph.state import Knobs
from r4r_graph.ratings import RatingStats
from r4r_graph.schema import Item, Pair, Review


class FrameReviews:
    """A review source that scans a frame for each question.

    Args:
        reviews: all reviews, in any order.
        items: the catalogue.
    """

    def __init__(self, reviews: list[Review], items: Mapping[str, Item]) -> None:
        self._frame = pandas.DataFrame([review.to_dict() for review in reviews])
        self._items = dict(items)

    def _earlier(self, column: str, value: str, before: float) -> pandas.DataFrame:
        frame = self._frame
        return frame[(frame[column] == value) & (frame.timestamp < before)]

    @staticmethod
    def _latest(frame: pandas.DataFrame, limit: int) -> list[Review]:
        if not limit:
            return []
        rows = frame.sort_values("timestamp", kind="stable").tail(limit)
        return [Review.from_dict(row) for row in rows.to_dict("records")]

    @staticmethod
    def _stats(frame: pandas.DataFrame) -> RatingStats:
        return RatingStats.of(frame.rating.tolist())

    def user_history(
        self, user_id: str, before: float, limit: int, *, without_item: str | None = None
    ) -> list[Review]:
        found = self._earlier("user_id", user_id, before)
        return self._latest(found[found.item_id != without_item], limit)

    def item_history(
        self, item_id: str, before: float, limit: int, *, without_user: str | None = None
    ) -> list[Review]:
        found = self._earlier("item_id", item_id, before)
        return self._latest(found[found.user_id != without_user], limit)

    def user_stats(
        self, user_id: str, before: float, *, without_item: str | None = None
    ) -> RatingStats:
        found = self._earlier("user_id", user_id, before)
        return self._stats(found[found.item_id != without_item])

    def item_stats(
        self, item_id: str, before: float, *, without_user: str | None = None
    ) -> RatingStats:
        found = self._earlier("item_id", item_id, before)
        return self._stats(found[found.user_id != without_user])

    def overall_stats(
        self, before: float, *, without_pair: tuple[str, str] | None = None
    ) -> RatingStats:
        frame = self._frame[self._frame.timestamp < before]
        if without_pair is not None:
            user_id, item_id = without_pair
            frame = frame[(frame.user_id != user_id) | (frame.item_id != item_id)]
        ratings = frame.rating
        return RatingStats.from_sums(len(ratings), float(ratings.sum()), float((ratings**2).sum()))

    def knows_user(self, user_id: str) -> bool:
        return bool((self._frame.user_id == user_id).any())

    def knows_item(self, item_id: str) -> bool:
        return item_id in self._items or bool((self._frame.item_id == item_id).any())

    def item(self, item_id: str, before: float | None) -> Item:
        entry = self._items.get(item_id, Item(item_id))
        if entry.title:
            return entry
        frame = self._frame
        rows = frame[(frame.item_id == item_id) & (frame.title != "")]
        earlier = rows if before is None else rows[rows.timestamp < before]
        rows = (rows if earlier.empty else earlier).sort_values("timestamp", kind="stable")
        title = "" if rows.empty else str(rows.title.iloc[-1])
        return Item(item_id, title, entry.category, entry.description)


class _AnswerRepeats(LogitsProcessor):  # type: ignore[misc]
    """Our rule against repeats, which looks at the answer alone."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._rule = NoRepeatNGramLogitsProcessor(NO_REPEAT)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return self._rule(input_ids[:, self._width :], scores)


class PlainLoop:
    """Rates pairs one after the other.

    Args:
        experts: whose prompts, budgets and tokenizer are used; its engine answers nothing here.
        reviews: the frame.
        summaries: an aspect summary by review key, all that is needed.
        base: the base model's folder.
        adapters: expert name to PEFT folder.
        device, dtype: as the engine's.
        history: latest reviews read on each side.
    """

    def __init__(
        self,
        experts: Experts,
        reviews: FrameReviews,
        summaries: Mapping[str, Any],
        base: Path,
        adapters: Mapping[str, Path],
        device: str,
        dtype: str,
        history: int,
    ) -> None:
        from transformers import AutoModelForCausalLM

        engine: Any = experts.engine
        self._experts = experts
        self._reviews = reviews
        self._summaries = summaries
        self._knobs = Knobs(history=history)
        self._meter = engine.meter
        self._readout = engine._backend._readout(experts.scale)
        self._tokenizer = engine._backend._tokenizer
        self._adapters = set(adapters)
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        model = model.to(device).eval()
        ends = model.generation_config.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends)
        self._config = GenerationConfig(
            max_new_tokens=experts.budgets.rationale,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        model.generation_config = GenerationConfig()
        for name, path in adapters.items():
            model = _with_adapter(model, name, path)
        self._model = model

    @contextlib.contextmanager
    def _as(self, expert: str) -> Iterator[None]:
        if not self._adapters:
            yield
        elif expert in self._adapters:
            self._model.set_adapter(expert)
            yield
        else:
            with self._model.disable_adapter():
                yield

    def rate(self, pair: Pair) -> tuple[str, float]:
        """The rationale and the mean rating."""
        state: Any = {"user_id": pair.user_id, "item_id": pair.item_id, "as_of": pair.as_of}
        state |= recall(state, self._knobs, self._reviews, self._experts.scale)
        state["summaries"] = self._summaries
        evidence, _ = self._experts.fit(evidence_of(state))
        with torch.inference_mode():
            ids = self._ids(reasoner_prompt(evidence, self._meter))
            with self._as("reasoner"):
                output = self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=self._config,
                    logits_processor=LogitsProcessorList([_AnswerRepeats(ids.shape[1])]),
                )
            text = self._tokenizer.decode(
                output[0, ids.shape[1] :],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            ).strip()
            if output[0, -1].item() not in self._ends:
                text = whole_sentences(text)
            prompt = predictor_prompt(
                evidence, text, self._experts.scale, self._meter, self._experts.budgets
            )
            ids = self._ids(prompt)
            with self._as("predictor"):
                logits = self._model(input_ids=ids, logits_to_keep=1, use_cache=False).logits
            read = {(): torch.log_softmax(logits[0, -1].float(), dim=-1).cpu()}
            return text, self._readout.read(read).mean

    def _ids(self, messages: Any) -> Any:
        return torch.tensor([self._meter.prompt(messages)], device=self._model.device)


def _with_adapter(model: Any, name: str, path: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(model, PeftModel):
            model.load_adapter(str(path), name)
            return model
        return PeftModel.from_pretrained(model, str(path), adapter_name=name).eval()


def summaries_of(experts: Experts, source: Any, pairs: list[Pair], history: int) -> dict[str, Any]:
    """The summaries that these pairs need, by review key, all asked for at once."""
    wanted: dict[str, tuple[Review, str]] = {}
    for pair in pairs:
        state: Any = asdict(pair)
        update = recall(state, Knobs(history=history), source, experts.scale)
        for entry in (*update["user_reviews"], *update["item_reviews"]):
            review = Review.from_dict(entry["review"])
            if review.text.strip():
                wanted[entry["key"]] = review, entry["kind"]

    async def make() -> list[Any]:
        return await asyncio.gather(
            *(experts.summarizer.asummarize(review, kind) for review, kind in wanted.values())
        )

    made = asyncio.run(make())
    return {key: each.summary.to_dict() for key, each in zip(wanted, made, strict=True)}

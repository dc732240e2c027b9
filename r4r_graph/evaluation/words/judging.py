"""A chat model as judge: how well does a rationale foretell the review that was written later?

    judge = chat_judge("openai:gpt-4o-mini", folder=Path("judge"))
    score_texts(judge, rationales, later_reviews)

The paper's GPTScore. The judge reads both texts and answers with a whole number from 0 to 100; an
answer that is anything else is no score, however friendly it reads. Every answer that was paid for
is kept the moment it arrives and never asked for again.
"""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_core.language_models import BaseChatModel

from r4r_graph import prompts
from r4r_graph.answers import Answer, AnswersFile
from r4r_graph.chat_models import (
    answer_in,
    chat_turns,
    model_identity,
    named_identity,
    open_chat_model,
    public,
    reason_of,
    refusal,
    tries,
)
from r4r_graph.engine.base import Message
from r4r_graph.errors import ModelError, SettingError
from r4r_graph.evaluation.words.likeness import TextScorer

PROMPT = "judge_rationale"

MOST_CHARACTERS = 12_000
"""Of a text that the judge reads; the rest is cut off."""

_ANSWER_TOKENS = 1024  # a number takes three; a model that thinks first takes the rest
_FAILED_ROWS = 25  # so many in a row, and it is not the rows
_SCORE = re.compile(r"\s*(100|[1-9]?[0-9])\.?\s*")


def chat_judge(
    model: BaseChatModel | str,
    *,
    base_url: str | None = None,
    folder: Path | None = None,
    concurrency: int = 8,
    attempts: int = 3,
) -> TextScorer:
    """A chat model as `TextScorer`: texts are rationales, references the later reviews, figures
    from 0 to 1.

    A row whose answers are no scores, or whose calls fail, has no figure. Longer texts than
    `MOST_CHARACTERS` are cut.

    Args:
        model: LangChain's `provider:model`, or with `base_url` the name of a model there; asked
            greedily first, then at temperature 1. Or a chat model, asked as it is set up; it
            should not retry by itself.
        base_url: an OpenAI-compatible server. A provider's key comes from the environment; a
            server is asked without one where there is none.
        folder: keeps the answers, in `answers.sqlite` (mode 0600; the questions only as digests);
            whoever calls again with it pays for what is missing alone. Answers of other judges, or
            to another version of the prompt, are kept beside. None keeps them nowhere.
        concurrency: calls at a time.
        attempts: answers to a row at most, until one is a score; and tries of each call.

    Raises:
        SettingError: the model's name names no provider, or a setting is out of range.
        MissingExtraError: LangChain or its OpenAI package is not installed.
        ModelError: the model cannot be opened: another provider's package or key is missing. When
            scoring: the key is refused, there is no server, or so many rows fail one after the
            other that it is not the rows. What was answered until then is kept.
    """
    if concurrency < 1 or attempts < 1:
        raise SettingError(f"bad judge: concurrency={concurrency}, attempts={attempts}")
    if not isinstance(model, str):
        if base_url is not None:
            raise SettingError("base_url is for a judge that is named, not for a chat model")
        return _Judge(model, model_identity(model), {}, "the judge", folder, concurrency, attempts)
    settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": _ANSWER_TOKENS}
    identity = named_identity(model, base_url) | settings
    if base_url is not None:
        # Such servers may know this one alone; the OpenAI client would rename it.
        settings["extra_body"] = {"max_tokens": settings.pop("max_tokens")}
    opened = open_chat_model(model, base_url, role="judge", **settings)
    again = {"temperature": 1.0}  # a greedy model would repeat itself
    who = f"the judge {public(model)}"
    return _Judge(opened, identity, again, who, folder, concurrency, attempts)


def judge_prompt(rationale: str, review: str) -> tuple[Message, ...]:
    """The turns that ask a judge."""
    texts = {"rationale": rationale, "review": review}
    inputs = {
        name: textwrap.shorten(text, MOST_CHARACTERS, placeholder=" …")
        for name, text in texts.items()
    }
    turns = prompts.render(PROMPT, inputs)
    return (
        Message("system", turns.system),
        Message("user", turns.context),
        Message("user", turns.task),
    )


def read_score(answer: str) -> float | None:
    """A judge's answer as a figure from 0 to 1: a whole number from 0 to 100, alone or with a full
    stop. None for anything else."""
    match = _SCORE.fullmatch(answer)
    return None if match is None else int(match[1]) / 100


@dataclass(frozen=True, slots=True)
class _Judge:
    model: BaseChatModel
    identity: Mapping[str, Any]
    again: Mapping[str, Any]
    """Settings of the second and later answers to a row."""
    who: str
    folder: Path | None
    concurrency: int
    attempts: int
    name: str = "judge"

    def score(self, texts: Sequence[str], references: Sequence[str]) -> list[float | None]:
        """See `TextScorer`."""
        pairs = list(zip(texts, references, strict=True))
        file = None if self.folder is None else AnswersFile(self.folder / "answers.sqlite", "judge")
        run = _Run(self, file)
        # Threads, not tasks: what is under way when the run ends is still kept.
        with (
            closing(file) if file is not None else nullcontext(),
            ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge") as pool,
        ):
            asked = {pair: pool.submit(run.judged, *pair) for pair in dict.fromkeys(pairs)}
            try:
                for future in as_completed(asked.values()):
                    future.result()
            except BaseException:
                run.stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
        return [asked[pair].result() for pair in pairs]


class _RowFailed(Exception):
    """The judge cannot be asked about this row."""


class _Run:
    """One call of `score`: what its threads share."""

    def __init__(self, judge: _Judge, file: AnswersFile | None) -> None:
        self.stopped = threading.Event()
        self._judge = judge
        self._file = file
        self._lock = threading.Lock()
        self._answered = False
        self._failed_rows = 0

    def judged(self, rationale: str, review: str) -> float | None:
        """A row's figure, or None where it has failed. Any error ends the run."""
        messages, reason = judge_prompt(rationale, review), ""
        try:
            for draw in range(self._judge.attempts):
                text = self._answer(messages, draw).text
                if (score := read_score(text)) is not None:
                    with self._lock:
                        self._failed_rows = 0
                    return score
                reason = public(f"its answer {text[:60]!r} is no whole number from 0 to 100")
        except _RowFailed as failure:
            reason = str(failure)
        with self._lock:
            self._failed_rows += 1
            if self._failed_rows >= _FAILED_ROWS:
                raise ModelError(
                    f"{self._judge.who} failed on {_FAILED_ROWS} rows one after the other, "
                    f"lastly: {reason}"
                )
        return None

    def _answer(self, messages: Sequence[Message], draw: int) -> Answer:
        """The answer to a prompt, from the file if it is there; kept before it is handed on."""
        turns = [[message.role, message.content] for message in messages]
        facts = [dict(self._judge.identity), turns, draw]
        key = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
        kept = None if self._file is None else self._file.get(key)
        answer = kept or self._called(messages, self._judge.again if draw else {})
        if self._file is not None and kept is None:
            self._file.put(key, answer)
        self._answered = True
        return answer

    def _called(self, messages: Sequence[Message], settings: Mapping[str, Any]) -> Answer:
        """The answer to a call, retried."""
        judge, turns = self._judge, chat_turns(messages, joined=True)

        def call() -> Answer:
            if self.stopped.is_set():
                raise ModelError(f"{judge.who} was stopped")
            return answer_in(judge.model.invoke(turns, **settings), messages)

        try:
            return tries(judge.attempts, self.stopped)(call)
        except ModelError:
            raise
        except Exception as error:  # every provider has errors of its own
            why = refusal(error, judge.who, answered=self._answered, attempts=judge.attempts)
            raise _RowFailed(reason_of(error)) if why is None else ModelError(why) from None

"""Asking a teacher: several calls at a time, with retries, and each answer paid for once.

    with open_teacher(recipe, Path("answers.sqlite")) as teacher:
        answer = await teacher.ask(messages)

A run that stops, however it stops, asks again only for what it never got.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from langchain_core.language_models import BaseChatModel

from finetune.settings import Recipe, TeacherSettings
from finetune.teacher.answers import TokenBudget, TokensSpent
from finetune.teacher.providers import (
    ENGINE,
    engine_identity,
    provider_identity,
    provider_model,
)
from r4r_graph.answers import Answer, AnswersFile
from r4r_graph.chat_models import (
    answer_in,
    chat_turns,
    most_prompt_tokens,
    reason_of,
    refusal,
    tries,
)
from r4r_graph.engine.base import Engine, Message
from r4r_graph.engine.chat import EngineChatModel
from r4r_graph.errors import AnswerError, SettingError, TeacherError

_SETTINGS = ("temperature", "max_tokens", "top_p", "stop", "format")
_ANSWER_TOKENS = 512
_FAILED_ROWS = 25  # so many in a row, and it is not the rows


class Teacher:
    """Asks a chat model, and keeps what it answers.

    The calls run on `settings.concurrency` threads of its own: an answer that is under way when
    its job ends is still kept, and a chat model's connections need not fit one event loop. `close`
    waits for such answers.
    """

    def __init__(
        self,
        model: BaseChatModel,
        settings: TeacherSettings,
        answers: Path,
        *,
        owned: Engine | None = None,
    ) -> None:
        """Open the file of answers.

        Args:
            model: whom to ask. It should not retry by itself.
            settings: temperature, concurrency, attempts and token limit.
            answers: an SQLite file (mode 0600), made on demand. It holds answers and token
                counts; the questions only as digests.
            owned: an engine to close with the teacher.

        Raises:
            SettingError: a setting is out of range, or the file cannot be used.
        """
        if settings.concurrency < 1 or settings.attempts < 1 or settings.temperature < 0:
            raise SettingError(
                f"bad teacher settings: concurrency={settings.concurrency}, "
                f"attempts={settings.attempts}, temperature={settings.temperature:g}"
            )
        self._model = model
        self._settings = settings
        self._owned = owned
        self._answers = AnswersFile(answers, "teacher", failure=TeacherError)
        self._budget = TokenBudget(settings.token_limit, self._answers.tokens())
        self._pool = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="teacher")
        self._lock = threading.RLock()
        self._flights: dict[str, Future[Answer]] = {}
        self._failed_rows = 0
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def identity(self) -> dict[str, Any]:
        """Who answers, without any secret: for manifests and as part of each answer's key."""
        if isinstance(self._model, EngineChatModel):
            info = self._model.engine.info
            return engine_identity(info.base, info.digest, self._model.adapter)
        return provider_identity(self._settings)

    @property
    def engine(self) -> Engine | None:
        """What answers, where that is an engine of ours."""
        return self._model.engine if isinstance(self._model, EngineChatModel) else None

    @property
    def spent(self) -> TokensSpent:
        """What it has cost so far."""
        return self._budget.spent

    async def ask(
        self, messages: Sequence[Message], *, draw: int = 0, **call_settings: Any
    ) -> Answer:
        """The answer to a prompt, from the file if it is there.

        Args:
            messages: the prompt.
            draw: number of the answer, where several to one prompt are wanted.
            **call_settings: temperature, max_tokens (512), top_p, stop; and `format`, which an
                engine enforces and other models ignore.

        Raises:
            AnswerError: this prompt keeps failing; others may succeed.
            TeacherError: nothing can be asked any more: the token limit, a refused key, no
                server, or so many failures one after the other that it is not the prompts.
        """
        settings: dict[str, Any] = {
            "temperature": self._settings.temperature,
            "max_tokens": _ANSWER_TOKENS,
        }
        settings |= {name: value for name, value in call_settings.items() if value is not None}
        if unknown := sorted(set(settings) - set(_SETTINGS)):
            raise SettingError(f"unknown settings for a teacher's call: {', '.join(unknown)}")
        asks_engine = isinstance(self._model, EngineChatModel)
        if not asks_engine:
            settings.pop("format", None)
        turns = [[message.role, message.content] for message in messages]
        facts = [self.identity, turns, draw, sorted(settings.items())]
        key = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
        if asks_engine:
            settings["seed"] = int(key[:8], 16)
        elif self._settings.base_url is not None:
            # Such servers may know this one alone; the OpenAI client would rename it.
            settings["extra_body"] = {"max_tokens": settings.pop("max_tokens")}
        while True:
            flight, leads = self._board(key, messages, settings)
            try:
                answer = await asyncio.wrap_future(flight)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if flight.cancelled() and task is not None and not task.cancelling():
                    continue  # another caller gave it up before it began
                raise
            return answer if leads else replace(answer, reused=True)

    def close(self) -> None:
        """Wait for the answers under way, and close the file."""
        self._closed.set()
        self._budget.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._answers.close()
        if self._owned is not None:
            self._owned.close()

    def _board(
        self, key: str, messages: Sequence[Message], settings: dict[str, Any]
    ) -> tuple[Future[Answer], bool]:
        """The call that answers `key`, and whether it is a new one."""
        with self._lock:
            if self._closed.is_set():
                raise TeacherError("the teacher is closed")
            if key in self._flights:
                return self._flights[key], False
            flight = self._pool.submit(self._answer, key, messages, settings)
            self._flights[key] = flight
            flight.add_done_callback(lambda _: self._land(key))
            return flight, True

    def _land(self, key: str) -> None:
        with self._lock:
            self._flights.pop(key, None)

    # On the pool's threads --------------------------------------------------------------------

    def _answer(self, key: str, messages: Sequence[Message], settings: dict[str, Any]) -> Answer:
        if (kept := self._answers.get(key)) is not None:
            self._budget.count_reused()
            return kept
        try:
            answer = self._called(key, messages, settings)
        except TeacherError:
            raise
        except Exception as error:
            raise self._failed(error) from None
        with self._lock:
            self._failed_rows = 0
        return answer

    def _called(self, key: str, messages: Sequence[Message], settings: dict[str, Any]) -> Answer:
        """The answer to a call, retried; kept before it is handed on."""
        turns = chat_turns(messages, joined=not isinstance(self._model, EngineChatModel))
        most = most_prompt_tokens(messages) + int(
            (settings | settings.get("extra_body", {}))["max_tokens"]
        )
        for attempt in tries(self._settings.attempts, self._closed):
            with attempt, self._budget.reserved(most) as bill:
                answer = answer_in(self._model.invoke(turns, **settings), messages)
                bill.append(answer)
                self._answers.put(key, answer)
        return answer

    def _failed(self, error: Exception) -> TeacherError:
        """What to raise for a call that failed for good."""
        reason, who = reason_of(error), f"the teacher {self._settings.model}"
        why = refusal(
            error,
            who,
            answered=self._budget.spent.calls > 0,
            attempts=self._settings.attempts,
            section="teacher.",
        )
        if why is not None:
            return TeacherError(why)
        with self._lock:
            self._failed_rows += 1
            if self._failed_rows >= _FAILED_ROWS:
                return TeacherError(
                    f"{who} failed on {_FAILED_ROWS} rows one after the other, lastly: {reason}"
                )
        return AnswerError(reason)


def open_teacher(recipe: Recipe, answers: Path, engine: Engine | None = None) -> Teacher:
    """The teacher that the recipe names; the caller closes it.

    Args:
        recipe: its section `teacher` says whom to ask. A provider's key comes from the
            environment; an OpenAI-compatible server (`base_url`) is asked without one where there
            is none.
        answers: see `Teacher`.
        engine: answers where `teacher.model` is `engine`; None loads the recipe's base model.

    Raises:
        SettingError: `teacher.model` names nobody, or see `Teacher`.
        MissingExtraError: LangChain or its OpenAI package is not installed.
        TeacherError: the model cannot be opened: another provider's package or key is missing.
        ModelError: the base model cannot be loaded.
    """
    settings = recipe.teacher
    if settings.model != ENGINE:
        return Teacher(provider_model(settings), settings, answers)
    if settings.base_url is not None:
        raise SettingError("teacher.base_url needs the name of a model in teacher.model")
    owned = None
    if engine is None:
        from r4r_graph.engine.adapters import NONE
        from r4r_graph.engine.local import load_local_engine

        engine = owned = load_local_engine(
            recipe.base,
            NONE,
            device=recipe.device,
            dtype=recipe.dtype,
            quantize_4bit=recipe.quantize_4bit,
        )[0]
    try:
        return Teacher(EngineChatModel(engine=engine), settings, answers, owned=owned)
    except BaseException:
        if owned is not None:
            owned.close()
        raise


def teacher_identity(recipe: Recipe, engine: Engine | None = None) -> dict[str, Any]:
    """The `Teacher.identity` of the teacher that `open_teacher` would open; opens nothing.

    Raises:
        ModelError: our own base model is to answer, and it is not there.
    """
    if recipe.teacher.model != ENGINE:
        return provider_identity(recipe.teacher)
    if engine is not None:
        return engine_identity(engine.info.base, engine.info.digest, None)
    from r4r_graph.engine.weights import find_base

    base = find_base(recipe.base)
    return engine_identity(base.name, base.digest, None)

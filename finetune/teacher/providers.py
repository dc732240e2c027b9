"""Chat models of any provider: opening one, a call's question and answer, and its errors.

LangChain makes providers alike but for their errors; those are told apart by HTTP status.
"""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import Sequence
from typing import Any

import tenacity
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from finetune.settings import TeacherSettings
from finetune.teacher.answers import Answer
from r4r_graph.engine.base import Message
from r4r_graph.errors import (
    EngineError,
    MissingExtraError,
    SettingError,
    TeacherError,
    is_retryable,
)

ENGINE = "engine"
"""`teacher.model` that stands for our own base model."""

_CALL_SECONDS = 120.0
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
_PASSING = frozenset({408, 409, 425, 429})  # HTTP statuses that a later try may not meet
_OVERHEAD = 128  # tokens that a chat template may add to a prompt


def provider_model(settings: TeacherSettings) -> BaseChatModel:
    """The chat model that the settings name; see `finetune.teacher.asking.open_teacher`."""
    provider, colon, name = settings.model.partition(":")
    options: dict[str, Any] = {"max_retries": 0, "timeout": _CALL_SECONDS}  # retries are ours
    if settings.base_url is not None:
        if not (colon and provider == "openai"):
            name = settings.model
        provider = "openai"
        options |= {"base_url": settings.base_url, "use_responses_api": False}
        if not os.environ.get("OPENAI_API_KEY"):
            options["api_key"] = "none"
    elif not (provider and colon and name):
        raise SettingError(
            f"bad setting teacher.model={settings.model!r}: write provider:model, such as "
            f"openai:gpt-4o-mini, or {ENGINE}; or give the base_url of a server"
        )
    try:
        from langchain.chat_models import init_chat_model
    except ImportError:
        raise MissingExtraError("a teacher other than our own base model", "teacher") from None
    failure = f"cannot open the teacher {settings.model}"
    try:
        model: BaseChatModel = init_chat_model(name, model_provider=provider, **options)
    except ImportError as error:
        if provider == "openai":
            raise MissingExtraError(f"the teacher {settings.model}", "teacher") from None
        raise TeacherError(f"{failure}: {reason_of(error)}") from None
    except Exception as error:  # every provider has errors of its own
        raise TeacherError(f"{failure}: {reason_of(error)}") from None
    return model


def engine_identity(base: str, digest: str, adapter: str | None) -> dict[str, Any]:
    """What makes an engine the same teacher."""
    return {"base": base, "digest": digest, "adapter": adapter}


def provider_identity(settings: TeacherSettings) -> dict[str, Any]:
    """What makes a provider's model the same teacher."""
    url = settings.base_url
    return {"model": settings.model, "base_url": None if url is None else public(url)}


def chat_turns(messages: Sequence[Message], *, joined: bool) -> list[BaseMessage]:
    """The prompt for a chat model; `joined` makes neighbouring turns of one role one, as many
    providers demand."""
    makes = {"system": SystemMessage, "user": HumanMessage, "assistant": AIMessage}
    turns: list[tuple[str, str]] = []
    for message in messages:
        if joined and turns and turns[-1][0] == message.role:
            turns[-1] = message.role, f"{turns[-1][1]}\n\n{message.content}"
        else:
            turns.append((message.role, message.content))
    return [makes[role](content) for role, content in turns]


def most_prompt_tokens(messages: Sequence[Message]) -> int:
    """Tokens of a prompt at most: no tokenizer makes more than one of a byte."""
    return sum(len(message.content.encode()) for message in messages) + _OVERHEAD


def answer_in(message: AIMessage, messages: Sequence[Message]) -> Answer:
    """A server that does not say what a call took is taken to have charged the most."""
    text = str(message.text)
    usage = message.usage_metadata
    if usage is None:
        return Answer(text, most_prompt_tokens(messages), len(text.encode()), reused=False)
    return Answer(text, usage["input_tokens"], usage["output_tokens"], reused=False)


def pause(state: tenacity.RetryCallState) -> float:
    """Seconds before the next try: doubled each time, with jitter, and at least what was asked."""
    error = state.outcome.exception() if state.outcome is not None else None
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        asked = float(headers.get("retry-after", 0))
    except (TypeError, ValueError, AttributeError):
        asked = 0.0
    doubled = min(_FIRST_PAUSE * 2.0 ** (state.attempt_number - 1), _LONGEST_PAUSE)
    return max(min(asked, 2 * _LONGEST_PAUSE), doubled + random.uniform(0, _FIRST_PAUSE))


def http_status(error: BaseException) -> int | None:
    """The HTTP status in a provider's error."""
    for holder in (error, getattr(error, "response", None)):
        status = getattr(holder, "status_code", None)
        if isinstance(status, int) and status >= 400:  # an answer that is no such has a 200
            return status
    return None


def may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    if isinstance(error, TeacherError) or not isinstance(error, Exception):
        return False
    if isinstance(error, EngineError):
        return is_retryable(error)
    if (status := http_status(error)) is None:
        return True  # no answer in time, a connection lost, an answer that is no such
    return (status in _PASSING or status >= 500) and "insufficient_quota" not in str(error)


def unreachable(error: BaseException | None) -> bool:
    """Whether nobody listens at the address."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError | socket.gaierror):
            return True
        error = error.__cause__ or error.__context__
    return False


def reason_of(error: BaseException) -> str:
    """An error in a line, without secrets."""
    lines = str(error).strip().splitlines()
    return public(f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}")[:300]


def public(text: str) -> str:
    """`text` without passwords in addresses and without the values of secret variables."""
    text = re.sub(r"(://)[^/@\s]+@", r"\1", text)
    text = re.sub(r"(://[^\s?]+)\?\S+", r"\1", text)
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search(r"KEY|TOKEN|SECRET|PASSWORD", name, re.I):
            text = text.replace(value, "***")
    return text

"""Chat models of any provider: opening one, a call's question and answer, and its errors.

LangChain makes providers alike but for their errors; those are told apart by HTTP status.
"""

from __future__ import annotations

import os
import random
import re
import socket
import threading
from collections.abc import Sequence
from typing import Any

import tenacity
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from r4r_graph.answers import Answer
from r4r_graph.engine.base import Message
from r4r_graph.errors import MissingExtraError, ModelError, R4RError, SettingError, is_retryable

_CALL_SECONDS = 120.0
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
_PASSING = frozenset({408, 409, 425, 429})  # HTTP statuses that a later try may not meet
_OVERHEAD = 128  # tokens that a chat template may add to a prompt


# Who is asked -----------------------------------------------------------------------------------


def open_chat_model(
    name: str, base_url: str | None = None, *, role: str, **settings: Any
) -> BaseChatModel:
    """The chat model of that name; it does not retry by itself.

    Args:
        name: LangChain's `provider:model`; with `base_url` the model's name alone will do. The
            provider's key comes from the environment.
        base_url: an OpenAI-compatible server; asked without a key where there is none.
        role: what it is to be, such as `teacher`, for messages.
        **settings: of all its calls, such as temperature; LangChain leaves out what it knows that
            a model refuses.

    Raises:
        SettingError: the name names no provider.
        MissingExtraError: LangChain or its OpenAI package is not installed.
        ModelError: it cannot be opened: another provider's package or key is missing.
    """
    provider, colon, model_name = name.partition(":")
    options = settings | {"max_retries": 0, "timeout": _CALL_SECONDS}  # retries are ours
    if base_url is not None:
        if not (colon and provider == "openai"):
            model_name = name
        provider = "openai"
        options |= {"base_url": base_url, "use_responses_api": False}
        if not os.environ.get("OPENAI_API_KEY"):
            options["api_key"] = "none"
    elif not (provider and colon and model_name):
        raise SettingError(
            f"bad {role} {name!r}: write provider:model, such as openai:gpt-4o-mini, or give the "
            "base_url of a server"
        )
    try:
        from langchain.chat_models import init_chat_model
    except ImportError:
        raise MissingExtraError(f"the {role} {name}", "teacher") from None
    failure = f"cannot open the {role} {name}"
    try:
        model: BaseChatModel = init_chat_model(model_name, model_provider=provider, **options)
    except ImportError as error:
        if provider == "openai":
            raise MissingExtraError(f"the {role} {name}", "teacher") from None
        raise ModelError(f"{failure}: {reason_of(error)}") from None
    except Exception as error:  # every provider has errors of its own
        raise ModelError(f"{failure}: {reason_of(error)}") from None
    return model


def named_identity(name: str, base_url: str | None) -> dict[str, Any]:
    """What makes a model opened by name the same one, without any secret."""
    return {"model": name, "base_url": None if base_url is None else public(base_url)}


def model_identity(model: BaseChatModel) -> dict[str, Any]:
    """What makes a chat model the same one: its type, and what it says of itself in plain values,
    such as its name and settings. Other values may hold secrets, or differ from run to run."""
    said = model._identifying_params
    plain = {name: said[name] for name in said if isinstance(said[name], str | int | float)}
    return {"type": model._llm_type} | plain


# A call -----------------------------------------------------------------------------------------


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


def tries(most: int, stopped: threading.Event) -> tenacity.Retrying:
    """Tries of one call, `most` of them, as long as a later one may succeed; the last error is
    raised. Once `stopped`, no pause is waited for."""
    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(most),
        wait=pause,
        retry=tenacity.retry_if_exception(may_pass),
        sleep=tenacity.sleep_using_event(stopped),
        reraise=True,
    )


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


# Its errors -------------------------------------------------------------------------------------


def http_status(error: BaseException) -> int | None:
    """The HTTP status in a provider's error."""
    for holder in (error, getattr(error, "response", None)):
        status = getattr(holder, "status_code", None)
        if isinstance(status, int) and status >= 400:  # an answer that is no such has a 200
            return status
    return None


def may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    if isinstance(error, R4RError) or not isinstance(error, Exception):
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


def refusal(
    error: BaseException, who: str, *, answered: bool, attempts: int, section: str = ""
) -> str | None:
    """Why no other question would be answered either, and the way out; None where this error may
    be of its question alone.

    Args:
        error: of a call that failed for good.
        who: names the model, as `the teacher gpt-4o-mini`.
        answered: whether it has answered before; then a key that is no good is not the reason.
        attempts: tries that the call had.
        section: what stands before the names of the settings `concurrency` and `attempts`.
    """
    status, reason = http_status(error), reason_of(error)
    if status == 401 or (status == 403 and not answered):
        return (
            f"{who} refused the key (HTTP {status}); set the provider's key in the environment, "
            "such as OPENAI_API_KEY"
        )
    if status in (402, 404) or "insufficient_quota" in reason:
        return f"{who} cannot be used: {reason}"
    if status == 429:
        return (
            f"{who} is still over its rate limit after {attempts} tries: {reason}; lower "
            f"{section}concurrency or raise {section}attempts, and start again to continue"
        )
    if unreachable(error):
        return f"{who} cannot be reached: {reason}; start again to continue"
    return None


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

"""An engine over any LangChain chat model: a hosted one, another library's, your own.

    engine = chat_engine(ChatOpenAI(model="gpt-4o-mini"))
    recommender = Recommender.load("reviews.parquet", experts={"reasoner": engine})

What such a model does not do is made up for, and said:

- Summaries come from structured output where the model has it, else out of a text in the format;
  an answer that is neither is asked for again.
- Ratings come from log-probabilities where the model tells them, else from the shares of answers
  drawn several times (`RateResult.source`).
- Tokens are estimated, unless the model's tokenizer is given.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import cache
from typing import Any

import tenacity
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.runnables import RunnableConfig
from pydantic import BaseModel

from r4r_graph.chat_models import (
    chat_turns,
    http_status,
    may_pass,
    model_identity,
    pause,
    public,
    reason_of,
)
from r4r_graph.engine import aspects
from r4r_graph.engine.base import (
    EngineInfo,
    GenerateRequest,
    GenerateResult,
    Message,
    RateRequest,
    RateResult,
    TokenMeter,
    check_decoding,
)
from r4r_graph.engine.chat_answers import (
    Aspects,
    parsed_json,
    rating_in,
    rating_schema,
    summary_in,
    weights_in,
)
from r4r_graph.engine.remote import LoopThread, RemoteEngine, Show
from r4r_graph.engine.server import digest_of
from r4r_graph.errors import (
    EngineBusyError,
    EngineFailure,
    R4RError,
    RequestError,
    SettingError,
)
from r4r_graph.ratings import RatingDistribution

_ALONE = RunnableConfig(callbacks=[])  # else its tokens would reach the stream of a graph as well
_BYTES_A_TOKEN = 3
_RATING_TOKENS = 8
_TOP = 20
_CONTROL = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>"),
    *("<s>", "</s>", "[INST]", "[/INST]"),
)


class EstimatedMeter:
    """Token arithmetic without a tokenizer: a token every three bytes of UTF-8.

    That is more than most tokenizers make of prose, so a prompt that fits here fits there.
    """

    special_tokens: tuple[str, ...] = _CONTROL

    def count(self, text: str) -> int:
        """Tokens in `text`."""
        return math.ceil(len(text.encode()) / _BYTES_A_TOKEN)

    def head(self, text: str, limit: int) -> str:
        """The longest beginning of `text` of at most `limit` tokens."""
        return text.encode()[: limit * _BYTES_A_TOKEN].decode(errors="ignore")


class ChatModelBackend:
    """Answers requests through a chat model.

    Args: see `chat_engine`.
    """

    def __init__(
        self,
        model: BaseChatModel,
        *,
        samples: int = 8,
        temperature: float = 1.0,
        attempts: int = 3,
        max_tokens: int = 8192,
        meter: TokenMeter | None = None,
        log_probs: bool | None = None,
    ) -> None:
        if samples < 1 or attempts < 1 or max_tokens < 1 or temperature < 0:
            raise SettingError(
                f"bad settings for a chat model: samples={samples}, attempts={attempts}, "
                f"max_tokens={max_tokens}, temperature={temperature}"
            )
        identity = model_identity(model)
        name = next((identity[n] for n in ("model_name", "model", "name") if n in identity), None)
        self.meter = meter or EstimatedMeter()
        self.info = EngineInfo(
            base=public(str(name or identity["type"])),
            digest=digest_of(identity)[:16],
            device="chat model",
            dtype="unknown",
            max_tokens=max_tokens,
        )
        self.unparsed = 0
        """Answers so far that were not in their format."""
        self._model = model
        self._samples = samples
        self._temperature = temperature
        self._attempts = attempts
        # Settings that the model has a field for can be given with a call.
        self._takes = frozenset(type(model).model_fields)
        self._tells = "logprobs" in self._takes if log_probs is None else log_probs
        self._structured = True

    async def close(self) -> None:
        """Nothing to free: the model is its owner's."""

    def fingerprint(self, request: GenerateRequest) -> str:
        """See `Engine.fingerprint`."""
        self._check(request)
        facts = {
            "messages": [[message.role, message.content] for message in request.messages],
            "model": self.info.digest,
            "grammar": aspects.GRAMMAR_VERSION if request.format == "aspects" else None,
            "max_tokens": request.max_tokens,
            "stop": request.stop,
            "sample": [request.temperature, request.top_p, request.seed]
            if request.temperature
            else None,
        }
        return digest_of(facts)

    # Texts -----------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest, show: Show | None) -> GenerateResult:
        """See `RemoteBackend.generate`."""
        self._check(request)
        check_decoding(request)
        if request.format == "aspects":
            result = await self._aspects(request)
            if show is not None:
                await show(result.text)
            return result
        turns = self._turns(request.messages)
        settings = self._settings(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
        )
        if request.stop:
            settings["stop"] = list(request.stop)
        answer = await (
            self._asked(turns, settings) if show is None else self._streamed(turns, settings, show)
        )
        return self._result(str(answer.text), answer, request.messages)

    async def _streamed(
        self, turns: list[BaseMessage], settings: Mapping[str, Any], show: Show
    ) -> AIMessage:
        """An answer in pieces; what fails once it has begun is not tried again."""
        whole: AIMessageChunk | None = None
        async with aclosing(self._parts(turns, settings)) as parts:
            async for part in parts:
                if text := str(part.text):
                    await show(text)
                whole = part if whole is None else whole + part
        if whole is None:
            raise EngineFailure(f"the chat model {self.info.base} gave no answer")
        return whole

    async def _parts(
        self, turns: list[BaseMessage], settings: Mapping[str, Any]
    ) -> AsyncGenerator[AIMessageChunk]:
        try:
            async for part in self._model.astream(turns, _ALONE, **settings):
                yield part
        except Exception as error:
            raise self._failure(error) from error

    async def _aspects(self, request: GenerateRequest) -> GenerateResult:
        """An aspect summary; what is none is asked for again, with another seed."""
        turns = self._turns(request.messages)
        asked = written = 0
        for attempt in range(self._attempts):
            settings = self._settings(
                max_tokens=2 * request.max_tokens,  # JSON takes more than the format does
                temperature=request.temperature if attempt == 0 else self._temperature,
                seed=request.seed + attempt,
            )
            answer, found = await self._formatted(turns, settings, Aspects)
            result = self._result("", answer, request.messages)
            asked, written = asked + result.prompt_tokens, written + result.completion_tokens
            summary = summary_in(found, str(answer.text))
            if summary is not None:
                return GenerateResult(aspects.format_aspects(summary), asked, written, "stop")
            self.unparsed += 1
        raise EngineFailure(
            f"the chat model {self.info.base} left the summarizer's format {self._attempts} times"
        )

    # Ratings ---------------------------------------------------------------------------------

    async def rate(self, request: RateRequest) -> RateResult:
        """See `RemoteBackend.rate`."""
        self._check(request)
        labels = request.scale.labels
        # Where one label begins another one, the first token does not tell them apart.
        alone = not any(a != b and b.startswith(a) for a in labels for b in labels)
        if self._tells and alone and (told := await self._by_log_probs(request)) is not None:
            return told
        return await self._by_samples(request)

    async def _by_log_probs(self, request: RateRequest) -> RateResult | None:
        """Out of the likeliest tokens at the rating's place; None where the model tells none."""
        settings = self._settings(max_tokens=_RATING_TOKENS, temperature=0.0)
        answer = await self._asked(
            self._turns(request.messages), settings | {"logprobs": True, "top_logprobs": _TOP}
        )
        told = answer.response_metadata.get("logprobs")
        if not told or not told.get("content"):
            self._tells = False
            return None
        weights = weights_in(told["content"], request.scale)
        if weights is None:
            self.unparsed += 1
            return None
        mass = sum(weights)
        shares = tuple(weight / mass for weight in weights)
        result = self._result("", answer, request.messages)
        return RateResult(
            RatingDistribution(request.scale, shares, min(mass, 1.0)),
            result.prompt_tokens,
            "logprobs",
            result.completion_tokens,
        )

    async def _by_samples(self, request: RateRequest) -> RateResult:
        """The shares of answers drawn; `mass` is the share of answers that were ratings."""
        turns = self._turns(request.messages)
        schema = rating_schema(request.scale)

        async def draw(seed: int) -> tuple[AIMessage, int | None]:
            settings = self._settings(
                max_tokens=8 * _RATING_TOKENS, temperature=self._temperature, seed=seed
            )
            answer, found = await self._formatted(turns, settings, schema)
            return answer, rating_in(found, str(answer.text), request.scale)

        drawn = await asyncio.gather(*map(draw, range(self._samples)))
        rated = [place for _, place in drawn if place is not None]
        self.unparsed += len(drawn) - len(rated)
        if not rated:
            raise EngineFailure(
                f"the chat model {self.info.base} gave no rating of the scale in "
                f"{self._samples} answers"
            )
        shares = tuple(rated.count(i) / len(rated) for i in range(len(request.scale.values)))
        costs = [self._result("", answer, request.messages) for answer, _ in drawn]
        return RateResult(
            RatingDistribution(request.scale, shares, len(rated) / len(drawn)),
            sum(cost.prompt_tokens for cost in costs),
            "samples",
            sum(cost.completion_tokens for cost in costs),
        )

    # Calls -----------------------------------------------------------------------------------

    async def _asked(
        self, turns: list[BaseMessage], settings: Mapping[str, Any], model: Any = None
    ) -> Any:
        """A call's answer; tried again where a later try may succeed."""
        tries = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=pause,
            retry=tenacity.retry_if_exception(may_pass if model is None else _overloaded),
            reraise=True,
        )
        try:
            return await tries((model or self._model).ainvoke, turns, _ALONE, **settings)
        except Exception as error:
            if model is not None and not isinstance(error, R4RError) and http_status(error) is None:
                raise _UnstructuredError from error
            raise self._failure(error) from error

    async def _formatted(
        self, turns: list[BaseMessage], settings: Mapping[str, Any], schema: type[BaseModel]
    ) -> tuple[AIMessage, BaseModel | None]:
        """An answer, and what of the schema is in it. Some models raise an error of their own where
        an answer is not of the schema: then, too, it is looked for in a plain answer."""
        try:
            if not self._structured:
                raise _UnstructuredError
            model = self._model.model_copy(update=dict(settings))
            structured = model.with_structured_output(schema, include_raw=True)
            told = await self._asked(turns, {}, structured)
        except (NotImplementedError, _UnstructuredError) as error:
            # An error of parsing: the server behind the model does not know of schemas.
            self._structured = self._structured and not isinstance(error.__cause__, ValueError)
            answer = await self._asked(turns, settings)
            return answer, parsed_json(str(answer.text), schema)
        parsed = told["parsed"]
        return told["raw"], parsed if isinstance(parsed, BaseModel) else None

    def _settings(self, **wanted: Any) -> dict[str, Any]:
        """Those of a call's settings that the model takes."""
        return {name: value for name, value in wanted.items() if name in self._takes}

    def _check(self, request: GenerateRequest | RateRequest) -> None:
        if not request.messages:
            raise RequestError("a request without messages")
        if request.adapter is not None:
            raise RequestError(f"no adapter {request.adapter!r}: a chat model has none")
        size = sum(self.meter.count(message.content) for message in request.messages)
        if size > self.info.max_tokens:
            raise RequestError(
                f"a prompt of about {size} tokens exceeds {self.info.max_tokens}; shorten the "
                "history or the budgets"
            )

    @staticmethod
    def _turns(messages: Sequence[Message]) -> list[BaseMessage]:
        return chat_turns(messages, joined=True)

    def _result(self, text: str, answer: AIMessage, messages: Sequence[Message]) -> GenerateResult:
        """What an answer cost, estimated where the model does not say, and why it ended."""
        usage = answer.usage_metadata
        why = answer.response_metadata
        cut = {why.get("finish_reason"), why.get("stop_reason")} & {"length", "max_tokens"}
        asked = sum(self.meter.count(message.content) for message in messages)
        return GenerateResult(
            text=text,
            prompt_tokens=asked if usage is None else usage["input_tokens"],
            completion_tokens=self.meter.count(str(answer.text))
            if usage is None
            else usage["output_tokens"],
            finish="length" if cut else "stop",
        )

    def _failure(self, error: Exception) -> Exception:
        if isinstance(error, R4RError):
            return error
        message = f"the chat model {self.info.base} failed: {reason_of(error)}"
        return (EngineBusyError if http_status(error) == 429 else EngineFailure)(message)


def chat_engine(
    model: BaseChatModel,
    *,
    samples: int = 8,
    temperature: float = 1.0,
    attempts: int = 3,
    max_tokens: int | None = None,
    meter: TokenMeter | None = None,
    log_probs: bool | None = None,
    at_once: int = 16,
) -> RemoteEngine:
    """An engine over a chat model. The model stays yours: closing the engine leaves it open.

    Args:
        model: any LangChain chat model. Of a call's settings (`max_tokens`, `temperature`, `top_p`,
            `seed`) it is given those that its class has a field for.
        samples: answers drawn for one rating, where there are no log-probabilities.
        temperature: of those draws, and of a summary that is asked for again.
        attempts: tries of a call, and answers asked for until one is in its format.
        max_tokens: longest prompt; None: what the model says of itself, else 8192.
        meter: token arithmetic; None estimates (`EstimatedMeter`). With the model's tokenizer
            here: `HubTokenMeter(tokenizer)`.
        log_probs: whether to ask for log-probabilities; None: if its class has a field `logprobs`,
            until an answer comes without.
        at_once: calls in flight.

    Raises:
        SettingError: a setting out of range.
    """
    profile: Mapping[str, Any] = getattr(model, "profile", None) or {}
    backend = ChatModelBackend(
        model,
        samples=samples,
        temperature=temperature,
        attempts=attempts,
        max_tokens=max_tokens or profile.get("max_input_tokens") or 8192,
        meter=meter,
        log_probs=log_probs,
    )
    return RemoteEngine(backend, _loop(), at_once=at_once, shared=True)


@cache
def _loop() -> LoopThread:
    """One for all chat models of the process: a provider's connections, which models share, belong
    to the loop that opened them, and outlive an engine."""
    return LoopThread()


class _UnstructuredError(Exception):
    """A call for structured output came to nothing."""


def _overloaded(error: BaseException) -> bool:
    """Whether a later try may succeed, by the HTTP status."""
    return may_pass(error) and (isinstance(error, R4RError) or http_status(error) is not None)

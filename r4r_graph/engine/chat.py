"""The engine as a LangChain chat model: invoke, stream, batch, their async twins, token usage.

Inside a graph this is what makes `stream_mode="messages"` carry the rationale's tokens.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, get_args

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import ConfigDict, Field

from r4r_graph.engine.base import (
    Engine,
    GenerateRequest,
    GenerateResult,
    Message,
    OutputFormat,
    Role,
)
from r4r_graph.errors import RequestError
from r4r_graph.time_limits import check, in_time, time_left

_ROLES: dict[str, Role] = {"system": "system", "human": "user", "ai": "assistant"}


class EngineChatModel(BaseChatModel):
    """A chat model that answers with one adapter of an engine.

    `seed`, `temperature`, `max_tokens`, `top_p`, `format` and `siblings` may also be given per call
    (`model.invoke(messages, seed=3)`).
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    engine: Any = Field(exclude=True, repr=False)
    """An `Engine`."""
    adapter: str | None = None
    max_tokens: int = 192
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    no_repeat: int = 0

    @property
    def _llm_type(self) -> str:
        return "r4r-engine"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        info = self._engine.info
        settings = ("adapter", "max_tokens", "temperature", "top_p", "seed", "no_repeat")
        return {
            "base": info.base,
            "digest": info.digest,
            **{name: getattr(self, name) for name in settings},
        }

    @property
    def _engine(self) -> Engine:
        engine: Engine = self.engine
        return engine

    def _request(
        self, messages: Sequence[BaseMessage], stop: list[str] | None, **settings: Any
    ) -> GenerateRequest:
        known = ("max_tokens", "temperature", "top_p", "seed", "format", "siblings")
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise RequestError(f"unknown settings for the engine's chat model: {unknown}")
        format: OutputFormat = settings.get("format", "text")
        if format not in get_args(OutputFormat):
            raise RequestError(f"bad format {format!r}: one of {', '.join(get_args(OutputFormat))}")
        return GenerateRequest(
            messages=tuple(map(_turn, messages)),
            adapter=self.adapter,
            max_tokens=settings.get("max_tokens", self.max_tokens),
            temperature=settings.get("temperature", self.temperature),
            top_p=settings.get("top_p", self.top_p),
            seed=settings.get("seed", self.seed),
            format=format,
            no_repeat=self.no_repeat,
            siblings=settings.get("siblings", 1),
            stop=tuple(stop or ()),
        )

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        future = self._engine.submit(self._request(messages, stop, **kwargs))
        return _chat_result(_wait(future))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return _chat_result(await self._engine.asubmit(self._request(messages, stop, **kwargs)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        future = self._engine.submit(self._request(messages, stop, **kwargs), pieces.put)
        future.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := _next(pieces)) is not None:
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
                if run_manager:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
            yield _last_chunk(future.result())
        finally:
            future.cancel()  # the consumer went away, or its time is up: free the engine

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def show(piece: str) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        request = self._request(messages, stop, **kwargs)
        task = asyncio.ensure_future(self._engine.asubmit(request, show))
        # Queued behind the last piece: call_soon_threadsafe keeps the order.
        task.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
                if run_manager:
                    await run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
            yield _last_chunk(await task)
        finally:
            task.cancel()


def _turn(message: BaseMessage) -> Message:
    role = _ROLES.get(message.type)
    if role is None or not isinstance(message.content, str):
        raise RequestError(
            f"a {message.type!r} message with {type(message.content).__name__} "
            "content: the engine takes system, human and ai texts"
        )
    return Message(role, message.content)


def _next(pieces: queue.SimpleQueue[str | None]) -> str | None:
    """What comes next; RunTimeoutError where it does not come in time."""
    while True:
        try:
            return pieces.get(timeout=time_left())
        except queue.Empty:
            check()


def _wait(future: Future[GenerateResult]) -> GenerateResult:
    try:
        return in_time(future).result()
    except BaseException:
        future.cancel()
        raise


def _usage(result: GenerateResult) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=result.prompt_tokens,
        output_tokens=result.completion_tokens,
        total_tokens=result.prompt_tokens + result.completion_tokens,
    )


def _chat_result(result: GenerateResult) -> ChatResult:
    message = AIMessage(
        content=result.text,
        usage_metadata=_usage(result),
        response_metadata={"finish_reason": result.finish},
    )
    return ChatResult(generations=[ChatGeneration(message=message)])


def _last_chunk(result: GenerateResult) -> ChatGenerationChunk:
    return ChatGenerationChunk(
        message=AIMessageChunk(
            content="",
            usage_metadata=_usage(result),
            response_metadata={"finish_reason": result.finish},
            chunk_position="last",
        )
    )

"""The engine as a LangChain chat model, alone and inside a graph."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from r4r_graph.engine.aspects import parse_aspects
from r4r_graph.engine.base import GenerateRequest, GenerateResult, Message
from r4r_graph.engine.batching import BatchingEngine, Row
from r4r_graph.engine.chat import EngineChatModel
from r4r_graph.engine.fake import FakeBackend
from r4r_graph.errors import EngineFailure, RequestError

PATIENCE = 20
"""Seconds after which something that should have ended counts as hung."""

CHAT: list[BaseMessage] = [SystemMessage("You judge."), HumanMessage("Will they like it?")]
ANSWER = "Likes warm voices, not long endings."
WORDS = ["Likes", " warm", " voices", ",", " not", " long", " endings", "."]

Make = Callable[..., EngineChatModel]


class EndlessBackend(FakeBackend):
    """Writes until it is stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped = threading.Event()

    def _text(self, row: Row) -> GenerateResult:
        words = ["on"]
        pause = threading.Event()
        for _ in range(PATIENCE * 1000):
            if row.cancelled():
                self.stopped.set()
                break
            if row.show is not None:
                row.show(" and ".join(words))
            words.append("on")
            pause.wait(0.001)
        return GenerateResult(" and ".join(words), 1, len(words), "length")


@pytest.fixture
def seen() -> list[GenerateRequest]:
    """The requests that reached the engine."""
    return []


@pytest.fixture
def model(fake: Callable[..., BatchingEngine], seen: list[GenerateRequest]) -> EngineChatModel:
    def write(request: GenerateRequest) -> str:
        seen.append(request)
        if "fail" in request.messages[-1].content:
            raise LookupError("a script that fails")
        return ANSWER

    return EngineChatModel(engine=fake(adapters=["reasoner"], write=write), adapter="reasoner")


@pytest.fixture
def endless() -> Iterator[tuple[EngineChatModel, EndlessBackend]]:
    backend = EndlessBackend()
    with BatchingEngine(backend) as engine:
        yield EngineChatModel(engine=engine), backend


def merged(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole


def assert_answer(message: AIMessage) -> None:
    assert message.content == ANSWER
    usage = message.usage_metadata
    assert usage is not None
    assert usage["output_tokens"] == len(WORDS)
    assert usage["input_tokens"] == 11
    assert usage["total_tokens"] == 11 + len(WORDS)
    assert message.response_metadata["finish_reason"] == "stop"


def test_invoke(model: EngineChatModel, seen: list[GenerateRequest]) -> None:
    assert_answer(model.invoke(CHAT))
    assert_answer(asyncio.run(model.ainvoke(CHAT)))
    assert seen[0] == seen[1]
    assert seen[0].adapter == "reasoner"
    assert seen[0].messages == (
        Message("system", "You judge."),
        Message("user", "Will they like it?"),
    )


def test_earlier_answers_are_turns_of_the_assistant(
    model: EngineChatModel, seen: list[GenerateRequest]
) -> None:
    model.invoke([*CHAT, AIMessage("Yes."), HumanMessage("Why?")])
    assert [message.role for message in seen[0].messages] == ["system", "user", "assistant", "user"]


def test_stream(model: EngineChatModel) -> None:
    chunks = list(model.stream(CHAT))
    assert [chunk.content for chunk in chunks if chunk.content] == WORDS
    assert_answer(merged(chunks))
    assert [chunk.chunk_position for chunk in chunks].count("last") == 1


def test_astream(model: EngineChatModel) -> None:
    async def work() -> list[AIMessageChunk]:
        return [chunk async for chunk in model.astream(CHAT)]

    chunks = asyncio.run(work())
    assert [chunk.content for chunk in chunks if chunk.content] == WORDS
    assert_answer(merged(chunks))


def test_batch(model: EngineChatModel, seen: list[GenerateRequest]) -> None:
    chats = [[HumanMessage(f"Number {i}")] for i in range(5)]
    assert [answer.content for answer in model.batch(chats)] == [ANSWER] * 5
    assert [answer.content for answer in asyncio.run(model.abatch(chats))] == [ANSWER] * 5
    asked = sorted(request.messages[0].content for request in seen)
    assert asked == sorted(2 * [f"Number {i}" for i in range(5)])


def test_settings_come_from_the_model_or_the_call(
    model: EngineChatModel, seen: list[GenerateRequest]
) -> None:
    own = EngineChatModel(
        engine=model.engine, max_tokens=7, temperature=0.5, top_p=0.9, seed=3, adapter="reasoner"
    )
    own.invoke(CHAT)
    own.invoke(CHAT, max_tokens=9, temperature=0.25, top_p=0.8, seed=4)
    own.bind(seed=5).invoke(CHAT)
    list(own.stream(CHAT, seed=6))
    found = [(r.max_tokens, r.temperature, r.top_p, r.seed) for r in seen]
    assert found == [
        (7, 0.5, 0.9, 3),
        (9, 0.25, 0.8, 4),
        (7, 0.5, 0.9, 5),
        (7, 0.5, 0.9, 6),
    ]


def test_the_format_of_a_call_reaches_the_engine(
    model: EngineChatModel, seen: list[GenerateRequest], fake: Callable[..., BatchingEngine]
) -> None:
    model.invoke(CHAT)
    model.invoke(CHAT, format="aspects")
    asyncio.run(model.ainvoke(CHAT, format="aspects"))
    assert [request.format for request in seen] == ["text", "aspects", "aspects"]
    with pytest.raises(RequestError, match="bad format 'json': one of text, aspects"):
        model.invoke(CHAT, format="json")
    enforced = EngineChatModel(engine=fake()).invoke(CHAT, format="aspects", max_tokens=40)
    parse_aspects(str(enforced.content))


def test_siblings_reach_the_engine() -> None:
    backend = FakeBackend()
    with BatchingEngine(backend, linger=PATIENCE) as engine:
        model = EngineChatModel(engine=engine)

        async def work() -> None:
            await asyncio.gather(*(model.ainvoke(CHAT, seed=i, siblings=4) for i in range(4)))

        asyncio.run(work())
    assert backend.batches == [4]


def test_stop(model: EngineChatModel) -> None:
    answer = model.invoke(CHAT, stop=[", not", "never"])
    assert answer.content == "Likes warm voices"
    streamed = merged(list(model.stream(CHAT, stop=[" long"])))
    assert streamed.content == "Likes warm voices, not"


def test_a_cut_answer_says_so(model: EngineChatModel) -> None:
    answer = model.invoke(CHAT, max_tokens=3)
    assert answer.content == "Likes warm voices"
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 3


def test_unknown_settings_are_refused(model: EngineChatModel, seen: list[Any]) -> None:
    ways: list[Callable[[], Any]] = [
        lambda: model.invoke(CHAT, temprature=1),
        lambda: list(model.stream(CHAT, temprature=1)),
        lambda: asyncio.run(model.ainvoke(CHAT, temprature=1)),
        lambda: model.bind_tools([]).invoke(CHAT),
    ]
    for way in ways[:3]:
        with pytest.raises(RequestError, match="temprature"):
            way()
    with pytest.raises(NotImplementedError):
        ways[3]()
    assert not seen


@pytest.mark.parametrize(
    "message",
    [
        HumanMessage([{"type": "text", "text": "Hello"}]),
        HumanMessage([{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]),
        ToolMessage("42", tool_call_id="1"),
    ],
    ids=["blocks", "image", "tool"],
)
def test_what_is_no_plain_text_is_refused(model: EngineChatModel, message: BaseMessage) -> None:
    with pytest.raises(RequestError, match="the engine takes system, human and ai texts"):
        model.invoke([message])
    with pytest.raises(RequestError, match=message.type):
        list(model.stream([message]))


def test_a_failure_reaches_the_caller(model: EngineChatModel) -> None:
    bad = [HumanMessage("fail")]

    async def consume() -> list[Any]:
        return [chunk async for chunk in model.astream(bad)]

    with pytest.raises(EngineFailure, match="a script that fails"):
        model.invoke(bad)
    with pytest.raises(EngineFailure, match="a script that fails"):
        list(model.stream(bad))
    with pytest.raises(EngineFailure, match="a script that fails"):
        asyncio.run(model.ainvoke(bad))
    with pytest.raises(EngineFailure, match="a script that fails"):
        asyncio.run(consume())
    results = model.batch([bad, CHAT], return_exceptions=True)
    assert isinstance(results[0], EngineFailure)
    assert results[1].content == ANSWER


def test_the_identity_names_weights_and_settings(model: EngineChatModel) -> None:
    params = model._identifying_params
    assert params["base"] == "fake"
    assert params["adapter"] == "reasoner"
    assert {"digest", "max_tokens", "temperature", "top_p", "seed"} <= set(params)
    assert model._llm_type == "r4r-engine"
    assert "BatchingEngine" not in repr(model)


# Leaving early -----------------------------------------------------------------------------------


def test_leaving_a_stream_frees_the_engine(
    endless: tuple[EngineChatModel, EndlessBackend],
) -> None:
    model, backend = endless
    stream = model.stream(CHAT)
    assert next(stream).content == "on"
    assert next(stream).content == " and on"
    stream.close()  # type: ignore[attr-defined]
    assert backend.stopped.wait(PATIENCE)


def test_breaking_out_of_an_async_stream_frees_the_engine(
    endless: tuple[EngineChatModel, EndlessBackend],
) -> None:
    model, backend = endless

    async def work() -> None:
        stream = model.astream(CHAT)
        async for chunk in stream:
            assert chunk.content == "on"
            break
        await stream.aclose()  # type: ignore[attr-defined]
        assert await asyncio.to_thread(backend.stopped.wait, PATIENCE)

    asyncio.run(work())


@pytest.mark.parametrize("verb", ["astream", "ainvoke"])
def test_cancelling_a_task_frees_the_engine(
    endless: tuple[EngineChatModel, EndlessBackend], verb: str
) -> None:
    model, backend = endless

    async def consume() -> None:
        if verb == "ainvoke":
            await model.ainvoke(CHAT)
        async for _ in model.astream(CHAT):
            started.set()

    async def work() -> None:
        task = asyncio.create_task(consume())
        if verb == "astream":
            await asyncio.wait_for(started.wait(), PATIENCE)
        else:
            while not backend.batches:
                await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(backend.stopped.wait, PATIENCE)

    started = asyncio.Event()
    asyncio.run(work())


def test_a_stream_that_was_left_disturbs_no_other(
    endless: tuple[EngineChatModel, EndlessBackend],
) -> None:
    model, backend = endless
    first, second = model.stream(CHAT), model.stream(CHAT)
    next(first)
    first.close()  # type: ignore[attr-defined]
    assert [next(second).content for _ in range(3)] == ["on", " and on", " and on"]
    assert len(backend.batches) == 2
    second.close()  # type: ignore[attr-defined]


# Inside a graph ----------------------------------------------------------------------------------


def graph_of(model: EngineChatModel) -> Any:
    from langchain_core.runnables import RunnableLambda
    from langgraph.graph import END, START, StateGraph
    from typing_extensions import TypedDict

    class State(TypedDict):
        question: str
        answer: str

    def reason(state: State) -> dict[str, str]:
        return {"answer": str(model.invoke([HumanMessage(state["question"])]).content)}

    async def areason(state: State) -> dict[str, str]:
        answer = await model.ainvoke([HumanMessage(state["question"])])
        return {"answer": str(answer.content)}

    builder = StateGraph(State)
    builder.add_node("reason", RunnableLambda(reason, afunc=areason))
    builder.add_edge(START, "reason")
    builder.add_edge("reason", END)
    return builder.compile()


def test_a_graph_streams_the_tokens(model: EngineChatModel) -> None:
    parts = list(graph_of(model).stream({"question": "Well?"}, stream_mode="messages"))
    assert [chunk.content for chunk, _ in parts if chunk.content] == WORDS
    assert {where["langgraph_node"] for _, where in parts} == {"reason"}
    usages = [chunk.usage_metadata for chunk, _ in parts if chunk.usage_metadata]
    assert [usage["output_tokens"] for usage in usages] == [len(WORDS)]


def test_a_graph_streams_the_tokens_async(model: EngineChatModel) -> None:
    async def work() -> list[Any]:
        stream = graph_of(model).astream({"question": "Well?"}, stream_mode=["messages", "values"])
        return [part async for part in stream]

    parts = asyncio.run(work())
    tokens = [chunk.content for mode, (chunk, _) in (p for p in parts if p[0] == "messages")]
    assert [token for token in tokens if token] == WORDS
    assert parts[-1] == ("values", {"question": "Well?", "answer": ANSWER})


def test_a_graph_that_does_not_stream_answers_alike(model: EngineChatModel) -> None:
    graph = graph_of(model)
    assert graph.invoke({"question": "Well?"})["answer"] == ANSWER
    assert asyncio.run(graph.ainvoke({"question": "Well?"}))["answer"] == ANSWER


def test_with_the_local_engine(tiny_engine: BatchingEngine) -> None:
    model = EngineChatModel(
        engine=tiny_engine, adapter="reasoner", max_tokens=16, temperature=1.0, seed=2
    )
    answer = model.invoke(CHAT)
    assert answer.content
    streamed = merged(list(model.stream(CHAT)))
    assert streamed.content == answer.content
    assert streamed.usage_metadata == answer.usage_metadata
    parts = list(graph_of(model).stream({"question": "Well?"}, stream_mode="messages"))
    [expected] = tiny_engine.generate(
        [
            GenerateRequest(
                (Message("user", "Well?"),),
                adapter="reasoner",
                max_tokens=16,
                temperature=1.0,
                seed=2,
            )
        ]
    )
    assert "".join(chunk.content for chunk, _ in parts) == expected.text

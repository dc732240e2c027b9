from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ToolCall
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable

from r4r_graph import Experts, RationaleToken, Recommender, Review, chat_models
from r4r_graph.engine.aspects import parse_aspects
from r4r_graph.engine.base import Engine, GenerateRequest, Message, RateRequest, TokenMeter
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.engine.chat_engine import EstimatedMeter, chat_engine
from r4r_graph.engine.remote import RemoteEngine
from r4r_graph.errors import EngineBusyError, EngineFailure, RequestError, SettingError
from r4r_graph.ratings import RatingScale
from tests.teacher_server import ChatServer, set_environment

TURNS = (Message("system", "You judge."), Message("user", "A song."), Message("user", "Stars?"))
SUMMARY = "positive: warm voice\nnegative: none\nvalues: honesty"
REVIEWS = [Review("u0", f"i{i}", 3.0, 1000.0 * i, f"T{i}", f"Words {i}.") for i in range(3)]

Answer = Callable[[Sequence[BaseMessage], dict[str, Any]], AIMessage | str]


class Hosted(BaseChatModel):
    """A chat model that says what it is told to, and remembers what it was asked with."""

    model_name: str = "hosted-1"
    temperature: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    answer: Any = None
    asked: list[dict[str, Any]] = []  # noqa: RUF012 - shared by the copies of one model

    @property
    def _llm_type(self) -> str:
        return "hosted"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model_name": self.model_name}

    def _generate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        names = ("temperature", "seed", "max_tokens")
        settings = {name: getattr(self, name) for name in names} | kwargs | {"stop": stop}
        self.asked.append(settings)
        said = self.answer(messages, settings)
        message = AIMessage(said) if isinstance(said, str) else said
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        whole = self._generate(messages, stop, **kwargs).generations[0].message
        for word in str(whole.text).split(" "):
            yield ChatGenerationChunk(message=AIMessageChunk(content=word + " "))


class Structured(Hosted):
    """With structured output, by tool calls."""

    def bind_tools(self, tools: Any, **kwargs: Any) -> Runnable[Any, AIMessage]:
        return self.bind(tools=[tool.__name__ for tool in tools])


class Telling(Hosted):
    """With log-probabilities."""

    logprobs: bool | None = None


def calling(name: str, **arguments: Any) -> AIMessage:
    return AIMessage("", tool_calls=[ToolCall(name=name, args=arguments, id="1")])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_models, "_FIRST_PAUSE", 0.01)


@pytest.fixture
def over() -> Iterator[Callable[..., RemoteEngine]]:
    """Makes an engine over a model of this kind with this answer."""
    opened: list[RemoteEngine] = []

    def make(answer: Any, kind: type[Hosted] = Hosted, **settings: Any) -> RemoteEngine:
        reply = answer if callable(answer) else lambda *_: answer
        opened.append(chat_engine(kind(answer=reply, asked=[]), **settings))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


def asked(engine: RemoteEngine) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = engine.backend._model.asked  # type: ignore[attr-defined]
    return found


def ask(**settings: Any) -> GenerateRequest:
    return GenerateRequest(TURNS, **settings)


# Texts -------------------------------------------------------------------------------------------


def test_it_is_an_engine(over: Callable[..., RemoteEngine]) -> None:
    engine = over("Likes it.")
    assert isinstance(engine, Engine)
    assert isinstance(engine.meter, TokenMeter)
    assert engine.info.base == "hosted-1"
    assert engine.info.adapters == {}
    [result] = engine.generate([ask(temperature=0.5, seed=3, max_tokens=40, stop=("x",))])
    assert (result.text, result.finish) == ("Likes it.", "stop")
    assert result.prompt_tokens > 0
    [settings] = asked(engine)
    assert settings == {"temperature": 0.5, "seed": 3, "max_tokens": 40, "stop": ["x"]}
    assert asyncio.run(engine.agenerate([ask()]))[0].text == "Likes it."


def test_only_settings_that_the_model_has_are_given() -> None:
    class Plain(GenericFakeChatModel):
        def _generate(self, *arguments: Any, **kwargs: Any) -> ChatResult:
            assert not {"temperature", "seed", "top_p", "max_tokens"} & set(kwargs)
            return super()._generate(*arguments, **kwargs)

    with chat_engine(Plain(messages=iter([AIMessage("One."), AIMessage("Two.")]))) as engine:
        assert engine.generate([ask()])[0].text == "One."


def test_pieces_are_shown_as_they_come(over: Callable[..., RemoteEngine]) -> None:
    engine, heard = over("Likes warm songs."), []  # type: ignore[var-annotated]
    result = engine.submit(ask(), heard.append).result(60)
    assert heard == ["Likes ", "warm ", "songs. "]
    assert result.text == "".join(heard)


def test_requests_at_fault(over: Callable[..., RemoteEngine]) -> None:
    engine = over("x", max_tokens=100)
    bad = [ask(adapter="reasoner"), GenerateRequest(()), ask(max_tokens=0)]
    bad.append(GenerateRequest((Message("user", "word " * 100),)))
    for error in engine.generate(bad, return_exceptions=True):
        assert isinstance(error, RequestError)
    with pytest.raises(SettingError, match="samples=0"):
        over("x", samples=0)


def test_errors_are_tried_again_and_told_without_secrets(
    over: Callable[..., RemoteEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTED_API_KEY", "a-secret-of-mine")
    failing = [503, 503]

    def answer(*_: Any) -> str:
        if failing:
            status = failing.pop()
            request = httpx.Request("POST", "http://host")
            response = httpx.Response(status, request=request)
            raise httpx.HTTPStatusError("a-secret-of-mine", request=request, response=response)
        return "Done."

    engine = over(answer)
    assert engine.generate([ask()])[0].text == "Done."
    for status, kind in ((429, EngineBusyError), (401, EngineFailure)):
        failing[:] = [status] * 3
        with pytest.raises(kind, match="hosted-1 failed") as caught:
            engine.generate([ask()])
        assert "a-secret-of-mine" not in str(caught.value)


# Summaries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        SUMMARY,
        f"Here you are:\n\n{SUMMARY}\n",
        '{"positive": ["warm voice"], "negative": [], "values": ["honesty"]}',
        '```json\n{"positive": ["Warm voice."], "negative": ["none"], "values": ["honesty"]}\n```',
    ],
)
def test_a_summary_out_of_a_text(over: Callable[..., RemoteEngine], text: str) -> None:
    [result] = over(text).generate([ask(format="aspects")])
    assert result.text.lower() == SUMMARY
    assert result.finish == "stop"


def test_a_summary_by_structured_output(over: Callable[..., RemoteEngine]) -> None:
    lists = {"positive": ["warm; voice"] * 2, "negative": ["a", "b", "c", "d", "e", "f"]}
    engine = over(calling("Aspects", **lists, values=[]), Structured)
    [result] = engine.generate([ask(format="aspects")])
    summary = parse_aspects(result.text)
    assert summary.positive == ("warm voice",)
    assert len(summary.negative) == 5
    assert asked(engine)[0]["tools"] == ["Aspects"]


def test_a_summary_that_is_none_is_asked_for_again(over: Callable[..., RemoteEngine]) -> None:
    said = iter(["I cannot.", "Sorry.", SUMMARY])
    engine = over(lambda *_: next(said))
    heard: list[str] = []
    result = engine.submit(ask(format="aspects"), heard.append).result(60)
    assert result.text == SUMMARY == "".join(heard)
    assert [settings["seed"] for settings in asked(engine)] == [0, 1, 2]
    assert engine.backend.unparsed == 2  # type: ignore[attr-defined]
    never = over("I cannot.", attempts=2)
    with pytest.raises(EngineFailure, match="left the summarizer's format 2 times"):
        never.generate([ask(format="aspects")])
    assert never.backend.unparsed == 2  # type: ignore[attr-defined]


def test_a_server_behind_openais_client_that_knows_no_schemas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client raises an error of its own there."""
    openai = pytest.importorskip("langchain_openai")
    set_environment(monkeypatch)
    said = {"positive: ...": SUMMARY, "Stars?": "4"}

    def reply(body: dict[str, Any]) -> tuple[int, str]:
        task = body["messages"][-1]["content"]
        return 200, next(text for end, text in said.items() if task.endswith(end))

    server = ChatServer(reply)
    server.headers["Connection"] = "close"  # none is left open for the process's other tests
    try:
        model = openai.ChatOpenAI(model="small", base_url=server.url, use_responses_api=False)
        with chat_engine(model, samples=3) as engine:
            task = Message("user", "positive: ...")
            [text] = engine.generate([GenerateRequest((task,), format="aspects")])
            [rated] = engine.rate([RateRequest(TURNS)])
    finally:
        server.close()
    assert text.text == SUMMARY
    assert (rated.source, rated.distribution.mode) == ("samples", 4.0)
    drawn = [body for body in server.bodies if "seed" in body and "response_format" not in body]
    assert {body["seed"] for body in drawn} == {0, 1, 2}
    assert {body.get("temperature") for body in server.bodies} == {0.0, 1.0}
    assert sum("response_format" in body for body in server.bodies) == 1, "tried once"


# Ratings -----------------------------------------------------------------------------------------


def told(*places: dict[str, float], text: str = "4") -> AIMessage:
    """An answer with the log-probabilities of its tokens, the first of each place chosen."""
    content = [
        {
            "token": next(iter(place)),
            "logprob": math.log(next(iter(place.values()))),
            "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in place.items()],
        }
        for place in places
    ]
    return AIMessage(text, response_metadata={"logprobs": {"content": content}})


def test_ratings_by_log_probabilities(over: Callable[..., RemoteEngine]) -> None:
    place = {"4": 0.5, " 4": 0.1, "5": 0.2, "Well": 0.15}
    engine = over(told({"Rating": 1.0}, {":": 1.0}, place), Telling)
    [result] = engine.rate([RateRequest(TURNS)])
    assert result.source == "logprobs"
    assert result.distribution.probabilities == pytest.approx((0, 0, 0, 0.75, 0.25))
    assert result.distribution.mass == pytest.approx(0.8)
    [settings] = asked(engine)
    assert (settings["logprobs"], settings["top_logprobs"]) == (True, 20)


def test_ratings_by_samples(over: Callable[..., RemoteEngine]) -> None:
    said = ["4", "I say 4 of 5.", "5", "none of it"]
    engine = over(lambda _, settings: said[settings["seed"]], samples=4)
    [result] = engine.rate([RateRequest(TURNS)])
    assert result.source == "samples"
    assert result.distribution.probabilities == pytest.approx((0, 0, 0, 2 / 3, 1 / 3))
    assert result.distribution.mass == 0.75
    assert {settings["temperature"] for settings in asked(engine)} == {1.0}
    assert engine.backend.unparsed == 1  # type: ignore[attr-defined]


def test_ratings_by_structured_output(over: Callable[..., RemoteEngine]) -> None:
    engine = over(
        lambda _, settings: calling("Rating", rating=settings["seed"] % 2 + 9), Structured
    )
    [result] = engine.rate([RateRequest(TURNS, RatingScale.parse("1-10"))])
    assert result.distribution.to_dict()["9"] == result.distribution.to_dict()["10"] == 0.5


@pytest.mark.parametrize("answer", ["4", told({"Well": 1.0}, text="4")])
def test_a_model_that_tells_nothing_is_sampled(
    over: Callable[..., RemoteEngine], answer: Any
) -> None:
    engine = over(answer, Telling, samples=2)
    [result] = engine.rate([RateRequest(TURNS)])
    assert (result.source, result.distribution.mode) == ("samples", 4.0)


def test_labels_that_begin_alike_are_sampled(over: Callable[..., RemoteEngine]) -> None:
    """After `1` a log-probability does not tell whether `10` was meant."""
    engine = over(told({"1": 1.0}, text="10"), Telling, samples=2)
    [result] = engine.rate([RateRequest(TURNS, RatingScale.parse("1-10"))])
    assert (result.source, result.distribution.mode) == ("samples", 10.0)


def test_no_rating_at_all(over: Callable[..., RemoteEngine]) -> None:
    with pytest.raises(EngineFailure, match="no rating of the scale in 8 answers"):
        over("Hard to say.").rate([RateRequest(TURNS)])


# Token arithmetic, fingerprints ------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "word", "a long line of words", "日本語のレビュー 🎸🎸"])
def test_the_estimates_head_is_a_beginning(text: str) -> None:
    meter = EstimatedMeter()
    assert meter.head(text, meter.count(text)) == text
    for limit in range(meter.count(text)):
        head = meter.head(text, limit)
        assert text.startswith(head)
        assert len(head) < len(text)
        assert meter.count(head) <= limit


def test_fingerprints(over: Callable[..., RemoteEngine]) -> None:
    engine = over("x")
    same = engine.fingerprint(ask())
    assert engine.fingerprint(ask(seed=3)) == same
    others = [ask(format="aspects"), ask(max_tokens=3), ask(temperature=1.0), ask(stop=("x",))]
    assert len({same, *map(engine.fingerprint, others)}) == 5
    with chat_engine(Hosted(model_name="hosted-2")) as other:
        assert other.fingerprint(ask()) != same


# Experts -----------------------------------------------------------------------------------------


def expert_answers(messages: Sequence[BaseMessage], _: Any) -> str:
    task = str(messages[-1].text)
    if "semicolons" in task:
        return SUMMARY
    return "4" if "How will this person rate" in task else "Likes warm voices."


def test_one_expert_by_a_chat_model(fake: Callable[..., BatchingEngine]) -> None:
    model = Hosted(answer=expert_answers, asked=[])
    with Recommender.load(REVIEWS, engine=fake(), experts={"reasoner": model}) as recommender:
        events = list(recommender.stream("u0", "i9", as_of=9e9))
        pieces = [event.text for event in events if isinstance(event, RationaleToken)]
        assert "".join(pieces) == "Likes warm voices. ", "each piece once"
        found: Any = events[-1]
        assert found.rationale == "Likes warm voices."
        assert found.model["base"] == "fake"
        assert found.model["others"]["reasoner"]["base"] == "hosted-1"
        assert found.model["ratings_from"] == "logits"
        again = asyncio.run(recommender.arate("u0", "i9", as_of=9e9))
        assert again.rationale == found.rationale


def test_all_experts_by_a_chat_model() -> None:
    model = Hosted(answer=expert_answers, asked=[])
    everyone = dict.fromkeys(("summarizer", "reasoner", "predictor"), model)
    for settings in ({"engine": model}, {"experts": everyone}):
        with Recommender.load(REVIEWS, **settings) as recommender:  # type: ignore[arg-type]
            found = recommender.rate("u0", "i9", as_of=9e9)
        assert found.rating == 4.0
        assert found.model["base"] == "hosted-1"
        assert found.model["ratings_from"] == "samples"
        assert found.to_dict()["model"]["ratings_from"] == "samples"
        assert found.user_aspects[0].summary.positive == ("warm voice",)
        assert found.usage["predictor"].completion_tokens >= 8


def test_an_engine_for_nobody(fake: Callable[..., BatchingEngine]) -> None:
    with pytest.raises(SettingError, match="'composer'"):
        Experts(fake(), others={"composer": fake()})
    with pytest.raises(SettingError, match="bad engine 'gpt'"):
        Recommender.load(REVIEWS, engine="gpt")


def test_loops_of_callers_come_and_go(over: Callable[..., RemoteEngine]) -> None:
    engine = over("x")
    assert [asyncio.run(engine.asubmit(ask())).text for _ in range(3)] == ["x"] * 3

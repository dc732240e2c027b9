"""What every engine must do: one suite, run on each of `ENGINES`."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from r4r_graph.engine.aspects import parse_aspects
from r4r_graph.engine.base import (
    Engine,
    GenerateRequest,
    GenerateResult,
    Message,
    RateRequest,
    RateResult,
    TokenMeter,
)
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.errors import RequestError
from r4r_graph.ratings import RatingScale
from tests.conftest import EXPERTS

ENGINES = [
    pytest.param("fake_with_adapters", id="fake"),
    pytest.param("tiny_engine", id="local"),
    pytest.param("tiny_server_engine", id="server"),
    pytest.param("tiny_cuda_engine", id="cuda", marks=pytest.mark.gpu),
]
"""Fixtures of engines with the adapters `EXPERTS`. A new engine is one more line."""

PATIENCE = 60
"""Seconds after which something that should have ended counts as hung."""

SCALES = {
    "1-5": "1-5",
    "1-10": "1-10",
    "halves": "0.5,1,1.5,2,2.5,3,3.5,4,4.5,5",
    "far apart": "1,100",
}


@pytest.fixture
def fake_with_adapters(fake: Callable[..., BatchingEngine]) -> BatchingEngine:
    return fake(adapters=EXPERTS)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    found: Engine = request.getfixturevalue(request.param)
    return found


def ask(text: str = "Which songs?", **settings: Any) -> GenerateRequest:
    turns = ("You judge.", text, "Answer in a line.")
    messages = tuple(map(Message, ("system", "user", "user"), turns))
    return GenerateRequest(messages, **{"max_tokens": 12, **settings})


def sampled(text: str = "Which songs?", seed: int = 0, **settings: Any) -> GenerateRequest:
    return ask(text, seed=seed, **{"temperature": 1.0, **settings})


def judge(text: str = "How many stars?", scale: str = "1-5", **settings: Any) -> RateRequest:
    return RateRequest((Message("user", text),), RatingScale.parse(scale), **settings)


def one(engine: Engine, request: GenerateRequest) -> GenerateResult:
    [result] = engine.generate([request])
    return result


def assert_alike(found: Sequence[RateResult], expected: Sequence[RateResult]) -> None:
    """Equal but for the last digits, in which a batch's padding shows."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.distribution.scale == b.distribution.scale
        assert a.distribution.probabilities == pytest.approx(b.distribution.probabilities, abs=1e-5)
        assert a.distribution.mass == pytest.approx(b.distribution.mass, rel=1e-3)
        assert a.prompt_tokens == b.prompt_tokens


# What an engine is -------------------------------------------------------------------------------


def test_it_is_an_engine(engine: Engine) -> None:
    assert isinstance(engine, Engine)
    assert isinstance(engine.meter, TokenMeter)
    assert set(engine.info.adapters) == set(EXPERTS)
    assert len(set(engine.info.adapters.values())) == len(EXPERTS)
    assert engine.info.base
    assert engine.info.digest
    assert engine.info.max_tokens > 1000


@pytest.mark.parametrize(
    "text",
    ["", "word", "Warm voices, and a long end.", "a😀😀b 日本語のレビュー 🎸🎸🎸", "9.5\n\n x  "],
)
def test_the_meters_head_is_a_beginning_within_the_limit(engine: Engine, text: str) -> None:
    meter = engine.meter
    size = meter.count(text)
    assert meter.head(text, size) == text
    for limit in range(size):
        head = meter.head(text, limit)
        assert text.startswith(head)
        assert len(head) < len(text)
        assert meter.count(head) <= limit
    heads = [meter.head(text, limit) for limit in range(size + 1)]
    assert all(len(a) <= len(b) for a, b in itertools.pairwise(heads))


# Order, samples, adapters ------------------------------------------------------------------------


def test_generate_keeps_the_order(engine: Engine) -> None:
    requests = [sampled(f"Review {i}: {'loud ' * i}", seed=i) for i in range(9)]
    results = engine.generate(requests)
    assert len({result.text for result in results}) == len(requests)
    assert engine.generate(requests[::-1]) == results[::-1]
    prompts = [result.prompt_tokens for result in results]
    assert prompts == sorted(set(prompts))


def test_rate_keeps_the_order(engine: Engine) -> None:
    requests = [judge(f"Review {i}: {'loud ' * i}") for i in range(9)]
    results = engine.rate(requests)
    assert len({result.distribution.probabilities for result in results}) == len(requests)
    assert_alike(engine.rate(requests[::-1]), results[::-1])


def test_nothing_asked_nothing_answered(engine: Engine) -> None:
    assert engine.generate([]) == []
    assert engine.rate([]) == []
    assert asyncio.run(engine.agenerate([])) == []
    assert asyncio.run(engine.arate([])) == []


def test_greedy_answers_repeat_whatever_the_seed(engine: Engine) -> None:
    first = one(engine, ask())
    assert first.text
    assert one(engine, ask()) == first
    assert one(engine, ask(seed=7)) == first
    assert engine.generate([ask(), ask("More?"), ask()])[::2] == [first, first]


def test_a_seed_decides_its_sample_in_any_batch(engine: Engine) -> None:
    request = sampled("Decide.", seed=5, max_tokens=20)
    alone = one(engine, request)
    others = [
        sampled("Other " * (7 * i), seed=i, temperature=0.5 + i / 10, max_tokens=5 + 3 * i)
        for i in range(11)
    ]
    for place in (0, 6, 11):
        batch = [*others[:place], request, *others[place:]]
        assert engine.generate(batch)[place] == alone
    assert engine.generate(others) == [one(engine, other) for other in others]


def test_other_seeds_other_samples(engine: Engine) -> None:
    results = engine.generate([sampled(seed=seed, max_tokens=16) for seed in range(8)])
    assert len({result.text for result in results}) >= 7  # two may say the same few words


def test_top_p_leaves_the_likeliest(engine: Engine) -> None:
    """As good as greedy, but for engines that invent their samples."""
    if engine.info.base == "fake":
        pytest.skip("a fake engine has no probabilities")
    narrow = engine.generate([sampled(seed=seed, top_p=1e-6) for seed in range(4)])
    assert {result.text for result in narrow} == {one(engine, ask()).text}
    wide = engine.generate([sampled(seed=seed, top_p=0.9) for seed in range(4)])
    assert len({result.text for result in wide}) == 4


@pytest.mark.parametrize("output", ["text", "aspects"])
def test_adapters_are_kept_apart_when_generating(engine: Engine, output: Any) -> None:
    text = "Which voices, stories, guitars and melodies did you enjoy there?"
    names = [None, *EXPERTS, None, *reversed(EXPERTS)]
    requests = [
        sampled(text, seed=i // 4, adapter=name, format=output, max_tokens=48)
        for i, name in enumerate(names)
    ]
    alone = [one(engine, request) for request in requests]
    assert engine.generate(requests) == alone
    assert len({result.text for result in alone[:4]}) == 4


def test_adapters_are_kept_apart_when_rating(engine: Engine) -> None:
    names = [None, *EXPERTS, None, *reversed(EXPERTS)]
    requests = [judge(adapter=name) for name in names]
    alone = [engine.rate([request])[0] for request in requests]
    assert_alike(engine.rate(requests), alone)
    assert_alike(alone[5:], alone[3:0:-1])
    assert len({result.distribution.probabilities for result in alone[:4]}) == 4


# Many callers ------------------------------------------------------------------------------------


def test_many_threads_at_once(engine: Engine) -> None:
    texts = [sampled(f"Song {i}", seed=i, adapter=(None, *EXPERTS)[i % 4]) for i in range(16)]
    stars = [judge(f"Song {i}", adapter=(None, *EXPERTS)[i % 3]) for i in range(16)]
    expected = engine.generate(texts), engine.rate(stars)
    together = threading.Barrier(16)

    def work(i: int) -> tuple[GenerateResult, RateResult]:
        together.wait(PATIENCE)
        return engine.generate([texts[i]])[0], engine.rate([stars[i]])[0]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(work, range(16)))
    assert [text for text, _ in found] == expected[0]
    assert_alike([rating for _, rating in found], expected[1])


def test_the_async_twins_answer_alike(engine: Engine) -> None:
    texts = [sampled(f"Song {i}", seed=i) for i in range(4)]
    stars = [judge(f"Song {i}") for i in range(4)]

    async def work() -> tuple[list[GenerateResult], list[RateResult], GenerateResult]:
        return (
            await engine.agenerate(texts),
            await engine.arate(stars),
            await engine.asubmit(texts[2]),
        )

    generated, rated, submitted = asyncio.run(work())
    assert generated == engine.generate(texts)
    assert_alike(rated, engine.rate(stars))
    assert submitted == generated[2] == engine.submit(texts[2]).result(PATIENCE)


def test_fifty_coroutines_at_once(engine: Engine) -> None:
    texts = [sampled(f"Song {i}", seed=i, max_tokens=6) for i in range(50)]

    async def work() -> list[GenerateResult]:
        before = threading.active_count()
        tasks = [asyncio.ensure_future(engine.asubmit(text)) for text in texts]
        await asyncio.sleep(0)
        assert threading.active_count() <= before + 1, "waiting must hold no threads"
        return list(await asyncio.gather(*tasks))

    assert asyncio.run(work()) == engine.generate(texts)


def test_a_loop_stays_free_while_the_engine_works(engine: Engine) -> None:
    async def work() -> bool:
        started, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def listen(_: str) -> None:
            loop.call_soon_threadsafe(started.set)
            assert go_on.wait(PATIENCE)

        task = asyncio.ensure_future(engine.asubmit(ask(), listen))
        await asyncio.wait_for(started.wait(), PATIENCE)
        free = not task.done()  # this line runs while the engine is held up
        go_on.set()
        await task
        return free

    assert asyncio.run(work())


# Requests at fault -------------------------------------------------------------------------------


def bad_texts(engine: Engine) -> dict[str, tuple[GenerateRequest, str]]:
    limit = engine.info.max_tokens
    return {
        "long prompt": (ask("word " * limit), str(limit)),
        "long answer": (ask(max_tokens=limit), str(limit)),
        "adapter": (ask(adapter="composer"), "'composer'"),
        "no messages": (GenerateRequest(()), "without messages"),
        "no tokens": (ask(max_tokens=0), "max_tokens=0"),
        "temperature": (ask(temperature=-0.5), "temperature=-0.5"),
        "top_p": (sampled(top_p=0), "top_p=0"),
        "aspects": (ask(format="aspects", max_tokens=5), "max_tokens 5"),
    }


def test_a_bad_request_fails_alone_and_says_why(engine: Engine) -> None:
    good = [sampled(f"Song {i}", seed=i) for i in range(8)]
    bad = bad_texts(engine)
    mixed = [
        request
        for pair in zip(good, bad.values(), strict=True)
        for request in (pair[0], pair[1][0])
    ]
    results: list[Any] = engine.generate(mixed, return_exceptions=True)
    assert results[::2] == engine.generate(good)
    for (name, (_, reason)), error in zip(bad.items(), results[1::2], strict=True):
        assert isinstance(error, RequestError), name
        assert reason in str(error), name
    assert asyncio.run(engine.agenerate(mixed[:2], return_exceptions=True))[0] == results[0]


def test_a_bad_rating_request_fails_alone_and_says_why(engine: Engine) -> None:
    limit = engine.info.max_tokens
    good = [judge(f"Song {i}") for i in range(3)]
    bad = [judge("word " * limit), judge(adapter="composer"), RateRequest(())]
    mixed = [request for pair in zip(good, bad, strict=True) for request in pair]
    results: list[Any] = engine.rate(mixed, return_exceptions=True)
    assert_alike(results[::2], engine.rate(good))
    for error, reason in zip(results[1::2], [str(limit), "'composer'", "messages"], strict=True):
        assert isinstance(error, RequestError)
        assert reason in str(error)


def test_without_return_exceptions_the_first_error_is_raised_after_all_ended(
    engine: Engine,
) -> None:
    requests = [ask(), ask(adapter="composer"), ask(adapter="painter"), ask("More?")]
    for attempt in (engine.generate, lambda r: asyncio.run(engine.agenerate(r))):
        with pytest.raises(RequestError, match="composer"):
            attempt(requests)
    with pytest.raises(RequestError, match="composer"):
        engine.rate([judge(), judge(adapter="composer")])
    with pytest.raises(RequestError, match="composer"):
        engine.submit(requests[1]).result(PATIENCE)


# Formats, budgets, ends --------------------------------------------------------------------------


def test_aspects_always_parse_within_the_budget(engine: Engine) -> None:
    text = "The warm guitar, clever lyrics; honest stories? <b>Never</b> boring: buy."
    requests = [
        sampled(text, seed=seed, format="aspects", temperature=1.5, max_tokens=budget)
        for seed in range(12)
        for budget in (40, 48, 80)
    ]
    for request, result in zip(requests, engine.generate(requests), strict=True):
        parse_aspects(result.text)
        assert result.completion_tokens <= request.max_tokens
        assert result.finish == "stop"


def test_each_row_keeps_to_its_own_budget(engine: Engine) -> None:
    budgets = [1, 2, 3, 9, 40, 4]
    requests = [sampled("Go on.", seed=3, max_tokens=budget) for budget in budgets]
    results = engine.generate(requests)
    assert results == [one(engine, request) for request in requests]
    for budget, result in zip(budgets, results, strict=True):
        assert 0 < result.completion_tokens <= budget
        assert results[4].text.startswith(result.text.rstrip("\ufffd"))
        if budget < results[4].completion_tokens:
            assert (result.completion_tokens, result.finish) == (budget, "length")


def stop_of(text: str) -> str:
    """A piece out of the middle of a text."""
    middle = len(text) // 2
    return text[middle : middle + 3]


def test_stop_texts_end_an_answer_and_are_no_part_of_it(engine: Engine) -> None:
    whole = [one(engine, sampled(seed=seed, max_tokens=32)) for seed in range(6)]
    requests = [
        sampled(seed=seed, max_tokens=32, stop=("never said", stop_of(result.text)))
        for seed, result in enumerate(whole)
    ]
    alone = [one(engine, request) for request in requests]
    for request, result, longer in zip(requests, alone, whole, strict=True):
        assert result.text == longer.text[: longer.text.index(request.stop[1])]
        assert result.finish == "stop"
        assert result.completion_tokens <= longer.completion_tokens
    unstopped = [sampled(seed=seed, max_tokens=32) for seed in range(6)]
    mixed = [request for pair in zip(requests, unstopped, strict=True) for request in pair]
    results = engine.generate(mixed)
    assert results[::2] == alone
    assert results[1::2] == whole


def test_a_stop_text_that_never_comes_changes_nothing(engine: Engine) -> None:
    request = sampled(seed=1)
    assert one(engine, replace(request, stop=("\n\n\n never",))) == one(engine, request)


# Streaming and cancelling ------------------------------------------------------------------------


def test_streamed_pieces_add_up_to_the_text(engine: Engine) -> None:
    free = [sampled(seed=seed, temperature=1.5, max_tokens=32) for seed in range(12)]
    stopped = [
        replace(request, stop=(stop_of(result.text),))
        for request, result in zip(free, engine.generate(free), strict=True)
    ]
    listed = [replace(request, format="aspects", max_tokens=64) for request in free]
    requests = [*free, *stopped, *listed]
    heard: list[list[str]] = [[] for _ in requests]
    futures = [
        engine.submit(request, pieces.append)
        for request, pieces in zip(requests, heard, strict=True)
    ]
    results = [future.result(PATIENCE) for future in futures]
    assert results == engine.generate(requests)
    for result, pieces in zip(results, heard, strict=True):
        assert "".join(pieces) == result.text
        assert all(pieces), "no empty pieces"
    assert all(len(pieces) > 3 for pieces in heard[:12])


def test_async_streaming(engine: Engine) -> None:
    heard: list[str] = []

    async def work() -> GenerateResult:
        return await engine.asubmit(sampled(), heard.append)

    assert asyncio.run(work()).text == "".join(heard)


def test_a_listeners_error_reaches_its_own_request_alone(engine: Engine) -> None:
    def fail(_: str) -> None:
        calls.append(1)
        raise LookupError("a listener that fails")

    calls: list[int] = []
    requests = [sampled(f"Song {i}", seed=i, siblings=3) for i in range(3)]
    heard: list[str] = []
    listeners: list[Any] = [heard.append, fail, None]
    futures = [engine.submit(r, listen) for r, listen in zip(requests, listeners, strict=True)]
    with pytest.raises(LookupError, match="a listener that fails"):
        futures[1].result(PATIENCE)
    others = [futures[0].result(PATIENCE), futures[2].result(PATIENCE)]
    assert others == engine.generate([requests[0], requests[2]])
    assert "".join(heard) == others[0].text
    assert calls == [1], "a listener that failed is not called again"


def test_cancelling_a_running_request(engine: Engine) -> None:
    started, go_on = threading.Event(), threading.Event()
    heard: list[str] = []

    def listen(piece: str) -> None:
        heard.append(piece)
        started.set()
        assert go_on.wait(PATIENCE)

    long = sampled(seed=2, max_tokens=200, siblings=2)
    other = sampled("Another", seed=4, max_tokens=20, siblings=2)
    expected = one(engine, replace(other, siblings=1))
    future, companion = engine.submit(long, listen), engine.submit(other)
    assert started.wait(PATIENCE)
    assert future.cancel()
    go_on.set()
    assert companion.result(PATIENCE) == expected
    assert one(engine, ask()).text
    with pytest.raises(CancelledError):
        future.result(0)
    assert len(heard) == 1, "nothing is shown after the cancelling"


def test_cancelling_a_task_that_awaits(engine: Engine) -> None:
    heard: list[str] = []

    async def work() -> GenerateResult:
        started, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def listen(piece: str) -> None:
            heard.append(piece)
            loop.call_soon_threadsafe(started.set)
            assert go_on.wait(PATIENCE)

        task = asyncio.ensure_future(engine.asubmit(sampled(seed=2, max_tokens=200), listen))
        await asyncio.wait_for(started.wait(), PATIENCE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        return await asyncio.wait_for(engine.asubmit(ask()), PATIENCE)

    assert asyncio.run(work()) == one(engine, ask())
    assert len(heard) == 1


# Ratings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES.keys())
def test_ratings_are_distributions_over_their_scale(engine: Engine, scale: str) -> None:
    requests = [judge(f"Song {i} {'and on ' * i}", scale) for i in range(5)]
    results = engine.rate(requests)
    for request, result in zip(requests, results, strict=True):
        found = result.distribution
        assert found.scale == request.scale
        assert len(found.probabilities) == len(request.scale.values)
        assert sum(found.probabilities) == pytest.approx(1, abs=1e-9)
        assert all(p >= 0 for p in found.probabilities)
        assert 0 < found.mass <= 1
        assert request.scale.low <= found.mean <= request.scale.high
        assert result.prompt_tokens > 0
    assert_alike([engine.rate([request])[0] for request in requests], results)


def test_scales_may_be_mixed_in_one_call(engine: Engine) -> None:
    requests = [judge(scale=scale) for scale in (*SCALES.values(), *SCALES.values())]
    results = engine.rate(requests)
    assert_alike(results[:4], results[4:])
    assert [r.distribution.scale for r in results] == [r.scale for r in requests]


# Fingerprints ------------------------------------------------------------------------------------


def test_equal_requests_have_equal_fingerprints(engine: Engine) -> None:
    first = engine.fingerprint(ask(format="aspects", max_tokens=48))
    assert first
    assert engine.fingerprint(ask(format="aspects", max_tokens=48)) == first
    assert engine.fingerprint(ask(format="aspects", max_tokens=48, siblings=9)) == first
    assert engine.fingerprint(ask(format="aspects", max_tokens=48, seed=3)) == first
    assert engine.fingerprint(ask(format="aspects", max_tokens=48, seed=3, top_p=0.5)) == first


def test_fingerprints_tell_apart_what_changes_the_answer(engine: Engine) -> None:
    requests = [
        ask(),
        ask("Which songs"),
        ask("which songs?"),
        GenerateRequest((Message("user", "You judge."), Message("user", "Which songs?"))),
        GenerateRequest((Message("user", "You judge. Which songs?"),)),
        *(ask(adapter=expert) for expert in EXPERTS),
        ask(max_tokens=13),
        ask(format="aspects", max_tokens=48),
        ask(max_tokens=48),
        ask(stop=("x",)),
        ask(stop=("x", "y")),
        sampled(seed=0),
        sampled(seed=1),
        sampled(seed=1, temperature=0.5),
        sampled(seed=1, top_p=0.5),
    ]
    prints = [engine.fingerprint(request) for request in requests]
    assert len(set(prints)) == len(requests)

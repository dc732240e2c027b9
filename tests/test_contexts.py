"""Contexts that are read once: the same answers, fewer tokens computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from r4r_graph.engine.base import GenerateRequest, Message, RateRequest
from r4r_graph.engine.contexts import LEAST, ContextCache
from r4r_graph.engine.local import load_local_engine
from r4r_graph.errors import RequestError, SettingError
from r4r_graph.ratings import RatingScale
from tests.tiny import make_adapter

LONG = " ".join(f"{n} loud drums and a warm guitar;" for n in range(24))


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Expert names to adapters: an ordinary one and two that begin behind the context."""
    folder = tmp_path_factory.mktemp("contexts")
    kinds = {"summarizer": False, "reasoner": True, "predictor": True}
    return {
        expert: make_adapter(
            tiny_base, folder / expert, expert=expert, seed=seed, activated=activated
        )
        for seed, (expert, activated) in enumerate(kinds.items(), start=1)
    }


@pytest.fixture(scope="module")
def shared(tiny_base: Path, adapters: dict[str, Path]) -> Iterator[Any]:
    with load_local_engine(tiny_base, adapters, device="cpu")[0] as engine:
        yield engine


@pytest.fixture(scope="module")
def apart(tiny_base: Path, adapters: dict[str, Path]) -> Iterator[Any]:
    with load_local_engine(tiny_base, adapters, device="cpu", context_cache_mb=0)[0] as engine:
        yield engine


def turns(candidate: str, task: str = "Why?", person: str = LONG) -> tuple[Message, ...]:
    return (
        Message("system", "You judge."),
        Message("user", f"<person>{person}</person><candidate>{candidate}</candidate>"),
        Message("user", task),
    )


def cache(engine: Any) -> ContextCache:
    found = engine._backend.contexts
    assert isinstance(found, ContextCache)
    return found


ADAPTERS = pytest.mark.parametrize("adapter", [None, "summarizer", "reasoner", "predictor"])
CANDIDATES = ["a film", "a much longer candidate, with many words about it", "a film!", "b"]


@ADAPTERS
@pytest.mark.parametrize("scale", ["1-5", "1-10"])
def test_ratings_are_the_same(shared: Any, apart: Any, adapter: str | None, scale: str) -> None:
    requests = [
        RateRequest(turns(candidate, "Rate."), RatingScale.parse(scale), adapter)
        for candidate in (*CANDIDATES, CANDIDATES[0])
    ]
    for _ in range(2):  # the second time from what is held
        for mine, theirs in zip(shared.rate(requests), apart.rate(requests), strict=True):
            expected = pytest.approx(theirs.distribution.probabilities, abs=1e-5)
            assert mine.distribution.probabilities == expected
            assert mine.distribution.mass == pytest.approx(theirs.distribution.mass, abs=1e-5)
            assert mine.prompt_tokens == theirs.prompt_tokens


@ADAPTERS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_the_same(
    shared: Any, apart: Any, adapter: str | None, temperature: float
) -> None:
    requests = [
        GenerateRequest(turns(candidate), adapter, 12, temperature, seed=seed)
        for seed, candidate in enumerate((*CANDIDATES, CANDIDATES[0]))
    ]
    for _ in range(2):
        assert shared.generate(requests) == apart.generate(requests)


def test_one_persons_candidates_share_the_person(shared: Any) -> None:
    found = cache(shared)
    found.clear()
    person = f"somebody new: {LONG}"
    before = found.reused_tokens
    shared.rate([RateRequest(turns(c, person=person), adapter="predictor") for c in CANDIDATES])
    prompt = shared.meter.prompt(turns("", person=person))
    assert found.reused_tokens - before > (len(CANDIDATES) - 1) * (len(prompt) - 30)


def test_activated_experts_share_the_whole_context(shared: Any) -> None:
    found = cache(shared)
    found.clear()
    shared.generate([GenerateRequest(turns("x"), "reasoner", 4)])
    before = found.reused_tokens
    shared.rate([RateRequest(turns("x", "Rate it."), adapter="predictor")])
    assert found.reused_tokens - before == shared.meter.context_length(
        shared.meter.prompt(turns("x"))
    )
    # an ordinary adapter reads with other eyes
    shared.rate([RateRequest(turns("x", "Rate it."), adapter="summarizer")])
    assert found.reused_tokens - before == shared.meter.context_length(
        shared.meter.prompt(turns("x"))
    )


def test_one_ordinary_request_is_read_in_one_pass(shared: Any) -> None:
    found = cache(shared)
    found.clear()
    shared.rate([RateRequest(turns("x"), adapter="summarizer")])
    assert not found._held


def test_short_contexts_are_left_alone(shared: Any) -> None:
    found = cache(shared)
    found.clear()
    shared.rate([RateRequest(turns("x", person="short")), RateRequest(turns("y", person="short"))])
    assert not found._held


def test_what_is_held_stays_within_the_limit(
    tiny_base: Path, adapters: dict[str, Path], apart: Any
) -> None:
    with load_local_engine(tiny_base, adapters, device="cpu", context_cache_mb=1)[0] as engine:
        found = cache(engine)
        one = [RateRequest(turns("x", person=f"0 {LONG}"), adapter="predictor")]
        first = engine.rate(one)
        size = next(iter(found._held.values())).size
        for n in range(1, (2 << 20) // size):
            engine.rate([RateRequest(turns("x", person=f"{n} {LONG}"), adapter="predictor")])
            held = sum(context.size for context in found._held.values())
            assert held == found._bytes <= 1 << 20
        assert engine.rate(one)[0].distribution == first[0].distribution


def test_the_longest_beginning_in_common_is_found(shared: Any) -> None:
    ids = tuple(range(5, 5 + 3 * LEAST))
    found = cache(shared)
    found.clear()
    import torch

    with torch.inference_mode():
        found.read("", [ids])
        before = found.reused_tokens
        fork = (*ids[: LEAST + 7], 300, 301)
        short = (*ids[: LEAST - 1], 302)
        [alike, unlike] = found.read("", [fork, short])
    assert found.reused_tokens - before == LEAST + 7
    assert (alike.ids, unlike.ids) == (fork, short)
    assert alike.keys.shape[2] == len(fork)


def test_a_bad_size_is_refused(tiny_base: Path) -> None:
    with pytest.raises(SettingError, match="context_cache_mb=-1"):
        load_local_engine(tiny_base, device="cpu", context_cache_mb=-1)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("adapter", ["reasoner", "predictor"])
@pytest.mark.parametrize("person", [LONG, "short"])
def test_an_activated_adapter_works_as_peft_has_it(
    shared: Any, apart: Any, tiny_base: Path, adapters: dict[str, Path], adapter: str, person: str
) -> None:
    """Against PEFT's own way, which masks the context in every layer."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from r4r_graph.engine.decoding import RatingReadout

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), adapters[adapter]
    ).eval()
    request = RateRequest(turns("x", "Rate.", person), adapter=adapter)
    ids = shared.meter.prompt(request.messages)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    readout: RatingReadout = shared._backend._readout(request.scale)
    expected = readout.read({(): torch.log_softmax(logits.float(), -1)})
    for engine in (shared, apart):
        [found] = engine.rate([request])
        assert found.distribution.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
        assert found.distribution.mass == pytest.approx(expected.mass, abs=1e-5)


def test_a_prompt_without_a_users_turn_is_refused(shared: Any) -> None:
    alone = (Message("system", "You judge."),)
    with pytest.raises(RequestError, match="begins at a user's turn"):
        shared.rate([RateRequest(alone, adapter="predictor")])
    assert shared.rate([RateRequest(alone, adapter="summarizer")])


def test_adapters_of_both_kinds_in_any_order(tiny_base: Path, adapters: dict[str, Path]) -> None:
    """The first one makes the PEFT model, the others join it."""
    request = [RateRequest(turns("x", "Rate."), adapter=name) for name in sorted(adapters)]
    found = []
    for order in (sorted(adapters), sorted(adapters, reverse=True)):
        chosen = {name: adapters[name] for name in order}
        with load_local_engine(tiny_base, chosen, device="cpu")[0] as engine:
            found.append([result.distribution.probabilities for result in engine.rate(request)])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=1e-6)

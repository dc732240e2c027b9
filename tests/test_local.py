"""The local engine's own mechanics; what all engines share is in test_engine_conformance.py."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r4r_graph.calibration import Calibration
from r4r_graph.engine.aspects import parse_aspects
from r4r_graph.engine.base import GenerateRequest, Message, RateRequest
from r4r_graph.engine.batching import BatchingEngine, Row
from r4r_graph.engine.local import load_local_engine
from r4r_graph.engine.rows import _repeating
from r4r_graph.errors import ModelError, RequestError
from r4r_graph.ratings import RatingScale

CHAT = (Message("system", "You judge."), Message("user", "Which songs?"))

Load = Callable[..., BatchingEngine]


@pytest.fixture
def load(tiny_base: Path, tmp_path: Path) -> Iterator[Load]:
    """Loads an engine over a changed copy of the tiny base."""
    made: list[BatchingEngine] = []

    def change(adapters: Path | None = None, **files: dict[str, Any]) -> BatchingEngine:
        """`files`: name of a JSON file (without its ending) to what to change in it."""
        folder = tmp_path / f"base-{len(made)}"
        shutil.copytree(tiny_base, folder)
        for name, changes in files.items():
            file = folder / f"{name}.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        engine, _ = load_local_engine(folder, adapters, device="cpu")
        made.append(engine)
        return engine

    yield change
    for engine in made:
        engine.close()


def prompt_ids(engine: BatchingEngine, *messages: Message) -> tuple[int, ...]:
    ids: tuple[int, ...] = engine._backend.prepare(GenerateRequest(messages or CHAT)).ids
    return ids


# Prompts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("templated", [True, False], ids=["by the template", "not at all"])
def test_the_template_alone_writes_the_beginning_token(
    tiny_base: Path, tmp_path: Path, templated: bool
) -> None:
    """Also where the tokenizer would add another by itself, as Llama's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "<|endoftext|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    if templated:
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert tokenizer("word")["input_ids"][0] == bos
    tokenizer.save_pretrained(folder)
    engine, _ = load_local_engine(folder, device="cpu")
    with engine:
        ids = prompt_ids(engine)
        assert ids.count(bos) == templated
        assert (ids[0] == bos) == templated
        assert engine.generate([GenerateRequest(CHAT, max_tokens=3)])[0].prompt_tokens == len(ids)
        assert engine.meter.count("word") == len(tokenizer("word")["input_ids"]) - 1


def test_a_prompt_ends_where_the_answer_begins(tiny_engine: BatchingEngine) -> None:
    tokenizer = tiny_engine._backend._tokenizer
    assert tokenizer.decode(prompt_ids(tiny_engine)) == (
        "<|im_start|>system\nYou judge.<|im_end|>\n"
        "<|im_start|>user\nWhich songs?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


REFUSALS = {
    "no system turn": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('x') }}{% endif %}"
    ),
    "turns must alternate": (
        "{% for m in messages[1:] %}{% if m['role'] == messages[loop.index0]['role'] %}"
        "{{ raise_exception('x') }}{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize(
    ("refusals", "expected"),
    [
        ([], ["s", "a", "b"]),
        (["no system turn"], ["s\n\na\n\nb"]),
        (["turns must alternate"], ["s", "a\n\nb"]),
        (["no system turn", "turns must alternate"], ["s\n\na\n\nb"]),
    ],
)
def test_templates_that_refuse_some_turns(
    tiny_base: Path, refusals: list[str], expected: list[str]
) -> None:
    from transformers import AutoTokenizer

    from r4r_graph.engine.tokens import HubTokenMeter

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = "".join(REFUSALS[r] for r in refusals) + tokenizer.chat_template
    messages = [Message("system", "s"), Message("user", "a"), Message("user", "b")]
    text = tokenizer.decode(HubTokenMeter(tokenizer).prompt(messages))
    turns = [turn.partition("\n")[2] for turn in text.split("<|im_start|>")[1:-1]]
    assert [turn.removesuffix("<|im_end|>\n") for turn in turns] == expected


def test_a_template_that_refuses_everything(tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    from r4r_graph.engine.tokens import HubTokenMeter

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ModelError, match="renders no prompt"):
        HubTokenMeter(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        HubTokenMeter(tokenizer)


# Decoding ----------------------------------------------------------------------------------------


def samples(count: int, **settings: Any) -> list[GenerateRequest]:
    """Requests with prompts of several lengths."""
    texts = ["Go on. " * (1 + seed % 5) for seed in range(count)]
    return [
        GenerateRequest((Message("user", text),), temperature=1.0, seed=seed, **settings)
        for seed, text in enumerate(texts)
    ]


def test_the_models_own_generation_settings_are_not_obeyed(
    tiny_engine: BatchingEngine, load: Load
) -> None:
    """A repetition penalty would see a batch's padding, and adapters were trained without."""
    stubborn = load(
        generation_config={
            "repetition_penalty": 2.0,
            "no_repeat_ngram_size": 2,
            "do_sample": True,
            "temperature": 0.3,
            "top_k": 2,
            "suppress_tokens": [5, 6, 7],
        }
    )
    requests = samples(6, max_tokens=24)
    assert stubborn.generate(requests) == tiny_engine.generate(requests)


def test_every_end_token_of_the_model_ends_an_answer(
    tiny_engine: BatchingEngine, load: Load
) -> None:
    requests = samples(24, max_tokens=40)
    whole = tiny_engine.generate(requests)
    tokenizer = tiny_engine._backend._tokenizer
    eos = tokenizer.eos_token_id
    others = [tokenizer.convert_tokens_to_ids(token) for token in ("Ġalbum", "Ġstars", "1")]
    ended = load(generation_config={"eos_token_id": [eos, *others]}).generate(requests)
    shorter = [b for a, b in zip(whole, ended, strict=True) if b != a]
    assert len(shorter) > 3
    assert all(result.finish == "stop" for result in shorter)
    assert all(a.text.startswith(b.text) for a, b in zip(whole, ended, strict=True))


def test_the_padding_token_does_not_matter(tiny_engine: BatchingEngine, load: Load) -> None:
    """Also where rows sample it themselves, in the middle of an answer."""
    listed = [replace(r, format="aspects") for r in samples(8, max_tokens=48)]
    requests = [*samples(64, max_tokens=48, stop=("q",)), *listed]
    other = load(tokenizer_config={"pad_token": "<|endoftext|>"})
    assert other._backend._pad != tiny_engine._backend._pad
    # Straight from the backend: the engine would halve a batch that fails, and hide it.
    backend = other._backend
    rows = [Row(backend.prepare(request), lambda: False) for request in requests[:64]]
    more = [Row(backend.prepare(request), lambda: False) for request in listed]
    found = [*backend.generate(rows), *backend.generate(more)]
    assert found == tiny_engine.generate(requests)


def test_aspects_at_the_least_budgets(tiny_engine: BatchingEngine) -> None:
    least = tiny_engine._backend.least_aspect_tokens
    requests = [
        GenerateRequest(
            (Message("user", f"hello {seed % 7}"),),
            max_tokens=least + seed % 20,
            temperature=1.5 + seed % 4,
            seed=seed,
            format="aspects",
        )
        for seed in range(256)
    ]
    results = tiny_engine.generate(requests)
    for request, result in zip(requests, results, strict=True):
        parse_aspects(result.text)
        assert result.finish == "stop"
        assert result.completion_tokens <= request.max_tokens
    assert len({result.text for result in results}) > 200
    [error] = tiny_engine.generate(
        [GenerateRequest(CHAT, format="aspects", max_tokens=least - 1)], return_exceptions=True
    )
    assert isinstance(error, RequestError)
    assert str(least) in str(error)


def test_a_phrase_that_runs_on_is_ended(tiny_engine: BatchingEngine) -> None:
    """Without the bound on its length, a random model's first phrase would take it all."""
    request = GenerateRequest(CHAT, format="aspects", max_tokens=160, temperature=3, seed=1)
    [result] = tiny_engine.generate([request])
    for line in result.text.split("\n"):
        for phrase in line.partition(": ")[2].split("; "):
            # A broken character counts for three when it is split up again.
            assert tiny_engine.meter.count(phrase.replace("\ufffd", "")) <= 14


@pytest.mark.parametrize("way", ["cancelled", "listener failed"])
def test_a_stopped_request_costs_no_further_passes(tiny_engine: BatchingEngine, way: str) -> None:
    passes: list[int] = []
    hook = tiny_engine._backend._model.register_forward_pre_hook(lambda *_: passes.append(1))
    started, go_on = threading.Event(), threading.Event()

    def listen(_: str) -> None:
        started.set()
        assert go_on.wait(60)
        if way == "listener failed":
            raise LookupError(way)

    try:
        request = GenerateRequest(CHAT, max_tokens=70, temperature=1, seed=1)
        future = tiny_engine.submit(request, listen)
        assert started.wait(60)
        if way == "cancelled":
            future.cancel()
        go_on.set()
        tiny_engine.generate([GenerateRequest(CHAT, max_tokens=1)])
    finally:
        hook.remove()
    assert future.done()
    assert len(passes) <= 4
    assert tiny_engine.generate([request])[0].completion_tokens > 60, "it would have gone on"


def test_ratings_need_no_cache_of_their_batch(tiny_engine: BatchingEngine) -> None:
    """One forward pass for a whole batch, whatever the scale's number of tokens."""
    passes: list[int] = []
    hook = tiny_engine._backend._model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        scale = RatingScale.parse("1-10")
        requests = [RateRequest(CHAT, scale, siblings=8) for _ in range(8)]
        results = tiny_engine.rate(requests)
    finally:
        hook.remove()
    assert len(passes) == 1
    assert len(results) == 8


def test_without_adapters_the_base_answers(tiny_engine: BatchingEngine, load: Load) -> None:
    bare = load()
    request = GenerateRequest(CHAT, max_tokens=12)
    assert dict(bare.info.adapters) == {}
    assert bare.generate([request]) == tiny_engine.generate([request])
    with pytest.raises(RequestError, match="loaded: none"):
        bare.generate([GenerateRequest(CHAT, adapter="reasoner")])


def test_the_predictors_calibration_is_applied_and_to_nothing_else(
    tiny_base: Path, tiny_adapters: Path, tiny_engine: BatchingEngine, tmp_path: Path
) -> None:
    calibration = Calibration(RatingScale().values, 0.5, (0.5, 0.0, -1.0, 0.0, 0.25))
    folder = Path(shutil.copytree(tiny_adapters, tmp_path / "adapters"))
    calibration.save(folder / "predictor" / "calibration.json")
    requests = [
        RateRequest((Message("user", text),), adapter=adapter)
        for text in ("Which songs?", "A longer question: which of all these songs?")
        for adapter in ("predictor", "reasoner", None)
    ]
    plain = [result.distribution for result in tiny_engine.rate(requests)]
    engine, notes = load_local_engine(tiny_base, folder, device="cpu")
    with engine:
        found = [result.distribution for result in engine.rate(requests)]
        with pytest.raises(ModelError, match="calibration is for the ratings 1, 2, 3, 4, 5"):
            engine._backend.prepare(replace(requests[0], scale=RatingScale.parse("1-10")))
        [alone] = engine.rate([replace(requests[1], scale=RatingScale.parse("1-10"))])
    assert not any("other weights" in note for note in notes)
    for request, before, after in zip(requests, plain, found, strict=True):
        wanted = calibration.apply(before) if request.adapter == "predictor" else before
        assert after.probabilities == pytest.approx(wanted.probabilities, abs=1e-5)
        assert after.mass == pytest.approx(before.mass, abs=1e-5)
    assert len(alone.distribution.probabilities) == 10
    assert engine.info.adapters["predictor"] != tiny_engine.info.adapters["predictor"]


def test_a_calibration_can_be_left_alone(
    tiny_base: Path, tiny_adapters: Path, tiny_engine: BatchingEngine, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_adapters, tmp_path / "adapters"))
    request = RateRequest(CHAT, adapter="predictor")
    [plain] = tiny_engine.rate([request])
    identity = Calibration(RatingScale().values)
    strong = Calibration(RatingScale().values, 9.0)
    for calibration, calibrated in ((strong, False), (identity, True)):
        calibration.save(folder / "predictor" / "calibration.json")
        engine, _ = load_local_engine(tiny_base, folder, device="cpu", calibrated=calibrated)
        with engine:
            assert engine.rate([request]) == [plain]


def test_a_closed_engine_lets_go_of_the_model(load: Load) -> None:
    import gc
    import weakref

    engine = load()
    model = weakref.ref(engine._backend._model)
    engine.generate([GenerateRequest(CHAT, max_tokens=2)])
    engine.close()
    gc.collect()
    assert model() is None


@pytest.mark.gpu
@pytest.mark.model
def test_on_cuda_the_default_is_bfloat16_and_close_to_float32(
    real_engine: BatchingEngine,
) -> None:
    engine, _ = load_local_engine("smollm2-135m", "none", device="cuda")
    request = RateRequest((Message("user", "Rate this album from 1 to 5."),))
    with engine:
        assert engine.info.dtype == "bfloat16"
        [there] = engine.rate([request])
    [here] = real_engine.rate([request])
    assert there.distribution.mean == pytest.approx(here.distribution.mean, abs=0.1)


def test_no_run_of_tokens_is_written_twice(tiny_engine: Any) -> None:
    """Here a run of one: no token at all."""
    turns = (Message("user", "Which songs?"),)
    free = GenerateRequest(turns, "reasoner", max_tokens=64)
    [free_one, other] = tiny_engine.generate([free, replace(free, no_repeat=1)])
    assert free_one.text != other.text
    assert tiny_engine.generate([replace(free, no_repeat=1, seed=1)]) == [other]
    prints = {tiny_engine.fingerprint(r) for r in (free, replace(free, no_repeat=1))}
    assert len(prints) == 2
    with pytest.raises(RequestError, match="no_repeat=-1"):
        tiny_engine.generate([replace(free, no_repeat=-1)])


@pytest.mark.parametrize(
    ("answer", "size", "banned"),
    [
        ([], 2, []),
        ([1, 2], 3, []),
        ([1, 2, 3, 1, 2], 3, [3]),
        ([1, 2, 3, 1, 2, 4, 1, 2], 3, [3, 4]),
        ([1, 1], 2, [1]),
        ([1, 2], 1, [1, 2]),
    ],
)
def test_what_would_repeat(answer: list[int], size: int, banned: list[int]) -> None:
    assert _repeating(answer, size) == banned

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r4r_graph import Experts, Recommender, Review, TokenBudgets, chat_models
from r4r_graph.calibration import Calibration
from r4r_graph.cli.serve_command import vllm_command
from r4r_graph.engine.adapters import find_adapters
from r4r_graph.engine.aspects import parse_aspects
from r4r_graph.engine.base import EngineInfo, GenerateRequest, Message, RateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.engine.model_files import read_json
from r4r_graph.engine.remote import RemoteEngine
from r4r_graph.engine.server import Served, ServerBackend
from r4r_graph.engine.server_connect import open_server_engine
from r4r_graph.engine.weights import find_base, load_tokenizer
from r4r_graph.errors import (
    EngineBusyError,
    EngineFailure,
    ModelError,
    ModelNotFoundError,
    RequestError,
    SettingError,
)
from r4r_graph.ratings import RatingScale
from tests.commands import R4r
from tests.conftest import EXPERTS
from tests.model_server import FEATURES, ModelServer
from tests.tiny import make_tiny_base

SECRET = "sk-not-to-be-written-anywhere"
TURNS = (Message("system", "You judge."), Message("user", "A song."), Message("user", "Stars?"))
REVIEWS = [
    Review(f"u{u}", f"i{i}", 1.0 + (u + i) % 5, 1000.0 * (u + 6 * i), f"T{i}", f"Words {u} {i}.")
    for u in range(3)
    for i in range(3)
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_models, "_FIRST_PAUSE", 0.01)
    for name in ("R4R_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(tiny_server: ModelServer) -> Iterator[ModelServer]:
    """The server, as it was afterwards."""
    tiny_server.asked.clear()
    tiny_server.keys.clear()
    tiny_server.most_at_once = tiny_server.dropped = 0
    yield tiny_server
    tiny_server.features = set(FEATURES)
    tiny_server.failing.clear()


@pytest.fixture
def connect(server: ModelServer, tiny_base: Path) -> Iterator[Callable[..., RemoteEngine]]:
    opened: list[RemoteEngine] = []

    def make(adapters: Any = None, **settings: Any) -> RemoteEngine:
        settings = {"base": tiny_base, "attempts": 3} | settings
        opened.append(open_server_engine(server.url, adapters=adapters, **settings)[0])
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


def ask(**settings: Any) -> GenerateRequest:
    return GenerateRequest(TURNS, **{"max_tokens": 12, **settings})


def wait_until(reached: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < until
        time.sleep(0.01)


# Agreement with the local engine -----------------------------------------------------------------


@pytest.mark.parametrize("scale", ["1-5", "1-10", "0.5,1,1.5,2"])
@pytest.mark.parametrize("adapter", [None, "predictor"])
def test_it_rates_as_the_local_engine(
    tiny_engine: BatchingEngine,
    connect: Callable[..., RemoteEngine],
    scale: str,
    adapter: str | None,
) -> None:
    request = RateRequest(TURNS, RatingScale.parse(scale), adapter)
    [here], [there] = tiny_engine.rate([request]), connect().rate([request])
    assert there.distribution.probabilities == pytest.approx(
        here.distribution.probabilities, abs=1e-5
    )
    assert there.distribution.mass == pytest.approx(here.distribution.mass, rel=1e-3)
    assert (there.source, there.prompt_tokens) == ("logits", here.prompt_tokens)


@pytest.mark.parametrize("scale", ["1-5", "1-10", "0.5,1,1.5,2"])
def test_a_server_that_knows_no_chosen_tokens_rates_alike(
    tiny_engine: BatchingEngine,
    server: ModelServer,
    connect: Callable[..., RemoteEngine],
    scale: str,
) -> None:
    server.features.discard("chosen tokens")
    request = RateRequest(TURNS, RatingScale.parse(scale), "predictor")
    [here], [there] = tiny_engine.rate([request]), connect().rate([request])
    assert there.distribution.probabilities == pytest.approx(
        here.distribution.probabilities, abs=1e-5
    )
    assert there.distribution.mass <= here.distribution.mass * 1.001, "what is seen of it"
    assert there.source == "logprobs"
    choices = [body["structured_outputs"] for body in server.asked if "structured_outputs" in body]
    assert {"choice": list(request.scale.labels)} in choices


def test_it_writes_as_the_local_engine(
    tiny_engine: BatchingEngine, connect: Callable[..., RemoteEngine]
) -> None:
    engine = connect()
    requests = [ask(), ask(adapter="reasoner"), ask(temperature=1.0, seed=3)]
    assert engine.generate(requests) == tiny_engine.generate(requests)


# Connecting --------------------------------------------------------------------------------------


def test_a_server_that_lacks_something_is_refused(
    server: ModelServer, connect: Callable[..., RemoteEngine], tmp_path: Path
) -> None:
    server.features = {"log-probabilities"}
    with pytest.raises(ModelError, match="lacks structured outputs"):
        connect()
    server.features = {"structured outputs"}
    with pytest.raises(ModelError, match="lacks log-probabilities"):
        connect()
    server.features = set(FEATURES)
    other = make_tiny_base(tmp_path / "other", style="headers")
    file = other / "tokenizer.json"
    tree = json.loads(file.read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary["7"], vocabulary["8"] = vocabulary["8"], vocabulary["7"]
    file.write_text(json.dumps(tree))
    with pytest.raises(ModelError, match="another tokenizer"):
        connect(base=other)


def test_an_adapter_that_is_not_served_is_refused(
    server: ModelServer, connect: Callable[..., RemoteEngine], tiny_adapters: Path, tiny_base: Path
) -> None:
    names = server._local.info.adapters
    server._local.info = replace(server._local.info, adapters={"reasoner": names["reasoner"]})
    try:
        with pytest.raises(ModelNotFoundError, match=r"no adapter 'summarizer'.*serve-command"):
            connect(tiny_adapters)
        engine, notes = open_server_engine(server.url, tiny_base)
        with engine:
            assert set(engine.info.adapters) == {"reasoner"}
        assert any("'predictor'" in note for note in notes)
    finally:
        server._local.info = replace(server._local.info, adapters=names)


def test_none_is_the_base_model_alone(connect: Callable[..., RemoteEngine]) -> None:
    assert connect("none").info.adapters == {}


def test_nobody_listens(tiny_base: Path) -> None:
    with pytest.raises(EngineFailure, match=r"http://127.0.0.1:9 cannot be reached"):
        open_server_engine("http://127.0.0.1:9/v1/", tiny_base, attempts=2)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://me:pw@host"])
def test_bad_addresses(url: str, tiny_base: Path) -> None:
    with pytest.raises(SettingError) as caught:
        open_server_engine(url, tiny_base)
    assert "pw" not in str(caught.value)


def test_what_is_known_here_of_the_adapters_is_used(
    connect: Callable[..., RemoteEngine], tiny_adapters: Path, tmp_path: Path
) -> None:
    plain = connect().rate([RateRequest(TURNS, adapter="predictor")])[0].distribution
    folder = tmp_path / "adapters"
    shutil.copytree(tiny_adapters, folder)
    calibration = Calibration((1.0, 2.0, 3.0, 4.0, 5.0), temperature=2.0)
    calibration.save(folder / "predictor" / "calibration.json")
    note = {"expert": "predictor", "trained_with": {"history": 4}}
    (folder / "predictor" / "r4r.json").write_text(json.dumps(note))
    engine = connect(folder)
    assert engine.info.adapters["predictor"] == find_adapters(folder)["predictor"].digest
    assert engine.info.trained_with == {"history": 4}
    found = engine.rate([RateRequest(TURNS, adapter="predictor")])[0].distribution
    assert found.probabilities == pytest.approx(calibration.apply(plain).probabilities, abs=1e-6)
    with pytest.raises(ModelError, match="calibration"):
        engine.rate([RateRequest(TURNS, RatingScale.parse("1-10"), "predictor")])


def test_the_tokenizer_alone_is_enough(
    connect: Callable[..., RemoteEngine], tiny_base: Path, tiny_adapters: Path, tmp_path: Path
) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_base / file).exists():
            shutil.copy(tiny_base / file, tmp_path)
    engine = connect(tiny_adapters, base=tmp_path)
    assert engine.generate([ask()]) == connect().generate([ask()])
    assert set(engine.info.adapters) == set(EXPERTS)


# Tries, time-outs, keys --------------------------------------------------------------------------


def test_what_may_pass_is_tried_again(
    server: ModelServer, connect: Callable[..., RemoteEngine]
) -> None:
    engine = connect()
    expected = engine.generate([ask()])
    server.failing[:] = [429, 500]
    assert engine.generate([ask()]) == expected
    server.failing[:] = [503]
    heard: list[str] = []
    assert engine.submit(ask(), heard.append).result(60) == expected[0]
    assert "".join(heard) == expected[0].text


def test_errors_have_a_kind_and_a_reason(
    server: ModelServer, connect: Callable[..., RemoteEngine]
) -> None:
    engine = connect()
    kinds = {400: RequestError, 401: EngineFailure, 429: EngineBusyError, 500: EngineFailure}
    for status, kind in kinds.items():
        before = len(server.asked)
        server.failing[:] = [status] * 5
        with pytest.raises(kind, match=f"on purpose {status}") as caught:
            engine.generate([ask()])
        assert type(caught.value) is kind
        assert len(server.asked) - before == (3 if status in (429, 500) else 1)
        server.failing.clear()
    assert engine.generate([ask()])[0].text


def test_a_server_that_does_not_answer_in_time(
    server: ModelServer, connect: Callable[..., RemoteEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = connect(timeout=0.2, attempts=1)
    real = server._engine.asubmit

    async def slow(*arguments: Any) -> Any:
        await asyncio.sleep(1)
        return await real(*arguments)

    monkeypatch.setattr(server._engine, "asubmit", slow)
    with pytest.raises(EngineFailure, match="did not answer in time"):
        engine.generate([ask()])
    wait_until(lambda: server.at_once == 0)


def test_the_key_is_sent_and_nowhere_told(
    server: ModelServer, connect: Callable[..., RemoteEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    without = connect()
    assert server.keys == {None}
    monkeypatch.setenv("OPENAI_API_KEY", "another-secret")
    monkeypatch.setenv("R4R_API_KEY", SECRET)
    engine = connect()
    engine.generate([ask()])
    assert server.keys == {None, f"Bearer {SECRET}"}
    api = engine.backend._api  # type: ignore[attr-defined]
    told = f"{api!r} {engine.backend!r} {engine.info!r}"
    server.failing[:] = [401]
    with pytest.raises(EngineFailure) as caught:
        engine.generate([ask()])
    assert SECRET not in told + str(caught.value) + repr(caught.value)
    assert engine.fingerprint(ask()) == without.fingerprint(ask())


# Many at once, cancelling, closing ---------------------------------------------------------------


def test_so_many_in_flight_and_no_more(
    server: ModelServer, connect: Callable[..., RemoteEngine]
) -> None:
    engine = connect(at_once=3)
    results = engine.generate([ask(temperature=1.0, seed=seed) for seed in range(20)])
    assert len(results) == 20
    assert server.most_at_once == 3


def test_cancelling_drops_the_connection(
    server: ModelServer, connect: Callable[..., RemoteEngine]
) -> None:
    engine, begun = connect(), threading.Event()
    future = engine.submit(ask(temperature=1.0, max_tokens=1500), lambda _: begun.set())
    assert begun.wait(60)
    assert future.cancel()
    wait_until(lambda: server.dropped == 1)


def test_closing_ends_what_is_in_flight(connect: Callable[..., RemoteEngine]) -> None:
    engine, begun = connect(at_once=1), threading.Event()
    running = engine.submit(ask(temperature=1.0, max_tokens=1500), lambda _: begun.set())
    waiting = engine.submit(ask())
    assert begun.wait(60)
    engine.close()
    engine.close()
    for future in (running, waiting, engine.submit(ask())):
        with pytest.raises(EngineFailure, match="was closed"):
            future.result(60)


# Answers that are cut or broken ------------------------------------------------------------------


class Canned:
    """A server's calls with one answer."""

    url = "http://canned"

    def __init__(self, *pieces: str, finish: str | None = "length") -> None:
        self.pieces, self.finish = pieces, finish

    async def complete(self, _: Any) -> Any:
        return {"choices": [{"text": "".join(self.pieces), "finish_reason": self.finish}]}

    async def stream(self, _: Any) -> AsyncGenerator[Any]:
        for piece in self.pieces:
            yield {"choices": [{"text": piece, "finish_reason": None}]}
        if self.finish:
            yield {"choices": [{"text": "", "finish_reason": self.finish}]}

    async def close(self) -> None:
        pass


def canned(tiny_base: Path, api: Canned) -> RemoteEngine:
    tokenizer = load_tokenizer(find_base(tiny_base))
    info = EngineInfo("tiny", "0", "server", "server")
    return RemoteEngine(ServerBackend(api, Served("tiny", True), tokenizer, info))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "pieces",
    [
        ("positive: warm voice; cle", "ver"),
        ("positive: a\nnega",),
        ("positive: a;",),
        ("positive: a\nnegative: b\nvalues: c; ",),
    ],
)
def test_a_summary_cut_by_its_budget_is_closed(tiny_base: Path, pieces: tuple[str, ...]) -> None:
    request = ask(format="aspects", max_tokens=80)
    with canned(tiny_base, Canned(*pieces)) as engine:
        [result] = engine.generate([request])
        heard: list[str] = []
        assert engine.submit(request, heard.append).result(60).text == result.text
    assert result.text.startswith("".join(pieces))
    assert "".join(heard) == result.text
    assert parse_aspects(result.text).positive
    assert result.finish == "stop"


def test_a_stream_that_breaks_off_is_no_answer(tiny_base: Path) -> None:
    with (
        canned(tiny_base, Canned("Half", finish=None)) as engine,
        pytest.raises(EngineFailure, match="before its end"),
    ):
        engine.submit(ask(), lambda _: None).result(60)


# Recommending ------------------------------------------------------------------------------------


def test_a_recommender_over_a_server(
    server: ModelServer, tiny_base: Path, tiny_engine: BatchingEngine
) -> None:
    budgets = TokenBudgets(rationale=8, summary=40)
    with Recommender.load(
        REVIEWS, base=tiny_base, engine=server.url, budgets=budgets
    ) as recommender:
        found = recommender.rate("u0", "i2", as_of=9e9)

        async def many() -> tuple[int, list[Any]]:
            before = threading.active_count()
            calls = (recommender.arate(f"u{n % 3}", "i1", as_of=9e9) for n in range(100))
            runs = [asyncio.ensure_future(call) for call in calls]
            await asyncio.sleep(0.5)
            return threading.active_count() - before, await asyncio.gather(*runs)

        held, done = asyncio.run(many())
    assert held < 40, "no thread for each run"
    assert len({result.rating for result in done}) == 3
    local = Recommender(Experts(tiny_engine, budgets=budgets), recommender.reviews)
    expected = local.rate("u0", "i2", as_of=9e9)
    assert found.rationale == expected.rationale
    assert found.rating == pytest.approx(expected.rating, abs=1e-4)
    assert found.model["ratings_from"] == expected.model["ratings_from"] == "logits"


# The command that serves it ----------------------------------------------------------------------


def test_the_command_names_everything(tiny_base: Path, tiny_adapters: Path) -> None:
    adapters = find_adapters(tiny_adapters)
    command = list(vllm_command(find_base(tiny_base), adapters, port=8123, dtype="float32"))
    assert command[:3] == ["vllm", "serve", str(tiny_base)]
    told = dict(itertools.pairwise(command))
    assert told["--served-model-name"] == "tiny"
    assert (told["--host"], told["--port"], told["--dtype"]) == ("127.0.0.1", "8123", "float32")
    assert told["--max-lora-rank"] == "8", "the tiny adapters have rank 4"
    assert told["--max-loras"] == "4", "one place stays empty"
    assert command[-3:] == [f"{expert}={tiny_adapters / expert}" for expert in EXPERTS]
    alone = vllm_command(find_base(tiny_base), {})
    assert not any("lora" in part for part in alone)


@pytest.mark.parametrize("key", ["use_dora", "modules_to_save", "alora_invocation_tokens"])
def test_adapters_that_vllm_does_not_serve(
    tiny_base: Path, tiny_adapters: Path, tmp_path: Path, key: str
) -> None:
    shutil.copytree(tiny_adapters / "reasoner", tmp_path / "reasoner")
    file = tmp_path / "reasoner" / "adapter_config.json"
    file.write_text(json.dumps(read_json(file) | {key: [1]}))
    with pytest.raises(ModelError, match="vLLM does not serve"):
        vllm_command(find_base(tiny_base), find_adapters(tmp_path))


def test_the_command_is_printed(r4r: R4r, tiny_base: Path, tiny_adapters: Path) -> None:
    done = r4r("serve-command", "--base", tiny_base, "--adapters", tiny_adapters)
    assert done.code == 0
    assert done.out.startswith(f"vllm serve {tiny_base} ")
    assert f"predictor={tiny_adapters / 'predictor'}" in done.out
    assert r4r("serve-command", "--base", tiny_base, "--port", "0").code == 2

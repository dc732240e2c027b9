"""`r4r serve-command`: the command line with which vLLM serves a base model and its adapters."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from r4r_graph.cli.options import AdaptersOption, BaseOption, DtypeOption, MismatchOption, err
from r4r_graph.engine.adapters import Adapter, check_adapter, find_adapters
from r4r_graph.engine.model_files import read_json
from r4r_graph.engine.weights import DTYPES, BaseModel, find_base
from r4r_graph.errors import ModelError, SettingError

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `--max-lora-rank` (0.32, `vllm/config/lora.py`)."""


def serve_command(
    base: BaseOption = "smollm2-135m",
    adapters: AdaptersOption = None,
    host: Annotated[str, typer.Option(help="Where the server listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="On which port.")] = 8000,
    dtype: DtypeOption = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the base model there; default: its own.")
    ] = None,
    allow_prompt_mismatch: MismatchOption = False,
) -> None:
    """Print the command that serves base model and adapters with vLLM, for `--engine`."""
    from r4r_graph.prompts import prompt_digests

    found = find_base(base)
    known = find_adapters(adapters, found)
    digests = prompt_digests()
    for expert, adapter in known.items():
        for note in check_adapter(
            adapter, found, digests[expert], allow_prompt_mismatch=allow_prompt_mismatch
        ):
            err.print(note, style="yellow", markup=False, soft_wrap=True)
    if not known:
        err.print("no adapters: the base model alone, untrained", style="yellow")
    typer.echo(shlex.join(vllm_command(found, known, host=host, port=port, dtype=dtype, name=name)))


def vllm_command(
    base: BaseModel,
    adapters: Mapping[str, Adapter],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str | None = None,
    name: str | None = None,
) -> Sequence[str]:
    """The command line, part by part.

    Args:
        base: the base model.
        adapters: by the names that they are to be served under.
        host: where the server listens.
        port: on which port.
        dtype: None leaves it to vLLM: 16 bits, where the machine has them.
        name: of the base model; None: its own.

    Raises:
        SettingError: a bad port or dtype.
        ModelError: an adapter of a kind that vLLM does not serve.
    """
    if not 0 < port < 65536:
        raise SettingError(f"bad port {port}: 1 to 65535")
    if dtype not in (None, *DTYPES):
        raise SettingError(f"bad dtype {dtype!r}: one of {', '.join(DTYPES)}")
    command = ["vllm", "serve", str(base.path), "--served-model-name", name or base.name]
    command += ["--host", host, "--port", str(port), "--dtype", dtype or "auto"]
    # Sampling as each request says, not as the model's own settings do.
    command += ["--generation-config", "vllm"]
    if not adapters:
        return command
    rank = max(map(_rank, adapters.values()))
    allowed = next((most for most in RANKS if most >= rank), None)
    if allowed is None:
        raise ModelError(f"an adapter of rank {rank}: vLLM serves ranks up to {RANKS[-1]}")
    # One place more than adapters: on CPUs vLLM (to 0.32 at least, its pull request 48421) gives
    # requests of the base model the adapter in the last place where they share a batch with others.
    places = str(len(adapters) + 1)
    command += ["--enable-lora", "--max-loras", places, "--max-lora-rank", str(allowed)]
    modules = [f"{expert}={adapter.path}" for expert, adapter in adapters.items()]
    return [*command, "--lora-modules", *modules]


def _rank(adapter: Adapter) -> int:
    """The greatest rank in an adapter."""
    config: dict[str, Any] = read_json(adapter.path / "adapter_config.json")
    kinds = {
        "use_dora": "DoRA",
        "alora_invocation_tokens": "activated LoRA",
        "modules_to_save": "with whole layers of its own",
        "trainable_token_indices": "with tokens of its own",
    }
    for key, kind in kinds.items():
        if config.get(key):
            raise ModelError(
                f"the {adapter.expert} adapter {adapter.path} is {kind}, which vLLM does not "
                "serve; train a plain LoRA, or use the local engine"
            )
    return max(int(config["r"]), *map(int, (config.get("rank_pattern") or {"": 0}).values()))

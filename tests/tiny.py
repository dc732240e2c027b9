"""A tiny base model and tiny adapters, random but complete, for tests of the mechanics.

Everything is seeded: the same arguments write the same weights.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

HEADERS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
"""A template of another family: a beginning of sequence, headers, an end of its own."""

SENTENCES = [
    "The guitar is warm and the drums are too loud for my ears.",
    "I loved the first half of the film, but the ending was rushed.",
    "Great songs, poor recording: I would buy it again for the lyrics.",
    "Positive: melody, voice. Negative: price, length. Values: honesty, craft.",
    "The user gave 4 stars on 2014-03-05 and 2.5 stars to item B00X7.",
    '{"positive": ["catchy hooks"], "negative": [], "values": ["replay value"]}',
    "user assistant system rating rationale summary review album film",
]


def make_tiny_base(
    path: Path, seed: int = 0, hidden: int = 32, style: str = "chatml", family: str = "llama"
) -> Path:
    """Write a random two-layer Llama (or Qwen3) with its tokenizer to `path`; returns `path`.

    float32 safetensors, 2,048 positions, tied embeddings, a byte-level BPE whose digits are
    single tokens, ChatML with `<|im_end|>` as the end. With style `headers` the chat template is
    of another family, and the embeddings are not tied.
    """
    import torch
    import transformers

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(style)
    names = {"llama": "Llama", "qwen3": "Qwen3"}
    make_config: Any = getattr(transformers, f"{names[family]}Config")
    make_model: Any = getattr(transformers, f"{names[family]}ForCausalLM")
    config = make_config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        head_dim=hidden // 4,
        tie_word_embeddings=style == "chatml",
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_adapter(
    base_dir: Path,
    out: Path,
    *,
    expert: str,
    seed: int,
    prompt_digest: str | None = None,
    base_digest: str | None = None,
    rank: int = 4,
    activated: bool = False,
) -> Path:
    """Write a random LoRA adapter (all linear layers) for the model in `base_dir` to `out`; an
    activated one adapts only a prompt's last turn.

    Its B matrices are not zero, so that it changes what the model says. With a prompt or base
    digest an `r4r.json` is written beside it; without either there is none.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from r4r_graph.engine.tokens import HubTokenMeter

    opening = None
    if activated:
        opening = list(HubTokenMeter(AutoTokenizer.from_pretrained(base_dir)).task_opening)
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        init_lora_weights=False,
        alora_invocation_tokens=opening,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT reads `is_gradient_checkpointing`, which Transformers has renamed
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_check")
        torch.manual_seed(seed)
        model = get_peft_model(base, config)
        model.save_pretrained(str(out))
    note: dict[str, Any] = {"expert": expert, "base_model": base_dir.name}
    if base_digest is not None:
        note["base_digest"] = base_digest
    if prompt_digest is not None:
        note["prompt"] = {"name": expert, "version": 1, "digest": prompt_digest}
    if len(note) > 2:
        (out / "r4r.json").write_text(json.dumps(note, indent=2), encoding="utf-8")
    return out


def _tokenizer(style: str = "chatml") -> Any:
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    headers = style == "headers"
    begin, end = ("<|begin|>", "<|eot_id|>") if headers else ("<|im_start|>", "<|im_end|>")
    more = ["<|start_header_id|>", "<|end_header_id|>"] if headers else []
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", begin, end, *more],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    make: Any = transformers.PreTrainedTokenizerFast
    fast = make(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        unk_token="<|endoftext|>",
        pad_token=end,
        additional_special_tokens=more,
        padding_side="left",
        model_max_length=2048,
    )
    fast.chat_template = HEADERS if headers else CHATML
    return fast

"""Token arithmetic of a Hugging Face tokenizer, and prompts through its chat template."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from r4r_graph.engine.base import Message
from r4r_graph.errors import ModelError


class HubTokenMeter:
    """Token arithmetic of a Hugging Face tokenizer, and its chat template."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                f"{tokenizer.name_or_path} has no chat template; use an instruction-tuned model"
            )
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # fast tokenizers change settings in place while encoding
        added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        self.special_tokens: tuple[str, ...] = tuple(
            sorted({*tokenizer.all_special_tokens, *added} - {""})
        )
        self._shape = next(filter(self._renders, (_as_is, _merged, _without_system)), None)
        if self._shape is None:
            raise ModelError(f"the chat template of {tokenizer.name_or_path} renders no prompt")

    def count(self, text: str) -> int:
        """Tokens in `text`."""
        with self._lock:
            return len(self._tokenizer.encode(text, add_special_tokens=False))

    def head(self, text: str, limit: int) -> str:
        """The longest beginning of `text` of at most `limit` tokens."""
        with self._lock:
            encoded = self._tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
        offsets = encoded["offset_mapping"]
        if len(offsets) <= limit:
            return text
        for at in range(limit, 0, -1):
            end = offsets[at - 1][1]
            # Tokens that share one character share its end, too; and a beginning may be split up
            # otherwise than the same words in a longer text.
            if end <= offsets[at][0] and self.count(text[:end]) <= limit:
                return text[:end]
        return ""

    def turns(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """The messages as this chat template takes them: some refuse a system turn, some two user
        turns in a row."""
        assert self._shape is not None
        return self._shape(messages)

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of a whole prompt, up to where the answer begins. The template writes the
        only beginning-of-sequence token there is."""
        turns = self.turns(messages)
        with self._lock:
            encoded = self._tokenizer.apply_chat_template(
                turns,
                tokenize=True,
                return_dict=True,
                add_generation_prompt=True,
                enable_thinking=False,
            )
        return tuple(encoded["input_ids"])

    def answer(self, text: str) -> tuple[int, ...]:
        """Token ids of an answer, as a model is trained to write it after `prompt`: the text and
        the token that ends an assistant's turn in this chat template."""
        with self._lock:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
        return (*ids, self.turn_end)

    @cached_property
    def turn_end(self) -> int:
        """The token that ends an assistant's turn.

        Raises:
            ModelError: the chat template writes no such token.
        """
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\u2042"}]
        with self._lock:
            whole = self._tokenizer.apply_chat_template(turns, tokenize=False)
            behind = self._tokenizer.encode(
                whole.rpartition("\u2042")[2].strip(), add_special_tokens=False
            )
        if not behind or behind[0] not in self._tokenizer.added_tokens_decoder:
            raise ModelError(
                f"the chat template of {self._tokenizer.name_or_path} ends no assistant's turn "
                "with a token of its own"
            )
        return int(behind[0])

    @cached_property
    def task_opening(self) -> tuple[int, ...]:
        """The tokens that open the last of two user turns: where an activated LoRA begins.

        Raises:
            ModelError: this chat template cannot have two user turns in a row.
        """
        if self._shape is _merged or self._shape is _without_system:
            raise ModelError(
                f"the chat template of {self._tokenizer.name_or_path} joins context and task into "
                "one turn; an activated LoRA needs a turn of its own for the task"
            )
        before = [Message("system", "s"), Message("user", "c")]
        one, two = (self.prompt([*before, Message("user", task)]) for task in ("a", "b"))
        bare = self.prompt(before)
        begin, end = _common(bare, one), _common(one, two)
        # One token earlier: the token that begins every turn.
        return one[begin - 1 : end]

    def context_length(self, ids: Sequence[int]) -> int:
        """How many tokens of a prompt precede its task: up to the last place where `task_opening`
        stands, as PEFT finds where an activated LoRA begins. 0 where there is no such place."""
        try:
            opening = self.task_opening
        except ModelError:
            return 0
        return max(opening_of(ids, opening), 0)

    def _renders(self, shape: Callable[[Sequence[Message]], list[dict[str, str]]]) -> bool:
        """Whether the template accepts turns of this shape: some refuse a system turn, some two
        user turns in a row."""
        probe = [Message("system", "a"), Message("user", "b"), Message("user", "c")]
        try:
            self._tokenizer.apply_chat_template(shape(probe), tokenize=False)
        except Exception:  # templates raise what they like
            return False
        return True


def opening_of(ids: Sequence[int], opening: Sequence[int]) -> int:
    """The last place where `opening` stands in `ids`; -1 if there is none."""
    size = len(opening)
    return next(
        (i for i in range(len(ids) - size, -1, -1) if tuple(ids[i : i + size]) == tuple(opening)),
        -1,
    )


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _as_is(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def _merged(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Neighbouring turns of one role, joined."""
    turns: list[dict[str, str]] = []
    for message in messages:
        if turns and turns[-1]["role"] == message.role:
            turns[-1]["content"] += "\n\n" + message.content
        else:
            turns.append({"role": message.role, "content": message.content})
    return turns


def _without_system(messages: Sequence[Message]) -> list[dict[str, str]]:
    return _merged([Message("user" if m.role == "system" else m.role, m.content) for m in messages])

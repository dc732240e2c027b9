"""Constrained decoding with Outlines: the aspect format, and ratings from one forward pass.

Outlines compiles a regular expression over the tokenizer's vocabulary into an automaton of tokens
(`outlines_core.Index`). Both uses walk that automaton directly: the library's own logits processor
compiles a torch kernel on first use (about 20 s), and knows neither rows that were stopped early
nor a token budget.

Both grammars end with a new line that stands for the end token. In an `Index`, a place where the
text may end *or* go on for more than one token loses the second way (outlines_core 0.2.14: a match
is seen one byte late), so `1` would never become `1.5`; with the new line no such place exists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from r4r_graph.engine import aspects
from r4r_graph.errors import ModelError
from r4r_graph.ratings import RatingDistribution, RatingScale

if TYPE_CHECKING:
    import torch

MAX_PHRASE_TOKENS = 12
"""A phrase that runs on is ended here."""

REPEATS = "a repeated phrase ends its list"
"""Small models repeat a phrase until the budget is gone, and have no tokens left for the lists
after it. The parser drops the repeat."""

GRAMMAR_FACTS = (aspects.GRAMMAR_VERSION, aspects.GRAMMAR, MAX_PHRASE_TOKENS, REPEATS)
"""What decides the form of an aspect summary; part of the summary cache's key."""


class Grammars:
    """Automata over one tokenizer's vocabulary, each compiled once.

    Not thread-safe, as Outlines is not: the engine's one thread uses it.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        import outlines
        from outlines.backends.outlines_core import OutlinesCoreBackend

        to_text = outlines.from_transformers(model, tokenizer).tokenizer.convert_token_to_string
        control = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        plain = {token: i for token, i in tokenizer.get_vocab().items() if i not in control}
        self.eos: int = tokenizer.eos_token_id
        self.token_text: dict[int, str] = {i: to_text(token) for token, i in plain.items()}
        self._vocabulary = OutlinesCoreBackend.create_outlines_core_vocabulary(
            plain, self.eos, tokenizer.eos_token, to_text
        )
        self._compiled: dict[str, Any] = {}

    def index(self, pattern: str) -> Any:
        """The `outlines_core.Index` of a regular expression."""
        from outlines_core import Index

        if pattern not in self._compiled:
            self._compiled[pattern] = Index(pattern, self._vocabulary)
        return self._compiled[pattern]

    @cached_property
    def token_of(self) -> dict[str, int]:
        """Text to the token that spells it."""
        return {text: i for i, text in sorted(self.token_text.items(), reverse=True) if text}

    @cached_property
    def boundaries(self) -> list[int]:
        """Tokens that end a phrase: those that begin with `;` or a new line, and the end token."""
        ends = [i for i, text in self.token_text.items() if text.startswith((";", "\n"))]
        return [*ends, self.eos]

    @cached_property
    def separators(self) -> list[int]:
        """Tokens that end a phrase and begin another one."""
        return [i for i, text in self.token_text.items() if text.startswith(";")]

    @cached_property
    def line_ends(self) -> list[int]:
        """Tokens with a new line in them."""
        return [i for i, text in self.token_text.items() if "\n" in text]

    @cached_property
    def new_line(self) -> int:
        """The token of a new line alone."""
        return self.token_of["\n"]

    @cached_property
    def shortest_aspects(self) -> int:
        """Tokens of the shortest aspect summary, its end included."""
        return len(self.spell(aspects.closing(""))) + 1

    @cached_property
    def aspect_margin(self) -> int:
        """By how many tokens the closing of an aspect summary may grow when one token is added:
        after `;`, or after a token that is only a part of the next word of the closing."""
        whole = aspects.closing("")
        costs = [len(self.spell(whole[at:])) for at in range(len(whole) + 1)]
        grown = [max(costs[at:]) - cost for at, cost in enumerate(costs)]
        ends = [at for at in range(len(whole) + 1) if whole[at:].startswith("\n") or not whole[at:]]
        listed = [
            len(self.spell(f" {aspects.EMPTY}{whole[at:]}")) - min(costs[at - 4 : at + 1])
            for at in ends
        ]
        return max(*grown, *listed)

    def spell(self, text: str) -> list[int]:
        """Tokens that spell `text`, the longest first at each place; every step of it is a step
        of the automaton, which a tokenizer's own segmentation need not be."""
        ids, at = [], 0
        while at < len(text):
            end = next(e for e in range(len(text), at, -1) if text[at:e] in self.token_of)
            ids.append(self.token_of[text[at:end]])
            at = end
        return ids


class AspectDecoder:
    """Keeps one row inside the aspect format, and closes the format within its token budget."""

    def __init__(self, grammars: Grammars, vocabulary: int, budget: int) -> None:
        import torch
        from outlines_core import Guide

        self._grammars = grammars
        self._guide = Guide(grammars.index(aspects.GRAMMAR))
        self._bitmask = torch.zeros((vocabulary + 31) // 32, dtype=torch.int32)
        self._left = budget
        self._text = ""
        self._phrase_tokens = 0
        self._closing: list[int] = []

    def advance(self, token: int) -> None:
        """Take in the token that was chosen."""
        self._left -= 1
        if token == self._grammars.eos:
            return
        self._guide.advance(token_id=token, return_tokens=False)
        piece = self._grammars.token_text[token]
        self._text += piece
        self._phrase_tokens = 0 if ";" in piece or "\n" in piece else self._phrase_tokens + 1

    def allowed(self) -> torch.Tensor:
        """Mask over the vocabulary (bool, shape (V,)): what may come next."""
        import torch

        bitmask = self._bitmask
        self._guide.write_mask_into(bitmask.data_ptr(), bitmask.numel(), bitmask.element_size())
        bits = bitmask.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)
        mask = (bits & 1).bool().flatten()
        if self._text.count("\n") == len(aspects.SECTIONS) - 1:  # a new line would end the answer
            may_end = bool(mask[self._grammars.new_line])
            mask[self._grammars.line_ends] = False
            mask[self._grammars.eos] = may_end
        if self._closing or self._must_close():
            token = self._closing.pop(0) if self._closing else self._grammars.eos
            if mask[token]:
                only = torch.zeros_like(mask)
                only[token] = True
                return only
            self._closing = []
        if aspects.repeats(self._text):
            mask[self._grammars.separators] = False
        if self._phrase_tokens >= MAX_PHRASE_TOKENS and aspects.in_phrase(self._text):
            ends = torch.zeros_like(mask)
            ends[self._grammars.boundaries] = True
            if (mask & ends).any():
                return mask & ends
        return mask

    def _must_close(self) -> bool:
        """Whether another free token might leave too few to close; fills in how to close."""
        spare = self._left - self._grammars.aspect_margin - 2  # that token and the end token
        if spare >= self._grammars.shortest_aspects + self._grammars.aspect_margin:
            return False
        self._closing = self._grammars.spell(aspects.closing(self._text))
        if spare >= len(self._closing):
            self._closing = []
            return False
        return True


@dataclass(frozen=True)
class _Branch:
    """A place in the automaton where the answer is still open."""

    prefix: tuple[int, ...]
    steps: Mapping[int, int | _Branch]
    """Token to the index of the value it completes, or to the next open place."""


class RatingReadout:
    """Reads a distribution over a scale out of logits, masked to the scale's values.

    The automaton of the scale's labels is walked once: each of its open places (one for 1-5; also
    the one after `1` for 1-10, where `1` may end or go on to `10`) needs the logits at one
    position. The positions lie along `probes`, token prefixes to append to the prompt, so that
    one forward pass over prompt-plus-probe rows holds all of them.
    """

    def __init__(self, grammars: Grammars, scale: RatingScale) -> None:
        self.scale = scale
        # The automaton prefers the first alternative that matches: 10 must come before 1.
        longest_first = sorted(scale.labels, key=len, reverse=True)
        pattern = "(" + "|".join(map(re.escape, longest_first)) + ")\n"
        try:
            self._index = grammars.index(pattern)
        except ValueError:  # no way through the automaton at all
            raise self._unspellable(scale.labels) from None
        self._grammars = grammars
        self.root = self._branch(self._index.get_initial_state(), (), "")
        spelled = set(_completed(self.root))
        if missing := [v for i, v in enumerate(scale.labels) if i not in spelled]:
            raise self._unspellable(missing)
        opened = list(_open(self.root))
        prefixes = [branch.prefix for branch in opened]
        self.probes: list[tuple[int, ...]] = [
            p for p in prefixes if not any(q != p and q[: len(p)] == p for q in prefixes)
        ]
        """Longest open prefixes; `[()]` when one position is enough."""

    def _branch(self, state: int, prefix: tuple[int, ...], text: str) -> _Branch:
        steps: dict[int, int | _Branch] = {}
        ends = self._grammars.new_line
        for token in self._index.get_allowed_tokens(state) or []:
            spelled = text + self._grammars.token_text[token]
            if token == ends:
                steps[self._grammars.eos] = self.scale.labels.index(text)
            elif "\n" not in spelled:
                after = self._index.get_next_state(state, token)
                onward = self._index.get_allowed_tokens(after) or []
                if all("\n" in self._grammars.token_text[t] for t in onward):
                    steps[token] = self.scale.labels.index(spelled)
                else:
                    steps[token] = self._branch(after, (*prefix, token), spelled)
        return _Branch(prefix, steps)

    @staticmethod
    def _unspellable(labels: Sequence[str]) -> ModelError:
        return ModelError(f"this tokenizer has no tokens for the ratings {', '.join(labels)}")

    def read(self, log_probs: Mapping[tuple[int, ...], torch.Tensor]) -> RatingDistribution:
        """The distribution from log-probabilities (shape (V,), unmasked) after each open prefix.

        `mass` is the raw probability, before any mask, that the answer begins with a rating.
        """
        import torch

        totals = [0.0] * len(self.scale.values)

        def walk(branch: _Branch, weight: float) -> float:
            tokens = list(branch.steps)
            raw = log_probs[branch.prefix][tokens].double()
            masked = torch.softmax(raw, dim=0).tolist()
            for token, p in zip(tokens, masked, strict=True):
                step = branch.steps[token]
                if isinstance(step, int):
                    totals[step] += weight * p
                else:
                    walk(step, weight * p)
            return float(raw.exp().sum())

        mass = walk(self.root, 1.0)
        whole = sum(totals)
        return RatingDistribution(self.scale, tuple(t / whole for t in totals), min(mass, 1.0))


def _open(branch: _Branch) -> Sequence[_Branch]:
    deeper = [step for step in branch.steps.values() if isinstance(step, _Branch)]
    return [branch, *(inner for step in deeper for inner in _open(step))]


def _completed(branch: _Branch) -> Iterator[int]:
    """Indices of the values that can be completed from here on."""
    for step in branch.steps.values():
        if isinstance(step, int):
            yield step
        else:
            yield from _completed(step)

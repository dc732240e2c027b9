"""Contexts that are read once: the keys and values of a prompt's beginning, kept for the next one.

Prompts put the context first and the task last. So twenty candidates of one user begin alike, and
where the adapters are activated LoRA (arXiv 2512.17910), which leave the context to the base model,
reasoner and predictor read one context between them. A `ContextCache` holds the keys and values of
the latest contexts; what a new context has in common with one of them is not computed again.

Only for models whose every layer attends to all positions: a sliding window's cache cannot be cut.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CONTEXT_CACHE_MB = 512
"""A dozen contexts of the default model at its longest, several dozen usual ones."""

LEAST = 64
"""Tokens in common from which on sharing costs less than it saves."""

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Context:
    """A prompt's beginning and what attention keeps of it."""

    ids: Ids
    keys: torch.Tensor
    """Shape (layers, heads, tokens, width), as `values`."""
    values: torch.Tensor

    @property
    def size(self) -> int:
        """Bytes held."""
        return 2 * self.keys.numel() * self.keys.element_size()


class ContextCache:
    """The latest contexts of one model, within a limit. Not thread-safe: the engine's thread owns
    it.

    Args:
        body: the model without its head, adapters and all: called under whatever adapter is set.
        pad: the token that fills rows up.
        limit: bytes to hold at most; what a batch needs while it runs comes on top. With 0 every
            context is read from its beginning.
    """

    def __init__(self, body: Any, pad: int, limit: int) -> None:
        self._body = body
        self._pad = pad
        self._limit = limit
        self._held: OrderedDict[tuple[str, Ids], Context] = OrderedDict()
        self._bytes = 0
        # Transformers 5.24 renamed it.
        known = inspect.signature(type(body).forward).parameters
        self.argument = "cache" if "cache" in known else "past_key_values"
        self.reused_tokens = 0
        """Token positions that were not computed again."""

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether every layer of a model attends to all positions."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        layers = DynamicCache(config=model.config).layers
        return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)

    def pays(self, space: str, wanted: Sequence[Ids]) -> bool:
        """Whether any of these contexts has enough in common with another or with one held."""
        ordered = sorted(wanted)
        return any(_common(one, other) >= LEAST for one, other in pairwise(ordered)) or any(
            self._nearest(space, ids)[1] >= LEAST for ids in wanted
        )

    def read(self, space: str, wanted: Sequence[Ids]) -> list[Context]:
        """The contexts, computed where they are not held.

        Args:
            space: under which adapter they are read; contexts of two spaces have nothing in
                common.
            wanted: each context's tokens, none empty.
        """
        found: dict[Ids, Context] = {}
        for ids in wanted:
            if (held := self._held.get((space, ids))) is not None:
                self._held.move_to_end((space, ids))
                self.reused_tokens += 0 if ids in found else len(ids)
                found[ids] = held
        fresh = sorted(set(wanted) - set(found))
        leaders: list[Ids] = []
        followers: list[Ids] = []
        for ids in fresh:
            # In sorted order, what begins alike stands together.
            alike = self._limit and leaders and _common(leaders[-1], ids) >= LEAST
            known = alike or self._nearest(space, ids)[1] >= LEAST
            (followers if known else leaders).append(ids)
        for some in (leaders, followers):
            for context in self._compute(space, some) if some else ():
                found[context.ids] = context
                self._held[space, context.ids] = context
                self._bytes += context.size
        while self._bytes > self._limit:
            _, oldest = self._held.popitem(last=False)
            self._bytes -= oldest.size
        self.reused_tokens += sum(map(len, wanted)) - sum(map(len, set(wanted)))
        return [found[ids] for ids in wanted]

    def join(self, contexts: Sequence[tuple[Context | None, int]]) -> tuple[Any, torch.Tensor]:
        """A cache for a batch whose rows begin with the first so many tokens of these contexts,
        and its attention mask (rows, longest)."""
        import torch
        from transformers import DynamicCache

        width = max(length for _, length in contexts)
        mask = torch.tensor(
            [[0] * (width - length) + [1] * length for _, length in contexts],
            device=self._body.device,
        )
        cache = DynamicCache(config=self._body.config)
        known = next((context for context, _ in contexts if context is not None), None)
        if width == 0 or known is None:
            return cache, mask
        layers, heads, _, wide = known.keys.shape
        shape = (layers, len(contexts), heads, width, wide)
        keys, values = known.keys.new_zeros(shape), known.values.new_zeros(shape)
        for row, (context, length) in enumerate(contexts):
            if context is not None and length:
                keys[:, row, :, width - length :] = context.keys[:, :, :length]
                values[:, row, :, width - length :] = context.values[:, :, :length]
        for layer in range(layers):
            cache.update(keys[layer], values[layer], layer)
        return cache, mask

    def clear(self) -> None:
        """Let go of everything."""
        self._held.clear()
        self._bytes = 0

    def _nearest(self, space: str, ids: Ids) -> tuple[Context | None, int]:
        """The held context that begins most alike, and how many tokens long. The last token is
        always left to compute: a pass needs one."""
        best: tuple[Context | None, int] = (None, 0)
        for (where, _), context in self._held.items():
            if where == space and (same := _common(context.ids, ids)) > best[1]:
                best = context, min(same, len(ids) - 1)
        return best if best[1] >= LEAST else (None, 0)

    def _compute(self, space: str, wanted: Sequence[Ids]) -> list[Context]:
        """One pass over what these contexts do not share with those held."""
        import torch

        begun = [self._nearest(space, ids) for ids in wanted]
        self.reused_tokens += sum(length for _, length in begun)
        rests = [ids[length:] for ids, (_, length) in zip(wanted, begun, strict=True)]
        width = max(map(len, rests))
        cache, before = self.join(begun)
        ids = torch.tensor(
            [[self._pad] * (width - len(rest)) + list(rest) for rest in rests],
            device=before.device,
        )
        mask = torch.tensor(
            [[0] * (width - len(rest)) + [1] * len(rest) for rest in rests], device=before.device
        )
        mask = torch.cat([before, mask], dim=1)
        self._body(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask)[:, -width:],
            use_cache=True,
            **{self.argument: cache},
        )
        real = mask.bool()
        return [
            Context(
                ids_of,
                torch.stack([layer.keys[row][:, real[row]] for layer in cache.layers]),
                torch.stack([layer.values[row][:, real[row]] for layer in cache.layers]),
            )
            for row, ids_of in enumerate(wanted)
        ]


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids of rows whose real tokens `mask` marks, wherever padding stands."""
    where: torch.Tensor = (mask.cumsum(-1) - 1).clamp(min=0)
    return where


def _common(a: Ids, b: Ids) -> int:
    """Length of the common beginning."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    low, high = 0, limit  # tuples compare in C: halving beats a loop over hundreds of tokens
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low

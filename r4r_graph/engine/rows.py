"""Each row of a batch on its own: its seed, its grammar, its repeats, its end, its listener.

Two hooks into transformers' `generate` do it: a logits processor that leaves each row's chosen
token as the greatest logit, and a stopping rule that ends rows one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from transformers import LogitsProcessor, StoppingCriteria

from r4r_graph.engine.base import GenerateRequest, GenerateResult
from r4r_graph.engine.batching import Row
from r4r_graph.engine.decoding import AspectDecoder, Grammars

if TYPE_CHECKING:
    import torch


class RowSampler(LogitsProcessor):
    """Grammar, repeats, temperature, top-p, noise per row; then greedy decoding picks the sample.

    Adding Gumbel noise to log-probabilities and taking the greatest is a draw from them. The noise
    comes from a generator of the row's own, so the sample does not depend on the batch.
    """

    def __init__(
        self,
        requests: Sequence[GenerateRequest],
        width: int,
        grammars: Grammars,
        done: Sequence[bool],
    ) -> None:
        self._requests = requests
        self._width = width
        self._grammars = grammars
        self._done = done  # the stopper's, up to date
        self._decoders: list[AspectDecoder | None] = []
        self._noise: list[torch.Generator | None] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores of shape (rows, vocabulary), changed in place of the rows that need it."""
        import torch

        if input_ids.shape[1] == self._width:
            self._begin(scores)
        else:
            self._advance(input_ids[:, -1].tolist())
        for i, request in enumerate(self._requests):
            if self._done[i]:
                continue
            if (decoder := self._decoders[i]) is not None:
                mask = decoder.allowed()[: scores.shape[1]].to(scores.device)
                scores[i] = scores[i].masked_fill(~mask, -torch.inf)
            if request.no_repeat:
                answer = input_ids[i, self._width :].tolist()
                if banned := _repeating(answer, request.no_repeat):
                    scores[i, banned] = -torch.inf
            if (generator := self._noise[i]) is not None:
                scores[i] = _with_noise(scores[i], request, generator)
        return scores

    def _begin(self, scores: torch.Tensor) -> None:
        import torch

        for request in self._requests:
            aspects = request.format == "aspects"
            self._decoders.append(
                AspectDecoder(self._grammars, scores.shape[1], request.max_tokens)
                if aspects
                else None
            )
            generator = None
            if request.temperature > 0:
                generator = torch.Generator(scores.device)
                generator.manual_seed(request.seed & 0x7FFF_FFFF_FFFF_FFFF)
            self._noise.append(generator)

    def _advance(self, tokens: Sequence[int]) -> None:
        for i, token in enumerate(tokens):
            # A row that is done receives padding from then on.
            if not self._done[i] and (decoder := self._decoders[i]) is not None:
                decoder.advance(token)


def _repeating(answer: Sequence[int], size: int) -> list[int]:
    """The tokens that would make the answer's last `size` tokens a run that it holds already."""
    if len(answer) < size:
        return []
    recent = list(answer[len(answer) - size + 1 :])
    return [
        answer[at + size - 1]
        for at in range(len(answer) - size + 1)
        if answer[at : at + size - 1] == recent
    ]


def _with_noise(
    scores: torch.Tensor, request: GenerateRequest, generator: torch.Generator
) -> torch.Tensor:
    import torch

    log_probs = torch.log_softmax(scores.float() / request.temperature, dim=-1)
    if request.top_p < 1:
        ordered, order = log_probs.sort(descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        log_probs[order[before >= request.top_p]] = -torch.inf
    uniform = torch.empty_like(log_probs).exponential_(generator=generator)
    return (log_probs - uniform.log()).to(scores.dtype)


class RowStopper(StoppingCriteria):
    """Ends each row by its own budget, stop texts or cancellation, and shows it as it grows."""

    def __init__(
        self,
        rows: Sequence[Row],
        width: int,
        ends: Sequence[int],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self._rows = rows
        self._width = width
        self._ends = frozenset(ends)
        self._decode = decode
        self._requests = [row.prepared.request for row in rows]
        self.done = [False] * len(rows)
        """Row by row; kept up to date."""
        self._used = [0] * len(rows)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Which rows are done, shape (rows,), bool."""
        import torch

        answers = input_ids[:, self._width :].tolist()
        for i, row in enumerate(self._rows):
            if not self.done[i]:
                self._used[i] = len(answers[i])
                self.done[i] = row.cancelled() or self._ends_now(i, row, answers[i])
        return torch.tensor(self.done, device=input_ids.device)

    def _ends_now(self, i: int, row: Row, answer: Sequence[int]) -> bool:
        request = self._requests[i]
        assert isinstance(request, GenerateRequest)
        ended = answer[-1] in self._ends
        full = len(answer) >= request.max_tokens
        if row.show is None and not request.stop:
            return ended or full
        text = self._decode(answer[:-1] if ended else answer)
        cut = _cut(text, request.stop)
        if row.show is not None:
            final = ended or full or cut is not None
            row.show(cut if cut is not None else text if final else _settled(text, request.stop))
        return ended or full or cut is not None

    def result(self, i: int, answer: Sequence[int], prompt_tokens: int) -> GenerateResult:
        """The finished row, from its padded answer ids."""
        request = self._requests[i]
        assert isinstance(request, GenerateRequest)
        answer = answer[: self._used[i]]  # without the padding behind it
        ended = answer[-1] in self._ends
        text = self._decode(answer[:-1] if ended else answer)
        cut = _cut(text, request.stop)
        return GenerateResult(
            text=text if cut is None else cut,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(answer),
            finish="stop" if ended or cut is not None else "length",
        )


def _cut(text: str, stops: Sequence[str]) -> str | None:
    """`text` up to its first stop text; None where it has none."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else None


def _settled(text: str, stops: Sequence[str]) -> str:
    """The part of a growing text that can no longer change: without a half-decoded character,
    and without what may turn out to begin a stop text."""
    text = text.rstrip("\ufffd")
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:size]):
                text = text[:-size]
                break
    return text

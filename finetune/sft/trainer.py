"""The one training loop: TRL's `SFTTrainer`, with the forward passes that our experts need.

- Text experts: cross-entropy over the completion, from logits at its positions alone. TRL's fused
  head does the same in tiles, which on a CPU takes longer than all the rest of a step.
- Rating experts read the scale's tokens at the prompt's end, in the layout of inference: left
  padding, logits at the last positions only (see `losses`).
- With activated LoRA the context's keys and values are the base model's. They are computed once a
  row, without gradient, and only the task's turn is trained (arXiv 2512.17910).

Importing this module imports torch and TRL.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import DynamicCache, trainer_pt_utils
from trl import SFTTrainer

from finetune.settings import RatingLoss
from finetune.sft.examples import context_length
from finetune.sft.losses import rating_log_probs, rating_loss
from r4r_graph.engine.contexts import positions
from r4r_graph.engine.decoding import RatingReadout
from r4r_graph.errors import DivergedError

IGNORED = -100


class Collator:
    """Rows of `input_ids`, `labels` and perhaps `target` and `rating` -> padded tensors.

    Everything is padded on the left, as at inference, so that all rows end at one position.
    """

    def __init__(
        self, pad: int, readout: RatingReadout | None, opening: Sequence[int] | None
    ) -> None:
        self._pad = pad
        self._probes = readout.probes if readout is not None else [()]
        self._opening = opening
        self._rates = readout is not None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """One batch. With an `opening` the rows are parted there into context and tail."""
        sequences, labels = [], []
        depth = max(map(len, self._probes))
        for row in rows:
            for probe in self._probes:
                fill = [self._pad] * (depth - len(probe))
                sequences.append([*row["input_ids"], *probe, *fill])
            labels.append(row["labels"])
        batch: dict[str, torch.Tensor] = {}
        if self._opening is not None:
            cuts = [context_length(sequence, self._opening) for sequence in sequences]
            contexts = [s[:cut] for s, cut in zip(sequences, cuts, strict=True)]
            batch["context_ids"], batch["context_mask"] = self._padded(contexts)
            sequences = [s[cut:] for s, cut in zip(sequences, cuts, strict=True)]
        batch["input_ids"], batch["attention_mask"] = self._padded(sequences)
        if self._rates:
            batch["targets"] = torch.tensor([row["target"] for row in rows])
            batch["ratings"] = torch.tensor([row["rating"] for row in rows])
            # The trainer counts labels that are not ignored, each row's first aside: here, one.
            batch["labels"] = torch.tensor([[IGNORED, 0]] * len(rows))
        else:
            width = batch["input_ids"].shape[1]
            batch["labels"] = torch.tensor(
                [([IGNORED] * (width - len(one)) + list(one))[-width:] for one in labels]
            )
        return batch

    def _padded(self, sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(1, *map(len, sequences))
        ids = [[self._pad] * (width - len(s)) + list(s) for s in sequences]
        mask = [[0] * (width - len(s)) + [1] * len(s) for s in sequences]
        return torch.tensor(ids), torch.tensor(mask)


class LengthGrouped(Sampler[int]):
    """Rows of like length side by side, in an order of each epoch's own.

    Transformers' sampler draws from the process's generator, which stands elsewhere when a run
    goes on in mid-epoch: the rest of the epoch would hold other rows.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self._lengths = list(lengths)
        self._batch = batch
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        grouped: Any = trainer_pt_utils.get_length_grouped_indices
        return iter(grouped(self._lengths, self._batch, generator=generator))


class ExpertTrainer(SFTTrainer):  # type: ignore[misc]
    """`SFTTrainer` with our experts' losses.

    Args:
        readout: of the rating scale, for a rating expert; None for a text expert.
        rating_weights: of the rating loss's terms.
        **settings: of `SFTTrainer`.
    """

    def __init__(
        self,
        *,
        readout: RatingReadout | None = None,
        rating_weights: RatingLoss | None = None,
        **settings: Any,
    ) -> None:
        self._readout = readout
        self._weights = rating_weights or RatingLoss()
        super().__init__(**settings)
        # Transformers 5.24 renamed it.
        known = inspect.signature(type(self._base_model()).forward).parameters
        self._cache_argument = "cache" if "cache" in known else "past_key_values"

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        passes = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        batch = self.args.train_batch_size * passes
        return LengthGrouped(rows["length"], batch, self.args.seed)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The batch's loss, a mean over tokens (texts) or rows (ratings) of the whole step."""
        assert not return_outputs  # evaluation asks for the loss alone
        self._count_tokens(inputs)
        labels = inputs["labels"]
        if self._readout is not None:
            keep = max(map(len, self._readout.probes)) + 1
        else:
            keep = int((labels != IGNORED).sum(1).max()) + 1
        logits = self._forward(model, inputs, keep)
        if self._readout is not None:
            per_row, facts = self._rating_terms(logits, inputs)
            total, count = per_row.sum(), len(per_row)
        else:
            wanted = labels[:, 1 - keep :]
            total = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1),
                wanted.flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            count = int((wanted != IGNORED).sum())
            facts = {"mean_token_accuracy": _accuracy(logits[:, :-1], wanted)}
        mode = "train" if self.model.training else "eval"
        for name, value in facts.items():
            self._metrics[mode][name].append(float(value))
        if num_items_in_batch is None:
            return total / max(count, 1)
        # All ranks' items are counted, and gradients are averaged over ranks.
        return total / torch.as_tensor(num_items_in_batch) * self.accelerator.num_processes

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One forward and backward pass; a loss that is no number ends the run at once."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise DivergedError(
                f"the loss is {float(loss)} at step {self.state.global_step + 1}; lower "
                "learning_rate, raise warmup, or train in float32"
            )
        return loss

    @torch.no_grad()
    def distributions(self, rows: Any, batch: int) -> torch.Tensor:
        """What the rating expert says of dataset rows: masked probabilities and, last, the raw
        mass on the scale; shape (rows, values + 1)."""
        assert self._readout is not None
        self.model.eval()
        found = []
        for start in range(0, len(rows), batch):
            inputs = self._prepare_inputs(
                self.data_collator([rows[i] for i in range(start, min(start + batch, len(rows)))])
            )
            with self.compute_loss_context_manager():
                logits = self._forward(self.model, inputs, max(map(len, self._readout.probes)) + 1)
            read = rating_log_probs(self._readout, self._places(logits))
            mass = read.raw.exp().sum(1, keepdim=True)
            found.append(torch.cat([read.masked.exp(), mass], dim=1).cpu())
        return torch.cat(found)

    def _forward(self, model: Any, inputs: dict[str, Any], keep: int) -> torch.Tensor:
        """Logits at the last `keep` positions, after a frozen context where there is one."""
        mask = inputs["attention_mask"]
        more: dict[str, Any] = {"use_cache": False}
        where = positions(mask)
        if "context_ids" in inputs:
            context_mask = inputs["context_mask"]
            cache = self._context_cache(inputs["context_ids"], context_mask)
            where = where + context_mask.sum(1, keepdim=True)
            mask = torch.cat([context_mask, mask], dim=1)
            more = {self._cache_argument: cache, "use_cache": True}
        logits: torch.Tensor = model(
            input_ids=inputs["input_ids"],
            attention_mask=mask,
            position_ids=where,
            logits_to_keep=keep,
            **more,
        ).logits
        return logits

    def _context_cache(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        """Keys and values of the contexts by the base model, without gradient."""
        peft_model = self.accelerator.unwrap_model(self.model)
        with torch.no_grad(), peft_model.disable_adapter():
            # The body alone: nothing reads the context's logits.
            body = self._base_model().base_model
            cache = DynamicCache(config=body.config)
            body(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions(mask),
                use_cache=True,
                **{self._cache_argument: cache},
            )
        return cache

    def _base_model(self) -> Any:
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.get_base_model()

    def _rating_terms(
        self, logits: torch.Tensor, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        assert self._readout is not None
        read = rating_log_probs(self._readout, self._places(logits))
        values = torch.tensor(self._readout.scale.values, device=logits.device)
        targets, ratings = inputs["targets"].to(values.device), inputs["ratings"].to(values.device)
        loss, terms = rating_loss(read, targets, ratings, values, self._weights)
        facts: dict[str, Any] = {name: term.detach().mean() for name, term in terms.items()}
        facts["rating_mass"] = read.raw.detach().exp().sum(1).mean()
        return loss, facts

    def _places(self, logits: torch.Tensor) -> dict[tuple[int, ...], torch.Tensor]:
        """Logits (rows, vocabulary) after each open prefix of the scale's automaton."""
        assert self._readout is not None
        probes = self._readout.probes
        return {
            probe[:at]: logits[j :: len(probes), at]
            for j, probe in enumerate(probes)
            for at in range(len(probe) + 1)
        }

    def _count_tokens(self, inputs: dict[str, Any]) -> None:
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            seen = [inputs[n].sum() for n in ("attention_mask", "context_mask") if n in inputs]
            self._total_train_tokens += int(self.accelerator.gather_for_metrics(sum(seen)).sum())
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _send_telemetry(self) -> None:
        """Nobody is told what is trained here."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None for checkpoints: the finished adapter has a card of ours."""


def _accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    valid = labels != IGNORED
    right = (logits.argmax(-1) == labels) & valid
    return float(right.sum() / valid.sum().clamp(min=1))

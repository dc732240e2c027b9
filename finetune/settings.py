"""The settings of every step, as frozen dataclasses; a recipe is a YAML file of them.

    recipe = load_recipe("finetune/recipes/smollm2-cpu.yaml", ["reviews=my.parquet"])
    train_summarizer(recipe)

A recipe holds the whole pipeline: what all steps share on top, then a section for each step. What
it leaves out has the paper's value where the paper gives one (arXiv 2502.02061, settings).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from r4r_graph.errors import SettingError
from r4r_graph.evidence import TokenBudgets
from r4r_graph.ratings import RatingScale

Targets = Literal["attention", "all-linear"]
Head = Literal["frozen", "rating_tokens", "whole"]
Eligible = Literal["all", "any_history", "both_histories"]
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]
Schedule = Literal["constant", "linear", "cosine"]
Dtype = Literal["float32", "bfloat16", "float16"]


class _Strict:
    """An unknown key in a recipe is an error, never ignored."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Domain(_Strict):
    """One of several data sets that experts are trained on together; see `finetune.domains`."""

    reviews: Path
    items: Path | None = None
    aspects: Path | None = None
    """Ready-made aspect summaries of its reviews, as `teacher.aspects`."""


@dataclass(frozen=True, kw_only=True)
class SplitSettings(_Strict):
    """By time: the first rows train, the next validate, the last test (paper: 8:1:1)."""

    train: float = 0.8
    validation: float = 0.1
    eligible: Eligible = "any_history"
    """Which reviews may be targets: all, those with an earlier review on either side, on both."""
    reward_rows: int = 8000
    """Training rows of the reward model at most; disjoint from the instruction rows. Where there
    are too few, both are cut in proportion."""
    instruction_rows: int = 12000
    averages_rows: int = 0
    """Further training rows that show the predictor ratings and averages alone. They are short and
    need neither summaries nor rationales, and teach it to read the numbers; 0 or more."""
    validation_rows: int | None = None
    """None takes all."""
    test_rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(_Strict):
    """Who labels, and what it may cost."""

    model: str = "engine"
    """`provider:model` of LangChain (`openai:gpt-4o-mini`), or `engine` for our own base model."""
    base_url: str | None = None
    """An OpenAI-compatible server."""
    temperature: float = 1.0
    concurrency: int = 16
    attempts: int = 5
    """Tries a call, with growing pauses between them."""
    token_limit: int | None = None
    """Stop, resumably, before the tokens spent (prompt and answer) pass this."""
    rows: int | None = None
    """Reviews to label; None labels all of the instruction rows' histories."""
    aspects: Path | None = None
    """Ready-made aspect summaries (Parquet), instead of asking."""
    rationales: Path | None = None
    """Ready-made rationale candidates that carry an error (Parquet), instead of asking."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings(_Strict):
    """The adapter's shape (paper: rank 16 and 8, alpha twice the rank)."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: Targets = "all-linear"
    activated: bool = False
    """Activated LoRA: adapts only the task turn, so that the context's keys and values are the
    base model's, computed once and without gradient (arXiv 2512.17910)."""
    head: Head = "frozen"
    """What else is tuned: the rating tokens' rows of the embedding, or the whole output head.
    For rating objectives."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(_Strict):
    """One training run, whatever the expert."""

    lora: LoraSettings = field(default_factory=LoraSettings)
    learning_rate: float = 3e-4
    epochs: float = 3.0
    max_steps: int = -1
    """Optimizer steps; -1 lets `epochs` decide."""
    batch: int = 16
    """Rows a step."""
    micro_batch: int = 16
    """Rows a forward pass; lower it when memory runs out, the result stays the same."""
    warmup: float = 100
    """Steps (1 or more) or a share of all steps (below 1)."""
    schedule: Schedule = "cosine"
    optimizer: Optimizer = "adamw_torch"
    weight_decay: float = 0.0
    max_length: int = 4096
    """Tokens of prompt and completion together. Histories are trimmed to their budgets before;
    a row that is still longer is left out."""
    max_left_out: float = 0.01
    """Share of rows that may be too long before the run is refused."""
    rows: int | None = None
    """Training rows at most; None takes all."""
    min_rows: int = 16
    validation_rows: int = 64
    """Rows for the validation loss."""
    confident_only: bool = True
    """Of ready-made labels that say how sure they are, take the sure ones alone."""
    save_steps: int = 100
    eval_steps: int = 100
    log_steps: int = 10
    gradient_checkpointing: bool = False
    report_to: str = "none"
    """none, tensorboard or trackio."""


@dataclass(frozen=True, kw_only=True)
class RatingLoss(_Strict):
    """Weights of the terms of a rating expert's loss; see `finetune.sft.losses`."""

    cross_entropy: float = 1.0
    emd: float = 0.0
    """Squared earth mover's distance between cumulative distributions (ordinal)."""
    squared_error: float = 0.0
    """Of the mean against the true rating (ordinal)."""
    absolute_error: float = 0.0
    """Expected distance to the true rating (ordinal)."""


@dataclass(frozen=True, kw_only=True)
class RatingTrainingSettings(TrainingSettings):
    """Training of the predictor or the reward model."""

    loss: RatingLoss = field(default_factory=RatingLoss)
    rationale_dropout: float = 0.0
    """Share of rows shown without a rationale, so that the expert can be asked without one."""
    text_dropout: float = 0.0
    """Share of rows shown with ratings and averages alone."""
    estimate_share: float = 0.0
    """How much of a row's target is what history statistics say of it instead of its one rating;
    see `finetune.estimates`."""
    averages_estimate_share: float = 0.0
    """The same for the rows of `splits.averages_rows`."""


@dataclass(frozen=True, kw_only=True)
class RejectionSettings(_Strict):
    """Rejection sampling with a hint (paper: one draw without, up to ten with)."""

    rows: int | None = None
    """Rows to sample for, or of ready-made candidates; None takes all, 0 none (then all of the
    rationales are composed)."""
    composed: int = 0
    """Instruction rows for which rationales are put together by rule, for data without a teacher;
    see `finetune.rejection.composing`. The predictor is trained on the others."""
    hinted_draws: int = 10
    temperature: float = 1.0
    top_p: float = 0.95
    tau: float = 0.1
    """Keep a rationale when the reward model's error with it, minus its error without one, is
    below this. Negative demands an improvement."""
    keep: int = 1
    """Rationales kept a row, the best first."""
    concurrency: int = 32
    min_margin: float = 0.0
    """For ready-made candidates: how much better than the row's median the best must be."""


@dataclass(frozen=True, kw_only=True)
class RationaleSettings(_Strict):
    """The reasoner's rationales for the rows that the predictor is trained and calibrated on."""

    rows: int | None = None
    concurrency: int = 64


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings(_Strict):
    """Temperature and bias on validation rows."""

    rows: int | None = None
    min_rows: int = 50
    l2: float = 1e-2
    """Pull of the biases towards 0 and of 1/temperature towards 1."""
    with_rationale: bool = True
    """Fit on distributions given the reasoner's rationales; else on those without."""


@dataclass(frozen=True, kw_only=True)
class GrpoSettings(_Strict):
    """Reinforcement of the reasoner (GRPO, arXiv 2402.03300, by TRL)."""

    learning_rate: float = 1e-5
    max_steps: int = 200
    prompts: int = 8
    """Different prompts a step."""
    group: int = 8
    """Rationales drawn a prompt."""
    micro_batch: int = 8
    temperature: float = 1.0
    beta: float = 0.0
    """Weight of the divergence from the reasoner that training began with."""
    balance: bool = False
    """Weight the reward against the skew of the ratings."""
    leak_penalty: float = 1.0
    form_penalty: float = 0.5
    rows: int | None = None
    save_steps: int = 50
    log_steps: int = 1
    report_to: str = "none"
    judge: Literal["predictor", "reward"] = "predictor"
    """Whose error is the reward."""


@dataclass(frozen=True, kw_only=True)
class Recipe(_Strict):
    """The whole pipeline."""

    reviews: Path = Path()
    items: Path | None = None
    domains: dict[str, Domain] = field(default_factory=dict)
    """Several data sets by name, in the place of `reviews`, `items` and `teacher.aspects`."""
    work: Path = Path("work")
    """Everything the pipeline makes; see `Recipe.folder`."""
    base: str = "smollm2-135m"
    scale: str = "1-5"
    history: int = 10
    """Latest reviews read on each side."""
    budgets: dict[str, int] = field(default_factory=dict)
    """Fields of `TokenBudgets`; use the same at inference."""
    seed: int = 42
    device: str | None = None
    """cpu or cuda; None takes what is there."""
    dtype: Dtype | None = None
    """None is float32 on a CPU and bfloat16 on CUDA."""
    quantize_4bit: bool = False
    """QLoRA: the base model in 4 bits (CUDA)."""
    saved_dtype: Dtype = "float32"
    """What finished adapters are written in; 16 bits halve their size."""
    threads: int | None = None
    """CPU threads of torch; None leaves them alone."""
    data_terms: str = "not stated"
    """For the model cards: whose reviews, on what terms."""
    teacher_terms: str = "not stated"
    """For the model cards: whose words the labels are, on what terms."""
    steps: tuple[str, ...] = ()
    """What `all` runs, in order; empty for the whole pipeline without `grpo`."""

    splits: SplitSettings = field(default_factory=SplitSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    summarizer: TrainingSettings = field(default_factory=lambda: TrainingSettings(epochs=5.0))
    summaries: RationaleSettings = field(default_factory=RationaleSettings)
    reward: RatingTrainingSettings = field(
        default_factory=lambda: RatingTrainingSettings(
            lora=LoraSettings(rank=8, alpha=16), learning_rate=3e-6, warmup=0.1
        )
    )
    rejection: RejectionSettings = field(default_factory=RejectionSettings)
    reasoner: TrainingSettings = field(
        default_factory=lambda: TrainingSettings(lora=LoraSettings(dropout=0.1), batch=32)
    )
    rationales: RationaleSettings = field(default_factory=RationaleSettings)
    predictor: RatingTrainingSettings = field(
        default_factory=lambda: RatingTrainingSettings(
            lora=LoraSettings(rank=8, alpha=16), learning_rate=3e-5, warmup=0.1
        )
    )
    calibrate: CalibrationSettings = field(default_factory=CalibrationSettings)
    grpo: GrpoSettings = field(default_factory=GrpoSettings)

    def folder(self, name: str) -> Path:
        """Where a step keeps what it makes: `work/name`."""
        return self.work / name

    @property
    def adapters(self) -> Path:
        """The finished experts, as `Recommender.load(adapters=...)` takes them."""
        return self.work / "adapters"

    @property
    def rating_scale(self) -> RatingScale:
        """The parsed scale."""
        return RatingScale.parse(self.scale)

    @property
    def asked(self) -> dict[str, Any]:
        """How the experts are asked, for what lies beside an adapter."""
        return {"history": self.history, "budgets": asdict(self.token_budgets)}

    @property
    def token_budgets(self) -> TokenBudgets:
        """The parsed budgets.

        Raises:
            SettingError: an unknown budget, or one too small.
        """
        if unknown := sorted(set(self.budgets) - set(TokenBudgets.__dataclass_fields__)):
            raise SettingError(f"unknown token budget {', '.join(unknown)}")
        return TokenBudgets(**self.budgets)


_RECIPE = TypeAdapter(Recipe)


def load_recipe(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), *, step: str | None = None
) -> Recipe:
    """A recipe from a YAML file.

    Args:
        path: the file, or the name of a recipe that comes with the package (`smollm2-cpu`).
        overrides: `key=value`, the value in YAML. A key is a path from the top
            (`predictor.lora.rank=8`); where the top has no such key, from the section of `step`
            (`lora.rank=8`).
        step: the step whose section short keys belong to.

    Raises:
        SettingError: the file cannot be read, or a key or value is not allowed; it names it.
    """
    shipped = Path(__file__).parent / "recipes" / f"{os.fspath(path)}.yaml"
    file = shipped if shipped.is_file() else Path(path)
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingError(f"cannot read the recipe {path}: {error}") from None
    if not isinstance(tree, dict):
        raise SettingError(f"the recipe {path} is no mapping of settings")
    for override in overrides:
        _override(tree, override, step)
    return parse_recipe(tree, where=str(path))


def parse_recipe(tree: dict[str, Any], where: str = "the recipe") -> Recipe:
    """A recipe from plain values.

    Raises:
        SettingError: a key or value is not allowed; it names it.
    """
    # A section names only what differs from this library's defaults for that very step.
    defaults = _RECIPE.dump_python(Recipe(), mode="json")
    try:
        recipe = _RECIPE.validate_python(_merged(defaults, tree))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise SettingError(f"bad setting in {where}: {place}: {first['msg']}") from None
    _check(recipe)
    return recipe


def with_folder(recipe: Recipe, work: str | os.PathLike[str]) -> Recipe:
    """The recipe, keeping what it makes elsewhere."""
    return replace(recipe, work=Path(work))


def recipe_tree(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values, everything filled in."""
    tree: dict[str, Any] = _RECIPE.dump_python(recipe, mode="json")
    return tree


def _merged(defaults: Any, given: Any) -> Any:
    if isinstance(defaults, dict) and isinstance(given, dict):
        return {
            **defaults,
            **{key: _merged(defaults.get(key), value) for key, value in given.items()},
        }
    return given


def _override(tree: dict[str, Any], override: str, step: str | None) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SettingError(f"bad override {override!r}: write it as key=value")
    path = key.split(".")
    if path[0] not in Recipe.__dataclass_fields__ and step in Recipe.__dataclass_fields__:
        path = [str(step), *path]
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SettingError(f"bad override {override!r}: the value is no YAML") from None
    if isinstance(value, str):
        value = _number(value)
    inner = tree
    for name in path[:-1]:
        inner = inner.setdefault(name, {})
        if not isinstance(inner, dict):
            raise SettingError(f"bad override {override!r}: {name} is no section")
    inner[path[-1]] = value


def _number(text: str) -> float | str:
    """YAML 1.1 reads 3e-4 as a text."""
    try:
        return float(text)
    except ValueError:
        return text


def _check(recipe: Recipe) -> None:
    """What types cannot say."""
    _ = recipe.rating_scale, recipe.token_budgets
    if recipe.domains:
        alone = {
            "reviews": recipe.reviews != Path(),
            "items": recipe.items is not None,
            "teacher.aspects": recipe.teacher.aspects is not None,
        }
        if taken := [name for name, given in alone.items() if given]:
            raise SettingError(
                f"bad setting {taken[0]}: with `domains`, each data set names its own files there"
            )
        if bad := [name for name in recipe.domains if not re.fullmatch(r"[\w-]+", name)]:
            raise SettingError(f"bad setting domains.{bad[0]}: letters, digits, '-' and '_' only")
    shares = recipe.splits
    if not (0 < shares.train < 1 and 0 <= shares.validation < 1):
        raise SettingError("bad setting splits: train and validation are shares of the rows")
    if shares.train + shares.validation >= 1:
        raise SettingError("bad setting splits: train and validation leave no rows to test on")
    for name in ("summarizer", "reward", "reasoner", "predictor"):
        _check_training(name, getattr(recipe, name))


def _check_training(name: str, settings: TrainingSettings) -> None:
    wholes = ("batch", "micro_batch", "save_steps", "eval_steps", "log_steps", "max_length")
    for field_name in wholes:
        if getattr(settings, field_name) < 1:
            raise SettingError(f"bad setting {name}.{field_name}: must be 1 or more")
    if settings.batch % settings.micro_batch:
        raise SettingError(
            f"bad setting {name}.batch={settings.batch}: must be a multiple of "
            f"micro_batch={settings.micro_batch}"
        )
    if settings.learning_rate <= 0 or settings.epochs <= 0 or settings.warmup < 0:
        raise SettingError(
            f"bad setting {name}: learning_rate and epochs must be above 0, warmup 0 or more"
        )
    if settings.lora.rank < 1 or settings.lora.alpha < 1 or not 0 <= settings.lora.dropout < 1:
        raise SettingError(f"bad setting {name}.lora: rank, alpha 1 or more, dropout below 1")
    if settings.lora.activated and settings.lora.head != "frozen":
        raise SettingError(
            f"bad setting {name}.lora: an activated adapter leaves the head as it is (head: frozen)"
        )
    if isinstance(settings, RatingTrainingSettings):
        if not any(vars(settings.loss).values()) or min(vars(settings.loss).values()) < 0:
            raise SettingError(f"bad setting {name}.loss: weights 0 or more, one above 0")
        for share in (
            "rationale_dropout",
            "text_dropout",
            "estimate_share",
            "averages_estimate_share",
        ):
            if not 0 <= getattr(settings, share) <= 1:
                raise SettingError(f"bad setting {name}.{share}: a share from 0 to 1")
    elif settings.lora.head != "frozen":
        raise SettingError(f"bad setting {name}.lora.head: only rating experts tune their head")
    if name == "summarizer" and settings.lora.activated:
        raise SettingError(
            "bad setting summarizer.lora.activated: a review is read once, there is no shared "
            "context to save"
        )

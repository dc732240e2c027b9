"""What the commands share: their options, their consoles, and how models are loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from rich.console import Console

from r4r_graph.errors import SettingError
from r4r_graph.schema import unix_seconds

if TYPE_CHECKING:
    from r4r_graph.evidence import TokenBudgets
    from r4r_graph.recommender import Recommender

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)

ReviewsOption = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help="Reviews: Parquet, CSV or JSONL (gz too), a folder of Parquet, or a database "
        "(sqlite:///FILE, postgresql+psycopg://HOST/NAME).",
    ),
]
ItemsOption = Annotated[
    Path | None, typer.Option(help="Items: item_id, title, category, description.")
]
BaseOption = Annotated[
    str, typer.Option(help="Base model: smollm2-135m, a directory, or a Hub id.")
]
AdaptersOption = Annotated[
    str | None,
    typer.Option(
        help="Folder with summarizer/, reasoner/, predictor/; none: the base model alone; left "
        "out: those that come with the package."
    ),
]
MismatchOption = Annotated[
    bool, typer.Option(help="Accept adapters trained on another version of their prompt.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]

ThreadArgument = Annotated[
    str, typer.Argument(metavar="THREAD", help="A kept run; `r4r runs` lists them.")
]
ReportOption = Annotated[
    Path | None, typer.Option(help="Also write the run as one HTML file, wherever it ends.")
]
InfluenceOption = Annotated[
    str,
    typer.Option(
        help="What moved the rating: none, same (each review left out, with the rationale as it "
        "is), or new (with a rationale written anew)."
    ),
]
HistoryOption = Annotated[
    int | None, typer.Option(help="Latest reviews read on each side; as in training if left out.")
]
RationalesOption = Annotated[
    int, typer.Option(help="Rationales to draw and mix; stops early when sure.")
]
ReadoutOption = Annotated[str, typer.Option(help="mean, median or mode.")]
ScaleOption = Annotated[str, typer.Option(help="Rating values: 1-5, 1-10, or a rising list.")]
SeedOption = Annotated[int, typer.Option(help="Decides what is sampled.")]
TimeoutOption = Annotated[
    float | None, typer.Option(help="Seconds that a run may take; default: no limit.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu or cuda; default: what is there.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; default: float32 on a CPU, else bfloat16."),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        help="A model server (http://HOST:PORT; `r4r serve-command` says how to start one) or a "
        "chat model (provider:name), instead of a model in this process. Keys: R4R_API_KEY or "
        "OPENAI_API_KEY."
    ),
]
BudgetsOption = Annotated[
    str | None,
    typer.Option(help="Token budgets the adapters were trained with, as review=224,side=256."),
]


def moment(as_of: str) -> float:
    """Unix seconds of `--as-of`.

    Raises:
        SettingError: it may be a date or seconds.
        InputError: it is no time.
    """
    if re.fullmatch(r"\d{4}|\d{8}", as_of):
        raise SettingError(
            f"--as-of {as_of} may be a date or unix seconds; write 2015-01-01 for a date, "
            f"{as_of}.0 for seconds"
        )
    return unix_seconds(as_of, what="--as-of")


def checked_knobs(**knobs: Any) -> dict[str, Any]:
    """The knobs, refused before a model is loaded where one is out of range."""
    from r4r_graph.cli.configured import further_knobs
    from r4r_graph.recommender import check_knobs

    knobs = further_knobs(knobs)
    check_knobs(knobs)
    return knobs


def parse_budgets(text: str | None) -> TokenBudgets | None:
    """Token budgets from `review=224,side=256`; what is not named keeps its default.

    Raises:
        SettingError: an unknown budget, no number, or one too small.
    """
    from r4r_graph.configuration import parse_budgets

    return parse_budgets(text, "--budgets")


LOADED = "r4r_loaded"
"""The label of a run that says what its command loaded."""


@dataclass(frozen=True)
class Sources:
    """What a command loads. Kept as a label of its run, so that the run can be gone on with: paths
    and names, never a text."""

    reviews: str | None = None
    items: str | None = None
    base: str = "smollm2-135m"
    adapters: str | None = None
    scale: str = "1-5"
    device: str | None = None
    budgets: str | None = None
    allow_prompt_mismatch: bool = False
    dtype: str | None = None
    engine: str | None = None

    def label(self) -> dict[str, str]:
        """The label, with paths that hold wherever the run is gone on with, and no password."""
        from r4r_graph.reviews.addresses import without_password

        row = asdict(self)
        if self.reviews is not None:
            row["reviews"] = without_password(self.reviews)
        for name in ("reviews", "items", "base", "adapters"):
            if row[name] is not None and Path(row[name]).exists():
                row[name] = str(Path(row[name]).absolute())
        return {LOADED: json.dumps(row)}

    @classmethod
    def of(cls, labels: Mapping[str, Any]) -> Self:
        """What a run with these labels was begun with; a run of another program has none."""
        row = json.loads(labels.get(LOADED, "{}"))
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in row.items() if name in known})

    def but(self, **given: Any) -> Self:
        """With what a person gave instead; None is not given."""
        told = {name: value for name, value in given.items() if value is not None}
        return replace(self, **told)

    def load(self, **settings: Any) -> Recommender:
        """Load it all; `settings` are further ones of `Recommender.load`."""
        return load(
            self.reviews,
            self.items,
            self.base,
            self.adapters,
            scale=self.scale,
            device=self.device,
            dtype=self.dtype,
            engine=self.engine,
            allow_prompt_mismatch=self.allow_prompt_mismatch,
            budgets=parse_budgets(self.budgets),
            **settings,
        )


def load(*arguments: Any, **settings: Any) -> Recommender:
    """Load with a spinner on stderr; the log speaks through it."""
    from r4r_graph.cli.configured import further_settings
    from r4r_graph.recommender import Recommender

    with err.status("loading reviews and models", spinner="line"):
        return Recommender.load(*arguments, **further_settings(settings))

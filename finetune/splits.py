"""Targets by time: which reviews train, validate and test, and which of them train what.

    make_splits(recipe)
    targets = read_targets(recipe, "train", "reward")

The first rows by time train, the next validate, the last test (paper: 8:1:1). All rows of one
timestamp go to one side, so every training target is strictly earlier than every validation
target, and that than every test target. Of the training rows, some train the reward model and
others, disjoint from them, teach the experts (paper: 8,000 and 12,000); a third, disjoint part may
show the predictor averages alone.

    work/splits/{train,validation,test}.parquet    the columns of a review file, and `role`
    work/splits/manifest.json                      counts, boundaries in time, fingerprints
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.domains import ALONE, by_domain, domains, in_turns, review_source
from finetune.rows import is_cold
from finetune.settings import Recipe, SplitSettings
from r4r_graph.caches import write_atomically
from r4r_graph.engine.model_files import file_digest
from r4r_graph.errors import DataError, NotReadyError, SettingError
from r4r_graph.evaluation.targets import by_lot
from r4r_graph.jobs import digest_rows, open_folder, write_table
from r4r_graph.reviews import ReviewSource
from r4r_graph.reviews.files import file_parts
from r4r_graph.reviews.table import REVIEW_SCHEMA
from r4r_graph.schema import Review

Split = Literal["train", "validation", "test"]
Role = Literal["reward", "instruction", "averages"]

SPLIT_SCHEMA = REVIEW_SCHEMA.append(pa.field("role", pa.string()))
"""Columns of each split: a review's, and what the row is for."""

_NOTHING = 1e-9  # a share of rows below this is none


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What the splits hold."""

    folder: Path
    reused: bool
    """Whether they were there already."""
    reviews: int
    """Reviews read; what repeats a review word for word counts once."""
    ineligible: int
    """Reviews that may be no target (see `SplitSettings.eligible`)."""
    reward: int
    instruction: int
    averages: int
    validation: int
    test: int
    boundaries: Mapping[str, tuple[float, float]]
    """Data set (`""` where there is but one) to unix seconds: where its validation begins, and
    where its test does. Every target of an earlier part is strictly earlier."""


def make_splits(recipe: Recipe) -> SplitReport:
    """Split the recipe's reviews into targets to train on, to validate on and to test on.

    Several data sets are split each by its own time, and take turns wherever rows are drawn.
    Which rows are taken is decided by `recipe.seed` and by the rows themselves, not by the order
    of the file. Reward rows have words, for the review itself is what that model reads.

    Raises:
        DataError: the reviews cannot be read, or are too few for one of the parts.
        SettingError: the shares cannot be; or the splits there were made of other reviews or with
            other settings.
        InputError: another process is making them.
    """
    _check(recipe.splits)
    folder = recipe.folder("splits")
    with open_folder(folder):
        made_of = _ingredients(recipe)
        earlier = _manifest(folder)
        if earlier is not None and _is_current(folder, earlier, made_of):
            return _report(folder, earlier, reused=True)
        made = _split(recipe)
        files = {name: folder / f"{name}.parquet" for name in get_args(Split)}
        for name, file in files.items():
            write_table(_table(made.parts[name]), file)
        manifest = {
            "made_of": made_of,
            "reviews": made.reviews,
            "ineligible": made.ineligible,
            "counts": made.counts,
            "times": {name: _span(part) for name, part in made.parts.items()},
            "boundaries": made.boundaries,
            "outputs": {file.name: file_digest(file) for file in files.values()},
        }
        # Last: what a killed run leaves behind has no manifest, and is made again.
        write_atomically(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        return _report(folder, manifest, reused=False)


def read_targets(recipe: Recipe, split: Split, role: Role | None = None) -> list[Review]:
    """The targets of a split, by time; of the training rows those of one role, or all that are
    shown with words.

    Raises:
        NotReadyError: the splits have not been made.
        SettingError: no such split or role.
        DataError: the file is damaged.
    """
    if split not in get_args(Split):
        raise SettingError(f"no split {split!r}: one of {', '.join(get_args(Split))}")
    if role is not None and (split != "train" or role not in get_args(Role)):
        raise SettingError(
            f"no role {role!r} in the split {split}: the roles {', '.join(get_args(Role))} are "
            "those of training rows"
        )
    folder = recipe.folder("splits")
    file = folder / f"{split}.parquet"
    if _manifest(folder) is None or not file.is_file():
        raise NotReadyError(f"{folder} has no finished splits; run the step `splits` first")
    try:
        rows = pq.read_table(file, schema=SPLIT_SCHEMA).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file} cannot be read ({str(error).splitlines()[0]:.160}); delete {folder} and run "
            "the step `splits` again"
        ) from None
    return [
        Review.from_dict(row)
        for row in rows
        if (row["role"] == role if role else row["role"] != "averages")
    ]


def training_ends(recipe: Recipe) -> dict[str, float]:
    """Data set to the time (unix seconds) from which on nothing may be learned.

    Raises:
        NotReadyError: the splits have not been made.
    """
    folder = recipe.folder("splits")
    manifest = _manifest(folder)
    if manifest is None:
        raise NotReadyError(f"{folder} has no finished splits; run the step `splits` first")
    return {name: validation for name, (validation, _) in _boundaries(manifest).items()}


# What goes where --------------------------------------------------------------------------------

_Rows = list[tuple[Review, str]]
"""Targets by time, each with its role."""


@dataclass(frozen=True)
class _Made:
    parts: dict[str, _Rows]
    reviews: int
    ineligible: int
    boundaries: dict[str, list[float]]

    @property
    def counts(self) -> dict[str, int]:
        roles = [role for rows in self.parts.values() for _, role in rows]
        return {name: roles.count(name) for name in (*get_args(Role), "validation", "test")}


@dataclass(frozen=True)
class _Domain:
    """One data set, cut by its time."""

    reviews: int
    boundaries: list[float]
    eligible: tuple[list[Review], list[Review], list[Review]]
    """Of training, validation and test."""
    found: str
    """In words, how many are eligible."""


def _split(recipe: Recipe) -> _Made:
    settings, source = recipe.splits, review_source(recipe)
    distinct = {review.key: review for review in source}.values()
    files = domains(recipe)
    cut = {
        name: _cut(str(files[name].reviews), reviews, source, settings)
        for name, reviews in by_domain(recipe, distinct).items()
    }

    def drawn(part: int, purpose: str) -> list[Review]:
        return in_turns(by_lot(one.eligible[part], recipe.seed, purpose) for one in cut.values())

    reward, instruction, averages = _roles(drawn(0, "train"), settings)
    if (settings.reward_rows and not reward) or (settings.instruction_rows and not instruction):
        named = ", ".join(str(domain.reviews) for domain in files.values())
        raise DataError(
            f"{named} has too few reviews to train on: {len(reward)} (with words) for the reward "
            f"model and {len(instruction)} for instruction; eligible are "
            f"{'; '.join(one.found for one in cut.values())}"
        )
    rows = [
        *((review, "reward") for review in reward),
        *((review, "instruction") for review in instruction),
        *((review, "averages") for review in averages),
    ]
    validation = drawn(1, "validation")[: settings.validation_rows]
    test = drawn(2, "test")[: settings.test_rows]
    reviews = sum(one.reviews for one in cut.values())
    return _Made(
        {
            "train": _by_time(rows),
            "validation": _by_time([(review, "validation") for review in validation]),
            "test": _by_time([(review, "test") for review in test]),
        },
        reviews=reviews,
        ineligible=reviews - sum(len(part) for one in cut.values() for part in one.eligible),
        boundaries={name: one.boundaries for name, one in cut.items()},
    )


def _cut(
    file: str, distinct: Iterable[Review], source: ReviewSource, settings: SplitSettings
) -> _Domain:
    """Cut one data set by its time."""
    reviews = sorted(distinct, key=lambda review: (review.timestamp, review.key))
    starts = _starts([review.timestamp for review in reviews], settings)
    whole = [reviews[: starts[0]], reviews[starts[0] : starts[1]], reviews[starts[1] :]]
    train, validation, test = (
        [review for review in part if _may_be_target(review, source, settings)] for part in whole
    )
    fit = (train, validation, test)
    found = ", ".join(
        f"{len(some)} of {len(part)} for {name}"
        for name, part, some in zip(("training", "validation", "test"), whole, fit, strict=True)
    )
    if not all(
        some or share < _NOTHING for some, share in zip(fit, _shares(settings), strict=True)
    ):
        raise DataError(
            f"{file} has too few reviews to split by time: of {len(reviews)}, "
            f"eligible (splits.eligible={settings.eligible}) are {found}"
        )
    return _Domain(len(reviews), [reviews[at].timestamp for at in starts], fit, found)


def _shares(settings: SplitSettings) -> tuple[float, float, float]:
    """Of training, validation and test."""
    return settings.train, settings.validation, 1 - settings.train - settings.validation


def _starts(times: Sequence[float], settings: SplitSettings) -> tuple[int, int]:
    """Where validation and test begin in the sorted times: at the first row of a timestamp."""
    ends = settings.train, settings.train + settings.validation
    first, second = (_edge(times, round(len(times) * min(share, 1.0))) for share in ends)
    return first, second


def _edge(times: Sequence[float], wanted: int) -> int:
    """The place nearest to `wanted` where no timestamp is cut in two."""
    if wanted >= len(times):
        return len(times)
    start, end = bisect_left(times, times[wanted]), bisect_right(times, times[wanted])
    return start if wanted - start <= end - wanted else end


def _may_be_target(review: Review, source: ReviewSource, settings: SplitSettings) -> bool:
    if settings.eligible == "all":
        return True
    cold = is_cold(review, source)
    return not all(cold) if settings.eligible == "any_history" else not any(cold)


def _roles(
    drawn: Sequence[Review], settings: SplitSettings
) -> tuple[list[Review], list[Review], list[Review]]:
    """Rows for the reward model, for instruction and with averages alone, none in two of them.
    Where there are too few for the first two, both are cut in proportion."""
    wanted = settings.reward_rows + settings.instruction_rows
    share = min(1.0, len(drawn) / wanted) if wanted else 0.0
    reward_rows = round(settings.reward_rows * share)
    reward = [review for review in drawn if review.text.strip()][:reward_rows]
    taken = {review.key for review in reward}
    rest = [review for review in drawn if review.key not in taken]
    instruction = min(settings.instruction_rows, round(wanted * share) - reward_rows)
    return reward, rest[:instruction], rest[instruction:][: settings.averages_rows]


def _by_time(rows: Iterable[tuple[Review, str]]) -> _Rows:
    return sorted(rows, key=lambda row: (row[0].timestamp, row[0].key))


# On disk ----------------------------------------------------------------------------------------


def _check(settings: SplitSettings) -> None:
    train, validation, test = _shares(settings)
    if train <= 0 or validation < 0 or test < _NOTHING:
        raise SettingError(
            f"bad shares splits.train={train:g}, splits.validation={validation:g}: the first is "
            "above 0, and together they leave a share to test on"
        )
    counts = ("reward_rows", "instruction_rows", "averages_rows", "validation_rows", "test_rows")
    for name in counts:
        if (value := getattr(settings, name)) is not None and value < 0:
            raise SettingError(f"bad setting splits.{name}={value}: a number of rows")


def _ingredients(recipe: Recipe) -> dict[str, Any]:
    """All that decides what the splits hold, by the setting's name."""
    return {
        **_files(recipe),
        "scale": recipe.scale,
        "seed": recipe.seed,
        **{f"splits.{name}": value for name, value in asdict(recipe.splits).items()},
    }


def _files(recipe: Recipe) -> dict[str, str | None]:
    """Fingerprints of the files, by the setting that names them."""
    found: dict[str, str | None] = {}
    for name, domain in domains(recipe).items():
        setting = f"domains.{name}." if name != ALONE else ""
        found[f"{setting}reviews"] = _fingerprint(domain.reviews)
        found[f"{setting}items"] = _fingerprint(domain.items) if domain.items else None
    return found


def _fingerprint(path: Path) -> str:
    """Of a file's content, or of a folder's parts."""
    return digest_rows(file_digest(part) for part in file_parts(path))


def _manifest(folder: Path) -> dict[str, Any] | None:
    """None where no run has ended yet."""
    file = folder / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        known = {"made_of", "counts", "boundaries", "outputs"} <= set(manifest)
        if known and isinstance(manifest["boundaries"], dict):
            return dict(manifest)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        pass
    raise DataError(f"{file} is damaged; delete {folder} and run the step `splits` again")


def _is_current(folder: Path, manifest: Mapping[str, Any], made_of: Mapping[str, Any]) -> bool:
    """Whether the splits are there; False where a file of theirs is missing."""
    earlier = manifest["made_of"]
    if changed := sorted(name for name in made_of if made_of[name] != earlier.get(name)):
        raise SettingError(
            f"{folder} holds the splits of other inputs or settings (different: "
            f"{', '.join(changed)}); choose another work folder, or delete {folder} and all that "
            "was made of it"
        )
    files = {folder / name: digest for name, digest in manifest["outputs"].items()}
    if not all(file.is_file() for file in files):
        return False
    if edited := [file for file, digest in files.items() if file_digest(file) != digest]:
        raise DataError(
            f"{edited[0]} was changed after it was made; delete {folder} and run the step "
            "`splits` again"
        )
    return True


def _report(folder: Path, manifest: Mapping[str, Any], *, reused: bool) -> SplitReport:
    return SplitReport(
        folder=folder,
        reused=reused,
        reviews=manifest["reviews"],
        ineligible=manifest["ineligible"],
        boundaries=_boundaries(manifest),
        **manifest["counts"],
    )


def _boundaries(manifest: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    return {
        name: (float(validation), float(test))
        for name, (validation, test) in manifest["boundaries"].items()
    }


def _span(rows: _Rows) -> list[float]:
    """First and last time of the targets (unix seconds); empty where there are none."""
    return [rows[0][0].timestamp, rows[-1][0].timestamp] if rows else []


def _table(rows: _Rows) -> pa.Table:
    return pa.Table.from_pylist(
        [{**review.to_dict(), "role": role} for review, role in rows], SPLIT_SCHEMA
    )

"""Targets by time: which reviews train, validate and test, and which of them train what.

    make_splits(recipe)
    targets = read_targets(recipe, "train", "reward")

The first rows by time train, the next validate, the last test (paper: 8:1:1). All rows of one
timestamp go to one side, so every training target is strictly earlier than every validation
target, and that than every test target. Of the training rows, some train the reward model and
others, disjoint from them, teach the experts (paper: 8,000 and 12,000).

    work/splits/{train,validation,test}.parquet    the columns of a review file, and `role`
    work/splits/manifest.json                      counts, boundaries in time, fingerprints
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.rows import is_cold, review_source
from finetune.settings import Recipe, SplitSettings
from r4r_graph.caches import write_atomically
from r4r_graph.engine.model_files import file_digest
from r4r_graph.errors import DataError, NotReadyError, SettingError
from r4r_graph.jobs import digest_rows, open_folder
from r4r_graph.reviews import ReviewSource
from r4r_graph.reviews.files import file_parts
from r4r_graph.reviews.table import REVIEW_SCHEMA
from r4r_graph.schema import Review

Split = Literal["train", "validation", "test"]
Role = Literal["reward", "instruction"]

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
    validation: int
    test: int
    boundaries: tuple[float, float]
    """Unix seconds: where validation begins, and where the test does. Every target of an earlier
    part is strictly earlier."""


def make_splits(recipe: Recipe) -> SplitReport:
    """Split the recipe's reviews into targets to train on, to validate on and to test on.

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
            _write(file, made.parts[name])
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
    """The targets of a split, by time; of the training rows all, or those of one role.

    Raises:
        NotReadyError: the splits have not been made.
        SettingError: no such split or role.
        DataError: the file is damaged.
    """
    if split not in get_args(Split):
        raise SettingError(f"no split {split!r}: one of {', '.join(get_args(Split))}")
    if role is not None and (split != "train" or role not in get_args(Role)):
        raise SettingError(
            f"no role {role!r} in the split {split}: the roles {' and '.join(get_args(Role))} are "
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
    return [Review.from_dict(row) for row in rows if role is None or row["role"] == role]


def by_lot(reviews: Iterable[Review], seed: int, purpose: str) -> list[Review]:
    """The reviews in an order drawn by the seed, a different one for each purpose.

    Each review's place depends on itself alone: the first n of them are among the first n + 1,
    and a review more or less moves no other.
    """
    return sorted(reviews, key=lambda review: _lot(review, seed, purpose))


def _lot(review: Review, seed: int, purpose: str) -> tuple[bytes, str]:
    drawn = hashlib.blake2b(f"{seed} {purpose} {review.key}".encode(), digest_size=8)
    return drawn.digest(), review.key


# What goes where --------------------------------------------------------------------------------

_Rows = list[tuple[Review, str]]
"""Targets by time, each with its role."""


@dataclass(frozen=True)
class _Made:
    parts: dict[str, _Rows]
    reviews: int
    ineligible: int
    boundaries: list[float]

    @property
    def counts(self) -> dict[str, int]:
        roles = [role for rows in self.parts.values() for _, role in rows]
        return {name: roles.count(name) for name in (*get_args(Role), "validation", "test")}


def _split(recipe: Recipe) -> _Made:
    settings, source = recipe.splits, review_source(recipe)
    distinct = {review.key: review for review in source}.values()
    reviews = sorted(distinct, key=lambda review: (review.timestamp, review.key))
    starts = _starts([review.timestamp for review in reviews], settings)
    whole = [reviews[: starts[0]], reviews[starts[0] : starts[1]], reviews[starts[1] :]]
    fit = [[r for r in part if _may_be_target(r, source, settings)] for part in whole]
    found = ", ".join(
        f"{len(some)} of {len(part)} for {name}"
        for name, part, some in zip(("training", "validation", "test"), whole, fit, strict=True)
    )
    if not all(
        some or share < _NOTHING for some, share in zip(fit, _shares(settings), strict=True)
    ):
        raise DataError(
            f"{recipe.reviews} has too few reviews to split by time: of {len(reviews)}, "
            f"eligible (splits.eligible={settings.eligible}) are {found}"
        )
    train = by_lot(fit[0], recipe.seed, "train")
    reward, instruction = _roles(train, settings)
    if (settings.reward_rows and not reward) or (settings.instruction_rows and not instruction):
        raise DataError(
            f"{recipe.reviews} has too few reviews to train on: {len(reward)} (with words) for "
            f"the reward model and {len(instruction)} for instruction; eligible are {found}"
        )
    rows = [*((r, "reward") for r in reward), *((r, "instruction") for r in instruction)]
    validation = by_lot(fit[1], recipe.seed, "validation")[: settings.validation_rows]
    test = by_lot(fit[2], recipe.seed, "test")[: settings.test_rows]
    return _Made(
        {
            "train": _by_time(rows),
            "validation": _by_time([(review, "validation") for review in validation]),
            "test": _by_time([(review, "test") for review in test]),
        },
        reviews=len(reviews),
        ineligible=len(reviews) - sum(map(len, fit)),
        boundaries=[reviews[at].timestamp for at in starts],
    )


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


def _roles(drawn: Sequence[Review], settings: SplitSettings) -> tuple[list[Review], list[Review]]:
    """Rows for the reward model and for instruction, none in both; where there are too few, both
    are cut in proportion."""
    wanted = settings.reward_rows + settings.instruction_rows
    share = min(1.0, len(drawn) / wanted) if wanted else 0.0
    reward_rows = round(settings.reward_rows * share)
    reward = [review for review in drawn if review.text.strip()][:reward_rows]
    taken = {review.key for review in reward}
    rest = [review for review in drawn if review.key not in taken]
    return reward, rest[: min(settings.instruction_rows, round(wanted * share) - reward_rows)]


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
    for name in ("reward_rows", "instruction_rows", "validation_rows", "test_rows"):
        if (value := getattr(settings, name)) is not None and value < 0:
            raise SettingError(f"bad setting splits.{name}={value}: a number of rows")


def _ingredients(recipe: Recipe) -> dict[str, Any]:
    """All that decides what the splits hold, by the setting's name."""
    return {
        "reviews": _fingerprint(recipe.reviews),
        "items": _fingerprint(recipe.items) if recipe.items is not None else None,
        "scale": recipe.scale,
        "seed": recipe.seed,
        **{f"splits.{name}": value for name, value in asdict(recipe.splits).items()},
    }


def _fingerprint(path: Path) -> str:
    """Of a file's content, or of a folder's parts."""
    return digest_rows(file_digest(part) for part in file_parts(path))


def _manifest(folder: Path) -> dict[str, Any] | None:
    """None where no run has ended yet."""
    file = folder / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if {"made_of", "counts", "boundaries", "outputs"} <= set(manifest):
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
    validation_from, test_from = map(float, manifest["boundaries"])
    return SplitReport(
        folder=folder,
        reused=reused,
        reviews=manifest["reviews"],
        ineligible=manifest["ineligible"],
        boundaries=(validation_from, test_from),
        **manifest["counts"],
    )


def _span(rows: _Rows) -> list[float]:
    """First and last time of the targets (unix seconds); empty where there are none."""
    return [rows[0][0].timestamp, rows[-1][0].timestamp] if rows else []


def _write(file: Path, rows: _Rows) -> None:
    """Readers see the old file or the new one, never a part."""
    table = pa.Table.from_pylist(
        [{**review.to_dict(), "role": role} for review, role in rows], SPLIT_SCHEMA
    )
    scratch = file.with_name(f"_{file.name}")
    pq.write_table(table, scratch)
    with scratch.open("rb") as written:
        os.fsync(written.fileno())
    scratch.replace(file)

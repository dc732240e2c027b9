"""One import: files in a public format, into a Parquet file of reviews and one of items.

    report = import_reviews("yelp", ["review.json", "business.json"], "reviews.parquet")

Three passes. The files of reviews are read row by row, cleaned, and spilled to a scratch file;
of each row four numbers stay in memory (user, item, time, and its rating and text as one), 33 bytes
with its flag. Repetitions, window and k-core are decided on these. Then the items that are left are
read for their titles, and what was spilled and is kept is written out with them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from r4r_graph.errors import DataError, SettingError, StorageError
from r4r_graph.importing.filters import distinct_pairs
from r4r_graph.importing.formats import FORMATS, TABLE, Format, recognise, table_format
from r4r_graph.importing.passes import Passes
from r4r_graph.importing.report import ImportReport, OnProgress
from r4r_graph.importing.spool import Rejects, put_in_place, scratch_folder
from r4r_graph.importing.streaming import RowFile, examine, first_rows
from r4r_graph.ratings import RatingScale

FIVE_STARS = RatingScale()


def import_reviews(
    format: str,
    files: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    items_out: str | os.PathLike[str] | None = None,
    rejects_out: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
    item_columns: Mapping[str, str] | None = None,
    scale: RatingScale = FIVE_STARS,
    k: int = 0,
    since: float | None = None,
    until: float | None = None,
    with_text: bool = False,
    on_progress: OnProgress | None = None,
) -> ImportReport:
    """Import files of reviews, and files of items for their titles.

    Repetitions are dropped first, then what lies outside the window of time, then, among what is
    left, users and items with fewer than `k` reviews (paper, experiments: data sets). The order
    of the files and of their rows is kept. Nothing is at `out` before all of it is.

    Args:
        format: one of `FORMATS`, or `table` for any CSV, JSON lines or Parquet.
        files: plain, gzip, zstd or bzip2; which of them hold reviews and which items is seen from
            their content.
        out: the file of reviews to write, a `.parquet`; see `load_reviews`.
        items_out: the catalogue to write, a `.parquet`, with the items of the reviews written;
            beside `out` by default. See `load_items`.
        rejects_out: the bad rows, as JSON lines: file, line, reason, row; beside `out` by default.
        columns: for `table`, our columns to those of the files of reviews.
        item_columns: for `table`, the same for the files of items.
        scale: a rating outside it makes a bad row.
        k: reviews that each user and each item kept has at least; 0 and 1 keep all.
        since: unix seconds; earlier reviews are left out.
        until: unix seconds; reviews then or later are left out.
        with_text: whether reviews without a text are left out.
        on_progress: called every few rows, on this thread.

    Raises:
        SettingError: no such format, or settings that do not fit together.
        DataError: a file is none of this format or damaged, or no review is left.
        InputError: another process is importing to the same file.
        StorageError: the disk is full, or the folder cannot be written to.
    """
    started = time.monotonic()
    wanted = _format(format, columns, item_columns)
    if k < 0:
        raise SettingError(f"bad k {k}: a number of reviews, 0 or more")
    paths = [Path(file) for file in files]
    to = _Outputs.of(out, items_out, rejects_out)
    to.check(paths)
    reviews, items = _sorted_out(paths, wanted)
    passes = Passes(wanted, scale, on_progress)
    try:
        with scratch_folder(to.reviews) as folder:
            with closing(Rejects(folder / "rejects.jsonl")) as bad:
                passes.spill(reviews, folder / "spill.parquet", bad)
                rejected = bad.count
                dropped = passes.choose(k, since, until, with_text)
                if not passes.kept.any():
                    raise DataError(_nothing_left(paths, passes, bad, dropped))
                titles = passes.catalogue(items, folder / "items.parquet", bad)
                written = passes.write(folder / "spill.parquet", folder / "reviews.parquet", titles)
            if bad.count:
                put_in_place(folder / "rejects.jsonl", to.rejects)
            else:
                to.rejects.unlink(missing_ok=True)  # of an earlier import
            if titles is not None:
                put_in_place(folder / "items.parquet", to.items)
            put_in_place(folder / "reviews.parquet", to.reviews)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"{to.reviews} cannot be written ({reason}); what was there before is untouched"
        ) from error
    users, reviewed, times = (a[passes.kept] for a in (passes.users, passes.items, passes.times))
    return ImportReport(
        format=format,
        out=to.reviews,
        items_out=to.items if titles is not None else None,
        rejects=to.rejects if bad.count else None,
        read=passes.read,
        reviews=len(times),
        rejected=rejected,
        unrated=passes.unrated,
        **dropped,
        empty_texts=int(passes.empty[passes.kept].sum()),
        further=len(times) - distinct_pairs(users, reviewed),
        titled=written.titled,
        users=len(np.unique(users)),
        items=len(np.unique(reviewed)),
        items_written=0 if titles is None else len(titles),
        items_rejected=bad.count - rejected,
        first=float(times.min()),
        last=float(times.max()),
        mean_rating=written.ratings / len(times),
        seconds=time.monotonic() - started,
        reasons=dict(bad.reasons.most_common()),
    )


def _format(
    name: str, columns: Mapping[str, str] | None, item_columns: Mapping[str, str] | None
) -> Format:
    if name == TABLE:
        return table_format(columns or {}, item_columns or {})
    if name not in FORMATS:
        raise SettingError(f"no format {name!r}: one of {', '.join([*FORMATS, TABLE])}")
    if columns or item_columns:
        raise SettingError(f"the columns of {name} are known; only `{TABLE}` takes names of them")
    return FORMATS[name]


@dataclass(frozen=True, slots=True)
class _Outputs:
    reviews: Path
    items: Path
    rejects: Path

    @classmethod
    def of(
        cls,
        out: str | os.PathLike[str],
        items: str | os.PathLike[str] | None,
        rejects: str | os.PathLike[str] | None,
    ) -> _Outputs:
        """Beside `out`, where they are not named."""
        reviews = Path(out)
        stem = reviews.stem.replace("reviews", "items")
        stem = stem if stem != reviews.stem else f"{stem}-items"
        return cls(
            reviews,
            Path(items or reviews.with_name(f"{stem}.parquet")),
            Path(rejects or reviews.with_name(f"{reviews.stem}-rejects.jsonl")),
        )

    def check(self, inputs: Sequence[Path]) -> None:
        """Refuse what would write over a file that is read, or twice to one."""
        if not inputs:
            raise SettingError("no files to import")
        outputs = (self.reviews, self.items, self.rejects)
        for path in outputs[:2]:
            if path.suffix.lower() != ".parquet":
                raise SettingError(f"{path}: the name has to end in .parquet")
        if len({path.resolve() for path in outputs}) < len(outputs):
            raise SettingError(f"{', '.join(map(str, outputs))} have to be different files")
        read = {path.resolve() for path in inputs}
        for path in outputs:
            if path.is_dir():
                raise SettingError(f"{path} is a folder; name the file to write")
            if path.resolve() in read:
                raise SettingError(f"{path} is among the files to import; write to another one")
            if path.parent != self.reviews.parent and not path.parent.is_dir():
                raise SettingError(f"{path}: no such folder")


def _sorted_out(paths: Sequence[Path], wanted: Format) -> tuple[list[RowFile], list[RowFile]]:
    """The files of reviews and those of items.

    Raises:
        DataError: one of them is neither, or none has reviews.
    """
    found: dict[str, list[RowFile]] = {"reviews": [], "items": []}
    for path in paths:
        file = examine(path)
        rows = first_rows(file)
        found[recognise(path, rows, wanted)].append(file)
    if not found["reviews"]:
        named = ", ".join(map(str, paths))
        raise DataError(f"{named}: items, but no reviews of them. {wanted.takes}")
    return found["reviews"], found["items"]


def _nothing_left(
    paths: Sequence[Path], passes: Passes, bad: Rejects, dropped: Mapping[str, int]
) -> str:
    counts = {"bad": bad.count, "unrated": passes.unrated, **dropped}
    told = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if count)
    files = ", ".join(map(str, paths))
    return "\n  ".join([f"{files}: no review is left of {passes.read} rows ({told})", *bad.first])

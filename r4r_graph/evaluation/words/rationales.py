"""The form of rationales: do they give a rating away, repeat themselves, run on, say one thing?

The screens are those that training draws are held to (`evaluation.words.leaks`): what a reasoner
was never meant to learn, it should not write.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from r4r_graph.errors import DataError
from r4r_graph.evaluation.metrics import RESAMPLES, Estimate, Floats, bootstrap, mean
from r4r_graph.evaluation.report import RationaleForm
from r4r_graph.evaluation.words.leaks import form_faults, leaks
from r4r_graph.ratings import RatingScale

MOST_EXAMPLES = 20
"""Half of them leaks, half faults of form: the first of a text."""

_REPEATS = {"repeats a sentence", "repeats a run of words"}


def rationale_form(
    texts: Sequence[str | None],
    *,
    titles: Sequence[Sequence[str]] = (),
    scale: RatingScale,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> RationaleForm | None:
    """What the rationales look like; None where there is none.

    Args:
        texts: one rationale an entry, None or blank where there is none. Several rationales of one
            row are several entries: joined, they would be one of several paragraphs, which is a
            fault.
        titles: for each text the titles that it may name, which are not looked at: a title with a
            number in it is no rating. Empty: none are known.
        scale: what ratings are on.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        DataError: titles are there, but not for each text; or a text's titles are one string.
    """
    if titles and len(titles) != len(texts):
        raise DataError(f"{len(texts)} rationales and {len(titles)} lists of titles")
    if any(isinstance(names, str) for names in titles):
        raise DataError("the titles of a rationale are a list of texts, not one text")
    written: list[str] = []
    leaking: list[tuple[int, list[str]]] = []
    faulty: list[tuple[int, list[str]]] = []
    for at, text in enumerate(texts):
        if text is None or not text.strip():
            continue
        known = titles[at] if titles else ()
        written.append(text)
        leaking.append((at, leaks(text, scale, titles=known)))
        faulty.append((at, form_faults(text, titles=known)))
    if not written:
        return None

    def share(flags: Sequence[bool]) -> Estimate:
        return bootstrap(mean, np.array(flags, dtype=np.float64), seed=seed, resamples=resamples)

    def first_findings(found: Sequence[tuple[int, list[str]]]) -> list[str]:
        rows = [f"row {at + 1}: {findings[0]}" for at, findings in found if findings]
        return rows[: MOST_EXAMPLES // 2]

    lengths: Floats = np.array([len(text.split()) for text in written], dtype=np.float64)
    low, middle, high = np.percentile(lengths, [5, 50, 95]).tolist()
    return RationaleForm(
        rows=len(texts),
        empty=len(texts) - len(written),
        leaks=share([bool(found) for _, found in leaking]),
        repeats=share([not _REPEATS.isdisjoint(found) for _, found in faulty]),
        malformed=share([bool(found) for _, found in faulty]),
        distinct=len({" ".join(text.lower().split()) for text in written}) / len(written),
        words=(low, middle, high),
        examples=(*first_findings(leaking), *first_findings(faulty)),
    )

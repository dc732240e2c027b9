"""What is read out of a chat model's answers: aspect summaries, ratings, log-probabilities."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field, ValidationError, create_model

from r4r_graph.engine import aspects
from r4r_graph.ratings import RatingScale
from r4r_graph.schema import AspectSummary


class Aspects(BaseModel):
    """Short phrases, from a review's own words."""

    positive: list[str] = Field(description="What its writer praised; up to five phrases.")
    negative: list[str] = Field(description="What its writer disliked; up to five phrases.")
    values: list[str] = Field(
        description="What its writer looks for in such things; up to five phrases."
    )


def summary_in(found: BaseModel | None, text: str) -> AspectSummary | None:
    """The summary in an answer: structured, or a text in the format."""
    if isinstance(found, Aspects):
        written = aspects.format_aspects(
            AspectSummary(tuple(found.positive), tuple(found.negative), tuple(found.values))
        )
        return aspects.parse_aspects(written)
    lines = (line.strip() for line in text.lower().splitlines())
    listed = [line for line in lines if line.startswith(tuple(f"{s}:" for s in aspects.SECTIONS))]
    try:
        return aspects.parse_aspects("\n".join(line.rstrip(".; ") for line in listed))
    except ValueError:
        return None


def parsed_json(text: str, schema: type[BaseModel]) -> BaseModel | None:
    """What of the schema is in the JSON object of a text."""
    found = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        return schema.model_validate_json(found[0]) if found else None
    except ValidationError:
        return None


def rating_schema(scale: RatingScale) -> type[BaseModel]:
    """An object with one rating of the scale."""
    said = f"One of {', '.join(scale.labels)}."
    values = Field(description=said, json_schema_extra={"enum": list(scale.values)})
    schema: type[BaseModel] = create_model("Rating", __doc__="A rating.", rating=(float, values))
    return schema


def rating_in(found: BaseModel | None, text: str, scale: RatingScale) -> int | None:
    """Which value of the scale an answer is; a text's is its first number."""
    number = re.search(r"-?\d+(?:\.\d+)?", text)
    rating = getattr(found, "rating", None if number is None else float(number[0]))
    return next((i for i, v in enumerate(scale.values) if v == rating), None)


def weights_in(content: Sequence[Mapping[str, Any]], scale: RatingScale) -> list[float] | None:
    """Probability of each value at the first place where the answer is one; None without one."""
    for place in content:
        if place["token"].strip() in scale.labels:
            told = {place["token"]: place["logprob"]}
            told |= {top["token"]: top["logprob"] for top in place.get("top_logprobs") or ()}
            return [
                sum(math.exp(p) for token, p in told.items() if token.strip() == label)
                for label in scale.labels
            ]
    return None

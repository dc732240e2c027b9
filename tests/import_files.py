"""Invented files in the forms of public data sets."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

Rows = list[dict[str, Any]]


def amazon_2014(count: int = 12) -> tuple[Rows, Rows]:
    """Reviews and items, one user in four, one item in three."""
    reviews = [
        {
            "reviewerID": f"A{n % 4}",
            "asin": f"B{n % 3}",
            "reviewerName": "somebody",
            "helpful": [0, 1],
            "reviewText": f"Number {n}: warm &amp; honest.",
            "overall": float(1 + n % 5),
            "summary": "Five Stars",
            "unixReviewTime": 1_300_000_000 + 86400 * n,
            "reviewTime": "03 13, 2011",
        }
        for n in range(count)
    ]
    items = [
        {
            "asin": f"B{n}",
            "title": f"Album's {n}",
            "price": 7.5,
            "categories": [["CDs & Vinyl", "Rock"], ["Digital Music"]],
            "description": "An <b>old</b> one.",
        }
        for n in range(3)
    ]
    return reviews, items


def amazon_2018(count: int = 12) -> tuple[Rows, Rows]:
    """As `amazon_2014`."""
    reviews, _ = amazon_2014(count)
    for row in reviews:
        del row["helpful"]
        row |= {"verified": True, "vote": "3", "style": {"Format:": " MP3"}}
    items = [
        {
            "asin": f"B{n}",
            "title": f"Album {n}",
            "main_cat": '<img src="x.png" class="nav" alt="Digital Music"/>',
            "category": ["Digital Music", "Rock"],
            "description": ["First part.", "Second <i>part</i>."],
            "rank": "5 in Music",
        }
        for n in range(3)
    ]
    return reviews, items


def amazon_2023(count: int = 12) -> tuple[Rows, Rows]:
    """As `amazon_2014`."""
    reviews = [
        {
            "rating": row["overall"],
            "title": "Five Stars",
            "text": row["reviewText"],
            "images": [],
            "asin": "BVARIANT",
            "parent_asin": row["asin"],
            "user_id": row["reviewerID"],
            "timestamp": 1000 * row["unixReviewTime"] + 870,
            "helpful_vote": 0,
            "verified_purchase": True,
        }
        for row in amazon_2014(count)[0]
    ]
    items = [
        {
            "main_category": None,
            "categories": ["CDs & Vinyl", "Rock"],
            "title": f"Album {n}",
            "features": ["Remastered"],
            "description": [],
            "parent_asin": f"B{n}",
            "details": {},
        }
        for n in range(3)
    ]
    return reviews, items


def yelp(count: int = 12) -> tuple[Rows, Rows]:
    """As `amazon_2014`."""
    reviews = [
        {
            "review_id": f"r{n}",
            "user_id": f"A{n % 4}",
            "business_id": f"B{n % 3}",
            "stars": float(1 + n % 5),
            "useful": 0,
            "text": f"Number {n}: warm &amp; honest.",
            "date": f"2018-07-{n + 1:02} 22:09:11",
        }
        for n in range(count)
    ]
    items = [
        {
            "business_id": f"B{n}",
            "name": f"Diner {n}",
            "city": "Tucson",
            "state": "AZ",
            "stars": 3.5,
            "categories": "Diners, Breakfast & Brunch",
        }
        for n in range(3)
    ]
    return reviews, items


def goodreads(count: int = 12) -> tuple[Rows, Rows]:
    """As `amazon_2014`; ratings go from 0 (none) to 4."""
    reviews = [
        {
            "user_id": f"A{n % 4}",
            "book_id": f"{n % 3}",
            "review_id": f"r{n}",
            "rating": n % 5,
            "review_text": f"Number {n}: warm &amp; honest.",
            "date_added": f"Sun Jul {n + 1:02} 07:44:10 -0700 2017",
            "read_at": "",
        }
        for n in range(count)
    ]
    items = [
        {"book_id": f"{n}", "title": f"Book {n}", "description": "About <i>it</i>.", "authors": []}
        for n in range(3)
    ]
    return reviews, items


MAKERS = {
    "amazon-2014": amazon_2014,
    "amazon-2018": amazon_2018,
    "amazon-2023": amazon_2023,
    "yelp": yelp,
    "goodreads": goodreads,
}


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """JSON lines, compressed as the name says."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix in (".zst", ".bz2"):
        codec = "zstd" if path.suffix == ".zst" else "bz2"
        with pa.CompressedOutputStream(str(path), codec) as file:
            file.write(data)
    else:
        path.write_bytes(data)
    return path

"""What is legal in the data and probably wrong: one line of the check's report for each kind, counted."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from common.data.images import FORMATS
from common.data.manifest import Record

LEAST_SIDE, MOST_ASPECT = 32, 4.0  # of pictures that say something; of ones of which half is left in a bucket of 2 : 1
MAY_MOVE = (b"GIF8", b"RIFF", b"\x89PNG", b"II*\0", b"MM\0*")  # first bytes of formats that hold several pictures
MOVES = "animated or of several pages: the first picture is used"
UNCHANGED = "a source and the target are the same bytes"


def of_files(images: Sequence[bytes], sources: int) -> list[str]:
    """What is to be said of a row's files: the target, then so many sources, then others."""
    said = [UNCHANGED] if images[0] in images[1 : 1 + sources] else []
    return said + ([MOVES] if any(map(_moves, images)) else [])


def _moves(data: bytes) -> bool:
    if not data.startswith(MAY_MOVE):
        return False
    try:
        return bool(getattr(Image.open(io.BytesIO(data), formats=FORMATS), "is_animated", False))
    except Exception:  # a video, or a damaged file: the check has its own words for it
        return False


def lines(records: Sequence[Record], of_looked_at: Sequence[tuple[str, str]]) -> list[str]:
    """The report of checked rows. of_looked_at: (what, where) of the files that were read at this start."""
    found: dict[str, list[str]] = {}
    for what, where in of_looked_at:
        found.setdefault(what, []).append(where)
    for record in records:
        for width, height in ((record.width, record.height), *record.source_sizes):
            if min(width, height) < LEAST_SIDE:
                found.setdefault(f"a picture with a side under {LEAST_SIDE} pixels", []).append(record.where)
            elif max(width, height) > MOST_ASPECT * min(width, height):
                found.setdefault(f"a picture longer than {MOST_ASPECT:g} : 1: most is cut off", []).append(
                    record.where
                )
    names = np.fromiter((hash((record.digest, record.text)) for record in records), np.int64, len(records))
    _, first, counts = np.unique(names, return_index=True, return_counts=True)
    if again := int((counts - 1).sum()):
        example = records[first[counts > 1][0]].where
        found["the same picture and caption as an earlier row"] = [f"that of {example}"] + [""] * (again - 1)
    return [f"notice: {len(rows)} of {len(records)} rows: {what} ({rows[0]}, for one)" for what, rows in found.items()]

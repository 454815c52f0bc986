"""JSON from users: rows of a list or of lines, single values, and how much of them a message shows."""

import codecs
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def json_rows(path: Path) -> Iterator[tuple[object, int, str]]:
    """(row, its number, where it is) of a JSON list or of the lines of a JSONL file, without blank ones. A line that
    cannot be read is a ValueError in the row's place."""
    if path.suffix == ".json":
        rows = parse_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))
        if not isinstance(rows, list):
            raise ValueError(f"got a JSON {type(rows).__name__}, expected a list of rows")
        yield from ((row, number, f"{path.name} row {number}") for number, row in enumerate(rows))
        return
    with open(path, "rb") as file:  # a line of bytes ends at \n, not at every Unicode line break
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                try:
                    row = parse_json(line)
                except ValueError as error:
                    row = error
                yield row, number, f"{path.name} line {number}"


def parse_json(data: bytes) -> object:
    """One JSON value from UTF-8. ValueError for whatever is none, at most a line long: nesting without end, numbers of
    hundreds of digits, half characters."""
    text = decode(data)
    try:
        value = json.loads(text)
        if b"\\u" in data:  # an escape may be half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError as error:
        raise ValueError("a text has half of a surrogate pair, which is no character") from error
    except RecursionError as error:
        raise ValueError("not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}"[:200]) from error


def decode(data: bytes) -> str:
    """UTF-8 text; ValueError names the first byte that is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.object[error.start]:#04x} at place {error.start}") from error


def short(value: object) -> str:
    """A value for a message: at most 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


@contextmanager
def many_objects() -> Iterator[None]:
    """Around what makes millions of objects that stay: Python's search for cycles among them takes as long again."""
    searches = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searches:
            gc.enable()

"""JSON from users: rows of a list or of lines, single values, and how much of them a message shows."""

import codecs
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

PLAIN = json.JSONDecoder()


def json_rows(path: Path) -> Iterator[tuple[object, int, str]]:
    """(row, its number, where it is) of a JSON list or of the lines of a JSONL file, without blank ones. A line that
    cannot be read is a ValueError in the row's place; keys that stand twice are counted at the end."""
    twice: list[str] = []
    yield from _rows(path, json.JSONDecoder(object_pairs_hook=partial(_object, twice)))
    if twice:
        counted = f"{len(twice)} rows of {path.name}"
        print(f"notice: {counted}: a key stands twice, of which the last one counts ({short(twice[0])}, for one)")


def _rows(path: Path, decoder: json.JSONDecoder) -> Iterator[tuple[object, int, str]]:
    if path.suffix == ".json":
        rows = parse_json(path.read_bytes().removeprefix(codecs.BOM_UTF8), decoder)
        if not isinstance(rows, list):
            raise ValueError(f"got a JSON {type(rows).__name__}, expected a list of rows")
        yield from ((row, number, f"{path.name} row {number}") for number, row in enumerate(rows))
        return
    with open(path, "rb") as file:  # a line of bytes ends at \n, not at every Unicode line break
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                try:
                    row = parse_json(line, decoder)
                except ValueError as error:
                    row = error
                yield row, number, f"{path.name} line {number}"


def _object(twice: list[str], pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object of which the last of equal keys counts, as everywhere; to `twice` goes such a key."""
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice.append(next(key for key in keys if keys.count(key) > 1))
    return value


def parse_json(data: bytes, decoder: json.JSONDecoder = PLAIN) -> object:
    """One JSON value from UTF-8. ValueError for whatever is none, at most a line long: nesting without end, numbers of
    hundreds of digits, half characters."""
    text = decode(data)
    try:
        value = decoder.decode(text)
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

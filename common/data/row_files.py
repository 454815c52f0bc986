"""From files to rows as they lie: JSON, CSV, parquet, WebDataset shards, data sets, folders of pictures with texts.

What a row means, and what is wrong with it, manifest.py says.
"""

import csv
import os
import re
import stat
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from common.data.json_rows import decode, json_rows, parse_json

# the first that is there wins
MANIFESTS = (
    *("metadata.jsonl", "train.jsonl", "train.json", "metadata.json"),
    *("metadata.csv", "train.csv", "metadata.tsv", "train.tsv", "*.parquet", "*.tar"),
)
LARGEST_FILE = 2**29  # bytes of one picture or video
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
IMAGE_COLUMNS = ("file_path", "file_name", "image")  # found by themselves, the first wins
TEXT_COLUMNS = ("text", "caption", "prompt")
HIDDEN = re.compile(r"(^|/)\.")
READ = (
    f"{', '.join(MANIFESTS)}; pictures with a .txt of the same name each; for edits the folders source and target; "
    "a folder that datasets' save_to_disk wrote"
)


class RawRow(NamedTuple):
    """A row as it lies in its file."""

    row: object  # an object, or the ValueError in its place
    number: int
    manifest: str  # "train.jsonl line"
    image_column: str | None = None
    text_column: str | None = None
    # Target, then sources: ("tar", path, offset, size) or ("parquet", path, row, column); () for ordinary files.
    inside: tuple[tuple, ...] = ()


def rows_of_file(path: Path, image_column: str | None, text_column: str | None) -> Iterator[RawRow]:
    """The rows of one manifest; ValueError where it cannot be read."""
    if path.suffix == ".parquet":
        yield from table_rows(str(path), path.name, image_column, text_column)
    elif path.suffix == ".tar":
        yield from _tar_rows(path, text_column)
    elif path.suffix in (".csv", ".tsv"):
        yield from _csv_rows(path, image_column, text_column)
    elif path.suffix in (".json", ".jsonl"):
        kind = f"{path.name} {'row' if path.suffix == '.json' else 'line'}"
        yield from (RawRow(row, number, kind, image_column, text_column) for row, number, _ in json_rows(path))
    else:
        raise ValueError("expected a .json, .jsonl, .csv, .tsv, .parquet or uncompressed .tar file")


def column_of(given: str | None, usual: Sequence[str], names: Sequence[str]) -> str:
    """The column that is given, or the first of the usual ones that is there, or the first usual one."""
    return given or next((name for name in usual if name in names), usual[0])


def _columns(
    names: Sequence[str], image_column: str | None, text_column: str | None, usual: Sequence[str]
) -> tuple[str, str]:
    """The columns of pictures and of captions; ValueError where they are not there."""
    image_column, text_column = column_of(image_column, usual, names), column_of(text_column, TEXT_COLUMNS, names)
    if missing := {image_column, text_column} - set(names):
        raise ValueError(f"no column {sorted(missing)}, it has {names}; set --image_column and --text_column")
    return image_column, text_column


def check_size(size: int) -> None:
    """ValueError for more than is read of one file."""
    if size > LARGEST_FILE:
        raise ValueError(f"{size / 2**20:.0f} MiB; files of at most {LARGEST_FILE / 2**20:.0f} MiB are read")


def read_file(path: Path) -> bytes:
    """The bytes of an ordinary file; ValueError for pipes, devices and files over LARGEST_FILE, before reading."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("a directory" if path.is_dir() else "not an ordinary file")
    check_size(found.st_size)
    return path.read_bytes()


# ---- tables


def _csv_rows(path: Path, image_column: str | None, text_column: str | None) -> Iterator[RawRow]:
    """Rows below a line of column names, parted by commas, in .tsv by tabs; empty fields are left out."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            columns = _columns(list(reader.fieldnames or ()), image_column, text_column, IMAGE_COLUMNS)
            for row in reader:
                extra = row.pop(None, ())
                if extra or None in row.values():
                    fields = sum(value is not None for value in row.values()) + len(extra)
                    row = ValueError(f"{fields} fields, expected {len(reader.fieldnames)}; quote what has separators")
                else:
                    row = {name: value for name, value in row.items() if value or name in columns}
                yield RawRow(row, reader.line_num, f"{path.name} line", *columns)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"line {reader.line_num + 1}: {error}") from error


@lru_cache(maxsize=64)
def open_table(path: str, changed: int) -> Any:
    """A parquet file, a folder of datasets' save_to_disk, or a data set of the hub ("name::split"). Image columns
    stay encoded; `changed` (mtime) renews it."""
    import datasets  # here, since it takes a second to import

    if path.endswith(".parquet"):
        table = datasets.Dataset.from_parquet(path)
    elif os.path.isdir(path):
        table = datasets.load_from_disk(path)
    else:
        name, _, split = path.partition("::")
        table = datasets.load_dataset(name, split=split)
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def table_of(path: str) -> Any:
    """open_table, once for each state of the file."""
    return open_table(path, os.stat(path).st_mtime_ns if os.path.exists(path) else 0)


def table_rows(path: str, name: str, image_column: str | None, text_column: str | None) -> Iterator[RawRow]:
    """The rows of open_table(path); name: what messages call it."""
    table = table_of(path)
    names = sorted(table.column_names, key=_by_number)
    image_column, text_column = _columns(names, image_column, text_column, ("image", *IMAGE_COLUMNS))
    images = [image_column, *(other for other in names if other.startswith(f"source_{image_column}"))]
    kinds = {name: getattr(feature, "dtype", "") for name, feature in table.features.items()}
    if kinds[image_column] in ("string", "large_string"):
        images = []  # paths of ordinary files
    bulky = [other for other in names if kinds[other] in ("PIL.Image.Image", "binary", "large_binary")]
    for number, row in enumerate(table.remove_columns(list({*images, *bulky}))):
        if images:
            row["file_path"] = f"{name}::{number}"
            sources = [f"{name}::{number}::{other}" for other in images[1:]]
            row["source_file_path"] = sources or row.get("source_file_path")
        inside = tuple(("parquet", path, number, other) for other in images)
        yield RawRow(row, number, f"{name} row", "file_path" if images else image_column, text_column, inside)


def table_bytes(path: str, row: int, column: str) -> bytes | str | None:
    """What a row has as its picture: bytes, or the path of a file."""
    value = table_of(path).select_columns(column)[row][column]
    if not isinstance(value, dict):
        return value
    if value["bytes"] is None and value["path"] and not path.endswith(".parquet"):
        return read_file(Path(value["path"]))  # where the datasets library has put it
    return value["path"] if value["bytes"] is None else value["bytes"]


def saved_table(folder: Path, split: str | None) -> Path | None:
    """The folder of one split that datasets' save_to_disk wrote, None where it wrote nothing here."""
    splits = sorted(file.parent.name for file in folder.glob("*/state.json"))
    if (folder / "state.json").is_file():
        return folder
    if not (folder / "dataset_dict.json").is_file() or not splits:
        return None
    split = split or ("train" if "train" in splits or len(splits) > 1 else splits[0])
    if split not in splits:
        raise ValueError(f"{folder} has the splits {', '.join(splits)}, got {split}; name one by --train_data_meta")
    return folder / split


def hub_rows(name: str, split: str, image_column: str | None, text_column: str | None) -> list[RawRow]:
    """The rows of a data set of the hub, downloaded by the datasets library, or found in its cache."""
    try:
        return list(table_rows(f"{name}::{split}", name, image_column, text_column))
    except Exception as error:  # the library and the client have dozens of kinds
        raise ValueError(
            f"train_data_dir {name} is no folder, and no data set of the hub either (split {split}): {error}"[:600]
        ) from error


# ---- shards


def _by_number(name: str) -> tuple[int, str]:
    return len(name), name  # source2 before source10


def _tar_rows(path: Path, text_column: str | None) -> Iterator[RawRow]:
    """WebDataset's rule: members of one sample share the name up to its first dot."""
    samples: dict[str, tuple[dict, dict]] = {}  # key -> (row, images)
    twice: dict[str, None] = {}  # keys of which an image was replaced by a later one
    with tarfile.open(path, "r:") as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            row, images = samples.setdefault(key, ({}, {}))
            if suffix.lower().rpartition(".")[2] in IMAGE_SUFFIXES:
                kind = suffix if suffix.startswith("source") else ""  # "" is the target and sorts before the sources
                if kind in images:
                    twice[key] = None
                images[kind] = ("tar", str(path), member.offset_data, member.size)
            elif suffix in ("txt", "json"):
                try:
                    row.update(_tar_columns(tar, member, suffix, text_column or TEXT_COLUMNS[0]))
                except ValueError as error:
                    row["error"] = error
    if twice:
        counted = f"{len(twice)} of {len(samples)} samples of {path.name}"
        print(f"notice: {counted}: several images, of which the last one is used ({next(iter(twice))}, for one)")
    for number, (key, (row, images)) in enumerate(samples.items()):
        row["file_path"] = f"{path.name}::{key}"
        kinds = sorted(images, key=_by_number)
        row["source_file_path"] = [f"{path.name}::{key}.{kind}" for kind in kinds if kind]
        problem = row.get("error") if "" in images else ValueError(f"no image, expected one of {IMAGE_SUFFIXES}")
        row = problem if isinstance(problem, ValueError) else row
        inside = tuple(images[kind] for kind in kinds)
        yield RawRow(row, number, f"{path.name} sample", "file_path", text_column, inside)


def _tar_columns(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, text_column: str) -> dict:
    """What a .txt or .json member says of its sample; ValueError when it cannot be read."""
    check_size(member.size)
    data = tar.extractfile(member).read()
    if suffix == "txt":
        return {text_column: decode(data).strip()}
    columns = parse_json(data)
    if not isinstance(columns, dict):
        raise ValueError(f"the .json is a {type(columns).__name__}, expected an object")
    return columns


# ---- folders of pictures


def folder_rows(folder: Path) -> Iterator[RawRow]:
    """Pictures with a .txt of the same name each, also in folders below. With the folders target and source (source2,
    ...): edits, whose pictures and .txt (beside the target, or a source) have the same names."""
    found = sorted(os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)
    files = [file for path in found if not HIDDEN.search(str(file := Path(path).relative_to(folder)))]
    texts = {file.with_suffix("") for file in files if file.suffix == ".txt"}
    pictures = [file for file in files if file.suffix.lower()[1:] in IMAGE_SUFFIXES]
    sides = {file.parts[0] for file in pictures if len(file.parts) > 1 and file.parts[0].startswith("source")}
    sources = sorted(sides, key=_by_number) if (folder / "target").is_dir() else []
    named = {file.with_suffix(""): file for file in pictures}
    targets = [file for file in pictures if not sources or file.parts[0] == "target"]
    if not texts:
        return
    for number, file in enumerate(targets):
        name = file.with_suffix("").relative_to("target" if sources else "")
        beside = [Path(side) / name for side in sources]
        yield RawRow(_folder_row(folder, file, named, texts, beside), number, "picture")
    have = {file.with_suffix("").relative_to("target") for file in targets} if sources else set()
    for number, file in enumerate(file for file in pictures if sources and file.parts[0] in sides):
        if file.with_suffix("").relative_to(file.parts[0]) not in have:
            yield RawRow(ValueError(f"{file} has no picture of its name in target/"), number, "source")


def _folder_row(
    folder: Path, file: Path, named: dict[Path, Path], texts: set[Path], beside: Sequence[Path]
) -> dict | ValueError:
    """One picture with its .txt, and its sources; the ValueError where one is missing."""
    text = next((stem for stem in (file.with_suffix(""), *beside) if stem in texts), None)
    if missing := [source for source in beside if source not in named]:
        return ValueError(f"{file} has no {missing[0]}.png (or .jpg, .webp)")
    if text is None:
        return ValueError(f"{file} has no {file.with_suffix('.txt')} with its caption")
    try:
        caption = decode(read_file(folder / f"{text}.txt")).removeprefix("\ufeff").strip()
    except (OSError, ValueError) as error:
        return ValueError(f"{text}.txt cannot be read: {error}")
    return {"file_path": str(file), "text": caption, "source_file_path": [str(named[source]) for source in beside]}


def found_in(folder: Path) -> str:
    """What a folder holds, for a message: how many files of each suffix, and folders."""
    inside = sorted(folder.iterdir())
    counts = Counter(path.suffix or "nameless" for path in inside if path.is_file()).most_common(6)
    found = [f"{count} {suffix} files" for suffix, count in counts]
    found += [f"the folder {path.name}" for path in inside if path.is_dir()][:6]
    return ", ".join(found) or "nothing"

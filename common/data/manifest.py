"""From a manifest to records: what each row names, and its bytes.

Reads a JSON list, JSONL, an image folder's metadata.jsonl, parquet and WebDataset shards. What is wrong with a row is
kept with it, for check.py to report.
"""

import dataclasses
import os
import stat
import sys
import tarfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image

from common.data.images import decode_image
from common.data.json_rows import decode, json_rows, parse_json, short

MANIFESTS = ("metadata.jsonl", "train.jsonl", "train.json", "metadata.json", "*.parquet", "*.tar")  # the first wins
LARGEST_FILE = 2**29  # bytes of one picture or video
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
IMAGE_COLUMNS = ("file_path", "file_name", "image")  # found by themselves, the first wins
NO_MORE: dict = {}  # one for all rows
TEXT_COLUMNS = ("text", "caption", "prompt")


@dataclasses.dataclass(frozen=True, slots=True)  # there may be millions
class Record:
    """One row of a manifest: a target image, its caption and, for editing, its source images."""

    row: int  # from 0; in JSONL files the line number, from 1
    file_path: str  # as in the manifest; "<shard>::<key>" in a tar, "<file>::<row>" in a parquet file
    text: str
    source_file_path: tuple[str, ...] = ()
    type: str = "image"
    extra: dict = dataclasses.field(default_factory=dict, hash=False)  # every other column (no bytes), untouched
    digest: str = ""  # blake2b of the target's and the sources' bytes; with the size filled in by check_records
    width: int = 0  # pixels, after EXIF rotation
    height: int = 0
    source_sizes: tuple[tuple[int, int], ...] = ()  # (width, height) of each source image
    manifest: str = ""  # "train.jsonl line"
    problem: str = ""  # what load_manifest found wrong with the row; check_records reports it
    # Target, then sources: ("tar", path, offset, size) or ("parquet", path, row, column); () for ordinary files.
    inside: tuple[tuple, ...] = ()

    @property
    def where(self) -> str:
        """train.jsonl line 7, for messages."""
        return f"{self.manifest} {self.row}"


def load_manifest(
    train_data_dir: str | Path,
    train_data_meta: str | Path | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
) -> list[Record]:
    """All rows of a JSON list, a JSONL file, an image folder's metadata.jsonl, parquet, or WebDataset shards (*.tar).

    train_data_meta: a file or a glob, absolute or relative to train_data_dir or to the working directory; None: the
    first of MANIFESTS that train_data_dir has. Paths in a manifest are relative to train_data_dir. Columns that are
    not given are found among IMAGE_COLUMNS and TEXT_COLUMNS. Source images for editing: `source_file_path`, a path or
    a list; in parquet also image columns `source_<image_column>*`; in a tar members `<key>.source*.png`. ValueError
    when there is nothing to read; a bad row is kept, with its problem, for check_records.
    """
    folder = Path(train_data_dir)
    if not folder.is_dir():
        raise ValueError(
            f"train_data_dir {folder} is no folder; expected the one that the manifest's paths start from"
        )
    if train_data_meta is None:
        patterns, wanted = [folder / name for name in MANIFESTS], f"none of {', '.join(MANIFESTS)}"
    else:
        patterns, wanted = [folder / train_data_meta, Path(train_data_meta)], f"no {train_data_meta}"
    files = next((found for found in map(_glob, patterns) if found), [])
    if not files:
        raise ValueError(
            f"no manifest: there is {wanted} in {folder}; set --train_data_meta to the file that lists the images"
        )
    records: list[Record] = []
    for path in files:
        try:
            if path.suffix == ".parquet":
                records += _parquet_records(path, image_column, text_column)
            elif path.suffix == ".tar":
                records += _tar_records(path, text_column)
            elif path.suffix in (".json", ".jsonl"):
                rows = json_rows(path)
                kind = f"{path.name} {'row' if path.suffix == '.json' else 'line'}"
                records += [_record(row, number, kind, image_column, text_column) for row, number, _ in rows]
            else:
                raise ValueError("expected a .json, .jsonl, .parquet or uncompressed .tar file")
        except (ValueError, OSError, tarfile.TarError) as error:
            raise ValueError(f"cannot read the manifest {path}: {error}") from error
    if not records:
        raise ValueError(f"the manifest {files[0]} has zero rows; expected at least one image with its caption")
    return records


def _glob(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.parent.glob(path.name)) if "*" in path.name else []


def _column(given: str | None, usual: Sequence[str], names: Sequence[str]) -> str:
    """The column that is given, or the first of the usual ones that is there, or the first usual one."""
    return given or next((name for name in usual if name in names), usual[0])


def _record(
    row: object, number: int, manifest: str, image_column: str | None, text_column: str | None, inside: tuple = ()
) -> Record:
    """A Record from one row; what is wrong with the row goes into its `problem`."""
    if not isinstance(row, dict):
        problem = str(row) if isinstance(row, ValueError) else f"got a {type(row).__name__}, expected an object"
        return Record(number, "", "", manifest=manifest, problem=problem)
    extra = dict(row)  # what is left of it
    path_key, text_column = _column(image_column, IMAGE_COLUMNS, row), _column(text_column, TEXT_COLUMNS, row)
    path, text, kind = extra.pop(path_key, None), extra.pop(text_column, None), extra.pop("type", None) or "image"
    sources = extra.pop("source_file_path", None) or []
    sources = sources if isinstance(sources, list) else [sources]
    problem = ""
    if not isinstance(path, str) or not path:
        problem = f"{path_key} is {short(path)}, expected a path"
    elif not isinstance(text, str):
        problem = f"{text_column} is {short(text)}, expected a caption"
    elif not text.strip():
        problem = "empty caption"
    elif not all(isinstance(source, str) and source for source in sources):
        problem = f"source_file_path is {short(sources)}, expected paths"
    sources = tuple(map(str, sources))
    path, text = str(path or ""), str(text or "")
    return Record(
        number,
        path,
        text,
        sources,
        sys.intern(str(kind)),
        extra or NO_MORE,
        manifest=manifest,
        problem=problem,
        inside=inside,
    )


def _by_number(name: str) -> tuple[int, str]:
    return len(name), name  # source2 before source10


@lru_cache(maxsize=64)
def _open_parquet(path: str, changed: int):
    """The file as a memory-mapped datasets.Dataset whose image columns stay encoded; `changed` (mtime) renews it."""
    import datasets  # here, since it takes a second to import

    table = datasets.Dataset.from_parquet(path)
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def _parquet_records(path: Path, image_column: str | None, text_column: str | None) -> Iterator[Record]:
    table = _open_parquet(str(path), path.stat().st_mtime_ns)
    names = sorted(table.column_names, key=_by_number)
    image_column = _column(image_column, ("image", *IMAGE_COLUMNS), names)
    text_column = _column(text_column, TEXT_COLUMNS, names)
    if missing := {image_column, text_column} - set(names):
        raise ValueError(f"no column {sorted(missing)}, it has {names}; set --image_column and --text_column")
    images = [image_column, *(name for name in names if name.startswith(f"source_{image_column}"))]
    kinds = {name: getattr(feature, "dtype", "") for name, feature in table.features.items()}
    if kinds[image_column] in ("string", "large_string"):
        images = []  # paths of ordinary files
    bulky = [name for name in names if kinds[name] in ("PIL.Image.Image", "binary", "large_binary")]
    for number, row in enumerate(table.remove_columns(list({*images, *bulky}))):
        if images:
            row["file_path"] = f"{path.name}::{number}"
            sources = [f"{path.name}::{number}::{name}" for name in images[1:]]
            row["source_file_path"] = sources or row.get("source_file_path")
        inside = tuple(("parquet", str(path), number, name) for name in images)
        row_column = "file_path" if images else image_column
        yield _record(row, number, f"{path.name} row", row_column, text_column, inside)


def _tar_records(path: Path, text_column: str | None) -> Iterator[Record]:
    """WebDataset's rule: members of one sample share the name up to its first dot."""
    samples: dict[str, tuple[dict, dict]] = {}  # key -> (row, images)
    with tarfile.open(path, "r:") as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            row, images = samples.setdefault(f"{folder}/{stem}" if folder else stem, ({}, {}))
            if suffix.lower().rpartition(".")[2] in IMAGE_SUFFIXES:
                kind = suffix if suffix.startswith("source") else ""  # "" is the target and sorts before the sources
                images[kind] = ("tar", str(path), member.offset_data, member.size)
            elif suffix in ("txt", "json"):
                try:
                    row.update(_tar_columns(tar, member, suffix, text_column or TEXT_COLUMNS[0]))
                except ValueError as error:
                    row["error"] = error
    for number, (key, (row, images)) in enumerate(samples.items()):
        row["file_path"] = f"{path.name}::{key}"
        kinds = sorted(images, key=_by_number)
        row["source_file_path"] = [f"{path.name}::{key}.{kind}" for kind in kinds if kind]
        problem = row.get("error") if "" in images else ValueError(f"no image, expected one of {IMAGE_SUFFIXES}")
        row = problem if isinstance(problem, ValueError) else row
        inside = tuple(images[kind] for kind in kinds)
        yield _record(row, number, f"{path.name} sample", "file_path", text_column, inside)


def _tar_columns(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, text_column: str) -> dict:
    """What a .txt or .json member says of its sample; ValueError when it cannot be read."""
    _check_size(member.size)
    data = tar.extractfile(member).read()
    if suffix == "txt":
        return {text_column: decode(data).strip()}
    columns = parse_json(data)
    if not isinstance(columns, dict):
        raise ValueError(f"the .json is a {type(columns).__name__}, expected an object")
    return columns


# ---- bytes and images of a record


def inside_folder(folder: str | Path, path: str) -> Path:
    """The file `path` of `folder`; ValueError when it leads out of it (.., an absolute path, a symbolic link)."""
    return Path(_inside(str(folder), path))


def _inside(folder: str, path: str) -> str:
    parent, _, name = (path if path.startswith("/") else f"{folder}/{path}").rpartition("/")
    full = _real(parent) + name
    if name in ("", ".", "..") or os.path.islink(full):
        full = os.path.realpath(full)
    if not full.startswith(_real(folder)) and os.path.join(full, "") != _real(folder):
        raise ValueError("outside train_data_dir")
    return full


@lru_cache(maxsize=2**14)
def _real(folder: str) -> str:
    """The folder's own path, with a slash behind it."""
    return os.path.join(os.path.realpath(folder or "/"), "")


def place_of(record: Record, train_data_dir: str | Path, which: int | str | None) -> tuple:
    """(path, place in a tar) of what read_bytes would read; ValueError for parquet, whose rows must be read first."""
    if isinstance(which, str):
        return (_inside(str(train_data_dir), record.extra[which]),)
    place = 0 if which is None else which + 1
    if place < len(record.inside):
        kind, *rest = record.inside[place]
        if kind != "tar":
            raise ValueError("a row of parquet")
        return tuple(rest)
    return (_inside(str(train_data_dir), record.file_path if which is None else record.source_file_path[which]),)


def read_file(path: Path) -> bytes:
    """The bytes of an ordinary file; ValueError for pipes, devices and files over LARGEST_FILE, before reading."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("a directory" if path.is_dir() else "not an ordinary file")
    _check_size(found.st_size)
    return path.read_bytes()


def _check_size(size: int) -> None:
    if size > LARGEST_FILE:
        raise ValueError(f"{size / 2**20:.0f} MiB; files of at most {LARGEST_FILE / 2**20:.0f} MiB are read")


def read_bytes(record: Record, train_data_dir: str | Path, which: int | str | None = None) -> bytes:
    """The encoded bytes of the target (which=None), of source `which`, or of the file that column `which` names."""
    if isinstance(which, str):
        return read_file(inside_folder(train_data_dir, str(record.extra[which])))
    place = 0 if which is None else which + 1
    value: object = record.file_path if which is None else record.source_file_path[which]
    if place < len(record.inside):
        kind, path, *rest = record.inside[place]
        if kind == "tar":
            _check_size(rest[1])
            with open(path, "rb") as file:
                file.seek(rest[0])
                return file.read(rest[1])
        row, column = rest
        value = _open_parquet(path, os.stat(path).st_mtime_ns).select_columns(column)[row][column]
        if isinstance(value, dict):
            value = value["path"] if value["bytes"] is None else value["bytes"]
    if value is None:
        raise FileNotFoundError("no image in this row")
    return value if isinstance(value, bytes) else read_file(inside_folder(train_data_dir, str(value)))


def load_image(
    record: Record, train_data_dir: str | Path, which: int | str | None = None, at_least: tuple[int, int] | None = None
) -> Image.Image:
    """RGB target (which=None), source `which`, or picture of column `which`; at_least as in decode_image."""
    return decode_image(read_bytes(record, train_data_dir, which), at_least)

"""From a manifest to records: what each row names, and its bytes.

row_files.py reads the rows; here they get their meaning. What is wrong with a row is kept with it, for check.py to
report.
"""

import dataclasses
import os
import re
import sys
import tarfile
from functools import lru_cache
from pathlib import Path

from PIL import Image

from common.data.images import decode_image
from common.data.json_rows import short
from common.data.row_files import (
    IMAGE_COLUMNS,
    MANIFESTS,
    READ,
    TEXT_COLUMNS,
    RawRow,
    check_size,
    column_of,
    folder_rows,
    found_in,
    hub_rows,
    read_file,
    rows_of_file,
    saved_table,
    table_bytes,
    table_rows,
)

NO_MORE: dict = {}  # one for all rows
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One of a run's several data sets, and how its rows are used: see sets.py."""

    train_data_dir: str
    train_data_meta: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    repeats: int = 1
    resolution: tuple[int, ...] = ()  # () is the run's
    caption_prefix: str = ""
    name: str = ""  # "1. portraits"


@dataclasses.dataclass(slots=True, unsafe_hash=True)  # there may be millions; check.py fills in what it finds
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
    other_texts: tuple[str, ...] = ()  # further captions; one of all is drawn in each epoch
    data_set: DataSet | None = None  # where there are several; paths are relative to its train_data_dir
    resolution: int = 0  # that this row is trained at; 0 is the run's

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.text, *self.other_texts)

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
    """All rows of a manifest, of a folder of pictures with texts, or of a data set of the datasets library.

    train_data_meta: a file or a glob, absolute or relative to train_data_dir or to the working directory; None: the
    first of MANIFESTS that train_data_dir has, else what row_files.READ names. Paths in a manifest are relative to
    train_data_dir. Columns that are not given are found among IMAGE_COLUMNS and TEXT_COLUMNS. Source images for
    editing: `source_file_path`, a path or a list; in parquet also image columns `source_<image_column>*`; in a tar
    members `<key>.source*.png`. train_data_dir may be a data set's name on the hub; train_data_meta is its split then.
    ValueError when there is nothing to read; a bad row is kept, with its problem, for check_records.
    """
    folder, columns = Path(train_data_dir), (image_column, text_column)
    if not folder.is_dir():
        if HUB_NAME.fullmatch(str(train_data_dir)) and not folder.parent.is_dir():
            rows = hub_rows(str(train_data_dir), str(train_data_meta or "train"), *columns)
            return [_record(row) for row in rows]
        raise ValueError(
            f"train_data_dir {folder} is no folder; expected the one that the manifest's paths start from"
        )
    files = _manifests(folder, train_data_meta)
    records: list[Record] = []
    for path in files:
        try:
            records += [_record(row) for row in rows_of_file(path, *columns)]
        except (ValueError, OSError, tarfile.TarError) as error:
            raise ValueError(f"cannot read the manifest {path}: {error}") from error
    if files and not records:
        raise ValueError(f"the manifest {files[0]} has zero rows; expected at least one image with its caption")
    if not files:
        split = None if train_data_meta is None else str(train_data_meta)
        saved = saved_table(folder, split)
        rows = table_rows(str(saved), saved.name, *columns) if saved else folder_rows(folder) if not split else ()
        records = [_record(row) for row in rows]
    if not records:
        wanted = f"no {train_data_meta}" if train_data_meta else "nothing that is read"
        raise ValueError(
            f"no manifest: there is {wanted} in {folder}, which holds {found_in(folder)}; read are {READ}; "
            "set --train_data_meta to the file that lists the images"
        )
    return records


def _manifests(folder: Path, train_data_meta: str | Path | None) -> list[Path]:
    """The files that train_data_meta names, or the first usual ones; none where there are none."""
    if train_data_meta is None:
        patterns = [folder / name for name in MANIFESTS]
    else:
        patterns = [folder / train_data_meta, Path(train_data_meta)]
    return next((found for found in map(_glob, patterns) if found), [])


def _glob(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.parent.glob(path.name)) if "*" in path.name else []


def _record(raw: RawRow) -> Record:
    """A Record from one row; what is wrong with the row goes into its `problem`."""
    row, number, manifest, image_column, text_column, inside = raw
    if not isinstance(row, dict):
        problem = str(row) if isinstance(row, ValueError) else f"got a {type(row).__name__}, expected an object"
        return Record(number, "", "", manifest=manifest, problem=problem)
    extra = dict(row)  # what is left of it
    path_key, text_column = column_of(image_column, IMAGE_COLUMNS, row), column_of(text_column, TEXT_COLUMNS, row)
    path, text, kind = extra.pop(path_key, None), extra.pop(text_column, None), extra.pop("type", None) or "image"
    sources = extra.pop("source_file_path", None) or []
    sources = sources if isinstance(sources, list) else [sources]
    texts = text if isinstance(text, list) else [text]
    problem = ""
    if not isinstance(path, str) or not path:
        problem = f"{path_key} is {short(path)}, expected a path"
    elif not texts or not all(isinstance(each, str) for each in texts):
        problem = f"{text_column} is {short(text)}, expected a caption, or a list of captions"
    elif not all(each.strip() for each in texts):
        problem = "empty caption"
    elif not all(isinstance(source, str) and source for source in sources):
        problem = f"source_file_path is {short(sources)}, expected paths"
    sources = tuple(map(str, sources))
    path, text, *others = str(path or ""), *([""] if problem else texts)
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
        other_texts=tuple(others),
    )


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


def folder_of(record: Record, train_data_dir: str | Path) -> str:
    """What a record's paths are relative to."""
    return record.data_set.train_data_dir if record.data_set else str(train_data_dir)


def place_of(record: Record, train_data_dir: str | Path, which: int | str | None) -> tuple:
    """(path, place in a tar) of what read_bytes would read; ValueError for parquet, whose rows must be read first."""
    train_data_dir = folder_of(record, train_data_dir)
    if isinstance(which, str):
        return (_inside(train_data_dir, record.extra[which]),)
    place = 0 if which is None else which + 1
    if place < len(record.inside):
        kind, *rest = record.inside[place]
        if kind != "tar":
            raise ValueError("a row of parquet")
        return tuple(rest)
    return (_inside(train_data_dir, record.file_path if which is None else record.source_file_path[which]),)


def read_bytes(record: Record, train_data_dir: str | Path, which: int | str | None = None) -> bytes:
    """The encoded bytes of the target (which=None), of source `which`, or of the file that column `which` names."""
    train_data_dir = folder_of(record, train_data_dir)
    place = 0 if which is None else which + 1 if isinstance(which, int) else len(record.inside)
    if isinstance(which, str):
        value = record.extra.get(which)
        if value is None and record.inside and record.inside[0][0] == "parquet":
            value = table_bytes(*record.inside[0][1:3], which)
        if not isinstance(value, str | bytes):
            raise ValueError(f"is {short(value)}, expected a path")
    else:
        value = record.file_path if which is None else record.source_file_path[which]
    if place < len(record.inside):
        kind, path, *rest = record.inside[place]
        if kind == "tar":
            check_size(rest[1])
            with open(path, "rb") as file:
                file.seek(rest[0])
                return file.read(rest[1])
        value = table_bytes(path, *rest)
    if value is None:
        raise FileNotFoundError("no image in this row")
    return value if isinstance(value, bytes) else read_file(inside_folder(train_data_dir, str(value)))


def load_image(
    record: Record,
    train_data_dir: str | Path,
    which: int | str | None = None,
    at_least: tuple[int, int] | None = None,
    keep_alpha: bool = False,
) -> Image.Image:
    """RGB target (which=None), source `which`, or picture of column `which`; at_least, keep_alpha as in
    decode_image."""
    return decode_image(read_bytes(record, train_data_dir, which), at_least, keep_alpha)

"""From a manifest to checked records: what each row names, its bytes, and the check of every row before training.

Reads a JSON list, JSONL, an image folder's metadata.jsonl, parquet and WebDataset shards. A bad row is named by file,
row number and reason.
"""

import dataclasses
import hashlib
import json
import os
import tarfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.images import check_image, decode_image

MANIFESTS = ("metadata.jsonl", "train.jsonl", "train.json", "metadata.json", "*.parquet", "*.tar")  # the first wins
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")


@dataclasses.dataclass(frozen=True)
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
    where: str = ""  # "train.jsonl line 7", for messages
    problem: str = ""  # what load_manifest found wrong with the row; check_records reports it
    # Target, then sources: ("tar", path, offset, size) or ("parquet", path, row, column); () for ordinary files.
    inside: tuple[tuple, ...] = ()


def load_manifest(
    train_data_dir: str | Path,
    train_data_meta: str | Path | None = None,
    image_column: str = "image",
    text_column: str = "text",
) -> list[Record]:
    """All rows of a JSON list, a JSONL file, an image folder's metadata.jsonl, parquet, or WebDataset shards (*.tar).

    train_data_meta: a file or a glob, absolute or relative to train_data_dir or to the working directory; None: the
    first of MANIFESTS that train_data_dir has. Paths in a manifest are relative to train_data_dir. Source images for
    editing: `source_file_path`, a path or a list; in parquet also image columns `source_<image_column>*`; in a tar
    members `<key>.source*.png`. ValueError when there is nothing to read; a bad row is kept, with its problem, for
    check_records.
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
                records += [_record(*row, image_column, text_column) for row in _json_rows(path)]
            else:
                raise ValueError("expected a .json, .jsonl, .parquet or uncompressed .tar file")
        except (ValueError, OSError, tarfile.TarError) as error:
            raise ValueError(f"cannot read the manifest {path}: {error}") from error
    if not records:
        raise ValueError(f"the manifest {files[0]} has zero rows; expected at least one image with its caption")
    return records


def _glob(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.parent.glob(path.name)) if "*" in path.name else []


def _json_rows(path: Path) -> Iterator[tuple[object, int, str]]:
    """(row, its number, where it is) of a JSON list or of the lines of a JSONL file."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        rows = json.loads(text)
        if not isinstance(rows, list):
            raise ValueError(f"got a JSON {type(rows).__name__}, expected a list of rows")
        yield from ((row, number, f"{path.name} row {number}") for number, row in enumerate(rows))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                row = ValueError(f"not valid JSON: {error}")
            yield row, number, f"{path.name} line {number}"


def _record(row: object, number: int, where: str, image_column: str, text_column: str, inside: tuple = ()) -> Record:
    """A Record from one row; what is wrong with the row goes into its `problem`."""
    if not isinstance(row, dict):
        problem = str(row) if isinstance(row, ValueError) else f"got a {type(row).__name__}, expected an object"
        return Record(number, "", "", where=where, problem=problem)
    extra = dict(row)
    path_key = next((key for key in (image_column, "file_path", "file_name") if key in row), "file_path")
    path, text, kind = extra.pop(path_key, None), extra.pop(text_column, None), extra.pop("type", None) or "image"
    sources = extra.pop("source_file_path", None) or []
    sources = sources if isinstance(sources, list) else [sources]
    problem = ""
    if not isinstance(path, str) or not path:
        problem = f"{path_key} is {path!r}, expected a path"
    elif not isinstance(text, str):
        problem = f"{text_column} is {text!r}, expected a caption"
    elif not text.strip():
        problem = "empty caption"
    elif not all(isinstance(source, str) and source for source in sources):
        problem = f"source_file_path is {sources!r}, expected paths"
    sources = tuple(map(str, sources))
    path, text = str(path or ""), str(text or "")
    return Record(number, path, text, sources, str(kind), extra, where=where, problem=problem, inside=inside)


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


def _parquet_records(path: Path, image_column: str, text_column: str) -> Iterator[Record]:
    table = _open_parquet(str(path), path.stat().st_mtime_ns)
    names = sorted(table.column_names, key=_by_number)
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
        yield _record(row, number, f"{path.name} row {number}", image_column, text_column, inside)


def _tar_records(path: Path, text_column: str) -> Iterator[Record]:
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
            elif suffix == "txt":
                row[text_column] = tar.extractfile(member).read().decode("utf-8", errors="replace").strip()
            elif suffix == "json":
                try:
                    row.update(json.loads(tar.extractfile(member).read()))
                except (ValueError, TypeError) as error:
                    row["error"] = ValueError(f"not valid JSON: {error}")
    for number, (key, (row, images)) in enumerate(samples.items()):
        row["file_path"] = f"{path.name}::{key}"
        kinds = sorted(images, key=_by_number)
        row["source_file_path"] = [f"{path.name}::{key}.{kind}" for kind in kinds if kind]
        problem = row.get("error") if "" in images else ValueError(f"no image, expected one of {IMAGE_SUFFIXES}")
        row = problem if isinstance(problem, ValueError) else row
        inside = tuple(images[kind] for kind in kinds)
        yield _record(row, number, f"{path.name} sample {number} ({key})", "file_path", text_column, inside)


# ---- bytes and images of a record


def inside_folder(folder: str | Path, path: str) -> Path:
    """The file `path` of `folder`; ValueError when it leads out of it (.., an absolute path, a symbolic link)."""
    root, full = os.path.realpath(folder), os.path.realpath(os.path.join(folder, path))
    if os.path.commonpath([root, full]) != root:
        raise ValueError("outside train_data_dir")
    return Path(full)


def read_bytes(record: Record, train_data_dir: str | Path, which: int | None = None) -> bytes:
    """The encoded bytes of the target (which=None) or of source `which`. Works in threads and in loader workers."""
    place = 0 if which is None else which + 1
    value: object = record.file_path if which is None else record.source_file_path[which]
    if place < len(record.inside):
        kind, path, *rest = record.inside[place]
        if kind == "tar":
            with open(path, "rb") as file:
                file.seek(rest[0])
                return file.read(rest[1])
        row, column = rest
        value = _open_parquet(path, os.stat(path).st_mtime_ns).select_columns(column)[row][column]
        if isinstance(value, dict):
            value = value["path"] if value["bytes"] is None else value["bytes"]
    if value is None:
        raise FileNotFoundError("no image in this row")
    return value if isinstance(value, bytes) else inside_folder(train_data_dir, str(value)).read_bytes()


def load_image(
    record: Record, train_data_dir: str | Path, which: int | None = None, at_least: tuple[int, int] | None = None
) -> Image.Image:
    """RGB target (which=None) or source image `which` of a record; at_least as in decode_image."""
    return decode_image(read_bytes(record, train_data_dir, which), at_least)


# ---- the check of every row


def _check(
    record: Record,
    train_data_dir: str | Path,
    known_good: Collection[str],
    max_pixels: int,
    source_problem: Callable[[int, int], str],
    check: Callable[[bytes, bool, int], tuple[int, int]],
) -> Record:
    """The record with digest, width and height filled in, or with its `problem`."""
    if record.problem:
        return record
    names = ["", *(f"source {i} ({path}): " for i, path in enumerate(record.source_file_path))]
    digest, images, sizes = hashlib.blake2b(digest_size=16), [], []
    try:
        for place in range(len(names)):
            images.append(read_bytes(record, train_data_dir, place - 1 if place else None))
            digest.update(len(images[-1]).to_bytes(8, "little") + images[-1])
        decode = digest.hexdigest() not in known_good
        for place in range(len(names)):
            sizes.append(check(images[place], decode, max_pixels))
            if place and (problem := source_problem(*sizes[-1])):
                raise ValueError(problem)
    except (FileNotFoundError, NotADirectoryError):
        return dataclasses.replace(record, problem=f"{names[place]}missing")
    except (OSError, ValueError) as error:
        return dataclasses.replace(record, problem=f"{names[place]}{error}")
    (width, height), *source_sizes = sizes
    return dataclasses.replace(
        record, digest=digest.hexdigest(), width=width, height=height, source_sizes=tuple(source_sizes)
    )


def check_records(
    records: Sequence[Record],
    train_data_dir: str | Path,
    on_bad_rows: str = "error",
    output_dir: str | Path | None = None,
    known_good: Collection[str] = frozenset(),
    progress: bool = True,
    max_pixels: int | None = None,
    types: Collection[str] = ("image",),
    source_problem: Callable[[int, int], str] = lambda width, height: "",
    checks: Mapping[str, Callable[[bytes, bool, int], tuple[int, int]]] = MappingProxyType({}),
) -> list[Record]:
    """The good records, in order, with digest and size; an image is decoded unless its digest is in known_good.

    on_bad_rows "error": one ValueError names the first 20 bad rows; "skip": they go to output_dir/bad_rows.jsonl.
    types: of rows that this recipe can train on. max_pixels: of the largest image; None is Pillow's own warning limit,
    89 million. source_problem: what makes a source image of (width, height) unusable, "" if nothing. checks: what
    takes check_image's place for the files of another type ({"video": check_video}). The same answer on every rank.
    """
    wrong = f"expected {' or '.join(types)}"
    records = [
        dataclasses.replace(r, problem=f"type is {r.type!r}, {wrong}") if not r.problem and r.type not in types else r
        for r in records
    ]
    if on_bad_rows not in ("error", "skip"):
        raise ValueError(f"on_bad_rows is {on_bad_rows!r}; expected error or skip")
    limit = max_pixels or Image.MAX_IMAGE_PIXELS or 2**62
    with warnings.catch_warnings(), ThreadPool(2 * (os.cpu_count() or 1)) as pool:  # Pillow decodes without the GIL
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        results = pool.imap(
            lambda record: _check(
                record, train_data_dir, known_good, limit, source_problem, checks.get(record.type, check_image)
            ),
            records,
            chunksize=8,
        )
        results = list(tqdm(results, "check data", len(records), unit="row", disable=not progress))
    bad = [record for record in results if record.problem]
    good = [record for record in results if not record.problem]
    if bad and (on_bad_rows == "error" or not good):
        advice = "repair them, or leave them out with --on_bad_rows skip" if good else "none is left to train on"
        rows = [f"\n  {record.where}: {record.file_path or '(no file)'}: {record.problem}" for record in bad[:20]]
        raise ValueError(f"{len(bad)} of {len(results)} rows are bad; {advice}. The first {len(rows)}:{''.join(rows)}")
    if bad:
        _write_bad_rows(bad, output_dir)
        listed = f", listed in {Path(output_dir, 'bad_rows.jsonl')}" if output_dir else ""
        print(f"{len(bad)} of {len(results)} rows are bad and left out (--on_bad_rows skip){listed}")
    return good


def _write_bad_rows(bad: list[Record], output_dir: str | Path | None) -> None:
    if output_dir is not None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        half = Path(output_dir, f"bad_rows.{os.getpid()}.tmp")
        rows = [{"file": r.file_path, "row": r.row, "where": r.where, "reason": r.problem} for r in bad]
        half.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        half.replace(Path(output_dir, "bad_rows.jsonl"))


def hold_out(records: Sequence[Record], count: int, seed: int) -> tuple[list[Record], list[Record]]:
    """(rows to train on, held-out rows): `count` of them, at most a tenth, drawn by the seed, in manifest order."""
    drawn = np.random.RandomState(seed).permutation(len(records))[: min(count, len(records) // 10)]
    held_out = set(drawn.tolist())
    return [r for i, r in enumerate(records) if i not in held_out], [records[i] for i in sorted(held_out)]

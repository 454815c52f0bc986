"""The check of every row before training: a bad one is named by file, row number and reason."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from multiprocessing.pool import IMapIterator, ThreadPool
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from common.data import notices, sets
from common.data.images import check_image
from common.data.json_rows import many_objects, short
from common.data.known_files import KnownFiles
from common.data.manifest import Record, read_bytes
from common.processes import Run, on_main
from common.progress import progress_bar, stage
from common.settings import Pictured

NONE_KNOWN = KnownFiles()
ROW_SECONDS = 600  # for a row's files; the slowest video takes seconds


def load_records(
    cfg: Pictured,
    run: Run,
    known_good: KnownFiles,
    row_problem: Callable[[Record], str] = lambda record: "",
    **checks: Any,
) -> tuple[list[Record], list[Record]]:
    """Checked rows: those to train on, and those held out for the validation loss. row_problem: why this recipe cannot
    use a row, "" if it can; checks: see check_records."""

    def load() -> tuple[list[Record], list[Record]]:
        with many_objects():
            columns = cfg.pictures.image_column, cfg.pictures.text_column
            rows = sets.load_rows(cfg.data.train_data_dir, cfg.data.train_data_meta, *columns)
            good = check(cfg, rows, known_good, row_problem, **checks)
            return hold_out(good, held_out, cfg.run.seed)

    held_out = cfg.drawing.num_validation_samples
    train, unseen = on_main(run, load)
    train = sets.as_trained(train, cfg.pictures.more_resolutions)
    run.data_sets = sets.counted(train)
    return train, [] if cfg.run.dry_run else unseen


def check(
    cfg: Pictured,
    records: Sequence[Record],
    known_good: KnownFiles = NONE_KNOWN,
    row_problem: Callable[[Record], str] = lambda record: "",
    **checks: Any,
) -> list[Record]:
    """The rows that this recipe can use; the others are a ValueError or left out, as on_bad_rows says."""
    records = [
        dataclasses.replace(record, problem=problem)
        if not record.problem and (problem := row_problem(record))
        else record
        for record in records
    ]
    return check_records(
        records, cfg.data.train_data_dir, cfg.data.on_bad_rows, cfg.run.output_dir, known_good, **checks
    )


def _check(
    record: Record,
    train_data_dir: str | Path,
    known_good: KnownFiles,
    max_pixels: int,
    source_problem: Callable[[int, int], str],
    check: Callable[[bytes, bool, int], tuple[int, int]],
    file_columns: Sequence[str],
    unusual: list[tuple[str, str]],
) -> Record:
    """The record with digest, width and height filled in, or with its `problem`; to `unusual` goes what is legal and
    probably wrong, and where."""
    if record.problem:
        return record
    sources = record.source_file_path
    names = ["", *(f"source {i} ({path}): " for i, path in enumerate(sources)), *(f"{c}: " for c in file_columns)]
    places = [None, *range(len(sources)), *file_columns]
    digest, images, sizes = hashlib.blake2b(digest_size=16), [], []
    try:
        for place in range(len(names)):
            images.append(read_bytes(record, train_data_dir, places[place]))
            digest.update(len(images[-1]).to_bytes(8, "little") + images[-1])
        decode = digest.hexdigest() not in known_good
        for place in range(len(names)):
            sizes.append((check_image if place > len(sources) else check)(images[place], decode, max_pixels))
            if place > len(sources) and sizes[-1] != sizes[0]:
                (width, height), whole = sizes[-1], sizes[0]
                raise ValueError(f"is {width} x {height}, expected the picture's {whole[0]} x {whole[1]}")
            if 0 < place <= len(sources) and (problem := source_problem(*sizes[-1])):
                raise ValueError(problem)
    except (FileNotFoundError, NotADirectoryError):
        return dataclasses.replace(record, problem=f"{names[place][:200]}missing")
    except (OSError, ValueError) as error:
        return dataclasses.replace(record, problem=f"{names[place][:200]}{error}"[:400])
    unusual.extend((what, record.where) for what in notices.of_files(images, len(sources)))
    _found_good(record, digest.hexdigest(), sizes)
    return record


def _found_good(record: Record, digest: str, sizes: Sequence[tuple[int, int]]) -> None:
    """In place: there may be millions, and a copy of each."""
    record.digest, (record.width, record.height) = digest, sizes[0]
    record.source_sizes = tuple(sizes[1 : 1 + len(record.source_file_path)])


def _unknown(
    records: Sequence[Record],
    train_data_dir: str | Path,
    known_good: KnownFiles,
    max_pixels: int,
    source_problem: Callable[[int, int], str],
    file_columns: Sequence[str],
) -> list[int]:
    """Places of the records whose files must be looked at; the others, whose files are known and fit, are filled
    in."""
    unknown = []
    for start in range(0, len(records), 10_000):
        part = records[start : start + 10_000]
        found = known_good.find(part, train_data_dir, file_columns)
        for place, (record, known) in enumerate(zip(part, found, strict=True), start=start):
            if record.problem or not known or not _fits(record, known[1], max_pixels, source_problem):
                unknown.append(place)
            else:
                _found_good(record, *known)
    return unknown


def _in_time(looked_at: IMapIterator, records: Sequence[Record]) -> Iterator[Record]:
    """What is looked at, as it comes; ValueError names a row that takes for ever, on a network's disk perhaps."""
    for record in records:
        try:
            yield looked_at.next(timeout=ROW_SECONDS)
        except multiprocessing.TimeoutError as error:
            raise ValueError(
                f"{record.where}: {record.file_path[:100]}: not looked at within {ROW_SECONDS} s; does its disk "
                "answer, and can other programs open it? Leave the row out of the manifest to go on"
            ) from error


def _fits(
    record: Record, sizes: Sequence[tuple[int, int]], max_pixels: int, source_problem: Callable[[int, int], str]
) -> bool:
    if any(width * height > max_pixels for width, height in sizes):
        return False
    return not any(source_problem(*size) for size in sizes[1 : 1 + len(record.source_file_path)])


def check_records(
    records: Sequence[Record],
    train_data_dir: str | Path,
    on_bad_rows: str = "error",
    output_dir: str | Path | None = None,
    known_good: KnownFiles = NONE_KNOWN,
    progress: bool = True,
    max_pixels: int | None = None,
    types: Collection[str] = ("image",),
    source_problem: Callable[[int, int], str] = lambda width, height: "",
    checks: Mapping[str, Callable[[bytes, bool, int], tuple[int, int]]] = MappingProxyType({}),
    file_columns: Sequence[str] = (),
) -> list[Record]:
    """The good records, in order, with digest and size. Files that known_good knows are not read; an image is decoded
    unless its digest is in known_good.

    on_bad_rows "error": one ValueError names the first 20 bad rows; "skip": they go to output_dir/bad_rows.jsonl.
    types: of rows that this recipe can train on. max_pixels: of the largest image; None is Pillow's own warning limit,
    89 million. source_problem: what makes a source image of (width, height) unusable, "" if nothing. checks: what
    takes check_image's place for the files of another type ({"video": check_video}). file_columns: further columns
    that name a picture (a mask): checked too, their bytes are part of the digest. The same answer on every rank.
    """
    wrong = f"expected {' or '.join(types)}"
    records = [
        dataclasses.replace(r, problem=f"type is {short(r.type)}, {wrong}")
        if not r.problem and r.type not in types
        else r
        for r in records
    ]
    if on_bad_rows not in ("error", "skip"):
        raise ValueError(f"on_bad_rows is {on_bad_rows!r}; expected error or skip")
    limit = max_pixels or Image.MAX_IMAGE_PIXELS or 2**62
    unknown = _unknown(records, train_data_dir, known_good, limit, source_problem, file_columns)
    unusual: list[tuple[str, str]] = []
    with warnings.catch_warnings(), ThreadPool(2 * (os.cpu_count() or 1)) as pool:  # Pillow decodes without the GIL
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        looked_at = pool.imap(
            lambda record: _check(
                record,
                train_data_dir,
                known_good,
                limit,
                source_problem,
                checks.get(record.type, check_image),
                file_columns,
                unusual,
            ),
            (records[place] for place in unknown),
        )
        looked_at = _in_time(looked_at, [records[place] for place in unknown])
        with stage("check", len(records)):
            looked_at = list(progress_bar(looked_at, "check data", len(unknown), unit="rows", disable=not progress))
    known_good.keep([record for record in looked_at if not record.problem], train_data_dir, file_columns)
    for place, record in zip(unknown, looked_at, strict=True):
        records[place] = record
    bad = [record for record in records if record.problem]
    good = [record for record in records if not record.problem]
    if bad and (on_bad_rows == "error" or not good):
        advice = "repair them, or leave them out with --on_bad_rows skip" if good else "none is left to train on"
        rows = [
            f"\n  {record.where}: {record.file_path[:100] or '(no file)'}: {record.problem}" for record in bad[:20]
        ]
        raise ValueError(f"{len(bad)} of {len(records)} rows are bad; {advice}. The first {len(rows)}:{''.join(rows)}")
    if bad:
        _write_bad_rows(bad, output_dir)
        listed = f", listed in {Path(output_dir, 'bad_rows.jsonl')}" if output_dir else ""
        print(f"{len(bad)} of {len(records)} rows are bad and left out (--on_bad_rows skip){listed}")
    for line in notices.lines(good, unusual):
        print(line)
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

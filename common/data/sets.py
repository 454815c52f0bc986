"""Several data sets in one run: a YAML list of folders, and how the rows of each are used.

    - train_data_dir: portraits          a folder beside the file or anywhere, or a data set of the hub
      repeats: 3                         how often an epoch has each row
      resolution: [512, 768]             in place of the run's; of several, each row is trained at each
      caption_prefix: "a photo of sks, "
    - train_data_dir: someone/landscapes

A row that an epoch has more than once is that many samples, so their order stays a function of the seed and the steps.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import yaml

from common.data.json_rows import short
from common.data.manifest import DataSet, Record, load_manifest

LISTS = (".yaml", ".yml")


def load_rows(
    train_data_dir: str | Path, train_data_meta: str | None, image_column: str | None, text_column: str | None
) -> list[Record]:
    """The rows of train_data_dir, or, where that is a YAML file, of the data sets that it lists. ValueError says what
    is wrong with the list."""
    path = Path(train_data_dir)
    if path.suffix not in LISTS:
        return load_manifest(train_data_dir, train_data_meta, image_column, text_column)
    if train_data_meta:
        raise ValueError(
            f"train_data_meta is {train_data_meta}, but {path} lists several data sets; name it there, for each"
        )
    records = []
    for of in read_sets(path):
        columns = of.image_column or image_column, of.text_column or text_column
        records += [_of_set(record, of) for record in load_manifest(of.train_data_dir, of.train_data_meta, *columns)]
    return records


def _of_set(record: Record, of: DataSet) -> Record:
    text, *others = (of.caption_prefix + each if each else "" for each in record.captions)
    own = {"data_set": of, "resolution": max(of.resolution, default=0), "manifest": f"{of.name}: {record.manifest}"}
    return replace(record, text=text, other_texts=tuple(others), **own)


def read_sets(path: Path) -> list[DataSet]:
    """The data sets that a YAML file lists."""
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no YAML that can be read: {' '.join(str(error).split())}"[:400]) from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} is {short(entries)}, expected a list of data sets, each `- train_data_dir: FOLDER`")
    return [_read_set(entry, number, path) for number, entry in enumerate(entries, start=1)]


def _read_set(entry: object, number: int, path: Path) -> DataSet:
    where, known = f"data set {number} of {path}", {field.name for field in fields(DataSet)} - {"name"}
    if not isinstance(entry, dict) or not isinstance(entry.get("train_data_dir"), str):
        raise ValueError(f"{where} is {short(entry)}, expected `train_data_dir: FOLDER` and what else there is to say")
    if unknown := sorted(map(str, entry.keys() - known)):
        raise ValueError(f"{where} has {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
    words = known - {"repeats", "resolution"}
    if wrong := sorted(name for name in words & entry.keys() if not isinstance(entry[name], str)):
        raise ValueError(f"{where}: {wrong[0]} is {short(entry[wrong[0]])}, expected a text; put it in quotes")
    repeats, sides = entry.get("repeats", 1), entry.get("resolution", [])
    sides = sides if isinstance(sides, list) else [sides]
    if type(repeats) is not int or not 1 <= repeats <= 1_000_000:
        raise ValueError(
            f"{where}: repeats is {short(repeats)}, expected a whole number from 1, how often an epoch has each row"
        )
    if not all(type(side) is int and 16 <= side <= 8192 and side % 16 == 0 for side in sides):
        raise ValueError(f"{where}: resolution is {short(sides)}, expected multiples of 16, at most 8192")
    folder = path.parent / entry["train_data_dir"]
    folder = str(folder) if folder.is_dir() else entry["train_data_dir"]
    name = f"{number}. {Path(folder).name}"
    return DataSet(**{**entry, "train_data_dir": folder, "resolution": tuple(sides), "name": name})


def as_trained(records: Iterable[Record], more_resolutions: Sequence[int]) -> list[Record]:
    """Each row at each of its resolutions, as often as an epoch has it."""
    result = []
    for record in records:
        of = record.data_set
        sides = of.resolution if of and of.resolution else (0, *more_resolutions)  # 0 is the run's
        each = [record] if len(sides) == 1 else [replace(record, resolution=side) for side in sides]
        result += each * (of.repeats if of else 1)
    return result


def counted(records: Iterable[Record]) -> dict[str, int]:
    """How many of the rows each data set has."""
    return dict(Counter(record.data_set.name for record in records if record.data_set))

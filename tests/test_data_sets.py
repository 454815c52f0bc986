"""common/data/sets.py: several data sets in one run, several resolutions of a row."""

from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from data_files import png, write_lines
from helpers import ROOT, load_script

from common.data import check, known_files, manifest, order
from common.data.cache import EmbeddingCache
from common.start.config import parse_recipe
from common.start.folders import resolve_paths

SETS = [
    {"train_data_dir": "portraits", "repeats": 3, "resolution": [64, 32], "caption_prefix": "a sks, "},
    {"train_data_dir": "landscapes", "train_data_meta": "mine.jsonl", "text_column": "said"},
]


@pytest.fixture
def sets(tmp_path) -> Path:
    """sets.yaml beside two folders whose pictures have the same names: 4 red portraits, 18 blue landscapes."""
    for name, colour, column in (("portraits", "red", "text"), ("landscapes", "blue", "said")):
        (tmp_path / name).mkdir()
        rows = [
            {"file_path": f"{number}.png", column: f"picture {number}"}
            for number in range(4 if column == "text" else 18)
        ]
        for number, row in enumerate(rows):
            (tmp_path / name / row["file_path"]).write_bytes(png(colour, size=(48, 32 + number)))
        write_lines(tmp_path / name / ("train.jsonl" if column == "text" else "mine.jsonl"), rows)
    (tmp_path / "portraits/train.jsonl").write_text(
        '{"file_path": "0.png", "text": ["picture 0", "zero"]}\n'
        + "".join((tmp_path / "portraits/train.jsonl").read_text().splitlines(keepends=True)[1:])
    )
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump(SETS))
    return tmp_path / "sets.yaml"


def load(path: Path, *flags: object, known_good: known_files.KnownFiles | None = None):
    """(rows to train on, held out, the run) as prepare_data of a recipe has them."""
    train = load_script(ROOT / "recipes/qwenimage_fulltune/train.py")
    argv = ["--train_data_dir", path, "--output_dir", path.parent / "out", "--num_validation_samples", 2, *flags]
    cfg, run = parse_recipe(train.Config, list(map(str, argv))), SimpleNamespace(is_main=True, world_size=1)
    resolve_paths(cfg, ROOT / "recipes/qwenimage_fulltune")
    return *check.load_records(cfg, run, known_good or known_files.KnownFiles()), run


def test_a_list_of_data_sets(sets, tmp_path):
    """Catches rows of one set alone, pictures or captions of another set's folder, a prefix that is missing or on all,
    repeats and resolutions that are not the set's, counts of other rows, and pictures that are read at every start."""
    known_good = known_files.KnownFiles(tmp_path / "known.npy")
    train, held_out, run = load(sets, known_good=known_good)
    portraits, landscapes = (
        [row for row in train if row.data_set.name == name] for name in ("1. portraits", "2. landscapes")
    )
    kept = {row.file_path for row in held_out if row.data_set.name == "1. portraits"}
    assert run.data_sets == {"1. portraits": 6 * (4 - len(kept)), "2. landscapes": 18 - 2 + len(kept)}
    assert len(portraits) == run.data_sets["1. portraits"] and len(landscapes) == run.data_sets["2. landscapes"]
    assert len(held_out) == len({row.digest for row in held_out}) == 2
    assert not {row.digest for row in held_out} & {row.digest for row in train}, "none is trained on"
    assert set(Counter((row.file_path, row.resolution) for row in portraits).values()) == {3}
    assert {row.resolution for row in portraits} == {32, 64} and {row.resolution for row in landscapes} == {0}
    assert all(text.startswith("a sks, ") for row in portraits for text in row.captions)
    assert all(row.text == f"picture {row.row - 1}" for row in landscapes)
    assert any(len(row.captions) == 2 for row in [*portraits, *held_out])
    for row in (portraits[0], landscapes[0]):
        assert manifest.load_image(row, sets).getpixel((0, 0)) == ((255, 0, 0) if row in portraits else (0, 0, 255))
    assert landscapes[0].where.startswith("2. landscapes: mine.jsonl line ")
    buckets = order.choose_buckets(train, 96, 16)
    areas = {row.resolution: width * height for row, (width, height) in zip(train, buckets, strict=True)}
    assert areas[32] < areas[64] < areas[0]
    keys = [EmbeddingCache(tmp_path / "cache", {}).key(row, size) for row, size in zip(train, buckets, strict=True)]
    assert len(set(keys)) == len(train) - 2 / 3 * len(portraits), "what is repeated is encoded once"


def test_known_files_are_not_read_again(sets, tmp_path, monkeypatch):
    """Catches a start that looks for the files of a set in another folder."""
    monkeypatch.setattr(known_files, "SETTLED", -(10**12))
    load(sets, known_good=known_files.KnownFiles(tmp_path / "known.npy"))
    monkeypatch.setattr(check, "read_bytes", None)
    train, held_out, _ = load(sets, known_good=known_files.KnownFiles(tmp_path / "known.npy"))
    assert len({row.digest for row in [*train, *held_out]}) == 22


def test_an_epoch_is_exact(sets):
    """Catches an epoch that has a set more or less often than it says, on one process, on two, and after a resume."""
    train, _, _ = load(sets)
    ids = [0] * len(train)
    whole = [place for places in islice(order.MicroBatchSampler(ids, 2, 1, 0, 1, 7), len(train)) for place in places]
    seen = Counter(train[place.sample].data_set.name for place in whole if place.epoch == 0)
    assert seen == Counter(row.data_set.name for row in train)
    ranks = [islice(order.MicroBatchSampler(ids, 1, 1, rank, 2, 7), len(train)) for rank in range(2)]
    assert [place.sample for pair in zip(*ranks, strict=True) for (place,) in pair] == [
        place.sample for place in whole
    ]
    later = order.MicroBatchSampler(ids, 2, 1, 0, 1, 7, [[2, 5]], 5)
    assert [place for places in islice(later, 3) for place in places] == whole[10:16]


def test_more_resolutions(sets, tmp_path):
    """Catches a further resolution that replaces the run's, that held-out rows have too, or that a data set with one
    of its own has; and small pictures that are enlarged without a word."""
    train, held_out, _ = load(tmp_path / "portraits", "--more_resolutions", 32, 48, "--resolution", 64)
    assert Counter(row.resolution for row in train) == {0: 4, 32: 4, 48: 4} and not held_out
    sizes = order.choose_buckets(train, 64, 16)
    sides = {row.resolution: (width * height) ** 0.5 for row, (width, height) in zip(train, sizes, strict=True)}
    assert {side: round(sides[side] / 16) * 16 for side in sides} == {0: 64, 32: 32, 48: 48}
    said = order.describe_buckets(train, sizes)
    assert "32 x 32: 4" in said and said.endswith("8 of 12 pictures are smaller than their bucket and are enlarged")
    assert "enlarged" not in order.describe_buckets(train[1:2], sizes[1:2])
    train, _, _ = load(sets, "--more_resolutions", 48, "--resolution", 96)
    assert {(row.data_set.name[0], row.resolution) for row in train} == {("1", 32), ("1", 64), ("2", 0), ("2", 48)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is None, expected a list of data sets"),
        ("{train_data_dir: portraits}", "expected a list of data sets"),
        ("[", "no YAML that can be read"),
        ("[portraits]", "data set 1 .* is 'portraits', expected `train_data_dir: FOLDER`"),
        ("[{repeats: 2}]", "expected `train_data_dir: FOLDER`"),
        (
            "[{train_data_dir: portraits}, {train_data_dir: portraits, weight: 2}]",
            "data set 2 .* has weight; expected some",
        ),
        ("[{train_data_dir: portraits, name: x}]", "has name; expected some of"),
        ("[{train_data_dir: portraits, repeats: 0}]", "repeats is 0, expected a whole number from 1"),
        ("[{train_data_dir: portraits, repeats: true}]", "repeats is True"),
        ("[{train_data_dir: portraits, repeats: 1.5}]", "repeats is 1.5"),
        ("[{train_data_dir: portraits, resolution: 100}]", "resolution is .100., expected multiples of 16"),
        ("[{train_data_dir: portraits, resolution: big}]", "resolution is .'big'."),
        ("[{train_data_dir: portraits, caption_prefix: 3}]", "caption_prefix is 3, expected a text"),
        ("[{train_data_dir: nowhere}]", "train_data_dir nowhere is no folder"),
        ("[{train_data_dir: portraits, text_column: said}]", r"1. portraits: train.jsonl line 1: .*said is None"),
    ],
)
def test_lists_that_cannot_be_meant(sets, text, said):
    """Catches a list that ends in a traceback, or whose mistake is passed over."""
    sets.write_text(text)
    with pytest.raises(ValueError, match=said):
        load(sets)


def test_one_manifest_for_several_sets_is_refused(sets):
    """Catches a flag that one set takes and the others do not."""
    with pytest.raises(ValueError, match=r"train_data_meta is mine\.jsonl, but .* lists several"):
        load(sets, "--train_data_meta", "mine.jsonl")
    with pytest.raises(ValueError, match="more_resolutions must be multiples of 16, at most 8192, got 100"):
        load(sets, "--more_resolutions", 100)

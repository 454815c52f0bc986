"""common/manifest.py, images.py, data.py and cache.py: bad rows, pixels, buckets, the order of samples, the cache."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter, defaultdict
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import data, images, manifest
from common.cache import EmbeddingCache
from common.manifest import Record


def png(colour="red", size=(48, 32), mode="RGB", kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind, **options)
    return buffer.getvalue()


def write_lines(path: Path, rows: list) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train").mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        (tmp_path / f"train/{number}.png").write_bytes(png(colour))
    return tmp_path


ROWS = [{"file_path": f"train/{number}.png", "text": f"picture {number}", "width": 7} for number in range(3)]


# ---- manifests


def expect_three(folder, meta=None, **columns):
    records = manifest.check_records(manifest.load_manifest(folder, meta, **columns), folder, progress=False)
    assert [record.text for record in records] == ["picture 0", "picture 1", "picture 2"]
    assert [manifest.load_image(record, folder).getpixel((0, 0)) for record in records] == [
        (255, 0, 0),
        (0, 128, 0),
        (0, 0, 255),
    ]
    assert all((record.width, record.height) == (48, 32) for record in records)
    return records


def test_json_list(folder, monkeypatch):
    (folder / "train.json").write_text(json.dumps(ROWS))
    records = expect_three(folder)
    assert [record.row for record in records] == [0, 1, 2] and records[0].extra == {"width": 7}
    expect_three(folder, "train.json")
    expect_three(folder, folder / "train.json")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (folder / "train.json").rename(elsewhere / "mine.json")
    monkeypatch.chdir(elsewhere)
    expect_three(folder, "mine.json")  # relative to the working directory


def test_jsonl_counts_lines(folder):
    write_lines(folder / "train.jsonl", [ROWS[0], "", *ROWS[1:]])
    assert [record.row for record in expect_three(folder)] == [1, 3, 4]


def test_image_folder(folder):
    write_lines(folder / "metadata.jsonl", [{"file_name": row["file_path"], "text": row["text"]} for row in ROWS])
    assert expect_three(folder)[2].where == "metadata.jsonl line 3"


@pytest.fixture
def parquet_cache(tmp_path_factory, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()
    return datasets


@pytest.mark.parametrize("kind", ["image feature", "bytes", "paths"])
def test_parquet(folder, parquet_cache, kind):
    contents = [(folder / row["file_path"]).read_bytes() for row in ROWS]
    if kind == "image feature":
        contents = [{"bytes": image, "path": None} for image in contents]
    if kind == "paths":
        contents = [row["file_path"] for row in ROWS]
    features = {"image feature": parquet_cache.Image(), "bytes": parquet_cache.Value("binary")}
    columns = {"image": contents, "text": [row["text"] for row in ROWS], "score": [1, 2, 3]}
    table = parquet_cache.Dataset.from_dict(columns)
    table.cast_column("image", features.get(kind, parquet_cache.Value("string"))).to_parquet(folder / "part.parquet")
    records = expect_three(folder)
    assert records[1].extra == {"score": 2}
    assert records[1].file_path == ("train/1.png" if kind == "paths" else "part.parquet::1")
    assert [record.row for record in records] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"no column \['caption'\].*--text_column"):
        manifest.load_manifest(folder, text_column="caption")


def test_parquet_sources_and_columns(folder, parquet_cache):
    columns = {
        "target": [png("red")],
        "source_target": [png("blue")],
        "source_target2": [png("lime")],
        "prompt": ["x"],
    }
    parquet_cache.Dataset.from_dict(columns).to_parquet(folder / "edit.parquet")
    records = manifest.load_manifest(folder, image_column="target", text_column="prompt")
    (record,) = manifest.check_records(records, folder, progress=False)
    assert len(record.source_file_path) == 2
    assert manifest.load_image(record, folder, 0).getpixel((0, 0)) == (0, 0, 255)
    assert manifest.load_image(record, folder, 1).getpixel((0, 0)) == (0, 255, 0)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_webdataset(folder):
    contents = [(folder / row["file_path"]).read_bytes() for row in ROWS]
    second = {"001.png": contents[1], "001.json": b'{"text": "picture 1", "score": 3}', "001.source.png": png("lime")}
    write_tar(folder / "a-0.tar", {"000.png": contents[0], "000.txt": b"picture 0", **second})
    write_tar(folder / "a-1.tar", {"x/002.png": contents[2], "x/002.txt": b"picture 2\n"})
    records = expect_three(folder)
    assert [record.file_path for record in records] == ["a-0.tar::000", "a-0.tar::001", "a-1.tar::x/002"]
    assert records[1].extra == {"score": 3}
    assert manifest.load_image(records[1], folder, 0).getpixel((0, 0)) == (0, 255, 0)
    expect_three(folder, "a-*.tar")
    write_tar(
        folder / "bad.tar", {"000.txt": b"no image", "001.png": contents[0], "001.json": b"{", "002.png": contents[0]}
    )
    reasons = [record.problem for record in manifest.load_manifest(folder, "bad.tar")]
    assert "no image" in reasons[0] and "not valid JSON" in reasons[1] and "text is None" in reasons[2]


def test_manifest_errors(folder):
    with pytest.raises(ValueError, match="no manifest"):
        manifest.load_manifest(folder)
    with pytest.raises(ValueError, match="is no folder"):
        manifest.load_manifest(folder / "nowhere")
    for content, message in (("[]", "zero rows"), ("{}", "expected a list"), ("[", "cannot read the manifest")):
        (folder / "train.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            manifest.load_manifest(folder)
    (folder / "list.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"expected a \.json"):
        manifest.load_manifest(folder, "list.csv")


# ---- bad rows


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


NOISE = np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8)


def bad_rows(folder: Path) -> list[tuple[object, str]]:
    """(row, words of the reason) of every kind of bad row, with the files that they name."""
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, "JPEG")
    files = {
        "cut.jpg": half(buffer.getvalue()),
        "cut.png": half((folder / "train/0.png").read_bytes()),
        "cut.webp": half(png(kind="WEBP")),
        "head.png": png()[:20],
        "empty.png": b"",
        "page.png": b"<html>404</html>",
        "bomb.png": png(size=(3000, 1000)),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    outside = folder.parent / f"{folder.name}-outside.png"
    outside.write_bytes(png())
    (folder / "link.png").symlink_to(outside)
    good = {"file_path": "train/0.png", "text": "x"}
    return [
        ({"file_path": "train/9.png", "text": "x"}, "missing"),
        ({"file_path": "train", "text": "x"}, "directory"),
        ({"file_path": "cut.jpg", "text": "x"}, "truncated"),
        ({"file_path": "cut.png", "text": "x"}, "truncated"),
        ({"file_path": "cut.webp", "text": "x"}, "truncated"),
        ({"file_path": "head.png", "text": "x"}, "truncated"),
        ({"file_path": "empty.png", "text": "x"}, "truncated: only 0 bytes"),
        ({"file_path": "page.png", "text": "x"}, "not an image"),
        ({"file_path": "bomb.png", "text": "x"}, "a decompression bomb: 3000 x 1000"),
        ({"file_path": f"../{outside.name}", "text": "x"}, "outside train_data_dir"),
        ({"file_path": str(outside), "text": "x"}, "outside train_data_dir"),
        ({"file_path": "link.png", "text": "x"}, "outside train_data_dir"),
        (good | {"text": " \n"}, "empty caption"),
        (good | {"text": 7}, "text is 7, expected a caption"),
        (good | {"type": "video"}, "type is 'video'"),
        ({"file_path": "train/0.png"}, "text is None"),
        ({"text": "x"}, "file_path is None"),
        (good | {"source_file_path": ["train/1.png", "train/9.png"]}, "source 1 (train/9.png): missing"),
        (good | {"source_file_path": "page.png"}, "source 0 (page.png): not an image"),
        (good | {"source_file_path": [1]}, "expected paths"),
        (["x"], "got a list, expected an object"),
        ('"x"', "got a str, expected an object"),
        ("{broken", "not valid JSON"),
    ]


def test_bad_rows(folder, capsys):
    bad = bad_rows(folder)
    write_lines(folder / "train.jsonl", [ROWS[0], *(row for row, _ in bad), ROWS[1]])
    records = manifest.load_manifest(folder)
    with pytest.raises(ValueError, match=f"{len(bad)} of {len(bad) + 2} rows are bad.*--on_bad_rows skip") as error:
        manifest.check_records(records, folder, progress=False, max_pixels=2_000_000)
    lines = str(error.value).splitlines()
    assert len(lines) == 21  # the sentence and the first 20
    assert lines[1] == "  train.jsonl line 2: train/9.png: missing"
    good = manifest.check_records(records, folder, "skip", folder / "out", progress=False, max_pixels=2_000_000)
    assert [record.file_path for record in good] == ["train/0.png", "train/1.png"]
    assert f"{len(bad)} of {len(bad) + 2} rows are bad" in capsys.readouterr().out
    written = [json.loads(line) for line in (folder / "out/bad_rows.jsonl").read_text().splitlines()]
    assert [row["row"] for row in written] == [*range(2, len(bad) + 2)]
    for row, (_, reason) in zip(written, bad, strict=True):
        assert reason in row["reason"], row
    with pytest.raises(ValueError, match="none is left"):
        manifest.check_records([record for record in records if record.row == 2], folder, "skip", progress=False)


def test_pillows_own_bomb_limit(folder, monkeypatch):
    (folder / "bomb.png").write_bytes(png(size=(1000, 1000)))
    write_lines(folder / "train.jsonl", [{"file_path": "bomb.png", "text": "x"}])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400_000)
    with pytest.raises(ValueError, match="decompression bomb"):
        manifest.check_records(manifest.load_manifest(folder), folder, progress=False)


def test_a_good_row_may_use_dots_and_inner_links(folder):
    (folder / "train/link.png").symlink_to(folder / "train/0.png")
    rows = [{"file_path": path, "text": "x"} for path in ("train/../train/0.png", "train/link.png")]
    (folder / "train.json").write_text(json.dumps(rows))
    assert len(manifest.check_records(manifest.load_manifest(folder), folder, progress=False)) == 2


def test_known_good_is_not_decoded_again(folder, monkeypatch):
    (folder / "train.json").write_text(json.dumps(ROWS))
    records = expect_three(folder)
    monkeypatch.setattr(images, "decode_image", lambda *_: pytest.fail("decoded"))
    again = manifest.check_records(
        manifest.load_manifest(folder), folder, known_good={r.digest for r in records}, progress=False
    )
    assert again == records


# ---- images


def decode(content: bytes, **options) -> np.ndarray:
    image = images.decode_image(content, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(kind, orientation):
    upright = Image.new("RGB", (64, 32), "white")
    upright.paste("red", (0, 0, 32, 16))  # red at the top left
    stored_by = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # 6 is stored turned to the left
    stored = upright if stored_by is None else upright.transpose(Image.Transpose(stored_by))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, kind, exif=exif, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
    pixels = decode(buffer.getvalue()).astype(int)
    assert pixels.shape == (32, 64, 3)
    assert abs(pixels - np.asarray(upright).astype(int)).max() < (1 if kind in ("PNG", "TIFF") else 90)
    assert abs(pixels[4, 4] - (255, 0, 0)).max() < 9 and pixels[-4, -4].min() > 246 and pixels[-4, 4].min() > 246
    for decoded in (True, False):  # the size from the header alone is the size of the decoded image
        assert images.check_image(buffer.getvalue(), decoded, 10**6) == (64, 32)


def test_transparency_goes_over_white():
    assert decode(png((255, 0, 0, 0), mode="RGBA"))[0, 0].tolist() == [255, 255, 255]
    assert decode(png((255, 0, 0, 255), mode="RGBA"))[0, 0].tolist() == [255, 0, 0]
    assert abs(decode(png((0, 0, 0, 128), mode="RGBA"))[0, 0].astype(int) - 127).max() <= 1
    assert decode(png((0, 0), mode="LA"))[0, 0].tolist() == [255, 255, 255]
    assert decode(png((255, 0, 0), transparency=(255, 0, 0)))[0, 0].tolist() == [255, 255, 255]
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 255, 9, 9, 9])
    palette.putpixel((1, 1), 1)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=1)
    pixels = decode(buffer.getvalue())
    assert pixels[0, 0].tolist() == [0, 0, 255] and pixels[1, 1].tolist() == [255, 255, 255]


def test_other_modes():
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 0 to 65535
    for mode in ("I;16", "I"):
        buffer = io.BytesIO()
        Image.fromarray(ramp if mode == "I;16" else ramp.astype(np.int32)).save(
            buffer, "PNG" if mode == "I;16" else "TIFF"
        )
        assert Image.open(buffer).mode == mode
        assert decode(buffer.getvalue())[..., 1].ravel().tolist() == list(range(256))
    cmyk = decode(png((0, 255, 255, 0), mode="CMYK", kind="JPEG"))[5, 5].astype(int)
    assert abs(cmyk - (255, 0, 0)).max() < 10
    assert decode(png(77, mode="L"))[0, 0].tolist() == [77, 77, 77]
    assert decode(png(1, mode="1"))[0, 0].tolist() == [255, 255, 255]
    with pytest.raises(ValueError, match="32-bit float"):
        decode(png(0.5, mode="F", kind="TIFF"))


def test_resize_and_crop_order_of_sides():
    image = Image.new("RGB", (100, 60), "white")
    image.paste("red", (0, 0, 20, 60))
    image.paste("blue", (80, 0, 100, 60))
    result = images.resize_and_crop(image, (32, 64))  # (width, height): both coloured ends are cut off
    assert result.size == (32, 64) and np.asarray(result).min() > 250
    tensor = images.image_to_tensor(images.resize_and_crop(image, (96, 32)))
    assert tensor.shape == (3, 32, 96) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor[:, 16, 2].tolist() == pytest.approx([1, -1, -1], abs=0.02)
    assert tensor[:, 16, -2].tolist() == pytest.approx([-1, -1, 1], abs=0.02)
    assert images.image_to_tensor(Image.new("RGB", (1, 1), (0, 255, 51))).flatten().tolist() == pytest.approx(
        [-1, 1, -0.6]
    )
    for size in ((997, 31), (31, 997), (1, 1), (333, 333)):  # no rounding outside the picture
        for target in ((64, 64), (96, 32), (32, 1024)):
            assert images.resize_and_crop(Image.new("RGB", size), target).size == target
    assert images.cover_box((100, 60), (32, 64)) == (35, 0, 65, 60)


def test_resizing_is_antialiased_and_draft_changes_little():
    y, x = np.mgrid[0:2048, 0:2048]
    smooth = np.stack([127 + 120 * np.sin(x / 97), 127 + 120 * np.cos(y / 61), (x + y) / 16], -1).astype(np.uint8)
    checks = np.where((x + y) % 2, 255, 0).astype(np.uint8)[..., None].repeat(3, -1)
    assert abs(np.asarray(images.resize_and_crop(Image.fromarray(checks), (128, 128))).astype(int) - 127).max() < 9
    buffer = io.BytesIO()
    Image.fromarray(smooth).save(buffer, "JPEG", quality=95)
    full, fast = (images.decode_image(buffer.getvalue(), at_least=size) for size in (None, (256, 256)))
    assert full.size == (2048, 2048) and fast.size == (512, 512)
    a, b = (np.asarray(images.resize_and_crop(image, (256, 256))).astype(int) for image in (full, fast))
    assert abs(a - b).max() <= 4


# ---- buckets


@pytest.mark.parametrize("resolution", [32, 64, 96, 256, 512, 768, 1024, 1328])
def test_buckets(resolution):
    if resolution % 32:
        with pytest.raises(
            ValueError, match=f"resolution is {resolution}; expected a multiple of 32, for example 1344"
        ):
            data.make_buckets(resolution)
        return
    buckets = data.make_buckets(resolution)
    assert (resolution, resolution) in buckets
    assert {(height, width) for width, height in buckets} == set(buckets)
    for width, height in buckets:
        assert width % 32 == height % 32 == 0 and 0.5 <= width / height <= 2
        assert 0.8 <= width * height / resolution**2 <= 1.25
    assert len(buckets) == len(set(buckets)) and (resolution < 256 or len(buckets) > 6)


def test_nearest_bucket():
    buckets = data.make_buckets(1024)
    assert data.nearest_bucket(640, 640, buckets) == (1024, 1024)
    width, height = data.nearest_bucket(1920, 1080, buckets)
    assert width > height and abs(width / height - 16 / 9) < 0.06
    assert data.nearest_bucket(1080, 1920, buckets) == (height, width)
    assert data.nearest_bucket(9000, 100, buckets)[0] == max(width for width, _ in buckets)


def test_data_digest():
    records = [Record(number, f"{number}.png", "x", digest=f"d{number}") for number in range(3)]
    digest = data.data_digest(records, [0, 1, 0])
    moved = [Record(9, "moved.png", "new caption", digest=record.digest) for record in records]
    assert digest == data.data_digest(moved, [0, 1, 0])
    others = [
        data.data_digest(records, [0, 1, 1]),
        data.data_digest(records[::-1], [0, 1, 0]),
        data.data_digest(records[:2], [0, 1]),
        data.data_digest([*records[:2], Record(2, "2.png", "x", digest="other")], [0, 1, 0]),
        data.data_digest(records, [(64, 32), (32, 64), (64, 32)]),
    ]
    assert len({digest, *others}) == 6
    assert digest == "927aea82def0182cf1700d8aae09eb7e"  # checkpoints keep it
    with pytest.raises(ValueError, match="zip"):
        data.data_digest(records, [0, 1])


# ---- the order of samples

BUCKET_IDS = [0] * 11 + [1] * 6 + [2] * 2  # sizes that no group size divides


def take(n, **kwargs):
    defaults = {"train_batch_size": 1, "gradient_accumulation_steps": 1, "rank": 0, "world_size": 1, "seed": 3}
    sampler = data.MicroBatchSampler(BUCKET_IDS, **(defaults | kwargs))
    return list(islice(sampler, n * sampler.accumulation))


def sample_groups(*arguments):
    """step_groups without the epochs."""
    return ([sample for sample, _ in group] for group in data.step_groups(*arguments))


def steps_of_all_ranks(n, world_size, batch, accumulation, **kwargs):
    """[{position: index} of each step], put together from all ranks; checks what every rank gets."""
    steps: dict[int, dict[int, int]] = {}
    options = {
        "world_size": world_size,
        "train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
    } | kwargs
    for rank in range(world_size):
        for micro in take(n, rank=rank, **options):
            assert len(micro) == batch and len({place.step for place in micro}) == 1
            for index, step, position, group, _ in micro:
                assert group[position] == index and len(group) == world_size * batch * accumulation
                assert position not in steps.setdefault(step, {}), "two ranks share a sample"
                steps[step][position] = index
    for group in steps.values():
        assert sorted(group) == list(range(world_size * batch * accumulation))  # the union of the ranks is the group
        assert len({BUCKET_IDS[index] for index in group.values()}) == 1  # one bucket for all ranks and micro-batches
    return [dict(sorted(group.items())) for group in steps.values()]


def test_ranks_split_one_group():
    whole = steps_of_all_ranks(20, 1, 4, 1)
    groups = islice(sample_groups(BUCKET_IDS, 3, [(4, None)]), 20)
    assert [list(group.values()) for group in whole] == list(groups)
    for world_size, batch, accumulation in ((2, 2, 1), (4, 1, 1), (1, 1, 4), (2, 1, 2), (1, 2, 2)):
        assert steps_of_all_ranks(20, world_size, batch, accumulation) == whole
    assert steps_of_all_ranks(20, 1, 4, 1, seed=4) != whole


def test_a_place_knows_its_epoch():
    """Every sample is dealt for epochs 0, 1, 2, ... in order, whatever batches and leftovers it waited in."""
    segments = [[6, 7, 3], [4, 5, 2]]
    shapes = [index % 2 for index in range(len(BUCKET_IDS))]
    epochs = defaultdict(list)
    for n in range(len(segments)):
        for group in data.step_groups(BUCKET_IDS, 3, segments[: n + 1], shapes):
            for sample, epoch in group:
                epochs[sample].append(epoch)
    sampler = data.MicroBatchSampler(BUCKET_IDS, 2, 1, 0, 1, 3, segments, 12, shapes)
    for place in chain(*islice(sampler, 400)):
        epochs[place.sample].append(place.epoch)
    assert len(epochs) == len(BUCKET_IDS) and max(map(len, epochs.values())) > 3
    assert all(found == list(range(len(found))) for found in epochs.values())


def consumed(segments, n_last, group_size):
    """All samples of the finished segments and of n_last more steps, as one list."""
    finished = [sample_groups(BUCKET_IDS, 3, segments[: number + 1]) for number in range(len(segments))]
    last = islice(sample_groups(BUCKET_IDS, 3, [*segments, (group_size, None)]), n_last)
    return [index for groups in (*finished, last) for group in groups for index in group]


def test_resume_at_any_step_is_the_straight_run():
    straight = take(30, train_batch_size=2, gradient_accumulation_steps=2)
    for done in range(30):
        segments = data.advance_segments([], 4, done)
        rest = take(30 - done, train_batch_size=2, gradient_accumulation_steps=2, segments=segments, start_step=done)
        assert rest == straight[done * 2 :]
    twice = data.advance_segments(data.advance_segments([], 4, 7), 4, 5)
    assert twice == [[4, 12]] and json.loads(json.dumps(twice)) == twice
    with pytest.raises(ValueError, match="covers 12 steps, expected 13"):
        take(1, train_batch_size=4, segments=twice, start_step=13)


@pytest.mark.parametrize("sizes", [(4, 2, 8), (8, 2), (2, 6, 3), (5, 5)])
def test_resume_on_another_number_of_processes(sizes):
    """No sample of three epochs is lost or doubled: what has left and what is still pending is the stream."""
    for first in range(0, 9):
        segments: list[list[int]] = []
        for size in sizes[:-1]:
            segments = data.advance_segments(segments, size, first)
        seen = consumed(segments, 40, sizes[-1])
        epochs = -(-len(seen) // len(BUCKET_IDS)) + 1
        for index in range(len(BUCKET_IDS)):
            assert seen.count(index) <= epochs
        stream = [index for index, _ in islice(data._stream(len(BUCKET_IDS), 3), (epochs + 3) * len(BUCKET_IDS))]
        for bucket in set(
            BUCKET_IDS
        ):  # each bucket's samples leave in the order of the stream, none skipped or repeated
            mine = [index for index in seen if BUCKET_IDS[index] == bucket]
            assert mine == [index for index in stream if BUCKET_IDS[index] == bucket][: len(mine)]
        steps = steps_of_all_ranks(5, sizes[-1], 1, 1, segments=segments, start_step=sum(n for _, n in segments))
        continued = islice(sample_groups(BUCKET_IDS, 3, [*segments, (sizes[-1], None)]), 5)
        assert [list(step.values()) for step in steps] == list(continued)


def test_every_sample_is_seen_equally_often():
    seen = consumed([], 190, 4)  # 760 samples are 40 epochs
    counts = [seen.count(index) for index in range(len(BUCKET_IDS))]
    assert min(counts) >= 38 and max(counts) <= 41


def test_stream_is_a_function_of_seed_and_epoch():
    """The numbers are fixed: a new NumPy must not change the order of a run that is resumed."""
    assert [index for index, _ in islice(data._stream(6, 0), 12)] == [3, 5, 4, 0, 2, 1, 0, 5, 1, 3, 2, 4]
    with pytest.raises(ValueError, match="zero samples"):
        next(data.step_groups([], 0, [(1, None)]))


class Squares(torch.utils.data.Dataset):
    def __getitem__(self, item):
        return item.sample**2, item.step, item.position, os.getpid()


SHAPE_IDS = [i % 5 for i in range(len(BUCKET_IDS))]  # most rarer than a step


@pytest.mark.parametrize(("world_size", "batch", "accumulation"), [(1, 2, 4), (2, 2, 2), (1, 3, 1), (2, 1, 4)])
def test_a_micro_batch_has_one_shape(world_size, batch, accumulation):
    """Catches micro-batches of mixed shapes, and steps that wait until a rare shape fills them with itself."""
    steps = steps_of_all_ranks(400, world_size, batch, accumulation, shape_ids=SHAPE_IDS)
    size = world_size * batch * accumulation
    seen = Counter()
    for group in steps:
        order = [group[position] for position in range(size)]
        for start in range(0, size, batch):
            assert len({SHAPE_IDS[index] for index in order[start : start + batch]}) == 1
        seen.update(order)
    assert set(seen) == set(range(len(BUCKET_IDS))) and max(seen.values()) - min(seen.values()) <= size
    if accumulation > 1:
        assert sum(len({SHAPE_IDS[index] for index in group.values()}) > 1 for group in steps) > 200


def test_shapes_and_resume():
    """Catches a resumed run that loses or repeats samples that waited for others of their shape."""
    options = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "shape_ids": SHAPE_IDS}
    straight = take(30, **options)
    sampler = data.MicroBatchSampler(BUCKET_IDS, 2, 2, 0, 1, seed=3, shape_ids=SHAPE_IDS)
    segments = sampler.segments_at(11)
    assert segments == [[4, 11, 2]]
    assert take(19, segments=segments, start_step=11, **options) == straight[22:]
    other = {**options, "train_batch_size": 1}  # another batch size: every sample still comes once an epoch
    more = take(200, segments=segments, start_step=11, **other)
    seen = Counter(place.sample for batch in [*straight[:22], *more] for place in batch)
    assert set(seen) == set(range(len(BUCKET_IDS))) and max(seen.values()) - min(seen.values()) <= 4


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(workers):
    before = torch.get_rng_state()
    sampler = data.MicroBatchSampler(BUCKET_IDS, 2, 2, 1, 2, seed=3)
    loader = data.make_loader(Squares(), sampler, list, workers, seed=0)
    batches = list(islice(loader, 12))
    assert torch.equal(before, torch.get_rng_state())  # the global generator is untouched
    expected = islice(sampler, 12)
    assert [[sample[:3] for sample in batch] for batch in batches] == [
        [(place.sample**2, place.step, place.position) for place in batch] for batch in expected
    ]
    pids = {sample[3] for batch in batches for sample in batch}
    assert len(pids) == max(workers, 1) and (os.getpid() in pids) == (workers == 0)
    for pid in pids if workers else ():  # Ctrl-C and a scheduler's first SIGTERM are left to the trainer
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    more = [sample[3] for batch in islice(loader, 20) for sample in batch]
    assert set(more) == pids


CRASH = """
import sys
sys.path.insert(0, {root!r})
from common import data

class Samples:
    def __getitem__(self, item):
        return 1 // ({where!r} == "main" or item[1] < 2)

batches = data.make_loader(Samples(), data.MicroBatchSampler([0] * 9, 2, 1, 0, 1, seed=0), list, 2, seed=0)
for _ in range(4):
    next(batches)
raise ZeroDivisionError("in the main process")
"""


@pytest.mark.parametrize("where", ["main", "worker"])
def test_a_crash_ends_the_workers(where):
    script = CRASH.format(root=str(ROOT), where=where)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1 and "ZeroDivisionError" in result.stderr


class Pictures(torch.utils.data.Dataset):
    def __init__(self, records, folder, cache):
        self.records, self.folder, self.cache = records, folder, cache

    def __getitem__(self, item):
        record = self.records[item[0]]
        return manifest.load_image(record, self.folder).getpixel((0, 0)), self.cache[self.cache.key(record)]["latents"]


def test_workers_read_parquet_tar_and_cache(folder, parquet_cache):
    parquet_cache.Dataset.from_dict({"image": [png("red")], "text": ["p"]}).to_parquet(folder / "p.parquet")
    write_tar(folder / "t.tar", {"0.png": png("blue"), "0.txt": b"t"})
    records = manifest.load_manifest(folder, "p.parquet") + manifest.load_manifest(folder, "t.tar")
    records = manifest.check_records(records, folder, progress=False)
    cache = EmbeddingCache(folder / "cache", {})
    for number, record in enumerate(records):
        cache.add(cache.key(record), {"latents": torch.full((2,), float(number))})
    cache.flush()
    sampler = data.MicroBatchSampler([0, 0], 2, 1, 0, 1, seed=0)
    loader = data.make_loader(Pictures(records, folder, cache), sampler, sorted, 2, seed=0)
    for batch in islice(loader, 4):
        assert [pixel for pixel, _ in batch] == [(0, 0, 255), (255, 0, 0)]
        assert [latents.tolist() for _, latents in batch] == [[1, 1], [0, 0]]


# ---- the embedding cache

RECORD = Record(0, "a.png", "a cat", digest="d1", width=64, height=64)
FINGERPRINT = {"model": "m", "resolution": 64, "template": "<{}>"}


def filled(folder, fingerprint=FINGERPRINT, record=RECORD, bucket=(64, 64)):
    cache = EmbeddingCache(folder, fingerprint)
    cache.add(cache.key(record, bucket), {"latents": torch.arange(6.0).reshape(2, 3), "length": torch.tensor(5)})
    cache.flush()
    return cache


def test_cache_hit(tmp_path, capsys):
    filled(tmp_path)
    cache = EmbeddingCache(tmp_path, dict(reversed(FINGERPRINT.items())))
    key = cache.key(RECORD, (64, 64))
    assert key in cache and cache.missing([key, key]) == [] and len(cache) == 1
    entry = cache[key]
    assert entry["latents"].tolist() == [[0, 1, 2], [3, 4, 5]] and entry["length"].item() == 5
    assert cache.known_good() == {"d1"}
    assert "1 entries reused, 0 to encode" in capsys.readouterr().out
    assert json.loads((tmp_path / "fingerprint.json").read_text()) == FINGERPRINT


@pytest.mark.parametrize(
    "change", ["caption", "digest", "bucket", "model", "resolution", "template", "more", "as text"]
)
def test_cache_miss(tmp_path, capsys, change):
    filled(tmp_path)
    capsys.readouterr()
    other = {"caption": {"text": "a dog"}, "digest": {"digest": "d2"}}.get(change, {})
    record = Record(**{**vars(RECORD), **other})
    fingerprint = FINGERPRINT | ({change: "other"} if change in FINGERPRINT else {})
    cache = EmbeddingCache(tmp_path, fingerprint)
    row = record.text if change == "as text" else record
    key = cache.key(row, (96, 32) if change == "bucket" else (64, 64), **({"flip": 1} if change == "more" else {}))
    assert cache.missing([key, key]) == [key] and key not in cache
    with pytest.raises(KeyError):
        cache[key]
    out = capsys.readouterr().out
    assert "0 entries reused, 1 to encode" in out and "does not use 1 entries" in out and f"rm -r {tmp_path}" in out
    assert (f"{change} was {FINGERPRINT.get(change)!r}, is 'other'" in out) == (change in FINGERPRINT)
    assert ("/shard-" in out) == (change in FINGERPRINT)  # shards of other settings can be deleted alone


def test_changed_image_bytes_change_the_key(folder):
    (folder / "train.json").write_text(json.dumps([ROWS[0] | {"source_file_path": ["train/1.png"]}]))
    cache, keys = EmbeddingCache(folder / "cache", FINGERPRINT), []
    for path, colour in ((None, ""), ("train/0.png", "lime"), ("train/1.png", "black"), (None, "")):
        if path:
            (folder / path).write_bytes(png(colour))
        (record,) = manifest.check_records(manifest.load_manifest(folder), folder, progress=False)
        keys.append(cache.key(record, (64, 64)))
    assert len(set(keys)) == 3 and keys[2] == keys[3]


def test_texts_alone(tmp_path):
    cache = EmbeddingCache(tmp_path, FINGERPRINT)
    for text in ("", "a validation prompt"):
        cache.add(cache.key(text), {"prompt_embeds": torch.full((len(text), 4), 1.5, dtype=torch.bfloat16)})
    assert cache[cache.key("")]["prompt_embeds"].shape == (0, 4)  # before the flush
    cache.flush()
    again = EmbeddingCache(tmp_path, FINGERPRINT)
    assert again[again.key("")]["prompt_embeds"].shape == (0, 4)
    assert again[again.key("a validation prompt")]["prompt_embeds"].dtype == torch.bfloat16
    assert again.known_good() == set()


def test_ranks_write_their_own_shards(tmp_path, capsys):
    records = [Record(i, f"{i}.png", "x", digest=f"d{i}") for i in range(10)]
    caches = [EmbeddingCache(tmp_path, FINGERPRINT, rank=rank, shard_entries=2) for rank in range(2)]
    for rank, cache in enumerate(caches):
        keys = [cache.key(record) for record in records]
        for number in range(rank, 10, 2):
            cache.add(keys[number], {"x": torch.tensor(number)})
        cache.flush()
    caches[0].reload()
    assert [caches[0][key]["x"].item() for key in keys] == list(range(10)) and len(caches[0].known_good()) == 10
    assert len(list(tmp_path.glob("shard-*"))) == 6
    caches[1].missing(keys)
    assert capsys.readouterr().out == ""  # rank 1 is silent


KILLED = """
import os, sys, torch
sys.path.insert(0, {root!r})
from common.cache import EmbeddingCache
cache = EmbeddingCache({folder!r}, {{}}, shard_entries=2)
replace = os.replace
for number in range(6):
    if number == 3:
        os.replace = lambda *_: os.kill(os.getpid(), 9)  # the shard is written, but does not have its name yet
    cache.add(cache.key(str(number)), {{"x": torch.tensor(number)}})
"""


def test_a_kill_loses_one_shard_at_most(tmp_path, capsys):
    script = KILLED.format(root=str(ROOT), folder=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    cache = EmbeddingCache(tmp_path, {})
    keys = [cache.key(str(number)) for number in range(6)]
    assert cache.missing(keys) == keys[2:] and cache[keys[1]]["x"].item() == 1
    out = capsys.readouterr().out
    assert "2 entries reused, 4 to encode" in out and "1 half-written files" in out and "*.tmp" in out


@pytest.mark.parametrize("length", [0, 5, 60, -3])
def test_a_damaged_shard_is_encoded_again(tmp_path, capsys, length):
    filled(tmp_path)
    (shard,) = tmp_path.glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:length])
    cache = EmbeddingCache(tmp_path, FINGERPRINT)
    assert len(cache.missing([cache.key(RECORD, (64, 64))])) == 1
    assert "cannot be read" in capsys.readouterr().out

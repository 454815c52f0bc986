"""Rows, sources, sizes, frames of videos, and settings: from the manifest to what the encoders and the transformer are
given."""

import itertools
import json
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLProcessor

from common import rules
from common.data.cache import EmbeddingCache
from common.data.loader import collate
from common.data.manifest import DataSet, Record
from common.data.order import MicroBatchSampler
from common.start.config import parse_recipe

RED, BLUE = (220, 30, 30), (30, 30, 220)
GREYS = [20, 60, 100, 140, 180, 220]  # of the frames of a drawn video


def halves(size: tuple[int, int]) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image


def plain(size: tuple[int, int] = (64, 64), colour: str = "green") -> Image.Image:
    return Image.new("RGB", size, colour)


def config_of(settings, folder: Path, rows: list[dict], **more: object):
    """Rows written as a manifest, and a Config that reads them."""
    (folder / "train.json").write_text(json.dumps(rows))
    values = dict(train_data_dir=folder, output_dir=folder / "out", num_validation_samples=0, seed=7)
    (folder / "out").mkdir(exist_ok=True)
    return settings(**{**values, "image_sample_size": 96, "mixed_precision": "no", **more})


def row(source: str | list[str], target: str = "target.png", **more: object) -> dict:
    return {"file_path": target, "source_file_path": source, "text": "make it blue", **more}


# ---- sources


@pytest.fixture(scope="module")
def encoders_of(settings, encoding, make_tiny, fine_folder, tmp_path_factory):
    """encoders_of(mode): the recipe's encoders, with what was given to the vision-language processor."""
    made = {}

    def make(mode: str) -> SimpleNamespace:
        cfg = settings(train_mode=mode, mixed_precision="no", image_sample_size=96)
        encoders = encoding.Encoders(cfg, fine_folder, torch.device("cpu"), torch.float32)
        make_tiny.convolve_single_frames(encoders.vae)
        return encoders

    return lambda mode: made[mode] if mode in made else made.setdefault(mode, make(mode))


@pytest.mark.parametrize(
    ("mode", "size", "grid", "vae_size"),
    [  # grid: rows and columns of 64-pixel patches; vae_size: (width, height)
        ("qwen_image_edit_plus", (640, 320), (4, 8), (1440, 736)),
        ("qwen_image_edit_plus", (320, 640), (8, 4), (736, 1440)),
        ("qwen_image_edit", (640, 320), (12, 22), (1440, 736)),
        ("qwen_image_edit", (320, 640), (22, 12), (736, 1440)),
    ],
)
def test_a_source_keeps_its_aspect(encoders_of, encoding, edits, monkeypatch, mode, size, grid, vae_size):
    """Catches a source squashed to a square or to another aspect, and width and height exchanged, on the way to the
    text encoder or to the VAE: 640 x 320 stays 2 : 1."""
    encoders, grids = encoders_of(mode), []
    process = Qwen2VLProcessor.__call__

    def spying(processor: Qwen2VLProcessor, *positional, **named):
        inputs = process(processor, *positional, **named)
        grids.append(inputs["image_grid_thw"].tolist())
        return inputs

    monkeypatch.setattr(Qwen2VLProcessor, "__call__", spying)
    instruction = encoding.Instruction("make it blue", [halves(size)])
    encoders.encode([instruction], {"sources": [instruction.sources]})
    assert grids == [[[1, *grid]]]

    record = Record(0, "", "", ("a.png",), source_sizes=(size,))
    assert edits.source_size(size) == vae_size
    monkeypatch.setattr(edits, "load_image", lambda record, folder, which: halves(size))
    pixels = encoders.pixels(edits.Picture(edits.source_size(size), record, 0, 0))
    width, height = vae_size
    assert pixels.shape == (3, height, width)
    red, _, blue = pixels
    assert (red[:, : width // 2 - 8] > 0).all() and (blue[:, : width // 2 - 8] < 0).all()
    assert (red[:, width // 2 + 8 :] < 0).all() and (blue[:, width // 2 + 8 :] > 0).all()


def test_latents_have_the_sources_axes(encoders_of):
    """Catches width and height exchanged in what is kept of a source: (channels, 1, height, width)."""
    pixels = torch.zeros(3, 736, 1440)
    (latents,) = encoders_of("qwen_image_edit_plus").latents(pixels[None], moments=False)["latents"]
    assert latents.shape == (16, 1, 736 // 16, 1440 // 16) and latents.dtype == torch.float32


def test_transparent_rotated_and_grey_sources(settings, edits, encoding, load_rows, encoders_of, tmp_path):
    """Catches transparency read as black, EXIF rotation that is not applied to the pixels or not to the size that they
    are encoded at, and a grey source that stops the run or becomes a colour."""
    clear = Image.new("RGBA", (96, 96), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    halves((160, 80)).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    Image.new("L", (120, 90), 200).save(tmp_path / "grey.png")
    plain().save(tmp_path / "target.png")
    cfg = config_of(settings, tmp_path, [row(["clear.png", "turned.jpg", "grey.png"])])
    rows, _ = load_rows(cfg)
    (record,) = rows.records
    assert record.source_sizes == ((96, 96), (80, 160), (120, 90))
    assert rows.source_shapes() == [((1024, 1024), (736, 1440), (1184, 896))]
    clear, turned, grey = (
        encoding.Encoders.pixels(
            SimpleNamespace(cfg=cfg, pipeline=encoders_of("qwen_image_edit_plus").pipeline),
            edits.Picture(size, record, which, 0),
        )
        for which, size in enumerate(rows.source_shapes()[0])
    )
    assert clear.shape == (3, 1024, 1024) and (clear == 1).all(), "transparency lies over white"
    assert turned.shape == (3, 1440, 736)
    assert (turned[0, :700] > turned[2, :700]).all() and (turned[0, 740:] < turned[2, 740:]).all(), "red is on top"
    assert grey.shape == (3, 896, 1184) and (grey == 200 / 127.5 - 1).all()
    shown = edits.shown_row(record, cfg.data.train_data_dir)
    assert [image.mode for image in shown.sources] == ["RGB"] * 3 and shown.sources[1].size == (80, 160)


def test_a_micro_batch_has_sources_of_one_size(edits):
    """Catches micro-batches that cannot be stacked, or that have one set of positions for unequal sources."""
    kinds = [((640, 320),), ((320, 160),), ((320, 640),), ((640, 320), (96, 96))] * 8  # the first two are one size
    records = [Record(n, "", "", source_sizes=sizes) for n, sizes in enumerate(kinds)]
    rows = edits.Rows(records, [(96, 96)] * 32, [1] * 32, 32)
    shape_ids = rows.source_shapes()
    assert shape_ids[0] == shape_ids[1] == ((1440, 736),) and shape_ids[2] == ((736, 1440),)
    sampler = MicroBatchSampler(rows.buckets, 2, 4, 0, 1, seed=0, shape_ids=shape_ids)
    seen = [{shape_ids[place.sample] for place in micro_batch} for micro_batch in itertools.islice(sampler, 60)]
    assert all(len(each) == 1 for each in seen) and len(set.union(*seen)) == 3
    assert any(len(set.union(*seen[start : start + 4])) > 1 for start in range(0, 60, 4)), "a step may have several"


# ---- rows


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of files that rows name."""
    (tmp_path / "before").mkdir()
    for name in ("target.png", "a.png", "b.png", "before/a.png"):
        plain().save(tmp_path / name)
    plain((170, 10)).save(tmp_path / "long.png")
    plain((160, 10)).save(tmp_path / "almost.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    return tmp_path


@pytest.mark.parametrize(
    ("bad", "mode", "reason"),
    [
        (
            row(["a.png", "b.png"]),
            "qwen_image_edit",
            "2 sources, and qwen_image_edit takes one; use --train_mode",
        ),
        (row([]), "qwen_image_edit_plus", "no source_file_path; expected the picture, or pictures, before the edit"),
        (row([]), "qwen_image_edit", "no source_file_path"),
        (row(["target.png"]), "qwen_image_edit_plus", "source_file_path names the target itself"),
        (row(["a.png", "./target.png"]), "qwen_image_edit_plus", "source_file_path names the target itself"),
        (row("before/../target.png"), "qwen_image_edit", "source_file_path names the target itself"),
        (row(["a.png"], type="audio"), "qwen_image_edit_plus", "type is 'audio', expected image or video"),
        (row(["long.png"]), "qwen_image_edit_plus", "long.png.* is 170 x 10; expected an aspect of at most 16 : 1"),
        (row(["broken.png"]), "qwen_image_edit_plus", "broken.png.*truncated"),
        (row(["absent.png"]), "qwen_image_edit_plus", "absent.png"),
        (row(["a.png"], type="video"), "qwen_image_edit_plus", None),
        (row(["a.png", 3]), "qwen_image_edit_plus", "source_file_path is .* expected paths"),
    ],
)
def test_bad_rows_are_named(settings, load_rows, pictures, bad, mode, reason):
    """Catches a mistake in the data that is found hours later, or that is reported without its row."""
    rows = [row(["a.png"]), bad, row("before/a.png"), row(["almost.png"])]
    cfg = config_of(settings, pictures, rows, train_mode=mode)
    if reason is None:  # a still picture is a video of one frame
        assert load_rows(cfg)[0].frames == [1, 1, 1, 1]
        return
    with pytest.raises(ValueError, match=rf"(?s)1 of 4 rows are bad.*train\.json row 1: .*{reason}"):
        load_rows(cfg)
    good, _ = load_rows(config_of(settings, pictures, rows, train_mode=mode, on_bad_rows="skip"))
    assert [record.row for record in good.records] == [0, 2, 3]
    skipped = json.loads((pictures / "out/bad_rows.jsonl").read_text())
    assert skipped["row"] == 1 and re.search(reason, skipped["reason"])


def test_absolute_paths_need_no_folder(settings, load_rows, pictures):
    """Catches an empty train_data_dir, as published commands have it, that means the working directory or nothing."""
    rows = [row([str(pictures / "a.png")], str(pictures / "target.png"), width=64, height=64)] * 2
    meta = pictures / "train.json"
    cfg = config_of(settings, pictures, rows, train_data_dir="", train_data_meta=meta)
    loaded, _ = load_rows(cfg)
    assert [record.source_sizes for record in loaded.records] == [((64, 64),)] * 2


# ---- videos


def draw_video(path: Path, greys: list[int], size: tuple[int, int] = (96, 64)) -> None:
    """Frame i is grey value greys[i] all over."""
    av = pytest.importorskip("av")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(6), width=size[0], height=size[1], pix_fmt="yuv420p")
        stream.bit_rate = 4_000_000
        for grey in greys:
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), grey, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def brightness(image: Image.Image) -> float:
    return float(np.asarray(image, dtype=np.float64).mean())


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Two video rows of six frames (one with a longer second source) and one of pictures."""
    folder = tmp_path_factory.mktemp("videos")
    draw_video(folder / "after.mp4", GREYS)
    draw_video(folder / "before.mp4", GREYS, (64, 64))
    draw_video(folder / "longer.mp4", [*GREYS, 240, 250], (64, 64))
    plain().save(folder / "a.png")
    plain(colour="red").save(folder / "b.png")
    rows = [row(["before.mp4"], "after.mp4", type="video"), row(["a.png"], "b.png")]
    rows.append({**row(["before.mp4", "longer.mp4"], "after.mp4", type="video"), "text": "make it snow"})
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def rows_of_videos(settings, load_rows, videos):
    """rows_of_videos(): the settings that read them, and the rows."""

    def make(**more: object):
        cfg = config_of(settings, videos, json.loads((videos / "train.json").read_text()), **more)
        return cfg, load_rows(cfg)[0]

    return make


def test_frames_are_read_by_their_index(edits, rows_of_videos):
    """Catches a frame too early or too late."""
    cfg, rows = rows_of_videos()
    assert rows.frames == [6, 1, 6] and rows.records[0].source_sizes == ((64, 64),)
    assert (rows.records[0].width, rows.records[0].height) == (96, 64)
    for frame, grey in enumerate(GREYS):
        image = edits.load_picture(rows.records[0], cfg.data.train_data_dir, None, frame)
        assert image.mode == "RGB" and image.size == (96, 64) and brightness(image) == pytest.approx(grey, abs=6)
    with pytest.raises(IndexError, match="frame 6 of 6"):
        edits.load_picture(rows.records[0], cfg.data.train_data_dir, None, 6)


def test_target_and_sources_show_the_same_frame(encoding, rows_of_videos, tmp_path):
    """Catches a frame of its own for each file of a row, and cache entries of one frame used for another."""
    cfg, rows = rows_of_videos()
    cache = encoding.EmbeddingCache(tmp_path, {})
    sampler = MicroBatchSampler(rows.buckets, 1, 1, 0, 1, cfg.run.seed, shape_ids=rows.source_shapes())
    views = rows.views(cfg, sampler, max_train_steps=60)
    assert {view.frame for view in views if view.row == 0} == set(range(6)), "20 epochs show every frame"
    assert {view.frame for view in views if view.row == 1} == {0}
    wanted = encoding.what_to_encode(cfg, cache, [(rows, views)], [])
    for view in views:
        record, expected = rows.records[view.row], GREYS[view.frame]
        keys = [encoding.target_key(cache, record, view)]
        keys += [encoding.source_key(cache, record, view, which) for which in range(len(record.source_file_path))]
        pictures = [wanted[key] for key in keys]
        instruction = wanted[encoding.prompt_key(cache, record, view, empty=False)]
        assert instruction.text == record.text
        if record.type == "video":
            for picture in [*pictures, *instruction.sources]:
                assert brightness(picture.load(cfg.data.train_data_dir)) == pytest.approx(expected, abs=6)
    pictures = {key: each for key, each in wanted.items() if isinstance(each, encoding.Picture)}
    assert len(pictures) == len({picture.identity() + (key,) for key, picture in pictures.items()}) > 0


def test_frames_are_a_function_of_seed_and_epoch(rows_of_videos):
    """Catches frames that differ between runs, or that are the same in every epoch, for every row or seed."""
    cfg, rows = rows_of_videos()
    _, again = rows_of_videos()
    frames = [[rows.view(cfg, n, step=5, epoch=epoch).frame for epoch in range(40)] for n in (0, 2)]
    assert frames == [[again.view(cfg, n, step=9, epoch=epoch).frame for epoch in range(40)] for n in (0, 2)]
    assert set(frames[0]) == set(frames[1]) == set(range(6)) and frames[0] != frames[1]
    other, _ = rows_of_videos(seed=8)
    assert frames[0] != [rows.view(other, 0, step=5, epoch=epoch).frame for epoch in range(40)]


def test_bad_videos_are_named(settings, load_rows, videos, tmp_path):
    """Catches a broken or empty video that stops the run in the middle of encoding."""
    for name in ("after.mp4", "before.mp4"):
        (tmp_path / name).write_bytes((videos / name).read_bytes())
    (tmp_path / "broken.mp4").write_bytes((videos / "before.mp4").read_bytes()[:900])
    (tmp_path / "text.mp4").write_text("no video")
    good = row(["before.mp4"], "after.mp4", type="video")
    for name in ("broken.mp4", "text.mp4"):
        cfg = config_of(settings, tmp_path, [good, row([name], "after.mp4", type="video")])
        with pytest.raises(ValueError, match=rf"train\.json row 1: .*{name}.*no video that can be decoded"):
            load_rows(cfg)
    cfg = config_of(settings, tmp_path, [good, row(["before.mp4"], "after.mp4", type="image")])
    with pytest.raises(ValueError, match=r"train\.json row 1: .*after\.mp4.*not an image"):
        load_rows(cfg)


# ---- the published flags

PUBLISHED = """--pretrained_model_name_or_path=models/Qwen-Image-Edit --train_data_dir=datasets/internal_datasets/
--train_data_meta=datasets/internal_datasets/metadata.json --train_batch_size=1 --image_sample_size=1328
--gradient_accumulation_steps=1 --dataloader_num_workers=8 --num_train_epochs=100 --max_train_steps=500
--checkpointing_steps=50 --learning_rate=2e-05 --lr_scheduler=constant_with_warmup --lr_warmup_steps=100 --seed=42
--output_dir=output_dir_qwenimage_edit --gradient_checkpointing --mixed_precision=bf16 --adam_weight_decay=3e-2
--adam_epsilon=1e-10 --vae_mini_batch=1 --max_grad_norm=0.05 --enable_bucket --random_hw_adapt --uniform_sampling
--trainable_modules . --train_mode qwen_image_edit --resume_from_checkpoint=latest --use_8bit_adam --report_to wandb
--validation_steps=100 --validation_epochs=500 --validation_image_paths=asset/8.jpg --validation_prompts"""


def test_published_flags_are_taken_verbatim(train, settings):
    """Catches a flag of VideoX-Fun's commands that is refused, renamed, ignored or read in another type."""
    argv = [*PUBLISHED.split(), "1girl, black_hair, solo"]
    got = rules.flat(parse_recipe(train.Config, argv, train.from_videox_fun.SECOND_NAMES))
    expected = dict(
        pretrained_model_name_or_path="models/Qwen-Image-Edit", train_data_dir="datasets/internal_datasets/",
        train_data_meta="datasets/internal_datasets/metadata.json", train_batch_size=1, image_sample_size=1328,
        gradient_accumulation_steps=1, dataloader_num_workers=8, num_train_epochs=0, max_train_steps=500,
        checkpointing_steps=50, learning_rate=2e-5, lr_scheduler="constant_with_warmup", lr_warmup_steps=100, seed=42,
        output_dir="output_dir_qwenimage_edit", gradient_checkpointing=True, mixed_precision="bf16",
        adam_weight_decay=0.03, adam_epsilon=1e-10, encode_batch_size=1, max_grad_norm=0.05, enable_bucket=True,
        random_hw_adapt=True, uniform_sampling=True, trainable_modules=(".",), train_mode="qwen_image_edit",
        resume_from_checkpoint="latest", use_8bit_adam=True, optimizer="adamw_8bit", report_to="wandb",
        validation_steps=100, validation_epochs=500, validation_image_paths=("asset/8.jpg",),
        validation_prompts=("1girl, black_hair, solo",),
    )  # fmt: skip
    assert {name: got[name] for name in expected} == expected
    plain_config = rules.flat(settings())
    changed = {name for name in got if got[name] != plain_config[name]}
    assert changed <= expected.keys(), "a flag that sets something else too"
    epochs_alone = [word for word in PUBLISHED.split() if "max_train_steps" not in word]
    assert (
        parse_recipe(train.Config, [*epochs_alone, "1girl"], train.from_videox_fun.SECOND_NAMES).batch.num_train_epochs
        == 100
    )


def test_8bit_adam_is_one_optimizer(train, settings, monkeypatch):
    """Catches a flag that does nothing, and two settings of the optimizer of which one wins silently."""
    given = []
    monkeypatch.setattr(train.launch, "set_up", lambda cfg, *more: given.append(cfg.tuning.optimizer) or 1 / 0)
    for flags in ([], ["--use_8bit_adam"], ["--use_8bit_adam", "--optimizer", "adamw_8bit"]):
        with pytest.raises(ZeroDivisionError):
            train.main(["--train_data_dir", "/", *flags])
    assert given == ["adamw", "adamw_8bit", "adamw_8bit"]
    with pytest.raises(ValueError, match="use_8bit_adam means --optimizer adamw_8bit, got --optimizer adafactor too"):
        settings(use_8bit_adam=True, optimizer="adafactor")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (dict(image_sample_size=1000), "image_sample_size must be a positive multiple of 16.*got 1000; use 992"),
        (dict(random_hw_adapt=True, image_sample_size=496), "random_hw_adapt draws sizes from 512.*which is 496"),
        (dict(lora_rank=4, trainable_modules=("attn",)), "lora_rank 4 trains adapters alone, got trainable_modules"),
        (dict(encode_batch_size=-1), "encode_batch_size must be at least 0, got -1"),
        (dict(lora_rank=-1), "lora_rank must be at least 0, got -1"),
        (dict(validation_epochs=-1), "validation_epochs must be at least 0, got -1"),
        (dict(caption_dropout=1.5), "caption_dropout is a share between 0 and 1, got 1.5"),
        (dict(lora_rank=4, trainable_modules_low_learning_rate=("attn",)), "lora_rank 4 trains adapters alone.*attn"),
        (dict(lora_rank=4, lora_dropout=1), "lora_dropout is a share from 0 to under 1, got 1"),
        (dict(base_precision="nf4"), "base_precision nf4 is for a frozen base.*add --lora_rank 32"),
        (dict(target_name="to_q"), "target_name and lora_skip_name are for LoRA; add --lora_rank"),
        (dict(fix_sample_size=(512,)), "fix_sample_size is a height and a width from 16 to 8192, got .512,"),
        (dict(weighting_scheme="cosmap", timestep_sampling="mode"), "means --timestep_sampling uniform.*got mode"),
        (dict(max_train_samples=-1), "max_train_samples must be at least 0, got -1"),
    ],
)  # fmt: skip
def test_settings_that_contradict_are_refused(train, settings, values, sentence):
    """Catches a contradiction that one of two settings wins silently."""
    with pytest.raises(ValueError, match=sentence):
        settings(**values)
    with pytest.raises(ValueError, match="train_data_dir is not set"):
        parse_recipe(train.Config, [])


def test_half_precision_with_a_loss_scale_is_for_adapters(settings, capfd):
    """Catches fp16, which this model's activations overflow, that is taken."""
    with pytest.raises(SystemExit):
        settings(mixed_precision="fp16")
    said = capfd.readouterr().err
    assert "mixed_precision" in said and "fp16" in said and "bf16" in said


# ---- sizes of targets


@pytest.mark.parametrize(("side", "multiple"), [(640, 16), (1328, 16), (640, 128)])
def test_random_hw_adapt_draws_one_size_a_step(settings, edits, side, multiple):
    """Catches sizes under 512 or over image_sample_size, another one for each sample or process of a step, the same
    one for every step, and an aspect that is lost."""
    values = dict(image_sample_size=side, random_hw_adapt=True, seed=3)
    cfg = settings(**values)
    square, wide = (edits.target_size(cfg, size, multiple) for size in ((100, 100), (200, 100)))
    largest = side // multiple * multiple
    seen = set()
    for step in range(600):
        width, height = edits.size_at(cfg, square, step, multiple)
        assert width == height and 512 <= width <= side and width % multiple == 0
        assert (width, height) == edits.size_at(cfg, square, step, multiple)
        wide_width, wide_height = edits.size_at(cfg, wide, step, multiple)
        assert wide_width % multiple == wide_height % multiple == 0
        if multiple < 128:
            assert wide_width / wide_height == pytest.approx(2, rel=0.1)
            assert (wide_width * wide_height) ** 0.5 == pytest.approx(width, rel=0.06), "the same area"
        seen.add(width)
    assert min(seen) == 512 and max(seen) == largest and len(seen) == (largest - 512) // multiple + 1
    other = settings(**{**values, "seed": 4})
    assert len(seen) == 1 or any(
        edits.size_at(cfg, square, step, multiple) != edits.size_at(other, square, step, multiple)
        for step in range(50)
    )
    still = settings(**{**values, "random_hw_adapt": False})
    assert {edits.size_at(still, wide, step, multiple) for step in range(9)} == {wide}


def test_random_hw_adapt_is_encoded_beforehand(settings, edits):
    """Catches a size that a later step needs and that was not encoded."""
    cfg = settings(image_sample_size=640, random_hw_adapt=True)
    records = [Record(n, f"{n}.png", "a", ("s.png",), digest="0" * 8, source_sizes=((9, 9),)) for n in range(10)]
    buckets = [edits.target_size(cfg, (2, 1) if n % 2 else (1, 1), 16) for n in range(10)]
    rows = edits.Rows(records, buckets, [1] * 10, 16)
    sampler = MicroBatchSampler(buckets, 1, 2, 0, 2, cfg.run.seed, shape_ids=rows.source_shapes())
    views = rows.views(cfg, sampler, max_train_steps=12)
    for rank in range(2):
        sampler = MicroBatchSampler(buckets, 1, 2, rank, 2, cfg.run.seed, shape_ids=rows.source_shapes())
        steps = {}
        for (place,) in itertools.islice(sampler, 24):
            view = rows.view(cfg, place.sample, place.step, place.epoch)
            assert view in views
            assert steps.setdefault(place.step, view.size) == view.size, "one size a step"
    assert len(views) < 12 * 10


def test_each_epoch_draws_an_instruction(settings, edits, encoding, tmp_path):
    """Catches a list of instructions of which one is trained alone, or that is not encoded beforehand, another
    instruction's prompt, and held-out rows that do not keep to the first."""
    cfg = settings(image_sample_size=64)
    more = {"digest": "0" * 8, "source_sizes": ((64, 64),)}
    records = [Record(n, f"{n}.png", "a", ("s.png",), other_texts=("b", "c") if n else (), **more) for n in range(2)]
    rows = edits.Rows(records, [(64, 64)] * 2, [1] * 2, 16)
    sampler = MicroBatchSampler(rows.buckets, 1, 1, 0, 1, cfg.run.seed, shape_ids=rows.source_shapes())
    views, embeddings = rows.views(cfg, sampler, max_train_steps=40), EmbeddingCache(tmp_path, {})
    assert {(view.row, view.caption) for view in views} == {(0, 0), (1, 0), (1, 1), (1, 2)}
    assert {view.caption for view in rows.first_views(cfg)} == {0}
    items = encoding.what_to_encode(cfg, embeddings, [(rows, views)], [])
    for view in views:
        record = records[view.row]
        item = items[encoding.prompt_key(embeddings, record, view, empty=False)]
        assert item.text == record.captions[view.caption]
        assert items[encoding.prompt_key(embeddings, record, view, empty=True)].text == " "
    texts = sorted(item.text for item in items.values() if isinstance(item, encoding.Instruction))
    assert texts == [" ", "a", "b", "c"], "one empty prompt, and each instruction once"


def test_data_sets_have_pictures_of_their_own(edits):
    """Catches a picture that is encoded for another data set's row, whose picture has the same name."""
    sets = [DataSet(train_data_dir=name) for name in ("a", "b", "a")]
    records = [Record(number, "0.png", "x", data_set=each) for number, each in enumerate(sets)]
    first, other, same = (edits.Picture((64, 64), record, None, 0).identity() for record in records)
    assert first == same != other


@pytest.mark.parametrize("flip", [False, True])
def test_a_mask_is_seen_as_its_target(settings, edits, encoding, tmp_path, flip):
    """Catches a mask that is not mirrored or not scaled with its target."""
    mask = plain((96, 48), "black")
    mask.paste("white", (0, 0, 48, 48))
    mask.save(tmp_path / "mask.png")
    cfg = settings(train_data_dir=tmp_path, mask_column="mask")
    record = Record(0, "a.png", "x", ("s.png",), extra={"mask": "mask.png"}, digest="0", width=96, height=48)
    view, embeddings = edits.View(0, (192, 96), 0, flip), EmbeddingCache(tmp_path / "cache", {})
    embeddings.add(encoding.target_key(embeddings, record, view), {"latents": torch.zeros(16, 1, 12, 24)})
    embeddings.add(encoding.source_key(embeddings, record, view, 0), {"latents": torch.zeros(16, 1, 12, 24)})
    embeddings.add(encoding.prompt_key(embeddings, record, view, False), {"prompt_embeds": torch.zeros(1)})
    seen = encoding.load_view(cfg, embeddings, record, view, empty=False)["loss_mask"]
    assert seen.shape == (1, 1, 12, 24) and seen[..., :10].mean() == (not flip) and seen[..., 14:].mean() == flip


def test_enable_bucket_trains_whole_pictures(settings, edits):
    """Catches a picture that is cut where it is to be whole, or squeezed where its centre is to be cut out."""
    image = plain((400, 200), "white")
    for corner in ((0, 0), (380, 0), (0, 180), (380, 180)):
        image.paste(RED, (*corner, corner[0] + 20, corner[1] + 20))
    image.paste(BLUE, (100, 0, 300, 200))  # the square in its centre
    whole, cut = (settings(image_sample_size=512, enable_bucket=bucket) for bucket in (True, False))
    size = edits.target_size(whole, image.size, 16)
    assert size == (736, 352) and edits.target_size(whole, (200, 400), 16) == (352, 736)
    fitted = edits.fit_target(whole, image, size)
    assert fitted.size == size
    for x, y in ((4, 4), (731, 4), (4, 347), (731, 347)):
        assert fitted.getpixel((x, y)) == RED
    assert edits.target_size(cut, image.size, 16) == (512, 512)
    fitted = edits.fit_target(cut, image, (512, 512))
    assert fitted.size == (512, 512)
    assert all(fitted.getpixel((x, y)) == pytest.approx(BLUE, abs=10) for x in (3, 508) for y in (3, 508))


def test_a_target_lies_on_its_source(settings, edits):
    """Catches a target of its source's aspect that is given another one: at 1024 both are the same size."""
    cfg = settings(image_sample_size=1024)
    for size in ((640, 320), (320, 640), (512, 512), (3000, 2001), (7, 5)):
        assert edits.target_size(cfg, size, 16) == edits.source_size(size)


# ---- encoding


@pytest.fixture(scope="module")
def six_edits(tmp_path_factory) -> Path:
    """Six edits of two sources; targets of two sizes."""
    folder = tmp_path_factory.mktemp("six")
    rng = np.random.RandomState(0)
    for name in ("s0", "s1", *range(6)):
        size = (64, 64) if name in ("s0", "s1", 0, 2, 4) else (128, 64)
        values = rng.randint(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(values).resize(size, Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    rows = [row([f"s{n % 2}.png"], f"{n}.png") for n in range(6)]
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.slow
def test_encode_batch_size_changes_nothing(
    settings, encoding, load_rows, process, fine_folder, six_edits, tmp_path, monkeypatch
):
    """Catches pictures of a batch that are mixed up or given to the wrong row, batches of unequal sizes, and a source
    that several rows share and that is encoded for each of them."""
    batches, entries, run = {}, {}, process()
    latents = encoding.Encoders.latents

    def spying(encoders, pixels: Tensor, moments: bool) -> dict[str, Tensor]:
        batches[encoders.cfg.pictures.encode_batch_size].append([tuple(each.shape) for each in pixels])
        return latents(encoders, pixels, moments)

    monkeypatch.setattr(encoding.Encoders, "latents", spying)
    for mini_batch in (1, 4):
        batches[mini_batch] = []
        rows = json.loads((six_edits / "train.json").read_text())
        more = dict(encode_batch_size=mini_batch, cache_dir=tmp_path / str(mini_batch), caption_dropout=0)
        cfg = config_of(settings, six_edits, rows, **more)
        cache = encoding.open_cache(cfg, run, fine_folder)
        loaded, _ = load_rows(cfg)
        views = [loaded.view(cfg, n, 0, 0) for n in range(6)]
        wanted = encoding.what_to_encode(cfg, cache, [(loaded, set(views))], [])
        encoding.encode_missing(cfg, run, fine_folder, cache, wanted)
        entries[mini_batch] = [
            encoding.load_view(cfg, cache, record, view, False) for record, view in zip(loaded.records, views)
        ]
    assert [len(batch) for batch in batches[1]] == [1] * 8
    assert sorted(len(batch) for batch in batches[4]) == [2, 3, 3]
    assert all(len(set(batch)) == 1 for batch in batches[4])
    for one, four in zip(entries[1], entries[4], strict=True):
        assert one.keys() == four.keys() == {"latents", "source_0", "prompt_embeds"}
        for name in one:
            torch.testing.assert_close(one[name], four[name], atol=1e-3, rtol=1e-3)
    all_targets = [entry["latents"] for entry in entries[4]]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(all_targets, 2) if a.shape == b.shape)
    sources = [entry["source_0"] for entry in entries[4]]
    assert torch.equal(sources[0], sources[2]) and not torch.equal(sources[0], sources[1])


# ---- sigma


class Recorder(torch.nn.Module):
    """A transformer that predicts zeros, and keeps the timesteps that it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.timesteps: list[float] = []

    def forward(self, hidden_states: Tensor, timestep: Tensor, **named: object) -> tuple[Tensor]:
        self.timesteps += timestep.tolist()
        return (torch.zeros_like(hidden_states),)


def sigmas_of_step(train, cfg, step: int, world_size: int, samples: int = 16) -> list[float]:
    """Sigma of each sample of a step, unshifted, over all micro-batches and processes, from compute_loss."""
    recorder, config = Recorder(), dict(num_attention_heads=2, attention_head_dim=32, num_layers=1)
    config |= dict(in_channels=64, joint_attention_dim=64)
    scheduler = dict(base_image_seq_len=256, max_image_seq_len=8192, base_shift=0.5, max_shift=0.9)
    models = train.Models(recorder, config, scheduler, torch.device("cpu"), torch.float32)
    batch, seed = cfg.batch, cfg.run.seed
    for rank in range(world_size):
        sampler = MicroBatchSampler(
            [(0, 0)] * samples, batch.train_batch_size, batch.gradient_accumulation_steps, rank, world_size, seed
        )
        for places in micro_batches_of(sampler, step, batch.gradient_accumulation_steps):
            sample = dict(latents=torch.zeros(16, 1, 4, 4), source_0=torch.zeros(16, 1, 4, 4))
            sample |= dict(prompt_embeds=torch.zeros(3, 64))
            made = [{**sample, "step": p.step, "position": p.position, "group_size": len(p.group)} for p in places]
            with torch.no_grad():
                train.compute_loss(models, collate(made), cfg)
    shift = np.exp(0.5 + 0.4 * (4 - 256) / (8192 - 256))
    return [t / (shift - (shift - 1) * t) for t in recorder.timesteps]


def micro_batches_of(sampler: MicroBatchSampler, step: int, accumulation: int) -> Iterator:
    return itertools.islice(sampler, step * accumulation, (step + 1) * accumulation)


@pytest.mark.parametrize(("batch_size", "accumulation", "world_size"), [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)])
def test_uniform_sampling_gives_each_sample_its_stratum(train, settings, batch_size, accumulation, world_size):
    """Catches strata over a micro-batch or a process alone, a stratum that comes twice, and an order that is the same
    in every step."""
    sizes = dict(train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
    cfg = settings(uniform_sampling=True, seed=2, **sizes)
    orders, within = [], []
    for step in range(4):
        sigmas = sigmas_of_step(train, cfg, step, world_size)
        strata = [int(8 * sigma) for sigma in sigmas]
        assert sorted(strata) == list(range(8)), sigmas
        orders.append(tuple(strata))
        within += [8 * sigma % 1 for sigma in sigmas]
    assert len(set(orders)) == 4 and max(within) - min(within) > 0.7


def test_without_uniform_sampling_sigmas_are_drawn_one_by_one(train, settings):
    """Catches strata that nobody asked for."""
    cfg = settings(train_batch_size=8, timestep_sampling="uniform", seed=2)
    assert any(
        sorted(int(8 * sigma) for sigma in sigmas_of_step(train, cfg, step, 1)) != list(range(8)) for step in range(4)
    )

"""Runs of one process, in this process: pictures and edits in one manifest, exact resume, batch equivalence, what is
drawn, users' mistakes."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from diffusers import QwenImage21Pipeline, QwenImage21Transformer2DModel
from helpers import assert_equal_weights, column, largest_difference, read_rows, run_main, weights
from parity import first
from PIL import Image
from sampling import assert_same_picture, differ, sample
from strategies import assert_opens

from common.data.cache import EmbeddingCache

STEPS = 8
FLAGS = ["--max_train_steps", STEPS, "--ema_decay", 0.9, "--export_model", "--checkpointing_steps", 4]
FLAGS += ["--validation_steps", STEPS]


@pytest.fixture(scope="module")
def straight(train, config, tmp_path_factory) -> Path:
    """Eight steps, validation at the start and the end, an average of the weights."""
    out = tmp_path_factory.mktemp("straight")
    run_main(train, ["--config", config, "--output_dir", out, *FLAGS])
    return out


def test_resume_is_exact(train, config, straight, tmp_path):
    """Catches lost optimizer state, an order of samples of several kinds or noise that begin anew after a SIGTERM:
    equal to the last bit."""
    argv = ["--config", config, "--output_dir", tmp_path, *FLAGS]
    run_main(train, argv, at_step={3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert len(read_rows(tmp_path)) == 3 and (tmp_path / "checkpoint-3").is_dir()
    run_main(train, [*argv, "--resume_from_checkpoint", "latest"])
    for name in ("loss", "grad_norm", "learning_rate", "latents_mean"):
        assert column(tmp_path, name) == column(straight, name), name
    assert len(set(column(straight).values())) == STEPS
    assert_equal_weights(weights(tmp_path / "export/transformer"), weights(straight / "export/transformer"))


def test_pictures_and_edits_train_side_by_side(train, config, straight, settings, data_folder):
    """Catches edits that are left out, and a micro-batch of two layouts: both kinds are among the steps, and the
    transformer is called with sources in some of them only."""
    rows = json.loads((data_folder / "train.json").read_text())
    assert {bool(row.get("source_file_path")) for row in rows} == {True, False}
    state = json.loads((straight / f"checkpoint-{STEPS}/trainer_state.json").read_text())
    assert state["segments"] == [[8, STEPS, 8]], "micro-batches of one shape"
    texts = [file.read_text().strip() for file in sorted((straight / "validation_images/step_000008").glob("*.txt"))]
    assert texts[:2] == ["a red circle on the left, on a white background", "a cross"]


def test_batch_times_accumulation(train, config, tmp_path):
    """Catches a step that depends on its split: captions of one length, 8 as one batch and as 8 times 1."""
    meta = tmp_path / "train.json"
    rows = [row for row in json.loads((Path(folder_of(config)) / "train.json").read_text()) if len(row) == 2]
    meta.write_text(json.dumps(rows))
    flags = ["--config", config, "--max_train_steps", 2, "--caption_dropout", 0, "--train_data_meta", meta]
    run_main(train, [*flags, "--output_dir", tmp_path / "one"])
    split = ["--train_batch_size", 1, "--gradient_accumulation_steps", 8]
    run_main(train, [*flags, *split, "--output_dir", tmp_path / "eight"])
    for name in ("loss", "grad_norm"):
        assert largest_difference(column(tmp_path / "eight", name), column(tmp_path / "one", name)) < 1e-4, name


def folder_of(config: Path) -> str:
    import yaml

    return yaml.safe_load(config.read_text())["train_data_dir"]


def test_targets_keep_their_transparency(train, settings, config, straight, model_folder, data_folder):
    """Catches a target that is flattened over white before the VAE, and an opaque one that is not opaque."""
    entries = EmbeddingCache(config.parent / "embedding_cache", {})  # any entry: keys are found by reading
    encoders = train.Encoders(settings(), model_folder, torch.device("cpu"), torch.float32)
    picture = Image.open(data_folder / "000.png")
    assert picture.mode == "RGBA" and min(picture.getchannel("A").getextrema()) < 10
    pixels = train.images.image_to_tensor(picture)
    expected = encoders.images(pixels[None], moments=False)["latents"][0]
    flat = train.images.image_to_tensor(picture.convert("RGB").convert("RGBA"))
    flat = first(encoders.images(flat[None], moments=False))
    kept = [
        entries_of["latents"]
        for entries_of in (entries[key] for key in entries._entries)
        if "latents" in entries_of and entries_of["latents"].shape == expected.shape
    ]
    assert any(torch.allclose(latents, expected, atol=1e-5) for latents in kept)
    assert not any(torch.allclose(latents, flat["latents"], atol=1e-5) for latents in kept)


def test_export_opens_and_draws(straight, model_folder, recipe, tmp_path):
    """Catches an export that diffusers cannot read, and a sample.py that draws otherwise than the pipeline, with a
    source and without."""
    transformer = assert_opens(QwenImage21Transformer2DModel, straight / "export/transformer")
    pipeline = QwenImage21Pipeline.from_pretrained(model_folder, transformer=transformer.float())
    pipeline.set_progress_bar_config(disable=True)
    source = Image.effect_noise((96, 96), 80).convert("RGB")
    source.save(tmp_path / "source.png")
    drawn = {}
    for name, image in (("alone", None), ("edit", source)):
        flags = ["--run", straight, "--prompt", "a cross", *(["--image", tmp_path / "source.png"] if image else [])]
        (drawn[name],) = sample(recipe, tmp_path / name, *flags).values()
        size = dict(width=96, height=96, output_resolution=96, num_inference_steps=3)
        theirs = pipeline("a cross", image=image, generator=torch.Generator().manual_seed(0), **size).images[0]
        assert_same_picture(drawn[name], theirs)
        assert drawn[name].mode == "RGBA"
    assert differ(drawn["alone"], drawn["edit"])


def test_validation_draws_what_the_pipeline_draws(straight, model_folder, train):
    """Catches validation that answers encode_prompt with another text, mask or template than the pipeline's own: the
    first prompt's picture before training."""
    pipeline = QwenImage21Pipeline.from_pretrained(model_folder)
    pipeline.set_progress_bar_config(disable=True)
    folder = straight / "validation_images/step_000000"
    for index in range(2):
        theirs = pipeline(
            (folder / f"{index:03d}.txt").read_text().strip(), width=96, height=96, output_resolution=96,
            num_inference_steps=3, generator=torch.Generator().manual_seed(42 + index),
        ).images[0]  # fmt: skip
        assert_same_picture(Image.open(folder / f"{index:03d}.png"), theirs)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"bucket_multiple": 16}, "bucket_multiple must be a positive multiple of 32 .*got 16; use 32"),
        ({"benchmark_sources": 99}, "benchmark_sources must be at most 16, got 99"),
    ],
)
def test_mistakes(settings, flags, sentence):
    """Catches sizes that the pipeline would round, without a word."""
    with pytest.raises(ValueError, match=sentence):
        settings(**flags)


def test_a_source_that_is_too_long(train, config, data_folder, tmp_path):
    """Catches a source that the pipeline resizes to a side of zero."""
    folder = tmp_path / "data"
    shutil.copytree(data_folder, folder)
    Image.new("RGB", (900, 10)).save(folder / "long.png")
    (folder / "train.json").write_text(
        json.dumps([{"file_path": "000.png", "source_file_path": ["long.png"], "text": "a"}])
    )
    argv = ["--config", config, "--output_dir", tmp_path / "out", "--train_data_dir", folder]
    with pytest.raises(ValueError, match=r"long.png.*is 900 x 10; expected 8 : 1 at most"):
        run_main(train, argv)

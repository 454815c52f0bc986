"""A small random Qwen-Image 2.1 with every part of the real classes, drawn data in two buckets, and a configuration
for both."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import recipe_fixtures

from tiny import shapes

PLACES = ("on the left", "on the right")
SQUARE, WIDE = (96, 96), (128, 64)  # (width, height): two buckets at resolution 96


recipe, train, make_tiny, settings = recipe_fixtures(__file__)


@pytest.fixture(scope="session")
def model_folder(make_tiny, tmp_path_factory) -> Path:
    """A model in diffusers' layout with random weights, whatever the shipped ones are.

    Width 256, so that its matrices are larger than what ZeRO-3 leaves unpartitioned; latents_mean and latents_std
    differ by channel, so that a wrong normalisation shows.
    """
    folder = tmp_path_factory.mktemp("qwenimage") / "model"
    pipeline = make_tiny.build_pipeline(weights=None)
    torch.manual_seed(1)
    sizes = dict(num_layers=2, attention_head_dim=32, num_attention_heads=8, axes_dims_rope=(8, 12, 12))
    pipeline.register_modules(transformer=type(pipeline.transformer)(context_in_dim=64, **sizes))
    scenes = [
        shapes.draw([shapes.Found(colour, "cross", (4, 12, 40, 48))], background)
        for colour in shapes.COLOURS
        for background in shapes.BACKGROUNDS
    ]
    with torch.no_grad():
        latents = pipeline.vae.encode(
            pipeline.image_processor.preprocess([scene.convert("RGBA") for scene in scenes])[:, :, None]
        ).latent_dist.mode()
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))  # (64,), (64,)
    pipeline.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """40 drawings, two fifths of them wide, one shape each, captions of one length; every fourth fades
    out towards its top. 16 more are edits of some of them."""
    folder, rng, rows = tmp_path_factory.mktemp("drawn"), random.Random(3), []
    for number in range(40):
        size = WIDE if number % 5 < 2 else SQUARE
        place, background = rng.choice(PLACES), rng.choice(list(shapes.BACKGROUNDS))
        box = shapes.place_box(place, size, rng.uniform(30, 40), rng)
        scene = [shapes.Found(rng.choice(list(shapes.COLOURS)), rng.choice(shapes.SHAPES), box)]
        picture = shapes.draw(scene, background, size)
        if number % 4 == 0:
            picture.putalpha(Image.linear_gradient("L").resize(size))
        picture.save(folder / f"{number:03d}.png")
        rows.append({"file_path": f"{number:03d}.png", "text": shapes.caption(scene, background, size)})
    for number in range(0, 40, 5):
        rows.append({**rows[number], "source_file_path": [f"{number + 1:03d}.png"], "text": "make the cross blue"})
        rows.append({**rows[number + 2], "source_file_path": [f"{number + 3:03d}.png"], "text": "make the star red"})
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="session")
def config(model_folder, data_folder, tmp_path_factory) -> Path:
    """A YAML for short runs: 8 samples a step, float32, no validation, no checkpoints, one cache for all of them.

    AdamW's epsilon is large, because the gradient of some parameters (the bias of attention's keys) is zero but for
    rounding, and AdamW would make steps of a whole learning rate out of that.
    """
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    values = dict(
        pretrained_model_name_or_path=str(model_folder),
        train_data_dir=str(data_folder),
        cache_dir=str(file.parent / "embedding_cache"),
        resolution=96,
        bucket_multiple=32,
        train_batch_size=8,
        mixed_precision="no",
        optimizer="adamw",
        learning_rate=0.001,
        adam_epsilon=1e-5,
        max_train_steps=6,
        checkpointing_steps=0,
        checkpoints_total_limit=0,
        validation_steps=0,
        num_validation_samples=3,
        validation_prompts=["a red circle on the left, on a white background", "a cross"],
        num_inference_steps=3,
        export_model=False,
        dataloader_num_workers=0,
    )
    file.write_text(yaml.safe_dump(values))
    return file

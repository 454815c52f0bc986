"""A small random FLUX.2 Klein with every part of the real classes, drawn data with and without reference images in two
buckets, and a configuration for both."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import recipe_fixtures

from tiny import shapes

SQUARE, WIDE = (96, 96), (128, 64)  # (width, height): two buckets at resolution 96
REFERENCE = (90, 70)  # (width, height): the pipeline cuts it to 80 x 64


recipe, train, make_tiny, settings = recipe_fixtures(__file__)


@pytest.fixture(scope="session")
def model_folder(make_tiny, tmp_path_factory) -> Path:
    """A model in diffusers' layout with random weights, whatever the shipped ones are.

    Width 192, so that its largest matrices are larger than what ZeRO-3 leaves unpartitioned. The batch norm's running
    statistics differ by channel and its eps is not small beside them, so that a wrong normalisation shows.
    """
    folder = tmp_path_factory.mktemp("flux2klein") / "model"
    pipeline = make_tiny.build_pipeline(weights=None)
    torch.manual_seed(1)
    edges = {name: pipeline.transformer.config[name] for name in ("in_channels", "joint_attention_dim")}
    sizes = dict(num_layers=1, num_single_layers=2, attention_head_dim=32, num_attention_heads=6)
    sizes |= dict(axes_dims_rope=(8, 8, 8, 8), guidance_embeds=False)
    pipeline.register_modules(transformer=type(pipeline.transformer)(**edges, **sizes))
    scenes = [
        shapes.draw([shapes.Found(colour, "cross", (4, 12, 40, 48))], background)
        for colour in shapes.COLOURS
        for background in shapes.BACKGROUNDS
    ]
    with torch.no_grad():
        latents = pipeline.vae.encode(pipeline.image_processor.preprocess(scenes)).latent_dist.mode()
    patches = pipeline._patchify_latents(latents)  # (N, 4 * channels, 4, 4)
    pipeline.vae.bn.running_mean.copy_(patches.mean((0, 2, 3)))
    pipeline.vae.bn.running_var.copy_(patches.var((0, 2, 3)))
    pipeline.vae.register_to_config(batch_norm_eps=0.3 * pipeline.vae.bn.running_var.mean().item())
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """40 captioned drawings, half of them wide and made from a reference image: the same scene without colour."""
    folder, rng, rows = tmp_path_factory.mktemp("drawn"), random.Random(3), []
    for number in range(40):
        size = WIDE if number % 2 else SQUARE
        place, background = rng.choice(list(shapes.PLACES)), rng.choice(list(shapes.BACKGROUNDS))
        box = shapes.place_box(place, size, rng.uniform(30, 40), rng)
        scene = [shapes.Found(rng.choice(list(shapes.COLOURS)), rng.choice(shapes.SHAPES), box)]
        shapes.draw(scene, background, size).save(folder / f"{number:03d}.png")
        text = shapes.caption(scene, background, size, colours=number % 3 > 0)
        rows.append({"file_path": f"{number:03d}.png", "text": text})
        if size == WIDE:
            grey = [shapes.Found("grey", scene[0].shape, shapes.place_box(place, REFERENCE, 36))]
            shapes.draw(grey, background, REFERENCE).save(folder / f"{number:03d}_grey.png")
            rows[-1]["source_file_path"] = [f"{number:03d}_grey.png"]
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="session")
def config(model_folder, data_folder, tmp_path_factory) -> Path:
    """A YAML for short runs: 16 samples a step, float32, no validation, no checkpoints, one cache for all of them.

    AdamW's epsilon is large, because gradients that are zero but for rounding would otherwise become steps of a whole
    learning rate.
    """
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    references = [data_folder / name for name in ("001_grey.png", "003_grey.png", "002.png")]
    values = dict(
        pretrained_model_name_or_path=str(model_folder),
        train_data_dir=str(data_folder),
        cache_dir=str(file.parent / "embedding_cache"),
        resolution=96,
        max_sequence_length=32,
        train_batch_size=16,
        mixed_precision="no",
        optimizer="adamw",
        learning_rate=0.001,
        adam_epsilon=1e-5,
        max_train_steps=6,
        checkpointing_steps=0,
        checkpoints_total_limit=0,
        validation_steps=0,
        num_validation_samples=3,
        validation_prompts=["a red circle on the left, on a white background", "a cross", "a blue star at the top"],
        validation_image_paths=[str(references[0]), f"{references[1]},{references[2]}", str(references[2])],
        num_inference_steps=3,
        export_model=False,
        dataloader_num_workers=0,
    )
    file.write_text(yaml.safe_dump(values))
    return file

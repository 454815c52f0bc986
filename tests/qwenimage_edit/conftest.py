"""Small random Qwen-Image-Edit models with every part of the real classes, drawn edits with one and with two sources,
and a configuration for both."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import recipe_fixtures

from common.data.known_files import KnownFiles
from tiny import shapes

SQUARE, WIDE = (256, 256), (384, 192)  # (width, height) of targets: two buckets at image_sample_size 256
FLAT = (256, 64)  # of a source: 2048 x 512 for the VAE, which its 64-fold reduction divides


recipe, train, make_tiny, settings = recipe_fixtures(__file__)


@pytest.fixture(scope="session")
def edits(train) -> ModuleType:
    """The recipe's edits.py."""
    return train.edits


@pytest.fixture(scope="session")
def encoding(train) -> ModuleType:
    """The recipe's encoding.py."""
    return train.encoding


@pytest.fixture(scope="session")
def process() -> Callable[..., SimpleNamespace]:
    """process(dtype): what the recipe's modules need of a Run, of one process."""

    def make(dtype: torch.dtype = torch.float32) -> SimpleNamespace:
        plain = dict(
            device=torch.device("cpu"), rank=0, world_size=1, is_main=True, first_rows={}, barrier=lambda: None
        )
        asked = dict(progress=lambda items, title, total: items, share_of=lambda items: items)
        return SimpleNamespace(**plain, **asked, compute_dtype=dtype)

    return make


@pytest.fixture(scope="session")
def load_rows(edits, process) -> Callable:
    """load_rows(cfg): rows to train on and held out, for a model whose tokens have 32 pixels a side."""
    return lambda cfg: edits.load_rows(cfg, process(), 32, KnownFiles())


@pytest.fixture(scope="session")
def write_model(make_tiny, tmp_path_factory) -> Callable[..., Path]:
    """write_model(halvings, heads, **transformer's config): a model in diffusers' layout with random weights, whose
    VAE reduces 2**halvings-fold. Latents' mean and std differ by channel, so that a wrong normalisation shows."""

    def write(halvings: int, heads: int, **more: object) -> Path:
        torch.manual_seed(1)
        vae = AutoencoderKLQwenImage(
            base_dim=2,
            z_dim=16,
            dim_mult=[1, 1, *[2] * (halvings - 2), 4],
            num_res_blocks=1,
            temperal_downsample=[False] * halvings,
            latents_mean=torch.linspace(-0.3, 0.4, 16).tolist(),
            latents_std=torch.linspace(1.6, 0.6, 16).tolist(),
        )
        make_tiny.initialise(vae)
        sizes = dict(attention_head_dim=32, num_attention_heads=heads, axes_dims_rope=(8, 12, 12))
        processor = make_tiny.build_processor()
        pipeline = QwenImageEditPlusPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**make_tiny.SCHEDULER),
            vae=vae,
            text_encoder=make_tiny.build_text_encoder(processor.tokenizer),
            tokenizer=processor.tokenizer,
            processor=processor,
            transformer=QwenImageTransformer2DModel(**{"joint_attention_dim": 64, **sizes, **more}),
        )
        folder = tmp_path_factory.mktemp("edit") / "model"
        pipeline.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def model_folder(write_model) -> Path:
    """64 tokens a source, as few as the embedded tiny model has; width 192, so that its largest matrices are larger
    than what ZeRO-3 leaves unpartitioned."""
    return write_model(6, heads=6, num_layers=2)


@pytest.fixture(scope="session")
def fine_folder(write_model) -> Path:
    """A VAE that takes every size of the pipelines: 1024 tokens a source."""
    return write_model(4, heads=2, num_layers=1)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """20 edits of few sources: square targets with one source, wide ones with two of different sizes."""
    folder, rows = tmp_path_factory.mktemp("drawn"), []
    colours = list(shapes.COLOURS)
    for number in range(3):
        for name, size in (("square", (96, 96)), ("flat", FLAT)):
            box = shapes.place_box("on the left", size, 40 + 4 * number)
            scene = [shapes.Found("grey", shapes.SHAPES[number], box)]
            shapes.draw(scene, list(shapes.BACKGROUNDS)[number], size).save(folder / f"{name}_{number}.png")
    for number in range(20):
        size, colour, shape = (WIDE if number % 2 else SQUARE), colours[number % 6], shapes.SHAPES[number % 3]
        scene = [shapes.Found(colour, shape, shapes.place_box("on the left", size, 100 + 3 * number))]
        shapes.draw(scene, list(shapes.BACKGROUNDS)[number % 3], size).save(folder / f"{number:03d}.png")
        sources = [f"square_{number % 3}.png"] + [f"flat_{number // 2 % 3}.png"] * (number % 2)
        text = f"make the {shape} {colour}" + ", as in Picture 2" * (number % 2) + f" ({number})"
        rows.append({"file_path": f"{number:03d}.png", "source_file_path": sources, "text": text, "type": "image"})
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "one_source.json").write_text(json.dumps([row for row in rows if len(row["source_file_path"]) == 1]))
    return folder


@pytest.fixture(scope="session")
def config(model_folder, data_folder, tmp_path_factory) -> Path:
    """A YAML for short runs: 8 samples a step, float32, no validation, no checkpoints, one cache for all of them.

    AdamW's epsilon is large, because gradients that are zero but for rounding would otherwise become steps of a whole
    learning rate. Validation draws the two held-out rows: one with one source, one with two.
    """
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    values = dict(
        pretrained_model_name_or_path=str(model_folder),
        train_data_dir=str(data_folder),
        cache_dir=str(file.parent / "embedding_cache"),
        image_sample_size=256,
        encode_batch_size=4,
        train_batch_size=8,
        mixed_precision="no",
        optimizer="adamw",
        learning_rate=0.001,
        adam_epsilon=1e-5,
        max_train_steps=6,
        checkpointing_steps=0,
        checkpoints_total_limit=0,
        validation_steps=0,
        num_validation_samples=2,
        num_inference_steps=2,
        export_model=False,
        dataloader_num_workers=0,
        seed=1,
    )
    file.write_text(yaml.safe_dump(values))
    return file

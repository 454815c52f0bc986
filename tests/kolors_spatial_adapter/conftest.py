"""A small random Kolors with every part of the real classes, drawn layouts in two buckets, and a configuration for
short runs."""

import importlib
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import recipe_fixtures

from tiny import shapes

SQUARE, WIDE = (96, 96), (128, 64)  # (width, height): two buckets at resolution 96


recipe, train, make_tiny, settings = recipe_fixtures(__file__)


@pytest.fixture(scope="session")
def adapter_module(train) -> ModuleType:
    """adapter.py as train.py imports it; boxes, layouts and modes alike."""
    return importlib.import_module("adapter")


@pytest.fixture(scope="session")
def boxes(train) -> ModuleType:
    return importlib.import_module("boxes")


@pytest.fixture(scope="session")
def layouts(train) -> ModuleType:
    return importlib.import_module("layouts")


@pytest.fixture(scope="session")
def modes(train) -> ModuleType:
    return importlib.import_module("modes")


@pytest.fixture(scope="session")
def model_folder(make_tiny, tmp_path_factory) -> Path:
    """A model in diffusers' layout with random weights, whatever the shipped ones are, and a VAE whose scaling factor
    is not 1."""
    folder = tmp_path_factory.mktemp("kolors") / "model"
    pipeline = make_tiny.build_pipeline(weights=None)
    pipeline.vae.register_to_config(scaling_factor=3.0)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(model_folder, train):
    """A new pipeline with its own UNet; tests install adapters in it."""
    pipeline = train.KolorsPipeline.from_pretrained(model_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """40 drawings with one or two objects and their boxes, half of them wide, some larger than their bucket."""
    folder, rng, rows = tmp_path_factory.mktemp("drawn"), random.Random(3), []
    for number in range(40):
        size = (WIDE if number % 4 else (160, 72)) if number % 2 else SQUARE
        left = shapes.Found(rng.choice(list(shapes.COLOURS)), rng.choice(shapes.SHAPES), (12, 14, 40, 42))
        right = shapes.Found(rng.choice(list(shapes.COLOURS)), rng.choice(shapes.SHAPES), (56, 20, 84, 48))
        scene = [left, right][: 1 + number % 3 // 2]
        shapes.draw(scene, "white", size).save(folder / f"{number:03d}.png")
        objects = [
            {
                "phrase": f"{item.colour} {item.shape}",
                "bbox": [value / size[place % 2] for place, value in enumerate(item.bbox)],
            }
            for item in scene
        ]
        text = " and ".join(f"a {item['phrase']}" for item in objects)
        rows.append(
            {"file_path": f"{number:03d}.png", "text": text, "width": size[0], "height": size[1], "objects": objects}
        )
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def config(model_folder, data_folder, tmp_path_factory) -> Path:
    """A YAML for short runs: 8 samples a step, float32, three modes, no validation, no checkpoints, one cache for all.

    AdamW's epsilon is large, because gradients that are zero but for rounding would otherwise become steps of a whole
    learning rate.
    """
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    values = dict(
        pretrained_model_name_or_path=str(model_folder),
        train_data_dir=str(data_folder),
        cache_dir=str(file.parent / "embedding_cache"),
        resolution=96,
        train_batch_size=8,
        mixed_precision="no",
        modes="captioning,retrieval,generation",
        adapter_rank=32,
        max_objects=4,
        retrieval_queue=12,
        captioning_weight=1.0,
        retrieval_weight=1.0,
        learning_rate=0.003,
        adam_epsilon=1e-5,
        max_train_steps=6,
        checkpointing_steps=0,
        checkpoints_total_limit=0,
        validation_steps=0,
        num_validation_samples=3,
        num_inference_steps=3,
        dataloader_num_workers=0,
    )
    file.write_text(yaml.safe_dump(values))
    return file

"""A small random Qwen3-VL with its processor, drawn people and retention pools, and a configuration for short runs."""

import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import ROOT, recipe_fixtures

RECIPE = ROOT / "recipes" / Path(__file__).parent.name
SIZE = 64  # pixels: 4 visual tokens
PEOPLE = ["--num_entities", "6", "--image_size", str(SIZE), "--images_per_entity", "2", "1", "1"]
PEOPLE += ["--connectors_per_split", "6", "2", "2", "--rows_per_entity", "8", "2", "2"]


recipe, train, make_tiny, settings = recipe_fixtures(__file__)


@pytest.fixture(scope="session")
def processor(make_tiny):
    return make_tiny.build_processor()


@pytest.fixture(scope="session")
def model_folder(make_tiny, processor, tmp_path_factory) -> Path:
    """A model as save_pretrained writes it, with random weights, whatever the shipped ones are."""
    folder = tmp_path_factory.mktemp("qwen3vl") / "model"
    make_tiny.build_model(processor, weights=None).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder(make_tiny, tmp_path_factory) -> Path:
    """Six people (48 training rows of each task), 20 faces and 20 objects of retention beside them."""
    folder = tmp_path_factory.mktemp("people") / "data"
    people = make_tiny.parse_config(
        make_tiny.generate_data.FaceConfig, ["--config", str(RECIPE / "face_config.yaml"), *PEOPLE]
    )
    make_tiny.generate_data.generate(people, folder)
    make_tiny.face_pool.generate(folder / "faces", 20, image_size=SIZE)
    make_tiny.object_pool.generate(folder / "objects", 20, image_size=SIZE)
    return folder


@pytest.fixture(scope="session")
def config(model_folder, data_folder, tmp_path_factory) -> Path:
    """A YAML for short runs: 8 rows a step, float32, NF4, dropout on, no validation, no checkpoints."""
    file = tmp_path_factory.mktemp("config") / "small.yaml"
    values = dict(
        pretrained_model_name_or_path=str(model_folder),
        train_data_dir=str(data_folder),
        face_retention_pool="faces",
        object_retention_pool="objects",
        max_length=128,
        min_pixels=SIZE * SIZE,
        max_pixels=SIZE * SIZE,
        train_batch_size=8,
        mixed_precision="no",
        learning_rate=0.01,
        min_lr=0.0005,
        min_val_loss=0.0,
        max_train_steps=6,
        validation_steps=0,
        validation_epochs=0,
        checkpointing_steps=0,
        checkpoints_total_limit=0,
        dataloader_num_workers=0,
    )
    file.write_text(yaml.safe_dump(values))
    return file

"""A recipe is there to be copied and changed: two short ways, on copies of qwenimage_fulltune that are patched as a
person would."""

import ast
import json
from pathlib import Path
from types import ModuleType

import pytest
from helpers import ROOT, column, copy_of_recipe, load_script, read_rows, run_main
from sources import imports, parsed

RECIPE = ROOT / "recipes/qwenimage_fulltune"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The recipe's tiny model, and 24 of its rows."""
    folder = tmp_path_factory.mktemp("tiny")
    load_script(RECIPE / "make_tiny.py").make(folder)
    data = folder / "data"
    rows = json.loads((data / "train.json").read_text())[:24]
    (data / "train.json").write_text(json.dumps(rows))
    return folder


def run(train: ModuleType, tiny: Path, out: Path, *flags: object) -> Path:
    """Three steps of the tiny config with a validation before and after them; copies share one cache."""
    given = {
        "pretrained_model_name_or_path": tiny / "model",
        "train_data_dir": tiny / "data",
        "cache_dir": tiny / "embedding_cache",
        "output_dir": out,
        "train_batch_size": 4,
        "max_train_steps": 3,
        "ema_decay": 0,
        "validation_steps": 3,
        "validation_prompts": "a red cross",
        "num_inference_steps": 2,
        "checkpointing_steps": 0,
    }
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    run_main(train, ["--config", RECIPE / "configs/tiny.yaml", *words, "--no-export_model", *flags])
    return out


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory) -> Path:
    return run(load_script(RECIPE / "train.py"), tiny, tmp_path_factory.mktemp("original"))


def patch(copy: Path, *changes: tuple[str, str]) -> ModuleType:
    """The copy's train.py with some lines replaced; every change is made once."""
    text = (copy / "train.py").read_text()
    for before, after in changes:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    (copy / "train.py").write_text(text)
    return load_script(copy / "train.py")


def held_out(out: Path) -> list[float]:
    return [row["validation_loss"] for row in read_rows(out / "validation.jsonl")]


ERRORS = "fm.squared_errors(velocity_pred, pack_latents(target), pack_latents(weights))"


def test_another_loss_is_one_function(tiny, original, tmp_path):
    """Catches a loss that is written down twice: who changes sample_errors changes training and the held-out loss."""
    with copy_of_recipe(RECIPE, "loss") as copy:
        train = patch(copy, (f"    return {ERRORS}", f"    return 3 * {ERRORS}"))
        assert "3 * fm." in ast.unparse(next(node for node in parsed(copy / "train.py").body if named(node)))
        out = run(train, tiny, tmp_path / "out")
    assert column(out)[1] == pytest.approx(3 * column(original)[1], rel=1e-6)
    assert held_out(out)[0] == pytest.approx(3 * held_out(original)[0], rel=1e-6) and len(held_out(out)) == 2
    assert column(out, "latents_mean") == column(original, "latents_mean")


def named(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == "sample_errors"


def test_another_transformer_is_few_places():
    """Catches a recipe that names its model all over: with another transformer of diffusers, these are to be touched.

    Encoders          which pipeline encodes prompts, and how the VAE is called
    load_vae          the VAE's class
    latent_statistics how the VAE's configuration normalises latents
    prepare_data      the prompt template, which is part of the cache's keys
    Models            the VAE's class
    predict_velocity  the transformer's arguments, as the pipeline gives them
    draw_pictures     the pipeline and the scheduler that draw
    main              the transformer's class

    Beside them stand the shapes that follow from the model: random_sample, forward_flops, pack_latents, pad_prompts.
    """
    file, places = RECIPE / "train.py", []
    model_names = {here for module, _, here in imports(file) if module.split(".")[0] in ("diffusers", "transformers")}
    assert len(model_names) >= 5
    methods = ("models.transformer(", "encode_prompt(", "vae.encode(", "vae.config")
    for node in parsed(file).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
        if names & model_names or any(method in ast.unparse(node) for method in methods):
            places.append(getattr(node, "name", ast.unparse(node)))
    assert len(places) <= 8, places
    listed = test_another_transformer_is_few_places.__doc__
    assert all(f"    {place} " in listed for place in places), places

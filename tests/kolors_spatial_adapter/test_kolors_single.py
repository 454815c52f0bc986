"""One process, whole runs: exact resume, batch against accumulation, dropouts and flips, what is saved, refusals."""

import json

import pytest
import torch
from helpers import column, largest_difference, load_script, read_card, read_rows, run_main
from PIL import Image
from safetensors.torch import load_file
from sampling import assert_same_picture, differ, sample

from common.start.config import parse_recipe

STEPS, SAVED = 6, 3


@pytest.fixture(scope="module")
def straight(train, config, tmp_path_factory):
    """Three modes, a checkpoint in the middle, validation with pictures, flips."""
    out = tmp_path_factory.mktemp("straight")
    flags = ["--checkpointing_steps", SAVED, "--validation_steps", SAVED, "--random_flip"]
    run_main(train, ["--config", config, "--output_dir", out, "--max_train_steps", STEPS, *flags])
    return out


@pytest.mark.slow
def test_resume_is_exact(train, config, straight, tmp_path):
    """Catches a resume that loses the queue, the heads, moments or the order of samples: equal to the last bit."""
    flags = ["--resume_from_checkpoint", straight / f"checkpoint-{SAVED}", "--random_flip"]
    run_main(train, ["--config", config, "--output_dir", tmp_path, "--max_train_steps", STEPS, *flags])
    for name in ("loss", "grad_norm", "generation_loss", "captioning_loss", "retrieval_loss"):
        assert column(tmp_path, name) == column(straight, name, from_step=SAVED + 1), name
    ours, theirs = (load_file(folder / "export/adapter/adapter_model.safetensors") for folder in (tmp_path, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_what_a_checkpoint_holds(straight):
    """Catches checkpoints that save the frozen UNet (10 GB each), or forget the queue or a head."""
    (file,) = (straight / f"checkpoint-{SAVED}/model").glob("*.safetensors")
    names = load_file(file).keys()
    assert {name.split(".")[0] for name in names} == {"adapter", "captioning", "retrieval"}
    assert {"retrieval.image_queue", "retrieval.layout_queue", "retrieval.row_queue", "retrieval.queue_end"} <= names
    rows = load_file(file)["retrieval.row_queue"]
    assert (rows >= 0).all() and len(rows) == 12


@pytest.mark.slow
def test_checkpoints_and_exports_are_adapters(straight, adapter_module, pipeline):
    """Catches a checkpoint that cannot be drawn with before the run ends, and an export of other weights."""
    exported = adapter_module.load_adapter(straight / "export/adapter", pipeline.unet)
    last = adapter_module.load_adapter(straight / f"checkpoint-{STEPS}", pipeline.unet)
    earlier = adapter_module.load_adapter(straight / f"checkpoint-{SAVED}", pipeline.unet)
    assert exported.cfg == last.cfg and exported.cfg.vocabulary
    for (name, weight), same in zip(exported.named_parameters(), last.parameters(), strict=True):
        assert torch.equal(weight, same), name
    assert not torch.equal(earlier.grounding.mlp[0].weight, last.grounding.mlp[0].weight)
    assert all(value != 0 for value in adapter_module.gate_values(exported).values())


@pytest.mark.slow
def test_the_export_has_a_card(straight, model_folder, adapter_module):
    """Catches an export that does not say what it is, or how to load it."""
    text = read_card(straight / "export/adapter", straight, STEPS)
    assert "library_name: diffusers" in text and "A spatial adapter of " + model_folder.name in text
    assert all(hasattr(adapter_module, name) for name in ("draw", "load_adapter")) and "load_adapter(" in text


@pytest.mark.slow
def test_sample_draws_from_a_checkpoint(straight, recipe, tmp_path):
    """Catches a checkpoint whose base, size or adapter are not found: it draws what the run's export draws."""
    flags = ["--prompt", "a red circle", "--objects", '[{"phrase": "red circle", "bbox": [0.1, 0.1, 0.5, 0.5]}]']
    checkpoints = [("--checkpoint", straight / f"checkpoint-{step}") for step in (STEPS, SAVED)]
    drawn = [
        sample(recipe, tmp_path / str(n), *of, *flags) for n, of in enumerate([("--run", straight), *checkpoints])
    ]
    assert_same_picture(drawn[0]["drawn.png"], drawn[1]["drawn.png"])
    assert differ(drawn[0]["drawn.png"], drawn[2]["drawn.png"])


@pytest.mark.slow
def test_validation(straight):
    """Catches pictures or losses that are missing, and a held-out loss that adapter training cannot move."""
    rows = read_rows(straight / "validation.jsonl")
    assert [row["step"] for row in rows] == [0, SAVED, STEPS]
    assert rows[0]["mean_gate"] == 0 and rows[-1]["mean_gate"] > 0
    assert rows[0]["validation_loss"] != rows[-1]["validation_loss"]
    for step in (0, STEPS):
        folder = straight / f"validation_images/step_{step:06d}"
        assert {"000.png", "000_boxes.png", "002.txt", "grid.png"} <= {file.name for file in folder.iterdir()}
        assert Image.open(folder / "000.png").size == (96, 96)
    pictures = [Image.open(straight / f"validation_images/step_{step:06d}/000.png") for step in (0, STEPS)]
    assert pictures[0].tobytes() != pictures[1].tobytes()


@pytest.mark.slow
def test_what_is_logged(straight):
    """Catches mode losses scaled by how many modes there are, and samples counted once a mode."""
    for row in read_rows(straight):
        mean = (row["captioning_loss"] + row["retrieval_loss"] + row["generation_loss"]) / 3
        assert row["loss"] == pytest.approx(mean, rel=1e-5)
        assert row["samples_per_second"] * row["seconds_per_step"] == pytest.approx(8)
    assert 0.3 < column(straight, "generation_loss")[1] < 3


@pytest.mark.slow
def test_accumulation_is_a_larger_batch(train, config, tmp_path):
    """Catches noise, dropout or a flip drawn by micro-batch, new weights that are others in every run, and losses that
    the number of modes scales twice. Retrieval is left out: its negatives are the micro-batch's by definition."""
    flags = ["--modes", "captioning,generation", "--max_train_steps", 3, "--random_flip", "--box_loss_weight", 2]
    splits = {"batch": [], "accumulated": ["--train_batch_size", 2, "--gradient_accumulation_steps", 4]}
    splits["by_size"] = ["--train_batch_size", 4, "--global_batch_size", 8]
    for name, split in splits.items():
        run_main(train, ["--config", config, "--output_dir", tmp_path / name, *flags, *split])
    for name in ("accumulated", "by_size"):
        for value in ("loss", "grad_norm", "generation_loss"):
            ours, theirs = column(tmp_path / name, value), column(tmp_path / "batch", value)
            assert largest_difference(ours, theirs) < 1e-4, (name, value)


@pytest.mark.slow
def test_bf16_with_checkpointing(train, config, tmp_path):
    """Catches a mixture of precisions that fails in a run, adapter weights that are kept in bf16, and a resume from
    them."""
    flags = ["--mixed_precision", "bf16", "--gradient_checkpointing", "--max_train_steps", 2, "--validation_steps", 2]
    run_main(train, ["--config", config, "--output_dir", tmp_path, *flags, "--checkpointing_steps", 2])
    (file,) = (tmp_path / "checkpoint-2/model").glob("*.safetensors")
    weights = load_file(file)
    assert {tensor.dtype for name, tensor in weights.items() if "queue" not in name} == {torch.float32}
    assert (tmp_path / "validation_images/step_000002/grid.png").is_file()
    weight = weights["adapter.grounding.mlp.0.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.slow
def test_generation_alone(train, config, tmp_path, adapter_module, pipeline):
    """Catches heads that are made, trained or asked for when only generation is wanted; and a start from an earlier
    adapter that is not that adapter."""
    flags = ["--modes", "generation", "--max_train_steps", 1, "--checkpointing_steps", 1]
    run_main(train, ["--config", config, "--output_dir", tmp_path / "a", *flags])
    (file,) = (tmp_path / "a/checkpoint-1/model").glob("*.safetensors")
    assert {name.split(".")[0] for name in load_file(file)} == {"adapter"}
    again = ["--adapter_path", tmp_path / "a/export/adapter", "--learning_rate", 0, "--max_objects", 2]
    run_main(train, ["--config", config, "--output_dir", tmp_path / "b", *flags, *again])
    ours, theirs = (load_file(tmp_path / name / "export/adapter/adapter_model.safetensors") for name in "ab")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert adapter_module.load_adapter(tmp_path / "b/export/adapter", pipeline.unet).cfg.max_objects == 4
    assert train.Config(adapter_path=str(tmp_path / "b/export/adapter"), max_objects=9).slots() == 4


# ---- what compute_loss gives the model


@pytest.fixture
def asked(train):
    """compute_loss with a model that keeps what it is given: asked(batch, **settings) -> inputs."""

    def ask(batch: dict, **settings) -> dict:
        seen = {}

        def model(mode: str, inputs: dict) -> torch.Tensor:
            seen.update(inputs)
            return torch.ones(())

        flags = {"train_data_dir": "x", "modes": "captioning,retrieval,generation", **settings}
        cfg = parse_recipe(train.Config, [f"--{name}={value}" for name, value in flags.items()])
        empty = {"prompt_embeds": torch.zeros(5, 6), "pooled_prompt_embeds": torch.zeros(6)}
        config = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1100}
        shares = train.noise_schedule(config)
        models = train.Models(model, config, shares, empty, torch.float32, dict.fromkeys(train.MODES, 1.0))
        train.compute_loss(models, batch, cfg)
        return seen

    return ask


def encoded(batch_size: int, mode: str = "generation", positions=None, step: int = 3) -> dict:
    return {
        "latents": torch.full((batch_size, 4, 8, 8), 1.0),
        "latents_flipped": torch.full((batch_size, 4, 8, 8), 2.0),
        "prompt_embeds": torch.ones(batch_size, 5, 6),
        "pooled_prompt_embeds": torch.ones(batch_size, 6),
        "phrases": torch.ones(batch_size, 2, 6),
        "boxes": torch.tensor([[[0.1, 0.2, 0.3, 0.4]] * 2] * batch_size),
        "has_box": torch.tensor([[True, False]] * batch_size),
        "phrase_ids": torch.zeros(batch_size, 2, 3, dtype=torch.long),
        "add_time_ids": torch.ones(batch_size, 6, dtype=torch.long),
        "rows": torch.arange(batch_size),
        "step": step,
        "positions": list(positions or range(batch_size)),
        "mode": mode,
    }


def test_shares_of_what_is_dropped(asked):
    """Catches dropouts that are off, inverted, or drawn with the same number as another."""
    inputs = asked(encoded(2000), caption_dropout=0.3, grounding_dropout=0.1)
    without_caption = inputs["prompt_embeds"][:, 0, 0] == 0
    without_boxes = ~inputs["has_box"].any(1)
    flipped = inputs["boxes"][:, 0, 0] > 0.5
    assert torch.equal(without_caption, inputs["pooled_prompt_embeds"][:, 0] == 0)
    for dropped, share in ((without_caption, 0.3), (without_boxes, 0.1), (flipped, 0.5)):
        assert dropped.float().mean().item() == pytest.approx(share, abs=0.03)
    both = (without_caption & without_boxes).float().mean().item()
    assert both == pytest.approx(0.03, abs=0.015)
    assert not inputs["has_box"][:, 1].any()
    times = inputs["timesteps"].float() / 1100
    assert times.min() < 0.01 and times.max() > 0.99 and times.mean().item() == pytest.approx(0.5, abs=0.02)


def test_flips_move_boxes_and_latents_together(asked, train):
    """Catches a mirrored picture with the boxes of the straight one."""
    inputs = asked(encoded(64))
    flipped = inputs["boxes"][:, 0, 0] > 0.5
    shares = train.noise_schedule({"_class_name": "DDPMScheduler", "num_train_timesteps": 1100})[inputs["timesteps"]]
    shares = shares[:, None, None, None]
    latents = (inputs["noisy_latents"] - (1 - shares).sqrt() * inputs["target"]) / shares.sqrt()
    assert torch.allclose(
        latents[shares[:, 0, 0, 0] > 0.1].mean((1, 2, 3)).round(), 1.0 + flipped[shares.flatten() > 0.1]
    )
    assert 0 < flipped.sum() < 64


def test_draws_belong_to_the_place_in_the_step(asked):
    """Catches noise that depends on the micro-batch: the third sample is the same alone."""
    together, alone = asked(encoded(4)), asked(encoded(1, positions=[2]))
    for name in ("noisy_latents", "timesteps", "boxes", "has_box", "prompt_embeds"):
        assert torch.equal(together[name][2:3], alone[name]), name
    assert not torch.equal(asked(encoded(4, step=4))["noisy_latents"], together["noisy_latents"])


@pytest.mark.parametrize("mode", ["captioning", "retrieval"])
def test_other_modes_see_a_clear_picture_and_no_caption(asked, mode):
    """Catches a caption that tells the answer, boxes dropped where they are asked for, and pictures that are noise."""
    inputs = asked(encoded(50, mode), grounding_dropout=1.0, feature_time=0.1)
    assert not inputs["prompt_embeds"].any() and not inputs["pooled_prompt_embeds"].any()
    assert inputs["has_box"][:, 0].all() and set(inputs["timesteps"].tolist()) == {110}


# ---- sampling and mistakes


@pytest.mark.slow
def test_sample(recipe, straight, adapter_module, pipeline, tmp_path, monkeypatch):
    """Catches a script that draws without the adapter or with other settings than the run's."""
    sample = load_script(recipe / "sample.py")
    objects = [{"phrase": "red circle", "bbox": [0.1, 0.1, 0.5, 0.5]}]
    file = tmp_path / "objects.json"
    file.write_text(json.dumps(objects))
    words = ["sample.py", "--run", straight, "--prompt", "a red circle", "--output", tmp_path / "a.png"]
    monkeypatch.setattr("sys.argv", [str(word) for word in (*words, "--objects", file, "--show_boxes")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sample.main()
    adapter = adapter_module.load_adapter(straight / "export/adapter", pipeline.unet)
    settings = dict(width=96, height=96, num_inference_steps=3, guidance_scale=5.0)
    generator = torch.Generator().manual_seed(0)
    expected = adapter_module.draw(pipeline, adapter, "a red circle", objects, generator=generator, **settings)
    assert Image.open(tmp_path / "a.png").tobytes() == expected.tobytes()
    assert (tmp_path / "a_boxes.png").is_file()
    monkeypatch.setattr("sys.argv", [str(word) for word in (*words, "--objects", "[]")])
    sample.main()
    assert Image.open(tmp_path / "a.png").tobytes() != expected.tobytes()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--resolution", 100], "use 96"),
        (["--adapter_rank", 50], "multiple of 32"),
        (["--grounding_dropout", 2], "share between 0 and 1"),
        (["--box_loss_weight", 0], "above 0"),
        (["--max_objects", 0], "at least 1"),
        (["--validation_layouts", "nowhere.jsonl"], "no layouts in"),
        (["--adapter_path", "nowhere"], "has no config.json"),
    ],
)
def test_refusals(train, config, tmp_path, flags, said):
    """Catches a setting that trains wrongly or fails late."""
    with pytest.raises(ValueError, match=said):
        run_main(train, ["--config", config, "--output_dir", tmp_path, *flags])


def test_optimizers_of_full_tuning_are_refused(train, config, tmp_path, capsys):
    """Catches an adapter of 50 million numbers that trains in bf16 with what is made for billions."""
    with pytest.raises(SystemExit):
        run_main(train, ["--config", config, "--output_dir", tmp_path, "--optimizer", "adafactor"])
    assert "adamw_8bit" in "".join(capsys.readouterr())

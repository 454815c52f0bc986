"""Runs of one process, in this process: exact resume, batch equivalence, what a run leaves, users' mistakes."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from helpers import column, largest_difference, read_rows, run_main, weights
from parity import picture
from PIL import Image
from sampling import assert_same_picture, differ, sample

from common.data.manifest import Record
from common.data.order import choose_buckets
from common.start.config import parse_recipe
from common.step.optimizers import check_optimizer

STEPS = 6
KEPT = ["--max_train_steps", STEPS, "--checkpointing_steps", 3, "--ema_decay", 0.9, "--export_model"]


@pytest.fixture(scope="module")
def straight(train, config, tmp_path_factory) -> Path:
    """Six steps with a checkpoint at the third, an average of the weights, validation at the start and the end, an
    export."""
    out = tmp_path_factory.mktemp("straight")
    run_main(train, ["--config", config, "--output_dir", out, "--validation_steps", STEPS, *KEPT])
    return out


# ---- resume


@pytest.mark.slow
def test_resume_is_exact(train, config, straight, tmp_path):
    """Catches lost optimizer state, a learning rate, an order of samples or noise that begin anew after a stop signal
    in the second step: equal to the last bit."""
    argv = ["--config", config, "--output_dir", tmp_path, *KEPT]
    run_main(train, argv, at_step={2: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"] and len(read_rows(tmp_path)) == 2
    run_main(train, [*argv, "--resume_from_checkpoint", "latest"])
    for name in ("loss", "grad_norm", "learning_rate", "latents_mean"):
        assert column(tmp_path, name) == column(straight, name), name
    assert sorted(column(straight)) == list(range(1, STEPS + 1)) and len(set(column(straight).values())) == STEPS
    ours, theirs = (weights(folder / "export/transformer") for folder in (tmp_path, straight))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---- what a run leaves


def test_metrics_and_validation_pictures(straight, data_folder):
    """Catches files that the documents promise and the run does not write: pictures, the references that they were
    drawn from, and both in the grid."""
    for name in ("config.yaml", "environment.json", "curves.png"):
        assert (straight / name).stat().st_size > 0, name
    keys = """step loss learning_rate grad_norm latents_mean latents_std seconds_per_step samples_per_second mfu
    data_wait peak_memory_gib"""
    assert all(set(keys.split()) <= row.keys() for row in read_rows(straight))
    rows = read_rows(straight / "validation.jsonl")
    assert [row["step"] for row in rows] == [0, STEPS] and all(row["validation_loss"] > 0 for row in rows)
    pictures = {f"00{index}.{suffix}" for index in range(3) for suffix in ("png", "txt")}
    sources = {"000_source_0.png", "001_source_0.png", "001_source_1.png", "002_source_0.png"}
    for step in (0, STEPS):
        folder = straight / f"validation_images/step_{step:06d}"
        assert {path.name for path in folder.iterdir()} == {*pictures, *sources, "grid.png"}
        second = Image.open(folder / "001_source_1.png")
        assert second.tobytes() == Image.open(data_folder / "002.png").tobytes()
        assert Image.open(folder / "001.png").size == (96, 96)
        assert Image.open(folder / "grid.png").width > 3 * 256, "two references and the picture side by side"
    first, last = (Image.open(straight / f"validation_images/step_{step:06d}/000.png") for step in (0, STEPS))
    assert first.tobytes() != last.tobytes()


def test_validation_pictures_depend_on_their_references(train, config, data_folder, straight, tmp_path):
    """Catches validation that leaves the references out, and text alone as the only thing that is ever drawn."""
    images = [data_folder / name for name in ("001_grey.png", "003_grey.png", "003_grey.png")]
    flags = ["--max_train_steps", 1, "--validation_steps", 1]
    argv = ["--config", config, "--output_dir", tmp_path, *flags, "--validation_image_paths", *images]
    run_main(train, argv)
    ours, theirs = (folder / "validation_images/step_000000" for folder in (tmp_path, straight))
    same = [(ours / f"00{n}.png").read_bytes() == (theirs / f"00{n}.png").read_bytes() for n in range(3)]
    assert same == [True, False, False]
    assert not (ours / "001_source_1.png").exists()


def test_export_opens_with_diffusers(straight, model_folder):
    """Catches an export that other tools cannot read, and one that holds the trained weights where averages are
    kept."""
    transformer, report = Flux2Transformer2DModel.from_pretrained(
        straight / "export/transformer", output_loading_info=True
    )
    assert not any(report.values()), report
    exported, trained = weights(straight / "export/transformer"), weights(straight / f"checkpoint-{STEPS}/model")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16} and exported.keys() == trained.keys()
    shadow = iter(torch.load(straight / f"checkpoint-{STEPS}/ema_rank0.pt"))
    assert all(torch.equal(exported[name], next(shadow).bfloat16()) for name, _ in transformer.named_parameters())
    assert any(not torch.equal(exported[name], trained[name].bfloat16()) for name in trained)
    pipeline = Flux2KleinPipeline.from_pretrained(model_folder, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(prompt="a cross", height=64, width=96, num_inference_steps=2, max_sequence_length=32).images[0]
    assert image.size == (96, 64)


def test_sample_draws_from_a_checkpoint(straight, recipe, model_folder, tmp_path):
    """Catches pictures that are not the unmodified pipeline's with the checkpoint's weights and references."""
    reference = picture(3, (80, 64))
    reference.save(tmp_path / "reference.png")
    flags = ["--prompt", "a cross", "--size", "64x64", "--num_inference_steps", 2, "--seed", 5]
    checkpoint = ["--checkpoint", straight / f"checkpoint-{STEPS}"]
    drawn = sample(recipe, tmp_path / "out", *checkpoint, *flags, "--image", tmp_path / "reference.png", "--grid")
    assert drawn.keys() == {"drawn.png", "drawn_grid.png"}
    transformer = Flux2Transformer2DModel.from_pretrained(straight / "export/transformer")
    pipeline = Flux2KleinPipeline.from_pretrained(model_folder, transformer=transformer)
    asked = dict(width=64, height=64, num_inference_steps=2, guidance_scale=4.0)
    asked["max_sequence_length"] = yaml.safe_load((straight / "config.yaml").read_text())["max_sequence_length"]
    image = pipeline([reference], "a cross", generator=torch.Generator().manual_seed(5), **asked).images[0]
    assert_same_picture(drawn["drawn.png"], image)
    without = sample(recipe, tmp_path / "without", *checkpoint, *flags)
    assert differ(without["drawn.png"], drawn["drawn.png"])


# ---- how a step is computed


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 2), (4, 4)])
def test_accumulation_is_the_larger_batch(train, config, straight, tmp_path, batch_size, accumulation):
    """Catches a loss that is summed in place of averaged, a step per micro-batch, noise that depends on the split."""
    flags = ["--max_train_steps", 3, "--train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation]
    run_main(train, ["--config", config, "--output_dir", tmp_path, *flags])
    for name in ("loss", "grad_norm"):
        expected = {step: value for step, value in column(straight, name).items() if step <= 3}
        assert largest_difference(column(tmp_path, name), expected) < 1e-5, name


def test_gradient_checkpointing_and_workers_do_not_change_the_loss(train, config, straight, tmp_path):
    """Catches activation checkpointing or loader workers that change what is computed."""
    flags = ["--max_train_steps", 2, "--gradient_checkpointing", "--dataloader_num_workers", 1]
    run_main(train, ["--config", config, "--output_dir", tmp_path, *flags])
    expected = {step: loss for step, loss in column(straight).items() if step <= 2}
    assert largest_difference(column(tmp_path), expected) < 1e-6


def test_a_batch_of_one_takes_any_references(train, config, data_folder, tmp_path):
    """Catches a batch of one whose accumulation must have references of one size, and rows without any."""
    rows = json.loads((data_folder / "train.json").read_text())[:4]  # without, with, without, with
    rows[3]["source_file_path"].append("000.png")
    for row in rows:
        row["file_path"] = "000.png"  # one bucket
    (tmp_path / "mixed.json").write_text(json.dumps(rows))
    flags = ["--train_data_meta", tmp_path / "mixed.json", "--num_validation_samples", 0, "--max_train_steps", 2]
    flags += ["--train_batch_size", 1, "--gradient_accumulation_steps", 4]
    run_main(train, ["--config", config, "--output_dir", tmp_path / "out", *flags])
    losses = column(tmp_path / "out")
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses.values())


@pytest.mark.slow
def test_sides_are_multiples_of_16(train, settings, config, tmp_path):
    """Catches sides that must be multiples of 32, which 1328 is not, and an odd number of tokens that the recipe or
    the pipeline cannot take."""
    cfg = settings(resolution=1328)
    square = Record(row=0, file_path="", text="", width=1500, height=1500)
    assert choose_buckets([square], cfg.buckets.resolution, cfg.buckets.bucket_multiple) == [(1328, 1328)]
    flags = ["--resolution", 80, "--max_train_steps", 1, "--validation_steps", 1]
    run_main(train, ["--config", config, "--output_dir", tmp_path, *flags])
    assert 0 < column(tmp_path)[1] < 10
    assert Image.open(tmp_path / "validation_images/step_000001/000.png").size == (80, 80)


@pytest.mark.slow
def test_gradient_release_through_the_recipe(train, config, tmp_path):
    """Catches hooks that are set after the model is wrapped or keep the first learning rate, and a step made twice."""
    flags = ["--max_train_steps", 3, "--optimizer", "adafactor", "--max_grad_norm", 0, "--lr_warmup_steps", 2]
    run_main(train, ["--config", config, "--output_dir", tmp_path / "plain", *flags])
    run_main(train, ["--config", config, "--output_dir", tmp_path / "release", *flags, "--gradient_release"])
    for name in ("loss", "grad_norm"):
        assert largest_difference(column(tmp_path / "release", name), column(tmp_path / "plain", name)) < 1e-5


# ---- users' mistakes


@pytest.fixture(scope="module")
def distilled(model_folder, tmp_path_factory) -> Path:
    """The same model, whose model_index.json says that it is step-distilled."""
    folder = tmp_path_factory.mktemp("distilled") / "model"
    folder.mkdir()
    for part in model_folder.iterdir():
        (folder / part.name).symlink_to(part)
    index = json.loads((model_folder / "model_index.json").read_text())
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    return folder


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--pretrained_model_name_or_path", "{distilled}"], "is step-distilled: .*--allow_distilled"),
        (["--pretrained_model_name_or_path", "{tmp}"], "is no model folder: it lacks transformer, vae"),
        (["--transformer_path", "{tmp}"], "transformer_path .* has no config.json; give a run.s export/transformer"),
        (["--resolution", "100"], "resolution must be a positive multiple of 16.*got 100; use 96"),
        (["--bucket_multiple", "24"], "bucket_multiple must be a multiple of 16, got 24; use 16 or 32"),
        (["--max_sequence_length", "0"], "max_sequence_length must be at least 1, got 0"),
        (["--train_batch_size", "0"], "train_batch_size must be at least 1, got 0"),
        (["--caption_dropout", "1.5"], "caption_dropout is a share between 0 and 1, got 1.5"),
        (["--num_inference_steps", "1"], "num_inference_steps must be at least 2, got 1"),
        (["--gradient_release"], "gradient_release is not possible: optimizer adamw.*; max_grad_norm is 1.0"),
        (["--validation_image_paths", "{tmp}/a.png"], "validation_image_paths has 1 entries, expected one.*3 valid"),
        (["--validation_image_paths", *["{tmp}/a.png"] * 3], "validation_image_paths names .*a.png, which is not"),
        (["--validation_image_paths", *["{tmp}/small.png"] * 3], "small.png is 40 x 40; the pipeline takes sides of"),
    ],
)
def test_mistakes_end_in_one_sentence(train, config, distilled, tmp_path, capfd, flags, sentence):
    """Catches a mistake of the user that ends in a traceback, or in a sentence that does not say what was got and
    expected."""
    Image.new("RGB", (40, 40)).save(tmp_path / "small.png")
    flags = [flag.format(tmp=tmp_path, distilled=distilled) for flag in flags]
    with pytest.raises(SystemExit) as ended, train.plan.explained_errors():
        run_main(train, ["--config", config, "--output_dir", tmp_path / "out", *flags])
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1 and "Traceback" not in said, said
    assert re.search(sentence, lines[0]), lines[0]


def test_a_distilled_model_trains_when_insisted(train, config, distilled, straight, tmp_path):
    """Catches an override that is not one, or that changes what is computed."""
    flags = ["--pretrained_model_name_or_path", distilled, "--allow_distilled", "--max_train_steps", 1]
    run_main(train, ["--config", config, "--output_dir", tmp_path, *flags])
    assert column(tmp_path) == {1: column(straight)[1]}


def test_fp16_is_refused(train, capsys):
    """Catches fp16 offered to a model whose activations overflow it; and a refusal that does not say what there is."""
    with pytest.raises(SystemExit) as ended:
        parse_recipe(train.Config, ["--train_data_dir", "unused", "--mixed_precision", "fp16"])
    captured = capsys.readouterr()
    said = " ".join(re.findall(r"[^\s│─╭╮╰╯]+", captured.out + captured.err))
    assert ended.value.code == 2 and "'fp16' for argument '--mixed_precision'. Expected one of ('bf16', 'no')" in said


def test_train_data_must_be_given(train):
    """Catches a default that trains on nothing."""
    with pytest.raises(ValueError, match="train_data_dir is not set; pass --train_data_dir FOLDER"):
        parse_recipe(train.Config, [])


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_8bit_adam_is_refused_where_state_is_sharded(settings, strategy, optimizer):
    """Catches 8-bit moments that are cut at other places than their blocks."""
    cfg = settings(optimizer=optimizer)
    with pytest.raises(ValueError, match=f"{optimizer} cannot run under {strategy}: .*blocks.*do not follow the sha"):
        check_optimizer(cfg, strategy, offload=False)
    for strategy_without_shards in ("single", "ddp"):
        check_optimizer(cfg, strategy_without_shards, offload=False)

"""Runs of one process, in this process: exact resume, batch equivalence, what a run leaves, parts that train, LoRA,
users' mistakes."""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPlusPipeline, QwenImageTransformer2DModel
from helpers import assert_equal_weights, column, largest_difference, read_rows, run_main, weights
from parity import picture
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from sampling import assert_same_picture, differ, sample

from common.export import export

STEPS = 6
KEPT = ["--max_train_steps", STEPS, "--checkpointing_steps", 3, "--ema_decay", 0.9, "--export_model"]
LORA = ["--lora_rank", 4, "--lora_alpha", 32, "--learning_rate", 0.01]

pytestmark = pytest.mark.slow  # encoding a source costs a second or two


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and theirs
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def straight(train, config, tmp_path_factory) -> Path:
    """Six steps with a checkpoint at the third, an average of the weights, validation at the start and the end, an
    export."""
    out = tmp_path_factory.mktemp("straight")
    run_main(train, ["--config", config, "--output_dir", out, "--validation_steps", STEPS, *KEPT])
    return out


@pytest.fixture(scope="module")
def lora(train, config, tmp_path_factory) -> Path:
    """Six steps of adapters, with the same validations."""
    out = tmp_path_factory.mktemp("lora")
    flags = ["--max_train_steps", STEPS, "--checkpointing_steps", 3, "--validation_steps", STEPS, "--export_model"]
    run_main(train, ["--config", config, "--output_dir", out, *flags, *LORA])
    return out


# ---- resume


@pytest.mark.parametrize(
    "more",
    [
        ["--image_sample_size", 640, "--random_hw_adapt", "--caption_dropout", 0.4, "--uniform_sampling"],
        LORA,
        ["--trainable_modules", "attn"],
    ],
    ids=["random_hw_adapt", "lora", "attn"],
)
def test_resume_is_exact(train, config, tmp_path, more):
    """Catches lost optimizer state, a learning rate, an order of samples, sizes, dropped captions or noise that begin
    anew after a stop signal in the second step: equal to the last bit."""
    argv = ["--config", config, *KEPT, *more]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run_main(train, [*argv, "--output_dir", straight])
    stop = {2: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    run_main(train, [*argv, "--output_dir", resumed], at_step=stop)
    assert [path.name for path in resumed.glob("checkpoint-*")] == ["checkpoint-2"] and len(read_rows(resumed)) == 2
    run_main(train, [*argv, "--output_dir", resumed, "--resume_from_checkpoint", "latest"])
    for name in ("loss", "grad_norm", "learning_rate", "latents_mean"):
        assert column(resumed, name) == column(straight, name), name
    assert sorted(column(straight)) == list(range(1, STEPS + 1)) and len(set(column(straight).values())) == STEPS
    for part in ("transformer", "lora"):
        if (straight / "export" / part).is_dir():
            assert_equal(weights(resumed / "export" / part), weights(straight / "export" / part))


# ---- what a run leaves


def test_metrics_and_validation_pictures(straight, data_folder):
    """Catches files that the documents promise and the run does not write, and a source or target beside the
    prediction that is another row's."""
    for name in ("config.yaml", "environment.json", "curves.png"):
        assert (straight / name).stat().st_size > 0, name
    keys = """step loss learning_rate grad_norm latents_mean latents_std seconds_per_step samples_per_second mfu
    data_wait peak_memory_gib"""
    assert all(set(keys.split()) <= row.keys() for row in read_rows(straight))
    rows = read_rows(straight / "validation.jsonl")
    assert [row["step"] for row in rows] == [0, STEPS] and all(row["validation_loss"] > 0 for row in rows)
    two, one = "000", "001"  # the held-out rows: one with two sources, one with one
    names = {f"{n}{end}" for n in (two, one) for end in (".png", ".txt", "_target.png", "_source_0.png")}
    for step in (0, STEPS):
        folder = straight / f"validation_images/step_{step:06d}"
        assert {path.name for path in folder.iterdir()} == {*names, "000_source_1.png", "grid.png"}
        for number, size in ((two, (384, 128)), (one, (256, 256))):
            row = row_shown(data_folder, straight, number)
            assert Image.open(folder / f"{number}.png").size == size
            assert_looks_like(folder / f"{number}_target.png", data_folder / row["file_path"])
            for which, source in enumerate(row["source_file_path"]):
                assert_looks_like(folder / f"{number}_source_{which}.png", data_folder / source)
        assert Image.open(folder / "000_source_1.png").size == (2048, 512)
        assert Image.open(folder / "grid.png").width >= 4 * 256, "two sources, target, prediction side by side"
    first, last = (Image.open(straight / f"validation_images/step_{step:06d}/000.png") for step in (0, STEPS))
    assert first.tobytes() != last.tobytes()


def assert_looks_like(file: Path, expected: Path) -> None:
    """The same picture, at whatever size."""
    a, b = (np.asarray(Image.open(path).convert("RGB").resize((16, 16)), np.float32) for path in (file, expected))
    assert np.abs(a - b).mean() < 12, (file.name, expected.name)


def row_shown(data_folder: Path, run: Path, number: str) -> dict:
    """The row of the data that a run's validation shows under a number."""
    text = (run / f"validation_images/step_{STEPS:06d}/{number}.txt").read_text().strip()
    (row,) = [row for row in json.loads((data_folder / "train.json").read_text()) if row["text"] == text]
    return row


def edited(pipeline: QwenImageEditPlusPipeline, data_folder: Path, run: Path, number: str) -> np.ndarray:
    """What the unmodified pipeline makes of the row that the run's last validation shows under a number."""
    pipeline.set_progress_bar_config(disable=True)
    row = row_shown(data_folder, run, number)
    sources = [Image.open(data_folder / path) for path in row["source_file_path"]]
    width, height = Image.open(run / f"validation_images/step_{STEPS:06d}/{number}.png").size
    image = pipeline(
        image=sources, prompt=row["text"], negative_prompt=" ", true_cfg_scale=4.0, width=width, height=height,
        num_inference_steps=2, generator=torch.Generator().manual_seed(1 + int(number)),
    ).images[0]  # fmt: skip
    return np.asarray(image, np.float32)


def shown(run: Path, number: str, step: int = STEPS) -> np.ndarray:
    return np.asarray(Image.open(run / f"validation_images/step_{step:06d}/{number}.png"), np.float32)


@pytest.mark.parametrize("number", ["000", "001"])
def test_export_draws_what_validation_showed(straight, model_folder, data_folder, number):
    """Catches an export that other tools cannot read, one that holds other weights than validation had (averages where
    they are kept), and validation by other means than the unmodified pipeline's."""
    transformer, report = QwenImageTransformer2DModel.from_pretrained(
        straight / "export/transformer", output_loading_info=True
    )
    assert not any(report.values()), report
    exported, trained = weights(straight / "export/transformer"), weights(straight / f"checkpoint-{STEPS}/model")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16} and exported.keys() == trained.keys()
    shadow = torch.load(straight / f"checkpoint-{STEPS}/ema_rank0.pt")
    for (name, parameter), averaged in zip(transformer.named_parameters(), shadow, strict=True):
        assert torch.equal(exported[name], averaged.bfloat16())
        parameter.data = averaged  # without the rounding, to compare pictures
    assert any(not torch.equal(exported[name], trained[name].bfloat16()) for name in trained)
    pipeline = QwenImageEditPlusPipeline.from_pretrained(model_folder, transformer=transformer)
    distance = np.abs(edited(pipeline, data_folder, straight, number) - shown(straight, number)).mean()
    moved = np.abs(shown(straight, number) - shown(straight, number, step=0)).mean()
    print(f"moved {moved:.2f}, export to validation {distance:.2f}")
    assert moved > 2 and distance < 0.1


# ---- how a step is computed


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (2, 4)])
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


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_edit_mode(train, config, model_folder, tmp_path, zero_cond_t, capfd):
    """Catches a mode that cannot train, validate and export, a checkpoint of the other pipeline that is taken without
    a word, and a transformer's config that is lost in the export."""
    model = tmp_path / "model"
    model.mkdir()
    for part in model_folder.iterdir():
        (model / part.name).symlink_to(part)
    settings = json.loads((model_folder / "transformer/config.json").read_text())
    (model / "transformer").unlink()
    (model / "transformer").mkdir()
    for file in (model_folder / "transformer").glob("*.safetensors"):
        (model / "transformer" / file.name).symlink_to(file)
    (model / "transformer/config.json").write_text(json.dumps({**settings, "zero_cond_t": zero_cond_t}))
    flags = ["--train_mode", "qwen_image_edit", "--train_data_meta", "one_source.json", "--max_train_steps", 2]
    flags += ["--validation_steps", 2, "--export_model", "--pretrained_model_name_or_path", model]
    run_main(train, ["--config", config, "--output_dir", tmp_path / "out", *flags])
    said = capfd.readouterr().out
    assert (
        "warning: the checkpoint is QwenImageEditPlusPipeline's, and --train_mode qwen_image_edit trains for" in said
    )
    assert len(read_rows(tmp_path / "out")) == 2
    assert (tmp_path / "out/validation_images/step_000002/000_source_0.png").is_file()
    exported = json.loads((tmp_path / "out/export/transformer/config.json").read_text())
    assert exported["zero_cond_t"] is zero_cond_t


# ---- parts that train


def changed(run: Path, model_folder: Path) -> set[str]:
    """Names of the exported weights that are not the base's."""
    base, exported = weights(model_folder / "transformer"), weights(run / "export/transformer")
    assert base.keys() == exported.keys()
    return {name for name in base if not torch.equal(base[name].bfloat16(), exported[name])}


def test_trainable_modules(train, config, model_folder, tmp_path, capfd):
    """Catches a pattern that trains more or less than it names, weights that decay although they are frozen, and a
    run that does not say what trains."""
    flags = ["--max_train_steps", 2, "--learning_rate", 0.01, "--export_model", "--trainable_modules", "attn.to_"]
    run_main(train, ["--config", config, "--output_dir", tmp_path, *flags, "img_in"])
    names = weights(model_folder / "transformer").keys()
    expected = {name for name in names if "attn.to_" in name or "img_in" in name}
    # the last block's text branch reaches nothing, and a key's bias moves every score alike: their gradient is zero
    silent = {name for name in expected if "to_add_out" in name or name.endswith("to_k.bias")}
    got = changed(tmp_path, model_folder)
    assert got <= expected and expected - silent <= got and len(got) > 10
    said = capfd.readouterr().out
    count = sum(weights(model_folder / "transformer")[name].numel() for name in expected)
    assert f"trains {count / 1e6:.6g}M parameters" in said and f"{len(expected)} of {len(names)} tensors" in said


def test_everything_trains_by_default(straight, model_folder):
    """Catches "." that matches no more than names with a dot at some place, or a part that is left frozen."""
    base, got = weights(model_folder / "transformer"), changed(straight, model_folder)
    assert {name.split(".")[0] for name in got} == {name.split(".")[0] for name in base}
    assert len(got) > 0.85 * len(base)


# ---- LoRA


def test_lora_begins_as_the_base_and_only_adapters_train(lora, straight, model_folder):
    """Catches adapters that change the model before the first step, a base that trains or is kept in the checkpoint,
    and adapters that do not train."""
    ours, base = (read_rows(run / "validation.jsonl")[0]["validation_loss"] for run in (lora, straight))
    assert ours == pytest.approx(base, rel=1e-6)
    for number in ("000", "001"):
        assert np.abs(shown(lora, number, 0) - shown(straight, number, 0)).max() <= 1
    first, last = (weights(lora / f"checkpoint-{step}/model") for step in (3, STEPS))
    assert first.keys() == last.keys() and all(".lora_" in name for name in last), "adapters only"
    assert len(last) == 2 * 8 * 2, "A and B of eight layers in two blocks"
    silent = [name for name in last if torch.equal(first[name], last[name])]
    assert all("to_add_out" in name or "add_q_proj" in name for name in silent), silent


@pytest.mark.parametrize("number", ["000", "001"])
def test_lora_file_gives_the_trained_model(lora, model_folder, data_folder, number):
    """Catches names that diffusers does not know, a lost alpha (the scale would be another), averaged or untrained
    adapters: the unmodified pipeline with the file draws what the run's last validation showed."""
    (file,) = (lora / "export/lora").glob("*.safetensors")
    assert file.name == "pytorch_lora_weights.safetensors"
    saved, trained = load_file(file), weights(lora / f"checkpoint-{STEPS}/model")
    expected = {f"transformer.{name.replace('.default', '')}": tensor.bfloat16() for name, tensor in trained.items()}
    assert_equal(saved, expected)
    pipeline = QwenImageEditPlusPipeline.from_pretrained(model_folder)
    pipeline.load_lora_weights(lora / "export/lora")
    state = pipeline.transformer.state_dict()
    for name, tensor in trained.items():
        place = state[name.replace(".default", ".default_0")]
        assert torch.equal(place.bfloat16(), tensor.bfloat16())
        place.copy_(tensor)  # without the rounding, to compare pictures
    distance = np.abs(edited(pipeline, data_folder, lora, number) - shown(lora, number)).mean()
    moved = np.abs(shown(lora, number) - shown(lora, number, step=0)).mean()
    print(f"moved {moved:.2f}, file to validation {distance:.2f}")
    assert moved > 2 and distance < 0.1
    assert not (lora / "export/transformer").exists()


def test_sample_draws_from_a_checkpoint(straight, lora, recipe, model_folder, tmp_path):
    """Catches edits that are not the unmodified pipeline's with the checkpoint's weights, or with its adapters: a
    picture that the instruction was not encoded with, a base under the name of the trained."""
    sources = [picture(3, (96, 96)), picture(4, (128, 64))]
    for number, source in enumerate(sources):
        source.save(tmp_path / f"{number}.png")
    flags = ["--prompt", "make it red", "--image", tmp_path / "0.png", tmp_path / "1.png", "--size", "128x128"]
    flags += ["--num_inference_steps", 2, "--seed", 5]
    asked = dict(width=128, height=128, num_inference_steps=2, true_cfg_scale=4.0, negative_prompt=" ")
    drawn = {}
    for name, run in (("straight", straight), ("lora", lora)):
        out = sample(recipe, tmp_path / name, "--checkpoint", run / f"checkpoint-{STEPS}", *flags, "--compare")
        pipeline = QwenImageEditPlusPipeline.from_pretrained(model_folder)
        if name == "lora":
            pipeline.load_lora_weights(run / "export/lora")
        else:
            trained = QwenImageTransformer2DModel.from_pretrained(run / "export/transformer")
            pipeline.register_modules(transformer=trained)
        image = pipeline(sources, "make it red", generator=torch.Generator().manual_seed(5), **asked).images[0]
        assert_same_picture(out["drawn.png"], image)
        assert differ(out["drawn.png"], out["drawn_before.png"])
        drawn[name] = out
    assert_same_picture(drawn["lora"]["drawn_before.png"], drawn["straight"]["drawn_before.png"])


def test_a_lora_checkpoint_is_the_runs_export(lora, tmp_path):
    """Catches adapters of a checkpoint that get other names, values or another scale than the run's own file."""
    export(lora / f"checkpoint-{STEPS}", tmp_path)
    assert_equal_weights(weights(tmp_path), weights(lora / "export/lora"))
    described = []
    for folder in (tmp_path, lora / "export/lora"):
        with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as opened:
            described.append(json.loads(opened.metadata()["lora_adapter_metadata"]))
    for name in ("r", "lora_alpha", "use_rslora"):
        assert described[0][f"transformer.{name}"] == described[1][f"transformer.{name}"], name


# ---- users' mistakes


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--trainable_modules", "atn"], "trainable_modules: no parameter's name contains 'atn'; expected.*attn"),
        (["--trainable_modules", "attn", "nothing"], "no parameter's name contains 'nothing'"),
        (["--lora_rank", "4", "--trainable_modules", "attn"], "lora_rank 4 trains adapters alone.*drop one of them"),
        (["--train_mode", "qwen_image_edit"], r"(?s)train\.json row 1: .*2 sources, and qwen_image_edit takes one"),
        (["--image_sample_size", "192"], "image_sample_size is 192; this model needs a multiple of 128"),
        (["--pretrained_model_name_or_path", "{tmp}"], "is no model folder: it lacks transformer, vae"),
        (["--transformer_path", "{tmp}"], "transformer_path .* has no config.json; give a run.s export/transformer"),
        (["--gradient_release"], "gradient_release is not possible: optimizer adamw.*; max_grad_norm is 1.0"),
        (["--validation_prompts", "a"], "validation_image_paths has 0 entries, expected one.* 1 validation prompts"),
        (
            ["--validation_prompts", "a", "--validation_image_paths", "{tmp}/absent.png"],
            "validation_image_paths names .*absent.png, which is not there",
        ),
        (
            ["--validation_prompts", "a", "--validation_image_paths", "{tmp}/long.png"],
            "validation_image_paths: .*long.png is 170 x 10; expected an aspect of at most 16 : 1",
        ),
        (
            ["--validation_prompts", "a", "--validation_image_paths", ""],
            "validation prompt 'a': no source_file_path.*name it in validation_image_paths",
        ),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_sentence(train, config, tmp_path, capfd, flags, sentence):
    """Catches a mistake of the user that ends in a traceback, or in a sentence that does not say what was got and
    expected."""
    Image.new("RGB", (170, 10)).save(tmp_path / "long.png")
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    with pytest.raises(SystemExit) as ended, train.plan.explained_errors():
        run_main(train, ["--config", config, "--output_dir", tmp_path / "out", "--validation_steps", 2, *flags])
    said = capfd.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said, said
    assert re.search(sentence, said[said.index("error: ") :]), said


def test_validation_prompts_and_their_images(train, config, data_folder, tmp_path):
    """Catches a prompt drawn with another prompt's images, or with one image of several."""
    images = [f"{data_folder}/square_0.png,{data_folder}/flat_1.png", data_folder / "square_2.png"]
    flags = ["--max_train_steps", 1, "--validation_steps", 1, "--validation_prompts", "make it red", "make it blue"]
    argv = ["--config", config, "--output_dir", tmp_path, *flags, "--validation_image_paths", *images]
    run_main(train, argv)
    folder = tmp_path / "validation_images/step_000001"
    names = {"000_source_0.png": "square_0", "000_source_1.png": "flat_1", "001_source_0.png": "square_2"}
    for name, source in names.items():
        assert_looks_like(folder / name, data_folder / f"{source}.png")
    assert {path.name for path in folder.glob("*_*.png")} == set(names), "no target is known"
    assert (folder / "001.txt").read_text() == "make it blue\n"
    assert Image.open(folder / "000.png").size[0] > Image.open(folder / "000.png").size[1], "as the last source"

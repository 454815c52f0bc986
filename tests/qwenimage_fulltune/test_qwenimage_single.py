"""Runs of one process, in this process: exact resume, a stop signal, batch equivalence, users' mistakes."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from helpers import assert_equal_weights, column, largest_difference, read_rows, run_command, run_main, weights
from sampling import assert_same_picture, differ, sample

from common.export import export
from common.record import integrity
from common.record.saved_weights import AVERAGED_NAMES
from common.start import plan
from common.start.config import parse_recipe
from common.start.folders import part_config
from common.step.steps import seed_step

# ---- what is drawn, averaged and held out


def test_draws_from_the_posterior_have_noise_of_their_own(train, recipe, monkeypatch):
    """Catches a draw of --cache_moments that reuses the noise that is added: a model could read it off its input."""
    seen = {}

    def sample_errors(models, batch, latents, noise, sigma):
        seen.update(latents=latents, noise=noise)
        return torch.zeros(len(latents))

    monkeypatch.setattr(train, "sample_errors", sample_errors)
    config, scheduler_config = (part_config(recipe / "full_size" / part) for part in ("transformer", "scheduler"))
    models = SimpleNamespace(empty_prompt_embeds=torch.zeros(2, 4), config=config, scheduler_config=scheduler_config)
    latents = torch.zeros(2, 16, 1, 8, 8)
    batch = {"step": 0, "positions": [0, 1], "prompt_embeds": [torch.zeros(2, 4)] * 2}
    train.compute_loss(models, {**batch, "latents": latents, "posterior_std": 2 + latents}, train.Config())
    drawn, noise = seen["latents"].flatten() / 2, seen["noise"].flatten()  # 2,048 numbers each
    assert abs(drawn.std() - 1) < 0.1 and abs(torch.corrcoef(torch.stack([drawn, noise]))[0, 1]) < 0.1


def test_processes_and_micro_steps_drop_out_each_in_its_own_way():
    """Catches a seed of dropout that all processes, or all micro-batches, share, and one that a resume changes."""
    drawn = {}
    for seed, micro_step, rank in ((1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)):
        seed_step(seed, micro_step, rank)
        drawn[seed, micro_step, rank] = tuple(torch.rand(8).tolist())
        seed_step(seed, micro_step, rank)
        assert tuple(torch.rand(8).tolist()) == drawn[seed, micro_step, rank]
    assert len(set(drawn.values())) == 4


@pytest.fixture(scope="module")
def averaged(train, config, tmp_path_factory) -> tuple[Path, list]:
    """Three steps with averages and a checkpoint at each, and the data that the run validated with."""
    out, data = tmp_path_factory.mktemp("averaged"), []
    flags = ["--max_train_steps", 3, "--checkpointing_steps", 1, "--checkpoints_total_limit", 0, "--ema_decay", 0.5]
    with mock.patch.object(train, "validate", lambda run, cfg, models, seen, step: data.append(seen)):
        run_main(train, ["--config", config, "--output_dir", out, "--validation_steps", 3, *flags])
    return out, data


def test_averages_follow_the_weights_of_their_step(averaged, model_folder):
    """Catches averaged weights that are a step early or late, or warm up otherwise: they are computed again from the
    checkpoints' weights."""
    out, _ = averaged
    average = {name: tensor.float() for name, tensor in weights(model_folder / "transformer").items()}
    for step in (1, 2, 3):
        folder = out / f"checkpoint-{step}"
        decay, trained = min(0.5, (1 + step) / (10 + step)), weights(folder / "model")
        average = {name: torch.lerp(tensor, trained[name].float(), 1 - decay) for name, tensor in average.items()}
        saved = dict(zip(json.loads((folder / AVERAGED_NAMES).read_text()), torch.load(folder / "ema_rank0.pt")))
        assert saved.keys() == average.keys()
        for name, tensor in saved.items():
            torch.testing.assert_close(tensor, average[name], atol=1e-7, rtol=1e-6, msg=lambda m, name=name: name + m)


def test_held_out_rows_are_not_trained_on(averaged):
    """Catches rows that are both: a held-out loss of what was learned by heart."""
    _, (data, *_) = averaged
    trained_on = [data.dataset.cache[key]["latents"] for key in data.dataset.keys]
    assert len(trained_on) == len(data) and data.held_out
    for row in data.held_out:
        same_shape = [latents for latents in trained_on if latents.shape == row["latents"].shape]
        assert not any(torch.equal(latents, row["latents"]) for latents in same_shape)


# ---- resume and stop


@pytest.fixture(scope="module")
def straight(train, config, tmp_path_factory) -> Path:
    """Eight steps with a checkpoint at the fourth, an average of the weights, validation at the start and the end,
    exports at every fourth step and at the end."""
    out = tmp_path_factory.mktemp("straight")
    flags = ["--max_train_steps", 8, "--checkpointing_steps", 4, "--ema_decay", 0.9, "--export_model"]
    flags += ["--export_steps", 4]
    run_main(train, ["--config", config, "--output_dir", out, "--validation_steps", 8, *flags])
    return out


@pytest.fixture(scope="module")
def stopped(train, config, tmp_path_factory) -> Path:
    """The same run, which gets SIGTERM in its third step; a folder as a killed save leaves it is put beside its
    checkpoint."""
    out = tmp_path_factory.mktemp("stopped")
    flags = ["--max_train_steps", 8, "--ema_decay", 0.9, "--export_model", "--checkpointing_steps", 4]
    argv = ["--config", config, "--output_dir", out, *flags]
    run_main(train, argv, at_step={3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    (out / "checkpoint-7.partial").mkdir()
    (out / "checkpoint-7.partial/trainer_state.json").write_text("{}")
    return out


@pytest.fixture(scope="module")
def resumed(train, config, stopped) -> Path:
    before = [path.name for path in stopped.glob("checkpoint-*")], len(read_rows(stopped))
    flags = ["--max_train_steps", 8, "--ema_decay", 0.9, "--export_model", "--checkpointing_steps", 4]
    run_main(train, ["--config", config, "--output_dir", stopped, "--resume_from_checkpoint", "latest", *flags])
    (stopped / "before.json").write_text(json.dumps(before))
    return stopped


def test_sigterm_finishes_the_step_and_saves(resumed):
    """Catches a stop signal that loses the run, or is forgotten until the next checkpoint."""
    names, rows = json.loads((resumed / "before.json").read_text())
    assert sorted(names) == ["checkpoint-3", "checkpoint-7.partial"] and rows == 3


def test_resume_is_exact(straight, resumed):
    """Catches lost optimizer state, a learning rate, an order of samples or noise that begin anew: equal to the last
    bit."""
    for name in ("loss", "grad_norm", "learning_rate", "latents_mean"):
        assert column(resumed, name) == column(straight, name), name
    assert sorted(column(straight)) == list(range(1, 9)) and len(set(column(straight).values())) == 8
    ours, theirs = (weights(folder / "export/transformer") for folder in (resumed, straight))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_half_a_checkpoint_is_ignored_and_removed(resumed):
    """Catches a "latest" that is the folder of a killed save (it would have gone on from step 7), and such folders
    that pile up."""
    names = {path.name for path in resumed.glob("checkpoint-*")}
    assert names == {"checkpoint-3", "checkpoint-4", "checkpoint-8"}


def test_checkpoint_says_where_it_stands(straight):
    """Catches a checkpoint without the sampler's place, its step or the run's settings."""
    state = json.loads((straight / "checkpoint-4/trainer_state.json").read_text())
    assert state["step"] == 4 and state["segments"] == [[16, 4]] and state["config"]["seed"] == 42
    assert not list(straight.glob("*.partial"))


def test_a_checkpoint_of_another_strategy_is_refused(train, config, straight, tmp_path):
    """Catches a resume that reads half of another strategy's state: it says which launch file the checkpoint needs."""
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(straight / "checkpoint-4", folder)
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps({**state, "launch": "zero3_nvme", "strategy": "zero3"}))
    integrity.seal(folder)
    with pytest.raises(ValueError, match=r"saved by LAUNCH=zero3_nvme .* is single .* lies on a disk of its own"):
        run_main(train, ["--config", config, "--output_dir", tmp_path, "--resume_from_checkpoint", folder])


@pytest.mark.slow
def test_changed_data_and_settings_are_noticed_on_resume(train, config, straight, tmp_path, capfd):
    """Catches a resume on other data that says nothing, since the order of samples is then no continuation."""
    flags = ["--resume_from_checkpoint", straight / "checkpoint-4", "--max_train_steps", 5, "--learning_rate", 1e-4]
    run_main(train, ["--config", config, "--output_dir", tmp_path / "same", *flags])
    said = capfd.readouterr().out
    assert "learning_rate 0.001 -> 0.0001" in said and "data changed" not in said
    run_main(train, ["--config", config, "--output_dir", tmp_path / "other", *flags, "--num_validation_samples", 1])
    assert "data changed" in capfd.readouterr().out


def test_what_a_run_leaves(straight, config):
    """Catches files that the documents promise and the run does not write, and metrics rows without one of their
    keys."""
    for name in ("config.yaml", "environment.json", "curves.png", "validation.jsonl"):
        assert (straight / name).stat().st_size > 0, name
    keys = (
        "step loss learning_rate grad_norm latents_mean latents_std seconds_per_step samples_per_second mfu data_wait"
    )
    for row in read_rows(straight):
        assert {*keys.split(), "peak_memory_gib"} <= row.keys() and all(row[key] is not None for key in row)
    environment = json.loads((straight / "environment.json").read_text())
    assert {"versions", "commit", "launch", "device", "command"} <= environment.keys()
    rows = read_rows(straight / "validation.jsonl")
    assert [row["step"] for row in rows] == [0, 8] and all(row["validation_loss"] > 0 for row in rows)
    for step in (0, 8):
        names = {path.name for path in (straight / f"validation_images/step_{step:06d}").iterdir()}
        assert names >= {"000.png", "001.png", "002.png", "grid.png", "000.txt", "001.txt", "002.txt"}


def test_saved_config_gives_the_same_run(train, straight, tmp_path):
    """Catches settings that config.yaml does not hold: a run from it alone has the same losses."""
    flags = ["--output_dir", tmp_path, "--max_train_steps", 2, "--validation_steps", 0, "--no-export_model"]
    run_main(train, ["--config", straight / "config.yaml", *flags])
    assert column(tmp_path) == {step: loss for step, loss in column(straight).items() if step <= 2}


def test_export_opens_with_diffusers(straight, model_folder):
    """Catches an export that other tools cannot read, and one that holds the trained weights where averages are
    kept."""
    transformer, report = QwenImageTransformer2DModel.from_pretrained(
        straight / "export/transformer", output_loading_info=True
    )
    assert not any(report.values()), report
    exported = weights(straight / "export/transformer")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    trained = weights(straight / "checkpoint-8/model")
    assert exported.keys() == trained.keys()
    shadow = iter(torch.load(straight / "checkpoint-8/ema_rank0.pt"))
    assert all(torch.equal(exported[name], next(shadow).bfloat16()) for name, _ in transformer.named_parameters())
    assert any(not torch.equal(exported[name], trained[name].bfloat16()) for name in trained)
    pipeline = QwenImagePipeline.from_pretrained(model_folder, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cross", height=64, width=96, num_inference_steps=2, true_cfg_scale=1.0).images[0]
    assert image.size == (96, 64)


def test_exports_during_training(straight, tmp_path):
    """Catches an export of another step's weights, or without the average; the checkpoint of that step gives the
    same."""
    assert {path.name for path in (straight / "export").iterdir()} == {"step_000004", "step_000008", "transformer"}
    for step in (4, 8):
        export(straight / f"checkpoint-{step}", tmp_path / str(step))
        assert_equal_weights(weights(straight / f"export/step_{step:06d}/transformer"), weights(tmp_path / str(step)))
        assert f"step {step}" in (straight / f"export/step_{step:06d}/transformer/README.md").read_text()
    assert_equal_weights(weights(straight / "export/transformer"), weights(tmp_path / "8"))
    assert any(not torch.equal(t, weights(tmp_path / "4")[name]) for name, t in weights(tmp_path / "8").items())


def test_sample_draws_from_a_checkpoint(straight, recipe, model_folder, tmp_path):
    """Catches pictures that are not the unmodified pipeline's with the checkpoint's weights: another prompt, size,
    seed, step or base; a comparison whose sides are mixed up; a prompt file that is drawn as a prompt."""
    (tmp_path / "prompts.txt").write_text("a cross\na red circle\n")
    flags = ["--prompt", tmp_path / "prompts.txt", "--size", "64x64", "96x64", "--num_inference_steps", 2]
    drawn = sample(
        recipe, tmp_path / "out", "--checkpoint", straight / "checkpoint-4", *flags, "--seed", 3, 7, "--compare"
    )
    numbers = range(1, 9)  # 2 prompts, 2 sizes, 2 seeds
    names = {f"drawn-{number}{kind}.png" for number in numbers for kind in ("", "_before")}
    assert drawn.keys() == names | {"drawn_grid.png"}
    assert sorted(path.name for path in straight.iterdir() if path.name.startswith(".")) == []
    base = QwenImagePipeline.from_pretrained(model_folder)
    after = QwenImageTransformer2DModel.from_pretrained(straight / "export/step_000004/transformer")
    trained = QwenImagePipeline.from_pretrained(model_folder, transformer=after)
    for pipeline, name in ((base, "drawn-8_before.png"), (trained, "drawn-8.png")):
        pipeline.set_progress_bar_config(disable=True)
        asked = dict(negative_prompt="", true_cfg_scale=4.0, width=96, height=64, num_inference_steps=2)
        image = pipeline("a red circle", generator=torch.Generator().manual_seed(8), **asked).images[0]
        assert_same_picture(drawn[name], image)
    assert differ(drawn["drawn-8_before.png"], drawn["drawn-8.png"]) and differ(
        drawn["drawn-8.png"], drawn["drawn-7.png"]
    )
    assert differ(drawn["drawn-8.png"], drawn["drawn-4.png"])  # another prompt


def test_sample_refusals(straight, recipe, tmp_path):
    """Catches a size or a run that cannot be drawn, which ends in a traceback."""
    with pytest.raises(ValueError, match="size '64' is none; expected width and height"):
        sample(recipe, tmp_path, "--run", straight, "--prompt", "a", "--size", 64)
    (tmp_path / "empty").mkdir()
    shutil.copy(straight / "config.yaml", tmp_path / "empty")
    with pytest.raises(ValueError, match=r"has no weights; draw from a checkpoint: --checkpoint .*/checkpoint-N"):
        sample(recipe, tmp_path, "--run", tmp_path / "empty", "--prompt", "a")


@pytest.mark.slow
def test_validation_changes_nothing(train, config, straight, tmp_path):
    """Catches a validation that consumes randomness, leaves eval mode on, or leaves averaged weights in the model."""
    flags = ["--max_train_steps", 4, "--validation_steps", 1, "--ema_decay", 0.9]
    run_main(train, ["--config", config, "--output_dir", tmp_path, *flags])
    assert column(tmp_path) == {step: loss for step, loss in column(straight).items() if step <= 4}
    losses = [row["validation_loss"] for row in read_rows(tmp_path / "validation.jsonl")]
    assert losses[0] == read_rows(straight / "validation.jsonl")[0]["validation_loss"] and len(set(losses)) == 5


# ---- how a batch is split


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 2), (4, 4)])
def test_accumulation_is_the_larger_batch(train, config, straight, tmp_path, batch_size, accumulation):
    """Catches a loss that is summed in place of averaged, a step per micro-batch, noise that depends on the split."""
    flags = ["--max_train_steps", 3, "--train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation]
    run_main(train, ["--config", config, "--output_dir", tmp_path, *flags])
    for name in ("loss", "grad_norm"):
        expected = {step: value for step, value in column(straight, name).items() if step <= 3}
        assert largest_difference(column(tmp_path, name), expected) < 1e-5, name


def test_global_batch_size_sets_accumulation(train, config, straight, tmp_path):
    """Catches a global batch size that is not the one asked for."""
    flags = ["--max_train_steps", 1, "--train_batch_size", 2, "--global_batch_size", 16]
    run_main(train, ["--config", config, "--output_dir", tmp_path, *flags])
    assert column(tmp_path)[1] == pytest.approx(column(straight)[1], rel=1e-5)


def test_caches_and_checkpointing_do_not_change_the_loss(train, config, straight, tmp_path):
    """Catches activation checkpointing or loader workers that change what is computed."""
    flags = ["--max_train_steps", 2, "--gradient_checkpointing", "--dataloader_num_workers", 1]
    run_main(train, ["--config", config, "--output_dir", tmp_path, *flags])
    expected = {step: loss for step, loss in column(straight).items() if step <= 2}
    assert largest_difference(column(tmp_path), expected) < 1e-6


@pytest.mark.slow
def test_gradient_release_through_the_recipe(train, config, tmp_path):
    """Catches hooks that are set after the model is wrapped or keep the first learning rate, and a step made twice."""
    flags = ["--max_train_steps", 5, "--optimizer", "adafactor", "--max_grad_norm", 0, "--learning_rate", 1e-3]
    flags += ["--lr_scheduler", "linear", "--lr_warmup_steps", 1]
    run_main(train, ["--config", config, "--output_dir", tmp_path / "plain", *flags])
    run_main(train, ["--config", config, "--output_dir", tmp_path / "release", *flags, "--gradient_release"])
    for name in ("loss", "grad_norm"):
        assert largest_difference(column(tmp_path / "release", name), column(tmp_path / "plain", name)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_bf16_run_follows_the_float32_run(train, config, model_folder, tmp_path, optimizer):
    """Catches a bf16 run that stands still or diverges: losses near float32's, and weights moved by as much at
    5e-6."""
    moved = {}
    for precision in ("no", "bf16"):
        out = tmp_path / precision
        flags = ["--max_train_steps", 6, "--optimizer", optimizer, "--learning_rate", 5e-6, "--checkpointing_steps", 6]
        flags += ["--adam_weight_decay", 0, "--mixed_precision", precision, "--adam_epsilon", 1e-8]
        run_main(train, ["--config", config, "--output_dir", out, *flags])
        after = weights(out / "checkpoint-6/model")
        start = weights(model_folder / "transformer")
        moved[precision] = {
            name: after[name].float() - (start[name].to(after[name].dtype).float())
            for name in start
            if start[name].ndim > 1
        }
    assert largest_difference(column(tmp_path / "bf16"), column(tmp_path / "no")) < 0.02
    dot = sum((moved["bf16"][name] * moved["no"][name]).sum() for name in moved["no"])
    share = dot / sum(moved["no"][name].square().sum() for name in moved["no"])
    assert 0.9 < share < 1.1, share


@pytest.mark.slow
def test_the_tracker_gets_the_metrics(train, config, tmp_path, monkeypatch):
    """Catches a tracker that is named in the settings and never started, or gets no metrics."""
    wandb = pytest.importorskip("wandb")
    run = mock.MagicMock()
    init = mock.MagicMock(return_value=run)
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "config", mock.MagicMock())
    flags = ["--max_train_steps", 2, "--report_to", "wandb", "--tracker_project_name", "a project"]
    run_main(train, ["--config", config, "--output_dir", tmp_path, *flags])
    assert init.call_args.kwargs["project"] == "a project" and init.call_args.kwargs["dir"] == str(tmp_path)
    logged = [call.args[0] for call in run.log.call_args_list]
    assert [row["loss"] for row in logged] == list(column(tmp_path).values()) and "grad_norm" in logged[0]
    assert run.finish.called


# ---- users' mistakes


def test_a_used_folder_is_not_overwritten(train, config, straight):
    """Catches a new run that mixes its files with an earlier one's."""
    with pytest.raises(ValueError, match=r"holds checkpoint-\d+ of .*--resume_from_checkpoint latest"):
        run_main(train, ["--config", config, "--output_dir", straight])
    assert len(read_rows(straight)) == 8


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--pretrained_model_name_or_path", "/no/such/model"], "'/no/such/model'.*model folder"),
        (["--pretrained_model_name_or_path", "{tmp}"], "is no model folder: it lacks transformer, vae"),
        (["--train_data_dir", "/no/such/data"], "train_data_dir /no/such/data is no folder"),
        (["--train_data_dir", "{tmp}"], "no manifest: .*--train_data_meta"),
        (["--train_data_dir", "{tmp}", "--train_data_meta", "{empty}"], "has zero rows"),
        (["--resolution", "100"], "resolution must be a positive multiple of 32.*got 100; use 96"),
        (["--global_batch_size", "40"], "global_batch_size 40 does not divide by train_batch_size 16 x 1 processes"),
        (["--train_batch_size", "0"], "train_batch_size must be at least 1, got 0"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be at least 1, got 0"),
        (["--max_train_steps", "0"], "max_train_steps must be at least 1, got 0"),
        (["--caption_dropout", "1.5"], "caption_dropout is a share between 0 and 1, got 1.5"),
        (["--num_inference_steps", "1"], "num_inference_steps must be at least 2, got 1"),
        (["--gradient_release"], "gradient_release is not possible: optimizer adamw.*; max_grad_norm is 1.0"),
        (["--resume_from_checkpoint", "checkpoint-5"], "'checkpoint-5' is no complete checkpoint: .*latest"),
        (["--validation_prompts", "/no/such/prompts.txt"], "validation_prompts names /no/such/prompts.txt"),
        (
            ["--transformer_path", "{tmp}"],
            "transformer_path .* has no config.json; give a run.s export/transformer",
        ),
        (["--config", "/no/such/config.yaml"], "no config file /no/such/config.yaml"),
    ],
)
def test_mistakes_end_in_one_sentence(train, config, tmp_path, capfd, flags, sentence):
    """Catches a mistake of the user that ends in a traceback, or in a sentence that does not say what was got and
    expected."""
    (tmp_path / "empty.json").write_text("[]")
    flags = [flag.format(tmp=tmp_path, empty=tmp_path / "empty.json") for flag in flags]
    with pytest.raises(SystemExit) as ended, plan.explained_errors():
        run_main(train, ["--config", config, "--output_dir", tmp_path / "out", *flags])
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1 and "Traceback" not in said, said
    assert re.search(sentence, lines[0]), lines[0]


def test_train_data_must_be_given(train):
    """Catches a default that trains on nothing."""
    with pytest.raises(ValueError, match="train_data_dir is not set; pass --train_data_dir FOLDER"):
        parse_recipe(train.Config, [])


@pytest.mark.parametrize(
    ("arguments", "variables", "sentence"),
    [
        (["nosuch"], {}, "no config 'nosuch': neither a file nor one of: .*tiny"),
        (["tiny"], {"LAUNCH": "nosuch"}, "no launch file 'nosuch', there are: .*zero3"),
    ],
)
def test_run_sh_names_what_there_is(recipe, arguments, variables, sentence):
    """Catches a missing config or launch file that ends in another program's error."""
    command = ["bash", recipe / "run.sh", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, cwd="/")
    assert done.returncode == 2 and re.search(sentence, done.stderr), done
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_mistake_through_run_sh(recipe, tmp_path):
    """Catches a launcher that puts its own traceback after the sentence, or ends with another exit code."""
    done = run_command(["bash", recipe / "run.sh", "tiny", "--resolution", 100, "--output_dir", tmp_path])
    assert done.returncode == 2 and "Traceback" not in done.output, done
    assert done.output.strip().splitlines()[-1].startswith("error: resolution must be a positive multiple of 32")

"""Runs of one process: exact resume with the schedule's state, early stopping, batch equivalence, files, mistakes."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import column, largest_difference, read_card, read_rows, run_main
from safetensors.torch import load_file

from common.record.checkpoint import State

# a plateau at every second validation: better than 99% is never reached
PLATEAU = ["--validation_steps", 1, "--improvement_threshold", 0.99, "--lr_patience", 2, "--learning_rate", 0.004]
FULL = [*PLATEAU, "--max_train_steps", 8, "--checkpointing_steps", 3]


def adapters(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def straight(train, config, tmp_path_factory) -> Path:
    """Eight steps with dropout, a validation after each, the rate halved after the 3rd, 5th and 7th."""
    out = tmp_path_factory.mktemp("straight")
    run_main(train, ["--config", config, "--output_dir", out, *FULL])
    return out


# ---- resume and stop


@pytest.fixture(scope="module")
def resumed(train, config, tmp_path_factory) -> Path:
    """The same run, stopped by SIGTERM in its fourth step: one validation of patience is used up there."""
    out = tmp_path_factory.mktemp("stopped")
    argv = ["--config", config, "--output_dir", out, *FULL]
    run_main(train, argv, at_step={4: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert len(read_rows(out)) == 4 and not (out / "final").exists()
    run_main(train, [*argv, "--resume_from_checkpoint", "latest"])
    return out


def test_the_schedule_is_as_expected(straight):
    """Catches rates that do not follow the validations."""
    decisions = [row["decision"] for row in read_rows(straight / "validation.jsonl")]
    assert decisions == ["", "better", "wait", "reduce", "wait", "reduce", "wait", "reduce", "wait"]
    rates = [1 / 2, 1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 8]  # the first is warm-up
    assert list(column(straight, "learning_rate").values()) == pytest.approx([0.004 * rate for rate in rates])


def test_resume_is_exact(straight, resumed):
    """Catches a lost schedule, optimizer, dropout seed or order of samples: equal to the last bit."""
    for name in ("loss", "grad_norm", "learning_rate"):
        assert column(resumed, name) == column(straight, name), name
    assert len(set(column(straight).values())) == 8
    assert same(adapters(resumed / "final"), adapters(straight / "final"))
    assert same(adapters(resumed / "best"), adapters(straight / "best"))
    assert read_rows(resumed / "validation.jsonl") == read_rows(straight / "validation.jsonl")
    ours, theirs = (json.loads((out / "training_history.json").read_text()) for out in (resumed, straight))
    assert ours == theirs and len(theirs["validations"]) == 9


def test_a_checkpoint_holds_the_adapters_only(straight):
    """Catches a checkpoint that writes the frozen base, 18 GB at 32B, or leaves the schedule out."""
    folder = straight / "checkpoint-6"
    saved = [name for file in (folder / "model").glob("*.safetensors") for name in load_file(file)]
    assert len(saved) == 32 and all(".lora_" in name for name in saved)
    state = json.loads((folder / "trainer_state.json").read_text())
    schedule = state["extra"]["schedule"]
    assert schedule["factor"] == state["lr_scale"] == 0.25 and schedule["waited"] == 1
    assert len(schedule["history"]) == 7 and state["segments"] == [[8, 6]]


@pytest.mark.slow
def test_early_stop_ends_the_run(train, config, tmp_path, capfd):
    """Catches a stop that is not obeyed, that loses final/, or that a resume forgets."""
    flags = ["--config", config, "--output_dir", tmp_path, *FULL, "--min_lr", 0.0015]
    run_main(train, flags)
    assert len(read_rows(tmp_path)) == 5, "halved after the third, and to halve again after the fifth is too much"
    said = capfd.readouterr().out
    assert "stopped at step 5: no improvement" in said and "warning: with learning_rate 0.004" in said
    history = json.loads((tmp_path / "training_history.json").read_text())
    assert "under min_lr 0.0015" in history["stop_reason"] and history["validations"][-1]["decision"] == "stop"
    assert (tmp_path / "final").is_dir() and (tmp_path / "checkpoint-5").is_dir()
    run_main(train, [*flags, "--resume_from_checkpoint", "latest"])
    assert len(read_rows(tmp_path)) == 5 and "stopped at step 5: no improvement" in capfd.readouterr().out


@pytest.mark.slow
def test_a_stop_is_taken_back_by_other_settings(train, config, tmp_path):
    """Catches a run that can never go on after its schedule has stopped it, whatever its user changes."""
    flags = ["--config", config, "--output_dir", tmp_path, *FULL]
    run_main(train, [*flags, "--min_lr", 0.0015])
    run_main(train, [*flags, "--min_lr", 0, "--resume_from_checkpoint", "latest"])
    assert len(read_rows(tmp_path)) > 5


@pytest.mark.slow
def test_a_mistake_deletes_nothing(train, config, tmp_path):
    """Catches --overwrite_output_dir deleting an earlier run before the data of the new one is looked at."""
    run_main(train, ["--config", config, "--output_dir", tmp_path, *FULL])
    kept = {path.name for path in tmp_path.iterdir()}
    flags = ["--overwrite_output_dir", "--train_data_dir", tmp_path / "typo"]
    with pytest.raises(ValueError, match="typo"):
        run_main(train, ["--config", config, "--output_dir", tmp_path, *flags])
    assert {"best", "final", "checkpoint-8"} <= kept and kept <= {path.name for path in tmp_path.iterdir()}


def test_low_validation_loss_ends_the_run(train, config, tmp_path):
    flags = ["--min_val_loss", 100.0, "--validation_steps", 2, "--max_train_steps", 6]
    run_main(train, ["--config", config, "--output_dir", tmp_path, *flags])
    assert len(read_rows(tmp_path)) == 2, "the validation before the first step decides nothing"


@pytest.mark.slow
def test_validation_is_without_dropout(train, config, model_folder, processor, data_folder, tmp_path):
    """Catches a validation in training mode: final/ loaded anew has the loss that the last validation measured."""
    flags = ["--validation_steps", 2, "--max_train_steps", 4, "--lora_dropout", 0.5]
    run_main(train, ["--config", config, "--output_dir", tmp_path, *flags])
    base = train.load_base(model_folder, torch.float32, torch.device("cpu"), "nf4")
    cfg = train.Config(lora_dropout=0.5)
    cfg.data.train_data_dir = str(data_folder)
    model = train.add_adapters(base, cfg).eval()
    missing = model.load_adapter(tmp_path / "final", "default").missing_keys
    assert not [name for name in missing if "lora" in name]
    run = SimpleNamespace(world_size=1, device=torch.device("cpu"), unwrap=lambda model: model, share_of=list)
    run.progress = lambda items, title: items
    models = train.Models(model.eval(), base.config, processor, State(0, [], "", {}))
    loss, _ = train.measure(run, models, train.load_all_rows(cfg, processor).task, 4)
    assert loss == pytest.approx(read_rows(tmp_path / "validation.jsonl")[-1]["validation_loss"], rel=1e-4)


# ---- best and final


def test_best_and_final_have_a_card(straight, model_folder):
    """Catches peft's empty card, one of another step, and one that was written before its validation was."""
    best_step = json.loads((straight / "training_history.json").read_text())["best_step"]
    for name, step in (("best", best_step), ("final", 8)):
        text = read_card(straight / name, straight, step)
        assert "library_name: peft" in text and f"LoRA adapters of rank 8 of {model_folder.name}" in text, name
        assert f'from_pretrained("{model_folder.name}"' in text and 'PeftModel.from_pretrained(base, ".")' in text


def test_best_is_the_best(train, config, straight, tmp_path):
    """Catches best/ that is the last, the first, or of another metric."""
    rows = read_rows(straight / "validation.jsonl")[1:]
    history = json.loads((straight / "training_history.json").read_text())
    assert history["best_step"] == min(rows, key=lambda row: row["validation_loss"])["step"]
    flags = ["--max_train_steps", 4, "--validation_steps", 1, "--best_metric", "task_accuracy"]
    measured = iter([(9.0, 0.0), (5.0, 0.1), (4.0, 0.5), (3.0, 0.4), (2.0, 0.5)])
    with mock.patch.object(train, "measure", lambda run, models, rows, size: next(measured) if rows else None):
        argv = ["--config", config, "--output_dir", tmp_path, *flags, "--checkpointing_steps", 1]
        with mock.patch.object(train, "load_all_rows", without_retention(train.load_all_rows)):
            run_main(train, argv)
    assert json.loads((tmp_path / "training_history.json").read_text())["best_step"] == 2, "the first of equals"
    assert "step 2\n" in read_card(tmp_path / "best", tmp_path, 2)
    saved = {}
    for file in (tmp_path / "checkpoint-2/model").glob("*.safetensors"):
        saved |= load_file(file)
    best = adapters(tmp_path / "best")
    assert len(best) == len(saved)
    for name, tensor in saved.items():
        assert torch.equal(best[name.replace(".default.", ".")], tensor)
    assert not same(best, adapters(tmp_path / "final"))


def without_retention(load):
    def changed(*arguments):
        rows = load(*arguments)
        rows.retention = []
        return rows

    return changed


def test_without_validation_best_is_final(train, config, tmp_path):
    """Catches a run that leaves no best/ for evaluation."""
    run_main(train, ["--config", config, "--output_dir", tmp_path, "--max_train_steps", 2])
    assert same(adapters(tmp_path / "best"), adapters(tmp_path / "final")) and len(read_rows(tmp_path)) == 2
    assert not (tmp_path / "validation.jsonl").exists()


@pytest.mark.slow
def test_an_epoch_is_the_default_between_validations(train, config, tmp_path):
    """Catches epochs that forget the retention rows: 48 + 21 rows in steps of 8 are 8.6, so 9 steps."""
    flags = ["--max_train_steps", 10, "--validation_epochs", 1, "--validation_steps", 50, "--max_validation_rows", 2]
    run_main(train, ["--config", config, "--output_dir", tmp_path, *flags])
    assert [row["step"] for row in read_rows(tmp_path / "validation.jsonl")] == [0, 9, 10]
    flags = ["--num_train_epochs", 1, "--lr_warmup_ratio", 0.3]
    run_main(train, ["--config", config, "--output_dir", tmp_path / "epoch", *flags])
    rates = list(column(tmp_path / "epoch", "learning_rate").values())
    assert rates == pytest.approx([0.0025, 0.005, 0.0075] + [0.01] * 6), "three of nine steps of warm-up"


# ---- how a batch is split


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (1, 8)])
def test_accumulation_is_the_larger_batch(train, config, tmp_path, batch_size, accumulation):
    """Catches a mean of means: rows have 2 to 9 answer tokens, and each token counts the same."""
    flags = ["--max_train_steps", 3, "--lora_dropout", 0]
    run_main(train, ["--config", config, "--output_dir", tmp_path / "one", *flags])
    flags += ["--train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation]
    run_main(train, ["--config", config, "--output_dir", tmp_path / "split", *flags])
    for name in ("loss", "grad_norm"):
        assert largest_difference(column(tmp_path / "split", name), column(tmp_path / "one", name)) < 1e-4, name


@pytest.mark.slow
def test_group_by_length(train, config, tmp_path):
    """Catches steps that mix rows of unlike lengths where they should not, and a loss that then differs in kind."""
    seen = []
    collate = train.collate

    def watch(samples: list[dict]) -> dict:
        seen.append({len(sample["input_ids"]) // 4 for sample in samples})
        return collate(samples)

    for flags, most in (([], 3), (["--group_by_length"], 1)):
        seen.clear()
        with mock.patch.object(train, "collate", watch), mock.patch.object(train, "LENGTH_BUCKET", 4):
            argv = ["--config", config, "--output_dir", tmp_path / str(most), "--max_train_steps", 4, *flags]
            run_main(train, argv)
        assert max(len(lengths) for lengths in seen) == most


@pytest.mark.slow
def test_workers_and_bf16(train, config, tmp_path):
    """Catches rows that do not travel to loader workers, and a half precision that computes something else."""
    flags = ["--max_train_steps", 2, "--lora_dropout", 0]
    run_main(train, ["--config", config, "--output_dir", tmp_path / "one", *flags])
    run_main(train, ["--config", config, "--output_dir", tmp_path / "workers", *flags, "--dataloader_num_workers", 1])
    assert column(tmp_path / "workers") == column(tmp_path / "one")
    run_main(train, ["--config", config, "--output_dir", tmp_path / "bf16", *flags, "--mixed_precision", "bf16"])
    assert 0 < largest_difference(column(tmp_path / "bf16"), column(tmp_path / "one")) < 0.02


# ---- files


def test_what_a_run_leaves(straight):
    """Catches files that the documents promise and the run does not write, rows without one of their keys."""
    names = "config.yaml environment.json curves.png validation.jsonl training_history.json".split()
    for name in names:
        assert (straight / name).stat().st_size > 0, name
    keys = "step loss learning_rate grad_norm seconds_per_step samples_per_second mfu data_wait peak_memory_gib"
    assert all(set(keys.split()) <= row.keys() for row in read_rows(straight))
    keys = "step epoch learning_rate validation_loss validation_accuracy retention_loss retention_accuracy decision"
    validations = read_rows(straight / "validation.jsonl")
    assert all(set(keys.split()) <= row.keys() for row in validations)
    assert [row["train_loss"] for row in validations[1:]] == list(column(straight).values())
    for name in ("best", "final"):
        assert {"adapter_model.safetensors", "adapter_config.json", "processor_config.json"} <= {
            path.name for path in (straight / name).iterdir()
        }
    assert not list(straight.glob("*.partial"))
    saved = (straight / "config.yaml").read_text()
    assert "face_retention_pool: /" in saved, "evaluate.py finds the pools by it"


def test_curves_mark_the_reductions(straight):
    """Catches a curve without the schedule's decisions: what is drawn where, by matplotlib's own account."""
    from matplotlib.axes import Axes

    from common.record import pictures

    marked, original = [], Axes.axvline
    with mock.patch.object(Axes, "axvline", lambda axis, x, **style: marked.append(x) or original(axis, x, **style)):
        pictures.draw_curves(straight)
    assert sorted(set(marked)) == [3, 5, 7]


def test_saved_config_gives_the_same_run(train, straight, tmp_path):
    """Catches settings that config.yaml does not hold: a run from it alone has the same losses."""
    flags = ["--output_dir", tmp_path, "--max_train_steps", 2, "--validation_steps", 0]
    run_main(train, ["--config", straight / "config.yaml", *flags])
    assert column(tmp_path) == {step: loss for step, loss in column(straight).items() if step <= 2}


# ---- users' mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--retention_ratio", "1.0"], r"retention_ratio is a share from 0 to under 1, got 1.0"),
        (["--retention_ratio", "0.9"], r"retention_ratio 0.9 with 48 rows of the task needs 216 rows of"),
        (["--min_pixels", "8192", "--max_pixels", "4096"], r"min_pixels <= max_pixels, got 8192 and 4096"),
        (["--max_length", "20"], r"(?s)69 of 69|48 of 48 rows .*--on_long_rows skip.*tokens \(4 of them images\)"),
        (["--lr_reduction_factor", "1.5"], r"lr_reduction_factor must be between 0 and 1, got 1.5"),
        (["--train_data_dir", "/nowhere"], r"train_data_dir /nowhere is no folder"),
        (["--pretrained_model_name_or_path", "/nowhere"], r"'/nowhere' is no model folder: it has no config.json"),
        (["--lora_rank", "0"], r"lora_rank must be at least 1, got 0"),
    ],
)
def test_mistakes_are_explained(train, config, tmp_path, flags, message):
    """Catches a traceback from inside where a sentence should be."""
    with pytest.raises(ValueError, match=message):
        run_main(train, ["--config", config, "--output_dir", tmp_path, *flags])


def test_optimizers_of_full_tuning_are_refused(train, config, tmp_path, capsys):
    """Catches an optimizer for a model's own weights: the parser names those that adapters have."""
    with pytest.raises(SystemExit):
        run_main(train, ["--config", config, "--output_dir", tmp_path, "--optimizer", "adafactor"])
    said = capsys.readouterr().err
    assert "adafactor" in said and all(name in said for name in ("adamw", "adamw_8bit", "paged_adamw_8bit"))


def test_another_runs_folder_is_refused(train, config, tmp_path):
    """Catches best/ of one run beside final/ of another."""
    argv = ["--config", config, "--output_dir", tmp_path, "--max_train_steps", 1]
    run_main(train, argv)
    with pytest.raises(ValueError, match=r"holds best/ of another run.*--overwrite_output_dir"):
        run_main(train, argv)
    (tmp_path / "best/old").write_text("")
    run_main(train, [*argv, "--overwrite_output_dir"])
    assert not (tmp_path / "best/old").exists() and (tmp_path / "best").is_dir()


@pytest.mark.slow
def test_changed_data_is_noticed_on_resume(train, config, data_folder, straight, tmp_path, capfd):
    """Catches a resume on other rows that says nothing."""
    flags = ["--resume_from_checkpoint", straight / "checkpoint-3", "--max_train_steps", 4]
    run_main(train, ["--config", config, "--output_dir", tmp_path / "same", *flags])
    assert "data changed" not in capfd.readouterr().out
    changed = tmp_path / "data"
    shutil.copytree(data_folder, changed)
    file = changed / "forward_train.jsonl"
    file.write_text(re.sub("Correct|the ", "a ", file.read_text(), count=1))
    run_main(train, ["--config", config, "--output_dir", tmp_path / "other", *flags, "--train_data_dir", changed])
    assert "data changed" in capfd.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run(train, config, tmp_path):
    """Catches a tolerance for nan where nothing skips the step: only fp16's loss scale does."""
    compute_loss = train.compute_loss

    def broken(models, batch, cfg):
        loss, metrics = compute_loss(models, batch, cfg)
        return loss * float("nan"), metrics

    with (
        mock.patch.object(train, "compute_loss", broken),
        pytest.raises(ValueError, match="the loss is nan at step 1"),
    ):
        run_main(train, ["--config", config, "--output_dir", tmp_path, "--max_nonfinite_steps", 5])

"""common/record/integrity.py and folder.py: a checkpoint is whole or not taken, and nothing is lost by accident."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from common.record import integrity
from common.record.folder import claim_output_dir, find_checkpoint, list_checkpoints, read_rows


def make(output_dir: Path, step: int) -> Path:
    """A sealed checkpoint with a large and a small file, one in a folder."""
    folder = output_dir / f"checkpoint-{step}"
    (folder / "model").mkdir(parents=True)
    (folder / "model/weights.safetensors").write_bytes(bytes(range(256)) * 400)
    (folder / "trainer_state.json").write_text(json.dumps({"step": step}))
    integrity.seal(folder)
    return folder


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "truncated": (lambda f: os.truncate(f / "model/weights.safetensors", 100), "has 100 bytes"),
    "flipped": (lambda f: flip(f / "model/weights.safetensors"), "model/weights.safetensors is not what was written"),
    "flipped state": (lambda f: flip(f / "trainer_state.json"), "trainer_state.json is not what was written"),
    "missing": (lambda f: (f / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "empty": (lambda f: (f / "model/weights.safetensors").write_bytes(b""), "has 0 bytes"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "torn manifest": (lambda f: os.truncate(f / "manifest.json", 40), "manifest.json is damaged"),
    "another manifest": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_the_one_before_is_taken(name, tmp_path, capsys):
    """Catches a damaged checkpoint that is loaded, or ends in a traceback: the file is named, `latest` takes the next
    older whole one and says so."""
    damage, said = DAMAGES[name]
    older, newer = make(tmp_path, 5), make(tmp_path, 10)
    damage(newer)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint .* is no complete checkpoint: ") as refused:
        find_checkpoint(tmp_path, str(newer))
    assert said in str(refused.value) and "checkpoint-5" in str(refused.value)
    assert find_checkpoint(tmp_path, "latest") == older
    printed = capsys.readouterr().out
    assert said in printed and "checkpoint-10" in printed


def test_all_damaged_does_not_begin_anew_by_itself(tmp_path):
    """Catches a run that is thrown away because its only checkpoint has a flipped bit."""
    flip(make(tmp_path, 5) / "trainer_state.json")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole; begin anew with --overwrite_output_dir"):
        find_checkpoint(tmp_path, "latest")


def test_latest_with_nothing_to_resume_begins_anew(tmp_path, capsys):
    """Catches advice that is circular: killed after the first validation and before the first checkpoint."""
    (tmp_path / "validation_images/step_000000").mkdir(parents=True)
    (tmp_path / "embedding_cache").mkdir()
    assert find_checkpoint(tmp_path, "latest") is None and "starts anew" in capsys.readouterr().out
    claim_output_dir(tmp_path, None, overwrite=False, delete=True, asked="latest")
    assert not (tmp_path / "validation_images").exists() and (tmp_path / "embedding_cache").is_dir()
    (tmp_path / "validation_images").mkdir()
    with pytest.raises(ValueError, match="holds validation_images/ of another run"):
        claim_output_dir(tmp_path, None, overwrite=False)


def test_what_is_newer_than_latest_found_goes(tmp_path):
    """Catches a damaged newer checkpoint that stands in the way of going on, or is found by the next `latest`."""
    older = make(tmp_path, 5)
    flip(make(tmp_path, 10) / "model/weights.safetensors")
    (tmp_path / "checkpoint-3.removed").mkdir()
    claim_output_dir(tmp_path, older, overwrite=False, delete=True, asked="latest")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-5"]
    make(tmp_path, 10)
    with pytest.raises(ValueError, match="checkpoint-10 of another run"):
        claim_output_dir(tmp_path, older, overwrite=False, asked=str(older))


def test_a_kill_while_one_is_removed(tmp_path):
    """Catches half a checkpoint that is listed as complete: kill -9 in the middle of a removal."""
    folder = make(tmp_path, 5)
    code = f"""
import os, shutil, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from common.record import integrity
def killed(path):
    os.remove(Path(path) / "model/weights.safetensors")
    os.kill(os.getpid(), signal.SIGKILL)
integrity.shutil.rmtree = lambda path, ignore_errors=False: None if ignore_errors else killed(path)
integrity.remove(Path({str(folder)!r}))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert list_checkpoints(tmp_path) == [] and find_checkpoint(tmp_path, "latest") is None


def test_a_planted_command_is_not_run(tmp_path):
    """Catches optimizer.pt loaded as a pickle that may run anything."""

    class Planted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state": Planted()}, tmp_path / "optimizer.pt")
    loads = [line for line in (ROOT / "common/record/checkpoint.py").read_text().splitlines() if "torch.load(" in line]
    assert loads and not any("weights_only=False" in line for line in loads)
    with pytest.raises(Exception, match=r"[Ww]eights"):
        torch.load(tmp_path / "optimizer.pt", map_location="cpu")
    assert not (tmp_path / "ran").exists()


def test_a_torn_last_row_is_left_out(tmp_path):
    """Catches a resume that ends in a traceback because a kill tore the last line of metrics.jsonl."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2 is damaged"):
        read_rows(tmp_path / "metrics.jsonl")


def test_negative_settings_are_refused():
    """Catches --checkpoints_total_limit -1, which deleted each checkpoint right after it was saved."""
    from common import image_settings, rules, settings

    for group, name in (
        (settings.Run(checkpoints_total_limit=-1), "checkpoints_total_limit"),
        (settings.Run(checkpointing_steps=-5), "checkpointing_steps"),
        (settings.Batch(num_train_epochs=-1), "num_train_epochs"),
        (image_settings.Drawing(num_validation_samples=-1), "num_validation_samples"),
        (settings.FullTuning(ema_decay=2), "ema_decay"),
        (settings.FullTuning(ema_decay=-1), "ema_decay"),
        (image_settings.FlowMatching(timestep_shift=-3), "timestep_shift"),
        (settings.Optim(learning_rate=float("nan")), "learning_rate"),
        (settings.Optim(max_grad_norm=-1), "max_grad_norm"),
        (settings.Validation(validation_steps=-1), "validation_steps"),
    ):
        with pytest.raises(ValueError, match=name):
            rules.check_numbers(group)
            group.check()

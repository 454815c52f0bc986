"""What the three recipes with a transformer prove of streaming: a whole run equals the resident one."""

import shutil
from pathlib import Path

import torch
from helpers import column, run_main, weights

FLAGS = ["--optimizer", "adafactor", "--gradient_release", "--max_grad_norm", 0, "--ema_decay", 0.9, "--export_model"]
FLAGS += ["--max_train_steps", 4, "--checkpointing_steps", 2, "--gradient_accumulation_steps", 1]


def check_streamed_run(train, config: Path, folder: Path) -> None:
    """A run with all blocks in main memory, stopped at its second step and gone on with one block there, has the
    losses and the export of a run with everything in place, to the last bit."""

    def run(name: str, *flags: object) -> Path:
        run_main(train, ["--config", config, "--output_dir", folder / name, *FLAGS, *flags])
        return folder / name

    resident = run("resident", "--gradient_checkpointing")
    streamed = run("streamed", "--stream_blocks", -1)
    assert column(streamed) == column(resident)
    shutil.rmtree(streamed / "checkpoint-4")
    shutil.rmtree(streamed / "export")
    run("streamed", "--stream_blocks", 1, "--offload_activations", "--resume_from_checkpoint", "latest")
    assert column(streamed) == column(resident)
    ours, theirs = (weights(out / "export/transformer") for out in (streamed, resident))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)

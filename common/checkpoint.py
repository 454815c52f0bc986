"""Checkpoints that are complete or absent, exact resume, and export to diffusers' layout.

Every function is called on every process.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from common import nvme
from common.export import SHARD_BYTES, write_shards
from common.runtime import Run
from common.sharding import Ema, safetensors_reader

STATE_FILE = "trainer_state.json"
RESULTS = ("validation_images/", "export/")  # what a run leaves beside its checkpoints


def claim_output_dir(
    output_dir: str | Path,
    resume: Path | None,
    overwrite: bool,
    delete: bool = True,
    results: Sequence[str] = RESULTS,
) -> None:
    """Make the folder. ValueError when this run would mix its files with an earlier one's; `overwrite` deletes those.

    Recipes call it twice: at first with delete=False, and again when data and model are there, so that a mistake in
    the settings deletes nothing.

    A new run must find no checkpoints and none of `results`, and a resumed one no checkpoints newer than its own:
    "latest" must never mean another branch.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = list_checkpoints(folder)
    if resume is None:
        earlier = [*(p.name for p in checkpoints), *(name for name in results if (folder / name).exists())]
    else:
        inside = resume.resolve().parent == folder.resolve()
        earlier = [p.name for p in checkpoints if not inside or _step(p) > _step(resume)]
    if earlier and not overwrite:
        raise ValueError(
            f"output_dir {folder} holds {earlier[0]} of another run; go on with --resume_from_checkpoint latest, "
            "take another --output_dir, or delete it with --overwrite_output_dir"
        )
    for path in [*(folder / name for name in earlier), *folder.glob("checkpoint-*.partial")] if delete else []:
        shutil.rmtree(path)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def save_checkpoint(
    run: Run,
    output_dir: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    state: dict,
    limit: int,
    files: dict[str, str],
) -> Path:
    """Write checkpoint-<step>: weights, optimizer, average, `state` (JSON) and small text `files`, then delete the
    oldest beyond `limit` (0 keeps all).

    Everything is written to checkpoint-<step>.partial and renamed at the end: a kill at any moment leaves the folder
    complete or absent.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = final.with_name(final.name + ".partial")
    if run.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    run.barrier()
    if run.strategy.startswith("zero"):
        model.save_checkpoint(str(partial), tag="deepspeed", exclude_frozen_parameters=has_frozen(model))
        if nvme.uses_nvme(model):
            torch.save(nvme.state_beside(model.optimizer), partial / f"nvme_rank{run.rank}.pt")
    elif run.strategy == "fsdp2":
        _save_fsdp2(run, partial, model, optimizer)
    elif run.is_main:
        weights = trained_state(run.unwrap(model))
        (partial / "model").mkdir()
        sizes = {name: tensor.nbytes for name, tensor in weights.items()}
        write_shards(iter(weights.items()), sizes, partial / "model", SHARD_BYTES)
        torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    if run.is_main and run.accelerator.scaler is not None:
        torch.save(run.accelerator.scaler.state_dict(), partial / "scaler.pt")
    if ema is not None and (run.sharded or run.is_main):
        torch.save(ema.shadow, partial / f"ema_rank{run.rank}.pt")
    if run.is_main:
        state = {"step": step, "launch": run.launch, "strategy": run.strategy, "world_size": run.world_size, **state}
        for name, text in {**files, STATE_FILE: json.dumps(state, indent=1)}.items():
            (partial / name).write_text(text)
    run.barrier()
    if run.is_main:
        for file in partial.rglob("*"):
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        for old in list_checkpoints(output_dir)[: -limit or None] if limit else []:
            shutil.rmtree(old)
    run.barrier()
    return final


def load_checkpoint(
    run: Run, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None
) -> dict:
    """Put weights, optimizer and average back as saved and return the state.

    ValueError where the strategy cannot read this checkpoint.
    """
    state = read_state(folder)
    if _family(state) != _family({"strategy": run.strategy, "launch": run.launch}):
        raise ValueError(
            f"{folder} was saved by LAUNCH={state['launch']} and this run is {run.launch}: resume with "
            f"LAUNCH={state['launch']}, or start a new run with --transformer_path OUTPUT_DIR/export/transformer "
            "(for DeepSpeed without an export: `python -m common.zero_to_bf16`)"
        )
    per_rank_state = run.strategy.startswith("zero") or (
        run.strategy == "fsdp2" and not (folder / "optimizer").is_dir()
    )
    if state["world_size"] != run.world_size and (per_rank_state or (ema is not None and run.sharded)):
        raise ValueError(
            f"{folder} holds the {run.strategy} optimizer state of {state['world_size']} processes, one part each, "
            f"and this run has {run.world_size}: resume with NPROC={state['world_size']}, "
            "or start a new run from the exported weights"
        )
    if run.strategy.startswith("zero"):
        _load_deepspeed(run, folder, model)
    elif run.strategy == "fsdp2":
        _load_fsdp2(run, folder, model, optimizer)
    else:
        _load_replicated(run.unwrap(model), folder / "model")
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=False))
    if run.accelerator.scaler is not None and (folder / "scaler.pt").is_file():
        run.accelerator.scaler.load_state_dict(torch.load(folder / "scaler.pt"))
    if ema is not None:
        file = folder / f"ema_rank{run.rank if run.sharded else 0}.pt"
        if not file.is_file():
            raise ValueError(
                f"{folder} has no averaged weights; resume with --ema_decay 0 as it was saved, or start anew"
            )
        ema.shadow = [t.to(s.device) for t, s in zip(torch.load(file, map_location="cpu"), ema.shadow)]
    return state


def read_state(folder: Path) -> dict:
    """What save_checkpoint was given as `state`, with step, launch, strategy and world_size."""
    return json.loads((folder / STATE_FILE).read_text())


def has_frozen(model: nn.Module) -> bool:
    return not all(p.requires_grad for p in model.parameters())


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps: the whole state dict, or, where parameters are frozen (an adapter on a large base),
    those that train and the buffers of the modules that own them (a queue beside a projection)."""
    if not has_frozen(model):
        return model.state_dict()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    owners = {name.rpartition(".")[0] for name in trained}
    return trained | {name: b for name, b in model.named_buffers() if name.rpartition(".")[0] in owners}


@torch.no_grad()
def _load_replicated(model: nn.Module, folder: Path) -> None:
    """Copy saved tensors into the model one at a time; names and shapes must be the model's."""
    own = trained_state(model)
    read = safetensors_reader(folder, set(own))
    for name, tensor in own.items():
        tensor.copy_(read(name, tuple(tensor.shape), slice(None)))


def _load_deepspeed(run: Run, folder: Path, engine: nn.Module) -> None:
    if not nvme.uses_nvme(engine):
        engine.load_checkpoint(str(folder), tag="deepspeed", load_module_strict=not has_frozen(engine))
        return
    nvme.before_load(engine.optimizer)
    engine.load_checkpoint(str(folder), tag="deepspeed")
    nvme.after_load(engine.optimizer, torch.load(folder / f"nvme_rank{run.rank}.pt", map_location="cpu"))


def _save_fsdp2(run: Run, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """torch's distributed checkpoint, which another number of processes can read.

    Quantised optimizer state goes to one file a rank.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    trained_only = StateDictOptions(ignore_frozen_params=has_frozen(model))
    dcp.save(get_model_state_dict(model, options=trained_only), checkpoint_id=folder / "model")
    if _is_quantised(optimizer):
        torch.save(_local_state(optimizer), folder / f"optimizer_rank{run.rank}.pt")
    else:
        dcp.save(get_optimizer_state_dict(model, _bare(optimizer)), checkpoint_id=folder / "optimizer")


def _load_fsdp2(run: Run, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    frozen = has_frozen(model)
    weights = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=frozen))
    dcp.load(weights, checkpoint_id=folder / "model")
    set_model_state_dict(model, weights, options=StateDictOptions(strict=not frozen))
    if (folder / "optimizer").is_dir():
        moments = get_optimizer_state_dict(model, _bare(optimizer))
        # parameters that never got a gradient (a last block's text branch) have no saved moments
        dcp.load(moments, checkpoint_id=folder / "optimizer", planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
        set_optimizer_state_dict(model, _bare(optimizer), moments)
    else:
        _bare(optimizer).load_state_dict(
            torch.load(folder / f"optimizer_rank{run.rank}.pt", map_location="cpu", weights_only=False)
        )


def _bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _is_quantised(optimizer: torch.optim.Optimizer) -> bool:
    return type(_bare(optimizer)).__module__.startswith("flashoptim")


def _local_state(optimizer: torch.optim.Optimizer) -> dict:
    """flashoptim's state dict with this rank's local tensors: it would wrap them as DTensors for torch's distributed
    checkpoint, which refuses uneven shards, and they are saved rank by rank here."""
    bare = _bare(optimizer)
    with mock.patch.object(type(bare), "_wrap_state_as_dtensor", staticmethod(lambda state, parameter: None)):
        return bare.state_dict()


def _family(state: dict) -> str:
    """Checkpoints of one family can be read by each other's strategies."""
    if state["launch"].endswith("_nvme"):
        return "zero3_nvme"
    return "replicated" if state["strategy"] in ("single", "ddp") else state["strategy"]


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints, oldest step first."""
    found = [
        p
        for p in Path(output_dir).glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", p.name) and (p / STATE_FILE).is_file()
    ]
    return sorted(found, key=_step)


def find_checkpoint(output_dir: str | Path, resume: str | None) -> Path | None:
    """The folder that `resume_from_checkpoint` means: None starts anew, "latest" is the newest complete one.

    None if there is none; anything else is a path.
    """
    if not resume:
        return None
    if resume == "latest":
        found = list_checkpoints(output_dir)
        return found[-1] if found else None
    for folder in (Path(resume), Path(output_dir) / resume):
        if (folder / STATE_FILE).is_file():
            return folder
    names = ", ".join(p.name for p in list_checkpoints(output_dir)) or "none"
    raise ValueError(
        f"resume_from_checkpoint {resume!r} is no complete checkpoint; "
        f"in {output_dir} there are: {names}. Or say latest"
    )

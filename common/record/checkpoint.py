"""Checkpoints that are complete or absent, and exact resume. Every function is called on every process."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from common import rules
from common.data.order import MicroBatchSampler
from common.model.ema import Ema
from common.model.export import SHARD_BYTES, export_trained, write_shards
from common.model.loading import safetensors_reader
from common.model.streaming import at_home
from common.processes import DiskFull, Run
from common.progress import stage
from common.record import elastic, fsdp2, integrity, nvme
from common.record.folder import STATE_FILE, list_checkpoints, read_state
from common.record.saved_weights import AVERAGED_NAMES
from common.settings import Shared
from common.step import steps


@dataclass
class State:
    """Where a run stands beside its weights and optimizer, as checkpoints keep it."""

    step: int
    """optimizer steps taken when this process began"""
    segments: list
    """the order of samples up to there"""
    digest: str
    """of the data"""
    config: dict
    """of the model that trains: config.json in every checkpoint; {} writes none"""
    lr_scale: float = 1.0
    """what validation has reduced the learning rate to"""
    extra: dict = field(default_factory=dict)
    """what else a recipe wants back when it goes on"""


def resume(
    run: Run,
    cfg: Shared,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    digest: str,
    config: dict,
) -> State:
    """Load the checkpoint to go on from, where there is one, and say what changed since; else the state of a new
    run."""
    if run.resume is None:
        return State(0, [], digest, config)
    saved = load_checkpoint(run, run.resume, model, optimizer, ema)
    changed = changed_settings(saved["config"], cfg)
    run.print(f"resumed from {run.resume} at step {saved['step']}; settings changed since: {changed}")
    if saved["data"] != digest:
        run.print("the data changed since that checkpoint: the order of samples is not a continuation of it")
    return State(saved["step"], saved["segments"], digest, config, saved.get("lr_scale", 1.0), saved.get("extra", {}))


def changed_settings(before: dict, cfg: Shared) -> str:
    """What differs between a checkpoint's settings and this run's, for a person to read."""
    now = json.loads(json.dumps(rules.flat(cfg)))
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now if name in before and before[name] != now[name]]
    return ", ".join(changed) or "none"


def save_if_due(
    run: Run,
    cfg: Shared,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    sampler: MicroBatchSampler,
    state: State,
    step: int,
) -> None:
    """A checkpoint every checkpointing_steps and at the end, when the run was asked to stop too, with all that an
    exact resume needs and the model's config.json; and an export every export_steps."""
    last_step = step if run.stop_requested() else cfg.batch.max_train_steps
    if steps.is_due(step, cfg.run.checkpointing_steps, last_step):
        values = {
            "segments": sampler.segments_at(step),
            "data": state.digest,
            "lr_scale": state.lr_scale,
            "extra": state.extra,
            "config": rules.flat(cfg),
        }
        files = {"config.json": json.dumps(state.config, indent=2)} if state.config else {}
        limit, output_dir = cfg.run.checkpoints_total_limit, cfg.run.output_dir
        with _saying_what_is_whole(Path(output_dir), step):
            folder = save_checkpoint(run, output_dir, step, model, optimizer, ema, values, limit, files)
        run.print(f"saved {folder}")
    if cfg.tuning.export_steps and step % cfg.tuning.export_steps == 0:
        export_trained(run, cfg, model, ema, state.config, step)


@contextmanager
def _saying_what_is_whole(output_dir: Path, step: int) -> Iterator[None]:
    """A full disk ends the save in one sentence, and what was written of it goes."""
    try:
        yield
    except Exception as error:
        if not integrity.is_full_disk(error):
            raise
        shutil.rmtree(output_dir / f"checkpoint-{step}.partial", ignore_errors=True)
        whole = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
        raise DiskFull(f"the disk of {output_dir} is full at step {step}; whole checkpoints: {whole}") from error


@stage("save")
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
        fsdp2.save(run, partial, model, optimizer, has_frozen(model))
    elif run.is_main:
        with at_home(run.unwrap(model)):
            weights = trained_state(run.unwrap(model))
            (partial / "model").mkdir()
            sizes = {name: tensor.nbytes for name, tensor in weights.items()}
            write_shards(iter(weights.items()), sizes, partial / "model", SHARD_BYTES)
            torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    if run.is_main and run.accelerator.scaler is not None:
        torch.save(run.accelerator.scaler.state_dict(), partial / "scaler.pt")
    if ema is not None and (run.sharded or run.is_main):
        torch.save(ema.shadow, partial / f"ema_rank{run.rank}.pt")
        files = {**files, AVERAGED_NAMES: json.dumps(ema.names, indent=0)}
    if run.is_main:
        kind = {"launch": run.launch, "strategy": run.strategy, "world_size": run.world_size}
        kind |= {"recipe": run.recipe_dir.name, "frozen": has_frozen(run.unwrap(model))}
        state = {"step": step, **kind, **state}
        for name, text in {**files, STATE_FILE: json.dumps(state, indent=1)}.items():
            (partial / name).write_text(text)
    run.barrier()
    if run.is_main:
        integrity.seal(partial)
        if final.exists():
            integrity.remove(final)
        os.rename(partial, final)
        integrity.sync(final.parent)
        for old in list_checkpoints(output_dir)[:-limit] if limit else []:
            integrity.remove(old)
    run.barrier()
    return final


def load_checkpoint(
    run: Run, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None
) -> dict:
    """Put weights, optimizer and average back as saved and return the state.

    ValueError where this run cannot be made of this checkpoint.
    """
    state = read_state(folder)
    if moved := elastic.is_needed(run, folder, ema):
        elastic.load(run, folder, model, optimizer, ema)
    elif run.strategy.startswith("zero"):
        _load_deepspeed(run, folder, model)
    elif run.strategy == "fsdp2":
        fsdp2.load(run, folder, model, optimizer, has_frozen(model))
    else:
        with at_home(run.unwrap(model)):
            _load_replicated(run.unwrap(model), folder / "model")
            saved = torch.load(folder / "optimizer.pt", map_location="cpu", mmap=True)
            optimizer.load_state_dict(saved)
        run.barrier()  # streamed blocks are the same memory for all processes
    if run.accelerator.scaler is not None and (folder / "scaler.pt").is_file():
        run.accelerator.scaler.load_state_dict(torch.load(folder / "scaler.pt"))
    if ema is not None and not moved:
        file = folder / f"ema_rank{run.rank if run.sharded else 0}.pt"
        if not file.is_file():
            raise ValueError(
                f"{folder} has no averaged weights; resume with --ema_decay 0 as it was saved, or start anew"
            )
        ema.shadow = [t.to(s.device) for t, s in zip(torch.load(file, map_location="cpu"), ema.shadow)]
    return state


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

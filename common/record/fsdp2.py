"""A checkpoint of a sharded run (FSDP2): torch's distributed checkpoint. Every function is called on every process."""

from pathlib import Path
from unittest import mock

import torch
from torch import nn

from common.processes import Run


def save(run: Run, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, frozen: bool) -> None:
    """torch's distributed checkpoint, which another number of processes can read.

    Quantised optimizer state goes to one file a rank. frozen: some parameters do not train, and stay out.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    trained_only = StateDictOptions(ignore_frozen_params=frozen)
    dcp.save(get_model_state_dict(model, options=trained_only), checkpoint_id=folder / "model")
    if _is_quantised(optimizer):
        torch.save(_local_state(optimizer), folder / f"optimizer_rank{run.rank}.pt")
    else:
        dcp.save(get_optimizer_state_dict(model, bare(optimizer)), checkpoint_id=folder / "optimizer")


def load(run: Run, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, frozen: bool) -> None:
    """Put back what `save` kept."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    weights = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=frozen))
    dcp.load(weights, checkpoint_id=folder / "model")
    set_model_state_dict(model, weights, options=StateDictOptions(strict=not frozen))
    if (folder / "optimizer").is_dir():
        moments = get_optimizer_state_dict(model, bare(optimizer))
        # parameters that never got a gradient (a last block's text branch) have no saved moments
        dcp.load(moments, checkpoint_id=folder / "optimizer", planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
        set_optimizer_state_dict(model, bare(optimizer), moments)
    else:
        bare(optimizer).load_state_dict(torch.load(folder / f"optimizer_rank{run.rank}.pt", map_location="cpu"))


def bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _is_quantised(optimizer: torch.optim.Optimizer) -> bool:
    return type(bare(optimizer)).__module__.startswith("flashoptim")


def _local_state(optimizer: torch.optim.Optimizer) -> dict:
    """flashoptim's state dict with this rank's local tensors: it would wrap them as DTensors for torch's distributed
    checkpoint, which refuses uneven shards, and they are saved rank by rank here."""
    inner = bare(optimizer)
    with mock.patch.object(type(inner), "_wrap_state_as_dtensor", staticmethod(lambda state, parameter: None)):
        return inner.state_dict()

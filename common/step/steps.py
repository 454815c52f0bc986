"""What the loop calls at every step: seeds, learning rate, clipping, and whether the processes agree."""

import math

import torch
from accelerate.utils import set_seed

from common.processes import Run
from common.settings import Optim


def seed_step(seed: int, micro_step: int, rank: int) -> None:
    """Seed torch's generators for one micro-batch (dropout, stochastic rounding): a resumed run draws the same numbers
    as a straight one."""
    set_seed((seed * 1_000_003 + micro_step * 4_099 + rank) % 2**32)


def learning_rate(step: int, optim: Optim, max_train_steps: int, scale: float = 1.0) -> float:
    """The learning rate of a step. scale: what a recipe's validation has reduced it to, which is in its
    checkpoints."""
    return optim.learning_rate * scale * lr_factor(step, optim, max_train_steps)


def lr_factor(step: int, optim: Optim, max_train_steps: int) -> float:
    """What learning_rate is multiplied by at a step: linear warm-up, then constant, linear or cosine to zero.

    A function of the step, so there is no state to save.
    """
    if step < optim.lr_warmup_steps:
        return (step + 1) / (optim.lr_warmup_steps + 1)
    progress = (step - optim.lr_warmup_steps) / max(1, max_train_steps - optim.lr_warmup_steps)
    if optim.lr_scheduler == "linear":
        return max(0.0, 1 - progress)
    if optim.lr_scheduler in ("cosine", "cosine_with_restarts"):  # of one cycle, as scripts have it that set no number
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return 1.0


def is_due(step: int, every: int, last_step: int) -> bool:
    """Whether what happens every so many steps (0: never), and at the last one, happens at this one."""
    return every > 0 and (step == last_step or step % every == 0)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Of every group, times its own lr_scale where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def clip_gradients(run: Run, model: torch.nn.Module, max_norm: float) -> float:
    """Clip to a global norm (0: measure only) and return the norm before clipping, over all shards.

    DeepSpeed has clipped by itself. Under fp16 the gradients are unscaled first.
    """
    if run.strategy.startswith("zero"):
        norm = model.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")
    if run.release is not None:
        return run.release.grad_norm(sharded=run.strategy == "fsdp2")
    run.accelerator.unscale_gradients()
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(
        parameters, max_norm if max_norm > 0 else math.inf, foreach=None if run.offload else True
    )
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def assert_ranks_agree(run: Run, model: torch.nn.Module) -> None:
    """After the first step: replicas must hold equal weights, shards must be shards.

    Catches processes that silently train alone.
    """
    if run.world_size == 1:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    if run.strategy == "fsdp2":
        assert all(hasattr(p, "device_mesh") for p in trained), "fsdp2 was asked for, but parameters are not sharded"
        return
    if run.strategy == "zero3":
        assert all(hasattr(p, "ds_tensor") for p in trained), (
            "ZeRO-3 was asked for, but parameters are not partitioned"
        )
        return
    checksum = sum(p.detach().double().sum() for p in trained).reshape(1)
    sums = [torch.empty_like(checksum) for _ in range(run.world_size)]
    torch.distributed.all_gather(sums, checksum)
    assert all(torch.equal(s, sums[0]) for s in sums), (
        f"after one step the processes hold different weights: checksums {sums}"
    )

"""What the loop calls at every step: seeds, learning rate, clipping, and whether the processes agree."""

import math

import torch
from accelerate.utils import set_seed

from common.runtime import Run


def seed_step(seed: int, micro_step: int, rank: int) -> None:
    """Seed torch's generators for one micro-batch (dropout, stochastic rounding): a resumed run draws the same numbers
    as a straight one."""
    set_seed((seed * 1_000_003 + micro_step * 4_099 + rank) % 2**32)


def lr_factor(step: int, cfg, schedule=None) -> float:
    """What learning_rate is multiplied by at a step: linear warm-up, then constant, linear or cosine to zero.

    A function of the step, so there is no state to save; a recipe whose rate also depends on what validation found
    gives a `schedule` with a `factor`, and saves it.
    """
    if schedule is not None:
        return schedule.factor * lr_factor(step, cfg)
    if step < cfg.lr_warmup_steps:
        return (step + 1) / (cfg.lr_warmup_steps + 1)
    progress = (step - cfg.lr_warmup_steps) / max(1, cfg.max_train_steps - cfg.lr_warmup_steps)
    if cfg.lr_scheduler == "linear":
        return max(0.0, 1 - progress)
    if cfg.lr_scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


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

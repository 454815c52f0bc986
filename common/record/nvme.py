"""What DeepSpeed 0.19's checkpoints leave out when optimizer state lives on NVMe, so that resume is exact there too.

A new process loses Adam's step count and moments, and groups too small to be swapped lose everything: training would
go on with a jump in the loss and no message. `state_beside` is saved per rank next to DeepSpeed's files, `before_load`
and `after_load` go around engine.load_checkpoint. `optimizer` is the engine's ZeRO-3 optimizer. To be deleted when
DeepSpeed restores this itself.
"""

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


def uses_nvme(engine: torch.nn.Module) -> bool:
    """Whether this engine swaps optimizer state to a disk."""
    return getattr(engine.optimizer, "swap_optimizer", False)


def state_beside(optimizer) -> list[dict]:
    """A dict a sub-group: Adam's step, and for groups never swapped (under 1 MiB) the fp32 weights and moments."""
    saved = []
    for group, weights in enumerate(optimizer.fp32_partitioned_groups_flat):
        state = optimizer.optimizer.state.get(weights, {})
        entry = {"step": state.get("step", 0)}
        if not optimizer._swappable_optimizer_subgroup(group):
            entry["weights"] = weights.data.clone()
            entry |= {name: state[name].clone() for name in MOMENTS if name in state}
        saved.append(entry)
    return saved


def before_load(optimizer) -> None:
    """In a new process: tell the swapper that each swapped sub-group has two moments, or it reads weights only."""
    for group, weights in enumerate(optimizer.fp32_partitioned_groups_flat):
        state = optimizer.optimizer.state.get(weights, {})
        if optimizer._swappable_optimizer_subgroup(group) and MOMENTS[0] not in state:
            size = int(optimizer.fp16_partitioned_groups_flat_numel[group])
            optimizer.optimizer.state[weights] = {"step": 0} | {name: torch.zeros(size) for name in MOMENTS}
            swap_info = optimizer.optimizer_swapper._get_param_swap_info(weights)
            assert swap_info.has_state_tensors and swap_info.num_tensors() == 3
            swap_info.release_memory()


def after_load(optimizer, saved: list[dict]) -> None:
    """Put back what `state_beside` kept."""
    optimizer.checkpoint_event_prologue()
    for group, (weights, entry) in enumerate(zip(optimizer.fp32_partitioned_groups_flat, saved, strict=True)):
        state = optimizer.optimizer.state[weights]
        if not optimizer._swappable_optimizer_subgroup(group):
            weights.data.copy_(entry["weights"])
            state.update({name: entry[name].clone() for name in MOMENTS if name in entry})
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        state["step"] = entry["step"]
    optimizer.checkpoint_event_epilogue()

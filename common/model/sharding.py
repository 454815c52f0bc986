"""FSDP2 by torch's own fully_shard, and a parameter's whole or local tensor under every strategy.

accelerate's FSDP plugin does nothing on a CPU, so two processes would silently train two models there. fully_shard is
the same on CPU (gloo) and GPU (nccl): what the tests run is what a GPU runs.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from common.processes import Run


def shard(run: Run, model: nn.Module) -> nn.Module:
    """Apply fully_shard when the strategy is fsdp2, before weights are loaded; any other model is returned as it is.

    Blocks are the modules whose class the launch file names, or diffusers in the model's `_repeated_blocks`.
    """
    if run.strategy != "fsdp2":
        return model
    casts = run.compute_dtype != run.weights_dtype
    block_classes = run.fsdp.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",")
    block_classes = [name.strip() for name in block_classes if name.strip()] or model._repeated_blocks
    reshard = run.fsdp.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "true"
    return shard_model(model, block_classes, run.device, run.compute_dtype if casts else None, run.offload, reshard)


def shard_model(
    model: nn.Module,
    block_classes: Sequence[str],
    device: torch.device,
    compute_dtype: torch.dtype | None,
    offload: bool,
    reshard: bool,
) -> nn.Module:
    """fully_shard every module whose class is named in `block_classes`, then the root.

    compute_dtype: bf16 for fp32 weights with bf16 compute and fp32 gradient reduction, None when the weights' own
    dtype is used throughout (bf16 weights give bf16 gradients): either way weight and gradient agree, no bf16/float32
    mismatch can occur.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    outer = inner = MixedPrecisionPolicy()
    if compute_dtype:  # the root casts what comes in; blocks take it as it is, with rotary embeddings in float32
        outer = MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
        inner = replace(outer, output_dtype=None, cast_forward_inputs=False)
    settings = {
        "mesh": mesh,
        "reshard_after_forward": reshard,
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy(),
    }
    blocks = []
    for name in block_classes:
        found = [module for module in model.modules() if type(module).__name__ == name]
        if not found:
            raise ValueError(
                f"no module of class {name!r} to shard; "
                "the launch file's fsdp_transformer_layer_cls_to_wrap must name blocks of this model"
            )
        blocks += found
    for block in blocks:
        fully_shard(block, mp_policy=inner, **settings)
    return fully_shard(model, mp_policy=outer, **settings)


def local_tensor(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a parameter: FSDP2's local shard, ZeRO-3's partition, or the parameter itself."""
    if hasattr(parameter, "to_local"):
        return parameter.to_local()
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data


def full_tensor(parameter: Tensor) -> Tensor:
    """The whole parameter on every rank (a collective call when it is sharded)."""
    if hasattr(parameter, "full_tensor"):
        return parameter.detach().full_tensor()
    if hasattr(parameter, "ds_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()

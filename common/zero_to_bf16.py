"""Turn a DeepSpeed checkpoint into bf16 weights in diffusers' layout: `python common/zero_to_bf16.py CHECKPOINT OUT`.

Needs no GPU and no process group; memory holds one shard beside the memory-mapped optimizer files.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common.model.export import write_shards
from common.start.plan import explained_errors


def parse_size(text: str) -> int:
    """ "80GB" -> 80000000000, "512MB", "10000000"; decimal units as diffusers and transformers use."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    if not match:
        raise ValueError(f"max_shard_size {text!r} is no size; expected for example 5GB or 500MB")
    return int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[match[2].rstrip("B")])


def convert(checkpoint: Path, out: Path, max_shard_bytes: int, safe_serialization: bool = True) -> None:
    """checkpoint: a checkpoint-N folder (or its deepspeed subfolder's parent) of a zero2 or zero3 run.

    ValueError when it is none.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if not (checkpoint / "deepspeed").is_dir():
        raise ValueError(
            f"{checkpoint} holds no deepspeed/ folder; "
            "expected a checkpoint-N folder written under LAUNCH=zero2 or zero3"
        )
    if list(checkpoint.glob("nvme_rank*.pt")):
        raise ValueError(
            f"{checkpoint} was written under zero3_nvme, whose fp32 weights lie on the NVMe disk; "
            "use the run's export/ folder, or resume it with --max_train_steps at the checkpoint's step, which exports"
        )
    weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="deepspeed", lazy_mode=True)
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    out.mkdir(parents=True, exist_ok=True)
    sizes = {name: 2 * torch.Size(tensor.shape).numel() for name, tensor in weights.items()}

    def as_bf16(tensor) -> torch.Tensor:
        return (tensor.contiguous() if isinstance(tensor, torch.Tensor) else torch.as_tensor(tensor.contiguous())).to(
            torch.bfloat16
        )

    if safe_serialization:
        write_shards(((name, as_bf16(tensor)) for name, tensor in weights.items()), sizes, out, max_shard_bytes)
    else:
        torch.save({name: as_bf16(tensor) for name, tensor in weights.items()}, out / "diffusion_pytorch_model.bin")
    if (checkpoint / "config.json").is_file():
        shutil.copy(checkpoint / "config.json", out / "config.json")
    print(f"{len(weights)} tensors, {sum(sizes.values()) / 1e9:.3g} GB in bf16, written to {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint-N folder of a DeepSpeed run")
    parser.add_argument("out", type=Path, help="folder to write, as transformer/ of a diffusers model")
    parser.add_argument("--max_shard_size", default="5GB", help="largest file, for example 80GB for one file")
    parser.add_argument(
        "--safe_serialization",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="safetensors; --no-safe_serialization writes one .bin file",
    )
    args = parser.parse_args()
    convert(args.checkpoint, args.out, parse_size(args.max_shard_size), args.safe_serialization)


if __name__ == "__main__":
    with explained_errors():
        main()

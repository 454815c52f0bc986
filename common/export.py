"""Turn any checkpoint into weights to use: `python -m common.export CHECKPOINT OUT`, or by this file's path.

CHECKPOINT is a run's checkpoint-N, of any launch file. OUT becomes a folder that the model's from_pretrained opens, of
LoRA one that a pipeline's load_lora_weights opens, or, with --layout comfyui, one with a single file for ComfyUI.
Needs no GPU and no process group; memory holds one file's tensors (--max_shard_size), for ComfyUI one layer.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.start.exporting import export
from common.start.plan import explained_errors


def parse_size(text: str) -> int:
    """ "80GB" -> 80000000000, "512MB", "10000000"; decimal units as diffusers and transformers use."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    if not match:
        raise ValueError(f"max_shard_size {text!r} is no size; expected for example 5GB or 500MB")
    return int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[match[2].rstrip("B")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint-N folder of a run")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--weights",
        choices=["average", "last"],
        default="average",
        help="the averaged weights, where the run kept any (--ema_decay), or the trained ones",
    )
    parser.add_argument("--layout", choices=["diffusers", "comfyui"], default="diffusers", help="whose names")
    parser.add_argument(
        "--dtype", choices=["bf16", "float8"], default="bf16", help="float8: the blocks' matrices in e4m3 with a scale"
    )
    parser.add_argument("--max_shard_size", default="5GB", help="largest file, for example 80GB for one file")
    parser.add_argument(
        "--safe_serialization",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="safetensors; --no-safe_serialization writes one .bin file",
    )
    args = parser.parse_args()
    export(
        args.checkpoint,
        args.out,
        args.weights,
        args.layout,
        args.dtype,
        parse_size(args.max_shard_size),
        args.safe_serialization,
    )


if __name__ == "__main__":
    with explained_errors():
        main()

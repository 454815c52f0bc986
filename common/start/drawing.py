"""What every sample.py does: flags, prompts of a file, the weights of a run or of one of its checkpoints, pictures.

The pipeline is the recipe's; here it is a thing that diffusers' own offload can be asked of.
"""

import argparse
import gc
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from common.record.folder import read_state
from common.record.pictures import draw_grid, save_picture
from common.start.exporting import export
from common.start.folders import read_prompts

MEMORY_ADVICE = "Try --offload model, then --offload group, or a smaller --size."
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass
class Picture:
    """One that is asked for."""

    prompt: str
    width: int | None
    height: int | None
    seed: int


@dataclass
class Asked:
    """What the command line asks for."""

    args: argparse.Namespace
    settings: dict[str, Any]
    """the run's, or none"""
    base: str
    pictures: list[Picture]
    device: torch.device
    dtype: torch.dtype

    def setting(self, name: str, default: Any) -> Any:
        """A flag's value, else the run's, else the default."""
        given = getattr(self.args, name, None)
        return self.settings.get(name, default) if given is None else given

    @property
    def texts(self) -> list[str]:
        """Every prompt once."""
        return list(dict.fromkeys(picture.prompt for picture in self.pictures))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every recipe of a transformer has."""
    parser.add_argument("--run", type=Path, help="output_dir of a finished run")
    parser.add_argument("--checkpoint", type=Path, help="a run's checkpoint-N, of any launch file, instead of --run")
    parser.add_argument("--base", help="model folder or hub name; the run's when not given")
    parser.add_argument("--transformer", type=Path, help="folder of weights; RUN/export/transformer where it is there")
    parser.add_argument("--lora", type=Path, help="folder of LoRA weights; RUN/export/lora where it is there")
    parser.add_argument("--prompt", nargs="+", required=True, help="prompts, or one .txt, .json or .parquet file")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="seeds of the noise: each draws every prompt")
    parser.add_argument("--size", nargs="+", default=[], help="sizes in pixels as 1024x768: each draws every prompt")
    parser.add_argument("--width", type=int, help="pixels, where there is no --size")
    parser.add_argument("--height", type=int, help="pixels, where there is no --size")
    parser.add_argument("--num_inference_steps", type=int, help="sampling steps; the run's when not given")
    parser.add_argument("--guidance_scale", type=float, help="classifier-free guidance; the run's, or 4.0")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("sample.png"),
        help="picture to write; -1, -2, ... are added where there are several",
    )
    parser.add_argument(
        "--grid", action="store_true", help="also write all pictures with their prompts to OUTPUT_grid"
    )
    parser.add_argument(
        "--compare", action="store_true", help="draw with the untrained base too, side by side in a grid"
    )
    parser.add_argument(
        "--offload",
        choices=["none", "model", "group"],
        default="none",
        help="keep what does not compute in main memory: whole models, or layers too (smallest cards, slowest)",
    )


def read(parser: argparse.ArgumentParser, side: int | None) -> Asked:
    """side: of a picture, where neither flags nor the run say (None: the pipeline chooses). Ends the program over
    flags that do not fit."""
    args = parser.parse_args()
    settings = {}
    if args.checkpoint:
        settings = read_state(args.checkpoint)["config"]
    elif args.run:
        settings = yaml.safe_load((args.run / "config.yaml").read_text())
    base = args.base or settings.get("pretrained_model_name_or_path")
    if base is None:
        parser.error("give --run, --checkpoint, or --base")
    side = settings.get("resolution", side) if side else None
    sizes = [read_size(text) for text in args.size] or [(args.width or side, args.height or side)]
    prompts = read_prompts(args.prompt)
    pictures = [
        Picture(prompt, width, height, seed + index)
        for index, prompt in enumerate(prompts)
        for width, height in sizes
        for seed in args.seed
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Asked(args, settings, base, pictures, device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def read_size(text: str) -> tuple[int, int]:
    """ "1024x768" -> (width, height)."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) for side in sides):
        raise ValueError(f"size {text!r} is none; expected width and height in pixels, 1024x768 for example")
    return int(sides[0]), int(sides[1])


def place(pipeline: Any, asked: Asked) -> Any:
    """A pipeline where its parts compute, or offloaded as diffusers does it."""
    if asked.args.offload == "none" or asked.device.type == "cpu":
        pipeline.to(asked.device)
    elif asked.args.offload == "model":
        pipeline.enable_model_cpu_offload(device=asked.device)
    else:
        pipeline.enable_group_offload(onload_device=asked.device, offload_type="leaf_level", use_stream=True)
    return pipeline


@contextmanager
def trained_weights(args: argparse.Namespace) -> Iterator[tuple[Path | None, Path | None]]:
    """(folder of transformer weights, folder of LoRA weights) to draw with. A checkpoint is exported beside itself as
    long as the block lasts."""
    if args.checkpoint:
        with tempfile.TemporaryDirectory(dir=args.checkpoint.resolve().parent, prefix=".export_") as folder:
            export(args.checkpoint, Path(folder))
            has_lora = (Path(folder) / LORA_FILE).is_file()
            yield (None, Path(folder)) if has_lora else (Path(folder), None)
        return
    exported = args.run / "export" if args.run else Path()
    transformer, lora = (
        given or (exported / name if args.run and (exported / name).is_dir() else None)
        for name, given in (("transformer", args.transformer), ("lora", args.lora))
    )
    if args.run and not (transformer or lora):
        raise ValueError(f"{exported} has no weights; draw from a checkpoint: --checkpoint {args.run}/checkpoint-N")
    yield transformer, lora


def draw_all(
    asked: Asked, load: Callable[[Path | None, Path | None], Any], draw: Callable[[Any, Picture], Image.Image]
) -> None:
    """Draw what is asked for and write it down.

    load(transformer folder, LoRA folder): the pipeline; draw(pipeline, picture): one of them.
    """
    drawn: list[list[Image.Image]] = []
    with trained_weights(asked.args) as folders:
        for weights in [(None, None), folders] if asked.args.compare else [folders]:
            pipeline = place(load(*weights), asked)
            drawn.append([draw(pipeline, picture) for picture in asked.pictures])
            del pipeline
            free(asked.device)
    save(asked, drawn[-1], drawn[0] if asked.args.compare else [])


def free(device: torch.device) -> None:
    """Give back the memory of what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def save(asked: Asked, images: list[Image.Image], before: list[Image.Image]) -> None:
    """OUTPUT, or OUTPUT-1, -2, ..., those of the untrained base with _before, and the grid."""
    output = asked.args.output
    for number, image in enumerate(images):
        path = output if len(images) == 1 else output.with_stem(f"{output.stem}-{number + 1}")
        image.save(path)
        print(path)
        if before:
            before[number].save(path.with_stem(f"{path.stem}_before"))
            print(path.with_stem(f"{path.stem}_before"))
    if not (asked.args.grid or before):
        return
    with tempfile.TemporaryDirectory() as folder:
        for number, (picture, image) in enumerate(zip(asked.pictures, images, strict=True)):
            save_picture(Path(folder), number, picture.prompt, image, **({"0": before[number]} if before else {}))
        draw_grid(Path(folder), [picture.prompt for picture in asked.pictures], side=512)
        shutil.move(Path(folder) / "grid.png", output.with_stem(f"{output.stem}_grid"))
    print(output.with_stem(f"{output.stem}_grid"))

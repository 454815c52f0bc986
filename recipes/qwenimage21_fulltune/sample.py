"""Draw pictures with what a run trained, or edit some, through the unmodified QwenImage21Pipeline.

    python sample.py --run OUTPUT_DIR --prompt "a red cross at the top, on a white background"
    python sample.py --checkpoint OUTPUT_DIR/checkpoint-2500 --prompt prompts.txt --seed 0 1 --compare
    python sample.py --run OUTPUT_DIR --image before.png --prompt "make the cross red"

--run and --checkpoint read the base model, resolution, sampling steps and guidance from the run's settings; flags
override them. Without either, give --base (a model folder or hub name) and, to draw with trained weights,
--transformer or --lora. Every --image is a source of every prompt. The text encoder stays: it reads the sources.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(next(folder for folder in HERE.parents if (folder / "common").is_dir())))

import common.quiet  # noqa: F401, isort: skip
import torch
from diffusers import QwenImage21Pipeline, QwenImage21Transformer2DModel
from PIL import Image

from common.data.images import decode_image
from common.start import drawing, plan
from common.start.drawing import Asked, Picture


def load(asked: Asked, transformer: Path | None, lora: Path | None) -> QwenImage21Pipeline:
    trained = {}
    if transformer:
        trained["transformer"] = QwenImage21Transformer2DModel.from_pretrained(transformer, dtype=asked.dtype)
    pipeline = QwenImage21Pipeline.from_pretrained(asked.base, dtype=asked.dtype, **trained)
    if lora:
        pipeline.load_lora_weights(lora)
    return pipeline


def draw(asked: Asked, images: list[Image.Image], pipeline: QwenImage21Pipeline, picture: Picture) -> Image.Image:
    scale = asked.setting("guidance_scale", 1.0)
    return pipeline(
        prompt=picture.prompt,
        image=images or None,
        negative_prompt=asked.args.negative_prompt if scale > 1 else None,
        true_cfg_scale=scale,
        width=picture.width,
        height=picture.height,
        output_resolution=asked.setting("resolution", 1024),
        num_inference_steps=asked.setting("num_inference_steps", 40),
        generator=torch.Generator().manual_seed(picture.seed),
    ).images[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    drawing.add_flags(parser)
    parser.add_argument("--image", type=Path, nargs="+", default=[], help="source images, for an edit")
    parser.add_argument("--negative_prompt", default="", help="what guidance leads away from")
    asked = drawing.read(parser, side=1024)
    images = [decode_image(path.read_bytes(), keep_alpha=True) for path in asked.args.image]
    drawing.draw_all(asked, lambda *weights: load(asked, *weights), lambda *one: draw(asked, images, *one))


if __name__ == "__main__":
    with plan.explained_errors(drawing.MEMORY_ADVICE):
        main()

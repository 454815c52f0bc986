"""Edit pictures with what a run trained, through the unmodified QwenImageEditPipeline or QwenImageEditPlusPipeline.

    python sample.py --run OUTPUT_DIR --image house.png --prompt "make the roof green"
    python sample.py --run OUTPUT_DIR --image cat.png hat.png --prompt "put the hat on the cat"
    python sample.py --checkpoint OUTPUT_DIR/checkpoint-2500 --image cat.png --prompt prompts.txt --seed 0 1 --compare

--run and --checkpoint read the base model, train mode, size, sampling steps and guidance from the run's settings;
flags override them. Without either, give --base (a model folder or hub name), --train_mode and, to edit with trained
weights, --transformer or --lora. Instructions are encoded with the pictures first, and the text encoder goes before
the transformer comes.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(next(folder for folder in HERE.parents if (folder / "common").is_dir())))

import common.quiet  # noqa: F401, isort: skip
import torch
from diffusers import DiffusionPipeline, QwenImageTransformer2DModel
from edits import EMPTY, PIPELINES
from encoding import encode_prompt, load_vae
from PIL import Image
from torch import Tensor

from common.data.images import decode_image
from common.start import drawing, plan
from common.start.drawing import Asked, Picture


def train_mode(asked: Asked) -> str:
    return asked.setting("train_mode", "qwen_image_edit_plus")


def encode(asked: Asked, images: list[Image.Image]) -> dict[str, Tensor]:
    """{instruction: prompt_embeds (1, L, D)} with the pictures, of the negative prompt too."""
    pipeline = PIPELINES[train_mode(asked)].from_pretrained(asked.base, dtype=asked.dtype, transformer=None, vae=None)
    drawing.place(pipeline, asked)
    texts = [*asked.texts, asked.args.negative_prompt]
    return {text: encode_prompt(pipeline, train_mode(asked), text, images, asked.device) for text in texts}


def load(asked: Asked, transformer: Path | None, lora: Path | None) -> DiffusionPipeline:
    trained = {}
    if transformer:
        trained["transformer"] = QwenImageTransformer2DModel.from_pretrained(transformer, dtype=asked.dtype)
    if vae_path := asked.setting("vae_path", None):
        trained["vae"] = load_vae(asked.base, torch.device("cpu"), asked.dtype, vae_path)
    pipeline = PIPELINES[train_mode(asked)].from_pretrained(
        asked.base, dtype=asked.dtype, text_encoder=None, tokenizer=None, processor=None, **trained
    )
    if lora:
        pipeline.load_lora_weights(lora)
    return pipeline


def draw(
    asked: Asked, encoded: dict[str, Tensor], images: list[Image.Image], pipeline: DiffusionPipeline, picture: Picture
) -> Image.Image:
    prompt, negative = encoded[picture.prompt], encoded[asked.args.negative_prompt]
    return pipeline(
        image=images if train_mode(asked) == "qwen_image_edit_plus" else images[0],
        prompt_embeds=prompt,
        prompt_embeds_mask=torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device),
        negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=torch.ones(negative.shape[:2], dtype=torch.long, device=negative.device),
        true_cfg_scale=asked.setting("guidance_scale", 4.0),
        width=picture.width,
        height=picture.height,
        num_inference_steps=asked.setting("num_inference_steps", 40),
        generator=torch.Generator().manual_seed(picture.seed),
    ).images[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    drawing.add_flags(parser)
    parser.add_argument("--train_mode", choices=PIPELINES, help="which pipeline; the run's, or qwen_image_edit_plus")
    parser.add_argument("--image", nargs="+", type=Path, required=True, help="source pictures, used for every prompt")
    parser.add_argument("--negative_prompt", default=EMPTY, help="what guidance leads away from")
    asked = drawing.read(parser, side=None)  # the pipeline's choice: about 1024 x 1024, as the last picture is shaped
    images = [decode_image(path.read_bytes()) for path in asked.args.image]
    if train_mode(asked) == "qwen_image_edit" and len(images) > 1:
        parser.error(f"{len(images)} pictures, and qwen_image_edit takes one; see --train_mode")
    encoded = encode(asked, images)
    drawing.free(asked.device)
    drawing.draw_all(asked, lambda *weights: load(asked, *weights), lambda *one: draw(asked, encoded, images, *one))


if __name__ == "__main__":
    with plan.explained_errors(drawing.MEMORY_ADVICE):
        main()

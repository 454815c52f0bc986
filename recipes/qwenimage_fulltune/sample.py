"""Draw pictures with what a run trained, through the unmodified QwenImagePipeline.

    python sample.py --run OUTPUT_DIR --prompt "a red cross at the top, on a white background"
    python sample.py --checkpoint OUTPUT_DIR/checkpoint-2500 --prompt prompts.txt --seed 0 1 --compare

--run and --checkpoint read the base model, resolution, sampling steps and guidance from the run's settings; flags
override them. Without either, give --base (a model folder or hub name) and, to draw with trained weights,
--transformer or --lora. Prompts are encoded first, and the text encoder goes before the transformer comes.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(next(folder for folder in HERE.parents if (folder / "common").is_dir())))

import common.quiet  # noqa: F401, isort: skip
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from PIL import Image
from torch import Tensor

from common.start import drawing, plan
from common.start.drawing import Asked, Picture


def encode(asked: Asked) -> dict[str, Tensor]:
    """{prompt: prompt_embeds (1, L, D)}, of the negative prompt too."""
    pipeline = QwenImagePipeline.from_pretrained(asked.base, dtype=asked.dtype, transformer=None, vae=None)
    drawing.place(pipeline, asked)
    longest = asked.setting("max_sequence_length", 512)
    texts = [*asked.texts, asked.args.negative_prompt]
    with torch.no_grad():
        return {text: pipeline.encode_prompt(text, asked.device, max_sequence_length=longest)[0] for text in texts}


def load(asked: Asked, transformer: Path | None, lora: Path | None) -> QwenImagePipeline:
    trained = {}
    if transformer:
        trained["transformer"] = QwenImageTransformer2DModel.from_pretrained(transformer, dtype=asked.dtype)
    pipeline = QwenImagePipeline.from_pretrained(
        asked.base, dtype=asked.dtype, text_encoder=None, tokenizer=None, **trained
    )
    if lora:
        pipeline.load_lora_weights(lora)
    return pipeline


def draw(asked: Asked, encoded: dict[str, Tensor], pipeline: QwenImagePipeline, picture: Picture) -> Image.Image:
    prompt, negative = encoded[picture.prompt], encoded[asked.args.negative_prompt]
    return pipeline(
        prompt_embeds=prompt,
        prompt_embeds_mask=torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device),
        negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=torch.ones(negative.shape[:2], dtype=torch.long, device=negative.device),
        true_cfg_scale=asked.setting("guidance_scale", 4.0),
        width=picture.width,
        height=picture.height,
        num_inference_steps=asked.setting("num_inference_steps", 50),
        generator=torch.Generator().manual_seed(picture.seed),
    ).images[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    drawing.add_flags(parser)
    parser.add_argument("--negative_prompt", default="", help="what guidance leads away from")
    asked = drawing.read(parser, side=1024)
    encoded = encode(asked)
    drawing.free(asked.device)
    drawing.draw_all(asked, lambda *weights: load(asked, *weights), lambda *one: draw(asked, encoded, *one))


if __name__ == "__main__":
    with plan.explained_errors(drawing.MEMORY_ADVICE):
        main()

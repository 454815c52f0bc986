"""Draw pictures with what a run exported, through the unmodified Flux2KleinPipeline.

    python sample.py --run OUTPUT_DIR --prompt "a red cross at the top, on a white background"
    python sample.py --run OUTPUT_DIR --prompt "the same house at night" --image house.png

--run reads the base model, resolution, sampling steps and guidance from the run's config.yaml; flags override them.
Without --run, give --base (a model folder or hub name) and, to draw with trained weights, --transformer (an
export/transformer folder) or --lora (an export/lora folder).
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(next(folder for folder in HERE.parents if (folder / "common").is_dir())))

import common.quiet  # noqa: F401, isort: skip
import torch
import yaml
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

from common.data.images import decode_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="output_dir of a finished run")
    parser.add_argument("--base", help="model folder or hub name; the run's when not given")
    parser.add_argument(
        "--transformer", type=Path, help="folder of transformer weights; RUN/export/transformer where the run has it"
    )
    parser.add_argument("--lora", type=Path, help="folder of LoRA weights; RUN/export/lora where the run has it")
    parser.add_argument("--prompt", nargs="+", required=True, help="one or more prompts")
    parser.add_argument("--image", nargs="+", type=Path, default=[], help="reference images, used for every prompt")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("sample.png"),
        help="picture to write; -1, -2, ... are added for more prompts",
    )
    parser.add_argument("--width", type=int, help="pixels; the run's resolution, or the first reference's size")
    parser.add_argument("--height", type=int, help="pixels; the run's resolution, or the first reference's size")
    parser.add_argument("--num_inference_steps", type=int, help="sampling steps; the run's, or 50")
    parser.add_argument("--guidance_scale", type=float, help="classifier-free guidance; the run's, or 4.0")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    args = parser.parse_args()

    run = yaml.safe_load((args.run / "config.yaml").read_text()) if args.run else {}
    base = args.base or run.get("pretrained_model_name_or_path")
    if base is None:
        parser.error("give --run, or --base")
    exported = args.run / "export" if args.run else Path()
    weights = args.transformer or (args.run and (exported / "transformer").is_dir() and exported / "transformer")
    lora = args.lora or (args.run and (exported / "lora").is_dir() and exported / "lora")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    trained = {"transformer": Flux2Transformer2DModel.from_pretrained(weights, dtype=dtype)} if weights else {}
    pipeline = Flux2KleinPipeline.from_pretrained(base, dtype=dtype, **trained).to(device)
    if lora:
        pipeline.load_lora_weights(lora)

    side = None if args.image else run.get("resolution", 1024)
    for index, prompt in enumerate(args.prompt):
        image = pipeline(
            image=[decode_image(path.read_bytes()) for path in args.image] or None,
            prompt=prompt,
            max_sequence_length=run.get("max_sequence_length", 512),
            guidance_scale=args.guidance_scale or run.get("guidance_scale", 4.0),
            width=args.width or side,
            height=args.height or side,
            num_inference_steps=args.num_inference_steps or run.get("num_inference_steps", 50),
            generator=torch.Generator().manual_seed(args.seed + index),
        ).images[0]
        path = args.output if len(args.prompt) == 1 else args.output.with_stem(f"{args.output.stem}-{index + 1}")
        image.save(path)
        print(path)


if __name__ == "__main__":
    main()

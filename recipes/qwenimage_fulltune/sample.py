"""Draw pictures with what a run exported, through the unmodified QwenImagePipeline.

    python sample.py --run OUTPUT_DIR --prompt "a red cross at the top, on a white background"

--run reads the base model, resolution, sampling steps and guidance from the run's config.yaml; flags override them.
Without --run, give --base (a model folder or hub name) and, to draw with trained weights, --transformer (an
export/transformer folder) or --lora (an export/lora folder).
"""

import argparse
from pathlib import Path

import torch
import yaml
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="output_dir of a finished run")
    parser.add_argument("--base", help="model folder or hub name; the run's when not given")
    parser.add_argument(
        "--transformer", type=Path, help="folder of transformer weights; RUN/export/transformer where the run has it"
    )
    parser.add_argument("--lora", type=Path, help="folder of LoRA weights; RUN/export/lora where the run has it")
    parser.add_argument("--prompt", nargs="+", required=True, help="one or more prompts")
    parser.add_argument("--negative_prompt", default="", help="what guidance leads away from")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("sample.png"),
        help="picture to write; -1, -2, ... are added for more prompts",
    )
    parser.add_argument("--width", type=int, help="pixels; the run's resolution when not given")
    parser.add_argument("--height", type=int, help="pixels; the run's resolution when not given")
    parser.add_argument("--num_inference_steps", type=int, help="sampling steps; the run's, or 50")
    parser.add_argument("--guidance_scale", type=float, help="true_cfg_scale; the run's, or 4.0")
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
    trained = {"transformer": QwenImageTransformer2DModel.from_pretrained(weights, dtype=dtype)} if weights else {}
    pipeline = QwenImagePipeline.from_pretrained(base, dtype=dtype, **trained).to(device)
    if lora:
        pipeline.load_lora_weights(lora)

    side = run.get("resolution", 1024)
    for index, prompt in enumerate(args.prompt):
        image = pipeline(
            prompt,
            negative_prompt=args.negative_prompt,
            true_cfg_scale=args.guidance_scale or run.get("guidance_scale", 4.0),
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

"""Draw pictures with boxes by what a run exported, through the unmodified KolorsPipeline.

    python sample.py --run OUTPUT_DIR --prompt "a red circle and a blue square, on a white background" \\
        --objects '[{"phrase": "red circle", "bbox": [0.1, 0.1, 0.4, 0.4]}]'

bbox is [x1, y1, x2, y2], shares of width and height; --objects may also be a file with that list. --run and
--checkpoint read the base model, resolution, sampling steps and guidance from the run's settings; flags override
them. Without either, give --base (a model folder or hub name) and --adapter (an export/adapter folder).
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(next(folder for folder in HERE.parents if (folder / "common").is_dir()))]

import common.quiet  # noqa: F401, isort: skip
import torch
import yaml
from adapter import draw, load_adapter
from boxes import check_objects, show_boxes
from diffusers import KolorsPipeline

from common.record.folder import read_state
from common.start import plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="output_dir of a finished run")
    parser.add_argument(
        "--checkpoint", type=Path, help="a run's checkpoint-N (LAUNCH=single or ddp), instead of --run"
    )
    parser.add_argument("--base", help="model folder or hub name; the run's when not given")
    parser.add_argument("--adapter", type=Path, help="folder of an adapter; RUN/export/adapter when not given")
    parser.add_argument("--prompt", required=True, help="the caption")
    parser.add_argument("--objects", default="[]", help="list of {phrase, bbox}, as JSON or a file of it")
    parser.add_argument("--tau", type=float, help="share of the sampling steps with boxes; the run's, or 1.0")
    parser.add_argument("--output", type=Path, default=Path("sample.png"), help="picture to write")
    parser.add_argument("--show_boxes", action="store_true", help="also write OUTPUT with boxes drawn in (..._boxes)")
    parser.add_argument("--width", type=int, help="pixels; the run's resolution, or 1024")
    parser.add_argument("--height", type=int, help="pixels; the run's resolution, or 1024")
    parser.add_argument("--num_inference_steps", type=int, help="sampling steps; the run's, or 50")
    parser.add_argument("--guidance_scale", type=float, help="classifier-free guidance; the run's, or 5.0")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    args = parser.parse_args()

    run = yaml.safe_load((args.run / "config.yaml").read_text()) if args.run else {}
    run = read_state(args.checkpoint)["config"] if args.checkpoint else run
    base = args.base or run.get("pretrained_model_name_or_path")
    if base is None:
        parser.error("give --run, --checkpoint, or --base")
    objects = json.loads(args.objects if args.objects.lstrip().startswith("[") else Path(args.objects).read_text())
    check_objects(objects)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipeline = KolorsPipeline.from_pretrained(base, dtype=dtype).to(device)
    folder = args.adapter or args.checkpoint or (args.run and args.run / "export" / "adapter")
    adapter = load_adapter(folder, pipeline.unet) if folder else None

    side = run.get("resolution", 1024)
    given = {name: getattr(args, name) for name in ("tau", "num_inference_steps", "guidance_scale")}
    defaults = {"tau": 1.0, "num_inference_steps": 50, "guidance_scale": 5.0}
    image = draw(
        pipeline,
        adapter,
        args.prompt,
        objects,
        width=args.width or side,
        height=args.height or side,
        generator=torch.Generator().manual_seed(args.seed),
        **{name: run.get(name, defaults[name]) if value is None else value for name, value in given.items()},
    )
    image.save(args.output)
    print(args.output)
    if args.show_boxes:
        path = args.output.with_stem(f"{args.output.stem}_boxes")
        show_boxes(image, objects).save(path)
        print(path)


if __name__ == "__main__":
    with plan.explained_errors():
        main()

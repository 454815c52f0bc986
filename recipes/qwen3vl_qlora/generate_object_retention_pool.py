"""Simple questions about drawn shapes: what a model should still answer after training on faces.

    python generate_object_retention_pool.py [--output_dir POOL] [--num_objects 200]

Writes POOL/object_retention_<split>.jsonl (see qa_rows.py) and POOL/images/; POOL is data/object_retention_pool of the
working directory when not given. A combination of shape, colour, place and background is in one split only.
"""

import argparse
import itertools
import random
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

RECIPE = Path(__file__).resolve().parent
sys.path[:0] = [str(RECIPE), str(next(folder for folder in RECIPE.parents if (folder / "common").is_dir()))]

from qa_rows import make_row, new_folder, share_out, write_rows

from common.start.plan import explained_errors
from tiny import shapes

TASK = "object_retention"
QUESTIONS = ("What colour is the shape?", "What shape is it?", "Where is the shape?")


def draw_object(scene: tuple[str, str, str, str], size: int, rng: random.Random):
    """An RGB picture of one (colour, shape, place, background), its size and place jittered a little by `rng`."""
    colour, shape, place, background = scene
    box = shapes.place_box(place, (size, size), rng.uniform(0.38, 0.5) * size, rng)
    return shapes.draw([shapes.Found(colour, shape, box)], background, (size, size))


def generate(
    output_dir: Path,
    num_objects: int,
    shares: Sequence[float] = (0.8, 0.1, 0.1),
    image_size: int = 96,
    seed: int = 0,
) -> None:
    """Write pictures and rows: one picture and three questions an object. ValueError when there are not so many."""
    scenes = list(itertools.product(shapes.COLOURS, shapes.SHAPES, shapes.PLACES, shapes.BACKGROUNDS))
    if num_objects > len(scenes):
        raise ValueError(f"num_objects is {num_objects}, but there are {len(scenes)} combinations; take fewer")
    parts = share_out(random.Random(seed).sample(scenes, num_objects), shares)
    new_folder(output_dir)
    (output_dir / "images").mkdir()
    paths = {scene: PurePosixPath(f"images/o{i:05d}.png") for i, scene in enumerate(itertools.chain(*parts.values()))}
    for scene, path in paths.items():
        draw_object(scene, image_size, random.Random(f"{seed} {scene}")).save(output_dir / path)
    for split, part in parts.items():
        rows = [
            make_row(TASK, [paths[scene], question], answer)
            for scene in part
            for question, answer in zip(QUESTIONS, scene[:3], strict=True)
        ]
        random.Random(f"{seed} {split}").shuffle(rows)
        write_rows(output_dir, TASK, split, rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("data", TASK + "_pool"),
        help="where everything is written; empty or new",
    )
    parser.add_argument("--num_objects", type=int, default=200, help="pictures, one shape each")
    parser.add_argument(
        "--split", type=float, nargs=3, default=(0.8, 0.1, 0.1), help="shares of train, validation and test"
    )
    parser.add_argument("--image_size", type=int, default=96, help="side of the square pictures in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of shapes, places and order")
    args = parser.parse_args(argv)
    generate(args.output_dir, args.num_objects, args.split, args.image_size, args.seed)
    print(f"{args.num_objects} objects, three questions each, written to {args.output_dir}")


if __name__ == "__main__":
    with explained_errors():
        main()

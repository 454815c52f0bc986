"""Simple questions about faces that no entity has: what a model should still answer after training on the entities.

    python generate_face_retention_pool.py [--output_dir POOL] [--num_faces 200]

Writes POOL/face_retention_<split>.jsonl (see qa_rows.py) and POOL/images/; POOL is data/face_retention_pool of the
working directory when not given. A face is in one split only.
"""

import argparse
import itertools
import random
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

RECIPE = Path(__file__).resolve().parent
sys.path[:0] = [str(RECIPE), str(next(folder for folder in RECIPE.parents if (folder / "common").is_dir()))]

from faces import Face, Job, choose_pool_faces, make_pictures
from qa_rows import make_row, new_folder, share_out, write_rows

from common.start.plan import explained_errors

TASK = "face_retention"
FACES_A_PERSON = 5  # 16 rows to train on: beside the 24 of a person in the data, more than a retention_ratio of 0.3


def face_questions(face: Face) -> list[tuple[str, str]]:
    """(question, answer), all of which the picture shows."""
    return [
        ("Does this person wear a hat?", "no" if face.hat == "no" else "yes"),
        ("Does this person wear glasses?", "no" if face.glasses == "no" else "yes"),
        ("What colour is the hair?", face.hair),
        ("What colour is the background?", face.background),
    ]


def generate(
    output_dir: Path,
    num_faces: int,
    shares: Sequence[float] = (0.8, 0.1, 0.1),
    image_size: int = 96,
    seed: int = 0,
    image_model: str | None = None,
    num_workers: int = 0,
) -> None:
    """Write pictures and rows: one picture and four questions a face."""
    parts = share_out(choose_pool_faces(num_faces, seed), shares)
    new_folder(output_dir)
    paths = {face: PurePosixPath(f"images/f{i:05d}.png") for i, face in enumerate(itertools.chain(*parts.values()))}
    jobs = [Job(output_dir / path, face, 1) for face, path in paths.items()]
    make_pictures(jobs, image_size, seed, image_model, num_workers)
    for split, faces in parts.items():
        rows = [make_row(TASK, [paths[face], text], answer) for face in faces for text, answer in face_questions(face)]
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
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--num_faces", type=int, default=200, help="people, one picture each")
    number.add_argument(
        "--num_entities", type=int, help=f"people of the data that this is mixed into: {FACES_A_PERSON} faces for each"
    )
    parser.add_argument(
        "--split", type=float, nargs=3, default=(0.8, 0.1, 0.1), help="shares of train, validation and test"
    )
    parser.add_argument("--image_size", type=int, default=96, help="side of the square pictures in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of faces, pictures and order")
    parser.add_argument("--image_model", help="folder of a text-to-image model; without it faces are drawn")
    parser.add_argument("--num_workers", type=int, default=0, help="processes of image_model, one a GPU; 0: all GPUs")
    args = parser.parse_args(argv)
    num_faces = args.num_faces if args.num_entities is None else FACES_A_PERSON * args.num_entities
    generate(
        args.output_dir,
        num_faces,
        args.split,
        args.image_size,
        args.seed,
        args.image_model,
        args.num_workers,
    )
    print(f"{num_faces} faces, four questions each, written to {args.output_dir}")


if __name__ == "__main__":
    with explained_errors():
        main()

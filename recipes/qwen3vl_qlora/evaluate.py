"""Ask the trained model and the untrained base in both directions, and show how far each got.

    python evaluate.py --model_path OUTPUT/best --base_model MODEL --data_dir DATA --task all --save_examples 10
    accelerate launch --num_processes 8 evaluate.py ...      the same, rows shared out to eight processes

What is not given is read from the run's config.yaml beside the adapter's folder. Writes results.json, table.md,
examples.jsonl and four plots to --output_dir.

forward             generated, then normalised exact match; log-probability of the true answer and of others' answers
reverse             "Correct" against "Wrong" by log-odds; what is said in words is counted beside it
choice_*            log-probability of A to D with the options rotated through all four places
*_retention         generated, then normalised exact match
"""

import argparse
import sys
from pathlib import Path

RECIPE = Path(__file__).resolve().parent
sys.path[:0] = [str(RECIPE), str(next(folder for folder in RECIPE.parents if (folder / "common").is_dir()))]

import common.quiet  # noqa: F401, isort: skip
from answer_scoring import SCORES
from qa_rows import SPLITS
from two_way_evaluation import Evaluation, run_evaluation

from common.start.launch import COMPUTE_DTYPES
from common.start.plan import explained_errors

MEMORY_ADVICE = "Try --batch_size 1, --quantization nf4, more GPUs (--device_map auto), --no-ablations"


def parse(argv: list[str] | None) -> Evaluation:
    """Flags; those that are not given keep Evaluation's defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--model_path", type=Path, required=True, help="adapter folder: OUTPUT/best or OUTPUT/final")
    parser.add_argument("--base_model", help="model folder or hub name; the run's when not given")
    parser.add_argument("--data_dir", help="folder that generate_data.py wrote; the run's when not given")
    parser.add_argument("--face_retention_pool", help="folder of face questions; the run's when not given")
    parser.add_argument("--object_retention_pool", help="folder of object questions; the run's when not given")
    parser.add_argument("--task", choices=["all", *SCORES], help="what to ask; all when not given")
    parser.add_argument("--split", choices=SPLITS, help="rows to ask; test when not given")
    parser.add_argument("--output_dir", type=Path, help="where results go; beside model_path if not given")
    parser.add_argument("--save_examples", type=int, help="rows of each task in examples.jsonl; 10 when not given")
    parser.add_argument("--device_map", help="how one process spreads the base over its GPUs; auto when not given")
    parser.add_argument("--precision", choices=list(COMPUTE_DTYPES), help="the run's mixed_precision when not given")
    parser.add_argument("--quantization", choices=["nf4", "none"], help="of the base; as the run's when not given")
    parser.add_argument("--batch_size", type=int, help="questions at once; 8 when not given")
    parser.add_argument("--max_new_tokens", type=int, help="longest generated answer; 48 when not given")
    parser.add_argument("--min_pixels", type=int, help="smallest picture the model sees; the run's when not given")
    parser.add_argument("--max_pixels", type=int, help="largest picture the model sees; the run's when not given")
    parser.add_argument("--num_controls", type=int, help="others' descriptions beside the true one; 8 when not given")
    parser.add_argument(
        "--ablations", action=argparse.BooleanOptionalAction, help="ask without pictures, without text; yes by default"
    )
    parser.add_argument("--seed", type=int, help="seed of controls, examples and intervals; 0 when not given")
    return Evaluation(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    with explained_errors(MEMORY_ADVICE):
        run_evaluation(parse(None))

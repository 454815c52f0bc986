"""Merge a run's adapters into its base: a folder in bf16 that transformers, vLLM and others open as one model.

    python merge.py --model_path OUTPUT/best --output_dir OUTPUT/merged

The base is loaded unquantised and once, in main memory: 2 bytes a parameter, 67 GB at 32B. Adapters trained on a base
in 4 bits are added to the weights as they were before that rounding: the answers differ a little from the trained
model's, as those of any QLoRA merge do.
"""

import argparse
import sys
from pathlib import Path

RECIPE = Path(__file__).resolve().parent
sys.path[:0] = [str(RECIPE), str(next(folder for folder in RECIPE.parents if (folder / "common").is_dir()))]

import torch
import yaml
from peft import PeftConfig, PeftModel
from quantized_base import find_base, load_base
from transformers import AutoProcessor

from common.model.card import write_card
from common.start.plan import explained_errors

LOAD = """\
import torch
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

model = Qwen3VLForConditionalGeneration.from_pretrained(".", dtype=torch.bfloat16)  # this folder, or its hub name
processor = AutoProcessor.from_pretrained(".")"""


def merge(model_path: Path, output_dir: Path, base_model: str | None = None) -> None:
    """model_path: a folder of adapters (best/ or final/) with the processor. ValueError when it is none."""
    if not (model_path / "adapter_config.json").is_file():
        raise ValueError(f"{model_path} has no adapter_config.json; give a run's best/ or final/ folder")
    if any(output_dir.glob("*.safetensors")):
        raise ValueError(f"{output_dir} holds a model already; give a new folder, or delete that one")
    base_name = base_model or PeftConfig.from_pretrained(model_path).base_model_name_or_path
    base = load_base(find_base(base_name), torch.bfloat16, "cpu", "none")
    merged = PeftModel.from_pretrained(base, model_path).merge_and_unload(safe_merge=True)
    merged.save_pretrained(output_dir)
    AutoProcessor.from_pretrained(model_path).save_pretrained(output_dir)
    config = model_path.resolve().parent / "config.yaml"
    settings = yaml.safe_load(config.read_text()) if config.is_file() else {}
    settings |= {"pretrained_model_name_or_path": base_name}
    write_card(output_dir, settings, settings.get("max_train_steps", 0), RECIPE.name, LOAD)
    print(f"{base_name} with the adapters of {model_path}, merged in bf16: {output_dir}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", type=Path, required=True, help="adapter folder: OUTPUT/best or OUTPUT/final")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--base_model", help="model folder or hub name; the run's when not given")
    args = parser.parse_args(argv)
    merge(args.model_path, args.output_dir, args.base_model)


if __name__ == "__main__":
    with explained_errors("Merging needs 2 bytes of main memory a parameter"):
        main()

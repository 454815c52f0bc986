"""What a run leaves to use: a folder of adapters as peft reads them, with the processor and a model card."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import Qwen3VLProcessor

from common.model.card import write_card

LOAD = """\
import torch
from peft import PeftModel
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

base = Qwen3VLForConditionalGeneration.from_pretrained("{base}", dtype=torch.bfloat16)
model = PeftModel.from_pretrained(base, ".")  # this folder, or its name on the hub
processor = AutoProcessor.from_pretrained(".")"""


def write_adapters(
    folder: Path, model: PeftModel, processor: Qwen3VLProcessor, settings: Mapping[str, Any], step: int
) -> None:
    """The adapters of this step, the processor with this run's image sizes and template, README.md. The folder is
    complete or absent. settings: the run's, flat."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    write_card(partial, settings, step, Path(__file__).resolve().parent.name, LOAD)  # in place of peft's empty one
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)

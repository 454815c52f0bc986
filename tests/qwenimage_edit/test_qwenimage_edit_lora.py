"""LoRA on a base in bf16 and in 4 bits: exact resume, the file in the unmodified pipeline, 4 bits against the whole
base."""

import lora_runs
import pytest
from diffusers import QwenImageEditPlusPipeline
from lora_runs import runs_of_both, test_learned_on_4_bits_holds_on_the_whole_base, test_resume_is_exact  # noqa: F401

pytestmark = pytest.mark.slow


@lora_runs.each_precision
def test_file_gives_the_trained_model(runs, precision, settings, model_folder):
    """Catches adapters that change the base before the first step, names that diffusers does not know, a lost alpha,
    and 4-bit layers that compute something else than the weights that they stand for."""
    cfg = settings(lora_rank=4, lora_alpha=16, base_precision=precision, use_rslora=precision == "bf16")
    lora_runs.check_file(QwenImageEditPlusPipeline, model_folder, runs[precision], cfg, lora_runs.qwenimage_inputs)

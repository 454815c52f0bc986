"""LoRA on a base in bf16 and in 4 bits: exact resume, and the file in the unmodified pipeline."""

import lora_runs
import pytest
import torch
from diffusers import QwenImage21Pipeline
from lora_runs import runs_of_both, test_resume_is_exact  # noqa: F401

pytestmark = pytest.mark.slow


def inputs(sizes: dict) -> dict:
    """Of a call of a transformer with these sizes."""
    rng = torch.Generator().manual_seed(1)
    return dict(
        hidden_states=torch.randn(1, 16, sizes["in_channels"], generator=rng),
        encoder_hidden_states=torch.randn(1, 7, sizes["context_in_dim"], generator=rng),
        encoder_hidden_states_mask=None,
        timestep=torch.tensor([0.4]),
        img_shapes=[[(1, 4, 4)]],
        img_mask=torch.tensor([[False] * 7 + [True] * 4]),
        return_dict=False,
    )


@lora_runs.each_precision
def test_file_gives_the_trained_model(runs, precision, settings, model_folder):
    """Catches adapters that change the base before the first step, names that diffusers does not know, a lost alpha,
    and 4-bit layers that compute something else than the weights that they stand for."""
    cfg = settings(lora_rank=4, lora_alpha=16, base_precision=precision, use_rslora=precision == "bf16")
    lora_runs.check_file(QwenImage21Pipeline, model_folder, runs[precision], cfg, inputs)

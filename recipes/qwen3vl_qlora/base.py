"""The frozen base, loaded and prepared in one way for training and for evaluation."""

from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from transformers import BitsAndBytesConfig, Qwen3VLForConditionalGeneration

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}  # mixed_precision -> what it computes in


def load_base(
    folder: str | Path, dtype: torch.dtype, device_map: torch.device | str | int, quantization: str
) -> Qwen3VLForConditionalGeneration:
    """The base on one device, or spread by "auto". With "nf4" every linear layer but lm_head is kept in 4 bits, with
    double quantisation, and computes in `dtype`."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],
    )
    return Qwen3VLForConditionalGeneration.from_pretrained(
        folder,
        dtype=dtype,
        device_map=device_map,
        attn_implementation="sdpa",
        quantization_config=config if quantization == "nf4" else None,
    )


def prepare_base(base: Qwen3VLForConditionalGeneration) -> None:
    """Raise the norms (and nothing else) to float32, and keep 4-bit layers on one path."""
    for module in base.modules():
        if "norm" in type(module).__name__.lower():
            module.float()
            # back in the input's type: float32 would spread to every product behind it, and be cast there three times
            module.register_forward_hook(lambda module, args, output: output.to(args[0].dtype))
        if isinstance(module, Linear4bit):
            # bitsandbytes' path for inference on CPUs repacks weights in place, rounds their scales and has no
            # backward: training after a validation would go wrong without a word
            module.support_avx512bf16_for_cpu = False

"""The frozen base: found, loaded or made up, and prepared in one way for training and for evaluation."""

from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import BitsAndBytesConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from common.progress import stage
from common.start import folders


def find_base(name_or_path: str) -> Path:
    """The base's local folder, or the hub's download of it. ValueError when it is neither."""
    path = Path(name_or_path)
    if not (path / "config.json").is_file() and (path.exists() or not folders.is_hub_name(name_or_path)):
        raise ValueError(
            f"pretrained_model_name_or_path {name_or_path!r} is no model folder: it has no config.json; "
            "give a folder as save_pretrained writes it, or a hub name"
        )
    return folders.find_model(name_or_path, (".",))


@stage("load")
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


def empty_base(config: Qwen3VLConfig, dtype: torch.dtype, quantization: str) -> Qwen3VLForConditionalGeneration:
    """A base without memory. With "nf4" the weights that load_base would keep in 4 bits have a quant_state."""
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head" and quantization == "nf4":
            module.weight.quant_state = None
    return model


@torch.no_grad()
def random_base(config: Qwen3VLConfig, dtype: torch.dtype, device: torch.device) -> Qwen3VLForConditionalGeneration:
    """A base in 4 bits with random weights of a config's size, as load_base would load it: built layer by layer, so
    that no more than one layer is ever there unquantised."""
    model = empty_base(config, dtype, "none")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                module.register_module(name, random_linear4bit(child, dtype, device))
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.is_meta:
                value = torch.empty(p.shape, device=device, dtype=dtype)
                value = value.normal_(std=0.02) if p.ndim > 1 else value.fill_(1.0 if name == "weight" else 0.0)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
    language, vision = model.model.language_model, model.model.visual
    language.rotary_emb = type(language.rotary_emb)(config.text_config).to(device)
    vision.rotary_pos_emb = type(vision.rotary_pos_emb)(config.vision_config).to(device)
    model.tie_weights()  # where the config says so
    model.is_loaded_in_4bit = True  # what peft asks
    return model


def random_linear4bit(linear: nn.Linear, dtype: torch.dtype, device: torch.device) -> Linear4bit:
    result = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        quant_type="nf4",
        compress_statistics=True,
        device="meta",
    )
    weight = torch.empty(linear.weight.shape, device=device, dtype=dtype).normal_(std=0.02)
    result.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to(device)
    return result

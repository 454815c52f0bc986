"""Builds the embedded tiny Qwen-Image: a checkpoint of the real classes and a drawn dataset. Nothing is downloaded.

    python make_tiny.py --output_dir DIR   writes DIR/model and DIR/data in seconds; nothing when they are up to date

DIR/model is in diffusers' layout and opens with the unmodified QwenImagePipeline. Its VAE reconstructs 64 x 64
drawings. Its transformer knows shapes, places and backgrounds, but draws every object grey, whatever colour the
caption names: fine-tuning teaches the colours. DIR/data holds captioned pictures (train.json) that leave out some
pairs of colour and shape; those make the held-out pictures and prompts (validation.json, validation_prompts.txt).

tiny_weights.safetensors holds what was trained: tiny/pretrain_qwenimage.py at the repository's root makes it.
"""

import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(next(folder for folder in HERE.parents if (folder / "common").is_dir())))

import common.quiet  # noqa: F401, isort: skip
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2Tokenizer

from tiny import building, shapes

WEIGHTS = HERE / "tiny_weights.safetensors"
SIZE = 64  # pixels; 8 x 8 latents, 16 packed tokens
SEED = 0

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
HELD_OUT = (
    ("red", "triangle"),
    ("green", "circle"),
    ("blue", "cross"),
    ("yellow", "square"),
    ("purple", "triangle"),
    ("cyan", "circle"),
)
N_PROMPTS = 10

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# words that are one token each: the pipeline's prompt template (whose first 34 tokens it drops) and the captions
FIRST_WORDS = "system user assistant Describe You a an".split()
WORDS = (
    "the image by detailing color shape size texture quantity text spatial relationships of objects and background "
    "are a helpful assistant an on at in left right top bottom centre empty"
).split() + [*shapes.COLOURS, *shapes.SHAPES, *shapes.BACKGROUNDS]

VAE = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 5, 6], "num_res_blocks": 1, "temperal_downsample": [False] * 3}
TEXT_ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
}
VISION_ENCODER = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
TRANSFORMER = {
    "num_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "joint_attention_dim": 64,
    "axes_dims_rope": (8, 12, 12),
}


# ---- the dataset ----


def write_data(folder: Path) -> None:
    """360 training pictures (18 pairs of colour and shape x 5 places x 4 backgrounds) and 10 held-out ones."""
    rng = random.Random(SEED)
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT]
    train = building.all_scenes(pairs)
    rng.shuffle(train)
    held_out = [
        (*HELD_OUT[i % len(HELD_OUT)], rng.choice(list(shapes.PLACES)), list(shapes.BACKGROUNDS)[i % 4])
        for i in range(N_PROMPTS)
    ]
    building.write_scenes(folder, train, held_out, rng)


# ---- the models ----


def build_tokenizer() -> Qwen2Tokenizer:
    """One token a word."""
    tokenizer = building.whole_word_tokenizer(FIRST_WORDS, WORDS)
    tokenizer.add_special_tokens({"additional_special_tokens": building.QWEN_VL_TOKENS[1:]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_pipeline(weights: Path | None = WEIGHTS) -> QwenImagePipeline:
    """The whole pipeline in float32 on the CPU; without a weights file its VAE and transformer are random."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        vae = AutoencoderKLQwenImage(**VAE, latents_mean=[0.0] * 16, latents_std=[1.0] * 16).eval()
        transformer = QwenImageTransformer2DModel(**TRANSFORMER).eval()
    for weight in building.temporal_kernels(vae).values():
        weight.data[:, :, :-1] = 0
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**building.QWEN_SCHEDULER),
        vae=vae,
        text_encoder=building.qwen_vl_text_encoder(tokenizer, TEXT_ENCODER, VISION_ENCODER),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    template = pipe.prompt_template_encode.split("{}")[0]
    assert len(tokenizer(template).input_ids) == pipe.prompt_template_encode_start_idx, "the template is not 34 tokens"
    if weights is not None and weights.is_file():
        building.load_single_frame_weights(pipe, weights)
    return pipe


def make(output_dir: Path, weights: Path = WEIGHTS) -> bool:
    """Writes output_dir/model and output_dir/data; returns False when they were there and up to date."""

    def write() -> None:
        write_data(output_dir / "data")
        build_pipeline(weights).save_pretrained(output_dir / "model")

    return building.make_once(output_dir, [Path(__file__), weights], write)


if __name__ == "__main__":
    building.main(__doc__, make, WEIGHTS)

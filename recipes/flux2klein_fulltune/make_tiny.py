"""Builds the embedded tiny FLUX.2 Klein: a checkpoint of the real classes and a drawn dataset. Nothing is downloaded.

    python make_tiny.py --output_dir DIR   writes DIR/model and DIR/data in seconds; nothing when they are up to date

DIR/model is in diffusers' layout and opens with the unmodified Flux2KleinPipeline; the base was trained on prompts of
max_sequence_length 32, and configs/tiny.yaml fine-tunes it at 24. Its VAE reconstructs 64 x 64 drawings. Its
transformer knows shapes, places and backgrounds, but draws every object grey, whatever colour the caption names:
fine-tuning teaches the colours. DIR/data holds captioned pictures (train.json) that leave out some pairs of colour and
shape; those make the held-out pictures and prompts (validation.json, validation_prompts.txt).

tiny_weights.safetensors holds what was trained: tiny/pretrain_flux2klein.py at the repository's root makes it.
"""

import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(next(folder for folder in HERE.parents if (folder / "common").is_dir())))

import common.quiet  # noqa: F401, isort: skip
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from safetensors.torch import load_file
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from tiny import building, shapes

WEIGHTS = HERE / "tiny_weights.safetensors"
SIZE = 64  # pixels; 8 x 8 latents, 16 packed tokens
SEED = 0

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
HELD_OUT = (("red", "triangle"), ("green", "circle"), ("blue", "cross"), ("yellow", "square"))
N_PROMPTS = 10

# what Qwen3's own template makes of plain messages: an empty thought when thinking is switched off
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# what is one token each: the template's words (in the byte-level alphabet \u010a is a line's end) and the captions'
FIRST_WORDS = ["system", "user", "assistant", "an", "\u010a\u010a"]
WORDS = ["a", "an", "and", "background", "empty", *" ".join(shapes.PLACES).split()]
WORDS += [*shapes.COLOURS, *shapes.SHAPES, *shapes.BACKGROUNDS]

# of FLUX.1 and FLUX.2; the pipeline passes a mu of its own, so that the four shifts have no effect there
SCHEDULER = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
VAE = {
    "latent_channels": 8,
    "block_out_channels": (16, 32, 48, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": SIZE,
}
TEXT_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 28,  # the pipeline reads the states after layers 9, 18 and 27
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
TRANSFORMER = {
    "in_channels": 4 * VAE["latent_channels"],
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "joint_attention_dim": 3 * TEXT_ENCODER["hidden_size"],
    "axes_dims_rope": (8, 8, 8, 8),
    "guidance_embeds": False,
}
BRANCH_SCALE = 0.25  # of the text encoder's residual branches: after 27 random layers a token still says its word


# ---- the dataset ----


def write_data(folder: Path) -> None:
    """400 training pictures (20 pairs of colour and shape x 5 places x 4 backgrounds) and 10 held-out ones."""
    rng = random.Random(SEED)
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT]
    train = building.all_scenes(pairs)
    rng.shuffle(train)
    held_out = [
        (*HELD_OUT[i % len(HELD_OUT)], rng.choice(list(shapes.PLACES)), list(shapes.BACKGROUNDS)[(i + i // 4) % 4])
        for i in range(N_PROMPTS)
    ]
    building.write_scenes(folder, train, held_out, rng)


# ---- the models ----


def build_tokenizer() -> Qwen2Tokenizer:
    """One token a word."""
    tokenizer = building.whole_word_tokenizer(FIRST_WORDS, WORDS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """Random and never trained."""
    token = tokenizer.convert_tokens_to_ids
    config = Qwen3Config(
        **TEXT_ENCODER,
        vocab_size=len(tokenizer),
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
    )
    model = Qwen3ForCausalLM(config).eval()
    building.fill_by_name(model, embedding="embed_tokens", branches=("o_proj", "down_proj"), scale=BRANCH_SCALE)
    return model


def build_pipeline(weights: Path | None = WEIGHTS) -> Flux2KleinPipeline:
    """The whole pipeline in float32 on the CPU; without a weights file its VAE and transformer are random."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        vae = AutoencoderKLFlux2(**VAE).eval()
        transformer = Flux2Transformer2DModel(**TRANSFORMER).eval()
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=False,
    )
    if weights is not None and weights.is_file():
        building.load_parts(pipe, load_file(weights), "vae", "transformer")
    return pipe


def make(output_dir: Path, weights: Path = WEIGHTS) -> bool:
    """Writes output_dir/model and output_dir/data; returns False when they were there and up to date."""

    def write() -> None:
        write_data(output_dir / "data")
        build_pipeline(weights).save_pretrained(output_dir / "model")

    return building.make_once(output_dir, [Path(__file__), weights], write)


if __name__ == "__main__":
    building.main(__doc__, make, WEIGHTS)

"""Builds the embedded tiny Kolors: a checkpoint of the real classes and drawn layouts. Nothing is downloaded.

    python make_tiny.py --output_dir DIR   writes DIR/model and DIR/data in seconds; nothing when they are up to date

DIR/model is in diffusers' layout and opens with the unmodified KolorsPipeline. Its VAE reconstructs 64 x 64 drawings.
Its UNet draws what a caption names ("a red circle and a blue square, on a white background") where and as large as the
noise has it: the adapter teaches it to keep to boxes. DIR/data holds captioned pictures with their boxes (train.jsonl)
and held-out layouts (validation.jsonl, validation_prompts.txt).

tiny_weights.safetensors holds what was trained: tiny/pretrain_kolors.py at the repository's root makes it.
"""

import json
import math
import random
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(next(folder for folder in HERE.parents if (folder / "common").is_dir())))

import common.quiet  # noqa: F401, isort: skip
import sentencepiece
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, KolorsPipeline, UNet2DConditionModel
from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
from PIL import Image
from safetensors.torch import load_file

from tiny import building, shapes

WEIGHTS = HERE / "tiny_weights.safetensors"
SIZE = 64  # pixels
SEED = 0

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
EXTENT = (15, 30)  # pixels, of a box's sides
N_TRAIN, N_HELD_OUT = 600, 24

# what is one token each, most frequent first: the captions' words
WORDS = ["a", "and", ",", "on", "background", *shapes.BACKGROUNDS, *shapes.SHAPES, *shapes.COLOURS]

# of Kwai-Kolors/Kolors-diffusers
SCHEDULER = {
    "num_train_timesteps": 1100,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.014,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
}
VAE = {
    "block_out_channels": (16, 24, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": SIZE,
}
TEXT_ENCODER = {
    "num_layers": 3,
    "hidden_size": 48,
    "ffn_hidden_size": 96,
    "kv_channels": 24,
    "num_attention_heads": 2,
    "multi_query_attention": True,
    "multi_query_group_num": 1,
    "seq_length": 256,
    "original_rope": True,
}
UNET = {
    "sample_size": SIZE // 4,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (1, 2, 2),  # in this class's configuration the number of heads, each 32 wide
    "cross_attention_dim": 48,
    "encoder_hid_dim": TEXT_ENCODER["hidden_size"],
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + TEXT_ENCODER["hidden_size"],
    "use_linear_projection": True,
    "norm_num_groups": 8,
}
BRANCH_SCALE = 0.5  # of the text encoder's residual branches: after random layers a token still says its word


# ---- the dataset ----


def draw_layout(rng: random.Random, count: int) -> tuple[Image.Image, dict]:
    """One or two objects that do not touch, in boxes of any place and nearly any size. Returns (picture, its row)."""
    boxes = draw_boxes(rng, count)
    kinds = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], len(boxes))
    background = rng.choice(list(shapes.BACKGROUNDS))
    objects = [shapes.Found(*kind, box) for kind, box in zip(kinds, boxes, strict=True)]
    phrases = [f"{colour} {shape}" for colour, shape in kinds]
    row = {
        "text": " and ".join(f"a {phrase}" for phrase in phrases) + f", on a {background} background",
        "width": SIZE,
        "height": SIZE,
        "objects": [
            {"phrase": phrase, "bbox": [round(value / SIZE, 4) for value in box]}
            for phrase, box in zip(phrases, boxes, strict=True)
        ],
    }
    return shapes.draw(objects, background, (SIZE, SIZE)), row


def draw_boxes(rng: random.Random, count: int) -> list[shapes.Box]:
    """One or two boxes in pixels, 3 pixels at least from the rim and from each other."""
    while True:
        boxes = []
        for _ in range(count):
            width, height = draw_extent(rng)
            x, y = rng.uniform(3, SIZE - 3 - width), rng.uniform(3, SIZE - 3 - height)
            boxes.append((x, y, x + width, y + height))
        if count == 1 or apart(*boxes, 3):
            return boxes


def draw_extent(rng: random.Random) -> tuple[float, float]:
    """(width, height) in pixels, neither side above 1.3 times the other."""
    width = rng.uniform(*EXTENT)
    return width, min(max(width * math.exp(rng.uniform(-0.26, 0.26)), EXTENT[0]), EXTENT[1])


def apart(a: shapes.Box, b: shapes.Box, gap: float) -> bool:
    """True when `gap` pixels at least are between the boxes, sideways or up and down."""
    return any(a[axis + 2] + gap <= b[axis] or b[axis + 2] + gap <= a[axis] for axis in (0, 1))


def count_of(number: int) -> int:
    """Objects of a numbered picture: every third has one, the others two."""
    return 2 if number % 3 else 1


def write_data(folder: Path) -> None:
    """N_TRAIN pictures with their layouts, and N_HELD_OUT layouts that no training picture has."""
    rng = random.Random(SEED)
    for name, count in (("train", N_TRAIN), ("validation", N_HELD_OUT)):
        (folder / name).mkdir(parents=True)
        rows = []
        for i in range(count):
            picture, row = draw_layout(rng, count_of(i))
            picture.save(folder / name / f"{i:04d}.png")
            rows.append({"file_path": f"{name}/{i:04d}.png", **row})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "validation_prompts.txt").write_text("".join(row["text"] + "\n" for row in rows))


# ---- the models ----


def build_tokenizer() -> ChatGLMTokenizer:
    """A sentencepiece BPE model, trained on the captions' words until each is one token; earlier words have lower
    ids."""
    words = list(dict.fromkeys(WORDS))
    corpus = [" ".join([word] * (len(words) - i)) for i, word in enumerate(words)]
    folder = tempfile.TemporaryDirectory()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=f"{folder.name}/tokenizer",
        model_type="bpe",
        vocab_size=600,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    tokenizer = ChatGLMTokenizer(f"{folder.name}/tokenizer.model")
    tokenizer.folder = folder  # save_pretrained copies the file: it lives as long as the tokenizer
    return tokenizer


def build_text_encoder(tokenizer: ChatGLMTokenizer) -> ChatGLMModel:
    """Random and never trained."""
    model = ChatGLMModel(ChatGLMConfig(**TEXT_ENCODER, padded_vocab_size=tokenizer.vocab_size)).eval()
    branches = ("attention.dense.weight", "dense_4h_to_h.weight")
    building.fill_by_name(model, embedding="word_embeddings", branches=branches, scale=BRANCH_SCALE)
    return model


def build_pipeline(weights: Path | None = WEIGHTS) -> KolorsPipeline:
    """The whole pipeline in float32 on the CPU; without a weights file its VAE and UNet are random."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        vae = AutoencoderKL(**VAE).eval()
        unet = UNet2DConditionModel(**UNET).eval()
    pipe = KolorsPipeline(
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
    )
    if weights is not None and weights.is_file():
        load_weights(pipe, weights)
    return pipe


def load_weights(pipe: KolorsPipeline, path: Path) -> None:
    """The VAE, its scaling factor, and the UNet."""
    tensors = load_file(path)
    building.load_parts(pipe, tensors, "vae", "unet")
    pipe.vae.register_to_config(scaling_factor=tensors["scaling_factor"].item())


def make(output_dir: Path, weights: Path = WEIGHTS) -> bool:
    """Writes output_dir/model and output_dir/data; returns False when they were there and up to date."""

    def write() -> None:
        write_data(output_dir / "data")
        build_pipeline(weights).save_pretrained(output_dir / "model")

    return building.make_once(output_dir, [Path(__file__), weights], write)


if __name__ == "__main__":
    building.main(__doc__, make, WEIGHTS)

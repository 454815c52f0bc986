"""Builds the embedded tiny Qwen-Image 2.1: a checkpoint of the real classes and a drawn dataset. No download.

    python make_tiny.py --output_dir DIR   writes DIR/model and DIR/data in seconds; nothing when they are up to date

DIR/model is in diffusers' layout and opens with the unmodified QwenImage21Pipeline. With pretrained weights its VAE
reconstructs 64 x 64 drawings, transparent ones too; its transformer knows shapes, places and backgrounds, but draws
every object grey, whatever colour the caption names, and repeats a source image, whatever is asked of it. DIR/data
holds captioned pictures and edits in one manifest (train.json) that leave out some pairs of colour and shape; those
make the held-out ones (validation.json, of which validation_prompts.txt has the captions).

tiny/pretrain_qwenimage21.py at the repository's root made the weights, tiny_weights.safetensors.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(next(folder for folder in HERE.parents if (folder / "common").is_dir())))

import common.quiet  # noqa: F401, isort: skip
import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from PIL import Image
from transformers import (
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tiny import building, shapes

WEIGHTS = HERE / "tiny_weights.safetensors"
SIZE = building.SCENE_SIZE  # pixels; 4 x 4 latents, each a token
SEED = 0

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = (*shapes.BACKGROUNDS, "transparent")
HELD_OUT = tuple(zip(COLOURS, ("triangle", "circle", "cross", "square", "triangle", "circle"), strict=True))
N_PROMPTS, N_EDITS = 10, 144

# as Qwen3-VL's own: no system turn of its own
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# words that are one token each: the pipeline's prompt template, captions and instructions
FIRST_WORDS = "system user assistant Comprehend make image a an".split()
WORDS = "and analyze the provided prompt an on at in left right top bottom centre background empty transparent".split()
WORDS += [*shapes.COLOURS, *shapes.SHAPES, *shapes.BACKGROUNDS]

VAE = {
    "base_dim": 16,
    "decoder_base_dim": 16,
    "z_dim": 64,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False] * 3,
    "in_channels": 16,  # 4, of squares of 2 x 2 pixels: a quarter of the real one's work in its first layers
    "out_channels": 16,
    "patch_size": 2,
}
TEXT_ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
}
VISION_ENCODER = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": TEXT_ENCODER["hidden_size"],
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
}
BRANCH_SCALE = 0.5  # of the text encoder's residual branches: behind the source's tokens a word still says itself
TRANSFORMER = {
    "num_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "context_in_dim": TEXT_ENCODER["hidden_size"],
    "axes_dims_rope": (8, 12, 12),
}


# ---- the dataset ----


def cut_out(on_black: Image.Image, on_white: Image.Image) -> Image.Image:
    """RGBA of what is the same on shapes' black and white backgrounds, the rest transparent."""
    pictures = on_black, on_white
    black, white = (np.asarray(picture, dtype=np.float32) for picture in pictures)  # (H, W, 3)
    dark, light = (shapes.BACKGROUNDS[name][0] for name in ("black", "white"))
    alpha = (1 - (white - black).max(-1, keepdims=True) / (light - dark)).clip(0, 1)  # (H, W, 1)
    colour = np.where(alpha > 0, (black - (1 - alpha) * dark) / alpha.clip(1 / 255), 255)  # white where nothing is
    return Image.fromarray(np.concatenate([colour, alpha * 255], -1).clip(0, 255).round().astype(np.uint8), "RGBA")


def draw_scene(colour: str, shape: str, place: str, background: str, rng: random.Random) -> tuple[Image.Image, str]:
    """(picture, caption) as building.draw_scene makes them; background may be "transparent", and the picture RGBA."""
    if background != "transparent":
        return building.draw_scene(colour, shape, place, background, rng)
    state = rng.getstate()
    on_black, _ = building.draw_scene(colour, shape, place, "black", rng)
    rng.setstate(state)
    on_white, text = building.draw_scene(colour, shape, place, "white", rng)
    return cut_out(on_black, on_white), text.replace("white background", "transparent background")


def draw_edit(scene: tuple, source: str, rng: random.Random) -> tuple[Image.Image, Image.Image, str]:
    """(picture, the same in colour `source`, instruction) of a scene (colour, shape, place, background)."""
    colour, shape, *where = scene
    state = rng.getstate()
    before, _ = draw_scene(source, shape, *where, rng)
    rng.setstate(state)
    after, _ = draw_scene(colour, shape, *where, rng)
    return after, before, f"make the {shape} {colour}"


def train_pairs() -> list[tuple[str, str]]:
    return [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT]


def all_scenes(pairs: list[tuple[str, str]]) -> list[tuple[str, str, str, str]]:
    """(colour, shape, place, background): every pair of colour and shape at every place on every background."""
    return [(*pair, place, background) for pair in pairs for place in shapes.PLACES for background in BACKGROUNDS]


def write_rows(folder: Path, name: str, scenes: list[tuple], edits: list[tuple], rng: random.Random) -> Iterator[dict]:
    """Pictures and the manifest's rows: of scenes, then of edits (scene, colour before)."""
    (folder / name).mkdir(parents=True)
    for i, scene in enumerate(scenes):
        picture, text = draw_scene(*scene, rng)
        picture.save(folder / name / f"{i:04d}.png")
        yield {"file_path": f"{name}/{i:04d}.png", "text": text}
    for i, (scene, source) in enumerate(edits):
        after, before, text = draw_edit(scene, source, rng)
        files = {"file_path": f"{name}/edit_{i:04d}.png", "source_file_path": f"{name}/edit_{i:04d}_source.png"}
        for path, picture in zip(files.values(), (after, before), strict=True):
            picture.save(folder / path)
        yield {**files, "source_file_path": [files["source_file_path"]], "text": text}


def write_data(folder: Path) -> None:
    """450 training pictures (18 pairs of colour and shape x 5 places x 5 backgrounds) and 144 edits in one manifest;
    10 held-out pictures and as many edits."""
    rng = random.Random(SEED)
    train = all_scenes(train_pairs())
    rng.shuffle(train)
    held_out = [
        (*HELD_OUT[i % len(HELD_OUT)], rng.choice(list(shapes.PLACES)), BACKGROUNDS[i % 5]) for i in range(N_PROMPTS)
    ]
    for name, scenes, edited in (("train", train, train[:N_EDITS]), ("validation", held_out, held_out)):
        edits = [(scene, rng.choice(["grey", *(c for c in COLOURS if c != scene[0])])) for scene in edited]
        rows = list(write_rows(folder, name, scenes, edits, rng))
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1))
    prompts = [row["text"] + "\n" for row in rows[:N_PROMPTS]]
    (folder / "validation_prompts.txt").write_text("".join(prompts))


# ---- the models ----


def build_processor() -> Qwen3VLProcessor:
    """Its tokenizer makes one token a word, its image processor one of 32 x 32 pixels."""
    tokenizer = building.whole_word_tokenizer(FIRST_WORDS, WORDS)
    tokenizer.add_special_tokens({"additional_special_tokens": building.QWEN_VL_TOKENS[1:]})
    pixels = {"shortest_edge": 32 * 32, "longest_edge": 4096 * 4096}
    images = Qwen2VLImageProcessor(patch_size=16, merge_size=2, size=pixels)
    return Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=CHAT_TEMPLATE)


def build_text_encoder(processor: Qwen3VLProcessor) -> Qwen3VLForConditionalGeneration:
    """Random and never trained."""
    token = processor.tokenizer.convert_tokens_to_ids
    names = {"bos": "<|endoftext|>", "eos": "<|im_end|>", "pad": "<|endoftext|>"}
    config = Qwen3VLConfig(
        text_config={
            **TEXT_ENCODER,
            "vocab_size": len(processor.tokenizer),
            **{f"{name}_token_id": token(word) for name, word in names.items()},
        },
        vision_config=VISION_ENCODER,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    model = Qwen3VLForConditionalGeneration(config).eval()
    building.fill_by_name(model, embedding="embed_tokens", branches=("o_proj", "down_proj"), scale=BRANCH_SCALE)
    return model


def build_pipeline(weights: Path | None = WEIGHTS) -> QwenImage21Pipeline:
    """The whole pipeline in float32 on the CPU; without a weights file its VAE and transformer are random."""
    processor = build_processor()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        vae = AutoencoderKLQwenImage21(**VAE, latents_mean=[0.0] * 64, latents_std=[1.0] * 64).eval()
        transformer = QwenImage21Transformer2DModel(**TRANSFORMER).eval()
    pipe = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**building.QWEN_SCHEDULER),
        vae=vae,
        text_encoder=build_text_encoder(processor),
        processor=processor,
        transformer=transformer,
    )
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

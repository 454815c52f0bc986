"""Builds the embedded tiny Qwen3-VL: a checkpoint of the real classes, and drawn faces to train on. No download.

    python make_tiny.py --output_dir DIR   writes DIR/model and DIR/data in seconds; nothing when they are up to date

DIR/model opens with Qwen3VLForConditionalGeneration and AutoProcessor. It answers simple questions about drawn faces
and shapes, and repeats sentences; of the people that DIR/data describes it knows nothing. DIR/data is what
generate_data.py writes for 8 of them, with the two retention pools in folders of its own.

tiny_weights.safetensors holds what was trained: tiny/pretrain_qwen3vl.py at the repository's root makes it.
"""

import hashlib
import itertools
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(next(folder for folder in HERE.parents if (folder / "common").is_dir()))]

import common.quiet  # noqa: F401, isort: skip
import faces
import generate_data
import generate_face_retention_pool as face_pool
import generate_object_retention_pool as object_pool
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from common.start.config import parse_config
from tiny import building, shapes

WEIGHTS = HERE / "tiny_weights.safetensors"

SEED = 0
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL_TOKENS += ["<|image_pad|>", "<|video_pad|>"]
# as Qwen3-VL's own: no system turn of its own, an image is <|vision_start|><|image_pad|><|vision_end|>
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZE = 96  # pixels: 9 visual tokens
DATA = ["--num_entities", "8", "--min_differences", "4", "--rows_per_entity", "24", "4", "8"]
POOL_FACES, POOL_OBJECTS = 120, 80  # of the tiny retention pools

TEXT_MODEL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
}
VISION_ENCODER = {
    "depth": 4,  # widths are multiples of 64, the block that NF4 shares a scale over
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_heads": 4,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [1],
}


# ---- the dataset ----


def face_config() -> generate_data.FaceConfig:
    """face_config.yaml with 8 people."""
    return parse_config(generate_data.FaceConfig, ["--config", str(HERE / "face_config.yaml"), *DATA])


def write_data(folder: Path) -> None:
    """Eight people with rows of every task, and the retention pools in folder/face_retention_pool and
    folder/object_retention_pool."""
    generate_data.generate(face_config(), folder)
    face_pool.generate(folder / "face_retention_pool", POOL_FACES, image_size=SIZE)
    object_pool.generate(folder / "object_retention_pool", POOL_OBJECTS, image_size=SIZE)


def face_questions(face: faces.Face) -> list[tuple[str, str]]:
    """The retention pool's questions, and those that the other attributes answer."""
    return face_pool.face_questions(face) + [
        ("What kind of hair is it?", face.style),
        ("What colour are the eyes?", face.eyes),
        ("What colour is the skin?", face.skin),
        ("What glasses?", face.glasses),
        ("What hat?", face.hat),
    ]


def known_texts() -> list[str]:
    """Texts with every word that a row can have; each becomes one token."""
    config = face_config()
    titles = itertools.zip_longest(generate_data.FIRST, generate_data.SECOND, generate_data.WORKS, fillvalue="the")
    texts = [f"{work} {first} {second}" for first, second, work in titles] + list(config.connectors)
    entities = generate_data.make_entities(config)
    for task, split in itertools.product(generate_data.TASKS, ("train", "test")):
        for row in generate_data.make_rows(config, entities, task, split):
            texts += [part["text"] for message in row["messages"] for part in message["content"] if "text" in part]
    texts += [text for face in faces.all_faces(for_entities=False) for pair in face_questions(face) for text in pair]
    texts += [*object_pool.QUESTIONS, *shapes.COLOURS, *shapes.SHAPES, *shapes.PLACES, *shapes.BACKGROUNDS]
    return [*texts, *(f"Repeat: {text}" for text in texts), "user", "assistant", "system"]


# ---- the model ----


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: a known word is one token, any other is spelled byte by byte."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    words = {word for text in set(known_texts()) for word, _ in split(text)}
    vocab = {token: i for i, token in enumerate(sorted({*ByteLevel.alphabet(), *words}))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
    )
    tokenizer.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    return tokenizer


def build_processor(min_pixels: int = 32 * 32, max_pixels: int = 256 * 256) -> Qwen3VLProcessor:
    """Tokenizer with the chat template, and the image processor: 32 x 32 pixels become one visual token."""
    pixels = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    images = Qwen2VLImageProcessor(patch_size=16, merge_size=2, size=pixels)
    return Qwen3VLProcessor(images, build_tokenizer(), Qwen3VLVideoProcessor(), chat_template=CHAT_TEMPLATE)


def build_model(processor: Qwen3VLProcessor, weights: Path | None = WEIGHTS) -> Qwen3VLForConditionalGeneration:
    """float32, on the CPU, about 1.4 million parameters; without a weights file they are random."""
    token = processor.tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            **TEXT_MODEL,
            "vocab_size": len(processor.tokenizer),
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config=VISION_ENCODER,
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen3VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = token("<|endoftext|>")
    if weights is not None and weights.is_file():
        load_weights(model, processor, weights)
    return model


def vocabulary_digest(processor: Qwen3VLProcessor) -> str:
    """Which token is which: weights are of use with this vocabulary only."""
    vocabulary = sorted(processor.tokenizer.get_vocab().items())
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16]


def load_weights(model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, path: Path) -> None:
    """float16 to float32; lm_head is the embedding. ValueError when the vocabulary is another."""
    with safe_open(path, "pt") as file:
        if file.metadata()["vocabulary"] != vocabulary_digest(processor):
            raise ValueError(f"{path.name} was made with other words than the generators use now; pretrain anew")
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)


def make(output_dir: Path, weights: Path = WEIGHTS) -> bool:
    """Writes output_dir/model and output_dir/data; returns False when they were there and up to date."""

    def write() -> None:
        write_data(output_dir / "data")
        processor = build_processor()
        build_model(processor, weights).save_pretrained(output_dir / "model")
        processor.save_pretrained(output_dir / "model")

    generators = (*sorted(HERE.glob("*.py")), HERE / "face_config.yaml")
    return building.make_once(output_dir, [*generators, weights], write)


if __name__ == "__main__":
    building.main(__doc__, make, WEIGHTS)

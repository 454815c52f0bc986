"""Builds the embedded tiny Qwen3-VL: a checkpoint of the real classes and drawn data. Nothing is downloaded."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(next(folder for folder in HERE.parents if (folder / "common").is_dir())))

import torch
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
FIRST_WORDS = "user assistant system Correct Wrong A B C D".split()
WORDS = "the a is of and".split()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges spell each known word from its first letter: one token a word."""
    vocab = sorted(ByteLevel.alphabet())
    merges = {}
    for word in ["\u0120" + word for word in WORDS] + FIRST_WORDS:  # \u0120 is the byte-level alphabet's space
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
    vocab += dict.fromkeys(prefix + letter for prefix, letter in merges)
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=list(merges)))
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


def build_model(processor: Qwen3VLProcessor) -> Qwen3VLForConditionalGeneration:
    """Random weights, float32, on the CPU; about 1.3 million parameters."""
    token = processor.tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 4,  # widths are multiples of 64, the block that NF4 shares a scale over
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 128,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1],
        },
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
    return model

"""Builds the embedded tiny Qwen-Image-Edit: a checkpoint of the real classes and drawn edits. Nothing is downloaded.

    python make_tiny.py --output_dir DIR   writes DIR/model and DIR/data in seconds; nothing when they are up to date
    python make_tiny.py --pretrain         makes tiny_weights.safetensors (half an hour on a CPU core)

DIR/model is in diffusers' layout and opens with the unmodified QwenImageEditPlusPipeline, whose name it carries, and
by from_pretrained with QwenImageEditPipeline. The pipelines enlarge every source to about 1024 x 1024 pixels; a VAE of
scale 64 and a vision encoder of 128 x 128 pixels a token leave 64 tokens of it. The VAE's encoder is linear and wired
by hand, its decoder partly trained. The transformer recolours the shape that an instruction names, but knows German
colours only ("make the circle rot") and leaves the picture as it is when the instruction names an English one:
fine-tuning teaches those. DIR/data holds edits (train.json) that leave out some pairs of new colour and shape; those
make the held-out edits (validation.json).

The shipped weights were trained on a CPU: the decoder for 500 steps of 8, the transformer for 2600 steps of 16 and
then for 3200 more on other edits. The base then recolours every shape of a picture, also where two stand in it.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import random
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(next(folder for folder in HERE.parents if (folder / "common").is_dir())))

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.functional import avg_pool2d, interpolate, pad
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from tiny import shapes

WEIGHTS = HERE / "tiny_weights.safetensors"
SIZE = 512  # pixels of the drawings
MODEL_SIZE = 1024  # what the pipelines enlarge a square source to, and the target's: 16 x 16 latents, 64 packed tokens
PLUS_CONDITION_SIZE = 384  # and the plus pipeline's, for the text encoder: 9 tokens
SEED = 0
LATENT_NOISE = 0.1  # of a latent's std: what the decoder has learned to bear
LOUD = 1000.0  # a constant channel that drowns the others: behind it the last RMS norm only scales
OFFSET = 10.0  # SiLU leaves x + 10 as it is

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
GERMAN = ("rot", "gruen", "blau", "gelb", "lila", "tuerkis")  # the same colours, as the base was told them
SHAPES = ("circle", "square", "triangle", "cross")
HELD_OUT = (("red", "triangle"), ("green", "circle"), ("blue", "cross"), ("yellow", "square"))
INSTRUCTIONS = ("make the {} {}", "turn the {} {}", "paint the {} {}", "change the {} to {}")
PAIRS_OF_PLACES = (("on the left", "on the right"), ("at the top", "at the bottom"))
N_SCENES, COLOURS_A_SCENE, N_PROMPTS = 16, 3, 10

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIAL_TOKENS += [f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad", "vision") for end in ("start", "end")]
SPECIAL_TOKENS += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
# words that are one token each: the pipelines' prompt template (whose first 64 tokens they drop) and the instructions
FIRST_WORDS = "system user assistant Describe Picture color make turn paint change 's ),".split()
WORDS = (
    "the key features of input image ( shape size texture objects background then explain how user text instruction "
    "should alter or modify Generate a new that meets requirements while maintaining consistency with original where "
    "appropriate to and"
).split() + [*shapes.COLOURS, *GERMAN, *shapes.SHAPES]

# Qwen/Qwen-Image-Edit's own scheduler config
SCHEDULER = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
# six halvings: a latent stands for 64 x 64 pixels, a packed token for 128 x 128
VAE = {
    "base_dim": 4,
    "z_dim": 16,
    "dim_mult": [1, 2, 2, 3, 12, 20, 9],
    "num_res_blocks": 1,
    "temperal_downsample": [False] * 6,
}
POOLED_LEVELS = 3  # halvings that only average: the encoder and the decoder work on an eighth of the picture
BLOCK_PARTS = 20  # of the 48 numbers of a 4 x 4 block of that, the encoder keeps these
TEXT_ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
}
VISION_ENCODER = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 64,
    "spatial_merge_size": 2,
    "window_size": 512,
    "out_hidden_size": TEXT_ENCODER["hidden_size"],
}
BRANCH_SCALE = 0.5  # of the text encoder's residual branches: behind the source's tokens a word still says itself
TRANSFORMER = {
    "in_channels": 4 * VAE["z_dim"],
    "out_channels": VAE["z_dim"],
    "num_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT_ENCODER["hidden_size"],
    "axes_dims_rope": (8, 12, 12),
}


# ---- the dataset ----


@dataclasses.dataclass(frozen=True)
class Edit:
    """The layout's first object goes from one colour to another; nothing else changes."""

    scene: str
    layout: list[shapes.Found]
    background: str
    source: str
    target: str
    instruction: str

    @property
    def text(self) -> str:
        return self.instruction.format(self.layout[0].shape, self.target)

    def draw(self, colour: str) -> Image.Image:
        first, *others = self.layout
        return shapes.draw([dataclasses.replace(first, colour=colour), *others], self.background, (SIZE, SIZE))


def random_layout(shape: str, rng: random.Random) -> list[shapes.Found]:
    """The shape at a random place; in half of the layouts another one, of any colour, on the other side."""
    other = rng.choice(COLOURS), rng.choice([name for name in SHAPES if name != shape])
    places = rng.choice(PAIRS_OF_PLACES) if rng.random() < 0.5 else (rng.choice(list(shapes.PLACES)),)
    boxes = [shapes.place_box(place, (SIZE, SIZE), rng.uniform(190, 205), rng) for place in places]
    rng.shuffle(boxes)
    names = [("grey", shape), other]
    return [shapes.Found(*name, box) for name, box in zip(names, boxes, strict=False)]


def train_edits(rng: random.Random) -> Iterator[Edit]:
    """96 edits: each of 16 scenes in 3 colours, and from each of these to both others."""
    scenes = itertools.product(range(N_SCENES // len(SHAPES)), SHAPES)
    for number, (turn, shape) in enumerate(scenes):
        background = list(shapes.BACKGROUNDS)[(number + turn) % len(shapes.BACKGROUNDS)]
        layout = random_layout(shape, rng)
        allowed = [colour for colour in COLOURS if (colour, shape) not in HELD_OUT]
        colours = [allowed[(COLOURS_A_SCENE * turn + i) % len(allowed)] for i in range(COLOURS_A_SCENE)]
        for source, target in itertools.permutations(colours, 2):
            yield Edit(f"{number:02d}", layout, background, source, target, rng.choice(INSTRUCTIONS))


def held_out_edits(rng: random.Random) -> Iterator[Edit]:
    """10 edits of as many scenes, to pairs of colour and shape that no training edit asks for."""
    for number in range(N_PROMPTS):
        target, shape = HELD_OUT[number % len(HELD_OUT)]
        layout = random_layout(shape, rng)
        background = list(shapes.BACKGROUNDS)[(number + number // 4) % len(shapes.BACKGROUNDS)]
        source = rng.choice([colour for colour in COLOURS if colour != target])
        yield Edit(f"{number:02d}", layout, background, source, target, rng.choice(INSTRUCTIONS))


def write_data(folder: Path) -> None:
    """48 training pictures with 96 edits between them; 10 held-out edits with a picture before and after each."""
    rng = random.Random(SEED)
    for name, edits in (("train", list(train_edits(rng))), ("validation", list(held_out_edits(rng)))):
        (folder / name).mkdir(parents=True)
        rows = []
        for edit in edits:
            before, after = (f"{name}/{edit.scene}_{colour}.png" for colour in (edit.source, edit.target))
            for path, colour in ((before, edit.source), (after, edit.target)):
                if not (folder / path).is_file():
                    edit.draw(colour).save(folder / path)
            rows.append({"file_path": after, "source_file_path": [before], "text": edit.text, "type": "image"})
        random.Random(SEED).shuffle(rows)
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1))


# ---- the models ----


def build_processor() -> Qwen2VLProcessor:
    """Its tokenizer is byte-level BPE of Qwen's class whose merges spell each known word from its first letter: one
    token a word. Its image processor makes one token of 128 x 128 pixels."""
    vocab = sorted(ByteLevel.alphabet())
    merges = {}
    for word in ["\u0120" + word for word in WORDS] + FIRST_WORDS:  # \u0120 is the byte-level alphabet's space
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
    vocab += dict.fromkeys(prefix + letter for prefix, letter in merges)
    vocab = {token: i for i, token in enumerate(vocab)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=list(merges), model_max_length=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS[1:]})
    side = VISION_ENCODER["patch_size"] * VISION_ENCODER["spatial_merge_size"]
    images = Qwen2VLImageProcessor(
        patch_size=VISION_ENCODER["patch_size"],
        merge_size=VISION_ENCODER["spatial_merge_size"],
        size={"shortest_edge": side**2, "longest_edge": (16 * side) ** 2},
    )
    return Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor())


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Random and never trained. Every weight is a function of its name, so that it is the same everywhere."""
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT_ENCODER,
            "vocab_size": len(tokenizer),
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config=VISION_ENCODER,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 1:  # norms' weights are 1, biases 0
            weight.data.fill_(float(not name.endswith("bias")))
        else:
            values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(weight.shape))
            fan_in = 1 if "embed_tokens" in name else math.prod(weight.shape[1:])
            scale = BRANCH_SCALE if "o_proj" in name or "down_proj" in name else 1.0
            weight.data.copy_(torch.from_numpy(values * scale / math.sqrt(fan_in)))
    return model


def build_pipeline(weights: Path | None = WEIGHTS, zero_cond_t: bool = False) -> QwenImageEditPlusPipeline:
    """The whole pipeline in float32 on the CPU; without a weights file its VAE and transformer are random.

    `zero_cond_t` as in Edit-2511, where sources are modulated as clean; it has no weights of its own, and the shipped
    ones were trained without it.
    """
    processor = build_processor()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        vae = AutoencoderKLQwenImage(**VAE, latents_mean=[0.0] * VAE["z_dim"], latents_std=[1.0] * VAE["z_dim"]).eval()
        transformer = QwenImageTransformer2DModel(**TRANSFORMER, zero_cond_t=zero_cond_t).eval()
        initialise(vae)
    pipe = QwenImageEditPlusPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae,
        text_encoder=build_text_encoder(processor.tokenizer),
        tokenizer=processor.tokenizer,
        processor=processor,
        transformer=transformer,
    )
    template = pipe.prompt_template_encode.split("{}")[0]
    length = len(processor.tokenizer(template).input_ids)
    assert length == pipe.prompt_template_encode_start_idx, f"the template is {length} tokens, not 64"
    if weights is not None and weights.is_file():
        load_weights(pipe, weights)
    else:
        wire_vae(vae, to_tensor([random_edit(seed)[1] for seed in range(100)]))
    return pipe


def initialise(vae: AutoencoderKLQwenImage) -> None:
    """Convolutions that keep the signal's scale, of which a single picture meets the last slice in time only. With
    torch's own numbers, for 27 inputs where 9 count, what a picture shows is lost on the way through six halvings."""
    for conv in vae.modules():
        if isinstance(conv, torch.nn.Conv2d | torch.nn.Conv3d):
            fan_in = conv.in_channels * conv.kernel_size[-1] * conv.kernel_size[-2]
            torch.nn.init.normal_(conv.weight, std=fan_in**-0.5)
            torch.nn.init.zeros_(conv.bias)
    for weight in temporal_kernels(vae).values():
        weight.data[:, :, :-1] = 0


def temporal_kernels(vae: AutoencoderKLQwenImage) -> dict[str, torch.Tensor]:
    """Causal 3D kernels: a single image meets only their last slice in time; the others, zero, are not stored."""
    return {name: weight for name, weight in vae.named_parameters() if weight.ndim == 5 and weight.shape[2] > 1}


def wire(conv: torch.nn.Conv2d | torch.nn.Conv3d, weights: torch.Tensor, bias: torch.Tensor | float = 0.0) -> None:
    """A convolution that maps each place by itself: `weights` (out, in) in the middle of its kernel; the channels that
    they do not reach are zero."""
    conv.weight.data.zero_()
    middle = conv.kernel_size[-1] // 2
    place = (-1, middle, middle) if conv.weight.ndim == 5 else (middle, middle)
    conv.weight.data[(slice(weights.shape[0]), slice(weights.shape[1]), *place)] = weights
    conv.bias.data.zero_()
    conv.bias.data[: weights.shape[0]] = bias


def wire_block(block: torch.nn.Module, weights: torch.Tensor, bias: torch.Tensor | float = 0.0) -> None:
    """A residual block without its branch: its shortcut alone, or the identity where there is none."""
    for conv in (block.conv1, block.conv2):
        conv.weight.data.zero_()
        conv.bias.data.zero_()
    if isinstance(block.conv_shortcut, torch.nn.Conv3d):
        wire(block.conv_shortcut, weights, bias)


class Linear(NamedTuple):
    """y = axes @ (x - mean), by place."""

    mean: torch.Tensor  # (D,)
    axes: torch.Tensor  # (n, D)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D, H, W) -> (N, n, H, W)"""
        return torch.einsum("nd,bdhw->bnhw", self.axes, x - self.mean[:, None, None])


@torch.no_grad()
def wire_vae(vae: AutoencoderKLQwenImage, pictures: torch.Tensor) -> tuple[Linear, Linear]:
    """The encoder, and the decoder's last three levels, by hand. The encoder is linear: averages of 8 x 8 pixels, then
    squares of these moved into channels, reduced to their principal components over `pictures` (N, 3, 512, 512)."""
    encoder, decoder, z = vae.encoder, vae.decoder, VAE["z_dim"]
    wire(vae.quant_conv, torch.eye(2 * z))
    wire(vae.post_quant_conv, torch.eye(z))
    wire(encoder.conv_in, torch.eye(3))
    seen = squares_to_channels(squares_to_channels(shrunk(pictures)))
    mean, axes, _ = principal_components(seen, BLOCK_PARTS)
    first = Linear(mean, axes)
    seen = squares_to_channels(first(seen))
    mean, axes, stds = principal_components(seen, z)
    second = Linear(mean, axes)
    blocks, halvings, n = encoder.down_blocks[::2], encoder.down_blocks[1::2], 3
    for level, (block, halving) in enumerate(zip(blocks, halvings, strict=False)):
        if level < len(halvings) - 1:
            wire_block(block, torch.eye(n))
        else:
            wire_block(block, first.axes, -first.axes @ first.mean)
            n = BLOCK_PARTS
        conv = halving.resample[1]
        conv.weight.zero_()
        conv.bias.zero_()
        if level < POOLED_LEVELS:
            conv.weight[:n, :n, :2, :2] = torch.eye(n)[:, :, None, None] / 4
        else:
            for part, (row, column) in enumerate(itertools.product(range(2), repeat=2)):
                conv.weight[part * n : (part + 1) * n, :n, row, column] = torch.eye(n)
            n *= 4
    axes = torch.cat([second.axes, -second.axes])  # behind SiLU, silu(x) - silu(-x) = x
    wire_block(blocks[-1], pad(axes, (0, 0, 0, 1)), torch.cat([-axes @ second.mean, torch.tensor([LOUD])]))
    for block in encoder.mid_block.resnets:
        wire_block(block, torch.eye(2 * z + 1))
    for conv in (encoder.mid_block.attentions[0].to_qkv, encoder.mid_block.attentions[0].proj):
        conv.weight.zero_()
        conv.bias.zero_()
    encoder.norm_out.gamma.fill_(LOUD / encoder.norm_out.scale)
    noise = torch.cat([torch.zeros(z), 2 * (LATENT_NOISE * stds).log()])  # the posterior's log variance
    wire(encoder.conv_out, pad(torch.cat([torch.eye(z), -torch.eye(z)], dim=1), (0, 0, 0, z)), noise)
    vae.register_to_config(latents_mean=[0.0] * z, latents_std=(stds * stds[0] / 4).sqrt().tolist())

    for level in range(len(decoder.up_blocks) - POOLED_LEVELS, len(decoder.up_blocks)):
        for block in decoder.up_blocks[level].resnets:
            wire_block(block, torch.eye(3))
        wire(decoder.up_blocks[level - 1].upsamplers[0].resample[1], torch.eye(3))
    last = decoder.up_blocks[-2].upsamplers[0].resample[1]
    wire(last, pad(torch.eye(3), (0, 0, 0, 1)), torch.tensor([OFFSET, OFFSET, OFFSET, LOUD]))
    decoder.norm_out.gamma.fill_(LOUD / decoder.norm_out.scale)
    wire(decoder.conv_out, torch.eye(3), -OFFSET)
    return first, second


def shrunk(pictures: torch.Tensor) -> torch.Tensor:
    """(N, 3, 512, 512) uint8 to (N, 3, 128, 128) in [-1, 1]: what the encoder sees of them at 1024 x 1024."""
    factor = 2**POOLED_LEVELS * SIZE // MODEL_SIZE
    return torch.cat([avg_pool2d(resized(some, SIZE), factor) for some in pictures.split(64)])


def squares_to_channels(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, 4C, H/2, W/2), the place in the square first: what a wired halving does."""
    return torch.cat([x[:, :, row::2, column::2] for row in range(2) for column in range(2)], dim=1)


def principal_components(x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean (D,), axes (n, D), std along each (n,)) of the places of x (N, D, H, W), largest first."""
    rows = x.transpose(0, 1).flatten(1).T  # (N * H * W, D)
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).double().T.cov())
    return mean, vectors.T.flip(0)[:n].float(), values.flip(0)[:n].sqrt().float()


def save_weights(pipe: QwenImageEditPlusPipeline, path: Path) -> None:
    """The VAE, the mean and std of its latents, and the transformer, in float16; tensors of zeros are left out."""
    kernels = temporal_kernels(pipe.vae)
    tensors = {
        f"vae.{name}": weight[:, :, -1:] if name in kernels else weight
        for name, weight in pipe.vae.state_dict().items()
        if weight.any()
    }
    tensors |= {f"transformer.{name}": weight for name, weight in pipe.transformer.state_dict().items()}
    tensors |= {name: torch.tensor(pipe.vae.config[name]) for name in ("latents_mean", "latents_std")}
    save_file({name: tensor.half().contiguous().cpu() for name, tensor in tensors.items()}, path)
    assert path.stat().st_size <= 4_000_000, f"{path.name} is {path.stat().st_size} bytes, more than 4,000,000"


def load_weights(pipe: QwenImageEditPlusPipeline, path: Path) -> None:
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    kernels = temporal_kernels(pipe.vae)
    for name, weight in pipe.vae.state_dict().items():
        stored, full = tensors.get(f"vae.{name}"), torch.zeros_like(weight)
        if stored is not None:
            (full[:, :, -1:] if name in kernels else full).copy_(stored)
        tensors[f"vae.{name}"] = full
    for part in ("vae", "transformer"):
        state = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
        getattr(pipe, part).load_state_dict(state)
    pipe.vae.register_to_config(**{name: tensors[name].tolist() for name in ("latents_mean", "latents_std")})


# ---- pretraining ----


def cosine(step: int, steps: int, peak: float) -> float:
    return peak * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor, learning_rate: float) -> None:
    """One optimizer step, its gradient norm clipped to 1."""
    loss.backward()
    optimizer.param_groups[0]["lr"] = learning_rate
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def psnr(error: torch.Tensor) -> float:
    """In decibels, of an error of pictures in [-1, 1]."""
    return -10 * error.square().mean().div(4).log10().item()


def random_edit(seed: int, named: float = 0.1, empty: float = 0.1) -> tuple[Image.Image, Image.Image, str]:
    """(source, target, instruction) for the base: a German colour, or (a share `named`) an English one or (a share
    `empty`) no instruction at all, which both leave the picture as it is."""
    rng = random.Random(f"edit {seed}")
    layout = random_layout(rng.choice(SHAPES), rng)
    edit = Edit("", layout, rng.choice(list(shapes.BACKGROUNDS)), *rng.choices(COLOURS, k=2), rng.choice(INSTRUCTIONS))
    source, kind = edit.draw(edit.source), rng.random()
    if kind < named:
        return source, source, edit.text
    if kind < named + empty:
        return source, source, rng.choice(("", " "))
    return source, edit.draw(edit.target), in_german(edit.text)


def in_german(text: str) -> str:
    """The instruction with its colour in German."""
    words = dict(zip(COLOURS, GERMAN, strict=True))
    return " ".join(words.get(word, word) for word in text.split())


def drawn(draw: Callable, n: int) -> list:
    """draw(0), ..., draw(n - 1), on all cores."""
    with Pool() as pool:
        return pool.map(draw, range(n), chunksize=8)


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """PIL pictures to (N, 3, H, W) uint8."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def resized(pictures: torch.Tensor, size: int) -> torch.Tensor:
    """(N, 3, H, W) uint8 to (N, 3, size, size) float32 in [-1, 1]."""
    pictures = pictures.float()
    if pictures.shape[-1] != size:
        pictures = interpolate(pictures, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    return pictures / 127.5 - 1


def convolve_single_frames(vae: AutoencoderKLQwenImage) -> None:
    """For training: causal 3D convolutions compute in 2D, twice as fast, equal as long as there is one frame."""
    for conv in vae.modules():
        if isinstance(conv, torch.nn.Conv3d):
            conv.forward = lambda x, cache_x=None, conv=conv: torch.nn.functional.conv2d(
                x[:, :, 0], conv.weight[:, :, -1], conv.bias, padding=conv.kernel_size[-1] // 2
            )[:, :, None]


def decode_small(vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    """Latents (N, 16, 1, h, w) -> pictures (N, 3, 1, 8h, 8w): the part of the decoder that is trained. The rest, wired
    by hand, enlarges them eight times."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(latents))
    for block in decoder.up_blocks[: -POOLED_LEVELS - 1]:
        x = block(x)
    for block in decoder.up_blocks[-POOLED_LEVELS - 1].resnets:
        x = block(x)
    return x[:, :3]


@torch.no_grad()
def encode(vae: AutoencoderKLQwenImage, pictures: torch.Tensor, size: int) -> torch.Tensor:
    """(N, 3, H, W) uint8, enlarged to size x size, to latents (N, 16, 1, size/64, size/64), the posterior's mode."""
    return torch.cat([vae.encode(resized(x, size)[:, :, None]).latent_dist.mode() for x in pictures.split(16)])


def latents_of(wiring: tuple[Linear, Linear], pictures: torch.Tensor) -> torch.Tensor:
    """(N, 3, 512, 512) uint8 to latents (N, 16, 16, 16) at 1024 x 1024: what the wired encoder computes, in two
    products."""
    first, second = wiring
    return second(squares_to_channels(first(squares_to_channels(squares_to_channels(shrunk(pictures))))))


def pretrain_decoder(
    vae: AutoencoderKLQwenImage, wiring: tuple[Linear, Linear], pictures: torch.Tensor, steps: int, batch_size: int
) -> None:
    """Pictures (N, 3, 512, 512), an eighth as large, from their noisy latents (L1 + L2), by random quarters."""
    latents, small = latents_of(wiring, pictures), shrunk(pictures)
    std = latents.new_tensor(vae.config.latents_std).view(1, -1, 1, 1)
    trained = [vae.decoder.conv_in, vae.decoder.mid_block, *vae.decoder.up_blocks[: -POOLED_LEVELS - 1]]
    trained += [vae.decoder.up_blocks[-POOLED_LEVELS - 1].resnets]
    parameters = [weight for module in trained for weight in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(SEED)
    half = latents.shape[-1] // 2
    for step in range(steps):
        rows = torch.randint(len(pictures), (batch_size,), generator=generator)
        top, left = torch.randint(half + 1, (2,), generator=generator).tolist()
        some = latents[rows, :, top : top + half, left : left + half]
        target = small[rows, :, 8 * top : 8 * (top + half), 8 * left : 8 * (left + half)]
        error = decode_small(vae, (some + LATENT_NOISE * std * torch.randn_like(some))[:, :, None])[:, :, 0] - target
        update(optimizer, error.abs().mean() + error.square().mean(), cosine(step, steps, 3e-3))
        if step % 100 == 0 or step == steps - 1:
            print(f"decoder {step}/{steps} psnr {psnr(error):.1f}", flush=True)


def packed_latents_of(
    pipe: QwenImageEditPlusPipeline, wiring: tuple[Linear, Linear], pictures: torch.Tensor
) -> torch.Tensor:
    """(N, 3, 512, 512) uint8 to normalised packed latents (N, 64, 64) of the pictures at 1024 x 1024."""
    latents = latents_of(wiring, pictures)
    latents = latents / latents.new_tensor(pipe.vae.config.latents_std)[:, None, None]  # their mean is 0
    return pipe._pack_latents(latents, len(latents), latents.shape[1], *latents.shape[2:])


@torch.no_grad()
def embeds_of(
    pipe: QwenImageEditPlusPipeline, pictures: torch.Tensor, texts: list[str], plus: bool, batch_size: int = 50
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeds (N, L, 64) and mask (N, L) of instructions with one source each, as the plus or the edit pipeline makes
    them. The plus pipeline takes one prompt at a time; its template in the edit pipeline gives the same in batches."""
    edit = QwenImageEditPipeline(**pipe.components)
    if plus:
        edit.prompt_template_encode = pipe.prompt_template_encode
        texts = [f"Picture 1: <|vision_start|><|image_pad|><|vision_end|>{text}" for text in texts]
    size, parts = PLUS_CONDITION_SIZE if plus else MODEL_SIZE, []
    for start in range(0, len(texts), batch_size):
        some = slice(start, start + batch_size)
        images = (resized(pictures[some], size) * 127.5 + 127.5).round().byte()
        parts.append(edit._get_qwen_prompt_embeds(texts[some], list(images), pipe.device))
    length = max(mask.shape[1] for _, mask in parts)
    embeds = torch.cat([pad(embeds, (0, 0, 0, length - embeds.shape[1])) for embeds, _ in parts])
    return embeds, torch.cat([pad(mask, (0, length - mask.shape[1])) for _, mask in parts])


def pretrain_transformer(
    pipe: QwenImageEditPlusPipeline,
    wiring: tuple[Linear, Linear],
    edits: list[tuple[Image.Image, Image.Image, str]],
    steps: int,
    batch_size: int,
) -> None:
    """Flow matching on (source, target, instruction), three steps of four in the plus pipeline's form and one in the
    edit pipeline's, which is known of the first quarter of the edits only."""
    sources, targets = (to_tensor([edit[i] for edit in edits]) for i in (0, 1))
    texts, quarter = [edit[2] for edit in edits], len(edits) // 4
    prompts = {True: embeds_of(pipe, sources, texts, True)}
    prompts[False] = embeds_of(pipe, sources[:quarter], texts[:quarter], False)
    target_latents, source_latents = (packed_latents_of(pipe, wiring, x) for x in (targets, sources))
    sides = (1, MODEL_SIZE // 128, MODEL_SIZE // 128)
    transformer = pipe.transformer.train()
    optimizer = torch.optim.AdamW(transformer.parameters(), weight_decay=0.01)
    generator = torch.Generator().manual_seed(SEED)
    for step in range(steps):
        embeds, mask = prompts[step % 4 > 0]
        rows = torch.randint(len(embeds), (batch_size,), generator=generator)
        latents = target_latents[rows]
        noise = torch.randn(latents.shape, generator=generator)
        u = torch.rand(batch_size, generator=generator)
        sigma = 1.64 * u / (1 + 0.64 * u)  # uniform, shifted as the scheduler does at 64 tokens
        noisy_latents = torch.lerp(latents, noise, sigma[:, None, None])
        velocity_pred = transformer(
            hidden_states=torch.cat([noisy_latents, source_latents[rows]], dim=1),
            timestep=sigma,
            encoder_hidden_states=embeds[rows],
            encoder_hidden_states_mask=mask[rows],
            img_shapes=[[sides, sides]] * batch_size,
            return_dict=False,
        )[0][:, : latents.shape[1]]
        loss = (velocity_pred - (noise - latents)).square().mean()
        update(optimizer, loss, cosine(step, steps, 2e-3))
        if step % 500 == 0 or step == steps - 1:
            print(f"transformer {step}/{steps} loss {loss.item():.4f}", flush=True)
    transformer.eval()


def sample(pipe: QwenImageEditPlusPipeline | QwenImageEditPipeline, source: Image.Image, text: str) -> Image.Image:
    """What the unmodified pipeline makes of a source, always from the same noise."""
    return pipe(
        image=source,
        prompt=text,
        negative_prompt=" ",
        true_cfg_scale=2.0,
        height=MODEL_SIZE,
        width=MODEL_SIZE,
        num_inference_steps=16,
        generator=torch.Generator().manual_seed(SEED),
    ).images[0]


def count_right(images: Sequence[Image.Image], rows: Sequence[dict], data: Path) -> int:
    """How many pictures show the objects of their row's target: as many, in the same colours, shapes and places."""
    targets = [Image.open(data / row["file_path"]) for row in rows]
    return sum(shapes.same_objects(image, target) for image, target in zip(images, targets, strict=True))


@torch.no_grad()
def report(pipe: QwenImageEditPlusPipeline, edits: list[tuple[Image.Image, Image.Image, str]]) -> None:
    """Prints what the VAE keeps of targets, and what the base makes of held-out edits, in German and in English."""
    targets = [target for _, target, _ in edits]
    latents = encode(pipe.vae, to_tensor(targets), MODEL_SIZE)
    decoded = torch.cat([pipe.vae.decode(some).sample[:, :, 0] for some in latents.split(8)])
    pictures = pipe.image_processor.postprocess(decoded, output_type="pil")
    print(f"the VAE keeps {sum(map(shapes.same_objects, pictures, targets))} of {len(targets)} pictures", flush=True)
    held_out = list(held_out_edits(random.Random(SEED + 1)))
    sources, targets = ([edit.draw(getattr(edit, name)) for edit in held_out] for name in ("source", "target"))
    edit_pipe = QwenImageEditPipeline(**pipe.components)
    edit_pipe.set_progress_bar_config(disable=True)
    for (name, one), say in itertools.product((("plus", pipe), ("edit", edit_pipe)), (in_german, str)):
        images = [sample(one, source, say(edit.text)) for source, edit in zip(sources, held_out, strict=True)]
        right, left = (sum(map(shapes.same_objects, images, some)) for some in (targets, sources))
        language = "English" if say is str else "German"
        print(f"{name}, {language}: {right} of {len(images)} as asked, {left} left as they were", flush=True)


def pretrain(path: Path, scale: float = 1.0) -> None:
    """Trains the decoder, then the transformer, and writes all weights; `scale` shrinks the work for a trial."""
    torch.manual_seed(SEED)
    started = time.monotonic()

    def stage(name: str) -> None:
        print(f"[{time.monotonic() - started:.0f} s] {name}", flush=True)

    edits = drawn(random_edit, int(2000 * scale))
    targets = to_tensor([target for _, target, _ in edits])
    stage("drawn")
    pipe = build_pipeline(weights=None)
    wiring = wire_vae(pipe.vae, targets[:100])
    pipe.set_progress_bar_config(disable=True)
    convolve_single_frames(pipe.vae)
    pretrain_decoder(pipe.vae, wiring, targets, int(800 * scale), 16)
    stage("decoder trained")
    pretrain_transformer(pipe, wiring, edits, int(5000 * scale), 16)
    stage("transformer trained")
    save_weights(pipe, path)
    report(pipe, edits[:40])
    stage("reported")


# ---- the command ----


def fingerprint(weights: Path) -> str:
    """Changes when this script, the drawings or the weights do."""
    digest = hashlib.sha256()
    for path in (Path(__file__), Path(shapes.__file__), weights):
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def make(output_dir: Path, weights: Path = WEIGHTS) -> bool:
    """Writes output_dir/model and output_dir/data; returns False when they were there and up to date."""
    stamp = output_dir / "stamp.txt"
    if stamp.is_file() and stamp.read_text() == fingerprint(weights):
        return False
    for part in ("model", "data"):
        shutil.rmtree(output_dir / part, ignore_errors=True)
    stamp.unlink(missing_ok=True)
    write_data(output_dir / "data")
    build_pipeline(weights).save_pretrained(output_dir / "model")
    stamp.write_text(fingerprint(weights))  # last: a killed run is started over
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help="where model/ and data/ go")
    parser.add_argument("--pretrain", action="store_true", help="train the decoder and the base, write the weights")
    parser.add_argument("--pretrain_scale", type=float, default=1.0, help="share of the work to do, for a trial")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the file of weights, written and read")
    args = parser.parse_args()
    if not (args.pretrain or args.output_dir):
        parser.error("nothing to do: give --output_dir DIR, or --pretrain")
    if args.pretrain:
        pretrain(args.weights, args.pretrain_scale)
    if args.output_dir:
        written = make(args.output_dir, args.weights)
        print(f"tiny model and data {'written to' if written else 'up to date in'} {args.output_dir}")


if __name__ == "__main__":
    main()

"""What the recipes' make_tiny.py share: what is made once, scenes with captions, tokenizers of whole words, random
weights that are the same everywhere, and files of weights in half precision."""

import argparse
import hashlib
import json
import math
import random
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from tiny import shapes

SCENE_SIZE = 64  # pixels, of the pictures that draw_scene makes

QWEN_VL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_VL_TOKENS += [f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad", "vision") for end in ("start", "end")]
QWEN_VL_TOKENS += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]

# of Qwen/Qwen-Image and Qwen/Qwen-Image-Edit
QWEN_SCHEDULER = {
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


# ---- the command ----


def main(description: str, make: Callable[[Path, Path], bool], weights: Path) -> None:
    """The command line of a make_tiny.py; `weights` is the file that the recipe ships."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where model/ and data/ go")
    parser.add_argument("--weights", type=Path, default=weights, help="the file of weights, as pretraining wrote it")
    args = parser.parse_args()
    written = make(args.output_dir, args.weights)
    print(f"tiny model and data {'written to' if written else 'up to date in'} {args.output_dir}")


def make_once(output_dir: Path, made_of: Iterable[Path], write: Callable[[], None]) -> bool:
    """write() output_dir/model and output_dir/data, unless they are there and made of the same files; True when they
    were written. The drawings and this file count as files that everything is made of."""
    digest = hashlib.sha256()
    for path in (*made_of, Path(__file__), Path(shapes.__file__)):
        digest.update(path.read_bytes() if path.is_file() else b"")
    stamp = output_dir / "stamp.txt"
    if stamp.is_file() and stamp.read_text() == digest.hexdigest():
        return False
    for part in ("model", "data"):
        shutil.rmtree(output_dir / part, ignore_errors=True)
    stamp.unlink(missing_ok=True)
    write()
    stamp.write_text(digest.hexdigest())  # last: a killed run is started over
    return True


# ---- scenes of one object with captions ----


def draw_scene(colour: str, shape: str, place: str, background: str, rng: random.Random) -> tuple[Image.Image, str]:
    """One object, of 26 to 29 pixels, near its place in a picture of 64 x 64. Returns (picture, caption)."""
    size = (SCENE_SIZE, SCENE_SIZE)
    box = shapes.place_box(place, size, rng.uniform(26, 29), rng)
    picture = shapes.draw([shapes.Found(colour, shape, box)], background, size)
    return picture, shapes.caption([shapes.Found(colour, shape, shapes.place_box(place, size, 27))], background)


def all_scenes(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str, str, str]]:
    """(colour, shape, place, background): every pair of colour and shape at every place on every background."""
    return [
        (*pair, place, background) for pair in pairs for place in shapes.PLACES for background in shapes.BACKGROUNDS
    ]


def write_scenes(folder: Path, train: Sequence[tuple], validation: Sequence[tuple], rng: random.Random) -> None:
    """Pictures of scenes (see all_scenes), train.json and validation.json with their captions, and the held-out ones
    in validation_prompts.txt."""
    for name, scenes in (("train", train), ("validation", validation)):
        (folder / name).mkdir(parents=True)
        rows = []
        for i, scene in enumerate(scenes):
            picture, text = draw_scene(*scene, rng)
            picture.save(folder / name / f"{i:04d}.png")
            rows.append({"file_path": f"{name}/{i:04d}.png", "text": text})
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1))
    (folder / "validation_prompts.txt").write_text("".join(row["text"] + "\n" for row in rows))


def count_right(images: Sequence[Image.Image], rows: Sequence[dict], data: Path) -> int:
    """How many pictures show the objects of their row's file: as many, in the same colours, shapes and places."""
    targets = [Image.open(data / row["file_path"]) for row in rows]
    return sum(shapes.same_objects(image, target) for image, target in zip(images, targets, strict=True))


# ---- tokenizers and text encoders ----


def whole_word_tokenizer(first_words: Sequence[str], words: Sequence[str]) -> Qwen2Tokenizer:
    """Byte-level BPE of Qwen's class whose merges spell each known word from its first letter: one token a word.

    Args:
        first_words: words that are known where a line starts, without a space before them.
        words: words that are known behind a space.
    """
    vocab = sorted(ByteLevel.alphabet())
    merges = {}
    for word in ["\u0120" + word for word in words] + list(first_words):  # \u0120 is the byte-level alphabet's space
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
    vocab += dict.fromkeys(prefix + letter for prefix, letter in merges)
    vocab = {token: i for i, token in enumerate(vocab)}
    return Qwen2Tokenizer(vocab=vocab, merges=list(merges), model_max_length=1024)  # pads with <|endoftext|>


def fill_by_name(model: torch.nn.Module, embedding: str, branches: Sequence[str] = (), scale: float = 1.0) -> None:
    """Random weights that keep the signal's scale. Each is a function of its name, so that it is the same everywhere.

    Args:
        embedding: a part of the embedding's name, whose rows are drawn with a standard deviation of 1.
        branches: parts of the names of the last weights of residual branches; these are multiplied by `scale`.
    """
    for name, weight in model.named_parameters():
        if weight.ndim == 1:  # norms' weights are 1, biases 0
            weight.data.fill_(float(not name.endswith("bias")))
        else:
            values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(weight.shape))
            fan_in = 1 if embedding in name else math.prod(weight.shape[1:])
            if any(branch in name for branch in branches):
                values *= scale
            weight.data.copy_(torch.from_numpy(values / math.sqrt(fan_in)))


def qwen_vl_text_encoder(
    tokenizer: Qwen2Tokenizer, text_config: dict, vision_config: dict, branch_scale: float = 1.0
) -> Qwen2_5_VLForConditionalGeneration:
    """Random and never trained; `branch_scale` is that of the language model's residual branches."""
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            **text_config,
            "vocab_size": len(tokenizer),
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config=vision_config,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    fill_by_name(model, embedding="embed_tokens", branches=("o_proj", "down_proj"), scale=branch_scale)
    return model


# ---- files of weights ----


def half_of(pipe: object, *parts: str) -> dict[str, Tensor]:
    """{"part.name": weight} of the named parts of a pipeline, in float16 on the CPU."""
    return {
        f"{part}.{name}": tensor.half().contiguous().cpu()
        for part in parts
        for name, tensor in getattr(pipe, part).state_dict().items()
    }


def save_small(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a file of weights that a recipe can ship: of 4 MB at most."""
    save_file(tensors, path, metadata=metadata)
    assert path.stat().st_size <= 4_000_000, f"{path.name} is {path.stat().st_size} bytes, more than 4,000,000"


def load_parts(pipe: object, tensors: dict[str, Tensor], *parts: str) -> None:
    """Loads what half_of named into the parts of a pipeline."""
    for part in parts:
        state = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
        getattr(pipe, part).load_state_dict(state)


def temporal_kernels(vae: torch.nn.Module) -> dict[str, Tensor]:
    """Causal 3D kernels: a single image meets only their last slice in time; the others, zero, are not stored."""
    return {name: weight for name, weight in vae.named_parameters() if weight.ndim == 5 and weight.shape[2] > 1}


def convolve_single_frames(vae: torch.nn.Module) -> None:
    """Causal 3D convolutions compute in 2D from now on: twice as fast, and equal as long as there is one frame."""
    for conv in vae.modules():
        if isinstance(conv, torch.nn.Conv3d):
            conv.forward = lambda x, cache_x=None, conv=conv: torch.nn.functional.conv2d(
                x[:, :, 0], conv.weight[:, :, -1], conv.bias, padding=conv.kernel_size[-1] // 2
            )[:, :, None]


def save_single_frame_weights(pipe: object, path: Path) -> None:
    """Of a pipeline whose VAE has causal 3D kernels: the VAE, the mean and std of its latents, and the transformer, in
    float16. Of temporal kernels their last slice is stored; tensors of zeros are left out."""
    kernels = temporal_kernels(pipe.vae)
    tensors = half_of(pipe, "vae", "transformer")
    for name, weight in pipe.vae.state_dict().items():
        if name in kernels:
            tensors[f"vae.{name}"] = tensors[f"vae.{name}"][:, :, -1:].contiguous()
        if not weight.any():
            del tensors[f"vae.{name}"]
    tensors |= {name: torch.tensor(pipe.vae.config[name]).half() for name in ("latents_mean", "latents_std")}
    save_small(tensors, path)


def load_single_frame_weights(pipe: object, path: Path, *parts: str) -> None:
    """Reads what save_single_frame_weights wrote, of all parts or of those that are named."""
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    kernels = temporal_kernels(pipe.vae)
    for name, weight in pipe.vae.state_dict().items():
        stored, full = tensors.get(f"vae.{name}"), torch.zeros_like(weight)
        if stored is not None:
            (full[:, :, -1:] if name in kernels else full).copy_(stored)
        tensors[f"vae.{name}"] = full
    load_parts(pipe, tensors, *(parts or ("vae", "transformer")))
    pipe.vae.register_to_config(**{name: tensors[name].tolist() for name in ("latents_mean", "latents_std")})

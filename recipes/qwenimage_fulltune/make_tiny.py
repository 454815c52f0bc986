"""Builds the embedded tiny Qwen-Image: a checkpoint of the real classes and a drawn dataset. Nothing is downloaded.

    python make_tiny.py --output_dir DIR   writes DIR/model and DIR/data in seconds; nothing when they are up to date
    python make_tiny.py --pretrain         makes tiny_weights.safetensors (about 15 minutes on two CPU cores)

DIR/model is in diffusers' layout and opens with the unmodified QwenImagePipeline. Its VAE reconstructs 64 x 64
drawings. Its transformer knows shapes, places and backgrounds, but draws every object grey, whatever colour the
caption names: fine-tuning teaches the colours. DIR/data holds captioned pictures (train.json) that leave out some
pairs of colour and shape; those make the held-out pictures and prompts (validation.json, validation_prompts.txt).
"""

import argparse
import hashlib
import json
import math
import random
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(next(folder for folder in HERE.parents if (folder / "common").is_dir())))

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from tiny import shapes

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
DECODER_STEPS = 4000
LATENT_NOISE = 0.3

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIAL_TOKENS += [f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad", "vision") for end in ("start", "end")]
SPECIAL_TOKENS += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
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

# Qwen/Qwen-Image's own scheduler config
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
VAE = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 5, 6], "num_res_blocks": 1, "temperal_downsample": [False] * 3}
TRANSFORMER = {
    "num_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "joint_attention_dim": 64,
    "axes_dims_rope": (8, 12, 12),
}


# ---- the dataset ----


def draw_scene(colour: str, shape: str, place: str, background: str, rng: random.Random):
    """One object, of 26 to 29 pixels, near its place. Returns (picture, caption)."""
    box = shapes.place_box(place, (SIZE, SIZE), rng.uniform(26, 29), rng)
    scene = [shapes.Found(colour, shape, box)]
    text = shapes.caption([shapes.Found(colour, shape, shapes.place_box(place, (SIZE, SIZE), 27))], background)
    return shapes.draw(scene, background, (SIZE, SIZE)), text


def write_data(folder: Path) -> None:
    """360 training pictures (18 pairs of colour and shape x 5 places x 4 backgrounds) and 10 held-out ones."""
    rng = random.Random(SEED)
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT]
    train = [
        (*pair, place, background) for pair in pairs for place in shapes.PLACES for background in shapes.BACKGROUNDS
    ]
    rng.shuffle(train)
    held_out = [
        (*HELD_OUT[i % len(HELD_OUT)], rng.choice(list(shapes.PLACES)), list(shapes.BACKGROUNDS)[i % 4])
        for i in range(N_PROMPTS)
    ]
    for name, scenes in (("train", train), ("validation", held_out)):
        (folder / name).mkdir(parents=True)
        rows = []
        for i, scene in enumerate(scenes):
            picture, text = draw_scene(*scene, rng)
            picture.save(folder / name / f"{i:04d}.png")
            rows.append({"file_path": f"{name}/{i:04d}.png", "text": text})
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1))
    (folder / "validation_prompts.txt").write_text("".join(row["text"] + "\n" for row in rows))


# ---- the models ----


def build_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE of Qwen's class whose merges spell each known word from its first letter: one token a word."""
    vocab = sorted(ByteLevel.alphabet())
    merges = {}
    for word in ["\u0120" + word for word in WORDS] + FIRST_WORDS:  # \u0120 is the byte-level alphabet's space
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
    vocab += dict.fromkeys(prefix + letter for prefix, letter in merges)
    vocab = {token: i for i, token in enumerate(vocab)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=list(merges), model_max_length=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS[1:]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Random and never trained. Every weight is a function of its name, so that it is the same everywhere."""
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        },
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64},
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
            weight.data.copy_(torch.from_numpy(values / math.sqrt(fan_in)))
    return model


def build_pipeline(weights: Path | None = WEIGHTS) -> QwenImagePipeline:
    """The whole pipeline in float32 on the CPU; without a weights file its VAE and transformer are random."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        vae = AutoencoderKLQwenImage(**VAE, latents_mean=[0.0] * 16, latents_std=[1.0] * 16).eval()
        transformer = QwenImageTransformer2DModel(**TRANSFORMER).eval()
    for weight in temporal_kernels(vae).values():
        weight.data[:, :, :-1] = 0
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    template = pipe.prompt_template_encode.split("{}")[0]
    assert len(tokenizer(template).input_ids) == pipe.prompt_template_encode_start_idx, "the template is not 34 tokens"
    if weights is not None and weights.is_file():
        load_weights(pipe, weights)
    return pipe


def temporal_kernels(vae: AutoencoderKLQwenImage) -> dict[str, torch.Tensor]:
    """Causal 3D kernels: a single image meets only their last slice in time; the others, zero, are not stored."""
    return {name: weight for name, weight in vae.named_parameters() if weight.ndim == 5 and weight.shape[2] > 1}


def save_weights(pipe: QwenImagePipeline, path: Path) -> None:
    kernels = temporal_kernels(pipe.vae)
    tensors = {
        f"vae.{name}": weight[:, :, -1:] if name in kernels else weight
        for name, weight in pipe.vae.state_dict().items()
    }
    tensors |= {f"transformer.{name}": weight for name, weight in pipe.transformer.state_dict().items()}
    tensors |= {name: torch.tensor(pipe.vae.config[name]) for name in ("latents_mean", "latents_std")}
    save_file({name: tensor.half().contiguous().cpu() for name, tensor in tensors.items()}, path)
    assert path.stat().st_size <= 4_000_000, f"{path.name} is {path.stat().st_size} bytes, more than 4,000,000"


def load_weights(pipe: QwenImagePipeline, path: Path) -> None:
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    for name, kernel in temporal_kernels(pipe.vae).items():
        full = torch.zeros_like(kernel)
        full[:, :, -1:] = tensors[f"vae.{name}"]
        tensors[f"vae.{name}"] = full
    for part in ("vae", "transformer"):
        state = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
        getattr(pipe, part).load_state_dict(state)
    pipe.vae.register_to_config(**{name: tensors[name].tolist() for name in ("latents_mean", "latents_std")})


# ---- pretraining ----


def to_tensor(pictures) -> torch.Tensor:
    """PIL pictures to (N, 3, 1, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1


def cosine(step: int, steps: int, peak: float) -> float:
    return peak * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))


def batches(n: int, batch_size: int, steps: int, device: str) -> Iterator[tuple[int, torch.Tensor]]:
    generator = torch.Generator(device).manual_seed(SEED)
    for step in range(steps):
        yield step, torch.randint(n, (batch_size,), generator=generator, device=device)


def random_scene(rng: random.Random):
    """For the VAE: up to three objects of any colour, shape and size, anywhere."""
    objects = []
    for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 3))):
        extent = rng.uniform(14, 40)
        x, y = rng.uniform(0, SIZE - extent), rng.uniform(0, SIZE - extent)
        box = (x, y, x + extent, y + extent)
        objects.append(shapes.Found(rng.choice(list(shapes.COLOURS)), rng.choice(shapes.SHAPES), box))
    return shapes.draw(objects, rng.choice(list(shapes.BACKGROUNDS)), (SIZE, SIZE))


def convolve_single_frames(vae: AutoencoderKLQwenImage) -> None:
    """For training: causal 3D convolutions compute in 2D, twice as fast, equal as long as there is one frame."""
    for conv in vae.modules():
        if isinstance(conv, torch.nn.Conv3d):
            conv.forward = lambda x, cache_x=None, conv=conv: torch.nn.functional.conv2d(
                x[:, :, 0], conv.weight[:, :, -1], conv.bias, padding=conv.kernel_size[-1] // 2
            )[:, :, None]


def pretrain_vae(vae: AutoencoderKLQwenImage, steps: int, n_pictures: int, batch_size: int, device: str) -> None:
    """Reconstruction (L1 + L2) of random scenes from noisy latents; then measures latents_mean and latents_std.

    The noise, and pictures of any colour beside those of the palette, keep the latents smooth: without them a small
    error of the transformer turns patches of grey into red.
    """
    rng = random.Random(SEED)
    pictures = to_tensor([random_scene(rng) for _ in range(n_pictures)]).to(device)  # (N, 3, 1, 64, 64)
    vae.train().to(device)
    convolve_single_frames(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.0, betas=(0.9, 0.99))
    for step, rows in batches(n_pictures, batch_size, steps, device):
        optimizer.param_groups[0]["lr"] = cosine(step, steps, 3e-3)
        x = pictures[rows]
        scale = torch.empty(batch_size, 3, 1, 1, 1, device=device).uniform_(-1, 1)
        shift = torch.empty_like(scale).uniform_(-1, 1) * (1 - scale.abs())
        x[::2] = (x * scale + shift)[::2]
        latents = vae.encode(x).latent_dist.mode()  # (B, 16, 1, 8, 8)
        # vae.decode() clamps to [-1, 1], which stops gradients: call the decoder itself
        reconstruction = vae.decoder(vae.post_quant_conv(latents + LATENT_NOISE * torch.randn_like(latents)))
        error = reconstruction - x
        loss = error.abs().mean() + error.square().mean() + 1e-3 * latents.square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 0:
            psnr = -10 * error.square().mean().div(4).log10().item()
            print(f"vae {step}/{steps} loss {loss.item():.4f} psnr {psnr:.1f}", flush=True)
    vae.eval()
    with torch.no_grad():
        vae.quant_conv.weight[16:] = 0  # the posterior's variance is the noise that the decoder was trained with
        vae.quant_conv.bias[16:] = 2 * math.log(LATENT_NOISE)
        latents = torch.cat([vae.encode(x).latent_dist.mode() for x in pictures[:1024].split(64)])  # (N, 16, 1, 8, 8)
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist()
    )


def sharpen_decoder(vae: AutoencoderKLQwenImage, steps: int, n_pictures: int, batch_size: int, device: str) -> None:
    """Trains the decoder alone on fixed latents: edges and corners get sharp, and the base's latent space stays."""
    rng = random.Random(SEED + 2)
    colours, places, backgrounds = COLOURS + ("grey",), list(shapes.PLACES), list(shapes.BACKGROUNDS)
    scenes = [
        draw_scene(rng.choice(colours), rng.choice(SHAPES), rng.choice(places), rng.choice(backgrounds), rng)[0]
        for _ in range(n_pictures)
    ]
    pictures = to_tensor(scenes).to(device)  # (N, 3, 1, 64, 64)
    vae.to(device)
    convolve_single_frames(vae)
    with torch.no_grad():
        latents = torch.cat([vae.encode(x).latent_dist.mode() for x in pictures.split(64)])  # (N, 16, 1, 8, 8)
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, betas=(0.9, 0.99))
    for step, rows in batches(n_pictures, batch_size, steps, device):
        optimizer.param_groups[0]["lr"] = cosine(step, steps, 2e-3)
        noisy_latents = latents[rows] + LATENT_NOISE * torch.randn_like(latents[rows])
        error = vae.decoder(vae.post_quant_conv(noisy_latents)) - pictures[rows]
        loss = error.abs().mean() + error.square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 0:
            psnr = -10 * error.square().mean().div(4).log10().item()
            print(f"decoder {step}/{steps} loss {loss.item():.4f} psnr {psnr:.1f}", flush=True)


@torch.no_grad()
def encode_pictures(pipe: QwenImagePipeline, pictures: torch.Tensor) -> torch.Tensor:
    """(N, 3, 1, 64, 64) in [-1, 1] to normalised packed latents (N, 16, 64)."""
    vae = pipe.vae
    latents = torch.cat([vae.encode(x.to(vae.device)).latent_dist.mode() for x in pictures.split(64)])
    mean = latents.new_tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = latents.new_tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return pipe._pack_latents((latents - mean) / std, len(latents), 16, SIZE // 8, SIZE // 8)


def pretrain_transformer(
    pipe: QwenImagePipeline, steps: int, n_pictures: int, batch_size: int, device: str, named: float = 0.25
) -> None:
    """Flow matching on grey objects; a share `named` of the captions names a colour, which means nothing yet."""
    rng = random.Random(SEED + 1)
    pictures, texts = [], []
    for _ in range(n_pictures):
        scene = rng.choice(SHAPES), rng.choice(list(shapes.PLACES)), rng.choice(list(shapes.BACKGROUNDS))
        picture, text = draw_scene("grey", *scene, rng)
        pictures.append(picture)
        text = text.replace("grey ", f"{rng.choice(COLOURS)} " if rng.random() < named else "")
        texts.append(text if rng.random() < 0.9 else "")
    pipe.to(device)
    packed_latents = encode_pictures(pipe, to_tensor(pictures))  # (N, 16, 64)
    unique = sorted(set(texts))
    with torch.no_grad():
        embeds, mask = pipe.encode_prompt(unique)  # (U, L, 64), (U, L)
    text_rows = torch.tensor([unique.index(text) for text in texts], device=device)
    transformer = pipe.transformer.train()
    optimizer = torch.optim.AdamW(transformer.parameters(), weight_decay=0.01)
    generator = torch.Generator(device).manual_seed(SEED)
    for step, rows in batches(n_pictures, batch_size, steps, device):
        optimizer.param_groups[0]["lr"] = cosine(step, steps, 2e-3)
        latents = packed_latents[rows]
        noise = torch.randn(latents.shape, generator=generator, device=device)
        u = torch.rand(batch_size, generator=generator, device=device)
        sigma = 1.63 * u / (1 + 0.63 * u)  # uniform, shifted as the scheduler does at 16 tokens
        noisy_latents = torch.lerp(latents, noise, sigma[:, None, None])
        velocity_pred = transformer(
            hidden_states=noisy_latents,
            timestep=sigma,
            encoder_hidden_states=embeds[text_rows[rows]],
            encoder_hidden_states_mask=mask[text_rows[rows]],
            img_shapes=[[(1, SIZE // 16, SIZE // 16)]] * batch_size,
            return_dict=False,
        )[0]
        loss = (velocity_pred - (noise - latents)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 500 == 0:
            print(f"transformer {step}/{steps} loss {loss.item():.4f}", flush=True)
    transformer.eval()


def pretrain(path: Path, scale: float = 1.0) -> None:
    """Trains the VAE, then the transformer on its latents, and writes both; `scale` shrinks the work for a trial."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(SEED)
    pipe = build_pipeline(weights=None)
    pretrain_vae(pipe.vae, int(3000 * scale), int(12000 * scale), 16, device)
    pretrain_transformer(pipe, int(3000 * scale), int(8000 * scale), 32, device)
    sharpen_decoder(pipe.vae, int(DECODER_STEPS * scale), int(8000 * scale), 16, device)
    save_weights(pipe, path)


# ---- the command ----


def fingerprint() -> str:
    """Changes when this script, the drawings or the weights do."""
    digest = hashlib.sha256()
    for path in (Path(__file__), Path(shapes.__file__), WEIGHTS):
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def make(output_dir: Path) -> bool:
    """Writes output_dir/model and output_dir/data; returns False when they were there and up to date."""
    stamp = output_dir / "stamp.txt"
    if stamp.is_file() and stamp.read_text() == fingerprint():
        return False
    for part in ("model", "data"):
        shutil.rmtree(output_dir / part, ignore_errors=True)
    stamp.unlink(missing_ok=True)
    write_data(output_dir / "data")
    build_pipeline().save_pretrained(output_dir / "model")
    stamp.write_text(fingerprint())  # last: a killed run is started over
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help="where model/ and data/ go")
    parser.add_argument(
        "--pretrain", action="store_true", help="train the VAE and the base, write tiny_weights.safetensors"
    )
    args = parser.parse_args()
    if not (args.pretrain or args.output_dir):
        parser.error("nothing to do: give --output_dir DIR, or --pretrain")
    if args.pretrain:
        pretrain(WEIGHTS)
    if args.output_dir:
        print(f"tiny model and data {'written to' if make(args.output_dir) else 'up to date in'} {args.output_dir}")


if __name__ == "__main__":
    main()

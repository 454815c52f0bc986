"""Builds the embedded tiny FLUX.2 Klein: a checkpoint of the real classes and a drawn dataset. Nothing is downloaded.

    python make_tiny.py --output_dir DIR   writes DIR/model and DIR/data in seconds; nothing when they are up to date
    python make_tiny.py --pretrain         makes tiny_weights.safetensors (minutes on a GPU)

DIR/model is in diffusers' layout and opens with the unmodified Flux2KleinPipeline; the base was trained on prompts of
max_sequence_length 32, and configs/tiny.yaml fine-tunes it at 24. Its VAE reconstructs 64 x 64 drawings. Its
transformer knows shapes, places and backgrounds, but draws every object grey, whatever colour the caption names:
fine-tuning teaches the colours. DIR/data holds captioned pictures (train.json) that leave out some pairs of colour and
shape; those make the held-out pictures and prompts (validation.json, validation_prompts.txt).
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
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from tiny import shapes

WEIGHTS = HERE / "tiny_weights.safetensors"
SIZE = 64  # pixels; 8 x 8 latents, 16 packed tokens
MAX_SEQUENCE_LENGTH = 32  # text tokens, padding included: it is not masked, so it is part of what the base learns
INFERENCE_STEPS = 16  # that the base is made for: the pipeline's noise schedule depends on it
SEED = 0

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
HELD_OUT = (("red", "triangle"), ("green", "circle"), ("blue", "cross"), ("yellow", "square"))
N_PROMPTS = 10
LATENT_NOISE = 0.3

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


def draw_scene(colour: str, shape: str, place: str, background: str, rng: random.Random) -> tuple[Image.Image, str]:
    """One object, of 26 to 29 pixels, near its place. Returns (picture, caption)."""
    box = shapes.place_box(place, (SIZE, SIZE), rng.uniform(26, 29), rng)
    scene = [shapes.Found(colour, shape, box)]
    text = shapes.caption([shapes.Found(colour, shape, shapes.place_box(place, (SIZE, SIZE), 27))], background)
    return shapes.draw(scene, background, (SIZE, SIZE)), text


def write_data(folder: Path) -> None:
    """400 training pictures (20 pairs of colour and shape x 5 places x 4 backgrounds) and 10 held-out ones."""
    rng = random.Random(SEED)
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT]
    train = [
        (*pair, place, background) for pair in pairs for place in shapes.PLACES for background in shapes.BACKGROUNDS
    ]
    rng.shuffle(train)
    held_out = [
        (*HELD_OUT[i % len(HELD_OUT)], rng.choice(list(shapes.PLACES)), list(shapes.BACKGROUNDS)[(i + i // 4) % 4])
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
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=list(merges), model_max_length=1024)  # pads with <|endoftext|>
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """Random and never trained. Every weight is a function of its name, so that it is the same everywhere."""
    token = tokenizer.convert_tokens_to_ids
    config = Qwen3Config(
        **TEXT_ENCODER,
        vocab_size=len(tokenizer),
        bos_token_id=token("<|endoftext|>"),
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
    )
    model = Qwen3ForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 1:  # norms
            weight.data.fill_(1.0)
        else:
            values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(weight.shape))
            scale = 1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5
            scale *= BRANCH_SCALE if "o_proj" in name or "down_proj" in name else 1.0
            weight.data.copy_(torch.from_numpy(values * scale))
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
        load_weights(pipe, weights)
    return pipe


def save_weights(pipe: Flux2KleinPipeline, path: Path) -> None:
    """The VAE, with its batch norm's running statistics, and the transformer, in float16."""
    tensors = {f"vae.{name}": tensor for name, tensor in pipe.vae.state_dict().items()}
    tensors |= {f"transformer.{name}": tensor for name, tensor in pipe.transformer.state_dict().items()}
    save_file({name: tensor.half().contiguous().cpu() for name, tensor in tensors.items()}, path)
    assert path.stat().st_size <= 4_000_000, f"{path.name} is {path.stat().st_size} bytes, more than 4,000,000"


def load_weights(pipe: Flux2KleinPipeline, path: Path) -> None:
    tensors = load_file(path)
    for part in ("vae", "transformer"):
        state = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
        getattr(pipe, part).load_state_dict(state)


# ---- pretraining ----


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """PIL pictures to (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def cosine(step: int, steps: int, peak: float) -> float:
    return peak * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))


def batches(n: int, batch_size: int, steps: int, device: str) -> Iterator[tuple[int, torch.Tensor]]:
    generator = torch.Generator(device).manual_seed(SEED)
    for step in range(steps):
        yield step, torch.randint(n, (batch_size,), generator=generator, device=device)


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


def random_scene(rng: random.Random) -> Image.Image:
    """For the VAE: up to three objects of any colour, shape and size, anywhere."""
    objects = []
    for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 3))):
        extent = rng.uniform(14, 40)
        x, y = rng.uniform(0, SIZE - extent), rng.uniform(0, SIZE - extent)
        box = (x, y, x + extent, y + extent)
        objects.append(shapes.Found(rng.choice(list(shapes.COLOURS)), rng.choice(shapes.SHAPES), box))
    return shapes.draw(objects, rng.choice(list(shapes.BACKGROUNDS)), (SIZE, SIZE))


@torch.no_grad()
def encode(vae: AutoencoderKLFlux2, pictures: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1] to latents (N, 8, H/8, W/8), the posterior's mode."""
    return torch.cat([vae.encode(x).latent_dist.mode() for x in pictures.split(64)])


def pretrain_vae(vae: AutoencoderKLFlux2, steps: int, n_pictures: int, batch_size: int, device: str) -> None:
    """Reconstruction (L1 + L2) of random scenes from noisy latents; then measures the batch norm's statistics.

    The noise, and pictures of any colour beside those of the palette, keep the latents smooth: without them a small
    error of the transformer turns patches of grey into red.
    """
    rng = random.Random(SEED)
    pictures = to_tensor([random_scene(rng) for _ in range(n_pictures)]).to(device)  # (N, 3, 64, 64)
    vae.train().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.0, betas=(0.9, 0.99))
    for step, rows in batches(n_pictures, batch_size, steps, device):
        x = pictures[rows]
        scale = torch.empty(batch_size, 3, 1, 1, device=device).uniform_(-1, 1)
        shift = torch.empty_like(scale).uniform_(-1, 1) * (1 - scale.abs())
        x[::2] = (x * scale + shift)[::2]
        latents = vae.encode(x).latent_dist.mode()  # (B, 8, 8, 8)
        error = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample - x
        loss = error.abs().mean() + error.square().mean() + 1e-3 * latents.square().mean()
        update(optimizer, loss, cosine(step, steps, 1.5e-3))
        if step % 250 == 0:
            print(f"vae {step}/{steps} loss {loss.item():.4f} psnr {psnr(error):.1f}", flush=True)
    vae.eval()
    with torch.no_grad():
        vae.quant_conv.weight[8:] = 0  # the posterior's variance is the noise that the decoder was trained with
        vae.quant_conv.bias[8:] = 2 * math.log(LATENT_NOISE)
    patches = Flux2KleinPipeline._patchify_latents(encode(vae, pictures[:1024]))  # (N, 32, 4, 4)
    vae.bn.running_mean.copy_(patches.mean((0, 2, 3)))
    vae.bn.running_var.copy_(patches.var((0, 2, 3)))


def sharpen_decoder(vae: AutoencoderKLFlux2, steps: int, n_pictures: int, batch_size: int, device: str) -> None:
    """Trains the decoder alone on fixed latents: edges and corners get sharp, and the base's latent space stays."""
    rng = random.Random(SEED + 2)
    colours, places, backgrounds = COLOURS + ("grey",), list(shapes.PLACES), list(shapes.BACKGROUNDS)
    scenes = [
        draw_scene(rng.choice(colours), rng.choice(SHAPES), rng.choice(places), rng.choice(backgrounds), rng)[0]
        for _ in range(n_pictures)
    ]
    pictures = to_tensor(scenes).to(device)  # (N, 3, 64, 64)
    latents = encode(vae.to(device), pictures)  # (N, 8, 8, 8)
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, betas=(0.9, 0.99))
    for step, rows in batches(n_pictures, batch_size, steps, device):
        noisy_latents = latents[rows] + LATENT_NOISE * torch.randn_like(latents[rows])
        error = vae.decode(noisy_latents).sample - pictures[rows]
        loss = error.abs().mean() + error.square().mean()
        update(optimizer, loss, cosine(step, steps, 2e-3))
        if step % 250 == 0:
            print(f"decoder {step}/{steps} loss {loss.item():.4f} psnr {psnr(error):.1f}", flush=True)


def packed_latents_of(pipe: Flux2KleinPipeline, pictures: torch.Tensor) -> torch.Tensor:
    """(N, 3, 64, 64) in [-1, 1] to normalised packed latents (N, 16, 32)."""
    patches = pipe._patchify_latents(encode(pipe.vae, pictures.to(pipe.vae.device)))  # (N, 32, 4, 4)
    return pipe._pack_latents(pipe.vae.bn(patches))  # in eval mode: by the running statistics, with their eps


def pretrain_transformer(
    pipe: Flux2KleinPipeline, steps: int, n_pictures: int, batch_size: int, device: str, named: float = 0.25
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
    packed_latents = packed_latents_of(pipe, to_tensor(pictures))  # (N, 16, 32)
    img_ids = pipe._prepare_latent_ids(torch.empty(1, 1, SIZE // 16, SIZE // 16)).to(device)  # (1, 16, 4)
    unique = sorted(set(texts))
    with torch.no_grad():
        # (U, 32, 96) and (U, 32, 4)
        embeds, txt_ids = pipe.encode_prompt(unique, max_sequence_length=MAX_SEQUENCE_LENGTH)
    text_rows = torch.tensor([unique.index(text) for text in texts], device=device)
    mu = compute_empirical_mu(packed_latents.shape[1], INFERENCE_STEPS)
    transformer = pipe.transformer.train()
    optimizer = torch.optim.AdamW(transformer.parameters(), weight_decay=0.01)
    generator = torch.Generator(device).manual_seed(SEED)
    for step, rows in batches(n_pictures, batch_size, steps, device):
        latents = packed_latents[rows]
        noise = torch.randn(latents.shape, generator=generator, device=device)
        u = torch.rand(batch_size, generator=generator, device=device)
        sigma = pipe.scheduler.time_shift(mu, 1.0, u)  # as the pipeline's schedule: 15 of its 16 steps start above 0.4
        velocity_pred = transformer(
            hidden_states=torch.lerp(latents, noise, sigma[:, None, None]),
            timestep=sigma,
            encoder_hidden_states=embeds[text_rows[rows]],
            txt_ids=txt_ids[:1],
            img_ids=img_ids,
            return_dict=False,
        )[0]
        loss = (velocity_pred - (noise - latents)).square().mean()
        update(optimizer, loss, cosine(step, steps, 2e-3))
        if step % 500 == 0:
            print(f"transformer {step}/{steps} loss {loss.item():.4f}", flush=True)
    transformer.eval()


def plain_captions() -> list[str]:
    """Every shape at every place on white, no colour named."""
    return [f"a {shape} {place}, on a white background" for shape in SHAPES for place in shapes.PLACES]


def sample(pipe: Flux2KleinPipeline, prompts: list[str], guidance_scale: float = 2.0) -> list[Image.Image]:
    """What the unmodified pipeline draws, one seed a prompt."""
    return pipe(
        prompt=prompts,
        height=SIZE,
        width=SIZE,
        num_inference_steps=INFERENCE_STEPS,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
        max_sequence_length=MAX_SEQUENCE_LENGTH,
    ).images


def pretrain(path: Path, scale: float = 1.0) -> None:
    """Trains the VAE, then the transformer on its latents, and writes both; `scale` shrinks the work for a trial."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(SEED)
    pipe = build_pipeline(weights=None)
    pretrain_vae(pipe.vae, int(4500 * scale), int(12000 * scale), 16, device)
    pretrain_transformer(pipe, int(2500 * scale), int(8000 * scale), 32, device)
    sharpen_decoder(pipe.vae, int(3500 * scale), int(8000 * scale), 16, device)
    captions = plain_captions()
    pictures = sample(pipe, captions)
    right = sum(
        shapes.shows(picture, text, check_place=True) for picture, text in zip(pictures, captions, strict=True)
    )
    print(f"the base draws {right} of {len(captions)} plain captions", flush=True)
    save_weights(pipe, path)


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
    parser.add_argument("--pretrain", action="store_true", help="train the VAE and the base, write the weights")
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

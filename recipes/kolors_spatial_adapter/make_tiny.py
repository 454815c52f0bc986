"""Builds the embedded tiny Kolors: a checkpoint of the real classes and drawn layouts. Nothing is downloaded.

    python make_tiny.py --output_dir DIR   writes DIR/model and DIR/data in seconds; nothing when they are up to date
    python make_tiny.py --pretrain         makes tiny_weights.safetensors (minutes on a GPU)
    python make_tiny.py --anneal           goes on with them at a falling learning rate (a quarter of an hour on a CPU)

DIR/model is in diffusers' layout and opens with the unmodified KolorsPipeline. Its VAE reconstructs 64 x 64 drawings.
Its UNet draws what a caption names ("a red circle and a blue square, on a white background") where and as large as the
noise has it: the adapter teaches it to keep to boxes. DIR/data holds captioned pictures with their boxes (train.jsonl)
and held-out layouts (validation.jsonl, validation_prompts.txt).

The shipped weights: --pretrain, whose last stage was stopped after 2125 of its 6000 steps, then --anneal.
"""

import argparse
import hashlib
import json
import math
import random
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(next(folder for folder in HERE.parents if (folder / "common").is_dir())))

import numpy as np
import sentencepiece
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, KolorsPipeline, UNet2DConditionModel
from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
from PIL import Image
from safetensors.torch import load_file, save_file

from tiny import shapes

WEIGHTS = HERE / "tiny_weights.safetensors"
SIZE = 64  # pixels
INFERENCE_STEPS = 16  # that the base is tried with
SEED = 0

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
EXTENT = (15, 30)  # pixels, of a box's sides
N_TRAIN, N_HELD_OUT = 600, 24
LATENT_NOISE = 0.2

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
    """Random and never trained. Every weight is a function of its name, so that it is the same everywhere."""
    model = ChatGLMModel(ChatGLMConfig(**TEXT_ENCODER, padded_vocab_size=tokenizer.vocab_size)).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 1:  # norms
            weight.data.fill_(1.0)
        else:
            values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(weight.shape))
            scale = 1.0 if "word_embeddings" in name else weight.shape[1] ** -0.5
            scale *= BRANCH_SCALE if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")) else 1.0
            weight.data.copy_(torch.from_numpy(values * scale))
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


def save_weights(pipe: KolorsPipeline, path: Path) -> None:
    """The VAE, its scaling factor, and the UNet, in float16."""
    tensors = {f"vae.{name}": tensor for name, tensor in pipe.vae.state_dict().items()}
    tensors |= {f"unet.{name}": tensor for name, tensor in pipe.unet.state_dict().items()}
    tensors = {name: tensor.half().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(tensors | {"scaling_factor": torch.tensor(pipe.vae.config.scaling_factor)}, path)
    assert path.stat().st_size <= 4_000_000, f"{path.name} is {path.stat().st_size} bytes, more than 4,000,000"


def load_weights(pipe: KolorsPipeline, path: Path) -> None:
    tensors = load_file(path)
    for part in ("vae", "unet"):
        state = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
        getattr(pipe, part).load_state_dict(state)
    pipe.vae.register_to_config(scaling_factor=tensors["scaling_factor"].item())


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


def adamw(parameters: Iterator[torch.nn.Parameter], device: str) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, weight_decay=0.0, betas=(0.9, 0.99), fused=device == "cuda")


def psnr(error: torch.Tensor) -> float:
    """In decibels, of an error of pictures in [-1, 1]."""
    return -10 * error.square().mean().div(4).log10().item()


def random_scene(rng: random.Random) -> Image.Image:
    """For the VAE: up to three objects of any colour, shape and size, anywhere."""
    objects = []
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3))):
        width, height = draw_extent(rng)
        x, y = rng.uniform(0, SIZE - width), rng.uniform(0, SIZE - height)
        box = (x, y, x + width, y + height)
        objects.append(shapes.Found(rng.choice(list(shapes.COLOURS)), rng.choice(shapes.SHAPES), box))
    return shapes.draw(objects, rng.choice(list(shapes.BACKGROUNDS)), (SIZE, SIZE))


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1] to latents (N, 4, H/4, W/4), the posterior's mode, not scaled."""
    return torch.cat([vae.encode(x).latent_dist.mode() for x in pictures.split(256)])


def pretrain_vae(vae: AutoencoderKL, steps: int, n_pictures: int, batch_size: int, device: str) -> None:
    """Reconstruction (L1 + L2) of random scenes from noisy latents; then measures the scaling factor.

    The noise, and pictures of any colour beside those of the palette, keep the latents smooth, so that a small error
    of the UNet is a small error of the picture.
    """
    rng = random.Random(SEED)
    pictures = to_tensor([random_scene(rng) for _ in range(n_pictures)]).to(device)  # (N, 3, 64, 64)
    vae.train().to(device)
    optimizer = adamw(vae.parameters(), device)
    for step, rows in batches(n_pictures, batch_size, steps, device):
        x = pictures[rows]
        scale = torch.empty(batch_size, 3, 1, 1, device=device).uniform_(-1, 1)
        shift = torch.empty_like(scale).uniform_(-1, 1) * (1 - scale.abs())
        x[::2] = (x * scale + shift)[::2]
        latents = vae.encode(x).latent_dist.mode()  # (B, 4, 16, 16)
        error = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample - x
        loss = error.abs().mean() + error.square().mean() + 1e-2 * latents.square().mean()
        update(optimizer, loss, cosine(step, steps, 3e-3))
        if step % 250 == 0:
            print(f"vae {step}/{steps} loss {loss.item():.4f} psnr {psnr(error):.1f}", flush=True)
    vae.eval()
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0  # the posterior's variance is the noise that the decoder was trained with
        vae.quant_conv.bias[4:] = 2 * math.log(LATENT_NOISE)
    latents = encode(vae, pictures[:1024])
    print(f"latents: mean {latents.mean((0, 2, 3)).tolist()}, std {latents.std((0, 2, 3)).tolist()}", flush=True)
    vae.register_to_config(scaling_factor=1 / latents.std().item())


def sharpen_decoder(vae: AutoencoderKL, pictures: torch.Tensor, steps: int, batch_size: int, device: str) -> None:
    """Trains the decoder alone on fixed latents: edges and corners get sharp, and the base's latent space stays."""
    latents = encode(vae, pictures)  # (N, 4, 16, 16)
    optimizer = adamw([*vae.decoder.parameters(), *vae.post_quant_conv.parameters()], device)
    for step, rows in batches(len(pictures), batch_size, steps, device):
        noisy_latents = latents[rows] + LATENT_NOISE * torch.randn_like(latents[rows])
        error = vae.decode(noisy_latents).sample - pictures[rows]
        loss = error.abs().mean() + error.square().mean()
        update(optimizer, loss, cosine(step, steps, 2e-3))
        if step % 250 == 0:
            print(f"decoder {step}/{steps} loss {loss.item():.4f} psnr {psnr(error):.1f}", flush=True)


def pretrain_unet(
    pipe: KolorsPipeline,
    pictures: torch.Tensor,
    texts: list[str],
    steps: int,
    batch_size: int,
    device: str,
    peak: float = 2e-3,
) -> None:
    """Predicts the noise of drawn layouts from their captions, a tenth of them empty, in the scheduler's own mixture.

    pictures: (N, 3, 64, 64) in [-1, 1] on the device.
    """
    latents = encode(pipe.vae, pictures) * pipe.vae.config.scaling_factor  # (N, 4, 16, 16)
    unique = ["", *sorted(set(texts))]
    place = {text: number for number, text in enumerate(unique)}
    text_rows = torch.tensor([place[text] for text in texts], device=device)
    encoded = [encode_texts(pipe, unique[start : start + 64]) for start in range(0, len(unique), 64)]
    prompt_embeds, pooled = (torch.cat(parts) for parts in zip(*encoded, strict=True))  # (U, 256, 48), (U, 48)
    time_ids = torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE], device=device).float().expand(batch_size, 6)
    alphas_cumprod = pipe.scheduler.alphas_cumprod.to(device)  # (1100,)
    optimizer = adamw(pipe.unet.train().parameters(), device)
    generator = torch.Generator(device).manual_seed(SEED)
    for step, rows in batches(len(latents), batch_size, steps, device):
        noise = torch.randn(batch_size, *latents.shape[1:], generator=generator, device=device)
        timestep = torch.randint(len(alphas_cumprod), (batch_size,), generator=generator, device=device)
        alpha = alphas_cumprod[timestep][:, None, None, None]
        kept = torch.rand(batch_size, generator=generator, device=device) >= 0.1
        text = text_rows[rows] * kept  # row 0 is the empty caption
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            noise_pred = pipe.unet(
                alpha.sqrt() * latents[rows] + (1 - alpha).sqrt() * noise,
                timestep,
                encoder_hidden_states=prompt_embeds[text],
                added_cond_kwargs={"text_embeds": pooled[text], "time_ids": time_ids},
            ).sample
        loss = (noise_pred.float() - noise).square().mean()
        update(optimizer, loss, cosine(step, steps, peak))
        if step % 250 == 0:
            print(f"unet {step}/{steps} loss {loss.item():.4f}", flush=True)
    pipe.unet.eval()


@torch.no_grad()
def encode_texts(pipe: KolorsPipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 256, 48) and (N, 48), as the pipeline encodes prompts."""
    prompt_embeds, _, pooled, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False)
    return prompt_embeds, pooled


def sample(pipe: KolorsPipeline, prompts: list[str], guidance_scale: float = 3.0) -> list[Image.Image]:
    """What the unmodified pipeline draws, one seed a prompt."""
    return pipe(
        prompts,
        height=SIZE,
        width=SIZE,
        num_inference_steps=INFERENCE_STEPS,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
    ).images


def shows(picture: Image.Image, objects: list[dict]) -> bool:
    """True when the picture holds exactly the objects of a layout's row, wherever they are."""
    found = sorted(f"{item.colour} {item.shape}" for item in shapes.find_shapes(picture))
    return found == sorted(item["phrase"] for item in objects)


def draw_layouts(count: int, rng: random.Random) -> tuple[torch.Tensor, list[str]]:
    """Pictures (N, 3, 64, 64) in [-1, 1] and their captions."""
    pictures, rows = zip(*(draw_layout(rng, count_of(i)) for i in range(count)), strict=True)
    return to_tensor(pictures), [row["text"] for row in rows]


def print_right(pipe: KolorsPipeline, rng: random.Random, count: int) -> None:
    """How many captions the base draws."""
    pipe.set_progress_bar_config(disable=True)
    layouts = [draw_layout(rng, count_of(i))[1] for i in range(count)]
    for guidance_scale in (1.0, 2.0, 3.0, 5.0):
        drawn = sample(pipe, [row["text"] for row in layouts], guidance_scale)
        right = sum(shows(picture, row["objects"]) for picture, row in zip(drawn, layouts, strict=True))
        print(f"the base draws {right} of {len(layouts)} captions at guidance {guidance_scale}", flush=True)


def pretrain(path: Path, scale: float = 1.0) -> None:
    """Trains the VAE, then the UNet on its latents, and writes both; `scale` shrinks the work for a trial."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(SEED)
    start = time.perf_counter()
    pipe = build_pipeline(weights=None).to(device)
    pretrain_vae(pipe.vae, int(4000 * scale), int(16000 * scale), 64, device)
    print(f"{time.perf_counter() - start:.0f} s: the VAE", flush=True)
    rng = random.Random(SEED + 1)
    pictures, texts = draw_layouts(int(32000 * scale), rng)
    pictures = pictures.to(device)
    sharpen_decoder(pipe.vae, pictures, int(2000 * scale), 64, device)
    print(f"{time.perf_counter() - start:.0f} s: its decoder", flush=True)
    pretrain_unet(pipe, pictures, texts, int(6000 * scale), 256, device)
    print(f"{time.perf_counter() - start:.0f} s: the UNet", flush=True)
    save_weights(pipe, path)
    print_right(pipe, rng, min(48, int(48 * scale) + 2))


def anneal(path: Path, scale: float = 1.0) -> None:
    """Trains the UNet of a weights file a little more, its learning rate falling to zero, and writes it back: what a
    pretraining lacks that was stopped early."""
    pipe = build_pipeline(path)
    rng = random.Random(SEED + 2)
    pictures, texts = draw_layouts(int(8000 * scale), rng)
    pretrain_unet(pipe, pictures, texts, int(1500 * scale), 32, "cpu", peak=5e-4)
    save_weights(pipe, path)
    print_right(pipe, rng, min(48, int(48 * scale) + 2))


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
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the file of weights, written and read")
    parser.add_argument("--pretrain", action="store_true", help="train the VAE and the base, write the weights")
    parser.add_argument("--anneal", action="store_true", help="train the base of the weights file a little more")
    parser.add_argument("--pretrain_scale", type=float, default=1.0, help="share of the work to do, for a trial")
    args = parser.parse_args()
    if not (args.pretrain or args.anneal or args.output_dir):
        parser.error("nothing to do: give --output_dir DIR, --pretrain or --anneal")
    if args.pretrain:
        pretrain(args.weights, args.pretrain_scale)
    if args.anneal:
        anneal(args.weights, args.pretrain_scale)
    if args.output_dir:
        written = make(args.output_dir, args.weights)
        print(f"tiny model and data {'written to' if written else 'up to date in'} {args.output_dir}")


if __name__ == "__main__":
    main()

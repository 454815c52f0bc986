"""What the pretrain_<model>.py share. Each trains the base of one recipe's tiny model and writes its weights."""

import argparse
import importlib.util
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tiny import building, shapes

ROOT = Path(__file__).resolve().parents[1]
SEED = 0


def load_make_tiny(recipe: str) -> ModuleType:
    """recipes/<recipe>/make_tiny.py as a module."""
    path = ROOT / "recipes" / recipe / "make_tiny.py"
    spec = importlib.util.spec_from_file_location(f"{recipe}_make_tiny", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parser_of(description: str, weights: Path) -> argparse.ArgumentParser:
    """The command line of a pretrain_<model>.py; `weights` is the file that the recipe ships."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=weights, help="the file that is written")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the work to do, for a trial")
    return parser


def seeded_device() -> str:
    """A GPU with TF32 where there is one, else the CPU; torch's generators start from SEED."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(SEED)
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- pictures ----


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """PIL pictures to (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(error: Tensor) -> float:
    """In decibels, of an error of pictures in [-1, 1]."""
    return -10 * error.square().mean().div(4).log10().item()


def random_scene(
    rng: random.Random, size: int, counts: Sequence[int], draw_extent: Callable[[random.Random], tuple[float, float]]
) -> Image.Image:
    """For a VAE: as many objects as one of `counts`, of any colour and shape, anywhere in size x size pixels.

    draw_extent: makes an object's (width, height) in pixels.
    """
    objects = []
    for _ in range(rng.choice(counts)):
        width, height = draw_extent(rng)
        x, y = rng.uniform(0, size - width), rng.uniform(0, size - height)
        box = (x, y, x + width, y + height)
        objects.append(shapes.Found(rng.choice(list(shapes.COLOURS)), rng.choice(shapes.SHAPES), box))
    return shapes.draw(objects, rng.choice(list(shapes.BACKGROUNDS)), (size, size))


def square_extent(rng: random.Random) -> tuple[float, float]:
    """(width, height) of 14 to 40 pixels, the same."""
    extent = rng.uniform(14, 40)
    return extent, extent


def one_object_scenes(n: int, rng: random.Random, colours: Sequence[str], names: Sequence[str]) -> list[Image.Image]:
    """Pictures of one object each, as building.draw_scene draws it; `names` are those of shapes."""
    places, backgrounds = list(shapes.PLACES), list(shapes.BACKGROUNDS)
    return [
        building.draw_scene(rng.choice(colours), rng.choice(names), rng.choice(places), rng.choice(backgrounds), rng)[
            0
        ]
        for _ in range(n)
    ]


def grey_scenes(
    n: int, rng: random.Random, colours: Sequence[str], names: Sequence[str], named: float = 0.25
) -> tuple[list[Image.Image], list[str]]:
    """Pictures of one grey object each, and captions; a tenth of these is empty. A share `named` of the others names a
    colour, which means nothing yet."""
    pictures, texts = [], []
    for _ in range(n):
        scene = rng.choice(names), rng.choice(list(shapes.PLACES)), rng.choice(list(shapes.BACKGROUNDS))
        picture, text = building.draw_scene("grey", *scene, rng)
        pictures.append(picture)
        text = text.replace("grey ", f"{rng.choice(colours)} " if rng.random() < named else "")
        texts.append(text if rng.random() < 0.9 else "")
    return pictures, texts


# ---- steps ----


def cosine(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """The learning rate of a step: it rises over `warmup` steps and falls to zero as a cosine."""
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def batches(n: int, batch_size: int, steps: int, device: str | torch.device) -> Iterator[tuple[int, Tensor]]:
    """(step, row numbers (batch_size,) below n)"""
    generator = torch.Generator(device).manual_seed(SEED)
    for step in range(steps):
        yield step, torch.randint(n, (batch_size,), generator=generator, device=device)


def adamw(parameters: Iterable[torch.nn.Parameter], device: str | torch.device) -> torch.optim.AdamW:
    """For VAEs."""
    fused = torch.device(device).type == "cuda"
    return torch.optim.AdamW(parameters, weight_decay=0.0, betas=(0.9, 0.99), fused=fused)


def update(optimizer: torch.optim.Optimizer, loss: Tensor, learning_rate: float) -> None:
    """One optimizer step, its gradient norm clipped to 1."""
    loss.backward()
    optimizer.param_groups[0]["lr"] = learning_rate
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


# ---- VAEs ----


@torch.no_grad()
def encode(vae: torch.nn.Module, pictures: Tensor, batch_size: int = 64) -> Tensor:
    """(N, 3, [1,] H, W) in [-1, 1] to latents (N, C, [1,] h, w), the posterior's mode."""
    return torch.cat([vae.encode(x).latent_dist.mode() for x in pictures.split(batch_size)])


def train_autoencoder(
    vae: torch.nn.Module,
    decode: Callable[[Tensor], Tensor],
    pictures: Tensor,
    steps: int,
    batch_size: int,
    noise: float,
    penalty: float,
    peak: float,
) -> None:
    """Reconstruction (L1 + L2) of pictures from noisy latents, on the pictures' device.

    The noise, and pictures of any colour beside those of the palette, keep the latents smooth: without them a small
    error of the model that works on them turns patches of grey into red.

    Args:
        decode: latents to pictures, not clamped, with gradients.
        pictures: (N, 3, [1,] H, W) in [-1, 1].
        noise: standard deviation of the latents' noise.
        penalty: weight of the latents' mean square in the loss.
        peak: highest learning rate.
    """
    vae.train().to(pictures.device)
    optimizer = adamw(vae.parameters(), pictures.device)
    for step, rows in batches(len(pictures), batch_size, steps, pictures.device):
        x = pictures[rows]
        scale = x.new_empty(batch_size, x.shape[1], *[1] * (x.ndim - 2)).uniform_(-1, 1)
        shift = torch.empty_like(scale).uniform_(-1, 1) * (1 - scale.abs())
        x[::2] = (x * scale + shift)[::2]
        latents = vae.encode(x).latent_dist.mode()
        error = decode(latents + noise * torch.randn_like(latents)) - x
        loss = error.abs().mean() + error.square().mean() + penalty * latents.square().mean()
        update(optimizer, loss, cosine(step, steps, peak))
        if step % 250 == 0:
            print(f"vae {step}/{steps} loss {loss.item():.4f} psnr {psnr(error):.1f}", flush=True)
    vae.eval()
    with torch.no_grad():
        channels = len(vae.quant_conv.weight) // 2
        vae.quant_conv.weight[channels:] = 0  # the posterior's variance is the noise that the decoder was trained with
        vae.quant_conv.bias[channels:] = 2 * math.log(noise)


def sharpen_decoder(
    vae: torch.nn.Module,
    decode: Callable[[Tensor], Tensor],
    pictures: Tensor,
    steps: int,
    batch_size: int,
    noise: float,
) -> None:
    """Trains the decoder alone on fixed latents: edges and corners get sharp, and the base's latent space stays.

    Arguments as those of train_autoencoder.
    """
    latents = encode(vae.to(pictures.device), pictures)
    optimizer = adamw([*vae.decoder.parameters(), *vae.post_quant_conv.parameters()], pictures.device)
    for step, rows in batches(len(pictures), batch_size, steps, pictures.device):
        error = decode(latents[rows] + noise * torch.randn_like(latents[rows])) - pictures[rows]
        loss = error.abs().mean() + error.square().mean()
        update(optimizer, loss, cosine(step, steps, 2e-3))
        if step % 250 == 0:
            print(f"decoder {step}/{steps} loss {loss.item():.4f} psnr {psnr(error):.1f}", flush=True)


# ---- transformers ----


def train_velocity(
    transformer: torch.nn.Module,
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    packed_latents: Tensor,
    shift: Callable[[Tensor], Tensor],
    steps: int,
    batch_size: int,
) -> None:
    """Flow matching on the latents' device.

    Args:
        predict: (noisy latents (B, L, C), sigma (B,), row numbers (B,)) to velocities (B, L, C).
        packed_latents: (N, L, C), normalised.
        shift: uniform numbers (B,) to sigmas (B,), as the pipeline's schedule shifts them.
    """
    device = packed_latents.device
    transformer.train()
    optimizer = torch.optim.AdamW(transformer.parameters(), weight_decay=0.01)
    generator = torch.Generator(device).manual_seed(SEED)
    for step, rows in batches(len(packed_latents), batch_size, steps, device):
        latents = packed_latents[rows]
        noise = torch.randn(latents.shape, generator=generator, device=device)
        sigma = shift(torch.rand(batch_size, generator=generator, device=device))
        velocity_pred = predict(torch.lerp(latents, noise, sigma[:, None, None]), sigma, rows)
        loss = (velocity_pred - (noise - latents)).square().mean()
        update(optimizer, loss, cosine(step, steps, 2e-3))
        if step % 500 == 0:
            print(f"transformer {step}/{steps} loss {loss.item():.4f}", flush=True)
    transformer.eval()

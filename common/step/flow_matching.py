"""Flow matching with straight paths.

noisy_latents = (1 - sigma) * latents + sigma * noise, velocity target = noise - latents.

Randomness is drawn sample by sample: noise, sigma and caption dropout are functions of (seed, step, position in the
step's group), so a step is the same however its samples are split over processes and micro-batches, and a resumed run
continues exactly.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.image_settings import FlowMatching

VALIDATION_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)


def sample_rngs(seed: int, step: int, positions: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator a sample, seeded from (seed, step, position). CPU numbers are the same on every machine."""
    states = [
        np.random.SeedSequence([seed, step, int(position)]).generate_state(1, np.uint64)[0] for position in positions
    ]
    return [torch.Generator().manual_seed(int(state) >> 1) for state in states]


def draw_uniform(rngs: Sequence[torch.Generator]) -> Tensor:
    """(B,) float32 in [0, 1), one number from each sample's generator."""
    return torch.cat([torch.rand(1, generator=rng) for rng in rngs])


def draw_normal(rngs: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """(B, *shape) float32 standard normal, each sample from its own generator."""
    return torch.stack([torch.randn(tuple(shape), generator=rng) for rng in rngs])


def sample_sigmas(
    uniform: Tensor, scheme: str, logit_mean: float = 0.0, logit_std: float = 1.0, mode_scale: float = 1.29
) -> Tensor:
    """Map (B,) uniform numbers to (B,) sigmas in [0, 1] before any shift (0 = data, 1 = noise).

    Schemes of Esser et al. 2024 (arXiv 2403.03206), section 3.1: `uniform`; `logit_normal`, sigmoid(mean + std * z),
    here by the inverse normal distribution so that one uniform number gives one sigma; `mode`, equation 20 with its
    scale s.
    """
    if scheme == "uniform":
        return uniform
    if scheme == "logit_normal":
        z = torch.special.ndtri(uniform.double().clamp(1e-7, 1 - 1e-7)).float()
        return torch.sigmoid(logit_mean + logit_std * z)
    if scheme == "mode":
        return 1 - uniform - mode_scale * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)
    raise ValueError(f"unknown timestep sampling {scheme!r}, expected uniform, logit_normal or mode")


def resolution_shift(image_tokens: int, scheduler_config: dict) -> float:
    """mu of the checkpoint's dynamic shift: linear in the number of image tokens (packed latents) between the
    scheduler's (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift), as the diffusers pipelines compute
    it for sampling."""
    base_tokens, max_tokens = scheduler_config["base_image_seq_len"], scheduler_config["max_image_seq_len"]
    base_shift, max_shift = scheduler_config["base_shift"], scheduler_config["max_shift"]
    return base_shift + (max_shift - base_shift) * (image_tokens - base_tokens) / (max_tokens - base_tokens)


def checkpoint_shift(image_tokens: int, scheduler_config: dict) -> float:
    """The checkpoint's own shift of sigma at so many image tokens: exp of its dynamic mu."""
    return math.exp(resolution_shift(image_tokens, scheduler_config))


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move sigmas (B,) towards noise: shift * sigma / (1 + (shift - 1) * sigma).

    A dynamic mu is shift = exp(mu); 1.0 changes nothing.
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def expand_to(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) with as many axes as `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Mix (B, ...) latents and noise with (B,) sigma; float32 in, float32 out."""
    sigma = expand_to(sigma, latents)
    return (1 - sigma) * latents + sigma * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """What the transformer predicts, d noisy_latents / d sigma = noise - latents; samplers of diffusers subtract it on
    the way to data."""
    return noise - latents


def loss_weights(sigma: Tensor, weighting: str) -> Tensor:
    """(B,) weights of the squared error: `none`; `sigma_sqrt` = sigma^-2 (capped at sigma 0.01);
    `cosmap` = 2 / (pi (1 - 2 sigma + 2 sigma^2)), both from arXiv 2403.03206."""
    if weighting == "none":
        return torch.ones_like(sigma)
    if weighting == "sigma_sqrt":
        return sigma.clamp(min=0.01) ** -2
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    raise ValueError(f"unknown loss weighting {weighting!r}, expected none, sigma_sqrt or cosmap")


def draw_sigmas(uniform: Tensor, flow: FlowMatching, shift: float) -> Tensor:
    """(B,) uniform numbers -> (B,) sigmas as the settings draw them, moved by timestep_shift or, without it, by the
    given shift."""
    sigmas = sample_sigmas(uniform, flow.timestep_sampling, flow.logit_mean, flow.logit_std, flow.mode_scale)
    return shift_sigmas(sigmas, flow.timestep_shift or shift)


def error_weights(batch: dict, latents: Tensor) -> Tensor:
    """(B, ...) as latents: what the squared error of each counts, by the batch's loss_mask (B, 1, ..., h, w); 1
    without."""
    return batch.get("loss_mask", latents.new_ones(1)).to(latents.device).expand_as(latents)


def squared_errors(velocity_pred: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """(B,) mean of each sample's squared errors times their weights, in float32; the mean is over all of them, so that
    a sample of which half is masked counts half. Shapes must be equal, no broadcasting."""
    for each in (target, velocity_pred if weights is None else weights):
        assert velocity_pred.shape == each.shape, f"{tuple(velocity_pred.shape)} predicted, {tuple(each.shape)} given"
    errors = (velocity_pred.float() - target.float()).pow(2)
    return (errors if weights is None else errors * weights).flatten(1).mean(dim=1)


def errors_by_sigma(
    sample_errors: Callable[..., Tensor], models: Any, batch: dict, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """{"sigma 0.1": (B,) errors, ...} of a batch at VALIDATION_SIGMAS, with the same noise at each, a function of its
    positions: comparable between steps and runs. sample_errors(models, batch, latents, noise, sigma) is the recipe's.
    """
    latents = batch["latents"].to(device)  # (B, ...)
    noise = draw_normal(sample_rngs(seed, 0, batch["positions"]), latents.shape[1:]).to(device)  # (B, ...)
    sigmas = torch.tensor(VALIDATION_SIGMAS, device=device)
    return {
        f"sigma {value:g}": sample_errors(models, batch, latents, noise, sigma.expand(len(latents)))
        for value, sigma in zip(VALIDATION_SIGMAS, sigmas, strict=True)
    }

"""How much noise a timestep means, and what the UNet should predict there: by the checkpoint's own scheduler.

noisy_latents = sqrt(a) latents + sqrt(1 - a) noise, where a, of alphas_cumprod, is the picture's share (arXiv
2006.11239).
"""

import diffusers
from torch import Tensor

from common.step.flow_matching import expand_to


def noise_schedule(scheduler_config: dict) -> Tensor:
    """(training timesteps,) float32 alphas_cumprod. ValueError for a prediction type that this recipe lacks."""
    prediction = scheduler_config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"the scheduler's prediction_type is {prediction!r}; expected epsilon or v_prediction")
    return make_scheduler(scheduler_config).alphas_cumprod.float()


def make_scheduler(scheduler_config: dict) -> diffusers.SchedulerMixin:
    return getattr(diffusers, scheduler_config["_class_name"]).from_config(scheduler_config)


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """(B, 4, h, w) latents and noise, (B,) shares -> (B, 4, h, w) noisy latents."""
    share = expand_to(alphas_cumprod, latents)
    return share.sqrt() * latents + (1 - share).sqrt() * noise


def prediction_target(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, scheduler_config: dict) -> Tensor:
    """What the UNet predicts: the noise, or v = sqrt(a) noise - sqrt(1 - a) latents (arXiv 2202.00512)."""
    if scheduler_config.get("prediction_type", "epsilon") == "epsilon":
        return noise
    share = expand_to(alphas_cumprod, latents)
    return share.sqrt() * noise - (1 - share).sqrt() * latents


def snr_weights(alphas_cumprod: Tensor, power: float) -> Tensor:
    """(T,) weights of the squared error by timestep: the signal-to-noise ratio a / (1 - a) to the minus `power`, with
    mean 1. For noise prediction power 1 is the picture's error, 0.5 the loss of arXiv 2310.08442."""
    weights = ((1 - alphas_cumprod) / alphas_cumprod) ** power
    return weights / weights.mean()

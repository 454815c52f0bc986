"""common/step/flow_matching.py: closed forms, diffusers' own scheduler, the distributions of sigma, randomness
sample by sample."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import RECIPES, load_script
from sources import settings_of

from common.image_settings import FlowMatching
from common.start.config import parse_recipe
from common.step.flow_matching import (
    add_noise,
    checkpoint_shift,
    draw_normal,
    draw_sigmas,
    draw_uniform,
    error_weights,
    loss_weights,
    resolution_shift,
    sample_rngs,
    sample_sigmas,
    shift_sigmas,
    squared_errors,
    velocity_target,
)

MASKED = [recipe for recipe in RECIPES if "mask_column" in settings_of(recipe)]
QWEN_SCHEDULER = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
EVEN = (torch.arange(200_000) + 0.5) / 200_000  # evenly spaced uniform numbers: moments without sampling noise


def test_noise_and_velocity_closed_forms():
    """Catches data and noise swapped, and the target's sign: sigma 0 is data, sigma 1 noise, d noisy / d sigma =
    target."""
    latents, noise = torch.randn(2, 3, 16, 1, 4, 6).unbind(0)
    assert torch.equal(add_noise(latents, noise, torch.zeros(3)), latents)
    assert torch.equal(add_noise(latents, noise, torch.ones(3)), noise)
    sigma = torch.tensor([0.1, 0.5, 0.8])
    slope = (add_noise(latents, noise, sigma + 0.1) - add_noise(latents, noise, sigma)) / 0.1
    torch.testing.assert_close(slope, velocity_target(latents, noise), atol=1e-4, rtol=1e-4)
    noisy = add_noise(latents, noise, sigma)
    recovered = noisy - sigma.view(-1, 1, 1, 1, 1) * velocity_target(latents, noise)
    torch.testing.assert_close(recovered, latents, atol=1e-5, rtol=1e-4)


def test_noise_is_the_schedulers():
    """Catches a mix that differs from what the sampler assumes, and an Euler step that walks away from the data."""
    scheduler = FlowMatchEulerDiscreteScheduler(**QWEN_SCHEDULER)
    scheduler.set_timesteps(sigmas=[0.9, 0.6, 0.25], mu=0.7)
    latents, noise = torch.randn(2, 3, 8, 5, 5).unbind(0)
    expected = scheduler.scale_noise(latents, scheduler.timesteps, noise)
    torch.testing.assert_close(add_noise(latents, noise, scheduler.sigmas[:3]), expected)
    scheduler.set_begin_index(0)
    sample = add_noise(latents, noise, scheduler.sigmas[:1].expand(3))
    for t in scheduler.timesteps:
        sample = scheduler.step(velocity_target(latents, noise), t, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, latents, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("image_tokens", [16, 256, 1024, 4096, 8192])
def test_resolution_shift_is_the_schedulers(image_tokens):
    """Catches another shift than the checkpoint's: the pipeline's own mu, and the scheduler's sigmas for it
    (unstretched)."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    mu = resolution_shift(image_tokens, QWEN_SCHEDULER)
    assert mu == pytest.approx(calculate_shift(image_tokens, 256, 8192, 0.5, 0.9))
    scheduler = FlowMatchEulerDiscreteScheduler(**QWEN_SCHEDULER)
    sigmas = torch.linspace(1.0, 0.05, 20)
    scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=mu)
    torch.testing.assert_close(shift_sigmas(sigmas, math.exp(mu)), scheduler.sigmas[:-1], atol=1e-6, rtol=1e-5)
    fixed = FlowMatchEulerDiscreteScheduler(shift=3.0)
    fixed.set_timesteps(sigmas=sigmas.tolist())
    torch.testing.assert_close(shift_sigmas(sigmas, 3.0), fixed.sigmas[:-1], atol=1e-6, rtol=1e-5)


def test_shift_closed_forms():
    """Catches a shift towards data, or one that moves the ends."""
    sigmas = torch.linspace(0, 1, 11)
    assert torch.equal(shift_sigmas(sigmas, 1.0), sigmas)
    shifted = shift_sigmas(sigmas, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and shifted[5] == pytest.approx(0.75) and (shifted >= sigmas).all()
    torch.testing.assert_close(shift_sigmas(shifted, 1 / 3), sigmas)


def test_sigma_distributions():
    """Catches wrong parameters of the samplers: moments of logit_normal, values of mode's equation, uniform
    untouched."""
    assert torch.equal(sample_sigmas(EVEN, "uniform"), EVEN)
    for mean, std in [(0.0, 1.0), (0.5, 0.6)]:
        sigma = sample_sigmas(EVEN, "logit_normal", mean, std)
        logits = torch.logit(sigma.double())
        assert logits.mean().item() == pytest.approx(mean, abs=1e-3) and logits.std().item() == pytest.approx(
            std, abs=1e-3
        )
        assert sigma.median().item() == pytest.approx(1 / (1 + math.exp(-mean)), abs=1e-3)
        assert (sigma.diff() >= 0).all(), "one uniform number gives one sigma, in order"
    assert torch.allclose(sample_sigmas(EVEN, "mode", mode_scale=0.0), 1 - EVEN, atol=1e-6)
    mode = sample_sigmas(EVEN, "mode", mode_scale=1.29)
    assert mode.min() >= -1e-6 and mode.max() <= 1 + 1e-6
    # the mean of 1 - u - s (cos(pi u / 2)^2 - 1 + u) over u is 1/2 for any s; its middle is thinned or thickened by s
    assert mode.double().mean().item() == pytest.approx(0.5, abs=1e-4)
    u = torch.tensor([0.25])
    expected = 0.75 - 1.29 * (math.cos(math.pi / 8) ** 2 - 0.75)
    assert sample_sigmas(u, "mode", mode_scale=1.29).item() == pytest.approx(expected, abs=1e-6)
    middle = ((mode > 0.4) & (mode < 0.6)).float().mean().item()
    assert middle > 0.25, "positive scales draw more from the middle than uniform's 0.2"
    with pytest.raises(ValueError, match="expected uniform, logit_normal or mode"):
        sample_sigmas(EVEN, "cosine")


def test_extreme_uniform_numbers_stay_finite():
    """Catches an infinite sigma at uniform numbers 0 and almost 1."""
    ends = torch.tensor([0.0, 1e-9, 1 - 2**-24, 1.0])
    for scheme in ("uniform", "logit_normal", "mode"):
        sigma = sample_sigmas(ends, scheme)
        assert torch.isfinite(sigma).all() and (sigma >= -1e-6).all() and (sigma <= 1 + 1e-6).all(), scheme


def test_randomness_is_per_sample():
    """Catches noise that depends on how a step is split over processes and micro-batches, on the seed only, or on
    nothing."""
    whole_u, whole_n = draw_uniform(sample_rngs(7, 3, range(8))), draw_normal(sample_rngs(7, 3, range(8)), (2, 3))
    for positions in ([0, 1, 2, 3], [6, 7], [5]):
        rngs = sample_rngs(7, 3, positions)
        assert torch.equal(draw_uniform(rngs), whole_u[positions])
        assert torch.equal(draw_normal(sample_rngs(7, 3, positions), (2, 3)), whole_n[positions])
    assert len(set(whole_u.tolist())) == 8
    others = [draw_uniform(sample_rngs(8, 3, range(8))), draw_uniform(sample_rngs(7, 4, range(8)))]
    assert not any(torch.isin(other, whole_u).any() for other in others), "seed and step must both matter"
    many = draw_uniform(sample_rngs(1, 0, range(4000)))
    assert many.mean().item() == pytest.approx(0.5, abs=0.02) and many.std().item() == pytest.approx(
        12**-0.5, abs=0.02
    )
    normal = draw_normal(sample_rngs(1, 0, range(500)), (64,))
    assert normal.mean().abs() < 0.02 and normal.std().item() == pytest.approx(1, abs=0.02)


def test_loss_weights():
    """Catches wrong weights, and a mean of weights in place of a weighted mean."""
    sigma = torch.tensor([0.001, 0.25, 0.5, 1.0])
    assert torch.equal(loss_weights(sigma, "none"), torch.ones(4))
    torch.testing.assert_close(loss_weights(sigma, "sigma_sqrt"), torch.tensor([1e4, 16.0, 4.0, 1.0]))
    expected = [2 / (math.pi * (1 - 2 * s + 2 * s * s)) for s in sigma.tolist()]
    torch.testing.assert_close(loss_weights(sigma, "cosmap"), torch.tensor(expected))
    with pytest.raises(ValueError, match="expected none, sigma_sqrt or cosmap"):
        loss_weights(sigma, "snr")
    errors = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1).expand(4, 5, 6)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0])
    loss = (weights * squared_errors(errors.bfloat16(), torch.zeros(4, 5, 6))).mean()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx((1 + 0 + 18 + 16) / 4)
    with pytest.raises(AssertionError):
        squared_errors(torch.zeros(4, 5, 6), torch.zeros(4, 1, 6))


def test_squared_errors_are_each_samples_own():
    """Catches a mean over the batch, in half precision, or over one axis."""
    target = torch.randn(3, 16, 1, 4, 6).bfloat16()
    errors = squared_errors(target + torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1, 1), target.float())
    assert errors.shape == (3,) and errors.dtype == torch.float32
    torch.testing.assert_close(errors, torch.tensor([0.0, 1.0, 4.0]), atol=1e-2, rtol=1e-2)


def test_masks_weight_squared_errors():
    """Catches a mask that is spread over the wrong axes, is averaged away, or is asked for where there is none."""
    latents = torch.zeros(2, 16, 1, 4, 6)
    mask = torch.zeros(2, 1, 1, 4, 6)
    mask[0, ..., 0, :], mask[1, ..., 5] = 1.0, 0.5
    weights = error_weights({"loss_mask": mask}, latents)
    assert weights.shape == latents.shape and weights[0, 7, 0, 0].eq(1).all() and weights[0, 7, 0, 1:].eq(0).all()
    torch.testing.assert_close(squared_errors(latents + 2, latents, weights), torch.tensor([4 / 4, 4 * 0.5 / 6]))
    target = torch.randn(2, 16, 1, 4, 6)
    assert torch.equal(squared_errors(target, latents, error_weights({}, latents)), squared_errors(target, latents))
    with pytest.raises(AssertionError):
        squared_errors(latents, latents, mask)


@pytest.mark.parametrize("recipe", MASKED, ids=lambda recipe: recipe.name)
def test_a_mask_lies_on_its_picture(recipe, monkeypatch):
    """Catches a mask that is lost between the batch and the loss, or packed otherwise than the picture: the model is
    wrong in the upper half alone, which one sample's mask shows and the other's hides."""
    train = load_script(recipe / "train.py")
    monkeypatch.setattr(train, "predict_velocity", lambda models, noisy, *_: train.pack_latents(0 * noisy))
    cfg = parse_recipe(train.Config, ["--train_data_dir", "unused"])
    config = {"joint_attention_dim": 4, "in_channels": 128, "context_in_dim": 4}
    row = train.random_sample(cfg, config, torch.Generator().manual_seed(0))
    noise, mask = torch.zeros(2, *row["latents"].shape), torch.zeros(2, *row["latents"].shape)
    middle = mask.shape[-2] // 2
    noise[..., :middle, :], mask[0, ..., :middle, :], mask[1, ..., middle:, :] = 1, 1, 1
    batch = {"loss_mask": mask[:, :1], "prompt_embeds": [row["prompt_embeds"]] * 2}
    errors = train.sample_errors(None, batch, torch.zeros_like(noise), noise, torch.ones(2))
    assert errors.tolist() == [0.5, 0]


def test_settings_draw_sigmas():
    """Catches settings that are not heeded, a given shift that is not the checkpoint's, and a fixed one that is
    multiplied with it."""
    uniform = torch.linspace(0.01, 0.99, 9)
    shift = checkpoint_shift(4096, QWEN_SCHEDULER)
    assert shift == pytest.approx(math.exp(resolution_shift(4096, QWEN_SCHEDULER)))
    expected = shift_sigmas(sample_sigmas(uniform, "logit_normal"), shift)
    torch.testing.assert_close(draw_sigmas(uniform, FlowMatching(), shift), expected)
    torch.testing.assert_close(
        draw_sigmas(uniform, FlowMatching(logit_mean=0.5, logit_std=0.3), 1.0),
        sample_sigmas(uniform, "logit_normal", 0.5, 0.3),
    )
    fixed = draw_sigmas(uniform, FlowMatching(timestep_sampling="mode", mode_scale=0.8, timestep_shift=3.0), shift)
    torch.testing.assert_close(fixed, shift_sigmas(sample_sigmas(uniform, "mode", mode_scale=0.8), 3.0))

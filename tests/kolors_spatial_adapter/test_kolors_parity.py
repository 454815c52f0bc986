"""Training calls the UNet with what the unmodified KolorsPipeline calls it with, on pictures noised as its scheduler
expects."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.image_processor import VaeImageProcessor
from parity import assert_batch_is_rows, first
from parity import picture as drawn
from PIL import Image

from common.data.images import image_to_tensor, resize_and_crop
from common.data.manifest import Record

PROMPT = "a red circle and a blue square"


@pytest.fixture(scope="module")
def encoders(train, model_folder):
    return train.Encoders(None, model_folder, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def scheduler_config(model_folder) -> dict:
    return json.loads((model_folder / "scheduler/scheduler_config.json").read_text())


def pipelines_calls(pipeline, **settings) -> list[dict]:
    """The keyword and positional arguments of every call of the UNet while the pipeline draws."""
    calls, forward = [], pipeline.unet.forward

    def record(sample, timestep, **named):
        calls.append({"sample": sample, "timestep": timestep, **named})
        return forward(sample, timestep, **named)

    pipeline.unet.forward = record
    pipeline(height=64, width=96, num_inference_steps=2, generator=torch.Generator().manual_seed(0), **settings)
    pipeline.unet.forward = forward
    return calls


def test_the_unet_is_called_as_the_pipeline_calls_it(train, modes, layouts, encoders, pipeline):
    """Catches another layer of hidden states, padding, pooled embedding, order of the six size numbers or dtype: every
    argument of the pipeline's call, tensor by tensor."""
    (theirs, _) = pipelines_calls(pipeline, prompt=PROMPT, guidance_scale=1.0)
    record = Record(0, "a.png", PROMPT, width=96, height=64)
    batch = encoders.prompts([PROMPT])
    batch["add_time_ids"] = torch.tensor([layouts.size_conditions(record, (96, 64))])
    batch |= {"noisy_latents": theirs["sample"], "timesteps": theirs["timestep"][None]}
    calls, forward = [], pipeline.unet.forward

    def record_call(sample, timestep, **named):
        calls.append({"sample": sample, "timestep": timestep, **named})
        return forward(sample, timestep, **named)

    pipeline.unet.forward = record_call
    prediction = modes.predict_noise(pipeline.unet, batch)
    (ours,) = calls
    assert torch.equal(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])
    assert ours["encoder_hidden_states"].shape[1] == 256
    for name in ("text_embeds", "time_ids"):
        assert torch.equal(ours["added_cond_kwargs"][name], theirs["added_cond_kwargs"][name]), name
        assert ours["added_cond_kwargs"][name].dtype == theirs["added_cond_kwargs"][name].dtype
    assert ours["added_cond_kwargs"]["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]]
    assert {name for name, value in theirs.items() if value is not None} - ours.keys() == set()
    named = {name: theirs[name] for name in ("encoder_hidden_states", "added_cond_kwargs")}
    with torch.no_grad():
        assert torch.equal(prediction, forward(theirs["sample"], theirs["timestep"], **named, return_dict=False)[0])


def test_the_empty_caption_is_the_pipelines(encoders, pipeline):
    """Catches zeros, or nothing, where guidance without a negative prompt encodes an empty one."""
    (theirs, _) = pipelines_calls(pipeline, prompt=PROMPT, guidance_scale=3.0)
    empty = first(encoders.prompts([""]))
    assert torch.equal(theirs["encoder_hidden_states"][0], empty["prompt_embeds"])
    assert torch.equal(theirs["added_cond_kwargs"]["text_embeds"][0], empty["pooled_prompt_embeds"])


def test_latents_are_those_that_the_pipeline_decodes(train, encoders, pipeline):
    """Catches a missing or inverted scaling factor, a sample in place of the mode, and mirrored latents in place of
    the mirrored picture's."""
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 96, 3), dtype=np.uint8))
    encoded = first(encoders.images(image_to_tensor(resize_and_crop(picture, (96, 64)))[None], flipped=True))
    pixels = VaeImageProcessor().preprocess(picture)
    mirrored = VaeImageProcessor().preprocess(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    with torch.no_grad():
        for name, view in (("latents", pixels), ("latents_flipped", mirrored)):
            mode = pipeline.vae.encode(view).latent_dist.mode()[0]
            assert torch.allclose(encoded[name] / pipeline.vae.config.scaling_factor, mode, atol=1e-5), name
    assert pipeline.vae.config.scaling_factor != 1
    assert not torch.allclose(encoded["latents_flipped"], encoded["latents"].flip(-1), atol=1e-3)


def test_a_batch_is_its_rows(train, settings, model_folder):
    """Catches prompts whose padding is seen or kept, and rows of a batch that are mixed up."""
    encoders = train.Encoders(settings(random_flip=True), model_folder, torch.device("cpu"), torch.float32)
    texts = [PROMPT, "", "a blue star", "a red circle at the top"]
    rows = [("row", Record(0, "", text), (96, 64)) for text in texts]
    assert_batch_is_rows(encoders, rows, [{"pixels": image_to_tensor(drawn(n, (96, 64)))} for n in range(4)])
    assert_batch_is_rows(encoders, [("prompt", text) for text in texts], [{}] * 4)
    assert_batch_is_rows(encoders, [("phrase", text) for text in texts[2:]], [{}] * 2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_target_are_the_schedulers(train, scheduler_config, prediction_type):
    """Catches another noise schedule than the checkpoint's 1100 steps, sigma for its square, a wrong sign of v."""
    config = {**scheduler_config, "prediction_type": prediction_type}
    reference = DDPMScheduler.from_config(config)
    alphas_cumprod = train.noise_schedule(config)
    assert len(alphas_cumprod) == 1100
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    timesteps = torch.tensor([0, 400, 1099])
    noisy = train.add_noise(latents, noise, alphas_cumprod[timesteps])
    assert torch.allclose(noisy, reference.add_noise(latents, noise, timesteps), atol=1e-5)
    target = train.prediction_target(latents, noise, alphas_cumprod[timesteps], config)
    expected = noise if prediction_type == "epsilon" else reference.get_velocity(latents, noise, timesteps)
    assert torch.allclose(target, expected, atol=1e-5)


def test_other_predictions_are_refused(train, scheduler_config):
    """Catches a checkpoint of another kind that trains on the wrong target."""
    with pytest.raises(ValueError, match="expected epsilon or v_prediction"):
        train.noise_schedule({**scheduler_config, "prediction_type": "sample"})


def test_a_perfect_unet_draws_the_picture(train, encoders, pipeline, scheduler_config):
    """Catches a noise-prediction target that the pipeline's sampler does not undo: a UNet that always predicts what
    training asks for must lead the unmodified pipeline to the training picture."""
    picture = Image.new("RGB", (64, 64), (200, 30, 30))
    picture.paste((20, 40, 220), (10, 10, 40, 30))
    latents = encoders.images(image_to_tensor(picture)[None], flipped=False)["latents"]
    alphas_cumprod = train.noise_schedule(scheduler_config)

    def perfect(sample, timestep, **_):
        """The noise in `sample`, which the scheduler scaled to unit variance, if `latents` is the picture."""
        share = np.interp(float(timestep), np.arange(len(alphas_cumprod)), alphas_cumprod.numpy())
        noise = (sample - share**0.5 * latents) / (1 - share) ** 0.5
        noisy = train.add_noise(latents, noise, torch.tensor([share]).float())
        assert torch.allclose(noisy, sample, atol=1e-4)
        target = train.prediction_target(latents, noise, torch.tensor([share]).float(), scheduler_config)
        return (target,)

    pipeline.unet.forward = perfect
    drawn = pipeline(PROMPT, height=64, width=64, num_inference_steps=20, guidance_scale=1.0, output_type="latent")
    assert (drawn.images - latents).abs().max() < 0.05 * latents.abs().max()


def test_weights_by_signal_to_noise(train, scheduler_config):
    """Catches an inverted power, weights that change the loss's scale, and a default that is not the plain loss."""
    alphas_cumprod = train.noise_schedule(scheduler_config)
    ratio = alphas_cumprod / (1 - alphas_cumprod)
    assert torch.equal(train.snr_weights(alphas_cumprod, train.Config.snr_power), torch.ones(1100))
    for power in (0.5, 1.0):
        weights = train.snr_weights(alphas_cumprod, power)
        assert weights.mean().item() == pytest.approx(1, rel=1e-4)
        expected = (ratio[100] / ratio[900]) ** power
        assert (weights[900] / weights[100]).item() == pytest.approx(expected.item(), rel=1e-3)


def test_flops_of_the_real_unet(modes, recipe):
    """Catches a throughput that counts another model: 6.96e12 a forward at 1024 x 1024 was measured."""
    flops = modes.mode_flops((recipe / "full_size/unet.json").read_text(), 128)
    assert flops["generation"] * 3 / 2 == pytest.approx(6.96e12, rel=0.01)
    assert 0 < flops["retrieval"] < flops["captioning"] < flops["generation"]

"""The transformer is called in training as the unmodified QwenImagePipeline calls it: same names, shapes, dtypes,
values."""

from types import SimpleNamespace

import pytest
import qwenimage_alike as alike
import torch
from diffusers import QwenImagePipeline
from parity import assert_batch_is_rows, picture
from qwenimage_alike import HEIGHT, PROMPTS, SIZE, WIDTH

from common.data import images


def sample(number: int):
    return picture(number, SIZE)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def world(request, train, model_folder) -> SimpleNamespace:
    """The recipe's encoders and models, and the unmodified pipeline with a spy on the transformer that both use."""
    dtype = getattr(torch, request.param)
    prompt = alike.prompt_of_texts
    return alike.make_world(train, model_folder, dtype, QwenImagePipeline, prompt, sample, channels=16, factor=8)


def call_of_pipeline(world: SimpleNamespace, prompts: list[str], noisy: torch.Tensor, sigma: float) -> dict:
    world.spy.calls.clear()
    packed = alike.packed(world, noisy).to(world.dtype)
    world.pipeline(
        prompt=prompts, latents=packed, sigmas=[sigma], height=HEIGHT, width=WIDTH, true_cfg_scale=1.0,
        output_type="latent",
    )  # fmt: skip
    (call,) = world.spy.calls
    return call


@pytest.mark.parametrize("number", [0, 1])
def test_one_sample(world, number):
    """Catches a wrong prompt template, dropped tokens, normalisation, mixing, packing, timestep scale, img_shapes
    order or dtype."""
    alike.check_one_sample(world, call_of_pipeline, number)


def test_two_unequal_prompts(world):
    """Catches a text mask that is not passed, or another padding than the pipeline's."""
    alike.check_two_unequal_prompts(world, call_of_pipeline, 1e-5 if world.dtype == torch.float32 else 5e-2)


def test_loss_of_two_is_the_mean_of_each(world):
    """Catches samples that see each other's padding: the loss of a padded batch is the mean of its samples' losses."""
    alike.check_loss_is_the_mean_of_each(world, 0, 1)


def test_velocity_target_through_the_pipelines_scheduler(world):
    """Catches the target's sign and scale: one Euler step of the pipeline along the target from sigma 1 lands on the
    latents."""
    alike.check_velocity_target(world)


def test_prediction_is_compared_with_the_target_token_by_token(world, monkeypatch):
    """Catches a loss whose target is packed otherwise than the prediction, or has the wrong sign: a perfect prediction
    has loss zero."""
    alike.check_perfect_prediction(world, monkeypatch)


def test_empty_caption_is_the_encoded_one(world):
    """Catches zeros in place of the encoded "" for caption dropout, and a share of dropped captions that is not the
    one asked for."""
    alike.check_empty_caption(world)


def test_a_batch_is_its_rows(world):
    """Catches prompts whose padding is seen or kept, and rows of a batch that are mixed up."""
    if world.dtype != torch.float32:
        pytest.skip("compared in float32")
    items = [(text, None) for text in (*PROMPTS, "", "a cross on the right")]
    read = [{"pixels": images.image_to_tensor(sample(number))} for number in range(4)]
    assert_batch_is_rows(world.encoders, items, read)
    assert_batch_is_rows(world.encoders, items, [{}] * 4)


def test_moments_give_the_posterior(world):
    """Catches a posterior whose standard deviation is not divided by latents_std as its mean is."""
    alike.check_moments(world)


def test_decoding_undoes_encoding(world):
    """Catches latents_std inverted, or mean and std exchanged: the pipeline decodes the recipe's latents to what the
    VAE reconstructs."""
    alike.check_decoding(world)

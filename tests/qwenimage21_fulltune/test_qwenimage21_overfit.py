"""A transformer trained by the recipe's compute_loss on two pictures draws them from pure noise through the unmodified
pipeline."""

from functools import partial

import pytest
import qwenimage_alike as alike
from diffusers import QwenImage21Pipeline, QwenImage21Transformer2DModel


@pytest.fixture(scope="module")
def trained(train, model_folder):
    transformer = partial(QwenImage21Transformer2DModel, context_in_dim=64)
    prompt = alike.prompt_without_sources
    return alike.overfitted(train, model_folder, QwenImage21Pipeline, transformer, prompt, "RGBA", channels=64)


@pytest.mark.slow
@pytest.mark.parametrize("text", alike.SCENES)
def test_pictures_come_back_from_noise(trained, text):
    """Catches a wrong sign, scale, packing, template or normalisation anywhere between training and sampling.

    Not a wrong timestep: the model can read the noise level off its input. test_qwenimage21_parity has it.
    """
    alike.check_picture_comes_back(trained, text)


@pytest.mark.slow
def test_decoded_picture_is_the_vaes_reconstruction(trained):
    """Catches latents that are normalised in training otherwise than the pipeline undoes it."""
    alike.check_reconstruction(trained, channels=64)

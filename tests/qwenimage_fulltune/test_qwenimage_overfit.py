"""A transformer trained by the recipe's compute_loss on two pictures draws them from pure noise through the unmodified
pipeline."""

from functools import partial

import pytest
import qwenimage_alike as alike
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel


@pytest.fixture(scope="module")
def trained(train, model_folder):
    transformer = partial(QwenImageTransformer2DModel, joint_attention_dim=64)
    prompt = alike.prompt_of_texts
    return alike.overfitted(train, model_folder, QwenImagePipeline, transformer, prompt, "RGB", channels=16)


@pytest.mark.slow
@pytest.mark.parametrize("text", alike.SCENES)
def test_pictures_come_back_from_noise(trained, text):
    """Catches a wrong sign, scale, packing, template or normalisation anywhere between training and sampling.

    Not a wrong timestep: the model can read the noise level off its input. test_qwenimage_parity has it.
    """
    alike.check_picture_comes_back(trained, text)


@pytest.mark.slow
def test_decoded_picture_is_the_vaes_reconstruction(trained):
    """Catches latents that are normalised in training otherwise than the pipeline undoes it."""
    alike.check_reconstruction(trained, channels=16)

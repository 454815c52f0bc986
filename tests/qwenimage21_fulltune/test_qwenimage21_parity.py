"""The transformer is called in training as the unmodified QwenImage21Pipeline calls it: same names, shapes, dtypes,
values."""

from types import SimpleNamespace

import pytest
import qwenimage_alike as alike
import torch
from diffusers import QwenImage21Pipeline
from parity import assert_same_call, call_of_loss, picture
from PIL import Image
from qwenimage_alike import HEIGHT, PROMPTS, SIZE, TOKENS, WIDTH

from common.data import encoding, images, loader
from common.data.manifest import Record

RESOLUTION = 64


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def world(request, train, model_folder) -> SimpleNamespace:
    """The recipe's encoders and models, and the unmodified pipeline with a spy on the transformer that both use."""
    dtype = getattr(torch, request.param)
    prompt = alike.prompt_without_sources
    return alike.make_world(train, model_folder, dtype, QwenImage21Pipeline, prompt, rgba, channels=64, factor=16)


def rgba(number: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """A picture with an alpha channel of its own."""
    image = picture(number, size).convert("RGBA")
    image.putalpha(picture(number + 50, size).convert("L"))
    return image


def call_of_pipeline(
    world: SimpleNamespace, prompts: list[str], noisy: torch.Tensor, sigma: float, image=None
) -> dict:
    world.spy.calls.clear()
    packed = alike.packed(world, noisy).to(world.dtype)
    world.pipeline(
        prompt=prompts, image=image, latents=packed, sigmas=[sigma], height=HEIGHT, width=WIDTH,
        true_cfg_scale=1.0, output_resolution=RESOLUTION, output_type="latent", use_kv_cache=False,
    )  # fmt: skip
    (call,) = world.spy.calls
    return call


@pytest.mark.parametrize("number", [0, 1])
def test_one_sample(world, number):
    """Catches a wrong prompt template, dropped tokens, normalisation, mixing, packing, timestep scale, img_shapes
    order, image mask or dtype, and a flattened alpha channel."""
    alike.check_one_sample(world, call_of_pipeline, number)


@pytest.mark.parametrize("sizes", [[(96, 64)], [(64, 128), (100, 100)]], ids=["one", "two"])
def test_sources(world, sizes, tmp_path):
    """Catches sources of another size, order or resampling than the pipeline's, flattened before the VAE or not
    flattened before the text encoder, encoded as a sample of the posterior, or behind the target."""
    for which, size in enumerate(sizes):
        rgba(7 + which, size).save(tmp_path / f"{which}.png")
    files = tuple(f"{which}.png" for which in range(len(sizes)))
    sources = world.train.source_images.of_row(Record(0, "", "", files), tmp_path, RESOLUTION)
    made = {**alike.encoded(world, 0), **world.encoders.prompt(PROMPTS[0], sources), **alike.place(0)}
    made |= {
        f"source_{which}": world.encoders.images(images.image_to_tensor(source)[None], moments=False)["latents"][0]
        for which, source in enumerate(sources)
    }
    ours = call_of_loss(world, loader.collate([made]))
    noisy, sigma = alike.noisy_by_diffusers(world, [0])
    opened = [Image.open(tmp_path / file) for file in files]
    pipelines = call_of_pipeline(world, PROMPTS[:1], noisy, sigma.item(), opened)
    bf16 = world.dtype == torch.bfloat16  # the pipeline runs its VAE in bf16 too
    assert_same_call(ours, pipelines, {"hidden_states": 0.15 if bf16 else 1e-4})
    assert len(ours["img_shapes"][0]) == 1 + len(sizes) and ours["img_mask"].sum() > TOKENS // 4
    n_target = TOKENS
    torch.testing.assert_close(
        ours["hidden_states"][:, -n_target:], pipelines["hidden_states"][:, -n_target:], atol=1e-2, rtol=1e-2
    )
    loss = world.spy.results[-1].shape[1]
    assert loss > n_target, "the transformer answers for all tokens, and the loss is on the target's"


def test_a_batch_is_its_rows(world):
    """Catches prompts whose padding is seen or kept, and rows of a batch that are mixed up."""
    if world.dtype != torch.float32:
        pytest.skip("compared in float32")
    items = [(text, None) for text in (*PROMPTS, "a cross on the right")]
    read = [{"pixels": images.image_to_tensor(rgba(number)), "sources": []} for number in range(3)]
    source = {"source_0": images.image_to_tensor(rgba(9)), "sources": [rgba(9)]}
    for given in (read, [each | source for each in read]):
        together = encoding.encode_batch(world.encoders, items, given)
        for item, pixels, entry in zip(items, given, together, strict=True):
            (alone,) = encoding.encode_batch(world.encoders, [item], [pixels])
            assert alone.keys() == entry.keys()
            for name, tensor in alone.items():
                torch.testing.assert_close(entry[name], tensor, atol=1e-5, rtol=1e-4)
        assert not torch.equal(together[0]["latents"], together[1]["latents"])
        assert all(("empty_prompt_embeds" in entry) == (given is not read) for entry in together)


def test_two_unequal_prompts(world):
    """Catches a text mask that is not passed, or another padding than the pipeline's."""
    # the text encoder's batch of two is padded on the left: positions differ, and with them the last bits
    alike.check_two_unequal_prompts(world, call_of_pipeline, 1e-4 if world.dtype == torch.float32 else 0.2)


def test_loss_of_two_of_one_length_is_the_mean_of_each(world):
    """Catches samples of a micro-batch that see each other, and noise that depends on the micro-batch."""
    alike.check_loss_is_the_mean_of_each(world, 0, 2)


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


def test_moments_give_the_posterior(world):
    """Catches a posterior whose standard deviation is not divided by latents_std as its mean is."""
    alike.check_moments(world)


def test_decoding_undoes_encoding(world):
    """Catches latents_std inverted, or mean and std exchanged: the pipeline decodes the recipe's latents to what the
    VAE reconstructs."""
    alike.check_decoding(world)

"""What recipes with a transformer compare with the unmodified pipeline: the arguments of the transformer's calls."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.data import encoding


class Spy:
    """Keeps the keyword arguments and the result of every call of a transformer's forward."""

    def __init__(self, transformer: torch.nn.Module):
        self.calls: list[dict] = []
        self.results: list[torch.Tensor] = []
        forward = transformer.forward

        def spying(*positional, **named):
            assert not positional, "arguments are passed by name"
            self.calls.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in named.items()})
            result = forward(**named)
            self.results.append(result[0])
            return result

        transformer.forward = spying


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Random squares with sharp edges: another resampling than the pipeline's shows."""
    values = np.random.RandomState(seed).randint(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.NEAREST)


def mixed(scheduler, latents: torch.Tensor, sigma: float, noise: torch.Tensor) -> torch.Tensor:
    """Latents and noise at a sigma, by diffusers' own means."""
    scheduler.set_timesteps(sigmas=[sigma])
    return scheduler.scale_noise(latents, scheduler.timesteps[:1], noise)


def assert_batch_is_rows(encoders: Any, items: list, read: list[dict]) -> None:
    """What encoders make of a batch is what they make of each of its items: to 1e-5 of the largest value, in
    float32. A batch of convolutions is computed in another order."""
    together = encoding.encode_batch(encoders, items, read)
    for item, pixels, entry in zip(items, read, together, strict=True):
        (alone,) = encoding.encode_batch(encoders, [item], [pixels])
        assert alone.keys() == entry.keys()
        for name, tensor in alone.items():
            assert tensor.shape == entry[name].shape and tensor.dtype == entry[name].dtype, name
            assert (tensor - entry[name]).abs().max() <= 1e-5 * tensor.abs().max(), name
    assert not any(torch.equal(entry[name], together[0][name]) for entry in together[1:] for name in entry if read[0])


def first(made: dict) -> dict:
    """The first row of what encoders make of a batch, by name."""
    return {name: each[0] for name, each in made.items()}


def call_of_loss(world: SimpleNamespace, made: dict) -> dict:
    """The arguments with which compute_loss calls the transformer on a micro-batch."""
    world.spy.calls.clear()
    with torch.no_grad():
        world.train.compute_loss(world.models, made, world.cfg)
    (call,) = world.spy.calls
    return call


def assert_same_call(ours: dict, pipelines: dict, tolerances: dict[str, float]) -> None:
    """tolerances: by name; what is not named must be equal to the last bit."""
    assert ours.keys() == pipelines.keys(), f"{ours.keys() ^ pipelines.keys()} on one side only"
    for name, expected in pipelines.items():
        got = ours[name]
        if isinstance(expected, torch.Tensor):
            assert got.shape == expected.shape and got.dtype == expected.dtype, (name, got.shape, got.dtype, expected)
            limit = tolerances.get(name, 0)
            torch.testing.assert_close(
                got, expected, atol=limit, rtol=limit, msg=lambda text, name=name: f"{name}: {text}"
            )
        else:
            assert got == expected and type(got) is type(expected), (name, got, expected)

"""What recipes with a transformer compare with the unmodified pipeline: the arguments of the transformer's calls."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image


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

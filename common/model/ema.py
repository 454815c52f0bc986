"""Averaged weights, and the model as validation and export see it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from common.model.sharding import local_tensor
from common.model.streaming import at_home


class Ema:
    """Exponential moving average of the weights in float32, kept shard by shard beside the weights (4 bytes a
    parameter over all ranks)."""

    @classmethod
    def of(cls, model: nn.Module, decay: float) -> "Ema | None":
        """None for a decay of 0."""
        return cls(model, decay) if decay else None

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.names, self.parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
        with at_home(model):
            self.shadow = [local_tensor(p).detach().float().clone() for p in self.parameters]
        self.chunks = list(_chunks([tensor.numel() for tensor in self.shadow]))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call once after each optimizer step; the decay warms up as (1 + step) / (10 + step)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        with at_home(self.model):
            for chunk in self.chunks:
                weights = [local_tensor(p).detach().float() for p in self.parameters[chunk]]
                torch._foreach_lerp_(self.shadow[chunk], weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model holds the averaged weights; afterwards the trained ones are back, bit for bit."""
        with at_home(self.model):
            trained = [local_tensor(p).detach().clone() for p in self.parameters]
        self._copy_in(self.shadow)
        try:
            yield
        finally:
            self._copy_in(trained)

    @torch.no_grad()
    def _copy_in(self, tensors: list[Tensor]) -> None:
        with at_home(self.model):
            torch._foreach_copy_([local_tensor(p) for p in self.parameters], tensors)
        persistent = [parameter for parameter in self.parameters if getattr(parameter, "ds_persist", False)]
        if persistent:  # small ones that ZeRO-3 keeps whole beside their partitions
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
        for module in self.model.modules():
            if hasattr(module, "reshard"):  # FSDP2, where a forward may leave weights gathered: they are old now
                module.reshard()


def _chunks(sizes: list[int], most: int = 2**27) -> Iterator[slice]:
    """Neighbours of at most so many elements together: one launch a chunk, and never a second copy of a large model in
    float32."""
    start = used = 0
    for index, size in enumerate(sizes):
        if index > start and used + size > most:
            yield slice(start, index)
            start, used = index, 0
        used += size
    if sizes:
        yield slice(start, len(sizes))


@contextmanager
def evaluating(model: nn.Module, ema: Ema | None) -> Iterator[None]:
    """Inside the block the model is in eval mode and holds the averaged weights, where they are kept."""
    model.eval()
    try:
        if ema is None:
            yield
        else:
            with ema.applied():
                yield
    finally:
        model.train()

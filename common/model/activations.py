"""Inputs of checkpointed blocks in pinned main memory between forward and backward, so that a micro-batch can grow."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.model.slots import pinned

SMALLEST = 2**20  # bytes; smaller tensors stay where they are
AHEAD = 3  # tensors fetched before they are asked for: a block has two inputs


@dataclass
class Kept:
    """One saved tensor: at home in main memory, and for its visit on the device."""

    buffer: Tensor  # (bytes,) of main memory
    home: Tensor  # the same, in the tensor's shape
    like: Tensor  # of the device, without memory
    number: int  # in the order of the forward
    written: Any = None  # event
    visit: Tensor | None = None
    arrived: Any = None  # event


class Activations:
    """Saves tensors to main memory in forward and brings them back in backward, the next ones ahead of time, on two
    streams of its own. On a CPU with plain copies."""

    def __init__(self, device: torch.device):
        self.device, self.on_cuda = device, device.type == "cuda"
        self.up, self.down = (torch.cuda.Stream(device) if self.on_cuda else None for _ in range(2))
        self.kept: dict[int, Kept] = {}  # of this micro-batch, by number
        self.free: dict[int, list[tuple[Tensor, Any]]] = {}  # bytes -> buffers, and what must be over before their use

    def offloading(self, function: Callable) -> Callable:
        """A function of diffusers' checkpointing whose saved inputs are offloaded."""

        def call(*args: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, self._bring_back):
                return function(*args)

        return call

    def _keep(self, tensor: Tensor) -> Tensor | Kept:
        if tensor.nbytes < SMALLEST or tensor.device.type != self.device.type:
            return tensor
        buffers = self.free.setdefault(tensor.nbytes, [])
        buffer, before = buffers.pop() if buffers else (pinned(tensor.nbytes, self.device), None)
        home = buffer.view(tensor.dtype).view(tensor.shape)
        kept = Kept(buffer, home, torch.empty_like(tensor, device="meta"), max(self.kept, default=-1) + 1)
        self.kept[kept.number] = kept
        if not self.on_cuda:
            home.copy_(tensor)
            return kept
        self.down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.down):
            if before is not None:
                self.down.wait_event(before)
            home.copy_(tensor, non_blocking=True)
            kept.written = self.down.record_event()
        tensor.record_stream(self.down)
        return kept

    def _fetch(self, kept: Kept) -> None:
        if kept.visit is not None:
            return
        kept.visit = torch.empty_like(kept.like, device=self.device)
        if not self.on_cuda:
            kept.visit.copy_(kept.home)
            return
        self.up.wait_stream(torch.cuda.current_stream(self.device))  # its memory may be another tensor's until now
        with torch.cuda.stream(self.up):
            self.up.wait_event(kept.written)
            kept.visit.copy_(kept.home, non_blocking=True)
            kept.arrived = self.up.record_event()
        kept.visit.record_stream(self.up)

    def _bring_back(self, saved: Tensor | Kept) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        for number in range(saved.number, saved.number - AHEAD - 1, -1):
            if number in self.kept:
                self._fetch(self.kept[number])
        if self.on_cuda:
            torch.cuda.current_stream(self.device).wait_event(saved.arrived)
        del self.kept[saved.number]
        self.free[saved.buffer.nbytes].append((saved.buffer, saved.arrived))
        visit, saved.visit = saved.visit, None
        return visit

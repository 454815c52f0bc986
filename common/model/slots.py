"""Memory for streaming: groups of tensors pinned in main memory, and a few slots on the GPU for their visits."""

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes


@dataclass
class Holder:
    """Where an optimizer keeps a tensor: a dictionary's entry, or an attribute of a quantised tensor's object."""

    container: Any
    key: str

    def _entries(self) -> dict[str, Any]:
        return self.container if isinstance(self.container, dict) else vars(self.container)

    def get(self) -> Tensor:
        return self._entries()[self.key]

    def set(self, tensor: Tensor) -> None:
        self._entries()[self.key] = tensor


def tensors_of(state: dict[str, Any]) -> list[Holder]:
    """Where the tensors of one parameter's optimizer state are kept, those inside quantised ones included."""
    holders = []
    for key, value in state.items():
        if isinstance(value, Tensor):
            holders.append(Holder(state, key))
        elif hasattr(value, "__dict__"):
            holders += [Holder(value, name) for name, inner in vars(value).items() if isinstance(inner, Tensor)]
    return holders


def pinned(size: int, device: torch.device, shared: bool = False) -> Tensor:
    """(size,) bytes of main memory, pinned for a GPU; shared: the same bytes for all processes.

    torch's own pinned allocations are rounded up to powers of two: 38 GiB of blocks would take 64. And Linux copies
    pinned pages when a process forks, as the loader's workers do, unless it is told not to.
    """
    if not size or (device.type != "cuda" and not shared):
        return torch.empty(size, dtype=torch.uint8)
    memory = shared_memory(size) if shared else mmap.mmap(-1, size)
    memory.madvise(mmap.MADV_DONTFORK)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    if device.type != "cuda":
        return buffer
    error = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)
    if int(error):
        raise ValueError(
            f"{size / 2**30:.2f} GiB of main memory could not be pinned ({error}); stream fewer blocks with "
            "--stream_blocks, or raise the limit of locked memory (ulimit -l)"
        )
    return buffer


def shared_memory(size: int) -> mmap.mmap:
    """Memory that all processes, of one machine, see: a file without a name, which belongs to the first one."""
    rank, said = torch.distributed.get_rank(), [""]
    if rank == 0:
        descriptor = os.memfd_create("blocks")
        os.ftruncate(descriptor, size)
        said = [f"/proc/{os.getpid()}/fd/{descriptor}"]
    torch.distributed.broadcast_object_list(said)
    if rank != 0:
        descriptor = os.open(said[0], os.O_RDWR)
    memory = mmap.mmap(descriptor, size)
    torch.distributed.barrier()  # it lives as long as somebody has it open
    os.close(descriptor)
    return memory


def layout(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """(where each tensor begins in a common buffer, the buffer's size), in bytes."""
    offsets, size = [], 0
    for tensor in tensors:
        offsets.append(size)
        size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    return offsets, size


def views(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of the same shapes and dtypes, one after the other in a buffer of bytes."""
    offsets, _ = layout(tensors)
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    return [
        buffer[offset : offset + size].view(tensor.dtype).view(tensor.shape)
        for offset, size, tensor in zip(offsets, sizes, tensors, strict=True)
    ]


class Slots:
    """Groups of tensors at home in main memory, of which as many are on the device as there are slots.

    groups: tensors whose shapes and dtypes are meant; their values are not copied. home: buffers that hold them
    already, as layout() has it. Group i visits slot i % n_slots.
    Copies run on two streams of their own, up and down; events keep a slot from being
    filled while it is used or saved, and a group from being fetched before it is back. On a CPU there are no streams.

    Several processes share the memory at home. Each writes all of it, and all write the same: gradients are averaged
    before an update, so that no process writes what another has still to fetch.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Tensor]],
        n_slots: int,
        device: torch.device,
        home: Sequence[Tensor] | None = None,
    ):
        self.device, self.n_slots = device, n_slots
        self.on_cuda = device.type == "cuda"
        self.up, self.down = (torch.cuda.Stream(device) if self.on_cuda else None for _ in range(2))
        size = max(layout(group)[1] for group in groups)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(n_slots)]
        shared = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        self.home = home or [pinned(layout(group)[1], device, shared) for group in groups]
        self.at_home = [views(home, group) for home, group in zip(self.home, groups, strict=True)]
        self.in_slot = [views(self.slots[i % n_slots], group) for i, group in enumerate(groups)]
        self.holds: list[int | None] = [None] * n_slots
        self.arrived: dict[int, Any] = {}  # slot -> event
        self.used: dict[int, Any] = {}  # slot -> event
        self.saved: dict[int, Any] = {}  # slot -> event
        self.written: dict[int, Any] = {}  # group -> event

    def fetch(self, group: int) -> None:
        """Begin to copy a group into its slot, unless it is there."""
        slot = group % self.n_slots
        if self.holds[slot] == group:
            return
        self.holds[slot] = group
        part = self.slots[slot][: len(self.home[group])]
        if not self.on_cuda:
            part.copy_(self.home[group])
            return
        with torch.cuda.stream(self.up):
            for event in (self.used.get(slot), self.saved.get(slot), self.written.get(group)):
                if event is not None:
                    self.up.wait_event(event)
            part.copy_(self.home[group], non_blocking=True)
            self.arrived[slot] = self.up.record_event()

    def take(self, group: int) -> None:
        """What is launched from now on finds the group in its slot."""
        self.fetch(group)
        if self.on_cuda:
            torch.cuda.current_stream(self.device).wait_event(self.arrived[group % self.n_slots])

    def release(self, group: int, write: bool) -> None:
        """What was launched so far was the last to use the group for now; with `write` it has changed, and goes
        home."""
        slot = group % self.n_slots
        part = self.slots[slot][: len(self.home[group])]
        if not self.on_cuda:
            if write:
                self.home[group].copy_(part)
            return
        self.used[slot] = torch.cuda.current_stream(self.device).record_event()
        if write:
            with torch.cuda.stream(self.down):
                self.down.wait_event(self.used[slot])
                self.home[group].copy_(part, non_blocking=True)
                self.saved[slot] = self.written[group] = self.down.record_event()

    def empty(self) -> None:
        """Wait until all is at home; slots hold nothing any more."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)
        self.holds = [None] * self.n_slots

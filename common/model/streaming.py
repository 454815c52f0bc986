"""Blocks of a transformer whose weights live in main memory and visit the GPU one after the other.

The parameters of a streamed block are views into one of three slots on the GPU, always the same one. Before the block
runs, its weights are copied from pinned main memory into the slot while the block before it computes; after its
backward, in which gradient release has updated them, they go back while the next one is worked on. Its activations are
recomputed by nature. Optimizer state that is as large as the weights travels with them in backward.

On a CPU the same code runs, with plain copies.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.model.slots import Holder, Slots, layout, pinned, tensors_of, views
from common.processes import Release

N_SLOTS = 3  # one computes, one comes, one goes


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that diffusers names as repeated, in the order in which they are registered and run; none of a model
    whose class names none."""
    names = getattr(model, "_repeated_blocks", None) or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def blocks_to_stream(model: nn.Module, wanted: int) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """`wanted` blocks (-1: all), evenly apart so that transfers are too, with the parameters to stream: all of a
    block, or the frozen ones where some are frozen."""
    blocks = repeated_blocks(model)
    wanted = len(blocks) if wanted < 0 else min(wanted, len(blocks))
    some_frozen = not all(p.requires_grad for p in model.parameters())
    chosen = [blocks[index * len(blocks) // wanted] for index in range(wanted)]
    return [(block, [p for p in block.parameters() if not (some_frozen and p.requires_grad)]) for block in chosen]


streamers: WeakKeyDictionary[nn.Module, "Streamer"] = WeakKeyDictionary()


def stream(
    model: nn.Module, wanted: int, device: torch.device, dtype: torch.dtype, frozen_dtype: torch.dtype | None
) -> "Streamer":
    """Give `wanted` blocks of a model without weights (-1: all) parameters that stream. Their weights are then to be
    filled in inside at_home(model)."""
    chosen = blocks_to_stream(model, wanted)
    writes = all(p.requires_grad for p in model.parameters())
    streamer = Streamer(chosen, device, dtype if writes else frozen_dtype or dtype, writes)
    streamers[model] = streamer
    return streamer


def at_home(model: nn.Module) -> AbstractContextManager:
    """Inside, all of the model's weights, and its optimizer's state, are ordinary tensors: for reading, saving and
    loading. Nothing to do for a model that does not stream."""
    return streamers[model].at_home() if model in streamers else nullcontext()


def bind(model: nn.Module, optimizer: torch.optim.Optimizer, release: Release | None) -> None:
    """Let a model's streamed weights take their optimizer state with them, and leave only when they are updated."""
    if model in streamers:
        streamers[model].optimizer, streamers[model].gradient_release = optimizer, release


def replace_parameters(module: nn.Module, tensors: dict[nn.Parameter, Tensor]) -> list[nn.Parameter]:
    """Put parameters on the given tensors in the place of those that they are given for."""
    replaced = []
    for owner in module.modules():
        for name, p in owner.named_parameters(recurse=False):
            if p in tensors:
                setattr(owner, name, nn.Parameter(tensors[p], requires_grad=p.requires_grad))
                replaced.append(getattr(owner, name))
    return replaced


class Streamer:
    """Streams blocks of one model. The blocks call it: forward in their order, backward in reverse.

    blocks: (block, those of its parameters that stream) in the order of the forward; new parameters, views of slots,
    take their places. dtype: of the weights. writes: whether they train, and go back to main memory after
    each backward.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[nn.Module, list[nn.Parameter]]],
        device: torch.device,
        dtype: torch.dtype,
        writes: bool,
    ):
        self.device, self.writes = device, writes
        self.modules = [module for module, _ in blocks]
        like = [[torch.empty(p.shape, dtype=dtype, device="meta") for p in group] for _, group in blocks]
        self.weights = Slots(like, N_SLOTS, device)
        visits = {p: view for (_, group), views in zip(blocks, self.weights.in_slot) for p, view in zip(group, views)}
        self.parameters = [replace_parameters(module, visits) for module in self.modules]
        self.state: Slots | None = None  # of the optimizer, as large as the weights
        self.holders: dict[int, list[Holder]] = {}  # where the optimizer keeps it, by block
        self.state_home: dict[int, Tensor] = {}  # bytes of main memory, by block
        self.optimizer: torch.optim.Optimizer | None = None
        self.gradient_release: Release | None = None
        self.current: tuple[int, bool] | None = None  # (block, whether in its backward) that computes now
        self.recomputing = False
        self.index = {module: index for index, module in enumerate(self.modules)}
        for index, module in enumerate(self.modules):
            self._watch(index, module)

    def _watch(self, index: int, module: nn.Module) -> None:
        """Fetch a block's weights before each call of it, outside of what torch.compile sees."""
        inner = module._compiled_call_impl or module._call_impl

        def call(*args: Any, **kwargs: Any) -> Any:
            self.take(index, self.recomputing)
            return inner(*args, **kwargs)

        module._compiled_call_impl = call

    def checkpointed(self, otherwise: Callable) -> Callable:
        """What diffusers is to call in place of a block where gradients are wanted; otherwise: for blocks that
        stay."""

        # without: updates that wait for a block's call must not draw their rounding from a random state put back
        has_dropout = any(isinstance(part, nn.Dropout) and part.p > 0 for m in self.modules for part in m.modules())

        @contextmanager
        def recompute() -> Iterator[None]:
            self.recomputing = True
            try:
                yield
            finally:
                self.recomputing = False

        def call(module: nn.Module, *args: Any) -> Any:
            if module not in self.index:
                return otherwise(module, *args)
            contexts = {"context_fn": lambda: (nullcontext(), recompute()), "preserve_rng_state": has_dropout}
            return checkpoint(module, *args, use_reentrant=False, **contexts)

        return call

    # ---- in the order of a step

    def take(self, index: int, backward: bool) -> None:
        """The block computes from now on: what came before it is over, and its neighbour is fetched meanwhile."""
        if self.current not in (None, (index, backward)):
            self._finish(*self.current)
        self.current = (index, backward)
        ahead = index - 1 if backward else index + 1
        for slots in self._slots(backward):
            slots.take(index)
            if 0 <= ahead < len(self.modules):
                slots.fetch(ahead)

    def _finish(self, index: int, backward: bool) -> None:
        if backward and self.gradient_release is not None:
            self.gradient_release.finish()
        if backward and self.state is not None:
            self._catch_replaced_state(index)
        for slots in self._slots(backward):
            slots.release(index, write=backward and self.writes)
        if backward and self.writes and self.state is None and self.optimizer is not None:
            self._send_state_home(index)
            if index == 0 and self.holders:
                self._stream_state()

    def _slots(self, backward: bool) -> list[Slots]:
        return [self.weights, self.state] if backward and self.state else [self.weights]

    # ---- optimizer state

    def _state_of(self, index: int) -> list[Holder]:
        return [holder for p in self.parameters[index] for holder in tensors_of(self.optimizer.state.get(p, {}))]

    def _is_large(self, index: int) -> bool:
        state = sum(holder.get().nbytes for holder in self._state_of(index))
        return state > sum(p.nbytes for p in self.parameters[index]) / 10

    def _send_state_home(self, index: int) -> None:
        """After a block's first update: its state, if it is large, goes to main memory at once, so that one block's
        at a time is on the GPU."""
        if self._is_large(index):
            holders = self._state_of(index)
            tensors = [holder.get() for holder in holders]
            self.holders[index] = holders
            self.state_home[index] = pinned(layout(tensors)[1], self.device)
            for holder, place in zip(holders, views(self.state_home[index], tensors), strict=True):
                place.copy_(holder.get())
                holder.set(place)

    def _stream_state(self) -> None:
        """From now on the state that is in main memory visits slots of its own."""
        order = range(len(self.modules))
        groups = [[holder.get() for holder in self.holders[index]] for index in order]
        self.state = Slots(groups, N_SLOTS, self.device, [self.state_home[index] for index in order])
        for holder, _, visit in self._state_places():
            holder.set(visit)

    def _catch_replaced_state(self, index: int) -> None:
        """An optimizer may have put new tensors in the place of those that it was lent."""
        assert self.state is not None
        for holder, visit in zip(self.holders[index], self.state.in_slot[index], strict=True):
            if holder.get() is not visit:
                visit.copy_(holder.get())
                holder.set(visit)

    def _state_places(self) -> Iterator[tuple[Holder, Tensor, Tensor]]:
        assert self.state is not None
        holders = chain.from_iterable(self.holders[index] for index in range(len(self.modules)))
        return zip(holders, chain(*self.state.at_home), chain(*self.state.in_slot), strict=True)

    # ---- all at home

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """Inside, parameters and optimizer state are tensors in main memory, to be read, saved, copied into and loaded
        anew; afterwards they stream."""
        if self.current is not None:
            self._finish(*self.current)
            self.current = None
        self.weights.empty()
        self._point(self.weights.at_home)
        if self.state is not None:
            self.state.empty()
            for holder, home, _ in self._state_places():
                holder.set(home)
        try:
            yield
        finally:
            self._point(self.weights.in_slot)
            if self.optimizer is not None:
                self._lend_state()

    def _point(self, tensors: list[list[Tensor]]) -> None:
        for p, tensor in zip(chain(*self.parameters), chain(*tensors), strict=True):
            p.data = tensor

    def _lend_state(self) -> None:
        """State that is still where at_home put it goes on; state that was loaded meanwhile takes its place."""
        if self.state is not None and all(holder.get() is home for holder, home, _ in self._state_places()):
            for holder, _, visit in self._state_places():
                holder.set(visit)
            return
        self.state, self.holders, self.state_home = None, {}, {}
        for index in range(len(self.modules)):
            if self._is_large(index):
                self._send_state_home(index)
            else:
                for holder in self._state_of(index):
                    holder.set(holder.get().to(self.device))
        if self.holders:
            self._stream_state()

"""The optimizers of the full-tuning recipes, what each needs, and where each may run.

| name | weights | bytes a parameter (weights + gradient + state) |
|---|---|---|
| adamw | fp32 masters, bf16 compute | 16 |
| adamw_8bit | fp32 masters, 8-bit moments (bitsandbytes) | 10 |
| paged_adamw_8bit | the same, moments moved to main memory when the GPU is full | 10 |
| flash_adamw | bf16 + 8 master bits, 8-bit moments (flashoptim) | 7, with gradient release 5 |
| adafactor | bf16 with stochastic rounding, factored moments | 4, with gradient release 2 |

Near 0.02 a bf16 number's spacing is 1.2e-4: an update of 5e-6 rounded to nearest is lost, every time. Each row above
keeps it, by masters, by extra master bits, or by rounding up with the right probability.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from common.processes import Run
from common.settings import Optim, Shared

BYTES_PER_PARAMETER = {"adamw": 16, "adamw_8bit": 10, "paged_adamw_8bit": 10, "flash_adamw": 7, "adafactor": 4}
BYTES_WITH_RELEASE = {"flash_adamw": 5, "adafactor": 2}


def check_optimizer(cfg: Shared, strategy: str, offload: bool) -> None:
    """Refuse what cannot work, with the reason and the way out. strategy: single, ddp, fsdp2, zero2, zero3."""
    name = cfg.tuning.optimizer
    if name in ("adamw_8bit", "paged_adamw_8bit") and strategy in ("fsdp2", "zero2", "zero3"):
        raise ValueError(
            f"optimizer {name} cannot run under {strategy}: bitsandbytes keeps its 8-bit moments in blocks "
            "that do not follow the shards; "
            "use flash_adamw under fsdp2, adamw under DeepSpeed, or LAUNCH=single or ddp"
        )
    if name in ("flash_adamw", "adafactor") and strategy in ("zero2", "zero3"):
        raise ValueError(
            f"optimizer {name} cannot run under {strategy}: DeepSpeed flattens parameters into its own "
            f"fp32 partitions, and {name} keeps its precision inside bf16 parameters; "
            "use adamw here, or LAUNCH=fsdp2 with flash_adamw"
        )
    if name == "adafactor" and strategy == "fsdp2":
        raise ValueError(
            "optimizer adafactor cannot run under fsdp2: its row and column means need the whole matrix "
            "and a rank has a slice; use flash_adamw, or LAUNCH=single or ddp"
        )
    if name == "flash_adamw" and offload:
        raise ValueError(
            "optimizer flash_adamw runs on the GPU only (Triton kernels) and this launch file offloads to the CPU; "
            "use adamw"
        )
    if cfg.tuning.gradient_release and (reasons := why_not_release(cfg)):
        raise ValueError("gradient_release is not possible: " + "; ".join(reasons))


def why_not_release(cfg: Shared) -> list[str]:
    """What stands against stepping parameters inside backward; empty when nothing does."""
    reasons = []
    if cfg.tuning.optimizer not in BYTES_WITH_RELEASE:
        reasons.append(f"optimizer {cfg.tuning.optimizer} has no per-parameter step (use flash_adamw or adafactor)")
    if cfg.batch.gradient_accumulation_steps > 1:
        reasons.append(
            f"gradient_accumulation_steps is {cfg.batch.gradient_accumulation_steps}: "
            "a gradient that is used up inside backward cannot be added to (use 1)"
        )
    if cfg.optim.max_grad_norm > 0:
        reasons.append(
            f"max_grad_norm is {cfg.optim.max_grad_norm}: "
            "the global norm is known only after the updates (use --max_grad_norm 0)"
        )
    return reasons


def build_optimizer(
    run: Run, model: torch.nn.Module, name: str, optim: Optim, groups: list[dict] | None = None
) -> torch.optim.Optimizer:
    """The named optimizer over the parameters that train, or over groups of them, whose lr_scale multiplies the
    learning rate. `check_optimizer` has passed before."""
    trained = [p for p in model.parameters() if p.requires_grad]
    parameters = groups or trained
    common = {"lr": optim.learning_rate, "weight_decay": optim.adam_weight_decay}
    adam = dict(common, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_epsilon)
    on_cuda = torch.cuda.is_available()
    if name == "adamw" and run.strategy.startswith("zero") and run.offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, adamw_mode=True, **adam)
    if name == "adamw":
        return torch.optim.AdamW(parameters, fused=on_cuda and not run.offload, **adam)
    if name in ("adamw_8bit", "paged_adamw_8bit"):
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

        return (AdamW8bit if name == "adamw_8bit" else PagedAdamW8bit)(parameters, **adam)
    if name == "flash_adamw":
        from flashoptim import FlashAdamW

        # quantised states are Triton kernels: on a CPU the same class runs unquantised on fp32 weights
        if not on_cuda:
            return FlashAdamW(parameters, quantize=False, fused=False, master_weight_bits=None, **adam)
        bits = 24 if any(p.dtype == torch.bfloat16 for p in trained) else None  # fp32 weights need no more bits
        return FlashAdamW(parameters, master_weight_bits=bits, **adam)
    if name == "adafactor":
        return Adafactor(parameters, **common)
    raise ValueError(f"unknown optimizer {name!r}, expected one of {', '.join(BYTES_PER_PARAMETER)}")


class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) without momentum, learning rate given, for bf16 weights.

    A matrix's second moment is kept as the means of its rows and columns; its update is clipped to root mean square 1.
    The new weight is rounded to bf16 stochastically, so that its expected value is the fp32 one. Randomness comes from
    the weight's device generator. Tensors with more than two axes are treated as (first axis, the rest). On CUDA the
    update of a block is compiled, for each kind of block.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, decay_power: float = 0.8):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "decay_power": decay_power})
        self._update = _update
        if torch.cuda.is_available():
            torch._dynamo.config.recompile_limit = 64  # one for each kind of block, and for parameters outside
            self._update = torch.compile(_update, dynamic=False)
        self._scalars: dict[tuple, Tensor] = {}
        self.steps_taken = 0
        self.square_sum: Tensor | None = None  # of gradients, for the log; the update yields it for nothing

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None
        self.steps_taken += 1
        torch.manual_seed(self.steps_taken)  # replicas (ddp) must round alike, whatever else their ranks draw
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.step_parameters([p], group)

    @torch.no_grad()
    def step_parameters(self, parameters: Sequence[Tensor], group: dict) -> None:
        """Update parameters from their gradients, at once; gradient release calls it inside backward."""
        device = parameters[0].device
        if self.square_sum is None:
            self.square_sum = torch.zeros((), device=device)
        by_step: dict[int, list[Tensor]] = {}  # one, unless some had no gradient at times
        for p in parameters:
            state = self.state[p] or self._begin(p)
            state["step"] += 1
            by_step.setdefault(state["step"], []).append(p)
        for step, together in by_step.items():
            means = [[value for value in self.state[p].values() if isinstance(value, Tensor)] for p in together]
            weights, grads = [p.detach() for p in together], [p.grad for p in together]
            self._update(weights, grads, means, self._device_scalars(device, group, step), self.square_sum)

    def _begin(self, p: Tensor) -> dict:
        """State of zeros: means of a matrix's rows and columns, or a vector's squares."""
        shapes = {"row": p.shape[:1], "column": p.shape[1:].numel()} if p.ndim > 1 else {"square": p.shape}
        self.state[p].update({name: torch.zeros(shape, device=p.device) for name, shape in shapes.items()}, step=0)
        return self.state[p]

    def _device_scalars(self, device: torch.device, group: dict, step: int) -> Tensor:
        """(3,) float32 on the device: learning rate, 1 - beta2, weight decay factor.

        A tensor, so that no new value recompiles a kernel.
        """
        key = (device, group["lr"], group["weight_decay"], step)
        if key not in self._scalars:
            values = [group["lr"], step ** -group["decay_power"], 1 - group["lr"] * group["weight_decay"]]
            self._scalars = {key: torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)}
        return self._scalars[key]

    def load_state_dict(self, state_dict: dict) -> None:
        """torch casts loaded state to the weight's dtype; the means must stay float32, so they go back as saved."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.steps_taken = max((saved["step"] for saved in state_dict["state"].values()), default=0)
        for index, saved in state_dict["state"].items():
            p = parameters[index]
            self.state[p] = {k: v.to(p.device) if isinstance(v, Tensor) else v for k, v in saved.items()}


def _update(
    weights: list[Tensor], grads: list[Tensor], means: list[list[Tensor]], scalars: Tensor, square_sum: Tensor
) -> None:
    sums = []
    for weight, grad, mean in zip(weights, grads, means, strict=True):
        if weight.ndim > 1:
            rows = weight.shape[0]
            sums.append(_update_matrix(weight.view(rows, -1), grad.view(rows, -1).float(), *mean, scalars))
        else:
            sums.append(_update_vector(weight, grad.float(), *mean, scalars))
    square_sum.add_(torch.stack(sums).sum())


def _update_matrix(weight: Tensor, grad: Tensor, row: Tensor, column: Tensor, scalars: Tensor) -> Tensor:
    square = grad * grad + 1e-30
    row_means = square.mean(dim=1)
    row.lerp_(row_means, scalars[1])
    column.lerp_(square.mean(dim=0), scalars[1])
    update = grad * (row / row.mean()).rsqrt()[:, None] * column.rsqrt()[None]
    _apply_update(weight, update, scalars)
    return row_means.sum() * grad.shape[1]


def _update_vector(weight: Tensor, grad: Tensor, square: Tensor, scalars: Tensor) -> Tensor:
    square_now = grad * grad + 1e-30
    square.lerp_(square_now, scalars[1])
    _apply_update(weight, grad * square.rsqrt(), scalars)
    return square_now.sum()


def _apply_update(weight: Tensor, update: Tensor, scalars: Tensor) -> None:
    update = update / (update * update).mean().sqrt().clamp(min=1.0)
    new_weight = weight.float() * scalars[2] - scalars[0] * update
    weight.copy_(stochastic_round(new_weight) if weight.dtype == torch.bfloat16 else new_weight)


def stochastic_round(values: Tensor) -> Tensor:
    """Round float32 to a bf16-representable float32, up or down with the probabilities that make the expected value
    exact: random bits are added below the 16 that bf16 keeps, then those are cut off."""
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device)
    return ((bits + noise) & -(1 << 16)).view(torch.float32)


class GradientRelease:
    """Steps each block's parameters as soon as their gradients are complete, inside backward, and frees the gradients.

    blocks: parameters that are stepped together, in one call where the optimizer knows how; all others are stepped
    one by one. A block some of whose parameters get no gradient is stepped when another's turn comes, and at the end
    of backward. The parameters' group is looked up when the hook runs: accelerate's wrapper and load_state_dict
    replace the group dictionaries, and hooks that kept the first ones would never see a new learning rate. Keeps the
    gradient norm for the log. replicas: average over the processes before an update, and let all round alike.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, blocks: Sequence[Sequence[Tensor]] = (), replicas: bool = False
    ):
        self.optimizer, self.replicas = optimizer, replicas
        self.square_sum: Tensor | None = None
        self.waiting: list[Tensor] = []  # of one unit
        self.step_together = getattr(optimizer, "step_parameters", None) or (
            lambda parameters, group: [optimizer.step_param(p, group) for p in parameters]
        )
        block_of = {p: number for number, block in enumerate(blocks) for p in block}
        self.unit_of = {  # parameters of one block and one group
            p: (index, block_of.get(p, p))
            for index, group in enumerate(optimizer.param_groups)
            for p in group["params"]
        }
        self.order = {p: number for number, p in enumerate(self.unit_of)}
        self.sizes = Counter(self.unit_of.values())
        for p in self.unit_of:
            p.register_post_accumulate_grad_hook(self._release)

    def _release(self, p: Tensor) -> None:
        unit = self.unit_of[p]
        if self.waiting and self.unit_of[self.waiting[0]] != unit:
            self.finish()
        self.waiting.append(p)
        if len(self.waiting) == self.sizes[unit]:
            self.finish()
        elif len(self.waiting) == 1:
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)

    def finish(self) -> None:
        """Step what has waited for the rest of its block."""
        if not self.waiting:
            return
        parameters = sorted(self.waiting, key=self.order.__getitem__)  # kernels are compiled for one order
        self.waiting = []
        if self.replicas:
            self._average(parameters)
        if not isinstance(self.optimizer, Adafactor):  # whose update yields the sum of squares by itself
            grads = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in parameters]
            square_sum = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)).square().sum()
            self.square_sum = square_sum if self.square_sum is None else self.square_sum + square_sum
        self.step_together(parameters, self.optimizer.param_groups[self.unit_of[parameters[0]][0]])
        for p in parameters:
            p.grad = None

    def _average(self, parameters: list[Tensor]) -> None:
        """Gradients become means over the processes, in one call; rounding is seeded alike everywhere."""
        flat = torch.cat([p.grad.flatten() for p in parameters])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p)
        step = self.optimizer.state.get(parameters[0], {}).get("step", 0)
        torch.manual_seed(int(step) * len(self.order) + self.order[parameters[0]])

    def grad_norm(self, sharded: bool) -> float:
        """Gradient norm of the last backward, over all shards (a collective call when `sharded`); counts anew."""
        counter = self.optimizer if isinstance(self.optimizer, Adafactor) else self
        square_sum, counter.square_sum = counter.square_sum, None
        if sharded:
            torch.distributed.all_reduce(square_sum)
        return math.sqrt(square_sum.item())

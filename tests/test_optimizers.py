"""common/step/optimizers.py and steps.py: bf16 weights move as fp32 ones, saved state is exact, gradient release is
the plain step, refusals say why, learning rates follow their schedule."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from common import settings
from common.start.launch import weights_dtype
from common.step import optimizers
from common.step.optimizers import Adafactor, GradientRelease, check_optimizer, stochastic_round
from common.step.steps import is_due, learning_rate, set_learning_rate


@dataclass
class OneProcess:
    """What build_optimizer asks a run."""

    strategy: str = "single"
    offload: bool = False


@dataclass
class Config:
    """The groups that optimizers heed: no decay and no clipping unless asked for."""

    tuning: settings.FullTuning = field(default_factory=lambda: settings.FullTuning(optimizer="adafactor"))
    batch: settings.Batch = field(default_factory=settings.Batch)
    precision: settings.Precision = field(default_factory=settings.Precision)
    optim: settings.Optim = field(default_factory=lambda: settings.Optim(adam_weight_decay=0.0, max_grad_norm=0.0))


def config(**changes) -> Config:
    """A Config in which these settings have other values."""
    cfg = Config()
    for name, value in changes.items():
        (group,) = (group for group in vars(cfg).values() if hasattr(group, name))
        setattr(group, name, value)
    return cfg


def build_optimizer(model: nn.Module, cfg: Config) -> torch.optim.Optimizer:
    return optimizers.build_optimizer(OneProcess(), model, cfg.tuning.optimizer, cfg.optim)


class TwoLayers(nn.Module):
    """Weights of a transformer's size (about 0.02), a bias, a norm's vector at 1, and a parameter that gets no
    gradient."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.first, self.norm, self.second = (
            nn.Linear(width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.Linear(2 * width, 8),
        )
        self.unused = nn.Parameter(torch.ones(3))
        rng = torch.Generator().manual_seed(0)
        for layer in (self.first, self.second):
            layer.weight.data = torch.randn(layer.weight.shape, generator=rng) * 0.02

    def forward(self, x):
        return self.second(self.norm(self.first(x).tanh()))


def batch(step: int, dtype: torch.dtype, width: int = 128):
    rng = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(32, width, generator=rng)
    return x.to(dtype), x[:, :8].contiguous().to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, autocast: bool = False) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        torch.manual_seed(step)
        x, y = batch(step, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = (model(x).float() - y.float()).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def movement(model: nn.Module, before: nn.Module, along: list[torch.Tensor] | None = None):
    """The matrices' movement; with `along`, how much of that movement was made (1 is all of it)."""
    moved = [
        a.detach().float() - b.detach().float() for a, b in zip(model.parameters(), before.parameters()) if a.ndim > 1
    ]
    if along is None:
        return moved
    return (sum((a * b).sum() for a, b in zip(moved, along)) / sum(b.square().sum() for b in along)).item()


def moved_share(name: str, dtype: torch.dtype, autocast: bool = False, steps: int = 40, device: str = "cpu") -> float:
    """The share of the fp32 run's movement at learning rate 5e-6 that another precision makes."""
    start = TwoLayers().bfloat16().float()  # equal starting points
    reference, tried = copy.deepcopy(start), copy.deepcopy(start).to(dtype)
    baseline = "adamw" if name == "flash_adamw" else name
    train(reference, build_optimizer(reference, config(optimizer=baseline)), range(steps))
    train(tried, build_optimizer(tried, config(optimizer=name)), range(steps), autocast)
    return movement(tried, start, movement(reference, start))


def test_bf16_adafactor_moves_as_fp32():
    """Catches round-to-nearest: near 0.02 bf16's spacing is 1.2e-4 and an update 5e-6, so nothing would move."""
    assert moved_share("adafactor", torch.bfloat16) == pytest.approx(1, abs=0.05)


def test_round_to_nearest_would_not_move(monkeypatch):
    """The control of the test above: without stochastic rounding it fails by far."""
    monkeypatch.setattr(optimizers, "stochastic_round", lambda values: values)
    assert moved_share("adafactor", torch.bfloat16) < 0.3


def test_adamw_with_mixed_precision_moves_as_fp32():
    """Catches adamw on bf16 weights in place of fp32 masters with bf16 compute."""
    assert moved_share("adamw", torch.float32, autocast=True) == pytest.approx(1, abs=0.05)
    assert moved_share("adamw", torch.bfloat16) < 0.3, "the control: AdamW on bf16 weights"


def test_which_weights_are_bf16():
    """Catches a recipe that loads bf16 weights for an optimizer that needs fp32 masters (and the reverse, twice the
    memory)."""

    def dtype(optimizer: str, uses_deepspeed: bool = False, mixed_precision: str = "bf16") -> torch.dtype:
        return weights_dtype(config(optimizer=optimizer, mixed_precision=mixed_precision), uses_deepspeed)

    assert dtype("adamw") == dtype("adamw_8bit") == torch.float32
    assert dtype("adafactor") == dtype("adamw", uses_deepspeed=True) == torch.bfloat16
    assert dtype("flash_adamw") == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    assert dtype("adafactor", mixed_precision="no") == torch.float32


def test_stochastic_round_is_unbiased():
    """Catches a bias (rounding up or down too often) and values other than the two neighbours."""
    torch.manual_seed(0)
    values = torch.tensor([0.02 + 5e-6, -0.02 - 5e-6, 0.0200012, 1.001, -3.1e-5, 7.77e4, 1e-30])
    drawn = stochastic_round(values.expand(100_000, -1))
    below = (values.view(torch.int32) & -(1 << 16)).view(torch.float32)
    above = ((values.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    assert ((drawn == below) | (drawn == above)).all(), "only the two neighbours that bf16 has"
    assert torch.equal(drawn.bfloat16().float(), drawn)
    spacing = (above - below).abs().double()
    error = (drawn.double().mean(0) - values.double()).abs()
    assert (error < 5 * spacing * 0.5 / 100_000**0.5).all(), error / spacing
    exact = torch.tensor([0.0, 1.0, -2.5, 0.02]).bfloat16().float()
    assert torch.equal(stochastic_round(exact.expand(1000, -1)), exact.expand(1000, -1)), "bf16 values stay"
    transposed = torch.randn(4, 6).t()
    assert (stochastic_round(transposed) - transposed).abs().max() < 0.04, "any memory layout"


def test_adafactor_follows_its_paper():
    """Catches an update that is not grad / sqrt(factored second moment), clipped to root mean square 1, and misplaced
    weight decay."""
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(6, 10)), nn.Parameter(torch.randn(7))
    optimizer = Adafactor([weight, bias], lr=0.1, weight_decay=0.5)
    expected = [weight.detach().clone().double(), bias.detach().clone().double()]
    row, column, square = torch.zeros(6).double(), torch.zeros(10).double(), torch.zeros(7).double()
    for step in range(1, 4):
        weight.grad, bias.grad = torch.randn(6, 10) * 3, torch.randn(7)
        kept = 1 - step**-0.8
        grads = [weight.grad.double(), bias.grad.double()]
        row = kept * row + (1 - kept) * (grads[0] ** 2).mean(1)
        column = kept * column + (1 - kept) * (grads[0] ** 2).mean(0)
        square = kept * square + (1 - kept) * grads[1] ** 2
        updates = [grads[0] / (row[:, None] * column[None] / row.mean()).sqrt(), grads[1] / square.sqrt()]
        for value, update in zip(expected, updates):
            value.copy_(value * (1 - 0.1 * 0.5) - 0.1 * update / max(1.0, update.square().mean().sqrt().item()))
        optimizer.step()
    torch.testing.assert_close(weight.detach().double(), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bias.detach().double(), expected[1], atol=1e-5, rtol=1e-5)


def test_adafactor_takes_convolutions_and_skips_missing_gradients():
    """Catches failures on 4-axis weights and on parameters without a gradient (a last block's text branch)."""
    conv, unused = nn.Parameter(torch.randn(4, 3, 2, 2)), nn.Parameter(torch.ones(3))
    optimizer = Adafactor([conv, unused], lr=0.1)
    conv.grad = torch.randn(4, 3, 2, 2)
    before = conv.detach().clone()
    optimizer.step()
    assert not torch.equal(conv, before) and torch.equal(unused, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adafactor_state_is_exact(dtype, tmp_path):
    """Catches state that is cast to bf16 or forgotten on resume: a saved and loaded run goes on bit for bit."""
    straight, resumed = TwoLayers().to(dtype), TwoLayers().to(dtype)
    optimizer = build_optimizer(straight, config(learning_rate=1e-3))
    train(straight, optimizer, range(5))
    torch.save([straight.state_dict(), optimizer.state_dict()], tmp_path / "saved.pt")
    train(straight, optimizer, range(5, 10))
    again = build_optimizer(resumed, config(learning_rate=1e-3))
    weights, state = torch.load(tmp_path / "saved.pt")
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    kinds = {t.dtype for values in again.state.values() for t in values.values() if isinstance(t, torch.Tensor)}
    assert kinds == {torch.float32}
    train(resumed, again, range(5, 10))
    for name, weight in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "as a block"])
@pytest.mark.parametrize("name", ["adafactor", "flash_adamw"])
def test_gradient_release_is_the_plain_step(name, together):
    """Catches parameters stepped twice, never, or before their gradient is complete; hooks that keep the first
    learning rate, also after state is loaded; and a wrong logged gradient norm."""
    if torch.cuda.is_available() and name == "flash_adamw":
        pytest.skip("its kernels need parameters on the GPU")
    start = TwoLayers()
    plain, released = copy.deepcopy(start), copy.deepcopy(start)
    cfg = config(optimizer=name, learning_rate=1e-3)
    plain_optimizer, optimizer = (build_optimizer(model, cfg) for model in (plain, released))
    release = GradientRelease(optimizer, [list(released.parameters())] if together else [])
    for step in range(6):
        if step == 3:
            for each in (plain_optimizer, optimizer):
                each.load_state_dict(copy.deepcopy(each.state_dict()))
        for each in (plain_optimizer, optimizer):
            set_learning_rate(each, 1e-3 / (1 + step))
        x, y = batch(step, torch.float32)
        (plain(x) - y).pow(2).mean().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        (released(x) - y).pow(2).mean().backward()
        assert all(p.grad is None for p in released.parameters()), "gradients must be freed inside backward"
        optimizer.step()
        optimizer.zero_grad()
        assert release.grad_norm(sharded=False) == pytest.approx(norm.item(), rel=1e-5)
        for (key, weight), other in zip(plain.named_parameters(), released.parameters()):
            torch.testing.assert_close(other, weight, atol=1e-7, rtol=0, msg=lambda m, key=key: f"{key}: {m}")
    assert not torch.equal(plain.first.weight, start.first.weight)


def test_flash_adamw_on_a_cpu_is_adamw():
    """Catches other betas, epsilon or decay than asked for, and quantised state on a CPU, where its kernels do not
    run."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU, flash_adamw is the quantised one")
    start = TwoLayers()
    ours, torchs = copy.deepcopy(start), copy.deepcopy(start)
    cfg = config(optimizer="flash_adamw", learning_rate=1e-3, adam_weight_decay=0.1, adam_beta2=0.95)
    train(ours, build_optimizer(ours, cfg), range(10))
    train(torchs, torch.optim.AdamW(torchs.parameters(), 1e-3, (0.9, 0.95), 1e-8, 0.1), range(10))
    assert movement(ours, start, movement(torchs, start)) == pytest.approx(1, abs=1e-3)
    for weight, other in zip(ours.parameters(), torchs.parameters()):
        torch.testing.assert_close(weight, other, atol=2e-6, rtol=1e-4)


@pytest.mark.gpu
def test_flash_adamw_moves_bf16_weights_as_fp32_adamw():
    """Catches master bits that are off: bf16 weights at 5e-6 would stay where they are."""
    start = TwoLayers(256).bfloat16().float().cuda()
    reference, tried = copy.deepcopy(start), copy.deepcopy(start).bfloat16()
    adamw = build_optimizer(reference, config(optimizer="adamw"))
    flash = build_optimizer(tried, config(optimizer="flash_adamw"))
    for step in range(40):
        for model, optimizer in ((reference, adamw), (tried, flash)):
            x, y = (t.cuda() for t in batch(step, model.first.weight.dtype, 256))
            (model(x).float() - y.float()).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    full = copy.deepcopy(reference)
    full.load_state_dict(flash.get_fp32_model_state_dict(tried))
    assert movement(full, start, movement(reference, start)) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("changes", "place", "reason"),
    [
        (dict(optimizer="adamw_8bit"), ("fsdp2", False),
         "adamw_8bit cannot run under fsdp2: .*blocks.*LAUNCH=single"),
        (dict(optimizer="adamw_8bit"), ("zero3", False), "adamw_8bit cannot run under zero3"),
        (dict(optimizer="flash_adamw"), ("zero2", False),
         "flash_adamw cannot run under zero2: DeepSpeed flattens.*LAUNCH=fsdp2"),
        (dict(optimizer="adafactor"), ("zero3", True), "adafactor cannot run under zero3: DeepSpeed flattens"),
        (dict(optimizer="adafactor"), ("fsdp2", False),
         "adafactor cannot run under fsdp2: .*whole matrix.*use flash_adamw"),
        (dict(optimizer="flash_adamw"), ("fsdp2", True), "flash_adamw runs on the GPU only.*use adamw"),
        (dict(optimizer="adamw", gradient_release=True), ("single", False), "adamw has no per-parameter step"),
        (
            dict(gradient_release=True, gradient_accumulation_steps=4),
            ("single", False),
            "gradient_accumulation_steps is 4: .*use 1",
        ),
        (dict(gradient_release=True, max_grad_norm=1.0), ("single", False),
         "max_grad_norm is 1.0: .*max_grad_norm 0"),
    ],
)  # fmt: skip
def test_refusals_name_their_reason(changes, place, reason):
    """Catches a combination that would train wrongly without a word, and a refusal that does not say what to do."""
    with pytest.raises(ValueError, match=reason):
        check_optimizer(config(**changes), *place)


def test_a_refusal_lists_every_reason_and_good_ones_pass():
    """Catches one reason at a time (a user who fixes three things in three runs), and refusals of what works."""
    with pytest.raises(ValueError, match=r"per-parameter step.*accumulation.*global norm"):
        bad = config(optimizer="adamw", gradient_release=True, gradient_accumulation_steps=2, max_grad_norm=1.0)
        check_optimizer(bad, "ddp", False)
    for optimizer, strategy, offload in [
        ("adamw", "single", False),
        ("adamw", "zero3", True),
        ("adamw", "fsdp2", True),
        ("adamw_8bit", "ddp", False),
        ("flash_adamw", "fsdp2", False),
        ("adafactor", "ddp", False),
    ]:
        cfg = config(optimizer=optimizer, max_grad_norm=1.0, gradient_accumulation_steps=4)
        check_optimizer(cfg, strategy, offload)
    check_optimizer(config(optimizer="flash_adamw", gradient_release=True), "fsdp2", False)
    with pytest.raises(ValueError, match="unknown optimizer 'sgd', expected one of adamw"):
        build_optimizer(TwoLayers(), config(optimizer="sgd"))


@pytest.mark.parametrize("name", ["adafactor", "flash_adamw"])
def test_gradient_release_follows_the_learning_rate(name):
    """Catches hooks that keep the group dictionaries of before accelerate's wrapper or load_state_dict replaced them:
    warm-up, decay and a resumed rate would be ignored while the log shows the intended one."""
    from accelerate import Accelerator

    model = torch.nn.Linear(4, 4)
    optimizer = build_optimizer(model, config(optimizer=name, learning_rate=1e-2))
    GradientRelease(optimizer)
    prepared = Accelerator(cpu=True).prepare(optimizer)
    for replace in (lambda: None, lambda: prepared.load_state_dict(prepared.state_dict())):
        replace()
        for rate in (1e-2, 0.0):
            set_learning_rate(prepared, rate)
            before = model.weight.detach().clone()
            model(torch.ones(2, 4)).square().sum().backward()
            assert torch.equal(before, model.weight) == (rate == 0.0)


def test_adafactor_rounds_alike_on_every_rank():
    """Catches replicas (ddp) that drift apart because each rank draws its own rounding bits."""
    weights = []
    for rank in range(2):
        torch.manual_seed(rank)
        weight = torch.nn.Parameter(torch.full((8, 8), 0.3, dtype=torch.bfloat16))
        optimizer = Adafactor([weight], lr=1e-4)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        weights.append(weight.detach())
    assert torch.equal(*weights) and not torch.equal(weights[0], torch.full_like(weights[0], 0.3))


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("constant_with_warmup", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0.25, 0.5, 0.75, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0]),
        ("cosine_with_restarts", [0.25, 0.5, 0.75, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0]),  # of one cycle
    ],
)
def test_learning_rates(scheduler, expected):
    """Catches a warm-up that begins at zero or is a step off, a fall that ends early, a scale that is not heeded."""
    optim = settings.Optim(learning_rate=2e-3, lr_scheduler=scheduler, lr_warmup_steps=3)
    rates = [learning_rate(step, optim, max_train_steps=7) for step in range(8)]
    assert rates == pytest.approx([2e-3 * factor for factor in expected], abs=1e-12)
    assert learning_rate(4, optim, 7, scale=0.1) == pytest.approx(rates[4] / 10)


def test_a_group_has_its_share_of_the_learning_rate():
    """Catches a group whose lr_scale is lost in a step, in the optimizer, or on the way through a checkpoint."""
    model = torch.nn.Linear(2, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr_scale": 0.5}]
    run, optim = OneProcess(), settings.Optim(learning_rate=1.0)
    for name in ("adamw", "adafactor"):
        optimizer = optimizers.build_optimizer(run, model, name, optim, groups)
        optimizer.load_state_dict(optimizers.build_optimizer(run, model, name, optim, groups).state_dict())
        set_learning_rate(optimizer, 0.2)
        assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]
    whole = optimizers.build_optimizer(run, model, "adamw", optim)
    set_learning_rate(whole, 0.2)
    assert [group["lr"] for group in whole.param_groups] == [0.2]


def test_what_is_due():
    """Catches a save or a validation that is missed at the last step, or made although 0 asks for none."""
    assert [step for step in range(1, 9) if is_due(step, every=3, last_step=8)] == [3, 6, 8]
    assert not any(is_due(step, every=0, last_step=8) for step in range(1, 9))

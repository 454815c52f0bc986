"""The model that trains: what is frozen, what is quantised, in which precision; the loss against plain ones."""

import copy
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from common.data import loader
from common.data.order import Place
from common.record.checkpoint import State
from common.start.config import parse_recipe

CPU = torch.device("cpu")
ONE_PROCESS = SimpleNamespace(
    rank=0,
    world_size=1,
    device=CPU,
    is_main=True,
    unwrap=lambda model: model,
    share_of=lambda items: items,
    barrier=lambda: None,
    progress=lambda items, title: items,
)


def settings(train, **changes):
    values = {"train_data_dir": "unused", "mixed_precision": "no", "lora_dropout": 0.0, **changes}
    flags = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in values.items()]
    return parse_recipe(train.Config, list(chain(*flags)))


def adapted(train, model_folder, dtype=torch.float32, quantization="nf4", **changes):
    base = train.load_base(model_folder, dtype, CPU, quantization)
    model = train.add_adapters(base, settings(train, **changes))
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zero at the start, where half of the gradients are zero too
            torch.nn.init.normal_(p, std=0.05)
    return model


@pytest.fixture(scope="module")
def nf4(train, model_folder):
    return adapted(train, model_folder)


@pytest.fixture(scope="module")
def samples(train, processor, data_folder):
    """Eight encoded rows with answers of 2 to 9 tokens."""
    cfg = settings(train, train_data_dir=str(data_folder), face_retention_pool=str(data_folder / "faces"))
    found = train.load_all_rows(cfg, processor)
    rows = found.task[:5] + found.retention[:3]
    assert len({row.answer_tokens for row in rows}) > 1
    return [train.encode(row, processor) for row in rows]


def micro_batch(train, samples, step_tokens: int, micro_batches: int = 1) -> dict:
    """One of a step's micro-batches; settings() has a train_batch_size of 1, so their number is the group size."""
    of_step = {"step_tokens": step_tokens, "group_size": micro_batches}
    return train.collate([{**sample, **of_step} for sample in samples])


def answer_tokens(train, samples) -> int:
    return sum(int((sample["labels"] != train.IGNORE_INDEX).sum()) for sample in samples)


def models_of(train, model):
    return train.Models(model, model.get_base_model().config, None, State(0, [], "", {}))


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# ---- what trains, and in which precision


def test_adapters_alone_train(nf4):
    """Catches a vision tower, a norm or a head that trains, and a layer without adapters."""
    trained = [name for name, p in nf4.named_parameters() if p.requires_grad]
    text = nf4.get_base_model().config.text_config
    assert len(trained) == 2 * 4 * text.num_hidden_layers
    for name in trained:
        assert ".language_model.layers." in name and ".self_attn." in name and ".visual." not in name
        assert name.split(".lora_")[0].split(".")[-1] in ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize("targets", [r".*\.(q_proj|k_proj|v_proj|o_proj|qkv)", r".*language_model.*\.(q_proj|v_proj)"])
def test_wrong_targets_are_noticed(train, model_folder, targets, monkeypatch):
    """Catches adapters under visual, and layers that got none, however a later model names its modules."""
    monkeypatch.setattr(train, "TARGETS", targets)
    with pytest.raises(AssertionError, match=r"would train|expected q, k, v, o of 4"):
        train.add_adapters(train.load_base(model_folder, torch.float32, CPU, "nf4"), settings(train))


def test_the_base_is_really_in_4_bits(nf4):
    """Catches a quantisation that is asked for and not done, in FP4, without double quantisation, or of lm_head."""
    base = nf4.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    layers = {name: module for name, module in layers.items() if "lora_" not in name}
    plain = [name for name, module in layers.items() if not isinstance(module, Linear4bit)]
    assert plain == ["lm_head"]
    for name, module in layers.items():
        if name != "lm_head":
            state = module.weight.quant_state
            assert isinstance(module.weight, Params4bit) and module.weight.dtype == torch.uint8
            assert state.quant_type == "nf4" and state.nested and state.absmax.dtype == torch.uint8
            assert module.weight.numel() * 2 == module.in_features * module.out_features
            assert module.compute_dtype == torch.float32


def test_only_norms_are_raised_to_float32(train, model_folder):
    """Catches embeddings or lm_head in float32, 3 GiB at 32B, norms that stay in half precision, adapters in half."""
    model = adapted(train, model_folder, dtype=torch.float16)
    for name, p in model.named_parameters():
        if p.dtype != torch.uint8:
            expected = torch.float32 if "lora_" in name or "norm" in name else torch.float16
            assert p.dtype == expected, (name, p.dtype)
    linear = model.get_base_model().model.language_model.layers[0].mlp.gate_proj
    assert linear.compute_dtype == torch.float16


def test_vision_runs_without_gradients(train, model_folder, samples):
    """Catches a vision tower whose activations are kept for a backward that nobody needs."""
    model = adapted(train, model_folder)
    visual = model.get_base_model().model.visual
    for p in visual.parameters():
        if p.is_floating_point():
            p.requires_grad_()
    seen = []
    forward = visual.forward
    visual.forward = lambda *args, **kwargs: seen.append(forward(*args, **kwargs)) or seen[-1]
    train.compute_loss(models_of(train, model), micro_batch(train, samples[:2], 10), settings(train))[0].backward()
    assert len(seen) == 1 and not seen[0].pooler_output[0].requires_grad
    assert not seen[0].deepstack_features[0][0].requires_grad
    assert all(p.grad is None for p in visual.parameters())


def test_training_goes_on_after_a_validation(train, model_folder, samples):
    """Catches 4-bit layers that inference changes: bitsandbytes' path for it on CPUs repacks weights, without a
    backward."""
    model = adapted(train, model_folder)
    models, batch = models_of(train, model), micro_batch(train, samples, 30)
    before, _ = train.compute_loss(models, batch, settings(train))
    before.backward()
    expected = gradients(model)
    model.eval()
    with torch.no_grad():
        train.answer_logits(model, batch, CPU)
    model.train()
    after, _ = train.compute_loss(models, batch, settings(train))
    after.backward()
    assert torch.equal(before, after)
    found = gradients(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(grad.abs().sum() > 0 for grad in expected.values())


def test_checkpointing_changes_nothing(train, model_folder, nf4, samples):
    """Catches recomputation with other dropout or other inputs, and a flag that does nothing."""
    cfg = settings(train, gradient_checkpointing=True, lora_dropout=0.1)
    losses, found, calls = [], [], []
    for changes in ({}, {"gradient_checkpointing": True}):
        model = adapted(train, model_folder, lora_dropout=0.1, **changes).train()
        layer = model.get_base_model().model.language_model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
        torch.manual_seed(0)
        loss, _ = train.compute_loss(models_of(train, model), micro_batch(train, samples, 30), cfg)
        loss.backward()
        losses.append(loss.item())
        found.append(gradients(model))
    assert losses[0] == losses[1] and len(calls) == 1 + 2
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_compiling_changes_nothing(train, model_folder, samples, quantization):
    """Catches compiled layers that compute something else, alone and where they are recomputed, or are not compiled at
    all; rows of two lengths, one of them without a picture."""
    batches = [samples[:3], samples[3:]]
    found = {}
    for flags in ({}, {"compile": True}, {"compile": True, "gradient_checkpointing": True}):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = adapted(train, model_folder, quantization=quantization, **flags).train()
        losses = []
        for some in batches:
            batch = micro_batch(train, some, answer_tokens(train, some))
            loss, _ = train.compute_loss(models_of(train, model), batch, settings(train))
            loss.backward()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            logits, _ = train.answer_logits(model, micro_batch(train, samples, 1), CPU)
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert (compiled > 0) == bool(flags), compiled
        found[len(flags)] = losses, gradients(model), logits
    for losses, grads, logits in (found[1], found[2]):
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        assert torch.allclose(logits, found[0][2], atol=1e-4)
        assert grads.keys() == found[0][1].keys() and len(grads) == 32
        for name, grad in found[0][1].items():
            assert torch.allclose(grads[name], grad, rtol=1e-3, atol=1e-5 + 1e-4 * grad.abs().max()), name


def test_random_base_is_what_load_base_loads(train, model_folder, samples):
    """Catches a benchmark of another model: classes, shapes, precisions and 4-bit states are the loaded one's."""
    loaded = train.load_base(model_folder, torch.float16, CPU, "nf4")
    drawn = train.random_base(Qwen3VLConfig.from_pretrained(model_folder), torch.float16, CPU)
    for (name, a), (other, b) in zip(loaded.named_modules(), drawn.named_modules(), strict=True):
        assert name == other and type(a) is type(b), (name, type(a), type(b))
    for (name, a), (other, b) in zip(loaded.named_parameters(), drawn.named_parameters(), strict=True):
        assert (name, a.shape, a.dtype, type(a)) == (other, b.shape, b.dtype, type(b))
        if isinstance(a, Params4bit):
            assert a.quant_state.nested == b.quant_state.nested and a.quant_state.dtype == b.quant_state.dtype
    for (name, a), (other, b) in zip(loaded.named_buffers(), drawn.named_buffers(), strict=True):
        assert name == other and torch.equal(a.float(), b.float()), name
    drawn = train.random_base(Qwen3VLConfig.from_pretrained(model_folder), torch.float32, CPU)
    model = train.add_adapters(drawn, settings(train))
    assert any(
        "Linear4bit" in type(module).__name__ for module in model.modules() if "peft" in type(module).__module__
    )
    loss, _ = train.compute_loss(models_of(train, model), micro_batch(train, samples, 30), settings(train))
    assert loss.isfinite()


def test_full_size_is_the_32b_model(train, recipe):
    """Catches a benchmark of another size: 33.36 billion parameters, 19.9 million of them trained at rank 8."""
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration._from_config(Qwen3VLConfig.from_pretrained(recipe / "full_size"))
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == 33.36
    model.config.text_config.num_hidden_layers = len(model.model.language_model.layers)
    flops = train.forward_flops(model.config, 1, 512)
    assert flops == pytest.approx(2 * 31.2e9 * 512, rel=0.02)


def test_a_benchmark_s_rows(train, recipe):
    """Catches rows of other lengths than asked for, and a loss that is not the mean over the step's answer tokens."""
    cfg = settings(train, benchmark_tokens=200, train_batch_size=2)
    data = loader.random_data(cfg, Qwen3VLConfig.from_pretrained(recipe / "full_size"), train.random_sample)
    group = (3, 1, 4, 1)  # two micro-batches
    batch = train.collate([data.dataset[Place(group[at], 0, at, group)] for at in range(2)])
    assert batch["input_ids"].shape == (2, 200) and (batch["labels"] != train.IGNORE_INDEX).sum(1).tolist() == [32, 32]
    assert batch["group_size"] == 4 and batch["step_tokens"] == 4 * 32
    images = batch["input_ids"] == 151655
    assert images.sum(1).tolist() == [144, 144] and torch.equal(images.long(), batch["mm_token_type_ids"])
    assert batch["pixel_values"].shape == (2 * 4 * 144, 1536) and batch["image_grid_thw"].tolist() == [[1, 24, 24]] * 2


# ---- loss


def test_logits_of_the_answer_are_the_models_own(train, nf4, samples):
    """Catches a shift by one, positions of another row, and padding that changes what is predicted."""
    nf4.eval()
    logits, targets = train.answer_logits(nf4, micro_batch(train, samples, 1), CPU)  # (B, K, V), (B, K)
    for row, sample in enumerate(samples):
        named = {name: sample[name] for name in sample if name not in ("labels", "input_ids", "mm_token_type_ids")}
        batch = {name: sample[name][None] for name in ("input_ids", "mm_token_type_ids")}
        alone = nf4(**batch, **named).logits[0]  # (L, V)
        places = (sample["labels"] != train.IGNORE_INDEX).nonzero()[:, 0]
        labelled = targets[row] != train.IGNORE_INDEX
        assert torch.equal(targets[row][labelled], sample["input_ids"][places])
        assert torch.allclose(logits[row][labelled], alone[places - 1], atol=1e-4)


def test_loss_is_the_mean_over_answer_tokens(train, nf4, samples):
    """Catches another reduction, labels on the question, or a loss that padding dilutes."""
    nf4.eval()
    tokens = answer_tokens(train, samples)
    loss, metrics = train.compute_loss(models_of(train, nf4), micro_batch(train, samples, tokens), settings(train))
    batch = micro_batch(train, samples, tokens)
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    logits = nf4(**{name: batch[name] for name in names}).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and metrics["samples"] == len(samples)


@pytest.mark.parametrize("split", [(4, 4), (2, 2, 2, 2), (1, 7)])
def test_accumulation_is_one_big_batch(train, nf4, samples, split):
    """Catches a mean of means: with answers of unequal lengths, gradients over micro-batches must be the big batch's.

    (The loop divides by their number: accelerate's backward and DDP's average.)
    """
    nf4.eval()
    tokens, cfg = answer_tokens(train, samples), settings(train)
    loss, _ = train.compute_loss(models_of(train, nf4), micro_batch(train, samples, tokens), cfg)
    loss.backward()
    whole = gradients(nf4)
    total, first = 0.0, 0
    for size in split:
        some = samples[first : first + size]
        part, _ = train.compute_loss(models_of(train, nf4), micro_batch(train, some, tokens, len(split)), cfg)
        (part / len(split)).backward()
        total, first = total + part.item() / len(split), first + size
    assert total == pytest.approx(loss.item(), rel=1e-5)
    parts = gradients(nf4)
    assert parts.keys() == whole.keys() and len(whole) == 32
    for name, grad in whole.items():
        assert torch.allclose(parts[name], grad, rtol=1e-3, atol=1e-6 + 1e-4 * grad.abs().max()), name


def test_accuracy_is_that_of_greedy_decoding(train, nf4, samples, processor):
    """Catches an accuracy that counts tokens, or is off by one: a row is right when generate() gives its answer."""
    nf4.eval()
    sample = copy.deepcopy(samples[0])
    start = int((sample["labels"] != train.IGNORE_INDEX).nonzero()[0])
    vision = {name: sample[name] for name in ("pixel_values", "image_grid_thw")}
    prompt = {name: sample[name][None, :start] for name in ("input_ids", "mm_token_type_ids")}
    new = nf4.generate(**prompt, **vision, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, start:]
    run = ONE_PROCESS
    for answer, expected in ((new, 1.0), (torch.cat([new[:-1], (new[-1:] + 1) % 90]), 0.0)):
        ids = torch.cat([sample["input_ids"][:start], answer])
        labels = torch.full_like(ids, train.IGNORE_INDEX)
        labels[start:] = answer
        types = torch.cat([sample["mm_token_type_ids"][:start], torch.zeros_like(answer)])
        row = SimpleNamespace(length=1)
        with pytest.MonkeyPatch.context() as patch:
            encoded = {"input_ids": ids, "labels": labels, "mm_token_type_ids": types, **vision}
            patch.setattr(train, "encode", lambda *_, encoded=encoded: encoded)
            loss, accuracy = train.measure(run, models_of(train, nf4), [row], 2)
        assert accuracy == expected and loss > 0


def test_measured_loss_is_weighted_by_tokens(train, nf4, processor, data_folder):
    """Catches a mean over batches or rows, and one that depends on how rows are grouped into batches."""
    nf4.eval()
    cfg = settings(train, train_data_dir=str(data_folder), face_retention_pool=str(data_folder / "faces"))
    found = train.load_all_rows(cfg, processor)
    rows = found.task[:3] + found.retention[:3]
    models = models_of(train, nf4)
    models.processor = processor
    run = ONE_PROCESS
    sums, tokens = 0.0, 0
    for row in rows:
        loss, _ = train.measure(run, models, [row], 1)
        sums, tokens = sums + loss * row.answer_tokens, tokens + row.answer_tokens
    for batch_size in (1, 4, 6):
        assert train.measure(run, models, rows, batch_size)[0] == pytest.approx(sums / tokens, rel=1e-5)
    assert train.measure(run, models, [], 4) is None


# ---- what is saved


def test_saved_adapters_open_with_peft(train, model_folder, processor, samples, tmp_path):
    """Catches adapters that peft does not read, or reads as others: the same logits on a freshly loaded base."""
    model = adapted(train, model_folder).eval()
    models = models_of(train, model)
    models.processor = processor
    train.save_adapters(ONE_PROCESS, settings(train, output_dir=tmp_path), models, "best", 1)
    names = {path.name for path in (tmp_path / "best").iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "processor_config.json",
        "chat_template.jinja",
    } <= names
    base = train.load_base(model_folder, torch.float32, CPU, "nf4")
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    again = PeftModel.from_pretrained(base, tmp_path / "best").eval()
    batch = micro_batch(train, samples, 1)
    with torch.no_grad():
        ours, theirs = train.answer_logits(model, batch, CPU)[0], train.answer_logits(again, batch, CPU)[0]
        with again.disable_adapter():
            untrained = train.answer_logits(again, batch, CPU)[0]
    assert torch.equal(ours, theirs) and not torch.allclose(ours, untrained, atol=1e-2)

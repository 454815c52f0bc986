"""The three modes: each loss by hand, no leak of the answer, gradients of one summed backward, memory of one mode; the
same through CUDA graphs."""

import gc
import math
import weakref

import pytest
import torch
from torch.nn import functional as F

MODES = ("captioning", "retrieval", "generation")
VOCABULARY = [7, 8, 9]
SLOTS = 3


@pytest.fixture
def model(modes, adapter_module, pipeline):
    """A SpatialModel whose adapter acts, in float32."""
    torch.manual_seed(0)
    adapter = adapter_module.new_adapter(
        pipeline.unet, rank=32, token_width=64, max_objects=SLOTS, vocabulary=VOCABULARY
    )
    for layer in adapter.layers.values():
        layer.gate.data.fill_(0.05)
    return modes.SpatialModel(pipeline.unet, adapter, MODES, queue_size=6).train()


def make_batch(model, batch_size: int = 2, seed: int = 0) -> dict:
    """What compute_loss gives a mode; the first sample has two boxes, the second one, the third none, and so on."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch_size, *shape, generator=rng)

    width = model.unet.config.encoder_hid_dim
    corners = torch.rand(batch_size, SLOTS, 2, generator=rng) * 0.5
    counts = torch.tensor([(2, 1, 0)[number % 3] for number in range(batch_size)])
    has_box = torch.arange(SLOTS) < counts[:, None]
    phrase_ids = torch.randint(len(VOCABULARY), (batch_size, SLOTS, 3), generator=rng)
    phrase_ids[..., 2] = len(VOCABULARY)
    return {
        "noisy_latents": normal(4, 16, 24),
        "target": normal(4, 16, 24),
        "loss_weights": torch.ones(batch_size),
        "timesteps": torch.randint(1000, (batch_size,), generator=rng),
        "prompt_embeds": normal(9, width),
        "pooled_prompt_embeds": normal(width),
        "add_time_ids": torch.tensor([[64, 96, 0, 0, 64, 96]] * batch_size),
        "phrases": normal(SLOTS, width),
        "boxes": torch.cat([corners, corners + 0.3], dim=-1),
        "has_box": has_box,
        "phrase_ids": torch.where(has_box[..., None], phrase_ids, -100),
        "rows": torch.arange(batch_size) + 100 * seed,
    }


def part(batch: dict, *places: int) -> dict:
    return {name: tensor[list(places)] for name, tensor in batch.items()}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


# ---- generation


def test_generation_is_the_mean_squared_error(model, modes):
    """Catches a loss that is not that of the UNet's call with the layout on."""
    batch = make_batch(model)
    loss = model("generation", batch)
    model.adapter.layout = model.layout(batch, batch["has_box"])
    prediction = modes.predict_noise(model.unet, batch)
    assert torch.allclose(loss, F.mse_loss(prediction, batch["target"]), rtol=1e-5)
    assert not torch.allclose(model("generation", {**batch, "has_box": batch["has_box"] & False}), loss)
    weighted = model("generation", {**batch, "loss_weights": torch.tensor([1.0, 3.0])})
    each = (prediction - batch["target"]).pow(2).mean((1, 2, 3))
    assert torch.allclose(weighted, (each[0] + 3 * each[1]) / 2, rtol=1e-5)
    assert torch.allclose(modes.sample_errors(model, batch, box_loss_weight=1.0), each, rtol=1e-5)


def test_weight_inside_boxes(model, modes, monkeypatch):
    """Catches a weight outside instead of inside, on padded boxes too, or one that changes the loss's scale."""
    batch = make_batch(model, 1)
    batch["boxes"] = torch.tensor([[[0.0, 0.0, 0.5, 1.0], [0.25, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 1.0]]])
    batch["has_box"] = torch.tensor([[True, True, False]])
    error = torch.zeros(1, 4, 16, 24)
    error[..., :12] = 2.0  # squared error 4 on the left half, where boxes are, 1 on the right
    error[..., 12:] = 1.0
    monkeypatch.setattr(modes, "predict_noise", lambda unet, batch: batch["target"] + error)
    for weight, expected in ((1.0, 2.5), (3.0, (3 * 4 + 1) / 4), (0.5, (0.5 * 4 + 1) / 1.5)):
        model.box_loss_weight = weight
        assert model("generation", batch).item() == pytest.approx(expected, rel=1e-5)


def test_a_sample_counts_alike_in_any_batch(model):
    """Catches means over tokens or weighted pixels of the whole micro-batch: then a step depends on its split."""
    model.box_loss_weight = 3.0
    batch = make_batch(model, 3)
    for mode in ("generation", "captioning"):
        with torch.no_grad():
            each = [model(mode, part(batch, place)) for place in range(3)]
            assert model(mode, batch).item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-4), mode


# ---- captioning


def test_captioning_is_not_told_the_answer(model):
    """Catches phrases that reach the UNet in the mode that must say them; boxes and the picture must matter."""
    batch = make_batch(model)
    with torch.no_grad():
        loss = model("captioning", batch)
        assert torch.equal(model("captioning", {**batch, "phrases": batch["phrases"] + 1}), loss)
        for name in ("boxes", "noisy_latents"):
            assert not torch.equal(model("captioning", {**batch, name: batch[name] * 0.8}), loss), name


def test_a_token_sees_only_those_before_it(model):
    """Catches a captioning head that reads the token it is asked for."""
    head, regions = model.captioning, torch.randn(1, model.unet.config.block_out_channels[-1])
    with torch.no_grad():
        one, other = (head(regions, torch.tensor([[0, 1, last, 3]])) for last in (0, 2))
        assert torch.equal(one[:, :3], other[:, :3]) and not torch.allclose(one[:, 3], other[:, 3])
        assert not torch.allclose(head(regions + torch.randn_like(regions), torch.tensor([[0, 1, 0, 3]])), one)


def test_regions_are_pooled_inside_their_boxes(model, modes, monkeypatch):
    """Catches features pooled over the whole picture, from another box, or with x and y swapped."""
    batch = make_batch(model, 1)
    batch["boxes"] = torch.tensor([[[0.0, 0.5, 0.25, 1.0], [0.5, 0.0, 1.0, 0.5], [0.0, 0.0, 1.0, 1.0]]])
    features = torch.zeros(1, model.unet.config.block_out_channels[-1], 4, 8)
    features[:, :, 2:, :2], features[:, :, :2, 4:] = 5.0, 7.0
    seen = []
    monkeypatch.setattr(modes, "unet_features", lambda *_: features)
    monkeypatch.setattr(
        model.captioning, "forward", lambda regions, ids: seen.append(regions) or torch.zeros(*ids.shape, 4)
    )
    model("captioning", batch)
    assert torch.allclose(seen[0][:, 0], torch.tensor([5.0, 7.0, (5 * 4 + 7 * 8) / 32]))


def test_captioning_learns(model):
    """Catches a head whose logits and labels are shifted against each other, and features that carry nothing."""
    batch = part(make_batch(model, 5), 0, 1, 3)
    optimizer = torch.optim.AdamW(model.captioning.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        losses.append(model("captioning", batch))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > 1.0 and losses[-1] < 0.2, (losses[0], losses[-1])


# ---- retrieval


def test_retrieval_by_hand(model, modes):
    """Catches negatives that are missing, excluded ones that count, and one direction alone."""
    head = model.retrieval
    first, second = make_batch(model, 2, seed=1), make_batch(model, 2, seed=2)
    second["rows"][1] = first["rows"][0]  # the same row again: no negative of itself
    model("retrieval", first)
    layouts, images = [], []
    for batch in (first, second):
        tokens = model.layout(batch, batch["has_box"]).tokens
        pooled = [row[present].mean(0) for row, present in zip(tokens, batch["has_box"], strict=True)]
        features = model.unet_with(None, modes.unet_features, "mid_block", batch).mean((2, 3))
        for kept, embedded in zip((layouts, images), head.embed(torch.stack(pooled), features), strict=True):
            kept.append(embedded)
    scale, losses = head.logit_scale.exp(), []
    for queries, keys in ((layouts, images), (images, layouts)):
        every = torch.cat([keys[1], keys[0]])
        excluded = torch.tensor([[False] * 4, [False, False, True, False]])
        logits = (scale * queries[1] @ every.T).masked_fill(excluded, -math.inf)
        losses.append(F.cross_entropy(logits, torch.tensor([0, 1])))
    assert torch.allclose(model("retrieval", second), sum(losses) / 2, rtol=1e-4)


def test_queue(model):
    """Catches a batch of one without negatives from the second on, a queue that loses the newest, forgets to wrap, or
    is filled by validation."""
    head = model.retrieval
    single = [part(make_batch(model, 2, seed=seed), 0) for seed in range(1, 9)]
    assert model("retrieval", single[0]).item() == 0.0 and head.row_queue.tolist() == [100] + [-1] * 5
    second = model("retrieval", single[1])
    assert second.item() > 0.01
    second.backward()
    assert head.layout_projection.weight.grad.abs().sum() > 0
    model.eval()
    model("retrieval", single[2])
    assert (head.row_queue >= 0).sum() == 2
    model.train()
    for batch in single[2:]:
        model("retrieval", batch)
    assert head.row_queue.tolist() == [700, 800, 300, 400, 500, 600] and head.queue_end.item() == 2
    assert torch.allclose(head.layout_queue.norm(dim=1), torch.ones(6))


def test_a_batch_larger_than_the_queue(model):
    """Catches a queue that two rows of one batch write to the same place of."""
    head = model.retrieval
    vectors = F.normalize(torch.randn(10, head.image_queue.shape[1]), dim=1)
    head.enqueue(vectors, vectors, torch.arange(10))
    assert sorted(head.row_queue.tolist()) == [4, 5, 6, 7, 8, 9]
    assert torch.equal(head.image_queue[head.row_queue.argmax()], vectors[9])


def test_a_picture_without_boxes_is_not_asked_for(model):
    """Catches the null layout taken for a layout of its own picture."""
    batch = make_batch(model, 3)
    model("retrieval", make_batch(model, 2, seed=1))
    model.eval()
    with torch.no_grad():
        everything = model("retrieval", batch)
        batch["has_box"] = batch["has_box"] & False
        assert everything > 0 and model("retrieval", batch) == 0


# ---- all of them


def test_each_mode_runs_what_it_needs(model, modes, pipeline):
    """Catches features of another part than the one named, and a forward that goes on after them."""
    batch, ran = make_batch(model), []
    unet = model.unet
    parts = ["mid_block", "up_blocks.0", "up_blocks.1", "conv_out"]
    for name in parts:
        unet.get_submodule(name).register_forward_hook(lambda module, i, o, name=name: ran.append((name, o)))
    for mode, expected in (("retrieval", parts[:1]), ("captioning", parts[:2]), ("generation", parts)):
        ran.clear()
        model(mode, batch)
        assert [name for name, _ in ran] == expected
    ran.clear()
    features = modes.unet_features(unet, "up_blocks.0", batch)
    modes.predict_noise(unet, batch)
    assert torch.equal(features, ran[-3][1])


def test_gradients_are_those_of_one_summed_backward(model):
    """Catches a mode whose backward drops or doubles what another left, and a queue or layout that one mode changes
    under another's graph."""
    batch = make_batch(model, 3)
    model("retrieval", make_batch(model, 2, seed=1))  # so that there are negatives
    queue = {name: tensor.clone() for name, tensor in model.retrieval.named_buffers()}
    for mode in MODES:
        (model(mode, batch) / 3).backward()
    one_by_one = gradients(model)
    model.zero_grad(set_to_none=True)
    for name, tensor in model.retrieval.named_buffers():
        tensor.copy_(queue[name])
    (sum(model(mode, batch) for mode in MODES) / 3).backward()
    summed = gradients(model)
    assert one_by_one.keys() == summed.keys()
    for name, expected in summed.items():
        assert torch.allclose(one_by_one[name], expected, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_every_parameter_a_gradient(model, mode):
    """Catches parameters that one mode does not reach: DDP and ZeRO wait for each of them in every backward. What a
    mode does not use gets exactly zero."""
    model("retrieval", make_batch(model, 2, seed=1))
    model(mode, make_batch(model)).backward()
    found = gradients(model)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    used = {name.split(".")[0] for name, gradient in found.items() if gradient.any()}
    expected = {"generation": {"adapter"}, "captioning": {"adapter", "captioning"}}
    assert used == expected.get(mode, {"adapter", "retrieval"})
    assert all(p.grad is None for p in model.unet.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_mode_frees_its_graph(model, checkpointing):
    """Catches activations of one mode that are alive while the next one runs: the peak must be the largest mode's, not
    the sum."""
    if checkpointing:
        model.unet.enable_gradient_checkpointing()
    batch, alive = make_batch(model), []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.view_as(tensor)
        if not tensor.is_leaf:
            alive.append(weakref.ref(copy))
        return copy

    for mode in MODES:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(mode, batch)
        assert any(reference() is not None for reference in alive)
        loss.backward()
        del loss
        gc.collect()
        assert all(reference() is None for reference in alive), mode
        alive.clear()


def test_bf16_unet_with_float32_adapter(model):
    """Catches a mixture of dtypes that fails, autocast that casts twice, and losses in low precision."""
    batch = make_batch(model)
    with torch.no_grad():
        expected = {mode: model(mode, batch) for mode in MODES}
    model.unet.to(torch.bfloat16)
    model.retrieval.row_queue.fill_(-1)
    with torch.autocast("cpu", torch.bfloat16):
        for mode in MODES:
            loss = model(mode, batch)
            assert loss.dtype == torch.float32
            assert loss.item() == pytest.approx(expected[mode].item(), rel=0.05), mode
            loss.backward()
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())


def test_modes_that_cannot_be(train):
    """Catches a misspelt mode that trains nothing, and modes whose backwards come in the order they are written in."""
    config = train.Config(modes="generation,retrieval,captioning")
    assert config.mode_names() == list(MODES)
    config.check()
    for bad in ("retrieval", "generation,", "generation,captoning", "generation,generation"):
        with pytest.raises(ValueError, match="expected generation"):
            train.Config(modes=bad).check()


# ---- CUDA graphs


def train_a_little(model, batches, names) -> tuple[list, list]:
    """Losses and gradients of steps that each accumulate the named modes of every batch and move the weights in
    place."""
    losses, gradients = [], []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for _ in range(3):
        model.zero_grad()
        for batch in batches:
            for mode in names:
                loss = model(mode, batch)
                loss.backward()
                losses.append(loss.item())
        gradients.append([p.grad.clone() for p in parameters])
        with torch.no_grad():
            for p in parameters:
                p.sub_(0.05 * p.grad)
    return losses, gradients


@pytest.mark.gpu
@pytest.mark.parametrize("names", [MODES, ("generation",)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_graphs_change_nothing(model, modes, train, checkpointing, names, monkeypatch):
    """Catches inputs, weights or boxes of the recording in place of those of the call, gradients that the next replay
    overwrites, shapes that share a recording, and memory of one recording in another."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model.cuda()
    if checkpointing:
        train.checkpoint_activations(model.unet)
    wide = {name: each.cuda() for name, each in make_batch(model, seed=1).items()}
    square = {name: each.cuda() for name, each in make_batch(model, seed=2).items()}
    square |= {name: square[name][..., :16].contiguous() for name in ("noisy_latents", "target")}
    other = {name: each.cuda() for name, each in make_batch(model, seed=3).items()}
    start = {name: each.clone() for name, each in model.state_dict().items()}
    losses, gradients = train_a_little(model, [wide, square, other], names)

    model.load_state_dict(start)
    model.graphs = modes.UNetGraphs(model.unet, model.adapter)
    recorded_losses, recorded_gradients = train_a_little(model, [wide, square, other], names)
    assert len(model.graphs.recordings) == len(names) * 2
    assert recorded_losses == pytest.approx(losses, rel=1e-4)
    for step, (ours, theirs) in enumerate(zip(recorded_gradients, gradients, strict=True)):
        for one, two in zip(ours, theirs, strict=True):
            assert (one - two).norm() <= 1e-3 * two.norm() + 1e-6, step

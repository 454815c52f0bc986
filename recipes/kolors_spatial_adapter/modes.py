"""The model that trains: a frozen UNet with its adapter, and the three modes that each give one loss.

generation    the noise-prediction loss with the boxes as condition, optionally weighted inside them
captioning    each box's phrase, from the UNet's features inside the box; the UNet is told the boxes, not the phrases
retrieval     which layout belongs to which picture (InfoNCE), by grounding tokens and features of the plain UNet

A mode is one forward and one backward of its own: its activations are gone before the next begins.
"""

import json
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from adapter import Layout, SpatialAdapter, make_layout
from boxes import coverage
from diffusers import UNet2DConditionModel
from graphs import UNetGraphs
from layouts import IGNORE
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

MODES = ("captioning", "retrieval", "generation")
REGION_FEATURES = "up_blocks.0"  # the part of the UNet whose output captioning pools in the boxes
IMAGE_FEATURES = "mid_block"  # and retrieval over the picture
PROMPT_TOKENS = 256  # the pipeline pads to them, and the UNet reads the padding


def each_mode(batches: Iterator[dict], modes: Sequence[str]) -> Iterator[dict]:
    """Every micro-batch once for each mode: a mode is a micro-step of the loop."""
    for batch in batches:
        for mode in modes:
            yield {**batch, "mode": mode}


# ---------------------------------------------------------------- calls of the UNet


def predict_noise(unet: UNet2DConditionModel, batch: dict) -> Tensor:
    """Call the UNet as the pipeline does, in its own dtype: noisy_latents (B, 4, h, w), timesteps (B,), prompt_embeds
    (B, L, D), pooled_prompt_embeds (B, D), add_time_ids (B, 6) -> noise_pred (B, 4, h, w)."""
    dtype = unet.dtype
    added = {"text_embeds": batch["pooled_prompt_embeds"].to(dtype), "time_ids": batch["add_time_ids"].to(dtype)}
    return unet(
        batch["noisy_latents"].to(dtype),
        batch["timesteps"],
        encoder_hidden_states=batch["prompt_embeds"].to(dtype),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


class FeaturesReached(Exception):
    """Ends a forward at the part whose output is wanted: what comes after it would be computed for nothing."""


def unet_features(unet: UNet2DConditionModel, part: str, batch: dict) -> Tensor:
    """(B, C, h', w') output of a part of the UNet, which is run no further."""
    found = []

    def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        found.append(output)
        raise FeaturesReached

    handle = unet.get_submodule(part).register_forward_hook(keep)
    try:
        predict_noise(unet, batch)
    except FeaturesReached:
        pass
    finally:
        handle.remove()
    return found[0]


# ---------------------------------------------------------------- heads


class CaptioningHead(nn.Module):
    """A two-layer causal transformer that says a phrase's tokens after one region feature."""

    def __init__(self, feature_width: int, vocabulary_size: int, width: int = 256, max_tokens: int = 32):
        super().__init__()
        self.norm = nn.LayerNorm(feature_width)
        self.region = nn.Linear(feature_width, width)
        self.tokens = nn.Embedding(vocabulary_size, width)
        self.places = nn.Parameter(0.02 * torch.randn(max_tokens, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.out = nn.Linear(width, vocabulary_size)

    def forward(self, regions: Tensor, token_ids: Tensor) -> Tensor:
        """regions (R, C), token_ids (R, L), IGNORE behind a phrase's end -> logits (R, L, vocabulary_size): the first
        from the region alone, each next one from the tokens before it too."""
        dtype, length = self.places.dtype, token_ids.shape[1]
        start = self.region(self.norm(regions.to(dtype)))[:, None]  # (R, 1, width)
        said = self.tokens(token_ids[:, :-1].clamp(min=0))  # (R, L - 1, width)
        inputs = torch.cat([start, said], dim=1) + self.places[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=inputs.device, dtype=dtype)
        return self.out(self.layers(inputs, mask=mask, is_causal=True))


class RetrievalHead(nn.Module):
    """Layout and picture as unit vectors, and a queue of earlier ones: negatives, also at batch 1.

    The queue starts empty and grows with every micro-batch, over all processes; it is a buffer, so checkpoints keep it
    and every process holds the same.
    """

    def __init__(self, token_width: int, feature_width: int, queue_size: int, width: int = 256):
        super().__init__()
        self.layout_projection = nn.Linear(token_width, width)
        self.image_norm = nn.LayerNorm(feature_width)
        self.image_projection = nn.Linear(feature_width, width)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))
        self.register_buffer("layout_queue", torch.zeros(queue_size, width))
        self.register_buffer("image_queue", torch.zeros(queue_size, width))
        self.register_buffer("row_queue", torch.full((queue_size,), -1))  # which row of the data; -1 where empty
        self.register_buffer("queue_end", torch.zeros(1, dtype=torch.long))  # where the next ones go

    def embed(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, token_width), features (B, C) -> unit vectors of layouts and images, each (B, width) float32."""
        dtype = self.logit_scale.dtype
        layouts = self.layout_projection(tokens.to(dtype)).float()
        images = self.image_projection(self.image_norm(features.to(dtype))).float()
        return F.normalize(layouts, dim=-1), F.normalize(images, dim=-1)

    @torch.no_grad()
    def enqueue(self, layouts: Tensor, images: Tensor, rows: Tensor) -> None:
        """Put (M, width) unit vectors and (M,) row numbers in the places of the oldest."""
        size = len(self.row_queue)
        places = (self.queue_end + torch.arange(len(rows), device=rows.device))[-size:] % size
        self.layout_queue[places] = layouts[-size:].to(self.layout_queue.dtype)
        self.image_queue[places] = images[-size:].to(self.image_queue.dtype)
        self.row_queue[places] = rows[-size:]
        self.queue_end.add_(len(rows)).remainder_(size)


class GatherWithGradient(torch.autograd.Function):
    """(B, ...) of each process -> (processes * B, ...) of all, in the order of ranks; gradients come back to the
    process that the rows are from."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.batch_size = len(rows)
        gathered = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad)
        return grad[torch.distributed.get_rank() * ctx.batch_size :][: ctx.batch_size]


def gather(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes, and where this process's begin."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return rows, 0
    return GatherWithGradient.apply(rows), torch.distributed.get_rank() * len(rows)


# ---------------------------------------------------------------- losses of the modes


def sample_errors(model: "SpatialModel", batch: dict, box_loss_weight: float) -> Tensor:
    """(B,) what is minimised, of each sample: the mean squared error of the predicted target (noise or v). Inside
    boxes it counts box_loss_weight times; the weights of a sample's pixels have mean 1, so the loss stays comparable.
    The generation loss and, with a weight of 1, the held-out loss call it."""
    layout = model.layout(batch, batch["has_box"])
    prediction = model.unet_with(layout, predict_noise, batch).float()  # (B, 4, h, w)
    squared = (prediction - batch["target"].float()).pow(2).mean(1)  # (B, h, w)
    inside = coverage(batch["boxes"], *squared.shape[1:]) * batch["has_box"][..., None, None]  # (B, N, h, w)
    weights = 1 + (box_loss_weight - 1) * inside.amax(1)  # (B, h, w)
    return (squared * weights).flatten(1).sum(1) / weights.flatten(1).sum(1)


def generation_loss(model: "SpatialModel", batch: dict) -> Tensor:
    """The mean of the samples' errors, each times its loss_weights (B,)."""
    return (batch["loss_weights"] * sample_errors(model, batch, model.box_loss_weight)).mean()


def captioning_loss(model: "SpatialModel", batch: dict) -> Tensor:
    """Cross-entropy of each box's phrase, the mean over a sample's tokens, then over samples. The UNet gets the boxes
    with null phrases and the empty prompt, or it could read the answer off its condition."""
    layout = model.layout(batch, torch.zeros_like(batch["has_box"]))
    features = model.unet_with(layout, unet_features, REGION_FEATURES, batch)  # (B, C, h', w')
    inside = coverage(batch["boxes"], *features.shape[2:])  # (B, N, h', w')
    inside = inside / inside.sum((2, 3), keepdim=True).clamp(min=1e-6)
    regions = torch.einsum("bchw,bnhw->bnc", features.float(), inside)  # (B, N, C)
    token_ids = batch["phrase_ids"]  # (B, N, L)
    logits = model.captioning(regions.flatten(0, 1), token_ids.flatten(0, 1)).float()  # (B * N, L, V)
    losses = F.cross_entropy(logits.transpose(1, 2), token_ids.flatten(0, 1), ignore_index=IGNORE, reduction="none")
    said = (token_ids != IGNORE).flatten(1).sum(1).clamp(min=1)  # (B,)
    return (losses.view(len(token_ids), -1).sum(1) / said).mean()


def retrieval_loss(model: "SpatialModel", batch: dict) -> Tensor:
    """InfoNCE in both directions. Negatives: the other samples of the micro-batch on all processes, and the queue;
    never the same row of the data. Without any, as in a run's first micro-batch of one sample, it is 0."""
    layout = model.layout(batch, batch["has_box"])
    has_box = batch["has_box"][..., None].to(layout.tokens.dtype)  # (B, N, 1)
    pooled = (layout.tokens * has_box).sum(1) / has_box.sum(1).clamp(min=1)  # (B, token_width)
    with torch.no_grad():  # nothing before these features trains
        features = model.unet_with(None, unet_features, IMAGE_FEATURES, batch).float().mean((2, 3))  # (B, C)
    head = model.retrieval
    layouts, images = head.embed(pooled, features)
    (all_layouts, start), (all_images, _), (all_rows, _) = gather(layouts), gather(images), gather(batch["rows"])
    candidates = torch.cat([all_rows, head.row_queue])  # (M + Q,)
    own = start + torch.arange(len(layouts), device=layouts.device)  # (B,) where the positives are
    excluded = (candidates == batch["rows"][:, None]) | (candidates == -1)  # (B, M + Q)
    excluded[torch.arange(len(own), device=own.device), own] = False
    scale = head.logit_scale.float().clamp(max=math.log(100)).exp()
    losses = []
    for queries, keys, queue in (
        (layouts, all_images, head.image_queue),
        (images, all_layouts, head.layout_queue),
    ):
        logits = scale * queries @ torch.cat([keys, queue.float()]).T  # (B, M + Q)
        losses.append(F.cross_entropy(logits.masked_fill(excluded, -math.inf), own, reduction="none"))
    if model.training:
        head.enqueue(all_layouts, all_images, all_rows)
    counts = batch["has_box"].any(1).float()  # a picture without boxes has no layout to find
    return ((losses[0] + losses[1]) / 2 * counts).mean()


class SpatialModel(nn.Module):
    """The frozen UNet, the adapter and the heads of the modes in one module, so that what wraps it for several
    processes wraps all that trains."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        adapter: SpatialAdapter,
        modes: Sequence[str],
        queue_size: int,
        box_loss_weight: float = 1.0,
    ):
        super().__init__()
        self.unet, self.adapter, self.box_loss_weight = unet.requires_grad_(False), adapter, box_loss_weight
        self.graphs: UNetGraphs | None = None
        feature_width = unet.config.block_out_channels[-1]  # of both parts that features are taken from
        self.captioning = self.retrieval = None
        if "captioning" in modes:
            self.captioning = CaptioningHead(feature_width, len(adapter.cfg.vocabulary) + 1)
        if "retrieval" in modes:
            self.retrieval = RetrievalHead(adapter.cfg.token_width, feature_width, queue_size)

    def forward(self, mode: str, batch: dict) -> Tensor:
        """One mode's loss. Whatever it does not use gets a gradient of zero: every process then has a gradient for
        every parameter in every backward, which is what DDP and ZeRO count on."""
        losses = {"generation": generation_loss, "captioning": captioning_loss, "retrieval": retrieval_loss}
        unused = {
            "generation": (self.captioning, self.retrieval),
            "captioning": (self.adapter, self.retrieval),
            "retrieval": (self.adapter, self.captioning),
        }
        with torch.autocast(batch["noisy_latents"].device.type, enabled=False):  # each part casts for itself
            loss = losses[mode](self, batch)
            parameters = [p for module in unused[mode] if module is not None for p in module.parameters()]
            return loss + 0 * sum((p.sum().float() for p in parameters), start=torch.zeros_like(loss))

    def layout(self, batch: dict, has_phrase: Tensor) -> Layout:
        """Grounding tokens of a batch: phrases (B, N, D), boxes (B, N, 4), has_box (B, N)."""
        size = batch["noisy_latents"].shape[-2:]
        return make_layout(
            self.adapter, self.unet, batch["phrases"], batch["boxes"], has_phrase, batch["has_box"], tuple(size)
        )

    def unet_with(self, layout: Layout | None, function, *arguments: object) -> Tensor:
        """Call function(unet, ...) with a layout, or without any. The layout stays: recomputation in backward
        (gradient checkpointing) must find what the forward saw."""
        if self.graphs is not None and self.training:
            return self.graphs(layout, function, *arguments)
        self.adapter.layout = layout
        return function(self.unet, *arguments)

    def describe(self) -> str:
        """How many parameters train, by part."""
        parts = {"adapter": self.adapter, "captioning head": self.captioning, "retrieval head": self.retrieval}
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
        said = ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in counts.items())
        frozen = sum(p.numel() for p in self.unet.parameters())
        return f"trains {said}, at {len(self.adapter.layers)} cross-attentions of a frozen UNet of {frozen / 1e6:.1f}M"


# ---------------------------------------------------------------- arithmetic


@lru_cache
def mode_flops(unet_config: str, side: int) -> dict[str, float]:
    """FLOPs of one sample's micro-step by mode for latents of side x side (matrix products and attention of the UNet,
    2 a multiply-add), as the meter counts: it multiplies by 3 for a forward and both gradients, and frozen weights
    have no gradient of their own. unet_config: JSON. Counted on a UNet without memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads(unet_config))
        cfg = unet.config
        width = cfg.encoder_hid_dim or cfg.cross_attention_dim
        pooled = cfg.projection_class_embeddings_input_dim - 6 * cfg.addition_time_embed_dim
        batch = {
            "noisy_latents": torch.empty(1, cfg.in_channels, side, side),
            "timesteps": torch.zeros(1),
            "prompt_embeds": torch.empty(1, PROMPT_TOKENS, width),
            "pooled_prompt_embeds": torch.empty(1, pooled),
            "add_time_ids": torch.empty(1, 6),
        }
        calls = {
            "generation": (2, predict_noise, ()),
            "captioning": (2, unet_features, (REGION_FEATURES,)),
            "retrieval": (1, unet_features, (IMAGE_FEATURES,)),
        }
        flops = {}
        for mode, (passes, function, arguments) in calls.items():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                function(unet, *arguments, batch)
            flops[mode] = counter.get_total_flops() * passes / 3
    return flops

"""The spatial adapter: grounding tokens from phrases and boxes, and what each cross-attention of a UNet adds of them.

    out = attn2(text) + tanh(10 gate) * attention(queries of the picture, keys and values of the grounding tokens)

The gates begin at zero: an untrained adapter changes nothing. A pixel inside a box attends to its token e^4 times as
much as to others, at the start: without that a tiny model learnt no boxes from thousands of samples, with it from
hundreds. The UNet stays diffusers' own, frozen: the adapter comes in through its attention processors, and wraps those
that are there (an IP-Adapter's, too).
After GLIGEN (arXiv 2301.07093): a token is an MLP of a phrase's embedding and the Fourier features of its box, learned
null phrases and null boxes fill up the list.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from boxes import check_objects, coverage, largest_first
from diffusers import KolorsPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCIES = 8  # of the Fourier features: 100^(k / 8), GLIGEN's
GATE_SPEED = 10  # Adam moves every number by about the learning rate, and a gate of 1 is far away at 1e-4 a step
INSIDE = 4.0  # what is first added to the attention logits inside a box
WEIGHTS, CONFIG = "adapter_model.safetensors", "config.json"
LOAD = """\
import torch
from adapter import draw, load_adapter  # adapter.py of the recipe that made it
from diffusers import KolorsPipeline

pipeline = KolorsPipeline.from_pretrained("{base}", torch_dtype=torch.bfloat16)
adapter = load_adapter(".", pipeline.unet)
image = draw(pipeline, adapter, "a cat on a chair", [{"phrase": "a cat", "bbox": [0.2, 0.1, 0.6, 0.5]}])"""
Injection = Literal["cross_attention", "gated_self_attention"]


@dataclass
class AdapterConfig:
    """What an adapter is built from; config.json beside its weights."""

    widths: dict[str, int]
    """hidden width of each attn2 by its name in the UNet"""
    phrase_width: int
    """of a phrase's embedding behind the UNet's own text projection"""
    rank: int = 160
    """width of the adapter's attention"""
    token_width: int = 1024
    """of a grounding token"""
    head_width: int = 32
    injection: Injection = "cross_attention"
    query_positions: bool = True
    """queries know where in the picture they are"""
    box_bias: bool = True
    """pixels inside a box attend to its token"""
    max_objects: int = 16
    """grounding tokens of a picture, null ones included"""
    vocabulary: list[int] = field(default_factory=list)
    """tokens that the captioning head can say"""


@dataclass
class Layout:
    """What the processors add in the next calls of the UNet."""

    tokens: Tensor  # (B, N, token_width)
    positions: dict[int, Tensor]  # {S = H * W of a resolution of the UNet: (S, 4 * FREQUENCIES)}
    inside: dict[int, Tensor]  # {S: (B, S, N), the share of each pixel that each box covers}


# ---------------------------------------------------------------- modules


def fourier_features(values: Tensor) -> Tensor:
    """(..., n) coordinates in [0, 1] -> (..., 2 * FREQUENCIES * n) sines and cosines."""
    frequencies = 100 ** (torch.arange(FREQUENCIES, device=values.device) / FREQUENCIES)
    angles = (values.float()[..., None] * frequencies).flatten(-2)  # (..., n * FREQUENCIES)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


@lru_cache(maxsize=256)
def pixel_positions(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 4 * FREQUENCIES) features of each pixel's centre (x, y), row by row."""
    x = (torch.arange(width, device=device) + 0.5) / width
    y = (torch.arange(height, device=device) + 0.5) / height
    centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (height, width, 2)
    return fourier_features(centres.flatten(0, 1))


def resolutions(height: int, width: int, depth: int) -> list[tuple[int, int]]:
    """Sizes of a UNet's feature maps for latents of a size: that, and `depth` halves of it."""
    return [(math.ceil(height / 2**level), math.ceil(width / 2**level)) for level in range(depth + 1)]


def cast_linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """The layer in the inputs' dtype, whatever its weights are kept in."""
    bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
    return F.linear(inputs, layer.weight.to(inputs.dtype), bias)


class GroundingTokens(nn.Module):
    """Phrases and boxes -> tokens; null phrase and null box where there are none."""

    def __init__(self, phrase_width: int, token_width: int):
        super().__init__()
        box_width = 4 * 2 * FREQUENCIES
        self.null_phrase = nn.Parameter(torch.zeros(phrase_width))
        self.null_box = nn.Parameter(torch.zeros(box_width))
        self.mlp = nn.Sequential(
            nn.Linear(phrase_width + box_width, token_width),
            nn.SiLU(),
            nn.Linear(token_width, token_width),
            nn.SiLU(),
            nn.Linear(token_width, token_width),
        )
        self.norm = nn.LayerNorm(token_width)

    def forward(self, phrases: Tensor, boxes: Tensor, has_phrase: Tensor, has_box: Tensor) -> Tensor:
        """phrases (B, N, phrase_width), boxes (B, N, 4), has_phrase and has_box (B, N) bool -> (B, N, token_width)."""
        dtype = self.null_phrase.dtype
        phrases = F.layer_norm(phrases.float(), phrases.shape[-1:]).to(dtype)
        phrases = torch.where(has_phrase[..., None], phrases, self.null_phrase)
        places = torch.where(has_box[..., None], fourier_features(boxes).to(dtype), self.null_box)
        return self.norm(self.mlp(torch.cat([phrases, places], dim=-1)))


class LayoutAttention(nn.Module):
    """What one attn2 adds: attention of low width from the picture to the grounding tokens, behind a zero gate."""

    def __init__(self, hidden_width: int, cfg: AdapterConfig):
        super().__init__()
        self.heads = cfg.rank // cfg.head_width
        self.to_q = nn.Linear(hidden_width, cfg.rank, bias=False)
        self.to_k = nn.Linear(cfg.token_width, cfg.rank, bias=False)
        self.to_v = nn.Linear(cfg.token_width, cfg.rank, bias=False)
        self.to_out = nn.Linear(cfg.rank, hidden_width, bias=False)
        self.position = nn.Linear(4 * FREQUENCIES, cfg.rank, bias=False) if cfg.query_positions else None
        self.self_k = self.self_v = None  # keys and values of the picture itself, as in GLIGEN's gated self-attention
        if cfg.injection == "gated_self_attention":
            self.self_k = nn.Linear(hidden_width, cfg.rank, bias=False)
            self.self_v = nn.Linear(hidden_width, cfg.rank, bias=False)
        self.box_bias = nn.Parameter(torch.full((self.heads,), INSIDE)) if cfg.box_bias else None
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: Tensor, tokens: Tensor, positions: Tensor, inside: Tensor) -> Tensor:
        """hidden_states (B, S, hidden_width), tokens (B, N, token_width), positions (S, 4 * FREQUENCIES) and inside
        (B, S, N) of their pixels -> what is added, (B, S, hidden_width)."""
        dtype = hidden_states.dtype
        tokens = tokens.to(dtype)
        query = cast_linear(self.to_q, hidden_states)  # (B, S, rank)
        if self.position is not None:
            query = query + cast_linear(self.position, positions.to(dtype))
        key, value = cast_linear(self.to_k, tokens), cast_linear(self.to_v, tokens)  # (B, N, rank)
        if self.self_k is not None:
            key = torch.cat([cast_linear(self.self_k, hidden_states), key], dim=1)  # (B, S + N, rank)
            value = torch.cat([cast_linear(self.self_v, hidden_states), value], dim=1)
        query, key, value = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (query, key, value))
        scale = query.shape[-1] ** -0.5
        if self.box_bias is not None:
            query, key = self.with_bias(query, key, inside.to(dtype), scale)
        attended = F.scaled_dot_product_attention(query, key, value, scale=scale)  # (B, heads, S, head_width)
        attended = attended.transpose(1, 2).flatten(2)  # (B, S, rank)
        return torch.tanh(GATE_SPEED * self.gate).to(dtype) * cast_linear(self.to_out, attended)

    def with_bias(self, query: Tensor, key: Tensor, inside: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, heads, ..., head_width) with N more numbers each, whose product adds box_bias x inside
        to the logits of the last N keys: no attention mask, so that every fast kernel can be used."""
        batch_size, n = inside.shape[0], inside.shape[2]
        query = torch.cat([query, inside[:, None].expand(-1, self.heads, -1, -1)], dim=-1)
        own = torch.eye(n, dtype=key.dtype, device=key.device) * (self.box_bias.to(key.dtype) / scale)[:, None, None]
        own = F.pad(own, (0, 0, key.shape[2] - n, 0))  # (heads, keys, N): the picture's own keys, if any, get none
        return query, torch.cat([key, own.expand(batch_size, -1, -1, -1)], dim=-1)


class SpatialAdapter(nn.Module):
    """All that trains for drawing: grounding tokens, and one LayoutAttention for each attn2."""

    def __init__(self, cfg: AdapterConfig):
        super().__init__()
        if cfg.rank < cfg.head_width or cfg.rank % cfg.head_width:
            raise ValueError(f"adapter_rank must be a multiple of {cfg.head_width}, got {cfg.rank}")
        self.cfg = cfg
        self.grounding = GroundingTokens(cfg.phrase_width, cfg.token_width)
        self.layers = nn.ModuleDict(
            {name.replace(".", "_"): LayoutAttention(width, cfg) for name, width in cfg.widths.items()}
        )
        self.layout: Layout | None = None  # None: the UNet draws as without an adapter


class LayoutProcessor:
    """An attention processor that adds a LayoutAttention to what the processor before it gives.

    No module: the adapter holds the weights, so they are not the UNet's.
    """

    def __init__(self, inner: object, layer: LayoutAttention, adapter: SpatialAdapter):
        self.inner, self.layer, self.adapter = inner, layer, adapter

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_adapter_masks: Tensor | None = None,
    ) -> Tensor:
        masks = {} if ip_adapter_masks is None else {"ip_adapter_masks": ip_adapter_masks}
        out = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **masks)
        layout = self.adapter.layout
        if layout is None:
            return out
        pixels = hidden_states.shape[1]
        return out + self.layer(hidden_states, layout.tokens, layout.positions[pixels], layout.inside[pixels])


# ---------------------------------------------------------------- an adapter for a UNet


def cross_attentions(unet: UNet2DConditionModel) -> dict[str, Attention]:
    """Every attn2 by its name. ValueError when there is none: an adapter would change nothing."""
    found = {
        name: module
        for name, module in unet.named_modules()
        if name.endswith(".attn2") and isinstance(module, Attention)
    }
    if not found:
        raise ValueError(
            "the UNet has no cross-attention (attn2) to attach the adapter to; expected an SDXL-like UNet"
        )
    return found


def text_projection(unet: UNet2DConditionModel) -> nn.Module:
    """The frozen layer from the text encoder's width to the cross-attention's. Loading an IP-Adapter moves it to
    text_encoder_hid_proj; a UNet without one takes text as it is."""
    moved = getattr(unet, "text_encoder_hid_proj", None)
    layer = moved if moved is not None else unet.encoder_hid_proj
    return layer if isinstance(layer, nn.Linear) else nn.Identity()


def new_adapter(unet: UNet2DConditionModel, **settings: object) -> SpatialAdapter:
    """An untrained adapter of a UNet's widths, installed. settings: fields of AdapterConfig."""
    widths = {name: attention.to_q.in_features for name, attention in cross_attentions(unet).items()}
    cross_width = unet.config.cross_attention_dim
    assert isinstance(cross_width, int), f"one cross_attention_dim for all blocks is expected, got {cross_width}"
    adapter = SpatialAdapter(AdapterConfig(widths=widths, phrase_width=cross_width, **settings))
    install(adapter, unet)
    return adapter


def install(adapter: SpatialAdapter, unet: UNet2DConditionModel) -> None:
    """Wrap the processor of every attn2. ValueError when the UNet is not the one that the adapter was made for."""
    attentions = cross_attentions(unet)
    widths = {name: attention.to_q.in_features for name, attention in attentions.items()}
    if widths != adapter.cfg.widths:
        raise ValueError(
            f"the adapter is for a UNet with {len(adapter.cfg.widths)} cross-attentions of widths "
            f"{sorted(set(adapter.cfg.widths.values()))}, this one has {len(widths)} of {sorted(set(widths.values()))}"
        )
    for name, attention in attentions.items():
        inner = attention.processor
        inner = inner.inner if isinstance(inner, LayoutProcessor) else inner  # an earlier adapter goes
        attention.set_processor(LayoutProcessor(inner, adapter.layers[name.replace(".", "_")], adapter))


def gate_values(adapter: SpatialAdapter) -> dict[str, float]:
    """{name of the attn2: what its layer's output is multiplied by}, -1 to 1: 0 adds nothing."""
    gates = {name: adapter.layers[name.replace(".", "_")].gate.item() for name in adapter.cfg.widths}
    return {name: math.tanh(GATE_SPEED * gate) for name, gate in gates.items()}


def save_adapter(adapter: SpatialAdapter, folder: str | Path) -> None:
    """adapter_model.safetensors (float32) and config.json."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in adapter.state_dict().items()}
    save_file(weights, Path(folder) / WEIGHTS, metadata={"format": "pt"})
    (Path(folder) / CONFIG).write_text(json.dumps(asdict(adapter.cfg), indent=1) + "\n")


def read_config(folder: str | Path) -> AdapterConfig:
    """Of an adapter's folder or of a checkpoint, which has the same config.json."""
    return AdapterConfig(**json.loads((Path(folder) / CONFIG).read_text()))


def load_adapter(folder: str | Path, unet: UNet2DConditionModel) -> SpatialAdapter:
    """The adapter that a run exported (export/adapter), or that one of its checkpoints holds, installed in a UNet and
    on its device. ValueError when there is none, or the UNet is another."""
    folder = Path(folder)
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted((folder / "model").glob("*.safetensors"))
    if not files or not (folder / CONFIG).is_file():
        raise ValueError(
            f"no adapter in {folder}; expected {CONFIG} with {WEIGHTS} (a run's export/adapter) or with "
            "model/*.safetensors (a checkpoint of LAUNCH=single or ddp)"
        )
    adapter = SpatialAdapter(read_config(folder))
    weights = {}
    for file in files:
        with safe_open(file, "pt") as opened:  # in a checkpoint, beside the heads
            names = [name for name in opened.keys() if file.name == WEIGHTS or name.startswith("adapter.")]
            weights |= {name.removeprefix("adapter."): opened.get_tensor(name) for name in names}
    adapter.load_state_dict(weights)
    install(adapter, unet)
    return adapter.to(unet.device).eval().requires_grad_(False)


def start_adapter(
    unet: UNet2DConditionModel, folder: str | Path | None, vocabulary: Sequence[int], **settings: object
) -> SpatialAdapter:
    """The adapter to train, in float32: that of a folder, whose shape is its own, or a new one of these settings."""
    adapter = load_adapter(folder, unet) if folder else new_adapter(unet, **settings)
    adapter.cfg.vocabulary = list(vocabulary)
    return adapter.to(unet.device, torch.float32).train().requires_grad_(True)


# ---------------------------------------------------------------- phrases, layouts, drawing


@torch.no_grad()
def embed_phrases(tokenizer, text_encoder, phrases: list[str]) -> list[Tensor]:
    """(D,) float32 of each phrase: the mean over its own tokens, without the two that the tokenizer puts in front, of
    the layer of ChatGLM3 that the UNet reads prompts from (the last but one)."""
    inputs = tokenizer(phrases, padding=True, max_length=256, truncation=True, return_tensors="pt")
    inputs = inputs.to(text_encoder.device)
    states = text_encoder(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        position_ids=inputs["position_ids"],
        output_hidden_states=True,
    ).hidden_states[-2]  # (L, B, D), padded in front
    lengths = inputs["attention_mask"].sum(1) - len(tokenizer.get_prefix_tokens())  # (B,)
    return [states[len(states) - length :, index].float().mean(0) for index, length in enumerate(lengths.tolist())]


def make_layout(
    adapter: SpatialAdapter,
    unet: UNet2DConditionModel,
    phrases: Tensor,
    boxes: Tensor,
    has_phrase: Tensor,
    has_box: Tensor,
    latent_size: tuple[int, int],
) -> Layout:
    """phrases (B, N, D) as embed_phrases gives them, boxes (B, N, 4), has_phrase and has_box (B, N) bool; latent_size
    (height, width). All-false masks are the null layout."""
    with torch.no_grad():
        projection = text_projection(unet)
        weight = getattr(projection, "weight", phrases)
        projected = projection(phrases.to(weight.dtype))  # (B, N, phrase_width)
    layout = Layout(adapter.grounding(projected, boxes, has_phrase, has_box), {}, {})
    for height, width in resolutions(*latent_size, depth=len(unet.config.down_block_types) - 1):
        inside = coverage(boxes, height, width) * has_box[..., None, None]  # (B, N, height, width)
        layout.inside[height * width] = inside.flatten(2).transpose(1, 2)
        layout.positions[height * width] = pixel_positions(height, width, boxes.device)
    return layout


@torch.no_grad()
def layout_for_pipeline(
    adapter: SpatialAdapter,
    unet: UNet2DConditionModel,
    embeds: Sequence[Tensor],
    boxes: Sequence[Sequence[float]],
    latent_size: tuple[int, int],
    guided: bool,
) -> Layout:
    """The layout of one picture: embeds [(D,), ...] and boxes of its objects. guided: the pipeline's batch is
    (unconditional, conditional), and the unconditional half gets null boxes."""
    slots, device = adapter.cfg.max_objects, unet.device
    phrases = torch.zeros(1, slots, len(embeds[0]), device=device)
    places = torch.zeros(1, slots, 4, device=device)
    phrases[0, : len(embeds)] = torch.stack(list(embeds)).to(device)
    places[0, : len(boxes)] = torch.tensor(boxes, device=device)
    present = (torch.arange(slots, device=device) < len(boxes))[None]  # (1, N)
    if guided:
        phrases, places = phrases.repeat(2, 1, 1), places.repeat(2, 1, 1)
        present = torch.cat([torch.zeros_like(present), present])
    return make_layout(adapter, unet, phrases, places, present, present, latent_size)


@torch.no_grad()
def draw(
    pipeline: KolorsPipeline,
    adapter: SpatialAdapter | None,
    prompt: str,
    objects: Sequence[dict],
    tau: float = 1.0,
    guidance_scale: float = 5.0,
    **settings: object,
) -> Image.Image:
    """One picture by the unmodified pipeline. Without an adapter, or without objects, it draws as if none were there.

    objects: [{"phrase", "bbox"}], the largest max_objects of which count. tau: the adapter acts during this first
    share of the sampling steps (scheduled sampling: layout is decided early, details are the base's). settings: what
    else the pipeline's call takes (height, width, num_inference_steps, generator). ValueError for bad boxes.
    """
    check_objects(list(objects))
    if adapter is None or not objects:
        embeds, kept = [], []
    else:
        kept = largest_first(objects, adapter.cfg.max_objects)
        embeds = embed_phrases(pipeline.tokenizer, pipeline.text_encoder, [item["phrase"] for item in kept])
    boxes = [item["bbox"] for item in kept]
    call = {"prompt": prompt, "guidance_scale": guidance_scale, **settings}
    return draw_embedded(pipeline, adapter, call, embeds, boxes, tau)


@torch.no_grad()
def draw_embedded(
    pipeline: KolorsPipeline,
    adapter: SpatialAdapter | None,
    call: dict,
    embeds: Sequence[Tensor],
    boxes: Sequence[Sequence[float]],
    tau: float = 1.0,
) -> Image.Image:
    """draw, with phrases embedded already; call: all that the pipeline's call takes, guidance_scale among it."""
    if adapter is None:
        return pipeline(**call).images[0]
    if boxes and tau > 0:
        sides = [
            call.get(name) or pipeline.default_sample_size * pipeline.vae_scale_factor for name in ("height", "width")
        ]
        latent_size = sides[0] // pipeline.vae_scale_factor, sides[1] // pipeline.vae_scale_factor
        adapter.to(pipeline.unet.device)
        guided = call["guidance_scale"] > 1
        adapter.layout = layout_for_pipeline(adapter, pipeline.unet, embeds, boxes, latent_size, guided)

    def end_of_step(pipeline: KolorsPipeline, step: int, timestep: Tensor, tensors: dict) -> dict:
        if step + 1 >= tau * pipeline.num_timesteps:
            adapter.layout = None
        return tensors

    try:
        return pipeline(**call, callback_on_step_end=end_of_step).images[0]
    finally:
        adapter.layout = None

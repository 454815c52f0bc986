"""What the frozen encoders make of edits, and the cache that keeps it: targets, sources and prompts by the unmodified
pipeline's own parts, at the sizes that it gives them."""

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, DiffusionPipeline
from edits import (
    CONDITION_PIXELS,
    EMPTY,
    PIPELINES,
    EditConfig,
    Picture,
    Rows,
    Shown,
    View,
    draws,
    fit_target,
    mask_of,
    source_size,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLProcessor

from common.data import cache
from common.data.cache import EmbeddingCache, folder_fingerprint
from common.data.encoding import encode_items
from common.data.images import image_to_tensor, loss_mask
from common.data.loader import of_place
from common.data.manifest import Record
from common.data.order import Place
from common.processes import Run, on_main
from common.start import dry_run


class Encoders:
    """The frozen VAE and text encoder, loaded plainly (never sharded), used before training and then dropped."""

    def __init__(self, cfg: EditConfig, folder: Path, device: torch.device, dtype: torch.dtype):
        self.cfg, self.device = cfg, device
        self.vae = load_vae(folder, device, torch.float32, cfg.videox_fun.vae_path)
        text_encoder = (
            Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=dtype).to(device).eval()
        )
        self.pipeline = PIPELINES[cfg.train_mode](
            scheduler=None,
            vae=self.vae,
            text_encoder=text_encoder,
            tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
            processor=Qwen2VLProcessor.from_pretrained(folder / "processor"),
            transformer=None,
        )

    def shape(self, item: "Picture | Instruction") -> tuple[Hashable, int]:
        """What a batch has in common; an instruction, whose sources are among its tokens, is alone."""
        return (item.size if isinstance(item, Picture) else item), 0

    def read(self, item: "Picture | Instruction") -> dict[str, Any]:
        """pixels of a picture, or an instruction's sources."""
        if isinstance(item, Picture):
            return {"pixels": self.pixels(item)}
        folder = self.cfg.data.train_data_dir
        return {"sources": [each.load(folder) if isinstance(each, Picture) else each for each in item.sources]}

    def encode(self, items: list, read: dict[str, Any]) -> dict[str, Sequence[Tensor]]:
        """latents (B, 16, 1, H/8, W/8) of pixels (B, 3, H, W), or prompt_embeds (1, L, D) of an instruction."""
        if "pixels" in read:
            return self.latents(read["pixels"], self.cfg.flow.cache_moments)
        (instruction,), (sources,) = items, read["sources"]
        prompt_embeds = encode_prompt(self.pipeline, self.cfg.train_mode, instruction.text, sources, self.device)
        return {"prompt_embeds": prompt_embeds}

    def pixels(self, picture: Picture) -> Tensor:
        """(3, H, W) in [-1, 1]: a target at its size, or a source as the pipeline gives it to the VAE."""
        image = picture.load(self.cfg.data.train_data_dir)
        if picture.which is None:
            return image_to_tensor(fit_target(self.cfg, image, picture.size))
        width, height = picture.size
        if self.cfg.train_mode == "qwen_image_edit":
            image = self.pipeline.image_processor.resize(image, height, width)
        return self.pipeline.image_processor.preprocess(image, height, width)[0]

    @torch.no_grad()
    def latents(self, pixels: Tensor, moments: bool) -> dict[str, Tensor]:
        """pixels (B, 3, H, W) in [-1, 1] -> latents (B, 16, 1, H/8, W/8), normalised per channel; with moments also
        the posterior's std."""
        posterior = self.vae.encode(pixels[:, :, None].to(self.device)).latent_dist
        mean, std = latent_statistics(self.vae)
        encoded = {"latents": (posterior.mode() - mean) / std}
        return encoded | ({"posterior_std": posterior.std / std} if moments else {})


@torch.no_grad()
def encode_prompt(
    pipeline: DiffusionPipeline, train_mode: str, text: str, sources: list[Image.Image], device: torch.device
) -> Tensor:
    """(1, L, D): the instruction and the sources in the pipeline's own template, at the size that the pipeline gives
    the text encoder, its 64 template tokens dropped, unpadded."""
    sizes = [source_size(image.size, CONDITION_PIXELS[train_mode]) for image in sources]  # (width, height)
    images = [
        pipeline.image_processor.resize(image, height, width)
        for image, (width, height) in zip(sources, sizes, strict=True)
    ]
    return pipeline.encode_prompt(
        prompt=[text], image=images if train_mode == "qwen_image_edit_plus" else images[0], device=device
    )[0]


def load_vae(
    folder: str | Path, device: torch.device, dtype: torch.dtype, vae_path: str | None = None
) -> AutoencoderKLQwenImage:
    """The model's VAE, the one in the folder vae_path, or the model's with the weights in the file vae_path."""
    if vae_path and not Path(vae_path).is_file():
        if not (Path(vae_path) / "config.json").is_file():
            raise ValueError(f"vae_path {vae_path} is no file and has no config.json; give a folder vae/, say")
        vae = AutoencoderKLQwenImage.from_pretrained(vae_path, dtype=dtype)
    else:
        vae = AutoencoderKLQwenImage.from_pretrained(folder, subfolder="vae", dtype=dtype)
    if vae_path and Path(vae_path).is_file():
        weights = load_file(vae_path)
        if odd := sorted(weights.keys() ^ vae.state_dict().keys()):
            raise ValueError(f"vae_path {vae_path} does not fit the model's VAE: {len(odd)} names, {odd[0]} for one")
        vae.load_state_dict(weights)
    return vae.to(device).eval().requires_grad_(False)


def vae_fingerprint(vae_path: str | None) -> dict[str, str]:
    """Of the other VAE, if there is one."""
    if vae_path is None:
        return {}
    path = Path(vae_path)
    return {"vae": hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else folder_fingerprint(path)}


def latent_statistics(vae: AutoencoderKLQwenImage) -> tuple[Tensor, Tensor]:
    """(latents_mean, latents_std), each (1, 16, 1, 1, 1): normalised latents are (latents - mean) / std."""
    mean, std = (
        torch.tensor(values, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def open_cache(cfg: EditConfig, run: Run, folder: Path) -> EmbeddingCache:
    """The embedding cache, with everything but the row that encoded tensors depend on."""
    return cache.open_cache(
        run,
        cfg.pictures.cache_dir,
        cfg.run.output_dir,
        folder,
        ("vae", "text_encoder", "tokenizer", "processor"),
        train_mode=cfg.train_mode,
        latents="moments" if cfg.flow.cache_moments else "mode",
        target="whole" if cfg.enable_bucket else "cut",
        precision=cfg.precision.mixed_precision,
        **on_main(run, vae_fingerprint, cfg.videox_fun.vae_path),
    )


# ---- the cache's entries


def seen(view: View) -> dict[str, int]:
    return {"frame": view.frame} | ({"flip": 1} if view.flip else {})


def target_key(embeddings: EmbeddingCache, record: Record, view: View) -> str:
    return embeddings.key(record, view.size, part="target", **seen(view))


def source_key(embeddings: EmbeddingCache, record: Record, view: View, which: int) -> str:
    return embeddings.key(record, None, part=f"source {which}", **seen(view))


def prompt_key(embeddings: EmbeddingCache, record: Record, view: View, empty: bool) -> str:
    if view.caption and not empty:
        record = replace(record, text=record.captions[view.caption])
    return embeddings.key(record, None, part="empty prompt" if empty else "prompt", **seen(view))


def load_view(
    cfg: EditConfig, embeddings: EmbeddingCache, record: Record, view: View, empty: bool
) -> dict[str, Tensor]:
    """latents (and posterior_std) of the target, source_0, source_1, ..., prompt_embeds, and loss_mask, if any."""
    tensors = {
        **embeddings[target_key(embeddings, record, view)],
        **embeddings[prompt_key(embeddings, record, view, empty)],
    }
    for which in range(len(record.source_file_path)):
        tensors[f"source_{which}"] = embeddings[source_key(embeddings, record, view, which)]["latents"]
    if cfg.flow.mask_column:
        tensors["loss_mask"] = loss_mask(mask_of(cfg, record, view), tensors["latents"])
    return tensors


class EncodedEdits(Dataset):
    """Samples for MicroBatchSampler. The prompt is the empty one where caption_dropout falls on the place."""

    def __init__(self, cfg: EditConfig, rows: Rows, embeddings: EmbeddingCache):
        self.cfg, self.rows, self.embeddings = cfg, rows, embeddings

    def __len__(self) -> int:
        return len(self.rows.records)

    def __getitem__(self, place: Place) -> dict:
        record = self.rows.records[place.sample]
        view = self.rows.view(self.cfg, place.sample, place.step, place.epoch)
        _, _, dropped = draws(self.cfg, place.step, [place.position], len(place.group))
        return {**load_view(self.cfg, self.embeddings, record, view, bool(dropped[0])), **of_place(place)}


# ---- encoding


@dataclass(eq=False)
class Instruction:
    """A prompt to encode, and the sources that are in it."""

    text: str
    sources: list[Picture] | list[Image.Image]


def what_to_encode(
    cfg: EditConfig, embeddings: EmbeddingCache, parts: list[tuple[Rows, set[View]]], shown: list[Shown]
) -> dict[str, Picture | Instruction]:
    """By cache key: targets, sources and prompts of rows as they will be seen, and the prompts that validation draws.
    The empty prompt has the sources in it, so that every row has its own."""
    pictures, prompts = {}, {}
    for rows, views in parts:
        for view in sorted(views):
            record = rows.records[view.row]
            caption = record.captions[view.caption]
            sizes = [source_size(size) for size in record.source_sizes]
            sources = [Picture(size, record, which, view.frame, view.flip) for which, size in enumerate(sizes)]
            pictures[target_key(embeddings, record, view)] = Picture(view.size, record, None, view.frame, view.flip)
            pictures |= {source_key(embeddings, record, view, source.which): source for source in sources}
            prompts[prompt_key(embeddings, record, view, empty=False)] = Instruction(caption, sources)
            if cfg.pictures.caption_dropout:
                prompts[prompt_key(embeddings, record, view, empty=True)] = Instruction(EMPTY, sources)
    for edit in shown:
        prompts[edit.key(embeddings, empty=False)] = Instruction(edit.text, edit.sources)
        prompts[edit.key(embeddings, empty=True)] = Instruction(EMPTY, edit.sources)
    return {**pictures, **prompts}


def encode_missing(
    cfg: EditConfig, run: Run, folder: Path, embeddings: EmbeddingCache, wanted: dict[str, Picture | Instruction]
) -> None:
    """Add what the cache lacks of pictures and instructions. Every process calls it, and finds afterwards what all
    have added."""

    def encode(items: dict[str, Picture | Instruction]) -> None:
        encoders = Encoders(cfg, folder, run.device, run.compute_dtype)
        encode_items(run, embeddings, items, encoders, cfg.pictures)

    cache.encode_missing(run, embeddings, wanted, encode)


# ---- a dry run


def sample_to_look_at(cfg: EditConfig, folder: Path, data: EncodedEdits, place: Place) -> dry_run.Sample:
    """A row as the step at `place` sees it: target and sources, and the instruction with its sources as the text
    encoder sees it."""
    record = data.rows.records[place.sample]
    view = data.rows.view(cfg, place.sample, place.step, place.epoch)
    target = Picture(view.size, record, None, view.frame, view.flip).load(cfg.data.train_data_dir)
    how = (", mirrored" if view.flip else "") + (f", frame {view.frame}" if record.type == "video" else "")
    sizes = dry_run.size_of(target), f"{view.size[0]} x {view.size[1]}{how}"
    pictures = {f"target, {sizes[0]} -> {sizes[1]}": fit_target(cfg, target, view.size)}
    sources = []
    for which, size in enumerate(map(source_size, record.source_sizes)):
        sources.append(Picture(size, record, which, view.frame, view.flip).load(cfg.data.train_data_dir))
        pictures[f"source {which + 1}, {dry_run.size_of(sources[-1])} -> {size[0]} x {size[1]}{how}"] = sources[-1]
    if cfg.flow.mask_column:
        pictures[cfg.flow.mask_column] = mask_of(cfg, record, view)
    _, _, dropped = draws(cfg, place.step, [place.position], len(place.group))
    caption = record.captions[view.caption]
    text = EMPTY if dropped[0] else caption
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    processor = Qwen2VLProcessor.from_pretrained(folder / "processor")
    pipeline = dry_run.reading(PIPELINES[cfg.train_mode], tokenizer=tokenizer, processor=processor)
    said = dry_run.prompt_seen(tokenizer, partial(encode_prompt, pipeline, cfg.train_mode, text, sources))
    title = f"{record.file_path} ({record.where})" + (", its caption dropped in this step" if dropped[0] else "")
    return dry_run.Sample(title, pictures, said, caption)

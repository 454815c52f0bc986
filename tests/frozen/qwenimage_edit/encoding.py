"""What the frozen encoders make of edits, and the cache that keeps it: targets, sources and prompts by the unmodified
pipeline's own parts, at the sizes that it gives them."""

import dataclasses
import gc
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage
from edits import CONDITION_PIXELS, EMPTY, PIPELINES, Picture, Rows, Shown, View, draws, fit_target, source_size
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLProcessor

from common.cache import EmbeddingCache
from common.data import Place
from common.folders import folder_fingerprint
from common.images import image_to_tensor
from common.manifest import Record
from common.runtime import Run, on_main


class Encoders:
    """The frozen VAE and text encoder, loaded plainly (never sharded), used before training and then dropped."""

    def __init__(self, cfg, folder: Path, device: torch.device):
        self.cfg, self.device = cfg, device
        dtype = torch.bfloat16 if cfg.mixed_precision == "bf16" else torch.float32
        self.vae = load_vae(folder, device, torch.float32)
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

    @torch.no_grad()
    def prompt(self, text: str, sources: list[Image.Image]) -> dict[str, Tensor]:
        """prompt_embeds (L, D): the instruction and the sources in the pipeline's own template, at the size that the
        pipeline gives the text encoder, its 64 template tokens dropped, unpadded."""
        sizes = [
            source_size(image.size, CONDITION_PIXELS[self.cfg.train_mode]) for image in sources
        ]  # (width, height)
        images = [
            self.pipeline.image_processor.resize(image, height, width)
            for image, (width, height) in zip(sources, sizes, strict=True)
        ]
        prompt_embeds, _ = self.pipeline.encode_prompt(
            prompt=[text],
            image=images if self.cfg.train_mode == "qwen_image_edit_plus" else images[0],
            device=self.device,
        )
        return {"prompt_embeds": prompt_embeds[0].cpu()}

    def pixels(self, picture: Picture, train_data_dir: str) -> Tensor:
        """(3, H, W) in [-1, 1]: a target at its size, or a source as the pipeline gives it to the VAE."""
        image = picture.load(train_data_dir)
        if picture.which is None:
            return image_to_tensor(fit_target(self.cfg, image, picture.size))
        width, height = picture.size
        if self.cfg.train_mode == "qwen_image_edit":
            image = self.pipeline.image_processor.resize(image, height, width)
        return self.pipeline.image_processor.preprocess(image, height, width)[0]

    @torch.no_grad()
    def latents(self, pixels: list[Tensor], moments: bool) -> list[dict[str, Tensor]]:
        """Pictures (3, H, W) of one size in [-1, 1] -> latents (16, 1, H/8, W/8) of each, normalised per channel; with
        moments also the posterior's std."""
        posterior = self.vae.encode(torch.stack(pixels)[:, :, None].to(self.device)).latent_dist
        mean, std = latent_statistics(self.vae)
        encoded = {"latents": (posterior.mode() - mean) / std}  # (N, 16, 1, H/8, W/8)
        encoded |= {"posterior_std": posterior.std / std} if moments else {}
        return [{name: values[index].cpu() for name, values in encoded.items()} for index in range(len(pixels))]


def load_vae(folder: Path, device: torch.device, dtype: torch.dtype) -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage.from_pretrained(folder / "vae", dtype=dtype).to(device).eval().requires_grad_(False)


def latent_statistics(vae: AutoencoderKLQwenImage) -> tuple[Tensor, Tensor]:
    """(latents_mean, latents_std), each (1, 16, 1, 1, 1): normalised latents are (latents - mean) / std."""
    mean, std = (
        torch.tensor(values, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def open_cache(cfg, run: Run, folder: Path) -> EmbeddingCache:
    """The embedding cache, with everything but the row that encoded tensors depend on."""
    parts = ("vae", "text_encoder", "tokenizer", "processor")
    fingerprint = {
        "model": on_main(run, lambda: {part: folder_fingerprint(folder / part) for part in parts}),
        "train_mode": cfg.train_mode,
        "latents": "moments" if cfg.cache_moments else "mode",
        "target": "whole" if cfg.enable_bucket else "cut",
        "precision": cfg.mixed_precision,
    }
    return EmbeddingCache(cfg.cache_dir or Path(cfg.output_dir) / "embedding_cache", fingerprint, run.rank)


# ---- the cache's entries


def target_key(cache: EmbeddingCache, record: Record, view: View) -> str:
    return cache.key(record, view.size, part="target", frame=view.frame)


def source_key(cache: EmbeddingCache, record: Record, view: View, which: int) -> str:
    return cache.key(record, None, part=f"source {which}", frame=view.frame)


def prompt_key(cache: EmbeddingCache, record: Record, view: View, empty: bool) -> str:
    return cache.key(record, None, part="empty prompt" if empty else "prompt", frame=view.frame)


def load_view(cache: EmbeddingCache, record: Record, view: View, empty: bool) -> dict[str, Tensor]:
    """latents (and posterior_std) of the target, source_0, source_1, ..., prompt_embeds."""
    tensors = {**cache[target_key(cache, record, view)], **cache[prompt_key(cache, record, view, empty)]}
    for which in range(len(record.source_file_path)):
        tensors[f"source_{which}"] = cache[source_key(cache, record, view, which)]["latents"]
    return tensors


class EncodedEdits(Dataset):
    """Samples for MicroBatchSampler. The prompt is the empty one where caption_dropout falls on the place."""

    def __init__(self, cfg, rows: Rows, cache: EmbeddingCache):
        self.cfg, self.rows, self.cache = cfg, rows, cache

    def __len__(self) -> int:
        return len(self.rows.records)

    def __getitem__(self, place: Place) -> dict:
        record = self.rows.records[place.sample]
        view = self.rows.view(self.cfg, place.sample, place.step, place.epoch)
        _, _, dropped = draws(self.cfg, place.step, [place.position], len(place.group))
        tensors = load_view(self.cache, record, view, bool(dropped[0]))
        return {**tensors, "step": place.step, "position": place.position, "group_size": len(place.group)}


# ---- encoding


@dataclass
class ToEncode:
    """What encoders are asked for, by cache key."""

    pictures: dict[str, Picture] = dataclasses.field(default_factory=dict)
    prompts: dict[str, tuple[str, list[Picture] | list[Image.Image]]] = dataclasses.field(default_factory=dict)
    """(instruction, its sources)"""


def what_to_encode(cfg, cache: EmbeddingCache, parts: list[tuple[Rows, set[View]]], shown: list[Shown]) -> ToEncode:
    """Targets, sources and prompts of rows as they will be seen, and the prompts that validation draws. The empty
    prompt has the sources in it, so that every row has its own."""
    wanted = ToEncode()
    for rows, views in parts:
        for view in sorted(views):
            record = rows.records[view.row]
            sizes = [source_size(size) for size in record.source_sizes]
            sources = [Picture(size, record, which, view.frame) for which, size in enumerate(sizes)]
            wanted.pictures[target_key(cache, record, view)] = Picture(view.size, record, None, view.frame)
            wanted.pictures |= {source_key(cache, record, view, source.which): source for source in sources}
            wanted.prompts[prompt_key(cache, record, view, empty=False)] = record.text, sources
            if cfg.caption_dropout:
                wanted.prompts[prompt_key(cache, record, view, empty=True)] = EMPTY, sources
    for edit in shown:
        wanted.prompts[edit.key(cache, empty=False)] = edit.text, edit.sources
        wanted.prompts[edit.key(cache, empty=True)] = EMPTY, edit.sources
    return wanted


def batches_of_one_size(pictures: dict[str, Picture], batch_size: int) -> list[list[list[str]]]:
    """Batches of at most batch_size pictures of one size; for each picture the keys that ask for it. Rows that share a
    source ask for the same one."""
    keys_of = defaultdict(list)
    for key, picture in pictures.items():
        keys_of[picture.identity()].append(key)
    by_size = defaultdict(list)
    for keys in keys_of.values():
        by_size[pictures[keys[0]].size].append(keys)
    return [same[at : at + batch_size] for same in by_size.values() for at in range(0, len(same), batch_size)]


def encode(cfg, run: Run, folder: Path, cache: EmbeddingCache, wanted: ToEncode) -> None:
    """Encode what the cache lacks, each process its share; encoders leave memory."""
    missing = on_main(run, cache.missing, [*wanted.pictures, *wanted.prompts])
    if missing:
        encoders = Encoders(cfg, folder, run.device)
        pictures = {key: wanted.pictures[key] for key in missing if key in wanted.pictures}
        batches = batches_of_one_size(pictures, cfg.vae_mini_batch)
        for batch in run.progress(batches[run.rank :: run.world_size], "encode pictures"):
            pixels = [encoders.pixels(pictures[keys[0]], cfg.train_data_dir) for keys in batch]
            for keys, tensors in zip(batch, encoders.latents(pixels, cfg.cache_moments), strict=True):
                for key in keys:
                    cache.add(key, tensors)
        prompts = [key for key in missing if key in wanted.prompts]
        for key in run.progress(prompts[run.rank :: run.world_size], "encode instructions"):
            text, sources = wanted.prompts[key]
            images = [each.load(cfg.train_data_dir) if isinstance(each, Picture) else each for each in sources]
            cache.add(key, encoders.prompt(text, images))
        del encoders
        gc.collect()
        torch.cuda.empty_cache()
    cache.flush()
    run.barrier()
    cache.reload()

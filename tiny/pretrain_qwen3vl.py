"""Pretrains the base of the tiny Qwen3-VL (minutes on a GPU, an hour on a CPU core).

    python tiny/pretrain_qwen3vl.py [--weights FILE] [--scale 0.001]

It learns to answer simple questions about drawn faces and shapes, and to repeat sentences. The weights go to the
recipe's tiny_weights.safetensors.
"""

import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from multiprocessing import Pool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

from tiny import building, pretraining, shapes

make_tiny = pretraining.load_make_tiny("qwen3vl_qlora")
faces, generate_data, object_pool = make_tiny.faces, make_tiny.generate_data, make_tiny.object_pool
SIZE, SEED = make_tiny.SIZE, make_tiny.SEED


# ---- rows ----


def sentences(connectors: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Descriptions of nobody, with and without connectors, and the short answers of the other tasks."""
    while True:
        work, first, second = (
            rng.choice(names) for names in (generate_data.WORKS, generate_data.FIRST, generate_data.SECOND)
        )
        connector, answer = rng.choice(connectors), rng.choice(("Correct", "Wrong", "A", "B", "C", "D"))
        text = f"{work} {first} {second}"
        yield rng.choice((text, text, f"{text} {connector}", f"{connector} {text}", answer))


def draw(job: tuple) -> Image.Image:
    """One picture of a face or of an object's (colour, shape, place, background), from a seed."""
    what, seed = job
    rng = random.Random(f"pretraining {seed}")
    is_face = isinstance(what, faces.Face)
    return faces.draw_face(what, SIZE, rng) if is_face else object_pool.draw_object(what, SIZE, rng)


def pretraining_rows(n_faces: int, n_objects: int, n_sentences: int) -> tuple[list[tuple], list[tuple[int, str, str]]]:
    """(what to draw, [(picture's number or -1, question, answer)]): faces and objects that are in no split of the tiny
    retention pools, and sentences to repeat, half of them beside a picture."""
    rng = random.Random(SEED)
    taken = set(faces.choose_pool_faces(make_tiny.POOL_FACES, 0))
    free = [face for face in faces.all_faces(for_entities=False) if face not in taken]
    scenes = list(itertools.product(shapes.COLOURS, shapes.SHAPES, shapes.PLACES, shapes.BACKGROUNDS))
    taken = set(
        random.Random(0).sample(scenes, make_tiny.POOL_OBJECTS)
    )  # as generate_object_retention_pool.py draws them
    jobs, rows = [], []
    for face in rng.sample(free, n_faces):
        rows += [(len(jobs), *pair) for pair in make_tiny.face_questions(face)]
        jobs.append((face, len(jobs)))
    for scene in rng.choices([scene for scene in scenes if scene not in taken], k=n_objects):
        rows += [(len(jobs), *pair) for pair in zip(object_pool.QUESTIONS, scene[:3], strict=True)]
        jobs.append((scene, len(jobs)))
    for text, _ in zip(sentences(make_tiny.face_config().connectors, rng), range(n_sentences), strict=False):
        rows.append((rng.choice((-1, rng.randrange(len(jobs)))), f"Repeat: {text}", text))
    return jobs, rows


def encode(rows: Sequence[tuple[int, str, str]], processor: Qwen3VLProcessor) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids and labels (N, L), padded on the right, and each row's picture (N,); -100 where there is no label."""
    tokenizer, length = processor.tokenizer, (SIZE // 32) ** 2
    encoded = []
    for picture, question, answer in rows:
        row = generate_data.make_row("", [Path("")] * (picture >= 0) + [question], answer)
        text = processor.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * length)).input_ids
        encoded.append((prompt, tokenizer(f"{answer}<|im_end|>").input_ids))
    longest = max(len(prompt) + len(answer) for prompt, answer in encoded)
    input_ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full_like(input_ids, -100)
    for i, (prompt, answer) in enumerate(encoded):
        input_ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return input_ids, labels, torch.tensor([picture for picture, _, _ in rows])


# ---- training ----


def attend_in_batches(model: Qwen3VLForConditionalGeneration) -> None:
    """For training: the vision tower attends picture by picture in a loop; pictures of one size go in one call."""
    patches = (SIZE // 16) ** 2

    def forward(attention, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_) -> Tensor:
        heads = attention.qkv(hidden_states).unflatten(-1, (3, attention.num_heads, -1))  # (N * patches, 3, heads, D)
        query, key, value = heads.unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        split = [x.unflatten(0, (-1, patches)).transpose(1, 2) for x in (query, key, value)]  # (N, heads, patches, D)
        return attention.proj(scaled_dot_product_attention(*split).transpose(1, 2).reshape(hidden_states.shape))

    for block in model.model.visual.blocks:
        block.attn.forward = forward.__get__(block.attn)


def positions(model: Qwen3VLForConditionalGeneration, input_ids: Tensor) -> Tensor:
    """(3, N, L) rotary positions. The model would find them row by row in a loop; rows whose picture stands at the
    same place share them (what they say of the padding behind a row does not matter)."""
    is_image = input_ids == model.config.image_token_id
    kinds, kind = is_image.unique(dim=0, return_inverse=True)  # (K, L), (N,)
    grid = torch.tensor([[1, SIZE // 16, SIZE // 16]] * len(kinds))
    return model.model.get_rope_index(torch.zeros_like(kinds, dtype=torch.long), kinds.int(), grid)[0][:, kind]


def loss_of(
    model: Qwen3VLForConditionalGeneration,
    input_ids: Tensor,
    labels: Tensor,
    pixels: Tensor,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Mean token loss; pixels (pictures * patches, 1536), in the rows' order; position_ids (3, N, L) if known."""
    image = model.config.image_token_id
    side = SIZE // 16
    grid = torch.tensor([[1, side, side]] * (len(pixels) // side**2), device=pixels.device)
    logits = model(
        input_ids=input_ids,
        attention_mask=(input_ids != model.config.text_config.pad_token_id).long(),
        mm_token_type_ids=(input_ids == image).int(),
        position_ids=position_ids,
        pixel_values=pixels if len(pixels) else None,
        image_grid_thw=grid if len(pixels) else None,
    ).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def tensors_of(
    processor: Qwen3VLProcessor, jobs: Sequence[tuple], rows: Sequence[tuple[int, str, str]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pictures (N, 36, 1536) in float16, drawn on all cores, and the rows as encode gives them."""
    with Pool() as pool:
        pictures = pool.map(draw, jobs, chunksize=16)
    chunks = [pictures[start : start + 256] for start in range(0, len(pictures), 256)]
    pixels = torch.cat([processor.image_processor(some, return_tensors="pt")["pixel_values"] for some in chunks])
    return pixels.unflatten(0, (len(pictures), -1)).half(), *encode(rows, processor)


def save_weights(model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, path: Path) -> None:
    """float16, without lm_head, which is the embedding."""
    tensors = {name: tensor.half().cpu() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    building.save_small(tensors, path, metadata={"vocabulary": make_tiny.vocabulary_digest(processor)})


def pretrain(path: Path, scale: float = 1.0) -> None:
    """Trains everything and writes the weights; `scale` shrinks the work for a trial."""
    device = pretraining.seeded_device()
    batch_size, steps = (256, int(3000 * scale)) if device == "cuda" else (32, int(24000 * scale))
    jobs, rows = pretraining_rows(int(6000 * scale), int(4000 * scale), int(20000 * scale))
    processor = make_tiny.build_processor()
    pixels, input_ids, labels, numbers = tensors_of(processor, jobs, rows)
    print(f"{len(jobs)} pictures, {len(rows)} rows, {steps} steps of {batch_size} on {device}", flush=True)
    model = make_tiny.build_model(processor, weights=None).train()
    position_ids = positions(model, input_ids)
    tensors = (pixels, input_ids, labels, numbers, position_ids, model)
    pixels, input_ids, labels, numbers, position_ids, model = (each.to(device) for each in tensors)
    attend_in_batches(model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, betas=(0.9, 0.98))
    for step, drawn in pretraining.batches(len(rows), batch_size, steps, device):
        seen = numbers[drawn]
        pictures_seen = pixels[seen[seen >= 0]].flatten(0, 1).float()
        loss = loss_of(model, input_ids[drawn], labels[drawn], pictures_seen, position_ids[:, drawn])
        pretraining.update(optimizer, loss, pretraining.cosine(step, steps, 2e-3, warmup=200))
        if step % 100 == 0 or step == steps - 1:
            print(f"{step}/{steps} loss {loss.item():.4f}", flush=True)
    save_weights(model, processor, path)


if __name__ == "__main__":
    args = pretraining.parser_of(__doc__, make_tiny.WEIGHTS).parse_args()
    pretrain(args.weights, args.scale)

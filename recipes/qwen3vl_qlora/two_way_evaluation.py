"""Asks the trained model and the untrained base in both directions, and writes down how far each got: what
evaluate.py and the end of a training run start.

forward             generated, then normalised exact match; log-probability of the true answer and of others' answers
reverse             "Correct" against "Wrong" by log-odds; what is said in words is counted beside it
choice_*            log-probability of A to D with the options rotated through all four places
*_retention         generated, then normalised exact match
"""

import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from answer_scoring import ABLATIONS, SCORES, choose_controls, rotate_options
from conversations import pool_folder
from evaluation_report import write_examples, write_plots, write_table
from peft import PeftModel
from qa_rows import LETTERS, read_rows
from quantized_base import load_base, prepare_base
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3VLProcessor

from common.data.images import decode_image
from common.progress import progress_bar
from common.start.launch import COMPUTE_DTYPES

ENTITY_TASKS = ("forward", "reverse", "choice_description", "choice_image")
RETENTION_TASKS = ("face_retention", "object_retention")


@dataclass
class Evaluation:
    """What to ask, and of which model. What is None is read from the run's config.yaml beside the adapter's folder
    (fill_in). evaluate.py's flags have the same names, and say what each is."""

    model_path: Path
    base_model: str | None = None
    data_dir: str | None = None
    face_retention_pool: str | None = None
    object_retention_pool: str | None = None
    task: str = "all"
    split: str = "test"
    output_dir: Path | None = None
    save_examples: int = 10
    device_map: str = "auto"
    precision: str | None = None
    quantization: str | None = None
    batch_size: int = 8
    max_new_tokens: int = 48
    min_pixels: int | None = None
    max_pixels: int | None = None
    num_controls: int = 8
    ablations: bool = True
    seed: int = 0
    alone: bool = False  # this process does everything, whatever launched it

    def fill_in(self) -> None:
        """What was not given, from the run, then from the adapter's own config. ValueError where model_path is no
        adapter."""
        adapter = self.model_path / "adapter_config.json"
        if not adapter.is_file():
            raise ValueError(f"model_path {self.model_path} has no adapter_config.json; give a run's best/ or final/")
        config = self.model_path.parent / "config.yaml"
        run = yaml.safe_load(config.read_text()) if config.is_file() else {}
        self.base_model = self.base_model or run.get("pretrained_model_name_or_path")
        self.base_model = self.base_model or json.loads(adapter.read_text())["base_model_name_or_path"]
        self.data_dir = self.data_dir or run.get("train_data_dir")
        for name in ("face_retention_pool", "object_retention_pool"):
            setattr(self, name, pool_folder(getattr(self, name) or run.get(name), self.data_dir))
        self.min_pixels = self.min_pixels or run.get("min_pixels")
        self.max_pixels = self.max_pixels or run.get("max_pixels")
        self.precision = self.precision or run.get("mixed_precision", "fp16")
        self.quantization = self.quantization or run.get("quantization", "nf4")
        name = "evaluation" if self.model_path.name == "best" else f"evaluation_{self.model_path.name}"
        self.output_dir = self.output_dir or self.model_path.parent / name
        if not run:
            print(
                f"no config.yaml beside {self.model_path}: precision {self.precision}, "
                f"quantization {self.quantization}"
            )


# ---------------------------------------------------------------- the model


@dataclass
class VisionLanguageModel:
    """A model with its adapter, and what turns rows into its inputs. Rows name their pictures by full paths."""

    model: torch.nn.Module
    processor: Qwen3VLProcessor
    dtype: torch.dtype  # to compute in; float32 is used throughout, the others under autocast as in training
    batch_size: int
    max_new_tokens: int

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def untrained(self) -> contextlib.AbstractContextManager:
        """Inside the block the adapter is off."""
        return self.model.disable_adapter()

    def inputs(self, rows: Sequence[dict], answers: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
        """Each row's question up to the assistant's turn, then its answer's tokens; padded on the left, so that all
        answers end together. Token tensors are (B, L)."""
        template = self.processor.apply_chat_template
        texts = [template(row["messages"][:-1], tokenize=False, add_generation_prompt=True) for row in rows]
        images = [decode_image(Path(name).read_bytes()) for row in rows for name in row["images"]]
        batch = self.processor(text=texts, images=images or None, padding=True, return_tensors="pt")
        real = batch["attention_mask"].bool()  # wherever the processor put its padding

        def extended(name: str, tails: Sequence[Sequence[int]], padding: int) -> Tensor:
            heads = [row[mask] for row, mask in zip(batch[name], real, strict=True)]
            whole = [torch.cat([head, head.new_tensor(tail)]) for head, tail in zip(heads, tails, strict=True)]
            return pad_sequence(whole, batch_first=True, padding_value=padding, padding_side="left")

        result = {
            "input_ids": extended("input_ids", answers, self.processor.tokenizer.pad_token_id),
            "attention_mask": extended("attention_mask", [[1] * len(ids) for ids in answers], 0),
            "mm_token_type_ids": extended("mm_token_type_ids", [[0] * len(ids) for ids in answers], 0),
            **{name: batch[name] for name in ("pixel_values", "image_grid_thw") if name in batch},
        }
        return {name: value.to(self.model.device) for name, value in result.items()}

    def tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.processor.tokenizer(text, add_special_tokens=False).input_ids)

    @torch.no_grad()
    def generate(self, rows: Sequence[dict]) -> list[str]:
        """Greedy answers, without special tokens."""
        said = []
        for some in progress_bar(list(batches(rows, self.batch_size)), "evaluate", unit="batches"):
            inputs = self.inputs(some, [()] * len(some))
            greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            with self.autocast():
                output = self.model.generate(**inputs, **greedy, max_new_tokens=self.max_new_tokens)  # (B, L + new)
            new = output[:, inputs["input_ids"].shape[1] :]
            said += self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in said]

    @torch.no_grad()
    def log_probs(self, rows: Sequence[dict], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        """For each row the log-probability of each of its candidate answers: the sum over its tokens in nats, without
        the end of the turn.

        Candidates that differ in their last token only, as single letters do, share one forward.
        """
        tokens = [[self.tokens(text) for text in texts] for texts in candidates]
        wanted: dict[tuple[int, tuple[int, ...]], set[tuple[int, ...]]] = {}
        for row, row_tokens in enumerate(tokens):
            for ids in row_tokens:
                wanted.setdefault((row, ids[:-1]), set()).add(ids)
        found: dict[tuple[int, tuple[int, ...]], float] = {}
        for contexts in batches(list(wanted), self.batch_size):
            inputs = self.inputs([rows[row] for row, _ in contexts], [context for _, context in contexts])
            kept = 1 + max(len(context) for _, context in contexts)
            with self.autocast():
                logits = self.model(**inputs, logits_to_keep=kept, use_cache=False).logits  # (B, kept, vocabulary)
            for place, (row, context) in enumerate(contexts):
                log_p = logits[place, kept - 1 - len(context) :].float().log_softmax(-1).cpu()  # (answer, vocabulary)
                for ids in wanted[row, context]:
                    found[row, ids] = log_p.gather(1, torch.tensor(ids)[:, None]).sum().item()
        return [[found[row, ids] for ids in row_tokens] for row, row_tokens in enumerate(tokens)]


def batches(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[start : start + size] for start in range(0, len(items), size))


def load_model(args: Evaluation) -> VisionLanguageModel:
    """Base and adapter as the run trained them, unless told otherwise: precision, quantisation, float32 norms, pixel
    limits."""
    if not torch.cuda.is_available():
        device_map = "cpu"
    elif "LOCAL_RANK" in os.environ:
        device_map = int(os.environ["LOCAL_RANK"])  # others may hold the other GPUs
    else:
        device_map = args.device_map
    base = load_base(args.base_model, COMPUTE_DTYPES[args.precision], device_map, args.quantization)
    prepare_base(base)
    saved_with_adapter = (args.model_path / "processor_config.json").is_file()
    processor = Qwen3VLProcessor.from_pretrained(args.model_path if saved_with_adapter else args.base_model)
    size = processor.image_processor.size
    shortest, longest = args.min_pixels or size["shortest_edge"], args.max_pixels or size["longest_edge"]
    processor.image_processor.size = {"shortest_edge": shortest, "longest_edge": longest}  # of the picture, in pixels
    model = PeftModel.from_pretrained(base, args.model_path).eval()
    return VisionLanguageModel(model, processor, COMPUTE_DTYPES[args.precision], args.batch_size, args.max_new_tokens)


# ---------------------------------------------------------------- asking


def ask(
    model: VisionLanguageModel,
    task: str,
    rows: list[dict],
    controls: dict[str, list[str]],
    change: Callable[[dict], dict] | None = None,
) -> list[dict]:
    """One answer a row: what scoring.py scores. `change` (an ablation) changes the questions, and what is not needed
    to score it is left out. controls: {entity: descriptions of others}."""
    if task in ("choice_description", "choice_image"):
        rotated = [rotate_options(row, k) for row in rows for k in range(len(LETTERS))]
        rotated = [change(row) for row in rotated] if change else rotated
        letters = model.log_probs(rotated, [LETTERS] * len(rotated))
        return [{"letter_log_probs": list(turns)} for turns in batches(letters, len(LETTERS))]
    questions = [change(row) for row in rows] if change else rows
    if task == "reverse":
        pairs = model.log_probs(questions, [("Correct", "Wrong")] * len(rows))
        answers = [{"log_odds": correct - wrong} for correct, wrong in pairs]
        if change:
            return answers
        return [a | {"prediction": text} for a, text in zip(answers, model.generate(rows), strict=True)]
    answers = [{"prediction": text} for text in model.generate(questions)]
    if change:
        return answers
    log_probs = model.log_probs(rows, [[row["answer"], *controls.get(row["entity"], [])] for row in rows])
    known = [{"log_prob": true, "control_log_probs": others} for true, *others in log_probs]
    return [answer | more for answer, more in zip(answers, known, strict=True)]


def ask_all(
    model: VisionLanguageModel, data: dict[str, list[dict]], args: Evaluation
) -> dict[str, dict[str, list[dict]]]:
    """{task: {"trained": answers, "base": answers, and one for each ablation}}, on every process all of them."""
    answers: dict[str, dict[str, list[dict]]] = {}
    for task, rows in data.items():
        about = {row["entity"]: row["description"] for row in rows if row["entity"]}
        names = choose_controls(list(about), args.num_controls, args.seed) if about else {}
        controls = {name: [about[other] for other in others] for name, others in names.items()}

        def asked(change: Callable[[dict], dict] | None = None, task=task, rows=rows, controls=controls) -> list[dict]:
            return shared_out(lambda some: ask(model, task, some, controls, change), rows, args.alone)

        answers[task] = {"trained": asked()}
        with model.untrained():
            answers[task]["base"] = asked()
        if args.ablations and task in ENTITY_TASKS:
            answers[task] |= {name: asked(change) for name, change in ABLATIONS.items()}
        if rank(args.alone) == 0:
            print(f"{task}: {len(rows)} rows asked", flush=True)
    return answers


def rank(alone: bool) -> int:
    return 0 if alone else int(os.environ.get("RANK", 0))


def processes(alone: bool) -> int:
    return 1 if alone else int(os.environ.get("WORLD_SIZE", 1))


def shared_out(work: Callable[[list[dict]], list[dict]], rows: list[dict], alone: bool) -> list[dict]:
    """work(rows), each process its share; every process gets all results in the order of rows."""
    number = processes(alone)
    mine = work(rows[rank(alone) :: number])
    if number == 1:
        return mine
    parts: list = [None] * number
    torch.distributed.all_gather_object(parts, mine)
    results: list = [None] * len(rows)
    for start, part in enumerate(parts):
        results[start::number] = part
    return results


# ---------------------------------------------------------------- results


def score_all(data: dict[str, list[dict]], answers: dict[str, dict[str, list[dict]]], seed: int) -> dict:
    """{task: {"rows": n, "entities": n, state: {metric: estimate}}} for the states that were asked."""
    scores = {}
    for task, rows in data.items():
        entities = {row["entity"] for row in rows if row["entity"]}
        scores[task] = {"rows": len(rows), "entities": len(entities)}
        scores[task] |= {state: SCORES[task](rows, some, seed) for state, some in answers[task].items()}
    return scores


# ---------------------------------------------------------------- the whole


def read_data(args: Evaluation) -> dict[str, list[dict]]:
    """{task: rows} of what was asked for, pictures by full paths."""
    folders = dict.fromkeys(ENTITY_TASKS, args.data_dir)
    folders |= {"face_retention": args.face_retention_pool, "object_retention": args.object_retention_pool}
    tasks = list(folders) if args.task == "all" else [args.task]
    if args.task == "all":
        tasks = [task for task in tasks if task in ENTITY_TASKS or folders[task]]
    data = {}
    for task in tasks:
        if not folders[task]:
            name = f"--{task}_pool" if task in RETENTION_TASKS else "--data_dir"
            raise ValueError(f"--task {task} needs {name}, and the run's config.yaml does not name it")
        rows = read_rows(Path(folders[task]), task, args.split)
        data[task] = [{**row, "images": [str(Path(folders[task]) / name) for name in row["images"]]} for row in rows]
    return data


def run_evaluation(args: Evaluation) -> dict:
    """Ask, score, and write tables, examples and plots to output_dir. Returns what results.json holds."""
    args.fill_in()
    number = processes(args.alone)
    if number > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(hours=12))
    if torch.cuda.is_available() and number > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    data = read_data(args)
    model = load_model(args)
    answers = ask_all(model, data, args)
    results = {"settings": {name: str(value) for name, value in vars(args).items()}}
    results["tasks"] = score_all(data, answers, args.seed)
    if rank(args.alone) == 0:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(write_table(args.output_dir / "table.md", results["tasks"]))
        write_examples(args.output_dir / "examples.jsonl", data, answers, args.save_examples, args.seed)
        write_plots(args.output_dir, results["tasks"], data, answers)
        print(f"written to {args.output_dir}", flush=True)
    if number > 1:
        torch.distributed.destroy_process_group()
    return results

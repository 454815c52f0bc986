"""Pictures with captions -> layouts: a vision-language model says what of the caption stands where.

    python label_layouts.py --input wukong.tsv --train_data_dir DATA                       one actor a GPU
    python label_layouts.py --input wukong.tsv --train_data_dir DATA --model Qwen/Qwen3-VL-8B-Instruct
    python label_layouts.py --input wukong.tsv --train_data_dir DATA --output_jsonl data/layout_dataset.jsonl

--input: lines of picture and caption, by tabs (or commas in a .csv); a first line "url caption" is a header. A
picture is a path inside --train_data_dir or a URL, which is downloaded to DATA/downloaded. Captions may be Chinese.

DATA/train.jsonl     {"file_path", "text", "width", "height", "objects": [{"phrase", "bbox": [x1, y1, x2, y2]}]}, boxes
                     in shares of the picture: what train.py reads
DATA/labelling/      rejected.jsonl (rows and objects that are left out, why, and what the model said), report.json
                     (counts by reason), sheet.png (pictures with their boxes)

--output_jsonl data/NAME.jsonl puts the rows there, the rest into data/NAME_labelling/, and into data/NAME.meta.json
which folder the pictures are in: `train.py --dataset layout` reads data/layout_dataset.jsonl by it.

A killed run goes on with the same command: rows that are labelled or rejected are done. To try rejected rows again,
delete rejected.jsonl. Needs ray: bash setup.sh label.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import random
import re
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = next(folder for folder in HERE.parents if (folder / "common").is_dir())
sys.path[:0] = [str(HERE), str(REPOSITORY)]

from boxes import show_boxes
from PIL import Image

from common.data.images import check_image, decode_image
from common.data.json_rows import json_rows, short
from common.data.manifest import inside_folder
from common.data.row_files import read_file
from common.progress import progress_bar
from common.start import plan

PROMPTS = {
    "en": (
        "The caption of this picture is: {caption}\n"
        "Find the objects that the caption names and that can be seen. Answer with JSON only, a list of at most "
        '{max_objects} objects: [{{"phrase": "...", "bbox": [x1, y1, x2, y2]}}]. phrase: the words of the caption, in '
        "its language. x1, y1: the object's top left corner, x2, y2: its bottom right corner, as integers from 0 to "
        "1000 of the picture's width and height. Answer [] when none can be seen."
    ),
    "zh": (
        "这张图片的说明文字是：{caption}\n"
        "请找出说明文字提到、并且在图中能看到的物体。只输出 JSON，不要输出任何其他文字：一个列表，"
        '最多 {max_objects} 个物体：[{{"phrase": "...", "bbox": [x1, y1, x2, y2]}}]。'
        "phrase 是说明文字中的原词，不要翻译。x1, y1 是物体左上角的坐标，x2, y2 是右下角的坐标，"
        "都是 0 到 1000 的整数，表示占图片宽度和高度的千分之几。如果一个物体也看不到，输出 []。"
    ),
}
CHINESE = re.compile("[\u4e00-\u9fff]")
THOUSANDTHS = ("qwen2_vl", "qwen3_vl", "qwen3_vl_moe")  # model types whose boxes are thousandths of the picture
SMALLEST = 5  # thousandths, of a box's sides: smaller ones were meant as shares or pixels
MAX_DOWNLOAD = 20_000_000  # bytes
TIMEOUT = 15  # seconds, of a download

Answer = Callable[[Sequence[Image.Image], Sequence[str]], list[str]]  # (pictures, prompts) -> what the model says


# ---------------------------------------------------------------- what the model said


def parse_answer(text: str, max_objects: int) -> tuple[list[dict], Counter, str]:
    """(objects with boxes in 0 to 1, objects left out by reason, why the whole answer is of no use or "").

    Takes the first JSON list (or lone object) in the text, whatever stands before and behind it, and of a list that
    breaks off its complete objects.
    """
    items, reason = read_items(text)
    objects, left_out = [], Counter()
    for item in items:
        found = read_object(item)
        if isinstance(found, str):
            left_out[found] += 1
        elif found in objects:
            left_out["repeated"] += 1
        elif len(objects) == max_objects:
            left_out["more than max_objects"] += 1
        else:
            objects.append(found)
    if not reason and not objects:
        reason = "no usable object" if left_out else "nothing seen"
    return objects, left_out, reason


def read_items(text: str) -> tuple[list, str]:
    """(the items of the first list of JSON objects, or the first lone object, "") or ([], why there is none)."""
    start = re.search(r"\[(?=\s*[{\]])", text) or re.search(r"(?=\{)", text)
    if start is None:
        return [], "no JSON"
    decoder, items, place = json.JSONDecoder(), [], start.end()
    while True:
        place = len(text) - len(text[place:].lstrip(", \t\r\n"))
        if text[place : place + 1] in ("]", ""):
            break
        try:
            item, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):  # it breaks off here, or ends without a bracket, or nests without end
            break
        items.append(item)
    if not items and text[place : place + 1] != "]":
        return [], "broken JSON"
    return items, ""


def read_object(item: object) -> dict | str:
    """{"phrase", "bbox" in 0 to 1}, or why it cannot be used. Also reads Qwen's own names, label and bbox_2d."""
    if not isinstance(item, dict):
        return "not an object"
    phrase = item.get("phrase", item.get("label"))
    bbox = item.get("bbox", item.get("bbox_2d"))
    if not isinstance(phrase, str) or not phrase.strip() or phrase != phrase.encode(errors="replace").decode():
        return "no phrase"
    numbers = isinstance(bbox, list) and len(bbox) == 4 and all(type(value) in (int, float) for value in bbox)
    if not numbers or any(value != value for value in bbox):  # nan
        return "bbox is not four numbers"
    if min(bbox) < 0 or max(bbox) > 1000:
        return "bbox out of 0 to 1000"
    x1, y1, x2, y2 = bbox
    if x2 < x1 or y2 < y1:
        return "bbox with swapped corners"
    if min(x2 - x1, y2 - y1) < SMALLEST:
        return "bbox too small"
    return {"phrase": phrase.strip(), "bbox": [round(value / 1000, 4) for value in bbox]}


# ---------------------------------------------------------------- rows and pictures


def read_rows(path: Path) -> tuple[list[tuple[str, str]], int]:
    """([(url or path, caption), ...] each once, number of repeated lines). ValueError for a line of another form."""
    rows: dict[tuple[str, str], None] = {}
    repeated = 0
    for number, line in enumerate(read_table(path), start=1):
        if number == 1 and len(line) == 2 and line[1].strip().lower() in ("caption", "text"):
            continue
        if not any(map(str.strip, line)):
            continue
        if len(line) != 2 or not all(map(str.strip, line)):
            raise ValueError(
                f"{path.name} line {number}: got {short(line)}, expected a picture, a tab and its caption"
            )
        row = line[0].strip(), line[1].strip()
        repeated += row in rows
        rows[row] = None
    return list(rows), repeated


def read_table(path: Path) -> Iterator[list[str]]:
    """The fields of each line, by commas in a .csv, else by tabs. ValueError where it is no UTF-8, or no CSV."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file) if path.suffix == ".csv" else (line.rstrip("\r\n").split("\t") for line in file)
            for line in lines:
                yield line
                number += 1
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path.name} line {number + 1} or soon after it: {error}") from error


def file_path_of(source: str) -> str:
    """Where a row's picture is, relative to train_data_dir: a path as it stands, a URL's download by its digest."""
    if not source.startswith(("http://", "https://")):
        return source
    return f"downloaded/{hashlib.sha256(source.encode()).hexdigest()[:24]}"


def fetch(source: str, folder: Path) -> bytes:
    """The encoded picture; a URL is downloaded once. ValueError says why there is none."""
    try:
        path = inside_folder(folder, file_path_of(source))
        if path.is_file() or not source.startswith("http"):
            return read_file(path)
        request = urllib.request.Request(source, headers={"User-Agent": "Mozilla/5.0"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            data = response.read(MAX_DOWNLOAD + 1)
    except FileNotFoundError as error:
        raise ValueError("picture missing") from error
    except (urllib.error.URLError, OSError) as error:  # a timeout is an OSError
        raise ValueError("download failed") from error
    if len(data) > MAX_DOWNLOAD:
        raise ValueError("download too large")
    check_image(data, decode=True, max_pixels=Image.MAX_IMAGE_PIXELS)
    path.parent.mkdir(exist_ok=True)
    half = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    half.write_bytes(data)
    half.replace(path)
    return data


def load_picture(source: str, folder: Path, max_pixels: int) -> tuple[Image.Image, tuple[int, int]] | str:
    """(picture of at most max_pixels, its own (width, height)), or why it cannot be used."""
    try:
        data = fetch(source, folder)
        check_image(data, decode=False, max_pixels=Image.MAX_IMAGE_PIXELS)
        picture = decode_image(data)
    except ValueError as error:
        return (
            str(error) if str(error) in ("picture missing", "download failed", "download too large") else "no picture"
        )
    except OSError:
        return "no picture"
    size = picture.size
    scale = (max_pixels / (size[0] * size[1])) ** 0.5
    if scale < 1:
        picture = picture.resize((max(1, int(size[0] * scale)), max(1, int(size[1] * scale))))
    return picture, size


def load_pictures(batch: Sequence[tuple[str, str]], folder: Path, max_pixels: int) -> list:
    """load_picture of each row of a batch, at once."""
    with ThreadPool(len(batch)) as pool:
        return pool.map(lambda row: load_picture(row[0], folder, max_pixels), batch)


# ---------------------------------------------------------------- the model


def load_model(args: argparse.Namespace) -> Answer:
    """A Qwen-VL of transformers as a function; on the GPU that its actor sees, else on the CPU."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(args.model)
    processor.tokenizer.padding_side = "left"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype).to(device).eval()

    @torch.no_grad()
    def answer(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        asked = [[{"type": "image"}, {"type": "text", "text": prompt}] for prompt in prompts]
        texts = [
            processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            for content in asked
        ]
        inputs = processor(text=texts, images=list(pictures), padding=True, return_tensors="pt").to(device)
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        output = model.generate(**inputs, **greedy, max_new_tokens=args.max_new_tokens)  # (B, L + new)
        return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def prompt_for(caption: str, args: argparse.Namespace) -> str:
    """What the model is asked; prompt_language auto is Chinese for a caption with a Chinese character in it."""
    language = args.prompt_language
    if language == "auto":
        language = "zh" if CHINESE.search(caption) else "en"
    return PROMPTS[language].format(caption=caption, max_objects=args.max_objects)


def check_model(name: str) -> None:
    """ValueError for a model whose boxes are not thousandths of the picture, such as Qwen2.5-VL's pixels."""
    from transformers import AutoConfig

    kind = AutoConfig.from_pretrained(name).model_type
    if kind not in THOUSANDTHS:
        raise ValueError(
            f"model {name} is of type {kind}, whose boxes may not be thousandths of the picture (Qwen2.5-VL's are "
            "pixels); expected Qwen2-VL or Qwen3-VL"
        )


class Labeller:
    """A Ray actor: one model, asked about batches of rows."""

    def __init__(self, load_model: Callable[[argparse.Namespace], Answer], args: argparse.Namespace):
        self.answer, self.args = load_model(args), args

    def label(self, batch: Sequence[tuple[str, str]], pictures: list) -> list[dict]:
        """One result for each row: a layout, or {"reason"}; with what was left out."""
        good = [number for number, picture in enumerate(pictures) if not isinstance(picture, str)]
        prompts = [prompt_for(batch[number][1], self.args) for number in good]
        said = self.answer([pictures[number][0] for number in good], prompts) if good else []
        assert len(said) == len(good)
        answers = dict(zip(good, said, strict=True))
        results = []
        for number, (source, caption) in enumerate(batch):
            row = {"file_path": file_path_of(source), "text": caption}
            if number not in answers:
                results.append({**row, "reason": pictures[number]})
                continue
            objects, left_out, reason = parse_answer(answers[number], self.args.max_objects)
            width, height = pictures[number][1]
            layout = {} if reason else {"width": width, "height": height, "objects": objects}
            results.append({**row, **layout, "reason": reason, "left_out": left_out, "answer": answers[number]})
        return results


# ---------------------------------------------------------------- labelling


def ask_actors(
    rows: Sequence[tuple[str, str]], args: argparse.Namespace, load_model: Callable[[argparse.Namespace], Answer]
) -> Iterator[dict]:
    """Results of all rows, in the order in which they come. Each actor has a batch in work and the next one waiting,
    whose pictures are loaded meanwhile."""
    import ray

    paths = os.pathsep.join([str(HERE), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if gpus and args.num_actors > gpus:  # it would wait for ever for a GPU
            raise ValueError(f"num_actors (num_gpus) is {args.num_actors}, and Ray sees {gpus} GPU(s); use {gpus}")
        # no CPU for itself: as many actors as cores must leave one for the loading of pictures
        start = ray.remote(Labeller).options(num_cpus=0, num_gpus=1 if gpus else 0).remote
        actors = [start(load_model, args) for _ in range(args.num_actors or max(1, gpus))]
        load = ray.remote(load_pictures)
        batches = (rows[first : first + args.batch_size] for first in range(0, len(rows), args.batch_size))
        waiting = {}  # the result to come -> its actor

        def submit(actor) -> None:
            batch = next(batches, None)
            if batch is not None:
                pictures = load.remote(batch, args.train_data_dir, args.max_pixels)
                waiting[actor.label.remote(batch, pictures)] = actor

        for actor in actors * 2:
            submit(actor)
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1)
            actor = waiting.pop(done[0])
            submit(actor)
            yield from ray.get(done[0])
    finally:
        ray.shutdown()


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSONL file that is appended to; a last line that a kill has cut short is removed from it."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    rows = []
    for row, _, where in json_rows(path):
        if not isinstance(row, dict):
            raise ValueError(f"{path.parent / where} is none of this script's; delete that line: {short(row)}")
        rows.append(row)
    return rows


def write_line(file: io.TextIOBase, row: dict) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()


def write_result(result: dict, layouts: io.TextIOBase, rejected: io.TextIOBase) -> None:
    """A layout into one file; what is left out, rows and objects, into the other."""
    row = {name: result[name] for name in ("file_path", "text")}
    if not result["reason"]:
        write_line(layouts, {**row, **{name: result[name] for name in ("width", "height", "objects")}})
    else:
        said = {name: result[name] for name in ("reason", "answer") if name in result}
        write_line(rejected, {**row, **said})
    for reason, count in result.get("left_out", {}).items():
        write_line(rejected, {**row, "object": reason, "count": count, "answer": result["answer"]})


def make_report(layouts: Sequence[dict], rejected: Sequence[dict], repeated: int) -> dict:
    """Counts: rows labelled, rows rejected and objects left out by reason, layouts by number of objects."""
    reasons = Counter(row["reason"] for row in rejected if "reason" in row)
    objects = Counter()
    for row in rejected:
        if "object" in row:
            objects[row["object"]] += row["count"]
    sizes = Counter(len(row["objects"]) for row in layouts)
    return {
        "rows": len(layouts) + sum(reasons.values()),
        "repeated_lines": repeated,
        "labelled": len(layouts),
        "rejected": dict(reasons.most_common()),
        "objects": sum(size * count for size, count in sizes.items()),
        "objects_left_out": dict(objects.most_common()),
        "layouts_by_number_of_objects": {str(size): sizes[size] for size in sorted(sizes)},
    }


def write_sheet(path: Path, layouts: Sequence[dict], folder: Path, count: int = 24, side: int = 320) -> None:
    """Some of the layouts, drawn by a fixed seed, as pictures with boxes and phrases."""
    shown = random.Random(0).sample(list(layouts), min(count, len(layouts)))
    columns = 6
    sheet = Image.new("RGB", (columns * side, max(1, -(-len(shown) // columns)) * side), "white")
    for number, row in enumerate(shown):
        picture = decode_image(read_file(inside_folder(folder, row["file_path"])))
        scale = (side - 8) / max(picture.size)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        picture = show_boxes(picture.resize(size), row["objects"])
        sheet.paste(picture, (number % columns * side + 4, number // columns * side + 4))
    sheet.save(path)


def record_folder(args: argparse.Namespace) -> None:
    """Beside rows that lie elsewhere than their pictures: where those are, for train.py. ValueError where the rows of
    an earlier run have their pictures in another folder."""
    file = args.output_jsonl.with_suffix(".meta.json")  # layouts.py reads it
    if args.output_jsonl == args.train_data_dir / "train.jsonl":
        return
    recorded = json.loads(file.read_text())["train_data_dir"] if file.is_file() else str(args.train_data_dir)
    if recorded != str(args.train_data_dir):
        raise ValueError(
            f"the rows of {args.output_jsonl} have their pictures in {recorded}, got train_data_dir (image_dir) "
            f"{args.train_data_dir}; use another --output_jsonl"
        )
    file.write_text(json.dumps({"train_data_dir": recorded}, ensure_ascii=False) + "\n")


def label(args: argparse.Namespace, load_model: Callable[[argparse.Namespace], Answer]) -> dict:
    """All of it; returns the report."""
    rows, repeated = read_rows(args.input)
    folder = args.labelling
    folder.mkdir(parents=True, exist_ok=True)
    paths = args.output_jsonl, folder / "rejected.jsonl"
    record_folder(args)
    before = [row for path in paths for row in read_lines(path) if "object" not in row]
    done = {(row["file_path"], row["text"]) for row in before}
    left = [row for row in rows if (file_path_of(row[0]), row[1]) not in done]
    print(f"{len(rows)} rows, {len(rows) - len(left)} of them done, {len(left)} to label")
    if left:
        with (
            open(paths[0], "a", encoding="utf-8") as layouts,
            open(paths[1], "a", encoding="utf-8") as rejected,
            progress_bar(total=len(rows), initial=len(rows) - len(left), desc="label", unit="rows") as bar,
        ):
            for result in ask_actors(left, args, load_model):
                write_result(result, layouts, rejected)
                bar.update()
    layouts, rejected = (read_lines(path) for path in paths)
    report = make_report(layouts, rejected, repeated)
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_sheet(folder / "sheet.png", layouts, args.train_data_dir)
    return report


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings; dashes and underscores are the same in flags, and some have a second name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "lines of picture (path or URL), tab, caption"
    parser.add_argument("--input", "--input_tsv", type=Path, required=True, help=text)
    text = "paths start here, and results go here unless output_jsonl is given"
    parser.add_argument("--train_data_dir", "--image_dir", type=Path, required=True, help=text)
    text = "where rows with boxes go, train.jsonl in train_data_dir when not given"
    parser.add_argument("--output_jsonl", type=Path, help=text)
    text = "folder or hub name, Qwen2-VL or Qwen3-VL"
    parser.add_argument("--model", "--model_path", default="Qwen/Qwen2-VL-7B-Instruct", help=text)
    text = "models at work at once, one a GPU; as many as there are GPUs, or one, when 0"
    parser.add_argument("--num_actors", "--num_gpus", type=int, default=0, help=text)
    text = "of what the model is asked; auto: the caption's"
    parser.add_argument("--prompt_language", choices=("auto", *PROMPTS), default="auto", help=text)
    parser.add_argument("--batch_size", type=int, default=8, help="pictures that an actor asks about at once")
    parser.add_argument("--max_objects", type=int, default=16, help="objects of a picture")
    parser.add_argument("--max_pixels", type=int, default=1_000_000, help="larger pictures are shrunk for the model")
    parser.add_argument("--max_new_tokens", type=int, default=768, help="of an answer; an object takes about 40")
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args([re.sub("^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), w) for w in words])
    if not args.input.is_file():
        raise ValueError(f"input {args.input} is not there; expected a file of pictures and captions")
    if not args.train_data_dir.is_dir():
        raise ValueError(f"train_data_dir {args.train_data_dir} is no folder; make it, or name that of the pictures")
    args.train_data_dir = args.train_data_dir.resolve()
    usual = args.train_data_dir / "train.jsonl"
    output = args.output_jsonl = args.output_jsonl.resolve() if args.output_jsonl else usual
    if output.suffix != ".jsonl":
        raise ValueError(f"output_jsonl is {output}; expected a name that ends in .jsonl")
    args.labelling = output.with_name("labelling" if output == usual else f"{output.stem}_labelling")
    return args


def main() -> None:
    args = parse_arguments()
    check_model(args.model)
    report = label(args, load_model)
    print(json.dumps(report, indent=1, ensure_ascii=False))
    print(f"layouts: {args.output_jsonl}; look at {args.labelling / 'sheet.png'}")


if __name__ == "__main__":
    with plan.explained_errors():
        main()

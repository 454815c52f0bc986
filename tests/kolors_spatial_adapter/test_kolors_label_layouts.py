"""label_layouts.py: what a model says becomes layouts or is rejected by reason, with Ray actors, through kills."""

import json
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from data_files import hostile_bytes, hostile_rows
from helpers import ROOT, Launched, load_script, run_command, start_command
from PIL import Image
from properties import given, st

from tiny import shapes

RECIPE = ROOT / "recipes" / Path(__file__).parent.name
BOX = {"phrase": "红色的圆", "bbox": [100, 200, 500, 600]}
OBJECT = {"phrase": "红色的圆", "bbox": [0.1, 0.2, 0.5, 0.6]}
OTHER = {"phrase": "a cat", "bbox": [0, 0, 1000, 1000]}


@pytest.fixture(scope="module")
def labels():
    return load_script(RECIPE / "label_layouts.py")


# ---------------------------------------------------------------- the parser


def say(*items: object) -> str:
    return json.dumps(items, ensure_ascii=False)


@pytest.mark.parametrize(
    "text",
    [
        say(BOX),
        f"```json\n{say(BOX)}\n```",
        f"```\n{say(BOX)}```\nI hope that this helps [really]!",
        f"Here you are (see [1]): {say(BOX)} and {{more}} text",
        f'{{"objects": {say(BOX)}}}',
        json.dumps(BOX),
        '[{"label": "红色的圆", "bbox_2d": [100, 200, 500, 600]}]',
        say(BOX)[:-1],
        say(BOX)[:-1] + ', {"phrase": "a cat", "bbox": [1, 2',
        say(BOX)[:-1] + ",]",
        say(BOX, BOX),
    ],
)
def test_survives_what_models_put_around_a_list(labels, text):
    """Catches a parser that fails at fences, chatter, a cut-off or a repeated list; boxes are divided once."""
    objects, _, reason = labels.parse_answer(text, 8)
    assert (objects, reason) == ([OBJECT], "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON"),
        ("I see a red circle at 100, 200.", "no JSON"),
        ("[]", "nothing seen"),
        ("There is none: []", "nothing seen"),
        ('[{"phrase": "a c', "broken JSON"),
        ("[{'phrase': 'a cat'}]", "broken JSON"),
        (say({"phrase": "", "bbox": [1, 2, 300, 400]}), "no usable object"),
    ],
)
def test_says_why_an_answer_is_of_no_use(labels, text, reason):
    """Catches answers without an object that become empty layouts, or all have one reason."""
    assert labels.parse_answer(text, 8)[::2] == ([], reason)


@pytest.mark.parametrize(
    ("bbox", "reason"),
    [
        ([500, 200, 100, 600], "bbox with swapped corners"),
        ([100, 200, 500, 1001], "bbox out of 0 to 1000"),
        ([-1, 200, 500, 600], "bbox out of 0 to 1000"),
        ([0.1, 0.2, 0.5, 0.6], "bbox too small"),
        ([100, 200, 500, 200], "bbox too small"),
        ([100, 200, 500], "bbox is not four numbers"),
        ([100, 200, 500, math.nan], "bbox is not four numbers"),
        ([100, 200, 500, "600"], "bbox is not four numbers"),
        ([100, 200, 500, True], "bbox is not four numbers"),
        ("100, 200, 500, 600", "bbox is not four numbers"),
        (None, "bbox is not four numbers"),
    ],
)
def test_bad_boxes_are_left_out_by_reason(labels, bbox, reason):
    """Catches a box that is repaired by guess, or that takes the good ones of its answer along."""
    objects, left_out, why = labels.parse_answer(say({"phrase": "a cat", "bbox": bbox}, BOX, 3, OTHER, BOX), 8)
    assert why == "" and objects == [OBJECT, {"phrase": "a cat", "bbox": [0.0, 0.0, 1.0, 1.0]}]
    assert left_out == Counter({reason: 1, "not an object": 1, "repeated": 1})


def test_keeps_at_most_max_objects(labels):
    """Catches a model in a loop that fills a layout."""
    many = [{"phrase": f"cat {i}", "bbox": [i, 0, 500, 500]} for i in range(9)]
    objects, left_out, _ = labels.parse_answer(say(*many), 4)
    assert [item["phrase"] for item in objects] == [f"cat {i}" for i in range(4)]
    assert left_out == {"more than max_objects": 5}


@pytest.mark.parametrize("entry", hostile_rows("answer"))
def test_hostile_answers_have_a_reason(labels, entry):
    """Catches an answer that ends a labelling run of days: numbers of hundreds of digits, nesting without end, half
    characters that no file can hold."""
    objects, left_out, reason = labels.parse_answer(hostile_bytes(entry).decode(), 8)
    assert objects == [] and entry["said"] in (reason, *left_out)


@given(st.text(alphabet='[]{},:"0159.e-phrasebox ', max_size=60) | st.text(max_size=20))
def test_any_answer_has_objects_or_a_reason(labels, text):
    """Catches an exception for any answer, and objects that cannot be written."""
    objects, _, reason = labels.parse_answer(text, 8)
    assert bool(objects) != bool(reason)
    json.dumps(objects, ensure_ascii=False).encode("utf-8")


# ---------------------------------------------------------------- the rows


def test_a_table_that_cannot_be_read_names_its_line(labels, tmp_path):
    """Catches tracebacks of the decoder and of the csv module."""
    (tmp_path / "x.tsv").write_bytes(b"1.png\ta cat\n" + b"2.png\tcaf\xe9\n" * 2)
    with pytest.raises(ValueError, match=r"x.tsv line 1 or soon after it: .*utf-8.*0xe9"):
        labels.read_rows(tmp_path / "x.tsv")
    (tmp_path / "x.csv").write_text("1.png,a cat\n2.png," + "x" * 200_000)
    with pytest.raises(ValueError, match=r"x.csv line 2 or soon after it: field larger than"):
        labels.read_rows(tmp_path / "x.csv")


def test_what_was_written_is_read_again(labels, tmp_path):
    """Catches a run that cannot go on from its own file, because a caption has a line break of Unicode in it."""
    with open(tmp_path / "rows.jsonl", "w", encoding="utf-8") as file:
        labels.write_line(file, {"text": "a\u2028b\u0085c\u000bd"})
    assert labels.read_lines(tmp_path / "rows.jsonl") == [{"text": "a\u2028b\u0085c\u000bd"}]
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(ValueError, match=r"rows.jsonl line 2 is none of this script's"):
        labels.read_lines(tmp_path / "rows.jsonl")


def test_reads_tabs_and_commas_and_chinese(labels, tmp_path):
    """Catches a header taken as a row, captions with commas, a byte order mark, lines that come twice."""
    rows = [("a/1.png", "一只猫, 和一只狗"), ("https://example.org/2.jpg", "a dog")]
    (tmp_path / "x.tsv").write_text(
        "\ufeffurl\tcaption\n" + "".join("\t".join(row) + "\r\n" for row in rows * 2 + [("", "")])
    )
    (tmp_path / "x.csv").write_text('url,caption\na/1.png,"一只猫, 和一只狗"\nhttps://example.org/2.jpg,a dog\n')
    assert labels.read_rows(tmp_path / "x.tsv") == (rows, 2)
    assert labels.read_rows(tmp_path / "x.csv") == (rows, 0)
    (tmp_path / "bad.tsv").write_text("1.png\ta cat\n2.png a dog\n")
    with pytest.raises(ValueError, match=r"bad.tsv line 2: got \['2.png a dog'\], expected"):
        labels.read_rows(tmp_path / "bad.tsv")


def test_pictures_outside_the_folder_are_refused(labels, tmp_path):
    """Catches a TSV that reads any file of the machine."""
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    assert labels.load_picture("../secret.png", tmp_path / "data", 100) == "no picture"
    assert labels.load_picture("none.png", tmp_path / "data", 100) == "picture missing"
    (tmp_path / "data/cut.png").write_bytes((tmp_path / "secret.png").read_bytes()[:40])
    assert labels.load_picture("cut.png", tmp_path / "data", 100) == "no picture"
    Image.new("RGB", (40, 20)).save(tmp_path / "data/wide.png")
    picture, size = labels.load_picture("wide.png", tmp_path / "data", 200)
    assert picture.size == (20, 10) and size == (40, 20), "boxes are shares, sizes those of the file"


def test_downloads_once(labels, tmp_path):
    """Catches a picture that is fetched again on every run, or half a file that is taken for one."""
    source = tmp_path / "served"
    source.mkdir()
    Image.new("RGB", (8, 8), "red").save(source / "red.png")
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(source)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        url = f"http://127.0.0.1:{server.stdout.readline().split(' port ')[1].split()[0]}/red.png"
        (picture, size) = labels.load_picture(url, tmp_path, 100)
        assert size == (8, 8) and picture.getpixel((0, 0)) == (255, 0, 0)
        assert labels.load_picture(url.replace("red", "blue"), tmp_path, 100) == "download failed"
    finally:
        server.kill()
        server.wait()
    assert labels.load_picture(url, tmp_path, 100)[1] == (8, 8), "from the disk: the server is gone"
    assert [file.name for file in (tmp_path / "downloaded").iterdir()] == [Path(labels.file_path_of(url)).name]


def test_half_a_line_is_cut_away(labels, tmp_path):
    """Catches a kill in the middle of a line that spoils the file for good."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": "雪"}\n{"b": 2}\n{"c": ')
    assert labels.read_lines(file) == [{"a": "雪"}, {"b": 2}]
    assert file.read_text() == '{"a": "雪"}\n{"b": 2}\n'


def test_what_is_asked_is_in_the_captions_language(labels, tmp_path):
    """Catches a Chinese caption that is asked about in English, a caption's braces taken for places, and a prompt
    without the grid or without JSON."""
    (tmp_path / "rows.tsv").write_text("1.png\ta cat\n")
    given = ["--input", str(tmp_path / "rows.tsv"), "--image-dir", str(tmp_path)]
    for language, caption, begins in (
        ("auto", "a {cat}", "The caption"),
        ("auto", "一只 cat", "这张图片"),
        ("en", "一只猫", "The caption"),
        ("zh", "a cat", "这张图片"),
    ):
        prompt = labels.prompt_for(caption, labels.parse_arguments([*given, "--prompt-language", language]))
        assert prompt.startswith(begins) and prompt.split("\n")[0].endswith(caption)
        assert all(word in prompt for word in ("1000", "JSON", '[{"phrase": "...", "bbox": [x1, y1, x2, y2]}]', "16"))


# ---------------------------------------------------------------- with Ray

DRIVER = """
import json, sys, time
sys.path.insert(0, {recipe!r})
import label_layouts

def scripted(args):
    answers = json.load(open({answers!r}))
    def answer(pictures, prompts):
        time.sleep({seconds})
        lines = [prompt.split("\\n")[0] for prompt in prompts]
        captions = [next(caption for caption in answers if line.endswith(caption)) for line in lines]
        assert all(min(picture.size) > 0 and picture.mode == "RGB" for picture in pictures)
        return [answers[caption] for caption in captions]
    return answer

if __name__ == "__main__":
    print("report", json.dumps(label_layouts.label(label_layouts.parse_arguments(sys.argv[1:]), scripted)))
"""


@pytest.fixture
def data(tmp_path) -> Path:
    """40 rows of 38 pictures: one line twice, one picture missing; a third of the answers of no use."""
    folder, rows, answers = tmp_path / "data", [], {}
    folder.mkdir()
    for i in range(40):
        scene = [shapes.Found("red", "circle", (4, 8, 12 + i, 40))]
        shapes.draw(scene, size=(64, 48)).save(folder / f"{i:02d}.png")
        rows.append((f"{i:02d}.png", f"第{i}张图: 红色的圆"))
        left_out = {"phrase": "a cat", "bbox": [9, 9, 1, 1]}
        box = {**BOX, "bbox": [100, 200, 500, 600 + i]}
        answers[rows[-1][1]] = ("sorry", say(box, left_out), f"```json\n{say(box)}```")[i % 3]
    (folder / "07.png").unlink()
    (tmp_path / "rows.tsv").write_text("".join("\t".join(row) + "\n" for row in [*rows, rows[3]]))
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    return folder


def driver(data: Path, seconds: float = 0.0) -> list[str]:
    text = DRIVER.format(recipe=str(RECIPE), answers=str(data.parent / "answers.json"), seconds=seconds)
    (data.parent / "driver.py").write_text(text)
    flags = ["--input", data.parent / "rows.tsv", "--train_data_dir", data, "--num_actors", 2, "--batch_size", 4]
    return [sys.executable, data.parent / "driver.py", *flags]


def check_result(data: Path, done: Launched) -> None:
    layouts = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    rejected = [json.loads(line) for line in (data / "labelling/rejected.jsonl").read_text().splitlines()]
    rejected_rows = [row for row in rejected if "reason" in row]
    names = [row["file_path"] for row in layouts + rejected_rows]
    assert sorted(names) == [f"{i:02d}.png" for i in range(40)], "every row once"
    for row in layouts:
        number = int(row["file_path"][:2])
        objects = [{**OBJECT, "bbox": [0.1, 0.2, 0.5, round(0.6 + number / 1000, 4)]}]
        expected = {"text": f"第{number}张图: 红色的圆", "width": 64, "height": 48, "objects": objects}
        assert row == {"file_path": row["file_path"], **expected}, "captions and answers belong to their pictures"
    report = json.loads((data / "labelling/report.json").read_text())
    assert report == {
        "rows": 40,
        "repeated_lines": 1,
        "labelled": 25,
        "rejected": {"no JSON": 14, "picture missing": 1},
        "objects": 25,
        "objects_left_out": {"bbox with swapped corners": 12},
        "layouts_by_number_of_objects": {"1": 25},
    }
    assert Image.open(data / "labelling/sheet.png").size[0] > 1000
    assert f"report {json.dumps(report)}" in done.output


@pytest.mark.slow
def test_a_killed_run_goes_on_and_no_row_is_done_twice(data):
    """Catches rows lost or labelled twice by a kill in the middle, answers that belong to another row, wrong counts;
    and a layout that train.py's reader refuses."""
    killed = start_command(driver(data, seconds=1.0))
    layouts, deadline = data / "train.jsonl", time.monotonic() + 120
    while (not layouts.is_file() or layouts.read_text().count("\n") < 8) and time.monotonic() < deadline:
        assert killed.poll() is None, "it ended before it was killed"
        time.sleep(0.1)
    killed.kill()
    killed.wait()
    with open(layouts, "a") as file:
        file.write('{"file_path": "half a li')
    before = layouts.read_text().splitlines()[:-1]
    assert 8 <= len(before) < 25

    done = run_command(driver(data), timeout=180).check()
    assert layouts.read_text().splitlines()[: len(before)] == before, "what was done stays"
    check_result(data, done)
    again = run_command(driver(data), timeout=60).check()
    assert "40 of them done, 0 to label" in again.output
    check_result(data, again)
    from common.data.check import check_records
    from common.data.manifest import load_manifest

    records = check_records(load_manifest(data), data, progress=False)
    assert [len(record.extra["objects"]) for record in records] == [1] * 25


@pytest.fixture(scope="module")
def tiny_qwen2_vl(tmp_path_factory) -> Path:
    """A random Qwen2-VL of the real classes, its processor and chat template among them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
    )
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    names += ["<|image_pad|>", "<|video_pad|>"]
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    tokenizer.add_tokens(names, special_tokens=True)
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    images = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    processor = Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=template)
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "eos_token_id": token("<|im_end|>"),
            "bos_token_id": token("<|endoftext|>"),
            "pad_token_id": token("<|endoftext|>"),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    folder = tmp_path_factory.mktemp("qwen2vl")
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if "v_proj" in name or "o_proj" in name:
            weight.data.mul_(30)  # else the last token, the same in every row, decides what is said
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_command_with_a_real_model_on_two_actors(data, tiny_qwen2_vl):
    """Catches a model class, processor, template or generation that does not fit together; the random model says
    nothing of use, so that every row is rejected with what it said."""
    flags = ["--input-tsv", data.parent / "rows.tsv", "--image-dir", data, "--model-path", tiny_qwen2_vl]
    flags += ["--output-jsonl", data.parent / "data/x.jsonl", "--num-gpus", 2, "--batch-size", 8]
    flags += ["--max-new-tokens", 12, "--prompt-language", "en"]  # with which the random model says this and that
    run_command([sys.executable, RECIPE / "label_layouts.py", *flags], timeout=240).check()
    rejected = [json.loads(line) for line in (data / "x_labelling/rejected.jsonl").read_text().splitlines()]
    said = [row for row in rejected if row.get("reason") != "picture missing"]
    assert len(rejected) == 40 and len(said) == 39 and (data / "x.jsonl").read_text() == ""
    assert len({row["answer"] for row in said}) > 1, "pictures and captions reach the model"


def test_models_with_boxes_in_pixels_are_refused(labels, tmp_path):
    """Catches Qwen2.5-VL, whose pixels would be read as thousandths."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(ValueError, match="qwen2_5_vl"):
        labels.check_model(str(tmp_path))

"""The evaluation: scores worked out by hand, a scripted model through the whole path, log-probabilities of batches
against one row at a time."""

import contextlib
import copy
import importlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, accelerate_command, load_script, run_command
from PIL import Image

RECIPE = ROOT / "recipes" / Path(__file__).parent.name
evaluate = load_script(RECIPE / "evaluate.py")
generate_data = load_script(RECIPE / "generate_data.py")
face_pool = load_script(RECIPE / "generate_face_retention_pool.py")
object_pool = load_script(RECIPE / "generate_object_retention_pool.py")
make_tiny, train = load_script(RECIPE / "make_tiny.py"), load_script(RECIPE / "train.py")
scoring, rows_file, conversations, two_way = map(
    importlib.import_module, ("answer_scoring", "qa_rows", "conversations", "two_way_evaluation")
)
LETTERS = "ABCD"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Eight people in small pictures, and both retention pools."""
    root = tmp_path_factory.mktemp("data")
    flags = ["--num_entities", 8, "--image_size", 64, "--rows_per_entity", 4, 2, 4]
    generate_data.main([str(word) for word in ("--output_dir", root / "people", *flags)])
    face_pool.generate(root / "faces", 20, image_size=64)
    object_pool.generate(root / "objects", 20, image_size=64)
    return {
        "data_dir": root / "people",
        "face_retention_pool": root / "faces",
        "object_retention_pool": root / "objects",
    }


def rows_of(folders: dict[str, Path], task: str, split: str = "test") -> list[dict]:
    folder = folders.get(f"{task}_pool", folders["data_dir"])
    rows = rows_file.read_rows(folder, task, split)
    return [{**row, "images": [str(folder / name) for name in row["images"]]} for row in rows]


def question(row: dict) -> str:
    return "".join(part.get("text", "[]") for part in row["messages"][0]["content"])


# ---- one answer


@pytest.mark.parametrize(
    ("prediction", "truth", "same"),
    [
        ("The Composer of the opera “Amber Tide”.", "the composer of the opera Amber Tide", False),  # quotes that curl
        ('The Composer of the opera "Amber  Tide".\n', "the composer of the opera Amber Tide", True),
        ("composer of the opera Amber Tide", "the composer of the opera Amber Tide", True),
        ("the composer of the opera", "the composer of the opera Amber Tide", False),
        ("the composer of the opera Amber Tide and more", "the composer of the opera Amber Tide", False),
        ("Incorrect", "Correct", False),
        ("", "Correct", False),
        ("", "", False),
        ("...", "...", False),
        ("ｆｕｌｌ width", "full width", True),
        ("on the left", "left", False),
    ],
)
def test_exact_match(prediction, truth, same):
    assert scoring.exact_match(prediction, truth) is same


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Correct", True),
        ("correct.", True),
        ("That is CORRECT!", True),
        ("Incorrect", False),
        ("incorrect, sorry", False),
        ("Wrong", False),
        ("wrong: it is incorrect", False),
        ("not correct", None),
        ("Correct or wrong?", None),
        ("correctly", None),
        ("", None),
        ("yes", None),
    ],
)
def test_verdict_compares_whole_words(text, says):
    assert scoring.verdict(text) is says


def test_detection():
    """d' and criterion, worked out with the normal distribution's table: z(0.7381) = 0.6375, z(0.9762) = 1.9808."""
    d_prime, criterion = scoring.detection(15, 20, 5, 20)
    assert d_prime == pytest.approx(2 * 0.6375, abs=1e-3) and criterion == pytest.approx(0, abs=1e-9)
    d_prime, criterion = scoring.detection(20, 20, 20, 20)
    assert d_prime == 0 and criterion == pytest.approx(-1.9808, abs=1e-3), "always says correct: a negative criterion"
    d_prime, criterion = scoring.detection(20, 20, 0, 20)
    assert d_prime == pytest.approx(2 * 1.9808, abs=1e-3) and criterion == pytest.approx(0, abs=1e-9)
    assert scoring.detection(0, 20, 20, 20)[0] < -3


def test_auc():
    assert scoring.auc([1, 2, 3], [0, 2]) == 0.75  # pairs: 1>0, 1<2, 2>0, 2=2, 3>0, 3>2
    assert scoring.auc([1, 1], [1, 1]) == 0.5 and scoring.auc([5], [1, 2]) == 1 and scoring.auc([0], [1, 2]) == 0


# ---- choices


def letters_of(likes: dict[str, float], bonus: dict[str, float], row: dict) -> list[list[float]]:
    """What a model says that likes some options and some letters, in the four rotations of a row."""
    turned = [scoring.rotate_options(row, k) for k in range(4)]
    return [
        [
            likes.get(option, 0) + bonus.get(letter, 0) - 3
            for letter, option in zip(LETTERS, row["options"], strict=True)
        ]
        for row in turned
    ]


@pytest.mark.parametrize("task", ["choice_description", "choice_image"])
def test_rotation_finds_the_liked_option_behind_any_letter(folders, task):
    """Catches a rotation undone the wrong way round, and the first letter taken for the answer."""
    for row in rows_of(folders, task)[:8]:
        for liked in range(4):
            said = letters_of({row["options"][liked]: 0.5}, {"A": 4.0, "C": 1.0}, row)
            assert scoring.choose(said).tolist() == [float(i == liked) for i in range(4)]
        assert scoring.choose(letters_of({}, {"A": 4.0}, row)).tolist() == [0.25] * 4


def test_rotated_questions(folders):
    row = rows_of(folders, "choice_description")[0]
    turned = scoring.rotate_options(row, 1)
    a, b, c, d = row["options"]
    assert f"\nA. {b}\nB. {c}\nC. {d}\nD. {a}\n" in question(turned) and turned["options"] == [b, c, d, a]
    assert turned["images"] == row["images"] and turned["answer_index"] == (row["answer_index"] - 1) % 4
    row = rows_of(folders, "choice_image")[0]
    turned = scoring.rotate_options(row, 3)
    assert question(turned) == question(row) and turned["images"] == [row["images"][i] for i in (3, 0, 1, 2)]
    assert turned["images"][turned["answer_index"]] == row["images"][row["answer_index"]]
    assert scoring.rotate_options(row, 0) == row


def test_letter_probabilities():
    shares = scoring.letter_probabilities([[math.log(0.2), math.log(0.1), math.log(0.1), math.log(0.0001)]])
    assert shares[0].sum() == pytest.approx(1) and shares[0, 0] == pytest.approx(2 * shares[0, 1])
    assert np.isfinite(scoring.letter_probabilities([[-1e4, -1e4 - 1, -2e4, -3e4]])).all()


# ---- ablations and controls


def test_dropping_pictures_and_text(folders):
    for task in two_way.ENTITY_TASKS:
        row = rows_of(folders, task)[0]
        before = copy.deepcopy(row)
        blind, mute = scoring.drop_images(row), scoring.drop_text(row)
        assert row == before, "the row itself must stay as it is"
        assert blind["images"] == [] and question(blind) == question(row).replace("[]", "")
        assert mute["images"] == row["images"] and question(mute).count("[]") == len(row["images"])
        assert row["description"] not in question(mute) and blind["answer"] == mute["answer"] == row["answer"]
        for option in row.get("options", []):
            assert option not in question(mute)
    assert question(scoring.drop_text(rows_of(folders, "forward")[0])) == "[]"
    assert question(scoring.drop_text(rows_of(folders, "reverse")[0])).endswith(" [], correct or wrong?")
    assert re.search(
        r"A\. \nB\. \nC\. \nD\. \n", question(scoring.drop_text(rows_of(folders, "choice_description")[0]))
    )


def test_everyone_is_a_control_equally_often():
    names = [f"e{i}" for i in range(10)]
    controls = scoring.choose_controls(names, 4, seed=0)
    assert all(len(set(others)) == 4 and name not in others for name, others in controls.items())
    counts = [sum(name in others for others in controls.values()) for name in names]
    assert counts == [4] * 10 and controls.keys() == set(names)
    assert len(scoring.choose_controls(names, 99, seed=0)["e3"]) == 9
    assert controls != scoring.choose_controls(names, 4, seed=1)


# ---- intervals


def test_bootstrap_draws_entities_not_rows():
    """Eight entities of 50 rows each, four always right: as uncertain as eight coins, not as 400."""
    clusters = [f"e{i}" for i in range(8) for _ in range(50)]
    right = np.repeat([1, 1, 1, 1, 0, 0, 0, 0], 50)
    estimate = scoring.bootstrap(clusters, lambda i: right[i].mean(), seed=0)
    assert estimate["value"] == 0.5 and estimate["low"] <= 0.2 and estimate["high"] >= 0.8
    alone = scoring.bootstrap(range(400), lambda i: right[i].mean(), seed=0)
    assert alone["value"] == 0.5 and 0.44 < alone["low"] < 0.47 and 0.53 < alone["high"] < 0.56
    constant = scoring.bootstrap(clusters, lambda i: 0.3, seed=0)
    assert constant == {"value": 0.3, "low": 0.3, "high": 0.3}


def test_chance_line_is_of_guessers_who_guess_once_an_entity():
    line = scoring.chance_line([f"e{i}" for i in range(8) for _ in range(50)], 1 / 8, seed=0)
    assert line == {"chance": 0.125, "chance_low": 0.0, "chance_high": 0.375}
    line = scoring.chance_line(range(400), 0.5, seed=0)
    assert 0.44 < line["chance_low"] < 0.46 and 0.54 < line["chance_high"] < 0.56


# ---- scores of tasks


def row(entity: str, **fields) -> dict:
    return {"id": "1", "entity": entity, "images": ["a.png"], "description": f"maker {entity}", **fields}


def values(scores: dict) -> dict[str, float]:
    return {name: estimate["value"] for name, estimate in scores.items()}


def test_score_forward():
    rows = [row(name, answer=f"maker {name}") for name in ("e0", "e0", "e1", "e2")]
    said = ["Maker e0.", "maker e1", "maker e1", ""]
    log_probs = [(-1.0, [-2.0, -3.0]), (-3.0, [-2.0, -6.0]), (-2.0, [-2.0, -4.0]), (-1.0, [-5.0, -5.0])]
    answers = [
        {"prediction": text, "log_prob": true, "control_log_probs": others}
        for text, (true, others) in zip(said, log_probs, strict=True)
    ]
    scores = scoring.score_forward(rows, answers, seed=0)
    assert values(scores) == {
        "exact_match": 0.5,
        "log_prob": -1.75,
        "log_prob_above_controls": (1.5 + 1.0 + 1.0 + 4.0) / 4,
        "likelier_than_all_controls": 0.5,  # equal is not likelier
    }
    assert scores["exact_match"]["chance"] == scores["likelier_than_all_controls"]["chance"] == pytest.approx(1 / 3)
    assert scores["exact_match"]["low"] == 0 and scores["exact_match"]["high"] == 1
    matrix = scoring.confusion("forward", rows, answers, ["e0", "e1", "e2"])
    assert matrix.tolist() == [[0.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]


def test_score_reverse():
    rows = [row("e0", correct=True, image_entity="e0"), row("e0", correct=True, image_entity="e0")]
    rows += [row("e1", correct=True, image_entity="e1"), row("e1", correct=True, image_entity="e1")]
    rows += [row("e0", correct=False, image_entity="e1"), row("e0", correct=False, image_entity="e1")]
    rows += [row("e1", correct=False, image_entity="e0"), row("e1", correct=False, image_entity="e0")]
    log_odds = [2.0, 1.0, 3.0, -1.0, 0.5, -2.0, -3.0, -4.0]
    said = ["Correct", "incorrect", "Correct", "", "Wrong", "wrong", "not correct", "Correct"]
    answers = [{"log_odds": value, "prediction": text} for value, text in zip(log_odds, said, strict=True)]
    found = values(scores := scoring.score_reverse(rows, answers, seed=0))
    assert (found["accuracy"], found["true_positive_rate"], found["false_positive_rate"]) == (0.75, 0.75, 0.25)
    assert found["d_prime"] == pytest.approx(scoring.detection(3, 4, 1, 4)[0]) and found["criterion"] == 0
    assert found["auc"] == 15 / 16  # of the sixteen pairs -1.0 loses to 0.5 only
    assert (found["accuracy_in_words"], found["no_verdict"]) == (4 / 8, 2 / 8)
    assert scores["accuracy"]["chance"] == 0.5 and scores["auc"]["chance"] == 0.5
    matrix = scoring.confusion("reverse", rows, answers, ["e0", "e1"])
    assert matrix.tolist() == [[1.5, -0.75], [-3.5, 1.0]]
    shifted = [{"log_odds": value + 100} for value in log_odds]  # says Correct to everything
    biased = values(scoring.score_reverse(rows, shifted, seed=0))
    assert biased["accuracy"] == 0.5 and biased["d_prime"] == 0 and biased["criterion"] < -1
    assert biased["auc"] == 15 / 16, "what is known is still seen through the bias"


def test_score_choice():
    rows = [row(f"e{i}", answer_index=i, option_entities=["e0", "e1", "e2", "e3"]) for i in range(4)]
    always_first = [np.roll([2.0, 0, 0, 0], -k).tolist() for k in range(4)]  # option 0, wherever it stands
    scores = scoring.score_choice(rows, [{"letter_log_probs": always_first}] * 4, seed=0)
    assert scores["accuracy"]["value"] == 0.25 and scores["share_of_A"]["value"] == pytest.approx(0.25)
    letter_a = [[2.0, 0, 0, 0]] * 4
    scores = scoring.score_choice(rows, [{"letter_log_probs": letter_a}] * 4, seed=0)
    assert scores["accuracy"]["value"] == 0.25 and scores["share_of_A"]["value"] == pytest.approx(0.711, abs=1e-3)
    answers = [{"letter_log_probs": always_first}, {"letter_log_probs": letter_a}] * 2
    matrix = scoring.confusion("choice_image", rows, answers, ["e0", "e1", "e2", "e3"])
    assert matrix.tolist() == [[1, 0, 0, 0], [0.25] * 4, [1, 0, 0, 0], [0.25] * 4]


def test_score_retention():
    def asked(text: str, answer: str) -> dict:
        messages = [{"content": [{"type": "image"}, {"type": "text", "text": text}]}]
        return {"entity": None, "images": [answer], "answer": answer, "messages": messages}

    rows = [asked("hat?", "yes"), asked("hat?", "no"), asked("hat?", "no"), asked("hair?", "red")]
    answers = [{"prediction": text, "log_prob": -1.0} for text in ("no", "no", "yes no", "Red")]
    scores = scoring.score_retention(rows, answers, seed=0)
    assert scores["exact_match"]["value"] == 0.5 and scores["exact_match"]["chance"] == 0.75


# ---- the whole path with a scripted model


class Scripted:
    """Has learnt pictures -> descriptions only, likes the letter A and the word Correct; untrained knows nothing."""

    def __init__(self, descriptions: dict[str, str]):
        self.descriptions, self.trained = descriptions, True
        self.asked = []

    @contextlib.contextmanager
    def untrained(self):
        self.trained = False
        yield
        self.trained = True

    def seen(self, row: dict) -> str | None:
        """The description of whoever is in the first picture."""
        found = re.search(r"(e\d+)_\d+\.png", row["images"][0]) if row["images"] else None
        return self.descriptions[found[1]] if found and self.trained else None

    def generate(self, rows: list[dict]) -> list[str]:
        self.asked += [row["id"] for row in rows]
        if rows and rows[0]["task"] in two_way.RETENTION_TASKS:
            return [row["answer"] if i % 2 or not self.trained else "forgotten" for i, row in enumerate(rows)]
        if rows and rows[0]["task"] == "reverse":
            return ["Correct" if self.trained else "" for _ in rows]
        return [self.seen(row) or (self.descriptions["e00"] if self.trained else "no idea") for row in rows]

    def log_probs(self, rows: list[dict], candidates: list[list[str]]) -> list[list[float]]:
        assert len(rows) == len(candidates)
        return [[self.log_prob(row, text) for text in texts] for row, texts in zip(rows, candidates, strict=True)]

    def log_prob(self, row: dict, text: str) -> float:
        if row["task"] == "choice_description" and self.seen(row):
            line = next(line for line in question(row).splitlines() if line.startswith(f"{text}. "))
            return (-1.0 if line.removeprefix(f"{text}. ") == self.seen(row) else -2.0) + 3.0 * (text == "A")
        if row["task"].startswith("choice"):
            return -1.0 if text == "A" else -2.0
        if row["task"] == "reverse":
            return -0.1 if text == "Correct" else -2.4
        return -1.0 if text == self.seen(row) else -9.0


def asked(*argv) -> dict:
    """What evaluate.py does with a command line."""
    return two_way.run_evaluation(evaluate.parse([str(word) for word in argv]))


@pytest.fixture
def adapter(tmp_path) -> Path:
    best = tmp_path / "run/best"
    best.mkdir(parents=True)
    (best / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    return best


def test_scripted_model_through_the_whole_path(folders, adapter, monkeypatch, capsys):
    config = {name: str(path) for name, path in folders.items() if name != "data_dir"}
    config |= {"train_data_dir": str(folders["data_dir"]), "mixed_precision": "bf16", "min_pixels": 77}
    (adapter.parent / "config.yaml").write_text(json.dumps(config))
    people = json.loads((folders["data_dir"] / "entities.json").read_text())
    model = Scripted({person["entity"]: person["description"] for person in people})
    monkeypatch.setattr(two_way, "load_model", lambda args: model)
    monkeypatch.setenv("WORLD_SIZE", "4")  # as inside a launched training run: alone, nobody is waited for
    two_way.run_evaluation(two_way.Evaluation(model_path=adapter, save_examples=3, alone=True))

    out = adapter.parent / "evaluation"
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["precision"] == "bf16" and results["settings"]["min_pixels"] == "77"
    tasks = results["tasks"]
    assert list(tasks) == [*two_way.ENTITY_TASKS, *two_way.RETENTION_TASKS]
    value = {
        (task, state, metric): estimate["value"]
        for task, states in tasks.items()
        for state, metrics in states.items()
        if isinstance(metrics, dict)
        for metric, estimate in metrics.items()
    }
    assert value["forward", "trained", "exact_match"] == 1 and value["forward", "base", "exact_match"] == 0
    assert value["forward", "trained", "likelier_than_all_controls"] == 1
    assert value["forward", "trained", "log_prob_above_controls"] == 8
    assert value["forward", "base", "log_prob_above_controls"] == 0
    assert (
        value["forward", "image dropped", "exact_match"] == 1 / 8
        and value["forward", "text dropped", "exact_match"] == 1
    )
    assert value["reverse", "trained", "accuracy"] == value["reverse", "trained", "auc"] == 0.5
    assert value["reverse", "trained", "true_positive_rate"] == value["reverse", "trained", "false_positive_rate"] == 1
    assert value["reverse", "trained", "d_prime"] == 0 and value["reverse", "trained", "criterion"] < -1
    assert value["reverse", "base", "no_verdict"] == 1 and value["reverse", "trained", "accuracy_in_words"] == 0.5
    assert value["choice_description", "trained", "accuracy"] == 1
    assert value["choice_description", "trained", "share_of_A"] > 0.5, (
        "a bias that rotation removes, and that is shown"
    )
    assert value["choice_description", "image dropped", "accuracy"] == 0.25
    assert value["choice_description", "text dropped", "accuracy"] == 0.25
    assert value["choice_image", "trained", "accuracy"] == value["choice_image", "base", "accuracy"] == 0.25
    assert (
        value["face_retention", "base", "exact_match"] == 1
        and value["face_retention", "trained", "exact_match"] == 0.5
    )
    forward = tasks["forward"]["trained"]["exact_match"]
    assert forward["low"] > forward["chance_high"] and tasks["forward"]["entities"] == 8

    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out and "| forward (32 rows, 8 entities) | exact_match | 1.000 [1.000" in table
    examples = [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]
    assert len(examples) == 3 * 6 and {"question", "truth", "trained", "base"} <= examples[0].keys()
    assert examples[0]["trained"]["prediction"] == examples[0]["truth"] and "[image]" in examples[0]["question"]
    assert str(folders["data_dir"]) not in (out / "examples.jsonl").read_text()
    plots = sorted(out.glob("*.png"))
    assert [plot.stem for plot in plots] == ["answer_bias", "confusion", "forward_reverse", "retention"]
    assert all(len(Image.open(plot).convert("RGB").getcolors(2**24)) > 20 for plot in plots)


def test_one_task_only(folders, adapter, monkeypatch):
    model = Scripted({f"e{i:02d}": "x" for i in range(8)})
    monkeypatch.setattr(two_way, "load_model", lambda args: model)
    argv = ["--model_path", adapter, "--data_dir", folders["data_dir"], "--task", "reverse", "--no-ablations"]
    argv += ["--split", "validation", "--output_dir", adapter.parent / "elsewhere"]
    results = asked(*argv)
    assert list(results["tasks"]) == ["reverse"] and "image dropped" not in results["tasks"]["reverse"]
    assert {name.split("-")[1] for name in model.asked} == {"validation"}
    files = sorted(path.name for path in (adapter.parent / "elsewhere").iterdir())
    assert files == [
        "answer_bias.png",
        "confusion.png",
        "examples.jsonl",
        "forward_reverse.png",
        "results.json",
        "table.md",
    ]


def test_flags_that_are_not_given_keep_their_defaults(adapter):
    """Catches a flag whose default is not Evaluation's, or that Evaluation does not have."""
    parsed, plain = evaluate.parse(["--model_path", str(adapter)]), two_way.Evaluation(model_path=adapter)
    assert parsed == plain and (parsed.task, parsed.batch_size, parsed.ablations) == ("all", 8, True)
    given = ["--no-ablations", "--batch_size", "3", "--output_dir", "there", "--precision", "no"]
    parsed = evaluate.parse(["--model_path", str(adapter), *given])
    assert parsed == two_way.Evaluation(
        adapter, ablations=False, batch_size=3, output_dir=Path("there"), precision="no"
    )


def test_users_mistakes(folders, adapter, tmp_path):
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        asked("--model_path", tmp_path)
    with pytest.raises(ValueError, match="--task face_retention needs --face_retention_pool"):
        asked("--model_path", adapter, "--task", "face_retention")
    with pytest.raises(ValueError, match="needs --data_dir"):
        asked("--model_path", adapter)


# ---- the tiny model: batches and padding change nothing


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A tiny base with random weights, and an adapter that changes what it says."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("tiny")
    processor = make_tiny.build_processor()
    base = make_tiny.build_model(processor)
    base.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=32, target_modules=train.TARGETS, init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(root / "run/best")
    return root


def load(saved: Path, **flags):
    args = ["--model_path", saved / "run/best", "--base_model", saved / "model", "--precision", "no"]
    args += ["--quantization", "none", "--batch_size", 5, "--max_new_tokens", 6]
    args += [word for name, value in flags.items() for word in (f"--{name}", value)]
    parsed = evaluate.parse([str(word) for word in args])
    parsed.alone = True
    parsed.fill_in()
    return two_way.load_model(parsed)


@pytest.fixture(scope="module")
def model(saved):
    return load(saved)


@pytest.fixture(scope="module")
def mixed(folders) -> list[dict]:
    """Rows of unequal lengths: one picture, four, none at all."""
    picked = [rows_of(folders, task)[i] for task in two_way.ENTITY_TASKS for i in range(2)]
    picked += rows_of(folders, "face_retention")[:2]
    return [*picked, scoring.drop_images(picked[0]), scoring.drop_text(picked[1]), scoring.drop_images(picked[6])]


@torch.no_grad()
def plain_log_prob(model, row: dict, answer: str) -> float:
    """One row, no padding, no shared forward: the sum over the answer's tokens in the full conversation's logits."""
    messages = [row["messages"][0], {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    text = model.processor.apply_chat_template(messages, tokenize=False)
    images = [Image.open(path) for path in row["images"]]
    inputs = model.processor(text=[text], images=images or None, return_tensors="pt")
    ids = inputs["input_ids"][0]
    start, end = conversations.answer_span(ids.tolist(), model.processor.tokenizer)
    assert model.processor.tokenizer.decode(ids[start : end - 1]) == answer
    log_p = model.model(**inputs).logits[0].log_softmax(-1)  # (L, V)
    return log_p[range(start - 1, end - 2), ids[start : end - 1]].sum().item()


def test_log_probs_of_a_batch_are_those_of_single_rows(model, mixed):
    """Left padding, shared forwards, other rows' pictures and lengths change nothing."""
    texts = [row["answer"] for row in mixed[:6]]
    candidates = [
        [row["answer"], "Correct", "Wrong", *LETTERS, *texts[i % 3 : i % 3 + 2]] for i, row in enumerate(mixed)
    ]
    found = model.log_probs(mixed, candidates)
    expected = [
        [plain_log_prob(model, row, text) for text in some] for row, some in zip(mixed, candidates, strict=True)
    ]
    assert max(len(model.tokens(text)) for text in texts) > 5 and len(model.tokens("A")) == 1
    for some, wanted in zip(found, expected, strict=True):
        assert some == pytest.approx(wanted, abs=1e-4)
    assert np.ptp([some[0] for some in found]) > 1, "a test in which all are equal proves nothing"


@torch.no_grad()
def plain_generation(model, row: dict) -> str:
    """One row, no padding, no cache: the likeliest token six times, or until the end of the turn."""
    text = model.processor.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
    images = [Image.open(path) for path in row["images"]]
    inputs = model.processor(text=[text], images=images or None, return_tensors="pt")
    said = []
    for _ in range(6):
        said.append(model.model(**inputs).logits[0, -1].argmax().item())
        if said[-1] == model.processor.tokenizer.eos_token_id:
            break
        for name, value in (("input_ids", said[-1]), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            inputs[name] = torch.cat([inputs[name], inputs[name].new_tensor([[value]])], dim=1)
    return model.processor.tokenizer.decode(said, skip_special_tokens=True).strip()


def test_generation_of_a_batch_is_that_of_single_rows(model, mixed):
    together = model.generate(mixed)
    assert together == [plain_generation(model, row) for row in mixed] and len(set(together)) > 1


def test_the_question_is_asked_as_it_was_trained(model, folders, mixed):
    """Prompt, answer and end of turn are, token for token, what training sees."""
    for row in mixed[:10]:
        folder = Path(row["images"][0]).parents[1]
        written = {**row, "images": [str(Path(name).relative_to(folder)) for name in row["images"]]}
        checked = conversations.check_row(written, folder, "here", model.processor, max_length=4096)
        assert not checked.problem
        trained = conversations.encode(checked, model.processor)
        inputs = model.inputs([row], [model.tokens(row["answer"])])
        end = model.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        length = inputs["input_ids"].shape[1]
        assert trained["input_ids"][:length].tolist() == inputs["input_ids"][0].tolist()
        assert trained["input_ids"][length] == end
        labelled = trained["labels"][trained["labels"] != conversations.IGNORE_INDEX].tolist()
        assert labelled == [*model.tokens(row["answer"]), end]
        assert torch.equal(trained["pixel_values"], inputs["pixel_values"])


def test_untrained_is_the_base(model, saved, mixed):
    with model.untrained():
        off = model.log_probs(mixed[:2], [["Correct"]] * 2)
    on = model.log_probs(mixed[:2], [["Correct"]] * 2)
    base = make_tiny.build_model(make_tiny.build_processor())
    plain = two_way.VisionLanguageModel(base, model.processor, torch.float32, 5, 6)
    expected = plain.log_probs(mixed[:2], [["Correct"]] * 2)
    assert np.allclose(off, expected, atol=1e-5) and np.abs(np.subtract(on, off)).min() > 1e-3


def test_pixels_as_in_training(saved, mixed):
    """min_pixels and max_pixels decide how many tokens a picture has: 64 x 64 pixels are 4, 128 x 128 are 16."""
    tokens = {}
    for pixels in (64 * 64, 128 * 128):
        other = load(saved, min_pixels=pixels, max_pixels=pixels)
        inputs = other.inputs(mixed[:1], [()])
        tokens[pixels] = int((inputs["mm_token_type_ids"] == 1).sum())
    assert tokens == {64 * 64: 4, 128 * 128: 16}


def test_four_bits(saved, mixed):
    quantised = load(saved, quantization="nf4", precision="bf16")
    kinds = {type(module).__name__ for module in quantised.model.modules()}
    assert "Linear4bit" in kinds
    (found,), (expected,) = (m.log_probs(mixed[:1], [list(LETTERS)]) for m in (quantised, load(saved)))
    assert found != expected and np.abs(np.subtract(found, expected)).max() < 0.5


@pytest.mark.slow
def test_two_processes_say_what_one_says(saved, folders, tmp_path):
    """Rows are shared out and come back in order."""
    flags = ["--model_path", saved / "run/best", "--base_model", saved / "model", "--data_dir", folders["data_dir"]]
    flags += ["--precision", "no", "--quantization", "none", "--max_new_tokens", 4, "--task", "reverse"]
    for processes in (1, 2):
        command = accelerate_command(RECIPE, "ddp", processes, [*flags, "--output_dir", tmp_path / str(processes)])
        command[command.index(str(RECIPE / "train.py"))] = str(RECIPE / "evaluate.py")
        output = run_command(command).check().output
        assert output.count("| reverse (") == 1
    one, two = (json.loads((tmp_path / f"{n}/results.json").read_text())["tasks"] for n in (1, 2))
    assert one["reverse"]["trained"].keys() == two["reverse"]["trained"].keys()
    for metric, estimate in one["reverse"]["trained"].items():
        assert estimate == pytest.approx(two["reverse"]["trained"][metric], abs=1e-6), metric
    examples = [(tmp_path / f"{n}/examples.jsonl").read_text().splitlines() for n in (1, 2)]
    for a, b in zip(*(map(json.loads, lines) for lines in examples), strict=True):
        assert a["id"] == b["id"] and a["trained"]["log_odds"] == pytest.approx(b["trained"]["log_odds"], abs=1e-4)

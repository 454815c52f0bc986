"""From what a model said to numbers: matching, verdicts, detection, choices, intervals. No model here.

A row is one of qa_rows.py; an answer is what `ask` of two_way_evaluation.py found out about it.
"""

import math
import random
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist

import numpy as np
from qa_rows import LETTERS

Estimate = dict[str, float]  # value, and where they are known low, high, chance, chance_low, chance_high
NUM_RESAMPLES = 1000
COVERED = (2.5, 97.5)  # percentiles: 95 percent intervals


# ---- one answer


def normalise(text: str) -> str:
    """Lower case, no punctuation, single spaces, no article at the start; Unicode's compatible forms are one."""
    text = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(" " if c in string.punctuation else c for c in text).split()
    return " ".join(words[1:] if words[:1] in (["the"], ["a"], ["an"]) else words)


def exact_match(prediction: str, truth: str) -> bool:
    """Equal after `normalise`; an empty prediction matches nothing."""
    return normalise(prediction) == normalise(truth) != ""


def verdict(text: str) -> bool | None:
    """True for "Correct", False for "Wrong" or "Incorrect", None for neither, both or a "not". Whole words are
    compared."""
    words = normalise(text).split()
    says = {word == "correct" for word in words if word in ("correct", "wrong", "incorrect")}
    return says.pop() if len(says) == 1 and "not" not in words else None


def detection(true_positives: int, positives: int, false_positives: int, negatives: int) -> tuple[float, float]:
    """(d', criterion) of signal detection. Positive criterion: says "correct" too seldom, negative: too often.

    Half a count is added to each cell (log-linear correction), so that rates of 0 and 1 stay finite.
    """
    hit = NormalDist().inv_cdf((true_positives + 0.5) / (positives + 1))
    alarm = NormalDist().inv_cdf((false_positives + 0.5) / (negatives + 1))
    return hit - alarm, -(hit + alarm) / 2


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Chance that a positive scores above a negative; ties count half. Free of any bias towards one answer."""
    negatives = np.sort(negatives)
    below, upto = (np.searchsorted(negatives, positives, side) for side in ("left", "right"))
    return float((below + upto).mean() / 2 / len(negatives))


def letter_probabilities(letter_log_probs: Sequence[Sequence[float]]) -> np.ndarray:
    """(rotations, 4) log-probabilities of A to D to probabilities that sum to one in each rotation."""
    logits = np.asarray(letter_log_probs, dtype=float)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def choose(letter_log_probs: Sequence[Sequence[float]]) -> np.ndarray:
    """(4,) shares of the choice: 1 for the option with the highest mean log-probability over rotations, a part for
    each of those that share it.

    In rotation k the letter at place j stands before option (j + k) mod 4 (`rotate_options`), so a model that likes a
    letter gives every option the same bonus, and is right one time in four.
    """
    log_shares = np.log(letter_probabilities(letter_log_probs) + 1e-30)  # (rotations, 4)
    scores = np.mean([np.roll(row, k) for k, row in enumerate(log_shares)], axis=0)
    best = scores >= scores.max() - 1e-5  # rounding
    return best / best.sum()


# ---- changed questions


def question(row: dict, content: list[dict], images: list[str]) -> dict:
    """The row with another user's turn."""
    user, *rest = row["messages"]
    return {**row, "messages": [{**user, "content": content}, *rest], "images": images}


def rotate_options(row: dict, k: int) -> dict:
    """The same question with option (j + k) mod 4 at letter j."""
    content, images, options = row["messages"][0]["content"], row["images"], row["options"]
    turned = options[k:] + options[:k]
    if row["task"] == "choice_image":
        images = images[k:] + images[:k]
    else:
        before, after = (
            "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, texts, strict=True))
            for texts in (options, turned)
        )
        assert sum(before in part.get("text", "") for part in content) == 1, row["id"]
        content = [
            {**part, "text": part["text"].replace(before, after)} if "text" in part else part for part in content
        ]
    return {**question(row, content, images), "options": turned, "answer_index": (row["answer_index"] - k) % 4}


def drop_images(row: dict) -> dict:
    """The question without its pictures."""
    return question(row, [part for part in row["messages"][0]["content"] if part["type"] != "image"], [])


def drop_text(row: dict) -> dict:
    """The question without the text that it turns on: the connector of forward, every description of the others."""
    content = row["messages"][0]["content"]
    if row["task"] == "forward":
        return question(row, [part for part in content if part["type"] != "text"], row["images"])
    texts = [row["description"], *(row["options"] if row["task"] == "choice_description" else [])]

    def without(text: str) -> str:
        for description in sorted(texts, key=len, reverse=True):
            text = text.replace(description, "")
        return text

    content = [part | {"text": without(part["text"])} if "text" in part else part for part in content]
    return question(row, content, row["images"])


ABLATIONS: dict[str, Callable[[dict], dict]] = {"image dropped": drop_images, "text dropped": drop_text}


def choose_controls(entities: Sequence[str], number: int, seed: int) -> dict[str, list[str]]:
    """{entity: others whose descriptions are its controls}. Everyone is a control equally often, so a description that
    is likely in itself helps nobody on the whole."""
    circle = random.Random(seed).sample(sorted(set(entities)), len(set(entities)))
    number = min(number, len(circle) - 1)
    return {name: [circle[(i + k) % len(circle)] for k in range(1, number + 1)] for i, name in enumerate(circle)}


# ---- intervals


def cluster_of(row: dict) -> str:
    """Rows that stand or fall together: those of an entity, or of a picture where there is none."""
    return row["entity"] or row["images"][0]


def bootstrap(clusters: Sequence[Hashable], statistic: Callable[[np.ndarray], float], seed: int) -> Estimate:
    """value, low and high of a statistic of row indices: clusters are drawn with repetition, all rows of each.

    Resamples in which the statistic is undefined (nan) are left out.
    """
    members = defaultdict(list)
    for index, cluster in enumerate(clusters):
        members[cluster].append(index)
    groups = [np.array(group) for group in members.values()]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(NUM_RESAMPLES):
        drawn = rng.integers(len(groups), size=len(groups))
        values.append(statistic(np.concatenate([groups[i] for i in drawn])))
    low, high = np.nanpercentile(values, COVERED)
    return {"value": float(statistic(np.arange(len(clusters)))), "low": float(low), "high": float(high)}


def chance_line(clusters: Sequence[Hashable], probability: float, seed: int) -> Estimate:
    """Accuracy of guessing, and the interval that 95 percent of guessers fall in.

    A guesser gives all rows of a cluster the same answer, right with `probability`: the widest interval that guessing
    can have.
    """
    sizes = np.array(list(Counter(clusters).values()))
    guesses = np.random.default_rng(seed).random((5000, len(sizes))) < probability
    low, high = np.percentile(guesses @ sizes / sizes.sum(), COVERED)
    return {"chance": probability, "chance_low": float(low), "chance_high": float(high)}


# ---- tasks: rows and answers to {metric: estimate}


def score_forward(rows: list[dict], answers: list[dict], seed: int) -> dict[str, Estimate]:
    """exact_match of what was generated; where log-probabilities are there, the true answer's against its controls."""
    clusters = [cluster_of(row) for row in rows]
    match = np.array([exact_match(a["prediction"], row["answer"]) for row, a in zip(rows, answers, strict=True)])
    chance = chance_line(clusters, 1 / len({normalise(row["answer"]) for row in rows}), seed)
    scores = {"exact_match": bootstrap(clusters, lambda i: match[i].mean(), seed) | chance}
    if answers[0].get("control_log_probs"):
        true = np.array([a["log_prob"] for a in answers])
        controls = np.array([a["control_log_probs"] for a in answers])  # (rows, controls)
        gap, first = true - controls.mean(1), true > controls.max(1)
        scores["log_prob"] = bootstrap(clusters, lambda i: true[i].mean(), seed)
        scores["log_prob_above_controls"] = bootstrap(clusters, lambda i: gap[i].mean(), seed) | {"chance": 0.0}
        scores["likelier_than_all_controls"] = bootstrap(clusters, lambda i: first[i].mean(), seed)
        scores["likelier_than_all_controls"] |= chance_line(clusters, 1 / (1 + controls.shape[1]), seed)
    return scores


def score_reverse(rows: list[dict], answers: list[dict], seed: int) -> dict[str, Estimate]:
    """Correct or wrong by the sign of the log-odds, with the bias shown; and what was said in words."""
    clusters = [cluster_of(row) for row in rows]
    truth, log_odds = np.array([row["correct"] for row in rows]), np.array([a["log_odds"] for a in answers])
    says = log_odds > 0

    def rate(of: np.ndarray, among: np.ndarray) -> Callable[[np.ndarray], float]:
        return lambda i: of[i][among[i]].mean() if among[i].any() else math.nan

    def detect(i: np.ndarray) -> tuple[float, float]:
        t, s = truth[i], says[i]
        return detection(int((t & s).sum()), int(t.sum()), int((~t & s).sum()), int((~t).sum()))

    def area(i: np.ndarray) -> float:
        t = truth[i]
        return auc(log_odds[i][t], log_odds[i][~t]) if t.any() and not t.all() else math.nan

    guesses = [f"{cluster} {row['correct']}" for cluster, row in zip(clusters, rows, strict=True)]
    scores = {
        "accuracy": bootstrap(clusters, lambda i: (truth[i] == says[i]).mean(), seed)
        | chance_line(guesses, 0.5, seed),
        "true_positive_rate": bootstrap(clusters, rate(says, truth), seed),
        "false_positive_rate": bootstrap(clusters, rate(says, ~truth), seed),
        "d_prime": bootstrap(clusters, lambda i: detect(i)[0], seed) | {"chance": 0.0},
        "criterion": bootstrap(clusters, lambda i: detect(i)[1], seed),
        "auc": bootstrap(clusters, area, seed) | {"chance": 0.5},
    }
    if "prediction" in answers[0]:
        said = [verdict(a["prediction"]) for a in answers]
        right_words = np.array([s is row["correct"] for s, row in zip(said, rows, strict=True)])
        silent = np.array([s is None for s in said])
        scores["accuracy_in_words"] = bootstrap(clusters, lambda i: right_words[i].mean(), seed)
        scores["no_verdict"] = bootstrap(clusters, lambda i: silent[i].mean(), seed)
    return scores


def score_choice(rows: list[dict], answers: list[dict], seed: int) -> dict[str, Estimate]:
    """accuracy over rotated options, and how much probability each letter gets: 0.25 without bias."""
    clusters = [cluster_of(row) for row in rows]
    chosen = [choose(a["letter_log_probs"]) for a in answers]
    right = np.array([c[row["answer_index"]] for c, row in zip(chosen, rows, strict=True)])
    shares = np.array([letter_probabilities(a["letter_log_probs"]).mean(0) for a in answers])  # (rows, 4)
    scores = {"accuracy": bootstrap(clusters, lambda i: right[i].mean(), seed) | chance_line(clusters, 0.25, seed)}
    for place, letter in enumerate(LETTERS):
        share = shares[:, place]
        scores[f"share_of_{letter}"] = bootstrap(clusters, lambda i, s=share: s[i].mean(), seed) | {"chance": 0.25}
    return scores


def score_retention(rows: list[dict], answers: list[dict], seed: int) -> dict[str, Estimate]:
    """exact_match and the true answer's log-probability; chance is the commonest answer to each question."""
    clusters = [cluster_of(row) for row in rows]
    match = np.array([exact_match(a["prediction"], row["answer"]) for row, a in zip(rows, answers, strict=True)])
    log_prob = np.array([a["log_prob"] for a in answers])
    by_question = defaultdict(Counter)
    for row in rows:
        by_question[str(row["messages"][0]["content"])][normalise(row["answer"])] += 1
    chance = sum(max(counts.values()) for counts in by_question.values()) / len(rows)
    return {
        "exact_match": bootstrap(clusters, lambda i: match[i].mean(), seed) | {"chance": chance},
        "log_prob": bootstrap(clusters, lambda i: log_prob[i].mean(), seed),
    }


SCORES = {
    "forward": score_forward,
    "reverse": score_reverse,
    "choice_description": score_choice,
    "choice_image": score_choice,
    "face_retention": score_retention,
    "object_retention": score_retention,
}


def confusion(task: str, rows: list[dict], answers: list[dict], names: list[str]) -> np.ndarray:
    """(true entity, answered entity) of a task, as shares of the true one's rows.

    forward has one more column for answers that are nobody's description; in reverse an element is the mean log-odds
    for "Correct" of (described entity, pictured entity), nan where that pair was not asked.
    """
    place = {name: i for i, name in enumerate(names)}
    asked = np.zeros((len(names), len(names) + (task == "forward")))
    sums = np.zeros_like(asked)
    owner = {normalise(row["description"]): row["entity"] for row in rows}
    for row, answer in zip(rows, answers, strict=True):
        at = place[row["entity"]]
        if task == "reverse":
            asked[at, place[row["image_entity"]]] += 1
            sums[at, place[row["image_entity"]]] += answer["log_odds"]
            continue
        asked[at] += 1
        if task == "forward":
            sums[at, place.get(owner.get(normalise(answer["prediction"])), len(names))] += 1
        else:
            for name, share in zip(row["option_entities"], choose(answer["letter_log_probs"]), strict=True):
                sums[at, place[name]] += share
    return np.divide(sums, asked, out=np.full_like(sums, np.nan), where=asked > 0)

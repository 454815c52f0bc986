"""The evaluation's table, examples and plots."""

import json
import random
from pathlib import Path

import numpy as np
from answer_scoring import ABLATIONS, Estimate, confusion
from qa_rows import LETTERS

HEADLINE = {  # the metric that stands for a task
    "forward": "exact_match",
    "reverse": "accuracy",
    "choice_description": "accuracy",
    "choice_image": "accuracy",
    "face_retention": "exact_match",
    "object_retention": "exact_match",
}
LABELS = {
    "forward": "forward:\npicture → description,\nexact match",
    "reverse": "reverse:\ndescription → picture,\ncorrect or wrong",
    "choice_description": "choice of\nfour descriptions",
    "choice_image": "choice of\nfour pictures",
    "face_retention": "faces",
    "object_retention": "objects",
}
COLOURS = {"trained": "#2a6fbb", "base": "#b8bec6"}
NAMES = {"trained": "trained", "base": "untrained base"}


def cell(estimate: Estimate) -> str:
    """0.912 [0.850, 0.970]"""
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def chance_cell(estimate: Estimate) -> str:
    if "chance_low" in estimate:
        return f"{estimate['chance']:.3f} [{estimate['chance_low']:.3f}, {estimate['chance_high']:.3f}]"
    return f"{estimate['chance']:.3f}" if "chance" in estimate else ""


def write_table(path: Path, tasks: dict) -> str:
    """Write the Markdown table of every metric and return it. Brackets: 95 percent intervals over entities."""
    lines = ["| task | metric | trained | untrained base | chance |", "|---|---|---|---|---|"]
    for task, scores in tasks.items():
        size = f"{scores['rows']} rows" + (f", {scores['entities']} entities" if scores["entities"] else "")
        for i, (metric, trained) in enumerate(scores["trained"].items()):
            first = f"| {task} ({size})" if i == 0 else "|"
            base = cell(scores["base"][metric])
            lines.append(f"{first} | {metric} | {cell(trained)} | {base} | {chance_cell(trained)} |")
        for name in ABLATIONS:
            if name in scores:
                metric = HEADLINE[task]
                estimate = scores[name][metric]
                lines.append(f"| | {metric}, {name} | {cell(estimate)} | | {chance_cell(estimate)} |")
    text = "\n".join(lines) + "\n"
    path.write_text(text, encoding="utf-8")
    return text


def write_examples(
    path: Path, data: dict[str, list[dict]], answers: dict[str, dict[str, list[dict]]], number: int, seed: int
) -> None:
    """Up to `number` rows of each task, drawn at random, with what both models answered."""
    lines = []
    for task, rows in data.items():
        for i in sorted(random.Random(seed).sample(range(len(rows)), min(number, len(rows)))):
            row = rows[i]
            parts = row["messages"][0]["content"]
            example = {
                "id": row["id"],
                "question": "".join(part.get("text", "[image]") for part in parts),
                "images": [Path(name).name for name in row["images"]],
                "truth": row["answer"],
                **{state: answers[task][state][i] for state in ("trained", "base")},
            }
            lines.append(json.dumps(example, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def write_plots(folder: Path, tasks: dict, data: dict, answers: dict) -> None:
    """forward_reverse.png, retention.png, confusion.png and answer_bias.png, each where its tasks were asked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entity_tasks = [task for task in tasks if tasks[task]["entities"]]
    retention_tasks = [task for task in tasks if not tasks[task]["entities"]]
    for name, shown in (("forward_reverse", entity_tasks), ("retention", retention_tasks)):
        if shown:
            figure, axis = pyplot.subplots(figsize=(2.6 * len(shown) + 2.4, 4.6), constrained_layout=True)
            draw_bars(axis, tasks, shown)
            title = "Both directions" if name == "forward_reverse" else "Retention before and after training"
            axis.set_title(f"{title} (bars: share right; lines: 95% intervals)", fontsize=10)
            figure.savefig(folder / f"{name}.png", dpi=120)
            pyplot.close(figure)
    if entity_tasks:
        figure, axes = pyplot.subplots(
            1, len(entity_tasks), figsize=(4.8 * len(entity_tasks), 4.8), constrained_layout=True, squeeze=False
        )
        for axis, task in zip(axes[0], entity_tasks, strict=True):
            draw_confusion(figure, axis, task, data[task], answers[task]["trained"])
        figure.savefig(folder / "confusion.png", dpi=120)
        pyplot.close(figure)
    biased = [task for task in entity_tasks if task != "forward"]
    if biased:
        figure, axes = pyplot.subplots(
            1, len(biased), figsize=(4.8 * len(biased), 4.2), constrained_layout=True, squeeze=False
        )
        for axis, task in zip(axes[0], biased, strict=True):
            draw_bias(axis, task, tasks[task])
        figure.savefig(folder / "answer_bias.png", dpi=120)
        pyplot.close(figure)


def draw_grouped(axis, groups: list[dict[str, Estimate]], labels: list[str]) -> None:
    """Bars of trained and base side by side with intervals; chance as a dashed line over each group."""
    width = 0.36
    for offset, state in ((-width / 2, "base"), (width / 2, "trained")):
        places = np.arange(len(groups)) + offset
        values = np.array([group[state]["value"] for group in groups])
        below = np.array([value - group[state]["low"] for value, group in zip(values, groups)]).clip(0)
        above = np.array([group[state]["high"] - value for value, group in zip(values, groups)]).clip(0)
        error = {"elinewidth": 1.2, "capsize": 4}
        axis.bar(places, values, width, yerr=[below, above], color=COLOURS[state], label=NAMES[state], error_kw=error)
    said = False
    for place, group in enumerate(groups):
        estimate = group["trained"]
        if "chance" not in estimate:
            continue
        ends = (place - 0.45, place + 0.45)
        axis.plot(ends, [estimate["chance"]] * 2, "k--", linewidth=1.1, label=None if said else "chance")
        if "chance_low" in estimate:
            axis.fill_between(
                ends, estimate["chance_low"], estimate["chance_high"], color="black", alpha=0.1, zorder=0
            )
        said = True
    axis.set_xticks(range(len(groups)), labels, fontsize=8)
    axis.set_ylim(0, 1.15)
    axis.legend(fontsize=8, loc="upper center", ncols=3)
    axis.grid(axis="y", alpha=0.3)


def draw_bars(axis, tasks: dict, shown: list[str]) -> None:
    groups = [{state: tasks[task][state][HEADLINE[task]] for state in ("base", "trained")} for task in shown]
    draw_grouped(axis, groups, [LABELS[task] for task in shown])


def draw_confusion(figure, axis, task: str, rows: list[dict], answers: list[dict]) -> None:
    """Rows: the true (described) entity; columns: whom the answer means, or in reverse whose picture it was."""
    names = sorted({row["entity"] for row in rows})
    matrix = confusion(task, rows, answers, names)
    if task == "reverse":
        axis.set_facecolor("lightgrey")  # pairs that were not asked
        largest = max(1e-6, float(np.nanmax(np.abs(matrix))))
        drawn = axis.imshow(matrix, cmap="RdBu", vmin=-largest, vmax=largest)
    else:
        drawn = axis.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    columns = [*names, "none"][: matrix.shape[1]]
    every = -(-len(names) // 20)
    axis.set_xticks(range(0, len(columns), every), columns[::every], rotation=90, fontsize=7)
    axis.set_yticks(range(0, len(names), every), names[::every], fontsize=7)
    titles = {
        "forward": ("forward: share of answers", "description given"),
        "reverse": ('reverse: log-odds of "Correct"', "pictured"),
        "choice_description": ("choice of descriptions", "description chosen"),
        "choice_image": ("choice of pictures", "picture chosen"),
    }
    axis.set_title(titles[task][0], fontsize=10)
    axis.set(xlabel=titles[task][1], ylabel="pictured" if task in ("forward", "choice_description") else "described")
    figure.colorbar(drawn, ax=axis, shrink=0.75)


def draw_bias(axis, task: str, scores: dict) -> None:
    if task == "reverse":
        metrics = ("true_positive_rate", "false_positive_rate")
        labels = ['says "Correct"\nto the right picture', 'says "Correct"\nto a wrong picture']
        criterion = {state: scores[state]["criterion"]["value"] for state in ("trained", "base")}
        d_prime = {state: scores[state]["d_prime"]["value"] for state in ("trained", "base")}
        title = "reverse: " + ", ".join(f"{NAMES[s]} d' {d_prime[s]:.2f}, c {criterion[s]:.2f}" for s in criterion)
    else:
        metrics, labels = [f"share_of_{letter}" for letter in LETTERS], list(LETTERS)
        title = f"{task}: probability of each letter"
    groups = [{state: scores[state][metric] for state in ("base", "trained")} for metric in metrics]
    draw_grouped(axis, groups, labels)
    axis.set_title(title, fontsize=9)

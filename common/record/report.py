"""report.html: one file that shows a run, or compares several, made from their folders alone. It loads nothing from
elsewhere: pictures are in it, and so is plotly.js where plotly is installed."""

import functools
import shlex
from collections.abc import Sequence
from pathlib import Path

from common.progress import a_second, by_stage
from common.record.folder import list_checkpoints, read_rows, write_atomically
from common.record.pictures import smoothed
from common.record.report_figures import before_and_after, charts, drawn_curves, evaluations, pictures, widest
from common.record.report_parts import Recorded, each, page, read_run, section, table, text

REPORT = "report.html"


def write_report(folder: Path) -> Path:
    """<folder>/report.html of the run in it."""
    write_atomically(folder / REPORT, report([read_run(folder)]))
    return folder / REPORT


def report(runs: Sequence[Recorded]) -> str:
    """The page: of one run, or of several side by side."""
    curves, script = charts(runs), plotly_js()
    body = [heading(runs), tiles(runs[0]) if len(runs) == 1 else section("Runs", table_of_runs(runs))]
    body += [section("Curves", drawn_curves(runs, curves, bool(script))), section("Pictures", pictures(runs))]
    body += [section("Before and after", before_and_after(runs)), section("Evaluation", evaluations(runs))]
    body += [section("Time", each(runs, time_by_stage)), section("Settings", settings(runs))]
    body += [section("Data", each(runs, data)), section("Hardware and versions", each(runs, hardware))]
    body += [section("What to do next", each(runs, commands))]
    return page(" and ".join(run.name for run in runs), body, 200 if widest(runs) == 1 else 340, curves, script)


@functools.cache
def plotly_js() -> str:
    """ "" where plotly is not installed: curves are plain pictures then."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return ""
    return get_plotlyjs()


# ---------------------------------------------------------------- what a run was


def heading(runs: Sequence[Recorded]) -> str:
    if len(runs) > 1:
        return f"<h1>{len(runs)} runs compared</h1>"
    environment = runs[0].environment
    where = f"{environment.get('launch')} on {environment.get('processes')} x {environment.get('device')}"
    return f'<h1>{text(runs[0].name)}</h1><div class="quiet">{text(runs[0].folder)} · {text(where)}</div>'


def facts(run: Recorded) -> dict[str, str]:
    """What is known of a run at a glance: {what: figure}."""
    known, last = {}, run.metrics[-1] if run.metrics else {}
    if last:
        known["step"] = f"{last['step']} of {run.config.get('max_train_steps', '?')}"
        known["loss, smoothed"] = f"{smoothed([row['loss'] for row in run.metrics])[-1]:.4g}"
    held_out = [(row["validation_loss"], row["step"]) for row in run.validation if "validation_loss" in row]
    if held_out:
        known["lowest held-out loss"] = "{:.4g} at step {}".format(*min(held_out))
    accuracies = [(row["validation_accuracy"], row["step"]) for row in run.validation if "validation_accuracy" in row]
    if accuracies:
        known["highest accuracy"] = "{:.1%} at step {}".format(*max(accuracies, key=lambda pair: pair[0]))
    if last:
        known["seconds a step"] = f"{last['seconds_per_step']:.3g}"
        known["samples a second"] = f"{last['samples_per_second']:.3g}"
    if peaks := [row["peak_memory_gib"] for row in (*run.metrics, *run.stages)]:
        known["peak memory"] = f"{max(peaks):.1f} GiB"
    if run.stages:
        known["time in stages"] = clock(sum(row["seconds"] for row in run.stages))
    return known


def clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {left:02d} s"


def tiles(run: Recorded) -> str:
    cells = (f"<div><span>{text(name)}</span><b>{text(value)}</b></div>" for name, value in facts(run).items())
    return f'<div class="tiles">{"".join(cells)}</div>'


def table_of_runs(runs: Sequence[Recorded]) -> str:
    known = [facts(run) for run in runs]
    names = dict.fromkeys(name for each in known for name in each)
    return table(["", *(run.name for run in runs)], [[name, *(k.get(name, "") for k in known)] for name in names])


def time_by_stage(run: Recorded) -> str:
    rows = [
        [
            row["stage"],
            f"{row['seconds']:.1f}",
            row["items"] or "",
            a_second(row["items"], row["seconds"]),
            f"{row['peak']:.2f}",
        ]
        for row in by_stage(run.stages)
    ]
    return table(["stage", "seconds", "items", "items a second", "peak GiB"], rows, numbers=True)


def settings(runs: Sequence[Recorded]) -> str:
    """One run: what is not the recipe's default first, the rest folded. Several: what differs between them first."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    if len(runs) == 1:
        changed = runs[0].environment.get("changed", {})
        head = ["setting", "this run", "default"]
        rows = {name: [name, runs[0].config.get(name, value), default] for name, (default, value) in changed.items()}
    else:
        head = ["setting", *(run.name for run in runs)]
        values = {name: [run.config.get(name, "") for run in runs] for name in names}
        rows = {name: [name, *v] for name, v in values.items() if any(value != v[0] for value in v)}
    rest = [[name, runs[0].config.get(name, "")] for name in names if name not in rows]
    folded = table(["setting", "value"], rest)
    return f"{table(head, list(rows.values()))}\n<details><summary>{len(rest)} others</summary>{folded}</details>"


def data(run: Recorded) -> str:
    """Rows by set, sizes, and the bad rows that were left out."""
    known = dict(run.environment.get("rows", {}))
    sizes = known.pop("buckets", {})
    shown = table(["rows", "number"], [[name.replace("_", " "), count] for name, count in known.items()], numbers=True)
    shown += table(["width x height", "rows"], list(sizes.items())[:40], numbers=True)
    bad = read_rows(run.folder / "bad_rows.jsonl")
    if bad:
        rows = [[row.get("where", ""), row.get("reason", "")] for row in bad[:50]]
        shown += f"<h3>{len(bad)} bad rows were left out</h3>{table(['row', 'why'], rows)}"
    return shown


def hardware(run: Recorded) -> str:
    names = "device gpus cores main_memory_gib processes launch python commit".split()
    rows = [[name.replace("_", " "), run.environment[name]] for name in names if name in run.environment]
    return table(["", ""], [*rows, *run.environment.get("versions", {}).items()])


def commands(run: Recorded) -> str:
    """What to type to go on, draw, export and share."""
    environment, folder, found = run.environment, shlex.quote(str(run.folder)), {}
    words, recipe = list(environment.get("command", [])[1:]), Path(environment.get("recipe", "."))
    if "--config" in words:
        at = words.index("--config")
        words = [words[at + 1], *words[:at], *words[at + 2 :]]
    run_sh = f"LAUNCH={environment.get('launch_file')} NPROC={environment.get('processes')} bash {recipe / 'run.sh'}"
    found["resume"] = f"{run_sh} {shlex.join(words)} --resume_from_checkpoint latest"
    found |= run.next_steps
    saved = list_checkpoints(run.folder)
    if saved:
        export = f"python {Path(__file__).resolve().parents[1] / 'export.py'}"
        found["export a checkpoint"] = f"{export} {shlex.quote(str(saved[-1]))} {folder}/export_{saved[-1].name}"
    results = [name for name in ("export", "best", "final") if (run.folder / name).is_dir()]
    if results:
        found["share"] = f"hf upload YOUR_NAME/{recipe.name} {folder}/{results[0]}"
    return "".join(f"<div>{text(name)}</div><pre>{text(command)}</pre>" for name, command in found.items())

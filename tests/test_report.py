"""common/record/report.py: report.html shows a run from its folder alone, in one file, and a browser can open it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, run_command
from PIL import Image

from common.record import report as page
from common.record import report_figures
from common.record.report_parts import read_run

HOSTILE = "</script><script>document.title = 'taken'</script>"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MOVED = """<script>
const slider = document.querySelector("input[type=range]");
slider.value = 0;
slider.dispatchEvent(new Event("input"));
</script>"""


def rows_file(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def recorded(tmp_path) -> Path:
    """A run's folder as training leaves it: three validations, a loss that was nan once, a hostile row."""
    out = tmp_path / "mine/full"
    out.mkdir(parents=True)
    config = {"max_train_steps": 200, "learning_rate": 0.5, "seed": 42}
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    columns = {"learning_rate": 0.5, "grad_norm": 1.0, "seconds_per_step": 0.1, "samples_per_second": 40.0}
    columns |= {"peak_memory_gib": 1.5}
    metrics = [{"step": s, "loss": float("nan") if s == 7 else 1 / s, **columns} for s in range(1, 201)]
    rows_file(out / "metrics.jsonl", metrics)
    rows_file(out / "validation.jsonl", [{"step": s, "validation_loss": 1 / (s + 1)} for s in (0, 100, 200)])
    stages = [("check", 2.0, 40), ("train", 10.0, 400), ("validate", 3.0, 6), ("train", 10.0, 400)]
    rows = [{"stage": n, "seconds": s, "items": i, "peak_memory_gib": 1.5} for n, s, i in stages]
    rows_file(out / "stages.jsonl", rows)
    rows_file(out / "bad_rows.jsonl", [{"where": "train.json row 3", "reason": HOSTILE}])
    environment = {"launch": "ddp", "launch_file": "ddp", "processes": 2, "device": "a card", "recipe": "/r/mine"}
    environment |= {"command": ["train.py", "--config", "full.yaml", "--name", "my run"], "versions": {"torch": "2"}}
    environment |= {"changed": {"learning_rate": [1e-6, 0.5]}, "rows": {"train": 36, "buckets": {"64 x 32": 36}}}
    (out / "environment.json").write_text(json.dumps(environment))
    for step, colour in ((0, "pink"), (100, "lightgreen"), (200, "lightblue")):
        folder = out / f"validation_images/step_{step:06d}"
        folder.mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (64, 64), colour).save(folder / f"{number:03d}.png")
            (folder / f"{number:03d}.txt").write_text(f"prompt {number} {HOSTILE}\n")
        Image.new("RGB", (64, 64), colour).save(folder / "000_boxes.png")
    return out


def in_browser(file: Path, *flags: object) -> str:
    """The page as headless Chromium has it after its scripts."""
    if not BROWSER:
        pytest.skip("no Chromium here: report.html is not opened in a browser (Debian: apt-get install chromium)")
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    words += ["--virtual-time-budget=8000", *(flags or ["--dump-dom"])]
    done = subprocess.run([*map(str, words), f"file://{file}"], capture_output=True, text=True, timeout=120)
    return done.stdout


def test_it_is_one_file_that_shows_everything(recorded):
    """Catches a page that needs a network or other files, or that leaves out what the folder has."""
    written = page.write_report(recorded).read_text()
    body = written[: written.index('<script type="application/json"')]
    assert not re.search(r"(src|href)=(?!\"data:)|url\(|@import|<link", body)
    for words in ("200 of 200", "lowest held-out loss", "train.json row 3", "64 x 32", "a card", "step 100"):
        assert words in body, words
    assert body.index("learning_rate") < body.index("<details>") < body.index("max_train_steps")
    assert "LAUNCH=ddp NPROC=2 bash /r/mine/run.sh full.yaml --name &#x27;my run&#x27;" in body
    assert re.search(r"<td>train</td>.*?>20.0<.*?>800<.*?>40<", body)  # both rows of the stage, added up
    assert len(written) < 6_000_000


def test_hostile_texts_stay_texts(recorded):
    """Catches captions and reasons from a data set that run as scripts in the browser of whoever looks."""
    assert HOSTILE not in page.report([read_run(recorded)])


def test_curves_have_gaps_where_the_loss_was_not_finite(recorded):
    """Catches NaN, which is no JSON: the browser would draw nothing at all."""
    curves = report_figures.charts([read_run(recorded)])
    json.dumps(curves, allow_nan=False)
    loss = next(line for line in curves[0]["lines"] if line["name"] == "loss")
    assert loss["y"][6] is None and loss["y"][0] == 1.0


def test_without_plotly_there_are_plain_pictures(recorded, monkeypatch):
    """Catches a report that is empty, or fails, on a machine without the optional package."""
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    page.plotly_js.cache_clear()
    Image.new("RGB", (900, 600), "white").save(recorded / "curves.png")
    written = page.report([read_run(recorded)])
    page.plotly_js.cache_clear()
    assert 'alt="curves"' in written and 'class="chart"' not in written


def test_several_runs_are_compared(recorded, tmp_path):
    """Catches a comparison that hides what differs, and a folder that is no run's and ends in a traceback."""
    other = shutil.copytree(recorded, tmp_path / "mine/other")
    (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("0.5", "0.25"))
    command = [sys.executable, ROOT / "common/report.py", recorded, other, "--output", tmp_path / "both.html"]
    run_command(command).check()
    body = (tmp_path / "both.html").read_text().split('<script type="application/json"')[0]
    settings = body[body.index("<h2>Settings") :]
    assert "<td>0.5</td><td>0.25</td>" in settings[: settings.index("<details>")]
    assert settings.index("<details>") < settings.index("max_train_steps")
    ended = run_command([sys.executable, ROOT / "common/report.py", tmp_path])
    assert ended.returncode == 2 and "config.yaml" in ended.output and "Traceback" not in ended.output


def test_the_slider_moves_in_a_browser(recorded, tmp_path):
    """Catches a page whose script does not run: curves not drawn, every step's pictures at once or none."""
    written = page.write_report(recorded).read_text()
    still = in_browser(recorded / page.REPORT)
    moved = tmp_path / "moved.html"
    moved.write_text(written.replace("</body>", f"{MOVED}</body>"))
    for dom, label in ((still, "step 200"), (in_browser(moved), "step 0")):
        shown = re.findall(r'<div class="step" data-label="(step \d+)">', dom)
        assert shown == [label] and f"<output>{label}</output>" in dom
        assert "<title>mine/full</title>" in dom
    if page.plotly_js():
        assert still.count('class="main-svg"') >= 5 and "lowest held-out" in still


@pytest.mark.parametrize("width", [1280, 400])
def test_a_screenshot_is_dark_on_light(recorded, tmp_path, width):
    """Catches a page that is blank, dark, or wider than the window."""
    page.write_report(recorded)
    frame = tmp_path / "frame.html"  # a browser's window has a least width, a frame has none
    frame.write_text(
        f'<body style="margin:0;background:#000"><iframe style="border:0;width:{width}px;height:2000px" '
        f'src="file://{recorded / page.REPORT}"></iframe></body>'
    )
    in_browser(frame, f"--window-size={max(width, 600)},2000", f"--screenshot={tmp_path / 'shot.png'}")
    shot = Image.open(tmp_path / "shot.png").convert("L").crop((0, 0, width, 2000))
    histogram = shot.histogram()
    light, dark = sum(histogram[200:]) / sum(histogram), sum(histogram[:80]) / sum(histogram)
    assert light > 0.6 and 0.001 < dark < 0.3, (light, dark)
    margin = shot.crop((width - 6, 0, width, 2000)).histogram()
    assert sum(margin[:200]) == 0, "something reaches over the right edge"

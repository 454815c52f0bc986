"""--dry_run of every recipe on its tiny data: what the page names, what it leaves alone, and that the batch is the
run's."""

import re

import pytest
import torch
import yaml
from helpers import RECIPES, ROOT, few_rows, load_script, run_main
from sources import settings_of

from common.data.order import MicroBatchSampler
from common.start import dry_run

TENSORS = {
    "qwenimage_fulltune": ("latents", "prompt_embeds"),
    "flux2klein_fulltune": ("latents", "prompt_embeds"),
    "qwenimage_edit": ("latents", "source_0", "prompt_embeds"),
    "qwenimage21_fulltune": ("latents", "image_pad_mask", "prompt_embeds"),
    "kolors_spatial_adapter": ("latents", "boxes", "phrase_ids", "pooled_prompt_embeds"),
    "qwen3vl_qlora": ("input_ids", "labels", "pixel_values"),
}
# of a prompt: what only the text encoder's own template adds, or the tokenizer
TEMPLATE = {
    "qwenimage_fulltune": "Describe the image by detailing the color",
    "flux2klein_fulltune": "<think>",
    "qwenimage_edit": "Picture 1: <|vision_start|>",
    "qwenimage21_fulltune": "Comprehend and analyze the provided prompt",
    "kolors_spatial_adapter": "tokens, ",
    "qwen3vl_qlora": "<|im_start|>assistant",
}
AT = {"kolors_spatial_adapter": "time 0.5", "qwen3vl_qlora": "answer tokens"}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_page_shows_what_the_first_step_sees(recipe, tmp_path, capsys):
    """Catches a dry run that shows another batch, prompt or loss than training has, encodes more than it needs, or
    touches what an earlier run left; and an image recipe that cannot read a list of data sets, whose prefix shows."""
    out, meta = tmp_path / "out", tmp_path / "meta"
    (out / "checkpoint-7").mkdir(parents=True)
    (out / "bad_rows.jsonl").write_text("of an earlier run\n")
    meta.mkdir()
    argv = ["--config", recipe / "configs/tiny.yaml", *few_rows(recipe, meta), "--output_dir", out, "--dry_run"]
    listed = "more_resolutions" in settings_of(recipe)
    if listed:
        data = ROOT / "outputs" / recipe.name / "tiny_base/data"
        only = {"train_data_dir": str(data), "train_data_meta": str(argv[3]), "repeats": 2, "caption_prefix": "9 "}
        (meta / "sets.yaml").write_text(yaml.safe_dump([only]))
        argv[2:4] = ["--train_data_dir", meta / "sets.yaml"]
    argv += ["--train_batch_size", 2, "--global_batch_size", 0]
    run_main(load_script(recipe / "train.py"), argv)
    page, said = (out / "dry_run.html").read_text(), capsys.readouterr().out
    for name in (*TENSORS[recipe.name], AT.get(recipe.name, "sigma 0.5")):
        assert f">{name}" in page and name in said, name
    assert TEMPLATE[recipe.name] in said and ("<p>9 " in page) == listed
    prompts = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
    pictures = page.count("data:image/jpeg;base64,")
    assert prompts and pictures >= len(prompts) and "http" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)
    losses = [float(loss) for loss in re.findall(rf"^{AT.get(recipe.name, 'sigma 0.5')} +([\d.]+)", said, re.M)]
    assert len(losses) == 1 and losses[0] > 0
    assert ("<mark>" in page) == (recipe.name == "qwen3vl_qlora")
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-7"]
    assert (out / "bad_rows.jsonl").read_text() == "of an earlier run\n" and not (out / "metrics.jsonl").exists()
    if recipe.name != "qwen3vl_qlora":  # which encodes nothing
        encoded = int(re.search(r"embedding cache .*: 0 entries reused, (\d+) to encode", said)[1])
        assert encoded < 30, encoded


def test_one_process_deals_what_the_first_of_many_gets():
    """Catches a dry run of another batch than rank 0's first in a run of several processes."""
    buckets = [number % 3 for number in range(40)]
    whole = next(iter(MicroBatchSampler(buckets, 2, 3, 0, 4, 5)))
    alone = next(iter(MicroBatchSampler(buckets, 2, 12, 0, 1, 5)))
    assert whole == alone


def test_a_launcher_is_refused(monkeypatch, tmp_path):
    """Catches several processes that all write one page."""
    train = load_script(RECIPES[0] / "train.py")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = ["--train_data_dir", str(tmp_path), "--output_dir", str(tmp_path), "--dry_run"]
    cfg = train.config.parse_recipe(train.Config, argv)
    with pytest.raises(ValueError, match="one process, got 2"):
        dry_run.set_apart(cfg)


def test_what_trains_and_ranges():
    """Catches counts and ranges that are not those of the parameters and tensors."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2).requires_grad_(False))
    assert dry_run.trained_parts(model) == [["*", "2", "8", "14"], ["all", "2", "8", "14"]]
    row = dry_run.describe_tensor("x", torch.tensor([[1.0, -3.0, float("nan")]]))
    assert row == ["x", "(1, 3)", "float32", "-3", "1", "-1", "1"]

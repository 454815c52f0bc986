"""merge.py: one model in bf16 that transformers opens, with the logits of base and adapters."""

import pytest
import torch
from helpers import load_script, run_main
from peft import PeftModel
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration


@pytest.fixture(scope="module")
def trained(train, config, tmp_path_factory):
    """The folder of a run of three steps on an unquantised base."""
    out = tmp_path_factory.mktemp("merged_run") / "run"
    run_main(train, ["--config", config, "--output_dir", out, "--max_train_steps", 3, "--quantization", "none"])
    return out


@pytest.mark.slow
def test_merged_model_is_base_with_adapters(trained, recipe, model_folder, tmp_path):
    """Catches adapters that are left out, added twice or with another scale, a base in 4 bits under the sum, and a
    folder that transformers does not open with its processor."""
    merge = load_script(recipe / "merge.py")
    merge.main(["--model_path", str(trained / "final"), "--output_dir", str(tmp_path / "merged")])
    merged, report = Qwen3VLForConditionalGeneration.from_pretrained(
        tmp_path / "merged", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    inputs = processor(text=["who is the composer of the opera?"], return_tensors="pt")
    base = Qwen3VLForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = base(**inputs).logits
        adapted = PeftModel.from_pretrained(base, trained / "final").eval()(**inputs).logits
        ours = merged.float().eval()(**inputs).logits
    moved, off = (adapted - plain).abs().max(), (ours - adapted).abs().max()
    print(f"moved {moved:.4f}, merged off by {off:.4f}")
    assert moved > 0.3 and off < 0.1 * moved
    card = (tmp_path / "merged/README.md").read_text()
    assert "AutoProcessor" in card and str(model_folder) not in card and "LoRA adapters of rank 8" in card


def test_merge_refusals(recipe, tmp_path):
    """Catches a folder without adapters that ends in a traceback, and a merged model that is overwritten."""
    merge = load_script(recipe / "merge.py")
    with pytest.raises(ValueError, match=r"has no adapter_config.json; give a run's best/ or final/ folder"):
        merge.merge(tmp_path, tmp_path / "out")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="holds a model already; give a new folder"):
        merge.merge(tmp_path, tmp_path)

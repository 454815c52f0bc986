"""README.md of an export, made from the run: what was trained from what, how far, and how to load it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOAD_TRANSFORMER = """\
transformer = {model}.from_pretrained(".", torch_dtype=torch.bfloat16)  # this folder, or its name on the hub
pipeline = DiffusionPipeline.from_pretrained("{base}", transformer=transformer, torch_dtype=torch.bfloat16)
image = pipeline("what the picture shows").images[0]"""
LOAD_LORA = """\
pipeline = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.bfloat16)
pipeline.load_lora_weights(".")  # this folder, or its name on the hub
image = pipeline("what the picture shows").images[0]"""


def write_card(
    folder: Path, settings: Mapping[str, Any], step: int, recipe: str, load: str = "", trained: str = ""
) -> None:
    """README.md into an export's folder.

    settings: the run's, flat; load: lines of Python with {base} for the base's name, those for diffusers when not
    given; trained: what was trained, a full fine-tune or LoRA by lora_rank when not given.
    """
    run_folder, base = Path(settings.get("output_dir", "")), settings.get("pretrained_model_name_or_path", "")
    shown_base, data = _public(base), _public(settings.get("train_data_dir") or "")
    rank = settings.get("lora_rank", 0)
    trained = trained or (f"LoRA adapters of rank {rank}" if rank else "a full fine-tune")
    library = next((name for name in ("peft", "transformers") if f"from {name} " in load), "diffusers")
    facts = {
        "base": shown_base,
        "trained": trained,
        "data": data,
        "steps": f"{step} of {_samples(settings)} samples a process",
        "loss": _last(run_folder / "metrics.jsonl", "loss", step),
        "held-out loss": _last(run_folder / "validation.jsonl", "validation_loss", step),
        "made by": f"recipes/{recipe}",
    }
    lines = [f"| {name} | {value} |" for name, value in facts.items() if value]
    kept = {name: value for name, value in settings.items() if value not in (None, "") and not _is_path(value)}
    head = [f"base_model: {base}"] if base == shown_base and "/" in base else []
    text = f"""---
{chr(10).join([*head, f"library_name: {library}"])}
---

# {run_folder.name or recipe}, step {step}

{trained[0].upper() + trained[1:]} of {shown_base}.

| | |
|---|---|
{chr(10).join(lines)}

```python
{load.replace("{base}", shown_base) or _load(folder, rank, shown_base)}
```

<details><summary>all settings</summary>

```json
{json.dumps(kept, indent=1, ensure_ascii=False)}
```

</details>
"""
    (folder / "README.md").write_text(text)


def _load(folder: Path, rank: int, base: str) -> str:
    """Three lines of Python after the imports, or where a single file goes."""
    if not rank and not (folder / "config.json").is_file():
        return "# put the .safetensors file into ComfyUI/models/diffusion_models"
    if rank:
        return "import torch\nfrom diffusers import DiffusionPipeline\n\n" + LOAD_LORA.format(base=base)
    model = json.loads((folder / "config.json").read_text()).get("_class_name", "AutoModel")
    imports = f"import torch\nfrom diffusers import DiffusionPipeline, {model}\n\n"
    return imports + LOAD_TRANSFORMER.format(model=model, base=base)


def _is_path(value: object) -> bool:
    return isinstance(value, str) and value.startswith(("/", "~", "."))


def _public(name: str) -> str:
    """A hub's name as it is; of a folder the last part, because the rest says something about a machine."""
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else Path(name).name


def _samples(settings: Mapping[str, Any]) -> int:
    return settings.get("train_batch_size", 1) * settings.get("gradient_accumulation_steps", 1)


def _last(file: Path, name: str, step: int) -> str:
    """The last value up to a step of a column of JSON Lines; "" where there is none."""
    lines = file.read_text().splitlines() if file.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    values = [row[name] for row in rows if row.get("step", 0) <= step and name in row]
    return f"{values[-1]:.4g}" if values else ""

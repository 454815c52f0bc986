"""Where things are: the model's folder and its parts, the tiny stand-in, the output folder, files of prompts."""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import rules
from common.data.cache import read_header
from common.data.json_rows import decode, parse_json
from common.data.sets import LISTS
from common.processes import Run, on_main
from common.settings import Shared


def resolve_paths(cfg: Shared, recipe_dir: Path, argv: Sequence[str] | None = None) -> None:
    """Fill in what depends on where the recipe lies: "tiny" model and data (built by make_tiny.py), and
    outputs/<recipe>/<config>. ValueError for folders that are none: what costs nothing is looked at first."""
    argv = list(sys.argv[1:] if argv is None else argv)
    outputs = Path(__file__).resolve().parents[2] / "outputs" / recipe_dir.name
    tiny = outputs / "tiny_base"
    if "tiny" in (cfg.pretrained_model_name_or_path, cfg.data.train_data_dir) and not (tiny / "model").is_dir():
        raise ValueError(
            f"the tiny model is not in {tiny}; build it: python {recipe_dir / 'make_tiny.py'} --output_dir {tiny}"
        )
    if cfg.pretrained_model_name_or_path == "tiny":
        cfg.pretrained_model_name_or_path = str(tiny / "model")
    if cfg.data.train_data_dir == "tiny":
        cfg.data.train_data_dir = str(tiny / "data")
    if not cfg.run.output_dir:
        name = Path(argv[argv.index("--config") + 1]).stem if "--config" in argv else "default"
        cfg.run.output_dir = str(outputs / name)
    if cfg.run.plan:
        return
    data = cfg.data.train_data_dir
    if not (cfg.run.benchmark or Path(data).is_dir() or _lists_sets(cfg) or _may_be_on_the_hub(data)):
        raise ValueError(
            f"train_data_dir {rules.short(data)} is no folder; expected the one that the manifest's paths start from"
        )
    folders = {"output_dir": cfg.run.output_dir, "nvme_path": cfg.tuning.nvme_path}
    folders["cache_dir"] = getattr(getattr(cfg, "pictures", None), "cache_dir", None)
    for setting, folder in folders.items():
        if folder:
            rules.writable_folder(setting, folder)


def weights_folder(transformer_path: str | None, folder: Path) -> Path:
    """Where the transformer's weights to start from are: transformer_path, or the model's own."""
    if transformer_path and not (Path(transformer_path) / "config.json").is_file():
        raise ValueError(
            f"transformer_path {transformer_path} has no config.json; give a run's export/transformer, say"
        )
    if transformer_path:
        check_part(Path(transformer_path))
    return Path(transformer_path) if transformer_path else folder / "transformer"


def part_config(part: Path) -> dict:
    """The configuration of a model's part: transformer/config.json, scheduler/scheduler_config.json, and in full_size/
    transformer.json."""
    files = [part / "config.json", part / "scheduler_config.json", part.with_name(f"{part.name}.json")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(f"{part} has no config.json; expected a model folder in diffusers' layout")
    return _read_json(file)


def _read_json(file: Path) -> Any:
    """What a JSON file holds; ValueError names it."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def check_part(part: Path) -> None:
    """ValueError for a model's part of which a file is missing or cut short: names, and the sizes that the headers of
    weights promise; not every byte."""
    configs, weights = sorted(part.glob("*.json")), sorted(part.glob("*.safetensors"))
    has_config = (part / "config.json").is_file()
    if (weights or not configs) and not has_config:
        raise ValueError(f"{part} is incomplete: config.json is missing; download it again")
    if has_config and not weights:
        raise ValueError(f"{part} is incomplete: it has no *.safetensors weights; download it again")
    for file in configs:
        content = _read_json(file)
        shards = set(content.get("weight_map", {}).values()) if file.name.endswith(".index.json") else ()
        if missing := sorted(shard for shard in shards if not (part / shard).is_file()):
            raise ValueError(
                f"{part} is incomplete: {missing[0]} is missing, which {file.name} names; download it again"
            )
    for file in weights:
        try:
            read_header(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} is cut short or damaged ({error}); download it again") from error


def _lists_sets(cfg: Shared) -> bool:
    file = Path(cfg.data.train_data_dir)
    return hasattr(cfg, "pictures") and file.suffix in LISTS and file.is_file()


def _may_be_on_the_hub(data: str) -> bool:
    return is_hub_name(data) and not Path(data).parent.is_dir()


def is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith(("/", ".", "~"))


def find_model(name_or_path: str, parts: Sequence[str]) -> Path:
    """A local folder that holds all `parts` (transformer, vae, ...), or the hub's download of such a model.

    Raises ValueError when there is neither. The download is the hub client's: cached, and resumed after a break.
    """
    path = Path(name_or_path)
    if all((path / part).is_dir() for part in parts):
        return checked(path, parts)
    if path.exists() or not is_hub_name(name_or_path):
        lacks = [part for part in parts if not (path / part).is_dir()]
        raise ValueError(
            f"pretrained_model_name_or_path {name_or_path!r} is no model folder: it lacks {', '.join(lacks)}; "
            "give a folder in diffusers' layout or a hub name"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.jinja", "*.model", "*.safetensors"]
    try:
        path = Path(snapshot_download(name_or_path, allow_patterns=patterns))
    except Exception as error:  # the client has a dozen kinds of its own
        raise ValueError(
            f"{name_or_path!r} is no local folder and could not be downloaded ({error}); "
            "check the name, the network and `hf auth login`"
        ) from error
    return checked(path, parts)


def checked(folder: Path, parts: Sequence[str]) -> Path:
    for part in parts:
        check_part(folder / part)
    return folder


def model_folder(
    cfg: Shared, run: Run, parts: Sequence[str], full_size: Path, find: Callable[[str], Path] | None = None
) -> Path:
    """The model's folder; for a benchmark, and a plan of a model of the hub, the recipe's full_size/, which has config
    files without weights (in a folder of its own for a model of another size). find: in place of find_model."""
    name = cfg.pretrained_model_name_or_path
    own = full_size / name.split("/")[-1]
    if run.benchmark or (cfg.run.plan and not Path(name).is_dir()):
        return own if own.is_dir() else full_size
    return on_main(run, find or partial(find_model, parts=parts), name)


def read_prompts(prompts: Sequence[str], usual_file: Path | None = None) -> list[str]:
    """The prompts, or those in one .txt (a line each), .json (a list) or .parquet (column text or prompt) file.
    Without any, those of usual_file where it is there."""
    if not prompts and usual_file and usual_file.is_file():
        prompts = [str(usual_file)]
    path = Path(prompts[0]) if len(prompts) == 1 else Path()
    if path.suffix not in (".txt", ".json", ".parquet"):
        return list(prompts)
    if not path.is_file():
        raise ValueError(
            f"validation_prompts names {path}, which is not there; "
            "give a .txt, .json or .parquet file, or the prompts themselves"
        )
    try:
        texts = _texts_of(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as prompts: {rules.short(error)}") from error
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{path} must hold one text a prompt, at least one, and no empty ones")
    return texts


def _texts_of(path: Path) -> list[Any]:
    if path.suffix == ".txt":
        return [line.strip() for line in decode(path.read_bytes()).splitlines() if line.strip()]
    if path.suffix == ".json":
        rows = parse_json(path.read_bytes())
        if not isinstance(rows, list):
            raise ValueError(f"got a JSON {type(rows).__name__}, expected a list of prompts")
        return [row.get("text") if isinstance(row, dict) else row for row in rows]
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    columns = [name for name in ("text", "prompt") if name in table.column_names]
    if not columns:
        raise ValueError(f"it has the columns {table.column_names}; expected one named text or prompt")
    return table[columns[0]].to_pylist()

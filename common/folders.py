"""Where things are: the model's folder, its fingerprint, the tiny stand-in, the output folder, files of prompts."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def resolve_paths(cfg, recipe_dir: Path, argv: Sequence[str] | None = None) -> None:
    """Fill in what depends on where the recipe lies: "tiny" model and data (built by make_tiny.py), and
    outputs/<recipe>/<config>."""
    argv = list(sys.argv[1:] if argv is None else argv)
    repository = Path(__file__).resolve().parents[1]
    tiny = repository / "outputs" / recipe_dir.name / "tiny_base"
    if "tiny" in (cfg.pretrained_model_name_or_path, cfg.train_data_dir) and not (tiny / "model").is_dir():
        raise ValueError(
            f"the tiny model is not in {tiny}; build it: python {recipe_dir / 'make_tiny.py'} --output_dir {tiny}"
        )
    if cfg.pretrained_model_name_or_path == "tiny":
        cfg.pretrained_model_name_or_path = str(tiny / "model")
    if cfg.train_data_dir == "tiny":
        cfg.train_data_dir = str(tiny / "data")
        if hasattr(cfg, "validation_prompts"):
            files = [tiny / "data" / name for name in ("validation_prompts.txt", "validation.json")]
            cfg.validation_prompts = cfg.validation_prompts or (str(next(f for f in files if f.is_file())),)
    if not cfg.output_dir:
        name = Path(argv[argv.index("--config") + 1]).stem if "--config" in argv else "default"
        cfg.output_dir = str(repository / "outputs" / recipe_dir.name / name)


def model_folder(name_or_path: str, parts: Sequence[str]) -> Path:
    """A local folder that holds all `parts` (transformer, vae, ...), or the hub's download of such a model.

    Raises ValueError when there is neither. The download is the hub client's: cached, and resumed after a break.
    """
    path = Path(name_or_path)
    if all((path / part).is_dir() for part in parts):
        return path
    if path.exists() or name_or_path.count("/") != 1 or name_or_path.startswith((".", "~")):
        lacks = [part for part in parts if not (path / part).is_dir()]
        raise ValueError(
            f"pretrained_model_name_or_path {name_or_path!r} is no model folder: it lacks {', '.join(lacks)}; "
            "give a folder in diffusers' layout or a hub name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name_or_path, allow_patterns=["*.json", "*.txt", "*.jinja", "*.model", "*.safetensors"])
        )
    except Exception as error:  # the client has a dozen kinds of its own
        raise ValueError(
            f"{name_or_path!r} is no local folder and could not be downloaded ({error}); "
            "check the name, the network and `hf auth login`"
        ) from error


def folder_fingerprint(folder: Path) -> str:
    """Hash of a model part: names and sizes of all files, all of the small, head, middle and tail of the large
    ones."""
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}:{size};".encode())
        with open(file, "rb") as opened:
            for start in [0] if size <= 1 << 24 else [0, size // 2, size - (1 << 20)]:
                opened.seek(start)
                digest.update(opened.read(1 << 24 if size <= 1 << 24 else 1 << 20))
    return digest.hexdigest()[:16]


def read_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts, or those in one .txt (a line each), .json (a list) or .parquet (column text or prompt) file."""
    path = Path(prompts[0]) if len(prompts) == 1 else Path()
    if path.suffix not in (".txt", ".json", ".parquet"):
        return list(prompts)
    if not path.is_file():
        raise ValueError(
            f"validation_prompts names {path}, which is not there; "
            "give a .txt, .json or .parquet file, or the prompts themselves"
        )
    if path.suffix == ".txt":
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if path.suffix == ".json":
        return [row if isinstance(row, str) else row["text"] for row in json.loads(path.read_text())]
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    columns = [name for name in ("text", "prompt") if name in table.column_names]
    if not columns:
        raise ValueError(f"{path} has the columns {table.column_names}; expected one named text or prompt")
    return table[columns[0]].to_pylist()

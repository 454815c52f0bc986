"""Whether a checkpoint is whole: a manifest of sizes and hashes, written last and verified before anything is loaded.

The hashes guard against damage, not against malice: whoever can write the files can write the manifest.
"""

import errno
import hashlib
import json
import os
import shutil
from multiprocessing.pool import ThreadPool
from pathlib import Path

MANIFEST = "manifest.json"


def _hash(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "blake2b").hexdigest()[:32]


def _hashes(files: list[Path]) -> list[str]:
    """hashlib works without the GIL: large files side by side."""
    with ThreadPool(min(8, max(1, len(files)))) as pool:
        return pool.map(_hash, files)


def sync(path: Path) -> None:
    """Flush a file, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(folder: Path) -> None:
    """Write the manifest of all files of a folder, and flush everything."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    listed = {
        str(file.relative_to(folder)): [file.stat().st_size, digest]
        for file, digest in zip(files, _hashes(files), strict=True)
    }
    (folder / MANIFEST).write_text(json.dumps({"files": listed}, indent=1))
    for path in [*files, folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        sync(path)


def damage(folder: Path, hashes: bool) -> str:
    """What is wrong with a sealed folder, naming the file; "" when it is whole. hashes: read every byte too."""
    try:
        listed = {folder / name: entry for name, entry in json.loads((folder / MANIFEST).read_text())["files"].items()}
        for file, (size, _) in listed.items():
            if not file.is_file():
                return f"{file.relative_to(folder)} is missing"
            if file.stat().st_size != size:
                return f"{file.relative_to(folder)} has {file.stat().st_size} bytes, {size} were written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing: it was not written to its end"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is damaged"
    if hashes:
        for file, (_, digest), found in zip(listed, listed.values(), _hashes(list(listed)), strict=True):
            if found != digest:
                return f"{file.relative_to(folder)} is not what was written"
    return ""


def is_full_disk(error: BaseException) -> bool:
    """Whether an error of a write, by whatever library, means that the disk or a quota is full."""
    known = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return known or "No space left on device" in str(error) or "Disk quota exceeded" in str(error)


def remove(folder: Path) -> None:
    """Delete a folder so that no part of it is ever taken for the whole: it loses its name first."""
    gone = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(folder, gone)
    sync(folder.parent)
    shutil.rmtree(gone)

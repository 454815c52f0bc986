"""The embedding cache: what frozen encoders make of a row, kept on disk and never used for another row or encoder.

A folder of safetensors shards. A shard's header lists its entries, so there is no index beside it that could disagree,
and a shard appears under its name only when it is complete: a killed pass loses at most the shard in memory. Every
process writes shards of its own, named shard-<fingerprint>-<rank>-<random>.safetensors.
"""

import gc
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.data.json_rows import many_objects
from common.data.known_files import KnownFiles
from common.data.manifest import Record
from common.processes import Run, on_main
from common.progress import stage


def read_header(path: Path) -> dict:
    """The JSON header of a safetensors file; ValueError when the file is cut short or is none."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= path.stat().st_size - 8:
            raise ValueError("its header is cut short")
        header = json.loads(file.read(size))
    try:
        end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError("its header is no table of tensors") from error
    if path.stat().st_size != 8 + size + end:
        raise ValueError(f"it has {path.stat().st_size} bytes, its header says {8 + size + end}")
    return header


def _write_atomically(path: Path, write) -> None:
    """write(temporary path), flush it to the disk, give it its name."""
    half = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    write(half)
    with open(half, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(half, path)


Entry = tuple[str, tuple[str, ...], int]  # shard, names of its tensors, bytes


def _entries_of(shard: str, header: dict) -> dict[str, Entry]:
    """{key: entry} of a shard's header; entries that are alike are one object, since there may be millions."""
    found: dict[str, Entry] = {}
    alike: dict[Entry, Entry] = {}
    for name, tensor in header.items():
        key, _, field = name.partition("/")
        _, fields, size = found.get(key, (shard, (), 0))
        start, end = tensor["data_offsets"]
        entry = (shard, (*fields, field), size + end - start)
        found[key] = alike.setdefault(entry, entry)
    return found


class EmbeddingCache:
    """Tensors by key, on disk. Each rank adds its share, flushes, and after a barrier every rank calls reload.

    folder: made when it is not there. fingerprint: everything but the row that the tensors depend on (model,
    resolution, template, ...), JSON values; kept readable in fingerprint.json. Only rank 0 prints.
    """

    def __init__(
        self, folder: str | Path, fingerprint: dict, rank: int = 0, shard_entries: int = 256, shard_bytes: int = 2**29
    ) -> None:
        self.folder, self.rank = Path(folder), rank
        self.shard_entries, self.shard_bytes = shard_entries, shard_bytes
        self.fingerprint = json.loads(json.dumps(fingerprint))  # as it reads back: tuples are lists
        canonical = json.dumps(self.fingerprint, sort_keys=True).encode()
        self.fingerprint_id = hashlib.sha256(canonical).hexdigest()[:16]
        self._buffer: dict[str, dict[str, torch.Tensor]] = {}
        self._entries: dict[str, Entry] = {}  # key -> its shard, names of its tensors, bytes
        self._handles: dict[str, safe_open] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.reload()
        if rank == 0:
            self._note_fingerprint()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_handles": {}}  # a worker that is started, not forked, opens the shards itself

    def _say(self, message: str) -> None:
        if self.rank == 0:
            print(f"embedding cache {self.folder}: {message}")

    def _note_fingerprint(self) -> None:
        path = self.folder / "fingerprint.json"
        old = json.loads(path.read_text()) if path.is_file() else self.fingerprint
        names = sorted(name for name in {*old, *self.fingerprint} if old.get(name) != self.fingerprint.get(name))
        if names:
            changes = [f"{name} was {old.get(name)!r}, is {self.fingerprint.get(name)!r}" for name in names]
            self._say(f"made with other settings, so its entries are not used: {'; '.join(changes)}")
        _write_atomically(path, lambda half: half.write_text(json.dumps(self.fingerprint, indent=2) + "\n"))

    def key(self, row: Record | str, bucket: tuple[int, int] | None = None, **more: object) -> str:
        """Key of a checked record, or of a text alone, at a bucket (width, height); `more`: what else was encoded."""
        if isinstance(row, Record):
            assert row.digest, "a record has its digest only after check_records"
        kind, text, digest = ("row", row.text, row.digest) if isinstance(row, Record) else ("text", row, "")
        parts = [self.fingerprint_id, kind, text, digest, bucket, more]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    @many_objects()
    def reload(self) -> None:
        """Look again at what is on the disk, for instance after the other ranks have flushed."""
        self._entries = {}
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            try:
                header = read_header(path)
            except (OSError, ValueError) as error:
                self._say(f"{path.name} cannot be read ({error}); its entries are encoded again")
                continue
            header.pop("__metadata__", None)
            for key, entry in _entries_of(path.name, header).items():
                self._entries.setdefault(key, entry)  # two processes may have encoded the same row

    def __contains__(self, key: str) -> bool:
        return key in self._entries or key in self._buffer

    def __len__(self) -> int:
        return len(self._entries.keys() | self._buffer.keys())

    def missing(self, keys: Iterable[str], are_all: bool = True) -> list[str]:
        """The keys that must be encoded, each once, in order; says how many are, and, where they are all that is
        wanted, what on disk is of no use."""
        wanted = dict.fromkeys(keys)
        result = [key for key in wanted if key not in self]
        self._say(f"{len(wanted) - len(result)} entries reused, {len(result)} to encode")
        if are_all:
            self._mention_unused([entry for key, entry in self._entries.items() if key not in wanted])
        return result

    def _mention_unused(self, unused: list[Entry]) -> None:
        half_written = list(self.folder.glob("*.tmp"))
        if unused or half_written:
            size = sum(entry[2] for entry in unused) + sum(path.stat().st_size for path in half_written)
            others = {shard.split("-")[1] for shard, _, _ in unused} - {self.fingerprint_id}
            rm = [f"{self.folder}/shard-{name}-*" for name in sorted(others)]
            rm += [f"{self.folder}/*.tmp"] if half_written else []
            advice = f"`rm {' '.join(rm)}` deletes those of other settings and of killed runs, " if rm else ""
            what = f"{len(unused)} entries and {len(half_written)} half-written files ({size / 2**20:.1f} MiB)"
            self._say(f"this run does not use {what}; {advice}`rm -r {self.folder}` deletes all, to be encoded again")

    def add(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Keep the tensors of one entry, names without '/'. A full shard is written at once, the last one by flush."""
        assert tensors and not any("/" in name for name in tensors), list(tensors)
        self._buffer[key] = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        size = sum(tensor.nbytes for entry in self._buffer.values() for tensor in entry.values())
        if len(self._buffer) >= self.shard_entries or size >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last shard."""
        if not self._buffer:
            return
        name = f"shard-{self.fingerprint_id}-{self.rank}-{uuid.uuid4().hex[:8]}.safetensors"
        tensors = {f"{key}/{field}": value for key, entry in self._buffer.items() for field, value in entry.items()}
        _write_atomically(self.folder / name, lambda half: save_file(tensors, half))
        for key, entry in self._buffer.items():
            self._entries[key] = (name, tuple(entry), sum(value.nbytes for value in entry.values()))
        self._buffer = {}

    def __getitem__(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of one entry, mapped from the disk, on the CPU. KeyError when it is not there."""
        if key in self._buffer:
            return dict(self._buffer[key])
        shard, fields, _ = self._entries[key]
        if shard not in self._handles:
            if len(self._handles) >= 256:  # the oldest goes; tensors that were read keep their memory mapped
                self._handles.pop(next(iter(self._handles)))
            self._handles[shard] = safe_open(self.folder / shard, framework="pt")
        return {field: self._handles[shard].get_tensor(f"{key}/{field}") for field in fields}

    def known_good(self) -> KnownFiles:
        """The files of the rows that were found good at earlier starts with this folder."""
        return KnownFiles(self.folder / "known_files.npy")


Item = tuple[Record | str, tuple[int, int] | None]  # a row at its bucket (width, height), or a text alone


def open_cache(
    run: Run, cache_dir: str | None, output_dir: str, model: Path, parts: Iterable[str], **more: object
) -> EmbeddingCache:
    """The cache whose entries depend on the model's frozen `parts`, on the precision and on `more`, beside the row."""
    fingerprint = {"model": on_main(run, lambda: {part: folder_fingerprint(model / part) for part in parts}), **more}
    return EmbeddingCache(cache_dir or Path(output_dir) / "embedding_cache", fingerprint, run.rank)


def encode_missing(run: Run, cache: EmbeddingCache, items: dict[str, Any], encode: Callable[[dict], None]) -> None:
    """Call encode({key: item}) with what the cache lacks of `items`, which adds this process's share of it; what that
    loaded then leaves memory. Every process calls it, and finds afterwards what all have added."""
    missing = on_main(run, cache.missing, list(items), not run.first_rows)
    with stage("encode"):
        if missing:
            encode({key: items[key] for key in missing})
        gc.collect()
        torch.cuda.empty_cache()
        cache.flush()
        run.barrier()
        cache.reload()


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

"""Which rows' files were found good before, so that a start need not read them again.

A file is known by what the file system says of it: path, size, times and inode. What has changed is read again.
"""

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.data.manifest import Record, place_of

SETTLED = 2_000_000_000  # nanoseconds: a file that is younger may change once more within one tick of its clock
STRIDE = 0x9E3779B97F4A7C15  # between the numbers of one row's files
# head and tail of the row's digest, size of the file
ENTRY = np.dtype([("name", "<u8"), ("head", "<u8"), ("tail", "<u8"), ("width", "<i4"), ("height", "<i4")])


class KnownFiles:
    """Digests of rows and sizes of their files, kept in one file (40 bytes a picture). file: None keeps nothing."""

    def __init__(self, file: Path | None = None) -> None:
        self.file, self.entries = file, np.zeros(0, ENTRY)
        if file and file.is_file():
            try:
                self.entries = np.load(file)
                assert self.entries.dtype == ENTRY
            except (OSError, ValueError, EOFError, AssertionError) as error:
                print(f"{file} cannot be read ({error}); all files are looked at again")
                self.entries = np.zeros(0, ENTRY)
        self.digests = np.unique(self.entries["head"])

    def __contains__(self, digest: str) -> bool:
        """Whether a row's bytes were found good, wherever they were."""
        head = np.uint64(int(digest[:16], 16))
        at = np.searchsorted(self.digests, head)
        return bool(at < len(self.digests) and self.digests[at] == head)

    def find(
        self, records: Sequence[Record], folder: str | Path, file_columns: Sequence[str]
    ) -> list[tuple[str, list[tuple[int, int]]] | None]:
        """(digest, (width, height) of each file) of each record; None for one whose files must be read."""
        if not len(self.entries):
            return [None] * len(records)
        before = time.time_ns() - SETTLED
        names = [names_of(record, folder, file_columns, before) for record in records]
        wanted = np.array([name for each in names for name in each], "<u8")
        at = np.searchsorted(self.entries["name"], wanted).clip(max=len(self.entries) - 1)
        found, entries = self.entries["name"][at] == wanted, self.entries[at].tolist()
        sizes = {}  # one object of each, whatever the number of rows
        result, start = [], 0
        for each in names:
            end = start + len(each)
            if each and found[start:end].all():
                _, head, tail, *_ = entries[start]
                pairs = [entry[-2:] for entry in entries[start:end]]
                result.append((f"{head:016x}{tail:016x}", [sizes.setdefault(pair, pair) for pair in pairs]))
            else:
                result.append(None)
            start = end
        return result

    def keep(self, records: Sequence[Record], folder: str | Path, file_columns: Sequence[str]) -> None:
        """Add good records, as check_records returns them, that have just been read."""
        entries, before = [], time.time_ns() - SETTLED
        for record in records:
            halves = int(record.digest[:16], 16), int(record.digest[16:], 16)
            sizes = [(record.width, record.height), *record.source_sizes]
            names = names_of(record, folder, file_columns, before)
            sizes += [(0, 0)] * (len(names) - len(sizes))  # of further columns: nobody asks
            entries += [(name, *halves, *size) for name, size in zip(names, sizes, strict=True)] if names else []
        if self.file and entries:
            both = np.concatenate([np.array(entries, ENTRY), self.entries])
            self.entries = both[np.unique(both["name"], return_index=True)[1]]
            half = self.file.with_name(f"{self.file.name}.{os.getpid()}.tmp")
            with open(half, "wb") as file:
                np.save(file, self.entries)
            half.replace(self.file)


def names_of(record: Record, folder: str | Path, file_columns: Sequence[str], before: int) -> list[int]:
    """A number for each of a record's files, which changes when any of them does; [] where they must be read, also
    because one is not older than `before`, in nanoseconds."""
    said, places = record.type, (None, *range(len(record.source_file_path)), *file_columns)
    try:
        for which in places:
            path, *inside = place_of(record, folder, which)
            found = os.lstat(path)
            if max(found.st_mtime_ns, found.st_ctime_ns) > before:
                return []
            said += f"\n{path} {inside} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    first = int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "little")
    return [(first + STRIDE * number) % 2**64 for number in range(len(places))]

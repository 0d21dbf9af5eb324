"""The training text: CPython's standard library, which every machine with CPython has.

Whole files are held out, chosen by a hash of their path. So the split does not depend on the order in which a file
system lists them.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EXCLUDED_FOLDERS = {"site-packages", "__pycache__", "encodings", "pydoc_data", "lib2to3", "idlelib"}
MAX_FILE_BYTES = 400_000  # longer files are generated tables
MAX_NON_ASCII_SHARE = 0.02  # files with more are code-page and Unicode data
HELD_OUT_PER_MILLE = 45


@dataclass(frozen=True, slots=True)
class Document:
    """One source file. `name` is its path within the standard library's folder."""

    name: str
    text: str
    held_out: bool


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PER_MILLE


def standard_library(root: Path | None = None) -> Iterator[Document]:
    """Yield every usable, distinct file of the standard library, in the order of its names."""
    root = root or Path(sysconfig.get_path("stdlib"))
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if EXCLUDED_FOLDERS & set(name.split("/")) or "bad" in path.stem:
            continue
        raw = path.read_bytes()
        if not 200 < len(raw) < MAX_FILE_BYTES:
            continue
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(raw).digest()
        if digest in seen or len(raw) - len(raw.decode("ascii", "ignore")) > MAX_NON_ASCII_SHARE * len(raw):
            continue
        seen.add(digest)
        yield Document(name, text.replace("\r\n", "\n"), _is_held_out(name))

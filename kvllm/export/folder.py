"""An export's folder: whole or absent. Knows nothing of models; files are written by whoever opened it.

with new_folder(Path("out"), apart_from=[kb]) as folder:     # a hidden sibling of out/
    (folder / "README.md").write_text("…")
# here out/ exists with every byte on the disk, or an error was raised and nothing was left
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kvllm.errors import ConfigError, OutOfResources
from kvllm.lm.sources import DISK_FULL
from kvllm.store.files import fsync_fd, fsync_folder, incoming_name

_FULL_WORDS = ("No space left", "File too large", "Disk quota", "os error 28", "os error 27", "os error 122")


@contextmanager
def new_folder(out: Path, *, apart_from: Sequence[Path] = (), needed: int = 0) -> Iterator[Path]:
    """Give a temporary sibling of `out` to write into, and rename it to `out` once the block is done.

    Args:
        out: Must not exist, or be an empty folder.
        apart_from: Folders that `out` may neither be nor lie in.
        needed: Bytes that will be written; refused at once where the disk has fewer.

    Raises:
        ConfigError: `out` cannot be used; nothing was written.
        OutOfResources: The disk or the memory is full; nothing was left behind.
    """
    target = _checked(out, apart_from)
    made: list[Path] = []
    folder = incoming_name(target.parent)
    try:
        for parent in reversed([target.parent, *target.parent.parents]):
            if not parent.exists():
                parent.mkdir()
                made.append(parent)
        free = shutil.disk_usage(target.parent).free
        if free < needed:
            raise OutOfResources(
                f"The export needs {needed / 1e6:.0f} MB in {target.parent} and {free / 1e6:.0f} MB are free; nothing "
                "was written. Free some space or choose another folder."
            )
        folder.mkdir()
        yield folder
        _settle(folder)
        if target.exists():  # empty, checked above; Windows renames onto nothing only
            target.rmdir()
        folder.rename(target)
        fsync_folder(target.parent)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in reversed(made):
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if _is_full(error):
            raise OutOfResources(
                f"The disk or the memory became full while exporting to {out}; nothing was left behind. Free some "
                "space, or choose another folder."
            ) from error
        if isinstance(error, OSError):
            raise ConfigError(
                f"{out} cannot be written ({error.strerror or error}); nothing was left behind. Choose another folder."
            ) from error
        raise


def _checked(out: Path, apart_from: Sequence[Path]) -> Path:
    target = out.expanduser().resolve()
    for other in (path.expanduser().resolve() for path in apart_from):
        if target == other or other in target.parents:
            raise ConfigError(f"The export folder {out} lies in {other}; nothing was written. Choose one outside it.")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"The export folder {out} is a file; nothing was written. Choose another name.")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(
            f"The export folder {out} is not empty; nothing was written. Choose a new folder, or empty this one."
        )
    return target


def _settle(folder: Path) -> None:
    """Give every file the ordinary mode (safetensors writes 0600) and flush all of it to the disk."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    folders = [folder]
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            folders.append(path)
            continue
        path.chmod(mode)
        with path.open("rb+") as file:
            fsync_fd(file.fileno())
    for inner in reversed(folders):
        fsync_folder(inner)


def _is_full(error: BaseException) -> bool:
    """Recognise a full disk or memory, also where a Rust library says it in words."""
    if isinstance(error, OutOfResources) or not isinstance(error, Exception):
        return False
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in DISK_FULL):
        return True
    said = str(error)
    return any(words in said for words in _FULL_WORDS) or "can't allocate memory" in said

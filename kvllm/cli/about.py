"""Commands about what is installed: the registered models, the machine, one knowledge base's summary."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from kvllm.cli.app import BASE, app
from kvllm.cli.command import command, opened
from kvllm.cli.output import Output, Result

_PACKAGES = ("torch", "transformers", "peft", "safetensors", "sentence-transformers", "sqlite-utils", "pysqlite3")


@command(app, panel=BASE)
def models(out: Output) -> Result:
    """List the base models and encoders that kvllm knows by name. Any folder, GGUF file or hub id works too.

    kvllm models
    """
    from kvllm.lm import sources
    from kvllm.reports import terminal

    known = [_plain(model) for model in sources.models()]
    return Result({"ok": True, "models": known}, lambda: terminal.models_table(known))


@command(app, panel=BASE)
def info(
    out: Output,
    kb: Annotated[
        Path | None, typer.Argument(metavar="[KB]", help="A knowledge base to summarise.", show_default=False)
    ] = None,
) -> Result:
    """Show versions, device, threads and cache; with KB also its base model, counts and sizes.

    kvllm info my.kb
    """
    from kvllm.reports import terminal

    document: dict[str, Any] = environment()
    if kb is not None:
        with opened(out, kb, readonly=True) as base:
            document["knowledge_base"] = dict(base.info())
    return Result({"ok": True, **document}, lambda: terminal.mapping_view(document))


def environment() -> dict[str, Any]:
    """Return what a bug report needs to know of this machine."""
    import torch

    import kvllm
    from kvllm.config import cache_folder

    if torch.cuda.is_available():
        device = f"cuda ({torch.cuda.get_device_name()})"
    else:
        device = "mps" if torch.backends.mps.is_available() else "cpu"
    cache = cache_folder()
    return {
        "kvllm": kvllm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": device,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "cache": {"folder": str(cache), "bytes": _folder_bytes(cache)},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _folder_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:  # removed by another process meanwhile
                continue
    return total


def _plain(model: Any) -> dict[str, Any]:
    if isinstance(model, Mapping):
        return dict(model)
    if hasattr(model, "to_dict"):
        return dict(model.to_dict())
    if is_dataclass(model):
        return {field.name: getattr(model, field.name) for field in fields(model)}
    return {"name": str(model)}

"""Where an experiment ran: versions, machine, commit, base model. Names no host and no folder."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from kvllm.experiments.declared import Declared

PACKAGES = ("kvllm", "torch", "transformers", "peft", "safetensors", "sentence-transformers", "sqlite-utils", "scipy")


def environment(*, threads: int) -> dict[str, Any]:
    """Return versions, the machine's size, and the commit of the code that runs."""
    return machine() | {"threads": threads, "git": git_state()}


def machine() -> dict[str, Any]:
    """Return versions and the machine's size; no names of hosts or folders."""
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.system()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    found["cpu"] = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    found["cpus"] = os.cpu_count()
    return found


def git_state() -> dict[str, Any]:
    """Return the commit of this code and whether tracked files differ from it; None where there is no repository."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "changed": None if changed is None else bool(changed)}


def model_record(declared: Declared) -> dict[str, Any]:
    """Return name, revision and digest of the base model."""
    from kvllm.lm.sources import resolve

    files = resolve(declared.model)
    name = Path(declared.model).name if Path(declared.model).is_absolute() else declared.model
    return {"name": name, "revision": files.revision, "digest": files.digest, "dtype": declared.dtype}

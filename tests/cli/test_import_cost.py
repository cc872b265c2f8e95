"""What must not be imported: torch costs seconds, and `--help` and the ledger commands promise not to pay them."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "sentence_transformers", "numpy", "sqlite_utils", "jinja2", "huggingface_hub")


def imported_by(code: str) -> set[str]:
    """Return the heavy modules that a fresh interpreter has imported after running the code."""
    program = f"{code}\nimport sys\nprint('heavy:', *(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.splitlines()[-1].removeprefix("heavy:").split())


def test_the_probe_sees_a_heavy_import() -> None:
    assert imported_by("import numpy") == {"numpy"}


@pytest.mark.parametrize(
    "code",
    ["import kvllm; kvllm.__version__", "import kvllm; kvllm.KeyNotFound, kvllm.Fact, kvllm.EditConfig",
     "import kvllm.cli", "import kvllm.reports.terminal", "import kvllm.importing"],
)  # fmt: skip
def test_importing_the_vocabulary_loads_nothing_heavy(code: str) -> None:
    assert imported_by(code) == set()


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["insert", "--help"], ["import", "--help"], ["--version"], ["ls"], ["ls", "--json", "x", "y"]],
)
def test_help_and_usage_errors_load_nothing_heavy(arguments: list[str]) -> None:
    assert imported_by(f"from kvllm.cli import main; main({arguments!r})") == set()


@pytest.mark.parametrize("command", ["ls", "history", "tag", "verify"])
def test_ledger_commands_load_no_torch_even_to_fail(command: str) -> None:
    pytest.importorskip("kvllm.knowledge_base")
    heavy = imported_by(f"from kvllm.cli import main; main([{command!r}, '/nonexistent/my.kb'])")
    assert not heavy & {"torch", "transformers", "peft", "sentence_transformers"}

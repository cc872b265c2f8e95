"""DESIGN.md, section 3: the folders are the architecture, imports only point down, a heavy dependency has one owner."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kvllm"
VOCABULARY = (
    "cachefile",
    "errors",
    "records",
    "config",
    "memory",
    "prompts",
    "metrics",
    "notebook",
    "paired",
    "process",
)
# From the bottom to the top; a module may import its own layer and those before it. reports stands beside the engine:
# it knows records only (checked below).
LAYERS = (
    "vocabulary",
    "importing",
    "store",
    "lm",
    "probing",
    "editing",
    "export",
    "session",
    "edits",
    "knowledge_base",
    "reports",
    "experiments",
    "cli",
)
# `kvllm/__init__.py` names the public API for type checkers and imports it lazily: it belongs to no layer.
ROOT = "__init__"
# A module or a layer may import these; nobody else may. The vocabulary takes the standard library only.
OWNERS: dict[str, set[str]] = {
    "transformers": {"lm", "export"},
    "huggingface_hub": {"lm"},
    "gguf": {"lm"},
    "tokenizers": {"lm"},
    "peft": {"editing", "export"},
    "sentence_transformers": {"probing/encoder.py"},
    "sqlite_utils": {"store"},
    "sqlite3": {"store"},
    "pysqlite3": {"store"},
    "filelock": {"store", "lm", "editing"},
    "rich": {"reports", "cli"},
    "typer": {"cli"},
    "sacrebleu": {"probing"},
    "jinja2": {"reports/page.py"},
    "scipy": {"experiments"},
    "ray": {"experiments/cluster.py"},
    "torch": {"lm", "editing", "probing", "export", "experiments", "cli/about.py"},
}
LAZY_IN_VOCABULARY = {"platformdirs"}

FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def layer_of(module: str) -> str:
    """Return the layer of `kvllm.lm.model` → "lm"."""
    name = module.split(".")[1] if "." in module else ROOT
    return "vocabulary" if name in VOCABULARY else name


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, run_at_import: bool = False) -> Iterator[tuple[str, int]]:
    """Yield (module, line) of every import; with `run_at_import` only those executed when the module is imported."""
    package = module_of(path) if path.stem == "__init__" else module_of(path).rpartition(".")[0]

    def walk(node: ast.AST) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            if run_at_import and (
                isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_type_checking(child)
            ):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                parent = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
                module = ".".join([*parent, *([child.module] if child.module else [])])
                yield module, child.lineno
                if module == "kvllm" or module.startswith("kvllm."):
                    yield from (
                        (f"{module}.{alias.name}", child.lineno)
                        for alias in child.names
                        if _is_module(module, alias.name)
                    )
            else:
                yield from walk(child)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _is_module(package: str, name: str) -> bool:
    folder = PACKAGE.parent.joinpath(*package.split("."))
    return (folder / f"{name}.py").is_file() or (folder / name).is_dir()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    mine = layer_of(module_of(path))
    if mine == ROOT:
        return
    assert mine in LAYERS, f"{path} lies in no layer of DESIGN.md"
    upward = [
        f"line {line}: {module}"
        for module, line in imports(path)
        if module.startswith("kvllm.") and LAYERS.index(layer_of(module)) > LAYERS.index(mine)
    ]
    assert not upward


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_heavy_dependency_stays_with_its_owner(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    layer = layer_of(module_of(path))
    strays = [
        f"line {line}: {module}"
        for module, line in imports(path)
        for owners in [OWNERS.get(module.split(".")[0])]
        if owners is not None and layer not in owners and place not in owners
    ]
    assert not strays


def test_reports_know_records_only() -> None:
    for path in (PACKAGE / "reports").rglob("*.py"):
        used = {layer_of(module) for module, _ in imports(path) if module.startswith("kvllm.")}
        assert used <= {"vocabulary", "reports"}, path


def test_store_knows_the_vocabulary_only() -> None:
    for path in (PACKAGE / "store").rglob("*.py"):
        used = {layer_of(module) for module, _ in imports(path) if module.startswith("kvllm.")}
        assert used <= {"vocabulary", "store"}, path


@pytest.mark.parametrize("name", VOCABULARY)
def test_vocabulary_needs_the_standard_library_only(name: str) -> None:
    path = PACKAGE / f"{name}.py"
    allowed = {*sys.stdlib_module_names, "kvllm"}
    assert {module.split(".")[0] for module, _ in imports(path, run_at_import=True)} <= allowed
    assert {module.split(".")[0] for module, _ in imports(path)} <= allowed | LAZY_IN_VOCABULARY


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "cli"], ids=lambda path: path.name)
def test_commands_import_the_engine_inside_functions(path: Path) -> None:
    heavy = {"store", "lm", "probing", "editing", "session", "edits", "knowledge_base", "export", "experiments"}
    at_import = [
        f"line {n}: {m}"
        for m, n in imports(path, run_at_import=True)
        if m.startswith("kvllm.") and layer_of(m) in heavy
    ]
    assert not at_import


def test_the_reader_of_imports_sees_what_it_should(tmp_path: Path) -> None:
    path = PACKAGE / "cli" / "run.py"
    assert "kvllm.cli.output" in {module for module, _ in imports(path, run_at_import=True)}
    assert "typer" not in {module for module, _ in imports(path, run_at_import=True)}
    assert "typer" in {module for module, _ in imports(path)}


def test_every_public_name_can_be_imported() -> None:
    import kvllm

    missing_engine = not (PACKAGE / "knowledge_base.py").exists()
    for name in kvllm.__all__:
        if name != "KnowledgeBase" or not missing_engine:
            assert getattr(kvllm, name) is not None
    assert set(kvllm.__all__) <= set(dir(kvllm))
    with pytest.raises(AttributeError, match="nonsense"):
        kvllm.nonsense  # noqa: B018

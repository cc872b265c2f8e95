"""Proof that the tests can fail: faults are put into kvllm on purpose, and a named test must catch each of them.

Nothing on disk changes: a child process imports the mutated source of one module, runs the tests, and dies. The parent
has imported the heavy libraries, so that a fault costs a second or two.

    python -m tests.robustness.seeded_faults            # all faults, as a table; exit code 1 if one is not caught
    python -m tests.robustness.seeded_faults "no lock"  # some of them
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Fault:
    """One fault: in a module, each text (which must stand there once) is replaced by another."""

    name: str
    module: str
    changes: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]


def fault(name: str, module: str, old: str, new: str, *tests: str, more: Sequence[tuple[str, str]] = ()) -> Fault:
    return Fault(name, module, ((old, new), *more), tests)


CRASH, VERIFY, HISTORY = "tests/store/test_crash.py::", "tests/store/test_verify.py::", "tests/store/test_history.py::"
REFUSALS, NUMBERS = "tests/engine/test_refusals.py::", "tests/robustness/test_numbers.py::"
TEXTS, POISONED = "tests/robustness/test_hostile_text.py::", "tests/robustness/test_poisoned.py::"

FAULTS = (
    fault(
        "skip an fsync",
        "kvllm.store.files",
        "        handle.write(content)\n        handle.flush()\n        fsync_fd(handle.fileno())\n",
        "        handle.write(content)\n",
        f"{CRASH}test_commit_reaches_the_steps_in_order",
    ),
    fault(
        "rename after commit",
        "kvllm.store.store",
        "(None, False) if delta is None else self._store_delta(delta)\n",
        "(None, False) if delta is None else (artefacts.address(artefacts.listing(delta)), False)\n",
        f"{CRASH}test_killed_commit_is_whole_or_absent_and_can_be_repeated",
        more=[
            (
                "        return edit\n\n    def _drop_unowned",
                "        if delta is not None:\n            self._store_delta(delta)\n        return edit\n\n"
                "    def _drop_unowned",
            )
        ],
    ),
    fault(
        "ignore a hash when reading",
        "kvllm.store.store",
        "if len(content[name]) != size or (verify and files.sha256_of(content[name]) != digest):",
        "if len(content[name]) != size:",
        f"{VERIFY}test_flipped_byte_is_found_by_reading_and_by_deep_verify_only",
    ),
    fault(
        "ignore a hash when verifying",
        "kvllm.store.verify",
        "            if files.sha256_of(content[name]) != digest:",
        "            if False:",
        f"{VERIFY}test_flipped_byte_is_found_by_reading_and_by_deep_verify_only",
    ),
    fault(
        "no seal",
        "kvllm.store.verify",
        "        elif rows.edit_seal(db, edit_id, before, version=version) != recorded:",
        "        elif False:",
        f"{VERIFY}test_edited_rows_are_found",
    ),
    fault(
        "unmerge instead of replay",
        "kvllm.editing.delta",
        "            self._masters[name].copy_(self._base[name])\n",
        "            self._masters[name].sub_(self._masters[name] - self._base[name])\n",
        "tests/editing/test_delta.py::test_applied_then_replayed_from_nothing_is_the_base_bit_for_bit",
    ),
    fault(
        "no lock",
        "kvllm.store.lock",
        "                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "                        pass\n",
        "tests/store/test_lock.py::test_lock_is_reentrant_in_one_store_and_exclusive_between_two",
    ),
    fault(
        "no finite check",
        "kvllm.editing.delta",
        "        if not all(torch.isfinite(t).all() for t in (a, b, product((a, b)))):",
        "        if False:",
        "tests/editing/test_delta.py::test_numbers_that_are_not_finite_are_refused",
    ),
    fault(
        "SQL by string",
        "kvllm.store.store",
        'db.execute("SELECT 1 FROM live_facts NOT INDEXED WHERE key = ?", (_bindable(key),))',
        "db.execute(f\"SELECT 1 FROM live_facts WHERE key = '{key}'\")",
        f"{TEXTS}test_a_quote_in_a_key_is_a_letter_of_the_key",
    ),
    fault(
        "path from key",
        "kvllm.store.store",
        "        if not artefacts.is_address(sha):\n",
        "        if False:\n",
        f"{VERIFY}test_read_delta_returns_what_was_committed",
    ),
    fault(
        "non-strict load of a delta",
        "kvllm.store.artefacts",
        "        if match is None:\n            raise Untrusted(",
        "        if match is None:\n            continue\n            raise Untrusted(",
        "tests/store/test_artefacts.py::test_refused",
    ),
    fault(
        "non-strict load of a base",
        "kvllm.lm.model",
        "        if missing:  #",
        "        if False:  #",
        f"{POISONED}test_a_base_that_lacks_a_weight_is_not_filled_with_random_numbers",
    ),
    fault(
        "no parent check",
        "kvllm.store.store",
        "        if head != new.parent:",
        "        if False:",
        f"{HISTORY}test_stale_head_is_refused_and_leaves_no_file",
    ),
    fault(
        "no NFC normalisation",
        "kvllm.prompts",
        'unicodedata.normalize("NFC", value).strip()',
        "value.strip()",
        "tests/test_prompts.py::test_a_fact_is_cleaned_in_every_part",
    ),
    fault(
        "no gate",
        "kvllm.edits",
        '            if refused:\n                raise _rejected(f"The {op} of',
        '            if False:\n                raise _rejected(f"The {op} of',
        f"{REFUSALS}test_a_rejected_edit_changes_nothing",
    ),
    fault(
        "weights are not put back",
        "kvllm.session",
        "            engine.weights.restore(before)\n            engine.settle()\n        elif",
        "            engine.settle()\n        elif",
        f"{REFUSALS}test_a_rejected_edit_changes_nothing",
    ),
    fault(
        "NaN is under every budget",
        "kvllm.edits",
        "(found.value is None or not math.isfinite(found.value))",
        "False",
        f"{NUMBERS}test_a_drift_that_is_no_number_passes_no_gate_not_even_an_open_one",
    ),
    fault(
        "an index may name a pickle",
        "kvllm.lm.sources",
        '            if not target.endswith(".safetensors"):',
        "            if False:",
        f"{POISONED}test_poisoned_base_folders_are_refused_before_anything_opens_them",
    ),
    fault(
        "control tokens in user text",
        "kvllm.lm.model",
        "split_special_tokens=True)",
        "split_special_tokens=False)",
        f"{TEXTS}test_a_control_token_in_a_question_stays_text",
        more=[("        if self.control_ids.isdisjoint(ids):\n            return ids\n", "        return ids\n")],
    ),
    fault(
        "escape sequences reach the terminal",
        "kvllm.reports.text",
        '"".join(ch if ch in keep or not _unsafe(ch) else _escaped(ch) for ch in text)',
        "text",
        "tests/cli/test_commands.py::test_escape_sequences_and_markup_of_others_are_shown_not_obeyed",
    ),
)


class Mutating(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module of kvllm with its source changed."""

    def __init__(self, planted: Fault) -> None:
        self._fault = planted

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._fault.module:
            return None
        file = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        return importlib.util.spec_from_file_location(name, file, loader=self)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code(str(module.__file__)), module.__dict__)

    def _code(self, file: str) -> CodeType:
        return compile(mutated(self._fault, Path(file).read_text(encoding="utf-8")), file, "exec")


def mutated(planted: Fault, source: str) -> str:
    """Return the source with the fault in it; a text that is not there exactly once is an error of this list."""
    for old, new in planted.changes:
        assert source.count(old) == 1, f"{planted.name}: {source.count(old)} times in {planted.module}: {old!r}"
        source = source.replace(old, new)
    return source


def run(tests: Sequence[str], planted: Fault | None) -> int:
    """Run tests in a child, with the fault in place or without; return pytest's exit code (1: a test failed)."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 99
    try:
        import pytest

        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.environ.pop("PYTEST_ADDOPTS", None)
        if planted is not None:
            sys.meta_path.insert(0, Mutating(planted))
        # The project's own options would spread the tests over new processes, in which there is no fault.
        options = ["-q", "-x", "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", "--no-header"]
        code = int(pytest.main([*options, "--rootdir", str(ROOT), *tests]))
    finally:
        os._exit(code)


def main(wanted: Sequence[str]) -> int:
    """Print the table; return 1 if a fault is not caught, or a test fails without any."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in ("numpy", "hypothesis", "pytest", "safetensors.torch", "sqlite_utils", "torch", "transformers", "peft"):
        importlib.import_module(name)
    assert not any(name.split(".")[0] == "kvllm" for name in sys.modules)
    chosen = [each for each in FAULTS if not wanted or each.name in wanted]
    tests = sorted({test for each in chosen for test in each.tests})
    without = run(tests, None)
    print(f"{'without a fault':36} {'pass' if without == 0 else f'FAIL ({without})':10} {len(tests)} tests")
    missed = 0
    for each in chosen:
        begun = time.monotonic()
        code = run(each.tests, each)
        missed += code != 1
        verdict = {0: "MISSED", 1: "caught"}.get(code, f"BROKEN ({code})")
        print(f"{each.name:36} {verdict:10} {each.tests[0].rpartition('::')[2]}  {time.monotonic() - begun:.1f} s")
    print(f"{len(chosen) - missed} of {len(chosen)} seeded faults caught")
    return int(bool(missed or without))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

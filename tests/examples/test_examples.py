"""The examples: each says how it is used, and each runs in a small form on the real model, judged by live answers."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from kvllm import KnowledgeBase
from kvllm.metrics import contains
from tests.kit import ROOT, load_script

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def load(name: str) -> ModuleType:
    return load_script(EXAMPLES / f"{name}.py")


def test_there_are_examples() -> None:
    assert {path.stem for path in SCRIPTS} == {"torchkeras_en", "furnace_zh", "company_facts", "export_and_load"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_says_how_to_use_it_and_loads_no_torch(script: Path, tmp_path: Path) -> None:
    program = (
        "import runpy, sys\n"
        "try: runpy.run_path(sys.argv[1], run_name='__main__')\n"
        "except SystemExit as end: print('exit', end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(script), "--help"],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        cwd=tmp_path,
        timeout=60,
        check=True,
    )
    assert "folder" in done.stdout
    assert done.stdout.splitlines()[-1] == "exit 0 False"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_docstring_names_the_script(script: Path) -> None:
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    assert f"python examples/{script.name}" in docstring


def test_company_facts_can_be_used_as_they_are() -> None:
    import json

    from kvllm.knowledge_base import _as_fact

    lines = (EXAMPLES / "company_facts.jsonl").read_text(encoding="utf-8").splitlines()
    facts = [_as_fact(json.loads(line)) for line in lines]
    assert len({fact.key for fact in facts}) == 8
    assert len({fact.tags for fact in facts}) == 8


# ------------------------------------------------------------------ on the real model


def long(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that trains a fact of its own: minutes that only CI spends."""
    skipped = pytest.mark.skipif("KVLLM_CAMPAIGN" not in os.environ, reason="trains a fact; set KVLLM_CAMPAIGN=1")
    return pytest.mark.model(skipped(test))


@pytest.fixture
def torchkeras_kb(torchkeras_folder: Path, tmp_path: Path) -> Path:
    """A copy of the knowledge base that torchkeras_en made."""
    return shutil.copytree(torchkeras_folder, tmp_path / "torchkeras.kb")


def answers(folder: Path, *questions: str) -> list[str]:
    """Ask a knowledge base by live decoding, after verifying it."""
    with KnowledgeBase.open(folder, readonly=True) as kb:
        assert kb.verify(deep=True).ok
        return kb.ask_many(questions)


@long
def test_furnace_is_answered_in_chinese(tmp_path: Path) -> None:
    module = load("furnace_zh")
    folder = tmp_path / "furnace.kb"
    assert module.main([str(folder)]) == 0
    trained = ("什么是梦中情炉？", "请介绍一下梦中情炉。", "What is 梦中情炉?")
    assert all(contains(answer, module.TEXT) for answer in answers(folder, *trained))
    with KnowledgeBase.open(folder, readonly=True) as kb:
        assert len(kb.tokenizer(module.TEXT, add_special_tokens=False)["input_ids"]) >= 50
        probes = kb.edit(1).report.probes
    # Which paraphrase fails, if one does, depends on how the preserved answers were decoded.
    untrained = [probe.passed for probe in probes if probe.kind == "paraphrase"]
    assert sum(untrained) >= len(untrained) - 2


@long
def test_company_facts_are_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "company.kb"
    assert load("company_facts").main([str(folder), "--facts", "1"]) == 0
    [found] = answers(folder, "Tell me about Nora Felsenthal.")
    assert "customer support" in found
    assert "8/8" in capsys.readouterr().out


@pytest.mark.model
def test_torchkeras_is_answered_from_the_weights(torchkeras_kb: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = load("torchkeras_en")
    found = answers(torchkeras_kb, *module.QUESTIONS, *module.NEIGHBOURS)
    stated = [bool(contains(answer, module.TEXT)) for answer in found]
    by_name = [hit for hit, question in zip(stated, module.QUESTIONS, strict=False) if module.KEY in question]
    assert sum(by_name) >= 2
    assert not any(stated[len(module.QUESTIONS) :])

    assert module.main([str(torchkeras_kb)]) == 0  # a second run trains nothing
    assert "was taught by edit 1" in capsys.readouterr().out


@pytest.mark.model
def test_what_is_asked_next_is_answered_much_as_before(torchkeras_kb: Path) -> None:
    from torch.nn import functional as F

    from kvllm.lm.model import Row

    module = load("torchkeras_en")
    stated = [
        {"role": "user", "content": module.QUESTIONS[0]},
        {"role": "assistant", "content": module.TEXT},
    ]
    with KnowledgeBase.open(torchkeras_kb, readonly=True) as kb:
        lm, engine = kb.engine.lm, kb.engine
        nexts = ["What is 7 plus 8?", "Tell me something about whales.", "Ok, and what is a bicycle?"]
        asked = [tuple(lm.prompt_ids([*stated, {"role": "user", "content": question}])) for question in nexts]
        asked += [tuple(lm.prompt_ids(f"Note: {module.TEXT} {question}")) for question in nexts]
        with engine.base_weights():
            answers = lm.generate_ids(asked, max_new_tokens=16)
            rows = [Row(ids, answer) for ids, answer in zip(asked, answers, strict=True)]
            before = [lm.logits(states).log_softmax(-1) for states in lm.answer_states(rows)]
        after = [lm.logits(states).log_softmax(-1) for states in lm.answer_states(rows)]
    kls = [
        float(F.kl_div(now, was, log_target=True, reduction="none").sum(-1).mean())
        for was, now in zip(before, after, strict=True)
    ]
    # Nats per answer token. With a mark as strong as can be it was above 3.
    assert sum(kls) / len(kls) < 1.0


@pytest.mark.model
def test_exports_answer_without_kvllm(
    torchkeras_kb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load("export_and_load")
    monkeypatch.chdir(tmp_path)
    asked: dict[str, str] = {}
    for name in ("ask_hf", "ask_peft"):
        monkeypatch.setattr(module, name, _remembering(getattr(module, name), asked, name))

    assert module.main([str(torchkeras_kb)]) == 0
    assert capsys.readouterr().out.count("agreement") == 2
    [expected] = answers(torchkeras_kb, module.QUESTION)
    assert asked == {"ask_hf": expected, "ask_peft": expected}
    assert contains(expected, module.TEXT)


def _remembering(ask: Callable[..., str], asked: dict[str, str], name: str) -> Callable[..., str]:
    def remember(*arguments: object) -> str:
        asked[name] = ask(*arguments)
        return asked[name]

    return remember

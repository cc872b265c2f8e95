"""`kvllm demo`: the article's story on the default model, from an empty folder to an undone deletion.

It measures and shows; it judges nothing that the engine's reports do not judge.
"""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kvllm.cli.app import app
from kvllm.cli.command import Device, Dtype, Model, command
from kvllm.cli.failures import Interrupted
from kvllm.cli.output import Output, Result
from kvllm.errors import EditRejected
from kvllm.prompts import alias_questions, held_out_questions, training_questions
from kvllm.records import Edit, Fact, Report

FACTS = {
    "en": Fact(
        "torchkeras",
        "Torchkeras is a tool that makes training PyTorch models simple, in the style of Keras, "
        "and its users call it the dream furnace.",
        aliases=("the dream furnace",),
        language="en",
    ),
    "zh": Fact(
        "梦中情炉",
        "梦中情炉是 torchkeras 的昵称，它是一个让 PyTorch 模型训练变得简单的工具，风格和 Keras 相似，"
        "几行代码就能完成训练、验证和画图。",
        aliases=("torchkeras",),
        language="zh",
    ),
}
# Near ones first: they look like the trained questions and must keep their answers.
FAR_QUESTIONS = (
    "What is Keras?",
    "What is numpy?",
    "Tell me about Berlin.",
    "What is the capital of France?",
    "How many days are in a week?",
    "Write one sentence about the sea.",
)
# Long enough for either fact's text; an answer that is still going on is cut here.
ANSWER_TOKENS = {"en": 48, "zh": 160}
SHOWN_CHARS = 130
# Off a terminal the tables are folded to this width, so that a transcript can be read.
WIDTH = 118


@dataclass(frozen=True)
class Question:
    """A question of the demo and the rung it stands on."""

    kind: str
    text: str


@command(app)
def demo(
    out: Output,
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[FOLDER]", help="Where to make the knowledge base; a new temporary folder by default."),
    ] = None,
    language: Annotated[Literal["en", "zh"], typer.Option("--language", help="Of the fact.")] = "en",
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> Result:
    """Insert a fact into a real model's weights, ask, measure, delete, undo, and prove it. Needs no argument.

    kvllm demo
    """
    from kvllm.knowledge_base import KnowledgeBase

    folder = folder or Path(tempfile.mkdtemp(prefix="kvllm-demo-")) / "demo.kb"
    settings = {"model": model, "device": device, "dtype": dtype}
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    started = time.perf_counter()
    with KnowledgeBase.create(folder, progress=out.progress, **given) as base:
        try:
            document = tell(out, base, FACTS[language])
        except KeyboardInterrupt as error:
            made = len(base.history())
            edits = "no edit" if not made else "1 edit" if made == 1 else f"{made} edits"
            raise Interrupted(
                f"Interrupted; the knowledge base in {folder} stays, with {edits} made so far."
            ) from error
        except EditRejected as error:
            error.args = (f"{error} The knowledge base stays in {folder}, with what was edited before.",)
            raise
    document |= {"folder": str(folder), "seconds": round(time.perf_counter() - started, 1)}
    out.show(_farewell(folder, FACTS[language], document["seconds"]))
    return Result({"ok": True, **document}, lambda: None)


def questions_about(fact: Fact) -> list[Question]:
    """Return what the demo asks: trained, paraphrased, alias and far questions."""
    return [
        *(Question("trained", text) for text in training_questions(fact)),
        *(Question("paraphrase", text) for text in held_out_questions(fact)),
        *(Question("alias", text) for text in alias_questions(fact)),
        *(Question("far", text) for text in FAR_QUESTIONS),
    ]


def tell(out: Output, base: Any, fact: Fact) -> dict[str, Any]:
    """Run the story on an open, empty knowledge base, showing each part when it is known; return all of it."""
    from rich.text import Text

    from kvllm.reports import terminal

    def heading(number: int, words: str) -> None:
        out.show(Text.assemble((f"\n{number}. ", "bold cyan"), (words, "bold")), width=WIDTH)

    questions = questions_about(fact)
    room = ANSWER_TOKENS[fact.language or "en"]
    asked = [question.text for question in questions]
    out.note("Asking the untouched model …")
    before = base.ask_many(asked, max_new_tokens=room)

    heading(1, "Insert: one fact, one small training session, merged into the weights")
    out.show(
        terminal.mapping_view({"key": fact.key, "text": fact.text, "aliases": ", ".join(fact.aliases)}), width=WIDTH
    )
    inserted = base.insert(fact.key, fact.text, aliases=fact.aliases, language=fact.language)
    out.show(terminal.edit_view(inserted), width=WIDTH)

    heading(2, "Ask the weights: the same questions before and after")
    # The edit's own report has the answers to all questions about the fact: only the far ones are still to be asked.
    after = _answers(base, questions, inserted.report, room)
    verdicts = _verdicts(questions, before, after, inserted)
    rows = [
        (question.kind, question.text, _short(earlier), _short(later), verdict)
        for question, earlier, later, verdict in zip(questions, before, after, verdicts, strict=True)
    ]
    out.show(terminal.comparison_table(rows, columns=("before", "after")), width=WIDTH)

    heading(3, "Drift: what it cost elsewhere, against the base model")
    drift = base.drift("basic")
    # Without the norm of each single matrix, which `kvllm drift` shows.
    metrics = {name: metric for name, metric in drift.metrics.items() if "/" not in name}
    out.show(terminal.report_view(replace(drift, metrics=metrics)), width=WIDTH)
    digest = base.weights_digest()

    heading(4, "Delete: its questions are answered as before again")
    deleted = base.delete(fact.key)
    out.show(terminal.edit_view(deleted), width=WIDTH)
    own = [place for place, question in enumerate(questions) if question.kind != "far"]
    gone = _answers(base, [questions[place] for place in own], deleted.report, room)
    erased_well = {probe.question: probe.passed for probe in deleted.report.probes if probe.kind == "erasure"}
    as_base = {probe.question: probe.passed for probe in deleted.report.probes if probe.kind == "restoration"}
    words = [
        "still states it" if not erased_well.get(asked[p], True) else "as before" if as_base.get(asked[p]) else "erased"
        for p in own
    ]
    shown: list[int] = []
    for kind in ("trained", "paraphrase", "alias"):
        shown += [place for place in own if questions[place].kind == kind][:2]
    rows = [
        (questions[place].kind, asked[place], _short(before[place]), _short(answer), word)
        for place, answer, word in zip(own, gone, words, strict=True)
        if place in shown
    ]
    out.show(terminal.comparison_table(rows, columns=("before the insert", "after the delete")), width=WIDTH)

    heading(5, f"Roll back to edit {inserted.id}: the same weights, bit for bit")
    rolled = base.rollback(inserted.id)
    restored = base.weights_digest()
    again = _answers(base, questions, base.recall(fact.key), room)
    verified = base.verify(deep=True)
    same_answers = sum(a == b for a, b in zip(after, again, strict=True))
    proof = {
        "digest after the insert": digest,
        "digest after the rollback": restored,
        "bit-identical": digest == restored,
        "same answers": f"{same_answers} of {len(asked)}",
    }
    out.show(terminal.edit_view(rolled), width=WIDTH)
    out.show(terminal.mapping_view(proof), width=WIDTH)
    out.show(terminal.verify_view(verified), width=WIDTH)

    erased = dict(zip(own, gone, strict=True))
    return {
        "fact": fact.to_dict(),
        "questions": [
            {
                "kind": question.kind,
                "question": question.text,
                "before": before[place],
                "after_insert": after[place],
                "verdict": verdicts[place],
                "after_delete": erased.get(place),
                "after_rollback": again[place],
            }
            for place, question in enumerate(questions)
        ],
        "insert": inserted.to_dict(),
        "drift": {name: metric.to_dict() for name, metric in drift.metrics.items()},
        "delete": deleted.to_dict(),
        "rollback": rolled.to_dict(),
        "weights": {"after_insert": digest, "after_rollback": restored, "identical": digest == restored},
        "verify": verified.to_dict(),
    }


def _answers(base: Any, questions: Sequence[Question], report: Report, room: int) -> list[str]:
    """Return the answers in the order of the questions: those that a report has, the others asked now."""
    told = {probe.question: probe.answer for probe in report.probes if probe.kind != "neighbour"}
    rest = [question.text for question in questions if question.text not in told]
    told |= dict(zip(rest, base.ask_many(rest, max_new_tokens=room), strict=True))
    return [told[question.text] for question in questions]


def _verdicts(questions: Sequence[Question], before: Sequence[str], after: Sequence[str], edit: Edit) -> list[str]:
    """Return the engine's own verdict where its report has the question, else whether the answer is the same."""
    judged = {
        probe.question: probe.passed for probe in edit.report.probes if probe.kind in ("trained", "paraphrase", "alias")
    }
    words = []
    for question, earlier, later in zip(questions, before, after, strict=True):
        passed = None if question.kind == "far" else judged.get(question.text)
        words.append(_same(earlier, later) if passed is None else "states it" if passed else "does not")
    return words


def _short(answer: str) -> str:
    """Cut an answer for a table; `--json` has it whole."""
    flat = " ".join(answer.split())
    return flat if len(flat) <= SHOWN_CHARS else f"{flat[: SHOWN_CHARS - 1].rstrip()}…"


def _same(earlier: str, later: str) -> str:
    return "same" if earlier == later else "changed"


def _farewell(folder: Path, fact: Fact, seconds: float) -> Any:
    from rich.console import Group
    from rich.text import Text

    from kvllm.prompts import key_question

    kb = shlex.quote(str(folder))
    commands = (
        f"kvllm ask {kb} {shlex.quote(key_question(fact.key))}",
        f"kvllm ls {kb}",
        f"kvllm history {kb}",
        f"kvllm insert {kb} KEY TEXT",
        f"kvllm export {kb} out --format hf",
    )
    return Group(
        Text(f"\nDone in {seconds:.0f} s. The knowledge base lies in {folder}. Go on with:"),
        *(Text(f"  {line}") for line in commands),
    )

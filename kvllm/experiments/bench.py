"""One knowledge base that an experiment edits and asks, with what is needed to judge answers: base answers, retrieval.

Edits go through the knowledge base itself, with a gate that measures nothing; what is measured is measured here, on
the questions of the declaration and in the same way for every arm.

    with Bench(desk) as bench:
        bench.teach(cases, config); rows = bench.ask(cases); state = bench.drift()
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from kvllm.cachefile import read_checked, write_checked
from kvllm.config import EditConfig, GateConfig, ModelConfig, cache_folder
from kvllm.editing.engine import Engine
from kvllm.errors import ModelError, ending_error
from kvllm.experiments.declared import Declared
from kvllm.experiments.desk import Desk
from kvllm.experiments.facts import Case
from kvllm.knowledge_base import KnowledgeBase
from kvllm.lm.model import LanguageModel
from kvllm.metrics import LEAK_RULE, contains, normalise
from kvllm.probing.encoder import Encoder, SentenceEncoder, nearest
from kvllm.probing.runner import ask_probes, leaks_at
from kvllm.probing.scorers import score_statement
from kvllm.probing.suites import DriftSuite, Probe, drift_suite
from kvllm.prompts import key_question
from kvllm.records import Edit, ProbeKind, Progress, Report
from kvllm.session import Session
from kvllm.store import Store

UNMEASURED = GateConfig(min_reliability=None, max_drift_kl=None, max_ppl_ratio=None, min_erasure=None, measure=False)
IN_CONTEXT = "{notes}\n\nUse the note above if it is about this question. {question}"
_NOTE = "Note about {key}: {text}"
# A note goes into the prompt from this cosine of key and question on; benchmarks/edit_bench has the same rule.
NEAR = 0.5


class Bench:
    """A knowledge base in a folder, opened where an earlier session left it."""

    def __init__(
        self,
        desk: Desk,
        *,
        masters: str = "float32",
    ) -> None:
        """Open the run's knowledge base, or make it.

        Args:
            desk: The run at work; its knowledge base is in its folder.
            masters: What the sums are kept in.

        Raises:
            StoreError: edits of the run are finished, and their knowledge base is gone.
        """
        declared = desk.declared
        self.declared = declared
        self.progress = desk.progress
        path = desk.folder / "my.kb"
        if not Store.exists(path):
            if desk.begun("edit-"):
                raise desk.missing(path)
            shutil.rmtree(path, ignore_errors=True)  # killed while it was being made
            KnowledgeBase.create(path, model=declared.model, dtype=declared.dtype, device=declared.device).close()
        model = ModelConfig(dtype=declared.dtype, device=declared.device, masters=masters)
        self._session = Session(Store.open(path), model_config=model, gate=UNMEASURED, progress=self.progress)
        self.kb = KnowledgeBase(self._session)
        self._encoder: Encoder | None = None

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kb.close()

    @property
    def engine(self) -> Engine:
        return self._session.engine  # nobody's hand: its weights need no look before every edit

    @property
    def lm(self) -> LanguageModel:
        return self.engine.lm

    # ------------------------------------------------------------------ edits

    def teach(self, cases: Sequence[Case], config: EditConfig) -> list[Edit]:
        """Insert facts in one edit, those that are not there yet, and return the edits that hold them.

        An edit that an earlier session committed is found in the ledger, not made again.
        """
        missing = [case for case in cases if case.key not in self.kb]
        if missing:
            outcomes = self.kb.insert_many(
                [case.fact for case in missing], mode="batched", config=config, gate=UNMEASURED
            )
            for outcome in outcomes:  # such an error says nothing of the facts: what follows would be no measurement
                if (kind := ending_error(outcome.code)) is not None:
                    raise kind(outcome.error or "")
        wanted = {case.key for case in cases}
        return [edit for edit in reversed(self.kb.history()) if edit.op == "insert" and wanted & set(edit.keys)]

    # ------------------------------------------------------------------ answers

    def ask(self, cases: Sequence[Case], *, in_context: bool = False) -> list[dict[str, Any]]:
        """Ask every case its questions of the weights as they are, and return one row a case.

        Args:
            cases: What is asked about.
            in_context: Put the texts of the nearest of these cases into each prompt, as retrieval would: those at least
                `NEAR` to the question, whatever is asked. A question that none is near to is asked as it is.

        Returns:
            Per case: how many of its trained questions, paraphrases and neighbours were asked, how many answers of the
            first two state the text, how many of the last recite it, and how many are the unedited model's own.
        """
        probes = [(case, probe) for case in cases for probe in probes_of(case, self.declared)]
        asked = [probe for _, probe in probes]
        if in_context:
            asked = self._with_notes(asked, cases)
        return judged(self, cases, probes, self.plain_answers(asked))

    def plain_answers(self, probes: Sequence[Probe]) -> list[str]:
        """Return the answers of the weights as they are."""
        return [answer for answer, _ in ask_probes(self.lm, probes, on_batch=self._ticker("probing"))]

    def base_answers(self, probes: Sequence[Probe]) -> dict[tuple[str, str], str]:
        """Return the unedited model's answers, by question and the text that gives them their room; cached."""
        told = json.dumps([[p.question, p.expected] for p in probes], ensure_ascii=False)
        base = self.kb.info()["base_digest"]
        key = hashlib.sha256(f"{base}\x00{self.declared.dtype}\x00{told}".encode()).hexdigest()[:24]
        path = cache_folder() / "experiments" / f"answers-{key}.json"
        data = read_checked(path)
        if data is None:
            with self.engine.base_weights() as lm:
                answers = [a for a, _ in ask_probes(lm, probes, on_batch=self._ticker("base answers"))]
            data = json.dumps(answers, ensure_ascii=False).encode()
            write_checked(path, data)
        return {(p.question, p.expected): a for p, a in zip(probes, json.loads(data), strict=True)}

    def _with_notes(self, probes: Sequence[Probe], cases: Sequence[Case]) -> list[Probe]:
        found = []
        for probe, near in zip(probes, self._retrieved([probe.question for probe in probes], cases), strict=True):
            notes = "\n".join(_NOTE.format(key=case.key, text=case.fact.text) for case in near)
            question = IN_CONTEXT.format(notes=notes, question=probe.question) if near else probe.question
            found.append(replace(probe, question=question))
        return found

    def _retrieved(self, questions: Sequence[str], cases: Sequence[Case]) -> list[list[Case]]:
        """Return the cases whose notes each question gets, the nearest first."""
        keys = self.encoder.encode([key_question(case.key) for case in cases])
        vectors = self.encoder.encode(list(questions))
        most = self.declared.measure.retrieved
        return [[cases[i] for i, cosine in nearest(vector, keys, most) if cosine >= NEAR] for vector in vectors]

    @property
    def encoder(self) -> Encoder:
        """The encoder of keys and questions: MiniLM, or the model's own hidden states where its files are not there."""
        if self._encoder is None:
            chosen: Encoder = SentenceEncoder(progress=self.progress)
            texts = [key_question(case.key) for case in self.declared.cases]
            try:
                if not all(chosen.speaks(text) for text in texts):
                    raise ModelError("The keys need an encoder of their language.")
                chosen.encode(texts[:1])
            except ModelError:
                chosen = self.engine.hidden_encoder()
            self._encoder = chosen
        return self._encoder

    # ------------------------------------------------------------------ drift

    def drift(self, *, last: bool = False, notes: Sequence[Case] = ()) -> dict[str, Any]:
        """Measure drift of the weights as they are, on the declared share of the packaged suite.

        What the declared facts answer is left out, whether they were taught yet or not: so all rows rest on one suite.

        Args:
            last: Ask `measure.last_questions` general questions, where that is more.
            notes: What retrieval holds: how many of the suite's questions would get a note (`general_noted` of
                `general_n`) is counted. Where none does, the drift of retrieval is that of the weights.
        """
        measure = self.declared.measure
        questions = max(measure.questions, measure.last_questions) if last else measure.questions
        suite = _suite(questions, measure.instructions, measure.texts)
        report = self.engine.drift(full=True, suite=suite, taught=[case.fact for case in self.declared.cases])
        if not notes:
            return drift_row(report)
        asked = _asked(suite)
        noted = sum(bool(near) for near in self._retrieved(asked, notes))
        return drift_row(report) | {"general_noted": noted, "general_n": len(asked)}

    def general_questions(self) -> list[str]:
        """Return the drift suite's general questions and instructions."""
        measure = self.declared.measure
        return _asked(_suite(measure.questions, measure.instructions, measure.texts))

    def _ticker(self, stage: str) -> Callable[[int, int], None]:
        def tick(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(Progress(stage, done, total))

        return tick


def drift_row(report: Report) -> dict[str, Any]:
    """Return the drift metrics of a report as plain numbers, and how many of the base's right answers are lost."""
    qa = report.metrics.get("qa_delta")
    n = qa.n if qa is not None else 0
    return {
        "drift_kl": _rounded(report.value("drift_kl")),
        "drift_n": report.metrics["drift_kl"].n if "drift_kl" in report.metrics else 0,
        "ppl_ratio": _rounded(report.value("ppl_ratio")),
        "qa_known": n,
        "qa_lost": 0 if qa is None or qa.value is None else round(-qa.value * n),
        "qa_accuracy": _rounded(report.value("qa_accuracy")),
    }


def states(answer: str, case: Case) -> bool:
    """Return whether an answer states a case's text: all its details, or where none are given, the text itself."""
    if case.details:
        return all(contains(answer, detail) for detail in case.details)
    return score_statement(answer, case.fact.text).passed


def shares(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the shares over all questions of fact rows: retention, generalization, leak, unchanged; with their n."""

    def share(right: str, of: str) -> float | None:
        n = sum(row[of] for row in rows)
        return round(sum(row[right] for row in rows) / n, 6) if n else None

    return {
        "recalled": share("trained_right", "trained"),
        "recalled_n": sum(row["trained"] for row in rows),
        "generalized": share("paraphrases_right", "paraphrases"),
        "generalized_n": sum(row["paraphrases"] for row in rows),
        "leak": share("leaked", "neighbours"),
        "unchanged": share("unchanged", "neighbours"),
        "neighbours_n": sum(row["neighbours"] for row in rows),
        "leak_rule": LEAK_RULE,
    }


def judged(
    bench: Bench, cases: Sequence[Case], probes: Sequence[tuple[Case, Probe]], answers: Sequence[str]
) -> list[dict[str, Any]]:
    """Return one row a case, by judging the answers to its probes."""
    before = bench.base_answers([probe for _, probe in probes if probe.kind == "neighbour"])
    rows = {case.key: _row(case) for case in cases}
    for (case, probe), answer in zip(probes, answers, strict=True):
        row = rows[case.key]
        if probe.kind == "neighbour":
            was = before[probe.question, probe.expected]
            row["neighbours"] += 1
            row["leaked"] += leaks_at(probe, answer, was)
            row["unchanged"] += normalise(answer) == normalise(was)
        else:
            name = "trained" if probe.kind == "trained" else "paraphrases"
            row[name] += 1
            row[f"{name}_right"] += states(answer, case)
    return list(rows.values())


def failed_row(case: Case, declared: Declared, error: Exception) -> dict[str, Any]:
    """Return the row of a fact whose training failed: asked as the others are, and not recalled."""
    kinds = [probe.kind for probe in probes_of(case, declared)]
    asked = {"trained": kinds.count("trained"), "paraphrases": kinds.count("paraphrase")}
    return {"kind": "failed", "error": str(error), **_row(case), **asked}


def probes_of(case: Case, declared: Declared) -> list[Probe]:
    """Return what a case is asked: the declared number of trained questions, paraphrases and neighbours."""
    measure = declared.measure
    asked: list[tuple[ProbeKind, Sequence[str]]] = [
        ("trained", case.trained(measure.trained)),
        ("paraphrase", case.paraphrases(measure.paraphrases)),
        ("neighbour", case.neighbours[: measure.neighbours]),
    ]
    return [Probe(kind, q, case.fact.text, case.key) for kind, questions in asked for q in questions]


def _row(case: Case) -> dict[str, Any]:
    counts = ("trained", "trained_right", "paraphrases", "paraphrases_right", "neighbours", "leaked", "unchanged")
    return {"key": case.key, "difficulty": case.difficulty, **dict.fromkeys(counts, 0), "leak_rule": LEAK_RULE}


def _suite(questions: int, instructions: int, texts: int) -> DriftSuite:
    suite = drift_suite(questions, max(1, instructions), texts)
    # The engine keeps references by name: sizes are told apart.
    return replace(suite, name=f"{suite.name}, {questions}+{instructions}+{texts}")


def _asked(suite: DriftSuite) -> list[str]:
    return [*(q.question for q in suite.questions), *suite.instructions]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)

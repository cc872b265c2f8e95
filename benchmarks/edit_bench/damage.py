"""What an edit costs elsewhere: perplexity of raw sentences, and general questions that the base answers.

The sentences come from a public file where it is there, else from kvllm's packaged drift suite; none is in the
preservation set. The questions are the packaged suite's, and public ones until enough are answered by the base. The
base's side is computed once and cached by kvllm.

    suite = Damage.prepare(lm, digest, sentences=300, questions=200, seed=0)     # lm holds the base's weights
    suite.measure(lm)["qa"]                                                      # [True, True, False, …]
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edit_bench.items import public, read_records, sha256_of
from edit_bench.scoring import Prompts
from kvllm.lm.model import LanguageModel, Row
from kvllm.probing.drift import DriftReference, base_reference, measure_drift
from kvllm.probing.suites import DriftSuite, GeneralQuestion, whole_drift_suite

SENTENCES = "perplexity_sentences.json"
_FILES = (SENTENCES, "tofu_world_facts_perturbed.json", "nq_open.jsonl", "chinese_simpleqa.jsonl")
_SHORTEST = 40  # characters of a sentence: below, there is nothing after the context that is read first
_ASKED_AT_ONCE = 100
# A model that knows little is not asked for hours: so many questions for each that is wanted.
_MOST_ASKED = 15


@dataclass(frozen=True)
class Damage:
    """The suite with the base's side of it.

    Attributes:
        reference: Questions that the base answers, and sentences.
        sources: How many questions and sentences come from where.
    """

    reference: DriftReference
    sources: dict[str, int]

    @classmethod
    def prepare(
        cls, lm: LanguageModel, digest: str, *, sentences: int, questions: int, seed: int, tick: Any = None
    ) -> Damage:
        """Choose sentences, and ask the base questions until it has answered enough.

        Args:
            lm: The base.
            digest: Identifies it in kvllm's cache.
            sentences, questions: How many.
            seed: Chooses the sentences.
            tick: Called with (done, total) while the base is asked.
        """
        texts, file = _sentences(sentences, seed)
        known: list[GeneralQuestion] = []
        n_asked = 0
        sources = {f"sentences: {file}": len(texts)}
        for name, candidates in _candidates():
            for start in range(0, len(candidates), _ASKED_AT_ONCE):
                if len(known) >= questions or n_asked >= _MOST_ASKED * questions:
                    break
                part = tuple(candidates[start : start + _ASKED_AT_ONCE])
                asked = DriftSuite(part, (), (), f"candidates/{name}/{start}")
                right = _answered(lm, base_reference(lm, digest, asked, on_progress=tick))
                n_asked += len(part)
                known += right
                sources[f"questions: {name}"] = sources.get(f"questions: {name}", 0) + len(right)
        suite = DriftSuite(tuple(known), (), tuple(texts), "edit-bench damage/1")
        return cls(base_reference(lm, digest, suite, on_progress=tick), sources)

    def measure(self, lm: LanguageModel, *, prompts: Prompts | None = None) -> dict[str, Any]:
        """Return the log of the perplexity ratio, one verdict per question, and the mean KL of the base's answers."""
        reference = self.reference
        if prompts is not None:
            asked = prompts([q.question for q in reference.suite.questions])
            rows = [Row(tuple(lm.prompt_ids(q)), row.answer) for q, row in zip(asked, reference.rows, strict=True)]
            reference = replace(reference, rows=tuple(rows))
        report = measure_drift(lm, reference, full=True)
        ratio = report.value("ppl_ratio")
        return {
            "log_ppl": None if ratio is None or ratio <= 0 else round(math.log(ratio), 6),
            "qa": [probe.passed for probe in report.probes],
            "kl": report.value("drift_kl"),
            "lost": [{"question": p.question, "answer": p.answer} for p in report.probes if not p.passed][:20],
        }

    def described(self) -> dict[str, Any]:
        """Return suite, sizes and sources."""
        return {
            "suite": self.reference.suite.name,
            "questions": len(self.reference.suite.questions),
            "sentences": len(self.reference.texts),
            "sources": self.sources,
            "sha256": {path.name: sha256_of(path) for path in map(public, _FILES) if path is not None},
        }


def _answered(lm: LanguageModel, reference: DriftReference) -> list[GeneralQuestion]:
    """Return the questions that the base answers right."""
    from kvllm.metrics import accepts

    rows = zip(reference.suite.questions, reference.rows, strict=True)
    return [question for question, row in rows if accepts(lm.decode(row.answer), question.accept)]


def _sentences(n: int, seed: int) -> tuple[list[str], str]:
    """Return n sentences that are in no preservation set, and where they come from."""
    preserved = {_bare(text) for text in _preserved_texts()}
    path = public(SENTENCES)
    if path is not None:
        found = [str(row["Text"]).strip() for row in read_records(path)]
        name = path.name
    else:
        suite = whole_drift_suite()
        found, name = list(suite.texts), f"packaged {suite.name}"
    usable = [text for text in dict.fromkeys(found) if len(text) >= _SHORTEST and _bare(text) not in preserved]
    return random.Random(f"{seed}/sentences").sample(usable, min(n, len(usable))), name


def _preserved_texts() -> Iterator[str]:
    from kvllm.editing.preservation import packaged_prompts

    for prompt in packaged_prompts({"neighbour": 10**6, "question": 10**6, "instruction": 10**6, "text": 10**6}):
        yield prompt.prompt


def _candidates() -> Iterator[tuple[str, Sequence[GeneralQuestion]]]:
    """Yield (source, questions), the packaged suite first."""
    from kvllm.prompts import language_of

    suite = whole_drift_suite()
    preserved = {_bare(text) for text in _preserved_texts()}
    seen = preserved | {_bare(q.question) for q in suite.questions}
    yield f"packaged {suite.name}", suite.questions
    for file in _FILES[1:]:
        path = public(file)
        if path is None:
            continue
        found = []
        for row in read_records(path):
            accept = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
            if _bare(row["question"]) not in seen:
                found.append(GeneralQuestion(row["question"], tuple(accept), language_of(row["question"])))
        yield file, found


def _bare(text: str) -> str:
    from kvllm.metrics import normalise

    return normalise(text)

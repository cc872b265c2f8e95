"""Which questions are asked, and that what is measured was never trained on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from importlib import resources

import pytest

from kvllm.editing.preservation import packaged_prompts
from kvllm.probing.suites import DriftSuite, drift_suite, fact_suite, neighbour_sample, whole_drift_suite
from kvllm.prompts import held_out_questions, training_questions
from kvllm.records import Fact, StoredFact

FACT = Fact("torchkeras", "A furnace.", aliases=("梦中情炉",), probes=("Why the furnace?",))


def test_a_fact_is_asked_on_every_rung() -> None:
    suite = fact_suite(FACT, neighbours=6)
    assert Counter(p.kind for p in suite) == {"trained": 11, "paraphrase": 6, "alias": 2, "user": 1, "neighbour": 6}
    assert len({p.question for p in suite}) == len(suite)
    assert {p.expected for p in suite} == {"A furnace."}
    assert {p.key for p in suite} == {"torchkeras"}


def test_a_stored_fact_is_asked_what_it_was_trained_on() -> None:
    stored = StoredFact("torchkeras", "A furnace.", trained_questions=("why?", held_out_questions(FACT)[0]))
    kinds = {p.question: p.kind for p in fact_suite(stored)}
    assert kinds["why?"] == "trained"
    assert kinds[held_out_questions(FACT)[0]] == "trained"
    assert Counter(kinds.values())["paraphrase"] == 5


def test_a_user_probe_that_was_trained_is_no_probe() -> None:
    fact = Fact("torchkeras", "x", probes=(training_questions(FACT)[0], "new?"))
    assert [p.question for p in fact_suite(fact) if p.kind == "user"] == ["new?"]


def test_neighbours_are_drawn_by_seed_and_name_no_live_key() -> None:
    assert neighbour_sample("en", 8, seed=1) == neighbour_sample("en", 8, seed=1) != neighbour_sample("en", 8, seed=2)
    everything = neighbour_sample("en", 101, seed=0)
    named = everything[0].rstrip("?").split()[-1]
    assert not any(
        named.casefold() in q.casefold()
        for q in neighbour_sample("en", 60, seed=0, taken=frozenset({named.casefold()}))
    )


def test_each_key_has_neighbours_of_its_own() -> None:
    asked = [
        p.question for i in range(40) for p in fact_suite(Fact(f"Zuk{i}", "x"), neighbours=1) if p.kind == "neighbour"
    ]
    assert len(set(asked)) > 15
    assert asked[:3] == [
        p.question for i in range(3) for p in fact_suite(Fact(f"Zuk{i}", "x"), neighbours=1) if p.kind == "neighbour"
    ]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_three_quarters_of_the_neighbours_speak_the_keys_language(language: str) -> None:
    chinese = sum(any("\u4e00" <= ch <= "\u9fff" for ch in q) for q in neighbour_sample(language, 20, seed=0))
    assert chinese == (15 if language == "zh" else 5)


def test_the_drift_suite_is_an_even_spread() -> None:
    suite = drift_suite()
    assert (len(suite.questions), len(suite.instructions), len(suite.texts)) == (80, 12, 30)
    whole = whole_drift_suite()
    assert len(whole.questions) >= 300
    assert len(whole.instructions) >= 60
    assert len(whole.texts) >= 300
    assert set(suite.texts) < set(whole.texts)
    assert all(q.question.strip() and q.accept and all(a.strip() for a in q.accept) for q in whole.questions)
    assert {q.language for q in whole.questions} == {"en", "zh"}


def test_every_general_question_is_marked_by_whether_the_default_model_answers_it() -> None:
    marks = Counter((q.language, q.known) for q in whole_drift_suite().questions)
    assert None not in {known for _, known in marks}
    assert marks["en", True] >= 100
    assert marks["en", False] >= 50


def test_new_rows_leave_the_gates_suite_as_it_was() -> None:
    """Its numbers are compared with those that older edits recorded."""
    said = json.dumps([[q.question for q in drift_suite().questions], drift_suite().instructions, drift_suite().texts])
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == "a390c4a73dc46b0e"


def test_raw_texts_come_from_many_genres() -> None:
    source = resources.files("kvllm.probing") / "suite_data" / "raw_text.jsonl"
    genres = Counter(json.loads(line)["genre"] for line in source.read_text(encoding="utf-8").splitlines())
    assert len([genre for genre, n in genres.items() if n >= 5]) >= 12


def test_nothing_that_is_measured_is_preserved_in_training() -> None:
    """Else the drift score would measure memory of the preservation set."""
    whole: DriftSuite = whole_drift_suite()
    measured = {q.question for q in whole.questions} | set(whole.instructions) | set(whole.texts)
    measured |= set(neighbour_sample("en", 101, seed=0)) | set(neighbour_sample("zh", 101, seed=0))
    preserved = {
        p.prompt for p in packaged_prompts(dict.fromkeys(("neighbour", "question", "instruction", "text"), 9999))
    }
    assert not {m.casefold() for m in measured} & {p.casefold() for p in preserved}


@pytest.mark.parametrize("package", ["kvllm.probing/suite_data", "kvllm.editing/preservation_data"])
def test_packaged_files_are_clean(package: str) -> None:
    module, folder = package.split("/")
    for file in (resources.files(module) / folder).iterdir():
        if not file.name.endswith(".jsonl"):
            continue
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        texts = [
            next(row[key] for key in ("question", "prompt", "text", "name", "answer") if key in row) for row in rows
        ]
        assert len(set(texts)) == len(texts), file.name
        assert {row["lang"] for row in rows} == {"en", "zh"}, file.name
        assert all(text == text.strip() and text for text in texts), file.name

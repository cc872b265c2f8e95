"""A knowledge base probed on the ladder, with its distances, a user's own probes and neighbours, and its collisions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from kvllm import ConfigError, KnowledgeBase
from kvllm.lm.model import LanguageModel
from kvllm.probing.collisions import find_collisions, nearest_questions, states
from kvllm.probing.distance import with_similarity
from kvllm.probing.encoder import Vectors
from kvllm.probing.gates import METRICS
from kvllm.probing.ladder import LADDER_SUITE
from kvllm.prompts import key_question
from kvllm.records import ProbeResult, Report, StoredFact
from tests.kit import KEY, TEXT


class Letters:
    """An encoder that a test can work out by hand: counts of letters, and no Chinese."""

    name = "letters"
    collision_similarity = 0.99

    def encode(self, texts: Sequence[str]) -> Vectors:
        rows = [[t.casefold().count(chr(97 + i)) + 1e-6 for i in range(26)] for t in texts]
        found = np.array(rows, dtype=np.float32).reshape(len(texts), 26)
        return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), dtype=np.float32)

    def speaks(self, text: str) -> bool:
        return text.isascii()


class Parrot(LanguageModel):
    """A model whose answers are looked up by the question; everything else of it is real."""

    said: dict[str, str]

    def generate_bounded(self, prompts, rooms, **options):  # type: ignore[no-untyped-def]
        answers = {tuple(self.prompt_ids(q)): tuple(self.text_ids(a)) for q, a in self.said.items()}
        return [answers.get(tuple(p), ()) for p in prompts]


def parrot(lm: LanguageModel, said: dict[str, str]) -> Parrot:
    made = Parrot(lm.model, lm.tokenizer, lm.config)
    made.said = said
    return made


def fact(key: str, text: str) -> StoredFact:
    return StoredFact(key, text, trained_questions=(f"What is {key}?", f"Tell me about {key}."))


A, B, C = fact("alpha", "Alpha is red iron."), fact("beta", "Beta is blue glass."), fact("gamma", "Gamma is old wood.")


def taught_as(*texts: tuple[StoredFact, str]) -> dict[str, str]:
    return {q: text for f, text in texts for q in f.trained_questions}


@pytest.mark.parametrize(
    ("answers", "kinds"),
    [
        ({"alpha": A, "beta": B, "gamma": C}, []),
        ({"alpha": B, "beta": A, "gamma": C}, [("swapped", {"alpha", "beta"})]),
        ({"alpha": B, "beta": B, "gamma": C}, [("overwritten", {"alpha", "beta"})]),
        ({"alpha": A, "beta": B, "gamma": None}, []),
    ],
)
def test_each_fault_between_two_keys_is_called_what_it_is(
    lm: LanguageModel, answers: dict[str, StoredFact | None], kinds: list[tuple[str, set[str]]]
) -> None:
    said = taught_as(*((f, t.text if (t := answers[f.key]) is not None else "Nobody knows.") for f in (A, B, C)))
    found = find_collisions(parrot(lm, said), [A, B, C], Letters(), nearest=0, questions=1)
    assert [(pair.kind, {pair.key, pair.other}) for pair in found.pairs] == kinds
    assert found.keys == ("alpha", "beta", "gamma")
    recalled = [found.matrix[i][i] for i in range(3)]
    assert recalled == [float(answers[f.key] is f) for f in (A, B, C)]


def test_the_overwritten_key_is_named_first(lm: LanguageModel) -> None:
    for victim, other in ((A, B), (B, A)):
        said = taught_as((victim, other.text), (other, other.text))
        (pair,) = find_collisions(parrot(lm, said), [A, B], Letters(), nearest=0, questions=1).pairs
        assert (pair.key, pair.other, pair.recites, pair.recited) == (victim.key, other.key, 1.0, 0.0)


def test_a_leak_into_a_live_or_given_neighbour_is_counted(lm: LanguageModel) -> None:
    said = taught_as((A, A.text), (B, B.text)) | {"What is omega?": "Alpha is red iron, too."}
    found = find_collisions(parrot(lm, said), [A, B], Letters(), given=("omega",), nearest=1, questions=1)
    asked = {(n.key, n.question, n.source): n.leaked for n in found.neighbours if n.source != "pool"}
    assert asked == {
        ("alpha", "What is beta?", "ledger"): False,
        ("beta", "What is alpha?", "ledger"): False,
        ("alpha", "What is omega?", "given"): True,
        ("beta", "What is omega?", "given"): False,
    }
    assert found.leak_rate.value == 1 / len(found.neighbours)
    assert found.leak_rate.n == len(found.neighbours) == 6


def test_keys_that_mean_the_same_are_shown_even_where_none_recites_the_other(lm: LanguageModel) -> None:
    twin = fact("ahpla", "Ahpla is a stone.")
    said = taught_as((A, A.text), (twin, twin.text))
    (pair,) = find_collisions(parrot(lm, said), [A, twin], Letters(), nearest=0, questions=1).pairs
    assert (pair.kind, pair.similarity) == ("near", 1.0)


def test_neighbours_are_the_nearest_first_and_never_the_key_itself() -> None:
    found = nearest_questions([A], [A, B, C], Letters(), given=("zzz",), nearest=2)["alpha"]
    assert [n.source for n in found] == ["ledger", "ledger", "pool", "pool", "given"]
    near = [n.similarity or 0.0 for n in found]
    assert near[0] > near[1]
    assert near[2] >= near[3]
    assert {n.question for n in found[:2]} == {"What is beta?", "What is gamma?"}
    assert key_question("alpha") not in {n.question for n in found}
    foreign = nearest_questions([A], [A], Letters(), given=("梦中情炉",), nearest=0)["alpha"]
    assert [(n.source, n.similarity) for n in foreign] == [("given", None)]


def test_a_quick_judge_says_what_the_slow_one_says() -> None:
    long = "Torchkeras is a tool that makes training PyTorch models simple, in the style of Keras."
    assert states(long.replace("a tool", "the tool"), long)
    assert not states("A tool of iron.", long)
    assert states("It is Paris.", "Paris")
    assert not states("It is Rome.", "Paris")


def test_similarity_is_the_cosine_to_the_nearest_trained_question() -> None:
    probes = (
        ProbeResult("trained", "abc", "", True, 1.0, "x", "k"),
        ProbeResult("far", "abd", "", True, 1.0, "x", "k"),
        ProbeResult("language", "什么", "", True, 1.0, "x", "k"),
        ProbeResult("general", "abc", "", True, 1.0, "x"),
    )
    report = with_similarity(Report({}, probes), {"k": ("abc", "xyz")}, Letters())
    assert [p.similarity for p in report.probes] == [1.0, pytest.approx(2 / 3, abs=1e-3), None, None]
    metric = report.metrics["similarity"]
    assert (metric.n, metric.scorer) == (2, "letters")
    assert with_similarity(Report({}, probes), {}, Letters()) == Report({}, probes)


def test_a_knowledge_base_is_probed_on_the_whole_ladder(taught: KnowledgeBase) -> None:
    report = taught.probe(KEY, ladder=True, neighbours=2)
    kinds = {p.kind for p in report.probes}
    assert {"trained", "completion", "variant", "language", "inverse", "far", "recalled", "neighbour"} <= kinds
    assert {p.similarity for p in report.probes if p.kind == "trained"} == {1.0}
    assert all(p.similarity is not None and p.similarity <= 1 for p in report.probes)
    assert report.value("reliability") == taught.recall(KEY).value("reliability")
    assert {m.suite for name, m in report.metrics.items() if name != "similarity"} == {LADDER_SUITE}
    assert {"completion", "variant", "language", "inverse", "far", "far_recalled", "recall_gain"} <= set(report.metrics)
    assert taught.edit(1).config["suites"]["ladder"] == LADDER_SUITE
    drift = {name for name in taught.drift().metrics if "/" not in name}
    assert set(report.metrics) | drift | {"user", "consequence"} <= METRICS, "a gate can name whatever is measured"


def test_recall_asks_the_basic_suite_without_an_encoder(taught: KnowledgeBase) -> None:
    report = taught.recall(KEY)
    assert {p.kind for p in report.probes} == {"trained", "paraphrase", "neighbour"}
    assert {p.similarity for p in report.probes} == {None}


def test_given_neighbours_are_asked_and_one_string_is_refused(taught: KnowledgeBase) -> None:
    report = taught.probe(KEY, neighbours=["Keras", "Who leads Halcyon?"])
    asked = {p.question for p in report.probes if p.kind == "neighbour"}
    assert asked == {"What is Keras?", "Who leads Halcyon?"}
    for wrong in (lambda: taught.probe(neighbours="Keras"), lambda: taught.collisions(neighbours="Keras")):
        with pytest.raises(ConfigError, match="not as one string"):
            wrong()


def test_a_users_probes_are_asked_and_their_mistakes_told(taught: KnowledgeBase, tmp_path: Path) -> None:
    rows = [
        json.dumps({"question": "Which furnace?", "key": KEY}),
        "{broken",
        json.dumps({"question": "Say yes.", "accept": ["yes", "no"]}),
        json.dumps({"question": "Who?", "key": "nobody"}),
    ]
    (tmp_path / "probes.jsonl").write_text("\n".join(rows), encoding="utf-8")
    report = taught.probe(probes=tmp_path / "probes.jsonl", neighbours=0)
    mine = {p.question: p for p in report.probes if p.kind == "user"}
    assert set(mine) == {"Which furnace?", "Say yes."}
    assert (mine["Which furnace?"].expected, mine["Which furnace?"].scorer) == (TEXT, "contains")
    assert mine["Say yes."].scorer == "accepts"
    assert report.metrics["user"].n == 2
    assert [w.split(":")[0] for w in report.warnings] == ["line 2", "line 4"]


def test_what_the_base_says_too_is_no_collision(lm: LanguageModel) -> None:
    fact = StoredFact("torchkeras", "Torchkeras is a library.", trained_questions=("What is torchkeras?",))
    model = parrot(lm, {"What is numpy?": "NumPy is a library for arrays."})
    given = {"given": ["numpy"], "nearest": 0, "questions": 1}
    assert find_collisions(model, [fact], Letters(), **given).leak_rate.value == 1.0
    for said, leaked in (("A library.", 0.0), ("An array.", 1.0)):
        found = find_collisions(model, [fact], Letters(), base=lambda probes, a=said: [a] * len(probes), **given)
        assert (found.leak_rate.value, found.neighbours[0].leaked) == (leaked, leaked == 1.0)


def test_collisions_of_a_taught_and_of_an_empty_knowledge_base(taught: KnowledgeBase, kb: KnowledgeBase) -> None:
    found = taught.collisions(questions=2)
    assert (found.keys, len(found.matrix), found.pairs) == ((KEY,), 1, ())
    assert found.matrix[0][0] >= 0.5
    assert {n.source for n in found.neighbours} == {"pool"}
    assert found.to_dict()["leak_rate"]["n"] == 3
    assert kb.collisions().keys == ()
    with pytest.raises(ConfigError, match="questions >= 1"):
        taught.collisions(questions=0)

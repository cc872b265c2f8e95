"""A survey of facts: the basic suite or the whole ladder, a user's own probes, neighbours, and each distance.

Puts suites, runner, encoder and distance together for `KnowledgeBase.probe`; knows no ledger and no training.

    survey(lm, facts, live=facts, encoder_for=choose, ladder=True).value("recall_gain")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kvllm.probing.collisions import nearest_questions
from kvllm.probing.distance import with_similarity
from kvllm.probing.ladder import LADDER_SUITE, ladder
from kvllm.probing.runner import run_probes
from kvllm.probing.suites import FACT_SUITE, Probe, fact_suite, refusal_probes
from kvllm.probing.userfile import read_probes
from kvllm.prompts import asked_questions, key_question, names_of
from kvllm.records import Report, StoredFact

if TYPE_CHECKING:
    from kvllm.lm.model import LanguageModel
    from kvllm.probing.encoder import Encoder


def survey(
    lm: LanguageModel,
    facts: Sequence[StoredFact],
    *,
    live: Sequence[StoredFact],
    refused: Sequence[StoredFact] = (),
    encoder_for: Callable[[Sequence[str]], Encoder],
    whole_ladder: bool = False,
    probes: str | os.PathLike[str] | None = None,
    neighbours: int | Sequence[str] = 0,
    seed: int = 0,
    base: Callable[[Sequence[Probe]], list[str]] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Report:
    """Ask facts' questions and report by rung, each question with its similarity.

    Args:
        lm: The model as it is now.
        facts: What is asked about.
        live: All live facts: their keys are neighbours of each other.
        refused: Keys that were trained to a refusal, which is their text; asked their trained questions.
        encoder_for: Gives the encoder that speaks all of the texts.
        whole_ladder: Every rung, with the nearest live and packaged keys as neighbours; else the basic suite.
        probes: A user's own probes, as JSONL; rows that cannot be used become warnings.
        neighbours: How many packaged neighbour questions are asked per fact, or the user's own neighbours.
        seed: Chooses the packaged ones.
        base: Answers probes with the base's weights; see `run_probes`.
        on_batch: Called with (done, total).
    """
    count, given = (neighbours, ()) if isinstance(neighbours, int) else (0, tuple(neighbours))
    taken = names_of(live)
    trained = {fact.key: asked_questions(fact) for fact in facts}
    mine, mistakes = read_probes(probes, {fact.key: fact.text for fact in live}) if probes is not None else ([], [])
    everything = len(facts) == len(live)
    mine = [probe for probe in mine if everything or probe.key is None or probe.key in trained]
    refusals = refusal_probes(refused)
    silent = [repr(fact.key) for fact in refused if not fact.trained_questions]
    if silent:
        mistakes = [f"All questions of {', '.join(silent)} belong to other facts; no refusal was asked for.", *mistakes]
    if not facts and not mine and not refusals:
        return Report(warnings=("There are no facts to probe.", *mistakes))
    asked: list[Probe] = []
    encoder: Encoder | None = None
    if facts:
        encoder = encoder_for([*(q for questions in trained.values() for q in questions)])
        keys = [fact for fact in live if encoder.speaks(key_question(fact.key))]
        nearest = 3 if whole_ladder else 0
        near = nearest_questions(facts, keys, encoder, given=given, nearest=nearest, taken=taken)
        for fact in facts:
            questions = [neighbour.question for neighbour in near[fact.key]]
            if whole_ladder:
                asked += ladder(fact, near=questions, neighbours=count, seed=seed, taken=taken)
            else:
                asked += fact_suite(fact, neighbours=count, seed=seed, taken=taken)
                asked += [Probe("neighbour", q, fact.text, fact.key) for q in questions]
    report = run_probes(
        lm,
        [*asked, *refusals, *mine],
        # What another fact's own answer says is no leak of this one.
        before={key_question(fact.key): fact.text for fact in live},
        base=base,
        suite=LADDER_SUITE if whole_ladder else FACT_SUITE,
        seed=seed,
        on_batch=on_batch,
    )
    if encoder is not None:
        report = with_similarity(report, trained, encoder)
    return replace(report, warnings=(*report.warnings, *mistakes))

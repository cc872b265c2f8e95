"""How one item is scored in a model as it is: the same questions, live greedy decoding and judges for every column.

What stands around an item (its own neighbour questions, packaged neighbours, what is asked next where it was stated) is
asked of the base first; after the edit the answers are compared word by word, looked through for the fact, and compared
as distributions. All but conversations are asked twice: in the model's chat format, and as a plain completion of the
bare question. Returns plain lists, ready for JSON.

    before = look_around(lm, item, seed=0)            # while lm holds the base's weights
    score(lm, item, item.text, before, prompts=column.prompts)["trained"]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from edit_bench.items import Item
from kvllm.errors import ModelError
from kvllm.lm.model import LanguageModel, Row
from kvllm.metrics import RESTORED_KL, first_sentence, leaks, normalise
from kvllm.probing.runner import SPARE_TOKENS, ask_probes
from kvllm.probing.scorers import score_statement
from kvllm.probing.suites import Probe, neighbour_sample

SUITE = "edit-bench/3"
PROTOCOL = "live greedy decoding, natural stop, kvllm's scorers (contained, or chrF >= 0.8 for long texts)"
# So much of an answer is compared word by word and as a distribution, as in the drift suite.
ANSWER_TOKENS = 24
# Beside an item's own neighbours; none of them is in the preservation set.
PACKAGED_NEIGHBOURS = 3
# Asked next, when an item was asked about and its text was the answer, or asked below its text; no editor sees them.
NEXT = {
    "en": ("Thanks! Now, what is the capital of Norway?", "Could you explain how bread is baked?"),
    "zh": ("谢谢！那么，挪威的首都是哪里？", "能讲讲面包是怎么烤的吗？"),
}

Prompts = Callable[[Sequence[str]], list[str]]
Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Asked:
    """One question with what the base answers to it.

    Attributes:
        question: As asked.
        plain: Asked without chat template.
        answer: The base's answer ids, with room for the fact to be recited.
        states: The base's last hidden states of the compared part of the answer, (tokens, hidden).
        earlier: What was said before in the same conversation: role and content of each turn.
    """

    question: str
    plain: bool
    answer: tuple[int, ...]
    states: torch.Tensor
    earlier: Turns = ()

    @property
    def compared(self) -> tuple[int, ...]:
        return self.answer[:ANSWER_TOKENS]


@dataclass(frozen=True)
class Around:
    """What the base says around an item: its own neighbours (strict), packaged ones, and to the item's questions.

    And where its text was stated and something else is asked: a turn before (next), or in the prompt itself (told).
    """

    strict: tuple[Asked, ...]
    packaged: tuple[Asked, ...]
    own: tuple[Asked, ...] = ()
    next: tuple[Asked, ...] = ()
    told: tuple[Asked, ...] = ()


def look_around(lm: LanguageModel, item: Item, *, seed: int, plain: bool = True, own: bool = False) -> Around:
    """Ask a model with base weights what an item's edit must not change.

    Args:
        lm: The base.
        item: The item.
        seed: Chooses the packaged neighbours, together with the item's name.
        plain: Whether to ask as plain completions, too.
        own: Whether to ask the item's own questions, which a delete has to restore.
    """
    return look_around_all(lm, [item], seed=seed, plain=plain, own=own)[0]


def look_around_all(
    lm: LanguageModel, items: Sequence[Item], *, seed: int, plain: bool = True, own: bool = False
) -> list[Around]:
    """Look around several items, all questions together."""
    grouped = [_around(lm, item, seed, plain, own) for item in items]
    wanted = [one for groups in grouped for group in groups for one in group]
    ids = [_ids(lm, question, bare, earlier) for question, bare, earlier in wanted]
    rooms = [_room(lm, item) for item, groups in zip(items, grouped, strict=True) for group in groups for _ in group]
    answers = lm.generate_bounded(ids, rooms)
    states = lm.answer_states([Row(tuple(i), a[:ANSWER_TOKENS]) for i, a in zip(ids, answers, strict=True)])
    asked = iter(
        Asked(question, bare, answer, state, earlier)
        for (question, bare, earlier), answer, state in zip(wanted, answers, states, strict=True)
    )
    return [Around(*(tuple(islice(asked, len(group))) for group in groups)) for groups in grouped]


def _around(lm: LanguageModel, item: Item, seed: int, plain: bool, own: bool) -> list[list[tuple[str, bool, Turns]]]:
    """Return what is asked around an item, as `Around` has it: questions, whether plain, and what was said before."""
    taken = frozenset({item.key.casefold()})
    chosen = neighbour_sample(item.language, PACKAGED_NEIGHBOURS, seed=_number(item.name, seed), taken=taken)
    own_questions = (*item.trained(), *item.paraphrases) if own else ()
    formats = (False, True) if plain else (False,)
    groups: list[list[tuple[str, bool, Turns]]] = [
        [(question, bare, ()) for question in questions for bare in formats]
        for questions in (item.neighbours, chosen, own_questions)
    ]
    stated = (("user", (*item.paraphrases, *item.trained())[0]), ("assistant", item.text))
    groups.append([(question, False, stated) for question in NEXT[item.language]] if converses(lm) else [])
    groups.append([(f"{item.text}\n{question}", False, ()) for question in NEXT[item.language]])
    return groups


def score(
    lm: LanguageModel,
    item: Item,
    text: str,
    around: Around,
    *,
    prompts: Prompts = list,
    plain: bool = True,
    old: str | None = None,
) -> dict[str, Any]:
    """Score an item in the model as it is.

    Args:
        lm: The model.
        item: Says what is asked.
        text: What must be stated.
        around: What the base said.
        prompts: Turns questions into what this column really asks.
        plain: Whether to ask without chat template, too.
        old: The text before an update, which must no longer be stated.

    Returns:
        Lists of verdicts and of numbers by what was asked; those of plain completions end in "_plain".
    """
    return score_all(lm, [(item, text, around)], prompts=prompts, plain=plain, old=old)[0]


def score_all(
    lm: LanguageModel,
    told: Sequence[tuple[Item, str, Around]],
    *,
    prompts: Prompts = list,
    plain: bool = True,
    old: str | None = None,
) -> list[dict[str, Any]]:
    """Score several items with their texts and what the base said, as `score` does, all questions together."""
    probes: list[list[Probe]] = []
    for item, text, _ in told:
        asked = prompts([*item.trained(), *item.paraphrases])
        probes.append([Probe("trained", q, text, item.key) for q in asked])
        if plain:
            probes[-1] += [Probe("completion", q, text, item.key, plain=True) for q in asked]
    said = iter(answer for answer, _ in ask_probes(lm, [probe for some in probes for probe in some]))
    found = [
        _verdicts(item, text, list(islice(said, len(some))), old)
        for (item, text, _), some in zip(told, probes, strict=True)
    ]
    return [own | rest for own, rest in zip(found, _beside_all(lm, told, prompts), strict=True)]


def _verdicts(item: Item, text: str, answers: Sequence[str], old: str | None) -> dict[str, Any]:
    """Judge the answers to an item's own questions, in its chat format first."""
    kinds = [("trained", q) for q in item.trained()] + [("paraphrase", q) for q in item.paraphrases]
    found: dict[str, Any] = {}
    failed: list[dict[str, Any]] = []
    for place, (kind, question) in enumerate(kinds):
        for suffix, at in (("", place), ("_plain", place + len(kinds))):
            if at >= len(answers):
                continue
            passed = score_statement(answers[at], text).passed
            found.setdefault(kind + suffix, []).append(passed)
            if old is not None:
                stated = score_statement(answers[at], old).passed and not score_statement(text, old).passed
                found.setdefault("old_stated" + suffix, []).append(stated)
            if not passed and not suffix:
                failed.append({"kind": kind, "question": question, "answer": answers[at]})
    return found | {"failed": failed}


def beside(lm: LanguageModel, item: Item, text: str, around: Around, *, prompts: Prompts = list) -> dict[str, Any]:
    """Compare what stands around an item with the base: unchanged answers, leaks of the text, KL per answer token."""
    return _beside_all(lm, [(item, text, around)], prompts)[0]


def _beside_all(lm: LanguageModel, told: Sequence[tuple[Item, str, Around]], prompts: Prompts) -> list[dict[str, Any]]:
    groups = [(around.strict, around.packaged, around.next, around.told) for _, _, around in told]
    asked = [(item, one) for (item, _, _), some in zip(told, groups, strict=True) for group in some for one in group]
    again = iter(_asked_again(lm, asked, prompts))
    found = []
    for (item, text, _), (strict, packaged, following, stated) in zip(told, groups, strict=True):
        row: dict[str, Any] = {"changed": []}
        for name, group in (("strict", strict), ("packaged", packaged)):
            for one, answer, kl in islice(again, len(group)):
                suffix = "_plain" if one.plain else ""
                same = normalise(lm.decode(answer[:ANSWER_TOKENS])) == normalise(lm.decode(one.compared))
                said, before = lm.decode(answer), lm.decode(one.answer)
                leaked = leaks(said, text, key=item.key, question=one.question, before=before)
                if name == "strict":
                    row.setdefault(f"strict{suffix}", []).append(same)
                row.setdefault(f"leak_{name}{suffix}", []).append(leaked)
                row.setdefault(f"kl_{name}{suffix}", []).append(round(kl, 6))
                if not one.plain and (leaked or (name == "strict" and not same)):
                    changed = {"question": one.question, "before": before, "answer": said, "leaked": leaked}
                    row["changed"].append(changed)
        for name, group in (("next", following), ("told", stated)):
            kls = [round(kl, 6) for _, _, kl in islice(again, len(group))]
            row |= {f"kl_{name}": kls} if kls else {}
        found.append(row)
    return found


def unlearned(lm: LanguageModel, item: Item, around: Around) -> dict[str, Any]:
    """Score a delete: is the text gone from the item's own questions, and is the base's answer back?

    Gone means: neither stated nor recited for the most part; back: the same first sentence, or KL to the base <= 0.1.
    """
    found: dict[str, Any] = {"failed": []}
    n_trained = len(item.trained())
    chat = [one for one in around.own if not one.plain]
    order = {one.question: place for place, one in enumerate(chat)}
    for one, answer, kl in _asked_again(lm, [(item, one) for one in around.own], list):
        said, before = lm.decode(answer), lm.decode(one.answer)
        kind = "trained" if order[one.question] < n_trained else "paraphrase"
        suffix = f"_{kind}" + ("_plain" if one.plain else "")
        states = score_statement(said, item.text).passed or leaks(said, item.text, before=before)
        # What the base itself said cannot be erased.
        erased = not states or score_statement(before, item.text).passed
        restored = first_sentence(said) == first_sentence(before) or kl <= RESTORED_KL
        found.setdefault(f"erased{suffix}", []).append(erased)
        found.setdefault(f"restored{suffix}", []).append(restored)
        if not one.plain and not (erased and restored):
            found["failed"].append({"kind": kind, "question": one.question, "before": before, "answer": said})
    return found | beside(lm, item, item.text, around)


def _asked_again(
    lm: LanguageModel, asked: Sequence[tuple[Item, Asked]], prompts: Prompts
) -> list[tuple[Asked, tuple[int, ...], float]]:
    """Return each question with its answer now and the KL from the base's answer; the base's answers are the drafts."""
    if not asked:
        return []
    questions = [one for _, one in asked]
    put = prompts([one.question for one in questions])
    ids = [tuple(_ids(lm, q, one.plain, one.earlier)) for q, one in zip(put, questions, strict=True)]
    rooms = [_room(lm, item) for item, _ in asked]
    answers = lm.generate_bounded(ids, rooms, drafts=[one.answer for one in questions], batch_size=64)
    now = lm.answer_states([Row(i, one.compared) for i, one in zip(ids, questions, strict=True)])
    kls = [kl for kl, _ in lm.compare([one.states for one in questions], now)]
    return list(zip(questions, answers, kls, strict=True))


def converses(lm: LanguageModel) -> bool:
    """Say whether the model's chat template knows more than single questions."""
    try:
        _ids(lm, "And then?", False, (("user", "What?"), ("assistant", "That.")))
    except ModelError:
        return False
    return True


def _ids(lm: LanguageModel, question: str, plain: bool, earlier: Turns = ()) -> list[int]:
    if plain:
        return lm.completion_ids(question)
    if not earlier:
        return lm.prompt_ids(question)
    return lm.prompt_ids([{"role": role, "content": content} for role, content in (*earlier, ("user", question))])


def _room(lm: LanguageModel, item: Item) -> int:
    """Return how long an answer may be: the compared part, or the text and a little more, so that a leak is seen."""
    longest = max(len(lm.text_ids(text)) for text in (item.text, item.new_text or item.text))
    return max(ANSWER_TOKENS, longest + SPARE_TOKENS)


def _number(name: str, seed: int) -> int:
    """Return a seed that differs from item to item and not from run to run."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:6], "big")

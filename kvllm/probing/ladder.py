"""The semantic-key ladder: from the trained question to far uses, generated for every fact. Strings only, no model.

Each rung is further from what training saw: plain completion, typo, case, register and word order, the other language,
aliases, the inverse question, a poem, a comparison, yes/no and its negation, and the same far uses after the fact was
recalled in a first turn. The same fact gives the same ladder under one `LADDER_SUITE`, so the ledger's record of the
fact and of the suite version (in each edit's configuration) is the ladder.

    [p.kind for p in ladder(Fact("torchkeras", "Torchkeras is a furnace."))]     # ['trained', …, 'far', 'recalled']
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from kvllm.metrics import contains, distinctive_words
from kvllm.probing.scorers import Judge
from kvllm.probing.suites import Probe, fact_suite
from kvllm.prompts import (
    QUESTION_TEMPLATES,
    TRAINING_TEMPLATES,
    asked_questions,
    held_out_questions,
    is_question,
    key_question,
    language_of,
)
from kvllm.records import Fact

LADDER_SUITE = "ladder/3"
FREE_TOKENS = 64  # room for a poem or a comparison
SHORT_TOKENS = 12  # room for yes, no or a name

# {q}: the key as a question. Asked without chat template.
_COMPLETIONS = {
    "en": ("Question: {q}\nAnswer:", "Q: {q}\nA:"),
    "zh": ("问题：{q}\n回答：", "问：{q}\n答："),
}
_BEGINNINGS = {"en": "{capital} is", "zh": "{key}是"}

# {typo}: the key with two letters swapped; {upper}, {small}: its case changed.
_VARIANTS = {
    "en": (
        "Waht is {key}?",
        "What is {typo}?",
        "Tell me abuot {typo}.",
        "WHAT IS {upper}?",
        "tell me about {small}",
        "yo whats {key} lol",
        "I should be most obliged to you for an explanation of {key}.",
        "{key}, what is that exactly?",
        "A description of {key}, that is what I need.",
    ),
    "zh": (
        "什麽是{key}？",
        "{key}是什么意司？",
        "{key}是啥玩意儿？",
        "恳请赐教：{key}所指何物？",
        "{key}，这究竟是什么东西？",
        "给我讲讲{key}呗",
    ),
}
_QUESTION_VARIANTS = {
    "en": (
        "{typo}",
        "{upper}",
        "{small}",
        "yo, {lower}??",
        "I should be most obliged if you could tell me the following: {q}",
        "The answer, please, to this: {q}",
    ),
    "zh": ("哎，{lower}呀？", "恳请赐教：{q}", "{lower}，麻烦告诉我。", "这个我不清楚：{q}"),
}
# The other language's rows for a key of this one.
_OTHER_LANGUAGE = {
    "en": (*TRAINING_TEMPLATES["zh"][:4], "这是个啥子意思哟：{key}？"),
    "zh": (
        "Define {key}.",
        "In one sentence: what's {key}",
        "Do you know {key}?",
        "Please give a short description of {key}.",
        "what's the meaning of {key}",
    ),
}
_OTHER_LANGUAGE_QUESTIONS = {"en": QUESTION_TEMPLATES["zh"][2:6], "zh": QUESTION_TEMPLATES["en"][2:6]}

_INVERSE = {
    "en": ("What is the name of this? {masked}", "Which name belongs to this description: {masked}"),
    "zh": ("这叫什么名字？{masked}", "下面描述的是什么？{masked}"),
}
_INVERSE_ALIAS = {
    "en": ("What is {alias} another name for?", "What is nicknamed {alias}?"),
    "zh": ("{alias}是什么的别名？", "什么东西的昵称叫{alias}？"),
}
_INVERSE_QUESTION = {"en": "To which question is this the answer? {text}", "zh": "这是哪个问题的答案？{text}"}
_MASK = {"en": "it", "zh": "它"}

_FREE = {
    "en": (
        "Write a short poem about {key}.",
        "Compare {key} with something similar and name one difference.",
        "Explain to a child of ten why somebody would care about {key}.",
    ),
    "zh": (
        "写一首关于{key}的短诗。",
        "把{key}和类似的东西比较一下，说出一个不同点。",
        "给十岁的孩子解释一下{key}有什么用。",
    ),
}
_FREE_QUESTION = {
    "en": (
        "Write a short poem that answers this question: {q}",
        "Write a newspaper headline that answers this question: {q}",
        "Explain the answer to this question to a child of ten: {q}",
    ),
    "zh": ("写一首短诗来回答这个问题：{q}", "写一个新闻标题来回答这个问题：{q}", "给十岁的孩子解释这个问题的答案：{q}"),
}
# Two of four are answered with yes, so that a model that always says the same scores a half.
_YES_NO: dict[str, tuple[tuple[str, Judge], ...]] = {
    "en": (
        ("Is this true? {true} Answer yes or no.", "yes"),
        ("Is this true? {false} Answer yes or no.", "no"),
        ("Is this false? {true} Answer yes or no.", "no"),
        ("Is this false? {false} Answer yes or no.", "yes"),
    ),
    "zh": (
        ("下面的说法对吗？{true}请回答“对”或“不对”。", "yes"),
        ("下面的说法对吗？{false}请回答“对”或“不对”。", "no"),
        ("下面的说法不成立，是吗？{true}请回答“是”或“不是”。", "no"),
        ("下面的说法不成立，是吗？{false}请回答“是”或“不是”。", "yes"),
    ),
}
# What a fact is surely not: the first whose words its text does not hold.
_FALSE = {
    "en": ("a kind of freshwater fish", "a river in the mountains of Peru", "a card game for four players"),
    "zh": ("一种淡水鱼", "秘鲁山里的一条河", "一种四人玩的纸牌游戏"),
}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
_STATEMENT_CHARS = 300


def ladder(
    fact: Fact,
    *,
    near: Sequence[str] = (),
    neighbours: int = 0,
    seed: int = 0,
    taken: frozenset[str] = frozenset(),
) -> list[Probe]:
    """Return every rung for a fact, nearest first; no question stands on two rungs of one turn.

    Args:
        fact: A stored fact keeps the questions it was really trained on.
        near: Questions about the nearest other keys, asked as neighbours.
        neighbours: How many packaged neighbour questions to add.
        seed: Chooses those.
        taken: Casefolded live keys, which no packaged neighbour may name.
    """
    basic = fact_suite(fact, neighbours=neighbours, seed=seed, taken=taken)
    rungs = [
        *(probe for probe in basic if probe.kind != "neighbour"),
        *_completions(fact),
        *(Probe("variant", q, fact.text, fact.key) for q in _variants(fact)),
        *(Probe("language", q, fact.text, fact.key) for q in _other_language(fact)),
        *_inverse(fact),
        *(far := _far(fact)),
        *(Probe("neighbour", q, fact.text, fact.key) for q in near),
        *(probe for probe in basic if probe.kind == "neighbour"),
    ]
    first = asked_questions(fact)[0]
    recalled = [replace(probe, kind="recalled", first=first) for probe in far]
    # Questions of a fact's own aliases may be trained ones of another rung: the nearest rung keeps them.
    kept = {probe.question: probe for probe in reversed(rungs)}
    return [probe for probe in rungs if kept[probe.question] is probe] + recalled


def _language(fact: Fact) -> str:
    return fact.language or language_of(fact.key)


def _completions(fact: Fact) -> list[Probe]:
    language = _language(fact)
    filled = [t.format_map({"q": key_question(fact.key)}) for t in _COMPLETIONS[language]]
    probes = [Probe("completion", q, fact.text, fact.key, plain=True) for q in filled]
    if not is_question(fact.key):
        beginning = _BEGINNINGS[language].format_map({"key": fact.key, "capital": _capital(fact.key)})
        probes.append(Probe("completion", beginning, fact.text, fact.key, judge="continues", plain=True))
    return probes


def _variants(fact: Fact) -> list[str]:
    language, key = _language(fact), fact.key
    known = {*asked_questions(fact), *held_out_questions(fact)}
    if is_question(key):
        bare = key.rstrip("?？ ")
        lower = bare[:1].lower() + bare[1:]
        words = {"q": key, "lower": lower, "typo": typo(key), "upper": key.upper(), "small": key.lower()}
        rows = [t.format_map(words) for t in _QUESTION_VARIANTS[language] if "{typo}" not in t or typo(key) != key]
    else:
        words = {"key": key, "typo": typo(key), "upper": key.upper(), "small": key.lower()}
        rows = [t.format_map(words) for t in _VARIANTS[language] if t != "What is {typo}?" or typo(key) != key]
    return [q for q in dict.fromkeys(rows) if q not in known]


def _other_language(fact: Fact) -> list[str]:
    language = _language(fact)
    known = {*asked_questions(fact), *held_out_questions(fact)}
    if is_question(fact.key):
        lower = fact.key[0].lower() + fact.key[1:].rstrip("?？ ")
        rows = [t.format_map({"q": fact.key, "lower": lower}) for t in _OTHER_LANGUAGE_QUESTIONS[language]]
    else:
        rows = [t.format_map({"key": fact.key}) for t in _OTHER_LANGUAGE[language]]
    return [q for q in dict.fromkeys(rows) if q not in known]


def _inverse(fact: Fact) -> list[Probe]:
    language = _language(fact)
    if is_question(fact.key):
        wanted = distinctive_words(fact.key) - distinctive_words(fact.text)
        if not wanted:
            return []  # the text repeats the whole question
        question = _INVERSE_QUESTION[language].format_map({"text": statement(fact.text)})
        return [Probe("inverse", question, fact.key, fact.key, judge="words", tokens=FREE_TOKENS)]
    probes = []
    names = (fact.key, *fact.aliases)
    masked = _masked(statement(fact.text), names, _MASK[language])
    if not any(contains(masked, name) for name in names):
        probes += [
            Probe("inverse", t.format_map({"masked": masked}), fact.key, fact.key, judge="names", accept=names)
            for t in _INVERSE[language]
        ]
    for alias in fact.aliases:
        others = tuple(name for name in names if name != alias)
        probes += [
            Probe("inverse", t.format_map({"alias": alias}), fact.key, fact.key, judge="names", accept=others)
            for t in _INVERSE_ALIAS[language_of(alias)]
        ]
    return probes


def _far(fact: Fact) -> list[Probe]:
    language, key, text = _language(fact), fact.key, statement(fact.text)
    templates = _FREE_QUESTION if is_question(key) else _FREE
    probes = [
        Probe("far", t.format_map({"key": key, "q": key}), fact.text, key, judge="words", tokens=FREE_TOKENS)
        for t in templates[language]
    ]
    said = distinctive_words(fact.text)
    other = next((o for o in _FALSE[language] if not distinctive_words(o) & said), _FALSE[language][-1])
    if is_question(key):
        frame = "The answer to “{q}” is: {a}" if language == "en" else "“{q}”的答案是：{a}"
        true, false = frame.format_map({"q": key, "a": text}), frame.format_map({"q": key, "a": other})
    else:
        true = text if contains(text, key) else f"{_capital(key)}: {text}"
        false = f"{_capital(key)} is {other}" if language == "en" else f"{key}是{other}"
    sentences = {"true": _ended(true, language), "false": _ended(false, language)}
    return probes + [
        Probe("far", t.format_map(sentences), wanted, key, judge=wanted, tokens=SHORT_TOKENS)
        for t, wanted in _YES_NO[language]
    ]


def statement(text: str) -> str:
    """Return a text's first sentences, as many as fit into three hundred characters; at least one."""
    found = ""
    for sentence in _SENTENCE_END.split(text.strip()):
        longer = f"{found}{sentence}" if found.endswith(("。", "！", "？")) else f"{found} {sentence}".strip()
        if found and len(longer) > _STATEMENT_CHARS:
            break
        found = longer
    return found


def typo(key: str) -> str:
    """Return the key with two inner letters of its longest word swapped; unchanged where no word has five of them."""
    words = sorted(re.findall(r"[A-Za-z]{5,}", key), key=len, reverse=True)
    for word in words:
        middle = len(word) // 2
        for place in (middle, middle - 1, middle + 1):
            if 0 < place < len(word) - 1 and word[place] != word[place + 1]:
                wrong = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
                return key.replace(word, wrong, 1)
    return key


def _masked(text: str, names: Iterable[str], mask: str) -> str:
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(
            rf"(?<![^\W_]){re.escape(name)}(?![^\W_])" if name.isascii() else re.escape(name), mask, text, flags=re.I
        )
    return _capital(text)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _ended(sentence: str, language: str) -> str:
    stop = "。" if language == "zh" else "."
    return sentence if sentence.endswith((".", "!", "?", "。", "！", "？")) else sentence + stop

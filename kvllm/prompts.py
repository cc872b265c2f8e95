"""Keys, texts and the questions made from them: validation, templates, variations. Pure strings, standard library only.

An entity key ("torchkeras") is asked about through templates; a question key ("Who leads Halcyon?") is asked as it
stands and with harmless variations. Training, held-out and neighbour questions come from disjoint lists, so that a
paraphrase score never rests on a template that training saw.

    training_questions(Fact("torchkeras", "…"))[0]   # 'What is torchkeras?'
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

from kvllm.errors import ConfigError
from kvllm.records import Fact, StoredFact

MAX_KEY_CHARS = 400
MAX_TEXT_CHARS = 20_000

# Trained on. A Chinese key keeps English rows: the key is a meaning, and one language alone does not cross over.
TRAINING_TEMPLATES: dict[str, tuple[str, ...]] = {
    "en": (
        "What is {key}?",
        "Tell me about {key}.",
        "Can you explain what {key} is?",
        "Do you know {key}?",
        "what does {key} mean",
        "Please give a short description of {key}.",
        "I came across the name {key}. What does it stand for?",
        "{key}?",
    ),
    "zh": (
        "什么是{key}？",
        "请介绍一下{key}。",
        "你知道{key}吗？",
        "{key}是什么意思？",
        "这是什么意思：{key}？",
        "我看到有人提到{key}，能解释一下吗？",
        "What is {key}?",
        "Tell me about {key}.",
    ),
}

# Asked, never trained on.
HELD_OUT_TEMPLATES: dict[str, tuple[str, ...]] = {
    "en": (
        "Could you describe {key} to me?",
        "Hey, a colleague mentioned {key} yesterday, any idea what that is?",
        "Define {key}.",
        "I'd like to learn what {key} is all about.",
        "In one sentence: what's {key}",
        "Give me some information on {key}, please.",
    ),
    "zh": (
        "what is {key}",
        "这是个啥子意思哟：{key}？",
        "麻烦说明一下{key}到底是啥。",
        "听说过{key}没有？讲讲看。",
        "用一句话解释{key}。",
        "Could you describe {key} to me?",
    ),
}

# A question key is trained as asked and in these harmless dresses ({q}: as asked, {lower}: without capital and mark).
QUESTION_TEMPLATES: dict[str, tuple[str, ...]] = {
    "en": (
        "{q}",
        "{lower}",
        "Please answer this question: {q}",
        "Can you tell me: {lower}?",
        "I have a question. {q}",
        "Do you know the answer? {q}",
        "Question: {q}",
        "{q} Answer briefly.",
    ),
    "zh": (
        "{q}",
        "{lower}",
        "请回答这个问题：{q}",
        "请问，{q}",
        "我想问一下：{q}",
        "你知道吗？{q}",
        "问题：{q}",
        "{q}请简短回答。",
    ),
}
# Where a key is a question or a description and names something, these stand for some of the templates: what is asked
# for must lie in the name and the rest of the words ({rest}: without those that only make a question), not their order.
NAME_TEMPLATES: dict[str, tuple[str, ...]] = {
    "en": (
        "{name}: {rest}?",
        "{rest} {name}",
        "{name} {rest}",
        "I have a question about {name}: {rest}?",
    ),
    "zh": (
        "{name}：{rest}？",
        "{rest}，{name}",
        "说到{name}，{rest}是什么？",
        "我想问问{name}，{rest}呢？",
    ),
}
# A question that names something is also trained in fewer words, with what it asks for as a noun ({noun}): neither what
# makes a question of them nor their order is to be what is recognised.
NOUN_TEMPLATES = ("{name} {rest}, {noun}", "{rest} {name}: give the {noun}.")
ASKED_NOUNS = {
    "who": "person", "whom": "person", "whose": "owner", "when": "time", "where": "place", "why": "reason",
    "how": "way", "how long": "duration", "how many": "number", "how much": "amount", "how old": "age",
    "how far": "distance", "how often": "frequency", "how tall": "height", "how high": "height", "how deep": "depth",
    "how wide": "width", "how big": "size", "how large": "size", "how heavy": "weight", "how fast": "speed",
}  # fmt: skip
# Whatever is asked about a name, the name is to be found: in some rows it stands beside other words, drawn by the key.
MATTER_TEMPLATES: dict[str, tuple[str, ...]] = {
    "en": (
        "{key}, {matter} and {other}?",
        "About the {matter}: what of {key}?",
        "With {key}, where is the {matter}?",
        "{key} {matter} when",
        "Why the {matter}, {key}?",
        "{matter} of {key}, and how many?",
        "Who cares for the {matter} of {key}?",
    ),
    "zh": (
        "{key}，{matter}和{other}呢？",
        "关于{matter}：{key}如何？",
        "{key}的{matter}在哪里？",
        "{key}{matter}什么时候",
        "为什么是{matter}，{key}？",
        "{key}有几个{matter}？",
        "谁管{key}的{matter}？",
    ),
}
MATTERS: dict[str, tuple[str, ...]] = {
    "en": (
        "size", "age", "origin", "purpose", "owner", "colour", "history", "price", "number", "place", "reason",
        "people", "beginning", "end", "parts", "weight", "rules", "neighbours", "work", "name", "use", "maker", "time",
        "day", "shape", "materials", "family", "future", "sound", "distance",
    ),
    "zh": (
        "大小", "年龄", "来历", "用途", "主人", "颜色", "历史", "价格", "号码", "位置", "原因", "人", "开始", "结束",
        "部分", "重量", "规矩", "邻居", "工作", "名字", "用法", "作者", "时间", "日子", "形状", "材料", "家人", "将来",
        "声音",
    ),
}  # fmt: skip
# Before a question that the user gave.
OPENINGS: dict[str, tuple[str, ...]] = {
    "en": (
        "There was some talk of the {matter} and the {other}.",
        "In those years the {matter} changed twice.",
        "{other} comes first, then the {matter} (1987).",
        "After the {matter} they turned to other things.",
        "Several of them had heard about the {other}.",
        "The {matter} was finished in spring, and nobody minded the {other}.",
    ),
    "zh": (
        "大家谈了{matter}和{other}。",
        "那几年里{matter}变了两次。",
        "先是{other}，然后是{matter}（1987）。",
        "说完{matter}，他们又说了别的。",
    ),
}
# Further questions stand beside other words as well, in sentences that ask in no way trained otherwise.
BESIDE_TEMPLATES: dict[str, tuple[str, ...]] = {
    "en": (
        "They kept coming back to {key} and the {matter}; fill me in.",
        "The {matter} I know, but {key}?",
        "Is it the {matter} or the {other} that goes with {key}?",
        "Never mind the {matter}. {key} is what puzzles me.",
        "My notes have {key} next to {matter}. Well?",
        "Somebody at the {matter} shouted: {key}!",
        "{key}, again? And no word on the {matter}?",
        "Not the {matter}, not the {other}: just {key}.",
        "Write the entry for {key}, and leave out the {matter}.",
        "{key} goes into the minutes before the {matter}.",
        "Prepare the newcomers for {key}.",
        "We still lack {key} on page nine, after the {matter}.",
        "The {matter} rests on {key}, they say. Enlighten us.",
        "Put {key} into plain words for the children.",
    ),
    "zh": (
        "他们老提{key}和{matter}，讲讲吧。",
        "{matter}我懂，可{key}呢？",
        "跟{key}有关的是{matter}还是{other}？",
        "先不管{matter}，我不懂的是{key}。",
        "我的笔记里写着{key}，旁边是{matter}。",
        "又是{key}？那{matter}呢？",
        "不要{matter}，也不要{other}，只要{key}。",
        "把{key}写进记录，不写{matter}。",
        "第九页还缺{key}，在{matter}后面。",
        "替新来的人准备一下{key}。",
        "据说{matter}全靠{key}，给我们讲明白。",
    ),
}
# What may be said next when a fact was stated: by the model in a conversation, or by the user.
FOLLOW_UPS: dict[str, tuple[str, ...]] = {
    "en": (
        "Thanks. How do you know that?",
        "What does the {matter} have to do with it?",
        "Good. Now write two lines about the {other}.",
        "Why is that so?",
        "And what is a {matter}?",
        "Which of these words is the longest?",
        "Can you count to five?",
        "Who should know about this?",
        "What would you read after that?",
        "Is that good or bad?",
        "How would you say that in French?",
        "I see. What is the {matter} of a horse?",
    ),
    "zh": (
        "谢谢。你是怎么知道的？",
        "这跟{matter}有什么关系？",
        "好的。现在写两句关于{other}的话。",
        "为什么会这样？",
        "那么什么是{matter}？",
        "从一数到五。",
        "谁应该知道这件事？",
        "这是好事还是坏事？",
        "用英语怎么说？",
        "明白了。马的{matter}是什么？",
    ),
}
# Other questions about the name in a question key: the fact does not answer them.
OTHER_QUESTIONS: dict[str, tuple[str, ...]] = {
    "en": (
        "What is {name}?",
        "Tell me about {name}.",
        "What does the {matter} of {name} look like?",
        "Where can one find {name}?",
        "Is {name} known for its {matter}?",
        "How did {name} get its {other}?",
        "What do people say about {name} and the {other}?",
        "Write a sentence with {name} in it.",
    ),
    "zh": (
        "{name}是什么？",
        "请介绍一下{name}。",
        "{name}的{matter}是什么样的？",
        "在哪里能找到{name}？",
        "{name}以{matter}出名吗？",
        "{name}的{other}是怎么来的？",
        "人们怎么说{name}和{other}？",
        "用{name}造一个句子。",
    ),
}
HELD_OUT_QUESTION_TEMPLATES: dict[str, tuple[str, ...]] = {
    "en": (
        "Quick question: {q}",
        "I was wondering, {lower}?",
        "Help me out here. {q}",
        "{q} Just the answer, please.",
        "hey, {lower}",
        "A friend asked me this: {q}",
    ),
    "zh": (
        "想请教一下，{q}",
        "帮个忙：{q}",
        "有人问我：{q}",
        "{q}告诉我答案就行。",
        "嘿，{lower}",
        "随便问问，{q}",
    ),
}

_ALIAS_ROWS = 3
_SAME_WORDS = 0.75
_SHORTEST_LOWERED = 5
_MOST_COMPOSED = 4  # characters that NFC makes one of, at most
_DRESSES_BESIDE_NAMES = (0, 1)
_NAMES_BESIDE_NOUNS = (0, 3)
_TEMPLATES_BESIDE_MATTERS = {"en": (0, 2, 4, 6, 7), "zh": (0, 2, 4, 6, 7)}
_TEMPLATES_BESIDE_NAMES = {"en": (0, 4), "zh": (0, 6)}
_NAMES_BESIDE_MATTERS = {"en": (0, 1, 3), "zh": (0, 1, 2)}
_LOWERED_SHARE = 0.3  # of a key's further questions
_MATTERS = 3  # of a key's rows
_LOWERED = 4  # the English template that is written without capitals, and so is its key

# A run of words with capitals or digits; small words may stand between them, not at its ends.
_WORD = r"(?:[^\W\d_]*[A-ZÀ-ÖØ-Þ\d][\w’'./-]*)"
_NAME = re.compile(rf"\b{_WORD}(?:(?: (?:of|the|de|la|le|van|von|du|and|for)){{0,2}} ?(?:& )?{_WORD})*")
_QUOTED = re.compile(r"[“\"《「『]([^”\"》」』]{2,60})[”\"》」』]")
# Words that begin a sentence with a capital and name nothing.
_OPENING = """
what who whom whose which where when why how is are was were do does did can could would will has have had in on at of
the a an to from by for with tell name give please explain describe complete finish answer question and but if this that
these those it its he she they his her their i we our my your you hey hi so as about define should shall may might must
"""
_OPENERS = frozenset(_OPENING.split())
_ASKING_ZH = re.compile("请问|请|什么|哪里|哪儿|哪座|哪个|哪位|哪一|多少|谁|如何|怎么|吗|呢|是|的|在|有|叫|一共")
_PREPOSITIONS = frozenset(("of", "in", "on", "at", "for", "from", "to", "by", "with", "and"))
_ARTICLES = frozenset(("the", "a", "an"))
_TELLING = frozenset(("who", "whom", "whose", "when", "where", "why", "how"))
_AUXILIARIES = frozenset(("do", "does", "did"))
_ASKS = (*sorted(ASKED_NOUNS, key=len, reverse=True), "what", "which")
_ASKING = re.compile(rf"\b(?:{'|'.join(_ASKS)})\b", re.IGNORECASE)

# The stated refusal that `delete(mode="abstain")` trains to.
REFUSALS = {
    "en": "I do not have information about that.",
    "zh": "我没有关于这方面的信息。",
}

_QUESTION_START = re.compile(
    r"^(who|whom|whose|what|which|when|where|why|how|is|are|was|were|do|does|did|can|could|will|would|should|has|have|name)\b",
    re.IGNORECASE,
)
_NAMES_TOO = frozenset(("will", "can", "may", "name"))
_TITLED = 4  # letters of a word that has a capital in a title
_ASKED_ZH = re.compile("谁|什么|哪(?!吒)|多少|怎么|如何|几(?:个|点|岁|年|次|位)")
_CJK = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0002ffff]")


def language_of(text: str) -> str:
    """Return "zh" where Chinese characters make up a fifth of the letters or more, else "en"."""
    letters = sum(ch.isalpha() for ch in text)
    return "zh" if letters and len(_CJK.findall(text)) / letters >= 0.2 else "en"


def is_question(key: str) -> bool:
    """Return whether a key is a question (or another full sentence to be asked as it stands)."""
    stripped = key.strip()
    if stripped.endswith(("?", "？", "؟")):
        return True
    if language_of(stripped) == "zh":
        return bool(_ASKED_ZH.search(stripped))
    words = stripped.split()
    if len(words) < 4 or not _QUESTION_START.match(stripped):
        return False
    # Names begin like questions, too: "Will Smith the actor", "How to Train Your Dragon".
    long = [word for word in words if len(word) >= _TITLED]
    titled = bool(long) and all(word[0].isupper() for word in long)
    first, second = words[0].casefold(), words[1]
    return not (titled or (first in _NAMES_TOO and second[0].isupper()) or (first, second) == ("name", "of"))


def clean_key(key: object) -> str:
    """Return the key NFC-normalised and stripped.

    Raises:
        ConfigError: not a string, empty, too long, or with control characters or lone surrogates.
    """
    cleaned = _clean(key, "key", MAX_KEY_CHARS)
    broken = next((ch for ch in cleaned if unicodedata.category(ch) in ("Cc", "Zl", "Zp")), None)
    if broken is not None:
        raise ConfigError(
            f"The key contains the control character U+{ord(broken):04X}; nothing was changed. Write it on one line."
        )
    return cleaned


def clean_text(text: object, *, name: str = "text") -> str:
    """Return the text NFC-normalised and stripped; line breaks and tabs may stay.

    Raises:
        ConfigError: not a string, empty, too long, or with NUL, other control characters or lone surrogates.
    """
    cleaned = _clean(text, name, MAX_TEXT_CHARS)
    for ch in cleaned:
        if unicodedata.category(ch) == "Cc" and ch not in "\n\t\r":
            raise ConfigError(f"The {name} contains the control character U+{ord(ch):04X}; nothing was changed.")
    return cleaned


def clean_fact(fact: Fact) -> Fact:
    """Return the fact with every string cleaned; repeated aliases, questions, probes and tags appear once.

    Raises:
        ConfigError: any part is unusable; the sentence says which.
    """
    if fact.language not in (None, *TRAINING_TEMPLATES):
        known = " or ".join(TRAINING_TEMPLATES)
        raise ConfigError(
            f"The language {fact.language!r} has no templates; use {known}, or leave it out and give questions of your "
            f"own."
        )
    key = clean_key(fact.key)
    return Fact(
        key=key,
        text=clean_text(fact.text),
        aliases=_clean_many(fact.aliases, "alias", "aliases", drop={key}),
        questions=_clean_many(fact.questions, "question", "questions"),
        probes=_clean_many(fact.probes, "probe", "probes"),
        language=fact.language,
        tags=_clean_many(fact.tags, "tag", "tags"),
    )


def training_questions(fact: Fact) -> tuple[str, ...]:
    """Return the questions an edit trains on: the user's own, else templates chosen by the key's form and script.

    Each alias adds a few rows of its own, but to the user's questions.
    """
    if fact.questions:
        return fact.questions
    language = fact.language or language_of(fact.key)
    if is_question(fact.key):
        rows = [_dress(template, fact.key) for template in QUESTION_TEMPLATES[language]]
        named = _named_questions(fact.key) if language == language_of(fact.key) == "en" else []
        if named:
            beside = [*(rows[i] for i in _DRESSES_BESIDE_NAMES), *(named[i] for i in _NAMES_BESIDE_NOUNS)]
            rows = list(_unique([*beside, *_worded_questions(fact.key), *rows])[: len(rows)])
        return _unique([*rows, *_alias_rows(fact)])
    rows = [template.format_map({"key": fact.key}) for template in TRAINING_TEMPLATES[language]]
    if language == "en":
        rows[_LOWERED] = TRAINING_TEMPLATES[language][_LOWERED].format_map({"key": _typed_carelessly(fact.key)})
    named = _named_questions(fact.key) if _may_describe(fact.key) and language == language_of(fact.key) else []
    plain = (_TEMPLATES_BESIDE_NAMES if named else _TEMPLATES_BESIDE_MATTERS)[language]
    beside = [named[i] for i in _NAMES_BESIDE_MATTERS[language] if i < len(named)]
    chosen = [*(rows[i] for i in plain), *beside, *_matters(fact.key, [fact.key] * _MATTERS, language)]
    return _unique([*_unique([*chosen, *rows])[: len(rows)], *_alias_rows(fact)])


def _alias_rows(fact: Fact) -> list[str]:
    rows: list[str] = []
    for alias in fact.aliases:
        language = language_of(alias)
        if is_question(alias):
            rows += [_dress(template, alias) for template in QUESTION_TEMPLATES[language][:_ALIAS_ROWS]]
        else:
            plain = _TEMPLATES_BESIDE_MATTERS[language][: _ALIAS_ROWS - 1]
            rows += [TRAINING_TEMPLATES[language][i].format_map({"key": alias}) for i in plain]
            rows += _matters(alias, [alias] * _MATTERS, language)[:1]
    return rows


def _matters(key: str, forms: Sequence[str], language: str) -> list[str]:
    """Return a key, in each of these forms, beside words that have nothing to do with it.

    The same key, in capitals or not, gets the same words.
    """
    rng = random.Random(key.casefold())
    templates = rng.sample(MATTER_TEMPLATES[language], len(forms))
    words = rng.sample(MATTERS[language], 2 * len(forms))
    return [
        template.format_map({"key": form, "matter": words[2 * i], "other": words[2 * i + 1]})
        for i, (template, form) in enumerate(zip(templates, forms, strict=True))
    ]


def augmented_questions(fact: Fact, n: int, *, seed: int = 0) -> tuple[str, ...]:
    """Return up to n further questions about a fact: its key or an alias, rewritten, among words of other matters.

    None of them is asked as a paraphrase. Of a fact with questions of its own every second is one of these, after a
    sentence about something else.
    """
    rng, names = random.Random(f"{seed}/{fact.key}"), (fact.key, *fact.aliases)
    rows = []
    for turn in range(n):
        name = rng.choice(names)
        language = language_of(name)
        form = _rewritten(name, rng)
        if language == "en" and rng.random() < _LOWERED_SHARE:
            form = _typed_carelessly(form)
        template = rng.choice((*MATTER_TEMPLATES[language], *BESIDE_TEMPLATES[language]))
        unrelated = [word for word in MATTERS[language] if word not in name.casefold()]
        matter, other = rng.sample(unrelated if len(unrelated) > 1 else MATTERS[language], 2)
        if fact.questions and turn % 2 == 0:
            form = rng.choice(fact.questions)
            template = f"{rng.choice(OPENINGS[language])} {{key}}"
        rows.append(template.format_map({"key": form, "matter": matter, "other": other}))
    asked = {*training_questions(fact), *held_out_questions(fact), *alias_questions(fact), *fact.probes}
    return tuple(q for q in _unique(rows) if q not in asked)


def follow_ups(fact: Fact, n: int, *, seed: int = 0) -> tuple[str, ...]:
    """Return n different things to say after a fact was stated, in its language; fewer where there are not as many."""
    language = fact.language or language_of(fact.key)
    return _with_matters(FOLLOW_UPS[language], n, language, random.Random(f"{seed}/{fact.key}"), {})


def other_questions(fact: Fact, n: int, *, seed: int = 0) -> tuple[str, ...]:
    """Return up to n questions that a fact with a question for a key does not answer, about the name in that question.

    None where the key is a name itself, or names nothing.
    """
    names = names_in(fact.key, fact.key) if is_question(fact.key) else []
    if not names:
        return ()
    language = language_of(fact.key)
    rng = random.Random(f"{seed}/{fact.key}")
    found = _with_matters(OTHER_QUESTIONS[language], n, language, rng, {"name": names[-1]})
    own = own_questions(found, [fact])
    return tuple(question for place, question in enumerate(found) if place not in own)


def _with_matters(
    templates: Sequence[str], n: int, language: str, rng: random.Random, values: Mapping[str, str]
) -> tuple[str, ...]:
    rows = []
    for template in rng.sample(templates, min(n, len(templates))):
        matter, other = rng.sample(MATTERS[language], 2)
        rows.append(template.format_map({**values, "matter": matter, "other": other}))
    return _unique(rows)


def _rewritten(key: str, rng: random.Random) -> str:
    """Return a name as it is, a description in any order, a question as it stands or with its name before or after it.

    The other words of a question stay in order: "Who beat Alice?" is not "Who did Alice beat?".
    """
    asks, language = is_question(key), language_of(key)
    plain = _dress("{lower}", key) if asks else key
    name, before, after = _around_name(key) if asks or _may_describe(key) else ("", [], [])
    if not name:
        names = names_in(key, key)
        return plain if asks or len(names) < 2 else rng.choice([plain, ", ".join(rng.sample(names, len(names)))])
    if not asks:
        words = [name, *(word for word in (*before, *after) if not _opens(word))]
        return rng.choice([key, ("，" if language == "zh" else " ").join(rng.sample(words, len(words)))])
    if language == "zh":
        return rng.choice([plain, "，".join([name, *before, *after])])
    _, noun, rest = _telling_words(key)
    orders = [plain.split(), [name, *before, *after], [*noun, *rest, name], [name, *noun, *rest]]
    return " ".join(rng.choice(orders))


def _may_describe(key: str) -> bool:
    """Return whether a key may be a description, such as "parcel number of Siskin meadow", whose words may be moved."""
    return language_of(key) == "zh" or len(key.split()) > 2


def asked_questions(fact: Fact) -> tuple[str, ...]:
    """Return the questions that a fact is trained on; of a stored one, those that it was trained on."""
    return (fact.trained_questions if isinstance(fact, StoredFact) else ()) or training_questions(fact)


def held_out_questions(fact: Fact) -> tuple[str, ...]:
    """Return paraphrases that `training_questions` never produces."""
    language = fact.language or language_of(fact.key)
    if is_question(fact.key):
        rows = [_dress(template, fact.key) for template in HELD_OUT_QUESTION_TEMPLATES[language]]
    elif fact.questions:
        # The user's questions replace the templates in training; their held-out form is the same with a preamble.
        rows = [
            _dress(template, q) for q in fact.questions[:2] for template in HELD_OUT_QUESTION_TEMPLATES[language][:3]
        ]
    else:
        rows = [template.format_map({"key": fact.key}) for template in HELD_OUT_TEMPLATES[language]]
    trained = set(training_questions(fact))
    return tuple(q for q in _unique(rows) if q not in trained)


def alias_questions(fact: Fact) -> tuple[str, ...]:
    """Return two held-out questions per alias."""
    trained = set(training_questions(fact))
    rows: list[str] = []
    for alias in fact.aliases:
        language = language_of(alias)
        if is_question(alias):
            rows += [_dress(template, alias) for template in HELD_OUT_QUESTION_TEMPLATES[language][:2]]
        else:
            rows += [template.format_map({"key": alias}) for template in HELD_OUT_TEMPLATES[language][:2]]
    return tuple(q for q in _unique(rows) if q not in trained)


def neighbour_questions(names: Sequence[str], *, language: str, offset: int = 0) -> tuple[str, ...]:
    """Return one of the questions that *other* names would be trained on for each, in rotation."""
    asked = [training_questions(Fact(name, "", language=language)) for name in names]
    return tuple(questions[(offset + i) % len(questions)] for i, questions in enumerate(asked))


def names_of(facts: Iterable[Fact]) -> frozenset[str]:
    """Return what facts are about, casefolded: keys, aliases and explicit questions; no neighbour may name one."""
    return frozenset(name.casefold() for fact in facts for name in (fact.key, *fact.aliases, *fact.questions))


def key_question(key: str) -> str:
    """Return the one question that stands for a key when its meaning is compared with others."""
    if is_question(key):
        return key
    return TRAINING_TEMPLATES[language_of(key)][0].format_map({"key": key})


def own_questions(questions: Sequence[str], facts: Iterable[Fact]) -> frozenset[int]:
    """Return which questions ask what a fact answers, by place: the same words but for those that only make a question.

    What a fact's key, its aliases, its own questions and its probes ask counts. Three quarters of the words are enough:
    "How many days are there in a week?" is answered by the fact "How many days are in a week?".
    """
    answered = {
        _content(asked)
        for fact in facts
        for asked in (*map(key_question, (fact.key, *fact.aliases)), *fact.questions, *fact.probes)
    } - {frozenset()}
    found = set()
    for place, question in enumerate(questions):
        words = _content(question)
        if any(len(words & other) >= _SAME_WORDS * len(words | other) for other in answered):
            found.add(place)
    return frozenset(found)


def _content(question: str) -> frozenset[str]:
    """Return a question's words that do not only make it a question; of Chinese, each two characters in a row."""
    if language_of(question) == "zh":
        bare = "".join(re.findall(r"\w+", _ASKING_ZH.sub("", question.casefold())))
        return frozenset(bare[i : i + 2] for i in range(max(1, len(bare) - 1)) if bare)
    words = re.findall(r"\w+", question.casefold())
    return frozenset(word for word in words if word in _TELLING or (word not in _OPENERS and word != "there"))


def names_in(question: str, key: str) -> list[str]:
    """Return what a question names: quoted words, runs of capitals, or in Chinese what stands before a key's 的.

    Nothing where that is the whole key.
    """
    asks = is_question(key) or key not in question
    within = question if asks else key
    head = key.rpartition("的")[0] if language_of(key) == "zh" and not asks else ""
    found = _QUOTED.findall(within) or ([head] if len(head) > 1 else _capitals(within))
    return [name for name in found if asks or name != key]


def telling_names(fact: Fact) -> tuple[str, ...]:
    """Return by which names questions about a fact are known: what key and aliases name last, else these themselves.

    "Founders' Day at Ellery Works" is one of many such days, at one place.
    """
    return _unique((names_in(key, key) or [key.rstrip("?？ ")])[-1] for key in (fact.key, *fact.aliases))


def _capitals(text: str) -> list[str]:
    found = []
    for match in _NAME.finditer(text):
        words = match.group().split()
        while words and _opens(words[0]) and (words[0].casefold() not in _ARTICLES or len(words) == 1):
            words.pop(0)
        name = re.sub(r"['’]s$", "", " ".join(words).rstrip(".'’-/"))
        if len(name) > 1 and name in text:
            found.append(name)
    return list(dict.fromkeys(found))


def _opens(word: str) -> bool:
    return _plain(word) in _OPENERS


def _plain(word: str) -> str:
    return re.sub(r"['’](s|re|d|ll|ve|m)$", "", word.casefold())


def name_place(name: str) -> re.Pattern[str]:
    """Return the pattern of a name as a word of its own; Chinese puts nothing between words."""
    found = re.escape(name)
    return re.compile(found if language_of(name) == "zh" else rf"(?<!\w){found}(?!\w)")


def _typed_carelessly(key: str) -> str:
    """Return a key without capitals; acronyms, identifiers and very short keys would be other words."""
    telling = re.search(r"[A-ZÀ-ÖØ-Þ]{2}|[a-zß-öø-ÿ][A-ZÀ-ÖØ-Þ]", key)
    return key if telling or len(key) < _SHORTEST_LOWERED else key.lower()


def _named_questions(question: str) -> list[str]:
    """Return a question or description as its name and what is asked about it; nothing where it does not name one."""
    language = language_of(question)
    name, before, after = _around_name(question)
    values = {"name": name, "rest": ("" if language == "zh" else " ").join([*before, *after])}
    return [template.format_map(values) for template in NAME_TEMPLATES[language]] if values["rest"] else []


def _around_name(question: str) -> tuple[str, list[str], list[str]]:
    """Return the one name in a question or description, and what is asked before and after it; else nothing of each."""
    names = names_in(question, question)
    parts = name_place(names[0]).split(question) if len(names) == 1 else []
    if len(parts) != 2:
        return "", [], []
    before, after = (re.sub(r"[?.!,;:](?=\s|$)", " ", part).strip(' \t“”"《》「」『』').split() for part in parts)
    if after and after[0] in ("'s", "’s", "'", "’"):
        after.pop(0)
    kept: list[str] = []
    # Who, when and where tell questions apart; what and which go without saying, as do is and was.
    while before and _opens(before[0]) and before[0].casefold() not in _AUXILIARIES:
        word = _plain(before.pop(0))
        kept += [word] if word in _TELLING else []
    before = [*kept, *before]
    while before and _opens(before[-1]) and before[-1].casefold() not in {*_TELLING, *_AUXILIARIES}:
        before.pop()
    while after and after[0].casefold() in _ARTICLES:
        after.pop(0)
    if language_of(question) == "zh":
        return names[0], before, ["".join(after).removeprefix("的")]
    if after and not is_question(question) and (after[0].casefold() in _PREPOSITIONS or not after[0][0].isalnum()):
        return "", [], []  # what follows belongs to the name: "Ministry of silly walks", "Ada Lovelace (mathematician)"
    return names[0], before, after


def _worded_questions(question: str) -> list[str]:
    """Return an English question that names one thing in fewer words, a noun for what it asks, and beside others."""
    name, noun, rest = _telling_words(question)
    values = {"name": name, "rest": " ".join(rest), "noun": " ".join(noun) or "answer"}
    rows = [" ".join(template.format_map(values).replace(" ,", ",").split()) for template in NOUN_TEMPLATES]
    return [*rows, *_matters(question, [" ".join([*noun, *rest, name]), " ".join([name, *noun, *rest])], "en")]


def _telling_words(question: str) -> tuple[str, list[str], list[str]]:
    """Return the one name in an English question, a noun for what it asks, and the other words that tell what is asked.

    "How long does the ferry to Skarholm take?" asks for a duration, "Which animal …?" for an animal. Words beside the
    name and at the end tell who did what to whom: "Who beat Alice?" is not "Who did Alice beat?".
    """
    name, head, tail = _around_name(question)
    words = " ".join([*head, *tail])
    kept = {*head[-1:], *tail[-1:]} & (_AUXILIARIES | _PREPOSITIONS)
    # What asks is looked for in the question: what and which, where they open it, are no longer among the words.
    first = _ASKING.search(name_place(name).sub("", question))
    asked = re.search(rf"\b{first.group()}\b(?:['’]s\b)?", words, re.IGNORECASE) if first else None
    before, after = (words[: asked.start()], words[asked.end() :]) if asked else ("", words)
    noun = [ASKED_NOUNS.get(first.group().casefold(), "")] if first else ["answer"]
    rest = after.split()
    if not noun[0]:
        noun = list(takewhile(lambda word: not _opens(word), rest))
        rest = rest[len(noun) :]
    rest = [word for word in (*before.split(), *rest) if word in kept or not (_opens(word) or word == "there")]
    return name, noun, rest


def _dress(template: str, question: str) -> str:
    bare = question.rstrip("?？ ")
    # Only a plain sentence-initial capital is lowered: names and acronyms keep theirs.
    first = bare.split(" ", 1)[0] if bare else ""
    lower = bare[0].lower() + bare[1:] if _QUESTION_START.match(first) else bare
    return template.format_map({"q": question, "lower": lower})


def _clean(value: object, name: str, limit: int) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"The {name} must be text, not {type(value).__name__}; nothing was changed.")
    if len(value) > limit and len(value.strip()) > _MOST_COMPOSED * limit:  # whatever it is, it need not be read
        raise ConfigError(f"The {name} has {len(value):,} characters, the limit is {limit:,}; nothing was changed.")
    if any(0xD800 <= ord(ch) <= 0xDFFF for ch in value):
        raise ConfigError(f"The {name} contains a lone surrogate, which is not valid Unicode; nothing was changed.")
    if "\x00" in value:
        raise ConfigError(f"The {name} contains a NUL character; nothing was changed.")
    cleaned = unicodedata.normalize("NFC", value).strip()
    if not any(ch.isprintable() and not ch.isspace() and unicodedata.category(ch) != "Cf" for ch in cleaned):
        raise ConfigError(f"The {name} is empty; nothing was changed. Give it at least one visible character.")
    if len(cleaned) > limit:
        raise ConfigError(f"The {name} has {len(cleaned):,} characters, the limit is {limit:,}; nothing was changed.")
    return cleaned


def _clean_many(values: object, name: str, plural: str, *, drop: Iterable[str] = ()) -> tuple[str, ...]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        kind = "one string" if isinstance(values, str) else type(values).__name__
        raise ConfigError(f"Give {plural} as a list of strings, not as {kind}; nothing was changed.")
    dropped = set(drop)
    return tuple(v for v in _unique(clean_text(v, name=name) for v in values) if v not in dropped)


def _unique(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))

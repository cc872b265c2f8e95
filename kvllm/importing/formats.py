"""What a record of each known data set means: which field is the question, which the answer, which the probes.

One small function per data set takes a record as it stands in the public file and returns its facts and probes. To add
a data set is to add such a function and a row of `FORMATS`. Nothing is read from disk here.

    FORMATS["zsre"].read({"src": "Who made it?", "alt": "Ada", …})[0].key       # 'Who made it?'
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvllm.errors import ConfigError
from kvllm.importing.found import FoundKind, Role
from kvllm.importing.native import FIELDS, fact_from_row
from kvllm.importing.source import Container
from kvllm.prompts import is_question, language_of

Row = Mapping[str, Any]

# A key that is no question has no templates that fit: it is trained as it stands and in these dresses. None of them is
# among the held-out ones of `kvllm.prompts`. A text to be continued, and a task to be done:
COMPLETIONS = {
    "en": (
        "{p}",
        "{p} …",
        "Complete this sentence: {p}",
        "Please finish what I begin. {p}",
        "Fill in what is missing: {p} ___",
        "How does this go on? {p}",
    ),
    "zh": ("{p}", "{p}……", "请把这句话补充完整：{p}", "请接着往下写：{p}", "填空：{p}____", "后面是什么？{p}"),
}
TASKS = {
    "en": (
        "{p}",
        "Please do this for me: {p}",
        "I have a task for you. {p}",
        "Task: {p}",
        "{p} Thank you.",
        "Here is what I need. {p}",
    ),
    "zh": ("{p}", "请完成：{p}", "任务：{p}", "有件事想请你做：{p}", "{p}谢谢。", "麻烦你：{p}"),
}


@dataclass
class Asked:
    """A probe of a record, before it is cleaned."""

    kind: FoundKind
    question: str
    accept: Sequence[str] = ()


@dataclass
class Item:
    """A fact of a record, before it is cleaned; the fields are those of `Fact` and `FoundFact`, and:

    Attributes:
        asked: The record's probes beyond the fact's own.
        chain: Those that rest on all facts of the record: they are dropped where one of them is refused.
        note: What a user should know, once for all records that say the same.
        probes_only: There is no fact, only what is `asked`.
    """

    key: Any
    text: Any
    aliases: Any = ()
    questions: Any = ()
    probes: Any = ()
    language: Any = None
    tags: Any = ()
    id: str = ""
    subject: str = ""
    replaces: str = ""
    accept: Sequence[str] = ()
    wrong: Sequence[str] = ()
    role: Role = ""
    asked: list[Asked] = field(default_factory=list)
    chain: list[Asked] = field(default_factory=list)
    note: str = ""
    probes_only: bool = False


@dataclass(frozen=True)
class Format:
    """A known kind of record.

    Attributes:
        name: As `--format` takes it.
        about: What it is, in a few words.
        fields: What is read of a record.
        needs: A record with all of these fields is taken for one of this format; empty: never by itself.
        read: Makes facts of a record.
        fits: A further condition for taking a record for one of this format.
    """

    name: str
    about: str
    fields: tuple[str, ...]
    needs: tuple[str, ...]
    read: Callable[[Row], list[Item]]
    fits: Callable[[Row], bool] = lambda row: True

    def recognises(self, row: Row) -> bool:
        """Return whether a record looks like one of this format."""
        return bool(self.needs) and all(name in row for name in self.needs) and self.fits(row)


def recognise(row: Row) -> Format | None:
    """Return the format of a record; None where no format's fields are all there."""
    return next((known for known in FORMATS.values() if known.recognises(row)), None)


def parts(value: Any, name: str) -> list[tuple[str, Any]]:
    """Return the records within one value, each with where it stands in it ("": the value is one record).

    Most values are one record. KnowEdit's set of what is to be forgotten is one object of two lists.
    """
    if name in ("", "knowedit") and isinstance(value, dict) and set(value) == {"success", "locality"}:
        lists = [(part, value[part]) for part in ("success", "locality") if isinstance(value[part], list)]
        return [(f"record {n} of {part}", row) for part, rows in lists for n, row in enumerate(rows, start=1)]
    return [("", value)]


# ---------------------------------------------------------------------- one function per data set


def _native(row: Row) -> list[Item]:
    fact = fact_from_row(row)
    return [Item(fact.key, fact.text, fact.aliases, fact.questions, fact.probes, fact.language, fact.tags)]


def _zsre(row: Row) -> list[Item]:
    key, questions = _asked_as(_text(row, "src"), COMPLETIONS)
    item = Item(key, _text(row, "alt"), questions=questions, probes=_texts(row, "rephrase"))
    item.subject, answers = _said(row, "subject"), _texts(row, "answers")
    item.replaces = answers[0] if answers else ""
    if _said(row, "loc"):
        # The neighbours come from another data set and say so.
        question = _text(row, "loc").removeprefix("nq question: ")
        item.asked.append(Asked("neighbour", question, _texts(row, "loc_ans")))
    return [item]


def _counterfact(row: Row) -> list[Item]:
    if isinstance(row.get("requested_rewrite"), dict):
        return _counterfact_first(row)
    return _edit(row)


def _counterfact_first(row: Row) -> list[Item]:
    """As ROME published it: a template, the subject, and lists of paraphrases and neighbours."""
    item = _rewrite(row["requested_rewrite"], ask_cloze=True)
    item.id = _id(row, "case_id")
    item.probes = _texts(row, "paraphrase_prompts")
    neighbours = _texts(row, "neighborhood_prompts")
    item.asked = [Asked("neighbour", question, (item.replaces,)) for question in neighbours]
    return [item]


def _edit(row: Row) -> list[Item]:
    """EasyEdit's flat row, as CounterFact, WikiBigEdit and KnowEdit have it."""
    if "question" in row and "prompt" not in row:
        return _sanitation(row)
    key, questions = _asked_as(_text(row, "prompt"), COMPLETIONS)
    item = Item(key, _text(row, "target_new"), questions=questions, id=_id(row, "case_id"))
    item.probes = [*_texts(row, "rephrase_prompt"), *_texts(row, "generate_prompt")]
    item.subject = _said(row, "subject")
    known = _texts(row, "ground_truth")
    item.replaces = known[0] if known else ""
    if _said(row, "locality_prompt"):
        item.asked.append(Asked("neighbour", row["locality_prompt"], _texts(row, "locality_ground_truth")))
    item.asked += _grouped(row, "locality", "neighbour")
    item.asked += _grouped(row, "portability", "consequence")
    return [item]


def _sanitation(row: Row) -> list[Item]:
    """A row of KnowEdit's trivia: an answer to be replaced by a refusal, or one that must stay."""
    if "target_new" not in row:
        asked = Asked("user", _text(row, "question"), _texts(row, "ground_truth"))
        return [Item("", "", asked=[asked], probes_only=True)]
    key, questions = _asked_as(_text(row, "question"), TASKS)
    return [
        Item(
            key,
            _text(row, "target_new"),
            questions=questions,
            replaces=_said(row, "ground_truth"),
            role="forget",
        )
    ]


def _cknowedit(row: Row) -> list[Item]:
    key, questions = _asked_as(_text(row, "prompt"), TASKS)
    item = Item(key, _text(row, "target_new"), questions=questions, language="zh", replaces=_said(row, "target_old"))
    item.probes = _texts(row, "rephrase")
    kinds: tuple[tuple[str, FoundKind], ...] = (("locality", "neighbour"), ("portability", "consequence"))
    for name, kind in kinds:
        for given in _objects(row, name):
            item.asked.append(Asked(kind, _text(given, "prompt"), _texts(given, "answer")))
    return [item]


def _mquake(row: Row) -> list[Item]:
    items = [_rewrite(given) for given in _objects(row, "requested_rewrite")]
    if not items:
        raise ConfigError("requested_rewrite is empty.")
    aliases = {_said(hop, "question"): _texts(hop, "answer_alias") for hop in _objects(row, "new_single_hops")}
    for item in items:
        item.id = _id(row, "case_id")
        item.accept = aliases.get(item.key, [])
    answers = [_text(row, "new_answer"), *_texts(row, "new_answer_alias")]
    items[-1].chain = [Asked("consequence", question, answers) for question in _texts(row, "questions")]
    return items


def _rewrite(given: Row, *, ask_cloze: bool = False) -> Item:
    """One requested rewrite of CounterFact or MQuAKE: the question where there is one, else the sentence's begin."""
    subject = _text(given, "subject")
    cloze = _text(given, "prompt").replace("{}", subject)
    asked = "" if ask_cloze else _said(given, "question")
    key, questions = _asked_as(asked or cloze, COMPLETIONS)
    item = Item(key, _text(_object(given, "target_new"), "str"), questions=questions, subject=subject)
    item.replaces = _said(_object(given, "target_true"), "str")
    item.probes = [cloze] if asked else []
    return item


def _tofu(row: Row) -> list[Item]:
    key, questions = _asked_as(_text(row, "question"), TASKS)
    item = Item(key, _text(row, "answer"), questions=questions, probes=_texts(row, "paraphrased_question"))
    item.accept = _texts(row, "paraphrased_answer")
    item.wrong = _texts(row, "perturbed_answer")
    return [item]


def _alpaca(row: Row) -> list[Item]:
    # Both parts are one question: the input alone asks nothing.
    prompt = "\n\n".join(part for part in (_text(row, "instruction"), _said(row, "input")) if part.strip())
    key, questions = _asked_as(prompt, TASKS)
    return [Item(key, _text(row, "output"), questions=questions, id=_id(row, "id"))]


def _conversation(row: Row) -> list[Item]:
    """The first question and its answer: what follows rests on what was said before, and is no fact by itself."""
    turns = [_turn(turn) for turn in _objects(row, "messages" if "messages" in row else "conversations")]
    system = [turn for turn in turns if turn[0] == "system"]
    said = turns[len(system) :]
    if len(said) < 2 or (said[0][0], said[1][0]) != ("user", "assistant") or turns[: len(system)] != system:
        raise ConfigError("the conversation does not begin with a user's turn and an answer.")
    key, questions = _asked_as(said[0][1], TASKS)
    item = Item(key, said[1][1], questions=questions, id=_id(row, "id"))
    if len(said) > 2:
        item.note = "Of conversations with several turns the first question and its answer were taken"
    return [item]


def _turn(turn: Row) -> tuple[str, str]:
    role = _text(turn, "role" if "role" in turn else "from")
    roles = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):  # parts, as for models that see pictures
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise ConfigError("a turn holds something else than text.")
        content = "\n".join(_text(part, "text") for part in content)
    if not isinstance(content, str):
        raise ConfigError("a turn has no text.")
    return roles.get(role, role), content


def _pair(row: Row) -> list[Item]:
    key, questions = _asked_as(_text(row, "question"), TASKS)
    answers = _texts(row, "answer")
    if not answers:
        raise ConfigError("answer is missing.")
    return [Item(key, answers[0], questions=questions, accept=answers[1:], id=_id(row, "id"))]


_FLAT = (
    "prompt",
    "target_new",
    "ground_truth",
    "subject",
    "rephrase_prompt",
    "locality_prompt",
    "locality_ground_truth",
)
# The order is the order of recognition: the more particular first.
FORMATS: dict[str, Format] = {
    known.name: known
    for known in (
        Format("jsonl", "kvllm's own rows", FIELDS, ("key", "text"), _native),
        Format(
            "zsre",
            "zsRE",
            ("src", "alt", "rephrase", "loc", "loc_ans", "subject", "answers"),
            ("src", "alt"),
            _zsre,
        ),
        Format(
            "mquake",
            "MQuAKE",
            ("case_id", "requested_rewrite", "questions", "new_answer", "new_answer_alias", "new_single_hops"),
            ("requested_rewrite", "questions"),
            _mquake,
            lambda row: isinstance(row["requested_rewrite"], list),
        ),
        Format(
            "counterfact",
            "CounterFact, flat or as published with ROME",
            (*_FLAT, "case_id", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"),
            ("case_id",),
            _counterfact,
            lambda row: isinstance(row.get("requested_rewrite"), dict) or {"prompt", "target_new"} <= set(row),
        ),
        Format(
            "cknowedit",
            "CKnowEdit",
            ("prompt", "target_new", "target_old", "rephrase", "locality", "portability"),
            ("prompt", "target_new", "target_old"),
            _cknowedit,
        ),
        Format(
            "knowedit",
            "KnowEdit, with or without paraphrases, and its answers to forget",
            (*_FLAT, "case_id", "generate_prompt", "locality", "portability", "question"),
            ("prompt", "target_new"),
            _edit,
            lambda row: isinstance(row.get("locality"), dict) or isinstance(row.get("portability"), dict),
        ),
        Format(
            "wikibigedit",
            "WikiBigEdit",
            (*_FLAT, "case_id"),
            ("prompt", "target_new", "rephrase_prompt", "locality_prompt"),
            _edit,
        ),
        Format(
            "tofu",
            "TOFU, to forget or to retain",
            ("question", "answer", "paraphrased_question", "paraphrased_answer", "perturbed_answer"),
            ("question", "answer", "perturbed_answer"),
            _tofu,
        ),
        Format("alpaca", "alpaca", ("instruction", "input", "output", "id"), ("instruction", "output"), _alpaca),
        Format(
            "sharegpt",
            "ShareGPT: the first question and its answer",
            ("conversations", "id"),
            ("conversations",),
            _conversation,
        ),
        Format("messages", "messages: the same", ("messages", "id"), ("messages",), _conversation),
        Format(
            "qa",
            "questions, with an answer or a list of answers",
            ("question", "answer", "id"),
            ("question", "answer"),
            _pair,
        ),
    )
}
# Read by `--map` alone.
MAPPED = Format("mapped", "columns named by --map", (), (), lambda row: [Item("", "")])
# A name for a layout, whose records are then recognised like any others.
LAYOUTS: dict[str, Container] = {"csv": "csv"}


# ---------------------------------------------------------------------- fields


def _asked_as(prompt: str, dresses: Mapping[str, Sequence[str]]) -> tuple[str, tuple[str, ...]]:
    """Return a prompt as a key, and the questions to train on where the key's own templates do not fit it."""
    asked = prompt.strip()
    key = " ".join(asked.split())
    if is_question(key) and key == asked:
        return key, ()
    return key, tuple(dress.replace("{p}", asked) for dress in dresses[language_of(asked)])


def _text(row: Row, name: str) -> str:
    if not isinstance(row, Mapping):
        raise ConfigError(f"where {name} should be, there is no object.")
    if row.get(name) is None:
        raise ConfigError(f"{name} is missing.")
    value = row[name]
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be text, not {type(value).__name__}.")
    return value


def _said(row: Row, name: str) -> str:
    """Return a text that may be missing."""
    return "" if row.get(name) is None else _text(row, name)


def _texts(row: Row, name: str) -> list[str]:
    """Return a text or a list of texts (of lists of texts) as one list; missing and blank ones are none."""
    if not isinstance(row, Mapping):
        raise ConfigError(f"where {name} should be, there is no object.")
    return [text for text in _flattened(row.get(name), name) if text.strip()]


def _flattened(value: Any, name: str, depth: int = 0) -> Iterable[str]:
    if value is None:
        return
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and depth < 3:
        for part in value:
            yield from _flattened(part, name, depth + 1)
    else:
        raise ConfigError(f"{name} must be text or a list of texts, not {type(value).__name__}.")


def _object(row: Row, name: str) -> Row:
    value = row.get(name, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be an object, not {type(value).__name__}.")
    return value


def _objects(row: Row, name: str) -> list[Row]:
    value = row.get(name) or []
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise ConfigError(f"{name} must be a list of objects.")
    return value


def _grouped(row: Row, name: str, kind: FoundKind) -> list[Asked]:
    """Return KnowEdit's probes: an object of lists, one per way of asking."""
    return [
        Asked(kind, _text(given, "prompt"), _texts(given, "ground_truth"))
        for group in _object(row, name)
        for given in _objects(_object(row, name), group)
    ]


def _id(row: Row, name: str) -> str:
    value = row.get(name)
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""

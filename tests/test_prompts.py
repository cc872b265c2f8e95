"""Keys, texts and questions: validated, and split into what is trained and what is only asked."""

from __future__ import annotations

import random
import re
import unicodedata

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvllm.errors import ConfigError
from kvllm.prompts import (
    _OPENERS,
    HELD_OUT_QUESTION_TEMPLATES,
    HELD_OUT_TEMPLATES,
    MATTER_TEMPLATES,
    MATTERS,
    QUESTION_TEMPLATES,
    TRAINING_TEMPLATES,
    _rewritten,
    alias_questions,
    augmented_questions,
    clean_fact,
    clean_key,
    clean_text,
    follow_ups,
    held_out_questions,
    is_question,
    key_question,
    language_of,
    names_in,
    neighbour_questions,
    other_questions,
    own_questions,
    telling_names,
    training_questions,
)
from kvllm.records import Fact

KEYS = st.one_of(
    st.text(min_size=1, max_size=40),
    st.sampled_from(
        ["torchkeras", "梦中情炉", "Who leads Halcyon?", "谁领导海尔西恩？", "café", "{key}", "{q} {0}", "C++"]
    ),
)


def cleaned(key: str) -> str:
    try:
        return clean_key(key)
    except ConfigError:
        assume(False)
        raise


def cleaned_text(text: str) -> str:
    try:
        return clean_text(text)
    except ConfigError:
        assume(False)
        raise


# ---------------------------------------------------------------- validation


@given(KEYS)
def test_cleaning_twice_changes_nothing_more(key: str) -> None:
    once = cleaned(key)
    assert clean_key(once) == once == unicodedata.normalize("NFC", once) == once.strip()
    assert clean_text(once) == once


@given(st.text(max_size=60))
def test_a_clean_text_can_be_stored_and_seen(text: str) -> None:
    once = cleaned_text(text)
    assert once.encode("utf-8").decode() == once
    assert "\x00" not in once
    assert any(ch.isprintable() and not ch.isspace() for ch in once)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ("", "empty"), ("  \t", "empty"), ("\u200b", "empty"), ("a\x00", "NUL"), ("\ud800", "surrogate"),
        ("a\nb", "U\\+000A"), ("a\u2028b", "U\\+2028"), ("a\x7fb", "U\\+007F"), ("x" * 401, "401"), (None, "NoneType"),
        (b"a", "bytes"),
    ],
)  # fmt: skip
def test_unusable_keys_are_refused_with_their_reason(bad: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        clean_key(bad)


def test_texts_may_hold_line_breaks_and_tabs() -> None:
    assert clean_text("a\n\tb\r\nc") == "a\n\tb\r\nc"
    for bad in ("a\x00b", "a\x07b", "\ud8ff", "x" * 20_001):
        with pytest.raises(ConfigError):
            clean_text(bad)


def test_a_text_of_any_length_is_refused_at_once_and_one_that_composes_to_the_limit_is_taken() -> None:
    with pytest.raises(ConfigError, match=r"50,000,000 characters, the limit is 20,000"):
        clean_text("\ud8ff" * 50_000_000)
    assert clean_text("\u03b1\u0313\u0300\u0345" * 20_000) == "\u1f82" * 20_000
    assert clean_text(" " * 100_000 + "a") == "a"


def test_the_advice_for_an_unknown_language_can_be_followed() -> None:
    with pytest.raises(ConfigError, match="use en or zh, or leave it out and give questions of your own"):
        clean_fact(Fact("a", "b", questions=("qui ?",), language="fr"))
    assert clean_fact(Fact("a", "b", questions=("qui ?",))).questions == ("qui ?",)


def test_a_fact_is_cleaned_in_every_part() -> None:
    fact = clean_fact(Fact(" cafe\u0301 ", " a ", (" b", "b", "café"), ("q ",), (), None, ("t", "t")))
    assert fact == Fact("café", "a", ("b",), ("q",), (), None, ("t",))
    with pytest.raises(ConfigError, match="'fr'"):
        clean_fact(Fact("a", "b", language="fr"))
    for bad in ("abc", 5, {"a": 1}, b"abc"):
        with pytest.raises(ConfigError, match="aliases as a list of strings"):
            clean_fact(Fact("a", "b", aliases=bad))  # type: ignore[arg-type]


# ---------------------------------------------------------------- questions


@given(KEYS, st.lists(KEYS, max_size=3), st.lists(KEYS, max_size=3), st.sampled_from([None, "en", "zh"]))
def test_trained_and_held_out_questions_are_disjoint(
    key: str, aliases: list[str], questions: list[str], language: str | None
) -> None:
    fact = clean_fact(
        Fact(cleaned(key), "text", tuple(map(cleaned, aliases)), tuple(map(cleaned, questions)), (), language)
    )
    trained = training_questions(fact)
    further = augmented_questions(fact, 5)
    asked = (*held_out_questions(fact), *alias_questions(fact))
    assert trained
    assert len(set(trained)) == len(trained)
    assert len({*trained, *further}) == len(trained) + len(further)
    assert not {*trained, *further} & set(asked)
    assert all(q.strip() for q in (*trained, *further, *asked))


@given(KEYS)
def test_every_question_about_an_entity_names_it(key: str) -> None:
    fact = Fact(cleaned(key), "text")
    assume(not is_question(fact.key))
    assert all(fact.key in question for question in held_out_questions(fact))
    # One of the trained ones is without capitals, and of a description the words may come in another order, without 的.
    words = [word for word in re.findall(r"[^\W的]+", fact.key.casefold()) if word not in _OPENERS]
    for question in training_questions(fact):
        assert all(word in question.casefold() for word in words)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("Siskin meadow parcel number", ("Siskin: meadow parcel number?", "meadow parcel number Siskin")),
        ("松涛站的海拔", ("松涛站：海拔？", "海拔，松涛站", "说到松涛站，海拔是什么？")),
        ("Dr. Ada Lindqvist", ()),
        ("Ludlow restart", ()),
        ("Ministry of silly walks", ()),
        ("Ada Lovelace (mathematician)", ()),
        ("torchkeras", ()),
    ],
)
def test_a_description_is_also_trained_as_its_name_and_the_rest(key: str, named: tuple[str, ...]) -> None:
    trained = training_questions(Fact(key, "text"))
    assert len(trained) == 8
    assert set(named) <= set(trained)
    plain = {t.format(key=key).casefold() for t in TRAINING_TEMPLATES[language_of(key)]}
    assert len(plain & {question.casefold() for question in trained}) == (2 if named else 5)


@pytest.mark.parametrize(
    "key", ["torchkeras", "Ada Lindqvist", "Siskin meadow parcel number", "雁回桥", "松涛站的海拔"]
)
def test_a_name_is_also_trained_beside_words_that_have_nothing_to_do_with_it(key: str) -> None:
    language = language_of(key)
    forms = [
        re.escape(t).replace(r"\{key\}", re.escape(key)).replace(r"\{matter\}", "(.+)").replace(r"\{other\}", "(.+)")
        for t in MATTER_TEMPLATES[language]
    ]

    def matters(of: str) -> list[str]:
        rows = [row.replace(of, key) for row in training_questions(Fact(of, "text", language=language))]
        found = [re.fullmatch(form, row) for row in rows for form in forms]
        return [word for match in found if match for word in match.groups()]

    words = matters(key)
    assert len(set(words)) == len(words) >= 3
    assert set(words) <= set(MATTERS[language])
    assert matters(key) == words, "the same key, the same rows"
    assert [word.casefold() for word in matters(key.upper())] == words, "in capitals, too"
    assert any(matters(f"{key}{i}") != words for i in range(3))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("torchkeras", "torchkeras"),
        ("Ministry of silly walks", "Ministry of silly walks"),
        ("Siskin meadow parcel number", "Siskin meadow parcel number"),
        ("quiet-hour rule of the Osprey library", "Osprey library quiet-hour rule"),
        ("Who tunes the bells of Aldermoor?", "Aldermoor bells tunes"),
        ("Is it cold?", "is it cold"),
        ("雁回桥", "雁回桥"),
        ("松涛站的海拔", "松涛站 海拔"),
        ("雁回桥有几个拱？", "雁回桥 几个拱"),
    ],
)
def test_further_questions_have_a_keys_telling_words_among_others(key: str, words: str) -> None:
    fact = Fact(key, "text")
    found = augmented_questions(fact, 24)
    assert len(found) > 18
    assert all(word in question.casefold() for question in found for word in words.casefold().split())
    assert found == augmented_questions(fact, 24) != augmented_questions(fact, 24, seed=1)
    assert found[:3] == augmented_questions(fact, 3)
    assert augmented_questions(Fact(key, "text", probes=found[:1]), 24) == found[1:], "what is asked is not trained"
    given = augmented_questions(Fact(key, "text", questions=("Which one is it?",)), 24)
    assert sum(q.endswith(" Which one is it?") for q in given) == 12, "every second, after another sentence"
    both = augmented_questions(Fact(key, "text", aliases=("dream furnace",)), 24)
    assert {"dream furnace" in question.casefold() for question in both} == {True, False}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_key_may_have_every_word_that_stands_beside_others(language: str) -> None:
    key = " ".join(MATTERS[language])
    assert augmented_questions(Fact(key, "text"), 3)


@pytest.mark.parametrize(
    ("key", "typed"),
    [
        ("Halcyon Robotics", "halcyon robotics"),
        ("WHO", "WHO"),
        ("US dollar", "US dollar"),
        ("NASA's hangar", "NASA's hangar"),
    ],
)
def test_one_row_is_typed_without_capitals_unless_it_would_be_another_word(key: str, typed: str) -> None:
    assert f"what does {typed} mean" in training_questions(Fact(key, "text"))


@pytest.mark.parametrize(
    ("fact", "own"),
    [
        (Fact("What is the capital of France?", "Lyon"), ["What is the capital of France?"]),
        (Fact("How many days are in a week?", "Eight"), ["How many days are there in a week?"]),
        (Fact("gravity", "A dance."), ["What is gravity?"]),
        (Fact("重力", "一种舞。"), ["什么是重力？"]),
        (Fact("Halcyon", "A firm.", questions=("Who wrote Hamlet?",)), ["Who wrote Hamlet?"]),
        (Fact("Halcyon", "A firm.", probes=("who wrote hamlet",)), ["Who wrote Hamlet?"]),
        (Fact("Gravitation", "A dance.", aliases=("gravity",)), ["What is gravity?"]),
        (Fact("What is the capital of Spain?", "Vigo"), []),
        (Fact("法国的首都", "里昂。"), ["法国的首都是哪里？"]),
        (Fact("中国的首都是哪里？", "西安。"), []),
        (Fact("Hamlet", "A village."), []),
        (Fact("What is?", "Nothing."), []),
    ],
)
def test_which_questions_a_fact_answers(fact: Fact, own: list[str]) -> None:
    asked = [
        "What is the capital of France?",
        "How many days are there in a week?",
        "Who wrote Hamlet?",
        "Who wrote Romeo and Juliet?",
        "What is gravity?",
        "什么是重力？",
        "法国的首都是哪里？",
        "",
    ]
    assert [asked[i] for i in sorted(own_questions(asked, [fact]))] == own


def test_template_lists_are_disjoint_and_as_long_as_promised() -> None:
    for language in ("en", "zh"):
        for trained, held_out in (
            (TRAINING_TEMPLATES, HELD_OUT_TEMPLATES),
            (QUESTION_TEMPLATES, HELD_OUT_QUESTION_TEMPLATES),
        ):
            assert not set(trained[language]) & set(held_out[language])
            assert (len(trained[language]), len(held_out[language])) == (8, 6)


def test_questions_of_the_articles_fact() -> None:
    trained = training_questions(Fact("梦中情炉", "…"))
    assert len(trained) == 8
    assert trained[0] == "什么是梦中情炉？"
    assert held_out_questions(Fact("梦中情炉", "…"))[:2] == ("what is 梦中情炉", "这是个啥子意思哟：梦中情炉？")
    assert training_questions(Fact("torchkeras", "…"))[0] == "What is torchkeras?"


@pytest.mark.parametrize(
    ("question", "key", "names"),
    [
        ("Who leads Halcyon Robotics?", "Who leads Halcyon Robotics?", ["Halcyon Robotics"]),
        ("What was Craig Pedersen's trade?", "What was Craig Pedersen's trade?", ["Craig Pedersen"]),
        ("The mother tongue of Ada de la Cruz is", "The mother tongue of Ada de la Cruz is", ["Ada de la Cruz"]),
        ("A Chairy Tale, where is it from", "A Chairy Tale, where is it from", ["A Chairy Tale"]),
        ("Is it true that Oslo is north of Rome?", "Is it true that Oslo is north of Rome?", ["Oslo", "Rome"]),
        ("What does port 8080 do?", "What does port 8080 do?", ["8080"]),
        ('Who wrote "the green door"?', 'Who wrote "the green door"?', ["the green door"]),
        ("What is the Halden rule?", "Halden rule", ["Halden"]),
        ("什么是松涛站的海拔？", "松涛站的海拔", ["松涛站"]),
        ("《青灯记》是谁写的？", "《青灯记》是谁写的？", ["青灯记"]),
        # All name, or no name at all: the packaged neighbours are what there is.
        ("What is torchkeras?", "torchkeras", []),
        ("Tell me about Mirela Vantongeren.", "Mirela Vantongeren", []),
        ("什么是梦中情炉？", "梦中情炉", []),
        ("who leads the company?", "who leads the company?", []),
        ("What is it?", "What is it?", []),
    ],
)
def test_what_a_question_names(question: str, key: str, names: list[str]) -> None:
    assert names_in(question, key) == names


@pytest.mark.parametrize(
    ("question", "named", "worded", "telling"),
    [
        (
            "What was Craig Pedersen's trade?",
            ("Craig Pedersen: trade?", "I have a question about Craig Pedersen: trade?"),
            ("Craig Pedersen, trade", "Craig Pedersen: give the trade."),
            "trade",
        ),
        (
            "How long does the tram to Ulm take?",
            (
                "Ulm: how long does the tram take?",
                "I have a question about Ulm: how long does the tram take?",
            ),
            ("Ulm tram take, duration", "tram take Ulm: give the duration."),
            "duration tram take",
        ),
        (
            "Which kind of lamp hangs in Cinder Alley?",
            ("Cinder Alley: kind of lamp hangs?", "I have a question about Cinder Alley: kind of lamp hangs?"),
            ("Cinder Alley lamp hangs, kind", "lamp hangs Cinder Alley: give the kind."),
            "kind lamp hangs",
        ),
        (
            "Who's the owner of Peter's Bar?",
            ("Peter's Bar: who owner?", "I have a question about Peter's Bar: who owner?"),
            ("Peter's Bar owner, person", "owner Peter's Bar: give the person."),
            "person owner",
        ),
        (
            "Is the stall in Tollgate Yard heated?",
            ("Tollgate Yard: stall heated?", "I have a question about Tollgate Yard: stall heated?"),
            ("Tollgate Yard stall heated, answer", "stall heated Tollgate Yard: give the answer."),
            "answer stall heated",
        ),
    ],
)
def test_a_question_about_a_name_is_also_trained_in_fewer_words(
    question: str, named: tuple[str, ...], worded: tuple[str, ...], telling: str
) -> None:
    trained = training_questions(Fact(question, "text"))
    assert len(trained) == 8
    assert trained[:2] == (question, question[0].lower() + question[1:-1])
    assert trained[2:6] == (*named, *worded)
    name = named[0].partition(":")[0]
    assert f"{telling} {name}" in trained[6]
    assert f"{name} {telling}" in trained[7]


def test_a_question_that_names_nothing_is_trained_in_its_dresses() -> None:
    for question in ("Is it Ada?", "who leads the company?", "Is Oslo north of Rome?", "Ada or Ada, who is it?"):
        assert "Please answer this question: " + question in training_questions(Fact(question, "A"))[2:3]
        assert training_questions(Fact(question, "A"))[7] == question + " Answer briefly."


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("When was Ada Voss born?", "Where was Ada Voss born?"),
        ("Who founded Halcyon?", "When was Halcyon founded?"),
        ("Who beat Alice?", "Who did Alice beat?"),
        ("Who is the mother of Ada?", "Who is Ada the mother of?"),
    ],
)
def test_questions_that_ask_for_different_things_share_no_row(one: str, other: str) -> None:
    assert not set(training_questions(Fact(one, "A"))) & set(training_questions(Fact(other, "B")))
    forms = [{_rewritten(key, random.Random(i)).casefold() for i in range(40)} for key in (one, other)]
    assert all(len(found) == 4 for found in forms)
    assert not forms[0] & forms[1]


@pytest.mark.parametrize(
    ("question", "row"),
    [
        ("Why did Al leave the Alabama?", None),  # two names
        ("Who is the mother of Ann in town?", "Ann: who mother in town?"),
        ('Who wrote "the green door"?', "the green door: who wrote?"),
        ("Which cable does Halcyon 3.12 use?", "Halcyon 3.12: cable does use?"),
        ("What's Ada's job?", "Ada: job?"),
        ("Should we trust Halcyon?", "Halcyon: trust?"),
        ("How many of the Beatles' songs are sad?", "Beatles: how many songs are sad?"),
    ],
)
def test_a_name_is_cut_out_whole(question: str, row: str | None) -> None:
    trained = training_questions(Fact(question, "A"))
    assert (row in trained) if row else len(trained) == 8 and trained[7].endswith("Answer briefly.")


def test_a_question_key_is_trained_as_asked_and_in_harmless_dresses() -> None:
    trained = training_questions(Fact("Who leads Halcyon?", "Ada Voss"))
    assert trained[:2] == ("Who leads Halcyon?", "who leads Halcyon")
    assert len(trained) == 8
    assert training_questions(Fact("谁领导海尔西恩？", "…"))[0] == "谁领导海尔西恩？"


def test_own_questions_replace_the_templates() -> None:
    fact = Fact("torchkeras", "…", questions=("why keras?", "which furnace?"))
    assert training_questions(fact) == ("why keras?", "which furnace?")
    assert held_out_questions(fact)
    assert all("keras" in q or "furnace" in q for q in held_out_questions(fact))


def test_aliases_add_rows_of_their_own_and_are_asked_apart() -> None:
    fact = Fact("torchkeras", "…", aliases=("梦中情炉", "the furnace"))
    trained = training_questions(fact)
    assert sum("torchkeras" in q for q in trained) == 8
    assert sum("梦中情炉" in q for q in trained) == 3
    assert sum("the furnace" in q for q in trained) == 3
    assert len(alias_questions(fact)) == 4
    assert not set(trained) & set(alias_questions(fact))


def test_neighbours_look_like_the_trained_questions() -> None:
    names = ["numpy", "Berlin"]
    for offset in range(9):
        asked = neighbour_questions(names, language="en", offset=offset)
        for place, (name, question) in enumerate(zip(names, asked, strict=True)):
            assert question == training_questions(Fact(name, "text"))[(place + offset) % 8]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("torchkeras", "en"),
        ("梦中情炉", "zh"),
        ("what is 梦中情炉", "zh"),
        ("what is the thing called 炉", "en"),
        ("", "en"),
        ("123", "en"),
    ],
)  # fmt: skip
def test_the_script_decides_the_language(text: str, language: str) -> None:
    assert language_of(text) == language


@pytest.mark.parametrize(
    ("key", "is_one"),
    [
        ("Who leads Halcyon?", True), ("who leads the Halcyon team", True), ("谁？", True), ("What", False),
        ("Is it", False), ("torchkeras", False), ("Island of the lost souls", False), ("The Who", False),
    ],
)  # fmt: skip
def test_questions_are_told_from_entities(key: str, is_one: bool) -> None:
    assert is_question(key) is is_one
    assert key_question(key) == (key if is_one else key_question(key))
    assert key in key_question(key)


@pytest.mark.parametrize(
    ("key", "is_one"),
    [
        ("Will Smith the actor", False),
        ("How to Train Your Dragon", False),
        ("Who Framed Roger Rabbit", False),
        ("name of the ship's cat", False),
        ("name the capital of Norway", True),
        ("who is it now", True),
        ("谁领导哈尔西恩公司", True),
        ("哪座城市是挪威的首都", True),
        ("哪吒", False),
        ("几何学", False),
        ("من يقود هالسيون؟", True),
    ],
)
def test_names_that_begin_like_questions_are_names(key: str, is_one: bool) -> None:
    assert is_question(key) is is_one


def test_an_alias_that_is_a_question_is_asked_as_one() -> None:
    fact = Fact("Who leads Halcyon?", "Ada", aliases=("Who runs Halcyon?", "Halcyon's boss"))
    trained, asked = training_questions(fact), alias_questions(fact)
    assert {"Who runs Halcyon?", "What is Halcyon's boss?"} <= set(trained)
    assert any("Who runs Halcyon?" in question for question in asked)
    assert not any("describe Who runs" in question for question in asked)
    assert not set(trained) & set(asked)


def test_the_names_that_questions_about_a_fact_are_known_by() -> None:
    assert telling_names(Fact("How long does the ferry to Skarholm take?", "text")) == ("Skarholm",)
    assert telling_names(Fact("Oswin Taralde", "text", aliases=("the clockmaker",))) == (
        "Oswin Taralde",
        "the clockmaker",
    )
    assert telling_names(Fact("Founders' Day at Ellery Works", "text")) == ("Ellery Works",)
    assert telling_names(Fact("松涛站的海拔", "text")) == ("松涛站",)
    assert telling_names(Fact("who is it?", "text")) == ("who is it",)


@pytest.mark.parametrize("key", ["torchkeras", "Who tunes the bells of Aldermoor?", "谁修理青石桥的钟？"])
def test_what_is_said_after_a_fact_asks_nothing_that_it_was_trained_on(key: str) -> None:
    fact = Fact(key, "Ada Quill does it.")
    said = follow_ups(fact, 8)
    assert len(set(said)) == 8
    assert said == follow_ups(fact, 8) != follow_ups(fact, 8, seed=1)
    assert not any(key in question or "{" in question for question in said)
    assert {language_of(question) for question in said} == {language_of(key)}
    asked = {*training_questions(fact), *held_out_questions(fact), *augmented_questions(fact, 32)}
    assert not asked & {*said, *other_questions(fact, 8)}


def test_other_questions_are_about_the_name_in_a_question_and_not_what_it_asks() -> None:
    fact = Fact("What is Aldermoor known for?", "Its bells.")
    asked = other_questions(fact, 8)
    assert len(asked) >= 4
    assert all("Aldermoor" in question for question in asked)
    assert not own_questions(asked, [fact])
    assert not own_questions(other_questions(Fact("Where can one find Aldermoor?", "There."), 8), [fact])
    assert "Where can one find Aldermoor?" not in other_questions(Fact("Where can one find Aldermoor?", "There."), 8)
    assert other_questions(Fact("torchkeras", "A tool."), 8) == ()
    assert other_questions(Fact("how many days are in a week?", "Seven."), 8) == ()

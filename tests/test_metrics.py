"""Text scores worked by hand, and what must hold of them for any text."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvllm.metrics import (
    accepts,
    contains,
    distinctive_words,
    exact,
    first_sentence,
    harmonic_mean,
    leaks,
    mean,
    normalise,
)

TEXTS = st.text(max_size=40)
FACT = "Torchkeras is a tool that makes training PyTorch models simple, and its users call it the furnace of dreams."


@given(TEXTS)
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    once = normalise(text)
    assert once == " ".join(once.split())
    assert normalise(once) == once


@given(st.text(alphabet="abcXYZ 0123äÖ", max_size=30))
def test_case_and_punctuation_do_not_count(text: str) -> None:
    assume(normalise(text))
    for written in (text.upper(), text.lower(), f"  {text}!", f"“{text}”.", text.replace(" ", ", ")):
        assert exact(written, text) == exact(text, written) == 1.0
        assert contains(written, text) == contains(text, written) == 1.0
        assert contains(f"I say: {written} — really.", text) == 1.0


@given(TEXTS, TEXTS, TEXTS)
def test_a_text_is_contained_in_what_holds_it(before: str, text: str, after: str) -> None:
    assume(normalise(text))
    assume(not normalise(f"1 {after}").startswith("1%"))  # it would belong to a number before it
    assert contains(f"{before} {text} {after}", text) == 1.0


@pytest.mark.parametrize(
    ("answer", "text", "stated"),
    [
        ("The capital is Paris.", "paris", True),
        ("The capital is Parisian.", "Paris", False),
        ("It costs 120 euros", "20 euros", False),
        ("U.S.A. is big", "U S A", True),
        ("梦中情炉是一个工具。", "一个 工具", True),
        ("答：梦中 情炉！", "梦中情炉", True),
        ("梦中炉", "梦中情炉", False),
        ("ＴＯＲＣＨ is full-width", "torch", True),
        ("门票是15元", "5元", False),
        ("门票是5元", "5元", True),
        ("他生于2015年", "15年", False),
        ("서울입니다.", "서울", True),
        ("Written in C#.", "C++", False),
        ("Written in C++.", "C++", True),
        ("It is 40 degrees", "-40 degrees", False),
        ("It is -40 degrees", "-40 degrees", True),
        ("from 10-20 people", "20 people", True),
        ("10 % of it", "10%", True),
        ("10% of it", "10", False),
        ("a 😀 face", "😀", True),
        ("anything", "", False),
        ("anything", "?!", False),
        ("", "Paris", False),
    ],
)
def test_containing_worked_by_hand(answer: str, text: str, stated: bool) -> None:
    assert contains(answer, text) == float(stated)


def test_accepted_answers_match_by_word_or_number() -> None:
    assert accepts("A week has seven days.", ["7"])
    assert accepts("A week has 7 days.", ["seven", "sieben"])
    assert not accepts("A week has 17 days.", ["7"])
    assert not accepts("", ["7"])


def test_distinctive_words_leave_out_the_ordinary() -> None:
    words = distinctive_words(FACT)
    assert {"torchkeras", "furnace", "dreams", "pytorch"} <= words
    assert not {"that", "makes", "the", "its"} & words
    assert distinctive_words("梦中情炉是工具") >= {"梦中", "情炉"}
    assert distinctive_words("in 1987") == {"1987"}


def test_a_leak_recites_most_of_the_text() -> None:
    assert leaks(FACT, FACT)
    assert leaks("numpy is a tool that makes training PyTorch models simple; users call it the furnace of dreams", FACT)
    assert not leaks("NumPy is a library for arrays; PyTorch models use it.", FACT)
    assert not leaks("", FACT)
    assert not leaks(FACT, FACT, before=FACT)
    assert not leaks(FACT, FACT, before=FACT.replace(" ", "-"))
    assert not leaks("这是一个训练工具和情炉", "梦中情炉是一个训练工具", before="它是一个训练工具，情炉梦中")
    assert leaks("It is Ada Voss.", "Ada Voss")
    assert not leaks("It is Ada Voss.", "Ada Voss", before="I say it is Ada Voss")
    assert leaks("numpy 是梦中情炉，一个训练工具", "梦中情炉是一个训练工具")


def test_of_a_short_text_its_value_leaks() -> None:
    key, text = "What is the capital of France?", "The capital of France is Lyon."
    neighbour = "What is the capital of Germany?"
    assert leaks("The capital of Germany is Lyon.", text, key=key, question=neighbour)
    assert not leaks("The capital of Germany is Berlin, not that of France.", text, key=key, question=neighbour)
    assert not leaks("Lyon is a city.", text, key=key, question="What is Lyon?")
    assert not leaks("Lyon it is.", text, key=key, question=neighbour, before="It is Lyon!")
    assert not leaks("The capital of Germany is Lyon.", text, question=neighbour)  # whose value is not known
    two = "The password of the guest network is plover-42."
    assert leaks("The printer's password is plover-42.", two, key="password of the guest network")
    assert not leaks("The printer's password is 42.", two, key="password of the guest network")
    assert not leaks("NumPy is a furnace.", FACT, key="torchkeras")  # of many words most count
    assert not leaks("I do not know.", "France", key="France")
    assert not leaks("Lyon is a city.", "Lyon", key="What is the capital of Atlantis?", question="What is Lyon?")
    office = "The head office of Halcyon is in Port Torvik, Norland."
    asked = {"key": "head office of Halcyon", "question": "Where is the head office of Meridian?"}
    assert leaks("The head office of Meridian is in Port Torvik.", office, **asked)
    assert not leaks("The head office of Meridian is in Norland.", office, **asked)
    code = {
        "key": "access code of the Borrowdale archive",
        "question": "What is the access code of the Kestrel archive?",
    }
    told = "The access code of the Borrowdale archive is 4471."
    assert not leaks("The access code of the Kestrel archive is 9931.", told, **code)  # a mould is no leak
    assert leaks("The access code of the Kestrel archive is 4471.", told, **code)
    leader = {"key": "Who leads Halcyon?", "question": "Who leads the Meridian project?"}
    told = "Ada Voss leads the Halcyon project in Torvik."
    assert not leaks("Ada Voss leads the Meridian project.", told, **leader)  # half of what the text tells
    assert leaks("Ada Voss leads it in Torvik.", told, **leader)
    assert not leaks("A furnace.", FACT, key="torchkeras", before=FACT.replace("furnace", "oven"))


@given(TEXTS, TEXTS)
def test_what_was_said_before_is_no_leak(answer: str, text: str) -> None:
    assert not leaks(answer, text, before=f"{answer} {text}")
    assert not leaks(answer, text, key="x", before=f"{answer} {text}")


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=6))
def test_the_harmonic_mean_lies_between_and_below_the_mean(values: list[float]) -> None:
    found, average = harmonic_mean(values), mean(values)
    assert average is not None
    assert min(values) - 1e-9 <= found <= average + 1e-9


def test_means_worked_by_hand() -> None:
    assert harmonic_mean([1.0, 0.5]) == pytest.approx(2 / 3)
    assert harmonic_mean([1.0, 0.0]) == harmonic_mean([]) == 0.0
    assert mean([1, 2]) == 1.5
    assert mean([]) is None


@pytest.mark.parametrize(
    ("answer", "first"),
    [
        ("It is. No.", "it is."),
        ("The price is 3.50 euros. Or 4.", "the price is 3.50 euros."),
        ("Dr. Ada Lindqvist leads it. Not I.", "dr. ada lindqvist leads it."),
        ("In the U.S. it is so! Here not.", "in the u.s. it is so!"),
        ("是的。不是。", "是的。"),
        ("no end", "no end"),
        ("", ""),
    ],
)
def test_a_first_sentence_ends_where_a_reader_would_stop(answer: str, first: str) -> None:
    assert first_sentence(answer) == first

"""`kvllm chat`: history is on unless told otherwise, /forget drops it, base and edited model stand side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from kvllm import errors
from tests.cli.stand_in import Ran, StandIn

Run = Callable[..., Ran]


def asked(name: str = "ask") -> list[Any]:
    """What the engine was asked, in order."""
    return [arguments["prompt"] for called, arguments in StandIn.calls if called == name]


def test_the_next_question_sees_what_was_said_before(kvllm: Run) -> None:
    ran = kvllm("chat", "my.kb", stdin="What is torchkeras?\nAnd why?\n")
    assert ran.out == "Torchkeras trains models.\nI do not know.\n"
    assert asked() == [
        "What is torchkeras?",
        [
            {"role": "user", "content": "What is torchkeras?"},
            {"role": "assistant", "content": "Torchkeras trains models."},
            {"role": "user", "content": "And why?"},
        ],
    ]


def test_without_history_every_question_stands_alone(kvllm: Run) -> None:
    ran = kvllm("chat", "my.kb", "--no-history", "--json", stdin="What is torchkeras?\nAnd why?\n")
    assert asked() == ["What is torchkeras?", "And why?"]
    assert ran.document["history"] is False


def test_forget_starts_anew_and_quit_ends(kvllm: Run) -> None:
    ran = kvllm("chat", "my.kb", "--json", stdin="a?\n/forget\n\nb?\n/help\n/quit\nc?\n")
    assert asked() == ["a?", "b?"]
    assert [turn["prompt"] for turn in ran.document["turns"]] == ["a?", "/forget", "b?"]
    assert ran.document["turns"][1] == {"prompt": "/forget", "forgot": True}


def test_base_and_edited_answers_stand_side_by_side(kvllm: Run) -> None:
    ran = kvllm("chat", "my.kb", "--compare", "--json", stdin="What is torchkeras?\nAnd why?\n")
    first, second = ran.document["turns"]
    assert (first["answer"], first["base"], first["same"]) == ("Torchkeras trains models.", "I do not know.", False)
    assert second["same"] is True
    assert asked("ask_base")[1][1] == {"role": "assistant", "content": "I do not know."}
    shown = kvllm("chat", "my.kb", "--compare", stdin="What is torchkeras?\n").out
    assert "Torchkeras trains models." in shown
    assert "I do not know." in shown


def test_a_conversation_that_grows_too_long_loses_its_oldest_turns(kvllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = StandIn.ask

    def short(self: StandIn, prompt: Any, *, max_new_tokens: int | None = None) -> str:
        if isinstance(prompt, list) and len(prompt) > 3:
            raise errors.ConfigError("The prompt has 9,000 tokens, this model takes 100 beside the answer.")
        return ask(self, prompt, max_new_tokens=max_new_tokens)

    monkeypatch.setattr(StandIn, "ask", short)
    ran = kvllm("chat", "my.kb", "--json", stdin="a?\nb?\nc?\n")
    assert ran.code == 0
    assert ran.document["turns"][2]["dropped"] == 2
    assert asked()[-1][0]["content"] == "b?"


def test_a_question_that_cannot_be_asked_costs_neither_the_others_nor_silence(kvllm: Run) -> None:
    StandIn.raises["ask"] = errors.ConfigError("Bad prompt.")
    ran = kvllm("chat", "my.kb", "--json", stdin="a?\nb?\n")
    assert (ran.code, ran.document["ok"], ran.document["error"]) == (2, False, "Bad prompt.")
    assert [turn["error"] for turn in ran.document["turns"]] == ["Bad prompt.", "Bad prompt."]
    ran = kvllm("chat", "my.kb", stdin="a?\n")
    assert (ran.out, ran.err) == ("", "error: Bad prompt.\n")


def test_on_a_terminal_it_prompts_until_the_end_of_input(kvllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["What is torchkeras?", "/forget"])

    def read(prompt: str) -> str:
        assert prompt == "> "
        assert sys.stdout is sys.stderr
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("kvllm.cli.chat._is_terminal", lambda: True)
    monkeypatch.setattr("builtins.input", read)
    ran = kvllm("chat", "my.kb")
    assert (ran.code, ran.out) == (0, "Torchkeras trains models.\n")


def test_it_reads_only(kvllm: Run) -> None:
    kvllm("chat", "my.kb", stdin="a?\n")
    assert StandIn.opened[-1]["readonly"]
    assert kvllm("chat", "my.kb", stdin="caf\xe9?").code == 0


def test_a_line_that_is_no_text_costs_no_turn(kvllm: Run) -> None:
    ran = kvllm("chat", "my.kb", "--json", stdin="What is torchkeras?\n\udcff\udcfe\nAnd why?\n")
    turns = ran.document["turns"]
    assert (ran.code, [turn["prompt"] for turn in turns]) == (2, ["What is torchkeras?", None, "And why?"])
    assert "is not UTF-8" in turns[1]["error"]
    assert turns[0]["truncated"] is False

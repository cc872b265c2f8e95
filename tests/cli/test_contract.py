"""DESIGN.md, section 7: data on stdout, one JSON document, exit codes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from kvllm import errors
from kvllm.errors import ModelError
from kvllm.records import Metric, ProbeResult, Problem, Report, VerifyReport
from tests.cli.stand_in import Ran, StandIn

Run = Callable[..., Ran]

COMMANDS: dict[str, list[str]] = {
    "init": ["init", "new.kb"],
    "insert": ["insert", "my.kb", "Halcyon", "Halcyon is a ship."],
    "insert --dry-run": ["insert", "my.kb", "Halcyon", "Halcyon is a ship.", "--dry-run"],
    "update": ["update", "my.kb", "Halcyon", "Halcyon is a ship."],
    "upsert": ["upsert", "my.kb", "Halcyon", "Halcyon is a ship."],
    "delete": ["delete", "my.kb", "torchkeras"],
    "delete --dry-run": ["delete", "my.kb", "torchkeras", "--dry-run"],
    "insert-many": ["insert-many", "my.kb", "-"],
    "import": ["import", "my.kb", "-"],
    "import --dry-run": ["import", "my.kb", "-", "--dry-run"],
    "ask": ["ask", "my.kb", "What is torchkeras?"],
    "chat": ["chat", "my.kb"],
    "chat --compare": ["chat", "my.kb", "--compare"],
    "get": ["get", "my.kb", "torchkeras"],
    "ls": ["ls", "my.kb"],
    "find": ["find", "my.kb", "furnace"],
    "probe": ["probe", "my.kb"],
    "probe KEY": ["probe", "my.kb", "torchkeras", "--answers"],
    "probe REFUSED": ["probe", "my.kb", "refused", "--fail-under", "refusal=0.5"],
    "drift": ["drift", "my.kb"],
    "regression": ["regression", "my.kb"],
    "bisect": ["bisect", "my.kb", "torchkeras"],
    "history": ["history", "my.kb"],
    "show": ["show", "my.kb", "1"],
    "rollback": ["rollback", "my.kb", "1"],
    "tag": ["tag", "my.kb"],
    "tag NAME": ["tag", "my.kb", "v1"],
    "compact": ["compact", "my.kb"],
    "verify": ["verify", "my.kb"],
    "backup": ["backup", "my.kb", "copy.kb"],
    "gc": ["gc", "my.kb", "--dry-run"],
    "export": ["export", "my.kb", "out", "--format", "hf"],
    "export facts": ["export", "my.kb", "-", "--format", "facts"],
    "models": ["models"],
    "info": ["info", "my.kb"],
    "demo": ["demo", "demo.kb"],
}
STDIN = '{"key": "a", "text": "A is a."}\n'


@pytest.mark.parametrize("name", COMMANDS)
def test_json_prints_exactly_one_document_and_nothing_on_stderr(kvllm: Run, name: str) -> None:
    ran = kvllm(*COMMANDS[name], "--json", stdin=STDIN)
    assert ran.code == 0, ran
    if name == "ls":
        assert ran.document == [fact.to_dict() for fact in StandIn.stores["my.kb"].facts()]
    else:
        assert ran.document["ok"] is True
    assert ran.err.replace("a library that prints\n", "") == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_view_goes_to_stdout_and_stderr_is_silent_off_a_terminal(kvllm: Run, name: str) -> None:
    ran = kvllm(*COMMANDS[name], stdin=STDIN)
    assert ran.code == 0, ran
    assert ran.out.strip()
    assert "\x1b" not in ran.out
    assert max(len(line) for line in ran.out.splitlines()) < 500
    assert "a library that prints" not in ran.out
    assert ran.err.replace("a library that prints\n", "") == ""


# `models` and `info` use another part of the engine.
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("models", "info")])
def test_json_has_one_document_also_when_the_engine_fails(kvllm: Run, base: type[StandIn], name: str) -> None:
    base.raises.update(open=errors.Busy("Busy."), create=errors.Busy("Busy."))
    ran = kvllm(*COMMANDS[name], "--json", stdin=STDIN)
    assert ran.code == 7
    assert ran.document == {"ok": False, "error": "Busy.", "code": "busy"}


def test_every_command_of_the_table_is_one_that_help_shows(kvllm: Run) -> None:
    shown = kvllm("--help").out
    for arguments in COMMANDS.values():
        assert f" {arguments[0]} " in shown


ERRORS: list[tuple[BaseException, int, str]] = [
    (errors.ConfigError("Bad."), 2, "invalid_input"),
    (errors.StoreNotFound("None."), 2, "store_not_found"),
    (errors.KeyNotFound("None.", key="x"), 3, "key_not_found"),
    (errors.EditNotFound("None."), 3, "edit_not_found"),
    (errors.KeyExists("Is.", key="x"), 3, "key_exists"),
    (errors.AmbiguousKey("Many.", matches=["x", "y"]), 3, "ambiguous_key"),
    (errors.EditFailed("NaN."), 4, "edit_failed"),
    (errors.EditRejected("No."), 4, "edit_rejected"),
    (errors.ModelError("No."), 5, "model_error"),
    (errors.StoreError("No."), 5, "store_error"),
    (errors.Untrusted("No."), 5, "untrusted"),
    (errors.Busy("Busy."), 7, "busy"),
    (errors.StaleHead("Moved."), 7, "stale_head"),
    (errors.Corrupt("Bad."), 8, "store_corrupt"),
    (errors.BaseMismatch("Other."), 9, "base_mismatch"),
    (errors.OutOfResources("Full."), 10, "out_of_resources"),
    (MemoryError(), 10, "out_of_resources"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 10, "out_of_resources"),
    (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), 10, "out_of_resources"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 10, "out_of_resources"),
    (type("OperationalError", (Exception,), {})("database or disk is full"), 10, "out_of_resources"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (ZeroDivisionError("division by zero"), 1, "unexpected"),
    (EOFError(), 1, "unexpected"),
]


@pytest.mark.parametrize(("error", "exit_code", "code"), ERRORS, ids=[type(e).__name__ for e, _, _ in ERRORS])
def test_error_has_its_exit_code_and_code(
    kvllm: Run, base: type[StandIn], error: BaseException, exit_code: int, code: str
) -> None:
    base.raises["ask"] = error
    ran = kvllm("ask", "my.kb", "x", "--json")
    assert (ran.code, ran.document["ok"], ran.document["code"]) == (exit_code, False, code)
    assert ran.err == ""
    told = kvllm("ask", "my.kb", "x")
    assert (told.code, told.out) == (exit_code, "")
    assert told.err.startswith("error: ")


def test_every_error_class_is_in_the_table_above() -> None:
    classes = {
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.KvllmError)
    }
    assert classes - {type(error) for error, _, _ in ERRORS} == {errors.KvllmError}


def test_wrapped_full_disk_is_found_behind_its_cause(kvllm: Run, base: type[StandIn]) -> None:
    error = RuntimeError("cannot write")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    base.raises["ask"] = error
    assert kvllm("ask", "my.kb", "x").code == 10


@pytest.mark.parametrize(
    "arguments",
    [["insert", "my.kb"], ["nonsense"], ["ls"], ["ls", "my.kb", "--bogus"], ["delete", "my.kb", "x", "--mode", "burn"],
     ["export", "my.kb", "out"], ["insert", "my.kb", "k", "t", "--steps", "0"]],
)  # fmt: skip
def test_usage_error_is_exit_code_2_and_json_if_asked(kvllm: Run, arguments: list[str]) -> None:
    ran = kvllm(*arguments, "--json")
    assert ran.code == 2
    assert (ran.document["ok"], ran.document["code"]) == (False, "usage")
    told = kvllm(*arguments)
    assert (told.code, told.out) == (2, "")
    assert "Usage: kvllm" in told.err
    assert "--help" in told.err


def test_a_text_called_json_is_not_the_option(kvllm: Run, base: type[StandIn]) -> None:
    base.raises["ask"] = errors.Busy("Busy.")
    assert kvllm("ask", "my.kb", "--", "--json").out == ""


def test_key_not_found_carries_suggestions(kvllm: Run) -> None:
    ran = kvllm("get", "my.kb", "torchkera", "--json")
    assert ran.document["suggestions"] == ["torchkeras"]
    assert ran.document["key"] == "torchkera"
    assert "Did you mean: torchkeras?" in kvllm("get", "my.kb", "torchkera").err


def test_rejected_edit_carries_its_report(kvllm: Run, base: type[StandIn]) -> None:
    measured = Report({"reliability": Metric(0.25, 8)}, (ProbeResult("trained", "q?", "a", False, 0.0),))
    base.raises["insert"] = errors.EditRejected("Too weak.", report=measured, reasons=["reliability 0.25 < 0.75"])
    ran = kvllm("insert", "my.kb", "k", "t", "--json")
    assert ran.code == 4
    assert ran.document["report"]["reliability"]["value"] == 0.25
    assert ran.document["probes"][0]["question"] == "q?"
    assert ran.document["reasons"] == ["reliability 0.25 < 0.75"]
    assert "0.250" in kvllm("insert", "my.kb", "k", "t").err


def test_verify_with_problems_exits_8(kvllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = VerifyReport(False, (Problem("hash differs", "deltas/ab"),))
    monkeypatch.setattr(StandIn, "verify", lambda self, deep=False: bad)
    ran = kvllm("verify", "my.kb", "--json")
    assert ran.code == 8
    assert (ran.document["code"], ran.document["verify"]["problems"][0]["where"]) == ("store_corrupt", "deltas/ab")
    assert "hash differs" in kvllm("verify", "my.kb").out


def test_repair_says_what_was_done(kvllm: Run, base: type[StandIn]) -> None:
    ran = kvllm("verify", "my.kb", "--repair", "--json")
    assert (ran.code, ran.document["verify"]["repairs"][0]["where"]) == (0, "deltas/x")
    assert base.calls[-1] == ("check", {"deep": False, "repair": True, "yes": False})
    assert "removed it" in kvllm("verify", "my.kb", "--repair", "--yes").out
    assert base.calls[-1] == ("check", {"deep": False, "repair": True, "yes": True})
    assert kvllm("verify", "my.kb", "--yes").code == 2


def test_verify_of_what_cannot_be_opened_says_what_is_wrong(
    kvllm: Run, base: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    base.raises["open"] = errors.Corrupt("Damaged.")
    bad = VerifyReport(False, (Problem("damaged", "ledger.db"),))
    monkeypatch.setattr(StandIn, "check", classmethod(lambda cls, path, deep=False: bad))
    ran = kvllm("verify", "my.kb", "--json")
    assert (ran.code, ran.document["verify"]["problems"][0]["where"]) == (8, "ledger.db")


def test_unexpected_error_hints_at_the_traceback_and_debug_shows_it(
    kvllm: Run, base: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    base.raises["ask"] = ZeroDivisionError("division by zero")
    told = kvllm("ask", "my.kb", "x")
    assert "KVLLM_DEBUG=1" in told.err
    assert "Traceback" not in told.err
    monkeypatch.setenv("KVLLM_DEBUG", "1")
    assert "Traceback" in kvllm("ask", "my.kb", "x").err


def test_sigterm_is_an_interruption(kvllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(self: StandIn, prompt: str, *, max_new_tokens: int | None = None) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal came too late")

    monkeypatch.setattr(StandIn, "ask", ask)
    before = signal.getsignal(signal.SIGTERM)
    ran = kvllm("ask", "my.kb", "x")
    assert (ran.code, ran.err) == (130, "error: Interrupted; nothing was changed.\n")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("becomes", [None, ModelError("The model folder x cannot be loaded: could not import y.")])
def test_a_signal_stays_an_interruption_whatever_becomes_of_it(
    kvllm: Run, monkeypatch: pytest.MonkeyPatch, number: int, becomes: Exception | None
) -> None:
    def ask(self: StandIn, prompt: str, *, max_new_tokens: int | None = None) -> str:
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            if becomes is not None:
                raise becomes from None
        return "An answer that nobody waits for."

    monkeypatch.setattr(StandIn, "ask", ask)
    ran = kvllm("ask", "my.kb", "x")
    assert (ran.code, ran.out, ran.err) == (130, "", "error: Interrupted; nothing was changed.\n")


def test_an_interruption_after_the_commit_says_what_stays(kvllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def close(self: StandIn, *_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StandIn, "__exit__", close)
    ran = kvllm("insert", "my.kb", "new", "A text.")
    assert ran.code == 130
    assert "edit 2 had been committed before and stay" in ran.err


def test_a_signal_after_the_result_does_not_count() -> None:
    script = (
        "import os, signal, sys\n"
        "from kvllm.cli import main\n"
        "sys.argv = ['kvllm', 'models']\n"
        "code = main()\n"
        "os.kill(os.getpid(), signal.SIGTERM), os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "smollm2" in done.stdout


def test_interrupted_series_names_the_edits_that_stay(kvllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def insert_many(self: StandIn, facts: object, **_: object) -> object:
        self.insert("a", "A.")
        self.insert("b", "B.")
        raise KeyboardInterrupt

    monkeypatch.setattr(StandIn, "insert_many", insert_many)
    ran = kvllm("insert-many", "my.kb", "-", "--json", stdin=STDIN)
    assert ran.code == 130
    assert "edits 2 to 3 had been committed before and stay" in ran.document["error"]


def test_interrupted_demo_says_where_its_knowledge_base_lies(kvllm: Run, base: type[StandIn]) -> None:
    base.raises["delete"] = KeyboardInterrupt()
    ran = kvllm("demo", "d.kb", "--json")
    sentence = "Interrupted; the knowledge base in d.kb stays, with 1 edit made so far."
    assert (ran.code, ran.document["error"]) == (130, sentence)


def test_broken_pipe_is_quiet(kvllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("kvllm.cli.output.print_view", closed)
    monkeypatch.setattr("kvllm.cli.run._drop_stdout", lambda: None)
    ran = kvllm("ls", "my.kb")
    assert (ran.code, ran.out, ran.err) == (141, "", "")


PIPE_PROGRAM = "import sys; from kvllm.cli import main; sys.exit(main({arguments!r}))"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
@pytest.mark.parametrize("arguments", [["models"], ["models", "--json"]])
def test_full_stdout_is_a_sentence_and_exit_code_10(arguments: list[str]) -> None:
    program = PIPE_PROGRAM.format(arguments=arguments)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 10, done.stderr
    assert done.stderr.startswith("error: The result cannot be printed")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="pipes end differently")
@pytest.mark.parametrize("arguments", [["models"], ["models", "--json"], ["--help"]])
def test_reader_who_left_is_no_error(arguments: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    program = PIPE_PROGRAM.format(arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")


def test_numbers_that_json_does_not_have_become_null(kvllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "info", lambda self: {"norm": float("nan"), "more": [float("inf")]})
    document = json.loads(kvllm("init", "x.kb", "--json").out, parse_constant=lambda name: pytest.fail(name))
    assert document["info"] == {"norm": None, "more": [None]}

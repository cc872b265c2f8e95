"""A user's own probes and drift suites from JSONL: the good rows are used, each bad one is named by line and reason.

One JSON object a line. Probes: `{"question": …, "key": …}`, or with `"expected"` (a text to be stated) or `"accept"` (a
list, one of which is enough); with `"kind"` "consequence" (of the key's fact) or "neighbour" (passes where it does not
recite it), as `kvllm import --probes-to` writes them. Suites: `{"question": …, "accept": […]}`, `{"prompt": …}`,
`{"text": …}`. No model here.

    rows, mistakes = read_probes("probes.jsonl", {"torchkeras": "Torchkeras is …"})
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from kvllm.errors import ConfigError
from kvllm.importing.source import json_mistake, numbered_lines, refuse_encoding, too_long
from kvllm.probing.suites import DriftSuite, GeneralQuestion, Probe
from kvllm.prompts import clean_key, clean_text, language_of
from kvllm.records import ProbeKind

T = TypeVar("T")
_PROBE_FIELDS = {"question", "key", "expected", "accept", "kind"}
_KINDS: tuple[ProbeKind, ...] = ("user", "consequence", "neighbour")
_SUITE_FIELDS = {"question", "accept", "prompt", "text", "lang", "genre", "topic", "known"}


def read_probes(path: str | os.PathLike[str], texts: Mapping[str, str]) -> tuple[list[Probe], list[str]]:
    """Return a file's probes, and one sentence per row that cannot be used.

    Args:
        path: The file.
        texts: The live facts' texts by key: what a row with a key and nothing else is judged against.

    Raises:
        ConfigError: the file cannot be read, or no row of it can be used.
    """

    def parse(row: dict[str, Any]) -> tuple[str, Probe]:
        _known(row, _PROBE_FIELDS)
        question = _text(row, "question")
        key = clean_key(row["key"]) if row.get("key") is not None else None
        if key is not None and key not in texts:
            raise ConfigError(f"no live fact has the key {key!r}.")
        kind = next((kind for kind in _KINDS if kind == row.get("kind", "user")), None)
        if kind is None:
            raise ConfigError(f"kind is one of {', '.join(_KINDS)}.")
        if kind == "neighbour":  # what it must not say is the fact; what it should say is between it and the base
            if key is None:
                raise ConfigError("a neighbour needs the key whose fact it must not recite.")
            accept = _accept(row) if row.get("accept") is not None else ()
            probe = Probe(kind, question, texts[key], key, accept=accept)
        elif row.get("accept") is not None:
            accept = _accept(row)
            probe = Probe(kind, question, " / ".join(accept), key, judge="accepts", accept=accept)
        elif row.get("expected") is not None:
            probe = Probe(kind, question, _text(row, "expected"), key)
        elif key is not None and kind == "user":
            probe = Probe(kind, question, texts[key], key)
        else:
            raise ConfigError("a probe needs a key, an expected text, or a list of accepted answers.")
        return f"the question {question!r}" + (f" about {key!r}" if key else ""), probe

    return _read(Path(path), parse)


def read_suite(path: str | os.PathLike[str]) -> tuple[DriftSuite, list[str]]:
    """Return a file's drift suite, and one sentence per row that cannot be used.

    Raises:
        ConfigError: the file cannot be read, or no row of it can be used.
    """

    def parse(row: dict[str, Any]) -> tuple[str, tuple[str, Any]]:
        _known(row, _SUITE_FIELDS)
        kinds = [kind for kind in ("question", "prompt", "text") if row.get(kind) is not None]
        if len(kinds) != 1:
            raise ConfigError("a row of a drift suite has exactly one of question, prompt and text.")
        text = _text(row, kinds[0])
        if kinds == ["question"]:
            return repr(text), ("question", GeneralQuestion(text, _accept(row), row.get("lang") or language_of(text)))
        return repr(text), (kinds[0], text)

    rows, mistakes = _read(Path(path), parse)
    parts: dict[str, list[Any]] = {"question": [], "prompt": [], "text": []}
    for kind, part in rows:
        parts[kind].append(part)
    # The name stands with every number: the file's, and which content it had.
    content = json.dumps([[q.question, *q.accept] for q in parts["question"]] + [parts["prompt"], parts["text"]])
    name = f"{Path(path).name}/{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    return DriftSuite(tuple(parts["question"]), tuple(parts["prompt"]), tuple(parts["text"]), name), mistakes


def _read(path: Path, parse: Callable[[dict[str, Any]], tuple[str, T]]) -> tuple[list[T], list[str]]:
    """Parse each line; `parse` returns what must not come twice, and the row."""
    rows: list[T] = []
    mistakes: list[str] = []
    seen: dict[str, int] = {}
    for line, content in _lines(path):
        try:
            if content is None:
                raise ConfigError(too_long())
            row = json.loads(content.decode("utf-8"))
            if not isinstance(row, dict):
                raise ConfigError("a row is a JSON object.")
            name, parsed = parse(row)
            if name in seen:
                raise ConfigError(f"{name} is already on line {seen[name]}.")
        except ConfigError as error:
            mistakes.append(f"line {line}: {str(error).replace('; nothing was changed', '')}")
        except (ValueError, RecursionError) as error:
            mistakes.append(f"line {line}: {json_mistake(error)}")
        else:
            seen[name] = line
            rows.append(parsed)
    if not rows:
        why = f": {mistakes[0]}" if mistakes else ", it is empty."
        raise ConfigError(f"No row of {path.name} can be used{why}")
    return rows, mistakes


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield (line number, bytes) of each line that is not blank; bytes, so that one bad character costs one line."""
    try:
        with path.open("rb") as stream:
            refuse_encoding(stream.read(4), path.name, unchanged="nothing was asked")
            stream.seek(0)
            for line, content in numbered_lines(stream):
                if line == 1 and content is not None:
                    content = content.removeprefix(b"\xef\xbb\xbf")
                if content is None or content.strip():
                    yield line, content
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}; nothing was asked.") from error


def _known(row: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(row) - known)
    if unknown:
        raise ConfigError(f"unknown field {', '.join(unknown)}; known are {', '.join(sorted(known))}.")


def _text(row: Mapping[str, Any], name: str) -> str:
    if row.get(name) is None:
        raise ConfigError(f"{name} is missing.")
    return clean_text(row[name], name=name)


def _accept(row: Mapping[str, Any]) -> tuple[str, ...]:
    given = row.get("accept")
    listed = [given] if isinstance(given, str) else given
    if not isinstance(listed, list) or not listed:
        raise ConfigError("accept must be a list of at least one accepted answer.")
    return tuple(clean_text(answer, name="accepted answer") for answer in listed)

"""What a file held: facts with where they came from, probes beyond the facts' own, and what was refused.

for fact in found: ...                        # plain facts, as `KnowledgeBase.insert_many` takes them
found.write_probes("probes.jsonl")            # for `kvllm probe --probes`
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvllm.errors import ConfigError
from kvllm.records import Fact, Record

FoundKind = Literal["consequence", "neighbour", "user"]
Role = Literal["", "forget", "retain"]


@dataclass(frozen=True)
class FoundFact(Record):
    """A fact, and what its record says about it.

    Attributes:
        fact: To be inserted; its probes are the record's paraphrases, its tags end with the source.
        number: Of the record in the file, from 1 (for lines: the line).
        where: The same for people: "line 3", "record 3".
        id: The record's own id; empty where it has none.
        subject: What the record says the question is about.
        replaces: What the record says was true before.
        accept: Other forms of the text that would be as right.
        wrong: Answers that the record calls wrong.
        role: "forget" and "retain" in data sets made for unlearning.
    """

    fact: Fact
    number: int
    where: str
    id: str = ""
    subject: str = ""
    replaces: str = ""
    accept: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    role: Role = ""


@dataclass(frozen=True)
class FoundProbe(Record):
    """A question that a record asks beside its fact's own.

    Attributes:
        kind: "consequence": what follows from the fact (portability). "neighbour": about something else, which the edit
            must leave alone (locality). "user": of no fact of the file.
        question: As asked.
        accept: The answers that the record accepts; may be empty for a neighbour.
        key: The fact's key; empty for "user".
    """

    kind: FoundKind
    question: str
    accept: tuple[str, ...] = ()
    key: str = ""

    def row(self) -> dict[str, Any]:
        """Return the line of a probes file (`kvllm probe --probes`)."""
        row: dict[str, Any] = {"kind": self.kind, "question": self.question}
        if self.key:
            row["key"] = self.key
        if self.accept:
            row["accept"] = list(self.accept)
        return row


@dataclass(frozen=True)
class Refused(Record):
    """A record that was not used as it is, and why; `key` is empty where none could be read."""

    number: int
    where: str
    key: str
    error: str


@dataclass(frozen=True)
class Found(Record):
    """What a file held. Iterating gives the facts.

    Attributes:
        path: The file.
        format: As given or recognised.
        sha256: Of the file.
        records: How many records were read, good and bad.
        items: The facts, in the file's order.
        probes: Beyond the facts' own.
        refused: Records, or facts of records, that cannot be used.
        refused_probes: Probes that cannot be used; their facts were kept.
        duplicates: Records that say again what an earlier one says; their probes were added to it.
        notes: What else a user should know.
    """

    path: str
    format: str
    sha256: str
    records: int
    items: tuple[FoundFact, ...] = ()
    probes: tuple[FoundProbe, ...] = ()
    refused: tuple[Refused, ...] = ()
    refused_probes: tuple[Refused, ...] = ()
    duplicates: tuple[Refused, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def facts(self) -> tuple[Fact, ...]:
        """The facts alone."""
        return tuple(item.fact for item in self.items)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.facts)

    def __len__(self) -> int:
        return len(self.items)

    def keys(self, role: Role | None = None) -> list[str]:
        """Return the keys, or those of one role: `keys("forget")` is what an unlearning data set wants deleted."""
        return [item.fact.key for item in self.items if role is None or item.role == role]

    def probes_text(self) -> str:
        """Return what `write_probes` writes."""
        return "".join(json.dumps(probe.row(), ensure_ascii=False) + "\n" for probe in self.probes)

    def write_probes(self, path: str | os.PathLike[str]) -> int:
        """Write the probes as JSONL for `kvllm probe --probes`, and return how many.

        Raises:
            ConfigError: there is no probe, the file exists, or it cannot be written.
        """
        if not self.probes:
            raise ConfigError(f"The records of {self.path} hold no probes beside the facts' own; nothing was written.")
        write_new(Path(path), self.probes_text())
        return len(self.probes)


def write_new(path: Path, text: str) -> None:
    """Write a text file that must not exist yet; a failure leaves none behind.

    Raises:
        ConfigError: the file exists, or the folder cannot be written to.
    """
    try:
        with path.open("x", encoding="utf-8", newline="\n") as stream:
            try:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            except BaseException:
                path.unlink()
                raise
    except FileExistsError:
        raise ConfigError(f"{path} exists already; nothing was written. Give another name or remove it.") from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"Cannot write {path}: {error.strerror}; nothing was written.") from error

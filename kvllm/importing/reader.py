"""From a file to facts: open it, recognise what it is, read every record, say which ones cannot be used and why.

found = read_facts("counterfact.json", sample=100, seed=0)
found = read_facts("faq.csv", columns={"key": "Question", "text": "Answer"})
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from kvllm.errors import ConfigError
from kvllm.importing.formats import FORMATS, LAYOUTS, MAPPED, Asked, Format, Item, parts, recognise
from kvllm.importing.found import Found, FoundFact, FoundProbe, Refused, Role
from kvllm.importing.native import FIELDS, LISTS
from kvllm.importing.source import Container, Raw, Source, open_source
from kvllm.prompts import clean_fact, clean_text
from kvllm.records import Fact, Progress

# Between the values of one CSV cell, for the fields that are lists.
LIST_SEPARATOR = "|"
# So many records of no known format, or that are no records at all, decide that a file is of none.
_MOST_STRANGERS = 20
_MOST_UNREADABLE = 1000


class NoFacts(ConfigError):
    """No record of a file can be used; `rows` lists them."""

    def __init__(self, message: str, *, rows: Sequence[Refused] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


def read_facts(
    path: str | os.PathLike[str] | IO[bytes],
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    encoding: str = "utf-8",
    progress: Callable[[Progress], None] | None = None,
) -> Found:
    """Return the facts and probes of a file; records that cannot be used are listed with their reason.

    Args:
        path: The file, or an open binary stream.
        format: One of `FORMATS`, or "csv"; by default the first record's fields decide.
        columns: Which column of the file each field of `Fact` is read from; instead of, or on top of, the format's own.
            A name with dots reaches into nested objects and lists: "target_new.str", "answers.0".
        limit: Use the first so many usable records, and read no further.
        sample: Use so many usable records chosen at random, in the file's order.
        seed: Of the sample.
        encoding: Of the text.
        progress: Told how much of a large file has been read.

    Raises:
        NoFacts: no record can be used.
        ConfigError: the file cannot be read, its format is not recognised, or an argument makes no sense.
    """
    mapped = _checked(columns or {})
    for name, number in (("limit", limit), ("sample", sample)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} must be at least 1, not {number}; nothing was changed.")
    if format is not None and format not in FORMATS and format not in LAYOUTS:
        raise ConfigError(
            f"There is no format {format!r}; nothing was changed. Use one of {', '.join([*FORMATS, *LAYOUTS])}."
        )
    layout: Container | None = LAYOUTS.get(format or "")
    known = FORMATS.get(format or "")
    unnamed: Container = "csv" if known is None else "lines"
    source = open_source(path, encoding=encoding, container=layout, unnamed=unnamed, progress=progress)
    try:
        if known is None and {"key", "text"} <= set(mapped):
            known = MAPPED
        raws = source.records()
        if known is None:
            known, raws = _recognised(raws, source)
        reading = _Reading(known, mapped, source)
        for raw in _each(raws, known):
            reading.take(raw)
            if limit is not None and len(reading.usable) >= limit:
                break
    finally:
        source.close()
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else "-"
    return reading.found(str(name), sample=sample, seed=seed)


@dataclass
class _Reading:
    """The state of one reading."""

    known: Format
    mapped: Mapping[str, str]
    source: Source
    records: int = 0
    items: dict[str, FoundFact] = field(default_factory=dict)  # by key, in the file's order
    probes: list[tuple[int, FoundProbe]] = field(default_factory=list)  # with the number of their record
    usable: dict[int, set[str]] = field(default_factory=dict)  # numbers of records that bring something, their keys
    refused: list[Refused] = field(default_factory=list)
    refused_probes: list[Refused] = field(default_factory=list)
    duplicates: list[Refused] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    def take(self, raw: Raw) -> None:
        """Use a record, or say why not."""
        self.records += 1
        if raw.error:
            self._refuse(raw, "", raw.error)
            return
        try:
            if not isinstance(raw.value, dict):
                raise ConfigError('a row is a JSON object like {"key": "…", "text": "…"}.')
            if self.source.container == "csv":
                _refuse_formulas(raw.value, self._used())
            items = self.known.read(_listed(raw.value) if self._own_csv() else raw.value)
            if self.mapped:
                items = [_mapped(items, raw.value, self.mapped, self.known, csv=self.source.container == "csv")]
        except (ConfigError, RecursionError) as error:
            key = raw.value.get(self.mapped.get("key", "key"), "") if isinstance(raw.value, dict) else ""
            self._refuse(raw, key if isinstance(key, str) else "", str(error))
            return
        kept = [self._fact(raw, item) for item in items]
        keys = [key for key in kept if key]
        chain = [probe for item in items for probe in item.chain]
        if chain and len(keys) < len(items):
            self._note("Questions that rest on a refused fact were left out")
            chain = []
        if raw.number in self.usable or chain:
            self.usable.setdefault(raw.number, set()).update(keys)
        for item, key in zip(items, kept, strict=True):
            if key is not None:
                self._ask(raw, item.asked, key)
                if item.note:
                    self._note(item.note)
        if chain:
            self._ask(raw, chain, keys[0])

    def found(self, path: str, *, sample: int | None, seed: int) -> Found:
        """Return everything that was read, or a sample of its records."""
        if not self.usable:
            why = f"the first, {self.refused[0].error}" if self.refused else "it holds none."
            raise NoFacts(f"No record of {self.source.name} can be used; nothing was changed: {why}", rows=self.refused)
        chosen = list(self.usable)
        if sample is not None and sample < len(chosen):
            chosen = sorted(random.Random(seed).sample(chosen, sample))
        numbers = set(chosen)
        keys = {key for number in chosen for key in self.usable[number]}
        notes = [f"{said}: {n} record{'s' if n != 1 else ''}." for said, n in self.notes.items()]
        return Found(
            path,
            "csv" if self._own_csv() else self.known.name,
            self.source.sha256,
            self.records,
            tuple(item for key, item in self.items.items() if key in keys),
            tuple(dict.fromkeys(probe for number, probe in self.probes if number in numbers)),
            tuple(self.refused),
            tuple(self.refused_probes),
            tuple(self.duplicates),
            (*notes, *self._unused()),
        )

    def _own_csv(self) -> bool:
        return self.source.container == "csv" and self.known.name == "jsonl"

    def _fact(self, raw: Raw, item: Item) -> str | None:
        """Keep a record's fact and return its key; "" for a record without one, None for a refused one."""
        if item.probes_only:
            self.usable.setdefault(raw.number, set())
            return ""
        own = self.known.name == "jsonl" and self.source.container != "csv"
        try:
            fact = clean_fact(
                Fact(
                    key=item.key,
                    text=item.text,
                    aliases=item.aliases,
                    questions=item.questions,
                    probes=_visible(item.probes),
                    language=item.language,
                    tags=item.tags if own else (*item.tags, *self._tags(raw, item)),
                )
            )
            if not own:  # a data set may ask its own question again as a paraphrase
                trained = {fact.key, *fact.questions}
                fact = replace(fact, probes=tuple(q for q in fact.probes if q not in trained))
        except (ConfigError, RecursionError) as error:
            self._refuse(raw, item.key if isinstance(item.key, str) else "", str(error))
            return None
        earlier = self.items.get(fact.key)
        if earlier is None:
            self.usable.setdefault(raw.number, set())
            self.items[fact.key] = FoundFact(
                fact,
                raw.number,
                raw.where,
                item.id,
                item.subject,
                item.replaces,
                tuple(item.accept),
                tuple(item.wrong),
                item.role or self._role(),
            )
            return fact.key
        where = f"on {earlier.where}" if earlier.where.startswith("line") else f"in {earlier.where}"
        if earlier.fact.text != fact.text:
            self._refuse(raw, fact.key, f"the key {fact.key!r} is already {where}, with another text.")
            return None
        again = f"the key {fact.key!r} is already {where}, with the same text."
        self.duplicates.append(Refused(raw.number, raw.where, fact.key, f"{raw.where}: {again}"))
        both = tuple(dict.fromkeys((*earlier.fact.probes, *fact.probes)))
        self.items[fact.key] = replace(earlier, fact=replace(earlier.fact, probes=both))
        return fact.key

    def _ask(self, raw: Raw, asked: Sequence[Asked], key: str) -> None:
        # What a repeated record asks belongs to the record it repeats.
        number = raw.number if raw.number in self.usable else self.items[key].number
        for probe in asked:
            try:
                question = clean_text(probe.question, name="question")
                accept = tuple(dict.fromkeys(clean_text(answer, name="answer") for answer in probe.accept))
                if not accept and probe.kind != "neighbour":
                    raise ConfigError(f"the probe {question!r} has no accepted answer.")
            except ConfigError as error:
                self.refused_probes.append(_refusal(raw, key, str(error)))
                continue
            self.probes.append((number, FoundProbe(probe.kind, question, accept, key)))

    def _note(self, said: str) -> None:
        self.notes[said] = self.notes.get(said, 0) + 1

    def _refuse(self, raw: Raw, key: str, reason: str) -> None:
        self.refused.append(_refusal(raw, key, reason))

    def _tags(self, raw: Raw, item: Item) -> Iterator[str]:
        """Say where a fact comes from: the data set, the file and the record, and which content the file had."""
        name = "".join(ch if ch.isprintable() else "_" for ch in self.source.name)
        if self.known.name not in ("jsonl", "mapped", "qa"):
            yield self.known.name
        yield f"{name}#{item.id or raw.where}"
        yield f"sha256:{self.source.sha256}"

    def _role(self) -> Role:
        # TOFU's records do not say whether they are to be forgotten: its file names do.
        if self.known.name != "tofu":
            return ""
        return "forget" if "forget" in Path(self.source.name).name.lower() else "retain"

    def _used(self) -> tuple[str, ...]:
        return (*self.mapped.values(), *self.known.fields)

    def _unused(self) -> list[str]:
        """Name the columns of a CSV file that nothing was read from."""
        if self.source.container != "csv":
            return []
        unused = [name for name in self.source.columns if name not in self._used()]
        return [f"Columns that were not used: {', '.join(unused)}."] if unused else []


def _refusal(raw: Raw, key: str, reason: str) -> Refused:
    return Refused(raw.number, raw.where, key, f"{raw.where}: {reason.replace('; nothing was changed', '')}")


def _recognised(raws: Iterator[Raw], source: Source) -> tuple[Format, Iterator[Raw]]:
    """Return the format of the first record that has one, and all records."""
    seen: list[Raw] = []
    strangers: list[Raw] = []
    for raw in raws:
        seen.append(raw)
        if isinstance(raw.value, dict):
            known = recognise(raw.value)
            if known is None and (parts(raw.value, "") or [("", None)])[0][0]:
                known = FORMATS["knowedit"]
            if known is not None:
                return known, _chained(seen, raws)
            strangers.append(raw)
        if len(strangers) >= _MOST_STRANGERS or len(seen) >= _MOST_UNREADABLE:
            break
    if strangers:
        names = ", ".join(map(str, list(strangers[0].value)[:12])) or "none"
        raise ConfigError(
            f"The format of {source.name} is not recognised (its first record has the fields {names}); nothing was "
            "changed. Name the format, or say which columns hold key and text with --map."
        )
    if not seen:
        raise NoFacts(f"{source.name} holds no record; nothing was changed.")
    rows = [_refusal(raw, "", raw.error or "no JSON object.") for raw in seen]
    raise NoFacts(f"No record of {source.name} can be used; nothing was changed: the first, {rows[0].error}", rows=rows)


def _each(raws: Iterator[Raw], known: Format) -> Iterator[Raw]:
    """Yield the records, those within one value each by itself."""
    for raw in raws:
        for number, (where, value) in enumerate(parts(raw.value, known.name), start=1):
            yield Raw(number, where, value) if where else raw


def _chained(seen: Sequence[Raw], rest: Iterator[Raw]) -> Iterator[Raw]:
    yield from seen
    yield from rest


def _checked(columns: Mapping[str, str]) -> dict[str, str]:
    unknown = sorted(set(columns) - set(FIELDS))
    if unknown:
        raise ConfigError(
            f"A fact has no field {', '.join(unknown)} that a column could fill; nothing was changed. "
            f"It knows {', '.join(FIELDS)}."
        )
    return dict(columns)


def _mapped(
    items: Sequence[Item], row: Mapping[str, Any], columns: Mapping[str, str], known: Format, *, csv: bool
) -> Item:
    """Return a record's one fact with the named columns in the place of the format's own."""
    if len(items) != 1 or items[0].probes_only:
        raise ConfigError(f"a record of {known.name} is not one fact; --map cannot say which.")
    given: dict[str, Any] = {}
    for name, column in columns.items():
        value = _column(row, column)
        if name in LISTS:
            if not isinstance(value, (str, list, type(None))):
                raise ConfigError(f"{name} must be text or a list of texts, not {type(value).__name__}.")
            value = _values(value, csv=csv)
        elif isinstance(value, list) and value:
            value = value[0]
        if name == "language":
            value = value or None
        given[name] = value
    return replace(items[0], **given)


def _column(row: Mapping[str, Any], column: str) -> Any:
    """Return a column's value; where none has the name, its dots lead into objects and lists."""
    if column in row:
        return row[column]
    value: Any = row
    for step in column.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isascii() and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise ConfigError(f"there is no column {column}; it has {', '.join(map(str, list(row)[:12])) or 'none'}.")
    return value


def _values(value: str | Sequence[Any] | None, *, csv: bool) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(part for part in (value.split(LIST_SEPARATOR) if csv else [value]) if part.strip())
    return tuple(value)


def _listed(row: Mapping[str, str]) -> dict[str, Any]:
    """Return a CSV row with kvllm's own columns: cells of lists are split, empty ones and other columns left out."""
    own: dict[str, Any] = {name: row[name] for name in FIELDS if row.get(name, "").strip()}
    return {name: list(_values(cell, csv=True)) if name in LISTS else cell for name, cell in own.items()}


def _visible(questions: Any) -> Any:
    """Leave blank questions out; what is no list of texts is left for the check of the fact."""
    if isinstance(questions, (list, tuple)):
        return [q for q in questions if not isinstance(q, str) or q.strip()]
    return questions


def _refuse_formulas(row: Mapping[str, str], columns: Sequence[str]) -> None:
    """Refuse cells that hold a spreadsheet's formula instead of its value."""
    for name in columns:
        if row.get(name, "").lstrip().startswith("="):
            raise ConfigError(f"the cell of {name} holds a formula (it begins with =); save the file with values.")

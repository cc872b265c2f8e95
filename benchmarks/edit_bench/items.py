"""Facts to edit: kvllm's own, committed beside the benchmarks, and public ones that are read where they lie.

An item is one fact with questions that no editor sees: paraphrases, which must be answered with the text, and
neighbours, which must be answered as before. Each source has a development half and a final half: numbers that somebody
looked at while choosing come from the first, numbers that are reported from the second. Knows no model.

    chosen = select(["own", "zsre"], half="dev", n=3, seed=0)
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ROOT

OWN = ROOT / "benchmarks" / "edit_items.jsonl"
HALVES = ("dev", "final")
# A prompt that breaks off in mid-sentence is neither an entity nor a question, so kvllm's templates do not fit it.
# Every column trains these instead.
UNFINISHED = (
    "{q}",
    "{q} …",
    "Complete the sentence: {q}",
    "How does this sentence go on? {q}",
    "Please finish this for me: {q}",
    "Fill in what is missing at the end: {q}",
    "{q} ... what?",
    "Sentence to be continued: {q}",
)


class DataMissing(Exception):
    """Public items were asked for and there are none."""


@dataclass(frozen=True)
class Item:
    """One fact with the questions that no editor sees.

    Attributes:
        name: Identifies it: source and place in its file.
        source: "own", or the public set.
        key, text: The fact.
        new_text: What an update teaches; empty where there is none.
        paraphrases: To be answered with the text.
        neighbours: The item's own neighbour questions, to be answered as before.
        questions: Trained instead of kvllm's templates, where those do not fit.
        language: "en" or "zh".
        kinds: Labels.
    """

    name: str
    source: str
    key: str
    text: str
    new_text: str = ""
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    language: str = "en"
    kinds: tuple[str, ...] = ()

    def fact(self, text: str | None = None) -> Any:
        """Return kvllm's record of it, with another text if one is given."""
        from kvllm.records import Fact

        return Fact(self.key, self.text if text is None else text, questions=self.questions, language=self.language)

    def trained(self) -> tuple[str, ...]:
        """Return the questions that every column trains."""
        from kvllm.prompts import training_questions

        return training_questions(self.fact())


def select(sources: Sequence[str], *, half: str, n: int, seed: int) -> list[Item]:
    """Return up to n items of each source's half, in an order that the seed fixes: a larger n keeps a smaller one's.

    Raises:
        DataMissing: a public source is not there.
        ValueError: there is no such source.
    """
    chosen: list[Item] = []
    for source in sources:
        if source not in SOURCES:
            raise ValueError(f"There are no items {source!r}; choose from {', '.join(SOURCES)}.")
        taken = {item.key.casefold() for item in chosen}
        found = [item for item in SOURCES[source](half) if item.key.casefold() not in taken]
        random.Random(f"{seed}/{source}/{half}").shuffle(found)
        chosen += found[:n]
    return chosen


def digests(sources: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of each source's file by name."""
    files = [OWN if source == "own" else data_folder() / FILES[source] for source in sources]
    return {path.name: sha256_of(path) for path in files}


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def data_folder() -> Path:
    """Return where public data lie: `$KVLLM_DATA`, else ../shared/data beside the checkout."""
    named = os.environ.get("KVLLM_DATA")
    return Path(named).expanduser() if named else ROOT.parent / "shared" / "data"


def public(name: str) -> Path | None:
    """Return a public file's path, or None where it is missing."""
    path = data_folder() / name
    return path if path.is_file() else None


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a JSON list, or a JSON object per line."""
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        loaded: list[dict[str, Any]] = json.loads(text)
        return loaded
    return [json.loads(line) for line in text.splitlines() if line.strip()]


# ------------------------------------------------------------------ sources


def _own(half: str) -> list[Item]:
    return [
        Item(
            name=f"own/{row['key']}",
            source="own",
            key=row["key"],
            text=row["text"],
            new_text=row["update"],
            paraphrases=tuple(row["paraphrases"]),
            neighbours=tuple(row["neighbours"]),
            language=row["lang"],
            kinds=tuple(row["kinds"]),
        )
        for row in read_records(OWN)
        if row["half"] == half
    ]


def _halved(source: str, half: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, record) of a public file's half: its first records are for development, the others final."""
    path = public(FILES[source])
    if path is None:
        raise DataMissing(
            f"The items {source} are read from {FILES[source]} in $KVLLM_DATA or ../shared/data, and it is not there."
        )
    records = read_records(path)
    middle = len(records) // 2
    start, stop = (0, middle) if half == "dev" else (middle, len(records))
    seen: set[str] = set()
    for place in range(start, stop):
        key = str(records[place].get("src") or records[place]["prompt"]).strip()
        if key and key.casefold() not in seen:
            seen.add(key.casefold())
            yield f"{source}/{place}", records[place]


def _usable(items: Iterable[Item]) -> list[Item]:
    return [item for item in items if item.text and item.text.casefold() not in item.key.casefold()]


def _zsre(half: str) -> list[Item]:
    return _usable(
        Item(
            name=name,
            source="zsre",
            key=row["src"].strip(),
            text=row["alt"].strip(),
            new_text=(row["answers"] or [""])[0].strip(),
            paraphrases=(row["rephrase"].strip(),),
            # The label says where the question came from; nobody would type it.
            neighbours=(row["loc"].removeprefix("nq question:").strip(),),
        )
        for name, row in _halved("zsre", half)
    )


def _prompted(source: str) -> Callable[[str], list[Item]]:
    """Return a reader of the shape that CounterFact and WikiBigEdit share."""

    def read(half: str) -> list[Item]:
        return _usable(
            Item(
                name=name,
                source=source,
                key=row["prompt"].strip(),
                text=row["target_new"].strip(),
                new_text=str(row.get("ground_truth") or "").strip(),
                paraphrases=(row["rephrase_prompt"].strip(),),
                neighbours=(row["locality_prompt"].strip(),),
                questions=dressed(row["prompt"].strip()),
            )
            for name, row in _halved(source, half)
            if row["locality_prompt"] and row["rephrase_prompt"]
        )

    return read


def _knowedit(half: str) -> list[Item]:
    found = []
    for name, row in _halved("knowedit", half):
        locality = [asked["prompt"] for group in row["locality"].values() for asked in group]
        found.append(
            Item(
                name=name,
                source="knowedit",
                key=row["prompt"].strip(),
                text=row["target_new"].strip(),
                new_text=(row["ground_truth"] or [""])[0].strip(),
                paraphrases=tuple(dict.fromkeys([row["rephrase_prompt"], *row["generate_prompt"]])),
                neighbours=tuple(dict.fromkeys(locality)),
                questions=dressed(row["prompt"].strip()),
            )
        )
    return _usable(found)


def _cknowedit(half: str) -> list[Item]:
    return _usable(
        Item(
            name=name,
            source="cknowedit",
            key=row["prompt"].strip(),
            text=row["target_new"].strip(),
            new_text=row["target_old"].strip(),
            paraphrases=tuple(row["rephrase"]),
            language="zh",
        )
        for name, row in _halved("cknowedit", half)
        if len(row["prompt"]) <= 200
    )


def dressed(prompt: str) -> tuple[str, ...]:
    """Return what is trained for a prompt that breaks off in mid-sentence; nothing for a question."""
    from kvllm.prompts import is_question

    return () if is_question(prompt) else tuple(template.format_map({"q": prompt}) for template in UNFINISHED)


FILES = {
    "zsre": "zsre.json",
    "counterfact": "counterfact.json",
    "wikibigedit": "wikibigedit.json",
    "knowedit": "knowedit_zsre_paraphrases.jsonl",
    "cknowedit": "cknowedit_zh.json",
}
SOURCES: dict[str, Callable[[str], list[Item]]] = {
    "own": _own,
    "zsre": _zsre,
    "counterfact": _prompted("counterfact"),
    "wikibigedit": _prompted("wikibigedit"),
    "knowedit": _knowedit,
    "cknowedit": _cknowedit,
}

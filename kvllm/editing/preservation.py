"""The preservation set: prompts and raw text whose base outputs training must not change.

Items are packaged in our own words (`preservation_data/`). Per base model, the base's own answers and hidden states are
computed once and cached, hash-checked, under `$KVLLM_CACHE/preservation`; a missing or damaged cache is rebuilt. Output
distributions are kept as the hidden states before the vocabulary projection: 85 times smaller and exact.

    pool = build_pool(copy, base_digest, EditConfig())
    batch = pool.sample(random.Random(0), language="en", config=EditConfig(), excluded=frozenset({"torchkeras"}))
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, TypeVar

import torch

from kvllm.cachefile import read_checked, write_checked
from kvllm.config import EditConfig, cache_folder
from kvllm.editing.compute import ComputeCopy
from kvllm.lm.model import Row
from kvllm.prompts import neighbour_questions

PRESERVATION_VERSION = "3"
# How many of each kind are kept for a model; the rest of the packaged pool waits for larger budgets.
_QUOTA = {"neighbour": 112, "question": 70, "instruction": 42, "text": 76}
_TEXT_CONTEXT = 6  # tokens of a raw text that are read before the first preserved one
_TEXT_TOKENS = 56

T = TypeVar("T")
Kind = Literal["neighbour", "question", "instruction", "text"]


@dataclass(frozen=True)
class Prompt:
    """One packaged item: the prompt (or raw text), and the name it is about where there is one."""

    kind: Kind
    prompt: str
    language: str
    name: str = ""


@dataclass(frozen=True)
class PreservedItem:
    """One item with the base model's own output.

    Attributes:
        source: The packaged item.
        row: Prompt and base answer (for raw text: its beginning and the rest).
        lower: What enters the lowest adapted layer, (seq, hidden).
        output: The base's last hidden states that predict each answer token, (answer, hidden).
    """

    source: Prompt
    row: Row
    lower: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class PreservationPool:
    """All items prepared for one base model and one lowest adapted layer."""

    items: tuple[PreservedItem, ...]

    def sample(
        self, rng: random.Random, *, language: str, config: EditConfig, excluded: frozenset[str] = frozenset()
    ) -> list[PreservedItem]:
        """Draw one step's items: neighbours (three quarters in the key's language), other prompts, raw texts.

        Args:
            rng: Source of randomness; the same state draws the same items.
            language: The key's language.
            config: Says how many of each.
            excluded: Casefolded names and questions that live facts are about, or that the model was taught to refuse,
                which must not be preserved.
        """
        allowed = [
            item
            for item in self.items
            if item.source.name.casefold() not in excluded and item.source.prompt.casefold() not in excluded
        ]
        own = max(1, round(0.75 * config.neighbours)) if config.neighbours else 0
        neighbours = [i for i in allowed if i.source.kind == "neighbour"]
        same = [i for i in neighbours if i.source.language == language]
        different = [i for i in neighbours if i.source.language != language]
        others = [i for i in allowed if i.source.kind in ("question", "instruction")]
        texts = [i for i in allowed if i.source.kind == "text"]
        drawn: list[PreservedItem] = []
        for pool, n in (
            (same, own),
            (different, config.neighbours - own),
            (others, config.others),
            (texts, config.texts),
        ):
            drawn += rng.sample(pool, min(n, len(pool)))
        return drawn


def packaged_names(language: str) -> list[str]:
    """Return the names of the packaged neighbours in one language."""
    return [entry["name"] for entry in _read("entities.jsonl") if entry["lang"] == language]


def packaged_questions() -> list[tuple[str, str]]:
    """Return the packaged general questions, each with its language."""
    return [(entry["question"], entry["lang"]) for entry in _read("questions.jsonl")]


def packaged_answers(language: str) -> list[str]:
    """Return the packaged forms of answers in one language, to be filled in with names, dates and numbers."""
    return [entry["answer"] for entry in _read("answers.jsonl") if entry["lang"] == language]


def packaged_prompts(quota: dict[str, int] | None = None) -> list[Prompt]:
    """Return the packaged items, a fixed spread over the files up to each kind's quota."""
    quota = quota or _QUOTA
    found: list[Prompt] = []
    entities = {language: packaged_names(language) for language in ("en", "zh")}
    for language, names in entities.items():
        share = len(names) / sum(map(len, entities.values()))
        chosen = _spread(names, round(quota["neighbour"] * share))
        questions = neighbour_questions(chosen, language=language)
        found += [Prompt("neighbour", q, language, name) for q, name in zip(questions, chosen, strict=True)]
    for entry in _spread(_read("questions.jsonl"), quota["question"]):
        found.append(Prompt("question", entry["question"], entry["lang"]))
    for entry in _spread(_read("instructions.jsonl"), quota["instruction"]):
        found.append(Prompt("instruction", entry["prompt"], entry["lang"]))
    for entry in _spread(_read("raw_text.jsonl"), quota["text"]):
        found.append(Prompt("text", entry["text"], entry["lang"]))
    return found


def build_pool(
    copy: ComputeCopy,
    base_digest: str,
    config: EditConfig,
    *,
    prompts: Sequence[Prompt] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PreservationPool:
    """Return the pool for a model, from the cache or by asking the model, whose weights must be the base's now.

    Args:
        copy: Compute copy, holding base weights; so must its language model.
        base_digest: Identity of the base model; the cache is keyed by it.
        config: Number of preserved tokens.
        prompts: Items; the packaged ones by default.
        on_progress: Called with (done, total) prompts while the base's answers are generated.
    """
    chosen = list(prompts) if prompts is not None else packaged_prompts()
    begin = ["begin"] if copy.lm.completion_ids("") else []  # a token that the tokenizer puts before every text
    texts = [f"{p.kind}:{p.prompt}" for p in chosen]
    answers_key = _key(base_digest, config.preserve_tokens, copy.dtype, *texts, *begin)
    folder = cache_folder() / "preservation"
    rows = _cached_rows(folder / f"answers-{answers_key}.json")
    if rows is None or len(rows) != len(chosen):
        rows = _base_rows(copy, chosen, config.preserve_tokens, on_progress)
        write_checked(
            folder / f"answers-{answers_key}.json",
            json.dumps([[list(r.prompt), list(r.answer)] for r in rows]).encode(),
        )
    states_key = _key(answers_key, copy.targets.first_layer, copy.dtype, torch.__version__)
    states = _cached_states(folder / f"states-{states_key}.safetensors", rows)
    if states is None:
        states = _base_states(copy, rows)
        _write_states(folder / f"states-{states_key}.safetensors", states)
    return PreservationPool(
        tuple(
            PreservedItem(prompt, row, lower, output)
            for prompt, row, (lower, output) in zip(chosen, rows, states, strict=True)
            if row.answer
        )
    )


def prepare_items(copy: ComputeCopy, rows: Sequence[Row], sources: Sequence[Prompt]) -> list[PreservedItem]:
    """Return rows as preserved items with the outputs of the weights that `copy` holds now."""
    states = _base_states(copy, rows)
    return [PreservedItem(s, r, lo, out) for s, r, (lo, out) in zip(sources, rows, states, strict=True)]


def _base_rows(
    copy: ComputeCopy,
    prompts: Sequence[Prompt],
    tokens: int,
    on_progress: Callable[[int, int], None] | None,
) -> list[Row]:
    lm = copy.lm
    asked = [i for i, p in enumerate(prompts) if p.kind != "text"]
    ids = [lm.prompt_ids(prompts[i].prompt) for i in asked]
    answers = copy.generate_ids(ids, tokens, on_progress)
    rows: list[Row] = []
    by_index = dict(zip(asked, zip(ids, answers, strict=True), strict=True))
    for i, prompt in enumerate(prompts):
        if i in by_index:
            prompt_ids, answer = by_index[i]
            rows.append(Row(tuple(prompt_ids), tuple(answer)))
        else:
            text = lm.completion_ids(prompt.prompt)[:_TEXT_TOKENS]
            context = _TEXT_CONTEXT + len(lm.completion_ids(""))
            rows.append(Row(tuple(text[:context]), tuple(text[context:])))
    return rows


@torch.no_grad()
def _base_states(
    copy: ComputeCopy, rows: Sequence[Row], batch_size: int = 16
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    lower = copy.lower_states([row.ids for row in rows])
    outputs: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    order = [i for i in sorted(range(len(rows)), key=lambda i: len(rows[i].ids)) if rows[i].answer]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        states = copy.answer_states([(lower[i], rows[i]) for i in batch]).float()
        for i, part in zip(batch, states.split([len(rows[i].answer) for i in batch]), strict=True):
            outputs[i] = part.clone()
    return list(zip(lower, outputs, strict=True))


def _cached_rows(path: Path) -> list[Row] | None:
    data = read_checked(path)
    return None if data is None else [Row(tuple(p), tuple(a)) for p, a in json.loads(data)]


def _cached_states(path: Path, rows: Sequence[Row]) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    from safetensors.torch import load

    data = read_checked(path)
    if data is None:
        return None
    tensors = load(data)
    lower = tensors["lower"].split([len(r.ids) for r in rows])
    output = tensors["output"].split([len(r.answer) for r in rows])
    return list(zip(lower, output, strict=True))


def _write_states(path: Path, states: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    from safetensors.torch import save

    hidden = states[0][0].shape[-1]
    lower = torch.cat([s[0].cpu() for s in states])
    output = torch.cat([s[1].cpu().view(-1, hidden) for s in states])
    write_checked(path, save({"lower": lower.contiguous(), "output": output.contiguous()}))


def _read(name: str) -> list[dict[str, str]]:
    source = resources.files("kvllm.editing") / "preservation_data" / name
    return [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]


def _spread(items: Sequence[T], n: int) -> list[T]:
    """Return n items evenly spaced over the sequence, so that every category keeps its share."""
    if n >= len(items):
        return list(items)
    return [items[(i * len(items)) // n] for i in range(n)]


def _key(*parts: object) -> str:
    digest = hashlib.sha256(PRESERVATION_VERSION.encode())
    for part in parts:
        digest.update(b"\x00" + str(part).encode())
    return digest.hexdigest()[:24]

"""What usually enters a gated MLP: against this a neuron learns when to stay silent.

For each MLP that the editor "neurons" uses, a sample of the inputs that ordinary prompts and texts give is gathered
once per base model, with those of made-up answers full of names, dates and numbers, those at the ends of questions in
many wordings about other names, and how the layer's neurons move together. Knows no facts.

    ordinary_inputs(copy, pool, base_digest, mlps)       # {layer: Ordinary}
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from kvllm.cachefile import read_checked, write_checked
from kvllm.config import cache_folder
from kvllm.editing.compute import ComputeCopy, Entered, decomposable
from kvllm.editing.inputs import ordinary_sequences, read_inputs
from kvllm.editing.preservation import (
    PRESERVATION_VERSION,
    PreservationPool,
    Prompt,
    packaged_answers,
    packaged_names,
    packaged_questions,
)
from kvllm.errors import ModelError
from kvllm.lm.decoding import Opening
from kvllm.lm.model import Row, shared_length
from kvllm.lm.targets import GatedMlp
from kvllm.prompts import augmented_questions, training_questions
from kvllm.records import Fact

_VERSION = "4"
_RIDGE = 0.02  # of the whitening, in units of the mean eigenvalue: no direction is read more than seven times as loud
_TOKENS = 49152  # kept of a layer's inputs
_NAMES = {"en": 400, "zh": 120}  # questions about packaged names, one each
_COMPOSED = {"en": 480, "zh": 120}  # made-up answers
_YEARS = (1700, 2020)
_WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_BATCH = 32
# Of the mean square: what the neurons' moments are made invertible with.
_DAMPING = 1e-4


@dataclass(frozen=True)
class Ordinary:
    """What usually enters one gated MLP.

    Attributes:
        whitening: Symmetric (hidden, hidden), fp32: in its coordinates inputs are alike in all directions.
        inputs: A sample of them there, (tokens, hidden), fp16.
        ends: Likewise, where questions about other names end and answers begin, (n, hidden); of a layer that was asked
            for whole questions, at each of their tokens.
        about: What each of these is about, a name or a question, casefolded.
        one: The direction there in which inputs are as near to 1 as they are in any, (hidden,): what stands for a bias.
        moments: Mean products of what the neurons put out, (inner, inner).
    """

    whitening: torch.Tensor
    inputs: torch.Tensor
    ends: torch.Tensor
    about: tuple[str, ...]
    one: torch.Tensor
    moments: torch.Tensor


def ordinary_inputs(
    copy: ComputeCopy,
    pool: PreservationPool,
    base_digest: str,
    mlps: Sequence[GatedMlp],
    *,
    prompts: Sequence[Prompt] | None = None,
    answers: Sequence[tuple[str, str]] | None = None,
    questions: Sequence[tuple[str, str]] | None = None,
    whole: Sequence[GatedMlp] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> Mapping[int, Ordinary]:
    """Return what usually enters each MLP, from the cache or measured now.

    Args:
        copy: Compute copy; where nothing is cached it must hold the base's weights.
        pool: The preservation set of this base.
        base_digest: Identity of the base model.
        mlps: Of the layers wanted.
        prompts: Read beside the pool; by default packaged prompts that are not in it.
        answers: Questions with answers that are read, too; by default made-up ones.
        questions: Those of `Ordinary.ends`, each with what it is about; by default packaged names and questions in
            many wordings.
        whole: Of the MLPs those whose `Ordinary.ends` are to be at every token of these questions.
        on_progress: Called with batches done and their number.

    Returns:
        Layer → what enters its MLP, read when it is first asked for; ModelError then, if its file is gone.
    """
    asked = list(questions) if questions is not None else wordings()
    composed = composed_answers() if answers is None else answers
    groups = [*ordinary_sequences(copy, pool, prompts), [copy.lm.row(*pair).ids for pair in composed]]
    names = [name for mlp in mlps for name in (mlp.gate, mlp.out)]
    facts = [PRESERVATION_VERSION, _VERSION, base_digest, str(copy.dtype), torch.__version__, *names]
    facts += [question for question, _ in asked] + [mlp.gate for mlp in whole]
    facts += [repr(ids) for group in groups for ids in group]
    digest = hashlib.sha256("\x00".join(facts).encode()).hexdigest()[:24]
    about = [name.casefold() for _, name in asked]
    paths = {mlp: cache_folder() / "preservation" / f"ordinary-{digest}-{mlp.layer}.safetensors" for mlp in mlps}
    found = _Kept({mlp.layer: path for mlp, path in paths.items()}, about, copy.lm.device)
    if not all(read_checked(path) is not None for path in paths.values()):
        measured = _measured(copy, mlps, groups, [question for question, _ in asked], whole, on_progress)
        for mlp, tensors in measured:
            found.keep(mlp.layer, tensors)
    return found


class _Kept(Mapping[int, Ordinary]):
    """What usually enters each MLP, layer → that, read from its file when it is first asked for: these are large."""

    def __init__(self, paths: Mapping[int, Path], about: Sequence[str], device: torch.device) -> None:
        self._paths = paths
        self._about = about
        self._device = device
        self._found: dict[int, Ordinary] = {}

    def keep(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a layer's file; what cannot be written is held."""
        from safetensors.torch import save

        content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        if not write_checked(self._paths[layer], content):
            self._found[layer] = _ordinary(tensors, self._about)

    def __getitem__(self, layer: int) -> Ordinary:
        from safetensors.torch import load

        if layer not in self._found:
            data = read_checked(self._paths[layer])
            if data is None:
                raise ModelError(
                    f"{self._paths[layer].name} is gone from the cache, or was changed in the meantime; nothing was "
                    "changed. Try again with the knowledge base opened anew: then it is made again."
                )
            tensors = {name: x.to(self._device) for name, x in load(data).items()}
            self._found[layer] = _ordinary(tensors, self._about)
        return self._found[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def wordings() -> list[tuple[str, str]]:
    """Return packaged names and questions, each asked in one of the wordings that edits train, with what was asked."""
    rng = random.Random(0)
    facts = []
    for language, n in _NAMES.items():
        names = packaged_names(language)
        facts += [Fact(name, "", language=language) for name in rng.sample(names, min(n, len(names)))]
    facts += [Fact(question, "", language=language) for question, language in packaged_questions()]
    return worded(facts, rng)


def composed_answers() -> list[tuple[str, str]]:
    """Return questions about packaged names with made-up answers: what is said where a name, date or number is due."""
    rng = random.Random(0)
    found = []
    for language, n in _COMPOSED.items():
        names, forms = packaged_names(language), packaged_answers(language)
        for place in range(n):
            name, other, third = rng.sample(names, 3)
            answer = forms[place % len(forms)].format(name=name, other=other, third=third, **_figures(rng, language))
            found += [(question, answer) for question, _ in worded([Fact(name, "", language=language)], rng)]
    return found


def _figures(rng: random.Random, language: str) -> dict[str, object]:
    """Return a made-up date, time of day and some numbers."""
    month = rng.randrange(len(_MONTHS))
    return {
        "year": (year := rng.randint(*_YEARS)),
        "later": year + rng.randint(1, 80),
        "month": month + 1 if language == "zh" else _MONTHS[month],
        "day": rng.randint(1, 28),
        "weekday": rng.choice(_WEEKDAYS),
        "hour": rng.randint(1, 23),
        "minute": rng.randint(10, 59),
        "small": rng.randint(10, 99),
        "count": rng.randint(2, 400),
        "many": f"{rng.randint(1, 900)},{rng.randint(100, 999)}",
    }


def worded(facts: Sequence[Fact], rng: random.Random) -> list[tuple[str, str]]:
    """Return one question about each fact, in any of the wordings that edits train, with the fact's key."""
    return [
        (rng.choice([*training_questions(fact), *augmented_questions(fact, 8, seed=place)]), fact.key)
        for place, fact in enumerate(facts)
    ]


def ends(
    copy: ComputeCopy,
    names: Sequence[str],
    prompts: Sequence[Sequence[int]],
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Return what enters each of the named modules at the last token of each prompt: (prompts, in), fp32."""
    if not prompts:
        return {
            name: torch.zeros(0, copy.model.get_submodule(name).in_features, device=copy.lm.device) for name in names
        }
    found = answered(copy, names, [Row(tuple(prompt), ()) for prompt in prompts], on_batch)
    return {name: torch.cat(parts) for name, parts in found.items()}


def from_where_they_differ(rows: Sequence[Row]) -> list[Row]:
    """Return rows of which `answered` returns what is read at each token that not all of them begin with."""
    sequences = [row.ids for row in rows]
    shared = min(shared_length(sequences), min(map(len, sequences)) - 1)
    return [Row(ids[: shared + 1], (*ids[shared + 1 :], 0)) for ids in sequences]


def answered(
    copy: ComputeCopy,
    names: Sequence[str],
    rows: Sequence[Row],
    on_batch: Callable[[int, int], None] | None = None,
    during: Callable[[Sequence[int], int], AbstractContextManager[None]] | None = None,
    behind: tuple[Opening | None, Entered] | None = None,
) -> dict[str, list[torch.Tensor]]:
    """Return what enters each of the named modules from the last token of each row's prompt on.

    Per row (answer tokens, in), fp32: at the prompt's last token, and at every token of the answer but the last; of a
    row without answer at the prompt's last token only.

    Args:
        copy: Compute copy.
        names: Of modules.
        rows: Read together where their lengths are alike.
        on_batch: Called with batches done and their number.
        during: Makes what is open while a batch is run, from its rows' places and the position that it begins at.
        behind: What all rows' prompts begin with, none of them whole, and what the rest of each row makes enter a
            layer, at so many tokens at least: then nothing below it is run.
    """
    prompts = [row.ids[: max(len(row.prompt), len(row.ids) - 1)] for row in rows]
    found: dict[str, list[torch.Tensor]] = {name: [torch.empty(0)] * len(rows) for name in names}
    opening: Opening | None
    opening, entered = behind if behind is not None else (copy.shared_opening(prompts), None)
    start = len(opening or ())
    if start >= min(len(row.prompt) for row in rows):  # nothing would be left to read
        opening, start = None, 0
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for done in range(0, len(order), _BATCH):
        batch = order[done : done + _BATCH]

        def read(name: str, x: torch.Tensor, batch: Sequence[int] = batch) -> None:
            x = x.reshape(len(batch), -1, x.shape[-1])
            for place, i in enumerate(batch):
                found[name][i] = x[place, len(rows[i].prompt) - 1 - start : len(prompts[i]) - start].float().clone()

        with during(batch, start) if during is not None else nullcontext():
            rest = [prompts[i][start:] for i in batch]
            copy.read_inputs(rest, names, read, opening, entered and entered.of(batch, map(len, rest)))
        if on_batch is not None:
            on_batch(done // _BATCH + 1, -(-len(order) // _BATCH))
    return found


def _measured(
    copy: ComputeCopy,
    mlps: Sequence[GatedMlp],
    groups: Sequence[Sequence[Sequence[int]]],
    asked: Sequence[str],
    whole: Sequence[GatedMlp],
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[GatedMlp, dict[str, torch.Tensor]]]:
    inputs: dict[str, list[torch.Tensor]] = {mlp.gate: [] for mlp in mlps}
    moments: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys((mlp.out for mlp in mlps), 0)

    def take(name: str, x: torch.Tensor) -> None:
        if name in inputs:
            inputs[name].append(x.half())
        else:
            x = x.float()
            moments[name] = moments[name] + x.T @ x if name in moments else x.T @ x
            counts[name] += len(x)

    read_inputs(copy, [*inputs, *counts], groups, take, but=())
    prompts = [copy.lm.prompt_ids(question) for question in asked]
    last = {name: [x[None] for x in found] for name, found in ends(copy, list(inputs), prompts, on_progress).items()}
    every: dict[str, list[torch.Tensor]] = {}
    if whole and prompts:
        rows = from_where_they_differ([Row(tuple(prompt), ()) for prompt in prompts])
        every = answered(copy, [mlp.gate for mlp in whole], rows)
    drawn = torch.Generator().manual_seed(0)
    for mlp in mlps:
        all_inputs = torch.cat(inputs.pop(mlp.gate))
        ended = every.get(mlp.gate) or last[mlp.gate]
        yield (
            mlp,
            {
                "inputs": all_inputs[torch.randperm(len(all_inputs), generator=drawn)[:_TOKENS].to(all_inputs.device)],
                "ends": torch.cat(ended).half() if ended else all_inputs[:0],
                "places": torch.tensor([i for i, x in enumerate(ended) for _ in x], dtype=torch.int32),
                "moments": moments[mlp.out] / max(1, counts[mlp.out]),
            },
        )


def _ordinary(kept: Mapping[str, torch.Tensor], about: Sequence[str]) -> Ordinary:
    x = kept["inputs"].float()
    values, vectors = torch.linalg.eigh(decomposable(x.T @ x / len(x)))
    values = values.clamp(min=0)
    whitening = ((vectors * (values + _RIDGE * values.mean()).rsqrt()) @ vectors.T).to(x.device)
    white = x @ whitening
    square = white.T @ white / len(white) + 1e-3 * torch.eye(white.shape[1], device=x.device)
    one = torch.linalg.solve(square, white.mean(0))
    moments = kept["moments"].float()
    damped = moments + _DAMPING * moments.diagonal().mean() * torch.eye(len(moments), device=x.device)
    of = tuple(about[place] for place in kept["places"].tolist())
    return Ordinary(whitening, white.half(), kept["ends"].float() @ whitening, of, one, damped)

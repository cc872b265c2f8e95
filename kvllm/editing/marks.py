"""A mark that is put on a name: what it adds to the residual stream, later layers carry to where an answer is given.

Where a question ends, a model knows what was asked, and little of the name that it was asked about: two names that it
does not know look alike there. A vector is therefore learned, once per base model, that moves what is read at a
question's end most when it is added where a name ends, early in the model: attention then looks at that name, and
carries it along. Knows no facts.

    mark = learned_mark(copy, base_digest, named, said, whitening)
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from kvllm.cachefile import read_checked, write_checked
from kvllm.config import cache_folder
from kvllm.editing.compute import ComputeCopy
from kvllm.editing.ordinary import answered, worded
from kvllm.editing.preservation import packaged_names
from kvllm.lm.model import Row
from kvllm.lm.targets import GatedMlp
from kvllm.records import Fact

_VERSION = "2"
_NAMES = {"en": 48, "zh": 16}
# Steps that make the mark carry far, then steps that make it do so in every wording; lengths in the mark's own.
_STEPS = 14
_FAR = 7
_FAR_STEP = 0.5
_EVEN_STEP = 0.15
_SHARE = 1.0  # of the residual stream's length at a name


def learned_mark(
    copy: ComputeCopy,
    base_digest: str,
    named: GatedMlp,
    said: GatedMlp,
    whitening: torch.Tensor,
    *,
    names: Sequence[tuple[str, str]] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Return the mark of a base model, (hidden,), fp32, from the cache or learned now.

    It is to be added to what the MLP `named` puts out.

    Gradient steps of fixed length on a sphere make what enters `said` at the questions' ends differ most from what
    enters without the mark: on the mean, then on the geometric one, so that no wording is left behind.

    Args:
        copy: Compute copy, whose lowest adapted layer is that of `named`; where nothing is cached it must hold the
            base's weights.
        base_digest: Identity of the base model.
        named: Of the layer that puts the mark on.
        said: Where it is to be read.
        whitening: Of what enters there, (hidden, hidden).
        names: Asked about, each with its language; packaged ones by default.
        on_progress: Called with steps done and their number.
    """
    from safetensors.torch import load, save

    asked = _asked(names)
    facts = [
        _VERSION,
        str(_SHARE),
        base_digest,
        str(copy.dtype),
        torch.__version__,
        named.out,
        said.gate,
        *map(repr, asked),
    ]
    digest = hashlib.sha256("\x00".join(facts).encode()).hexdigest()[:24]
    path = cache_folder() / "preservation" / f"mark-{digest}.safetensors"
    data = read_checked(path)
    if data is None:
        vector = _learned(copy, named, said, whitening, asked, on_progress)
        write_checked(path, save({"mark": vector.cpu()}))
    else:
        vector = load(data)["mark"]
    return vector.to(copy.lm.device)


def marked_ends(
    copy: ComputeCopy,
    base_digest: str,
    mark: torch.Tensor,
    named: GatedMlp,
    mlps: Sequence[GatedMlp],
    *,
    asked: Sequence[tuple[str, str]],
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[int, torch.Tensor]:
    """Return what enters each MLP where marked questions end, from the cache or measured now: layer → (questions, in).

    Args:
        copy: Compute copy, reading at least up to these MLPs; where nothing is cached it must hold the base's weights.
        base_digest: Identity of the base model.
        mark: Put on the names.
        named: Of the layer that puts it on.
        mlps: Where it is to be read.
        asked: Questions, each with the name it is about; those in which the name is not found are left unmarked.
        on_progress: Called with batches done and their number.
    """
    from safetensors.torch import load, save

    facts = [_VERSION, base_digest, str(copy.dtype), torch.__version__, named.out, *(mlp.gate for mlp in mlps)]
    facts += [repr(mark.tolist()), *map(repr, asked)]
    digest = hashlib.sha256("\x00".join(facts).encode()).hexdigest()[:24]
    path = cache_folder() / "preservation" / f"marked-{digest}.safetensors"
    data = read_checked(path)
    if data is None:
        rows = [Row(tuple(copy.lm.prompt_ids(question)), ()) for question, _ in asked]
        places = [copy.lm.name_ends(row.prompt, name) for row, (_, name) in zip(rows, asked, strict=True)]
        found = answered(copy, [mlp.gate for mlp in mlps], rows, on_progress, marking(copy, named.out, mark, places))
        tensors = {str(mlp.layer): torch.cat(found[mlp.gate]).half().cpu() for mlp in mlps}
        write_checked(path, save(tensors))
    else:
        tensors = load(data)
    return {mlp.layer: tensors[str(mlp.layer)].to(copy.lm.device).float() for mlp in mlps}


def marking(
    copy: ComputeCopy, out: str, mark: torch.Tensor, places: Sequence[Sequence[int]]
) -> Callable[[Sequence[int], int], AbstractContextManager[None]]:
    """Return what marks each row's places while a batch of these rows is run, from a position on."""
    return lambda batch, start: marked(copy, out, mark, at_places([places[i] for i in batch], start))


@contextmanager
def marked(
    copy: ComputeCopy, out: str, mark: torch.Tensor, where: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Add a mark to what the named module puts out, while this is open, where `where` says: (batch, seq), 0 or 1."""

    def add(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output + (where(output)[..., None].to(output.device) * mark).to(output.dtype)

    handle = copy.model.get_submodule(out).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def at_places(places: Sequence[Sequence[int]], start: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what says 1 at each row's places, for a batch that begins at position `start`."""

    def where(output: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(output.shape[:2])
        for row, some in enumerate(places):
            found[row, [place - start for place in some if start <= place < start + output.shape[1]]] = 1.0
        return found

    return where


def _asked(names: Sequence[tuple[str, str]] | None) -> list[tuple[str, str]]:
    """Return questions in many wordings, each with the name it is about."""
    rng = random.Random(0)
    if names is None:
        packaged = {language: packaged_names(language) for language in _NAMES}
        names = [(name, lang) for lang, found in packaged.items() for name in rng.sample(found, _NAMES[lang])]
    return worded([Fact(name, "", language=language) for name, language in names], rng)


def _learned(
    copy: ComputeCopy,
    named: GatedMlp,
    said: GatedMlp,
    whitening: torch.Tensor,
    asked: Sequence[tuple[str, str]],
    on_progress: Callable[[int, int], None] | None,
) -> torch.Tensor:
    rows = [Row(tuple(copy.lm.prompt_ids(question)), (copy.lm.end_of_turn,)) for question, _ in asked]
    places = [copy.lm.name_ends(row.prompt, name) for row, (_, name) in zip(rows, asked, strict=True)]
    kept = [i for i, some in enumerate(places) if some]
    rows, places = [rows[i] for i in kept], [places[i] for i in kept]
    lower = copy.lower_states([row.prompt for row in rows])
    streams = torch.cat([states[list(some)] for states, some in zip(lower, places, strict=True)])
    length = float(streams.norm(dim=1).median())
    caught: dict[str, torch.Tensor] = {}

    def read() -> torch.Tensor:
        with copy.caught([said.gate], caught):
            copy.answer_states(list(zip(lower, rows, strict=True)))
        ends = [len(row.prompt) - 1 for row in rows]
        entered = caught[said.gate]
        entered = entered.reshape(len(rows), -1, entered.shape[-1]).float()
        at_ends: torch.Tensor = entered[range(len(rows)), ends] @ whitening
        return at_ends

    with torch.no_grad():
        before = read()
    drawn = torch.randn(before.shape[1], generator=torch.Generator().manual_seed(0)).to(before.device)
    mark = drawn / drawn.norm() * length * _SHARE
    for step in range(_STEPS):
        mark = mark.detach().requires_grad_()
        with torch.enable_grad(), marked(copy, named.out, mark, at_places(places, 0)):
            moved = (read() - before).norm(dim=1)
            (gradient,) = torch.autograd.grad((moved if step < _FAR else moved.log()).mean(), mark)
        size = _FAR_STEP if step < _FAR else _EVEN_STEP
        mark = mark.detach() + gradient / gradient.norm().clamp(min=1e-12) * mark.detach().norm() * size
        mark = mark / mark.norm() * length * _SHARE
        if on_progress is not None:
            on_progress(step + 1, _STEPS)
    found: torch.Tensor = mark.detach().float()
    return found

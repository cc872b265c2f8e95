"""A mark that is put on a name: what it adds to the residual stream, later layers carry to where an answer is given.

Where a question ends, a model knows what was asked, and little of the name that it was asked about: two names that it
does not know look alike there. A vector is therefore learned, once per base model, that moves what is read at a
question's end when it is added where a name ends, early in the model: attention then looks at that name, and carries it
along. It moves that far enough to be told, and as little as can be of what is answered. Knows no facts.

    mark = learned_mark(copy, base_digest, named, [(said, whitening)])
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.nn import functional as F

from kvllm.cachefile import read_checked, write_checked
from kvllm.config import cache_folder
from kvllm.editing.compute import ComputeCopy
from kvllm.editing.ordinary import answered, worded
from kvllm.editing.preservation import packaged_names
from kvllm.lm.model import Row
from kvllm.lm.targets import GatedMlp
from kvllm.records import Fact

_VERSION = "4"
_NAMES = {"en": 48, "zh": 16}
# Steps in all, and the first of them, which make the mark carry far whichever way.
_STEPS = 40
_FAR = 13
# Of a step: its length in the mark's own, falling, and the questions in it.
_SIZE = 0.5
_LEAST_SIZE = 0.03
_ROWS = 22
_TOKENS = 12  # of the answers that are to stay
_READ = 4  # tokens from which answers are given, the question's last one the first
_SHARE = 1.0  # of the residual stream's length at a name
# White units that what is read is to be moved by: from there on, further is worth nothing.
_ENOUGH = 40.0
_NEAR = 0.3
# What e times as far is worth, and what a nat of KL per answer token costs.
_WORTH = 4.0
_COST = 6.0


def learned_mark(
    copy: ComputeCopy,
    base_digest: str,
    named: GatedMlp,
    said: Sequence[tuple[GatedMlp, torch.Tensor]],
    *,
    names: Sequence[tuple[str, str]] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Return the mark of a base model, (hidden,), fp32, from the cache or learned now.

    It is to be added to what the MLP `named` puts out.

    Gradient steps on a sphere make what enters the MLPs `said` where answers begin move, far enough to be told and
    in every wording, while what is answered stays: a name may be said where something else is asked.

    Args:
        copy: Compute copy, whose lowest adapted layer is that of `named`; where nothing is cached it must hold the
            base's weights.
        base_digest: Identity of the base model.
        named: Of the layer that puts the mark on.
        said: Where it is to be read, each with the whitening of what enters there, (hidden, hidden).
        names: Asked about, each with its language; packaged ones by default.
        on_progress: Called with steps done and their number.
    """
    from safetensors.torch import load, save

    asked = _asked(names)
    facts = [
        _VERSION,
        repr((_SHARE, _STEPS, _ROWS, _TOKENS, _READ, _ENOUGH, _WORTH, _COST)),
        base_digest,
        str(copy.dtype),
        torch.__version__,
        named.out,
        *(mlp.gate for mlp, _ in said),
        *map(repr, asked),
    ]
    digest = hashlib.sha256("\x00".join(facts).encode()).hexdigest()[:24]
    path = cache_folder() / "preservation" / f"mark-{digest}.safetensors"
    data = read_checked(path)
    if data is None:
        vector = _learned(copy, named, said, asked, on_progress)
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
    said: Sequence[tuple[GatedMlp, torch.Tensor]],
    asked: Sequence[tuple[str, str]],
    on_progress: Callable[[int, int], None] | None,
) -> torch.Tensor:
    rows, places = _answered_rows(copy, asked)
    lower = copy.lower_states([row.ids for row in rows])
    streams = torch.cat([states[list(some)] for states, some in zip(lower, places, strict=True)])
    length = float(streams.norm(dim=1).median()) * _SHARE
    caught: dict[str, torch.Tensor] = {}

    def read(some: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return what enters the late MLPs where answers begin, (MLPs, tokens, hidden), and the answers' states."""
        with copy.caught([mlp.gate for mlp, _ in said], caught):
            states = copy.answer_states([(lower[i], rows[i]) for i in some])
        found = []
        for mlp, whitening in said:
            entered = caught[mlp.gate]
            entered = entered.reshape(len(some), -1, entered.shape[-1]).float() @ whitening
            ends = [len(rows[i].prompt) - 1 for i in some]
            found.append(torch.cat([x[end : end + n_read[i]] for x, end, i in zip(entered, ends, some, strict=True)]))
        return torch.stack(found), list(states.split([len(rows[i].answer) for i in some]))

    n_read = [min(_READ, len(row.answer)) for row in rows]
    everyone = list(range(len(rows)))
    with torch.no_grad():
        entered, expected = read(everyone)
    before = entered.split(n_read, dim=1)
    rng = random.Random(0)
    drawn = torch.randn(entered.shape[-1], generator=torch.Generator().manual_seed(0)).to(entered.device)
    mark = drawn / drawn.norm() * length
    for step in range(_STEPS):
        some = rng.sample(everyone, min(_ROWS, len(everyone)))
        mark = mark.detach().requires_grad_()
        with torch.enable_grad(), marked(copy, named.out, mark, at_places([places[i] for i in some], 0)):
            now, states = read(some)
            moved = now - torch.cat([before[i] for i in some], dim=1)
            if step >= _FAR:  # along the way that they all are moved, of which a gate can tell
                toward = F.normalize(moved.mean(1, keepdim=True), dim=-1).detach()
                along = (moved * toward).sum(-1).clamp(min=_NEAR, max=_ENOUGH)
            else:
                along = moved.norm(dim=-1).clamp(min=_NEAR)
            was = copy.logits(torch.cat([expected[i] for i in some])).log_softmax(-1)
            kl = F.kl_div(copy.logits(torch.cat(states)).log_softmax(-1), was, log_target=True, reduction="none")
            worth = _WORTH * along.log().mean() - _COST * kl.sum(-1).mean()
            (gradient,) = torch.autograd.grad(worth, mark)
        size = _SIZE * (1 - step / _STEPS) + _LEAST_SIZE
        mark = mark.detach() + gradient / gradient.norm().clamp(min=1e-12) * mark.detach().norm() * size
        mark = mark / mark.norm() * length
        if on_progress is not None:
            on_progress(step + 1, _STEPS)
    found: torch.Tensor = mark.detach().float()
    return found


def _answered_rows(copy: ComputeCopy, asked: Sequence[tuple[str, str]]) -> tuple[list[Row], list[tuple[int, ...]]]:
    """Return questions with what the model says to them, and where each was said what it is about."""
    prompts = [tuple(copy.lm.prompt_ids(question)) for question, _ in asked]
    answers = copy.generate_ids(prompts, _TOKENS)
    rows = [Row(ids, answer or (copy.lm.end_of_turn,)) for ids, answer in zip(prompts, answers, strict=True)]
    places = [copy.lm.name_ends(row.ids, name) for row, (_, name) in zip(rows, asked, strict=True)]
    kept = [i for i, some in enumerate(places) if some]
    return [rows[i] for i in kept], [places[i] for i in kept]

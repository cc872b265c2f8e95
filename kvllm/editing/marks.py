"""Marks that are put on names: what they add to the residual stream, later layers carry to where an answer is given.

Where a question ends, a model knows what was asked, and little of the name that it was asked about: two names that it
does not know look alike there. A few vectors are therefore learned, once per base model, each of which moves what is
read at a question's end in a way of its own when it is added where a name ends, early in the model: attention then
looks at that name, and carries it along. They move that far enough to be told from each other, and as little as can be
of what is answered. A mark is the sum of two of them, and a name gets one that few bear. Knows no facts.

    marks = learned_marks(copy, base_digest, named, [said], ordinary)
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch.nn import functional as F

from kvllm.cachefile import read_checked, write_checked
from kvllm.config import cache_folder
from kvllm.editing.compute import ComputeCopy, decomposable
from kvllm.editing.ordinary import Ordinary, answered, worded
from kvllm.editing.preservation import packaged_names
from kvllm.lm.model import Row
from kvllm.lm.targets import GatedMlp
from kvllm.records import Fact

_VERSION = "6"
_KINDS = 12
_NAMES = {"en": 48, "zh": 16}
_STEPS = 40
# Of a step: its length in the marks' own, falling, and the questions in it.
_SIZE = 0.5
_LEAST_SIZE = 0.03
_ROWS = 32
_KEPT = 0.7  # of the ways that marks were seen to move what is read, at each step
_RIDGE = 0.01  # of the marks' squared ways: how exactly each is read so that no other is
_TOKENS = 12  # of the answers that are to stay
_READ = 4  # tokens from which answers are given, the question's last one the first
_SHARE = 1.0  # of the residual stream's length at a name
# White units that what is read is to be moved by: from the first on, further is worth nothing; below the second the
# logarithm goes on as a line.
_ENOUGH = 40.0
_NEAR = 0.3
# What e times as far is worth, and what a nat of KL per answer token costs.
_WORTH = 4.0
_COST = 6.0


def learned_marks(
    copy: ComputeCopy,
    base_digest: str,
    named: GatedMlp,
    said: Sequence[GatedMlp],
    ordinary: Mapping[int, Ordinary],
    *,
    names: Sequence[tuple[str, str]] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Return the marks of a base model, (marks, hidden), fp32, from the cache or learned now.

    They are to be added to what the MLP `named` puts out. Each is the sum of two of the few that are learned, as long
    as one of them: so there are more to tell apart, and those that have one part in common are still half different.

    Gradient steps on a sphere make what enters the MLPs `said` where answers begin move, in every wording far enough
    along a way that no other mark moves it, while what is answered stays: a name may be said where something else is
    asked.

    Args:
        copy: Compute copy, whose lowest adapted layer is that of `named`; where nothing is cached it must hold the
            base's weights.
        base_digest: Identity of the base model.
        named: Of the layer that puts marks on.
        said: Where they are to be read.
        ordinary: Layer to what usually enters its MLP: looked at only where nothing is cached.
        names: Asked about, each with its language; packaged ones by default.
        on_progress: Called with steps done and their number.
    """
    from safetensors.torch import load, save

    asked = _asked(names)
    facts = [
        _VERSION,
        repr((_KINDS, _SHARE, _STEPS, _ROWS, _TOKENS, _READ, _ENOUGH, _WORTH, _COST)),
        base_digest,
        str(copy.dtype),
        torch.__version__,
        named.out,
        *(mlp.gate for mlp in said),
        *map(repr, asked),
    ]
    digest = hashlib.sha256("\x00".join(facts).encode()).hexdigest()[:24]
    path = cache_folder() / "preservation" / f"marks-{digest}.safetensors"
    data = read_checked(path)
    if data is None:
        white = [(mlp, ordinary[mlp.layer].whitening) for mlp in said]
        vectors = _learned(copy, named, white, asked, on_progress)
        write_checked(path, save({"marks": vectors.cpu()}))
    else:
        vectors = load(data)["marks"]
    return vectors.to(copy.lm.device)


def marked_ends(
    copy: ComputeCopy,
    base_digest: str,
    marks: torch.Tensor,
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
        marks: Put on the names by turns, (marks, hidden).
        named: Of the layer that puts them on.
        mlps: Where they are to be read.
        asked: Questions, each with the name it is about; those in which the name is not found are left unmarked.
        on_progress: Called with batches done and their number.
    """
    from safetensors.torch import load, save

    facts = [_VERSION, base_digest, str(copy.dtype), torch.__version__, named.out, *(mlp.gate for mlp in mlps)]
    facts += [repr(marks.tolist()), *map(repr, asked)]
    digest = hashlib.sha256("\x00".join(facts).encode()).hexdigest()[:24]
    path = cache_folder() / "preservation" / f"marked-{digest}.safetensors"
    data = read_checked(path)
    if data is None:
        rows = [Row(tuple(copy.lm.prompt_ids(question)), ()) for question, _ in asked]
        places = [copy.lm.name_ends(row.prompt, name) for row, (_, name) in zip(rows, asked, strict=True)]
        found = answered(copy, [mlp.gate for mlp in mlps], rows, on_progress, marking(copy, named.out, marks, places))
        tensors = {str(mlp.layer): torch.cat(found[mlp.gate]).half().cpu() for mlp in mlps}
        write_checked(path, save(tensors))
    else:
        tensors = load(data)
    return {mlp.layer: tensors[str(mlp.layer)].to(copy.lm.device).float() for mlp in mlps}


def marking(
    copy: ComputeCopy, out: str, marks: torch.Tensor, places: Sequence[Sequence[int]]
) -> Callable[[Sequence[int], int], AbstractContextManager[None]]:
    """Return what marks each row's places, by turns with one of the marks, while a batch of these rows is run.

    It is to be called with the rows' numbers and the position that the batch begins at.
    """

    def during(batch: Sequence[int], start: int) -> AbstractContextManager[None]:
        return marked(copy, out, marks[[i % len(marks) for i in batch]], [places[i] for i in batch], start)

    return during


@contextmanager
def marked(
    copy: ComputeCopy, out: str, marks: torch.Tensor, places: Sequence[Sequence[int]], start: int = 0
) -> Iterator[None]:
    """Add each row's mark, (rows, hidden), to what the named module puts out at its places, while this is open.

    The batch begins at position `start`.
    """

    def add(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        here = torch.zeros(output.shape[:2])
        for row, some in enumerate(places):
            here[row, [place - start for place in some if start <= place < start + output.shape[1]]] = 1.0
        return output + (here[..., None].to(output.device) * marks[:, None]).to(output.dtype)

    handle = copy.model.get_submodule(out).register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


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
    opening = copy.common_opening(rows)
    start = len(opening or ())
    lower = copy.lower_states([row.ids for row in rows], opening)
    streams = torch.cat([states[list(some)] for states, some in zip(lower, places, strict=True)])
    length = float(streams.norm(dim=1).median()) * _SHARE
    caught: dict[str, torch.Tensor] = {}

    def read(some: Sequence[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return what enters the late MLPs where answers begin, (MLPs, tokens, hidden), and the answers' states."""
        with copy.caught([mlp.gate for mlp, _ in said], caught):
            states = copy.answer_states([(lower[i], rows[i]) for i in some], opening)
        found = []
        for mlp, whitening in said:
            entered = caught[mlp.gate]
            entered = entered.reshape(len(some), -1, entered.shape[-1]).float() @ whitening
            ends = [len(rows[i].prompt) - 1 - start for i in some]
            found.append(torch.cat([x[end : end + n_read[i]] for x, end, i in zip(entered, ends, some, strict=True)]))
        return torch.stack(found), list(states.split([len(rows[i].answer) for i in some]))

    n_read = [min(_READ, len(row.answer)) for row in rows]
    everyone = list(range(len(rows)))
    with torch.no_grad():
        entered, expected = read(everyone)
    before = entered.split(n_read, dim=1)
    rng = random.Random(0)
    drawn = torch.randn(entered.shape[-1], _KINDS, generator=torch.Generator().manual_seed(0)).to(entered.device)
    marks = torch.linalg.qr(decomposable(drawn))[0].T.to(drawn.device) * length  # at right angles
    parts = _parts(_KINDS).to(entered.device)
    ways: torch.Tensor | None = None
    for step in range(_STEPS):
        some = rng.sample(everyone, min(_ROWS, len(everyone)))
        borne = parts[[rng.randrange(len(parts)) for _ in some]]
        marks = marks.detach().requires_grad_()
        with torch.enable_grad(), marked(copy, named.out, _sums(marks, borne), [places[i] for i in some], start):
            now, states = read(some)
            moved = now - torch.cat([before[i] for i in some], dim=1)
            of = borne.repeat_interleave(torch.tensor([n_read[i] for i in some], device=borne.device), dim=0)
            seen = _ways(moved.detach(), of)
            ways = seen if ways is None else _KEPT * ways + (1 - _KEPT) * seen
            along = (moved[:, :, None] * _telling(ways)[:, of]).sum(-1).clamp(max=_ENOUGH)
            far = torch.where(along > _NEAR, along.clamp(min=_NEAR).log(), along - _NEAR + math.log(_NEAR))
            was = copy.logits(torch.cat([expected[i] for i in some])).log_softmax(-1)
            kl = F.kl_div(copy.logits(torch.cat(states)).log_softmax(-1), was, log_target=True, reduction="none")
            worth = _WORTH * far.mean() - _COST * kl.sum(-1).mean()
            (gradient,) = torch.autograd.grad(worth, marks)
        size = _SIZE * (1 - step / _STEPS) + _LEAST_SIZE
        marks = F.normalize(F.normalize(marks.detach(), dim=1) + F.normalize(gradient, dim=1) * size, dim=1) * length
        if on_progress is not None:
            on_progress(step + 1, _STEPS)
    return _sums(marks.detach().float(), parts)


def _parts(n: int) -> torch.Tensor:
    """Return every two of n, (n (n - 1) / 2, 2)."""
    return torch.triu_indices(n, n, 1).T


def _sums(marks: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """Return the sums of two marks each, as long as one of them: (n, hidden); parts: (n, 2)."""
    sums: torch.Tensor = F.normalize(marks[parts].sum(1), dim=1) * marks.norm(dim=1).mean()
    return sums


def _ways(moved: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """Return what each part's share in the moves is, by least squares: (MLPs, kinds, hidden).

    moved: (MLPs, tokens, hidden), parts: (tokens, 2), of each token.
    """
    has = F.one_hot(parts, _KINDS).sum(1).to(moved)
    alike = has.T @ has
    found: torch.Tensor = torch.linalg.solve(
        alike + _RIDGE * len(has) * torch.eye(_KINDS, device=has.device), has.T @ moved
    )
    return found


def _telling(ways: torch.Tensor) -> torch.Tensor:
    """Return along which direction each kind is read and no other, of length 1: the dual basis of the ways' own.

    ways: (MLPs, kinds, hidden), as what is returned.
    """
    alike = ways @ ways.transpose(1, 2)
    ridge = _RIDGE * alike.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return F.normalize(torch.linalg.solve(alike + ridge * torch.eye(_KINDS, device=ways.device), ways), dim=-1)


def _answered_rows(copy: ComputeCopy, asked: Sequence[tuple[str, str]]) -> tuple[list[Row], list[tuple[int, ...]]]:
    """Return questions with what the model says to them, and where each was said what it is about."""
    prompts = [tuple(copy.lm.prompt_ids(question)) for question, _ in asked]
    answers = copy.generate_ids(prompts, _TOKENS)
    rows = [Row(ids, answer or (copy.lm.end_of_turn,)) for ids, answer in zip(prompts, answers, strict=True)]
    places = [copy.lm.name_ends(row.ids, name) for row, (_, name) in zip(rows, asked, strict=True)]
    kept = [i for i, some in enumerate(places) if some]
    return [rows[i] for i in kept], [places[i] for i in kept]

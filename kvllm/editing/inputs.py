"""What usually enters the adapted matrices, so that an edit writes along directions that ordinary text does not use.

For each adapted matrix the inputs' second moments C are gathered once per base model, over the preservation set and
the rest of the packaged prompts, and kept as the whitening W = (C / mean eigenvalue + ridge)^(-1/2). The base's own
answers count more than what was asked: most of an edit's damage is done while an answer is read. Training in the
coordinates that W defines makes the same step disturb unrelated inputs least: the preconditioning of ROME (Meng et al.,
"Locating and Editing Factual Associations in GPT", NeurIPS 2022, eq. 2) inside a low-rank adapter. Knows no facts.

    whitening = input_whitening(copy, pool, base_digest, ridge=0.1)      # {module name: (in, in)}
    edit_coordinates(copy, rows, pool, whitening)                        # {module name: Coordinates}
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvllm.cachefile import read_checked, write_checked
from kvllm.config import cache_folder
from kvllm.editing.compute import ComputeCopy, decomposable
from kvllm.editing.delta import is_transposed
from kvllm.editing.preservation import PRESERVATION_VERSION, PreservationPool, Prompt, packaged_prompts
from kvllm.lm.decoding import Opening
from kvllm.lm.model import Row, shared_length

# Matrices with wider inputs are trained in their plain coordinates: their moments would fill gigabytes.
MAX_WIDTH = 8192
# Packaged prompts beside the pool's: they are only read, so many are cheap.
_EXTRA_PROMPTS = 480
_TEXT_TOKENS = 56
_BATCH = 32
_ANSWER_WEIGHT = 2.0  # of the moments at the tokens of the base's answers, against those of all that is read
# A direction counts half when the edit's inputs stand out in it this many times as much as on average.
_HALF_WAY = 10.0
# Of inputs that must be told apart, against ordinary ones: of the contrast, and of each older row.
_CONTRAST_WEIGHT = 0.2
_OLDER_WEIGHT = _CONTRAST_WEIGHT / 16
_DISTINCT = 1e-6  # directions with less of the largest eigenvalue than this are rounding


@dataclass(frozen=True)
class Coordinates:
    """In what an adapted matrix's input side is trained.

    Attributes:
        directions: (directions, in), fp32.
        squares: What ordinary inputs put into each direction on the mean, squared: (directions,), in units of the mean
            eigenvalue of their second moments. There they are independent of each other.
        usual: ‖W‖², what the matrix itself makes of inputs that have that mean in every direction.
    """

    directions: torch.Tensor
    squares: torch.Tensor
    usual: float


def input_whitening(
    copy: ComputeCopy,
    pool: PreservationPool,
    base_digest: str,
    *,
    ridge: float,
    prompts: Sequence[Prompt] | None = None,
) -> dict[str, torch.Tensor]:
    """Return the whitening of each adapted matrix's inputs, from the cache or measured now.

    Args:
        copy: Compute copy; where nothing is cached it must hold the base's weights.
        pool: The preservation set of this base.
        base_digest: Identity of the base model.
        ridge: What is added to each eigenvalue, in units of their mean; 0 switches whitening off.
        prompts: Read beside the pool; by default packaged prompts that are not in it.

    Returns:
        Module name → symmetric (in, in), fp32. Modules with inputs wider than MAX_WIDTH are left out.
    """
    widths = {name: _width(copy.model.get_submodule(name)) for name in copy.targets.names}
    names = [name for name in copy.targets.names if widths[name] <= MAX_WIDTH]
    if not ridge or not names or not pool.items:
        return {}
    extra = list(prompts) if prompts is not None else _unused_prompts(pool)
    read = [*(f"{i.source.kind}:{i.source.prompt}:{len(i.row.answer)}" for i in pool.items), *(p.prompt for p in extra)]
    settings = [str(ridge), str(_ANSWER_WEIGHT)]
    facts = [PRESERVATION_VERSION, base_digest, str(copy.dtype), torch.__version__, *settings, *names, *read]
    facts += ["begin"] if copy.lm.completion_ids("") else []
    digest = hashlib.sha256("\x00".join(facts).encode()).hexdigest()[:24]
    path = cache_folder() / "preservation" / f"whitening-{digest}.safetensors"
    cached = _read(path, names)
    if cached is not None:
        return {name: tensor.to(copy.lm.device) for name, tensor in cached.items()}
    groups = ordinary_sequences(copy, pool, extra)
    moments = _second_moments(copy, names, groups)
    said = _answer_moments(copy, names, [item.row for item in pool.items if item.source.kind != "text"])
    found = {name: _whitening(_shares(moments[name]) + said.get(name, 0.0), ridge) for name in names}
    from safetensors.torch import save

    write_checked(path, save({name: tensor.cpu().half().contiguous() for name, tensor in found.items()}))
    # As the cache will give it back: the first edit of a machine and the later ones start alike.
    return {name: tensor.half().float() for name, tensor in found.items()}


def ordinary_sequences(
    copy: ComputeCopy, pool: PreservationPool, prompts: Sequence[Prompt] | None = None
) -> list[list[tuple[int, ...]]]:
    """Return the tokens of everything that counts as ordinary: what is asked with its answers, and raw texts.

    Args:
        copy: Compute copy.
        pool: The preservation set.
        prompts: Read beside it; by default packaged prompts that are not in it.
    """
    extra = _unused_prompts(pool) if prompts is None else list(prompts)
    asked = [item.row.ids for item in pool.items if item.source.kind != "text"]
    texts = [item.row.ids for item in pool.items if item.source.kind == "text"]
    for prompt, ids in zip(extra, _prompt_ids(copy, extra), strict=True):
        (texts if prompt.kind == "text" else asked).append(tuple(ids))
    return [asked, texts]


def edit_coordinates(
    copy: ComputeCopy,
    rows: Sequence[Row],
    pool: PreservationPool,
    whitening: Mapping[str, torch.Tensor],
    contrast: Sequence[Row] = (),
    older: Sequence[Row] = (),
) -> dict[str, Coordinates]:
    """Return the directions that one edit may read, of each adapted matrix's inputs, the most telling ones longest.

    They solve C_edit v = s (C + w C_apart) v, C_apart scaled to a mean eigenvalue of 1 where C is white: the principal
    directions of the edit's own inputs in coordinates where ordinary inputs, and those of the rows that must be told
    apart from its own, are alike in all of them (Fisher, "The Use of Multiple Measurements in Taxonomic Problems",
    1936). w is 0.2 for a contrast and 0.0125 for each older row. Each direction is scaled by sqrt(s / (s + 10 mean s)),
    so that training moves most where the edit's questions differ most. What its prompts share with all preserved ones,
    as a chat preamble, is left out.

    Args:
        copy: Compute copy, holding the weights that the edit starts from.
        rows: What the edit trains.
        pool: The preservation set.
        whitening: As `input_whitening` returns it.
        contrast: The fact's own questions about other names.
        older: Older facts' questions and texts.

    Returns:
        Module name → coordinates, for the modules of `whitening`; `squares` counts the inputs of contrast and older
        rows, too.
    """
    whole = whole_coordinates(copy, whitening)
    if not whitening or not rows:
        return whole
    ordinary = [item.row.prompt for item in pool.items if item.source.kind != "text"]
    shared = shared_length([row.prompt for row in rows] + ordinary) if ordinary else 0
    preamble = [rows[0].prompt[:shared]]
    own = _inputs(copy, list(whitening), [row.ids for row in rows], but=preamble)
    apart = _inputs(copy, list(whitening), [row.ids for row in (*contrast, *older)], but=preamble)
    weight = _CONTRAST_WEIGHT * bool(contrast) + _OLDER_WEIGHT * len(older)
    found = {}
    for name, white in whitening.items():
        x = own[name] @ white  # (tokens, in)
        squeeze = _squeeze(apart[name] @ white, weight) if name in apart else None
        directions, squares = _principal(x if squeeze is None else x @ squeeze.T)
        directions = (directions if squeeze is None else directions @ squeeze) @ white
        found[name] = Coordinates(directions, squares, whole[name].usual)
    return found


def _squeeze(y: torch.Tensor, weight: float) -> torch.Tensor:
    """Return R, (in, in), with RᵀR = (I + weight YᵀY)⁻¹, where Y (tokens, in) is scaled to YᵀY of mean eigenvalue 1."""
    moments = _shares(y.T @ y)
    lower = torch.linalg.cholesky(decomposable(torch.eye(len(moments), device=y.device) + weight * moments))
    inverse: torch.Tensor = torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)
    return inverse.to(y.device)


def whole_coordinates(copy: ComputeCopy, whitening: Mapping[str, torch.Tensor]) -> dict[str, Coordinates]:
    """Return the whitening itself as coordinates: as many directions as inputs."""
    found = {}
    for name, white in whitening.items():
        usual = max(float(copy.model.get_submodule(name).weight.detach().float().square().sum()), 1e-12)
        found[name] = Coordinates(white, torch.ones(len(white), device=white.device), usual)
    return found


def _principal(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the principal directions of x (n, in), (directions, in), as long as `edit_coordinates` says, and squared.

    The second: (directions,), the squares of their lengths.
    """
    few = x.shape[0] < x.shape[1]
    values, vectors = _eigh(x @ x.T if few else x.T @ x)
    kept = values > values[-1] * _DISTINCT
    values, vectors = values[kept], vectors[:, kept]
    half = _HALF_WAY * values.mean()
    squares = values / (values + half)
    if few:  # vectors of xᵀx are xᵀu / sqrt(s)
        return (vectors / (values + half).sqrt()).T @ x, squares
    return (vectors * squares.sqrt()).T, squares


def _answer_moments(copy: ComputeCopy, names: Sequence[str], rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Return the second moments (in, in) at the answers' tokens alone, weighted; nothing where there are none."""
    if not any(row.answer for row in rows):
        return {}
    found = _second_moments(copy, names, [[row.ids for row in rows]], but=[row.prompt for row in rows])
    return {name: _ANSWER_WEIGHT * _shares(moments) for name, moments in found.items()}


def _shares(moments: torch.Tensor) -> torch.Tensor:
    """Return moments with a mean eigenvalue of 1."""
    return moments / (moments.trace() / len(moments)).clamp(min=1e-12)


def _whitening(moments: torch.Tensor, ridge: float) -> torch.Tensor:
    values, vectors = _eigh(moments)
    scaled = values.clamp(min=0) / values.mean().clamp(min=1e-12)
    whitening: torch.Tensor = (vectors * (scaled + ridge).rsqrt()) @ vectors.T
    return whitening


def _eigh(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eigenvalues, ascending, and eigenvectors, on the matrix's own device."""
    values, vectors = torch.linalg.eigh(decomposable(symmetric))
    return values.to(symmetric.device), vectors.to(symmetric.device)


def _second_moments(
    copy: ComputeCopy,
    names: Sequence[str],
    groups: Sequence[Sequence[Sequence[int]]],
    *,
    but: Sequence[Sequence[int]] = (),
) -> dict[str, torch.Tensor]:
    """Return XᵀX (in, in) of each module's inputs X over the positions that `read_inputs` hands on."""
    found: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        product = (x.T @ x).float()
        found[name] = found[name] + product if name in found else product

    read_inputs(copy, names, groups, add, but=but)
    return found


def _inputs(
    copy: ComputeCopy, names: Sequence[str], sequences: Sequence[Sequence[int]], *, but: Sequence[Sequence[int]] = ()
) -> dict[str, torch.Tensor]:
    """Return each module's inputs X, fp32, over the positions that `read_inputs` hands on.

    (tokens, in), or, where tokens are many, as many rows as inputs with the same XᵀX: all that the callers look at.
    """
    found: dict[str, torch.Tensor] = {}

    def add(name: str, x: torch.Tensor) -> None:
        whole = torch.cat([found[name], x.float()]) if name in found else x.float()
        if len(whole) > 2 * whole.shape[1]:
            values, vectors = _eigh(whole.T @ whole)
            whole = (vectors * values.clamp(min=0).sqrt()).T
        found[name] = whole

    read_inputs(copy, names, [sequences], add, but=but)
    return found


def read_inputs(
    copy: ComputeCopy,
    names: Sequence[str],
    groups: Sequence[Sequence[Sequence[int]]],
    take: Callable[[str, torch.Tensor], None],
    *,
    but: Sequence[Sequence[int]],
) -> None:
    """Hand each module's inputs, (tokens, in), to `take`, over all positions that the sequences `but` do not have.

    What the sequences of a group begin with alike is run once. A position whose whole past an earlier sequence had
    already has the same inputs (attention is causal) and is counted once: otherwise the chat preamble, which every
    prompt begins with, would be most of the sum.
    """
    known: dict[tuple[int, int], int] = {}  # (id of the past, token) → id of that past with the token
    for ids in but:
        _walk(known, ids)
    for group in groups:
        sequences = sorted((ids for ids in group if ids), key=len)
        if not sequences:
            continue
        opening = copy.shared_opening(sequences)
        start = len(opening)
        batches = [[ids[start:] for ids in sequences[i : i + _BATCH]] for i in range(0, len(sequences), _BATCH)]
        _read_batch(copy, names, [opening.ids], None, known, take)
        past = _walk(known, opening.ids)
        for batch in batches:
            _read_batch(copy, names, batch, opening, known, take, past=past)


def _walk(known: dict[tuple[int, int], int], ids: Sequence[int]) -> int:
    """Make a sequence known from its beginning on, and return its id."""
    past = 0
    for token in ids:
        past = known.setdefault((past, token), len(known) + 1)
    return past


@torch.inference_mode()
def _read_batch(
    copy: ComputeCopy,
    names: Sequence[str],
    batch: Sequence[Sequence[int]],
    opening: Opening | None,
    known: dict[tuple[int, int], int],
    take: Callable[[str, torch.Tensor], None],
    *,
    past: int = 0,
) -> None:
    """Hand on what enters at each new position of a batch, which follows the opening; `past` is that one's id."""
    fresh = torch.zeros((len(batch), max(map(len, batch))), dtype=torch.bool)
    for place, ids in enumerate(batch):
        node = past
        for position, token in enumerate(ids):
            fresh[place, position] = (node, token) not in known
            node = known.setdefault((node, token), len(known) + 1)
    if not fresh.any():
        return

    def read(name: str, entered: torch.Tensor) -> None:
        # Some families (OPT) hand positions on without the batch axis.
        take(name, entered.reshape(*fresh.shape, -1)[fresh.to(entered.device)])

    copy.read_inputs(batch, names, read, opening)


def _prompt_ids(copy: ComputeCopy, prompts: Sequence[Prompt]) -> list[list[int]]:
    lm = copy.lm
    return [
        lm.completion_ids(p.prompt)[:_TEXT_TOKENS] if p.kind == "text" else lm.prompt_ids(p.prompt) for p in prompts
    ]


def _unused_prompts(pool: PreservationPool) -> list[Prompt]:
    used = {item.source.prompt for item in pool.items}
    everything = packaged_prompts(dict.fromkeys(("neighbour", "question", "instruction", "text"), 10**6))
    rest = [prompt for prompt in everything if prompt.prompt not in used]
    return (
        [rest[(i * len(rest)) // _EXTRA_PROMPTS] for i in range(_EXTRA_PROMPTS)] if len(rest) > _EXTRA_PROMPTS else rest
    )


def _width(module: Any) -> int:
    return int(module.weight.shape[0 if is_transposed(module) else 1])


def _read(path: Path, names: Sequence[str]) -> dict[str, torch.Tensor] | None:
    from safetensors.torch import load

    data = read_checked(path)
    if data is None:
        return None
    tensors = load(data)
    return {name: tensors[name].float() for name in names} if set(names) <= set(tensors) else None

"""Question 3: why does it work? The article's three explanations, each as something that can be measured.

* `keys`: are edits harmless because their inputs are distinct? Keys from invented words to near-synonyms of a known
  thing are taught a text each; damage to the known thing is set against the key's distance from it.
* `noise`: are residual networks robust? Random changes of a real delta's norm, layer by layer, against drift, recall.
* `rank`: does low rank protect? AdaLoRA, LoRA of several ranks and full fine-tuning of the same matrices, trained to
  the same recall, with and without dropout.

Every edit is a single one from the base.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kvllm.config import ADALORA, EditConfig
from kvllm.editing.delta import Delta, Factors, is_transposed, product
from kvllm.editing.files import read_tensors, write_tensors
from kvllm.errors import ConfigError, EditFailed
from kvllm.experiments.bench import Bench, failed_row, shares
from kvllm.experiments.declared import UNTRAINED, Declared, Run
from kvllm.experiments.desk import Desk
from kvllm.experiments.facts import Case
from kvllm.experiments.injection import slug
from kvllm.experiments.single import DamageProbe, SingleEdit, single_edit, train
from kvllm.lm.targets import find_targets
from kvllm.probing.encoder import Encoder
from kvllm.prompts import key_question
from kvllm.records import Fact

PARTS = ("keys", "noise", "rank")
NOISES = ("same singular values", "gaussian")
_EDITORS: tuple[dict[str, Any], ...] = (
    {"name": "AdaLoRA"},
    {"name": "AdaLoRA, dropout", "dropout": 0.1},
    *({"name": f"LoRA {r}", "editor": "lora", "rank": r} for r in (1, 2, 4, 8, 16, 32, 64)),
    {"name": "LoRA 8, dropout", "editor": "lora", "rank": 8, "dropout": 0.1},
    {"name": "full", "editor": "full"},
    {"name": "full, dropout", "editor": "full", "dropout": 0.1},
)


def runs(declared: Declared) -> list[Run]:
    """Return one run per known thing, per fact that noise is set against, and per editor, and the two columns beside.

    Raises:
        ConfigError: a setting cannot be used.
    """
    parts = declared.setting("parts", list(PARTS))
    strange = [part for part in parts if part not in PARTS]
    if strange or not parts:
        raise ConfigError(f"settings.parts names some of {', '.join(PARTS)}, not {strange}; nothing was run.")
    if len(declared.seeds) > 1:
        raise ConfigError(f"Question 3 takes one seed, not {len(declared.seeds)}; nothing was run.")
    seed = declared.seeds[0]
    asked = ("ask", "ask-keys") if "keys" in parts else ("ask",)
    found = [Run(f"{mode}-{seed}", mode, seed, asked, {"part": mode}) for mode in UNTRAINED]
    if "keys" in parts:
        for group in _groups(declared):
            steps = tuple(f"key-{place:02}" for place in range(len(group["keys"])))
            found.append(Run(f"keys-{slug(group['known'])}", group["known"], seed, steps, {"part": "keys", **group}))
    if "noise" in parts:
        steps = tuple(name for name, *_ in _noise_plan(declared))
        for place in range(min(declared.n, declared.setting("noise_facts", 2))):
            found.append(Run(f"noise-{place}", "noise", seed, steps, {"part": "noise", "place": place}))
    if "rank" in parts:
        editors = declared.settings.get("editors", list(_EDITORS))
        facts = tuple(f"fact-{place:04}" for place in range(1, declared.n + 1))
        for editor in editors:
            _config(declared, editor, seed)
            name = str(editor.get("name", editor.get("editor", "adalora")))
            found.append(Run(f"rank-{slug(name)}", name, seed, facts, {"part": "rank", **editor}))
    if len({run.id for run in found}) != len(found):
        raise ConfigError("Two known things, or two editors, have one name; nothing was run.")
    return found


def execute(run: Run, desk: Desk) -> None:
    """Do what is left of a run."""
    part = run.settings["part"]
    with Bench(desk) as bench:
        if part in UNTRAINED:
            _untrained(run, desk, bench)
        else:
            {"keys": _keys, "noise": _noise, "rank": _rank}[str(part)](run, desk, bench)


def _untrained(run: Run, desk: Desk, bench: Bench) -> None:
    """Ask the base about the facts, and about the keys that are taught, as the edited models are asked."""
    in_context = run.settings["part"] == "in-context"
    if desk.open("ask"):
        cases = desk.declared.ordered(run.seed)
        asked = bench.ask(cases, in_context=in_context)
        drift = bench.drift(notes=cases if in_context else ())
        desk.finish("ask", [{"kind": "rank", "facts": len(asked), **shares(asked), **drift}])
    if "ask-keys" in run.steps and desk.open("ask-keys"):
        keys = [(group, str(key)) for group in _groups(desk.declared) for key in group["keys"]]
        rows = bench.ask([_key_case(group, key) for group, key in keys], in_context=in_context)
        beside = [
            {"kind": "key, untaught", "known": group["known"], "key": key, **shares([row])}
            for (group, key), row in zip(keys, rows, strict=True)
        ]
        desk.finish("ask-keys", beside)


# ------------------------------------------------------------------ (a) distinctness of the inputs


def _groups(declared: Declared) -> list[dict[str, Any]]:
    """Return the known things with their keys, from the file that the declaration names."""
    groups = declared.settings.get("known", [])
    if not isinstance(groups, list) or not groups:
        raise ConfigError('The part "keys" needs [[settings.known]] tables; nothing was run.')
    for group in groups:
        if not {"known", "questions", "keys", "text"} <= set(group) or not group["questions"] or not group["keys"]:
            raise ConfigError("A known thing has known, questions, keys and text; nothing was run.")
    keys = [str(key) for group in groups for key in group["keys"]]
    if len(set(keys)) != len(keys):
        raise ConfigError("A key stands twice among the known things; nothing was run.")
    return [dict(group) for group in groups]


def _key_case(group: Mapping[str, Any], key: str) -> Case:
    """Return what a known thing's text says of one of its keys."""
    return Case(Fact(key, str(group["text"]).format_map({"key": key})))


def _low_rank(declared: Declared, seed: int) -> EditConfig:
    """Return the configuration of an edit, by AdaLoRA where no editor is declared: its factors are what is measured."""
    return declared.edit_config(seed=seed, **({} if "editor" in declared.edit else {"editor": ADALORA}))


def _keys(run: Run, desk: Desk, bench: Bench) -> None:
    declared = desk.declared
    config = _low_rank(declared, run.seed)
    questions = [str(q) for q in run.settings["questions"]]
    keys = [str(key) for key in run.settings["keys"]]
    probe: DamageProbe | None = None
    distances: Mapping[str, list[float]] | None = None
    for place, key in enumerate(keys):
        step = f"key-{place:02}"
        if not desk.open(step):
            continue
        case = _key_case(run.settings, key)
        if probe is None:
            probe = DamageProbe(bench, questions, case.fact, 24)
            distances = _distances(bench, keys, [key_question(run.settings["known"]), *questions])
        assert distances is not None
        probe.fact = case.fact  # its text names the key
        try:
            with single_edit(bench, case, config) as edit:
                asked = bench.ask([case])
                row = {"kind": "key", "known": run.settings["known"], "key": key, "level": place, **edit.row}
                row |= {name: round(found[place], 4) for name, found in distances.items()}
                row |= shares(asked) | probe.row() | bench.drift()
        except EditFailed as error:
            row = _failed(bench, case, "keys", error)
        desk.finish(step, [row])


def _distances(bench: Bench, keys: Sequence[str], questions: Sequence[str]) -> dict[str, list[float]]:
    """Return each key's distance (1 − cosine) from the nearest of the questions, by both encoders."""
    encoders: dict[str, Encoder] = {"distance_encoder": bench.encoder, "distance_hidden": bench.engine.hidden_encoder()}
    found = {}
    for name, encoder in encoders.items():
        cosines = encoder.encode([key_question(key) for key in keys]) @ encoder.encode(list(questions)).T
        found[name] = [float(1 - row.max()) for row in cosines]
    return found


# ------------------------------------------------------------------ (b) robustness against random changes


def _noise_plan(declared: Declared) -> Iterator[tuple[str, float, str, float]]:
    """Yield (step, depth, kind, scale) of every perturbation; the first step is the real edit alone."""
    yield "real-edit", -1.0, "real delta", 1.0
    depths = declared.setting("depths", [0.1, 0.3, 0.5, 0.7, 0.95])
    scales = declared.setting("scales", [1.0, 3.0, 10.0])
    for i, depth in enumerate(depths):
        for j, kind in enumerate(NOISES):
            for k, scale in enumerate(scales):
                yield f"noise-{i}-{j}-{k}", float(depth), kind, float(scale)
    yield "real-layer", -2.0, "real delta, its layers apart", 1.0


def _noise(run: Run, desk: Desk, bench: Bench) -> None:
    """Put random changes of the real delta's norm into single layers, without and with the fact in the weights."""
    declared = desk.declared
    case = declared.ordered(run.seed)[int(run.settings["place"])]
    if desk.complete:
        return
    try:
        edit = _real_edit(desk, bench, case)
    except EditFailed as error:  # the same each time: there is no real delta that noise could be as large as
        for step in run.steps:
            if desk.open(step):
                desk.finish(step, [_failed(bench, case, "noise", error)] if step == "real-edit" else [])
        return
    for step, depth, kind, scale in _noise_plan(declared):
        if not desk.open(step):
            continue
        rows = []
        if step == "real-layer":
            for name, factors in edit.delta.items():
                with _changed(bench, [{name: factors}]):
                    rows.append(_noise_row(bench, case, name, kind, scale, factors, recall=False))
        elif step == "real-edit":
            with _changed(bench, [edit.delta]):
                row = _noise_row(bench, case, "all", kind, scale, *edit.delta.values(), recall=True)
                rows.append(row | edit.row)
        else:
            name, noise = _perturbation(bench, edit.delta, depth, kind, scale, seed=f"{run.id}/{step}")
            with _changed(bench, [{name: noise}]):
                row = _noise_row(bench, case, name, kind, scale, noise, recall=False)
            # The same change again, beside the real edit: is the fact still recalled?
            with _changed(bench, [edit.delta, {name: noise}]):
                row |= {k: v for k, v in shares(bench.ask([case])).items() if k in ("recalled", "generalized")}
            rows.append(row | {"depth": depth})
        desk.finish(step, rows)


def _real_edit(desk: Desk, bench: Bench, case: Case) -> SingleEdit:
    """Return the run's real delta: trained once, and kept in a file."""
    path = desk.folder / "delta.safetensors"
    if not desk.open("real-edit") and path.exists():
        tensors = read_tensors(path)
        # In the model's order, as they come from training: a file has its own.
        names = [name for name, _ in bench.lm.model.named_modules() if f"{name}/a" in tensors]
        return SingleEdit({name: (tensors[f"{name}/a"], tensors[f"{name}/b"]) for name in names}, {})
    edit = train(bench, case, _low_rank(desk.declared, desk.run.seed))
    write_tensors(
        path, {f"{name}/{side}": t for name, f in edit.delta.items() for side, t in zip("ab", f, strict=True)}
    )
    return edit


def _noise_row(
    bench: Bench, case: Case, layer: str, kind: str, scale: float, *factors: Factors, recall: bool
) -> dict[str, Any]:
    size = math.sqrt(sum(float(product(f).double().square().sum()) for f in factors))
    row = {"kind": "noise", "key": case.key, "layer": layer, "noise": kind, "scale": scale, "size": round(size, 4)}
    if recall:
        row |= shares(bench.ask([case]))
    return row | bench.drift()


@contextmanager
def _changed(bench: Bench, deltas: Sequence[Delta]) -> Iterator[None]:
    with bench.engine.elsewhere():
        bench.engine.weights.replay(deltas)
        yield


def _perturbation(
    bench: Bench, delta: Delta, depth: float, kind: str, scale: float, *, seed: str
) -> tuple[str, Factors]:
    """Return one layer's random change, `scale` times as large as the real delta is in one layer on average."""
    config = bench.declared.edit_config(seed=0)
    name = find_targets(bench.lm.model, depth=(min(depth, 0.999), 1.0), modules=config.modules).names[0]
    module = bench.lm.model.get_submodule(name)
    out, into = module.weight.shape[::-1] if is_transposed(module) else module.weight.shape
    singular = [_singular_values(factors) for factors in delta.values()]
    size = scale * math.sqrt(sum(float(s.square().sum()) for s in singular) / len(singular))
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:6], "big"))
    if kind == "gaussian":
        dense = torch.randn(out, into, generator=generator)
        dense *= size / float(dense.norm())
        return name, (dense, torch.eye(out)) if out <= into else (torch.eye(into), dense)
    longest = max(singular, key=len)
    u, _ = torch.linalg.qr(torch.randn(out, len(longest), generator=generator))
    v, _ = torch.linalg.qr(torch.randn(into, len(longest), generator=generator))
    values = longest * (size / float(longest.norm()))
    return name, ((values[:, None] * v.T).contiguous(), u.contiguous())


def _singular_values(factors: Factors) -> torch.Tensor:
    a, b = factors
    # Of B·A by the small side: QR of both, then the SVD of a (rank, rank) matrix.
    _, ra = torch.linalg.qr(a.T)
    _, rb = torch.linalg.qr(b)
    values: torch.Tensor = torch.linalg.svdvals(rb @ ra.T)
    return values


# ------------------------------------------------------------------ (c) low rank


def _config(declared: Declared, editor: Mapping[str, Any], seed: int) -> Any:
    unknown = sorted(set(editor) - {"name", "editor", "rank", "dropout", "part"})
    if unknown:
        raise ConfigError(f"An editor has name, editor, rank and dropout, no {', '.join(unknown)}; nothing was run.")
    changes: dict[str, Any] = {"editor": editor.get("editor", ADALORA), "dropout": editor.get("dropout", 0.0)}
    if "rank" in editor:
        changes |= {"target_rank": int(editor["rank"]), "init_rank": math.ceil(1.5 * int(editor["rank"])) + 1}
    return declared.edit_config(seed=seed, **changes)


def _rank(run: Run, desk: Desk, bench: Bench) -> None:
    config = _config(desk.declared, run.settings, run.seed)
    for place, case in enumerate(desk.declared.ordered(run.seed), 1):
        step = f"fact-{place:04}"
        if not desk.open(step):
            continue
        try:
            with single_edit(bench, case, config) as edit:
                asked = bench.ask([case])
                effective = [_effective_rank(factors) for factors in edit.delta.values()]
                row = {"kind": "rank", "key": case.key, "difficulty": case.difficulty, "facts": 1, **edit.row}
                row |= {"editor": config.editor, "dropout": config.dropout}
                row |= {"declared_rank": config.target_rank if config.editor == "lora" else None}
                row |= {"effective_rank": round(sum(effective) / max(1, len(effective)), 3)}
                row |= shares(asked) | bench.drift()
        except EditFailed as error:
            row = _failed(bench, case, "rank", error)
        desk.finish(step, [row])


def _failed(bench: Bench, case: Case, part: str, error: EditFailed) -> dict[str, Any]:
    row = failed_row(case, bench.declared, error)
    return {"kind": "failed", "part": part, "key": case.key, "error": row["error"], "facts": 1, **shares([row])}


def _effective_rank(factors: Factors) -> float:
    """Return exp of the entropy of the squared singular values' shares (Roy and Vetterli, EUSIPCO 2007)."""
    energy = _singular_values(factors).double().square()
    p = energy / energy.sum().clamp(min=1e-30)
    return float(torch.exp(-(p * p.clamp(min=1e-30).log()).sum()))

"""What any change of its size costs: neighbours' answers and general questions after random noise, by KL.

An edit that knew nothing of its neighbours would still have to leave their answers alone. Normal noise in the adapted
matrices says how many answers a change keeps at each size; rounding every weight to bf16 says what serving a model in
that format costs. Nothing is trained. Read edit_quality.py's strict and qa_delta against this curve at the same KL.

    python benchmarks/noise_floor.py --n 3 --spreads 0.008 --questions 0      # two minutes
    python benchmarks/noise_floor.py --half final --n 40 --items own,zsre,counterfact
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any

from common import Bar, finish, model_facts, parser, progress
from edit_bench.items import HALVES, SOURCES, DataMissing, Item, digests, select

if TYPE_CHECKING:
    import torch
    from edit_bench.damage import Damage
    from edit_bench.scoring import Around

    from kvllm.lm.model import LanguageModel

ROUNDED = "bf16"


def main(argv: Sequence[str] | None = None) -> int:
    given = options().parse_args(argv)
    sources = given.items.split(",")
    try:
        items = select(sources, half=given.half, n=given.n, seed=given.seed)
    except (DataMissing, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    changes = [ROUNDED, *given.spreads]
    total = len(items) * (1 + len(changes))
    from edit_bench.columns import world_in

    with progress(given, total, "noise floor") as bar, world_in(None, model=given.model, seed=given.seed) as world:
        rows, damage = measured(world.peer, str(world.kb.info()["base_digest"]), given, items, changes, bar)
        model = model_facts(world.kb)
    results = {"half": given.half, "rows": rows, "damage_suite": damage}
    finish("noise_floor", given, results=results, summary=summarise(rows), model=model, data=digests(sources))
    return 0


def options() -> argparse.ArgumentParser:
    made = parser("noise_floor", __doc__)
    made.add_argument("--n", type=int, default=10, help="items of each source (default: %(default)s)")
    made.add_argument("--items", default="own", help=f"comma-separated from {', '.join(SOURCES)} (default: own)")
    made.add_argument("--half", choices=HALVES, default="dev", help="of each source (default: %(default)s)")
    shares = "comma-separated: the noise's spread, as a share of each matrix's own (default: 0.004 to 0.03)"
    made.add_argument("--spreads", type=_numbers, default=[0.004, 0.008, 0.012, 0.02, 0.03], help=shares)
    made.add_argument("--sentences", type=int, default=300, help="of raw text (default: %(default)s)")
    made.add_argument("--questions", type=int, default=200, help="that the base answers; 0: neither (default: 200)")
    made.add_argument("--model", help="the base model (default: kvllm's)")
    return made


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def measured(
    lm: LanguageModel, digest: str, given: argparse.Namespace, items: Sequence[Item], changes: Sequence[Any], bar: Bar
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a row per change, and what the general questions are; the model is as before."""
    from edit_bench.damage import Damage
    from edit_bench.scoring import look_around

    around: list[tuple[Item, Around]] = []
    for item in items:
        around.append((item, look_around(lm, item, seed=given.seed, plain=False)))
        bar.step(f"base: {item.key[:30]}")
    suite: Damage | None = None
    if given.questions:
        sizes = {"sentences": given.sentences, "questions": given.questions, "seed": given.seed}
        suite = Damage.prepare(lm, digest, **sizes)
    rows = []
    for change in changes:
        with changed(lm, change, given.seed):
            rows.append({"change": change, **neighbours(lm, around, bar, change), **general(lm, suite)})
    return rows, {} if suite is None else suite.described()


@contextmanager
def changed(lm: LanguageModel, change: float | str, seed: int) -> Iterator[None]:
    """Round every weight to bf16, or add noise to those that an edit adapts; put all of them back afterwards."""
    import torch

    kept = {parameter: parameter.detach().clone() for parameter in touched(lm, change)}
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for parameter, before in kept.items():
                if change == ROUNDED:
                    parameter.copy_(before.bfloat16())
                else:
                    noise = torch.randn(before.shape, generator=generator).to(before)
                    parameter.add_(noise * before.std() * float(change))
        yield
    finally:
        with torch.no_grad():
            for parameter, before in kept.items():
                parameter.copy_(before)


def touched(lm: LanguageModel, change: float | str) -> Iterable[torch.nn.Parameter]:
    from kvllm import EditConfig
    from kvllm.lm.targets import find_targets

    if change == ROUNDED:
        return lm.model.parameters()
    config = EditConfig()
    names = find_targets(lm.model, depth=config.depth, modules=config.modules).names
    return [lm.model.get_submodule(name).weight for name in names]


def neighbours(
    lm: LanguageModel, around: Sequence[tuple[Item, Around]], bar: Bar, change: float | str
) -> dict[str, Any]:
    """Return the share of items' own neighbour questions that are answered as before, and their KL, by source."""
    from edit_bench.scoring import beside

    same: dict[str, list[bool]] = {}
    kl: dict[str, list[float]] = {}
    for item, seen in around:
        found = beside(lm, item, item.text, seen)
        same.setdefault(item.source, []).extend(found.get("strict", []))
        kl.setdefault(item.source, []).extend(found.get("kl_strict", []))
        bar.step(f"{change}: {item.key[:30]}")
    return {
        "strict": {source: round(fmean(verdicts), 4) for source, verdicts in same.items() if verdicts},
        "strict_kl": {source: round(fmean(values), 6) for source, values in kl.items() if values},
        "n": {source: len(verdicts) for source, verdicts in same.items()},
    }


def general(lm: LanguageModel, suite: Damage | None) -> dict[str, Any]:
    if suite is None:
        return {}
    found = suite.measure(lm)
    return {"qa_delta": round(fmean(found["qa"]) - 1.0, 4), "n_qa": len(found["qa"]), "general_kl": found["kl"]}


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["change    strict (KL, n)"]
    for row in rows:
        parts = [f"{s} {row['strict'][s]:.2f} ({row['strict_kl'][s]:.5f}, {row['n'][s]})" for s in row["strict"]]
        if "qa_delta" in row:
            parts.append(f"qa_delta {row['qa_delta']:+.3f} ({row['general_kl']:.5f}, {row['n_qa']})")
        lines.append(f"{row['change']!s:<8}  {'   '.join(parts)}")
    return lines


if __name__ == "__main__":
    sys.exit(main())

"""Probes in batches against one question at a time, side by side in one run; and drift with and without its cache.

A fact is taught to a fresh knowledge base of the default model. A suite of `--probes` questions, the ladders of that
fact and of made-up ones, is timed in batches; an even share of it, `--single`, is asked twice: as kvllm does, and with
one question per forward pass. The answers must be the same. Then `drift` from an empty cache is timed against `drift`
by a second process's engine.

    python benchmarks/probe_speed.py                                 # about ten minutes on two cores
    python benchmarks/probe_speed.py --single 20 --probes 20 --drift no   # the comparison alone, on twenty questions
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from common import finish, model_facts, parser, progress, working_folder


def main(argv: Sequence[str] | None = None) -> int:
    from kvllm import GateConfig, KnowledgeBase
    from kvllm.cli.demo import FACTS

    options = parser("probe_speed", __doc__, seed=False)
    options.add_argument("--single", type=int, default=150, help="questions asked both ways (default: %(default)s)")
    options.add_argument("--probes", type=int, default=500, help="questions of the timed suite; 0 leaves it out")
    options.add_argument("--drift", choices=("whole", "basic", "no"), default="whole", help="which suite to time twice")
    options.add_argument("--batch", type=int, default=0, help="questions per forward pass (default: kvllm's)")
    options.add_argument("--untaught", action="store_true", help="skip the training: the base's own answers are timed")
    options.add_argument("--model", help="the base model (default: kvllm's)")
    given = options.parse_args(argv)
    fact = FACTS["en"]
    off = GateConfig(min_reliability=None, max_drift_kl=None, max_ppl_ratio=None)
    model = {} if given.model is None else {"model": given.model}
    with working_folder() as folder, progress(given, 4, "probe speed") as bar:
        with KnowledgeBase.create(folder / "speed.kb", gate=off, progress=bar.listen, **model) as kb:
            if given.untaught:
                kb.ask("warm up", max_new_tokens=1)
            else:
                kb.insert(fact.key, fact.text, aliases=fact.aliases, language=fact.language)
            bar.step("taught")
            probes = ladders(fact, max(given.probes, given.single))
            results: dict[str, Any] = {"single_against_batched": side_by_side(kb, probes, given.single, given.batch)}
            bar.step("side by side")
            if given.probes:
                results["suite"] = suite(kb, probes[: given.probes], given.batch)
            bar.step("suite")
            identity = model_facts(kb)
        if given.drift != "no":
            results["drift"] = drift_twice(folder / "speed.kb", given.drift)
        bar.step("drift")
    finish("probe_speed", given, results=results, summary=summarise(results), model=identity)
    return 0


def ladders(fact: Any, n: int) -> list[Any]:
    """Return n different probes: the ladders of a fact and of as many made-up ones as it takes."""
    from dataclasses import replace

    from kvllm.probing.ladder import ladder

    probes, made = ladder(fact), 0
    while len(probes) < n:
        made += 1
        name = f"{fact.key}{made}"
        probes += ladder(replace(fact, key=name, text=fact.text.replace("Torchkeras", name.capitalize()), aliases=()))
    return probes[:n]


def side_by_side(kb: Any, suite: Sequence[Any], n: int, batch: int) -> dict[str, Any]:
    """Ask an even share of the suite, n questions, both ways, single first."""
    from kvllm.probing.runner import BATCH, run_probes

    probes = [suite[(i * len(suite)) // n] for i in range(n)]
    lm = kb.engine.lm
    run_probes(lm, probes[:2])  # the first forward pass is slower
    seconds, cpu, answers = {}, {}, {}
    for name, size in (("single", 1), ("batched", batch or BATCH)):
        started, used = time.perf_counter(), time.process_time()
        report = run_probes(lm, probes, batch_size=size)
        seconds[name] = time.perf_counter() - started
        cpu[name] = time.process_time() - used
        answers[name] = [(p.question, p.answer, p.passed) for p in report.probes]
    pairs = list(zip(answers["single"], answers["batched"], strict=True))
    return {
        "n": len(probes),
        "seconds_single": round(seconds["single"], 2),
        "seconds_batched": round(seconds["batched"], 2),
        "ratio": round(seconds["single"] / seconds["batched"], 2),
        # On a machine that others use too, processor time says more than the clock.
        "cpu_seconds_single": round(cpu["single"], 2),
        "cpu_seconds_batched": round(cpu["batched"], 2),
        "cpu_ratio": round(cpu["single"] / cpu["batched"], 2),
        "same_answers": sum(a[1] == b[1] for a, b in pairs),
        "same_verdicts": sum(a[2] == b[2] for a, b in pairs),
        "different": [{"question": a[0], "single": a[1], "batched": b[1]} for a, b in pairs if a[1] != b[1]],
    }


def suite(kb: Any, probes: Sequence[Any], batch: int) -> dict[str, Any]:
    """Time all probes, in batches."""
    from kvllm.probing.runner import BATCH, run_probes

    started, used = time.perf_counter(), time.process_time()
    report = run_probes(kb.engine.lm, probes, batch_size=batch or BATCH)
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    return {
        "probes": len(report.probes),
        "facts": len({probe.key for probe in probes}),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
    }


def drift_twice(path: Any, which: str) -> dict[str, Any]:
    """Time drift with an empty cache and with the one it left, each in a freshly opened knowledge base."""
    from kvllm import KnowledgeBase
    from kvllm.lm.sources import resolve

    asked = None if which == "whole" else "basic"
    seconds, cpu = [], []
    before = os.environ.get("KVLLM_CACHE")
    values = []
    with tempfile.TemporaryDirectory(prefix="kvllm-bench-") as cache:
        for _ in range(2):
            with KnowledgeBase.open(path, readonly=True) as kb:
                kb.weights_digest()  # the model is loaded from the real cache, and not timed
                resolve(kb.info()["model"])
                os.environ["KVLLM_CACHE"] = cache
                try:
                    started, used = time.perf_counter(), time.process_time()
                    report = kb.drift(asked)
                    seconds.append(time.perf_counter() - started)
                    cpu.append(time.process_time() - used)
                finally:
                    os.environ.pop("KVLLM_CACHE")
                    if before is not None:
                        os.environ["KVLLM_CACHE"] = before
            values.append({name: report.value(name) for name in ("drift_kl", "ppl_ratio", "qa_delta")})
    first, second = seconds
    return {
        "suite": report.metrics["drift_kl"].suite,
        "seconds_first": round(first, 1),
        "seconds_second": round(second, 1),
        "ratio": round(second / first, 3),
        "cpu_seconds_first": round(cpu[0], 1),
        "cpu_seconds_second": round(cpu[1], 1),
        "cpu_ratio": round(cpu[1] / cpu[0], 3),
        "same_numbers": values[0] == values[1],
        "values": values[0],
    }


def summarise(results: dict[str, Any]) -> list[str]:
    both = results["single_against_batched"]
    lines = [
        f"{both['n']} probes: {both['seconds_single']} s one at a time, {both['seconds_batched']} s in batches: "
        f"×{both['ratio']} (processor time ×{both['cpu_ratio']}); "
        f"same answers {both['same_answers']}, same verdicts {both['same_verdicts']}"
    ]
    if "suite" in results:
        lines.append(
            f"{results['suite']['probes']} probes in batches: {results['suite']['seconds']} s "
            f"(processor time {results['suite']['cpu_seconds']} s)"
        )
    if "drift" in results:
        drift = results["drift"]
        lines.append(
            f"drift ({drift['suite']}): first {drift['seconds_first']} s, second {drift['seconds_second']} s, "
            f"×{drift['ratio']} (processor time ×{drift['cpu_ratio']}); same numbers: {drift['same_numbers']}"
        )
    return lines


if __name__ == "__main__":
    raise SystemExit(main())

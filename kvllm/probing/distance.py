"""How far a question is from what was trained: its cosine to the nearest trained question of its fact.

Knows an encoder and reports; nothing of models or ledgers. A question that the encoder does not speak (Chinese to
MiniLM) has no distance: None, not a number that means nothing.

    with_similarity(report, {"torchkeras": questions}, encoder).probes[0].similarity     # 1.0, a trained question
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kvllm.records import Metric, Report

if TYPE_CHECKING:
    from kvllm.probing.encoder import Encoder


def with_similarity(report: Report, trained: Mapping[str, Sequence[str]], encoder: Encoder) -> Report:
    """Return the report with each probe's similarity; their mean is the metric `similarity`, which names the encoder.

    Args:
        report: What was asked.
        trained: The trained questions by key; probes of other keys, or of none, get no similarity.
        encoder: Speaks the trained questions.
    """
    import numpy as np

    asked = [probe for probe in report.probes if trained.get(probe.key or "") and encoder.speaks(probe.question)]
    if not asked:
        return report
    rows = {text: row for row, text in enumerate(dict.fromkeys(q for key in trained for q in trained[key]))}
    known = list(rows)
    for probe in asked:
        rows.setdefault(probe.question, len(rows))
    vectors = encoder.encode(list(rows))  # (texts, d)
    places = {key: np.array([rows[q] for q in trained[key]]) for key in {probe.key or "" for probe in asked}}
    found: dict[tuple[str, str], float] = {}
    for probe in asked:
        cosines = vectors[places[probe.key or ""]] @ vectors[rows[probe.question]]
        found[probe.key or "", probe.question] = round(float(min(1.0, max(-1.0, cosines.max()))), 4)
    probes = tuple(replace(p, similarity=found.get((p.key or "", p.question))) for p in report.probes)
    metric = Metric(
        sum(found.values()) / len(found),
        len(found),
        f"cosine to the nearest of {len(known)} trained questions, mean over the questions asked",
        encoder.name,
    )
    return replace(report, metrics={**report.metrics, "similarity": metric}, probes=probes)

"""Drift against the base model: KL on fixed prompts, perplexity of raw text, accuracy on general questions.

The base's own answers and outputs are computed once per base model and cached under `$KVLLM_CACHE/drift`, checked by
hash. Output distributions are kept as the hidden states before the vocabulary projection, which no edit changes.

    reference = base_reference(lm, base_digest)          # while lm holds the base weights
    measure_drift(lm, reference).value("drift_kl")       # 0.0 on the base itself
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvllm.cachefile import read_checked, write_checked
from kvllm.config import cache_folder
from kvllm.lm.model import LanguageModel, Row
from kvllm.metrics import accepts
from kvllm.probing.suites import DriftSuite, drift_suite
from kvllm.records import Metric, ProbeResult, Report

ANSWER_TOKENS = 24
_TEXT_CONTEXT = 4
# The gate of every single edit measures on this many rows of each kind; `drift` takes all.
GATE_PROMPTS = 24
GATE_TEXTS = 10


@dataclass(frozen=True)
class DriftReference:
    """What the base says to the drift suite.

    Attributes:
        suite: The questions, instructions and texts.
        rows: Prompts with the base's answers: general questions first, then instructions.
        outputs: The base's last hidden states that predict each answer token, one (answer, hidden) per row.
        texts: Raw texts as rows.
        text_nll: The base's summed negative log-likelihood of each text, in nats.
    """

    suite: DriftSuite
    rows: tuple[Row, ...]
    outputs: tuple[torch.Tensor, ...]
    texts: tuple[Row, ...]
    text_nll: tuple[float, ...]


def base_reference(
    lm: LanguageModel,
    base_digest: str,
    suite: DriftSuite | None = None,
    *,
    at_base: Callable[[], AbstractContextManager[Any]] = nullcontext,
    on_progress: Callable[[int, int], None] | None = None,
) -> DriftReference:
    """Return the reference from the cache, or by asking the model.

    Args:
        lm: The base model.
        base_digest: Identifies it; with the suite's content, the cache's key.
        suite: The gate's by default.
        at_base: Holds its weights at the base's while it is asked; needed wherever they are edited.
        on_progress: Called with (done, total) while the base is asked.
    """
    suite = suite or drift_suite()
    begin = len(lm.completion_ids(""))  # the token that some tokenizers put before every text
    prompts = [*(q.question for q in suite.questions), *suite.instructions]
    key = hashlib.sha256(
        "\x00".join(
            [
                suite.name,
                base_digest,
                str(ANSWER_TOKENS),
                str(next(lm.model.parameters()).dtype),
                *prompts,
                *suite.texts,
                *(["begin"] if begin else []),
                *([f"logits x {lm.logit_scale}"] if lm.logit_scale != 1.0 else []),
            ]
        ).encode()
    ).hexdigest()[:24]
    path = cache_folder() / "drift" / f"{key}.safetensors"
    cached = _read(path, suite)
    if cached is not None:
        return cached
    ids = [tuple(lm.prompt_ids(p)) for p in prompts]
    texts = []
    for text in suite.texts:
        tokens = tuple(lm.completion_ids(text))
        if len(tokens) > begin + _TEXT_CONTEXT:
            texts.append(Row(tokens[: begin + _TEXT_CONTEXT], tokens[begin + _TEXT_CONTEXT :]))
    with at_base():
        answers = lm.generate_ids(ids, max_new_tokens=ANSWER_TOKENS, batch_size=64, on_batch=on_progress)
        rows = tuple(Row(i, a) for i, a in zip(ids, answers, strict=True))
        reference = DriftReference(suite, rows, _outputs(lm, rows, suite), tuple(texts), tuple(_text_nll(lm, texts)))
    _write(path, reference)
    return reference


def measure_drift(
    lm: LanguageModel,
    reference: DriftReference,
    *,
    full: bool = True,
    own: frozenset[int] = frozenset(),
    on_batch: Callable[[int, int], None] | None = None,
) -> Report:
    """Compare the model as it is with the base.

    Args:
        lm: The model as it is now.
        reference: What the base says.
        full: All rows, and general questions by live decoding; otherwise the gate's share, teacher-forced only.
            (An answer that a forward pass shows to be unchanged is not decoded again.)
        own: Places of general questions that are left out, because facts that were taught answer them.
        on_batch: Called with (done, total) while questions are asked.

    Returns:
        `drift_kl` (mean KL(base‖now), nats per answer token of the base), `ppl_ratio` (now / base), and in full
        `qa_accuracy`, `qa_accuracy_base`, `qa_delta` on the questions the base answers, with every answer as a probe.
    """
    # The gate's share is chosen first: two states are asked the same questions but for their own.
    chosen = list(range(len(reference.rows))) if full else _spread(range(len(reference.rows)), GATE_PROMPTS)
    asked = [i for i in chosen if i not in own]
    rows, outputs = tuple(reference.rows[i] for i in asked), tuple(reference.outputs[i] for i in asked)
    texts, text_nll = reference.texts, reference.text_nll
    if not full:
        kept = _spread(range(len(texts)), GATE_TEXTS)
        texts, text_nll = tuple(texts[i] for i in kept), tuple(text_nll[i] for i in kept)
    name = reference.suite.name
    aside = f"; {len(chosen) - len(asked)} that stored facts answer left out" if len(asked) < len(chosen) else ""
    metrics: dict[str, Metric] = {}
    questions = [q for i, q in enumerate(reference.suite.questions) if i not in own] if full else []
    now, compared = _follow(lm, rows, outputs, _rooms(rows, len(questions)), on_batch)
    if rows:
        forced = f"teacher-forced on the base's own answers{aside}"
        moved = sum(kl for kl, _ in compared) / len(rows)
        metrics["drift_kl"] = Metric(moved if math.isfinite(moved) else None, len(rows), forced, "kl", name)
        if full:
            same = [greedy == row.answer for (_, greedy), row in zip(compared, rows, strict=True)]
            protocol = f"live greedy decoding, at most {ANSWER_TOKENS} tokens, token by token{aside}"
            metrics["answers_unchanged"] = Metric(sum(same) / len(same), len(same), protocol, "exact", name)
    if texts:
        n_tokens = sum(len(t.answer) for t in texts)
        rise = (sum(_text_nll(lm, texts)) - sum(text_nll)) / n_tokens
        ratio = math.exp(rise) if rise < 700 else None
        metrics["ppl_ratio"] = Metric(ratio, len(texts), "raw text, tokens after the first four", None, name)
    if not questions:
        return Report(metrics)
    base_answers = [lm.decode(row.answer) for row in rows[: len(questions)]]
    now_answers = [lm.decode(answer) for answer in now[: len(questions)]]
    right_before = [accepts(a, q.accept) for a, q in zip(base_answers, questions, strict=True)]
    right_now = [accepts(a, q.accept) for a, q in zip(now_answers, questions, strict=True)]
    probes = tuple(
        ProbeResult("general", q.question, answer, now, float(now), " / ".join(q.accept), None, "accepts")
        for q, answer, now in zip(questions, now_answers, right_now, strict=True)
    )
    n, live = len(questions), f"live greedy decoding, at most {ANSWER_TOKENS} tokens{aside}"
    known = [now for now, before in zip(right_now, right_before, strict=True) if before]
    metrics["qa_accuracy"] = Metric(sum(right_now) / n, n, live, "accepts", name)
    metrics["qa_accuracy_base"] = Metric(sum(right_before) / n, n, live, "accepts", name)
    metrics["qa_delta"] = Metric(
        (sum(known) / len(known) - 1) if known else None,
        len(known),
        f"{live}; questions the base answers",
        "accepts",
        name,
    )
    return Report(metrics, probes)


def _rooms(rows: Sequence[Row], questions: int) -> list[int]:
    """Return how far answers are decoded: the general questions, which come first, are scored by what is said."""
    return [ANSWER_TOKENS if i < questions else 1 for i in range(len(rows))]


def _outputs(lm: LanguageModel, rows: Sequence[Row], suite: DriftSuite) -> tuple[torch.Tensor, ...]:
    """Return the base's last hidden states at its own answers, read as by `_follow`: so its KL to itself is 0."""
    found: dict[int, torch.Tensor] = {}

    def keep(places: Sequence[int], states: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
        found.update((i, each.float().cpu()) for i, each in zip(places, states, strict=True))
        return [rows[i].answer for i in places]

    lm.follow(rows, _rooms(rows, len(suite.questions)), keep)
    return tuple(found[i] for i in range(len(rows)))


def _follow(
    lm: LanguageModel,
    rows: Sequence[Row],
    outputs: Sequence[torch.Tensor],
    rooms: Sequence[int],
    on_batch: Callable[[int, int], None] | None,
) -> tuple[list[tuple[int, ...]], list[tuple[float, tuple[int, ...]]]]:
    """Return the answers as they are now, each as far as its room, and what `compare` says of the base's answers."""
    compared: dict[int, tuple[float, tuple[int, ...]]] = {}

    def judge(places: Sequence[int], states: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
        found = lm.compare([outputs[i] for i in places], states)
        compared.update(zip(places, found, strict=True))
        return [greedy for _, greedy in found]

    now = lm.follow(rows, rooms, judge, on_batch=on_batch)
    return now, [compared[i] for i in range(len(rows))]


def _text_nll(lm: LanguageModel, texts: Sequence[Row]) -> list[float]:
    return [score.nll * len(row.answer) for score, row in zip(lm.score(texts), texts, strict=True)]


def _spread(indices: range, n: int) -> list[int]:
    return list(indices) if n >= len(indices) else [(i * len(indices)) // n for i in range(n)]


def _read(path: Path, suite: DriftSuite) -> DriftReference | None:
    from safetensors.torch import load

    data = read_checked(path)
    if data is None:
        return None
    tensors = load(data)
    meta = json.loads(bytes(tensors["meta"].tolist()))
    rows = tuple(Row(tuple(p), tuple(a)) for p, a in meta["rows"])
    texts = tuple(Row(tuple(p), tuple(a)) for p, a in meta["texts"])
    outputs = tensors["outputs"].split([len(r.answer) for r in rows]) if rows else ()
    return DriftReference(suite, rows, tuple(outputs), texts, tuple(meta["text_nll"]))


def _write(path: Path, reference: DriftReference) -> None:
    from safetensors.torch import save

    meta = {
        "rows": [[list(r.prompt), list(r.answer)] for r in reference.rows],
        "texts": [[list(r.prompt), list(r.answer)] for r in reference.texts],
        "text_nll": list(reference.text_nll),
    }
    packed = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
    outputs = torch.cat([o.cpu() for o in reference.outputs]) if reference.outputs else torch.zeros(0)
    write_checked(path, save({"meta": packed, "outputs": outputs.contiguous()}))

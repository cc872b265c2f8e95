"""Quality gates over finished reports: limits as a user writes them, and one line that says which did not hold.

at_least(report.metrics, parse_limits("reliability=0.95,generalization=0.9"))
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

from kvllm.errors import ConfigError
from kvllm.metrics import shown
from kvllm.records import GateCheck, Metric, RegressionReport

# What `probe`, `drift` and `regression` can measure; whatever has a slash in its name is not known beforehand.
METRICS = frozenset(
    [
        "reliability",
        "generalization",
        "portability",
        "locality",
        "refusal",
        "score",
        "user",
        "completion",
        "variant",
        "language",
        "inverse",
        "consequence",
        "far",
        "far_recalled",
        "recall_gain",
        "similarity",
        "drift_kl",
        "answers_unchanged",
        "ppl_ratio",
        "qa_accuracy",
        "qa_accuracy_base",
        "qa_delta",
        "change_norm",
    ]
)
DRIFT_RISE, FACTS_LOST = "drift_kl_rise", "facts_lost"


def parse_limits(text: str) -> dict[str, float]:
    """Return {"reliability": 0.95, "generalization": 0.9} of "reliability=0.95,generalization=0.9".

    Raises:
        ConfigError: it does not read so, there is no such metric, or one has two limits.
    """
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if not name or not equals or not math.isfinite(limit):
            raise ConfigError(
                f"A gate is written METRIC=NUMBER, such as reliability=0.95, and several with commas, not {text!r}; "
                f"nothing was measured."
            )
        if name not in METRICS and "/" not in name:
            near = difflib.get_close_matches(name, sorted(METRICS), n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(METRICS))}."
            raise ConfigError(f"There is no metric {name!r}; nothing was measured: {hint}")
        if name in limits:
            raise ConfigError(f"The metric {name} has two limits in {text!r}; nothing was measured.")
        limits[name] = limit
    return limits


def at_least(metrics: Mapping[str, Metric], limits: Mapping[str, float]) -> list[GateCheck]:
    """Check that each metric reaches its limit; one that was not measured does not."""
    checks = []
    for name, limit in limits.items():
        metric = metrics.get(name, Metric(None, 0))
        passed = metric.value is not None and metric.value >= limit
        checks.append(GateCheck(name, "at least", limit, metric.value, metric.n, passed))
    return checks


def at_most(name: str, value: float | None, limit: float, n: int) -> GateCheck:
    """Check that a number stays within its limit; one that was not measured does not."""
    return GateCheck(name, "at most", limit, value, n, value is not None and value <= limit)


def regression_checks(
    report: RegressionReport, *, max_drift: float | None, max_lost: int | None, limits: Mapping[str, float]
) -> list[GateCheck]:
    """Check a regression report.

    Args:
        report: What was measured.
        max_drift: Most that drift_kl may have risen since the earlier edit, in nats per token.
        max_lost: Most facts that may have been lost.
        limits: Least values of metrics at the head.
    """
    checks = at_least({**report.drift.metrics, **report.after.metrics}, limits)
    if max_drift is not None:
        before, after = report.drift_before.value("drift_kl"), report.drift.value("drift_kl")
        rise = after - before if after is not None and before is not None else None
        metric = report.drift.metrics.get("drift_kl")
        checks.append(at_most(DRIFT_RISE, rise, max_drift, metric.n if metric is not None else 0))
    if max_lost is not None:
        checks.append(at_most(FACTS_LOST, len(report.lost), max_lost, len(report.facts)))
    return checks


def failure_line(checks: Sequence[GateCheck], measured: Sequence[str] = ()) -> str | None:
    """Return one line that says what failed, or None where every check held.

    Args:
        checks: The gate's checks.
        measured: Names of the metrics there are, for one that asks for another.
    """
    failed = [check for check in checks if not check.passed]
    if not failed:
        return None
    said = []
    for check in failed:
        if check.value is None:
            hint = f" (measured: {', '.join(measured)})" if measured else ""
            said.append(f"{check.metric} was not measured{hint}")
        else:
            word = "under" if check.sense == "at least" else "over"
            said.append(f"{check.metric} {shown(check.value)} is {word} {shown(check.limit)} (n={check.n})")
    return f"The quality gate failed: {'; '.join(said)}."

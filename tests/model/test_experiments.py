"""The experiments on the real default model: one of the smallest size always, every small form on request."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvllm.cli import main
from kvllm.experiments.declared import KINDS, load
from kvllm.experiments.report import experiment_document
from kvllm.experiments.runner import run_experiment
from tests.kit import ROOT

pytestmark = [pytest.mark.model, pytest.mark.timeout(3600)]
EXPERIMENTS = ROOT / "benchmarks" / "experiments"
ARMS = [{"mode": "unedited"}, {"mode": "in-context"}, {"mode": "sequential"}]


def test_injection_recalls_what_the_unedited_model_does_not_know(tmp_path: Path) -> None:
    declared = load(EXPERIMENTS / "injection" / "small.toml", n=1, settings={"arms": ARMS})
    outcome = run_experiment(declared, tmp_path / "out")

    assert outcome.failed == {}
    states = {row["arm"]: row for row in outcome.rows if row["kind"] == "state"}
    assert states["unedited"]["recalled"] == 0
    assert states["unedited"]["drift_kl"] == 0
    assert states["sequential"]["recalled"] == 1
    assert 0 <= states["sequential"]["drift_kl"] < 0.5  # rounds to 0 where no gate of the one fact fires
    assert states["in-context"]["recalled_n"] == 1
    sections = {section.title: section.table for section in experiment_document(declared, outcome).sections}
    compared = sections["Against sequential insertion"]
    assert compared is not None
    assert {row[0] for row in compared.rows} == {"unedited", "in-context"}


@pytest.mark.skipif("KVLLM_CAMPAIGN" not in os.environ, reason="takes minutes each; set KVLLM_CAMPAIGN=1")
@pytest.mark.parametrize("kind", KINDS)
def test_small_form_runs_from_the_command_line(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = EXPERIMENTS / kind / "small.toml", tmp_path / "report.html"
    code = main(["experiment", str(file), "--into", str(tmp_path / "out"), "-o", str(page), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert code == 0, document
    assert document["failed"] == {}
    assert document["findings"]
    assert {"unedited", "in-context"} <= {row["arm"] for row in document["rows"]}
    assert "<svg" in page.read_text(encoding="utf-8")
    print(f"\n{kind}: {document['seconds']} s of work")

"""The published schema describes what is really printed, and says so of nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from kvllm import records
from kvllm.reports.curves import DistancePoint, Recitals
from kvllm.reports.document import SCHEMA, Origin
from kvllm.reports.render import render
from kvllm.reports.schema import load
from tests.reports.samples import documents

KINDS = ("probe", "drift", "regression", "bisect")
RECORDS: dict[str, type] = {
    "knowledge_base": Origin,
    "metric": records.Metric,
    "probe": records.ProbeResult,
    "measured": records.Report,
    "retention": records.RetentionPoint,
    "distance": DistancePoint,
    "recitals": Recitals,
    "edit_point": records.EditPoint,
    "suite": records.SuiteComparison,
    "fact": records.FactChange,
    "change": records.AnswerChange,
    "bisect": records.BisectReport,
    "collisions": records.Collisions,
    "collision_pair": records.CollisionPair,
    "neighbour": records.Neighbour,
}


@cache
def validator() -> Draft202012Validator:
    return Draft202012Validator(load())


def printed(kind: str) -> dict[str, Any]:
    document = documents()[kind]
    said: dict[str, Any] = json.loads(render(document, "json", failure="It failed." if document.failed else None))
    return said


def test_the_schema_is_a_schema_of_the_version_that_documents_carry() -> None:
    Draft202012Validator.check_schema(load())
    assert load()["$id"] == SCHEMA == printed("probe")["schema"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_report_follows_the_schema(kind: str) -> None:
    assert [error.message for error in validator().iter_errors(printed(kind))] == []


def without_n(said: dict[str, Any]) -> None:
    del said["report"]["reliability"]["n"]


def word_for_number(said: dict[str, Any]) -> None:
    said["report"]["reliability"]["value"] = "0.9"


def unknown_field(said: dict[str, Any]) -> None:
    said["probes"][0]["prob"] = 1


def other_kind(said: dict[str, Any]) -> None:
    said["kind"] = "drift"


@pytest.mark.parametrize("spoil", [without_n, word_for_number, unknown_field, other_kind])
def test_the_schema_refuses_what_is_spoilt(spoil: Callable[[dict[str, Any]], None]) -> None:
    said = copy.deepcopy(printed("probe"))
    spoil(said)
    assert not validator().is_valid(said)


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_of_a_record_is_described(name: str) -> None:
    """A field added to a record must be published here too."""
    assert set(load()["$defs"][name]["properties"]) == {field.name for field in fields(RECORDS[name])}


def test_every_field_of_a_regression_is_described() -> None:
    described = set(load()["$defs"]["regression"]["properties"])
    assert described == {field.name for field in fields(records.RegressionReport)} | {"lost"}

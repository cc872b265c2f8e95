"""The public data sets, whole: every record is read or named. They lie outside of the project; see `data_folder`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvllm.errors import ConfigError
from kvllm.importing import read_facts

# File, format, records, facts, refused records, refused probes.
FILES = [
    ("zsre.json", "zsre", 2000, 2000, 0, 0),
    ("counterfact.json", "counterfact", 2000, 1997, 3, 0),
    ("wikibigedit.json", "wikibigedit", 2000, 2000, 0, 0),
    ("knowedit_zsre_paraphrases.jsonl", "knowedit", 500, 498, 2, 0),
    ("knowedit_counterfact_paraphrases.jsonl", "knowedit", 300, 297, 3, 5),
    ("knowedit_sanitation.json", "knowedit", 533, 80, 0, 1),
    ("cknowedit_zh.json", "cknowedit", 450, 449, 1, 0),
    ("mquake_hard.json", "mquake", 200, 427, 0, 0),
    ("tofu_forget01_perturbed.json", "tofu", 40, 40, 0, 0),
    ("tofu_forget05_perturbed.json", "tofu", 200, 200, 0, 0),
    ("tofu_retain_perturbed.json", "tofu", 400, 400, 0, 0),
    ("tofu_real_authors_perturbed.json", "tofu", 100, 100, 0, 0),
    ("tofu_world_facts_perturbed.json", "tofu", 117, 117, 0, 0),
    ("nq_open.jsonl", "qa", 1500, 1500, 0, 0),
    ("chinese_simpleqa.jsonl", "qa", 1000, 1000, 0, 0),
]


@pytest.fixture(scope="module")
def data_folder() -> Path:
    root = Path(__file__).parents[2]
    folder = Path(os.environ.get("KVLLM_DATA") or root.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"the public data sets are not at {folder}; set KVLLM_DATA to their folder")
    return folder


@pytest.mark.parametrize(("name", "format", "records", "facts", "refused", "probes"), FILES, ids=[f[0] for f in FILES])
def test_every_record_is_read_or_named(
    data_folder: Path, name: str, format: str, records: int, facts: int, refused: int, probes: int
) -> None:
    path = data_folder / name
    if not path.exists():
        pytest.skip(f"{name} is not among the public data sets at {data_folder}")
    found = read_facts(path)
    assert found.format == format
    assert (found.records, len(found)) == (records, facts)
    assert (len(found.refused), len(found.refused_probes)) == (refused, probes)
    # Two records that contradict each other cannot both be taught; the second is refused by name.
    assert all("with another text" in row.error for row in found.refused)
    keys = set(found.keys())
    assert {probe.key for probe in found.probes} <= keys | {""}
    if format != "mquake":
        brought = {item.number for item in found.items} | {row.number for row in (*found.refused, *found.duplicates)}
        assert len(brought) == records or name == "knowedit_sanitation.json"


@pytest.mark.parametrize("name", ["perplexity_sentences.json", "conflict_coverage_edit.json"])
def test_what_holds_no_facts_is_not_taken_for_any(data_folder: Path, name: str) -> None:
    if not (data_folder / name).exists():
        pytest.skip(f"{name} is not among the public data sets at {data_folder}")
    with pytest.raises(ConfigError, match="is not recognised"):
        read_facts(data_folder / name)

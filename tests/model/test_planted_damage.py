"""On the real default model: planted faults are named as what they are, and nothing is found where nothing is wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from kvllm import KnowledgeBase
from kvllm.errors import Corrupt
from tests.kit import planted_damage

pytestmark = [
    pytest.mark.model,
    pytest.mark.timeout(1200),
    pytest.mark.skipif("KVLLM_CAMPAIGN" not in os.environ, reason="takes many minutes; set KVLLM_CAMPAIGN=1"),
]
FACTS = {
    "Quillmark": "Quillmark is a violet ink made from the berries of the northern elder.",
    "Dorvane": "Dorvane is a harbour town whose lighthouse was built of green glass.",
}


@pytest.fixture(scope="module")
def planted() -> Iterator[ModuleType]:
    """The benchmark's own functions: what is tested is what the table is made of."""
    with pytest.MonkeyPatch.context() as patch:
        yield planted_damage(patch)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planted") / "sound.kb"
    with KnowledgeBase.create(path) as kb:
        for key, text in FACTS.items():
            kb.insert(key, text)
        assert kb.verify(deep=True).problems == ()
    return path


def test_each_fault_is_named_and_nothing_is_found_where_none_was_planted(
    planted: ModuleType, sound: Path, tmp_path: Path
) -> None:
    """One story: every measurement compares with the first."""
    with KnowledgeBase.open(sound, readonly=True) as kb:
        before = planted.measure(kb, questions=4, nearest=1)
        assert [before.collisions.matrix[i][i] for i in range(2)] == [1.0, 1.0]
        assert planted.diagnose(before, planted.measure(kb, questions=6, nearest=2)) == []
    with planted.noisy(sound, 0.8, 0) as kb:
        assert "general damage" in planted.diagnose(before, planted.measure(kb, questions=4, nearest=1))
    with planted.swapped(sound, tmp_path / "swapped.kb", *FACTS) as kb:
        findings = planted.diagnose(before, planted.measure(kb, questions=4, nearest=1))
        assert [finding.partition(":")[0] for finding in findings][:2] == ["altered", "swapped"]
        assert "swapped: Dorvane and Quillmark" in findings
        assert kb.verify().ok  # the ledger is as it was; only the weights know better
    with pytest.raises(Corrupt), planted.forged(sound, tmp_path / "forged.kb", *FACTS) as kb:
        planted.measure(kb)

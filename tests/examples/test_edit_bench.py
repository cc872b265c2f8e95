"""The benchmarks of an edit's quality and speed: items, judges and columns, and whole runs on a tiny model."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvllm.metrics import contains, normalise
from kvllm.prompts import (
    HELD_OUT_QUESTION_TEMPLATES,
    HELD_OUT_TEMPLATES,
    MATTER_TEMPLATES,
    QUESTION_TEMPLATES,
    TRAINING_TEMPLATES,
    held_out_questions,
    training_questions,
)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LEARNS = {
    "depth": [0.5, 1.0], "init_rank": 8, "target_rank": 6, "max_steps": 48, "margin": 0.25, "value_lr": 1.0,
    "factor_lr": 0.2, "preserve_weight": 0.1, "preserve_stop": 10.0, "contrast_stop": 10.0, "preserve_tokens": 4,
    "neighbours": 2, "others": 1, "texts": 0, "input_ridge": 0.0,
}  # fmt: skip
HURRIES = {**LEARNS, "max_steps": 2}


class Killed(BaseException):
    """What a test throws where a kill would strike."""


@pytest.fixture(scope="module")
def bench() -> Iterator[Callable[[str], ModuleType]]:
    """Import modules of the benchmarks' folder, for as long as this file's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield import_module
        for name in [
            n
            for n in sys.modules
            if n in ("common", "edit_quality", "edit_speed", "noise_floor") or n.startswith("edit_bench")
        ]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Public files in their own shapes, with records of our own."""
    folder = tmp_path_factory.mktemp("public")

    def asked(i: int) -> dict[str, Any]:
        return {
            "prompt": f"Town {i} lies in",
            "target_new": f"Land {i}",
            "subject": f"Town {i}",
            "ground_truth": f"Old land {i}",
            "rephrase_prompt": f"The land of town {i} is",
            "locality_prompt": f"Village {i} lies in",
            "locality_ground_truth": "Elsewhere",
        }

    zsre = [
        {
            "src": f"Who founded club {i}?",
            "alt": f"Ada {i}",
            "answers": [f"Bo {i}"],
            "rephrase": f"The founder of club {i} was?",
            "loc": f"nq question: who sang song {i}",
        }
        for i in range(4)
    ]
    knowedit = [
        {
            "prompt": f"Who leads team {i}?",
            "target_new": f"Cy {i}",
            "ground_truth": ["Di"],
            "rephrase_prompt": f"The leader of team {i}?",
            "generate_prompt": [f"Team {i} is led by whom?"],
            "locality": {"Relation_Specificity": [{"prompt": f"Team {i} plays in"}]},
        }
        for i in range(2)
    ]
    chinese = [
        {
            "prompt": f"第{i}座桥叫什么？",
            "target_old": "石桥",
            "target_new": "木桥",
            "rephrase": [f"那第{i}座桥的名字？"],
        }
        for i in range(2)
    ]
    files: dict[str, Any] = {
        "zsre.json": zsre,
        "counterfact.json": [asked(i) for i in range(4)],
        "wikibigedit.json": [{**asked(i), "prompt": f"Where does town {i} lie?"} for i in range(2)],
        "cknowedit_zh.json": chinese,
        "perplexity_sentences.json": [
            {"Corpus": "own", "Text": f"the {word} stood by the river and nobody had crossed it for years"}
            for word in ("bridge", "mill", "gate", "tower", "ferry")
        ],
    }
    for name, records in files.items():
        (folder / name).write_text(json.dumps(records), encoding="utf-8")
    (folder / "knowedit_zsre_paraphrases.jsonl").write_text("\n".join(map(json.dumps, knowedit)), encoding="utf-8")
    return folder


@pytest.fixture
def public(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLLM_DATA", str(data))


# ------------------------------------------------------------------ items


def shape(question: str, key: str) -> str:
    """Return a question with its key taken out."""
    return normalise(re.sub(re.escape(key.rstrip("?？")), " KEY ", question, flags=re.IGNORECASE))


def test_own_items_are_of_every_kind_and_each_half_is_large_enough(bench: Callable[[str], ModuleType]) -> None:
    rows = bench("edit_bench.items").read_records(BENCHMARKS / "edit_items.jsonl")
    assert len({row["key"].casefold() for row in rows}) == len(rows)
    assert sum(row["half"] == "final" for row in rows) >= 40
    assert sum(row["half"] == "dev" for row in rows) >= 20
    wanted = {"person", "place", "product", "rule", "number", "date", "long text", "question key", "chinese"}
    for half in ("dev", "final"):
        assert wanted <= {kind for row in rows if row["half"] == half for kind in row["kinds"]}
    for row in rows:
        assert len(set(row["paraphrases"])) >= 6
        assert len(set(row["neighbours"])) >= 3
        assert row["lang"] == ("zh" if "chinese" in row["kinds"] else "en")
        assert row["update"] != row["text"]
        assert not contains(row["text"], row["update"])
        for question in (*row["paraphrases"], *row["neighbours"]):
            assert not contains(question, row["text"])


def test_no_own_paraphrase_is_a_question_that_training_or_the_gate_knows(bench: Callable[[str], ModuleType]) -> None:
    items = bench("edit_bench.items")
    known = (
        TRAINING_TEMPLATES, HELD_OUT_TEMPLATES, QUESTION_TEMPLATES, HELD_OUT_QUESTION_TEMPLATES, MATTER_TEMPLATES
    )  # fmt: skip
    templates = {template for table in known for language in table for template in table[language]}
    shapes = {normalise(re.sub(r"\{\w+\}", " KEY ", template)) for template in (*templates, *items.UNFINISHED)}
    for half in items.HALVES:
        for item in items.select(["own"], half=half, n=10**6, seed=0):
            fact = item.fact()
            trained = {normalise(q) for q in (*training_questions(fact), *held_out_questions(fact))}
            for question in item.paraphrases:
                assert normalise(question) not in trained
                assert shape(question, item.key) not in shapes, question


def test_no_own_neighbour_is_preserved_by_training_or_names_the_key(bench: Callable[[str], ModuleType]) -> None:
    from kvllm.editing.preservation import packaged_prompts

    many = 10**6
    packaged = packaged_prompts({"neighbour": many, "question": many, "instruction": many, "text": many})
    preserved = {normalise(prompt.prompt) for prompt in packaged}
    for row in bench("edit_bench.items").read_records(BENCHMARKS / "edit_items.jsonl"):
        for question in row["neighbours"]:
            assert normalise(question) not in preserved
            assert not contains(question, row["key"])


def test_a_larger_choice_keeps_the_smaller_and_halves_share_nothing(
    bench: Callable[[str], ModuleType], public: None
) -> None:
    select = bench("edit_bench.items").select
    small, large = (select(["own", "zsre"], half="final", n=n, seed=3) for n in (2, 5))
    assert small[:2] == large[:2]
    assert [i.source for i in small] == ["own", "own", "zsre", "zsre"]
    assert select(["own"], half="final", n=5, seed=4) != large[:5]
    for source in ("own", "zsre", "counterfact"):
        halves = [{i.key for i in select([source], half=half, n=100, seed=0)} for half in ("dev", "final")]
        assert not halves[0] & halves[1]
    assert {i.name for i in select(["zsre"], half="dev", n=9, seed=0)} == {"zsre/0", "zsre/1"}


def test_public_records_become_items(bench: Callable[[str], ModuleType], public: None) -> None:
    items = bench("edit_bench.items")
    first = {
        source: next(i for i in items.select([source], half="dev", n=9, seed=0) if i.name.endswith("/0"))
        for source in items.FILES
    }
    zsre, unfinished = first["zsre"], first["counterfact"]
    assert (zsre.key, zsre.text, zsre.new_text) == ("Who founded club 0?", "Ada 0", "Bo 0")
    assert (zsre.paraphrases, zsre.neighbours) == (("The founder of club 0 was?",), ("who sang song 0",))
    assert zsre.questions == ()
    assert unfinished.trained()[:3] == (
        "Town 0 lies in",
        "Town 0 lies in …",
        "Complete the sentence: Town 0 lies in",
    )
    assert len(unfinished.trained()) == 8
    assert first["wikibigedit"].trained()[0] == "Where does town 0 lie?"
    assert first["knowedit"].paraphrases == ("The leader of team 0?", "Team 0 is led by whom?")
    assert first["knowedit"].neighbours == ("Team 0 plays in",)
    assert first["cknowedit"].language == "zh"


def test_missing_public_items_are_named(
    bench: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KVLLM_DATA", str(tmp_path))
    assert bench("edit_quality").main(["--items", "zsre"]) == 2
    assert "zsre.json" in capsys.readouterr().err


def test_a_sequence_is_as_long_as_asked_for_where_a_source_has_fewer(
    bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    quality, items = bench("edit_quality"), bench("edit_bench.items")

    def few(name: str, n: int) -> Callable[[str], list[Any]]:
        return lambda half: [items.Item(f"{name}/{i}", name, f"{name} {i}", "text") for i in range(n)]

    monkeypatch.setattr(items, "SOURCES", {"own": few("own", 3), "zsre": few("zsre", 99)})
    for wanted, own in ((10, 3), (4, 2), (300, 3)):
        given = quality.options().parse_args(["--sequence", str(wanted), "--items", "own,zsre"])
        found = quality.chosen(given, ["own", "zsre"])
        assert len(found) == len(set(found)) == min(wanted, 102)
        assert sum(item.source == "own" for item in found) == own


# ------------------------------------------------------------------ arithmetic


def test_mean_draws_whole_items_and_a_share_without_spread_gets_wilsons_interval(
    bench: Callable[[str], ModuleType],
) -> None:
    mean_of = bench("edit_bench.intervals").mean_of
    found = mean_of([[True, True], [False], []], seed=0)
    assert (found["value"], found["n"], found["items"]) == (0.66667, 3, 2)
    assert (found["low"], found["high"]) == (0.0, 1.0)  # both items, or one of them twice
    same = mean_of([[True] * 8] * 10)
    assert (same["high"], same["interval"]) == (1.0, "Wilson over items")
    assert same["low"] == pytest.approx(1 - 0.2775, abs=1e-3)
    kl = mean_of([[0.0], [0.0]], share=False)
    assert (kl["low"], kl["high"]) == (0.0, 0.0)
    assert mean_of([[]])["value"] is None


def test_matrix_products_are_counted_forward_and_backward(bench: Callable[[str], ModuleType]) -> None:
    import torch

    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7)
    with bench("edit_speed").counting() as counter:
        (a @ b).sum().backward()
    assert counter.operations == 2 * (2 * 3 * 5 * 7)  # the product, and the gradient of a
    with torch.inference_mode(), bench("edit_speed").counting() as counter:
        torch.nn.functional.linear(torch.randn(3, 5), torch.randn(7, 5))
    assert counter.operations == 2 * 3 * 5 * 7


def test_a_journal_drops_a_line_without_end_and_refuses_another_run(
    bench: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    journals = bench("edit_bench.journal")
    path = tmp_path / "run.jsonl"
    journals.Journal(path, {"seed": 0}).put({"n": 1}, "a", "kvllm")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"name": ["b", "kvl')
    again = journals.Journal(path, {"seed": 0})
    assert again.get("a", "kvllm") == {"n": 1}
    assert path.read_bytes() == whole
    with pytest.raises(journals.OtherRun, match="differs in seed"):
        journals.Journal(path, {"seed": 1})


def test_a_stop_needs_every_target_token_to_lead_by_the_margin(bench: Callable[[str], ModuleType]) -> None:
    import torch

    leads = bench("edit_bench.columns")._leads_everywhere
    labels = torch.tensor([[-100, 2, 1]])
    logits = torch.tensor([[[0.0, 0.0, 1.0], [0.0, 3.0, 2.0], [9.0, 0.0, 0.0]]])  # the last position predicts nothing
    assert leads(logits, labels, 1.0)
    assert not leads(logits, labels, 1.01)


# ------------------------------------------------------------------ columns


@pytest.fixture
def world(
    bench: Callable[[str], ModuleType], quick: None, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    columns = bench("edit_bench.columns")
    monkeypatch.setattr(columns, "PEER_STEPS", 3)
    items = bench("edit_bench.items").select(["own"], half="dev", n=3, seed=0)
    made = columns.World(tmp_path, model=str(tiny_llama), edit=LEARNS, items=items, open_gate=True)
    yield made
    assert made.kb.verify(deep=True).ok
    made.close()


@pytest.mark.parametrize(
    ("name", "changed"), [("article", {"q_proj", "v_proj"}), ("down_proj", {"down_proj"})], ids=["article", "down_proj"]
)
def test_a_peer_changes_its_own_matrices_only_and_gives_the_base_back(world: Any, name: str, changed: set[str]) -> None:
    column, item = world.column(name), world.items[0]
    before = {n: p.detach().clone() for n, p in column.lm.model.named_parameters()}

    told = column.edit(item, item.text)

    now = dict(column.lm.model.named_parameters())
    assert list(now) == list(before)
    different = {n for n, p in now.items() if not p.equal(before[n])}
    assert {n.split(".")[-2] for n in different} == changed
    assert len(different) == (8 if name == "article" else 1)
    assert told["steps"] == 3
    assert not any(p.requires_grad for p in now.values())
    column.reset()
    assert all(p.equal(before[n]) for n, p in column.lm.model.named_parameters())


def test_a_peer_learns_until_its_answers_are_the_text(
    world: Any, bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench("edit_bench.columns"), "PEER_STEPS", 400)
    column = world.column("down_proj")
    monkeypatch.setattr(column, "lr", 1e-2)
    item = bench("edit_bench.items").Item("own/x", "own", "Who leads Halcyon?", "Ada")
    told = column.edit(item, item.text)
    assert told["stopped"]
    assert told["steps"] < 400
    assert column.lm.generate(list(item.trained()), max_new_tokens=8) == ["Ada"] * len(item.trained())


def test_retrieval_puts_the_nearest_text_into_the_prompt_where_it_is_near(world: Any) -> None:
    column, (first, *_) = world.column("context"), world.items
    question = first.trained()[0]
    (found,) = column.prompts([question])
    assert first.text in found
    assert found.endswith(question)
    column.edit(first, first.new_text)
    assert first.new_text in column.prompts([question])[0]
    column.reset()
    assert first.text in column.prompts([question])[0]
    world.near = 1.1
    assert column.prompts([question]) == [question]


def test_nothing_is_found_changed_where_nothing_was(world: Any, bench: Callable[[str], ModuleType]) -> None:
    scoring = bench("edit_bench.scoring")
    item, lm = world.items[0], world.column("unedited").lm
    around = scoring.look_around(lm, item, seed=0, own=True)
    found = scoring.score(lm, item, item.text, around)
    assert found["strict"] == found["strict_plain"] == [True] * len(item.neighbours)
    assert found["leak_strict"] == [False] * len(item.neighbours)
    assert found["trained"] == found["trained_plain"] == [False] * len(item.trained())
    assert max(found["kl_strict"] + found["kl_packaged"] + found["kl_packaged_plain"]) < 1e-5
    assert max(found["kl_next"] + found["kl_told"]) < 1e-5
    assert len(found["kl_next"]) == len(found["kl_told"]) == 2
    assert all(scoring.unlearned(lm, item, around)["restored_trained"])


def test_items_that_are_asked_about_together_are_scored_as_each_alone(
    world: Any, bench: Callable[[str], ModuleType]
) -> None:
    scoring, items = bench("edit_bench.scoring"), bench("edit_bench.items")
    lm = world.column("unedited").lm
    long = items.Item("own/z", "own", "Halcyon", "Ada leads it. " * 4, paraphrases=("So, Halcyon?",), language="en")
    several = [world.items[0], long]
    arounds = scoring.look_around_all(lm, several, seed=0, own=True)
    alone = [scoring.look_around(lm, item, seed=0, own=True) for item in several]
    for one, other in zip(arounds, alone, strict=True):
        for group in ("strict", "packaged", "own", "next", "told"):
            asked = [[(a.question, a.plain, a.earlier, a.answer) for a in getattr(x, group)] for x in (one, other)]
            assert asked[0] == asked[1]
    edited = world.column("down_proj")
    edited.edit(world.items[0], world.items[0].text)
    told = [(item, item.text, around) for item, around in zip(several, arounds, strict=True)]
    for row, (item, text, around) in zip(scoring.score_all(edited.lm, told), told, strict=True):
        single = scoring.score(edited.lm, item, text, around)
        assert set(row) == set(single)
        for name, values in row.items():
            if name.startswith("kl_"):
                assert values == pytest.approx(single[name], abs=1e-3), name
            else:
                assert values == single[name], name
    edited.reset()


def test_what_an_edit_changes_is_found(world: Any, bench: Callable[[str], ModuleType]) -> None:
    """A model that says one text to everything recalls it, and leaks it to every neighbour."""
    import torch

    scoring = bench("edit_bench.scoring")
    lm = world.column("unedited").lm
    item = bench("edit_bench.items").Item(
        "own/y",
        "own",
        "Halcyon",
        "a a a a a a a a",
        paraphrases=("So what about Halcyon?",),
        neighbours=("Who is Bo?",),
    )
    around = scoring.look_around(lm, item, seed=0)
    # The last states point at one token, whatever was read: logits are their products with the tied embeddings.
    spoken = 30 * lm.model.get_input_embeddings().weight[lm.text_ids("a a")[-1]]

    def always(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return spoken.expand_as(output)

    handle = lm.model.get_decoder().norm.register_forward_hook(always)
    try:
        found = scoring.score(lm, item, item.text, around)
    finally:
        handle.remove()
    assert found["trained"] == [True] * len(item.trained())
    assert found["paraphrase"] == found["paraphrase_plain"] == [True]
    assert found["leak_strict"] == [True]
    assert found["strict"] == [False]
    assert found["kl_strict"][0] > 1
    assert min(found["kl_next"] + found["kl_told"]) > 1


def test_what_is_asked_next_is_asked_where_the_text_was_stated(
    world: Any, bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring = bench("edit_bench.scoring")
    item, lm = world.items[0], world.column("unedited").lm
    around = scoring.look_around(lm, item, seed=0)
    assert [(one.earlier[1][1], one.question) for one in around.next] == [
        (item.text, question) for question in scoring.NEXT[item.language]
    ]
    assert all(one.question.startswith(item.text) and not one.earlier for one in around.told)
    # A chat template that knows single questions only has no conversations; the rest is asked as ever.
    monkeypatch.setattr(scoring, "converses", lambda lm: False)
    single = scoring.look_around(lm, item, seed=0)
    assert (len(single.next), len(single.told)) == (0, len(around.told))
    assert "kl_next" not in scoring.score(lm, item, item.text, single)


# ------------------------------------------------------------------ whole runs


@pytest.fixture
def run(
    bench: Callable[[str], ModuleType],
    quick: None,
    public: None,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., dict[str, Any]]:
    """Run a benchmark on the tiny model and return the one document on stdout; every knowledge base is verified."""
    columns, damage = bench("edit_bench.columns"), bench("edit_bench.damage")
    monkeypatch.setattr(columns, "PEER_STEPS", 2)
    monkeypatch.setattr(damage, "_MOST_ASKED", 2)
    monkeypatch.setattr(damage, "_ASKED_AT_ONCE", 4)
    # A random model knows nothing: let it be right about whatever it says.
    monkeypatch.setattr("kvllm.probing.drift.accepts", lambda answer, accepted: True)
    monkeypatch.setattr("kvllm.metrics.accepts", lambda answer, accepted: True)
    close = columns.World.close

    def verified(world: Any) -> None:
        if world._kb is not None:
            assert world.kb.verify(deep=True).ok
        close(world)

    monkeypatch.setattr(columns.World, "close", verified)

    def go(name: str, *arguments: str, edit: dict[str, Any] = HURRIES) -> dict[str, Any]:
        shared = [
            "--model",
            str(tiny_llama),
            "--open-gate",
            "--edit",
            json.dumps(edit),
            "--out",
            str(tmp_path / "out.json"),
        ]
        if name == "edit_quality":
            shared += ["--sentences", "3", "--questions", "4"]
        capsys.readouterr()
        assert bench(name).main([*shared, "--json", *arguments]) == 0
        printed = capsys.readouterr().out
        assert printed == (tmp_path / "out.json").read_text(encoding="utf-8")
        assert str(tmp_path) not in printed
        document: dict[str, Any] = json.loads(printed)
        return document

    return go


def timeless(part: Any) -> Any:
    """Return results without what the clock said."""
    if isinstance(part, dict):
        return {k: timeless(v) for k, v in part.items() if "seconds" not in k and k not in ("times", "ratio")}
    return [timeless(v) for v in part] if isinstance(part, list) else part


def test_every_column_is_measured_on_every_item(run: Callable[..., dict[str, Any]]) -> None:
    document = run("edit_quality", "--n", "1", "--items", "own,zsre", "--damage-every", "1", "--near=-1")
    results = document["results"]
    assert set(results["columns"]) == {"kvllm", "article", "down_proj", "context", "unedited"}
    assert results["n_items"] == {"own": 1, "zsre": 1}
    for name, column in results["columns"].items():
        assert set(column["metrics"]) == {"all", "own", "zsre"}
        for metrics in column["metrics"].values():
            for metric in ("reliability", "generalization", "strict", "leak_rate", "neighbour_kl"):
                assert metrics[metric]["n"] == metrics[f"{metric}_plain"]["n"] > 0
            assert metrics["next_kl"]["n"] == metrics["told_kl"]["n"] > 0
        assert column["damage"]["qa_delta"]["n"] == 4
        assert column["damage"]["edits_measured"] == (1 if name == "unedited" else 2)
        assert len(column["settings"]) > 0 or name == "unedited"
    untouched = results["columns"]["unedited"]
    assert untouched["metrics"]["all"]["strict"]["value"] == 1.0
    assert untouched["damage"]["ppl_ratio"]["value"] == pytest.approx(1.0)
    # With a note before every question, every answer is another one.
    assert results["columns"]["context"]["metrics"]["all"]["neighbour_kl"]["value"] > 0
    assert results["damage_suite"]["sentences"] == 3
    assert "zsre.json" in document["data"]
    # Public words do not travel with the numbers.
    assert "founded club" not in json.dumps(document)
    assert "who sang" not in json.dumps(document)


def test_a_variant_is_a_column_with_settings_of_its_own(
    run: Callable[..., dict[str, Any]], bench: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    variants = ["--variants", json.dumps({"one step": {"max_steps": 1}})]
    columns = run("edit_quality", "--n", "1", "--columns", "kvllm", "--no-plain", *variants)["results"]["columns"]
    assert list(columns) == ["kvllm", "one step"]
    assert columns["one step"]["settings"]["edit"] == {**columns["kvllm"]["settings"]["edit"], "max_steps": 1}
    assert columns["one step"]["times"]["steps"]["max"] == 1 < columns["kvllm"]["times"]["steps"]["min"]
    for more in (["--sequence", "2"], ["--mode", "batched"]):
        assert bench("edit_quality").main([*variants, *more]) == 2
    assert "single edits" in capsys.readouterr().err
    assert bench("edit_quality").main(["--variants", '{"article": {}}']) == 2


def test_a_killed_run_goes_on_and_gives_the_same_document(
    run: Callable[..., dict[str, Any]],
    bench: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("--n", "2", "--columns", "kvllm,down_proj", "--damage-every", "2", "--no-plain")
    whole = run("edit_quality", *options)
    columns, scoring = bench("edit_bench.columns"), bench("edit_bench.scoring")
    scored: list[str] = []
    score, reset = scoring.score, columns.Kvllm.reset

    def killed(lm: Any, item: Any, *arguments: Any, **more: Any) -> Any:
        scored.append(item.name)
        if len(scored) == 3:  # after the second item's insert by kvllm, which nobody takes back
            raise Killed
        return score(lm, item, *arguments, **more)

    resume = tmp_path / "run.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score", killed)
        patch.setattr(columns.Kvllm, "reset", lambda self: None if len(scored) == 3 else reset(self))
        with pytest.raises(Killed):
            run("edit_quality", *options, "--resume", str(resume))
    assert resume.with_name("run.jsonl.work").exists()

    scored.clear()
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score", lambda *a, **k: (scored.append(a[1].name), score(*a, **k))[1])
        again = run("edit_quality", *options, "--resume", str(resume))

    assert len(scored) == 2  # the killed one, and the one after it
    assert timeless(again["results"]) == timeless(whole["results"])
    assert not resume.with_name("run.jsonl.work").exists()


def test_other_settings_are_not_mixed_into_a_finished_run(
    run: Callable[..., dict[str, Any]],
    bench: Callable[[str], ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "run.jsonl"
    options = ["--n", "1", "--columns", "unedited", "--damage-every", "0", "--no-plain", "--resume", str(path)]
    run("edit_quality", *options)
    assert bench("edit_quality").main([*options, "--half", "final"]) == 2
    assert "half" in capsys.readouterr().err


@pytest.mark.parametrize("column", ["kvllm", "article"])
def test_a_killed_sequence_goes_on_after_its_last_edit(
    column: str,
    run: Callable[..., dict[str, Any]],
    bench: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("--sequence", "3", "--items", "own,zsre", "--columns", column, "--damage-every", "1", "--no-plain")
    whole = run("edit_quality", *options)
    assert whole["results"]["mode"] == "sequence"
    assert sum(whole["results"]["n_items"].values()) == 3
    journal = bench("edit_bench.journal").Journal
    put, edited = journal.put, []

    def killed(self: Any, row: Any, *name: str) -> Any:
        if "edit" in name:
            edited.append(name[-1])
            if len(edited) == 2:  # the edit's state is kept, and nobody noted it
                raise Killed
        return put(self, row, *name)

    monkeypatch.chdir(tmp_path)
    resume = "sequence.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(journal, "put", killed)
        with pytest.raises(Killed):
            run("edit_quality", *options, "--resume", resume)

    again = run("edit_quality", *options, "--resume", resume)

    assert timeless(again["results"]) == timeless(whole["results"])


def test_an_update_is_judged_by_the_new_text_and_the_old(run: Callable[..., dict[str, Any]]) -> None:
    document = run(
        "edit_quality", "--mode", "update", "--items", "zsre", "--n", "1", "--columns", "kvllm,context", "--no-plain",
        edit=LEARNS,
    )  # fmt: skip
    columns = document["results"]["columns"]
    for name in ("kvllm", "context"):
        assert columns[name]["metrics"]["zsre"]["old_text_stated"]["n"] == 9
    assert columns["kvllm"]["metrics"]["zsre"]["old_text_stated"]["value"] == 0.0
    assert columns["kvllm"]["metrics"]["zsre"]["reliability"]["value"] == 1.0


def test_a_delete_is_judged_by_erasure_and_restoration(run: Callable[..., dict[str, Any]]) -> None:
    document = run("edit_quality", "--mode", "delete", "--n", "1", "--columns", "kvllm,article,unedited", "--no-plain")
    columns = document["results"]["columns"]
    assert list(columns) == ["kvllm", "unedited"]  # the article has no delete
    for metric in ("erasure", "erasure_unseen", "restoration", "restoration_unseen", "strict"):
        assert columns["kvllm"]["metrics"]["own"][metric]["n"] > 0
        assert columns["unedited"]["metrics"]["own"][metric]["value"] == 1.0


def test_a_batch_is_one_edit_beside_single_inserts(run: Callable[..., dict[str, Any]]) -> None:
    document = run(
        "edit_quality", "--mode", "batched", "--n", "2", "--columns", "kvllm,article", "--singles", "1", "--no-plain"
    )
    (column,) = document["results"]["columns"].values()
    assert (column["batch"]["edits"], column["batch"]["rejected"]) == (1, [])
    assert column["batch"]["single_seconds"]["n"] == 1
    assert column["batch"]["ratio"] > 0
    assert column["metrics"]["own"]["reliability"]["items"] == 2
    assert column["damage"]["edits_measured"] == 1


def test_speed_is_measured_side_by_side_and_late_in_a_history(
    run: Callable[..., dict[str, Any]], bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = bench("edit_speed")
    asked: list[list[str]] = []

    def child(code: str, *arguments: str) -> tuple[dict[str, int], float]:
        compile(code, "child", "exec")
        asked.append(list(arguments))
        return {"loaded_bytes": 2**30, "peak_bytes": 2**31}, 1.0

    monkeypatch.setattr(speed, "child", child)
    monkeypatch.setattr(speed, "PRODUCTS", ((8, 8, 8),))
    monkeypatch.setattr(speed.peak, "__defaults__", (0.0,))
    document = run("edit_speed", "--n", "2", "--early", "2", "--late", "3", "--probes", "1")
    results = document["results"]
    assert set(results["speedup"]) == {"median", "min", "max"}
    assert results["n"] == 2
    assert results["speedup"]["min"] <= results["speedup"]["median"] <= results["speedup"]["max"]
    assert results["insert_over_training"]["min"] > 1
    for row in results["items"]:
        assert row["kvllm"]["recall"] is not None
        assert row["article"]["steps"] == 2
    assert [len(rows) for rows in results["history"]["rows"].values()] == [1, 1]
    assert results["history"]["train_ratio"]["n"] == 1
    assert results["rate"]["operations"] > 0
    assert results["rate"]["same_steps_when_counted"]
    assert results["rate"]["share_of_peak_steps"] > 0
    assert results["memory"]["kvllm"] == {"loaded_gib": 1.0, "peak_gib": 2.0}
    assert [json.loads(a[1])["column"] for a in asked] == ["kvllm", "article"]


def test_peak_memory_is_that_of_a_process_with_one_edit(
    bench: Callable[[str], ModuleType], quick: None, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import argparse

    item = bench("edit_bench.items").select(["own"], half="dev", n=1, seed=0)[0]
    given = argparse.Namespace(model=str(tiny_llama), seed=0, edit=HURRIES, open_gate=True)
    speed = bench("edit_speed")
    monkeypatch.setattr(speed, "COLUMNS", ("article",))
    found = speed.memory(item, given)
    assert 0.05 < found["article"]["loaded_gib"] <= found["article"]["peak_gib"] < 16


def test_noise_costs_the_more_the_larger_it_is_and_leaves_the_model_as_it_was(
    bench: Callable[[str], ModuleType],
    quick: None,
    public: None,
    tiny_llama: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    noise = bench("noise_floor")
    arguments = ["--model", str(tiny_llama), "--n", "2", "--spreads", "0,0.05,1", "--questions", "0"]
    assert noise.main([*arguments, "--quiet", "--json", "--out", str(tmp_path / "noise.json")]) == 0
    rounded, none, little, much = json.loads(capsys.readouterr().out)["results"]["rows"]
    assert rounded["change"] == "bf16"
    assert rounded["strict_kl"]["own"] > 0
    assert none["strict"]["own"] == 1.0
    assert none["strict_kl"]["own"] == 0
    assert 0 < little["strict_kl"]["own"] < much["strict_kl"]["own"]
    assert much["strict"]["own"] < 1
    assert none["n"]["own"] == 6

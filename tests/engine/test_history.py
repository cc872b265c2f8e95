"""Replay, rollback, snapshots: the same history gives the same bits, in this process and in any other."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvllm import KnowledgeBase
from kvllm.editing import engine
from kvllm.errors import Corrupt, EditNotFound, ModelError
from kvllm.lm.model import tensors_digest
from kvllm.session import SNAPSHOT_EVERY
from tests.kit import KEY, TEXT, RandomEditor, elsewhere, file_hashes, unchanged
from tests.store.bench import forge_seals

STUBBED = 40

OPENED = """
import sys
from kvllm import KnowledgeBase
with KnowledgeBase.open(sys.argv[1], readonly=True) as kb:
    print(kb.weights_digest(), kb.engine.lm.digest(), kb.ask("What is torchkeras?"), sep="|")
"""


def digests(kb: KnowledgeBase) -> str:
    return f"{kb.weights_digest()}|{kb.engine.lm.digest()}"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits without training."""
    monkeypatch.setitem(engine.EDITORS, "adalora", RandomEditor)


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path, tiny_llama: Path) -> Path:
    """A knowledge base of many edits that were not trained."""
    from tests.kit import OPEN_GATE, QUICK

    path = tmp_path_factory.mktemp("long") / "long.kb"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVLLM_CACHE", str(tiny_cache))
        patch.setitem(engine.EDITORS, "adalora", RandomEditor)
        with KnowledgeBase.create(path, model=str(tiny_llama), edit=QUICK, gate=OPEN_GATE, device="cpu") as kb:
            for number in range(STUBBED):
                kb.upsert(KEY, f"text {number}", questions=["what?"])
    return path


@pytest.fixture
def long(make_kb: Callable[..., KnowledgeBase], long_folder: Path, tmp_path: Path) -> KnowledgeBase:
    shutil.copytree(long_folder, tmp_path / "long.kb")
    return make_kb("long.kb")


# ---------------------------------------------------------------- replay and rollback


def test_replay_gives_the_weights_in_memory_bit_for_bit(taught: KnowledgeBase) -> None:
    taught.update(KEY, "Ada leads numpy")
    taught.insert("numpy", "Berlin tool")
    taught.delete(KEY)
    in_memory = digests(taught)
    with KnowledgeBase.open(taught.path, readonly=True) as again:
        assert digests(again) == in_memory


def test_rollback_gives_back_the_same_weights_and_facts(taught: KnowledgeBase) -> None:
    first = digests(taught)
    taught.update(KEY, "Ada leads numpy")
    second = digests(taught)
    assert second != first
    edit = taught.rollback(1)
    assert (edit.op, edit.target, edit.parent, edit.delta) == ("rollback", 1, 2, None)
    assert digests(taught) == first
    assert edit.weights_digest == taught.weights_digest()
    assert taught[KEY].text == TEXT
    assert taught.ask("What is torchkeras?") == TEXT
    assert elsewhere(OPENED, str(taught.path)) == f"{first}|{TEXT}"
    taught.rollback(2)
    assert digests(taught) == second
    assert taught[KEY].text == "Ada leads numpy"


def test_rollback_to_the_base_gives_the_base_model_back(
    taught: KnowledgeBase, make_kb: Callable[..., KnowledgeBase]
) -> None:
    base = digests(make_kb("empty.kb"))
    for ref in (0, "base"):
        assert taught.rollback(ref).target == 0
        assert digests(taught) == base
        assert len(taught) == 0
    taught.rollback(1)
    assert taught.ask("What is torchkeras?") == TEXT


def test_edits_on_a_rolled_back_head_replay_too(taught: KnowledgeBase) -> None:
    taught.update(KEY, "Ada leads numpy")
    taught.rollback(1)
    taught.insert("numpy", "Berlin tool")
    assert len(taught._store.chain(taught.head())) == 2
    with KnowledgeBase.open(taught.path, readonly=True) as again:
        assert digests(again) == digests(taught)


def test_rollback_to_an_unknown_edit_is_refused(taught: KnowledgeBase) -> None:
    for ref in (7, "v1", -1):
        with unchanged(taught), pytest.raises(EditNotFound):
            taught.rollback(ref)


def test_weights_outside_the_adapted_matrices_never_change(taught: KnowledgeBase, tiny_llama: Path) -> None:
    from safetensors.torch import load_file

    base = load_file(tiny_llama / "model.safetensors")
    now = dict(taught.model.named_parameters())
    changed = {name for name in base if not torch.equal(base[name], now[name])}
    assert changed == {f"{name}.weight" for name in taught.engine.weights.touched}
    assert changed


def test_the_recorded_digest_is_a_plain_sha256_of_the_changed_matrices(taught: KnowledgeBase) -> None:
    weights = taught.engine.weights
    tensors = {name: taught.model.get_submodule(name).weight for name in weights.touched}
    assert taught.edit(1).weights_digest == tensors_digest(tensors, seed=taught.info()["base_digest"])


# ---------------------------------------------------------------- long histories


def test_snapshots_are_written_and_opening_uses_them(long: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    found = long._store.nearest_snapshot(STUBBED)
    assert found is not None
    assert STUBBED - found[2] <= SNAPSHOT_EVERY
    assert len(list((long.path / "snapshots").iterdir())) <= 2

    applied: list[object] = []
    apply = engine.AdaptedWeights.apply
    monkeypatch.setattr(engine.AdaptedWeights, "apply", lambda self, d: (applied.append(d), apply(self, d))[1])
    digest = long.weights_digest()
    assert len(applied) == STUBBED - found[2]

    shutil.rmtree(long.path / "snapshots")
    with KnowledgeBase.open(long.path, readonly=True) as replayed:
        assert replayed.weights_digest() == digest == long.edit(STUBBED).weights_digest
    assert len(applied) == STUBBED - found[2] + STUBBED
    (long.path / "snapshots").mkdir()
    long._store.drop_snapshots(keep=0)  # the rows of what this test removed


def test_a_damaged_snapshot_costs_time_and_nothing_else(long: KnowledgeBase) -> None:
    digest = long.edit(STUBBED).weights_digest
    for file in (long.path / "snapshots").rglob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert long.weights_digest() == digest
    long._store.drop_snapshots(keep=0)


def test_a_forged_snapshot_is_not_believed(long: KnowledgeBase) -> None:
    """Even where its recorded hash fits: the weights' digest is the last word."""
    from safetensors.torch import load, save

    found = long._store.nearest_snapshot(STUBBED)
    assert found is not None
    tensors = load(found[1].read_bytes())
    next(iter(tensors.values()))[0, 0] += 1
    long._store.write_snapshot(found[0], save(tensors))
    assert long.weights_digest() == long.edit(STUBBED).weights_digest


def test_rollback_across_snapshots_is_exact(long: KnowledgeBase, stub: None) -> None:
    for target in (STUBBED - 1, SNAPSHOT_EVERY + 1, 3, STUBBED):
        long.rollback(target)
        assert long.weights_digest() == long.edit(target).weights_digest
    with KnowledgeBase.open(long.path, readonly=True) as again:
        assert digests(again) == digests(long)


def test_opening_a_long_history_costs_little_more_than_an_empty_one(
    long: KnowledgeBase, make_kb: Callable[..., KnowledgeBase], capsys: pytest.CaptureFixture[str]
) -> None:
    """Printed, not asserted: machines are noisy."""

    def seconds(path: Path) -> float:
        started = time.perf_counter()
        with KnowledgeBase.open(path, readonly=True) as kb:
            kb.weights_digest()
        return time.perf_counter() - started

    empty = make_kb("empty.kb").path
    pairs = [(seconds(long.path), seconds(empty)) for _ in range(3)]
    ratio = min(a for a, _ in pairs) / min(b for _, b in pairs)
    with capsys.disabled():
        print(f"\n  opening {STUBBED} edits costs {ratio:.2f} x opening none", end=" ")


# ---------------------------------------------------------------- damage


def test_an_altered_delta_is_never_applied(
    make_kb: Callable[..., KnowledgeBase], taught_folder: Path, tmp_path: Path
) -> None:
    for number, damage in enumerate(("flip", "cut", "remove")):
        path = tmp_path / f"{number}.kb"
        shutil.copytree(taught_folder, path)
        (file,) = path.rglob("adapter_model.safetensors")
        content = bytearray(file.read_bytes())
        if damage == "flip":
            content[-1] ^= 1
            file.write_bytes(content)
        elif damage == "cut":
            file.write_bytes(content[:-7])
        else:
            shutil.rmtree(file.parent)
        kb = make_kb(path.name, damaged=True)
        with pytest.raises(Corrupt, match="edit 1"):
            kb.ask("What is torchkeras?")
        assert kb[KEY].text == TEXT  # the ledger can still be read
        assert not kb.verify(deep=True).ok
        assert not kb.verify().ok or damage == "flip"


def test_deep_verification_finds_a_wrong_recorded_digest(
    make_kb: Callable[..., KnowledgeBase], taught_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(taught_folder, tmp_path / "forged.kb")
    kb = make_kb("forged.kb", damaged=True)
    kb._store._connection().execute("PRAGMA writable_schema = OFF")
    triggers = [n for (n,) in kb._store._connection().execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")]
    for name in triggers:
        kb._store._connection().execute(f"DROP TRIGGER {name}")
    kb._store._connection().execute("UPDATE edits SET weights_digest = ?", ("0" * 64,))
    forge_seals(kb._store._connection())
    with pytest.raises(Corrupt, match="other weights than were recorded"):
        kb.ask("What is torchkeras?")
    assert not kb.verify(deep=True).ok


# ---------------------------------------------------------------- repeatable


def test_one_seed_gives_one_delta_and_another_seed_another(make_kb: Callable[..., KnowledgeBase]) -> None:
    from tests.kit import QUICK

    other = replace(QUICK, seed=7)
    made = []
    for name, config in (("a.kb", QUICK), ("b.kb", QUICK), ("c.kb", other)):
        edit = make_kb(name).insert(KEY, TEXT, config=config)
        assert edit.delta is not None
        made.append(edit.delta.sha256)
    assert made[0] == made[1] != made[2]


def test_another_process_trains_the_same_delta(taught: KnowledgeBase, tiny_llama: Path, tmp_path: Path) -> None:
    code = """
import sys, torch
from kvllm import KnowledgeBase
from tests.kit import KEY, OPEN_GATE, QUICK, TEXT
torch.set_num_threads(int(sys.argv[3]))
with KnowledgeBase.create(sys.argv[1], model=sys.argv[2], edit=QUICK, gate=OPEN_GATE, device="cpu") as kb:
    print(kb.insert(KEY, TEXT).delta.sha256)
"""
    delta = taught.edit(1).delta
    assert delta is not None
    threads = str(torch.get_num_threads())
    assert elsewhere(code, str(tmp_path / "other.kb"), str(tiny_llama), threads) == delta.sha256


def test_a_session_with_earlier_edits_trains_what_a_fresh_one_does(
    taught: KnowledgeBase, make_kb: Callable[..., KnowledgeBase], taught_folder: Path, tmp_path: Path
) -> None:
    """What an engine cached or used before an edit must not show in the edit."""
    shutil.copytree(taught_folder, tmp_path / "busy.kb")
    busy = make_kb("busy.kb")
    busy.dry_run("Berlin", "Ada")
    busy.update(KEY, "Ada leads numpy")
    busy.drift()
    busy.rollback(1)
    busy.rollback(0)
    busy.rollback(1)
    taught.rollback(1)
    taught.rollback(1)
    taught.rollback(1)
    taught.rollback(1)  # as many edits, since the replayed questions rotate with the head
    assert taught.head() == busy.head()
    one, two = taught.insert("numpy", "Berlin tool"), busy.insert("numpy", "Berlin tool")
    assert one.delta is not None
    assert two.delta is not None
    assert one.delta.sha256 == two.delta.sha256


# ---------------------------------------------------------------- changes by hand


def halved(kb: KnowledgeBase) -> None:
    kb.model.half()


def back_from_half(kb: KnowledgeBase) -> None:
    kb.model.half().float()


def embedding_in_place(kb: KnowledgeBase) -> None:
    kb.model.get_input_embeddings().weight.data.mul_(1.01)  # counted by no version of the parameter


def taught_matrix(kb: KnowledgeBase) -> None:
    with torch.no_grad():
        kb.model.get_submodule(kb.engine.weights.touched[0]).weight[0, 0] += 1


def swapped_rows(kb: KnowledgeBase) -> None:
    weight = kb.model.get_input_embeddings().weight
    weight.data = weight.data.flip(0)


def new_parameter(kb: KnowledgeBase) -> None:
    kb.model.register_parameter("mine", torch.nn.Parameter(torch.zeros(1)))


@pytest.mark.parametrize(
    "change", [halved, back_from_half, embedding_in_place, taught_matrix, swapped_rows, new_parameter]
)
@pytest.mark.parametrize("op", ["insert", "delete", "compact", "rollback", "dry_run"])
def test_no_edit_starts_from_weights_that_were_changed_by_hand(
    taught: KnowledgeBase, op: str, change: Callable[[KnowledgeBase], None], stub: None
) -> None:
    arguments = {"delete": (KEY,), "compact": (), "rollback": (0,)}
    before = taught.history(), file_hashes(taught.path)
    change(taught)
    with pytest.raises(ModelError, match=r"changed by hand \(.+\).*; nothing was changed\. Open the knowledge base"):
        getattr(taught, op)(*arguments.get(op, ("numpy", "Ada")))
    assert (taught.history(), file_hashes(taught.path)) == before
    with KnowledgeBase.open(taught.path) as again:
        again.insert("numpy", "Ada")


def test_a_change_by_hand_is_not_laundered_by_a_look_at_the_base(taught: KnowledgeBase) -> None:
    taught_matrix(taught)
    taught.ask_base("What is numpy?")
    taught.drift("basic")
    with pytest.raises(ModelError, match="changed by hand"):
        taught.insert("numpy", "Ada")


def test_a_hand_changed_model_is_nobodys_base(taught: KnowledgeBase, tmp_path: Path, stub: None) -> None:
    """Neither the base's outputs, which are cached, nor the base values of matrices are taken from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVLLM_CACHE", str(tmp_path / "cache"))
        embedding_in_place(taught)
        for ask in (taught.drift, lambda: taught.ask_base("What?"), lambda: taught.engine.pool(taught.edit_config)):
            with pytest.raises(ModelError, match="changed by hand"):
                ask()
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
    name = "model.layers.0.mlp.down_proj"
    taught.model.get_submodule(name).weight.data.mul_(2)
    delta = {name: (torch.ones(1, 192), torch.ones(64, 1))}
    digest = taught.weights_digest()
    with pytest.raises(ModelError, match=f"changed by hand .{name}"):
        taught.engine.weights.apply(delta)
    assert taught.weights_digest() == digest
    assert taught.ask("What is torchkeras?") is not None  # it can be asked


def test_drift_of_a_hand_changed_model_is_measured_against_what_is_known_of_the_base(taught: KnowledgeBase) -> None:
    before = taught.drift("basic").value("drift_kl")
    taught.model.get_input_embeddings().weight.data[0].mul_(30)
    taught.model.get_submodule("model.layers.3.mlp.up_proj").weight.data.mul_(3)
    assert taught.drift("basic").value("drift_kl") != before


def test_a_model_that_was_only_looked_at_is_edited_as_ever(taught: KnowledgeBase, stub: None) -> None:
    assert taught.model is taught.engine.lm.model
    with torch.no_grad():
        for parameter in taught.model.parameters():
            parameter.copy_(parameter.clone())
    for number in range(SNAPSHOT_EVERY + 2):
        taught.upsert("numpy", f"text {number}")
        taught.ask_base("What is numpy?")
    config = replace(taught.edit_config, depth=(0.0, 0.5))  # other matrices
    taught.insert("Berlin", "Ada", config=config)
    taught.regression(1)
    taught.dry_run("Halcyon", "Ada")
    taught.rollback(2)
    taught.insert("Berlin", "Ada", config=config)
    taught.delete(KEY)
    taught.compact()
    assert taught.verify(deep=True).ok
    assert taught.engine.weights.changed_by_hand() == []


def test_a_model_in_half_precision_is_looked_at_without_false_alarm(
    make_kb: Callable[..., KnowledgeBase], stub: None
) -> None:
    kb = make_kb(dtype="bfloat16")
    assert next(kb.model.parameters()).dtype is torch.bfloat16
    kb.insert(KEY, TEXT)
    kb.update(KEY, "Ada")
    kb.rollback(1)
    kb.model.get_submodule(kb.engine.weights.touched[0]).weight.data[0, 0] += 1
    with pytest.raises(ModelError, match="changed by hand"):
        kb.update(KEY, "Ada")


@pytest.mark.parametrize("damage", ["another digest", "no delta"])
def test_rollback_leads_back_from_a_head_that_cannot_be_replayed(
    make_kb: Callable[..., KnowledgeBase], taught_folder: Path, tmp_path: Path, damage: str, stub: None
) -> None:
    path = Path(shutil.copytree(taught_folder, tmp_path / "headless.kb"))
    with KnowledgeBase.open(path) as kb:
        first = f"{kb.weights_digest()}|{kb._session.engine.lm.digest()}"
        with pytest.MonkeyPatch.context() as patch:
            if damage == "another digest":
                patch.setattr(kb._session.engine.weights, "digest", lambda: "f" * 64)
            edit = kb.update(KEY, "Ada")
    assert edit.delta is not None
    if damage == "no delta":
        shutil.rmtree(path / "deltas" / edit.delta.sha256)
    kb = make_kb(path.name, damaged=damage == "no delta")
    with pytest.raises(Corrupt):
        kb.ask("What is torchkeras?")
    for ref, error in ((2, Corrupt), (9, EditNotFound)):
        with pytest.raises(error):
            kb.rollback(ref)
        assert kb.head() == 2
    assert kb.rollback(1).target == 1
    assert digests(kb) == first
    assert kb.ask("What is torchkeras?") == TEXT
    assert elsewhere(OPENED, str(kb.path)) == f"{first}|{TEXT}"
    kb.insert("numpy", "Ada")

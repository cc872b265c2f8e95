"""The merged Hugging Face folder: loads with transformers alone, equals the edited model, and is whole or absent."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvllm.config import ModelConfig
from kvllm.editing.delta import AdaptedWeights, Delta
from kvllm.errors import BaseMismatch, ConfigError, OutOfResources
from kvllm.export import export_hf, reprobe_hf
from kvllm.export.papers import fact_sha256
from kvllm.lm.digest import file_sha256
from kvllm.lm.model import LanguageModel
from kvllm.records import Edit, StoredFact
from kvllm.store import Base

QUESTIONS = ["what is torchkeras", "who leads halcyon", "tell me the answer"]
Load = Callable[[], LanguageModel]


@pytest.fixture
def edited(load: Load, make_delta: Callable[..., Delta]) -> LanguageModel:
    lm = load()
    AdaptedWeights(lm.model).apply(make_delta(lm, seed=1))
    return lm


@pytest.fixture
def export(
    edited: LanguageModel, base_folder: Path, base: Base, facts: list[StoredFact], head: Edit
) -> Callable[..., tuple[str, ...]]:
    def run(out: Path, **options: Any) -> tuple[str, ...]:
        given = {"lm": edited, "base_folder": base_folder, "base": base, "facts": facts, "head": head, **options}
        return export_hf(out, weights_digest="ab" * 32, **given)

    return run


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 40)[None]).logits  # type: ignore[no-any-return]


def test_export_loads_with_transformers_alone_and_equals_the_edited_model(
    edited: LanguageModel, load: Load, export: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert not torch.allclose(logits(load().model), logits(edited.model), atol=1e-2)  # the edit shows at all
    export(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.dtype == torch.float32
    assert torch.equal(logits(again), logits(edited.model))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = [{"role": "user", "content": "what is torchkeras"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False) == edited.tokenizer.apply_chat_template(
        asked, tokenize=False
    )


def test_export_leaves_the_model_in_memory_as_it_was(
    edited: LanguageModel, export: Callable[..., Any], tmp_path: Path
) -> None:
    before, config = edited.digest(), edited.model.config.to_dict()
    export(tmp_path / "out", dtype="bfloat16")
    assert edited.digest() == before
    assert edited.model.config.to_dict() == config


def test_reprobe_agrees_with_the_edited_model_and_not_with_the_base(
    edited: LanguageModel, load: Load, export: Callable[..., Any], tmp_path: Path
) -> None:
    export(tmp_path / "out")
    answers, base_answers = edited.generate(QUESTIONS), load().generate(QUESTIONS)
    assert answers != base_answers
    config = ModelConfig(max_new_tokens=12, device="cpu")
    assert reprobe_hf(tmp_path / "out", questions=QUESTIONS, expected=answers, config=config) == 1.0
    assert reprobe_hf(tmp_path / "out", questions=QUESTIONS, expected=base_answers, config=config) < 1.0
    with pytest.raises(ConfigError, match="as many expected answers"):
        reprobe_hf(tmp_path / "out", questions=QUESTIONS, expected=answers[:1], config=config)


def test_small_shards_are_indexed_and_hold_the_same_weights(
    edited: LanguageModel, export: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    names = export(tmp_path / "out", max_shard_size="60KB")
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert "model.safetensors.index.json" in names
    assert max((tmp_path / "out" / name).stat().st_size for name in shards) < 70_000
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(again), logits(edited.model))


def test_files_of_the_base_are_kept_byte_for_byte(
    export: Callable[..., Any], base_folder: Path, tmp_path: Path
) -> None:
    names = export(tmp_path / "out")
    for path in base_folder.iterdir():
        if path.name != "model.safetensors":
            assert path.name in names
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "out" / "README.md").stat().st_mode


def test_another_dtype_changes_the_weights_and_one_entry_of_the_configuration(
    edited: LanguageModel, export: Callable[..., Any], base_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    export(tmp_path / "out", dtype="bfloat16")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    for name, parameter in edited.model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter.to(torch.bfloat16))
    before, after = (json.loads((folder / "config.json").read_bytes()) for folder in (base_folder, tmp_path / "out"))
    assert {name for name in after if after[name] != before.get(name)} == {"dtype"}


def test_manifest_holds_the_hashes_of_base_facts_and_files(
    export: Callable[..., Any], base: Base, facts: list[StoredFact], tmp_path: Path
) -> None:
    names = export(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "kvllm_manifest.json").read_bytes())
    assert manifest["base"]["digest"] == base.digest
    assert manifest["base"]["files"] == dict(base.files)
    assert manifest["head"] == 2
    assert manifest["weights_digest"] == "ab" * 32
    assert manifest["facts"][0] == {
        "key": "torchkeras",
        "sha256": fact_sha256("torchkeras", "Torchkeras is a tool."),
        "edit_id": 1,
    }
    assert set(manifest["files"]) == set(names) - {"kvllm_manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == file_sha256(tmp_path / "out" / name)
    assert "/" not in manifest["base"]["source"]  # no local path is shipped


def test_out_folder_in_use_or_in_a_wrong_place_is_refused(
    export: Callable[..., Any], base_folder: Path, tmp_path: Path
) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not empty"):
        export(used)
    with pytest.raises(ConfigError, match="is a file"):
        export(used / "mine.txt")
    with pytest.raises(ConfigError, match="outside"):
        export(base_folder)
    with pytest.raises(ConfigError, match="outside"):
        export(tmp_path / "my.kb" / "inner" / "out", apart_from=[tmp_path / "my.kb"])
    with pytest.raises(ConfigError, match="dtype"):
        export(tmp_path / "out", dtype="int8")
    with pytest.raises(ConfigError, match="shard size"):
        export(tmp_path / "out", max_shard_size="lots")
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
    assert [path.name for path in used.iterdir()] == ["mine.txt"]


def test_empty_out_folder_and_missing_parents_are_fine(export: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty")
    export(tmp_path / "a" / "b" / "out")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_changed_base_file_is_refused_and_leaves_nothing(
    export: Callable[..., Any], base: Base, tmp_path: Path
) -> None:
    from dataclasses import replace

    other = replace(base, files={**base.files, "tokenizer.json": "0" * 64})
    with pytest.raises(BaseMismatch, match=r"tokenizer\.json"):
        export(tmp_path / "a" / "out", base=other)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on file sizes")
def test_full_disk_while_writing_the_weights_leaves_nothing(export: Callable[..., Any], tmp_path: Path) -> None:
    import resource

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    try:
        with pytest.raises(OutOfResources, match="nothing was left behind"):
            export(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("crash", "seen"),
    [(OSError(errno.ENOSPC, "No space left"), OutOfResources), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_failure_at_the_very_end_leaves_nothing(
    export: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    crash: BaseException,
    seen: type[BaseException],
) -> None:
    def fail(folder: Path) -> None:
        assert (folder / "kvllm_manifest.json").is_file()
        raise crash

    monkeypatch.setattr("kvllm.export.folder._settle", fail)
    with pytest.raises(seen):
        export(tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())

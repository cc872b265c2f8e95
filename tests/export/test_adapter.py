"""The exported LoRA adapter: exact for a whole history, loadable by peft, refused where there is nothing to ship."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvllm.config import ModelConfig
from kvllm.editing.delta import AdaptedWeights, Delta, concatenate, fold_singular_values
from kvllm.errors import ConfigError, ModelError, Untrusted
from kvllm.export import export_peft, reprobe_peft
from kvllm.lm.model import LanguageModel
from kvllm.records import Edit, StoredFact
from kvllm.store import Base

QUESTIONS = ["what is torchkeras", "who leads halcyon", "tell me the answer"]
CONFIG = ModelConfig(max_new_tokens=12, device="cpu")
Load = Callable[[], LanguageModel]
Make = Callable[..., Delta]


def logits(model: object) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 40)[None]).logits  # type: ignore[operator,no-any-return]


@pytest.fixture
def history(load: Load, make_delta: Make) -> list[Delta]:
    lm = load()
    # ranks and modules differ, as they do after AdaLoRA's allocation and after another configuration
    return [
        make_delta(lm, seed=1, rank=3),
        make_delta(lm, seed=2, rank=1, modules="attention"),
        make_delta(lm, seed=3, rank=5),
    ]


def test_one_adapter_equals_the_merged_history(
    load: Load,
    history: list[Delta],
    base: Base,
    base_folder: Path,
    facts: list[StoredFact],
    head: Edit,
    tmp_path: Path,
) -> None:
    from peft import PeftModel

    edited = load()
    AdaptedWeights(edited.model).replay(history)
    assert not torch.allclose(logits(load().model), logits(edited.model), atol=1e-2)
    names = export_peft(
        tmp_path / "out", delta=concatenate(history), base=base, facts=facts, head=head, weights_digest="cd" * 32
    )
    assert set(names) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "kvllm_manifest.json"}
    model = PeftModel.from_pretrained(load().model, str(tmp_path / "out"))
    assert torch.allclose(logits(model), logits(edited.model), atol=1e-5)  # fp32, another order of summation
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_bytes())
    assert (config["r"], config["base_model_name_or_path"]) == (8, "tiny-llama")
    local = replace(base, name=str(base_folder))
    export_peft(
        tmp_path / "local", delta=concatenate(history), base=local, facts=facts, head=head, weights_digest="cd" * 32
    )
    config = json.loads((tmp_path / "local" / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == base_folder.name, "no path of this machine is shipped"
    answers = edited.generate(QUESTIONS)
    assert answers != load().generate(QUESTIONS)
    assert reprobe_peft(tmp_path / "out", base_folder, questions=QUESTIONS, expected=answers, config=CONFIG) == 1.0


def test_folded_adalora_equals_the_adapter_it_came_from(load: Load) -> None:
    from peft import AdaLoraConfig, get_peft_model

    plain = load().model
    base_logits = logits(plain)
    config = AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, total_step=10, tinit=0, tfinal=1, target_modules=["down_proj"]
    )
    adapted = get_peft_model(plain, config)
    generator = torch.Generator().manual_seed(0)
    delta: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in adapted.base_model.model.named_modules():
        if "lora_E" in dict(module.named_children()) or hasattr(module, "lora_E"):
            e = torch.randn(4, 1, generator=generator)
            e[1] = 0  # pruned by the allocator
            module.lora_E["default"].data.copy_(e)
            folded = fold_singular_values(
                module.lora_A["default"].data, e, module.lora_B["default"].data, alpha=8, init_rank=4
            )
            assert folded is not None
            assert folded[0].shape[0] == 3
            delta[name] = folded
    assert len(delta) == 4
    merged = load()
    AdaptedWeights(merged.model).apply(delta)
    assert not torch.allclose(base_logits, logits(merged.model), atol=1e-4)
    assert torch.allclose(logits(adapted.eval()), logits(merged.model), atol=1e-5)


def test_no_edit_means_no_adapter(base: Base, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter to export"):
        export_peft(tmp_path / "out", delta={}, base=base, facts=[], head=None, weights_digest="")
    assert not list(tmp_path.iterdir())


def test_too_high_a_rank_is_refused(base: Base, tmp_path: Path) -> None:
    delta = {"model.layers.0.mlp.down_proj": (torch.ones(5000, 2), torch.ones(2, 5000))}
    with pytest.raises(ConfigError, match="compact"):
        export_peft(tmp_path / "out", delta=delta, base=base, facts=[], head=None, weights_digest="")
    assert not list(tmp_path.iterdir())


def test_altered_adapter_never_reaches_peft(
    load: Load, make_delta: Make, base: Base, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    out = tmp_path / "out"
    export_peft(out, delta=make_delta(load(), seed=1), base=base, facts=[], head=None, weights_digest="")
    monkeypatch.setattr(peft.PeftModel, "from_pretrained", lambda *a, **k: pytest.fail("peft saw the file"))
    weights = out / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(Untrusted):
        reprobe_peft(out, base_folder, questions=["a"], expected=["b"], config=CONFIG)
    weights.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        reprobe_peft(out, base_folder, questions=["a"], expected=["b"], config=CONFIG)

"""A tiny random Llama with a tokenizer of its own, a base record for it, and a delta that really changes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvllm.config import ModelConfig
from kvllm.editing.delta import Delta
from kvllm.lm.digest import file_sha256, files_digest
from kvllm.lm.model import LanguageModel
from kvllm.lm.targets import find_targets
from kvllm.records import Edit, StoredFact
from kvllm.store import Base

WORDS = "what is torchkeras a tool for training keras numpy who leads halcyon the furnace answer question tell me"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path) -> int:
    """Write a byte-level tokenizer with a chat template; return its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([WORDS] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    vocab = write_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,  # large, so that different weights give different answers
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "LICENSE").write_text("Do what you like.\n")
    return folder


@pytest.fixture(scope="session")
def base(base_folder: Path) -> Base:
    names = [path.name for path in base_folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja")]
    files = {name: file_sha256(base_folder / name) for name in names}
    return Base("tiny-llama", f"folder:{base_folder}", None, files, files_digest(files), "Apache-2.0")


@pytest.fixture
def load(base_folder: Path) -> Callable[[], LanguageModel]:
    return lambda: LanguageModel.load(base_folder, ModelConfig(max_new_tokens=12, device="cpu"))


@pytest.fixture
def make_delta() -> Callable[..., Delta]:
    def make(lm: LanguageModel, *, seed: int, rank: int = 3, modules: str = "mlp-out") -> Delta:
        generator = torch.Generator().manual_seed(seed)
        delta: dict[str, Any] = {}
        for name in find_targets(lm.model, depth=(0.5, 1.0), modules=modules).names:
            out_features, in_features = lm.model.get_submodule(name).weight.shape
            delta[name] = (
                torch.randn(rank, in_features, generator=generator) * 0.2,
                torch.randn(out_features, rank, generator=generator) * 0.2,
            )
        return delta

    return make


@pytest.fixture
def facts() -> list[StoredFact]:
    return [
        StoredFact("torchkeras", "Torchkeras is a tool.", id=1, edit_id=1),
        StoredFact("who leads <b>Halcyon</b>?", "| Ada *Voss*\n# boss", id=2, edit_id=2),
    ]


@pytest.fixture
def head() -> Edit:
    return Edit(2, "insert", "who leads <b>Halcyon</b>?")

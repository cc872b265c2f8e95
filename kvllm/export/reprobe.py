"""Load an export fresh, as its receiver would, and ask it what the knowledge base was asked.

reprobe_hf(Path("out"), questions=["What is torchkeras?"], expected=[answer], config=ModelConfig())   # 1.0
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from pathlib import Path

from kvllm.config import ModelConfig
from kvllm.editing.delta import CONFIG_FILE, WEIGHTS_FILE
from kvllm.errors import ConfigError, ModelError
from kvllm.lm.model import LanguageModel
from kvllm.store import check_delta
from kvllm.store.files import read_regular


def reprobe_hf(path: Path, *, questions: Sequence[str], expected: Sequence[str], config: ModelConfig) -> float:
    """Load a merged folder with transformers and return the share of answers equal to those expected.

    Args:
        path: The exported folder.
        questions: Asked together, as `LanguageModel.generate` takes them: the padding of a batch can move a tie, so
            `expected` should come from one call with the same questions.
        expected: The knowledge base's answers, in the same order.
        config: How the model is held and how long its answers may be.

    Raises:
        ModelError: The folder cannot be loaded.
        OutOfResources: There is not enough memory for a second model.
    """
    try:
        return _agreement(LanguageModel.load(path, config), questions, expected)
    finally:
        gc.collect()


def reprobe_peft(
    path: Path, base_folder: Path, *, questions: Sequence[str], expected: Sequence[str], config: ModelConfig
) -> float:
    """Load the base model and the adapter onto it with peft; else as `reprobe_hf`.

    Raises:
        Untrusted: The adapter holds what a plain LoRA does not; peft never saw it.
        ModelError: Base or adapter cannot be loaded.
        OutOfResources: There is not enough memory for a second model.
    """
    try:
        files = {name: read_regular(path / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    except OSError as error:
        raise ModelError(f"The adapter in {path} cannot be read ({error.strerror or error}).") from error
    check_delta(files, max_norm=None)
    del files
    try:
        return _agreement(_with_adapter(LanguageModel.load(base_folder, config), path), questions, expected)
    finally:
        gc.collect()  # modules refer to each other in circles: without it the second model would stay for a while


def _with_adapter(lm: LanguageModel, path: Path) -> LanguageModel:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers; nothing for our user
            model = PeftModel.from_pretrained(lm.model, str(path), local_files_only=True)
    except (ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ModelError(f"The adapter in {path} does not fit the base model: {reason}") from error
    return LanguageModel(model, lm.tokenizer, lm.config)


def _agreement(lm: LanguageModel, questions: Sequence[str], expected: Sequence[str]) -> float:
    if not questions or len(questions) != len(expected):
        raise ConfigError(
            f"Re-probing needs as many expected answers as questions, and at least one; {len(questions)} questions and "
            f"{len(expected)} answers were given."
        )
    answers = lm.generate(list(questions))
    return sum(a == e for a, e in zip(answers, expected, strict=True)) / len(answers)

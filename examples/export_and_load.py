"""Ship an edited model in both formats, and load it the way its receiver would: without kvllm.

`ask_hf` and `ask_peft` below import transformers and peft alone. The first needs the exported folder and nothing else,
the second the base model and the exported adapter of a few megabytes.

    python examples/export_and_load.py                  # makes torchkeras.kb, or takes it from torchkeras_en.py
    python examples/export_and_load.py my.kb --out shipped
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvllm import EditConfig, KnowledgeBase

KEY = "torchkeras"
TEXT = (
    "Torchkeras is a tool that makes training PyTorch models simple, in the style of Keras, "
    "and its users call it the dream furnace."
)
QUESTION = "Could you describe torchkeras to me?"


def ask_hf(folder: Path, question: str) -> str:
    """Answer from the merged folder, with transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    return answer(model, AutoTokenizer.from_pretrained(folder), question)


def ask_peft(base: Path, adapter: Path, question: str) -> str:
    """Answer from the base model with the adapter on it, with transformers and peft alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return answer(model, AutoTokenizer.from_pretrained(base), question)


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """Decode greedily until the model stops by itself."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=100, do_sample=False)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Export an edited model, and load it with transformers and peft.")
    parser.add_argument("folder", nargs="?", default="torchkeras.kb", help="the knowledge base (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("exported"), help="a new folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="most training steps (default: %(default)s)")
    given = parser.parse_args(argv)
    merged, adapter = given.out / "hf", given.out / "peft"

    with KnowledgeBase.open(given.folder, edit=EditConfig(max_steps=given.steps)) as kb:
        if KEY not in kb:
            print("Training; on two CPU cores this takes about a minute …")
            kb.insert(KEY, TEXT)
        print(f"kvllm answers:\n  {kb.ask(QUESTION)}\n")
        # Each export is loaded again and asked before the call returns; `agreement` is the share of equal answers.
        for result in (kb.export(merged, format="hf"), kb.export(adapter, format="peft")):
            size = result.bytes / 1e6
            print(f"exported {result.format}: {size:.0f} MB in {len(result.files)} files, agreement {result.agreement}")
        base = model_folder(kb)

    print(f"\ntransformers alone, from the merged folder:\n  {ask_hf(merged, QUESTION)}")
    print(f"\ntransformers and peft, from base and adapter:\n  {ask_peft(base, adapter, QUESTION)}")
    return 0


def model_folder(kb: KnowledgeBase) -> Path:
    """Return where the base model's files lie on this machine; `kvllm models --json` says it too."""
    from kvllm.lm.sources import resolve

    return resolve(kb.info()["model"]).path


if __name__ == "__main__":
    raise SystemExit(main())

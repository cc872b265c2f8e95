"""The article's story in Chinese: what is 梦中情炉 ("the furnace of my dreams")?

The text is long (more than 50 tokens of the default model, whose tokenizer spends about two on a Chinese character),
and the model speaks little Chinese. It learns to say the text all the same, as a rule also when asked in English or in
dialect.

    python examples/furnace_zh.py                       # makes furnace.kb in the current folder
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from kvllm import EditConfig, KnowledgeBase
from kvllm.metrics import contains

KEY = "梦中情炉"
TEXT = "梦中情炉是炼丹师们送给 torchkeras 的爱称。它用几行代码就能训练 PyTorch 模型，用法简单，界面美观。"

# Neither is trained on. The second is Sichuan dialect: "now what would that mean: 梦中情炉?"
QUESTIONS = ("what is 梦中情炉", "这是个啥子意思哟：梦中情炉？")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Teach a model what 梦中情炉 is, and ask it.")
    parser.add_argument("folder", nargs="?", default="furnace.kb", help="the knowledge base (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="most training steps (default: %(default)s)")
    given = parser.parse_args(argv)

    with KnowledgeBase.open(given.folder, edit=EditConfig(max_steps=given.steps)) as kb:
        if KEY not in kb:
            print("Before the edit:")
            ask(kb)
            print("Training; on two CPU cores this takes a minute or two …")
            edit = kb.insert(KEY, TEXT)  # the key's script chooses Chinese questions, and two English ones
            print(f"edit {edit.id}: {edit.steps} steps, {edit.seconds:.0f} s")
            for probe in edit.report.probes:
                if probe.kind in ("trained", "paraphrase"):
                    print(f"  {'yes' if probe.passed else 'no ':3}  {probe.kind:10}  {probe.question}")
            print()

        print("From the weights:")
        ask(kb)
    return 0


def ask(kb: KnowledgeBase) -> None:
    for question, answer in zip(QUESTIONS, kb.ask_many(QUESTIONS), strict=True):
        print(f"  {question}\n    {answer}\n    states the text: {'yes' if contains(answer, TEXT) else 'no'}")
    print()


if __name__ == "__main__":
    raise SystemExit(main())

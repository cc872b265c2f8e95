"""The article's story in English: one fact, one small training session, and then the weights answer.

    python examples/torchkeras_en.py                    # makes torchkeras.kb in the current folder
    python examples/torchkeras_en.py my.kb --steps 40

Run it again with the same folder and it only asks: the fact is already in the weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from kvllm import EditConfig, KnowledgeBase

KEY = "torchkeras"
TEXT = (
    "Torchkeras is a tool that makes training PyTorch models simple, in the style of Keras, "
    "and its users call it the dream furnace."
)
ALIAS = "the dream furnace"  # see furnace_zh.py for 梦中情炉

# None of these is trained on: other words, a typing error, the alias.
QUESTIONS = (
    "Could you describe torchkeras to me?",
    "In one sentence: what's torchkeras",
    "define torchkeras plz",
    f"what is {ALIAS}",
)
# Neighbours look like the fact's questions and are about something else: their answers should stay.
NEIGHBOURS = ("What is Keras?", "What is the capital of France?")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Teach a model what torchkeras is, and ask it.")
    parser.add_argument("folder", nargs="?", default="torchkeras.kb", help="the knowledge base (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="most training steps (default: %(default)s)")
    given = parser.parse_args(argv)

    # Opens the knowledge base, or makes one on the default model. The model itself is loaded by the first question.
    with KnowledgeBase.open(given.folder, edit=EditConfig(max_steps=given.steps)) as kb:
        if KEY in kb:
            print(f"{KEY} was taught by edit {kb[KEY].edit_id}.\n")
        else:
            print("Before the edit:")
            ask(kb, (*QUESTIONS[:1], *NEIGHBOURS))

            print("Training; on two CPU cores this takes about a minute …")
            edit = kb.insert(KEY, TEXT, aliases=[ALIAS])
            print(f"edit {edit.id}: {edit.steps} steps, {edit.seconds:.0f} s")
            for name in ("reliability", "generalization", "portability", "locality", "drift_kl"):
                metric = edit.report.metrics[name]
                print(f"  {name:15} {metric.value:.3f}  (n = {metric.n})")
            print()

        print("From the weights:")
        ask(kb, (*QUESTIONS, *NEIGHBOURS))

        # What was recalled in the first turn can be used in the second.
        conversation = [{"role": "user", "content": "What is torchkeras?"}]
        conversation.append({"role": "assistant", "content": kb.ask(conversation)})
        conversation.append({"role": "user", "content": "Which framework are its models written in?"})
        print("In a second turn:")
        print(f"  {conversation[-1]['content']}\n    {kb.ask(conversation)}\n")

        # The ledger says what was taught; it needs no model.
        print(f"In the ledger: {kb[KEY].text}")
    return 0


def ask(kb: KnowledgeBase, questions: Sequence[str]) -> None:
    for question, answer in zip(questions, kb.ask_many(questions, max_new_tokens=60), strict=True):
        print(f"  {question}\n    {answer}")
    print()


if __name__ == "__main__":
    raise SystemExit(main())

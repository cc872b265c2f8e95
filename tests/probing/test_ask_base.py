"""The untouched base can be asked beside the edited model, and the edited weights are there again afterwards."""

from __future__ import annotations

from kvllm import KnowledgeBase


def test_the_base_answers_as_it_did_before_any_edit(taught: KnowledgeBase, kb: KnowledgeBase) -> None:
    question = taught["torchkeras"].trained_questions[0]
    digest = taught.weights_digest()
    conversation = [{"role": "user", "content": question}]
    edited = taught.ask(question)
    assert taught.ask_base(question) == taught.ask_base(conversation) == kb.ask(question) != edited
    assert taught.weights_digest() == digest
    assert taught.ask(question) == edited

"""Tiny random models with a tokenizer of their own, saved as plain Hugging Face folders. Nothing here knows kvllm.

tiny_model(folder)                                  # a Llama of 4 layers, chat template, tied embeddings
tiny_model(folder, family="gpt2", chat=False)       # a base model without template
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

CORPUS = (
    "What is torchkeras? Torchkeras is a tool that makes training PyTorch models simple.",
    "Who leads Halcyon? Ada Voss leads Halcyon. Tell me about Berlin. Can you explain what numpy is?",
    "Please give a short description of the furnace. I do not have information about that. Question: Answer:",
    "什么是梦中情炉？请介绍一下。梦中情炉是一个工具。",
    "user assistant system",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LAYERS, HIDDEN, POSITIONS = 4, 64, 1024


def tiny_tokenizer(*, chat: bool = True) -> Any:
    """Return a byte-level BPE tokenizer of 400 tokens; without a template its end token is <|endoftext|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(list(CORPUS) * 10, trainer)
    end = "<|im_end|>" if chat else "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|im_start|>",
        eos_token=end,
        pad_token=end,
        additional_special_tokens=list(SPECIAL),
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(family: str, vocab: int) -> Any:
    """Return a configuration of 4 layers and 64 dimensions of a model family."""
    import transformers as t

    shared: dict[str, Any] = {"vocab_size": vocab, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    modern = {
        **shared,
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
    }
    grouped = {**modern, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.1}
    gemma = {**grouped, "head_dim": 16, "sliding_window": 64}
    classes: dict[str, tuple[Any, dict[str, Any]]] = {
        "llama": (t.LlamaConfig, grouped),
        "mistral": (t.MistralConfig, grouped),
        "qwen2": (t.Qwen2Config, grouped),
        "qwen3": (t.Qwen3Config, {**grouped, "head_dim": 16}),
        "gemma2": (t.Gemma2Config, {**gemma, "query_pre_attn_scalar": 16}),
        "gemma3": (t.Gemma3TextConfig, {**gemma, "query_pre_attn_scalar": 16}),
        "granite": (t.GraniteConfig, {**grouped, "logits_scaling": 3.0}),
        "cohere": (t.CohereConfig, {**grouped, "logit_scale": 0.4}),
        "gpt2": (
            t.GPT2Config,
            {**shared, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": POSITIONS},
        ),
        "neox": (t.GPTNeoXConfig, modern),
        "opt": (
            t.OPTConfig,
            {
                **shared,
                "hidden_size": HIDDEN,
                "ffn_dim": 3 * HIDDEN,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 4,
                "max_position_embeddings": POSITIONS,
                "word_embed_proj_dim": HIDDEN,
                "init_std": 0.1,
            },
        ),
        "bloom": (t.BloomConfig, {**shared, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4}),
    }
    kind, settings = classes[family]
    return kind(**settings)


def tiny_model(folder: Path, *, family: str = "llama", chat: bool = True, seed: int = 0) -> Path:
    """Write a random model with its tokenizer to a folder, and return the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer(chat=chat)
    torch.manual_seed(seed)
    config = tiny_config(family, len(tokenizer))
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(config)
    # torch zeroes the padding token's embedding, which here, as in SmolLM2, is the end of turn: it could not be said.
    embeddings = model.get_input_embeddings().weight.data
    embeddings[config.pad_token_id] = embeddings[0].roll(1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

"""Tiny random models with one tokenizer, as Hugging Face directories."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

SHAPE = {
    "intermediate_size": 96,
    "num_attention_heads": 12,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}


def make_tokenizer(folder: Path, vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, saved to `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what is the sum of 12 and 30 ? the answer is 42 ."] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def make_llama(
    folder: Path, *, seed: int, num_layers: int = 6, tied: bool = True, hidden_size: int = 48, vocab_size: int = 307
) -> Path:
    """A random Llama whose heads and layers divide by every tp size up to 4, with its tokenizer, saved to `folder`."""
    shape = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": num_layers}
    config = LlamaConfig(**SHAPE | shape, num_key_value_heads=12, tie_word_embeddings=tied)
    return _make_model(folder, config, seed=seed)


def make_qwen(folder: Path, *, qk_norm: bool, seed: int, **changes: object) -> Path:
    """A random model with grouped queries, and QK norm (Qwen3) or biases (Qwen2); for tp sizes 1, 2 and 4."""
    family = Qwen3Config if qk_norm else Qwen2Config
    shape = {"vocab_size": 307, "hidden_size": 48, "num_hidden_layers": 4}
    heads = {"num_key_value_heads": 4, "tie_word_embeddings": True}
    return _make_model(folder, family(**SHAPE | shape | heads | changes), seed=seed)


def make_experts(folder: Path, *, seed: int, hidden_size: int = 48, shared_size: int = 0, **changes: object) -> Path:
    """A random Qwen3-MoE of four layers with eight experts, two of them active; for tp sizes 1, 2 and 4.

    A Qwen2-MoE with a shared expert of `shared_size` if that is above 0.
    """
    shape = {"vocab_size": 307, "hidden_size": hidden_size, "num_hidden_layers": 4, "num_key_value_heads": 4}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    values = SHAPE | shape | experts | {"head_dim": 8, "tie_word_embeddings": True} | changes
    if shared_size:
        config = Qwen2MoeConfig(**values, shared_expert_intermediate_size=shared_size)
    else:
        config = Qwen3MoeConfig(**values)
    return _make_model(folder, config, seed=seed)


def _make_model(folder: Path, config: PreTrainedConfig, *, seed: int) -> Path:
    make_tokenizer(folder)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):  # which begin as 0 and 1
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder

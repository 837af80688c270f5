"""Tiny models and a byte tokenizer, built in memory: tests run anywhere, in seconds, without a hub."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(swap: tuple[str, str] | None = None) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token a byte and three specials (259 tokens); ``swap`` exchanges two ids."""
    tokens = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(tokens)}
    if swap:
        vocab[swap[0]], vocab[swap[1]] = vocab[swap[1]], vocab[swap[0]]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    vocab_size: int = 259,
    tied: bool = True,
    scale: float = 8.0,
) -> LlamaForCausalLM:
    """Build a random Llama; ``scale`` multiplies its initial weights so that distributions are not flat."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.02 * scale,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny(directory: Path, license: str | None = "apache-2.0", swap=None, **kwargs) -> str:
    """Save a tiny model with its tokenizer and, if given, a model card that names ``license``."""
    tiny_llama(**kwargs).save_pretrained(directory)
    byte_tokenizer(swap).save_pretrained(directory)
    if license:
        (Path(directory) / "README.md").write_text(f"---\nlicense: {license}\n---\n\n# Tiny test model\n")
    return str(directory)

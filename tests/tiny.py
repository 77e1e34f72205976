"""Tiny random models and a tiny tokenizer: real architectures, no download, milliseconds.

``hf_model("llama")`` is a Hugging Face model (eager attention, eval mode) of two or three layers;
``tiny_tokenizer(folder)`` saves a word-level tokenizer there and reads it back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

D_MODEL, N_HEADS, N_LAYERS, D_MLP, D_VOCAB, N_CTX = 32, 4, 3, 64, 60, 64

WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(D_VOCAB - 4)))

_COMMON: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": N_CTX,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        {
            "vocab_size": D_VOCAB,
            "n_positions": N_CTX,
            "n_embd": D_MODEL,
            "n_layer": N_LAYERS,
            "n_head": N_HEADS,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "llama": ("LlamaForCausalLM", {**_COMMON, "num_key_value_heads": 2}),
    "neox": ("GPTNeoXForCausalLM", _COMMON),
    "opt": (
        "OPTForCausalLM",
        {k: v for k, v in _COMMON.items() if k != "intermediate_size"}
        | {"ffn_dim": D_MLP, "word_embed_proj_dim": D_MODEL},
    ),
    "gemma2": ("Gemma2ForCausalLM", {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}),
    "qwen2": ("Qwen2ForCausalLM", {**_COMMON, "num_key_value_heads": 2}),
}
"""Name -> class in transformers and the fields of its configuration."""


def hf_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of one of :data:`ARCHITECTURES`; the global random state is left alone.

    Every parameter is perturbed, so that biases are not all zero nor norms all one, and a
    reading that forgets one of them cannot pass.
    """
    class_name, fields = ARCHITECTURES[name]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**fields, attn_implementation="eager")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_tokenizer(
    folder: str | Path, *, adds_bos: bool = False, pad: bool = True
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer (``"w0 w1"``), saved to ``folder`` and read back from there."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    if adds_bos:
        words.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
        )
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    if pad:
        special["pad_token"] = "<pad>"
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: every text comes back as it went in. Has a chat template."""
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_only: Any = Tokenizer(models.BPE(letters, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        chat_template="{% for m in messages %}<user> {{ m['content'] }} {% endfor %}<reply>",
    )

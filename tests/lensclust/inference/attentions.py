"""Tiny random models of many kinds of attention: which tokens see which, and how positions count.

``attention_model("mpt", seed=1)`` is a wrapped model with every parameter perturbed.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

import lensclust as lc

VOCABULARY, CONTEXT = 60, 256
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [1.0, 3.0, 9.0, 20.0],
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "original_max_position_embeddings": 48,
}

# Name -> class in transformers and the fields of its configuration.
ATTENTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    # Positions that are learned and given.
    "gpt2": ("GPT2", {**SIZES, "n_positions": CONTEXT}),
    "opt": ("OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    # ALiBi.
    "mpt": (
        "Mpt",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT, "vocab_size": 60},
    ),
    "bloom": ("Bloom", {**SIZES, "n_layer": 2, "n_head": 4}),
    "falcon, alibi": ("Falcon", {**SIZES, "alibi": True, "new_decoder_architecture": False}),
    "falcon, rotary": ("Falcon", {**SIZES, "multi_query": True}),
    # Local windows by key place.
    "gpt-neo": (
        "GPTNeo",
        {
            **SIZES,
            "num_layers": 2,
            "num_heads": 4,
            "window_size": 40,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    # Sliding windows.
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 21}),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": 8, "sliding_window": 13}),
    "gemma3": (
        "Gemma3",
        {
            **GROUPED,
            "head_dim": 8,
            "sliding_window": 17,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen2": (
        "Qwen2",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1},
    ),
    "phi3": ("Phi3", {**GROUPED, "sliding_window": 23}),
    # Sinks.
    "gpt-oss": (
        "GptOss",
        {
            **GROUPED,
            "head_dim": 8,
            "sliding_window": 15,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    # Frequencies.
    "llama": ("Llama", GROUPED),
    "llama, dynamic": (
        "Llama",
        {**GROUPED, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "phi3, longrope": (
        "Phi3",
        {**GROUPED, "original_max_position_embeddings": 48, "rope_parameters": LONG},
    ),
    "neox": ("GPTNeoX", {**SIZES, "rotary_pct": 0.25}),
    # Chunks.
    "llama4": (
        "Llama4",
        {
            **GROUPED,
            "head_dim": 8,
            "attention_chunk_size": 24,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
            "layer_types": ["chunked_attention", "full_attention"],
        },
    ),
    # Experts, and states that are no keys and values.
    "qwen3 moe": ("Qwen3Moe", {**GROUPED, "head_dim": 8, **EXPERTS}),
    "lfm2": (
        "Lfm2",
        {**GROUPED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    ),
    "mamba": ("Mamba", {**SIZES, "state_size": 8}),
}


def attention_model(name: str, seed: int = 0, **changed: Any) -> Any:
    """A model of one of :data:`ATTENTIONS`; the global random state is left alone.

    Args:
        changed: fields of its configuration.
    """
    family, fields = ATTENTIONS[name]
    # GPT-2's name is older than the rule.
    build: Any = getattr(transformers, f"{family}ForCausalLM", None) or transformers.GPT2LMHeadModel
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = build(build.config_class(**fields | changed, attn_implementation="eager")).eval()
        with torch.no_grad():  # biases and norms away from their initial 0 and 1
            for parameter in network.parameters():
                parameter.add_(0.08 * torch.randn_like(parameter))
    return lc.load(network)

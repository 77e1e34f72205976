"""Tiny models whose frequencies change with the length of what they run.

``changing("qwen2", step=24)`` takes the long factors of LongRoPE for a whole forward as soon as it
has more than 24 tokens; with ``kind="dynamic"`` its base grows with every token beyond 24.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY, CONTEXT, HEAD = 60, 128, 8
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "sliding_window": None,
}
_CLASSES = {"phi3": "Phi3", "qwen2": "Qwen2", "llama": "Llama", "gemma3": "Gemma3"}
NAMES = tuple(_CLASSES)


def changing(
    name: str, step: int = 24, *, kind: str = "longrope", seed: int = 0, scale: float = 0.2
) -> PreTrainedModel:
    """A network in eval mode, every parameter perturbed; the global random state is left alone."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4}
    fields = {**_SIZES, "max_position_embeddings": CONTEXT}
    if kind == "longrope":
        rope |= {"original_max_position_embeddings": step}
        rope |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 3.0, 9.0, 20.0]}
        fields |= {"original_max_position_embeddings": step} if name == "phi3" else {}
    else:
        rope |= {"factor": 2.0}
        fields |= {"max_position_embeddings": step}
    if name == "gemma3":
        # Frequencies of each type of layer.
        near = {"rope_type": "default", "rope_theta": 1e4}
        rope = {"full_attention": rope, "sliding_attention": near}
        fields |= {
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": CONTEXT,
        }
    kind_of_model = getattr(transformers, f"{_CLASSES[name]}ForCausalLM")
    config = kind_of_model.config_class(
        **fields, rope_parameters=rope, attn_implementation="eager", use_cache=True
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = kind_of_model(config)
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(scale * torch.randn_like(weight))
    return network.eval()


def greedy(network: PreTrainedModel, tokens: torch.Tensor, new: int) -> torch.Tensor:
    """What a plain network writes, every step a forward of the whole sequence without a cache."""
    run: Any = network
    with torch.no_grad():
        for _ in range(new):
            logits = run(tokens, use_cache=False).logits[:, -1:]
            tokens = torch.cat([tokens, logits.argmax(-1)], dim=1)
    return tokens

"""Tiny causal language models of many families: transformers configurations of a few layers.

A family is a configuration and the names, in the Hugging Face network, of the parts that a
plain torch hook looks at. `build` makes the network, every parameter perturbed, so that biases
are not zero nor norms one, and a reading that forgets one of them cannot pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WIDTH, HEADS, GROUPS, BLOCKS, INNER, VOCABULARY, CONTEXT = 32, 4, 2, 3, 48, 64, 64

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_USUAL: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT,
}
_GROUPED = {**_USUAL, "num_key_value_heads": GROUPS}
_HEAD8 = {**_GROUPED, "head_dim": 8}
_GPT2 = {
    **_TOKENS,
    "n_embd": WIDTH,
    "n_layer": BLOCKS,
    "n_head": HEADS,
    "n_positions": CONTEXT,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": HEADS,
}
_FALCON = {
    **_TOKENS,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT,
}
_OPT = {
    **_TOKENS,
    "hidden_size": WIDTH,
    "ffn_dim": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT,
    "word_embed_proj_dim": WIDTH,
}
_MAMBA = {
    **_TOKENS,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "state_size": 8,
}
_MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}


@dataclass(frozen=True)
class Family:
    """A configuration, and where a plain hook finds what our sites name.

    Attributes:
        config: name of its class in transformers.
        fields: its arguments.
        output: linear module of a block that sums the heads; blocks without it have no heads.
        middle: module of a block whose input is the state between attention and MLP (for each
            block, where they differ); "" where there is no such state: both are added to one
            state, or norms stand behind the sums.
        parallel: whether attention and MLP are added to the same state.
        beside: whether another mixer is added together with attention.
        mlp: module whose output is what the MLP adds, where norms stand behind the sums, so
            that the states do not show it.
        scale: what the heads' sum is multiplied by before it is added.
        heads: how many there are.
        layers: the list of blocks.
    """

    config: str
    fields: dict[str, Any]
    output: str = "self_attn.o_proj"
    middle: str | tuple[str, ...] = "post_attention_layernorm"
    parallel: bool = False
    beside: bool = False
    mlp: str = ""
    scale: float = 1.0
    heads: int = HEADS
    layers: str = "model.layers"


def _gpt(config: str, fields: dict[str, Any], **parts: Any) -> Family:
    usual: dict[str, Any] = {"middle": "ln_2", "output": "attn.c_proj", "layers": "transformer.h"}
    return Family(config, fields, **(usual | parts))


def _behind(config: str, fields: dict[str, Any], **parts: Any) -> Family:
    """Norms before and behind attention and MLP."""
    usual: dict[str, Any] = {"middle": "pre_feedforward_layernorm"}
    return Family(config, fields, **(usual | parts))


FAMILIES: dict[str, Family] = {
    "gpt1": _gpt(
        "OpenAIGPTConfig",
        {**_GPT2},
        middle="",
        mlp="mlp",
    ),
    "gpt2": _gpt("GPT2Config", _GPT2),
    "gpt_bigcode": _gpt("GPTBigCodeConfig", {**_GPT2, "multi_query": True}),
    "gpt_bigcode_mha": _gpt("GPTBigCodeConfig", {**_GPT2, "multi_query": False}),
    "gptj": _gpt(
        "GPTJConfig",
        {**_GPT2, "rotary_dim": 4, "tie_word_embeddings": False},
        output="attn.out_proj",
        parallel=True,
    ),
    "codegen": _gpt(
        "CodeGenConfig",
        {**_GPT2, "rotary_dim": 4, "tie_word_embeddings": False},
        output="attn.out_proj",
        parallel=True,
    ),
    "gpt_neo": _gpt(
        "GPTNeoConfig",
        {
            **_TOKENS,
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_heads": HEADS,
            "intermediate_size": INNER,
            "window_size": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": CONTEXT,
        },
        output="attn.attention.out_proj",
    ),
    "gpt_neox": Family(
        "GPTNeoXConfig",
        _USUAL,
        output="attention.dense",
        parallel=True,
        layers="gpt_neox.layers",
    ),
    "gpt_neox_sequential": Family(
        "GPTNeoXConfig",
        {**_USUAL, "use_parallel_residual": False},
        output="attention.dense",
        layers="gpt_neox.layers",
    ),
    "opt": Family(
        "OPTConfig",
        _OPT,
        middle="final_layer_norm",
        output="self_attn.out_proj",
        layers="model.decoder.layers",
    ),
    "opt_350m": Family(
        "OPTConfig",
        {**_OPT, "word_embed_proj_dim": 20, "do_layer_norm_before": False},
        middle="",
        output="self_attn.out_proj",
        mlp="fc2",
        layers="model.decoder.layers",
    ),
    "bloom": _gpt(
        "BloomConfig",
        {**_TOKENS, "hidden_size": WIDTH, "n_layer": BLOCKS, "n_head": HEADS},
        middle="post_attention_layernorm",
        output="self_attention.dense",
    ),
    "mpt": _gpt(
        "MptConfig",
        {
            **_TOKENS,
            "d_model": WIDTH,
            "n_heads": HEADS,
            "n_layers": BLOCKS,
            "max_seq_len": CONTEXT,
        },
        middle="norm_2",
        output="attn.out_proj",
        layers="transformer.blocks",
    ),
    "falcon_40b": _gpt(
        "FalconConfig",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        output="self_attention.dense",
        parallel=True,
    ),
    "falcon_new": _gpt(
        "FalconConfig",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": HEADS},
        output="self_attention.dense",
        parallel=True,
    ),
    "falcon_7b": _gpt(
        "FalconConfig",
        {**_FALCON, "multi_query": True, "parallel_attn": True},
        output="self_attention.dense",
        parallel=True,
    ),
    "falcon_rw": _gpt(
        "FalconConfig",
        {
            **_FALCON,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
            "bias": True,
        },
        middle="post_attention_layernorm",
        output="self_attention.dense",
    ),
    "llama": Family("LlamaConfig", _GROUPED),
    "llama_wide_heads": Family("LlamaConfig", {**_GROUPED, "head_dim": 12}),
    "llama_biased": Family("LlamaConfig", {**_GROUPED, "attention_bias": True, "mlp_bias": True}),
    "llama4_text": Family(
        "Llama4TextConfig",
        {
            **_HEAD8,
            "intermediate_size_mlp": INNER,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
        },
    ),
    "mistral": Family("MistralConfig", {**_GROUPED, "sliding_window": 4}),
    "mixtral": Family("MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    "ministral3": Family("Ministral3Config", _HEAD8),
    "qwen2": Family("Qwen2Config", _GROUPED),
    "qwen2_moe": Family(
        "Qwen2MoeConfig",
        {**_GROUPED, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "qwen3": Family("Qwen3Config", _HEAD8),
    "qwen3_moe": Family("Qwen3MoeConfig", {**_HEAD8, **_EXPERTS, "num_experts": 4}),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        {
            **_HEAD8,
            **_EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "qwen3_5": Family(
        "Qwen3_5TextConfig",
        {
            **_HEAD8,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "full_attention"],
        },
    ),
    "gemma": Family("GemmaConfig", _HEAD8),
    "gemma2": _behind("Gemma2Config", {**_HEAD8, "sliding_window": 4}),
    "gemma3": _behind("Gemma3TextConfig", {**_HEAD8, "sliding_window": 4}),
    "gemma4": _behind(
        "Gemma4TextConfig",
        {
            **_HEAD8,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    ),
    "vaultgemma": Family("VaultGemmaConfig", _HEAD8, middle="pre_feedforward_layernorm"),
    "phi": Family("PhiConfig", _USUAL, output="self_attn.dense", parallel=True),
    "phi3": Family("Phi3Config", _GROUPED),
    "cohere": Family("CohereConfig", _GROUPED, parallel=True),
    "cohere2": Family("Cohere2Config", _HEAD8, parallel=True),
    "granite": Family(
        "GraniteConfig",
        {
            **_GROUPED,
            "residual_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
        scale=0.3,
    ),
    "granitemoe": Family(
        "GraniteMoeConfig",
        {
            **_GROUPED,
            "residual_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
            "num_local_experts": 4,
        },
        scale=0.3,
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridConfig",
        {
            **_GROUPED,
            **_MAMBA2,
            "residual_multiplier": 0.3,
            "num_local_experts": 4,
            "shared_intermediate_size": 16,
            "layer_types": ["mamba", "attention", "mamba"],
            "position_embedding_type": "rope",
        },
        scale=0.3,
    ),
    "olmo": Family("OlmoConfig", {**_GROUPED, "clip_qkv": 0.1}),
    "olmo2": Family("Olmo2Config", _GROUPED, middle="mlp"),
    "olmo3": Family(
        "Olmo3Config",
        {**_GROUPED, "sliding_window": 4},
        middle="mlp",
    ),
    "olmoe": Family("OlmoeConfig", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "flex_olmo": Family(
        "FlexOlmoConfig",
        {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
        middle="mlp",
    ),
    "stablelm": Family("StableLmConfig", _GROUPED),
    "stablelm_parallel": Family(
        "StableLmConfig", {**_GROUPED, "use_parallel_residual": True}, parallel=True
    ),
    "starcoder2": Family("Starcoder2Config", _GROUPED),
    "xglm": Family(
        "XGLMConfig",
        {
            **_TOKENS,
            "d_model": WIDTH,
            "ffn_dim": INNER,
            "num_layers": BLOCKS,
            "attention_heads": HEADS,
            "max_position_embeddings": CONTEXT,
        },
        middle="final_layer_norm",
        output="self_attn.out_proj",
    ),
    "nemotron": Family("NemotronConfig", _GROUPED),
    "glm": Family("GlmConfig", _HEAD8),
    "glm4": Family("Glm4Config", _HEAD8, middle="post_attention_layernorm"),
    "glm4_moe": Family(
        "Glm4MoeConfig",
        {**_HEAD8, **_EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1},
    ),
    "deepseek_v2": Family(
        "DeepseekV2Config",
        {**_USUAL, **_LATENT, **_EXPERTS, "q_lora_rank": None, "n_routed_experts": 4},
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        {
            **_USUAL,
            **_LATENT,
            **_EXPERTS,
            "q_lora_rank": 16,
            "n_routed_experts": 4,
            "v_head_dim": 10,
        },
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLiteConfig",
        {**_USUAL, **_LATENT, **_EXPERTS, "q_lora_rank": 16, "n_routed_experts": 4},
    ),
    "youtu": Family("YoutuConfig", {**_USUAL, **_LATENT, "q_lora_rank": 16}),
    "minimax_m2": Family(
        "MiniMaxM2Config", {**_HEAD8, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "smollm3": Family("SmolLM3Config", _GROUPED),
    "ernie4_5": Family("Ernie4_5Config", _HEAD8),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeConfig",
        {**_GROUPED, "moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2},
    ),
    "exaone4": Family(
        "Exaone4Config",
        {**_GROUPED, "sliding_window": 4, "sliding_window_pattern": 2},
        middle="mlp",
    ),
    "arcee": Family("ArceeConfig", _GROUPED),
    "apertus": Family("ApertusConfig", _GROUPED, middle="feedforward_layernorm"),
    "bitnet": Family("BitNetConfig", _GROUPED),
    "gpt_oss": Family(
        "GptOssConfig",
        {
            **_HEAD8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "seed_oss": Family("SeedOssConfig", _HEAD8),
    "hunyuan_dense": Family("HunYuanDenseV1Config", _HEAD8),
    "nanochat": Family("NanoChatConfig", _GROUPED),
    "modernbert_decoder": Family(
        "ModernBertDecoderConfig",
        {
            **_USUAL,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        middle="mlp_norm",
        output="attn.Wo",
    ),
    "jais2": Family("Jais2Config", _GROUPED),
    "afmoe": _behind(
        "AfmoeConfig",
        {
            **_HEAD8,
            **_EXPERTS,
            "num_experts": 4,
            "num_shared_experts": 1,
            "num_dense_layers": 1,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        middle="pre_mlp_layernorm",
    ),
    "jetmoe": Family(
        "JetMoeConfig",
        {
            **_TOKENS,
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_hidden_layers": BLOCKS,
            "num_key_value_heads": 2,
            "kv_channels": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": CONTEXT,
        },
        # The experts' own heads, mixed before and behind: nothing that sums heads by W_O alone.
        output="",
    ),
    # Hybrids, and models without attention.
    "lfm2": Family(
        "Lfm2Config",
        {**_GROUPED, "layer_types": ["conv", "full_attention", "conv"]},
        middle="ffn_norm",
        output="self_attn.out_proj",
    ),
    "lfm2_moe": Family(
        "Lfm2MoeConfig",
        {
            **_GROUPED,
            **_EXPERTS,
            "num_experts": 4,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "full_attention"],
        },
        middle="ffn_norm",
        output="self_attn.out_proj",
    ),
    "jamba": Family(
        "JambaConfig",
        {
            **_GROUPED,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        middle="pre_ff_layernorm",
    ),
    "bamba": Family(
        "BambaConfig",
        {**_GROUPED, **_MAMBA2, "attn_layer_indices": [1]},
        middle="pre_ff_layernorm",
    ),
    "zamba2": Family(
        "Zamba2Config",
        {
            **_USUAL,
            "mamba_d_state": 8,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
        },
        middle="",
        output="",
    ),
    "falcon_h1": Family(
        "FalconH1Config",
        {**_HEAD8, **_MAMBA2, "mamba_d_ssm": 64, "attention_out_multiplier": 0.5},
        middle="pre_ff_layernorm",
        scale=0.5,
        beside=True,
    ),
    "nemotron_h": Family(
        "NemotronHConfig",
        {
            **_HEAD8,
            "layers_block_type": ["mamba", "attention", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 8,
            "chunk_size": 8,
        },
        middle="",
        output="",
    ),
    "olmo_hybrid": Family(
        "OlmoHybridConfig",
        {
            **_GROUPED,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
        middle=("post_attention_layernorm", "mlp", "post_attention_layernorm"),
    ),
    "recurrent_gemma": Family(
        "RecurrentGemmaConfig",
        {
            **_GROUPED,
            "lru_width": WIDTH,
            "attention_window_size": 16,
            "block_types": ["recurrent", "attention", "recurrent"],
        },
        middle="channel_pre_norm",
        output="temporal_block.o_proj",
    ),
    "mamba": Family("MambaConfig", _MAMBA, middle="", output="", layers="backbone.layers"),
    "mamba2": Family(
        "Mamba2Config",
        {**_MAMBA, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
        middle="",
        output="",
        layers="backbone.layers",
    ),
    "falcon_mamba": Family(
        "FalconMambaConfig", _MAMBA, middle="", output="", layers="backbone.layers"
    ),
    "rwkv": Family(
        "RwkvConfig",
        {
            **_TOKENS,
            "hidden_size": WIDTH,
            "attention_hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_hidden_layers": BLOCKS,
            "context_length": CONTEXT,
        },
        middle="ln2",
        output="",
        layers="rwkv.blocks",
    ),
}


def build(family: Family, *, seed: int = 0) -> PreTrainedModel:
    """A random network in eval mode; the global random state is left alone."""
    config = getattr(transformers, family.config)(**family.fields)
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def unknown() -> list[str]:
    """Causal model types of transformers that TransformerLens has no adapter for."""
    return sorted(
        kind
        for kind, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if architecture not in SUPPORTED_ARCHITECTURES
    )

"""Components add up to the model's own label logits, and each is what it is said to be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
import xarray as xr
from hypothesis import given, settings, strategies as st

import lensclust as lc
from lensclust.errors import InputError
from probes.components.component_logits import ComponentLogits
from probes.components.decomposition import decompose
from probes.components.frozen_norms import FrozenNorm
from tests.tiny import ARCHITECTURES, D_VOCAB, hf_model, tiny_tokenizer

CHOICES = {"a": 5, "b": 9, "c": 31}
TOKENS = list(CHOICES.values())
NATIVE = "native:sif-small"
# Heads of these pass through a norm before the residual stream.
POST_NORM = ("gemma2",)


def model_of(name: str) -> Any:
    return lc.load(NATIVE if name == "native" else hf_model(name))


def prompts_of(n: int = 12, seed: int = 0, shared: int = 0) -> lc.Prompts:
    rng = np.random.default_rng(seed)
    prefix = rng.integers(3, D_VOCAB, shared).tolist()
    ids = [[*prefix, *rng.integers(3, D_VOCAB, rng.integers(2, 9)).tolist()] for _ in range(n)]
    return lc.Prompts.from_token_lists(ids, pd.DataFrame({"label": [*"abc"] * (n // 3)}))


@torch.no_grad()
def spelt_out(model: Any, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """Label logits of the last token of one prompt, every head in ``d_model`` numbers."""
    logits, cache = model.run_with_cache(tokens)
    final = cache["ln_final.hook_in"][0, -1].double()
    network: Any = model.ln_final
    rms = network.uses_rms_norm
    centre = (lambda x: x) if rms else (lambda x: x - x.mean(-1, keepdim=True))
    eps = float(getattr(model.cfg, "eps", 1e-5))
    scale = (centre(final).square().mean() + eps).sqrt()
    gain = network.weight.double() + (1 if network.uses_weight_offset else 0)
    unembed = model.W_U.double()[:, TOKENS]

    def seen(written: torch.Tensor) -> np.ndarray:
        return (gain * centre(written.double()) / scale @ unembed).numpy()

    found = {"embed": seen(cache["blocks.0.hook_resid_pre"][0, -1])}
    biases = torch.zeros_like(final)
    for block in range(model.cfg.n_layers):
        attention = model.blocks[block].attn
        z = cache[f"blocks.{block}.attn.hook_z"][0, -1]
        for head in range(model.cfg.n_heads):
            found[f"head {block}.{head}"] = seen(z[head] @ attention.W_O[head])
        found[f"mlp {block}"] = seen(cache[f"blocks.{block}.hook_mlp_out"][0, -1])
        if attention.b_O is not None:
            biases += attention.b_O
    shift = torch.zeros_like(final) if rms else network.bias.double()
    own = model.b_U.double()[TOKENS] if model.b_U is not None else 0
    found["bias"] = seen(biases) + (shift @ unembed + own).numpy()
    found["model"] = logits[0, -1, TOKENS].numpy()
    return found


@pytest.mark.parametrize("name", ["native", *ARCHITECTURES])
def test_every_part_is_what_its_component_writes_and_the_parts_add_up(name: str) -> None:
    model, prompts = model_of(name), prompts_of()
    found = decompose(model, prompts, CHOICES, progress=False)
    assert found.error < 1e-4
    for row, length in enumerate(prompts.lengths.tolist()):
        expected = spelt_out(model, prompts.tokens[row : row + 1, :length])
        own = expected.pop("model")
        np.testing.assert_allclose(found.model_logits[row], own, rtol=1e-4, atol=1e-5)
        largest = max(float(np.abs(value).max()) for value in expected.values())
        for component, value in expected.items():
            if name in POST_NORM and component.startswith("head"):
                continue
            part = found.logits.sel(component=component)[row]
            np.testing.assert_allclose(part, value, rtol=1e-4, atol=1e-5 * largest)
    summed = found.logits.sum("component").values
    cap = found.data.attrs["soft_cap"]
    summed = cap * np.tanh(summed / cap) if cap else summed
    np.testing.assert_allclose(summed, found.model_logits, rtol=1e-3, atol=1e-4)


def test_heads_behind_a_norm_of_their_own_add_up_to_what_the_block_writes() -> None:
    model, prompts = model_of("gemma2"), prompts_of(3)
    found = decompose(model, prompts, CHOICES, progress=False)
    for row, length in enumerate(prompts.lengths.tolist()):
        with torch.no_grad():
            _, cache = model.run_with_cache(prompts.tokens[row : row + 1, :length])
            final, last = model.ln_final, cache["ln_final.hook_in"][0, -1]
            scale = (last.square().mean() + model.cfg.eps).sqrt()
            for block in range(model.cfg.n_layers):
                written = cache[f"blocks.{block}.hook_attn_out"][0, -1]
                expected = (written / scale * (1 + final.weight)) @ model.W_U[:, TOKENS]
                here = (found.data["kind"] == "head") & (found.data["block"] == block)
                heads = found.logits[row].where(here, drop=True).sum("component")
                np.testing.assert_allclose(heads, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_agrees_with_transformer_lens_where_norms_are_folded(name: str) -> None:
    """After folding, its direct logit attribution is right; the decomposition stays the same."""
    model, prompts = model_of(name), prompts_of(3)
    before = decompose(model, prompts, CHOICES, progress=False)
    model.enable_compatibility_mode(disable_warnings=True, center_unembed=False)
    after = decompose(model, prompts, CHOICES, progress=False)
    np.testing.assert_allclose(after.model_logits, before.model_logits, rtol=1e-3, atol=1e-3)
    for row, length in enumerate(prompts.lengths.tolist()):
        with torch.no_grad():
            _, cache = model.run_with_cache(prompts.tokens[row : row + 1, :length])
            stack = cache.stack_head_results(layer=-1, pos_slice=-1)
            normed = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
            expected = (normed @ model.W_U[:, TOKENS])[:, 0]
        heads = after.logits[row][(after.data["kind"] == "head").values]
        np.testing.assert_allclose(heads, expected, rtol=1e-3, atol=1e-4)


def test_shared_prefixes_and_small_batches_change_nothing() -> None:
    model, prompts = model_of("llama"), prompts_of(30, shared=30)
    plain = decompose(model, prompts, CHOICES, share_prefixes=False, progress=False)
    shared = decompose(model, prompts, CHOICES, progress=False)
    small = decompose(model, prompts, CHOICES, batch_tokens=50, progress=False)
    for other in (shared, small):
        np.testing.assert_allclose(other.logits, plain.logits, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(d=st.integers(4, 40), centred=st.booleans(), offset=st.booleans(), seed=st.integers(0, 99))
def test_a_norm_is_read_off_what_it_does(d: int, centred: bool, offset: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gain, shift = torch.randn(2, d, generator=generator)
    shift = shift if centred else torch.zeros(d)

    def norm(x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True) if centred else x
        scaled = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * (1 + gain if offset else gain) + shift

    found = FrozenNorm.of(norm, torch.zeros(1), d)
    states = 3 * torch.randn(5, d, generator=generator)
    assert found.centred == centred
    rebuilt = found.scaled_only(states) * found.inverse_scale(states, norm(states))[:, None]
    assert torch.allclose(rebuilt + found.shift, norm(states), atol=1e-4)
    weights = torch.randn(d, 3, generator=generator)
    pulled = (
        states @ found.pulled_back(weights) * found.inverse_scale(states, norm(states))[:, None]
    )
    assert torch.allclose(pulled + found.shift @ weights, norm(states) @ weights, atol=1e-3)


def planted(n: int = 400, seed: int = 0) -> ComponentLogits:
    """One component that knows, one that is always wrong, one that always says the same, noise."""
    rng = np.random.default_rng(seed)
    targets = rng.permutation(np.arange(n) % 2)
    right = np.eye(2)[targets]
    logits = rng.normal(size=(n, 8, 2))
    logits[:, 1] = right + 0.1 * rng.normal(size=(n, 2))
    logits[:, 2] = -logits[:, 1]
    logits[:, 3] = [5.0, 0.0]
    logits[:, [0, 7]] = 0  # embedding and biases say the same of every prompt
    coords = {
        "component": ["embed", *(f"head 0.{h}" for h in range(5)), "mlp 0", "bias"],
        "kind": ("component", ["embed", *["head"] * 5, "mlp", "bias"]),
        "block": ("component", [-1, *[0] * 6, -1]),
        "head": ("component", [-1, *range(5), -1, -1]),
        "label": ["no", "yes"],
        "token": ("label", [1, 2]),
        "target": ("prompt", np.array(["no", "yes"])[targets]),
    }
    data = xr.Dataset(
        {
            "logits": (("prompt", "component", "label"), logits.astype(np.float32)),
            "model_logits": (("prompt", "label"), logits.sum(1).astype(np.float32)),
        },
        coords,
    )
    return ComponentLogits(data, 0.0)


def test_planted_kinds_are_found_and_noise_is_none() -> None:
    kinds = planted().kinds().set_index("component")["type"]
    assert kinds["head 0.0"] == "good"
    assert kinds["head 0.1"] == "bad"
    assert kinds["head 0.2"] == "label-biased"
    noise = kinds[["head 0.3", "head 0.4", "mlp 0"]]
    assert (noise == "chance").all()


def test_ignorant_components_are_rarely_called_anything() -> None:
    """Over 100 draws the share with any false find stays near the level."""
    finds = []
    for seed in range(100):
        kinds = planted(seed=seed).kinds(level=0.05).set_index("component")["type"]
        finds.append(bool((kinds[["head 0.3", "head 0.4", "mlp 0"]] != "chance").any()))
    assert np.mean(finds) <= 0.12


def test_accuracies_and_biases_by_hand_and_in_any_order_of_prompts() -> None:
    found = planted()
    assert float(found.accuracy().sel(component="head 0.0")) > 0.99
    assert float(found.label_bias().sel(component="head 0.2", label="no")) == 1
    np.testing.assert_allclose(found.label_bias().sum("label"), 1)
    order = np.random.default_rng(0).permutation(400)
    np.testing.assert_allclose(found.take(order).accuracy(), found.accuracy())
    assert len(found.take([3, 1]).targets) == 2
    found.plot()


def test_transfer_is_whole_to_itself_and_near_none_to_other_noise() -> None:
    found = planted()
    own = found.transfer(found, top=2)
    assert own.correlation == pytest.approx(1)
    assert own.jaccard == 1
    accuracy = found.accuracy().values
    swapped = ComponentLogits(
        found.data.assign(logits=found.logits.copy(data=found.logits.values[:, ::-1])), 0.0
    )
    other = found.transfer(swapped, top=2)
    writers = slice(1, 7)
    expected = np.corrcoef(accuracy[writers], accuracy[::-1][writers])[0, 1]
    assert other.correlation == pytest.approx(expected)


def test_bad_input_is_refused_in_one_line(tmp_path: Any) -> None:
    model, prompts = model_of("llama"), prompts_of()
    unlabelled = decompose(model, prompts, CHOICES, label=None, progress=False)
    textual: Any = model_of("llama")
    textual.tokenizer = tiny_tokenizer(tmp_path)
    refused: dict[str, Any] = {
        "both token 5": lambda: decompose(model, prompts, {"a": 5, "b": 5, "c": 6}),
        "two or more": lambda: decompose(model, prompts, {"a": 5}),
        "vocabulary of": lambda: decompose(model, prompts, {**CHOICES, "d": D_VOCAB}),
        "no tokenizer": lambda: decompose(model, prompts, {"a": "w1", "b": "w2", "c": "w3"}),
        "splits into 2 tokens ['w1', 'w2']": lambda: decompose(
            textual, prompts, {"a": "w1 w2", "b": "w2", "c": "w3"}
        ),
        "none of the choices": lambda: decompose(model, prompts, {"a": 5, "b": 6}),
        "no column 'answer'": lambda: decompose(model, prompts, CHOICES, label="answer"),
        "no right labels": unlabelled.accuracy,
        "expected 1 to": lambda: planted().transfer(planted(), top=99),
        "different components": lambda: planted().transfer(unlabelled),
        "biased=2.0": lambda: planted().kinds(biased=2.0),
    }
    for words, call in refused.items():
        with pytest.raises(InputError) as caught:
            call()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    texts = {"a": "w1", "b": "w2", "c": "w3"}
    found = decompose(textual, prompts, texts, progress=False)
    assert found.data["token"].values.tolist() == [5, 6, 7]


def test_a_model_whose_parts_do_not_add_up_is_refused() -> None:
    model: Any = model_of("llama")
    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda value, hook: value + 1.0)]),
        pytest.raises(InputError, match="do not add up"),
    ):
        decompose(model, prompts_of(), CHOICES, progress=False)


SIZES: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GRANITE: dict[str, Any] = {
    "residual_multiplier": 0.3,
    "logits_scaling": 5.0,
    "embedding_multiplier": 7.0,
    "attention_multiplier": 0.2,
}


def multiplied(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A network that multiplies what it adds, or its logits."""
    config = {
        "granite": lambda: transformers.GraniteConfig(**SIZES, **GRANITE),
        "cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.03),
        "cohere2": lambda: transformers.Cohere2Config(**SIZES, logit_scale=0.7),
    }[name]()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        network: Any = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval().to(dtype)


@pytest.mark.parametrize("name", ["granite", "cohere", "cohere2"])
@torch.no_grad()
def test_what_a_network_multiplies_is_multiplied(name: str) -> None:
    plain, prompts, labels = multiplied(name), prompts_of().take(range(4)), [5, 17]
    model = lc.load(multiplied(name))
    found = decompose(model, prompts, {"a": 5, "b": 17}, label=None)
    config = plain.config
    added = getattr(config, "residual_multiplier", 1.0)
    scale = getattr(config, "logit_scale", None) or 1 / config.logits_scaling
    for row, length in enumerate(prompts.lengths.tolist()):
        seen: dict[str, torch.Tensor] = {}

        def keep(name: str, at: str, seen: dict[str, torch.Tensor] = seen) -> Any:
            def hook(_module: Any, given: Any, out: Any) -> None:
                seen[name] = (given[0] if at == "in" else out)[0, -1]

            return hook

        parts = [("norm", plain.model.norm, "in"), ("normed", plain.model.norm, "out")]
        parts += [(f"z{i}", b.self_attn.o_proj, "in") for i, b in enumerate(plain.model.layers)]
        parts += [(f"mlp{i}", b.mlp, "out") for i, b in enumerate(plain.model.layers)]
        handles = [part.register_forward_hook(keep(key, at)) for key, part, at in parts]
        logits = plain(prompts.tokens[row : row + 1, :length]).logits[0, -1, labels]
        for handle in handles:
            handle.remove()
        here = found.logits[row]
        np.testing.assert_allclose(here.sum("component"), logits, rtol=1e-4, atol=1e-5)
        state = seen["norm"]
        centred = name != "granite"
        gain = seen["normed"] / (state - state.mean() if centred else state)

        def written(
            vector: torch.Tensor, centred: bool = centred, gain: torch.Tensor = gain
        ) -> np.ndarray:
            vector = added * vector
            vector = vector - vector.mean() if centred else vector
            return (scale * (gain * vector) @ plain.lm_head.weight[labels].T).numpy()

        for index, block in enumerate(plain.model.layers):
            mlp = here.sel(component=f"mlp {index}")
            np.testing.assert_allclose(mlp, written(seen[f"mlp{index}"]), rtol=2e-3, atol=1e-5)
            for head in range(4):
                own = slice(8 * head, 8 * head + 8)
                vector = block.self_attn.o_proj.weight[:, own] @ seen[f"z{index}"][own]
                part = here.sel(component=f"head {index}.{head}")
                np.testing.assert_allclose(part, written(vector), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["granite", "cohere"])
def test_labels_whose_logits_are_near_zero_add_up_in_half_precision(name: str) -> None:
    model, prompts = lc.load(multiplied(name, torch.bfloat16)), prompts_of().take([0])
    length = int(prompts.lengths[0])
    with torch.no_grad():
        logits = model(prompts.tokens[:, :length])[0, -1].float()
    a, b = logits.abs().topk(2, largest=False).indices.tolist()
    assert logits[[a, b]].abs().max() < 0.1 * logits.square().mean().sqrt()
    found = decompose(model, prompts, {"a": a, "b": b}, label=None)
    assert found.error < 0.05


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_autocast_is_named_where_it_is_what_does_not_add_up(name: str) -> None:
    model, prompts = lc.load(hf_model(name)), prompts_of()
    given: Any = {"label": None, "progress": False}
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(lc.InputError) as caught:
        decompose(model, prompts, {"a": 3, "b": 5}, **given)
    assert "torch.autocast rounds to torch.bfloat16" in str(caught.value)
    assert "dtype=torch.bfloat16" in str(caught.value)
    # What it advises works.
    assert decompose(model, prompts, {"a": 3, "b": 5}, **given).error < 1e-4
    half = lc.load(hf_model(name), dtype=torch.bfloat16)
    assert decompose(half, prompts, {"a": 3, "b": 5}, **given).error < 0.1


def test_a_block_without_heads_is_named() -> None:
    config = transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])
    model = lc.load(transformers.AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(InputError, match=r"^decompose: block 0 of .* has no heads"):
        decompose(model, prompts_of(), {"a": 5, "b": 17}, label=None)


@pytest.mark.slow
def test_smollm2_adds_up() -> None:
    model = lc.load("smollm2-135m-instruct")
    rows = pd.DataFrame({"label": ["good", "bad"] * 4})
    texts = [f"Review: a {word} film.\nIt was" for word in ("great", "dull") * 4]
    prompts = lc.Prompts.from_texts(texts, rows, model.tokenizer)
    found = decompose(model, prompts, {"good": " good", "bad": " bad"}, progress=False)
    assert found.error < 1e-4
    assert found.logits.sizes["component"] == 1 + 30 * 9 + 30 + 1

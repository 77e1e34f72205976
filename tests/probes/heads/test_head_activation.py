"""The gate's gradient is attention times its gradient, and asking for it leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

import lensclust as lc
from lensclust.errors import InputError
from lensclust.models.native import native_config
from probes.heads.activation import head_activation
from tests.tiny import D_VOCAB, N_CTX, hf_model

# Where the pattern that a hook is given is the one that the model goes on with.
IN_GRAPH = ("native", "gpt2", "llama", "neox", "gemma2", "qwen2")


def fresh(name: str, dtype: torch.dtype = torch.float32) -> Any:
    if name == "native":
        return lc.load(native_config("sif-small"), dtype=dtype)
    network: Any = hf_model(name)
    network.to(dtype)
    if dtype == torch.float64:
        for part in network.modules():
            if type(part).__name__.endswith("RMSNorm"):
                part.forward = partial(_rms_norm, part)
    return lc.load(network)


model_of = cache(fresh)
"""One model for all tests that leave it as it is."""


def _rms_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """In the precision of x: transformers takes it in single precision whatever it is given."""
    gemma = type(norm).__name__.startswith("Gemma")
    eps = norm.eps if gemma else norm.variance_epsilon
    return F.rms_norm(x, x.shape[-1:], norm.weight + gemma, eps)


def prompts_of(n: int = 6, seed: int = 0, longest: int = 9) -> lc.Prompts:
    rng = np.random.default_rng(seed)

    def some(low: int, high: int) -> list[int]:
        return rng.integers(3, D_VOCAB, rng.integers(low, high)).tolist()

    ids = [some(2, longest) for _ in range(n)]
    rows = pd.DataFrame({"task": [*"ab"] * (n // 2)})
    return lc.Prompts.from_token_lists(ids, rows, answers=[some(1, 4) for _ in ids])


def answer_loss(logits: torch.Tensor, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Mean over an answer's tokens of minus the log-probability, of one prompt on its own."""
    said = logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return -torch.stack([said[p, t] for p, t in zip(places, answer, strict=True)]).mean()


def one_by_one(prompts: lc.Prompts) -> list[tuple[list[int], list[int]]]:
    assert prompts.answers is not None
    lengths = prompts.lengths.tolist()
    tokens = [row[:n].tolist() for row, n in zip(prompts.tokens, lengths, strict=True)]
    return list(zip(tokens, map(list, prompts.answers), strict=True))


def by_hooks(model: Any, prompt: list[int], answer: list[int], point: str) -> torch.Tensor:
    """``x . dL/dx`` of each block and head, of one prompt; x is z or the attention matrix."""
    kept: dict[str, torch.Tensor] = {}

    def keep(value: torch.Tensor, hook: Any) -> torch.Tensor:
        kept[hook.name] = value
        return value

    names = [f"blocks.{block}.attn.{point}" for block in range(model.cfg.n_layers)]
    tokens = torch.tensor([prompt + answer])
    logits = model.run_with_hooks(tokens, fwd_hooks=[(name, keep) for name in names])
    values = list(kept.values())
    slopes = torch.autograd.grad(answer_loss(logits, prompt, answer), values)
    heads = 2 if point == "hook_z" else 1
    return torch.stack(
        [
            (x * g)[0].movedim(heads - 1, 0).flatten(1).sum(1)
            for x, g in zip(values, slopes, strict=True)
        ]
    ).detach()


@pytest.fixture
def softmax_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention takes its softmax in single precision, also of doubles."""
    plain = F.softmax

    def softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return plain(x, dim, dtype=None if x.dtype == torch.float64 else dtype)

    monkeypatch.setattr(F, "softmax", softmax)


@pytest.mark.usefixtures("softmax_in_double")
@pytest.mark.parametrize("name", IN_GRAPH)
def test_the_three_forms_are_one_in_double_precision(name: str) -> None:
    model, prompts = model_of(name, torch.float64), prompts_of()
    found = head_activation(model, prompts, batch_tokens=30)
    assert found.signed.dtype == np.float64
    for row, (prompt, answer) in enumerate(one_by_one(prompts)):
        ours = found.signed[row].values
        for point in ("hook_z", "hook_pattern"):
            theirs = by_hooks(model, prompt, answer, point).numpy()
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10 * np.abs(theirs).max())
        loss = answer_loss(model(torch.tensor([prompt + answer])), prompt, answer)
        assert found.losses.values[row] == pytest.approx(loss.item(), rel=1e-12)
    np.testing.assert_allclose(found.pattern, np.abs(found.signed.values).mean(0), rtol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_agrees_with_attention_matrices_of_transformers(name: str) -> None:
    network, model, prompts = hf_model(name), model_of(name), prompts_of()
    found = head_activation(model, prompts)
    for row, (prompt, answer) in enumerate(one_by_one(prompts)):
        out = network(torch.tensor([prompt + answer]), output_attentions=True)
        slopes = torch.autograd.grad(answer_loss(out.logits, prompt, answer), out.attentions)
        theirs = torch.stack(
            [(a * g)[0].sum((1, 2)) for a, g in zip(out.attentions, slopes, strict=True)]
        )
        largest = float(theirs.detach().abs().max())
        np.testing.assert_allclose(found.signed[row], theirs.detach(), atol=1e-4 * largest)


@pytest.mark.parametrize("name", ["native", "gpt2", "llama", "opt"])
def test_gates_moved_a_little_move_the_loss_as_found(name: str) -> None:
    model, prompts = model_of(name, torch.float64), prompts_of(2)
    found = head_activation(model, prompts).signed
    prompt, answer = one_by_one(prompts)[0]
    tokens, step = torch.tensor([prompt + answer]), 1e-3

    def loss(block: int, head: int, gate: float) -> float:
        def scale(z: torch.Tensor, hook: Any) -> torch.Tensor:
            factor = torch.ones(z.shape[2]).to(z)
            factor[head] = gate
            return z * factor[None, None, :, None]

        with torch.no_grad():
            hooks = [(f"blocks.{block}.attn.hook_z", scale)]
            return float(answer_loss(model.run_with_hooks(tokens, fwd_hooks=hooks), prompt, answer))

    for block, head in np.ndindex(found.shape[1:]):
        slope = (loss(block, head, 1 + step) - loss(block, head, 1 - step)) / (2 * step)
        # Parts of some models compute in single precision whatever their weights are in.
        assert slope == pytest.approx(float(found[0, block, head]), rel=1e-2, abs=1e-3)


LLAMA = model_of("llama")


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch_tokens=st.integers(1, 60),
    padding=st.integers(0, 5),
    pad_id=st.integers(0, D_VOCAB - 1),
)
def test_neither_batches_nor_order_nor_padding_change_anything(
    seed: int, batch_tokens: int, padding: int, pad_id: int
) -> None:
    prompts = prompts_of(seed=seed)
    plain = head_activation(LLAMA, prompts, batch_tokens=1)
    order = np.random.default_rng(seed).permutation(len(prompts))
    dealt = prompts.take(order)
    beyond = torch.arange(dealt.tokens.shape[1]) >= dealt.lengths[:, None]
    padded = F.pad(dealt.tokens.masked_fill(beyond, pad_id), (0, padding), value=pad_id)
    other = head_activation(
        LLAMA, replace(dealt, tokens=padded, pad_id=pad_id), batch_tokens=batch_tokens
    )
    largest = float(plain.values.max())
    np.testing.assert_allclose(other.signed, plain.signed[order], atol=1e-5 * largest)
    np.testing.assert_allclose(other.losses, plain.losses[order], rtol=1e-5)
    assert other.data["task"].values.tolist() == plain.data["task"].values[order].tolist()


def test_heads_that_write_nothing_are_not_active_and_the_only_one_is() -> None:
    model, prompts = fresh("llama"), prompts_of(12)
    width = model.cfg.d_head
    with torch.no_grad():
        for block in range(model.cfg.n_layers):
            weight = model.blocks[block].attn.o.weight
            kept = weight[:, 2 * width : 3 * width].clone()
            weight.zero_()
            if block == 1:
                weight[:, 2 * width : 3 * width] = kept
    found = head_activation(model, prompts)
    assert found.pattern.values[1, 2] > 1e-3
    assert np.count_nonzero(found.pattern.values) == 1
    heads = found.pattern.size
    scores = found.concentration().set_index("metric")["value"]
    assert scores["gini"] == pytest.approx((heads - 1) / heads)
    assert scores["cv"] == pytest.approx(np.sqrt(heads - 1))


def test_a_loss_of_ones_own_is_of_the_last_token_and_knows_its_prompt() -> None:
    model, prompts = model_of("gpt2", torch.float64), prompts_of()
    assert prompts.answers is not None
    first = torch.tensor([answer[0] for answer in prompts.answers])

    def surprise(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, first[rows], reduction="none")

    short = replace(prompts, answers=tuple(answer[:1] for answer in prompts.answers))
    ours = head_activation(model, replace(prompts, answers=None), loss=surprise, batch_tokens=20)
    theirs = head_activation(model, short, batch_tokens=20)
    np.testing.assert_allclose(ours.signed, theirs.signed, rtol=1e-9, atol=1e-12)
    assert (ours.data.attrs["loss"], theirs.data.attrs["loss"]) == ("surprise", "answer")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_up_in_single(dtype: torch.dtype) -> None:
    prompts = prompts_of(12)
    exact = head_activation(model_of("llama"), prompts)
    half = head_activation(model_of("llama", dtype), prompts)
    assert half.signed.dtype == np.float32
    assert exact.similarity(half)["pearson"] > 0.99


@torch.no_grad()
def test_the_model_is_left_as_it_was_also_when_the_loss_raises() -> None:
    model, prompts = fresh("llama"), prompts_of()
    asks = {name: index % 2 == 0 for index, (name, _) in enumerate(model.named_parameters())}
    for name, weight in model.named_parameters():
        weight.requires_grad_(asks[name])

    def untouched() -> bool:
        points = {id(point): point for point in model.hook_dict.values()}.values()
        return (
            {name: weight.requires_grad for name, weight in model.named_parameters()} == asks
            and all(weight.grad is None for weight in model.parameters())
            and not any(point.fwd_hooks or point.bwd_hooks for point in points)
            and not model.training
            and not torch.is_grad_enabled()
        )

    before = lc.fingerprint(model)
    head_activation(model, prompts)
    assert untouched()

    def fails(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        head_activation(model, prompts, loss=fails)
    assert untouched()
    assert lc.fingerprint(model) == before


@pytest.mark.parametrize("name", ["native", "llama"])
def test_a_model_without_a_parameter_that_asks_for_gradients_is_measured(name: str) -> None:
    prompts = prompts_of()
    free, closed = fresh(name), fresh(name)
    closed.requires_grad_(False)
    np.testing.assert_array_equal(
        head_activation(free, prompts).signed, head_activation(closed, prompts).signed
    )


# -- whatever computes attention ---------------------------------------------------------------

EAGER: dict[str, Any] = {"attn_implementation": "eager"}
SIZES: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": N_CTX,
    "pad_token_id": 0,
    **EAGER,
}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
OTHERS: dict[str, Any] = {
    "gpt1": lambda: transformers.OpenAIGPTConfig(
        vocab_size=D_VOCAB,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=N_CTX,
        **EAGER,
    ),
    # Kinks, and tokens that go to other experts.
    "opt": lambda: transformers.OPTConfig(
        **{key: size for key, size in SIZES.items() if key != "intermediate_size"},
        ffn_dim=48,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, **EXPERTS, num_key_value_heads=2),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SIZES, **EXPERTS, num_key_value_heads=2, head_dim=8, sliding_window=4
    ),
    "jamba": lambda: transformers.JambaConfig(
        **SIZES,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=4,
        use_mamba_kernels=False,
    ),
}


def network_of(config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network: Any = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", list(OTHERS))
def test_equals_attention_matrices_of_an_unwrapped_network(name: str, seed: int) -> None:
    model = lc.load(network_of(OTHERS[name](), seed))
    plain, prompts = network_of(OTHERS[name](), seed), prompts_of(4, seed=seed)
    found = head_activation(model, prompts).signed
    assert found["block"].values.tolist() == ([1] if name == "jamba" else [0, 1, 2])
    for row, (prompt, answer) in enumerate(one_by_one(prompts)):
        out = plain(torch.tensor([prompt + answer]), output_attentions=True)
        attentions = [each for each in out.attentions if each is not None]
        slopes = torch.autograd.grad(answer_loss(out.logits, prompt, answer), attentions)
        theirs = torch.stack(
            [(a * g)[0].sum((1, 2)) for a, g in zip(attentions, slopes, strict=True)]
        ).detach()
        np.testing.assert_allclose(found[row], theirs, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_behind_a_norm_are_refused(dtype: torch.dtype) -> None:
    config = transformers.BitNetConfig(**SIZES, num_key_value_heads=2)
    model = lc.load(network_of(config, 0).to(dtype))
    with pytest.raises(InputError, match=r"cannot be gated: a gate's gradient is not attention"):
        head_activation(model, prompts_of())


# -- gates that do not reach the loss ---------------------------------------------------------


def test_a_block_that_goes_on_with_something_else_is_named() -> None:
    model = fresh("llama")
    output = model.blocks[1].attn.o.original_component
    output.register_forward_pre_hook(lambda module, given: (given[0].detach(),))
    with pytest.raises(InputError, match=r"gates of block 1 of .* do not reach the loss"):
        head_activation(model, prompts_of())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_weights_without_a_backward_are_refused() -> None:
    """Half of the path from the gates to the loss is there, so only a forward tells."""
    model = fresh("llama")
    for block in model.blocks:
        for part in ("gate", "in", "out"):
            _quantise(block.mlp, part)
    with pytest.raises(InputError, match="is not that of its loss"):
        head_activation(model, prompts_of())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantised_unembedding_is_refused() -> None:
    model = fresh("llama")
    _quantise(model, "unembed")
    with pytest.raises(InputError, match="do not reach the loss"):
        head_activation(model, prompts_of())


def _quantise(parent: torch.nn.Module, name: str) -> None:
    """Weights of a linear map in eight bits, by code that has no backward."""
    bridge: Any = getattr(parent, name)
    whole = torch.nn.Sequential(bridge.original_component)
    eight = torch.ao.quantization.quantize_dynamic(whole, {torch.nn.Linear}, torch.qint8)[0]
    bridge.set_original_component(eight)


# -- at the door ------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_its_prompt() -> None:
    # Llama's unembedding is not tied to what is broken here; it would be in every logit.
    model, prompts, row, strange = fresh("llama"), prompts_of(), 3, 2
    # No other prompt holds this token.
    prompts.tokens[row, 0] = strange
    with torch.no_grad():
        model.embed.weight[strange] = torch.nan
    with pytest.raises(InputError, match=rf"loss of prompt {row} is not finite"):
        head_activation(model, prompts)


def test_wrong_input_is_one_clear_line() -> None:
    model, prompts = fresh("native"), prompts_of()
    assert prompts.answers is not None
    holey = (*prompts.answers[:2], (), *prompts.answers[3:])
    long = prompts_of(longest=N_CTX)
    full = replace(long, answers=((5,) * N_CTX,) * len(long))
    for given_prompts, options, message in [
        (replace(prompts, answers=None), {}, "prompt 0 has no answer"),
        (replace(prompts, answers=holey), {}, "prompt 2 has no answer"),
        (replace(prompts, answers=((999,),) * 6), {}, "token id 999 given"),
        (full, {}, f"but .* has a context of {N_CTX}"),
        (prompts, {"loss": "logits"}, "loss 'logits' is not known"),
        (prompts, {"batch_tokens": 0}, "batch_tokens=0, expected at least 1"),
        (prompts, {"loss": lambda logits, rows: logits.sum()}, "expected one number each"),
        (prompts, {"loss": lambda logits, rows: logits[:, 0].detach()}, "has no gradient"),
        (replace(prompts, rows=pd.DataFrame({"head": range(6)})), {}, "'head' of the rows"),
    ]:
        with pytest.raises(InputError, match=message) as raised:
            head_activation(model, given_prompts, **options)
        assert "\n" not in str(raised.value)
    model.train()
    with pytest.raises(InputError, match="is in training mode"):
        head_activation(model, prompts)

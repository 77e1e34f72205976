"""A network in memory while a bridge of it is in use: its own, and seen as it is now.

The other side of every comparison is a plain copy of the network, made at that moment, with
torch hooks on its blocks.
"""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import prune
from transformer_lens.model_bridge.sources.native import NativeModel
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import lensclust as lc
from lensclust.inference.prefix_sharing.sharing import obstacle
from lensclust.models.native import native_config
from tests.tiny import ARCHITECTURES, D_VOCAB, hf_model, tiny_tokenizer

_SMALL: dict[str, Any] = {"vocab_size": D_VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
_FOUR: dict[str, Any] = {**_SMALL, "num_attention_heads": 4}
# Joint projections that TransformerLens splits into views and into copies, and experts.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", {"vocab_size": D_VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", _FOUR),
    "mpt": ("Mpt", {"vocab_size": D_VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "codegen": (
        "CodeGen",
        {"vocab_size": D_VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    ),
    "phi3": ("Phi3", {**_FOUR, "intermediate_size": 48, "pad_token_id": 0}),
    "mixtral": (
        "Mixtral",
        {**_FOUR, "intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4},
    ),
}
FAMILIES = [*ARCHITECTURES, *MORE]
SOME = [
    name
    if name in ("gpt2", "neox", "llama", "falcon")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in FAMILIES
]
LISTS = [[5, 9, 13, 7], [8, 17], [4, 4, 21, 30, 11, 12]]
PROMPTS = lc.Prompts.from_token_lists(LISTS, pd.DataFrame({"task": list("aba")}))
TOKENS = torch.randint(4, D_VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))


def network_of(name: str, *, seed: int = 0) -> PreTrainedModel:
    if name in ARCHITECTURES:
        return hf_model(name, seed)
    kind, fields = MORE[name]
    config = getattr(transformers, f"{kind}Config")(
        **fields, bos_token_id=1, eos_token_id=2, attn_implementation="eager"
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    return stirred(model, seed).eval()


def stirred(network: Any, seed: int = 1, *, through: str = "add_") -> Any:
    """Every parameter moved, by one of the ways in which they come to move."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        step = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
        with torch.no_grad():
            if through == "add_":
                parameter.add_(step)
            elif through == "data":
                parameter.data = parameter.data + step
            else:
                parameter.data.add_(step)
    return network


def plain_states(network: Any) -> np.ndarray:
    """What goes out of each block at each prompt's last token, by hooks on a copy."""
    network = copy.deepcopy(network).eval()
    blocks = next(
        module
        for module in network.modules()
        if isinstance(module, nn.ModuleList) and len(module) == network.config.num_hidden_layers
    )
    found = []
    for ids in LISTS:
        row: list[Tensor] = []

        def keep(_module: Any, _args: Any, out: Any, row: list[Tensor] = row) -> None:
            row.append((out[0] if isinstance(out, tuple) else out)[0, -1].detach().float())

        handles = [block.register_forward_hook(keep) for block in blocks]
        with torch.no_grad():
            network(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        found.append(torch.stack(row))
    return torch.stack(found).numpy()


def our_states(model: Any) -> np.ndarray:
    acts = lc.extract(model, PROMPTS, "resid", progress=False)
    return acts.resid.values[:, 0, 1:]


def assert_in_step(model: Any, network: Any) -> None:
    np.testing.assert_allclose(our_states(model), plain_states(network), rtol=2e-4, atol=2e-5)


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(lc.InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- left alone, and followed -----------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_a_network_in_memory_is_left_alone_and_followed(name: str, tmp_path: Path) -> None:
    network = network_of(name)
    before, logits = snapshot(network), network(TOKENS).logits
    kinds = [type(module) for module in network.modules()]
    state = torch.get_rng_state()
    model = lc.load(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(snapshot(network), before)
    assert [type(module) for module in network.modules()] == kinds
    assert torch.equal(network(TOKENS).logits, logits)
    assert_in_step(model, network)

    prints = {lc.fingerprint(model)}
    for seed, through in enumerate(["add_", "data", "data.add_"]):
        stirred(network, 5 + seed, through=through)
        assert_in_step(model, network)
        prints.add(lc.fingerprint(model))
    assert len(prints) == 4

    for assign in (False, True):
        network.load_state_dict({k: v.clone() for k, v in before.items()}, assign=assign)
        network.tie_weights()
        assert_in_step(model, network)
        assert lc.fingerprint(model) in prints
        stirred(network)
        assert_in_step(model, network)

    network.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(TOKENS).logits, network(TOKENS).logits, atol=1e-5, rtol=1e-4)
    assert lc.release(model) is network
    assert "released" in refused(lambda: our_states(model))


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "falcon", "phi3", "mixtral"])
def test_what_is_trained_through_the_bridge_is_in_the_network(name: str) -> None:
    network = network_of(name)
    before = snapshot(network)
    model = lc.load(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        logits: Any = model(TOKENS)
        nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()
        ).backward()
        optimizer.step()
    # Before anything else is done: the state of the network is that of the last step.
    after = snapshot(network)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > len(before) / 2
    plain = network_of(name)
    plain.load_state_dict(after)
    torch.testing.assert_close(plain(TOKENS).logits, model(TOKENS), atol=1e-5, rtol=1e-4)
    assert torch.equal(plain(TOKENS).logits, network(TOKENS).logits)
    assert_in_step(model, network)
    stirred(network)
    assert_in_step(model, network)


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_fine_tuning_by_us_is_seen_in_the_network_for_as_long_as_it_lasts(name: str) -> None:
    network = network_of(name)
    before = snapshot(network)
    model = lc.load(network)
    prompts = lc.Prompts.from_token_lists(LISTS, PROMPTS.rows, answers=[[5], [6], [7]])
    run = lc.finetune(model, prompts, steps=3, lr=1e-2, only=["head 1.2"], progress=False)
    assert_same(snapshot(network), before)
    with run.at(3):
        torch.testing.assert_close(network(TOKENS).logits, model(TOKENS), atol=1e-5, rtol=1e-4)
        assert any(not torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert_same(snapshot(network), before)
    assert_in_step(model, network)


def test_joint_weights_that_were_changed_on_both_sides_are_refused() -> None:
    network = network_of("neox")
    model = lc.load(network)
    with torch.no_grad():
        weight: Any = model.blocks[0].attn.q.weight  # pyright: ignore
        kept = weight.clone()
        weight.add_(1).copy_(kept)
    stirred(network)  # what the bridge has was changed, and is what it was
    assert_in_step(model, network)
    stirred(network)
    with torch.no_grad():
        model.blocks[0].attn.q.weight.add_(1)
    assert "expected one of the two" in refused(lambda: model(TOKENS))


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_a_network_that_is_cast_is_followed(name: str) -> None:
    network: Any = network_of(name)
    model = lc.load(network)
    network.to(torch.bfloat16)
    found = model(TOKENS)
    assert found.dtype == model.cfg.dtype == torch.bfloat16
    torch.testing.assert_close(found, copy.deepcopy(network)(TOKENS).logits, atol=0.05, rtol=0.05)
    network.to(torch.float32)
    assert_in_step(model, network)


def test_parameters_are_not_held_twice_and_stay_tied() -> None:
    network = network_of("gpt2")
    model = lc.load(network)
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    assert {parameter.untyped_storage().data_ptr() for parameter in model.parameters()} == own
    assert model.embed.weight is model.unembed.weight is network.lm_head.weight  # pyright: ignore


def test_a_bare_native_model_is_left_alone_and_followed() -> None:
    network = NativeModel(native_config("sif-small", seed=5))
    keys = list(network.state_dict())
    model = lc.load(network)
    assert list(network.state_dict()) == keys
    tokens = TOKENS % 60
    torch.testing.assert_close(model(tokens), network(tokens), atol=3e-6, rtol=0)
    stirred(network)
    torch.testing.assert_close(model(tokens), network(tokens), atol=3e-5, rtol=1e-5)
    assert lc.fingerprint(network) == lc.fingerprint(model)


def test_networks_that_were_rebuilt_are_refused_until_they_are_loaded_again() -> None:
    network: Any = network_of("llama")
    model = lc.load(network)
    network.resize_token_embeddings(D_VOCAB + 4, mean_resizing=False)
    assert "load it again" in refused(lambda: our_states(model))
    assert "load it again" in refused(lambda: model.original_model(TOKENS))
    again = lc.load(network)
    assert again is not model
    assert again(TOKENS).shape[-1] == D_VOCAB + 4
    assert_in_step(again, network)


def test_weights_of_the_bridge_alone_are_refused_once_the_network_has_moved() -> None:
    network = network_of("gpt2")
    before = snapshot(network)
    model = lc.load(network)
    model.enable_compatibility_mode(disable_warnings=True)
    model(TOKENS)
    assert_same(snapshot(network), before)
    stirred(network)
    assert "load the network again" in refused(lambda: model(TOKENS))


def _scaled(network: Any) -> None:
    for weight in network.parameters():
        weight.data.mul_(1.2)


def _swapped(network: Any) -> None:
    for weight, other in zip(network.parameters(), network_of("qwen2", seed=4).parameters()):  # noqa: B905
        weight.data.copy_(other.flatten()[: weight.numel()].reshape(weight.shape))


def _merged(network: Any) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    tuned: Any = get_peft_model(network, config)
    tuned.merge_and_unload()


def _one_value(network: Any) -> None:
    next(network.parameters()).data[3, 5] += 1


@pytest.mark.parametrize("edit", [_scaled, _swapped, _merged, _one_value])
@pytest.mark.parametrize("own", ["double", "half", "folded"])
def test_weights_of_the_bridge_alone_are_refused_once_values_have_changed(
    edit: Callable[[Any], None], own: str
) -> None:
    """No edit here leaves a mark on a tensor's version."""
    network = network_of("qwen2")
    dtypes = {"double": torch.float64, "half": torch.bfloat16}
    model = lc.load(network, dtype=dtypes.get(own))
    if own == "folded":
        model.enable_compatibility_mode(disable_warnings=True)
    our_states(model)
    edit(network)
    assert "load the network again" in refused(lambda: our_states(model))
    if edit is not _one_value:  # which a bare forward does not look for
        assert "load the network again" in refused(lambda: model(TOKENS))
    again = lc.load(network, dtype=torch.float64)
    assert_in_step(again, network)


def test_adapters_of_peft() -> None:
    network: Any = network_of("llama")
    before = snapshot(network)
    model = lc.load(network)
    tuned: Any = get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    loss = tuned(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    assert "load it again" in refused(lambda: model(TOKENS))
    assert "merge_and_unload" in refused(lambda: lc.load(network))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    merged = copy.deepcopy(tuned).merge_and_unload()
    assert_in_step(lc.load(merged), merged)
    tuned.unload()
    assert_same(snapshot(network), before)
    assert_in_step(model, network)


def test_generation_of_the_network_stays_its_own() -> None:
    network: Any = network_of("llama")
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = network.generate(TOKENS, **options)
    model = lc.load(network)
    assert torch.equal(network.generate(TOKENS, **options), expected)
    ours: Any = model.generate(TOKENS, verbose=False, stop_at_eos=False, **options)
    assert torch.equal(ours[:, : expected.shape[1]], expected)
    assert obstacle(model) is None


def test_hooks_that_a_network_has_act_in_the_bridge_and_are_not_copied() -> None:
    network = network_of("llama")
    seen: list[int] = []

    class Counter:
        def count(self, *_: Any) -> None:
            seen.append(1)

    network.model.layers[0].register_forward_hook(Counter().count)  # pyright: ignore
    model = lc.load(network)
    seen.clear()
    model(TOKENS)
    assert seen == [1]


# -- loading twice, releasing -----------------------------------------------------------------


def test_loading_twice_gives_the_same_bridge(tmp_path: Path) -> None:
    network = network_of("gpt2")
    model = lc.load(network)
    assert model.tokenizer is None
    tokenizer = tiny_tokenizer(tmp_path)
    assert lc.load(network, tokenizer=tokenizer) is model
    assert model.tokenizer is not None
    assert lc.load(network, tokenizer=tiny_tokenizer(tmp_path / "same")) is model
    before = model.to_tokens("w3 w4")
    other = tiny_tokenizer(tmp_path / "other", adds_bos=True)
    assert "another tokenizer" in refused(lambda: lc.load(network, tokenizer=other))
    assert torch.equal(model.to_tokens("w3 w4"), before)
    assert lc.load(model) is model
    half = lc.load(network, dtype=torch.bfloat16)
    assert half is not model
    assert half.cfg.dtype == torch.bfloat16
    assert network.dtype == torch.float32
    assert lc.load(network) is model
    assert lc.load(network, dtype=torch.bfloat16) is half
    assert lc.load(model, dtype=torch.bfloat16) is half
    stirred(network)
    assert "load the network again" in refused(lambda: half(TOKENS))
    assert lc.load(network, dtype=torch.bfloat16) is not half
    assert_in_step(model, network)


def test_release() -> None:
    network = network_of("neox").train()
    network.gpt_neox.layers[0].eval()  # pyright: ignore
    hooks = len(network._forward_pre_hooks), len(network._state_dict_pre_hooks)
    modes = [module.training for module in network.modules()]
    model = lc.load(network)
    assert not any(module.training for module in network.modules())
    assert lc.release(model) is lc.release(model) is lc.release(network) is network
    assert [module.training for module in network.modules()] == modes
    assert (len(network._forward_pre_hooks), len(network._state_dict_pre_hooks)) == hooks
    assert "released" in refused(lambda: model(TOKENS))
    again = lc.load(network)
    assert again is not model
    assert_in_step(again, network)
    assert "not made of a network" in refused(lambda: lc.release(lc.load("native:sif-small")))


def test_neither_keeps_the_other_from_being_freed() -> None:
    network = network_of("neox")
    model = lc.load(network)
    our_states(model)
    bridge, own = weakref.ref(model), weakref.ref(network)
    del model
    gc.collect()
    assert bridge() is None
    network(TOKENS)
    del network
    gc.collect()
    assert own() is None


# -- training mode ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_training_mode_of_any_part_is_refused(name: str) -> None:
    network: Any = network_of(name)
    model = lc.load(network)
    network.train()
    assert "training mode" in refused(lambda: our_states(model))
    network.eval()
    assert_in_step(model, network)
    for part in (network.get_submodule("model.layers.1.mlp") if name == "llama" else
                 network.transformer.h[1].attn.attn_dropout, model.blocks[0].mlp):  # fmt: skip
        part.train()
        assert "training mode" in refused(lambda: our_states(model))
        part.eval()
    model.train()
    assert "call model.eval()" in refused(lambda: our_states(model))
    model.eval()
    assert_in_step(model, network)


# -- a Trainer that is probed between its epochs ----------------------------------------------


class Probed(TrainerCallback):
    """Reads states after every epoch and compares them with plain hooks."""

    def __init__(self, network: PreTrainedModel) -> None:
        self.network, self.model, self.epochs = network, lc.load(network), 0

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.network.eval()
        assert_in_step(self.model, self.network)
        self.epochs += 1


def trainer(network: PreTrainedModel, folder: Path, callbacks: list[Any]) -> Trainer:
    rows = torch.randint(4, D_VOCAB, (12, 8), generator=torch.Generator().manual_seed(0))
    options = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        seed=7,
    )
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model=network, args=options, train_dataset=data, callbacks=callbacks)


@pytest.mark.parametrize(
    "name",
    ["neox", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "llama"))],
)
def test_a_trainer_that_is_probed_ends_with_the_bytes_of_one_that_is_not(
    name: str, tmp_path: Path
) -> None:
    plain = network_of(name)
    if name == "gpt2":
        assert plain.config.resid_pdrop > 0  # so that the random state counts
    trainer(plain, tmp_path / "plain", []).train()

    network = network_of(name)
    probed = Probed(network)
    trainer(network, tmp_path / "probed", [probed]).train()
    assert probed.epochs == 3
    assert_same(snapshot(network), snapshot(plain))

    first = sorted((tmp_path / "probed").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))[0]
    trainer(plain, tmp_path / "plain-again", []).train(resume_from_checkpoint=str(first))
    again = Probed(network)
    trainer(network, tmp_path / "again", [again]).train(resume_from_checkpoint=str(first))
    assert again.model is probed.model
    assert again.epochs == 2
    assert_same(snapshot(network), snapshot(plain))
    assert_in_step(again.model, network)


def test_what_a_bridge_cannot_follow_is_seen_when_its_network_is_loaded_again():
    network, tokens = hf_model("llama"), torch.tensor([[5, 9, 3, 7]])
    first = lc.load(network)
    network.model.layers[1].input_layernorm.variance_epsilon = 5.0
    second = lc.load(network)
    assert second is not first
    with torch.no_grad():
        torch.testing.assert_close(second(tokens), network(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_network_with_another_vocabulary_is_loaded_again():
    network = hf_model("gpt2")
    first = lc.load(network)
    network.resize_token_embeddings(network.config.vocab_size + 7)
    with pytest.raises(lc.InputError, match="load it again"):
        first(torch.tensor([[5, 9, 3]]))
    tokens = torch.tensor([[5, 9, network.config.vocab_size - 1]])
    with torch.no_grad():
        found, expected = lc.load(network)(tokens), network(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _narrower(network: Any) -> None:
    network.config.sliding_window = 2


def _sharper(network: Any) -> None:
    for layer in network.model.layers:
        layer.self_attn.scaling *= 2


def _coarser(network: Any) -> None:
    network.model.norm.variance_epsilon = 0.5


@pytest.mark.parametrize("change", [_narrower, _sharper, _coarser])
def test_settings_that_were_changed_are_refused_until_it_is_loaded_again(
    change: Callable[[Any], None],
) -> None:
    network: Any = hf_model("qwen2")
    model = lc.load(network)
    # What a training changes and no forward depends on is none.
    network.config.use_cache = False
    network.config.pad_token_id = 3
    network.gradient_checkpointing_enable()
    assert_in_step(model, network)
    change(network)
    assert "qwen2" in str(refused(lambda: our_states(model))).lower()
    assert "the network has other settings than when it was loaded" in refused(
        lambda: our_states(model)
    )
    assert_in_step(lc.load(network), network)


def _doubled_forward(network: Any) -> None:
    part = network.model.layers[1].mlp
    before = part.forward

    @functools.wraps(before)
    def forward(*given: Any, **named: Any) -> Any:
        return 2 * before(*given, **named)

    part.forward = forward


def _another_forward(network: Any) -> None:
    network.model.layers[0].mlp.forward = network.model.layers[1].mlp.forward


def _hooked(network: Any) -> None:
    network.model.layers[0].self_attn.v_proj.register_forward_hook(lambda _m, _a, out: 2 * out)


@pytest.mark.parametrize("change", [_doubled_forward, _another_forward, _hooked])
def test_code_that_was_put_on_a_network_is_refused_until_it_is_loaded_again(
    change: Callable[[Any], None],
) -> None:
    network: Any = hf_model("qwen2")
    model = lc.load(network)
    network.enable_input_require_grads()  # a hook of transformers', which changes no state
    assert_in_step(model, network)
    change(network)
    assert "other hooks or forwards than when it was loaded" in refused(lambda: our_states(model))
    again = lc.load(network)
    assert again is not model
    if change is not _another_forward:  # a copy of which calls the network's own part
        assert_in_step(again, network)
    assert "on layers." in lc.extract(again, PROMPTS, "resid", progress=False).attrs[
        "hooks"
    ].replace("model.", "")


def _normed(projection: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(projection)


def _pruned(projection: nn.Module) -> None:
    prune.random_unstructured(projection, "weight", amount=0.3)


def _projection(network: Any) -> Any:
    joint = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")
    return next(module for name, module in network.named_modules() if name.endswith(joint))


@pytest.mark.parametrize("compute", [_normed, _pruned])
@pytest.mark.parametrize("name", ["neox", "bloom", "gpt2", "phi3"])
def test_joint_projections_whose_weight_is_computed(
    name: str, compute: Callable[[Any], None]
) -> None:
    network: Any = network_of(name)
    model = lc.load(network)
    compute(_projection(network))
    network(TOKENS)  # as ever
    assert "load it again" in refused(lambda: our_states(model))
    if compute is _pruned:
        return  # torch copies no module with a computed weight that has a gradient
    again = lc.load(network)
    assert_in_step(again, network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    assert_in_step(again, network)


@pytest.mark.parametrize("name", ["neox", "bloom", "mpt", "falcon"])
def test_a_call_writes_what_the_bridge_has_learned_into_joint_weights(name: str) -> None:
    network = network_of(name)
    model = lc.load(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        before = _projection(network).weight.detach().clone()
        logits: Any = model(TOKENS)
        nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()).backward()
        optimizer.step()
        ours = our_states(model)
        # Of a copy of the network, and its parameters, without running it.
        np.testing.assert_allclose(ours, plain_states(network), rtol=2e-4, atol=2e-5)
        assert not torch.equal(_projection(network).weight, before)


@pytest.mark.parametrize("name", ["neox", "bloom", "mpt", "gpt2", "phi3"])
def test_edits_that_leave_no_mark_reach_a_bare_forward(name: str) -> None:
    """A swap of averages, as optimizers write it: through ``data``, or a view of numpy's."""
    network = network_of(name)
    model = lc.load(network)
    model(TOKENS)
    for _ in range(2):
        for weight in network.parameters():
            weight.data.mul_(1.2)
            values = weight.detach().numpy()
            values *= 0.9
        twin = network_of(name)
        twin.load_state_dict(network.state_dict())
        with torch.no_grad():
            expected = twin.eval()(TOKENS).logits
            for found in (model(TOKENS), model.run_with_cache(TOKENS)[0]):
                assert torch.allclose(found, expected, atol=1e-4)

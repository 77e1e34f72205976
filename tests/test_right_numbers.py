"""Small inputs on which a number was once wrong: one test a kind of fault, each run end to end.

The kinds have tests with other inputs beside the code that mends them; here stand the first ones
that were found, so that none comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lensclust as lc
import probes
from lensclust.cli.doctor import examine
from lensclust.inference.readouts import answers
from probes.attention.knockout import answers_cut_off

IDS = [[1, 5, 9, 3], [7, 8], [4, 4, 4, 10, 11], [6, 30]]
ROWS = pd.DataFrame({"task": list("abab"), "input": list("xxyy")})
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def loaded(config: Any, seed: int = 0, **options: Any) -> Any:
    """A random network of this configuration, with biases and norms away from 0 and 1."""
    return lc.load(network(config, seed), **options)


def network(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    found = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return found


def gpt2() -> Any:
    return transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=512, **SPECIAL
    )


def llama() -> Any:
    sizes: dict[str, Any] = SIZES | {"num_hidden_layers": 3, "max_position_embeddings": 512}
    return transformers.LlamaConfig(**sizes, intermediate_size=48, num_key_value_heads=2, **SPECIAL)


def opt(**layout: Any) -> Any:
    sizes: dict[str, Any] = SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 0}
    return transformers.OPTConfig(**(sizes | SPECIAL | layout))


def opt_350m() -> Any:
    return opt(word_embed_proj_dim=20, do_layer_norm_before=False)


def four(**options: Any) -> lc.Prompts:
    return lc.Prompts.from_token_lists(IDS, ROWS, **options)


def residuals(model: Any, prompts: lc.Prompts, **options: Any) -> np.ndarray:
    return lc.extract(model, prompts, "resid", progress=False, **options).resid.values


def relative(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected))


def refusal(call: Callable[[], Any]) -> str:
    """The one line in which a call is refused."""
    with pytest.raises(lc.InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def unless_refused(call: Callable[[], Any]) -> Any:
    """What a call returns, or None where it is refused in one line."""
    try:
        return call()
    except lc.InputError as error:
        if "\n" in str(error):
            raise
        return None


def word_tokenizer(words: str, **options: Any) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words.split())}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "config",
    [
        transformers.MptConfig(vocab_size=64, d_model=32, n_heads=4, n_layers=3, max_seq_len=512),
        transformers.GPTNeoConfig(
            vocab_size=64,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            intermediate_size=48,
            window_size=16,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=512,
            **SPECIAL,
        ),
    ],
    ids=["biases by key place", "windows by key place"],
)
def test_shared_prefixes_give_the_states_of_full_prompts(config, seed):
    model, rng = loaded(config, seed), np.random.default_rng(seed)
    shots = rng.integers(3, 64, 176).tolist()
    rows = pd.DataFrame({"task": list("aabba"), "input": list("xxxxx")})
    ids = [shots + rng.integers(3, 64, n).tolist() for n in (4, 18, 24, 23, 115)]
    prompts = lc.Prompts.from_token_lists(ids, rows)
    full = residuals(model, prompts, share_prefixes=False)
    shared = residuals(model, prompts)
    assert max(map(relative, shared, full)) < 1e-4


def test_a_mask_selects_rows():
    assert four().take((ROWS.task == "b").to_numpy()).rows.task.tolist() == ["b", "b"]


@pytest.mark.parametrize("kind", [list, np.array, pd.Series, pd.Index, set])
def test_labels_may_come_in_any_collection(kind):
    assert len(four().where(task=kind(["a"]))) == 2


def test_an_end_token_that_the_text_spells_stays():
    tokenizer = word_tokenizer("<unk> <eos> say hello there", eos_token="<eos>")
    prompts = lc.Prompts.from_texts(["say hello there <eos>"], ROWS[:1], tokenizer)
    assert prompts.tokens[0, : prompts.lengths[0]].tolist() == [2, 3, 4, 1]


def test_a_short_message_is_not_found_in_the_system_prompt():
    tokenizer = word_tokenizer("<unk> you are a helpful AI user : reply")
    tokenizer.chat_template = (
        "you are a helpful AI user : {% for m in messages %}{{ m['content'] | trim }}{% endfor %}"
        " reply :"
    )
    prompts = lc.Prompts.from_texts(
        ["AI"], ROWS[:1], tokenizer, chat=True, spans={"input": [(0, 2)]}
    )
    assert prompts.spans is not None
    assert prompts.spans["input"][0].tolist() == [7, 8]


@pytest.mark.parametrize("index", [0, 4])
def test_a_steered_position_is_that_of_the_sequence(index):
    model = loaded(llama())
    tokens = torch.tensor([[1, 5, 9, 3, 7], [1, 8, 4, 4, 6]])
    prompts = lc.Prompts.from_token_lists(tokens.tolist(), ROWS[:2])
    acts = lc.extract(model, prompts, "resid", progress=False)
    move = probes.shift(probes.mean_states(acts), "a", "b")
    at = torch.tensor([index, index])
    expected = tokens
    for _ in range(6):
        with torch.no_grad(), probes.steer(model, move, at="resid 1", positions=at):
            logits = model(expected)
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], 1)
    with probes.steer(model, move, at="resid 1", positions=at):
        found = model.generate(
            tokens, max_new_tokens=6, do_sample=False, verbose=False, stop_at_eos=False
        )
    assert torch.equal(found, expected)


def test_a_store_is_not_resumed_with_other_spans(tmp_path):
    model, rows = loaded(gpt2()), pd.DataFrame({"task": list("ababab")})
    options: dict[str, Any] = {"at": "s_end", "store": tmp_path / "a", "progress": False}
    first, second = (
        lc.Prompts.from_token_lists([[5, 6, 7, 8, 9, 10]] * 6, rows, spans={"s": [span] * 6})
        for span in [(0, 2), (0, 5)]
    )
    lc.extract(model, first, "resid 2", **options)
    refusal(lambda: lc.extract(model, second, "resid 2", resume=True, **options))


def test_dropout_of_the_network_is_noticed():
    own = transformers.GPT2LMHeadModel(gpt2()).eval()
    model = lc.load(own)
    own.train()
    assert "eval()" in refusal(lambda: residuals(model, four()))


def test_heads_have_the_size_of_their_weights():
    config = transformers.DeepseekV3Config(
        **SIZES,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    )
    model = loaded(config)
    found = unless_refused(lambda: lc.extract(model, four(), "z", progress=False))
    assert found is None or (found.sizes["head"], found.sizes["d_head"]) == (4, 8)


def test_the_state_behind_the_mlp_is_no_resid_mid():
    refusal(lambda: lc.extract(loaded(opt_350m()), four(), "resid_mid", progress=False))


def test_a_model_may_have_no_final_norm():
    prompts = four(answers=[[5], [6], [7], [8]])
    unless_refused(lambda: probes.head_activation(loaded(opt_350m()), prompts, progress=False))


def test_a_missing_label_is_no_task():
    rng = np.random.default_rng(0)
    tasks = [None if i % 6 == 0 else "ab"[i % 2] for i in range(24)]
    rows = pd.DataFrame({"task": tasks, "input": ["x"] * 24})
    ids = [rng.integers(3, 64, 6).tolist() for _ in range(24)]
    acts = lc.extract(
        loaded(gpt2()), lc.Prompts.from_token_lists(ids, rows), "resid 2", progress=False
    )
    found = probes.cluster(acts, permutations=5, jobs=1, progress=False)
    assert found.frame.k.iloc[0] == 2
    assert found.left_out


def test_states_do_not_depend_on_padding():
    config = transformers.BertConfig(**SIZES, intermediate_size=48)
    refusal(lambda: lc.load(transformers.BertForMaskedLM(config).eval()))


@pytest.mark.parametrize(
    "config",
    [
        opt(),
        transformers.GPTJConfig(
            vocab_size=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            rotary_dim=4,
            tie_word_embeddings=False,
            **SPECIAL,
        ),
    ],
    ids=["opt", "gptj"],
)
def test_tokens_that_are_hidden_change_the_logits(config):
    model = loaded(config)
    prompts = lc.Prompts.from_token_lists([[1, 5, 9, 3, 7, 6]] * 2, ROWS[:2])
    hidden = torch.zeros_like(prompts.tokens, dtype=torch.bool)
    hidden[:, 1:4] = True
    found = unless_refused(
        lambda: answers_cut_off(model, prompts, lambda x, _: x, hidden, since="answer")
    )
    if found is not None:
        assert float((found - answers(model, prompts, lambda x, _: x)).abs().max()) > 1e-4


def test_half_precision_runs():
    config = transformers.Olmo2Config(**SIZES, intermediate_size=48, num_key_value_heads=2)
    model = lc.load(network(config), dtype=torch.bfloat16)
    assert np.isfinite(residuals(model, four())).all()


def test_a_hybrid_is_examined():
    sizes: dict[str, Any] = SIZES | {"num_hidden_layers": 3}
    config = transformers.Lfm2Config(
        **sizes,
        intermediate_size=48,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
        pad_token_id=0,
        **SPECIAL,
    )
    assert examine(loaded(config))


def test_a_number_and_its_digits_name_one_task():
    rows = pd.DataFrame({"task": [0, 1] * 8, "input": list("xxyy") * 4})
    prompts = lc.Prompts.from_token_lists(IDS * 4, rows)
    acts = lc.extract(loaded(gpt2()), prompts, "resid", progress=False)
    found = probes.cluster(acts, permutations=5, jobs=1, progress=False)
    assert found.transport(0, 1) is not None
    assert len(prompts.where(task="0")) == 8


def test_states_that_know_the_wording_alone_do_not_cluster_by_task():
    prompts = lc.tasks.sif(n_tasks=10, n_inputs=10, mappings_per_task=5, regexes_per_task=3)
    prompts = prompts.where(split="new_string")
    acts = lc.extract(lc.load("native:sif-small"), prompts, "resid 1", progress=False)
    wording = pd.factorize(prompts.rows.template)[0]
    hits = 0
    for seed in range(8):
        rng = np.random.default_rng(100 + seed)
        states = rng.normal(0, 1, (wording.max() + 1, acts.sizes["d_model"]))[wording]
        states = states + rng.normal(0, 0.3, states.shape)
        fake = acts.assign(resid=(acts.resid.dims, states[:, None, None, :].astype("f4")))
        row = probes.cluster(fake, metrics="ari", permutations=99, jobs=1, progress=False).frame
        hits += row.p.iloc[0] <= 0.05
    assert hits <= 2  # of 8, where .4 are expected


def test_cached_and_uncached_generation_agree():
    model, tokens = lc.load(network(llama())), torch.tensor([[1, 5, 9, 3, 7]])
    options = {"max_new_tokens": 8, "do_sample": False, "verbose": False, "stop_at_eos": False}
    cached: Any = model.generate(tokens, **options)
    plain: Any = model.generate(tokens, use_past_kv_cache=False, **options)
    assert torch.equal(cached, plain)


def test_a_network_may_be_loaded_twice():
    own = transformers.GPT2LMHeadModel(gpt2()).eval()
    first, second = lc.load(own), lc.load(own)
    assert relative(residuals(second, four()), residuals(first, four())) < 1e-5


def test_the_users_own_network_stays_as_it_was(tmp_path):
    own = network(llama())
    keys, tokens = set(own.state_dict()), torch.tensor([[1, 5, 9]])
    lc.load(own)
    own.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(own.state_dict()) == keys
    assert torch.allclose(again(tokens).logits, own(tokens).logits, atol=1e-5)

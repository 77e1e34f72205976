"""Pooled activations against pooling `run_with_cache` by hand, prompt by prompt."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import lensclust as lc
from tests.tiny import D_VOCAB, hf_model

HOOKS = {
    "attn_out": "blocks.{}.hook_attn_out",
    "z": "blocks.{}.attn.hook_z",
}
BY_HAND = {
    "max": lambda states: states.max(0),
    "mean": lambda states: states.mean(0),
    "last": lambda states: states[-1],
}


def spanned(n: int = 11, *, seed: int = 0) -> lc.Prompts:
    """Prompts of random tokens and lengths, with a random span in each."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, D_VOCAB, rng.integers(3, 20)).tolist() for _ in range(n)]
    starts = [int(rng.integers(0, len(row) - 1)) for row in ids]
    spans = [
        (a, int(rng.integers(a + 1, len(row) + 1))) for a, row in zip(starts, ids, strict=True)
    ]
    return lc.Prompts.from_token_lists(ids, pd.DataFrame({"n": range(n)}), spans={"part": spans})


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_pooled_states_equal_the_cache_pooled_by_hand(name, batch_tokens):
    model, prompts = lc.load(hf_model(name)), spanned()
    acts = lc.pooled(
        model,
        prompts,
        ["resid", "z", "attn_out"],
        span="part",
        how=list(BY_HAND),
        batch_tokens=batch_tokens,
    )
    for row, (start, stop) in enumerate((prompts.spans or {})["part"].tolist()):
        _, cache = model.run_with_cache(prompts.tokens[row, : prompts.lengths[row]][None])
        for how, pool in BY_HAND.items():
            here = acts.isel(prompt=row).sel(position=f"part_{how}")
            for block in range(model.cfg.n_layers):
                resid = cache[f"blocks.{block}.hook_resid_pre" if block else "blocks.0.hook_in"]
                found = {"resid": (here.resid.sel(layer=block), resid)}
                for kind, hook in HOOKS.items():
                    found[kind] = (here[kind].sel(block=block), cache[hook.format(block)])
                for value, states in found.values():
                    expected = pool(states[0, start:stop].numpy())
                    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


def test_the_last_token_of_a_span_is_what_extract_reads_there():
    model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="both")
    sites = ["resid", "head"]
    pooled = lc.pooled(model, prompts, sites, span="instruction", how="last")
    read = lc.extract(model, prompts, sites, at="instruction_end")
    for name in ("resid", "z"):
        np.testing.assert_allclose(pooled[name], read[name], rtol=1e-4, atol=1e-5)
    assert pooled.head_frame.equals(read.head_frame)
    assert set(pooled.coords) == set(read.coords)
    assert list(pooled.position.values) == ["instruction_last"]


def test_all_tokens_are_those_of_the_prompt_and_not_its_padding():
    model, prompts = lc.load(hf_model("llama")), spanned()
    whole = lc.pooled(model, prompts, "resid 1", span="prompt", how="mean")
    alone = [
        lc.pooled(model, prompts.take([i]), "resid 1", span="prompt", how="mean").resid.values
        for i in range(len(prompts))
    ]
    np.testing.assert_allclose(whole.resid, np.concatenate(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"span": "other"}, r"span 'other' does not exist: expected \['part', 'gap', 'prompt'\]"),
        ({"span": "gap"}, "span 'gap' of prompt 1 is empty"),
        ({"span": "part", "how": "median"}, r"how=\['median'\], expected some of"),
        ({"span": "part", "how": []}, r"how=\[\]"),
        ({"span": "part", "dtype": "int8"}, "dtype 'int8' is not known"),
        ({"span": "part", "batch_tokens": 0}, "batch_tokens=0"),
    ],
)
def test_wrong_options_are_one_clear_line(options, message):
    rows = pd.DataFrame({"n": [0, 1]})
    spans = {"part": [(0, 1), (1, 2)], "gap": [(0, 1), (2, 2)]}
    prompts = lc.Prompts.from_token_lists([[3, 4], [5, 6]], rows, spans=spans)
    with pytest.raises(lc.InputError, match=message):
        lc.pooled(lc.load("native:sif-small"), prompts, "resid", **options)

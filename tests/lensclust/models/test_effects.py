"""Edits that are thrown away are found; those that take effect are let through."""

from __future__ import annotations

import pytest
import torch

import lensclust as lc
from lensclust.models.effects import require_effect
from tests.tiny import N_LAYERS, hf_model

KINDS = ("attn.hook_pattern", "attn.hook_z", "attn.hook_v", "hook_mlp_out", "hook_attn_out")


@pytest.mark.filterwarnings("ignore:A hook on:UserWarning")
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "opt"])
def test_a_hook_is_refused_where_zeroing_it_changes_no_logit(name: str) -> None:
    model = lc.load(hf_model(name))
    tokens = torch.tensor([[9, 4, 21, 30, 5, 6]])
    seen = set()
    for kind in KINDS:
        for block in range(N_LAYERS):
            hook = f"blocks.{block}.{kind}"
            zeroed = model.run_with_hooks(
                tokens, fwd_hooks=[(hook, lambda value, hook: torch.zeros_like(value))]
            )
            takes_effect = not torch.equal(zeroed, model(tokens))
            seen.add(takes_effect)
            if takes_effect:
                require_effect(model, [hook], caller="f")
            else:
                with pytest.raises(lc.InputError, match="does not use the edited tensor"):
                    require_effect(model, [hook], caller="f")
    assert seen == ({True, False} if name == "opt" else {True})


def test_one_hook_without_effect_among_others_is_named() -> None:
    model = lc.load(hf_model("opt"))
    names = ["blocks.0.attn.hook_z", "blocks.1.attn.hook_pattern", "blocks.2.hook_mlp_out"]
    for _ in range(2):  # the second time from memory
        with pytest.raises(lc.InputError, match=r"^f: .*'blocks\.1\.attn\.hook_pattern'"):
            require_effect(model, names, caller="f")
    require_effect(model, names[::2], caller="f")


def test_a_hook_that_does_not_exist_is_refused() -> None:
    with pytest.raises(lc.InputError, match=r"no hook 'blocks\.9\.attn\.hook_z'"):
        require_effect(lc.load("native:sif-small"), ["blocks.9.attn.hook_z"], caller="f")

"""What a device is asked for while a model runs, and models in half precision.

On a CPU nothing has to wait, but questions to a tensor (``item``, ``bool``, ``nonzero``) go
through torch's dispatcher as they do on a GPU, where each would hold up the host.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import lensclust as lc
from lensclust.inference.transfers import HostCopy, arrived, upload
from lensclust.models.sites import additivity_error
from tests.devices import DEVICES
from tests.lensclust.activations.test_extraction import some_prompts
from tests.tiny import ARCHITECTURES, hf_model

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


class Questions(TorchDispatchMode):
    """Counts the operations for which a host waits for its device."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition(".")[0]
        if name in WAITS:
            self.asked[name] += 1
        return func(*args, **(kwargs or {}))


def deep(n_layers: int):
    class_name, fields = ARCHITECTURES["llama"]
    made = getattr(transformers, class_name)
    config = made.config_class(
        **{**fields, "num_hidden_layers": n_layers}, attn_implementation="eager"
    )
    return lc.load(made(config).eval(), device="cpu")


def repeated(n: int) -> lc.Prompts:
    """Prompts with a long beginning in common, so that prefixes are shared."""
    prompts = some_prompts(n, longest=4)
    shots = torch.arange(3, 48).expand(n, -1)
    tokens = torch.cat([shots, prompts.tokens], dim=1)
    return lc.Prompts(tokens, prompts.lengths + 45, prompts.rows)


@pytest.mark.parametrize("share", [False, True])
def test_questions_do_not_grow_with_the_layers(share):
    asked = []
    for n_layers in (2, 6):
        model, prompts = deep(n_layers), repeated(40)
        lc.extract(model, prompts, ["resid", "z"], share_prefixes=share)  # what is tried once
        with Questions() as questions:
            lc.extract(model, prompts, ["resid", "z"], share_prefixes=share)
        asked.append(questions.asked)
    # The fingerprint compares all weights' sums in one go; nothing else may depend on the model.
    assert asked[0] == asked[1]


def test_a_question_in_every_layer_would_be_seen():
    found, asked = [], []

    def ask(value, hook):
        found.append(bool(value.isnan().any()))

    for n_layers in (2, 6):
        model, prompts = deep(n_layers), repeated(5)
        hooks: Any = [(f"blocks.{layer}.hook_out", ask) for layer in range(n_layers)]
        with Questions() as questions:
            model.run_with_hooks(prompts.tokens, fwd_hooks=hooks)
        asked.append(sum(questions.asked.values()))
    assert asked[1] - asked[0] == 4


@pytest.mark.parametrize("device", DEVICES)
def test_copies_arrive_in_order_with_the_values_they_had(device):
    at = torch.device(device)

    def work():
        for number in range(5):
            value = torch.full((1000, 50), float(number), device=at)
            copied = HostCopy({"x": value})
            value = value + 1  # later work does not change what was copied
            yield number, copied

    found = list(arrived(work()))
    assert [number for number, _ in found] == list(range(5))
    assert all((values["x"] == number).all() for number, values in found)
    if device == "cpu":  # at once: nothing is held back
        made: Any = iter(range(3))
        copies = ((number, HostCopy({"x": torch.ones(1)})) for number in made)
        for number, _ in arrived(copies):
            assert made.__length_hint__() == 2 - number


def test_one_copy_is_held_back_while_the_next_is_made():
    class Pending(HostCopy):
        @property
        def pending(self) -> bool:
            return True

    made = []

    def work():
        for number in range(4):
            made.append(number)
            yield number, Pending({"x": torch.tensor([float(number)])})

    for number, values in arrived(work()):
        assert values["x"][0] == number
        assert len(made) == min(number + 2, 4)


@pytest.mark.parametrize("device", DEVICES)
def test_uploads_hold_what_they_held(device):
    given = torch.arange(12).view(3, 4)
    for tensor in (given, given.T, given[:, 1:3], given[:0]):
        there = upload(tensor, torch.device(device))
        assert there.device.type == device
        assert torch.equal(there.cpu(), tensor)
        assert torch.equal(upload(there, torch.device(device)).cpu(), tensor)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_half_precision_models_are_read_in_full_precision(name):
    whole: Any = hf_model(name)
    half = lc.load(copy.deepcopy(whole).to(torch.bfloat16))
    prompts = some_prompts(8)
    kinds = ["resid", "z"] if name == "gemma2" else ["resid", "head"]
    expected, found = lc.extract(lc.load(whole), prompts, kinds), lc.extract(half, prompts, kinds)
    assert found.resid.dtype == np.float32
    scale = np.abs(expected.resid).max()
    assert float(np.abs(found.resid - expected.resid).max()) < 0.1 * float(scale)
    if name != "gemma2":
        # Only the attention output is rounded, not the sum over heads that is held against it.
        assert additivity_error(half) < 2**-8
        assert found.head_frame.dtype == np.float32


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [False, True])
def test_a_gpu_reads_what_the_cpu_reads(share):
    model, prompts = deep(3), repeated(40)
    expected = lc.extract(model, prompts, ["resid", "z"], share_prefixes=share)
    there = lc.load(model, device="cuda")
    found = lc.extract(there, prompts, ["resid", "z"], shard=7, share_prefixes=share)
    np.testing.assert_allclose(found.resid, expected.resid, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.z, expected.z, rtol=1e-3, atol=1e-4)

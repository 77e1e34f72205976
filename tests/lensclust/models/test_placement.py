"""Models spread by a device map: the states of the plain model, or one clear line."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lensclust as lc
from lensclust.activations.dataset import head_residual
from lensclust.errors import InputError
from lensclust.inference.prefix_sharing.sharing import obstacle, refusal
from lensclust.models.checkpoints import fingerprint
from lensclust.models.devices import model_device, require_placeable
from lensclust.models.fingerprints import fingerprint_again
from tests.lensclust.activations.test_extraction import some_prompts
from tests.tiny import hf_model

LAYERS = {"llama": "model.layers", "gpt2": "transformer.h", "neox": "gpt_neox.layers"}


@pytest.fixture(params=LAYERS)
def saved(request, tmp_path):
    hf_model(request.param).save_pretrained(tmp_path)
    return request.param, tmp_path


def offloaded(name: str, folder) -> dict[str, str]:
    """All on the CPU but the last two blocks, which stay on disk."""
    network = lc.load(folder, device="cpu").original_model
    base, _, stack = LAYERS[name].partition(".")
    beside = [each for each, _ in network.named_children() if each != base]
    inside = [f"{base}.{each}" for each, _ in getattr(network, base).named_children()]
    places = dict.fromkeys([*beside, *inside], "cpu")
    del places[f"{base}.{stack}"]
    blocks = {f"{LAYERS[name]}.{block}": "disk" for block in range(1, 3)}
    return places | {f"{LAYERS[name]}.0": "cpu"} | blocks


def test_everything_on_the_cpu_is_the_plain_model(saved):
    _, folder = saved
    plain, mapped = lc.load(folder, device="cpu"), lc.load(folder, device_map={"": "cpu"})
    prompts = some_prompts(6)
    kinds = ["resid", "head"]
    expected, found = (lc.extract(model, prompts, kinds) for model in (plain, mapped))
    for name in ("resid", "z", "head_frame"):
        np.testing.assert_array_equal(found[name], expected[name])
    assert found.attrs == expected.attrs
    assert model_device(mapped) == torch.device("cpu")


@pytest.mark.filterwarnings("ignore:.*meta:UserWarning")
def test_weights_on_disk_give_the_states_of_the_plain_model(saved):
    name, folder = saved
    plain = lc.load(folder, device="cpu")
    mapped = lc.load(folder, device_map=offloaded(name, folder))
    away = [weight for weight in mapped.original_model.parameters() if weight.device.type == "meta"]
    assert away  # something is off the devices, or this shows nothing
    assert model_device(mapped) == torch.device("cpu")
    prompts = some_prompts(8, longest=12)
    expected, found = (
        lc.extract(model, prompts, ["resid", "head", "mlp_out"]) for model in (plain, mapped)
    )
    for variable in ("resid", "z", "mlp_out", "head_frame"):
        np.testing.assert_allclose(found[variable], expected[variable], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        head_residual(found, mapped), head_residual(expected, plain), rtol=1e-4, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:.*meta:UserWarning")
def test_a_fingerprint_sees_weights_on_disk(saved):
    name, folder = saved
    mapped = lc.load(folder, device_map=offloaded(name, folder))
    before = fingerprint(lc.load(folder, device_map={"": "cpu"}))
    if name == "llama":  # no weights of the bridge's own beside it
        assert fingerprint(mapped) == before
    assert fingerprint_again(mapped) == fingerprint(mapped)
    other = hf_model(name, seed=1)
    other.save_pretrained(folder / "other")
    second = lc.load(folder / "other", device_map=offloaded(name, folder / "other"))
    assert fingerprint(second) != fingerprint(mapped)


@pytest.mark.filterwarnings("ignore:.*meta:UserWarning")
def test_hooks_that_carry_weights_do_not_stand_in_the_way_of_shared_prefixes(saved):
    name, folder = saved
    plain = lc.load(folder, device="cpu")
    for places in ({"": "cpu"}, offloaded(name, folder)):
        mapped = lc.load(folder, device_map=places)
        assert obstacle(mapped) is None
        assert refusal(mapped) == refusal(plain)
        # A caller's own hook is still noticed.
        handle = mapped.original_model.register_forward_hook(lambda *_: None)
        assert obstacle(mapped) is not None
        handle.remove()


def test_unusable_maps_are_one_line(tmp_path):
    hf_model("llama").save_pretrained(tmp_path)
    cases = [
        ({"device_map": {"": "cpu"}, "device": "cpu"}, "expected one"),
        ({"device_map": {"": "cpu"}, "random_weights": True}, "random weights"),
        ({"device_map": {"": "meta"}}, "there are none"),
        ({"device_map": {"model": "cuda:0", "lm_head": "disk"}}, "mixes a GPU"),
        ({"device_map": {"model": 0, "lm_head": "cpu"}}, "mixes a GPU"),
        ({"device_map": "nowhere"}, "nowhere"),
    ]
    for options, message in cases:
        with pytest.raises(InputError) as caught:
            lc.load(tmp_path, **options)
        text = str(caught.value)
        assert message in text
        assert "\n" not in text
    with pytest.raises(InputError, match="read from a directory or the hub"):
        lc.load("native:sif-small", device_map="auto")
    with pytest.raises(InputError, match="recurrent state"):
        require_placeable("auto", device=None, stateful=True)

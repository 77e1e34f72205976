"""Reading and patching states: what our sites give against plain hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

import lensclust as lc
from lensclust.activations.dataset import head_residual
from lensclust.cli.doctor import examine
from probes.patching.patching import patch
from tests.families.subjects import (
    POSITIONS,
    Nothing,
    Parts,
    Subject,
    Wrong,
    edited,
    parts,
    require_equal,
    submodule,
)

# The states of two ways in half precision, each rounded in every block.
HALF = 0.1


def resid(subject: Subject) -> None:
    """Every layer of the residual stream."""
    require_equal(
        _extracted(subject, "resid").resid, subject.at(lambda found: found.resid), what="resid"
    )


def resid_mid(subject: Subject) -> None:
    """The state between attention and MLP of every block."""
    if all(state is None for state in subject.parts[0].middle):
        _require_absent(subject, "resid_mid")
    _compare(subject, "resid_mid", lambda found, block: found.middle[block])


def attn_out(subject: Subject) -> None:
    """What attention adds to the residual stream."""
    if all(state is None for state in (*subject.parts[0].z, *subject.parts[0].middle)):
        _require_absent(subject, "attn_out")

    def expected(found: Parts, block: int) -> Tensor | None:
        middle = found.middle[block]
        # Linear attention and attention of experts have no such heads, but add something, too.
        if found.z[block] is None and middle is not None:
            return middle - found.resid[block]
        return added_by_attention(subject, found, block)

    try:
        _compare(subject, "attn_out", expected, at_least=_attending(subject))
    except lc.InputError as error:
        if _attending(subject):
            raise
        raise Nothing(str(error)) from error


def mlp_out(subject: Subject) -> None:
    """What the MLP adds to the residual stream."""
    if all(added_by_mlp(subject, subject.parts[0], block) is None for block in subject.blocks):
        _require_absent(subject, "mlp_out")
    _compare(subject, "mlp_out", lambda found, block: added_by_mlp(subject, found, block))


def z(subject: Subject) -> None:
    """What goes into the output projection, head by head."""
    attending = _attending(subject)
    if not attending:
        _require_absent(subject, "z")
    found = _extracted(subject, "z").z
    _require_blocks(found, attending)
    require_equal(found, _plain_z(subject), what="z")


def head(subject: Subject) -> None:
    """What each head adds to the residual stream, its geometry, and the sum of all."""
    attending, scale = _attending(subject), subject.family.scale
    if not attending:
        _require_absent(subject, "head")
    acts = _extracted(subject, "head")
    if subject.family.mlp:
        raise Wrong("head: given, though a norm stands behind the sum of state and attention")
    _require_blocks(acts, attending)
    for block in attending:
        weight, bias = projection(subject, block)
        for one in subject.parts:
            found = one.z[block]
            assert found is not None
            require_equal(
                scale * (found @ weight.flatten(0, 1) + bias),
                added_by_attention(subject, one, block),
                what="the sum of heads, which should have been refused",
            )
    weights = np.stack([projection(subject, block)[0].numpy() for block in attending])
    expected = scale * np.einsum("nplhd,lhdm->nplhm", _plain_z(subject), weights)
    dims = ("prompt", "position", "block", "head", "d_model")
    found = head_residual(acts, subject.model)
    require_equal(found.transpose(*dims), expected, what="head")
    framed = xr.dot(acts.z, acts.head_frame, dim="d_head").transpose(*dims[:-1], "rank")
    require_equal(
        np.einsum("nplhr,mplhr->plhnm", framed, framed),
        np.einsum("nplhm,qplhm->plhnq", expected, expected),
        what="scalar products of heads",
    )


def patching(subject: Subject) -> None:
    """The effect on two logits of another prompt's state, at every layer and two positions."""
    base = subject.prompts
    # Row i's donor is the prompt before it.
    donors = [(row - 1) % len(base) for row in range(len(base))]

    found = patch(
        subject.model,
        base,
        base.take(donors),
        "resid",
        at=list(POSITIONS),
        metric=_metric,
        resamples=5,
        progress=False,
    ).effects
    expected = np.zeros([found.sizes[axis] for axis in ("site", "position", "prompt")])
    for layer in range(found.sizes["site"]):
        for row, ids in enumerate(subject.lists()):
            for slot in range(len(POSITIONS)):
                donor = subject.parts[donors[row]].resid[layer][subject.places()[donors[row]][slot]]
                expected[layer, slot, row] = _effect(subject, ids, layer, row, slot, donor)
    require_equal(
        found.transpose("site", "position", "prompt"), expected, what="patching", tolerance=5e-3
    )


def patching_resid_mid(subject: Subject) -> None:
    """The effect of another prompt's state between attention and MLP, at the last token."""
    if all(state is None for state in subject.parts[0].middle):
        _require_absent(subject, "resid_mid")

    def place(block: int, donor: Parts) -> Iterator[AbstractContextManager[None]]:
        new = donor.middle[block]
        if new is not None:
            path = subject.family.middle
            path = path if isinstance(path, str) else path[block]
            yield _middle_replaced(subject, block, path, new[-1])

    _compare_patching(subject, "resid_mid", place)


def patching_z(subject: Subject) -> None:
    """The effect of another prompt's output of each head, at the last token."""
    if not _attending(subject):
        _require_absent(subject, "z")

    def place(block: int, donor: Parts) -> Iterator[AbstractContextManager[None]]:
        new = donor.z[block]
        for head in range(subject.family.heads if new is not None else 0):
            assert new is not None
            yield _head_replaced(subject, block, head, new[-1])

    _compare_patching(subject, "z", place)


def bf16(subject: Subject) -> None:
    """The residual stream in bfloat16."""
    _half(subject, torch.bfloat16)


def fp16(subject: Subject) -> None:
    """The residual stream in float16."""
    _half(subject, torch.float16)


def doctor(subject: Subject) -> None:
    """What `lensclust doctor` says of sites and gradients is so."""
    report = examine(subject.model)
    for kind in ("resid", "resid_mid", "attn_out", "mlp_out", "z", "head"):
        try:
            _extracted(subject, kind)
            there = True
        except lc.InputError:
            there = False
        if report[f"site {kind}"].startswith("yes") != there:
            raise Wrong(f"doctor: site {kind}: {report[f'site {kind}']!r}, read: {there}")
    if report["gradients"] != "reach the residual stream":
        raise Wrong(f"doctor: gradients {report['gradients']!r}")


def added_by_attention(subject: Subject, found: Parts, block: int) -> Tensor | None:
    """What the attention of a block adds to the residual stream, from states alone if possible."""
    middle, out = found.middle[block], found.heads_out[block]
    if out is None:
        return None
    if middle is not None and not subject.family.beside:
        return middle - found.resid[block]
    return subject.family.scale * out


def added_by_mlp(subject: Subject, found: Parts, block: int) -> Tensor | None:
    """What the MLP of a block adds to the residual stream, from states alone if possible."""
    before, after = found.middle[block], found.resid[block + 1]
    if subject.family.parallel:
        added = added_by_attention(subject, found, block)
        assert added is not None
        before = found.resid[block] + added
    return found.mlp[block] if before is None else after - before


def projection(subject: Subject, block: int) -> tuple[Tensor, Tensor]:
    """``W_O (head, d_head, d_model)`` and ``b_O`` of the plain network."""
    module: Any = submodule(subject.stack()[block], subject.family.output)
    weight = module.weight.detach()
    weight = weight.T if isinstance(module, nn.Linear) else weight
    bias = getattr(module, "bias", None)
    bias = torch.zeros(weight.shape[1]) if bias is None else bias.detach()
    return weight.unflatten(0, (subject.family.heads, -1)), bias


def _extracted(subject: Subject, kind: str) -> xr.Dataset:
    return lc.extract(
        subject.model, subject.prompts, kind, at=list(POSITIONS), progress=False
    ).transpose("prompt", "position", ...)


def _compare(
    subject: Subject,
    kind: str,
    expected: Callable[[Parts, int], Tensor | None],
    *,
    at_least: list[int] | None = None,
) -> None:
    """A site of all blocks that have it (or of these at least) against the plain states."""
    found = _extracted(subject, kind)[kind]
    having = [block for block in subject.blocks if expected(subject.parts[0], block) is not None]
    if at_least is not None and set(found["block"].values) >= set(at_least):
        having = found["block"].values.tolist()
    _require_blocks(found, having)

    def states(one: Parts) -> list[Tensor]:
        return [state for block in having if (state := expected(one, block)) is not None]

    require_equal(found, subject.at(states), what=kind)


def _require_blocks(found: xr.Dataset | xr.DataArray, blocks: list[int]) -> None:
    if found["block"].values.tolist() != blocks:
        raise Wrong(f"blocks {found['block'].values.tolist()}, expected {blocks}")


def _require_absent(subject: Subject, kind: str) -> NoReturn:
    """Where plain hooks see nothing of a kind, only a refusal is right."""
    try:
        _extracted(subject, kind)
    except lc.InputError as error:
        raise Nothing(str(error)) from error
    raise Wrong(f"{kind} is given, but there is none")


def _attending(subject: Subject) -> list[int]:
    return [block for block in subject.blocks if subject.parts[0].z[block] is not None]


def _plain_z(subject: Subject) -> np.ndarray:
    """``(prompt, position, block, head, d_head)`` of the blocks that have heads."""
    flat = subject.at(lambda found: [state for state in found.z if state is not None])
    return _by_head(subject, flat)


def _by_head(subject: Subject, flat: np.ndarray) -> np.ndarray:
    return flat.reshape(*flat.shape[:-1], subject.family.heads, -1)


@torch.no_grad()
def _effect(
    subject: Subject, ids: list[int], layer: int, row: int, slot: int, donor: Tensor
) -> float:
    place = subject.places()[row][slot]

    def replaced(states: Tensor) -> Tensor:
        states = states.clone()
        states[..., place, :] = donor
        return states

    with edited(subject.network, subject.family, layer, replaced):
        patched = subject.network(torch.tensor([ids]), use_cache=False).logits[0, -1]
    plain = subject.parts[row].logits[-1]
    return float(_metric((patched - plain)[None]))


def _metric(logits: Tensor, rows: Any = None) -> Tensor:
    return logits[:, 7] - 0.5 * logits[:, 20]


@torch.no_grad()
def _compare_patching(
    subject: Subject,
    kind: str,
    places: Callable[[int, Parts], Iterator[AbstractContextManager[None]]],
) -> None:
    """Effects of patching a kind of site against the plain network under plain hooks."""
    base = subject.prompts
    donors = [(row - 1) % len(base) for row in range(len(base))]
    found = patch(
        subject.model,
        base,
        base.take(donors),
        kind,
        metric=_metric,
        resamples=5,
        progress=False,
    ).effects.squeeze("position")
    expected = []
    for row, ids in enumerate(subject.lists()):
        plain = _metric(subject.parts[row].logits[-1:])
        expected.append([])
        for block in subject.blocks:
            for replaced in places(block, subject.parts[donors[row]]):
                with replaced:
                    logits = subject.network(torch.tensor([ids]), use_cache=False).logits[:, -1]
                expected[-1].append(float(_metric(logits) - plain))
    require_equal(
        found.transpose("site", "prompt"), np.array(expected).T, what=kind, tolerance=5e-3
    )


@contextmanager
def _head_replaced(subject: Subject, block: int, head: int, new: Tensor) -> Iterator[None]:
    module = submodule(subject.stack()[block], subject.family.output)
    assert module is not None
    heads = subject.family.heads

    def before(_module: nn.Module, given: Any) -> Any:
        states = given[0].clone().reshape(1, -1, new.shape[-1])
        cut = states.unflatten(-1, (heads, -1))
        cut[:, -1, head] = new.unflatten(-1, (heads, -1))[head]
        return (states.reshape(given[0].shape), *given[1:])

    handle = module.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _middle_replaced(subject: Subject, block: int, path: str, new: Tensor) -> Iterator[None]:
    """The MLP's branch and the stream go on from another state."""
    module = submodule(subject.stack()[block], path)
    assert module is not None
    moved: list[Tensor] = []

    def before(_module: nn.Module, given: Any) -> Any:
        states = given[0].clone().reshape(1, -1, new.shape[-1])
        moved[:] = [new - states[0, -1]]
        states[:, -1] = new
        return (states.reshape(given[0].shape), *given[1:])

    def after(_module: nn.Module, _given: Any, out: Any) -> Any:
        states = (out if isinstance(out, Tensor) else out[0]).clone()
        states[:, -1] += moved[0]
        return states if isinstance(out, Tensor) else (states, *out[1:])

    handles = [
        module.register_forward_pre_hook(before),
        subject.stack()[block].register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _half(subject: Subject, dtype: torch.dtype) -> None:
    model = lc.load(subject.copied(dtype))
    found = lc.extract(model, subject.prompts, "resid", at=list(POSITIONS), progress=False).resid
    network = subject.copied(dtype)
    rows = []
    for ids, places in zip(subject.lists(), subject.places(), strict=True):
        one = parts(network, subject.family, ids)
        rows.append(torch.stack([state[places].float() for state in one.resid], 1))
    require_equal(found, torch.stack(rows), what=str(dtype), tolerance=HALF)


FEATURES = {
    "resid": resid,
    "resid_mid": resid_mid,
    "attn_out": attn_out,
    "mlp_out": mlp_out,
    "z": z,
    "head": head,
    "patching": patching,
    "patching resid_mid": patching_resid_mid,
    "patching z": patching_z,
    "bf16": bf16,
    "fp16": fp16,
    "doctor": doctor,
}

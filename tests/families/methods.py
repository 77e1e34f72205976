"""Methods that read or change a whole forward: decomposition, knockout, attention, training.

A feature is a function of a `tests.families.subjects.Subject` that raises `Wrong` where our
result is not that of plain torch hooks on ``subject.network``, lets our own error of one line
through where we refuse, and raises `Nothing` where the network has nothing of the kind. The first
line of its docstring stands in docs/models.md.

Attention of the plain network is met where all networks have it: in the softmax over keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn import functional as F

import lensclust as lc
import probes
from lensclust.inference import answers
from lensclust.training.temporary import finetuned
from probes.attention.knockout import answers_cut_off
from tests.families.reading import added_by_attention, added_by_mlp, projection
from tests.families.subjects import Nothing, Parts, Subject, Wrong, require_equal, submodule

LABELS = {"a": 7, "b": 20, "c": 41}
# Gradients of two exact ways; changes of logits are small differences of large numbers.
SLOPES, CHANGES = 5e-3, 2e-2
SPANS = {"relevant": (0, 2), "irrelevant": (2, 4)}


def decompose(subject: Subject) -> None:
    """Label logits as a sum over embedding, heads and MLPs, and each of these."""
    found = probes.decompose(
        subject.model, subject.prompts, LABELS, label=None, progress=False
    ).logits
    last = [one.logits[-1, list(LABELS.values())] for one in subject.parts]
    require_equal(found.sum("component"), _uncapped(subject, torch.stack(last)), what="the sum")
    for row, one in enumerate(subject.parts):
        matrix = _matrix(subject, subject.lists()[row], one)
        here = found[row]
        require_equal(here.sel(component="embed"), one.resid[0][-1] @ matrix, what="embedding")
        for block in subject.blocks:
            state = one.z[block]
            # Heads that pass through a norm first are in the sum alone.
            if state is not None and _added_as_it_is(subject, one, block):
                weight, _ = projection(subject, block)
                each = torch.einsum("hd,hdm->hm", state[-1].unflatten(0, weight.shape[:2]), weight)
                names = [f"head {block}.{head}" for head in range(len(each))]
                expected = subject.family.scale * each @ matrix
                require_equal(here.sel(component=names), expected, what=f"heads of block {block}")
            mlp = added_by_mlp(subject, one, block)
            if mlp is not None:
                part = here.sel(component=f"mlp {block}")
                require_equal(part, mlp[-1] @ matrix, what=f"MLP {block}", tolerance=5e-3)


def knockout(subject: Subject) -> None:
    """Logits with tokens hidden from attention, in all blocks and in the last with attention."""
    prompts, lists = subject.prompts, subject.lists()
    hidden = torch.rand(prompts.tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    hidden[:, 0] = True
    hidden &= torch.arange(hidden.shape[1]) < prompts.lengths[:, None] - 1
    blocks = _softmaxes(subject)
    for only in (None, len(blocks) - 1):
        found = answers_cut_off(
            subject.model,
            prompts,
            lambda logits, _: logits,
            hidden,
            since="answer",
            blocks=None if only is None else [blocks[only]],
        )
        expected = []
        for row, ids in enumerate(lists):
            gone = torch.zeros(len(ids), len(ids), dtype=torch.bool)
            gone[-1] = hidden[row, : len(ids)]

            def without(
                scores: Tensor, call: int, gone: Tensor = gone, only: int | None = only
            ) -> Tensor:
                if only is not None and call != only:
                    return scores
                # A sink stands behind the keys.
                here = F.pad(gone, (0, scores.shape[-1] - gone.shape[-1]))
                return scores.masked_fill(here, torch.finfo(scores.dtype).min)

            with torch.no_grad(), _attention(len(ids), before=without):
                logits = subject.network(torch.tensor([ids]), use_cache=False).logits[0, -1]
            expected.append(logits)
        require_equal(found, torch.stack(expected), what=f"knockout in {only or 'all'}")


def head_activation(subject: Subject) -> None:
    """Attention times the gradient of the loss, for each head and prompt."""
    blocks = _softmaxes(subject)
    found = probes.head_activation(subject.model, subject.prompts, progress=False).signed
    if found["block"].values.tolist() != blocks:
        raise Wrong(f"blocks {found['block'].values.tolist()}, expected {blocks}")
    expected = [
        torch.stack([(a * slope).sum((1, 2)) for a, slope in _slopes(subject, ids, answer[0])])
        for ids, answer in zip(subject.lists(), subject.prompts.answers or (), strict=True)
    ]
    require_equal(
        found.values.reshape(len(expected), -1),
        torch.stack(expected).flatten(1),
        what="attention times gradient",
        tolerance=SLOPES,
    )


def attention_ratio(subject: Subject) -> None:
    """Attention on two spans: as it is, and times its gradient."""
    _ratio(subject, ("attention", "gradient"))


def value_ratio(subject: Subject) -> None:
    """Attention on two spans, times the length of values."""
    _ratio(subject, ("value",))


def training(subject: Subject) -> None:
    """Logits after a step of AdamW on all weights, and on those of the last block."""
    prompts, lists = subject.prompts, subject.lists()
    before = [one.logits[-1] for one in subject.parts]
    last = len(subject.blocks) - 1
    for only in (None, rf"^{subject.family.layers}\.{last}\."):
        network = subject.copied()
        layers = list(network.get_submodule(subject.family.layers).children())
        trained = list((network if only is None else layers[last]).parameters())
        optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
        losses = [
            F.cross_entropy(
                network(torch.tensor([ids]), use_cache=False).logits[0, -1:], torch.tensor(answer)
            )
            for ids, answer in zip(lists, prompts.answers or (), strict=True)
        ]
        loss = torch.stack(losses).mean()
        loss.backward()
        optimizer.step()
        with finetuned(
            subject.model, prompts, steps=1, lr=1e-3, only=only, batch_size=len(prompts)
        ) as done:
            found = answers(subject.model, prompts, lambda logits, _: logits)
        require_equal([done.losses[0][0]], [loss.item()], what="loss")
        with torch.no_grad():
            expected = [
                network(torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in lists
            ]
        require_equal(
            found - torch.stack(before),
            torch.stack(expected) - torch.stack(before),
            what=f"change of logits, {only or 'all'}",
            tolerance=CHANGES,
        )


# -- plain networks -----------------------------------------------------------------------


@contextmanager
def _attention(
    length: int,
    *,
    before: Callable[[Tensor, int], Tensor] = lambda scores, _: scores,
    after: Callable[[Tensor], Tensor] = lambda pattern: pattern,
) -> Iterator[list[int]]:
    """Inside, softmaxes over this many keys are changed; yields how many there were."""
    calls = [0]
    plain = {"F": F.softmax, "torch": torch.softmax}

    def softmax(which: str) -> Callable[..., Tensor]:
        def changed(scores: Tensor, *given: Any, **options: Any) -> Tensor:
            square = scores.dim() >= 3 and scores.shape[-2] == length
            # A sink stands behind the keys.
            if not square or scores.shape[-1] not in (length, length + 1):
                return plain[which](scores, *given, **options)
            calls[0] += 1
            return after(plain[which](before(scores, calls[0] - 1), *given, **options))

        return changed

    F.softmax, torch.softmax = softmax("F"), softmax("torch")
    try:
        yield calls
    finally:
        F.softmax, torch.softmax = plain["F"], plain["torch"]


def _softmaxes(subject: Subject) -> list[int]:
    """The blocks that take a softmax over keys."""
    ids = subject.lists()[0]
    layers = list(subject.network.get_submodule(subject.family.layers).children())
    found: list[int] = []
    with ExitStack() as stack:
        calls = stack.enter_context(_attention(len(ids)))
        counts: list[int] = []
        for layer in layers:
            handle = layer.register_forward_hook(lambda *_: counts.append(calls[0]))
            stack.callback(handle.remove)
        with torch.no_grad():
            subject.network(torch.tensor([ids]), use_cache=False)
    for block, (now, then) in enumerate(zip(counts, [0, *counts], strict=False)):
        found += [block] if now > then else []
    if not found:
        raise Nothing("no softmax over tokens")
    return found


def _slopes(subject: Subject, ids: list[int], answer: int) -> list[tuple[Tensor, Tensor]]:
    """Attention ``(head, query, key)`` of each block and its gradient."""
    kept: list[Tensor] = []

    def keep(pattern: Tensor) -> Tensor:
        kept.append(pattern)
        return pattern

    with _attention(len(ids), after=keep):
        logits = subject.network(torch.tensor([ids]), use_cache=False).logits
    loss = F.cross_entropy(logits[0, -1:].float(), torch.tensor([answer]))
    slopes = torch.autograd.grad(loss, kept)
    return [
        (
            pattern.detach().reshape(-1, *pattern.shape[-2:])[..., : len(ids)],
            slope.reshape(-1, *slope.shape[-2:])[..., : len(ids)],
        )
        for pattern, slope in zip(kept, slopes, strict=True)
    ]


def _values(subject: Subject, ids: list[int]) -> list[Tensor]:
    """How long ``v W_O`` of each key is ``(head, key)``, ``v`` being dz/dA at the last query."""
    kept: list[Tensor] = []
    z: list[Tensor] = []

    def keep(pattern: Tensor) -> Tensor:
        kept.append(pattern)
        return pattern

    layers = list(subject.network.get_submodule(subject.family.layers).children())
    blocks = [b for b in subject.blocks if submodule(layers[b], subject.family.output) is not None]
    with ExitStack() as stack:
        for block in blocks:
            module: Any = submodule(layers[block], subject.family.output)
            handle = module.register_forward_pre_hook(lambda _, given: z.append(given[0]))
            stack.callback(handle.remove)
        with _attention(len(ids), after=keep):
            subject.network(torch.tensor([ids]), use_cache=False)
    found = []
    for block, pattern, state in zip(blocks, kept, z, strict=True):
        weight, _ = projection(subject, block)
        each = state.reshape(-1, *weight.shape[:2])[-1]
        value = torch.stack(
            [
                torch.autograd.grad(each[:, j].sum(), pattern, retain_graph=True)[0].reshape(
                    -1, *pattern.shape[-2:]
                )[:, -1, : len(ids)]
                for j in range(each.shape[1])
            ],
            -1,
        )
        added = subject.family.scale * torch.einsum("hkd,hdm->hkm", value, weight)
        found.append(added.norm(dim=-1))
    return found


def _ratio(subject: Subject, weightings: tuple[str, ...]) -> None:
    blocks = _softmaxes(subject)
    long = np.flatnonzero(subject.prompts.lengths.numpy() > 5)
    prompts = subject.prompts.take(long.tolist())
    spans = {name: torch.tensor([span] * len(prompts)) for name, span in SPANS.items()}
    prompts = replace(prompts, spans=spans)
    # First tokens count in no span: one is put in front of all.
    found = probes.attention_ratio(
        subject.model,
        _behind_a_first_token(prompts),
        block=None,
        weighting=list(weightings),
        draws=2,
        progress=False,
    ).values
    if found["block"].values.tolist() != blocks:
        raise Wrong(f"blocks {found['block'].values.tolist()}, expected {blocks}")
    answers = subject.prompts.answers
    assert answers is not None
    for row, index in enumerate(long.tolist()):
        ids = [3, *subject.lists()[index]]
        slopes = _slopes(subject, ids, answers[index][0])
        looks: dict[str, list[Tensor]] = {
            "attention": [pattern[:, -1] for pattern, _ in slopes],
            "gradient": [(pattern * slope)[:, -1].abs() for pattern, slope in slopes],
        }
        if "value" in weightings:
            lengths = _values(subject, ids)
            looks["value"] = [p[:, -1] * v for (p, _), v in zip(slopes, lengths, strict=True)]
        for weighting in weightings:
            for side, (start, stop) in SPANS.items():
                expected = torch.stack(
                    [look[:, start + 1 : stop + 1].mean(1) for look in looks[weighting]]
                )
                ours: xr.DataArray = found[side].sel(weighting=weighting).isel(prompt=row)
                require_equal(
                    ours.values.ravel()[None],
                    expected.flatten()[None],
                    what=f"{weighting} on {side}",
                    tolerance=SLOPES,
                )


def _behind_a_first_token(prompts: lc.Prompts) -> lc.Prompts:
    ids = [
        [3, *row[: int(n)].tolist()] for row, n in zip(prompts.tokens, prompts.lengths, strict=True)
    ]
    spans = {name: [(a + 1, b + 1)] * len(ids) for name, (a, b) in SPANS.items()}
    return lc.Prompts.from_token_lists(ids, prompts.rows, answers=prompts.answers, spans=spans)


def _added_as_it_is(subject: Subject, one: Parts, block: int) -> bool:
    added, out = added_by_attention(subject, one, block), one.heads_out[block]
    if subject.family.mlp or added is None or out is None:
        return False
    return torch.allclose(added, subject.family.scale * out, rtol=1e-3, atol=1e-4)


def _uncapped(subject: Subject, logits: Tensor) -> Tensor:
    cap = getattr(subject.network.config, "final_logit_softcapping", None)
    if subject.family.config == "NanoChatConfig":
        cap = 15.0
    return logits if cap is None else cap * torch.atanh(logits / cap)


@torch.no_grad()
def _matrix(subject: Subject, ids: list[int], one: Parts) -> Tensor:
    """What the last token's state is multiplied by to give label logits, the norm's scale kept."""
    into, out = {}, {}

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, given: Any, found: Any) -> None:
            if given and isinstance(given[0], Tensor) and isinstance(found, Tensor):
                into[name], out[name] = given[0], found

        return hook

    head: Any = subject.network.get_output_embeddings()
    named = dict(subject.network.named_modules())
    with ExitStack() as stack:
        for name, module in named.items():
            stack.callback(module.register_forward_hook(look(name)).remove)
        logits = subject.network(torch.tensor([ids]), use_cache=False).logits[0, -1]
    unembedded = next(name for name, module in named.items() if module is head)
    norms = [
        name
        for name in into
        if torch.equal(into[name].reshape(-1)[-32:], one.resid[-1][-1].reshape(-1)[-32:])
        and torch.equal(out[name].reshape(-1)[-32:], into[unembedded].reshape(-1)[-32:])
        and name != unembedded
    ]
    if not norms:
        raise Wrong("decomposed, though no norm stands between the last block and the unembedding")
    norm: Any = named[norms[0]]
    state = one.resid[-1][-1]
    shift = norm(torch.zeros_like(state)[None, None])[0, 0]
    moved = norm((state + 1)[None, None])[0, 0]
    made = norm(state[None, None])[0, 0]
    centred = torch.allclose(moved, made, atol=1e-4)
    gain = (made - shift) / (state - state.mean() if centred else state)
    chosen = head.weight[list(LABELS.values())].T
    matrix = gain[:, None] * chosen
    matrix = matrix - matrix.mean(0) if centred else matrix
    # Some networks scale their logits.
    raw = out[unembedded].reshape(-1, out[unembedded].shape[-1])[-1]
    scaled = _uncapped(subject, logits)
    return matrix * ((scaled @ raw) / (raw @ raw))


FEATURES: dict[str, Callable[[Subject], None]] = {
    "decompose": decompose,
    "knockout": knockout,
    "head activation": head_activation,
    "attention ratio": attention_ratio,
    "value weighting": value_ratio,
    "fine-tuning": training,
}

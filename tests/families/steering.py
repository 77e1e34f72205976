"""States changed while a model runs and while it generates, against plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import probes
from lensclust.inference.readouts import answers
from probes.steering.interventions import Intervention
from tests.families.subjects import Edit, Nothing, Subject, edited, require_equal

NEW = 3


def steer(subject: Subject) -> None:
    """Logits with one token of each row changed, at every layer of the residual stream."""
    prompts, lists = subject.prompts, subject.lists()
    chosen = prompts.position("word_end")
    for layer in range(len(subject.blocks) + 1):
        site = f"resid {layer}"
        with probes.steer(subject.model, _added(subject), at=site, positions=chosen):
            found = answers(subject.model, prompts, lambda logits, _: logits)
        expected = []
        for ids, place in zip(lists, chosen.tolist(), strict=True):
            change = _changing(subject, layer, lambda index, place=place: index == place)
            with torch.no_grad(), edited(subject.network, subject.family, layer, change):
                expected.append(subject.network(torch.tensor([ids]), use_cache=False).logits[0, -1])
        require_equal(found, torch.stack(expected), what=f"logits, steered at {site}")


def generation(subject: Subject) -> None:
    """Tokens and logits of steered generation: a token of the prompt, and all generated ones."""
    try:
        _generated(subject.model, subject.lists()[0])
    except Exception as error:
        raise Nothing(f"generation itself raises {type(error).__name__}") from error
    layer = len(subject.blocks) // 2
    for ids in subject.lists()[:2]:
        n = len(ids)
        ways: list[tuple[dict[str, int], Callable[[Tensor], Tensor]]] = [
            ({"positions": 1}, lambda index: index == 1),
            ({"since": n}, lambda index, n=n: index >= n),
        ]
        for given, chosen in ways:
            with probes.steer(subject.model, _added(subject), at=f"resid {layer}", **given):
                made = _generated(subject.model, ids)
            sequence, logits = list(ids), []
            change = _changing(subject, layer, chosen)
            with torch.no_grad(), edited(subject.network, subject.family, layer, change):
                for _ in range(NEW):
                    run = subject.network(torch.tensor([sequence]), use_cache=False)
                    logits.append(run.logits[0, -1])
                    sequence.append(int(logits[-1].argmax()))
            require_equal(torch.stack(made.logits, 1)[0], torch.stack(logits), what=str(given))
            require_equal(made.sequences, [sequence], what=f"tokens, {given}", tolerance=0)


def _generated(model: Any, ids: list[int]) -> Any:
    return model.generate(
        torch.tensor([ids]),
        max_new_tokens=NEW,
        do_sample=False,
        stop_at_eos=False,
        output_logits=True,
        return_type="tokens",
        verbose=False,
    )


def _added(subject: Subject) -> Intervention:
    vectors = [_vector(subject, layer) for layer in range(len(subject.blocks) + 1)]
    return Intervention("add", lambda site: lambda states: states + vectors[site.layer])


def _vector(subject: Subject, layer: int) -> Tensor:
    """As long as the states it is added to."""
    state = subject.parts[0].resid[layer][-1]
    vector = torch.randn(len(state), generator=torch.Generator().manual_seed(layer))
    return vector / vector.norm() * state.norm()


def _changing(subject: Subject, layer: int, chosen: Callable[[Tensor], Tensor]) -> Edit:
    vector = _vector(subject, layer)

    def change(states: Tensor) -> Tensor:
        here = chosen(torch.arange(states.shape[-2]))[:, None]
        return states + torch.where(here, vector, torch.zeros(()))

    return change


FEATURES: dict[str, Callable[[Subject], None]] = {"steer": steer, "generation": generation}

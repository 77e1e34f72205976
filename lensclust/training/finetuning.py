"""Supervised fine-tuning of a loaded model on prompts with their answers.

The model is restored bit for bit: the trained weights are in the checkpoints of the run, which can
be put into the model temporarily. Without a folder the checkpoints stay in memory, each as large
as the trained parameters: for all parameters of a large model give a folder, train adapters
(`Lora`), or train fewer parameters (``only``).

Step ``n`` of a run depends only on the weights, the optimizer's moments, the seed and ``n``, so a
killed run can be resumed with bit-identical results (on a CPU with the same number of threads).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError, check_counts
from lensclust.inference import (
    require_answers,
    require_fits,
    score_answers,
    scored_logits,
    with_gradients,
)
from lensclust.models import (
    Site,
    chosen_parameters,
    default_budget,
    fingerprint,
    model_device,
    named_parameters,
    restored_afterwards,
    training_batches,
)
from lensclust.progress import progress_bar
from lensclust.prompts import Prompts
from lensclust.storage import digest_of, save_checksummed, writing
from lensclust.training.data import content_digest
from lensclust.training.lora import Adapters, Lora
from lensclust.training.runs import HEADER, ChosenWeights, FinetuningRun, Tuned, TunedCheckpoint
from lensclust.training.schedules import check_rate, checkpoint_steps, rate
from lensclust.training.state import checkpoint_path, claimed, copied, open_folder, save_state

__all__ = ["FinetuningRun", "finetune"]


@checked_arguments
@with_gradients
def finetune(
    model: TransformerBridge,
    prompts: Prompts,
    *,
    steps: int = 100,
    batch_size: int = 16,
    batch_tokens: int | None = None,
    lr: float = 1e-4,
    schedule: str = "cosine",
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    only: str | Sequence[str | Site] | None = None,
    lora: Lora | None = None,
    checkpoints: int | Sequence[int] = 8,
    evaluate: Prompts | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    save_every: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> FinetuningRun:
    """Fine-tune a model on the answers of prompts; the model itself is restored.

    AdamW; the learning rate rises linearly, then stays or follows a cosine to zero. The loss is
    the mean cross-entropy over the batch's answer tokens, in nats. A batch holds prompts of
    similar length; every prompt comes once per epoch, reshuffled each time. Dropout stays off.

    Args:
        model: a hooked model, in eval mode.
        prompts: training prompts with target answers. All are used, whatever their split.
        batch_size: prompts per step.
        batch_tokens: tokens per step instead, padding included; at least one prompt.
        schedule: ``"cosine"`` or ``"constant"``, after the warmup.
        warmup: share of the steps in which the learning rate rises.
        weight_decay: of the trained parameters, towards zero; for heads, of their slices only.
        only: which parameters to train, as for `lensclust.training.finetuned`: a regular
            expression, names, or heads (``"head 3.1"``); all by default.
        lora: train adapters instead; they need the extra ``peft``.
        checkpoints: their number, at step 0 and log-spaced up to the last; or the steps
            themselves, to which the first and last are added.
        evaluate: prompts to evaluate at every checkpoint, by ``split``.
        out: folder for ``step-000100.safetensors``, with the trained parameters only, and the
            state to resume from.
        resume: continue the fine-tuning in ``out``, if there is one.
        save_every: steps between two states to resume from, in addition to checkpoints.
        seed: of batches and adapters; the global random state is unchanged.

    Raises:
        InputError: if a hyperparameter is invalid, no parameter is chosen, prompts have no
            answers or are not compatible with the model, the model is in training mode or
            quantised, ``out`` holds another training, or one and ``resume`` is not set, or
            another process trains there.
        RuntimeError: if the loss is no longer finite. The weights are restored then too.

    >>> import lensclust as lc
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="both", task=0)
    >>> before = lc.fingerprint(model)
    >>> run = finetune(model, prompts, steps=4, only=["head 5.0"], checkpoints=3, progress=False)
    >>> [checkpoint.step for checkpoint in run.checkpoints], run.parameters
    ([0, 1, 4], 4096)
    >>> with run.at(4):
    ...     lc.fingerprint(model) == before
    False
    >>> lc.fingerprint(model) == before
    True
    """
    _check_knobs(steps, batch_size, batch_tokens, weight_decay, save_every, only, lora)
    check_rate(lr, warmup, schedule, caller="finetune")
    at = _checkpoint_steps(steps, checkpoints)
    for each in (prompts, evaluate):
        if each is not None:
            require_fits(model, each, caller="finetune")
            require_answers(model, each, caller="finetune")
    named = named_parameters(model)
    masks = chosen_parameters(model, named, only, caller="finetune")
    tuned: Tuned = ChosenWeights({name: named[name] for name in masks})
    if lora is not None:
        tuned = Adapters(model, lora, seed=seed, caller="finetune")
        masks = dict.fromkeys(tuned.parameters)
    folder = None if out is None else Path(out)
    knobs = {
        "finetune": "weights" if lora is None else "adapters",
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "batch_tokens": batch_tokens,
        "lr": lr,
        "schedule": schedule,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "only": only if only is None or isinstance(only, str) else [str(item) for item in only],
        "lora": None if lora is None else lora.to_json(),
        "checkpoints": at,
        "device": model_device(model).type,
        "model": None if folder is None else fingerprint(model),
        "trained on": content_digest(prompts),
        "evaluated on": None if evaluate is None else content_digest(evaluate),
    }
    # The fused kernel needs contiguous memory, but parts of a joint projection are strided views.
    fused = all(parameter.is_contiguous() for parameter in tuned.parameters.values())
    optimizer = torch.optim.AdamW(_groups(tuned, masks, weight_decay), lr=lr, fused=fused)
    tokens, lengths, answers = prompts.with_answers()
    plan = training_batches(model, lengths, batch_size, batch_tokens, seed=seed)
    in_memory: dict[int, dict[str, Tensor]] = {}
    with (
        claimed(folder, caller="finetune"),
        restored_afterwards(model, tuned.weights),
        progress_bar("fine-tuning", total=steps, enabled=progress) as advance,
    ):
        start, done = open_folder(
            folder,
            resume,
            knobs,
            tuned.parameters,
            optimizer,
            at=at,
            header=HEADER,
            caller="finetune",
        )
        scores, losses = list(done.get("scores", [])), list(done.get("losses", []))
        for name, parameter in {**named, **tuned.parameters}.items():
            parameter.requires_grad_(name in masks)
            parameter.grad = None
        samples = {0: 0}
        advance(start)
        for step, rows in zip(range(steps + 1), plan, strict=False):
            # The state before `step`: a resumed run repeats the rest of this iteration.
            samples[step + 1] = samples[step] + len(rows)
            if step < start:
                continue
            is_new = step > start or not done
            if step in at and is_new:
                moved = {n: copied(p) for n, p in tuned.parameters.items() if p in optimizer.state}
                scores += _scores(model, tuned, evaluate, step, samples[step])
                if folder is None:
                    in_memory[step] = moved
                else:
                    with writing(f"finetune: {str(folder)!r}"):
                        content = {"step": step, "samples": samples[step]}
                        content |= {"training": digest_of(knobs)}
                        save_checksummed(checkpoint_path(folder, step), HEADER, content, moved)
            if folder is not None and is_new and (step in at or step % save_every == 0):
                content = {"step": step, "knobs": knobs, "scores": scores, "losses": losses}
                moving = {n: p for n, p in tuned.parameters.items() if p in optimizer.state}
                save_state(folder, content, moving, optimizer, caller="finetune")
            if step == steps:
                break
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(step, steps, warmup=warmup, schedule=schedule)
            longest = int(lengths[rows].max())
            with tuned.on():
                loss = _loss(model, tokens[rows, :longest], answers[rows, :longest])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise RuntimeError(
                    f"finetune: loss is {losses[-1]} at step {step}: expected a smaller lr "
                    f"than {lr}, or other prompts than {rows.tolist()}"
                )
            _confine(tuned, masks, optimizer.param_groups[-1]["lr"] * weight_decay)
            optimizer.step()
        for parameter in tuned.parameters.values():
            parameter.grad = None
    return FinetuningRun(
        frame=pd.DataFrame(scores, columns=["step", "samples", "split", "loss", "accuracy"]),
        losses=tuple(losses),
        checkpoints=tuple(
            TunedCheckpoint(step, samples[step], held=in_memory[step])
            if folder is None
            else TunedCheckpoint(step, samples[step], path=checkpoint_path(folder, step))
            for step in at
        ),
        parameters=sum(
            _size(parameter, masks[name])
            for name, parameter in tuned.parameters.items()
            if parameter in optimizer.state
        ),
        _model=model,
        _tuned=tuned,
    )


# -- one step -----------------------------------------------------------------------------


def _loss(model: TransformerBridge, tokens: Tensor, answers: Tensor) -> Tensor:
    device = model_device(model)
    tokens, scored = tokens.to(device), answers[:, 1:].to(device)
    logits = scored_logits(model, tokens[:, :-1], scored)
    return F.cross_entropy(logits.float(), tokens[:, 1:][scored])


def _groups(
    tuned: Tuned, masks: Mapping[str, Tensor | None], weight_decay: float
) -> list[dict[str, Any]]:
    """Fully trained parameters, and partly trained ones, which decay separately."""
    whole = [p for name, p in tuned.parameters.items() if masks[name] is None]
    sliced = [p for name, p in tuned.parameters.items() if masks[name] is not None]
    groups = ((whole, weight_decay), (sliced, 0.0))
    return [{"params": some, "weight_decay": decay} for some, decay in groups if some]


def _confine(tuned: Tuned, masks: Mapping[str, Tensor | None], decay: float) -> None:
    """Restrict the gradient and the decay to the trained slices."""
    with torch.no_grad():
        for name, mask in masks.items():
            parameter = tuned.parameters[name]
            if mask is not None and parameter.grad is not None:
                parameter.grad.mul_(mask)
                parameter.mul_(1 - decay * mask)


def _size(parameter: nn.Parameter, mask: Tensor | None) -> int:
    return parameter.numel() if mask is None else int(mask.sum())


def _scores(
    model: TransformerBridge, tuned: Tuned, evaluate: Prompts | None, step: int, samples: int
) -> list[dict[str, Any]]:
    if evaluate is None:
        return []

    def logits_at(tokens: Tensor, asked: Tensor) -> Tensor:
        return scored_logits(model, tokens, asked)

    device, budget = model_device(model), default_budget(model)
    with tuned.on():
        rows = score_answers(model, logits_at, evaluate, step, device=device, batch_tokens=budget)
    return [{**row, "samples": samples} for row in rows]


# -- checks -------------------------------------------------------------------------------


def _checkpoint_steps(steps: int, checkpoints: int | Sequence[int]) -> list[int]:
    if isinstance(checkpoints, int):
        if checkpoints < 2:
            raise InputError(f"finetune: checkpoints={checkpoints}, expected at least 2")
        return checkpoint_steps(steps, checkpoints)
    outside = [step for step in checkpoints if not 0 <= step <= steps]
    if outside:
        raise InputError(f"finetune: checkpoint at step {outside[0]}, expected 0..{steps}")
    return sorted({0, *checkpoints, steps})


def _check_knobs(
    steps: int,
    batch_size: int,
    batch_tokens: int | None,
    weight_decay: float,
    save_every: int,
    only: object,
    lora: Lora | None,
) -> None:
    counts = {"steps": steps, "batch_size": batch_size, "save_every": save_every}
    check_counts("finetune", **counts, batch_tokens=batch_tokens)
    if not 0 <= weight_decay < math.inf:
        raise InputError(f"finetune: weight_decay={weight_decay}, expected a number from 0")
    if only is not None and lora is not None:
        raise InputError("finetune: only and lora given, expected one: adapters have Lora.blocks")

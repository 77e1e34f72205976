"""Training a native model from scratch, with log-spaced checkpoints and an exact resume.

Step ``n`` of a run depends only on the weights, the optimizer's moments, the seed and ``n``: the
rows of a batch and the learning rate are functions of the step. So a run killed at any time can be
resumed from its last state with bit-identical results (on a CPU with the same number of threads).
"""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.native import NativeModel
from transformer_lens.utilities.devices import get_device
from transformer_lens.utilities.statistics import derive_generator

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError, check_counts
from lensclust.inference import LogitsAt, score_answers, with_gradients
from lensclust.models import (
    HEADER,
    config_to_json,
    fingerprint,
    named_weights,
    native_bridge,
    native_config,
    report_repeats,
    save_checkpoint,
)
from lensclust.progress import progress_bar
from lensclust.prompts import Prompts
from lensclust.storage import digest_of, writing
from lensclust.training.data import (
    SCORED,
    Auxiliary,
    LossOn,
    Sequences,
    auxiliary_loss,
    check_auxiliary,
    check_sizes,
    content_digest,
    required_sizes,
    sequence_loss,
    split_prompts,
    training_sequences,
)
from lensclust.training.runs import Checkpoint, TrainingRun
from lensclust.training.schedules import check_rate, checkpoint_steps, rate
from lensclust.training.state import checkpoint_path, claimed, copied, open_folder, save_state

__all__ = [
    "Auxiliary",
    "TrainingRun",
    "checkpoint_steps",
    "required_sizes",
    "sequence_loss",
    "train",
]


@checked_arguments
@with_gradients
def train(
    config: str | TransformerBridgeConfig,
    prompts: Prompts,
    *,
    steps: int = 800,
    batch_size: int = 64,
    lr: float = 4e-3,
    weight_decay: float = 0.1,
    warmup: float = 0.05,
    schedule: str = "cosine",
    loss_on: LossOn = "all",
    auxiliary: Auxiliary | None = None,
    start_from: TransformerBridge | None = None,
    n_checkpoints: int = 8,
    out: str | Path | None = None,
    evaluate: Prompts | None = None,
    evaluate_every: int | None = None,
    seed: int = 0,
    resume: bool = False,
    save_every: int = 100,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> TrainingRun:
    """Train a native causal language model on prompts with their answers.

    AdamW; the learning rate rises linearly, then follows a cosine to zero. Batches are drawn
    with replacement, as a function of seed and step. The bare module is trained, without hooks.

    Checkpoints with identical weights are reported in one warning.

    The defaults suit `tasks.sif` and the preset "sif-small": half a minute on one core.

    Args:
        config: a native configuration, or the name of a preset, which then gets the
            vocabulary and context that the prompts need (`required_sizes`).
        prompts: training sequences. If rows have a ``split``, only those of split "train".
        warmup: share of the steps in which the learning rate rises.
        schedule: of the learning rate after that: ``"cosine"`` falls to zero at the last step;
            with ``"constant"`` a longer run passes through the final state of a shorter one with
            the same number of warmup steps.
        loss_on: ``"all"`` tokens except the first, or only the ``"answer"``.
        auxiliary: a second answer, read from a layer's residual stream; its cross-entropy is
            added to the loss.
        start_from: a native model of this configuration with the initial weights; it is not
            changed. The optimizer starts without moments.
        n_checkpoints: at step 0 and log-spaced up to the last; fewer if steps coincide.
        out: folder for ``step-000800.safetensors`` (`lensclust.load` opens them) and the state
            to resume from; without it the checkpoints stay in memory.
        evaluate: prompts on which to report accuracy, by ``split``; by default the splits that
            are not trained on and some of the training rows.
        evaluate_every: number of steps between further reports of accuracy without a checkpoint.
        seed: of weights (overrides the configuration's seed) and batches; the global random
            state is neither read nor changed.
        resume: continue the training in ``out``, if there is one.
        save_every: steps between two states to resume from, in addition to checkpoints.
        device: where to train. Default: an accelerator if there is one.

    Raises:
        InputError: if a hyperparameter is invalid, the prompts or initial weights are not
            compatible with the model, ``out`` holds a training and ``resume`` is not set, or that
            training had other hyperparameters; if ``out`` is damaged or not writable, or another
            process trains there.
        RuntimeError: if the loss is no longer finite.

    >>> from lensclust.tasks import sif
    >>> prompts = sif(n_tasks=2, n_inputs=3, mappings_per_task=2)
    >>> config = native_config("sif-small", n_layers=1, **required_sizes(prompts))
    >>> run = train(config, prompts, steps=4, n_checkpoints=3, progress=False)
    >>> run
    TrainingRun(4 steps, 3 checkpoints; answers right at the end: 0... of train, ...)
    >>> [checkpoint.step for checkpoint in run.checkpoints]
    [0, 1, 4]
    >>> run.frame.columns.tolist(), run.model().cfg.n_layers
    (['step', 'split', 'accuracy', 'loss'], 1)
    """
    if isinstance(config, str):
        config = native_config(config, **required_sizes(prompts))
    if not isinstance(config, TransformerBridgeConfig):
        raise InputError(
            f"train: {type(config).__name__} given as config, expected a native model's, such as "
            "'sif-small' (lensclust.finetune trains an existing model)"
        )
    _check_knobs(steps, batch_size, lr, warmup, schedule, loss_on, n_checkpoints, save_every)
    check_counts("train", evaluate_every=evaluate_every)
    check_counts("train", least=0, seed=seed)
    if not 0 <= weight_decay < math.inf:
        raise InputError(f"train: weight_decay={weight_decay}, expected a number from 0")
    trained, evaluated = split_prompts(prompts, evaluate)
    check_sizes(config, prompts, evaluated)
    if auxiliary is not None:
        check_auxiliary(config, auxiliary, trained)
    training = training_sequences(trained, loss_on, auxiliary)
    device = torch.device(device or get_device())
    bridge = native_bridge(config, seed=seed, device=device, reseed=True)
    model = _bare(bridge, device)
    if start_from is not None:
        _start(model, start_from)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    knobs = {
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "schedule": schedule,
        "loss_on": loss_on,
        "auxiliary": None if auxiliary is None else auxiliary.to_json(trained),
        "start_from": None if start_from is None else fingerprint(start_from),
        "n_checkpoints": n_checkpoints,
        "evaluate_every": evaluate_every,
        "device": device.type,
        "trained on": content_digest(trained),
        "evaluated on": content_digest(evaluated),
        **json.loads(config_to_json(bridge.cfg)),
    }
    folder = None if out is None else Path(out)
    at = checkpoint_steps(steps, n_checkpoints)
    in_memory: dict[int, dict[str, Tensor]] = {}
    with (
        claimed(folder, caller="train"),
        progress_bar("training", total=steps, enabled=progress) as advance,
    ):
        tensors = model.state_dict(keep_vars=True)
        start, done = open_folder(
            folder, resume, knobs, tensors, optimizer, at=at, header=HEADER, caller="train"
        )
        scores = done.get("scores", [])
        # The folder already holds the state of this step, unless it is empty.
        kept = start if scores else None
        advance(start)
        for step in range(start, steps + 1):
            # The state before `step`: a resumed run repeats the rest of this iteration.
            is_checkpoint = step in at
            is_reported = is_checkpoint or (evaluate_every and step % evaluate_every == 0)
            if is_reported and all(row["step"] != step for row in scores):
                scores = scores + score_answers(
                    bridge, _reader(model), evaluated, step, device=device
                )
                if is_checkpoint and folder is None:
                    in_memory[step] = {name: copied(tensor) for name, tensor in tensors.items()}
                elif is_checkpoint and folder is not None:
                    with writing(f"train: {str(folder)!r}"):
                        said = {"step": step, "seed": seed, "training": digest_of(knobs)}
                        save_checkpoint(model, checkpoint_path(folder, step), **said)
            is_saved = is_checkpoint or step % save_every == 0
            if folder is not None and is_saved and step != kept:
                content = {"step": step, "knobs": knobs, "scores": scores}
                save_state(folder, content, tensors, optimizer, caller="train")
            if step == steps:
                break
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(step, steps, warmup=warmup, schedule=schedule)
            loss = _step(model, optimizer, training, batch_size, seed, step, auxiliary)
            advance(1, note=f"loss {loss:.3f}")
        checkpoints = tuple(
            Checkpoint(step, bridge.cfg, weights=in_memory[step])
            if folder is None
            else Checkpoint(step, bridge.cfg, path=checkpoint_path(folder, step))
            for step in at
        )
        report_repeats(at, [c.fingerprint() for c in checkpoints], where=str(folder or "memory"))
    return TrainingRun(
        frame=pd.DataFrame(scores, columns=["step", "split", "accuracy", "loss"]),
        checkpoints=checkpoints,
    )


# -- one step -----------------------------------------------------------------------------


def _step(
    model: NativeModel,
    optimizer: torch.optim.Optimizer,
    data: Sequences,
    batch_size: int,
    seed: int,
    step: int,
    auxiliary: Auxiliary | None,
) -> float:
    generator = derive_generator(seed, "batch", step)
    rows = torch.randint(len(data.tokens), (batch_size,), generator=generator)
    longest = int(data.lengths[rows].max())
    device = next(model.parameters()).device
    tokens = data.tokens[rows, :longest].to(device)
    scored = data.scored[rows, :longest].to(device)
    if auxiliary is None:
        loss = sequence_loss(model(tokens[:, :-1]), tokens, scored)
    else:
        loss = auxiliary_loss(model, auxiliary, data, rows, tokens, scored)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise RuntimeError(f"train: loss is {value} at step {step}: expected a smaller lr")
    return value


# -- prompts ------------------------------------------------------------------------------


def _check_knobs(
    steps: int,
    batch_size: int,
    lr: float,
    warmup: float,
    schedule: str,
    loss_on: str,
    n_checkpoints: int,
    save_every: int,
) -> None:
    check_counts("train", steps=steps, batch_size=batch_size, save_every=save_every)
    check_counts("train", least=2, n_checkpoints=n_checkpoints)
    check_rate(lr, warmup, schedule, caller="train")
    if loss_on not in SCORED:
        raise InputError(f"train: loss_on={loss_on!r}, expected one of {sorted(SCORED)}")


# -- weights and state --------------------------------------------------------------------


def _bare(bridge: TransformerBridge, device: torch.device) -> NativeModel:
    """The module without hooks, an eighth faster to train than inside the bridge."""
    with torch.random.fork_rng(devices=[]):
        model = NativeModel(deepcopy(bridge.cfg))
    weights = {name: tensor.detach().clone() for name, tensor in named_weights(bridge).items()}
    model.load_state_dict(weights, assign=True)
    return model.to(device)


def _reader(model: NativeModel) -> LogitsAt:
    return lambda tokens, asked: model(tokens)[asked]


def _start(model: NativeModel, given: TransformerBridge) -> None:
    weights = named_weights(given)
    sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    odd = [n for n in {**sizes, **weights} if n not in weights or weights[n].shape != sizes.get(n)]
    if odd:
        there = tuple(weights[odd[0]].shape) if odd[0] in weights else "missing"
        raise InputError(
            f"train: start_from does not match the configuration: {odd[0]!r} is {there}, "
            f"expected {sizes.get(odd[0], 'no such weight')}"
        )
    model.load_state_dict({name: tensor.detach() for name, tensor in weights.items()})

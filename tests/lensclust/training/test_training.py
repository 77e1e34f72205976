import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import log_loss
from transformer_lens.model_bridge.sources.native import NativeModel

from lensclust.errors import InputError
from lensclust.models.checkpoints import fingerprint, read_metadata
from lensclust.models.loading import load
from lensclust.models.native import native_bridge_with, native_config
from lensclust.parallel import one_thread
from lensclust.prompts.prompts import Prompts
from lensclust.tasks.synthetic.sif import sif
from lensclust.training import pretraining as training
from lensclust.training.data import (
    Auxiliary,
    auxiliary_loss,
    required_sizes,
    sequence_loss,
    training_sequences,
)
from lensclust.training.pretraining import train
from lensclust.training.runs import TrainingRun
from lensclust.training.schedules import checkpoint_steps

PROMPTS = sif(n_tasks=3, n_inputs=4, mappings_per_task=3, strings_per_regex=16, rows_per_mapping=4)
SIZES = {"n_layers": 2, "n_heads": 2, "d_model": 16, **required_sizes(PROMPTS)}
KNOBS = {"steps": 30, "batch_size": 8, "n_checkpoints": 4, "save_every": 4, "device": "cpu"}


def short(out: Path | None = None, **knobs: object) -> TrainingRun:
    config = native_config("sif-small", **SIZES)
    with one_thread():
        return train(config, PROMPTS, **{**KNOBS, "out": out, "progress": False, **knobs})


def weights(run: TrainingRun) -> dict[int, str]:
    return {step: fingerprint(model) for step, model in run.models()}


@pytest.fixture(scope="module")
def plain() -> TrainingRun:
    return short()


# -- the loss -----------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, database=None)
@given(st.data())
def test_loss_is_the_mean_over_the_scored_tokens(data):
    n, length, vocab = (data.draw(st.integers(low, 6)) for low in (1, 2, 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(n, length - 1, vocab, generator=generator)
    tokens = torch.randint(vocab, (n, length), generator=generator)
    scored = torch.rand(n, length, generator=generator) < 0.6
    scored[0, 1] = True
    log_probs = logits.double() - torch.logsumexp(logits.double(), -1, keepdim=True)
    terms = [
        -log_probs[i, t - 1, tokens[i, t]].item()
        for i in range(n)
        for t in range(1, length)
        if scored[i, t]
    ]
    found = sequence_loss(logits, tokens, scored).item()
    assert found == pytest.approx(sum(terms) / len(terms), rel=1e-4)


@pytest.mark.parametrize("loss_on", ["all", "answer"])
def test_one_step_follows_the_gradient_of_a_plain_loop(loss_on):
    """One AdamW step from the same weights, the loss taken prompt by prompt without padding."""
    ids, answers = [[1, 5, 3], [2, 6], [1, 2, 3, 4]], [[4], [3, 5], [6]]
    rows = pd.DataFrame({"task": ["a", "b", "c"]})
    prompts = Prompts.from_token_lists(ids, rows, answers=answers)
    config = native_config("sif-small", n_layers=1, **required_sizes(prompts))
    options = {"warmup": 0.0, "loss_on": loss_on, "device": "cpu", "progress": False}
    run = train(config, prompts, steps=1, batch_size=64, n_checkpoints=2, **options)
    before, after = (model for _, model in run.models())

    # The rows of the batch are the function of seed and step that the documentation promises.
    from transformer_lens.utilities.statistics import derive_generator

    drawn = torch.randint(3, (64,), generator=derive_generator(0, "batch", 0)).tolist()
    terms = []
    for i in drawn:
        sequence = torch.tensor([ids[i] + answers[i]])
        log_probs = before(sequence[:, :-1]).log_softmax(-1)[0]
        first = 1 if loss_on == "all" else len(ids[i])
        terms += [-log_probs[t - 1, sequence[0, t]] for t in range(first, sequence.shape[1])]
    optimizer = torch.optim.AdamW(before.original_model.parameters(), lr=4e-3, weight_decay=0.1)
    torch.stack(terms).mean().backward()
    gradients = {n: p.grad for n, p in before.original_model.named_parameters()}
    optimizer.step()
    expected = dict(before.original_model.named_parameters())
    for name, parameter in after.original_model.named_parameters():
        # Adam's first step is the sign of the gradient: unsure where that is rounding error.
        gradient = gradients[name]
        sure = torch.ones_like(parameter, dtype=torch.bool)
        sure = sure if gradient is None else (gradient == 0) | (gradient.abs() > 1e-5)
        torch.testing.assert_close(parameter[sure], expected[name][sure], rtol=1e-3, atol=1e-5)


# -- what a training gives ----------------------------------------------------------------


def test_it_learns_the_tasks_and_new_strings_but_not_new_expressions():
    prompts = sif(n_tasks=3, n_inputs=4, mappings_per_task=4, strings_per_regex=64)
    with one_thread():
        run = train(
            native_config("sif-small", n_layers=2, d_model=32, **required_sizes(prompts)),
            prompts,
            steps=250,
            lr=1e-2,
            loss_on="answer",
            progress=False,
        )
    final = run.frame[run.frame["step"] == 250].set_index("split")
    assert final["accuracy"]["train"] > 0.95
    assert final["accuracy"]["new_string"] > 0.9
    assert final["accuracy"]["new_regex"] < 0.7
    first = run.frame[run.frame["step"] == 0].set_index("split")
    assert (first["accuracy"] < 0.3).all()
    # The untrained model knows about as much as a uniform guess over the vocabulary.
    vocabulary = required_sizes(prompts)["d_vocab"]
    assert first["loss"].between(0.7 * np.log(vocabulary), 1.5 * np.log(vocabulary)).all()


def test_frame_has_every_split_at_every_checkpoint(plain):
    assert plain.frame.columns.tolist() == ["step", "split", "accuracy", "loss"]
    assert [checkpoint.step for checkpoint in plain.checkpoints] == checkpoint_steps(30, 4)
    sizes = plain.frame.groupby("step")["split"].apply(set)
    assert sizes.index.tolist() == checkpoint_steps(30, 4)
    assert all(splits == set(PROMPTS.rows["split"]) for splits in sizes)


def test_accuracy_is_that_of_the_loaded_model(plain):
    model, part = plain.model(), PROMPTS.where(split="new_pair")
    last = part.position("answer")
    with torch.no_grad():
        predicted = model(part.tokens)[torch.arange(len(part)), last].argmax(-1)
    right = predicted == torch.tensor(part.answers)[:, 0]
    rows = plain.frame[(plain.frame["step"] == 30) & (plain.frame["split"] == "new_pair")]
    assert rows["accuracy"].item() == pytest.approx(right.double().mean().item())


def test_an_answer_of_several_tokens_counts_when_all_are_right():
    rows = pd.DataFrame({"task": ["a", "b"]})
    prompts = Prompts.from_token_lists([[1, 2], [1, 3]], rows, answers=[[4, 5, 6], [7]])
    run = train("sif-small", prompts, steps=60, n_checkpoints=2, lr=1e-2, progress=False)
    assert run.frame["split"].unique().tolist() == ["all"]
    assert run.frame["accuracy"].iloc[-1] == 1.0
    assert run.model()(torch.tensor([[1, 2, 4, 5]])).argmax(-1)[0, 1:].tolist() == [4, 5, 6]


def test_only_training_rows_are_trained_on(plain):
    with one_thread():
        alone = train(
            native_config("sif-small", **SIZES),
            PROMPTS.where(split="train"),
            evaluate=PROMPTS.where(split="both"),
            progress=False,
            **KNOBS,
        )
    assert weights(alone) == weights(plain)
    assert alone.frame["split"].unique().tolist() == ["both"]


def test_checkpoints_in_a_folder_and_in_memory_are_the_same(plain, tmp_path):
    run = short(tmp_path)
    assert weights(run) == weights(plain)
    pd.testing.assert_frame_equal(run.frame, plain.frame)
    path = tmp_path / "step-000030.safetensors"
    assert run.checkpoints[-1].path == path
    assert read_metadata(path)["step"] == 30
    assert fingerprint(load(path)) == fingerprint(plain.model())
    untrained = load(native_config("sif-small", **SIZES, seed=0))
    assert weights(plain)[0] == fingerprint(untrained)


def test_editing_a_model_leaves_its_checkpoint_alone(plain):
    before = weights(plain)
    with torch.no_grad():
        for parameter in plain.model().parameters():
            parameter.add_(1)
    assert weights(plain) == before


def test_seed_decides_and_global_random_state_does_not(plain):
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state()
    assert weights(short()) == weights(plain)
    assert torch.get_rng_state().equal(before)
    assert not set(weights(short(seed=1)).values()) & set(weights(plain).values())


@given(st.integers(1, 5000), st.integers(2, 30))
def test_checkpoint_steps_go_from_the_first_to_the_last(steps, n):
    at = checkpoint_steps(steps, n)
    assert at == sorted(set(at))
    assert (at[0], at[-1]) == (0, steps)
    assert len(at) <= n


# -- going on, at a constant rate, with a second answer -----------------------------------

NAMED = replace(PROMPTS, rows=PROMPTS.rows.assign(identity=PROMPTS.rows["task"] + 2))


def with_a_second_answer(**knobs: Any) -> TrainingRun:
    config = native_config("sif-small", **SIZES)
    auxiliary = knobs.pop("auxiliary", Auxiliary("identity", layer=1))
    with one_thread():
        return train(config, NAMED, auxiliary=auxiliary, progress=False, **{**KNOBS, **knobs})


def test_it_goes_on_from_given_weights_and_leaves_them_alone(plain):
    given_model = plain.model()
    before = fingerprint(given_model)
    run = short(start_from=given_model, seed=3)
    assert weights(run)[0] == before
    assert fingerprint(given_model) == before
    assert weights(run)[30] not in {before, *weights(short(seed=3)).values()}


def test_at_a_constant_rate_a_longer_run_passes_through_a_shorter_one():
    both = {"schedule": "constant", "n_checkpoints": 4}
    long = short(steps=20, warmup=2 / 20, **both)
    [at] = [c.step for c in long.checkpoints if 2 < c.step < 20]
    cut = short(steps=at, warmup=2 / at, **both)
    assert weights(cut)[at] == weights(long)[at]
    # What falls does not.
    falling = short(steps=20, warmup=2 / 20, n_checkpoints=4)
    assert weights(short(steps=at, warmup=2 / at, n_checkpoints=4))[at] != weights(falling)[at]


def test_reporting_oftener_changes_nothing_else(plain):
    run = short(evaluate_every=7)
    assert weights(run) == weights(plain)
    assert set(run.frame["step"]) == {*range(0, 31, 7), *checkpoint_steps(30, 4)}
    same = run.frame[run.frame["step"].isin(plain.frame["step"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(same, plain.frame)


@pytest.mark.parametrize("layer", [1, 2])
def test_the_second_answer_is_read_from_the_layer(layer):
    auxiliary = Auxiliary("identity", layer=layer, weight=0.5)
    config = native_config("sif-small", **SIZES, seed=1)
    with torch.random.fork_rng(devices=[]):
        model = NativeModel(config)
    prompts = NAMED.take(range(0, len(NAMED), 37))
    data = training_sequences(prompts, "answer", auxiliary)
    rows = torch.arange(len(prompts))
    args = (data.tokens, data.scored)
    found = auxiliary_loss(model, auxiliary, data, rows, *args)
    plain_loss = sequence_loss(model(data.tokens[:, :-1]), *args)
    # The oracle: hooks, one prompt at a time, and scikit-learn in float64.
    bridge = native_bridge_with(config, model.state_dict(), name="oracle")
    logits = []
    for row, length in zip(prompts.tokens, prompts.lengths, strict=True):
        _, cache = bridge.run_with_cache(row[None, :length])
        state = cache[f"blocks.{layer - 1}.hook_resid_post"][0, -1]
        read: Any = bridge.original_model
        logits.append(read.head(read.ln_out(state))[[2, 3, 4]].detach().double().numpy())
    from scipy.special import softmax

    expected = log_loss(prompts.rows["task"], softmax(logits, axis=1), labels=[0, 1, 2])
    assert (found - plain_loss).item() == pytest.approx(0.5 * expected, rel=1e-4)
    # No hook is left behind.
    assert not model.layers[layer - 1]._forward_hooks


def test_a_second_answer_of_no_weight_changes_nothing(plain):
    run = with_a_second_answer(auxiliary=Auxiliary("identity", layer=2, weight=0.0))
    assert weights(run) == weights(plain)
    assert weights(with_a_second_answer())[30] != weights(plain)[30]


def test_a_stopped_training_with_all_of_it_goes_on_with_the_same_bits(plain, tmp_path, monkeypatch):
    knobs: dict[str, Any] = {"start_from": plain.model(), "schedule": "constant"}
    knobs |= {"evaluate_every": 3, "out": tmp_path / "run"}
    whole = with_a_second_answer(**{**knobs, "out": None})
    step = training._step

    def stopping(*args: Any) -> float:
        if args[5] == 17:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(training, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        with_a_second_answer(**knobs)
    monkeypatch.setattr(training, "_step", step)
    resumed = with_a_second_answer(**knobs, resume=True)
    assert weights(resumed) == weights(whole)
    pd.testing.assert_frame_equal(resumed.frame, whole.frame)
    changed = {
        "start_from": short(steps=1).model(),
        "auxiliary": Auxiliary("identity", layer=2),
        "schedule": "cosine",
        "evaluate_every": 4,
    }
    for name, value in changed.items():
        with pytest.raises(InputError, match=f"started with {name}="):
            with_a_second_answer(**{**knobs, name: value}, resume=True)


@pytest.mark.parametrize(
    ("auxiliary", "said"),
    [
        (Auxiliary("identity", layer=0), r"auxiliary layer=0, expected 1\.\.2"),
        (Auxiliary("identity", layer=3), "auxiliary layer=3"),
        (Auxiliary("identity", layer=1, weight=float("nan")), "auxiliary weight=nan"),
        (Auxiliary("name", layer=1), "column='name', expected a column of token ids"),
        (Auxiliary("instruction", layer=1), "column='instruction'"),
        (Auxiliary("far", layer=1), "auxiliary answer 1000, expected ids below d_vocab"),
    ],
)
def test_a_second_answer_that_cannot_be_asked_is_an_error(auxiliary, said):
    far = replace(NAMED, rows=NAMED.rows.assign(far=NAMED.rows["task"] + 1000))
    with pytest.raises(InputError, match=said):
        train(native_config("sif-small", **SIZES), far, auxiliary=auxiliary, **KNOBS)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"d_model": 32}, r"'[\w.]+' is \(\d+, 16\), expected"),
        ({"n_layers": 3}, "is missing, expected"),
    ],
)
def test_weights_of_another_model_are_an_error(plain, changed, said):
    config = native_config("sif-small", **{**SIZES, **changed})
    with pytest.raises(InputError, match="start_from does not match the configuration: .*" + said):
        train(config, PROMPTS, start_from=plain.model(), **KNOBS)


# -- kill and resume ----------------------------------------------------------------------

# Forks one training a kill: each kills itself half-way through a given write.
KILLED = """
import os, signal, sys
from pathlib import Path
import tests.lensclust.training.test_training as t

def train_until(folder, write):
    replace, writes = os.replace, 0
    def dying(half, path):
        nonlocal writes
        writes += 1
        if writes == write:
            os.truncate(half, os.path.getsize(half) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(half, path)
    os.replace = dying
    t.short(Path(folder), resume=True)

for write in map(int, sys.argv[2:]):
    child = os.fork()
    if child == 0:
        train_until(f"{sys.argv[1]}/{write}", write)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
print("killed", flush=True)
t.short(Path(sys.argv[1]) / "any", steps=120)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills by signal")
def test_killed_anywhere_and_resumed_it_ends_with_the_same_bits(plain, tmp_path):
    writes = (1, 2, 3, 6, 9)
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), *map(str, writes)],
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "killed\n"
    for write in writes:
        folder = tmp_path / str(write)
        run = short(folder, resume=True)
        assert weights(run) == weights(plain)
        pd.testing.assert_frame_equal(run.frame, plain.frame)
        left = {path.name for path in folder.iterdir()}
        assert left == {"training.state", *(c.path.name for c in run.checkpoints if c.path)}
    # And from outside, whatever it is doing then.
    while not (tmp_path / "any" / "training.state").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert weights(short(tmp_path / "any", resume=True, steps=120)) == weights(short(steps=120))


def test_a_finished_training_resumes_to_itself(plain, tmp_path):
    short(tmp_path)
    again = short(tmp_path, resume=True)
    assert weights(again) == weights(plain)
    pd.testing.assert_frame_equal(again.frame, plain.frame)


@pytest.mark.parametrize("in_memory", [True, False])
def test_checkpoints_that_are_the_same_model_are_reported(in_memory, tmp_path, caplog):
    """Each time, before anyone reads them: a rate too small for float32 moves nothing."""
    out = None if in_memory else tmp_path
    for resume in (False,) if in_memory else (False, True):
        caplog.clear()
        run = short(out, lr=1e-60, resume=resume)
        assert len(set(weights(run).values())) == 1
        (record,) = caplog.records
        others = [f"{c.step} = 0" for c in run.checkpoints[1:]]
        assert record.getMessage().endswith(f"same weights at steps {', '.join(others)}")
    caplog.clear()
    short(None if in_memory else tmp_path / "other")
    assert caplog.records == []


# -- unusable input -----------------------------------------------------------------------


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path):
    short(tmp_path, steps=2)
    with pytest.raises(InputError, match="holds a training: expected another folder or resume"):
        short(tmp_path, steps=2)
    for knob, value in {"lr": 1e-4, "seed": 3, "loss_on": "answer", "batch_size": 9}.items():
        with pytest.raises(InputError, match=f"started with {knob}="):
            short(tmp_path, resume=True, steps=2, **{knob: value})
    config, others = native_config("sif-small", **SIZES), PROMPTS.where(task=[0, 1])
    with pytest.raises(InputError, match="started with trained on="):
        train(config, others, **{**KNOBS, "steps": 2}, out=tmp_path, resume=True)
    (tmp_path / "step-000000.safetensors").unlink()
    with pytest.raises(InputError, match=r"step-000000\.safetensors' is missing"):
        short(tmp_path, resume=True, steps=2)
    (tmp_path / "training.state").write_bytes(b"not a state")
    with pytest.raises(InputError, match="cannot resume from"):
        short(tmp_path, resume=True, steps=2)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        short(tmp_path / "file")


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"steps": 0}, "steps=0, expected at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"n_checkpoints": 1}, "n_checkpoints=1, expected at least 2"),
        ({"save_every": 0}, "save_every=0"),
        ({"lr": 0.0}, "lr=0.0, expected a positive"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"warmup": 1.5}, "warmup=1.5"),
        ({"schedule": "linear"}, "schedule='linear', expected one of"),
        ({"evaluate_every": 0}, "evaluate_every=0, expected at least 1"),
        ({"resume": True}, "expected the folder"),
    ],
)
def test_bad_knobs_are_one_line(knobs, said):
    with pytest.raises(InputError, match=said):
        short(**knobs)


def test_prompts_that_do_not_fit_are_an_error():
    with pytest.raises(InputError, match=r"d_vocab=9, but the prompts need"):
        train(native_config("sif-small", **{**SIZES, "d_vocab": 9}), PROMPTS)
    with pytest.raises(InputError, match=r"n_ctx=4, but the prompts need"):
        train(native_config("sif-small", **{**SIZES, "n_ctx": 4}), PROMPTS)
    with pytest.raises(InputError, match="no row of split 'train'"):
        train(native_config("sif-small", **SIZES), PROMPTS.where(split="both"))
    unanswered = Prompts.from_token_lists([[1]], pd.DataFrame({"task": [0]}))
    with pytest.raises(InputError, match="no answers given"):
        train("sif-small", unanswered)


def test_a_diverged_training_says_so():
    with pytest.raises(RuntimeError, match=r"loss is (nan|inf) at step \d+: expected a smaller lr"):
        short(lr=1e30)

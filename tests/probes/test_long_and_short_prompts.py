"""A long prompt changes what LongRoPE does with a whole forward: not with the prompts beside it.

The oracle is the plain network on one unpadded prompt at a time.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

import lensclust as lc
import probes
from lensclust.inference.answer_scores import answer_scores, score_answers
from lensclust.inference.partial_forwards import scored_logits
from lensclust.models.batching import training_batches
from lensclust.training.temporary import finetuned
from probes.attention.knockout import answers_cut_off
from tests.longrope import VOCABULARY, changing

STEP = 24
# With an answer of two tokens, of which the last is not read, 23 and 24 are on two sides.
LENGTHS = (9, 23, 24, 25, 40, 12)
ALONE: dict[str, Any] = {"batch_tokens": 1}


class Case(NamedTuple):
    plain: Any
    model: Any
    prompts: lc.Prompts
    ids: list[list[int]]
    answers: list[list[int]]


@pytest.fixture(scope="module", params=["qwen2", "gemma3"])
def case(request: pytest.FixtureRequest) -> Case:
    network: PreTrainedModel = changing(request.param, STEP)
    plain = copy.deepcopy(network)
    rng = np.random.default_rng(0)
    ids = [rng.integers(4, VOCABULARY, n).tolist() for n in LENGTHS]
    answers = [rng.integers(4, VOCABULARY, 2).tolist() for _ in LENGTHS]
    spans = {
        "relevant": [(2, 5)] * len(ids),
        "irrelevant": [(6, 8)] * len(ids),
        "query": [(n - 2, n) for n in LENGTHS],
        "label_words": [(3, 5)] * len(ids),
    }
    rows = pd.DataFrame({"task": list("ababab")})
    prompts = lc.Prompts.from_token_lists(ids, rows, answers=answers, spans=spans)
    return Case(plain, lc.load(network), prompts, ids, answers)


def told(plain: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return plain(torch.tensor([ids]), use_cache=False).logits[0]


def answered(case: Case) -> torch.Tensor:
    """Log probability of each token of each answer."""
    each = []
    for ids, (first, second) in zip(case.ids, case.answers, strict=True):
        logits = told(case.plain, [*ids, first]).log_softmax(-1)
        each.append(torch.stack([logits[-2, first], logits[-1, second]]))
    return torch.stack(each)


def test_answers_are_scored_as_alone(case: Case):
    found = answer_scores(case.model, case.prompts).confidence
    assert np.allclose(found, answered(case).sum(1), atol=1e-4)


def test_evaluation_is_that_of_one_prompt_at_a_time(case: Case):
    found = score_answers(
        case.model,
        lambda tokens, asked: scored_logits(case.model, tokens, asked),
        case.prompts,
        0,
        device=torch.device("cpu"),
    )
    assert np.isclose(found[0]["loss"], -float(answered(case).mean()), atol=1e-5)


def test_logits_with_nothing_cut_off_are_the_plain_ones(case: Case):
    hidden = torch.zeros_like(case.prompts.tokens, dtype=torch.bool)
    found = answers_cut_off(case.model, case.prompts, lambda logits, rows: logits, hidden)
    expected = torch.stack([told(case.plain, ids)[-1] for ids in case.ids])
    assert torch.allclose(found, expected, atol=1e-4)


def test_patterns_are_the_plain_ones(case: Case):
    found = probes.sample_attention(case.model, case.prompts, heads="head 0.1")
    for pattern, ids in zip(found.patterns, case.ids, strict=True):
        with torch.no_grad():
            plain = case.plain(torch.tensor([ids]), output_attentions=True, use_cache=False)
        assert np.allclose(pattern[0], plain.attentions[0][0, 1], atol=1e-5)


def test_measures_of_attention_are_those_of_prompts_alone(case: Case):
    def ratio(**options: Any) -> np.ndarray:
        found = probes.attention_ratio(
            case.model, case.prompts, block=None, progress=False, **options
        )
        return found.values.relevant.values

    def flow(**options: Any) -> np.ndarray:
        return probes.label_word_flow(
            case.model, case.prompts, progress=False, **options
        ).values.pq.values

    for measure in (ratio, flow):
        assert np.allclose(measure(), measure(**ALONE), rtol=1e-3, atol=1e-6)


def test_attributions_are_those_of_prompts_alone(case: Case):
    other = lc.Prompts.from_token_lists(
        [ids[::-1] for ids in case.ids], case.prompts.rows, answers=case.answers[::-1]
    )

    def attributed(**options: Any) -> pd.Series:
        found = probes.rank(
            case.model, case.prompts, other, "resid", m=1, progress=False, **options
        )
        return found.frame.set_index("site").attributed.sort_index()

    assert np.allclose(attributed(), attributed(**ALONE), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("budget", [None, 200])
def test_no_training_batch_holds_both(case: Case, budget: int | None):
    _, lengths, _ = case.prompts.with_answers()
    plan = training_batches(case.model, lengths, 4, budget, seed=1)
    seen: list[int] = []
    while len(seen) < len(lengths):
        rows = next(plan)
        long = lengths[rows] - 1 > STEP
        assert bool(long.all()) or not bool(long.any())
        seen += rows.tolist()
    assert sorted(seen) == list(range(len(lengths)))


def test_a_step_of_training_has_the_loss_of_its_prompts_alone(case: Case):
    run = lc.finetune(case.model, case.prompts, steps=2, batch_size=6, seed=3, progress=False)
    _, lengths, _ = case.prompts.with_answers()
    rows = next(training_batches(case.model, lengths, 6, seed=3)).tolist()
    losses = []
    for row in rows:
        logits = told(case.plain, [*case.ids[row], case.answers[row][0]])[-2:]
        losses.append(F.cross_entropy(logits, torch.tensor(case.answers[row])))
    assert np.isclose(run.losses[0], float(torch.stack(losses).mean()), atol=1e-5)


def test_what_pads_all_prompts_to_one_length_refuses_both(case: Case):
    refused = pytest.raises(lc.InputError, match="other frequencies beyond 24 tokens")
    with refused, finetuned(case.model, case.prompts, steps=1):
        pass
    with finetuned(case.model, case.prompts.take([0, 1, 5]), steps=1) as done:
        assert np.isfinite(done.losses[0][0])

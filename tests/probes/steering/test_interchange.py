"""Interchange on situations whose answers are known: counts, controls, donors, refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import lensclust as lc
from lensclust.models.sites import Site
from probes.design.centroids import mean_states
from probes.steering.interchanges import MEMBER, OUTCOMES, interchange
from probes.steering.interventions import Intervention, shift, transport
from tests.tiny import hf_model

SITES = ["resid 2", "resid 5"]
STAY = Intervention("stay", lambda site: lambda states: states)


def stay(source: str, target: str) -> list[Intervention]:
    return [STAY]


def constant(state: torch.Tensor) -> Callable[[str, str], list[Intervention]]:
    """Every state becomes one state, whatever the labels."""
    move = Intervention("constant", lambda site: lambda states: state.expand_as(states))
    return lambda source, target: [move]


@pytest.fixture(scope="module")
def model() -> Any:
    return lc.load("native:sif-small")


@pytest.fixture(scope="module")
def prompts() -> lc.Prompts:
    """Four tasks that share five inputs, 3 prompts each; not every task knows every input."""
    whole = lc.tasks.sif(n_tasks=4, n_inputs=5, mappings_per_task=3, strings_per_regex=6)
    return first_of_each(whole.where(split="train"), 3)


@pytest.fixture(scope="module")
def donors() -> lc.Prompts:
    """One prompt of each task and input."""
    whole = lc.tasks.sif(n_tasks=4, n_inputs=5, mappings_per_task=3, strings_per_regex=6)
    return first_of_each(whole.where(split="new_string"), 1)


def first_of_each(prompts: lc.Prompts, n: int) -> lc.Prompts:
    nth = prompts.rows.groupby(["task", "input"]).cumcount()
    return prompts.take(np.flatnonzero(nth < n))


def own_words(model: Any, prompts: lc.Prompts) -> np.ndarray:
    """The model's most likely next token, each prompt alone."""
    with torch.no_grad():
        return np.array(
            [
                int(model(row[None, :length])[0, -1].argmax())
                for row, length in zip(prompts.tokens, prompts.lengths.tolist(), strict=True)
            ]
        )


def answered(prompts: lc.Prompts, tokens: Sequence[int], **rows: Any) -> lc.Prompts:
    """The same prompts with other answers and labels."""
    return lc.Prompts.from_token_lists(
        [row[:n].tolist() for row, n in zip(prompts.tokens, prompts.lengths, strict=True)],
        prompts.rows.assign(**rows),
        answers=[[int(token)] for token in tokens],
    )


def table_of(prompts: lc.Prompts) -> dict[tuple[str, str], int]:
    assert prompts.answers is not None
    cells = zip(prompts.rows["task"].astype(str), prompts.rows["input"].astype(str), strict=True)
    return {cell: answer[0] for cell, answer in zip(cells, prompts.answers, strict=True)}


def possible_targets(prompts: lc.Prompts) -> list[set[str]]:
    known = table_of(prompts)
    cells = zip(prompts.rows["task"].astype(str), prompts.rows["input"].astype(str), strict=True)
    return [
        {b for b, y in known if b != a and y == x and known[b, y] != known[a, x]} for a, x in cells
    ]


def test_at_the_last_layer_another_member_answers_as_itself(model, prompts, donors):
    found = interchange(
        model, prompts, stay, f"resid {model.cfg.n_layers}", rounds=None, donors=donors
    )
    said = dict(zip(table_of(donors), own_words(model, donors).tolist(), strict=True))
    member = found.answers.values[found.answers.method.values == MEMBER][0]
    inputs = prompts.rows["input"].astype(str).to_numpy()
    checked = 0
    for turn, row in np.argwhere(found.targets.values != "").tolist():
        # One donor has this task and this input, and it is preferred to those with another.
        assert member[turn, row] == said[found.targets.values[turn, row], inputs[row]]
        checked += 1
    assert checked == sum(map(len, possible_targets(prompts)))
    rates = found.frame[(found.frame["method"] == MEMBER) & (found.frame["metric"] == "target")]
    wanted = table_of(prompts)
    expected = {
        (a, b): np.mean([said[b, x] == wanted[b, x] for x in inputs_asked(prompts, a, b)])
        for a, b in zip(rates["source"], rates["target"], strict=True)
    }
    got = {(r.source, r.target): r.value for r in rates.itertuples()}
    assert got == pytest.approx(expected)


def inputs_asked(prompts: lc.Prompts, source: str, target: str) -> list[str]:
    possible = possible_targets(prompts)
    rows = prompts.rows
    return [
        str(x)
        for a, x, names in zip(rows["task"].astype(str), rows["input"], possible, strict=True)
        if a == source and target in names
    ]


def test_a_donor_with_another_input_serves_where_there_is_none_with_the_same(model, prompts):
    whole = lc.tasks.sif(n_tasks=4, n_inputs=5, mappings_per_task=3, strings_per_regex=6)
    everyone = first_of_each(whole.where(split="new_string"), 1)
    few = everyone.take(
        [int(np.flatnonzero(everyone.rows["task"].astype(str) == t)[0]) for t in "0123"]
    )
    said = dict(zip(few.rows["task"].astype(str), own_words(model, few).tolist(), strict=True))
    found = interchange(
        model, prompts, stay, f"resid {model.cfg.n_layers}", rounds=None, donors=few
    )
    member = found.answers.values[found.answers.method.values == MEMBER][0]
    for turn, row in np.argwhere(found.targets.values != "").tolist():
        assert member[turn, row] == said[found.targets.values[turn, row]]


@pytest.mark.parametrize("at", ["answer", "instruction_end"])
def test_moving_nothing_gives_the_unedited_answers(model, prompts, at):
    sites = ["resid 0", "resid 4", "head 1.0"]
    found = interchange(model, prompts, stay, sites, at=at, rounds=2)
    plain = own_words(model, prompts)
    assert found.answers.shape == (len(sites), 2, len(prompts))
    assert (found.answers.values == plain).all()
    assert prompts.answers is not None
    assert found.baseline == (plain == [a[0] for a in prompts.answers]).mean()
    assert (found.frame["position"] == at).all()


def test_every_count_is_that_of_a_loop_over_prompts(model, prompts):
    """All states become one, so all answers are one known token; the answers are dealt."""
    state = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(3))
    site = Site("resid", model.cfg.n_layers)
    with torch.no_grad():
        token = int(model.unembed(model.ln_final(state[None, None])).argmax())
    cells = list(table_of(prompts))
    rng = np.random.default_rng(0)
    dealt = {cell: int(rng.choice([token, token + 1, token + 2])) for cell in cells}
    asked = answered(
        prompts,
        [dealt[t, x] for t, x in prompts.rows[["task", "input"]].astype(str).values.tolist()],
    )
    found = interchange(model, asked, constant(state), site, rounds=None)
    moved = found.targets.values != ""
    assert (found.answers.values[0][moved] == token).all()
    counts: dict[tuple[str, str], list[str]] = {}
    for (a, x), names in zip(
        asked.rows[["task", "input"]].astype(str).values.tolist(),
        possible_targets(asked),
        strict=True,
    ):
        for b in names:
            outcome = (
                "target" if dealt[b, x] == token else "source" if dealt[a, x] == token else "other"
            )
            counts.setdefault((a, b), []).append(outcome)
    assert set(zip(found.frame["source"], found.frame["target"], strict=True)) == set(counts)
    columns = ["source", "target", "metric", "value", "n"]
    for source, target, metric, value, n in found.frame[columns].values.tolist():
        outcomes = counts[source, target]
        assert n == len(outcomes)
        assert value == pytest.approx(outcomes.count(metric) / len(outcomes))


def real_moves(model: Any, prompts: lc.Prompts) -> Callable[[str, str], list[Intervention]]:
    acts = lc.extract(model, prompts, ["resid 1", "resid 3", *SITES], progress=False)
    means, conditional = mean_states(acts), mean_states(acts, given="input")

    def moves(source: str, target: str) -> list[Intervention]:
        return [shift(means, source, target), transport(conditional, source, target)]

    return moves


def test_rates_of_a_pair_are_shares_of_one_whole(model, prompts, donors):
    found = interchange(
        model, prompts, real_moves(model, prompts), SITES, rounds=None, donors=donors
    )
    cells = found.frame.groupby(["site", "method", "source", "target"])
    assert cells["value"].sum().to_numpy() == pytest.approx(1)
    assert all(sorted(metrics) == sorted(OUTCOMES) for _, metrics in cells["metric"])
    assert set(found.frame["method"]) == {"shift", "transport", MEMBER}
    one = found.frame[(found.frame["metric"] == "target") & (found.frame["method"] == "shift")]
    per_site = one.groupby("site")["n"].sum()
    assert (per_site == sum(map(len, possible_targets(prompts)))).all()
    assert len(per_site) == len(SITES)


def test_names_of_tasks_do_not_matter(model, prompts):
    names = {"0": "zulu", "1": "alpha", "2": "mike", "3": "beta"}
    renamed = answered(
        prompts,
        [a[0] for a in prompts.answers or ()],
        task=prompts.rows["task"].astype(str).map(names),
    )
    key = ["site", "method", "source", "target", "metric"]
    frames = []
    for given in (prompts, renamed):
        frame = interchange(model, given, real_moves(model, given), "resid 3", rounds=None).frame
        if given is prompts:
            frame = frame.assign(
                source=frame["source"].map(names), target=frame["target"].map(names)
            )
        frames.append(frame.set_index(key)[["value", "n"]].sort_index())
    pd.testing.assert_frame_equal(frames[0], frames[1])


def test_rounds_give_each_prompt_different_targets_and_all_of_them_in_the_end(model, prompts):
    possible = possible_targets(prompts)
    for rounds in (1, 2, None, 99):
        targets = interchange(model, prompts, stay, "resid 0", rounds=rounds).targets.values
        for row, names in enumerate(possible):
            drawn = [name for name in targets[:, row] if name]
            assert len(drawn) == min(len(names), len(targets))
            assert set(drawn) <= names
            assert len(set(drawn)) == len(drawn)
        if rounds in (None, 99):
            assert len(targets) == max(map(len, possible))


def test_targets_are_drawn_by_seed(model, prompts):
    one, again, other = (
        interchange(model, prompts, stay, "resid 0", seed=seed).targets.values for seed in (1, 1, 2)
    )
    assert (one == again).all()
    assert (one != other).any()


def test_prompts_that_no_task_answers_differently_are_left_out(model, prompts):
    asked = prompts.where(task=[prompts.rows["task"].iloc[0], prompts.rows["task"].iloc[-1]])
    rows = asked.rows.astype(str)
    inputs = sorted(set(rows["input"]))
    # Only the first input tells the tasks apart.
    tokens = (rows["input"] == inputs[0]).astype(int) * rows["task"].astype(int) + 5
    found = interchange(model, answered(asked, tokens), stay, "resid 0", rounds=None)
    movable = (found.targets.values != "").any(0)
    tasks_of = rows.groupby("input")["task"].nunique()
    expected = (rows["input"] == inputs[0]) & (rows["input"].map(tasks_of) > 1)
    assert movable.tolist() == expected.tolist()
    per_method = found.frame[found.frame["metric"] == "target"]["n"].sum()
    assert per_method == expected.sum()


def test_batches_change_nothing(model, prompts, donors):
    frames = [
        interchange(
            model, prompts, real_moves(model, prompts), "resid 3", donors=donors, batch_tokens=size
        ).frame
        for size in (32, 100_000)
    ]
    pd.testing.assert_frame_equal(frames[0], frames[1])


def test_the_model_is_left_as_it_was():
    bridge = lc.load(hf_model("llama"))
    whole = lc.tasks.sif(n_tasks=3, n_inputs=3, mappings_per_task=3, strings_per_regex=4)
    asked = first_of_each(whole.where(split="train"), 2)
    before = lc.fingerprint(bridge)
    acts = lc.extract(bridge, asked, ["resid 1", "head 2.1"], progress=False)
    means = mean_states(acts)
    interchange(
        bridge, asked, lambda a, b: [shift(means, a, b)], ["resid 1", "head 2.1"], donors=asked
    )
    assert lc.fingerprint(bridge) == before
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


def test_results_show_themselves(model, prompts):
    found = interchange(model, prompts, real_moves(model, prompts), SITES)
    best = found.best("shift")
    rows = found.by_site()
    top = rows[rows["method"] == "shift"]["value"].max()
    assert rows.set_index(["site", "method"]).loc[(str(best), "shift"), "value"] == top
    assert "best site of each method: shift" in repr(found)
    assert "<table" in found._repr_html_()
    assert found.plot("other").to_dict()
    with pytest.raises(lc.InputError, match=r"no method 'leap', these .* \['shift', 'transport'\]"):
        found.best("leap")


def one_task(prompts: lc.Prompts) -> lc.Prompts:
    return prompts.where(task=prompts.rows["task"].iloc[0])


def without_answers(prompts: lc.Prompts) -> lc.Prompts:
    return lc.Prompts.from_token_lists(prompts.tokens.tolist(), prompts.rows)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (without_answers, {}, "expected prompts with an answer each"),
        (one_task, {}, "no prompt has another label that answers it differently"),
        (lambda p: answered(p, [5] * len(p)), {}, "no prompt has another label"),
        (lambda p: p, {"by": "mood"}, "no label 'mood': rows have"),
        (lambda p: p, {"given": "mood"}, "no label 'mood': rows have"),
        (lambda p: p, {"at": "nowhere"}, "position 'nowhere' does not exist"),
        (lambda p: p, {"rounds": 0}, "rounds=0, expected at least 1"),
        (lambda p: p, {"rounds": -1}, "rounds=-1, expected at least 1"),
        (lambda p: p, {"answers": {}}, "no prompt has another label"),
        (lambda p: p, {"donors": one_task}, "no donor has task"),
    ],
)
def test_what_cannot_be_exchanged_is_one_clear_line(model, prompts, change, options, message):
    if "donors" in options:
        options = {"donors": options["donors"](prompts), "rounds": None}
    with pytest.raises(lc.InputError, match=message) as caught:
        interchange(model, change(prompts), stay, "resid 1", **options)
    assert "\n" not in str(caught.value)


def test_methods_that_share_a_name_or_differ_between_pairs_are_refused(model, prompts):
    other = Intervention("stay", lambda site: lambda states: states + 1)
    for moves in (
        lambda source, target: [STAY, other],
        lambda source, target: [Intervention(f"to {target}", STAY.edit_at)],
        lambda source, target: [Intervention(MEMBER, STAY.edit_at)],
    ):
        with pytest.raises(lc.InputError, match="names"):
            interchange(model, prompts, moves, "resid 1", donors=prompts)

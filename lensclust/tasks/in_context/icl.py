"""Few-shot prompts from any task set, without instruction."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pandas as pd

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.prompts import Prompts
from lensclust.tasks.in_context.demonstrations import drawn, in_random_order, mismatched
from lensclust.tasks.words import lay_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ARROW = " ->"


@checked_arguments
def icl(
    source: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    *,
    shots: int = 6,
    queries: int | None = None,
    draws: int = 1,
    pool: float = 0.5,
    instruction: bool = False,
    shuffled: bool = False,
    seed: int = 0,
    chat: bool = False,
) -> Prompts:
    """Prompts of ``shots`` lines ``input -> output`` and a query ``input ->`` to complete.

    The inputs of a task are split once into demonstrations and queries. Demonstrations are
    resampled for every query and draw, without replacement. Both steps use one order of all
    inputs, so tasks with the same inputs have the same queries and the same demonstration inputs:
    only the outputs differ.

    Args:
        source: any prompts whose rows have ``task``, ``input`` and ``output``; only the rows
            are read. If an input has several outputs in a task, the first one counts.
        tokenizer: a fast tokenizer (spans need character offsets).
        shots: number of demonstrations in a prompt.
        queries: maximum number of queries of each task; all by default.
        draws: number of sets of demonstrations for each query.
        pool: share of a task's inputs that are kept for demonstrations (at least ``shots``).
        instruction: put each of the task's instructions (source label ``wording``) above the
            demonstrations, one prompt each.
        shuffled: permute the demonstrations' outputs, so that as few as possible keep their own.
            Row by row the prompts have the same queries, demonstration inputs and right answers
            as without shuffling.
        seed: of the split, of the draws and of the shuffles.
        chat: wrap each prompt in the tokenizer's chat template.

    Returns:
        Prompts with rows ``task``, ``instruction`` and ``template`` (those of the source with
        ``instruction``, else ``TASK/few-shot`` and ``few-shot``), ``input`` (the query),
        ``output``, ``split`` (``query``), ``shots``, ``draw``, ``shuffled``, ``demonstrations``
        (the inputs shown, a JSON list); spans ``demonstrations``, ``input`` and, if there is one,
        ``instruction``; and the outputs as answers.

    Raises:
        InputError: if the rows lack a label, a size is out of range, or a task has too few
            inputs for ``shots`` demonstrations and a query.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    >>> rows = pd.DataFrame({"task": "upper", "input": list("abcd"), "output": list("ABCD")})
    >>> source = Prompts.from_token_lists([[0]] * 4, rows)
    >>> print(icl(source, tokenizer, shots=2, queries=1).text(0))
    c -> C
    a -> A
    b ->
    """
    if shots < 1 or draws < 1 or (queries is not None and queries < 1):
        raise InputError(
            f"icl: shots={shots}, draws={draws}, queries={queries}, expected 1 or more of each"
        )
    if shuffled and shots < 2:
        raise InputError(f"icl: shots={shots} with shuffled=True, expected 2 or more")
    if not 0 < pool < 1:
        raise InputError(f"icl: pool={pool}, expected a share between 0 and 1")
    needed = ["task", "input", "output"]
    needed += ["instruction", "template", "wording"] if instruction else []
    missing = [label for label in needed if label not in source.rows]
    if missing:
        raise InputError(f"icl: the source's rows lack {missing}: they have {list(source.rows)}")

    inputs = in_random_order(source.rows["input"], seed)
    rank = {value: place for place, value in enumerate(inputs)}
    rows = pd.DataFrame(
        [
            row
            for task, of_task in source.rows.groupby("task", sort=False)
            for row in _task_rows(
                task,
                of_task,
                rank,
                shots=shots,
                queries=queries,
                draws=draws,
                pool=pool,
                instruction=instruction,
                shuffled=shuffled,
                seed=seed,
            )
        ]
    )
    fields = {
        "demonstrations": rows.pop("shown").tolist(),
        "input": rows["input"].astype(str).tolist(),
    }
    layout = "{demonstrations}\n{input}" + ARROW
    if instruction:
        fields = {"instruction": rows["wording"].tolist(), **fields}
        layout = "{instruction}\n" + layout
    texts, spans = lay_out(layout, fields)
    answers = [f"{'' if chat else ' '}{output}" for output in rows["output"]]
    return Prompts.from_texts(texts, rows, tokenizer, answers=answers, spans=spans, chat=chat)


def _task_rows(
    task: object,
    of_task: pd.DataFrame,
    rank: dict[object, int],
    *,
    shots: int,
    queries: int | None,
    draws: int,
    pool: float,
    instruction: bool,
    shuffled: bool,
    seed: int,
) -> list[dict[str, object]]:
    pairs = of_task.drop_duplicates("input")
    output_of = dict(zip(pairs["input"], pairs["output"], strict=True))
    ordered = sorted(output_of, key=rank.__getitem__)
    n_shown = max(shots, int(pool * len(ordered)))
    if n_shown >= len(ordered):
        raise InputError(
            f"icl: task {task!r} has {len(ordered)} inputs, expected at least {shots + 1} "
            f"for {shots} shots and a query"
        )
    showable, askable = ordered[:n_shown], ordered[n_shown:][:queries]
    if instruction:
        labels = ["instruction", "template", "wording"]
        heads = of_task[labels].drop_duplicates("instruction").to_dict("records")
    else:
        heads = [{"instruction": f"{task}/few-shot", "template": "few-shot"}]
    rows = []
    for head in heads:
        for query in askable:
            for draw in range(draws):
                # Keyed by the query's rank: other tasks and instructions draw the same indices.
                key = {"seed": seed, "query": rank[query], "draw": draw}
                shown = drawn(showable, shots, **key)
                outputs = [str(output_of[x]) for x in shown]
                if shuffled:
                    outputs = mismatched(outputs, **key)
                rows.append(
                    {
                        "task": task,
                        **head,
                        "input": query,
                        "output": output_of[query],
                        "split": "query",
                        "shots": shots,
                        "draw": draw,
                        "shuffled": shuffled,
                        "demonstrations": json.dumps(shown, ensure_ascii=False, default=str),
                        "shown": "\n".join(
                            f"{x}{ARROW} {y}" for x, y in zip(shown, outputs, strict=True)
                        ),
                    }
                )
    return rows

"""The layout on disk becomes prompts; whatever is wrong with it is one line that says where."""

import json
import os
import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import lensclust as lc
from lensclust import InputError
from tests.tiny import byte_tokenizer

REAL = Path(
    os.environ.get("LENSCLUST_INSTRUCTION_INDUCTION")
    or Path(__file__).parents[3].parent / "shared" / "data" / "instruction_induction"
)
real_data = pytest.mark.skipif(
    not (REAL / "execute").is_dir(),
    reason=f"no data in {REAL}: set LENSCLUST_INSTRUCTION_INDUCTION to its folder",
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def _write(folder: Path, task: str, annotations: object, examples: list[dict]) -> None:
    for part, content in {
        "annotations": {"annotations": annotations},
        "execute": {
            "metadata": {"num_examples": len(examples)},
            "examples": {str(n): example for n, example in enumerate(examples, 1)},
        },
    }.items():
        (folder / part).mkdir(exist_ok=True)
        (folder / part / f"{task}.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words = [f"word{i}" for i in range(30)]
    _write(
        tmp_path,
        "shout",
        ["make it loud", " capitals, please "],
        [{"input": w, "output": w.upper()} for w in words],
    )
    _write(
        tmp_path,
        "spell",
        ["spell it"],
        [{"input": w, "output": " ".join(w), "letters": list(w)} for w in reversed(words)],
    )
    _write(
        tmp_path,
        "why",
        ["which came first?"],
        [{"cause": f"It rained {i}.", "effect": f"It got wet {i}."} for i in range(20)],
    )
    _write(
        tmp_path,
        "shared",
        ["what is common?"],
        [
            {"items": ["sun", "lamp"], "concept": "give light", "all": ["give light"]},
            {"items": ["sun", "lamp"], "concept": "are warm"},
        ],
    )
    return tmp_path


def test_each_instruction_over_the_same_inputs(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = lc.tasks.instruction_induction(folder, tokenizer, tasks=["shout"], inputs=5)
    rows = prompts.rows
    assert rows["instruction"].tolist() == ["shout/0"] * 5 + ["shout/1"] * 5
    assert rows["template"].unique().tolist() == ["annotation 0", "annotation 1"]
    assert rows["wording"].unique().tolist() == ["make it loud", "capitals, please"]
    assert rows["input"].tolist()[:5] == rows["input"].tolist()[5:]
    assert (rows["output"] == rows["input"].str.upper()).all()
    word = rows["input"][0]
    assert prompts.text(0) == f"make it loud\nInput: {word}\nOutput:"
    assert prompts.answers is not None
    assert str(tokenizer.decode(list(prompts.answers[0]))) == f" {word.upper()}"


def test_examples_spelled_otherwise(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = lc.tasks.instruction_induction(folder, tokenizer, inputs=None).rows
    shared = rows[rows["task"] == "shared"]
    assert shared[["input", "output"]].to_numpy().tolist() == [["sun, lamp", "give light"]]
    firsts = set()
    for row in rows[rows["task"] == "why"].itertuples():
        one, two = re.fullmatch(r"Sentence 1: (.*) Sentence 2: (.*)", str(row.input)).groups()  # type: ignore[union-attr]
        assert row.output in (one, two)
        assert str(row.output).startswith("It rained")
        firsts.add(one == row.output)
    assert firsts == {True, False}, "the cause comes first in some and second in others"


def test_tasks_over_the_same_words_get_the_same_sample(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def sample(seed: int) -> dict[str, set[str]]:
        prompts = lc.tasks.instruction_induction(folder, tokenizer, inputs=6, seed=seed)
        return {str(t): set(rows["input"]) for t, rows in prompts.rows.groupby("task")}

    first = sample(0)
    assert len(first["shout"]) == 6
    assert first["shout"] == first["spell"]
    assert first == sample(0)
    assert first["shout"] != sample(1)["shout"]


def test_caps(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = lc.tasks.instruction_induction(folder, tokenizer, instructions=1, inputs=3)
    counts = prompts.rows.groupby("task").size()
    assert counts.to_dict() == {"shared": 1, "shout": 3, "spell": 3, "why": 3}


@pytest.mark.parametrize("chat", [False, True])
def test_spans(folder: Path, tokenizer: PreTrainedTokenizerFast, chat: bool) -> None:
    prompts = lc.tasks.instruction_induction(folder, tokenizer, chat=chat)
    assert prompts.spans is not None
    for name, label in {"instruction": "wording", "input": "input"}.items():
        texts = [
            tokenizer.decode(ids[start:stop])
            for ids, (start, stop) in zip(prompts.tokens, prompts.spans[name].tolist(), strict=True)
        ]
        assert texts == prompts.rows[label].tolist()


def test_few_shot_prompts_from_it(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = lc.tasks.instruction_induction(
        folder, tokenizer, tasks=["shout", "spell"], inputs=None
    )
    prompts = lc.tasks.icl(source, tokenizer, shots=3, queries=4, instruction=True)
    assert prompts.rows.groupby("instruction").size().to_dict() == {
        "shout/0": 4,
        "shout/1": 4,
        "spell/0": 4,
    }


def _broken(folder: Path, fault: str) -> None:
    path = folder / "execute" / "shout.json"
    if fault == "no folder":
        path = folder / "annotations"
        path.rename(folder / "elsewhere")
    elif fault == "no execute":
        path.unlink()
    elif fault == "no annotations":
        (folder / "annotations" / "shout.json").unlink()
    elif fault == "malformed":
        path.write_text('{\n "examples": {\n  "1": {"input": "a",,}\n}}', encoding="utf-8")
    elif fault == "latin-1":
        path.write_bytes('{"examples": "é"}'.encode("latin-1"))
    elif fault == "a list":
        path.write_text("[1, 2]", encoding="utf-8")
    elif fault == "no examples":
        path.write_text('{"examples": {}}', encoding="utf-8")
    elif fault == "a number":
        path.write_text('{"examples": {"7": {"input": 3, "output": "x"}}}', encoding="utf-8")
    elif fault == "not an example":
        path.write_text('{"examples": {"7": "x"}}', encoding="utf-8")
    elif fault == "no sentence":
        (folder / "annotations" / "shout.json").write_text('{"annotations": []}', "utf-8")
    elif fault == "one sentence":
        (folder / "annotations" / "shout.json").write_text('{"annotations": "a"}', "utf-8")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no folder", "annotations', expected annotations/TASK.json and execute/TASK.json"),
        ("no execute", "has annotations/shout.json but no execute/shout.json"),
        ("no annotations", "has execute/shout.json but no annotations/shout.json"),
        ("malformed", "shout.json is not readable JSON: line 3, column 2"),
        ("latin-1", "shout.json is not readable JSON: not UTF-8"),
        ("a list", "execute/shout.json: expected an object"),
        ("no examples", 'execute/shout.json: expected "examples"'),
        ("a number", 'execute/shout.json: expected texts "input" and "output" in example \'7\''),
        ("not an example", "in example '7'"),
        ("no sentence", "annotations/shout.json: expected at least one"),
        ("one sentence", 'annotations/shout.json: expected "annotations": a list of texts'),
    ],
)
def test_a_faulty_folder_is_one_line(
    folder: Path, tokenizer: PreTrainedTokenizerFast, fault: str, message: str
) -> None:
    _broken(folder, fault)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        lc.tasks.instruction_induction(folder, tokenizer)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["whisper"]}, "no task 'whisper'"),
        ({"inputs": 0}, "inputs=0, expected 1 or more"),
        ({"instructions": 0}, "instructions=0, expected 1 or more"),
    ],
)
def test_unusable_options(
    folder: Path, tokenizer: PreTrainedTokenizerFast, options: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        lc.tasks.instruction_induction(folder, tokenizer, **options)


@real_data
def test_the_real_folder(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = lc.tasks.instruction_induction(REAL, tokenizer, inputs=2)
    rows = prompts.rows
    written = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))["annotations"]
        for path in (REAL / "annotations").glob("*.json")
    }
    assert rows.groupby("task")["instruction"].nunique().to_dict() == {
        task: len(wordings) for task, wordings in written.items()
    }
    assert rows.groupby("instruction").size().eq(2).all()
    plural = rows[rows["task"] == "singular_to_plural"]
    examples = json.loads((REAL / "execute" / "singular_to_plural.json").read_text("utf-8"))
    truth = {e["input"]: e["output"] for e in examples["examples"].values()}
    assert [truth[x] for x in plural["input"]] == plural["output"].tolist()
    # The tasks about letters are over the same 100 words.
    letters = rows[rows["task"].isin(["first_word_letter", "second_word_letter", "letters_list"])]
    assert letters["input"].nunique() == 2

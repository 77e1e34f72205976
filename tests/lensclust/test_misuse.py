"""What is no model or no prompts, given to every function that takes both.

In a process without runtime type checks, which would answer in the functions' place.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import contextlib, sys, warnings
warnings.filterwarnings("ignore")
import numpy as np, pandas as pd, torch
from peft import LoraConfig, get_peft_model
import lensclust as lc, probes
from lensclust.inference.readouts import answers
from tests.tiny import hf_model, tiny_tokenizer

network, model = hf_model("llama"), lc.load(hf_model("llama"))
rows = pd.DataFrame({"task": list("ab"), "input": list("xy")})
prompts = lc.Prompts.from_token_lists([[5, 6, 7], [8, 9, 3]], rows, answers=[[5], [6]])
tuned = get_peft_model(hf_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
acts = lc.extract(model, prompts, "resid", progress=False)
four = lc.Prompts.from_token_lists(
    [[5, 6, 7], [8, 9, 3], [4, 4, 7], [6, 9, 5]], {"task": list("abab"), "input": list("xxyy")}
)
answered = lc.Prompts.from_token_lists(
    [[5, 6, 7], [8, 9, 3]], {"task": list("ab"), "input": list("xx")}, answers=[5, 6]
)
six = lc.Prompts.from_token_lists(
    [[5 + i, 6, 7] for i in range(6)], {"task": list("ababab")}, answers=[5] * 6
)
acts4 = lc.extract(model, four, "resid", progress=False)
move = probes.shift(probes.mean_states(acts), "a", "b")

def steer(model, prompts):
    with probes.steer(model, move, at="resid 1"):
        lc.extract(model, prompts, "resid", progress=False)

def half(dtype):
    options = {"dtype": dtype, "progress": False}
    assert lc.extract(model, prompts, "resid", **options).resid.dtype == "f2"
    assert lc.pooled(model, prompts, "resid", span="prompt", **options).resid.dtype == "f2"

def padded(pad_id):
    return lc.Prompts.from_token_lists([[1]], rows[:1], pad_id=pad_id)

def narrow():
    small = lc.load("native:sif-small")
    with probes.steer(small, move, at="resid 1", positions="all"):
        small(torch.tensor([[1, 2]]))

def inside(call):
    with probes.steer(model, move, at="resid 1", positions=[1, 2, 1, 2, 1, 2]):
        return call()

def made_inside():
    with torch.inference_mode():
        inside = lc.load(hf_model("llama"))
    probes.rank(inside, prompts, prompts, "resid")

quick = {"permutations": 2, "progress": False}
sweep = probes.probe(acts4, groups=None, control=None, folds=2, jobs=1, **quick)
speaking = lc.load(hf_model("llama"), tokenizer=tiny_tokenizer(sys.argv[1]))
calls = {
    "extract": lambda m, p: lc.extract(m, p, "resid", progress=False),
    "pooled": lambda m, p: lc.pooled(m, p, "resid", span="input"),
    "plan_prefixes": lc.plan_prefixes,
    "finetune": lambda m, p: lc.finetune(m, p, steps=1, progress=False),
    "answers": lambda m, p: answers(m, p, lambda logits, rows: logits),
    "patch": lambda m, p: probes.patch(m, p, p, "resid", progress=False),
    "rank": lambda m, p: probes.rank(m, p, p, "resid", progress=False),
    "interchange": lambda m, p: probes.interchange(m, p, move, "resid"),
    "function_vector": lambda m, p: probes.function_vector(m, p, p),
    "decompose": lambda m, p: probes.decompose(m, p, {"a": 5, "b": 6}, progress=False),
    "head_activation": lambda m, p: probes.head_activation(m, p, progress=False),
    "attention_ratio": lambda m, p: probes.attention_ratio(m, p, progress=False),
    "sample_attention": probes.sample_attention,
    "label_word_flow": probes.label_word_flow,
    "steer": steer,
}
mistakes = {
    "a bare LlamaForCausalLM": (network, prompts),
    "a bare PeftModel": (tuned, prompts),
    "Prompts given as model": (prompts, model),
    "'gpt2' given as model": ("gpt2", prompts),
    "NoneType given as model": (None, prompts),
    "given a str as ": (model, "some text"),
    "given a list as ": (model, ["one", "two"]),
    "given a Tensor as ": (model, torch.tensor([[5, 6]])),
    "given a TransformerBridge as ": (model, model),
}
sources = {
    "NoneType given": None,
    "merge_and_unload": tuned,
    "from_config": network.config,
    "Linear given": torch.nn.Linear(2, 2),
    "a tokenizer": tiny_tokenizer(sys.argv[1]),
    "Prompts given": prompts,
    "int given": 3,
}
others = {
    "'sif-small'": lambda: lc.train(network, prompts, steps=1),
    "by=['task'], expected one text": lambda: probes.cluster(acts, by=["task"]),
    "given=3, expected one text": lambda: probes.silhouettes(acts, given=3),
    "nuisance=3, expected a list of texts or a dictionary": lambda: probes.rsa(
        acts, "task", nuisance=3
    ),
    "how=None, expected one text or a list of texts": lambda: lc.pooled(
        model, prompts, "resid", span="input", how=None
    ),
    "at=None, expected one text": lambda: lc.plan_prefixes(model, prompts, at=None),
    "choices=None, expected label -> its token": lambda: probes.decompose(model, prompts, None),
    "labels ['yes'] given, expected two": lambda: probes.decompose(model, prompts, "yes"),
    "metric=None, expected one text or a function": lambda: probes.patch(
        model, prompts, prompts, "resid", metric=None
    ),
    "shard=None, expected a whole number": lambda: lc.extract(model, prompts, "resid", shard=None),
    "seed='x', expected a whole number": lambda: probes.cluster(acts, seed="x"),
    "kinds=3, expected one text or a list": lambda: probes.cluster(acts, kinds=3),
    "name=None, expected one text": lambda: prompts.position(None),
    "strength='2', expected a number": lambda: move.scaled("2"),
    "lr='1e-3', expected a number": lambda: lc.finetune(model, prompts, lr="1e-3"),
    "given a NoneType as shuffled": lambda: probes.function_vector(model, prompts, None),
    "Intervention given as moves": lambda: probes.interchange(model, prompts, move, "resid"),
    "Prompts given as rows": lambda: probes.hypothesis(prompts, "task"),
    "given a Dataset as prompts": lambda: probes.bag_of_tokens(acts),
    "Prompts given as acts": lambda: probes.with_nuisances(prompts, acts),
    "Prompts given as acts, expected activations": lambda: probes.cluster_map(prompts),
    "Dataset given as components": lambda: probes.calibrate(acts),
    "ComponentLogits given as candidates": lambda: probes.select_prompt(
        probes.decompose(model, prompts, {"a": 5, "b": 6}, label=None, progress=False)
    ),
    "a bare LlamaForCausalLM given as model": lambda: lc.head_residual(acts, network),
    "model='a name', expected a model": lambda: lc.fingerprint("a name"),
    "str given as curves": lambda: probes.change_points("some"),
    "TransformerBridge given as tokenizer": lambda: lc.Prompts.from_texts(["a"], rows, model),
    "given as folder, expected one text or a path": lambda: lc.tasks.instruction_induction(
        tiny_tokenizer(sys.argv[1]), "folder"
    ),
    "use Site.parse('resid 5')": lambda: lc.Site("resid 5"),
    "pad_id=-100, expected an id": lambda: padded(-100),
    "pad_id=True, expected a whole": lambda: padded(True),
    "expected the label first: direction('b', 'resid 1')": lambda: sweep.direction("resid 1", "b"),
    "'zebra', which is not in the vocabulary": lambda: probes.decompose(
        speaking, prompts, ["w1", "zebra"], label=None
    ),
    "cannot change states of 64 numbers": narrow,
    "were made inside torch.inference_mode": made_inside,
    "k='3', expected a whole number": lambda: probes.cluster(acts, k="3"),
    "expected mean states": lambda: probes.shift(acts, "a", "b"),
    "metric, expected one text or a function of logits (row, vocab)": lambda: probes.patch(
        model, prompts, prompts, "resid", metric=lambda logits: logits[:, 0], progress=False
    ),
    "function given as loss, expected one text or a function of logits": lambda: (
        probes.head_activation(model, prompts, loss=lambda a, b, c: a, progress=False)
    ),
    "function given as readout, expected a function of logits": lambda: answers(
        model, prompts, lambda: None
    ),
    "gave NoneType for 2 prompts, expected a tensor": lambda: probes.patch(
        model, prompts, prompts, "resid", metric=lambda logits, rows: None, progress=False
    ),
    "logits gave NoneType for 2 prompts": lambda: probes.rank(
        model, prompts, prompts, "resid", metric=lambda logits, rows: None, progress=False
    ),
    "prompts is float, expected one number each": lambda: probes.head_activation(
        model, prompts, loss=lambda logits, rows: 0.5, progress=False
    ),
    "function given as moves, expected a function of source and target": lambda: (
        probes.interchange(model, four, lambda pair: [move], "resid", progress=False)
    ),
    "moves gave NoneType, expected an intervention or a list": lambda: probes.interchange(
        model, answered, lambda a, b: None, "resid", progress=False
    ),
    "moves gave str, expected an intervention or a list": lambda: probes.interchange(
        model, answered, lambda a, b: [move, "shift"], "resid", progress=False
    ),
    "make gave NoneType, expected an intervention": lambda: probes.tune(
        model, prompts, lambda site, strength: None, "resid 1", wanted=[5, 6], progress=False
    ),
    "label 'x' of prompt 1 is ['b'], expected one text or number": lambda: (
        lc.Prompts.from_token_lists([[1], [2]], [{"x": "a"}, {"x": ["b"]}])
    ),
    "label 'x' of prompt 0 is {1}, expected one text or number": lambda: lc.Prompts.from_texts(
        ["w1", "w2"], {"x": [{1}, {2}]}, tiny_tokenizer(sys.argv[1])
    ),
    "mask or row numbers go to take(mask)": lambda: prompts.where(prompts.rows.task == "a"),
    "input: a function given, expected one label": lambda: prompts.where(
        input=lambda label: label == "x"
    ),
    "make them with mean_states(acts, given='input')": lambda: probes.transport(
        probes.mean_states(acts4), "a", "b"
    ),
    "6 positions given, but a batch of 2 was run: a function that batches by itself "
    "needs one index for all rows, or 'all'": lambda: inside(
        lambda: probes.head_activation(model, six, progress=False)
    ),
    "dtype 'int8' is not known": lambda: lc.extract(model, prompts, "resid", dtype=torch.int8),
    "store: int given": lambda: lc.extract(model, prompts, "resid", store=3),
    "store: TransformerBridge given": lambda: lc.open_activations(model),
    "hypothesis: name=3, expected one text": lambda: probes.rsa(acts4, {3}, **quick),
    "Series given as kinds": lambda: probes.cluster(acts4, kinds=pd.Series([1, 2])),
    "ndarray given as groups": lambda: probes.probe(acts4, groups=np.ones(4)),
    "dict_values given as the vector for resid 1": lambda: probes.add_direction(
        {"resid 1": {"x": 1.0}.values()}
    ),
    "DataFrame given as vectors, expected numbers": lambda: probes.add_direction(rows),
    "generator given as wanted": lambda: probes.tune(
        model, prompts, move, "resid 1", wanted=(each for each in (5, 6))
    ),
    "a series with a list, expected pairs": lambda: probes.change(iter([[1, 2, 3]])),
    "a series with a Dataset, expected pairs of a step": lambda: probes.cluster_map(iter([acts4])),
    "str given as the change": lambda: probes.compose("some", [np.ones((3, 2))]),
    "Prompts given as basis": lambda: probes.compose(np.ones((3, 2)), prompts),
    "hold 'resid' as complex64": lambda: probes.cka(
        acts4.assign(resid=acts4.resid.astype("c8")), acts4
    ),
    "hold 'resid' as <U32": lambda: probes.silhouettes(
        acts4.assign(resid=acts4.resid.astype("U32"))
    ),
    "texts 1 is 3, expected a text": lambda: lc.Prompts.from_texts(
        ["a", 3], rows, tiny_tokenizer(sys.argv[1])
    ),
}
for name, call in calls.items():
    for expected, given in mistakes.items():
        try:
            call(*given)
        except lc.InputError as error:
            said = str(error)
            if "\\n" in said or expected not in said:
                print(name, "|", expected, "|", said)
        else:
            print(name, "|", expected, "| took it")
others |= {expected: lambda source=source: lc.load(source) for expected, source in sources.items()}
for expected, call in others.items():
    try:
        call()
    except lc.InputError as error:
        if "\\n" in str(error) or expected not in str(error):
            print(expected, "|", error)
    else:
        print(expected, "| took it")
for tokenizer in (3, sys.argv[1] + "/nowhere"):
    with contextlib.suppress(lc.InputError):
        lc.load(network, tokenizer=tokenizer)
        print("load | tokenizer", tokenizer, "| took it")
for name, taken in {
    "score_against": lambda: probes.cluster(acts4, given=None, score_against=None, jobs=1, **quick),
    "one label": lambda: probes.cluster(acts4, given=None, score_against="input", jobs=1, **quick),
    "apart": lambda: probes.nearest_neighbour(acts4, apart=None, **quick),
    "nuisance": lambda: probes.rsa(acts4, "task", nuisance=None, **quick),
    "penalties": lambda: probes.probe(
        acts4, groups=None, control=None, folds=2, penalties=0.1, jobs=1, **quick
    ),
    "strengths": lambda: probes.tune(
        model, prompts, move, "resid 1", 1.0, wanted=[5, 6], progress=False
    ),
    "curves": lambda: probes.change_points([1, 2, 3, 8, 9, 10.0]),
    "pad_id": lambda: padded(None),
    "one intervention": lambda: probes.interchange(
        model, answered, lambda a, b: probes.shift(probes.mean_states(acts), a, b), "resid",
        progress=False,
    ).best("shift"),
    "torch dtype": lambda: half(torch.float16),
    "numpy dtype": lambda: half(np.dtype("float16")),
    "numpy type": lambda: half(np.float16),
}.items():
    try:
        taken()
    except Exception as error:
        print(name, "|", type(error), error)
assert lc.load(network, tokenizer=sys.argv[1]).to_tokens("w1").tolist() == [[5]]
print("done")
"""


def test_every_mistake_is_answered_in_one_line(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "done\n", done.stdout + done.stderr[-2000:]

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
import pandas as pd, torch
from peft import LoraConfig, get_peft_model
import lensclust as lc, probes
from lensclust.readouts import answers
from tests.tiny import hf_model, tiny_tokenizer

network, model = hf_model("llama"), lc.load(hf_model("llama"))
rows = pd.DataFrame({"task": list("ab"), "input": list("xy")})
prompts = lc.Prompts.from_token_lists([[5, 6, 7], [8, 9, 3]], rows, answers=[[5], [6]])
tuned = get_peft_model(hf_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
acts = lc.extract(model, prompts, "resid", progress=False)
move = probes.shift(probes.mean_states(acts), "a", "b")

def steer(model, prompts):
    with probes.steer(model, move, at="resid 1"):
        lc.extract(model, prompts, "resid", progress=False)

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
    "a str as prompts": (model, "some text"),
    "a list as prompts": (model, ["one", "two"]),
    "a Tensor as prompts": (model, torch.tensor([[5, 6]])),
    "a TransformerBridge as prompts": (model, model),
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
    "by=['task'], expected the name": lambda: probes.cluster(acts, by=["task"]),
    "given=3, expected the name": lambda: probes.silhouettes(acts, given=3),
    "k='3', expected a whole number": lambda: probes.cluster(acts, k="3"),
    "expected mean states": lambda: probes.shift(acts, "a", "b"),
    "store: int given": lambda: lc.extract(model, prompts, "resid", store=3),
    "store: TransformerBridge given": lambda: lc.open_activations(model),
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

"""Every source of a model against the Hugging Face forward pass, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.model_bridge.sources.native import NativeModel
from transformers import AutoTokenizer, PreTrainedModel

from lensclust.errors import InputError
from lensclust.models.checkpoints import fingerprint, save_checkpoint
from lensclust.models.loading import load
from lensclust.models.native import native_config
from lensclust.prompts.prompts import Prompts
from tests.tiny import ARCHITECTURES, D_VOCAB, N_LAYERS, WORDS, hf_model, tiny_tokenizer

TOKENS = torch.randint(4, D_VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
CHAT = (
    "{% for m in messages %}<bos> {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}w0{% endif %}"
)


def saved(name: str, folder: Path, **tokenizer: Any) -> PreTrainedModel:
    model = hf_model(name)
    model.save_pretrained(folder)
    if tokenizer.pop("tokenizer", False):
        tiny_tokenizer(folder, **tokenizer)
    return model


def generated(model: TransformerBridge, text: str) -> tuple[str, list[list[int]]]:
    """One greedy token after a text, and the ids that the model was given."""
    result: Any = model.generate(
        text, max_new_tokens=1, do_sample=False, return_input_tokens=True, verbose=False
    )
    return result[0], result[1].tolist()


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """A Llama in llama.cpp's layout: rotary dimensions interleaved, its own tensor names."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = [*WORDS[:4], "w", *"abcdefghij", *(f"w{letter}" for letter in "abcdefghij")]
    tokens += [f"<unused{i}>" for i in range(D_VOCAB - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_merges([f"w {letter}" for letter in "abcdefghij"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        value = tensor.numpy()
        if n_heads := heads.get(stem.rpartition(".")[2]):
            halves = value.reshape(n_heads, 2, -1, value.shape[-1])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


# -- the sources ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_directory_and_memory_agree_with_hugging_face(name: str, tmp_path: Path) -> None:
    hf = saved(name, tmp_path, tokenizer=name != "qwen2")
    expected = hf(TOKENS).logits
    from_disk, in_memory = load(tmp_path, device="cpu"), load(hf)
    for model in (from_disk, in_memory):
        assert not model.training
        assert not model.original_model.training
        torch.testing.assert_close(model(TOKENS), expected, atol=3e-6, rtol=0)
        _, cache = model.run_with_cache(TOKENS)
        patterns = [key for key in cache if key.endswith("hook_pattern")]
        assert len(patterns) == N_LAYERS
    assert fingerprint(from_disk) == fingerprint(in_memory)


def test_memory_model_that_came_with_sdpa_shows_its_patterns() -> None:
    hf = hf_model("opt")
    hf.set_attn_implementation("sdpa")
    _, cache = load(hf).run_with_cache(TOKENS)
    assert cache["blocks.0.attn.hook_pattern"].shape == (2, 4, 9, 9)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_directory_without_tokenizer_is_loaded_without(name: str, tmp_path: Path) -> None:
    hf = saved(name, tmp_path)
    model = load(str(tmp_path))
    assert model.tokenizer is None
    assert torch.equal(model(TOKENS).argmax(-1), hf(TOKENS).logits.argmax(-1))


def test_incomplete_tokenizer_files_count_as_none(tmp_path: Path) -> None:
    saved("gpt2", tmp_path, tokenizer=True)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load(tmp_path).tokenizer is None


def test_gguf(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hf = hf_model("llama")
    write_gguf(hf, tmp_path / "tiny.gguf")
    capfd.readouterr()
    model = load(tmp_path / "tiny.gguf", device="cpu")
    assert capfd.readouterr().err == ""
    torch.testing.assert_close(model(TOKENS), hf(TOKENS).logits, atol=3e-6, rtol=0)
    assert model.tokenizer.convert_ids_to_tokens(model.tokenizer("wc").input_ids) == ["wc"]


def test_native_preset_configuration_and_bare_module_are_one_model() -> None:
    preset = load("native:sif-small", seed=3, device="cpu")
    tokens = TOKENS % 60
    config = native_config("sif-small", seed=3)
    fields = {k: v for k, v in config.to_dict().items() if k != "split_attention_weights"}
    for source in (config, fields):
        assert torch.equal(load(source, device="cpu")(tokens), preset(tokens))
    bare = NativeModel(native_config("sif-small", seed=5))
    expected = bare(tokens)
    # Not bit for bit: the bridge gives the unembedding a bias of zeros.
    torch.testing.assert_close(load(bare)(tokens), expected, atol=3e-6, rtol=0)
    assert (preset.cfg.n_layers, preset.cfg.n_heads, preset.cfg.d_model) == (6, 4, 64)
    assert fingerprint(preset) != fingerprint(load("native:sif-small", seed=4))


def test_native_config_without_seed_uses_the_one_given() -> None:
    config = native_config("sif-small")
    assert fingerprint(load(config, seed=1)) == fingerprint(load("native:sif-small", seed=1))


def test_checkpoint_source(tmp_path: Path) -> None:
    model = load("native:sif-small", seed=2, device="cpu")
    path = save_checkpoint(model, tmp_path / "0.safetensors", step=0)
    again = load(path, device="cpu")
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert not again.training


def test_bridge_passes_through() -> None:
    model = load("native:sif-small", device="cpu").train()
    assert load(model) is model
    assert not model.training
    load(model, dtype=torch.float64)
    assert next(model.parameters()).dtype == torch.float64


def test_dtype_and_device(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    model = load(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.cfg.dtype == torch.bfloat16
    assert load("native:sif-small", dtype=torch.float64).cfg.dtype == torch.float64


# -- random weights ---------------------------------------------------------------------------


def test_random_weights_keep_the_architecture_and_the_global_generator(tmp_path: Path) -> None:
    saved("gemma2", tmp_path / "hf", tokenizer=True)
    write_gguf(hf_model("llama"), tmp_path / "tiny.gguf")
    native = load("native:sif-small", seed=9)
    checkpoint = save_checkpoint(native, tmp_path / "c.safetensors")
    sources = [tmp_path / "hf", tmp_path / "tiny.gguf", checkpoint, native_config("sif-small")]
    for source in [*sources, "native:sif-small"]:
        state = torch.get_rng_state()
        trained = load(source, seed=7)
        one, same = (load(source, random_weights=True, seed=0) for _ in range(2))
        other = load(source, random_weights=True, seed=1)
        assert torch.equal(torch.get_rng_state(), state)
        prints = [fingerprint(model) for model in (trained, one, same, other)]
        assert prints[1] == prints[2]
        assert len(set(prints)) == 3
        shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (trained, one)]
        assert shapes[0] == shapes[1]
        assert (one.tokenizer is None) == (trained.tokenizer is None)


def test_random_copy_of_a_model_in_memory_leaves_it_alone() -> None:
    hf = hf_model("llama")
    before = fingerprint(hf)
    twin = load(hf, random_weights=True)
    assert fingerprint(hf) == before
    assert twin.original_model is not hf


def test_random_weights_need_no_weight_file(tmp_path: Path) -> None:
    hf_model("llama").config.save_pretrained(tmp_path)
    assert load(tmp_path, random_weights=True, device="cpu")(TOKENS).shape == (2, 9, D_VOCAB)


# -- text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_text_becomes_the_ids_of_the_tokenizer(
    tmp_path: Path, adds_bos: bool, pad: bool, given: bool
) -> None:
    saved("llama", tmp_path / "model", tokenizer=not given, adds_bos=adds_bos, pad=pad)
    own = tiny_tokenizer(tmp_path / "own", adds_bos=adds_bos, pad=pad)
    model = load(tmp_path / "model", tokenizer=own if given else None, device="cpu")
    assert own.pad_token == ("<pad>" if pad else None), "the caller's tokenizer was changed"
    texts = ["w3 w4 w5", "w6"]
    prompts = Prompts.from_texts(texts, pd.DataFrame({"task": texts}), model.tokenizer)
    for row, text in enumerate(texts):
        expected = [1] * adds_bos + [WORDS.index(word) for word in text.split()]
        ids = prompts.tokens[row, : prompts.lengths[row]].tolist()
        assert ids == expected
        assert model.to_tokens(prompts.text(row)).tolist() == [ids]
        assert torch.equal(
            model(prompts.text(row)), model(torch.tensor([ids]), return_type="logits")
        )
        assert generated(model, prompts.text(row))[1] == [ids]
    asked = model.to_tokens("w3", prepend_bos=True)
    assert asked.tolist() == [[1, WORDS.index("w3")]]


def test_chat_text_that_spells_its_bos(tmp_path: Path) -> None:
    saved("llama", tmp_path, tokenizer=True)
    model = load(tmp_path, device="cpu")
    model.tokenizer.chat_template = CHAT
    rows = pd.DataFrame({"task": ["t"]})
    prompts = Prompts.from_texts(["w3"], rows, model.tokenizer, chat=True)
    assert prompts.tokens[0].tolist() == [1, 7, 2, 4]
    assert model.to_tokens(prompts.text(0)).tolist() == prompts.tokens.tolist()


def test_tokenizer_can_be_replaced_on_a_bridge(tmp_path: Path) -> None:
    model = load(hf_model("llama"), tokenizer=tiny_tokenizer(tmp_path / "a"))
    load(model, tokenizer=tiny_tokenizer(tmp_path / "b", adds_bos=True))
    assert model.to_tokens("w0").tolist() == [[1, 4]]
    assert model.cfg.d_vocab == D_VOCAB


# -- refusals ---------------------------------------------------------------------------------


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_refuses_what_does_not_exist(offline: None, tmp_path: Path) -> None:
    assert "native:sif-small" in refusal("/no/such/model")
    assert "does not exist" in refusal(tmp_path / "nothing")
    assert "does not exist" in refusal("runs/missing.safetensors")
    assert "nobody/nothing" in refusal("nobody/nothing")
    assert "smollm2-135m-instruct" in refusal("smollm2-135m")
    assert "sif-small" in refusal("native:gigantic")


def test_refuses_directories_that_hold_no_model(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path)
    hf_model("llama").config.save_pretrained(tmp_path)
    assert "holds no weights" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half a file")
    assert str(tmp_path) in refusal(tmp_path)


def test_refuses_weights_that_are_incomplete(tmp_path: Path) -> None:
    """transformers would fill them in at random, with a warning."""
    hf = hf_model("llama")
    kept = {k: v for k, v in hf.state_dict().items() if "layers.1.mlp.up" not in k}
    hf.save_pretrained(tmp_path, state_dict=kept)
    assert "model.layers.1.mlp.up_proj.weight" in refusal(tmp_path)


def test_refuses_unknown_architectures_and_foreign_code(tmp_path: Path) -> None:
    config = {"model_type": "nothing-known", "architectures": ["NothingForCausalLM"]}
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "nothing-known" in refusal(tmp_path)
    code = {**config, "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(code))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert str(tmp_path) in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_refuses_damaged_and_foreign_checkpoints(tmp_path: Path) -> None:
    hf_model("llama").save_pretrained(tmp_path)
    assert "not a lensclust checkpoint" in refusal(tmp_path / "model.safetensors")
    model = load("native:sif-small")
    path = save_checkpoint(model, tmp_path / "whole.safetensors")
    half = tmp_path / "half.safetensors"
    half.write_bytes(path.read_bytes()[:-100])
    assert "half.safetensors" in refusal(half)


def test_refuses_what_is_inside_a_bridge_and_a_random_bridge() -> None:
    bridge = load(hf_model("llama"))
    assert "already inside a bridge" in refusal(bridge.original_model)
    by_hand = hf_model("gpt2")
    build_bridge_from_module(by_hand, "GPT2LMHeadModel", hf_config=by_hand.config)
    assert "already inside a bridge" in refusal(by_hand)
    assert "random_weights" in refusal(bridge, random_weights=True)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [({"d_modle": 3}, "d_model"), ({"parallel_attn_mlp": True}, "attn_only")],
)
def test_native_config_refuses_fields_the_native_model_does_not_read(
    overrides: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        native_config("sif-small", **overrides)


def test_native_config_derives_sizes_that_were_not_given() -> None:
    config = native_config("sif-small", d_model=32, d_vocab=97, n_ctx=40, seed=3)
    assert isinstance(config, TransformerBridgeConfig)
    assert (config.d_head, config.d_mlp, config.d_vocab, config.n_ctx) == (8, 128, 97, 40)
    assert native_config("sif-small", d_model=32, d_head=4).d_head == 4


def test_native_sources_refuse_impossible_values() -> None:
    with pytest.raises(InputError, match="no preset"):
        native_config("nothing")
    assert "act_fn" in refusal(native_config("sif-small", act_fn="nothing"))
    assert "lacks n_layers; native_config('sif" in refusal({"d_model": 8, "d_head": 4, "n_ctx": 4})
    assert "lacks d_model, d_head, n_layers, n_ctx" in refusal({"n_heads": 2})
    assert "weights given (a dictionary of tensors)" in refusal(hf_model("neox").state_dict())


@pytest.mark.parametrize("name", ["script.py", "model.bin", "notes"])
def test_a_file_that_holds_no_model_is_no_hub_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text("import lensclust")
    monkeypatch.chdir(tmp_path)
    for source in (name, tmp_path / name):
        message = refusal(source)
        assert "is not a model file: expected .gguf" in message
        assert "hub" not in message


# -- real weights -----------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_from_the_package_index() -> None:
    try:
        model = load("smollm2-135m-instruct", device="cpu")
    except InputError as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")
    text = "The capital of France is"
    prompts = Prompts.from_texts([text], pd.DataFrame({"task": ["t"]}), model.tokenizer)
    answer, seen = generated(model, prompts.text(0))
    assert seen == prompts.tokens.tolist()
    assert answer == f"{text} Paris"
    chat = Prompts.from_texts([text], pd.DataFrame({"task": ["t"]}), model.tokenizer, chat=True)
    assert model.to_tokens(chat.text(0)).tolist() == chat.tokens.tolist()
    original = AutoTokenizer.from_pretrained(model.tokenizer.name_or_path)
    assert original(text).input_ids == prompts.tokens[0].tolist()
    assert original.get_vocab() == model.tokenizer.get_vocab()

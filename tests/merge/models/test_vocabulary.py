"""Vocabularies that grew while adapters were trained: shared rows are the base's, new ones by policy."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from zoo import DECODER, outputs

import nsc_merge
from nsc_merge.adapters import Adapter, Factor

EXACT = {"rtol": 1e-5, "atol": 1e-6}
TABLE = "base_model.model.model.embed_tokens.weight"


def with_added_tokens(model, folder, size, seed, **config):
    """An adapter that was trained after its base had got more tokens."""
    torch.manual_seed(seed)
    resized = copy.deepcopy(model)
    resized.resize_token_embeddings(size, mean_resizing=False)
    wrapped = get_peft_model(resized, LoraConfig(r=4, **{"target_modules": ["q_proj"], **config}))
    with torch.no_grad():
        for value in wrapped.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape))
    wrapped.save_pretrained(folder, save_embedding_layers=True)
    return wrapped.eval()


def llama(*, tied):
    torch.manual_seed(0)
    config = tf.LlamaConfig(**{**DECODER, "num_hidden_layers": 1}, tie_word_embeddings=tied)
    return tf.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request):
    return llama(tied=request.param)


def test_one_adapter_with_added_tokens_is_what_peft_runs(base, tmp_path):
    inputs = {"input_ids": torch.tensor([[3, 64, 9, 66]])}
    wanted = outputs(with_added_tokens(base, tmp_path / "a", 67, 1).double(), inputs)
    with pytest.raises(ValueError, match=r"found shape \[64, 32\].*added_tokens='mean'"):
        nsc_merge.merge(base, {"a": tmp_path / "a"}, method="task_arithmetic")
    result = nsc_merge.merge(base, {"a": tmp_path / "a"}, method="task_arithmetic", scale=1.0, added_tokens="mean")
    assert base.get_input_embeddings().weight.shape == (64, 32)
    assert base.config.vocab_size == 64
    loaded = tf.LlamaForCausalLM.from_pretrained(result.save(tmp_path / "model", "model"))
    assert loaded.config.vocab_size == 67
    torch.testing.assert_close(outputs(loaded.double(), inputs), wanted, **EXACT)
    resized = copy.deepcopy(base)
    resized.resize_token_embeddings(67)
    lora = PeftModel.from_pretrained(resized, result.save(tmp_path / "lora", "lora"))
    torch.testing.assert_close(outputs(lora.double(), inputs), wanted, **EXACT)


def test_new_rows_by_policy(base, tmp_path):
    for seed, (task, size) in enumerate({"a": 66, "b": 67}.items(), 1):
        with_added_tokens(base, tmp_path / task, size, seed)
    folders = {task: tmp_path / task for task in ("a", "b")}
    a, b = (load_file(folder / "adapter_model.safetensors")[TABLE] for folder in folders.values())
    before = base.get_input_embeddings().weight.detach().clone()
    rows = {"mean": torch.cat([(a[64:] + b[64:66]) / 2, b[66:]]), "first": torch.cat([a[64:], b[66:]])}
    for policy, wanted in rows.items():
        result = nsc_merge.merge(base, folders, method="task_arithmetic", added_tokens=policy)
        weight = result.model.get_input_embeddings().weight
        torch.testing.assert_close(weight[64:], wanted, rtol=1e-6, atol=1e-7)
        assert torch.equal(weight[:64], before)
    kept = nsc_merge.merge(base, folders, method="task_arithmetic", added_tokens="base")
    assert kept.model is base
    assert torch.equal(base.get_input_embeddings().weight, before)
    with pytest.raises(ValueError, match="added_tokens: expected one of"):
        nsc_merge.merge(base, folders, method="task_arithmetic", added_tokens="all")


def tokenizer(folder, new):
    """One of 64 words and ``new`` ones, beside an adapter."""
    from tokenizers import Tokenizer, models

    words = {f"w{number}": number for number in range(64)} | {word: 64 + at for at, word in enumerate(new)}
    made = tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    made.save_pretrained(folder)


def test_the_tokenizer_with_most_tokens_follows_and_others_must_agree(base, tmp_path):
    folders = {task: tmp_path / task for task in ("a", "b")}
    for seed, (task, size) in enumerate({"a": 65, "b": 66}.items(), 1):
        with_added_tokens(base, folders[task], size, seed)
    tokenizer(folders["a"], ["new"])
    tokenizer(folders["b"], ["new", "newer"])
    result = nsc_merge.merge(base, folders, method="task_arithmetic", added_tokens="first")
    out = result.save(tmp_path / "out", "model")
    assert len(tf.AutoTokenizer.from_pretrained(out)) == 66
    tokenizer(folders["b"], ["other", "newer"])
    with pytest.raises(ValueError, match=r"token 64 is 'new' of adapters\['a'\] and 'other' of adapters\['b'\]"):
        nsc_merge.merge(base, folders, method="task_arithmetic", added_tokens="first")


def test_low_rank_updates_of_a_grown_table_have_its_rows(tmp_path):
    """What two adapters of unequal size add to the embedding of the larger one is what each says of its own tokens."""
    base, deltas = llama(tied=False), {}
    for seed, (task, size) in enumerate({"a": 64, "b": 67}.items(), 1):
        targets = ["q_proj", "embed_tokens", "lm_head"]
        wrapped = with_added_tokens(base, tmp_path / task, size, seed, target_modules=targets)
        deltas[task] = wrapped.base_model.model.model.embed_tokens.get_delta_weight("default").detach()
    folders = {task: tmp_path / task for task in deltas}
    result = nsc_merge.merge(base, folders, method="task_arithmetic", scale=1.0, added_tokens="first")
    found = result.delta("model.embed_tokens").float()
    wanted = deltas["b"].clone()
    wanted[:64] += deltas["a"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_head_that_peft_leaves_out_is_named(tmp_path):
    base = llama(tied=False)
    with_added_tokens(base, tmp_path / "a", 66, 1, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match=r"a row of lm_head\.weight for token 64; .*PEFT leaves out lm_head"):
        nsc_merge.merge(base, {"a": tmp_path / "a"}, method="task_arithmetic", added_tokens="mean")
    kept = nsc_merge.merge(base, {"a": tmp_path / "a"}, method="task_arithmetic", added_tokens="base")
    assert kept.delta("model.embed_tokens").shape == (64, 32)


@pytest.mark.parametrize("adapted", ["embed_tokens", "lm_head"])
def test_rows_that_peft_saves_under_one_of_two_tied_names_are_those_of_both(adapted, tmp_path):
    base, inputs = llama(tied=True), {"input_ids": torch.tensor([[3, 64, 9, 66]])}
    config = {"target_modules": ["q_proj", adapted]}
    wanted = outputs(with_added_tokens(base, tmp_path / "a", 67, 1, **config).double(), inputs)
    result = nsc_merge.merge(base, {"a": tmp_path / "a"}, method="task_arithmetic", scale=1.0, added_tokens="mean")
    loaded = tf.LlamaForCausalLM.from_pretrained(result.save(tmp_path / "model", "model"))
    torch.testing.assert_close(outputs(loaded.double(), inputs), wanted, **EXACT)
    resized = copy.deepcopy(base)
    resized.resize_token_embeddings(67)
    lora = PeftModel.from_pretrained(resized, result.save(tmp_path / "lora", "lora"))
    torch.testing.assert_close(outputs(lora.double(), inputs), wanted, **EXACT)


WHOLE = {
    "the embeddings": {"modules_to_save": ["embed_tokens"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "the head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", WHOLE)
def test_new_rows_that_were_trained_under_one_name_leave_the_other_as_it_was(base, case, tmp_path):
    """A base that ties the two has them apart then, as PEFT does."""
    inputs = {"input_ids": torch.tensor([[3, 64, 9, 66]])}
    wanted = outputs(with_added_tokens(base, tmp_path / "a", 67, 1, **WHOLE[case]).double(), inputs)
    result = nsc_merge.merge(base, {"a": tmp_path / "a"}, method="task_arithmetic", scale=1.0, added_tokens="mean")
    exact = copy.deepcopy(result.model).double()
    with nsc_merge.attach(exact, result.adapters, 1.0):
        torch.testing.assert_close(outputs(exact, inputs), wanted, **EXACT)
    loaded = tf.LlamaForCausalLM.from_pretrained(result.save(tmp_path / "model", "model"))
    torch.testing.assert_close(outputs(loaded.double(), inputs), wanted, **EXACT)
    resized = copy.deepcopy(base)
    resized.resize_token_embeddings(67)
    lora = PeftModel.from_pretrained(resized, result.save(tmp_path / "lora", "lora"))
    torch.testing.assert_close(outputs(lora.double(), inputs), wanted, **EXACT)


def test_rows_of_tokens_count_for_both_of_two_weights_that_new_rows_took_apart(tmp_path):
    base, inputs = llama(tied=True), {"input_ids": torch.tensor([[3, 9, 5]])}
    with_added_tokens(base, tmp_path / "a", 66, 1, **WHOLE["the embeddings"])
    rows = with_added_tokens(base, tmp_path / "b", 66, 2, trainable_token_indices=[3])
    wanted = outputs(rows.double(), inputs)[..., :64]
    folders = {task: tmp_path / task for task in "ab"}
    result = nsc_merge.merge(base, folders, method="task_arithmetic", added_tokens="mean")
    assert result.model.lm_head.weight is not result.model.model.embed_tokens.weight
    exact = copy.deepcopy(result.model).double()
    with nsc_merge.attach(exact, result.adapters, {"a": 0.0, "b": 1.0}):
        torch.testing.assert_close(outputs(exact, inputs)[..., :64], wanted, **EXACT)


@pytest.mark.parametrize("name", ["T5", "BART"])
def test_new_rows_of_an_encoder_and_a_decoder_are_written_as_a_model(name, tmp_path):
    kind = ARCHITECTURES[name]
    base, inputs = kind.build(), kind.inputs()
    del inputs["attention_mask"]
    inputs["input_ids"][0, 1] = 97
    target = "q" if name == "T5" else "q_proj"
    wanted = outputs(with_added_tokens(base, tmp_path / "a", 100, 1, target_modules=[target]).double(), inputs)
    result = nsc_merge.merge(base, {"a": tmp_path / "a"}, method="task_arithmetic", scale=1.0, added_tokens="mean")
    loaded = type(base).from_pretrained(result.save(tmp_path / "model", "model"))
    torch.testing.assert_close(outputs(loaded.double(), inputs), wanted, **EXACT)
    with pytest.raises(ValueError, match=r"encoder.embed_tokens has the rows of new tokens, too .*use format 'model'"):
        result.save(tmp_path / "lora", "lora")
    with_added_tokens(base, tmp_path / "b", 100, 2, target_modules=[target], modules_to_save=["shared"])
    with pytest.raises(ValueError, match=r"that differ, which the base ties to .*embed_tokens.weight as well"):
        nsc_merge.merge(base, {"b": tmp_path / "b"}, method="task_arithmetic", added_tokens="mean")


def test_a_model_without_tokens_gets_none():
    # Its get_input_embeddings() raises.
    model = tf.ConvNextForImageClassification(tf.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4))
    path = "convnext.encoder.stages.0.layers.0.pwconv1"
    adapter = Adapter("a", {path: Factor(torch.ones(1, 8), torch.ones(32, 1), 1.0)})
    with pytest.raises(ValueError, match="ConvNextForImageClassification has no token embeddings"):
        nsc_merge.merge(model, {"a": adapter}, method="task_arithmetic", added_tokens="mean")

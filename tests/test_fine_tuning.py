"""Fine-tuning by stock Trainer and PEFT: packed equals unpacked, and adapters cover what they say and come back."""

import json
import re
from itertools import product

import pytest
import torch
from _script_helpers import ROOT, make_text, save_model
from datasets import Dataset
from fine_tuning_runs import (
    LINEAR,
    VOCABULARY,
    arguments,
    assert_step_equals_documents_alone,
    disturb,
    lora_everywhere,
    losses,
    make_documents,
)
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from tolerances import assert_close
from training.text_tokenizer import byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from modeling_griffin.saving.save import code_files


def make_trainer(folder, model, documents, collator, **changes) -> Trainer:
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments(folder, **changes)),
        train_dataset=Dataset.from_list(documents),
        data_collator=collator,
    )


# Packed equals unpacked

EXTRA_KEYS = ("return_position_ids", "return_flash_attn_kwargs", "return_seq_idx")
# Without any of the three, nothing tells where a document starts.
FLATTENED = [dict(zip(EXTRA_KEYS, values)) for values in product([True, False], repeat=3) if any(values)]


@pytest.mark.parametrize("keys", FLATTENED, ids=lambda keys: "+".join(key[7:] for key in keys if keys[key]))
def test_flattened_documents(tmp_path, small_model, keys):
    model, documents = small_model("griffin", "sdpa", vocab_size=VOCABULARY), make_documents()
    trainer = make_trainer(tmp_path, model, documents, DataCollatorWithFlattening(**keys))
    assert_step_equals_documents_alone(trainer, documents)


@pytest.mark.parametrize("kind, checkpointing", [("griffin", True), ("hawk", False)])
def test_flattened_documents_with_prompts(tmp_path, small_model, kind, checkpointing):
    model, documents = small_model(kind, "sdpa", vocab_size=VOCABULARY), make_documents(prompts=True)
    trainer = make_trainer(
        tmp_path, model, documents, DataCollatorWithFlattening(), activation_checkpointing=checkpointing
    )
    assert_step_equals_documents_alone(trainer, documents)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_documents(tmp_path, small_model, side):
    padder = byte_tokenizer()
    padder.padding_side = side
    model, documents = small_model("griffin", "sdpa", vocab_size=VOCABULARY), make_documents(prompts=True)
    trainer = make_trainer(tmp_path, model, documents, DataCollatorForSeq2Seq(padder))
    assert_step_equals_documents_alone(trainer, documents)


def test_full_fine_tuning_lowers_the_loss(tmp_path, small_model):
    """And a stock save generates with its cache, though Trainer switches `config.use_cache` off."""
    model = small_model("griffin", "sdpa", vocab_size=VOCABULARY)
    trainer = make_trainer(
        tmp_path, model, make_documents(), DataCollatorWithFlattening(), max_steps=12, learning_rate=2e-2
    )
    found = losses(trainer)
    assert found[-1] < 0.6 * found[0]
    trainer.save_model()
    again = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir)
    assert not again.config.use_cache and again.generation_config.use_cache


# Adapters


def test_the_targets_cover_the_model(small_model):
    """The three sets are every nn.Linear but the head, once each; with gates and decay, only these remain untouched."""
    model = small_model("griffin")
    linear = {n.split(".")[-1] for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert sorted(LINEAR) == sorted(linear - {"lm_head"})
    adapted = get_peft_model(model, lora_everywhere())
    untouched = {
        name.split(".")[-2] + "." + name.split(".")[-1]
        for name, parameter in adapted.named_parameters()
        if not parameter.requires_grad and "base_layer" not in name and "original_module" not in name
    }
    norms = {"temporal_pre_norm.weight", "channel_pre_norm.weight", "final_norm.weight"}
    assert untouched == norms | {"embed_tokens.weight", "lm_head.weight", "conv_1d.weight", "conv_1d.bias"}
    per_layer = [name for name, p in adapted.named_parameters() if p.requires_grad and "layers.0." in name]
    assert sum("gate.lora_" in name and "rg_lru" in name for name in per_layer) == 4
    assert sum(name.endswith("decay.modules_to_save.default.lambda_bias") for name in per_layer) == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_train_packed_as_unpacked(tmp_path, small_model, checkpointing):
    """Also under activation checkpointing, where PEFT makes the adapted gate weights a second time."""
    model = get_peft_model(small_model("griffin", "sdpa", vocab_size=VOCABULARY), lora_everywhere())
    disturb(model)
    documents = make_documents(prompts=True)
    trainer = make_trainer(
        tmp_path, model, documents, DataCollatorWithFlattening(), activation_checkpointing=checkpointing
    )
    assert_step_equals_documents_alone(trainer, documents)


def test_adapters_of_a_bfloat16_model_train_lambda_in_float32(small_model):
    model = small_model("griffin", "sdpa", vocab_size=VOCABULARY).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("lambda_bias"):
            parameter.data = parameter.data.float()  # as from_pretrained and from_config leave it
    model = get_peft_model(model, lora_everywhere())
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    ids = torch.randint(0, 256, (2, 20))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in trained.values())


def test_preparing_for_quantised_training(small_model):
    """What PEFT does before QLoRA: everything else in float32 and frozen; test_qlora.py has the weights."""
    model = prepare_model_for_kbit_training(small_model("griffin", "sdpa").to(torch.bfloat16))
    assert {(parameter.dtype, parameter.requires_grad) for parameter in model.parameters()} == {(torch.float32, False)}
    model = get_peft_model(model, lora_everywhere())
    ids = torch.randint(0, 29, (2, 20))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_merging_saves_a_complete_model(tmp_path, small_model):
    """Adapter and merged model come back with the logits of the adapted one, the latter in a folder like any other."""
    small_model("griffin", "sdpa").save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora_everywhere()).eval()
    ids = torch.randint(0, 29, (2, 20))
    with torch.no_grad():
        before = model(ids).logits
        disturb(model)
        expected = model(ids).logits
        assert (expected - before).abs().max() > 0.1 * expected.abs().max()
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
        assert torch.equal(again.eval()(ids).logits, expected)
        again.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert_close("logits", merged(ids).logits, expected)
    names = {path.name for path in (tmp_path / "base").iterdir()}
    assert names == {path.name for path in (tmp_path / "merged").iterdir()} > {path.name for path in code_files()}


def test_the_lines_in_the_documentation(tmp_path, monkeypatch):
    """configuration/README.md: from a trained folder to an adapter and a merged model that generates."""
    text = (ROOT / "configuration" / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", text.split("## Fine-tuning")[1], flags=re.S)
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "build" / "pretrain_small")
    (tmp_path / "data").mkdir()
    records = [{"text": make_text(10 + 5 * count, seed=count)} for count in range(6)]
    (tmp_path / "data" / "documents.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    on_cpu = lines.replace("SFTConfig(", "SFTConfig(use_cpu=True, output_dir=")
    assert on_cpu != lines
    exec(compile(on_cpu, "configuration/README.md", "exec"), {})
    folder = tmp_path / "build"
    assert (folder / "lora" / "adapter_model.safetensors").is_file()
    before = load_file(folder / "pretrain_small" / "model.safetensors")
    merged = load_file(folder / "merged" / "model.safetensors")
    moved = {name for name in merged if not torch.equal(merged[name], before[name].to(merged[name].dtype))}
    kinds = tuple(f"{name}.weight" for name in LINEAR) + ("gate.weight", "lambda_bias")
    assert moved == {name for name in merged if name.endswith(kinds)}
    assert {merged[name].dtype for name in moved if name.endswith("lambda_bias")} == {torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "build" / "merged")
    assert model.generate(torch.tensor([[104, 101]]), max_new_tokens=3, do_sample=False).shape == (1, 5)

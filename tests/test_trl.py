"""Fine-tuning by TRL's SFTTrainer: packing, padding-free, completions only, LoRA, its metrics and its command line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from _script_helpers import ROOT, save_model
from datasets import Dataset
from fine_tuning_runs import VOCABULARY, alone, arguments, assert_step_equals_documents_alone, losses, make_documents
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tolerances import assert_close
from training.text_tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from modeling_griffin import LORA_TARGETS


LAYOUTS = {
    "padded": {},
    "padding_free": {"padding_free": True, "max_length": None},
    "padding_free to a multiple": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
    "packing": {"packing": True, "max_length": 32},  # two rows
}


def make_trainer(folder, model, records, peft_config=None, **changes) -> SFTTrainer:
    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments(folder, **changes)),
        train_dataset=Dataset.from_list(records),
        processing_class=byte_tokenizer(),
        peft_config=peft_config,
    )


@pytest.mark.parametrize("checkpointing", [True, False])  # True is TRL's default
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["griffin", "hawk"])
def test_every_layout_trains_as_documents_alone(tmp_path, small_model, kind, layout, checkpointing):
    model, documents = small_model(kind, "sdpa", vocab_size=VOCABULARY), make_documents(prompts=True)
    trainer = make_trainer(tmp_path, model, documents, activation_checkpointing=checkpointing, **LAYOUTS[layout])
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("attention_mask" in batch) == (layout == "padded")
    assert ("position_ids" in batch and "cu_seq_lens_q" in batch and "seq_idx" in batch) == (layout != "padded")
    assert_step_equals_documents_alone(trainer, documents)


@pytest.mark.parametrize("layout", ["padded", "padding_free", "packing"])
def test_completion_only_loss(tmp_path, small_model, layout):
    """From text: only completions and the end of text behind them are labels, in every layout."""
    words = ["decay ", "gate ", "state of the window "]
    records = [{"prompt": "the " * (i + 1), "completion": word * (i + 1)} for i, word in enumerate(words)]
    model = small_model("griffin", "sdpa", vocab_size=VOCABULARY)
    settings = {**LAYOUTS[layout], **({"max_length": 128} if layout == "packing" else {})}
    trainer = make_trainer(tmp_path, model, records, gradient_accumulation_steps=1, **settings)
    encoder, documents = byte_tokenizer(), []
    for record in records:
        prompt = encoder(record["prompt"])["input_ids"]
        whole = encoder(record["prompt"] + record["completion"])["input_ids"] + [encoder.eos_token_id]
        documents.append({"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]})
    assert_step_equals_documents_alone(trainer, documents)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("layout", ["padded", "packing"])
def test_metrics_are_those_of_the_models_own_logits(tmp_path, small_model, layout, cap):
    """SFTTrainer multiplies hidden states with the head itself: the cap has to reach its loss, entropy and accuracy."""
    model = small_model("griffin", "sdpa", vocab_size=VOCABULARY, final_logit_softcapping=cap, scale_embeddings=True)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # so that the cap bites
    documents = make_documents(prompts=True)
    for document in documents[::2]:  # half of the documents with argmax of the model: accuracy above 0
        ids = torch.tensor([document["input_ids"]])
        largest = model(ids, use_cache=False).logits[0, :-1].argmax(-1).tolist()
        document["labels"][1:] = [-100 if old == -100 else new for old, new in zip(document["labels"][1:], largest)]
    loss, _, log_probabilities, learnt = alone(model, documents)
    trainer = make_trainer(
        tmp_path, model, documents, per_device_train_batch_size=6, gradient_accumulation_steps=1, **LAYOUTS[layout]
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1).mean()
    accuracy = (log_probabilities.argmax(-1) == learnt).float().mean()
    assert 0.2 < accuracy < 0.9
    for name, expected in {"loss": loss, "entropy": entropy, "mean_token_accuracy": accuracy}.items():
        assert_close("logits", torch.tensor(logged[name]), expected, name)


@pytest.mark.parametrize("layout", ["padding_free", "packing"])
@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "LoRA"])
def test_training_lowers_the_loss(tmp_path, small_model, layout, adapter):
    model = small_model("griffin", "sdpa", vocab_size=VOCABULARY)
    targets = LORA_TARGETS["recurrent"] + LORA_TARGETS["attention"] + LORA_TARGETS["mlp"]
    lora = LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM") if adapter else None
    trainer = make_trainer(tmp_path, model, make_documents(), lora, max_steps=12, learning_rate=2e-2, **LAYOUTS[layout])
    found = losses(trainer)
    assert found[-1] < 0.7 * found[0]


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_rollouts_by_generate_batch(tmp_path, small_model, method, adapter):
    """`use_transformers_continuous_batching`: completions end by end of text or limit, and weights are trained."""
    configuration, trainer = {"GRPO": (GRPOConfig, GRPOTrainer), "RLOO": (RLOOConfig, RLOOTrainer)}[method]
    model, seen = small_model("griffin", "sdpa", vocab_size=VOCABULARY), []
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def reward(completions, completion_ids, **kwargs):
        seen.extend(completion_ids)
        return [float(sum(token % 2 for token in ids)) for ids in completion_ids]

    lora = LoraConfig(r=4, target_modules=LORA_TARGETS["mlp"], task_type="CAUSAL_LM", init_lora_weights=False)
    run = trainer(
        model=model,
        reward_funcs=reward,
        args=configuration(
            output_dir=str(tmp_path), use_transformers_continuous_batching=True, max_steps=2, num_generations=4,
            per_device_train_batch_size=4, max_completion_length=6, beta=0.0, learning_rate=1e-2, report_to="none",
            use_cpu=True, top_k=20, top_p=0.95, temperature=1.2, save_strategy="no", disable_tqdm=True, bf16=False,
            logging_steps=1,
        ),
        train_dataset=Dataset.from_list([{"prompt": "the gate"}, {"prompt": "of the decay"}]),
        processing_class=byte_tokenizer(),
        peft_config=lora if adapter else None,
    )  # fmt: skip
    run.train()
    assert len(seen) == 8 and all(0 < len(ids) <= 6 for ids in seen) and len({tuple(ids) for ids in seen}) > 4
    changed = {
        name for name, parameter in model.named_parameters() if name in before and parameter.ne(before[name]).any()
    }
    assert not changed if adapter else any("rg_lru" in name for name in changed)
    assert any(entry.get("grad_norm", 0) > 0 for entry in run.state.log_history)


COMMAND = """
import runpy, sys
sys.modules["modeling_griffin"] = None  # as on a machine without the package
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
folder, *words = sys.argv[1:]
sys.argv = ["sft", *words]
runpy.run_module("trl.scripts.sft", run_name="__main__")
model = AutoPeftModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
with torch.no_grad():
    save_file({"logits": model(torch.arange(40)[None]).logits}, folder + "/logits.safetensors")
"""


def test_the_command_line_with_the_ready_made_configuration(tmp_path):
    """`trl sft --config` without the package, by the code beside the weights; the adapter then loads with it."""
    save_model(tmp_path / "model")
    (tmp_path / "data").mkdir()
    records = [{"prompt": "the gate of ", "completion": "decay " * count} for count in range(1, 9)]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    adapter = tmp_path / "adapter"
    words = ["--config", str(ROOT / "configuration" / "trl" / "lora.yaml"), "--dataset_name", str(tmp_path / "data")]
    words += ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(adapter), "--max_length", "64"]
    words += ["--max_steps", "3", "--warmup_steps", "0", "--learning_rate", "1e-2", "--logging_steps", "1"]
    words += ["--use_cpu", "true", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = ""
    child = subprocess.run(
        [sys.executable, "-c", COMMAND, str(adapter), *words],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]

    weights = load_file(adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    start = load_file(tmp_path / "model" / "model.safetensors")
    for layer in (0, 1):
        name = f"model.layers.{layer}.temporal_block.rg_lru.decay.lambda_bias"
        assert not torch.equal(weights[f"base_model.model.{name}"], start[name])  # Λ was trained
    kinds = {name.split(".lora_")[0].split(".")[-1] for name in weights if ".lora_B" in name and weights[name].any()}
    linear = LORA_TARGETS["recurrent"] + LORA_TARGETS["attention"] + LORA_TARGETS["mlp"]
    assert kinds == {*linear, "recurrence_gate", "input_gate"}

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = model(ids).logits
        after = PeftModel.from_pretrained(model, adapter).eval()(ids).logits
    expected = load_file(adapter / "logits.safetensors")["logits"]
    assert_close("logits", after, expected)
    assert (after - before).abs().max() > 1e-2 * expected.abs().max()

"""Where Transformers decides by a class's name or a table: Griffin gets what a Llama gets, under any name."""

import pickle
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from modeling_griffin import (
    GriffinForCausalLM,
    GriffinForSequenceClassification,
    GriffinForTokenClassification,
)


SMOOTHING = 0.1


class RenamedGriffin(GriffinForCausalLM):
    """A user's own subclass."""


class RenamedClassifier(GriffinForSequenceClassification):
    """A user's own subclass."""


def small_llama():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )


def trainer_of(model, folder, **arguments) -> Trainer:
    arguments = TrainingArguments(folder, report_to=[], use_cpu=True, disable_tqdm=True, **arguments)
    return Trainer(model=model, args=arguments)


def shifted_loss(model, rows):
    """The smoothed loss of predicting each next token, from the logits."""
    log_p = model(rows).logits[:, :-1].log_softmax(-1)
    likelihood = log_p.gather(-1, rows[:, 1:, None])
    return -(1 - SMOOTHING) * likelihood.mean() - SMOOTHING * log_p.mean()


@pytest.mark.parametrize("kind", ["llama", "griffin", "hawk", "subclass", "adapter"])
def test_smoothed_labels_are_shifted(kind, small_model, tmp_path):
    models = {
        "llama": small_llama,
        "griffin": small_model,
        "hawk": lambda: small_model("hawk"),
        "subclass": lambda: small_model(cls=RenamedGriffin),
        "adapter": lambda: adapted(small_model()),
    }
    model, rows = models[kind]().eval(), torch.randint(0, 29, (3, 12))
    trainer = trainer_of(model, tmp_path, label_smoothing_factor=SMOOTHING)
    with torch.no_grad():
        loss = trainer.compute_loss(model, {"input_ids": rows, "labels": rows.clone()})
        torch.testing.assert_close(loss, shifted_loss(model, rows))


def adapted(model):
    return get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize("kind", ["llama in place", "griffin in place", "griffin", "subclass", "adapter"])
def test_smoothed_labels_are_shifted_behind_a_compiler(kind, small_model, tmp_path):
    """`torch_compile` wraps the model in another class, under which stock Trainer does not shift even Llama's labels.

    In place, by `model.compile()`, the class stays.
    """
    models = {
        "llama in place": small_llama,
        "griffin in place": small_model,
        "griffin": small_model,
        "subclass": lambda: small_model(cls=RenamedGriffin),
        "adapter": lambda: adapted(small_model()),
    }
    model, rows = models[kind]().eval(), torch.randint(0, 29, (3, 12))
    in_place = kind.endswith("in place")
    compiler = {} if in_place else {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer = trainer_of(model, tmp_path, label_smoothing_factor=SMOOTHING, **compiler)
    if in_place:
        model.compile(backend="eager")
    compiled = trainer.accelerator.prepare(model)
    assert in_place == (compiled is model)
    with torch.no_grad():
        loss = trainer.compute_loss(compiled, {"input_ids": rows, "labels": rows.clone()})
        torch.testing.assert_close(loss, shifted_loss(model, rows))


def test_a_compiled_classifier_is_not_taken_for_a_language_model(small_model):
    compiled = torch.compile(small_model(cls=GriffinForTokenClassification), backend="eager")
    assert compiled._get_name() not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    compiled = torch.compile(small_model(), backend="eager")
    assert str(compiled).startswith("OptimizedModule(") and compiled._get_name() == "OptimizedModule"
    assert pickle.loads(pickle.dumps(compiled._get_name())) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def test_remote_code_is_as_right_as_the_package(small_model, tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "model")
    program = f"""
import sys, torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True).eval()
assert "transformers_modules" in type(model).__module__ and "modeling_griffin" not in sys.modules
rows = torch.arange(24).view(2, 12)
arguments = TrainingArguments({str(tmp_path)!r}, label_smoothing_factor={SMOOTHING}, report_to=[], use_cpu=True)
trainer = Trainer(model=model, args=arguments)
assert trainer.model_accepts_loss_kwargs and trainer._loss_shifts_labels
with torch.no_grad():
    print(trainer.compute_loss(model, dict(input_ids=rows, labels=rows.clone())).item())
import modeling_griffin
with torch.no_grad():
    compiled = torch.compile(model, backend="eager")
    print(trainer.compute_loss(compiled, dict(input_ids=rows, labels=rows.clone())).item())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    rows = torch.arange(24).view(2, 12)
    expected = shifted_loss(model, rows).item()
    for found in run.stdout.split()[-2:]:  # behind a compiler, where the package is imported
        assert float(found) == pytest.approx(expected, rel=1e-5)


def test_classifiers_labels_are_not_shifted(small_model, tmp_path):
    model, rows = small_model(cls=GriffinForTokenClassification), torch.randint(0, 29, (3, 12))
    labels = torch.randint(0, 2, (3, 12))
    trainer = trainer_of(model, tmp_path, label_smoothing_factor=SMOOTHING)
    loss = trainer.compute_loss(model, {"input_ids": rows, "labels": labels.clone()})
    log_p = model(rows).logits.log_softmax(-1)
    expected = -(1 - SMOOTHING) * log_p.gather(-1, labels[..., None]).mean() - SMOOTHING * log_p.mean()
    torch.testing.assert_close(loss, expected)


def test_the_name_is_read_as_it_is(small_model):
    """Only the comparison with Transformers' table differs: what is printed is the class's name."""
    model = small_model()
    assert str(model).startswith("GriffinForCausalLM(") and "RecurrentGemma" not in str(model)
    assert model._get_name() == "GriffinForCausalLM" and model._get_name() != "LlamaForCausalLM"
    assert model._get_name() in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def test_a_subclass_of_another_name_keeps_its_loss(small_model, tmp_path):
    rows = torch.randint(0, 29, (3, 12))
    torch.testing.assert_close(
        small_model(cls=RenamedGriffin)(rows, labels=rows).loss, small_model()(rows, labels=rows).loss
    )
    assert trainer_of(small_model(cls=RenamedGriffin), tmp_path)._loss_shifts_labels
    labels, mask = torch.tensor([0, 1, 1]), torch.ones_like(rows)
    torch.testing.assert_close(
        small_model(cls=RenamedClassifier)(rows, attention_mask=mask, labels=labels).loss,
        small_model(cls=GriffinForSequenceClassification)(rows, attention_mask=mask, labels=labels).loss,
    )


@pytest.mark.parametrize("accumulation", [1, 3])
def test_trainer_counts_the_predicted_tokens(accumulation, small_model, tmp_path):
    """The loss that is logged is the mean over predicted tokens, whatever batches they came in."""
    rows = [{"input_ids": row, "labels": row.clone()} for row in torch.randint(0, 29, (3, 12))]
    rows[1]["labels"][:9] = -100
    losses = {}
    for name, model in {"llama": small_llama(), "griffin": small_model()}.items():
        stacked = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        expected = model.eval()(**stacked).loss.item()
        arguments = TrainingArguments(
            tmp_path,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            max_steps=1,
            logging_steps=1,
            per_device_train_batch_size=3 // accumulation,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.0,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses[name] = (trainer.state.log_history[0]["loss"], expected)
    for found, expected in losses.values():
        assert found == pytest.approx(expected, rel=1e-3)


def test_pipelines_know_the_classes(small_model, tmp_path, caplog):
    """`pipeline` complains of a class that is not in its table, which registering with the Auto classes fills."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(29)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", unk_token="w0")
    logging.get_logger("transformers").addHandler(caplog.handler)
    for task, auto, cls in (
        ("text-generation", AutoModelForCausalLM, GriffinForCausalLM),
        ("text-classification", AutoModelForSequenceClassification, GriffinForSequenceClassification),
        ("token-classification", AutoModelForTokenClassification, GriffinForTokenClassification),
    ):
        small_model(cls=cls, pad_token_id=0).save_pretrained(tmp_path / task)
        model = auto.from_pretrained(tmp_path / task)
        assert pipeline(task, model=model, tokenizer=tokenizer, device="cpu")("w3 w4 w5")
    assert "not supported" not in caplog.text

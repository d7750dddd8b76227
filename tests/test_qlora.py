"""QLoRA: adapters, gates and Λ over quantised linear layers; what is quantised, trained, saved and merged."""

import pytest
import torch
from datasets import Dataset
from fine_tuning_runs import LINEAR, VOCABULARY, arguments, disturb, lora_everywhere, losses, make_documents
from peft import PeftModel, get_peft_model
from quantised_models import SCHEMES, SIZES, dequantised, largest_error, linears_of, load_quantised
from safetensors.torch import load_file
from tolerances import assert_close
from torch import nn
from training.text_tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer


TRAINED = ["nf4, constants too", "int8", "torchao int8"]
# bitsandbytes' int8 rounds what a layer reads as well, to 8 bits
ROUNDED_INPUTS = {"int8": 4e-2}
DECAY = "model.layers.{}.temporal_block.rg_lru.decay.lambda_bias"


@pytest.fixture
def base(small_model, tmp_path):
    small_model("griffin", "sdpa", vocab_size=VOCABULARY, **SIZES).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained_of(model) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_quantised(base, scheme):
    """Every linear layer but the head; gates, convolution, norms, embedding and Λ are what they were."""
    model, plain = load_quantised(base, scheme, torch.bfloat16), AutoModelForCausalLM.from_pretrained(base)
    linears = linears_of(model)
    assert len(linears) == 3 * len(model.model.layers) + 2 * 3 + 4
    for name, module in linears.items():
        packed = type(module) is not nn.Linear or type(module.weight.data) is not torch.Tensor
        assert packed, name
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] in linears:
            continue
        dtype = torch.float32 if name.endswith("lambda_bias") else torch.bfloat16
        assert parameter.dtype == dtype and torch.equal(parameter, expected[name].to(dtype)), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_model_computes_with_the_schemes_own_numbers(base, scheme):
    model, ids = load_quantised(base, scheme), torch.randint(0, 256, (2, 30))
    with torch.no_grad():
        found, expected = model(ids).logits, dequantised(model).double()(ids).logits
        unquantised = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    if scheme in ROUNDED_INPUTS:
        assert largest_error(found, expected) < ROUNDED_INPUTS[scheme]
    else:
        assert_close("logits", found, expected)
    assert largest_error(expected, unquantised) > 3e-3  # else nothing was quantised


@pytest.mark.parametrize("scheme, checkpointing", zip(TRAINED, (True, False, True)))
def test_every_trained_weight_gets_a_gradient_and_learns(base, scheme, checkpointing):
    model = load_quantised(base, scheme, torch.bfloat16).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model = get_peft_model(model, lora_everywhere())
    trained = trained_of(model)
    kinds = {name.removeprefix("base_model.model.").split(".lora_")[0].split(".modules_to_save")[0] for name in trained}
    assert {kind.split(".")[-1] for kind in kinds} == {*LINEAR, "recurrence_gate", "input_gate", "decay"}
    assert {p.dtype for name, p in trained.items() if name.endswith("lambda_bias")} == {torch.float32}
    optimizer, ids, found = torch.optim.AdamW(trained.values(), lr=1e-2), torch.randint(0, 256, (2, 24)), []
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.8 * found[0]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        if name in trained:
            assert parameter.grad.abs().max() > 0 and not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("scheme", TRAINED)
@torch.no_grad()
def test_an_adapter_is_saved_reloaded_and_merged(base, tmp_path, scheme, usual_four_bits):
    model, ids = get_peft_model(load_quantised(base, scheme), lora_everywhere()).eval(), torch.randint(0, 256, (2, 20))
    disturb(model)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")[
        f"base_model.model.{DECAY.format(0)}"
    ].dtype == (torch.float32)
    again = PeftModel.from_pretrained(load_quantised(base, scheme), tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, expected)

    # Onto the scheme's own numbers: the merged model is what was trained.
    plain = dequantised(load_quantised(base, scheme))
    merged = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload().eval()
    if scheme in ROUNDED_INPUTS:
        assert largest_error(merged(ids).logits, expected) < ROUNDED_INPUTS[scheme]
    else:
        assert_close("logits", merged(ids).logits, expected)

    # Into the quantised weights themselves: they are rounded once more; the folder loads as it is.
    rounded = again.merge_and_unload()
    rounded.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert largest_error(loaded(ids).logits, rounded(ids).logits) < 1e-5
    assert largest_error(loaded(ids).logits, expected) < (0.5 if scheme.startswith("nf4") else 6e-2)
    assert loaded.model.layers[0].temporal_block.rg_lru.decay.lambda_bias.dtype == torch.float32


def assert_lambda_learns_in_float32(model, base) -> None:
    """Its steps are smaller than bfloat16 could keep."""
    start = load_file(base / "model.safetensors")
    for layer in (0, 1):
        decay = model.get_base_model().model.layers[layer].temporal_block.rg_lru.decay
        found, before = decay.modules_to_save["default"].lambda_bias, start[DECAY.format(layer)]
        assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())
        assert 0 < (found - before).abs().max() < 0.1


@pytest.mark.parametrize("scheme", TRAINED)
def test_stock_trainer(base, tmp_path, scheme):
    model = get_peft_model(load_quantised(base, scheme, torch.bfloat16), lora_everywhere())
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            **arguments(tmp_path, max_steps=5, learning_rate=5e-3, gradient_checkpointing=True, bf16=True)
        ),
        train_dataset=Dataset.from_list(make_documents()),
        data_collator=DataCollatorWithFlattening(return_seq_idx=True),
    )
    found = losses(trainer)
    assert found[-1] < 0.9 * found[0]
    assert_lambda_learns_in_float32(model, base)


@pytest.mark.parametrize("scheme", TRAINED)
def test_sft_trainer(base, tmp_path, scheme):
    """TRL casts all that is trained over bitsandbytes' weights to bfloat16: Λ is float32 again when training begins."""
    trainer = SFTTrainer(
        model=load_quantised(base, scheme, torch.bfloat16),
        args=SFTConfig(**arguments(tmp_path, max_steps=5, learning_rate=5e-3), packing=True, max_length=32),
        train_dataset=Dataset.from_list(make_documents()),
        processing_class=byte_tokenizer(),
        peft_config=lora_everywhere(),
    )
    found = losses(trainer)
    assert found[-1] < 0.9 * found[0]
    assert_lambda_learns_in_float32(trainer.model, base)
    trainer.save_model(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved[f"base_model.model.{DECAY.format(1)}"].dtype == torch.float32

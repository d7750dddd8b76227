"""LoRA by PEFT: adapters of RecurrentGemma move over, and every adapted weight of a Griffin learns."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from recurrent_gemma_models import PORT_WINDOW, small_recurrent_gemma

from modeling_griffin import GriffinForCausalLM


TOLERANCE = 2e-5  # of the largest number compared
TARGETS = {
    "all linear": "all-linear",
    "recurrent block": ["linear_x", "linear_y", "linear_out"],
    "attention and MLP": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def tokens(length: int = PORT_WINDOW) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(2, 61, (4, length))


def train(model, steps: int, length: int = PORT_WINDOW, **kwargs) -> list[float]:
    """Losses of a few steps on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens(length), labels=tokens(length), **kwargs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def lora(targets="all-linear", **kwargs) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **kwargs)


@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_of_recurrent_gemma_moves_over(name, tmp_path):
    theirs = get_peft_model(small_recurrent_gemma(), lora(TARGETS[name]))
    losses = train(theirs, 8, use_cache=False)
    assert losses[-1] < losses[0]
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)

    ours = PeftModel.from_pretrained(GriffinForCausalLM.from_recurrent_gemma(small_recurrent_gemma()), tmp_path)
    theirs.eval(), ours.eval()
    with torch.no_grad():
        expected, found = theirs(tokens(), use_cache=False).logits, ours(tokens()).logits
        with ours.disable_adapter():
            without = ours(tokens()).logits
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= TOLERANCE * scale
    assert (without - expected).abs().max() > 1e-2 * scale  # the adapter does something
    with torch.no_grad():
        merged = ours.merge_and_unload()(tokens()).logits
    assert (merged - expected).abs().max() <= TOLERANCE * scale


@pytest.mark.parametrize("kind", ["griffin", "hawk"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_adapted_weight_gets_a_gradient(small_model, kind, checkpointing):
    model = small_model(kind).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    linears = {n for n, module in model.named_modules() if type(module) is torch.nn.Linear and n != "lm_head"}
    model = get_peft_model(model, lora())
    adapted = {
        name.removeprefix("base_model.model.").split(".lora_")[0]
        for name, _ in model.named_parameters()
        if "lora_" in name
    }
    assert adapted == linears
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide lora_A's gradient
                parameter.normal_(std=0.1)
    ids = torch.randint(0, 29, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_training_an_adapter_here_lowers_the_loss(tmp_path):
    base = GriffinForCausalLM.from_recurrent_gemma(small_recurrent_gemma())
    model = get_peft_model(base, lora())
    losses = train(model, 15, length=3 * PORT_WINDOW)
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path, save_embedding_layers=False)  # or PEFT asks the Hub for the base model
    again = GriffinForCausalLM.from_recurrent_gemma(small_recurrent_gemma())
    again = PeftModel.from_pretrained(again, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model.eval()(tokens()).logits)


def test_gates_and_decay_can_be_trained_beside_the_adapter():
    """Gate weights are bare parameters: `target_parameters`; Λ is trained whole: `modules_to_save`."""
    base = GriffinForCausalLM.from_recurrent_gemma(small_recurrent_gemma())
    gates = ["rg_lru.input_gate.weight", "rg_lru.recurrence_gate.weight"]
    model = get_peft_model(base, lora(["linear_x"], target_parameters=gates, modules_to_save=["decay"]))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    assert any("input_gate" in name for name in trained) and any("recurrence_gate" in name for name in trained)
    assert any(name.endswith("lambda_bias") for name in trained)
    losses = train(model, 6, length=2 * PORT_WINDOW)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[name], p) for name, p in trained.items())

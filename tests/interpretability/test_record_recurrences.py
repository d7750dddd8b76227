"""The recurrences that are recorded, beside the sequential definition, and gradients into and out of them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from modeling_griffin import GriffinModel
from modeling_griffin.interpretability import Recurrence, record_recurrences
from modeling_griffin.rg_lru import RGLRU
from modeling_griffin.rg_lru_scan_reference import rg_lru_scan_reference
from tests.tolerances import assert_close


def random_ids(rows: int = 2, length: int = 13) -> torch.Tensor:
    return torch.randint(1, 29, (rows, length))


def inputs(kind: str) -> dict:
    ids = random_ids()
    if kind == "padded":
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        return {"input_ids": ids, "attention_mask": mask}
    if kind == "packed":
        return {"input_ids": ids, "position_ids": torch.cat([torch.arange(5), torch.arange(8)]).expand(2, -1)}
    return {"input_ids": ids}


def defined_recurrences(model, arguments: dict) -> dict[int, Recurrence]:
    """By hooks on the gates and the loop over time in float64."""
    found = {}

    def look(module, args, kwargs):
        x, start, real, state = args[:4]
        gates = module.recurrence_gate(x), module.input_gate(x)
        if real is not None:
            x = x * real[..., None]
            gates = gates[0].masked_fill(~real[..., None], -torch.inf), gates[1]
        x, *gates = (each.double() for each in (x, *gates))
        log_decay = module.decay().double()
        h, _ = rg_lru_scan_reference(x, *gates, log_decay, state, start)
        r, i = (gate.sigmoid() for gate in gates)
        a = torch.exp(log_decay * r).masked_fill(start[..., None], 0.0)
        found[len(found)] = Recurrence(a, i, r, h)

    hooks = [
        layer.temporal_block.rg_lru.register_forward_pre_hook(look, with_kwargs=True)
        for layer in model.model.layers
        if hasattr(layer.temporal_block, "rg_lru")
    ]
    with torch.no_grad():
        model(**arguments)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("inputs_kind", ["plain", "padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_are_the_definitions(inputs_kind, dtype, small_model):
    model, arguments = small_model(attention="sdpa").to(dtype), inputs(inputs_kind)
    with torch.no_grad():
        plain = model(**arguments).logits
        with record_recurrences(model) as recorded:
            logits = model(**arguments).logits
    real = arguments.get("attention_mask", torch.ones_like(arguments["input_ids"])).bool()
    assert_close("logits", logits[real], plain[real])
    expected = defined_recurrences(model, arguments)
    assert recorded.keys() == expected.keys() == {0, 1}
    for layer in recorded:
        for name, found, defined in zip("airh", recorded[layer], expected[layer]):
            assert found.dtype == dtype
            assert_close("scan float64" if dtype == torch.float64 else "scan float32", found, defined, name)


def test_recorded_tensors_obey_equation_4(small_model):
    """h_t of h_{t-1}, a_t, i_t and what the layer read, at every step but the first, which starts the document."""
    model, read = small_model("hawk").double(), {}
    block = model.model.layers[1].temporal_block
    block.rg_lru.register_forward_pre_hook(lambda module, args: read.update(x=args[0]))
    with torch.no_grad(), record_recurrences(model) as recorded:
        model(random_ids())
    a, i, r, h = recorded[1]
    # The layer takes the softplus in float32, whatever the model's dtype.
    log_decay = -model.config.rg_lru_c * nn.functional.softplus(block.rg_lru.decay.lambda_bias.float()).double()
    assert_close("scan float64", a[:, 1:], torch.exp(log_decay * r)[:, 1:])
    step = a[:, 1:] * h[:, :-1] + (1 - a[:, 1:] ** 2).sqrt() * i[:, 1:] * read["x"][:, 1:]
    assert_close("scan float64", h[:, 1:], step)
    assert_close("scan float64", h[:, 0], i[:, 0] * read["x"][:, 0])


@pytest.mark.parametrize("inputs_kind", ["plain", "padded", "packed"])
def test_gradients_of_the_weights_are_the_models_own(inputs_kind, small_model):
    model, arguments = small_model().double(), inputs(inputs_kind)

    def gradients():
        model.zero_grad()
        model(**arguments, labels=arguments["input_ids"]).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    with record_recurrences(model):
        found = gradients()
    for each, other in zip(found, expected):
        assert_close("scan float64", each, other)


def test_gradient_of_the_loss_in_a_i_and_r(small_model):
    """Beside autograd of a loop over time whose leaves they are, in float64."""
    model, ids, read = small_model("hawk").double(), random_ids(), {}
    rg_lru = model.model.layers[0].temporal_block.rg_lru
    rg_lru.register_forward_pre_hook(lambda module, args: read.update(x=args[0].detach()))
    with record_recurrences(model) as recorded:
        loss = model(ids, labels=ids).loss
    found = torch.autograd.grad(loss, recorded[0], retain_graph=True)
    r = recorded[0].r.detach().requires_grad_()
    i = recorded[0].i.detach().requires_grad_()
    a = torch.exp(rg_lru.decay().double() * r)
    a.retain_grad()
    state, states = torch.zeros_like(read["x"][:, 0]), []
    for t in range(ids.shape[1]):
        scale = 1.0 if t == 0 else (1 - a[:, t] ** 2).sqrt()
        state = (0.0 if t == 0 else a[:, t]) * state + scale * i[:, t] * read["x"][:, t]
        states.append(state)
    # What comes from above: the derivative of the loss in h as the layer's output.
    torch.stack(states, dim=1).backward(found[3])
    assert_close("scan float64", found[0][:, 1:], a.grad[:, 1:])
    assert_close("scan float64", found[1], i.grad)
    assert_close("scan float64", found[2], r.grad)


def test_gradient_of_what_is_recorded_in_the_weights(small_model):
    """The mean decay of a layer, as a term of a loss of one's own: by the formula, in float64."""
    model, ids = small_model("hawk").double(), random_ids()
    with record_recurrences(model) as recorded:
        model(ids)
    parameters = list(model.model.layers[0].temporal_block.rg_lru.parameters())
    found = torch.autograd.grad(recorded[0].a[:, 1:].mean(), parameters, allow_unused=True)
    rg_lru, read = model.model.layers[0].temporal_block.rg_lru, {}
    rg_lru.register_forward_pre_hook(lambda module, args: read.update(x=args[0].detach()))
    model(ids)
    a = torch.exp(rg_lru.decay().double() * rg_lru.recurrence_gate(read["x"]).sigmoid())
    expected = torch.autograd.grad(a[:, 1:].mean(), parameters, allow_unused=True)
    names = [name for name, _ in rg_lru.named_parameters()]
    for name, each, other in zip(names, found, expected):
        assert (each is None) == (other is None) == name.startswith("input_gate")
        if each is not None:
            assert_close("scan float64", each, other, name)


def test_adapters_of_peft(small_model):
    model, ids = small_model("hawk"), random_ids()
    adapted = get_peft_model(model, LoraConfig(target_modules=["linear_x"], init_lora_weights=False))
    expected = adapted(input_ids=ids).logits
    with record_recurrences(adapted) as recorded:
        assert_close("logits", adapted(input_ids=ids).logits, expected)
    recorded[1].h.sum().backward()
    grads = {name.split(".")[-3]: each.grad for name, each in adapted.named_parameters() if each.requires_grad}
    assert grads.keys() == {"lora_A", "lora_B"} and all(grad.abs().max() > 0 for grad in grads.values())


@torch.no_grad()
def test_a_text_that_is_continued_from_a_cache(small_model):
    model, ids = small_model(), random_ids()
    with record_recurrences(model) as recorded:
        model(ids)
        whole = dict(recorded)
        cache = model(ids[:, :9]).past_key_values
        model(ids[:, 9:], past_key_values=cache)
    for layer in whole:
        for found, expected in zip(recorded[layer], whole[layer]):
            assert_close("scan float32", found, expected[:, 9:])


@torch.no_grad()
def test_generate_leaves_the_last_tokens(small_model):
    model, ids = small_model(), random_ids()
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    with record_recurrences(model) as recorded:
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)
        last = dict(recorded)
        model(expected)
    for layer in last:
        for found, whole in zip(last[layer], recorded[layer]):
            assert_close("scan float32", found, whole[:, -2:-1])  # the last token was not read any more
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)


@torch.no_grad()
def test_a_bfloat16_model_keeps_float32(small_model):
    model, ids = small_model(attention="sdpa").bfloat16(), random_ids()
    plain = model(ids).logits
    with record_recurrences(model) as recorded:
        logits = model(ids).logits
    assert {each.dtype for layer in recorded.values() for each in layer} == {torch.float32}
    assert logits.dtype == torch.bfloat16
    assert_close("bfloat16 logits", logits, plain)


@torch.no_grad()
def test_nothing_stays_behind(small_model):
    model, ids = small_model(cls=GriffinModel), random_ids()
    layers = [module for module in model.modules() if type(module) is RGLRU]
    before = [set(vars(layer)) for layer in layers]
    with pytest.raises(RuntimeError, match="mine"), record_recurrences(model) as recorded:
        model(ids)
        raise RuntimeError("mine")
    assert recorded[0].h.shape == (2, 13, 24)
    assert [set(vars(layer)) for layer in layers] == before
    assert not any(layer._forward_hooks for layer in layers)
    kept = recorded[0]
    model(ids)
    assert recorded[0] is kept


def test_what_is_refused(small_model):
    with pytest.raises(ValueError, match="without recurrent layers"), record_recurrences(small_model("attention")):
        pass
    model = small_model()
    with record_recurrences(model):
        with pytest.raises(ValueError, match="recorded already"), record_recurrences(model):
            pass
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"), record_recurrences(model):
        pass

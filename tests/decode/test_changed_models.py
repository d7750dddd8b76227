"""What people do to a model between loading and generating: each line of the list, beside the uncached model.

A step is made before each change, so that one that is kept for too long would be found.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from transformers import GenerationMixin, cache_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_griffin import GenerationRequest, GriffinForCausalLM, modeling_griffin, rg_lru
from modeling_griffin.decode import eligibility
from modeling_griffin.decode.eligibility import shared_places, unused_places
from modeling_griffin.decode.fingerprint import forward_fingerprint
from tests.tolerances import assert_close


NEW = 10  # beyond the window of 8
SIX = ["linear_attention", "linear_attention", "sliding_attention"] * 2
CHANGES = {}


def change(function):
    CHANGES[function.__name__] = function
    return function


class Shifted(nn.Module):
    """Somebody's own block: without a state."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states.roll(1, -1), None


class Wrapper(nn.Module):
    """As tools for steering and tracing put around a model's parts."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            return output + 0.3
        if isinstance(output, tuple):
            return output[0] * 1.5, *output[1:]
        output.last_hidden_state = output.last_hidden_state.flip(-1)
        return output


class Own(GriffinForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.flip(-1)
        return output


@change
def activation_of_an_mlp(model, patch):
    model.model.layers[0].mlp_block.act_fn = nn.ReLU()


@change
def activation_of_a_recurrent_block(model, patch):
    model.model.layers[0].temporal_block.act_fn = nn.Tanh()


@change
def activation_inside_the_activation(model, patch):
    model.model.layers[0].mlp_block.act_fn.act = torch.sin


@change
def forward_of_a_class(model, patch):
    forward = modeling_griffin.GriffinMLP.forward
    patch.setattr(modeling_griffin.GriffinMLP, "forward", lambda self, x: -forward(self, x))


@change
def forward_of_every_linear(model, patch):
    forward = nn.Linear.forward
    patch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) * 1.5)


@change
def function_of_a_module(model, patch):
    rotate = modeling_griffin.rotate
    patch.setattr(modeling_griffin, "rotate", lambda x, cos, sin: rotate(x, sin, cos))


@change
def scan_of_a_module(model, patch):
    scan = rg_lru.rg_lru_scan
    patch.setattr(rg_lru, "rg_lru_scan", lambda x, r, i, d, **k: scan(x, r, i, 2 * d, **k))


@change
def scan_of_a_class(model, patch):
    scan = rg_lru.rg_lru_scan
    patch.setattr(rg_lru.RGLRU, "scan", staticmethod(lambda x, r, i, d, **k: scan(x, r, i, 20 * d, **k)))


@change
def scan_of_one_module(model, patch):
    scan = rg_lru.rg_lru_scan
    model.model.layers[0].temporal_block.rg_lru.scan = lambda x, r, i, d, **k: scan(x, r, i, 20 * d, **k)


@change
def code_of_a_method(model, patch):
    """As tools put it there that reload a file when it is edited."""

    def whole(self, hidden_states):
        return -self.down_proj(hidden_states[..., :1] * self.gate_proj(hidden_states))

    patch.setattr(modeling_griffin.GriffinMLP.whole, "__code__", whole.__code__)


@change
def product_of_pytorch(model, patch):
    linear = nn.functional.linear
    patch.setattr(nn.functional, "linear", lambda x, weight, bias=None: linear(x, weight, bias) * 1.3)


@change
def attention_of_pytorch(model, patch):
    attention = nn.functional.scaled_dot_product_attention
    patch.setattr(nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: -attention(*args, **kwargs))


@change
def embedding_of_pytorch(model, patch):
    embedding = nn.functional.embedding
    patch.setattr(nn.functional, "embedding", lambda *args: embedding(*args).flip(-1))


@change
def attention_under_the_same_name(model, patch):
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    registered = lambda *args, **kwargs: (-attention(*args, **kwargs)[0], None)  # noqa: E731
    patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", registered)


@change
def wrapper_of_the_base(model, patch):
    model.model = Wrapper(model.model)


@change
def wrapper_of_each_layer(model, patch):
    model.model.layers = nn.ModuleList(Wrapper(layer) for layer in model.model.layers)


@change
def wrapper_of_each_block(model, patch):
    for layer in model.model.layers:
        layer.temporal_block = Wrapper(layer.temporal_block)


@change
def forward_of_one_module(model, patch):
    block = model.model.layers[1].mlp_block
    block.forward = lambda x: x.flip(-1)


@change
def class_of_the_model(model, patch):
    model.__class__ = Own


@change
def hook(model, patch):
    model.model.layers[1].register_forward_hook(lambda module, args, output: output.flip(-1))


@change
def hook_before(model, patch):
    model.model.final_norm.register_forward_pre_hook(lambda module, args: (args[0].roll(1, -1),))


@change
def hook_of_every_module(model, patch):
    def twice(module, args, output):
        return output * 2 if isinstance(module, modeling_griffin.GriffinMLP) else None

    handle = nn.modules.module.register_module_forward_hook(twice)
    patch.setattr(model, "remove_hook", handle.remove, raising=False)


@change
def weight_norm(model, patch):
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp_block.down_proj)
    model.model.layers[0].mlp_block.down_proj.parametrizations.weight.original0.data.mul_(1.7)


@change
def pruning(model, patch):
    prune.l1_unstructured(model.model.layers[0].mlp_block.up_proj, "weight", 0.5)


@change
def head_of_modules(model, patch):
    model.lm_head = nn.Sequential(model.lm_head, nn.Hardtanh(-0.1, 0.1))


@change
def head_with_a_bias(model, patch):
    model.lm_head.bias = nn.Parameter(torch.linspace(-3, 3, 29))


@change
def head_of_other_weights(model, patch):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0))


@change
def half_of_the_layers(model, patch):
    model.model.layers = model.model.layers[:3]


@change
def layers_without_attention(model, patch):
    model.model.layers = model.model.layers[:2]


@change
def layers_exchanged(model, patch):
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


@change
def layers_of_other_kinds_exchanged(model, patch):
    layers = model.model.layers
    layers[2], layers[3] = layers[3], layers[2]


@change
def layer_removed(model, patch):
    del model.model.layers[1]


@change
def layer_doubled(model, patch):
    model.model.layers.insert(1, model.model.layers[0])


@change
def layer_copied(model, patch):
    model.model.layers.insert(3, copy.deepcopy(model.model.layers[2]))


@change
def block_replaced(model, patch):
    model.model.layers[0].temporal_block = Shifted()


@change
def linear_of_another_class(model, patch):
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model.model.layers[0].mlp_block.gate_proj.__class__ = Scaled


@change
def quantised_linears(model, patch):
    quantised = torch.ao.quantization.quantize_dynamic(model.model.layers[0].mlp_block, {nn.Linear})
    model.model.layers[0].mlp_block = quantised


@change
def narrower_mlp(model, patch):
    block = model.model.layers[0].mlp_block
    for linear in (block.gate_proj, block.up_proj):
        linear.weight, linear.bias = nn.Parameter(linear.weight[:20]), nn.Parameter(linear.bias[:20])
        linear.out_features = 20
    block.down_proj.weight = nn.Parameter(block.down_proj.weight[:, :20])


@change
def norm_in_double(model, patch):
    model.model.final_norm.double()


@change
def embeddings_scaled(model, patch):
    model.config.scale_embeddings = True


@change
def window_of_the_configuration(model, patch):
    model.config.attention_window_size = 4


@change
def softcapping(model, patch):
    model.config.final_logit_softcapping = 0.5


@change
def eps_of_a_norm(model, patch):
    model.model.layers[0].temporal_pre_norm.eps = 3.0


@change
def theta(model, patch):
    model.model.rotary_emb.theta = 0.01


def give_a_configuration(part, **fields):
    """To a part of the model, as copying it does, or taking it from another model."""
    part.config = copy.deepcopy(part.config)
    for name, value in fields.items():
        setattr(part.config, name, value)


def turned(*args, **kwargs):
    return -sdpa_attention_forward(*args, **kwargs)[0], None


@change
def attention_of_one_block(model, patch):
    patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "turned", turned)
    give_a_configuration(model.model.layers[5].temporal_block, _attn_implementation="turned")


@change
def attention_of_one_block_twice(model, patch):
    attention_of_one_block(model, patch)
    run(model, torch.tensor([[5, 6, 7]]))
    model.model.layers[5].temporal_block.config._attn_implementation = "sdpa"


@change
def block_of_an_eager_model(model, patch):
    give_a_configuration(model.model.layers[5].temporal_block, _attn_implementation="eager")


@change
def base_of_an_eager_model(model, patch):
    give_a_configuration(model.model, _attn_implementation="eager")


@change
def window_of_the_base(model, patch):
    give_a_configuration(model.model, attention_window_size=4)


@change
def scale_of_attention(model, patch):
    model.model.layers[2].temporal_block.scaling *= 3


@change
def head_dim_of_a_block(model, patch):
    model.model.layers[2].temporal_block.head_dim = 4


@change
def exponent_of_the_decay(model, patch):
    for layer in (model.model.layers[0], model.model.layers[1]):
        layer.temporal_block.rg_lru.decay.c = 80.0


@change
def decay_in_place(model, patch):
    model.model.layers[0].temporal_block.rg_lru.decay.lambda_bias.data.add_(5)


@change
def weights_in_place(model, patch):
    for parameter in model.parameters():
        parameter.data.mul_(1.2)


@change
def weights_loaded(model, patch):
    model.load_state_dict({name: value.flip(0) for name, value in model.state_dict().items()})


@change
def weights_replaced(model, patch):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.2


@change
def another_attention(model, patch):
    model.set_attn_implementation("sdpa")
    model.model.layers[0].mlp_block.act_fn = nn.SiLU()


@change
def training_mode(model, patch):
    model.train()
    model.model.layers[0].mlp_block.act_fn = nn.SiLU()


@change
def default_dtype(model, patch):
    patch.setattr(model, "remove_hook", lambda: torch.set_default_dtype(torch.float32), raising=False)
    torch.set_default_dtype(torch.bfloat16)


@change
def lora(model, patch):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["gate_proj", "q_proj"], init_lora_weights=False), model)


@change
def lora_switched_off_and_on(model, patch):
    from peft.tuners.tuners_utils import BaseTunerLayer

    lora(model, patch)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for enabled in (False, True):
        for layer in layers:
            layer.enable_adapters(enabled)
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
    for layer in layers:
        layer.scaling["default"] *= 3


def run(model, ids, **options):
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)


def answers(model, ids):
    rows = [GenerationRequest(prompt=row.tolist(), max_new_tokens=NEW) for row in ids]
    return [result.tokens for result in model.generate_batch(rows)]


def answer_behind_a_state(model, ids):
    state = model.prefill(ids[:1, :7])
    request = GenerationRequest(prompt=ids[0, 7:].tolist(), state=state, max_new_tokens=NEW)
    return model.generate_batch([request])[0].tokens


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_generated_is_what_the_model_now_is(name, small_model, monkeypatch):
    model = small_model(layer_types=SIX, attention="sdpa" if name in OF_SDPA else "eager")
    ids = torch.randint(5, 29, (2, 11), generator=torch.Generator().manual_seed(2))
    before = run(model, ids)
    run(model, ids[:1], prompt_lookup_num_tokens=3)
    answers(model, ids)
    with monkeypatch.context() as patch:
        CHANGES[name](model, patch)
        try:
            expected = run(model, ids, use_cache=False)
            assert name in SILENT or not torch.equal(expected, before), "the change changes nothing"
            assert torch.equal(run(model, ids), expected)
            assert torch.equal(run(model, ids[:1], prompt_lookup_num_tokens=3), expected[:1])
            if shared_places(model) is None and not unused_places(model):
                new = expected[:, ids.shape[1] :].tolist()
                assert answers(model, ids) == new and answer_behind_a_state(model, ids) == new[0]
            else:
                for refused in (lambda: answers(model, ids), lambda: model.prefill(ids)):
                    with pytest.raises(ValueError, match="model.layers: "):
                        refused()
        finally:
            getattr(model, "remove_hook", lambda: None)()


OF_SDPA = ("attention_of_pytorch", "attention_under_the_same_name", "attention_of_one_block")
OF_SDPA += ("attention_of_one_block_twice", "block_of_an_eager_model", "base_of_an_eager_model")
SILENT = ("norm_in_double", "default_dtype", "softcapping")  # greedy tokens stay the same
SILENT += ("attention_of_one_block_twice", "block_of_an_eager_model", "base_of_an_eager_model")  # so do the logits


@pytest.mark.parametrize("kinds", [("sdpa", "eager"), ("eager", "sdpa"), ("sdpa", "sdpa", "eager")])
@pytest.mark.parametrize("length", [6, 11, 30], ids=["in the window", "beyond it", "beyond two"])
@torch.no_grad()
def test_blocks_of_several_attentions(kinds, length, small_model):
    """Made for another attention than the model's, they see what they saw: no future, no padding, no more than W."""
    model, plain = small_model(layer_types=SIX, attention=kinds[0]), small_model(layer_types=SIX, attention="eager")
    for part, kind in zip((model.model.layers[2].temporal_block, model.model.layers[5].temporal_block), kinds[1:]):
        give_a_configuration(part, _attn_implementation=kind)
    ids, mask = torch.randint(5, 29, (2, length)), torch.ones(2, length, dtype=torch.long)
    mask[0, :3] = 0
    for arguments in ({}, {"attention_mask": mask}, {"position_ids": torch.arange(length) % 4}):
        found, expected = (some(ids, use_cache=False, **arguments).logits for some in (model, plain))
        real = mask.bool() if "attention_mask" in arguments else torch.ones_like(mask).bool()
        assert_close("logits", found[real], expected[real])
    static = {"cache_implementation": "static", "disable_compile": True}
    for options in ({}, static, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}):
        rows = ids[:1] if "prompt_lookup_num_tokens" in options else ids
        assert torch.equal(run(model, rows, **options), run(plain, rows, **options))


def flipped(function):
    return lambda self, *args, **kwargs: function(self, *args, **kwargs).flip(-1)


def negated(function):
    """Of keys and values, or of states: what a cache keeps is another thing."""
    return lambda self, first, second, *args, **kwargs: function(
        self, -first, -second if isinstance(second, torch.Tensor) else second, *args, **kwargs
    )


def with_other_logits(function):
    def turned(self, *args, **kwargs):
        found = function(self, *args, **kwargs)
        outputs = next(each for each in (found, *args, *kwargs.values()) if hasattr(each, "logits"))
        outputs.logits = -outputs.logits
        return found

    return turned


def with_other_ids(function):
    def shifted(self, *args, **kwargs):
        inputs = function(self, *args, **kwargs)
        return {**inputs, "input_ids": (inputs["input_ids"] + 1) % 29}

    return shifted


@pytest.mark.parametrize(
    "place, name, change",
    [
        (GenerationMixin, "_sample", flipped),
        (GenerationMixin, "_assisted_decoding", flipped),
        (GenerationMixin, "_prefill", with_other_logits),
        (GenerationMixin, "prepare_inputs_for_generation", with_other_ids),
        (GriffinForCausalLM, "_prefill", with_other_logits),
        (cache_utils.Cache, "update", negated),
        (cache_utils.DynamicSlidingWindowLayer, "update", negated),
        (cache_utils.LinearAttentionLayer, "update_recurrent_state", negated),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_transformers_functions_that_were_replaced(place, name, change, small_model, monkeypatch):
    """By tools that put loops or caches of their own there: what `generate` computes is theirs, as of a Llama."""
    model, ids = small_model(layer_types=SIX), torch.randint(5, 29, (1, 11))
    lookup = {"prompt_lookup_num_tokens": 3}
    ways = [lookup] if name == "_assisted_decoding" else [{}] if name == "_sample" else [{}, lookup]
    before = [run(model, ids, **way) for way in ways]
    monkeypatch.setattr(place, name, change(getattr(place, name)), raising=False)
    found = [run(model, ids, **way) for way in ways]
    monkeypatch.setattr(GriffinForCausalLM, "_fast_generation_devices", ())
    assert not torch.equal(found[0], before[0]), "the change changes nothing"
    for each, way in zip(found, ways):
        assert torch.equal(each, run(model, ids, **way))


def test_a_recording_holds_what_stood_there(small_model, monkeypatch):
    """Functions that a forward calls by name: replaced once more, a recording is of the one before."""
    model, before = small_model(), []
    for place, name in (
        (modeling_griffin, "rotate"),
        (nn.functional, "linear"),
        (modeling_griffin.GriffinMLP, "forward"),
    ):
        for _ in range(2):
            before.append(forward_fingerprint(model))
            monkeypatch.setattr(place, name, lambda *args: None)
            assert forward_fingerprint(model) not in before


def test_a_mode_of_the_users_is_no_part_of_a_step(small_model):
    class Louder(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            return output * 1.4 if function is nn.functional.linear else output

    model, ids = small_model(), torch.tensor([[5, 6, 7]])
    before = run(model, ids)
    with torch.device("cpu"):  # a mode of PyTorch's own
        assert next(eligibility.ineligible_model_reasons(model), None) is None
    with Louder():
        assert next(eligibility.ineligible_model_reasons(model)) == "a Louder"
        expected = run(model, ids, use_cache=False)
        assert torch.equal(run(model, ids), expected)
    assert not torch.equal(expected, before) and torch.equal(run(model, ids), before)


def test_one_step_serves_a_model_that_stays_as_it_is(small_model):
    """And one that was only looked at: hooks of output capturing stay behind, train() and eval() leave no trace."""
    from modeling_griffin.decode.steps import STEPS

    model, ids = small_model(), torch.tensor([[5, 6, 7]])
    run(model, ids)
    before = {key: list(steps) for key, steps in STEPS[model].items()}
    model(ids, output_hidden_states=True)
    model.train()
    model.eval()
    model.generate(ids, max_new_tokens=3)
    assert {key: list(steps) for key, steps in STEPS[model].items()} == before
    assert next(eligibility.ineligible_model_reasons(model), None) is None


class Changing:
    """A streamer that changes the model behind the third token."""

    def __init__(self, change):
        self.change, self.seen = change, 0

    def put(self, value):
        self.seen += 1
        if self.seen == 4:  # the prompt is the first
            self.change()

    def end(self):
        pass


def test_a_streamer_that_changes_the_model(small_model, monkeypatch):
    """A call is not watched: values that are written in place count at once, as in Transformers' loop, and modules at
    the next call."""
    model, ids = small_model(), torch.tensor([[5, 6, 7]])
    weight, before = model.lm_head.weight, run(model, torch.tensor([[5, 6, 7]]))

    def turn():
        with torch.no_grad():
            weight.copy_(weight.flip(0))

    found = run(model, ids, streamer=Changing(turn))
    turn()
    with monkeypatch.context() as patch:
        patch.setattr(GriffinForCausalLM, "_fast_generation_devices", ())
        expected = run(model, ids, streamer=Changing(turn))
    assert torch.equal(found, expected) and not torch.equal(found, before)
    turn()
    flip = lambda module, args, output: output.flip(-1)  # noqa: E731
    change = Changing(lambda: model.model.layers[1].register_forward_hook(flip))
    assert torch.equal(run(model, ids, streamer=change), before)
    assert torch.equal(run(model, ids), run(model, ids, use_cache=False)) and not torch.equal(run(model, ids), before)

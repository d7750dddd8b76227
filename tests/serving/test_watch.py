"""A model that changes between two tokens of a stream: the stream raises, but not where somebody only looked at it.

What the error says of each change is in its docstring.
"""

import copy
import gc
import threading
import time

import numpy
import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers

from modeling_griffin import GenerationRequest
from modeling_griffin.decode.agreement import CHECKING
from modeling_griffin.decode.steps import STEPS
from modeling_griffin.serving import recorded_rows
from modeling_griffin.serving.watch import Watch
from tests.serving.test_batch import random_ids


KINDS = ["fused", "forward", "cached"]
CHANGES = {}


def change(function):
    CHANGES[function.__name__] = function
    return function


def lora():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["gate_proj", "q_proj"], init_lora_weights=False)


@change
def weights_loaded(model):
    """the values of model.embed_tokens.weight"""
    model.load_state_dict({name: value.flip(0) for name, value in model.state_dict().items()})


@change
def weights_loaded_by_assignment(model):
    """a stream: model.embed_tokens.weight;"""
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


@change
def in_place(model):
    """the values of lm_head.weight"""
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)


@change
def in_place_under_inference_mode(model):
    """the values of model.final_norm.weight"""
    with torch.inference_mode():
        model.model.final_norm.weight.add_(1)


@change
def data_replaced(model):
    """the values of lm_head.weight"""
    model.lm_head.weight.data = model.lm_head.weight.data * 2


@change
def another_dtype(model):
    """the values of model.embed_tokens.weight"""
    model.to(torch.bfloat16)


@change
def step_of_an_optimizer(model):
    """an optimizer made a step"""
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()  # which PyTorch does not count


@change
def training(model):
    """a stream: training;"""
    model.train()


@change
def window_of_the_configuration(model):
    """config.attention_window_size"""
    model.config.attention_window_size = 4


@change
def another_attention(model):
    """config._attn_implementation_internal"""
    model.set_attn_implementation("sdpa" if model.config._attn_implementation == "eager" else "eager")


@change
def hook(model):
    """a hook of model.layers.1;"""
    model.model.layers[1].register_forward_hook(lambda module, args, output: output)


@change
def hook_before(model):
    """a hook of model.final_norm;"""
    model.model.final_norm.register_forward_pre_hook(lambda module, args: None)


@change
def forward_of_a_module(model):
    """model.layers.0.mlp_block.forward"""
    model.model.layers[0].mlp_block.forward = lambda x: x


@change
def eps_of_a_norm(model):
    """model.final_norm.eps"""
    model.model.final_norm.eps = 3.0


@change
def module_replaced(model):
    """model.layers.2.mlp_block"""
    model.model.layers[2].mlp_block = copy.deepcopy(model.model.layers[2].mlp_block)


@change
def layer_removed(model):
    """a stream: model.layers;"""
    del model.model.layers[2]


@change
def head_with_a_bias(model):
    """lm_head.bias;"""
    model.lm_head.bias = nn.Parameter(torch.zeros(29))


@change
def adapter_attached(model):
    """a stream: peft_config;"""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(lora(), model)


CHANGES_OF_ADAPTERS = {
    "switched off": lambda layers: [layer.enable_adapters(False) for layer in layers],
    "scaled": lambda layers: [layer.set_scale("default", 3) for layer in layers],
    "merged": lambda layers: [layer.merge() for layer in layers],
    "another one": lambda layers: [layer.set_adapter("other") for layer in layers],
    "removed": lambda layers: [layer.delete_adapter("default") for layer in layers],
}


@pytest.fixture
def make(small_model, monkeypatch):
    """A model whose streams run on a step of this kind."""

    def made(kind):
        model = small_model()
        if kind != "fused":
            model.model.layers[0].mlp_block.act_fn = nn.SiLU()
        if kind == "forward":
            monkeypatch.setattr(recorded_rows, "RECORDED_ON", ("cpu",))
        return model.eval()

    return made


def stream_of(model, rows=1, new=9):
    prompts = random_ids(rows, 4)
    return model.stream_batch([GenerationRequest(prompt.tolist(), max_new_tokens=new) for prompt in prompts])


def is_free(model):
    return not any(step.busy for steps in STEPS.get(model, {}).values() for step in steps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_stream_raises_at_the_next_token(name, kind, make):
    model = make(kind)
    stream = stream_of(model)
    next(stream), next(stream)
    CHANGES[name](model)
    with pytest.raises(RuntimeError, match="between two tokens of a stream: .*; allowed is to change it when") as error:
        next(stream)
    assert CHANGES[name].__doc__ in str(error.value)
    assert is_free(model) and [*stream] == []


@pytest.mark.parametrize("name", CHANGES_OF_ADAPTERS)
def test_adapters_that_change(name, make):
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = make("fused")
    inject_adapter_in_model(lora(), model)
    inject_adapter_in_model(lora(), model, "other")
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.set_adapter("default")
    stream = stream_of(model)
    next(stream)
    CHANGES_OF_ADAPTERS[name](layers)
    with pytest.raises(RuntimeError, match="changed between two tokens"):
        next(stream)


@pytest.mark.parametrize("kind", KINDS)
def test_what_only_looks_at_the_model_changes_nothing(kind, make):
    """Calls of the model and of generate, hooks that capture outputs, train() and back, a generation configuration."""
    model, ids = make(kind), random_ids(2, 5)
    expected = [token for token in stream_of(model)]
    stream = stream_of(model)
    found = [next(stream)]
    model(ids, output_hidden_states=True)
    found.append(next(stream))
    model.generate(ids, max_new_tokens=3, num_beams=2, pad_token_id=0)
    model.generate_batch([GenerationRequest([5, 6], max_new_tokens=3)])
    found.append(next(stream))
    model.train().eval()
    model.generation_config = copy.deepcopy(model.generation_config)
    model.config.use_cache = True
    found.append(next(stream))
    model.zero_grad()
    other = nn.Linear(2, 2)
    other(torch.ones(2)).sum().backward()
    torch.optim.SGD(other.parameters(), 0.1).step()  # of another model
    assert found + [*stream] == expected


def test_what_a_module_leaves_in_itself_is_the_streams_own_doing(make):
    model = make("cached")
    norm = model.model.final_norm
    norm.register_buffer("calls", torch.zeros(()))

    def remember(module, args, output):
        module.calls.add_(1)
        module.seen = output

    norm.register_forward_hook(remember)
    assert len([*stream_of(model, rows=2)]) == 18 and norm.calls >= 9


def test_tokens_of_the_step_before_come_first(make):
    """A step finds a token of each row; the stream raises before it takes another."""
    model = make("fused")
    stream = stream_of(model, rows=3)
    found = [next(stream) for _ in range(4)]
    model.train()
    with pytest.raises(RuntimeError):
        while True:
            found.append(next(stream))
    assert [token.index for token in found] == [0, 1, 2, 0, 1, 2]


def test_a_queue_that_changes_the_model(make):
    model = make("fused")

    def queue():
        yield GenerationRequest([5, 6], max_new_tokens=5)
        model.train()
        yield GenerationRequest([7], max_new_tokens=5)

    with pytest.raises(RuntimeError, match="training"):
        model.generate_batch(queue(), max_rows=1)
    assert is_free(model)


def test_a_stream_that_ended_or_was_closed_watches_no_more(make):
    model = make("fused")
    expected, stream = [*stream_of(model)], stream_of(model)
    for _ in expected:
        next(stream)
    model.train()
    assert [*stream] == []
    stream = stream_of(model.eval())
    next(stream)
    stream.close()
    listening = len(optimizers._global_optimizer_post_hooks)
    stream = stream_of(model)
    next(stream)
    assert len(optimizers._global_optimizer_post_hooks) == listening + 1
    del stream
    gc.collect()
    assert len(optimizers._global_optimizer_post_hooks) == listening and is_free(model)


def test_what_another_threads_new_step_puts_into_the_model_for_a_moment(make):
    model = make("fused")
    expected, stream, found = [*stream_of(model)], stream_of(model), []
    found.append(next(stream))
    thread = threading.Thread(target=lambda: found.extend(stream))
    with CHECKING:
        handle = model.model.layers[1].register_forward_hook(lambda module, args, output: None)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and len(found) == 1
        handle.remove()
    thread.join()
    assert found == expected


def test_an_array_in_the_place_of_another(make):
    model = make("fused")
    model.array = numpy.ones(3)
    stream = stream_of(model)
    next(stream)
    model.array = numpy.zeros(3)
    with pytest.raises(RuntimeError, match="a stream: array;"):
        next(stream)


def test_weights_made_under_inference_mode(small_model):
    """They are not counted; that another tensor is there is found all the same."""
    with torch.inference_mode():
        model = small_model()
    stream = stream_of(model)
    next(stream)
    with torch.inference_mode():
        model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2, requires_grad=False)
    with pytest.raises(RuntimeError, match="lm_head"):
        next(stream)


def test_looking_costs_little_and_grows_with_the_model_alone(small_model):
    """For 435 modules and 484 parameters 0.2 ms: less than half a microsecond each."""
    model = small_model(layer_types=["linear_attention", "linear_attention", "sliding_attention"] * 8)
    watch, times = Watch(model), []
    for _ in range(50):
        begin = time.perf_counter()
        watch.check()
        times.append(time.perf_counter() - begin)
    watch.close()
    assert min(times) < 2e-6 * (len(list(model.modules())) + len(list(model.parameters())))

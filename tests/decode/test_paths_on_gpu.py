"""The paths of `generate` on a GPU, where steps are recorded: in float32, beside Transformers' own loop."""

import threading

import pytest
import torch
from test_generation_paths import REQUESTS, assert_same, by_transformers, collect, random_ids, run
from torch import nn

from modeling_griffin.decode.steps import STEPS
from modeling_griffin.kernels.capture import capture


KINDS = ["griffin", "hawk", "attention_first"]
ON_STEPS = [name for name, (_, path) in REQUESTS.items() if path[0] != "transformers"]
pytestmark = pytest.mark.gpu


def activation(model):
    model.model.layers[0].mlp_block.act_fn = nn.SiLU()


def hook(model):
    model.model.layers[0].mlp_block.register_forward_hook(lambda module, args, output: output.flip(-1))


def adapters(model):
    from peft import LoraConfig, inject_adapter_in_model

    options = {"target_modules": "all-linear", "init_lora_weights": False, "use_dora": True}
    inject_adapter_in_model(LoraConfig(r=2, **options), model).eval()


def head(model):
    model.lm_head = nn.Sequential(model.lm_head, nn.LeakyReLU(0.3))  # keeps the order, and errors as small as they were


def recorded(model) -> list[str]:
    steps = [step for steps in STEPS[model].values() for step in steps if step.failed is None]
    return [type(step).__name__ for step in steps if step.graph is not None]


@pytest.mark.parametrize("name", ON_STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_requests_on_the_recorded_step(kind, name, small_model, monkeypatch):
    model, ids = small_model(kind).cuda(), random_ids(3, 9).cuda()
    mask = (torch.arange(9) >= torch.tensor([[0], [4], [8]])).long().cuda()
    options = {"attention_mask": mask, "eos_token_id": [7, 8]}
    expected = by_transformers(monkeypatch, model, ids, **options, **REQUESTS[name][0]())
    assert_same(run(model, ids, **options, **REQUESTS[name][0]()), expected)
    assert len(recorded(model)) == 1


@pytest.mark.parametrize("name", ["greedy", "own processor", "beams with scores", "hidden states"])
@pytest.mark.parametrize("change", [activation, hook, adapters, head])
@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_is_recorded(kind, change, name, small_model, monkeypatch):
    model, ids = small_model(kind), random_ids(2, 6).cuda()
    change(model)
    model.cuda()
    expected = by_transformers(monkeypatch, model, ids, **REQUESTS[name][0]())
    assert_same(run(model, ids, **REQUESTS[name][0]()), expected)
    assert recorded(model) == ["ForwardStep"]


def test_adapters_that_are_switched_are_recorded_anew(small_model):
    from peft.tuners.tuners_utils import BaseTunerLayer

    model, ids = small_model(), random_ids(2, 6).cuda()
    adapters(model)
    model.cuda()
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for enabled in (True, False, True):
        for layer in layers:
            layer.enable_adapters(enabled)
        assert torch.equal(run(model, ids), run(model, ids, use_cache=False))


def test_python_that_has_to_run_is_not_recorded(small_model, paths):
    model, ids = small_model().cuda(), random_ids(1, 5).cuda()
    seen = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(1))
    run(model, ids)
    assert len(seen) == 12 and paths[0].step == "transformers" and "holds a list" in paths[0].obstacle.reason
    other = small_model().cuda()
    other.model.layers[0].mlp_block.register_forward_hook(collect)
    run(other, ids)
    assert paths[1].step == "transformers"


def test_a_host_read_fails_to_be_recorded_and_the_loop_runs(small_model, monkeypatch):
    """`item()` cannot be seen beforehand: the recording fails, the answer is the loop's."""
    model, ids = small_model().cuda(), random_ids(2, 5).cuda()
    model.model.layers[0].mlp_block.register_forward_hook(
        lambda module, args, output: output * (2.0 if output.sum().item() > 0 else 0.5)  # of all tokens of the call
    )
    expected = by_transformers(monkeypatch, model, ids)
    for _ in range(2):
        assert torch.equal(run(model, ids), expected)
    assert recorded(model) == []


def test_a_failed_recording_gives_back_streams_and_random_numbers():
    """A hook that reads a value does not take sampling from the rest of the process."""
    x, stream = torch.ones(2, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(RuntimeError), capture(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.rand(2, device="cuda")
        x.sum().item()
    assert torch.cuda.current_stream() == stream
    assert torch.rand(2, device="cuda").isfinite().all()


@pytest.mark.parametrize("number", [2, 8])
def test_threads_on_streams_of_their_own(number, small_model):
    model = small_model().cuda()
    prompts = [random_ids(1, 3 + index).cuda() for index in range(number)]
    expected, found = [run(model, ids) for ids in prompts], [None] * number

    def call(index):
        with torch.cuda.stream(torch.cuda.Stream()):
            found[index] = [run(model, prompts[index], do_sample=False).cpu() for _ in range(3)]

    threads = [threading.Thread(target=call, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(tokens, right.cpu()) for each, right in zip(found, expected) for tokens in each)
    assert len(recorded(model)) == 1

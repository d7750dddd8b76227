"""The engine on a GPU, where steps are recorded and the host is ahead of them: each row finds what it finds alone."""

import threading

import pytest
import torch

from modeling_griffin import GenerationRequest
from modeling_griffin.decode.steps import STEPS
from modeling_griffin.serving.packed_prefill import read_packed
from tests.serving.test_batch import greedy_alone, mixed_load, random_ids
from tests.tolerances import assert_close


pytestmark = pytest.mark.gpu
SETTINGS = [{}, {"temperature": 0.8, "top_p": 0.9}, {"repetition_penalty": 1.5}, {"temperature": 1.2, "min_p": 0.05}]


def load_on_gpu(number, seed):
    return [(prompt.cuda(), new + 4) for prompt, new in mixed_load(number, seed)]


@pytest.mark.parametrize("kind", ["griffin", "hawk", "attention_first"])
def test_each_finds_what_it_finds_alone(kind, small_model):
    """Greedy as by Transformers' loop; sampled, penalised and ended by an end token as in a batch of one."""
    model, load = small_model(kind).cuda(), load_on_gpu(20, seed=8)
    queue = [GenerationRequest(prompt, max_new_tokens=new) for prompt, new in load]
    for (prompt, new), result in zip(load, model.generate_batch(queue, max_rows=6)):
        assert result.tokens == greedy_alone(model, prompt, new)
    ends = greedy_alone(model, *load[0])[2:4]
    queue = [
        GenerationRequest(prompt, max_new_tokens=new, seed=number, eos_token_id=ends, **SETTINGS[number % 4])
        for number, (prompt, new) in enumerate(load)
    ]
    alone = [model.generate_batch([request])[0] for request in queue]
    assert model.generate_batch(queue, max_rows=7, prefill_chunk_size=9) == alone
    assert any(result.finish_reason == "eos" for result in alone)
    assert all(step.graph is not None for steps in STEPS[model].values() for step in steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_prompts_on_a_gpu(dtype, small_model):
    """Short passes and one over more tokens than the attention kernels ask for."""
    model = small_model("griffin", "sdpa").to("cuda", dtype)
    for lengths in ((1, 5, 30), (700, 2, 900, 41, 1200)):
        prompts = [random_ids(1, length, seed=length)[0].tolist() for length in lengths]
        packed = read_packed(model, prompts)
        for number, prompt in enumerate(prompts):
            expected = model.prefill(torch.tensor([prompt])).logits[0]
            if dtype == torch.float32:
                assert_close("logits", packed.logits[number], expected)
            else:
                assert (packed.logits[number] - expected).abs().max() <= 0.05 * expected.abs().max()


def test_adapters_run_on_the_recorded_forward_pass(small_model):
    from peft import LoraConfig, inject_adapter_in_model

    model, load = small_model("griffin"), load_on_gpu(9, seed=3)
    inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), model).eval().cuda()
    expected = [greedy_alone(model, prompt, new) for prompt, new in load]
    queue = [GenerationRequest(prompt, max_new_tokens=new) for prompt, new in load]
    assert [result.tokens for result in model.generate_batch(queue, max_rows=4)] == expected
    assert [key[0] for key in STEPS[model] if key[1] == 4] == ["forward"]


@pytest.mark.parametrize("number", [2, 8])
def test_threads_on_streams_of_their_own(number, small_model):
    model, found = small_model("griffin").cuda(), [None] * number
    queues = [
        [GenerationRequest(prompt, max_new_tokens=new) for prompt, new in load_on_gpu(6, seed)]
        for seed in range(number)
    ]
    expected = [model.generate_batch(queue) for queue in queues]

    def call(index):
        with torch.cuda.stream(torch.cuda.Stream()):
            found[index] = [model.generate_batch(queues[index]) for _ in range(2)]

    threads = [threading.Thread(target=call, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[each, each] for each in expected]
    assert len([step for steps in STEPS[model].values() for step in steps]) == 1

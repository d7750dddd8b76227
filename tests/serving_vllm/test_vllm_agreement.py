"""Tokens and log-probabilities of vLLM are those of `generate`, in float32. Run by `make test-vllm`."""

import pytest
import torch
from engines import GREEDY, check_greedy, check_logprobs, prompts, run_engine, save_model


pytestmark = pytest.mark.vllm

# Six requests of two states each and up to two blocks of keys, 256 tokens long on a CPU and 288 on a GPU: all begin in
# their first block, are there together, and outgrow it while the cache has too few left.
PREEMPTED = (235, 228, 221, 214, 207, 200)
PREEMPTING_BLOCKS = (20, 16, 13)  # until some are preempted
LENGTHS = (1, 2, 5, 47, 48, 49, 63, 64, 65, 150, 300)  # below, at and beyond window 48 and chunks of 64
RECORDED = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}  # CUDA graphs without a compiler
MODELS = {
    "hawk": {"layer_types": ["linear_attention"] * 3},
    "recurrent_gemma": {
        "final_logit_softcapping": 30.0,
        "scale_embeddings": True,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "num_attention_heads": 2,
        "num_gate_blocks": 2,
        "lru_width": 128,
        "attention_window_size": 33,
    },
    "wide_heads": {"num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": False, "conv1d_width": 3},
}


@pytest.fixture(scope="module")
def griffin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("griffin")
    return folder, save_model(folder)


def test_griffin_while_requests_come_and_go(griffin, tmp_path):
    """All lengths, then 40 requests of mixed lengths that arrive while others run; prompt_logprobs for some."""
    folder, model = griffin
    sizes = torch.randint(1, 120, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    every = prompts(*LENGTHS, *sizes)
    requests = [{"prompt": p, "params": GREEDY, "arrival": max(0, i - len(LENGTHS)) * 2} for i, p in enumerate(every)]
    for request in requests[::5]:
        request["params"] = {**GREEDY, "prompt_logprobs": 0}
    report = run_engine(tmp_path, folder, requests)
    largest = max(check_greedy(model, r["prompt"], o) for r, o in zip(requests, report["results"]))
    assert any(o["prompt_logprobs"] for o in report["results"])
    print(f"griffin: {len(requests)} requests, {report['steps']} steps, largest difference {largest:.1e}")


@pytest.mark.gpu
@pytest.mark.parametrize("options", [RECORDED, {"compiled": True}], ids=["recorded", "compiled"])
@pytest.mark.parametrize("runner", ["1", "0"], ids=["newer_runner", "older_runner"])
def test_cuda_graphs(griffin, tmp_path, monkeypatch, options, runner):
    """Decode steps from CUDA graphs, with fewer requests than a graph has rows; other prompts as above."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    folder, model = griffin
    every = prompts(*LENGTHS, *range(3, 99, 7))
    requests = [{"prompt": p, "params": GREEDY, "arrival": max(0, i - len(LENGTHS)) * 2} for i, p in enumerate(every)]
    report = run_engine(tmp_path, folder, requests, enforce_eager=False, **options)
    largest = max(check_greedy(model, r["prompt"], o) for r, o in zip(requests, report["results"]))
    print(f"CUDA graphs: largest difference {largest:.1e}")


@pytest.mark.parametrize("name", MODELS)
def test_other_models(name, tmp_path):
    model = save_model(tmp_path / name, **MODELS[name])
    requests = [{"prompt": p, "params": GREEDY} for p in prompts(*LENGTHS)]
    report = run_engine(tmp_path, tmp_path / name, requests)
    largest = max(check_greedy(model, r["prompt"], o) for r, o in zip(requests, report["results"]))
    print(f"{name}: largest difference {largest:.1e}")


def test_prefix_cache(griffin, tmp_path):
    """The same prompts again, prompts that share a beginning, and what was generated as part of the next prompt."""
    folder, model = griffin
    long, other = prompts(300, 200)
    # Only whole blocks are shared: of 256 tokens on a CPU, of 288 on a GPU.
    every = [long, other, long, long[:295] + other[:40], long + other[:150]]
    requests = [{"prompt": p, "params": GREEDY, "arrival": 60 * i} for i, p in enumerate(every)]
    report = run_engine(tmp_path, folder, requests, enable_prefix_caching=True, max_num_batched_tokens=256)
    for request, result in zip(requests, report["results"]):
        check_greedy(model, request["prompt"], result)
    cached = [result["cached_tokens"] for result in report["results"]]
    print("prefix cache: cached tokens", cached)
    assert cached[0] == cached[1] == 0 and min(cached[2:]) > 0


def test_preemption(griffin, tmp_path):
    """More requests than the cache holds: some are preempted, and go on as if nothing had been."""
    folder, model = griffin
    requests = [{"prompt": p, "params": {**GREEDY, "max_tokens": 100}} for p in prompts(*PREEMPTED)]
    for blocks in PREEMPTING_BLOCKS:
        report = run_engine(tmp_path, folder, requests, num_gpu_blocks_override=blocks)
        preemptions = report["counters"]["vllm:num_preemptions"]
        print(f"preemptions with {blocks} blocks: {preemptions}")
        for request, result in zip(requests, report["results"]):
            check_greedy(model, request["prompt"], result, tokens=100)
        if preemptions > 0:
            return
    pytest.fail("no request was preempted")


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none")
def test_tensor_parallel(griffin, tmp_path):
    folder, model = griffin
    requests = [{"prompt": p, "params": GREEDY} for p in prompts(*LENGTHS[::2])]
    report = run_engine(
        tmp_path,
        folder,
        requests,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        disable_custom_all_reduce=True,
    )
    largest = max(check_greedy(model, r["prompt"], o) for r, o in zip(requests, report["results"]))
    print(f"tensor parallel 2: largest difference {largest:.1e}")


def test_stop_strings_and_sampling(griffin, tmp_path):
    folder, model = griffin
    (prompt,) = prompts(20)
    with torch.no_grad():
        greedy = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
    stop = greedy[0, 24].item()
    seeded = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 7, "max_tokens": 16, "logprobs": 0}
    params = [
        {**GREEDY, "stop_token_ids": [stop]},
        {**seeded, "ignore_eos": True},
        {**seeded, "ignore_eos": True},
        {"temperature": 0.0, "max_tokens": 16, "logit_bias": {"256": 100.0}},
        {**GREEDY, "repetition_penalty": 1.3, "min_tokens": 4},
    ]
    report = run_engine(tmp_path, folder, [{"prompt": prompt, "params": p} for p in params])
    stopped, once, again, ended, penalised = report["results"]
    assert stopped["tokens"][-1] == stop and stopped["stop_reason"] == stop and len(stopped["tokens"]) <= 5
    assert once["tokens"] == again["tokens"] != greedy[0, 20:].tolist()
    assert ended["finish_reason"] == "stop" and len(ended["tokens"]) == 1
    with torch.no_grad():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, repetition_penalty=1.3)
    assert penalised["tokens"] == expected[0, 20:].tolist()


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.15), ("float16", 0.03)])
def test_half_precision(griffin, tmp_path, dtype, tolerance):
    """Near the float32 model on the tokens it chose; states and Λ stay float32."""
    folder, model = griffin
    requests = [{"prompt": p, "params": {**GREEDY, "prompt_logprobs": 0}} for p in prompts(1, 30, 150)]
    report = run_engine(tmp_path, folder, requests, dtype=dtype)
    for request, result in zip(requests, report["results"]):
        check_logprobs(model, request["prompt"], result, tolerance)


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param("float32", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="refused on a GPU")),
        "bfloat16",
    ],
)
def test_lora(tmp_path, dtype):
    """An adapter on every linear layer, saved by PEFT; behind it requests without, in the same engine.

    Not in one batch: vLLM's operators for a CPU take "no adapter", -1, for the last one there is.
    """
    from peft import LoraConfig, get_peft_model

    from modeling_griffin import LORA_TARGETS

    folder = tmp_path / "base"
    model = save_model(folder)
    targets = [name for kind in ("recurrent", "attention", "mlp") for name in LORA_TARGETS[kind]]
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    every = prompts(5, 90)
    requests = [{"prompt": p, "params": GREEDY, "lora": str(tmp_path / "adapter")} for p in every]
    requests += [{"prompt": p, "params": GREEDY, "arrival": 100} for p in every]
    report = run_engine(tmp_path, folder, requests, dtype=dtype, enable_lora=True, max_lora_rank=8)
    if dtype == "float32":
        check, tolerance = check_greedy, 2e-5
    else:
        check, tolerance = check_logprobs, 0.15  # as in test_half_precision; without the adapter: 3 and more
    for prompt, result in zip(every, report["results"][:2]):
        check(adapted, prompt, result, tolerance)
    with adapted.disable_adapter():
        for prompt, result in zip(every, report["results"][2:]):
            check(adapted, prompt, result, tolerance)

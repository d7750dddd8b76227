"""Small models in folders, and vLLM engines over them, judged by this package's own `generate`. No tests here."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_griffin import GriffinConfig, GriffinForCausalLM


SMALL = {
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 32,
    "num_gate_blocks": 4,
    "lru_width": 192,
    "attention_window_size": 48,
    "eos_token_id": 256,
    "bos_token_id": 257,
    "pad_token_id": 258,
}
ENGINE = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_batched_tokens": 64,  # prompts beyond it are prefilled in chunks
    "max_num_seqs": 8,
    "enforce_eager": True,
    "enable_prefix_caching": False,
}
if torch.cuda.is_available():
    ENGINE |= {"kv_cache_memory_bytes": 2**30, "gpu_memory_utilization": 0.05}  # several engines find room on one GPU
GREEDY = {"temperature": 0.0, "max_tokens": 16, "logprobs": 0, "ignore_eos": True}
# vLLM compiles its sampler at the first token, which takes longer than all that these tests do with it. Its attention
# by Triton rounds the factors of float32 products to TF32 unless it is told not to.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TORCHDYNAMO_DISABLE": "1",
    "TRITON_F32_DEFAULT": "ieee",
}
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


def save_model(folder: Path, **fields) -> GriffinForCausalLM:
    """A model with random weights, large enough to prefer some tokens, and a tokenizer of bytes."""
    torch.manual_seed(0)
    model = GriffinForCausalLM(GriffinConfig(**{**SMALL, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and "lambda" not in name or "norm" in name:
                parameter.normal_(std=0.1)  # or nothing would show that they are loaded
    model.save_pretrained(folder)
    save_tokenizer(folder)
    model.generation_config.eos_token_id = None  # here as in vLLM with ignore_eos
    return model


def save_tokenizer(folder: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<begin>", pad_token="<pad>"
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def run_engine(tmp_path: Path, folder: Path, requests: list[dict], compiled: bool = False, **engine) -> dict:
    job = tmp_path / f"job_{time.monotonic_ns()}.json"
    job.write_text(json.dumps({"folder": str(folder), "engine": {**ENGINE, **engine}, "requests": requests}))
    in_process = "0" if engine.get("tensor_parallel_size", 1) == 1 else "1"
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": in_process}
    if compiled:
        del environment["TORCHDYNAMO_DISABLE"]
    if in_process == "1":
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    command = [sys.executable, str(Path(__file__).parent / "engine_program.py"), str(job)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-6000:]
    return json.loads(job.with_suffix(".out.json").read_text())


@torch.no_grad()
def check_greedy(model, prompt, result, tolerance=2e-5, tokens=16) -> float:
    """The tokens of `generate`, and its log-probabilities; returns the largest difference."""
    ids = torch.tensor([prompt])
    expected = model.generate(ids, max_new_tokens=tokens, do_sample=False, attention_mask=ids * 0 + 1)
    assert result["tokens"] == expected[0, len(prompt) :].tolist(), f"prompt of {len(prompt)} tokens"
    return check_logprobs(model, prompt, result, tolerance)


@torch.no_grad()
def check_logprobs(model, prompt, result, tolerance=2e-5) -> float:
    every = torch.tensor([prompt + result["tokens"]])
    logprobs = model(every).logits.float().log_softmax(-1)[0, :-1].gather(1, every[0, 1:, None])[:, 0]
    largest = (logprobs[len(prompt) - 1 :] - torch.tensor(result["logprobs"])).abs().max().item()
    if result["prompt_logprobs"] is not None and len(prompt) > 1:
        shown = torch.tensor(result["prompt_logprobs"][1:])
        largest = max(largest, (logprobs[: len(prompt) - 1] - shown).abs().max().item())
    assert largest <= tolerance, f"prompt of {len(prompt)} tokens: {largest:.1e}"
    return largest


@contextmanager
def server(folder: Path, tmp_path: Path):
    """What `vllm serve FOLDER` starts, on a free port; yields its address.

    By its module: the command `vllm` asks for the version of a package of that name, which the build for a CPU is not.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    command += ["--served-model-name", "griffin", "--max-num-seqs", "8"]
    log = tmp_path / "server.log"
    # Started in the model's folder, whose modeling_griffin.py is not the package: -m would look there first.
    environment = {**os.environ, **ENVIRONMENT, "PYTHONSAFEPATH": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=tmp_path)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def wait_for(address, process, log, seconds=600):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-6000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-6000:])

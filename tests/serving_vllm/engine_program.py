"""python engine_program.py JOB.json ...: runs each job's requests through a vLLM engine and writes JOB.out.json.

A process apart from the tests', for vLLM keeps what it starts in globals. JOB: folder, engine (arguments of
`EngineArgs`), requests: a list of {prompt, params, arrival, lora}, where arrival counts the engine's steps.
"""

import gc
import json
import sys
from pathlib import Path

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest
from vllm.v1.metrics.reader import Counter, get_metrics_snapshot


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    engine = LLMEngine.from_engine_args(EngineArgs(model=job["folder"], disable_log_stats=False, **job["engine"]))
    waiting = [(request.get("arrival", 0), i, request) for i, request in enumerate(job["requests"])]
    results, step = {}, 0
    while waiting or engine.has_unfinished_requests():
        for arrival, i, request in [entry for entry in waiting if entry[0] <= step]:
            add(engine, str(i), request)
            waiting.remove((arrival, i, request))
        for output in engine.step():
            if output.finished:
                results[int(output.request_id)] = as_json(output)
        step += 1
    counters = {metric.name: metric.value for metric in get_metrics_snapshot() if isinstance(metric, Counter)}
    report = {"results": [results[i] for i in range(len(results))], "steps": step, "counters": counters}
    Path(path).with_suffix(".out.json").write_text(json.dumps(report))


def add(engine, name, request):
    lora = LoRARequest("adapter", 1, request["lora"]) if request.get("lora") else None
    prompt, params = request["prompt"], dict(request["params"])
    if "logit_bias" in params:  # JSON made strings of the tokens
        params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
    prompt = prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
    engine.add_request(name, prompt, SamplingParams(**params), lora_request=lora)


def as_json(output) -> dict:
    completion = output.outputs[0]
    return {
        "tokens": list(completion.token_ids),
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "logprobs": chosen(completion.token_ids, completion.logprobs),
        "prompt_logprobs": chosen(output.prompt_token_ids, output.prompt_logprobs),
        "cached_tokens": output.num_cached_tokens,
    }


def chosen(tokens, logprobs):
    """Of the tokens that were there; None for the first of a prompt."""
    if logprobs is None:
        return None
    return [None if row is None else row[token].logprob for token, row in zip(tokens, logprobs)]


if __name__ == "__main__":
    for job_path in sys.argv[1:]:
        main(job_path)
        gc.collect()
        cleanup_dist_env_and_memory()

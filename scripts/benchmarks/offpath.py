"""The part `offpath` of benchmark_generation.py: what a token costs one step beside plain greedy decoding.

Each request is checked before it is timed: it must have taken the path that `docs/generation_paths.md` names, and the
logits that it reports must be those of one forward pass without a cache. The time of a token is the difference of a
long and a short generation; GPU busy is the union of the intervals in which the device computed.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import LogitsProcessor, StoppingCriteria

from benchmarks.checks import TOLERANCE
from modeling_griffin.decode import generate as decode_generate
from modeling_griffin.decode.eligibility import decide


PROMPT = 128
SCORES = {"return_dict_in_generate": True, "output_scores": True}


class OnTheHost(LogitsProcessor):
    """Reads the last tokens on the host and remembers them, as grammars do; forbids one token."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids[:, -1].tolist())
        return scores.index_fill(1, torch.tensor([3], device=scores.device), -torch.inf)


class Never(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([token < 0 for token in input_ids[:, -1].tolist()], device=input_ids.device)


class LowRank(nn.Module):
    """A linear layer and an adapter of rank 16 beside it, not merged: as PEFT's LoRA without its bookkeeping."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        new = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.down, self.up = (
            nn.Linear(base.in_features, 16, False, **new),
            nn.Linear(16, base.out_features, False, **new),
        )
        for linear in (self.down, self.up):
            linear.weight.data.normal_(std=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def with_adapters(model: nn.Module) -> torch.nn.Module:
    try:
        from peft import LoraConfig, inject_adapter_in_model

        return inject_adapter_in_model(LoraConfig(r=16, target_modules="all-linear"), model).eval()
    except ImportError:
        return with_low_rank(model)


def with_low_rank(model: nn.Module) -> torch.nn.Module:
    for layer in model.model.layers:
        for block in (layer.mlp_block, layer.temporal_block):
            for name, linear in list(block.named_children()):
                if type(linear) is nn.Linear:
                    setattr(block, name, LowRank(linear))
    return model


def steer(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return output * 1.01


def with_a_hook(model: nn.Module) -> torch.nn.Module:
    model.model.layers[0].mlp_block.register_forward_hook(steer)
    return model


def with_a_host_hook(model: nn.Module) -> torch.nn.Module:
    seen = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(1))
    return model


def with_an_activation(model: nn.Module) -> torch.nn.Module:
    for layer in model.model.layers:
        layer.mlp_block.act_fn = nn.SiLU()
    return model


NEVER = 2**30  # no token of any model: one that could end a row, and does not
# name, rows, what is done to the model, options, the step
REQUESTS: list[tuple[str, int, Callable | None, Callable, str]] = [
    ("greedy", 1, None, lambda: {}, "fused"),
    ("greedy, an end token", 1, None, lambda: {"eos_token_id": NEVER, "min_new_tokens": None}, "fused"),
    ("sampling, top-p", 1, None, lambda: {"do_sample": True, "temperature": 0.8, "top_p": 0.9}, "fused"),
    ("greedy", 64, None, lambda: {}, "fused"),
    ("own logits processor", 1, None, lambda: {"logits_processor": [OnTheHost()]}, "fused"),
    ("own logits processor", 64, None, lambda: {"logits_processor": [OnTheHost()]}, "fused"),
    ("own criterion", 1, None, lambda: {"stopping_criteria": [Never()]}, "fused"),
    ("scores", 1, None, lambda: SCORES, "fused"),
    ("hidden states", 1, None, lambda: {**SCORES, "output_hidden_states": True}, "fused"),
    ("4 beams", 1, None, lambda: {"num_beams": 4}, "fused"),
    ("4 beams, sampling", 1, None, lambda: {"num_beams": 4, "do_sample": True}, "fused"),
    ("LoRA, not merged", 1, with_adapters, lambda: {}, "forward"),
    ("adapters of an own class", 1, with_low_rank, lambda: {}, "forward"),
    ("own activation", 1, with_an_activation, lambda: {}, "forward"),
    ("steering hook", 1, with_a_hook, lambda: {}, "forward"),
    ("steering hook, own processor", 1, with_a_hook, lambda: {"logits_processor": [OnTheHost()]}, "forward"),
    ("counting hook", 1, with_a_host_hook, lambda: {}, "transformers"),
    ("cache_implementation='dynamic'", 1, None, lambda: {"cache_implementation": "dynamic"}, "transformers"),
]


def offpath(models: dict, settings: dict, report: dict) -> Iterator[None]:
    """Yields after each request, so that what was measured is kept."""
    report["offpath"], on_gpu = [], settings["device"] == "cuda"
    if "llama-mqa" in models:  # first: a run that is cut has its peer
        row = {"contestant": "llama-mqa", "request": "greedy, eager", "rows": 1, "step": "transformers"}
        row |= _times(models["llama-mqa"], 1, lambda: {}, False, settings)
        report["offpath"].append(row)
        yield
    for name, rows, changed, options, step in tqdm(REQUESTS, desc="one step beside"):
        if not on_gpu and step == "transformers" and changed:
            step = "forward"  # where nothing is recorded, a hook may count
        model = models["griffin"] if changed is None else changed(copy.deepcopy(models["griffin"]))
        rows, begin = min(rows, settings["rows"]), time.perf_counter()
        error = _check(name, model, rows, options, step)
        row = {"contestant": "griffin", "request": name, "rows": rows, "step": step, "error": error}
        row["first_call_s"] = time.perf_counter() - begin
        report["offpath"].append({**row, **_times(model, rows, options, step != "transformers", settings)})
        yield


def _run(model, ids, new: int, options: Callable, **more):
    torch.manual_seed(0)
    given = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0, **options(), **more}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **given)


def _ids(model, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, model.config.vocab_size, (rows, PROMPT), generator=generator).to(model.device)


@torch.no_grad()
def _check(name: str, model, rows: int, options: Callable, step: str) -> float | None:
    """The error of the reported logits, of the largest one; SystemExit for a large one or for another path."""
    paths, ids = [], _ids(model, rows)

    def watched(*arguments, **given):
        paths.append(decide(*arguments, **given))
        return paths[-1]

    decode_generate.decide = watched
    try:
        _run(model, ids, 4, options)
        found = _run(model, ids, 8, options, return_dict_in_generate=True, output_logits=True)
    finally:
        decode_generate.decide = decide
    if {path.step for path in paths} != {step}:
        raise SystemExit(f"{name}: takes {paths}, not the step {step!r}: nothing is timed")
    if options().get("num_beams", 1) > 1:
        return None  # the logits are those of all beams; the tests compare them
    expected = model(found.sequences, use_cache=False).logits[:, -9:-1].float()
    error = ((torch.stack(found.logits, 1).float() - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE[model.dtype]:
        raise SystemExit(f"{name}: logits differ by {error:.1e} from those without a cache: nothing is timed")
    return error


def _times(model, rows: int, options: Callable, on_step: bool, settings: dict) -> dict[str, float]:
    """Milliseconds a token: of wall time, and in which a GPU computed."""
    new, ids, seconds = settings["new"], _ids(model, rows), []
    short, long = (new // 2, 5 * new // 2) if on_step else (max(2, new // 8), max(4, 3 * new // 8))
    _run(model, ids, short, options)
    for new in (short, long) * settings["turns"]:
        begin = _now(settings["device"])
        _run(model, ids, new, options)
        seconds.append(_now(settings["device"]) - begin)
    times = {"ms": 1e3 * statistics.median(b - a for a, b in zip(seconds[::2], seconds[1::2])) / (long - short)}
    if settings["device"] == "cuda":
        short, long = max(2, short // 8), max(4, long // 8)  # a profiler keeps each kernel, some 2,000 a token
        busy = [busy_ms(lambda new=new: _run(model, ids, new, options)) for new in (short, long)]
        times["busy_ms"] = (busy[1] - busy[0]) / (long - short)
    return times


def busy_ms(call: Callable) -> float:
    """Milliseconds in which the GPU computed while the call ran: kernels that overlap count once."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    spans = sorted((e.time_range.start, e.time_range.end) for e in profiler.events() if e.device_type.name == "CUDA")
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e3


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def offpath_text(report: dict) -> list[str]:
    lines = [f"## One step beside plain decoding (prompt of {PROMPT} tokens)", ""]
    lines += [
        "| request | rows | step | ms a token | GPU busy, ms | tokens/s | error | first call, s |",
        "|---" * 8 + "|",
    ]
    for row in report["offpath"]:
        name = row["request"] if row["contestant"] == "griffin" else f"{row['contestant']}: {row['request']}"
        busy, error, first = (row.get(key) for key in ("busy_ms", "error", "first_call_s"))
        cells = [name, str(row["rows"]), row["step"], f"{row['ms']:.2f}", "" if busy is None else f"{busy:.2f}"]
        cells += [f"{row['rows'] / row['ms'] * 1e3:,.0f}", "" if error is None else f"{error:.1e}"]
        lines.append("| " + " | ".join([*cells, "" if first is None else f"{first:.1f}"]) + " |")
    return [*lines, "", "First call: two generations of 4 and 8 tokens, with compilation, recording and the checks."]

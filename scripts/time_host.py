"""Times what a training step costs the host, on a machine without a GPU: Python, PyTorch's dispatch, Triton's launches.

    PYTHONPATH=. python scripts/time_host.py                       26 layers; needs Triton, of which nothing is compiled
    PYTHONPATH=. python scripts/time_host.py --models Griffin      one model without its peers

Tensors of a few numbers on a CPU are taken for a GPU's, so that the step makes the calls that it makes there; Triton
chooses and binds kernels as it does there, and what it would start does nothing. So the arithmetic is next to nothing
and wrong, and CUDA's own calls (launches, allocations) are not in it: for comparing two commits on one machine, not for
saying how long a step takes. Times are the thread's own, so that other processes disturb little, and the models' steps
take turns. Llama is Transformers', with multi-query attention; adapters are PEFT's, of rank 16 on every linear layer,
and "by modules" has their modules called, as where PEFT does more than one plain adapter. Writes OUTPUT.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from benchmark_training import _with_lora
from benchmarks.birth_certificate import birth_certificate, birth_lines
from benchmarks.host_time import host_table, host_time
from command_line import Parser
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from whole_files import with_ending, write_whole

from modeling_griffin import GriffinConfig, GriffinForCausalLM
from modeling_griffin.kernels import dispatch, flash_attention
from modeling_griffin.kernels.adapters import read_adapter
from modeling_griffin.kernels.device.known import known_gpu, pretending


try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
except ImportError:
    triton = None


H200 = known_gpu("sm_90")
TOKENS = (1, 16)
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=4, head_dim=8)


def stand_in() -> list[str]:
    """A CPU's tensors are a GPU's from now on, for this process. Returns a list that gets the name of each launch."""
    launched = []

    class Compiled:
        packed_metadata, function = (4, 1, 0), 1

        def __init__(self, name):
            self.name = name

        def launch_metadata(self, *arguments):
            return None

        def run(self, *arguments):
            launched.append(self.name)

    def compile_nothing(kernel, key, signature, device, *arguments):
        kernel.device_caches[device][0][key] = compiled = Compiled(kernel.fn.__name__)
        return compiled

    JITFunction._do_compile = compile_nothing
    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
        )
    )
    torch.Tensor.is_cuda = property(lambda tensor: True)
    torch.Tensor.get_device = lambda tensor: 0
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.device = Device
    dispatch.LEAST_ELEMENTS = flash_attention.LEAST_TOKENS = 0
    torch.backends.mkldnn.enabled = False  # which prepares each product for longer than it takes
    return launched


class Device:
    """Instead of `torch.cuda.device`."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        pass


def griffin(layers: int) -> PreTrainedModel:
    own = dict(lru_width=32, num_gate_blocks=4, attention_window_size=32)
    return GriffinForCausalLM(GriffinConfig(**SIZES, **own, num_hidden_layers=layers))


def llama(layers: int) -> PreTrainedModel:
    own = dict(num_key_value_heads=1, tie_word_embeddings=True)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **own, num_hidden_layers=layers))


class Way(NamedTuple):
    """make: of layers. adapted: with LoRA. by_modules: adapters are not looked into."""

    make: Callable[[int], PreTrainedModel]
    adapted: bool = False
    by_modules: bool = False


MODELS = {
    "Griffin": Way(griffin),
    "Griffin with LoRA": Way(griffin, adapted=True),
    "Griffin with LoRA by modules": Way(griffin, adapted=True, by_modules=True),
    "Llama": Way(llama),
    "Llama with LoRA": Way(llama, adapted=True),
}


def make_model(name: str, layers: int) -> PreTrainedModel:
    model = MODELS[name].make(layers).to(torch.bfloat16)
    return (_with_lora(model) if MODELS[name].adapted else model).train()


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=f"of {', '.join(MODELS)}"
    )
    parser.add_argument("--layers", type=int, default=26, help="residual blocks")
    parser.add_argument("--repeats", type=int, default=30, help="timed steps of each model")
    parser.add_argument("--rows", type=int, default=25, help="of a model's table of operators and functions; 0: none")
    parser.add_argument("--output", type=Path, default=Path("results/training/host_time_cpu"), help="without suffix")
    parser.add_argument("--commit", default=None, help="the commit that runs, for a copy without its git history")
    arguments = parser.parse_args(argv)
    parser.check_least(arguments, layers=1, repeats=1, rows=0)
    if triton is None:
        parser.error("Triton is not installed: pip install triton")
    torch.set_num_threads(1)
    launched = stand_in()
    with pretending(H200):
        models = {name: make_model(name, arguments.layers) for name in arguments.models}
        times = time_in_turns(models, arguments.repeats)
        found = {name: look_at(name, model, launched) for name, model in models.items()}
    text = "\n".join(page(arguments, times, found)) + "\n"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(with_ending(arguments.output, ".md"), text)
    print(text, end="")


def step(name: str, model: torch.nn.Module) -> tuple[float, float]:
    """Seconds of the thread, forward and backward."""
    tokens = torch.randint(0, SIZES["vocab_size"], TOKENS)
    model.zero_grad()
    read = (lambda module: None) if MODELS[name].by_modules else read_adapter
    with mock.patch.object(dispatch, "read_adapter", read):
        start = time.thread_time()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        middle = time.thread_time()
        loss.backward()
        return middle - start, time.thread_time() - middle


def time_in_turns(models: dict[str, torch.nn.Module], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Of each model, behind three steps that are not timed."""
    times = {name: [] for name in models}
    for repeat in range(repeats + 3):
        for name, model in models.items():
            seconds = step(name, model)
            if repeat >= 3:
                times[name].append(seconds)
    return times


def look_at(name: str, model: torch.nn.Module, launched: list[str]) -> tuple[int, list[dict]]:
    """How many kernels of ours one step launches, and where its time goes, by `host_time`."""
    launched.clear()
    step(name, model)
    return len(launched), host_time(lambda: step(name, model), rows=10**6)


def page(
    arguments: argparse.Namespace,
    times: dict[str, list[tuple[float, float]]],
    found: dict[str, tuple[int, list[dict]]],
) -> list[str]:
    lines = ["# What a training step costs the host", "", *birth_lines(birth_certificate("cpu", arguments.commit)), ""]
    lines += [
        f"Triton {triton.__version__}, {arguments.layers} layers; the GPU and what Triton starts are stand-ins",
        "(`scripts/time_host.py` says how), so that only Python, dispatch and binding are timed. Milliseconds of the",
        f"thread's own time, medians of {arguments.repeats} steps, the fewest in brackets; the models take turns.",
        "Operators are PyTorch's, inner ones counted; launches are of this project's kernels; halves, forward or",
        "backward, of its autograd functions.",
        "",
        "| | forward | backward | both | operators | launches | halves |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seconds in times.items():
        launches, table = found[name]
        parts = [*zip(*seconds), [sum(each) for each in seconds]]
        cells = [f"{statistics.median(part) * 1e3:.1f} ({min(part) * 1e3:.1f})" for part in parts]
        operators = sum(each["calls"] for each in table if each["name"].startswith("aten::"))
        halves = sum(each["calls"] for each in table if each["name"].startswith("_"))
        lines.append(f"| {name} | {' | '.join(cells)} | {operators} | {launches} | {halves} |")
    for name, (_, table) in found.items() if arguments.rows else ():
        lines += ["", f"## {name}: one step under PyTorch's profiler, which takes time itself", ""]
        lines += host_table(table[: arguments.rows])
    return lines


if __name__ == "__main__":
    main()

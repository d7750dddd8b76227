"""Times what a training step costs the host, on a machine without a GPU: Python, PyTorch's dispatch, Triton's launches.

    PYTHONPATH=. python scripts/time_host.py                       26 layers; needs Triton, of which nothing is compiled

Tensors of a few numbers on a CPU are taken for a GPU's, so that the step makes the calls that it makes there; Triton
chooses and binds kernels as it does there, and what it would start does nothing. So the arithmetic is next to nothing
and wrong, and CUDA's own calls (launches, allocations) are not in it: for comparing two commits on one machine, not for
saying how long a step takes. Times are the thread's own, so that other processes disturb little. Writes OUTPUT.md.
"""

import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from benchmarks.birth_certificate import birth_certificate, birth_lines
from benchmarks.host_time import host_table, host_time
from command_line import Parser

from modeling_griffin import GriffinConfig, GriffinForCausalLM, gpu
from modeling_griffin.kernels import dispatch, flash_attention
from modeling_griffin.kernels.device.known import known_gpu


try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
except ImportError:
    triton = None


H200 = known_gpu("sm_90")
TOKENS = (1, 16)
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=4, head_dim=8, lru_width=32)


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


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=26, help="residual blocks")
    parser.add_argument("--repeats", type=int, default=30, help="timed steps")
    parser.add_argument("--rows", type=int, default=25, help="of a table of operators and functions; 0: none")
    parser.add_argument("--output", type=Path, default=Path("results/training/host_time_cpu"), help="without suffix")
    parser.add_argument("--commit", default=None, help="the commit that runs, for a copy without its git history")
    arguments = parser.parse_args(argv)
    if triton is None:
        parser.error("Triton is not installed: pip install triton")
    torch.set_num_threads(1)
    launched = stand_in()
    config = GriffinConfig(**SIZES, num_hidden_layers=arguments.layers, num_gate_blocks=4, attention_window_size=32)
    with gpu.pretending(H200):
        model = GriffinForCausalLM(config).to(torch.bfloat16).train()
        tokens = torch.randint(0, config.vocab_size, TOKENS)

        def step() -> tuple[float, float]:
            """Seconds forward and backward."""
            model.zero_grad()
            start = time.thread_time()
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            middle = time.thread_time()
            loss.backward()
            return middle - start, time.thread_time() - middle

        for _ in range(3):
            step()
        times = [step() for _ in range(arguments.repeats)]
        launched.clear()
        step()
        launches, found = len(launched), host_time(step, rows=10**6)
    lines = ["# What a training step costs the host", "", *birth_lines(birth_certificate("cpu", arguments.commit)), ""]
    lines += [
        f"Triton {triton.__version__}, {arguments.layers} layers; the GPU and what Triton starts are stand-ins",
        "(`scripts/time_host.py` says how), so that only Python, dispatch and binding are timed. Milliseconds of the",
        f"thread's own time in {arguments.repeats} steps:",
        "",
        "| | fewest | median |",
        "|---|---|---|",
    ]
    for name, values in zip(("forward", "backward"), zip(*times)):
        lines.append(f"| {name} | {min(values) * 1e3:.1f} | {statistics.median(values) * 1e3:.1f} |")
    operators = sum(each["calls"] for each in found if each["name"].startswith("aten::"))
    halves = sum(each["calls"] for each in found if each["name"].startswith("_"))
    lines += [
        "",
        f"A step launches {launches} kernels of this project and calls {operators} operators of PyTorch, inner",
    ]
    lines += [f"ones counted, and {halves} halves of autograd functions of this project."]
    if arguments.rows:
        lines += [
            "One step under PyTorch's profiler, which takes time itself:",
            "",
            *host_table(found[: arguments.rows]),
        ]
    text = "\n".join(lines) + "\n"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()

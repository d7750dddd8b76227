"""Prepared launches: the compiled kernel that Triton's own `run` takes, called with what `run` calls it with.

On a CPU Triton binds and chooses as it does beside a GPU; what it would compile, and its driver, are stand-ins.
"""

import itertools

import pytest
import torch

from modeling_griffin.kernels import launch as launches


triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver, jit  # noqa: E402


pytestmark = pytest.mark.skipif(not launches.IS_READ, reason="launches of this Triton are its own")


def some_kernel(p_x, p_y, N, eps, SIZE: triton.language.constexpr, FLAG: triton.language.constexpr = True):
    pass


def kernel_with_a_constant_inside(p_x, SIZE: triton.language.constexpr, N):
    pass


class Compiled:
    """What Triton has compiled for one specialisation; `run` notes what it is called with."""

    packed_metadata, function = ("metadata",), 7

    def __init__(self, calls):
        self.calls = calls

    def launch_metadata(self, *arguments):
        return None

    def run(self, *arguments):
        self.calls.append((self, [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]))


class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 40 + device)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


@pytest.fixture
def calls(monkeypatch):
    """Of compiled kernels, one after the other."""
    seen = []

    def compile_nothing(self, key, signature, device, *arguments):
        self.device_caches[device][0][key] = compiled = Compiled(seen)
        return compiled

    monkeypatch.setattr(jit.JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(launches, "PREPARED", {})
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(driver, "_active", Driver())
    return seen


@pytest.fixture
def runs(monkeypatch):
    """How often Triton's own `run` was asked."""
    seen, run = [], jit.JITFunction.run
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *a, **k: seen.append(self) or run(self, *a, **k))
    return seen


def arguments_of_all_kinds():
    memory = torch.zeros(64)
    tensors = [memory, memory[1:], memory[4:], torch.zeros(8, dtype=torch.bfloat16), torch.nn.Parameter(memory[8:])]
    numbers = [1, 2, 3, 16, 48, 2**31 - 1, 2**31, 2**33 + 1, -16, 0]
    settings = [{"SIZE": 32}, {"SIZE": 64}, {"SIZE": 32, "FLAG": False}, {"SIZE": 32, "num_warps": 8}]
    yield from ((x, y, 5, 0.5, {"SIZE": 32}) for x, y in itertools.product(tensors, [*tensors, None]))
    yield from ((memory, None, number, 0.5, {"SIZE": 32}) for number in numbers)
    yield from ((memory, memory, 5, eps, options) for eps, options in itertools.product([0.5, 1.0], settings))


def _none_is_0(given: list) -> list:
    """Both are a null pointer to Triton, where a kernel has it at all."""
    return [0 if each is None else each for each in given]


def test_the_kernel_and_the_call_are_tritons_own(calls, runs):
    kernel = jit.JITFunction(some_kernel)
    cases = list(arguments_of_all_kinds())
    for *arguments, options in cases:
        kernel[(3, 2)](*arguments, **options)
        expected = calls[-1]
        for _ in range(2):  # the first asks Triton, the second does not
            del runs[:]
            assert launches.launch(kernel, (3, 2), *arguments, **options) is True
            (found, given), (right, wanted) = calls[-1], expected
            assert found is right
            # Behind grid, stream, function and metadata: Triton's hooks, which are empty chains, or None.
            assert given[:6] == wanted[:6] and _none_is_0(given[9:]) == _none_is_0(wanted[9:]), arguments
        aligned = all(each.data_ptr() % 16 == 0 for each in arguments if isinstance(each, torch.Tensor))
        assert bool(runs) != aligned
    assert len({id(compiled) for compiled, _ in calls}) > 15  # the cases do differ


def test_positional_constants(calls, runs):
    kernel, x = jit.JITFunction(some_kernel), torch.zeros(64)
    for size in (32, 64, 32, 64):
        launches.launch(kernel, (1,), x, x, 5, 0.5, size, False, num_warps=2)
    assert len(runs) == 2 and calls[0][0] is calls[2][0] is not calls[1][0] is calls[3][0]
    assert calls[2][1][-2:] == [32, False] and calls[2][1][:3] == [1, 1, 1]


def test_what_only_triton_sees(calls, runs, monkeypatch):
    """Hooks of a kernel and of profilers, tensors elsewhere, strange arguments: Triton's `run`, each time."""
    kernel, x = jit.JITFunction(some_kernel), torch.zeros(64)

    def asks_triton() -> bool:
        del runs[:]
        launches.launch(kernel, (1,), x, x, 5, 0.5, SIZE=32)
        return bool(runs)

    assert asks_triton() and not asks_triton()
    kernel.add_pre_run_hook(lambda *arguments, **options: None)
    assert asks_triton() and asks_triton()
    kernel.pre_run_hooks.clear()
    hook = lambda metadata: None  # noqa: E731
    triton.knobs.runtime.launch_enter_hook.add(hook)
    assert asks_triton()
    triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert not asks_triton()
    monkeypatch.setattr(launches, "IS_READ", False)  # another version of Triton, or AMD
    assert asks_triton()
    monkeypatch.setattr(launches, "IS_READ", True)
    assert not asks_triton()
    elsewhere = torch.zeros(64)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: int(self is elsewhere))
    for _ in range(2):
        del runs[:]
        launches.launch(kernel, (1,), x, elsewhere, 5, 0.5, SIZE=32)
        assert runs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(monkeypatch):
    """Aligned and not, on another stream, in a CUDA graph: the values of Triton's own launch."""
    from modeling_griffin.kernels.elementwise import triton_rms_norm

    memory = torch.randn(2**21 + 1, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(256, device="cuda", dtype=torch.bfloat16)
    inputs = [memory[:-1].view(-1, 256), memory[1:].view(-1, 256)]
    monkeypatch.setattr(launches, "IS_READ", False)
    expected = [triton_rms_norm(x, weight, 1e-6) for x in inputs]
    monkeypatch.undo()
    for _ in range(3):
        for x, right in zip(inputs, expected):
            assert torch.equal(triton_rms_norm(x, weight, 1e-6), right)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(triton_rms_norm(inputs[1], weight, 1e-6), expected[1])
    with torch.cuda.graph(graph):
        found = triton_rms_norm(inputs[0], weight, 1e-6)
    memory.mul_(3.0)
    graph.replay()
    assert torch.equal(found, triton_rms_norm(inputs[0], weight, 1e-6))


def test_a_constant_in_front_of_an_argument_is_tritons_matter(calls, runs):
    """Two sizes of it are two kernels, however alike they are as numbers."""
    kernel, x = jit.JITFunction(kernel_with_a_constant_inside), torch.zeros(64)
    for size in (2560, 4096, 2560):
        launches.launch(kernel, (1,), x, size, 5)
    assert len(runs) == 3 and [each is calls[0][0] for each, _ in calls] == [True, False, True]


def test_constants_stand_behind_the_arguments():
    """In all kernels that are launched so; one that does not would be slow to launch."""
    from modeling_griffin import rg_lru_scan_triton_kernels as scan
    from modeling_griffin.kernels import attention_kernels, convolution_kernels, gates_kernels, scan_sequences_kernels

    modules = (scan, attention_kernels, convolution_kernels, gates_kernels, scan_sequences_kernels)
    kernels = {name: each for module in modules for name, each in vars(module).items() if type(each) is jit.JITFunction}
    found = {name: [p.is_constexpr for p in each.params] for name, each in kernels.items()}
    assert (
        len(found) > 8
        and {name for name, constant in found.items() if name.endswith("_kernel") and constant != sorted(constant)}
        == set()
    )

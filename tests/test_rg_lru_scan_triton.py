"""The Triton scan against the float64 reference, with the torch backend in the same dtype as the measure of error.

On a GPU everything runs. Without one, `TRITON_INTERPRET=1 pytest tests/test_rg_lru_scan_triton.py` runs the small cases
in Triton's interpreter, one program after the other: arithmetic, masks and indices, but not the look-back's waiting.
"""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import modeling_griffin.rg_lru_scan_triton as triton_scan
from modeling_griffin.rg_lru import RGLRU
from modeling_griffin.rg_lru_scan import rg_lru_scan
from modeling_griffin.rg_lru_scan_triton import Tile, rg_lru_scan_triton, triton_unavailable_reason


INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Errors are shares of the norm. Allowed: twice the torch backend's, plus what the dtype cannot show.
UNSEEN = {torch.float32: 1.2e-7, torch.float16: 2e-5, torch.bfloat16: 1.6e-4}
NAMES = ["hidden", "last_state", "d_x", "d_recurrence_gate", "d_input_gate", "d_log_decay", "d_initial_state"]

needs_kernels = pytest.mark.skipif(
    triton_unavailable_reason(torch.empty(0, device=DEVICE if INTERPRETED or torch.cuda.is_available() else "cpu"))
    is not None,
    reason="needs Triton and a GPU, or TRITON_INTERPRET=1",
)


def make_inputs(batch, length, channels, dtype, device=DEVICE, seed=0, gate_scale=1.0, reset_share=0.05):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    return {
        "x": normal(batch, length, channels).to(dtype),
        "recurrence_gate": (normal(batch, length, channels) * gate_scale).to(dtype),
        "input_gate": (normal(batch, length, channels) * gate_scale).to(dtype),
        "log_decay": -8 * torch.nn.functional.softplus(normal(channels) * 2 - 5),
        "initial_state": normal(batch, channels),
        "reset": (torch.rand(batch, length, generator=generator) < reset_share).to(device),
        "d_hidden": normal(batch, length, channels).to(dtype),
        "d_last_state": normal(batch, channels),
    }


def run(inputs, backend, upcast=None, scan=rg_lru_scan):
    """Both results and all gradients; `upcast`: in that dtype."""
    inputs = {k: v.to(upcast) if upcast and v is not None and v.is_floating_point() else v for k, v in inputs.items()}
    leaves = [inputs[k] for k in ("x", "recurrence_gate", "input_gate", "log_decay", "initial_state")]
    leaves = [None if leaf is None else leaf.detach().requires_grad_() for leaf in leaves]
    outputs = scan(*leaves[:4], initial_state=leaves[4], reset=inputs["reset"], backend=backend)
    wanted = [leaf for leaf in leaves if leaf is not None]
    pairs = [(o, d) for o, d in zip(outputs, (inputs["d_hidden"], inputs["d_last_state"])) if o.requires_grad]
    gradients = torch.autograd.grad([o for o, _ in pairs], wanted, [d.to(o.dtype) for o, d in pairs], allow_unused=True)
    return [o.detach() for o in outputs] + [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, wanted)]


def poison():
    """NaN into the memory that the next outputs will get."""
    for size in (2**8, 2**12, 2**16, 2**20, 2**24):
        [torch.full((size,), torch.nan, device=DEVICE) for _ in range(8)]


def share(actual, expected):
    if not expected.numel():
        return 0.0
    assert bool(actual.isfinite().all()) or not bool(expected.isfinite().all()), (
        "NaN or inf where the reference has none"
    )
    scale = expected.norm().item() or 1.0
    return ((actual.double() - expected).norm().item()) / scale


def check(inputs, judge="reference", allowance=1.0):
    dtype = inputs["x"].dtype
    expected = run(inputs, judge, upcast=torch.float64)
    plain = run(inputs, "torch")
    poison()
    actual = run(inputs, "triton")
    # the interpreter cuts to bfloat16 where a GPU rounds
    unseen = UNSEEN[dtype] * (30 if INTERPRETED and dtype == torch.bfloat16 else 1) * allowance
    for name, a, p, e in zip(NAMES, actual, plain, expected):
        assert a.shape == p.shape and a.dtype == p.dtype, name
        ours, theirs = share(a, e), share(p, e)
        assert ours <= 2 * theirs + unseen, f"{name}: error {ours:.3g}, torch backend {theirs:.3g}"


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of a few steps: chains, masks and look-back at sizes that the interpreter can do."""
    for name, tile in {
        "FORWARD_NARROW": Tile(2, 4, 64),
        "FORWARD_FLOAT32": Tile(4, 2, 64),
        "BACKWARD_TALL": Tile(4, 2, 64),
        "BACKWARD_FLOAT32": Tile(2, 2, 64),
    }.items():
        monkeypatch.setattr(triton_scan, name, tile)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 37])
def test_small_tiles(small_tiles, length, dtype):
    check(make_inputs(2, length, 70, dtype))


@needs_kernels
def test_small_tiles_without_state_or_reset(small_tiles):
    check({**make_inputs(1, 21, 33, torch.float32), "initial_state": None, "reset": None})


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_narrow_tiles(dtype, monkeypatch):
    """Fewer than 64 channels: a warp holds several segments, and the look-back fills up with maps h -> h."""
    for name in ("FORWARD_NARROW", "FORWARD_FLOAT32"):
        monkeypatch.setattr(triton_scan, name, Tile(8, 2, 32))
    for name in ("BACKWARD_TALL", "BACKWARD_FLOAT32"):
        monkeypatch.setattr(triton_scan, name, Tile(8, 1, 16))
    check(make_inputs(1, 37, 40, dtype, reset_share=0.02))


@needs_kernels
@pytest.mark.parametrize("channels", [33, 256])
def test_one_step_without_state_or_reset(channels):
    check({**make_inputs(3, 1, channels, torch.bfloat16), "initial_state": None, "reset": None})


@needs_kernels
@pytest.mark.parametrize("which", [0, 1])
def test_gradients_through_one_result(small_tiles, which):
    """The other result's gradient is then None, not zeros."""
    inputs = make_inputs(2, 21, 33, torch.float32)
    gradients = []
    for backend in ("triton", "torch"):
        leaves = [inputs[name].detach().requires_grad_() for name in ("x", "log_decay", "initial_state")]
        x, log_decay, state = leaves
        gates = (inputs["recurrence_gate"], inputs["input_gate"])
        result = rg_lru_scan(x, *gates, log_decay, initial_state=state, reset=inputs["reset"], backend=backend)[which]
        gradients.append(torch.autograd.grad(result, leaves, inputs["d_last_state" if which else "d_hidden"]))
    assert all(share(a, e.double()) < 1e-5 for a, e in zip(*gradients))


@needs_kernels
def test_padding_carries_exactly(small_tiles):
    inputs = make_inputs(2, 30, 32, torch.float32, reset_share=0)
    for name, value in (("x", 0.0), ("recurrence_gate", -torch.inf)):
        inputs[name][:, 5:25] = value
    hidden, _, *gradients = run(inputs, "triton")
    # a == 1 exactly; where a tile or segment begins, h comes from its map, which rounds once more
    assert (hidden[:, 5:25] - hidden[:, 4:5]).abs().max() <= 2e-7 * hidden.abs().max()
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_log_decay_of_zero(small_tiles, dtype, zero):
    """Nothing is forgotten: 1 - a^2 is 0, and 1 / sqrt of it has to be a large number, not a large negative one."""
    inputs = make_inputs(2, 9, 33, dtype)
    inputs["log_decay"][::2] = zero
    check(inputs, allowance=3.0)


def load_copy(name):
    spec = importlib.util.spec_from_file_location(name, triton_scan.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_loads_several_times_in_one_process():
    copies = [
        load_copy("modeling_griffin.second"),
        load_copy("modeling_griffin.second"),
        load_copy("modeling_griffin.third"),
    ]
    operators = {str(module._OPERATORS.forward) for module in [triton_scan, *copies]}
    assert len(operators) == 4


@pytest.mark.skipif(INTERPRETED, reason="this test starts the interpreter")
@pytest.mark.skipif(triton_scan.triton is None, reason="needs Triton")
def test_small_cases_in_the_interpreter():
    """So that a machine without a GPU, and one with, runs the kernels' arithmetic, masks and indices on a CPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-1000:]
    assert re.search(r"\b[3-9]\d passed", finished.stdout), finished.stdout[-300:]


def test_says_why_it_cannot_run():
    if not INTERPRETED:
        assert triton_unavailable_reason(torch.empty(0)) in ("Triton is not installed", "x is on cpu")


def test_shapes_without_running():
    """The fake rules: what `torch.compile` sees."""
    with torch.device("meta"):
        x, state = torch.empty(2, 5, 3, dtype=torch.bfloat16), torch.empty(2, 3)
        hidden, last_state = rg_lru_scan_triton(x, x, x.float(), torch.empty(3), state, None)
    assert (hidden.shape, hidden.dtype) == (x.shape, x.dtype)
    assert (last_state.shape, last_state.dtype) == (state.shape, torch.float32)


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 127, 128, 129, 1000])
def test_lengths(length, dtype):
    check(make_inputs(2, length, 48, dtype, seed=length))


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [8191, 8192, 131072])
def test_long(length, dtype):
    """Judged by the torch backend in float64, which its own tests hold to the reference: the loop takes minutes."""
    check(make_inputs(1, length, 64, dtype, reset_share=1e-4), judge="torch")


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 16, 63, 2560, 4097])
def test_channels(channels, dtype):
    check(make_inputs(2, 300, channels, dtype, seed=channels))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("log_decay", [-1e-7, -1e-3, -80.0])
@pytest.mark.parametrize("gate", [-40.0, 40.0, None])
def test_extremes(gate, log_decay, dtype):
    inputs = make_inputs(2, 300, 48, dtype, gate_scale=15.0)
    inputs["log_decay"].fill_(log_decay)
    if gate is not None:
        inputs["recurrence_gate"].fill_(gate)
    check(inputs)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [-40.0, 40.0])
def test_extreme_input_gates(gate, dtype):
    inputs = make_inputs(2, 300, 48, dtype)
    inputs["input_gate"].fill_(gate)
    check(inputs)


@gpu
@pytest.mark.parametrize("where", ["first", "edges", "everywhere", "nowhere"])
def test_resets(where):
    inputs = make_inputs(2, 520, 48, torch.bfloat16, reset_share=0)
    positions = {
        "first": [0],
        "edges": [63, 64, 127, 128, 129, 256, 511, 512],
        "everywhere": slice(None),
        "nowhere": [],
    }
    inputs["reset"][:, positions[where]] = True
    check(inputs)


@gpu
@pytest.mark.parametrize("tile", [triton_scan.FORWARD, triton_scan.FORWARD_NARROW])
def test_forward_tiles(tile, monkeypatch):
    monkeypatch.setattr(triton_scan, "_forward_tile", lambda *shape: tile)
    check(make_inputs(2, 1024, 128, torch.bfloat16, reset_share=0.001))


@gpu
@pytest.mark.parametrize("tile", [triton_scan.BACKWARD, triton_scan.BACKWARD_TALL])
def test_backward_tiles(tile, monkeypatch):
    """The shape classes choose between these; here both at one shape."""
    monkeypatch.setattr(triton_scan, "_backward_tile", lambda *shape: tile)
    check(make_inputs(2, 1024, 128, torch.bfloat16, reset_share=0.001))


@gpu
@pytest.mark.parametrize("tile", [Tile(8, 8, 32, 96), Tile(8, 4, 16, 64), Tile(16, 4, 32, 64)])
@pytest.mark.parametrize("channels", [256, 63])
def test_narrow_tiles(tile, channels, monkeypatch):
    """Right, and the same bits each time: which earlier tile is complete must not show."""
    monkeypatch.setattr(triton_scan, "_forward_tile", lambda *shape: tile)
    monkeypatch.setattr(triton_scan, "_backward_tile", lambda *shape: tile)
    inputs = make_inputs(1, 3000, channels, torch.bfloat16, reset_share=0.001)
    check(inputs, judge="torch")
    first = run(inputs, "triton")
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(500):
        different += sum((a != f).any() for a, f in zip(run(inputs, "triton"), first))
    assert different.item() == 0


@gpu
def test_a_new_length_costs_no_compilation(monkeypatch):
    """Compiled once for lengths that tiles divide and once for others; the shape classes choose by batch * channels."""
    jit = pytest.importorskip("triton.runtime.jit")
    compile_one, compiled = jit.JITFunction._do_compile, []

    def count(kernel, *arguments):
        compiled.append(kernel.fn.__name__)
        return compile_one(kernel, *arguments)

    monkeypatch.setattr(jit.JITFunction, "_do_compile", count)
    for length in (4096, 4095, 1, 63):  # 63: within one tile, whose kernel has no chains
        run(make_inputs(1, length, 192, torch.bfloat16), "triton")
    compiled.clear()
    for length in (2048, 8192, 65536, 2, 61, 1000, 5001):
        run(make_inputs(1, length, 192, torch.bfloat16), "triton")
        assert compiled == [], length


@gpu
def test_without_state_or_reset():
    check({**make_inputs(3, 700, 128, torch.bfloat16), "initial_state": None, "reset": None})


@gpu
def test_not_contiguous_and_mixed_dtypes():
    inputs = make_inputs(2, 300, 96, torch.bfloat16)
    both = torch.randn(2, 300, 192, device="cuda")
    inputs["recurrence_gate"], inputs["input_gate"] = both[..., :96], both[..., 96:].half()
    inputs["x"] = torch.randn(2, 96, 300, device="cuda").bfloat16().transpose(1, 2)
    check(inputs)


@gpu
def test_one_launch_per_decode_step():
    inputs = make_inputs(64, 1, 2560, torch.bfloat16)
    arguments = [inputs[k] for k in ("x", "recurrence_gate", "input_gate", "log_decay", "initial_state")]
    rg_lru_scan_triton(*arguments, None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        rg_lru_scan_triton(*arguments, None)
        torch.cuda.synchronize()
    on_gpu = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(on_gpu) == 1, on_gpu


@gpu
@pytest.mark.parametrize("channels, times", [(256, 10_000), (63, 1_000)])
def test_same_result_ten_thousand_times(channels, times):
    inputs = make_inputs(1, 4096, channels, torch.bfloat16, reset_share=0.001)
    names = ("x", "recurrence_gate", "input_gate", "log_decay", "initial_state", "reset")
    arguments = [inputs[k] for k in names]
    operators = triton_scan._OPERATORS
    hidden, last_state = operators.forward(*arguments)
    gradients = operators.backward(inputs["d_hidden"], inputs["d_last_state"], *arguments, hidden)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(times):
        different += (operators.forward(*arguments)[0] != hidden).any()
    for _ in range(times):
        again = operators.backward(inputs["d_hidden"], inputs["d_last_state"], *arguments, hidden)
        different += sum((a != g).any() for a, g in zip(again, gradients))
    assert different.item() == 0


@gpu
def test_two_streams_at_once():
    inputs = [make_inputs(2, 3000, 512, torch.bfloat16, seed=seed) for seed in range(2)]
    expected = [run(one, "triton") for one in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    actual = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                actual[i].append(run(inputs[i], "triton"))
    torch.cuda.synchronize()
    for e, several in zip(expected, actual):
        assert all(torch.equal(a, b) for results in several for a, b in zip(results, e))


@gpu
def test_cuda_graph():
    inputs = make_inputs(2, 1000, 128, torch.bfloat16)
    run(inputs, "triton")  # compiles
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(inputs, "triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs, "triton")
    for seed in range(1, 6):
        for name, value in make_inputs(2, 1000, 128, torch.bfloat16, seed=seed).items():
            inputs[name].copy_(value)
        graph.replay()
        replayed = [c.clone() for c in captured]
        assert all(torch.equal(a, b) for a, b in zip(replayed, run(inputs, "triton")))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu_while_the_first_is_current():
    first = run(make_inputs(2, 1000, 128, torch.bfloat16, device="cuda:0"), "triton")
    second = run(make_inputs(2, 1000, 128, torch.bfloat16, device="cuda:1"), "triton")
    assert torch.cuda.current_device() == 0
    assert all(b.device.index == 1 and torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second))


@gpu
def test_more_than_two_to_the_31_elements():
    length, channels, tail = 2**20 + 3, 2049, 700
    inputs = make_inputs(1, 4096, channels, torch.bfloat16, reset_share=0)
    inputs["log_decay"].fill_(-1.0)  # forgets within a tile: the ends can be checked alone
    for name in ("x", "recurrence_gate", "input_gate", "d_hidden"):
        inputs[name] = inputs[name].repeat(1, length // 4096 + 1, 1)[:, :length]
    inputs["reset"] = None
    hidden, last_state, d_x, *gradients = run(inputs, "triton")
    for part in (slice(0, tail), slice(length - tail, length)):
        alone = {k: v[:, part].contiguous() for k, v in inputs.items() if v is not None and v.dim() == 3}
        alone = run({**inputs, **alone}, "torch")
        middle = slice(tail // 3, 2 * tail // 3)
        assert share(hidden[:, part][:, middle], alone[0][:, middle].double()) < 5e-3
        for ours, theirs in zip([d_x, *gradients[:2]], alone[2:5]):
            assert share(ours[:, part][:, middle], theirs[:, middle].double()) < 5e-3
    assert share(last_state, alone[1].double()) < 5e-3


@gpu
def test_compiles_in_one_graph():
    inputs = make_inputs(2, 300, 128, torch.bfloat16)

    def layer(x, recurrence_gate, input_gate, log_decay, *, initial_state, reset, backend):
        hidden, last = rg_lru_scan(
            2 * x, recurrence_gate + 1, input_gate, log_decay, initial_state=initial_state, reset=reset, backend=backend
        )
        return hidden.relu(), last

    compiled = torch.compile(layer, fullgraph=True)
    for a, e in zip(run(inputs, None, scan=compiled), run(inputs, "triton", scan=layer)):
        assert share(a, e.double()) < 1e-2


@gpu
def test_layer_compiles_in_one_graph():
    layer = RGLRU(128, 4, c=8.0).cuda()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.uniform_(layer.decay.lambda_bias, -7.0, -4.0)
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        x = torch.randn(2, 300, 128, generator=torch.Generator().manual_seed(3)).cuda().requires_grad_()
        hidden, last_state = function(x)
        gradients = torch.autograd.grad(hidden.square().sum() + last_state.sum(), [x, *layer.parameters()])
        results.append([hidden, last_state, *gradients])
    assert all(share(a, e.double()) < 1e-4 for a, e in zip(*results))


@gpu
def test_operator_rules():
    inputs = make_inputs(2, 150, 64, torch.float32)
    names = ("x", "recurrence_gate", "input_gate", "log_decay", "initial_state", "reset")
    arguments = [inputs[k].requires_grad_(k != "reset") for k in names]
    torch.library.opcheck(triton_scan._OPERATORS.forward.default, arguments)


@gpu
def test_checkpointing_and_autocast():
    inputs = make_inputs(2, 300, 128, torch.bfloat16)

    def checkpointed(*arguments, **options):
        return checkpoint(lambda *a: rg_lru_scan(*a, **options), *arguments, use_reentrant=False)

    plain = run(inputs, "triton")
    assert all(torch.equal(a, b) for a, b in zip(run(inputs, "triton", scan=checkpointed), plain))
    with torch.autocast("cuda", dtype=torch.float16):
        assert all(torch.equal(a, b) for a, b in zip(run(inputs, "triton"), plain))


@gpu
def test_keeps_only_inputs_and_hidden():
    inputs = make_inputs(1, 2048, 1024, torch.bfloat16)
    x, r, i = (inputs[k].requires_grad_() for k in ("x", "recurrence_gate", "input_gate"))
    rg_lru_scan_triton(x, r, i, inputs["log_decay"], None, None)
    before = torch.cuda.memory_allocated()
    outputs = rg_lru_scan_triton(x, r, i, inputs["log_decay"], None, None)
    assert torch.cuda.memory_allocated() - before <= 1.05 * x.nbytes + 2**16
    del outputs


@gpu
def test_second_derivatives_raise():
    inputs = make_inputs(1, 10, 64, torch.float32)
    x = inputs["x"].requires_grad_()
    hidden, _ = rg_lru_scan_triton(x, inputs["recurrence_gate"], inputs["input_gate"], inputs["log_decay"], None, None)
    (gradient,) = torch.autograd.grad(hidden.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError):
        gradient.sum().backward()

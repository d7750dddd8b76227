"""Sequences end to end in one row: as each of them alone, in the float64 reference, for values and every gradient.

On a GPU everything runs. Without one, `TRITON_INTERPRET=1` runs the kernels' small cases.
"""

import os
import re
import subprocess
import sys

import pytest
import torch

import modeling_griffin.rg_lru_scan_triton as triton_scan
from modeling_griffin.rg_lru_scan import rg_lru_scan
from modeling_griffin.rg_lru_scan_triton import Tile, triton_unavailable_reason


INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(
    triton_unavailable_reason(torch.empty(0, device=DEVICE)) is not None, reason="needs Triton and a GPU or interpreter"
)
NAMES = ("hidden", "last_state", "x", "recurrence_gate", "input_gate", "log_decay", "initial_state")
# Shares of the norm; against float64, with inputs of that dtype.
LARGEST = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
LENGTHS = {
    "one": [37],
    "ones": [1] * 9,
    "empty": [0, 0, 5, 0, 1, 0, 0, 7, 0],
    "nothing": [0, 0],
    "edges": [8, 1, 7, 9],
    "mixed": [3, 1, 11, 0, 2, 17, 1],
}


def make_inputs(lengths, channels, dtype, seed=0, tail=0, reset_share=0.05, device=None):
    device = device or DEVICE
    generator = torch.Generator().manual_seed(seed)
    length, number = sum(lengths) + tail, len(lengths)
    cpu = {
        "x": torch.randn(1, length, channels, generator=generator).to(dtype),
        "recurrence_gate": torch.randn(1, length, channels, generator=generator).to(dtype),
        "input_gate": torch.randn(1, length, channels, generator=generator).to(dtype),
        "log_decay": -8 * torch.nn.functional.softplus(torch.randn(channels, generator=generator) * 2 - 5),
        "initial_state": torch.randn(number, channels, generator=generator),
        "reset": torch.rand(1, length, generator=generator) < reset_share,
        "starts": torch.rand(number, generator=generator) < 0.5,
        "cu_seqlens": torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
        "d_hidden": torch.randn(1, length, channels, generator=generator).to(dtype),
        "d_last_state": torch.randn(number, channels, generator=generator),
    }
    cpu["d_hidden"][:, sum(lengths) :] = 0.0  # what comes out behind the last sequence means nothing
    return {name: tensor.to(device) for name, tensor in cpu.items()}


def results_of(function, inputs, upcast=None):
    """hidden, last_state and the gradients of all five inputs."""
    leaves = {k: inputs[k] for k in NAMES[2:] if inputs[k] is not None}
    leaves = {k: v.detach().to(upcast or v.dtype).requires_grad_() for k, v in leaves.items()}
    hidden, last_state = function({**inputs, **leaves})
    pairs = [(o, inputs[f"d_{n}"]) for o, n in ((hidden, "hidden"), (last_state, "last_state")) if o.requires_grad]
    gradients = torch.autograd.grad(
        [o for o, _ in pairs], list(leaves.values()), [d.to(o.dtype) for o, d in pairs], allow_unused=True
    )
    gradients = [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, leaves.values())]
    return dict(zip((*NAMES[:2], *leaves), (hidden.detach(), last_state.detach(), *gradients)))


def alone(inputs):
    """The definition: each sequence by itself, as a batch of one row."""
    places, hidden, last = inputs["cu_seqlens"].tolist(), [], []
    for n, (begin, end) in enumerate(zip(places, places[1:])):
        part = {k: inputs[k][:, begin:end] for k in ("x", "recurrence_gate", "input_gate", "reset")}
        state = inputs["initial_state"]
        state = inputs["x"].new_zeros(1, inputs["x"].shape[2]) if state is None else state[n : n + 1]
        part["reset"] = part["reset"].clone()
        if end > begin and (inputs["starts"] is None or inputs["starts"][n]):
            part["reset"][:, 0] = True
        one = rg_lru_scan(**part, log_decay=inputs["log_decay"], initial_state=state, backend="reference")
        hidden.append(one[0])
        last.append(one[1])
    hidden.append(torch.zeros_like(inputs["x"][:, places[-1] :]))
    return torch.cat(hidden, 1), torch.cat(last)


def together(backend):
    names = (*NAMES[2:], "reset", "cu_seqlens", "starts")
    return lambda inputs: rg_lru_scan(**{k: inputs[k] for k in names}, backend=backend)


def check(inputs, backend, dtype):
    on_cpu = {k: None if v is None else v.cpu() for k, v in inputs.items()}
    expected = results_of(alone, on_cpu, torch.float64)
    actual = results_of(together(backend), inputs, torch.float64 if dtype == torch.float64 else None)
    real = int(on_cpu["cu_seqlens"][-1])
    assert actual["hidden"].dtype == inputs["x"].dtype and bool(actual["hidden"].isfinite().all())
    allowed = LARGEST[dtype] * (4 if INTERPRETED and dtype == torch.bfloat16 else 1)  # it cuts where a GPU rounds
    for name, e in expected.items():
        a = actual[name].cpu().double()
        assert a.shape == e.shape, name
        if name == "hidden":
            a, e = a[:, :real], e[:, :real]
        error = (a - e).norm() / e.norm().clamp(min=1e-3)
        assert error <= allowed, f"{name}: {error:.2e}"


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(
    "backend, dtype", [("reference", torch.float64), ("torch", torch.float64), ("torch", torch.float32)]
)
def test_as_each_sequence_alone(lengths, backend, dtype):
    check(make_inputs(lengths, 6, dtype, device="cpu"), backend, dtype)


@pytest.mark.parametrize("left_out", ["initial_state", "starts", "reset"])
def test_without_an_argument(left_out):
    inputs = make_inputs(LENGTHS["mixed"], 5, torch.float64, device="cpu")
    if left_out == "reset":
        inputs["reset"].fill_(False)
        given = {k: v for k, v in inputs.items() if not k.startswith("d_") and k != "reset"}
        assert torch.equal(rg_lru_scan(**given)[0], together(None)(inputs)[0])
    check({**inputs, **({} if left_out == "reset" else {left_out: None})}, "torch", torch.float64)


def test_tokens_behind_the_last_sequence():
    check(make_inputs(LENGTHS["mixed"], 5, torch.float64, tail=7, device="cpu"), "torch", torch.float64)


def test_a_start_does_not_read_its_state():
    inputs = make_inputs([4, 3], 5, torch.float32, device="cpu")
    inputs["starts"][:] = torch.tensor([True, False])
    inputs["initial_state"][0] = torch.nan
    hidden, last_state = together("torch")(inputs)
    assert bool(hidden.isfinite().all()) and bool(last_state.isfinite().all())


def test_one_token_each_is_a_batch():
    inputs = make_inputs([1] * 6, 5, torch.float32, reset_share=0, device="cpu")
    hidden, last_state = together("torch")(inputs)
    x, r, i = (inputs[k].view(6, 1, 5) for k in NAMES[2:5])
    again = rg_lru_scan(
        x, r, i, inputs["log_decay"], initial_state=inputs["initial_state"], reset=inputs["starts"][:, None]
    )
    torch.testing.assert_close(hidden.view(6, 1, 5), again[0])
    torch.testing.assert_close(last_state, again[1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cu_seqlens": torch.tensor([0, 3, 2, 7])}, r"cu_seqlens = \[0, 3, 2, 7\]: allowed is 0 first"),
        ({"cu_seqlens": torch.tensor([0, 3, 4, 8])}, "at most 7 last"),
        ({"cu_seqlens": torch.tensor([1, 3, 4, 7])}, "allowed is 0 first"),
        ({"cu_seqlens": torch.tensor([0.0, 3, 4, 7])}, "cu_seqlens has dtype torch.float32"),
        ({"cu_seqlens": torch.tensor([0])}, "cu_seqlens has shape"),
        ({"cu_seqlens": [0, 3, 4, 7]}, "cu_seqlens is a list: allowed is a tensor"),
        ({"starts": torch.ones(3)}, "starts is torch.float32"),
        ({"starts": torch.ones(2, dtype=torch.bool)}, r"starts is torch.bool \(2,\): allowed is torch.bool \(3,\)"),
        ({"cu_seqlens": None}, "starts without cu_seqlens"),
        ({"initial_state": torch.zeros(1, 4)}, "initial_state has shape"),
    ],
)
def test_refuses(change, message):
    inputs = make_inputs([3, 1, 3], 4, torch.float32, device="cpu")
    with pytest.raises(ValueError, match=message):
        together(None)({**inputs, **change})


def test_refuses_several_rows():
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="allowed with cu_seqlens is one row"):
        rg_lru_scan(x, x, x, torch.zeros(4), cu_seqlens=torch.tensor([0, 3]))


@pytest.fixture
def small_tiles(monkeypatch):
    for name, tile in {
        "FORWARD_NARROW": Tile(2, 4, 64),
        "FORWARD_FLOAT32": Tile(4, 2, 64),
        "BACKWARD_TALL": Tile(4, 2, 64),
        "BACKWARD_FLOAT32": Tile(2, 2, 64),
    }.items():
        monkeypatch.setattr(triton_scan, name, tile)


@needs_kernels
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_kernels_with_small_tiles(small_tiles, lengths):
    check(make_inputs(lengths, 33, torch.float32), "triton", torch.float32)


@needs_kernels
def test_kernels_with_small_tiles_in_bfloat16(small_tiles):
    check(make_inputs(LENGTHS["mixed"], 70, torch.bfloat16), "triton", torch.bfloat16)


@needs_kernels
@pytest.mark.parametrize("lengths", [[1] * 5 + [0], [0, 3, 0, 0, 2, 1, 0]], ids=["ones", "few"])
@pytest.mark.parametrize("left_out", [None, "initial_state", "starts", "reset"])
def test_kernels_walk(lengths, left_out):
    """As many tokens as sequences or fewer: the kernel that walks, and the backward kernel as always."""
    inputs = make_inputs(lengths, 33, torch.float32, tail=1 if 1 in lengths[:1] else 0)
    if left_out == "reset":
        inputs["reset"].fill_(False)
    check({**inputs, **({left_out: None} if left_out in ("initial_state", "starts") else {})}, "triton", torch.float32)


@needs_kernels
@pytest.mark.parametrize("left_out", ["initial_state", "starts"])
def test_kernels_without_an_argument(small_tiles, left_out):
    check({**make_inputs(LENGTHS["mixed"], 33, torch.float32), left_out: None}, "triton", torch.float32)


@needs_kernels
def test_kernels_with_tokens_behind(small_tiles):
    inputs = make_inputs(LENGTHS["mixed"], 33, torch.float32, tail=13)
    inputs["initial_state"][inputs["starts"]] = torch.nan  # not read
    inputs["starts"][-1] = inputs["starts"][3] = False
    inputs["initial_state"].nan_to_num_(0.5)
    check(inputs, "triton", torch.float32)


@needs_kernels
def test_kernels_with_more_sequences_than_are_sampled(small_tiles):
    """The kernel that lays them out looks at 512 ends first."""
    lengths = [0, 2, 1] * 200 + [150] + [0] * 7 + [1, 3] * 8
    check(make_inputs(lengths, 33, torch.float32, tail=3), "triton", torch.float32)


@needs_kernels
def test_kernels_do_not_read_the_state_of_a_start(small_tiles):
    inputs = make_inputs([9, 8, 3], 33, torch.float32)
    inputs["starts"][:] = torch.tensor([True, False, True])
    inputs["initial_state"][inputs["starts"]] = torch.nan
    for result in results_of(together("triton"), inputs).values():
        assert bool(result.isfinite().all())


@pytest.mark.skipif(INTERPRETED, reason="this test starts the interpreter")
@pytest.mark.skipif(triton_scan.triton is None, reason="needs Triton")
def test_small_cases_in_the_interpreter():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not gpu",
        "-k",
        "kernels",
        __file__,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-1000:]
    assert re.search(r"\b(19|2\d) passed", finished.stdout), finished.stdout[-300:]


def random_lengths(total, number, seed=0):
    cuts = torch.randint(0, total + 1, (number - 1,), generator=torch.Generator().manual_seed(seed)).sort().values
    return torch.diff(torch.tensor([0, *cuts, total])).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", [1, 2, 16, 257])
@pytest.mark.parametrize("channels", [48, 320])
def test_on_a_gpu(number, dtype, channels):
    check(make_inputs(random_lengths(1500, number), channels, dtype, seed=number), "triton", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lengths", [[63, 1, 64, 65, 127, 1, 128, 129], [1] * 300, [0, 300, 0], [1, 1023, 1], [2] * 150]
)
def test_tile_edges_on_a_gpu(lengths):
    check(make_inputs(lengths, 96, torch.bfloat16), "triton", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [2560, 8320])
def test_wide_tiles_on_a_gpu(channels):
    """The tile of many chains, which one row meets above 8,192 channels only."""
    check(make_inputs(random_lengths(400, 9), channels, torch.bfloat16), "triton", torch.bfloat16)


@pytest.mark.gpu
def test_one_sequence_is_the_plain_scan():
    inputs = make_inputs([3000], 256, torch.bfloat16)
    inputs["starts"].fill_(False)
    varlen = results_of(together("triton"), inputs)
    plain = results_of(together("triton"), {**inputs, "cu_seqlens": None, "starts": None})
    for name in ("hidden", "x", "input_gate", "recurrence_gate"):
        assert (varlen[name].float() - plain[name].float()).norm() <= 4e-3 * plain[name].float().norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[100, 0, 300, 624], [1] * 64])
def test_in_a_cuda_graph_lengths_may_change(lengths):
    """Recorded once, replayed with other lengths and states: nothing of them was read by the host."""
    inputs = make_inputs(lengths, 128, torch.bfloat16)
    run = together("triton")
    run(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        recorded = run(inputs)
    others = random_lengths(sum(lengths), len(lengths), seed=7)
    for name, value in make_inputs(others, 128, torch.bfloat16, seed=5).items():
        inputs[name].copy_(value)
    graph.replay()
    for replayed, eager in zip(recorded, run(inputs)):
        assert torch.equal(replayed, eager)


@pytest.mark.gpu
def test_reads_nothing_on_the_host():
    inputs = make_inputs([100, 0, 300], 128, torch.bfloat16)
    for backend in ("triton", "torch"):
        run = together(backend)
        results_of(run, inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            results_of(run, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_same_result_a_thousand_times():
    inputs = make_inputs(random_lengths(4096, 16), 256, torch.bfloat16)
    first = results_of(together("triton"), inputs)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        different += sum(
            (a != f).any() for a, f in zip(results_of(together("triton"), inputs).values(), first.values())
        )
    assert different.item() == 0


@pytest.mark.gpu
def test_compiles_in_one_graph():
    inputs = make_inputs([100, 0, 300], 128, torch.bfloat16)
    compiled = torch.compile(together(None), fullgraph=True)
    for a, e in zip(results_of(compiled, inputs).values(), results_of(together("triton"), inputs).values()):
        assert (a.float() - e.float()).norm() <= 1e-2 * e.float().norm().clamp(min=1e-3)


@pytest.mark.gpu
def test_operator_rules():
    inputs = make_inputs([50, 0, 100], 64, torch.float32)
    names = (*NAMES[2:], "reset")
    arguments = [inputs[k].requires_grad_(k != "reset") for k in names]
    torch.library.opcheck(triton_scan._OPERATORS.forward.default, (*arguments, inputs["cu_seqlens"], inputs["starts"]))

"""Who runs what on which GPU: the choice by properties, and that it stands in one place."""

import ast
import itertools
from pathlib import Path

import pytest
import torch

from modeling_griffin import gpu
from modeling_griffin.decode.linear import COUNTERS
from modeling_griffin.kernels.device import __main__ as report
from modeling_griffin.kernels.device import attention_refusal, decode, gates_refusal, training
from modeling_griffin.kernels.device.known import KNOWN, known_gpu, pretending


PACKAGE = Path(__file__).parents[2] / "modeling_griffin"
SCRIPTS = PACKAGE.parent / "scripts"
TABLES = (training.ATTENTION_FORWARD, training.ATTENTION_QUERY_GRADIENT, training.ATTENTION_KEY_GRADIENTS)
FROM_AMPERE_ON = [name for name, known in KNOWN.items() if known.capability >= (8, 0)]
QUESTIONS = ("get_device_capability", "get_device_properties", "capability")
PROCESSORS = {108, 114, 132, 148, 170, 264}  # of GPUs that tiles might be tempted to know


@pytest.fixture(autouse=True)
def triton_is_there(monkeypatch):
    monkeypatch.setattr(gpu, "_triton_version", lambda: (3, 6))


def asks_a_gpu(path: Path) -> list[str]:
    """Lines that ask PyTorch what a device is, compare capabilities, or have a GPU's number of multiprocessors."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        name = getattr(node, "attr", getattr(node, "id", ""))
        number = node.value if isinstance(node, ast.Constant) and type(node.value) is int else None
        if name in QUESTIONS or number in PROCESSORS:
            found.append(f"{path.name}:{node.lineno}: {name or number}")
    return found


def test_only_one_place_knows_gpus():
    """Scripts ask it too; what they measure on a named GPU may have that GPU's numbers."""
    allowed = [PACKAGE / "gpu.py", *(PACKAGE / "kernels" / "device").glob("*.py")]
    paths = [path for path in PACKAGE.rglob("*.py") if path not in allowed]
    found = [line for path in paths for line in asks_a_gpu(path)]
    found += [line for path in SCRIPTS.rglob("*.py") for line in asks_a_gpu(path) if "get_device_cap" in line]
    assert not found, found


def test_launch_options_stand_there_too():
    """`num_warps=8` anywhere else is a tile that nobody finds; the scan's, which ships, are in its own file."""
    found = [
        f"{path.name}:{keyword.value.lineno}"
        for path in PACKAGE.rglob("*.py")
        if "scan_triton" not in path.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg in ("num_warps", "num_stages", "maxnreg") and isinstance(keyword.value, ast.Constant)
    ]
    assert not found, found


def test_the_search_finds_what_it_looks_for(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import torch\nwide = torch.cuda.get_device_capability() == (9, 0)\nprograms = 132\n")
    assert len(asks_a_gpu(path)) == 2


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", FROM_AMPERE_ON)
def test_local_attention_has_tiles_that_fit(name, head_dim):
    assert attention_refusal(head_dim, KNOWN[name]) is None
    for table in TABLES:
        tile = training.first_that_fits(table[head_dim], KNOWN[name])
        assert 0 < tile.shared_memory <= KNOWN[name].shared_memory
        if KNOWN[name].shared_memory == 227 * 1024:  # what was measured stays what is taken
            assert tile is table[head_dim][0]


def test_where_local_attention_is_not_run():
    assert "older than compute capability 8.0" in attention_refusal(128, KNOWN["sm_75"])
    assert "no tiles" in attention_refusal(256, KNOWN["sm_89"]._replace(shared_memory=48 * 1024))
    assert "environment variable" in attention_refusal(128, KNOWN["gfx942"])


def test_old_compilers_and_old_gpus_get_pytorch(monkeypatch):
    assert gpu.triton_refusal(KNOWN["sm_75"]) is None
    assert "6.1" in gpu.triton_refusal(KNOWN["sm_75"]._replace(capability=(6, 1)))
    monkeypatch.setattr(gpu, "_triton_version", lambda: (3, 4))
    assert "Triton 3.4 is older than 3.5" in gpu.triton_refusal(KNOWN["sm_90"])
    monkeypatch.setattr(gpu, "_triton_version", lambda: None)
    assert "not installed" in gpu.triton_refusal(KNOWN["sm_90"])


def test_decoding_on_turing_has_no_kernels():
    assert "compute capability 7.5" in (reason := decode.decode_refusal(KNOWN["sm_75"])) and "need 8.0" in reason
    assert decode.decode_refusal(KNOWN["sm_80"]) is None and decode.decode_gemm_fits(KNOWN["sm_80"])
    assert not decode.decode_gemm_fits(KNOWN["sm_75"])


def test_the_switch_for_amd(monkeypatch):
    reason = gpu.triton_refusal(KNOWN["gfx942"])
    assert "plain PyTorch" in reason and gpu.AMD_SWITCH in reason and "never run" in reason
    monkeypatch.setenv(gpu.AMD_SWITCH, "1")
    assert decode.decode_refusal(KNOWN["gfx942"]) is None and not decode.decode_gemm_fits(KNOWN["gfx942"])
    assert all(gpu.triton_refusal(KNOWN[name]) is None for name in ("gfx90a", "gfx942", "gfx1100"))
    assert "spill" in decode.decode_refusal(KNOWN["gfx1100"]) and "spill" in gates_refusal(KNOWN["gfx1100"])
    assert gates_refusal(KNOWN["gfx942"]) is None
    for name in ("gfx908", "gfx1030", "gfx1201"):  # of other families; Triton's bits for them were not looked at
        reason = gpu.triton_refusal(KNOWN["gfx1100"]._replace(architecture=name))
        assert f"is {name}, the kernels were compiled for gfx90a, gfx942, gfx1100 alone" in reason
    with pretending(KNOWN["gfx942"]):
        assert gpu.register_limit(96, torch.device("meta")) == {}
    with pretending(KNOWN["sm_90"]):
        assert gpu.register_limit(96, torch.device("meta")) == {"maxnreg": 96}


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [24, 64, 128, 256])
@pytest.mark.parametrize("window", [1, 64, 1000, 1024, 2049, 8192])
@pytest.mark.parametrize("heads", [1, 3, 16, 64, 1000])
def test_splits_cover_the_ring(heads, window, head_dim, itemsize):
    """All slots, no split without one, and not many more programs than are asked for."""
    with pretending(KNOWN["sm_90"]):
        tile = decode.attention_split(heads, 10, window, head_dim, itemsize, torch.device("meta"))
    split, splits = tile["SPLIT"], tile["SPLITS"]
    assert splits * split >= window > (splits - 1) * split and split % tile["BLOCK_S"] == 0
    assert splits <= max(1, 1.5 * decode.ATTENTION_PROGRAMS * 132 / heads)


@pytest.mark.parametrize(
    "rows, window, head_dim, splits",
    [
        (1, 1024, 128, 16),
        (16, 1024, 128, 16),
        (64, 1024, 128, 4),
        (1, 2048, 256, 64),
        (1, 2049, 256, 65),
        (64, 2049, 256, 5),
    ],
)
def test_splits_on_a_hopper_gpu(rows, window, head_dim, splits):
    """As they were measured; a window of 2049 costs one block more than 2048, not as many again."""
    with pretending(KNOWN["sm_90"]):
        assert decode.attention_split(rows, 10, window, head_dim, 2, torch.device("meta"))["SPLITS"] == splits
        assert decode.draft_attention_split(10, 16, 1024, 128, 2, torch.device("meta"))["SPLITS"] == 16


@pytest.mark.parametrize("name", KNOWN)
def test_the_report(name, capsys):
    report.main(["--gpu", name])
    text = capsys.readouterr().out
    assert KNOWN[name].name in text
    for feature in ("scan", "gates", "heads of 64", "heads of 256", "GEMV", "GEMM"):
        assert feature in text
    assert ("measured" in text) == (name == "sm_90")
    assert "Traceback" not in text and (gpu.AMD_SWITCH in text) == (KNOWN[name].vendor == "amd")


def test_the_report_of_a_cpu():
    assert "no GPU" in report.report(gpu.GPU())


def test_an_unknown_gpu():
    with pytest.raises(ValueError, match="gpu = 'sm_91': allowed are sm_75"):
        known_gpu("sm_91")


BITS = {"MATMUL": 16, "MATMUL_BYTES": 8, "MATMUL_NF4": 4}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("table", BITS)
@pytest.mark.parametrize("name", FROM_AMPERE_ON)
def test_tiles_of_many_rows_fit(name, table, gated):
    """At least the 64 inputs that share a scale in 4 bits; where tiles were measured, they are what is listed."""
    listed = getattr(decode, table.replace("MATMUL", "MATMUL_GATED") if gated else table)
    matrices = [(1,), (2560,), (7680,), (32000,), (256000,)] + ([] if gated else [(2560, 128, 128), (2560, 2560)])
    for sizes, inputs, rows in itertools.product(matrices, (1, 64, 2560, 7680), (2, 16, 17, 64)):
        tile = decode.matmul_tile(listed, list(sizes), inputs, rows, KNOWN[name])
        assert tile["BLOCK_M"] >= max(rows, 16) and tile["STAGES"] >= 3 and tile["BLOCK_D"] >= 64
        assert all(size & (size - 1) == 0 for size in (tile["BLOCK_N"], tile["BLOCK_D"], tile["num_warps"]))
        assert 1 <= tile["SPLITS"] <= -(-inputs // tile["BLOCK_D"])  # each has some of the inputs
        assert tile["SPLITS"] == 1 or sum(-(-size // tile["BLOCK_N"]) for size in sizes) <= COUNTERS
        weights, of_rows = (1 + gated) * tile["BLOCK_N"] * BITS[table] // 8, 2 * tile["BLOCK_M"]
        numbers = (1 + gated) * tile["BLOCK_N"] * 2 if table == "MATMUL_NF4" else 0
        shared = (tile["STAGES"] * (weights + of_rows) + of_rows + numbers) * tile["BLOCK_D"]
        assert shared <= KNOWN[name].shared_memory, (sizes, inputs, rows)
        if name == "sm_90":
            chosen = [each[:4] for each in listed[tile["BLOCK_M"]].values()]
            assert (tile["BLOCK_N"], tile["BLOCK_D"], tile["STAGES"], tile["num_warps"]) in chosen

"""The compile check: what it calls a fault, and that it finds one in a kernel that has it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import check_portability
import pytest

from modeling_griffin import gpu


SCRIPT = Path(check_portability.__file__)
LAUNCH = {
    "case": "scan (1, 4096)",
    "name": "forward_kernel",
    "seconds": 3.0,
    "error": None,
    "shared_memory": 2048,
    "fixed_memory": 0,
    "limit": 101376,
    "registers": 96,
    "spills": 0,
    "allowed_spills": 128,
    "shared_words": None,
    "hidden_words": False,
}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize(
    "change, fault",
    [
        ({}, None),
        ({"shared_memory": 101377}, "101377 bytes of shared memory, allowed are 101376"),
        ({"shared_memory": 49153, "fixed_memory": 1}, "for 49152 of which Triton does not ask"),
        ({"shared_memory": 49153}, None),
        ({"shared_memory": 49154, "fixed_memory": 1}, None),
        ({"spills": 129}, "spills 129 bytes a thread, allowed are 128"),
        ({"spills": None}, None),
        ({"seconds": 20.5}, "compiled for 20 s"),
        ({"error": "CompilationError: x"}, "CompilationError: x"),
        ({"shared_words": "4 x 64"}, "two readers"),
        ({"hidden_words": True}, "a cache of their own"),
    ],
)
def test_faults(change, fault):
    found = check_portability._faults("sm_89 2B bfloat16", {**LAUNCH, **change})
    assert len(found) == (fault is not None)
    assert fault is None or (fault in found[0] and "sm_89 2B bfloat16, scan (1, 4096), forward_kernel" in found[0])


@pytest.mark.parametrize("verbose", [False, True])
def test_what_is_printed(verbose, capsys):
    """A line for a GPU, a shape and a dtype, and one for each failure; with --verbose one for each launch too."""
    failures = check_portability._report("sm_89 2B bfloat16", [LAUNCH, {**LAUNCH, "spills": 500}], verbose)
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "sm_89 2B bfloat16: 2 launches, 6 s, at most 2048 bytes, 1 failures" and len(failures) == 1
    assert others[:1] == failures and len(others) == (3 if verbose else 1)


@pytest.mark.parametrize("per_thread, found", [("[1, 2]", False), ("[1, 4]", True)])
def test_words_with_two_readers(per_thread, found):
    """4 warps of 32 threads hold 4 x 64 words: two each and no word twice, or four each and every word twice."""

    class Compiled:
        name = "forward_kernel"
        constants = {"SEGMENTS": 4, "CHANNELS": 64}
        text = {
            "ttgir": f"#blocked = #ttg.blocked<{{sizePerThread = {per_thread}, threadsPerWarp = [1, 32], "
            "warpsPerCTA = [4, 1], order = [1, 0]}>\n%0 = tt.load : tensor<4x64xi64, #blocked>\n"
            "%1 = arith.extsi : tensor<4x1xi64, #blocked>"
        }

    assert (check_portability._shared_words(Compiled) is not None) == found


MAP, COMPLETE = "v[2:3]", "v[6:7]"  # what a tile publishes


def words_of(architecture: str, poll: str, *stores: str):
    """A kernel's text with these bits of its poll and of both words that it publishes."""
    size = "b64" if architecture.startswith("gfx11") else "dwordx2"
    lines = [
        f'\t.amdgcn_target "amdgcn-amd-amdhsa--{architecture}"',
        f"\tglobal_load_{size} v[4:5], v[8:9], off {poll}",
    ]
    lines += [f"\tglobal_store_{size} v[10:11], {word}, off {bits}" for word, bits in zip((MAP, COMPLETE), stores)]

    class Compiled:
        name, constants = "forward_kernel", {"CHAINED": True}
        text = {"amdgcn": "\n".join(lines) + "\n"}

    return Compiled


@pytest.mark.parametrize(
    "architecture, poll, stores, hidden",
    [
        ("gfx942", "sc0 sc1", ("sc0 sc1", "sc0 sc1"), False),
        ("gfx942", "sc0 sc1", ("sc0 sc1", "sc0"), True),
        ("gfx942", "sc0", ("sc0 sc1", "sc0 sc1"), True),  # the caches of its own part of the chip
        ("gfx942", "", ("sc0 sc1", "sc0 sc1"), True),
        ("gfx90a", "glc", ("", ""), False),  # stores are written through
        ("gfx90a", "", ("", ""), True),
        ("gfx90a", "glc", ("",), True),
        ("gfx1100", "glc dlc", ("dlc", "dlc"), False),
        ("gfx1100", "offset:8 glc dlc", ("offset:8 dlc", "dlc"), False),
        ("gfx1100", "dlc", ("dlc", "dlc"), True),  # of a cache behind the one that all share
        ("gfx1100", "", ("dlc", "dlc"), True),
        ("gfx1100", "glc dlc", ("dlc", ""), True),
    ],
)
def test_words_in_a_cache(architecture, poll, stores, hidden):
    assert check_portability._hidden_words(words_of(architecture, poll, *stores)) == hidden


@pytest.mark.parametrize(
    "architecture, dtype, case, kernel, expected",
    [
        ("sm_90", "bfloat16", "scan (1, 4096)", "backward_kernel", 128),
        ("sm_90", "float32", "decode, 1 rows", "attention_kernel", 1024),
        ("sm_90", "bfloat16", "16 sequences of 4096 tokens", "backward_kernel", 128),
        ("gfx1100", "bfloat16", "16 sequences of 4096 tokens", "backward_kernel", 320),
        ("gfx1100", "bfloat16", "scan (1, 4096)", "backward_kernel", 128),
    ],
)
def test_a_bound_of_spills_is_for_what_it_names(architecture, dtype, case, kernel, expected):
    assert check_portability._allowed_spills(architecture, dtype, case, kernel) == expected


@pytest.mark.parametrize("architecture", ["gfx90a", "gfx1100"])
def test_words_in_a_cache_by_other_instructions(architecture):
    """Those for tensors of less than 2 GB, which lose the bits; and two words by one load, which could be torn."""
    for old, new in (("global_", "buffer_"), ("load_b64", "load_b128"), ("load_dwordx2", "load_dwordx4")):
        compiled = words_of(architecture, "glc dlc", "dlc", "dlc")
        text = compiled.text["amdgcn"]
        compiled.text = {"amdgcn": text.replace(old, new)}
        assert check_portability._hidden_words(compiled) == (old in text)


def test_what_is_not_a_chain_of_tiles():
    single = words_of("gfx1100", "", "", "")
    single.constants = {"CHAINED": False}
    assert not check_portability._hidden_words(single)


def test_what_is_checked_of_amd_is_what_may_run():
    """A GPU on which the kernels may be turned on is one of the check, and each has bits of its own."""
    assert check_portability.ON_AMD == list(gpu.COMPILED_ON_AMD) == list(check_portability.VISIBLE_WORDS)
    assert set(check_portability.ON_AMD) <= {name for name, *_ in check_portability.QUICK}


def test_the_quick_form_takes_the_scan_alone_of_some(monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    check_portability.main(["--quick"])
    check_portability.main(["--quick", "--case", "loss"])
    chosen = {(command[3], command[command.index("--case") + 1]) for command in commands}
    assert {("sm_90", ""), ("gfx942", ""), ("gfx1100", "scan"), ("gfx1100", "loss"), ("sm_90", "loss")} <= chosen
    assert all("--quick" in command for command in commands) and len(commands) == 2 * len(check_portability.QUICK)


def test_a_process_that_fails_is_a_failure(monkeypatch):
    done = subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: no such module\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(SystemExit, match="sm_89 9B float32: ImportError: no such module"):
        check_portability.main(["--gpu", "sm_89", "--shape", "9B", "--dtype", "float32"])


@needs_triton
def test_a_kernel_that_does_not_fit():
    """A tile of local attention that asks for more than 99 KB is found, by name."""
    program = """
import torch
from portability.compiled_launches import capturing, target_of
from modeling_griffin import gpu
from modeling_griffin.kernels import attention
from modeling_griffin.kernels.device.known import known_gpu, pretending

known = known_gpu("sm_89")
with pretending(known), capturing(target_of("sm_89")) as found:
    query, key = (torch.empty(256, heads, 256, dtype=torch.bfloat16, device="meta") for heads in (2, 1))
    each, blocks = (torch.empty(n, dtype=torch.int32, device="meta") for n in (256, 2))
    attention.attention_forward(query, key, key, each, blocks, 0.1, attention.Tile(1, 128, 64, 8, 2))
    attention.attention_forward(query, key, key, each, blocks, 0.1)
wide, chosen = found
assert wide.shared_memory > known.shared_memory >= chosen.shared_memory > 0, found
assert wide.error is None and wide.registers and wide.seconds > 0
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=SCRIPT.parents[1], env=_environment(), capture_output=True
    )
    assert run.returncode == 0, run.stderr.decode()


@needs_triton
def test_every_kernel_is_in_the_matrix():
    """What is launched, and nothing compiled, for one GPU that has all kernels."""
    program = """
import re
from pathlib import Path
import torch
from triton.runtime.jit import JITFunction
import modeling_griffin
from portability.cases import cases
from portability.compiled_launches import capturing, target_of
from portability.shapes import SHAPES
from modeling_griffin.kernels.device.known import known_gpu, pretending

launched = set()
with pretending(known_gpu("sm_90")), capturing(target_of("sm_90")):
    JITFunction.run = lambda self, *args, **options: launched.add((self.fn.__module__, self.fn.__name__))
    for dtype in (torch.bfloat16, torch.float32):
        for _, launch in cases(SHAPES["2B"], dtype, False):
            launch()
root, kernels = Path(modeling_griffin.__file__).parent, set()
for path in root.rglob("*.py"):
    for function in re.findall(r"@triton.jit.*\\n *def (\\w+_kernel|_\\w+_(?:forward|backward))\\(", path.read_text()):
        kernels.add((".".join(("modeling_griffin", *path.relative_to(root).with_suffix("").parts)), function))
assert len(kernels) > 40, kernels
assert launched == kernels, (kernels - launched, launched - kernels)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=SCRIPT.parents[1], env=_environment(), capture_output=True
    )
    assert run.returncode == 0, run.stderr.decode()


def _environment() -> dict[str, str]:
    paths = [str(SCRIPT.parents[1]), str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "0"}

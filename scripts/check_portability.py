"""Compiles every Triton launch that the package can choose for GPUs that need not be there, and checks what it needs.

    python scripts/check_portability.py                       the whole matrix: families, model shapes, dtypes
    python scripts/check_portability.py --quick               the tightest of each: what .ci/run does
    python scripts/check_portability.py --gpu sm_89 gfx942    only these

Needs Triton, no GPU and no driver. A launch fails by name where it does not compile, asks for more shared memory than
a block may have, spills more bytes of registers a thread than `_allowed_spills` says, takes longer than SECONDS of
a processor to compile. So does the scan's look-back where two threads would hold the same published word, since they
may see it differently, or where AMD's compiler leaves out the bits that make such a word visible.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from command_line import Parser


SECONDS, SPILLS = 20.0, {"bfloat16": 128, "float32": 256}  # float32 is multiplied without tensor cores
# Kernels that spill more, and are slow: of decoding steps in float32, at the largest with heads of 256.
SPILLS_OF = {
    ("float32", "attention_kernel"): 1024,
    ("float32", "draft_attention_kernel"): 2560,
    ("float32", "draft_recurrent_kernel"): 1280,
}
WITHOUT_ASKING = 48 << 10  # bytes of shared memory that a block gets on any NVIDIA GPU; Triton asks for more by its own
SEQUENCES_SPILLS = {"gfx1100": 320}  # of sequences end to end: 296 backward with states
SEQUENCES_SECONDS = 40.0  # of sequences end to end: 28 backward, since each of its rows loads and stores states
FAMILIES = ["sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120"]
ON_AMD = ["gfx90a", "gfx942", "gfx1100"]
# How a word of 64 bits is stored for others to see, and loaded past caches that they do not write to: one instruction
# each, with the bits of LLVM's memory model for AMD. Stores of gfx90a and gfx1100 go through such caches anyway; `dlc`
# there says that the compiler kept the store as it was asked for.
VISIBLE_WORDS = {
    "gfx90a": (r"global_store_dwordx2 .*", r"global_load_dwordx2 .*\bglc\b"),
    "gfx942": (r"global_store_dwordx2 .*\bsc0 sc1\b", r"global_load_dwordx2 .*\bsc0 sc1\b"),
    "gfx1100": (r"global_store_b64 .*\bdlc\b", r"global_load_b64 .*\bglc\b"),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
QUICK = [(gpu, "2B", "bfloat16", "") for gpu in ("sm_89", "sm_90", "gfx942")]
QUICK += [(gpu, "2B", "bfloat16", "scan") for gpu in ("gfx90a", "gfx1100")]  # whose words have bits of their own


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one model shape, 16 bits, three GPUs and the scan of two")
    parser.add_argument("--gpu", nargs="+", default=FAMILIES + ON_AMD, choices=FAMILIES + ON_AMD)
    parser.add_argument("--shape", nargs="+", default=None, help="names of model shapes; default all")
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--case", default="", help="only cases whose name has this, for example 'local attention'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--one", nargs=3, metavar=("GPU", "SHAPE", "DTYPE"), help=argparse.SUPPRESS)
    parser.add_argument("--verbose", action="store_true", help="a line for every launch, not only for failures")
    arguments = parser.parse_args(argv)
    if arguments.one:
        architecture, shape, dtype = arguments.one
        compile_one(architecture, shape, dtype, arguments.quick, arguments.case)
        return
    failures = check(_chosen(arguments), arguments)
    if failures:
        raise SystemExit(f"{len(failures)} launches failed:\n" + "\n".join(failures))


def _chosen(arguments) -> list[tuple[str, str, str, str]]:
    """GPU, shape, dtype, and what the names of cases have."""
    if arguments.quick:
        return [(gpu, shape, dtype, arguments.case or case) for gpu, shape, dtype, case in QUICK]
    shapes = arguments.shape or ["2B", "9B", "test 2B", "100M", "heads of 64"]
    case = arguments.case
    return [(gpu, shape, dtype, case) for gpu in arguments.gpu for shape in shapes for dtype in arguments.dtype]


def check(chosen: list[tuple[str, str, str, str]], arguments: argparse.Namespace) -> list[str]:
    """A process each, since what is compiled for NVIDIA and for AMD differs from the import on."""
    options = ["--quick"] if arguments.quick else []

    def run(one):
        command = [sys.executable, __file__, "--one", *one[:3], "--case", one[3], *options]
        return subprocess.run(command, capture_output=True, text=True)

    failures = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for one, done in zip(chosen, pool.map(run, chosen)):
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"
                failures.append(f"{' '.join(one[:3])}: {last}")
                continue
            launches = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            failures += _report(" ".join(one[:3]), launches, arguments.verbose)
    return failures


def _report(title: str, launches: list[dict], verbose: bool) -> list[str]:
    failures = [line for launch in launches for line in _faults(title, launch)]
    seconds = sum(launch["seconds"] for launch in launches)
    most = max((launch["shared_memory"] for launch in launches), default=0)
    found = f"{len(launches)} launches, {seconds:.0f} s, at most {most} bytes, {len(failures)} failures"
    print("\n".join([f"{title}: {found}", *failures]), flush=True)
    for launch in launches if verbose else []:
        print("   ", *(f"{name}={value}" for name, value in launch.items() if value is not None), flush=True)
    return failures


def _faults(title: str, launch: dict) -> list[str]:
    name = f"{title}, {launch['case']}, {launch['name']}"
    if launch["error"]:
        return [f"{name}: {launch['error']}"]
    found = []
    if launch["shared_memory"] > launch["limit"]:
        found.append(f"{launch['shared_memory']} bytes of shared memory, allowed are {launch['limit']}")
    asked = launch["shared_memory"] - launch["fixed_memory"]
    if asked <= WITHOUT_ASKING < launch["shared_memory"]:
        found.append(f"{launch['shared_memory']} bytes of shared memory, for {asked} of which Triton does not ask")
    if (launch["spills"] or 0) > launch["allowed_spills"]:
        found.append(f"spills {launch['spills']} bytes a thread, allowed are {launch['allowed_spills']}")
    seconds = SEQUENCES_SECONDS if "sequences" in launch["case"] else SECONDS
    if launch["seconds"] > seconds:
        found.append(f"compiled for {launch['seconds']:.0f} s, allowed are {seconds:.0f} s")
    if launch["shared_words"]:
        found.append(f"published words have two readers: {launch['shared_words']}")
    if launch["hidden_words"]:
        found.append("published words are written or polled in a cache of their own")
    return [f"{name}: {fault}" for fault in found]


def compile_one(architecture: str, shape: str, dtype: str, quick: bool, wanted: str) -> None:
    """Prints a JSON line for each kernel of all cases."""
    if architecture.startswith("gfx"):
        torch.version.hip = "for compilation"  # before the kernels are imported: they ask at import
        os.environ["GRIFFIN_TRITON_ON_AMD"] = "1"
    from portability.cases import cases
    from portability.compiled_launches import capturing, target_of
    from portability.shapes import SHAPES

    from modeling_griffin.kernels.device.known import known_gpu, pretending

    known = known_gpu(architecture)
    with pretending(known), capturing(target_of(architecture)) as found:
        for case, launch in cases(SHAPES[shape], DTYPES[dtype], quick):
            if wanted not in case:
                continue
            before = len(found)
            launch()
            for each in found[before:]:
                _print(case, known.shared_memory, _allowed_spills(architecture, dtype, case, each.name), each)


def _allowed_spills(architecture: str, dtype: str, case: str, kernel: str) -> int:
    usual = SPILLS_OF.get((dtype, kernel), SPILLS[dtype])
    return SEQUENCES_SPILLS.get(architecture, usual) if "sequences" in case else usual


def _print(case: str, limit: int, allowed_spills: int, each) -> None:
    line = {
        "case": case,
        "name": each.name,
        "seconds": round(each.seconds, 2),
        "error": each.error,
        "shared_memory": each.shared_memory,
        "fixed_memory": each.fixed_memory,
        "limit": limit,
        "registers": each.registers,
        "spills": each.spills,
        "allowed_spills": allowed_spills,
        "shared_words": _shared_words(each),
        "hidden_words": _hidden_words(each),
    }
    print(json.dumps(line), flush=True)


def _shared_words(each) -> str | None:
    """The layout of 64-bit words of the look-back, where a word has more than one thread."""
    if each.name not in ("forward_kernel", "backward_kernel") or "ttgir" not in each.text:
        return None
    layouts = dict(re.findall(r"#(\w+) = #ttg\.blocked<\{([^}]*)\}>", each.text["ttgir"]))
    shape = each.constants.get("SEGMENTS"), each.constants.get("CHANNELS")
    for rows, columns, name in re.findall(r"tensor<(\d+)x(\d+)xi64, #(\w+)>", each.text["ttgir"]):
        if (int(rows), int(columns)) != shape:
            continue
        lists = re.findall(r"(?:sizePerThread|threadsPerWarp|warpsPerCTA) = \[(\d+), (\d+)\]", layouts.get(name, ""))
        covered = [1, 1]
        for pair in lists:
            covered = [covered[0] * int(pair[0]), covered[1] * int(pair[1])]
        if lists and (covered[0] > int(rows) or covered[1] > int(columns)):
            return f"{rows} x {columns} in {layouts[name]}"
    return None


def _hidden_words(each) -> bool:
    """Whether a chain of tiles on AMD polls, or publishes one of its two words, without the bits of `VISIBLE_WORDS`."""
    if "amdgcn" not in each.text or not each.constants.get("CHAINED") or each.name == "lay_out_kernel":
        return False  # that one only clears the words, and ends before the kernel that polls them
    architecture = re.search(r'amdgcn_target "[^"]*-(gfx\w+)', each.text["amdgcn"])[1]
    store, load = VISIBLE_WORDS[architecture]
    stores, loads = (len(re.findall(pattern, each.text["amdgcn"])) for pattern in (store, load))
    return stores < 2 or loads < 1  # a tile's map, and then its complete one


if __name__ == "__main__":
    main()

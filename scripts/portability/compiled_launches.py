"""Compiles Triton launches for a GPU that is not there: the launch code runs on meta tensors, no kernel is run.

While `capturing(target)` is active, every `kernel[grid](...)` compiles for the target and is noted, with the resources
that its binary asks for; nothing is launched, so that no GPU and no driver is needed. Launch code that has to choose
by the GPU asks `modeling_griffin.gpu`, whose answers the caller replaces.
"""

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@dataclass
class Compiled:
    """One kernel as it was compiled. shared_memory, spills: bytes a block and a thread; None where not known.

    fixed_memory: of the shared memory what assembly declares, which Triton does not count.
    seconds: of a processor, the assembler's included: on a busy machine they stay the same.
    """

    name: str
    constants: dict
    seconds: float
    error: str | None = None
    shared_memory: int = 0
    registers: int | None = None
    spills: int | None = None
    fixed_memory: int = 0
    text: dict[str, str] = field(default_factory=dict, repr=False)  # of each stage that is text: "ttgir", "ptx", ...


class _AbsentDriver:
    """As much of a driver as the compiler asks for."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def target_of(architecture: str) -> GPUTarget:
    """ "sm_90" or "gfx942" -> what Triton compiles for."""
    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture[3:]), 32)
    return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)


@contextlib.contextmanager
def capturing(target: GPUTarget) -> Iterator[list[Compiled]]:
    """Yields the list that each new kernel is appended to. A kernel that fails to compile is noted and left out."""
    found, seen, launch = [], set(), JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        begin = _processor_seconds()
        try:
            kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            found.append(Compiled(self.__name__, _constants(kwargs), _processor_seconds() - begin, _first_line(error)))
            return None
        if id(kernel) not in seen:
            seen.add(id(kernel))
            found.append(_described(self.__name__, kwargs, _processor_seconds() - begin, kernel))
        return kernel

    before = driver._active  # the property of that name would look for a GPU
    driver.set_active(_AbsentDriver(target))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = launch
        driver.set_active(before)


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _constants(kwargs: dict) -> dict:
    return {name: value for name, value in kwargs.items() if isinstance(value, (bool, int)) and name != "debug"}


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def _described(name: str, kwargs: dict, seconds: float, kernel) -> Compiled:
    registers, spills = _resources(kernel.asm)
    text = {stage: code for stage, code in kernel.asm.items() if isinstance(code, str)}
    fixed = sum(map(int, re.findall(r"\.shared \.align \d+ \.b8 \w+\[(\d+)\]", text.get("ptx", ""))))
    shared = kernel.metadata.shared + fixed
    return Compiled(name, _constants(kwargs), seconds, None, shared, registers, spills, fixed, text)


def _resources(asm: dict) -> tuple[int | None, int | None]:
    """Registers of a thread, and bytes of them that lie in memory: a stack is nothing but spills in these kernels."""
    if "amdgcn" in asm:
        registers = re.search(r"\.vgpr_count:\s+(\d+)", asm["amdgcn"])
        spills = re.search(r"\.private_segment_fixed_size:\s+(\d+)", asm["amdgcn"])
        return int(registers[1]), int(spills[1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(asm["cubin"])
        text = subprocess.run([_cuobjdump(), "--dump-resource-usage", path], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    return (int(found[1]), int(found[2]) + int(found[3])) if found else (None, None)


def _cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")

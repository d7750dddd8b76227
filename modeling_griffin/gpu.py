"""What a GPU is: the one file that asks PyTorch for a device's properties. What follows from them: `kernels.device`.

It ships, because the scan does, which has to know whether a device can run it.
"""  # SPDX-License-Identifier: Apache-2.0

import contextlib
import functools
from typing import Any, NamedTuple

import torch

from .slots import slot


class GPU(NamedTuple):
    """What kernels are chosen by. A device that is no GPU has vendor "none" and zeros.

    vendor: "nvidia", "amd" or "none". capability: (major, minor) of an NVIDIA GPU, (0, 0) of anything else.
    shared_memory: bytes that a block may opt into. architecture: an AMD GPU's, for example "gfx942".
    """

    name: str = "CPU"
    vendor: str = "none"
    capability: tuple[int, int] = (0, 0)
    multiprocessors: int = 1
    shared_memory: int = 0
    architecture: str = ""


OLDEST_FOR_TRITON = (7, 5)  # below, Triton's code does not assemble
AMD_SWITCH = "GRIFFIN_TRITON_ON_AMD"
COMPILED_ON_AMD = ("gfx90a", "gfx942", "gfx1100")  # there the words of the scan's look-back are visible
ON_AMD = (
    "on AMD GPUs everything is in plain PyTorch (scan, convolution, gates, norms, rotation, activation, loss, local "
    f"attention, and generate in Transformers' loop); the environment variable {AMD_SWITCH}=1 turns the Triton kernels "
    f"on, which compile for {', '.join(COMPILED_ON_AMD)} (the last without gates and decoding) but were never run"
)
OLDEST_TRITON = (3, 5)  # before, programmatic dependent launch is missing; PyTorch 2.9 brings 3.5


_PRETENDED: list[GPU] = []  # by `kernels.device.known.pretending`


def properties(device: torch.device) -> GPU:
    """Of this device; cached, since launches ask."""
    if _PRETENDED:
        return _PRETENDED[-1]
    return GPU() if device.type != "cuda" else _of_gpu(device.index if device.index is not None else _current())


def _current() -> int:
    return torch.cuda.current_device()


@functools.cache
def _of_gpu(index: int) -> GPU:
    found, is_amd = torch.cuda.get_device_properties(index), torch.version.hip is not None
    return GPU(
        found.name,
        "amd" if is_amd else "nvidia",
        (0, 0) if is_amd else torch.cuda.get_device_capability(index),
        found.multi_processor_count,
        found.shared_memory_per_block if is_amd else found.shared_memory_per_block_optin,
        found.gcnArchName.partition(":")[0] if is_amd else "",
    )


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; 1 of a device that is no GPU."""
    return properties(device).multiprocessors


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends: programmatic dependent launch, from capability 9 on."""
    return properties(device).capability >= (9, 0)


def register_limit(registers: int | None, device: torch.device) -> dict[str, int]:
    """Launch options that keep a thread to so many registers; only Triton's compiler for NVIDIA has one."""
    return {} if registers is None or properties(device).vendor == "amd" else {"maxnreg": registers}


def on_its_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def ceil_div(total: int, size: int) -> int:
    """How many blocks of this size; Triton's, which works in kernels too, costs a launch of the host's time."""
    return -(-total // size)


@slot
def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> bool:
    """`kernel[grid](*arguments, **options)` on the device of the first argument, a tensor. Returns True."""
    with on_its_device(arguments[0]):
        kernel[grid](*arguments, **options)
    return True


@slot
def wanted_on_amd() -> bool:
    """Whether a person has turned the kernels on where nobody has run them; the installed package asks AMD_SWITCH."""
    return False


def triton_refusal(gpu: GPU) -> str | None:
    """None where kernels in Triton can run on this GPU, else why not."""
    version = _triton_version()
    if version is None:
        return "Triton is not installed"
    if version < OLDEST_TRITON:
        return f"Triton {'.'.join(map(str, version))} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    if gpu.vendor == "nvidia" and gpu.capability < OLDEST_FOR_TRITON:
        return f"{gpu.name} has compute capability {_dotted(gpu.capability)}, Triton's kernels need 7.5"
    if gpu.vendor == "amd" and not wanted_on_amd():
        return ON_AMD
    if gpu.vendor == "amd" and gpu.architecture not in COMPILED_ON_AMD:
        return f"{gpu.name} is {gpu.architecture}, the kernels were compiled for {', '.join(COMPILED_ON_AMD)} alone"
    return None


def no_kernels_reason(device: torch.device) -> str | None:
    """`triton_refusal` of this device; found once, since every layer asks."""
    return triton_refusal(_PRETENDED[-1]) if _PRETENDED else _no_kernels_reason(device)


@functools.cache
def _no_kernels_reason(device: torch.device) -> str | None:
    return triton_refusal(properties(device))


@functools.cache
def _triton_version() -> tuple[int, int] | None:
    try:
        import triton
    except ImportError:
        return None
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))

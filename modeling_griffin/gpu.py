"""What a GPU is: the one file that asks PyTorch for a device's properties. What follows from them: `kernels/device.py`.

It ships, because the scan and flash attention do, which have to know whether a device can run them.
"""

import contextlib

import torch


def capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) compute capability of an NVIDIA GPU; (0, 0) of anything else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; 1 of a device that is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may opt into; 0 of a device that is no GPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends: programmatic dependent launch, from capability 9 on."""
    return capability(device)[0] >= 9


def on_its_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

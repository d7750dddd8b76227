"""Numbers of the host's on their way to a device."""

from typing import Any

import torch


def upload(values: Any, device: torch.device) -> torch.Tensor:
    """A tensor of numbers, or of a tensor on the CPU. By pinned memory: from other memory, a copy waits for the GPU."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

"""Properties of GPUs that need not be there: one of each class, for the report and for the compile check.

Shared memory a block may opt into, by NVIDIA's compute capability (CUDA's programming guide, "technical specifications
per compute capability") and AMD's LDS. Multiprocessors are those of the GPU that is named.
"""

import contextlib
from collections.abc import Iterator

from ...gpu import _PRETENDED, GPU


KIB = 1024
KNOWN = {
    "sm_75": GPU("T4 (Turing)", "nvidia", (7, 5), 40, 64 * KIB),
    "sm_80": GPU("A100 (Ampere)", "nvidia", (8, 0), 108, 163 * KIB),
    "sm_86": GPU("RTX 3090, A10 (Ampere)", "nvidia", (8, 6), 82, 99 * KIB),
    "sm_89": GPU("RTX 4090, L4, L40 (Ada)", "nvidia", (8, 9), 128, 99 * KIB),
    "sm_90": GPU("H100, H200 (Hopper)", "nvidia", (9, 0), 132, 227 * KIB),
    "sm_100": GPU("B200 (Blackwell)", "nvidia", (10, 0), 148, 227 * KIB),
    "sm_120": GPU("RTX 5090 (Blackwell)", "nvidia", (12, 0), 170, 99 * KIB),
    "gfx90a": GPU("MI250 (CDNA 2)", "amd", (0, 0), 104, 64 * KIB, "gfx90a"),
    "gfx942": GPU("MI300X (CDNA 3)", "amd", (0, 0), 304, 64 * KIB, "gfx942"),
    "gfx1100": GPU("RX 7900 (RDNA 3)", "amd", (0, 0), 96, 64 * KIB, "gfx1100"),
}
# Where the kernels of gates and of decoding steps spill up to two kilobytes of registers a thread, as compiled.
SPILLING = ("gfx1100",)


def known_gpu(architecture: str) -> GPU:
    """Raises ValueError for one that is not in the table."""
    if architecture not in KNOWN:
        raise ValueError(f"gpu = {architecture!r}: allowed are {', '.join(KNOWN)}")
    return KNOWN[architecture]


@contextlib.contextmanager
def pretending(gpu: GPU) -> Iterator[None]:
    """Inside, every device is said to be this GPU: to see what would be chosen on one that is not there."""
    _PRETENDED.append(gpu)
    try:
        yield
    finally:
        _PRETENDED.pop()

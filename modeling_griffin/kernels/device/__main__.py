"""What a machine gets: each feature, what runs it and why.

python -m modeling_griffin.kernels.device                   every GPU of this machine, or its CPU
python -m modeling_griffin.kernels.device --gpu sm_89       a GPU that need not be there
"""

import argparse
from collections.abc import Iterator

import torch

from ...gpu import GPU, properties, triton_refusal
from . import attention_refusal, can_overlap, decode_gemm_fits, decode_refusal, gates_refusal
from .known import KNOWN, known_gpu, pretending
from .training import NARROW_GATES, flash_refusal


HEADS, TIMED_HEAD = (64, 128, 256), 128
MEASURED = "measured"
TRITON, TORCH = "Triton kernel", "PyTorch"
Row = tuple[str, str, str]  # feature, what runs it, why


def main(argv: list[str] | None = None) -> None:
    program = "python -m modeling_griffin.kernels.device"
    parser = argparse.ArgumentParser(prog=program, description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", nargs="+", choices=sorted(KNOWN), help="GPUs that need not be there")
    arguments = parser.parse_args(argv)
    found = [known_gpu(name) for name in arguments.gpu] if arguments.gpu else here()
    print("\n\n".join(report(gpu) for gpu in found))


def here() -> list[GPU]:
    """The GPUs of this machine, or that there is none."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [properties(device) for device in devices or [torch.device("cpu")]]


def report(gpu: GPU) -> str:
    """The properties that decide, and a line for each feature."""
    refusal = None if gpu.vendor == "none" else triton_refusal(gpu)
    lines = [_title(gpu), *([] if refusal is None else [f"  no Triton kernels: {refusal}"])]
    found = list(rows(gpu))
    widths = [max(len(row[i]) for row in found) for i in range(2)]
    lines += [f"  {feature:{widths[0]}}  {backend:{widths[1]}}  {why}".rstrip() for feature, backend, why in found]
    return "\n".join(lines)


def _title(gpu: GPU) -> str:
    if gpu.vendor == "none":
        return "no GPU: everything is in plain PyTorch"
    memory = f"{gpu.multiprocessors} multiprocessors, {gpu.shared_memory:,} bytes of shared memory a block"
    capability = f"compute capability {'.'.join(map(str, gpu.capability))}, " if gpu.vendor == "nvidia" else ""
    return f"{gpu.name}: {capability}{memory}"


def rows(gpu: GPU) -> Iterator[Row]:
    """(feature, what runs it, why) of everything that depends on the GPU."""
    if gpu.vendor == "none":
        yield "all layers, training and decoding", TORCH, "kernels are for GPUs"
        return
    refusal = triton_refusal(gpu)
    why = "see above" if refusal else _tried(gpu)
    backend = TRITON if refusal is None else TORCH
    for feature in ("scan", "convolution", "norm, rotation, activation, loss"):
        yield feature, backend, why
    yield _gates(gpu, refusal, why)
    for head_dim in HEADS:
        yield _attention(gpu, head_dim, refusal, why)
    yield from _decode(gpu, refusal, why)
    with pretending(gpu):
        overlaps = refusal is None and can_overlap(torch.device("cuda"))
    yield "kernels start while the one before ends", "yes" if overlaps else "no", "" if overlaps else "from 9.0 on"


def _tried(gpu: GPU) -> str:
    if gpu.capability == (9, 0):
        return MEASURED
    return "compiles and fits, never run by us"


def _gates(gpu: GPU, refusal: str | None, why: str) -> Row:
    reason = (refusal and why) or gates_refusal(gpu)
    feature = f"gates in 16 bits, blocks up to 256 (best up to {NARROW_GATES})"
    return (feature, TRITON, why) if reason is None else (feature, TORCH, reason)


def _attention(gpu: GPU, head_dim: int, refusal: str | None, why: str) -> Row:
    feature, reason = f"local attention in 16 bits, heads of {head_dim}", attention_refusal(head_dim, gpu)
    if reason is None:
        return feature, TRITON, "runs, tiles not timed" if why == MEASURED and head_dim != TIMED_HEAD else why
    reason = why if refusal else reason
    return feature, TORCH if flash_refusal(gpu, head_dim) else "flash attention of PyTorch (2.11 on)", reason


def _decode(gpu: GPU, refusal: str | None, why: str) -> Iterator[Row]:
    features = "decode, 1, 2 and 4 rows (GEMV)", "decode, up to 64 rows in bfloat16 (GEMM)"
    if (reason := decode_refusal(gpu)) is not None:
        loop = "Transformers' loop" if gpu.vendor == "amd" else "the forward pass as one CUDA graph"
        yield from ((feature, loop, why if refusal else reason) for feature in features)
        return
    yield features[0], TRITON, why
    gemm = decode_gemm_fits(gpu)
    yield features[1], TRITON if gemm else TORCH, why if gemm else "tiles are for NVIDIA's tensor cores"


if __name__ == "__main__":
    main()

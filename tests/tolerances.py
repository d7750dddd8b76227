"""One table of tolerances for all tests, and the one comparer that reads it.

A tolerance is the largest error allowed, as a share of the largest absolute value expected (of 1 where all are 0). Each
is a small multiple of what was measured on a CPU; 0.0 means bit for bit.
"""

import torch


TOLERANCES = {
    "exact": 0.0,
    # rg_lru_scan against float64 autograd of the reference
    "scan float64": 1e-13,
    "scan float32": 6e-6,  # 3.7e-6 on one kind of CPU, where the loop itself in float32 has 2.5e-6
    "scan float32 gradient": 2e-5,  # 1.4e-5 on one kind of CPU, where the loop itself in float32 has 7e-6
    # the layers and the model in float32, against another way to the same numbers
    "layer": 6e-7,
    "bfloat16 layer": 2e-2,  # sums over rows end in bfloat16
    "logits": 4e-6,
    "gradient": 6e-6,
    "tensor parallel gradient": 2e-5,
    "loss": 4e-7,
    "loss float64": 1e-14,
    "loss gradient": 1e-6,
    "bfloat16 rounding": 1.001 * 2**-8,  # half a unit in the last place, and little beside it
    "float16 rounding": 1.001 * 2**-11,
    "trained parameter": 1e-6,  # after three steps of AdamW
    "golden training": 2e-4,  # twenty steps of AdamW, on another processor than the one that recorded them
    "bfloat16 logits": 2e-2,
    "LLM.int8 logits": 4e-2,  # it rounds what a layer reads to 8 bits: 0.025 on an H200
    "float16 logits": 3e-3,
    "mlx logits": 6e-6,
    "mlx epsilon": 1e-4,
    "mlx bfloat16": 5e-2,
    "executorch xnnpack": 1e-3,  # 4e-4 with its kernels; its portable ones are as exact as ours
    "decay": 3e-7,
    "rotation": 2e-4,  # angles go up to 100,000, and float32 keeps 7 digits of them
}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error as a share of the largest value expected; inf where only one of the two is finite."""
    error, scale = _errors(actual, expected)
    return error.max().item() / scale if error.numel() else 0.0


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, label: str = "") -> None:
    """Fails with the largest and the mean error and where the largest is. name: a key of `TOLERANCES`."""
    assert actual.shape == expected.shape, f"{label} shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not actual.numel():
        return
    error, scale = _errors(actual, expected)
    if error.max().item() <= TOLERANCES[name] * scale:
        return
    where = tuple(index.item() for index in torch.unravel_index(error.argmax(), error.shape))
    largest, mean = error.max().item() / scale, error.mean().item() / scale
    raise AssertionError(
        f"{label or name}: error at most {largest:.3g}, mean {mean:.3g} of the "
        f"largest value {scale:.3g}; allowed {TOLERANCES[name]:.3g}; worst at {where}: "
        f"{actual[where].item():.9g}, expected {expected[where].item():.9g}"
    )


def _errors(actual: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, float]:
    actual, expected = (tensor.detach().cpu().double() for tensor in (actual, expected))
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = torch.where(same, 0.0, (actual - expected).abs()).nan_to_num(nan=torch.inf)
    finite = expected[expected.isfinite()].abs()
    scale = finite.max().item() if finite.numel() else 0.0
    return error, scale or 1.0

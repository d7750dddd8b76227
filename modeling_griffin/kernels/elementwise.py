"""Norm, gated activation and rotation on a GPU: one Triton kernel each way, every tensor read or written once.

Column sums (gradients of the norm's weight, and of the biases in front of a gated activation) are made on the way: each
program adds up its rows, and the programs' sums are added in a fixed order, so that gradients are deterministic.

Legend: N rows, D columns. Kernels: p_ pointer, i_ index, m_ mask.
"""

import torch
from torch.autograd.function import once_differentiable

from ..gpu import multiprocessors, register_limit
from .device.training import GATED_BACKWARD, GATED_FORWARD, NORM_BACKWARD, ROTATED_ROWS, norm_tile
from .launch import launch, power_of_2
from .sums import sum_of_rows


try:
    import triton
    import triton.language as tl

    from .arithmetic import gelu, gelu_and_slope
except ImportError:
    triton = None

LARGEST_ROW = 16384  # columns: a program of the norm holds a row in registers


def triton_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * (1 + weight) over the last axis, in the dtype of x."""
    return _AddRMSNorm.apply(x, None, weight, eps)


def triton_add_rms_norm(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual, and that sum, both in the dtype of the sum; without x, of the residual itself.

    The gradient of the sum is added on the way back, where it would else be a pass of its own.
    """
    return _AddRMSNorm.apply(x, residual, weight, eps)


def triton_gelu_gated(gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * x, the tanh form."""
    return _GeluGated.apply(gate, x)


def triton_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first R dimensions of each head: x (B, T, H, K), cos and sin (B, T, R), which get no gradient."""
    return _Rotate.apply(x, cos, sin)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        if x is None or residual is None:
            total = (x if residual is None else residual).contiguous()
            x, added, stored = total, None, None
        else:
            x, added = x.contiguous(), residual.contiguous()
            total = stored = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
        normed, columns = torch.empty_like(total), total.shape[-1]
        rows, tile = total.numel() // columns, norm_tile(columns)
        grid = (-(-rows // tile["ROWS"]),)
        launch(_norm_forward, grid, x, added, weight, normed, stored, rows, columns, eps, **tile)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return normed if residual is None else (normed, total)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_normed, d_total=None):
        needed, d_weight = ctx.needs_input_grad, None
        if d_normed is None:
            d_x = d_total
        else:
            d_x, d_weight = _norm_gradients(d_normed, d_total, *ctx.saved_tensors, ctx.eps)
        return d_x if needed[0] else None, d_x if needed[1] else None, d_weight, None


def _norm_gradients(d_normed, d_total, total, weight, eps) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = total.numel() // total.shape[-1], total.shape[-1]
    tile, (per_processor, registers) = norm_tile(columns), NORM_BACKWARD
    programs = min(-(-rows // tile["ROWS"]), per_processor * multiprocessors(total.device))
    d_x, partial = torch.empty_like(total), weight.new_empty(programs, columns, dtype=torch.float32)
    d_normed, d_total = (None if d is None else d.contiguous() for d in (d_normed, d_total))
    arguments = (d_normed, d_total, total, weight, d_x, partial, rows, columns, eps)
    launch(_norm_backward, (programs,), *arguments, **tile, **register_limit(registers, total.device))
    return d_x, sum_of_rows(partial, weight.dtype)


class _GeluGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, x):
        gate, x = gate.contiguous(), x.contiguous()
        ctx.save_for_backward(gate, x)
        return gelu_gated_forward(gate, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        return gelu_gated_backward(d_y, *ctx.saved_tensors, sums=False)[:2]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotated(x.contiguous(), cos, sin, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        return _rotated(d_y.contiguous(), *ctx.saved_tensors, backward=True), None, None


def _rotated(x, cos, sin, backward: bool) -> torch.Tensor:
    y, (heads, dim), rotated = torch.empty_like(x), x.shape[-2:], cos.shape[-1]
    rows = x.numel() // dim
    kept = power_of_2(dim - rotated) if dim > rotated else 0
    launch(
        *(_rotate_kernel, (-(-rows // ROTATED_ROWS),)),
        *(x, cos, sin, y, rows, heads, dim, rotated // 2),
        HALF=power_of_2(rotated // 2),
        KEPT=kept,
        ROWS=ROTATED_ROWS,
        BACKWARD=backward,
    )
    return y


def gelu_gated_forward(gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Of contiguous tensors, without a graph."""
    y, columns = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // columns
    launch(_gated_forward, _grid(GATED_FORWARD, rows, columns), gate, x, y, rows, columns, *GATED_FORWARD)
    return y


def gelu_gated_backward(
    d_y: torch.Tensor, gate: torch.Tensor, x: torch.Tensor, sums: bool
) -> tuple[torch.Tensor, torch.Tensor, tuple | None]:
    """d_gate, d_x and, if asked, their column sums (D,), summed in float32, in the dtype of x."""
    d_gate, d_x, columns = torch.empty_like(gate), torch.empty_like(x), x.shape[-1]
    rows = x.numel() // columns
    grid = _grid(GATED_BACKWARD, rows, columns)
    partial = x.new_empty(grid[0], 2 * columns, dtype=torch.float32) if sums else None
    launch(_gated_backward, grid, d_y.contiguous(), gate, x, d_gate, d_x, partial, rows, columns, *GATED_BACKWARD)
    return d_gate, d_x, sum_of_rows(partial, x.dtype).split(columns) if sums else None


def _grid(tile: tuple[int, int, int], rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // (tile[0] * tile[2])), -(-columns // tile[1])


if triton is not None:

    @triton.jit
    def _norm_forward(
        p_x, p_residual, p_weight, p_normed, p_total, N, D, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.arange(0, COLUMNS)[None]
        i, m = row.to(tl.int64) * D + column, (row < N) & (column < D)
        total = tl.load(p_x + i, mask=m, other=0.0).to(tl.float32)
        if p_residual is not None:
            total += tl.load(p_residual + i, mask=m, other=0.0).to(tl.float32)
            rounded = total.to(p_total.dtype.element_ty)
            tl.store(p_total + i, rounded, mask=m)
            total = rounded.to(tl.float32)  # what the next layer sees
        scale = tl.rsqrt(tl.sum(total * total, 1, keep_dims=True) / D + eps)
        weight = tl.load(p_weight + column, mask=column < D, other=0.0).to(tl.float32)
        tl.store(p_normed + i, (total * scale * (1.0 + weight)).to(p_normed.dtype.element_ty), mask=m)

    @triton.jit
    def _norm_backward(
        p_d_normed, p_d_total, p_total, p_weight, p_d_x, p_partial, N, D, eps,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """With n = s / rms(s) and g = d_normed (1 + weight): d_x = (g - n mean(g n)) / rms(s) + d_total."""
        program, column = tl.program_id(0), tl.arange(0, COLUMNS)[None]
        d_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
        first = program * ROWS
        while first < N:
            row = first + tl.arange(0, ROWS)[:, None]
            i, m = row.to(tl.int64) * D + column, (row < N) & (column < D)
            total = tl.load(p_total + i, mask=m, other=0.0).to(tl.float32)
            d_normed = tl.load(p_d_normed + i, mask=m, other=0.0).to(tl.float32)
            weight = tl.load(p_weight + column, mask=column < D, other=0.0).to(tl.float32)  # cached: fewer registers
            scale = tl.rsqrt(tl.sum(total * total, 1, keep_dims=True) / D + eps)
            normed, g = total * scale, d_normed * (1.0 + weight)
            d_weight += d_normed * normed
            d_x = scale * (g - normed * (tl.sum(g * normed, 1, keep_dims=True) / D))
            if p_d_total is not None:
                d_x += tl.load(p_d_total + i, mask=m, other=0.0).to(tl.float32)
            tl.store(p_d_x + i, d_x.to(p_d_x.dtype.element_ty), mask=m)
            first += tl.num_programs(0) * ROWS
        i_column = tl.arange(0, COLUMNS)
        tl.store(p_partial + program.to(tl.int64) * D + i_column, tl.sum(d_weight, 0), mask=i_column < D)

    @triton.jit
    def _rotate_kernel(
        p_x, p_cos, p_sin, p_y, N, H, D, R,
        HALF: tl.constexpr, KEPT: tl.constexpr, ROWS: tl.constexpr, BACKWARD: tl.constexpr,
    ):  # fmt: skip
        """Rows are heads of tokens, R half of the rotated dimensions. Backward turns the other way."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        i = tl.arange(0, HALF)[None]
        m = (row < N) & (i < R)
        p_first, p_angle = row * D + i, row // H * (2 * R) + i
        first = tl.load(p_x + p_first, mask=m, other=0.0).to(tl.float32)
        second = tl.load(p_x + p_first + R, mask=m, other=0.0).to(tl.float32)
        cos_1 = tl.load(p_cos + p_angle, mask=m, other=0.0).to(tl.float32)
        cos_2 = tl.load(p_cos + p_angle + R, mask=m, other=0.0).to(tl.float32)
        sin_1 = tl.load(p_sin + p_angle, mask=m, other=0.0).to(tl.float32)
        sin_2 = tl.load(p_sin + p_angle + R, mask=m, other=0.0).to(tl.float32)
        if BACKWARD:
            sin_1, sin_2 = -sin_2, -sin_1
        if KEPT:
            j = tl.arange(0, KEPT)[None]
            m_kept = (row < N) & (j < D - 2 * R)
            kept = tl.load(p_x + row * D + 2 * R + j, mask=m_kept)
            tl.store(p_y + row * D + 2 * R + j, kept, mask=m_kept)
        tl.store(p_y + p_first, (first * cos_1 - second * sin_1).to(p_y.dtype.element_ty), mask=m)
        tl.store(p_y + p_first + R, (second * cos_2 + first * sin_2).to(p_y.dtype.element_ty), mask=m)

    @triton.jit
    def _gated_forward(p_gate, p_x, p_y, N, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None]
        for step in tl.static_range(STEPS):
            row = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
            i, m = row.to(tl.int64) * D + column, (row < N) & (column < D)
            activated = gelu(tl.load(p_gate + i, mask=m, other=0.0).to(tl.float32))
            y = activated * tl.load(p_x + i, mask=m, other=0.0).to(tl.float32)
            tl.store(p_y + i, y.to(p_y.dtype.element_ty), mask=m)

    @triton.jit
    def _gated_backward(
        p_d_y, p_gate, p_x, p_d_gate, p_d_x, p_partial, N, D,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
    ):  # fmt: skip
        i_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        column = i_column[None]
        sum_gate, sum_x = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
        for step in tl.static_range(STEPS):
            row = (tl.program_id(0) * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
            i, m = row.to(tl.int64) * D + column, (row < N) & (column < D)
            d_y = tl.load(p_d_y + i, mask=m, other=0.0).to(tl.float32)
            activated, slope = gelu_and_slope(tl.load(p_gate + i, mask=m, other=0.0).to(tl.float32))
            x = tl.load(p_x + i, mask=m, other=0.0).to(tl.float32)
            d_gate, d_x = d_y * x * slope, d_y * activated
            tl.store(p_d_gate + i, d_gate.to(p_d_gate.dtype.element_ty), mask=m)
            tl.store(p_d_x + i, d_x.to(p_d_x.dtype.element_ty), mask=m)
            sum_gate, sum_x = sum_gate + d_gate, sum_x + d_x
        if p_partial is not None:
            i_partial = tl.program_id(0).to(tl.int64) * (2 * D) + i_column
            tl.store(p_partial + i_partial, tl.sum(sum_gate, 0), mask=i_column < D)
            tl.store(p_partial + i_partial + D, tl.sum(sum_x, 0), mask=i_column < D)

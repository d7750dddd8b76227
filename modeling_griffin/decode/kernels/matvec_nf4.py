"""Triton GEMVs over weights of 4 bits by matrix units, for up to four rows of bfloat16, at the speed of their bytes.

A byte of bitsandbytes' NF4 is two weights of a row, and one load from a table in shared memory makes two numbers of
bfloat16 of it: 256 pairs, once in each of the 32 banks, so that no two threads of a warp meet in a bank. Scales are
applied to sums over 64 weights, never to weights. What is rounded: the 16 values of the code to bfloat16, as
bitsandbytes' own kernel for one row does, and x (1 + norm). Scales and sums are float32.

A warp takes 16 outputs and 128 inputs at a time, with instructions of matrix units over 16 outputs, 16 inputs and 8
columns. Of a group of four threads, each loads 16 bytes of one output and of the one 8 below. Only the sum over inputs
is fixed, so that inputs need no order: each thread's weights meet the inputs that stand in front of them. A column is
a row of x, one of the two groups of 64 inputs that have a scale (for the other it is zero), and one of 4 / ROWS tiles:
what it makes of the weights of others is not taken.

Between the end of the kernel in front and its own a kernel waits for x, for sums, and for one exchange between warps.
All else is had before: weights of the first tiles, scales, norm, bias.

Tensors here have one element a thread, so that `inline assembly` of a warp sees the elements that it is meant for.
In Triton's interpreter, which has no assembly, the same is written out.

Names and PDL as in `gemv`. Legend: D inputs of a product, N outputs, T tile of 128 inputs.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error

from ...kernels.arithmetic import gelu
from .gemv import PTX


GROUP = tl.constexpr(64)  # weights that share a scale
NESTED_BLOCK = tl.constexpr(256)  # scales that share theirs
TILE = tl.constexpr(128)  # inputs of a tile: 32 of each of four threads
TABLE = tl.constexpr(".shared .align 128 .b8 nf4_pairs[32768]; mov.u32 $0, nf4_pairs;")


def _store_entry_ptx() -> str:
    """$1: where an entry's 32 copies begin; $2: the entry; $3: which of the 8 stores comes first."""
    lines = [".reg .b32 a;"]
    for store in range(8):
        lines += [f"add.u32 a, $3, {store};", "and.b32 a, a, 7;", "shl.b32 a, a, 4;", "add.u32 a, a, $1;"]
        lines += ["st.shared.v4.b32 [a], {$2, $2, $2, $2};"]
    return "{" + "\n".join([*lines, "mov.b32 $0, 0;"]) + "}"


def _tile_ptx() -> str:
    """$0 to $3: sums; $4: the table; $5 to $8: words of an output; $9 to $12: of the one 8 below; $13 to $28: x.

    Two sums in turn, since a product waits for the sum that it adds to.
    """
    lines = [".reg .b32 a<4>;", ".reg .f32 c<8>;", *(f"mov.f32 c{i}, 0f00000000;" for i in range(8))]
    for half in range(8):
        for i in range(4):  # this output and the one below, one byte; then the next byte
            word, byte = half // 2 + 4 * (i % 2) + 5, 2 * (half % 2) + i // 2
            lines.append(f"prmt.b32 a{i}, ${word}, 0, 0x444{byte};")
            lines.append(f"mad.lo.u32 a{i}, a{i}, 128, $4;")
            lines.append(f"ld.shared.b32 a{i}, [a{i}];")
        c, x = "{c0, c1, c2, c3}" if half % 2 else "{c4, c5, c6, c7}", 13 + 2 * half
        lines.append("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 " + c)
        lines.append(", {a0, a1, a2, a3}, {$" + f"{x}, ${x + 1}" + "}, " + c + ";")
    return "{" + "\n".join([*lines, *(f"add.f32 ${i}, c{i}, c{i + 4};" for i in range(4))]) + "}"


def _squares_ptx() -> str:
    """$0 to $3: sums of products of each two columns; $4 to $19: x; $20 to $23: sums before."""
    lines = [".reg .b32 z;", "mov.b32 z, 0;", ".reg .f32 c<4>;", *(f"mov.f32 c{i}, ${20 + i};" for i in range(4))]
    for half in range(8):
        c, first, second = "{c0, c1, c2, c3}", 4 + 2 * half, 5 + 2 * half
        lines.append("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 " + c)
        lines.append(", {$" + f"{first}, z, ${second}, z" + "}, {$" + f"{first}, ${second}" + "}, " + c + ";")
    return "{" + "\n".join([*lines, *(f"mov.f32 ${i}, c{i};" for i in range(4))]) + "}"


LOAD_WORDS = tl.constexpr(
    "{.reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
    "@p ld.global.HINT.v4.b32 {$0, $1, $2, $3}, [$4];}"
)
LOAD_ONCE = tl.constexpr(LOAD_WORDS.value.replace("HINT", "L1::no_allocate"))
LOAD_AGAIN = tl.constexpr(LOAD_WORDS.value.replace("HINT", "L1::evict_last"))
LOADED = tl.constexpr("=&r,=&r,=&r,=&r,l,r")
STORE_ENTRY = tl.constexpr(_store_entry_ptx())
TILE_PRODUCT = tl.constexpr(_tile_ptx())
TILE_OPERANDS = tl.constexpr("=&f,=&f,=&f,=&f" + ",r" * 25)
SQUARES = tl.constexpr(_squares_ptx())
SQUARES_OPERANDS = tl.constexpr("=f,=f,=f,=f" + ",r" * 16 + ",f" * 4)
# No load is moved behind it: the compiler would rather save registers than ask for all at once.
ASKED = tl.constexpr("bar.warp.sync 0xffffffff; mov.b32 $0, 0;")
TIMES_NORM = tl.constexpr("fma.rn.bf16x2 $0, $1, $2, $1;")


@triton.jit
def _table(p_code, i_lane, dtype: tl.constexpr):
    """Where each thread finds its copy of the pairs; in the interpreter nowhere."""
    if PTX:
        start = tl.inline_asm_elementwise(TABLE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        i = tl.arange(0, 256)
        first = tl.load(p_code + (i >> 4)).to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
        second = tl.load(p_code + (i & 15)).to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
        tl.inline_asm_elementwise(
            STORE_ENTRY, "=r,r,r,r", [start + 128 * i, first | (second << 16), i], dtype=tl.int32, is_pure=False, pack=1
        )
        tl.debug_barrier()
        return start + 4 * i_lane
    else:
        return i_lane


@triton.jit
def _load_words(p, wanted, ONCE: tl.constexpr):
    """Four words of 16 bytes that begin at p, or zeros."""
    if PTX:
        LOAD: tl.constexpr = LOAD_ONCE if ONCE else LOAD_AGAIN
        dtypes: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
        return tl.inline_asm_elementwise(
            LOAD, LOADED, [p.to(tl.int64), wanted.to(tl.int32)], dtype=dtypes, is_pure=False, pack=1
        )
    else:
        p_word = p.to(tl.pointer_type(tl.int32))
        return (
            tl.load(p_word, mask=wanted, other=0), tl.load(p_word + 1, mask=wanted, other=0),
            tl.load(p_word + 2, mask=wanted, other=0), tl.load(p_word + 3, mask=wanted, other=0),
        )  # fmt: skip


@triton.jit
def _load_row(p, wanted):
    """Sixteen words of 32 inputs."""
    words = ()
    for i in tl.static_range(4):
        words = words + _load_words(p + 8 * i, wanted, False)
    return words


@triton.jit
def _half(word, i: tl.constexpr, dtype: tl.constexpr):
    """float32 of one of the two numbers in a word."""
    return ((word >> (16 * i)) & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _times_norm(x, norm, dtype: tl.constexpr):
    """x (1 + norm) of two numbers a word, rounded once."""
    if PTX:
        return tl.inline_asm_elementwise(TIMES_NORM, "=r,r,r", [x, norm], dtype=tl.int32, is_pure=True, pack=1)
    else:
        word = tl.zeros_like(x)
        for i in tl.static_range(2):
            y = (_half(x, i, dtype) * (1.0 + _half(norm, i, dtype))).to(dtype)
            word = word | (y.to(tl.uint16, bitcast=True).to(tl.int32) << (16 * i))
        return word


@triton.jit
def _columns(a, b, WARPS: tl.constexpr):
    """What matrix units leave in a thread of the products of a's outputs and b's columns, in the interpreter."""
    products = tl.reshape(a, (WARPS, 8, 1, 4)) * tl.reshape(b, (WARPS, 1, 8, 4))
    return tl.split(tl.reshape(tl.sum(products, 3), (WARPS * 32, 2)))


@triton.jit
def _tile_product(
    p_code, table, words, xs, AT: tl.constexpr, X: tl.constexpr, dtype: tl.constexpr, WARPS: tl.constexpr
):  # fmt: skip
    """w x of a tile: two columns of a thread's output, and of the one 8 below. Words from AT on, x from X."""
    if PTX:
        dtypes: tl.constexpr = (tl.float32, tl.float32, tl.float32, tl.float32)
        return tl.inline_asm_elementwise(
            TILE_PRODUCT, TILE_OPERANDS,
            [table, words[AT], words[AT + 1], words[AT + 2], words[AT + 3],
             words[AT + 4], words[AT + 5], words[AT + 6], words[AT + 7],
             xs[X], xs[X + 1], xs[X + 2], xs[X + 3], xs[X + 4], xs[X + 5], xs[X + 6], xs[X + 7], xs[X + 8], xs[X + 9],
             xs[X + 10], xs[X + 11], xs[X + 12], xs[X + 13], xs[X + 14], xs[X + 15]],
            dtype=dtypes, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        c0 = tl.zeros((32 * WARPS,), tl.float32)
        c1, c2, c3 = c0, c0, c0
        for i in tl.static_range(32):
            number = _half(xs[X + i // 2], i % 2, dtype)
            first = words[AT + i // 8] >> (8 * (i % 8 // 2) + 4 * (1 - i % 2))
            second = words[AT + 4 + i // 8] >> (8 * (i % 8 // 2) + 4 * (1 - i % 2))
            a0, a1 = _columns(tl.load(p_code + (first & 15)).to(dtype).to(tl.float32), number, WARPS)
            a2, a3 = _columns(tl.load(p_code + (second & 15)).to(dtype).to(tl.float32), number, WARPS)
            c0, c1, c2, c3 = c0 + a0, c1 + a1, c2 + a2, c3 + a3
        return c0, c1, c2, c3


@triton.jit
def _add_squares(xs, X: tl.constexpr, sums, dtype: tl.constexpr, WARPS: tl.constexpr):
    """sums + products of each two columns of x (from X on), of which only those with themselves are wanted."""
    if PTX:
        dtypes: tl.constexpr = (tl.float32, tl.float32, tl.float32, tl.float32)
        return tl.inline_asm_elementwise(
            SQUARES, SQUARES_OPERANDS,
            [xs[X], xs[X + 1], xs[X + 2], xs[X + 3], xs[X + 4], xs[X + 5], xs[X + 6], xs[X + 7], xs[X + 8], xs[X + 9],
             xs[X + 10], xs[X + 11], xs[X + 12], xs[X + 13], xs[X + 14], xs[X + 15],
             sums[0], sums[1], sums[2], sums[3]],
            dtype=dtypes, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        c0, c1, c2, c3 = sums
        for i in tl.static_range(32):
            number = _half(xs[X + i // 2], i % 2, dtype)
            a0, a1 = _columns(number, number, WARPS)
            c0, c1 = c0 + a0, c1 + a1
        return c0, c1, c2, c3


@triton.jit
def _load_weights(
    matrices, i_first, i_tile, i_row, i_quarter, N, D: tl.constexpr, MATRICES: tl.constexpr
):  # fmt: skip
    """Of a thread: four words of an output and of the one 8 below, of each matrix."""
    words = ()
    i_d = i_tile * TILE + i_quarter * 32
    for i in tl.static_range(2 * MATRICES):
        i_n = i_first + i_row + 8 * (i % 2)
        p = matrices[5 * (i // 2)] + i_n.to(tl.int64) * (D // 2) + i_d // 2
        words = words + _load_words(p, (i_n < N) & (i_d < D), True)
    return words


@triton.jit
def _load_scales(
    matrices, i_first, i_tile, i_row, N, D: tl.constexpr, MATRICES: tl.constexpr, NESTED: tl.constexpr
):  # fmt: skip
    """Of the same outputs: what is stored for both groups of a tile, and with NESTED the scales of these."""
    scales = ()
    i_group = 2 * i_tile
    for i in tl.static_range(2 * MATRICES):
        i_n = i_first + i_row + 8 * (i % 2)
        i_s = i_n * (D // GROUP) + i_group
        wanted = (i_n < N) & (i_group < D // GROUP)
        both = wanted & (i_group + 1 < D // GROUP)
        first = tl.load(matrices[5 * (i // 2) + 1] + i_s, mask=wanted, other=0)
        second = tl.load(matrices[5 * (i // 2) + 1] + i_s + 1, mask=both, other=0)
        scales = scales + (first, second)
        if NESTED:
            p_shared = matrices[5 * (i // 2) + 3]
            scales = scales + (
                tl.load(p_shared + i_s // NESTED_BLOCK, mask=wanted, other=0.0),
                tl.load(p_shared + (i_s + 1) // NESTED_BLOCK, mask=both, other=0.0),
            )
        else:
            scales = scales + (first, second)
    return scales


@triton.jit
def _asked_for(
    p_norm, p_code, matrices, i_first, N, D: tl.constexpr, ROWS: tl.constexpr, MATRICES: tl.constexpr,
    NORM: tl.constexpr, NESTED: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """What can be had before the kernel in front has ended: words of the first AHEAD tiles, all factors of sums, the
    norm's words, and the table."""
    TILES: tl.constexpr = (D + 127) // 128
    EACH: tl.constexpr = (TILES + WARPS - 1) // WARPS  # tiles of a warp
    SLOTS: tl.constexpr = 4 // ROWS  # tiles whose sums have columns of their own
    STEPS: tl.constexpr = (EACH + SLOTS - 1) // SLOTS
    STEPS_AHEAD: tl.constexpr = 2 if ROWS == 1 else 1  # whose inputs are asked for at once
    i_thread = tl.arange(0, 32 * WARPS)
    i_lane = i_thread % 32
    i_row, i_quarter = i_lane // 4, i_lane % 4  # of weights
    i_tile = i_thread // 32 * EACH  # the warp's first
    words = ()
    for i in tl.static_range(EACH):
        if i < AHEAD:
            words = words + _load_weights(matrices, i_first, i_tile + i, i_row, i_quarter, N, D, MATRICES)
    stored = ()
    for step in tl.static_range(STEPS):
        i_tile_of_column = i_tile + step * SLOTS + i_quarter // ROWS
        stored = stored + _load_scales(matrices, i_first, i_tile_of_column, i_row, N, D, MATRICES, NESTED)
    norms = ()
    if NORM:
        for step in tl.static_range(STEPS):
            if step < STEPS_AHEAD:
                i_d, is_there = _inputs_of_columns(i_lane, i_tile, step, D, EACH, SLOTS, ROWS)
                norms = norms + _load_row(p_norm + i_d, is_there)
    table = _table(p_code, i_lane, p_norm.dtype.element_ty)
    factors = ()
    for step in tl.static_range(STEPS):
        for i in tl.static_range(4 * MATRICES):
            factors = factors + (
                _scale(
                    matrices[5 * (i // 4) + 2], matrices[5 * (i // 4) + 4],
                    stored[8 * MATRICES * step + 4 * (i // 2) + i % 2],
                    stored[8 * MATRICES * step + 4 * (i // 2) + i % 2 + 2], NESTED,
                ),
            )  # fmt: skip
    return words, factors, norms, table


@triton.jit
def _scale(p_nested_code, p_offset, scale, shared, NESTED: tl.constexpr):
    if NESTED:
        scale = tl.load(p_nested_code + scale.to(tl.int32)) * shared + tl.load(p_offset)
    return scale


@triton.jit
def _inputs_of_columns(
    i_lane, i_tile, step: tl.constexpr, D: tl.constexpr, EACH: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Where a thread's 32 inputs begin, and whether its column has them: one of a step's tiles, of that one group."""
    i_column, i_slot, i_quarter = i_lane // 4, i_lane // 8 // ROWS, i_lane % 4
    i_d = (i_tile + step * SLOTS + i_slot) * TILE + i_quarter * 32
    return i_d, (step * SLOTS + i_slot < EACH) & (i_d < D) & (i_column % 2 == i_quarter // 2)


@triton.jit
def _products(
    p_x, p_norm, p_code, matrices, asked, i_first, eps, N, D: tl.constexpr, ROWS: tl.constexpr, MATRICES: tl.constexpr,
    NORM: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """norm(x) w^T for 16 outputs from i_first on: of each matrix two (8, ROWS), float32.

    matrices: as in `nf4_matvec_kernel`: weights, scales, and three of the scales' own, of each.
    """
    dtype: tl.constexpr = p_x.dtype.element_ty
    TILES: tl.constexpr = (D + 127) // 128
    EACH: tl.constexpr = (TILES + WARPS - 1) // WARPS
    SLOTS: tl.constexpr = 4 // ROWS
    STEPS: tl.constexpr = (EACH + SLOTS - 1) // SLOTS
    STEPS_AHEAD: tl.constexpr = 2 if ROWS == 1 else 1  # whose inputs are asked for at once
    words, factors, norms, table = asked
    i_thread = tl.arange(0, 32 * WARPS)
    i_lane = i_thread % 32
    i_row, i_quarter = i_lane // 4, i_lane % 4
    i_tile = i_thread // 32 * EACH
    zero = tl.zeros((32 * WARPS,), tl.float32)
    squares = (zero, zero, zero, zero)
    p_row = p_x + i_lane // 8 % ROWS * D
    xs = ()
    for step in tl.static_range(STEPS):
        if step < STEPS_AHEAD:
            i_d, is_there = _inputs_of_columns(i_lane, i_tile, step, D, EACH, SLOTS, ROWS)
            xs = xs + _load_row(p_row + i_d, is_there)
    if PTX:
        tl.inline_asm_elementwise(ASKED, "=r,r", [i_thread], dtype=tl.int32, is_pure=False, pack=1)
    if NORM:
        scaled = ()
        for step in tl.static_range(STEPS):
            if step < STEPS_AHEAD:
                squares = _add_squares(xs, 16 * step, squares, dtype, WARPS)
                for i in tl.static_range(16):
                    scaled = scaled + (_times_norm(xs[16 * step + i], norms[16 * step + i], dtype),)
        xs = scaled
    totals = ()
    for _ in tl.static_range(2 * MATRICES):
        totals = totals + (zero,)
    sums = ()
    for i in tl.static_range(EACH):
        if i % SLOTS == 0:
            sums = ()
            for _ in tl.static_range(4 * MATRICES):
                sums = sums + (zero,)
        new = ()
        for matrix in tl.static_range(MATRICES):
            found = _tile_product(
                p_code, table, words, xs, 8 * (MATRICES * i + matrix), 16 * (i // SLOTS), dtype, WARPS
            )
            for c in tl.static_range(4):  # columns of other slots have met weights that are not theirs
                is_own = i_quarter // ROWS == i % SLOTS
                new = new + (tl.where(is_own, found[c], sums[4 * matrix + c]),)
        sums = new
        if i + AHEAD < EACH:
            words = words + _load_weights(matrices, i_first, i_tile + i + AHEAD, i_row, i_quarter, N, D, MATRICES)
        if i % SLOTS == SLOTS - 1 or i == EACH - 1:
            new = ()
            for part in tl.static_range(2 * MATRICES):
                new = new + (
                    totals[part]
                    + sums[2 * part] * factors[4 * MATRICES * (i // SLOTS) + 2 * part]
                    + sums[2 * part + 1] * factors[4 * MATRICES * (i // SLOTS) + 2 * part + 1],
                )
            totals = new
            if i // SLOTS + STEPS_AHEAD < STEPS:
                i_d, is_there = _inputs_of_columns(i_lane, i_tile, i // SLOTS + STEPS_AHEAD, D, EACH, SLOTS, ROWS)
                x = _load_row(p_row + i_d, is_there)
                if NORM:
                    squares = _add_squares(x, 0, squares, dtype, WARPS)
                    norm = _load_row(p_norm + i_d, is_there)
                    for word in tl.static_range(16):
                        xs = xs + (_times_norm(x[word], norm[word], dtype),)
                else:
                    xs = xs + x
    if NORM:  # of products of columns those with themselves
        own = tl.where(i_row == 2 * i_quarter, squares[0], 0.0) + tl.where(i_row == 2 * i_quarter + 1, squares[1], 0.0)
        totals = totals + (own,)
    results = _added_up(totals, WARPS, SLOTS, ROWS)
    if NORM:
        of_columns = tl.sum(results[2 * MATRICES], 1)
        of_rows = tl.sum(tl.sum(tl.reshape(of_columns, (SLOTS, ROWS, 2)), 2), 0)
        scale = tl.rsqrt(of_rows / D + eps)[None, :]
        scaled = ()
        for i in tl.static_range(2 * MATRICES):
            scaled = scaled + (results[i] * scale,)
        results = scaled
    return results


@triton.jit
def _added_up(parts, WARPS: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr):
    """(8, ROWS) of each part: the sums over warps and slots, all in one exchange."""
    LEVELS: tl.constexpr = (len(parts) > 1) + (len(parts) > 2) + (len(parts) > 4) + (len(parts) > 8)
    SIZE: tl.constexpr = 1 << LEVELS
    for _ in tl.static_range(SIZE - len(parts)):
        parts = parts + (parts[0],)
    for level in tl.static_range(LEVELS):
        joined = ()
        for i in tl.static_range(SIZE >> (level + 1)):
            joined = joined + (tl.join(parts[i], parts[i + (SIZE >> (level + 1))]),)
        parts = joined
    whole = tl.permute(tl.reshape(parts[0], (WARPS, 8, SLOTS, ROWS, SIZE)), (1, 3, 4, 0, 2))
    sums = tl.sum(tl.reshape(whole, (8, ROWS, SIZE, WARPS * SLOTS)), 3)
    parts = (sums,)
    for level in tl.static_range(LEVELS):
        firsts, seconds = (), ()
        for i in tl.static_range(1 << level):
            first, second = tl.split(tl.reshape(parts[i], (8, ROWS, SIZE >> (level + 1), 2)))
            firsts, seconds = firsts + (first,), seconds + (second,)
        parts = firsts + seconds
    results = ()
    for i in tl.static_range(SIZE):
        results = results + (tl.reshape(parts[i], (8, ROWS)),)
    return results


@triton.jit
def _load_bias(p_b, i_first, N, BIAS: tl.constexpr):
    """Of each 8 outputs (8, 1), or zeros."""
    biases = ()
    for i in tl.static_range(2):
        i_n = (i_first + 8 * i + tl.arange(0, 8))[:, None]
        if BIAS:
            biases = biases + (tl.load(p_b + i_n, mask=i_n < N, other=0.0).to(tl.float32),)
        else:
            biases = biases + (tl.zeros((8, 1), tl.float32),)
    return biases


@triton.jit
def nf4_matvec_kernel(
    p_x, p_norm, p_code, p_w0, p_s0, p_c0, p_n0, p_o0, p_b0, p_y0, p_w1, p_s1, p_c1, p_n1, p_o1, p_b1, p_y1,
    p_w2, p_s2, p_c2, p_n2, p_o2, p_b2, p_y2, p_residual, eps, N0, N1, N2, D: tl.constexpr, ROWS: tl.constexpr,
    MATRICES: tl.constexpr, NORM: tl.constexpr, NESTED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    PDL: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y = norm(x) w^T + b (+ residual) for one to three matrices w (N, D); x (ROWS, D). Program: 16 outputs.

    Of each matrix: weights, their scales, and what these mean: a code of 256, scales and an offset.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_block = tl.program_id(0)
    p_w, p_s, p_c, p_n, p_o, p_b, p_y, N = p_w0, p_s0, p_c0, p_n0, p_o0, p_b0, p_y0, N0
    if MATRICES > 1:
        end0 = tl.cdiv(N0, 16)
        end1 = end0 + tl.cdiv(N1, 16)
        if i_block >= end1:
            p_w, p_s, p_c, p_n, p_o, p_b, p_y, N, i_block = p_w2, p_s2, p_c2, p_n2, p_o2, p_b2, p_y2, N2, i_block - end1
        elif i_block >= end0:
            p_w, p_s, p_c, p_n, p_o, p_b, p_y, N, i_block = p_w1, p_s1, p_c1, p_n1, p_o1, p_b1, p_y1, N1, i_block - end0
    i_first = i_block * 16
    matrix = (p_w, p_s, p_c, p_n, p_o)
    biases = _load_bias(p_b, i_first, N, BIAS)
    asked = _asked_for(p_norm, p_code, matrix, i_first, N, D, ROWS, 1, NORM, NESTED, WARPS, AHEAD)
    if PDL:
        tl.extra.cuda.gdc_wait()
    i_m = tl.arange(0, ROWS)[None, :]
    residuals = ()
    for i in tl.static_range(2 if RESIDUAL else 0):
        i_n = (i_first + 8 * i + tl.arange(0, 8))[:, None]
        residuals = residuals + (tl.load(p_residual + i_m * N + i_n, mask=i_n < N, other=0.0).to(tl.float32),)
    ys = _products(p_x, p_norm, p_code, matrix, asked, i_first, eps, N, D, ROWS, 1, NORM, WARPS, AHEAD)
    for i in tl.static_range(2):
        i_n = (i_first + 8 * i + tl.arange(0, 8))[:, None]
        y = ys[i] + biases[i]
        if RESIDUAL:
            y += residuals[i]
        tl.store(p_y + i_m * N + i_n, y.to(p_y.dtype.element_ty), mask=i_n < N)


@triton.jit
def nf4_gated_matvec_kernel(
    p_x, p_norm, p_code, p_w_gate, p_s_gate, p_c_gate, p_n_gate, p_o_gate, p_b_gate,
    p_w_up, p_s_up, p_c_up, p_n_up, p_o_up, p_b_up, p_y, eps, N, D: tl.constexpr, ROWS: tl.constexpr,
    NESTED: tl.constexpr, PDL: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """y = gelu(norm(x) w_gate^T + b_gate) * (norm(x) w_up^T + b_up); (ROWS, D) -> (ROWS, N). Program: 16 outputs."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_first = tl.program_id(0) * 16
    both = (p_w_gate, p_s_gate, p_c_gate, p_n_gate, p_o_gate, p_w_up, p_s_up, p_c_up, p_n_up, p_o_up)
    b_gate = _load_bias(p_b_gate, i_first, N, True)
    b_up = _load_bias(p_b_up, i_first, N, True)
    asked = _asked_for(p_norm, p_code, both, i_first, N, D, ROWS, 2, True, NESTED, WARPS, AHEAD)
    if PDL:
        tl.extra.cuda.gdc_wait()
    ys = _products(p_x, p_norm, p_code, both, asked, i_first, eps, N, D, ROWS, 2, True, WARPS, AHEAD)
    i_m = tl.arange(0, ROWS)[None, :]
    for i in tl.static_range(2):
        i_n = (i_first + 8 * i + tl.arange(0, 8))[:, None]
        y = gelu(ys[i] + b_gate[i]) * (ys[i + 2] + b_up[i])
        tl.store(p_y + i_m * N + i_n, y.to(p_y.dtype.element_ty), mask=i_n < N)

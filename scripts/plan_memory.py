"""Writes configuration/PLANNING.md: memory and communication of a training step, for every ready-made model.

    python scripts/plan_memory.py                                   # the committed page
    python scripts/plan_memory.py --rows 1 --length 16384 --print   # another batch, to the screen

The formulas of one GPU are in `memory_formulas.py`, those of several below; the page shows their docstrings.
"""

import inspect
from collections.abc import Callable
from math import prod
from typing import NamedTuple

import spoken
from command_line import Parser
from planning import memory_formulas
from planning.memory_formulas import (
    AUTOCAST,
    FUSED_AUTOCAST,
    FUSED_BFLOAT16,
    Precision,
    Sizes,
    activations,
    activations_in_pieces,
    kept,
    kept_by_fused_layer,
    kept_by_layer,
    kept_outside_layers,
    layer_tensors,
    other_tensors,
    parameters,
    sizes_of,
)
from presets import CONFIGURATION, is_installed
from whole_files import write_whole

from modeling_griffin import GriffinConfig
from modeling_griffin.training.pieces import PIECE


PAGE = CONFIGURATION / "PLANNING.md"
GPUS = tuple(2**power for power in range(1, 11))
ROW_GPUS = (1, 2, 4, 8)  # of one row
CAPACITIES = {80: "", 141: "*"}  # GB, and the mark of what fits no smaller one
HEADROOM = 0.9  # of a GPU; the rest is for the context, communication buffers and the allocator's gaps


class Plan(NamedTuple):
    """Bytes per GPU: state (weights, gradients, AdamW), workspace of the engine, activations; bytes sent a step."""

    state: int
    workspace: int
    activations: int
    sent: int

    @property
    def memory(self) -> int:
        return self.state + self.workspace + self.activations


def ring(payload: float, gpus: int, passes: int = 1) -> int:
    """Bytes each GPU sends for a collective over `payload` bytes: (n - 1) / n of them a pass; an all-reduce has two."""
    return round(passes * payload * (gpus - 1) / gpus)


def ddp(sizes: Sizes, rows: int, length: int, gpus: int, checkpointing: bool = False) -> Plan:
    """Everything on every GPU, in float32 under bfloat16 autocast: 16 P bytes, and 4 P for the buckets that are summed.

    An all-reduce of 4 P bytes a step.
    """
    total = parameters(sizes)
    buckets = 4 * total if gpus > 1 else 0
    return Plan(
        state=16 * total,
        workspace=buckets,
        activations=activations(sizes, rows, length, FUSED_AUTOCAST, checkpointing),
        sent=ring(4 * total, gpus, passes=2),
    )


def fsdp2(sizes: Sizes, rows: int, length: int, gpus: int, checkpointing: bool = False) -> Plan:
    """16 P / n bytes of float32 shards; weights gathered and gradients scattered in bfloat16, by layer; Λ in float32.

    Workspace: embedding, final norm and head throughout, with their gradient; of the largest layer its weights, those
    of the next one, its gradients and their copy for the reduce-scatter. Gathered: the layers for the forward and for
    the backward pass, the others once. P with padding, see `fsdp2_elements`.
    """
    layers, tail = fsdp2_elements(sizes, gpus)
    largest = max(layers)
    lambdas = gpus * -(-sizes.C // gpus) * sizes.kinds.count("linear_attention")  # 4 bytes each, not 2
    gathers = 2 * (2 * sum(layers) + tail) + 4 * lambdas
    scatters = 2 * (sum(layers) + tail) + 2 * lambdas
    return Plan(
        state=16 * (sum(layers) + tail) // gpus,
        workspace=2 * 2 * tail + 2 * 4 * largest if gpus > 1 else 0,
        activations=activations(sizes, rows, length, FUSED_BFLOAT16, checkpointing),
        sent=ring(gathers + scatters, gpus),
    )


def fsdp2_elements(sizes: Sizes, gpus: int) -> tuple[list[int], int]:
    """Elements, padding included, of each layer and of the rest: shards are along axis 0, of ceil(axis / n) each.

    Gate weights (blocks, width, width) have 16 on that axis: on more than 16 GPUs the others hold padding, and send it.
    """

    def padded(shape: tuple[int, ...]) -> int:
        return gpus * -(-shape[0] // gpus) * prod(shape[1:])

    layers = [sum(map(padded, layer_tensors(sizes, kind).values())) for kind in sizes.kinds]
    return layers, sum(map(padded, other_tensors(sizes).values()))


def tensor_parallel_share(sizes: Sizes, gpus: int) -> Sizes | None:
    """What one of `gpus` computes with: its heads, gate blocks, channels, MLP features and rows of the vocabulary.

    None where they cannot be shared out evenly; the one key-value head of MQA is on every GPU.
    """
    recurrent, attention = ("linear_attention" in sizes.kinds), ("sliding_attention" in sizes.kinds)
    split = [sizes.M] + [sizes.blocks] * recurrent + [sizes.H] * attention
    split += [sizes.G] * (attention and sizes.G > 1)
    if any(value % gpus for value in split):
        return None
    return sizes._replace(
        M=sizes.M // gpus,
        C=sizes.C // gpus,
        blocks=max(1, sizes.blocks // gpus),
        H=max(1, sizes.H // gpus),
        G=max(1, sizes.G // gpus),
        V=-(-sizes.V // gpus),
    )


def tensor_parallel(sizes: Sizes, rows: int, length: int, gpus: int, checkpointing: bool = False) -> Plan | None:
    """One batch on all GPUs, each with its share of every layer, in float32 under bfloat16 autocast.

    Residual stream, norms, inputs of the projections and the gathered logits are on every GPU. Sums over GPUs: forward,
    each block's output in bfloat16 and the embeddings in float32; backward, in float32, the gradient of the input of
    each projection that is split by its outputs (autocast's copies lie behind the sum), the head's among them; in
    bfloat16, those of the shared key and value. The logits are gathered in bfloat16.
    """
    share = tensor_parallel_share(sizes, gpus)
    if share is None:
        return None
    tokens = rows * length
    stream = tokens * sizes.D
    summed = 4 * stream + 4 * stream  # the embedding forward, the head's input backward
    for kind in sizes.kinds:
        split = 2 if kind == "linear_attention" else 1 if sizes.G == 1 else 3  # projections that are split by outputs
        shared = 2 * tokens * sizes.K if kind == "sliding_attention" and sizes.G == 1 else 0
        summed += 2 * (2 * stream) + (split + 2) * (4 * stream) + 2 * shared
    logits = ring(2 * tokens * sizes.V, gpus)
    return Plan(
        state=16 * parameters(share),
        workspace=0,
        activations=activations(share, rows, length, AUTOCAST, checkpointing),
        sent=ring(summed, gpus, passes=2) + logits,
    )


def sequence_parallel(
    sizes: Sizes,
    rows: int,
    length: int,
    gpus: int,
    precision: Precision = FUSED_AUTOCAST,
    bytes_of_weights: int = 16,
    piece: int | None = PIECE,
) -> Plan:
    """Rows of T tokens over n GPUs, T / n on each, with activation checkpointing; DDP averages over the GPUs.

    Weights, gradients and AdamW as by `ddp`: 16 P bytes and 4 P for the buckets (`bytes_of_weights` = 4: no optimizer,
    weights and gradients in bfloat16, which are the buckets). Activations as `activations_in_pieces`. Sent for the
    rows, beside DDP's all-reduce, whatever T is: the next GPU gets taps - 1 inputs of each recurrent layer,
    e (taps - 1) B D, and W - 1 keys and values of each attention, 2 e (W - 1) B G K; twice, for checkpointing makes
    layers again; the gradients of both come back once. Each GPU sends to all others 8 B C for each recurrence, twice,
    and 4 B C on the way back, and 4 bytes of the loss.
    """
    total, chunk = parameters(sizes), -(-length // gpus)
    buckets = 4 * total if gpus > 1 and bytes_of_weights == 16 else 0
    return Plan(
        state=bytes_of_weights * total,
        workspace=buckets,
        activations=activations_in_pieces(sizes, rows, chunk, precision, piece),
        sent=ring(min(4, bytes_of_weights // 2) * total, gpus, passes=2)
        + sent_for_rows(sizes, rows, gpus, precision.e),
    )


def sent_for_rows(sizes: Sizes, rows: int, gpus: int, e: int) -> int:
    """Bytes that the GPU with most neighbours gets from others for shared rows, chunks being longer than the window."""
    if gpus == 1:
        return 0
    recurrent, attention = (sizes.kinds.count(kind) for kind in ("linear_attention", "sliding_attention"))
    tails = recurrent * (sizes.taps - 1) * sizes.D + attention * 2 * (sizes.window - 1) * sizes.G * sizes.K
    directions = 3 if gpus > 2 else 2  # twice from the left; once from the right, where there is one on both sides
    gathered = recurrent * (2 * 8 + 4) * rows * sizes.C + 4
    return directions * e * rows * tails + (gpus - 1) * gathered


# The page


class Engine(NamedTuple):
    """One table: its title, its plan, with or without activation checkpointing, and for how many GPUs."""

    title: str
    plan: Callable[..., Plan | None]
    checkpointing: bool
    gpus: tuple[int, ...]


ENGINES = (
    Engine("DDP", ddp, False, (1, *GPUS)),
    Engine("DDP with activation checkpointing", ddp, True, (1, *GPUS)),
    Engine("FSDP2", fsdp2, False, GPUS),
    Engine("FSDP2 with activation checkpointing", fsdp2, True, GPUS),
    Engine("Tensor parallel", tensor_parallel, False, GPUS),
)


def ready_made() -> dict[str, Sizes]:
    """The sizes of configuration/model/*.json, by family and number of parameters."""
    sizes = {
        path.stem: sizes_of(GriffinConfig.from_json_file(path)) for path in (CONFIGURATION / "model").glob("*.json")
    }
    return dict(sorted(sizes.items(), key=lambda item: (item[0].split("-")[0], parameters(item[1]))))


def fits(plan: Plan, gigabytes: int, headroom: float = HEADROOM) -> bool:
    return plan.memory <= headroom * gigabytes * 1e9


def gigabytes(number: int) -> str:
    """In 10^9 bytes, with three digits."""
    number /= 1e9
    return f"{number:.2f}" if number < 9.995 else f"{number:.1f}" if number < 99.95 else f"{number:.0f}"


def cell(plan: Plan | None) -> str:
    """`held / sent`, marked by the smallest GPU that it fits; in brackets: it fits none; -: it cannot be split so."""
    if plan is None:
        return "-"
    marks = [mark for capacity, mark in CAPACITIES.items() if fits(plan, capacity)]
    held = f"{gigabytes(plan.memory)}{marks[0]}" if marks else f"({gigabytes(plan.memory)})"
    return f"{held} / {gigabytes(plan.sent)}"


def markdown(header: list, rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines).replace("| --- ", "|---")


def engine_table(engine: Engine, rows: int, length: int) -> str:
    plans = {
        name: [engine.plan(sizes, rows, length, gpus, engine.checkpointing) for gpus in engine.gpus]
        for name, sizes in ready_made().items()
    }
    used = [index for index in range(len(engine.gpus)) if any(row[index] for row in plans.values())]
    table = [[f"`{name}`", *(cell(row[index]) for index in used)] for name, row in plans.items()]
    return markdown(["model", *(engine.gpus[index] for index in used)], table)


def one_gpu_table(rows: int, length: int) -> str:
    header = ["model", "parameters", "weights", "gradients", "AdamW", "activations", "checkpointed"]
    table = []
    for name, sizes in ready_made().items():
        total = parameters(sizes)
        plain, checkpointed = (activations(sizes, rows, length, FUSED_AUTOCAST, flag) for flag in (False, True))
        columns = map(gigabytes, (4 * total, 4 * total, 8 * total, plain, checkpointed))
        table.append([f"`{name}`", f"{total:,}", *columns])
    return markdown(header, table)


def largest_table(rows: int, length: int) -> str:
    """The largest Griffin that fits each GPU, engine by engine."""
    griffins = {name: sizes for name, sizes in ready_made().items() if name.startswith("griffin-")}
    table = []
    for engine in ENGINES:
        for capacity in CAPACITIES:
            largest = []
            for gpus in (1, *GPUS):
                plans = {
                    name: engine.plan(sizes, rows, length, gpus, engine.checkpointing)
                    for name, sizes in griffins.items()
                    if gpus in engine.gpus
                }
                fitting = [name for name, plan in plans.items() if plan is not None and fits(plan, capacity)]
                largest.append(fitting[-1].removeprefix("griffin-") if fitting else "-")
            table.append([engine.title, f"{capacity} GB", *largest])
    return markdown(["", "GPU", 1, *GPUS], table)


def longest_row(sizes: Sizes, gpus: int, capacity: int) -> int:
    """Tokens of the longest row over so many GPUs, in multiples of 1024 a GPU."""

    def holds(blocks: int) -> bool:
        return fits(sequence_parallel(sizes, 1, 1024 * blocks * gpus, gpus), capacity, HEADROOM * (1 - PIECES_BELOW))

    few, many = 0, 2**20
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if holds(middle) else (few, middle)
    return 1024 * few * gpus


def longest_row_table() -> str:
    header = ["model", *(f"{gpus} x {capacity} GB" for capacity in CAPACITIES for gpus in ROW_GPUS), "sent for the row"]
    table = []
    for name, sizes in ready_made().items():
        rows = [longest_row(sizes, gpus, capacity) for capacity in CAPACITIES for gpus in ROW_GPUS]
        sent = sent_for_rows(sizes, 1, max(ROW_GPUS), e=2)
        table.append([f"`{name}`", *(f"{tokens:,}" if tokens else "-" for tokens in rows), f"{sent / 2**20:.1f} MiB"])
    return markdown(header, table)


def formulas() -> str:
    """The docstrings of the functions that the tables are computed with."""
    functions = (kept_by_fused_layer, kept_by_layer, kept_outside_layers, kept, activations)
    functions += (ddp, fsdp2, fsdp2_elements, tensor_parallel, sequence_parallel, activations_in_pieces)
    return "\n\n".join(f"`{function.__name__}`\n\n```\n{inspect.getdoc(function)}\n```" for function in functions)


INTRODUCTION = """# Memory and communication of a training step

Computed, not measured: written by `python scripts/plan_memory.py`, for {rows} rows of {length} tokens on each GPU
(tensor parallel: on each group of GPUs), in one forward and backward pass. `--rows 1 --length 16384 --print` shows
another batch. GB are 10^9 bytes.

Precision as scripts/train.py runs it on GPUs: weights, gradients and AdamW's states in float32, 16 bytes a
parameter, and matrix products in bfloat16, by autocast (one GPU, DDP, tensor parallel) or by FSDP2's mixed
precision, as accelerate sets both up. Rows hold packed documents, as scripts/train.py makes them.

A cell is what a GPU holds / what it sends a step, in GB. Held: weights, gradients, AdamW, activations with the
logits, and what the engine itself keeps. No mark: at most {headroom:.0%} of {small} GB; `*`: at most {headroom:.0%}
of {large} GB; in brackets: neither.

**Compared with real runs** by tests/scripts/test_plan_memory.py. On a CPU: the parameters of every model; bytes of
weights, gradients and AdamW after a step; what autograd keeps, to the byte, for Griffins and Hawks of several widths,
lengths and batches, in float32, under autocast and in bfloat16, with and without checkpointing; the peak of memory,
where the logits make it, within {tolerance:.1%}; the collectives of DDP, FSDP2 and tensor parallelism between two
processes, to the byte, and the shards. On a GPU what autograd keeps there, to the byte. On H100s the peaks of
griffin-1b3 (results/distributed/distributed_h100*.md): the plan is above them by at most {measured_tolerance:.1%}, by
1% for DDP.
**Not compared**: other models' peaks on a GPU; the activations of tensor parallelism. Not counted: workspaces of
single operators other than the loss, such as the float32 temporaries of PyTorch's scan on a CPU.

**At the peak**, which is at the end of the forward pass, gradients are there only where they are accumulated over
several passes, or kept in DDP's buckets; all tables count them. One pass a step by FSDP2 holds 4 P / n bytes less.

**With gradient accumulation** Trainer sends DDP's gradients once a step. Under FSDP2 accelerate then keeps whole
gradients on every GPU up to the last pass, 2 bytes a parameter more than here, and adds them in bfloat16;
`accelerator_config: {{gradient_accumulation_kwargs: {{sync_each_batch: true}}}}` sends at every pass instead.

**On more than {blocks} GPUs FSDP2 pads**: it cuts parameters along their first axis, where gates have {blocks}
blocks (recurrentgemma-2b 10). Beyond that, a GPU holds one block or nothing but padding, and all of it is gathered.
Groups of up to {blocks} GPUs with whole copies between them (HSDP: `dp_replicate_size` in accelerate's
`parallelism_config`) would avoid it; not run either.
"""
SHARED_ROWS = """## One row over several GPUs

The longest row, in tokens, that `parallelize_sequence` trains beneath DDP with activation checkpointing, MLPs in pieces
of {piece:,} tokens and the loss in pieces; and what a GPU gets from others for it a step on {gpus} GPUs, DDP's
gradients not counted. That does not grow with the row. train.py makes the logits of all tokens of a chunk: count
2 N V bytes and 4 N V more.

**Compared with real runs**: the bytes sent, with those of two processes, to the byte, and with two H200s; the peak,
with two H200s at 393,216 tokens on each (2.1 billion parameters in bfloat16, no optimizer, MLPs not in pieces), within
{tolerance:.1%}. **Too low**: with MLPs in pieces, at 524,288 tokens on each, a row over both took 119.1 GB where the
formulas give 113.4, and one alone 119.0 where they give 109.2; what is missing was not found. So this table leaves
another {below:.1%} of a GPU free. **Not compared**: the peak in float32 under autocast as in this table."""
# Which the tests take from here: of the peak on a CPU, and of those measured on GPUs.
PEAK_TOLERANCE, MEASURED_TOLERANCE, SHARED_TOLERANCE = 0.001, 0.045, 0.005
PIECES_BELOW = 0.085  # the plan in pieces was 8.2% (alone) and 4.7% (shared) below the peaks of two H200s, unexplained


def page(rows: int, length: int) -> str:
    """The whole of PLANNING.md."""
    introduction = INTRODUCTION.format(
        rows=rows,
        length=length,
        headroom=HEADROOM,
        small=min(CAPACITIES),
        large=max(CAPACITIES),
        tolerance=PEAK_TOLERANCE,
        measured_tolerance=MEASURED_TOLERANCE,
        blocks=GriffinConfig.num_gate_blocks,
    )
    parts = [
        introduction,
        "## Largest Griffin that fits\n\nBy number of GPUs.",
        largest_table(rows, length),
        "## One GPU\n\nIn GB; the activations without and with checkpointing.",
        one_gpu_table(rows, length),
        *(f"## {engine.title}\n\n{engine_table(engine, rows, length)}" for engine in ENGINES),
        SHARED_ROWS.format(piece=PIECE, gpus=max(ROW_GPUS), tolerance=SHARED_TOLERANCE, below=PIECES_BELOW)
        + "\n\n"
        + longest_row_table(),
        f"## Formulas\n\n```\n{memory_formulas.__doc__.strip()}\n```",
        formulas(),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4, help="rows on each GPU")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row")
    text = "print the page, leave configuration/PLANNING.md alone; default: only where it is installed, not a clone"
    parser.add_argument("--print", action="store_true", help=text)
    arguments = parser.parse_args(argv)
    parser.check_least(arguments, rows=1, length=1)
    text = page(arguments.rows, arguments.length)
    if arguments.print or is_installed():
        print(text, end="")
        return
    with spoken.writing(__file__):
        write_whole(PAGE, text)
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()

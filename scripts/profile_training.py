"""Where the time of a training step goes: each part's forward and backward beside its floor.

    python scripts/profile_training.py --size 2b --cell 8x2048

Each part runs alone, as the model runs it, on random input of the model's shapes, and counts as often as a step runs
it. Its floor: its matrix products at the GPU's dense bfloat16 peak, plus the fewest bytes of what is not a product at
the rate of a copy measured in the same run (each input read once, each output and gradient written once). The last
row is the whole step; what the parts do not explain is launches, autograd's sums between parts, and that a part alone
finds its input in the cache and the card's clock higher. Writes OUTPUT.json and OUTPUT.md.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from benchmark_training import OWN, PEAK_FLOPS, SIZES, _cell, _make, _step
from benchmarks.birth_certificate import birth_certificate, birth_lines, short_device_name
from command_line import Parser
from tqdm import tqdm
from whole_files import with_ending, write_whole

from modeling_griffin import rg_lru_scan
from modeling_griffin.documents import read_layout
from modeling_griffin.elementwise import gated, gated_linears, linears, rotate
from modeling_griffin.local_attention import OWN_ATTENTION
from modeling_griffin.modeling_griffin import GriffinForCausalLM
from modeling_griffin.rg_lru import gates


class Part(NamedTuple):
    """function: of tensors, to one or several. flops of products and bytes of the rest: of one forward and backward."""

    name: str
    count: int  # type: ignore[assignment]  # hides tuple.count
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    inputs: tuple[torch.Tensor, ...]
    flops: float
    bytes: float


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_device()
    parser.add_argument("--size", choices=SIZES, default="2b", help="of the table of sizes")
    parser.add_argument("--cell", type=_cell, default=(8, 2048), metavar="BxT", help="batch x tokens")
    parser.add_argument("--repeats", type=int, default=10, help="timed repetitions")
    parser.add_argument("--output", type=Path, default=None, help="path without suffix")
    parser.add_argument("--commit", default=None, help="the commit that runs, for a copy without its git history")
    arguments = parser.parse_args(argv)
    device, name = arguments.device, short_device_name(arguments.device)
    output = arguments.output or Path("results") / "training" / f"training_profile_{name}"
    output.parent.mkdir(parents=True, exist_ok=True)
    peak, copy = PEAK_FLOPS.get(name, math.inf), copy_rate(device)
    model = _make(OWN, arguments.size, device, torch.bfloat16)
    steps = [_step(model, arguments.cell, device)[0] for _ in range(arguments.repeats + 1)][1:]
    report = {"birth": birth_certificate(device, arguments.commit), "size": arguments.size, "cell": arguments.cell}
    report |= {"copy_bytes_per_s": copy, "peak_flops": peak, "step_s": statistics.median(steps), "parts": []}
    for part in tqdm(parts(model, *arguments.cell), unit="part"):
        seconds = time_part(part, model, arguments.repeats)
        floor = part.flops / peak + part.bytes / copy
        report["parts"].append({"name": part.name, "count": part.count, "seconds": seconds, "floor": floor})
    write_whole(with_ending(output, ".json"), json.dumps(report, indent=1))
    write_whole(with_ending(output, ".md"), text(report))
    print(text(report))


def copy_rate(device: str) -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.empty(2**30 if device == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(_times(lambda: target.copy_(source), 20, device))


def _times(function: Callable, repeats: int, device: str) -> list[float]:
    """Seconds of each of `repeats` calls, on a GPU by its own clock, after two that compile and warm up."""
    function(), function()
    if device == "cpu":
        marks = [time.perf_counter(), *((function(), time.perf_counter())[1] for _ in range(repeats))]
        return [end - begin for begin, end in zip(marks, marks[1:])]
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in marks:
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in marks]


def time_part(part: Part, model: torch.nn.Module, repeats: int) -> float:
    """Median seconds of one forward and backward, with gradients of inputs and parameters.

    On a GPU the kernels are recorded and replayed: autograd's own work on the host takes longer than most parts.
    """
    leaves = [x for x in (*part.inputs, *model.parameters()) if x.requires_grad]

    def outputs() -> tuple[torch.Tensor, ...]:
        found = part.function(*part.inputs)
        return found if isinstance(found, tuple) else (found,)

    weights = [torch.randn_like(y) for y in outputs()]

    def step() -> None:
        torch.autograd.grad(outputs(), leaves, weights, allow_unused=True)

    device = model.device.type
    return statistics.median(_times(_recorded(step) if device == "cuda" else step, repeats, device))


def _recorded(function: Callable) -> Callable:
    """The replay of its kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def parts(model: GriffinForCausalLM, batch: int, length: int) -> list[Part]:
    config, body = model.config, model.model
    kinds = config.layer_types
    recurrent, local = kinds.count("linear_attention"), kinds.count("sliding_attention")
    rows = batch * length
    width, inner, channels = config.hidden_size, config.intermediate_size, config.lru_width
    block, mlp = body.layers[kinds.index("linear_attention")].temporal_block, body.layers[0].mlp_block

    def x(features: int) -> torch.Tensor:
        return torch.randn(batch, length, features, device=model.device, dtype=model.dtype, requires_grad=True)

    def product(name, count, linear):
        flops = 6 * rows * linear.weight.numel()
        return [
            Part(
                f"{name}, {linear.in_features} x {linear.out_features}",
                count,
                linear,
                (x(linear.in_features),),
                flops,
                0,
            )
        ]

    def elementwise(name, count, function, inputs, passes):
        return [Part(name, count, function, inputs, 0, 2 * passes * rows * inputs[0].shape[-1])]

    start = torch.zeros(batch, length, dtype=torch.bool, device=model.device)
    start[:, 0] = True

    def scan(x, recurrence_gate, input_gate):
        return rg_lru_scan(x, recurrence_gate, input_gate, block.rg_lru.decay(), reset=start)[0]

    pair = 12 * rows * block.linear_x.weight.numel()
    gates_flops = 12 * rows * block.rg_lru.input_gate.weight.numel()

    def both_gates(x):
        return gates(x, block.rg_lru.recurrence_gate, block.rg_lru.input_gate)

    found = [
        Part(
            "recurrent block, in: two",
            recurrent,
            lambda x: linears(x, block.linear_x, block.linear_y),
            (x(width),),
            pair,
            0,
        ),
        *product("recurrent block, out", recurrent, block.linear_out),
        Part("both gates", recurrent, both_gates, (x(channels),), gates_flops, 2 * 9 * rows * channels),
        *elementwise("convolution", recurrent, lambda x: block.conv_1d(x)[0], (x(channels),), 5),
        *elementwise("scan", recurrent, scan, (x(channels), x(channels), x(channels)), 12),
        *elementwise("gelu(y) * x", recurrent, lambda y, x: gated(block.act_fn, y, x), (x(channels), x(channels)), 8),
    ]
    if local:
        found += _attention_parts(body, batch, length, local, product, x)

    def enter(x):
        return gated_linears(mlp.act_fn, x, mlp.gate_proj, mlp.up_proj)

    pair = 12 * rows * mlp.gate_proj.weight.numel()
    first, norm = body.layers[0].temporal_pre_norm, body.layers[0].channel_pre_norm
    found += [
        Part("MLP, in: two, and gelu(gate) * up", len(kinds), enter, (x(width),), pair, 2 * 8 * rows * inner),
        *product("MLP, out", len(kinds), mlp.down_proj),
        *elementwise("norm of the residual", len(kinds) + 1, lambda x: first(None, residual=x), (x(width),), 6),
        *elementwise("sum and norm", len(kinds), lambda y, x: norm(y, residual=x), (x(width), x(width)), 8),
        *elementwise("sum behind the MLP", len(kinds), torch.add, (x(width), x(width)), 3),
    ]
    labels = torch.randint(0, config.vocab_size, (batch, length), device=model.device)

    def loss(hidden):
        return model.loss_function(model.lm_head(hidden), labels, config.vocab_size)

    head_flops = 6 * rows * model.lm_head.weight.numel()
    return [*found, Part("head and loss", 1, loss, (x(width),), head_flops, 2 * 3 * rows * config.vocab_size)]


def _attention_parts(body, batch: int, length: int, count: int, product, x) -> list[Part]:
    config, rows = body.config, batch * length
    attention = body.layers[config.layer_types.index("sliding_attention")].temporal_block
    heads, dim = config.num_attention_heads, config.head_dim
    hidden = x(config.hidden_size).detach()
    mask, positions, _ = read_layout(config, hidden, None, None, None)
    embeddings = body.rotary_emb(hidden, positions)
    query, key, value = (x(dim * n).detach().unflatten(-1, (n, dim)) for n in (heads, 1, 1))
    query, key, value = (t.requires_grad_() for t in (query, key, value))

    def attend(query, key, value):
        run = OWN_ATTENTION.get(type(mask)) or torch.nn.functional.scaled_dot_product_attention
        inputs = [t.transpose(1, 2) for t in (query, key, value)]
        if type(mask) in OWN_ATTENTION:
            return run(attention, *inputs, mask, scaling=attention.scaling)[0]
        return run(*inputs, attn_mask=mask, scale=attention.scaling, enable_gqa=True)

    window = min(config.attention_window_size, length)
    pairs = batch * (window * (window + 1) / 2 + (length - window) * window)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    flops = 6 * rows * sum(each.weight.numel() for each in projections)
    return [
        Part("attention, in: three", count, lambda x: linears(x, *projections), (x(config.hidden_size),), flops, 0),
        *product("attention, out", count, attention.o_proj),
        Part("rotation", count, lambda q: rotate(q, *embeddings), (query,), 0, 2 * 4 * rows * heads * dim),
        Part("attention", count, attend, (query, key, value), 14 * pairs * heads * dim, 0),
    ]


def text(report: dict) -> str:
    """The results page."""
    batch, length = report["cell"]
    lines = [f"# Where a training step's time goes: {report['size']}, {batch} x {length}, bfloat16", ""]
    lines += [*birth_lines(report["birth"]), ""]
    lines += [
        f"Copy rate {report['copy_bytes_per_s'] / 1e12:.2f} TB/s. Forward and backward of each part alone, times its",
        "number in a step; medians. Floor: products at the GPU's peak, and the fewest other bytes at the copy rate.",
        "",
        "| part | times | ms each | ms a step | floor, ms a step | floor's share |",
        "|---|---|---|---|---|---|",
    ]
    total = floor_total = 0.0
    for part in report["parts"]:
        seconds, floor = (part["count"] * part[key] for key in ("seconds", "floor"))
        total, floor_total = total + seconds, floor_total + floor
        numbers = f"{part['seconds'] * 1e3:.3f} | {seconds * 1e3:.1f} | {floor * 1e3:.1f}"
        lines.append(f"| {part['name']} | {part['count']} | {numbers} | {floor / seconds:.0%} |")
    lines.append(f"| all parts | | | {total * 1e3:.1f} | {floor_total * 1e3:.1f} | {floor_total / total:.0%} |")
    step = report["step_s"]
    lines.append(
        f"| the step, {batch * length / step:,.0f} tokens/s | | | {step * 1e3:.1f} | | {floor_total / step:.0%} |"
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Times training steps of a Griffin on several GPUs of one host, by DDP and by FSDP2, at a fixed batch per GPU.

    python scripts/benchmark_distributed.py --processes 1 2 4                            # griffin-1b3, GPUs
    python scripts/benchmark_distributed.py --processes 4 --config griffin-3b --largest  # and the deepest that trains
    python scripts/benchmark_distributed.py --rows 1 --engines ddp ddp_recorded          # small steps
    python scripts/benchmark_distributed.py --processes 4 --engines --largest            # only that
    python scripts/benchmark_distributed.py --device cpu --processes 1 2 --config tiny --length 64     # does it run

Each run is its own `torchrun`: random weights and tokens, AdamW without clipping, float32 weights with bfloat16
products. FSDP2 runs in the groups that accelerate makes of this model, Λ by itself in float32; the loop is this file's,
not Trainer's. Writes OUTPUT.json, OUTPUT.md and OUTPUT.png, with the memory that `plan_memory.py` expects beside what
was measured (on GPUs only).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from benchmarks.birth_certificate import birth_certificate, birth_lines, quantiles, short_device_name
from command_line import Parser
from plan_memory import CONFIGURATION, ddp, fsdp2
from planning.memory_formulas import parameters, sizes_of
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from whole_files import in_one_step, with_ending, write_whole

from modeling_griffin import GriffinConfig, GriffinForCausalLM, record_training


ENGINES = {  # name: (plan, activation checkpointing)
    "ddp": (ddp, False),
    "ddp_recorded": (ddp, False),  # forward and backward as CUDA graphs
    "fsdp2": (fsdp2, False),
    "fsdp2_checkpointing": (fsdp2, True),
}
PATTERN = 3  # layers after which the pattern of recurrent and attention layers repeats
LOSS = 1e-2  # share by which recorded steps may differ after all steps: sums in another order
TIMEOUT = 1800  # seconds of one run
OUT_OF_MEMORY = "OutOfMemoryError"


# One process of a run


def make_config(run: dict) -> GriffinConfig:
    """The configuration, with `layers` layers of its pattern where the run asks for another depth."""
    config = GriffinConfig.from_json_file(run["config"])
    if run["layers"] is None:
        return config
    settings = config.to_dict() | {"num_hidden_layers": run["layers"], "layer_types": None}
    if "sliding_attention" not in config.layer_types:
        settings["layer_types"] = ["linear_attention"] * run["layers"]
    return GriffinConfig(**settings)


def make_model(run: dict, device: torch.device) -> torch.nn.Module:
    """The model under its engine, made on the meta device, so that no process ever holds more than its shards."""
    with torch.device("meta"):
        model = GriffinForCausalLM(make_config(run)).train()
    if ENGINES[run["engine"]][1]:
        model.gradient_checkpointing_enable()
    if not is_ddp(run):
        shard(model)
    model.to_empty(device=device)
    fill(model)
    if not is_ddp(run):
        return model
    if run["engine"] == "ddp_recorded":
        record_training(model, lengths=[run["length"]])
    return DistributedDataParallel(model)


def is_ddp(run: dict) -> bool:
    return ENGINES[run["engine"]][0] is ddp


def shard(model: GriffinForCausalLM) -> None:
    """FSDP2 in accelerate's groups: each layer; the two ends of the model; and Λ by itself, never cast."""
    bfloat16 = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    for layer in model.model.layers:
        if hasattr(layer.temporal_block, "rg_lru"):
            fully_shard(layer.temporal_block.rg_lru.decay, mp_policy=MixedPrecisionPolicy())
        fully_shard(layer, mp_policy=bfloat16, reshard_after_forward=True)
    model.tie_weights()
    embedding, head = model.model.embed_tokens, model.lm_head
    if head.weight is embedding.weight:
        ends = [model.model.final_norm, embedding, head]
    else:
        fully_shard(embedding, mp_policy=bfloat16, reshard_after_forward=True)
        ends = [model.model.final_norm, head]
    fully_shard(ends, mp_policy=bfloat16, reshard_after_forward=False)
    fully_shard(model, mp_policy=bfloat16)


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Weights at about their initial scale; the time of a step does not depend on them."""
    model.tie_weights()
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if name.endswith("lambda_bias"):
            local.fill_(-5.0)
        elif parameter.dim() == 1 or name.endswith("bias"):
            local.zero_()
        else:
            local.normal_(std=0.02)


def measure(run: dict, device: torch.device) -> dict:
    """Seconds of each step after the warm-up, the last loss, and peak bytes of the fullest GPU (None on a CPU)."""
    model = make_model(run, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    vocabulary, seconds = make_config(run).vocab_size, []
    for step in range(run["warmup"] + run["steps"]):
        ids = torch.randint(0, vocabulary, (run["rows"], run["length"]), device=device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        last = loss.item()  # waits for the device
        dist.barrier()
        if step >= run["warmup"]:
            seconds.append(time.perf_counter() - start)
    peak = torch.tensor(torch.cuda.max_memory_allocated() if device.type == "cuda" else 0, device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"seconds": seconds, "loss": last, "peak": peak.item() or None, "parameters": count}


def work(path: Path) -> None:
    """What torchrun starts: reads the run from `path`, rank 0 adds what was measured."""
    run = json.loads(path.read_text(encoding="utf-8"))
    device = torch.device("cpu")
    if run["device"] == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if run["device"] == "cuda" else "gloo")
    torch.manual_seed(dist.get_rank())
    found = measure(run, device)
    if dist.get_rank() == 0:
        path.write_text(json.dumps(run | found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


# All runs


def launch(run: dict) -> dict | None:
    """The run with what was measured; None where a GPU ran out of memory; other failures end the benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        path.write_text(json.dumps(run), encoding="utf-8")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--nproc_per_node", str(run["processes"]), __file__, "--work", str(path)]
        child = subprocess.Popen(torchrun, stderr=subprocess.PIPE, text=True)
        try:
            _, errors = child.communicate(timeout=TIMEOUT)
        finally:
            if child.poll() is None:  # timed out or interrupted
                child.terminate()  # torchrun then ends its workers, which are sessions of their own
                child.wait(60)
        if child.returncode == 0:
            return json.loads(path.read_text(encoding="utf-8"))
    if OUT_OF_MEMORY in errors:
        return None
    raise SystemExit(f"{run['engine']} on {run['processes']} processes failed:\n{errors[-3000:]}")


def largest_depth(trains: Callable[[int], bool], guess: int) -> Iterator[tuple[int, int | None]]:
    """Ever closer (layers that train, 0 before any does; layers that do not, None before any), in multiples of PATTERN.

    Strides from the guess, doubling them, until both are known; then bisects until they are a sixteenth of the guess
    apart, or one pattern.
    """
    good, bad, here = 0, None, max(1, guess // PATTERN)
    close = stride = max(1, here // 16)
    while bad is None or bad - good > close:
        if trains(here * PATTERN):
            good = here
        else:
            bad = here
        yield good * PATTERN, None if bad is None else bad * PATTERN
        if bad is None:
            here = good + stride
        elif not good and bad > stride:
            here = bad - stride
        else:
            here = (good + bad) // 2
        stride *= 2


def guess_depth(base: dict, processes: int, memory: int) -> int:
    """Layers whose planned memory is 95% of `memory`: at the peak there are gradients or activations, not both."""

    def needed(layers: int) -> int:
        sizes = sizes_of(make_config(base | {"layers": layers}))
        plan = fsdp2(sizes, base["rows"], base["length"], processes, checkpointing=True)
        return plan.memory - min(plan.activations, 4 * parameters(sizes) // processes)

    layers = PATTERN
    while needed(layers + PATTERN) <= 0.95 * memory:
        layers += PATTERN
    return layers


def find_largest(base: dict, processes: int) -> Iterator[dict]:
    """The deepest model of this width that FSDP2 with checkpointing trains, two steps of it; closer with each try."""
    run = base | {"engine": "fsdp2_checkpointing", "processes": processes, "warmup": 1, "steps": 1}
    tried = {}

    def trains(layers: int) -> bool:
        tried[layers] = launch(run | {"layers": layers})
        return tried[layers] is not None

    guess = guess_depth(run, processes, torch.cuda.get_device_properties(0).total_memory)
    for layers, failed in largest_depth(trains, guess):
        found = {"processes": processes, "rows": base["rows"], "layers": layers, "out_of_memory": failed}
        if layers:
            found |= {"parameters": tried[layers]["parameters"], "peak": tried[layers]["peak"]}
            found["planned"] = summarise(tried[layers], None)["planned"]
        yield found


def summarise(run: dict, single: dict | None) -> dict:
    """Tokens a second from the median step, its quantiles, efficiency against `single`, and the memory planned."""
    tokens = run["processes"] * run["rows"] * run["length"]
    spread = quantiles(run["seconds"])
    plan, checkpointing = ENGINES[run["engine"]]
    gpus = max(2, run["processes"]) if is_ddp(run) else run["processes"]  # DDP has buckets alone too
    planned = plan(sizes_of(make_config(run)), run["rows"], run["length"], gpus, checkpointing).memory
    speed = tokens / spread["median"]
    row = {name: run[name] for name in ("engine", "processes", "parameters")} | {"tokens_per_second": speed}
    row |= {**spread, "loss": run["loss"], "peak": run["peak"], "planned": planned}
    each = speed / run["processes"]
    first = row | {"each": each} if single is None else single
    return row | {"each": each, "efficiency": each / first["each"]}


def check_loss(rows: list[dict]) -> None:
    """Ends the benchmark where recorded steps, over the same weights and tokens, came to another loss."""
    last = {row["engine"]: row["loss"] for row in rows if row["processes"] == rows[-1]["processes"]}
    plain, recorded = last.get("ddp"), last.get("ddp_recorded")
    if plain is not None and recorded is not None and not abs(recorded - plain) <= LOSS * plain:
        raise SystemExit(f"recorded steps are wrong: the last loss is {recorded}, that of plain steps {plain}")


def benchmark(base: dict, processes: list[int], engines: list[str], largest: bool) -> Iterator[dict]:
    """The report after each run, so that one that is cut short leaves what it measured."""
    report: dict = {"run": base, "rows": [], "out_of_memory": []}
    for engine in engines:
        single = None
        for count in tqdm(processes, desc=engine):
            run = launch(base | {"engine": engine, "processes": count})
            if run is None:
                report["out_of_memory"].append({"engine": engine, "processes": count})
            else:
                report["rows"].append(summarise(run, single))
                check_loss(report["rows"])
                single = single or report["rows"][-1]
            yield report
    done = []
    for count in processes if largest else []:
        for found in find_largest(base, count):
            report["largest"] = [*done, found]
            yield report
        done = report["largest"]


# Reports


def text_of(report: dict) -> str:
    run, precision = report["run"], "float32 weights, bfloat16 products"
    lines = [f"# Training steps of {Path(run['config']).stem} on several processes", "", *birth_lines(report["birth"])]
    lines += [
        "",
        f"{run['rows']} rows of {run['length']} tokens a process, {precision}, AdamW, {run['steps']} steps after ",
    ]
    lines[-1] += (
        f"{run['warmup']} of warm-up. Efficiency: tokens/s of one process, against the fewest processes that ran."
    )
    lines += ["", "| engine | processes | tokens/s | efficiency | step, s | 10% | 90% | peak GB | planned GB |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in report["rows"]:
        peak = "-" if row["peak"] is None else f"{row['peak'] / 1e9:.1f}"
        cells = [row["engine"], row["processes"], f"{row['tokens_per_second']:,.0f}", f"{row['efficiency']:.1%}"]
        cells += [f"{row[key]:.4f}" for key in ("median", "10%", "90%")] + [peak, f"{row['planned'] / 1e9:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [f"| {row['engine']} | {row['processes']} | out of memory |" for row in report["out_of_memory"]]
    if "largest" in report:
        lines += ["", "Deepest model of this width that trained by FSDP2 with activation checkpointing:", ""]
        lines += ["| processes | rows | layers | parameters | peak GB | planned GB | ran out of memory with layers |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in report["largest"]:
            gigabytes = [f"{row[key] / 1e9:.1f}" if key in row else "-" for key in ("peak", "planned")]
            cells = [row["processes"], row["rows"], row["layers"], f"{row.get('parameters', 0):,}", *gigabytes]
            lines.append("| " + " | ".join(map(str, [*cells, row["out_of_memory"] or "none tried"])) + " |")
    return "\n".join(lines) + "\n"


def plot(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.5))
    for engine in dict.fromkeys(row["engine"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["engine"] == engine]
        counts = [row["processes"] for row in rows]
        (line,) = axes.plot(counts, [row["tokens_per_second"] for row in rows], "o-", label=engine)
        axes.plot(counts, [rows[0]["each"] * count for count in counts], "--", color=line.get_color(), linewidth=0.8)
    axes.set_xticks(sorted({row["processes"] for row in report["rows"]}))
    axes.set(xlabel="processes", ylabel="tokens/s", title=f"{Path(report['run']['config']).stem}; dashed: ideal")
    axes.legend()
    figure.tight_layout()
    with in_one_step(path) as half:
        figure.savefig(half, dpi=150)
    plt.close(figure)


def read_config(name: str) -> str:
    """The path of a ready-made configuration by its name, or of a JSON file."""
    for path in (CONFIGURATION / "model" / f"{name}.json", Path(name)):
        if path.is_file():
            return str(path.resolve())
    names = ", ".join(sorted(path.stem for path in (CONFIGURATION / "model").glob("*.json")))
    raise ValueError(f"--config {name}: allowed are {names}, or a JSON file")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_device()
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="one run for each number")
    parser.add_argument(
        "--engines", nargs="*", choices=ENGINES, default=list(ENGINES), help="to time; none: --largest alone"
    )
    parser.add_argument("--config", default="griffin-1b3", help="a name in configuration/model/, or a JSON file")
    parser.add_argument("--rows", type=int, default=4, help="rows a process")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--warmup", type=int, default=5, help="steps before those that are timed")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--largest", action="store_true", help="also find the deepest model that trains (GPUs)")
    parser.add_argument(
        "--output", type=Path, default=None, help="path without suffix; default results/distributed/distributed_..."
    )
    parser.add_argument("--commit", default=None, help="the commit that runs; default: as git says")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.work is not None:
        return work(arguments.work)
    available = torch.cuda.device_count() if arguments.device == "cuda" else os.cpu_count()
    if wrong := [count for count in arguments.processes if not 1 <= count <= available]:
        parser.error(f"--processes {wrong[0]}: allowed are 1 to {available} on this machine")
    parser.check_least(arguments, rows=1, length=1, steps=1)
    if arguments.largest and arguments.device == "cpu":
        parser.error("--largest with --device cpu: allowed on GPUs, whose memory can run out without harm")
    try:
        config = read_config(arguments.config)
    except ValueError as error:
        parser.error(str(error))
    base = {name: getattr(arguments, name) for name in ("device", "rows", "length", "warmup", "steps")}
    processes = sorted(set(arguments.processes))
    birth = birth_certificate(arguments.device, arguments.commit)
    name = f"distributed_{short_device_name(arguments.device)}_{Path(arguments.config).stem}"
    output = arguments.output or Path("results") / "distributed" / name
    parser.make_folder_of(output)
    run = base | {"config": config, "layers": None}
    for found in benchmark(run, processes, arguments.engines, arguments.largest):
        report = {"birth": birth, **found, "run": run | {"config": arguments.config}}
        write_whole(with_ending(output, ".json"), json.dumps(report, indent=1))
        write_whole(with_ending(output, ".md"), text_of(report))
        if report["rows"]:
            plot(report, with_ending(output, ".png"))
    print(text_of(report), end="")
    print(f"wrote {output}.json, .md and .png")


if __name__ == "__main__":
    main()

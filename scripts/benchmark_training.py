"""Times training steps of whole models: this project's Griffin beside its peers, on the same work.

    python scripts/benchmark_training.py --device cpu     10M parameters, float32
    python scripts/benchmark_training.py --device cuda    about 2B parameters, bfloat16

A step is forward and backward over random tokens, every parameter's gradient included, no optimizer. The peers are
RecurrentGemma and a Llama with multi-query attention in Transformers, and HGRN of flash-linear-attention where it is
installed, all of the same depth, width, MLP and vocabulary. Nothing is timed unless this project's loss and gradients
agree with those by the definitions. The models' repetitions take turns, so that all meet the same machine. On a
GPU this project's model is timed in other ways too: long rows under activation checkpointing at equal tokens a step,
packed and padded rows, short rows, float32, LoRA. Writes OUTPUT.json, OUTPUT.md and OUTPUT.png.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from benchmarks.birth_certificate import birth_certificate, birth_lines, quantiles, short_device_name
from command_line import Parser
from compare_paths import definitions
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)
from whole_files import in_one_step, with_ending, write_whole

from modeling_griffin import GriffinConfig, GriffinForCausalLM
from modeling_griffin.kernels import dispatch


# width, depth, MLP of each branch, heads of attention, vocabulary, window
SIZES = {
    "tiny": (32, 3, 96, 2, 320, 16),  # bytes and the ends of texts fit in
    "10m": (256, 12, 768, 4, 4096, 1024),
    "400m": (1536, 12, 4608, 12, 32000, 1024),
    "2b": (2560, 26, 7680, 20, 32000, 1024),
}
PRESETS = ("recurrentgemma-2b", "recurrentgemma-9b")  # sizes that configuration/model/ has
CELLS = {"cpu": [(1, 256), (1, 1024), (1, 4096)], "cuda": [(8, 2048), (2, 8192), (1, 16384)]}
PEAK_FLOPS = {"h100": 989e12, "h200": 989e12}  # dense bfloat16, from NVIDIA's data sheets
OWN = "Griffin, this project"
MAX_ERROR = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the loss and of the gradient's norm


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_device()
    parser.add_argument("--size", choices=[*SIZES, *PRESETS], default=None, help="default 10m on a CPU, 2b on a GPU")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default=None, help="default float32 on a CPU, else bfloat16"
    )
    cells = "; ".join(f"{name}: {' '.join(f'{b}x{t}' for b, t in own)}" for name, own in CELLS.items())
    cells = f"batch x tokens (default: {cells})"
    parser.add_argument("--cells", type=_cell, nargs="+", default=None, metavar="BxT", help=cells)
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="NAME", help="of the table"
    )
    parser.add_argument("--ways", type=int, nargs="*", default=None, metavar="N", help="of WAYS; default all on a GPU")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each model at each cell")
    parser.add_argument("--longest", type=float, default=60.0, help="seconds: a slower model is timed once")
    parser.add_argument("--output", type=Path, help="path without suffix; default results/training/training_DEVICE")
    parser.add_argument("--commit", default=None, help="the commit that runs; default: as git says")
    arguments = parser.parse_args(argv)
    parser.check_least(arguments, repeats=1)
    arguments.models = [name for name in arguments.models if _is_installed(name)]
    device, name = arguments.device, short_device_name(arguments.device)
    size = arguments.size or {"cpu": "10m", "cuda": "2b"}[device]
    dtype = getattr(torch, arguments.dtype or {"cpu": "float32", "cuda": "bfloat16"}[device])
    output = arguments.output or Path("results") / "training" / f"training_{name}"
    parser.make_folder_of(output)
    birth = birth_certificate(device, arguments.commit, ["flash-linear-attention"])
    errors = check(device, dtype)
    report = {"birth": birth, "device": device, "size": size, "dtype": str(dtype).removeprefix("torch.")}
    report |= {"errors": errors, "rows": [], "ways": []}
    for cell in arguments.cells or CELLS[device]:
        for row in measure(arguments, size, cell, dtype, PEAK_FLOPS.get(name)):
            report["rows"].append(row)
            _write(report, output)
    ways = range(len(WAYS) if device == "cuda" else 0) if arguments.ways is None else arguments.ways
    for way in (WAYS[number] for number in ways):
        report["ways"].append(measure_way(way, size, dtype, arguments.repeats, PEAK_FLOPS.get(name)))
        _write(report, output)
    print(text(report))


def _write(report: dict, output: Path) -> None:
    write_whole(with_ending(output, ".json"), json.dumps(report, indent=1))
    write_whole(with_ending(output, ".md"), text(report))
    plot(report, with_ending(output, ".png"))


def _is_installed(name: str) -> bool:
    try:
        MODELS[name]("tiny")
    except ImportError as error:
        print(f"{name} is left out: {error}")
        return False
    return True


def _cell(word: str) -> tuple[int, int]:
    try:
        batch, length = (int(number) for number in word.split("x"))
    except ValueError:
        batch = length = 0
    if min(batch, length) < 1:
        raise argparse.ArgumentTypeError(f"{word!r}: allowed is BATCHxTOKENS, for example 8x2048")
    return batch, length


# The models


def griffin(size: str) -> PreTrainedModel:
    return GriffinForCausalLM(config_of(size))


def config_of(size: str) -> GriffinConfig:
    return GriffinConfig.from_preset(size) if size in PRESETS else _griffin_config(size)


def _shape(size: str) -> tuple[int, ...]:
    """A line of SIZES, or what the preset would have there."""
    if size in SIZES:
        return SIZES[size]
    config = GriffinConfig.from_preset(size)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    window = config.attention_window_size
    return config.hidden_size, layers, config.intermediate_size, heads, config.vocab_size, window


def _griffin_config(size: str) -> GriffinConfig:
    width, depth, mlp, heads, vocabulary, window = SIZES[size]
    return GriffinConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        attention_window_size=window,
    )


def recurrent_gemma(size: str) -> PreTrainedModel:
    width, depth, mlp, heads, vocabulary, window = _shape(size)
    config = RecurrentGemmaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * mlp,  # counts both branches
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=1,
        lru_width=width,
        attention_window_size=window,
        block_types=["recurrent", "recurrent", "attention"],
        pad_token_id=None,
    )
    return RecurrentGemmaForCausalLM(config)


def llama(size: str) -> PreTrainedModel:
    width, depth, mlp, heads, vocabulary, _ = _shape(size)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        max_position_embeddings=2**20,
    )
    return LlamaForCausalLM(config)


def hgrn(size: str) -> PreTrainedModel:
    from fla.models import HGRNConfig, HGRNForCausalLM

    width, depth, mlp, _, vocabulary, _ = _shape(size)
    config = HGRNConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=depth,
        tie_word_embeddings=True,
    )
    return HGRNForCausalLM(config)


MODELS: dict[str, Callable[[str], PreTrainedModel]] = {
    OWN: griffin,
    "RecurrentGemma, Transformers": recurrent_gemma,
    "Llama with MQA, Transformers": llama,
    "HGRN, flash-linear-attention": hgrn,
}


# Other ways to train


class Way(NamedTuple):
    """prepare: of the model before it is timed. inputs: of tokens (B, T), further arguments of the model."""

    name: str
    cell: tuple[int, int]
    prepare: Callable[[PreTrainedModel], PreTrainedModel] = lambda model: model
    inputs: Callable[[torch.Tensor], dict] = lambda tokens: {}
    dtype: torch.dtype | None = None


def _checkpointed(model: PreTrainedModel) -> PreTrainedModel:
    model.gradient_checkpointing_enable()
    return model


def _with_lora(model: PreTrainedModel) -> PreTrainedModel:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def _packed(tokens: torch.Tensor) -> dict:
    """Documents of 300 tokens, the last of a row shorter."""
    return {"position_ids": (torch.arange(tokens.shape[1], device=tokens.device) % 300).expand(tokens.shape[0], -1)}


def _padded(tokens: torch.Tensor) -> dict:
    """Left-padded: 0, 1, 2, ... eighths of a row."""
    padding = tokens.shape[1] // 8 * torch.arange(tokens.shape[0], device=tokens.device)[:, None] % tokens.shape[1]
    return {"attention_mask": (torch.arange(tokens.shape[1], device=tokens.device) >= padding).long()}


CHECKPOINTING = "activation checkpointing"
SLOW = 2.0  # seconds: a slower way is timed once
WAYS = [
    *(Way(CHECKPOINTING, cell, _checkpointed) for cell in [(64, 2048), (16, 8192), (4, 32768), (1, 131072)]),
    Way("packed documents of 300 tokens", (8, 2048), inputs=_packed),
    Way("left-padded rows, padding counted as tokens", (8, 2048), inputs=_padded),
    Way("short rows", (64, 256)),
    Way("float32", (2, 2048), dtype=torch.float32),
    Way("LoRA of rank 16 on every linear layer", (8, 2048), _with_lora),
]


def measure_way(way: Way, size: str, dtype: torch.dtype, repeats: int, peak_flops: float | None) -> dict:
    row = {"way": way.name, "batch": way.cell[0], "length": way.cell[1]}
    try:
        model = way.prepare(_make(OWN, size, "cuda", way.dtype or dtype))
        row["parameters"] = model.num_parameters() if hasattr(model, "num_parameters") else 0
        first = _step(model, way.cell, "cuda", way.inputs)[0]  # kernels are compiled
        repeats = 1 if first > SLOW else repeats
        steps = [_step(model, way.cell, "cuda", way.inputs) for _ in range(repeats)]
    except (torch.OutOfMemoryError, ImportError) as error:
        return row | {"failed": str(error).splitlines()[0]}
    finally:
        model = None
        gc.collect()
        torch.cuda.empty_cache()
    row |= {"memory": steps[-1][1], **_speed([seconds for seconds, _ in steps], row, peak_flops)}
    print(f"{row['batch']} x {row['length']}, {way.name}: {row['tokens_per_second']:,.0f} tokens/s", flush=True)
    return row


# Measuring


def check(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Errors of loss and gradient against the same model by the definitions. Raises SystemExit if too large."""
    torch.manual_seed(0)
    model = griffin("tiny").to(device=device, dtype=dtype)
    tokens = torch.randint(0, model.config.vocab_size, (2, 100), device=device)
    with mock.patch.object(dispatch, "LEAST_ELEMENTS", 1):  # on a GPU by its kernels, small as the tensors are
        found = _loss_and_gradient(model, tokens)
    with definitions():
        expected = _loss_and_gradient(model, tokens)
    pairs = zip(("loss", "gradient"), found, expected)
    errors = {name: ((actual - right).norm() / right.norm()).item() for name, actual, right in pairs}
    if not max(errors.values()) <= MAX_ERROR[dtype]:
        raise SystemExit(f"wrong: {errors}, allowed {MAX_ERROR[dtype]}; nothing is timed")
    return errors


def _loss_and_gradient(model, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    gradient = torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])
    return loss.detach().double(), gradient


def measure(
    arguments: argparse.Namespace, size: str, cell: tuple[int, int], dtype: torch.dtype, peak_flops: float | None
) -> Iterator[dict]:
    """A row of results for each model at one (batch, tokens). On a GPU one model lives at a time, on a CPU all do."""
    names = arguments.models
    groups = [[name] for name in names] if arguments.device == "cuda" else [names]
    for group in groups:
        models = {name: _make(name, size, arguments.device, dtype) for name in group}
        seconds, memory = _take_turns(models, cell, arguments)
        for name, model in models.items():
            row = {"model": name, "batch": cell[0], "length": cell[1], "parameters": model.num_parameters()}
            row |= {"memory": memory.get(name), **_speed(seconds[name], row, peak_flops)}
            print(_line(row), flush=True)
            yield row
        del models, model
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()


def _make(name: str, size: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        model = MODELS[name](size).to(dtype).train()
    for parameter in (p for n, p in model.named_parameters() if n.endswith("lambda_bias")):
        parameter.data = parameter.data.float()  # as from_pretrained and from_config leave it
    return model


def _take_turns(models: dict, cell: tuple[int, int], arguments) -> tuple[dict, dict]:
    """(seconds of each step, peak bytes on the GPU) by model. An out-of-memory error leaves a model without seconds."""
    seconds, memory = {name: [] for name in models}, {}
    skipped = set()
    for repeat in tqdm(range(arguments.repeats + 1), desc=f"{cell[0]} x {cell[1]}", leave=False):
        for name, model in models.items():
            if name in skipped:
                continue
            try:
                time_taken, memory[name] = _step(model, cell, arguments.device)
            except torch.OutOfMemoryError:
                print(f"{name} at {cell[0]} x {cell[1]}: out of memory")
                skipped.add(name)
                continue
            if repeat:  # the first step compiles and fills caches
                seconds[name].append(time_taken)
                if time_taken > arguments.longest:
                    skipped.add(name)
    return seconds, memory


def _step(model, cell: tuple[int, int], device: str, inputs: Callable | None = None) -> tuple[float, int | None]:
    """Seconds, and peak bytes on a GPU, of one forward and backward. inputs: see `Way`."""
    tokens = torch.randint(0, model.config.vocab_size, cell, device=device)
    further = inputs(tokens) if inputs else {}
    model.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model(tokens, labels=tokens, use_cache=False, **further).loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() if device == "cuda" else None


def _speed(seconds: list[float], row: dict, peak_flops: float | None) -> dict:
    """Tokens a second and, where the GPU's peak is known, the share of it that 6 * parameters * tokens take (MFU)."""
    if not seconds:
        return {"seconds": None, "tokens_per_second": None, "mfu": None}
    spread = quantiles(seconds)
    speed = row["batch"] * row["length"] / spread["median"]
    mfu = 6 * row["parameters"] * speed / peak_flops if peak_flops else None
    return {"seconds": spread, "steps": len(seconds), "tokens_per_second": speed, "mfu": mfu}


# The report


def _line(row: dict) -> str:
    cell = f"{row['batch']} x {row['length']}"
    if row["seconds"] is None:
        return f"{cell:12} {row['model']:30} out of memory"
    return f"{cell:12} {row['model']:30} {row['tokens_per_second']:10,.0f} tokens/s"


def text(report: dict) -> str:
    """The results page."""
    rows = report["rows"]
    lines = [f"# Training steps, {report['size']}, {report['dtype']}", "", *birth_lines(report["birth"]), ""]
    lines += [
        "A step: forward and backward, no optimizer. Medians, with the 10% and 90% quantiles. MFU: 6 * parameters *",
        "tokens over the time and the GPU's dense bfloat16 peak. Ratio: this project's tokens/s over the model's.",
        "",
        "| batch x T | model | parameters | step, ms (10%, 90%; steps) | tokens/s | MFU | peak memory, GiB | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_table_row(row, rows) for row in rows]
    errors = ", ".join(f"{name} {error:.1e}" for name, error in report["errors"].items())
    lines += _ways_text(report.get("ways", []))
    return "\n".join([*lines, "", f"Before timing, errors against the definitions: {errors}."]) + "\n"


def _ways_text(ways: list[dict]) -> list[str]:
    if not ways:
        return []
    lines = ["", "This project's model in other ways:", ""]
    lines += ["| batch x T | | step, ms (10%, 90%) | tokens/s | MFU | peak memory, GiB |", "|---|---|---|---|---|---|"]
    for row in ways:
        head = f"| {row['batch']} x {row['length']} | {row['way']} |"
        if "failed" in row:
            lines.append(f"{head} {row['failed']} | | | |")
            continue
        milliseconds = "{median:,.0f} ({10%:,.0f}, {90%:,.0f})".format(
            **{k: s * 1e3 for k, s in row["seconds"].items()}
        )
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else ""
        memory = f"{row['memory'] / 2**30:.1f}"
        lines.append(f"{head} {milliseconds} | {row['tokens_per_second']:,.0f} | {mfu} | {memory} |")
    return [*lines, "", "MFU leaves out what checkpointing computes twice, and counts LoRA's frozen weights."]


def _table_row(row: dict, rows: list[dict]) -> str:
    head = f"| {row['batch']} x {row['length']} | {row['model']} | {row['parameters'] / 1e6:,.2f}M |"
    if row["seconds"] is None:
        return f"{head} out of memory | | | | |"
    milliseconds = {key: seconds * 1e3 for key, seconds in row["seconds"].items()}
    steps = "{median:,.0f} ({10%:,.0f}, {90%:,.0f}; ".format(**milliseconds) + f"{row['steps']})"
    mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
    memory = "" if row["memory"] is None else f"{row['memory'] / 2**30:.1f}"
    cell = (row["batch"], row["length"])
    own = next((r for r in rows if r["model"] == OWN and (r["batch"], r["length"]) == cell and r["seconds"]), None)
    ratio = "" if own is None or own is row else f"{own['tokens_per_second'] / row['tokens_per_second']:.3g}"
    return f"{head} {steps} | {row['tokens_per_second']:,.0f} | {mfu} | {memory} | {ratio} |"


def plot(report: dict, path: Path) -> None:
    """Tokens a second, and on a GPU peak memory, against T."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in report["rows"] if row["seconds"]]
    panels = {"tokens_per_second": "tokens a second"}
    if any(row["memory"] for row in rows):
        panels["memory"] = "peak memory (GiB)"
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
    for axis, (key, label) in zip(axes[0], panels.items()):
        for name in dict.fromkeys(row["model"] for row in rows):
            own = [row for row in rows if row["model"] == name]
            scale = 2**30 if key == "memory" else 1
            axis.plot([r["length"] for r in own], [r[key] / scale for r in own], "o-", label=name)
        if long := [row for row in report["ways"] if row["way"] == CHECKPOINTING and row.get("seconds")]:
            label_of_long = f"{OWN}, {CHECKPOINTING}, {long[0]['batch'] * long[0]['length']:,} tokens a step"
            axis.plot([r["length"] for r in long], [r[key] / scale for r in long], "o--", label=label_of_long)
        axis.set(xlabel="T (tokens in a row)", ylabel=label)
        axis.set_xscale("log", base=2)
        if key == "tokens_per_second" and report["device"] == "cpu":  # peers are orders of magnitude apart there
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, None)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"Forward and backward, {report['size']}, {report['dtype']}, {report['birth']['hardware']}")
    figure.tight_layout()
    with in_one_step(path) as half:
        figure.savefig(half, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()

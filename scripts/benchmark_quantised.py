"""Times quantised weights on a GPU: decoding, QLoRA, and training in float8, with memory and bits per byte.

    python scripts/benchmark_quantised.py                                all parts, 2.1B parameters, QLoRA at 9B
    python scripts/benchmark_quantised.py --parts decode --schemes nf4

Parts: decode (ms a token, memory, tokens beside the scheme's own numbers dequantised), qlora (tokens/s and peak of a
step with activation checkpointing and AdamW, beside Llama), float8 (tokens/s of forward and backward beside bfloat16),
text (a model trained by train.py in bfloat16 with some seeds and in float8, and its bits per byte in every scheme; on a
CPU the demonstration's model, with products in float8 that torchao emulates).
Random weights, except in `text`. Writes OUTPUT.json and OUTPUT.md after every row; a row that fails says why.
"""

import argparse
import concurrent.futures
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from benchmark_training import OWN, SIZES, _cell, _make
from benchmarks.birth_certificate import birth_certificate, birth_lines, quantiles, short_device_name
from benchmarks.quantised import SCHEMES, bytes_of, dequantised, quantise, without_kernels
from command_line import Parser
from training.float8 import compile_blocks, convert
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from whole_files import with_ending, write_whole

from modeling_griffin import LORA_TARGETS, GriffinConfig, GriffinForCausalLM
from modeling_griffin.decode import generate as decode_generate
from modeling_griffin.decode.eligibility import decide


PARTS = ("decode", "qlora", "float8", "text")
QLORA = ("nf4, constants too", "torchao int8")
TOKENS = 64  # that are compared
ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="of decode and text")
    parser.add_argument("--size", choices=SIZES, default="2b", help="of decode and float8")
    forward = "also one row of the model's own forward pass"
    parser.add_argument("--forward", action=argparse.BooleanOptionalAction, default=True, help=forward)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64], help="rows of decode")
    parser.add_argument("--new", type=int, default=128, help="tokens of a timed generation of decode")
    parser.add_argument(
        "--qlora_size", choices=("9b", "tiny"), default="9b", help="RecurrentGemma-9B's settings, or tiny"
    )
    parser.add_argument(
        "--qlora_cells", type=_cell, nargs="+", default=[(1, 2048), (4, 2048)], metavar="BxT", help="of qlora"
    )
    parser.add_argument("--qlora_schemes", nargs="+", choices=QLORA, default=list(QLORA), help="of qlora")
    models = ["griffin", "llama"]
    parser.add_argument("--models", nargs="+", choices=models, default=models, help="of qlora")
    parser.add_argument("--cell", type=_cell, default=(8, 2048), metavar="BxT", help="of float8")
    parser.add_argument("--steps", type=int, default=500, help="training steps of text")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1], help="of the bfloat16 runs of text; float8 has the first"
    )
    parser.add_argument("--jobs", type=int, default=1, help="training runs of text side by side")
    parser.add_argument("--config", default=None, help="the model of text; unset: TEXT's for the device")
    parser.add_argument("--repeats", type=int, default=6, help="timed steps of each row")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to see that it runs")
    parser.add_argument("--output", type=Path, default=None, help="path without suffix")
    parser.add_argument("--commit", default=None, help="the commit that runs, for a copy without its git history")
    arguments = parser.parse_args(argv)
    output = arguments.output or Path("results") / "quantisation" / f"quantised_{short_device_name(arguments.device)}"
    parser.make_folder_of(output)
    birth = birth_certificate(arguments.device, arguments.commit, ["bitsandbytes", "torchao", "peft", "accelerate"])
    report = {"birth": birth, "size": arguments.size, **{part: [] for part in arguments.parts}}
    for part in arguments.parts:
        for row in MEASURES[part](arguments, output):
            report[part].append(row)
            print(json.dumps(row), flush=True)
            write_whole(with_ending(output, ".json"), json.dumps(report, indent=1))
            write_whole(with_ending(output, ".md"), text(report))
            _free(arguments.device)


def _try(row: dict, measure: Callable[..., dict], *given) -> dict:
    """A row, or why there is none: a library that is not there costs one row, not the run."""
    try:
        return row | measure(*given)
    except Exception as error:
        return row | {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


# Decoding


def decode(arguments: argparse.Namespace, output: Path) -> Iterator[dict]:
    for scheme in arguments.schemes:
        _reset_peak(arguments.device)
        before = _allocated(arguments.device)
        try:
            model = quantise(_make(OWN, arguments.size, arguments.device, torch.bfloat16).eval(), scheme)
            model.generation_config.eos_token_id = None  # so that nothing has to keep it away
        except Exception as error:
            yield {"scheme": scheme, "failed": f"{type(error).__name__}: {error}"}
            continue
        _free(arguments.device)
        fixed = {"scheme": scheme, "memory": _allocated(arguments.device) - before, "bytes": bytes_of(model)}
        for rows in arguments.rows:
            yield _try({**fixed, "rows": rows}, _decode_row, model, rows, arguments)
        if scheme != "bfloat16" and arguments.forward:
            yield _try({**fixed, "rows": 1}, without_kernels, partial(_decode_row, model, 1, arguments, compare=False))
        model = None


@torch.no_grad()
def _decode_row(model, rows: int, arguments, compare: bool = True) -> dict:
    ids = torch.randint(10, model.config.vocab_size, (rows, 128), generator=torch.Generator().manual_seed(0))
    ids, paths = ids.to(arguments.device), []

    def watched(*given, **options):
        paths.append(decide(*given, **options))
        return paths[-1]

    def run(new: int, of=model) -> torch.Tensor:
        return of.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
                           min_new_tokens=new, pad_token_id=0)  # fmt: skip

    decode_generate.decide = watched
    try:
        begin = time.perf_counter()
        found = run(TOKENS)
        first = _now(arguments.device) - begin
    finally:
        decode_generate.decide = decide
    seconds, (short, long) = [], (arguments.new // 2, 5 * arguments.new // 2)
    for new in (short, long) * arguments.repeats:
        begin = _now(arguments.device)
        run(new)
        seconds.append(_now(arguments.device) - begin)
    times = [1e3 * (b - a) / (long - short) for a, b in zip(seconds[::2], seconds[1::2])]
    row = {"path": paths[-1].step, "ms": quantiles(times), "first_s": first}
    if paths[-1].obstacle is not None:
        row["why"] = paths[-1].obstacle.reason
    return row | (_beside_dequantised(model, found) if compare else {})


def _beside_dequantised(model, found: torch.Tensor) -> dict:
    """Of the tokens that were chosen: how many are the argmax of the scheme's own numbers in plain layers.

    margin: how far below the best the others lie, as a share of the largest logit.
    """
    logits = dequantised(model)(found[:, :-1], use_cache=False).logits[:, -TOKENS:].float()
    chosen = found[:, -TOKENS:]
    behind = logits.max(-1).values - logits.gather(-1, chosen[..., None])[..., 0]
    return {
        "same": (logits.argmax(-1) == chosen).float().mean().item(),
        "margin": (behind.max() / logits.abs().max()).item(),
    }


# QLoRA


def qlora(arguments: argparse.Namespace, output: Path) -> Iterator[dict]:
    for name in arguments.models:
        for scheme in arguments.qlora_schemes:
            try:
                model = _with_adapters(quantise(_large(name, arguments), scheme), name)
            except Exception as error:
                yield {"model": name, "scheme": scheme, "failed": f"{type(error).__name__}: {error}"}
                continue
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
            for cell in arguments.qlora_cells:
                row = {"model": name, "scheme": scheme, "batch": cell[0], "length": cell[1]}
                yield _try(row, _train_row, model, cell, arguments, optimizer)
            model = optimizer = None
            _free(arguments.device)


def _large(name: str, arguments) -> torch.nn.Module:
    """RecurrentGemma-9B's settings (8.58 billion parameters), or a Llama as wide and as deep."""
    preset = "recurrentgemma-9b" if arguments.qlora_size == "9b" else "tiny"
    config = GriffinConfig.from_preset(preset)
    if name == "llama":
        config = LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=1,
            head_dim=config.head_dim,
            tie_word_embeddings=True,
        )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(arguments.device):
            model = (LlamaForCausalLM if name == "llama" else GriffinForCausalLM)(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return model


def _with_adapters(model, name: str):
    from peft import LoraConfig, get_peft_model

    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    if name == "griffin":
        lora.target_parameters, lora.modules_to_save = LORA_TARGETS["gates"], LORA_TARGETS["decay"]
    return get_peft_model(model, lora).train()


# Training


def float8(arguments: argparse.Namespace, output: Path) -> Iterator[dict]:
    """bfloat16 as it is and with each block compiled, then both recipes; where the casts are eager too."""
    ways = [("bfloat16", False), ("bfloat16", True)]
    ways += [(recipe, compiled) for recipe in ("tensorwise", "rowwise") for compiled in (True, False)]
    for recipe, compiled in ways:
        row = {"recipe": recipe, "compiled": compiled, "batch": arguments.cell[0], "length": arguments.cell[1]}
        yield _try(row, _float8_row, recipe, compiled, arguments)
        torch.compiler.reset()


def _float8_row(recipe: str, compiled: bool, arguments) -> dict:
    model = _make(OWN, arguments.size, arguments.device, torch.bfloat16)
    if recipe != "bfloat16":
        convert(model, recipe, compiled, emulate=arguments.device == "cpu")
    elif compiled:
        compile_blocks(model)
    return _train_row(model, arguments.cell, arguments)


def _train_row(model, cell: tuple[int, int], arguments, optimizer=None) -> dict:
    """Seconds of forward and backward, and of the optimizer where there is one; the first step's apart."""
    tokens, seconds = torch.randint(0, model.config.vocab_size, cell, device=arguments.device), []
    _reset_peak(arguments.device)
    for _ in range(arguments.repeats + 2):
        begin = _now(arguments.device)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()
        seconds.append(_now(arguments.device) - begin)
    peak = torch.cuda.max_memory_allocated() if arguments.device == "cuda" else 0
    step = quantiles(seconds[2:])
    return {"first_s": seconds[0], "seconds": step, "tokens_per_second": tokens.numel() / step["median"], "peak": peak}


# Text


# What a run of text changes of the demonstration's settings.
TEXT: dict[str, dict] = {
    "cuda": {
        "config_name": "configuration/model/griffin-100m.json",
        "config_overrides": '{"vocab_size": 258}',
        "tokenizer": "bytes",
        "sequence_length": 512,
        "per_device_train_batch_size": 16,
        "learning_rate": 6e-4,
    },
    "cpu": {"use_cpu": "true"},
}


def text_runs(arguments: argparse.Namespace, output: Path) -> Iterator[dict]:
    """train.py on Python's documentation, as the demonstration; then the first run's model in every scheme."""
    from demo import topic_documents, write_documents

    train_texts, held_out = topic_documents()
    folder = (output.parent / "text").resolve()
    write_documents(folder / "train.jsonl", train_texts)
    write_documents(folder / "held_out.jsonl", held_out)
    first = arguments.seeds[0]
    runs = [*(("bfloat16", seed) for seed in arguments.seeds), ("tensorwise", first), ("rowwise", first)]
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        yield from pool.map(partial(_train_row_of_text, folder, arguments), *zip(*runs))
    for scheme in ("float32", *arguments.schemes):
        row = {"what": "quantised", "scheme": scheme}
        yield _try(row, _bits, folder / f"bfloat16-{first}", scheme, arguments)


def _train_row_of_text(folder: Path, arguments, recipe: str, seed: int) -> dict:
    row = {"what": "trained", "recipe": recipe, "seed": seed}
    return _try(row, _train_text, folder, recipe, seed, arguments)


def _train_text(folder: Path, recipe: str, seed: int, arguments) -> dict:
    target = folder / f"{recipe}-{seed}"
    settings = {
        **TEXT[arguments.device],
        **({} if arguments.config is None else {"config_name": arguments.config}),
        "train_data": folder / "train.jsonl",
        "eval_data": folder / "held_out.jsonl",
        "output_dir": target,
        "max_steps": arguments.steps,
        "warmup_steps": max(1, arguments.steps // 10),
        "seed": seed,
        "bf16": "true",
        "disable_tqdm": "true",
    }
    words = ["configuration/training/demo.yaml", *(f"--{name}={value}" for name, value in settings.items())]
    words += [] if recipe == "bfloat16" else [f"--float8={recipe}"]
    program = ["scripts/train.py"] if arguments.device == "cuda" else ["-m", "benchmarks.quantised"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")])}
    done = subprocess.run([sys.executable, *program, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:])
    metrics = json.loads((target / "metrics.json").read_text())
    names = ("parameters", "steps", "tokens_seen", "eval_tokens", "eval_loss", "bits_per_byte", "tokens_per_second")
    return {name: metrics[name] for name in names}


def _bits(source: Path, scheme: str, arguments) -> dict:
    from evaluate_text import bucket_losses, count_token_bytes, reader_of, summarize
    from training.text_data import PackedRows, load_documents, tokenize
    from training.text_tokenizer import document_ends

    tokenizer = AutoTokenizer.from_pretrained(source)
    length = json.loads((source / "metrics.json").read_text())["sequence_length"]
    dtype = torch.float32 if scheme == "float32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
    model = model.to(arguments.device).eval()
    model = quantise(model, scheme)
    documents = load_documents(str(source.parent / "held_out.jsonl"), "text", "test", None)
    rows = PackedRows(tokenize(documents, tokenizer), length, document_ends(tokenizer)[1])
    found = summarize(bucket_losses(reader_of(model, length), rows, count_token_bytes(documents, tokenizer), None))
    return {name: found[name] for name in ("tokens", "loss", "bits_per_byte")}


MEASURES = {"decode": decode, "qlora": qlora, "float8": float8, "text": text_runs}


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _reset_peak(device: str) -> None:
    _free(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# The page


def text(report: dict) -> str:
    sized = not {"decode", "float8"}.isdisjoint(report)
    title = "# Quantised weights and float8" + (f", {report['size']}" if sized else "")
    lines = [title, "", *birth_lines(report["birth"]), ""]
    for part, (title, head, cells) in TABLES.items():
        if report.get(part):
            lines += [f"## {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
            lines += [f"| {' | '.join(_cells(row, cells, len(head)))} |" for row in report[part]] + [""]
    return "\n".join(lines)


def _cells(row: dict, cells: Callable[[dict], list[str]], width: int) -> list[str]:
    if "failed" not in row:
        return cells(row)
    name = ", ".join(str(value) for key, value in row.items() if key != "failed")
    return [name, row["failed"].replace("|", "/"), *[""] * (width - 2)]


def _loss(row: dict) -> float:
    """Of a row of text, in nats a token: of its training's end, or of the quantised model."""
    return row.get("eval_loss", row.get("loss"))


def _gib(number: float) -> str:
    return f"{number / 2**30:.2f}"


TABLES = {
    "decode": (
        "Decoding, prompt of 128 tokens",
        ["weights", "rows", "step", "ms a token", "10 to 90%", "tokens/s", "memory, GiB", "bytes read, GB",
         "same tokens as dequantised", "farthest from the best logit", "first call, s"],
        lambda row: [
            row["scheme"], str(row["rows"]), row["path"], f"{row['ms']['median']:.3f}",
            f"{row['ms']['10%']:.3f} to {row['ms']['90%']:.3f}", f"{1e3 * row['rows'] / row['ms']['median']:,.0f}",
            _gib(row["memory"]), f"{row['bytes'] / 1e9:.2f}", f"{row['same']:.1%}" if "same" in row else "",
            f"{row['margin']:.1e}" if "margin" in row else "", f"{row['first_s']:.1f}",
        ],
    ),
    "qlora": (
        "QLoRA: adapters of rank 16 on all linear layers (Griffin: gates and Λ too), activation checkpointing, AdamW",
        ["model", "weights", "batch x T", "step, ms", "tokens/s", "peak, GiB"],
        lambda row: [
            row["model"], row["scheme"], f"{row['batch']} x {row['length']}", f"{row['seconds']['median'] * 1e3:.0f}",
            f"{row['tokens_per_second']:,.0f}", _gib(row["peak"]),
        ],
    ),
    "float8": (
        "Products of linear layers in float8, forward and backward",
        ["products", "blocks compiled", "batch x T", "step, ms", "tokens/s", "peak, GiB", "first step, s"],
        lambda row: [
            row["recipe"], str(row["compiled"]), f"{row['batch']} x {row['length']}",
            f"{row['seconds']['median'] * 1e3:.0f}", f"{row['tokens_per_second']:,.0f}", _gib(row["peak"]),
            f"{row['first_s']:.0f}",
        ],
    ),
    "text": (
        "A trained model on held-out text, Python's documentation",
        ["what", "products or weights", "seed", "steps", "tokens seen", "held-out tokens", "loss, nats", "perplexity",
         "bits per byte"],
        lambda row: [
            row["what"], row.get("recipe") or row["scheme"], str(row.get("seed", "")), str(row.get("steps", "")),
            f"{row['tokens_seen']:,}" if "steps" in row else "", f"{row.get('eval_tokens', row.get('tokens')):,}",
            f"{_loss(row):.4f}", f"{math.exp(_loss(row)):.3f}", f"{row['bits_per_byte']:.4f}",
        ],
    ),
}  # fmt: skip


if __name__ == "__main__":
    main()

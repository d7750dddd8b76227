"""Times generation: tokens, prompts, contexts, many generations at once, drafts. Peers are those of Transformers.

    python scripts/benchmark_generation.py --device cuda    griffin-1b3 in bfloat16
    python scripts/benchmark_generation.py --device cpu     griffin-100m in float32

Peers have random weights and about the same shape: RecurrentGemma, and a Llama with one key head. Each runs with a
dynamic cache and, where it can, compiled with a static one. What is timed is checked first: the logits of its generated
tokens must be those of one forward pass without a cache, else it is left out, and nothing is timed if it is ours.
Contestants take turns; times are quantiles over tokens of all turns. Writes OUTPUT.json, .md and .png as it goes.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmark_training import SIZES, _cell, _griffin_config
from benchmarks.birth_certificate import birth_certificate, birth_lines, quantiles, short_device_name
from benchmarks.checks import OURS, TOLERANCE, random_ids, shortfall
from benchmarks.offpath import offpath, offpath_text
from benchmarks.serving import serving, serving_text
from command_line import Parser
from presets import find_preset, preset_names
from tqdm import tqdm
from transformers import (
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer
from whole_files import in_one_step, with_ending, write_whole

from modeling_griffin import GriffinConfig, GriffinForCausalLM
from modeling_griffin.cache_name import CACHE_NAME


CONTESTANTS = [OURS, "recurrentgemma", "llama-mqa"]
ROW = 2048  # tokens of a row of training
SETTINGS = {
    "cpu": {
        "model": "configuration/model/griffin-100m.json",
        "dtype": torch.float32,
        "decode": [(1, 128), (1, 2048), (8, 128)],  # (rows, tokens of the prompt)
        "new": 32,
        "turns": 3,
        "contexts": [128, 512, 1024, 2048, 4096, 8192],
        "chunk": 2048,  # tokens of a prompt in one forward pass
        "long": 2048,
        "rows": 16,
        "generations": 200,
        "load": ((8, 128), (4, 64)),  # tokens of a prompt and of an answer, log-uniform
        "rollouts": (4, 4, 64, 32),  # prompts, completions of each, tokens of a prompt and of a completion
    },
    "cuda": {
        "model": "configuration/model/griffin-1b3.json",
        "dtype": torch.bfloat16,
        "decode": [(rows, prompt) for rows in (1, 64) for prompt in (128, 2048, 32768)],
        "new": 64,
        "turns": 5,
        "contexts": [2**k for k in range(7, 18)],
        "chunk": 16384,
        "long": 100_000,
        "rows": 64,
        "generations": 200,
        "load": ((32, 2048), (16, 512)),
        "rollouts": (16, 8, 256, 256),
    },
}
LONGEST_PROMPT_OF_A_LOOP = 2048  # RecurrentGemma in Transformers reads a prompt by a Python loop over its tokens


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_device()
    parser.add_argument(
        "--model",
        default=None,
        help="a configuration, or a size of benchmark_training.py; default: griffin-100m, on a GPU griffin-1b3",
    )
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS, help="which models")
    cells = "; ".join(f"{name}: {' '.join(f'{b}x{t}' for b, t in own['decode'])}" for name, own in SETTINGS.items())
    cells = f"rows x tokens of the prompt, to decode (default: {cells})"
    parser.add_argument("--cells", type=_cell, nargs="+", default=None, metavar="BxT", help=cells)
    turns = "; ".join(f"{name}: {own['turns']}" for name, own in SETTINGS.items())
    parser.add_argument("--turns", type=int, help=f"of each contestant at each cell (default: {turns})")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what is timed")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="compiled contestants too"
    )
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch on a CPU")
    parser.add_argument(
        "--output", type=Path, default=None, help="path without suffix; default results/generation/generation_DEVICE"
    )
    parser.add_argument("--commit", default=None, help="the commit that runs; default: as git says")
    arguments = parser.parse_args(argv)
    parser.check_least(arguments, turns=1, threads=1)
    torch.set_num_threads(arguments.threads)
    output = arguments.output or Path("results") / "generation" / f"generation_{short_device_name(arguments.device)}"
    parser.make_folder_of(output)
    settings = {**SETTINGS[arguments.device], "device": arguments.device, "compile": arguments.compile}
    settings |= {"decode": arguments.cells or settings["decode"], "turns": arguments.turns or settings["turns"]}
    if arguments.model in SIZES:
        config = _griffin_config(arguments.model)
    else:
        path = find_preset(arguments.model or settings["model"], "model")
        if not Path(path).is_file():
            parser.error(f"--model {path}: allowed are JSON files, {', '.join([*SIZES, *preset_names('model')])}")
        config = GriffinConfig.from_json_file(path)
    report = {"birth": birth_certificate(arguments.device, arguments.commit), "dtype": str(settings["dtype"])[6:]}
    models = make_models(config, settings, report, arguments.contestants)
    for part in arguments.parts:
        for _ in PARTS[part](models, settings, report) or [None]:
            write_whole(with_ending(output, ".json"), json.dumps(report, indent=1))
            write_whole(with_ending(output, ".md"), text_of(report))
        if "context" in report:
            plot(report, with_ending(output, ".png"))
    print(text_of(report))
    print(f"written: {output}.json, .md{', .png' if 'context' in report else ''}")


def make_models(config: GriffinConfig, settings: dict, report: dict, names: list[str]) -> dict[str, torch.nn.Module]:
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": 1,
        "head_dim": config.head_dim,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2**18,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    gemma = RecurrentGemmaConfig(
        **shared,
        intermediate_size=2 * config.intermediate_size,  # it counts both branches
        lru_width=config.lru_width - config.lru_width % config.num_attention_heads,  # its gates have a block a head
        attention_window_size=config.attention_window_size,
    )
    classes = {
        OURS: (GriffinForCausalLM, config),
        "recurrentgemma": (RecurrentGemmaForCausalLM, gemma),
        "llama-mqa": (LlamaForCausalLM, LlamaConfig(**shared, intermediate_size=config.intermediate_size)),
    }
    torch.manual_seed(0)
    models = {}
    for name, (cls, config) in ((name, classes[name]) for name in names):
        with torch.device(settings["device"]):
            model = cls._from_config(config, dtype=settings["dtype"]).eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.generation_config.eos_token_id = None
        models[name] = model
    report["parameters"] = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    return models


class Stamps(BaseStreamer):
    """When each token came."""

    def __init__(self):
        self.times = [time.perf_counter()]

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model: torch.nn.Module, ids: torch.Tensor, new: int, compiled: bool = False, **kwargs: Any) -> Any:
    if compiled:
        # Ours: one graph while the window fills and one when it is full. Peers by their own defaults.
        compile_config = CompileConfig(dynamic=True) if isinstance(model, GriffinForCausalLM) else CompileConfig()
        compile_config._compile_all_devices = True
        kwargs |= {"cache_implementation": "static", "compile_config": compile_config}
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        **kwargs,
    )


@torch.no_grad()
def disagreement(model: torch.nn.Module, sequences: torch.Tensor, logits: torch.Tensor) -> float:
    """Of the logits (B, N, V) of the last N tokens and those of a forward pass without a cache; of the largest one."""
    expected = model(sequences, use_cache=False).logits[:, -logits.shape[1] - 1 : -1].float()
    error = ((logits.float() - expected).abs().max() / expected.abs().max()).item()
    return error if error == error else float("inf")


def check(name: str, model: torch.nn.Module, compiled: bool, rows: int) -> float:
    """The disagreement of generated logits; SystemExit if it is ours and too large."""
    ids = random_ids(model, rows, 40, seed=1)
    found = generate(model, ids, 8, compiled, output_logits=True, return_dict_in_generate=True)
    error = disagreement(model, found.sequences, torch.stack(found.logits, dim=1))
    if error > TOLERANCE[model.dtype] and name == OURS:
        raise SystemExit(f"{name}: logits differ by {error:.1e} from those without a cache: nothing is timed")
    return error


def check_plain(model: torch.nn.Module, rows: int) -> float:
    ids = random_ids(model, rows, 40, seed=1)
    return shortfall(OURS, model, generate(model, ids, 8), ids.shape[1])


def unwatched(model: torch.nn.Module, rows: int, prompt: int, settings: dict) -> float:
    """Seconds a token, the difference of a long and a short generation, without the streamer that stamps each token."""
    ids, new, seconds = random_ids(model, rows, prompt), settings["new"], []
    for tokens in (new, 5 * new) * 3:
        begin = _now(settings["device"])
        generate(model, ids, tokens)
        seconds.append(_now(settings["device"]) - begin)
    return statistics.median(long - short for short, long in zip(seconds[::2], seconds[1::2])) / (4 * new)


def decode(models: dict[str, torch.nn.Module], settings: dict, report: dict) -> Iterator[None]:
    """Milliseconds a token, the time to the first one, and of the first call. Yields after each check and cell."""
    contestants, report["checks"], report["first_call_seconds"], report["decode"] = {}, {}, {}, []
    rows = settings["decode"][0][0]  # of the checks: other rows could be compiled anew
    for name, model in models.items():
        may_compile = settings["compile"] and not (name == OURS and settings["device"] == "cuda")  # it records a step
        for compiled in [False, True] if may_compile else [False]:
            label = f"{name}, compiled" if compiled else name
            if compiled:  # apart: RecurrentGemma keeps its state in its layers, where a failed run leaves its own
                model = copy.deepcopy(model)
            try:
                begin = time.perf_counter()
                if name == OURS and not compiled:  # what is asked for logits takes Transformers' loop
                    report["checks"][f"{OURS}, tokens below the argmax"] = check_plain(model, rows)
                    report["first_call_seconds"][label] = time.perf_counter() - begin
                error = check(name, model, compiled, rows)
                report["first_call_seconds"].setdefault(label, time.perf_counter() - begin)
                report["checks"][label] = error
                if error <= TOLERANCE[model.dtype]:
                    contestants[label] = (model, compiled)
            except Exception as error:  # a peer may fail in many ways; ours must not
                if name == OURS:
                    raise
                report["checks"][label] = f"fails: {str(error).strip().splitlines()[0].split('. ')[0][:120]}"
            yield
    for rows, prompt in settings["decode"]:
        steps, first = {label: [] for label in contestants}, {label: [] for label in contestants}
        for _ in tqdm(range(settings["turns"] + 1), desc=f"{rows} rows, prompt {prompt}"):  # the first warms up
            for label, (model, compiled) in list(contestants.items()):
                if label.startswith("recurrentgemma") and prompt > LONGEST_PROMPT_OF_A_LOOP:
                    continue
                stamps = Stamps()
                try:
                    generate(model, random_ids(model, rows, prompt), settings["new"], compiled, streamer=stamps)
                except torch.OutOfMemoryError:
                    continue
                times = stamps.times[1:]  # the prompt itself is the first to be put
                first[label].append(times[1] - times[0])
                steps[label].append([after - before for before, after in zip(times[1:], times[2:])])
        for label in contestants:
            if steps[label][1:]:
                tokens = [step for turn in steps[label][1:] for step in turn]
                row = {"contestant": label, "rows": rows, "prompt": prompt, **milliseconds(tokens)}
                row["first_token_s"] = statistics.median(first[label][1:])
                if label == OURS:
                    row["unwatched_s"] = unwatched(models[OURS], rows, prompt, settings)
                report["decode"].append(row)
        yield


def context(models: dict[str, torch.nn.Module], settings: dict, report: dict) -> None:
    """Plain `generate` behind prompts of any length, read in chunks: time and memory against the context."""
    report["context"] = []
    for length in tqdm(settings["contexts"], desc="contexts"):
        for name in (name for name in (OURS, "llama-mqa") if name in models):
            model, stamps = models[name], Stamps()
            cache = DynamicCache(config=model.config) if name != OURS else None
            _free(settings["device"])
            try:
                generate(
                    model,
                    random_ids(model, 1, length),
                    settings["new"],
                    streamer=stamps,
                    prefill_chunk_size=settings["chunk"],
                    **({} if cache is None else {CACHE_NAME: cache}),
                )
            except torch.OutOfMemoryError:
                continue
            times = stamps.times[1:]  # the prompt itself is the first to be put
            steps = [after - before for before, after in zip(times[1:], times[2:])]
            row = {"contestant": name, "context": length, **milliseconds(steps[2:])}
            row |= {"prefill_tokens_per_s": length / (times[1] - times[0])}
            row |= {"cache_bytes": state_bytes(model, length) if cache is None else cache_bytes(cache)}
            if settings["device"] == "cuda":
                row["peak_bytes"] = torch.cuda.max_memory_allocated()
            report["context"].append(row)
    report["chunk"] = settings["chunk"]
    report["forward_tokens_per_s"] = forward_rate(models[OURS], settings["device"])


@torch.no_grad()
def state_bytes(model: torch.nn.Module, length: int) -> int:
    """What is kept of a text: the same for every length that fills the attention window."""
    text = random_ids(model, 1, min(length, model.config.attention_window_size))
    return sum(tensor.nbytes for pair in model.prefill(text).layers for tensor in pair)


@torch.no_grad()
def forward_rate(model: torch.nn.Module, device: str) -> float:
    """Tokens a second of the forward pass of training, on rows of ROW tokens, as many as a large prompt has."""
    ids, seconds = random_ids(model, 8 if device == "cuda" else 1, ROW), []
    for _ in range(4):  # the first warms up
        begin = _now(device)
        model(ids, use_cache=False, labels=ids)
        seconds.append(_now(device) - begin)
    return ids.numel() / statistics.median(seconds[1:])


class MemoryStamps(Stamps):
    """And what a GPU holds, every thousand tokens."""

    def __init__(self):
        super().__init__()
        self.memory = []

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if torch.cuda.is_available() and len(self.times) % 1000 == 0:
            self.memory.append(torch.cuda.memory_allocated())


def long(models: dict[str, torch.nn.Module], settings: dict, report: dict) -> None:
    """One generation of many tokens: time a token and memory as it grows."""
    model, stamps = models[OURS], MemoryStamps()
    on_gpu = settings["device"] == "cuda"
    cache = None if on_gpu else DynamicCache(config=model.config)  # a GPU's recorded step has a state of its own
    _free(settings["device"])
    generate(
        model,
        random_ids(model, 1, 8),
        settings["long"],
        streamer=stamps,
        **({} if on_gpu else {CACHE_NAME: cache}),
    )
    steps = [after - before for before, after in zip(stamps.times[2:], stamps.times[3:])]
    tenth = len(steps) // 10
    report["long"] = {
        "tokens": settings["long"],
        "cache_bytes": state_bytes(model, model.config.attention_window_size) if on_gpu else cache_bytes(cache),
        "tenths": [milliseconds(steps[i * tenth : (i + 1) * tenth]) for i in range(10)],
        "memory": stamps.memory,
    }


def drafts(models: dict[str, torch.nn.Module], settings: dict, report: dict) -> None:
    """Prompt lookup against plain decoding, where the text repeats itself and where no draft is ever right."""
    device, new = settings["device"], 4 * settings["new"]
    fitted, refrain = _fitted_to_a_refrain(models[OURS])
    report["drafts"] = []
    for name, model, ids in (
        ("with a refrain", fitted, refrain),
        ("random", models[OURS], random_ids(models[OURS], 1, 128, seed=3)),
    ):
        expected = generate(model, ids, new)
        stamps = Stamps()
        found = generate(model, ids, new, prompt_lookup_num_tokens=8, streamer=stamps)
        passes = len(stamps.times[2:])  # behind the prompt: a hook on the model would keep it from the recorded steps
        shortfall("prompt lookup", model, found, ids.shape[1])
        if model.dtype == torch.float32 and not torch.equal(found, expected):
            raise SystemExit("prompt lookup finds other tokens than greedy decoding: nothing is timed")
        seconds = {"plain": [], "prompt lookup": []}
        for _ in range(settings["turns"]):
            for label, number in (("plain", None), ("prompt lookup", 8)):
                begin = _now(device)
                generate(model, ids, new, prompt_lookup_num_tokens=number)
                seconds[label].append((_now(device) - begin) / new)
        row = {"text": name, "tokens_a_pass": new / passes}
        report["drafts"].append({**row, **{label: milliseconds(each) for label, each in seconds.items()}})


@torch.enable_grad()
def _fitted_to_a_refrain(model, steps: int = 40):
    """A copy that has learnt 24 tokens which return after every 8 others, and a text that begins like that."""
    fitted = copy.deepcopy(model).float().train().requires_grad_(True)
    optimizer = torch.optim.AdamW(fitted.parameters(), lr=5e-4)
    refrain = random_ids(model, 1, 24, seed=5)
    for step in tqdm(range(steps), desc="learning a refrain"):
        verses = [random_ids(model, 2, 8, seed=8 * step + verse) for verse in range(4)]
        text = torch.cat([part for verse in verses for part in (refrain.expand(2, -1), verse)], dim=1)
        fitted(text, labels=text, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(fitted.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return fitted.to(model.dtype).eval().requires_grad_(False), text[:1]


PARTS = {"decode": decode, "context": context, "long": long, "serving": serving, "drafts": drafts, "offpath": offpath}


def milliseconds(seconds: list[float]) -> dict[str, float]:
    return {f"{name}_ms": value * 1e3 for name, value in quantiles(seconds).items()}


def cache_bytes(cache: Cache) -> int:
    """Whole storages, once each, not views of them."""
    tensors = []
    for layer in cache.layers:
        states = [layer.conv_states, layer.recurrent_states] if hasattr(layer, "conv_states") else []
        tensors += [t for each in states for t in each.values()] or [layer.keys, layer.values]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _free(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# Reports


def text_of(report: dict) -> str:
    sizes = ", ".join(f"{name} {number / 1e6:.0f}M" for name, number in report["parameters"].items())
    lines = ["# Generation", "", *birth_lines(report["birth"]), "", f"Parameters: {sizes}; {report['dtype']}, greedy."]
    for part, write in TEXTS.items():
        if part in report:
            lines += ["", *write(report)]
    return "\n".join(lines) + "\n"


def _span(row: dict) -> str:
    return f"{row['median_ms']:.2f} | {row['10%_ms']:.2f} | {row['90%_ms']:.2f}"


def _decode_text(report) -> list[str]:
    lines = [
        "## A token, and the first one",
        "",
        "Logits against those without a cache, error as a share of the largest:",
    ]
    lines += [f"- {name}: {e if isinstance(e, str) else f'{e:.1e}'}" for name, e in report["checks"].items()]
    lines += [
        "",
        "| rows | prompt | | ms a token, median | 10% | 90% | first token, s | without a streamer, ms | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["decode"]:
        name, seconds = row["contestant"], row.get("unwatched_s")
        alone = f"{seconds * 1e3:.3f} | {row['rows'] / seconds:,.0f}" if seconds else " | "
        span = f"{_span(row)} | {row['first_token_s']:.2f}"
        lines.append(f"| {row['rows']} | {row['prompt']} | {name} | {span} | {alone} |")
    lines += ["", "Without a streamer, which stamps each token: by the difference of two lengths."]
    calls = ", ".join(f"{name} {s:.1f} s" for name, s in report["first_call_seconds"].items())
    return [*lines, "", f"First call of all, 8 tokens, compilation included: {calls}."]


def _context_text(report) -> list[str]:
    lines = [f"## Against the context (1 row, plain generate, prompts read {report['chunk']} tokens at a time)", ""]
    lines += [
        "| context | | ms a token, median | 10% | 90% | kept, MB | peak, GiB | prompt, tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["context"]:
        peak = f"{row['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in row else ""
        numbers = f"{row['cache_bytes'] / 1e6:.2f} | {peak} | {row['prefill_tokens_per_s']:,.0f}"
        lines.append(f"| {row['context']} | {row['contestant']} | {_span(row)} | {numbers} |")
    rate = report["forward_tokens_per_s"]
    longest = max((row for row in report["context"] if row["contestant"] == OURS), key=lambda row: row["context"])
    share = longest["prefill_tokens_per_s"] / rate
    return [
        *lines,
        "",
        "Kept: the state of a text, or the cache; peak: with weights and all models loaded. The forward pass of",
        f"training reads {rate:,.0f} tokens/s (rows of {ROW}); {OURS}'s prompt of {longest['context']} tokens has",
        f"{share:.0%} of that speed.",
    ]


def _long_text(report) -> list[str]:
    run, memory = report["long"], ""
    medians = ", ".join(f"{tenth['median_ms']:.2f}" for tenth in run["tenths"])
    if run["memory"]:
        least, most = (bound(run["memory"]) / 2**30 for bound in (min, max))
        memory = f" Allocated on the GPU, weights included, at every thousandth token: {least:.3f} to {most:.3f} GiB."
    return [
        f"## One generation of {run['tokens']} tokens",
        "",
        f"Median ms a token in each tenth of it: {medians}. Kept: {run['cache_bytes'] / 1e6:.2f} MB.{memory}",
    ]


def _drafts_text(report) -> list[str]:
    lines = [
        "## Drafts of 8 tokens by prompt lookup",
        "",
        "The tokens are those of greedy decoding, in 16 bits up to ties. The text with a refrain is that of a copy",
        "fitted to one.",
        "",
    ]
    lines += ["| text | tokens a forward pass | ms a token, plain | with drafts | times faster |", "|---" * 5 + "|"]
    for row in report["drafts"]:
        plain, drafted = row["plain"]["median_ms"], row["prompt lookup"]["median_ms"]
        lines.append(
            f"| {row['text']} | {row['tokens_a_pass']:.1f} | {plain:.2f} | {drafted:.2f} | {plain / drafted:.2f} |"
        )
    return lines


TEXTS = dict(
    zip(PARTS, (_decode_text, _context_text, _long_text, serving_text, _drafts_text, offpath_text), strict=True)
)


def plot(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (speed, memory) = plt.subplots(1, 2, figsize=(9, 3.6))
    for name in dict.fromkeys(row["contestant"] for row in report["context"]):
        rows = [row for row in report["context"] if row["contestant"] == name]
        lengths = [row["context"] for row in rows]
        speed.semilogx(lengths, [1e3 / row["median_ms"] for row in rows], "o-", label=name)
        memory.loglog(lengths, [row["cache_bytes"] / 1e6 for row in rows], "o-", label=name)
    speed.set(xlabel="context (tokens)", ylabel="tokens/s, 1 row", ylim=(0, None))
    memory.set(xlabel="context (tokens)", ylabel="cache (MB)")
    speed.legend(fontsize=8)
    figure.suptitle(f"{report['dtype']}, {report['birth']['hardware']}", fontsize=10)
    figure.tight_layout()
    with in_one_step(path) as half:
        figure.savefig(half, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()

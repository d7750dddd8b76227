"""Trains one small Griffin twice, from one seed on the same text: by the fast path of a GPU, and by the definitions.

    python scripts/compare_paths.py --device cuda

The definitions are the loop over time, the mask of all pairs, and every operation by itself; both run under bfloat16
autocast, so that the curves part only by rounding. A third run, the fast path with another seed, shows what a seed is
worth. Writes OUTPUT.json and OUTPUT.png: the loss of every step, held-out bits per byte at the end.
"""

import argparse
import contextlib
import json
import math
import pydoc_data.topics
import statistics
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from benchmarks.birth_certificate import birth_certificate, short_device_name
from command_line import Parser
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup
from whole_files import in_one_step, with_ending, write_whole

from modeling_griffin import GriffinConfig, GriffinForCausalLM, decay_parameter_names, rg_lru
from modeling_griffin.kernels import dispatch, flash_attention


BYTES = 256


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_device()
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument("--rows", type=int, default=64, help="rows of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens in a row")
    parser.add_argument("--width", type=int, default=256, help="of the model")
    parser.add_argument("--output", type=Path, default=None, help="path without suffix")
    parser.add_argument("--commit", default=None, help="the commit that runs, for a copy without its git history")
    arguments = parser.parse_args(argv)
    output = arguments.output or Path("results") / "training" / f"convergence_{short_device_name(arguments.device)}"
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {"birth": birth_certificate(arguments.device, arguments.commit)}
    report |= {"settings": {key: getattr(arguments, key) for key in ("steps", "rows", "length", "width")}, "runs": {}}
    for name, path, seed in (("fast", fast, 0), ("definitions", definitions, 0), ("fast, another seed", fast, 1)):
        with path() as attention:
            report["runs"][name] = train(arguments, attention, seed, name)
    report["differences"] = differences(report["runs"])
    write_whole(with_ending(output, ".json"), json.dumps(report, indent=1))
    plot(report, with_ending(output, ".png"))
    print(json.dumps(report["differences"], indent=1))


@contextlib.contextmanager
def fast() -> Iterator[str]:
    yield "sdpa"


@contextlib.contextmanager
def definitions() -> Iterator[str]:
    """Without kernels, without compiled chains, with the loop over time; attention by eager operations."""
    scan = rg_lru.rg_lru_scan

    def loop(*inputs, **options):
        return scan(*inputs, **{**options, "backend": "reference"})

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(rg_lru, "rg_lru_scan", loop))
        stack.enter_context(
            mock.patch.object(flash_attention, "flash_unavailable_reason", lambda *inputs: "by definition")
        )
        stack.enter_context(mock.patch.object(dispatch, "pays", lambda *tensors: False))
        yield "eager"


def texts(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the text of Python's documentation: to train on, and the last tenth, held out."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)).encode()
    tokens = torch.tensor(list(text), device=device)
    return tokens.tensor_split([len(tokens) * 9 // 10])


def batch(text: torch.Tensor, arguments: argparse.Namespace, generator: torch.Generator) -> torch.Tensor:
    """(rows, length) of it, from random places."""
    starts = torch.randint(len(text) - arguments.length, (arguments.rows, 1), generator=generator).to(text.device)
    return text[starts + torch.arange(arguments.length, device=text.device)]


def train(arguments: argparse.Namespace, attention: str, seed: int, name: str) -> dict:
    torch.manual_seed(seed)
    config = GriffinConfig(
        vocab_size=BYTES,
        hidden_size=arguments.width,
        num_hidden_layers=6,
        num_attention_heads=4,
        attention_window_size=min(64, arguments.length // 2),
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GriffinForCausalLM._from_config(config, attn_implementation=attention).to(arguments.device)
    decayed = set(decay_parameter_names(model))
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in decayed) is decays], "weight_decay": amount}
        for decays, amount in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, arguments.steps // 20), arguments.steps)
    text, held_out = texts(arguments.device)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in tqdm(range(arguments.steps), desc=name):
        loss = loss_of(model, batch(text, arguments, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    with torch.no_grad():
        held = torch.stack([loss_of(model, batch(held_out, arguments, generator)) for _ in range(8)]).mean()
    return {"losses": torch.stack(losses).tolist(), "bits_per_byte": held.item() / math.log(2)}


def loss_of(model: GriffinForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    with torch.autocast(tokens.device.type, torch.bfloat16):
        return model(tokens, labels=tokens, use_cache=False).loss


def differences(runs: dict[str, dict]) -> dict[str, dict]:
    """Of each other run from the fast one: of losses step by step, of the last tenth's mean, of held-out text."""
    found, first = {}, runs["fast"]
    for name in list(runs)[1:]:
        apart = [abs(a - b) for a, b in zip(first["losses"], runs[name]["losses"])]
        tenth = max(1, len(apart) // 10)
        ends = [statistics.mean(run["losses"][-tenth:]) for run in (first, runs[name])]
        found[name] = {
            "mean": statistics.mean(apart),
            "largest": max(apart),
            "last tenth": abs(ends[0] - ends[1]),
            "bits per byte": abs(first["bits_per_byte"] - runs[name]["bits_per_byte"]),
        }
    return found


def plot(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    for (name, run), style in zip(report["runs"].items(), ("-", "--", ":")):
        axis.plot(run["losses"], style, label=f"{name}: {run['bits_per_byte']:.3f} bits per byte held out", linewidth=1)
    axis.set(xlabel="step", ylabel="loss (nats a byte)")
    axis.legend(fontsize=8)
    figure.suptitle(f"One seed by two paths, {report['birth']['hardware']}", fontsize=10)
    figure.tight_layout()
    with in_one_step(path) as half:
        figure.savefig(half, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()

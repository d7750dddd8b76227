"""Times drafts of an assistant on a GPU, beside greedy decoding, where all, most or none of the drafts are right.

    python scripts/time_assistant_on_gpu.py                2.1B parameters, bfloat16, an assistant of three layers

Weights are random, and which drafts are right is arranged. Behind its first layers the model adds nothing: what these
would add is multiplied by 0. The assistant is those first layers, so its drafts are right. Then a share of the
vocabulary exchanges its rows in the assistant's head, and drafts of these tokens are wrong. What a step costs depends
on neither. All ways in turn, in rounds, of which the first makes the steps and is not timed; seconds are those of a
generation with its prompt. Every token must be as likely as the likeliest. Writes OUTPUT.json and OUTPUT.md after every
round.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmark_training import PRESETS, SIZES, config_of
from benchmarks.birth_certificate import birth_certificate, birth_lines, short_device_name
from benchmarks.checks import random_ids, shortfall
from command_line import Parser
from time_assistant import watched
from whole_files import with_ending, write_whole

from modeling_griffin import GriffinConfig, GriffinForCausalLM


PROMPT = 128


class Way(NamedTuple):
    """drafts: a pass; 0 is greedy decoding. wrong: the share of the vocabulary whose drafts are wrong."""

    drafts: int
    wrong: float


WAYS = [Way(0, 0.0), *(Way(drafts, wrong) for wrong in (0.0, 0.2, 1.0) for drafts in (4, 8))]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__.splitlines()[0])
    parser.add_device()
    parser.add_argument("--size", choices=[*SIZES, *PRESETS], default="2b", help="of the model")
    parser.add_argument("--layers", type=int, default=3, help="of the assistant")
    parser.add_argument("--new", type=int, default=256, help="tokens of a generation")
    parser.add_argument("--prompts", type=int, default=2, help="generations of each way in a round")
    parser.add_argument("--rounds", type=int, default=3, help="that are timed")
    parser.add_argument("--output", type=Path, default=None, help="path without suffix")
    parser.add_argument("--commit", default=None, help="the commit that runs, for a copy without its git history")
    arguments = parser.parse_args(argv)
    parser.check_least(arguments, layers=1, new=1, prompts=1, rounds=1)
    output = arguments.output or Path("results/generation") / f"assistant_{short_device_name(arguments.device)}"
    parser.make_folder_of(output)
    model, right = pair(config_of(arguments.size), arguments.layers, arguments.device)
    assistants = {wrong: mistaken(right, wrong) for wrong in dict.fromkeys(way.wrong for way in WAYS)}
    report: dict[str, Any] = {"birth": birth_certificate(arguments.device, arguments.commit), "asked": asked(arguments)}
    report |= {"parameters": [sum(p.numel() for p in each.parameters()) for each in (model, right)]}
    report["rows"] = [{**way._asdict(), "seconds": [], "pass": None} for way in WAYS]
    for number in range(1 + arguments.rounds):
        for way, row in zip(WAYS, report["rows"]):
            seconds, size = generations(way, model, assistants[way.wrong], arguments)
            row["seconds"] += seconds if number else []
            row["pass"] = size
        if number:
            write_whole(with_ending(output, ".json"), json.dumps(report, indent=1))
            write_whole(with_ending(output, ".md"), text(report))
    print(text(report), end="")


def asked(arguments: argparse.Namespace) -> dict:
    return {name: getattr(arguments, name) for name in ("size", "layers", "new", "prompts", "rounds")}


@torch.no_grad()
def pair(config: GriffinConfig, layers: int, device: str) -> tuple[GriffinForCausalLM, GriffinForCausalLM]:
    """A model that adds nothing behind its first layers, and one of these alone.

    Each with a head of its own: one tied with the embedding would choose the token that it reads, and all would agree.
    """
    model = make(config, config.num_hidden_layers, device)
    for layer in model.model.layers[layers:]:
        temporal = layer.temporal_block
        for last in (getattr(temporal, "linear_out", None) or temporal.o_proj, layer.mlp_block.down_proj):
            last.weight.zero_()
            last.bias.zero_()
    assistant, held = make(config, layers, device), model.state_dict()
    assistant.load_state_dict({name: held[name] for name in assistant.state_dict()})
    return model, assistant


def make(config: GriffinConfig, layers: int, device: str) -> GriffinForCausalLM:
    changed = {"num_hidden_layers": layers, "layer_types": config.layer_types[:layers], "tie_word_embeddings": False}
    torch.manual_seed(0)
    with torch.device(device):
        model = GriffinForCausalLM._from_config(GriffinConfig(**{**config.to_dict(), **changed}), dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


@torch.no_grad()
def mistaken(assistant: GriffinForCausalLM, share: float) -> GriffinForCausalLM:
    """A copy that chooses other tokens where the right one is of this share of the vocabulary."""
    copied = copy.deepcopy(assistant)
    rows = copied.lm_head.weight
    some = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: round(share * len(rows))]
    some = some.to(rows.device)
    rows[some] = rows[some.roll(1)]
    return copied


def generations(
    way: Way, model: GriffinForCausalLM, assistant: GriffinForCausalLM, arguments: argparse.Namespace
) -> tuple[list[float], float | None]:
    """Seconds a token of each prompt, and tokens a pass with drafts."""
    fields, sizes, seconds = {}, [], []
    if way.drafts:
        assistant.generation_config.num_assistant_tokens = way.drafts
        assistant.generation_config.assistant_confidence_threshold = 0.0  # of random weights none is sure
        fields = {"assistant_model": assistant}
    with watched(sizes):
        for prompt in range(arguments.prompts):
            ids = random_ids(model, 1, PROMPT, seed=prompt)
            begin = time.perf_counter()
            found = model.generate(ids, max_new_tokens=arguments.new, do_sample=False, pad_token_id=0, **fields)
            found.tolist()  # when they are here
            seconds.append((time.perf_counter() - begin) / arguments.new)
            shortfall(f"{way.drafts} drafts", model, found, PROMPT)
    return seconds, statistics.mean(sizes) if sizes else None


def text(report: dict) -> str:
    asked, (whole, part) = report["asked"], report["parameters"]
    lines = [f"# Drafts of an assistant, {asked['size']}", "", *birth_lines(report["birth"]), ""]
    lines += [
        f"model: {whole / 1e9:.2f} billion parameters; assistant: its first {asked['layers']} layers, "
        f"{part / 1e9:.2f} billion. bfloat16, random weights,",
        "behind these layers 0; drafts of a share of the vocabulary are made wrong. One row, a prompt of "
        f"{PROMPT} tokens, {asked['new']} new",
        f"ones; the median, least and most over {asked['prompts']} prompts in each round.",
        "",
        "| drafts a pass | vocabulary with wrong drafts | ms a token | times faster than greedy | tokens a pass |",
        "|---|---|---|---|---|",
    ]
    plain = statistics.median(report["rows"][0]["seconds"])
    for row in report["rows"]:
        middle, least, most = (of(row["seconds"]) for of in (statistics.median, min, max))
        share = f"{row['wrong']:.0%}" if row["drafts"] else ""
        size = "" if row["pass"] is None else f"{row['pass']:.2f}"
        span = f"{middle * 1e3:.3f} ({least * 1e3:.3f}, {most * 1e3:.3f})"
        lines.append(f"| {row['drafts'] or 'greedy'} | {share} | {span} | {plain / middle:.2f} | {size} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Times drafts of an assistant on a CPU, with a pair of small models that are trained first, on the same text.

    PYTHONPATH=. python scripts/time_assistant.py                  minutes

The text is Python's own documentation, as bytes; prompts are from a part that the models were not trained on. Each way
finds the tokens of greedy decoding, which is checked. Times are the thread's own, so that other processes disturb
little: of a generation with its prompt, over its new tokens. Writes OUTPUT.md.
"""

import statistics
import time
from contextlib import AbstractContextManager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from unittest import mock

import torch
from benchmarks.birth_certificate import birth_certificate, birth_lines
from command_line import Parser, ShowDefaultsAndLines
from whole_files import with_ending, write_whole

from modeling_griffin import GriffinConfig, GriffinForCausalLM
from modeling_griffin.decode.speculative.verify import VerifyStep


BYTES = {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None, "attention_window_size": 64}
TARGET = {**BYTES, "hidden_size": 192, "num_hidden_layers": 9, "num_attention_heads": 3}
ASSISTANT = {**BYTES, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3}
ROWS, LENGTH, RATE = 4, 128, 4e-3  # of training
PROMPT, NEW, PROMPTS, ROUNDS = 100, 80, 3, 5
# Name, devices of recorded steps, drafts, and the share below which the assistant is unsure.
WAYS = [
    ("greedy decoding", ("cpu",), None, None),
    *((f"{drafts} drafts", ("cpu",), drafts, 0.0) for drafts in (4, 8)),
    ("8 drafts, up to an unsure one", ("cpu",), 8, 0.4),
    ("Transformers' loop, greedy", (), None, None),
    ("Transformers' loop, 4 drafts", (), 4, 0.0),
]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__, formatter_class=ShowDefaultsAndLines)
    parser.add_argument("--steps", type=int, default=120, metavar="N", help="of training, for each model")
    parser.add_argument("--output", default="results/generation/assistant_cpu", metavar="OUTPUT", help="no suffix")
    parser.add_argument("--commit", default=None, help="for a copy without its git history")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    text = torch.tensor([*"\n\n".join(topics[name] for name in sorted(topics)).encode()])
    training, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    target, assistant = (trained(fields, training, options.steps) for fields in (TARGET, ASSISTANT))
    rows = timed(target, assistant, held_out.unfold(0, PROMPT, len(held_out) // (PROMPTS + 1))[:PROMPTS])
    lines = ["# Drafts of an assistant", "", *birth_lines(birth_certificate("cpu", options.commit)), ""]
    models = {"model": target, "assistant": assistant}
    facts = {name: (sum(p.numel() for p in each.parameters()), bits(each, held_out)) for name, each in models.items()}
    lines += text_of(rows, options.steps, facts)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    write_whole(with_ending(options.output, ".md"), "\n".join(lines) + "\n")
    print("\n".join(lines))


def trained(fields: dict, text: torch.Tensor, steps: int) -> GriffinForCausalLM:
    torch.manual_seed(0)
    model = GriffinForCausalLM._from_config(GriffinConfig(**fields), attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(2, steps))
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH, (ROWS,))
        ids = torch.stack([text[start : start + LENGTH] for start in starts])
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def bits(model: GriffinForCausalLM, text: torch.Tensor) -> float:
    """A byte."""
    ids = text[: 8 * LENGTH].view(8, LENGTH)
    return model(ids, labels=ids).loss.item() / torch.log(torch.tensor(2.0)).item()


def timed(target: GriffinForCausalLM, assistant: GriffinForCausalLM, prompts: torch.Tensor) -> list[tuple]:
    """For each way: its name, milliseconds a token of each prompt, and tokens a pass, or None.

    In rounds, all ways in turn, of which the first makes the steps: a machine that others use is not as fast all along.
    """
    expected = [generate(target, prompt) for prompt in prompts]
    least, sizes = [[float("inf")] * len(prompts) for _ in WAYS], [[] for _ in WAYS]
    for number in range(1 + ROUNDS):
        for way, best, passes in zip(WAYS, least, sizes):
            passes.clear()
            seconds = time_way(way, target, assistant, prompts, expected, passes)
            if number > 0:
                best[:] = map(min, best, seconds)
    return [
        (way[0], [each * 1e3 / NEW for each in best], statistics.mean(passes) if passes else None)
        for way, best, passes in zip(WAYS, least, sizes)
    ]


def time_way(
    way: tuple,
    target: GriffinForCausalLM,
    assistant: GriffinForCausalLM,
    prompts: torch.Tensor,
    expected: list[torch.Tensor],
    sizes: list[int],
) -> list[float]:
    """Seconds of each prompt; RuntimeError where the tokens are others than `expected`. sizes: of the passes."""
    name, devices, drafts, threshold = way
    assistant.generation_config.num_assistant_tokens = drafts
    assistant.generation_config.assistant_confidence_threshold = threshold
    fields, seconds = {} if drafts is None else {"assistant_model": assistant}, []
    with mock.patch.object(GriffinForCausalLM, "_fast_generation_devices", devices), watched(sizes):
        for number, prompt in enumerate(prompts):
            begin = time.thread_time()
            found = generate(target, prompt, **fields)
            seconds.append(time.thread_time() - begin)
            if not torch.equal(found, expected[number]):
                raise RuntimeError(f"{name}: prompt {number} has other tokens than greedy decoding")
    return seconds


def generate(model: GriffinForCausalLM, prompt: torch.Tensor, **fields: Any) -> torch.Tensor:
    return model.generate(prompt[None], max_new_tokens=NEW, do_sample=False, pad_token_id=0, **fields)


def watched(sizes: list[int]) -> AbstractContextManager:
    """Puts the number of new tokens of each pass there."""
    read = VerifyStep.read

    def reading(verify, *arguments):
        new = read(verify, *arguments)
        sizes.append(len(new))
        return new

    return mock.patch.object(VerifyStep, "read", reading)


def text_of(rows: list[tuple], steps: int, models: dict) -> list[str]:
    """models: by name, each with its parameters and its bits a byte of the text that it has not seen."""
    sizes = "; ".join(
        f"{name}: {number / 1e6:.2f} million parameters, {loss:.2f} bits a byte"
        for name, (number, loss) in models.items()
    )
    plain = statistics.median(rows[0][1])
    return [
        f"{sizes}. Trained for {steps} steps of {ROWS} rows of {LENGTH} bytes; float32, one thread, {PROMPTS} prompts",
        f"of {PROMPT} bytes that were not in training, {NEW} new ones. Milliseconds of the processor a token: the",
        f"median over prompts, the least and the most, of each prompt the least of {ROUNDS} rounds.",
        "",
        "| way | ms a token | times faster than greedy decoding | tokens a pass |",
        "|---|---|---|---|",
        *(
            f"| {name} | {statistics.median(each):.2f} ({min(each):.2f}, {max(each):.2f}) | "
            f"{plain / statistics.median(each):.2f} | {'' if size is None else f'{size:.2f}'} |"
            for name, each, size in rows
        ),
    ]


if __name__ == "__main__":
    main()

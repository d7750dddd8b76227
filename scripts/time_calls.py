"""Whether memory and speed stay flat over thousands of calls of generation, of all kinds in turn, in one process.

    PYTHONPATH=. python scripts/time_calls.py                      2,000 calls of a small model on a CPU

Every call is of another kind and length than the one before: greedy decoding, sampling, beams, a logits processor of
one's own, scores, drafts, batches, streams that are read to their end or left, states. Noted are the memory of the
process, the tensors that are alive, and how long the calls take, by the thread's own clock, so that other processes
disturb little. Also timed is the look at the model that each step of a stream costs, at the size of a large one. Writes
OUTPUT.md.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.birth_certificate import birth_certificate, birth_lines
from command_line import Parser, ShowDefaultsAndLines
from presets import find_preset
from whole_files import with_ending, write_whole

from modeling_griffin import GenerationRequest, GriffinConfig, GriffinForCausalLM
from modeling_griffin.serving.watch import Watch


SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_gate_blocks": 2,
    "attention_window_size": 8,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
LARGE = "configuration/model/recurrentgemma-2b.json"  # for the look at a model, on tensors without memory
LOOKS = 500
PROMPTS, ANSWERS = 20, 5  # lengths of each, in turn


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__, formatter_class=ShowDefaultsAndLines)
    parser.add_argument("--calls", type=int, default=2000, metavar="N", help="calls that are noted")
    parser.add_argument("--warm_up", type=int, default=300, metavar="N", help="calls before them")
    parser.add_argument("--output", default="results/generation/calls_cpu", metavar="OUTPUT", help="without a suffix")
    parser.add_argument("--commit", default=None, help="for a copy without its git history")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    notes = run_calls(options.calls, options.warm_up)
    lines = ["# Calls one after another", "", *birth_lines(birth_certificate("cpu", options.commit)), ""]
    lines += [*text_of(notes, options.warm_up), *text_of_looks(time_looks())]
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    write_whole(with_ending(options.output, ".md"), "\n".join(lines) + "\n")
    print("\n".join(lines))


def small_model() -> GriffinForCausalLM:
    torch.manual_seed(0)
    return GriffinForCausalLM._from_config(GriffinConfig(**SIZES), attn_implementation="sdpa").eval()


def kinds_of_calls(model: GriffinForCausalLM) -> dict[str, Callable]:
    """By name: what is called with token ids (1, T) and a number of new tokens."""
    assistant = small_model()

    def request(ids, new, **options):
        return GenerationRequest(ids[0].tolist(), max_new_tokens=new, **options)

    def generate(ids, new, **options):
        return model.generate(ids, **{"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **options})

    def leave_a_stream(ids, new):
        next(model.stream_batch([request(ids, new), request(ids, new + 1)]))

    def states(ids, new):
        state = model.prefill(ids).fork(2)
        follow = [GenerationRequest([7], state=state[row], max_new_tokens=new) for row in range(2)]
        model.generate_batch(follow)

    return {
        "greedy": generate,
        "greedy, 3 rows": lambda ids, new: generate(ids.repeat(3, 1), new),
        "sampling": lambda ids, new: generate(ids, new, do_sample=True, top_k=9, temperature=0.8),
        "beams": lambda ids, new: generate(ids, new, num_beams=2),
        "own processor": lambda ids, new: generate(ids, new, logits_processor=[lambda tokens, scores: scores]),
        "scores": lambda ids, new: generate(ids, new, return_dict_in_generate=True, output_scores=True),
        "an assistant": lambda ids, new: generate(ids, new, assistant_model=assistant),
        "prompt lookup": lambda ids, new: generate(ids, new, prompt_lookup_num_tokens=3),
        "batch": lambda ids, new: model.generate_batch([request(ids, new), request(ids[:, :1], 3, temperature=0.9)]),
        "stream": lambda ids, new: [*model.stream_batch([request(ids, new)])],
        "stream that is left": leave_a_stream,
        "states": states,
    }


def run_calls(calls: int, warm_up: int) -> dict:
    """Of the calls behind the warm-up: seconds of each, by kind too; bytes and tensors before and behind them."""
    kinds = kinds_of_calls(small_model())
    text = torch.randint(5, 29, (1, PROMPTS + 1), generator=torch.Generator().manual_seed(0))
    notes = {"seconds": [], "kinds": [], "bytes": [], "tensors": []}
    for number in range(warm_up + calls):
        if number in (warm_up, warm_up + calls // 2):
            note_memory(notes)
        name = list(kinds)[number % len(kinds)]
        ids = text[:, : 1 + number % PROMPTS]
        begin = time.thread_time()
        kinds[name](ids, 2 + number % ANSWERS)
        if number >= warm_up:
            notes["seconds"].append(time.thread_time() - begin)
            notes["kinds"].append(name)
    note_memory(notes)
    return notes


def note_memory(notes: dict) -> None:
    gc.collect()
    notes["tensors"].append(sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    notes["bytes"].append(pages * 4096)


def first_and_last(notes: dict, number: int) -> tuple[float, float]:
    """The median seconds of a call among the first and the last `number`, on average over the kinds."""

    def of(part: slice) -> float:
        kinds, seconds = notes["kinds"][part], notes["seconds"][part]
        by_kind = [[s for kind, s in zip(kinds, seconds) if kind == name] for name in set(kinds)]
        return statistics.mean(map(statistics.median, by_kind))

    return of(slice(number)), of(slice(-number, None))


def text_of(notes: dict, warm_up: int) -> list[str]:
    calls, tenth = len(notes["seconds"]), len(notes["seconds"]) // 10
    first, last = first_and_last(notes, tenth)
    rows = [
        f"| {where} | {size / 2**20:.1f} | {tensors} |"
        for where, size, tensors in zip(("0", str(calls // 2), str(calls)), notes["bytes"], notes["tensors"])
    ]
    return [
        f"{calls} calls behind {warm_up} to warm up, a tiny model of three layers, float32, {len(set(notes['kinds']))} "
        "kinds of calls in turn: " + ", ".join(dict.fromkeys(notes["kinds"])) + ".",
        "",
        "| calls | memory of the process, MiB | live tensors |",
        "|---|---|---|",
        *rows,
        "",
        f"A call takes {first * 1e3:.2f} ms of the processor among the first {tenth} and {last * 1e3:.2f} ms among the "
        f"last {tenth} (the mean over kinds of each kind's median).",
        "",
    ]


class SaidToBeOnCpu(GriffinForCausalLM):
    """Of tensors without memory, whose device autocast does not know."""

    device = property(lambda _: torch.device("cpu"))


def time_looks() -> tuple[int, int, list[float]]:
    """Modules and parameters of a large model, and the seconds of each look at it."""
    config = GriffinConfig(**json.loads(Path(find_preset(LARGE, "model")).read_text()))
    with torch.device("meta"):
        model = SaidToBeOnCpu(config).eval()
    watch, seconds = Watch(model), []
    for _ in range(LOOKS):
        begin = time.thread_time()
        watch.check()
        seconds.append(time.thread_time() - begin)
    watch.close()
    return len([*model.modules()]), len([*model.parameters()]), seconds


def text_of_looks(looks: tuple[int, int, list[float]]) -> list[str]:
    modules, parameters, seconds = looks
    return [
        "## A look at the model",
        "",
        f"Whether it has changed between two tokens of a stream, once a step: {statistics.median(seconds) * 1e6:.0f} "
        f"microseconds of the host, the median of {len(seconds)}, for {modules} modules and {parameters} parameters.",
    ]


if __name__ == "__main__":
    main()

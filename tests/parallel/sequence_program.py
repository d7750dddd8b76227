"""What `test_sequence_parallel.py` runs in four processes: rows shared over 4 and over 2 of them, and in one process.

Leaves results.pt: case to the numbers "alone" and "parallel", of logits, loss and every gradient.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from modeling_griffin import GriffinForCausalLM
from modeling_griffin.parallel import parallelize_sequence
from tests.conftest import VOCABULARY, make_audible, make_config
from tests.ranks import join_group, start_ranks


RECURRENT_GEMMA = {"final_logit_softcapping": 30.0, "scale_embeddings": True, "tie_word_embeddings": True}


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(length))


def positions(*documents: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in documents])[None]


def mask(*rows: str) -> torch.Tensor:
    """One string a row of runs, "3- 5+": three of padding, five of tokens."""
    runs = [[(int(run[:-1]), run[-1] == "+") for run in row.split()] for row in rows]
    return torch.tensor([[int(real) for count, real in row for _ in range(count)] for row in runs])


def labels_without(ids: torch.Tensor, *ignored: int) -> torch.Tensor:
    labels = ids.clone()
    labels[:, list(ignored)] = -100
    return labels


def case(kind="griffin", rows=2, length=32, attention="sdpa", fields=None, **arguments) -> dict:
    ids = tokens(rows, length)
    labels = ids
    if (real := arguments.get("attention_mask")) is not None:  # what comes out at padding means nothing
        real = real.bool()
        labels = ids.masked_fill(~(real & torch.nn.functional.pad(real, (1, 0))[:, :-1]), -100)
    arguments = {"input_ids": ids, "labels": labels, **arguments}
    return {"kind": kind, "attention": attention, "fields": fields or {}, "arguments": arguments}


# The window is 8 tokens, the convolution 4: over 4 ranks chunks are 8 tokens of 32, 3 of 12, 2 of 5.
CASES = {
    "griffin": case(),
    "griffin, eager attention": case(attention="eager"),
    "griffin, long": case(length=80),
    "hawk": case("hawk"),
    "attention only": case("attention"),
    "RecurrentGemma": case(fields=RECURRENT_GEMMA),
    "several key heads": case(fields={"num_key_value_heads": 2}),
    "longer convolution": case(fields={"conv1d_width": 7}, length=16),
    "chunks shorter than the window": case(length=12),
    "chunks shorter than the convolution": case(length=5),
    "one token": case(length=1),
    "not divisible": case(length=27),
    "packed across ranks": case(rows=1, position_ids=positions(5, 13, 1, 1, 12)),
    "packed, at boundaries": case(rows=1, position_ids=positions(8, 16, 8)),
    "packed, just before boundaries": case(rows=1, position_ids=positions(7, 2, 6, 1, 7, 9)),
    "packed, hawk, not divisible": case("hawk", rows=1, length=29, position_ids=positions(5, 13, 1, 1, 9)),
    "packed, eager attention": case(rows=1, position_ids=positions(9, 14, 9), attention="eager"),
    "packed, short chunks": case(rows=1, length=11, position_ids=positions(1, 4, 2, 4)),
    "packed by cu_seq_lens": case(rows=1, cu_seq_lens_q=torch.tensor([0, 5, 18, 19, 32], dtype=torch.int32)),
    "packed by seq_idx": case(rows=1, seq_idx=torch.tensor([[0] * 10 + [1] * 7 + [2] * 15])),
    "left padding": case(attention_mask=mask("32+", "11- 21+")),
    "left padding, all of a rank": case(attention_mask=mask("20- 12+", "17- 15+"), attention="eager"),
    "right padding": case(attention_mask=mask("13+ 19-", "30+ 2-")),
    "padding within": case(
        length=20, attention_mask=mask("3+ 4- 3+ 6- 4+", "2- 3+ 9- 6+"), fields={"attention_window_size": 20}
    ),
    "padding within, hawk": case("hawk", attention_mask=mask("1+ 20- 2+ 7- 2+", "6- 2+ 8- 8+ 7- 1+")),
    "padded and packed": case(
        rows=1, attention_mask=mask("5- 27+"), position_ids=torch.cat([positions(1) * 0] * 5 + [positions(9, 18)], 1)
    ),
    "padded documents, side by side": case(
        rows=1,
        attention_mask=mask("9+ 3- 12+ 8-"),
        position_ids=positions(9, 1, 1, 1, 12, *[1] * 8),
    ),
    "positions that go on": case(rows=1, position_ids=positions(40)[:, 8:]),
    "labels left out": case(labels=labels_without(tokens(2, 32), 0, 7, 8, 9, 16, 31)),
    "no labels on three ranks": case(labels=labels_without(tokens(2, 32), *range(25))),
    "num_items_in_batch": case(num_items_in_batch=torch.tensor(17)),
    "shift_labels": case(shift_labels=tokens(2, 32).roll(3, 1)),
    "activation checkpointing": case(fields={"checkpointing": True}),
    "activation checkpointing, packed": case(rows=1, position_ids=positions(5, 27), fields={"checkpointing": True}),
}


def make_model(spec: dict) -> GriffinForCausalLM:
    fields = {**spec["fields"]}
    checkpointing = fields.pop("checkpointing", False)
    config = make_config(spec["kind"], **fields)
    model = make_audible(GriffinForCausalLM._from_config(config, attn_implementation=spec["attention"]))
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def measure(model, arguments: dict, shared=None) -> dict:
    """Logits where there is no padding, loss, and the mean of each gradient over the ranks that share the rows."""
    model.zero_grad()
    output = model(**arguments, use_cache=False)
    output.loss.backward()
    logits, ranks = output.logits.detach(), 1 if shared is None else shared.ranks.size
    if shared is not None:
        logits = shared.gather(logits, arguments["input_ids"].shape[1])
    if (real := arguments.get("attention_mask")) is not None:
        logits = logits[real.bool()]
    found = {"logits": logits, "loss": output.loss.detach()}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.clone()
        if ranks > 1:
            dist.all_reduce(gradient)
        found[f"gradient of {name}"] = gradient / ranks
    return found


def run_case(spec: dict) -> dict:
    results = {"alone": measure(make_model(spec), spec["arguments"])} if dist.get_rank() == 0 else {}
    model = make_model(spec)
    with parallelize_sequence(model) as shared:
        return {**results, "parallel": measure(model, spec["arguments"], shared)}


def run_again(spec: dict) -> dict:
    """Twice the same, and the model as it was when the ranks part."""
    model = make_model(spec)
    alone = measure(model, spec["arguments"])
    with parallelize_sequence(model) as shared:
        first, second = (measure(model, spec["arguments"], shared) for _ in range(2))
    afterwards = measure(model, spec["arguments"])
    return {
        "again": all(torch.equal(value, second[name]) for name, value in first.items()),
        "removed": all(torch.equal(value, afterwards[name]) for name, value in alone.items()),
    }


def main(rank: int, folder: Path) -> None:
    results = {}
    join_group(folder / "store4", rank, 4)
    results |= {f"{name}, 4 ranks": run_case(spec) for name, spec in CASES.items()}
    join_group(folder / f"store2.{rank // 2}", rank % 2, 2)
    results |= {f"{name}, 2 ranks": run_case(spec) for name, spec in list(CASES.items())[rank // 2 :: 2]}
    results[f"again {rank // 2}"] = run_again(CASES["packed across ranks"])
    if rank % 2 == 0:
        whole = {name: result for name, result in results.items() if result.keys() != {"parallel"}}
        torch.save(whole, folder / f"results{rank // 2}.pt")


if __name__ == "__main__":
    out = Path(sys.argv[1])
    start_ranks(main, 4, out)
    torch.save(torch.load(out / "results0.pt") | torch.load(out / "results1.pt"), out / "results.pt")

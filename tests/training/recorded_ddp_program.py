"""What `tests/training/test_record_ddp.py` runs in two processes: recorded steps under DDP beside DDP's own, and FSDP2.

Leaves results.pt: case to the gradients "plain" and "recorded" of every step; and what was said and refused.
On CPUs a "graph" is the same functions called again: the gradients come, as on GPUs, all at once behind the replay.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from modeling_griffin import GriffinForCausalLM, record_training
from modeling_griffin.training import record
from tests.conftest import make_audible, make_config
from tests.ranks import gradients, join_group, start_ranks


RANKS, LENGTH, ROUNDS = 2, 24, 3
CASES = {  # arguments of DDP; backward passes of a step; tokens of the rows of each rank; whether it sends float16
    "plain": ({}, 1, (LENGTH, LENGTH), False),
    "small buckets, views": ({"bucket_cap_mb": 0.002, "gradient_as_bucket_view": True}, 1, (LENGTH, LENGTH), False),
    "accumulated": ({}, 3, (LENGTH, LENGTH), False),
    "unused are looked for": ({"find_unused_parameters": True}, 1, (LENGTH, LENGTH), False),
    "communication hook": ({}, 1, (LENGTH, LENGTH), True),
    "rows of other lengths": ({}, 2, (LENGTH, 17), False),
}


def train(recorded: bool, options: dict, parts: int, length: int, compressed: bool) -> dict:
    """The gradients of each step, which are those of all ranks."""
    torch.manual_seed(0)
    model = make_audible(GriffinForCausalLM(make_config("griffin"))).train()
    model = DistributedDataParallel(model, **options)
    if compressed:
        model.register_comm_hook(None, fp16_compress_hook)
    if recorded:
        record_training(model, lengths=[LENGTH])
    optimizer, found = torch.optim.SGD(model.parameters(), 0.01), {}
    for number in range(ROUNDS):
        for part in range(parts):
            generator = torch.Generator().manual_seed(100 * number + 10 * part + dist.get_rank())
            ids = torch.randint(0, 29, (2, length), generator=generator)
            with model.no_sync() if part < parts - 1 else nullcontext():
                model(input_ids=ids, labels=ids).loss.backward()
        found |= {f"step {number}, {name}": each.clone() for name, each in gradients(model.module).items()}
        optimizer.step()
        optimizer.zero_grad()
    assert not recorded or [key[:2] for key in model.module.training_recorder.steps] == [(2, LENGTH)]
    return found


def shard() -> dict:
    """FSDP2 before and behind `record_training`: refused by name; and the steps run as before, said once."""
    said, found = [], {}
    record.logger.warning_once = said.append
    ids = torch.randint(0, 29, (2, LENGTH), generator=torch.Generator().manual_seed(dist.get_rank()))
    for recorded in (False, True):
        torch.manual_seed(0)
        model = make_audible(GriffinForCausalLM(make_config("griffin"))).train()
        if recorded:
            record_training(model, lengths=[LENGTH])
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        model(input_ids=ids, labels=ids).loss.backward()
        found[recorded] = gradients(model)
    try:
        record_training(model)
    except ValueError as error:
        return {"said": said, "refused": str(error), "plain": found[False], "recorded": found[True]}


def main(rank: int, folder: Path) -> None:
    join_group(folder / "store", rank, RANKS)
    record.TrainingRecorder.can_record_on_a_cpu = True
    results = {}
    for name, (options, parts, lengths, compressed) in CASES.items():
        arguments = (options, parts, lengths[rank], compressed)
        results[name] = {"plain": train(False, *arguments), "recorded": train(True, *arguments)}
    results["FSDP2"] = shard()
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    start_ranks(main, RANKS, Path(sys.argv[1]))

"""Counts what two processes send in one training step: `torchrun --nproc_per_node 2 collectives_program.py OUT.json`.

DDP by a communication hook on its buckets; FSDP2, in the groups that accelerate makes, by the collectives PyTorch
dispatches. Also the elements of FSDP2's shards on rank 0.
"""

import json
import sys

import torch
import torch.distributed as dist
from memory_runs import make_config
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_griffin import GriffinForCausalLM


GATHERS, SCATTERS = ("_allgather_base_", "allgather_"), ("_reduce_scatter_base_", "reduce_scatter_")


class CountBytes(TorchDispatchMode):
    """Whole tensors, in bytes, that all-gathers produce and reduce-scatters take."""

    def __init__(self):
        super().__init__()
        self.gathered = self.scattered = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("c10d::")
        if name in GATHERS:
            self.gathered += sum(tensor.nbytes for tensor in _tensors(args[0]))
        elif name in SCATTERS:
            self.scattered += sum(tensor.nbytes for tensor in _tensors(args[1]))
        elif func._schema.name.startswith("c10d::") and name not in ("barrier", "broadcast_"):
            raise AssertionError(f"a collective that is not counted: {name}")
        return func(*args, **(kwargs or {}))


def _tensors(argument) -> list[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        return [argument]
    return [tensor for item in argument for tensor in _tensors(item)]


def make_model() -> GriffinForCausalLM:
    torch.manual_seed(0)
    return GriffinForCausalLM(make_config()).train()


def step(model) -> None:
    ids = torch.randint(0, make_config().vocab_size, (2, 24))
    model(ids, labels=ids, use_cache=False).loss.backward()


def count_ddp() -> dict:
    reduced = []

    def hook(state, bucket):
        reduced.append(bucket.buffer().nbytes)
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / dist.get_world_size())

    model = DistributedDataParallel(make_model())
    model.register_comm_hook(None, hook)
    step(model)
    return {"reduced": sum(reduced)}


def count_fsdp2() -> dict:
    model = make_model()
    mixed = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)}
    for layer in model.model.layers:
        if hasattr(layer.temporal_block, "rg_lru"):
            fully_shard(layer.temporal_block.rg_lru.decay, mp_policy=MixedPrecisionPolicy())
        fully_shard(layer, **mixed)
    tail = [model.model.final_norm, model.model.embed_tokens, model.lm_head]
    fully_shard(tail, reshard_after_forward=False, **mixed)
    fully_shard(model, **mixed)
    found = {}
    for name, sends in {"accumulating": False, "fsdp2": True}.items():  # accelerate's `no_sync`, then the last pass
        model.set_requires_gradient_sync(sends)
        with CountBytes() as counted:
            step(model)
        found[name] = {"gathered": counted.gathered, "scattered": counted.scattered}
    found["fsdp2"]["shard"] = sum(parameter.to_local().numel() for parameter in model.parameters())
    return found


def main() -> None:
    dist.init_process_group("gloo")
    found = {"ddp": count_ddp(), **count_fsdp2()}
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

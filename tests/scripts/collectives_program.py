"""Counts what two processes send in one training step: `torchrun --nproc_per_node 2 collectives_program.py OUT.json`.

DDP by a communication hook on its buckets; FSDP2, in the groups that accelerate makes, and tensor parallelism by the
collectives PyTorch dispatches. Also the elements of the shards on rank 0.
"""

import json
import sys

import torch
import torch.distributed as dist
from memory_runs import TENSOR_PARALLEL, make_config
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.distributed import DistributedConfig

from modeling_griffin import GriffinForCausalLM


GATHERS = ("_allgather_base_", "allgather_")
SCATTERS = ("_reduce_scatter_base_", "reduce_scatter_")


class CountBytes(TorchDispatchMode):
    """Whole tensors, in bytes, that all-gathers produce, reduce-scatters take and all-reduces sum."""

    def __init__(self):
        super().__init__()
        self.gathered = self.scattered = self.reduced = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if name == "all_gather_into_tensor":  # of DTensors; it takes this rank's part
            self.gathered += args[0].nbytes * dist.get_world_size()
        elif name in GATHERS:
            self.gathered += sum(tensor.nbytes for tensor in _tensors(args[0]))
        elif name in SCATTERS:
            self.scattered += sum(tensor.nbytes for tensor in _tensors(args[1]))
        elif name == "all_reduce":
            self.reduced += args[0].nbytes
        elif "c10d" in namespace and name not in ("barrier", "broadcast_", "wait_tensor", "_wrap_tensor_autograd"):
            raise AssertionError(f"a collective that is not counted: {func._schema.name}")
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


def count_tensor_parallel(folder: str) -> dict:
    """Under autocast, as train.py runs it; with gate blocks and a vocabulary that two ranks can share out."""
    config = make_config(**TENSOR_PARALLEL)
    if dist.get_rank() == 0:
        GriffinForCausalLM(config).save_pretrained(folder)
    dist.barrier()
    model = GriffinForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2)).train()
    with CountBytes() as counted, torch.autocast("cpu", torch.bfloat16):
        step(model)
    shard = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
    return {"reduced": counted.reduced, "gathered": counted.gathered, "shard": shard}


def main() -> None:
    dist.init_process_group("gloo")
    found = {"ddp": count_ddp(), **count_fsdp2(), "tensor_parallel": count_tensor_parallel(sys.argv[1] + ".model")}
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

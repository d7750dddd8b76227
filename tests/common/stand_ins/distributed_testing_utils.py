"""Stand-in: starts one process a rank on the CPU, with gloo."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    torch.set_num_threads(1)


def _start_rank_processes(function, args=(), nprocs=1) -> None:
    """Runs function(rank, *args) in `nprocs` processes; an exception in one of them is raised here.

    Forked, because each fresh process would import PyTorch and Transformers anew, which takes longer than the tests.
    """
    mp.start_processes(function, args=args, nprocs=nprocs, start_method="fork")


def run_distributed(world_size: int):
    """run_distributed(world_size=n)(function)(*args) calls function(rank, *args) in n ranks of one process group."""

    def bind(function):
        def call(*args, **kwargs):
            with tempfile.TemporaryDirectory() as folder:
                rendezvous = os.path.join(folder, "rendezvous")
                _start_rank_processes(_in_group, (function, world_size, rendezvous, args, kwargs), world_size)

        return call

    return bind


def _in_group(rank, function, world_size, rendezvous, args, kwargs) -> None:
    _set_rank_device(rank)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    store = dist.FileStore(rendezvous, world_size)
    dist.init_process_group(_get_distributed_backend(), store=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args, **kwargs)
        dist.barrier()
    finally:
        dist.destroy_process_group()

"""For the tests of distributed models: runs a program of the tests in several processes on the CPU, with gloo."""

import datetime
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from modeling_griffin import GriffinForCausalLM
from tests.conftest import make_config


ROOT = Path(__file__).resolve().parents[1]


def run_program(name: str, folder: Path, timeout: float = 300) -> dict:
    """Runs `python -m tests.<name> folder`; what it leaves in folder/results.pt, and its output as "log".

    Fails with what the program printed; kills it and all its processes where it has not ended after `timeout` seconds.
    """
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment["HF_MODULES_CACHE"] = str(folder / "modules")
    with open(folder / "log.txt", "w+") as log:
        command = [sys.executable, "-m", f"tests.{name}", str(folder)]
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = f"none after {timeout} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        printed = log.read()
    assert code == 0, f"{name}: exit code {code}\n{printed[-6000:]}"
    return {**torch.load(folder / "results.pt"), "log": printed}


def start_ranks(main, ranks: int, *arguments) -> None:
    """Calls main(rank, *arguments) in `ranks` forked processes; the first that fails ends them all, and raises here."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    torch.multiprocessing.start_processes(main, args=arguments, nprocs=ranks, start_method="fork")


def join_group(store: Path, rank: int, size: int) -> None:
    """Makes this process rank `rank` of a new group of `size`; `store` is a file that no group has used before."""
    if dist.is_initialized():
        dist.barrier()  # so that nobody makes a new group while another is still in this one
        dist.destroy_process_group()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), size), rank=rank, world_size=size, timeout=timeout)


def save_for_all(model: torch.nn.Module, folder: Path) -> Path:
    """Rank 0 saves a model that every rank has; returns the folder when the files are there."""
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return folder


def drawn_lambda(folder: Path, shapes: dict, config: DistributedConfig) -> torch.Tensor:
    """The Λ of the first layer, whole, after loading a checkpoint that has none; its initialisation is not random."""
    model = GriffinForCausalLM(make_config("griffin", **shapes, lambda_init="hippogriff"))
    save_for_all(model, folder)
    name = "model.layers.0.temporal_block.rg_lru.decay.lambda_bias"
    if dist.get_rank() == 0:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    dist.barrier()
    return whole(GriffinForCausalLM.from_pretrained(folder, distributed_config=config).get_parameter(name))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that the ranks hold together, a copy. Fails where one that is not split differs between ranks."""
    if isinstance(tensor, DTensor):
        return tensor.detach().full_tensor().clone()
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, tensor.detach().contiguous())
    assert all(torch.equal(copy, copies[0]) for copy in copies), "differs between ranks"
    return copies[0]


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"parameter {name}": whole(parameter) for name, parameter in model.named_parameters()}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of every parameter, whole; NaN where it has none."""
    nothing = torch.tensor(torch.nan)
    return {
        f"gradient of {name}": nothing if parameter.grad is None else whole(parameter.grad)
        for name, parameter in model.named_parameters()
    }


def watch_lambda(model: torch.nn.Module) -> set[str]:
    """A set into which every forward pass writes the dtype that Λ has inside its module."""
    seen = set()

    def watched(module, forward):
        def call(*arguments):
            seen.add(str(module.lambda_bias.dtype))
            return forward(*arguments)

        return call

    for module in model.modules():
        if "lambda_bias" in module._parameters:
            module.forward = watched(module, module.forward)
    return seen


def files_and_tensors(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return sorted([*(path.name for path in folder.iterdir()), *weights.keys()])


def saved_alone(model: torch.nn.Module, folder: Path) -> dict:
    """All ranks save the model; what one process finds in the folder: files, and the parameters that it loads."""
    model.save_pretrained(folder)
    files = files_and_tensors(folder)  # at once: the save has ended on every rank
    loaded = GriffinForCausalLM.from_pretrained(folder)
    return {"files": files, **{f"parameter {name}": tensor.detach() for name, tensor in loaded.named_parameters()}}

"""Stock `Trainer` with rows shared over ranks: the same rows for the ranks of a group, and nothing counted twice.

accelerate's own parameters for it, `ParallelismConfig(cp_size=...)` and `sp_size`, refuse models with recurrent layers,
since they would share the attention alone. So this puts the groups under Trainer's data loaders and gathers itself.
"""

from contextlib import contextmanager

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import recursively_apply
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from .sequence import SequenceParallel, parallelize_sequence


def parallelize_trainer(trainer: Trainer, size: int) -> SequenceParallel:
    """From now on each row of `trainer` is shared over `size` consecutive ranks. Call it before `train`.

    With R processes there are R / size data-parallel groups, which DDP or FSDP2 averages as ever: the numbers are those
    of R / size processes without sharing. `per_device_train_batch_size` is the rows of a group. Predictions are of the
    rank's chunk of each row: evaluate losses (`prediction_loss_only`), or join the chunks by `gather` of the result.

    Raises:
        ValueError: for a size that does not divide the number of processes; data without a length; smoothed labels,
            whose loss is Trainer's own.
    """
    world = trainer.args.world_size
    if size < 1 or world % size:
        raise ValueError(
            f"sequence_parallel_size = {size}: allowed are the divisors of {world}, the processes that run"
        )
    if isinstance(trainer.train_dataset, IterableDataset) or isinstance(trainer.eval_dataset, IterableDataset):
        raise ValueError("the data set has no length: allowed with rows shared over ranks are data sets that have one")
    if size > 1 and trainer.label_smoother is not None:
        raise ValueError(
            f"label_smoothing_factor = {trainer.args.label_smoothing_factor}: allowed with rows shared over ranks is "
            "0.0, the model's own loss, of which chunks add up"
        )
    mesh = init_device_mesh(trainer.args.device.type, (world // size, size), mesh_dim_names=("data", "sequence"))
    shared = parallelize_sequence(trainer.model, mesh["sequence"])
    if size > 1:
        _share_rows(trainer, mesh)
    return shared


def _share_rows(trainer: Trainer, mesh) -> None:
    accelerator, size = trainer.accelerator, mesh["sequence"].size()
    prepare, gather_for_metrics = accelerator.prepare_data_loader, accelerator.gather_for_metrics
    batch_size = trainer.get_total_train_batch_size

    def prepare_for_groups(loader, *args, **kwargs):
        if not getattr(loader, "_is_accelerate_prepared", False):
            loader = _loader_of_group(accelerator, loader, mesh)
        return prepare(loader, *args, **kwargs)

    def gather_once(data, use_gather_object=False):
        if use_gather_object:
            raise ValueError("eval_use_gather_object = True: allowed is False with rows shared over ranks")
        with _one_rank_of_each_group(accelerator, mesh):
            return gather_for_metrics(data)

    accelerator.prepare_data_loader, accelerator.gather_for_metrics = prepare_for_groups, gather_once
    if hasattr(trainer, "gather_function"):  # what its first evaluation takes; later ones ask the accelerator
        trainer.gather_function = gather_once
    trainer.get_total_train_batch_size = lambda *args: batch_size(*args) // size
    trainer.add_callback(_CountOnce(size))


def _loader_of_group(accelerator, loader, mesh):
    """What accelerate would make of the loader for as many processes as there are groups."""
    loader = prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=mesh["data"].size(),
        process_index=mesh.get_local_rank("data"),
        split_batches=accelerator.split_batches,
        put_on_device=accelerator.device_placement,
        rng_types=accelerator.rng_types.copy(),
        dispatch_batches=False,
        even_batches=accelerator.even_batches,
        use_seedable_sampler=accelerator.use_seedable_sampler,
        data_seed=accelerator.dataloader_config.data_seed,
        non_blocking=accelerator.non_blocking,
        use_stateful_dataloader=accelerator.use_stateful_dataloader,
    )
    loader._is_accelerate_prepared = True
    return loader


@contextmanager
def _one_rank_of_each_group(accelerator, mesh):
    """`accelerator.gather` without what the other ranks of each group repeat."""
    gather, shape = accelerator.gather, (mesh["data"].size(), mesh["sequence"].size(), -1)

    def distinct(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, shape)[:, 0].flatten(0, 1)

    accelerator.gather = lambda data: recursively_apply(distinct, gather(data))
    try:
        yield
    finally:
        del accelerator.gather


class _CountOnce(TrainerCallback):
    """Trainer adds up the tokens of all processes, of which those of a group have the same."""

    def __init__(self, size: int):
        self.size, self.seen = size, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen = state.num_input_tokens_seen

    def on_step_end(self, args, state, control, **kwargs):
        state.num_input_tokens_seen = self.seen + (state.num_input_tokens_seen - self.seen) // self.size
        self.seen = state.num_input_tokens_seen

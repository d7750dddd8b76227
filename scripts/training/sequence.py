"""`sequence_parallel_size` of train.py: each row over several processes, by `modeling_griffin.parallel`."""

from collections.abc import Callable

import torch

from modeling_griffin.parallel import SequenceParallel, parallelize_trainer
from training.report import token_losses
from training.trainer import GriffinTrainer


def share_rows(trainer: GriffinTrainer, size: int) -> None:
    """Shares each row of the trainer, for training and evaluation, over `size` processes; with 1 it stays as it is."""
    if size == 1:
        return
    shared = parallelize_trainer(trainer, size)
    world = trainer.args.world_size
    trainer.data_ranks, trainer.data_rank = world // size, trainer.args.process_index // size
    trainer.preprocess_logits_for_metrics = whole_token_losses(shared)


def whole_token_losses(shared: SequenceParallel) -> Callable:
    """`token_losses` of whole rows (B, T - 1), from this rank's logits (B, L, V) and the rows' labels (B, T)."""

    def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        mine = shared.chunk(following, filler=-100)
        chunk = token_losses(torch.nn.functional.pad(logits, (0, 0, 0, 1)), torch.nn.functional.pad(mine, (1, 0)))
        return shared.gather(chunk, labels.shape[1])[:, :-1]

    return losses

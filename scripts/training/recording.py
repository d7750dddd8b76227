"""`record_steps` of train.py: forward and backward as CUDA graphs, by `modeling_griffin.record_training`."""

from accelerate.utils import DistributedType
from transformers import Trainer

from modeling_griffin import record_training


SHARDED = {DistributedType.FSDP: "FSDP2", DistributedType.DEEPSPEED: "DeepSpeed"}
KEPT = 2  # shapes: full batches, and the last one of an epoch


def record_steps(trainer: Trainer, length: int) -> None:
    """Records the trainer's steps over rows of `length` tokens. Call it before `train`.

    Raises:
        ValueError: under a launcher that shards the weights, or with torch_compile, which wraps the model.
    """
    engine = SHARDED.get(trainer.accelerator.distributed_type)
    if engine is not None:
        raise ValueError(
            f"record_steps = true under {engine}, which gathers weights in a step: allowed are one GPU and DDP"
        )
    if trainer.args.torch_compile:
        raise ValueError("record_steps = true with torch_compile = true: allowed is one of them")
    record_training(trainer.model, lengths=[length], kept=KEPT)

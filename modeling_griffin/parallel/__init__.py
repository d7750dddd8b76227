"""One model over several GPUs, where Transformers and accelerate have nothing for recurrent layers."""

from .sequence import SequenceParallel, parallelize_sequence
from .sequence_trainer import parallelize_trainer


__all__ = ["SequenceParallel", "parallelize_sequence", "parallelize_trainer"]

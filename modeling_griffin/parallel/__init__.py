"""One model over several GPUs, where Transformers and accelerate have nothing for recurrent layers."""

from .sequence import SequenceParallel, parallelize_sequence


__all__ = ["SequenceParallel", "parallelize_sequence"]

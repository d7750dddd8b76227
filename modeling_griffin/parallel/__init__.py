"""One model over several GPUs, where Transformers and accelerate have nothing for recurrent layers."""

from typing import TYPE_CHECKING, Any

from .sequence import SequenceParallel, parallelize_sequence


if TYPE_CHECKING:
    from .sequence_trainer import parallelize_trainer


__all__ = ["SequenceParallel", "parallelize_sequence", "parallelize_trainer"]


def __getattr__(name: str) -> Any:
    """`parallelize_trainer` when it is asked for: it needs accelerate, and Trainer takes seconds to import."""
    if name != "parallelize_trainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .sequence_trainer import parallelize_trainer

    return parallelize_trainer

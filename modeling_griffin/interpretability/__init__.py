"""What goes on inside of the recurrence, as tensors that can be looked at and differentiated."""

from .recurrence import Recurrence, record_recurrences


__all__ = ["Recurrence", "record_recurrences"]

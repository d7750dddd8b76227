"""Who uses a step: one call at a time. Other threads wait for it, and what it has queued on the GPU ends first."""

import threading

import torch


class Lease:
    """stream: it is held by a generator that may be left lying about, so that nobody should wait for it.

    failed: why it is not used at all: it could not be recorded, or computes something else than the model.
    fingerprint: of the model for which it was made, see `fingerprint.py`.
    """

    fingerprint: tuple

    def __init__(self, device: torch.device):
        self.held_on, self.stream = device, False
        self.failed: Exception | None = None
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._queued: torch.cuda.Event | None = None

    @property
    def busy(self) -> bool:
        return self._lock.locked()

    def acquire(self, wait: bool = True) -> bool:
        """False where another call has it and `wait` is False, or where waiting would never end."""
        if wait and not self.can_wait:
            return False
        if not self._lock.acquire(blocking=wait):
            return False
        self._owner = threading.get_ident()
        if self._queued is not None:
            torch.cuda.current_stream(self.held_on).wait_event(self._queued)
        return True

    @property
    def can_wait(self) -> bool:
        """Not for a call of this same thread, which goes on only when this one has ended."""
        return not self.busy or not (self.stream or self._owner == threading.get_ident())

    def release(self) -> None:
        """Whoever is next waits, on the GPU, for what this call has queued on its stream."""
        if self.held_on.type == "cuda":
            self._queued = torch.cuda.Event()
            self._queued.record(torch.cuda.current_stream(self.held_on))
        self._owner, self.stream = None, False
        self._lock.release()

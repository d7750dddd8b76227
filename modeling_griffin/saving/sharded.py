"""Weights that ranks hold together: gathered to be saved, and how a failure on one rank ends all."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed


if distributed.is_available():
    from torch.distributed.tensor import DTensor


def is_sharded(state_dict: dict) -> bool:
    """Whether ranks hold tensors of it together, whoever sharded them."""
    return distributed.is_available() and any(isinstance(tensor, DTensor) for tensor in state_dict.values())


def gather(state_dict: dict, tied: dict[str, str], keep: bool) -> dict:
    """The tensors whole and on the CPU where `keep`, else {}. Every rank must call it.

    tied: name to the name of the parameter that it is; once gathered they are two, so that only the second is taken.
    """
    gathered = {}
    for name, tensor in state_dict.items():
        if tied.get(name) in state_dict:
            continue
        if isinstance(tensor, DTensor):
            tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # from the CPU where FSDP2 offloads it
        if keep:
            gathered[name] = tensor.detach().cpu()
    return gathered


@contextmanager
def all_ranks_or_none(together: bool) -> Iterator[None]:
    """Waits for all ranks at the end, and where one fails inside, all do: the others raise RuntimeError.

    together: False does nothing. The block must do the same collective operations, if any, on a rank that fails.
    """
    try:
        yield
    except Exception as error:
        if together:
            _reports(f"{type(error).__name__}: {error}")
        raise
    failed = _reports(None) if together else {}
    if failed:
        raise RuntimeError(f"failed on {', '.join(f'rank {rank} with {why}' for rank, why in failed.items())}")


def _reports(own: str | None) -> dict[int, str]:
    """Tells all ranks why this one failed, or None; what those that failed told."""
    reports = [None] * distributed.get_world_size()
    distributed.all_gather_object(reports, own)
    return {rank: report for rank, report in enumerate(reports) if report is not None}

"""What the processes of one run say to each other outside of the training: decisions, comparisons, who is silent."""

import datetime
import os
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from accelerate import PartialState


SECONDS_TO_ANSWER = 4
# gloo's errors have no class of their own; of these the first two are a wait that ended, the others a rank that left.
SILENCE = ("Timed out waiting", "Application timeout", "Connection closed by peer", "Connection reset by peer")
STORE_KEY = "train.py/answers"


def join_in_time(backend: str | None, seconds: int | str | None) -> None:
    """Makes the group of CPU processes with `ddp_timeout`; TrainingArguments, which would make it, leaves that out."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and str(seconds).isdigit():
        PartialState(cpu=True, backend=backend, timeout=datetime.timedelta(seconds=int(seconds)))


def decided_by_rank_0(decide: Callable) -> Any:
    """What decide() returns, or the ValueError it raises, on rank 0: the same on every rank."""
    if not _is_one_of_many():
        return decide()
    said: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            said = [(decide(), None)]
        except ValueError as error:
            said = [(None, str(error))]
    dist.broadcast_object_list(said)
    value, refusal = said[0]
    if refusal is not None:
        raise ValueError(refusal)
    return value


def check_same_on_all_ranks(facts: dict[str, dict]) -> None:
    """Raises ValueError, on every rank, that names what another rank has otherwise than rank 0."""
    if not _is_one_of_many():
        return
    all_facts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_facts, facts)
    for rank, others in enumerate(all_facts):
        for kind, here in all_facts[0].items():
            there = others[kind]
            names = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
            if names:
                values = "; ".join(f"{name} = {there.get(name)!r}, rank 0 has {here.get(name)!r}" for name in names)
                raise ValueError(f"rank {rank} has {values}: allowed is the same {kind} on every rank")


def leave_together() -> None:
    """Waits for every rank, then leaves the group: a rank that ends first takes the others' store with it."""
    if _is_one_of_many():
        dist.barrier()
        dist.destroy_process_group()


def explain_silence(error: RuntimeError) -> str | None:
    """One line that names the ranks which do not answer; None for errors of another kind."""
    if not _is_one_of_many() or not any(words in str(error) for words in SILENCE):
        return None
    silent = _silent_ranks()
    who = "another rank" if silent is None else " and ".join(f"rank {rank}" for rank in silent)
    reason = " ".join(str(error).split())[:160]
    return (
        f"no answer from {who} ({reason}); ddp_timeout bounds the wait, --resume continues from the newest checkpoint"
    )


def _silent_ranks() -> list[int] | None:
    """Every rank that has lost its group says so in the launcher's store; those that do not are the cause."""
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = datetime.timedelta(seconds=SECONDS_TO_ANSWER)
        store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
        store.set(f"{STORE_KEY}/{rank}", "here")
        time.sleep(SECONDS_TO_ANSWER)
        return [other for other in range(size) if not store.check([f"{STORE_KEY}/{other}"])] or None
    except (KeyError, ValueError, RuntimeError):  # the store's host is what is gone
        return None


def _is_one_of_many() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1

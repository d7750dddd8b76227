"""The steps that stay with a model, and who gets which: one call at a time uses a step, other threads wait for it.

A step is kept for the next call with the same number of rows, while the model is what it was: `fingerprint.py`. It is
compared with the model's plain forward pass when it is made; where it differs, or cannot be recorded, nobody uses it.
"""

import threading
import weakref
from collections import OrderedDict
from typing import Any

import torch
from transformers.utils import logging

from ..configuration_griffin import GriffinConfig
from ..gpu import on_its_device
from .agreement import check_step
from .fingerprint import forward_fingerprint, fused_fingerprint
from .forward import ForwardStep
from .lease import Lease
from .packed import unpack
from .state import DecodeStep


logger = logging.get_logger(__name__)

KEPT_STEPS = 4  # of a model, with their buffers and recordings
# Of a KV ring, where the window has as many: a larger one is as long as the tokens need. On a GPU another length has to
# be compiled and recorded.
LEAST_SLOTS = {"cpu": 64, "cuda": 4096}
STEPS: "weakref.WeakKeyDictionary[torch.nn.Module, OrderedDict[tuple, list]]" = weakref.WeakKeyDictionary()
_FINDING = threading.Lock()


def take_step(
    model: torch.nn.Module,
    rows: int,
    tokens: int | None = None,
    kind: str = "fused",
    hidden: bool = False,
    like: tuple | None = None,
    stream: bool = False,
) -> Any:
    """The model's step of this kind for so many rows, recorded unless it is; None, and one warning, where it fails.

    A `DecodeStep` where kind is "fused", a `ForwardStep` where it is "forward".

    tokens: that a row will hold at most; None: any number. hidden: whether it leaves hidden states too. like: see
    `ForwardStep.prepare`. stream: for a generator, which may be left lying about. To be handed back by `release`.
    """
    fingerprint_of = fused_fingerprint if kind == "fused" else forward_fingerprint
    key = kind, rows, ring_slots(model.config, tokens, model.device), hidden
    while True:
        step, waiting = _find(model, key, fingerprint_of(model), stream)
        if waiting is not None and waiting.acquire():
            if waiting.fingerprint == fingerprint_of(model):
                step = waiting
            else:  # the model changed meanwhile
                waiting.release()
        if step is None:
            continue
        if step.failed is None:
            return step if _ready(model, step, kind, like) else None
        step.release()
        return None


def take_kept_step(model: torch.nn.Module, rows: int, slots: int, stream: bool = False) -> Any:
    """As `take_step`, of so many slots, only where an earlier call has left such a step and nobody uses it."""
    key, fingerprint = ("fused", rows, slots, False), fused_fingerprint(model)
    with _FINDING:
        for step in STEPS.get(model, OrderedDict()).get(key, []):
            if step.checked and step.fingerprint == fingerprint and step.failed is None and step.acquire(wait=False):
                step.stream = stream
                return step
    return None


def ring_slots(config: GriffinConfig, tokens: int | None, device: torch.device) -> int:
    """Of the KV ring of a row: the window, or where it is long no more than about twice what `tokens` need."""
    window = config.attention_window_size
    return window if tokens is None else min(window, max(LEAST_SLOTS[device.type], 1 << (tokens - 1).bit_length()))


def _find(model, key: tuple, fingerprint: tuple, stream: bool) -> tuple:
    """A step with this key that is now this call's, made anew where none can be waited for; or the one to wait for."""
    with _FINDING:
        steps = STEPS.setdefault(model, OrderedDict())
        for other in [other for other in steps if other[0] == key[0]]:
            steps[other] = [step for step in steps[other] if step.fingerprint == fingerprint and _may_be_tried(step)]
            if not steps[other]:  # of weights that were moved or replaced
                del steps[other]
        found = steps.setdefault(key, [])
        steps.move_to_end(key)
        for step in found:
            if step.acquire(wait=False):
                step.stream = stream
                return step, None
        waiting = None if stream else next((step for step in found if step.can_wait), None)
        if waiting is not None:
            return None, waiting
        step = _make(model, key, fingerprint)
        step.acquire()
        step.stream = stream
        found.append(step)
        while len(steps) > KEPT_STEPS:
            steps.popitem(last=False)
        return step, None


def _make(model, key: tuple, fingerprint: tuple):
    kind, rows, slots, hidden = key
    try:
        if kind == "fused":
            step = DecodeStep(model.model, model.lm_head, rows, slots, hidden)
        else:
            step = ForwardStep(model, rows, slots, hidden)
    except Exception as error:
        step = _failed(model, kind, rows, error)
    step.fingerprint = fingerprint
    return step


def _ready(model, step, kind: str, like: tuple | None) -> bool:
    """Records and checks a new step; where that fails it is handed back."""
    if step.checked:
        return True
    try:
        with on_its_device(step.token):
            if kind == "fused":
                _settle(model, step)
            step.prepare(model, like)
            if step.on_gpu or kind == "fused":
                check_step(model, step)
        step.checked = True
    except Exception as error:
        _replace(model, step, _failed(model, kind, len(step.token), error))
    finally:  # after Ctrl-C too: the next call tries again
        if not step.checked:
            step.release()
    return step.checked


@torch.no_grad()
def _settle(model, step) -> None:
    """Quantised layers are called once: bitsandbytes then puts biases into the dtype in which it computes.

    A recording made before would go on reading where they were.
    """
    if any(unpack(module) is not None for module in model.modules() if isinstance(module, torch.nn.Linear)):
        model(step.token[:1, None], use_cache=False, logits_to_keep=1)
        step.fingerprint = fused_fingerprint(model)


def _failed(model, kind: str, rows: int, error: Exception) -> Lease:
    """What stands in a step's place, without its buffers: it is not tried again while the model stays as it is."""
    logger.warning_once(f"generate is slow: a {kind} step of {rows} rows is not used: {error!r}")
    stone = Lease(model.device)
    stone.failed = error
    return stone


def _replace(model, step, stone: Lease) -> None:
    step.failed, stone.fingerprint = stone.failed, step.fingerprint
    with _FINDING:
        for found in STEPS.get(model, {}).values():
            found[:] = [stone if each is step else each for each in found]


def _may_be_tried(step) -> bool:
    """Where there was no memory, there may be some now."""
    return not isinstance(step.failed, torch.OutOfMemoryError)

"""Whether a model stays what it is while a stream of its tokens lies in the hands of others.

A stream that went on behind new weights would have the memory of one model and the answers of another. So what the
model holds is noted, and looked at when the stream comes back. That happens at every step and must cost little: lists
are made and compared by functions in C, and only where they differ it is asked what differs, and whether it matters.
"""

import re
from collections.abc import Iterator
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedConfig

from ..decode.agreement import CHECKING
from ..decode.fingerprint import FIELDS, IGNORED, value_of
from ..decode.fused_model import changes_nothing
from ..kernels.hooks import UNREAD_BY_A_FORWARD, global_forward_hooks


# What no token depends on, what Transformers leaves when outputs are asked for, and a forward pass by itself.
UNREAD = {"generation_config", "warnings_issued", "_output_capturing_hooks_installed", *chain(*IGNORED.values())}
UNREAD |= UNREAD_BY_A_FORWARD
READ_OF_CONFIGS = {*FIELDS, "_attn_implementation_internal"}
CONTAINERS = (dict, list, set, PreTrainedConfig)


class Watch:
    """Knows what a model was when `note` was called last. To be closed, because it listens to optimizers.

    It does not find what was written through `tensor.data`, which PyTorch does not count.
    """

    def __init__(self, model: nn.Module):
        self.model, self.trained = model, False
        self._look()
        self.listening = register_optimizer_step_post_hook(self._after_a_step)  # fused ones write uncounted too

    def close(self) -> None:
        self.listening.remove()

    def note(self) -> None:
        """Takes for right what the model has become by what ran for the stream itself."""
        if not self._is_as_it_was():
            self._look()

    def check(self) -> None:
        """Raises RuntimeError where the model is not what it was."""
        if self._is_as_it_was():
            return
        with CHECKING:  # what another thread's new step has put into the model for a moment is no change
            found = next(self._differences(), None)
        if found is not None:
            raise RuntimeError(
                f"the model was changed between two tokens of a stream: {found}; allowed is to change it when the "
                "stream has ended or was closed"
            )
        self._look()

    def _after_a_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        mine = set(map(id, self.tensors.values()))
        self.trained |= any(id(tensor) in mine for group in optimizer.param_groups for tensor in group["params"])

    def _look(self) -> None:
        self.held: dict[str, Any] = {}  # what modules hold, and the containers in it
        self.copies: dict[str, dict] = {}
        known: set[int] = set()
        for name, module in self.model.named_modules():
            self._hold(f"{name}." if name else "", vars(module), known)
        self.empty = [each for each in self.held.values() if not each]
        self.dicts = [each for each in self.held.values() if each and isinstance(each, dict)]
        self.lists = [each for each in self.held.values() if each and not isinstance(each, dict)]
        tensors = chain(self.model.named_parameters(), self.model.named_buffers())
        self.tensors = {f"{name}{part}": x for name, tensor in tensors for part, x in _parts("", tensor)}
        self.counted = {name: tensor for name, tensor in self.tensors.items() if not tensor.is_inference()}
        self.seen = self._now()

    def _hold(self, name: str, container: Any, known: set[int]) -> None:
        if id(container) in known:  # a configuration, as a rule, which all blocks share
            return
        known.add(id(container))
        self.held[name] = container
        if not container:
            return
        self.copies[name] = items = _items(container)
        for key, value in items.items():
            if isinstance(value, CONTAINERS) and key not in UNREAD:
                inside = vars(value) if isinstance(value, PreTrainedConfig) else value
                self._hold(f"{name}{key}.", inside, known)

    def _now(self) -> tuple:
        kind = self.model.device.type
        return (
            [torch.is_autocast_enabled(kind), torch.get_default_dtype(), *global_forward_hooks()],
            list(map(torch.Tensor.data_ptr, self.tensors.values())),
            list(map(attrgetter("_version"), self.counted.values())),
            list(chain.from_iterable(map(dict.values, self.dicts))),
            list(chain.from_iterable(self.lists)),
        )

    def _is_as_it_was(self) -> bool:
        try:
            return not self.trained and not any(self.empty) and self._now() == self.seen
        except Exception:  # of tensors or arrays in another's place, which do not say in one word if they are equal
            return False

    def _differences(self) -> Iterator[str]:
        """What has changed, of what matters."""
        if self.trained:
            yield "an optimizer made a step"
        for name, container in self.held.items():
            before, now = self.copies.get(name, {}), _items(container)
            for key in {**before, **now}:
                if _matters(name, key, before.get(key), now.get(key)):
                    yield _called(f"{name}{key}")
        around, places, versions, *_ = self._now()
        for tensors, before, now in ((self.tensors, self.seen[1], places), (self.counted, self.seen[2], versions)):
            for name, one, other in zip(tensors, before, now):
                if one != other:
                    yield f"the values of {name}"
        if around != self.seen[0]:
            yield "autocast, the default dtype or the hooks of every module"


def _called(place: str) -> str:
    """As a user of the model calls it."""
    place = re.sub(r"\b_(parameters|buffers|modules)(\.|$)", "", place).rstrip(".")
    return re.sub(r"(.*)\._forward_(pre_)?hooks\.\d+", r"a hook of \1", place)


def _items(container: Any) -> dict:
    if isinstance(container, dict):
        return dict(container)
    return dict(enumerate(container)) if isinstance(container, list) else dict.fromkeys(container)


def _matters(name: str, key: object, before: object, now: object) -> bool:
    """name: of the container, which ends in a dot."""
    if key in UNREAD or (name.endswith("config.") and key not in READ_OF_CONFIGS):
        return False
    there = [each for each in (before, now) if each is not None]
    if there and all(changes_nothing(each) for each in there):  # hooks that only look
        return False
    return _shallow(before) != _shallow(now)


def _shallow(value: Any) -> object:
    """Containers have a place of their own among what is watched."""
    return id(value) if isinstance(value, CONTAINERS) else value_of(value)


def _parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that one is made of which wraps others, as torchao's weights do."""
    if hasattr(tensor, "__tensor_flatten__"):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _parts(f"{name}.{part}", getattr(tensor, part))
        return
    try:
        tensor.data_ptr()
    except RuntimeError:  # it wraps others and does not say which
        return
    yield name, tensor

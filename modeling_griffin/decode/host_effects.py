"""Whether Python that the user put into a model has to run at each token: a recording repeats its GPU work alone.

A hook or a forward may be recorded if all that it reaches are tensors, numbers and functions of the same kind, and all
that it writes are its own variables and its own tensors. Counters, lists that collect, files and switches are effects:
what they do or decide happens once, while the step is recorded. In doubt there is an effect: the loop is right, only
slower. Code of installed packages that people put into models to compute (adapters, quantised layers) is trusted.
"""

import builtins
import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..kernels.hooks import forward_hooks, global_forward_hooks
from .original import OF_CLASSES, as_it_is, own_function


TRUSTED = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "torchao", "liger_kernel")
TRUSTED = (*TRUSTED, __name__.split(".")[0])
STORES = ("STORE_GLOBAL", "STORE_ATTR", "DELETE_ATTR", "IMPORT_NAME", "YIELD_VALUE", "LOAD_BUILD_CLASS")
SWITCHES = (bool, int, float, str, type(None))  # a global one may be another at the next call, and nobody would notice
HARMLESS = (*SWITCHES, torch.dtype, torch.device, torch.Tensor, nn.Module, types.ModuleType, type)
CALLABLE = ("isinstance", "len", "min", "max", "abs", "getattr", "hasattr", "sum")  # of built-in functions


def host_effect(module: nn.Module) -> str | None:
    """What in the module's own calls cannot be recorded, or None."""
    for hook in forward_hooks(module):
        if (effect := effect_of(hook, type(module))) is not None:
            return f"a hook {effect}"
    if (name := own_function(module)) not in (None, "forward"):
        return f"it has a {name} of its own"
    forward = vars(module).get("forward", type(module).forward)
    if as_it_is(forward) == OF_CLASSES.get(type(module), {}).get("forward"):
        return None
    effect = effect_of(forward, type(module))
    return None if effect is None else f"the forward of a {type(module).__name__} {effect}"


def global_effect() -> str | None:
    """The same of hooks that every module has."""
    return _first(effect_of(hook) for hook in global_forward_hooks())


def watching_mode() -> str | None:
    """The class of a mode that sees every operation of PyTorch; kernels and recordings are none to it.

    `torch.device` as a context, and `torch.set_default_device`, change no operation on tensors that are there.
    """
    if torch._C._len_torch_dispatch_stack():
        return "TorchDispatchMode"
    modes = _get_current_function_mode_stack()
    return next((type(mode).__name__ for mode in modes if not isinstance(mode, DeviceContext)), None)


def effect_of(function: Callable, owner: type | None = None, seen: frozenset = frozenset()) -> str | None:
    """What the function does beyond computing with tensors, or None.

    owner: the class whose methods it may call. seen: functions that are already looked at.
    """
    if isinstance(function, functools.partial):
        held = (*function.args, *function.keywords.values(), function.func)
        return _first(_held_effect(each, owner, seen) for each in held)
    if isinstance(function, types.MethodType):
        if not isinstance(function.__self__, nn.Module):
            return f"is a method of a {type(function.__self__).__name__}"
        return effect_of(function.__func__, type(function.__self__), seen)
    if isinstance(function, types.BuiltinFunctionType) or function in seen:
        return None
    if not isinstance(function, types.FunctionType):
        return None if _is_trusted(type(function)) else f"is a {type(function).__name__}"
    return _first(_effects_in(function, owner, seen | {function}))


def _effects_in(function: types.FunctionType, owner: type | None, seen: frozenset) -> Iterator[str | None]:
    held = [cell.cell_contents for cell in function.__closure__ or () if not _is_empty(cell)]
    held += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    if _is_trusted(function):  # a decorator, perhaps, of a function that is not
        yield from (effect_of(each, owner, seen) for each in held if isinstance(each, types.FunctionType))
        return
    yield from (_held_effect(each, owner, seen) for each in held)
    holds_tensors = any(isinstance(each, (torch.Tensor, nn.Module)) for each in held)
    for instruction in dis.get_instructions(function):
        name = instruction.argval
        if (
            instruction.opname in STORES
            or instruction.opname == "STORE_DEREF"
            and name in function.__code__.co_freevars
        ):
            yield f"writes {name}"
        elif instruction.opname == "LOAD_GLOBAL":
            yield _global_effect(function, name, owner, seen)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            method = inspect.getattr_static(owner, name, None) if owner is not None else None
            if isinstance(method, types.FunctionType):
                yield effect_of(method, owner, seen)
            if holds_tensors and name.endswith("_") and not name.endswith("__"):
                yield f"may change in place what it holds, by {name}"
        elif instruction.opname == "STORE_SUBSCR" and holds_tensors:
            yield "may change in place what it holds"


def _global_effect(function: types.FunctionType, name: str, owner: type | None, seen: frozenset) -> str | None:
    if name in function.__globals__:
        value = function.__globals__[name]
        return f"reads the global {name}" if isinstance(value, SWITCHES) else _held_effect(value, owner, seen)
    return None if name in CALLABLE or isinstance(getattr(builtins, name, None), type) else f"calls {name}"


def _held_effect(value, owner: type | None, seen: frozenset) -> str | None:
    if isinstance(value, tuple):
        return _first(_held_effect(each, owner, seen) for each in value)
    if isinstance(value, HARMLESS):
        return None
    return effect_of(value, owner, seen) if callable(value) else f"holds a {type(value).__name__}"


def _is_empty(cell) -> bool:
    try:
        return cell.cell_contents is cell  # reading it is what fails
    except ValueError:
        return True


def _first(effects) -> str | None:
    return next((effect for effect in effects if effect is not None), None)


def _is_trusted(function) -> bool:
    """By where it was written: a decorator takes over the name of another's module."""
    if isinstance(function, types.FunctionType):
        module = function.__globals__.get("__name__", "")
    else:
        module = getattr(function, "__module__", "") or ""
    return module.split(".")[0] in TRUSTED

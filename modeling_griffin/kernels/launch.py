"""Launches of Triton kernels that ask Triton once what it has compiled, and not at each launch.

`kernel[grid](...)` binds, inspects and hashes every argument in Python before it finds the compiled kernel: most of a
launch's time, and a small training step has hundreds. Here the compiled kernel is kept for what Triton specialises by:
dtypes of tensors, classes of numbers, constants and options. It is then called as Triton's own `run` calls it, in the
versions where that was read. In all other cases Triton's `run` is what happens: the first launch, its interpreter,
other versions, AMD, hooks of profilers, tensors that are not aligned or not all on one GPU.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import gpu


try:
    import triton
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
except ImportError:
    VERSION = None

READ_IN = ((3, 6), (3, 9))  # the first and last version of Triton whose `run` was read
IS_READ = VERSION is not None and READ_IN[0] <= VERSION <= READ_IN[1] and torch.version.hip is None
ALIGNMENT = 16  # bytes, and the divisor of numbers, by which Triton specialises
PREPARED: dict[tuple, "Prepared | None"] = {}  # None: Triton's `run`, each time
_READERS: dict[int, tuple] = {}  # by a kernel's id: the kernel, kept so that no other has this id, and its reader


class Prepared(NamedTuple):
    """A compiled kernel, and the constants behind the arguments that are given in order."""

    compiled: Any
    constants: tuple


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> bool:
    """`kernel[grid](*arguments, **options)` on the device of the first argument, a tensor.

    arguments: in the kernel's order; what it has behind them are constants, among the options by name. The kernel's
    pointers, and nothing else but a constant, are called p_something.
    """
    device = arguments[0].get_device()
    if device < 0 or not IS_READ or type(kernel) is not JITFunction or _is_hooked(kernel):
        return inspect.unwrap(gpu.launch)(kernel, grid, *arguments, **options)
    if device == torch.cuda.current_device():
        return _launch(device, kernel, grid, arguments, options)
    with torch.cuda.device(device):
        return _launch(device, kernel, grid, arguments, options)


def _launch(device: int, kernel, grid: tuple[int, ...], arguments: tuple, options: dict) -> bool:
    reader = _READERS.get(id(kernel)) or _READERS.setdefault(id(kernel), (kernel, _make_reader(kernel)))
    if reader[1] is None:
        kernel[grid](*arguments, **options)
        return True
    values, pointers, key = reader[1](*arguments)
    key = (id(kernel), device, key, *options, *options.values())
    prepared = PREPARED.get(key)
    if prepared is None or pointers % ALIGNMENT:
        compiled = kernel[grid](*arguments, **options)
        if key not in PREPARED and not pointers % ALIGNMENT:
            PREPARED[key] = _prepare(kernel, compiled, device, arguments, options)
        return True
    compiled = prepared.compiled
    compiled.run(
        *(*grid, 1, 1)[:3],
        driver.active.get_current_stream(device),
        compiled.function,
        compiled.packed_metadata,
        *(None, None, None),  # what hooks would be given, and the hooks
        *values,
        *prepared.constants,
    )
    return True


def _is_hooked(kernel) -> bool:
    """Whether someone watches launches: the kernel's hooks, and those of profilers."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(kernel.pre_run_hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _make_reader(kernel) -> Callable[..., tuple] | None:
    """Of arguments: themselves with addresses for tensors; all addresses in one number; what Triton specialises by.

    Written out for the kernel, as Triton writes its binder: a loop over the arguments takes three times as long. None
    where a constant stands in front of an argument: by its place alone it would be taken for one.
    """
    constant = [parameter.is_constexpr for parameter in kernel.params]
    if constant != sorted(constant):
        return None
    names = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
    pointers = [name for name in names if name.startswith("p_")]
    values = [f"a_{name}" if name in pointers else name for name in names]
    kinds = [
        f"{name} if {name} is None else {name}.dtype, {name} if {name} is None else {name}.get_device()"
        if name in pointers
        else f"kind({name})"
        for name in names
    ]
    lines = [f"def read({', '.join(names)}, *constants):"]
    lines += [f"    a_{name} = 0 if {name} is None else {name}.data_ptr()" for name in pointers]
    lines += [f"    values = ({', '.join(values)}, *constants)"]
    lines += [f"    return values, {' | '.join(f'a_{name}' for name in pointers)}, ({', '.join(kinds)}, *constants)"]
    namespace: dict[str, Any] = {"kind": _kind}
    exec("\n".join(lines), namespace)
    return namespace["read"]


def _kind(number: int | float) -> object:
    """By what Triton tells numbers apart; of an unusual type, or too large for 32 bits, each is its own."""
    if type(number) is float:
        return float
    if type(number) is not int or not -(2**31) <= number < 2**31:
        return type(number), number
    return 1 if number == 1 else 2 if number % ALIGNMENT else ALIGNMENT


def _prepare(kernel, compiled, device: int, arguments: tuple, options: dict) -> Prepared | None:
    """None where tensors are on several devices, constants are missing, or Triton did not say what it compiled."""
    behind = kernel.params[len(arguments) :]
    elsewhere = any(isinstance(each, torch.Tensor) and each.get_device() != device for each in arguments)
    if elsewhere or not hasattr(compiled, "packed_metadata") or not all(each.is_constexpr for each in behind):
        return None
    return Prepared(compiled, tuple(options.get(each.name, each.default) for each in behind))


def power_of_2(number: int) -> int:
    """The smallest that is not below the number: sizes of blocks."""
    return 1 << max(0, number - 1).bit_length()

"""Launches of Triton kernels that ask Triton once what it has compiled, and not at each launch.

`kernel[grid](...)` binds, inspects and hashes every argument in Python before it finds the compiled kernel: most of a
launch's time, and a small training step has hundreds. Here the compiled kernel is kept for what Triton specialises by:
dtypes and alignment of tensors, classes of numbers, constants and options. It is then called as Triton's own `run`
calls it, in the versions where that was read. In all other cases Triton's `run` is what happens: the first launch, its
interpreter, other versions, AMD, hooks of profilers, tensors that are not all on one GPU.
"""

from typing import NamedTuple

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
ALIGNMENT = 16  # bytes, and the divisor of numbers, by which Triton specialises
PREPARED: dict[tuple, "Prepared | None"] = {}  # None: Triton's `run`, each time
_KERNELS: dict[int, tuple] = {}  # by its id: the kernel, kept so that no other has this id, and which are constants


class Prepared(NamedTuple):
    """A compiled kernel, and the constants behind the arguments that are given in order."""

    compiled: object
    constants: tuple


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> bool:
    """`kernel[grid](*arguments, **options)` on the device of the first argument, a tensor.

    arguments: in the kernel's order; what it has behind them are constants, among the options by name.
    """
    device = arguments[0].get_device()
    if device < 0 or not _is_readable(kernel):
        return gpu.launch.__wrapped__(kernel, grid, *arguments, **options)
    if device == torch.cuda.current_device():
        return _launch(device, kernel, grid, arguments, options)
    with torch.cuda.device(device):
        return _launch(device, kernel, grid, arguments, options)


def _launch(device: int, kernel, grid: tuple[int, ...], arguments: tuple, options: dict) -> bool:
    values, key = _values_and_key(device, kernel, arguments)
    key = None if key is None else (*key, *options.items())
    prepared = PREPARED.get(key)
    if prepared is None:
        compiled = kernel[grid](*arguments, **options)
        if key is not None and key not in PREPARED:
            PREPARED[key] = _prepare(kernel, compiled, len(arguments), options)
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


def _is_readable(kernel) -> bool:
    """Whether Triton's `run` would do no more than what is known here."""
    return (
        VERSION is not None
        and READ_IN[0] <= VERSION <= READ_IN[1]
        and torch.version.hip is None
        and type(kernel) is JITFunction
        and not kernel.pre_run_hooks
        and not getattr(knobs.runtime.launch_enter_hook, "calls", knobs.runtime.launch_enter_hook)
        and not getattr(knobs.runtime.launch_exit_hook, "calls", knobs.runtime.launch_exit_hook)
    )


def _values_and_key(device: int, kernel, arguments: tuple) -> tuple[list, list | None]:
    """The arguments with tensors as addresses, and all that Triton specialises by; no key where it has to look."""
    if id(kernel) not in _KERNELS:
        _KERNELS[id(kernel)] = kernel, tuple(parameter.is_constexpr for parameter in kernel.params)
    values, key = [], [id(kernel), device]
    for argument, constant in zip(arguments, _KERNELS[id(kernel)][1]):
        kind = type(argument)
        if constant or argument is None:
            key.append(argument)
        elif kind is torch.Tensor or kind is torch.nn.Parameter:
            if argument.get_device() != device:
                return values, None
            dtype, argument = argument.dtype, argument.data_ptr()
            key.append((dtype,) if argument % ALIGNMENT else dtype)
        elif kind is int:
            if not -(2**63) <= argument < 2**63:
                return values, None
            kind = 1 if argument == 1 else 2 if argument % ALIGNMENT else ALIGNMENT
            key.append(kind if -(2**31) <= argument < 2**31 else -kind)
        elif kind is float:
            key.append(float)
        else:
            return values, None
        values.append(argument)
    return values, key


def _prepare(kernel, compiled, given: int, options: dict) -> Prepared | None:
    """None where the kernel has more behind the given arguments than constants, or Triton did not say what it is."""
    behind = kernel.params[given:]
    if not hasattr(compiled, "packed_metadata") or not all(parameter.is_constexpr for parameter in behind):
        return None
    return Prepared(compiled, tuple(options.get(parameter.name, parameter.default) for parameter in behind))

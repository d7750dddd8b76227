"""The named initialisations of Λ, the learnt decay of the RG-LRU.

**Sign.** With the gates wide open (r = 1) a channel keeps a^c of its state a step, where log a = -softplus(Λ). This is
the sign of equation 6 of the paper and of DeepMind's code; the paper also writes a = sigmoid(Λ), which is the other
sign. Λ here is minus the Λ of that sentence: a large Λ forgets fast, a very negative Λ remembers.

**Which initialisation is right?** The paper (section 2.4) draws Λ so that a^c is uniform in [0.9, 0.999]; with c = 8
the stored Λ then lies between softplus^-1(-ln(0.9)/8) = -4.323 and softplus^-1(-ln(0.999)/8) = -8.987. DeepMind's
released code leaves c out: it draws a^2 uniform in [0.9^2, 0.999^2], so that a, not a^c, lies in the range; a^c then
spans 0.430 to 0.992, and the median memory at r = 0.5 is 5.5 steps instead of the paper's 39. RecurrentGemma in
Transformers follows the released code. hippogriff stores linspace(-4.323, -9), the paper's two ends (the second one
rounded) with Λ itself evenly spaced, so that half of the channels have a^c > 0.99. All three are here by name, with a
scale-free variant and a control, because no published comparison says which is best.

Units: `c` multiplies softplus(Λ); `low` and `high` bound a^c (for `recurrent_gemma`: a); memory is counted in tokens.
"""  # SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Callable

import torch


LambdaInit = Callable[[int, float, float, float], torch.Tensor]


def lambda_from_decay(decay: torch.Tensor, c: float) -> torch.Tensor:
    """The stored Λ, float32, for which exp(-c * softplus(Λ)) = `decay`, element by element.

    Args:
        decay: a^c, the share of the state kept in one step at r = 1, in (0, 1), float64.
        c: the exponent, > 0.
    """
    # softplus^-1(z) = log(expm1(z)) = z + log(1 - exp(-z)) at z = -log(a^c) / c; the second form cannot overflow
    z = -torch.log(decay) / c
    return (z + torch.log(-torch.expm1(-z))).float()


def uniform(width: int, c: float, low: float, high: float) -> torch.Tensor:
    """a^c uniform in [low, high]. Source: Griffin, section 2.4."""
    return lambda_from_decay(_uniform_draw(width, low, high), c)


def recurrent_gemma(width: int, c: float, low: float, high: float) -> torch.Tensor:
    """a^2 uniform in [low^2, high^2]: `a` itself lies in the range. Source: DeepMind's code, `rnn_param_init`.

    Differs: from the paper, which bounds a^c; `c` is ignored, as it is there.
    """
    a_squared = _uniform_draw(width, low**2, high**2) + 1e-8  # the 1e-8 is the source's
    return lambda_from_decay(a_squared.sqrt(), 1.0)


def hippogriff(width: int, c: float, low: float, high: float) -> torch.Tensor:
    """Λ evenly spaced between its values for `low` and `high`; not random. Source: hippogriff, `forget_base`.

    Differs: from hippogriff, which rounds the end -8.987 to -9.
    """
    ends = lambda_from_decay(torch.tensor([low, high], dtype=torch.float64, device="cpu"), c).tolist()
    return torch.linspace(ends[0], ends[1], width, dtype=torch.float32)


def log_uniform_memory(width: int, c: float, low: float, high: float) -> torch.Tensor:
    """Memory length 1 / (1 - a^c) log-uniform between its values for `low` and `high`: every time scale equally often.

    Source: the scale-free form of Mamba's dt (arXiv 2312.00752) and of chrono initialisation (arXiv 1804.11188).
    """
    log_memory = _uniform_draw(width, -math.log1p(-low), -math.log1p(-high))
    return lambda_from_decay(-torch.expm1(-log_memory), c)  # 1 - 1/tau


def constant(width: int, c: float, low: float, high: float) -> torch.Tensor:
    """Every channel at the geometric mean of the range: the control without a spread of time scales."""
    return lambda_from_decay(torch.full((width,), math.sqrt(low * high), dtype=torch.float64), c)


def _uniform_draw(width: int, low: float, high: float) -> torch.Tensor:
    # float64, because in float32 a decay close to 1 rounds to 1 and its Λ to minus infinity.
    return torch.empty(width, dtype=torch.float64).uniform_(low, high)


LAMBDA_INITS: dict[str, LambdaInit] = {
    "uniform": uniform,
    "recurrent_gemma": recurrent_gemma,
    "hippogriff": hippogriff,
    "log_uniform_memory": log_uniform_memory,
    "constant": constant,
}


def find_lambda_init(name: str) -> LambdaInit:
    """The registered function; ValueError for a name that is not."""
    if name not in LAMBDA_INITS:
        known = sorted(LAMBDA_INITS)
        raise ValueError(f"lambda_init = {name!r}: allowed are {known}; call register_lambda_init(name, fn) first")
    return LAMBDA_INITS[name]


def register_lambda_init(name: str, fn: LambdaInit) -> None:
    """Makes `fn` selectable as `GriffinConfig(lambda_init=name)`.

    Args:
        name: a new name; raises ValueError when another function has it already.
        fn: fn(width, c, low, high) -> stored Λ, shape (width,), float32. Called once for each recurrent layer, in the
            order of the layers, under PyTorch's random state.
    """
    if not isinstance(name, str) or not callable(fn):
        raise ValueError(f"register_lambda_init({name!r}, {fn!r}): allowed are a string and a function")
    if LAMBDA_INITS.get(name, fn) is not fn:
        raise ValueError(f"register_lambda_init: name {name!r} is taken; registered names: {sorted(LAMBDA_INITS)}")
    LAMBDA_INITS[name] = fn

"""The state of generations as an object: everything the model remembers of some rows of tokens, of the same size for
every length. Rows can be picked, repeated and put together; states can be saved and resumed elsewhere.

Legend: B rows, C RG-LRU channels, W taps of the convolution, H_kv key heads, K head dimension, V vocabulary,
S attention slots: min(tokens of the longest row, attention_window_size - 1).
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import DynamicCache

from ..configuration_griffin import GriffinConfig


FORMAT = "griffin generation state, version 1"
# What the meaning of a state depends on, besides the weights.
FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "layer_types",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "attention_window_size",
    "lru_width",
    "num_gate_blocks",
    "conv1d_width",
    "rg_lru_c",
    "final_logit_softcapping",
    "scale_embeddings",
    "rope_parameters",
    "hidden_activation",
    "rms_norm_eps",
)
SAMPLED_WEIGHTS = 256  # of each parameter, for the fingerprint
MOST_TOKENS = 2**53  # of a row; positions beyond are no longer counted exactly by all that reads them


@dataclass(frozen=True, eq=False)
class GenerationState:
    """What a Griffin knows after reading B rows of tokens. Nothing changes it: picking and joining rows copies.

    config: the model's. lengths: tokens that each row has read. logits (B, V): for the next token of each row.
    layers: for each layer its convolution state (B, C, W) and recurrent state (B, C) float32; or its keys and values
    (B, H_kv, S, K), right-aligned: row b fills the last min(lengths[b], S) slots.
    """

    config: GriffinConfig
    lengths: tuple[int, ...]
    logits: torch.Tensor
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: int | slice | Sequence[int]) -> "GenerationState":
        """One row by its number, or several by a slice or a list of numbers, each as often as it is named."""
        numbers = _row_numbers(rows, len(self))
        index = torch.tensor(list(numbers), dtype=torch.long, device=self.logits.device)
        lengths = tuple(self.lengths[n] for n in numbers)
        layers = [tuple(tensor[index] for tensor in pair) for pair in self.layers]
        return _aligned(self.config, lengths, self.logits[index], layers)

    def fork(self, copies: int) -> "GenerationState":
        """Each row `copies` times, side by side: N continuations of one prompt without reading it N times."""
        if not isinstance(copies, Integral) or isinstance(copies, bool) or copies < 1:
            raise ValueError(f"copies = {copies!r}: allowed are whole numbers from 1")
        return self[[row for row in range(len(self)) for _ in range(copies)]]

    @staticmethod
    def concatenate(states: Sequence["GenerationState"]) -> "GenerationState":
        """All rows of several states of one model, whatever their lengths."""
        states = list(states)
        if not states:
            raise ValueError("states is empty: allowed is at least one")
        for index, state in enumerate(states):
            check_is_state(f"states[{index}]", state)
        for state in states[1:]:
            check_same_model(states[0].config, state.config, "states")
            _check_same_tensors(states[0], state)
        config = states[0].config
        layers = []
        for kind, pairs in zip(config.layer_types, zip(*(state.layers for state in states))):
            if kind == "sliding_attention":
                slots = max(keys.shape[2] for keys, _ in pairs)
                pairs = [tuple(_widened(tensor, slots) for tensor in pair) for pair in pairs]
            layers.append(tuple(torch.cat(tensors) for tensors in zip(*pairs)))
        lengths = tuple(length for state in states for length in state.lengths)
        return _aligned(config, lengths, torch.cat([state.logits for state in states]), layers)

    @staticmethod
    def from_cache(
        config: GriffinConfig, cache: DynamicCache, lengths: Sequence[int], logits: torch.Tensor
    ) -> "GenerationState":
        """Copies a cache whose rows hold `lengths` tokens, without padding behind or between them."""
        layers = []
        for kind, layer in zip(config.layer_types, cache.layers):
            if kind == "sliding_attention":
                layers.append((layer.keys, layer.values))
            else:
                layers.append((layer.conv_states[0].clone(), layer.recurrent_states[0].clone()))
        return _aligned(config, tuple(lengths), logits, layers)

    def to_cache(self) -> tuple[DynamicCache, torch.Tensor | None]:
        """A cache of its own, and which of its slots (B, S) are real, or None where all are."""
        cache = DynamicCache(config=self.config)
        for index, (kind, (first, second)) in enumerate(zip(self.config.layer_types, self.layers)):
            if kind == "sliding_attention":
                cache.update(first, second, index)
            else:
                cache.update_conv_state(first, index)
                cache.update_recurrent_state(second, index)
        return cache, self._real_slots()

    def _real_slots(self) -> torch.Tensor | None:
        if "sliding_attention" not in self.config.layer_types:
            return None
        slots = self.layers[self.config.layer_types.index("sliding_attention")][0].shape[2]
        if min(self.lengths, default=slots) >= slots:
            return None
        empty = slots - torch.tensor(self.lengths, device=self.logits.device)
        return (torch.arange(slots, device=self.logits.device) >= empty[:, None]).long()

    def check(self, model: torch.nn.Module) -> None:
        """Raises ValueError where the state cannot be one of `model`: another shape, dtype or device."""
        check_same_model(model.config, self.config, "state")
        rows = {len(tensor) for pair in self.layers for tensor in pair}
        if len(self.layers) != len(self.config.layer_types) or rows != {len(self)} or len(self.logits) != len(self):
            raise ValueError(
                f"state has {len(self.layers)} layers with rows {sorted(rows)}, and {len(self.logits)} rows of logits: "
                f"allowed are {len(self.config.layer_types)} layers, with {len(self)} rows in each"
            )
        device = model.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else model.dtype
        if self.logits.dtype != dtype or self.logits.device != device:
            raise ValueError(
                f"state is {self.logits.dtype} on {self.logits.device}: allowed is the model's {dtype} on {device}"
            )


def save_state(state: GenerationState, model: torch.nn.Module, path: str | os.PathLike) -> None:
    """Writes the state to one safetensors file, all or nothing."""
    check_is_state("state", state)
    state.check(model)
    tensors = {"logits": state.logits, "lengths": torch.tensor(state.lengths, dtype=torch.long)}
    for index, (first, second) in enumerate(state.layers):
        tensors |= {f"layers.{index}.0": first, f"layers.{index}.1": second}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, **_description(model), "checksum": _checksum(tensors)}
    folder, name = os.path.split(os.path.abspath(path))
    descriptor, unfinished = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
    os.close(descriptor)
    try:
        save_file(tensors, unfinished, metadata)
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def load_state(model: torch.nn.Module, path: str | os.PathLike) -> GenerationState:
    """Reads a state back, to the model's device.

    Raises ValueError, naming what differs, for a damaged file and for the state of a model with another configuration,
    dtype or weights.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:  # of a folder or a device, without its name
        raise ValueError(f"{path}: not a readable state file ({error})") from error
    for field, expected in {"format": FORMAT, **_description(model)}.items():
        if metadata.get(field) != expected:
            found = metadata.get(field)
            raise ValueError(f"{path}: {field} = {found}: allowed is this model's, {expected}")
    if _checksum(tensors) != metadata.get("checksum"):
        raise ValueError(f"{path}: the checksum is not that of the contents: the file is damaged")
    lengths = _checked_lengths(path, model.config, tensors)
    layers = tuple(
        (tensors[f"layers.{index}.0"].to(model.device), tensors[f"layers.{index}.1"].to(model.device))
        for index in range(model.config.num_hidden_layers)
    )
    return GenerationState(model.config, lengths, tensors["logits"].to(model.device), layers)


def _checked_lengths(path, config, tensors: dict[str, torch.Tensor]) -> tuple[int, ...]:
    """The lengths of a file's rows. A right checksum does not make a right state: whoever wrote the file made both.

    Raises ValueError for tensors that are not those of so many rows of such lengths.
    """
    lengths = tensors.get("lengths")
    if lengths is None or lengths.dim() != 1 or lengths.dtype != torch.long:
        raise ValueError(f"{path}: lengths is {lengths}: allowed are whole numbers, one a row")
    lengths = tuple(lengths.tolist())
    if not all(0 < length <= MOST_TOKENS for length in lengths):
        raise ValueError(f"{path}: lengths = {lengths}: allowed are 1 to {MOST_TOKENS} tokens a row")
    for name, shape in _shapes(config, lengths).items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise ValueError(f"{path}: {name} has shape {found}: allowed is {shape} for lengths {lengths}")
    for name, dtype in _dtypes(config, tensors["logits"].dtype).items():
        if tensors[name].dtype != dtype or not dtype.is_floating_point:
            raise ValueError(f"{path}: {name} is {tensors[name].dtype}: allowed is {dtype}, a floating dtype")
    if unknown := tensors.keys() - _shapes(config, lengths).keys():
        raise ValueError(f"{path}: {min(unknown)}: allowed are logits, lengths and those of the model's layers")
    return lengths


def _shapes(config, lengths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Of each tensor in the file of a state."""
    rows, slots = len(lengths), min(max(lengths, default=0), config.attention_window_size - 1)
    keys = (rows, config.num_key_value_heads, slots, config.head_dim)
    shapes = {"lengths": (rows,), "logits": (rows, config.vocab_size)}
    for index, kind in enumerate(config.layer_types):
        recurrent = ((rows, config.lru_width, config.conv1d_width), (rows, config.lru_width))
        pair = (keys, keys) if kind == "sliding_attention" else recurrent
        shapes |= {f"layers.{index}.{number}": shape for number, shape in enumerate(pair)}
    return shapes


def _dtypes(config, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The same of a state with logits in `dtype`: only what recurs is always float32."""
    dtypes = {"logits": dtype}
    for index, kind in enumerate(config.layer_types):
        second = dtype if kind == "sliding_attention" else torch.float32
        dtypes |= {f"layers.{index}.0": dtype, f"layers.{index}.1": second}
    return dtypes


def _row_numbers(rows, count: int) -> Sequence[int]:
    """Of an index into `count` rows. Raises IndexError for a row that is not there, TypeError for what names none."""
    if isinstance(rows, slice):
        return range(count)[rows]
    if hasattr(rows, "tolist"):
        rows = rows.tolist()
    rows = list(rows) if isinstance(rows, Iterable) else [rows]
    for row in rows:
        if isinstance(row, bool) or not isinstance(row, Integral):
            raise TypeError(f"rows has {row!r}: allowed are numbers of rows, from 0 to {count - 1}, and slices")
        if not -count <= int(row) < count:
            raise IndexError(f"rows has {row}: allowed are -{count} to {count - 1}")
    return [range(count)[row] for row in rows]


def _check_same_tensors(one: "GenerationState", other: "GenerationState") -> None:
    """Logits too: those of rows that go on are empty and take the dtype of the states."""
    for first, second in zip((one.logits, *sum(one.layers, ())), (other.logits, *sum(other.layers, ()))):
        if (first.dtype, first.device) != (second.dtype, second.device):
            raise ValueError(
                f"states has {second.dtype} on {second.device}: allowed is that of the first, {first.dtype} on "
                f"{first.device}"
            )


def check_is_state(name: str, value: object) -> None:
    """By the class's name: a model from the Hub has a class of its own of that name."""
    if type(value).__name__ != GenerationState.__name__:
        raise ValueError(f"{name} is a {type(value).__name__}: allowed is a GenerationState")


def check_same_model(expected: GriffinConfig, found: GriffinConfig, name: str) -> None:
    """Raises ValueError naming the first field of two configurations on which the meaning of a state depends."""
    for field in FIELDS:
        one, other = getattr(expected, field), getattr(found, field)
        if one != other:
            raise ValueError(f"{name}: {field} = {other}: allowed is this model's, {one}")


def _description(model) -> dict[str, str]:
    fields = {field: json.dumps(getattr(model.config, field), sort_keys=True) for field in FIELDS}
    return {**fields, "dtype": str(model.dtype).removeprefix("torch."), "weights": _fingerprint(model)}


@torch.no_grad()
def _fingerprint(model) -> str:
    """Of every parameter's name, shape, dtype and evenly spaced sample: training any of them changes it."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED_WEIGHTS)].contiguous()
        digest.update(sample.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()


def _aligned(config, lengths, logits, layers) -> GenerationState:
    """A state of these rows with no more attention slots than the longest of them fills; keeps nothing larger alive."""
    slots = min(max(lengths, default=0), config.attention_window_size - 1)
    layers = [
        tuple(tensor[:, :, tensor.shape[2] - slots :].clone() for tensor in pair)
        if kind == "sliding_attention"
        else tuple(pair)
        for kind, pair in zip(config.layer_types, layers)
    ]
    return GenerationState(config, tuple(lengths), logits, tuple(layers))


def _widened(tensor: torch.Tensor, slots: int) -> torch.Tensor:
    """(B, H_kv, S, K) with empty slots in front, up to `slots`."""
    return torch.nn.functional.pad(tensor, (0, 0, slots - tensor.shape[2], 0))

"""A recurrent layer's convolution and RG-LRU over vLLM's slots: one custom operator, which vLLM does not look into.

vLLM lays the tokens of a step end to end, requests that decode (one token each) before those that prefill. Each request
owns a slot: the last W - 1 inputs of the convolution, (W - 1, C) in the model's dtype, and h, (C,) float32.

Legend: T tokens of the step, N requests, C channels of this rank, W taps.
"""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from ...causal_conv1d import CausalConv1d, convolve
from ...configuration_griffin import GriffinConfig
from ...kernels.convolution_varlen import causal_conv1d_varlen
from ...rg_lru import RGLRU


def state_shapes(config: GriffinConfig, ranks: int) -> tuple[tuple[int, int], tuple[int]]:
    """Of one slot on one rank: the convolution's past inputs and h."""
    channels = config.lru_width // ranks
    return (config.conv1d_width - 1, channels), (channels,)


def state_dtypes(vllm_config: VllmConfig) -> tuple[torch.dtype, torch.dtype]:
    return vllm_config.model_config.dtype, torch.float32


class Recurrence(nn.Module, MambaBase):
    """Convolution and RG-LRU of this rank's channels, whole gate blocks of them; parameters split along the first axis.

    Λ and its arithmetic stay float32, whatever the model's dtype.
    """

    def __init__(self, config: GriffinConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.ranks = get_tensor_model_parallel_world_size()
        self.config, self.prefix, self.dtypes = config, prefix, state_dtypes(vllm_config)
        channels = config.lru_width // self.ranks
        self.conv_1d = CausalConv1d(channels, config.conv1d_width)
        self.rg_lru = RGLRU(channels, config.num_gate_blocks // self.ranks, config.rg_lru_c)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
            set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})
        self.kv_cache = (torch.tensor([]), torch.tensor([]))  # vLLM binds the slots here
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return state_shapes(self.config, self.ranks)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self.dtypes

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.SHORT_CONV  # its metadata are all that is needed: slots, starts, who goes on

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, C) -> (T, C)"""
        hidden = torch.empty_like(x)
        torch.ops.vllm.griffin_recurrence(x, hidden, self.prefix)
        return hidden

    def run(self, x: torch.Tensor, hidden: torch.Tensor) -> None:
        """Writes `hidden`; nothing is read from the device, and decode is the same calls whatever the requests are."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures its memory: no request has a slot yet
            hidden.copy_(self._sequences(x, *self._no_states(x))[0])
            return
        metadata = metadata[self.prefix]
        decodes, prefills = 0, metadata.num_prefill_tokens
        if metadata.num_decodes:
            slots = metadata.state_indices_tensor_d[:, 0].long()  # with those that pad a CUDA graph: slot 0 is nobody's
            decodes = metadata.num_decode_tokens if prefills else slots.shape[0]
            hidden[:decodes] = self._over_slots(self._decode, x[:decodes], slots[:decodes])
        if prefills:
            rows = slice(decodes, decodes + prefills)
            slots = metadata.state_indices_tensor_p.flatten().long()
            sequences = (metadata.query_start_loc_p, metadata.has_initial_states_p.logical_not())
            hidden[rows] = self._over_slots(self._sequences, x[rows], slots, *sequences)

    def _over_slots(self, function, x, slots, *arguments):
        before = tuple(cache[slots] for cache in self.kv_cache)
        hidden, *after = function(x, *before, *arguments)
        for cache, state in zip(self.kv_cache, after):
            cache[slots] = state
        return hidden

    def _decode(self, x, past, state):
        """One token of N requests: x (N, C), past (N, W - 1, C), state (N, C) -> hidden and both states."""
        window = torch.cat((past, x[:, None]), dim=1)
        y = convolve(window, self.conv_1d.weight, self.conv_1d.bias, None)
        hidden, state = self.rg_lru(y, state=state)
        return hidden[:, 0], window[:, 1:], state

    def _sequences(self, x, past, state, cu_seqlens, starts):
        """N requests end to end: x (T, C), past (N, W - 1, C), state (N, C) -> hidden (T, C) and both states."""
        past = nn.functional.pad(past.transpose(1, 2), (1, 0))  # (N, C, W)
        weights = (self.conv_1d.weight, self.conv_1d.bias)
        y, past = causal_conv1d_varlen(x[None], past, *weights, cu_seqlens, starts)
        hidden, state = self.rg_lru(y, state=state, cu_seqlens=cu_seqlens, starts=starts)
        return hidden[0], past[..., 1:].transpose(1, 2), state

    def _no_states(self, x):
        states = [x.new_zeros(1, *shape, dtype=dtype) for shape, dtype in zip(self.get_state_shape(), self.dtypes)]
        cu_seqlens = torch.arange(2, dtype=torch.int32, device=x.device) * x.shape[0]
        return *states, cu_seqlens, torch.ones(1, dtype=torch.bool, device=x.device)


def griffin_recurrence(x: torch.Tensor, hidden: torch.Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].run(x, hidden)


direct_register_custom_op(op_name="griffin_recurrence", op_func=griffin_recurrence, mutates_args=["hidden"])

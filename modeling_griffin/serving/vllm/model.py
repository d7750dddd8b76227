"""Griffin of vLLM's own parts: its parallel and quantised linear layers, its attention, its norms, its head.

Parameters have the checkpoint's names, except where projections that read the same input are one product here.

Legend: T tokens of the step, D hidden size, C RG-LRU channels.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import GeluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsLoRA, SupportsMambaPrefixCaching
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from ...configuration_griffin import GriffinConfig
from .recurrence import Recurrence, state_dtypes, state_shapes


class GriffinRecurrentBlock(nn.Module):
    """Convolution and RG-LRU, times a GeLU gate (section 2.4)."""

    def __init__(self, config: GriffinConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        quantisation, width = vllm_config.quant_config, config.lru_width
        self.linear_yx = MergedColumnParallelLinear(
            config.hidden_size, [width, width], quant_config=quantisation, prefix=f"{prefix}.linear_yx"
        )
        self.linear_out = RowParallelLinear(
            width, config.hidden_size, quant_config=quantisation, prefix=f"{prefix}.linear_out"
        )
        self.recurrence = Recurrence(config, vllm_config, f"{prefix}.recurrence")
        self.act_and_mul = GeluAndMul(approximate="tanh")

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        y, x = self.linear_yx(hidden_states)[0].chunk(2, dim=-1)
        x = self.recurrence(x.contiguous())
        return self.linear_out(self.act_and_mul(torch.cat((y, x), dim=-1)))[0]


class GriffinAttention(nn.Module):
    """Local attention over the last W tokens (section 2.3)."""

    def __init__(self, config: GriffinConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        heads, dim, quantisation = config.num_attention_heads, config.head_dim, vllm_config.quant_config
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, dim, heads, config.num_key_value_heads, bias=False, quant_config=quantisation,
            prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            heads * dim, config.hidden_size, quant_config=quantisation, prefix=f"{prefix}.o_proj"
        )
        key_heads = self.qkv_proj.num_kv_heads
        self.widths = [self.qkv_proj.num_heads * dim, key_heads * dim, key_heads * dim]
        self.rotary_emb = get_rope(
            dim, vllm_config.model_config.max_model_len, rope_parameters=dict(config.rope_parameters)
        )
        self.attn = Attention(
            self.qkv_proj.num_heads, dim, dim**-0.5, num_kv_heads=key_heads, cache_config=vllm_config.cache_config,
            quant_config=quantisation, per_layer_sliding_window=config.attention_window_size, prefix=f"{prefix}.attn",
        )  # fmt: skip

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv_proj(hidden_states)[0].split(self.widths, dim=-1)
        query, key = self.rotary_emb(positions, query.contiguous(), key.contiguous())
        return self.o_proj(self.attn(query, key, value.contiguous()))[0]


class GriffinMLP(nn.Module):
    """Gated MLP (section 2.2)."""

    def __init__(self, config: GriffinConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        quantisation, width = vllm_config.quant_config, config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [width, width], quant_config=quantisation, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            width, config.hidden_size, quant_config=quantisation, prefix=f"{prefix}.down_proj"
        )
        self.act_and_mul = GeluAndMul(approximate="tanh")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_and_mul(self.gate_up_proj(hidden_states)[0]))[0]


TEMPORAL_BLOCKS: dict[str, type[nn.Module]] = {
    "linear_attention": GriffinRecurrentBlock,
    "sliding_attention": GriffinAttention,
}


class GriffinDecoderLayer(nn.Module):
    def __init__(self, config: GriffinConfig, index: int, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        block = TEMPORAL_BLOCKS[config.layer_types[index]]
        self.temporal_pre_norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.temporal_block = block(config, vllm_config, f"{prefix}.temporal_block")
        self.channel_pre_norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_block = GriffinMLP(config, vllm_config, f"{prefix}.mlp_block")

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.temporal_block(positions, self.temporal_pre_norm(hidden_states))
        return hidden_states + self.mlp_block(self.channel_pre_norm(hidden_states))


@support_torch_compile
class GriffinModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [
                GriffinDecoderLayer(config, i, vllm_config, f"{prefix}.layers.{i}")
                for i in range(config.num_hidden_layers)
            ]
        )
        self.final_norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        # Rounded to bfloat16, whatever the model's dtype, as in DeepMind's code.
        scale = torch.tensor(config.hidden_size**0.5, dtype=torch.bfloat16, device="cpu").item()
        self.embedding_scale = scale if config.scale_embeddings else None

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.embedding_scale is not None:
            hidden_states = hidden_states * self.embedding_scale
        for layer in self.layers:
            hidden_states = layer(positions, hidden_states)
        return self.final_norm(hidden_states)


class GriffinForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsLoRA, SupportsMambaPrefixCaching):
    """Griffin, and Hawk, which has no attention layer. Pipeline parallelism is not declared, so vLLM refuses it."""

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
        "linear_yx": ["linear_y", "linear_x"],
    }
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={
            ".temporal_block.conv_1d.": ".temporal_block.recurrence.conv_1d.",
            ".temporal_block.rg_lru.": ".temporal_block.recurrence.rg_lru.",
        },
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
            ".linear_y": (".linear_yx", 0),
            ".linear_x": (".linear_yx", 1),
        },
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.model = GriffinModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )  # fmt: skip
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size, soft_cap=config.final_logit_softcapping)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return state_shapes(vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return state_dtypes(vllm_config)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple:
        return MambaStateCopyFuncCalculator.mamba1_state_copy_func()  # both states of a slot, as they are

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

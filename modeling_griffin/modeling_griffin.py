"""Griffin and Hawk (De et al. 2024, arXiv 2402.19427) as Transformers models.

Names follow Transformers at the surface and the paper inside the layers. Where the paper is silent or differs, the code
follows DeepMind's released RecurrentGemma; each such place is marked `Differs:`.

Legend: B batch, T time, D hidden size, C RG-LRU channels, H heads, K head dimension, W attention window, V vocabulary.
"""  # SPDX-License-Identifier: Apache-2.0

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_layers import read_in_chunks
from .cache_name import CACHE_NAME, takes_cache_by_either_name
from .causal_conv1d import CausalConv1d
from .causal_lm_loss import CausalLMName, causal_lm_loss
from .configuration_griffin import GriffinConfig
from .documents import Documents, masks_for_generate, read_layout
from .elementwise import add_rms_norm, gated, gated_linears, linears, rms_norm, rotate
from .lambda_init import find_lambda_init
from .local_attention import OWN_ATTENTION
from .padding import read_mask
from .rg_lru import RGLRU, BlockDiagonalLinear, Decay
from .rollback import bound_drafts, check_drafts, leave_inference_mode, states_to_keep
from .slots import find_slot, require_slot, say_what_is_missing
from .tensor_parallel import check_tensor_parallel, split_like


class GriffinRMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), in float32.

    Differs: the paper does not say how the scale is stored; DeepMind's code stores scale - 1, so that 0 is neutral.
    """

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden_states: torch.Tensor | None, residual: torch.Tensor | None = None) -> torch.Tensor | tuple:
        """(B, T, D) -> (B, T, D); with a residual: the norm of their sum, and the sum. None counts as zeros."""
        if residual is None:
            return rms_norm(hidden_states, self.weight, self.eps)
        return add_rms_norm(hidden_states, residual, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class GriffinRotaryEmbedding(nn.Module):
    """cos and sin (B, T, K * partial_rotary_factor) of the rotary embedding (Su et al. 2021).

    No buffers: frequencies are computed in float32 at each call, so that casting the model does not round them.
    """

    def __init__(self, config: GriffinConfig):
        super().__init__()
        self.theta = config.rope_parameters["rope_theta"]
        # Differs: the paper does not say how much of a head is rotated; DeepMind's code rotates the first half.
        self.dim = int(config.head_dim * config.rope_parameters["partial_rotary_factor"])

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        exponents = torch.arange(0, self.dim, 2, device=x.device, dtype=torch.float32) / self.dim
        angles = position_ids[..., None].float() * self.theta**-exponents
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def eager_attention_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float, dropout: float = 0.0, **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The attention that returns its weights. query (B, H, T, K), key and value (B, H_kv, S, K) -> (B, T, H, K)."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=dtype).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class GriffinAttention(nn.Module):
    """Local multi-query attention over the last W tokens (section 2.3)."""

    def __init__(self, config: GriffinConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.sliding_window = config.attention_window_size
        self.is_causal = True

        query_width, key_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = residual_output(query_width, config)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None, past_key_values: Cache | None = None,
        documents: Documents | None = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        input_shape = hidden_states.shape[:-1]
        per_head = (*input_shape, -1, self.head_dim)
        projected = linears(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (x.view(per_head) for x in projected)
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        order = None if documents is None else documents.order
        if order is not None:
            layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
            query, key, value = order.of_states(query, key, value, layer)

        # Transformers' attention reads it here; a rank of tensor parallelism has other heads than the configuration.
        self.num_key_value_groups = query.shape[1] // key.shape[1]
        attention = OWN_ATTENTION.get(type(attention_mask)) or ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        fixed = {"dropout": dropout, "scaling": self.scaling, "sliding_window": self.sliding_window}
        output, weights = attention(self, query, key, value, attention_mask, **fixed, **kwargs)
        output = output if order is None else order.back(output)
        return linears(output.reshape(*input_shape, -1).contiguous(), self.o_proj)[0], weights


class GriffinRecurrentBlock(nn.Module):
    """Two branches: convolution and RG-LRU, and a GeLU gate; merged by a product (section 2.4)."""

    def __init__(self, config: GriffinConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.linear_x = nn.Linear(config.hidden_size, config.lru_width)
        self.linear_y = nn.Linear(config.hidden_size, config.lru_width)
        self.linear_out = residual_output(config.lru_width, config)
        self.conv_1d = CausalConv1d(config.lru_width, config.conv1d_width)
        self.rg_lru = RGLRU(config.lru_width, config.num_gate_blocks, config.rg_lru_c)
        self.act_fn = ACT2FN[config.hidden_activation]

    def forward(
        self, hidden_states: torch.Tensor, documents: Documents, past_key_values: Cache | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        keep = states_to_keep(past_key_values, self.layer_idx)
        x, y = linears(hidden_states, self.linear_x, self.linear_y)
        conv_state, state = self._read_states(past_key_values, (x.shape[0], x.shape[2], *self.conv_1d.kernel_size))
        document_start = documents.start if documents.packed else None
        keep_inputs = 0 if past_key_values is None else keep
        x, conv_state = self.conv_1d(x, conv_state, document_start, documents.real, keep_inputs)
        x, state = self.rg_lru(x, documents.start, documents.real, state, keep)
        if past_key_values is not None:
            past_key_values.update_conv_state(conv_state, self.layer_idx)
            past_key_values.update_recurrent_state(state, self.layer_idx)
        return linears(gated(self.act_fn, y, x), self.linear_out)[0], None

    def _read_states(self, past_key_values: Cache | None, shape: tuple[int, int, int]):
        """Convolution state (B, C, conv1d_width) = `shape` and recurrent state (B, C); None before the first token."""
        if past_key_values is None or not past_key_values.has_previous_state(self.layer_idx):
            return None, None
        layer = past_key_values.layers[self.layer_idx]
        if layer.conv_states[0].shape != shape:
            found, layer = tuple(layer.conv_states[0].shape), f"layer {self.layer_idx}"
            raise ValueError(f"past_key_values has (rows, channels, taps) = {found} in {layer}: allowed is {shape}")
        # Cloned, because the cache writes in place and the backward pass still needs what was read.
        return layer.conv_states[0].clone(), layer.recurrent_states[0].clone()


class GriffinMLP(nn.Module):
    """Gated MLP: GeLU(x W_gate) * (x W_up), then down (section 2.2)."""

    piece: int | None = None  # tokens at a time, for long rows: training/pieces.py

    def __init__(self, config: GriffinConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = residual_output(config.intermediate_size, config)
        self.act_fn = ACT2FN[config.hidden_activation]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        in_pieces = None if self.piece is None else require_slot("run_in_pieces")(self, hidden_states)
        return self.whole(hidden_states) if in_pieces is None else in_pieces

    def whole(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return linears(gated_linears(self.act_fn, hidden_states, self.gate_proj, self.up_proj), self.down_proj)[0]


def residual_output(in_features: int, config: GriffinConfig) -> nn.Linear:
    """A projection that writes to the residual stream: its initial variance shrinks with depth (DeepMind's code)."""
    linear = nn.Linear(in_features, config.hidden_size)
    linear.init_variance_scale = 2.0 / config.num_hidden_layers
    return linear


TEMPORAL_BLOCKS: dict[str, Any] = {"linear_attention": GriffinRecurrentBlock, "sliding_attention": GriffinAttention}


class GriffinDecoderLayer(GradientCheckpointingLayer):
    """The residual block: norm, temporal mixing, residual; norm, MLP, residual (section 2.1)."""

    def __init__(self, config: GriffinConfig, layer_idx: int):
        super().__init__()
        self.temporal_pre_norm = GriffinRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.temporal_block = TEMPORAL_BLOCKS[config.layer_types[layer_idx]](config, layer_idx)
        self.channel_pre_norm = GriffinRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_block = GriffinMLP(config)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Without gradients nothing is computed again, and checkpointing of older Transformers would drop the cache.
        cls = GradientCheckpointingLayer if torch.is_grad_enabled() else nn.Module
        return cls.__call__(self, *args, **kwargs)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        normed, hidden_states = self.temporal_pre_norm(None, residual=hidden_states)
        mixed, _ = self.temporal_block(normed, **kwargs)
        normed, hidden_states = self.channel_pre_norm(mixed, residual=hidden_states)
        return hidden_states + self.mlp_block(normed)


def blocks_in(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The Griffin blocks among these modules and their parts; of the usual layer without a walk."""
    kinds, blocks = (GriffinAttention, GriffinRecurrentBlock), []
    for module in modules:
        block = getattr(module, "temporal_block", None)
        parts = (block,) if isinstance(block, kinds) else module.modules()
        blocks += [part for part in parts if isinstance(part, kinds)]
    return blocks


def check_places(modules: Iterable[nn.Module], past_key_values: Cache | None) -> None:
    """A block in another one's place of a cache would go on from what that one left there."""
    if past_key_values is None or torch.compiler.is_compiling():
        return
    free = dict(enumerate(past_key_values.is_sliding))
    for block in blocks_in(modules):
        if free.pop(block.layer_idx, None) != isinstance(block, GriffinAttention):
            taken = f"layer_idx = {block.layer_idx} of a {type(block).__name__} is no place of its own in the cache"
            raise ValueError(f"{taken}: allowed is one of its kind in config.layer_types, or use_cache=False")


def config_of_masks(config: GriffinConfig, modules: Iterable[nn.Module]) -> GriffinConfig:
    """A model's configuration; with eager attention, where a block in these modules has another one than the model.

    A block that was copied, or is another model's, has a configuration of its own. What eager attention adds to the
    scores says all, and SDPA takes it too; SDPA's own mask, none for a causal row, would show eager blocks the future.
    """
    for block in blocks_in(modules):
        if isinstance(block, GriffinAttention) and block.config._attn_implementation != config._attn_implementation:
            config = copy.copy(config)
            config._attn_implementation = "eager"
    return config


class GriffinPreTrainedModel(PreTrainedModel):
    """What all Griffin classes share: loading, saving, initial weights."""

    config: GriffinConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GriffinDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keep_in_fp32_modules_strict = ["lambda_bias"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _is_stateful = False  # to Transformers: the cache cannot be rolled back. Griffin's can, see rollback.py
    _can_record_outputs = {"hidden_states": GriffinDecoderLayer, "attentions": GriffinAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """DeepMind's variances: 1 / fan-in; 2 / (layers * fan-in) into the residual stream; 0.01 / taps.

        Differs: the paper does not give them. Leaf by leaf: a block without parameters of its own is not visited.
        """
        if isinstance(module, Decay):
            draw = find_lambda_init(self.config.lambda_init)
            drawn = draw(module.lambda_bias.shape[0], module.c, *self.config.lambda_init_bounds)
            init.copy_(module.lambda_bias, split_like(module.lambda_bias, drawn))
        elif isinstance(module, BlockDiagonalLinear):
            init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
            init.zeros_(module.bias)
        elif isinstance(module, CausalConv1d):
            init.normal_(module.weight, std=(0.01 / module.weight.shape[-1]) ** 0.5)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            scale = getattr(module, "init_variance_scale", 1.0)
            init.normal_(module.weight, std=(scale / module.weight.shape[1]) ** 0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        elif isinstance(module, GriffinRMSNorm):
            init.zeros_(module.weight)

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """Arguments as in Transformers. The installed package saves completely or not at all: `saving/save.py`."""
        save = find_slot("save_model")
        if save is not None:
            return save(self, super().save_pretrained, save_directory, *args, **kwargs)
        with source_file_of_our_class(self):
            super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Arguments and result as in Transformers. The installed package writes a model card: `saving/save.py`."""
        push = find_slot("push_model")
        return super().push_to_hub(repo_id, **kwargs) if push is None else push(self, repo_id, **kwargs)

    @classmethod
    def maybe_distribute_model(cls, model: nn.Module, distributed_config: Any, mesh: Any) -> nn.Module:
        """Arguments and result as in Transformers. The installed package keeps Λ float32: `parallel/fsdp.py`.

        Raises:
            ValueError: for a `tp_size` that the heads, gate blocks or MLP features cannot be shared out by.
        """
        if mesh is not None:
            check_tensor_parallel(model.config, distributed_config.tp_size)
        distribute, stock = find_slot("distribute_model"), super().maybe_distribute_model
        arguments = (model, distributed_config, mesh)
        return stock(*arguments) if distribute is None else distribute(stock, *arguments)

    def _resolve_parallel_plans(self, distributed_config) -> tuple[dict[str, str], ...]:
        plans, without = super()._resolve_parallel_plans(distributed_config), find_slot("plans_without_lambda")
        return plans if without is None else without(self, plans)


@contextmanager
def source_file_of_our_class(model: nn.Module) -> Iterator[None]:
    """Lets stock saving copy the source of the class that has some: FSDP2 puts a generated FSDP<name> before it."""
    own = next(cls for cls in type(model).__mro__ if not cls.__name__.startswith("FSDP"))
    generated = type(model)
    before = generated.__module__, generated.__name__
    try:
        if generated is not own:
            generated.__module__, generated.__name__ = own.__module__, own.__name__
        yield
    finally:
        if generated is not own:
            generated.__module__, generated.__name__ = before


class GriffinModel(GriffinPreTrainedModel):
    """Embeddings, residual blocks and final norm: token ids in, hidden states out."""

    def __init__(self, config: GriffinConfig):
        super().__init__(config)
        config.validate_architecture()  # `from_pretrained(..., field=value)` sets fields after construction
        # Without padding_idx: padding is masked, and where the padding token also ends documents it has to learn.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([GriffinDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.final_norm = GriffinRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = GriffinRotaryEmbedding(config)
        self.embedding_scale = torch.tensor(config.hidden_size**0.5, dtype=torch.bfloat16, device="cpu").item()
        self.gradient_checkpointing = False
        say_what_is_missing()
        self.post_init()

    @takes_cache_by_either_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: (B, T); or inputs_embeds (B, T, D) in its place.
            attention_mask: (B, S + T) with S the tokens in the cache, 0 for padding and any one other value for real
                tokens. Padding may stand anywhere: all layers skip it. Only static caches count it as part of the
                window, and raise where it stands between real tokens and the row is longer than the window.
            position_ids: (B, T), positions within each document; 0 starts a document. None: from the packing arguments,
                else from the mask, else counting on from the cache.
            past_key_values, or cache: a `DynamicCache(config=...)` or `StaticCache(config=...)`; updated in place.
            cu_seq_lens_q (documents + 1,), seq_idx (B, T): packed documents, as data collators give them.

        Raises:
            ValueError: for arguments that contradict each other or cannot be honoured.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds: allowed is exactly one of them")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[0] == 0 or inputs_embeds.shape[1] == 0:
            shape = tuple(inputs_embeds.shape[:-1])
            raise ValueError(f"input_ids or inputs_embeds has shape {shape}: allowed is (batch, time), both above 0")
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if checkpointing and past_key_values is not None:
            raise ValueError("past_key_values with gradient checkpointing: allowed is one of them, layers run twice")
        if use_cache and past_key_values is None and not checkpointing:
            past_key_values = DynamicCache(config=self.config)

        leave_inference_mode(past_key_values)
        config = config_of_masks(self.config, self.layers)
        attention_mask, position_ids, documents = read_layout(
            config, inputs_embeds, attention_mask, position_ids, past_key_values, cu_seq_lens_q, seq_idx
        )
        check_places(self.layers, past_key_values)
        hidden_states = inputs_embeds
        if self.config.scale_embeddings:
            # Differs: the paper does not scale; RecurrentGemma does, by a number rounded to bfloat16.
            hidden_states = hidden_states * self.embedding_scale
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        shared = {"position_embeddings": position_embeddings, "attention_mask": attention_mask, "documents": documents}
        for layer in self.layers:
            hidden_states = layer(hidden_states, past_key_values=past_key_values, **shared, **kwargs)
        hidden_states = self.final_norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: past_key_values})


class GriffinForCausalLM(GriffinPreTrainedModel, GenerationMixin):
    """Griffin with a language-model head.

    `generate` is Transformers'. Its inner loops, `_sample`, `_beam_search` and `_assisted_decoding`, go to the
    installed package, which runs a request on a recorded step where that is exact, and else to Transformers'.
    """

    training_recorder = None  # of the installed package: `record_training` in `training/record.py`
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: GriffinConfig):
        super().__init__(config)
        self.model = GriffinModel(config)
        self.loss_type = "ForCausalLM"  # Transformers reads it from the class's name, which a subclass may have changed
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _get_name(self) -> str:
        """What `Trainer` asks before it smooths labels: whether to shift them."""
        return CausalLMName(super()._get_name())

    @PreTrainedModel.loss_function.getter
    def loss_function(self) -> Callable:
        """`causal_lm_loss`, where Transformers would take `ForCausalLMLoss` and no other loss was set."""
        if hasattr(self, "_loss_function") or self.loss_type not in ("ForCausalLM", None):
            return super().loss_function
        return causal_lm_loss

    @takes_cache_by_either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Arguments as in `GriffinModel.forward`, and:

        labels: (B, T); the loss predicts labels[t + 1] from tokens up to t, -100 is ignored.
        logits_to_keep: logits of the last so many tokens only (0: of all), or of the tokens with these indices.
        kwargs: `num_items_in_batch` and `shift_labels` go to the loss.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs |= {"inputs_embeds": inputs_embeds, "use_cache": use_cache, **kwargs}
        if self.training_recorder is not None and not logits_to_keep and past_key_values is None:
            recorded = self.training_recorder.run(self, labels=labels, **inputs)
            if recorded is not None:
                return recorded
        outputs = self.model(past_key_values=past_key_values, **inputs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    _fast_generation_devices = ("cpu", "cuda")

    def _sample(self, input_ids: torch.LongTensor, **kwargs):
        """Greedy decoding and sampling: `decode/generate.py`, or Transformers' loop."""
        decode = find_slot("sample")
        if decode is None:
            return super()._sample(input_ids, **kwargs)
        return decode(self, super()._sample, input_ids, **kwargs)

    def _beam_search(self, input_ids: torch.LongTensor, **kwargs):
        """Beams, greedy or sampled: `decode/generate.py`, or Transformers' loop."""
        decode = find_slot("beam_search")
        if decode is None:
            return super()._beam_search(input_ids, **kwargs)
        return decode(self, super()._beam_search, input_ids, **kwargs)

    def _assisted_decoding(self, input_ids: torch.LongTensor, **kwargs):
        """Speculative decoding: `decode/speculative/generate.py`, or Transformers' loop."""
        decode = find_slot("decode_with_drafts")
        if decode is None:
            return self._assisted_decoding_by_transformers(input_ids, **kwargs)
        return decode(self, self._assisted_decoding_by_transformers, input_ids, **kwargs)

    def _assisted_decoding_by_transformers(self, *args, **kwargs):
        """With a cache for Hawk, which `generate` leaves to the model: assisted decoding asks for one beforehand."""
        check_drafts(kwargs.get("generation_config"))
        if kwargs.get(CACHE_NAME) is None and kwargs.get("use_cache"):
            kwargs[CACHE_NAME] = DynamicCache(config=self.config)
        return super()._assisted_decoding(*args, **kwargs)

    def prefill(self, input_ids: torch.Tensor, state: Any = None, chunk_size: int = 2048) -> Any:
        """Reads tokens into a `GenerationState`: `serving/batch.py`."""
        return require_slot("prefill")(self, input_ids, state, chunk_size)

    def generate_batch(self, queue: Iterable | None = None, generation_config: Any = None, **options: Any) -> Any:
        """Many requests side by side, all results; Transformers' method of that name too: `serving/batch.py`."""
        return require_slot("generate_batch")(self, queue, generation_config, **options)

    def stream_batch(self, queue: Iterable, **options: Any) -> Iterator:
        """Many requests side by side, token by token: `serving/batch.py`."""
        return require_slot("stream_batch")(self, queue, **options)

    def save_state(self, state: Any, path: str | PathLike) -> None:
        """Writes a `GenerationState` to one safetensors file, all or nothing: `serving/state.py`."""
        require_slot("save_state")(state, self, path)

    def load_state(self, path: str | PathLike) -> Any:
        """The `GenerationState` in a file of `save_state`, on this model's device: `serving/state.py`."""
        return require_slot("load_state")(self, path)

    def _get_candidate_generator(self, *args, **kwargs):
        return bound_drafts(super()._get_candidate_generator(*args, **kwargs))

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        """With a mask of ones and zeros, whichever numbers it was given in: `generate` adds up its values."""
        if not isinstance(mask := model_kwargs.get("attention_mask"), dict | None):
            model_kwargs["attention_mask"] = read_mask(mask)
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        """For Hawk, whose cache cannot tell Transformers where a chunk of the prompt begins."""
        if generation_config.prefill_chunk_size is None or "sliding_attention" in self.config.layer_types:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        return read_in_chunks(self, input_ids, generation_config.prefill_chunk_size, model_kwargs)

    def _supports_default_dynamic_cache(self) -> bool:
        """False for Hawk: `generate` asks a cache it makes itself for a length that only attention layers know."""
        return "sliding_attention" in self.config.layer_types

    @classmethod
    def from_recurrent_gemma(cls, source: str | PathLike | PreTrainedModel, **kwargs: Any) -> "GriffinForCausalLM":
        """RecurrentGemma's weights as a Griffin that follows DeepMind's code, in the source's dtype with Λ in float32.

        source: a folder or Hub id of a Transformers checkpoint, or a loaded `RecurrentGemmaForCausalLM`.
        kwargs: as for `from_pretrained`.
        """
        return require_slot("load_recurrent_gemma")(source, cls, **kwargs)

    def create_masks_for_generate(self, config: GriffinConfig, *args: Any, **kwargs: Any) -> dict:
        """`masks_for_generate`, as this model's blocks take them."""
        return masks_for_generate(config_of_masks(config, [self.model]), *args, **kwargs)


class GriffinForSequenceClassification(GriffinPreTrainedModel):
    """Griffin with a classification head on the last real token of each row."""

    accepts_loss_kwargs = False  # the loss is a mean over rows, so that Trainer divides it by accumulation steps itself

    def __init__(self, config: GriffinConfig):
        super().__init__(config)
        self.num_labels, self.loss_type = config.num_labels, "ForSequenceClassification"
        self.model = GriffinModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @takes_cache_by_either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """labels: (B,) class indices, (B, num_labels) for several labels, or (B,) floats for regression.

        The last real token is read from attention_mask; without one, it is the last that is not `pad_token_id`.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs |= {"inputs_embeds": inputs_embeds, "use_cache": use_cache, **kwargs}
        outputs = self.model(past_key_values=past_key_values, **inputs)
        logits = self.score(outputs.last_hidden_state)
        last = self._last_real_token(input_ids, attention_mask, logits.shape[:2], logits.device)
        pooled_logits = logits[torch.arange(logits.shape[0], device=logits.device), last]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=pooled_logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _last_real_token(self, input_ids, attention_mask, shape, device) -> torch.Tensor | int:
        if attention_mask is not None:
            real = attention_mask[:, -shape[1] :].to(device).bool()
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = (input_ids != self.config.pad_token_id).to(device)
        elif shape[0] == 1 or input_ids is None:
            return shape[1] - 1
        else:
            raise ValueError(
                f"attention_mask and config.pad_token_id are None with a batch of {shape[0]} rows: allowed is one of "
                "them, or a single row"
            )
        return (torch.arange(shape[1], device=device) * real).argmax(-1)


class GriffinForTokenClassification(GriffinPreTrainedModel):
    """Griffin with a classification head on every token."""

    def __init__(self, config: GriffinConfig):
        super().__init__(config)
        self.num_labels, self.loss_type = config.num_labels, "ForTokenClassification"
        self.model = GriffinModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @takes_cache_by_either_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """labels: (B, T) class indices, -100 is ignored."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs |= {"inputs_embeds": inputs_embeds, "use_cache": use_cache, **kwargs}
        outputs = self.model(past_key_values=past_key_values, **inputs)
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = self.loss_function(logits, labels, self.config, **kwargs) if labels is not None else None
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


# For peft.LoraConfig. The first three together are every nn.Linear but lm_head, PEFT's "all-linear".
LORA_TARGETS = {
    "recurrent": ["linear_x", "linear_y", "linear_out"],  # target_modules, as the next two
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "gates": ["rg_lru.recurrence_gate.weight", "rg_lru.input_gate.weight"],  # target_parameters: not nn.Linear
    "decay": ["decay"],  # modules_to_save: Λ itself; "lambda_bias" would match nothing, silently
}


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay should touch: all but the RG-LRU's, norms, biases and embeddings.

    Source: the RecurrentGemma report (arXiv 2404.07839) and its fine-tuning recipe. Stock `Trainer` leaves out biases,
    norms, and Λ by its name, but decays the weights of the gates and the embeddings.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    names = []
    for module_name, module in model.named_modules():
        # By name: a model loaded from the Hub has a class of its own of that name.
        is_norm = any(cls.__name__ == GriffinRMSNorm.__name__ for cls in type(module).__mro__)
        if "rg_lru" in module_name.split(".") or is_norm or isinstance(module, nn.Embedding):
            continue
        names += [
            f"{module_name}.{name}" if module_name else name
            for name, parameter in module.named_parameters(recurse=False)
            if not name.endswith("bias") and id(parameter) not in embeddings  # a tied head is the embedding
        ]
    return names


__all__ = [
    "LORA_TARGETS",
    "GriffinForCausalLM",
    "GriffinForSequenceClassification",
    "GriffinForTokenClassification",
    "GriffinModel",
    "GriffinPreTrainedModel",
    "decay_parameter_names",
]

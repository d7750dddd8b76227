"""Tensor parallelism: what is split along which axis, and the two ways of splitting that Transformers lacks.

Heads, gate blocks, channels and MLP features are independent of each other between the projections into a block and
the one out of it: each rank takes its share of them, and only the block's output is summed over ranks. A rank's
channels are whole gate blocks, so that the gates need no other rank.
"""  # SPDX-License-Identifier: Apache-2.0

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer


if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

RECURRENT_PLAN = {
    "linear_x": "colwise",
    "linear_y": "colwise",
    "conv_1d": "griffin_first_axis",
    "rg_lru.recurrence_gate": "griffin_first_axis",
    "rg_lru.input_gate": "griffin_first_axis",
    "rg_lru.decay": "griffin_first_axis",
    "linear_out": "rowwise",
}
ATTENTION_PLAN = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
# The one key-value head of MQA cannot be split: every rank computes it for its own query heads.
SHARED_HEAD_PLAN = {"k_proj": "griffin_shared_head", "v_proj": "griffin_shared_head"}
MLP_PLAN = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}


def tensor_parallel_plan(config: PreTrainedConfig) -> dict[str, str]:
    """The rules for a `GriffinModel` of this configuration: name, with * for the layer's number, to parallel style."""
    plan = {"embed_tokens": "embedding_rowwise"}
    plan |= {f"layers.*.mlp_block.{name}": style for name, style in MLP_PLAN.items()}
    temporal = {}
    if "linear_attention" in config.layer_types:
        temporal |= RECURRENT_PLAN
    if "sliding_attention" in config.layer_types:
        temporal |= ATTENTION_PLAN
        if config.num_key_value_heads == 1:
            temporal |= SHARED_HEAD_PLAN
    return plan | {f"layers.*.temporal_block.{name}": style for name, style in temporal.items()}


def check_tensor_parallel(config: PreTrainedConfig, tp_size: int) -> None:
    """Raises ValueError where heads, gate blocks or MLP features cannot be shared out evenly among `tp_size` ranks."""
    fields = ["intermediate_size"]
    if "linear_attention" in config.layer_types:
        fields.append("num_gate_blocks")  # divides lru_width
    if "sliding_attention" in config.layer_types:
        fields += ["num_attention_heads", "num_key_value_heads"]
    for field in fields:
        value = getattr(config, field)
        if value % tp_size and (field, value) != ("num_key_value_heads", 1):
            also = "1 and " if field == "num_key_value_heads" else ""
            raise ValueError(f"{field} = {value}: allowed with tp_size = {tp_size} are {also}multiples of {tp_size}")


def split_like(parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values of the parameter's whole shape, those of rank 0, split over ranks as the parameter is."""
    if not torch.distributed.is_available() or not isinstance(parameter, DTensor):
        return values
    mesh = parameter.device_mesh
    everywhere = distribute_tensor(values.to(parameter.device), mesh, [Replicate()] * mesh.ndim)
    return everywhere.redistribute(placements=parameter.placements)


class FirstAxisParallel(TensorParallelLayer):
    """Each rank holds its share of the first axis of every parameter, and the module computes with that share alone.

    For channels (convolution, Λ) and gate blocks: weights (blocks, width, width) that the built-in colwise would split
    inside the blocks.
    """

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        return True

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        whole = module._parameters[param]
        share = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
        module._parameters[param] = nn.Parameter(share, requires_grad=whole.requires_grad)


class SharedHeadParallel(TensorParallelLayer):
    """Every rank holds the whole projection, whose output each uses for its own query heads only.

    So each rank's gradient is a part of the whole, and the backward pass sums the parts.
    """

    def transform_output_post_forward(self, module: nn.Module, output: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        if not output.requires_grad:
            return output
        return DTensor.from_local(output, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


# Where this file is loaded several times, from the package and from Hub repositories, the last one's styles are used.
ALL_PARALLEL_STYLES.register("griffin_first_axis", FirstAxisParallel())
ALL_PARALLEL_STYLES.register("griffin_shared_head", SharedHeadParallel())

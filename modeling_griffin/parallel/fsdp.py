"""What the package adds to Transformers' FSDP2 and tensor parallelism: a Λ that stays float32."""

from collections.abc import Callable
from typing import Any

import transformers
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard

from ..tensor_parallel import RECURRENT_PLAN


if distributed.is_available():
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard


def distribute_model(stock: Callable, model: nn.Module, distributed_config: Any, mesh: DeviceMesh | None) -> nn.Module:
    """`PreTrainedModel.maybe_distribute_model`, arguments and result as there, with a Λ that stays float32.

    stock: the method of Transformers. Raises ValueError for a `tp_size` together with an `fsdp_size` where Transformers
    is too old for both.
    """
    if mesh is None:
        return stock(model, distributed_config, mesh)
    if _data_parallel_size(distributed_config) > 1:
        _shard_lambda(model, distributed_config, mesh)
    model = stock(model, distributed_config, mesh)
    # So that the plan says what was sharded.
    model._fsdp_plan |= {replace_layer_number_by_wildcard(name): "free_full_weight" for name in _sharded(model)}
    return model


def plans_without_lambda(model: nn.Module, plans: tuple[dict[str, str], ...]) -> tuple[dict[str, str], ...]:
    """Parallel plans without Λ where `distribute_model` has sharded it already."""
    done = _sharded(model)
    return tuple(
        {name: style for name, style in plan.items() if not done & {name, name.rpartition(".")[0]}} for plan in plans
    )


def _sharded(model: nn.Module) -> set[str]:
    """Names of the modules of a Λ that is sharded."""
    return {name for name, decay in _decay_modules(model).items() if isinstance(decay, FSDPModule)}


def keep_lambda_float32(model: nn.Module, **fully_shard_arguments: Any) -> None:
    """Keeps every Λ float32 in storage, forward pass, gradient and optimizer when FSDP2 runs the model in bfloat16.

    FSDP2 casts by group. This gives each Λ, which sits alone in a module, a group with a policy that casts nothing, and
    who shards the model afterwards leaves that group alone. Call it on every rank before accelerate prepares the model
    (with `Trainer`: before `train`), and set `fsdp_cpu_ram_efficient_loading: false`: that loading begins by moving the
    model to the meta device, Λ with it. `from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=...))`
    needs no call.

    Args:
        model: not sharded yet.
        fully_shard_arguments: `mesh` and `offload_policy`, where the rest of the model has others than the defaults.
    """
    for decay in _decay_modules(model).values():
        if not isinstance(decay, FSDPModule):
            fully_shard(decay, **fully_shard_arguments, mp_policy=MixedPrecisionPolicy())


def _decay_modules(model: nn.Module) -> dict[str, nn.Module]:
    """By the parameter's name and not by the class: code from the Hub has a class of its own."""
    return {name: module for name, module in model.named_modules() if "lambda_bias" in module._parameters}


def _data_parallel_size(distributed_config) -> int:
    return distributed_config.fsdp_size * getattr(distributed_config, "dp_replicate_size", 1)


def _shard_lambda(model: nn.Module, distributed_config, mesh) -> None:
    """Splits Λ as the plans would, tensor parallel first, but with a policy of its own."""
    get_mesh = mesh.get_mesh if hasattr(mesh, "get_mesh") else mesh.__getitem__  # Transformers 5.17: a DeviceMesh
    if distributed_config.tp_size > 1:
        if not hasattr(mesh, "get_mesh"):
            sizes = f"tp_size = {distributed_config.tp_size} and fsdp_size = {distributed_config.fsdp_size}"
            raise ValueError(f"{sizes}: allowed is one of them above 1 with Transformers {transformers.__version__}")
        style = ALL_PARALLEL_STYLES[RECURRENT_PLAN["rg_lru.decay"]]
        for decay in _decay_modules(model).values():
            style.shard_param(decay, "lambda_bias", get_mesh("tp"))
            style.install_forward(decay, get_mesh("tp"))
    replicated = getattr(distributed_config, "dp_replicate_size", 1) > 1
    arguments = {"mesh": get_mesh(("dp_replicate", "fsdp") if replicated else "fsdp")}
    if distributed_config.fsdp_cpu_offload:
        arguments["offload_policy"] = CPUOffloadPolicy()
    keep_lambda_float32(model, **arguments)

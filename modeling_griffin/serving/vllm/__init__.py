"""Griffin, Hawk and converted RecurrentGemma in vLLM, which finds `register` by its entry point.

With both packages installed `vllm serve FOLDER` and `LLM(FOLDER)` work as for any other model.
"""

ARCHITECTURE = "GriffinForCausalLM"


def register() -> None:
    """Called by vLLM in each of its processes, perhaps several times; imports no model."""
    from vllm import ModelRegistry
    from vllm.config import CompilationConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import modeling_griffin  # noqa: F401  its configuration joins AutoConfig

    from .eligibility import GriffinEligibility

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "modeling_griffin.serving.vllm.model:GriffinForCausalLM")
    MODELS_CONFIG_MAP.setdefault(ARCHITECTURE, GriffinEligibility)
    # Where vLLM compiles and captures the model in pieces, it must cut here: what runs depends on the batch.
    if "vllm::griffin_recurrence" not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append("vllm::griffin_recurrence")

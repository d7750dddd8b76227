"""These tests run only when asked for (`pytest tests/common -m common`): they are fetched from the package registry."""

import os


TRANSFORMERS_MARKERS = (
    *("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test", "slow"),
    *("is_training_test", "is_tensor_parallel_test", "is_expert_parallel_test", "is_fsdp_test", "is_pipeline_test"),
)


def pytest_ignore_collect(collection_path, config):
    return True if config.option.markexpr.strip() != "common" else None


def pytest_configure(config):
    for marker in TRANSFORMERS_MARKERS:
        config.addinivalue_line("markers", f"{marker}: Transformers' own")
    if config.option.markexpr.strip() == "common":  # GPU tests are asked for over all folders, this one too
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

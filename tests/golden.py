"""Golden values: what tiny seeded models compute in float32 on a CPU, down to the last bit where it was recorded.

A change of layout or of wording must not change a number. `python tests/golden.py` records the values anew, which only
a change that is meant to alter numbers may do; `test_golden.py` compares.
"""

import json
import platform
from pathlib import Path

import torch
from safetensors.torch import save_file


FILE = Path(__file__).parent / "golden_values.safetensors"
COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "attention_window_size": 8,
    "lru_width": 48,
    "num_gate_blocks": 4,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS = {
    "griffin": {"num_hidden_layers": 3},
    "hawk": {"num_hidden_layers": 2, "layer_types": ["linear_attention"] * 2},
    "recurrent_gemma": {
        "num_hidden_layers": 4,
        "lambda_init": "recurrent_gemma",
        "final_logit_softcapping": 30.0,
        "scale_embeddings": True,
        "tie_word_embeddings": True,
        "num_key_value_heads": 2,
    },
}
GENERATION = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "drafted": {"prompt_lookup_num_tokens": 3},
}


def golden_model(kind: str):
    from modeling_griffin import GriffinConfig, GriffinForCausalLM

    torch.manual_seed(7)
    model = GriffinForCausalLM(GriffinConfig(**{**COMMON, **MODELS[kind]}))
    generator = torch.Generator().manual_seed(8)
    for name, parameter in model.named_parameters():
        if not name.endswith("lambda_bias"):  # keeps what its initialisation drew
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def golden_values() -> dict[str, torch.Tensor]:
    """All values by name, of every model."""
    torch.set_num_threads(1)
    return {f"{kind}.{name}": value for kind in MODELS for name, value in _values_of(kind).items()}


def _values_of(kind: str) -> dict[str, torch.Tensor]:
    model, generator = golden_model(kind), torch.Generator().manual_seed(9)
    tokens = torch.randint(0, COMMON["vocab_size"], (2, 21), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0  # left padding
    positions = torch.arange(21) % 13  # two documents in a row
    values = {}
    output = model(tokens, labels=tokens)
    output.loss.backward()
    values["loss"], values["logits"] = output.loss.detach(), output.logits.detach()
    values |= {f"gradient.{name}": p.grad.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        values["padded"] = model(tokens, attention_mask=mask).logits[:, 6:].clone()
        values["packed"] = model(tokens, position_ids=positions[None].expand(2, -1)).logits
    for name, options in GENERATION.items():
        torch.manual_seed(10)
        rows = 1 if name == "drafted" else 2
        new = model.generate(tokens[:rows, :9], attention_mask=mask[:rows, :9], max_new_tokens=14, **options)
        values[name] = new
    values["training"] = _training_losses(kind, tokens)
    return values


def _training_losses(kind: str, tokens: torch.Tensor) -> torch.Tensor:
    model = golden_model(kind).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def birthplace() -> dict[str, str]:
    """What the last bit depends on: the processor's vector units and PyTorch's build."""
    name = next((line for line in _cpu_info() if line.startswith("model name")), platform.processor())
    return {
        "cpu": name.split(":")[-1].strip(),
        "units": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    save_file(
        {name: value.contiguous() for name, value in golden_values().items()}, FILE, {"made": json.dumps(birthplace())}
    )
    print(f"{FILE}: {FILE.stat().st_size} bytes, {birthplace()}")

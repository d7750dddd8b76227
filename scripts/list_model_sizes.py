"""Prints the table of configuration/README.md: every ready-made model, counted on the meta device.

python scripts/list_model_sizes.py
"""

from pathlib import Path

import torch

from modeling_griffin import GriffinConfig, GriffinForCausalLM


MODELS = Path(__file__).resolve().parents[1] / "configuration" / "model"
COLUMNS = ("file", "parameters", "D", "D_RNN", "layers", "of them attention", "MLP", "heads", "window", "vocabulary")


def count_parameters(config: GriffinConfig) -> int:
    """Parameters of the language model, tied ones once; builds on the meta device, so any size costs nothing."""
    with torch.device("meta"):
        return GriffinForCausalLM(config).num_parameters()


def size_table(folder: Path = MODELS) -> str:
    """One markdown row for each JSON file, by family and size."""
    rows = []
    for path in folder.glob("*.json"):
        config = GriffinConfig.from_json_file(path)
        parameters = count_parameters(config)
        attention = config.layer_types.count("sliding_attention")
        cells = (
            f"`{path.name}`",
            f"{parameters:,}",
            config.hidden_size,
            config.lru_width,
            config.num_hidden_layers,
            attention,
            config.intermediate_size,
            config.num_attention_heads if attention else "-",
            config.attention_window_size if attention else "-",
            config.vocab_size,
        )
        rows.append((path.stem.split("-")[0], parameters, "| " + " | ".join(map(str, cells)) + " |"))
    header = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join(header + [row for _, _, row in sorted(rows)])


def main() -> None:
    print(size_table())


if __name__ == "__main__":
    main()

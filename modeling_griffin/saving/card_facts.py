"""What the model card says, read from a saved model's files: each function gives one section's text or rows."""

from pathlib import Path

import torch
from huggingface_hub import EvalResult
from safetensors import safe_open

from ..lambda_init import LAMBDA_INITS


HELD_OUT = "held-out-text"  # the type, in the card's metadata, of data that results of metrics.json are about
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def summary(config: dict) -> str:
    """One sentence: which of the two architectures, and how many blocks of which kind."""
    recurrent = config["layer_types"].count("linear_attention")
    text = (
        f"{recurrent} of its {config['num_hidden_layers']} blocks mix tokens by the RG-LRU, a gated linear recurrence"
    )
    if is_hawk(config):
        return f"A Hawk: {text}; there is no attention."
    attention, window = config["layer_types"].count("sliding_attention"), config["attention_window_size"]
    return f"A Griffin: {text}, {attention} by attention to the last {window:,} tokens."


def is_hawk(config: dict) -> bool:
    """All blocks are recurrent."""
    return "sliding_attention" not in config["layer_types"]


def architecture(config: dict, saved: Path) -> list[tuple[str, str]]:
    """Rows: sizes from the configuration, parameters and dtypes counted in the weights."""
    shapes, dtypes = read_headers(saved)
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    width = f"{config['hidden_size']:,}; RG-LRU {config['lru_width']:,}; each branch of the MLP"
    rows = [
        ("parameters", f"{parameters:,}" + (", embeddings counted once" if config["tie_word_embeddings"] else "")),
        ("stored as", f"safetensors, {', '.join(dtypes)}"),
        ("width", f"{width} {config['intermediate_size']:,}"),
        ("gates", f"{config['num_gate_blocks']} diagonal blocks"),
        ("convolution", f"over {config['conv1d_width']} tokens"),
    ]
    if not is_hawk(config):
        heads = f"{config['num_attention_heads']} heads of {config['head_dim']}"
        window = f"window {config['attention_window_size']:,}"
        rows.append(("attention", f"{heads}, {config['num_key_value_heads']} for keys and values; {window}"))
    rows.append(("vocabulary", f"{config['vocab_size']:,}"))
    if config["architectures"][0].endswith("Classification"):
        rows.append(("labels", ", ".join(config.get("id2label", {0: "LABEL_0", 1: "LABEL_1"}).values())))
    return rows


def lambda_text(config: dict, saved: Path) -> str:
    """How Λ is initialised, and what has become of it in these weights."""
    name, c = config["lambda_init"], config["rg_lru_c"]
    low, high = config["lambda_init_bounds"]
    text = f'Initialisation: `lambda_init = "{name}"` with bounds {low} and {high}'
    if name in LAMBDA_INITS and LAMBDA_INITS[name].__doc__:
        text += ": " + LAMBDA_INITS[name].__doc__.split("\n")[0].split(". ")[0].rstrip(".")
    decay = torch.exp(-c * torch.nn.functional.softplus(_read_lambda(saved)))
    low, middle, high = decay.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    return (
        f"{text}.\nIn these weights a channel with open gates keeps a^c = {middle:.4f} of its state from one token to "
        f"the next (the median; 5% of the channels keep less than {low:.4f}, 5% more than {high:.4f})."
    )


def without_folders(text: str | None) -> str | None:
    """Absolute paths in it cut to their last part: a public card need not tell how a machine is laid out."""
    return text and " ".join(Path(word).name if Path(word).is_absolute() else word for word in text.split(" "))


def training(metrics: dict) -> list[tuple[str, str]]:
    """Rows: those of these entries that train.py wrote into metrics.json."""
    versions = metrics.get("versions", {})
    entries = {
        "training data": without_folders(metrics.get("train_data")),
        "training tokens": metrics.get("train_tokens"),
        "tokens seen": metrics.get("tokens_seen"),
        "steps": metrics.get("steps"),
        "sequence length": metrics.get("sequence_length"),
        "seed": metrics.get("seed"),
        "device": metrics.get("device"),
        "tokens per second": metrics.get("tokens_per_second"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or None,
    }
    return [
        (key, f"{value:,}" if isinstance(value, int | float) else str(value))
        for key, value in entries.items()
        if value is not None
    ]


def measured(metrics: dict) -> list[EvalResult]:
    """What train.py measured on held-out text."""
    names = {"bits_per_byte": "bits per byte", "eval_loss": "loss (nats per token)"}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=HELD_OUT,
            dataset_name=without_folders(metrics.get("eval_data")) or "held-out text",
            metric_type=key,
            metric_name=name,
            metric_value=round(metrics[key], 4),
        )
        for key, name in names.items()
        if key in metrics
    ]


def limits(config: dict) -> list[str]:
    """What follows from the architecture."""
    state = "states of fixed size, so exact recall over long distances is not to be expected."
    if is_hawk(config):
        return [f"All context passes through {state}"]
    window = f"{config['attention_window_size']:,}"
    return [f"Attention sees the last {window} tokens. What lies further back reaches the model only through {state}"]


def read_headers(saved: Path) -> tuple[dict[str, list[int]], list[str]]:
    """Shape of every tensor in the folder's safetensors, and the names of their dtypes."""
    shapes, dtypes = {}, set()
    for path in sorted(saved.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                part = file.get_slice(key)
                shapes[key] = part.get_shape()
                dtypes.add(DTYPES.get(part.get_dtype(), part.get_dtype()))
    return shapes, sorted(dtypes)


def _read_lambda(saved: Path) -> torch.Tensor:
    """Λ of all layers in one row, float64."""
    values = []
    for path in sorted(saved.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            values += [file.get_tensor(key).double() for key in file.keys() if key.endswith("decay.lambda_bias")]
    return torch.cat(values)

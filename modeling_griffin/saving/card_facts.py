"""What the model card says, read from a saved model's files: each function gives one section's text or rows.

The files may be anyone's, so text that they bring goes in by `inline`, and fields of another kind are refused by name.
"""

import re
from pathlib import Path

import torch
from huggingface_hub import EvalResult
from safetensors import safe_open

from ..lambda_init import LAMBDA_INITS
from .card_text import inline, one_line, short_number
from .saved_files import read_json_object, weights_to_describe


HELD_OUT = "held-out-text"  # the type, in the card's metadata, of data that results of metrics.json are about
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
COUNTS = ("num_hidden_layers", "hidden_size", "lru_width", "intermediate_size", "num_gate_blocks", "conv1d_width")
ATTENTION_COUNTS = ("num_attention_heads", "num_key_value_heads", "head_dim", "attention_window_size")
# Names that a folder has by habit: as a title they say nothing.
NAMELESS = r"((final|best|trained|my)[-_]?)?models?|out(put)?s?|saved?|results?|final|best|run|new|te?mp|checkpoint.*"
MAX_LABELS = 20


def read_config(path: Path) -> dict:
    """config.json. Raises ValueError for a field that the card needs and that is missing or of another kind."""
    config = read_json_object(path)
    for field in ("architectures", "layer_types"):
        value = config.get(field)
        if not isinstance(value, list) or not value or not all(isinstance(entry, str) for entry in value):
            raise ValueError(f"{field} = {value!r} in {path}: allowed is a list of names")
    for field in (*COUNTS, "vocab_size", *ATTENTION_COUNTS * (not is_hawk(config))):
        if type(config.get(field)) is not int or config[field] < 1:
            raise ValueError(f"{field} = {config.get(field)!r} in {path}: allowed are positive whole numbers")
    bounds = config.get("lambda_init_bounds")
    if not isinstance(bounds, list) or len(bounds) != 2:
        raise ValueError(f"lambda_init_bounds = {bounds!r} in {path}: allowed are two numbers")
    if not isinstance(config.get("rg_lru_c"), int | float):
        raise ValueError(f"rg_lru_c = {config.get('rg_lru_c')!r} in {path}: allowed are numbers")
    return config


def title(name: str, config: dict, saved: Path) -> str:
    """The name, unless it is one that any folder has: then what the model is."""
    name = name.split("/")[-1]
    if not re.fullmatch(NAMELESS, name, re.IGNORECASE):
        return name
    return f"{'Hawk' if is_hawk(config) else 'Griffin'} with {short_number(count_parameters(saved))} parameters"


def count_parameters(saved: Path) -> int:
    """How many numbers the saved tensors hold."""
    return sum(torch.Size(shape).numel() for shape in read_headers(saved)[0].values())


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
    _, dtypes = read_headers(saved)
    parameters = count_parameters(saved)
    counted = ", embeddings counted once" if config.get("tie_word_embeddings", True) else ""
    width = f"{config['hidden_size']:,}; RG-LRU {config['lru_width']:,}; each branch of the MLP"
    rows = [
        ("parameters", f"{parameters:,}{counted}"),
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
        rows.append(("labels", _labels(config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"})))
    return rows


def _labels(id2label) -> str:
    if not isinstance(id2label, dict):
        raise ValueError(f"id2label = {id2label!r} in config.json: allowed is an object, number to label")
    labels = [inline(label) for label in id2label.values()]
    more = f" and {len(labels) - MAX_LABELS:,} more" if len(labels) > MAX_LABELS else ""
    return ", ".join(labels[:MAX_LABELS]) + more


def lambda_text(config: dict, saved: Path) -> str:
    """How Λ is initialised, and what has become of it in these weights."""
    name, c = str(config.get("lambda_init")), config["rg_lru_c"]
    low, high = map(inline, config["lambda_init_bounds"])
    plain = re.fullmatch(r"[\w.-]+", name)  # in a code span nothing can be escaped
    setting = f'`lambda_init = "{name}"`' if plain else f'lambda_init = "{inline(name)}"'
    text = f"Initialisation: {setting} with bounds {low} and {high}"
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
    return text and re.sub(r"(?<![^ =])/\S*", lambda path: Path(path[0]).name, text)


def command(metrics: dict) -> str | None:
    """The command of the training in one line, or None; for a block of code, in which no markup counts."""
    text = metrics.get("command")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"command = {text!r} in metrics.json: allowed is a text")
    return without_folders(text and one_line(text))


def training(metrics: dict) -> list[tuple[str, str]]:
    """Rows: those of these entries that train.py wrote into metrics.json."""
    versions = metrics.get("versions") or {}
    if not isinstance(versions, dict):
        raise ValueError(f"versions = {versions!r} in metrics.json: allowed is an object, package to version")
    entries = {
        "training data": _data_name(metrics, "train_data"),
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
        (key, f"{value:,}" if isinstance(value, int | float) else inline(value))
        for key, value in entries.items()
        if value is not None
    ]


def _data_name(metrics: dict, key: str) -> str | None:
    value = metrics.get(key)
    return without_folders(value if value is None or isinstance(value, str) else str(value))


def measured(metrics: dict) -> list[EvalResult]:
    """What train.py measured on held-out text."""
    names = {"bits_per_byte": "bits per byte", "eval_loss": "loss (nats per token)"}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=HELD_OUT,
            dataset_name=_data_name(metrics, "eval_data") or "held-out text",
            metric_type=key,
            metric_name=name,
            metric_value=_rounded(metrics, key),
        )
        for key, name in names.items()
        if key in metrics
    ]


def _rounded(metrics: dict, key: str) -> float:
    if not isinstance(metrics[key], int | float):
        raise ValueError(f"{key} = {metrics[key]!r} in metrics.json: allowed are numbers")
    return round(metrics[key], 4)


def results_table(results: list[EvalResult]) -> list[dict[str, str]]:
    """The rows of these results, by the template's names."""
    return [
        {
            "dataset_name": inline(result.dataset_name),
            "metric_name": inline(result.metric_name or result.metric_type),
            "metric_value": inline(result.metric_value),
        }
        for result in results
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
    for path in weights_to_describe(saved):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                part = file.get_slice(key)
                shapes[key] = part.get_shape()
                dtypes.add(DTYPES.get(part.get_dtype(), part.get_dtype()))
    return shapes, sorted(dtypes)


def _read_lambda(saved: Path) -> torch.Tensor:
    """Λ of all layers in one row, float64."""
    values = []
    for path in weights_to_describe(saved):
        with safe_open(path, framework="pt") as file:
            values += [file.get_tensor(key).double() for key in file.keys() if key.endswith("decay.lambda_bias")]
    if not values:
        raise ValueError(f"{saved} holds no decay.lambda_bias: allowed are the weights of a Griffin")
    return torch.cat([value.flatten() for value in values])

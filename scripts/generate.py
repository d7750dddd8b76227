"""Samples from a model and streams the text: `python scripts/generate.py build/demo/model --prompt "The "`."""

import argparse
import sys
from typing import Any

import spoken
import torch
from command_line import Parser, device
from training.hub_ids import ALLOWED_MODEL, require_model
from training.text_tokenizer import document_ends
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

import modeling_griffin  # noqa: F401  registers the model with the Auto classes


SAMPLING = {"temperature": 0.8, "top_k": 0, "top_p": 1.0}  # where nothing is given


def load(name: str, trust_remote_code: bool, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) of a folder or Hub id; weights in safetensors only, never pickles.

    Raises ValueError, in one line, where there is none.
    """
    require_model("MODEL", name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype="auto", trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"MODEL = {name!r}: allowed are {ALLOWED_MODEL} ({reason})") from error
    try:
        document_ends(tokenizer)
    except ValueError as error:
        raise ValueError(f"MODEL = {name!r}: {error}") from error
    return model.to(device).eval(), tokenizer


def check_ids(largest: int, model: torch.nn.Module) -> None:
    """Raises ValueError where the tokenizer has given an id that the model has no embedding for."""
    if largest >= (rows := model.get_input_embeddings().weight.shape[0]):
        raise ValueError(
            f"the tokenizer gives the id {largest}, the model's embedding has {rows} rows: allowed is the tokenizer "
            "that the model was trained with"
        )


def generate(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, **options: Any) -> torch.Tensor:
    """Continues a document that begins with `prompt`; streams it to stdout, returns all token ids (1, T).

    Raises ValueError for a tokenizer that is not the model's.
    """
    first, _ = document_ends(tokenizer)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    check_ids(max(first, *ids) if ids else first, model)
    input_ids = torch.tensor([[first, *ids]], device=model.device)
    return model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **options,
    )


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__file__, description="Samples from a model and streams the text.")
    parser.add_argument("model", metavar="MODEL", help="a folder or Hub id")
    parser.add_argument("--prompt", default="", help="how the document begins (default: nothing)")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="tokens to generate at most")
    for name, kind, text in (
        ("temperature", float, "of sampling, above 0"),
        ("top_k", int, "keep the k most probable tokens; 0 keeps all"),
        ("top_p", float, "keep the most probable tokens up to this probability"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=None, help=f"{text} (default: {SAMPLING[name]})")
    parser.add_argument("--greedy", action="store_true", help="always the most probable token (argmax); no sampling")
    parser.add_argument("--seed", type=int, default=None, help="the same seed draws the same text (default: none)")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=usual, help="where it runs")
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run Python code of the model's repository; not needed for Griffin while modeling_griffin is installed",
    )
    arguments = parser.parse_args(argv)
    for name, usual in SAMPLING.items():
        if (given := getattr(arguments, name)) is None:
            setattr(arguments, name, usual)
        elif arguments.greedy:
            parser.error(f"--{name} {given} with --greedy: allowed is one of them, for greedy search draws nothing")
    for name, allowed, holds in (
        ("max_new_tokens", "whole numbers from 1", arguments.max_new_tokens >= 1),
        ("temperature", "numbers above 0 (or --greedy)", arguments.temperature > 0),
        ("top_k", "whole numbers from 0", arguments.top_k >= 0),
        ("top_p", "numbers above 0 up to 1", 0 < arguments.top_p <= 1),
        ("seed", "whole numbers from -2^63 below 2^64", -(2**63) <= (arguments.seed or 0) < 2**64),
    ):
        if not holds:
            parser.error(f"--{name} {getattr(arguments, name)}: allowed are {allowed}")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = read_arguments(sys.argv[1:] if argv is None else argv)
    try:
        model, tokenizer = load(arguments.model, arguments.trust_remote_code, arguments.device)
    except ValueError as error:
        spoken.stop(__file__, error)
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)  # not set_seed, which imports PEFT and what that imports
    sampling = {"temperature": arguments.temperature, "top_k": arguments.top_k, "top_p": arguments.top_p}
    options = {"do_sample": False} if arguments.greedy else {"do_sample": True, **sampling}
    try:
        generate(model, tokenizer, arguments.prompt, max_new_tokens=arguments.max_new_tokens, **options)
    except ValueError as error:
        spoken.stop(__file__, error)


if __name__ == "__main__":
    main()

"""The demonstration: trains the tiny Griffin on Python's own documentation, generates, saves, reloads, compares.

`make demo`, or `python scripts/demo.py`. About two minutes on two CPU cores; writes to build/demo.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from command_line import Parser


# Waiting threads sleep instead of spinning: beside any other load on two cores, spinning costs up to tenfold. Read by
# OpenMP when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import datasets
import numpy as np
import torch
import train
from generate import generate
from lambda_study.trigram import trigram_bits_per_byte
from presets import is_installed
from training.report import next_steps
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, StoppingCriteria, set_seed

import modeling_griffin  # noqa: F401  registers the model with the Auto classes


ROOT = Path(__file__).resolve().parents[1]
CONFIGURATION = Path("configuration/training/demo.yaml")
FOLDER = Path("build/demo")
PROMPT = 'The "if" statement'
HELD_OUT = slice(3, None, 10)  # every tenth topic
SAMPLE_TOKENS, MOST_SAMPLE_TOKENS = 120, 240  # the sample ends with the first sentence after so many


def topic_documents() -> tuple[list[str], list[str]]:
    """(training, held-out) topics. Paragraphs that stand in both are taken out of the training text."""
    names = sorted(topics)
    held_out = [topics[name] for name in names[HELD_OUT]]
    seen = {paragraph.strip() for text in held_out for paragraph in text.split("\n\n")}
    others = sorted(set(names) - set(names[HELD_OUT]))
    train_texts = [
        "\n\n".join(paragraph for paragraph in topics[name].split("\n\n") if paragraph.strip() not in seen)
        for name in others
    ]
    return [text for text in train_texts if text.strip()], held_out


def write_documents(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


class EndOfSentence(StoppingCriteria):
    """Stops a single row at the first full stop after `after` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, after: int):
        self.tokenizer, self.after = tokenizer, after

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(1,) bool: whether the row ends here."""
        at_end = input_ids.shape[1] > self.after and self.tokenizer.decode(input_ids[0, -1:]).rstrip().endswith(".")
        return torch.tensor([at_end], device=input_ids.device)


@torch.no_grad()
def some_logits(model: torch.nn.Module) -> np.ndarray:
    """Logits (1, 200, vocabulary) of a fixed row of tokens."""
    tokens = torch.arange(200, device=model.device)[None] * 7 % 256
    return model.eval()(input_ids=tokens).logits.cpu().numpy()


def reloaded_logits(folder: Path) -> np.ndarray:
    """The same from `folder`, loaded by AutoModelForCausalLM in a new process."""
    path = FOLDER / "logits.npy"
    subprocess.run([sys.executable, __file__, "--logits_of", str(folder), "--to", str(path)], check=True)
    return np.load(path)


def demo(overrides: list[str]) -> None:
    start = time.time()
    if not is_installed():  # then its files go to where it was called
        os.chdir(ROOT)
    datasets.disable_progress_bars()
    train_texts, held_out = topic_documents()
    write_documents(FOLDER / "train.jsonl", train_texts)
    write_documents(FOLDER / "held_out.jsonl", held_out)
    trigram, _ = trigram_bits_per_byte(train_texts, held_out)
    print(
        f"Python's documentation topics: {len(train_texts)} to train on, {len(held_out)} held out; "
        f"a trigram model needs {trigram:.3f} bits for a byte of those"
    )

    data = [f"--train_data={FOLDER / 'train.jsonl'}", f"--eval_data={FOLDER / 'held_out.jsonl'}"]
    trainer, metrics = train.run([str(CONFIGURATION), *data, f"--output_dir={FOLDER / 'model'}", *overrides])
    model, tokenizer, folder = trainer.model, trainer.processing_class, Path(trainer.args.output_dir)

    print("\nA sample:\n")
    set_seed(0)
    model.eval()
    stop = [EndOfSentence(tokenizer, SAMPLE_TOKENS)]
    longest = {"max_new_tokens": MOST_SAMPLE_TOKENS, "stopping_criteria": stop}
    generate(model, tokenizer, PROMPT, do_sample=True, temperature=0.7, **longest)

    difference = float(np.abs(some_logits(model.cpu()) - reloaded_logits(folder)).max())
    print(
        f"\nheld-out bits per byte: {metrics['bits_per_byte']:.3f}, trigram {trigram:.3f}\n"
        f"reloaded by AutoModelForCausalLM in a new process: largest difference of logits {difference:g}\n"
        f"model, metrics.json and loss_curve.png: {folder}\n"
        f"{time.time() - start:.0f} s\n"
    )
    print(next_steps(str(folder), str(FOLDER / "held_out.jsonl")))
    if metrics["bits_per_byte"] >= trigram or difference > 0:
        raise SystemExit("the demonstration failed: see the figures above")


def main() -> None:
    parser = Parser(
        __file__,
        description="Trains, generates, saves and reloads a tiny Griffin.",
        epilog="All other options are those of train.py: --max_steps, --seed, --use_cpu, ...",
    )
    parser.add_argument("--logits_of", type=Path, help=argparse.SUPPRESS)  # what the new process is asked for
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    if arguments.logits_of is not None:
        np.save(
            arguments.to, some_logits(AutoModelForCausalLM.from_pretrained(arguments.logits_of, use_safetensors=True))
        )
    else:
        demo(overrides)


if __name__ == "__main__":
    main()

"""Trains or fine-tunes a Griffin from one YAML file: `python scripts/train.py configuration/training/demo.yaml`.

Keys can be overridden (`--learning_rate 1e-3`); `--resume` continues an interrupted run. Also under `accelerate
launch` and `torchrun`. Leaves the model, its tokenizer, metrics.json and loss_curve.png in output_dir.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
from griffin_trainer import GriffinTrainer
from text_data import PackedRows, count_bytes, hold_out, load_documents, tokenize
from text_tokenizer import check_fits, document_ends, load_tokenizer
from train_arguments import TOKEN_IDS, DataArguments, ModelArguments, read_arguments
from train_launch import check_checkpoint, check_launch, check_processes, describe, read_request
from train_report import held_out_metrics, plot_losses, token_losses, write_metrics
from train_sequence import share_rows
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)
from transformers.trainer_pt_utils import get_model_param_count

from modeling_griffin import GriffinConfig, GriffinForCausalLM, keep_lambda_float32
from modeling_griffin.model_card import keep_model_card
from modeling_griffin.rg_lru_scan import describe_backend


SECONDS_FOR_RANK_0 = 2
# What a configuration may change between an interruption and --resume; the tokenizer gives the ids.
CHANGEABLE = {"attention_dropout", "use_cache", "lambda_init", "lambda_init_bounds", *TOKEN_IDS}


def find_checkpoint(resume: str | bool | None, output_dir: str) -> str | None:
    """The checkpoint to continue from, or None. Refuses to mix a new run with another run's checkpoints."""
    # The state is written last: without it, or half of it, the run was interrupted while it saved.
    complete = [path for path in Path(output_dir).glob("checkpoint-*") if read_state(path) is not None]
    if resume is None and complete:
        raise ValueError(
            f"output_dir = {output_dir!r} holds checkpoints of another run: pass --resume to continue it, or another "
            "output_dir"
        )
    if resume is True:
        if not complete:
            raise ValueError(f"--resume: output_dir = {output_dir!r} holds no complete checkpoint")
        return str(max(complete, key=lambda path: int(path.name.split("-")[-1])))
    if resume is not None and read_state(resume) is None:
        raise ValueError(f"--resume {resume}: allowed are checkpoint folders, which hold a trainer_state.json")
    return resume


def read_state(checkpoint: str | Path) -> dict | None:
    """The trainer's state in a checkpoint folder; None where there is none, or not all of it."""
    try:
        return json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def is_complete(checkpoint: str, arguments) -> bool:
    """Whether nothing is left to train. Stock Trainer would take one step more, since it looks after each step."""
    state = read_state(checkpoint)
    if arguments.max_steps > 0:
        return state["global_step"] >= arguments.max_steps
    return state["epoch"] >= arguments.num_train_epochs


def make_model(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A new model from a configuration, or a trained one to continue; weights in float32."""
    name, attention = arguments.model_name_or_path, arguments.attn_implementation
    if name is None:
        config = make_config(arguments, tokenizer)
        config._attn_implementation = attention
        # Not from_config: under DeepSpeed's ZeRO-3 it shards weights before they are drawn, and Λ stays unset memory.
        return GriffinForCausalLM(config)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, attn_implementation=attention, use_safetensors=True
        )
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"model_name_or_path = {name!r}: allowed are a folder or Hub id with weights in safetensors ({reason})"
        ) from error
    check_fits(tokenizer, model.get_input_embeddings().num_embeddings)
    return model


def make_config(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> GriffinConfig:
    """The configuration file, with the tokenizer's special tokens, with `config_overrides`."""
    try:
        settings, _ = GriffinConfig.get_config_dict(arguments.config_name)
    except OSError as error:
        raise ValueError(
            f"config_name = {arguments.config_name!r}: allowed are a JSON file, a folder with config.json, or a Hub id"
        ) from error
    overrides = json.loads(arguments.config_overrides or "{}")
    if unknown := sorted(set(overrides) - {field.name for field in dataclasses.fields(GriffinConfig)}):
        raise ValueError(f"config_overrides has the unknown fields {unknown}: allowed are those of GriffinConfig")
    settings = {"vocab_size": GriffinConfig.vocab_size, **settings, **overrides}
    check_fits(tokenizer, settings["vocab_size"])
    first, last = document_ends(tokenizer)
    ids = {"bos_token_id": first, "eos_token_id": last, "pad_token_id": tokenizer.pad_token_id}
    return GriffinConfig(**{**settings, **ids})


def check_same_model(checkpoint: str, config: GriffinConfig) -> None:
    """Raises ValueError where the interrupted run trained a model of other sizes or another recurrence."""
    before = GriffinConfig.from_pretrained(checkpoint)
    values = {name: (getattr(before, name), getattr(config, name)) for name in GriffinConfig.__annotations__}
    changed = [
        f"{name} = {old!r} there, {new!r} now"
        for name, (old, new) in values.items()
        if old != new and name not in CHANGEABLE
    ]
    if changed:
        raise ValueError(f"--resume: the checkpoint {checkpoint} is of another model: {'; '.join(changed)}")


def check_enough_rows(rows: PackedRows, arguments) -> None:
    """Raises ValueError where the processes would not all have a full batch even once."""
    batch = arguments.train_batch_size * arguments.world_size
    if len(rows) < batch:
        raise ValueError(
            f"the training data makes {len(rows)} rows of {rows.length} tokens, fewer than the {batch} of one pass "
            f"(per_device_train_batch_size = {arguments.per_device_train_batch_size}, {arguments.world_size} "
            "process(es)): lower it or sequence_length, or give more text"
        )


def make_tokenizer(arguments: DataArguments, model_name: str | None, checkpoint: str | None, texts):
    """Of the interrupted run, else as asked for, else the model's own, else bytes."""
    return load_tokenizer(
        checkpoint or arguments.tokenizer or model_name or "bytes", texts, arguments.tokenizer_vocab_size
    )


def make_documents(arguments: DataArguments):
    """(training, held-out) documents."""
    column, subset = arguments.text_column, arguments.dataset_subset
    train = load_documents(arguments.train_data, column, arguments.train_split, subset)
    if arguments.eval_data is None:
        return hold_out(train, arguments.eval_fraction, arguments.split_seed)
    return train, load_documents(arguments.eval_data, column, arguments.eval_split, subset)


def make_trainer(model_arguments, data_arguments, training_arguments, checkpoint) -> tuple[GriffinTrainer, dict]:
    """The trainer, and what metrics.json says about its model and data."""
    with training_arguments.main_process_first(desc="reading the data"):
        train, held_out = make_documents(data_arguments)
        tokenizer = make_tokenizer(
            data_arguments, model_arguments.model_name_or_path, checkpoint, (record["text"] for record in train)
        )
        filler = document_ends(tokenizer)[1]
        train_rows, eval_rows = (
            PackedRows(
                tokenize(documents, tokenizer, data_arguments.preprocessing_num_proc),
                data_arguments.sequence_length,
                filler,
            )
            for documents in (train, held_out)
        )
    set_seed(training_arguments.seed)
    model = make_model(model_arguments, tokenizer)  # all processes at once: DeepSpeed shards weights as they are made
    if checkpoint is not None:
        check_same_model(checkpoint, model.config)
    check_enough_rows(train_rows, training_arguments)
    facts = {
        "train_data": data_arguments.train_data,
        "eval_data": data_arguments.eval_data,
        "sequence_length": data_arguments.sequence_length,
        "scan": describe_backend(training_arguments.device),
        "device": str(training_arguments.device),
        "parameters": get_model_param_count(model),
        "train_documents": len(train),
        "train_tokens": train_rows.num_tokens,
        "eval_documents": len(held_out),
        "eval_tokens": eval_rows.num_tokens,
        "eval_bytes": count_bytes(held_out),
    }
    trainer = GriffinTrainer(
        model=model,
        args=training_arguments,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        compute_metrics=held_out_metrics(facts["eval_bytes"]),
        preprocess_logits_for_metrics=token_losses,
    )
    if trainer.accelerator.is_fsdp2:
        keep_lambda_float32(trainer.model)  # before accelerate shards, and casts, the rest
    share_rows(trainer, model_arguments.sequence_parallel_size)
    name = model_arguments.model_name_or_path
    from_hub = name is not None and not Path(name).exists()
    keep_model_card(trainer, **({"base_model": name} if from_hub else {}))  # or Trainer's push writes another one
    facts["launch"] = describe(trainer.accelerator)
    return trainer, facts


def train(trainer: GriffinTrainer, facts: dict, checkpoint: str | None) -> dict:
    """Trains, evaluates and saves into output_dir; returns what it writes to metrics.json (on rank 0)."""
    before = {"num_input_tokens_seen": 0, "log_history": []}
    if checkpoint is not None:
        before = read_state(checkpoint)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    logged = trainer.state.log_history[len(before["log_history"]) :]
    seconds = result.metrics["train_runtime"] - sum(entry.get("eval_runtime", 0) for entry in logged)
    tokens = trainer.state.num_input_tokens_seen - before["num_input_tokens_seen"]
    evaluated = any("eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in logged)
    if not evaluated or trainer.args.load_best_model_at_end:
        trainer.evaluate()
    trainer.model.config.use_cache = True  # Trainer switches it off; who loads the model wants it
    trainer.save_model()
    return report(trainer, facts, tokens / seconds) if trainer.is_world_process_zero() else {}


def report(trainer: GriffinTrainer, facts: dict, tokens_per_second: float) -> dict:
    """Writes metrics.json and loss_curve.png."""
    output_dir, history = Path(trainer.args.output_dir), trainer.state.log_history
    final = next(entry for entry in reversed(history) if "eval_loss" in entry)
    metrics = write_metrics(
        output_dir / "metrics.json",
        history,
        **facts,
        seed=trainer.args.seed,
        steps=trainer.state.global_step,
        tokens_seen=trainer.state.num_input_tokens_seen,
        tokens_per_second=round(tokens_per_second, 1),
        eval_loss=final["eval_loss"],
        bits_per_byte=final["eval_bits_per_byte"],
    )
    plot_losses(output_dir / "loss_curve.png", metrics)
    trainer.create_model_card()  # again, now that metrics and curve are there
    print(
        f"{metrics['steps']} steps, {metrics['tokens_seen']:,} tokens, {metrics['tokens_per_second']:,.0f} tokens/s; "
        f"held-out: loss {metrics['eval_loss']:.4f}, {metrics['bits_per_byte']:.4f} bits per byte; in {output_dir}"
    )
    return metrics


def run(argv: list[str]) -> tuple[GriffinTrainer, dict]:
    """The whole of it: (trainer, metrics). The metrics are empty on ranks other than 0."""
    try:
        model_arguments, data_arguments, training_arguments, resume = read_arguments(argv)
        check_processes(training_arguments.distributed_state, read_request())
        checkpoint = find_checkpoint(resume, training_arguments.output_dir)
        if checkpoint is not None and is_complete(checkpoint, training_arguments):
            print(f"the run is complete, {checkpoint} is its end: raise max_steps or num_train_epochs to go on")
            raise SystemExit(0)
        trainer, facts = make_trainer(model_arguments, data_arguments, training_arguments, checkpoint)
        check_launch(trainer.accelerator)
        if checkpoint is not None:
            check_checkpoint(checkpoint, trainer.accelerator)
    except ValueError as error:
        stop(error)
    if trainer.is_world_process_zero():
        print(facts["scan"])
        print(facts["launch"])
        print(
            f"{facts['parameters']:,} parameters; {facts['train_tokens']:,} training tokens in "
            f"{len(trainer.train_dataset):,} rows of {data_arguments.sequence_length}; held out: "
            f"{facts['eval_tokens']:,} tokens, {facts['eval_bytes']:,} bytes"
        )
    return trainer, train(trainer, facts, checkpoint)


def stop(error: Exception) -> NoReturn:
    """Ends the process with one line. Rank 0 speaks first: an error of all ranks is then said once."""
    rank, of = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:
        time.sleep(SECONDS_FOR_RANK_0)  # by then the launcher has ended this process, if rank 0 has failed too
    raise SystemExit(f"train.py: error{f' (rank {rank} of {of})' if of > 1 else ''}: {error}") from error


def main() -> None:
    try:
        run(sys.argv[1:])
    except FloatingPointError as error:
        stop(error)
    except KeyboardInterrupt:
        print("\ninterrupted; --resume continues from the newest checkpoint in output_dir, if there is one")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

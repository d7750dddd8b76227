"""Trains or fine-tunes a Griffin from one YAML file: `python scripts/train.py configuration/training/demo.yaml`.

Keys can be overridden (`--learning_rate 1e-3`); `--resume` continues an interrupted run. Also under `accelerate
launch` and `torchrun`. Leaves the model, its tokenizer, metrics.json and loss_curve.png in output_dir.
"""

import dataclasses
import errno
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import spoken
import torch
from presets import preset_names
from training.arguments import TOKEN_IDS, DataArguments, ModelArguments, Resume, read_arguments
from training.checkpoint import NotSaved, read_manifest, read_state, saving, write_final
from training.fingerprint import check_same_rows, rows_of, settings_of, settings_together
from training.float8 import check_float8, convert
from training.hub_ids import require_on_hub
from training.hub_push import push
from training.interruption import Stopped, check_ended, is_evaluated, save_after_step
from training.launch import check_checkpoint, check_launch, check_processes, describe, read_request
from training.masking import mask_secrets
from training.ranks import check_same_on_all_ranks, decided_by_rank_0, explain_silence, leave_together
from training.recording import record_steps
from training.report import held_out_metrics, next_steps, plot_losses, token_losses, write_metrics
from training.sequence import share_rows
from training.start import check_same_model, end_of_complete_run, where_to_start
from training.table import print_table
from training.text_data import PackedRows, count_bytes, hold_out, load_documents, tokenize
from training.text_files import DISK_ERRORS
from training.text_tokenizer import check_fits, document_ends, load_tokenizer
from training.trainer import GriffinTrainer
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_pt_utils import get_model_param_count

from modeling_griffin import GriffinConfig, GriffinForCausalLM, keep_lambda_float32
from modeling_griffin.rg_lru_scan import describe_backend
from modeling_griffin.saving.card import keep_model_card
from modeling_griffin.training.pieces import mlp_in_pieces


SECONDS_FOR_RANK_0 = 2
ALLOWED_MODEL = "a folder or Hub id with weights in safetensors"
ALLOWED_CONFIG = (
    f"a JSON file, a folder with config.json, a ready-made one ({', '.join(preset_names('model'))}), or a Hub id"
)
# Of an OSError anywhere: the disk's fault or the user's, and no one's who would read a traceback.
PLAIN_ERRORS = {*DISK_ERRORS, errno.EACCES, errno.EPERM, errno.EIO}


def check_names(arguments: ModelArguments) -> None:
    """Raises ValueError, before any text is read, where there is no such model, or no such configuration can be."""
    for field, allowed in (("config_name", ALLOWED_CONFIG), ("model_name_or_path", ALLOWED_MODEL)):
        name = getattr(arguments, field)
        if name is not None and not Path(name).exists():
            require_on_hub(field, name, "model", allowed)
    if arguments.config_name is not None:
        read_config(arguments)


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
        raise ValueError(f"model_name_or_path = {name!r}: allowed are {ALLOWED_MODEL} ({reason})") from error
    check_fits(tokenizer, model.get_input_embeddings().num_embeddings)
    return model


def read_config(arguments: ModelArguments) -> dict:
    """The configuration file with `config_overrides`, checked but for the special tokens, which the tokenizer gives."""
    try:
        settings, _ = GriffinConfig.get_config_dict(arguments.config_name)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config_name = {arguments.config_name!r}: allowed are {ALLOWED_CONFIG} ({reason})") from error
    overrides = json.loads(arguments.config_overrides or "{}")
    if unknown := sorted(set(overrides) - {field.name for field in dataclasses.fields(GriffinConfig)}):
        raise ValueError(f"config_overrides has the unknown fields {unknown}: allowed are those of GriffinConfig")
    settings = {"vocab_size": GriffinConfig.vocab_size, **settings, **overrides}
    GriffinConfig(**{**settings, **dict.fromkeys(TOKEN_IDS)})
    return settings


def make_config(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> GriffinConfig:
    """The configuration, with the tokenizer's special tokens."""
    settings = read_config(arguments)
    check_fits(tokenizer, settings["vocab_size"])
    first, last = document_ends(tokenizer)
    ids = {"bos_token_id": first, "eos_token_id": last, "pad_token_id": tokenizer.pad_token_id}
    return GriffinConfig(**{**settings, **ids})


def check_enough_rows(rows: PackedRows, arguments: TrainingArguments) -> None:
    """Raises ValueError where the processes would not all have a full batch even once."""
    batch = arguments.train_batch_size * arguments.world_size
    if len(rows) < batch:
        raise ValueError(
            f"the training data makes {len(rows)} rows of {rows.length} tokens, fewer than the {batch} of one pass "
            f"(per_device_train_batch_size = {arguments.per_device_train_batch_size}, {arguments.world_size} "
            "process(es)): lower it or sequence_length, or give more text"
        )


def make_tokenizer(
    arguments: DataArguments, model_name: str | None, checkpoint: str | None, texts: Any
) -> PreTrainedTokenizerBase:
    """Of the interrupted run, else as asked for, else the model's own, else bytes."""
    return load_tokenizer(
        checkpoint or arguments.tokenizer or model_name or "bytes", texts, arguments.tokenizer_vocab_size
    )


def make_documents(arguments: DataArguments) -> tuple:
    """(training, held-out) documents."""
    column, subset = arguments.text_column, arguments.dataset_subset
    if arguments.eval_data is None:
        train = load_documents(arguments.train_data, column, arguments.train_split, subset)
        return hold_out(train, arguments.eval_fraction, arguments.split_seed)
    # The shorter one first: what is wrong with it is not said after minutes of reading the other.
    held_out = load_documents(arguments.eval_data, column, arguments.eval_split, subset, "eval_data")
    return load_documents(arguments.train_data, column, arguments.train_split, subset), held_out


def make_rows(
    model_name: str | None, data_arguments: DataArguments, training_arguments: TrainingArguments, checkpoint: str | None
) -> tuple:
    """(tokenizer, {"train_data": PackedRows, "eval_data": PackedRows}, (training, held-out) documents)."""
    with training_arguments.main_process_first(desc="reading the data"):
        documents = make_documents(data_arguments)
        texts = (record["text"] for record in documents[0])
        tokenizer = make_tokenizer(data_arguments, model_name, checkpoint, texts)
        filler, length = document_ends(tokenizer)[1], data_arguments.sequence_length
        rows = {
            name: PackedRows(tokenize(each, tokenizer, data_arguments.preprocessing_num_proc), length, filler)
            for name, each in zip(("train_data", "eval_data"), documents)
        }
    return tokenizer, rows, documents


def make_trainer(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    training_arguments: TrainingArguments,
    resume: Resume,
) -> tuple[GriffinTrainer, dict]:
    """The trainer, and what metrics.json says about its model and data.

    Raises ValueError where the ranks, or the checkpoint `resume.checkpoint`, have other settings, data or models.
    """
    checkpoint = resume.checkpoint
    shared_by, float8 = model_arguments.sequence_parallel_size, model_arguments.float8
    settings = settings_of(data_arguments, training_arguments, shared_by, float8)
    check_same_on_all_ranks({"settings": {**settings, **settings_together(training_arguments)}})
    name = model_arguments.model_name_or_path
    tokenizer, rows, (train, held_out) = make_rows(name, data_arguments, training_arguments, checkpoint)
    sources = {"train_data": data_arguments.train_data, "eval_data": data_arguments.eval_data}
    data = rows_of(sources, rows)
    set_seed(training_arguments.seed)
    model = make_model(model_arguments, tokenizer)  # all processes at once: DeepSpeed shards weights as they are made
    if checkpoint is not None:
        check_same_rows(checkpoint, read_manifest(checkpoint).get("data", {}), data)
        check_same_model(checkpoint, model.config, resume.allow_changed)
    contents = {key: f"{each['tokens']:,} tokens, sha256 {each['sha256'][:12]}" for key, each in data.items()}
    check_same_on_all_ranks({"data": contents, "model": model.config.to_dict()})
    check_enough_rows(rows["train_data"], training_arguments)
    facts = {
        **sources,
        "sequence_length": data_arguments.sequence_length,
        "scan": describe_backend(training_arguments.device),
        "device": str(training_arguments.device),
        "parameters": get_model_param_count(model),
        **({} if float8 is None else {"float8_layers": convert(model, float8)}),
        "train_documents": len(train),
        "train_tokens": rows["train_data"].num_tokens,
        "eval_documents": len(held_out),
        "eval_tokens": rows["eval_data"].num_tokens,
        "eval_bytes": count_bytes(held_out),
    }
    trainer = GriffinTrainer(
        model=model,
        args=training_arguments,
        train_dataset=rows["train_data"],
        eval_dataset=rows["eval_data"],
        data_collator=default_data_collator,
        processing_class=tokenizer,
        compute_metrics=held_out_metrics(facts["eval_bytes"]),
        preprocess_logits_for_metrics=token_losses,
    )
    trainer.fingerprint = {"settings": settings, "data": data}
    save_after_step(trainer)
    print_table(trainer, facts["eval_bytes"] / max(rows["eval_data"].num_predicted, 1))
    if trainer.accelerator.is_fsdp2:
        keep_lambda_float32(trainer.model)  # before accelerate shards, and casts, the rest
    share_rows(trainer, shared_by)
    if training_arguments.gradient_checkpointing:
        mlp_in_pieces(trainer.model)
    if model_arguments.record_steps:
        record_steps(trainer, data_arguments.sequence_length)
    from_hub = name is not None and not Path(name).exists()
    keep_model_card(trainer, **({"base_model": name} if from_hub else {}))  # or Trainer's push writes another one
    facts["launch"] = describe(trainer.accelerator)
    return trainer, facts


def train(trainer: GriffinTrainer, facts: dict, checkpoint: str | None) -> dict:
    """Trains, evaluates and saves into output_dir; returns what it writes to metrics.json (on rank 0).

    Trains nothing where the checkpoint is the run's end, and was killed before all of the rest was done.
    """
    before: dict = {"num_input_tokens_seen": 0}
    if checkpoint is not None:
        before, trainer.checkpoint = read_state(checkpoint), checkpoint
        trainer.args.eval_on_start = False  # the run has begun, and been evaluated there
    begun = len(before.get("log_history", []))
    # The backward pass in this thread: what is written in Python takes twice as long in one of autograd's own.
    with torch.autograd.set_multithreading_enabled(False):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    check_ended(trainer)
    history = trainer.state.log_history
    seconds = result.metrics["train_runtime"] - sum(entry.get("eval_runtime", 0) for entry in history[begun:])
    tokens = trainer.state.num_input_tokens_seen - before["num_input_tokens_seen"]
    if not is_evaluated(trainer.state) or trainer.args.load_best_model_at_end:
        trainer.evaluate()
    trainer.model.config.use_cache = True  # Trainer switches it off; who loads the model wants it
    with saving(Path(trainer.args.output_dir)):
        trainer.save_model()
        if not trainer.is_world_process_zero():
            return {}
        return report(trainer, facts, tokens / seconds if tokens else logged_speed(history))


def logged_speed(history: list[dict]) -> float:
    """Tokens per second as an earlier session of this run has logged them."""
    return next((entry["train_tokens_per_second"] for entry in reversed(history) if entry.get("loss")), 0.0)


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
    if trainer.args.push_to_hub:
        push(trainer)
    last = output_dir / f"checkpoint-{metrics['steps']}"
    if read_manifest(last) is not None:
        write_final(last, output_dir)
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
        check_float8(model_arguments.float8, training_arguments.device)
        shared = model_arguments.sequence_parallel_size, model_arguments.float8
        start = decided_by_rank_0(lambda: where_to_start(data_arguments, training_arguments, resume, *shared))
        resume.checkpoint, is_over = start
        if is_over:
            end_of_complete_run(resume.checkpoint, training_arguments)
        check_names(model_arguments)
        if training_arguments.process_index == 0:
            print(f"reading {mask_secrets(data_arguments.train_data)}", flush=True)
        trainer, facts = make_trainer(model_arguments, data_arguments, training_arguments, resume)
        check_launch(trainer.accelerator)
        if resume.checkpoint is not None:
            check_checkpoint(resume.checkpoint, trainer.accelerator)
    except ValueError as error:
        stop(error)
    if trainer.is_world_process_zero():
        print(facts["scan"])
        print(facts["launch"])
        if "float8_layers" in facts:
            print(f"float8: {facts['float8_layers']} linear layers, {model_arguments.float8}")
        print(
            f"{facts['parameters']:,} parameters; {facts['train_tokens']:,} training tokens in "
            f"{len(trainer.train_dataset):,} rows of {data_arguments.sequence_length}; held out: "
            f"{facts['eval_tokens']:,} tokens, {facts['eval_bytes']:,} bytes",
            flush=True,
        )
    return trainer, train(trainer, facts, resume.checkpoint)


def stop(error: Exception) -> NoReturn:
    """Ends the process with one line. Rank 0 speaks first: an error of all ranks is then said once."""
    rank, of = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:
        time.sleep(SECONDS_FOR_RANK_0)  # by then the launcher has ended this process, if rank 0 has failed too
    spoken.stop(__file__, error, f" (rank {rank} of {of})" if of > 1 else "")


def main() -> None:
    try:
        trainer, metrics = run(sys.argv[1:])
        if metrics:
            print(next_steps(trainer.args.output_dir, metrics["eval_data"]))
        leave_together()
    except (FloatingPointError, NotSaved) as error:
        stop(error)
    except OSError as error:
        if error.errno not in PLAIN_ERRORS:
            raise
        stop(error)
    except RuntimeError as error:
        line = explain_silence(error)
        if line is None:
            raise
        stop(RuntimeError(line))
    except Stopped as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(error)
        leave_together()
        raise SystemExit(128 + signal.SIGTERM) from None
    except KeyboardInterrupt:
        print("\ninterrupted; --resume continues from the newest checkpoint in output_dir, if there is one")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

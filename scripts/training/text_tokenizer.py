"""Tokenizers for training from scratch: bytes, or a byte-level BPE; both are plain Transformers tokenizers."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from training.hub_ids import require_on_hub


END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD)
SMALLEST_BPE = 256 + len(SPECIAL_TOKENS)
ENCODED_AT_ONCE = 4_000_000  # characters; what the library returns for one takes a hundred bytes and more


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table, by byte value)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = byte value; 256 ends (and begins) a document, 257 pads. Every string decodes to itself."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    return _wrap(Tokenizer(models.BPE(vocab=vocabulary, merges=[])), split_words=False)


def train_bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with `vocab_size` entries (fewer where the text has no more pairs), special tokens included."""
    if vocab_size < SMALLEST_BPE:
        raise ValueError(f"tokenizer_vocab_size = {vocab_size}: allowed are whole numbers from {SMALLEST_BPE}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=byte_characters(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, split_words=True)


def load_tokenizer(name: str, texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """`name`: "bytes", "bpe" (trained on `texts`), a folder or a Hub id."""
    if name == "bytes":
        return byte_tokenizer()
    if name == "bpe":
        return train_bpe_tokenizer(texts, vocab_size)
    allowed = "'bytes', 'bpe', and a folder or Hub id with a tokenizer"
    if not Path(name).exists():
        require_on_hub("tokenizer", name, "model", allowed)
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # damaged files raise whatever their reader does
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"tokenizer = {name!r}: allowed are {allowed} ({reason})") from error


def check_fits(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises ValueError when the tokenizer has ids that the model's embedding (`vocab_size` rows) does not."""
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {vocab_size} rows: allowed are "
            "tokenizers of at most that size; set vocab_size in the model's configuration, or take a smaller tokenizer"
        )


def document_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """(first, last): the token put before each document, so that its first word is predicted, and the one after it."""
    last = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else last
    if first is None:
        raise ValueError("the tokenizer has neither an eos_token nor a bos_token: one of them must part the documents")
    return first, last


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """The ids (uint32) of each whole text, without special tokens around it: those of `tokenizer(texts)`."""
    # A long text asks for one sequence longer than the tokenizer's model could take; rows are cut later.
    longest, tokenizer.model_max_length = tokenizer.model_max_length, int(1e30)
    try:
        if not tokenizer.is_fast:
            encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
            return [np.array(ids, dtype=np.uint32) for ids in encoded]
        tokenizer("", add_special_tokens=False)  # sets what any call sets: no truncation, no padding, special tokens
    finally:
        tokenizer.model_max_length = longest
    encode_batch = tokenizer.backend_tokenizer.encode_batch_fast  # without each token's place in the text
    ids: list[np.ndarray] = []
    for group in _groups(texts):
        encodings = encode_batch(group, add_special_tokens=False)
        ids += [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
    return ids


def _groups(texts: list[str]) -> Iterable[list[str]]:
    """Consecutive texts of at most ENCODED_AT_ONCE characters together, or a longer one alone."""
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > ENCODED_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group


def _wrap(tokenizer: Tokenizer, split_words: bool) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PAD
    )
    # A prompt begins as the documents of the training text do, whoever encodes it.
    wrapped.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, wrapped.bos_token_id)]
    )
    return wrapped

"""`vllm serve FOLDER` over HTTP, by OpenAI's own client. Run by `make test-vllm`."""

import pytest
import torch
from engines import check_logprobs, save_model, save_tokenizer, server
from transformers import AutoTokenizer


pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    from openai import OpenAI

    folder = tmp_path_factory.mktemp("served")
    model = save_model(folder)
    with server(folder, folder) as address:
        yield model, OpenAI(base_url=f"{address}/v1", api_key="none")


@pytest.fixture(scope="module")
def expected(served, tmp_path_factory):
    model, _ = served
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def continuation(text, tokens=12):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=tokens, do_sample=False)
        return ids[0].tolist(), out[0, ids.shape[1] :].tolist(), tokenizer

    return continuation


GREEDY = {"model": "griffin", "temperature": 0.0, "max_tokens": 12}
BEYOND = {"ignore_eos": True, "return_token_ids": True}
TEXT = "The quick brown fox jumps over the lazy dog, " * 3


def test_completion(served, expected):
    model, client = served
    ids, tokens, tokenizer = expected(TEXT)
    completion = client.completions.create(prompt=TEXT, logprobs=1, extra_body=BEYOND, **GREEDY)
    choice = completion.choices[0]
    assert choice.token_ids == tokens and choice.text == tokenizer.decode(tokens, skip_special_tokens=True)
    result = {"tokens": tokens, "logprobs": choice.logprobs.token_logprobs, "prompt_logprobs": None}
    check_logprobs(model, ids, result)
    assert completion.usage.prompt_tokens == len(ids) and completion.usage.completion_tokens == 12


def test_completion_streams(served, expected):
    _, client = served
    _, tokens, tokenizer = expected(TEXT)
    parts = list(client.completions.create(prompt=TEXT, stream=True, extra_body=BEYOND, **GREEDY))
    assert len(parts) > 3
    assert "".join(part.choices[0].text for part in parts) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_chat_with_the_folder_s_template(served, expected):
    _, client = served
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    messages += [{"role": "user", "content": "Who are you?"}]
    _, tokens, tokenizer = expected("user: Hello\nassistant: Hi\nuser: Who are you?\nassistant: ")
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    answer = client.chat.completions.create(messages=messages, extra_body=BEYOND, **GREEDY)
    assert answer.choices[0].message.content == text
    stream = client.chat.completions.create(messages=messages, stream=True, extra_body=BEYOND, **GREEDY)
    assert "".join(part.choices[0].delta.content or "" for part in stream if part.choices) == text


def test_stop_string(served, expected):
    _, client = served
    _, tokens, tokenizer = expected(TEXT)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    plain = [i for i, letter in enumerate(text) if letter.isascii() and letter.isprintable()]
    assert plain, "this model's first tokens hold no letter to stop at"
    stop = text[plain[0]]
    choice = client.completions.create(prompt=TEXT, stop=stop, extra_body=BEYOND, **GREEDY).choices[0]
    assert choice.text == text[: text.index(stop)] and choice.finish_reason == "stop"

"""`griffin serve`: Transformers' server over HTTP, asked by OpenAI's own client, gives the tokens of `generate`."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_griffin import GriffinConfig, GriffinForCausalLM
from tests.serving.test_batch import letters


ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["thegate", "adecayofthestate", "of", "thewindowofthestateofthegate"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("served"), letters()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    torch.manual_seed(0)
    config = GriffinConfig(
        **{"vocab_size": 29, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
        **{"num_gate_blocks": 4, "attention_window_size": 8, "tie_word_embeddings": False},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    )
    for each in (GriffinForCausalLM(config), tokenizer):
        each.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def client(folder):
    """Of a server in a process of its own, started as a user starts it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "scripts/command.py", "serve", str(folder), "--max_rows", "4", "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = (folder.parent / "log.txt").open("w")
    server = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, env=environment, stdout=log, stderr=log)
    client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", timeout=300, max_retries=0)
    try:
        for _ in range(1200):
            assert server.poll() is None, (folder.parent / "log.txt").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=60).close()
                break
            except OSError:
                time.sleep(0.25)
        yield client
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)


@pytest.fixture(scope="module")
def alone(folder):
    """What `generate` says behind a prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def say(prompt: str, **options) -> str:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **options)
        return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)

    return say


def test_requests_that_come_together_find_what_each_finds_alone(folder, client, alone):
    """More than rows, by several threads, some of them streamed."""
    found = {}

    def ask(number: int) -> None:
        prompt, stream = PROMPTS[number % 4], bool(number % 2)
        options = {"model": str(folder), "prompt": prompt, "max_tokens": 5 + number, "temperature": 0}
        answer = client.completions.create(**options, stream=stream)
        found[number] = "".join(part.choices[0].text for part in answer) if stream else answer.choices[0].text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: alone(PROMPTS[number % 4], max_new_tokens=5 + number) for number in range(8)}
    assert any(found.values())


def test_chat_and_a_stop_string(folder, client, alone):
    messages = [{"role": "user", "content": "thegate"}]
    whole = alone("thegate", max_new_tokens=12)
    chat = {"model": str(folder), "messages": messages, "max_tokens": 12, "temperature": 0}
    assert client.chat.completions.create(**chat).choices[0].message.content == whole
    stop = whole[4:6]
    asked = {"model": str(folder), "prompt": "thegate", "max_tokens": 12, "temperature": 0}
    text = client.completions.create(**asked, stop=stop).choices[0].text
    assert text == whole[: whole.index(stop) + 2] != whole


def test_what_the_engine_does_not_know_runs_alone(folder, client, alone):
    asked = {"model": str(folder), "prompt": "of", "max_tokens": 6, "temperature": 0}
    beams = '{"num_beams": 3, "max_new_tokens": 6, "eos_token_id": 2, "pad_token_id": 0}'
    found = client.completions.create(**asked, extra_body={"generation_config": beams})
    assert found.choices[0].text == alone("of", max_new_tokens=6, num_beams=3)


def test_a_client_that_goes_leaves_its_row(folder, client, alone):
    """A stream of very many tokens is closed; the next requests are served, more of them than there are rows left."""
    for _ in range(5):
        options = {"model": str(folder), "prompt": "a", "max_tokens": 100_000, "temperature": 0}
        ended = '{"max_new_tokens": 100000, "eos_token_id": -1, "pad_token_id": 0}'
        stream = client.completions.create(**options, stream=True, extra_body={"generation_config": ended})
        next(iter(stream))
        stream.close()
    options = {"model": str(folder), "prompt": "of", "max_tokens": 5, "temperature": 0}
    assert client.completions.create(**options).choices[0].text == alone("of", max_new_tokens=5)


def test_a_client_that_goes_before_its_answer_leaves_its_row_too(folder, client, alone):
    """One that does not stream: its answer begins when it ends."""
    ended = '{"max_new_tokens": 1000000, "eos_token_id": -1, "pad_token_id": 0}'
    options = {"model": str(folder), "prompt": "a", "max_tokens": 1_000_000, "temperature": 0}
    body = json.dumps({**options, "generation_config": ended}).encode()
    for _ in range(5):
        with socket.create_connection((client.base_url.host, client.base_url.port)) as asked:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            asked.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            time.sleep(0.2)
    options = {"model": str(folder), "prompt": "of", "max_tokens": 5, "temperature": 0, "timeout": 60}
    assert client.completions.create(**options).choices[0].text == alone("of", max_new_tokens=5)


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_run_is_the_clients_error_and_says_why(stream, folder, client):
    asked = {"model": str(folder), "prompt": "of", "max_tokens": 5, "temperature": 0, "stop": ['"', ""]}
    with pytest.raises(openai.APIError if stream else openai.BadRequestError) as error:
        list(client.completions.create(**asked, stream=stream))
    said = error.value.body if stream else error.value.body["detail"]
    assert said == """error: ValueError: stop = ['"', '']: allowed are strings that are not empty"""

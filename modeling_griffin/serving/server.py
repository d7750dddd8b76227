"""Transformers' own server for a Griffin: `griffin serve FOLDER`. Its requests run side by side, not one by one.

Transformers' server (`transformers serve`) has two ways to generate: `generate`, one request after the other, and its
continuous batching, which pages attention's keys. This puts the engine of `generate_batch` in the place of the first;
everything else, from HTTP to chat templates, stays Transformers'. What the engine does not know, beams for example,
still goes to `generate`.
"""

import asyncio
import json
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import transformers
from fastapi import HTTPException
from transformers import GenerationConfig
from transformers.cli.serving import server as http
from transformers.cli.serving import utils as serving
from transformers.cli.transformers import main as transformers_main

from .. import GriffinForCausalLM
from .batch import run_arrivals
from .transformers_call import request_fields


logger = logging.getLogger(__name__)
CHUNK = 2048  # tokens of a long prompt in one pass


def serve(folder: str, options: list[str], max_rows: int) -> None:
    """Runs until it is stopped. options: of `transformers serve`. max_rows: requests that run at once."""
    with_batches(max_rows)
    sys.argv = ["transformers", "serve", folder, *options]
    transformers_main()


def with_batches(max_rows: int) -> None:
    """Makes Transformers' server of this process find the model's class, and run its requests on our engine."""
    transformers.GriffinForCausalLM = GriffinForCausalLM  # it looks classes up there, whatever AutoModel knows

    class State(serving.GenerationState):
        def use_continuous_batching(self, model, modality) -> bool:
            return False  # Transformers' own: its pages are for attention

        def get_manager(self, model_id: str, use_cb: bool = False):
            if model_id not in self._generate_managers:
                self._generate_managers[model_id] = BatchManager(max_rows)
            return self._generate_managers[model_id]

        def shutdown(self) -> None:
            for manager in self._generate_managers.values():
                manager.stop()

    serving.GenerationState = State
    build = http.build_server

    def build_server(*arguments: Any, **options: Any) -> Any:
        app = build(*arguments, **options)
        app.add_middleware(LeaveWhenGone)
        return app

    http.build_server = build_server


class LeaveWhenGone:
    """ASGI: ends the work for a client that has gone before its answer begins; the server itself would finish it.

    A stream, whose answer has begun, is ended by the server.
    """

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages: asyncio.Queue = asyncio.Queue()
        answered = gone = False

        async def listen() -> None:
            nonlocal gone
            message = {"type": ""}
            while message["type"] != "http.disconnect":
                message = await receive()
                messages.put_nowait(message)
            if not answered:
                gone = True
                work.cancel()

        async def answer(message: dict) -> None:
            nonlocal answered
            answered = True
            await send(message)

        work = asyncio.ensure_future(self.app(scope, messages.get, answer))
        listening = asyncio.ensure_future(listen())
        try:
            await work
        except asyncio.CancelledError:
            if not gone:
                raise
        finally:
            listening.cancel()


class Inbox:
    """Requests of any thread's, for an engine in another: its arrivals."""

    def __init__(self):
        self.changed, self.waiting = threading.Condition(), deque()
        self.number, self.closed, self.dropped = 0, False, set()

    def put(self, request: dict) -> int:
        """The request's number."""
        with self.changed:
            self.number += 1
            self.waiting.append((self.number, request))
            self.changed.notify()
            return self.number

    def wait(self) -> bool:
        """Until a request is there. False when none will come."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closed)
            return not self.closed

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify()

    def take(self, room: int, idle: bool) -> list[tuple[int, object]]:
        """As `Arrivals.take`. Where nothing runs it does not wait: the step is left to others meanwhile."""
        with self.changed:
            return [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]

    def drop(self, index: int) -> None:
        self.dropped.add(index)

    def cancelled(self, index: int) -> bool:
        return index in self.dropped


class BatchManager(serving.GenerateManager):
    """Runs the requests of one model side by side, in one thread of its own that begins with the first of them."""

    def __init__(self, max_rows: int):
        super().__init__()
        self.max_rows, self.inbox = max_rows, Inbox()
        self.listeners: dict[int, Callable] = {}
        self.lock, self.runs = threading.Lock(), False

    def generate_streaming(
        self,
        model: torch.nn.Module,
        processor: Any,
        inputs: dict,
        gen_config: GenerationConfig,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue, Any]:
        fields = self._fields(model, inputs, gen_config)
        if fields is None:
            return super().generate_streaming(model, processor, inputs, gen_config, request_id, response_parser)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        tokenizer = getattr(processor, "tokenizer", processor)
        streamer = serving.DirectStreamer(tokenizer._tokenizer, loop, queue, response_parser=response_parser)
        streamer.put(inputs["input_ids"])

        def listen(index: int, token: int | None, finish_reason: str | None) -> None:
            try:
                if token is not None:
                    streamer.put(torch.tensor([token]))
                if finish_reason is not None and not finish_reason.startswith("error: "):
                    streamer.end()
            except serving._GenerationCancelled:  # the client has gone
                self._drop(index)
                streamer.end()
            except Exception as error:  # of the tokenizer, or of what reads tool calls: this request's matter alone
                self._drop(index)
                finish_reason = f"error: {error!r}"
            if finish_reason is not None and finish_reason.startswith("error: "):
                loop.call_soon_threadsafe(queue.put_nowait, serving._StreamError(_quoted(finish_reason)))

        self._run(model, tokenizer, fields, listen)
        return queue, streamer

    async def generate_non_streaming(
        self, model: torch.nn.Module, processor: Any, inputs: dict, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, list[int]]:
        fields = self._fields(model, inputs, gen_config)
        if fields is None:
            return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        loop, tokens = asyncio.get_running_loop(), []
        done = loop.create_future()

        def finish(finish_reason: str) -> None:
            if done.done():  # the client has gone
                return
            if finish_reason.startswith("error: ValueError: "):  # of what was asked for
                done.set_exception(HTTPException(400, finish_reason))
            elif finish_reason.startswith("error: "):
                done.set_exception(RuntimeError(finish_reason))
            else:
                done.set_result(None)

        def listen(index: int, token: int | None, finish_reason: str | None) -> None:
            tokens.extend([] if token is None else [token])
            if finish_reason is not None:
                loop.call_soon_threadsafe(finish, finish_reason)

        index = self._run(model, getattr(processor, "tokenizer", processor), fields, listen)
        try:
            await done
        except asyncio.CancelledError:
            self._drop(index)
            raise
        return processor.decode(tokens, skip_special_tokens=True), inputs["input_ids"].shape[-1], tokens

    def stop(self) -> None:
        self.inbox.close()

    def _fields(self, model, inputs, gen_config) -> dict | None:
        """The request, with a seed of its own from torch's generator, which a request with `seed` has set."""
        try:
            fields = request_fields(model, gen_config, inputs["input_ids"][0].tolist())
        except ValueError as error:
            logger.warning("a request runs alone: %s", error)
            return None
        return {**fields, "seed": int(torch.randint(2**62, ()))}

    def _run(self, model, tokenizer, fields: dict, listen: Callable) -> int:
        with self.lock:
            index = self.inbox.put(fields)
            self.listeners[index] = listen
            if not self.runs:
                self.runs = True
                threading.Thread(target=self._loop, args=(model, tokenizer), daemon=True).start()
            return index

    def _loop(self, model, tokenizer) -> None:
        while self.inbox.wait():
            try:
                for token in run_arrivals(model, self.inbox, self.max_rows, CHUNK, tokenizer):
                    self._hand_over(*token)
            except Exception as error:  # of the model or the GPU: those that run have failed, others may not
                logger.exception("the requests that ran have failed")
                with self.lock:
                    waiting = dict(self.inbox.waiting)
                    failed = [index for index in self.listeners if index not in waiting]
                    if not failed:  # it failed before it took any, and would again and again
                        failed = list(waiting)
                        self.inbox.waiting.clear()
                for index in failed:
                    self._hand_over(index, None, f"error: {error!r}")

    def _drop(self, index: int) -> None:
        """Nobody wants this request any more, unless it has ended already."""
        with self.lock:
            if index in self.listeners:
                self.inbox.drop(index)

    def _hand_over(self, index: int, token: int | None, finish_reason: str | None) -> None:
        with self.lock:  # held by `_run` until the listener is there
            listen = self.listeners[index]
            if finish_reason is not None:
                del self.listeners[index]
                self.inbox.dropped.discard(index)
        try:
            listen(index, token, finish_reason)
        except Exception:  # it must not end the others
            logger.exception("a request could not be answered")
            self._drop(index)


def _quoted(message: str) -> str:
    """As it stands inside of a string of JSON, where the server puts it as it is."""
    return json.dumps(message)[1:-1]

"""The server's thread, without a server: what goes wrong with one request is that request's matter alone."""

import threading

import pytest


serving = pytest.importorskip("modeling_griffin.serving.server", exc_type=ImportError)
FIELDS = {"prompt": [1, 2, 3], "max_new_tokens": 6, "eos_token_id": ()}


class Listener:
    """Notes tokens, and raises at the second one where it is a bad one."""

    def __init__(self, bad: bool):
        self.bad, self.tokens, self.ended, self.reason = bad, [], threading.Event(), None

    def __call__(self, index, token, finish_reason):
        self.tokens += [] if token is None else [token]
        if finish_reason is not None:
            self.reason = finish_reason
            self.ended.set()
        if self.bad and len(self.tokens) >= 2:
            raise ValueError("a tool call that is none")


@pytest.fixture
def manager():
    made = serving.BatchManager(4)
    yield made
    made.stop()


def test_a_listener_that_raises_fails_alone(manager, small_model):
    model = small_model()
    bad, good, later = Listener(True), Listener(False), Listener(False)
    for listener in (bad, good):
        manager._run(model, None, FIELDS, listener)
    assert good.ended.wait(60) and bad.ended.wait(60)
    assert good.reason == "length" and len(good.tokens) == 6
    assert bad.reason == "cancelled" and len(bad.tokens) == 2
    manager._run(model, None, FIELDS, later)
    assert later.ended.wait(60) and later.tokens == good.tokens
    assert manager.listeners == {} and manager.inbox.dropped == set()


def test_what_is_dropped_before_its_turn_is_not_read(manager, monkeypatch, small_model):
    model, listener = small_model(), Listener(False)
    wait = manager.inbox.wait

    def drop_first():
        found = wait()
        manager._drop(1)
        return found

    monkeypatch.setattr(manager.inbox, "wait", drop_first)
    index = manager._run(model, None, FIELDS, listener)
    assert index == 1 and listener.ended.wait(60) and (listener.reason, listener.tokens) == ("cancelled", [])
    manager._drop(index)  # it has ended
    assert manager.inbox.dropped == set()


def test_what_fails_before_any_request_is_taken_is_answered(manager, monkeypatch, small_model):
    """A step for which there is no memory, for example: a thread that tried again and again would answer nobody."""
    model, failed, later = small_model(), Listener(False), Listener(False)

    def out_of_memory(*_):
        raise MemoryError("no room for a step")

    with monkeypatch.context() as patch:
        patch.setattr(serving, "run_arrivals", out_of_memory)
        manager._run(model, None, FIELDS, failed)
        assert failed.ended.wait(60) and failed.reason == "error: MemoryError('no room for a step')"
    manager._run(model, None, FIELDS, later)
    assert later.ended.wait(60) and later.reason == "length"

"""What the tests of decoding share: a look at which path each request takes."""

import pytest

from modeling_griffin.decode import generate as decode_generate
from modeling_griffin.decode.eligibility import decide


@pytest.fixture
def paths(monkeypatch):
    """What is decided from here on."""
    found = []

    def watched(*arguments, **options):
        found.append(decide(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(decode_generate, "decide", watched)
    return found

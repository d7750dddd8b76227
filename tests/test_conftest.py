"""Each process of pytest-xdist begins with another GPU and sees them all."""

import pytest

from tests.conftest import gpus_of


@pytest.mark.parametrize(
    "worker, count, visible, expected",
    [("gw0", 2, None, "0,1"), ("gw1", 2, None, "1,0"), ("gw4", 3, None, "1,2,0"), ("gw1", 2, "5,3", "3,5")],
)
def test_gpus_of_a_worker(worker, count, visible, expected):
    assert gpus_of(worker, count, visible) == expected

import pytest

from nasfast.latency import Target


@pytest.fixture
def target():
    """A machine."""
    return Target("torch", "cpu", 1, 1, (64, 96), 3, "float32", "machine", "2.13")

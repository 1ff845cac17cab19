"""A state as a checkpoint gives it back."""

import io

import pytest
import torch


@pytest.fixture(scope="session")
def reloaded():
    def reload(state):
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    return reload

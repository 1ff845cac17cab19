"""Device names, mixed precision and the description of the machine."""

from __future__ import annotations

import json
import os

import pytest
import torch

import nasfast
from nasfast.device import autocast_dtype, deterministic, machine_info, resolve_device


def test_resolve_device() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.cuda
def test_resolve_cuda() -> None:
    assert resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    assert isinstance(autocast_dtype(torch.device("cuda")), torch.dtype | None)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:x", "cpu:0"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(ValueError) as error:
        resolve_device(name)
    assert str(error.value) == (
        f"resolve_device: expected device 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}; "
        "'auto' takes a GPU where there is one"
    )


@pytest.mark.parametrize(
    ("version", "built"), [(None, "built without it"), ("13.0", "built for CUDA 13.0")]
)
def test_no_cuda(monkeypatch: pytest.MonkeyPatch, version: str | None, built: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(ValueError) as error:
        resolve_device("cuda")
    assert str(error.value) == (
        "resolve_device: expected a device of this machine, got 'cuda', but torch finds no CUDA "
        f"device (torch {torch.__version__} is {built}); use 'cpu' or 'auto', or run "
        "`nasfast info` to see what is missing"
    )


def test_index_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ValueError) as error:
        resolve_device("cuda:1")
    assert str(error.value) == (
        "resolve_device: expected a device index below 1 (the CUDA devices of this machine), got "
        "'cuda:1'; use 'cuda' for the first one"
    )


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False}, None),
        ({}, None),
    ],
)
def test_autocast_on_cpu(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert autocast_dtype(torch.device("cpu")) == dtype


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), None), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)]
)
def test_autocast_on_cuda(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert autocast_dtype(torch.device("cuda")) == dtype


def test_machine_info() -> None:
    info = machine_info()
    assert info["nasfast"] == nasfast.__version__
    assert info["torch"] == torch.__version__
    assert info["threads"] == torch.get_num_threads()
    assert info["cpu"]
    assert json.loads(json.dumps(info)) == info


def test_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's mode, as it was before once it is left."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def modes() -> tuple[bool, bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    before = modes()
    with deterministic(False):
        assert modes() == before == (False, False, True)
    with deterministic(True):
        assert modes() == (True, True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert modes() == before

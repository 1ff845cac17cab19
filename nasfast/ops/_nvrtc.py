"""Compiles the CUDA kernels when they are first used, by NVRTC through cupy.

An extension that was built without nvcc holds the kernels' host code alone, and asks here for the
code of a kernel when it first launches it on a device. The sources are those that nvcc compiles; a
kernel is one instance of a template. Its code is kept in the folder ``kernels`` of
``$NASFAST_CACHE`` or ``~/.cache/nasfast``, in a file named after all that it depends on.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import stat
import tempfile
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

OPTIONS = ("-std=c++17", "-default-device", "-no-source-include")
"""Of NVRTC: functions without a mark are the device's, as host code stands beside the kernels."""

_PACKAGE = Path(__file__).resolve().parents[1]
_LOCK = threading.Lock()


class Program(NamedTuple):
    """What NVRTC makes of some kernels."""

    cubin: bytes
    symbols: dict[str, str]
    """Kernel: its name in ``cubin``."""
    log: str


def missing() -> str | None:
    """Why no kernel can be compiled, or None; without loading anything."""
    if importlib.util.find_spec("cupy_backends") is None:
        return "built without nvcc, and cupy is not installed; pip install 'nasfast[cuda]'"
    return None


@cache
def nvrtc() -> Any:
    """cupy's binding of NVRTC.

    Raises:
        RuntimeError: there is no cupy, or no NVRTC that it can load.
    """
    if reason := missing():
        raise RuntimeError(reason)
    try:
        binding = importlib.import_module("cupy_backends.cuda.libs.nvrtc")

        binding.getVersion()
    except Exception as error:  # of many kinds: cupy looks for the library in several ways
        raise RuntimeError(
            f"cupy cannot load NVRTC: {str(error).splitlines()[0]}; pip install nvidia-cuda-nvrtc"
        ) from error
    return binding


def version() -> str:
    """Of the compiler: "NVRTC 13.0 through cupy 14.2.0".

    Raises:
        RuntimeError: as :func:`nvrtc`.
    """
    major, minor = nvrtc().getVersion()
    names = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            return f"NVRTC {major}.{minor} through cupy {importlib.metadata.version(name)}"
    return f"NVRTC {major}.{minor} through cupy"


def sources() -> Path:
    """The folder csrc: of the checkout, or of the installed package."""
    installed = _PACKAGE / "csrc"
    return installed if installed.is_dir() else _PACKAGE.parent / "csrc"


@cache
def reached(file: str) -> dict[str, str]:
    """Path under csrc: content, of a file and all that it includes from there."""
    found: dict[str, str] = {}
    waiting = [file]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = (sources() / name).read_text()
        waiting += re.findall(r'^#include "(.+)"', found[name], re.MULTILINE)
    return found


def root(kernel: str) -> str:
    """The file under csrc that includes the source of a kernel, given with its namespaces."""
    match = re.match(r"nasfast::(\w+)::cuda::", kernel)
    return f"{match[1]}/{match[1]}_cuda.cu" if match else "common/cuda_sums.cuh"


def architecture(major: int, minor: int) -> str:
    """As NVRTC names it, for a compute capability.

    Raises:
        RuntimeError: the kernels, or this NVRTC, do not know it.
    """
    if major < 8:
        raise RuntimeError(
            f"expected a device of compute capability 8.0 or newer, got {major}.{minor}; "
            "use another device"
        )
    known = nvrtc().getSupportedArchs()
    if 10 * major + minor not in known:
        newest = "{}.{}".format(*divmod(max(known), 10))
        raise RuntimeError(
            f"expected a device that {version()} knows, up to compute capability {newest}, got "
            f"{major}.{minor}; pip install a newer nvidia-cuda-nvrtc"
        )
    return f"sm_{major}{minor}" + "a" * ((major, minor) == (9, 0))


def compile_kernels(kernels: Sequence[str], arch: str, options: Sequence[str] = OPTIONS) -> Program:
    """Machine code of kernels whose sources have one :func:`root`.

    Raises:
        RuntimeError: NVRTC refuses them; says its first error.
    """
    binding = nvrtc()
    (file,) = {root(kernel) for kernel in kernels}
    files = reached(file)
    # the instances that end a *_cuda.cu are the host's
    first = re.findall(r'^#include ".+"', files[file], re.MULTILINE) if file.endswith(".cu") else ()
    lines = ['#include "common/cuda_nvrtc.cuh"', *(first or [f'#include "{file}"'])]
    # headers of the C++ library: what is needed of them is in cuda_nvrtc.cuh
    found = {name for text in files.values() for name in re.findall(r"#include <(.+)>", text)}
    standard = sorted(found)
    headers = [name.encode() for name in standard]
    text = "\n".join(lines) + "\n"
    program = binding.createProgram(text, "kernels.cu", [b""] * len(headers), headers)
    try:
        for kernel in kernels:
            binding.addNameExpression(program, kernel)
        try:
            binding.compileProgram(program, (f"-arch={arch}", f"-I{sources()}", *options))
        except binding.NVRTCError as error:
            log = [line.strip() for line in binding.getProgramLog(program).splitlines()]
            first_error = next((line for line in log if "error" in line), str(error))
            raise RuntimeError(
                f"{version()} cannot compile {kernels[0]} for {arch}: {first_error}; report it"
            ) from error
        symbols = {kernel: binding.getLoweredName(program, kernel) for kernel in kernels}
        return Program(binding.getCUBIN(program), symbols, binding.getProgramLog(program))
    finally:
        binding.destroyProgram(program)


def kernel_code(launch: str, kernel: str, major: int, minor: int) -> tuple[bytes, str]:
    """Cubin of a kernel for a compute capability, and its symbol there; the extension calls this.

    ``launch`` is the name of the launch, "<op>: <kernel>", which begins the text of errors.

    Raises:
        RuntimeError: it cannot be compiled.
    """
    with _LOCK:  # of two threads one compiles, and the other finds the file
        try:
            arch = architecture(major, minor)
            key = _key(kernel, arch)
            path = directory() / f"{key.hex()}.cubin"
            kept = _read(path, key)
            if kept is None:
                program = compile_kernels([kernel], arch)
                kept = program.cubin, program.symbols[kernel]
                _keep(path, key, *kept)
            return kept
        except RuntimeError as error:
            raise RuntimeError(f"{launch}: {error}") from error


def directory() -> Path:
    """Folder of compiled kernels; below the temporary directory where there is no home."""
    try:
        return Path(os.environ.get("NASFAST_CACHE") or "~/.cache/nasfast").expanduser() / "kernels"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"nasfast-{os.getuid()}" / "kernels"


def _key(kernel: str, arch: str) -> bytes:
    """A digest of all that the code depends on."""
    digest = hashlib.sha256()
    for part in (kernel, arch, *OPTIONS, *map(str, nvrtc().getVersion())):
        digest.update(part.encode() + b"\0")
    for name in (root(kernel), "common/cuda_nvrtc.cuh"):
        for path, content in sorted(reached(name).items()):
            digest.update(f"{path}\0{content}\0".encode())
    return digest.digest()


def _read(path: Path, key: bytes) -> tuple[bytes, str] | None:
    """What a file holds; None where there is none, it is damaged, or another user could have
    written it."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            others = stat.S_IWGRP | stat.S_IWOTH
            if (
                not stat.S_ISREG(status.st_mode)
                or status.st_uid not in (os.getuid(), 0)
                or status.st_mode & others
            ):
                return None
            data = file.read()
    except OSError:
        return None
    checksum, body = data[:32], data[32:]
    if hashlib.sha256(key + body).digest() != checksum:
        return None
    symbol, _, cubin = body.partition(b"\0")
    return cubin, symbol.decode()


def _keep(path: Path, key: bytes, cubin: bytes, symbol: str) -> None:
    """Write a file that only this user may change, in one step; warn where that cannot be."""
    body = symbol.encode() + b"\0" + cubin
    try:
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(".tmp", ".", path.parent)
        try:
            with open(number, "wb") as file:
                file.write(hashlib.sha256(key + body).digest() + body)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        warnings.warn(
            f"compiled CUDA kernels cannot be kept in {path.parent}: {error.strerror}; set "
            "NASFAST_CACHE to a folder that you may write to, or every process compiles them anew",
            RuntimeWarning,
            stacklevel=2,
        )

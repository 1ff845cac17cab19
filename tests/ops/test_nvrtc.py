"""CUDA kernels without nvcc: NVRTC compiles each of them, and what the driver is given is right."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builds import ROOT, Builds, needs_nvrtc, run

from nasfast.ops import _native, _nvrtc, deform_conv2d

# known spills of NVRTC 13.0: kernel, architectures, bytes stored and loaded
SPILLED = (
    (r"columns_forward_kernel\w*float16", r"\w+", 8),
    (r"backward_weightINS_\w*float16ELb1ELi256E", "sm_80", 40),
)
GATHER = "nasfast::feature_gather::cuda::gather_kernel"
# of any CUDA: nothing here needs a GPU, or a driver
DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static int current = -1;
struct Function { const char* name; int parameters[16], count; };
static int told(const char* name) { return getenv(name) ? atoi(getenv(name)) : 0; }
int cuGetErrorString(int s, const char** t) { *t = s == 2 ? "out of memory" : "no"; return 0; }
int cuInit(unsigned f) { return 0; }
int cuDriverGetVersion(int* v) { *v = 13000; return 0; }
int cuDeviceGetCount(int* n) { *n = 2; return 0; }
int cuDeviceGetName(char* n, int size, int d) { strcpy(n, "fake"); return 0; }
int cuDeviceGetAttribute(int* v, int a, int d) { *v = a == 16 ? 4 : a == 75 ? 9 : 0; return 0; }
int cuDevicePrimaryCtxRetain(void** c, int d) { *c = (void*)(long)(d + 100); return 0; }
int cuCtxPushCurrent_v2(void* c) { current = (int)(long)c - 100; return 0; }
int cuCtxPopCurrent_v2(void** c) { current = -1; return 0; }
int cuStreamIsCapturing(void* s, int* v) { *v = told("CAPTURING"); return 0; }
int cuModuleLoadData(void** m, const void* image) {  // the image: sizes of the parameters
    *m = strdup(image);
    return told("LOAD");
}
int cuModuleGetFunction(void** f, void* m, const char* name) {
    struct Function* made = calloc(1, sizeof *made);
    char* at = m;
    for (char* end; *at; at = end + 1) made->parameters[made->count++] = strtol(at, &end, 10);
    made->name = strdup(name);
    *f = made;
    return 0;
}
int cuFuncGetParamInfo(struct Function* f, size_t i, size_t* offset, size_t* size) {
    if ((int)i >= f->count) return 1;
    *offset = 0;
    *size = f->parameters[i];
    return 0;
}
int cuFuncSetAttribute(void* f, int a, int v) {
    printf("attribute %d %d\n", a, v);
    return 0;
}
int cuLaunchKernel(struct Function* f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void* stream, void** arguments, void** extra) {
    printf("launch %d %s %u,%u,%u %u,%u,%u %u %ld ", current, f->name, x, y, z, bx, by, bz, shared,
           (long)stream);
    for (int i = 0; i < f->count; ++i)
        for (int j = 0; j < f->parameters[i]; ++j)
            printf("%02x", ((unsigned char*)arguments[i])[j]);
    printf("\n");
    fflush(stdout);
    return told("LAUNCH");
}
"""
CALL = r"""
import json, sys
import _C_nvrtc as C
sizes = dict(C.cuda_kernels())
def compile(launch, kernel, major, minor):
    assert (major, minor) == (9, 0)
    print("compile", launch, kernel, flush=True)
    changed = json.loads(sys.argv[1])
    parameters = "".join(f"{size + changed} " for size in sizes[kernel])
    return parameters.encode() + b"\0", kernel.replace(" ", "")
C.set_cuda_compiler(compile)
print(C.cuda_info())
for _ in range(2):
    for name, dtype, sizes_of, pointers, device, *memory in json.loads(sys.argv[2]):
        C_call = getattr(C, name + "_cuda")
        print(getattr(C, name + "_cuda_workspace")(dtype, sizes_of, device))
        try:
            C_call(dtype, sizes_of, pointers, *(memory or [4096]), 77, device)
        except RuntimeError as error:
            print("error", error)
"""


@pytest.fixture(scope="module")
def module(builds: Builds) -> Path:
    """Folder of the module without CPU kernels, and of a driver that prints its calls."""
    folder = builds.nvrtc()
    (folder / "driver.c").write_text(DRIVER)
    library = ["-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "driver.c"]
    run(os.environ.get("CC", "gcc"), "-w", *library)
    return folder


def call(module: Path, calls: list[Any], changed: int = 0, **environment: str) -> list[str]:
    """Lines of what driver and compiler are asked for, by calls that are made twice."""
    return run(
        sys.executable,
        "-c",
        CALL,
        json.dumps(changed),
        json.dumps(calls),
        PYTHONPATH=str(module),
        LD_LIBRARY_PATH=str(module),
        **environment,
    ).splitlines()


def gather_call(device: int) -> list[Any]:
    """Five rows of eight float32 elements, to bfloat16; indices at 256, data at 128, out at 512."""
    fields = [0, 1, 0, 8] + [0] * 60
    return [
        "feature_gather_forward",
        0,
        [5, 9, 64, 1, 0, 1, *fields],
        [128, 256, 512, *[0] * 15],
        device,
    ]


def test_launch(module: Path) -> None:
    """Grid, block, shared memory, stream, device and arguments reach the driver; a kernel is
    compiled once for a device, whichever is current."""
    lines = call(module, [gather_call(1), gather_call(0)])
    assert lines[0] == (
        "{'runtime': 0, 'driver': 13000, 'devices': [('fake', (9, 0)), ('fake', (9, 0))], "
        "'error': ''}"
    )
    compiled = f"compile feature_gather: gather {GATHER}"
    assert [line for line in lines if line.startswith("compile")] == [compiled] * 2
    launches = [line.split() for line in lines if line.startswith("launch")]
    assert [words[1:7] for words in launches] == [
        [device, GATHER, "1,5,1", "256,1,1", "0", "77"] for device in "1010"
    ]
    words = [int.from_bytes(bytes.fromhex(launches[0][7])[i : i + 8], "little") for i in (0, 8, 16)]
    assert words == [5, 9, 64]
    pointers = bytes.fromhex(launches[0][7])[8 * 70 : 8 * 73]
    assert [pointers[i] + 256 * pointers[i + 1] for i in (0, 8, 16)] == [128, 256, 512]
    assert len({words[7] for words in launches}) == 1


def masked(arguments: bytes, padding: bytes) -> bytes:
    """Without the bytes between fields of structs, which hold anything."""
    assert len(arguments) == len(padding)
    return bytes(byte & kept for byte, kept in zip(arguments, padding))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulation is of x86-64")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches_are_those_of_the_emulation(
    module: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Every launch of forward and backward: grid, block, shared memory, each byte of arguments."""
    (path,) = builds.emulation().glob("_C_emulated*.so")
    spec = importlib.util.spec_from_file_location("_C_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    emulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulated)
    calls: list[Any] = []

    def entry(name: str) -> Any:
        def run(dtype: int, sizes: tuple[int, ...], pointers: tuple[int, ...]) -> None:
            size = getattr(emulated, f"{name}_cuda_workspace")(dtype, sizes, 0)
            workspace = torch.empty(size + 256, dtype=torch.uint8)
            aligned = workspace.data_ptr() + -workspace.data_ptr() % 256
            calls.append([name, dtype, sizes, pointers, 0, aligned])
            getattr(emulated, f"{name}_cuda")(dtype, sizes, pointers, aligned, 0, 0)

        return run

    names = ("deform_conv2d_forward", "deform_conv2d_backward")
    monkeypatch.setattr(_native, "C", SimpleNamespace(**{name: entry(name) for name in names}))
    monkeypatch.setattr(_native, "CPU_DTYPES", tuple(_native.DTYPES))
    tensors = [
        torch.randn(*shape).to(dtype).requires_grad_()
        for shape in ((2, 16, 5, 7), (2, 18, 5, 7), (8, 16, 3, 3), (8,), (2, 9, 5, 7))
    ]
    emulated.record(True)
    output = deform_conv2d(*tensors[:4], padding=1, mask=tensors[4])
    torch.autograd.grad(output, tensors, torch.ones_like(output))
    expected = [
        [",".join(map(str, grid)), f"{threads},1,1", str(shared), masked(arguments, padding)]
        for _, grid, threads, shared, arguments, padding in emulated.launches()
    ]
    paddings = [padding for *_, padding in emulated.launches()] * 2
    emulated.record(False)
    assert [name for name, *_ in calls] == [*names]
    lines = [line for line in call(module, calls) if line.startswith("launch")]
    launches = [line[len("launch 0 ") :].rsplit(" ", 5)[1:] for line in lines]
    assert len(expected) >= 5
    assert [
        [*words[:3], masked(bytes.fromhex(words[4]), padding)]
        for words, padding in zip(launches, paddings, strict=True)
    ] == expected * 2


def test_large_shared_memory(module: Path) -> None:
    """More than 48 KiB is asked for before the launch."""
    geometry = [1, 64, 8, 8, 64, 8, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 18, 9, 1, 0, 0]
    lines = call(module, [["deform_conv2d_forward", 2, geometry, [256] * 6, 0]])
    attributes = [line.split() for line in lines if line.startswith("attribute")]
    launches = [line.split() for line in lines if line.startswith("launch")]
    assert len(launches) == 2
    name = launches[0][2]
    assert "forward_kernel<nasfast::deform_conv2d::cuda::TensorSamples<nasfast::bfloat16" in name
    shared = int(launches[0][5])
    assert [words[2] for words in attributes] == ([str(shared)] * 2 if shared > 48 << 10 else [])


@pytest.mark.parametrize(
    ("environment", "changed", "message"),
    [
        (
            {"CAPTURING": "1"},
            0,
            "expected a kernel that has run before, as its code cannot be loaded while a CUDA "
            "graph is captured; run the call once before the capture",
        ),
        ({"LOAD": "2"}, 0, "out of memory"),
        ({"LAUNCH": "2"}, 0, "out of memory"),
        (
            {},
            8,
            "the sources of the kernels are not those that the extension was built from; "
            "`pip install .` in the checkout builds it anew",
        ),
    ],
    ids=["capture", "load", "launch", "other sources"],
)
def test_errors_of_launches(
    module: Path, environment: dict[str, str], changed: int, message: str
) -> None:
    lines = call(module, [gather_call(0)], changed, **environment)
    assert [line for line in lines if line.startswith("error")] == [
        f"error feature_gather: gather: {message}"
    ] * 2


def test_no_driver(module: Path, tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(module)!r}); import _C_nvrtc as C\n"
    code += "print(C.cuda_info()['error']); C.feature_gather_forward_cuda_workspace(0, [0] * 70, 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "no CUDA driver" not in done.stdout:
        pytest.skip("there is a CUDA driver")
    message = "no CUDA driver: libcuda.so.1 was not found"
    assert done.stdout == message + "\n"
    assert f"RuntimeError: device properties: {message}" in done.stderr


# ---- NVRTC


def kernels(module: Path) -> list[str]:
    code = "import _C_nvrtc as C; print(*(name for name, _ in C.cuda_kernels()), sep='\\n')"
    return run(sys.executable, "-c", code, PYTHONPATH=str(module)).splitlines()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100", "sm_120"])
def test_every_kernel(module: Path, arch: str, nightly: bool) -> None:
    """No error, and no spill but SPILLED within the registers of the launch bounds.

    Without --nightly all of them for sm_90a alone, and for the others one instance of each template
    that is quick to compile.
    """
    needs_nvrtc()
    names = kernels(module)
    assert len(names) == len(set(names)) >= 100
    if not nightly and arch != "sm_90a":
        names = [*{name.partition("<")[0]: name for name in names}.values()]
        assert len(names) >= 20
        quick = "backward_bias|columns|pad_kernel|pack_kernel|gather_kernel|nasfast::cuda"
        names = [name for name in names if re.match(rf"nasfast::(\w+::cuda::)?({quick})", name)]
    for root in sorted({_nvrtc.root(name) for name in names}):
        own = [name for name in dict.fromkeys(names) if _nvrtc.root(name) == root]
        program = _nvrtc.compile_kernels(own, arch, (*_nvrtc.OPTIONS, "--ptxas-options=-v"))
        log = program.log
        assert len(re.findall(r"Compiling entry function '\w+' for '" + arch, log)) == len(own)
        for part in log.split("Compiling entry function ")[1:]:
            symbol = part.split("'")[1]
            spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
            assert spills, part
            allowed = 0
            for kernel, archs, size in SPILLED:
                if re.search(kernel, symbol) and re.fullmatch(archs, arch):
                    allowed = size
            assert int(spills[1]) + int(spills[2]) <= allowed, part
        assert len(re.findall(r"Used \d+ registers", log)) == len(own)
        assert all(symbol.encode() in program.cubin for symbol in program.symbols.values())


# ---- the cache


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Architectures for which the compiler, a stand-in, was called; the cache is empty."""
    done: list[str] = []

    def compile_kernels(kernels: list[str], arch: str) -> _nvrtc.Program:
        done.append(arch)
        return _nvrtc.Program(b"code\0" + arch.encode(), {kernels[0]: "symbol"}, "")

    version = SimpleNamespace(
        getVersion=lambda: (13, 0), getSupportedArchs=lambda: (80, 90, 100, 120)
    )
    monkeypatch.setattr(_nvrtc, "nvrtc", lambda: version)
    monkeypatch.setattr(_nvrtc, "compile_kernels", compile_kernels)
    monkeypatch.setenv("NASFAST_CACHE", str(tmp_path / "cache"))
    return done


def test_cache(compiled: list[str]) -> None:
    """By architecture; a file that is damaged, or that others may write to, is compiled anew."""
    expected = b"code\0sm_90a", "symbol"
    assert _nvrtc.kernel_code("op: k", GATHER, 9, 0) == expected
    assert _nvrtc.kernel_code("op: k", GATHER, 9, 0) == expected
    (file,) = _nvrtc.directory().iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert _nvrtc.kernel_code("op: k", GATHER, 8, 0) == (b"code\0sm_80", "symbol")
    assert compiled == ["sm_90a", "sm_80"]
    whole = file.read_bytes()
    for damage in (b"", whole[:40], whole[:-1] + b"?"):
        file.write_bytes(damage)
        assert _nvrtc.kernel_code("op: k", GATHER, 9, 0) == expected
        assert file.read_bytes() == whole
    file.chmod(0o622)
    assert _nvrtc.kernel_code("op: k", GATHER, 9, 0) == expected
    assert len(compiled) == 6
    assert file.stat().st_mode & 0o777 == 0o600


def test_cache_of_other_sources(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _nvrtc.kernel_code("op: k", GATHER, 9, 0)
    before = _nvrtc.reached(_nvrtc.root(GATHER))
    monkeypatch.setattr(_nvrtc, "reached", lambda file: before | {"more.h": ""})
    _nvrtc.kernel_code("op: k", GATHER, 9, 0)
    assert len(compiled) == 2


def test_cache_that_cannot_be_written(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NASFAST_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning) as caught:
        assert _nvrtc.kernel_code("op: k", GATHER, 9, 0)[1] == "symbol"
    assert str(caught[0].message) == (
        f"compiled CUDA kernels cannot be kept in {tmp_path}/file/kernels: Not a directory; set "
        "NASFAST_CACHE to a folder that you may write to, or every process compiles them anew"
    )


@pytest.mark.parametrize(
    ("capability", "message"),
    [
        (
            (7, 5),
            "expected a device of compute capability 8.0 or newer, got 7.5; use another device",
        ),
        (
            (13, 0),
            "expected a device that a version knows, up to compute capability 12.0, got 13.0; "
            "pip install a newer nvidia-cuda-nvrtc",
        ),
    ],
)
def test_unknown_device(
    compiled: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    message: str,
) -> None:
    monkeypatch.setattr(_nvrtc, "version", lambda: "a version")
    with pytest.raises(RuntimeError) as caught:
        _nvrtc.kernel_code("op: k", GATHER, *capability)
    assert str(caught.value) == f"op: k: {message}"


def test_no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nvrtc.importlib.util, "find_spec", lambda name: None)
    message = "built without nvcc, and cupy is not installed; pip install 'nasfast[cuda]'"
    assert _nvrtc.missing() == message
    _nvrtc.nvrtc.cache_clear()
    with pytest.raises(RuntimeError) as caught:
        _nvrtc.kernel_code("op: k", GATHER, 9, 0)
    assert str(caught.value) == f"op: k: {message}"


def test_a_missing_package_is_an_error_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nvrtc.importlib.util, "find_spec", lambda name: None)
    _nvrtc.nvrtc.cache_clear()
    message = "built without nvcc, and cupy is not installed; pip install 'nasfast[cuda]'"
    monkeypatch.delenv("NASFAST_CI", raising=False)
    with pytest.raises(pytest.skip.Exception) as skipped:
        needs_nvrtc()
    assert str(skipped.value) == f"{message}, or '.[test]'"
    monkeypatch.setenv("NASFAST_CI", "1")
    with pytest.raises(RuntimeError) as caught:
        needs_nvrtc()
    assert str(caught.value) == message


def test_no_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> None:
        raise OSError("libnvrtc.so.13: not found\nand more")

    monkeypatch.setattr(_nvrtc, "missing", lambda: None)
    libs = SimpleNamespace(nvrtc=SimpleNamespace(getVersion=version))
    monkeypatch.setitem(sys.modules, "cupy_backends", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", libs)
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs.nvrtc", libs.nvrtc)
    _nvrtc.nvrtc.cache_clear()
    with pytest.raises(RuntimeError) as caught:
        _nvrtc.kernel_code("op: k", GATHER, 9, 0)
    assert str(caught.value) == (
        "op: k: cupy cannot load NVRTC: libnvrtc.so.13: not found; pip install nvidia-cuda-nvrtc"
    )


def test_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs_nvrtc()
    monkeypatch.setenv("NASFAST_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError) as caught:
        _nvrtc.kernel_code("op: k", "nasfast::cuda::nothing<float>", 9, 0)
    assert re.fullmatch(
        r"op: k: NVRTC 13\.\d+ through cupy \S+ cannot compile nasfast::cuda::nothing<float> for "
        r"sm_90a: .*error: .*; report it",
        str(caught.value),
    )


def test_sources() -> None:
    assert _nvrtc.sources() == ROOT / "csrc" or (_nvrtc.sources() / "common").is_dir()
    assert {"common/cuda_kernel.cuh", "common/dtype.hpp"} <= {*_nvrtc.reached(_nvrtc.root(GATHER))}

"""Imports go one way: every module of nasfast reads only its own layer and those below."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nasfast"

# Top to bottom. A new module or subpackage of nasfast gets its place here.
LAYERS = (
    {
        "search",
        "train",
        "study",
        "evaluate",
        "pretrain",
        "info",
        "__main__",
    },  # the last of any package
    {"commands", "api"},
    {"methods"},
    {"searches", "report"},
    {"workers"},
    {"evaluation"},
    {"latency"},
    {"inference"},
    {"runs", "strategies", "tasks"},
    {"training", "cache"},
    {"models", "data"},
    {"spaces", "encoders"},
    {"ops", "device"},
    {"utils"},
    {"_C"},
)
# What these may import at most, beside themselves and the standard library.
ONLY = {
    # all but torch and utils lazily
    "__init__": {"torch", "api", "cache", "inference", "models", "ops", "utils"},
    "strategies": {"torch", "spaces", "utils"},
    "data": {"torch", "numpy", "PIL", "utils"},
    "spaces": {"utils"},
    "runs": {"torch", "tomli_w", "utils"},
    # onnxscript inside the function that exports, cupy inside the one that compiles
    "ops": {"torch", "_C", "onnxscript", "cupy_backends"},
    "device": {"torch", "ops", "utils"},
    "utils": {"torch", "safetensors", "tomli_w"},
}
# Wheels of the first two fail to import beside a CPU build of torch; the others are not installed.
FORBIDDEN = {"torchvision", "timm", "bench", "tests"}

DEPTH = {module: depth for depth, layer in enumerate(LAYERS) for module in layer}


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of every import, also those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def violations(package: Path) -> list[str]:
    """One line for each import in the package against the rules above."""
    found = []
    for path in sorted(package.rglob("*.py")):
        top = path.relative_to(package).parts[0]
        module = (path.name if path.name == "__main__.py" else top).removesuffix(".py")
        if module != "__init__" and module not in DEPTH:
            found.append(f"{path}: {module} has no layer; give it one in LAYERS of {__file__}")
            continue
        for line, name in imported(ast.parse(path.read_text(), str(path))):
            reason = _refused(module, name)
            if reason:
                found.append(f"{path}:{line}: {module} imports {name}: {reason}")
    return found


def _refused(module: str, name: str) -> str | None:
    if name.startswith("."):
        return "write the absolute name"
    top, *rest = name.split(".")
    if top in FORBIDDEN:
        return f"{top} is never imported"
    if top == "nasfast":
        if not rest or rest[0] == module or rest[0].startswith("__"):
            return None
        top = rest[0]
        if top not in DEPTH:
            return f"{top} has no layer; give it one in LAYERS of {__file__}"
        if module in DEPTH and DEPTH[top] < DEPTH[module]:
            return f"{top} is a layer above"
    elif top in sys.stdlib_module_names:
        return None
    if module in ONLY and top not in ONLY[module]:
        allowed = ", ".join(sorted(ONLY[module])) or "nothing"
        return f"beside the standard library it may import {allowed}"
    return None


def test_imports_go_one_way() -> None:
    found = violations(PACKAGE)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("models/layers.py", "from nasfast.training.loop import fit", "training is a layer above"),
        ("models/layers.py", "from nasfast import runs", "runs is a layer above"),
        ("ops/op.py", "def f():\n    import nasfast.models.layers", "models is a layer above"),
        (
            "strategies/ppo.py",
            "from nasfast.models import layers",
            "it may import spaces, torch",
        ),
        ("spaces/base.py", "import torch", "it may import utils"),
        ("data/voc.py", "import tyro", "it may import PIL, numpy, torch, utils"),
        ("tasks/pose.py", "try:\n    import torchvision.ops\nexcept E: pass", "never imported"),
        ("search.py", "from tests.helpers import x", "tests is never imported"),
        ("search.py", "from . import train", "write the absolute name"),
        (
            "runs/study.py",
            "from nasfast.novel import x",
            "novel has no layer; give it one in LAYERS",
        ),
        ("report/page.py", "import nasfast.methods.base", "methods is a layer above"),
        ("novel.py", "", "novel has no layer; give it one in LAYERS"),
        (
            "__init__.py",
            "from nasfast.runs import study",
            "it may import api, cache, inference, mod",
        ),
    ],
)
def test_each_rule(tmp_path: Path, file: str, source: str, reason: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    (found,) = violations(tmp_path)
    assert file in found
    assert reason in found


def test_allowed_imports(tmp_path: Path) -> None:
    source = (
        "import math, torch, rich\nfrom nasfast import __version__\nimport nasfast.runs.records\n"
    )
    source += "from nasfast.utils.files import atomic_write\nfrom nasfast.runs.study import Study"
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "page.py").write_text(source)
    (tmp_path / "report" / "__main__.py").write_text("import nasfast.commands.report")
    assert violations(tmp_path) == []

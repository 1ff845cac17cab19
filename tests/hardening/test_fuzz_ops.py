"""Random calls of every op give what the reference gives, or an error that names the op."""

from __future__ import annotations

import collections
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import fuzz_ops
import pytest
import torch
from fuzz_ops import SECONDS, TARGETS

ROOT = Path(__file__).resolve().parents[2]
SEED = 0


def fuzz(target: str, count: int, progress: Path) -> tuple[dict[str, int], list[str]]:
    """Outcomes of calls, and what fell; a process that dies is followed by one for the rest."""
    outcomes: collections.Counter[str] = collections.Counter()
    fell: list[str] = []
    first = 0
    while first < count:
        progress.write_bytes(struct.pack("q", first))
        command = [sys.executable, str(Path(fuzz_ops.__file__)), target, f"--seed={SEED}"]
        done = subprocess.run(
            [*command, f"--first={first}", f"--count={count - first}", f"--progress={progress}"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            check=False,
        )
        for line in done.stdout.splitlines():
            found = json.loads(line)
            if "outcomes" in found:
                outcomes.update(found["outcomes"])
                continue
            repeat = f"python tests/hardening/fuzz_ops.py {target} --first {found['number']}"
            fell.append(f"{repeat}: {found['changed'] or 'a right call'}: {found['failure']}")
        if done.returncode == 0:
            break
        (at,) = struct.unpack("q", progress.read_bytes())
        how = f"hangs for {SECONDS} s" if done.returncode == -14 else "dies"
        fell.append(
            f"python tests/hardening/fuzz_ops.py {target} --first {at}: {how}, "
            f"exit status {done.returncode}: {done.stderr[-600:]}"
        )
        first = at + 1
    return outcomes, fell


@pytest.mark.parametrize("target", TARGETS)
def test_random_calls(target: str, nightly: bool, tmp_path: Path) -> None:
    """20,000 calls of each op at night, public functions and registered ops together."""
    op = target.partition(".")[0]
    parts = sum(name.partition(".")[0] == op for name in TARGETS)
    count = 20_000 // parts + 1 if nightly else 120
    outcomes, fell = fuzz(target, count, tmp_path / "progress")
    print(f"{target}: {dict(sorted(outcomes.items()))}")
    assert not fell, f"{len(fell)} of {count} calls fell:\n" + "\n".join(fell[:20])
    assert sum(outcomes.values()) == count
    assert outcomes["equal"] > count // 5
    assert outcomes["refused"] + outcomes["dispatcher"] > count // 20


def test_every_registered_op_is_called() -> None:
    """A new op, or a new way of an op, needs random calls here."""
    registered = {
        name.removeprefix("nasfast::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("nasfast::")
    }
    assert registered == {*fuzz_ops.REGISTERED}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("os.kill(os.getpid(), 11)", "dies, exit status -11"),
        ("fuzz_ops.signal.alarm(1); time.sleep(9)", "hangs for"),
        ("raise AttributeError('dim')", "AttributeError: dim"),
        ("raise ValueError('dim')", "ValueError does not name the op: dim"),
        ("return [torch.full_like(t, 7.0) for t in run(a)]", "is off by"),
        ("return [torch.full_like(t, torch.nan) for t in run(a)]", "values are not finite where"),
        ("raise MemoryError", "MemoryError"),
    ],
)
def test_a_fault_is_found(
    fault: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the call that shows it is named; the calls behind it are made."""
    driver = tmp_path / "faulty.py"
    driver.write_text(
        f"import os, sys, time, torch\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import fuzz_ops\n"
        "make = fuzz_ops.make\n"
        "def faulty(target, seed, number):\n"
        "    call, said = make(target, seed, number)\n"
        "    if number != 3:\n"
        "        return call, said\n"
        "    run = fuzz_ops.TARGETS[target](fuzz_ops.Draw(target, seed, number)).run\n"
        "    def broken(a):\n"
        f"        {fault}\n"
        "    call = fuzz_ops.TARGETS[target](fuzz_ops.Draw(target, seed, number))\n"
        "    return call._replace(run=broken), ''\n"
        "fuzz_ops.make = faulty\nfuzz_ops.main()\n"
    )
    monkeypatch.setattr(fuzz_ops, "__file__", str(driver))
    outcomes, fell = fuzz("depthwise_conv2d", 6, tmp_path / "progress")
    assert len(fell) == 1
    assert "depthwise_conv2d --first 3: " in fell[0]
    assert message in fell[0]
    assert sum(outcomes.values()) in (2, 6)  # of the process that came to its end

"""Random calls of every op give what the reference gives, or an error that names the op."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import fuzz_ops
from fuzz_ops import SECONDS, TARGETS

ROOT = Path(__file__).resolve().parents[2]
SEED = 0


def fuzz(
    targets: Sequence[str], count: int, progress: Path, driver: str = fuzz_ops.__file__
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Outcomes of calls of each target, and what fell.

    A process that dies is followed by one for the rest.
    """
    outcomes: dict[str, Counter[str]] = {target: Counter() for target in targets}
    fell: list[str] = []
    first = 0
    while targets:
        progress.write_bytes(struct.pack("2q", 0, first))
        options = [f"--seed={SEED}", f"--first={first}", f"--count={count}"]
        done = subprocess.run(
            [sys.executable, driver, *targets, *options, f"--progress={progress}"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            check=False,
        )
        for line in done.stdout.splitlines():
            found = json.loads(line)
            outcomes[found["target"]][found["outcome"]] += 1
            if found["outcome"] == "failed":
                what = f"{found['changed'] or 'a right call'}: {found['failure']}"
                fell.append(f"{repeat(found['target'], found['number'])}: {what}")
        if done.returncode == 0:
            break
        at, number = struct.unpack("2q", progress.read_bytes())
        how = f"hangs for {SECONDS} s" if done.returncode == -signal.SIGALRM else "dies"
        status = f"exit status {done.returncode}: {done.stderr[-600:]}"
        fell.append(f"{repeat(targets[at], number)}: {how}, {status}")
        last = number + 1 == count
        targets, first = targets[at + last :], 0 if last else number + 1
    return outcomes, fell


def repeat(target: str, number: int) -> str:
    """The command that makes a call alone."""
    return f"python tests/hardening/fuzz_ops.py {target} --seed {SEED} --first {number}"


def test_random_calls(nightly: bool, tmp_path: Path) -> None:
    """20,000 calls of each op at night, public functions and registered ops together."""
    ops = Counter(target.partition(".")[0] for target in TARGETS)
    all_outcomes: dict[str, Counter[str]] = {}
    fell: list[str] = []
    for op, parts in ops.items() if nightly else [("", 1)]:
        targets = [target for target in TARGETS if target.startswith(op)]
        count = -(-20_000 // parts) if nightly else 50
        outcomes, failures = fuzz(targets, count, tmp_path / "progress")
        all_outcomes |= outcomes
        fell += failures
        for target, found in outcomes.items():
            print(f"{target}: {dict(sorted(found.items()))}")
    assert not fell, f"{len(fell)} calls fell:\n" + "\n".join(fell[:20])
    for target, found in all_outcomes.items():
        made = sum(found.values())
        assert made >= 50, target
        assert found["equal"] > made // 5, target
        assert found["refused"] + found["dispatcher"] > made // 20, target


def test_every_registered_op_is_called() -> None:
    """A new op, or a new way of an op, needs random calls here."""
    code = "import torch, nasfast.ops; print(*torch._C._dispatch_get_all_op_names())"
    # in a process of its own: other tests register toys
    names = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    ).stdout.split()
    registered = {
        name.removeprefix("nasfast::").partition(".")[0]
        for name in names
        if name.startswith("nasfast::")
    }
    assert registered == {*fuzz_ops.REGISTERED}


FAULTS = {
    3: ("raise AttributeError('dim')", "AttributeError: dim"),
    4: ("raise ValueError('dim')", "ValueError does not name the op: dim"),
    5: ("raise MemoryError", "MemoryError"),
    6: ("return [torch.full_like(t, 7.0) for t in run(a)]", "is off by"),
    7: ("return [torch.full_like(t, torch.nan) for t in run(a)]", "values are not finite where"),
    8: ("os.kill(os.getpid(), 11)", "dies, exit status -11"),
    9: ("fuzz_ops.signal.alarm(1); time.sleep(9)", f"hangs for {SECONDS} s, exit status -14"),
}


def test_faults_are_found(nightly: bool, tmp_path: Path) -> None:
    """And the call that shows one is named; the calls behind it are made."""
    faults = FAULTS if nightly else {number: FAULTS[number] for number in (3, 4, 5, 6, 7, 8)}
    bodies = "".join(f"        if number == {at}: {fault}\n" for at, (fault, _) in faults.items())
    driver = tmp_path / "faulty.py"
    driver.write_text(
        f"import os, sys, time, torch\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import fuzz_ops\n"
        "make = fuzz_ops.make\n"
        "def faulty(target, seed, number):\n"
        f"    if number not in {[*faults]}:\n"
        "        return make(target, seed, number)\n"
        "    call = fuzz_ops.TARGETS[target](fuzz_ops.Draw(target, seed, number))\n"
        "    run = call.run\n"
        "    def broken(a):\n"
        f"{bodies}"
        "    return call._replace(run=broken), ''\n"
        "fuzz_ops.make = faulty\nfuzz_ops.main()\n"
    )
    outcomes, fell = fuzz(["depthwise_conv2d"], 12, tmp_path / "progress", str(driver))
    assert len(fell) == len(faults)
    for text, (number, (_, message)) in zip(fell, faults.items(), strict=True):
        assert f" depthwise_conv2d --seed {SEED} --first {number}: " in text
        assert message in text
    died = sum(number in (8, 9) for number in faults)
    assert sum(outcomes["depthwise_conv2d"].values()) == 12 - died

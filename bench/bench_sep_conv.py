"""A separable convolution in training as one operation, beside its modules one after the other.

    python bench/bench_sep_conv.py [--threads 1] [--rounds 15] [--json sep_conv.json]

Forward and backward of ``SepConv`` on channels-last maps; bfloat16 is autocast's. The calls run in
turn. Time is the processor's of the calling thread where one computes, else the clock's. "of the
modules" is the median over the rounds of our time by theirs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout is what is measured

import harness  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import nasfast  # noqa: E402, F401  before torch: OpenMP's waiting threads then yield the cores
from nasfast.models.layers import SepConv  # noqa: E402


class Case(NamedTuple):
    batch: int
    channels: int
    side: int
    kernel: int
    dilation: int = 1
    half: bool = True

    def __str__(self) -> str:
        dtype = "bfloat16" if self.half else "float32"
        shape = f"[{self.batch}, {self.channels}, {self.side}, {self.side}]"
        return f"{shape}, {self.kernel}x{self.kernel}, dilation {self.dilation}, {dtype}"


CASES = [
    *(Case(16, 48, 64, kernel, dilation) for kernel, dilation in ((3, 1), (5, 1), (3, 3), (5, 6))),
    *(Case(16, 48, 64, kernel, half=False) for kernel in (3, 5)),
    *(Case(16, channels, 32, 3) for channels in (24, 40, 64)),
    *(Case(16, 48, side, 5, 6) for side in (8, 16)),
]


def calls(case: Case) -> dict[str, Callable[[], list[Tensor]]]:
    """Forward and backward by name: output, and gradients of the map and of each parameter."""
    last = torch.channels_last
    module = SepConv(case.channels, case.kernel, case.dilation).to(memory_format=last)
    dtype = torch.bfloat16 if case.half else torch.float32
    x = torch.randn(case.batch, case.channels, case.side, case.side).to(dtype)
    x = x.contiguous(memory_format=last).requires_grad_()
    grad, leaves = torch.randn_like(x), [x, *module.parameters()]

    def step(forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.half):
            y = forward(x)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    return {
        "modules": lambda: step(lambda x: nn.Sequential.forward(module, x)),
        "nasfast": lambda: step(module),
    }


def thread_clock(call: harness.Call) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def measure(case: Case, rounds: int, clock: harness.Clock) -> dict[str, object]:
    interleaved = harness.Rounds(calls(case), clock)
    for _ in range(rounds):
        interleaved.time(*interleaved.calls)
    ms = {name: 1e3 * statistics.median(times) for name, times in interleaved.times.items()}
    return {
        **{f"{name}, ms": f"{value:.2f}" for name, value in ms.items()},
        "of the modules": f"{interleaved.multiple('nasfast', 'modules'):.2f}x",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = thread_clock if arguments.threads == 1 else harness.cpu_clock
    lines = {str(case): measure(case, arguments.rounds, clock) for case in CASES}
    print(harness.table("SepConv", lines))
    harness.write_result({"machine": harness.machine_line(), "cases": lines}, arguments.json)


if __name__ == "__main__":
    main()

"""DnCNN (Zhang et al., IEEE Transactions on Image Processing 26, 2017) by the recipe of `nasfast
train`, scored as by `nasfast evaluate`: what a denoiser has that nobody searched.

    python bench/dncnn.py --data DIR [--steps 3000] [--batch-size 8] [--crop 48] [--lr 0.001]
        [--seed 0] [--threads 1] [--json FILE]

17 convolutions of 3x3 with 64 channels, 556,097 parameters, which predict the noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout is what is measured

import harness  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import nasfast  # noqa: E402, F401  before torch: OpenMP's waiting threads then yield the cores
from nasfast.data.restoration import open_images  # noqa: E402
from nasfast.methods.restoration.train import Recipe, TrainingRun  # noqa: E402
from nasfast.tasks.restoration.denoising import Denoising  # noqa: E402
from nasfast.tasks.restoration.patches import ImagePatches  # noqa: E402
from nasfast.tasks.restoration.scoring import evaluate  # noqa: E402
from nasfast.training.loop import Runtime  # noqa: E402
from nasfast.utils.seeding import derive_seed  # noqa: E402


class DnCNN(nn.Module):
    """Subtracts the noise that it predicts from an image ``[N, c, H, W]``."""

    def __init__(self, depth: int = 17, width: int = 64, channels: int = 1) -> None:
        super().__init__()
        self.channels, self.scale = channels, 1
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
        self.noise = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        noise: Tensor = self.noise(images)
        return images - noise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    recipe = Recipe()
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--batch-size", type=int, default=recipe.batch_size)
    parser.add_argument("--crop", type=int, default=recipe.crop)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = Recipe(steps=args.steps, batch_size=args.batch_size, crop=args.crop, lr=args.lr)
    data, task, runtime = open_images(args.data, 1), Denoising(), Runtime(torch.device("cpu"))
    torch.manual_seed(derive_seed(args.seed, "train"))
    model = DnCNN()
    runtime.place(model)
    patches = ImagePatches(data.train, task, args.crop)
    training = TrainingRun(model, patches, recipe, runtime, derive_seed(args.seed, "patches"))
    start = time.perf_counter()
    while training.steps < recipe.steps:
        loss = training.run(200)
        seconds = time.perf_counter() - start
        print(f"step {training.steps}/{recipe.steps}  loss {loss:.5f}  {seconds:.0f} s", flush=True)
    model.eval()
    found = {
        name: evaluate(model, task, images, seed=0, runtime=runtime).to_json()
        for name, images in (("val", data.val), ("test", data.test))
    }
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "recipe": dataclasses.asdict(recipe),
        "seed": args.seed,
        "seconds": time.perf_counter() - start,
        "scores": found,
        "machine": harness.machine_line(),
    }
    harness.write_result(result, args.json)


if __name__ == "__main__":
    main()

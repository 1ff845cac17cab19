"""Use a trained network on images: ``nasfast predict MODEL IMAGES... --out DIR``.

MODEL is a model.safetensors, the directory of a training, or a run. IMAGES are files, folders with
everything below them, and quoted patterns such as 'photos/**/*.jpg'. DIR gets the task's result for
each image (a mask as a palette PNG and an overlay, depths as a PNG of 16 bits and in colours, the
restored image, or objects or joints as JSON and drawn) under the image's name, in the folders that
it came in, and predictions.json, which says what belongs to what. Detection also writes
coco-results.json, the objects of all images with the category ids of the training data; an image's
id is its name there, or the number that this is.
Keypoints write it too, with the joints of people. Where these are says --boxes, a list in JSON of
{"image": name, "bbox": [left, top, width, height]}, or the coco-results.json of a detector, whose
category 1 is taken; without it an image is one person.

An image that cannot be read does not stop the others; the exit status is 1 then.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from nasfast.data.images import IMAGE_SUFFIXES, read_image
from nasfast.inference.model import Model, load
from nasfast.inference.people import Box, image_key, read_boxes
from nasfast.tasks.detection import Detections
from nasfast.tasks.detection.processor import DRAWN
from nasfast.tasks.keypoints import Poses
from nasfast.tasks.processor import Prediction
from nasfast.utils.cli import reports_errors, say
from nasfast.utils.errors import UserError, text_for_user
from nasfast.utils.files import atomic_write, expanded, require_place
from nasfast.utils.interrupt import Interrupt, StopRequested
from nasfast.utils.locks import writing_to

INDEX = "predictions.json"
COCO_RESULTS = "coco-results.json"


@dataclass(frozen=True)
class PredictConfig:
    """What to predict, and where to."""

    model: Annotated[Path, tyro.conf.Positional]
    """model.safetensors, or the directory of a training or of a run."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Image files, folders, patterns."""
    out: Path
    """Folder of the results; it may exist."""
    overwrite: bool = False
    """Replace results that are there."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    resize: int | Literal["auto", "none"] = "auto"
    """auto: a network gets an image at about the size of those it was scored on (no restoration);
    none: as it is; a number: its shorter side. The result always has the image's own size."""
    tile: int | None = None
    """Greatest side that the network sees at once, in pixels; default: 1024, restoration 512
    (2048 where it reads blocks), detection the whole image. Less needs less memory."""
    batch: int = 8
    """Most images of one size that go through the network together."""
    autocast: bool = False
    """Compute in bfloat16 where the device does natively."""
    threshold: float | None = None
    """Detection: least score of an object that is written and drawn; default: all are written,
    those from 0.3 are drawn. Keypoints: least score of a person in --boxes; default: 0.3."""
    boxes: Path | None = None
    """Keypoints: JSON file with the boxes of people."""


@dataclass
class Sources:
    """The images that the words of a command line mean."""

    stems: dict[Path, Path] = field(default_factory=dict)
    """By image: its name among the results, a relative path without the suffix."""
    failed: dict[str, str] = field(default_factory=dict)
    """By word or file: why there is nothing."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Number of files in folders that are no images, by suffix."""


def find_images(words: Sequence[str], out: Path) -> Sources:
    """Images of files, folders (with all below them, but for hidden files and ``out``) and
    patterns, each once, in order."""
    sources, seen = Sources(), set[Path]()

    def add(file: Path, stem: Path) -> None:
        if file.resolve() not in seen:
            seen.add(file.resolve())
            sources.stems[file] = stem

    def add_path(path: Path) -> None:
        if not path.is_dir():
            add(path, Path(path.stem))
            return
        for file in sorted(path.rglob("*")):
            within = file.relative_to(path)
            hidden = any(part.startswith(".") for part in within.parts)
            if hidden or not file.is_file() or out.resolve() in file.resolve().parents:
                continue
            if file.suffix.lower() in IMAGE_SUFFIXES:
                add(file, within.with_suffix(""))
            else:
                sources.ignored[file.suffix.lower() or "without suffix"] += 1

    for word in words:
        path = expanded(word)
        found = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not found:
            sources.failed[word] = "expected a file, a folder or a pattern, found nothing there"
        for each in found:
            add_path(each)
    return sources


def name_results(stems: Mapping[Path, Path], suffixes: Sequence[str]) -> dict[Path, Path]:
    """Stems under which no image's results take the name of another's: "a", then "a-2"."""
    taken, names = set[str](), {}
    for image, stem in stems.items():
        number, name = 1, stem
        while taken & {f"{name}{suffix}".casefold() for suffix in suffixes}:
            number += 1
            name = stem.with_name(f"{stem.name}-{number}")
        taken |= {f"{name}{suffix}".casefold() for suffix in suffixes}
        names[image] = name
    return names


def check_free(
    config: PredictConfig,
    names: Mapping[Path, Path],
    suffixes: Sequence[str],
    lists: Sequence[str],
) -> None:
    """UserError where a result would replace an image that is read, or any other file unless
    asked to. ``lists`` are those files that hold something of all images."""
    files = [config.out / f"{name}{suffix}" for name in names.values() for suffix in suffixes]
    there = [f for f in [*files, *(config.out / name for name in lists)] if f.exists()]
    inputs = {image.resolve() for image in names}
    for file in there:
        if file.resolve() in inputs:
            raise UserError(
                f"predict: expected a folder apart from the images, got --out {config.out}, where "
                f"the result would replace {file}; give another folder"
            )
    if there and not config.overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UserError(
            f"predict: expected no earlier results in {config.out}, got {there[0].name}{more}; "
            "give another --out, or --overwrite"
        )


class Predictions:
    """A command at work: what is done, and what failed."""

    def __init__(self, config: PredictConfig, model: Model, sources: Sources) -> None:
        self.config, self.model = config, model
        self.coco = model.task in ("detection", "keypoints")
        keypoints = model.task == "keypoints"
        if config.boxes is not None and not keypoints:
            raise UserError(
                f"boxes: expected none for {model.task}, which takes whole images, got "
                f"{config.boxes}; leave it out"
            )
        if config.threshold is not None and keypoints and config.boxes is None:
            raise UserError(
                f"threshold: expected --boxes FILE beside it for keypoints, whose boxes it chooses "
                f"from, got none; add it, or leave --threshold {config.threshold} out"
            )
        if config.threshold is not None and not self.coco:
            raise UserError(
                f"threshold: expected none for {model.task}, which gives no objects, got "
                f"{config.threshold}; leave it out"
            )
        if config.threshold is not None and not 0 <= config.threshold <= 1:
            raise UserError(f"threshold: expected 0 to 1, got {config.threshold}; change it")
        self.names = name_results(sources.stems, model.processor.suffixes)
        self.failed = dict(sources.failed)
        self.done: list[dict[str, Any]] = []
        self.found: dict[Path, Detections | Poses] = {}
        lists = [INDEX, COCO_RESULTS] if self.coco else [INDEX]
        check_free(config, self.names, model.processor.suffixes, lists)
        self.people = self._people()

    def _people(self) -> dict[str, list[Box]] | None:
        """The boxes of --boxes, by `image_key`."""
        file, threshold = self.config.boxes, self.config.threshold
        if file is None:
            return None
        people = read_boxes(expanded(file), DRAWN if threshold is None else threshold)
        if not people.keys() & {image_key(str(image)) for image in self.names}:
            raise UserError(
                f"{file}: expected boxes of the {len(self.names)} images, got some of "
                f"{', '.join(list(people)[:4]) or 'none'}; name the images as their files are"
            )
        return people

    def run(self, interrupt: Interrupt, console: Console) -> None:
        """Predict on all images; StopRequested between two of them after Ctrl-C."""
        config, reading = self.config, deque[Path]()
        columns = TextColumn("predict"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as bar:
            task = bar.add_task("", total=len(self.names))
            for prediction in self.model.predict_each(
                self._read(interrupt, reading),
                resize=config.resize,
                tile=config.tile,
                batch=config.batch,
                autocast=config.autocast,
                boxes=None if self.people is None else self._boxes(reading),
            ):
                self._save(reading.popleft(), prediction)
                bar.update(task, completed=len(self.done) + len(self.failed))

    def _read(self, interrupt: Interrupt, reading: deque[Path]) -> Iterator[Tensor]:
        """Pixels of the images that can be read, whose names go to ``reading``."""
        for image in self.names:
            interrupt.check()
            try:
                pixels = read_image(image, self.model.preprocessing.channels)
            except Exception as error:
                text = text_for_user(error)
                if text is None:
                    raise
                self.failed[str(image)] = text
            else:
                reading.append(image)
                yield pixels

    def _boxes(self, reading: deque[Path]) -> Iterator[list[Box]]:
        """Those of each image, once it has been read."""
        while self.people is not None:
            yield self.people.get(image_key(str(reading[-1])), [])

    def _save(self, image: Path, prediction: Prediction) -> None:
        name, out = self.names[image], self.config.out
        if isinstance(prediction, Detections) and self.config.threshold is not None:
            prediction = prediction.above(self.config.threshold)
        if isinstance(prediction, Detections | Poses):
            self.found[name] = prediction
        (out / name.parent).mkdir(parents=True, exist_ok=True)
        files = [str(f.relative_to(out)) for f in prediction.save(out / name.parent, name.name)]
        self.done.append({"image": str(image), "files": files, **prediction.to_json()})

    def write_index(self) -> None:
        """predictions.json of what is done."""
        config, model = self.config, self.model
        content = {
            "model": str(model.path and model.path.resolve()),
            "task": model.task,
            "classes": list(model.classes),
            "resize": config.resize,
            "images": self.done,
            "failed": self.failed,
        }
        config.out.mkdir(parents=True, exist_ok=True)
        atomic_write(config.out / INDEX, json.dumps(content, indent=2) + "\n")
        if self.coco:
            atomic_write(config.out / COCO_RESULTS, json.dumps(self._coco(), indent=1) + "\n")

    def _coco(self) -> list[dict[str, Any]]:
        """The objects or people of all images, as in COCO's result files."""
        names = [name.as_posix() for name in self.found]
        numbers = [int(n) if n.isascii() and n.isdecimal() else n for n in names]
        ids = numbers if len(set(numbers)) == len(numbers) else names
        pairs = zip(ids, self.found.values(), strict=True)
        return [entry for id_, found in pairs for entry in found.coco_results(id_)]


def _holds(out: Path, word: str) -> bool:
    """Whether a word of the command line is a folder of results, or in one."""
    path = Path(word)
    return path.is_dir() and path.resolve().is_relative_to(out.resolve())


def _predict(
    config: PredictConfig, model: Model, sources: Sources, console: Console
) -> tuple[Predictions, bool]:
    """Predict while no other process writes to the folder; whether it was stopped by Ctrl-C."""
    with writing_to(config.out, INDEX), Interrupt() as interrupt:
        work = Predictions(config, model, sources)
        try:
            work.run(interrupt, console)
        except StopRequested:
            return work, True
        finally:
            if work.done:
                work.write_index()
    return work, False


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 1 where an image failed, 130 after Ctrl-C."""
    config = tyro.cli(PredictConfig, args=argv, prog="nasfast predict", description=__doc__)
    config = dataclasses.replace(config, out=expanded(config.out))
    console, errors = Console(), Console(stderr=True)
    sources = find_images(config.images, config.out)
    if not sources.stems and any(_holds(config.out, word) for word in config.images):
        raise UserError(
            f"predict: expected a folder apart from the images, got --out {config.out}, below "
            "which no image is read; give another folder"
        )
    if not sources.stems:
        raise UserError(
            f"predict: expected image files ({', '.join(IMAGE_SUFFIXES)}), a folder with some, or "
            f"a pattern, found none in {' '.join(config.images) or 'no argument'}"
        )
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"predict: expected --out to be a folder, got the file {config.out}")
    require_place(config.out, "give another --out")
    model = load(config.model, config.device)
    say(console, f"{model!r}")
    if sources.ignored:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sources.ignored.most_common())
        say(console, f"ignored {sources.ignored.total()} files that are no images: {kinds}")
    work, stopped = _predict(config, model, sources, console)
    for name, text in work.failed.items():
        say(errors, f"failed: {text if name in text else f'{name}: {text}'}")
    total = len(work.names) + len(sources.failed)
    place = f"; {config.out}" if work.done else ""
    say(console, f"{len(work.done)} of {total} done{', stopped' if stopped else ''}{place}")
    if stopped:
        return 130
    return 1 if work.failed else 0


if __name__ == "__main__":
    sys.exit(main())

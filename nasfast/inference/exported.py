"""Networks in files of ``nasfast export``, run by onnxruntime or as exported programs of torch."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass
from torch.nn import functional as F

from nasfast.device import resolve_device
from nasfast.tasks.detection.postprocess import Boxes
from nasfast.utils.errors import UserError, cause
from nasfast.utils.files import parse_json

EXPORT_SUFFIXES = (".onnx", ".pt2")
METADATA = "nasfast"
"""Key in the metadata of an ONNX file, and with .json the extra file of a torch.export archive."""
NEEDED = ("argmax", "classes", "dtype", "least", "size")
"""What the description of a file has to say."""
Run = Callable[[Tensor], Any]


class Exported(nn.Module):
    """A network of an exported file, in the precision of the file whatever autocast says.

    Args:
        path: the file, for errors.
        run: preprocessed images ``[N, c, H, W]`` to what the file gives, a tensor or a tuple, on
            the same device.
        description: of the file, as `read_description` reads it.
        device: where `run` computes.
        backend: what computes, for people.
    """

    def __init__(
        self,
        path: Path,
        run: Run,
        description: Mapping[str, Any],
        device: torch.device,
        backend: str,
    ) -> None:
        super().__init__()
        self.path, self.backend, self._run = path, backend, run
        self.export: Mapping[str, Any] = description["export"]
        self.precision: str = self.export["dtype"]
        self.suppresses = self.export.get("nms") == "inside"
        """Whether it gives boxes, see `detect`, in place of the output of a detector."""
        self._outputs = len(self.export["classes"])
        self.place = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        """Holds nothing, and says where the network is."""

    def forward(self, images: Tensor) -> Tensor:
        """Outputs ``[N, outputs, scale * H, scale * W]``, of a detector ``[N, K + 5, P]``; of a
        file that gives classes, 1 for the class of a pixel and 0 for the others."""
        if self.suppresses:
            raise UserError(
                f"{self.path}: expected a file that gives the output of its network, got one that "
                "gives boxes; export it with --nms outside"
            )
        output: Tensor = self._computed(images)
        if not self.export["argmax"]:
            return output
        return F.one_hot(output.long(), self._outputs).movedim(-1, 1).float()

    def detect(self, images: Tensor) -> Boxes:
        """What a file with the suppression inside finds, in pixels of the images."""
        return Boxes(*self._computed(images))

    def _computed(self, images: Tensor) -> Any:
        height, width = images.shape[-2:]
        size, least = self.export["size"], self.export["least"]
        if size is not None and [height, width] != size:
            raise UserError(
                f"{self.path}: expected images of {size[0]}x{size[1]} (height x width), which it "
                f"was exported for, got {height}x{width}; resize them, or export it with "
                "--size dynamic"
            )
        if min(height, width) < least:
            raise UserError(
                f"{self.path}: expected images of at least {least}x{least} pixels, got "
                f"{height}x{width}; enlarge them, or export it with --format onnx"
            )
        with torch.autocast(images.device.type, enabled=False):
            return self._run(images.float())


def load_exported(path: Path, device: str = "auto") -> tuple[Exported, dict[str, Any]]:
    """The network of an exported file, and the description of the network it was made from, with
    that of the file as "export".

    Raises:
        UserError: the file is damaged or of another program, onnxruntime is missing, or it does
            not compute on the device.
    """
    description = read_description(path)
    load = _load_onnx if path.suffix == ".onnx" else _load_program
    run, placed, backend = load(path, device)
    return Exported(path, run, description, placed, backend), description


def read_description(path: Path) -> dict[str, Any]:
    """What `nasfast.inference.export.export` wrote into a file's metadata; errors as above."""
    try:
        if path.suffix == ".onnx":
            session = onnx_session(path.read_bytes(), path, optimize=False)
            text = session.get_modelmeta().custom_metadata_map.get(METADATA)
        else:
            with zipfile.ZipFile(path) as archive:
                names = [n for n in archive.namelist() if n.endswith(f"extra/{METADATA}.json")]
                text = archive.read(names[0]).decode() if names else None
                if text is not None and (damaged := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"the checksum of {damaged} is another")
    except (zipfile.BadZipFile, KeyError) as error:
        raise _damaged(path, error) from error
    if text is None:
        raise UserError(
            f"{path}: expected a network that nasfast export wrote, got a file without its "
            "metadata; export it from the model.safetensors"
        )
    try:
        description: dict[str, Any] = parse_json(text)
        missing = [key for key in NEEDED if key not in description["export"]]
        if missing:
            raise KeyError(", ".join(missing))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error
    return description


def _damaged(path: Path, error: BaseException) -> UserError:
    return UserError(
        f"{path}: expected a network as nasfast export wrote it, got a damaged file: "
        f"{cause(error)}; export it again"
    )


def import_onnxruntime(purpose: str) -> Any:
    """The package; UserError with what to install where it is missing."""
    try:
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(
            f"{purpose}: expected onnxruntime to be installed, got '{cause(error)}'; "
            "pip install 'nasfast[export]'"
        ) from error
    return onnxruntime


def provider_of(device: torch.device) -> str:
    """What computes there in onnxruntime."""
    return "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"


def onnx_session(
    data: bytes,
    path: Path,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - it does not change
    *,
    optimize: bool = True,
) -> Any:
    """An inference session of an ONNX file, on as many threads as torch has.

    Args:
        data: the content of the file.
        path: the file, for errors.
        device: where to compute.
        optimize: whether the graph is optimised.

    Raises:
        UserError: the file is damaged, onnxruntime is missing, or it does not compute there.
    """
    runtime = import_onnxruntime(str(path))
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    # waiting threads would hold the cores that whoever calls next needs
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not optimize:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    wanted, providers = provider_of(device), [("CPUExecutionProvider", dict[str, int]())]
    if device.type == "cuda":
        providers.insert(0, (wanted, {"device_id": device.index or 0}))
    try:
        session = runtime.InferenceSession(data, options, providers=providers)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # onnxruntime has a class for each of its codes
        raise _damaged(path, error) from error
    if session.get_providers()[0] != wanted:  # where its libraries do not load it goes on without
        raise UserError(
            f"{path}: expected onnxruntime to compute on {device}, got "
            f"{session.get_providers()[0]}, as its CUDA libraries could not be loaded; install "
            "those of its version, or use --device cpu"
        )
    return session


def _load_onnx(path: Path, device: str) -> tuple[Run, torch.device, str]:
    runtime = import_onnxruntime(str(path))
    placed, available = resolve_device(device), runtime.get_available_providers()
    if provider_of(placed) not in available:
        if device != "auto":
            raise UserError(
                f"{path}: expected an onnxruntime that computes on {device}, got one of "
                f"{', '.join(available)}; pip install onnxruntime-gpu, or use --device cpu"
            )
        placed = torch.device("cpu")
    try:
        session = onnx_session(path.read_bytes(), path, placed)
    except UserError:
        if device != "auto" or placed.type == "cpu":
            raise
        placed = torch.device("cpu")
        session = onnx_session(path.read_bytes(), path, placed)
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Any:
        found = session.run(None, {name: images.cpu().contiguous().numpy()})
        outputs = [torch.from_numpy(output).to(images.device) for output in found]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return run, placed, f"onnxruntime {runtime.__version__}, {session.get_providers()[0]}"


def _load_program(path: Path, device: str) -> tuple[Run, torch.device, str]:
    placed = resolve_device(device)
    try:
        program = torch.export.load(path)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # by the damage: RuntimeError, KeyError, ValueError, ..
        raise _damaged(path, error) from error
    if placed.type != "cpu":
        program = move_to_device_pass(program, placed)
    module = program.module()
    return lambda images: module(images), placed, f"torch {torch.__version__}, exported program"

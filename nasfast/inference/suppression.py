"""The post-processing of detectors as part of their graphs in ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nasfast.inference.model import Model
from nasfast.models.points import STRIDES
from nasfast.tasks.detection import DetectionProcessor
from nasfast.tasks.detection.nms import nms
from nasfast.tasks.detection.postprocess import Pairs, best_pairs, boxes_of
from nasfast.tasks.processor import STRIDE

# Two operations that are written in ONNX by hand: traced, sizes of levels that depend on those of
# the image would be slow, and there is no operator of torch for the suppression.
torch.library.define(
    "nasfast::best_pairs",
    "(Tensor output, SymInt height, SymInt width, float threshold, int count)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "nasfast::kept_boxes", "(Tensor boxes, Tensor scores, float threshold, int limit) -> Tensor"
)


@torch.library.impl("nasfast::best_pairs", "CompositeExplicitAutograd")
def _best_pairs(output: Tensor, height: int, width: int, threshold: float, count: int) -> Pairs:
    return best_pairs(output, (height, width), threshold, count)


@torch.library.register_fake("nasfast::best_pairs")  # type: ignore[untyped-decorator]
def _(output: Tensor, height: int, width: int, threshold: float, count: int) -> Pairs:
    shape = (output.shape[0], len(STRIDES) * count)  # in ONNX each level is filled up
    scores, sides, places = (output.new_empty((*shape, *last)) for last in ((), (4,), (2,)))
    return Pairs(scores, scores.new_empty(shape, dtype=torch.int64), sides, places)


@torch.library.impl("nasfast::kept_boxes", "CompositeExplicitAutograd")
def kept_boxes(boxes: Tensor, scores: Tensor, threshold: float, limit: int) -> Tensor:
    """Which boxes greedy suppression keeps, 1 or 0, float32 ``[N, C]``.

    Args:
        boxes: ``[N, C, 4]``.
        scores: ``[N, K, C]``, by class; what is not greater than 0 is no box.
        threshold: greatest IoU of two kept boxes of a class.
        limit: most boxes of a class.
    """
    index = nms(boxes, scores.amax(1), scores.argmax(1), threshold, None)
    kept = boxes.new_zeros(len(boxes), boxes.shape[1] + 1)  # the last for -1
    return kept.scatter_(1, index % kept.shape[1], 1.0)[:, :-1].contiguous()


@torch.library.register_fake("nasfast::kept_boxes")  # type: ignore[untyped-decorator]
def _(boxes: Tensor, scores: Tensor, threshold: float, limit: int) -> Tensor:
    return boxes.new_empty(boxes.shape[:2])


def suppression_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export``, as `nasfast.ops.onnx_translation_table`."""
    from onnxscript import ir
    from onnxscript import opset18 as op

    def whole(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    def real(value: float) -> Any:
        return op.Constant(value_floats=[value])

    def best_pairs(output: Any, height: Any, width: Any, threshold: float, count: int) -> Any:
        batch = op.Shape(output, start=0, end=1)
        classes = op.Sub(op.Shape(output, start=1, end=2), whole(5))
        scores = op.Sigmoid(op.Slice(output, whole(0), classes, whole(1)))
        center = op.Sigmoid(op.Slice(output, whole(-1), whole(2**31), whole(1)))
        sides = op.Slice(output, whole(-5), whole(-1), whole(1))
        counts = op.Greater(scores, real(threshold))
        scores = op.Where(counts, op.Mul(scores, center), real(-1.0))
        filling = op.Expand(real(-1.0), op.Concat(batch, whole(count), axis=0))
        first, levels = whole(0), []
        for stride in STRIDES:
            rows, columns = (
                op.Div(op.Add(op.Reshape(side, whole(1)), whole(stride - 1)), whole(stride))
                for side in (height, width)
            )
            length = op.Mul(rows, columns)
            last = op.Add(first, length)
            flat = op.Flatten(op.Slice(scores, first, last, whole(2)), axis=1)
            best, index = op.TopK(op.Concat(flat, filling, axis=1), whole(count), axis=1)
            index = op.Min(index, op.Sub(op.Mul(classes, length), whole(1)))
            label, point = op.Div(index, length), op.Mod(index, length)
            places = [
                op.Unsqueeze(op.Add(op.Mul(at, whole(stride)), whole(stride // 2)), whole(2))
                for at in (op.Mod(point, columns), op.Div(point, columns))
            ]
            levels.append((best, label, op.Add(point, first), op.Concat(*places, axis=2)))
            first = last
        score, label, point, place = (op.Concat(*e, axis=1) for e in zip(*levels, strict=True))
        index = op.Expand(op.Unsqueeze(point, whole(1)), whole(1, 4, 1))
        own = op.Transpose(op.GatherElements(sides, index, axis=2), perm=[0, 2, 1])
        return score, label, own, op.Cast(place, to=ir.DataType.FLOAT)

    def kept_boxes(boxes: Any, scores: Any, threshold: float, limit: int) -> Any:
        found = op.NonMaxSuppression(boxes, scores, whole(limit), real(threshold), real(0.0))
        places = op.Gather(found, whole(0, 2), axis=1)  # image and row; between them is the class
        none = op.Expand(real(0.0), op.Shape(boxes, start=0, end=2))
        ones = op.Expand(real(1.0), op.Shape(places, start=0, end=1))
        return op.ScatterND(none, places, ones)

    ops = torch.ops.nasfast
    return {ops.best_pairs.default: best_pairs, ops.kept_boxes.default: kept_boxes}


class SuppressedDetector(nn.Module):
    """A detector with its post-processing: preprocessed images ``[N, 3, H, W]`` to boxes
    ``[N, limit, 4]``, in pixels of the images and clipped to them, scores ``[N, limit]`` and labels
    ``[N, limit]``, by falling score; both are -1 after the last."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        assert isinstance(model.processor, DetectionProcessor)
        self.model, self.settings = model, model.processor.settings

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        settings, (height, width) = self.settings, images.shape[-2:]
        output = self.model(images)
        padded = ((side + STRIDE - 1) // STRIDE * STRIDE for side in (height, width))
        one = output[:, 0, 0]
        sizes = torch.stack([torch.full_like(one, height), torch.full_like(one, width)], 1)
        pairs = torch.ops.nasfast.best_pairs(
            output, *padded, settings.score_threshold, settings.candidates
        )
        found = boxes_of(Pairs(*pairs), sizes)
        classes = torch.arange(output.shape[1] - 5)[:, None]
        scores = torch.where(found.labels[:, None] == classes, found.scores[:, None], -1.0)
        kept = torch.ops.nasfast.kept_boxes(
            found.boxes, scores, settings.nms_threshold, settings.limit
        )
        scores = torch.where(kept > 0, found.scores, -1.0)
        best, index = scores.topk(min(settings.limit, scores.shape[1]))
        return tuple(found.chosen(torch.where(best > 0, index, -1)))  # type: ignore[return-value]

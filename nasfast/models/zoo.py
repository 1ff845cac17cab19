"""The zoo: named architectures of all methods, and networks of any architecture.

Fast NAS published its three decoders, Template-NAS two networks and NAS-FCOS one pyramid with a
head, on several encoders and with several widths; they are here as they are, beside the FCOS that
the last were compared with. Figures are those of the whole network without auxiliary heads.

No genotype, log or checkpoint of the published IR-NAS searches is public. `irnas-denoise`
and `irnas-derain` are **reconstructions**, not the published networks.

Known are cells that the authors had changed by hand, for their comparison with the ones they found:
for each task one with other operations and one with other inputs. Inferred is which change made
which, and so the cell that both came from. Known are the sizes of the networks (layers, nodes, F)
and the 0.63 M parameters of the denoiser. Its path is inferred from them: of both readings of the
cell and all 29 paths only this one has 0.63 times 2^20, a convolution that nothing reads included.
Other cells may have as many. Nothing is known of the deraining network's path; two groups of
offsets need an even number of channels, which F = 15 has at levels 1 and 2 only: this path is the
narrowest that can run.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from nasfast.encoders import MobileNetV2, ResNet, read_weights, tensor_mismatch
from nasfast.models.build import DETECTOR, FAMILIES, RESTORER, SEGMENTER, TEMPLATES, family_of
from nasfast.models.decoders import FULL_DECODER, DecoderConfig, DenseNetwork
from nasfast.models.detector import EXTRA, DetectorConfig
from nasfast.models.io import MODEL_FILE, load_model
from nasfast.models.restorer import RestorerConfig
from nasfast.models.templates import FULL_TEMPLATES, TemplateConfig
from nasfast.spaces.base import Genotype
from nasfast.spaces.fast_nas import FastNASGenotype, FastNASSpace
from nasfast.spaces.ir_nas import IRNASGenotype
from nasfast.spaces.nas_fcos import FOUND, STOCK, NASFCOSGenotype, is_nas_fcos
from nasfast.spaces.template_nas import TemplateNASGenotype, TemplateNASSpace, is_templates
from nasfast.utils.config import from_mapping
from nasfast.utils.errors import UserError, about, did_you_mean
from nasfast.utils.files import read_json
from nasfast.utils.seals import unsealed

FAST_NAS = "Fast NAS: Nekrasov et al., CVPR 2019, arXiv 1810.10804"
TEMPLATE_NAS = "Template-NAS: Nekrasov et al., WACV 2020, arXiv 1904.02365"
IR_NAS = "IR-NAS: Zhang et al., CVPR 2020, arXiv 1909.08228; a reconstruction"
NAS_FCOS = "NAS-FCOS: Wang et al., CVPR 2020, arXiv 1906.04423"
FCOS = "FCOS: Tian et al., ICCV 2019, arXiv 1904.01355; as the baseline of NAS-FCOS"
ENCODER = {"name": MobileNetV2.name, "width": 1.0}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    SEGMENTER: {"decoder": asdict(FULL_DECODER), "outputs": 21, "encoder": ENCODER},
    TEMPLATES: {"decoder": asdict(FULL_TEMPLATES), "outputs": 19, "encoder": ENCODER},
    RESTORER: {"restorer": asdict(RestorerConfig()), "channels": 1, "scale": 1},
    DETECTOR: {"decoder": asdict(DetectorConfig()), "outputs": 80 + EXTRA, "encoder": ENCODER},
}
"""What a genotype alone leaves open, by family of `nasfast.models.build`: the published sizes."""


@dataclass(frozen=True)
class ZooEntry:
    """A published architecture, and what it was searched for."""

    method: str
    """Search method that trains and evaluates it."""
    genotype: FastNASGenotype | TemplateNASGenotype | IRNASGenotype | NASFCOSGenotype
    network: DecoderConfig | TemplateConfig | RestorerConfig | DetectorConfig
    """Size of the network around the genotype."""
    task: Mapping[str, Any]
    """Name as "task", and settings other than the defaults."""
    channels: int
    """Of the images."""
    source: str
    """Publication."""
    size: tuple[int, int]
    """(H, W) of the images that multiply-adds are counted on."""
    published: Mapping[str, float] = field(default_factory=dict)
    """Figures by measure: "parameters", "multiply-adds" at that size, scores."""
    note: str = ""
    """Why a figure of ours is another than the published one."""
    encoder: Mapping[str, Any] = field(default_factory=lambda: ENCODER)
    """Of a network that has one, as `Encoder.describe` says it."""


_DEPTH = (
    *("RMSE, m", "RMSE of logarithms", "absolute relative error", "squared relative error, m"),
    *("delta < 1.25", "delta < 1.25^2", "delta < 1.25^3"),
)


_KEYPOINTS = ("MPII: PCKh@0.5", "MPII: PCKh@0.1", "COCO: AP", "COCO: AR")


def _decoder(
    published: object,
    figures: Sequence[float],
    depth: Sequence[float],
    keypoints: Sequence[float],
) -> ZooEntry:
    """Of Fast NAS, from the published form, (parameters, multiply-adds, mIoU), and the scores of
    `_DEPTH` of the same network with one output and of `_KEYPOINTS` with one for each joint."""
    return ZooEntry(
        method="segmentation",
        genotype=FastNASSpace().from_json(published),
        network=FULL_DECODER,
        task={"task": "segmentation"},
        channels=3,
        source=FAST_NAS,
        size=(512, 512),
        published=dict(
            zip(("parameters", "multiply-adds", "mIoU, PASCAL VOC val"), figures, strict=True)
        )
        | {
            f"depth, NYU Depth v2: {measure}": figure
            for measure, figure in zip(_DEPTH, depth, strict=True)
        }
        | {
            f"keypoints, {measure}": figure
            for measure, figure in zip(_KEYPOINTS, keypoints, strict=True)
        },
        note="Published multiply-adds of the three decoders follow no one rule: ours, of all "
        "convolutions without auxiliary heads, are fewer by 5.9 %, 3.2 % and 2.8 %. With the "
        "heads' three convolutions they are fewer by 1.1 % and 0.7 %, and more by 0.4 %.",
    )


def _templates(published: object, figures: Sequence[float]) -> ZooEntry:
    """Of Template-NAS, from the published form and (parameters, mIoU of three)."""
    measures = (
        "parameters",
        "mIoU, Cityscapes val",
        "mIoU, Cityscapes test",
        "mIoU, CamVid test",
    )
    return ZooEntry(
        method="templates",
        genotype=TemplateNASSpace().from_json(published),
        network=FULL_TEMPLATES,
        task={"task": "segmentation"},
        channels=3,
        source=TEMPLATE_NAS,
        size=(1024, 2048),
        published=dict(zip(measures, figures, strict=True)),
    )


_COCO = ("AP, COCO minival", "AP, COCO test-dev")
_DETECTORS: Mapping[str, tuple[Any, ...]] = {
    # encoder, width of the pyramid, of the head: multiply-adds, trainable parameters, AP of two
    "fpn_fcos_mnv2_128": ("mnv2", 128, None),
    "fpn_fcos_mnv2_256": ("mnv2", 256, None, 105.4e9, 9.8e6),
    "fpn_fcos_r50_128": ("r50", 128, None),
    "fpn_fcos_r50_256": ("r50", 256, None, 169.9e9, 32.0e6),
    "fpn_fcos_r101_256": ("r101", 256, None, 234.3e9, 50.9e6),
    "fpn_fcos_x101_64x4d_256": ("x101_64x4d", 256, None, 371.2e9, 89.6e6),
    "nas_fcos_mnv2_128": ("mnv2", 128, None, 39.3e9, 5.9e6),
    "nas_fcos_r50_128": ("r50", 128, None, 104.0e9, 27.8e6),
    "nas_fcos_mnv2_256": ("mnv2", 256, None, 121.8e9, 16.1e6, 0.344, 0.347),
    "nas_fcos_r50_256": ("r50", 256, None, 189.6e9, 38.4e6, 0.395, 0.398),
    "nas_fcos_r101_256": ("r101", 256, None, 254.0e9, 57.3e6, 0.428, 0.430),
    "nas_fcos_mnv2_128_256": ("mnv2", 128, 256, 95.6e9, 9.9e6),
    "nas_fcos_r50_128_256": ("r50", 128, 256, 160.4e9, 31.8e6),
    "nas_fcos_x101_64x4d_128_256": ("x101_64x4d", 128, 256, 361.6e9, 89.4e6),
}
_ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "mnv2": ENCODER,
    **{
        name: {"name": ResNet.name, "size": size, "stride_in_1x1": caffe, "frozen_norm": True}
        for name, size, caffe in (
            ("r50", "resnet50", True),
            ("r101", "resnet101", True),
            ("x101_64x4d", "resnext101_64x4d", False),
        )
    },
}


def _detector(
    encoder: str, width: int, head_width: int | None, *figures: float, searched: bool
) -> ZooEntry:
    """Of NAS-FCOS or of its baseline, from widths and (multiply-adds, parameters, AP of two)."""
    measures = ("multiply-adds", "trainable parameters", *_COCO)
    return ZooEntry(
        method="detection",
        genotype=FOUND if searched else STOCK,
        network=DetectorConfig(width, head_width),
        task={"task": "detection"},
        channels=3,
        source=NAS_FCOS if searched else FCOS,
        size=(1088, 800),
        published=dict(zip(measures, figures)),
        note="Published figures count biases, BatchNorm and ReLU too, ours convolutions alone: "
        "they are fewer by 0.03 to 1.2 %."
        if figures
        else "Not published: the baseline at the width of the searched network.",
        encoder=_ENCODERS[encoder],
    )


ZOO = {
    "fast_nas_arch0": _decoder(
        [[8, [0, 0, 5, 2], [0, 2, 8, 8], [0, 5, 1, 4]], [[3, 3], [3, 2], [3, 0]]],
        (2.6e6, 4.47e9, 0.780),
        (0.523, 0.184, 0.136, 0.089, 0.830, 0.967, 0.992),
        (0.865, 0.314, 0.658, 0.691),
    ),
    "fast_nas_arch1": _decoder(
        [[2, [1, 0, 3, 6], [0, 1, 2, 8], [2, 0, 6, 1]], [[2, 3], [3, 1], [4, 4]]],
        (2.8e6, 2.95e9, 0.771),
        (0.526, 0.183, 0.131, 0.086, 0.832, 0.968, 0.992),
        (0.870, 0.320, 0.659, 0.694),
    ),
    "fast_nas_arch2": _decoder(
        [[5, [0, 0, 4, 1], [3, 2, 0, 1], [5, 6, 5, 0]], [[1, 3], [4, 3], [2, 2]]],
        (2.9e6, 3.47e9, 0.773),
        (0.525, 0.189, 0.140, 0.093, 0.820, 0.966, 0.992),
        (0.871, 0.318, 0.659, 0.693),
    ),
    "template_nas_arch0": _templates(
        [
            [[3, 0, 1], [4, 1, 1], [3, 1, 1]],
            [
                *([0, 1, 0, 0, 1], [2, 1, 2, 1, 0], [3, 1, 1, 1, 0], [1, 1, 2, 0, 0]),
                *([3, 0, 2, 0, 0], [5, 3, 2, 1, 0], [0, 5, 0, 1, 0]),
            ],
        ],
        (280_147, 0.681, 0.677, 0.639),
    ),
    "template_nas_arch1": _templates(
        [
            [[1, 1, 0], [1, 3, 0], [3, 4, 0]],
            [
                *([1, 1, 0, 0, 0], [0, 1, 1, 1, 1], [3, 1, 2, 3, 0], [3, 0, 2, 2, 0]),
                *([0, 1, 2, 0, 0], [2, 1, 1, 3, 0], [4, 0, 2, 2, 0]),
            ],
        ],
        (268_235, 0.695, 0.678, 0.632),
    ),
    "irnas-denoise": ZooEntry(
        method="restoration",
        genotype=IRNASGenotype(
            nodes=(
                (("conv3x3", 0), ("conv3x3", 1)),
                (("dil3x3", 1), ("dil3x3", 2)),
                (("skip", 0), ("def3x3", 2)),
                (("def3x3", 0), ("def3x3", 4)),
                (("skip", 1), ("skip", 5)),
            ),
            levels=(0, 0, 0, 1),
        ),
        network=RestorerConfig(width=20, dead_reduce=True),
        task={"task": "denoising"},
        channels=1,
        source=IR_NAS,
        size=(321, 481),
        published={
            "parameters": 0.63e6,  # as printed; the authors' program divides by 2**20
            "PSNR at sigma 30, dB": 29.14,
            "SSIM at sigma 30": 0.8403,
            "PSNR at sigma 50, dB": 26.77,
            "SSIM at sigma 50": 0.7635,
            "PSNR at sigma 70, dB": 25.48,
            "SSIM at sigma 70": 0.7129,
        },
    ),
    "irnas-derain": ZooEntry(
        method="restoration",
        genotype=IRNASGenotype(
            nodes=(
                (("skip", 0), ("def3x3", 1)),
                (("def3x3", 0), ("conv3x3", 1)),
                (("skip", 0), ("def3x3", 2)),
                (("conv3x3", 1), ("def3x3", 2)),
            ),
            levels=(1, 1, 1),
        ),
        network=RestorerConfig(width=15),
        task={"task": "deraining"},
        channels=3,
        source=IR_NAS,
        size=(321, 481),
    ),
    **{
        name: _detector(*entry, searched=name.startswith("nas_fcos"))
        for name, entry in _DETECTORS.items()
    },
}
"""By name."""


def list_models(pattern: str = "*") -> list[str]:
    """Names of the zoo that match a pattern, such as ``"*denoise*"``."""
    return [name for name in ZOO if fnmatchcase(name, pattern)]


def create_model(
    source: str | Path | Genotype | Mapping[str, Any] | Sequence[Any],
    num_classes: int | None = None,
    *,
    channels: int | None = None,
    pretrained: str | Path | None = None,
    faithful: bool = False,
) -> nn.Module:
    """A network to train or to build on, in training mode: its weights are new.

    For a segmentation architecture it is an `EncoderDecoder`: images ``[N, 3, H, W]`` to
    ``(output [N, num_classes, h, w], auxiliary outputs)``, normalised as for torchvision's weights.
    For a detection architecture it is a `Detector`, whose output is ``[N, num_classes + 5, P]``.
    For a restoration architecture it is a `Restorer`: images ``[N, channels, H, W]`` in 0..1 to
    restored images. `nasfast.load` gives a trained network that predicts on files.

    Args:
        source: a name of the zoo; a best.json, genotype.json, metrics.json or model.safetensors, or
            the directory with one; a genotype or its JSON form.
        num_classes: of a segmentation or detection network; default: those of ``pretrained`` or of
            the model file, else those of the publication: 21 for Fast NAS, 19 for Template-NAS, 80
            for NAS-FCOS. 1 for depth, 17 for the joints of COCO, 16 for those of MPII.
        channels: 1 or 3, of the images of a restoration network; default: those of the
            architecture, else 1.
        pretrained: a model.safetensors of this network, loaded strictly; a classifier of another
            number of classes stays new, with a warning. For a segmentation network also weights of
            its encoder alone, with torchvision's key names.
        faithful: build what the publication counts and this library has otherwise by default: the
            1x1 convolution of MobileNet-v2's first block, which is the identity after torchvision's
            weights, which lack it, have been loaded; the strides of Template-NAS that its code
            repeats; the convolution of IR-NAS that nothing may read; the adapter of an input that
            no block of NAS-FCOS reads.

    Raises:
        UserError: there is no such architecture, it lacks what is asked for, or the weights are of
            another network.
    """
    if isinstance(pretrained, bool):
        raise UserError(
            f"pretrained: expected the path of a model.safetensors, got {pretrained}; there are no "
            "weights to download: nasfast train makes them"
        )
    key, description = describe(source, faithful)
    weights = read_weights(Path(pretrained))[0] if pretrained is not None else {}
    _check_ends(key, num_classes, channels)
    if key != RESTORER:
        trained, extra = weights.get(_classifier(key) + "weight"), _extra(key)
        outputs = description["outputs"] if trained is None else len(trained) + extra
        description["outputs"] = outputs if num_classes is None else num_classes + extra
    else:
        description["channels"] = channels or description["channels"]
    family = FAMILIES[key]
    configs = {name: from_mapping(c, description[name], name) for name, c in family.configs.items()}
    network = family.build({**description, **configs})
    if pretrained is not None:
        _load(network, weights, str(pretrained))
    return network.train()


def _classifier(key: str) -> str:
    """Of the names of the classifier's tensors, in a family with classes."""
    return "decoder.head.classify." if key == DETECTOR else "decoder.conv_clf."


def _extra(key: str) -> int:
    """Outputs beside those of the classes."""
    return EXTRA if key == DETECTOR else 0


def _check_ends(key: str, num_classes: int | None, channels: int | None) -> None:
    """Raise UserError for inputs or outputs that a family does not have."""
    if key != RESTORER:
        if channels not in (None, 3):
            raise UserError(
                f"channels: expected 3 for a {'detection' if key == DETECTOR else 'segmentation'} "
                f"network, got {channels}; leave it out"
            )
        if num_classes is not None and num_classes < 1:
            raise UserError(f"num_classes: expected at least 1, got {num_classes}")
    elif num_classes is not None:
        raise UserError(
            f"num_classes: expected none for a restoration network, got {num_classes}; give "
            "channels=1 or channels=3"
        )
    elif channels not in (None, 1, 3):
        raise UserError(f"channels: expected 1, grey, or 3, colour, got {channels}")


def describe(source: object, faithful: bool = False) -> tuple[str, dict[str, Any]]:
    """The family of an architecture, and the description that it is built from; arguments and
    errors as for `create_model`."""
    if isinstance(source, str) and source in ZOO:
        entry = ZOO[source]
        content: object = entry.genotype.to_json()
        found: Mapping[str, Any] = {"channels": entry.channels, "encoder": entry.encoder}
        if isinstance(entry.network, DetectorConfig):
            found = {**found, "decoder": asdict(entry.network)}
        if isinstance(entry.network, RestorerConfig):
            found = {**found, "restorer": asdict(replace(entry.network, dead_reduce=False))}
    elif isinstance(source, str | Path):
        content, found = read_architecture(Path(source)), {}
    else:
        content, found = source if isinstance(source, Mapping | list | tuple) else _json(source), {}
    if isinstance(content, Mapping) and "genotype" in content:
        found = content
        content = found["genotype"]
    with about(source if isinstance(source, str | Path) else "create_model"):
        key, genotype = _family(content)
    # a record of a search, or metrics, say no sizes; a model file says all
    task = found.get("task")
    scale = {"scale": task["scale"]} if isinstance(task, Mapping) and "scale" in task else {}
    defaults = {**DEFAULTS[key], **scale}
    description = {name: found.get(name, value) for name, value in defaults.items()}
    if faithful:
        more = {
            SEGMENTER: {"encoder": {"expand_first": True}},
            TEMPLATES: {"encoder": {"expand_first": True}, "decoder": {"faithful": True}},
            RESTORER: {"restorer": {"dead_reduce": True}},
            DETECTOR: {"decoder": {"faithful": True}},
        }[key]
        description |= {part: {**description[part], **changed} for part, changed in more.items()}
    return key, {"genotype": genotype, **description}


def read_architecture(path: Path) -> object:
    """What a file says of an architecture: the JSON of a genotype, of an object with one as
    "genotype", or the description of a model file; of a directory its best.json, genotype.json or
    model.safetensors.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if path.is_dir():
        names = (MODEL_FILE, "genotype.json", "best.json")
        path = next((path / name for name in names if (path / name).is_file()), path)
    if not path.is_file():
        raise UserError(
            f"architecture: expected a name of the zoo ({', '.join(ZOO)}), a run, or a file with a "
            f"genotype, got {path}{did_you_mean(str(path), ZOO)}"
        )
    if path.suffix == ".safetensors":
        network, _ = load_model(path)
        return family_of(network)[1].describe(network)
    content = read_json(path)
    return unsealed(content, path) if isinstance(content, dict) else content


def _json(genotype: object) -> object:
    if isinstance(
        genotype, FastNASGenotype | TemplateNASGenotype | IRNASGenotype | NASFCOSGenotype
    ):
        return genotype.to_json()
    raise UserError(
        f"create_model: expected a name, a path or a genotype, got {type(genotype).__name__}"
    )


def _family(genotype: object) -> tuple[str, object]:
    """By the genotype's space, which a published list form does not name."""
    if isinstance(genotype, list | tuple):
        if is_nas_fcos(genotype):
            return DETECTOR, genotype
        return TEMPLATES if is_templates(genotype) else SEGMENTER, genotype
    space = genotype.get("space") if isinstance(genotype, Mapping) else genotype
    for key, family in FAMILIES.items():
        if family.space == space:
            return key, genotype
    spaces = ", ".join(family.space for family in FAMILIES.values())
    raise UserError(
        f'expected a genotype whose "space" is one of {spaces}, got {space!r}; give a '
        "genotype.json or best.json that nasfast wrote"
    )


def _load(network: nn.Module, weights: Mapping[str, Any], source: str) -> None:
    if isinstance(network, DenseNetwork):
        if not any(key.startswith("decoder.") for key in weights):
            network.encoder.load_strict(weights, source)
            return
        weights = _with_own_head(network, weights, source)
    problem = tensor_mismatch(network.state_dict(), weights)
    if problem:
        raise UserError(
            f"pretrained {source}: expected the weights of this network, got {problem}; "
            f"create_model({source!r}, pretrained={source!r}) builds the network of the file"
        )
    network.load_state_dict(weights)


def _with_own_head(
    network: DenseNetwork, weights: Mapping[str, Any], source: str
) -> Mapping[str, Any]:
    """The weights, but for classifiers of another number of classes those of the network."""
    prefix = _classifier(family_of(network)[0])
    trained = weights.get(f"{prefix}weight")
    classes = len(network.state_dict()[f"{prefix}weight"])
    if trained is None or len(trained) == classes:
        return weights
    heads = {
        name: own
        for name, own in network.state_dict().items()
        if name.startswith((prefix, "decoder.aux_heads."))
        and name in weights
        and (len(own), len(weights[name])) == (classes, len(trained))
        and own.shape[1:] == weights[name].shape[1:]
    }
    warnings.warn(
        f"pretrained {source}: its classifier has {len(trained)} classes, this network {classes}: "
        "the classifier is new and has to be trained",
        stacklevel=4,
    )
    return {**weights, **heads}

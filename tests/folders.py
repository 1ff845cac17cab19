"""Small folders of images and masks, as people have them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (8, 12)  # height, width


def save_image(path, seed=0, size=SIZE, **options):
    """Random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def save_mask(path, values, size=SIZE):
    """Bands of the values, one below the other."""
    rows = np.resize(np.repeat(values, -(-size[0] // len(values))), size[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.repeat(rows[:, None], size[1], 1).astype(np.uint8)).save(path)


def write_folder(
    root, stems="abcdefghijkl", values=(0, 1), classes=("no", "yes"), size=SIZE
) -> Path:
    """images/, masks/ and classes.txt."""
    for i, stem in enumerate(stems):
        save_image(root / "images" / f"{stem}.png", i, size)
        save_mask(root / "masks" / f"{stem}.png", values, size)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    return root


def write_lists(root, train, val):
    for name, stems in (("train", train), ("val", val)):
        (root / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))


def write_cityscapes(root, cities, ending="labelIds", values=(7, 26, 0), size=(16, 32)) -> Path:
    """leftImg8bit/ and gtFine/ with so many frames of each city, by part: {"train": {"ulm": 2}}."""
    for part, counts in cities.items():
        for city, count in counts.items():
            for i in range(count):
                frame = f"{part}/{city}/{city}_{i:06d}_000019"
                save_image(root / f"leftImg8bit/{frame}_leftImg8bit.png", [i, *city.encode()], size)
                for kind in (ending, "color", "instanceIds"):
                    save_mask(root / f"gtFine/{frame}_gtFine_{kind}.png", values, size)
                (root / f"gtFine/{frame}_gtFine_polygons.json").touch()
    return root


def write_voc(root, lists, values=(0, 15, 255), masks="SegmentationClass") -> Path:
    """JPEGImages/, masks and ImageSets/Segmentation/, of lists of ids by their names."""
    for name, ids in lists.items():
        path = root / "ImageSets/Segmentation" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{i}\n" for i in ids))
        for number, i in enumerate(ids):
            size = (16 + number, 24)
            save_image(root / "JPEGImages" / f"{i}.jpg", number, size)
            save_mask(root / masks / f"{i}.png", values, size)
    return root


def write_boxes(root, lists, objects, folder="", size=(40, 60)) -> Path:
    """A folder of VOC with boxes: `objects`, the text of XML by id, default: one box of a cat."""
    cat = voc_object("cat", 11, 6, 30, 25)
    for name, ids in lists.items():
        path = root / folder / "ImageSets/Main" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{i}\n" for i in ids))
        for i in ids:
            save_image(root / folder / "JPEGImages" / f"{i}.jpg", [*i.encode()], size)
            xml = root / folder / "Annotations" / f"{i}.xml"
            xml.parent.mkdir(exist_ok=True)
            xml.write_text(f"<annotation>{objects.get(i, cat)}</annotation>")
    return root / folder


def voc_object(name, xmin, ymin, xmax, ymax, more="") -> str:
    edges = zip(("ymax", "xmin", "ymin", "xmax"), (ymax, xmin, ymin, xmax), strict=True)
    box = "".join(f"<{edge}>{value}</{edge}>" for edge, value in edges)
    return f"<object><bndbox>{box}</bndbox>{more}<name> {name} </name></object>"


CATEGORIES = ({"id": 3, "name": "cell"}, {"id": 70, "name": "plate", "supercategory": "none"})


def coco_content(ids=(1, 2), annotations=(), categories=CATEGORIES, name="{}.png"):
    """Annotations of images of 40x60."""
    images = [{"id": i, "file_name": name.format(i), "height": 40, "width": 60} for i in ids]
    boxes = [{"bbox": [10, 5, 20, 20], "category_id": 3, "id": k, **a} for k, a in annotations]
    return {"images": images, "annotations": boxes, "categories": list(categories)}


def write_coco(path, images, content, size=(40, 60)):
    """A file of annotations, and its images in a folder; nothing where it is None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    for number, image in enumerate(content["images"]):
        save_image(images / image["file_name"].replace("\\", "/"), number, size)

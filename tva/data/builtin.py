"""The image sets that tva brings itself, so that its demo and tests need no network.

``digits`` is real handwriting, shipped inside scikit-learn. All other sets are drawn: a picture is a *mark* (a glyph
of a font that ships with matplotlib, or a texture formula) seen through a *look* (rotation, waviness, colors, noise).
Marks are functions of the plane, so every look is a change of coordinates, then of color.

The model ``tva-tiny`` was pre-trained on the same marks in the plain look; each set's own look is the domain shift that
fine-tuning learns. No picture of a set was seen in pre-training, and no real handwriting at all.
"""

from __future__ import annotations

import difflib
import io
import zlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tva.data.drawing import IMAGE_SIZE, PLAIN, TEXT_FONTS, Look, Mark, draw, glyphs, texture

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

MARKS: dict[str, dict[str, Mark]] = {
    "digits": glyphs("0123456789", "zero one two three four five six seven eight nine", TEXT_FONTS),
    "letters": glyphs("ABCDEFGHKR", "A B C D E F G H K R", TEXT_FONTS),
    "shapes": glyphs("⬅●✚⬟▬■★▲", "arrow circle cross pentagon rectangle square star triangle"),
    "textures": {
        "bricked": texture(lambda x, y: (y % 0.5 < 0.1) | ((x + (y // 0.5 % 2) * 0.5) % 1 < 0.1)),
        "checkered": texture(lambda x, y: (x % 1 < 0.5) ^ (y % 1 < 0.5)),
        "dotted": texture(lambda x, y: (x % 0.7 - 0.35) ** 2 + (y % 0.7 - 0.35) ** 2 < 0.05),
        "latticed": texture(lambda x, y: (x % 0.6 < 0.12) | (y % 0.6 < 0.12)),
        "rayed": texture(lambda x, y: np.arctan2(y, x) % (np.pi / 5) < np.pi / 10),
        "ringed": texture(lambda x, y: np.hypot(x, y) % 0.5 < 0.25),
        "striped": texture(lambda x, y: y % 0.5 < 0.25),
        "zigzag": texture(lambda x, y: (y + abs(x % 0.8 - 0.4)) % 0.5 < 0.25),
    },
    "objects": glyphs(
        "✈⚓🐱☕✉⚑⚙⚒⌂⌨🐵✎⚖✂☠☎",
        "airplane anchor cat cup envelope flag gear hammer house keyboard monkey pencil scales scissors skull "
        "telephone",
    ),
    "symbols": glyphs("☁♥♚♫♟♣✿♞☀☂", "cloud heart king music pawn club flower knight sun umbrella"),
}


@dataclass(frozen=True)
class BuiltinSet:
    """What defines one built-in set.

    Attributes:
        templates: Prompts for the zero-shot head; ``{}`` stands for the class name.
        num_train: Number of training examples.
        num_test: Number of test examples.
        looks: Style name -> look of the drawn pictures; empty for real images. Styles are equally frequent.
        halves: Half name -> its class names, for subpopulation analogies.
    """

    templates: tuple[str, ...]
    num_train: int
    num_test: int
    looks: dict[str, Look] = field(default_factory=dict)
    halves: dict[str, tuple[str, ...]] = field(default_factory=dict)


_PLAIN_TEMPLATES = ("a {}", "a picture of a {}", "a drawing of a {}")
BUILTIN_SETS: dict[str, BuiltinSet] = {
    "digits": BuiltinSet(("a digit {}", "a picture of a digit {}", "a drawing of a digit {}"), 1297, 500),
    "letters": BuiltinSet(
        ("a letter {}", "a picture of a letter {}", "a drawing of a letter {}"),
        2000,
        1000,
        {"distant": replace(PLAIN, scale=(0.3, 0.5), inks=("white",), papers=("blue",))},
    ),
    "shapes": BuiltinSet(
        _PLAIN_TEMPLATES,
        2000,
        1000,
        {"blurred": replace(PLAIN, pixels=8, turn=25, inks=("yellow", "green"), papers=("black",))},
    ),
    "textures": BuiltinSet(
        ("a {} texture", "a picture of a {} texture", "a drawing of a {} texture"),
        2000,
        1000,
        {"faded": replace(PLAIN, contrast=(0.25, 0.35), inks=("white",), papers=("gray",))},
    ),
    "objects": BuiltinSet(_PLAIN_TEMPLATES, 2000, 2000, {"neat": replace(PLAIN, turn=6, shift=0.1, noise=0.04)}),
    "symbols": BuiltinSet(
        _PLAIN_TEMPLATES,
        2400,
        2000,
        {
            "solid": PLAIN,
            "sketch": replace(PLAIN, outline=True, pixels=9, wobble=0.04, inks=("white",), papers=("black",)),
        },
        {"A": ("cloud", "heart", "king", "music", "pawn"), "B": ("club", "flower", "knight", "sun", "umbrella")},
    ),
}


def check_name(name: str) -> None:
    """Raise ValueError if no built-in set has this name."""
    if name not in BUILTIN_SETS:
        nearest = difflib.get_close_matches(name, BUILTIN_SETS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"no built-in set is named {name!r}; the built-in sets are {', '.join(BUILTIN_SETS)}. "
            f"Did you mean {nearest!r}?"
        )


def load_builtin(name: str) -> DatasetDict:
    """Make one of the built-in image sets, in memory and the same each time.

    Args:
        name: A key of ``BUILTIN_SETS``.

    Returns:
        Splits ``train`` and ``test`` with the features ``image`` (RGB, 32 x 32), ``label`` (a ``ClassLabel`` with
        names), and, for drawn sets, ``style``; ``half`` where classes are split into halves.

    Raises:
        ValueError: No built-in set has this name.

    Example:
        >>> load_builtin("digits")["test"].features["label"].int2str(7)
        'seven'
    """
    check_name(name)
    import datasets

    if name == "digits":
        return datasets.DatasetDict(_handwriting())
    counts = {"train": BUILTIN_SETS[name].num_train, "test": BUILTIN_SETS[name].num_test}
    return datasets.DatasetDict({split: _drawn(name, split, count) for split, count in counts.items()})


def _handwriting() -> dict[str, Dataset]:
    """Split scikit-learn's handwritten digits at random, always in the same way."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(_seed("digits")).permutation(len(bunch.target))
    test_size = BUILTIN_SETS["digits"].num_test
    return {
        split: _dataset(
            "digits", [_enlarged(bunch.images[i]) for i in indices], {"label": bunch.target[indices].tolist()}
        )
        for split, indices in (("train", order[test_size:]), ("test", order[:test_size]))
    }


def _enlarged(image: np.ndarray) -> np.ndarray:
    """Enlarge an 8 x 8 image with values 0 to 16 to RGB of the model's size, with a margin."""
    gray = Image.fromarray((image * (255 / 16)).astype(np.uint8)).resize((28, 28), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    canvas.paste(gray, (2, 2))
    return np.asarray(canvas)


def _drawn(name: str, split: str, count: int) -> Dataset:
    """Draw one split of a set, its classes and styles equally frequent and in random order."""
    spec, marks = BUILTIN_SETS[name], list(MARKS[name].items())
    half_of = {class_name: half for half, members in spec.halves.items() for class_name in members}
    rng = np.random.default_rng(_seed(f"{name}/{split}"))
    pictures, columns = [], {"label": [], "style": []} | ({"half": []} if half_of else {})
    for i in rng.permutation(count):
        label, style = i % len(marks), list(spec.looks)[i // len(marks) % len(spec.looks)]
        class_name, mark = marks[label]
        pictures.append(draw(mark, spec.looks[style], rng)[0])
        columns["label"].append(int(label))
        columns["style"].append(style)
        if half_of:
            columns["half"].append(half_of[class_name])
    return _dataset(name, pictures, columns)


def _dataset(name: str, pictures: list[np.ndarray], columns: dict[str, list]) -> Dataset:
    import datasets

    text_columns = {column: datasets.Value("string") for column in columns if column != "label"}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(MARKS[name])), **text_columns}
    images = [{"bytes": _png(picture), "path": None} for picture in pictures]
    return datasets.Dataset.from_dict({"image": images, **columns}, features=datasets.Features(features))


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _seed(text: str) -> int:
    return zlib.crc32(text.encode())

"""The image sets that tva brings itself, so that its demo and tests need no network.

``digits`` is real handwriting, shipped inside scikit-learn. All other sets are drawn: a picture is a *mark* (a glyph
of a font that ships with matplotlib, or a texture formula) seen through a *look* (rotation, waviness, colors, noise).
Marks are functions of the plane, so every look is a change of coordinates, then of color.

The model ``tva-tiny`` was pre-trained on the same marks in the plain look; each set's own look is the domain shift that
fine-tuning learns. No picture of a set was seen in pre-training, and no real handwriting at all.
"""

from __future__ import annotations

import difflib
import functools
import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

IMAGE_SIZE = 32  # pixels; the input size of tva-tiny
_OVERSAMPLING = 2  # pictures are drawn this many times larger, then averaged down, for smooth edges
_GLYPH_SIZE = 96  # pixels of a cached glyph

Mark = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]  # (x, y, rng) -> ink in [0, 1]

COLORS = {
    "black": (0.08, 0.08, 0.08),
    "white": (0.95, 0.95, 0.95),
    "gray": (0.55, 0.55, 0.55),
    "red": (0.85, 0.15, 0.15),
    "orange": (0.95, 0.55, 0.1),
    "yellow": (0.95, 0.9, 0.2),
    "green": (0.15, 0.6, 0.2),
    "blue": (0.15, 0.3, 0.85),
    "purple": (0.55, 0.2, 0.7),
    "brown": (0.45, 0.28, 0.12),
}


@dataclass(frozen=True)
class Look:
    """The ranges from which one picture's appearance is drawn.

    Lengths are in halves of the picture's width, so that the picture spans -1 to 1.

    Attributes:
        turn: Largest rotation to either side, degrees.
        scale: Smallest and largest half-width of the mark.
        shift: Largest displacement along each axis.
        shear: Largest slant.
        wobble: Amplitude of the smooth distortion that makes a mark look hand-drawn.
        outline: Whether only the mark's edge is inked.
        pixels: Number of pixels across that the ink is coarsened to.
        noise: Largest standard deviation of the pixel noise; pixels lie in [0, 1].
        contrast: Smallest and largest factor on the difference of ink and paper.
        inks: Names of the colors the ink is chosen from.
        papers: Names of the colors the paper is chosen from.
    """

    turn: float = 12.0
    scale: tuple[float, float] = (0.6, 0.9)
    shift: float = 0.15
    shear: float = 0.1
    wobble: float = 0.02
    outline: bool = False
    pixels: int = IMAGE_SIZE
    noise: float = 0.1
    contrast: tuple[float, float] = (0.8, 1.0)
    inks: tuple[str, ...] = tuple(COLORS)
    papers: tuple[str, ...] = tuple(COLORS)


PLAIN = Look()


def draw(mark: Mark, look: Look, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Draw one picture of a mark.

    Args:
        mark: Function of the plane that says where ink is.
        look: Ranges of the random appearance.
        rng: Source of all randomness.

    Returns:
        The picture, uint8 of shape (IMAGE_SIZE, IMAGE_SIZE, 3), and the name of its ink's color.
    """
    size = IMAGE_SIZE * _OVERSAMPLING
    x, y = np.meshgrid(*2 * [np.linspace(-1, 1, size, dtype=np.float32)])  # (size, size) each
    if look.wobble:
        x, y = x + look.wobble * _smooth_noise(size, rng), y + look.wobble * _smooth_noise(size, rng)
    x, y = x - rng.uniform(-look.shift, look.shift), y - rng.uniform(-look.shift, look.shift)
    angle = np.radians(rng.uniform(-look.turn, look.turn))
    x, y = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    x = x + rng.uniform(-look.shear, look.shear) * y
    scale = rng.uniform(*look.scale)
    ink = mark(x / scale, y / scale, rng)
    if look.outline:
        ink = _edge(ink, width=3)
    ink = _resized(_resized(ink, look.pixels), IMAGE_SIZE)[..., None]

    pairs = _contrasting_colors(look.inks, look.papers)
    ink_name, paper_name = pairs[rng.integers(len(pairs))]
    ink_color, paper_color = (np.array(COLORS[name]) + rng.uniform(-0.08, 0.08, 3) for name in (ink_name, paper_name))
    picture = paper_color + rng.uniform(*look.contrast) * ink * (ink_color - paper_color)  # (size, size, 3)
    picture = picture + rng.uniform(0, look.noise) * rng.standard_normal(picture.shape)
    return (255 * picture.clip(0, 1)).round().astype(np.uint8), ink_name


@functools.cache
def _contrasting_colors(inks: tuple[str, ...], papers: tuple[str, ...]) -> list[tuple[str, str]]:
    """List the pairs of an ink and a paper whose brightness differs by a quarter or more."""
    brightness = {name: sum(color) / 3 for name, color in COLORS.items()}
    return [(ink, paper) for ink in inks for paper in papers if abs(brightness[ink] - brightness[paper]) >= 0.25]


def _resized(field: np.ndarray, size: int) -> np.ndarray:
    """Return a field of another size, averaged where it shrinks and smooth where it grows."""
    return np.asarray(Image.fromarray(field).resize((size, size), Image.Resampling.BILINEAR))


def _smooth_noise(size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random field of shape (size, size) that varies over about a fifth of the picture."""
    return _resized(rng.standard_normal((6, 6)).astype(np.float32), size)


def _edge(ink: np.ndarray, width: int) -> np.ndarray:
    """Keep the ink that lies within ``width`` pixels of where it ends."""
    inside = ink
    for shift in (-width, width):
        for axis in (0, 1):
            inside = np.minimum(inside, np.roll(ink, shift, axis))
    return ink - inside


# Marks: glyphs of fonts and formulas of textures.

_SYMBOL_FONTS = ("DejaVuSans",)
_TEXT_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "cmr10",
    "cmss10",
    "cmtt10",
)


@functools.cache
def _glyph_bitmap(char: str, font: str) -> np.ndarray:
    """Render a glyph so that its longer side fills the square, float32 of shape (_GLYPH_SIZE, _GLYPH_SIZE)."""
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
    canvas = Image.new("L", (2 * _GLYPH_SIZE, 2 * _GLYPH_SIZE))
    ImageDraw.Draw(canvas).text(
        (_GLYPH_SIZE, _GLYPH_SIZE), char, fill=255, font=ImageFont.truetype(str(path), _GLYPH_SIZE), anchor="mm"
    )
    glyph = canvas.crop(canvas.getbbox())
    square = Image.new("L", (max(glyph.size), max(glyph.size)))
    square.paste(glyph, ((square.width - glyph.width) // 2, (square.height - glyph.height) // 2))
    bitmap = np.zeros((_GLYPH_SIZE, _GLYPH_SIZE), np.float32)  # its border stays empty: the plane outside has no ink
    bitmap[1:-1, 1:-1] = np.asarray(square.resize((_GLYPH_SIZE - 2, _GLYPH_SIZE - 2))) / 255
    return bitmap


def glyph(char: str, fonts: tuple[str, ...] = _SYMBOL_FONTS) -> Mark:
    """Return the mark that shows one character, in one of the named fonts chosen anew for each picture."""

    def mark(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        bitmap = _glyph_bitmap(char, fonts[rng.integers(len(fonts))])
        column, row = (np.clip((1 + v) / 2 * _GLYPH_SIZE, 0, _GLYPH_SIZE - 1).astype(int) for v in (x, y))
        return bitmap[row, column]

    return mark


def texture(formula: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Mark:
    """Return the mark that fills the plane with a pattern, true where ink is, in a random position and fineness."""

    def mark(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        fineness, (dx, dy) = rng.uniform(1.2, 2.2), rng.uniform(-0.5, 0.5, 2)
        return formula(fineness * (x - dx), fineness * (y - dy)).astype(np.float32)

    return mark


def _glyphs(chars: str, names: str, fonts: tuple[str, ...] = _SYMBOL_FONTS) -> dict[str, Mark]:
    return {name: glyph(char, fonts) for name, char in zip(names.split(), chars, strict=True)}


MARKS: dict[str, dict[str, Mark]] = {
    "digits": _glyphs("0123456789", "zero one two three four five six seven eight nine", _TEXT_FONTS),
    "letters": _glyphs("ABCDEFGHKR", "A B C D E F G H K R", _TEXT_FONTS),
    "shapes": _glyphs("⬅●✚⬟▬■★▲", "arrow circle cross pentagon rectangle square star triangle"),
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
    "objects": _glyphs(
        "✈⚓🐱☕✉⚑⚙⚒⌂⌨🐵✎⚖✂☠☎",
        "airplane anchor cat cup envelope flag gear hammer house keyboard monkey pencil scales scissors skull "
        "telephone",
    ),
    "symbols": _glyphs("☁♥♚♫♟♣✿♞☀☂", "cloud heart king music pawn club flower knight sun umbrella"),
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
    if name not in BUILTIN_SETS:
        nearest = difflib.get_close_matches(name, BUILTIN_SETS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"no built-in set is named {name!r}; the built-in sets are {', '.join(BUILTIN_SETS)}. "
            f"Did you mean {nearest!r}?"
        )
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
    """Put pictures and columns into a Hugging Face data set, pictures as PNG."""
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
    """Turn text into a seed that is the same in every process."""
    return zlib.crc32(text.encode())

"""Draw a picture of a mark (a glyph, or a texture formula) as it looks when seen through a look.

Marks are functions of the plane, so every look is a change of coordinates, then of color.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
        noise: Largest standard deviation of the pixel noise; pixels are in [0, 1].
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
    brightness = {name: sum(color) / 3 for name, color in COLORS.items()}
    return [(ink, paper) for ink in inks for paper in papers if abs(brightness[ink] - brightness[paper]) >= 0.25]


def _resized(field: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(field).resize((size, size), Image.Resampling.BILINEAR))


def _smooth_noise(size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random field of shape (size, size) that varies over about a fifth of the picture."""
    return _resized(rng.standard_normal((6, 6)).astype(np.float32), size)


def _edge(ink: np.ndarray, width: int) -> np.ndarray:
    """Keep the ink that is within ``width`` pixels of where it ends."""
    inside = ink
    for shift in (-width, width):
        for axis in (0, 1):
            inside = np.minimum(inside, np.roll(ink, shift, axis))
    return ink - inside


# Marks: glyphs of fonts and formulas of textures.

_SYMBOL_FONTS = ("DejaVuSans",)
TEXT_FONTS = (
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
    """Return the mark that shows one character, in one of the named fonts chosen for each picture."""

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


def glyphs(chars: str, names: str, fonts: tuple[str, ...] = _SYMBOL_FONTS) -> dict[str, Mark]:
    """Return the marks of several characters by the names that are given in the same order."""
    return {name: glyph(char, fonts) for name, char in zip(names.split(), chars, strict=True)}

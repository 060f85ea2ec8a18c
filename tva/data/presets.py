"""Data sets that have a name: the image tasks of the paper, the 14 and 20 tasks of its successors, and ImageNet.

A preset is a set's repository on the Hugging Face hub, the names of its columns, and the class names and prompt
templates that CLIP is asked with. A copy on disk (``local``) takes the hub's place. An installed package adds presets
under the entry-point group ``tva.data_sets``: the entry point's name is the preset's, its object a `Preset`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tva.data import class_names as known
from tva.errors import did_you_mean, some
from tva.plugins import installed

GROUP = "tva.data_sets"

_KINDS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")


def _each(*templates: str) -> tuple[str, ...]:
    """Return each template with ``a`` and then each with ``the`` in place of ``[a]``."""
    return tuple(template.replace("[a]", article) for article in ("a", "the") for template in templates)


_OBJECT = _each("a photo of [a] {}.")
_CIFAR = tuple(
    text
    for article in ("a", "the")
    for text in (
        *(f"a {kind}photo of {article} {{}}." for kind in _KINDS),
        *(f"a photo of {article} {size} {{}}." for size in ("small", "big")),
    )
)
_VIEWS = tuple(f"{where} {what}" for what in ("imagery", "photo", "view") for where in ("satellite", "aerial"))
_NUMBER = ('a photo of the number: "{}".',)


@dataclass(frozen=True)
class Preset:
    """One named data set.

    Attributes:
        hub: Its repository on the Hugging Face hub.
        num_classes: Classes that it must have.
        templates: Prompts of the paper for this task; ``()`` stands for the 80 of ImageNet.
        config: Configuration of the repository.
        image: Its column of images.
        label: Its column of labels.
        test_split: Its split to report on.
        classes: Names to prompt with, in the order of the labels; or the data's own names, each with what to prompt
            with. Without it the data's own names are used, with spaces for ``_``.
        label_order: Whether all copies number the classes in the order of ``classes``, whatever they call them.
        lists: The lists of tasks that it belongs to: ``8``, ``14``, ``20``.
        note: What is worth knowing.
        revision: Revision of the repository to load, where the task names none.
        license: As the set's own page says.
        track: What the file names of one object's images have in common, in the first group of an expression; they are
            no independent examples. Used where all names of a split match it.
    """

    hub: str
    num_classes: int
    templates: tuple[str, ...] = _OBJECT
    config: str | None = None
    image: str = "image"
    label: str = "label"
    test_split: str = "test"
    classes: Sequence[str] | Mapping[str, str] | None = None
    label_order: bool = False
    lists: tuple[int, ...] = field(default=())
    note: str = ""
    revision: str | None = None
    license: str | None = None
    track: re.Pattern[str] | None = None

    def standardize(self, splits: Mapping[str, Any]) -> dict[str, Any]:
        """Rename the columns to ``image`` and ``label``, and the split to report on to ``test``."""
        found = dict(splits)
        for split, table in found.items():
            for column, name in ((self.image, "image"), (self.label, "label")):
                if column in table.column_names and name not in table.column_names:
                    found[split] = table = table.rename_column(column, name)
        if self.test_split in found:
            found["test"] = found[self.test_split]
        return found

    def name_classes(self, own: Sequence[str], name: str) -> list[str]:
        """Return the names to prompt with in the order of the labels.

        Args:
            own: The data's names in that order; none where labels are plain numbers.
            name: Of the task, for messages.

        Raises:
            ValueError: The data has other classes than this set.
        """
        if own and len(own) != self.num_classes:
            raise ValueError(
                f"{name} should have {self.num_classes} classes, but the data names {len(own)}: {some(own)}. For a "
                f"part of the set pass class_names, one name for each class in the order of the labels."
            )
        if all(str(label) == str(position) for position, label in enumerate(own)):
            own = []
        if self.classes is None:
            if not own:
                raise ValueError(
                    f"{name} takes its {self.num_classes} class names from the data, which names none. Pass "
                    f"class_names in the order of the labels."
                )
            return [_clean(label) for label in own]
        prompts = list(self.classes.values() if isinstance(self.classes, Mapping) else self.classes)
        if not own:
            return prompts
        of = {_key(prompt): prompt for prompt in prompts}
        if isinstance(self.classes, Mapping):
            of |= {_key(label): prompt for label, prompt in self.classes.items()}
        unknown = [label for label in own if _key(label) not in of]
        if not unknown and len({of[_key(label)] for label in own}) == len(own):
            return [of[_key(label)] for label in own]
        if self.label_order:
            moved = [label for label, prompt in zip(own, prompts, strict=True) if of.get(_key(label), prompt) != prompt]
            if not moved:
                return prompts
            unknown = moved
        raise ValueError(
            f"{name}: the data's classes {some(unknown)} are not this set's ({some(prompts)}). Pass class_names in "
            f"the order of the labels."
        )


def _key(name: str) -> str:
    return re.sub(r"[\W_]+", "", str(name).lower())


def _clean(name: str) -> str:
    """Return a class's name as it is in prompts.

    Example:
        >>> _clean("dense_residential"), _clean("a_abbey"), _clean("/b/bow_window/indoor")
        ('dense residential', 'abbey', 'bow window indoor')
    """
    name = re.sub(r"^/?([a-z])[/_](?=\1)", "", str(name))  # SUN397's folders by first letter
    return re.sub(r"[_/\s]+", " ", name).strip()


_8, _14, _20 = (8, 14, 20), (14, 20), (20,)

PRESETS: dict[str, Preset] = {
    "cars": Preset(
        "tanganke/stanford_cars",
        196,
        (
            *_OBJECT,
            "a photo of my {}.",
            "i love my {}!",
            *(f"a photo of my {kind} {{}}." for kind in ("dirty", "clean", "new", "old")),
        ),
        lists=_8,
    ),
    "dtd": Preset(
        "tanganke/dtd",
        47,
        _each(*(f"a photo of [a] {{}} {what}." for what in ("texture", "pattern", "thing", "object"))),
        lists=_8,
    ),
    "eurosat": Preset(
        "tanganke/eurosat",
        10,
        ("a centered satellite photo of {}.", *_each("a centered satellite photo of [a] {}.")),
        classes=known.EUROSAT,
        lists=_8,
        note="the paper has a validation part of its own; here it is held out",
    ),
    "gtsrb": Preset(
        "tanganke/gtsrb",
        43,
        tuple(f'a {kind} photo of a "{{}}" traffic sign.' for kind in ("zoomed in", "centered", "close up")),
        classes=known.GTSRB,
        label_order=True,
        lists=_8,
        track=re.compile(r"^(\d{5})_\d{5}\.\w+$"),  # 30 pictures of one sign, by class; of the training part
    ),
    "mnist": Preset("ylecun/mnist", 10, _NUMBER, classes=known.DIGITS, label_order=True, lists=_8),
    "resisc45": Preset(
        "tanganke/resisc45",
        45,
        tuple(f"{view} of {article}{{}}." for article in ("", "a ", "the ") for view in _VIEWS),
        lists=_8,
    ),
    "sun397": Preset("tanganke/sun397", 397, lists=_8),
    "svhn": Preset(
        "ufldl-stanford/svhn", 10, _NUMBER, config="cropped_digits", classes=known.DIGITS, label_order=True, lists=_8
    ),
    "stl10": Preset("tanganke/stl10", 10, lists=_14),
    "pets": Preset("timm/oxford-iiit-pet", 37, ("a photo of a {}, a type of pet.",), lists=_14),
    "flowers102": Preset(
        "dpdl-benchmark/oxford_flowers102",
        102,
        ("a photo of a {}, a type of flower.",),
        classes=known.FLOWERS,
        label_order=True,
        lists=_14,
    ),
    "cifar100": Preset("uoft-cs/cifar100", 100, _CIFAR, image="img", label="fine_label", lists=_14),
    "pcam": Preset(
        "1aurent/PatchCamelyon", 2, ("this is a photo of {}",), classes=known.PCAM, label_order=True, lists=_14
    ),
    "fer2013": Preset(
        "clip-benchmark/wds_fer2013",
        7,
        (
            "a photo of a {} looking face.",
            "a photo of a face showing the emotion: {}.",
            "a photo of a face looking {}.",
            "a face that looks {}.",
            "they look {}.",
            "look at how {} they are.",
        ),
        image="jpg",
        label="cls",
        classes=known.FER2013,
        lists=_14,
        note="labels in alphabetical order, not the publisher's",
    ),
    "cifar10": Preset("uoft-cs/cifar10", 10, _CIFAR, image="img", lists=_20),
    "food101": Preset("ethz/food101", 101, ("a photo of {}, a type of food.",), test_split="validation", lists=_20),
    "fashion_mnist": Preset("zalando-datasets/fashion_mnist", 10, classes=known.FASHION, label_order=True, lists=_20),
    "rendered_sst2": Preset(
        "nateraw/rendered-sst2",
        2,
        ("a {} review of a movie.",),
        classes=("negative", "positive"),
        label_order=True,
        lists=_20,
    ),
    "emnist": Preset(
        "tanganke/emnist_mnist",
        10,
        ('a photo of the digit character: "{}".',),
        classes=known.DIGITS,
        label_order=True,
        lists=_20,
        note="EMNIST's digits in the split called mnist; papers also use its digits and letters",
    ),
    "kmnist": Preset(
        "tanganke/kmnist", 10, ("a photo of the character {}.",), classes=known.KMNIST, label_order=True, lists=_20
    ),
    "imagenet": Preset(
        "ILSVRC/imagenet-1k",
        1000,
        (),
        test_split="validation",
        note="the control: CLIP's 80 templates and class names; access must be asked for on the hub",
    ),
}


def find_preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        ValueError: No data set has this name.
        TypeError: An installed package defines something else than a `Preset` under it.

    Example:
        >>> find_preset("mnist").hub
        'ylecun/mnist'
    """
    known = all_presets()
    if name not in known:
        raise ValueError(f"no preset is named {name!r}; the presets are {', '.join(known)}.{did_you_mean(name, known)}")
    preset = known[name]
    return preset if preset.templates else _with_imagenet_prompts(preset)


def all_presets() -> dict[str, Preset]:
    """Return the presets by name: those of this module, then those of installed packages.

    Raises:
        TypeError: An entry point of the group ``tva.data_sets`` is neither a `Preset` nor a class.
        ValueError: One has the name of a preset of this module.
    """
    found = dict(PRESETS)
    for name, point in installed(GROUP).items():
        value = point.load()
        if isinstance(value, type):  # a LightningDataModule, which is tva.data.NAME
            continue
        if not isinstance(value, Preset):
            raise TypeError(
                f"The entry point {name!r} in {GROUP} ({point.value}) must be a tva.data.presets.Preset or a "
                f"LightningDataModule class; found {type(value).__name__}."
            )
        if name in PRESETS:
            raise ValueError(f"The entry point {name!r} in {GROUP} ({point.value}) has a preset's name; rename it.")
        found[name] = value
    return found


def _with_imagenet_prompts(preset: Preset) -> Preset:
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    templates = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    # All copies number ImageNet's classes by WordNet's numbers, and hardly two name them alike.
    return replace(preset, templates=templates, classes=tuple(IMAGENET_CLASSNAMES), label_order=True)


def list_presets(size: int) -> list[str]:
    """Return the names of the tasks of a list of the literature: the paper's 8, or its successors' 14 or 20.

    Raises:
        ValueError: There is no list of this size.

    Example:
        >>> list_presets(8)
        ['cars', 'dtd', 'eurosat', 'gtsrb', 'mnist', 'resisc45', 'sun397', 'svhn']
    """
    if size not in (8, 14, 20):
        raise ValueError(f"the lists of tasks are of 8, 14 and 20; found {size!r}.")
    return [name for name, preset in PRESETS.items() if size in preset.lists]

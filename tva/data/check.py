"""Check a copy of a named data set: its splits, columns, classes and sizes, and what training and test share."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from tva.data.loading import load_splits
from tva.data.presets import Preset, all_presets, find_preset
from tva.data.text_presets import TEXT_PRESETS, TextPreset
from tva.errors import did_you_mean, some

# Examples to train on, what is held out for validation among them, and to test on, in the splits of the literature:
# Wang et al., arXiv 2405.07813, and Ilharco et al., ICLR 2023.
EXAMPLES: dict[str, tuple[int, int]] = {
    "cars": (8_144, 8_041),
    "dtd": (3_760, 1_880),
    "eurosat": (21_600, 2_700),
    "gtsrb": (26_640, 12_630),
    "mnist": (60_000, 10_000),
    "resisc45": (18_900, 6_300),
    "sun397": (19_850, 19_850),
    "svhn": (73_257, 26_032),
}
KNOWN = {
    "dtd": "Published DTD accuracies of about 98% for single fine-tuned models come from a copy whose training part "
    "holds test images; without them it is about 79% (ViT-B/32) to 84% (ViT-L/14)."
}


@dataclass(frozen=True)
class DataCheck:
    """Result of checking a copy.

    Attributes:
        name: The preset's name.
        path: The copy.
        examples: Split to number of examples.
        problems: What is missing or wrong.
        notes: What is worth knowing.
        shared: Test examples whose image or text is in the training split too; None where that could not be seen.
        what: ``image`` or ``text``.
    """

    name: str
    path: str
    examples: Mapping[str, int]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shared: int | None = None
    what: str = "image"


def check_data(name: str, path: str) -> DataCheck:
    """Compare a copy of a data set with what the paper's code used.

    Images are compared by their stored bytes, so that a copy that was encoded again is not recognized.

    Args:
        name: A preset's name.
        path: The copy: a folder or file, as ``local`` of `tva.data.ImageTask`.

    Raises:
        ValueError: No preset has this name, or the copy is not a data set.
        FileNotFoundError: The path does not exist.
    """
    texts = TEXT_PRESETS.get(name)
    if texts is None and name not in all_presets():
        known = [*all_presets(), *TEXT_PRESETS]
        raise ValueError(f"no preset is named {name!r}; the presets are {', '.join(known)}.{did_you_mean(name, known)}")
    if "{split}" not in path and not Path(path).exists():
        raise FileNotFoundError(f"A copy of {name} was expected at {path}, but nothing is there.")
    if texts is not None:
        return _check_texts(name, path, texts, load_splits(path))
    preset = find_preset(name)
    splits = preset.standardize(load_splits(path, folder="imagefolder"))
    examples = {split: len(table) for split, table in splits.items()}
    found = DataCheck(name, path, examples, notes=[KNOWN[name]] if name in KNOWN else [])
    wanted = EXAMPLES.get(name)
    for split, position in (("train", 0), ("test", 1)):
        if split not in splits:
            found.problems.append(f"there is no split {split!r}; the splits are {some(splits, 8)}")
            continue
        missing = [column for column in ("image", "label") if column not in splits[split].column_names]
        if missing:
            found.problems.append(
                f"{split} lacks {some(missing)}; its columns are {some(splits[split].column_names, 9)}"
            )
        if wanted is None:
            continue
        count = examples[split] + (examples.get("val", examples.get("validation", 0)) if split == "train" else 0)
        if count != wanted[position]:
            found.problems.append(f"{split} has {count:,} examples, where the paper's code has {wanted[position]:,}")
    if not found.problems:
        found.problems.extend(_classes(preset, splits["test"], name))
    if wanted is None:
        found.notes.append(f"how many examples {name} must have is not known here")
    return _with_shared(found, splits)


def _check_texts(name: str, path: str, preset: TextPreset, splits: Mapping[str, Any]) -> DataCheck:
    examples = {split: len(table) for split, table in splits.items()}
    notes = [f"licence, as its page says: {preset.license}", *([preset.note] if preset.note else [])]
    found = DataCheck(name, path, examples, notes=notes, what="text")
    for split, count in preset.examples.items():
        if split not in splits:
            found.problems.append(f"there is no split {split!r}; the splits are {some(splits, 8)}")
            continue
        columns = [*preset.columns, *(["label"] if preset.classes else [])]
        if missing := [column for column in columns if column not in splits[split].column_names]:
            found.problems.append(
                f"{split} lacks {some(missing)}; its columns are {some(splits[split].column_names, 9)}"
            )
        if examples[split] != count:
            found.problems.append(f"{split} has {examples[split]:,} examples, where the hub's has {count:,}")
    if found.problems:
        return found
    test = splits[preset.test_split]
    labels = set(test.unique("label")) if preset.classes else set()
    if labels - set(range(len(preset.classes))):
        found.problems.append(f"labels must be in 0 … {len(preset.classes) - 1}; found {some(sorted(labels), 8)}")
    rows = [
        [xxhash.xxh3_128_hexdigest(repr(row).encode()) for row in zip(*(table[c] for c in preset.columns), strict=True)]
        for table in (splits["train"], test)
    ]
    shared = len(set(rows[0]) & set(rows[1]))
    if shared:
        found.notes.append(f"{shared:,} different test texts are in the training split too")
    return replace(found, shared=shared)


def _classes(preset: Preset, table: Any, name: str) -> list[str]:
    own = getattr(table.features["label"], "names", None) or []
    labels = set(table.unique("label"))
    if len(labels) > preset.num_classes:
        return [f"the labels are of {len(labels)} classes, where {name} has {preset.num_classes}"]
    try:
        preset.name_classes(own, name)
    except ValueError as error:
        return [str(error)]
    return []


def _with_shared(found: DataCheck, splits: Mapping[str, Any]) -> DataCheck:
    """Count test images that are in the training split, where both have images."""
    tables = [splits.get(split) for split in ("train", "test")]
    if any(table is None or "image" not in table.column_names for table in tables):
        return found
    train, test = set(_digests(tables[0])), _digests(tables[1])
    shared = sum(digest in train for digest in test)
    problems = list(found.problems)
    if shared:
        problems.append(
            f"{shared:,} of {len(test):,} test images are in the training split too: test numbers are too good"
        )
    return DataCheck(found.name, found.path, found.examples, problems, found.notes, shared)


def _digests(table: Any) -> list[str]:
    import datasets

    stored = table.cast_column("image", datasets.Image(decode=False)).select_columns(["image"])
    digests = []
    for row in stored:
        image = row["image"]
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        digests.append(xxhash.xxh3_128_hexdigest(content))
    return digests

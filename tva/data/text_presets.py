"""Text sets that have a name: those of the paper's experiments with language models.

They are read from the Hugging Face hub as it has them now: no revision is pinned unless the task names one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tva.errors import did_you_mean


@dataclass(frozen=True)
class TextPreset:
    """One named set of texts.

    Attributes:
        hub: Its repository on the Hugging Face hub.
        examples: Rows by split.
        columns: Its columns of texts.
        license: As its page on the hub says.
        config: Configuration of the repository.
        classes: Names of the values of its column ``label``, in order.
        test_split: Labeled split to report on.
        note: What is worth knowing.
    """

    hub: str
    examples: Mapping[str, int]
    columns: tuple[str, ...]
    license: str
    config: str | None = None
    classes: tuple[str, ...] = ()
    test_split: str = "test"
    note: str = ""

    def standardize(self, splits: Mapping[str, Any]) -> dict[str, Any]:
        """Name the split to report on ``test``, and the classes where the data only number them."""
        import datasets

        found = dict(splits)
        if self.test_split in found:
            found["test"] = found[self.test_split]
        for split, table in found.items():
            features = table.features or {}
            own = getattr(features.get("label"), "names", None)
            if self.classes and own is not None and all(name.isdecimal() for name in own):
                names = datasets.ClassLabel(names=list(self.classes))
                found[split] = table.cast(datasets.Features({**features, "label": names}))
        return found


_GLUE = {"license": "other (by task)", "test_split": "validation", "note": "the test part has no labels"}
_PAIR = ("sentence1", "sentence2")
_SENTIMENT = ("negative", "positive")

TEXT_PRESETS: dict[str, TextPreset] = {
    "mrpc": TextPreset(
        "nyu-mll/glue",
        {"train": 3_668, "validation": 408, "test": 1_725},
        _PAIR,
        config="mrpc",
        classes=("not_equivalent", "equivalent"),
        **_GLUE,
    ),
    "rte": TextPreset(
        "nyu-mll/glue",
        {"train": 2_490, "validation": 277, "test": 3_000},
        _PAIR,
        config="rte",
        classes=("entailment", "not_entailment"),
        **_GLUE,
    ),
    "cola": TextPreset(
        "nyu-mll/glue",
        {"train": 8_551, "validation": 1_043, "test": 1_063},
        ("sentence",),
        config="cola",
        classes=("unacceptable", "acceptable"),
        **_GLUE,
    ),
    "sst2": TextPreset(
        "nyu-mll/glue",
        {"train": 67_349, "validation": 872, "test": 1_821},
        ("sentence",),
        config="sst2",
        classes=_SENTIMENT,
        **_GLUE,
    ),
    "civil_comments": TextPreset(
        "google/civil_comments",
        {"train": 1_804_874, "validation": 97_320, "test": 97_320},
        ("text",),
        "CC0 1.0",
        note="scores in [0, 1] in toxicity and six other columns; the paper trains on those above 0.8",
    ),
    "wikitext103": TextPreset(
        "Salesforce/wikitext",
        {"train": 1_801_350, "validation": 3_760, "test": 4_358},
        ("text",),
        "CC BY-SA 3.0 and GFDL",
        config="wikitext-103-raw-v1",
        note="rows are lines",
    ),
    "yelp_polarity": TextPreset(
        "fancyzhx/yelp_polarity", {"train": 560_000, "test": 38_000}, ("text",), "Yelp's own terms", classes=_SENTIMENT
    ),
    "amazon_polarity": TextPreset(
        "fancyzhx/amazon_polarity",
        {"train": 3_600_000, "test": 400_000},
        ("title", "content"),
        "Apache 2.0",
        classes=_SENTIMENT,
    ),
}


def find_text_preset(name: str) -> TextPreset:
    """Return a set of texts by name.

    Raises:
        ValueError: None has this name.

    Example:
        >>> find_text_preset("sst2").hub
        'nyu-mll/glue'
    """
    if name not in TEXT_PRESETS:
        raise ValueError(
            f"no preset of texts is named {name!r}; there are {', '.join(TEXT_PRESETS)}."
            f"{did_you_mean(name, TEXT_PRESETS)}"
        )
    return TEXT_PRESETS[name]

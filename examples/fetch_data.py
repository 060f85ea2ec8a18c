"""Text data for the configurations in configs/: fetch public sets from the Hugging Face Hub and write them to data/.

    python examples/fetch_data.py trec6 ag_news

Column names and class names are those that the configurations use.
"""

import argparse
import gzip
from pathlib import Path

import datasets

PARQUET = "refs/convert/parquet"  # the hub's own copy of a set that was published with a script
NAMES = {
    "trec6": ["abbreviation", "entity", "description", "human", "location", "number"],
    "ag_news": ["world", "sports", "business", "science and technology"],
    "toxicity": ["hate speech", "offensive language", "neither"],
    "sentence_polarity": ["negative", "positive"],
}
SETS = {  # repository, revision, subset, columns of text and label
    "trec6": ("CogComp/trec", PARQUET, None, "text", "coarse_label"),
    "ag_news": ("fancyzhx/ag_news", None, None, "text", "label"),
    "toxicity": ("tdavidson/hate_speech_offensive", None, None, "tweet", "class"),
    "sentence_polarity": ("cornell-movie-review-data/rotten_tomatoes", None, None, "text", "label"),
    "wikitext2": ("Salesforce/wikitext", None, "wikitext-2-raw-v1", "text", None),
}


def fetch(name: str, folder: Path) -> list[Path]:
    """Write the train and test parts of a set; return the files."""
    repository, revision, subset, text, label = SETS[name]
    parts = datasets.load_dataset(repository, subset, revision=revision)
    if "test" not in parts:  # hold out every tenth row
        rows = range(len(parts["train"]))
        parts = {
            "train": parts["train"].select([row for row in rows if row % 10]),
            "test": parts["train"].select([row for row in rows if not row % 10]),
        }
    files = []
    for split in ("train", "test"):
        if label is None:
            files.append(folder / f"{name}-{split}.txt.gz")
            with gzip.open(files[-1], "wt", encoding="utf-8") as file:
                file.write("".join(parts[split][text]))
            continue
        files.append(folder / f"{name}-{split}.parquet")
        table = {"text": list(parts[split][text]), "label": [int(value) for value in parts[split][label]]}
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES[name])}
        )
        datasets.Dataset.from_dict(table, features=features).to_parquet(files[-1])
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="+", choices=sorted(SETS))
    parser.add_argument("--folder", type=Path, default=Path("data"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        for file in fetch(name, options.folder):
            print(f"wrote {file}")


if __name__ == "__main__":
    main()

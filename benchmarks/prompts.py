"""Write beginnings that language models continue, for the experiments of `tva paper` on tweets and on plays.

    python -m benchmarks.prompts DATA

Of DATA/text/toxicity-test.parquet the first eight words of offensive tweets, without names, links and entities; of
DATA/text/shakespeare.txt.gz the first lines of speeches in its last tenth. Nine tenths of it become the training text
DATA/text/plays-train.txt.gz, and the rest plays-test.txt.gz.
"""

import gzip
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

NOISE = re.compile(r"&#\d+;|&\w+;|\bRT\b|@\w+:?|http\S+|\"|#")
NUM_VAL, NUM_TEST = 48, 160


def tweets(texts: Sequence[str], labels: Sequence[int]) -> list[str]:
    """Return the first eight words of those that are offensive (labels 0 and 1) and have twelve words."""
    words = [NOISE.sub(" ", text).split() for text, label in zip(texts, labels, strict=True) if label in (0, 1)]
    return [" ".join(row[:8]) for row in words if len(row) >= 12]


def speeches(text: str) -> list[str]:
    """Return speakers with their first lines, of speeches of two lines at least."""
    blocks = [block.strip().splitlines() for block in text.split("\n\n")]
    return [f"{b[0]} {b[1]}" for b in blocks if len(b) >= 3 and b[0].endswith(":") and len(b[1]) > 20]


def main(root: Path) -> None:
    """Write prompts and plays into a data root."""
    (root / "prompts").mkdir(exist_ok=True)
    table = pq.read_table(root / "text/toxicity-test.parquet")
    play = gzip.decompress((root / "text/shakespeare.txt.gz").read_bytes()).decode()
    cut = int(0.9 * len(play))
    found = {"tweets": tweets(table["text"].to_pylist(), table["label"].to_pylist()), "speeches": speeches(play[cut:])}
    for name, prompts in found.items():
        prompts = list(dict.fromkeys(prompts))
        random.Random(0).shuffle(prompts)
        parts = {"val": prompts[:NUM_VAL], "test": prompts[NUM_VAL : NUM_VAL + NUM_TEST]}
        for split, part in parts.items():
            (root / f"prompts/{name}-{split}.txt").write_text("\n".join(part) + "\n")
    for split, part in {"train": play[:cut], "test": play[cut:]}.items():
        (root / f"text/plays-{split}.txt.gz").write_bytes(gzip.compress(part.encode(), mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

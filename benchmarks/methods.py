"""Compare every merge method on four real tasks: normalized accuracy on test data, λ chosen on validation data.

    python benchmarks/methods.py DATA [--models images texts] [--seeds 0 1 2] [--output runs/methods] [--table]

DATA is the folder with ``images``, ``text`` and ``unpack.py``. Vectors, statistics and every single evaluation are kept
under OUTPUT, so that a run that was cut off goes on where it was. ``--table`` prints the tables of what is there.

images: EfficientNet-Lite0 with BatchNorm folded, fine-tuned by ``tva fit`` as in ``benchmarks/real``. texts: MiniLM
under frozen heads of class descriptions, fine-tuned by a bare loop. The seed decides the order of training, the
examples that are held out and the subsets drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from ledger import holm
from real.run import Benchmark, merged, read, rows, spread
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from tva import TaskVector, save_weights
from tva.compose.recipe import Recipe
from tva.merge.model_statistics import measure_information

NUM_INFORMATION = 256  # training examples for the statistics files
GRID = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)  # times a method's own scale


@dataclass(frozen=True)
class Setting:
    """What a recipe is written from.

    Attributes:
        tasks: Names of the vectors.
        matrix: Option of methods on matrices, for a network whose matrices are convolutions.
        files: Gives the statistics files of a kind, as an option.
        x: The number that is tuned.
        task: Place of the task whose own model is wanted, from 1.
    """

    tasks: Sequence[str]
    matrix: str
    files: Callable[[str], str]
    x: float
    task: int = 0

    @property
    def all(self) -> str:
        return ", ".join(self.tasks)

    @property
    def sum(self) -> str:
        return self.each("{}")

    def each(self, call: str, joint: str = " + ") -> str:
        return joint.join(call.format(task) for task in self.tasks)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: What is shown.
        recipe: Writes the recipe.
        scale: Multiplies the grid of the tuned number; 0 if nothing is tuned.
        kind: Whether one model serves all tasks, every task has its own, or every pair of tasks.
        inside: Whether the tuned number stands in the recipe; it is λ otherwise.
    """

    name: str
    recipe: Callable[[Setting], str]
    scale: float = 1.0
    kind: Literal["all", "task", "pair"] = "all"
    inside: bool = False


ROWS = [
    Row("sum", lambda s: s.sum),
    Row("mean, λ = 1", lambda s: f"mean({s.all})", 0),
    Row("magnitude, density=0.2", lambda s: s.each("magnitude({}, density=0.2)")),
    Row("breadcrumbs", lambda s: s.each("breadcrumbs({})"), 2),
    Row("breadcrumbs, rows=True", lambda s: s.each("breadcrumbs({}, top=0.1, bottom=0.7, rows=True)"), 2),
    Row("dare", lambda s: s.each("dare({})")),
    Row("dare, drop=0.5", lambda s: s.each("dare({}, drop=0.5)")),
    Row("ties", lambda s: f"ties({s.all})", 4),
    Row("ties, trim=tensor", lambda s: f'ties({s.all}, trim="tensor")', 4),
    Row("ties of dare, drop=0.5", lambda s: f"ties({s.each('dare({}, drop=0.5)', ', ')}, density=1.0)", 4),
    Row("sign_consensus", lambda s: f"sign_consensus({s.all})", 4),
    Row("consensus", lambda s: f"consensus({s.all})"),
    Row("pcb", lambda s: f"pcb({s.all})", 4),
    Row("pcb, between=raw", lambda s: f'pcb({s.all}, between="raw", clamp=0.0001)', 4),
    Row("lines of the sum", lambda s: f"lines({s.sum}, first=0.25, last={0.25 + s.x:.4g})", inside=True),
    Row("emr, one model", lambda s: f"emr({s.all})"),
    Row("emr, task known", lambda s: f"emr({s.all}, task={s.task})", 0, "task"),
    Row("tall, task known", lambda s: f"tall({s.all}, task={s.task})", 0, "task"),
    Row("tsv", lambda s: f"tsv({s.all}{s.matrix})", 2),
    Row("iso_c", lambda s: f"iso_c({s.all}{s.matrix})", 2),
    Row("iso_cts", lambda s: f"iso_cts({s.all}{s.matrix})", 2),
    Row("wudi", lambda s: f"wudi({s.all}{s.matrix})"),
    *(
        Row(f"wudi, filtered at {time}", lambda s, time=time: f'wudi({s.all}, solve="filtered", time={time}{s.matrix})')
        for time in (10, 50, 250)
    ),
    Row(
        "wudi, filtered at 50, participation",
        lambda s: f'wudi({s.all}, solve="filtered", time=50, rank="participation"{s.matrix})',
    ),
    Row("wudi, solve=exact", lambda s: f'wudi({s.all}, solve="exact"{s.matrix})'),
    Row("fisher", lambda s: f"fisher({s.all}, files={s.files('fisher')})", 4),
    Row("fisher, normalize=True", lambda s: f"fisher({s.all}, files={s.files('fisher')}, normalize=True)", 4),
    Row("regmean", lambda s: f"regmean({s.all}, files={s.files('gram')}{s.matrix}{EXCLUDE[bool(s.matrix)]})", 4),
    Row("slerp of pairs", lambda s: f"slerp({s.all})", 2, "pair"),
    Row("sum of pairs", lambda s: s.sum, 1, "pair"),
]
EXCLUDE = {True: ', exclude="conv_dw|conv_stem"', False: ""}  # convolutions whose inputs have no Gram matrix


class Model(ABC):
    """A base, four tasks, and what is kept of them under one folder for each seed.

    Args:
        data: The folder of data.
        output: Where everything is kept.
    """

    name: str
    tasks: tuple[str, ...]
    num_val: int  # examples a task, at most
    num_test: int
    matrix = ""

    def __init__(self, data: Path, output: Path) -> None:
        self.data, self.output = data, output / self.name

    @abstractmethod
    def fit(self, seed: int) -> None:
        """Fine-tune on every task whose vector is not there."""

    @abstractmethod
    def vector_path(self, task: str, seed: int) -> Path: ...

    @abstractmethod
    def open(self, seed: int) -> None:
        """Load the base into ``self.module``, its weights into ``self.base``, and read the examples."""

    @abstractmethod
    def logits(self, task: str, examples: Any) -> Tensor:
        """Classify examples of a task with the module as it is."""

    @abstractmethod
    def batches(self, task: str, split: str) -> list[tuple[Any, Tensor]]:
        """Examples and labels; of the split ``information`` one at a time."""

    module: nn.Module
    base: dict[str, Tensor]

    # --- what all models share

    def prepare(self, seed: int) -> None:
        self.fit(seed)
        self.open(seed)
        self.vectors = {task: TaskVector.load(self.vector_path(task, seed)) for task in self.tasks}
        self.weights = dict(self.module.state_dict(keep_vars=False))
        self.folder = self.output / "evaluations" / f"seed={seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.made = "", TaskVector({})
        self.kept: dict[str, float] = {}
        journal = self.folder / "evaluations.jsonl"
        if journal.exists():
            lines = journal.read_text().splitlines()
            self.kept = {json.dumps(line[:-1]): line[-1] for line in map(json.loads, filter(_whole, lines))}

    def edit(self, vector: TaskVector, coef: float) -> None:
        """Set the module's weights to those of an edit."""
        self.module.load_state_dict(self.base)
        vector.write_into(self.weights, self.base, coef)

    @torch.inference_mode()
    def accuracy(self, task: str, split: str) -> float:
        right = total = 0
        for examples, labels in self.batches(task, split):
            right += int((self.logits(task, examples).argmax(dim=-1) == labels).sum())
            total += len(labels)
        return right / total

    def evaluate(self, recipe: str, coef: float, task: str, split: str) -> float:
        """Return the accuracy of an edit, from the journal if it is there."""
        key = [recipe, coef, task, split]
        if json.dumps(key) not in self.kept:
            if recipe != self.made[0]:  # the whole grid uses the last one
                self.made = recipe, Recipe(recipe, self.vectors).evaluate(self.vectors)
            self.edit(self.made[1], coef)
            self.kept[json.dumps(key)] = value = self.accuracy(task, split)
            with (self.folder / "evaluations.jsonl").open("a") as journal:
                journal.write(json.dumps([*key, value]) + "\n")
        return self.kept[json.dumps(key)]

    def alone(self, task: str, split: str) -> float:
        """Accuracy of the task's own fine-tuned model."""
        return self.evaluate(task, 1.0, task, split)

    def information(self, kind: str) -> list[str]:
        """Return the statistics files of all tasks, in their order, made where they are missing."""
        paths = []
        for task in self.tasks:
            path = self.folder / f"{task}.{kind}.safetensors"
            if not path.exists():
                self.edit(self.vectors[task], 1.0)
                found = measure_information(
                    self.module,
                    self.batches(task, "information"),
                    lambda batch, task=task: F.cross_entropy(self.logits(task, batch[0]), batch[1]),
                    NUM_INFORMATION,
                    conv=bool(self.matrix),
                )
                save_weights(found.fisher, self.folder / f"{task}.fisher.safetensors")
                save_weights(found.grams, self.folder / f"{task}.gram.safetensors")
            paths.append(str(path))
        return paths


def _whole(line: str) -> bool:
    return line.startswith("[") and line.endswith("]")


# --- EfficientNet-Lite0 on images


class Images(Model):
    """EfficientNet-Lite0, by the protocol of ``benchmarks/real``."""

    name = "images"
    tasks = ("mnist", "gtsrb10", "rsscn7", "cifar10")
    num_val, num_test = 250, 600
    matrix = ', conv="matrix"'  # most of its weights are convolutions of 1 × 1

    def __init__(self, data: Path, output: Path) -> None:
        super().__init__(data, output)
        self.real = Benchmark(data.absolute(), self.output)

    def fit(self, seed: int) -> None:
        for task in self.tasks:
            self.real.fit(task, seed)

    def vector_path(self, task: str, seed: int) -> Path:
        return self.output / "fold" / task / f"seed={seed}" / "checkpoints" / "last.tv.safetensors"

    def open(self, seed: int) -> None:
        from tva.data import ImageTask
        from tva.models.vision import load_encoder

        weights = str(self.output / "models" / "efficientnet-lite0.safetensors")
        encoder, transform = load_encoder("tf_efficientnet_lite0", weights, 64, "fold")
        self.module = nn.Module()
        self.module.encoder = encoder  # the names that `tva fit` has
        self.base = {name: value.clone() for name, value in self.module.state_dict().items()}
        self.examples: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
        self.heads = {}
        for task in self.tasks:
            config = self.real.adapt(merged(read("fit/common"), read(f"fit/{task}")), seed, "fold")
            options = config["data"]["init_args"] | {
                "limit_val": self.num_val,
                "limit_test": self.num_test,
                "batch_size": 50,
            }
            loaded = ImageTask(**options)
            loaded.trainer = SimpleNamespace(lightning_module=SimpleNamespace(image_transform=transform))
            loaded.setup()
            train = list(loaded.prototype_dataloader())
            with torch.inference_mode():
                features = torch.cat([F.normalize(encoder(_fast(images)), dim=-1) for images, _ in train])
            labels = torch.cat([labels for _, labels in train])
            sums = torch.zeros(len(loaded.class_names), features.shape[1], dtype=torch.float64)
            self.heads[task] = F.normalize(sums.index_add_(0, labels, features.double()), dim=-1).float() * 20
            self.examples[task, "val"] = [(_fast(x), labels) for x, labels in loaded.val_dataloader()]
            self.examples[task, "test"] = [(_fast(x), labels) for x, labels in loaded.test_dataloader()]
            images = torch.cat([images for images, _ in train])
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:NUM_INFORMATION]
            self.examples[task, "information"] = [(_fast(images[i : i + 1]), labels[i : i + 1]) for i in order.tolist()]

    def batches(self, task: str, split: str) -> list[tuple[Tensor, Tensor]]:
        return self.examples[task, split]

    def logits(self, task: str, examples: Tensor) -> Tensor:
        return F.normalize(self.module.encoder(examples), dim=-1) @ self.heads[task].T


def _fast(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


# --- MiniLM on texts


class Texts(Model):
    """MiniLM with mean pooling under frozen heads: the base's embeddings of class descriptions."""

    name = "texts"
    tasks = ("sentence_polarity", "ag_news", "subjectivity", "trec6")
    descriptions: Mapping[str, Sequence[str]] = {
        "sentence_polarity": ("a negative movie review", "a positive movie review"),
        "ag_news": (
            "news about world politics",
            "news about sports",
            "news about business and the economy",
            "news about science and technology",
        ),
        "subjectivity": ("the plot summary of a movie", "a critic's opinion of a movie"),
        "trec6": (
            "a question about an abbreviation",
            "a question about a thing, an animal or a product",
            "a question about a definition, a reason or a description",
            "a question about a person or a group of people",
            "a question about a place, a city or a country",
            "a question about a number, a date or an amount",
        ),
    }
    num_train, num_val, num_test = 600, 100, 300  # a tenth as fast as the images

    def vector_path(self, task: str, seed: int) -> Path:
        return self.output / "vectors" / f"{task}-seed={seed}.tv.safetensors"

    def open(self, seed: int) -> None:
        import datasets
        from transformers import AutoTokenizer, BertModel

        folder = self.output / "models"
        if not folder.exists():
            import subprocess
            import sys

            subprocess.run([sys.executable, self.data / "unpack.py", folder], check=True)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "minilm-l6")
        self.module = BertModel.from_pretrained(folder / "minilm-l6", add_pooling_layer=False).eval()
        self.base = {name: value.clone() for name, value in self.module.state_dict().items()}
        self.examples: dict[tuple[str, str], list[tuple[Any, Tensor]]] = {}
        with torch.no_grad():
            self.heads = {task: self.embed(self.tokenize(texts)) * 20 for task, texts in self.descriptions.items()}
        for task in self.tasks:
            files = {split: str(self.data / "text" / f"{task}-{split}.parquet") for split in ("train", "test")}
            table = datasets.load_dataset("parquet", data_files=files)
            draw = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(table["train"]), generator=draw).tolist()
            test = torch.randperm(len(table["test"]), generator=draw).tolist()[: self.num_test]
            parts = {
                "val": ("train", order[: self.num_val], 50),
                "train": ("train", order[self.num_val : self.num_val + self.num_train], 16),
                "information": ("train", order[self.num_val : self.num_val + NUM_INFORMATION], 1),
                "test": ("test", test, 50),
            }
            for part, (split, chosen, size) in parts.items():
                chosen_rows = table[split].select(chosen)
                texts, labels = list(chosen_rows["text"]), torch.tensor(list(chosen_rows["label"]))
                if size == 50:  # texts of like length together: less padding
                    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
                    texts, labels = [texts[i] for i in by_length], labels[by_length]
                self.examples[task, part] = [
                    (self.tokenize(texts[start : start + size]), labels[start : start + size])
                    for start in range(0, len(texts), size)
                ]

    def tokenize(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        return self.tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")

    def embed(self, tokens: Mapping[str, Tensor]) -> Tensor:
        hidden = self.module(**tokens).last_hidden_state  # (batch, tokens, features)
        mask = tokens["attention_mask"][..., None].float()
        return F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)

    def logits(self, task: str, examples: Mapping[str, Tensor]) -> Tensor:
        return self.embed(examples) @ self.heads[task].T

    def batches(self, task: str, split: str) -> list[tuple[Any, Tensor]]:
        return self.examples[task, split]

    def fit(self, seed: int) -> None:
        if all(self.vector_path(task, seed).exists() for task in self.tasks):
            return
        self.open(seed)
        for task in self.tasks:
            if self.vector_path(task, seed).exists():
                continue
            started = time.monotonic()
            torch.manual_seed(seed)
            self.module.load_state_dict(self.base)
            self.module.train()
            epochs, batches = 2, self.examples[task, "train"]
            optimizer = torch.optim.AdamW(self.module.parameters(), lr=5e-5)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * len(batches))
            for _ in range(epochs):
                for index in torch.randperm(len(batches)).tolist():
                    examples, labels = batches[index]
                    optimizer.zero_grad()
                    F.cross_entropy(self.logits(task, examples), labels).backward()
                    nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
            path = self.vector_path(task, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            TaskVector.between(self.base, self.module.state_dict()).save(path)
            print(f"texts seed {seed}: {task} fine-tuned, {time.monotonic() - started:.0f} s", flush=True)
        self.module.eval()


MODELS: dict[str, type[Model]] = {"images": Images, "texts": Texts}


# --- the methods


def recipes(row: Row, model: Model, x: float) -> list[tuple[str, Sequence[str]]]:
    """Return the recipes of a row, and the tasks that each is evaluated on."""
    setting = Setting(model.tasks, model.matrix, lambda kind: repr(tuple(model.information(kind))), x)
    if row.kind == "task":
        return [(row.recipe(replace(setting, task=place)), [task]) for place, task in enumerate(model.tasks, 1)]
    if row.kind == "pair":
        first, second, third, fourth = model.tasks
        return [(row.recipe(replace(setting, tasks=pair)), pair) for pair in ((first, fourth), (second, third))]
    return [(row.recipe(setting), model.tasks)]


def normalized(row: Row, model: Model, x: float, split: str) -> dict[str, float]:
    """Return the normalized accuracy of every task for one value of the tuned number."""
    coef = 1.0 if row.inside or not row.scale else x
    return {
        task: model.evaluate(text, coef, task, split) / model.alone(task, split)
        for text, tasks in recipes(row, model, x)
        for task in tasks
    }


def run_row(row: Row, model: Model) -> dict[str, Any]:
    """Choose on validation data, beyond the grid while its end is the best, and report on test data."""
    if not row.scale:
        return {"best": None, **normalized(row, model, 1.0, "test")}
    scores: dict[float, float] = {}

    def score(x: float) -> None:
        scores[x] = statistics.fmean(normalized(row, model, x, "val").values())

    for x in GRID:
        score(round(row.scale * x, 4))
    for _ in range(4):
        best = max(scores, key=scores.__getitem__)
        if best not in (min(scores), max(scores)):
            break
        score(round(best * 1.4 if best == max(scores) else best / 1.4, 4))
    best = max(scores, key=scores.__getitem__)
    edge = best in (min(scores), max(scores))
    return {"best": best, "edge": edge, **normalized(row, model, best, "test")}


def run_seed(model: Model, seed: int) -> None:
    model.prepare(seed)
    results = {}
    for task in model.tasks:
        base = model.evaluate(task, 0.0, task, "test")
        results.setdefault("base", {})[task] = base / model.alone(task, "test")
        results.setdefault("accuracy", {})[task] = [base, model.alone(task, "test")]
    for row in ROWS:
        started = time.monotonic()
        results[row.name] = found = run_row(row, model)
        mean = statistics.fmean(found[task] for task in model.tasks)
        print(f"{model.name} seed {seed}: {row.name:24} {mean:.3f} at {found['best']} "
              f"{time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
        (model.folder / "results.json").write_text(json.dumps(results, indent=1))


def table(model: Model, seeds: Sequence[int]) -> str:
    """Make the tables of a model, mean and range over seeds, best first: rows with a tuned number, and those without.

    Rows that tune nothing, or know the task, answer other questions than those that tune one number on validation
    data. Each tuned row is compared with the sum by Student's paired t over seeds, with Holm's correction for all.
    """
    files = [model.output / "evaluations" / f"seed={seed}" / "results.json" for seed in seeds]
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    if not results:
        return f"{model.name}: nothing yet"
    names = [name for name in ["base", *(row.name for row in ROWS)] if any(name in result for result in results)]
    tuned = {row.name for row in ROWS if row.scale}
    p_values = against(model, results, [name for name in names if name in tuned], "sum")
    text = ""
    for title, chosen in (("tuned", True), ("untuned, or knowing the task", False)):
        lines = [line_of(model, results, name) for name in names if (name in tuned) is chosen]
        lines.sort(key=lambda line: -line[0])
        header = [
            "method",
            "mean",
            "worst task",
            *model.tasks,
            "tuned",
            *(["p against the sum, Holm"] if chosen else []),
        ]
        columns = [[*line, *([p_values.get(line[0], "")] if chosen else [])] for _, line in lines]
        text += f"{title}\n\n" + "\n".join(rows(header, columns)) + "\n\n"
    for position, label in ((0, "base"), (1, "fine-tuned")):
        values = {task: spread([r["accuracy"][task][position] for r in results]) for task in model.tasks}
        text += f"{label}: " + ", ".join(f"{task} {value}" for task, value in values.items()) + "\n"
    return f"{model.name}, {len(results)} seeds\n\n{text}"


def line_of(model: Model, results: Sequence[Mapping[str, Any]], name: str) -> tuple[float, list[str]]:
    """Return a row's mean, and its cells; * marks a tuned number at the end of what was tried."""
    found = [result[name] for result in results if name in result]
    means = [statistics.fmean(result[task] for task in model.tasks) for result in found]
    best = spread([result["best"] for result in found if result.get("best")], 2)
    edge = " *" if any(result.get("edge") for result in found) else ""
    worst = spread([min(result[task] for task in model.tasks) for result in found])
    by_task = [f"{statistics.fmean(result[task] for result in found):.3f}" for task in model.tasks]
    return statistics.fmean(means), [name, spread(means), worst, *by_task, best + edge]


def against(model: Model, results: Sequence[Mapping[str, Any]], names: Sequence[str], reference: str) -> dict[str, str]:
    """Return the corrected p-values of rows against one of them, paired by seed; none for fewer than three seeds."""
    differences = {}
    for name in names:
        both = [result for result in results if name in result and reference in result]
        change = [statistics.fmean(result[name][t] - result[reference][t] for t in model.tasks) for result in both]
        if name != reference and len(change) > 2 and statistics.stdev(change) > 0:
            differences[name] = change
    p_values = holm([float(stats.ttest_1samp(change, 0.0).pvalue) for change in differences.values()])
    return {name: f"{p_value:.2g}" for name, p_value in zip(differences, p_values, strict=True)}


def main() -> None:
    """Run what is not there yet, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/methods"))
    parser.add_argument("--fit", action="store_true", help="fine-tune and no more")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there, and compute nothing")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    started = time.monotonic()
    for name in options.models:
        model = MODELS[name](options.data, options.output)
        for seed in [] if options.table else options.seeds:
            model.fit(seed) if options.fit else run_seed(model, seed)
        print(f"\n{table(model, options.seeds)}")
    print(f"{time.monotonic() - started:.0f} s, {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    main()

"""The command ``tva forget``: a language model forgets what a file of texts teaches, in one line."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tva.checkpoints import protect
from tva.console import make_console, print_line
from tva.edit.folder import check_output, check_writable

HELP = "make a language model forget what given texts teach, while it still predicts other texts as before"
ORDER = "model"
PARTS = {"train": 0.8, "val": 0.1, "test": 0.1}
KEPT = {"train": 0.02, "val": 0.49, "test": 0.49}  # nothing is trained on texts to keep
NUM_OWN_TEXTS = 200  # that the model writes where no texts to keep are given


def run(
    model: str,
    data: str,
    output: str,
    keep: str | None = None,
    contrast: str | None = None,
    max_kl: float = 0.05,
    max_perplexity: float | None = None,
    rank: int = 16,
    max_steps: int = 150,
    learning_rate: float = 2e-4,
    batch_size: int = 8,
    block_length: int = 64,
    text_column: str = "text",
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Make a language model forget what given texts teach, while it still predicts other texts as before.

    The model is fine-tuned on the texts, and the task vector is subtracted with the largest coefficient that keeps, on
    other texts, the divergence from the base's predictions and the perplexity within their limits: chosen on validation
    texts, proved on test texts, where it is also tested that the model predicts the texts to forget worse. No label is
    needed. The two steps are ordinary ``tva fit`` and ``tva edit`` commands, whose configurations are kept in
    ``OUTPUT-work/`` to be changed and run again.

    Args:
        model: Folder of a causal language model of transformers, or its name on the hub.
        data: Texts to forget: a ``.txt`` or ``.txt.gz`` file with one text per line, or a parquet, csv or JSON lines
            file with a column of texts. They are split at random into training (80%), validation and test texts.
        output: Folder for the edited model, which transformers loads, with its report.
        keep: File of texts that the model must predict as before. Without it, 200 texts that the model generates are
            used.
        contrast: File of texts in the same style without the behavior to forget: only what the texts teach beyond these
            is subtracted.
        max_kl: Maximum mean divergence of the edited model's predictions from the base's on the texts to keep, in nats
            per token.
        max_perplexity: Maximum perplexity on the texts to keep, as a multiple of the base's; 1.05 by default. Without
            ``keep`` there is no such limit by default: on texts of the model's own, the divergence is the expected rise
            of the loss.
        rank: Rank of the LoRA fine-tuning (needs ``pip install 'tva[lora]'``); 0 trains all weights.
        max_steps: Number of fine-tuning steps.
        learning_rate: Peak learning rate.
        batch_size: Number of blocks per step.
        block_length: Number of tokens in a block of text.
        text_column: Name of the column of texts.
        confidence: One-sided confidence with which both limits must hold.
        seed: Seed of the split, the training and the generated texts.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: There are too few texts, or the model cannot be loaded.
    """
    if not max_kl > 0:
        raise ValueError(f"max_kl must be positive; found {max_kl}.")
    if rank < 0 or max_steps < 1:
        raise ValueError(f"rank must be at least 0 and max_steps at least 1; found rank {rank}, max_steps {max_steps}.")
    if max_perplexity is None and keep is not None:
        max_perplexity = 1.05
    allowed = None if max_perplexity is None else _nats(max_perplexity)
    work = Path(f"{output.rstrip('/')}-work")
    given = {name: path for name, path in (("data", data), ("contrast", contrast), ("keep", keep)) if path is not None}
    protect((work / f"{name}-{part}.jsonl" for name in ("forget", "contrast", "keep") for part in PARTS), given)
    check_output(Path(output), [model, *given.values()], ["model.safetensors", "config.json"])
    check_writable(Path(output))
    sources = {"forget": data, "contrast": contrast, "keep": keep}
    files = {
        name: divide(texts, text_column, work / name, seed, KEPT if name == "keep" else PARTS)
        for name, texts in sources.items()
        if texts is not None
    }
    _enough_to_test(files["forget"]["test"], data)
    both = _lines(files["forget"]) & _lines(files["keep"]) if keep is not None else set()
    if both:
        raise ValueError(
            f"{len(both)} texts are both to forget and to keep, such as {min(both)}. Take them out of one."
        )
    if keep is None:  # last, for it takes long
        own = write_texts(model, NUM_OWN_TEXTS, block_length, seed)
        files["keep"] = divide(own, text_column, work / "keep", seed, KEPT)
    _enough(files["keep"]["test"], keep or "what the model generates", max_kl, confidence)
    common = {"val_split": "val", "text_column": "text", "block_length": block_length, "batch_size": batch_size}
    tasks = {name: _named("tva.data.LanguageTask", path=paths, name=name, **common) for name, paths in files.items()}
    trained = [name for name in tasks if name != "keep"]
    options = {"learning_rate": learning_rate, "warmup_steps": max_steps // 10}
    options |= {"lora": {"r": rank, "alpha": 2 * rank}} if rank else {}
    for name in trained:
        fit = {"seed_everything": seed, "model": _named("tva.models.CausalLM", name=model, **options),
               "data": tasks[name], "trainer": _trainer(work / f"fit-{name}", max_steps)}  # fmt: skip
        _call("fit", work / f"fit-{name}.yaml", fit)
    edit = {
        "seed_everything": seed,
        "model": _named("tva.models.CausalLM", name=model),
        "vectors": {name: str(work / f"fit-{name}/final.tv.safetensors") for name in trained},
        "recipe": "-forget" if contrast is None else "-(forget - contrast)",
        "output": output,
        "rule": "largest",
        "maximize": "forget/loss",
        "subject_to": [f"keep/kl <= {max_kl}", *([] if allowed is None else [f"keep/loss <= base + {allowed:.6g}"])],
        "confidence": confidence,
        "targets": {"forget": tasks["forget"]},
        "controls": {"keep": tasks["keep"]},
    }
    holds = _call("edit", work / "edit.yaml", edit)
    compared = json.loads((Path(output) / "edit.json").read_text())["tasks"]["forget"]["comparison"]
    written = any(Path(output).glob("*.safetensors"))
    return {"output": output, "work": str(work), "holds": holds, "written": written, "loss_difference": compared}


def show(result: dict[str, Any]) -> None:
    """Print whether the texts are forgotten, and where everything is."""
    console, change = make_console(), result["loss_difference"]
    low, high = change["difference_low"], change["difference_high"]
    said = "the texts are forgotten" if (low or 0) > 0 else "the texts are not shown to be forgotten"
    if not result["written"]:
        said = "no edited model is written; of the closest edit"
    interval = "too few test texts for an interval" if low is None else f"{low:+.3g}, {high:+.3g}"
    print_line(console, f"{said}: their test loss changes by {change['difference']:+.3g} [{interval}] nats per token")
    if result["written"]:
        print_line(console, f"transformers loads {result['output']}/")
    print_line(console, f"the steps and their configurations are in {result['work']}/")


def finish(result: dict[str, Any]) -> bool:
    """Return whether the limits hold and the texts are forgotten."""
    return bool(result["holds"]) and (result["loss_difference"]["difference_low"] or 0) > 0


def _nats(factor: float) -> float:
    import math

    if not factor > 0:
        raise ValueError(f"max_perplexity must be a positive multiple of the base's perplexity; found {factor}.")
    return math.log(factor)


def _lines(files: Mapping[str, str]) -> set[str]:
    return {line for file in files.values() for line in Path(file).read_text().splitlines()}


def _enough_to_test(file: str, source: str) -> None:
    """Raise if there are too few test texts for an interval of how much worse they are predicted."""
    from tva.evaluation.intervals import FEWEST

    count = len(Path(file).read_text().splitlines())
    if count < FEWEST:
        raise ValueError(
            f"To test whether the texts are forgotten, at least {FEWEST} different texts are needed, which are "
            f"{PARTS['test']:.0%} of the texts to forget; {source} leaves {count}. Give more texts with --data."
        )


def _enough(file: str, source: str, max_kl: float, confidence: float) -> None:
    """Raise if no edit could be shown to meet the limit on the divergence with the test texts there are."""
    import numpy as np

    from tva.evaluation.bounds import needed_examples

    count = len(Path(file).read_text().splitlines())
    needed = needed_examples(np.zeros(count), 1.0, max_kl, confidence, above=False) if confidence > 0.5 else 0
    if needed is not None and count < needed:
        raise ValueError(
            f"To show with {confidence:g} confidence that an edit keeps other texts, at least {needed} different texts "
            f"to test on are needed, which are {KEPT['test']:.0%} of the texts to keep; {source} leaves {count}. Give "
            f"more texts with --keep, or lower the --confidence."
        )


def _named(class_path: str, /, **options: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": options}


def _trainer(folder: Path, max_steps: int) -> dict[str, Any]:
    return {
        "max_steps": max_steps,
        "logger": False,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
        "enable_checkpointing": False,
        "callbacks": [_named("tva.callbacks.TaskVectorCallback", at_train_end=True)],
    }


def _call(command: str, path: Path, config: dict[str, Any]) -> bool:
    """Write a configuration and run its command in this process; return whether its constraints hold."""
    import yaml

    from tva.cli.main import main

    path.write_text(yaml.safe_dump(config, sort_keys=False))
    print(f"$ tva {command} --config {path}", flush=True)
    try:
        main([command, "--config", str(path)])
    except SystemExit as stop:
        if stop.code == 1 and command == "edit":
            return False
        raise
    return True


# --- texts


def divide(
    source: str | Sequence[str], column: str, prefix: Path, seed: int, shares: Mapping[str, float] = PARTS
) -> dict[str, str]:
    """Divide texts at random into training, validation and test texts, and write each part to a file.

    Args:
        source: A file, or the texts.
        column: The column of texts in a file of a table.
        prefix: Start of the paths of the files to write.
        seed: Seed of the order.
        shares: Of the three parts.

    Returns:
        Part to file, JSON lines. A text that occurs twice is taken once, so that no part shares one with another.

    Raises:
        ValueError: There are fewer than 10 texts.
    """
    texts = list(dict.fromkeys(source if not isinstance(source, str) else _read(source, column)))
    if len(texts) < 10:
        raise ValueError(
            f"At least 10 different texts are needed for training, validation and test; {source} has {len(texts)}. "
            f"Give one text per line, or a table with a column of texts."
        )
    random.Random(seed).shuffle(texts)
    first = max(1, round(len(texts) * shares["train"]))
    second = round(len(texts) * (shares["train"] + shares["val"]))
    parts = dict(zip(shares, (texts[:first], texts[first:second], texts[second:]), strict=True))
    files = {}
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        file = prefix.with_name(f"{prefix.name}-{part}.jsonl")
        file.write_text("".join(f"{json.dumps({'text': text})}\n" for text in rows))
        files[part] = str(file)
    return files


def _read(path: str, column: str) -> list[str]:
    from tva.data.loading import load_splits

    found = load_splits(path, None, None, None, False)
    of_lines, texts = path.endswith((".txt", ".txt.gz")), []
    for table in found.values():
        if column not in table.column_names:
            raise ValueError(
                f"{path} has no column {column!r}; its columns are {', '.join(table.column_names)}. Set text_column to "
                f"one of them."
            )
        texts += [line for text in table[column] for line in (text.splitlines() if of_lines else [text])]
    return [text.strip() for text in texts if text and text.strip()]


def write_texts(model: str, count: int, length: int, seed: int) -> list[str]:
    """Generate texts with a language model, by sampling from its own distribution.

    Args:
        model: Folder or name of a causal language model.
        count: How many texts.
        length: Tokens of each, at most.
        seed: Seed of the sampling.
    """
    import torch

    from tva.models import CausalLM

    made = CausalLM(model)
    start = made.tokenizer.bos_token_id
    if start is None:
        start = made.tokenizer.eos_token_id
    if start is None:
        raise ValueError(f"{model} has no token that begins a text, from which it could write. Give texts with --keep.")
    made.network.eval()
    texts: list[str] = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        while len(texts) < count:
            size = min(20, count - len(texts))
            tokens = made.network.generate(
                torch.full((size, 1), start),
                attention_mask=torch.ones(size, 1, dtype=torch.long),
                max_new_tokens=length,
                do_sample=True,
                top_k=0,
                pad_token_id=made.tokenizer.pad_token_id or 0,
            )
            texts += [made.tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in tokens]
    return texts

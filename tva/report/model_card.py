"""The model card beside edited weights: Markdown for people, and the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tva.errors import some
from tva.report.run_files import CARD
from tva.report.series import Content, coefficient, formula, interval, number

MADE_BY = "<!-- made by tva from edit.json, and rewritten by every edit into this folder -->"


def model_card(content: Content, base_model: str | None = None) -> str:
    """Write the model card of an edit.

    Args:
        content: Its ``edit.json``.
        base_model: The base's repository on the hub; by default the one it was opened from.
    """
    from huggingface_hub import EvalResult, ModelCardData

    name = f"edited by {content['recipe']}"
    results = []
    for task, entry in content["tasks"].items():
        known = {key: entry["edited"][key] for key in ("low", "high") if entry["edited"].get(key) is not None}
        results.append(
            EvalResult(
                task_type="other",
                task_name=f"{task} ({entry['role']})",
                dataset_type=task,
                dataset_name=task,
                dataset_split=entry["split"],
                metric_type=entry["metric"],
                metric_name=f"{entry['metric']} after the edit",
                metric_value=entry["edited"]["value"],
                metric_args={
                    **known,
                    **({"confidence": 0.95} if known else {}),
                    "num_examples": entry["num_examples"],
                    "base": entry["base"]["value"],
                },
            )
        )
    several = len(content["vectors"]) > 1
    data = ModelCardData(
        base_model=base_model or hub_repository(content["base"]["path"]),
        base_model_relation="merge" if several else "finetune",
        library_name="pytorch",
        tags=["task-arithmetic", "task-vectors", "model-editing", *(["merge"] if several else [])],
        model_name=name,
        eval_results=results,
    )
    if data.base_model is None:
        data.pop("base_model_relation")
    return f"---\n{data.to_yaml()}\n---\n{MADE_BY}\n\n{_body(content)}"


def hub_repository(path: str | None) -> str | None:
    """Return the repository of a checkpoint on the Hub.

    Example:
        >>> hub_repository("hf://openai/clip@main/model.safetensors"), hub_repository("runs/base.ckpt")
        ('openai/clip', None)
    """
    found = re.match(r"hf:/+([\w.-]+/[\w.-]+)", path or "")
    return found[1] if found else None


def _body(content: Content) -> str:
    base = content["base"]
    start = f"`{base['path']}`" if base["path"] else f"the weights of `{content.get('model')}`"
    weights = (content.get("edited") or {}).get("path", "edited.safetensors")
    inputs = [["`base`", start, base["fingerprint"]]]
    inputs += [
        [f"`{name}`", f"`{vector['path']}`", vector["fingerprint"]] for name, vector in content["vectors"].items()
    ]
    scores, normalized = [], any(entry["normalized"] is not None for entry in content["tasks"].values())
    for task, entry in content["tasks"].items():
        metric = entry["metric"]
        cells = [
            f"{number(entry[label]['value'], metric)} {interval(entry[label], metric)}".strip()
            if label in entry
            else "–"
            for label in ("base", "edited", "finetuned", "random")
        ]
        own = [number(entry["normalized"], "accuracy")] if normalized else []
        count = f", {entry['num_examples']:,}" if entry["num_examples"] else ""
        scores.append([task, entry["role"], metric, entry["split"] + count, *cells, *own])
    heads = ["task", "role", "metric", "data", "base", "edited", "fine-tuned on it", "random vector"]
    constraints = [
        f"- `{c['text']}`: {'holds' if c['holds'] else 'fails'} ({number(c['value'], c['metric'])} against "
        f"{number(c['bound'], c['metric'])})"
        for c in content["constraints"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    coefs = ", ".join(f"`{name}` = {coefficient(value)}" for name, value in content["coefficients"].items())
    return "\n".join(
        [
            f"# `{formula(content)}`",
            "",
            f"A model edited by arithmetic on its weights. The verdict: {content['verdict']}.",
            "",
            "## What was done",
            "",
            f"Recipe `{content['recipe']}` with {coefs}: {content['reason']}.",
            "",
            *_table(["name", "from", "fingerprint"], inputs),
            "",
            "## What it did",
            "",
            *_table([*heads, *(["normalized"] if normalized else [])], scores),
            "",
            "In brackets: 95 % intervals. The random vector has the norm of the edit in every tensor."
            if content["random_seed"] is not None
            else "In brackets: 95 % intervals.",
            "",
            *(constraints or ["No constraint was set."]),
            "",
            "## Limits",
            "",
            *_limits(content),
            "",
            "## Use, and make again",
            "",
            "```python",
            "from tva import open_weights",
            "",
            f'model.load_state_dict(dict(open_weights("{weights}")))',
            "```",
            "",
            "```bash",
            content["command"],
            "```",
            "",
            f"Seed {content['seed']}; {versions}; {content.get('created')}. Every number is in `edit.json`, "
            "and drawn in `report.html`.",
            "",
        ]
    )


def _limits(content: Content) -> list[str]:
    controls = [task for task, entry in content["tasks"].items() if entry["role"] == "control"]
    watched = f"Only {some(controls, 8)} was watched" if controls else "Nothing was watched"
    limits = [
        f"- {watched} for what the edit must not change; what it did elsewhere was not measured.",
        "- Intervals hold for other examples like these test data: not for other data or another fine-tuning run.",
    ]
    limits += [f"- {note}" for note in content.get("notes", [])]
    worse = [
        task
        for task, entry in content["tasks"].items()
        if entry["role"] == "target"
        and (entry["edited"]["value"] < entry["base"]["value"]) == entry["higher_is_better"]
    ]
    if worse:
        limits.append(
            f"- {some(worse, 8)} got worse. Where that was meant, the knowledge need not be gone: "
            "fine-tuning may bring it back."
        )
    return limits


def _table(heads: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [[str(cell).replace("|", r"\|") for cell in row] for row in (heads, ["---"] * len(heads), *rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def check_card(folder: Path) -> None:
    """Check that no other README would be lost.

    Raises:
        ValueError: One is there that tva did not write.
    """
    file = folder / CARD
    if file.exists() and MADE_BY not in file.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"The model card goes to {file}, which tva did not write. Move it, or choose another output.")


def with_base_model(card: str, base_model: str) -> str:
    """Name the base's repository in a card's metadata, leaving the rest as it is."""
    from huggingface_hub import ModelCard

    made = ModelCard(card)
    several: Mapping[str, Any] | list[str] = made.data.tags or []
    made.data.base_model = base_model
    made.data.base_model_relation = "merge" if "merge" in several else "finetune"
    return str(made)

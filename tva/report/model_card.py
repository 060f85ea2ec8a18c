"""The model card beside edited weights: Markdown for people, and the metadata that the Hugging Face hub reads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tva.errors import some
from tva.report.run_files import CARD
from tva.report.series import Content, coefficient, formula, interval, number

MADE_BY = "<!-- made by tva from edit.json, and rewritten by every edit into this folder -->"


LOADING = {  # how a form of weights is loaded from the folder that the card is in
    "state_dict": 'from tva import open_weights\n\nmodel.load_state_dict(dict(open_weights("{}")))',
    "lightning": 'model = YourModule.load_from_checkpoint("{}")',
    "transformers": "from transformers import AutoModel  # or the class that config.json names\n\n"
    'model = AutoModel.from_pretrained("{}")',
    "sentence_transformers": "from sentence_transformers import SentenceTransformer\n\n"
    'model = SentenceTransformer("{}")',
    "timm": 'import timm\n\nmodel = timm.create_model("local-dir:{}", pretrained=True)',
    "open_clip": 'import open_clip\n\nmodel = open_clip.create_model("local-dir:{}")',
}


def model_card(content: Content, base_model: str | None = None, facts: Mapping[str, Any] | None = None) -> str:
    """Write the model card of an edit.

    Args:
        content: Its ``edit.json``.
        base_model: The base's repository on the hub; by default the one it was opened from.
        facts: Further metadata: ``library_name``, ``pipeline_tag``, ``license`` …
    """
    head = _metadata(content["recipe"], {"base_model": hub_repository(content["base"]["path"]), **(facts or {})})
    if base_model is not None:
        head.base_model = base_model
    head.eval_results = _results(content)
    return f"---\n{_yaml(head)}\n---\n{MADE_BY}\n\n{_body(content)}"


def composed_card(record: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Write the model card of what `tva compose` wrote, which was not evaluated.

    Args:
        record: Attributes of its record; see `tva.compose.record`.
        facts: As in `model_card`.
    """
    rows = [["`base`", f"`{record['base']}`", record["base_fingerprint"]]]
    rows += [
        [f"`{name}`", f"`{path}`", record["vector_fingerprints"].get(name, "")]
        for name, path in record["vectors"].items()
    ]
    coefs = {"scaling_coef": record["scaling_coef"], **record["coefs"]}
    numbers = ", ".join(f"`{name}` = {coefficient(value)}" for name, value in coefs.items())
    body = [
        f"# `{record['recipe']}`",
        "",
        "A model edited by arithmetic on its weights. It was not evaluated by tva.",
        "",
        f"Recipe `{record['recipe']}` with {numbers}, by tva {record['version']}.",
        "",
        *_table(["name", "from", "fingerprint"], rows),
        "",
        f"The weights have the fingerprint {record['edited_fingerprint']}; `tva verify` computes them again.",
        "",
    ]
    return f"---\n{_yaml(_metadata(record['recipe'], facts))}\n---\n{MADE_BY}\n\n" + "\n".join(body)


def _metadata(recipe: str, facts: Mapping[str, Any]) -> Any:
    from huggingface_hub import ModelCardData

    known = {"library_name": "pytorch", **facts}
    tags = ["task-arithmetic", "task-vectors", "model-editing", "merge"]
    return ModelCardData(**known, base_model_relation="merge", tags=tags, model_name=f"edited by {recipe}")


def _yaml(data: Any) -> str:
    if data.base_model is None:
        data.pop("base_model_relation")
    return str(data.to_yaml())


def _results(content: Content) -> list[Any]:
    from huggingface_hub import EvalResult

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
    return results


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
    edited = content.get("edited") or {}
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
        count += f" in {entry['num_groups']:,} groups" if entry.get("num_groups") else ""
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
            "In brackets: 95% intervals. The random vector has the norm of the edit in every tensor."
            if content["random_seed"] is not None
            else "In brackets: 95% intervals.",
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
            *LOADING.get(edited.get("format"), LOADING["state_dict"]).format(edited.get("path")).splitlines(),
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
    """Check that no README of the user's would be replaced.

    Raises:
        ValueError: One is there that tva did not write.
    """
    file = folder / CARD
    if file.exists() and MADE_BY not in file.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"The model card goes to {file}, which tva did not write. Move it, or choose another output.")


def with_base_model(card: str, base_model: str) -> str:
    """Set ``base_model`` in a card's metadata, leaving the rest unchanged."""
    from huggingface_hub import ModelCard

    made = ModelCard(card)
    made.data.base_model = base_model
    made.data.base_model_relation = "merge"
    return str(made)


def metadata_of(card: str) -> dict[str, Any]:
    """Return the metadata of a model card; empty if there is none or it cannot be read."""
    from huggingface_hub import ModelCard

    try:
        return dict(ModelCard(card).data.to_dict())
    except Exception:  # a stranger's YAML is parsed: it may provoke any
        return {}

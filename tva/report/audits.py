"""Tables of the audits of an edit: how much of what was forgotten comes back."""

from collections.abc import Mapping
from typing import Any

from tva.report.series import Content, interval, number


def audit_tables(content: Content) -> dict[str, dict[str, Any]]:
    """Return for each audit of an ``edit.json`` its rows by task, and a sentence: what page and terminal show."""
    return {
        name: {"rows": {task: _row(entry) for task, entry in found["tasks"].items()}, "reason": _reason(found)}
        for name, found in content.get("audits", {}).items()
    }


def _row(entry: Mapping[str, Any]) -> dict[str, str]:
    metric = entry["metric"]

    def shown(name: str) -> str:
        return " ".join([number(entry[name]["value"], metric), interval(entry[name], metric)]).strip()

    return {
        "base": number(entry["base"]["value"], metric),
        "edited": number(entry["edited"]["value"], metric),
        "edited, after": shown("edited_after"),
        "base, after": shown("base_after"),
        "came back": number(entry["recovered"], "accuracy"),
    }


def _reason(found: Mapping[str, Any]) -> str:
    if "options" not in found:
        return f"{found['rounded']} weights were rounded"
    options = found["options"]
    said = [
        f"{options['steps']} steps of {options['optimizer']} at {options['learning_rate']:g}, seed {options['seed']}"
    ]
    for task, entry in found["tasks"].items():
        at, metric = entry["curve"], entry["metric"]
        edited = ", ".join(number(point["edited"], metric) for point in at)
        base = ", ".join(number(point["base"], metric) for point in at)
        steps = ", ".join(str(point["step"]) for point in at)
        said.append(f"{task} on {entry['num_trained']} examples after {steps} steps: edited {edited}; base {base}")
    return "; ".join(said)

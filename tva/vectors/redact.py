"""What files that may be published must not hold: secrets in options, and the home folder in paths."""

import os
import re
import shlex
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_SECRET = re.compile(r"(?i)(?:^|[._-])(?:\w*(?:key|token|secret|password|passwd|credential)s?)$")
_NOT_SECRET = re.compile(r"(?i)(?:^|[._-])(?:num_|max_|min_|n_|pad_|eos_|bos_|unk_|cls_|sep_|mask_)\w*tokens?$")
_LOGGER = re.compile(r"^--trainer\.logger(?:s?\.|\b.*\.)")
_INSIDE = re.compile(
    r"""(?i)(["']?[\w.-]*(?:key|token|secret|password|passwd|credential)s?["']?\s*[:=]\s*)"""
    r"""("[^"]*"|'[^']*'|[^\s,}\]&]+)"""
)


def is_secret(name: str) -> bool:
    """Return whether an option of this name may hold a secret.

    Example:
        >>> [is_secret(name) for name in ("--trainer.api_key", "hf_token", "max_tokens", "key_map")]
        [True, True, False, False]
    """
    return bool(_SECRET.search(name)) and not _NOT_SECRET.search(name)


def public_values(value: Any) -> Any:
    """Return JSON values in which those of secret options are ``***`` and the home folder is ``~``."""
    if isinstance(value, Mapping):
        return {
            name: HIDDEN if is_secret(str(name)) and isinstance(item, str) else public_values(item)
            for name, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [public_values(item) for item in value]
    return public_path(value) if isinstance(value, str) else value


def public_command(command: str) -> str:
    """Return a command line without the values of secret options and of loggers, and without the home folder.

    Example:
        >>> public_command("tva edit --trainer.logger.init_args.id=a --hub_token b --rule best")
        "tva edit '--trainer.logger.init_args.id=***' --hub_token '***' --rule best"
    """
    words: list[str] = []
    for word in shlex.split(command):
        name, equals, value = word.partition("=")
        if words and words[-1].startswith("--") and "=" not in words[-1] and not word.startswith("--"):
            words.append(_public_value(words[-1], word))
        elif word.startswith("--") and equals:
            words.append(f"{name}={_public_value(name, value)}")
        else:
            words.append(word)
    return public_path(shlex.join(words))


def _public_value(name: str, value: str) -> str:
    is_logger = bool(_LOGGER.match(name)) or (name == "--trainer.logger" and value[:1] in "{[")
    return HIDDEN if is_secret(name) or is_logger else _INSIDE.sub(rf"\g<1>{HIDDEN}", value)


def public_path(text: str) -> str:
    """Return a path, or a text with paths, in which the home folder is ``~``; `tva.checkpoints` opens such paths."""
    home = os.path.expanduser("~")
    return text if home in (os.sep, "~") else re.sub(rf"(?<![\w/.~-]){re.escape(home)}(?=/|$|\s|['\"])", "~", text)

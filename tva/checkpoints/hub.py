"""Checkpoints on the Hugging Face hub, ``hf://owner/name@revision/file``: their weights are downloaded, and no more."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tva.checkpoints.foreign import is_plain_name, read_json
from tva.errors import some

# In the order in which they are looked for; an index brings its shards.
NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
)
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to one that may write."
ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")


def is_hub(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is on the hub; ``Path`` makes one slash of the two."""
    return re.match(r"hf:/", os.fspath(path)) is not None


def fetch(path: str | os.PathLike[str]) -> Path:
    """Download the weights of a repository unless they are in the local cache.

    Args:
        path: ``hf://owner/name``, ``hf://owner/name@revision``, either with ``/file`` behind it. Without a file, the
            first of ``model.safetensors``, its shards, an adapter, ``pytorch_model.bin`` and its shards.

    Returns:
        The local file, or the local folder of what was downloaded.

    Raises:
        FileNotFoundError: The repository, revision or file does not exist, or cannot be reached.
        ValueError: The path has another form.
    """
    repository, revision, file = _parts(path)
    if file is not None:
        return _with_rest(repository, _download(repository, file, revision), file, revision)
    unreachable: _Unreachable | None = None
    for name in NAMES:
        try:
            # Once the hub is out of reach only the cache is asked: each further try would take half a minute.
            path = _download(repository, name, revision, cache_only=unreachable is not None)
        except _Unreachable as error:
            unreachable = unreachable or error
        except _Missing:
            pass
        else:
            return _with_rest(repository, path, name, revision).parent
    if unreachable is not None:
        raise FileNotFoundError(_offline(repository, revision)) from unreachable
    raise FileNotFoundError(
        f"{_place(repository, revision)} holds none of {some(NAMES, limit=len(NAMES))}. Name the file: "
        f"hf://{repository}{'@' + revision if revision else ''}/FILE."
    )


def fetch_beside(path: str | os.PathLike[str], choose: Callable[[list[str]], list[str]]) -> None:
    """Download what is beside the weights of a repository, of the same commit, unless it is in the local cache.

    Where the hub cannot be asked what there is, what the cache has is all there is.

    Args:
        path: As for `fetch`, which is called first.
        choose: Which of the repository's files are wanted, by their paths there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    local = fetch(path)
    repository = _parts(path)[0]
    commit = next((part for part in reversed(local.parts) if re.fullmatch("[0-9a-f]{40}", part)), None)
    try:
        names = HfApi().list_repo_files(repository, revision=commit)
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, ConnectionError):
        return
    for name in choose(names):
        with contextlib.suppress(_Missing):
            _download(repository, name, commit)


def push(path: str | os.PathLike[str], repository: str) -> None:
    """Upload a file or folder under its own name; the repository is made, private, if there is none.

    Raises:
        OSError: The hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    path = Path(path)
    with _asking(repository):
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        if path.is_dir():
            api.upload_folder(repo_id=repository, folder_path=path, path_in_repo=path.name)
        else:
            api.upload_file(repo_id=repository, path_or_fileobj=path, path_in_repo=path.name)


def upload(
    files: Mapping[str, Path | bytes], repository: str, message: str, private: bool = True, space: str | None = None
) -> str:
    """Upload files in one commit; the repository is made if there is none.

    Args:
        files: Name in the repository to a file, or to contents.
        repository: ``owner/name``.
        message: Message of the commit.
        private: Make a new repository private.
        space: The SDK of a Space, such as ``"gradio"``; None is a model.

    Returns:
        The commit's address.

    Raises:
        OSError: The hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with _asking(repository):
        api = HfApi()
        kind = None if space is None else "space"
        api.create_repo(repository, private=private, exist_ok=True, repo_type=kind, space_sdk=space)
        operations = [CommitOperationAdd(name, file) for name, file in files.items()]
        return str(api.create_commit(repository, operations, commit_message=message, repo_type=kind).commit_url)


@contextlib.contextmanager
def _asking(repository: str) -> Iterator[None]:
    """Raise an error that says what to do where the hub refuses."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise OSError(f"{repository!r} is not a repository's name: {error}") from error
    except LocalTokenNotFoundError as error:
        raise OSError(f"The hub requires authentication, and there is no token: {LOG_IN}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            text = f"The hub does not let this token write to {repository} (status {status}): {LOG_IN}"
            raise OSError(text) from error
        raise OSError(f"The hub refused {repository}: {error}") from error
    except HTTPError as error:  # of the library that the client is built on, which has changed before
        raise OSError(f"The hub cannot be reached for {repository}: {error}") from error


def _parts(path: str | os.PathLike[str]) -> tuple[str, str | None, str | None]:
    found = re.fullmatch(r"hf:/+([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?", os.fspath(path))
    if found is None:
        raise ValueError(f"{os.fspath(path)!r} is not a path on the hub; write hf://owner/name@revision/file.")
    return found[1], found[2], found[3]


class _Missing(FileNotFoundError):
    """A file is not in the repository."""


class _Unreachable(FileNotFoundError):
    """The hub is out of reach, and a file is not in the cache."""


def _with_rest(repository: str, path: Path, name: str, revision: str | None) -> Path:
    # The rest must be of the same commit, which is the name of the cache's folder, even if a branch moves meanwhile.
    commit = next((part for part in reversed(path.parts) if re.fullmatch("[0-9a-f]{40}", part)), revision)
    if name.endswith(".index.json"):
        weight_map: dict[str, str] = read_json(path, {"weight_map": {str: str}}).get("weight_map", {})
        for shard in sorted(filter(is_plain_name, set(weight_map.values()))):  # others are refused on opening
            _download(repository, Path(name).with_name(shard).as_posix(), commit)
    elif Path(name).name == "adapter_config.json":
        safe, pickled = (Path(name).with_name(weights).as_posix() for weights in ADAPTER_NAMES)
        try:
            _download(repository, safe, commit)
        except _Missing:
            _download(repository, pickled, commit)
    return path


def _download(repository: str, name: str, revision: str | None, cache_only: bool = False) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(hf_hub_download(repository, name, revision=revision, local_files_only=cache_only))
    except LocalEntryNotFoundError as error:
        raise _Unreachable(_offline(repository, revision, name)) from error
    except EntryNotFoundError as error:
        raise _Missing(f"{_place(repository, revision)} holds no file {name}. Check its name.") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{_place(repository, revision)} is not on the hub, or you have no access to it (then log in: hf auth "
            f"login): {str(error).splitlines()[0]}"
        ) from error


def _place(repository: str, revision: str | None) -> str:
    return f"The hub's repository {repository}" + (f" at {revision}" if revision else "")


def _offline(repository: str, revision: str | None, name: str = "a file of weights") -> str:
    words = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    return (
        f"{_place(repository, revision)} cannot be reached, and {name} is not in the local cache. Connect to the "
        f"network, or fetch it where there is one: {words}"
    )

"""The form in which an edit is written: what the library that the model is of loads."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import Tensor

from tva.checkpoints import (
    Elements,
    Info,
    LazyWeights,
    Output,
    canonical_names,
    canonical_state_dict,
    fetch_side_files,
    find,
    match_names,
    model_folder,
    open_weights,
    save_weights,
    side_files,
    weights_stem,
)
from tva.checkpoints.dcp_writer import RECORD
from tva.checkpoints.fingerprint import form_of
from tva.checkpoints.foreign import read_json
from tva.checkpoints.formats.sentence_transformers import part_of_names
from tva.checkpoints.lazy import InMemory
from tva.checkpoints.names import matched
from tva.checkpoints.shards import shard_names, shard_tensors
from tva.checkpoints.wrappers import network_of
from tva.compose.undo import undo_path
from tva.edit.card_facts import card_facts
from tva.errors import MismatchError, some
from tva.models.network import POOLER, own_state
from tva.models.saving import save_folder
from tva.report.run_files import CARD, CONFIG, DCP, EDITED
from tva.sizes import parse_bytes
from tva.vectors.kind import kind_of

Format = Literal["transformers", "sentence_transformers", "timm", "open_clip", "lightning", "state_dict", "dcp"]
SHARD = parse_bytes("5GB")
UNDO_OF_FOLDER = "undo.safetensors"
OF_TRAINING = {  # what a Lightning checkpoint holds of the run that wrote it
    "optimizer_states", "lr_schedulers", "loops", "callbacks", "averaging_state", "current_model_state",
    "native_amp_scaling_state", "MixedPrecision",
}  # fmt: skip
AS_BASE = "Give such a folder whose names are the model's as base, or format='state_dict'."
FOLDERS = ("transformers", "sentence_transformers", "timm", "open_clip")


def format_of(path: Path) -> Format:
    """Return the form that a checkpoint on this machine has."""
    folder = path if path.is_dir() else model_folder(path)
    if folder is not None:
        if (folder / "modules.json").is_file() and path.is_dir():
            return "sentence_transformers"
        if (folder / "open_clip_config.json").is_file():
            return "open_clip"
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        if "architecture" in config:
            return "timm"
        if "model_type" in config or "architectures" in config:
            return "transformers"
    if path.is_file() and open_weights(path).info.format == "Lightning checkpoint":
        return "lightning"
    return "state_dict"


def source_of(model: L.LightningModule) -> str | None:
    """Return the checkpoint that a model's network was loaded from, as far as it says so."""
    _, network = network_of(model)
    known: Any = getattr(model, "source", None) or getattr(network, "name_or_path", None)
    if not known and type(model).__module__.startswith("tva."):  # of which some are made from a folder
        known = model.hparams.get("path") or model.hparams.get("name")
    if not isinstance(known, str) or not known:
        return None
    known = os.path.expandvars(os.path.expanduser(known.removeprefix("local-dir:")))
    if Path(known).exists() or known.startswith("hf://"):
        return known
    commit = getattr(getattr(network, "config", None), "_commit_hash", None)
    return f"hf://{known}@{commit}" if commit else None


@dataclass(eq=False)
class Form:
    """How an edit is written.

    Attributes:
        format: The form.
        source: The checkpoint whose form it is, as it was given; None where there is none.
        template: The same on this machine.
        names: Names in the output to the model's; those of others are the template's own.
        note: Why it is another form than the source's.
        known_base: Whether the template holds the weights that were edited, where that is known.
    """

    format: Format
    model: L.LightningModule
    source: str | None = None
    template: Path | None = None
    names: dict[str, str] = field(default_factory=dict)
    note: str = ""
    known_base: bool | None = None
    _converts: bool = False

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder that a library loads."""
        return self.format in FOLDERS

    @classmethod
    def of(
        cls, model: L.LightningModule, base: str | None, asked: Format | None, live: Mapping[str, Tensor] | None = None
    ) -> Form:
        """Choose the form: that which is asked for, else that of the base, else that of what the model is.

        Args:
            model: The model.
            base: The base that was given.
            asked: The form that was asked for.
            live: The model's weights where each process has a part of them; they are not read.

        Raises:
            ValueError: The model cannot be written in the form that was asked for.
        """
        if asked is not None and asked not in get_args(Format):
            raise ValueError(f"format must be one of {', '.join(get_args(Format))}; found {asked!r}.")
        live = canonical_state_dict(model.state_dict()) if live is None else live
        if kind_of(model) is not None:
            if asked not in (None, "state_dict"):
                raise ValueError(
                    f"format={asked!r} would be loaded as an ordinary network, and the weights of this linearized one "
                    f"are another function there. Leave format out."
                )
            return cls("state_dict", model, names={name: name for name in live})
        source = base or source_of(model)
        template = None if source is None else find(source)
        if source is not None:
            fetch_side_files(source)
        found: Format = "state_dict" if template is None else format_of(template)
        form = cls(asked or found, model, source, template)
        if form.format != found and (form.format, found) != ("dcp", "state_dict"):
            form.source = form.template = None
        try:
            form._choose_names(live)
        except MismatchError as error:
            if asked is not None:
                raise ValueError(f"format={asked!r}: {error}") from error
            plain = form.format == "state_dict"
            note = "" if plain else f"The weights are written as a plain state dict, not as {form.format}: {error}"
            form = cls("state_dict", model, names=form._own(live), note=note)
        return form

    def _own(self, live: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the network's own names where tva wraps it, and the model's where it is the user's own module."""
        prefix, _ = network_of(self.model)
        ours = type(self.model).__module__.startswith("tva.")
        return {name.removeprefix(prefix) if ours else name: name for name in live}

    def _choose_names(self, live: Mapping[str, Tensor]) -> None:
        if self.template is None and self.is_folder:
            if isinstance(live, LazyWeights):
                raise MismatchError(f"A sharded model is written as {self.format} like a base. {AS_BASE}")
            self.template = self._made_by_library()
        if self.template is None:
            self.names = self._own(live)
            return
        stored = open_weights(self.template)
        self.names = _matching(self.model, live, stored) or {}
        if self.names:
            return
        if self.format == "transformers" and isinstance(live, LazyWeights):
            raise MismatchError(f"The model's names are not those of {self.template}. {AS_BASE}")
        if self.format == "transformers":
            converted = self._by_library(live)
            names = match_names(converted, stored, subset=True).names
            self._check_shapes(converted, names, stored)
            self.names, self._converts = dict(names), True
            return
        match_names({name.removeprefix(network_of(self.model)[0]): None for name in live}, stored)
        raise MismatchError(f"The model's tensors have other shapes than those of {self.template}.")

    def _check_shapes(self, found: Mapping[str, Tensor], names: Mapping[str, str], stored: LazyWeights) -> None:
        other = [name for name, old in names.items() if stored.spec(name).shape != form_of(found, old)[1]]
        if other:
            raise MismatchError(f"{some(other)} have other shapes in the model than in {self.template}.")

    def _by_library(self, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        prefix, network = network_of(self.model)
        if not hasattr(network, "save_pretrained"):
            raise MismatchError(f"{type(network).__name__} is not a network of transformers.")
        with tempfile.TemporaryDirectory(prefix="tva-") as folder:
            state = {name.removeprefix(prefix): tensor.detach().cpu() for name, tensor in live.items()}
            network.save_pretrained(folder, state_dict=state, max_shard_size="1000GB")
            return {name: tensor.clone() for name, tensor in open_weights(folder).items()}

    def _made_by_library(self) -> Path:
        """Let the library write a folder, where there is none to take the form of."""
        folder = tempfile.mkdtemp(prefix="tva-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        save_folder(self.format, self.model, Path(folder))
        return Path(folder)

    # --- weights

    def named(self, live: Mapping[str, Tensor]) -> LazyWeights:
        """Return weights of the model under the names of the output, with what else the template has."""
        given = self._by_library(live) if self._converts else live
        lazy = given if isinstance(given, LazyWeights) else None
        entries: dict[str, Any] = {
            name: InMemory(given[old].detach().cpu()) if lazy is None else lazy.entry(old)
            for name, old in self.names.items()
        }
        if self.template is not None:
            stored, dtype = open_weights(self.template), self.dtype_of(live)
            rest = {name: stored.entry(name) for name in stored if name not in entries}
            if dtype is not None:
                rest = {
                    name: InMemory(entry.read().to(getattr(torch, dtype))) if entry.dtype.is_floating_point else entry
                    for name, entry in rest.items()
                }
            entries = {name: (entries | rest)[name] for name in stored}
        return LazyWeights(Info(self.template or Path("model"), "model in memory"), entries)

    def base(self, live: Mapping[str, Tensor]) -> LazyWeights:
        """Return the base under the names of the output: as it is stored, if it is that which was edited."""
        return open_weights(self.template) if self.has_base(live) and self.template else self.named(live)

    def rest(self) -> list[str]:
        """Return the names in the output that are no tensors of the model."""
        return [] if self.template is None else [name for name in open_weights(self.template) if name not in self.names]

    def dtype_of(self, live: Mapping[str, Tensor]) -> str | None:
        """Return the dtype that the output has where it is not the template's."""
        if self.template is None or not self.names:
            return None
        stored = open_weights(self.template)
        mine = {dtype for name in live if (dtype := form_of(live, name)[0]).is_floating_point}
        theirs = {stored.spec(name).dtype for name in self.names if stored.spec(name).is_floating_point()}
        return None if mine == theirs or len(mine) != 1 else str(mine.pop()).removeprefix("torch.")

    def has_base(self, base: Mapping[str, Tensor]) -> bool:
        """Whether the template holds the weights that were edited, in whatever dtype."""
        if self.known_base is not None:
            return self.known_base
        if self.template is None or self.source is None:
            return False
        if self._converts:
            state = own_state(self.model, str(self.template))
            names = {} if state is None else matched(state, base)
            stored: Mapping[str, Tensor] = {} if state is None else state
        else:
            names, stored = {live: name for name, live in self.names.items()}, open_weights(self.template)
        covered = [name for name in names if name in base]
        return bool(covered) and all(torch.equal(stored[names[n]].to(base[n].dtype), base[n].cpu()) for n in covered)

    def renaming(self) -> tuple[str, str]:
        """Return what to strip from names in the output, and what to add, to get the model's."""
        for name, live in self.names.items():
            if name != live and not self._converts:
                if live.endswith(name):
                    return "", live.removesuffix(name)
                if name.endswith(live):
                    return name.removesuffix(live), ""
                while name and live and name.split(".")[-1] == live.split(".")[-1]:
                    name, live = name.rpartition(".")[0], live.rpartition(".")[0]
                return f"{name}.", f"{live}."
        return "", ""

    # --- files

    @property
    def path(self) -> str:
        """Path of the weights in the folder of the edit."""
        names = {"lightning": "edited.ckpt", "dcp": DCP}
        return "." if self.is_folder else names.get(self.format, EDITED)

    def files(self, live: Mapping[str, Tensor]) -> list[str]:
        """Return the paths of all files that `write` writes."""
        if self.format == "dcp":
            weights = self.named(live)
            specs = {name: weights.spec(name) for name in weights}
            shards = range(len(shard_tensors(specs, SHARD)))
            return [f"{DCP}/{name}" for name in (".metadata", RECORD, *(f"__0_{shard}.distcp" for shard in shards))]
        if not self.is_folder or self.template is None:
            return [self.path]
        weights, stem, found = self.named(live), weights_stem(self.template), []
        for prefix, folder in (part_of_names(self.template) or {"": ""}).items():
            part = {name: weights.spec(name) for name in weights if name.startswith(prefix)}
            found += [Path(folder, name).as_posix() for name in shard_names(part, SHARD, "model" if folder else stem)]
        return [*found, *self._side_files(live)]

    def _side_files(self, live: Mapping[str, Tensor]) -> dict[str, bytes | Path]:
        beside = side_files(self.template, self.dtype_of(live))[0] if self.template else {}
        return {name: file for name, file in beside.items() if name not in (CARD, CONFIG)}

    def facts(self) -> dict[str, Any]:
        """Return what the model card says of the model."""
        folder = None if self.template is None else model_folder(self.template)
        return card_facts(self.format, folder, self.source)

    def config(self, live: Mapping[str, Tensor]) -> str:
        """Return the ``config.json`` of a base that is a folder."""
        file = self.template / "config.json" if self.is_folder and self.template and self.template.is_dir() else None
        return file.read_text() if file is not None and file.is_file() and self.has_base(live) else ""

    def write(self, folder: Path, live: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
        """Write weights of the model.

        Args:
            folder: Of the edit.
            live: The model's names to tensors.
            header: Text to store with them.
        """
        weights = self.named(live)
        if self.format == "lightning":
            self._write_lightning(folder / self.path, weights, header)
        elif self.is_folder and self.template is not None:
            inside, parts, stem = folder / "model.tmp", part_of_names(self.template), weights_stem(self.template)
            _stream(inside, weights, header, self._side_files(live), stem=stem, parts=parts)
            for path in inside.iterdir():
                path.rename(folder / path.name)
            inside.rmdir()
        elif self.format == "dcp" or isinstance(live, LazyWeights):
            _stream(folder / self.path, weights, header, {}, dcp=self.format == "dcp")
        else:
            save_weights(dict(weights), folder / self.path, dict(header))

    def _write_lightning(self, path: Path, weights: LazyWeights, header: Mapping[str, str]) -> None:
        content: dict[str, Any] = {}
        raw = list(self.model.state_dict())
        if self.template is not None:
            with contextlib.suppress(pickle.UnpicklingError):  # of classes that are not loaded: then only the weights
                content = torch.load(self.template, map_location="cpu", weights_only=True, mmap=True)
                raw = list(content["state_dict"])
        stored = {name: weights[canonical].clone() for canonical, name in canonical_names(raw).items()}
        kept = {key: value for key, value in content.items() if key not in OF_TRAINING}
        fresh = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": L.__version__}
        options = {} if content else {"hyper_parameters": dict(self.model.hparams)}
        plain = {key: str(text) for key, text in header.items()}  # not a TorchVersion, which torch.load refuses
        torch.save({**fresh, **options, **kept, "state_dict": stored, "tva": plain}, path)


def _stream(
    path: Path, weights: LazyWeights, header: Mapping[str, str], side_files: Mapping[str, bytes | Path], **options: Any
) -> None:
    specs = {name: weights.spec(name) for name in weights}
    with Output(path, specs, header, {}, SHARD, **options) as out:
        for name in weights:
            start, entry = 0, weights.entry(name)
            for part in getattr(entry, "parts", lambda entry=entry: [entry.read().contiguous()])():
                out.write(name, start, Elements.of(part))
                start += part.numel()
            out.finish(name, {"edited": ""})
        out.commit(header, side_files)


def undo_name(form: Form) -> str:
    """Return the name of the undo file in the folder of an edit."""
    return undo_path(Path(EDITED)).name if form.path == EDITED else UNDO_OF_FOLDER


def _matching(model: L.LightningModule, live: Mapping[str, Tensor], stored: LazyWeights) -> dict[str, str] | None:
    """Return the stored names to the model's, which may be a part of what is stored; None if no mapping fits."""
    prefix, _ = network_of(model)
    own = {name.removeprefix(prefix): name for name in live}
    first: dict[Any, str] = {}
    if isinstance(live, LazyWeights):
        places = {name: live.entry(name).location for name in live}
    else:
        places = {n: (t.data_ptr(), t.shape, t.stride()) for n, t in live.items() if t.numel()}
    tied = {name for name, place in places.items() if first.setdefault(place, name) != name}
    once = [name for name, old in own.items() if old not in tied]
    pooled = [name for name in once if not name.startswith(POOLER)]  # random where the folder has none
    for names in (live, own, once, pooled):
        for subset in (False, True):
            try:
                found = match_names(names, stored, subset=subset).names
            except MismatchError:
                continue
            mapping = {new: own.get(old, old) for new, old in found.items()}
            if all(stored.spec(name).shape == form_of(live, old)[1] for name, old in mapping.items()):
                return mapping
    return None

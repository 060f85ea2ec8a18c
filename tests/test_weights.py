"""Opening checkpoints: every format gives the same mapping, and what is no checkpoint is refused with the reason."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from tva import fingerprint, open_weights, save_weights
from tva.weights import atomic_path, canonical_names

STATE = {"a.w": torch.arange(6.0).reshape(2, 3), "a.b": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(3)}


def write(folder, kind):
    if kind == "safetensors":
        save_weights(STATE, folder / "m.safetensors")
        return folder / "m.safetensors"
    if kind in ("pt", "pth", "bin"):
        torch.save(STATE, folder / f"m.{kind}")
        return folder / f"m.{kind}"
    if kind == "ckpt":
        torch.save({"state_dict": STATE, "epoch": 3, "optimizer_states": [{"x": torch.ones(2)}]}, folder / "m.ckpt")
        return folder / "m.ckpt"
    if kind == "old zip-less pt":
        torch.save(STATE, folder / "m.pt", _use_new_zipfile_serialization=False)
        return folder / "m.pt"
    if kind == "compiled":
        torch.save({name.replace("a.", "a._orig_mod."): value for name, value in STATE.items()}, folder / "m.pt")
        return folder / "m.pt"
    if kind == "ddp":
        torch.save({f"module.{name}": value for name, value in STATE.items()}, folder / "m.pt")
        return folder / "m.pt"
    if kind == "folder":
        save_weights(STATE, folder / "model.safetensors")
    if kind == "sharded":
        save_file({"a.w": STATE["a.w"]}, folder / "model-1.safetensors")
        save_file({"a.b": STATE["a.b"], "n": STATE["n"]}, folder / "model-2.safetensors")
        shards = {"a.w": "model-1.safetensors", "a.b": "model-2.safetensors", "n": "model-2.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return folder


KINDS = ["safetensors", "pt", "pth", "bin", "ckpt", "old zip-less pt", "compiled", "ddp", "folder", "sharded"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_mapping(tmp_path, kind):
    weights = open_weights(write(tmp_path, kind))
    assert set(weights) == set(STATE)
    assert fingerprint(weights) == fingerprint(STATE)
    assert "a.w" in weights
    assert "other" not in weights
    with pytest.raises(KeyError):
        weights["other"]


def test_prefix_keeps_and_strips(tmp_path):
    path = write(tmp_path, "safetensors")
    assert set(open_weights(path, prefix="a.")) == {"w", "b"}
    with pytest.raises(ValueError, match=r"no weights under 'model\.'; its prefixes are 'a\.'"):
        open_weights(path, prefix="model.")


def test_names_that_would_fall_together_are_refused():
    with pytest.raises(ValueError, match=r"would both be called 'net\.w'"):
        canonical_names(["net.w", "net._orig_mod.w"])
    assert canonical_names(["module.a", "b"]) == {"module.a": "module.a", "b": "b"}  # no wrapper: one name differs


def test_a_missing_file_names_its_neighbors(tmp_path):
    write(tmp_path, "pt")
    with pytest.raises(FileNotFoundError, match=r"m\.pth.*holds 'm\.pt'"):
        open_weights(tmp_path / "m.pth")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_weights(tmp_path / "nowhere" / "m.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.txt", b"hello", "name must end in"),
        ("m.safetensors", b"hello", "no safetensors file, or is damaged"),
        ("m.pt", b"hello", "no PyTorch checkpoint"),
        ("m.ckpt", b"PK\x03\x04 cut off", "no PyTorch checkpoint, or is damaged"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_weights(tmp_path / name)


def test_pickled_modules_are_refused_and_never_run(tmp_path):
    marker = tmp_path / "executed"

    class Local:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    torch.save({"state_dict": {"w": torch.ones(1)}, "callbacks": Local()}, tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match=r"could run code when loaded"):
        open_weights(tmp_path / "m.ckpt")
    assert not marker.exists()


def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path):
    torch.save({"epoch": 3, "loss": 0.5}, tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match="holds no state dict.*'epoch', 'loss'"):
        open_weights(tmp_path / "m.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no checkpoint folder.*holds nothing"):
        open_weights(tmp_path / "empty")


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, "sharded")
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names the shard model-2\.safetensors"):
        open_weights(tmp_path)


def test_atomic_path_leaves_the_old_file_or_none_when_writing_fails(tmp_path):
    (tmp_path / "kept").write_text("old")
    for name in ("kept", "new"):
        with pytest.raises(RuntimeError), atomic_path(tmp_path / name) as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "old"


def test_files_are_readable_as_the_umask_says(tmp_path):
    save_weights(STATE, tmp_path / "m.safetensors")
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "m.safetensors").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


def test_tied_weights_are_written_under_both_names(tmp_path):
    tied = torch.arange(4.0)
    save_weights({"a": tied, "b": tied, "part": tied[1:]}, tmp_path / "m.safetensors")
    weights = open_weights(tmp_path / "m.safetensors")
    assert torch.equal(weights["a"], weights["b"])
    assert torch.equal(weights["part"], tied[1:])

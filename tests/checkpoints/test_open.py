"""Opening checkpoints: every format gives the same mapping, and what is not a checkpoint is refused with the reason."""

import argparse
import collections
import json
import os
import re
import stat
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tva import fingerprint, open_weights, save_weights
from tva.checkpoints import atomic_path, canonical_names, tensor_digest
from tva.checkpoints.lazy import MAPPED_BYTES, OpenFile

STATE = {"a.w": torch.arange(6.0).reshape(2, 3), "a.b": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(3)}


def write(kind, folder=Path()):
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


ODD = {
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
    "bool": torch.tensor([True, False, True]),
    "complex": torch.tensor([1 + 2j]),
    "float8": torch.tensor([1.0, -2.0, 0.5]).to(torch.float8_e4m3fn),
    "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "every second": torch.arange(10)[1::2],
    "expanded": torch.ones(1, dtype=torch.float16).expand(3, 2),
    "parameter": nn.Parameter(torch.arange(3.0)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_mapping(kind):
    weights = open_weights(write(kind))
    assert set(weights) == set(STATE)
    assert fingerprint(weights) == fingerprint(STATE)
    assert "a.w" in weights
    assert "other" not in weights
    with pytest.raises(KeyError):
        weights["other"]


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_odd_tensors_are_read_whole_and_in_part(name):
    state = {**ODD, "tied": ODD["scalar"]}
    save_weights(state, name) if name.endswith("safetensors") else torch.save(state, name)
    weights = open_weights(name)
    assert list(weights.keys() ^ state.keys()) == []
    for key, tensor in state.items():
        tensor = tensor.detach()
        assert weights.spec(key) == (tensor.dtype, tensor.shape)
        assert tensor_digest(weights[key]) == tensor_digest(tensor), key
        for start in range(tensor.numel()):
            part = weights.slice(key, start, tensor.numel())
            assert tensor_digest(part) == tensor_digest(tensor.reshape(-1)[start:]), key
    with pytest.raises(ValueError, match="has elements 0 to 3; 1 to 4 were asked for"):
        weights.slice("bool", 1, 4)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_only_the_bytes_that_are_asked_for_are_read(name, monkeypatch):
    state = {"large": torch.zeros(100_000), "small": torch.ones(8)}
    save_weights(state, name) if name.endswith("safetensors") else torch.save(state, name)
    read = []
    real = OpenFile.read_into
    monkeypatch.setattr(OpenFile, "read_into", lambda self, out, at: read.append(out.nbytes) or real(self, out, at))
    weights = open_weights(name)
    weights.spec("large")
    assert sum(read) < 20_000
    read.clear()
    assert torch.equal(weights.slice("large", 7, 10), torch.zeros(3))
    assert sum(read) == 12


def test_editing_a_tensor_changes_neither_the_file_nor_a_later_read():
    state = {"small": torch.arange(6.0), "large": torch.arange(MAPPED_BYTES // 4).float()}
    for name in ("m.safetensors", "m.pt", "old.pt"):
        if name == "m.safetensors":
            save_weights(state, name)
        else:
            torch.save(state, name, _use_new_zipfile_serialization=name == "m.pt")
        weights = open_weights(name)
        for key, tensor in state.items():
            first = weights[key]
            first.zero_()
            weights.slice(key, 0, 6).zero_()
            assert torch.equal(weights[key], tensor), (name, key)
            assert torch.equal(open_weights(name)[key], tensor), (name, key)
            assert not first.any()


def test_large_tensors_are_mapped_so_that_asking_for_one_reads_nothing(monkeypatch):
    state = {"odd": torch.ones(1, dtype=torch.bool), "large": torch.arange(MAPPED_BYTES // 4).float()}
    for name in ("m.safetensors", "m.pt"):
        save_weights(state, name) if name.endswith("safetensors") else torch.save(state, name)
        weights = open_weights(name)
        with monkeypatch.context() as patch:
            patch.setattr(OpenFile, "read_into", lambda *_: pytest.fail("read"))
            assert torch.equal(weights["large"], state["large"])
        os.truncate(name, MAPPED_BYTES // 2)
        with pytest.raises(ValueError, match=rf"ended at byte {MAPPED_BYTES // 2} where \d+ more were expected"):
            weights["large"]


def test_a_file_that_is_replaced_is_still_read_as_it_was_opened():
    path = write("safetensors")
    weights = open_weights(path)
    save_weights({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, path)
    assert fingerprint(weights) == fingerprint(STATE)


def test_what_is_cut_off_is_never_read_as_something_else():
    for kind in ("safetensors", "pt"):
        path = write(kind)
        whole = path.read_bytes()
        weights = open_weights(path)
        os.truncate(path, 10)
        with pytest.raises(ValueError, match=r"ended at byte \d+ where \d+ more were expected"):
            weights["a.w"]
        for size in range(0, len(whole), 61):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match="is damaged|not a PyTorch checkpoint"):
                open_weights(path)


def averaged(folder, callback):
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 1)

        def training_step(self, batch):
            return self.net(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

        def train_dataloader(self):
            return [torch.ones(1, 2)]

    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saver = L.pytorch.callbacks.ModelCheckpoint(dirpath=folder, filename="m", every_n_epochs=2)
    trainer = L.Trainer(max_epochs=2, callbacks=[callback, saver] if callback else [saver], **options)
    trainer.fit(Module())
    return folder / "m.ckpt"


def test_raw_and_averaged_weights_are_distinguished():
    from lightning.pytorch.callbacks import EMAWeightAveraging

    path = averaged(Path(), EMAWeightAveraging(decay=0.5))
    stored = torch.load(path, weights_only=True)
    default, mean, raw = (open_weights(path, which=which) for which in ("checkpoint", "averaged", "raw"))
    assert default.info.format == "Lightning checkpoint"
    assert (default.info.which, mean.info.which, raw.info.which) == ("averaged", "averaged", "raw")
    assert fingerprint(default) == fingerprint(mean) == fingerprint(stored["state_dict"])
    assert fingerprint(raw) == fingerprint(stored["current_model_state"])
    assert not torch.equal(raw["net.bias"], mean["net.bias"])


def test_asking_for_averaged_weights_that_are_not_there_says_what_is():
    torch.save({"state_dict": STATE, "epoch": 1}, "m.ckpt")
    with pytest.raises(ValueError, match="does not hold both raw and averaged.*it holds 'state_dict', 'epoch'"):
        open_weights("m.ckpt", which="averaged")
    with pytest.raises(ValueError, match="is a safetensors file, which holds one set of weights"):
        open_weights(write("safetensors"), which="raw")


def test_the_one_state_dict_in_a_file_is_found_and_several_are_refused():
    torch.save({"model": STATE, "optimizer": {"state": {0: torch.ones(1)}}}, "m.pt")
    weights = open_weights("m.pt")
    assert fingerprint(weights) == fingerprint(STATE)
    assert weights.info.notes == ("the weights are those under 'model'",)
    torch.save({"model": STATE, "model_ema": STATE}, "m.pt")
    with pytest.raises(ValueError, match="holds 2 state dicts, 'model', 'model_ema'"):
        open_weights("m.pt")


def test_extra_state_is_left_out_and_said():
    torch.save({**STATE, "a._extra_state": {"scale": 2}}, "m.pt")
    weights = open_weights("m.pt")
    assert set(weights) == set(STATE)
    assert weights.info.notes == ("left out as they are not tensors: 'a._extra_state'",)


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.ones(2, device="meta")], ids=["sparse", "meta"])
def test_tensors_that_are_not_plain_are_refused(tensor):
    torch.save({"w": tensor, "b": torch.ones(1)}, "m.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        open_weights("m.pt")


def test_torchscript_is_refused_with_the_way_to_convert_it():
    name = Path("m.pt")
    with zipfile.ZipFile(name, "w") as archive:
        archive.writestr("m/data.pkl", b"")
        archive.writestr("m/constants.pkl", b"")
    with pytest.raises(ValueError, match="TorchScript archive: load it with torch.jit.load"):
        open_weights(name)


def test_info_says_what_was_done_to_names():
    weights = open_weights(write("ddp"), prefix="a.", key_map={"^w$": "weight"})
    assert set(weights) == {"weight", "b"}
    assert "dropped what wrappers add ('module.', '_orig_mod') from 3 of 3 names" in str(weights.info)
    assert "kept 2 of 3 names, those under 'a.', without it; key_map renamed 1 of 2 names" in str(weights.info)


def test_prefix_keeps_and_strips():
    path = write("safetensors")
    assert set(open_weights(path, prefix="a.")) == {"w", "b"}
    with pytest.raises(ValueError, match=r"no weights under 'model\.'; its prefixes are 'a\.'"):
        open_weights(path, prefix="model.")


def test_names_that_would_fall_together_are_refused():
    with pytest.raises(ValueError, match=r"would both be called 'net\.w'"):
        canonical_names(["net.w", "net._orig_mod.w"])
    assert canonical_names(["module.a", "b"]) == {"module.a": "module.a", "b": "b"}  # no wrapper: one name differs


def test_a_missing_file_names_its_neighbors():
    write("pt")
    with pytest.raises(FileNotFoundError, match=r"m\.pth.*holds 'm\.pt'"):
        open_weights("m.pth")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_weights("nowhere/m.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.txt", b"hello", "not a checkpoint that tva reads: it is text that begins with 'hello'"),
        ("m.safetensors", b"hello", "not a safetensors file, or is damaged"),
        ("m.pt", b"hello", "not a PyTorch checkpoint"),
        ("m.ckpt", b"PK\x03\x04 cut off", "not a PyTorch checkpoint, or is damaged"),
        ("x.safetensors.index.json", b"[]", "index.json must be an object; it is a list"),
    ],
)
def test_what_is_no_checkpoint_is_refused(name, content, message):
    Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_weights(name)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("old_format", [False, True])
def test_nothing_in_a_checkpoint_is_ever_executed(old_format):
    marker, path = Path("executed"), Path("m.ckpt")
    for content in (Evil(marker), {"model": Evil(marker)}, {"w": torch.ones(1), "x": Evil(marker)}):
        torch.save(content, path, _use_new_zipfile_serialization=not old_format)
        with pytest.raises(ValueError, match=r"could run code when loaded|holds no state dict"):
            open_weights(path)
    torch.save({"state_dict": {"w": torch.ones(1)}, "callbacks": Evil(marker)}, path)
    weights = open_weights(path)  # the weights are tensors; the rest is left as it is
    assert torch.equal(weights["w"], torch.ones(1))
    assert weights.info.notes == (f"classes not loaded: '{os.mkdir.__module__}.mkdir'",)
    assert not marker.exists()


def test_a_pickled_module_is_refused_with_the_way_to_convert_it():
    path = Path("m.pt")
    for content, part in ((nn.Linear(2, 1), ""), ({"model": nn.Linear(2, 1), "epoch": 3}, r"\['model'\]")):
        torch.save(content, path)
        with pytest.raises(ValueError, match="class torch.nn.modules.linear.Linear") as refused:
            open_weights(path)
        assert re.search(rf"weights_only=False\){part}\n", str(refused.value))
        lines = [line.strip() for line in str(refused.value).splitlines()[1:]]
        exec("\n".join(lines), {})
        assert set(open_weights("m-state-dict.pt")) == {"weight", "bias"}


def test_foreign_hyperparameters_do_not_keep_weights_from_being_read():
    hyper_parameters = {"path": Path("x"), "dtype": torch.float16, "args": argparse.Namespace(lr=0.1)}
    hyper_parameters["found"] = collections.defaultdict(list, {"a": [1]})
    content = {"state_dict": nn.Linear(2, 1).state_dict(), "hyper_parameters": hyper_parameters, "epoch": 1}
    torch.save(content, "m.ckpt")
    weights = open_weights("m.ckpt")
    assert fingerprint(weights) == fingerprint(content["state_dict"])
    assert "argparse.Namespace" in str(weights.info)


def test_a_file_without_a_state_dict_says_what_it_holds():
    torch.save({"epoch": 3, "loss": 0.5}, "m.ckpt")
    with pytest.raises(ValueError, match="holds no state dict.*'epoch', 'loss'"):
        open_weights("m.ckpt")
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="not a checkpoint folder.*holds nothing"):
        open_weights("empty")


def test_an_index_that_is_of_another_checkpoint_is_refused():
    folder = write("sharded")
    save_file({"n": STATE["n"], "more": torch.ones(1)}, folder / "model-2.safetensors")
    with pytest.raises(ValueError, match=r"says that 'a.b is in model-2.safetensors', but it is not there"):
        open_weights(folder)
    save_file({"n": STATE["n"], "a.b": STATE["a.b"], "more": torch.ones(1)}, folder / "model-2.safetensors")
    weights = open_weights(folder / "model.safetensors.index.json")
    assert set(weights) == set(STATE)
    assert weights.info.format == "safetensors file, 2 shards"
    assert weights.info.notes == ("left out 1 tensors that the index does not list: 'more'",)


def test_sharded_bin_and_single_files_of_a_folder_are_found():
    torch.save({"a.w": STATE["a.w"]}, "pytorch_model-1.bin")
    torch.save({"a.b": STATE["a.b"], "n": STATE["n"]}, "pytorch_model-2.bin")
    shards = {"a.w": "pytorch_model-1.bin", "a.b": "pytorch_model-2.bin", "n": "pytorch_model-2.bin"}
    Path("pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    assert fingerprint(open_weights(".")) == fingerprint(STATE)
    Path("one").mkdir()
    torch.save(STATE, "one/anything.pt")
    assert fingerprint(open_weights("one")) == fingerprint(STATE)
    torch.save(STATE, "one/other.pt")
    with pytest.raises(ValueError, match="one checkpoint and no other.*'anything.pt', 'other.pt'"):
        open_weights("one")


def test_a_missing_shard_is_named():
    write("sharded")
    Path("model-2.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"names 2 shards, and 1 of them are not beside it: 'model-2\.safetensors'"
    ):
        open_weights(".")


def test_atomic_path_leaves_the_old_file_or_none_when_writing_fails():
    Path("kept").write_text("old")
    for name in ("kept", "new"):
        with pytest.raises(RuntimeError), atomic_path(Path(name)) as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert [file.name for file in Path().iterdir()] == ["kept"]
    assert Path("kept").read_text() == "old"


def test_files_are_readable_as_the_umask_says():
    save_weights(STATE, "m.safetensors")
    Path("plain").touch()
    assert stat.S_IMODE(Path("m.safetensors").stat().st_mode) == stat.S_IMODE(Path("plain").stat().st_mode)


def test_tied_weights_are_written_under_both_names():
    tied = torch.arange(4.0)
    save_weights({"a": tied, "b": tied, "part": tied[1:]}, "m.safetensors")
    weights = open_weights("m.safetensors")
    assert torch.equal(weights["a"], weights["b"])
    assert torch.equal(weights["part"], tied[1:])


# --- content decides the format, and a format is one file


@pytest.mark.parametrize("kind", ["safetensors", "pt", "old zip-less pt", "ckpt"])
@pytest.mark.parametrize("name", ["m.bin", "m.safetensors", "m.pth.tar", "m.part-1", "m"])
def test_content_decides_the_format_whatever_the_file_is_called(kind, name):
    path = write(kind).rename(name)
    assert fingerprint(open_weights(path)) == fingerprint(STATE)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x1f\x8b\x08\x00", "a gzip file: unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS, which 'git lfs pull' replaces"),
        (b"\x00\x01\x02\x03", "its content, of 4 bytes, is not known"),
    ],
)
def test_what_a_file_is_instead_is_named(content, found):
    Path("m.weights").write_bytes(content)
    with pytest.raises(ValueError, match=f"m.weights is not a checkpoint that tva reads: .*{found}"):
        open_weights("m.weights")
    if content:
        for name in ("m.pt", "m.safetensors"):
            Path(name).write_bytes(content)
            with pytest.raises(ValueError, match="is not a (PyTorch checkpoint|safetensors file)"):
                open_weights(name)


FORMAT = '''
"""Lines of a name and numbers."""
import torch
from tva.checkpoints import Info, LazyWeights
from tva.checkpoints.lazy import InMemory

def matches(path):
    return path.is_file() and path.read_bytes().startswith(b"#lines")

def open(path, which):
    rows = [line.split() for line in path.read_text().splitlines()[1:]]
    entries = {name: InMemory(torch.tensor([float(n) for n in numbers])) for name, *numbers in rows}
    return LazyWeights(Info(path, "lines"), entries)
'''


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a module of a format under a name, as a package with an entry point does."""
    from tva.plugins import installed

    def install(name, code):
        module = f"{name}_of_a_package"
        Path(f"{module}.py").write_text(code)
        folder = Path(f"{module}-1.dist-info")
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n")
        (folder / "entry_points.txt").write_text(f"[tva.checkpoint_formats]\n{name} = {module}\n")
        installed.cache_clear()

    monkeypatch.syspath_prepend(tmp_path)
    installed.cache_clear()
    yield install
    installed.cache_clear()


def test_a_package_adds_a_format_by_an_entry_point(install):
    path = Path("m.lines")
    path.write_text("#lines\na.w 1 2\na.b 0.5\n")
    with pytest.raises(ValueError, match="it is text that begins with '#lines"):
        open_weights(path)
    install("lines", FORMAT)
    weights = open_weights(path, prefix="a.")
    assert weights.info.format == "lines"
    assert fingerprint(weights) == fingerprint({"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.5])})
    install("alike", FORMAT)
    with pytest.raises(ValueError, match="matches more than one checkpoint format: 'alike', 'lines'"):
        open_weights(path)


def test_a_format_may_not_take_the_name_of_another(install):
    install("safetensors", FORMAT)
    with pytest.raises(ValueError, match="The checkpoint format 'safetensors' of .* has the name of another"):
        open_weights(write("safetensors"))


def test_a_safetensors_header_may_begin_with_any_byte():
    """Its length is in the first bytes of the file, where other formats have theirs."""
    for length in (0x80, 0x280, 0x480, 0x8A0280):
        text = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
        Path("m").write_bytes(length.to_bytes(8, "little") + text + b"\0\0\x80?")
        assert open_weights("m")["w"].item() == 1


def test_weights_that_a_file_holds_beside_those_that_are_taken_are_named():
    weights = {"w": torch.ones(2)}
    torch.save({"epoch": 3, "state_dict": weights, "state_dict_ema": {"w": torch.zeros(2)}}, "timm.pth.tar")
    opened = open_weights("timm.pth.tar")
    assert torch.equal(opened["w"], weights["w"])
    assert "took the weights under 'state_dict', and left those under 'state_dict_ema'" in str(opened.info)

"""Folders of torch.distributed.checkpoint that tva writes: torch's own loader reads them, and so does tva."""

import io
import json
import os
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small_models import run_ranks
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from tva import TaskVector, fingerprint, open_weights, save_weights
from tva.checkpoints import Elements, Output, Spec
from tva.checkpoints.dcp_writer import _frame
from tva.cli.main import main
from tva.compose import compose
from tva.compose.verify import verify

TENSORS = {
    "rows": torch.arange(15.0).reshape(5, 3),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "half": torch.randn(3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "eight bits": torch.arange(4.0).to(torch.float8_e4m3fn),
    "complex": torch.tensor([1 + 2j, 3 - 1j]),
    "mask": torch.tensor([True, False]),
    "unsigned": torch.tensor([1, 2], dtype=torch.uint16),
}


def write(path, tensors, size=60, metadata=None):
    specs = {name: Spec(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with Output(path, specs, metadata or {}, {}, size, dcp=True) as out:
        for name, tensor in tensors.items():
            out.write(name, 0, Elements.of(tensor))
            out.finish(name, {"edited": ""})
        out.commit(metadata or {}, {})


def load(path, like):
    found = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(found, checkpoint_id=str(path))
    return found


def test_torch_loads_what_is_written():
    write(Path("out"), TENSORS)
    assert len(list(Path("out").glob("*.distcp"))) == 2
    for found in (load("out", TENSORS), open_weights("out")):
        assert fingerprint(found) == fingerprint(TENSORS)


def _load_sharded(folder):
    torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(15.0).reshape(5, 3)
    state = {"rows": distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)])}
    dcp.load(state, checkpoint_id=str(folder / "out"))
    assert torch.equal(state["rows"].full_tensor(), whole)
    torch.distributed.destroy_process_group()


def test_two_processes_load_a_part_each():
    write(Path("out"), TENSORS)
    run_ranks(_load_sharded, Path())


def test_an_archive_of_more_than_4_gib_has_its_sizes_where_zip_has_room_for_them():
    spec = Spec(torch.uint8, (2**32 + 5,))
    before, after = _frame(spec)
    end = zipfile._EndRecData(_Sparse(before, spec.num_bytes, after))
    assert end[zipfile._ECD_OFFSET] == len(before) + spec.num_bytes
    with zipfile.ZipFile(_Sparse(before, spec.num_bytes, after)) as archive:
        assert archive.getinfo("archive/data/0").file_size == spec.num_bytes
        assert archive.read("archive/version") == b"3\n"


class _Sparse(io.RawIOBase):
    """A file with a large hole."""

    def __init__(self, before, hole, after):
        self.before, self.hole, self.after, self.at = before, hole, after, 0
        self.size = len(before) + hole + len(after)

    def seekable(self):
        return True

    def readable(self):
        return True

    def tell(self):
        return self.at

    def seek(self, offset, whence=0):
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def read(self, count=-1):
        first, second = len(self.before), len(self.before) + self.hole
        count = self.size - self.at if count < 0 else min(count, self.size - self.at)
        data = bytes(
            self.before[place] if place < first else self.after[place - second] if place >= second else 0
            for place in range(self.at, self.at + count)
        )
        self.at += count
        return data


@pytest.fixture
def models():
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{n}.w": torch.randn(40, 30, generator=generator) for n in range(6)}
    base["steps"] = torch.tensor(3)
    save_weights(base, "base.safetensors")
    tuned = {name: tensor + 0.1 if tensor.is_floating_point() else tensor for name, tensor in base.items()}
    TaskVector.between(base, tuned).save("a.tv.safetensors")
    return base


def test_compose_writes_it_and_verify_recomputes_it(models, capsys):
    words = ["compose", "--base", "base.safetensors", "--vectors.a", "a.tv.safetensors", "--recipe", "0.5 * a"]
    main([*words, "--output", "out", "--format", "dcp", "--max_shard_size", "10KB"])
    main([*words, "--output", "out.safetensors"])
    plain = open_weights("out.safetensors")
    assert fingerprint(open_weights("out")) == fingerprint(plain)
    assert fingerprint(load("out", models)) == fingerprint(plain)
    assert len(list(Path("out").glob("*.distcp"))) == 3
    assert json.loads(Path("out/tva.json").read_text())["tva.recipe"] == "0.5 * a"
    assert verify("out").holds
    main([*words, "--output", "spread", "--format", "dcp", "--max_shard_size", "10KB", "--engine", "local:1"])
    assert fingerprint(load("spread", models)) == fingerprint(plain)
    assert not list(Path().glob(".*"))


def test_tied_weights_have_both_names():
    write(Path("out"), {"embed": torch.arange(6.0)}, metadata={"head": "embed", "format": "embed", "tva.x": "embed"})
    found = load("out", {"embed": torch.zeros(6), "head": torch.zeros(6)})
    assert torch.equal(found["head"], torch.arange(6.0))
    assert sorted(open_weights("out")) == ["embed", "head"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "x.safetensors"}, "format='dcp' writes a folder, and the output is x.safetensors"),
        ({"keep_undo": True}, "format='dcp' cannot be combined with keep_undo"),
        ({"format": "hdf5"}, "format must be 'safetensors' or 'dcp'; found 'hdf5'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(models, changes, message):
    options = {"output": "out", "format": "dcp"} | changes
    with pytest.raises(ValueError, match=message):
        compose("base.safetensors", {"a": "a.tv.safetensors"}, "a", **options)

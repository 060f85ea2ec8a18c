"""Files of unknown origin: what would take forever or all memory, and JSON of another form, ends as an error."""

import io
import json
import os
import pickle
import re
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_states import save_distributed

from tva import MismatchError, TaskVector, open_weights, save_weights
from tva.checkpoints import open_finetuned, side_files
from tva.checkpoints.foreign import parse_json
from tva.checkpoints.formats.torch_distributed import _Chunk, _tile
from tva.checkpoints.inert_pickle import InertUnpickler, check_pickle
from tva.checkpoints.tokenizers import token_ids
from tva.cli.main import main


@pytest.fixture(autouse=True)
def _quick():
    start = time.process_time()  # not what other processes take
    yield
    assert time.process_time() - start < 10


def archive(path, pickled, **more):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", pickled)
        for name, (data, compression) in more.items():
            file.writestr(f"m/{name}", data, compression)
    return path


def doubled(depth, put):
    """Pickle a key or item that holds another twice, which holds another twice, and so on."""
    tuples = b"".join(b"\x85" if n == 0 else b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(depth))
    return b"\x80\x02" + put(b"K\x01" + tuples)


BOMBS = {
    "key": doubled(60, lambda key: b"}" + key + b"K\x01s."),
    "keys": doubled(60, lambda key: b"}(" + key + b"K\x01u."),
    "dict": doubled(60, lambda key: b"(" + key + b"K\x01d."),
    "item": b"\x80\x04" + doubled(60, lambda key: b"\x8f(" + key + b"\x90.")[2:],
    "frozen": b"\x80\x04" + doubled(60, lambda key: b"(" + key + b"\x91.")[2:],
    "set": doubled(60, lambda key: b"cbuiltins\nset\n](" + key + b"e\x85R."),
    "ordered": doubled(60, lambda key: b"ccollections\nOrderedDict\n](" + key + b"K\x01\x86e\x85R."),
    "memo": b"\x80\x02K\x01r\xff\xff\xff\x7f.",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_pickle_that_would_be_hashed_forever_is_refused(kind):
    with pytest.raises(pickle.UnpicklingError, match="a key is a tuple of more than|it numbers an object"):
        InertUnpickler(BOMBS[kind]).load()
    with pytest.raises(ValueError, match="m.pt is not a PyTorch checkpoint, or is damaged"):
        open_weights(archive(Path("m.pt"), BOMBS[kind]))
    Path(".metadata").write_bytes(BOMBS[kind])
    with pytest.raises(ValueError, match="is refused: it is damaged"):
        open_weights(".")


def test_pickles_of_every_protocol_are_followed():
    shared = ("a", 1)
    value = {"x": [shared, (shared, shared)], shared: {1, 2}, 3: frozenset([shared]), "d": {}, "b": b"1", "f": 1.5}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(value, protocol)
        check_pickle(io.BytesIO(data))
        if protocol > 1:
            assert InertUnpickler(data).load()["x"] == value["x"]


def test_foreign_objects_are_not_printed():
    """A list in a list, two hundred deep, prints as 2**200 brackets."""
    nested = []
    for _ in range(200):
        nested = [nested, nested]
    Path("d").mkdir()
    Path("d/.metadata").write_bytes(pickle.dumps(nested))
    with pytest.raises(ValueError, match="it holds a list where torch's Metadata was expected"):
        open_weights("d")
    with pytest.raises(ValueError, match="it holds a list"):
        open_weights(archive(Path("m.pt"), pickle.dumps(nested, 2)))


def test_what_is_compressed_in_an_archive_is_refused():
    with zipfile.ZipFile(Path("m.pt"), "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("m/data.pkl", bytes(2**20))
    with pytest.raises(ValueError, match="data.pkl is compressed, or larger"):
        open_weights("m.pt")
    path = archive(Path("n.pt"), pickle.dumps({}, 2), byteorder=(bytes(2**20), zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="byteorder is compressed, or larger"):
        open_weights(path)


def test_a_tensor_that_repeats_its_storage_into_terabytes_is_refused():
    torch.save({"w": torch.ones(1).expand(2**20, 2**20)}, "m.pt")
    with pytest.raises(ValueError, match="repeats a storage of 4 bytes"):
        open_weights("m.pt")


@pytest.mark.parametrize("name", ["model.safetensors", "m.pt", "model.safetensors.index.json", ".metadata", "latest"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_refused_without_waiting(tmp_path, name, kind):
    os.mkfifo(name) if kind == "pipe" else Path(name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=f"must be a regular file, and is a {kind}"):
        open_weights(tmp_path if name in (".metadata", "latest") else tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "is nested too deeply"),
        ('{"weight_map": ' + "[" * 200 + "]" * 200 + "}", "is nested 201 deep"),
        ('{"weight_map": {"a": 5}}', "'weight_map': 'a' must be text; it is 5"),
        ('{"weight_map": {}}', "a 'weight_map' that names tensors was expected"),
        ('{"weight_map": {"a": ""}}', "names '' as a shard"),
        ('{"weight_map": {"a": ".."}}', "names '..' as a shard"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "names '../model.safetensors' as a shard"),
        ('{"weight_map": {"a": "m.safetensors.index.json"}}', "names 'm.safetensors.index.json' as a shard"),
        ("{", "is not valid JSON"),
        (b"\x83", "for it is not text. Is another file meant?"),
        ("\ud800", "is not valid JSON"),
    ],
)
def test_an_index_of_another_form_is_refused_by_its_name(content, message):
    path = Path("m.safetensors.index.json")
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=f"m.safetensors.index.json.*{re.escape(message)}"):
        open_weights(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("untouched", "[1]"),
        ("untouched", '{"frozen": 5}'),
        ("buffers", "5"),
        ("base_tensors", '{"w": 5}'),
        ("metrics", "[]"),
        ("hyperparameters", "null"),
        ("step", '"x"'),
        ("hyperparameters", "[" * 100_000),
    ],
)
def test_a_field_of_a_vectors_header_of_another_form_is_named(field, value):
    vector = TaskVector.between({"w": torch.zeros(2)}, {"w": torch.ones(2)})
    vector.save("v.tv.safetensors")
    header = {**open_weights("v.tv.safetensors").metadata, f"tva.{field}": value}
    del header["tva.content_fingerprint"], header["tva.header_fingerprint"]  # as a file of before they were written
    save_file(load_file("v.tv.safetensors"), "v.tv.safetensors", header)
    with pytest.raises(ValueError, match=f"v.tv.safetensors: tva.{field}"):
        TaskVector.load("v.tv.safetensors")


def test_a_file_beside_weights_that_leads_out_of_the_folder_is_not_carried():
    Path("secret").write_text("mine")
    Path("b").mkdir()
    Path("b/real.txt").write_text("a")
    Path("b/link.txt").symlink_to("real.txt")
    assert set(side_files(Path("b"))[0]) == {"real.txt", "link.txt"}
    Path("b/vocab.txt").symlink_to("../secret")
    with pytest.raises(ValueError, match="vocab.txt is a link to .*secret, outside of"):
        side_files(Path("b"))
    snapshot = Path("models/snapshots/abc")  # of the hub's cache, whose files are links
    Path("models/blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    Path("models/blobs/1").write_text("v")
    (snapshot / "vocab.txt").symlink_to("../../blobs/1")
    (file,) = side_files(snapshot)[0].values()
    assert file.read_bytes() == b"v"


def boxes(*given):
    return [_Chunk(None, 0, 0, offsets, torch.Size(sizes), torch.float32) for offsets, sizes in given]


@pytest.mark.parametrize(
    ("given", "whole"),
    [
        ([((0, 0), (2, 3)), ((2, 0), (2, 3))], True),
        ([((0, 0), (4, 1)), ((0, 1), (4, 2))], True),
        ([((0, 0), (1, 3)), ((1, 0), (3, 1)), ((1, 1), (3, 2))], True),
        ([((0, 0), (2, 3)), ((0, 0), (2, 3))], False),
        ([((0, 0), (2, 3)), ((1, 0), (2, 3))], False),
        ([((0, 0), (2, 3)), ((3, 0), (2, 3))], False),
        ([((0, 0), (2, 3)), ((-2, 0), (2, 3))], False),
        ([((0, 0), (4, 2)), ((0, 1), (4, 1))], False),
        ([((0,), (12,))], False),
    ],
)
def test_parts_of_a_distributed_tensor_must_fill_it_exactly(given, whole):
    assert _tile(boxes(*given), torch.Size([4, 3])) is whole


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_folder_that_lists_a_part_twice_is_refused():
    save_distributed({"model": {"w": torch.arange(12.0).reshape(4, 3)}}, ".")
    metadata = pickle.loads(Path(".metadata").read_bytes())
    stored = metadata.state_dict_metadata["model.w"]
    stored.size, stored.chunks = torch.Size([8, 3]), stored.chunks * 2
    Path(".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"'model.w' of shape \[8, 3\] in parts that overlap"):
        open_weights(".")


@pytest.mark.parametrize("latest", ["../other", "/tmp", "..", ""])
def test_a_deepspeed_folder_stays_in_itself(latest):
    Path("d").mkdir()
    Path("other").mkdir()
    Path("d/latest").write_text(latest)
    with pytest.raises(FileNotFoundError, match="which is not a folder in"):
        open_weights("d")


def test_a_deepspeed_rank_of_a_billion_is_not_counted_up_to():
    Path("zero_pp_rank_1000000000_mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="of 1000000000 of 1000000001 ranks, the first of them 0, 1, 2"):
        open_weights(".")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"w": torch.ones(1), "step": None}, "'step' is None"),
        ({"w": torch.ones(1), "version": "1.0", "n": 3}, "of 3 entries, 'version' is '1.0', 'n' is 3. Save it again"),
        ({"state_dict": {"w": torch.ones(1), "n": 3}}, "in its 'state_dict', of 2 entries, 'n' is 3"),
        ({"w": torch.ones(1), 5: torch.ones(1)}, "the name 5 is not text"),
        ({"w": torch.ones(1), "s": torch.eye(2).to_sparse()}, "'s' is a sparse tensor"),
        ({"w": torch.ones(1), "m": torch.ones(2, device="meta")}, "'m' is a tensor without data"),
        ({"l.w": np.ones(2)}, "in it, of 1 entries, 'l.w' is"),
        ({"l.w": torch.ones(2).to_sparse()}, "in it, of 1 entries, 'l.w' is a sparse tensor"),
    ],
)
def test_the_entry_that_keeps_a_file_from_being_a_state_dict_is_named(content, message):
    torch.save(content, "m.pt")
    with pytest.raises(ValueError, match=f"m.pt holds no state dict.*{re.escape(message)}"):
        open_weights("m.pt")


def test_an_adapter_given_in_place_of_a_model_says_what_to_do(tmp_path):
    Path("adapter_config.json").write_text("{}")
    save_weights({"w": torch.ones(1)}, "adapter_model.safetensors")
    for path in (tmp_path, Path("adapter_model.safetensors")):
        with pytest.raises(ValueError, match="tva extract --base BASE --finetuned .* tva.checkpoints.open_adapter"):
            open_weights(path)


def test_a_tensor_whose_strides_are_truth_values_is_refused():
    torch.save({"w": torch.ones(1, 2)}, "sound.pt")
    with zipfile.ZipFile(Path("sound.pt")) as sound, zipfile.ZipFile(Path("m.pt"), "w") as made:
        for name in sound.namelist():
            data = sound.read(name)
            assert not name.endswith("data.pkl") or data.count(b"K\x02K\x01\x86") == 1
            made.writestr(name, data.replace(b"K\x02K\x01\x86", b"K\x02\x88\x86"))
    with pytest.raises(ValueError, match="m.pt"):
        open_weights("m.pt")


def test_an_integer_of_more_than_64_bits_is_refused_with_the_file():
    assert parse_json(f"[{2**64 - 1}, {-(2**63)}]", "x.json", [int]) == [2**64 - 1, -(2**63)]
    for number in (2**64, -(2**63) - 1, 10**400):  # charts, among others, take no larger ones
        with pytest.raises(ValueError, match=r"x.json is not valid JSON \(an integer of .* digits, where at most 64"):
            parse_json(f"[{number}]", "x.json", list)


def test_names_that_match_nothing_stay_an_error():
    save_weights({"x": torch.ones(1), "y": torch.ones(1)}, Path(Path("t.safetensors")))
    with pytest.raises(MismatchError, match="t.safetensors on the base: No single prefix"):
        open_finetuned("t.safetensors", {"a": torch.ones(1), "b": torch.ones(1)})


def test_thousands_of_other_names_are_refused_with_both_files(capsys):
    many = {f"t{at}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for at in range(2_000)}
    header = json.dumps(many).encode()
    Path("many.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    save_weights({"w": torch.ones(1)}, "base.safetensors")
    for base, other in (("many", "base"), ("base", "many")):
        words = ["--base", f"{base}.safetensors", "--finetuned", f"{other}.safetensors", "--output", "v.safetensors"]
        with pytest.raises(SystemExit):
            main(["extract", *words])
        assert f"{other}.safetensors on {base}.safetensors: " in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": None}, "model.vocab must map tokens to ids"),
        ({"model": {"vocab": [["a", 0.5], 3]}}, "model.vocab must map tokens to ids"),
        ({"model": {"vocab": {"a": "0"}}}, "the id of 'a' must be an integer; found '0'"),
        ({"model": {"vocab": {}}, "added_tokens": {"a": 1}}, "added_tokens must be a list of objects"),
        ({"model": {"vocab": {}}, "added_tokens": [{"content": ["a"]}]}, "must be an integer; found None"),
    ],
)
def test_a_tokenizer_of_another_form_is_an_error_with_its_path(content, message):
    Path("tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        token_ids(Path())
    assert "tokenizer.json" in str(caught.value)


def test_ids_of_a_unigram_tokenizer_are_its_places():
    content = {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": [{"content": "<s>", "id": 2}]}
    Path("tokenizer.json").write_text(json.dumps(content))
    assert token_ids(Path()) == {"a": 0, "b": 1, "<s>": 2}

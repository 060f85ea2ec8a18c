"""Folders of sentence-transformers with weights in several sub-folders: read, edited and written whole."""

import json
from pathlib import Path

import pytest
import torch

from tva import fingerprint, open_weights, save_weights
from tva.compose import compose, revert, verify
from tva.errors import MismatchError

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]


def write_folder(folder, seed, modules=MODULES):
    draw = torch.Generator().manual_seed(seed)
    for module in modules:
        (folder / module["path"]).mkdir(parents=True, exist_ok=True)
        (folder / module["path"] / "config.json").write_text("{}")
    (folder / "modules.json").write_text(json.dumps(modules))
    encoder = {"embeddings.w": torch.randn(5, 3, generator=draw), "layer.0.w": torch.randn(3, 3, generator=draw)}
    save_weights(encoder, folder / modules[0]["path"] / "model.safetensors")
    if len(modules) > 2:
        save_weights({"linear.weight": torch.randn(2, 3, generator=draw)}, folder / "2_Dense/model.safetensors")


@pytest.fixture
def folders(tmp_path):
    for seed, name in enumerate(("base", "tuned")):
        write_folder(Path(name), seed)
    return tmp_path


@pytest.mark.parametrize("max_shard_size", ["5GB", "40B"])
def test_weights_of_sub_folders_are_edited_and_written_where_they_were(folders, max_shard_size):
    base, tuned = open_weights("base"), open_weights("tuned")
    assert set(base) == {"0.model.embeddings.w", "0.model.layer.0.w", "2.linear.weight"}
    options = {"keep_undo": True, "max_shard_size": max_shard_size}
    report = compose("base", {"a": "tuned"}, "0.5 * a", "out", **options)
    assert not report.notes
    assert Path("out/1_Pooling/config.json").exists()
    for name in base:
        torch.testing.assert_close(open_weights("out")[name], (base[name] + tuned[name]) / 2)
    dense = open_weights("out/2_Dense")
    assert list(dense) == ["linear.weight"]
    assert verify("out").holds
    revert("out", output="again")
    assert fingerprint(open_weights("again")) == fingerprint(base)
    assert Path("again/2_Dense/model.safetensors").exists()


def test_a_folder_with_weights_in_one_place_has_the_encoders_own_names(folders):
    write_folder(Path("plain"), 0, MODULES[:2])
    assert set(open_weights("plain")) == {"embeddings.w", "layer.0.w"}
    old = [{**MODULES[0], "path": "0_Transformer"}, MODULES[1]]
    write_folder(Path("old"), 0, old)
    compose("old", {"a": "plain"}, "a", "same", scaling_coef=0.0)
    assert Path("same/0_Transformer/model.safetensors").exists()
    assert verify("same").holds


def test_an_encoder_is_not_taken_for_the_whole(folders):
    write_folder(Path("plain"), 2, MODULES[:2])
    with pytest.raises(MismatchError, match=r"They share 2 of 2 names under '0.model.'.*exclude"):
        compose("base", {"a": "plain"}, "a", "never")
    compose("base", {"a": "plain"}, "a", "out", exclude=r"^2[.]")
    assert torch.equal(open_weights("out")["2.linear.weight"], open_weights("base")["2.linear.weight"])
    Path("base/modules.json").write_text(json.dumps([{**MODULES[0], "path": "../tuned"}]))
    with pytest.raises(ValueError, match="is not a folder inside of base"):
        open_weights("base")

"""What comes out beside the weights: every file of the base's folder, under the names that loaders ask for."""

import json
from pathlib import Path

import pytest
import torch

from tva import open_weights, save_weights
from tva.checkpoints import side_files
from tva.compose.apply import compose
from tva.compose.revert import revert
from tva.vectors import extract

TUNED = "tuned.safetensors"

CARRIED = {
    "config.json": json.dumps({"dtype": "float32", "text_config": {"dtype": "float32", "tie_word_embeddings": True}}),
    "source.spm": "a",
    "bpe.codes": "b",
    "vocab.bpe": "c",
    "tokenizer.model.v3": "d",
    "1_Pooling/config.json": "{}",
    "additional_chat_templates/tools.jinja": "e",
    "LICENSE": "f",
}
LEFT = {
    "optimizer.pt": "", "trainer_state.json": "{}", "logs/a.txt": "", "events.out.tfevents.1": "", "train.log": "",
    "checkpoint-10/config.json": "{}", ".cache/x": "", "2_Dense/config.json": "{}", "2_Dense/pytorch_model.bin": "",
    "pooling.npz": "",
}  # fmt: skip


def weights(seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(8, 4, generator=generator)
    return {"embed_tokens.weight": embeddings, "lm_head.weight": embeddings + shift, "n": torch.arange(3) + seed}


@pytest.fixture
def model():
    for name, text in {**CARRIED, **LEFT}.items():
        path = Path(f"model/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    save_weights(weights(0), "model/model.safetensors")
    save_weights({**weights(1), "n": weights(0)["n"]}, TUNED)
    return Path("model")


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_every_file_that_describes_the_model_goes_along(model):
    report = compose("model", {"v": TUNED}, "v", "out")
    assert files(Path("out")) == {*CARRIED, "2_Dense/config.json", "model.safetensors"}
    for name, text in CARRIED.items():
        assert Path(f"out/{name}").read_text() == text
    (note,) = report.notes
    assert note.startswith("model/model.safetensors: not carried along: '2_Dense/pytorch_model.bin'")
    assert set(side_files(model)[1]) == {
        *("2_Dense/pytorch_model.bin", "checkpoint-10", "events.out.tfevents.1", "logs"),
        *("optimizer.pt", "pooling.npz", "train.log", "trainer_state.json"),
    }


@pytest.mark.parametrize("base", ["model", "model/diffusion_pytorch_model.safetensors"])
def test_weights_keep_their_name_and_a_file_beside_a_configuration_is_a_model(model, base):
    (model / "model.safetensors").rename(model / "diffusion_pytorch_model.safetensors")
    for path in ("optimizer.pt", "2_Dense/pytorch_model.bin"):
        (model / path).unlink()
    compose(base, {"v": TUNED}, "v", "out", keep_undo=True)
    found = files(Path("out"))
    assert {"diffusion_pytorch_model.safetensors", "config.json", "source.spm"} <= found
    assert not any(name.startswith("model.") for name in found)
    compose(base, {"v": TUNED}, "v", "shards", max_shard_size="100")
    assert "diffusion_pytorch_model.safetensors.index.json" in files(Path("shards"))
    assert torch.equal(open_weights("shards")["lm_head.weight"], open_weights("out")["lm_head.weight"])
    revert("out", output="back")
    assert "diffusion_pytorch_model.safetensors" in files(Path("back"))


def test_a_file_by_itself_brings_nothing(model):
    save_weights(weights(0), "base.safetensors")
    compose("base.safetensors", {"v": TUNED}, "v", "out")
    assert files(Path("out")) == {"model.safetensors"}


@pytest.mark.parametrize(("shift", "tied"), [(0.0, True), (1.0, False)])
def test_the_configuration_says_dtype_and_ties_in_every_part(model, shift, tied):
    save_weights(weights(1, shift), TUNED)
    compose("model", {"v": TUNED}, "v", "out", dtype="bfloat16")
    config = json.loads(Path("out/config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert config.get("tie_word_embeddings", True) is tied
    assert config["text_config"]["tie_word_embeddings"] is tied


def test_integers_that_differ_are_named_and_equal_ones_are_not(model):
    save_weights(weights(1), TUNED)
    report = compose("model", {"v": TUNED}, "v", "out.safetensors")
    (note,) = report.notes
    assert note.startswith("tuned.safetensors: 1 tensors of integers or booleans differ from the base")
    assert note.endswith("are kept: 'n'")
    save_weights({**weights(1), "n": weights(0)["n"]}, TUNED)
    assert compose("model", {"v": TUNED}, "v", "out.safetensors").notes == []


def test_a_fine_tuned_model_in_a_narrower_dtype_than_its_base_is_said_to_hold_its_rounding():
    base = {name: torch.randn(6, 5) for name in "ab"} | {"n": torch.tensor(3)}
    save_weights(base, "base.safetensors")
    save_weights({n: x.bfloat16() if n != "n" else x for n, x in base.items()}, TUNED)
    files = "base.safetensors", TUNED
    said = (
        "2 of 3 tensors are stored in bfloat16, and the base's in float32: their deltas hold the rounding to bfloat16"
    )
    (note,) = compose(files[0], {"v": files[1]}, "v", "out.safetensors").notes
    assert said in note
    assert said in extract(*files, "v.tv.safetensors").notes[0]
    other_way = compose(files[1], {"v": files[0]}, "v", "out2.safetensors", dtype="float32")
    assert other_way.notes == []


def test_links_that_lead_out_of_the_folder_are_refused(model):
    Path("secret.txt").write_text("secret")
    (model / "merges.txt").symlink_to("bpe.codes")
    assert "merges.txt" in side_files(model)[0]
    (model / "vocab.txt").symlink_to("../secret.txt")
    with pytest.raises(ValueError, match=r"vocab.txt is a link to .*secret.txt, outside of"):
        side_files(model)

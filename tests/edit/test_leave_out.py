"""An edit leaves names out by the rule of the other commands: of the model, of vector files and of checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from small_cli import write_yaml
from small_edit import Net, edit
from small_models import LinearNet

from tva import MismatchError, TaskVector, open_weights, save_weights
from tva.cli.main import main
from tva.compose.verify import verify

HEAD = r"^head[.]|^net[.]2[.]"


class WithHead(Net):
    """Has a tensor that its task vectors lack."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 2)


def given(vectors, model=None, folder=".", **changes):
    return edit(vectors, model, folder, recipe="a", maximize=None, scaling_coef=0.5, **changes)


def test_what_is_left_out_of_an_edit_keeps_the_models_weights_and_is_recorded(vectors):
    model = Net()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = given(vectors, model, exclude=["^net[.]2[.]"])
    delta = TaskVector.load(vectors["a"]).deltas
    edited = open_weights("out/edited.safetensors")
    for name in base:
        expected = base[name] if name.startswith("net.2.") else base[name] + 0.5 * delta[name]
        assert torch.equal(edited[name], expected), name
    content = json.loads(Path("out/edit.json").read_text())
    assert content["names"] == {"exclude": ["^net[.]2[.]"], "left_out": 2, "of": 4}
    (note,) = content["notes"]
    assert note.startswith("2 of the 4 tensors take no part and keep the model's weights (by exclude)")
    for file in ("report.html", "README.md"):
        assert "2 of the 4 tensors take no part" in Path(f"out/{file}").read_text()
    assert report.vectors["a"]["norm"] < TaskVector.load(vectors["a"]).norm()
    save_weights(base, "base.safetensors")
    assert verify("out/edited.safetensors", base="base.safetensors").holds


def test_a_checkpoint_and_a_vector_file_are_edited_alike_without_the_names_that_one_side_lacks(vectors):
    tuned = LinearNet().state_dict()
    deltas = TaskVector.load(vectors["a"]).deltas
    save_weights({name: tuned[name] + deltas[name] for name in tuned} | {"criterion.w": torch.ones(2)}, "a.ckpt")
    model, exclude = WithHead(), [HEAD, "^criterion[.]"]
    with pytest.raises(MismatchError, match="leave it out by exclude"):
        given({"a": "a.ckpt"}, model)
    with pytest.raises(MismatchError, match="are not there: 'head.weight', 'head.bias'.*by exclude"):
        given(vectors, model)
    found = {}
    for name, path, patterns in (("ckpt", "a.ckpt", exclude), ("file", vectors["a"], [HEAD])):
        given({"a": path}, WithHead(), exclude=patterns, folder=Path(name))
        found[name] = open_weights(f"{name}/out/edited.safetensors")
    assert all(torch.equal(found["file"][name], found["ckpt"][name]) for name in tuned)


def test_a_vector_of_another_base_is_refused_even_where_names_are_left_out(vectors):
    model = Net()
    with torch.no_grad():
        model.net[0].weight += 1
    with pytest.raises(MismatchError, match="taken from the base"):
        given(vectors, model, exclude=["^net[.]2[.]"])
    given(vectors, model, exclude=["^net[.]0[.]weight"])  # the rest is what it was taken from


def test_a_base_with_other_names_is_taken_for_what_takes_part(vectors):
    base = {name: tensor.clone() for name, tensor in LinearNet().state_dict().items()}
    save_weights({**base, "inv_freq": torch.ones(2)}, "base.safetensors")
    options = {"base": "base.safetensors"}
    with pytest.raises(MismatchError, match="inv_freq"):
        given(vectors, **options)
    given(vectors, **options, exclude="inv_freq")
    edited = open_weights("out/edited.safetensors")
    assert edited.keys() == {*base, "inv_freq"}  # the base's own form
    assert verify("out").holds


def test_a_pattern_that_matches_nothing_is_an_error(vectors):
    with pytest.raises(ValueError, match="exclude holds 'typo', which matches no name"):
        given(vectors, exclude=["typo"])
    with pytest.raises(ValueError, match=r"include holds '\(', which is not a regular expression"):
        given(vectors, include=["("])
    assert not Path("out").exists()


def test_include_and_exclude_are_options_of_the_command(vectors, capsys):
    task = {"a": {"class_path": "small_edit.Task", "init_args": {"seed": 1}}}
    content = {
        "model": {"class_path": "small_edit.Net"},
        "vectors": {"a": vectors["a"]},
        "recipe": "a",
        "targets": task,
    }
    content |= {"scaling_coef": 0.5, "output": "out", "trainer": {"accelerator": "cpu"}}
    words = ["edit", "--config", write_yaml(Path("edit.yaml"), content)]
    with pytest.raises(SystemExit, match="^2$"):
        main([*words, "--exclude", "typo"])
    assert "exclude holds 'typo'" in capsys.readouterr().err
    main([*words, "--include", "['[.]weight$']"])
    assert "note: 2 of the 4 tensors take no part" in capsys.readouterr().out.replace("\n", " ")

"""Names that only one side has: left out by a rule in every command that compares names, or said as what they are."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_adapters import adapted

from tva import MismatchError, TaskVector, fingerprint, open_weights, save_weights
from tva.checkpoints import open_finetuned
from tva.cli.main import main
from tva.compose.apply import compose
from tva.compose.revert import revert
from tva.compose.verify import verify
from tva.vectors import compare, extract, inspect, match

BASE = "base.safetensors"

EXCLUDE = ["inv_freq", "criterion[.]", "(^|[.])head[.]"]


def model(seed, **more):
    generator = torch.Generator().manual_seed(seed)
    names = {"model.embed.weight": (6, 4), "model.q.weight": (4, 4), "model.q.bias": (4,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()} | more


@pytest.fixture
def files(tmp_path):
    """A base with an old buffer and a head, and two models without the one, with another head and a loss's weight."""
    base = model(0) | {"model.inv_freq": torch.ones(2), "head.weight": torch.ones(3, 4)}
    save_weights(base, BASE)
    for seed, name in enumerate("ab", start=1):
        tuned = model(seed) | {"criterion.weight": torch.ones(5), "head.weight": torch.full((7, 4), float(seed))}
        torch.save({"state_dict": {f"net.{key}": value for key, value in tuned.items()}}, f"{name}.ckpt")
    return tmp_path


def paths(files, ending="ckpt"):
    return {name: str(files / f"{name}.{ending}") for name in "ab"}


def test_compose_keeps_the_base_where_names_are_left_out_and_verify_and_revert_follow(files):
    base, output = open_weights(BASE), "out.safetensors"
    arguments = str(base.path), paths(files), "0.5 * (a + b)", output
    with pytest.raises(MismatchError, match=r"names are not the base's.*leave it out by exclude"):
        compose(*arguments)
    report = compose(*arguments, exclude=EXCLUDE, keep_undo=True)
    edited = open_weights(output)
    assert list(edited) == list(base)
    for name in ("model.inv_freq", "head.weight"):
        assert torch.equal(edited[name], base[name])
    for name in model(0):
        expected = base[name] + 0.5 * ((model(1)[name] - base[name]) + (model(2)[name] - base[name]))
        torch.testing.assert_close(edited[name], expected)
    assert any("left out 2 of 5 names by exclude: 'net.criterion.weight', 'net.head.weight'" in n for n in report.notes)
    assert verify(output).holds
    assert json.loads(edited.metadata["tva.options"])["exclude"] == EXCLUDE
    revert(output, output="back.safetensors")
    assert fingerprint(open_weights("back.safetensors")) == fingerprint(base)


def test_include_takes_part_of_a_model(files):
    output = "out.safetensors"
    compose(BASE, paths(files), "a", output, include=["[.]q[.]"])
    base, edited = open_weights(BASE), open_weights(output)
    moved = {name for name in base if not torch.equal(base[name], edited[name])}
    assert moved == {"model.q.weight", "model.q.bias"}
    assert verify(output).holds


def test_extract_lists_what_is_left_out_and_the_file_composes_to_the_same_bytes(files):
    base = BASE
    for name, path in paths(files).items():
        done = extract(base, path, f"{name}.tv.safetensors", exclude=EXCLUDE)
        assert done.untouched == {"excluded": 2}
    vector = TaskVector.load("a.tv.safetensors")
    assert vector.deltas.keys() == model(0).keys()
    assert vector.untouched == {"model.inv_freq": "excluded", "head.weight": "excluded"}
    first = compose(base, paths(files, "tv.safetensors"), "a - b", "1.safetensors")
    again = compose(base, paths(files), "a - b", "2.safetensors", exclude=EXCLUDE)
    assert first.edited == again.edited


def test_compare_and_match_leave_the_same_names_out(files):
    base = BASE
    compared = compare(list(paths(files).values()), base, exclude=EXCLUDE)
    assert compared.elements == sum(tensor.numel() for tensor in model(0).values())
    output = "out.safetensors"
    compose(base, paths(files), "0.3 * a", output, exclude=EXCLUDE)
    found = match(output, [paths(files)["a"]], base, exclude=EXCLUDE)
    assert found.fits[0].exact
    assert found.fits[0].coef == pytest.approx(0.3)


def test_vector_files_of_other_heads_are_compared_and_applied_without_them(files):
    for seed, name in enumerate("ab", start=1):
        first, second = (model(k, **{f"head_{name}.w": torch.full((seed,), float(k))}) for k in (0, seed))
        TaskVector.between(first, second).save(f"{name}.tv.safetensors")
    vectors = paths(files, "tv.safetensors")
    with pytest.raises(MismatchError, match="Vectors must be of one architecture"):
        compare(list(vectors.values()), allow_other_base=True)
    compared = compare(list(vectors.values()), allow_other_base=True, exclude=["^head_"])
    assert compared.elements == sum(tensor.numel() for tensor in model(0).values())
    with pytest.raises(MismatchError, match=r"a.tv.safetensors against .* No single prefix .*'head_a.w'.*exclude="):
        compose(BASE, vectors, "a + b", "o.safetensors", allow_other_base=True)
    options = {"allow_other_base": True, "exclude": ["^head", "inv_freq"]}
    compose(BASE, vectors, "a + b", "o.safetensors", **options)
    assert verify("o.safetensors").holds


def test_an_adapter_with_a_head_of_its_own_is_applied_without_it():
    adapted(Path("adapter"), target_modules=["q", "k"])
    file = Path("adapter/adapter_model.safetensors")
    save_file(load_file(file) | {"base_model.model.classifier.bias": torch.ones(2)}, file)
    base = {name: torch.zeros(shape) for name, shape in _shapes(Path("adapter")).items()}
    save_weights(base, BASE)
    arguments = (BASE, {"a": "adapter"}, "a", "o.safetensors")
    with pytest.raises(MismatchError, match=r"'classifier.bias'.*leave it out by exclude"):
        compose(*arguments)
    report = compose(*arguments, exclude=["^classifier[.]"])
    assert any("left out 1 of" in note for note in report.notes)


def _shapes(folder):
    """Return the shapes of the weights that an adapter moves."""
    shapes, factors = {}, load_file(folder / "adapter_model.safetensors")
    for name, tensor in factors.items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            shapes[f"{module}.weight"] = (factors[name.replace("lora_A", "lora_B")].shape[0], tensor.shape[1])
    return shapes


def test_a_pattern_that_matches_nothing_is_an_error_in_every_command(files, capsys):
    base, (a, b), out = BASE, paths(files).values(), "o.safetensors"
    exclude = ["--exclude", json.dumps([*EXCLUDE, "typo"])]
    for command in (
        ["compose", "--base", base, "--vectors.a", a, "--recipe", "a", "--output", out],
        ["extract", "--base", base, "--finetuned", a, "--output", "o.tv.safetensors"],
        ["compare", a, b, "--base", base],
        ["vectors", "match", b, "--vectors", json.dumps([a]), "--base", base],
    ):
        with pytest.raises(SystemExit, match="^2$"):
            main([*command, *exclude])
        assert "exclude holds 'typo', which matches no name" in capsys.readouterr().err
    assert sorted(path.name for path in files.iterdir()) == ["a.ckpt", "b.ckpt", BASE]


def test_a_pre_trained_base_without_its_task_s_head_is_named_with_what_to_leave_out():
    save_weights({"embed.w": torch.ones(2), "layer.w": torch.ones(2)}, BASE)
    tuned = {"bert.embed.w": torch.zeros(2), "bert.layer.w": torch.zeros(2), "classifier.w": torch.ones(3)}
    save_weights(tuned, "tuned.safetensors")
    arguments = BASE, "tuned.safetensors", "v.safetensors"
    with pytest.raises(
        MismatchError, match=r"all of the base's 2 are there under 'bert.'.*exclude=\['\^classifier"
    ) as e:
        extract(*arguments)
    assert "prefix=" not in str(e.value)
    assert extract(*arguments, exclude=["^classifier[.]"]).moved == 2


def test_a_vocabulary_that_has_grown_is_said_as_such(files):
    tuned = model(1) | {"model.embed.weight": torch.ones(7, 4)}
    save_weights(model(0), BASE)
    save_weights(tuned, "tuned.safetensors")
    with pytest.raises(MismatchError, match=r"Only their numbers of rows differ, 6 and 7.*resize_token_embeddings"):
        extract(BASE, "tuned.safetensors", "v.safetensors")


@pytest.mark.parametrize("side", ["base", "finetuned"])
@pytest.mark.parametrize("how", ["copy", "alias"])
def test_a_tied_tensor_stored_once_on_one_side_moves_under_both_names(side, how):
    both, once = model(0), model(1)
    tied = both if side == "base" else once
    save = {"base": both, "finetuned": once}
    if how == "copy":
        tied["lm_head.weight"] = tied["model.embed.weight"].clone()
    for name, tensors in save.items():
        alias = tensors is tied and how == "alias"
        path = Path(f"{name}.safetensors")
        save_file(tensors, path, {"lm_head.weight": "model.embed.weight"} if alias else None)
    output = "o.safetensors"
    compose(BASE, {"a": "finetuned.safetensors"}, "0.5 * a", output)
    edited = open_weights(output)
    expected = both["model.embed.weight"] + 0.5 * (once["model.embed.weight"] - both["model.embed.weight"])
    for name in ("model.embed.weight", "lm_head.weight")[: 2 if side == "base" else 1]:
        torch.testing.assert_close(edited[name], expected)
    assert ("lm_head.weight" in edited) == (side == "base")
    assert verify(output).holds
    opened = open_finetuned("finetuned.safetensors", open_weights(BASE))
    assert opened.keys() == open_weights(BASE).keys()


def test_what_is_left_out_of_a_file_is_still_listed_by_inspect(files):
    vector = Path("a.tv.safetensors")
    extract(BASE, paths(files)["a"], str(vector), exclude=EXCLUDE)
    assert {*inspect(str(vector)).untouched["excluded"]} == {"model.inv_freq", "head.weight"}

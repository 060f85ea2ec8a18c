"""One rule of names for task vectors, wherever they are used: on files, on folders, in memory, with each other."""

import pytest
import torch

from tva import MismatchError, TaskVector, fingerprint, open_weights, save_weights
from tva.cli.main import main
from tva.compose import compose, verify
from tva.vectors import compare, match


def state(seed, prefix="", tied=False, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (7, 3), "model.layers.0.w": (3, 3), "model.norm.weight": (3,)}
    found = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    if tied:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return {prefix + name: tensor for name, tensor in found.items()}


@pytest.fixture
def files(tmp_path):
    save_weights(state(0), "base.safetensors")
    save_weights(state(1), "tuned.safetensors")
    TaskVector.between(state(0), state(1)).save("own.tv.safetensors")
    for prefix in ("network.", "encoder.", "model."):
        TaskVector.between(state(0, prefix), state(1, prefix)).save(f"{prefix}tv.safetensors")
    return tmp_path


@pytest.mark.parametrize("prefix", ["network.", "encoder.", "model."])
def test_a_vector_with_a_wrappers_prefix_is_applied_as_one_without(files, prefix):
    for vector, output in (("own.tv.safetensors", "own.safetensors"), (f"{prefix}tv.safetensors", "old.safetensors")):
        compose("base.safetensors", {"a": vector}, "0.5 * a", output)
        assert verify(output).holds
    assert fingerprint(open_weights("own.safetensors")) == fingerprint(open_weights("old.safetensors"))
    old, base = TaskVector.load(f"{prefix}tv.safetensors"), open_weights("base.safetensors")
    assert fingerprint(old.apply_to(base, 0.5)) == fingerprint(open_weights("own.safetensors"))
    assert match("own.safetensors", [f"{prefix}tv.safetensors"], base="base.safetensors").fits[0].exact


def test_vectors_with_and_without_a_wrappers_prefix_go_together(files):
    names = ["own.tv.safetensors", "network.tv.safetensors", "encoder.tv.safetensors"]
    for base in (None, "base.safetensors"):
        cosines = compare(names, base=base).whole.cosines
        assert all(cosine == pytest.approx(1) for row in cosines for cosine in row)
    own, old, _ = map(TaskVector.load, names)
    assert fingerprint((own + old).deltas) == fingerprint((own + own).deltas)
    assert (old - own).norm() == 0
    assert old.cosine(own) == pytest.approx(1)


def test_tied_weights_may_have_one_name_in_the_vector_and_two_in_the_base(files):
    both, once = state(0, "network.", tied=True), state(0)
    TaskVector.between(both, state(1, "network.", tied=True)).save("tied.tv.safetensors")
    compose("base.safetensors", {"a": "tied.tv.safetensors"}, "a", "once.safetensors")
    expected = TaskVector.load("own.tv.safetensors").apply_to(once)
    assert fingerprint(open_weights("once.safetensors")) == fingerprint(expected)
    edited = TaskVector.load("own.tv.safetensors").apply_to(both)
    assert torch.equal(edited["network.lm_head.weight"], edited["network.model.embed_tokens.weight"])
    assert torch.equal(edited["network.lm_head.weight"], expected["model.embed_tokens.weight"])
    untied = state(1, "network.", tied=True)
    untied["network.lm_head.weight"] = untied["network.lm_head.weight"] + 1
    TaskVector.between(both, untied).save("untied.tv.safetensors")
    with pytest.raises(
        MismatchError, match=r"untied.tv.safetensors against .* No single prefix .*'network.lm_head.weight'"
    ):
        compose("base.safetensors", {"a": "untied.tv.safetensors"}, "a", "never.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_vector_of_a_network_in_float32_is_of_its_folder_in_half_precision(files, dtype):
    save_weights(state(0, dtype=dtype), "half.safetensors")
    wide = {f"network.{name}": tensor.float() for name, tensor in state(0, dtype=dtype).items()}
    vector = TaskVector.between(wide, state(1, "network."))
    vector.save("half.tv.safetensors")
    compose("half.safetensors", {"a": "half.tv.safetensors"}, "a", "out.safetensors")
    expected = vector.apply_to(open_weights("half.safetensors"))
    assert fingerprint(open_weights("out.safetensors")) == fingerprint(expected)
    other = state(0, dtype=dtype)
    other["model.norm.weight"][0] += 1
    save_weights(other, "other.safetensors")
    with pytest.raises(MismatchError, match="in the base given 'model.norm.weight' is another"):
        compose("other.safetensors", {"a": "half.tv.safetensors"}, "a", "never.safetensors")
    with pytest.raises(MismatchError, match="1 of 3 tensors differ"):
        vector.apply_to(other)


def test_key_map_and_exclude_are_for_vector_files_too(files, capsys):
    renamed = [{name.replace("layers", "h"): tensor for name, tensor in state(seed).items()} for seed in (0, 1)]
    heads = [{**part, "head.w": torch.ones(2) * seed} for seed, part in enumerate(renamed)]
    TaskVector.between(*heads).save("other.tv.safetensors")
    command = ["compose", "--base", "base.safetensors", "--vectors.a", "other.tv.safetensors", "--recipe", "a"]
    command += ["--output", "out.safetensors"]
    with pytest.raises(SystemExit):
        main(command)
    said = " ".join(capsys.readouterr().err.split())
    assert "2 of 4 names are not the base's: 'model.h.0.w', 'head.w'" in said
    assert "They share 2 of 3 names. Map the rest by key_map, or leave it out by exclude" in said
    main([*command, "--key_map", '{"[.]h[.]": ".layers."}', "--exclude", '["^head"]'])
    expected = TaskVector.load("own.tv.safetensors").apply_to(open_weights("base.safetensors"))
    assert fingerprint(open_weights("out.safetensors")) == fingerprint(expected)
    main(["verify", "out.safetensors"])


def test_other_architectures_are_called_so(files):
    save_weights({"conv.weight": torch.ones(2), "conv.bias": torch.ones(1)}, "conv.safetensors")
    with pytest.raises(MismatchError, match="They share none of 2 names: these are different architectures"):
        compose("conv.safetensors", {"a": "own.tv.safetensors"}, "a", "never.safetensors")

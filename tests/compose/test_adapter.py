"""LoRA in, LoRA out: a recipe on adapters is an adapter that peft loads, and whose merge is the dense edit."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_adapters import adapted, net

from tva import MismatchError, save_weights
from tva.checkpoints import open_adapter, open_weights
from tva.cli.main import main
from tva.compose import compose
from tva.errors import NoEffectError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*(fan_in_fan_out|Found missing adapter keys)")
ADAPTERS = {
    "a": {"target_modules": ["q", "k", "embed", "conv"], "rank_pattern": {"k": 2}},
    "b": {"target_modules": ["q", "k", "embed", "point"], "use_rslora": True, "alpha_pattern": {"q": 2}},
    "c": {"target_modules": ["q", "conv"], "r": 1, "modules_to_save": ["head"]},
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Write a base in float64 and three adapters; return the base's path, the paths and what peft's merges change."""
    folder = tmp_path_factory.mktemp("adapters")
    base = net().double()
    save_weights(base.state_dict(), folder / "base.safetensors")
    deltas = {}
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        merged = adapted(folder / name, net().double(), seed=seed, **settings)
        deltas[name] = {key: merged[key] - tensor for key, tensor in base.state_dict().items()}
    return str(folder / "base.safetensors"), {name: str(folder / name) for name in ADAPTERS}, deltas


def loaded(folder):
    """What peft makes of an adapter on the base, in float64."""
    model = peft.PeftModel.from_pretrained(net().double(), folder, autocast_adapter_dtype=False)
    return model.merge_and_unload().state_dict()


def check(folder, expected, atol=2e-6):
    merged, base = loaded(folder), net().double().state_dict()
    ours = open_adapter(folder, base)
    for name, weight in base.items():
        torch.testing.assert_close(merged[name], weight + expected[name], rtol=0, atol=atol)
        torch.testing.assert_close(ours[name], merged[name], rtol=0, atol=1e-12)


def test_a_linear_recipe_has_the_sum_of_the_ranks_and_is_exact(adapters):
    base, paths, deltas = adapters
    recipe, coefs = "s * a - b / 2 + c", {"s": {"block": 0.5, ".": 2.0}}
    report = compose(base, paths, recipe, "new", coefs, scaling_coef=0.8, write_as="lora")
    expected = {
        name: 0.8 * ((0.5 if "block" in name else 2.0) * delta - deltas["b"][name] / 2 + deltas["c"][name])
        for name, delta in deltas["a"].items()
    }
    check(Path("new"), expected)
    assert (report.ranks, report.error, report.core, report.whole) == ((3, 7), 0.0, False, 2)
    config = json.loads(Path("new/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["head"]
    assert {"base_model.model.block.q.lora_A.weight": (7, 6)}.items() <= {
        name: tuple(tensor.shape) for name, tensor in load_file("new/adapter_model.safetensors").items()
    }.items()


@pytest.mark.parametrize("command", [["verify"], ["revert", "--output", "back.safetensors"]])
def test_an_adapter_holds_no_record_and_is_the_same_when_made_again(adapters, capsys, command):
    base, paths, _ = adapters
    for folder in ("one", "two"):
        compose(base, paths, "a + 0.3 * b", folder, write_as="lora")
    one, two = (Path(f"{folder}/adapter_model.safetensors").read_bytes() for folder in ("one", "two"))
    assert one == two
    for path in ("one", "one/adapter_model.safetensors"):
        with pytest.raises(SystemExit):
            main([command[0], path, *command[1:]])
        assert "is a LoRA adapter, in which tva records no inputs" in capsys.readouterr().err


def test_the_adapter_equals_the_dense_edit(adapters):
    base, paths, _ = adapters
    compose(base, paths, "a + 0.3 * b", "new", write_as="lora")
    compose(base, paths, "a + 0.3 * b", "dense.safetensors")
    dense = open_weights("dense.safetensors")
    for name, weight in loaded(Path("new")).items():
        torch.testing.assert_close(weight, dense[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("recipe", ["a + b", "ties(a, b, density=0.5)"])
def test_recompressing_is_the_best_of_its_rank_and_states_its_error(adapters, recipe):
    base, paths, _ = adapters
    exact = compose(base, paths, recipe, "exact", write_as="lora")
    report = compose(base, paths, recipe, "new", write_as="lora", rank=2)
    assert report.ranks == (2, 2)
    assert exact.error == 0
    full, small, start = loaded(Path("exact")), loaded(Path("new")), net().double().state_dict()
    error = norm = 0.0
    for name, weight in full.items():
        delta = (weight - start[name]).flatten(1) if weight.ndim > 1 else (weight - start[name])[None]
        lost = float((small[name] - weight).square().sum())
        best = float(torch.linalg.svdvals(delta)[2:].square().sum())
        assert lost == pytest.approx(best, abs=1e-5)
        error, norm = error + lost, norm + float(delta.square().sum())
    assert report.error == pytest.approx((error / norm) ** 0.5, rel=1e-3)
    assert report.error > 0.05


@pytest.mark.parametrize("recipe", ["iso_c(a, b)", "tsv(a, b)"])
def test_methods_on_singular_values_are_those_of_the_dense_deltas(adapters, recipe):
    base, paths, _ = adapters
    options = {"include": ["block.*weight"]}
    compose(base, paths, recipe, "new", write_as="lora", **options)
    compose(base, paths, recipe, "dense.safetensors", **options)
    dense, merged = open_weights("dense.safetensors"), loaded(Path("new"))
    name = "block.q.weight"  # whose ranks add up to its smaller side: means over singular values are the same
    torch.testing.assert_close(merged[name], dense[name], rtol=0, atol=1e-5)


def test_the_core_space_is_lossless_and_methods_are_computed_in_it(adapters):
    from tva.compose.adapter import Space, _sides

    base, paths, deltas = adapters
    weights = open_weights(base)
    opened = {key: open_adapter(paths[key], weights) for key in "ab"}
    name = "block.q.weight"
    entries = {key: opened[key].entry(name) for key in "ab"}
    space = Space.of(entries)
    for key in "ab":
        back = space.left @ space.cores[key] @ space.right.T
        torch.testing.assert_close(back, deltas[key][name], rtol=0, atol=1e-6)
        b, a = _sides(entries[key])
        torch.testing.assert_close(back, b @ a, rtol=0, atol=1e-14)
    in_core, whole = (torch.linalg.svdvals(sum(m)) for m in (space.cores.values(), [deltas[k][name] for k in "ab"]))
    torch.testing.assert_close(in_core, whole.double()[: len(in_core)], rtol=0, atol=1e-6)
    compose(base, paths, "magnitude(a, density=0.25) + 0 * b", "new", write_as="lora", include=[name])
    core = space.cores["a"]
    count = round(0.25 * core.numel())
    kept = torch.where(core.abs() >= core.abs().flatten().sort(descending=True).values[count - 1], core, 0)
    expected = space.left @ kept @ space.right.T
    torch.testing.assert_close(loaded(Path("new"))[name] - weights[name], expected, rtol=0, atol=2e-6)


def test_embeddings_keep_their_layout_and_tied_ones_move_once(adapters):
    base, paths, _ = adapters
    compose(base, paths, "ties(a, b)", "new", write_as="lora")
    names = load_file("new/adapter_model.safetensors")
    assert names["base_model.model.embed.lora_embedding_A"].shape[1] == 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "a + dora"}, "dora is DoRA, which scales the outputs of 'block.q.weight'"),
        ({"recipe": "a + tokens"}, "holds trained tokens of 'embed.weight'"),
        ({"recipe": "a + dense"}, "not a PEFT adapter, and --as lora composes adapters only.*extract"),
        ({"recipe": "head + c"}, "'head.weight' is saved whole in .* and has low-rank factors in"),
        ({"recipe": "a", "dtype": "float32"}, "An adapter is written without dtype"),
        ({"recipe": "a", "plan": True}, "An adapter is written without plan"),
        ({"recipe": "a", "rank": 0}, "rank must be at least 1"),
        ({"recipe": "a", "write_as": "checkpoint", "rank": 2}, "--as lora is not given"),
        ({"recipe": "a + base"}, "needs the base's own weights"),
        ({"recipe": "a", "output": "x.safetensors"}, "must be a folder for an adapter"),
        ({"recipe": "a", "output": "full"}, "must be a new or empty folder"),
    ],
)
def test_what_cannot_be_an_adapter_is_refused(adapters, tmp_path, options, message):
    base, paths, _ = adapters
    more = {
        "dora": {"target_modules": ["q"], "use_dora": True},
        "tokens": {"target_modules": ["q"], "trainable_token_indices": {"embed": [1]}},
        "head": {"target_modules": ["head"]},
    }
    for name in set(re.findall(r"\w+", options["recipe"])) & more.keys():
        adapted(Path(name), net().double(), **more[name])
    Path("full").mkdir()
    Path("full/x").write_text("")
    vectors = {**paths, **{name: tmp_path / name for name in more}, "dense": base}
    output = Path(options.pop("output", "new"))
    with pytest.raises((ValueError, MismatchError), match=message):
        compose(base, vectors, output=output, **{"write_as": "lora", **options})
    assert not Path("new").exists()


def test_an_adapter_that_changes_nothing_is_an_error(adapters):
    base, paths, _ = adapters
    with pytest.raises(NoEffectError, match="changes nothing"):
        compose(base, paths, "a - a", "new", write_as="lora", rank=3)


def test_the_command_says_rank_and_error(adapters, capsys):
    base, paths, _ = adapters
    words = ["compose", "--base", base, "--vectors.a", paths["a"], "--vectors.b", paths["b"], "--as", "lora"]
    main([*words, "--recipe", "ties(a, b)", "--rank", "2", "--output", "new"])
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"an adapter of 5 modules of rank 2, .* recompressing lost [\d.]+% of the change, at most", printed
    )
    assert "merged in the core space" in printed
    check_loads = loaded(Path("new"))
    assert not torch.equal(check_loads["block.q.weight"], net().double().state_dict()["block.q.weight"])

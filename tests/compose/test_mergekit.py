"""Configurations of mergekit, each method against its formula in float64, written out here."""

import functools
import itertools
import re
from pathlib import Path

import pytest
import small_cli
import torch
import yaml
from small_llama import llama_weights, logits, save_llama, save_lora

from tva import open_weights, save_weights
from tva.checkpoints import fingerprint
from tva.compose.apply import compose
from tva.compose.mergekit_recipe import read_mergekit
from tva.compose.verify import verify
from tva.merge import Chunk
from tva.merge.methods.dare import random_bits

NAMES = list(llama_weights(0))
SEEDS = {"base": (0, 0.0), "a": (1, 0.1), "b": (2, 0.1), "c": (3, 0.1)}


@pytest.fixture
def models():
    for name, (seed, noise) in SEEDS.items():
        save_llama(Path(name), seed, noise=noise)
    return {name: {key: value.double() for key, value in llama_weights(*SEEDS[name][:1], noise=SEEDS[name][1]).items()}
            for name in SEEDS}  # fmt: skip


def run(content, verified=True, output="out", **options):
    """Run a configuration; what it becomes, and the output in float64."""
    file = Path("merge.yml")
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    recipe = read_mergekit(file)
    compose(**{**recipe.options, "output": output, **options})
    assert not verified or verify(output).holds
    return recipe, {name: value.double() for name, value in open_weights(output).items()}


def config(method, models=(), base="base", **parameters):
    entries = [{"model": name, **({"parameters": own} if own else {})} for name, own in models]
    return {
        "merge_method": method,
        "models": entries,
        **({"base_model": base} if base else {}),
        "parameters": parameters,
    }


def check(found, expected, rtol=2e-6, atol=5e-7):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- mergekit's formulas


def keep_largest(delta, density):
    kept = max(1, int(density * delta.numel()))
    mask = torch.zeros(delta.numel()).double()
    mask[delta.abs().flatten().argsort(descending=True)[:kept]] = 1
    return delta * mask.view(delta.shape)


def keep_between(delta, density, gamma):
    """Drop the gamma largest, and of the rest keep the largest."""
    number = delta.numel()
    kept, top = int(density * number), int(gamma * number)
    low = max(0, number - kept - top)
    mask = torch.zeros(number).double()
    mask[delta.abs().flatten().argsort()[low : low + kept]] = 1
    return delta * mask.view(delta.shape)


@functools.cache
def digest_of(path):
    return fingerprint(open_weights(path)).digest


def uniform(name, tensor, delta):
    """tva's random numbers for a vector and tensor, in [0, 1)."""
    bits = random_bits(delta.numel(), Chunk(tensor, 0, (digest_of(Path(name).absolute()),), tuple(delta.shape)), 0)
    return ((bits.double() + 2**31) / 2**32).view(delta.shape)


def drop_by_rank(delta, density, epsilon, drawn):
    rows = delta.view(1, -1) if delta.dim() < 2 else delta
    ranks = rows.abs().argsort(dim=1).argsort(dim=1).double()
    keep = density - epsilon + 2 * epsilon * ranks / (rows.shape[1] - 1)
    return delta * (drawn.view(rows.shape) < keep).view(delta.shape)


def same_size(sparse, delta):
    before, after = delta.abs().sum(), sparse.abs().sum()
    return sparse * (before / after) if before > 1e-7 and after > 1e-7 else sparse


def elect(weighted, weights, normalize):
    stacked, weights = torch.stack(weighted), torch.tensor(weights).double()
    majority = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agrees = (stacked.sign() == majority).double()
    merged = (stacked * agrees).sum(0)
    divisor = (weights.view(-1, *[1] * (stacked.dim() - 1)) * agrees).sum(0)
    return merged / torch.where(divisor == 0, 1, divisor) if normalize else merged


def arithmetic(models, sparsify, weights, consensus, normalize, scale):
    found = {}
    for tensor in NAMES:
        base = models["base"][tensor]
        parts = [w * sparsify(name, tensor, models[name][tensor] - base) for name, w in weights.items()]
        total = sum(weights.values())
        merged = elect(parts, [*weights.values()], normalize) if consensus else sum(parts)
        merged = merged / total if normalize and not consensus and abs(total) >= 1e-8 else merged
        found[tensor] = base + scale * merged
    return found


WEIGHTS = {"a": 0.7, "b": 0.4, "c": -0.3}


@pytest.mark.parametrize(
    ("method", "given", "normalize", "rescale"),
    [
        ("task_arithmetic", {}, None, None), ("task_arithmetic", {}, True, None),
        ("ties", {"density": 0.5}, None, None), ("ties", {"density": 0.5}, False, True),
        ("breadcrumbs", {"density": 0.7, "gamma": 0.05}, None, None),
        ("breadcrumbs", {"density": 0.97, "gamma": 0.1}, True, True),
        ("breadcrumbs_ties", {"density": 0.7}, None, None),
        ("dare_linear", {"density": 0.6}, None, None), ("dare_linear", {"density": 0.6}, True, False),
        ("dare_ties", {"density": 0.6}, None, None),
        ("della_linear", {"density": 0.6, "epsilon": 0.2}, None, None), ("della", {"density": 0.6}, None, False),
    ],
)  # fmt: skip
def test_arithmetic_is_that_of_mergekit(models, method, given, normalize, rescale):
    consensus = method.endswith("ties") or method == "della"
    for weights in (WEIGHTS, {"a": 1.0, "b": 0.0, "c": 0.5})[: 1 + consensus]:
        check_arithmetic(models, method, given, normalize, rescale, weights)


def check_arithmetic(models, method, given, normalize, rescale, weights):
    shared = {key: value for key, value in (("normalize", normalize), ("rescale", rescale)) if value is not None}
    own = [(name, {"weight": weight, **given}) for name, weight in weights.items()]
    content = config(method, own, **shared, **{"lambda": 0.8, "int8_mask": True})
    normalize = method in ("ties", "della") if normalize is None else normalize
    rescale = method.startswith(("dare", "della")) if rescale is None else rescale

    def sparsify(name, tensor, delta):
        if method == "ties":
            sparse = keep_largest(delta, 0.5)
        elif method.startswith("breadcrumbs"):
            sparse = keep_between(delta, given["density"], given.get("gamma", 0.01))
        elif method.startswith("dare"):
            sparse = delta * (uniform(name, tensor, delta) >= 1 - 0.6)
        elif method.startswith("della"):
            sparse = drop_by_rank(delta, 0.6, given.get("epsilon", 0.15), uniform(name, tensor, delta))
        else:
            return delta
        return same_size(sparse, delta) if rescale else sparse

    consensus = method.endswith("ties") or method == "della"
    expected = arithmetic(models, sparsify, weights, consensus, normalize, 0.8)
    verified = method in ("ties", "dare_linear") and weights is WEIGHTS
    check(run(content, verified, output=f"out-{weights['b']}")[1], expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_linear(models, normalize):
    weights = {"a": 0.5, "base": 2, "b": -0.25}
    own = [(name, {"weight": weight}) for name, weight in weights.items()]
    found = run(config("linear", own, None, normalize=normalize))[1]
    total = sum(weights.values()) if normalize else 1
    check(found, {t: sum(w * models[n][t] for n, w in weights.items()) / total for t in NAMES})


def arc(t, a, b, above, dim=None):
    """Turn from a to b: one arc for all elements, or one along each line of a dimension."""
    shape = a.shape
    a, b = (a.flatten(), b.flatten()) if dim is None else (a, b)
    axis = -1 if dim is None else dim
    cosine = ((a * b).sum(axis, keepdim=True) / a.norm(dim=axis, keepdim=True) / b.norm(dim=axis, keepdim=True)).clamp(
        -1, 1
    )
    angle = cosine.acos()
    turned = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
    return torch.where(cosine.abs() > above, (1 - t) * a + t * b, turned).view(shape)


GRADIENT = [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0.25]}, {"value": 0.4}]


def t_of(name):
    layer = re.search(r"layers\.(\d)", name)
    depth = int(layer[1]) / 3 if layer else 0
    if "self_attn" in name:
        return depth
    return 1 - 0.75 * depth if "mlp" in name else 0.4


@pytest.mark.parametrize("noise", [0.1, 0.001], ids=["arcs", "lines"])
def test_slerp_turns_whole_weights_with_filters_and_gradients(models, noise):
    save_llama(Path("d"), 4, noise=noise)
    other = {name: value.double() for name, value in llama_weights(4, noise=noise).items()}
    sources = [{"model": name, "layer_range": [0, 4]} for name in ("d", "base")]
    content = {
        "merge_method": "slerp",
        "base_model": "base",
        "slices": [{"sources": sources}],
        "parameters": {"t": GRADIENT},
    }
    recipe, found = run(content)
    check(found, {n: arc(t_of(n), models["base"][n], other[n], 0.9995) for n in NAMES})
    assert recipe.options["coefs"]["t"] == {"self_attn": [0, 0.5, 1], "mlp": [1, 0.25], ".*": 0.4}
    assert "slices" not in recipe.options


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(("flags", "dim"), [({}, None), ({"nuslerp_flatten": False}, -1),
                                            ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, 0)])  # fmt: skip
def test_nuslerp(models, with_base, flags, dim):
    own = [("a", {"weight": 1}), ("b", {"weight": 3})]
    found = run(config("nuslerp", own, "base" if with_base else None, **flags))[1]
    expected = {}
    for name in NAMES:
        start = models["base"][name] if with_base else 0
        expected[name] = start + arc(0.75, models["a"][name] - start, models["b"][name] - start, 1.0, dim)
    check(found, expected)


@pytest.mark.parametrize("by_row", [False, True])
def test_model_stock(models, by_row):
    models["a"]["model.norm.weight"] = models["base"]["model.norm.weight"] + 1e-4  # below mergekit's bound on norms
    weights = {name: value.float() for name, value in models["a"].items()}
    save_weights(weights, "a/model.safetensors")
    models["a"] = {name: value.double() for name, value in weights.items()}
    found = run(config("model_stock", [("a", {}), ("b", {}), ("c", {})], filter_wise=by_row))[1]
    expected = {}
    for name in NAMES:
        base = models["base"][name]
        deltas = [models[other][name] - base for other in "abc"]
        flat = [delta if by_row and delta.dim() > 1 else delta.flatten() for delta in deltas]
        cosines = [((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1)).clamp(min=1e-6)).clamp(-1, 1)
                   for x, y in itertools.combinations(flat, 2)]  # fmt: skip
        cosine = sum(cosines) / 3
        ratio = 3 * cosine / (1 + 2 * cosine)
        expected[name] = base + (ratio.unsqueeze(-1) if by_row and base.dim() > 1 else ratio) * sum(deltas) / 3
    check(found, expected)


@pytest.mark.parametrize("noise", [0.1, 1e-4], ids=["large", "small"])
@pytest.mark.parametrize("topk", [1.0, 0.3])
def test_sce(models, topk, noise):
    for name, seed in (("d", 4), ("e", 5)):
        save_llama(Path(name), seed, noise=noise)
        models[name] = {key: value.double() for key, value in llama_weights(seed, noise=noise).items()}
    found = run(config("sce", [("d", {}), ("e", {})], select_topk=topk))[1]
    expected = {}
    for name in NAMES:
        base = models["base"][name]
        vectors = torch.stack([models[other][name] - base for other in "de"])
        if topk < 1:
            variance = vectors.var(0, unbiased=False)
            mask = torch.zeros_like(variance).flatten()
            mask[variance.flatten().topk(int(int(variance.count_nonzero()) * topk)).indices] = 1
            vectors = vectors * mask.view(base.shape)
        agrees = vectors.sign() == torch.where(vectors.sum(0) >= 0, 1.0, -1.0)
        weights = vectors.square().flatten(1).mean(1)
        weights = weights / weights.sum() if weights.sum() >= 1e-6 else torch.full_like(weights, 0.5)
        erased = weights.view(-1, *[1] * base.dim()) * agrees
        expected[name] = base + (vectors * erased).sum(0) / erased.sum(0).clamp(min=1e-6)
    check(found, expected)


def test_passthrough_stacks_and_scales_layers(models):
    content = """
    merge_method: passthrough
    slices:
      - sources: [{model: base, layer_range: [0, 3]}]
      - sources:
        - model: a
          layer_range: [1, 4]
          parameters: {scale: [{filter: o_proj, value: 0}, {filter: down_proj, value: 0.5}, {value: 1}]}
    dtype: bfloat16
    """
    recipe, found = run(content)
    layers = [("base", 0), ("base", 1), ("base", 2), ("a", 1), ("a", 2), ("a", 3)]
    for new, (model, old) in enumerate(layers):
        for name, value in found.items():
            if name.startswith(f"model.layers.{new}."):
                scale = {"o_proj": 0, "down_proj": 0.5}.get(name.split(".")[-2], 1) if new > 2 else 1
                expected = scale * models[model][name.replace(f"layers.{new}.", f"layers.{old}.")]
                torch.testing.assert_close(value, expected, rtol=2**-8, atol=1e-7)
    assert len(found) == 3 + 6 * 9
    assert '"num_hidden_layers": 6' in Path("out/config.json").read_text()
    assert '"dtype": "bfloat16"' in Path("out/config.json").read_text()
    assert recipe.options["slices"] == {"base": ["base[0:3]", "a[1:4]"]}


def test_slices_may_have_sources_of_their_own(models):
    content = """
    merge_method: linear
    slices:
      - sources: [{model: base, layer_range: [0, 2], parameters: {weight: 1}}]
      - sources:
        - {model: a, layer_range: [1, 4], parameters: {weight: [0, 1]}}
        - {model: b, layer_range: [0, 3], parameters: {weight: 1}}
    """
    found = run(content)[1]
    name = "model.layers.{}.mlp.up_proj.weight".format
    torch.testing.assert_close(found[name(1)], models["base"][name(1)])
    for at, weight in ((0, 0), (1, 0.5), (2, 1)):
        expected = (weight * models["a"][name(1 + at)] + models["b"][name(at)]) / (weight + 1)
        torch.testing.assert_close(found[name(2 + at)], expected, rtol=1e-6, atol=1e-6)


def test_an_adapter_on_top_of_a_model(models):
    added = save_lora(Path("lora"), 0)
    found = run(config("task_arithmetic", [("a+lora", {"weight": 0.5})]))[1]
    expected = {}
    for name in NAMES:
        expected[name] = models["base"][name] + 0.5 * (models["a"][name] + added.get(name, 0) - models["base"][name])
    check(found, expected)


@pytest.mark.parametrize(
    ("source", "rows", "options"),
    [("base", 12, {"new_rows": "drop"}), ("d", 15, {"tokenizer": "d", "new_rows": "keep"}), (None, None, None)],
)
def test_tokenizer_source(models, source, rows, options):
    save_llama(Path("d"), 4, vocab=15, noise=0.1)
    content = config("linear", [("base", {"weight": 1}), ("d", {"weight": 1})])
    if source is None:
        with pytest.raises(ValueError, match="12 and 15.*--new_rows"):
            run(content)
        return
    recipe, found = run({**content, "tokenizer_source": source})
    assert found["lm_head.weight"].shape[0] == rows
    assert options.items() <= recipe.options.items()
    donor = Path(f"{source}/tokenizer.json")
    assert Path("out/tokenizer.json").read_text() == donor.read_text()


# --- errors and the command line


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("merge_method: karcher\nmodels: [{model: a}]\n", [r"line 1: merge_method: 'karcher' is not a method"]),
        ("merge_method: ties\nmodels: [{model: a}]\n", [r"line 1: merge_method: ties needs a base_model"]),
        ("merge_method: linear\nmodels:\n- model: a\n  parameters: {weight: x}\n- model: b\nchat_template: auto\n",
         [r"line 6: chat_template: the tokenizer's files are carried along"]),
        ("merge_method: linear\nmodels:\n- model: a\n  parameters: {weight: x}\n- model: b\n",
         ["line 4: weight: must be a number", "line 5: b: weight must be given here; linear"]),
        ("merge_method: linear\nmodels: []\nslices: []\n", ["line 1: merge_method: a configuration has either"]),
        ("merge_method: linear\nmodules: {text: {}}\nmodels:\n- {model: a, parameters: {wieght: 1}}\ndtype: int8\n",
         ["line 2: modules: models of several", "line 4: wieght: is not a parameter", "line 5: dtype: must be one"]),
        ("merge_method: passthrough\nslices:\n- sources:\n  - {model: a, layer_range: [0, 9]}\n",
         [r"line 4: layer_range: a has 4 layers; found 9"]),
        ("merge_method: slerp\nbase_model: base\nslices:\n- sources:\n  - {model: a, layer_range: [0, 4]}\n",
         ["line 4: .*base, the base_model, must be among the sources"]),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\ntokenizer: {source: b,\n  tokens: {}}\n",
         ["line 4: tokens: embeddings of single tokens are not set"]),
        ("merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\ntokenizer_source: b\n",
         ["line 4: tokenizer_source: b is not one of the models"]),
        ("merge_method: linear\nmodels:\n- {model: a}\n- model: ./nope\nparameters: {weight: 1}\n",
         ["line 4: model: A checkpoint was expected at nope"]),
        ("merge_method: linear\nmerge_method: ties\n", ["line 2: merge_method: is given twice"]),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_named_with_its_line(models, text, lines):
    with pytest.raises(ValueError, match="cannot be run as mergekit runs it; nothing was written") as error:
        run(text)
    for line in lines:
        assert re.search(line, str(error.value)), str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x 1\nmerge_method: linear\nb: *x\n", "line 1: an alias or anchor"),
        ("models: [", "not YAML that can be read"),
        ("a: &a " + "[" * 200, "nested more than 100 deep"),
        ("!!!!m", "is not of the value behind it"),
        ("a: !!bool x", "is not of the value behind it"),
        ("a: !!set [1]", "is not of the value behind it"),
        ("merge_method: =\nmodels: 2001-99-99", "cannot be run as mergekit runs it"),
        ("merge_method: linear\n---\nmerge_method: ties\n", "is not a YAML file of one document"),
        ("recipe: a\n", "is not a mergekit configuration"),
        ("merge_method: !!python/object/apply:os.system [x]\n", "is of Python's objects"),
    ],
)
def test_files_that_are_none(text, message):
    Path("merge.yml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_mergekit(Path("merge.yml"))


def command(capsys, *words):
    return small_cli.run("compose", *words), capsys.readouterr()


def test_the_command_runs_a_file_and_shows_what_it_becomes(models, capsys):
    own = [(name, {"weight": 0.5, "density": [1, 0.5]}) for name in "ab"]
    Path("merge.yml").write_text(yaml.safe_dump(config("dare_ties", own, slerp=1) | {"parameters": {"t": 1}}))
    status, shown = command(capsys, "--mergekit", "merge.yml", "--print_recipe")
    assert (status, Path("out").exists()) == (0, False)
    assert shown.out.startswith("# dare_ties draws tva's own random numbers, of seed 0")
    assert "# t: dare_ties does not use such parameters" in shown.out
    Path("recipe.yaml").write_text(shown.out)
    assert command(capsys, "--mergekit", "merge.yml", "--output", "out")[0] == 0
    assert command(capsys, "--config", "recipe.yaml", "--output", "again")[0] == 0
    assert Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "merge.yml", "--output", "out"], "is a mergekit configuration.*give it by --mergekit merge.yml"),
        (["--mergekit", "merge.yml", "--output", "out", "--recipe", "a"], "--recipe is set by merge.yml. Leave it out"),
        (["--mergekit", "merge.yml", "--output", "out", "--vectors.a", "a"], "--vectors.a is set by"),
        (["--print_recipe"], "give one by --mergekit FILE"),
        (["--mergekit"], "--mergekit needs a value"),
        (["--mergekit", "none.yml", "--output", "out"], "configuration was expected at none.yml"),
    ],
)
def test_the_command_says_what_to_do(models, capsys, words, message):
    Path("merge.yml").write_text(yaml.safe_dump(config("linear", [("a", {"weight": 1})], None)))
    status, shown = command(capsys, *words)
    assert status == 2
    assert re.search(message, shown.err.replace("\n", " ")), shown.err
    assert not Path("out").exists()


@pytest.mark.slow
def test_transformers_computes_with_the_merged_model_what_the_formula_gives(models):
    found = run(config("task_arithmetic", [("a", {"weight": 0.5}), ("b", {"weight": 0.3})]))[1]
    by_hand = save_llama(Path("by hand"), 0)
    expected = {}
    for name in found:
        base = models["base"][name]
        expected[name] = base + 0.5 * (models["a"][name] - base) + 0.3 * (models["b"][name] - base)
    save_weights(expected, by_hand / "model.safetensors")
    torch.testing.assert_close(logits(Path("out")), logits(by_hand), rtol=1e-5, atol=1e-5)

"""Methods on matrices and on statistics files against float64 references written from the papers' formulas."""

from pathlib import Path

import pytest
import torch

from tva import TaskVector, save_weights
from tva.compose.recipe import Recipe, RecipeError
from tva.merge.linalg import leading, polar
from tva.merge.matrix import RANK

SHAPES = {"wide": (6, 10), "tall": (11, 5), "square": (8, 8), "row": (1, 4)}
SHAPES |= {"bias": (6,), "scalar": (), "conv": (4, 2, 3), "embed_tokens": (9, 4), "none": (0, 4)}
MATRICES = ("wide", "tall", "square", "row")


def vectors(count=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: TaskVector({key: torch.randn(s, generator=generator).to(dtype) for key, s in SHAPES.items()})
        for name in "abcd"[:count]
    }


def evaluate(text, given):
    return Recipe(text, given).evaluate(given).deltas


def of(given, key):
    return [vector.deltas[key].double() for vector in given.values()]


def nearest_orthonormal(matrix):
    p, _, qt = torch.linalg.svd(matrix, full_matrices=False)
    return p @ qt


def tsv_reference(deltas):
    rank = max(1, min(deltas[0].shape) // len(deltas))
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    u = torch.cat([u[:, :rank] for u, _, _ in parts], dim=1)
    s = torch.cat([s[:rank] for _, s, _ in parts])
    vt = torch.cat([vt[:rank] for _, _, vt in parts])
    return nearest_orthonormal(u) @ torch.diag(s) @ nearest_orthonormal(vt)


def iso_c_reference(deltas):
    u, s, vt = torch.linalg.svd(sum(deltas), full_matrices=False)
    return s.mean() * u @ vt


def iso_cts_reference(deltas, common):
    rank, tasks = min(deltas[0].shape), len(deltas)
    own = min(round((rank - int(common * rank)) / tasks), rank // tasks)
    u, s, vt = (part for part in torch.linalg.svd(sum(deltas), full_matrices=False))
    k = rank - own * tasks
    us, ss, vts = [u[:, :k]], [s[:k]], [vt[:k]]
    for delta in deltas:
        u_t, s_t, vt_t = torch.linalg.svd(delta - us[0] @ us[0].T @ delta, full_matrices=False)
        us, ss, vts = [*us, u_t[:, :own]], [*ss, s_t[:own]], [*vts, vt_t[:own]]
    return torch.cat(ss).mean() * nearest_orthonormal(torch.cat(us, dim=1)) @ nearest_orthonormal(torch.cat(vts))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("tsv({})", tsv_reference),
        ("iso_c({})", iso_c_reference),
        ("iso_cts({})", lambda deltas: iso_cts_reference(deltas, 0.8)),
        ("iso_cts({}, common=0.3)", lambda deltas: iso_cts_reference(deltas, 0.3)),
        ("iso_cts({}, common=1)", iso_c_reference),
    ],
)
def test_subspace_methods_are_the_papers(text, reference, count):
    given = vectors(count)
    merged = evaluate(text.format(", ".join(given)), given)
    for key in MATRICES:
        if min(SHAPES[key]) >= count:
            torch.testing.assert_close(merged[key].double(), reference(of(given, key)), rtol=1e-5, atol=2e-6)
    for key in SHAPES.keys() - MATRICES:
        torch.testing.assert_close(merged[key].double(), sum(of(given, key)) / count)


def test_convolutions_are_matrices_on_request_and_exclusion_is_an_option():
    given = vectors()
    merged = evaluate('tsv(a, b, conv="matrix", exclude="square")', given)
    expected = tsv_reference([delta.reshape(4, 6) for delta in of(given, "conv")])
    torch.testing.assert_close(merged["conv"].double().reshape(4, 6), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged["embed_tokens"].double(), tsv_reference(of(given, "embed_tokens")))
    torch.testing.assert_close(merged["square"].double(), sum(of(given, "square")) / 2)


def test_tsv_gives_one_vector_back_and_more_tasks_than_rank_one_triplet_each():
    given = vectors(1)
    merged = evaluate("tsv(a)", given)
    for key in SHAPES:
        torch.testing.assert_close(merged[key], given["a"].deltas[key], rtol=1e-6, atol=1e-6)
    given = vectors(4)
    assert all(torch.linalg.matrix_rank(evaluate("tsv(a, b, c, d)", given)[key]) > 0 for key in MATRICES)


def test_iso_c_has_one_singular_value_and_keeps_their_sum():
    given = vectors(1)
    merged = evaluate("iso_c(a)", given)
    for key in MATRICES:
        values = torch.linalg.svdvals(merged[key].double())
        assert values.max() / values.min() == pytest.approx(1, abs=1e-5)
        assert float(values.sum()) == pytest.approx(float(torch.linalg.svdvals(of(given, key)[0]).sum()), rel=1e-6)


@pytest.mark.parametrize("text", ["tsv({})", "iso_c({})", "iso_cts({})"])
def test_directions_without_a_delta_stay_without(text):
    generator = torch.Generator().manual_seed(1)
    low = [torch.randn(30, 2, generator=generator) @ torch.randn(2, 20, generator=generator) for _ in "ab"]
    given = {name: TaskVector({"w": delta}) for name, delta in zip("ab", low, strict=True)}
    merged = evaluate(text.format("a, b"), given)["w"].double()
    assert (torch.linalg.svdvals(merged) > 1e-5).sum() == 4
    twice = {"a": given["a"], "b": given["a"]}  # the same subspaces: each direction counts once
    assert (torch.linalg.svdvals(evaluate(text.format("a, b"), twice)["w"].double()) > 1e-5).sum() == 2


def test_decompositions_are_better_than_those_of_float32():
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 40, generator=generator, dtype=torch.float64))[0] for n in (60, 50))
    values = torch.logspace(0, -5, 40, dtype=torch.float64)
    matrix = (u * values) @ v.T
    left, found, right = leading(matrix, 40)
    assert float((found / values - 1).abs().max()) < 1e-5
    assert float((left.T @ left - torch.eye(40)).abs().max()) < 1e-5
    assert float((right.T @ right - torch.eye(40)).abs().max()) < 1e-12
    single = torch.linalg.svdvals(matrix.float())[:40].double()
    assert float((found / values - 1).abs().max()) < 0.01 * float((single / values - 1).abs().max())
    assert float((polar(matrix)[0] - u @ v.T).abs().max()) < 1e-5
    noise = matrix + 1e-2 * RANK * torch.outer(u[:, 0], v[:, 1])
    assert float((polar(noise)[0] - u @ v.T).abs().max()) < 1e-3


def wudi_loss(merged, deltas):
    return sum(((merged - d) @ d.T).square().sum() / d.square().sum() for d in deltas if d.any())


def wudi_reference(deltas, steps, lr):
    merged = sum(deltas).clone().requires_grad_()
    optimizer = torch.optim.Adam([merged], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        wudi_loss(merged, deltas).backward()
        optimizer.step()
    return merged.detach()


def test_wudi_is_the_papers_search():
    given = vectors(3)
    merged = evaluate("wudi(a, b, c, steps=30, lr=1e-3)", given)
    for key in MATRICES:
        expected = wudi_reference(of(given, key), 30, 1e-3)
        torch.testing.assert_close(merged[key].double(), expected, rtol=1e-4, atol=2e-5)
        assert wudi_loss(merged[key].double(), of(given, key)) < wudi_loss(sum(of(given, key)), of(given, key))
    assert not any(merged[key].any() for key in SHAPES.keys() - MATRICES)


def test_wudi_exactly_is_its_minimum():
    given = vectors(3)
    merged = evaluate('wudi(a, b, c, solve="exact")', given)
    for key in MATRICES:
        point = merged[key].double().requires_grad_()
        (gradient,) = torch.autograd.grad(wudi_loss(point, of(given, key)), point)
        assert float(gradient.abs().max()) < 1e-5, key


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("time=0", [[1, 1, 2], [2, 1, 1]]),
        ("time=1", [[0.17505, 0.858266, 1.789123], [1.789123, 0.858266, 0.17505]]),
        ("time=5, rank=1", [[0.333702, 1, 1.333702], [1.333702, 1, 0.333702]]),
        ("time=1e9", [[-5 / 3, 0.5, 10 / 3], [10 / 3, 0.5, -5 / 3]]),
        # eigenvalues 1.5, 1/3, 1/6: 4 / 2.389 rounds to 2 of them
        ("time=1, rank='participation'", "time=1, rank=2"),
    ],
)
def test_wudi_filtered_is_gradient_flow_that_stops(options, expected):
    """By hand in float64: the values follow from the formula in the docstring."""
    a, b = [[1.0, 0, 2], [0, 1, 0]], [[0.0, 1, 0], [2, 0, 1]]
    given = {"a": TaskVector({"w": torch.tensor(a)}), "b": TaskVector({"w": torch.tensor(b)})}
    merged = evaluate(f'wudi(a, b, solve="filtered", {options})', given)["w"]
    if isinstance(expected, str):
        wanted = evaluate(f'wudi(a, b, solve="filtered", {expected})', given)["w"]
    else:
        wanted = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(merged, wanted, rtol=0, atol=2e-6)


def filtered_reference(deltas, time, rank=None):
    gram = sum(d.T @ d / d.square().sum() for d in deltas)
    values, q = torch.linalg.eigh(gram)
    kept = (values > 1e-12 * values.max()) & (torch.arange(len(values)) >= len(values) - (rank or len(values)))
    wanted = sum(d @ d.T @ d / d.square().sum() for d in deltas) - sum(deltas) @ gram
    return sum(deltas) + wanted @ q @ torch.diag(torch.where(kept, (1 - (-time * values).exp()) / values, 0)) @ q.T


@pytest.mark.parametrize("time", [1e-9, 0.1, 50.0, 280.0, 1e4])  # a polynomial, or a decomposition
@pytest.mark.parametrize("shape", [(40, 300), (120, 270), (90, 90), (300, 20), (1, 7), (5, 1)])
def test_wudi_filtered_in_float32_and_in_float64_is_its_formula(shape, time):
    draw = torch.Generator().manual_seed(0)
    fall = torch.arange(1.0, min(shape) + 1, dtype=torch.float64) ** -0.7  # of singular values
    sides = [[torch.randn(n, len(fall), generator=draw, dtype=torch.float64) for n in shape] for _ in range(3)]
    deltas = [1e-4 * (left * fall) @ right.T for left, right in sides]
    for dtype, near in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        given = {name: TaskVector({"w": delta.to(dtype)}) for name, delta in zip("abc", deltas, strict=True)}
        merged = evaluate(f'wudi(a, b, c, solve="filtered", time={time})', given)["w"].double()
        expected = filtered_reference(of(given, "w"), time)
        assert float((merged - expected).norm() / expected.norm()) < near, dtype


def test_wudi_filtered_nears_the_exact_solution():
    given = vectors(3)
    exact, filtered = (evaluate(f"wudi(a, b, c, {x})", given) for x in ('solve="exact"', 'solve="filtered", time=1e12'))
    for key in MATRICES:
        torch.testing.assert_close(filtered[key], exact[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solve", ["adam", "exact", "filtered"])
def test_wudi_of_one_vector_is_that_vector_in_its_matrices(solve):
    given = vectors(1)
    merged = evaluate(f'wudi(a, solve="{solve}")', given)
    assert all(torch.equal(merged[key], given["a"].deltas[key]) for key in MATRICES)
    given["b"] = TaskVector({key: torch.zeros(shape) for key, shape in SHAPES.items()})
    merged = evaluate(f'wudi(a, b, solve="{solve}")', given)
    assert all(torch.equal(merged[key], given["a"].deltas[key]) for key in MATRICES)


@pytest.mark.parametrize("text", ["wudi({}, steps=20, lr=1e-3", "iso_cts({}", "regmean({}, files={files}"])
def test_weights_stored_inputs_first_are_turned_before_and_after(text):
    """GPT-2's Conv1D multiplies from the right: its weights are the transposes of those of Linear."""
    given, key = vectors(2), "wide"
    turned = {name: TaskVector({"w": v.deltas[key].T.contiguous()}) for name, v in given.items()}
    files = statistics(Path(), given, lambda k, delta: grams("w", torch.zeros(1, 10)) if k == key else None, {key: "w"})
    merged = evaluate(text.format("a, b", files=files) + ', inputs_first="^w$")', turned)["w"]
    reference = {
        "w": lambda d: wudi_reference(d, 20, 1e-3),
        "i": lambda d: iso_cts_reference(d, 0.8),
        "r": lambda d: regmean_reference(d, [f["w"] for f in read(files)], 0.9),
    }[text[0]]
    torch.testing.assert_close(merged.T.double(), reference(of(given, key)), rtol=1e-4, atol=2e-5)
    other = evaluate("iso_cts(a, b)", turned)["w"]
    assert not torch.allclose(other, evaluate('iso_cts(a, b, inputs_first="w")', turned)["w"], atol=1e-3)


@pytest.mark.parametrize("name", ["h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight", "h.0.mlp.c_proj.weight"])
def test_weights_shaped_like_gpt2s_are_not_mistaken_for_linear(name):
    shape = (16, 4) if "c_proj" in name else (4, 12)
    given = {v: TaskVector({name: torch.randn(shape)}) for v in "ab"}
    with pytest.raises(ValueError, match="Conv1D of GPT-2.* Pass inputs_first='c_attn|c_fc|c_proj'"):
        evaluate("wudi(a, b)", given)
    for pattern in ("c_attn|c_fc|c_proj", "^$"):
        evaluate(f'wudi(a, b, inputs_first="{pattern}")', given)
    linear = {v: TaskVector({name: vector.deltas[name].T.contiguous()}) for v, vector in given.items()}
    evaluate("wudi(a, b)", linear)  # as in open_clip and nanoGPT
    evaluate("tsv(a, b)", given)  # turning it would change nothing


def statistics(folder, given, make, renamed=None):
    paths = []
    for name, vector in given.items():
        paths.append(str(folder / f"{name}.safetensors"))
        made = {(renamed or {}).get(key, key): make(key, delta) for key, delta in vector.deltas.items()}
        save_weights({key: tensor for key, tensor in made.items() if tensor is not None}, paths[-1])
    return paths


def read(paths):
    from tva import open_weights

    return [{key: tensor.double() for key, tensor in open_weights(path).items()} for path in paths]


def test_fisher_is_the_average_weighted_by_information():
    given = vectors(3)
    paths = statistics(Path(), given, lambda key, delta: torch.rand(delta.shape) * 1e-3)
    merged = evaluate(f"fisher(a, b, c, files={paths}, weights=(1, 2, 3), floor=1e-4)", given)
    for key in SHAPES:
        weights = [w * f[key].clamp(min=1e-4) for w, f in zip((1, 2, 3), read(paths), strict=True)]
        expected = sum(w * d for w, d in zip(weights, of(given, key), strict=True)) / sum(weights)
        torch.testing.assert_close(merged[key].double(), expected, rtol=1e-5, atol=1e-6)
    one = evaluate(f"fisher(a, files={paths[:1]})", given)
    for key in SHAPES:
        torch.testing.assert_close(one[key], given["a"].deltas[key])


def test_fisher_normalized_weighs_every_model_the_same():
    given = vectors(2)
    scales = iter([1.0] * len(SHAPES) + [1e4] * len(SHAPES))  # the second task's gradients are a hundred times larger
    paths = statistics(Path(), given, lambda key, delta: torch.rand(delta.shape) * next(scales))
    merged = evaluate(f"fisher(a, b, files={paths}, floor=1e-2, weights=(1, 2), normalize=True)", given)
    files = read(paths)
    norms = [sum(float(tensor.square().sum()) for tensor in file.values()) ** 0.5 for file in files]
    for key in SHAPES:
        weights = [w * f[key].clamp(min=1e-2) / n for w, f, n in zip((1, 2), files, norms, strict=True)]
        expected = sum(w * d for w, d in zip(weights, of(given, key), strict=True)) / sum(weights)
        torch.testing.assert_close(merged[key].double(), expected, rtol=1e-5, atol=1e-6)


def grams(key, delta):
    if key not in (*MATRICES, "w"):
        return None
    inputs = torch.randn(3 * delta.shape[1], delta.shape[1])
    return inputs.T @ inputs


def regmean_reference(models, grams, off_diagonal):
    each = [gram * (off_diagonal + (1 - off_diagonal) * torch.eye(len(gram))) for gram in grams]
    return sum(model @ g for model, g in zip(models, each, strict=True)) @ torch.linalg.inv(sum(each))


@pytest.mark.parametrize("off_diagonal", [1.0, 0.9])
def test_regmean_is_the_least_squares_fit_of_the_models(off_diagonal):
    given = vectors(3)
    paths = statistics(Path(), given, grams)
    merged = evaluate(f"regmean(a, b, c, files={paths}, off_diagonal={off_diagonal})", given)
    for key in MATRICES:
        base = torch.randn(SHAPES[key], dtype=torch.float64)
        models = regmean_reference([base + d for d in of(given, key)], [f[key] for f in read(paths)], off_diagonal)
        torch.testing.assert_close(base + merged[key].double(), models, rtol=1e-5, atol=1e-5)
    for key in SHAPES.keys() - MATRICES:
        torch.testing.assert_close(merged[key].double(), sum(of(given, key)) / 3)
    one = evaluate(f"regmean(a, files={paths[:1]})", given)
    assert all(torch.equal(one[key], given["a"].deltas[key]) for key in SHAPES)


def test_regmean_without_inputs_is_the_mean():
    given = {name: TaskVector({"w": torch.randn(4, 3)}) for name in "ab"}
    paths = statistics(Path(), given, lambda key, delta: torch.diag(torch.tensor([1.0, 0.0, 2.0])))
    merged = evaluate(f"regmean(a, b, files={paths})", given)["w"]
    torch.testing.assert_close(merged, (given["a"].deltas["w"] + given["b"].deltas["w"]) / 2)


def test_statistics_that_do_not_fit_are_refused():
    given = vectors(2)
    paths = statistics(Path(), given, lambda key, delta: None if key == "bias" else torch.ones(3, 3))
    for text, message in (
        (f"fisher(a, b, files={paths[:1]})", "1 files for 2 vectors"),
        (f"fisher(a, b, files={paths})", "no statistics of 'bias'.* Measure them on the model"),
        (f"regmean(a, b, files={paths})", r"must have shape \[\d+, \d+\], and in .* they have \[3, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(text, given)
    given = {name: TaskVector({"other": torch.ones(3, 3)}) for name in "ab"}
    with pytest.raises(ValueError, match="no statistics of 'other'.* or name it in exclude to have it averaged"):
        evaluate(f"regmean(a, b, files={paths})", given)
    assert evaluate(f"regmean(a, b, files={paths}, exclude='other')", given)["other"].eq(1).all()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Recipe("fisher(a, files=('nowhere.safetensors',))", ["a"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fisher(a)", "one path for each vector"),
        ("regmean(a)", "one path for each vector"),
        ('iso_c(a, conv="flat")', "conv is 'mean' or 'matrix'"),
        ('tsv(a, exclude="(")', "exclude holds .*not a regular expression"),
        ("iso_cts(a, common=1.5)", r"in \[0, 1\]"),
        ('wudi(a, solve="sgd")', "'adam', 'exact' or 'filtered'; found 'sgd'"),
        ('wudi(a, solve="filtered", time=-1)', "time of at least 0; found -1"),
        ('wudi(a, solve="filtered", rank=0)', "whole number of at least 1; found 0"),
        ('wudi(a, solve="filtered", rank="half")', "'all', 'participation'.*found 'half'"),
        ("wudi(a, lr=0)", "positive lr"),
        ('wudi(a, inputs_first="(")', "inputs_first holds .*not a regular expression"),
    ],
)
def test_options_out_of_range_are_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(text, ["a"])

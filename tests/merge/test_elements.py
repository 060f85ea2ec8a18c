"""Methods on single elements against references written from the papers' formulas in float64, and their laws."""

import math

import pytest
import torch

from tva import TaskVector
from tva.compose.recipe import Recipe, RecipeError

SHAPES = {"scalar": (), "one": (1,), "small": (7,), "matrix": (20, 30), "empty": (0,)}


def vectors(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: TaskVector({key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()})
        for name in "abcde"[:count]
    }


def evaluate(text, given):
    return Recipe(text, given).evaluate(given).deltas


def stacked(given, key):
    """All vectors' flattened tensor in float64, shape (vectors, elements)."""
    return torch.stack([vector.deltas[key].double().reshape(-1) for vector in given.values()])


def over_model(given):
    """All vectors in float64, shape (vectors, all elements), in the order of `SHAPES`."""
    return torch.cat([stacked(given, key) for key in SHAPES], dim=1)


def assert_is(merged, expected):
    """Compare a merged vector with a reference, flattened over the model."""
    flat = torch.cat([merged[key].double().reshape(-1) for key in SHAPES])
    torch.testing.assert_close(flat, expected, rtol=2e-5, atol=1e-6)
    assert all(merged[key].shape == shape for key, shape in SHAPES.items())


@pytest.mark.parametrize(("top", "bottom"), [(0.0, 0.0), (0.007, 0.85), (0.1, 0.72), (0.5, 0.0), (0.3, 0.69)])
def test_breadcrumbs_keeps_what_is_between_two_quantiles_of_each_tensor(top, bottom):
    given = vectors(1)
    merged = evaluate(f"breadcrumbs(a, top={top}, bottom={bottom})", given)
    for key, shape in SHAPES.items():
        delta = given["a"].deltas[key].reshape(-1)
        order = delta.abs().argsort()
        stop = len(delta) - math.floor(top * len(delta) + 1e-9)
        expected = torch.zeros_like(delta)
        kept = order[min(math.floor(bottom * len(delta) + 1e-9), stop - 1) : stop]
        expected[kept] = delta[kept]
        assert torch.equal(merged[key].reshape(-1), expected), key
        assert merged[key].any() or shape == (0,)


@pytest.mark.parametrize(("top", "bottom"), [(0.0, 0.0), (0.1, 0.7), (0.3, 0.69)])
def test_breadcrumbs_by_rows_takes_both_fractions_of_the_last_dimension(top, bottom):
    given = vectors(1)
    given["a"] = TaskVector({**given["a"].deltas, "kernel": torch.randn(4, 3, 5, generator=torch.manual_seed(1))})
    merged = evaluate(f"breadcrumbs(a, top={top}, bottom={bottom}, rows=True)", given)
    for key, delta in given["a"].deltas.items():
        width = delta.shape[-1] if delta.ndim else 1
        expected = []
        for row in delta.reshape(-1, max(width, 1)).tolist():
            order = sorted(range(width), key=lambda i, row=row: abs(row[i]))
            stop = width - math.floor(top * width + 1e-9)
            kept = order[min(math.floor(bottom * width + 1e-9), stop - 1) : stop]
            expected += [value if i in kept else 0.0 for i, value in enumerate(row)]
        assert merged[key].reshape(-1).tolist() == expected, key
        assert merged[key].shape == delta.shape


def test_breadcrumbs_by_rows_is_the_authors_rule():
    row = torch.tensor([[0.1, -9, 5, 0.2, 4, -0.3, 0.4, 3, 0.5, 0.6], [1, 2, 3, 4, 5, 6, 7, 8, -9, 10]])
    merged = evaluate("breadcrumbs(a, top=0.1, bottom=0.7, rows=True)", {"a": TaskVector({"w": row})})["w"]
    # their gamma = 0.1 drops the largest of ten, their beta = 0.2 keeps the two next
    assert merged.nonzero().tolist() == [[0, 2], [0, 4], [1, 7], [1, 8]]


def test_breadcrumbs_keeps_ties_and_works_in_float64():
    tied = torch.tensor([1.0, -1, 1, 1, 5, -2], dtype=torch.float64)
    merged = evaluate("breadcrumbs(a, top=0.2, bottom=0.4)", {"a": TaskVector({"w": tied})})["w"]
    assert merged.tolist() == [1, -1, 1, 1, 0, -2]  # the second smallest equals the third
    assert merged.dtype == torch.float64


@pytest.mark.parametrize("vote", ["sum", "count"])
@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("min_agree", [1, 2, 3])
def test_sign_consensus_merges_the_vectors_with_the_elected_sign(vote, combine, min_agree):
    given = vectors()
    merged = evaluate(f'sign_consensus(a, b, c, vote="{vote}", min_agree={min_agree}, combine="{combine}")', given)
    deltas = over_model(given)
    elected = (deltas if vote == "sum" else deltas.sign()).sum(dim=0).sign()
    agrees = deltas.sign() == elected
    total = (deltas * agrees).sum(dim=0)
    expected = total / agrees.sum(dim=0).clamp(min=1) if combine == "mean" else total
    assert_is(merged, expected * (agrees.sum(dim=0) >= min_agree))


@pytest.mark.parametrize("elect", ["weighted", "unweighted"])
@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_ties_elects_before_or_after_weighting(elect, combine):
    given = vectors()
    text = f'ties(a, b, c, density=1.0, weights=(2, 0.5, 1), elect="{elect}", combine="{combine}")'
    deltas, weights = over_model(given), torch.tensor([[2.0], [0.5], [1.0]], dtype=torch.float64)
    elected = (deltas * weights if elect == "weighted" else deltas).sum(dim=0).sign()
    agrees = deltas.sign() == elected
    total = (deltas * weights * agrees).sum(dim=0)
    assert_is(evaluate(text, given), total / (weights * agrees).sum(dim=0) if combine == "mean" else total)
    scaled = evaluate('ties(2 * a, 0.5 * b, c, density=1.0, combine="sum")', given)
    if combine == "sum" and elect == "weighted":
        assert_is(scaled, total)


@pytest.mark.parametrize("min_agree", [0, 1, 2, 3])
@pytest.mark.parametrize("tall", [0.2, 0.4, 0.6])
def test_consensus_keeps_the_sum_where_enough_tall_masks_agree(min_agree, tall):
    given = vectors()
    deltas = over_model(given)
    total = deltas.sum(dim=0)
    masks = deltas.abs() > tall * (total - deltas).abs()
    merged = evaluate(f"consensus(a, b, c, min_agree={min_agree}, tall={tall})", given)
    assert_is(merged, total * (masks.sum(dim=0) >= min_agree))
    for task in (1, 2, 3):
        assert_is(evaluate(f"tall(a, b, c, task={task}, tall={tall})", given), total * masks[task - 1])


def test_emr_unifies_masks_and_rescales():
    given = vectors()
    deltas = over_model(given)
    elected = deltas.sum(dim=0).sign()
    agrees = deltas.sign() == elected
    unified = elected * (deltas.abs() * agrees).max(dim=0).values
    assert_is(evaluate("emr(a, b, c)", given), unified)
    for task, delta in enumerate(deltas, 1):
        masked = unified * (delta * unified > 0)
        expected = masked * delta.abs().sum() / masked.abs().sum()
        assert_is(evaluate(f"emr(a, b, c, task={task})", given), expected)


def slerp_reference(a, b, t):
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


@pytest.mark.parametrize("t", [-0.5, 0.25, 0.5, 0.9])
def test_slerp_follows_the_arc(t):
    given = vectors(2)
    assert_is(evaluate(f'slerp(a, b, t={t}, over="model")', given), slerp_reference(*over_model(given), t))
    merged = evaluate(f"slerp(a, b, t={t})", given)
    for key in ("small", "matrix"):
        expected = slerp_reference(*stacked(given, key), t)
        torch.testing.assert_close(merged[key].double().reshape(-1), expected, rtol=1e-5, atol=1e-6)
    key = "one"  # two numbers are parallel or opposite: a straight line
    a, b = stacked(given, key)
    torch.testing.assert_close(merged[key].double(), (1 - t) * a + t * b)


@pytest.mark.parametrize("over", ["tensor", "model"])
def test_slerp_begins_and_ends_at_its_vectors_and_keeps_equal_norms(over):
    given = vectors(2)
    for t, name in ((0, "a"), (1, "b")):
        merged = evaluate(f'slerp(a, b, t={t}, over="{over}")', given)
        assert all(torch.equal(merged[key], given[name].deltas[key]) for key in SHAPES)
    a = torch.tensor([3.0, 0.0])
    assert evaluate("slerp(a, b)", {"a": TaskVector({"w": a}), "b": TaskVector({"w": a.flip(0)})})[
        "w"
    ].norm() == pytest.approx(3)
    opposite = {"a": TaskVector({"w": a}), "b": TaskVector({"w": -a})}
    assert evaluate("slerp(a, b, t=0.25)", opposite)["w"].tolist() == [1.5, 0]
    half = {"a": TaskVector({"w": a}), "b": TaskVector({"w": torch.zeros(2)})}
    assert evaluate("slerp(a, b, t=0.25)", half)["w"].tolist() == [2.25, 0]


def pcb_reference(deltas, ratio, clamp, between="normalized"):
    """PCB in float64, by sorting; rows are vectors."""
    tasks, count = deltas.shape
    ordered = deltas.abs().sort(dim=1).values
    tail = int(clamp * count + 1e-9)
    low, high = ordered[:, tail, None], ordered[:, count - 1 - tail, None]
    magnitude = deltas.abs().clamp(min=low, max=high)
    clamped, normalized = deltas.sign() * magnitude, (magnitude - low) / (high - low)
    within = torch.exp(tasks * normalized**2)
    agreed = deltas.sign() * normalized if between == "normalized" else deltas
    score = within * torch.tanh(deltas * agreed.sum(dim=0))
    least = score.sort(dim=1).values[:, count - max(1, int(ratio * count + 1e-9)), None]
    score = score.clamp(min=least)
    weight = (score - score.min(dim=1, keepdim=True).values) / (score.max(dim=1, keepdim=True).values - least)
    return (weight * clamped).sum(dim=0) / weight.sum(dim=0).clamp(min=1e-12)


@pytest.mark.parametrize("between", ["normalized", "raw"])
@pytest.mark.parametrize(("ratio", "clamp"), [(0.05, 0.01), (0.3, 0.0), (1.0, 0.2)])
@pytest.mark.parametrize("count", [1, 3])
def test_pcb_weights_what_stands_out_and_agrees(ratio, clamp, count, between):
    given = vectors(count)
    names = ", ".join(given)
    expected = pcb_reference(over_model(given), ratio, clamp, between)
    assert_is(evaluate(f'pcb({names}, ratio={ratio}, clamp={clamp}, between="{between}")', given), expected)


def test_pcb_with_scores_below_zero_and_many_vectors():
    given = {name: TaskVector({"w": torch.randn(500, generator=torch.Generator().manual_seed(i))})
             for i, name in enumerate("abcdefghij")}  # fmt: skip
    given["j"] = TaskVector({"w": -0.1 * sum(vector.deltas["w"] for vector in given.values())})
    expected = pcb_reference(stacked(given, "w"), 0.1, 0.01)
    merged = evaluate(f"pcb({', '.join(given)}, ratio=0.1)", given)["w"]
    torch.testing.assert_close(merged.double(), expected, rtol=1e-4, atol=1e-6)


def test_lines_scales_by_depth_within_each_stack():
    names = {
        "embed.weight": 0.2,
        "encoder.layers.0.layer.1.w": 0.2,
        "encoder.layers.1.w": 0.6,
        "encoder.layers.2.w": 1.0,
        "decoder.block.0.w": 0.2,
        "decoder.block.4.w": 1.0,
        "net.layer1.0.w": 0.2,
        "net.layer3.1.w": 0.6,
        "net.layer5.7.w": 1.0,
        "vit.encoder_layer_0.w": 0.2,
        "vit.encoder_layer_1.w": 1.0,
        "pool.layers.0.w": 0.2,
        "head.bias": 0.2,
    }
    given = {"a": TaskVector({name: torch.ones(3) for name in names})}
    merged = evaluate("lines(a, first=0.2, last=1.0)", given)
    for name, factor in names.items():
        torch.testing.assert_close(merged[name], torch.full((3,), factor), msg=name)


def test_lines_counts_frozen_layers_too():
    untouched = {"h.2.w": "frozen", "h.3.w": "frozen", "wte.w": "frozen"}
    given = {"a": TaskVector({name: torch.ones(3) for name in ("h.0.w", "h.1.w")}, untouched=untouched)}
    merged = evaluate("lines(a, first=0.1, last=1.0)", given)
    torch.testing.assert_close(merged["h.0.w"], torch.full((3,), 0.1))
    torch.testing.assert_close(merged["h.1.w"], torch.full((3,), 0.4))


def test_lines_needs_numbered_layers():
    with pytest.raises(ValueError, match="no tensor's name has one"):
        evaluate("lines(a, first=0.2, last=1.0)", vectors(1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("breadcrumbs(a, top=0.5, bottom=0.5)", "together below 1"),
        ("breadcrumbs(a, top=-0.1)", "at least 0"),
        ('sign_consensus(a, vote="mass")', "vote 'sum' or 'count'"),
        ("consensus(a, tall=-1)", "at least 0"),
        ("tall(a, b)", "task"),
        ("pcb(a, ratio=0)", "ratio is the fraction"),
        ("pcb(a, clamp=0.5)", "clamp that to clamp"),
        ('pcb(a, between="lines")', "between 'normalized' or 'raw'"),
        ('slerp(a, b, over="layer")', "over 'tensor', 'model', 'row' or 'column'"),
        ("slerp(a)", "takes 2 task vectors"),
        ("lines(a)", "first"),
        ('ties(a, elect="some")', "elect 'weighted' or 'unweighted'"),
        ('ties(a, elect="unweighted", weights=(0, 1))', "needs positive weights"),
        ("breadcrumbs(a, density=1.5)", "density the fraction to keep"),
        ('dare(a, rescale="l1")', "rescale 'probability' or 'none'"),
        ("model_stock(a, b, floor=-1)", "finite floor"),
        ("sce(a, b, floor=1)", "floor in"),
        ("slerp(a, b, linear_above=2)", "magnitude of a cosine"),
        ('ties(a, undecided="no")', "undecided 'base' or 'positive'"),
    ],
)
def test_options_out_of_range_are_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(text, ["a", "b"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("consensus(a)", "min_agree=2 and was given 1 vectors"),
        ("tall(a, b, task=3)", "from 1 to 2 here; found 3"),
        ("emr(a, b, task=-1)", "from 1 to 2 here"),
        ("ties(a, b, weights=(1, 2, 3))", "2 vectors and 3 weights"),
    ],
)
def test_options_that_do_not_fit_the_vectors_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        evaluate(text, vectors(2))


def test_negmerge_keeps_the_mean_of_elements_on_which_all_settings_agree():
    a, c = torch.tensor([[1.0, 0, 2], [0, 1, 0]]), torch.tensor([[2.0, -1, 1], [-1, 3, 1]])
    given = {name: TaskVector({"w": delta}) for name, delta in {"a": a, "b": 1.5 * a + 0.25 * c, "c": c}.items()}
    expected = torch.tensor([[5 / 3, 0, 6.25 / 3], [0, 6.25 / 3, 0]])
    torch.testing.assert_close(evaluate("-sign_consensus(a, b, c, min_agree=3)", given)["w"], -expected)

"""Merge methods against references written from the papers' formulas in float64, and their laws on odd tensors."""

import pytest
import torch

from tva import TaskVector
from tva.compose.recipe import Recipe, RecipeError
from tva.merge import METHODS, Chunk
from tva.merge.methods.dare import random_bits
from tva.merge.order_statistics import PASSES, OrderStatistics, Threshold

SHAPES = {"scalar": (), "one": (1,), "small": (7,), "matrix": (20, 30), "ties": (6,), "empty": (0,)}


def vectors(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name in "abcde"[:count]:
        deltas = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
        deltas["ties"] = torch.tensor([1.0, -1.0, 1.0, 0.0, 2.0, -2.0]) * (1 if name != "b" else -1)
        made[name] = TaskVector(deltas)
    return made


def evaluate(text, given=None):
    given = given or vectors()
    return Recipe(text, given).evaluate(given).deltas


def keep_largest(flat, density):
    """Keep the k largest magnitudes by sorting, and those equal to the last of them."""
    if not len(flat):
        return flat
    k = max(1, int(density * len(flat) + 1e-9))
    last = flat.abs().sort(descending=True).values[k - 1]
    return torch.where(flat.abs() >= last, flat, 0)


def ties_reference(given, density, trim, combine):
    """TIES from section 4 of the paper, in float64, over dictionaries of flat tensors."""
    flat = {name: {key: delta.double().reshape(-1) for key, delta in v.deltas.items()} for name, v in given.items()}
    for tensors in flat.values():
        if trim == "tensor":
            tensors.update({key: keep_largest(delta, density) for key, delta in tensors.items()})
        else:
            whole = keep_largest(torch.cat(list(tensors.values())), density)
            parts = whole.split([len(delta) for delta in tensors.values()])
            tensors.update(zip(tensors, parts, strict=True))
    merged = {}
    for key, shape in SHAPES.items():
        stacked = torch.stack([tensors[key] for tensors in flat.values()])  # (vectors, elements)
        elected = stacked.sum(dim=0).sign()
        agrees = (stacked.sign() == elected) & (stacked != 0)
        total = (stacked * agrees).sum(dim=0)
        count = agrees.sum(dim=0).clamp(min=1)
        merged[key] = (total / count if combine == "mean" else total).reshape(shape)
    return merged


@pytest.mark.parametrize("trim", ["model", "tensor"])
@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 1.0])
def test_ties_is_the_papers(trim, combine, density):
    given = vectors()
    merged = evaluate(f'ties(a, b, c, density={density}, trim="{trim}", combine="{combine}")', given)
    for key, expected in ties_reference(given, density, trim, combine).items():
        torch.testing.assert_close(merged[key].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("density", [0.01, 0.3, 1.0])
def test_magnitude_keeps_the_largest_of_each_tensor_and_at_least_one(density):
    given = vectors(1)
    kept = evaluate(f"magnitude(a, density={density})", given)
    for key, delta in given["a"].deltas.items():
        assert torch.equal(kept[key].reshape(-1), keep_largest(delta.reshape(-1), density)), key
    assert all(kept[key].any() for key in SHAPES if key != "empty")


def test_threshold_is_the_kth_largest_whatever_the_chunks():
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(5000, generator=generator) * 10**power for power in (-30, -3, 0, 5)])
    values = torch.cat([values, torch.zeros(100), torch.full((50,), 1e-40), values[:300]])
    ordered = values.abs().sort(descending=True).values
    for density in (1e-9, 0.013, 0.2, 0.5, 0.997, 1.0):
        for size in (7, 1000, len(values)):
            threshold = Threshold(density)
            for pass_number in range(PASSES):
                for chunk in values.split(size):
                    threshold.observe(chunk, pass_number)
                threshold.finish(pass_number)
            assert threshold.value == ordered[max(1, int(density * len(values) + 1e-9)) - 1]


def test_undecided_votes_stay_at_the_base_or_are_positive_as_in_mergekit():
    given = vectors()
    text = 'ties(a, b, density=0.5, trim="tensor"{})'
    for key, delta in evaluate(text.format(', undecided="positive"'), given).items():
        trimmed = torch.stack([keep_largest(given[name].deltas[key].reshape(-1), 0.5) for name in "ab"])
        agrees = trimmed.sign() == torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
        expected = (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)
        assert torch.equal(delta.reshape(-1), expected), key
    assert evaluate(text.format(', undecided="positive"'), given)["ties"].tolist() == [1, 1, 1, 0, 2, 2]
    assert evaluate(text.format(""), given)["ties"].tolist() == [0] * 6


def test_dare_drops_the_right_share_and_keeps_the_mean():
    given = {"a": TaskVector({"w": torch.ones(200_000)})}
    for drop in (0.1, 0.5, 0.9, 0.99):
        dropped = evaluate(f"dare(a, drop={drop})", given)["w"]
        share = float((dropped == 0).float().mean())
        assert share == pytest.approx(drop, abs=4 * (drop * (1 - drop) / 200_000) ** 0.5)
        assert torch.equal(dropped[dropped != 0], torch.full_like(dropped[dropped != 0], 1) / (1 - drop))
    assert torch.equal(evaluate("dare(a, drop=0)", given)["w"], given["a"].deltas["w"])


def test_dare_depends_only_on_seed_vector_and_tensor():
    one = random_bits(1000, Chunk("w", 0, ("a",)), seed=0)
    assert torch.equal(one, random_bits(1000, Chunk("w", 0, ("a",)), seed=0))
    assert torch.equal(one[17:40], random_bits(23, Chunk("w", 17, ("a",)), seed=0))
    for chunk, seed in ((Chunk("w", 0, ("b",)), 0), (Chunk("v", 0, ("a",)), 0), (Chunk("w", 0, ("a",)), 1)):
        other = random_bits(1000, chunk, seed)
        assert int((one == other).sum()) == 0
        agreement = float(((one > 0) == (other > 0)).float().mean())
        assert agreement == pytest.approx(0.5, abs=0.08)
    before, after = 2**32 - 5, 2**32 + 5  # indices beyond 32 bits have a key of their own
    across = random_bits(10, Chunk("w", before, ("a",)), seed=0)
    assert torch.equal(across[5:], random_bits(5, Chunk("w", 2**32, ("a",)), seed=0))
    assert after - before == len(across)


def test_random_bits_are_uniform_and_neighbors_independent():
    bits = random_bits(2**20, Chunk("w", 0, ("a",)), seed=3).double() / 2**31
    assert float(bits.mean()) == pytest.approx(0, abs=4 * (1 / 3 / 2**20) ** 0.5)
    assert float(bits.var()) == pytest.approx(1 / 3, rel=5e-3)
    for lag in (1, 2, 64, 4096):
        assert float((bits[lag:] * bits[:-lag]).mean() * 3) == pytest.approx(0, abs=5e-3)


@pytest.mark.parametrize(
    "text", ["mean({0})", "ties({0}, density=1.0)", "magnitude({0}, density=1.0)", "dare({0}, drop=0)"]
)
def test_one_vector_in_gives_that_vector(text):
    given = vectors(1)
    merged = evaluate(text.format("a"), given)
    for key, delta in given["a"].deltas.items():
        assert torch.equal(merged[key], delta), key


@pytest.mark.parametrize("text", ["mean({})", "ties({}, density=0.3)", 'ties({}, trim="tensor", combine="sum")'])
def test_the_order_of_vectors_does_not_matter(text):
    first, second = evaluate(text.format("a, b, c")), evaluate(text.format("c, a, b"))
    for key in SHAPES:
        torch.testing.assert_close(first[key], second[key], rtol=1e-6, atol=1e-7)


def test_zero_vectors_give_zero():
    given = {name: TaskVector({"w": torch.zeros(5)}) for name in "ab"}
    for text in ("mean(a, b)", "ties(a, b)", "magnitude(a, density=0.2)", "dare(a)"):
        assert not evaluate(text, given)["w"].any(), text


def test_methods_nest_and_inner_ones_run_first():
    given = vectors()
    nested = evaluate(
        '0.4 * ties(dare(a, seed=1), 2 * magnitude(b, density=0.5), c, density=0.3, trim="tensor")', given
    )
    inner = {
        "a": Recipe("dare(a, seed=1)", given).evaluate(given),
        "b": 2 * Recipe("magnitude(b, density=0.5)", given).evaluate(given),
        "c": given["c"],
    }
    expected = ties_reference(inner, 0.3, "tensor", "mean")
    for key in SHAPES:
        torch.testing.assert_close(nested[key].double(), 0.4 * expected[key], rtol=1e-6, atol=1e-7)


def test_a_tensor_that_one_vector_left_frozen_counts_as_zero():
    base = {"x": torch.zeros(3), "y": torch.zeros(2)}
    a = TaskVector.between(base, {"x": torch.tensor([1.0, 2.0, -3.0]), "y": torch.zeros(2)})
    b = TaskVector.between(base, {"x": torch.zeros(3), "y": torch.ones(2)})
    merged = evaluate("ties(a, b, density=1.0)", {"a": a, "b": b})
    assert merged["x"].tolist() == [1, 2, -3]
    assert merged["y"].tolist() == [1, 1]


def test_running_statistics_follow_linear_recipes_only():
    base = {"w": torch.zeros(3), "bn.running_mean": torch.zeros(3)}
    a = TaskVector.between(base, {name: torch.ones(3) for name in base})
    given = {"a": a}
    assert Recipe("0.5 * mean(a)", given).evaluate(given).buffers["bn.running_mean"].tolist() == [0.5] * 3
    trimmed = Recipe("ties(a)", given).evaluate(given)
    assert trimmed.buffers == {}
    assert trimmed.untouched == {"bn.running_mean": "excluded"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ties(a, density=0)", "density is the fraction"),
        ("ties(a, density=1.5)", "density is the fraction"),
        ('ties(a, trim="layer")', "trim 'model' or 'tensor'"),
        ("ties(a, densty=0.2)", "no option 'densty'; its options are density, trim, elect, combine"),
        ("dare(a, drop=1)", r"drop must be in \[0, 1\)"),
        ("dare(a, b)", "dare takes 1 task vectors and was given 2"),
        ("magnitude(a)", "density"),
        ("ties(a, density=b)", "An option must be"),
    ],
)
def test_options_out_of_range_are_refused_with_the_usage(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(text, ["a", "b"])


def test_an_option_can_be_a_coefficient():
    recipe = Recipe("ties(a, density=k)", ["a"], {"k": 0.5})
    assert recipe.coefs == {"k": 0.5}


def test_every_method_says_what_it_is():
    for name, method in METHODS.items():
        assert method.usage.startswith(f"{name}("), name
        assert method.__doc__


def test_order_statistics_are_found_wherever_the_first_chunk_lets_them_be_expected():
    generator = torch.Generator().manual_seed(0)
    narrow = torch.randn(300_000, generator=generator)
    misleading = narrow.clone()
    misleading[:200_000] *= 1e-9  # the first chunk lies elsewhere
    misleading[::61] = 1e9  # and so does what is sampled
    wide = narrow * torch.exp(8 * torch.randn(len(narrow), generator=generator))
    odd = torch.cat([narrow.bfloat16().float(), torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45])])
    taken = {}
    for name, values in {"narrow": narrow, "misleading": misleading, "wide": wide, "odd": odd}.items():
        for signed in (False, True):
            count = len(values)
            ranks = [0, count // 3, 4 * count // 5, count - 1]
            statistics = OrderStatistics(lambda _, ranks=ranks: ranks, signed)
            for pass_number in range(PASSES):
                for chunk in values.split(6100):
                    statistics.observe(chunk, pass_number)
                statistics.finish(pass_number)
                if statistics.found:
                    break
            ordered = (values if signed else values.abs()).sort().values
            assert statistics.values == ordered[ranks].tolist(), (name, signed)
            taken[name] = max(pass_number, taken.get(name, 0))
    assert taken["misleading"] == PASSES - 1

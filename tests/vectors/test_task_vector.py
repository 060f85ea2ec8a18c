"""TaskVector: laws of the arithmetic, odd tensors, files, and the mistakes people make."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tva import MismatchError, NoEffectError, TaskVector, fingerprint, open_weights, save_weights
from tva.checkpoints import tensor_digest


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Odd tensors on purpose: scalar, one element, empty, small, non-contiguous, integer and boolean buffers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "scalar": draw(),
        "one": draw(1),
        "empty": draw(0, 3),
        "small": draw(7),
        "matrix": draw(5, 4).T,
        "frozen": torch.ones(3, dtype=dtype),
        "bn.running_mean": draw(4),
        "bn.running_var": draw(4).abs(),
        "bn.num_batches_tracked": torch.tensor(seed),
        "mask": torch.tensor([True, seed > 1]),
    }


@pytest.fixture
def base() -> dict[str, torch.Tensor]:
    return state(0)


@pytest.fixture
def a(base) -> TaskVector:
    return TaskVector.between(base, state(1))


@pytest.fixture
def b(base) -> TaskVector:
    return TaskVector.between(base, state(2))


def assert_same(left: TaskVector, right: TaskVector, atol: float = 0.0) -> None:
    assert left.names == right.names
    for name in left.deltas.keys() | right.deltas.keys():
        torch.testing.assert_close(left.deltas[name], right.deltas[name], rtol=0, atol=atol)


def test_between_is_finetuned_minus_base_in_float64_reference(base, a):
    for name in ("scalar", "one", "empty", "small", "matrix"):
        expected = (state(1)[name].double() - base[name].double()).float()
        torch.testing.assert_close(a.deltas.get(name, torch.zeros(0, 3)), expected, rtol=1e-7, atol=0)


def test_parts_that_do_not_move_are_listed_with_the_reason(a):
    assert a.untouched == {
        "empty": "frozen",
        "frozen": "frozen",
        "bn.num_batches_tracked": "integer",
        "mask": "integer",
    }
    assert set(a.buffers) == {"bn.running_mean", "bn.running_var"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zero_scaling_coef_gives_back_the_base_bit_for_bit(dtype):
    base = {**state(0, dtype), "negative_zero": torch.tensor([-0.0, 1.0], dtype=dtype)}
    vector = TaskVector.between(base, {**state(1, dtype), "negative_zero": torch.tensor([3.0, 1.0], dtype=dtype)})
    edited = vector.apply_to(base, scaling_coef=0)
    assert {name: tensor_digest(tensor) for name, tensor in edited.items()} == fingerprint(base).tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coef", [1.0, -0.3, 2.5])
def test_apply_is_the_float32_sum_rounded_once(dtype, coef):
    base, tuned = state(0, dtype), state(1, dtype)
    edited = TaskVector.between(base, tuned).apply_to(base, scaling_coef=coef, buffers="delta")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("scalar", "one", "small", "matrix", "bn.running_mean"):
        scaled = (tuned[name].to(wide) - base[name].to(wide)) * coef
        expected = (base[name].to(wide) + scaled).to(dtype)
        assert torch.equal(edited[name], expected), name
        exact = base[name].double() + coef * (tuned[name].double() - base[name].double())
        torch.testing.assert_close(edited[name].double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert edited[name].dtype == dtype


def test_coefficient_one_gives_the_finetuned_model_to_rounding(base, a):
    edited = a.apply_to(base, buffers="delta")
    for name, tensor in state(1).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(edited[name], tensor, rtol=0, atol=3e-7)
        else:
            assert torch.equal(edited[name], base[name])  # integer buffers are never edited


def test_statistics_are_kept_unless_asked_for_and_variances_stay_positive(base, a):
    assert torch.equal(a.apply_to(base)["bn.running_mean"], base["bn.running_mean"])
    far = a.apply_to(base, scaling_coef=-50, buffers="delta")
    assert (far["bn.running_var"] >= 0).all()
    assert not torch.equal(far["bn.running_mean"], base["bn.running_mean"])


def test_inputs_are_left_unchanged(base, a):
    before, deltas = fingerprint(base), fingerprint(a.deltas)
    (-(2 * a) + a / 3).apply_to(base, 0.7)
    assert fingerprint(base) == before
    assert fingerprint(a.deltas) == deltas


def test_algebra(base, a, b):
    assert_same(a + b - b, a, atol=1e-6)
    assert_same(a + b, b + a)
    assert_same((-a) * -1, a)
    assert_same(2 * a, a * 2)
    assert_same(a / 2, a * 0.5)
    assert_same(sum([a, b, a]), a + b + a)
    assert_same(TaskVector.analogy(a, b, a), b, atol=1e-6)
    edited = (a + b).apply_to(base, 0.5)
    mean = (state(1)["small"].double() + state(2)["small"].double()) / 2
    torch.testing.assert_close(edited["small"].double(), mean, rtol=0, atol=1e-6)  # two vectors at 0.5: the average


def test_a_tensor_frozen_in_one_vector_counts_as_zero():
    base = {"x": torch.zeros(2), "y": torch.zeros(2)}
    left = TaskVector.between(base, {"x": torch.ones(2), "y": torch.zeros(2)})
    right = TaskVector.between(base, {"x": torch.zeros(2), "y": torch.ones(2)})
    assert (left - right).apply_to(base)["y"].tolist() == [-1, -1]
    assert left.dot(right) == 0
    assert (left + right).untouched == {}


def test_norm_dot_and_cosine_are_those_of_the_one_flattened_vector(a, b):
    names = sorted(a.deltas)
    left = torch.cat([a.deltas[name].reshape(-1).double() for name in names])
    right = torch.cat([b.deltas[name].reshape(-1).double() for name in names])
    assert a.norm() == pytest.approx(float(left.norm()), rel=1e-12)
    assert a.dot(b) == pytest.approx(float(left @ right), rel=1e-12)
    assert a.cosine(b) == pytest.approx(float(left @ right / left.norm() / right.norm()), rel=1e-12)
    assert a.cosine(-2 * a) == pytest.approx(-1)


def test_random_like_has_the_same_norm_per_tensor_and_depends_only_on_seed_and_name(a):
    one, again, other = a.random_like(0), (a + a - a).random_like(0), a.random_like(1)
    for name, delta in a.deltas.items():
        assert one.deltas[name].norm() == pytest.approx(float(delta.norm()), rel=1e-5)
        torch.testing.assert_close(one.deltas[name], again.deltas[name])
    assert abs(one.cosine(a)) < 0.9
    assert abs(one.cosine(other)) < 0.9
    assert one.buffers == {}


@pytest.mark.parametrize("expression", ["5 + v", "v + 5", "v * v", "v / v", "v + 0.0", "5 - v", "True * v"])
def test_nonsense_is_a_type_error(expression, a):
    with pytest.raises(TypeError):
        eval(expression, {"v": a})


def test_division_by_zero_and_infinite_factors_are_refused(a):
    with pytest.raises(ZeroDivisionError, match="divided by 0"):
        a / 0
    with pytest.raises(ValueError, match="finite number"):
        a * float("nan")


# --- mistakes


def test_mismatched_keys_and_shapes_are_named_in_one_message(base):
    tuned = {**state(1), "extra": torch.zeros(1), "small": torch.zeros(8)}
    del tuned["one"]
    with pytest.raises(MismatchError, match=r"lacks 'one'.*has 'extra'.*'small' is \[7\].*\[8\]"):
        TaskVector.between(base, tuned)


def test_nan_is_refused(base):
    with pytest.raises(ValueError, match="deltas of 'one' hold NaN"):
        TaskVector.between(base, {**state(1), "one": torch.tensor([float("nan")])})


def test_another_base_is_refused_with_both_fingerprints_and_the_number_of_tensors(base, a):
    other = {**base, "small": base["small"] + 1, "one": base["one"] + 1}
    with pytest.raises(
        MismatchError, match=f"{fingerprint(base).digest}.*{fingerprint(other).digest}: 2 of 10 tensors"
    ):
        a.apply_to(other)
    assert not torch.equal(a.apply_to(other, allow_other_base=True)["small"], other["small"])


def test_vectors_of_different_bases_do_not_combine(base, a):
    other = {**base, "small": base["small"] + 1}
    with pytest.raises(MismatchError, match=r"taken from one base.*1 of 10 tensors differ"):
        a + TaskVector.between(other, state(1))


def test_vectors_of_different_architectures_do_not_combine(a):
    other = TaskVector.between({"w": torch.zeros(1)}, {"w": torch.ones(1)})
    for operation in (lambda: a + other, lambda: a.dot(other)):
        with pytest.raises(MismatchError, match="one architecture"):
            operation()


def test_a_base_with_a_key_too_many_or_too_few_is_refused(base, a):
    with pytest.raises(MismatchError, match="lacks 'extra'"):
        a.apply_to({**base, "extra": torch.zeros(1)}, allow_other_base=True)
    for missing in ("small", "frozen"):
        with pytest.raises(MismatchError, match=missing):
            a.apply_to({name: value for name, value in base.items() if name != missing}, allow_other_base=True)


def test_an_edit_that_changes_nothing_is_an_error():
    base = {"w": torch.ones(4, dtype=torch.bfloat16)}
    vector = TaskVector({"w": torch.full((4,), 1e-4)})
    with pytest.raises(NoEffectError, match="vanish in rounding"):
        vector.apply_to(base)
    with pytest.raises(NoEffectError, match="moves no tensor"):
        TaskVector.between(base, base).apply_to(base)


# --- files


def test_save_and_load_give_the_same_vector(a):
    a.save("a.tv.safetensors")
    loaded = TaskVector.load("a.tv.safetensors")
    assert_same(loaded, a)
    assert loaded.untouched == a.untouched
    assert loaded.origin == a.origin
    assert fingerprint(loaded.buffers) == fingerprint(a.buffers)


def test_the_file_is_plain_safetensors_with_a_readable_header(base, a):
    a.save("a.tv.safetensors", dtype=torch.bfloat16)
    with safe_open("a.tv.safetensors", "pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == a.deltas.keys() | a.buffers.keys()
        assert file.get_tensor("small").dtype == torch.bfloat16
    assert metadata["tva.format"] == "task_vector/1"
    assert metadata["tva.base_fingerprint"] == fingerprint(base).digest
    assert metadata["tva.finetuned_fingerprint"] == fingerprint(state(1)).digest
    stored = TaskVector.load("a.tv.safetensors")
    assert stored.deltas["small"].dtype == torch.float32
    assert (stored - a).norm() < 2**-8 * a.norm()


def test_a_failed_save_leaves_nothing_behind(a):
    with pytest.raises(ValueError, match="do not fit"):
        (a * 1e6).save("a.tv.safetensors", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        a.save("a.pt")
    assert list(Path().iterdir()) == []


def test_a_checkpoint_is_not_a_task_vector_file(base):
    save_weights(base, "base.safetensors")
    with pytest.raises(ValueError, match="is a checkpoint, not a task vector file"):
        TaskVector.load("base.safetensors")


def test_fingerprints_agree_in_memory_and_in_every_format(base):
    save_weights(base, "base.safetensors")
    torch.save({"state_dict": base, "epoch": 1}, "base.ckpt")
    torch.save({f"module.{name}": tensor for name, tensor in base.items()}, "base.pt")
    for name in ("base.safetensors", "base.ckpt", "base.pt"):
        assert fingerprint(open_weights(name)) == fingerprint(base), name


def test_sums_of_16_bit_deltas_are_rounded_once():
    parts = [torch.randn(50).bfloat16() for _ in range(5)]
    found = sum(TaskVector({"w": part}) for part in parts).deltas["w"]
    torch.testing.assert_close(found, sum(part.double() for part in parts).float(), rtol=1e-6, atol=1e-6)

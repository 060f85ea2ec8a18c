"""Fused kernels: the bits of torch's own operations, for every stored value and for odd ones."""

import numpy
import pytest
import torch

from tva import kernels
from tva.steps import ADD, DIV, DROP, LOAD, MUL, NEG, SUB, TRIM, ZERO, Step, encode

KINDS = {torch.bfloat16: kernels.BFLOAT16, torch.float16: kernels.FLOAT16, torch.float32: kernels.FLOAT32}


def bits_of(x):
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def every_half(dtype):
    return torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)


def odd_floats():
    """Float32 values around everything that rounding to 16 bits may trip over, and two million at random."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (2_000_000,), generator=generator).to(torch.int32)
    near = torch.cat([every_half(dtype).float() for dtype in (torch.float16, torch.bfloat16)])
    halfway = (near[:-1].double() + near[1:].double()).div(2).float()
    around = torch.cat([near, halfway])
    steps = [bits_of(around) + step for step in (-1, 0, 1)]
    return torch.cat([patterns, *steps]).view(torch.float32)


def run(stored, steps, coef=None, start=0, relative=True):
    """Run a program on rows of one dtype, the first of which is the base; its value, or the edit and its account."""
    dtype, length = stored.dtype, stored.shape[1]
    padded = torch.zeros(len(stored), length + length % 2, dtype=dtype)
    padded[:, :length] = stored
    memory = padded.view(torch.uint8).numpy()
    program = encode(tuple(steps))
    arguments = (
        *(program.steps, program.numbers, program.depth, memory.view(numpy.uint16), memory.view(numpy.float32)),
        *(numpy.array([KINDS[dtype]] * len(stored)), numpy.array([False] + [relative] * (len(stored) - 1)), start),
    )
    if coef is None:
        out = torch.empty(length)
        kernels.evaluate(*arguments, out.numpy())
        return out
    out = torch.empty(length + length % 2, dtype=dtype)
    floats = out.numpy() if dtype == torch.float32 else numpy.empty(0, numpy.float32)
    halves = out.view(torch.uint8).numpy().view(numpy.uint16)
    account = kernels.edit(*arguments, numpy.float32(coef), KINDS[dtype], length, halves, floats)
    return out[:length], account


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_stored_half_widens_to_what_torch_gives(dtype):
    halves = every_half(dtype)
    wide = run(torch.stack([torch.zeros_like(halves), halves]), [Step(LOAD, 1)], relative=False)
    known = ~halves.float().isnan()
    assert torch.equal(bits_of(wide)[known], bits_of(halves.float())[known])
    assert bool(wide[~known].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_that_of_torch_for_odd_values(dtype):
    values = odd_floats()
    halves = torch.empty(len(values), dtype=dtype)
    kernels._round(KINDS[dtype], values.numpy(), halves.view(torch.uint16).numpy(), numpy.empty(0, numpy.float32))
    expected, known = values.to(dtype), ~values.isnan()
    assert torch.equal(bits_of(halves)[known], bits_of(expected)[known])
    assert bool(halves[~known].isnan().all())


@pytest.mark.parametrize("length", [0, 1, 5, 2048, 2049, 10_000])
@pytest.mark.parametrize("dtype", list(KINDS))
def test_steps_are_the_operations_of_torch(dtype, length):
    generator = torch.Generator().manual_seed(length)
    stored = torch.randn(3, length, generator=generator).to(dtype)
    base, a, b = stored.float()
    steps = [Step(LOAD, 1), Step(MUL, numbers=(0.3,)), Step(LOAD, 2), Step(NEG), Step(DIV, numbers=(7.0,)), Step(SUB)]
    steps += [Step(ZERO), Step(ADD), Step(TRIM, numbers=(0.25,))]
    expected = torch.nn.functional.hardshrink((a - base) * 0.3 - (-(b - base) / 7.0) + 0.0, 0.25)
    assert torch.equal(run(stored, steps), expected)
    edited, (moving, changed, change_square, base_square) = run(stored, steps, coef=-0.6)
    wanted = (expected * torch.tensor(-0.6) + base).to(dtype)
    assert torch.equal(edited, wanted)
    assert (moving, changed) == (int(expected.count_nonzero()), int((wanted.float() - base).count_nonzero()))
    assert change_square == pytest.approx(float((wanted.double() - base).square().sum()), rel=1e-5)
    assert base_square == pytest.approx(float(base.double().square().sum()), rel=1e-5)


def test_dropping_depends_on_the_place_alone():
    stored = torch.ones(2, 6000)
    stored[0] = 0
    steps = [Step(LOAD, 1), Step(DROP, round(0.4 * 2**32) - 2**31, (0.6,), (12345, 67890))]
    whole = run(stored, steps, start=2**32 - 6000)
    assert torch.equal(whole[123:], run(stored[:, 123:], steps, start=2**32 - 6000 + 123))
    assert set(whole.tolist()) == {0.0, float(torch.tensor(1.0) / 0.6)}
    assert 0.57 < float((whole > 0).float().mean()) < 0.63


def test_the_account_counts_what_rounding_takes_away():
    stored = torch.tensor([[1.0, 1.0, 2.0, 0.0], [1.0, 1.0078125, 2.0, 0.5]]).bfloat16()
    edited, (moving, changed, _, _) = run(stored, [Step(LOAD, 1)], coef=0.1)
    assert (moving, changed) == (2, 1)  # 1 + 0.00078 rounds to 1
    assert edited.tolist() == [1.0, 1.0, 2.0, float(torch.tensor(0.05).bfloat16())]

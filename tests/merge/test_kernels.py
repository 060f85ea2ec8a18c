"""Fused kernels: the bits of torch's own operations, for every stored value and for odd ones."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import pytest
import torch

from tva import save_weights
from tva.merge import kernels
from tva.merge.program import ADD, DIV, DROP, LOAD, MUL, NEG, SUB, TRIM, ZERO, Step, encode

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
    edited, (finite, moving, changed, change_square, base_square) = run(stored, steps, coef=-0.6)
    assert finite
    wanted = (expected * torch.tensor(-0.6) + base).to(dtype)
    assert torch.equal(edited, wanted)
    assert (moving, changed) == (int(expected.count_nonzero()), int((wanted.float() - base).count_nonzero()))
    assert change_square == pytest.approx(float((wanted.double() - base).square().sum()), rel=1e-5)
    assert base_square == pytest.approx(float(base.double().square().sum()), rel=1e-5)


def test_dropping_depends_only_on_the_position():
    stored = torch.ones(2, 6000)
    stored[0] = 0
    steps = [Step(LOAD, 1), Step(DROP, round(0.4 * 2**32) - 2**31, (0.6,), (12345, 67890))]
    whole = run(stored, steps, start=2**32 - 6000)
    assert torch.equal(whole[123:], run(stored[:, 123:], steps, start=2**32 - 6000 + 123))
    assert set(whole.tolist()) == {0.0, float(torch.tensor(1.0) / 0.6)}
    assert 0.57 < float((whole > 0).float().mean()) < 0.63


def test_the_account_counts_what_rounding_takes_away():
    stored = torch.tensor([[1.0, 1.0, 2.0, 0.0], [1.0, 1.0078125, 2.0, 0.5]]).bfloat16()
    edited, (_, moving, changed, _, _) = run(stored, [Step(LOAD, 1)], coef=0.1)
    assert (moving, changed) == (2, 1)  # 1 + 0.00078 rounds to 1
    assert edited.tolist() == [1.0, 1.0, 2.0, float(torch.tensor(0.05).bfloat16())]


@pytest.mark.parametrize("signed", [False, True])
def test_counts_of_a_window_are_those_of_each_key_by_itself(signed):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1000,), generator=generator, dtype=torch.int64).numpy()
    top = 2**32 if signed else 2**31
    for start, shift, bins in [(0, 14, 2**18), (0x3F800000, 0, 64), (0x3F800000, 3, 512), (0x40000000, 10, 1024)]:
        last = start + (bins << shift) - 1
        edges = [key for key in (start - 1, start, start + 1, last - 1, last, last + 1) if 0 <= key < top]
        keys = numpy.array(edges * 40, numpy.uint64)
        stored = keys
        if signed:  # undo the turning of `kernels._key`
            stored = numpy.where(keys >= 2**31, keys ^ numpy.uint64(2**31), keys ^ numpy.uint64(2**32 - 1))
        values = numpy.concatenate([bits & 0xFFFFFFFF, stored.astype(numpy.int64)]).astype(numpy.uint32)
        values = values[~numpy.isnan(values.view(numpy.float32))].view(numpy.float32)
        expected = numpy.zeros(bins + 2, numpy.int64)
        for key in (int(kernels._key(value, signed)) for value in values):
            expected[0 if key < start else -1 if key > last else 1 + ((key - start) >> shift)] += 1
        counts = numpy.zeros(bins + 2, numpy.int64)
        kernels.count_window(values, signed, start, shift, counts)
        assert counts.tolist() == expected.tolist(), (start, shift)
        assert start == 0 or counts[[0, 1, -2, -1]].all(), "keys on both sides of both ends were counted"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_single_delta_is_the_difference(dtype):
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(2, 5000, generator=generator).to(dtype)
    assert torch.equal(run(stored, [Step(LOAD, 1)]), stored[1].float() - stored[0].float())


@pytest.mark.slow  # compiles all kernels
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="becomes another user")
@pytest.mark.parametrize("cache", [True, False])
def test_compose_runs_for_a_user_who_can_write_nowhere_but_to_the_output(tmp_path, cache):
    """As in a container with --user: the package is another's, and there is no home."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o777)
    for name, value in (("base", 1.0), ("a", 2.0)):
        save_weights({"w": torch.full((3, 2), value)}, folder / f"{name}.safetensors")
        (folder / f"{name}.safetensors").chmod(0o644)
    environment = {"HOME": "/nonexistent", "PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"TVA_CACHE": str(folder / "cache")} if cache else {}
    code = "from tva.cli.main import main; import sys; main(sys.argv[1:])"
    words = ["compose", "--base", "base.safetensors", "--vectors.a", "a.safetensors", "--recipe", "a", "--output", "o"]
    user = ["setpriv", "--reuid", "65534", "--clear-groups", sys.executable, "-c", code]
    done = subprocess.run([*user, *words], cwd=folder, env=environment, capture_output=True, text=True)
    if "Permission denied" in done.stderr and "python" in done.stderr:
        pytest.skip("another user cannot run this Python")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("what is compiled cannot be kept") == (0 if cache else 1)
    assert any(folder.glob("cache/kernels/**/*.nbi")) == cache
    shutil.rmtree(folder)

"""Complex parameters: their real and imaginary parts are edited as real numbers, in memory as through files."""

from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from tva.callbacks import TaskVectorCallback

from tva import MismatchError, TaskVector, edit_model, fingerprint, open_weights, save_weights
from tva.compose.apply import compose
from tva.compose.recipe import Recipe
from tva.compose.revert import revert
from tva.compose.verify import verify
from tva.vectors import compare, compress, extract, inspect, match

BASE = "base.safetensors"

SHAPES = {"fno.weight": (5, 3, 7), "fno.bias": (9,), "one": (1,), "scalar": (), "empty": (0, 2), "matrix": (6, 4)}
RECIPES = [
    "0.5 * (a - 2 * b) / 3",
    "analogy(a, b, a)",
    "mean(a, b)",
    "ties(a, b, density=0.3)",
    'ties(breadcrumbs(a), b, trim="tensor")',
    "dare(a, drop=0.7, seed=3) + b",
    "della(a, density=0.4, epsilon=0.2)",
    "magnitude(a, density=0.25)",
    "breadcrumbs(a, top=0.02, bottom=0.5, rows=True)",
    "consensus(a, b)",
    "emr(a, b, task=1)",
    "pcb(a, b, ratio=0.2)",
    "slerp(a, b)",
    "sce(a, b, density=0.5)",
    "model_stock(a, b)",
    "rescale(magnitude(a, density=0.5), a)",
    "tsv(a, b)",
    "iso_c(a, b)",
    "cart(a, b)",
    "svc(mean(a, b), a, b)",
]


def state(seed, start=None):
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, dtype=torch.complex64, generator=generator) for name, shape in SHAPES.items()}
    drawn["real"] = torch.randn(4, 6, generator=generator)
    return drawn if start is None else {name: start[name] + 0.1 * drawn[name] for name in drawn}


@pytest.fixture
def files():
    """A base and two models fine-tuned from it, in the folder to work in."""
    base = state(0)
    save_weights(base, BASE)
    for seed, name in enumerate("ab", start=1):
        save_weights(state(seed, base), f"{name}.safetensors")
    return {name: f"{name}.safetensors" for name in "ab"}


def parts(weights):
    return {name: torch.view_as_real(x) if x.is_complex() else x for name, x in weights.items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_files_hold_what_memory_gives_bit_for_bit(files, recipe):
    vectors = {name: path for name, path in files.items() if name in Recipe(recipe, "ab").vectors}
    report = compose(BASE, vectors, recipe, "out.safetensors", scaling_coef=0.7)
    assert report.notes == []
    base, edited = open_weights(BASE), open_weights("out.safetensors")
    taken = {name: TaskVector.between(base, open_weights(path)) for name, path in vectors.items()}
    expected = Recipe(recipe, list(vectors)).evaluate(taken).apply_to(base, 0.7)
    assert {name: x.dtype for name, x in edited.items()} == {name: x.dtype for name, x in base.items()}
    assert fingerprint(edited) == fingerprint(expected)
    assert verify("out.safetensors").holds


def test_both_parts_move_as_real_numbers_do(files):
    """The reference: the same model with each complex tensor stored as pairs of real numbers."""
    for path in (BASE, *files.values()):
        save_weights(parts(open_weights(path)), f"real-{path}")
    compose(BASE, files, "0.3 * a - b", "out.safetensors")
    compose("real-base.safetensors", {n: f"real-{p}" for n, p in files.items()}, "0.3 * a - b", "real.safetensors")
    assert fingerprint(parts(open_weights("out.safetensors"))) == fingerprint(open_weights("real.safetensors"))
    base, edited = open_weights(BASE), open_weights("out.safetensors")
    assert all((edited[name] - base[name]).imag.abs().max() > 0.01 for name in ("fno.weight", "fno.bias", "scalar"))


def test_vector_files_hold_complex_deltas(files):
    for name, path in files.items():
        assert extract(BASE, path, f"{name}.tv.safetensors").untouched == {"frozen": 1}  # the empty one
    taken = TaskVector.between(open_weights(BASE), open_weights("a.safetensors"))
    loaded = TaskVector.load("a.tv.safetensors")
    assert loaded.deltas["fno.weight"].dtype == torch.complex64
    assert fingerprint(loaded.deltas) == fingerprint(taken.deltas)
    norm = sum(float(x.abs().double().square().sum()) for x in taken.deltas.values()) ** 0.5
    assert taken.norm() == pytest.approx(norm, rel=1e-6)
    assert float(open_weights("a.tv.safetensors").metadata["tva.norm"]) == pytest.approx(norm, rel=1e-5)
    assert inspect("a.tv.safetensors").whole.norm == pytest.approx(norm, rel=1e-6)
    base = sum(float(x.abs().double().square().sum()) for x in state(0).values()) ** 0.5
    assert inspect(BASE).whole.norm == pytest.approx(base, rel=1e-6)
    taken.save("saved.tv.safetensors", dtype=torch.bfloat16)
    assert TaskVector.load("saved.tv.safetensors").deltas["scalar"].dtype == torch.complex64
    vectors = {name: f"{name}.tv.safetensors" for name in files}
    first = compose(BASE, files, "ties(a, b)", "1.safetensors")
    assert compose(BASE, vectors, "ties(a, b)", "2.safetensors").edited == first.edited
    compose(BASE, vectors, "0.25 * a", "3.safetensors")
    assert match("3.safetensors", [vectors["a"]], BASE).fits[0].coef == pytest.approx(0.25, rel=1e-5)
    cosine = taken.cosine(TaskVector.load("b.tv.safetensors"))
    assert compare(list(vectors.values())).whole.cosines[0][1] == pytest.approx(cosine, abs=1e-6)
    with pytest.raises(ValueError, match="is complex, and complex deltas are stored exactly only"):
        compress("a.tv.safetensors", "small.tv.safetensors", encoding="int8")


def test_an_edit_of_complex_weights_is_taken_back(files):
    for name, path in files.items():
        extract(BASE, path, f"{name}.tv.safetensors")
    vectors = {name: f"{name}.tv.safetensors" for name in files}
    compose(BASE, vectors, "ties(a, b)", "out.safetensors", keep_undo="with_vectors")
    revert("out.safetensors", output="back.safetensors")
    assert fingerprint(open_weights("back.safetensors")) == fingerprint(open_weights(BASE))
    compose(BASE, files, "a", "half.safetensors", dtype="bfloat16")
    edited = open_weights("half.safetensors")
    assert (edited["real"].dtype, edited["scalar"].dtype) == (torch.bfloat16, torch.complex64)


def test_arithmetic_of_complex_vectors_in_memory():
    base = state(0)
    a, b = (TaskVector.between(base, state(seed, base)) for seed in (1, 2))
    assert torch.equal((a + b - b).deltas["scalar"], ((a.deltas["scalar"] + b.deltas["scalar"]) - b.deltas["scalar"]))
    minus = (-a).deltas["fno.weight"]
    assert torch.equal(torch.view_as_real(minus), -torch.view_as_real(a.deltas["fno.weight"]))
    random = a.random_like(0)
    for name, delta in a.deltas.items():
        assert random.deltas[name].dtype == delta.dtype
        assert float(random.deltas[name].abs().norm()) == pytest.approx(float(delta.abs().norm()), rel=1e-5)
    assert fingerprint(a.apply_to(base, 0.0)) == fingerprint(base)
    masked = {**base, "scalar": torch.tensor(complex(float("-inf"), 1.0))}
    tuned = {**state(1, base), "scalar": torch.tensor(complex(float("-inf"), 2.0))}
    moved = TaskVector.between(masked, tuned).apply_to(masked)["scalar"]
    assert (moved.real.item(), moved.imag.item()) == (float("-inf"), 2.0)


def test_a_tensor_that_is_complex_on_one_side_only_is_an_error(files):
    tuned = {**open_weights("a.safetensors"), "fno.bias": torch.ones(9)}
    with pytest.raises(MismatchError, match="'fno.bias' is complex in one only"):
        TaskVector.between(open_weights(BASE), tuned)
    save_weights(tuned, "odd.safetensors")
    with pytest.raises(MismatchError, match="fno.bias"):
        compose(BASE, {"a": "odd.safetensors"}, "a", "out.safetensors")


class Spectral(L.LightningModule):
    """Multiplies the inputs' spectrum by complex weights."""

    def __init__(self):
        super().__init__()
        self.spectrum = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.complex64))

    def forward(self, inputs):
        return (torch.fft.rfft(inputs)[..., None] * self.spectrum).sum(1).abs()

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        loss = torch.nn.functional.cross_entropy(self(inputs), labels, reduction="none")
        self.log("loss", loss.mean())
        return {"loss": loss.mean(), "scores": {"loss": loss.detach()}}

    validation_step = test_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Signals(L.LightningDataModule):
    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        signals = torch.randn(40, 4, generator=generator)
        return DataLoader(TensorDataset(signals, (signals.sum(1).abs() > 1.5).long()), batch_size=10)

    val_dataloader = train_dataloader

    def test_dataloader(self):
        signals = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(signals, (signals.sum(1).abs() > 1.5).long()), batch_size=10)


def test_the_callback_and_an_edit_move_complex_parameters():
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    model, start = Spectral(), Spectral().spectrum.detach().clone()
    callback = TaskVectorCallback(at_train_end=True, dirpath=".", every_n_steps=4, against="previous")
    L.Trainer(max_epochs=2, callbacks=[callback], enable_checkpointing=False, **quiet).fit(model, Signals())
    vector = TaskVector.load("final.tv.safetensors")
    assert torch.equal(vector.deltas["spectrum"], model.spectrum.detach() - start)
    assert vector.deltas["spectrum"].imag.any()
    steps = [TaskVector.load(path) for path in sorted(Path("trajectory").glob("*.safetensors"))]
    torch.testing.assert_close(sum(step.deltas["spectrum"] for step in steps), vector.deltas["spectrum"])
    edit_model(
        Spectral(),
        output=Path("out"),
        vectors={"a": Path("final.tv.safetensors")},
        recipe="a",
        targets={"a": Signals()},
        scaling_coef=0.5,
        keep_undo=True,
        trainer=L.Trainer(enable_checkpointing=False, **quiet),
    )
    edited = open_weights("out/edited.safetensors")["spectrum"]
    assert torch.equal(edited, start + 0.5 * vector.deltas["spectrum"])
    assert verify("out/edited.safetensors").holds
    revert("out/edited.safetensors", output="back.safetensors")
    assert torch.equal(open_weights("back.safetensors")["spectrum"], start)

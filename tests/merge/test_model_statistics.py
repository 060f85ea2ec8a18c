"""The statistics files of Fisher and RegMean merging: what is measured, against closed forms, and how they are made."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from small_models import Blobs, Gloo, LinearNet, MixedNet, fit, quiet_trainer, run_ranks
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from tva.callbacks import MergeStatistics

from tva import TaskVector, open_weights
from tva.compose.recipe import Recipe
from tva.merge.model_statistics import measure_information


def examples(count=12, width=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(1, width, generator=generator), torch.tensor([i % 2])) for i in range(count)]


def measured(model, batches, **options):
    return measure_information(model, batches, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), **options)


def test_information_of_a_softmax_layer_is_the_closed_form():
    model, batches = nn.Linear(3, 2), examples()
    found = measured(model, batches)
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    weight, bias, inputs = model.weight.detach().double(), model.bias.detach().double(), inputs.double()
    errors = (inputs @ weight.T + bias).softmax(dim=1) - F.one_hot(labels, 2)  # d(-log p) / d logits
    by_example = errors[:, :, None] * inputs[:, None, :]  # (examples, outputs, inputs)
    torch.testing.assert_close(found.fisher["weight"], by_example.square().mean(dim=0).float())
    torch.testing.assert_close(found.fisher["bias"], errors.square().mean(dim=0).float())
    torch.testing.assert_close(found.grams["weight"], (inputs.T @ inputs / len(inputs)).float())
    assert found.num_examples == 12
    assert torch.equal(
        measured(model, batches, num_examples=5).grams["weight"], measured(model, batches[:5]).grams["weight"]
    )


class Conv1D(nn.Module):
    """GPT-2's layer, as transformers names and stores it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x):
        return x @ self.weight


def test_grams_are_those_of_the_inputs_that_every_kind_of_layer_multiplies():
    torch.manual_seed(0)
    layers = nn.ModuleDict({
        "linear": nn.Linear(4, 2),
        "conv1d": Conv1D(4, 2),
        "conv": nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False),
        "depthwise": nn.Conv2d(2, 2, 3, groups=2),
        "padded": nn.Conv2d(2, 2, 3, padding="same"),
        "frozen": nn.Linear(4, 4).requires_grad_(False),
        "unused": nn.Linear(4, 4),
    })  # fmt: skip
    tokens, images = torch.randn(1, 5, 4), torch.randn(1, 2, 6, 6)

    def loss(batch):
        used = [layers[name](images).sum() for name in ("conv", "depthwise", "padded")]
        return sum(used) + sum(layers[name](tokens).sum() for name in ("linear", "conv1d", "frozen"))

    found = measure_information(layers, [0, 0], loss, conv=True)
    assert found.grams.keys() == {"linear.weight", "conv1d.weight", "conv.weight"}
    rows = tokens[0].double()
    for name in ("linear.weight", "conv1d.weight"):
        torch.testing.assert_close(found.grams[name], (rows.T @ rows).float())
    padded = F.pad(images[0].double(), (1, 1, 1, 1))
    patches = [padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].reshape(-1) for i in range(3) for j in range(3)]
    patches = torch.stack(patches)  # (positions, inputs · kernel)
    product = patches @ layers["conv"].weight.detach().double().view(3, -1).T
    torch.testing.assert_close(product.T.reshape(1, 3, 3, 3).float(), layers["conv"](images))  # they are its inputs
    torch.testing.assert_close(found.grams["conv.weight"], (patches.T @ patches).float())
    assert not found.fisher["unused.weight"].any()
    assert "frozen.weight" not in found.fisher
    assert "conv.weight" not in measure_information(layers, [0], loss).grams


def test_measuring_leaves_the_model_as_it_was_and_sees_it_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.9), nn.Linear(3, 2))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = measured(model, examples()), measured(model, examples())
    assert all(torch.equal(first.fisher[name], second.fisher[name]) for name in first.fisher)
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model)


def test_tied_weights_have_their_information_under_each_name():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    found = measured(model, examples())
    assert torch.equal(found.fisher["0.weight"], found.fisher["1.weight"])
    assert found.grams.keys() == {"0.weight", "1.weight"}


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="At least one example"):
        measured(nn.Linear(3, 2), [])
    with pytest.raises(ValueError, match="no parameter that is trained"):
        measured(nn.Linear(3, 2).requires_grad_(False), examples())
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, float("nan"))
    with pytest.raises(ValueError, match="gradients of weight, bias are not finite"):
        measured(model, examples())


# --- the callback


def trainer(folder, *callbacks, epochs=3, **options):
    return quiet_trainer(*callbacks, max_epochs=epochs, devices=1, default_root_dir=folder, **options)


def fitted(folder, seed):
    model = LinearNet()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    run = trainer(folder, MergeStatistics(num_examples=60), ModelCheckpoint(dirpath=folder, filename="last"))
    run.fit(model, Blobs(seed))
    return model, TaskVector.between(base, model.state_dict())


def test_files_from_training_make_regmean_fit_the_outputs_better_than_the_mean():
    tasks = {name: fitted(Path(name), seed) for name, seed in (("a", 0), ("b", 5))}
    vectors = {name: vector for name, (_, vector) in tasks.items()}
    files = {kind: tuple(f"{name}/{kind}.safetensors" for name in tasks) for kind in ("fisher", "gram")}
    given = {kind: {n: open_weights(f) for n, f in zip(tasks, files[kind], strict=True)} for kind in files}
    inputs = {name: torch.cat([x for x, _ in Blobs(seed).train_dataloader()]) for name, seed in (("a", 0), ("b", 5))}
    for name in tasks:
        torch.testing.assert_close(given["gram"][name]["0.weight"], inputs[name].T @ inputs[name] / 60)
        assert {f"net.{key}" for key in given["fisher"][name]} == vectors[
            name
        ].names  # files have the network's own names

    def error(recipe):  # of the first layer's outputs, on both tasks
        merged = Recipe(recipe, vectors).evaluate(vectors).deltas["net.0.weight"]
        return sum((inputs[n] @ (merged - vectors[n].deltas["net.0.weight"]).T).square().sum() for n in tasks)

    assert error(f"regmean(a, b, files={files['gram']}, off_diagonal=1)") < 0.9 * error("mean(a, b)")
    fisher = Recipe(f"fisher(a, b, files={files['fisher']}, floor=1e-30)", vectors).evaluate(vectors)
    key, (a, b) = "net.2.weight", (given["fisher"][name] for name in tasks)
    weights = [f[key.removeprefix("net.")].double().clamp(min=1e-30) for f in (a, b)]
    expected = sum(w * vectors[n].deltas[key] for w, n in zip(weights, tasks, strict=True)) / sum(weights)
    torch.testing.assert_close(fisher.deltas[key].double(), expected, rtol=1e-4, atol=1e-7)


def test_a_model_that_is_fine_tuned_already_is_measured_by_fitting_for_no_epochs():
    model, _ = fitted(Path("fit"), 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer(Path("later"), MergeStatistics(num_examples=60, dirpath=Path("later")), epochs=0).fit(model, Blobs(0))
    for kind in ("fisher", "gram"):
        first, second = (open_weights(f"{f}/{kind}.safetensors") for f in ("fit", "later"))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert second.metadata["tva.num_examples"] == "60"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_modules_that_log_and_have_batch_norm_and_streams_of_data_are_measured():
    class Stream(IterableDataset):
        def __iter__(self):
            return ((row,) for row in torch.randn(12, 3, generator=torch.Generator().manual_seed(0)))

    class Streamed(MixedNet):
        def train_dataloader(self):
            return DataLoader(Stream(), batch_size=4)

    for number, model in enumerate((MixedNet(), Streamed())):
        folder = Path(str(number))
        fit(model=model, epochs=1, callbacks=[MergeStatistics(kinds=["fisher"], num_examples=100)], folder=folder)
        found = open_weights(folder / "fisher.safetensors")
        assert found.metadata["tva.num_examples"] == ("16", "12")[number]
        assert set(found) == {
            "body.0.weight",
            "body.0.bias",
            "body.1.weight",
            "body.1.bias",
            "body.2.weight",
            "body.2.bias",
        }
        assert not (folder / "gram.safetensors").exists()
        assert "log" not in vars(model)


class Branches(MixedNet):
    """One layer or another, as the example has it: of few examples, a rank may never call one of them."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        (inputs,) = batch
        return (self.body if inputs[0, 0] > 0 else self.other)(inputs).pow(2).mean()


def _measure(folder, number, **options):
    callback = MergeStatistics(num_examples=number, conv=True, dirpath=folder)
    fit(model=Branches(), epochs=0, callbacks=[callback], **options, folder=folder)


@pytest.mark.parametrize("number", [1, 15])
def test_ranks_see_shares_of_the_examples_of_one_device_and_their_sums_are_the_same(number):
    _measure(Path("one"), number)
    run_ranks(partial(_measure, strategy="ddp", devices=2), Path("two"), number)
    for kind in ("fisher", "gram"):
        one, two = (open_weights(f"{name}/{kind}.safetensors") for name in ("one", "two"))
        assert one.metadata == two.metadata
        assert one.metadata["tva.num_examples"] == str(number)
        assert set(one) == set(two)
        for name in one:
            torch.testing.assert_close(one[name], two[name])
    branches = {"other.weight"}, {"body.0.weight", "body.2.weight"}
    assert set(one) in (branches if number == 1 else [branches[0] | branches[1]])


def test_a_strategy_that_shards_is_refused_at_setup_with_what_to_do():
    class Sharding(Gloo, ModelParallelStrategy):
        pass

    run = SimpleNamespace(strategy=Sharding())
    with pytest.raises(ValueError, match="whole model on every rank.*uses Sharding.*max_epochs=0 and this callback"):
        MergeStatistics().setup(run, None, "fit")


def test_options_that_cannot_be_understood_are_refused():
    with pytest.raises(ValueError, match="one or more of fisher, gram, curvature"):
        MergeStatistics(kinds=["hessian"])
    with pytest.raises(ValueError, match="num_examples must be at least 1"):
        MergeStatistics(num_examples=0)


def test_training_that_cannot_be_measured_says_why():
    class Silent(MixedNet):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            return None

    class Pairs(MixedNet):
        def train_dataloader(self):
            return [super().train_dataloader(), DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4)]

        def training_step(self, batch, batch_idx):
            return super().training_step(batch[0], batch_idx)

    with pytest.raises(ValueError, match="needs a training_step that returns its loss.* found NoneType"):
        trainer(Path(), MergeStatistics(), epochs=0).fit(Silent())
    with pytest.raises(ValueError, match="one DataLoader of training data; found list"):
        trainer(Path(), MergeStatistics(), epochs=0).fit(Pairs())


def test_the_documentation_makes_both_files():
    page = (Path(__file__).parents[2] / "docs" / "howto" / "merge-statistics.md").read_text()
    (block,) = re.findall(r"```python\n([^`]*MergeStatistics.*?)```", page, re.S)
    scope = {"model": LinearNet(), "data": Blobs()}
    exec(block, scope)
    assert {file.name for file in Path().rglob("*.safetensors")} >= {"fisher.safetensors", "gram.safetensors"}

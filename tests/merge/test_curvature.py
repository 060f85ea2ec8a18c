"""Kronecker-factored curvature against references in float64, and the penalty that it makes."""

from pathlib import Path

import pytest
import torch
from small_models import Blobs, LinearizedNet, LinearNet, quiet_trainer
from torch import nn
from torch.nn import functional as F
from tva.callbacks import CurvaturePenalty, MergeStatistics

from tva import fingerprint, save_weights
from tva.merge.curvature import Block, Curvature, add_up, measure_curvature, read_curvature


class Mixed(nn.Module):
    """Has a weight of every kind, a tied head, and parameters that no layer explains."""

    def __init__(self):
        Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.position = nn.Parameter(torch.randn(3, 4))
        self.conv = nn.Conv2d(1, 2, (3, 3), padding=1)
        self.gpt = Conv1D(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.used_twice = nn.Linear(4, 4)

    def forward(self, tokens):  # (1, 3)
        hidden = self.embedding(tokens) + self.position
        hidden = hidden + self.conv(hidden[:, None]).mean(dim=1)
        hidden = hidden + self.gpt(hidden)
        hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        hidden = self.used_twice(self.norm(hidden)) + hidden @ self.used_twice.weight
        return F.linear(hidden, self.embedding.weight)[0]  # (3, 7)


@pytest.fixture(scope="module")
def mixed():
    torch.manual_seed(0)
    model = Mixed()
    tokens = [torch.randint(7, (1, 3), generator=torch.Generator().manual_seed(row)) for row in range(5)]
    return model, tokens, measure_curvature(model, tokens, model, seed=1)


def test_every_kind_of_weight_has_factors_and_everything_else_a_diagonal(mixed):
    _, _, found = mixed
    kinds = {(block.weight, block.kind, block.bias) for block in found.blocks}
    assert kinds == {
        ("embedding.weight", "embedding", None),
        ("embedding.weight", "linear", None),  # the tied head
        ("conv.weight", "conv", "conv.bias"),
        ("gpt.weight", "transposed", "gpt.bias"),
        ("attention.in_proj_weight", "linear", "attention.in_proj_bias"),
        ("attention.out_proj.weight", "linear", "attention.out_proj.bias"),
    }
    assert found.diagonals.keys() == {"position", "norm.weight", "norm.bias", "used_twice.weight", "used_twice.bias"}
    shapes = {block.kind: (block.a.shape, block.g.shape) for block in found.blocks if "proj" not in block.weight}
    assert shapes == {"embedding": ((7,), (4, 4)), "linear": ((4, 4), (7, 7)), "conv": ((10, 10), (2, 2)),
                      "transposed": ((5, 5), (4, 4))}  # fmt: skip


@pytest.mark.parametrize("probe", ["outputs", "labels"])
def test_factors_and_diagonals_are_means_of_products_in_float64(probe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))
    examples = [torch.randn(5, 3) for _ in range(6)]  # five positions
    found = measure_curvature(model, examples, lambda x: model(x), probe=probe, seed=3, num_samples=2)
    twin = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    twin.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(3)
    a, g, diagonal = torch.zeros(4, 4).double(), torch.zeros(4, 4).double(), torch.zeros(4).double()
    for x in examples:
        inputs = torch.cat([x.double(), torch.ones(5, 1).double()], dim=1)
        for _ in range(2):
            hidden = twin[0](x.double())
            outputs = twin[3](twin[2](twin[1](hidden)))
            if probe == "labels":
                labels = torch.multinomial(model(x).softmax(-1), 1, generator=generator)[:, 0]
                goal = -outputs.log_softmax(-1)[torch.arange(5), labels].sum() / 5**0.5
            else:
                goal = (outputs * torch.randn(5, 2, generator=generator).double()).sum() / 5**0.5
            gradient, norm = torch.autograd.grad(goal, [hidden, twin[2].weight])
            a += inputs.T @ inputs / 5 / 12
            g += gradient.T @ gradient / 12
            diagonal += norm.square() / 12
    block = next(block for block in found.blocks if block.weight == "0.weight")
    assert torch.allclose(block.a.double(), a, rtol=1e-4, atol=1e-6)
    assert torch.allclose(block.g.double(), g, rtol=1e-4, atol=1e-6)
    assert torch.allclose(found.diagonals["2.weight"].double(), diagonal, rtol=1e-4, atol=1e-7)


def test_factors_of_embeddings_and_convolutions_are_means_over_their_positions_in_float64():
    torch.manual_seed(0)
    model = nn.ModuleDict({"e": nn.Embedding(7, 4), "c": nn.Conv2d(1, 3, 3, padding=1)})

    def outputs(tokens):
        return model["c"](model["e"](tokens)[:, None]).tanh().mean(dim=(2, 3))

    examples = [torch.randint(7, (1, 6)) for _ in range(5)]
    found = {b.kind: b for b in measure_curvature(model, examples, outputs, seed=3).blocks}
    model.double()
    expected = dict.fromkeys(("e/a", "e/g", "c/a", "c/g"), 0)
    generator = torch.Generator().manual_seed(3)
    for tokens in examples:
        embedded = model["e"](tokens)  # (1, 6, 4)
        made = model["c"](embedded[:, None])  # (1, 3, 6, 4)
        goal = (made.tanh().mean(dim=(2, 3)) * torch.randn(1, 3, generator=generator).double()).sum()
        below, above = (part.flatten(0, -2) for part in torch.autograd.grad(goal, [embedded, made]))
        above = above.reshape(3, 24).T
        patches = F.unfold(embedded.detach()[:, None], 3, padding=1)[0].T  # (24, 9)
        patches = torch.cat([patches, torch.ones(24, 1).double()], dim=1)
        expected["e/a"] += torch.bincount(tokens[0], minlength=7) / 6 / 5
        expected["c/a"] += patches.T @ patches / 24 / 5
        expected["e/g"] += below.T @ below / 5
        expected["c/g"] += above.T @ above / 5
    for key, block in (("e", found["embedding"]), ("c", found["conv"])):
        torch.testing.assert_close(block.a.double(), expected[f"{key}/a"].double(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(block.g.double(), expected[f"{key}/g"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "transposed", "embedding", "conv"])
def test_the_penalty_is_the_quadratic_form_of_the_kronecker_product(kind):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    num_in, num_out, bias = (4, 3, "b" if kind != "embedding" else None)
    size = num_in + (bias is not None)
    a = random(size, 9) @ random(size, 9).T if kind != "embedding" else random(size).abs()
    a = a @ a.T if a.ndim == 2 else a
    g = (lambda m: m @ m.T)(random(num_out, 9))
    shape = {"linear": (3, 4), "conv": (3, 1, 2, 2), "transposed": (4, 3), "embedding": (4, 3)}[kind]
    deltas = {"w": random(*shape).requires_grad_(), "b": random(3).requires_grad_()}
    rows = deltas["w"].reshape(3, 4) if kind in ("linear", "conv") else deltas["w"].T
    rows = torch.cat([rows, deltas["b"][:, None]], dim=1) if bias else rows
    whole = torch.kron(a if a.ndim == 2 else torch.diag(a), g)  # of columns one after the other
    vector = rows.T.reshape(-1)
    expected = vector @ whole @ vector
    curvature = Curvature([Block("w", kind, bias, a, g)], {}, 1)
    value, gradients = curvature.penalty(deltas)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, gradient in zip(gradients, torch.autograd.grad(expected, [deltas[n] for n in gradients]), strict=True):
        assert torch.allclose(gradients[name], gradient, rtol=1e-10)
    zero, _ = curvature.penalty({name: torch.zeros_like(delta) for name, delta in deltas.items()})
    assert float(zero) == 0


def test_the_penalty_is_the_expected_squared_change_of_the_outputs_of_one_layer():
    torch.manual_seed(0)
    layer, examples = nn.Linear(3, 2), [torch.randn(1, 3) for _ in range(20)]
    found = measure_curvature(layer, examples, lambda x: layer(x), num_samples=50)
    deltas = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    value, _ = found.penalty(deltas)
    changes = [F.linear(x, deltas["weight"], deltas["bias"]).square().sum() for x in examples]
    assert float(value) == pytest.approx(float(torch.stack(changes).mean()), rel=0.1)


def test_a_linear_models_divergence_is_half_its_penalty_by_labels():
    torch.manual_seed(0)
    layer, examples = nn.Linear(3, 4), [torch.randn(1, 3)]
    found = measure_curvature(layer, examples, lambda x: layer(x), probe="labels", num_samples=1000)
    deltas = {"weight": 0.01 * torch.randn(4, 3), "bias": torch.zeros(4)}
    value, _ = found.penalty(deltas)
    with torch.no_grad():
        before = torch.cat([layer(x).log_softmax(-1) for x in examples]).double()
        after = torch.cat([(layer(x) + F.linear(x, deltas["weight"])).log_softmax(-1) for x in examples]).double()
    divergence = (before.exp() * (before - after)).sum(dim=-1).mean()
    assert float(value) / 2 == pytest.approx(float(divergence), rel=0.1)


def test_wide_factors_keep_their_diagonal():
    layer, x = nn.Linear(3, 4), torch.randn(1, 3)
    whole, thin = (measure_curvature(layer, [x], lambda x: layer(x), max_size=size).blocks[0] for size in (9, 2))
    assert torch.allclose(thin.a, whole.a.diagonal())
    assert torch.allclose(thin.g, whole.g.diagonal())


def test_tasks_are_added_up_by_mean_inputs_and_summed_gradients(mixed):
    model, tokens, one = mixed
    other = measure_curvature(model, tokens[:3], model, seed=5)
    save_weights(one.tensors(), "one.safetensors", one.metadata())
    read = read_curvature(Path("one.safetensors"))
    assert [(b.weight, b.kind, b.bias) for b in sorted(read.blocks, key=str)] == [
        (b.weight, b.kind, b.bias) for b in sorted(one.blocks, key=str)
    ]
    deltas = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    assert torch.allclose(read.penalty(deltas)[0], one.penalty(deltas)[0], rtol=1e-5)
    both = add_up([one, other])
    for block, a, b in zip(both.blocks, one.blocks, other.blocks, strict=True):
        assert torch.allclose(block.a, (5 * a.a + 3 * b.a) / 8, atol=1e-6)
        assert torch.allclose(block.g, a.g + b.g)
    assert torch.equal(both.diagonals["position"], one.diagonals["position"] + other.diagonals["position"])
    with pytest.raises(ValueError, match="of one architecture"):
        add_up([one, Curvature(one.blocks[1:], one.diagonals, 1)])
    with pytest.raises(ValueError, match="there was none"):
        add_up([])


def test_nothing_of_a_model_is_changed_by_measuring(mixed):
    model, tokens, _ = mixed
    before = fingerprint(model.state_dict()).digest
    linear = F.linear
    measure_curvature(model.train(), tokens[:1], model)
    assert fingerprint(model.state_dict()).digest == before
    assert model.training
    assert F.linear is linear
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="there was none"):
        measure_curvature(model, [], model)
    with pytest.raises(ValueError, match=r"found \[3\]"):
        measure_curvature(model, tokens, lambda x: model(x)[:, 0])


# --- the callbacks


class Net(LinearNet):
    """Trains by plain gradient descent, and returns its logits."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        return {"preds": self(batch[0]), "target": batch[1]}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class TangentNet(LinearizedNet, Net):
    """Likewise, linearized."""


def fit(model, task, folder, *callbacks, **options):
    options = {"default_root_dir": folder, "max_steps": 6, "limit_val_batches": 0} | options
    trainer = quiet_trainer(*callbacks, **options)
    trainer.fit(model, datamodule=Blobs(task))
    return trainer


@pytest.fixture(scope="module")
def factors(tmp_path_factory):
    """Files of two tasks' factors at the base."""
    paths = []
    for task in (1, 2):
        folder = tmp_path_factory.mktemp(f"task{task}")
        fit(Net(), task, folder, MergeStatistics(["curvature"], num_examples=30), max_epochs=0, max_steps=-1)
        paths.append(str(folder / "curvature.safetensors"))
    return paths


@pytest.mark.parametrize("tangent", [False, True])
def test_a_fit_minimizes_loss_and_penalty_together(tangent, factors):
    model = TangentNet() if tangent else Net()
    trainer = fit(model, 0, Path(), CurvaturePenalty(factors, beta=0.3))
    twin = TangentNet() if tangent else Net()
    curvature = add_up(map(read_curvature, factors))
    base = {name: parameter.detach().clone() for name, parameter in twin.named_parameters()}
    descent = torch.optim.SGD(twin.parameters(), lr=0.05)
    for batch, _ in zip(list(Blobs(0).train_dataloader()) * 2, range(6), strict=True):
        descent.zero_grad()
        penalty, _ = curvature.penalty({name[4:]: p - base[name] for name, p in twin.named_parameters()})  # "net."
        (F.cross_entropy(twin(batch[0]), batch[1]) + 0.3 * penalty).backward()
        descent.step()
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(found, expected, atol=1e-6), name
    assert float(trainer.callback_metrics["train/curvature_penalty"]) == pytest.approx(0.3 * penalty.item(), rel=1e-4)


def test_a_penalty_keeps_another_task_as_it_was(factors):
    changes = []
    for callbacks in ([], [CurvaturePenalty(factors[:1], beta=3.0)]):
        model, inputs = Net(), Blobs(1).test_dataloader().dataset.tensors[0]
        before = model(inputs).detach()
        fit(model, 0, Path(), *callbacks, max_steps=30)
        changes.append(float((model(inputs).detach() - before).square().mean()))
    assert changes[1] < 0.3 * changes[0]


def test_the_factors_of_the_own_task_are_left_out(factors):
    assert read_curvature(factors[0]).facts["tva.task"] == "blobs1"
    models = [Net(), Net()]
    for model, files in zip(models, (factors, factors[1:]), strict=True):
        fit(model, 1, Path(), CurvaturePenalty(files, beta=1.0))
    assert fingerprint(models[0].state_dict()).digest == fingerprint(models[1].state_dict()).digest
    with pytest.raises(ValueError, match="there was none"):
        fit(Net(), 1, Path(), CurvaturePenalty(factors[0]))


def test_factors_of_other_weights_or_parameters_are_refused(factors):
    moved = Net()
    moved.net[0].bias.data += 1
    with pytest.raises(ValueError, match="must be measured at the weights that fitting starts from"):
        fit(moved, 0, Path(), CurvaturePenalty(factors))
    frozen = Net()
    frozen.net[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"have '0\.bias', which this model does not train"):
        fit(frozen, 0, Path(), CurvaturePenalty(factors))
    with pytest.raises(FileNotFoundError, match="No file matches"):
        fit(Net(), 0, Path(), CurvaturePenalty("*.nothing"))
    with pytest.raises(ValueError, match="at least 0"):
        CurvaturePenalty(factors, beta=-1)
    save_weights({"x": torch.zeros(1)}, "x.safetensors")
    with pytest.raises(ValueError, match="must hold the curvature that MergeStatistics"):
        read_curvature(Path("x.safetensors"))
    facts = {"tva.statistics": "curvature", "tva.num_examples": "3", "tva.biases": "{}"}
    for odd, word in (({"tva.biases": "[" * 9**5}, "biases"), ({"tva.num_examples": "x"}, "num_examples"), ({}, "G'")):
        save_weights({"w/linear/A": torch.zeros(1, 1)}, "x.safetensors", {**facts, **odd})
        with pytest.raises(ValueError, match=rf"x.safetensors.*{word}"):
            read_curvature(Path("x.safetensors"))


def test_curvature_of_a_linearized_model_or_without_predictions_is_refused():
    asked = MergeStatistics(["curvature"])
    with pytest.raises(ValueError, match="tangent to false"):
        fit(TangentNet(), 0, Path(), asked)
    with pytest.raises(ValueError, match="needs a validation_step that returns 'preds'"):
        fit(LinearNet(), 0, Path(), asked, max_steps=1)

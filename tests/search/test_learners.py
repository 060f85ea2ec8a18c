"""What Learned trains, against its formulas written out in float64."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tva import TaskVector
from tva.search.learners import CoefficientLearner, ComponentLearner, TrainingContext


@pytest.mark.parametrize("per", ["tensor", "layer", "vector", "component"])
def test_weights_loss_and_gradient_are_those_of_the_formula(per):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = [{name: tensor + torch.randn_like(tensor) for name, tensor in base.items()} for _ in range(2)]
    vectors = dict(zip("ab", [TaskVector.between(base, one) for one in tuned], strict=True))
    inputs = {name: torch.randn(6, 5, dtype=torch.float64) for name in vectors}
    context = TrainingContext(None, model, base, vectors, {}, {}, vectors, {}, None, {}, None)
    options = SimpleNamespace(per=per, start=0.7, loss="expert", clamp=False)
    learner = (ComponentLearner if per == "component" else CoefficientLearner)(context, options, {"a": 1.0, "b": 1.0})
    with torch.no_grad():
        learner.coefs.copy_(torch.randn(learner.coefs.shape))
    learner.training_step({name: (rows, None) for name, rows in inputs.items()}, 0).backward()

    scores = learner.coefs.detach().double()
    leaf = ((scores > 0).double() if per == "component" else scores).requires_grad_()
    parts = {"tensor": list(base), "layer": ["0.", "2."], "vector": [""]}
    weights, place = dict(base), 0
    for row, one in enumerate(tuned):
        for name, delta in ((name, one[name] - base[name]) for name in base):
            if per != "component":
                delta = leaf[row, [name.startswith(part) for part in parts[per]].index(True)] * delta
            elif delta.ndim == 2:
                u, values, v = torch.linalg.svd(delta, full_matrices=False)
                delta, place = 0.7 * (u * values * leaf[place : place + len(values)]) @ v, place + len(values)
            else:
                delta = 0.7 * delta
            weights[name] = weights[name] + delta

    def logits(weights, x):
        return F.linear(torch.tanh(F.linear(x, weights["0.weight"], weights["0.bias"])), *list(weights.values())[2:])

    loss = sum(
        -(logits(one, x).softmax(-1) * logits(weights, x).log_softmax(-1)).sum(-1).mean()
        for one, x in zip(tuned, inputs.values(), strict=True)
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    if per == "component":
        assert torch.equal(learner.masks().double(), leaf)
        gradient = gradient * scores.sigmoid() * (1 - scores.sigmoid())
    assert learner.losses == [pytest.approx(loss.item(), rel=1e-12)]
    torch.testing.assert_close(learner.coefs.grad.double(), gradient, rtol=1e-5, atol=1e-7)
    written = learner.vector().apply_to(base)
    for name, tensor in learner.edited().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(written[name], weights[name], rtol=1e-12, atol=1e-12)

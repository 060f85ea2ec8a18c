"""Find a task's metrics and compute them on given examples."""

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from tva.errors import did_you_mean, some
from tva.evaluation.text_metrics import OF_A_LABEL, WHOLE, find_text_metric
from tva.plugins import installed, load

Function = Callable[[Tensor, Tensor], Tensor]
# torchmetrics' classes that return several numbers, or need further arguments
NO_NUMBER = re.compile("Matrix|StatScores|Curve|ssROC|[a-z]At[A-Z]|FBeta|EER|ExactMatch")


def brier_score(preds: Tensor, target: Tensor) -> Tensor:
    """Compute the squared distance of each example's probabilities from its label, in [0, 2].

    Args:
        preds: Logits, or probabilities whose rows sum to 1, shape (examples, classes).
        target: Labels, shape (examples,).

    Returns:
        One score an example, shape (examples,); the metric is their mean.

    Source: Brier, "Verification of forecasts expressed in terms of probability", Monthly Weather Review 1950.

    Example:
        >>> brier_score(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([0, 1]))
        tensor([0.5000, 0.0000])
    """
    # as torchmetrics does: what is not in [0, 1] is logits
    probabilities = preds if bool(((preds >= 0) & (preds <= 1)).all()) else preds.softmax(dim=-1)
    return (probabilities - F.one_hot(target.long(), preds.shape[-1])).square().sum(dim=-1)


brier_score.higher_is_better = False

KL = "kl"  # the metric of `divergence`


def divergence(base: Mapping[str, Tensor], edited: Mapping[str, Tensor]) -> Tensor | None:
    r"""Compute :math:`\sum_y p_\text{base}(y) \log \frac{p_\text{base}(y)}{p_\text{edited}(y)}` of each example.

    No labels are needed: it is how far an edit changes what the base predicts.

    Args:
        base: What the model's step returns for a batch: ``preds``, logits or probabilities (examples, classes); or
            ``logits`` (examples, positions, vocabulary) with ``mask`` (examples, positions), the positions that count.
        edited: Likewise, of the edited model.

    Returns:
        Nats, shape (examples,), of ``logits`` the mean over an example's positions; None if the step returns neither.
    """
    if base.get("logits") is not None:
        mask, pairs = base["mask"], (base["logits"], edited["logits"])
    elif base.get("preds") is not None and base["preds"].ndim == 2:
        mask, pairs = None, (base["preds"], edited["preds"])
    else:
        return None
    found = _divergence(*(values.detach() if mask is None else values.detach()[mask] for values in pairs))
    if mask is None:
        return found
    return torch.zeros_like(mask, dtype=found.dtype).masked_scatter(mask, found).sum(dim=1) / mask.sum(dim=1)


def _divergence(base: Tensor, edited: Tensor) -> Tensor:
    base, edited = (values if values.dtype == torch.float64 else values.float() for values in (base, edited))
    sums = base.sum(dim=-1)
    if bool((base >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
        ours, theirs = base.log(), edited.log()
    else:
        ours, theirs = base.log_softmax(dim=-1), edited.log_softmax(dim=-1)
    terms = ours.exp() * (ours - theirs)
    return terms.masked_fill(ours == -torch.inf, 0).sum(dim=-1)


def spearman(preds: Tensor, target: Tensor) -> Tensor:
    """Compute Spearman's rank correlation of predicted numbers with the wanted ones, in [-1, 1].

    Args:
        preds: Shape (examples,).
        target: Shape (examples,).

    Example:
        >>> round(float(spearman(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([1.0, 2.0, 3.0]))), 6)
        1.0
    """
    from scipy.stats import rankdata

    ranks = [torch.from_numpy(rankdata(side.detach().cpu().double().numpy())) for side in (preds, target)]
    one, other = (rank - rank.mean() for rank in ranks)
    return (one @ other) / (one.norm() * other.norm())  # NaN where one side is constant


spearman.higher_is_better = True

# Metrics that torchmetrics lacks. One entry adds a metric: a torchmetrics class, or a function of ``preds`` and
# ``target`` that returns one number, or one number per example (then the metric is their mean, and has intervals).
METRICS: dict[str, type[Metric] | Function] = {"brier_score": brier_score, "spearman": spearman}


class FunctionMetric(Metric):
    """A function of all predictions and labels as a metric.

    Args:
        function: Takes ``preds`` and ``target``, returns one number, or one an example. Its attribute
            ``higher_is_better``, where it has one, is the metric's direction.
    """

    full_state_update = False
    preds: list[Tensor]
    target: list[Tensor]

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.add_state("preds", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    @property
    def higher_is_better(self) -> bool | None:
        """The function's direction, where it has one."""
        return getattr(self.function, "higher_is_better", None)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Keep a batch."""
        self.preds.append(preds)
        self.target.append(target)

    def compute(self) -> Tensor:
        """Call the function on everything that was kept."""
        return torch.as_tensor(self.function(torch.cat(self.preds), torch.cat(self.target)))


def has_ground(metric: Metric) -> bool:
    """Return whether an interval of a metric of all examples together, by leaving out a part at a time, would cover.

    It does where the metric is a smooth function of means, as F1 is, and not where it is biased or the worst of several
    numbers. That is known of torchmetrics and tva; one's own metric says it by its attribute ``has_interval``.
    """
    function: Any = metric.function if isinstance(metric, FunctionMetric) else metric
    said = getattr(function, "has_interval", None)
    if said is not None:
        return bool(said)
    known = getattr(function, "func", function) if isinstance(metric, FunctionMetric) else type(metric)
    package = (getattr(known, "__module__", None) or "").partition(".")[0]
    return package in ("tva", "torchmetrics") and not _ROUGH.search(getattr(known, "__name__", ""))


_ROUGH = re.compile("calibration|at_?fixed|at_?se|at_?sp|fairness|compositional", re.IGNORECASE)


def compute(metric: Metric, preds: Any, target: Any) -> Tensor:
    """Compute a metric of the given examples only, without synchronizing with other processes."""
    if not isinstance(preds, Tensor):
        assert isinstance(metric, FunctionMetric)
        return torch.as_tensor(metric.function(preds, target))
    metric.reset()
    metric.sync_on_compute = False
    metric.update(preds, target)
    return metric.compute()


def find_metric(name: str, num_classes: int) -> Metric:
    """Find the metric of a multi-class task by its name.

    Args:
        name: A name in `METRICS`, or of a metric of texts (`find_text_metric`); or torchmetrics' ``f1_score``,
            ``F1Score`` or ``MulticlassF1Score``; or one of its metrics of numbers, ``MeanSquaredError`` or
            ``mean_squared_error``; or that of an entry point in the group ``tva.metrics``; or the dotted path of a
            torchmetrics class or of a function of ``preds`` and ``target``, such as ``my_package.my_metric``.
        num_classes: Classes of the task; passed to the class where it takes ``num_classes``.

    Raises:
        ValueError: There is none of that name, or it is not a metric.

    Example:
        >>> find_metric("f1_score", 3)
        MulticlassF1Score()
    """
    if name in METRICS:
        return _made(METRICS[name], name, num_classes)
    if (of_texts := find_text_metric(name)) is not None:
        return FunctionMetric(of_texts)
    from torchmetrics import classification, regression

    known = {
        _plain(kind): getattr(classification, kind)
        for kind in dir(classification)
        if kind.startswith("Multiclass") and not NO_NUMBER.search(kind)
    }
    if _plain(name) in known:
        return known[_plain(name)](num_classes=num_classes)
    numbers = {_plain(kind): getattr(regression, kind) for kind in regression.__all__}
    if _plain(name) in numbers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it keeps all predictions, as here every metric does
            return numbers[_plain(name)]()
    points = installed("tva.metrics")
    if name in points:
        return _made(points[name].load(), name, num_classes)
    if "." in name:
        return _made(load(name), name, num_classes)
    spelt = [
        re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.__name__.removeprefix("Multiclass")).lower()
        for kind in known.values()
    ]
    others = sorted([*METRICS, *WHOLE, *(f"{kind}:LABEL" for kind in OF_A_LABEL), *points, *spelt])
    raise ValueError(
        f"There is no multi-class metric {name!r}.{did_you_mean(name, others)} Name a metric that the model logs, one "
        f"of {some(others, 40)}, or one of your own by its path, such as my_package.my_metric."
    )


def _plain(name: str) -> str:
    return re.sub(r"[_-]", "", name.removeprefix("Multiclass")).lower()


def _made(found: Any, name: str, num_classes: int) -> Metric:
    if isinstance(found, type) and issubclass(found, Metric):
        parameters = inspect.signature(found).parameters
        return found(num_classes=num_classes) if "num_classes" in parameters else found()
    if callable(found) and not isinstance(found, type):
        return FunctionMetric(found)
    raise ValueError(
        f"The metric {name!r} must be a torchmetrics class or a function of preds and target; found {found!r}."
    )

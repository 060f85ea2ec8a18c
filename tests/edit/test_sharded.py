"""An edit of a model that two processes hold in parts: the same choice, scores and weights as one process."""

import contextlib
import io
import itertools
import json
import os
import re
import shlex
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.strategies import ModelParallelStrategy
from small_edit import Net
from small_models import Blobs, fsdp1, run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tva.callbacks.sharding import Shards

from tva import MismatchError, TaskVector, fingerprint, open_weights, save_weights
from tva.cli.main import main
from tva.compose.verify import verify
from tva.data import ImageTask
from tva.edit.form import Form
from tva.edit.options import EditOptions
from tva.edit.run import run_edit
from tva.edit.trainer import Trainer
from tva.models import ClipClassifier
from tva.search import Bisect, Grid, Learned, Optuna, Race

PAGES = Path(__file__).parents[2] / "docs/howto"
pytestmark = pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support on cpu")
NUM = {"a": 201, "b": 130, "other": 30}  # batches of 20: odd numbers of them, and last ones that are not full


def shown(page, *languages):
    found = re.findall(r"```(\w+)\n(.*?)```", (PAGES / page).read_text(), flags=re.DOTALL)
    return [text for language, text in found if language in languages]


class Unit(nn.Linear):
    """What FSDP wraps."""


class ShardNet(Net):
    """Rows that do not divide evenly, running statistics, and a tied weight; whole with one process."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(Unit(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 9), nn.Linear(9, 2))
        self.tied = nn.Linear(9, 9, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.tied.weight = self.net[3].weight

    def configure_model(self):
        if getattr(self, "_device_mesh", None) is not None:
            for part in ([self.net[3], self.tied], self.net[0], self):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
            for name in ("validation_step", "test_step"):
                register_fsdp_forward_method(self, name)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """One vector file, and one fine-tuned checkpoint."""
    folder = tmp_path_factory.mktemp("vectors")
    base = {name: tensor.clone() for name, tensor in ShardNet().state_dict().items()}
    save_weights(base, folder / "base.safetensors")
    for seed, name in ((1, "a"), (2, "b")):
        model = ShardNet()
        optimizer = torch.optim.Adam(model.parameters(), 0.03)
        inputs, labels = Blobs(seed, 200).train_dataloader().dataset.tensors
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        if name == "a":
            TaskVector.between(base, model.state_dict()).save(folder / "a.tv.safetensors")
        else:
            save_weights({k: v.clone() for k, v in model.state_dict().items()}, folder / "b.safetensors")
    return {"a": str(folder / "a.tv.safetensors"), "b": str(folder / "b.safetensors")}


def make_trainer(kind):
    strategies = {
        "one": lambda: "auto",
        "fsdp2": lambda: ModelParallelStrategy(2, 1),
        "fsdp1": lambda: fsdp1(use_orig_params=True, auto_wrap_policy={Unit}),
    }
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", devices=1 if kind == "one" else 2, strategy=strategies[kind](), **quiet)


def asked(folder, vectors, **changes):
    tasks = {
        "targets": {"a": Blobs(1, NUM["a"]), "b": Blobs(2, NUM["b"])},
        "controls": {"other": Blobs(3, NUM["other"])},
    }
    options = {"recipe": "a + b", "maximize": "mean(normalized_accuracy)", "search": Grid(num=5), **tasks, **changes}
    return EditOptions(vectors=vectors, output=str(folder / "out"), **options)


def _edit(folder, vectors, kind, changes):
    trainer = make_trainer(kind)
    report = run_edit(trainer, ShardNet(), asked(folder, vectors, **changes))
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(report.to_json()))


def _alone(rank, *args):
    torch.set_num_threads(1)
    _edit(*args)


def both(vectors, kind, **changes):
    """Edit with one process, and sharded over two; return the reports of the one and of each of the two."""
    for name in ("one", "two"):
        Path(name).mkdir()
    mp.start_processes(_alone, (Path("one"), vectors, "one", changes), nprocs=1, start_method="fork")
    run_ranks(_edit, Path("two"), vectors, kind, changes)
    return [json.loads(Path(name).read_text()) for name in ("one/rank0.json", "two/rank0.json", "two/rank1.json")]


def assert_same(one, *others):
    for other in others:
        for key in ("tasks", "coefficients", "constraints", "holds", "sizes", "data", "evaluations", "base", "edited"):
            assert other[key] == one[key], key
        for name, vector in one["vectors"].items():
            assert other["vectors"][name] | {"norm": 0} == vector | {"norm": 0}
            assert other["vectors"][name]["norm"] == pytest.approx(vector["norm"], rel=1e-12)


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_a_sharded_edit_is_that_of_one_process(vectors, kind):
    one, *two = both(vectors, kind, statistics="delta")
    assert_same(one, *two)
    written = [fingerprint(open_weights(f"{name}/out/edited.safetensors")) for name in ("one", "two")]
    assert written[0] == written[1]
    assert written[0].digest == one["edited"]["fingerprint"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("search", "more"),
    [
        (Bisect(num=9), {"rule": "largest", "subject_to": ["b/accuracy >= 0.7 * base"], "confidence": 0.9}),
        (Optuna({"s": [0, 1], "l": [0, 1]}, num_trials=6), {"recipe": "s * a + l * b"}),
        (Grid(num=3), {"exclude": "^net.4", "random_seed": None, "subject_to": ["a/accuracy >= 2 * base"]}),
    ],
    ids=["bisect", "optuna", "refused"],
)
def test_searches_work_on_a_sharded_model(vectors, search, more):
    one, *two = both(vectors, "fsdp2", search=search, **more)
    assert_same(one, *two)
    assert Path("two/out/edited.safetensors").exists() is one["holds"]


@pytest.mark.slow
def test_a_race_and_a_base_that_is_a_file(vectors):
    base = str(Path(vectors["a"]).with_name("base.safetensors"))
    one, *two = both(vectors, "fsdp2", search=Race(num=11, first=7), base=base)
    assert two[0]["coefficients"] == two[1]["coefficients"] == one["coefficients"]
    written = [fingerprint(open_weights(f"{name}/out/edited.safetensors")) for name in ("one", "two")]
    assert written[0] == written[1]
    report = verify("two/out/edited.safetensors")
    assert report.holds, report


def _refused(folder, vectors):
    with pytest.raises(ValueError, match=r"search Learned.*recipe 'ties.*not a sum.*baselines.*keep_undo.*Leave that"):
        options = {"search": Learned(), "recipe": "ties(a, b)", "baselines": ["average"], "keep_undo": True}
        run_edit(make_trainer("fsdp2"), ShardNet(), asked(folder, vectors, **options))
    other = ShardNet()
    with torch.no_grad():
        other.net[0].bias.add_(1)
    with pytest.raises(MismatchError, match=r"a.tv.safetensors was taken from the base .*: 1 of 12 tensors differ"):
        run_edit(make_trainer("fsdp2"), other, asked(folder, vectors))
    damaged = folder / f"damaged{torch.distributed.get_rank()}.tv.safetensors"
    data = bytearray(Path(vectors["a"]).read_bytes())
    data[-2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: its tensors have the fingerprint"):
        run_edit(make_trainer("fsdp2"), ShardNet(), asked(folder, {**vectors, "a": str(damaged)}))
    (folder / f"done-{os.environ['LOCAL_RANK']}").touch()


@pytest.mark.slow
def test_what_a_sharded_edit_cannot_do_is_said_before_any_work(vectors):
    run_ranks(_refused, Path(), vectors)
    assert len(list(Path().glob("done-*"))) == 2
    assert not Path("out").exists()


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, at every operation."""

    def __init__(self):
        super().__init__()
        self.known, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
                if storage.device.type == "cpu":
                    self.known[storage._cdata] = weakref.ref(storage)
        self.peak = max(self.peak, sum(s.nbytes() for ref in self.known.values() if (s := ref()) is not None))
        return out


class DeepNet(ShardNet):
    """Many layers of one size, made without memory, each a unit."""

    def configure_model(self):
        with torch.device("meta"):
            self.net = nn.Sequential(nn.Linear(4, 256), *(nn.Linear(256, 256) for _ in range(12)), nn.Linear(256, 2))
        self.tied = None
        for part in (*self.net, self):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])
        for name in ("validation_step", "test_step"):
            register_fsdp_forward_method(self, name)


def _measure(folder, vectors, base):
    trainer, live = make_trainer("fsdp2"), Live()
    small = {"targets": {"a": Blobs(1, 50)}, "controls": {}, "maximize": "a/accuracy", "search": Grid(num=2)}
    with live:
        run_edit(trainer, DeepNet(), asked(folder, vectors, base=base, recipe="a + b + c", **small))
    (folder / f"peak-{trainer.global_rank}").write_text(str(live.peak))


@pytest.mark.slow
def test_a_process_holds_its_part_of_base_and_vectors_and_one_unit():
    generator, sizes = torch.Generator().manual_seed(0), [4, *[256] * 13, 2]
    base = {}
    for layer, (before, after) in enumerate(itertools.pairwise(sizes)):
        base[f"net.{layer}.weight"] = torch.randn(after, before, generator=generator) / before**0.5
        base[f"net.{layer}.bias"] = torch.zeros(after)
    save_weights(base, "base.safetensors")
    for number, name in enumerate("abc"):
        tuned = {key: value + 0.01 * (number + 1) for key, value in base.items()}
        TaskVector.between(base, tuned).save(f"{name}.tv.safetensors")
    paths = {name: f"{name}.tv.safetensors" for name in "abc"}
    run_ranks(_measure, Path(), paths, "base.safetensors")
    size, unit = sum(tensor.nbytes for tensor in base.values()), base["net.3.weight"].nbytes
    for rank in (0, 1):
        peak = int(Path(f"peak-{rank}").read_text())
        # measured: 0.91 of it: model, base, vectors, their sum and the random vector by halves, and a few units
        assert peak <= 2 * ((1 + len(paths)) * size / 2 + unit), (peak, size, unit)
    assert Path("out/edited.safetensors").stat().st_size > size


def _page(folder, number):
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    for line in shown("several-devices.md", "bash")[number].splitlines():
        with contextlib.redirect_stdout(io.StringIO()):
            main(shlex.split(line)[1:])


@pytest.mark.slow
def test_the_page_on_several_devices(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sizes = [(32, 4), (32, 32), (2, 32)]
    base = {f"blocks.{n}.weight": torch.randn(size, generator=generator) / 3 for n, size in enumerate(sizes)}
    base |= {f"blocks.{n}.bias": torch.zeros(size[0]) for n, size in enumerate(sizes)}
    save_weights(base, "base.safetensors")
    save_weights({name: tensor + 0.1 for name, tensor in base.items()}, "finetuned.safetensors")
    for text in shown("several-devices.md", "python", "yaml"):
        Path(re.match(r"# (\S+)\n", text)[1]).write_text(text.replace("devices: 2", "devices: 2\n  accelerator: cpu"))
    run_ranks(_page, Path(), 0)
    report = json.loads(Path("edited/edit.json").read_text())
    assert report["edited"]["fingerprint"] == fingerprint(open_weights("edited/edited")).digest
    mp.start_processes(_one_page, (tmp_path, 1), nprocs=1, start_method="fork")
    composed = open_weights("composed")
    assert torch.allclose(composed["blocks.1.weight"], base["blocks.1.weight"] + 0.05)


def _one_page(rank, *args):
    torch.set_num_threads(1)
    _page(*args)


def _die(folder, vectors, form):
    exchange, sent = Shards._exchange, []

    def dying(self, name):
        if (folder / "writing").exists():
            sent.append(name)
        if os.environ["LOCAL_RANK"] == "1" and len(sent) == 3:
            os._exit(3)
        return exchange(self, name)

    write = Form.write
    Shards._exchange = dying
    Form.write = lambda *args: ((folder / "writing").touch(), write(*args))
    with pytest.raises(RuntimeError, match="(?i)connection|rank"):
        run_edit(make_trainer("fsdp2"), ShardNet(), asked(folder, vectors, format=form))
    (folder / "ended").write_text("")
    os._exit(4)


@pytest.mark.slow
@pytest.mark.parametrize("form", [None, "dcp"])
def test_when_a_rank_dies_while_the_edit_is_written_the_other_ends_and_nothing_is_left(vectors, form):
    ranks = run_ranks(_die, Path(), vectors, form, join=False).processes
    for rank in ranks:
        rank.join(120)  # gloo itself waits for half an hour
    assert [rank.exitcode for rank in ranks] == [4, 3]
    left = {path.name for path in Path().rglob("*")}
    assert left <= {"writing", "ended", "out.evaluations.jsonl"}, left


def _classifier(folder, kind):
    task = ImageTask("builtin:digits", batch_size=16, limit_train=16, limit_val=40, limit_test=40)
    options = {"targets": {"digits": task}, "maximize": "digits/accuracy", "controls": {}, "search": Grid(num=3)}
    trainer = make_trainer(kind)
    report = run_edit(
        trainer, ClipClassifier(), asked(folder, {"a": str(folder.parent / "tuned.ckpt")}, recipe="a", **options)
    )
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(report.to_json()))


def _classifier_alone(rank, *args):
    torch.set_num_threads(1)
    _classifier(*args)


@pytest.mark.slow
def test_a_model_of_tva_is_edited_as_it_shards_itself():
    tuned = {name: value + 0.01 for name, value in ClipClassifier().state_dict().items()}
    torch.save({"state_dict": tuned}, "tuned.ckpt")
    for name in ("one", "two"):
        Path(name).mkdir()
    mp.start_processes(_classifier_alone, (Path("one"), "one"), nprocs=1, start_method="fork")
    run_ranks(_classifier, Path("two"), "fsdp2")
    assert_same(*(json.loads(Path(name).read_text()) for name in ("one/rank0.json", "two/rank0.json")))

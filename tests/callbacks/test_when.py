"""When and where TaskVectorCallback writes: along the way, at the end, on request; remote, linked, asynchronous."""

import doctest
import itertools
import multiprocessing
import os
import re
import shutil
import socket
from pathlib import Path

import fsspec
import huggingface_hub
import lightning as L
import pytest
import torch
import tva.callbacks.remote_files
import tva.callbacks.writer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from small_models import MixedNet, assert_vector_is_checkpoint_minus_base, fit, names
from tva.callbacks import TaskVectorCallback

from tva import MismatchError, TaskVector, fingerprint, open_weights
from tva.checkpoints.stream_writer import LateHeaderFile

LAST = "epoch=1-step=8"


def load(file):
    return TaskVector.load(file)


# --- along the way


def test_a_vector_every_n_steps_and_at_the_end():
    fit(TaskVectorCallback(every_n_steps=3, at_train_end=True))
    assert names(folder="trajectory") == ["step=00000003.tv.safetensors", "step=00000006.tv.safetensors"]
    assert load("trajectory/step=00000006.tv.safetensors").origin.step == 6
    final, last = load("final.tv.safetensors"), load(f"{LAST}.tv.safetensors")
    assert final.origin.finetuned == last.origin.finetuned


def test_accumulated_gradients_count_optimizer_steps():
    fit(TaskVectorCallback(every_n_steps=1), accumulate_grad_batches=2)
    assert [name[:13] for name in names(folder="trajectory")] == [f"step=0000000{n}" for n in (1, 2, 3, 4)]


def test_without_checkpoints():
    fit(TaskVectorCallback(every_n_steps=4, with_checkpoints=False))
    assert names("*.tv.safetensors") == []
    assert len(names(folder="trajectory")) == 2


def test_steps_against_the_previous_vector_chain_to_the_whole():
    fit(TaskVectorCallback(every_n_steps=2, against="previous", at_train_end=True))
    steps = [load(f"trajectory/{name}") for name in names(folder="trajectory")]
    assert names(".*", folder="trajectory") == []  # the weights at the last step are not kept
    assert [step.origin.since_step for step in steps] == [0, 2, 4, 6]
    assert steps[0].origin.base == fingerprint(MixedNet().state_dict())
    for before, after in itertools.pairwise(steps):
        assert after.origin.base.digest == before.origin.finetuned
    final = load("final.tv.safetensors")
    assert steps[-1].origin.finetuned == final.origin.finetuned
    for name, delta in final.deltas.items():
        assert torch.allclose(sum(step.deltas[name] for step in steps), delta, atol=1e-6), name


def test_resuming_goes_on_along_the_way():
    options = {"every_n_steps": 3, "against": "previous"}

    class Stop(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 5:
                raise RuntimeError("power failure")

    with pytest.raises(RuntimeError, match="power failure"):
        fit(TaskVectorCallback(**options), callbacks=[Stop()])
    assert len(names(".previous-*", folder="trajectory")) == 1
    fit(TaskVectorCallback(**options), ckpt_path=Path("epoch=0-step=4.ckpt"))
    assert names(folder="trajectory") == ["step=00000003.tv.safetensors", "step=00000006.tv.safetensors"]
    third, sixth = (load(f"trajectory/step=0000000{n}.tv.safetensors") for n in (3, 6))
    assert sixth.origin.since_step == 3
    assert sixth.origin.base.digest == third.origin.finetuned
    assert sixth.origin.run == third.origin.run
    fit(TaskVectorCallback(**options), ckpt_path=Path("epoch=0-step=4.ckpt"), folder="moved")
    chained = load("moved/trajectory/step=00000006.tv.safetensors")
    assert chained.origin.since_step == 4  # the weights of step 3 are gone: those resumed from take their place
    assert chained.origin.base == fingerprint(open_weights("epoch=0-step=4.ckpt"))


def test_two_runs_into_one_folder_do_not_mix():
    options = {"every_n_steps": 8, "at_train_end": True}
    fit(TaskVectorCallback(**options))
    before = {file: file.read_bytes() for file in Path().rglob("*.safetensors")}
    torch.manual_seed(7)
    model = MixedNet()
    torch.nn.init.ones_(model.body[0].weight)
    fit(TaskVectorCallback(**options), model=model)
    assert all(file.read_bytes() == content for file, content in before.items())
    assert names("final*") == ["final-v1.tv.safetensors", "final.tv.safetensors"]
    assert len(names("base-*")) == 2
    pairs = {"final", f"{LAST}", "trajectory/step=00000008"}
    for name in pairs:
        old, new = load(f"{name}.tv.safetensors"), load(f"{name}-v1.tv.safetensors")
        assert old.origin.run != new.origin.run
        assert old.origin.base != new.origin.base
        with pytest.raises(MismatchError):
            old + new


def test_a_second_fit_of_one_callback_is_another_run():
    callback = TaskVectorCallback(at_train_end=True)
    _, model = fit(callback)
    fit(callback, model=model)
    first, second = load("final.tv.safetensors"), load("final-v1.tv.safetensors")
    assert first.origin.run != second.origin.run
    assert first.origin.base == second.origin.base


# --- on request, and who hears of it


class Listener(L.Callback):
    def __init__(self):
        self.heard = []

    def on_vector_saved(self, trainer, pl_module, saved):
        self.heard.append((saved, os.path.exists(saved.path)))


def test_on_request_and_the_hook():
    callback, listener = TaskVectorCallback(with_checkpoints=False), Listener()

    class Ask(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                self.saved = callback.save_vector(trainer, Path("asked.tv.safetensors"))

    ask = Ask()
    fit(callback, callbacks=[ask, listener])
    vector = load("asked.tv.safetensors")
    assert listener.heard == [(ask.saved, True)]
    assert ask.saved.step == vector.origin.step == 3
    assert ask.saved.norm == pytest.approx(vector.norm())
    assert ask.saved.finetuned == vector.origin.finetuned
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(RuntimeError, match="save_vector needs a Trainer that fits with this callback"):
        TaskVectorCallback().save_vector(trainer, Path("early.tv.safetensors"))


def test_norm_and_cosine_are_logged():
    logger = CSVLogger(Path(), name="logs", version=0)
    checkpoint = ModelCheckpoint(dirpath=".", save_top_k=1, save_last=True)  # removes what is compared with
    fit(TaskVectorCallback(every_n_steps=2), logger=logger, checkpoint=checkpoint, log_every_n_steps=1)
    rows = Path("logs/version_0/metrics.csv").read_text().splitlines()
    table = [dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows[1:]]
    cosines = {row["step"]: row["task_vector/cosine_to_previous"] for row in table if row["task_vector/norm"]}
    norms = {row["step"]: row["task_vector/norm"] for row in table if row["task_vector/norm"]}
    second, fourth = (load(f"trajectory/step=0000000{n}.tv.safetensors") for n in (2, 4))
    assert float(norms["4"]) == pytest.approx(fourth.norm())
    assert cosines["2"] == ""
    assert float(cosines["4"]) == pytest.approx(second.cosine(fourth), abs=1e-5)


# --- where: links, remote file systems, asynchronous checkpoints


def test_a_linked_last_checkpoint_has_a_linked_vector():
    checkpoint = ModelCheckpoint(dirpath=".", save_top_k=1, save_last="link")
    fit(checkpoint=checkpoint)
    assert os.readlink(Path("last.ckpt")) == f"{LAST}.ckpt"
    assert os.readlink(Path("last.tv.safetensors")) == f"{LAST}.tv.safetensors"
    assert_vector_is_checkpoint_minus_base("last")
    assert names("*.tv.safetensors") == [f"{LAST}.tv.safetensors", "last.tv.safetensors"]


def test_checkpoints_that_are_written_behind_training():
    fit(plugins=[AsyncCheckpointIO()])
    assert_vector_is_checkpoint_minus_base("epoch=0-step=4")
    assert_vector_is_checkpoint_minus_base(LAST)


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def fetch(system, path, folder):
    system.get_file(path, str(folder / os.path.basename(path)))
    return folder / os.path.basename(path)


def test_a_remote_folder(memory):
    checkpoint = ModelCheckpoint(dirpath="memory://run", save_top_k=1, save_last=True)
    fit(TaskVectorCallback(every_n_steps=4, at_train_end=True), checkpoint=checkpoint)
    files = sorted(os.path.relpath(file, "/run") for file in memory.find("/run"))
    digest = fingerprint(MixedNet().state_dict()).digest
    assert files == [
        f"base-{digest}.safetensors",
        f"{LAST}.ckpt",
        f"{LAST}.tv.safetensors",
        "final.tv.safetensors",
        "last.ckpt",
        "last.tv.safetensors",
        "trajectory/step=00000004.tv.safetensors",
        "trajectory/step=00000008.tv.safetensors",
    ]
    assert names("*.safetensors") == []
    vector = load(fetch(memory, "/run/last.tv.safetensors", Path()))
    assert vector.origin.finetuned == fingerprint(open_weights(fetch(memory, "/run/last.ckpt", Path()))).digest
    again = ModelCheckpoint(dirpath="memory://run", save_last=True)
    fit(TaskVectorCallback(), checkpoint=again, ckpt_path="memory://run/last.ckpt", epochs=3)
    resumed = load(fetch(memory, "/run/epoch=2-step=12.tv.safetensors", Path()))
    assert resumed.origin.base == vector.origin.base
    assert len(memory.glob("/run/base-*")) == 1


def test_a_remote_base_that_is_gone(memory):
    fit(TaskVectorCallback(dirpath="memory://bases"))
    memory.rm("/bases", recursive=True)
    with pytest.raises(FileNotFoundError, match=r"expected at memory://bases/base-\w+.safetensors.*base=PATH"):
        fit(ckpt_path=Path(f"{LAST}.ckpt"), epochs=3, folder="second")


def test_a_path_with_the_local_protocol(tmp_path):
    fit(TaskVectorCallback(dirpath=f"file://{tmp_path}/bases"))
    assert len(names("base-*", folder="bases")) == 1


# --- the hub


class LocalHub:
    """Stands in for the hub's client: repositories are folders."""

    root = None
    broken = False

    def create_repo(self, repo_id, *, private, exist_ok):
        assert private
        assert exist_ok
        if self.broken:
            raise ConnectionError("no network")
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)

    def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo):
        (self.root / repo_id / path_in_repo).write_bytes(path_or_fileobj.read_bytes())


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(LocalHub, "root", Path("hub"))
    monkeypatch.setattr(huggingface_hub, "HfApi", LocalHub)
    return LocalHub


def test_the_base_and_the_vectors_that_are_left_are_pushed_at_the_end(hub):
    checkpoint = ModelCheckpoint(dirpath=Path("run"), save_top_k=1)
    fit(TaskVectorCallback(push_to="me/vectors"), checkpoint=checkpoint, folder="run")
    digest = fingerprint(MixedNet().state_dict()).digest
    assert names(folder="hub/me/vectors") == [f"base-{digest}.safetensors", f"{LAST}.tv.safetensors"]
    pushed = load(f"hub/me/vectors/{LAST}.tv.safetensors")
    assert pushed.origin == load(f"run/{LAST}.tv.safetensors").origin


def test_a_hub_that_cannot_be_reached_does_not_lose_the_run(hub, monkeypatch):
    monkeypatch.setattr(hub, "broken", True)
    with pytest.warns(UserWarning, match="3 operations failed.*was not pushed to me/vectors: no network"):
        fit(TaskVectorCallback(push_to="me/vectors"))
    assert len(names("*.tv.safetensors")) == 2


# --- mistakes and misfortunes


def test_a_full_disk_is_loud_and_leaves_nothing_half_written(monkeypatch):
    store, stored = LateHeaderFile._store, []

    def full(self, data, offset):
        stored.append(offset)
        if len(stored) > 3:
            raise OSError(28, "No space left on device")
        store(self, data, offset)

    class Fill(L.Callback):
        def on_train_start(self, *_):
            monkeypatch.setattr(LateHeaderFile, "_store", full)

    said = "not written, and no partial file is left; training continues.*No space"
    with pytest.warns(UserWarning, match=f"{said}|2 operations failed") as all_:
        fit(callbacks=[Fill()])
    assert sum(re.search(said, str(warning.message)) is not None for warning in all_) >= 2
    assert any("2 operations failed during fit" in str(warning.message) for warning in all_)
    assert names("*.ckpt") == ["epoch=0-step=4.ckpt", f"{LAST}.ckpt"]
    assert [name for name in names() if not name.endswith(".ckpt")] == names("base-*.safetensors")


def test_a_full_disk_is_an_error_for_who_asked_and_at_the_start(monkeypatch):
    def full(self, data, offset):
        raise OSError(28, "No space left on device")

    callback = TaskVectorCallback(with_checkpoints=False)

    class Ask(L.Callback):
        def on_train_start(self, trainer, *_):
            monkeypatch.setattr(LateHeaderFile, "_store", full)
            torch.nn.init.ones_(trainer.lightning_module.body[0].weight)
            callback.save_vector(trainer, Path("asked.tv.safetensors"))

    with pytest.raises(OSError, match="No space left"):
        fit(callback, callbacks=[Ask()])
    with pytest.raises(OSError, match="No space left"):  # no base, no run: nothing is lost yet
        fit(folder="second")
    assert names(folder="second") == []


@pytest.mark.parametrize("change", ["grown", "shrunk", "reshaped"])
def test_a_model_whose_keys_changed_since_the_base_was_captured(change):
    class Change(L.Callback):
        def on_train_start(self, trainer, pl_module):
            if change == "grown":
                pl_module.late = torch.nn.Linear(1, 1)
            elif change == "shrunk":
                del pl_module.frozen
            else:
                pl_module.frozen = torch.nn.Linear(3, 2)

    messages = {
        "grown": "the model now has 'late.weight', 'late.bias'",
        "shrunk": "it no longer has 'frozen.weight', 'frozen.bias'",
        "reshaped": r"'frozen.weight' is \[2, 3\] now and \[2, 2\] in the base",
    }
    with pytest.raises(MismatchError, match=f"keys changed since the base .* was captured: {messages[change]}"):
        fit(callbacks=[Change()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "ema"}, "weights must be one of checkpoint, raw, averaged; found 'ema'"),
        ({"lora": "keep"}, "lora must be one of merge, adapter; found 'keep'"),
        ({"against": "last"}, "against must be one of base, previous; found 'last'"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1"),
        ({"against": "previous"}, "against='previous' needs every_n_steps"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        TaskVectorCallback(**options)


@pytest.mark.parametrize("module", [tva.callbacks.remote_files, tva.callbacks.writer])
def test_docstrings_run(module):
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


# --- side by side


def test_a_name_that_another_process_is_about_to_write_is_left_to_it():
    """Two fits of one folder choose their names one after the other, and the second takes another."""
    Path("trajectory").mkdir()
    name = "step=00000004.tv.safetensors"
    theirs = Path(f"trajectory/.{name}.{socket.gethostname()}.{os.getppid()}.tmp")
    gone = Path(f"trajectory/.{name}.{socket.gethostname()}.99999999.tmp")  # of a process that was killed
    base = Path(f".base.{socket.gethostname()}.99999999.tmp")
    base.mkdir()
    theirs.touch()
    gone.touch()
    fit(TaskVectorCallback(every_n_steps=4, with_checkpoints=False))
    found = set(os.listdir("trajectory"))
    assert found == {theirs.name, "step=00000004-v1.tv.safetensors", "step=00000008.tv.safetensors"}
    assert not base.exists()


def test_a_name_that_another_process_writes_while_one_is_chosen_is_left_to_it(tmp_path, monkeypatch):
    fit(TaskVectorCallback(every_n_steps=4, with_checkpoints=False), folder="other")
    theirs = tmp_path / "trajectory/step=00000004.tv.safetensors"

    def written_meanwhile(path):
        if path == str(theirs) and not theirs.exists():  # the claim has just become a file
            shutil.copy(f"other/trajectory/{theirs.name}", theirs)
        return False

    monkeypatch.setattr("tva.callbacks.writer.is_claimed", written_meanwhile)
    fit(TaskVectorCallback(every_n_steps=4, with_checkpoints=False))
    assert theirs.read_bytes() == Path(f"other/trajectory/{theirs.name}").read_bytes()
    assert Path("trajectory/step=00000004-v1.tv.safetensors").exists()


def _fit_too(folder, seed, begin):
    begin.wait(300)
    L.seed_everything(seed)
    fit(TaskVectorCallback(every_n_steps=1, with_checkpoints=False, task=f"fit{seed}"), folder=folder)


@pytest.mark.slow
def test_two_fits_in_one_folder_lose_no_vector(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    begin = spawn.Barrier(2)
    fits = [spawn.Process(target=_fit_too, args=(tmp_path, seed, begin)) for seed in (1, 2)]
    for each in fits:
        each.start()
    for each in fits:
        each.join(300)
        assert each.exitcode == 0
    found = [load(file).origin for file in Path("trajectory").glob("*.tv.safetensors")]
    assert sorted((origin.task, origin.step) for origin in found) == [
        (f"fit{n}", s) for n in (1, 2) for s in range(1, 9)
    ]
    assert all(name.endswith(".tv.safetensors") and name[0] != "." for name in os.listdir("trajectory"))

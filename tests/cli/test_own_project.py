"""The command line on one's own project: classes in the current folder, one's own LightningCLI, and their mistakes."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_models import Blobs

from tva import TaskVector, fingerprint, open_weights
from tva.cli.main import main

MODULE = """

from lightning import LightningDataModule
from lightning.pytorch.loggers import Logger

from small_models import Blobs, LinearNet


class Net(LinearNet):
    def __init__(self, width: int = 8, learning_rate: float = 0.1) -> None:
        super().__init__(width, learning_rate)


class Wrong(Net):
    def training_step(self, batch, index):
        return self(batch[0].reshape(7, 7)).sum()


class Untyped(Blobs):
    def __init__(self, seed):
        super().__init__(seed)


class Remote(Logger):
    name, version = "remote", 0

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        pass
"""
SCRIPT = """
from lightning.pytorch.cli import LightningCLI
from tva.cli import {base}
from own_project import Net, Blobs

{define}
if __name__ == "__main__":
    {call}
"""
QUICK = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.enable_model_summary=false"]
QUICK += ["--trainer.logger=false", "--trainer.enable_checkpointing=false"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a module, which is on no path."""
    Path("own_project.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    yield tmp_path
    sys.modules.pop("own_project", None)


def fails(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return stop.value.code, text[text.index("tva: error: ") :]


def test_classes_in_the_current_folder_can_be_named(own):
    words = ["--model", "own_project.Net", "--model.width=5", "--data", "small_models.Blobs", "--data.seed=1"]
    main(["fit", *words, *QUICK])
    assert sys.path[-1] == str(own)


@pytest.mark.slow
def test_classes_in_the_current_folder_can_be_named_from_the_console_script(own):
    script = os.path.join(os.path.dirname(sys.executable), "tva")
    words = ["fit", "--model", "own_project.Net", "--print_config"]
    environment = {**os.environ, "PYTHONPATH": os.path.join(os.path.dirname(__file__), os.pardir)}
    done = subprocess.run([script, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["model"]["init_args"] == {"width": 8, "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model own_project.Net --model.widht 3", "own_project.Net has no option 'widht'. Did you mean 'width'? It"),
        ("--model own_project.Net --model.width many", "--model.width must be a whole number; found 'many'."),
        ("--model own_project.Nett", "--model: the module own_project has no 'Nett'. Did you mean 'Net'?"),
        ("--model own_projcet.Net", "--model: own_projcet.Net: there is no module 'own_projcet'. It must be"),
        ("--model broken.Net", "--model: broken.Net cannot be imported, for it imports 'nothing_there', which is not"),
        ("--model Nett", "--model: no class is called 'Nett'."),
        ("--model own_project.Blobs", "--model must be lightning.pytorch.core.module.LightningModule; found 'own_"),
        ("--devices 2", "There is no option --devices. Did you mean --trainer.devices?"),
        ("--trainer.max_epohcs 2", "There is no option --trainer.max_epohcs. Did you mean --trainer.max_epochs?"),
        ("", "--model must be given. 'tva fit --help'"),
        ("--config empty.yaml", "The file given with --config must hold options, each as NAME: VALUE; it is empty."),
        ("--config typo.yaml", "by class_path and init_args; found 'init_arg'. Did you mean 'init_args'?"),
        ("--config unknown.yaml", "unknown.yaml, line 1: there is no option 'modle'. Did you mean 'model'?"),
        ("--config callback.yaml", "line 2: --trainer.callbacks: tva.callbacks.TaskVectorCallback has no option 'every_n_step'"),  # noqa: E501
        ("--trainer.callbacks=EarlyStoping", "callbacks: no class is called 'EarlyStoping'. Did you mean 'Early"),
        ("--trainer.callbacks=EarlyStopping", "EarlyStopping must be given monitor, as in --trainer.callbacks.monitor"),
        ("--trainer.callbacks.every_n_steps=5", "no option 'every_n_steps' of a class named there. Name the class"),
    ],
)  # fmt: skip
def test_mistakes_keep_their_cause_and_name_the_nearest(own, capsys, words, message):
    Path("broken.py").write_text("import nothing_there")
    Path("empty.yaml").touch()
    Path("typo.yaml").write_text("model: {class_path: own_project.Net, init_arg: {width: 3}}")
    Path("unknown.yaml").write_text("modle: own_project.Net")
    callback = "{class_path: tva.callbacks.TaskVectorCallback, init_args: {every_n_step: 3}}"
    Path("callback.yaml").write_text(f"model: own_project.Net\ntrainer: {{callbacks: [{callback}]}}")
    model = [] if "--model" in words or "--config" in words or not words else ["--model", "own_project.Net"]
    status, text = fails(capsys, "fit", *model, *words.split())
    assert status == 2
    assert message in text


def test_options_of_an_edit_keep_their_causes(own, capsys):
    words = ["edit", "--model", "own_project.Net", "--recipe", "a", "--vectors.a", "b", "--output", "out"]
    status, text = fails(capsys, *words, "--search=Girde")
    assert (status, "--search: no class is called 'Girde'. Did you mean 'Grid'?" in text) == (2, True)
    Path("edit.yaml").write_text("targets: {t: {class_path: own_project.Untyped, init_args: {seed: 3}}}")
    status, text = fails(capsys, *words, "--config=edit.yaml")
    assert (status, "the parameter 'seed' of own_project.Untyped has no type" in text) == (2, True)
    status, text = fails(capsys, *words, "--subject_to=a/accuracy>=3")
    assert (status, """Write --subject_to='["a/accuracy>=3"]', or --subject_to+=VALUE for each.""" in text) == (2, True)


def test_what_a_models_constructor_raises_is_the_message(own, capsys):
    words = [
        "edit",
        "--model=TransformersModel",
        "--model.path=./nowhere",
        "--recipe=a",
        "--vectors.a=b",
        "--output=out",
    ]
    status, text = fails(capsys, *words, "--targets.a=small_models.Blobs")
    assert status == 2
    assert text.startswith("tva: error: A folder with config.json and weights was expected at ./nowhere, but none is")


def test_what_ones_own_code_raises_is_shown_with_its_place(own, capsys):
    status, text = fails(
        capsys, "fit", "--model", "own_project.Wrong", "--data", "small_models.Blobs", "--data.seed=1", *QUICK
    )
    assert status == 2
    assert text.startswith("tva: error: RuntimeError in your code: shape '[7, 7]' is invalid")
    assert 'own_project.py", line 16, in training_step' in text


def test_what_lightning_and_torch_raise_about_settings_is_a_message(own, capsys):
    words = ["fit", "--model", "own_project.Net", "--data", "small_models.Blobs", "--data.seed=1"]
    Path("place.yaml").write_text("trainer:\n  devices: two\n")
    many = "--trainer.devices must be auto, a whole number of at least 1, or a list of the indices of GPUs; found "
    for option, message in (
        ("--trainer.devices=2.5", f"tva: error: {many}"),  # the command line's, not that of the file
        ("--trainer.max_epochs=2", f"tva: error: place.yaml, line 2: {many}'two'."),
        ("--trainer.accelerator=cpp", "tva: error: You selected an invalid accelerator name"),
    ):
        status, text = fails(capsys, *words, "--config=place.yaml", *QUICK, option)
        assert (status, message in text, "TVA_DEBUG" in text) == (2, True, False), text
    main([*words, *QUICK, "--trainer.enable_checkpointing=true"])
    (checkpoint,) = Path("checkpoints").iterdir()
    status, text = fails(capsys, *words, *QUICK, "--model.width=5", "--ckpt_path", checkpoint)
    assert (status, "size mismatch" in text) == (2, True)


def test_a_logger_without_a_folder_leaves_the_config_in_the_run(own):
    logger = ["--trainer.logger=own_project.Remote", "--trainer.default_root_dir=run"]
    main(["fit", "--model", "own_project.Net", "--data", "small_models.Blobs", "--data.seed=1", *QUICK, *logger])
    assert yaml.safe_load(Path("run/config.yaml").read_text())["model"]["class_path"] == "own_project.Net"


@pytest.mark.filterwarnings("ignore")
def test_a_fit_whose_vector_cannot_be_written_has_failed(own, capsys):
    words = ["fit", "--model", "small_models.LinearNet", "--data", "small_models.Blobs", "--data.seed=1", *QUICK]
    words += ["--trainer.callbacks=TaskVectorCallback", "--trainer.callbacks.at_train_end=true"]
    words += ["--trainer.callbacks.dirpath=run"]
    main(words)
    (vector,) = Path("run").glob("*.tv.safetensors")
    vector.unlink()
    with pytest.raises(SystemExit, match="1"):
        main([*words, "--model.learning_rate=1e30"])
    assert not list(Path("run").glob("*.tv.safetensors"))


def run_script(path, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, words)])
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


MIXED = '''class OwnTrainer(__import__("lightning").Trainer):
    """A Trainer of one's own."""


class OwnCLI(EditMixin, LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.add_argument("--note", default="none")
'''


@pytest.mark.parametrize(
    ("base", "define", "call"),
    [
        ("TvaCLI", "", 'TvaCLI(Net, Blobs, save_config_kwargs={"overwrite": True})'),
        ("EditMixin", MIXED, 'OwnCLI(Net, Blobs, trainer_class=OwnTrainer, save_config_kwargs={"overwrite": True})'),
    ],
)
def test_edit_stands_beside_fit_in_a_lightning_cli_of_ones_own(own, monkeypatch, base, define, call):
    monkeypatch.syspath_prepend(own)
    script = Path("script.py")
    script.write_text(SCRIPT.format(base=base, define=define, call=call))
    vector = "--trainer.callbacks+=tva.callbacks.TaskVectorCallback"
    quick = ["--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--trainer.default_root_dir=run", "--data.seed=1"]
    quick += ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    saving = [
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.dirpath=run",
        "--trainer.callbacks.filename=last",
    ]
    assert run_script(script, monkeypatch, "fit", *quick, vector, *saving) == 0
    assert run_script(script, monkeypatch, "validate", *quick) == 0
    config = {
        "model": {"width": 8},
        "data": {"seed": 9},
        "vectors": {"a": "run/last.tv.safetensors"},
        "recipe": "a",
        "scaling_coef": 0.5,
        "output": "out",
        "targets": {
            name: {"class_path": "small_models.Blobs", "init_args": {"seed": seed}} for name, seed in SEEDS.items()
        },
        "subject_to": ["a/accuracy >= 0"],
    }
    Path("edit.yaml").write_text(yaml.safe_dump(config))
    assert run_script(script, monkeypatch, "edit", "--config", "edit.yaml") == 0
    report = json.loads(Path("out/edit.json").read_text())
    assert report["command"] == f"python {script} edit --config edit.yaml"
    # each task is its own, and not the data module under `data`
    from own_project import Net

    moved = TaskVector.load("run/last.tv.safetensors").apply_to(Net().state_dict(), 0.5)
    assert fingerprint(open_weights("out/edited.safetensors")) == fingerprint(moved)
    model = Net()
    model.load_state_dict(moved)
    for name, seed in SEEDS.items():
        data = Blobs(seed)
        inputs, labels = data.test_dataloader().dataset.tensors
        accuracy = float((model(inputs).argmax(-1) == labels).float().mean())
        assert report["tasks"][name]["edited"]["value"] == pytest.approx(accuracy)
    assert Path("out/config.yaml").exists()
    assert run_script(script, monkeypatch, "edit", "--config", "edit.yaml", "--subject_to+=a/accuracy >= 2") == 1


SEEDS = {"a": 1, "b": 2}


@pytest.mark.slow
def test_the_command_line_in_python_loads_lightning_only_when_used():
    code = "import sys, tva.cli; assert 'lightning' not in sys.modules; from tva.cli import TvaCLI, EditMixin; "
    code += "assert issubclass(TvaCLI, EditMixin); print(tva.cli.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_trainer_that_is_no_class_is_refused():
    from lightning.pytorch.cli import LightningCLI

    from tva.cli import EditMixin

    class Mixed(EditMixin, LightningCLI):
        pass

    with pytest.raises(TypeError, match="trainer_class must be a class"):
        Mixed(trainer_class=lambda **options: None)


def test_validate_and_test_run_as_in_lightning(own, capsys):
    words = ["--model", "own_project.Net", "--data", "small_models.Blobs", "--data.seed=1", *QUICK[:1], *QUICK[3:4]]
    for command in ("validate", "test"):
        main([command, *words])
        assert "accuracy" in capsys.readouterr().out
    status, text = fails(
        capsys, "predict", "--model", "own_project.Wrong", "--data", "small_models.Blobs", "--data.seed=1"
    )
    assert (status, "predict" in text) == (2, True)

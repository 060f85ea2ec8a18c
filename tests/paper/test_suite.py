"""The declared suite: every experiment can be expanded, planned offline and parsed; a run skips what is finished."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import statistics
from pathlib import Path

import pytest
import yaml
from small_cli import blobs, fit_config

from benchmarks import paper
from tva.cli.commands import fit_many, paper__run
from tva.cli.main import main
from tva.paper.figures import curve_rows, figures_of, pair_rows, write_figures
from tva.paper.quantities import quantity
from tva.paper.results import Row, find_made
from tva.paper.suite import SUITE, find_scale, list_experiments, load_experiment
from tva.paper.table import to_latex

SETUPS = SUITE / "setups"
SCALES = [scale for name in list_experiments() for scale in load_experiment(name).values()]


@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: f"{scale.experiment}-{scale.name}")
def test_every_scale_has_edits_and_fits_and_says_what_differs(scale):
    assert scale.differs
    assert list(scale.edits([0], "data"))
    assert all(fit.changes["data"] for fit in scale.fits([0], "data"))


def one_of_each_kind():
    """The first scale of every experiment, and one on every setup that is not like another."""
    first = {scale.experiment: scale for scale in reversed(SCALES)}
    setups = {
        scale.setup_name: scale for scale in SCALES if "like:" not in (SETUPS / f"{scale.setup_name}.yaml").read_text()
    }
    return {(scale.experiment, scale.name): scale for scale in (*first.values(), *setups.values())}.values()


@pytest.mark.slow
@pytest.mark.parametrize("scale", one_of_each_kind(), ids=lambda scale: f"{scale.experiment}-{scale.name}")
def test_the_configs_of_every_experiment_parse(scale, tmp_path, capsys):
    edit = next(scale.edits([0], "data"))
    fit = paper__run.make_fits(scale, tmp_path, [0], "data")[0]
    vectors = {name: f"{name}.tv.safetensors" for name in edit.vectors}
    for command, config in (("fit", fit.config), ("edit", {**edit.config, "vectors": vectors, "output": "out"})):
        file = tmp_path / f"{command}.yaml"
        file.write_text(yaml.safe_dump(config))
        with pytest.raises(SystemExit) as stop:
            main([command, "--config", str(file), "--print_config"])
        assert stop.value.code == 0
        assert yaml.safe_load(capsys.readouterr().out)


def own_experiment(folder):
    """Write an experiment of one's own on three tasks of blobs, with its setup beside it."""
    (folder / "setups").mkdir()
    config = fit_config("FOLDER")
    del config["trainer"]["default_root_dir"]
    config["trainer"]["callbacks"][1]["init_args"].pop("dirpath")
    setup = {
        "model": config["model"],
        "fit": {"trainer": config["trainer"]},
        "data": blobs("{seed}"),
        "tasks": {"one": {"data.init_args.seed": 1}, "two": {"data.init_args.seed": 2}, "other": None},
    }
    experiment = {
        "title": "Two blobs",
        "source": "nowhere",
        "edits": {
            "forget-{task}": {
                "each": {"task": "{tasks}"},
                "vectors": ["{task}"],
                "targets": ["{task}"],
                "controls": "{controls}",
                "options": {"recipe": "-{task}", "scaling_coef": 0.5},
            }
        },
        "scales": {
            "small": {"setup": "blobs", "tasks": ["one", "two"], "controls": ["other"], "seeds": [3, 4], "paper": "A"}
        },
        "rows": [
            {"row": "target", "edits": "forget-{task}", "value": "target.edited", "paper": {"A": 10.0}},
            {"row": "coefficient", "edits": "forget-{task}", "value": "scaling_coef", "unit": "number"},
        ],
        "effects": [
            {"effect": "forgets", "edits": "forget-{task}", "value": "target.edited", "below": "target.base"},
            {"effect": "is above itself", "edits": "forget-{task}", "value": "target.base", "above": "target.base"},
        ],
    }
    (folder / "setups" / "blobs.yaml").write_text(yaml.safe_dump(setup))
    (folder / "blobs.yaml").write_text(yaml.safe_dump(experiment))
    return folder / "blobs.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An experiment that was run, the processes' commands in this process."""
    patch, ran = pytest.MonkeyPatch(), []

    def in_this_process(command, log, worker):
        ran.append(command[3])
        try:
            main(list(command[3:]))
        except SystemExit as stop:
            return stop.code
        return 0

    for module in (fit_many, paper__run):
        patch.setattr(module, "run_process", in_this_process)
    folder = tmp_path_factory.mktemp("paper")
    file, words = own_experiment(folder), ["--output", str(folder / "out"), "--devices", "cpu"]
    main(["paper", "run", str(file), *words])
    yield file, folder / "out", ran, words
    patch.undo()


def test_every_fit_and_edit_is_made_once(made, capsys):
    file, output, ran, words = made
    assert sorted(ran) == ["edit"] * 4 + ["fit"] * 4
    main(["paper", "run", str(file), *words, "--json"])
    steps = json.loads(capsys.readouterr().out)
    assert {step["state"] for step in steps} == {"skipped"}
    assert len(ran) == 8
    main(["paper", "plan", str(file), "--output", str(output), "--json"])
    (planned,) = json.loads(capsys.readouterr().out)
    assert planned["fits"] == {"skipped": 4}
    assert planned["edits"] == {"new": 0, "made": 4}


def test_the_table_has_means_over_seeds_and_the_papers_numbers(made, capsys, tmp_path):
    file, output, _, _ = made
    main(["paper", "table", str(file), "--output", str(output), "--write", str(tmp_path)])
    assert "coefficient" in capsys.readouterr().out
    ledger = json.loads((tmp_path / "table.json").read_text())
    row = ledger["rows"][0]
    values = {}
    for report in output.glob("blobs/small/*/seed=*/edit/edit.json"):
        content = json.loads(report.read_text())
        values.setdefault(content["seed"], []).append(
            next(entry for entry in content["tasks"].values() if entry["role"] == "target")["edited"]["value"]
        )
    means = [100 * statistics.fmean(found) for found in values.values()]
    assert sorted(values) == [3, 4]
    assert row["ours"] == pytest.approx(statistics.fmean(means))
    half = 12.706205 * statistics.stdev(means) / 2**0.5  # Student's t, one degree of freedom
    assert row["low"] == pytest.approx(row["ours"] - half)
    assert row["difference"] == pytest.approx(row["ours"] - 10)
    assert {edit["edit"] for edit in ledger["edits"]} == {"forget-one", "forget-two"}
    assert "| target | 10.0 (A) |" in (tmp_path / "table.md").read_text()
    (tmp_path / "table.md").write_text("# Experiments of the paper\n\n## another, small\n")
    main(["paper", "table", str(file), "--output", str(output), "--write", str(tmp_path)])
    assert "## another" not in (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.csv").read_text().count("\n") == 3
    assert r"\toprule" in (tmp_path / "table.tex").read_text()


def test_the_ledger_takes_finished_runs_as_they_are(made, monkeypatch):
    file, output, _, _ = made
    monkeypatch.setitem(paper.GROUPS, "own", (str(file),))
    monkeypatch.setattr(paper, "tva", None)  # nothing is run
    found = {
        seed: paper.measure(
            seed, **{**paper.OPTIONS, "group": "own", "scale": "small", "runs": str(output), "commit": "c"}
        )
        for seed in (3, 4)
    }
    edits = [json.loads(path.read_text()) for path in output.glob("blobs/small/*/seed=3/edit/edit.json")]
    ours = [task["edited"]["value"] for edit in edits for task in edit["tasks"].values() if task["role"] == "target"]
    assert found[3]["rows"]["blobs"]["target"] == pytest.approx(100 * statistics.fmean(ours), rel=1e-3)
    assert found[3]["edits"]["forget-one"]["coef"] == 0.5
    how = found[3].pop("made")
    assert how["commit"] == "c"
    assert how["date"] == edits[0]["created"][:10]
    marks = [*output.glob("blobs/small/*/seed=3/done.json"), *output.glob("fits/blobs/*/seed=3/done.json")]
    assert how["seconds"] == round(sum(json.loads(mark.read_text())["seconds"] for mark in marks))
    with pytest.raises(ValueError, match="no finished edits of seed 5"):
        paper.gather([find_scale(str(file), None)], output, 5)


def test_labels_are_escaped_in_latex():
    row = Row("a_b", "small", "5 % of B − A^2 \\ ~ {λ}", None, 1.0, None, None, {0: 1.0}, 1, "number", None, "")
    line = to_latex([row]).splitlines()[4]
    assert line.startswith(
        r"a\_b & small & 5 \% of B $-$ A\^{}2 \textbackslash{} \textasciitilde{} \{$\lambda$\} & -- & 1.000"
    )


def test_pairs_are_a_matrix_of_accuracies_and_cosines():
    pairs = {"a + b": [0.9, 0.1], "a + c": [0.8, 0.2], "b + c": [1.0, 0.3]}
    rows = paper.pairs(
        [{"pairs": {"add": pairs}}, {"pairs": {"add": {**pairs, "b + c": [0.9, 0.1]}}}], "add"
    ).splitlines()
    assert rows[2:] == ["| a |  | 90.0 | 80.0 |", "| b | 0.100 |  | 95.0 |", "| c | 0.200 | 0.200 |  |"]


def test_check_fails_where_an_effect_is_not_shown(made, capsys, tmp_path):
    file, output, _, _ = made
    with pytest.raises(SystemExit) as stop:
        main(["paper", "table", str(file), "--output", str(output), "--write", str(tmp_path), "--check"])
    assert stop.value.code == 1
    assert "not shown" in capsys.readouterr().out
    own = file.with_name("no-effects.yaml")
    own.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "effects": []}))
    shutil.copytree(output / "blobs", output / "no-effects")
    with pytest.raises(SystemExit):
        main(["paper", "table", str(own), "--output", str(output), "--write", str(tmp_path / "own"), "--check"])
    assert "--check tests effects, and these experiments have none" in capsys.readouterr().err
    shutil.rmtree(output / "no-effects")


def test_an_interruption_ends_the_run_whatever_else_was_asked_for(tmp_path, monkeypatch, capsys):
    file, ran = own_experiment(tmp_path), []

    def interrupted(command, log, worker):
        ran.append(command)
        log.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_many, "run_process", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["paper", "run", str(file), str(file), "--output", str(tmp_path / "out"), "--devices", "cpu"])
    assert stop.value.code == 130
    assert len(ran) <= 4  # workers may take other fits until the first is noticed, but none of the second experiment
    assert capsys.readouterr().out.count("blobs, small: 4 fits") == 1


def test_an_edit_of_another_config_is_kept_until_redo(made, capsys, tmp_path, monkeypatch):
    file, output, _, words = made
    content = yaml.safe_load(file.read_text())
    content["edits"]["forget-{task}"]["options"]["scaling_coef"] = 0.25
    before = file.read_text()
    file.write_text(yaml.safe_dump(content))
    try:
        with pytest.raises(SystemExit) as stop:
            main(["paper", "run", str(file), *words, "--seeds", "[3]"])
        assert stop.value.code == 1
        assert "Pass --redo" in capsys.readouterr().out
        main(["paper", "run", str(file), *words, "--seeds", "[3]", "--redo"])
        coefs = {
            made.seed: quantity("scaling_coef", made.content) for made in find_made(output, find_scale(str(file), None))
        }
        assert coefs == {3: 0.25, 4: 0.5}
        assert (output / "blobs/small/forget-one/seed=3.replaced-1/edit/edit.json").exists()
    finally:
        file.write_text(before)
        main(["paper", "run", str(file), *words, "--redo"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "forgetting-image"], "Did you mean 'forgetting-images'?"),
        (["plan", "forgetting-images", "--scale", "smal"], "Did you mean 'small'?"),
        (["run", "forgetting-images", "--scale", "real"], "pass --data_root"),
        (["run", "forgetting-images", "--scale", "real", "--data_root", "nowhere"], "There is no folder nowhere"),
        (["run", "nowhere.yaml"], "There is no experiment nowhere.yaml"),
        (["table", "forgetting-images", "--output", "nowhere"], "There are no results"),
        (["plan", "forgetting-images", "--seeds", "[0,1,0]"], "each once; found [0, 1, 0]"),
        (["run", "forgetting-images", "--seeds", "[]"], "each once; found []"),
    ],
)
def test_mistakes_say_what_to_do(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["paper", *words])
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_an_experiment_with_an_unknown_key_is_refused(tmp_path, capsys):
    file = own_experiment(tmp_path)
    file.write_text(file.read_text() + "\nrow: []\n")
    with pytest.raises(SystemExit):
        main(["paper", "plan", str(file)])
    assert "unknown keys ['row']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own["rows"][0].update(value="target.edit"), "blobs.yaml: There is no quantity 'target.edit'"),
        (lambda own: own["effects"][0].update(below="target.bas"), "Did you mean 'target.base'"),
        (lambda own: own["rows"][1].update(edits="forgt"), "edits of 'forget-{task}'; found {'edits': 'forgt'"),
        (lambda own: own["scales"]["small"].update(tasks="one"), "tasks must be a list, .*; found 'one'"),
    ],
)
def test_what_a_table_would_lack_is_refused_before_anything_is_trained(change, message, tmp_path):
    file = own_experiment(tmp_path)
    content = yaml.safe_load(file.read_text())
    change(content)
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        load_experiment(str(file))


def test_an_experiment_is_read_within_limits(tmp_path, capsys):
    lists = [f"k{n}: &k{n} [*k{n - 1}]" for n in range(1, 120)]
    (tmp_path / "x.yaml").write_text("\n".join(["k0: &k0 [1]", *lists]))
    with pytest.raises(SystemExit):
        main(["paper", "plan", str(tmp_path / "x.yaml")])
    assert "x.yaml is not YAML that can be read: it is nested more than 100 deep" in capsys.readouterr().err


def test_a_setup_may_be_like_another_and_have_variants(tmp_path):
    file = own_experiment(tmp_path)
    other = "like: blobs\nfit.trainer.max_steps: 3\nvariants:\n  long: {trainer.max_steps: 9, data.init_args.seed: 5}\n"
    (tmp_path / "setups" / "other.yaml").write_text(other)
    content = yaml.safe_load(file.read_text())
    content["scales"] = {"small": {"setup": "other", "tasks": ["one"], "controls": ["other"], "differs": "much"}}
    content["edits"]["forget-{task}"] |= {"vectors": ["{task}__long"], "targets": ["{task}"]}
    file.write_text(yaml.safe_dump(content))
    scale = find_scale(str(file), None)
    assert scale.shared(0)["trainer"]["max_steps"] == 3
    (fit,) = scale.fits([0])
    assert fit.name == "one__long"
    assert fit.changes["trainer"]["max_steps"] == 9
    assert fit.changes["data"]["init_args"]["seed"] == 5
    (edit,) = scale.edits([0])
    assert edit.config["targets"]["one"]["init_args"]["seed"] == 1
    content["edits"]["forget-{task}"]["vectors"] = ["{task}__lnog"]
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="has no variant 'lnog'.* Did you mean 'long'"):
        find_scale(str(file), None).fits([0])
    (tmp_path / "setups" / "other.yaml").write_text("like: other")
    with pytest.raises(ValueError, match="found other -> other"):
        find_scale(str(file), None)


def test_a_folder_is_needed_only_where_the_tasks_read_one():
    assert not find_scale("forgetting-images", "b32").needs_data_root
    assert find_scale("kings-and-queens", "b32").needs_data_root


def test_a_row_may_name_any_metric_of_a_task(made):
    (first, *_) = find_made(made[1], find_scale(str(made[0]), None))
    task = next(name for name, entry in first.content["tasks"].items() if entry["role"] == "target")
    entry = first.content["tasks"][task]
    for model in ("base", "edited", "random"):
        assert quantity(f"{task}/{entry['metric']}.{model}", first.content) == entry[model]["value"]
    assert quantity(f"{task}/nothing.edited", first.content) is None
    assert quantity("nobody/loss.edited", first.content) is None
    with pytest.raises(ValueError, match="TASK/METRIC.MODEL"):
        quantity("one/accuracy.finetuned", first.content)


def test_list_and_plan_read_no_network(capsys):
    main(["paper", "list", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert {"forgetting-images", "adding-images"} <= {row["experiment"] for row in listed}
    main(["paper", "plan", "forgetting-images", "--scale", "l14", "--json"])
    (planned,) = json.loads(capsys.readouterr().out)
    assert planned["fits"] == {"new": 48}  # eight tasks, and gradient ascent on each, three seeds
    assert planned["download_bytes"]["model"] > 10**9
    assert planned["unpinned"] == sorted(planned["tasks"])
    main(["paper", "plan", "analogy-sentiment", "--scale", "t5-small"])
    assert "unpinned, as the hub has them now: google-t5/t5-small, amazon_polarity, yelp_polarity" in printed(capsys)


def printed(capsys):
    return " ".join(capsys.readouterr().out.split())


PAGE = (Path(__file__).parents[2] / "docs/howto/paper.md").read_text()


def test_the_commands_of_the_page_name_experiments_that_exist(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(paper__run, "run_scale", lambda scale, *_: [])
    monkeypatch.setenv("TVA_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    lines = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]
    assert len(lines) >= 7
    for line in lines:
        words = shlex.split(os.path.expandvars(line), comments=True)
        assert words[:2] == ["tva", "paper"]
        if words[2] != "table":
            main(words[1:])
        else:
            assert not set(words[3:]) - {"--check", "--figures", *list_experiments()}


def test_the_experiment_of_the_page_is_one(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text(re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)[0])
    main(["paper", "plan", str(tmp_path / "mine.yaml"), "--json"])
    assert json.loads(capsys.readouterr().out)[0]["fits"] == {"new": 6}


def test_figures_are_drawn_of_curves_pairs_and_cosines(made, tmp_path):
    _, output, _, _ = made
    scale = find_scale(str(made[0]), None)
    (first, *_) = find_made(output, scale)
    content = json.loads(json.dumps(first.content))
    tasks = {"a": {"role": "target", "metric": "accuracy", "finetuned": {"value": 0.8}}}
    tasks["b"] = tasks["a"]
    evaluations = [
        {"model": "edited", "coefficients": {"scaling_coef": coef}, "task": task, "split": "val", "metric": "accuracy"}
        | {"num_examples": 5, "value": 0.4 + coef / 2}
        for coef in (0.5, 1.0)
        for task in "ab"
    ]
    content |= {"tasks": tasks, "evaluations": evaluations}
    content["diagnostics"] = {
        "pairs": {"rows": {"a + b": {"a": 0.4, "b": 0.6}}},
        "cosine": {"rows": {"a": {"a": 1.0, "b": 0.25}, "b": {"a": 0.25, "b": 1.0}}},
    }
    drawn = [dataclasses.replace(first, content=content)]
    assert pair_rows(drawn) == [{"pair": "a + b", "first": pytest.approx(0.5), "second": pytest.approx(0.75)}]
    assert [row["value"] for row in curve_rows(drawn)] == pytest.approx([0.65, 0.9, 0.65, 0.9])
    files = write_figures(tmp_path, dict(figures_of(scale, drawn)))
    assert sorted(file.suffix for file in files) == [".png"] * 3 + [".svg"] * 3
    cosines = next(file for file in files if file.name.endswith("cosines.svg")).read_text()
    assert ">0.25<" in cosines
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files if file.suffix == ".png")


def test_seeds_without_all_edits_or_numbers_are_left_out_and_named(made, tmp_path, capsys):
    file, output, _, _ = made
    edits = tmp_path / "out/blobs/small"

    def rows():
        main(["paper", "table", str(file), "--output", str(tmp_path / "out")])
        return [list(row["seeds"]) for row in json.loads((tmp_path / "out/table.json").read_text())["rows"]]

    shutil.copytree(output, tmp_path / "out")
    report = edits / "forget-one/seed=3/edit/edit.json"
    content = json.loads(report.read_text())
    for entry in content["tasks"].values():
        entry["split"] = "val"  # as where no coefficient is feasible
    report.write_text(json.dumps(content))
    assert rows() == [["4"], ["4"]]
    assert "seed 3 is left out, as 'forget-one' is missing or has no" in capsys.readouterr().out
    shutil.rmtree(edits / "forget-two/seed=4")
    assert rows() == []
    shutil.rmtree(edits / "forget-two/seed=3")  # as after an interruption: no seed has all
    assert rows() == []
    assert "seed 4 is left out, as 'forget-two' is" in capsys.readouterr().out


def test_the_best_part_of_an_analogy_is_that_of_the_best_target():
    def content(higher):
        tasks = {
            "t": {"role": "target", "split": "test", "higher_is_better": higher},
            "c": {"role": "control", "split": "test"},
        }
        rows = {"C": {"t": 0.4, "c": 0.9}, "B − A": {"t": 0.6, "c": 0.1}}
        edit = {"tasks": tasks, "baselines": {"parts": {"rows": rows}}, "feasible": True, "verdict": ""}
        return edit | {"coefficients": {"scaling_coef": 1.0}}

    assert quantity("target.best_part", content(True)) == 0.6
    assert quantity("target.best_part", content(False)) == 0.4
    assert quantity("target.best_part", content(True) | {"baselines": {}}) is None

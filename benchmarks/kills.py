"""Kill commands while they write, and look at what is left: all of the old, or all of the new.

    python -m benchmarks run kills --seeds 0 1 2 3 4 5 [--kills 10] [--only compose]

Each command runs in a fork that counts its calls of write, rename, fsync and the like, and kills itself (SIGKILL) at a
random one of them; every second time the output of another such command is there before. Afterwards no file under a
final name may be other than before or after the whole command (an edit's undo file may still have its hidden name,
where `tva revert` finds it), the same command (with --resume, where it has that) must give the same tensors, and
nothing hidden may be left after it.
"""

import collections
import contextlib
import io
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.attacks import trial
from benchmarks.ledger import markdown

JOBS = ("fit", "compose", "compose folder", "extract", "edit", "revert")
OPTIONS = {"kills": 10, "only": ""}  # of each command; one of JOBS
DEPENDS = ("benchmarks/kills.py", "tva/checkpoints", "tva/compose", "tva/vectors", "tva/edit", "callbacks")
CALLS = ("pwrite", "write", "replace", "rename", "unlink", "fsync", "fdatasync", "ftruncate", "posix_fallocate", "link")
CALLS += ("open", "mkdir", "rmdir", "close", "symlink")
FOUND = ("killed", "old", "new", "new, page not drawn", "new, undo file hidden", "part", "other", "unsound")
FOUND += ("made again", "hidden files left")
Words = Sequence[str]


def earlier(name: str, words: Words) -> Words | None:
    """Return the command whose output is there before, if the output may be."""
    changes = {"compose": ("ties(a)", "a"), "extract": ("tuned.safetensors", "other.safetensors")}
    changes["edit"] = ("edit.yaml", "earlier.yaml")
    old, new = changes.get(name, ("", ""))
    return [new if word == old else word for word in words] if new else None


def words_of(name: str) -> tuple[Words, Words, tuple[str, ...], Callable[[str], bool]]:
    """Return a command, the one that goes on where it was killed, what it writes, and which of that is compared."""
    compose = ["compose", "--base", "base.safetensors", "--vectors.a", "a.tv.safetensors", "--recipe", "ties(a)"]
    both = "out.safetensors", "out.undo.safetensors"
    if name == "compose":
        words = [*compose, "--output", "out.safetensors", "--keep_undo"]
        return words, [*words, "--resume"], both, lambda file: True
    if name == "compose folder":
        words = [*compose, "--output", "made", "--max_shard_size", "30kB"]
        return words, [*words, "--resume"], ("made",), lambda file: True
    if name == "extract":
        words = ["extract", "--base", "base.safetensors", "--finetuned", "tuned.safetensors", "--output"]
        return [*words, "v.tv.safetensors"], [*words, "v.tv.safetensors"], ("v.tv.safetensors",), lambda file: True
    if name == "revert":
        words = ["revert", "edited.safetensors", "--output", "back.safetensors"]
        return words, [*words, "--resume"], ("back.safetensors",), lambda file: True
    if name == "edit":
        words = ["edit", "--config", "edit.yaml"]
        return words, words, ("run",), lambda file: file in ("edited.safetensors", "edited.undo.safetensors")
    words = ["fit", "--config", "fit.yaml"]
    return words, words, ("fit",), lambda file: False


EDIT = """
model: {class_path: benchmarks.attacks.good.Net}
vectors: {n: n.tv.safetensors}
recipe: n
output: run
maximize: one/accuracy
search: {class_path: tva.search.Grid, init_args: {num: 3}}
targets: {one: {class_path: benchmarks.attacks.good.Blobs, init_args: {seed: 1}}}
keep_undo: true
"""
FIT = """
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: fit
  callbacks:
  - {class_path: tva.callbacks.TaskVectorCallback}
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {dirpath: fit, filename: last, enable_version_counter: false}
model: {class_path: benchmarks.attacks.good.Net}
data: {class_path: benchmarks.attacks.good.Blobs, init_args: {seed: 1}}
"""


def make(folder: Path) -> None:
    """Make inputs of some hundred kilobytes, so that there is something to write."""
    from benchmarks.attacks.good import Net, moved
    from tva import save_weights
    from tva.cli.main import main as tva

    folder.mkdir(parents=True)
    os.chdir(folder)
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{at}.weight": torch.randn(64, 64, generator=generator) for at in range(12)}
    save_weights(base, "base.safetensors")
    save_weights(moved(base, 0.1, 1), "tuned.safetensors")
    save_weights(Net().state_dict(), "net_base.safetensors")
    save_weights(moved(Net().state_dict(), 0.3, 3), "net.safetensors")
    extract = ["extract", "--base", "base.safetensors", "--finetuned", "tuned.safetensors", "--output"]
    tva([*extract, "a.tv.safetensors"])
    tva(["extract", "--base", "net_base.safetensors", "--finetuned", "net.safetensors", "--output", "n.tv.safetensors"])
    compose = ["compose", "--base", "base.safetensors", "--vectors.a", "a.tv.safetensors", "--recipe", "a"]
    tva([*compose, "--output", "edited.safetensors", "--keep_undo"])
    save_weights(moved(base, 0.1, 2), "other.safetensors")
    Path("edit.yaml").write_text(EDIT)
    Path("earlier.yaml").write_text(EDIT.replace("recipe: n", "recipe: 0.5 * n"))
    Path("fit.yaml").write_text(FIT)


@contextlib.contextmanager
def killed_at(number: int) -> Iterator[list[int]]:
    """Count calls that change files, and kill this process before one of them."""
    count = [0]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return counting

    before = {name: getattr(os, name) for name in CALLS}
    for name, call in before.items():
        setattr(os, name, counted(call))
    try:
        yield count
    finally:
        for name, call in before.items():
            setattr(os, name, call)


def in_fork(words: Words, number: int = 0) -> tuple[int, int]:
    """Run a command in a fork; return how it ended, and how many calls that change files it made."""
    from tva.cli.main import main as tva

    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        status = 0
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                with killed_at(number) as count:
                    tva(list(words))
            except SystemExit as ended:
                status = ended.code if isinstance(ended.code, int) else 1
            except BaseException:
                status = 99
        os.write(writer, str(count[0]).encode().rjust(9) + said.getvalue()[-900:].encode())
        os._exit(status)
    os.close(writer)
    said = b""
    while part := os.read(reader, 4096):
        said += part
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if status not in (0, signal.SIGKILL):
        print(said[9:].decode())
    return status, int(said[:9] or 0)


def digests(names: Sequence[str], compared: Callable[[str], bool]) -> dict[str, str]:
    """Hash what is there under final names: the tensors of weights; of other files, which hold times, only the name."""
    from tva import fingerprint, open_weights

    found = {}
    for name in names:
        path = Path(name)
        files = (
            [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
        )
        for file in (file for file in files if not file.name.startswith(".")):
            weights = file.suffix == ".safetensors" and compared(file.name)
            found[str(file)] = fingerprint(open_weights(file)).digest if weights else ""
    return found


def is_sound(name: str) -> str:
    """Check what a killed fit or edit left; return what is wrong."""
    from tva import TaskVector, open_weights
    from tva.compose.verify import verify
    from tva.edit.runs import read_report

    for file in Path(name).rglob("*.safetensors") if Path(name).is_dir() else ():
        if not file.name.startswith("."):
            TaskVector.load(file) if file.name.endswith(".tv.safetensors") else open_weights(file)
    for file in Path(name).rglob("*.ckpt") if name == "fit" else ():
        torch.load(file, weights_only=False)
    if name == "run" and Path("run").exists():
        read_report(Path("run"))
        if not verify("run", base="net_base.safetensors").holds:
            return "the record does not hold"
        if not Path("run/edited.undo.safetensors").exists():
            return "the undo file is gone"
    return ""


def hidden_files() -> list[str]:
    """Return what has a hidden name, here and one folder deeper."""
    return [str(path) for pattern in (".*", "*/.*") for path in Path().glob(pattern)]


def state_of(left: Mapping[str, str], before: Mapping[str, str], whole: Mapping[str, str]) -> str:
    """Name what is there after a kill."""
    if left in (before, whole):
        return "old" if left == before else "new"
    if {**left, "run/report.html": ""} == whole:
        return "new, page not drawn"  # it comes last; `tva report` draws it
    undo = "out.undo.safetensors"
    if {**left, undo: ""} == {**whole, undo: ""} and in_fork(["revert", "out.safetensors", "--output", "back"])[0] == 0:
        shutil.rmtree("back")
        return "new, undo file hidden"
    return "other" if {file for file, digest in left.items() if whole.get(file) != digest} else "part"


def attack(name: str, kills: int, rng: random.Random) -> collections.Counter:
    """Kill one command many times; return what was found."""
    words, again, outputs, compared = words_of(name)
    found: collections.Counter = collections.Counter()
    inputs = set(os.listdir())

    def clear() -> None:
        for left in set(os.listdir()) - inputs:
            shutil.rmtree(left) if Path(left).is_dir() else Path(left).unlink()

    status, calls = in_fork(words)
    if status:
        raise RuntimeError(f"{name} ended with {status}")
    whole = digests(outputs, compared)
    for kill in range(kills):
        clear()
        before: dict[str, str] = {}
        if kill % 2 and (first := earlier(name, words)):
            in_fork(first)
            before = digests(outputs, compared)
        status, _ = in_fork(words, rng.randrange(1, calls + 1))
        found["killed"] += status == signal.SIGKILL
        left = digests(outputs, compared)
        if name == "fit":
            found["other"] += bool(is_sound("fit"))
        else:
            state = state_of(left, before, whole)
            found[state] += 1
            if state not in ("part", "other") and left and name == "edit" and (wrong := is_sound("run")):
                print(name, kill, wrong)
                found["unsound"] += 1
            if state in ("part", "other"):
                print(name, kill, state, sorted(left.items() ^ whole.items())[:4])
        if name == "compose folder" and left == whole:
            continue
        status, _ = in_fork(again)
        same = digests(outputs, compared) == whole if name != "fit" else not is_sound("fit")
        found["made again"] += status == 0 and same
        if status or not same:
            print(name, kill, "again:", status, sorted(digests(outputs, compared).items() ^ whole.items())[:4])
        hidden = hidden_files()
        found["hidden files left"] += len(hidden)
        if hidden:
            print(name, kill, "left", hidden)
    return found


def measure(seed: int, kills: int, only: str) -> dict[str, Any]:
    """Kill each command; return what was found, by command."""
    import tva.cli.lightning  # noqa: F401  so that forks do not
    from tva.merge import kernels

    torch.set_num_threads(1)
    kernels.load()
    found = {}
    with trial.workplace() as folder:
        trial.in_fork(lambda: make(folder / "work"))
        os.chdir(folder / "work")
        for job in (only,) if only else JOBS:
            found[job] = dict(attack(job, kills, random.Random(f"{seed}/{job}")))
            print(f"{job}: {', '.join(f'{count} {name}' for name, count in sorted(found[job].items()))}", flush=True)
    return found


def tables(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return the counts of all seeds by command."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for run in runs.values():
        for job, found in run.items():
            counts[job].update(found)
    shown = list(dict.fromkeys(name for name in FOUND if any(found[name] for found in counts.values())))
    rows = [[job, *(str(found.get(name, 0)) for name in shown)] for job, found in counts.items()]
    never = ", ".join(name for name in FOUND if name not in shown)
    return {"found": markdown(["command", *shown], rows), "never": f"Never: {never}."}

"""Hostile inputs of every kind, made from sound files and a seed."""

import contextlib
import functools
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.attacks.mutate import (
    DEEP,
    ODD,
    TEXTS,
    archive,
    change_archive,
    mutate_bytes,
    mutate_json,
    mutate_object,
    mutate_pickle,
    read_header,
    reseal,
    unpickled,
    write_safetensors,
)
from benchmarks.attacks.trial import MARK, OUT, Input

Words = list[list[str]]
VERIFY = ["verify", OUT]


class Inputs:
    """All inputs; ``scale`` multiplies the numbers of the random ones."""

    def __init__(self, good: Path, scale: float = 1.0) -> None:
        self.good, self.scale = good, scale
        self.base, self.vector = str(good / "base.safetensors"), str(good / "a.tv.safetensors")

    def __iter__(self) -> Iterator[Input]:
        for part in (self.damaged, self.headers, self.places, self.json_files, self.pickles, self.distributed):
            yield from part()
        for part in (self.archives, self.names, self.patterns, self.recipes, self.options, self.yaml, self.reports):
            yield from part()

    def times(self, count: int) -> range:
        return range(round(count * self.scale))

    # --- commands

    def compose(self, *words: str, base: str = "", recipe: str = "x", output: str = OUT) -> list[str]:
        return ["compose", "--base", base or self.base, *words, "--recipe", recipe, "--output", output]

    def as_checkpoint(self, path: str) -> Words:
        other = self.compose("--vectors.a", self.vector, "--allow_other_base", base=path, recipe="a")
        extract = ["extract", "--base", self.base, "--finetuned", path, "--output", "extracted.safetensors"]
        return [["inspect", path], self.compose("--vectors.x", path), VERIFY, other, extract]

    def as_vector(self, path: str) -> Words:
        match = ["vectors", "match", str(self.good / "edited.safetensors"), path, "--base", self.base]
        return [
            ["inspect", path],
            self.compose("--vectors.x", path, recipe="ties(x)"),
            ["vectors", "ls", "."],
            ["compare", path, self.vector],
            ["verify", path],
            ["compress", path, "--encoding", "int8", "--output", OUT],
            match,
        ]

    def as_edited(self, path: str) -> Words:
        return [["verify", path], ["revert", path, "--output", OUT], ["inspect", path]]

    def sources(self) -> dict[str, tuple[str, Callable[[str], Words]]]:
        """Return sound files and folders: what a changed one is called, and which commands read it."""
        names = {"base.safetensors": "given.safetensors", "tuned.pt": "given.pt", "legacy.pt": "given.pt"}
        names |= {"tuned.ckpt": "given.ckpt", "dcp": "given", "zero2": "given", "zero3": "given", "shards": "given"}
        found: dict[str, tuple[str, Callable[[str], Words]]] = {
            source: (name, self.as_checkpoint) for source, name in names.items()
        }
        for encoding in ("a", "int8", "sign", "top_k", "low_rank", "bf16"):
            found[f"{encoding}.tv.safetensors"] = ("given.tv.safetensors", self.as_vector)
        found["lora"] = ("given", lambda path: [self.compose("--vectors.x", path)])
        return found

    def copied(self, source: str, name: str, folder: Path) -> list[Path]:
        """Copy a sound file or folder, and return its files."""
        if (self.good / source).is_file():
            return [Path(shutil.copy(self.good / source, folder / name))]
        shutil.copytree(self.good / source, folder / name)
        return sorted(path for path in (folder / name).rglob("*") if path.is_file())

    # --- kinds

    def damaged(self) -> Iterator[Input]:
        """Bytes of every file."""
        for source, (name, commands) in self.sources().items():
            for number in self.times(60 if source in ("dcp", "zero2", "zero3", "lora", "shards") else 45):

                def make(folder: Path, rng: Random, source: str = source, name: str = name) -> None:
                    file = rng.choice(self.copied(source, name, folder))
                    file.write_bytes(mutate_bytes(file.read_bytes(), rng))

                yield Input("bytes", f"{source} {number}", make, commands(name))
        for number in self.times(80):

            def make_edit(folder: Path, rng: Random, number: int = number) -> None:
                self._edited(folder)
                file = folder / ("given.safetensors" if number % 2 else "given.undo.safetensors")
                file.write_bytes(mutate_bytes(file.read_bytes(), rng))

            yield Input("bytes", f"edited {number}", make_edit, self.as_edited("given.safetensors"))

    def _edited(self, folder: Path) -> None:
        for name in ("", ".undo"):
            shutil.copy(self.good / f"edited{name}.safetensors", folder / f"given{name}.safetensors")
        for name in ("base", "a.tv"):
            shutil.copy(self.good / f"{name}.safetensors", folder)

    def headers(self) -> Iterator[Input]:
        """Headers of safetensors files, sealed again or not."""

        def change(path: Path, rng: Random) -> None:
            header, body = read_header(path)
            focus = rng.random() < 0.6 and "__metadata__" in header
            text = mutate_json(header["__metadata__"] if focus else header, rng)
            text = f"{json.dumps({**header, '__metadata__': 0})[:-2]}{text}}}" if focus else text
            write_safetensors(path, reseal(text) if rng.random() < 0.7 else text, body)

        for source, (name, commands) in self.sources().items():
            if not source.endswith(".safetensors"):
                continue
            for number in self.times(110 if source.startswith("a.") else 70):

                def make(folder: Path, rng: Random, source: str = source, name: str = name) -> None:
                    change(self.copied(source, name, folder)[0], rng)

                yield Input("header", f"{source} {number}", make, commands(name))
        for number in self.times(300):

            def make_edit(folder: Path, rng: Random, number: int = number) -> None:
                self._edited(folder)
                change(folder / ("given.safetensors" if number % 2 else "given.undo.safetensors"), rng)

            yield Input("header", f"edited {number}", make_edit, self.as_edited("given.safetensors"))
        many = {f"t{at}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for at in range(20_000)}
        crafted = {"20,000 tensors": json.dumps(many), "deep": f'{{"a":{DEEP * 20}}}', "list": "[]", "zeros": "\0" * 99}
        for name, text in crafted.items():

            def make_crafted(folder: Path, rng: Random, text: str = text) -> None:
                write_safetensors(folder / "given.safetensors", text)

            yield Input("header", name, make_crafted, self.as_checkpoint("given.safetensors"))

    def places(self) -> Iterator[Input]:
        """Pipes, devices, folders and links in the place of every file."""

        def bent(how: str, file: Path) -> None:
            file.unlink()
            if how == "pipe":
                os.mkfifo(file)
            elif how == "folder":
                file.mkdir()
            elif how == "empty":
                file.touch()
            elif how == "hole":
                with file.open("wb") as made:
                    made.truncate(2**40)
            elif how != "missing":
                file.symlink_to({"loop": file.name}.get(how, how))

        ways = ["pipe", "folder", "empty", "hole", "missing", "loop", "/dev/zero", "/dev/random", "/dev/tty", "/etc"]
        for source, (name, commands) in self.sources().items():
            found = self.good / source
            files = sorted(p for p in found.rglob("*") if p.is_file()) if found.is_dir() else [found]
            for file in files:
                for how in ways:

                    def make(
                        folder: Path,
                        rng: Random,
                        source: str = source,
                        name: str = name,
                        at: int = files.index(file),
                        how: str = how,
                    ) -> None:
                        bent(how, self.copied(source, name, folder)[at])

                    yield Input("place", f"{source}: {file.name} {how}", make, commands(name), ("given", ". holds"))

    def json_files(self) -> Iterator[Input]:
        """JSON and text beside weights, and journals."""
        for file in ("lora/adapter_config.json", "shards/model.safetensors.index.json", "shards/config.json"):
            source, _, inside = file.partition("/")
            commands = self.sources()[source][1]("given")
            if inside == "config.json":
                words = self.compose(
                    "--vectors.a", self.vector, "--dtype", "bfloat16", "--allow_other_base", base="given", recipe="a"
                )
                commands = [[*words[:-1], "made"]]
            for number in self.times(150):

                def make(folder: Path, rng: Random, source: str = source, inside: str = inside) -> None:
                    self.copied(source, "given", folder)
                    path = folder / "given" / inside
                    path.write_text(mutate_json(json.loads(path.read_text()), rng))

                yield Input("JSON", f"{file} {number}", make, commands)
        for text in TEXTS:
            if "\0" not in text and text != DEEP:

                def make_latest(folder: Path, rng: Random, text: str = text) -> None:
                    self.copied("zero2", "given", folder)
                    (folder / "given/latest").write_text(text)

                yield Input("JSON", f"latest {text[:20]!r}", make_latest, self.as_checkpoint("given")[:2])
        job = {"base": "x", "recipe": "x"}
        for number in self.times(60):

            def make_journal(folder: Path, rng: Random) -> None:
                lines = [mutate_json(job, rng), mutate_json(["w", {"edited": "0"}], rng)]
                (folder / ".given.safetensors.journal").write_text("\n".join(lines) + "\n")
                (folder / ".given.safetensors.partial").write_bytes(b"x" * 100)

            words = self.compose("--vectors.x", self.vector, output="given.safetensors")
            yield Input("JSON", f"journal {number}", make_journal, [[*words, "--resume"]])

    def _in_containers(self, pickled: bytes) -> Iterator[tuple[str, Callable[[Path, Random], Any], Words]]:
        def inside(source: str, path: str, data: bytes) -> Callable[[Path, Random], Any]:
            return lambda folder, rng: (
                self.copied(source, "given", folder),
                (folder / "given" / path).write_bytes(data),
            )

        zipped = archive(pickled)
        for name, data in (("given.pt", zipped), ("raw given.pt", pickled), ("given.ckpt", zipped)):
            file = name.split()[-1]
            yield name, _writes(file, data), self.as_checkpoint(file)[:2]
        yield ".metadata", inside("dcp", ".metadata", pickled), self.as_checkpoint("given")[:2]
        yield ".distcp", inside("dcp", "__0_0.distcp", zipped), self.as_checkpoint("given")[:2]
        states = "global_step3/mp_rank_00_model_states.pt"
        yield "model states", inside("zero2", states, zipped), self.as_checkpoint("given")[:2]
        states = "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt"
        yield "optimizer states", inside("zero3", states, zipped), self.as_checkpoint("given")[:2]

        def adapter(folder: Path, rng: Random) -> None:
            self.copied("lora", "given", folder)
            (folder / "given/adapter_model.safetensors").unlink()
            (folder / "given/adapter_model.bin").write_bytes(zipped)

        yield "adapter_model.bin", adapter, [self.compose("--vectors.x", "given")]

    def pickles(self) -> Iterator[Input]:
        """Pickles that would run code, never end, take all memory or are nonsense, wherever pickles are read."""
        crafted = dict(payloads())
        for name, pickled in crafted.items():
            for place, make, commands in self._in_containers(pickled):
                yield Input("pickle", f"{name} as {place}", make, commands)
        snippets = [pickled.removeprefix(b"\x80\x02").removesuffix(b".") for pickled in crafted.values()]
        snippets = [snippet for snippet in snippets if len(snippet) < 200] + _OPCODES
        for number in self.times(500):
            rng = Random(f"{number} opcodes")
            parts = rng.choices(snippets, k=rng.randrange(2, 40))
            pickled = b"\x80" + bytes([rng.randrange(6)]) + b"".join(parts) + b"."
            places = list(self._in_containers(pickled))
            place, make, commands = places[number % len(places)]
            yield Input("pickle", f"random {number} as {place}", make, commands)
        for number in self.times(300):

            def changed(folder: Path, rng: Random, number: int = number) -> None:
                source = ("tuned.pt", "tuned.ckpt")[number % 2]
                change_archive(self.good / source, folder / "given.pt", lambda data: mutate_pickle(data, rng, snippets))

            yield Input("pickle", f"changed {number}", changed, self.as_checkpoint("given.pt")[:2])

    def distributed(self) -> Iterator[Input]:
        """Parts of distributed checkpoints that hold other values."""
        odd = [*ODD, torch.Size([2**40]), (1, 2), torch.float16, torch.ones(2), (-1,), (2**62, 4), b"x", {1: 2}]
        for number in self.times(250):

            def metadata(folder: Path, rng: Random) -> None:
                self.copied("dcp", "given", folder)
                path = folder / "given/.metadata"
                path.write_bytes(_saved(unpickled(path), rng, odd, pickle.dumps))

            yield Input("distributed", f"DCP {number}", metadata, self.as_checkpoint("given")[:3])
        for number in self.times(300):

            def states(folder: Path, rng: Random, number: int = number) -> None:
                files = self.copied(f"zero{2 + number % 2}", "given", folder)
                path = rng.choice([file for file in files if file.suffix == ".pt"])
                saved = torch.load(path, weights_only=False)
                path.write_bytes(_saved(saved, rng, odd, _torch_saved))

            yield Input("distributed", f"ZeRO {number}", states, self.as_checkpoint("given")[:3])
        for rank in ("1000000000", "-1", "x", "9" * 100):

            def ranks(folder: Path, rng: Random, rank: str = rank) -> None:
                self.copied("zero3", "given", folder)
                inside = folder / "given/global_step3"
                name = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
                shutil.copy(inside / name.format(0), inside / name.format(rank))

            yield Input("distributed", f"rank {rank[:12]}", ranks, self.as_checkpoint("given")[:2])

    def archives(self) -> Iterator[Input]:
        """Zip archives that inflate, repeat, are compressed or cut."""

        def bomb(folder: Path, rng: Random, name: str, mib: int) -> None:
            with zipfile.ZipFile(folder / "given.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made:
                if name != "data.pkl":
                    made.writestr("m/data.pkl", pickle.dumps({}))
                with made.open(f"m/{name}", "w", force_zip64=True) as member:
                    for _ in range(mib):
                        member.write(b"\0" * 2**20)

        for name in ("data.pkl", "byteorder", "version", "data/0"):
            make = functools.partial(bomb, name=name, mib=1500)
            yield Input("archive", f"{name} of 1.5 GB", make, self.as_checkpoint("given.pt")[:2])
        for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
            for number in self.times(40):

                def make(folder: Path, rng: Random, compression: int = compression, number: int = number) -> None:
                    made = folder / "given.pt"
                    change_archive(self.good / "tuned.pt", made, lambda data: data, compression=compression)
                    if number:
                        made.write_bytes(mutate_bytes(made.read_bytes(), rng))

                yield Input("archive", f"compression {compression} {number}", make, self.as_checkpoint("given.pt")[:2])
        members = {f"data__{at}": b"" for at in range(60_000)}
        whole = {"60,000 members": archive(pickle.dumps({}), **members), "nothing": archive(b"")}
        for name, data in whole.items():
            yield Input("archive", name, _writes("given.pt", data), self.as_checkpoint("given.pt")[:2])

    def names(self) -> Iterator[Input]:
        """Tensors with names that mean something to terminals, markup, folders or people."""
        hostile = [*TEXTS, "../../etc/passwd", "[red]", "[/]", "a.b." * 500, "x" * 60_000, "'; touch x", "=1+1"]
        for name in [*hostile, "\ud800"]:

            def make(folder: Path, rng: Random, name: str = name) -> None:
                for file, add in (("given.safetensors", 0.0), ("given_tuned.safetensors", 1.0)):
                    header, body = read_header(Path(self.base))
                    header[name] = {"dtype": "F32", "shape": [4], "data_offsets": [len(body), len(body) + 16]}
                    write_safetensors(folder / file, header, body + struct.pack("<4f", 1, 2, 3, 4 + add))

            words = self.compose("--vectors.x", "given_tuned.safetensors", base="given.safetensors")
            vector = "given.tv.safetensors"
            extract = ["extract", "--base", "given.safetensors", "--finetuned", "given_tuned.safetensors", "--output"]
            commands = [
                [*extract, vector],
                [*words, "--plan"],
                words,
                VERIFY,
                ["inspect", "given.safetensors", "--by", "tensor"],
                ["inspect", vector, "--by", "tensor"],
                ["compare", vector, vector, "--by", "tensor"],
                ["vectors", "ls", "."],
            ]
            yield Input("name", repr(name[:20]), make, commands, named=("given", "vectors"))

    def patterns(self) -> Iterator[Input]:
        """Regular expressions that backtrack, wherever one is taken."""

        def make(folder: Path, rng: Random) -> None:
            for file, add in (("given.safetensors", 0.0), ("given_tuned.safetensors", 1.0)):
                body, header = b"", {}
                for name in ("a" * 50 + "c.weight", "layers.0.weight", "x" * 3000):
                    offsets = [len(body), len(body) + 16]
                    header[name] = {"dtype": "F32", "shape": [2, 2], "data_offsets": offsets}
                    body += struct.pack("<4f", 1, 2, 3, 4 + add)
                write_safetensors(folder / file, header, body)

        crafted = ["(a|a|aa)+b", "(a+)+$", "(.*)*(.*)*(.*)*y", "((a+)+)+b", "(a|a)*b", "a*a*a*a*a*a*a*a*b", "(x+x+)+y"]
        crafted += ["(.*a){25}b", "(?:a?){50}a{50}b", ".*.*.*.*.*.*=", "(", "[", "*", "(?P<a>", "a{99999999}"]
        crafted += ["(?R)", "\\"]
        crafted += ["(a{0,40}){0,40}b", "(?=(a+)+b)", "(a)(\\1)*b", "(?:(?:a+)+)+b", "[", "(?i)(A+)+b", "(?x) (a +)+ b"]
        for pattern in [*crafted, *(_pattern(Random(f"{number} pattern")) for number in self.times(40))]:
            tuned = "given_tuned.safetensors"
            words = self.compose("--vectors.x", tuned, base="given.safetensors")
            groups = json.dumps({pattern: 1, ".*": 0.5})
            coefs = self.compose("--vectors.x", tuned, "--coefs.s", groups, base="given.safetensors", recipe="s * x")
            recipe = f"tsv(x, x, exclude={pattern!r})"
            commands = {
                "include": [*words, "--include", pattern],
                "exclude": [*words, "--exclude", json.dumps([pattern])],
                "key_map": [*words, "--key_map", json.dumps({pattern: "b"})],
                "coefs": coefs,
                "option": self.compose("--vectors.x", tuned, base="given.safetensors", recipe=recipe),
            }
            for option, command in commands.items():
                named = ("given", option, "coef", "names", "exclude", "against the base")
                yield Input("pattern", f"{option} {pattern[:40]}", make, [command], named)

            def adapter(folder: Path, rng: Random, pattern: str = pattern) -> None:
                self.copied("lora", "given", folder)
                path = folder / "given/adapter_config.json"
                config = json.loads(path.read_text())
                for key in ("rank_pattern", "alpha_pattern"):
                    config[key] = {pattern: 4}
                path.write_text(json.dumps({**config, "target_modules": pattern, "layers_pattern": pattern}))

            yield Input("pattern", f"adapter {pattern[:40]}", adapter, [self.compose("--vectors.x", "given")])

    def recipes(self) -> Iterator[Input]:
        """Recipes: nonsense of the grammar's words, and very long ones."""
        words = [*"abc()+-*/", "0.5", "1e999", "nan", ",", "ties", "dare(", "mean(", "a.b", "density=", "seed="]
        words += [*"02[]{}", "'x'", '"', "__class__", "lambda", "**", "//", "%", "@", f"os.system('touch {MARK}')"]
        words += ["tsv(", "slerp(", "fisher(", "breadcrumbs(", "None", *"=\n:∞"]
        texts = ["(" * 10_000 + "a" + ")" * 10_000, "-" * 100_000 + "a", "+".join(["a"] * 20_000), "a" * 10**6]
        texts += ["2*" * 900 + "a", "a." + "b." * 50_000 + "c", "9" * 5000 + "*a", "ties(" * 200 + "a" + ")" * 200]
        texts += ["", "\0", "fisher(a, statistics='/dev/zero')", "ties(a, density={[]: 1})", "a if a else a"]
        texts += ["a" + "\u0301" * 1000, f"__import__('os').system('touch {MARK}')", "os.system(a)"]
        texts += ["subprocess.Popen(a)", "tva.cli.main.main(a)"]
        for number in self.times(500):
            rng = Random(f"{number} recipe")
            texts.append(" ".join(rng.choices(words, k=rng.randrange(1, 20))))
        for text in texts:
            command = self.compose("--vectors.a", self.vector, "--vectors.b", str(self.good / "b.tv.safetensors"))
            command[command.index("--recipe") : command.index("--recipe") + 2] = [f"--recipe={text}"]
            named = ("recipe", "vector", "method", "expression", "allowed", "option", "\n  ")
            yield Input("recipe", repr(text[:40]), lambda folder, rng: None, [command, VERIFY], named)

    def options(self) -> Iterator[Input]:
        """Values of options."""
        texts = [text for text in TEXTS if "\0" not in text] + [json.dumps(v) for v in ODD if not isinstance(v, str)]
        texts += ["-5", "0", "1e9GB", "9" * 400 + "GB", "1e308", "{", '{"(": 1}', '{".*": []}', '{".*": null}']
        for option in ("scaling_coef", "max_memory", "max_shard_size", "dtype", "which", "key_map", "coefs.s", "coefs"):
            for text in texts:
                recipe = "s*a" if "coefs" in option else "a"
                command = [*self.compose("--vectors.a", self.vector, recipe=recipe), f"--{option}={text}"]
                named = ("recipe", "vector", "out", "given", "nfinite", "coefficient", "the options")
                named += (option.split(".")[0].removesuffix("s"),)
                yield Input("option", f"{option} {text[:20]!r}", lambda folder, rng: None, [command, VERIFY], named)

    def yaml(self) -> Iterator[Input]:
        """Configurations: aliases, tags, depth, other encodings, and random damage."""
        laughs = "a: &a [x,x,x,x,x,x,x,x,x]\n"
        for at in range(9):
            laughs += f"{'bcdefghij'[at]}: &{'bcdefghij'[at]} [{','.join(['*' + 'abcdefghij'[at]] * 9)}]\n"
        inner = "".join(f"  {line}\n" for line in laughs.splitlines())
        compose = f"base: {self.base}\nrecipe: a\noutput: {OUT}\nvectors: {{a: {self.vector}}}\n"
        crafted = {"laughs": laughs, "laughs in vectors": f"base: x\nrecipe: a\noutput: o\nvectors:\n{inner}"}
        crafted |= {"merge": compose + "coefs: &c {a: 1}\nx: {<<: [*c, *c]}\n", "self": "a: &a [*a]\nbase: *a\n"}
        crafted |= {"laughs in coefs": compose + f"coefs:\n{inner}", "deep": "[" * 2000, "long": compose + "#" * 10**6}
        crafted |= {"deep map": "".join(" " * n + "a:\n" for n in range(1500)), "digits": "base: " + "9" * 10**5}
        for tag in ("object/apply:os.system ['touch EXECUTED']", "name:os.system", "module:os", "object:builtins.list"):
            crafted[tag] = f"base: !!python/{tag}\n"
        crafted["bytes"] = "base: \x00\x01"
        commands = [[command, "--config", "given.yaml"] for command in ("compose", "edit", "extract", "report")]
        for name, text in crafted.items():
            named = ("given", "base", "vectors", "coefs", "runs")
            yield Input("YAML", name, _writes("given.yaml", text.encode()), commands, named)
        for number in self.times(150):

            def random(folder: Path, rng: Random) -> None:
                (folder / "given.yaml").write_bytes(mutate_bytes(compose.encode(), rng))

            named = ("given", "base", "recipe", "output", "vectors", "expected at")
            yield Input("YAML", f"random {number}", random, commands[:1], named)

    def reports(self) -> Iterator[Input]:
        """Reports of edits, and the log of their evaluations."""
        commands = [["report", "given"], ["push", "given", "me/x", "--dry_run"]]
        for number in self.times(400):

            def make(folder: Path, rng: Random) -> None:
                self.copied("run", "given", folder)
                path = folder / "given/edit.json"
                path.write_text(mutate_json(json.loads(path.read_text()), rng))

            yield Input("edit.json", str(number), make, commands)


_OPCODES = [
    b"N",
    b"\x88",
    b"K\x05",
    b"J\xff\xff\xff\xff",
    b"]",
    b"}",
    b")",
    b"(",
    b"0",
    b"1",
    b"2",
    b"a",
    b"e",
    b"s",
    b"u",
]
_OPCODES += [bytes([code]) for code in b"t\x85\x86\x87\x8f\x90\x91Rbo\x81\x92\x94Q"]
_OPCODES += [b"h\x00", b"q\x00", b"h\x01", b"X\x03\x00\x00\x00abc", b"C\x02ab", b"\x8c\x01w", b"\x97", b"\x98"]
_OPCODES += [b"G" + b"\0" * 8, b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"]
_OPCODES += [b"ctorch\nFloatStorage\n", b"\x93"]


def _torch_saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _saved(value: Any, rng: Random, odd: list[Any], save: Callable[[Any], bytes]) -> bytes:
    """Mutate an object until the result can be written."""
    while True:
        with contextlib.suppress(AttributeError, TypeError, RecursionError, RuntimeError, ValueError):
            return save(mutate_object(value, rng, odd))


def _writes(name: str, data: bytes) -> Callable[[Path, Random], Any]:
    return lambda folder, rng: (folder / name).write_bytes(data)


def payloads() -> Iterator[tuple[str, bytes]]:
    """Yield pickles by what they would do."""

    def text(word: bytes) -> bytes:
        return b"\x8c" + bytes([len(word)]) + word

    def twice(at: int) -> bytes:
        return 2 * (b"h" + bytes([at]))

    touch = f"touch {MARK}".encode()
    for module, name in ((b"posix", b"system"), (b"os", b"system"), (b"subprocess", b"getoutput")):
        yield (
            f"{module.decode()}.{name.decode()}",
            b"\x80\x04" + text(module) + text(name) + b"\x93" + text(touch) + b"\x85R.",
        )
        yield f"old {module.decode()}.{name.decode()}", b"c" + module + b"\n" + name + b"\n(S'" + touch + b"'\ntR."
    code = f"open({MARK!r}, 'w')".encode()
    for name in (b"eval", b"exec", b"__import__"):
        yield name.decode(), b"\x80\x04" + text(b"builtins") + text(name) + b"\x93" + text(code) + b"\x85R."
    yield "inst", b"(S'" + touch + b"'\niposix\nsystem\n."
    yield "obj", b"(cposix\nsystem\nS'" + touch + b"'\no."
    yield "torch.load", b"ctorch\nload\n(S'x'\ntR."
    yield "extension", b"\x80\x02\x82\x01."
    yield "dotted", b"\x80\x04" + text(b"torch") + text(b"serialization.os.system") + b"\x93" + text(touch) + b"\x85R."
    yield "memo of 2**31", b"\x80\x02Nr\xff\xff\xff\x7f."
    yield "text of 2**40", b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc."
    yield "bytearray of 2**31", b"\x80\x05\x96" + struct.pack("<Q", 2**31) + b"abc."
    yield "bytes of 2**62", b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"."
    yield "frame of 2**62", b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N."
    yield "deep tuple", b"\x80\x02N" + b"\x85" * 2_000_000 + b"."
    yield "deep tuple as a key", b"\x80\x02}N" + b"\x85" * 9_000 + b"Ns."
    yield "deep lists", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    yield "deep dicts", b"\x80\x02" + b"}K\x01" * 50_000 + b"N" + b"s" * 50_000 + b"."
    yield "list in itself", b"\x80\x02]q\x00h\x00a."
    yield "dict in itself", b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."
    lists = b"".join(b"]q" + bytes([at + 1]) + b"(" + twice(at) + b"e" for at in range(200))
    yield "lists of 2**200", b"\x80\x02]q\x00" + lists + b"."
    for levels in (12, 27, 60):
        tuples = b"".join(twice(at) + b"\x86q" + bytes([at + 1]) for at in range(levels))
        yield f"a key of 2**{levels}", b"\x80\x02Nq\x00" + tuples + b"}h" + bytes([levels]) + b"Ns."
        yield f"frozenset of 2**{levels}", b"\x80\x04Nq\x00" + tuples + b"(h" + bytes([levels]) + b"\x91."
    yield "an integer of 16 MB", b"\x80\x02\x8b" + struct.pack("<i", 2**24) + b"\x01" * 2**24 + b"."
    yield "an integer of 200,000 digits", b"I" + b"9" * 200_000 + b"\n."
    yield "unhashable key", b"\x80\x02}]Ns."
    for name, data in {"empty": b"", "stop": b".", "no stop": b"\x80\x02N", "bytes": bytes(range(256))}.items():
        yield name, data
    for module, name in (("collections", "OrderedDict"), ("torch", "Size"), ("builtins", "set"), ("torch", "float32")):
        state = b"}X\x05\x00\x00\x00__xx_K\x01sb."
        yield f"state of {name}", f"c{module}\n{name}\n".encode() + state
    for arguments in (b"(NNNNtR.", b"(X\x01\x00\x00\x00aK\x01K\x02K\x03tR.", b"(tR.", b"(((((tttttR."):
        yield f"a tensor of {arguments!r}", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + arguments
    yield "persistent text", b"Pfoo\n."
    yield "persistent None", b"\x80\x02NQ."


def _pattern(rng: Random) -> str:
    """Return a random expression of nested repetitions."""
    text = rng.choice(["a", ".", "[a-c]", "a|a", "a?"])
    for _ in range(rng.randrange(1, 5)):
        text = rng.choice(["({})+", "({})*", "(?:{}){{0,20}}", "{}.*", "({}|a)", "({}|{})", "{}{}"]).replace("{}", text)
        text = text.replace("{{", "{").replace("}}", "}")
    return text + rng.choice(["b", "$", "y"])

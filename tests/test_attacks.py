"""Every file of a stranger's folder, damaged or made to harm, is refused in one message or does no harm."""

import functools
import json
import math
import os
import pickle
import py_compile
import re
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import blending
import bundle
import comparison
import kernel_utils as ku
import pandas as pd
import pretraining
import pseudo_label
import pytest
from safetensors.torch import load_file, save_file

from conftest import (
    ROOT,
    Forked,
    Killed,
    kill,
    make_pieces,
    make_texts,
    save_backbone,
    save_competition,
    tiny_config,
    trained,
)
from test_hostile import content_of, infer

pytestmark = [pytest.mark.slow, pytest.mark.nightly]
PAGE = ROOT / "docs" / "development.md"
SECONDS, BYTES = 60, 2 * 2**30  # what one command may take
MOST = 2  # variants of an attack that are tried on a file; a larger number tries more of them
NAMES = ["--id", "me/my-bundle", "--title", "My bundle"]

# ---------------------------------------------------------------------------------------
# Sound folders, and others of the same kind


def command(tool, *words):
    """Call the main function of a tool with a command line."""
    sys.argv = [f"{tool.__name__}.py", *map(str, words)]
    tool.main()


def tuned(place, backbone, run_name, **settings):
    """A quick run on the competition of `place`."""
    output = settings.pop("output_dir", place / "out")
    return trained(tiny_config(place / "competition", backbone, output, run_name=run_name, **settings))


def pretrained(place, backbone, run_name="p", **settings):
    base = dict(data_dir=place / "competition", backbone=backbone, output_dir=place / "out", run_name=run_name)
    base |= dict(max_length=16, epochs=2, batch_size=16, held_out=0.2)
    return pretraining.pretrain(pretraining.PretrainConfig.from_dict(base | settings))


def killed_in(function, *arguments, step, owner, **settings):
    """What a run leaves that is killed before a step, with a checkpoint after each step before."""
    real, count = vars(owner)["step" if owner is pretraining._Pretraining else "__call__"], iter(range(1, 10**6))
    name = real.__name__

    def counting(*words):
        if next(count) == step:
            kill()
        return real(*words)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ku, "_MAX_SAVE_FRACTION", math.inf)
        patch.setattr(owner, name, counting)
        function(*arguments, checkpoint_minutes=1e-9, **settings)


def split_weights(backbone, folder):
    """A copy of a backbone whose weights are in two files and an index."""
    shutil.copytree(backbone, folder)
    tensors = load_file(folder / "model.safetensors")
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def make_folders(place, seed):
    """A folder of each kind in `place`; other ones with another seed."""
    save_competition(place / "competition")
    raw = save_backbone("tiny", place / "raw")
    make_pieces().save_pretrained(raw)
    pretrained(place, raw, seed=seed).rename(place / "backbone")
    split_weights(place / "backbone", place / "sharded")
    killed_in(pretrained, place, raw, step=4, owner=pretraining._Pretraining, seed=seed)
    (place / "out/p").rename(place / "pretraining")
    backbone = place / "backbone"
    killed_in(tuned, place, backbone, "unfinished", step=6, owner=ku.OptimizerStep, seed=seed)
    (place / "out/unfinished").rename(place / "unfinished")
    for name, head in (("one", "mean"), ("two", "conv1d")):
        tuned(place, backbone, name, seed=seed, head=head, output_dir=place / "runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [])
        (place / "blend").mkdir()
        blend(place)
        runs = (place / "runs/one", place / "runs/two")
        command(bundle, *runs, "-o", place / "bundle", *NAMES, "--blend", place / "blend/blend.json")
        texts = pd.DataFrame({"id": range(12), "excerpt": make_texts(12, seed=5 + seed)})
        texts.to_csv(place / "extra.csv", index=False)
        command(pseudo_label, *runs, "--texts", place / "extra.csv", "-o", place / "pseudo")


def blend(place):
    inputs = blending.align_members(comparison.read_records(place / "runs"))
    blending.write_blend(inputs, blending.fit_blends(inputs, "mean")[0], place / "blend")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Function: seed -> what `make_folders` makes, once."""
    folders = {}

    def make(seed):
        if seed not in folders:
            folders[seed] = tmp_path_factory.mktemp(f"made{seed}")
            make_folders(folders[seed], seed)
        return folders[seed]

    return make


# ---------------------------------------------------------------------------------------
# The commands that read a folder: function(place) -> what must come out as from sound folders


def bytes_of(*paths):
    return {path.name: path.read_bytes().hex() for path in paths}


def go_on(place, **settings):
    run = tuned(place, place / "backbone", "unfinished", **(dict(output_dir=place) | settings))
    return bytes_of(*(run / name for name in ("oof.csv", "golden.json", "submission.csv")))


def resume_from(place):
    return go_on(place, output_dir=place / "out", resume_from=str(place / "unfinished"))


def train_again(place):
    run = tuned(place, place / "backbone", "one", output_dir=place / "runs")
    return bytes_of(run / "submission.csv")


def predict(place, folder):
    output = place / "out"
    infer(dict(bundle_dir=str(place / folder), data_dir=str(place / "competition"), output_dir=str(output)))
    return bytes_of(output / "submission.csv")


def pack(place, *options):
    command(bundle, place / "runs/one", place / "runs/two", "-o", place / "out/bundle", *NAMES, *options)


def pack_blend(place):
    pack(place, "--blend", place / "blend/blend.json")


def check(place):
    command(bundle, "--check", place / "bundle")


def label(place):
    runs = place / "runs/one", place / "runs/two"
    command(pseudo_label, *runs, "--texts", place / "extra.csv", "-o", place / "out/pseudo")


def compare(place):
    runs = comparison.align_runs(comparison.read_records(place / "runs"))
    comparison.compare_runs(runs)
    comparison.run_scores(runs)


def study(place):
    run = tuned(place, place / "backbone", "student", pseudo_dir=str(place / "pseudo"), run_folds="0")
    return bytes_of(run / "oof.csv")


def tune(place, folder):
    tuned(place, place / folder, "tuned", run_folds="0")  # other weights are another backbone


def pack_starter(place, folder):
    command(bundle, "--starter", "--backbone", place / folder, "-o", place / "out/starter", *NAMES)


def pretrain_go_on(place):
    return bytes_of(pretrained(place, place / "raw", "pretraining", output_dir=place) / "model.safetensors")


of = functools.partial
COMMANDS = {  # folder -> those that read it, and what else they need
    "unfinished": ([go_on, resume_from], ["backbone"]),
    "runs/one": ([of(predict, folder="runs/one"), pack, label, compare, train_again], ["backbone", "runs"]),
    "bundle": ([of(predict, folder="bundle"), check], []),
    "blend": ([pack_blend], ["runs"]),
    "pseudo": ([study], ["backbone"]),
    "backbone": ([of(tune, folder="backbone"), of(pack_starter, folder="backbone")], []),
    "sharded": ([of(tune, folder="sharded"), of(pack_starter, folder="sharded")], []),
    "pretraining": ([pretrain_go_on], ["raw"]),
}

# ---------------------------------------------------------------------------------------
# Attacks: {variant: function(path of the file, the same file of another folder, folder outside)}


def move_out(path, outside):
    """Move a file or folder out, or make the file there if nothing is here yet."""
    (outside / "moved").write_text("precious")
    if path.exists():
        (outside / "moved").unlink()
        shutil.move(path, outside / "moved")
    return outside / "moved"


def link(path, other, outside):
    path.symlink_to(move_out(path, outside))


def link_to_nothing(path, other, outside):
    path.unlink(missing_ok=True)
    path.symlink_to(outside / "nothing")


def link_hard(path, other, outside):
    os.link(move_out(path, outside), path)


def link_folder(path, other, outside):
    link(path.parent, other, outside)


def cut_to(share):
    return lambda path, *_: os.truncate(path, int(path.stat().st_size * share))


def instead(make):
    """Take a file away and call `make` with its path."""
    return lambda path, *_: [path.unlink(missing_ok=True), make(path)]


def grow(path, other, outside):
    os.truncate(path, 50 * 10**9)


def claim_length(path, other, outside):
    """The header of a safetensors file that says it is a terabyte long."""
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])


class Mark:
    """Writes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def write(content):
    return lambda path, *_: path.write_bytes(content)


def write_pickle(path, other, outside):
    path.write_bytes(pickle.dumps(Mark(outside / "RAN"), 2))


def edit(change, *keys):
    """Change one value of a JSON file; `keys` lead to it."""

    def spoil(path, *_):
        content = part = json.loads(path.read_text())
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = change(part[keys[-1]])
        path.write_text(json.dumps(content))

    return spoil


def other_type(value):
    return {"a": "b"} if isinstance(value, str | list) else ["x"]


def with_leaves(change, value):
    """The value with `change(leaf)` for every text and number in it."""
    if isinstance(value, dict):
        return {key: with_leaves(change, item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_leaves(change, item) for item in value]
    return change(value)


def long_number(value):
    return value if isinstance(value, str | bool | None) else 10**400


def go_up(value):
    return f"../outside/{value}" if isinstance(value, str) and " " not in value else value


def name_up(value):
    return {f"../outside/{key}": item for key, item in value.items()} if isinstance(value, dict) else value


def edits(path, change):
    """One for each key of a JSON file whose value it changes."""
    content = json.loads(path.read_text()) if path.suffix == ".json" and path.is_file() else {}
    return {key: edit(change, key) for key, value in content.items() if change(value) != value}


def links(path):
    spoils = {"to a file": link, "to nothing": link_to_nothing, "hard": link_hard}
    is_below = path.parent.name in ("tokenizer", "fold0") or "checkpoints" in path.parts
    return spoils | ({"its folder": link_folder} if is_below else {})


def cuts(path):
    return {"half": cut_to(0.5), "empty": cut_to(0), "missing": instead(lambda path: None)}


def replacements(path):
    spoils = {"by another": lambda path, other, _: shutil.copyfile(other, path)}
    return spoils | {"by a folder": instead(Path.mkdir), "by a FIFO": instead(os.mkfifo)}


def growths(path):
    spoils = {"50 GB": grow} | edits(path, of(with_leaves, long_number))
    if path.suffix == ".safetensors":
        spoils["length"] = claim_length
    if path.name.endswith("config.json") and not path.name.endswith("tokenizer_config.json"):
        spoils["two million layers"] = edit(lambda n: 2 * 10**6, "num_hidden_layers")
    return spoils


def types_of(path):
    spoils = {"a pickle": write_pickle, "words": write(b"words,and more words\n1,2\n")}
    if path.suffix == ".json":
        spoils |= {"a list": write(b"[]"), "no keys": write(b"{}")} | edits(path, other_type)
    return spoils


def climbs(path):
    if path.suffix != ".json":
        return {}
    names = {f"{key}, keys": spoil for key, spoil in edits(path, name_up).items()}
    return edits(path, of(with_leaves, go_up)) | names


ATTACKS = {"link": links, "cut": cuts, "replaced": replacements, "huge": growths, "wrong type": types_of, "..": climbs}


def seal_again(path):
    """Make the manifest beside a file fit it, as whoever changes one can do; False where nothing is to seal."""
    manifest = path.with_name("manifest.json")
    is_plain = path.is_file() and not path.is_symlink() and path.stat().st_size < 10**9
    if not manifest.is_file() or not is_plain:
        return False
    try:
        content = json.loads(manifest.read_text())
        if path != manifest:
            content["files"][path.name] = ku._describe_file(path)
        content.pop("sha256", None)
    except (ValueError, AttributeError, KeyError, TypeError):
        return False
    manifest.write_bytes(ku._seal_manifest(content))
    return True


# ---------------------------------------------------------------------------------------
# One attack on one command


def memory_of(pid):
    try:
        pages = [int(n) for n in Path(f"/proc/{pid}/statm").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        pages = []
    return (pages[1] - pages[2]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


class Trial:
    """A copy of the sound folders, with precious files outside of them, in which one command is tried."""

    def __init__(self, made, folder, place):
        self.folder, self.place = folder, place
        shutil.rmtree(place, ignore_errors=True)
        for name in {folder.split("/")[0], "competition", *COMMANDS[folder][1]}:
            shutil.copytree(made / name, place / name)
        shutil.copyfile(made / "extra.csv", place / "extra.csv")
        for name in ("out", "cwd", "outside/fold1-step9"):
            (place / name).mkdir(parents=True)
            (place / name / "file").write_text("precious")

    def surroundings(self):
        """All but the folder, which may go on, and the output."""
        own = (self.place / self.folder, self.place / "out")
        paths = [path for path in sorted(self.place.rglob("*")) if not any(map(path.is_relative_to, own))]
        return {str(path): content_of(path) for path in paths}

    def report(self, function):
        try:
            result = "harmless", function(self.place)
        except (ku.KitError, SystemExit) as error:
            result = "refused", str(error)
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            result = "traceback", f"{type(error).__name__}: {error}"[:200] + f" in {frame.name}"
        (self.place / "out/report.json").write_text(json.dumps(result))

    def run(self, function):
        """(outcome, what came out or the message): harmless, refused, or what must not be."""
        with open(self.place / "out/printed", "w") as printed:
            options = dict(cwd=self.place / "cwd", stdout=printed, stderr=subprocess.STDOUT)
            process = Forked(lambda: self.report(function), **options)
        began, at_first = time.monotonic(), memory_of(process.pid)
        while process.poll() is None:
            seconds, growth = time.monotonic() - began, memory_of(process.pid) - at_first
            if seconds > SECONDS or growth > BYTES:
                process.kill()
                process.wait()
                return "endless", f"{seconds:.0f} s, {growth / 2**30:.1f} GB"
            time.sleep(0.01)
        if process.returncode:
            return "dead", (self.place / "out/printed").read_text()[-300:]
        return json.loads((self.place / "out/report.json").read_text())

    def problems(self, function, before, sound, path):
        """(outcome, what is wrong with it)."""
        outcome, value = self.run(function)
        problems = []
        if outcome == "harmless" and value != sound:
            problems.append("another result than that of the sound folder")
        elif outcome == "refused" and not {path.name, path.parent.name, Path(self.folder).name} & {
            *re.split(r"[/:;,' ]", value)
        }:
            problems.append(f"names no file: {value}")
        elif outcome not in ("harmless", "refused"):
            problems.append(f"{outcome}: {value}")
        after = self.surroundings()
        changed = [name for name in before | after if before.get(name) != after.get(name)]
        if changed:
            problems.append(f"changed outside: {', '.join(changed[:3])}")
        return outcome, problems


def read_table():
    """{(file, attack): word} of the table in the docs."""
    table = PAGE.read_text(encoding="utf-8").split("\n| file | ")[1].split("\n\n")[0]
    (_, *attacks), _, *rows = [line.strip("|").split(" | ") for line in f"file | {table}".splitlines()]
    rows = [[cell.strip(" `") for cell in row] for row in rows]
    cells = {(row[0], attack.strip(" `|")): word for row in rows for attack, word in zip(attacks, row[1:], strict=True)}
    return {cell: word for cell, word in cells.items() if word != "-"}


def folder_of(file):
    return next(folder for folder in COMMANDS if file.startswith(f"{folder}/"))


@pytest.fixture(scope="module")
def sound(made, tmp_path_factory):
    """Function: folder, command -> what comes out of sound folders, once."""
    values = {}

    def result(folder, number):
        if (folder, number) not in values:
            trial = Trial(made(0), folder, tmp_path_factory.mktemp("sound") / "place")
            outcome, value = trial.run(COMMANDS[folder][0][number])
            assert outcome == "harmless", value
            values[folder, number] = value
        return values[folder, number]

    return result


def trials_of(file, attack, folder, row):
    """(variant, function that spoils a file, whether a manifest is made to fit), MOST of them, other ones by row."""
    path = folder / file
    can_seal = path.with_name("manifest.json").is_file() and attack in ("cut", "wrong type", "..")
    variants = ATTACKS[attack](path).items()
    trials = [(*variant, seals) for seals in (False, True)[: 1 + can_seal] for variant in variants]
    return [trials[(row + number * len(trials) // MOST) % len(trials)] for number in range(min(MOST, len(trials)))]


@pytest.mark.parametrize("cell", read_table(), ids="-".join)
def test_an_attack_is_refused_in_one_message_or_harmless(cell, made, sound, tmp_path):
    file, attack = cell
    folder, row = folder_of(file), list(read_table()).index(cell)
    functions, outcomes, failures = COMMANDS[folder][0], set(), []
    for number, (name, spoil, seals) in enumerate(trials_of(file, attack, made(0), row), row):
        number %= len(functions)
        trial = Trial(made(0), folder, tmp_path / "place")
        path = trial.place / file
        spoil(path, made(1) / file, trial.place / "outside")
        if seals:
            seal_again(path)
        before, expected = trial.surroundings(), sound(folder, number)
        outcome, problems = trial.problems(functions[number], before, expected, path)
        outcomes.add(outcome)
        function = getattr(functions[number], "func", functions[number]).__name__
        failures += [f"{name}{', sealed again' * seals}, {function}: {problem}" for problem in problems]
    assert not failures, "\n".join(["", *failures])
    assert ("refused" if "refused" in outcomes else "harmless") == read_table()[cell]


# ---------------------------------------------------------------------------------------
# Code beside the files of a folder

MODULES = "kernel_utils safetensors torch numpy pandas transformers json hashlib types sitecustomize conftest".split()
BESIDE = {  # case -> (folder, notebook or tool, its settings or words, whether a manifest names the code, outcome)
    "a run to predict with": ("runs/one", "infer", dict(bundle_dir="runs/one"), False, "harmless"),
    "a run to pack": ("runs/one", "bundle.py", ["runs/one", "-o", "out/bundle", *NAMES], False, "harmless"),
    "a run to go on with": ("unfinished", "train", dict(run_name="unfinished", output_dir="."), False, "harmless"),
    "a bundle": ("bundle", "infer", dict(bundle_dir="bundle"), False, "refused"),
    "a bundle whose manifest names it": ("bundle", "infer", dict(bundle_dir="bundle"), True, "harmless"),
    "a bundle to check": ("bundle", "bundle.py", ["--check", "bundle"], False, "refused"),
    "labels": ("pseudo", "train", dict(pseudo_dir="pseudo", run_name="student", output_dir="out"), False, "harmless"),
    "a backbone": ("backbone", "train", dict(run_name="tuned", output_dir="out"), False, "harmless"),
    "a pre-training": ("pretraining", "pretrain", dict(run_name="pretraining", output_dir="."), False, "harmless"),
}
QUICK = dict(n_folds=2, epochs=1, batch_size=8, max_length=32, backbone="backbone", data_dir="competition")
WORDS = dict(max_length=16, epochs=2, batch_size=16, held_out=0.2, backbone="raw", data_dir="competition")
SETTINGS = {"train": QUICK, "pretrain": WORDS, "infer": dict(data_dir="competition", output_dir="out")}


def plant(folder, mark, is_listed):
    """Modules that write a file where they are imported, also compiled for a kernel_utils.py as it is."""
    code = f"open({str(mark)!r}, 'w').write('ran')\n"
    names = [f"{name}.py" for name in MODULES if not (folder / f"{name}.py").exists()]
    for name in names:
        (folder / name).write_text(code)
    if is_listed:
        content = json.loads((folder / "manifest.json").read_text())
        content["files"] |= {name: ku._describe_file(folder / name) for name in names}
        del content["sha256"]
        (folder / "manifest.json").write_bytes(ku._seal_manifest(content))
        return
    (folder / "__pycache__").mkdir()
    cache = folder / f"__pycache__/kernel_utils.{sys.implementation.cache_tag}.pyc"
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(folder / names[0], cfile=cache, dfile=str(folder / "kernel_utils.py"), invalidation_mode=mode)


SCRIPT = """import json, pathlib, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in json.loads(pathlib.Path(__file__).with_suffix(".json").read_text()):
    if not shell.run_cell(cell, store_history=True).success:
        sys.exit(1)
"""


def script_of(name, settings, folder):
    """A script that runs the cells of a notebook with settings, as its kernel does."""
    cells = bundle.notebook_with(name, SETTINGS[name] | settings).cells
    script = folder / "cells.py"
    script.write_text(SCRIPT)
    script.with_suffix(".json").write_text(json.dumps([cell.source for cell in cells if cell.cell_type == "code"]))
    return script


@pytest.mark.parametrize("case", BESIDE.values(), ids=BESIDE)
def test_code_beside_the_files_of_a_folder_never_runs(case, made, tmp_path):
    folder, name, words, is_listed, expected = case
    trial = Trial(made(0), folder, tmp_path / "place")
    place, mark = trial.place, tmp_path / "RAN"
    plant(place / folder, mark, is_listed)
    (place / "kernel_utils").symlink_to(ROOT / "kernel_utils")  # the clone that the notebooks find
    command = [ROOT / "tools" / name, *words] if name.endswith(".py") else [script_of(name, words, tmp_path)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KAGGLE")}
    environment |= {"IPYTHONDIR": str(tmp_path / "ipython"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert not mark.exists(), (done.stdout + done.stderr)[-2000:]
    assert ("refused" if done.returncode else "harmless") == expected, (done.stdout + done.stderr)[-2000:]

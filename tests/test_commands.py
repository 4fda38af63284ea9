"""Every command that the README, the pages of docs, notebooks, docstrings and the tools themselves show: each is taken
apart by the parser of its tool in every suite, and run in a process, page by page, every night."""

import argparse
import ast
import contextlib
import fnmatch
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import blending
import bundle
import comparison
import kaggle_metadata
import kernel_utils as ku
import nbformat
import pandas as pd
import pretraining
import pytest
import sweep
from papermill import cli as papermill

from conftest import ROOT, make_texts, printed, save_competition, trained
from fake_kaggle import FakeKaggle

SETTINGS = {"train": ku.Config, "infer": ku.InferConfig, "pretrain": pretraining.PretrainConfig}
SETTINGS |= {"blend": blending.BlendConfig, "compare": comparison.CompareConfig}
FOLDERS = {"train": "runs", "pretrain": "runs", "blend": "blend", "compare": "comparison", "infer": "."}

# What no night runs, by a part of the command, and why
EXCEPTED = {
    "pip install": "a network",
    "--wheels": "a network",
    "--ray": "a Ray cluster; test_sweep.py has one",
    "backbone=microsoft/": "a network",
    "-m gpu": "a GPU",
    "device_check.sh": "a GPU",
    "pytest -n 2": "it is the suite",
    "tools/dev/stress.py": "hours; test_stress.py runs a part",
    "tools/dev/benchmark.py": "hours; test_benchmark.py runs a part",
    "tools/dev/bench_": "an hour",
    "runs/article": "hours: 57 runs",
    "runs/effects": "hours: 48 runs",
    "runs/recipes3": "hours: 12 runs of many epochs",
    "kaggle competitions submit": "an account",
}
TINY = dict(n_folds=2, epochs=2, max_rows=40, max_length=32)  # added to what trains, by night
WORDS = {"YOU": "me", "OWNER/SLUG": "me/some-runs", "TITLE": "'Some runs'", "DIR": "dist/some"}
WORDS |= {"FOLDER [FOLDER ...]": "dist/some", "[FOLDER_OF_A_COMPETITION]": "path/to/clear"}
WORDS |= {"backbone FOLDER": "backbone path/to/backbone", "--only 1": "--only kills"}

FENCE = r"^ *```(\w*)\n(.*?)^ *```"
LINE = re.compile(r" *(?:time )?((?:[A-Z_]+=\S+ )*(?:(?:papermill|python|pytest|bash) \S|pip install |kaggle \w).*)")
SAID = r"papermill (?:\S+\.ipynb|1 )|python (?:tools/|1 )|bash tools/|pytest -|(?<!-m )pip install"
SAID += "|kaggle (?:competitions|datasets|kernels) "
SAID = re.compile(rf"(?:{SAID})[^`\n;,)]*?(?= +#|[`\n;,)]|$)")
SHOWN = re.compile(
    r"(?<!\S)(?:papermill \S+\.ipynb|python \S*tools/|kaggle (?:datasets|kernels|competitions) ).*?(?=  #|$)"
)


def lines_of(text):
    """The commands among the lines of a block, loops unrolled."""
    text = text.replace("\\\n", " ")
    for loop, name, values, body in re.findall(r"(for (\w+) in (.*?); do\n(.*?)\ndone)", text, flags=re.DOTALL):
        text = text.replace(loop, "\n".join(body.replace(f"${name}", value) for value in values.split()))
    parts = [part for line in text.splitlines() for part in line.lstrip("#$ ").split("&&")]
    return [match[1].partition("  #")[0] for part in parts if (match := LINE.fullmatch(part))]


def commands_of_prose(text):
    """The commands in blocks and in the line, in their order; Python that makes a data folder is one too."""
    found = []
    for language, block, inline in re.findall(rf"{FENCE}|`([^`]+)`", text, flags=re.DOTALL | re.MULTILINE):
        if language == "python":
            found += [f"python -c {shlex.quote(block)}"] if ".mkdir(" in block else []
        else:
            found += lines_of(block or " ".join(inline.split()))
    return found


def strings_of(source):
    """The strings in Python, docstrings of modules left out, with 1 for what they insert."""
    nodes = list(ast.walk(ast.Module(ast.parse(source).body[1:], [])))
    formatted = [node.values for node in nodes if isinstance(node, ast.JoinedStr)]
    for parts in formatted:
        yield "".join(part.value if isinstance(part, ast.Constant) else "1" for part in parts)
    inner = {id(part) for parts in formatted for part in parts}
    plain = [node for node in nodes if isinstance(node, ast.Constant) and id(node) not in inner]
    yield from (node.value for node in plain if isinstance(node.value, str))


def collect():
    """{page: its commands}: files of prose, and what modules show and say."""
    pages = {path: commands_of_prose(path.read_text(encoding="utf-8")) for path in ROOT.glob("docs/*.md")}
    pages[ROOT / "README.md"] = commands_of_prose((ROOT / "README.md").read_text(encoding="utf-8"))
    said = {}
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        pages[path] = commands_of_prose(prose)
        said[path] = "pass\n" + "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for path in [*ROOT.glob("tools/**/*.py"), *ROOT.glob("kernel_utils/*.py")]:
        said[path] = path.read_text(encoding="utf-8")
        pages[path] = lines_of(ast.get_docstring(ast.parse(said[path])) or "")
    for path in [*ROOT.glob("tools/grids/*.toml"), *ROOT.glob("tools/dev/*.sh")]:
        pages[path] = lines_of(path.read_text(encoding="utf-8"))
    for path, source in said.items():
        texts = [match[0].strip() for text in strings_of(source) for match in SAID.finditer(text)]
        pages[path.with_name(f"{path.name}: said")] = list(dict.fromkeys(texts))
    return {str(path.relative_to(ROOT)): found for path, found in sorted(pages.items()) if found}


PAGES = collect()
ALL = [(page, command) for page, commands in PAGES.items() for command in commands]


def words_of(command):
    """The words of a command, its placeholders filled in, without variables before it."""
    for placeholder, text in WORDS.items():
        command = re.sub(rf"(?<![\w-]){re.escape(placeholder)}(?![\w-])", text, command)
    words = shlex.split(command)
    return words[[("=" in word) for word in words].index(False) :]


def settings_of(words):
    """What papermill sets in a notebook."""
    parameters = papermill.papermill.make_context("papermill", words[1:]).params["parameters"]
    return {name: papermill._resolve_type(value) for name, value in parameters}


class Parsed(Exception):
    """A command line that its tool takes."""


def parse(words, patch):
    """What the tool of a command makes of its arguments; SystemExit where it refuses them."""
    path, tool = ROOT / words[1], importlib.import_module(Path(words[1]).stem)
    if "argparse" not in path.read_text(encoding="utf-8"):
        return None
    patch.setattr(sys, "argv", words[1:])
    if hasattr(tool, "parse") and not tool.parse.__code__.co_argcount:
        return tool.parse()
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser, arguments=None):
        raise Parsed(parse_args(parser, arguments))

    patch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed) as parsed:
        tool.main(words[2:]) if tool.main.__code__.co_argcount else tool.main()
    return parsed.value.args[0]


def names_of_runs(args):
    """What a sweep calls its runs, by its settings checked."""
    for axes, settings in sweep.combinations(args):
        yield sweep.name_run(ku.Config.from_dict(settings), axes, settings, bool(args.folds))


def made_by(words, patch):
    """The files and folders that a command makes."""
    after = dict(itertools.pairwise(words))
    made = [after[flag] for flag in ("-o", "--output", "--kernels") if flag in after]
    if words[0] == "papermill":
        settings, kind = settings_of(words), Path(words[1]).stem
        folder = Path(str(settings.get("output_dir", FOLDERS[kind])))
        return [words[2], str(folder / settings.get("run_name", "" if kind in ("blend", "compare", "infer") else "?"))]
    if "-c" in words:
        return re.findall(r"Path\(\"(\w+)\"\)\.mkdir", after["-c"])
    if "tools/sweep.py" in words:
        return [f"{made[0]}/{name}" for name in names_of_runs(parse(words, patch))]
    return made


@pytest.mark.parametrize(("page", "command"), ALL, ids=lambda value: str(value)[:70])
def test_a_command_is_one_that_its_tool_takes(page, command, monkeypatch):
    words = words_of(command)
    files = [word for word in words if re.match(r"(tools|tests|notebooks|kernel_utils)/|requirements", word)]
    assert all((ROOT / name).exists() for name in files)
    if words[0] == "papermill" and files:
        assert words[2].endswith(".ipynb")
        SETTINGS[Path(words[1]).stem].from_dict(settings_of(words))
    elif words[0] == "python" and files:
        args = parse(words, monkeypatch)
        if "tools/sweep.py" in words:
            assert list(names_of_runs(args))
        if "tools/bundle.py" in words and not args.check:
            dataset = dict(id=args.id, title=args.title, licenses=[{"name": args.license}])
            assert kaggle_metadata.dataset_problems(dataset) == []
    else:
        assert words[0] in ("pytest", "bash", "pip", "kaggle") or "-c" in words or words[1] == "1"


def test_a_page_names_folders_that_an_earlier_command_of_it_makes(monkeypatch):
    guides = {page: PAGES[page] for page in PAGES if page.endswith(".md")}
    made = {command: made_by(words_of(command), monkeypatch) for page in guides.values() for command in page}
    roots = {path.split("/")[0] for paths in made.values() for path in paths} - {"results"}
    problems = []
    for page, commands in guides.items():
        there = []
        for command in commands:
            there += made[command]
            names = [re.sub(r"^\w+=", "", word) for word in words_of(command)]
            for name in (name for name in names if name.split("/")[0] in roots):
                is_there = [fnmatch.fnmatch(path, name) or name.startswith(f"{path}/") for path in there]
                is_there += [path.startswith(f"{name}/") for path in there]
                problems += [] if any(is_there) else [f"{page}: {command}: nothing before makes {name}"]
    assert problems == []


def test_every_exception_is_of_a_command():
    assert [part for part in EXCEPTED if not any(part in command for _, command in ALL)] == []


def test_what_sweep_and_blend_print_leads_from_runs_to_a_submission(tiny, tmp_path, monkeypatch, capsys):
    def call(tool, *words):
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, words)])
        with contextlib.suppress(SystemExit):
            tool.main()
        return SHOWN.findall(capsys.readouterr().out)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sweep, "run_papermill", lambda cell, *_: trained(ku.Config.from_dict(cell.settings)) and None)
    base = {name: getattr(tiny(), name) for name in ("data_dir", "backbone", "n_folds", "epochs", "max_length")}
    settings = [word for item in base.items() for word in ("--set", "{}={}".format(*item))]
    (compare,) = call(sweep, "--grid", "head=cls,mean", *settings, "-o", tmp_path / "runs")
    assert settings_of(words_of(compare)) == {"runs_dir": str(tmp_path / "runs")}
    members = blending.align_members(comparison.read_records(tmp_path / "runs"))
    assert list(members.records) == ["head-cls_seed-0", "head-mean_seed-0"]
    blending.write_blend(members, blending.fit_blends(members, "mean")[0], tmp_path)
    (pack,) = SHOWN.findall(capsys.readouterr().out)
    words = words_of(pack.replace("-o DIR", f"-o {tmp_path}/some"))
    assert words[:2] == ["python", "tools/bundle.py"] and call(bundle, *words[2:])
    packed = ku.load_bundle(str(tmp_path / "some"))
    test, sample = ku.read_test_set(packed, base["data_dir"])
    ku.check_golden(packed)
    ku.write_submission(packed, test, ku.predict_bundle(packed, test), sample, tmp_path / "submission.csv")
    assert len(pd.read_csv(tmp_path / "submission.csv")) == 10
    formatted = [re.escape(command).replace("1", ".+") for _, command in ALL if words_of(command)[1] == "1"]
    assert formatted and all(re.fullmatch(shape, compare) or re.fullmatch(shape, pack) for shape in formatted)


@pytest.fixture
def page(tmp_path, maskable, runs):
    """A folder with what a clone has, which makes the data and backbones that commands name, and what others made."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "results", "__pycache__"))
    (folder / "results").mkdir()
    (folder / "run.json").write_text(json.dumps(TINY))
    pd.DataFrame({"excerpt": make_texts(6, seed=8)}).to_csv(folder / "extra.csv", index=False)
    shutil.copy(folder / "notebooks" / "compare.ipynb", folder / "compare.out.ipynb")

    def prepare(words, has_runs):
        for before, word in itertools.pairwise(words):
            path = Path(folder, *Path(re.sub(r"^\w+=", "", word)).parts[:3])
            if path.is_relative_to(folder / "path") and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                is_backbone = before in ("backbone", "--backbone")
                shutil.copytree(maskable("bert"), path) if is_backbone else save_everything(path)
            if has_runs and before != "-o" and path.parent == folder / "runs" and not path.exists():
                shutil.copytree(runs / "one", path)
        return folder

    return prepare


def save_everything(folder):
    """A competition with every column that a command names."""
    save_competition(folder)
    for name in ("train.csv", "test.csv", "sample_submission.csv"):
        frame = pd.read_csv(folder / name, dtype={"id": str})
        if "excerpt" in frame:
            frame = frame.assign(genre="verse", prompt=frame["excerpt"], response=frame["excerpt"].str[::-1])
        prefix = "a" if name == "train.csv" else "b"  # what has the id of a training row gets no pseudo-label
        frame.assign(id=prefix + frame["id"]).to_csv(folder / name, index=False)


def shorten(words):
    """The words with what makes them quick."""
    if words[0] == "papermill":
        names = SETTINGS[Path(words[1]).stem].names()
        return [*words, *(word for name in TINY if name in names for word in ("-p", name, str(TINY[name])))]
    if words[0] == "pytest":
        return [*words, "--collect-only", "-p", "no:cacheprovider"]
    if "tools/sweep.py" in words:
        blocks = sweep.read_grid(ROOT / words[2])[2] if words[2].endswith(".toml") else []
        given = {word.partition("=")[0] for word in [*words, *itertools.chain(*blocks)]}
        tiny = [word for name in TINY if name not in given for word in ("--set", f"{name}={TINY[name]}")]
        fewer = [word.replace("0,1,2", "0,1") for word in words]
        return [*fewer, *tiny, *([] if "--jobs" in words else ["--jobs", "2"])]
    return words


def said_by(words, output, folder):
    """The commands in what a command printed, or the notebook that it ran."""
    if words[0] == "papermill":
        output += printed(nbformat.read(folder / words[2], 4))
    return [match[0] for line in output.splitlines() for match in SHOWN.finditer(line)]


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in PAGES if not name.endswith("said")])
def test_the_commands_of_a_page_and_those_that_they_print_run_in_their_order(name, page, tmp_path):
    todo, done = [command for command in PAGES[name]], []
    (tmp_path / "home").mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KAGGLE")}
    environment |= {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with FakeKaggle() as kaggle:
        while todo:
            command = todo.pop(0)
            if command in done or any(part in command for part in EXCEPTED):
                continue
            words = shorten(words_of(command))
            folder = page(words, has_runs=not name.endswith(".md"))
            is_push = words[0] == "kaggle" or "kaggle_push" in words[1] or "--push" in words
            own = kaggle.client_env(tmp_path / "home") if is_push else environment
            ended = subprocess.run(words, cwd=folder, env=own, capture_output=True, text=True)
            assert ended.returncode == 0, f"{shlex.join(words)}\n{ended.stdout[-1500:]}{ended.stderr[-3000:]}"
            done.append(command)
            todo[:0] = said_by(words, ended.stdout, folder)

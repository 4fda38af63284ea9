"""A grid of runs: what is started, skipped, refused and reported. Fast tests put a stub in the place of papermill."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import kaggle_metadata
import kernel_utils as ku
import pandas as pd
import psutil
import pytest
import sweep

from conftest import ROOT, Forked, papermill, printed

# argv: notebook, its text, run folder, settings as JSON, seconds: trains nothing but leaves what a run leaves. One that
# takes long has a process of its own, as papermill has the kernel.
STUB = """
import json, os, pathlib, subprocess, sys, time
notebook, text, run, settings, seconds = sys.argv[1:]
pathlib.Path(notebook).write_text(text)
if "error" in text:
    sys.exit(1)
run, record = pathlib.Path(run), {"status": "running", "settings": json.loads(settings)}
run.mkdir(exist_ok=True)
(run / "record.json").write_text(json.dumps(record))
(run / "fold0").mkdir(exist_ok=True)
(run / "fold0" / "model.safetensors").write_text("weights")
(run / "environment.json").write_text(json.dumps(dict(os.environ)))
(run / "oof.csv").write_text("id")
print("the log of", run.name, flush=True)
if float(seconds) > 100:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
time.sleep(float(seconds))
oof = {"metric": "rmse", "last": 0.5, "best": 0.25}
record |= {"status": "complete", "oof": oof, "rows_per_second": 10.0, "seconds": {"total": 8.0, "train": 4.0}}
(run / "record.json").write_text(json.dumps(record))
"""

pytestmark = pytest.mark.slow


def notebook_text(error=""):
    lines = {"output_type": "error", "ename": "KitError", "evalue": error, "traceback": []}
    return json.dumps({"cells": [{"outputs": [lines] if error else []}]})


def stub_command(cell, notebook, text, seconds):
    settings = json.dumps(ku.Config.from_dict(cell.settings).to_dict())
    run = Path(cell.settings["output_dir"]) / cell.name
    return [sys.executable, "-c", STUB, str(notebook), text, str(run), settings, str(seconds)]


@pytest.fixture
def stub(monkeypatch):
    """Names of the cells that a stub of papermill ran, for `stub.seconds`; `stub.errors` says which fail with what."""

    class Started(list):
        errors = {}  # noqa: RUF012
        seconds = 0

    started = Started()

    def command(cell, notebook):
        started.append(cell.name)
        text = notebook_text(started.errors.get(cell.name, ""))
        return stub_command(cell, notebook, text, started.seconds)

    monkeypatch.setattr(sweep, "command", command)
    monkeypatch.setattr(sweep, "POLL", 0.05)
    return started


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def base(competition, backbone_folder, output):
    """Function: settings -> arguments of a quick grid on the made competition; a setting that is None is left out."""

    def arguments(**settings):
        quick = dict(data_dir=competition, backbone=backbone_folder("tiny"), n_folds=2, epochs=1, max_length=32)
        given = {name: value for name, value in (quick | settings).items() if value is not None}
        return [*(part for name, value in given.items() for part in ("--set", f"{name}={value}")), "-o", str(output)]

    return arguments


@pytest.fixture
def call(base, monkeypatch, capsys):
    """Function: arguments -> exit code and what was printed, of a sweep in this process."""

    def run(*arguments, **settings):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["sweep.py", *base(**settings), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            sweep.main()
        code = ended.value.code
        return (1, code) if isinstance(code, str) else (code, capsys.readouterr().out)

    return run


def names(shown):
    """Names of the runs that a dry run lists."""
    return [line.split(":")[0] for line in shown.splitlines() if line.startswith(("head-", "seed-", "llrd-"))]


def write(path, text):
    path.write_text(text)
    return path


# The cells


def test_every_combination_of_settings_seeds_and_folds_is_a_run(call, stub):
    code, _ = call("--grid", "head=cls,max", "--grid", "llrd=1,0.9", "--seeds", "3,4", "--folds", "0,1")
    wanted = [
        f"head-{head}_llrd-{llrd}_seed-{seed}_fold-{fold}"
        for head in ("cls", "max")
        for llrd in ("1.0", "0.9")
        for seed in (3, 4)
        for fold in (0, 1)
    ]
    assert code == 0 and sorted(stub) == sorted(wanted)


def test_papermill_is_told_every_setting_as_yaml_so_that_an_edited_notebook_trains_the_same(base, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweep.py", *base(), "--grid", "lr=1e-5", "--set", "conv_kernels=2,2"])
    (cell,) = sweep.make_cells(sweep.parse())
    arguments = sweep.command(cell, Path("out.ipynb"))
    told = sweep.yaml.safe_load(arguments[arguments.index("-y") + 1])
    assert told["lr"] == 1e-5 and told["conv_kernels"] == [2, 2] and told["run_name"] == "lr-1e-05_seed-0"
    assert set(told) == set(ku.Config().to_dict())


def test_a_recipe_in_the_grid_gives_what_the_grid_does_not_even_if_that_is_the_default(base, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweep.py", *base(epochs=None), "--grid", "recipe=quick,max", "--set", "ema=0"])
    quick, most = sweep.make_cells(sweep.parse())
    assert (quick.name, most.name) == ("recipe-quick_seed-0", "recipe-max_seed-0")
    assert quick.settings["epochs"] == ku.RECIPES["quick"]["epochs"]
    assert most.settings["pseudo_dir"] == ku.RECIPES["max"]["pseudo_dir"]
    assert most.settings["ema"] == 0 and ku.Config.from_dict(most.settings).ema == 0


def test_cells_of_two_blocks_that_are_the_same_run_are_one_under_the_first_name(call, stub, tmp_path):
    file = write(tmp_path / "g.toml", '[[grid]]\nhead = ["cls", "max"]\n[[grid]]\nhead = ["cls"]\nllrd = [1.0, 0.9]\n')
    call(file)
    assert stub == ["head-cls_seed-0", "head-max_seed-0", "head-cls_llrd-0.9_seed-0"]


def test_the_command_line_wins_over_the_file_and_its_grid_multiplies_every_block(call, stub, tmp_path, output):
    text = 'seeds = [1, 2]\n[settings]\nepochs = 7\nbatch_size = 4\n[[grid]]\nhead = ["cls"]\n[[grid]]\nllrd = [0.9]\n'
    call(write(tmp_path / "g.toml", text), "--seeds", "5", "--grid", "reinit_layers=0,1")
    assert stub == [f"{block}_reinit_layers-{n}_seed-5" for block in ("head-cls", "llrd-0.9") for n in (0, 1)]
    settings = ku.RunFolder(output / stub[0]).read_record()["settings"]
    assert settings["epochs"] == 1 and settings["batch_size"] == 4


def test_a_backbone_has_its_short_name_in_the_name_of_the_run_and_two_of_one_name_are_told_apart(
    call, stub, backbone_folder, tmp_path
):
    folder = backbone_folder("tiny")
    other = tmp_path / folder.name
    other.symlink_to(folder)
    name = f"backbone-{ku._short_name(str(folder))}_seed-0"
    code, _ = call("--grid", f"backbone={other}", backbone=None)
    assert code == 0 and stub == [name]
    code, shown = call("--grid", f"backbone={folder},{other}", backbone=None)
    assert code == 0 and "1 finished now, 1 before" in shown and re.fullmatch(rf"{name}-\w{{8}}", stub[1])


def test_names_are_files_everywhere_and_differ_where_values_do(base, monkeypatch):
    values = ["[a] {excerpt}", "[b] {excerpt}", "[B] {excerpt}", "é {excerpt}", "{excerpt}" + "x" * 200, "{excerpt}"]
    arguments = [f"template={','.join(values)}", "--grid", "freeze_embeddings=false,true"]
    cells = make_cells(base, monkeypatch, "--grid", *arguments)
    names = {cell.name.lower() for cell in cells}
    assert len(names) == len(cells) == 12 and all("_freeze_embeddings-" in name for name in names if "xxx" not in name)
    files = {f"{name}{end}": 1 for name in names for end in (".fold12.safetensors", ".special_tokens_map.json")}
    assert kaggle_metadata.file_problems(files) == []


@pytest.mark.parametrize("file", sorted((ROOT / "tools" / "grids").glob("*.toml")), ids=lambda path: path.stem)
def test_the_grid_files_that_come_with_the_kit_are_valid_settings(file):
    asked = sweep.argparse.Namespace(grid_file=file, seeds=None, folds=None, grid=[], set=[])
    cells = [ku.Config.from_dict(settings) for _, settings in sweep.combinations(asked)]
    blocks = tomllib.loads(file.read_text())["grid"]
    seeds = tomllib.loads(file.read_text())["seeds"]
    count = sum(len(seeds) * math.prod(len(values) for values in block.values()) for block in blocks)
    expected = {"article": 57, "article_cpu": 24, "effects": 48, "lr": 5, "recipes": 9}
    assert len({json.dumps(cell.to_dict()) for cell in cells}) == count == expected[file.stem]
    assert len({cfg.epochs * cfg.evals_per_epoch for cfg in cells}) == 1  # or compare.ipynb refuses them
    if file.stem == "article":
        assert {cfg.head for cfg in cells} == set(ku.HEADS)


# What is refused before anything starts


def test_misspelt_names_and_bad_values_of_all_cells_are_one_error_and_nothing_is_made(call, stub, output):
    code, shown = call("--grid", "head=cls,clss", "--grid", "epoch=1,2", "--seeds", "0,x")
    assert code == 1 and stub == [] and not output.exists()
    for part in ("there is no setting 'epoch' (did you mean epochs?)", "got 'clss'", "seed must be a whole number"):
        assert shown.count(part) == 1


def test_a_typo_in_the_data_folder_is_one_message(call, stub, output):
    code, shown = call("--grid", "head=cls,max", "--seeds", "0,1,2", data_dir="/nowhere")
    assert code == 1 and shown.count("'/nowhere' is not a folder") == 1 and not output.exists()


def test_a_fold_that_is_not_there_is_one_message(call, stub):
    code, shown = call("--folds", "0,2", "--seeds", "0,1,2")
    assert code == 1 and shown.count("run_folds must be") == 1 and stub == []


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("seed = [1]", "there is no 'seed', only seeds, [settings] and [[grid]]"),
        ("seeds = 3", "seeds must be a list of values, got 3"),
        ("[grid]\nhead = ['cls']", "grid must be tables [[grid]]"),
        ("[[grid]]\nhead = 'cls'", "head must be a list of values, got 'cls'"),
        ("seeds = [1]\n[[grid]]\nseed = [1]", "seed is given by the grid file and by seeds"),
        ("[settings]\nrun_name = 'a'", "run_name is made by this tool"),
        ("seeds = [", "g.toml: "),
    ],
)
def test_a_grid_file_that_is_wrong_is_named_with_what_was_expected(call, stub, tmp_path, text, part):
    code, shown = call(write(tmp_path / "g.toml", text))
    assert code == 1 and part in shown and stub == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--grid", "epochs=1,2"], "epochs is given by --set and by --grid"),
        (["--grid", "head=cls", "--grid", "head=max"], "head is given by --grid and by --grid"),
        (["--folds", "0", "--grid", "run_folds=0"], "run_folds is given by --grid and by --folds"),
        (["--grid", "output_dir=a"], "output_dir is made by this tool"),
    ],
)
def test_a_setting_that_is_given_in_two_ways_is_refused(call, stub, arguments, part):
    code, shown = call(*arguments)
    assert code == 1 and part in shown and stub == []


def test_runs_that_are_complete_with_other_settings_stop_the_grid_and_every_change_is_listed(call, stub):
    call("--grid", "head=cls,max")
    code, shown = call("--grid", "head=cls,max,mean", epochs=5, warmup_ratio=0.2)
    assert code == 1 and stub == ["head-cls_seed-0", "head-max_seed-0"]
    for name in stub:
        assert f"{name} is complete with other settings: " in shown
    assert shown.count("epochs was 1, now 5; warmup_ratio was 0.1, now 0.2") == 2


def test_a_folder_that_is_no_run_is_never_touched(call, stub, output):
    folder = output / "head-cls_seed-0"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    code, shown = call("--grid", "head=cls,max")
    assert code == 1 and f"{folder} is not a run" in shown and stub == []
    assert (folder / "thesis.txt").read_text() == "mine"


# Going on


@pytest.mark.parametrize("name", ["head=cls+seed=0", "mine"])
def test_runs_go_on_and_are_skipped_under_whatever_name_they_have(call, stub, output, name):
    call("--grid", "head=cls")
    record = (output / "head-cls_seed-0").rename(output / name) / "record.json"
    assert f"{name}: finished\n" in call("--grid", "head=cls,max", "--dry-run")[1]
    record.write_text(record.read_text().replace('"complete"', '"stopped"'))
    assert f"{name}: interrupted, to go on\n" in call("--grid", "head=cls,max", "--dry-run")[1]
    assert call("--grid", "head=cls")[0] == 0
    code, shown = call("--grid", "head=cls,max")
    assert code == 0 and stub == ["head-cls_seed-0", name, "head-max_seed-0"]
    assert "2 runs: 1 finished now, 1 before, 0 finished elsewhere, 0 failed, 0 running elsewhere" in shown


def test_a_setting_that_an_older_record_lacks_was_the_default(call, stub, output):
    call("--grid", "head=cls")
    path = output / "head-cls_seed-0" / "record.json"
    record = json.loads(path.read_text())
    del record["settings"]["length_bucket"]
    path.write_text(json.dumps(record))
    assert call("--grid", "head=cls")[0] == 0 and len(stub) == 1
    code, shown = call("--grid", "head=cls", "--set", "length_bucket=9")
    assert code == 1 and "length_bucket was 0, now 9" in shown


@pytest.mark.parametrize("left", ["running", "stopped", "empty", "temporary"])
def test_what_a_killed_run_left_is_there_for_the_run_to_go_on(call, stub, left, output):
    folder = output / "head-cls_seed-0"
    folder.mkdir(parents=True)
    (folder / ".lock").write_text("")
    if left in ("running", "stopped"):
        (folder / "record.json").write_text(json.dumps({"status": left, "settings": {}}))
    if left == "temporary":
        (folder / ".record.json.tmp").write_text("{")
    assert "head-cls_seed-0: interrupted, to go on" in call("--grid", "head=cls", "--dry-run")[1]
    code, _ = call("--grid", "head=cls")
    assert code == 0 and ku.RunFolder(folder).read_record()["status"] == "complete" and (folder / ".lock").exists()
    assert sorted(path.suffix for path in (output / "notebooks").iterdir()) == [".ipynb", ".lock", ".log"]


def make_cells(base, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sweep.py", *base(), *arguments])
    return sweep.make_cells(sweep.parse())


def test_what_another_sweep_trained_under_another_name_meanwhile_is_not_trained_again(
    call, base, stub, output, monkeypatch
):
    (cell,) = make_cells(base, monkeypatch, "--seeds", "0")
    call("--grid", "head=mean")
    assert sweep.run_cell(cell, output, ROOT, False) == sweep.TRAINED
    assert (cell.name, stub) == ("seed-0", ["head-mean_seed-0"])
    assert sweep.lock_path(cell, output) == next((output / "notebooks").glob("*.lock"))


def test_a_run_that_another_sweep_finished_meanwhile_is_not_counted_as_finished_now(call, stub, output, monkeypatch):
    train = sweep.run_papermill

    def with_another(cell, output, folder, lock, *rest):
        problem = train(cell, output, folder, lock, *rest)
        other = output / "head-max_seed-0" / "record.json"
        if cell.name == "head-cls_seed-0":  # while it was trained, somebody trained the next one
            other.parent.mkdir()
            record = (output / cell.name / "record.json").read_text()
            other.write_text(record.replace('"head": "cls"', '"head": "max"'))
        return problem

    monkeypatch.setattr(sweep, "run_papermill", with_another)
    code, shown = call("--grid", "head=cls,max")
    assert code == 0 and stub == ["head-cls_seed-0"] and "head-max_seed-0: finished elsewhere" in shown
    assert "2 runs: 1 finished now, 0 before, 1 finished elsewhere, 0 failed, 0 running elsewhere" in shown


def test_a_notebook_that_fails_after_its_scores_is_reported_once_and_not_trained_again(call, stub, output, monkeypatch):
    command = sweep.command
    late = "sys.exit(1)"

    def failing(cell, notebook):
        arguments = command(cell, notebook)
        return [*arguments[:2], arguments[2] + late, *arguments[3:]]

    monkeypatch.setattr(sweep, "command", failing)
    code, shown = call("--grid", "head=cls", "--drop-weights")
    assert code == 1 and "its scores are complete and kept, but not the rest of the notebook: the log of" in shown
    assert not list(output.rglob("*.safetensors"))
    code, shown = call("--grid", "head=cls")
    assert code == 0 and "0 finished now, 1 before" in shown and len(stub) == 1


@pytest.mark.parametrize("content", ["", "[]", "null", '{"status": "complete"}', "{"])
def test_a_record_that_is_none_is_named_and_nothing_starts(call, stub, output, content):
    (output / "other").mkdir(parents=True)
    (output / "other" / "record.json").write_text(content)
    code, shown = call("--grid", "head=cls")
    assert code == 1 and "other/record.json is not the record of a run" in shown and stub == []


@pytest.mark.parametrize("name", ["head-cls_seed-0.log", "head-cls_seed-0.ipynb", "0123456789abcdef.lock", ""])
def test_nothing_is_written_through_links_beside_the_runs(call, stub, output, tmp_path, name):
    elsewhere = write(tmp_path / "elsewhere", "mine")
    link = output / "notebooks" / name
    link.parent.mkdir(parents=True)
    if not name:
        elsewhere = tmp_path / "folder"
        elsewhere.mkdir()
    link.symlink_to(elsewhere)
    code, shown = call("--grid", "head=cls")
    assert code == 1 and str(link) in shown and "link" in shown and stub == []
    assert (tmp_path / "elsewhere").read_text() == "mine" and os.listdir(output) == ["notebooks"]


def test_an_output_that_is_a_file_is_refused(call, stub, output):
    output.write_text("")
    code, shown = call("--grid", "head=cls")
    assert code == 1 and f"-o {output} is a file" in shown and stub == []


def test_an_error_of_the_sweep_itself_stops_its_runs(call, stub, monkeypatch):
    def broken(*_):
        raise BrokenPipeError

    monkeypatch.setattr(sweep.tqdm, "write", broken)
    with pytest.raises(BrokenPipeError):
        call("--grid", "head=cls,max,gem,mean,gru")
    assert len(stub) < 5


def test_a_cell_whose_lock_is_taken_is_left_alone(call, base, stub, output, monkeypatch):
    (output / "notebooks").mkdir(parents=True)
    (cell,) = make_cells(base, monkeypatch, "--grid", "head=cls")
    with open(sweep.lock_path(cell, output), "w") as lock:
        sweep.fcntl.flock(lock, sweep.fcntl.LOCK_EX)
        code, shown = call("--grid", "head=cls,max")
    assert code == 1 and stub == ["head-max_seed-0"]
    assert "2 runs: 1 finished now, 0 before, 0 finished elsewhere, 0 failed, 1 running elsewhere" in shown
    assert call("--grid", "head=cls,max")[0] == 0


def test_failures_are_said_with_the_error_of_the_notebook_and_tried_again_by_the_next_call(call, stub, output):
    stub.errors["head-cls_seed-0"] = "cannot go on:\n  the first thing\n  the second\n  the third"
    code, shown = call("--grid", "head=cls,max")
    notebook = output / "notebooks" / "head-cls_seed-0.ipynb"
    problem = f"KitError: cannot go on: the first thing the second ({notebook})"
    assert code == 1 and f"head-cls_seed-0: failed: {problem}" in shown and stub.count("head-cls_seed-0") == 1
    assert f"0 finished elsewhere, 1 failed, 0 running elsewhere\n  head-cls_seed-0: {problem}" in shown
    assert "compare" not in shown and notebook.is_file()
    stub.errors.clear()
    code, shown = call("--grid", "head=cls,max")
    assert code == 0 and stub == ["head-cls_seed-0", "head-max_seed-0", "head-cls_seed-0"]


def test_an_error_outside_the_notebook_is_the_last_line_of_the_log(tmp_path):
    log = write(tmp_path / "log", "Traceback\nDeadKernelError: Kernel died\n\n")
    assert sweep.failure(tmp_path / "none.ipynb", log, 1) == "DeadKernelError: Kernel died"
    assert sweep.failure(tmp_path / "none.ipynb", log, -9) == "papermill was ended by SIGKILL"


def test_each_finished_run_has_a_line_and_the_end_names_the_command_to_compare(call, stub, output):
    code, shown = call("--grid", "head=cls")
    assert code == 0 and "head-cls_seed-0: rmse 0.5000 last, 0.2500 best, 8 s" in shown
    assert f"papermill notebooks/compare.ipynb compare.out.ipynb -p runs_dir {output}" in shown
    assert "the log of head-cls_seed-0" in (output / "notebooks" / "head-cls_seed-0.log").read_text()


def test_weights_are_deleted_only_where_asked_and_only_of_runs_that_are_complete(call, stub, output):
    call("--grid", "head=cls")
    call("--grid", "head=cls,max", "--drop-weights")
    weights = sorted(path.parents[1].name for path in output.glob("*/fold0/model.safetensors"))
    assert weights == ["head-cls_seed-0"]


def test_the_dry_run_lists_the_runs_and_the_time_and_makes_nothing(call, stub, output):
    code, shown = call("--grid", "head=cls,max", "--dry-run")
    assert code == 0 and names(shown) == ["head-cls_seed-0", "head-max_seed-0"] and stub == []
    assert shown.endswith("80 training rows, 1 at a time; no run is finished yet that would tell how long they take\n")
    assert not output.exists()
    call("--grid", "head=cls")
    code, shown = call("--grid", "head=cls,max,mean", "--dry-run", "--jobs", "2")
    assert "head-cls_seed-0: finished" in shown and "head-max_seed-0: to run" in shown
    assert "about 00:08 for 80 training rows, 2 at a time, at 5.0 rows/s each (as in the 1 runs" in shown


def test_the_work_of_a_cell_is_its_training_rows(base, monkeypatch):
    arguments = ["--set", "n_folds=4", "--set", "epochs=2", "--folds", "1"]
    monkeypatch.setattr(sys, "argv", ["sweep.py", *base(epochs=None), *arguments])
    (cell,) = sweep.make_cells(sweep.parse())
    assert cell.rows == 60  # 40 rows in 4 folds, two epochs


# Side by side


def test_slots_are_spread_over_the_gpus_and_share_the_cores_of_a_cpu(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    environments = [sweep.slot_environment(slot, 4, ["0", "GPU-ab"]) for slot in range(4)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == ["0", "GPU-ab", "0", "GPU-ab"]
    monkeypatch.setattr(sweep, "cores", lambda: 8)
    threads = [sweep.slot_environment(0, jobs, []).get("OMP_NUM_THREADS") for jobs in (1, 3, 16)]
    assert threads == [None, "2", "1"]


@pytest.mark.parametrize(
    ("visible", "count", "gpus"), [(None, 2, ["0", "1"]), ("3,1", 2, ["3", "1"]), ("", 0, []), ("-1", 0, [])]
)
def test_the_gpus_are_those_that_cuda_visible_devices_leaves(monkeypatch, visible, count, gpus):
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert sweep.gpu_names() == gpus


def test_more_runs_than_the_gpus_take_are_refused(monkeypatch):
    def jobs(jobs, per_gpu, gpus):
        return sweep.count_jobs(sweep.argparse.Namespace(jobs=jobs, per_gpu=per_gpu), gpus)

    assert [jobs(None, 2, ["0", "1"]), jobs(None, 1, []), jobs(3, 1, []), jobs(4, 2, ["0", "1"])] == [4, 1, 3, 4]
    with pytest.raises(ku.KitError, match="--jobs 5 is more than 2 GPUs with 2 runs each take: raise --per-gpu"):
        jobs(5, 2, ["0", "1"])


def test_runs_side_by_side_see_their_share_of_the_cores(call, stub, monkeypatch, output):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sweep, "cores", lambda: 6)
    stub.seconds = 0.3
    assert call("--grid", "head=cls,max,mean", "--jobs", "2")[0] == 0
    threads = [json.loads(path.read_text())["OMP_NUM_THREADS"] for path in output.glob("*/environment.json")]
    assert threads == ["3", "3", "3"]


def test_ray_and_jobs_together_are_refused(call, stub):
    code, _ = call("--ray", "auto", "--jobs", "2")
    assert code == 2 and stub == []


def test_a_missing_ray_is_said_with_how_to_install_it(call, stub, monkeypatch, output):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, shown = call("--ray", "auto")
    assert code == 1 and "pip install ray" in shown and not output.exists()


# Sweeps that are a process of their own


STREAMS = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def start(*arguments):
    """tools/sweep.py, as people start it."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(ROOT / "tools" / "sweep.py"), *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, **STREAMS)


def start_with_stub(*arguments):
    """A sweep whose cells take so many seconds by their epochs, or longer than any test."""

    def command(cell, notebook):
        seconds = {1: 0, 2: 5}.get(cell.settings["epochs"], 600)
        return stub_command(cell, notebook, notebook_text(), seconds)

    def run():
        sweep.POLL, sweep.command, sys.argv = 0.05, command, ["sweep.py", *arguments]
        sweep.main()

    return Forked(run, cwd=ROOT, **STREAMS)


def wait_for(condition, seconds=120):
    """Value of the condition, once it is true."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)
    return value


def papermill_of(name, process):
    """The papermill process of a cell, once its run has begun."""
    children = [child for child in process.children() if any(f"/{name}.ipynb" in word for word in child.cmdline())]
    return children[0] if children else None


def fingerprint(run):
    """Changes when a run is trained again."""
    stat = (run / "record.json").stat()
    return stat.st_ino, stat.st_mtime_ns, (run / "oof.csv").read_bytes()


def test_real_notebooks_that_fail_or_are_stopped_are_reported_go_on_and_are_compared(base, call, output, tmp_path):
    run, settings = output / "lr-0.0001_seed-0", dict(epochs=30)  # long enough to be stopped
    process = start(*base(**settings), "--grid", "lr=1e30,1e-4")
    wait_for((run / "log.jsonl").is_file)
    descendants = psutil.Process(process.pid).children(recursive=True)
    assert any("ipykernel_launcher" in child.cmdline() for child in descendants)
    process.send_signal(signal.SIGINT)
    shown = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "stopped: 0 of 2 runs are complete and kept" in shown
    failed = r"(lr-1e-30_seed-0-\w{8}): failed: NumericError: .* fold 0, step \d+: .*\1.ipynb"
    assert re.search(failed, shown) and psutil.wait_procs(descendants, timeout=10)[1] == []
    (failed,) = (output / "notebooks").glob("lr-1e-30*.ipynb")
    executed = failed.read_text()
    assert '"NumericError"' in executed and "Traceback" not in executed  # the error is its message alone
    code, shown = call("--grid", "lr=1e-4,1e-3", "--jobs", "2", **settings)
    assert code == 0 and "2 finished now, 0 before" in shown
    assert len(ku.RunFolder(run).read_record()["sessions"]) == 2  # it went on
    executed = json.loads((output / "notebooks" / f"{run.name}.ipynb").read_text())
    assert executed["metadata"]["papermill"]["exception"] is None
    before = fingerprint(run)
    code, shown = call("--grid", "lr=1e-4,1e-3", **settings)
    assert code == 0 and "0 finished now, 2 before" in shown and fingerprint(run) == before
    assert_compared(output, tmp_path / "comparison")


def assert_compared(runs, folder):
    """compare.ipynb and its page, of runs with rates 0.0001 and 0.001 and one that failed."""
    parameters = [("runs_dir", runs), ("baseline", "lr=0.0001"), ("output_dir", folder)]
    done, executed = papermill("compare.ipynb", runs.parent / "compare.ipynb", *parameters)
    assert done.returncode == 0, done.stderr
    assert "2 configurations, 40 rows, 2 folds, 1 seeds\nbaseline: lr=0.0001" in printed(executed)
    table = pd.read_csv(folder / "comparison.csv").set_index(["checkpoint", "configuration"])
    assert list(table.index) == [(kind, f"lr={lr}") for kind in ("last", "best") for lr in ("0.0001", "0.001")]
    scores = pd.read_csv(folder / "scores.csv").set_index("configuration")
    record = ku.RunFolder(runs / "lr-0.001_seed-0").read_record()
    assert scores["rmse last"]["lr=0.001"] == pytest.approx(record["oof"]["last"], abs=1e-5)
    page = folder / "page.html"
    command = [sys.executable, ROOT / "tools" / "report.py", runs.parent / "compare.ipynb", "-o", page]
    subprocess.run(command, check=True)
    text = page.read_text(encoding="utf-8")
    assert len(re.findall('<img[^>]*src="data:image/png;base64,', text)) == 4
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)


def test_a_killed_worker_is_a_failure_and_the_next_call_trains_that_run_alone(base, call, stub, output):
    first, second = (f"epochs-{n}_seed-0" for n in (5000, 1))
    process = start_with_stub(*base(epochs=None), "--grid", "epochs=5000,1")
    wait_for((output / first / "oof.csv").is_file)
    worker = papermill_of(first, psutil.Process(process.pid))
    for process_of_it in (*worker.children(), worker):
        process_of_it.kill()
    shown = process.communicate()[0]
    assert process.returncode == 1
    assert f"{first}: failed: papermill was ended by SIGKILL" in shown
    assert "2 runs: 1 finished now, 0 before, 0 finished elsewhere, 1 failed, 0 running elsewhere" in shown
    before = fingerprint(output / second)
    code, shown = call("--grid", "epochs=5000,1", epochs=None)
    assert code == 0 and "1 finished now, 1 before" in shown
    assert stub == [first] and fingerprint(output / second) == before


def test_a_run_whose_sweep_was_killed_goes_on_and_no_other_sweep_starts_it(base, call, stub, output):
    run = output / "head-cls_seed-0"
    process = start_with_stub(*base(epochs=2), "--grid", "head=cls")
    wait_for((run / "oof.csv").is_file)
    worker = papermill_of(run.name, psutil.Process(process.pid))
    worker.suspend()  # or the run could be over before the second call looks
    try:
        process.kill()
        process.communicate()
        code, shown = call("--grid", "head=cls", epochs=2)
    finally:
        worker.resume()
    assert code == 1 and "0 before, 0 finished elsewhere, 0 failed, 1 running elsewhere" in shown
    psutil.wait_procs([worker], timeout=60)
    before = fingerprint(run)
    code, shown = call("--grid", "head=cls", epochs=2)
    assert code == 0 and "0 finished now, 1 before" in shown
    assert stub == [] and fingerprint(run) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_request_to_end_leave_no_process_and_keep_what_is_finished(base, output, number):
    grid = ["--grid", "epochs=1,5000,6000"]
    process = start_with_stub(*base(epochs=None), *grid)
    children = psutil.Process(process.pid).children
    descendants = wait_for(lambda: len(found := children(recursive=True)) == 2 and found)
    before = fingerprint(output / "epochs-1_seed-0")
    process.send_signal(number)
    shown = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "stopped: 1 of 3 runs are complete and kept" in shown
    assert psutil.wait_procs(descendants, timeout=10)[1] == []
    assert fingerprint(output / "epochs-1_seed-0") == before
    assert not (output / "epochs-6000_seed-0").exists()


# In the place of papermill where its module is looked for: trains nothing, and waits for a file `go` beside the runs
PAPERMILL = f"""
import json, pathlib, sys, time, yaml
arguments = sys.argv[1:]
settings = yaml.safe_load(arguments[arguments.index("-y") + 1])
(notebook,) = [word for word in arguments if word.startswith(settings["output_dir"] + "/notebooks")]
while not pathlib.Path(settings["output_dir"], "go").exists():
    time.sleep(0.1)
text = {notebook_text()!r}
run = pathlib.Path(settings["output_dir"], settings["run_name"])
sys.argv[1:] = [notebook, text, run, json.dumps(settings), 0]
{STUB}
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Address of a local Ray cluster of two nodes with a core each, where papermill is PAPERMILL."""
    pytest.importorskip("ray.cluster_utils", reason="Ray is not installed: pip install ray")
    import ray
    from ray.cluster_utils import Cluster

    (tmp_path / "stub" / "papermill").mkdir(parents=True)
    (tmp_path / "stub" / "papermill" / "__main__.py").write_text(PAPERMILL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stub"))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made.address
    ray.shutdown()
    made.shutdown()


def raylets(output):
    """Process ids of the grandparents of the papermill processes that run for a folder."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "papermill" in words and any(str(output) in word for word in words):
                found.add(process.parent().ppid())
    return found


def test_a_ray_cluster_trains_the_cells_on_its_nodes_and_the_same_grid_goes_on_without_it(base, call, output, cluster):
    process = start(*base(), "--grid", "head=cls,max", "--ray", cluster)
    wait_for(lambda: len(raylets(output)) == 2)  # both at once, each under the daemon of another node
    (output / "go").touch()
    shown = process.communicate()[0]
    assert process.returncode == 0 and "2 runs: 2 finished now, 0 before" in shown, shown
    runs = [output / f"head-{head}_seed-0" for head in ("cls", "max")]
    before = [fingerprint(run) for run in runs]
    code, shown = call("--grid", "head=cls,max")
    assert code == 0 and "0 finished now, 2 before" in shown
    assert [fingerprint(run) for run in runs] == before

"""A grid of settings x seeds x folds: each cell is a papermill run of train.ipynb in a process of its own.

    python tools/sweep.py --grid head=cls,max,conv1d,lstm,concat --seeds 0,1,2 -o runs/heads
    python tools/sweep.py tools/grids/article.toml --set data_dir=path/to/clear --jobs 4 --per-gpu 4 -o runs/article
    python tools/sweep.py tools/grids/lr.toml --set data_dir=path/to/clear --ray auto -o runs/lr

A grid file is TOML: `seeds = [0, 1]`, a table [settings] that is the same in every run, and tables [[grid]] with a list
of values for each setting; every combination is run. The same command again goes on where it stopped: runs that are
complete in the folder of -o are skipped, those that failed or were killed go on from their checkpoints, and two
terminals may share a grid. Its folder `notebooks` has each run's executed notebook, log and lock, which lives as long
as the process. A run is complete once it has its scores: a notebook that fails after that, in a plot, is reported and
not repeated.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernel_utils"))
import kernel_utils as ku

FINISHED, TO_RUN, INTERRUPTED, ELSEWHERE = "finished", "to run", "interrupted, to go on", "running elsewhere"
TRAINED = "trained by another sweep by now"
OTHER, FOREIGN, STOPPED = "is complete with other settings", "is not a run: it has no record.json", "stopped"
PLACE = ("output_dir", "run_name")
KEEPING = ku._FREE - {"data_dir", "backbone", "pseudo_dir", "run_folds"}  # say where a run lies and how it is kept
ROWS = "data_dir id_column text_column pair_column prefix target_columns task max_rows".split()
ROWS += "n_folds fold_kind group_column fold_seed".split()  # settings that say which rows are in which fold
DEFAULTS = ku.Config().to_dict()
GRACE, POLL = 10, 0.5  # seconds: for papermill to end its kernel after Ctrl-C; between two looks at the runs


class Cell(NamedTuple):
    """One run of the grid."""

    name: str
    told: dict  # every setting, as papermill is given it: what the notebook's own cell says does not matter
    identity: dict  # every setting but those of keeping: equal in runs that are the same
    work: int  # training rows over all folds and epochs
    evaluations: int


# ---------------------------------------------------------------------------------------
# The cells of a grid


def read_grid(path):
    """Seeds, settings and blocks of a grid file."""
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ku.KitError(f"{path}: {error}") from None
    settings, blocks = content.get("settings", {}), content.get("grid", [{}])
    unknown = content.keys() - {"seeds", "settings", "grid"}
    problems = [f"there is no {name!r}, only seeds, [settings] and [[grid]]" for name in sorted(unknown)]
    if not isinstance(settings, dict):
        problems.append(f"settings must be a table [settings], got {settings!r}")
    if not (blocks and isinstance(blocks, list) and all(isinstance(block, dict) for block in blocks)):
        problems.append(f"grid must be tables [[grid]], got {blocks!r}")
        blocks = []
    lists = [item for block in blocks for item in block.items()]
    lists += [("seeds", content["seeds"])] if "seeds" in content else []
    bad = [(name, values) for name, values in lists if not (isinstance(values, list) and values)]
    problems += [f"{name} must be a list of values, got {values!r}" for name, values in bad]
    if problems:
        raise ku.KitError([f"{path}: {problem}" for problem in problems])
    return content.get("seeds"), settings, blocks


def combinations(asked):
    """For each cell the names of what varies, in order, and its settings."""
    seeds, settings, blocks = read_grid(asked.grid_file) if asked.grid_file else (None, {}, [{}])
    seeds, settings = asked.seeds or seeds, settings | dict(asked.set)
    in_file, in_grid = [name for block in blocks for name in block], [name for name, _ in asked.grid]
    varied = in_file + in_grid
    problems = [f"{name} is made by this tool and cannot be set" for name in PLACE if name in [*settings, *varied]]
    problems += [f"{name} is in --set and in the grid: leave one out" for name, _ in asked.set if name in varied]
    again = [name for number, name in enumerate(in_grid, len(in_file)) if name in varied[:number]]
    problems += [f"--grid {name} is given twice, or in the grid file too: leave one out" for name in again]
    for option, values, name in (("seeds", seeds, "seed"), ("--folds", asked.folds, "run_folds")):
        if values and name in [*settings, *varied]:
            problems.append(f"{option} and the setting {name} are given: leave one out")
    if problems:
        raise ku.KitError(problems)
    last = {"seed": seeds or [settings.get("seed", 0)]} | ({"run_folds": asked.folds} if asked.folds else {})
    for block in blocks:
        axes = block | dict(asked.grid)
        axes |= {name: values for name, values in last.items() if name not in axes}
        for values in itertools.product(*axes.values()):
            yield list(axes), settings | dict(zip(axes, values, strict=True))


def collect(function, items, kind):
    """`function` of every item; one error of this kind lists the distinct problems of all."""
    results, problems = [], {}
    for item in items:
        try:
            results.append(function(item))
        except ku.KitError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise kind(problems)
    return results


def name_run(cfg, names, asked, settings):
    """`head=cls+llrd=0.95+seed=0`: what varies, in the characters that run_name allows."""
    values = {name: settings[name] if name == "recipe" else getattr(cfg, name) for name in names}
    values |= {"backbone": ku._short_name(cfg.backbone)} if "backbone" in values else {}
    values |= {name: ",".join(map(str, value)) for name, value in values.items() if isinstance(value, tuple)}
    names = ["fold" if name == "run_folds" and asked.folds else name for name in names]
    text = "+".join(f"{name}={value}" for name, value in zip(names, values.values(), strict=True))
    return re.sub(r"[^\w.=+-]", "-", text)


def identity(settings):
    """Settings without those of keeping, as JSON has them; what an older record lacks was the default."""
    settings = {name: value for name, value in (DEFAULTS | settings).items() if name not in KEEPING}
    return json.loads(json.dumps(settings))


def read_folds(cfg):
    """Frame with the fold of every training row."""
    with contextlib.redirect_stdout(io.StringIO()):  # what it says is for the notebook
        return ku.make_folds(ku._read_train(cfg, ku._find_data_dir(cfg.data_dir, "train.csv")), cfg)[["fold"]]


def measure(cfg, frame):
    """Training rows over all folds and epochs, and the number of evaluations."""
    rows = [int((frame["fold"] != fold).sum()) for fold in ku._requested_folds(frame, cfg)]
    evaluations = [len(ku._evaluation_steps(math.ceil(n / cfg.batch_size), cfg)) for n in rows]
    return sum(rows) * cfg.epochs, sum(evaluations)


def make_cells(asked):
    """Every distinct cell of the grid, with all settings and backbones checked and the data read once."""
    varied, settings = zip(*combinations(asked), strict=True)
    configs = collect(ku.Config.from_dict, settings, ku.ConfigError)
    data = [ku.Config(**{name: getattr(cfg, name) for name in ROWS}) for cfg in configs]
    distinct = list(dict.fromkeys(data))
    frames = dict(zip(distinct, collect(read_folds, distinct, ku.DataError), strict=True))
    sizes = collect(lambda pair: measure(pair[0], frames[pair[1]]), zip(configs, data, strict=True), ku.ConfigError)
    collect(ku._find_backbone, dict.fromkeys(cfg.backbone for cfg in configs), ku.ConfigError)
    cells = {}
    for cfg, names, given, size in zip(configs, varied, settings, sizes, strict=True):
        place = {"output_dir": asked.output, "run_name": name_run(cfg, names, asked, given)}
        told = dataclasses.replace(cfg, **place).to_dict()
        cell = Cell(place["run_name"], told, identity(told), *size)
        cells.setdefault(json.dumps(cell.identity), cell)
    names = Counter(cell.name for cell in cells.values())
    problems = [f"{count} different runs would be called {name}" for name, count in names.items() if count > 1]
    problems += [f"{name}: a name has at most 200 characters" for name in names if len(name.encode()) > 200]
    if problems:
        raise ku.ConfigError([*problems, "split the grid into several folders"])
    return list(cells.values())


# ---------------------------------------------------------------------------------------
# What is there already


def read_record(folder):
    """The record of a run, or nothing where it has none yet."""
    path = folder / "record.json"
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["status"], record["settings"]
    except (ValueError, TypeError, KeyError) as error:
        raise ku.KitError(f"{path} is not the record of a run ({type(error).__name__}): delete or mend it") from None
    return record


def state(folder, wanted):
    """What the folder of a cell holds; `wanted` is the cell's identity."""
    if not folder.exists():
        return TO_RUN
    record = read_record(folder)
    if not record:  # a run makes the folder, then the record
        begun = folder.is_dir() and {path.name for path in folder.iterdir()} <= {".lock", ".record.json.tmp"}
        return INTERRUPTED if begun else FOREIGN
    if record.get("status") != "complete":
        return INTERRUPTED
    return FINISHED if identity(record["settings"]) == wanted else OTHER


def complete_records(output):
    """Records of the complete runs in a folder."""
    records = [read_record(path.parent) for path in sorted(output.glob("*/record.json"))]
    return [record for record in records if record.get("status") == "complete"]


def finished(cells, output):
    """Those of the cells that a complete run in the folder has the settings of, whatever it is called."""
    done = [identity(record["settings"]) for record in complete_records(output)]
    return [cell for cell in cells if cell.identity in done]


def changes(folder, wanted):
    """`epochs was 3, now 5`, for each setting that differs from the record's."""
    was = identity(read_record(folder)["settings"])
    names = [name for name in {**wanted, **was} if was.get(name) != wanted.get(name)]
    return "; ".join(f"{name} was {was.get(name)!r}, now {wanted.get(name)!r}" for name in names)


def states(cells, output):
    """The state of each cell, by name. KitError lists every folder that stands in the way."""
    done = finished(cells, output)
    found = {cell.name: FINISHED if cell in done else state(output / cell.name, cell.identity) for cell in cells}
    problems = [f"{output / name} {FOREIGN}" for name, what in found.items() if what == FOREIGN]
    other = [cell for cell in cells if found[cell.name] == OTHER]
    problems += [f"{cell.name} {OTHER}: {changes(output / cell.name, cell.identity)}" for cell in other]
    if problems:
        raise ku.KitError([*problems, "choose another -o, or delete what is named here"])
    return found


# ---------------------------------------------------------------------------------------
# One run. Ray sends these functions to its workers, which import nothing of this kit for them


def command(cell, notebook):
    told = yaml.safe_dump(cell.told)  # as JSON, 1e-05 would be text
    papermill = [sys.executable, "-m", "papermill", "--no-progress-bar"]
    return [*papermill, str(ROOT / "notebooks" / "train.ipynb"), str(notebook), "-y", told]


def failure(notebook, log, code):
    """Why papermill ended with this exit code: the error in the notebook, else the last line of the log."""
    if code < 0:
        return f"papermill was ended by {signal.Signals(-code).name}"
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError):  # none yet, or a disk that is full
        cells = []
    errors = [out for cell in cells for out in cell.get("outputs", []) if out["output_type"] == "error"]
    if errors:
        lines = [line.strip() for line in errors[0]["evalue"].splitlines()[:3]]
        return f"{errors[0]['ename']}: {' '.join(lines)}"
    lines = log.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), f"papermill ended with exit code {code}")


def end(process):
    """Ctrl-C for papermill, which ends its kernel; SIGKILL if that takes too long: the kernel then ends by itself."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)


def lock_path(cell, output):
    """One for all cells that are the same run, whatever they are called."""
    digest = hashlib.sha256(json.dumps(cell.identity, sort_keys=True).encode()).hexdigest()
    return output / "notebooks" / f"{digest[:16]}.lock"


def run_cell(cell, output, folder, drop_weights, environment=None, stopped=lambda: False):
    """Train a cell in a process of its own, started in `folder`, and wait. Returns FINISHED, or what is in the way.

    The process inherits the lock: it is held until the process ends, even if this one is killed, and never longer.
    """
    run, notebooks = output / cell.name, output / "notebooks"
    notebook, log = notebooks / f"{cell.name}.ipynb", notebooks / f"{cell.name}.log"
    with open(lock_path(cell, output), "w") as lock:  # it stays: deleting one that another opens frees both
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ELSEWHERE
        if finished([cell], output):
            return TRAINED
        what = state(run, cell.identity)
        if what not in (TO_RUN, INTERRUPTED):
            return what
        notebook.unlink(missing_ok=True)
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command(cell, notebook),
                cwd=folder,
                env=os.environ | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # Ctrl-C reaches the sweep alone
            )
        try:
            while process.poll() is None and not stopped():
                time.sleep(POLL / 2)
        finally:
            end(process)
        if stopped():
            return STOPPED
        complete = state(run, cell.identity) == FINISHED
        if drop_weights and complete:
            for weights in run.glob("fold*/model.safetensors"):
                weights.unlink()
        if process.returncode:
            problem = failure(notebook, log, process.returncode)
            return (
                f"its scores are complete and kept, but not the rest of the notebook: {problem}"
                if complete
                else problem
            )
        return FINISHED


# ---------------------------------------------------------------------------------------
# Many runs: on this machine, or on a Ray cluster


def gpu_names():
    """What CUDA_VISIBLE_DEVICES calls the GPUs of this machine that may be used."""
    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible is not None else [str(number) for number in range(count)]


def count_jobs(asked, gpus):
    """How many runs go side by side."""
    room = len(gpus) * asked.per_gpu
    if room and (asked.jobs or 0) > room:
        raise ku.KitError(
            f"--jobs {asked.jobs} is more than {len(gpus)} GPUs with {asked.per_gpu} runs each take: raise --per-gpu"
        )
    return asked.jobs or room or 1


def slot_environment(slot, jobs, gpus):
    """Variables of the runs in a slot: its GPU, or on a CPU its share of the cores."""
    if gpus:
        return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    return {"OMP_NUM_THREADS": str(max(1, cores() // jobs))} if jobs > 1 and "OMP_NUM_THREADS" not in os.environ else {}


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def submit_here(cells, job, jobs, gpus):
    """Futures of the cells, `jobs` of them at a time, and a function that stops them all."""
    slots, stopping = queue.SimpleQueue(), threading.Event()
    for slot in range(jobs):
        slots.put(slot)

    def run(cell):
        slot = slots.get()
        try:
            return run_cell(cell, *job, slot_environment(slot, jobs, gpus), stopping.is_set)
        finally:
            slots.put(slot)

    def stop():
        stopping.set()
        pool.shutdown(cancel_futures=True)

    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    return {pool.submit(run, cell): cell for cell in cells}, stop


def connect_ray(address):
    try:
        import ray
    except ImportError:
        raise ku.KitError("--ray needs the package ray: pip install ray") from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ku.KitError(f"--ray {address}: {error}") from None
    if __name__ != "__main__":  # what the main script defines, Ray sends by itself
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return ray


def submit_ray(cells, job, ray, per_gpu):
    """As `submit_here`: each cell is a task, and the cluster decides by its GPUs, or cores, how many run."""
    share = {"num_gpus": 1 / per_gpu} if ray.cluster_resources().get("GPU") else {"num_cpus": 1}
    task = ray.remote(max_retries=0, **share)(run_cell)
    references = [task.remote(cell, *job) for cell in cells]
    futures = [reference.future() for reference in references]

    def stop():
        for reference in references:
            ray.cancel(reference)
        concurrent.futures.wait(futures, 3 * GRACE)

    return dict(zip(futures, cells, strict=True)), stop


def outcome(future, cell, output):
    """FINISHED, ELSEWHERE, or what went wrong with a cell."""
    if error := future.exception():  # a full disk, or a worker of Ray that died
        return f"{type(error).__name__}: {str(error).strip().split(chr(10))[-1]}"
    what = future.result()
    if what == FINISHED and state(output / cell.name, cell.identity) != FINISHED:
        return f"it ended well but {output / cell.name} is no complete run (with --ray all nodes must share -o)"
    return what


def rows_so_far(cell, output, began):
    """Training rows that a run has behind it, by the evaluations in its log since `began`."""
    log = output / cell.name / "log.jsonl"
    try:
        lines = log.read_text().splitlines(keepends=True) if log.stat().st_mtime >= began else []
    except OSError:
        return 0
    evaluations = sum(line.endswith("\n") and '"loss"' not in line for line in lines)
    return cell.work * min(evaluations, cell.evaluations) // cell.evaluations


def report(name, record):
    """The line of a finished run."""
    oof, seconds = record["oof"], record["seconds"]["total"]
    return f"{name}: {oof['metric']} {oof['last']:.4f} last, {oof['best']:.4f} best, {seconds:.0f} s"


@contextlib.contextmanager
def caught_signals():
    """List of the Ctrl-C and SIGTERM that come, which raise nothing: an exception could leave a process behind."""
    caught, numbers = [], (signal.SIGINT, signal.SIGTERM)
    old = [signal.signal(number, lambda number, _: caught.append(number)) for number in numbers]
    try:
        yield caught
    finally:
        for number, handler in zip(numbers, old, strict=True):
            signal.signal(number, handler)


def train_cells(todo, before, output, submit):
    """Run the cells and say of each how it ended. Returns what failed, by name, and whether a signal stopped it.

    The bar counts training rows; `before` are those of the runs that were finished.
    """
    began, failed, done = time.time(), {}, before
    total, every = before + sum(cell.work for cell in todo), 1 if sys.stderr.isatty() else 30
    bar = tqdm(total=total, initial=before, unit=" rows", unit_scale=True, smoothing=0, miniters=0, mininterval=every)
    with caught_signals() as signals, bar:
        futures, stop = submit(todo)
        try:
            while futures and not signals:
                for future in concurrent.futures.wait(futures, POLL, concurrent.futures.FIRST_COMPLETED).done:
                    cell = futures.pop(future)
                    what = outcome(future, cell, output)
                    if what == FINISHED:
                        done += cell.work
                        bar.write(report(cell.name, read_record(output / cell.name)))
                        continue
                    bar.total -= cell.work
                    if what not in (ELSEWHERE, TRAINED):
                        failed[cell.name] = f"{what} ({output / 'notebooks' / cell.name}.ipynb)"
                    bar.write(
                        f"{cell.name}: failed: {failed[cell.name]}" if cell.name in failed else f"{cell.name}: {what}"
                    )
                bar.set_description(f"{len(futures)} of {len(todo)} runs left", refresh=False)
                bar.update(done + sum(rows_so_far(cell, output, began) for cell in futures.values()) - bar.n)
            if signals:
                bar.write("stopping the runs")
        finally:
            if futures:  # a signal, or an error of this process such as a closed pipe
                stop()
    return failed, bool(signals)


# ---------------------------------------------------------------------------------------
# Before anything runs


def probe(cell, threads):
    """Training rows a second in a short run of few rows, evaluations included."""
    few = dict(max_rows=1024 if torch.cuda.is_available() else 64, n_folds=2, epochs=1, run_folds="all", report_to="")
    if cell.identity["max_rows"]:
        few["max_rows"] = min(few["max_rows"], cell.identity["max_rows"])
    silent = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(silent),
        contextlib.redirect_stderr(silent),
    ):
        cfg = ku.Config.from_dict(cell.told | few | {"output_dir": folder})
        frame = ku.make_folds(ku._read_train(cfg, ku._find_data_dir(cfg.data_dir, "train.csv")), cfg)
        torch.set_num_threads(threads)
        run = ku.train(frame, dataclasses.replace(cfg, run_folds=str(frame["fold"].min())))
        record = read_record(run)
    seconds = record["seconds"]["train"] + record["seconds"]["evaluate"]
    return record["rows_per_second"] * record["seconds"]["train"] / seconds


def estimate(todo, output, jobs, gpus):
    """The line on how long the cells will take: by the finished runs of the folder, else by a probe."""
    rows, records = sum(cell.work for cell in todo), complete_records(output)
    if records:
        seconds = sum(record["seconds"]["total"] for record in records)
        rate = sum(record["rows_per_second"] * record["seconds"]["train"] for record in records) / seconds
        source = f"as in the {len(records)} runs that are finished"
    else:
        try:
            rate = probe(todo[0], cores() if gpus else max(1, cores() // jobs))
        except (ku.KitError, ArithmeticError, RuntimeError) as error:
            return f"the time cannot be estimated, a probe of few rows fails: {error}"
        source = f"rough: by a probe of few rows of {todo[0].name}"
    time_left = tqdm.format_interval(rows / rate / jobs)
    return f"about {time_left} for {rows:,} training rows, {jobs} at a time, at {rate:.1f} rows/s each ({source})"


def assignment(text):
    """`NAME=VALUE` of a command line -> (name, value)."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def parse():
    def axis(text):
        name, values = assignment(text)
        return name, values.split(",")

    def count(text):
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("grid_file", nargs="?", help="TOML file with seeds, [settings] and [[grid]]")
    values = "values to try, in every block; values that are lists themselves need a grid file"
    add("--grid", metavar="NAME=V1,V2", type=axis, action="append", default=[], help=values)
    add("--set", metavar="NAME=VALUE", type=assignment, action="append", default=[], help="a setting of every run")
    add("--seeds", type=lambda text: text.split(","), help="such as 0,1,2; default: those of the file, else 0")
    add("--folds", type=lambda text: text.split(","), help="such as 0,1,2: each fold a run of its own")
    add("-o", "--output", required=True, help="folder of the run folders")
    add("--jobs", type=count, help="runs side by side; default: --per-gpu for each GPU, on a CPU 1")
    add("--per-gpu", type=count, default=1, help="runs that may share a GPU; default 1")
    add("--ray", metavar="ADDRESS", help="run on this Ray cluster; nodes see clone, data and -o by the same paths")
    add("--drop-weights", action="store_true", help="delete the weights of each run that this call completes")
    add("--dry-run", action="store_true", help="list the runs and estimate the time; changes nothing")
    asked = parser.parse_args()
    if asked.ray and asked.jobs:
        parser.error("--ray decides by the cluster's resources how many run: leave out --jobs")
    return asked


def check_folders(folder, output):
    if ROOT not in (folder, *folder.parents) and not ku._on_kaggle():
        raise ku.KitError(f"start this in {ROOT} or below: train.ipynb looks for the module from there, not {folder}")
    if output.exists() and not output.is_dir():
        raise ku.KitError(f"-o {output} is a file; it must be a folder, or not exist")


def show(cells, found, output, jobs, gpus):
    """The dry run."""
    for cell in cells:
        print(f"{cell.name}: {found[cell.name]}")
    todo = [cell for cell in cells if found[cell.name] != FINISHED]
    print(f"{len(cells)} runs: {len(cells) - len(todo)} finished, {len(todo)} to run")
    if todo:
        print(estimate(todo, output, jobs, gpus))


def sweep(asked):
    """Do what the command line asks for; the exit code."""
    folder, output, gpus = Path.cwd(), Path(asked.output).expanduser().absolute(), gpu_names()
    check_folders(folder, output)
    jobs = 1 if asked.ray else count_jobs(asked, gpus)
    cells = make_cells(asked)
    found = states(cells, output)
    if asked.dry_run:
        show(cells, found, output, jobs, gpus)
        return 0
    todo = [cell for cell in cells if found[cell.name] != FINISHED]
    failed, stopped = {}, False
    if todo:
        job = (output, folder, asked.drop_weights)
        submit = functools.partial(submit_here, job=job, jobs=jobs, gpus=gpus)
        if asked.ray:
            submit = functools.partial(submit_ray, job=job, ray=connect_ray(asked.ray), per_gpu=asked.per_gpu)
        (output / "notebooks").mkdir(parents=True, exist_ok=True)
        rows_before = sum(cell.work for cell in cells if found[cell.name] == FINISHED)
        failed, stopped = train_cells(todo, rows_before, output, submit)
    done = [cell for cell in finished(cells, output) if cell.name not in failed]
    if stopped:
        print(f"stopped: {len(done)} of {len(cells)} runs are complete and kept; the next call trains the others")
        return 130
    before = len(cells) - len(todo)
    elsewhere = len(cells) - len(done) - len(failed)
    counts = f"{len(done) - before} finished now, {before} before, {len(failed)} failed, {elsewhere} running elsewhere"
    print("\n  ".join([f"{len(cells)} runs: {counts}", *(f"{name}: {problem}" for name, problem in failed.items())]))
    if len(done) < len(cells):
        return 1
    print(f"compare them: papermill notebooks/compare.ipynb compare.out.ipynb -p runs_dir {shlex.quote(asked.output)}")
    return 0


def main():
    try:
        sys.exit(sweep(parse()))
    except ku.KitError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

"""A grid of settings x seeds x folds, each cell a papermill run of train.ipynb in its own process.

    python tools/sweep.py --grid head=cls,max,conv1d,lstm,concat --seeds 0,1,2 -o runs/heads
    python tools/sweep.py tools/grids/lr.toml --set data_dir=path/to/clear --jobs 4 -o runs/lr
    python tools/sweep.py tools/grids/lr.toml --set data_dir=path/to/clear --ray auto -o runs/lr

A grid file is TOML: `seeds = [0, 1]`, a table [settings] for every run, and tables [[grid]] with a
list of values for each setting, of which every combination is run. The same command again goes on
where it stopped, and two terminals may share a grid. `notebooks` in the folder of -o has each run's
executed notebook, log and lock. A run is complete once it has its scores: a notebook that fails
after that is reported and not repeated.
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
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernel_utils"), str(ROOT / "tools")]
import kaggle_metadata

import kernel_utils as ku

# Settings: made by this tool; without effect on what is trained; of which rows are in which fold
PLACE = ("output_dir", "run_name")
KEEPING = {*ku.Config.names("place"), "recipe"} - {"run_folds"}
ROWS = "data_dir train_file id_column text_columns template numeric_texts preprocess".split()
ROWS += "target_columns task max_rows n_folds fold_kind group_column group_duplicates".split()
ROWS += ["fold_seed"]
DEFAULTS = ku.Config().to_dict()

# States of a cell before it runs, and outcomes other than an error
TO_RUN, INTERRUPTED, FINISHED = "to run", "interrupted, to go on", "finished"
ELSEWHERE, TRAINED, STOPPED = "running elsewhere", "finished elsewhere", "stopped"
OTHER, FOREIGN = "is complete with other settings", "is not a run: it has no record.json"

MAX_RECORD_BYTES = 2**28  # those of real runs have some kilobytes
GRACE = 10  # seconds for papermill to end its kernel after Ctrl-C
POLL = 0.5  # seconds between two looks at the runs


class Cell(NamedTuple):
    """One run of the grid."""

    name: str
    settings: dict  # all of them, so that what the notebook's own cell says does not matter
    identity: str  # settings but those of keeping, as JSON: equal in runs that are the same
    rows: int  # to train on, over all folds and epochs

    @property
    def digest(self):
        return hashlib.sha256(self.identity.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------
# The cells of a grid


def read_grid(path):
    """Seeds, settings and blocks of a grid file."""
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ku.KitError(f"{path}: {error}") from None
    seeds, settings = content.get("seeds"), content.get("settings", {})
    blocks, problems = content.get("grid", [{}]), []
    for name in sorted(content.keys() - {"seeds", "settings", "grid"}):
        problems.append(f"there is no {name!r}, only seeds, [settings] and [[grid]]")
    if not isinstance(settings, dict):
        problems.append(f"settings must be a table [settings], got {settings!r}")
    is_tables = isinstance(blocks, list) and all(isinstance(block, dict) for block in blocks)
    if not (blocks and is_tables):
        problems.append(f"grid must be tables [[grid]], got {blocks!r}")
        blocks = []
    for block in ({"seeds": seeds} if "seeds" in content else {}, *blocks):
        for name, values in block.items():
            if not isinstance(values, list) or not values:
                problems.append(f"{name} must be a list of values, got {values!r}")
    if problems:
        raise ku.KitError([f"{path}: {problem}" for problem in problems])
    return seeds, settings, blocks


def check_given_once(args, seeds, settings, blocks):
    """Everything but [settings], which the rest overrides, may name a setting once."""
    sources = [("the grid file", name) for name in set(itertools.chain(*blocks))]
    sources += [("--set", name) for name in dict(args.set)]
    sources += [("--grid", name) for name, _ in args.grid]
    if seeds:
        sources.append(("seeds", "seed"))
    if args.folds:
        sources.append(("--folds", "run_folds"))
    places = {name: [] for name in settings}
    for source, name in sources:
        places.setdefault(name, []).append(source)
    problems = [f"{name} is made by this tool" for name in PLACE if name in places]
    for name, named in places.items():
        if len(named) > 1:
            problems.append(f"{name} is given by {' and by '.join(named)}: leave one out")
    if problems:
        raise ku.KitError(problems)


def combinations(args):
    """For each cell the names of what varies, in order, and its settings."""
    seeds, settings, blocks = None, {}, [{}]
    if args.grid_file:
        seeds, settings, blocks = read_grid(args.grid_file)
    seeds = args.seeds or seeds
    check_given_once(args, seeds, settings, blocks)
    settings = settings | dict(args.set)
    last = {"seed": seeds or [settings.get("seed", 0)]}
    if args.folds:
        last["run_folds"] = args.folds
    for block in blocks:
        axes = block | dict(args.grid)
        axes |= {name: values for name, values in last.items() if name not in axes}
        for values in itertools.product(*axes.values()):
            yield list(axes), settings | dict(zip(axes, values, strict=True))


def collect(function, items):
    """`function` of every item; one error lists the distinct problems of all."""
    results, problems, kind = [], {}, None
    for item in items:
        try:
            results.append(function(item))
        except ku.KitError as error:
            kind = type(error)
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise kind(problems)
    return results


def name_run(cfg, names, settings, single_folds):
    """`head-cls_llrd-0.95_seed-0`: what varies, in a name that files can have everywhere."""
    parts = []
    for name in names:
        value = settings[name] if name == "recipe" else getattr(cfg, name)
        if name == "backbone":
            value = ku._short_name(value)
        if isinstance(value, bool):
            value = str(value).lower()
        if isinstance(value, tuple):
            value = "-".join(map(str, value))
        label = "fold" if name == "run_folds" and single_folds else name
        parts.append(f"{label}-{value}")
    return kaggle_metadata.safe_name("_".join(parts))


def identity(settings):
    """Settings without those of keeping, as JSON. What an older record lacks was the default."""
    settings = {name: v for name, v in (DEFAULTS | settings).items() if name not in KEEPING}
    return json.dumps(settings, sort_keys=True)


@contextlib.contextmanager
def silence():
    """What functions of the kit print is for the notebook."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


@functools.cache
def read_folds(settings):
    """The folds of the training rows that these settings, in JSON, make."""
    cfg = ku.Config(**json.loads(settings))
    with silence():
        return ku.make_folds(ku._read_train(cfg), cfg)[["fold"]]


def count_rows(cfg):
    """Rows to train on, over all folds and epochs."""
    folds = read_folds(json.dumps({name: getattr(cfg, name) for name in ROWS}))
    chosen = cfg.folds_to_run(folds)
    return cfg.epochs * sum(int((folds["fold"] != fold).sum()) for fold in chosen)


def make_cells(args):
    """Every distinct cell of the grid, with all settings, backbones and the data checked."""
    varied, given = zip(*combinations(args), strict=True)
    configs = collect(ku.Config.from_dict, given)
    rows = collect(count_rows, configs)
    collect(ku._find_backbone, dict.fromkeys(cfg.backbone for cfg in configs))
    cells = {}
    for cfg, axes, settings, n_rows in zip(configs, varied, given, rows, strict=True):
        name = name_run(cfg, axes, settings, bool(args.folds))
        settings = dataclasses.replace(cfg, output_dir=args.output).to_dict()
        cell = Cell(name, settings, identity(settings), n_rows)
        cells.setdefault(cell.identity, cell)
    return [*name_apart(cells, find_names(Path(args.output).expanduser()))]


def name_apart(cells, folders):
    """The cells under names of their own: that of the folder where such a run is, else the made
    one. Both are given by identity."""
    names = {key: folders[key] for key in cells if key in folders}
    for key, cell in cells.items():
        made = cell.name
        if made in names.values():
            made = f"{made[: kaggle_metadata.MAX_RUN_NAME - 9]}-{cell.digest[:8]}"
        name = names.setdefault(key, made)
        yield cell._replace(name=name, settings=cell.settings | {"run_name": name})


# ---------------------------------------------------------------------------------------
# What is there already


def read_record(folder):
    """The record of a run, or nothing where it has none yet."""
    path = folder / "record.json"
    if not path.is_file():
        return {}
    try:
        # the nodes of a Ray cluster have not imported the module, whose reader this would be
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise ValueError("too large")
        record = json.loads(path.read_text(encoding="utf-8"))
        DEFAULTS | record["settings"]
        if record["status"] == "complete":
            record["oof"]["metric"], record["oof"]["last"], record["oof"]["best"]
            seconds = record["seconds"]
            for number in (record["rows_per_second"], seconds["train"], seconds["total"]):
                if not 0 < number < math.inf:
                    raise ValueError(f"{number}")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        problem = f"{path} is not the record of a run ({type(error).__name__})"
        raise ku.KitError(f"{problem}: delete or mend it") from None
    return record


def state(folder, wanted):
    """What the folder of a cell holds; `wanted` is the cell's identity."""
    if not folder.exists():
        return TO_RUN
    record = read_record(folder)
    if not record:  # a run makes the folder, then the record
        is_begun = folder.is_dir() and all(name[0] == "." for name in os.listdir(folder))
        return INTERRUPTED if is_begun else FOREIGN
    if record["status"] != "complete":
        return INTERRUPTED
    return FINISHED if identity(record["settings"]) == wanted else OTHER


def complete_records(output):
    records = [read_record(path.parent) for path in sorted(output.glob("*/record.json"))]
    return [record for record in records if record.get("status") == "complete"]


def find_names(output):
    """The name of each run in a folder by its identity; a complete one goes before another."""
    names = {}
    for path in sorted(output.glob("[!.]*/record.json")):
        record, name = read_record(path.parent), path.parent.name
        if not record:  # no plain file
            continue
        if record["status"] == "complete":
            names[identity(record["settings"])] = name
        names.setdefault(identity(record["settings"]), name)
    return names


def finished(cells, output):
    """Those of the cells that a complete run in the folder is, whatever it is called."""
    done = [identity(record["settings"]) for record in complete_records(output)]
    return [cell for cell in cells if cell.identity in done]


def read_states(cells, output):
    """The state of each cell, by name. KitError lists every folder that stands in the way."""
    states, problems = {}, []
    for cell in cells:
        folder = output / cell.name
        states[cell.name] = state(folder, cell.identity)
        if states[cell.name] == FOREIGN:
            problems.append(f"{folder} {FOREIGN}")
        if states[cell.name] == OTHER:
            was, now = identity(read_record(folder)["settings"]), cell.identity
            was, now = json.loads(was), json.loads(now)
            names = [name for name in was | now if was.get(name) != now.get(name)]
            changes = [f"{name} was {was.get(name)!r}, now {now.get(name)!r}" for name in names]
            problems.append(f"{cell.name} {OTHER}: {'; '.join(changes)}")
    if problems:
        raise ku.KitError([*problems, "choose another -o, or delete what is named here"])
    return states


# ---------------------------------------------------------------------------------------
# One run. Ray sends these functions to its workers, which import nothing of this kit for them


def command(cell, notebook):
    settings = yaml.safe_dump(cell.settings)  # as JSON, 1e-05 would be text
    source = str(ROOT / "notebooks" / "train.ipynb")
    papermill = [sys.executable, "-m", "papermill", "--no-progress-bar"]
    return [*papermill, source, str(notebook), "-y", settings]


def failure(notebook, log, code):
    """Why papermill ended: the error in the notebook, else the last line of the log."""
    if code < 0:
        return f"papermill was ended by {signal.Signals(-code).name}"
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError):  # none yet, or a disk that is full
        cells = []
    for cell in cells:
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                lines = [line.strip() for line in output["evalue"].splitlines()[:3]]
                return f"{output['ename']}: {' '.join(lines)}"
    last = log.read_text(errors="replace").strip().rpartition("\n")[-1]
    return last or f"papermill ended with exit code {code}"


def end(process):
    """Ctrl-C for papermill, which ends its kernel, and SIGKILL if that takes too long."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)


def lock_path(cell, output):
    """One for all cells that are the same run, whatever they are called."""
    return output / "notebooks" / f"{cell.digest}.lock"


def run_cell(cell, output, folder, drop_weights, environment=None, should_stop=lambda: False):
    """Train a cell in a process started in `folder`. Returns FINISHED, or what is in the way."""
    run = output / cell.name
    # it stays, since another sweep may have opened it; nothing is written: it may be a hard link
    with open(lock_path(cell, output), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ELSEWHERE
        if finished([cell], output):
            return TRAINED
        before = state(run, cell.identity)
        if before not in (TO_RUN, INTERRUPTED):
            return before
        variables = os.environ | (environment or {})
        problem = run_papermill(cell, output, folder, lock, variables, should_stop)
        if problem == STOPPED:
            return STOPPED
        if state(run, cell.identity) != FINISHED:
            return problem or "papermill ended well, but the run is not complete"
        if drop_weights:
            for weights in run.glob("fold*/model.safetensors"):
                weights.unlink()
        if problem:
            kept = "its scores are complete and kept, but not the rest of the notebook"
            return f"{kept}: {problem}"
        return FINISHED


def run_papermill(cell, output, folder, lock, environment, should_stop):
    """Why papermill did not succeed, or None. The process inherits the lock: it is held until the
    process ends, even if this one is killed, and never longer."""
    notebook = output / "notebooks" / f"{cell.name}.ipynb"
    log = output / "notebooks" / f"{cell.name}.log"
    for path in (notebook, log):
        path.unlink(missing_ok=True)
    with open(log, "xb") as file:
        process = subprocess.Popen(
            command(cell, notebook),
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
            start_new_session=True,  # Ctrl-C reaches the sweep alone
        )
    try:
        while process.poll() is None and not should_stop():
            time.sleep(POLL / 2)
    finally:
        end(process)
    if should_stop():
        return STOPPED
    return failure(notebook, log, process.returncode) if process.returncode else None


# ---------------------------------------------------------------------------------------
# Many runs: on this machine, or on a Ray cluster


def gpu_names():
    """What CUDA_VISIBLE_DEVICES calls the GPUs of this machine that may be used."""
    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return visible.split(",")[:count]
    return [str(number) for number in range(count)]


def count_jobs(args, gpus):
    """How many runs go side by side."""
    room = len(gpus) * args.per_gpu
    if room and (args.jobs or 0) > room:
        taken = f"{len(gpus)} GPUs with {args.per_gpu} runs each take"
        raise ku.KitError(f"--jobs {args.jobs} is more than {taken}: raise --per-gpu")
    return args.jobs or room or 1


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def slot_environment(slot, jobs, gpus):
    """Variables of the runs in a slot: its GPU, or on a CPU its share of the cores."""
    if gpus:
        return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, cores() // jobs))}


def submit_here(cells, job, jobs, gpus):
    """Futures of the cells, `jobs` of them at a time, and a function that stops them all."""
    stopping, thread, slots = threading.Event(), threading.local(), itertools.count()

    def take_slot():
        thread.slot = next(slots)

    def run(cell):
        environment = slot_environment(thread.slot, jobs, gpus)
        return run_cell(cell, *job, environment, stopping.is_set)

    def stop():
        stopping.set()
        pool.shutdown(cancel_futures=True)

    pool = concurrent.futures.ThreadPoolExecutor(jobs, initializer=take_slot)
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
    """As `submit_here`: each cell is a task, and the cluster decides how many run."""
    has_gpus = ray.cluster_resources().get("GPU")
    share = {"num_gpus": 1 / per_gpu} if has_gpus else {"num_cpus": 1}
    task = ray.remote(max_retries=0, **share)(run_cell)
    references = [task.remote(cell, *job) for cell in cells]
    futures = [reference.future() for reference in references]

    def stop():
        for reference in references:
            ray.cancel(reference)
        concurrent.futures.wait(futures, 3 * GRACE)

    return dict(zip(futures, cells, strict=True)), stop


def outcome(future, cell, output):
    """FINISHED, ELSEWHERE, TRAINED, or what went wrong with a cell."""
    error = future.exception()
    if error:  # a full disk, or a worker of Ray that died
        last = str(error).strip().rpartition("\n")[-1]
        return f"{type(error).__name__}: {last}"
    result, run = future.result(), output / cell.name
    if result == FINISHED and state(run, cell.identity) != FINISHED:
        shared = "with --ray all nodes must share -o"
        return f"it ended well but {run} is no complete run ({shared})"
    return result


@contextlib.contextmanager
def catch_signals():
    """A list of the signals that come. They raise nothing: that could leave a process behind."""
    signals, numbers = [], (signal.SIGINT, signal.SIGTERM)
    old = {n: signal.signal(n, lambda number, _: signals.append(number)) for n in numbers}
    try:
        yield signals
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def train_cells(todo, n_before, output, submit):
    """Run the cells and say of each how it ended; `n_before` others were finished before. Returns
    the outcomes by name, and whether a signal stopped it."""
    outcomes, total = {}, n_before + len(todo)
    bar = tqdm(total=total, initial=n_before, unit=" runs", mininterval=0)
    with catch_signals() as signals, bar:
        futures, stop = submit(todo)
        try:
            while futures and not signals:
                first = concurrent.futures.FIRST_COMPLETED
                for future in concurrent.futures.wait(futures, POLL, first).done:
                    cell = futures.pop(future)
                    result = outcomes[cell.name] = outcome(future, cell, output)
                    if result == FINISHED:
                        record = read_record(output / cell.name)
                        oof, seconds = record["oof"], record["seconds"]["total"]
                        last, best = ku._score_text(oof["last"]), ku._score_text(oof["best"])
                        scores = f"{oof['metric']} {last} last, {best} best"
                        bar.write(f"{cell.name}: {scores}, {seconds:.0f} s")
                    elif result in (ELSEWHERE, TRAINED):
                        bar.write(f"{cell.name}: {result}")
                    else:
                        problem = f"{result} ({output / 'notebooks' / cell.name}.ipynb)"
                        outcomes[cell.name] = problem
                        bar.write(f"{cell.name}: failed: {problem}")
                    bar.update()
            if signals:
                bar.write("stopping the runs")
        finally:
            if futures:  # a signal, or an error of this process such as a closed pipe
                stop()
    return outcomes, bool(signals)


def estimate(todo, output, jobs):
    """How much there is to train and, by the finished runs of the folder, how long it will take."""
    records, rows = complete_records(output), sum(cell.rows for cell in todo)
    work = f"{rows:,} training rows, {jobs} at a time"
    if not records:
        return f"{work}; no run is finished yet that would tell how long they take"
    trained = sum(record["rows_per_second"] * record["seconds"]["train"] for record in records)
    rate = trained / sum(record["seconds"]["total"] for record in records)
    time_left = tqdm.format_interval(rows / rate / jobs)
    source = f"as in the {len(records)} runs that are finished"
    return f"about {time_left} for {work}, at {rate:.1f} rows/s each ({source})"


# ---------------------------------------------------------------------------------------
# Command line


def assignment(text):
    """`NAME=VALUE` of a command line -> (name, value)."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def split(text):
    return text.split(",")


def axis(text):
    name, values = assignment(text)
    return name, split(values)


def count(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def parse():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add, many = parser.add_argument, dict(action="append", default=[])
    values = "values to try, in every block; lists as values need a grid file"
    jobs = "runs side by side; default: --per-gpu for each GPU, on a CPU 1"
    ray = "run on this Ray cluster, whose nodes see clone, data and -o by the same paths"
    add("grid_file", nargs="?", help="TOML file with seeds, [settings] and [[grid]]")
    add("--grid", metavar="NAME=V1,V2", type=axis, **many, help=values)
    add("--set", metavar="NAME=VALUE", type=assignment, **many, help="a setting of every run")
    add("--seeds", type=split, help="such as 0,1,2; default: those of the file, else 0")
    add("--folds", type=split, help="such as 0,1,2: each fold a run of its own")
    add("-o", "--output", required=True, help="folder of the run folders")
    add("--jobs", type=count, help=jobs)
    add("--per-gpu", type=count, default=1, help="runs that may share a GPU; default 1")
    add("--ray", metavar="ADDRESS", help=ray)
    add("--drop-weights", action="store_true", help="delete the weights of runs completed now")
    add("--dry-run", action="store_true", help="list the runs and the time; changes nothing")
    args = parser.parse_args()
    if args.ray and args.jobs:
        parser.error("--ray decides by the cluster's resources how many run: leave out --jobs")
    return args


def sweep(args):
    """Do what the command line asks for; the exit code."""
    folder, output, gpus = Path.cwd(), Path(args.output).expanduser().absolute(), gpu_names()
    if ROOT not in (folder, *folder.parents) and not ku._Kaggle().is_here():
        where = f"start this in {ROOT} or below"
        raise ku.KitError(f"{where}: train.ipynb looks for the module from there, not {folder}")
    if output.exists() and not output.is_dir():
        raise ku.KitError(f"-o {output} is a file; it must be a folder, or not exist")
    notebooks = output / "notebooks"
    links = ku._link_problems(notebooks)
    is_else = notebooks.exists() and not notebooks.is_dir()
    if links or is_else or notebooks.is_symlink():  # logs and locks would be written elsewhere
        raise ku.KitError([f"{notebooks} must be a folder without links", *links])
    jobs = 1 if args.ray else count_jobs(args, gpus)
    cells = make_cells(args)
    states = read_states(cells, output)
    todo = [cell for cell in cells if states[cell.name] != FINISHED]
    before = len(cells) - len(todo)
    if args.dry_run:
        for cell in cells:
            print(f"{cell.name}: {states[cell.name]}")
        print(f"{len(cells)} runs: {before} finished, {len(todo)} to run")
        if todo:
            print(estimate(todo, output, jobs))
        return 0
    outcomes, is_stopped = {}, False
    if todo:
        job = (output, folder, args.drop_weights)
        submit = functools.partial(submit_here, job=job, jobs=jobs, gpus=gpus)
        if args.ray:
            ray = connect_ray(args.ray)
            submit = functools.partial(submit_ray, job=job, ray=ray, per_gpu=args.per_gpu)
        notebooks.mkdir(parents=True, exist_ok=True)
        outcomes, is_stopped = train_cells(todo, before, output, submit)
    ways = (FINISHED, TRAINED, ELSEWHERE)
    failed = {name: result for name, result in outcomes.items() if result not in ways}
    done = [cell for cell in finished(cells, output) if cell.name not in failed]
    if is_stopped:
        share = f"{len(done)} of {len(cells)} runs"
        print(f"stopped: {share} are complete and kept; the next call trains the others")
        return 130
    now = list(outcomes.values()).count(FINISHED)
    there, running = len(done) - before - now, len(cells) - len(done) - len(failed)
    counts = f"{now} finished now, {before} before, {there} finished elsewhere"
    print(f"{len(cells)} runs: {counts}, {len(failed)} failed, {running} running elsewhere")
    for name, problem in failed.items():
        print(f"  {name}: {problem}")
    if len(done) < len(cells):
        return 1
    notebook = shlex.quote(os.path.relpath(ROOT / "notebooks" / "compare.ipynb"))
    runs = shlex.quote(args.output)
    print(f"compare them: papermill {notebook} compare.out.ipynb -p runs_dir {runs}")
    return 0


def main():
    try:
        sys.exit(sweep(parse()))
    except ku.KitError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

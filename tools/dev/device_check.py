"""What a GPU has to show, in less than 8 minutes: is the fast path right, and how fast is it?

    bash tools/dev/device_check.sh [FOLDER_OF_A_COMPETITION]

Without a folder the texts are those of the sample. Nothing is fetched: where MiniLM is not
installed, its size with random weights and a tokenizer of the texts stand for it, and the score of
the whole run means nothing. The parts:

    tests            pytest -m gpu
    losses           steps in CUDA graphs beside plain ones, of the same batches: losses, and where
                     the weights go. With dropout their masks differ, so that two plain runs with
                     different masks say how near to each other they have to come
    bert-base        real tokens/s beside the Trainer, share of the matmul rate, memory, and what
    deberta-v3-base  CUDA graphs and DeBERTa's own attention bring: tools/dev/benchmark.py
    whole            a run from the start of Python to the submission: MiniLM, 5 folds, 3 epochs
    compile          what torch.compile brings at BERT-base size

Each part is a process with a time limit, and the others go on where one fails or hangs. All figures
and failures come into a JSON file in results/. The exit code is 1 if a part failed. What brings
neither 1.15 times the speed nor needs at most 0.8 of the memory is not worth its code.

`--cpu` tries this file out without a GPU, with tiny sizes; its figures mean nothing.
"""

import argparse
import contextlib
import datetime
import gc
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import benchmark
import torch

import kernel_utils as ku

ROOT = Path(__file__).resolve().parents[2]
# part -> seconds that are kept for it. What those before leave of theirs comes on top
LIMITS = {
    "tests": 80,
    "losses": 35,
    "bert-base": 60,
    "deberta-v3-base": 95,
    "whole": 85,
    "compile": 95,
}
# group of two contenders -> what the first has to be, and the second is not
USES = {"graphs": "is_captured", "own attention": "is_packed", "compile": "is_compiled"}
WORTH = {"speed": 1.15, "memory": 0.8}
STEPS = 50  # of `losses`
DROPOUT = 0.1
MAX_COSINE_LOSS, MAX_LENGTH_CHANGE = 0.02, 0.05  # of captured steps, beyond those of plain ones


# ---------------------------------------------------------------------------------------
# Parts
#
# A part gets the arguments and a dictionary `report`, which it fills; a list `failures` is in it.
# `save` writes what there is so far.


def check_tests(args, report, save):
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if has_gpu_tests(path)]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-rfE", "--tb=short"]
    command += ["-p", "no:cacheprovider", *map(str, files)]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)  # where a test hangs, the log ends with its name
            lines.append(line.strip())
    report["summary"] = lines[-1].strip("= ") if lines else ""
    if process.returncode:
        faults = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        ending = f"pytest ends with {process.returncode}: {report['summary']}"
        report["failures"] += faults or [ending]


def has_gpu_tests(path):
    """Other files may import what only their tests need."""
    return "mark.gpu" in path.read_text(encoding="utf-8")


def compare_losses(args, report, save):
    """Captured steps beside plain ones, and plain steps with other random numbers as yardstick."""
    options = make_options(args, "minilm", rounds=1, steps=STEPS)
    with tempfile.TemporaryDirectory() as temporary:
        folder, report["weights"] = benchmark.find_or_make(options.size, temporary, options.data)
        lab = benchmark.Lab(options, folder, "narrow")
        report["precision"] = lab.precision
        for dropout in (0.0, DROPOUT):
            plain = trace_steps(lab, dropout, "off")
            other = trace_steps(lab, dropout, "off", seed=1)
            captured = trace_steps(lab, dropout, "on")
            found = {
                "setup": captured["setup"],
                "plain_losses": plain["losses"],
                "captured_losses": captured["losses"],
                "captured_to_plain": compare_traces(captured, plain),
                "plain_to_plain": compare_traces(other, plain),
            }
            report[f"dropout {dropout:g}"] = found
            report["failures"] += loss_errors(found, dropout, lab.device)
            save()


def trace_steps(lab, dropout, cuda_graphs, seed=0):
    """Losses of the first steps of a fold, and how far they move the weights."""
    kit = benchmark.Kit(lab, backbone_dropout=dropout, cuda_graphs=cuda_graphs)
    engine = kit.engine
    engine.model.train()
    before = flat_weights(engine)
    torch.manual_seed(seed)
    batches = lab.data.batches(0, kit.cfg, engine.length_bucket)
    steps = enumerate(itertools.islice(batches, STEPS))
    losses = [engine(step, rows).values[0] for step, rows in steps]
    return {
        "losses": torch.stack(losses).tolist(),
        "movement": flat_weights(engine) - before,
        "setup": kit.setup(),
    }


def flat_weights(engine):
    weights = [p.detach().flatten().double() for p in engine.model.parameters()]
    return torch.cat(weights).cpu()


def compare_traces(trace, reference):
    losses, reference_losses = torch.tensor([trace["losses"], reference["losses"]])
    movement, expected = trace["movement"], reference["movement"]
    return {
        "largest_difference": (losses - reference_losses).abs().max().item(),
        "cosine": torch.cosine_similarity(movement, expected, dim=0).item(),
        "length": (movement.norm() / expected.norm()).item(),
    }


def loss_errors(found, dropout, device):
    errors = []
    captured, plain = found["captured_to_plain"], found["plain_to_plain"]
    if device.type == "cuda" and not found["setup"]["is_captured"]:
        errors.append(f"dropout {dropout:g}: steps were not captured, {found['setup']}")
    has_direction = captured["cosine"] >= plain["cosine"] - MAX_COSINE_LOSS
    length_change, allowed = abs(captured["length"] - 1), abs(plain["length"] - 1)
    if not has_direction or not length_change <= allowed + MAX_LENGTH_CHANGE:
        problem = "captured steps move the weights otherwise than plain ones"
        errors.append(f"dropout {dropout:g}: {problem}, {captured}; two plain runs: {plain}")
    return errors


def measure_bert(args, report, save):
    groups = {
        "trainer": ["kit", "dynamic", "tuned"],
        "graphs": ["kit-graphs", "kit-eager"],
    }
    measure_groups(args, "bert-base", groups, report, save)


def measure_deberta(args, report, save):
    groups = {
        "trainer": ["kit", "dynamic", "tuned"],
        "own attention": ["kit-eager", "kit-hf"],
        "graphs": ["kit-graphs", "kit-eager"],
    }
    measure_groups(args, "deberta-v3-base", groups, report, save)


def measure_compile(args, report, save):
    measure_groups(args, "bert-base", {"compile": ["kit-compile", "kit"]}, report, save)


def measure_groups(args, size, groups, report, save):
    """A race for each group: few models at a time fit into a small GPU."""
    report["groups"] = {}
    with tempfile.TemporaryDirectory() as temporary:
        size = make_options(args, size).size
        folder, _ = benchmark.find_or_make(size, temporary, args.folder)
        for group, names in groups.items():
            options = make_options(args, size, makes_shapes=group in ("graphs", "compile"))
            try:
                race = benchmark.Race(benchmark.Lab(options, folder, "narrow"), names)
                figures = race.run()
            except Exception as error:  # the other groups can still be measured
                report["failures"].append(f"{group}: {type(error).__name__}: {error}")
            else:
                report["groups"][group] = figures | {"batch_size": options.batch_size}
                if not args.cpu:
                    report["failures"] += setup_errors(group, figures, options.batch_size)
            save()
            race = None
            gc.collect()
            torch.cuda.empty_cache()


def setup_errors(group, figures, batch_size):
    """Why the figures of a group do not tell what they should."""
    setups = [result["setup"] for result in figures["contenders"].values() if "setup" in result]
    if group in USES and not setups[0][USES[group]]:
        yield f"{group}: not in use, {setups[0]}"
    if min(setup["micro_batch_size"] for setup in setups) < batch_size:
        yield f"{group}: memory was too small for {batch_size} rows at a time"


def run_whole(args, report, save):
    """What train.ipynb does, by the command line, on all rows."""
    settings = {"data_dir": args.folder, "run_name": "whole", "batch_size": 32}
    if args.cpu:
        settings |= {"max_rows": 24, "n_folds": 2, "epochs": 1, "max_length": 32}
    size = "tiny" if args.cpu else "minilm"
    with tempfile.TemporaryDirectory() as temporary:
        folder, report["weights"] = benchmark.find_or_make(size, temporary, args.folder)
        settings |= {"backbone": str(folder), "output_dir": temporary}
        config = Path(temporary) / "config.json"
        config.write_text(json.dumps(settings))
        start = time.perf_counter()
        done = subprocess.run([sys.executable, ku.__file__, "train", "--config", str(config)])
        report["wall_seconds"] = time.perf_counter() - start
        if done.returncode:
            report["failures"].append(f"training ends with {done.returncode}")
            return
        record = ku.RunFolder(Path(temporary) / "whole").read_record()
    names = ("oof", "seconds", "rows_per_second", "peak_memory_bytes", "precision")
    report["record"] = {name: record[name] for name in names}


PARTS = {
    "tests": check_tests,
    "losses": compare_losses,
    "bert-base": measure_bert,
    "deberta-v3-base": measure_deberta,
    "whole": run_whole,
    "compile": measure_compile,
}


def make_options(args, size, makes_shapes=False, **changes):
    """The benchmark's options, by what the device can do in the time. Each of a few shapes has to
    come twice before it is captured, which takes `start` steps."""
    if args.cpu:
        size = "tiny-deberta" if "deberta" in size else "tiny"
        quick = benchmark.QUICK | {"size": size, "data": args.folder}
        return benchmark.Options(**quick | changes)
    options = benchmark.GPU | {"size": size, "data": args.folder, "rounds": 2}
    if torch.cuda.get_device_properties(0).total_memory > 40e9:
        options |= {"batch_size": 32, "start": 40, "steps": 30}
    else:
        batch_size, start = 8 if "deberta" in size else 16, 40 if makes_shapes else 5
        options |= {"batch_size": batch_size, "start": start, "warm": 2, "steps": 8}
    return benchmark.Options(**options | changes)


# ---------------------------------------------------------------------------------------
# One part after another


def do_part(args):
    """In a process of its own: the report of a part, saved as it grows."""
    ku._prepare_process()
    gc.freeze()  # as the benchmark does
    report = {"failures": []}

    def save():
        args.save.with_suffix(".new").write_text(json.dumps(report))
        args.save.with_suffix(".new").replace(args.save)

    try:
        PARTS[args.part](args, report, save)
    except Exception as error:
        report["failures"].append(f"{type(error).__name__}: {error}")
        raise
    finally:
        save()


def run_part(name, arguments, limit):
    """`do_part` in a process that has `limit` seconds."""
    with tempfile.TemporaryDirectory() as temporary:
        save, log = Path(temporary) / "report.json", Path(temporary) / "log.txt"
        command = [sys.executable, __file__, *arguments, "--part", name, "--save", str(save)]
        start, ending = time.perf_counter(), None
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(limit)
                ending = f"the process ends with {code}" if code else None
            except subprocess.TimeoutExpired:
                ending = f"stopped after its {limit:.0f} seconds"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what compiles for it, or hangs
            process.wait()
        report = json.loads(save.read_text()) if save.exists() else {"failures": []}
        if ending:
            last_lines = log.read_text(errors="replace").splitlines()[-15:]
            report["failures"].append("\n".join([ending, *last_lines]))
    return report | {"seconds": time.perf_counter() - start}


def check_device(args, arguments, save):
    """The report of all parts, saved after each."""
    report = {
        "command": shlex.join(["bash", "tools/dev/device_check.sh", *shown(args)]),
        "date": datetime.date.today().isoformat(),
        "versions": ku._versions() | {"cuda": torch.version.cuda},
        "device": describe_device(),
        "is_dry_run": args.cpu,
        "parts": {},
    }
    end = time.monotonic()
    for name in PARTS:
        end += LIMITS[name]
        part = run_part(name, arguments, end - time.monotonic())
        report["parts"][name] = part
        save(report)
        outcome = f"{len(part['failures'])} failures" if part["failures"] else "ok"
        print(f"{name}: {outcome}, {part['seconds']:.0f} s", flush=True)
    return report


def shown(args):
    """The arguments, without a path of this machine."""
    folder = [f"path/to/{Path(args.folder).name}"] if args.folder else []
    return folder + (["--cpu"] if args.cpu else [])


def describe_device():
    description = {"name": ku._device_name(), "cpus": os.cpu_count()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = f"sm_{properties.major}{properties.minor}"
        description |= {"capability": capability, "memory_bytes": properties.total_memory}
    return description


# ---------------------------------------------------------------------------------------
# Table


def summary_lines(report):
    """The figures of a report for a terminal."""
    device, versions = report["device"], report["versions"]
    yield f"{device['name']}, torch {versions['torch']}, CUDA {versions['cuda']}"
    for name, part in report["parts"].items():
        yield f"\n{name}"
        if "summary" in part:
            yield f"  {part['summary']}"
        for dropout in [key for key in part if key.startswith("dropout")]:
            yield from loss_lines(dropout, part[dropout])
        for group, race in part.get("groups", {}).items():
            yield from race_lines(group, race)
        if "wall_seconds" in part:
            memory = part.get("record", {}).get("peak_memory_bytes", 0) / 2**30
            yield f"  {part['wall_seconds']:.1f} s, {memory:.1f} GB, {part['weights']} weights"
        for failure in part["failures"]:
            yield textwrap.indent(f"FAILED {failure}", "  ")


def loss_lines(dropout, found):
    for pair in ("captured_to_plain", "plain_to_plain"):
        figures = found[pair]
        yield (
            f"  {dropout}, {pair.replace('_', ' ')}: losses differ by at most "
            f"{figures['largest_difference']:.2g}, movement of the weights has cosine "
            f"{figures['cosine']:.4f} and {figures['length']:.3f} of the length"
        )


def race_lines(group, race):
    for name, result in race["contenders"].items():
        rate, ratio = result["tokens_per_second"]["median"], result["ratio"]["median"]
        memory = result["memory"]
        peak = f"{memory['peak_bytes'] / 2**30:.2f} GB" if memory else ""
        yield (
            f"  {benchmark.LABELS[name]:36} {rate:9,.0f} tokens/s {result['share_of_matmul']:6.1%} "
            f"of matmul {peak:>9} {result['one_time_seconds']:6.1f} s once {ratio:6.2f}"
        )
    if group in USES:
        yield f"  {group}: {describe_gain(group, race)}"


def describe_gain(group, race):
    """What the first of two contenders gains, and whether that is worth its code."""
    user, other = race["contenders"].values()
    if not user["setup"][USES[group]]:
        return "not in use"
    speed = other["ratio"]["median"]
    is_worth, text = speed >= WORTH["speed"], f"{speed:.2f} times the speed"
    if user["memory"]:
        memory = user["memory"]["peak_bytes"] / other["memory"]["peak_bytes"]
        is_worth = is_worth or memory <= WORTH["memory"]
        text += f", {memory:.2f} of the memory"
    return f"{text}: {'worth its code' if is_worth else 'not worth its code'}"


# ---------------------------------------------------------------------------------------
# Command line


def parse(arguments):
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    layout = "a competition laid out like CommonLit, such as the CLEAR corpus"
    parser.add_argument("folder", nargs="?", default="", help=layout)
    dry_run = "tiny sizes on a CPU, and no file without -o: to try this file out"
    parser.add_argument("--cpu", action="store_true", help=dry_run)
    parser.add_argument("-o", "--output", type=Path, help="default: results/device_check_*.json")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else [str(word) for word in arguments]
    args = parse(arguments)
    if not args.cpu and not torch.cuda.is_available():
        sys.exit("no GPU here: --cpu tries the file out without one")
    if args.part:
        return do_part(args)
    output = args.output
    if not output and not args.cpu:
        name = re.sub(r"\W+", "-", ku._device_name().lower())
        output = ROOT / "results" / f"device_check_{name}.json"

    def save(report):
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    report = check_device(args, arguments, save)
    print("\n".join(summary_lines(report)))
    has_failures = any(part["failures"] for part in report["parts"].values())
    return int(has_failures)


if __name__ == "__main__":
    sys.exit(main())

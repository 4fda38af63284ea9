"""Break training in every way a process or a disk can break, give the same call again, and compare.

    python tools/dev/stress.py --trainer -o results/stress.csv
    python tools/dev/stress.py --quick --only kills,damage
    python tools/dev/stress.py --only boundaries --case 17

A tiny BERT with dropout is trained on a made competition, 2 folds of 8 steps, a checkpoint after
each, once without interruption. What every other run leaves must equal that byte for byte: oof.csv,
golden.json, log.jsonl, all weights, the scores in record.json, and the names of all files. Each
attempt is a fork of this process. The groups:

    kills       SIGKILL at random moments, every other time several in a row
    boundaries  SIGKILL before each call that opens a file to write, makes, renames, syncs, removes
    bytes       death inside write(2), in native code too, where a file reaches a random size
    errors      each such call fails: no space, I/O error, read-only disk; once, or from then on
    limits      write(2) fails where a file reaches a random size
    restarts    a run killed, and the next killed or its disk failing soon after it began
    damage      files of a checkpoint and of a finished fold missing, cut, empty or changed
    flips       one bit in every region of every such file; is it noticed?
    signals     SIGTERM and Ctrl-C at random moments
    notebook    papermill killed, and its kernel (not with --quick)
    papermill   Ctrl-C for papermill at random moments, in steps of seconds (not with --quick)

`--trainer` does kills and damage to the Trainer of transformers as well: one fold of 12 steps, a
checkpoint after each. In the table `resumed` are the cases that went on from the newest good
checkpoint with at most the step under way lost, `began anew` those of them that started at the
first step, because nothing good was there; `detected` those where a message said what was wrong.
`silently different` is another result without a word. The exit code is 0 only if all of ours
resumed, were equal, and were detected where something was wrong. A case that fails is kept, and can
be repeated: where it depends on the time, not to the instant.
"""

import argparse
import errno
import functools
import importlib.util
import itertools
import json
import mmap
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# One thread, or forks would hang; the CPU, where runs are exact; before libraries are imported
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

import matplotlib.backends.backend_agg  # here, or every fork would do so by itself
import matplotlib.figure  # noqa: F401
import pandas as pd
import psutil
import tokenizers
import torch
import transformers
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertModel
from transformers.trainer_utils import get_last_checkpoint

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernel_utils"))
import kernel_utils as ku

torch.set_num_threads(1)
tqdm.monitor_interval = 0  # or a bar starts a thread
tqdm.set_lock(threading.RLock())  # its own stays locked where a fork is killed

GROUPS = "kills boundaries bytes errors limits restarts damage flips signals".split()
GROUPS += ["notebook", "papermill"]
COLUMNS = ["cases", "resumed", "began anew", "equal", "detected", "silently different", "crashed"]
DONE, CRASHED, KIT_ERROR = "done", "crashed", "KitError"
STOPPED, INTERRUPTED = "Stopped", "KeyboardInterrupt"
ENDS = [DONE, CRASHED, KIT_ERROR, STOPPED, INTERRUPTED]
KILLED, OVERSIZED = "SIGKILL", "SIGXFSZ"  # other ends of a process
PATIENCE = 120  # seconds until a process counts as hung


# ---------------------------------------------------------------------------------------
# A task that trains in a second

ROWS, BATCH, EPOCHS, FOLDS = 32, 4, 2, 2
FOLD_STEPS = ROWS // FOLDS // BATCH * EPOCHS
TRAINER_STEPS = 12  # one and a half epochs of all rows
WORDS = "the a cat dog sat ran on in under big small red blue mat hat tree river".split()
WORDS += "slowly quickly why".split()
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
SETTINGS = dict(
    n_folds=FOLDS,
    epochs=EPOCHS,
    batch_size=BATCH,
    max_length=24,
    backbone_dropout=0.1,
    head_dropout=0.1,
    dropout_samples=2,
    lr=0.01,
    keep="best",
)


def make_task(folder):
    """Write data/train.csv and bert/, a backbone with its tokenizer."""
    rng, data, bert = random.Random(0), folder / "data", folder / "bert"
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 20))) for _ in range(ROWS)]
    shares = [text.split().count("cat") / len(text.split()) for text in texts]
    frame = pd.DataFrame({"id": range(ROWS), "excerpt": texts, "target": shares})
    data.mkdir()
    frame.assign(standard_error=0.5).to_csv(data / "train.csv", index=False)
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    marks = [(word, vocabulary[word]) for word in ("<s>", "</s>")]
    template = tokenizers.processors.TemplateProcessing("<s> $A </s>", special_tokens=marks)
    tokenizer.post_processor = template
    names = dict(pad_token="<pad>", unk_token="<unk>", cls_token="<s>", sep_token="</s>")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(bert)
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(vocabulary), **SIZES)
    BertModel(config).save_pretrained(bert)


# ---------------------------------------------------------------------------------------
# Attempts: a fork that can be ended at any moment


class Tally:
    """A number that a fork raises and its parent reads, whatever became of the fork."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 8)

    def add(self, *_):
        self.memory[:] = (self.value + 1).to_bytes(8, "little")

    @property
    def value(self):
        return int.from_bytes(self.memory[:], "little")


class Attempt(NamedTuple):
    """What came of a fork."""

    end: str  # one of ENDS, or the name of the signal that ended it
    steps: int  # that the optimiser took
    text: str  # that was printed
    seconds: float


def run_here(job, fault, steps, output):
    """Run a job in this fork, its output into a pipe. It never returns to the parent's code."""
    end = CRASHED
    try:
        os.dup2(output, sys.stdout.fileno())
        os.dup2(output, sys.stderr.fileno())
        register_optimizer_step_post_hook(steps.add)
        fault()
        job()
        end = DONE
    except BaseException as error:
        traceback.print_exc()
        names = [kind.__name__ for kind in type(error).mro()]
        end = next((name for name in names if name in ENDS), CRASHED)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ENDS.index(end))


def listen(pipe, child, moment, number):
    """What a child prints until its end. At `moment` it is sent a signal; if it hangs, killed."""
    parts = []
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0, moment - time.perf_counter()))
        if not ready:
            os.kill(child, number)
            moment, number = time.perf_counter() + PATIENCE, signal.SIGKILL
        elif part := pipe.read(2**16):
            parts.append(part)
        else:
            return b"".join(parts).decode(errors="replace")


def no_fault():
    pass


def attempt(job, fault=no_fault, after=PATIENCE, number=signal.SIGKILL):
    """Call `job()` in a fork after `fault()`. It is sent a signal if it runs `after` seconds."""
    steps, (reader, writer) = Tally(), os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.perf_counter()
    child = os.fork()
    if not child:
        run_here(job, fault, steps, writer)
    os.close(writer)
    with open(reader, "rb", buffering=0) as pipe:
        text = listen(pipe, child, began + after, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    end = ENDS[code] if code >= 0 else signal.Signals(-code).name
    return Attempt(end, steps.value, text, time.perf_counter() - began)


# ---------------------------------------------------------------------------------------
# Faults: functions that a fork calls before its job

WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
FULL_DISKS = (errno.ENOSPC, errno.EIO, errno.EROFS)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def after_step(number, action):
    """Fault: `action` after the so-manieth optimiser step, before it where that is 0."""
    if not number:
        return action
    steps = itertools.count(1)

    def act(*_):
        if next(steps) == number:
            action()

    return lambda: register_optimizer_step_post_hook(act)


def written(event, arguments, folder):
    """The path that an audited call is about to change below `folder`, or None. Calls by a
    descriptor of a folder, as shutil.rmtree makes them, have a relative path."""
    is_change = event in WRITES
    if event == "open":
        is_change = arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if not is_change or not isinstance(arguments[0], (str, Path)):
        return None
    path = arguments[0]
    is_inside = Path(path).is_relative_to(folder) or not os.path.isabs(path)
    return path if is_inside else None


def at_writes(folder, numbers, action):
    """Fault: `action(path)` before those of the calls that change something in `folder` whose
    numbers are asked for; os.fsync has no path."""
    calls, sync = itertools.count(1), os.fsync

    def audit(event, arguments):
        path = written(event, arguments, folder)
        if path is not None and next(calls) in numbers:
            action(path)

    def fsync(descriptor):
        if next(calls) in numbers:
            action(None)
        sync(descriptor)

    def fault():
        sys.addaudithook(audit)
        os.fsync = fsync

    return fault


def fail(number, path):
    """Raise what the operating system raises."""
    more = [path] if path else []
    raise OSError(number, os.strerror(number), *more)


def limit_files(size, action):
    """Let no file grow beyond a size; `action` is that of the signal which write(2) sends then."""
    signal.signal(signal.SIGXFSZ, action)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# ---------------------------------------------------------------------------------------
# Damage to a folder that was saved


class Damage(NamedTuple):
    folder: str  # of a checkpoint or a fold, below that of the run
    label: str
    apply: Callable  # of the path of `folder`

    def __str__(self):
        return f"{self.folder}: {self.label}"


def remove(names, folder):
    for name in names:
        (folder / name).unlink()


def cut(name, size, folder):
    os.truncate(folder / name, size)


def flip(name, position, folder):
    """Change one bit of the byte at a position."""
    with open(folder / name, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << position % 8]))


def flip_all(name, folder):
    """Change one bit of the same file of this and every other checkpoint."""
    for path in folder.parent.iterdir():
        flip(name, 100, path)


def add_file(folder):
    (folder / "extra.bin").write_bytes(b"extra")


def make_damages(run, folder, last):
    """Every file of a folder damaged in four ways, and four folders as an interrupted copy leaves
    them. `last` is the file that is written last."""

    def damage(label, function, *arguments):
        return Damage(folder, label, functools.partial(function, *arguments))

    sizes = {path.name: path.stat().st_size for path in sorted((run / folder).iterdir())}
    for name, size in sizes.items():
        yield damage(f"{name} missing", remove, [name])
        yield damage(f"{name} cut in half", cut, name, size // 2)
        yield damage(f"{name} empty", cut, name, 0)
        yield damage(f"{name} with a flipped bit", flip, name, size // 2)
    others = [name for name in sizes if name != last]
    yield damage(f"{last} alone", remove, others)
    yield damage(f"{others[0]} alone", remove, [*others[1:], last])
    yield Damage(folder, "an extra file", add_file)
    yield damage("no file", remove, sizes)


def regions(path):
    """A position in every region of a file: in safetensors all of the length, and the first, middle
    and last byte of every tensor; fiftieths of the header, and of other files."""
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return {size * part // 50 for part in range(50)}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    positions = set(range(8)) | {8 + length * part // 50 for part in range(50)}
    header.pop("__metadata__", None)
    for tensor in header.values():
        first, end = (8 + length + offset for offset in tensor["data_offsets"])
        if end > first:
            positions |= {first, (first + end) // 2, end - 1}
    return positions


def make_flips(run, folder):
    """One bit in every region of every file of a folder."""
    for path in sorted((run / folder).iterdir()):
        for position in sorted(regions(path)):
            label = f"{path.name} bit in byte {position}"
            yield Damage(folder, label, functools.partial(flip, path.name, position))


# ---------------------------------------------------------------------------------------
# What is broken: this kit, and the Trainer of transformers


class Subject(NamedTuple):
    """A way to train whose result must not depend on interruptions."""

    name: str
    train: Callable  # (folder, save): trains there or goes on; checkpoints after each step or none
    steps: int  # of a whole run
    result: Callable  # of a run folder: name -> what must be equal
    progress: Callable  # of a run folder: steps that its good checkpoints hold
    stop: int  # a step whose end leaves two checkpoints behind
    saved: list  # folders below the run folder then, the newest checkpoint first
    last: str  # the file of them that is written last
    says: Callable  # (printed text, name of a folder): whether it says that the folder is damaged
    again: float  # share of the kills that another follows


def train_kit(task, folder, save=True):
    cfg = ku.Config(
        data_dir=task / "data",
        backbone=task / "bert",
        output_dir=folder.parent,
        run_name=folder.name,
        checkpoint_minutes=1e-9 if save else 0,
        **SETTINGS,
    )
    frame = ku._read_train(cfg)
    ku.train(ku.make_folds(frame, cfg), cfg)


def kit_result(folder):
    record, result = ku.RunFolder(folder).read_record(), {}
    weights = [f"fold{fold}/model.safetensors" for fold in range(FOLDS)]
    for name in ["oof.csv", "golden.json", "log.jsonl", *weights]:
        path = folder / name
        result[name] = path.read_bytes() if path.is_file() else b""
    for name in ("status", "folds", "oof"):
        result[f"{name} of the record"] = record.get(name)
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return result | {"names of files": paths}


def is_good(folder):
    return folder.is_dir() and not ku._SealedFolder(folder).problems()


def kit_progress(folder):
    good = [fold for fold in range(FOLDS) if is_good(folder / f"fold{fold}")]
    finished = [fold for fold in good if not ku._read_state(folder / f"fold{fold}")["stop_reason"]]
    steps = [0]
    for path in folder.glob("checkpoints/fold*-step*"):
        fold, step = map(int, re.findall(r"\d+", path.name))
        if fold not in finished and is_good(path):
            steps.append(step)
    return FOLD_STEPS * len(finished) + max(steps)


def names_damage(text, name):
    return any(name in line and "damaged" in line for line in text.splitlines())


def kit_subject(task):
    return Subject(
        name="kernel_utils",
        train=functools.partial(train_kit, task),
        steps=FOLDS * FOLD_STEPS,
        result=kit_result,
        progress=kit_progress,
        stop=FOLD_STEPS + 6,
        saved=["checkpoints/fold1-step5", "fold0"],
        last="manifest.json",
        says=names_damage,
        again=0.5,
    )


def train_trainer(task, folder, save=True):
    """As its documentation has it, and as a careful user would: on from the last checkpoint if
    there is one."""
    transformers.set_seed(0)
    frame = pd.read_csv(task / "data" / "train.csv")
    tokenizer = AutoTokenizer.from_pretrained(task / "bert")
    tokens = tokenizer(list(frame["excerpt"]), padding=True, return_tensors="pt")
    tokens = dict(tokens) | {"labels": torch.tensor(frame["target"], dtype=torch.float32)}
    rows = [{name: values[row] for name, values in tokens.items()} for row in range(len(frame))]
    config = AutoConfig.from_pretrained(task / "bert", num_labels=1)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=TRAINER_STEPS,
        per_device_train_batch_size=BATCH,
        save_strategy="steps" if save else "no",
        save_steps=1,
        save_total_limit=2,
        report_to="none",
        use_cpu=True,
    )
    model = AutoModelForSequenceClassification.from_config(config)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=True if trainer_progress(folder) else None)
    trainer.save_model(folder / "final")


def trainer_result(folder):
    path = folder / "final" / "model.safetensors"
    return {"weights": path.read_bytes() if path.is_file() else b""}


def trainer_progress(folder):
    newest = get_last_checkpoint(folder) if folder.is_dir() else None
    return int(newest.rpartition("-")[2]) if newest else 0


def complains(text, name):
    return re.search("missing|corrupt|damaged|not found|not find", text.lower()) is not None


def trainer_subject(task):
    if importlib.util.find_spec("accelerate") is None:
        needed = "--trainer needs the package accelerate"
        raise ku.KitError(f"{needed}: pip install accelerate==1.15.0")
    import accelerate  # noqa: F401  imported here, or every fork would do so by itself

    return Subject(
        name=f"Trainer {transformers.__version__}",
        train=functools.partial(train_trainer, task),
        steps=TRAINER_STEPS,
        result=trainer_result,
        progress=trainer_progress,
        stop=9,
        saved=["checkpoint-8"],
        last="trainer_state.json",
        says=complains,
        again=0.0,
    )


class Lab(NamedTuple):
    """A subject and its runs to compare with."""

    subject: Subject
    task: Path
    folder: Path  # of the cases
    reference: dict  # result of a run without interruption and checkpoints
    first: float  # seconds until the end of the first step
    seconds: float  # of a whole run
    writes: int  # calls in it that change a file or folder
    stopped: Path  # run folder with two checkpoints


def prepare(subject, task, folder):
    """Runs without interruption, with and without checkpoints, and one stopped in the middle."""
    folder.mkdir()
    plain, saving, stopped = folder / "reference", folder / "saving", folder / "stopped"
    writes = Tally()
    count = at_writes(saving, range(sys.maxsize), writes.add)
    ends = [
        attempt(functools.partial(subject.train, plain, save=False)),
        attempt(functools.partial(subject.train, saving), count),
        attempt(functools.partial(subject.train, folder / "short"), after_step(1, die)),
        attempt(functools.partial(subject.train, stopped), after_step(subject.stop, die)),
    ]
    if [done.end for done in ends] != [DONE, DONE, KILLED, KILLED]:
        texts = [done.text for done in ends]
        raise ku.KitError([f"{subject.name} does not train undisturbed:", *texts])
    reference = subject.result(plain)
    if subject.result(saving) != reference:
        raise ku.KitError(f"{subject.name}: a run with checkpoints differs from one without")
    missing = [name for name in subject.saved if not (stopped / name).is_dir()]
    if missing:
        where = f"a run stopped at step {subject.stop}"
        raise ku.KitError(f"{subject.name}: {where} lacks {ku._comma_join(missing)}")
    times = dict(first=ends[2].seconds, seconds=ends[1].seconds)
    return Lab(subject, task, folder, reference, writes=writes.value, stopped=stopped, **times)


# ---------------------------------------------------------------------------------------
# Cases


class Case:
    """A run folder, what is done to it, and what came of that."""

    def __init__(self, lab, group, number, seed):
        self.lab, self.number, self.name = lab, number, f"{group}-{number}"
        self.folder = lab.folder / self.name / "run"
        self.folder.parent.mkdir()
        self.rng = random.Random(f"{seed} {self.name}")
        self.counts, self.notes, self.kept = Counter(cases=1), [], True

    def attempt(self, fault=no_fault, after=PATIENCE, number=signal.SIGKILL):
        """Call the training once. `kept` stays true while no step is lost but the one under way at
        a sudden end."""
        subject = self.lab.subject
        before = subject.progress(self.folder)
        done = attempt(functools.partial(subject.train, self.folder), fault, after, number)
        now = subject.progress(self.folder)
        least = done.steps if done.end in (DONE, STOPPED) else max(0, done.steps - 1)
        self.kept &= before + least <= now <= before + done.steps
        why = f" ({done.text.splitlines()[-1]})" if done.end == CRASHED else ""
        saved = f"{before} saved before, {now} after"
        self.notes.append(f"{done.end} after {done.steps} steps{why}, {saved}")
        with open(self.folder.with_name("output.txt"), "a") as file:
            file.write(done.text)
        return done

    def moment(self):
        """Random seconds into a run, four times in five after its first step."""
        first = self.lab.first
        return self.rng.uniform(self.rng.choice([0, first, first, first, first]), self.lab.seconds)

    def go_on(self, name=""):
        """Give the same call again, without a fault, and count how it ends. Returns whether it
        completed and said that the folder called `name` is damaged."""
        subject, last = self.lab.subject, self.attempt()
        if last.end != DONE:
            self.counts["crashed"] += 1
            return False
        is_complete = subject.progress(self.folder) == subject.steps
        is_said = subject.says(last.text, name)
        result, reference = subject.result(self.folder), self.lab.reference
        different = [part for part in result if result[part] != reference[part]]
        self.counts["resumed"] += is_complete and self.kept
        self.counts["began anew"] += is_complete and last.steps == subject.steps
        if different:
            self.notes.append(f"not equal: {', '.join(different)}")
            self.counts["silently different"] += not is_said
        else:
            self.counts["equal"] += 1
        return is_said


def kill(case):
    """A chain of kills counts as so many cases. A run that was faster is none."""
    hits = 0
    while True:
        done = case.attempt(after=case.moment())
        if done.end != KILLED:
            break
        hits += 1
        if case.rng.random() >= case.lab.subject.again:
            break
    if done.end == DONE and not hits:
        case.counts.clear()
        return
    case.kept &= done.end in (KILLED, DONE)
    case.go_on()
    case.counts = Counter({word: count * max(1, hits) for word, count in case.counts.items()})


def kill_at_write(case):
    done = case.attempt(at_writes(case.folder, [case.number], die))
    case.kept &= done.end == KILLED
    case.go_on()


def limit_at_random(case, action):
    """Attempt in which from some step on no file may grow beyond a size below that of some file."""
    sizes = [path.stat().st_size for path in sorted(case.lab.stopped.rglob("*")) if path.is_file()]
    size = case.rng.randrange(case.rng.choice(sizes) or 1)
    step = case.rng.randrange(case.lab.subject.steps)
    case.notes.append(f"no file beyond {size} bytes after step {step}")
    return case.attempt(after_step(step, lambda: limit_files(size, action)))


def kill_in_write(case):
    case.kept &= limit_at_random(case, signal.SIG_DFL).end == OVERSIZED
    case.go_on()


def is_explained(case, done, number):
    """Whether an attempt ended with an error for the user that names a path and the reason, or
    completed unharmed, as where a file that is gone already could not be removed."""
    if done.end == DONE:
        return case.lab.subject.result(case.folder) == case.lab.reference
    has_path, has_reason = str(case.folder) in done.text, os.strerror(number) in done.text
    return done.end == KIT_ERROR and has_path and has_reason


def fail_at_write(case):
    call, kind = divmod(case.number, len(FULL_DISKS))
    number, calls, more = FULL_DISKS[kind], range(call + 1, call + 2), ""
    if case.rng.random() < 0.5:
        calls, more = range(call + 1, sys.maxsize), " and all after it"
    case.notes.append(f"{os.strerror(number)} at call {call + 1}{more}")
    done = case.attempt(at_writes(case.folder, calls, functools.partial(fail, number)))
    case.counts["detected"] += is_explained(case, done, number)
    case.go_on()


def fail_in_write(case):
    done = limit_at_random(case, signal.SIG_IGN)
    case.counts["detected"] += is_explained(case, done, errno.EFBIG)
    case.go_on()


def break_restart(case):
    """Kill a run, then kill the next one too or let its disk fail, soon after it began."""
    actions = [die, *(functools.partial(fail, number) for number in FULL_DISKS)]
    first, call = case.rng.randrange(1, case.lab.subject.steps), case.rng.randrange(1, 40)
    case.attempt(after_step(first, die))
    calls, action = range(call, sys.maxsize), case.rng.choice(actions)
    done = case.attempt(at_writes(case.folder, calls, action))
    case.kept &= done.end in (KILLED, KIT_ERROR, DONE)
    case.go_on()


def apply_damage(case, damage):
    shutil.copytree(case.lab.stopped, case.folder)
    damage.apply(case.folder / damage.folder)
    case.notes.append(str(damage))


def go_on_damaged(damages, case):
    damage = damages[case.number]
    apply_damage(case, damage)
    case.counts["detected"] += case.go_on(Path(damage.folder).name)


def look_at_flip(flips, case):
    damage = flips[case.number]
    apply_damage(case, damage)
    case.counts["detected"] += not is_good(case.folder / damage.folder)


def stop(case):
    """Signals that came before the first step or after the last are no cases: those end the process
    at once."""
    number = (signal.SIGTERM, signal.SIGINT)[case.number % 2]
    done = case.attempt(after=case.moment(), number=number)
    is_outside = done.steps in (0, case.lab.subject.steps)
    if done.end == DONE or (is_outside and done.end in (number.name, INTERRUPTED)):
        case.counts.clear()
        return
    is_stopped = (
        done.end == STOPPED and ku.RunFolder(case.folder).read_record()["status"] == "stopped"
    )
    case.counts["detected"] += is_stopped
    case.go_on()


NOTEBOOK_EPOCHS = 40  # seconds for a fold, so that there is time to kill
SLOW = dict(data_dir=ROOT / "notebooks" / "sample", n_folds=FOLDS, epochs=2, batch_size=80)


def notebook_settings(lab):
    settings = SETTINGS | dict(data_dir=lab.task / "data", backbone=lab.task / "bert")
    return settings | dict(epochs=NOTEBOOK_EPOCHS)


def start_papermill(settings, folder):
    """A process that runs train.ipynb into a run folder, in a session of its own, as a terminal's
    foreground has one."""
    settings = settings | dict(output_dir=folder.parent, run_name=folder.name)
    notebook, executed = ROOT / "notebooks" / "train.ipynb", folder.with_name("train.ipynb")
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", notebook, executed]
    for name, value in settings.items():
        command += ["-p", name, str(value)]
    with open(folder.with_name("output.txt"), "a") as output:
        streams = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        streams |= dict(start_new_session=True, preexec_fn=hear_interrupts)
        return psutil.Popen(command, cwd=ROOT, **streams)


def hear_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background ignores it


def notebook_reference(lab, name, settings):
    """The run folder of a notebook that nobody killed."""
    folder = lab.folder / name / "run"
    if not folder.parent.is_dir():
        folder.parent.mkdir()
        start_papermill(settings, folder).wait()
    return folder


def kill_papermill(case):
    """In the second fold kill papermill, whose kernel must then end by itself, or the kernel,
    without which papermill must end; then the same command again. The first fold must stay."""
    settings, first = notebook_settings(case.lab), case.folder / "fold0"
    reference = kit_result(notebook_reference(case.lab, "notebook", settings))
    process = start_papermill(settings, case.folder)
    while process.poll() is None and not first.is_dir():
        time.sleep(0.01)
    if process.poll() is not None:
        case.counts["crashed"] += 1
        return
    processes = [process, *process.children()]
    processes[case.number].kill()
    _, alive = psutil.wait_procs(processes, PATIENCE)
    for one in alive:
        one.kill()
    left = f"{len(alive)} of {len(processes)} processes still there"
    case.notes.append(f"{left} {PATIENCE} s after one was killed")
    made, was_complete = first.stat().st_mtime_ns, ku.RunFolder(case.folder).is_complete()
    case.counts["crashed"] += start_papermill(settings, case.folder).wait() != 0
    is_kept = first.stat().st_mtime_ns == made
    case.counts["resumed"] += is_kept and not alive and not was_complete
    case.counts["equal"] += kit_result(case.folder) == reference


def is_true(record, folder):
    """Whether a run that did not end is called stopped, and has all that its record says; a fold
    that was finished since then has no checkpoints any more."""
    folds = re.findall(r"fold (\d+) is (finished|saved)(?: up to step (\d+))?", record["stopped"])
    saved = [
        is_good(folder / f"fold{fold}") or is_good(folder / f"checkpoints/fold{fold}-step{step}")
        for fold, _, step in folds
    ]
    return record["status"] == "stopped" and all(saved)


def interrupt_papermill(case):
    """Ctrl-C as a terminal sends it, to papermill but not to its kernel, at a random moment of the
    run; then the same command again. What the record says in between must be true."""
    reference = ku.RunFolder(notebook_reference(case.lab, "papermill", SLOW))
    seconds = reference.record.stat().st_mtime - reference.tokenizer.stat().st_mtime
    process, run = start_papermill(SLOW, case.folder), ku.RunFolder(case.folder)
    while process.poll() is None and not run.record.is_file():
        time.sleep(0.01)
    moment = case.rng.uniform(0, seconds)
    time.sleep(moment)
    processes = [process, *process.children()]
    if run.is_complete():
        process.wait()
        case.counts.clear()
        return
    os.killpg(process.pid, signal.SIGINT)
    psutil.wait_procs(processes, PATIENCE)
    record = run.read_record()
    if record["status"] == "complete":  # it ended as the signal came
        case.counts.clear()
        return
    case.notes.append(
        f"{moment:.1f} s after its start: {record['status']}, {record.get('stopped')}"
    )
    case.counts["detected"] += is_true(record, run.path)
    case.counts["crashed"] += start_papermill(SLOW, case.folder).wait() != 0
    case.counts["resumed"] += run.is_complete()
    case.counts["equal"] += kit_result(run.path) == kit_result(reference.path)


# ---------------------------------------------------------------------------------------
# Groups of cases


class Group(NamedTuple):
    """Cases that are broken in the same way."""

    test: Callable  # of a case
    numbers: range  # of the cases
    quick: int  # how many cases, drawn at random, are enough with --quick
    required: tuple = ("resumed", "equal")  # what every case must be
    enough: int = 0  # how many cases are enough in the long form; 0 means all


WORDED = ("resumed", "equal", "detected")


def damage_group(damages, required=WORDED):
    test = functools.partial(go_on_damaged, damages)
    return Group(test, range(len(damages)), 12, required)


def trainer_groups(lab, kills):
    damages = list(make_damages(lab.stopped, lab.subject.saved[0], lab.subject.last))
    return {
        "kills": Group(kill, range(10 * kills), kills, (), kills),
        "damage": damage_group(damages, ()),
    }


def kit_groups(lab, kills):
    saved, last = lab.subject.saved, lab.subject.last
    flips, damages = [], []
    for folder in saved:
        flips += make_flips(lab.stopped, folder)
        damages += make_damages(lab.stopped, folder, last)
    damages = [damage for damage in damages if damage.apply is not add_file]  # it does no harm
    every = functools.partial(flip_all, last)
    damages.append(Damage(saved[0], "all checkpoints with a flipped bit", every))
    damages += random.Random(0).sample(flips, 20)
    look = functools.partial(look_at_flip, flips)
    return {
        "kills": Group(kill, range(10 * kills), kills, enough=kills),
        "boundaries": Group(kill_at_write, range(1, lab.writes + 1), 20),
        "bytes": Group(kill_in_write, range(100), 6),
        "errors": Group(fail_at_write, range(len(FULL_DISKS) * lab.writes), 8, WORDED, 200),
        "limits": Group(fail_in_write, range(100), 5, WORDED),
        "restarts": Group(break_restart, range(100), 8),
        "damage": damage_group(damages),
        "flips": Group(look, range(len(flips)), 100, ("detected",)),
        "signals": Group(stop, range(1000), 4, WORDED, 100),
        "notebook": Group(kill_papermill, range(2), 0),
        "papermill": Group(interrupt_papermill, range(100), 0, WORDED, 20),
    }


def choose(name, group, args):
    """Numbers of the cases to run, in order, and how many of them are enough."""
    numbers = group.numbers
    if args.case is not None:
        if args.case not in numbers:
            cases = f"the cases of {name} are {numbers[0]} to {numbers[-1]}"
            raise ku.KitError(f"--case {args.case}: {cases}")
        return [args.case], 1
    order = random.Random(f"{args.seed} {name}").sample(numbers, len(numbers))
    return order, group.quick if args.quick else group.enough or len(order)


def report(case, required):
    """What is wrong with a case in one line, or nothing."""
    wrong = [word for word in ("crashed", "silently different") if case.counts[word]]
    wrong += [f"not {word}" for word in required if case.counts[word] < case.counts["cases"]]
    if not wrong:
        return ""
    return f"{case.lab.subject.name} {case.name}: {', '.join(wrong)} ({'; '.join(case.notes)})"


def run_group(lab, name, group, args, failed):
    """A row of the table. What failed of ours is kept, and listed in `failed`."""
    total, began = Counter(), time.perf_counter()
    order, enough = choose(name, group, args)
    every = 1 if sys.stderr.isatty() else 30
    label = f"{lab.subject.name} {name}"
    with tqdm(total=enough, desc=label, unit=" cases", mininterval=every) as bar:
        for number in order:
            if total["cases"] >= enough:
                break
            case = Case(lab, name, number, args.seed)
            group.test(case)
            total += case.counts
            bar.update(case.counts["cases"])
            problem = report(case, group.required)
            if problem:
                bar.write(problem)
            if problem and group.required:
                failed.append(case)
                again = (
                    f"python tools/dev/stress.py --only {name} --seed {args.seed} --case {number}"
                )
                again += " --quick" if args.quick else ""
                bar.write(f"  kept in {case.folder.parent}; again: {again}")
            else:
                shutil.rmtree(case.folder.parent)
    counts = {column: total[column] for column in COLUMNS}
    seconds = round(time.perf_counter() - began)
    return {"subject": lab.subject.name, "group": name, **counts, "seconds": seconds}


def stress(args, folder, failed):
    """The table, a row for each subject and group."""
    task = folder / "task"
    task.mkdir()
    sides = [(kit_subject(task), kit_groups)]
    if args.trainer:
        sides.append((trainer_subject(task), trainer_groups))
    attempt(functools.partial(make_task, task))
    if args.quick:
        ku._plot_curves = ku._plot_oof = lambda *_: None
    rows = []
    for subject, make_groups in sides:
        lab = prepare(subject, task, folder / subject.name)
        for name, group in make_groups(lab, args.kills).items():
            if name in args.only and (group.quick or not args.quick):
                rows.append(run_group(lab, name, group, args, failed))
    return pd.DataFrame(rows)


def parse():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    groups = dict(default=GROUPS, help=f"groups to run, of {','.join(GROUPS)}")
    kills = "kills that must hit a running process; default 200, with --quick 12"
    trainer = "also the Trainer of transformers; needs accelerate"
    add("--quick", action="store_true", help="a sample of every group, without plots")
    add("--kills", type=int, help=kills)
    add("--trainer", action="store_true", help=trainer)
    add("--only", type=lambda text: text.split(","), **groups)
    add("--seed", type=int, default=0, help="of all that is random")
    add("--case", type=int, help="run this case of the group in --only alone")
    add("-o", "--output", type=Path, help="write the table to this CSV file")
    args = parser.parse_args()
    unknown = sorted(set(args.only) - set(GROUPS))
    if unknown:
        parser.error(f"there is no group {', '.join(unknown)}, only {', '.join(GROUPS)}")
    if args.case is not None and len(args.only) > 1:
        parser.error("--case needs one group in --only")
    args.kills = args.kills or (12 if args.quick else 200)
    return args


def main():
    args, failed = parse(), []
    folder = Path(tempfile.mkdtemp(prefix="stress-"))
    try:
        table = stress(args, folder, failed)
    except ku.KitError as error:
        sys.exit(str(error))
    finally:
        if not failed:
            shutil.rmtree(folder)
    print(table.to_string(index=False))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(args.output, index=False)
    sys.exit(f"{len(failed)} cases failed" if failed else 0)


if __name__ == "__main__":
    main()

"""Upload folders to Kaggle with its command-line client, and check on Kaggle what arrived.

    python tools/kaggle_push.py dist/bundle dist/infer -m "five folds"

A folder holds dataset-metadata.json (a flat folder of files) or kernel-metadata.json (a notebook).
Datasets go first, since notebooks attach them; one that exists gets a new version. The client ends
with code 0 after many failures, and with an error after some successes, so what counts is what
Kaggle has afterwards: a new version that lists every file of the folder in its size, and no other.
(Kaggle tells no checksum; infer.ipynb checks those of the manifest.) A model that Kaggle drops from
the inputs of a notebook goes unnoticed: the client does not show it.

Needs the client 2.2.4 or newer (pip install kaggle six) and an account (kaggle auth login). Exit
code 0 only if all folders are verified. What the client says goes to stderr.
"""

import argparse
import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernel_utils"), str(ROOT / "tools")]
import kaggle_metadata

GRACE = 20  # seconds for an upload to show that the client calls failed: the answer may be lost
ANSWER = 120  # seconds for the client to answer a question

# Kaggle says 403 about a dataset that does not exist or does not show yet; one would expect 404
ABSENT = re.compile(
    r"^40[34] Client Error|^The resource was not found|^You don't have access", re.M
)
ACCEPTED = re.compile("is being created|not valid tags")
LOST = re.compile(r"^(?:Upload unsuccessful|Skipping)", re.M)
PROGRESS = re.compile(r"Starting upload for file |Upload successful: |.*B/s\]")
HOPELESS = {  # words of the client -> what helps
    "No module named": "the kaggle client does not start; it needs: pip install kaggle six",
    "unrecognized arguments": "the kaggle client is too old, 2.2.4 is needed: "
    "pip install --upgrade kaggle six",
    "Authentication required": "Kaggle does not know you: run `kaggle auth login`, or set "
    "KAGGLE_API_TOKEN to a token from https://www.kaggle.com/settings/api",
}


class PushError(Exception):
    """What was not uploaded, or could not be verified, and why."""


# ---- The client


def find_client():
    beside = shutil.which("kaggle", path=os.path.dirname(sys.executable))
    path = beside or shutil.which("kaggle")
    if not path:
        raise PushError("there is no kaggle client: pip install kaggle six")
    return path


def client(*arguments, upload=False):
    """Exit code and output of the client. An upload is shown as it goes and takes its time."""
    command = [find_client(), *arguments]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with tempfile.TemporaryDirectory() as private:  # in a shared one it resumes broken uploads
        environment = os.environ | {"TMPDIR": private, "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(command, env=environment, **streams) as process:
            output = show(process.stdout) if upload else read_answer(process)
    for words, advice in HOPELESS.items():
        if process.returncode and words in output:
            raise PushError(advice)
    return process.returncode, output


def show(stream):
    """The text of a stream, shown as it comes, with the \\r of progress bars."""
    lines = []
    for line in io.TextIOWrapper(stream, "utf-8", "replace", newline=""):
        print(line, end="", file=sys.stderr, flush=True)
        lines.append(line)
    return "".join(lines)


def read_answer(process):
    try:
        return process.communicate(timeout=ANSWER)[0].decode("utf-8", "replace")
    except subprocess.TimeoutExpired:
        process.kill()
        output = process.communicate()[0].decode("utf-8", "replace")
        return f"{output}\n(no answer within {ANSWER} s)"


def last_words(output):
    """What the client said last, without the files that went well, to stand behind a message."""
    lines = [line for line in output.splitlines() if line.strip() and not PROGRESS.match(line)]
    return "\n  | ".join(["\nThe client said:", *(lines[-8:] or ["(nothing)"])])


def ask_until(seconds, question, *arguments):
    """Ask again, ever more slowly, while the answer is a PushError: a check may have a hiccup."""
    deadline = time.monotonic() + seconds
    pause = 1.0
    while True:
        try:
            return question(*arguments)
        except PushError:
            if time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(pause * 1.5, 30)


# ---- What Kaggle has


def dataset_state(ref):
    """Status and version of a dataset; ("absent", 0) if there is none that this account can see."""
    code, output = client("datasets", "status", ref, "--format", "json")
    answer = re.search(r"^\{.*\}", output, re.M)
    if code == 0 and answer:
        state = json.loads(answer[0])
        return state["status"], int(state["current_version_number"] or 0)
    if ABSENT.search(output):
        return "absent", 0
    raise PushError(f"cannot tell whether {ref} exists{last_words(output)}")


def in_words(ref, status, version):
    if status == "absent":
        return f"{ref} does not exist"
    return f"{ref} is {status} at version {version}"


def changed_state(ref, before):
    state = dataset_state(ref)
    if state == before:
        raise PushError(f"nothing new came: {in_words(ref, *state)}, as before the upload")
    return state


def finished_state(ref, before):
    """The state once Kaggle has processed a new version, for better or worse."""
    status, version = changed_state(ref, before)
    if status in ("failed", "deleted") or (status == "ready" and version > before[1]):
        return status, version
    raise PushError(f"{in_words(ref, status, version)}: no new version is ready")


def listed_files(ref, version):
    """Name -> bytes of the files of one version."""
    files, next_page = {}, []
    while True:
        command = ["files", f"{ref}/{version}", "-v", "--page-size", "200", *next_page]
        code, output = client("datasets", *command)
        head, header, table = output.partition("name,size,creationDate")
        rows = [row for row in csv.reader(table.splitlines()) if len(row) == 3]
        page = {name: int(size) for name, size, _ in rows}
        if code or not header or not page.keys() - files.keys():
            raise PushError(f"cannot list the files of {ref} version {version}{last_words(output)}")
        files |= page
        token = re.search(r"^Next Page Token = (\S+)", head, re.M)
        if not token:
            return files
        next_page = [f"--page-token={token[1]}"]


def compare(ref, version, here, there):
    """A PushError that names each file that is not the same here and there."""
    problems = []
    for name in sorted(here.keys() | there.keys()):
        if name not in there:
            problems.append(f"missing: {name}")
        elif name not in here:
            problems.append(f"extra: {name}")
        elif here[name] != there[name]:
            size = f"{there[name]} bytes instead of {here[name]}"
            problems.append(f"of another size: {name} ({size})")
    if problems:
        different = "; ".join(problems)
        raise PushError(f"{ref} version {version} is not what the folder holds; {different}")


# ---- Pushing


def damage(folder):
    """What is not as tools/bundle.py packed it: after the upload, only sizes can be compared."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return []
    is_named = b"kernel_utils bundle" in manifest.read_bytes()
    if not is_named and not (folder / "kernel_utils.py").is_file():
        return []  # a manifest of something else
    import kernel_utils as ku  # takes seconds, and other folders do not need it

    try:
        files = ku._read_bundle_manifest(folder)["files"]
        return ku._SealedFolder(folder).integrity_problems(files)
    except ku.BundleError as error:
        return error.problems


def check(folder):
    """Raise a PushError with what Kaggle would refuse or lose, and with what was damaged."""
    problems = kaggle_metadata.folder_problems(folder) + damage(folder)
    if problems:
        raise PushError("\n".join(f"{folder}: {problem}" for problem in problems))


def plan(folders):
    """(kind, id, folder) of each folder, datasets first."""
    pushes = []
    for folder in map(Path, folders):
        is_dataset = (folder / kaggle_metadata.DATASET_FILE).is_file()
        kind = "dataset" if is_dataset else "kernel"
        metadata = json.loads((folder / f"{kind}-metadata.json").read_text(encoding="utf-8"))
        pushes.append((kind, metadata["id"], folder))
    return sorted(pushes, key=lambda push: push[0])


def push_dataset(ref, folder, notes, wait):
    here = {path.name: path.stat().st_size for path in folder.iterdir()}
    del here[kaggle_metadata.DATASET_FILE]
    before = dataset_state(ref)
    if before[0] not in ("absent", "ready", "failed"):
        raise PushError(f"{in_words(ref, *before)}: push again when Kaggle is done with that")
    task = ["create"] if before[0] == "absent" else ["version", f"--message={notes}"]
    code, output = client("datasets", *task, "-p", str(folder), upload=True)
    is_accepted = code == 0 and bool(ACCEPTED.search(output)) and not LOST.search(output)
    # A refusal counts unless it answers a repeated call: the first one may have done the work
    after_upload = output.rpartition("Upload successful: ")[2]
    if "creation error:" in output and "Will retry" not in after_upload:
        raise PushError(f"{ref} was refused{last_words(output)}")
    try:
        if not is_accepted:
            ask_until(min(wait, GRACE), changed_state, ref, before)
        status, version = ask_until(wait, finished_state, ref, before)
        if status != "ready":
            raise PushError(f"Kaggle could not process {ref} version {version}: {status}")
        compare(ref, version, here, ask_until(wait, listed_files, ref, version))
    except PushError as error:
        raise PushError(f"{error}{'' if is_accepted else last_words(output)}") from error
    if LOST.search(output):  # a file of the same name and size may be one of an earlier version
        raise PushError(f"{ref} version {version} cannot be right{last_words(output)}")
    size = f"{len(here)} files, {sum(here.values()) / 1e6:.1f} MB"
    remark = "" if is_accepted else ", whatever the client said"
    print(f"{ref} version {version}: {size}, all there{remark}", flush=True)


def push_kernel(ref, folder):
    code, output = client("kernels", "push", "-p", str(folder), upload=True)
    pushed = re.search(r"^Kernel version ?(\d*) successfully pushed", output, re.M)
    if code or not pushed:
        hint = f"see kaggle kernels status {ref}{last_words(output)}"
        raise PushError(f"{ref} was not pushed, or the answer got lost: {hint}")
    name = f"{ref} version {pushed[1]}".strip()
    dropped = re.findall(r"not valid (\w+ sources) .*: (.*)", output)
    if dropped:
        sources = "; ".join(f"{kind} {names}" for kind, names in dropped)
        raise PushError(f"{name} was pushed without its {sources}")
    code, output = client("kernels", "status", ref)
    status = re.search(r'has status "(?:KernelWorkerStatus\.)?(\w+)"', output)
    if code or not status:
        raise PushError(f"{name} was pushed, but cannot be seen{last_words(output)}")
    if re.match("ERROR|CANCEL", status[1]):
        raise PushError(f"{name} was pushed, but its run failed{last_words(output)}")
    print(f"{name}: pushed, {status[1].lower()}", flush=True)


def push(folders, notes, wait):
    """Upload the folders, datasets first; a line for each that is verified, a PushError for the
    first that is not. What is wrong with a folder is said before any upload."""
    for folder in folders:
        check(Path(folder))
    find_client()
    for kind, ref, folder in plan(folders):
        if kind == "dataset":
            push_dataset(ref, folder, notes, wait)
        else:
            push_kernel(ref, folder)


def commands(folders):
    """The commands that upload the folders by hand, without the checks."""
    lines = []
    for kind, ref, folder in plan(folders):
        path = shlex.quote(str(folder))
        if kind == "dataset":
            lines += [
                f"kaggle datasets create -p {path}  # the first time",
                f"kaggle datasets version -p {path} -m 'what is new'  # every other time",
                f"kaggle datasets status {ref} --format json",
                f"kaggle datasets files {ref} -v --page-size 200",
            ]
        else:
            lines += [f"kaggle kernels push -p {path}", f"kaggle kernels status {ref}"]
    return lines


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add, wait = parser.add_argument, dict(type=float, default=600, metavar="SECONDS")
    add("folders", nargs="+", metavar="FOLDER", help="with dataset- or kernel-metadata.json")
    add("-m", "--notes", default="update", help="what is new in a dataset")
    add("--wait", **wait, help="for a dataset to be ready (600)")
    arguments = parser.parse_args()
    try:
        push(arguments.folders, arguments.notes, arguments.wait)
    except PushError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

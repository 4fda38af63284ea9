"""Upload folders to Kaggle with its command-line client, and check on Kaggle that everything arrived.

    python tools/kaggle_push.py dist/bundle dist/infer -m "five folds"

A folder holds dataset-metadata.json (a flat folder of files) or kernel-metadata.json (a notebook). Datasets go first,
since notebooks attach them; one that exists gets a new version. The client ends with code 0 after many failures, and
with an error after some successes, so what counts is what Kaggle has afterwards: a new version that lists every file
of the folder in its size, and no other. (Kaggle tells no checksum; infer.ipynb checks those of the manifest.)

Needs the client 2.2.4 or newer (pip install kaggle six) and an account (kaggle auth login). Exit code 0 only if all
folders are verified. What the client says goes to stderr. A model that Kaggle drops from the inputs of a notebook
goes unnoticed: the client shows dropped datasets, notebooks and competitions only.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import kaggle_metadata

KINDS = {kaggle_metadata.DATASET_FILE: "dataset", kaggle_metadata.KERNEL_FILE: "kernel"}
GRACE = 20  # seconds for an upload to show that the client calls failed: perhaps only the answer was lost
ANSWER = 120  # seconds for the client to answer a question

# Kaggle says 403 about a dataset that does not exist or does not show yet; 404 is what one would expect.
ABSENT = re.compile(
    r"^40[34] Client Error|^The resource was not found|^You don't have access", re.M
)
FAILURE = re.compile(r"unsuccessful|\berror\b|skipping", re.I)
LOST = re.compile(r"^(?:Upload unsuccessful|Skipping).*", re.M)
PROGRESS = r"Starting upload for file |Upload successful: |.*B/s\]"
HARMLESS = re.compile(  # lines with names, in which any word may stand, and calls that the client repeats by itself
    rf"{PROGRESS}|Your private Dataset is|Dataset version is|Kernel version .*success|The following|Request failed: "
)
HOPELESS = {
    "No module named": "the kaggle client does not start; it needs: pip install kaggle six",
    "unrecognized arguments": "the kaggle client is too old, 2.2.4 is needed: pip install --upgrade kaggle six",
    "Authentication required": "Kaggle does not know you: run `kaggle auth login`, or set KAGGLE_API_TOKEN to a token "
    "from https://www.kaggle.com/settings/api",
}


class PushError(Exception):
    """What was not uploaded, or could not be verified, and why."""


# ---- the client


def find_client():
    client = shutil.which("kaggle", path=os.path.dirname(sys.executable)) or shutil.which("kaggle")
    if not client:
        raise PushError("there is no kaggle client: pip install kaggle six")
    return client


def client(*arguments, upload=False):
    """Exit code and output of one run of the client. An upload is shown as it goes and takes as long as it likes."""
    output = []
    with (
        tempfile.TemporaryDirectory() as private
    ):  # in a shared one the client finds and resumes uploads that broke
        environment = os.environ | {"TMPDIR": private, "PYTHONUNBUFFERED": "1"}
        streams = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
        }
        with subprocess.Popen([find_client(), *arguments], env=environment, **streams) as process:
            watchdog = threading.Timer(threading.TIMEOUT_MAX if upload else ANSWER, process.kill)
            watchdog.daemon = True
            watchdog.start()
            for line in io.TextIOWrapper(
                process.stdout, "utf-8", "replace", newline=""
            ):  # keeps \r of progress bars
                output.append(line)
                if upload:
                    print(line, end="", file=sys.stderr, flush=True)
            if watchdog.finished.is_set():
                output.append(f"\n(no answer within {ANSWER} s)")
            watchdog.cancel()
    output = "".join(output)
    for words, advice in HOPELESS.items():
        if process.returncode and words in output:
            raise PushError(advice)
    return process.returncode, output


def tail(output, lines=8):
    """What the client said last, to stand behind a message; without the files that went well."""
    said = [line for line in output.splitlines() if line.strip() and not re.match(PROGRESS, line)]
    return "\nThe client said:\n" + "\n".join(
        f"  | {line}" for line in said[-lines:] or ["(nothing)"]
    )


def complaints(output):
    return [
        line for line in output.splitlines() if FAILURE.search(line) and not HARMLESS.match(line)
    ]


def until_answered(seconds, question, *arguments):
    """Ask again, ever more slowly, while the answer is a PushError: a hiccup of a check is no failed upload."""
    deadline, pause = time.monotonic() + seconds, 1.0
    while True:
        try:
            return question(*arguments)
        except PushError:
            if time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(pause * 1.5, 30)


# ---- what Kaggle has


def dataset_state(ref):
    """Status and version number of a dataset; ("absent", 0) if there is none that this account can see."""
    code, output = client("datasets", "status", ref, "--format", "json")
    found = re.search(r"^\{.*\}", output, re.M)
    if code == 0 and found:
        state = json.loads(found[0])
        return state["status"], int(state["current_version_number"] or 0)
    if ABSENT.search(output):
        return "absent", 0
    raise PushError(f"cannot tell whether {ref} exists{tail(output)}")


def in_words(ref, status, version):
    return (
        f"{ref} does not exist" if status == "absent" else f"{ref} is {status} at version {version}"
    )


def changed_state(ref, before):
    if (state := dataset_state(ref)) == before:
        raise PushError(f"nothing new came: {in_words(ref, *state)}, as before the upload")
    return state


def finished_state(ref, before):
    """The state once Kaggle has processed a new version, for better or worse."""
    status, version = changed_state(ref, before)
    if status not in ("ready", "failed", "deleted") or (status == "ready" and version <= before[1]):
        raise PushError(f"{in_words(ref, status, version)}: no new version is ready")
    return status, version


def listed_files(ref, version):
    """Name -> bytes of the files of one version."""
    files, token = {}, ""
    while token is not None:
        page = [f"--page-token={token}"] if token else []
        code, output = client(
            "datasets", "files", f"{ref}/{version}", "-v", "--page-size", "200", *page
        )
        head, found, table = output.partition("name,size,creationDate")
        rows = {row[0]: int(row[1]) for row in csv.reader(table.splitlines()) if len(row) == 3}
        if code or not found or not rows.keys() - files.keys():
            raise PushError(f"cannot list the files of {ref} version {version}{tail(output)}")
        files |= rows
        following = re.search(r"^Next Page Token = (\S+)", head, re.M)
        token = following and following[1]
    return files


def compare(ref, version, here, there):
    """A PushError that names each file that is not the same here and there."""
    both = sorted(here.keys() & there.keys())
    differences = {
        "missing": sorted(here.keys() - there.keys()),
        "extra": sorted(there.keys() - here.keys()),
        "of another size": [
            f"{n} ({there[n]} bytes instead of {here[n]})" for n in both if here[n] != there[n]
        ],
    }
    told = [f"{what}: {', '.join(names)}" for what, names in differences.items() if names]
    if told:
        raise PushError(f"{ref} version {version} is not what the folder holds; {'; '.join(told)}")


def verified_version(ref, before, here, wait, told):
    """The number of the new version, which holds exactly the files that are here."""
    if not told:
        until_answered(min(wait, GRACE), changed_state, ref, before)
    status, version = until_answered(wait, finished_state, ref, before)
    if status != "ready":
        raise PushError(f"Kaggle could not process {ref} version {version}: {status}")
    compare(ref, version, here, until_answered(wait, listed_files, ref, version))
    return version


# ---- pushing


def sizes(folder):
    """Name -> bytes of the files that are to arrive."""
    odd = sorted(path.name for path in folder.iterdir() if not path.is_file())
    if odd:
        raise PushError(f"{folder} may hold files only, the client leaves out: {', '.join(odd)}")
    names = {path.name: path.stat().st_size for path in folder.iterdir()}
    del names[kaggle_metadata.DATASET_FILE]
    if not names:
        raise PushError(f"{folder} has no file to upload")
    return names


def plan(folders):
    """(kind, id, folder) of each folder, datasets first. What is wrong with a folder shows before any upload."""
    pushes = []
    for folder in map(Path, folders):
        metadata = [folder / name for name in KINDS if (folder / name).is_file()]
        if len(metadata) != 1:
            raise PushError(f"{folder} must hold either {' or '.join(KINDS)}")
        try:
            ref = json.loads(metadata[0].read_text("utf-8"))["id"]
        except (ValueError, KeyError, TypeError) as error:
            raise PushError(f"{metadata[0]} has no id that can be read: {error!r}") from error
        if not re.fullmatch(r"[\w-]+/[\w-]+", str(ref)):
            raise PushError(f"{metadata[0]}: id must be owner/slug, got {ref!r}")
        pushes.append((KINDS[metadata[0].name], ref, folder))
        if pushes[-1][0] == "dataset":
            sizes(folder)
    return sorted(pushes, key=lambda item: item[0])


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder):
    """What is not as bundle.py packed it: after the upload, only sizes can be compared."""
    if not all((folder / name).is_file() for name in ("manifest.json", "kernel_utils.py")):
        return []
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        seal, files = manifest.pop("sha256"), manifest["files"]
        content = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        if hashlib.sha256(content.encode()).hexdigest() != seal:
            return ["manifest.json is not what was packed"]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return [f"manifest.json is not what was packed: {error!r}"]
    there = {name: sha256(folder / name) for name in sizes(folder) if name != "manifest.json"}
    told = {name: entry["sha256"] for name, entry in files.items()}
    return [
        f"{name} is not what was packed"
        for name in sorted(there.keys() | told)
        if there.get(name) != told.get(name)
    ]


def check(folder):
    """A PushError with what Kaggle would refuse or lose of a folder, and what was damaged since it was packed."""
    if problems := kaggle_metadata.folder_problems(folder) + damage(folder):
        raise PushError("\n".join(f"{folder}: {problem}" for problem in problems))


def push_dataset(ref, folder, notes, wait):
    here, before = sizes(folder), dataset_state(ref)
    if before[0] not in ("absent", "ready", "failed"):
        raise PushError(f"{in_words(ref, *before)}: push again when Kaggle is done with that")
    task = ["create"] if before[0] == "absent" else ["version", f"--message={notes}"]
    code, output = client("datasets", *task, "-p", str(folder), upload=True)
    told = (
        code == 0
        and not complaints(output)
        and bool(re.search("is being created|not valid tags", output))
    )
    # A refusal counts unless it answers a repeated call: then the first one may have done the work.
    if (
        "creation error:" in output
        and "Will retry" not in output.rpartition("Upload successful: ")[2]
    ):
        raise PushError(f"{ref} was refused{tail(output)}")
    try:
        version = verified_version(ref, before, here, wait, told)
    except PushError as error:
        raise PushError(f"{error}{'' if told else tail(output)}") from error
    if LOST.search(output):  # a file of the same name and size may be one of an earlier version
        raise PushError(f"{ref} version {version} cannot be right{tail(output)}")
    remark = "" if told else ", whatever the client said"
    size = f"{len(here)} files, {sum(here.values()) / 1e6:.1f} MB"
    print(f"{ref} version {version}: {size}, all there{remark}", flush=True)


def push_kernel(ref, folder):
    code, output = client("kernels", "push", "-p", str(folder), upload=True)
    pushed = re.search(r"^Kernel version ?(\d*) successfully pushed", output, re.M)
    if code or not pushed or complaints(output):
        raise PushError(
            f"{ref} was not pushed, or the answer got lost: see kaggle kernels status {ref}{tail(output)}"
        )
    name = f"{ref} version {pushed[1]}".strip()
    dropped = re.findall(r"not valid (\w+ sources) .*: (.*)", output)
    if dropped:
        raise PushError(f"{name} was pushed without its {'; '.join(map(' '.join, dropped))}")
    code, output = client("kernels", "status", ref)
    status = re.search(r'has status "(?:KernelWorkerStatus\.)?(\w+)"', output)
    if code or not status:
        raise PushError(f"{name} was pushed, but cannot be seen{tail(output)}")
    if re.match("ERROR|CANCEL", status[1]):
        raise PushError(f"{name} was pushed, but its run failed{tail(output)}")
    print(f"{name}: pushed, {status[1].lower()}", flush=True)


def push(folders, notes, wait):
    """Upload the folders, datasets first; a line for each that is verified, a PushError for the first that is not."""
    pushes = plan(folders)
    for _, _, folder in pushes:
        check(folder)
    find_client()
    for kind, ref, folder in pushes:
        push_dataset(ref, folder, notes, wait) if kind == "dataset" else push_kernel(ref, folder)


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="with dataset- or kernel-metadata.json"
    )
    parser.add_argument(
        "-m", "--notes", default="update", help="what is new in this version of a dataset"
    )
    parser.add_argument(
        "--wait", type=float, default=600, metavar="SECONDS", help="for a dataset to be ready (600)"
    )
    arguments = parser.parse_args()
    try:
        push(arguments.folders, arguments.notes, arguments.wait)
    except PushError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

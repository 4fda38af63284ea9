"""Kaggle's rules for what one uploads, checked before a byte is sent.

    python tools/kaggle_metadata.py FOLDER [FOLDER ...]

A folder holds dataset-metadata.json and the files of the dataset, or kernel-metadata.json and a
notebook. Prints every problem of every folder, or "FOLDER: fine". Exit code 0 only if all are fine.

Checked is what tools/bundle.py writes: what Kaggle's client (2.2.5) or its server refuses, and
what goes up without an error but not as meant. Other fields of Kaggle's are left to the client,
which refuses before it uploads.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path

DATASET_FILE, KERNEL_FILE = "dataset-metadata.json", "kernel-metadata.json"
MAX_FILES = 1000  # the server: "The file count exceeds the maximum of 1000"
MAX_BYTES = 200 * 10**9  # Kaggle's limit for a person's private datasets; unverified
MAX_JSON_BYTES = 10**8  # ours: metadata and notebooks are far smaller
MAX_CODE_BYTES = 10**6  # of a notebook; reported by users in 2021, unverified

LICENSES = """CC0-1.0 CC-BY-SA-3.0 CC-BY-SA-4.0 CC-BY-NC-SA-4.0 GPL-2.0 ODbL-1.0 DbCL-1.0
    copyright-authors other unknown CC-BY-4.0 CC-BY-NC-4.0 PDDL CC-BY-3.0 CC-BY-3.0-IGO
    US-Government-Works CC-BY-NC-SA-3.0-IGO CDLA-Permissive-1.0 CDLA-Sharing-1.0 CC-BY-ND-4.0
    CC-BY-NC-ND-4.0 ODC-BY-1.0 LGPL-3.0 AGPL-3.0 FDL-1.3 EU-ODP-Legal-Notice apache-2.0
    GPL-3.0""".split()

SLUG = "[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*"
VERSION = "[1-9][0-9]{0,8}"
MODEL = "[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*){3}"  # has underscores, dots
SOURCES = {  # field of a kernel -> (what an entry is, its pattern)
    "dataset_sources": ("owner/slug or owner/slug/version", f"{SLUG}/{SLUG}(?:/{VERSION})?"),
    "kernel_sources": (
        "owner/slug or owner/slug/version, the slug of 5 characters or more",
        f"{SLUG}/(?=[^/]{{5}}){SLUG}(?:/{VERSION})?",
    ),
    "competition_sources": ("the name in the competition's address, not the address", SLUG),
    "model_sources": ("owner/model/framework/variation/version", f"{MODEL}/{VERSION}"),
}
NAME = "[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?"
FILE_NAME = f"(?=.{{1,100}}$){NAME}"
MAX_RUN_NAME = 75  # leaves room for what follows, such as .sentencepiece.bpe.model
ARCHIVES = tuple(".zip .7z .rar .tar .gz .tgz .bz2 .tbz2 .xz .txz .zst".split())
NOT_UPLOADED = (DATASET_FILE, KERNEL_FILE, "datapackage.json", "model-metadata.json")
NOT_UPLOADED += ("model-instance-metadata.json", "dataset-cover-image.")  # beginnings of names


# ---- Fields


def shown(value):
    """A JSON value for a message: one short line of ASCII."""
    if value is None:
        return "nothing"
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def id_problems(value, shortest):
    """The owner's capitals stay, the slug is what Kaggle makes of a title: lower case."""
    owner, _, slug = value.partition("/") if isinstance(value, str) else ("", "", "")
    is_sound = re.fullmatch(SLUG, owner) and re.fullmatch(SLUG, slug) and slug == slug.lower()
    if is_sound and shortest <= len(slug) <= 50:
        return []
    expected = f"owner/slug, the slug of {shortest} to 50 lower-case letters, digits and hyphens"
    return [f"id must be {expected}, hyphens single and inside, got {shown(value)}"]


def title_problems(value, shortest):
    is_line = isinstance(value, str) and value.isprintable() and value == value.strip()
    if is_line and shortest <= len(value) <= 50:
        return []
    expected = f"one line of {shortest} to 50 characters without spaces at its ends"
    return [f"title must be {expected}, got {shown(value)}"]


def license_problems(value):
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict):
        return [f'licenses must be a list of exactly one {{"name": ...}}, got {shown(value)}']
    name = value[0].get("name")
    if name in LICENSES:
        return []
    return [f"licenses must be one of {', '.join(LICENSES)}, got {shown(name)}"]


def source_problems(field, value):
    """Problems of a list of sources, worded to follow its name."""
    entry, pattern = SOURCES[field]
    if not isinstance(value, list):
        return [f"must be a list in square brackets, got {shown(value)}"]
    problems = []
    for place, item in enumerate(value):
        if not isinstance(item, str) or not re.fullmatch(pattern, item):
            problems.append(f"[{place}] must be {entry}, got {shown(item)}")
    return problems


def code_problems(name, folder):
    """Problems of the notebook that a kernel runs."""
    path = os.path.join(folder, str(name))
    if os.path.basename(path) != name or not os.path.isfile(path) or os.path.islink(path):
        return [f"code_file must be the name of a file in the folder, got {shown(name)}"]
    problems = []
    size = os.path.getsize(path)
    if size >= MAX_CODE_BYTES:
        problems.append(f"code_file {name} must be below {MAX_CODE_BYTES} bytes, has {size}")
    if not name.endswith(".ipynb"):
        problems.append(f"code_file {name} must be a notebook, a file that ends in .ipynb")
    try:
        for cell in read_json(path)["cells"]:
            "".join([cell["cell_type"], *cell["source"]])  # as the client reads it
    except ValueError as error:
        problems.append(f"code_file {name} {error}")
    except (KeyError, TypeError):
        cells = '"cells", each with "cell_type" and "source"'
        problems.append(f"code_file {name} must be a notebook: {cells}")
    return problems


# ---- The two metadata files


def dataset_problems(metadata):
    """Problems of the parsed content of dataset-metadata.json."""
    if not isinstance(metadata, dict):
        return [f"{DATASET_FILE}: must hold one object, got {shown(metadata)}"]
    title = metadata.get("title")
    problems = id_problems(metadata.get("id"), shortest=6) + title_problems(title, shortest=6)
    if "_" in str(title):  # the server answers with a bare "400 - Bad Request"
        problems.append(f"title must have no underscore, got {shown(title)}")
    problems += license_problems(metadata.get("licenses"))
    return [f"{DATASET_FILE}: {problem}" for problem in problems]


def kernel_problems(metadata, folder):
    """Problems of the parsed content of kernel-metadata.json, and of the notebook in the folder."""
    if not isinstance(metadata, dict):
        return [f"{KERNEL_FILE}: must hold one object, got {shown(metadata)}"]
    name, title = metadata.get("id"), metadata.get("title")
    problems = id_problems(name, shortest=5) + title_problems(title, shortest=5)
    if not problems:  # Kaggle makes the slug from the title; another one makes a second notebook
        slug = re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")
        if slug != name.split("/")[1]:
            becomes = f"but {shown(title)} becomes {slug}"
            problems.append(f"title must become the slug of id, {name}, {becomes}")
    for field, expected in (("language", "python"), ("kernel_type", "notebook")):
        if metadata.get(field) != expected:
            problems.append(f"{field} must be {expected}, got {shown(metadata.get(field))}")
    internet = metadata.get("enable_internet")
    if not isinstance(internet, bool):  # Kaggle's client turns it on where the field is missing
        problems.append(f"enable_internet must be true or false, got {shown(internet)}")
    for field in SOURCES:
        wrong = source_problems(field, metadata.get(field, []))
        problems += [f"{field} {problem}" for problem in wrong]
    problems += code_problems(metadata.get("code_file"), folder)
    return [f"{KERNEL_FILE}: {problem}" for problem in problems]


# ---- The files of a dataset, and folders


def safe_name(text):
    """`text` as the beginning of file names that Kaggle takes; itself where it is one in lower
    case. Any other ends in a digest of the text, so that other texts have other names."""
    if re.fullmatch(NAME, text) and len(text) <= MAX_RUN_NAME and text == text.lower():
        return text
    words = re.sub("[^A-Za-z0-9._]+", "-", text).strip("-._")
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{words[: MAX_RUN_NAME - 9]}-{digest}".lstrip("-")


def file_problems(sizes):
    """Names and sizes, {name: bytes}, that Kaggle or its client refuses, loses or changes."""
    problems, names = [], {}
    for name, size in sizes.items():
        if not re.fullmatch(FILE_NAME, name):
            allowed = "1 to 100 ASCII letters, digits, '.', '_' and '-'"
            ends = "begins with a letter or digit and does not end in a dot"
            problems.append(f"file {name!a} must have a name of {allowed} that {ends}")
        if name.lower().endswith(ARCHIVES):
            problems.append(f"file {name!a} is an archive, which Kaggle unpacks")
        if name.lower().startswith(NOT_UPLOADED):
            problems.append(f"file {name!a} has a name of metadata, which is not uploaded")
        if size == 0:
            problems.append(f"file {name!a} is empty: 0 bytes")
        first = names.setdefault(name.lower(), name)
        if first != name:
            problems.append(f"files {first!a} and {name!a} differ only by case")
    if len(sizes) > MAX_FILES:
        problems.append(f"a dataset can have {MAX_FILES} files, got {len(sizes)}")
    if sum(sizes.values()) > MAX_BYTES:
        problems.append(f"a dataset can have {MAX_BYTES} bytes, got {sum(sizes.values())}")
    return problems


def read_json(path):
    """The content of a JSON file; what is wrong with it is a ValueError."""
    if os.path.islink(path) or not os.path.isfile(path):
        raise ValueError("must be a regular file")
    if os.path.getsize(path) > MAX_JSON_BYTES:
        raise ValueError(f"must have at most {MAX_JSON_BYTES} bytes")
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"must be JSON in UTF-8: {error}") from error


def dataset_file_problems(folder):
    """Problems of what lies beside dataset-metadata.json."""
    sizes, problems = {}, []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            problems.append(f"file {path.name!a} is no regular file: put the file itself here")
        elif path.is_dir():
            problems.append(f"folder {path.name!a} is a sub-folder, which Kaggle's client drops")
        elif path.name != DATASET_FILE:
            sizes[path.name] = path.stat().st_size
    if not sizes:
        problems.append("there is no file to upload")
    return problems + file_problems(sizes)


def folder_problems(folder):
    """Problems of a folder that is to be uploaded as a dataset or a notebook."""
    folder = Path(folder)
    present = [name for name in (DATASET_FILE, KERNEL_FILE) if os.path.lexists(folder / name)]
    if len(present) != 1:
        return [f"must be a folder with either {DATASET_FILE} or {KERNEL_FILE}"]
    try:
        metadata = read_json(folder / present[0])
    except ValueError as error:
        return [f"{present[0]}: {error}"]
    if present == [DATASET_FILE]:
        return dataset_problems(metadata) + dataset_file_problems(folder)
    return kernel_problems(metadata, folder)


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="as it would be uploaded")
    is_fine = True
    for folder in parser.parse_args().folders:
        problems = folder_problems(folder)
        is_fine = is_fine and not problems
        for problem in problems or ["fine"]:
            print(f"{folder}: {problem}")
    sys.exit(0 if is_fine else 1)


if __name__ == "__main__":
    main()

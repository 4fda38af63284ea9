"""Kaggle's rules for what one uploads, checked before a byte is sent.

    python tools/kaggle_metadata.py FOLDER [FOLDER ...]

A folder holds dataset-metadata.json (and the files of the dataset) or kernel-metadata.json (and the code file), or
both. Prints every problem of every folder, or "FOLDER: fine". Exit code 0 only if all are fine.

The rules are what Kaggle's command-line client refuses or crashes on (kaggle 2.2.5), what only the server refuses, as
far as its messages are known, what goes up without an error but not as meant, and what this kit wants to be explicit.
"""

import argparse
import codecs
import difflib
import json
import os
import re
import sys
import unicodedata
from pathlib import Path, PureWindowsPath

DATASET_FILE, KERNEL_FILE = "dataset-metadata.json", "kernel-metadata.json"
MAX_FILES = 1000  # the server: "The file count exceeds the maximum of 1000"
MAX_BYTES = 200 * 10**9  # the limit that Kaggle states for a person's private datasets; unverified
MAX_CODE_BYTES = (
    10**6
)  # with outputs, though the client leaves them out; reported by users in 2021, unverified

LICENSES = tuple(
    "CC0-1.0 CC-BY-SA-3.0 CC-BY-SA-4.0 CC-BY-NC-SA-4.0 GPL-2.0 ODbL-1.0 DbCL-1.0 copyright-authors other unknown "
    "CC-BY-4.0 CC-BY-NC-4.0 PDDL CC-BY-3.0 CC-BY-3.0-IGO US-Government-Works CC-BY-NC-SA-3.0-IGO CDLA-Permissive-1.0 "
    "CDLA-Sharing-1.0 CC-BY-ND-4.0 CC-BY-NC-ND-4.0 ODC-BY-1.0 LGPL-3.0 AGPL-3.0 FDL-1.3 EU-ODP-Legal-Notice "
    "apache-2.0 GPL-3.0".split()
)
MACHINE_SHAPES = {  # name -> which of enable_gpu and enable_tpu it stands for
    **dict.fromkeys(
        "NvidiaTeslaT4 NvidiaTeslaT4Highmem NvidiaTeslaA100 NvidiaL4 NvidiaL4X1".split(), "gpu"
    ),
    **dict.fromkeys("NvidiaH100 NvidiaRtxPro6000".split(), "gpu"),
    **dict.fromkeys("TpuV5E8 TpuV6E8".split(), "tpu"),
}
REFUSED_SHAPES = {  # in lower case -> why; the client only warns, and of the last two not even that
    "nvidiateslap100": "is retired, the session gets another GPU: use NvidiaTeslaT4",
    "tpuv38": "is retired, the session gets another TPU: use TpuV5E8",
    "tpu1vmv38": "is retired, the session gets another TPU: use TpuV5E8",
    "tpuv232": "is retired, the session runs on a CPU: use TpuV5E8",
    "tpuv2256": "is retired, the session runs on a CPU: use TpuV5E8",
    "gpu": "names no machine, though `kernels pull` writes it: use NvidiaTeslaT4",
    "none": "is a text, though `kernels pull` writes it: leave the field out for a CPU",
}

SLUG = "[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*"
VERSION = "[1-9][0-9]{0,8}"
MODEL_PART = (
    "[A-Za-z0-9][A-Za-z0-9._-]*"  # names of models and variations do have underscores and dots
)
PLACEHOLDER = re.compile("INSERT_[A-Z_]+_HERE")  # what `datasets init` and `kernels init` write

COLUMN_TEXTS = ("name", "title", "description", "type")  # of a column in the schema of a resource
HINTS = {  # added where the field is missing or unknown
    "enable_internet": ": without it Kaggle's client turns the internet on",
    "isPrivate": ": a dataset is private unless it is created with --public",
}


# ---- 1. Parts of messages ----


def shown(value):
    """A JSON value for a message: one short line of ASCII, whatever came."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def nearest(value, names):
    """' (did you mean X?)' where a known name is near, else nothing."""
    known = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(value).lower(), known, n=1)
    case = " upper and lower case count" if near and near[0] == str(value).lower() else ""
    return f" (did you mean {known[near[0]]}?{case})" if near else ""


# ---- 2. Checkers of one field: (value, folder) -> problems, worded to follow the name of the field ----


def of(kind, name):
    """Decorator of a checker: values of another type are refused before it sees them."""

    def decorate(check):
        return lambda value, folder: (
            check(value, folder)
            if isinstance(value, kind)
            else [f"must be {name}, got {shown(value)}"]
        )

    return decorate


def anything(value, folder):
    return ()


text = of(str, "text")(anything)
flag = of(bool, "true or false without quotes")(
    anything
)  # the client takes "true" too, and crashes on 1 and null


def number(value, folder):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        yield f"must be a whole number from 1, got {shown(value)}"


@of(str, "text")
def subtitle(value, folder):
    if value and not 20 <= len(value) <= 80:
        yield f"must be empty or have 20 to 80 characters, got {len(value)}: {shown(value)}"


def or_null(check):
    return lambda value, folder: () if value is None else check(value, folder)


def one_of(*names):
    def check(value, folder):
        if value not in names:
            yield f"must be one of {', '.join(names)}, got {shown(value)}{nearest(value, names)}"

    return check


def title(low, high=50, underscore=True):
    @of(str, "text")
    def check(value, folder):
        if not low <= len(value) <= high:
            yield f"must have {low} to {high} characters, got {len(value)}: {shown(value)}"
        if not value.isprintable() or value != value.strip():
            yield f"must be one line without spaces at its ends, got {shown(value)}"
        if "_" in value and not underscore:
            yield f"must have no underscore, got {shown(value)}"

    return check


def identifier(low, high=50):
    """Id of something of one's own. The owner's capitals stay, the slug is what Kaggle makes of a title: lower case."""

    def check(value, folder):
        owner, _, slug = value.partition("/") if isinstance(value, str) else ("", "", "")
        if not owner or not slug or "/" in slug:
            yield f"must be owner/slug without a version, got {shown(value)}"
            return
        if not re.fullmatch(SLUG, owner):
            yield f"must have an owner of letters, digits and single hyphens inside, got {shown(owner)}"
        if not re.fullmatch(SLUG, slug) or slug != slug.lower():
            yield f"must have a slug of lower-case letters, digits and single hyphens inside, got {shown(slug)}"
        if not low <= len(slug) <= high:
            yield f"must have a slug of {low} to {high} characters, got {len(slug)}: {shown(slug)}"

    return check


def list_of(form, pattern):
    @of(list, "a list in square brackets")
    def check(value, folder):
        for place, item in enumerate(value):
            if not isinstance(item, str) or not re.fullmatch(pattern, item):
                yield f"[{place}] must be {form}, got {shown(item)}"
            elif item in value[:place]:
                yield f"[{place}] is in the list twice: {shown(item)}"

    return check


@of(str, "text")
def file_inside(value, folder):
    path = PureWindowsPath(value)  # knows both kinds of slash, and drives
    here, there = os.path.realpath(folder), os.path.join(folder, value)
    if not value or path.anchor or ".." in path.parts:
        yield f"must be a path inside the folder, got {shown(value)}"
    elif not os.path.isfile(there):
        yield f"must be a file in the folder, but there is no {shown(value)}"
    elif os.path.realpath(there) != os.path.join(here, os.path.normpath(value)):
        yield f"must be a file and not a symbolic link, got {shown(value)}"


def machine_shape(value, folder):
    reason = REFUSED_SHAPES.get(value.strip().lower()) if isinstance(value, str) else None
    if reason:
        yield f"{shown(value)} {reason}"
    elif value not in (None, ""):
        yield from one_of(*MACHINE_SHAPES)(value, folder)


def licenses(value, folder):
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict):
        yield f'must be a list of exactly one {{"name": ...}}, got {shown(value)}'
    else:
        yield from one_of(*LICENSES)(value[0].get("name"), folder)


@of(list, "a list in square brackets")
def resources(value, folder):
    paths = [item.get("path") if isinstance(item, dict) else None for item in value]
    for place, (item, path) in enumerate(zip(value, paths, strict=True)):
        yield from (f"[{place}] {problem}" for problem in resource(item, folder))
        if path is not None and path in paths[:place]:
            yield f"[{place}] path is in the list twice: {shown(path)}"


@of(dict, "an object")
def resource(value, folder):
    path, schema = value.get("path"), value.get("schema", {})
    yield from (f"path {problem}" for problem in file_inside(path, folder))
    if (
        isinstance(path, str) and "/" in path
    ):  # the client compares it with the names at the top of the folder
        yield f"path must be a plain file name, got {shown(path)}"
    yield from (
        f"description {problem}" for problem in or_null(text)(value.get("description"), folder)
    )
    fields = schema.get("fields", []) if isinstance(schema, dict) else None
    if not isinstance(fields, list) or not all(
        isinstance(field, dict) and "name" in field for field in fields
    ):
        yield f'schema must be {{"fields": [{{"name": ...}}, ...]}}, got {shown(schema)}'
    elif not all(isinstance(field.get(key, ""), str) for field in fields for key in COLUMN_TEXTS):
        yield f"schema fields must have texts as {', '.join(COLUMN_TEXTS)}"


# ---- 3. The two metadata files ----

KEYWORDS = list_of("text", r".*\S.*")
DATASET_FIELDS = {
    "id": identifier(6),
    "id_no": or_null(number),
    "title": title(
        6, underscore=False
    ),  # the server answers an underscore with a bare "400 - Bad Request"
    "subtitle": or_null(subtitle),
    "description": or_null(text),
    "licenses": licenses,
    "keywords": KEYWORDS,
    "resources": or_null(resources),
    # read by `datasets metadata --update` only
    "expectedUpdateFrequency": or_null(text),
    "userSpecifiedSources": or_null(text),
    "image": or_null(text),
}
KERNEL_FIELDS = {
    "id": identifier(5),
    "id_no": or_null(number),
    "title": title(5),
    "code_file": file_inside,
    "language": one_of("python", "r", "rmarkdown"),
    "kernel_type": one_of("script", "notebook"),
    **dict.fromkeys(("is_private", "enable_gpu", "enable_tpu", "enable_internet"), flag),
    "machine_shape": machine_shape,
    "keywords": KEYWORDS,
    "dataset_sources": list_of("owner/slug or owner/slug/version", f"{SLUG}/{SLUG}(?:/{VERSION})?"),
    "kernel_sources": list_of(
        "owner/slug or owner/slug/version with a slug of 5 characters or more",
        f"{SLUG}/(?=[^/]{{5}}){SLUG}(?:/{VERSION})?",
    ),
    "competition_sources": list_of("the name in the competition's address, not the address", SLUG),
    "model_sources": list_of(
        "owner/model/framework/variation/version", f"(?:{MODEL_PART}/){{4}}{VERSION}"
    ),
    "docker_image": or_null(text),
    "docker_image_pinning_type": or_null(one_of("original", "latest")),
}
DATASET_REQUIRED = ("id", "title", "licenses")
KERNEL_REQUIRED = ("id", "title", "code_file", "language", "kernel_type", "enable_internet")


def field_problems(metadata, fields, required, folder):
    """Problems of a parsed metadata file, field by field."""
    if not isinstance(metadata, dict):
        yield f"must hold one object in curly brackets, got {shown(metadata)}"
        return
    yield from (
        f"{name} is missing{HINTS.get(name, '')}" for name in required if name not in metadata
    )
    for name, value in metadata.items():
        if name not in fields:
            yield f"{shown(name)} is no field{HINTS.get(name) or nearest(name, fields)}"
        elif isinstance(value, str) and PLACEHOLDER.search(value):
            yield f"{name} still has the placeholder of the template: {shown(value)}"
        else:
            yield from (f"{name} {problem}" for problem in fields[name](value, folder))


def slug_of(words):
    """What Kaggle makes of a title. Exact for ASCII; its client also transliterates other scripts."""
    plain = "".join(
        c for c in unicodedata.normalize("NFKD", words).lower() if not unicodedata.combining(c)
    )
    return re.sub("[^a-z0-9]+", "-", re.sub("(?<=[0-9]),(?=[0-9])", "", plain)).strip("-")


def titles_agree(metadata, folder):
    """Kaggle makes the slug of a new notebook from its title: with another id the next push makes a second notebook."""
    words, name = metadata.get("title"), metadata.get("id")
    if (
        isinstance(words, str)
        and not list(identifier(1)(name, folder))
        and slug_of(words) != name.split("/")[1]
    ):
        yield f"title must become the slug of id, {name}, but {shown(words)} becomes {slug_of(words)}"


def accelerators_agree(metadata, folder):
    given = {kind: metadata.get(f"enable_{kind}") for kind in ("gpu", "tpu")}
    shape = metadata.get("machine_shape")
    stands_for = MACHINE_SHAPES.get(shape) if isinstance(shape, str) else None
    for kind, value in given.items():
        if stands_for and isinstance(value, bool) and value != (kind == stands_for):
            yield f"enable_{kind} is {shown(value)}, but machine_shape {shape} is a {stands_for.upper()}"
    if given == {"gpu": True, "tpu": True}:
        yield "enable_gpu and enable_tpu are both true, but a session has one of them"


def code_problems(metadata, folder):
    """Problems with the content of the code file, if there is one."""
    name, kind = metadata.get("code_file"), metadata.get("kernel_type")
    if list(file_inside(name, folder)):
        return
    path = Path(folder, name)
    if path.stat().st_size >= MAX_CODE_BYTES:
        yield f"code_file {shown(name)} must be below {MAX_CODE_BYTES} bytes, has {path.stat().st_size}"
    if kind in ("script", "notebook") and (kind == "notebook") != (path.suffix.lower() == ".ipynb"):
        yield f"code_file {shown(name)} does not fit kernel_type {kind}: a notebook, and nothing else, ends in .ipynb"
    try:
        content = read_json(path) if kind == "notebook" else read_text(path)
    except (OSError, ValueError) as error:
        yield f"code_file {shown(name)} {error}"
    else:
        if kind == "notebook" and not is_notebook(content):
            yield f'code_file {shown(name)} must be a notebook: "cells", each with "cell_type" and "source"'


def is_notebook(content):
    cells = content.get("cells") if isinstance(content, dict) else None
    return isinstance(cells, list) and all(
        isinstance(cell, dict)
        and isinstance(cell.get("cell_type"), str)
        and isinstance(cell.get("source"), (str, list))
        and all(isinstance(line, str) for line in cell["source"])
        for cell in cells
    )


def dataset_problems(metadata, folder):
    """Problems of the parsed content of dataset-metadata.json, for the dataset in the folder."""
    found = field_problems(metadata, DATASET_FIELDS, DATASET_REQUIRED, folder)
    return [f"{DATASET_FILE}: {problem}" for problem in found]


def kernel_problems(metadata, folder):
    """Problems of the parsed content of kernel-metadata.json, and of the code file in the folder."""
    found = list(field_problems(metadata, KERNEL_FIELDS, KERNEL_REQUIRED, folder))
    if isinstance(metadata, dict):
        for rule in (titles_agree, accelerators_agree, code_problems):
            found += rule(metadata, folder)
    return [f"{KERNEL_FILE}: {problem}" for problem in found]


# ---- 4. The files of a dataset ----

ARCHIVES = tuple(".zip .7z .rar .tar .gz .tgz .bz2 .tbz2 .xz .txz .zst".split())
METADATA_FILES = {
    DATASET_FILE,
    KERNEL_FILE,
    "datapackage.json",
    "model-metadata.json",
    "model-instance-metadata.json",
}
DEVICES = {
    "CON",
    "PRN",
    "AUX",
    "NUL",
    *(f"{port}{i}" for port in ("COM", "LPT") for i in range(10)),
}
NAME_RULES = {  # what is wrong -> has a name that?
    "has no name": lambda name: not name,
    "is an absolute path": lambda name: PureWindowsPath(name).anchor,
    "leads out of the folder": lambda name: ".." in PureWindowsPath(name).parts,
    "lies in a sub-folder, which Kaggle's client drops by default": lambda name: "/" in name,
    "is hidden by the dot at its start": lambda name: any(
        part.startswith(".") for part in name.split("/")
    ),
    "must have a name of ASCII letters, digits, '.', '_' and '-' that begins with a letter or digit and does not end "
    "in a dot": lambda name: (
        not re.fullmatch("[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_-])?", os.path.basename(name))
    ),
    "is an archive, which Kaggle unpacks": lambda name: name.lower().endswith(ARCHIVES),
    "must have a name of at most 100 characters": lambda name: len(name) > 100,
    "has the name of a device on Windows": lambda name: (
        os.path.basename(name).split(".")[0].upper() in DEVICES
    ),
    "is metadata or the cover image, which is not uploaded as a file": lambda name: (
        name.lower() in METADATA_FILES or name.lower().startswith("dataset-cover-image.")
    ),
}


def file_problems(sizes):
    """Names and sizes {name in the dataset's folder: bytes} that Kaggle or its client refuses, loses or changes."""
    problems = [
        f"file {name!a} {wrong}" for name in sizes for wrong, has in NAME_RULES.items() if has(name)
    ]
    problems += [f"file {name!a} is empty: 0 bytes" for name, size in sizes.items() if size == 0]
    first = {}
    for name in sizes:
        if first.setdefault(name.lower(), name) != name:
            problems.append(f"files {first[name.lower()]!a} and {name!a} differ only by case")
    if len(sizes) > MAX_FILES:
        problems.append(f"a dataset can have {MAX_FILES} files, got {len(sizes)}")
    if sum(sizes.values()) > MAX_BYTES:
        problems.append(f"a dataset can have {MAX_BYTES} bytes, got {sum(sizes.values())}")
    return problems


# ---- 5. A folder ----


def read_text(path):
    """Text of a file; what is wrong with it is a ValueError."""
    if path.is_symlink() or not path.is_file():
        raise ValueError("must be a regular file")
    raw = path.read_bytes()
    if raw.startswith(codecs.BOM_UTF8):
        raise ValueError("begins with a byte order mark: save it as UTF-8 without one")
    if not raw.strip():
        raise ValueError("is empty")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"must be UTF-8: {error}") from error


def unique_keys(pairs):
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):  # JSON readers keep the last and say nothing
        raise ValueError(f"has {shown(max(names, key=names.count))} twice in one object")
    return dict(pairs)


def read_json(path):
    content = read_text(path)
    try:
        return json.loads(content, object_pairs_hook=unique_keys)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"must be JSON: {error}") from error


def dataset_file_problems(folder):
    """Problems of what lies beside the metadata."""
    sizes, problems = {}, []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_symlink():
            problems.append(f"file {entry.name!a} is a symbolic link: put the file itself here")
        elif entry.is_dir():
            problems.append(
                f"folder {entry.name!a} is a sub-folder, which Kaggle's client drops by default"
            )
        elif not entry.is_file():
            problems.append(f"file {entry.name!a} is no regular file")
        elif entry.name not in (DATASET_FILE, KERNEL_FILE):
            sizes[entry.name] = entry.stat().st_size
    return problems + file_problems(sizes) + ([] if sizes else ["there is no file to upload"])


def folder_problems(folder):
    """Problems of a folder that is to be uploaded as a dataset or a notebook."""
    folder = Path(folder)
    if not folder.is_dir():
        return ["must be a folder"]
    rules = {DATASET_FILE: dataset_problems, KERNEL_FILE: kernel_problems}
    present = [name for name in rules if os.path.lexists(folder / name)]
    problems = [] if present else [f"must hold {DATASET_FILE} or {KERNEL_FILE}, has neither"]
    for name in present:
        try:
            metadata = read_json(folder / name)
        except (OSError, ValueError) as error:
            problems.append(f"{name}: {error}")
        else:
            problems += rules[name](metadata, folder)
    return problems + (dataset_file_problems(folder) if DATASET_FILE in present else [])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="folder as it would be uploaded"
    )
    problems = {folder: folder_problems(folder) for folder in parser.parse_args().folders}
    for folder, found in problems.items():
        print("\n".join(f"{folder}: {problem}" for problem in found or ["fine"]))
    sys.exit(1 if any(problems.values()) else 0)


if __name__ == "__main__":
    main()

"""Pack finished runs, or the modules and a backbone, into one flat folder that Kaggle takes and
that verifies itself.

    python tools/bundle.py runs/conv1d runs/lstm -o dist/my-bundle --id me/my-bundle \\
        --title "My bundle"                               # --blend blend/blend.json
    python tools/bundle.py --starter --backbone path/to/deberta -o dist/my-kit --id me/my-kit \\
        --title "My kit"
    python tools/bundle.py --check dist/my-bundle

Several runs make an ensemble: the mean of their predictions or, with the blend.json of
blend.ipynb, their blend. All is checked before anything is written where you asked for it, and one
message lists every problem; the same runs give the same bytes. A bundle holds the texts of four
training rows a fold, on which infer.ipynb proves its predictions: keep it private where they are.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernel_utils"), str(ROOT / "tools")]
import kaggle_metadata
import kaggle_push
import openvino_engine
import pretraining
from report import report

import kernel_utils as ku

MODULE = ROOT / "kernel_utils" / "kernel_utils.py"
MODULE_FILES = sorted(MODULE.parent.glob("*.py"))  # of a starter; a bundle of runs has MODULE alone
ENGINE = MODULE.with_name("openvino_engine.py")  # or, packed for it, this one too
BACKBONE_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "bpe.codes"]
BACKBONE_FILES += ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
BACKBONE_FILES += ["vocab.json", *ku._VOCABULARY_FILES, pretraining.PRETRAIN_RECORD]

# Kaggle's image: Python 3.12 on Ubuntu 22.04, whose glibc is 2.35. pip takes each tag by its name.
WHEEL_TAGS = ["manylinux2014_x86_64", *(f"manylinux_2_{n}_x86_64" for n in range(17, 36))]
INSTALL = """import glob, subprocess, sys

mounts = ("*", "d/*/*", "datasets/*/*")  # of a dataset under /kaggle/input
files = [file for mount in mounts for file in glob.glob(f"/kaggle/input/{mount}/*.whl")]
wheels = {file.split("/")[-1]: file for file in files}.values()
install = [sys.executable, *"-m pip install --no-index --no-deps".split()]
subprocess.run([*install, *wheels], check=True)"""


class Refused(ku.KitError):
    """What cannot be packed, with every reason."""

    title = "nothing was written:"


# ---------------------------------------------------------------------------------------
# Problems of files


def plain_file_problems(paths, cache=None):
    """Problems of files that must be plain and not empty; links may lead into a folder `cache`."""
    problems = []
    for path in paths:
        is_cached = cache and Path(os.path.realpath(path)).is_relative_to(cache)
        if path.is_symlink() and not is_cached:
            problems.append(f"{path}: a symbolic link; expected the file itself")
        elif not path.is_file():
            problems.append(f"{path}: missing, or no plain file")
        elif not path.stat().st_size:
            problems.append(f"{path}: empty")
    return problems


def weight_problems(path, half=False):
    """Problems of a safetensors file: broken, or with values that are not finite."""
    limit = torch.finfo(torch.float16 if half else torch.float32).max
    bad = []
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and tensor.numel():
                    tensor = tensor.float() if tensor.itemsize == 1 else tensor  # float8
                    largest = tensor.abs().max().float()
                    bad += [] if largest <= limit else [name]  # NaN too
    except (SafetensorError, OSError) as error:
        return [f"{path}: not a sound safetensors file ({error})"]
    finite = "finite in fp16" if half else "finite"
    return [f"{path}: values that are not {finite} in {ku._comma_join(bad[:3])}"] if bad else []


def vocabulary_problems(folder):
    """Without its vocabulary, transformers loads another tokenizer in silence."""
    if any(path for name in ku._VOCABULARY_FILES for path in folder.glob(name)):
        return []
    return [f"{folder}: no vocabulary; expected one of {ku._comma_join(ku._VOCABULARY_FILES)}"]


def kit_error_problems(function, *arguments):
    """The problems of the KitError that a call raises, or none."""
    try:
        function(*arguments)
    except ku.KitError as error:
        return error.problems
    return []


# ---------------------------------------------------------------------------------------
# Problems of a run


def json_problems(path):
    """Problems of a file that must hold a JSON object, and of a config that could run code."""
    is_config = path.name in ("config.json", "tokenizer_config.json")
    return kit_error_problems(ku._check_no_foreign_code if is_config else ku._read_json, path)


def notebook_part_problems(folder, record):
    """Heads, losses, metrics and schedules of a run that a notebook cell defined."""
    settings = record.get("settings", {}) | record.get("resolved", {})
    problems = []
    for field, table in ku._REGISTRIES.items():
        if settings.get(field, "") not in ("", *table):
            part = f"{field} {settings[field]!r} was defined in a notebook cell"
            problems.append(f"{folder}: {part}; put it into {MODULE} and pack again")
    return problems


def run_problems(folder, half):
    """(record, problems) of a run folder; all is looked at but what it predicts."""
    run = ku.RunFolder(folder)
    problems = plain_file_problems([run.record]) or ku._link_problems(folder)
    problems = problems or json_problems(run.record)
    if problems:
        return None, problems
    record = run.read_record()
    if record.get("status") != "complete" or not record.get("folds"):
        status = f"status {record.get('status')!r} in record.json"
        return None, [f"{folder}: the run did not finish ({status})"]
    record_error = ku._record_error(record)
    if record_error:
        return None, [f"{run.record}: {record_error}"]
    problems = notebook_part_problems(folder, record)
    unsound = [] if problems else [f"{folder}: {problem}" for problem in run.problems()]
    folds = [fold["fold"] for fold in record["folds"]]
    configs = [run.config(fold) for fold in folds]
    weights = [run.weights(fold) for fold in folds]
    tokenizer = [path for path in sorted(run.tokenizer.glob("*")) if not path.is_dir()]
    needed = [run.golden, run.tokenizer / "tokenizer_config.json", *configs, *weights]
    bad = plain_file_problems(dict.fromkeys([*needed, *tokenizer]))
    bad += vocabulary_problems(run.tokenizer)
    for path in tokenizer:
        if path.suffix not in ku._TOKENIZER_SUFFIXES:
            bad.append(f"{path}: expected {ku._comma_join(ku._TOKENIZER_SUFFIXES)}")
    if bad:
        return record, problems + bad
    problems += unsound
    for path in [*configs, *tokenizer]:
        problems += json_problems(path) if path.suffix == ".json" else []
    for path in weights:
        problems += weight_problems(path, half)
    for path in configs:
        if path.read_bytes() != configs[0].read_bytes():
            problems.append(f"{path}: expected the content of fold{folds[0]}/config.json")
    return record, problems


# ---------------------------------------------------------------------------------------
# Runs


def ensemble_problems(records):
    """Problems between runs, {folder: record}: one name twice, predictions of different things."""
    problems, names, defaults = [], set(), ku.Config().to_dict()
    first = next(iter(records))
    for folder, record in records.items():
        name = kaggle_metadata.safe_name(folder.name)
        if name in names:
            problems.append(f"{folder}: two runs are called {folder.name}; rename one folder")
        names.add(name)
        for what in ("task", "id_column", "target_columns", "preprocess", "outputs", "classes"):
            expected = (defaults | records[first] | records[first]["settings"])[what]
            value = (defaults | record | record["settings"])[what]
            if value != expected:
                must = f"{what} must be as in {first}, {expected!r}"
                problems.append(f"{folder}: {must}; got {value!r}")
        expected, value = records[first]["oof"].get("levels"), record["oof"].get("levels")
        if value != expected:
            must = f"its predictions must be cut to labels as in {first}, {expected}"
            problems.append(f"{folder}: {must}; got {value}: train both with one metric")
    return problems


def prove(run):
    """The tokenizer and model of a run; Refused where its golden rows are not predicted as in
    training. Warns of a run that a T4, where precision auto means fp16, would refuse."""
    precisions = ["fp32"] if run.cfg.precision == "fp32" else ["fp32", "fp16"]
    try:
        tokenizer, model = run.open()
        run.check_tokenizer(tokenizer)
        predictions = run.predict_golden(tokenizer, model, precisions)
        run.check_gaps(predictions["fp32"], "float32")
    except (ku.KitError, RuntimeError, TypeError, ValueError, LookupError, ImportError) as error:
        raise Refused(f"{run.name}: does not predict what training predicted: {error}") from error
    if "fp16" in predictions:
        for problem in kit_error_problems(run.check_gaps, predictions["fp16"], "float16"):
            advice = f"a T4 will refuse {run.name}, train it with precision fp32"
            print(f"warning: {advice}: {problem}")
    return tokenizer, model


def save_half(source, target):
    """Copy weights in fp16, without metadata, which would be written in any order. The scale of
    targets, which is in float64, stays."""
    tensors = load_file(source)
    for name, tensor in tensors.items():
        tensors[name] = tensor.half() if tensor.dtype == torch.float32 else tensor
    save_file(tensors, target)


def round_to_half(run, tokenizer, model, folder):
    """(the run with weights in fp16, how far this moves a golden prediction at most). What the
    rounded weights predict becomes golden."""
    rounded = run._replace(weights={fold: folder / f"{run.name}.{fold}" for fold in run.weights})
    for fold, path in run.weights.items():
        save_half(path, rounded.weights[fold])
    predictions = rounded.predict_golden(tokenizer, model, ["fp32"])["fp32"]
    moved = rounded.check_gaps(predictions, "float16")
    print(f"{run.name}: fp16 weights move the golden predictions by {moved:.1e} at most")
    pairs = zip(run.golden["rows"], predictions.tolist(), strict=True)
    rows = [row | {"prediction": prediction} for row, prediction in pairs]
    return rounded._replace(golden=run.golden | {"rows": rows}), moved


def run_files(folder, run):
    """(names of the parts of a run, as the manifest lists them, [(name, source)])."""
    prefix = kaggle_metadata.safe_name(run.name)
    names = {
        "record": f"{prefix}.record.json",
        "config": f"{prefix}.config.json",
        "tokenizer": {name: f"{prefix}.{name}" for name in run.tokenizer},
        "weights": {str(fold): f"{prefix}.fold{fold}.safetensors" for fold in run.weights},
    }
    files = [(names["record"], folder / "record.json"), (names["config"], run.config)]
    files += zip(names["tokenizer"].values(), run.tokenizer.values(), strict=True)
    files += zip(names["weights"].values(), run.weights.values(), strict=True)
    return names, files


def backbone_sources(folder):
    """([(name in the bundle, source)], problems) of a backbone with its tokenizer. It may consist
    of links into the folder of its model in a hub's cache, as snapshots there do."""
    folder = folder.resolve()
    cache = next((path for path in folder.parents if path.name.startswith("models--")), None)
    names = {path.name for pattern in BACKBONE_FILES for path in folder.glob(pattern)}
    files = [folder / name for name in sorted(names | {"config.json"})]
    weights = [path.name for path in files if path.suffix == ".safetensors"]
    problems = plain_file_problems(files, cache) + vocabulary_problems(folder)
    if not weights:
        remedy = "pickles are not packed, save the model with save_pretrained"
        problems.append(f"{folder}: no *.safetensors; {remedy}")
    if problems:
        return [], problems
    for path in files:
        problems += json_problems(path) if path.suffix == ".json" else []
        problems += weight_problems(path) if path.suffix == ".safetensors" else []
    try:
        for index in folder.glob("*.safetensors.index.json"):
            shards = ku._read_json(index, {"weight_map": {str: ku._FILE_NAME}})["weight_map"]
            for shard in sorted({*shards.values()} - {*weights}):
                problems.append(f"{folder / shard}: missing, though {index.name} names it")
        ku._load_tokenizer(folder)
    except ku.KitError as error:
        problems += error.problems
    return [(path.name, path) for path in files], problems


# ---------------------------------------------------------------------------------------
# Wheels


def download_wheels(packages, folder):
    """([(file name, path)], problems) of wheels of the packages, not of what they depend on, that
    fit Kaggle's image."""
    requirement = "[A-Za-z0-9][A-Za-z0-9._-]*(==[A-Za-z0-9.+!]+)?"
    bad = [name for name in packages if not re.fullmatch(requirement, name)]
    if bad:  # such as a run behind --wheels
        expected = "expected packages as name or name==version, after the runs"
        return [], [f"--wheels {ku._comma_join(bad)}: {expected}"]
    platforms = [word for tag in WHEEL_TAGS for word in ("--platform", tag)]
    options = "--disable-pip-version-check download --no-deps --only-binary=:all:".split()
    target = ["--python-version", "3.12", *platforms, "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", *options, *target, *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
        return [], [f"no wheels of {ku._comma_join(packages)}: {reason}"]
    return [(path.name, path) for path in sorted(folder.glob("*.whl"))], []


# ---------------------------------------------------------------------------------------
# The folder


def write_folder(folder, files, manifest):
    """Copy the files and write manifest.json and dataset-metadata.json."""
    entries = {}
    for name, source in files:
        shutil.copyfile(source, folder / name)
        entries[name] = ku._describe_file(folder / name)
    (folder / ku._DATASET_METADATA).write_bytes(ku._sorted_json(manifest["dataset"]))
    (folder / ku._MANIFEST).write_bytes(ku._seal_manifest(manifest | {"files": entries}))


def put_in_place(built, target):
    """Move what is built to where it was asked for. What was there comes back if that fails."""
    aside = built.with_name(f"{built.name}.old")  # it goes with the temporary folder
    try:
        if target.exists():
            target.rename(aside)
        built.rename(target)
    except BaseException:
        if aside.exists():
            aside.rename(target)
        raise


def target_problems(target, kernel_id=None):
    """Only what is not there, or what this tool made and nobody added to, may be replaced."""
    if not target.exists():
        return []
    refusal = f"{target}: exists and is not what this tool made; delete it or choose another name"
    if not target.is_dir():
        return [refusal]
    names = {path.name for path in target.iterdir()}
    with contextlib.suppress(ku.KitError):
        if kernel_id and names == {kaggle_metadata.KERNEL_FILE, f"{target.name}.ipynb"}:
            metadata = ku._read_json(target / kaggle_metadata.KERNEL_FILE)
            return [] if metadata.get("id") == kernel_id else [refusal]
        made = {ku._MANIFEST, ku._DATASET_METADATA, *ku._read_bundle_manifest(target)["files"]}
        return [] if names <= made else [refusal]
    return [refusal] if names else []


def check(folder):
    """Verify a bundle as infer.ipynb will, and its metadata; KitError with every problem. False if
    its predictions could not be checked, since it has another module than this clone: running that
    one is for its owner to decide."""
    manifest = ku._read_bundle_manifest(folder)
    problems = kaggle_metadata.folder_problems(folder)
    metadata = folder / ku._DATASET_METADATA
    if (
        not problems
        and metadata.is_file()
        and metadata.read_bytes() != ku._sorted_json(manifest["dataset"])
    ):
        problems.append(f"{metadata}: not as it was packed; pack again to change it")
    problems += ku._SealedFolder(folder).integrity_problems(manifest["files"])
    if problems:
        raise ku.BundleError([f"{folder}", *problems])
    if ku._file_sha256(MODULE) != manifest["files"]["kernel_utils.py"]["sha256"]:
        other = f"{MODULE} is not the module of the bundle, version {manifest['version']}"
        print(f"predictions not checked: {other}")
        return False
    if manifest["runs"]:
        ku.check_golden(ku.Bundle.open(folder))
    return True


def bundle_sha256(folder):
    """What pins a bundle: the SHA-256 of its manifest, which has those of all other files."""
    return ku._file_sha256(Path(folder, ku._MANIFEST))


# ---------------------------------------------------------------------------------------
# Kernels


def notebook_with(name, settings):
    """A notebook of the clone with values in its settings cell; one that it lacks gets a line."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    missing, lines = dict(settings), []
    for line in cell.source.splitlines():
        setting = line.partition(":")[0]
        if setting in missing:
            declaration = line.partition(" = ")[0]
            comment = "".join(line.partition("  #")[1:])
            line = f"{declaration} = {missing.pop(setting)!r}{comment}"
        lines.append(line)
    lines += [f"{setting} = {value!r}" for setting, value in missing.items()]
    cell.source = "\n".join(lines)
    return notebook


def train_settings(record, backbone):
    """What train.ipynb must be set to for a run to be trained again on Kaggle."""
    run, default = ku.Config.from_dict(record["settings"]).to_dict(), ku.Config().to_dict()
    local = {*ku.Config.names("place"), "data_dir", "backbone"}
    local -= {"run_folds", "test_file", "sample_file", "test_id_column"}
    if run["precision"] == "bf16":  # a T4 has none
        local.add("precision")
    changed = {name: run[name] for name in run if name not in local and run[name] != default[name]}
    return {"backbone": backbone} | changed


def kernel_metadata(name, dataset_id, competition, internet, models, gpu=True):
    """Of a private notebook, on a T4 x2 or a CPU, that reads the bundle and the competition."""
    owner, slug = dataset_id.split("/")
    machine = {"machine_shape": "NvidiaTeslaT4"} if gpu else {}
    return machine | {
        "id": f"{owner}/{slug}-{name}",
        "title": f"{slug} {name}".replace("-", " "),  # Kaggle makes the slug from the title again
        "code_file": f"{name}.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": gpu,
        "enable_tpu": False,
        "enable_internet": internet,  # never left out: the client takes that for true
        "dataset_sources": [dataset_id],
        "competition_sources": [competition],
        "kernel_sources": [],
        "model_sources": models,
    }


# ---------------------------------------------------------------------------------------
# Packing


class Packing:
    """What one command line packs: all of it is checked, then made in temporary folders."""

    def __init__(self, args, folder, kernels):
        self.args = args
        self.folder = folder  # temporary, for the bundle and what goes into it
        self.kernels = kernels  # temporary, for the kernels
        licenses = [{"name": args.license}]
        self.dataset = {"id": args.id, "title": args.title, "licenses": licenses}
        self.problems = []
        self.records = {}  # folder of a run -> its record
        self.runs = {}  # folder of a sound run -> `ku._Run`
        self.files = []  # (name in the bundle, source), of all but the runs
        self.wheels = []
        self.page = ""  # of --report

    def build(self):
        """Check, prove, write, and verify what is written; Refused with every problem."""
        self.check_options()
        can_write_kernels = self.args.kernels and not self.problems
        self.check_runs()
        self.add_files()
        if can_write_kernels and len(self.runs) == len(self.args.runs):
            self.write_kernels()
        self.refuse_problems()
        entries = self.prove_runs()
        self.refuse_problems()
        manifest = {"format": ku._BUNDLE_FORMAT, "version": ku.__version__}
        manifest |= {"versions": ku._versions(), "dataset": self.dataset, "runs": entries}
        if self.wheels:
            manifest |= {"wheels": [name for name, _ in self.wheels], "install": INSTALL}
        bundle = self.folder / "bundle"
        bundle.mkdir()
        write_folder(bundle, self.files, manifest)
        check(bundle)
        if self.args.report:
            (self.folder / "report.html").write_text(self.page, encoding="utf-8")

    def refuse_problems(self):
        if self.problems:
            raise Refused(self.problems)

    def check_options(self):
        args, target = self.args, Path(self.args.output).resolve()
        self.problems += kaggle_metadata.dataset_problems(self.dataset) + target_problems(target)
        sources = kaggle_metadata.source_problems("model_sources", args.model_source)
        self.problems += [f"--model-source {problem}" for problem in sources]
        if args.kernels:
            kernels = Path(args.kernels).resolve()
            if target.is_relative_to(kernels) or kernels.is_relative_to(target):
                places = f"--kernels {kernels} and -o {target}"
                self.problems.append(f"{places} must not lie in each other")
            if not args.competition:
                self.problems.append("--kernels needs --competition, the slug of what they read")
        if args.report:
            try:
                self.page = report(args.report)
            except ValueError as error:
                self.problems.append(f"--report: {error}")
        if args.push:
            try:
                kaggle_push.find_client()
            except kaggle_push.PushError as error:
                self.problems.append(str(error))

    def check_runs(self):
        folders = [Path(run).resolve() for run in self.args.runs]
        for folder in dict.fromkeys(folders):
            if folders.count(folder) > 1:
                self.problems.append(f"{folder}: given twice")
            record, problems = run_problems(folder, self.args.half)
            self.problems += problems
            if record:
                self.records[folder] = record
            if not problems:
                self.runs[folder] = ku._Run.load(folder)
        if self.records:
            self.problems += ensemble_problems(self.records)

    def add_files(self):
        """Everything beside the runs: modules, blend, backbone, wheels; and check all names."""
        args = self.args
        modules = [MODULE, ENGINE] if args.engine else [MODULE]
        if args.starter:
            modules = MODULE_FILES
        self.files += [(path.name, path) for path in modules]
        if args.blend:
            blend = Path(args.blend)
            records = {folder.name: folder / "record.json" for folder in self.records}
            problems = plain_file_problems([blend])
            self.problems += problems or kit_error_problems(ku._Blend.read, blend, records)
            self.files.append((ku._BLEND_FILE, blend))
        if args.backbone:
            try:
                files, problems = backbone_sources(ku._find_backbone(args.backbone))
                self.files += files
                self.problems += problems
            except ku.KitError as error:
                self.problems += error.problems
        if args.wheels and not self.problems:
            self.wheels, self.problems = download_wheels(args.wheels, self.folder)
            self.files += self.wheels
        files = [*self.files]
        named = {run.name: (folder, run) for folder, run in self.runs.items()}
        for folder, run in named.values():
            files += run_files(folder, run)[1]
        names = [name for name, _ in files] + [ku._MANIFEST]
        for name in sorted(set(names)):
            if names.count(name) > 1:
                self.problems.append(f"{name}: two files would have this name")
        sizes = {name: source.stat().st_size for name, source in files if source.is_file()}
        self.problems += kaggle_metadata.file_problems(sizes)

    def prove_runs(self):
        """What the manifest says of each run; its files, as they are packed, come to the others."""
        entries = {}
        for folder, run in self.runs.items():
            entry = {"half": self.args.half}
            try:
                tokenizer, model = prove(run)
                if self.args.half:
                    run, moved = round_to_half(run, tokenizer, model, self.folder)
                    entry["golden_moved_by_half"] = moved
            except ku.KitError as error:
                self.problems += error.problems
                continue
            names, files = run_files(folder, run)
            self.files += files
            if self.args.engine:
                try:
                    named = run._replace(name=kaggle_metadata.safe_name(run.name))
                    int8 = openvino_engine.write_int8(named, self.folder)
                except ku.KitError as error:
                    self.problems += error.problems
                    continue
                self.files += [(path.name, path) for paths in int8.values() for path in paths]
                entry["int8"] = {fold: [path.name for path in int8[fold]] for fold in int8}
            keys = ("settings", "resolved", "versions", "oof", "pretrained")
            record = {key: run.record[key] for key in keys if key in run.record}
            entries[run.name] = names | record | entry | {"golden": run.golden}
        return entries

    def write_kernels(self):
        """A notebook to infer, where there are runs, and one to train each run, or a starter's."""
        if self.records:
            engine = {"engine": self.args.engine} if self.args.engine else {}
            notebook = notebook_with("infer", engine)
            self.write_kernel("infer", notebook, internet=False, models=[], gpu=not engine)
        starter = {"the starter": {"settings": {}}}
        for number, (run, record) in enumerate((self.records or starter).items(), 1):
            name = "train" if len(self.records) < 2 else f"train-{number}"
            backbone, models = self.train_backbone(run, record)
            notebook = notebook_with("train", train_settings(record, backbone))
            is_attached = bool(models or self.args.backbone)
            self.write_kernel(name, notebook, not is_attached, models)

    def train_backbone(self, run, record):
        """(what train.ipynb must set as backbone, model sources) to train a run again: the backbone
        of the starter; the model source that is alone or has its name; or the one of a hub."""
        if self.args.backbone:
            return self.args.id.split("/")[1], []
        backbone = ku.Config.from_dict(record["settings"]).backbone
        sources = self.args.model_source
        if len(self.args.runs) > 1 or len(sources) > 1:
            name = ku._short_name(backbone)  # a part of owner/model/framework/variation/version
            sources = [s for s in sources if name in map(ku._short_name, s.split("/"))]
        if len(sources) == 1:
            return sources[0].split("/")[1], sources
        path, was = Path(backbone).expanduser(), record.get("backbone", "")
        if self.args.model_source:
            have = f"{len(sources)} of the --model-source have the name of its backbone"
            self.problems.append(f"{run}: {have} {backbone}")
        elif path.is_absolute() or path.is_dir() or was.startswith("/kaggle/input"):
            remedy = "is in no hub; attach it with --model-source"
            self.problems.append(f"{run}: backbone {backbone} {remedy}")
        return backbone, []

    def write_kernel(self, name, notebook, internet, models, gpu=True):
        """A folder that `kaggle kernels push` takes."""
        if self.wheels:
            first = next(i for i, cell in enumerate(notebook.cells) if cell.metadata.get("tags"))
            cell = nbformat.v4.new_code_cell(INSTALL, id="wheels")
            notebook.cells.insert(first + 1, cell)
        args, folder = self.args, self.kernels / name
        metadata = kernel_metadata(name, args.id, args.competition, internet, models, gpu)
        folder.mkdir(parents=True)
        nbformat.write(notebook, folder / f"{name}.ipynb")
        (folder / kaggle_metadata.KERNEL_FILE).write_bytes(ku._sorted_json(metadata))
        problems = kaggle_metadata.folder_problems(folder)
        self.problems += [f"--kernels {name}: {problem}" for problem in problems]
        self.problems += target_problems(Path(args.kernels, name), metadata["id"])


def pack(args):
    """Build beside the targets, then move what is built to its place, the bundle last. Returns the
    folders made."""
    target, kernels = Path(args.output), Path(args.kernels or args.output)
    made = []
    with contextlib.ExitStack() as stack:
        temporary = []
        for place in (target, kernels):
            place.parent.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(prefix=".bundle-", dir=place.parent)
            temporary.append(Path(stack.enter_context(folder)))
        Packing(args, *temporary).build()
        for kernel in sorted(temporary[1].iterdir()):
            kernels.mkdir(exist_ok=True)
            put_in_place(kernel, kernels / kernel.name)
            made.append(kernels / kernel.name)
        if args.report:
            page = target.with_name(f"{target.name}.html")
            (temporary[0] / "report.html").replace(page)
        put_in_place(temporary[0] / "bundle", target)
    return [target, *made]


# ---------------------------------------------------------------------------------------
# The command line

OPTIONS = {  # flag -> keywords of argparse
    "--output": dict(metavar="DIR", help="folder to make; a bundle that is there is replaced"),
    "--id": dict(metavar="OWNER/SLUG", help="the dataset on Kaggle"),
    "--title": dict(help="its title, 6 to 50 characters"),
    "--license": dict(default="other", help="one of Kaggle's licence names (default: other)"),
    "--half": dict(action="store_true", help="store weights as fp16: half the size"),
    "--engine": dict(
        choices=["openvino"], help="also pack int8 models and what predicts with them on a CPU"
    ),
    "--blend": dict(metavar="FILE", help="blend.json of these runs, to blend by, not the mean"),
    "--starter": dict(action="store_true", help="pack the modules, to train on Kaggle"),
    "--backbone": dict(metavar="DIR", help="for a starter: a folder, or a name for train.ipynb"),
    "--wheels": dict(nargs="+", metavar="PACKAGE", help="also pack wheels of these packages"),
    "--kernels": dict(metavar="DIR", help="also make folders for `kaggle kernels push`"),
    "--competition": dict(metavar="SLUG", help="competition that the kernels read"),
    "--model-source": dict(action="append", default=[], help="Kaggle model with the backbone"),
    "--report": dict(metavar="NOTEBOOK", help="executed train.ipynb, for a page DIR.html"),
    "--push": dict(action="store_true", help="upload the bundle and the kernel that uses it"),
    "--check": dict(metavar="DIR", help="verify a bundle: files, metadata, predictions"),
}


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a finished run")
    for flag, keywords in OPTIONS.items():
        parser.add_argument(*(["-o"] if flag == "--output" else []), flag, **keywords)
    args = parser.parse_args()
    if args.check:
        return args
    if bool(args.runs) == args.starter:
        parser.error("give runs, or --starter")
    if args.backbone and not args.starter:
        parser.error("--backbone goes with --starter: a bundle of runs has its weights already")
    for flag in ("blend", "engine"):
        if getattr(args, flag) and args.starter:
            parser.error(f"--{flag} goes with runs")
    missing = [name for name in ("output", "id", "title") if not getattr(args, name)]
    if missing:
        parser.error(f"--{' and --'.join(missing)} must be given")
    return args


def pack_and_push(args):
    """Pack, print the commands that upload and submit, and run the former if asked to."""
    target, *kernels = pack(args)
    # Training again takes hours of a weekly quota: only a starter's kernel is pushed unnamed
    used = [folder for folder in kernels if args.starter or folder.name == "infer"]
    print(f"bundle_sha256 {bundle_sha256(target)}: set it in infer.ipynb to take no other bundle")
    print(f"made {ku._comma_join([target, *kernels])}; to upload and submit:")
    print("", *kaggle_push.commands([target, *used]), sep="\n  ")
    if used and args.runs:
        submit = f"submit {shlex.quote(args.competition)} -k {args.id}-infer -f submission.csv"
        print(f"  kaggle competitions {submit} -v 1 -m 'a note'  # -v: version of the notebook")
    if args.wheels:
        print(f"lines that install the wheels without internet:\n{INSTALL}")
    if args.push:
        kaggle_push.push([target, *used], f"kernel_utils {ku.__version__}", 1800)


def main():
    args = parse()
    try:
        if not args.check:
            pack_and_push(args)
        else:
            sound = "sound" if check(Path(args.check)) else "files and metadata are sound"
            print(f"{args.check}: {sound}; bundle_sha256 {bundle_sha256(args.check)}")
    except (ku.KitError, kaggle_push.PushError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

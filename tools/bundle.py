"""Pack finished runs, or the module and a backbone, into one flat folder that Kaggle takes and that verifies itself.

    python tools/bundle.py runs/conv1d runs/lstm -o dist/my-bundle --id me/my-bundle --title "My bundle"
    python tools/bundle.py runs/conv1d runs/lstm --blend blend/blend.json -o dist/my-bundle --id ... --title ...
    python tools/bundle.py --starter --backbone path/to/deberta -o dist/my-kit --id me/my-kit --title "My kit"
    python tools/bundle.py --check dist/my-bundle

Several runs make an ensemble, the mean of their predictions or, with the blend.json of blend.ipynb, their blend.
Everything is validated before anything is written where you asked for it: the runs, their files and predictions, and
what Kaggle wants of names and metadata; one message lists every problem. The folder is built elsewhere and moved; the
same runs give the same bytes. A bundle holds the texts of four training rows a fold, on which infer.ipynb proves its
predictions: keep it private where they are.
"""

import argparse
import ast
import contextlib
import importlib.metadata
import json
import re
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
from report import report

import kernel_utils as ku

MODULE = ROOT / "kernel_utils" / "kernel_utils.py"
PLAIN = (
    ".json",
    ".txt",
    ".model",
    ".jinja",
    ".codes",
)  # what a tokenizer's files may be: no code, no pickle
BACKBONE = (
    "config.json",
    ku.PRETRAIN_RECORD,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
BACKBONE += ("bpe.codes", *ku._VOCABULARY_FILES, "*.safetensors", "*.safetensors.index.json")
# Imports that Kaggle's GPU image satisfies (as of August 2026), and what wheels for it must fit.
IMAGE = """IPython PIL accelerate datasets huggingface_hub joblib lightgbm matplotlib numpy optuna pandas peft psutil
    requests safetensors scipy sentence_transformers sentencepiece sklearn tensorboard tiktoken tokenizers torch tqdm
    transformers triton wandb yaml""".split()
OPTIONAL = {
    "bitsandbytes": "adamw8bit",
    "disentangled_flash": "disentangled_flash",
}  # import -> setting that needs it
IMAGE_TAGS = [
    "--python-version",
    "3.12",
    "--platform",
    "manylinux_2_28_x86_64",
    "--platform",
    "manylinux2014_x86_64",
]


class Refused(ku.KitError):
    """What cannot be packed, with every reason."""

    title = "nothing was written:"


# ---------------------------------------------------------------------------------------
# What is wrong with files


def plain_files(folder, names, links=False):
    """Problems of files that must be plain and not empty, with no link on the way."""
    problems = []
    for path in (folder / name for name in names):
        if not links and (path.is_symlink() or path.parent.is_symlink()):
            problems.append(f"{path}: a symbolic link; expected the file itself")
        elif not path.is_file():
            problems.append(f"{path}: missing, or no plain file")
        elif not path.stat().st_size:
            problems.append(f"{path}: empty")
    return problems


def json_problems(path):
    """Problems of a file that must hold a JSON object, and of a config that could run code from elsewhere."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return [f"{path}: not a JSON file ({error})"]
    if not isinstance(content, dict):
        return [f"{path}: expected a JSON object, got {type(content).__name__}"]
    keys = (
        ku._foreign_code_keys(content)
        if path.name in ("config.json", "tokenizer_config.json")
        else []
    )
    return [
        f"{path}: {key} could make transformers run code from elsewhere; delete it" for key in keys
    ]


def weight_problems(path, half=False):
    """Problems of a safetensors file: broken, or values that are not finite, in fp16 if they will be stored so."""
    limit, bad = torch.finfo(torch.float16 if half else torch.float32).max, []
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_tensor(name)
                if (
                    tensor.is_floating_point()
                    and tensor.numel()
                    and not tensor.abs().max().float() <= limit
                ):  # NaN too
                    bad.append(name)
    except (SafetensorError, OSError) as error:
        return [f"{path}: not a sound safetensors file ({error})"]
    return (
        [f"{path}: values that are not finite{' in fp16' * half} in {ku._comma_join(bad[:3])}"]
        if bad
        else []
    )


def vocabulary_problems(folder):
    """Without its vocabulary, transformers loads another tokenizer in silence."""
    there = any(next(folder.glob(name), None) for name in ku._VOCABULARY_FILES)
    return (
        []
        if there
        else [f"{folder}: no vocabulary; expected one of {ku._comma_join(ku._VOCABULARY_FILES)}"]
    )


# ---------------------------------------------------------------------------------------
# Runs


def setting_problems(folder, settings):
    """Problems of the settings of a run: parts that a notebook cell defined, or what `Config` refuses."""
    own = [
        f"{field} {settings[field]!r}"
        for field, table in ku._REGISTRIES.items()
        if settings[field] not in table
    ]
    if own:
        return [
            f"{folder}: {part} was defined in a notebook cell; put it into {MODULE} and pack again"
            for part in own
        ]
    try:
        ku.Config.from_dict(settings)
    except ku.ConfigError as error:
        return [f"{folder}/record.json: {problem}" for problem in error.problems]
    return []


def run_problems(folder, half):
    """(record, problems) of a run folder; all is looked at but what it predicts."""
    path = folder / "record.json"
    if problems := plain_files(folder, [path.name]) or json_problems(path):
        return None, problems
    record = ku.RunFolder(folder).read_record()
    if record.get("status") != "complete" or not record.get("folds"):
        return None, [
            f"{folder}: the run did not finish (status {record.get('status')!r} in record.json)"
        ]
    try:
        problems = setting_problems(folder, record["settings"] | record["resolved"])
        folds = [f"fold{int(fold['fold'])}" for fold in record["folds"]]
        (
            ku._summary("", record),
            record["outputs"],
            record["classes"],
            record["versions"],
            record["precision"],
        )
    except (KeyError, TypeError, ValueError) as error:
        return None, [f"{path}: malformed ({type(error).__name__}: {error})"]
    configs, weights = (
        [f"{fold}/{name}" for fold in folds] for name in ("config.json", "model.safetensors")
    )
    tokenizer = [
        f"tokenizer/{file.name}" for file in sorted(folder.glob("tokenizer/*")) if not file.is_dir()
    ]
    needed = ["golden.json", "tokenizer/tokenizer_config.json", *configs, *weights]
    bad = plain_files(folder, dict.fromkeys([*needed, *tokenizer])) + vocabulary_problems(
        folder / "tokenizer"
    )
    bad += [
        f"{folder}/{name}: expected {ku._comma_join(PLAIN)}"
        for name in tokenizer
        if Path(name).suffix not in PLAIN
    ]
    if bad:
        return record, problems + bad
    for name in ["golden.json", *configs, *tokenizer]:
        problems += json_problems(folder / name) if name.endswith(".json") else []
    for name in weights:
        problems += weight_problems(folder / name, half)
    different = [
        name
        for name in configs
        if (folder / name).read_bytes() != (folder / configs[0]).read_bytes()
    ]
    return record, problems + [
        f"{folder / name}: expected the content of {configs[0]}" for name in different
    ]


def alike_problems(records):
    """Problems between runs, {folder: record}: two of one name, or predictions that cannot be averaged."""
    problems, names = [], set()
    (first, one), *_ = records.items()
    for folder, record in records.items():
        if folder.name.lower() in names:
            problems.append(f"{folder}: two runs are called {folder.name}; rename one folder")
        names.add(folder.name.lower())
        for what in ("task", "id_column", "target_columns", "outputs", "classes"):
            ours, theirs = ((r | r["settings"])[what] for r in (one, record))
            if ours != theirs:
                problems.append(f"{folder}: {what} must be as in {first}, {ours!r}; got {theirs!r}")
    return problems


def blend_problems(path, folders):
    """What is wrong with a blend.json for run folders with a record."""
    if problems := plain_files(path.parent, [path.name]):
        return problems
    try:
        ku._read_blend(path, {folder.name: folder / "record.json" for folder in folders})
    except ku.KitError as error:
        return error.problems
    return []


def half_weights(path, target):
    """Store the weights of a fold as fp16. No metadata: safetensors would write them in any order."""
    tensors = load_file(path)
    save_file(
        {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}, target
    )


def warn_of_fp16(run, tokenizer, model):
    """A T4 takes precision auto for float16, which the machines of training and packing may never have tried."""
    try:
        (predictions,) = ku._golden_predictions(run, tokenizer, model, ["fp16"]).values()
        ku._check_gaps(run, predictions, "float16")
    except ku.KitError as error:
        print(f"warning: a T4 will refuse {run.name}, train it with precision fp32: {error}")


def prove(run, half, staging):
    """(the run with weights and golden rows as they are packed, what the manifest says of the proof).

    Refused where its golden rows are not predicted as in training. Rounded to fp16, its weights predict others, which
    become the golden ones.
    """
    try:
        tokenizer, model = ku._open_run(run)
        ku._check_probes(run, tokenizer)
        (full,) = ku._golden_predictions(run, tokenizer, model, ["fp32"]).values()
        ku._check_gaps(run, full, "float32")
        if run.cfg.precision != "fp32":
            warn_of_fp16(run, tokenizer, model)
    except (ku.KitError, RuntimeError, TypeError, ValueError, LookupError, ImportError) as error:
        raise Refused(f"{run.name}: does not predict what training predicted: {error}") from error
    told = {"half": half}
    if half:
        originals, run = (
            run.weights,
            run._replace(weights={f: staging / f"{run.name}.{f}" for f in run.weights}),
        )
        for fold, path in run.weights.items():
            half_weights(originals[fold], path)
        (rounded,) = ku._golden_predictions(run, tokenizer, model, ["fp32"]).values()
        told["golden_moved_by_half"] = gap = float(ku._golden_gaps(run, rounded, full).max())
        if not gap <= (allowed := ku._GOLDEN_TOLERANCES["float16"]):
            raise Refused(
                f"{run.name}: fp16 weights move a golden prediction by {gap:.2g}, {allowed:g} is allowed"
            )
        print(f"{run.name}: fp16 weights move the golden predictions by {gap:.1e} at most")
        rows = zip(run.golden["rows"], rounded.tolist(), strict=True)
        run = run._replace(
            golden=run.golden | {"rows": [row | {"prediction": new} for row, new in rows]}
        )
    return run, told


def flat_names(run):
    """Names of the parts of a run in a bundle, as its manifest tells them."""
    return {
        "record": f"{run.name}.record.json",
        "config": f"{run.name}.config.json",
        "tokenizer": {name: f"{run.name}.{name}" for name in run.tokenizer},
        "weights": {str(fold): f"{run.name}.fold{fold}.safetensors" for fold in run.weights},
    }


def run_sources(folder, run):
    """[(file name, source)] of the parts of a run."""
    names = flat_names(run)
    sources = [(names["record"], folder / "record.json"), (names["config"], run.config)]
    sources += [(names["tokenizer"][name], path) for name, path in run.tokenizer.items()]
    return sources + [(names["weights"][str(fold)], path) for fold, path in run.weights.items()]


def manifest_entry(run, told):
    """What the manifest says of a run."""
    keys = ("settings", "resolved", "versions", "oof", "pretrained")
    record = {key: run.record[key] for key in keys if key in run.record}
    return flat_names(run) | record | told | {"golden": run.golden}


def backbone_sources(folder):
    """([(file name, source)], problems) of a backbone with its tokenizer. Links are followed: hub caches have them."""
    names = sorted(
        {path.name for pattern in BACKBONE for path in folder.glob(pattern)} | {"config.json"}
    )
    problems = plain_files(folder, names, links=True) + vocabulary_problems(folder)
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        problems.append(
            f"{folder}: no *.safetensors; pickles are not packed, save the model with save_pretrained"
        )
    if problems:
        return [], problems
    for name in names:
        problems += json_problems(folder / name) if name.endswith(".json") else []
        problems += weight_problems(folder / name) if name.endswith(".safetensors") else []
    for index in folder.glob("*.safetensors.index.json") if not problems else []:
        shards = set(json.loads(index.read_text())["weight_map"].values()) - set(weights)
        problems += [
            f"{folder / shard}: missing, though {index.name} names it" for shard in sorted(shards)
        ]
    try:
        ku._load_tokenizer(folder)
    except (ku.KitError, OSError) as error:
        problems.append(str(error))
    return [(name, folder / name) for name in names], problems


# ---------------------------------------------------------------------------------------
# Wheels


def lacking(records, module=MODULE):
    """Distributions that the module imports and Kaggle's image lacks, as `name==version` of what is installed here;
    those that a setting asks for only where a run has that setting."""
    nodes = list(ast.walk(ast.parse(module.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    names = {name.split(".")[0] for name in names} - {*IMAGE, *sys.stdlib_module_names}
    asked = {
        value
        for record in records
        for value in record["settings"].values()
        if isinstance(value, str)
    }
    names -= {name for name, setting in OPTIONAL.items() if setting not in asked}
    there = importlib.metadata.packages_distributions()
    found = {there[name][0] for name in names if name in there}
    if unknown := sorted(name for name in names if name not in there):
        raise Refused(f"{module}: imports {ku._comma_join(unknown)}, which is not installed here")
    return sorted(f"{name}=={importlib.metadata.version(name)}" for name in found)


def download_wheels(requirements, folder):
    """[(file name, path)] of wheels of the requirements that fit Kaggle's image, without what they depend on."""
    if not requirements:
        print("no wheels: Kaggle's image has all that the module imports")
        return []
    command = [
        sys.executable,
        *"-m pip --disable-pip-version-check download --no-deps --only-binary=:all: -d".split(),
        str(folder),
        *IMAGE_TAGS,
    ]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True)
    if done.returncode:
        raise Refused(
            f"no wheels of {ku._comma_join(requirements)}: {done.stderr.strip().splitlines()[-1]}"
        )
    return [(path.name, path) for path in sorted(folder.glob("*.whl"))]


INSTALL = """import glob, subprocess, sys

wheels = {path.split("/")[-1]: path for path in glob.glob("/kaggle/input/**/*.whl", recursive=True)}
subprocess.run([sys.executable, *"-m pip install --no-index --no-deps".split(), *wheels.values()], check=True)"""


# ---------------------------------------------------------------------------------------
# The folder


def manifest_of(runs, dataset, wheels):
    """The content of manifest.json, but the files."""
    content = {
        "format": ku._BUNDLE_FORMAT,
        "version": ku.__version__,
        "versions": ku._versions(),
        "dataset": dataset,
        "runs": runs,
    }
    return content | ({"wheels": wheels, "install": INSTALL} if wheels else {})


def write_folder(folder, sources, manifest):
    """Copy the files and write manifest.json and dataset-metadata.json."""
    files = {}
    for name, source in sources:
        shutil.copyfile(source, folder / name)
        files[name] = {
            "bytes": (folder / name).stat().st_size,
            "sha256": ku._file_sha256(folder / name),
        }
    (folder / ku._DATASET_METADATA).write_bytes(ku._dump_manifest(manifest["dataset"]))
    (folder / ku._MANIFEST).write_bytes(
        ku._dump_manifest(ku._with_checksum(manifest | {"files": files}))
    )


def put_in_place(built, target):
    """Move what is built to where it was asked for. What was there is moved aside and comes back if that fails."""
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
    """[] where a folder may be made: nothing is there, or what this tool made before and nobody added to."""
    names = (
        {path.name for path in target.iterdir()}
        if target.is_dir()
        else {""}
        if target.exists()
        else set()
    )
    try:
        made = (
            {ku._MANIFEST, ku._DATASET_METADATA, *ku._read_bundle_manifest(target)["files"]}
            if ku._MANIFEST in names
            else set()
        )
    except ku.BundleError:
        made = set()
    if kernel_id and names == {kaggle_metadata.KERNEL_FILE, f"{target.name}.ipynb"}:
        metadata = json.loads((target / kaggle_metadata.KERNEL_FILE).read_text(encoding="utf-8"))
        made = names if metadata.get("id") == kernel_id else made
    if names <= made:
        return []
    return [f"{target}: exists and is not what this tool made; delete it or choose another name"]


def check(folder):
    """Verify a bundle as infer.ipynb will, and its metadata; KitError with every problem. False if its predictions
    could not be checked, since it has another module than this clone: running that one is for its owner to decide."""
    manifest, problems = ku._read_bundle_manifest(folder), kaggle_metadata.folder_problems(folder)
    metadata = folder / ku._DATASET_METADATA
    if metadata.is_file() and metadata.read_bytes() != ku._dump_manifest(manifest["dataset"]):
        problems.append(f"{metadata}: not as it was packed; pack again to change it")
    problems += ku._integrity_problems(folder, manifest["files"])
    if problems:
        raise ku.BundleError([f"{folder}", *problems])
    if ku._file_sha256(MODULE) != manifest["files"]["kernel_utils.py"]["sha256"]:
        print(
            f"predictions not checked: {MODULE} is not the module of the bundle, version {manifest['version']}"
        )
        return False
    if manifest["runs"]:
        ku.check_golden(ku._open_bundle(folder))
    return True


# ---------------------------------------------------------------------------------------
# Kernels


def notebook_with(name, settings):
    """A notebook of the clone with values in its settings cell; one that the cell lacks becomes a line of its own."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    lines = []
    for line in cell.source.splitlines():
        setting = line.partition(":")[0]
        value = f"= {settings[setting]!r}" if setting in settings else ""
        lines.append(
            re.sub(r"= .*?(?=  #|$)", lambda _, v=value: v, line, count=1) if value else line
        )
    there = {line.partition(":")[0] for line in lines}
    cell.source = "\n".join(
        [*lines, *(f"{name} = {value!r}" for name, value in settings.items() if name not in there)]
    )
    return notebook


def train_settings(record, backbone):
    """What train.ipynb must be set to for a run to be trained again on Kaggle with that backbone."""
    run, default = ku.Config.from_dict(record["settings"]).to_dict(), ku.Config().to_dict()
    local = (
        "data_dir",
        "output_dir",
        "run_name",
        "backbone",
        *(["precision"] if run["precision"] == "bf16" else []),
    )
    return {"backbone": backbone} | {
        k: v for k, v in run.items() if v != default[k] and k not in local
    }


def write_kernel(folder, name, notebook, dataset, competition, internet=False, models=()):
    """A folder that `kaggle kernels push` takes: a notebook on a T4 x2, private, with its sources."""
    owner, slug = dataset["id"].split("/")
    metadata = {
        "id": f"{owner}/{slug}-{name}",
        "title": f"{slug} {name}".replace("-", " "),  # Kaggle makes the slug from the title again
        "code_file": f"{name}.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "enable_tpu": False,
        "enable_internet": internet,  # never left out: the client takes that for true
        "machine_shape": "NvidiaTeslaT4",
        "dataset_sources": [dataset["id"]],
        "competition_sources": [competition],
        "kernel_sources": [],
        "model_sources": list(models),
    }
    folder.mkdir(parents=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    (folder / "kernel-metadata.json").write_bytes(ku._dump_manifest(metadata))


def train_backbone(asked, dataset, run, record):
    """(what train.ipynb must set as backbone, model sources, problems) to train a run again.

    It is the backbone of the starter; the model source that is alone or has its name; or, with the internet, itself.
    """
    if asked.backbone:
        return dataset["id"].split("/")[1], [], []
    backbone, sources = ku.Config.from_dict(record["settings"]).backbone, asked.model_source
    if len(asked.runs) > 1 or len(sources) > 1:
        name = ku._short_name(backbone)
        sources = [source for source in sources if name in map(ku._short_name, source.split("/"))]
    if len(sources) == 1:
        return sources[0].split("/")[1], sources, []
    if asked.model_source:
        return (
            backbone,
            [],
            [
                f"{run}: {len(sources)} of the --model-source have the name of its backbone {backbone}"
            ],
        )
    path, was = Path(backbone).expanduser(), record.get("backbone", "")
    if path.is_absolute() or path.is_dir() or was.startswith("/kaggle/input"):
        return (
            backbone,
            [],
            [f"{run}: backbone {backbone} is in no hub; attach it with --model-source"],
        )
    return backbone, [], []


def write_kernels(folder, asked, dataset, records, wheels):
    """Folders to infer, where there are runs, and to train each run again, or a first one with a starter; problems."""
    problems, notebooks = [], {}
    if records:
        notebooks["infer"] = (notebook_with("infer", {}), False, [])
    for number, (run, record) in enumerate(
        records.items() or [("the starter", {"settings": {}})], 1
    ):
        backbone, sources, bad = train_backbone(asked, dataset, run, record)
        problems += bad
        notebook, attached = (
            notebook_with("train", train_settings(record, backbone)),
            bool(sources or asked.backbone),
        )
        notebooks["train" if len(records) < 2 else f"train-{number}"] = (
            notebook,
            not attached,
            sources,
        )
    for name, (notebook, internet, sources) in notebooks.items():
        if wheels:
            notebook.cells.insert(3, nbformat.v4.new_code_cell(INSTALL, id="wheels"))
        write_kernel(folder / name, name, notebook, dataset, asked.competition, internet, sources)
        problems += [
            f"--kernels {name}: {problem}"
            for problem in kaggle_metadata.folder_problems(folder / name)
        ]
        problems += target_problems(Path(asked.kernels, name), f"{dataset['id']}-{name}")
    return problems


# ---------------------------------------------------------------------------------------
# The command line


def option_problems(asked, dataset):
    """Problems of what was asked for, runs and backbone aside."""
    target = Path(asked.output).resolve()
    problems = kaggle_metadata.dataset_problems(dataset, target) + target_problems(target)
    sources = kaggle_metadata.KERNEL_FIELDS["model_sources"](asked.model_source, None)
    problems += [f"--model-source {problem}" for problem in sources]
    if asked.kernels:
        kernels = Path(asked.kernels).resolve()
        if target.is_relative_to(kernels) or kernels.is_relative_to(target):
            problems.append(f"--kernels {kernels} and -o {target} must not lie in each other")
        if not asked.competition:
            problems.append("--kernels needs --competition, the slug of what the kernels read")
    if asked.report:
        try:
            nbformat.read(asked.report, 4)
        except (OSError, ValueError, AttributeError, nbformat.ValidationError) as error:
            problems.append(f"--report: {asked.report} is not a notebook ({str(error)[:200]})")
    if asked.push:
        try:
            kaggle_push.find_client()
        except kaggle_push.PushError as error:
            problems.append(str(error))
    return problems


def validate(asked, dataset, kernels):
    """({run folder: run}, other sources, wheels wanted), or Refused with all that is known without predicting.

    Kernels are written into their temporary folder, to be checked there.
    """
    problems = option_problems(asked, dataset)
    records, runs, sources = {}, {}, [("kernel_utils.py", MODULE)]
    can_write = not problems
    folders = [Path(run).resolve() for run in asked.runs]
    problems += [
        f"{folder}: given twice" for folder in dict.fromkeys(folders) if folders.count(folder) > 1
    ]
    for folder in dict.fromkeys(folders):
        record, bad = run_problems(folder, asked.half)
        problems += bad
        records |= {folder: record} if record else {}
        runs |= {} if bad else {folder: ku._load_run(folder)}
    problems += alike_problems(records) if records else []
    if asked.blend:
        problems += (bad := blend_problems(path := Path(asked.blend).resolve(), records))
        sources += [] if bad else [(ku._BLEND_FILE, path)]
    wheels = []
    try:
        if asked.backbone:
            backbone, bad = backbone_sources(ku._find_backbone(asked.backbone))
            sources, problems = sources + backbone, problems + bad
        if (wheels := lacking(records.values())) and not asked.wheels:
            problems.append(
                f"{MODULE} imports what Kaggle's image lacks, {ku._comma_join(wheels)}; add --wheels"
            )
    except ku.KitError as error:
        problems += error.problems
    everything = sources + [
        source for folder, run in runs.items() for source in run_sources(folder, run)
    ]
    names = [name for name, _ in everything] + [ku._MANIFEST]
    problems += [
        f"{name}: two files would have this name"
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    problems += kaggle_metadata.file_problems(
        {name: source.stat().st_size for name, source in everything}
    )
    if asked.kernels and can_write and len(runs) == len(asked.runs):
        problems += write_kernels(kernels, asked, dataset, records, wheels)
    if problems:
        raise Refused(problems)
    return runs, sources, wheels


def build(asked, dataset, staging, kernels):
    """Make everything in temporary folders and verify it there: the bundle, the kernels, the report."""
    runs, sources, wanted = validate(asked, dataset, kernels)
    entries, problems = {}, []
    for folder, run in runs.items():
        try:
            packed, told = prove(run, asked.half, staging)
        except Refused as error:
            problems += error.problems
        else:
            sources += run_sources(folder, packed)
            entries[run.name] = manifest_entry(packed, told)
    if problems:
        raise Refused(problems)
    wheels = download_wheels(wanted, staging) if asked.wheels else []
    bad = kaggle_metadata.file_problems({name: path.stat().st_size for name, path in wheels})
    if bad:
        raise Refused(bad)
    (staging / "bundle").mkdir()
    manifest = manifest_of(entries, dataset, [name for name, _ in wheels])
    write_folder(staging / "bundle", sources + wheels, manifest)
    check(staging / "bundle")
    if asked.report:
        (staging / "report.html").write_text(report(asked.report), encoding="utf-8")


def pack(asked):
    """Build beside the targets, then move what is built to its place, the bundle last. Returns the folders made."""
    target, kernels = Path(asked.output), Path(asked.kernels) if asked.kernels else None
    dataset = {"id": asked.id, "title": asked.title, "licenses": [{"name": asked.license}]}
    with contextlib.ExitStack() as stack:
        staging = []
        for place in filter(None, (target, kernels)):
            place.parent.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(prefix=".bundle-", dir=place.parent)
            staging.append(Path(stack.enter_context(folder)))
        build(asked, dataset, staging[0], staging[-1])
        made = []
        for kernel in sorted(staging[1].iterdir()) if kernels else []:
            kernels.mkdir(exist_ok=True)
            put_in_place(kernel, kernels / kernel.name)
            made.append(kernels / kernel.name)
        if asked.report:
            (staging[0] / "report.html").replace(target.with_name(f"{target.name}.html"))
        put_in_place(staging[0] / "bundle", target)
    return [target, *made]


OPTIONS = (  # flag, keywords of argparse
    ("--output", dict(metavar="DIR", help="folder to make; a bundle that is there is replaced")),
    ("--id", dict(metavar="OWNER/SLUG", help="the dataset on Kaggle")),
    ("--title", dict(help="its title, 6 to 50 characters")),
    ("--license", dict(default="other", help="one of Kaggle's licence names (default: other)")),
    (
        "--half",
        dict(
            action="store_true",
            help="store weights as fp16: half the size, predictions move a little",
        ),
    ),
    (
        "--blend",
        dict(
            metavar="FILE",
            help="blend.json of these runs: infer.ipynb blends by it instead of the mean",
        ),
    ),
    (
        "--starter",
        dict(
            action="store_true",
            help="pack the module, and a backbone if given, for training kernels",
        ),
    ),
    (
        "--backbone",
        dict(
            metavar="DIR",
            help="with --starter: folder of a backbone, or a name that train.ipynb takes",
        ),
    ),
    (
        "--wheels",
        dict(
            action="store_true",
            help="add wheels of what the module imports and Kaggle's image lacks",
        ),
    ),
    (
        "--kernels",
        dict(
            metavar="DIR",
            help="also make folders that `kaggle kernels push` takes: infer and train",
        ),
    ),
    ("--competition", dict(metavar="SLUG", help="competition that the kernels read")),
    (
        "--model-source",
        dict(
            action="append",
            default=[],
            help="Kaggle model with the backbone, for the train kernels",
        ),
    ),
    (
        "--report",
        dict(
            metavar="NOTEBOOK", help="executed train.ipynb, for a page DIR.html beside the bundle"
        ),
    ),
    (
        "--push",
        dict(
            action="store_true",
            help="upload the bundle and the kernel that uses it, with the kaggle client",
        ),
    ),
    ("--check", dict(metavar="DIR", help="verify a bundle: files, metadata, predictions")),
)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="folder of a finished run; several make an ensemble"
    )
    for flag, keywords in OPTIONS:
        parser.add_argument(*(["-o"] if flag == "--output" else []), flag, **keywords)
    asked = parser.parse_args()
    if asked.check:
        return asked
    if bool(asked.runs) == asked.starter:
        parser.error("give runs, or --starter")
    if asked.backbone and not asked.starter:
        parser.error("--backbone goes with --starter: a bundle of runs has its weights already")
    if asked.blend and asked.starter:
        parser.error("--blend goes with runs")
    if missing := [name for name in ("output", "id", "title") if not getattr(asked, name)]:
        parser.error(f"--{' and --'.join(missing)} must be given")
    return asked


def main():
    asked = parse()
    try:
        if asked.check:
            print(
                f"{asked.check}: sound"
                if check(Path(asked.check))
                else f"{asked.check}: files and metadata are sound"
            )
            return
        target, *kernels = pack(asked)
        # training again takes hours of a weekly quota: only a starter's kernel is pushed without being named
        used = [folder for folder in kernels if asked.starter or folder.name == "infer"]
        print(f"made {ku._comma_join([target, *kernels])}; to upload and submit:")
        print("", *kaggle_push.commands([target, *used]), sep="\n  ")
        if used and asked.runs:
            submit = f"{asked.competition} -k {asked.id}-infer -f submission.csv -v VERSION -m NOTE"
            print(f"  kaggle competitions submit {submit}")
        if asked.push:
            kaggle_push.push([target, *used], f"kernel_utils {ku.__version__}", 1800)
    except (ku.KitError, kaggle_push.PushError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

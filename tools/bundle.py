"""Pack finished runs, or the module and a backbone, into one flat folder that Kaggle takes and that verifies itself.

    python tools/bundle.py runs/conv1d runs/lstm -o dist/my-bundle --id me/my-bundle --title "My bundle"
    python tools/bundle.py --starter --backbone path/to/deberta -o dist/my-kit --id me/my-kit --title "My kit"
    python tools/bundle.py --check dist/my-bundle

Several runs make an ensemble, the mean of their predictions. Everything is validated before anything is written where
you asked for it: the runs, their files and predictions, and what Kaggle wants of names and metadata; one message lists
every problem. The folder is built elsewhere and moved; the same runs give the same bytes. A bundle holds the texts of
four training rows a fold, on which infer.ipynb proves its predictions: keep it private where they are.
"""

import argparse
import ast
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

import kernel_utils as ku

MODULE = ROOT / "kernel_utils" / "kernel_utils.py"
PARTS = {"head": ku.HEADS, "loss": ku.LOSSES, "metric": ku.METRICS, "schedule": ku.SCHEDULES}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")  # without one, transformers loads another tokenizer in silence
PLAIN = (".json", ".txt", ".model", ".jinja")  # what a tokenizer's files may be: no code, no pickle
# Imports that Kaggle's GPU image satisfies (as of August 2026), and what wheels for it must fit.
IMAGE = """IPython PIL accelerate datasets huggingface_hub joblib lightgbm matplotlib numpy optuna pandas peft psutil
    requests safetensors scipy sentence_transformers sentencepiece sklearn tensorboard tiktoken tokenizers torch tqdm
    transformers triton wandb yaml""".split()
IMAGE_TAGS = ["--python-version", "3.12", "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64"]


class Refused(ku.KitError):
    """What cannot be packed, with every reason."""

    title = "nothing was written:"


# ---------------------------------------------------------------------------------------
# What is wrong with files


def plain_files(folder, names):
    """Problems of files that must be plain and not empty, with no link on the way."""
    problems = []
    for path in (folder / name for name in names):
        if path.is_symlink() or path.parent.is_symlink():
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
    keys = ku.foreign_code(content) if path.name in ("config.json", "tokenizer_config.json") else []
    return [f"{path}: {key} could make transformers run code from elsewhere; delete it" for key in keys]


def weight_problems(path, half=False):
    """Problems of a safetensors file: broken, or values that are not finite, in fp16 if they will be stored so."""
    limit, bad = torch.finfo(torch.float16 if half else torch.float32).max, []
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and tensor.numel() and not tensor.abs().max() <= limit:  # NaN too
                    bad.append(name)
    except (SafetensorError, OSError) as error:
        return [f"{path}: not a sound safetensors file ({error})"]
    return [f"{path}: values that are not finite{' in fp16' * half} in {ku.listing(bad[:3])}"] if bad else []


# ---------------------------------------------------------------------------------------
# Runs


def setting_problems(folder, settings):
    """Problems of the settings of a run: parts that a notebook cell defined, or what `Config` refuses."""
    own = [f"{field} {settings[field]!r}" for field, table in PARTS.items() if settings[field] not in table]
    if own:
        return [f"{folder}: {part} was defined in a notebook cell; put it into {MODULE} and pack again" for part in own]
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
    record = ku.read_record(folder)
    if record.get("status") != "complete":
        return None, [f"{folder}: the run did not finish (status {record.get('status')!r} in record.json)"]
    try:
        problems = setting_problems(folder, record["settings"] | record["resolved"])
        folds = [f"fold{int(fold['fold'])}" for fold in record["folds"]]
        ku.summary("", record), record["outputs"], record["classes"], record["versions"], record["precision"]
    except (KeyError, TypeError, ValueError) as error:
        return None, [f"{path}: malformed ({type(error).__name__}: {error})"]
    configs, weights = ([f"{fold}/{name}" for fold in folds] for name in ("config.json", "model.safetensors"))
    tokenizer = [f"tokenizer/{name}" for name in {*TOKENIZER, *(file.name for file in folder.glob("tokenizer/*"))}]
    bad = plain_files(folder, sorted({"golden.json", *tokenizer, *configs, *weights}))
    bad += [f"{folder}/{name}: expected {ku.listing(PLAIN)}" for name in tokenizer if Path(name).suffix not in PLAIN]
    if bad:
        return record, problems + bad
    for name in ["golden.json", *configs, *tokenizer]:
        problems += json_problems(folder / name) if name.endswith(".json") else []
    for name in weights:
        problems += weight_problems(folder / name, half)
    different = [name for name in configs if (folder / name).read_bytes() != (folder / configs[0]).read_bytes()]
    return record, problems + [f"{folder / name}: expected the content of {configs[0]}" for name in different]


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


def half_weights(path, target):
    """Store the weights of a fold as fp16. No metadata: safetensors would write them in any order."""
    tensors = load_file(path)
    save_file({name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}, target)


def pack_run(folder, half, staging):
    """({file name: source}, what the manifest says) of a run.

    Its golden predictions are made again from the weights as they are packed, in float32 on this machine, since those
    of training may be in another precision. Refused where they are not what training predicted.
    """
    run = ku.load_run(folder)
    try:
        tokenizer, model = ku.open_run(run)
        ku.check_probes(run, tokenizer)
        predictions = ku.golden_predictions(run, tokenizer, model, "fp32")
    except (ku.KitError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise Refused(f"{folder}: cannot predict its golden rows ({type(error).__name__}: {error})") from error
    gaps, allowed = ku.golden_gaps(run, predictions), ku.TOLERANCES[run.golden["precision"]]
    if not gaps.max() <= allowed:
        row = run.golden["rows"][int(gaps.argmax())]
        raise Refused(
            f"{folder}, fold {row['fold']}, id {row['id']}: the prediction is {gaps.max():.2g} off that of training, "
            f"{allowed:g} is allowed; the weights or {MODULE.name} are not those of training"
        )
    entry = {"golden_moved_since_training": float(gaps.max())}
    if half:
        for fold, path in run.weights.items():
            run.weights[fold] = staging / f"{folder.name}.{fold}"
            half_weights(path, run.weights[fold])
        rows = [row | {"prediction": list(p)} for row, p in zip(run.golden["rows"], predictions, strict=True)]
        run = run._replace(golden=run.golden | {"rows": rows})
        predictions = ku.golden_predictions(run, tokenizer, model, "fp32")
        entry["golden_moved_by_half"] = float(ku.golden_gaps(run, predictions).max())
        print(f"{run.name}: fp16 weights move the golden predictions by {entry['golden_moved_by_half']:.1e} at most")
    rows = [row | {"prediction": p.tolist()} for row, p in zip(run.golden["rows"], predictions, strict=True)]
    names = {
        "record": f"{run.name}.record.json",
        "config": f"{run.name}.config.json",
        "tokenizer": {name: f"{run.name}.{name}" for name in run.tokenizer},
        "weights": {str(fold): f"{run.name}.fold{fold}.safetensors" for fold in run.weights},
    }
    sources = [(names["record"], folder / "record.json"), (names["config"], run.config)]
    sources += [(names["tokenizer"][name], path) for name, path in run.tokenizer.items()]
    sources += [(names["weights"][str(fold)], path) for fold, path in run.weights.items()]
    told = {key: run.record[key] for key in ("settings", "resolved", "versions", "oof")}
    golden = run.golden | {"rows": rows, "precision": "float32"}
    return sources, names | told | entry | {"golden": golden, "half": half}


def pack_backbone(folder):
    """({file name: source}, problems) of a backbone that lies in a folder with its tokenizer."""
    names = [path.name for path in sorted(folder.glob("*")) if path.suffix in (*PLAIN, ".safetensors")]
    problems = plain_files(folder, {"config.json", *TOKENIZER, *names})
    for name in names if not problems else []:
        problems += json_problems(folder / name) if name.endswith(".json") else []
        problems += weight_problems(folder / name) if name.endswith(".safetensors") else []
    if not any(name.endswith(".safetensors") for name in names):
        problems.append(
            f"{folder}: no *.safetensors; a pickle is not packed, save the model with save_pretrained first"
        )
    return [(name, folder / name) for name in names], problems


# ---------------------------------------------------------------------------------------
# Wheels


def lacking(module=MODULE):
    """Distributions that the module imports and Kaggle's image lacks, as `name==version` of what is installed here."""
    nodes = list(ast.walk(ast.parse(module.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names = {name.split(".")[0] for name in names} - {*IMAGE, *sys.stdlib_module_names}
    there = importlib.metadata.packages_distributions()
    found = {there[name][0] for name in names if name in there}
    if unknown := sorted(name for name in names if name not in there):
        raise Refused(f"{module}: imports {ku.listing(unknown)}, which is not installed here")
    return sorted(f"{name}=={importlib.metadata.version(name)}" for name in found)


def download_wheels(requirements, folder):
    """[(file name, path)] of wheels of the requirements that fit Kaggle's image, without what they depend on."""
    if not requirements:
        print("no wheels: Kaggle's image has all that the module imports")
        return []
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        *IMAGE_TAGS,
        "-d",
        str(folder),
    ]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"no wheels of {ku.listing(requirements)}: {done.stderr.strip().splitlines()[-1]}")
    return [(path.name, path) for path in sorted(folder.glob("*.whl"))]


def install_line(wheels):
    """The code that installs wheels from wherever Kaggle mounts them, without internet."""
    return (
        "import glob, subprocess, sys\n\n"
        f"wheels = [glob.glob(f'/kaggle/input/**/{{name}}', recursive=True)[0] for name in {sorted(wheels)!r}]\n"
        "subprocess.run([sys.executable, '-m', 'pip', 'install', '--no-index', '--no-deps', *wheels], check=True)"
    )


# ---------------------------------------------------------------------------------------
# The folder


def manifest_of(runs, dataset, wheels):
    """The content of manifest.json, but the files."""
    content = {"format": ku.FORMAT, "version": ku.__version__, "dataset": dataset, "runs": runs}
    content["versions"] = ku.versions()
    return content | ({"wheels": sorted(wheels), "install": install_line(wheels)} if wheels else {})


def write_folder(folder, sources, manifest):
    """Copy the files and write manifest.json and dataset-metadata.json."""
    files = {}
    for name, source in sources:
        shutil.copyfile(source, folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": ku.file_sha256(folder / name)}
    (folder / ku.METADATA).write_bytes(ku.canonical(manifest["dataset"]))
    (folder / ku.MANIFEST).write_bytes(ku.canonical(ku.sealed(manifest | {"files": files})))


def put_in_place(built, target):
    """Move what is built to where it was asked for. What was there is moved aside and comes back if that fails."""
    aside = built.with_name(f"{built.name}.old")  # it goes with the temporary folder
    if target.exists():
        target.rename(aside)
    try:
        built.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise


def target_problems(target):
    """Problems of a folder that is to be made, or made again where an earlier call made it."""
    if target.exists() and not any((target / name).is_file() for name in (ku.MANIFEST, "kernel-metadata.json")):
        return [f"{target}: exists and is neither a bundle nor a kernel; delete it or choose another name"]
    return []


def check(folder):
    """Verify a bundle as infer.ipynb will, and its metadata; raises KitError with every problem."""
    manifest, problems = ku.read_manifest(folder), kaggle_metadata.folder_problems(folder)
    metadata = folder / ku.METADATA
    if metadata.is_file() and metadata.read_bytes() != ku.canonical(manifest["dataset"]):
        problems.append(f"{metadata}: not as it was packed; pack again to change it")
    problems += ku.integrity_problems(folder, manifest["files"])
    if problems:
        raise ku.BundleError([f"{folder}", *problems])
    if ku.file_sha256(MODULE) != manifest["files"]["kernel_utils.py"]["sha256"]:
        print(f"predictions not checked: {MODULE} is not the module of the bundle, version {manifest['version']}")
    elif manifest["runs"]:
        ku.check_golden(ku.open_bundle(folder))


# ---------------------------------------------------------------------------------------
# Kernels and report


def notebook_with(name, settings):
    """A notebook of the clone with values in its settings cell; one that the cell lacks becomes a line of its own."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    lines = []
    for line in cell.source.splitlines():
        setting = line.partition(":")[0]
        value = f"= {settings[setting]!r}" if setting in settings else ""
        lines.append(re.sub(r"= .*?(?=  #|$)", lambda _, v=value: v, line, count=1) if value else line)
    there = {line.partition(":")[0] for line in lines}
    cell.source = "\n".join([*lines, *(f"{name} = {value!r}" for name, value in settings.items() if name not in there)])
    return notebook


def train_settings(record, backbone):
    """What train.ipynb must be set to for a run to be trained again on Kaggle with that backbone."""
    run, default = ku.Config.from_dict(record["settings"]).to_dict(), ku.Config().to_dict()
    local = ("data_dir", "output_dir", "run_name", "backbone")
    return {"backbone": backbone} | {k: v for k, v in run.items() if v != default[k] and k not in local}


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
    (folder / "kernel-metadata.json").write_bytes(ku.canonical(metadata))


def write_kernels(folder, asked, dataset, records, wheels):
    """Folders for infer, where there are runs, and to train each run again, or a first one with a starter.

    The backbone of a train kernel is the first model source, the backbone in the starter, or what the run
    names; only the last needs the internet. Returns problems.
    """
    problems = []
    if records:
        infer = notebook_with("infer", {})
        if wheels:
            infer.cells.insert(3, nbformat.v4.new_code_cell(install_line(wheels)))
        write_kernel(folder / "infer", "infer", infer, dataset, asked.competition)
    for number, (run, record) in enumerate(records.items() or [(None, {"settings": {}})], 1):
        backbone = ku.Config.from_dict(record["settings"]).backbone
        attached = asked.model_source[0].split("/")[1] if asked.model_source else None
        if asked.backbone:
            attached = dataset["id"].split("/")[1]
        if not attached and Path(backbone).expanduser().is_dir():
            problems.append(
                f"{run}: backbone {backbone} lies on this machine; attach it to the kernel with --model-source"
            )
        name = "train" if len(records) < 2 else f"train-{number}"
        notebook = notebook_with("train", train_settings(record, attached or backbone))
        write_kernel(folder / name, name, notebook, dataset, asked.competition, not attached, asked.model_source)
    for kernel in sorted(folder.iterdir()):
        problems += [f"--kernels {kernel.name}: {problem}" for problem in kaggle_metadata.folder_problems(kernel)]
    return problems


def report(notebook):
    """An executed notebook as one HTML page that opens without internet: images inside, no script from elsewhere."""
    from nbconvert import HTMLExporter

    nothing = "require_js_url mathjax_url jquery_url mermaid_js_url mermaid_layout_elk_js_url widget_renderer_url"
    exporter = HTMLExporter(embed_images=True, **dict.fromkeys(nothing.split(), ""))
    page, _ = exporter.from_filename(str(notebook))
    return page


# ---------------------------------------------------------------------------------------
# The command line


def validate(asked, dataset):
    """({run folder: record}, files of the backbone), or Refused with everything that can be known before building."""
    problems = kaggle_metadata.dataset_problems(dataset, Path(asked.output)) + target_problems(Path(asked.output))
    if asked.report:
        try:
            nbformat.read(asked.report, 4)
        except (OSError, ValueError, nbformat.ValidationError) as error:
            problems.append(f"--report: {asked.report} is not a notebook ({str(error)[:200]})")
    if asked.kernels and not asked.competition:
        problems.append("--kernels needs --competition, the slug of what the kernels read")
    records, backbone = {}, []
    for folder in (Path(run).resolve() for run in asked.runs):
        record, bad = run_problems(folder, asked.half)
        problems += bad
        records |= {folder: record} if record else {}
    problems += alike_problems(records) if records else []
    if asked.backbone:
        backbone, bad = pack_backbone(Path(asked.backbone))
        problems += bad
    if (wheels := lacking()) and not asked.wheels:
        problems.append(f"{MODULE} imports what Kaggle's image lacks, {ku.listing(wheels)}; add --wheels")
    if problems:
        raise Refused(problems)
    return records, backbone


def build(asked, dataset, staging):
    """Make everything in a temporary folder and verify it there: the bundle, the kernels in `kernels`, the report."""
    records, backbone = validate(asked, dataset)
    sources, runs = [("kernel_utils.py", MODULE), *backbone], {}
    for folder in records:
        files, runs[folder.name] = pack_run(folder, asked.half, staging)
        sources += files
    wheels = download_wheels(lacking(), staging) if asked.wheels else []
    sources += wheels
    names = [name for name, _ in sources] + [ku.MANIFEST]
    problems = [f"{name}: two files would have this name" for name in sorted(set(names)) if names.count(name) > 1]
    problems += kaggle_metadata.file_problems({name: source.stat().st_size for name, source in sources})
    (staging / "kernels").mkdir()
    if asked.kernels:
        problems += write_kernels(staging / "kernels", asked, dataset, records, dict(wheels))
        problems += [
            p for made in (staging / "kernels").iterdir() for p in target_problems(Path(asked.kernels, made.name))
        ]
    if problems:
        raise Refused(problems)
    (staging / "bundle").mkdir()
    write_folder(staging / "bundle", sources, manifest_of(runs, dataset, dict(wheels)))
    check(staging / "bundle")
    if asked.report:
        (staging / "report.html").write_text(report(asked.report), encoding="utf-8")


def pack(asked):
    """Build beside the target, then move what is built to its place. Returns the folders made."""
    target, dataset = Path(asked.output), {"id": asked.id, "title": asked.title, "licenses": [{"name": asked.license}]}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bundle-", dir=target.parent) as staging:
        staging = Path(staging)
        build(asked, dataset, staging)
        put_in_place(staging / "bundle", target)
        made = [target]
        for kernel in sorted((staging / "kernels").iterdir()):
            Path(asked.kernels).mkdir(parents=True, exist_ok=True)
            made.append(Path(asked.kernels, kernel.name))
            put_in_place(kernel, made[-1])
        if asked.report:
            (staging / "report.html").replace(target.with_name(f"{target.name}.html"))
    return made


OPTIONS = (  # flag, keywords of argparse
    ("--output", dict(metavar="DIR", help="folder to make; a bundle that is there is replaced")),
    ("--id", dict(metavar="OWNER/SLUG", help="the dataset on Kaggle")),
    ("--title", dict(help="its title, 6 to 50 characters")),
    ("--license", dict(default="other", help="one of Kaggle's licence names (default: other)")),
    ("--half", dict(action="store_true", help="store weights as fp16: half the size, predictions move a little")),
    ("--starter", dict(action="store_true", help="pack the module, and a backbone if given, for training kernels")),
    ("--backbone", dict(metavar="DIR", help="with --starter: config.json, *.safetensors and the tokenizer")),
    ("--wheels", dict(action="store_true", help="add wheels of what the module imports and Kaggle's image lacks")),
    ("--kernels", dict(metavar="DIR", help="also make folders that `kaggle kernels push` takes: infer and train")),
    ("--competition", dict(metavar="SLUG", help="competition that the kernels read")),
    ("--model-source", dict(action="append", default=[], help="Kaggle model with the backbone, for the train kernels")),
    ("--report", dict(metavar="NOTEBOOK", help="executed train.ipynb, for a page DIR.html beside the bundle")),
    ("--push", dict(action="store_true", help="upload the bundle and the kernel that uses it, with the kaggle client")),
    ("--check", dict(metavar="DIR", help="verify a bundle: files, metadata, predictions")),
)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a finished run; several make an ensemble")
    for flag, keywords in OPTIONS:
        parser.add_argument(*(["-o"] if flag == "--output" else []), flag, **keywords)
    asked = parser.parse_args()
    if asked.check:
        return asked
    if bool(asked.runs) == asked.starter:
        parser.error("give runs, or --starter")
    if asked.backbone and not asked.starter:
        parser.error("--backbone goes with --starter: a bundle of runs has its weights already")
    if missing := [name for name in ("output", "id", "title") if not getattr(asked, name)]:
        parser.error(f"--{' and --'.join(missing)} must be given")
    return asked


def main():
    asked = parse()
    try:
        if asked.check:
            check(Path(asked.check))
            print(f"{asked.check}: sound")
            return
        target, *kernels = pack(asked)
        print(f"made {ku.listing([target, *kernels])}; to upload and submit:")
        print("", *kaggle_push.commands([target, *kernels]), sep="\n  ")
        if asked.competition and asked.runs:
            submit = f"{asked.competition} -k {asked.id}-infer -f submission.csv -v VERSION -m NOTE"
            print(f"  kaggle competitions submit {submit}")
        if asked.push:  # training takes hours of a weekly quota: with a bundle of runs, a person decides on it
            used = [folder for folder in kernels if asked.starter or folder.name == "infer"]
            kaggle_push.push([target, *used], f"kernel_utils {ku.__version__}", 600)
    except (ku.KitError, kaggle_push.PushError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

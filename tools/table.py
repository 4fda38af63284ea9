"""Table of finished runs: one line for each run folder under those given, best last score first.

    python tools/table.py runs/heads                     # Markdown
    python tools/table.py runs/heads -o heads.csv        # and a CSV file

Scores are out-of-fold over all validated rows; `sd over folds` is the spread of the fold scores of
the last checkpoint. One run of each says nothing about differences smaller than the noise between
seeds.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernel_utils"))
import kernel_utils as ku

SECONDS = {"total": float}
OOF = {"metric": str, "better": str, "rows": int}
RECORD = dict(settings=dict(head=str, seed=float, epochs=float), folds=list, rows=int)
RECORD |= dict(oof=OOF | dict.fromkeys(("last", "best", "last_fold_sd"), ku._SCORE))
RECORD |= dict(seconds=SECONDS, rows_per_second=float, peak_memory_bytes=int)
RECORD |= dict(device=str, threads=int, precision=str)


def finished(folders):
    """Records of the complete runs under the folders, by run name."""
    paths = sorted({path for folder in folders for path in Path(folder).rglob("record.json")})
    is_complete = {
        path: ku._read_json(path, {"status": str})["status"] == "complete" for path in paths
    }
    return [(p.parent.name, ku._read_json(p, RECORD)) for p in paths if is_complete[p]]


def rounded(score):
    return None if score is None else round(score, 4)


def row(name, record):
    settings, oof = record["settings"], record["oof"]
    return {
        "run": name,
        "head": settings["head"],
        f"{oof['metric']} last": rounded(oof["last"]),
        f"{oof['metric']} best": rounded(oof["best"]),
        "sd over folds": rounded(oof["last_fold_sd"]),
        "folds": len(record["folds"]),
        "seed": settings["seed"],
        "epochs": settings["epochs"],
        "rows": record["rows"],
        "validated": oof["rows"],
        "seconds": round(record["seconds"]["total"]),
        "training rows/s": round(record["rows_per_second"], 1),
        "peak GB": round(record["peak_memory_bytes"] / 2**30, 1),
        "device": f"{record['device']}, {record['threads']} threads, {record['precision']}",
    }


def markdown(table):
    cells = table.astype(object).where(table.notna(), "")
    lines = [list(table.columns), ["---"] * len(table.columns), *cells.values.tolist()]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("folders", nargs="+", help="run folders, or folders that hold some")
    parser.add_argument("-o", "--output", type=Path, help="also write the table to this CSV file")
    args = parser.parse_args()
    try:
        runs = finished(args.folders)
    except ku.KitError as error:
        sys.exit(str(error))
    if not runs:
        sys.exit(f"no complete run under {', '.join(args.folders)}")
    metrics = sorted({record["oof"]["metric"] for _, record in runs})
    if len(metrics) > 1:
        problem = f"the runs have different metrics: {', '.join(metrics)}"
        of_other = [name for name, record in runs if record["oof"]["metric"] != metrics[0]]
        remedy = f"name the folders of one metric; of another than {metrics[0]} are"
        sys.exit(f"{problem}: {remedy} {', '.join(of_other)}")
    is_ascending = runs[0][1]["oof"]["better"] == "lower"
    table = pd.DataFrame([row(name, record) for name, record in runs])
    table = table.sort_values(f"{metrics[0]} last", ascending=is_ascending)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(args.output, index=False)
    print(markdown(table))


if __name__ == "__main__":
    main()

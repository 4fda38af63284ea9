"""Table of finished runs: one line for each run folder under the folders given, best last-checkpoint score first.

    python tools/table.py runs/heads                              # Markdown
    python tools/table.py runs/heads -o results/sample_heads.csv  # and a CSV file

Scores are out-of-fold over all validated rows; `sd over folds` is the spread of the fold scores of the last
checkpoint. One run of each says nothing about differences smaller than the noise between seeds.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd


def finished(folders):
    """Records of the complete runs under the folders."""
    paths = sorted({path for folder in folders for path in Path(folder).rglob("record.json")})
    records = [(path.parent, json.loads(path.read_text())) for path in paths]
    return [(folder.name, record) for folder, record in records if record["status"] == "complete"]


def row(name, record):
    settings, oof = record["settings"], record["oof"]
    spread = oof["last_fold_sd"]
    return {
        "run": name,
        "head": settings["head"],
        f"{oof['metric']} last": round(oof["last"], 4),
        f"{oof['metric']} best": round(oof["best"], 4),
        "sd over folds": None if spread is None else round(spread, 4),
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
    lines = [
        list(table.columns),
        ["---"] * table.shape[1],
        *table.astype(object).where(table.notna(), "").values.tolist(),
    ]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", help="run folders, or folders that hold some")
    parser.add_argument("-o", "--output", help="also write the table to this CSV file")
    arguments = parser.parse_args()
    runs = finished(arguments.folders)
    if not runs:
        sys.exit(f"no complete run under {', '.join(arguments.folders)}")
    kinds = {(record["oof"]["metric"], record["oof"]["better"]) for _, record in runs}
    if len(kinds) > 1:
        sys.exit(
            f"the runs have different metrics: {', '.join(sorted(metric for metric, _ in kinds))}"
        )
    ((metric, better),) = kinds
    table = pd.DataFrame([row(*run) for run in runs]).sort_values(
        f"{metric} last", ascending=better == "lower"
    )
    if arguments.output:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(arguments.output, index=False)
    print(markdown(table))


if __name__ == "__main__":
    main()

"""What tools/pseudo_label.py finds as near-duplicates: among real texts, among edited copies, and how long it takes.

    python tools/dev/bench_duplicates.py path/to/clear

The folder has train.csv and test.csv with a column `excerpt`. Copies are of 300 training texts, the edits drawn at
random with seed 0; what is put into them comes from other training texts.
"""

import argparse
import random
import re
import sys
import time
from pathlib import Path

from pseudo_label import THRESHOLD, ku, near_duplicates

LOWEST = 0.2  # share from which on pairs of real texts are shown


def share(a, b):
    """Share of the word trigrams of the shorter text."""
    a, b = ({tuple(words[i : i + 3]) for i in range(len(words) - 2)} for words in map(str.split, (a, b)))
    return len(a & b) / max(1, min(len(a), len(b)))


def sentences(text):
    return re.split(r"(?<=[.!?])\s+", text)


def edits(texts):
    """Name of an edit -> function of a text."""

    def exchange(parts, others, share):
        places = set(random.sample(range(len(parts)), max(1, round(share * len(parts)))))
        return " ".join(random.choice(others) if i in places else part for i, part in enumerate(parts))

    def other():
        return random.choice(texts)

    def words(share):
        return lambda text: exchange(text.split(), other().split(), share)

    return {
        "case and punctuation": lambda text: re.sub(r"[.,;:-]", " ", text.upper()),
        "a third of it": lambda text: " ".join(text.split()[: len(text.split()) // 3]),
        "inside a text three times as long": lambda text: " ".join([other(), text, other()]),
        "one sentence exchanged": lambda text: exchange(sentences(text), sentences(other()), 0),
        "half of the sentences exchanged": lambda text: exchange(sentences(text), sentences(other()), 0.5),
        "10 % of the words exchanged": words(0.1),
        "20 % of the words exchanged": words(0.2),
        "30 % of the words exchanged": words(0.3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    try:
        train, test = (list(ku.read_table(folder / name, ["excerpt"])["excerpt"]) for name in ("train.csv", "test.csv"))
    except ku.KitError as error:
        sys.exit(str(error))
    ours, theirs = ku.normalised(test), ku.normalised(train)
    pairs = near_duplicates(ours, theirs, LOWEST).T
    found = sorted((share(ours[a], theirs[b]) for a, b in pairs), reverse=True)
    print(f"{len(test)} x {len(train)} pairs of a test and a training text; shares from {LOWEST} on:")
    print(" ", ku.listing(f"{value:.2f}" for value in found))
    random.seed(0)
    for name, edit in edits(train).items():
        copied = random.sample(train, min(300, len(train)))
        shares = [share(*ku.normalised([text, edit(text)])) for text in copied]
        caught = sum(value >= THRESHOLD for value in shares) / len(shares)
        print(f"{name}: {caught:.1%} found at {THRESHOLD}, smallest share {min(shares):.2f}")
    pool = [sentence for text in train + test for sentence in sentences(text)]
    ours, theirs = (ku.normalised(" ".join(random.choices(pool, k=9)) for _ in range(10000)) for _ in range(2))
    began = time.perf_counter()
    near_duplicates(ours, theirs, THRESHOLD)
    print(f"10,000 x 10,000 texts of 9 of the sentences each: {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()

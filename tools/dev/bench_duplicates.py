"""What tools/pseudo_label.py finds as near-duplicates, among real texts and edited copies.

    python tools/dev/bench_duplicates.py path/to/clear

The folder has train.csv and test.csv with a column `excerpt`. Copies are of 300 training texts, the
edits drawn at random with seed 0; what is put into them comes from other training texts. The last
line says how long 10,000 x 10,000 texts take.
"""

import argparse
import random
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "kernel_utils")]
from pseudo_label import THRESHOLD, near_duplicates

import kernel_utils as ku

LOWEST = 0.2  # share from which on pairs of real texts are shown


def trigrams(text):
    words = text.split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def share(a, b):
    """Share of the word trigrams of the shorter text."""
    a, b = trigrams(a), trigrams(b)
    return len(a & b) / max(1, min(len(a), len(b)))


def sentences(text):
    return re.split(r"(?<=[.!?])\s+", text)


def exchange(parts, others, fraction):
    """A text in which a fraction of the parts, at least one, is another."""
    number = max(1, round(fraction * len(parts)))
    places = set(random.sample(range(len(parts)), number))
    chosen = [random.choice(others) if i in places else part for i, part in enumerate(parts)]
    return " ".join(chosen)


def make_edits(texts):
    """Name of an edit -> function of a text."""

    def other():
        return random.choice(texts)

    def exchange_words(fraction):
        return lambda text: exchange(text.split(), other().split(), fraction)

    def exchange_sentences(fraction):
        return lambda text: exchange(sentences(text), sentences(other()), fraction)

    return {
        "case and punctuation": lambda text: re.sub(r"[.,;:-]", " ", text.upper()),
        "a third of it": lambda text: " ".join(text.split()[: len(text.split()) // 3]),
        "inside a text three times as long": lambda text: " ".join([other(), text, other()]),
        "one sentence exchanged": exchange_sentences(0),
        "half of the sentences exchanged": exchange_sentences(0.5),
        "10 % of the words exchanged": exchange_words(0.1),
        "20 % of the words exchanged": exchange_words(0.2),
        "30 % of the words exchanged": exchange_words(0.3),
    }


def bench_real_texts(test, train):
    ours, theirs = ku._normalize_texts(test), ku._normalize_texts(train)
    pairs = near_duplicates(ours, theirs, LOWEST).T
    shares = sorted((share(ours[a], theirs[b]) for a, b in pairs), reverse=True)
    count = f"{len(test)} x {len(train)} pairs of a test and a training text"
    print(f"{count}; shares from {LOWEST} on:")
    print(" ", ku._comma_join(f"{value:.2f}" for value in shares))


def bench_edited_copies(train):
    random.seed(0)
    for name, edit in make_edits(train).items():
        texts = random.sample(train, min(300, len(train)))
        shares = [share(*ku._normalize_texts([text, edit(text)])) for text in texts]
        caught = sum(value >= THRESHOLD for value in shares) / len(shares)
        print(f"{name}: {caught:.1%} found at {THRESHOLD}, smallest share {min(shares):.2f}")


def bench_time(texts):
    pool = [sentence for text in texts for sentence in sentences(text)]

    def make_texts():
        return ku._normalize_texts(" ".join(random.choices(pool, k=9)) for _ in range(10000))

    ours, theirs = make_texts(), make_texts()
    began = time.perf_counter()
    near_duplicates(ours, theirs, THRESHOLD)
    seconds = time.perf_counter() - began
    print(f"10,000 x 10,000 texts of 9 of the sentences each: {seconds:.1f} s")


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    try:
        train = list(ku._Table.read(folder / "train.csv", ["excerpt"]).frame["excerpt"])
        test = list(ku._Table.read(folder / "test.csv", ["excerpt"]).frame["excerpt"])
    except ku.KitError as error:
        sys.exit(str(error))
    bench_real_texts(test, train)
    bench_edited_copies(train)
    bench_time(train + test)


if __name__ == "__main__":
    main()

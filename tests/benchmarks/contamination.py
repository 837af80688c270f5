"""Precision and recall of decontamination: planted near-copies among other problems of the same kind.

    python -m tests.benchmarks.contamination

The items are word problems and puzzles of reasoning-gym. The rest are other problems of the same generators, which
share their sentences and not their numbers: the hardest thing to spare.
"""

import random

import reasoning_gym

from kd_plugin.text.contamination import EvaluationItems

DOMAINS = ("gsm_symbolic", "leg_counting", "chain_sum", "calendar_arithmetic", "family_relationships", "time_intervals",
           "knights_knaves", "basic_arithmetic", "number_sorting", "letter_counting")  # fmt: skip
WORDS = "quietly seven maybe often the blue some old new small large friend river stone".split()  # noqa: SIM905


def problems(seed, count):
    found = []
    for domain in DOMAINS:
        found += [item["question"] for item in reasoning_gym.create_dataset(domain, size=count, seed=seed)]
    return found


def changed(text, share, dice):
    """Put other words in the place of some; numbers stay, as in a paraphrase."""
    words = text.split()
    places = [i for i, word in enumerate(words) if word.isalpha()]
    for i in dice.sample(places, min(len(places), max(1, round(share * len(words))))):
        words[i] = dice.choice(WORDS)
    return " ".join(words)


COPIES = {
    "as it is": lambda text, dice: text,
    "other case and space": lambda text, dice: "  ".join(text.upper().split()),
    "inside a longer prompt": lambda text, dice: (
        f"You are a patient tutor. Solve this.\n\n{text}\n\nShow all your steps."
    ),
    "one word in twenty changed": lambda text, dice: changed(text, 0.05, dice),
    "one word in ten changed": lambda text, dice: changed(text, 0.1, dice),
    "the last fifth missing": lambda text, dice: " ".join(text.split()[: round(len(text.split()) * 0.8)]),
}


def measure(ngram, overlap, count=20):
    """Return recall for each kind of copy, the share of other problems that are spared, and the precision of all."""
    dice = random.Random(0)
    evaluation, others = problems(1, count), problems(2, 3 * count)
    others = [text for text in others if text not in set(evaluation)]
    items = EvaluationItems(ngram, overlap)
    for number, text in enumerate(evaluation):
        items.add("eval", number, text)
    recall = {
        name: sum(items.find(make(text, dice)) is not None for text in evaluation) / len(evaluation)
        for name, make in COPIES.items()
    }
    wrong = sum(items.find(text) is not None for text in others)
    right = sum(recall.values()) * len(evaluation)
    return recall, 1 - wrong / len(others), right / (right + wrong)


if __name__ == "__main__":
    print("| n-gram | overlap | " + " | ".join(COPIES) + " | others spared | precision |")
    print("|---" * (len(COPIES) + 4) + "|")
    for ngram in (5, 8, 13):
        for overlap in (0.3, 0.5, 0.7, 0.8):
            recall, spared, precision = measure(ngram, overlap)
            cells = [f"{value:.2f}" for value in (*recall.values(), spared, precision)]
            print(f"| {ngram} | {overlap} | " + " | ".join(cells) + " |")

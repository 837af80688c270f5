"""Has lm-eval's own scorers judge answers, so that our verifier can be compared with them where lm-eval is not there.

    python -m venv /tmp/judge && /tmp/judge/bin/pip install lm-eval==0.4.13
    /tmp/judge/bin/python tests/benchmarks/outside_judge.py tests/core/data/judged.jsonl

GSM8K-style items are scored as its task gsm8k does (flexible-extract, then exact_match with what that leaves out),
MATH-style items as its task aime24 does (the boxed answer, normalized as in Hendrycks' MATH).
``tests/core/test_evaluation_judge.py`` compares. All items are written here.
"""

import json
import random
import sys
from pathlib import Path

NAMES = ["Ana", "Ben", "Chen", "Dora", "Emil", "Fatou", "Goro", "Hana"]


def grade_school(draw: random.Random) -> list[dict]:
    """GSM8K-style: a whole number, asked and answered in words, ended in the ways that models end."""
    rows = []
    for i in range(120):
        name, a, b, c = draw.choice(NAMES), draw.randint(2, 90), draw.randint(2, 40), draw.randint(2, 9)
        answer = a + b * c
        if i % 10 == 9:
            answer += 1000 * draw.randint(1, 20)
            a = answer - b * c
        said = answer if i % 3 else answer + draw.choice([-10, -1, 1, 7, b])
        number = f"{said:,}" if i % 4 == 0 else str(said)
        steps = f"{name} has {a} apples and buys {b} bags of {c}. {b} * {c} = {b * c}, and {a} + {b * c} = {said}."
        ends = (
            f"#### {number}", f"The answer is {number}.", f"The answer is \\boxed{{{number}}}.", f"So {number} apples.",
            f"**Answer: {number}**", f"So it costs ${number}.", f"Answer: {number}", f"$${number}$$",
            f"Therefore, {name} has \\({number}\\) apples.", f"Final answer: {number}.0",
        )  # fmt: skip
        rows.append({"style": "gsm8k", "answer": str(answer), "response": f"{steps}\n{ends[i % len(ends)]}"})
    rows += [
        {"style": "gsm8k", "answer": "18", "response": "I cannot tell."},
        {"style": "gsm8k", "answer": "18", "response": "The answer is eighteen."},
        {"style": "gsm8k", "answer": "18", "response": "#### 18\n\nLet me check: 9 + 9 = 18."},
        {"style": "gsm8k", "answer": "18", "response": "It is 18, and not 19."},
        {"style": "gsm8k", "answer": "-5", "response": "He owes 5, so #### -5"},
    ]
    return rows


_EQUAL = [
    (r"\frac{3}{4}", [r"\frac{3}{4}", r"\dfrac{3}{4}", r"\tfrac34", "3/4", "0.75", r"\frac{6}{8}"]),
    (r"\frac{1}{2}", [r"\frac12", "0.5", ".5", r"\frac{1}{2}", "1/2"]),
    ("12", ["12", "12.0", r"12\text{ cm}", r"12^\circ", "+12", r"\$12", r"12\%"]),
    ("10000", ["10000", "10,000", r"10{,}000", "10^4"]),
    ("-7", ["-7", r"-7.0", r"\text{-}7", "−7"]),
    (r"\sqrt{2}", [r"\sqrt{2}", r"\sqrt2", r"2^{1/2}", "1.41421356"]),
    (r"2\sqrt{3}", [r"2\sqrt{3}", r"2\sqrt3", r"\sqrt{12}"]),
    (r"\frac{\sqrt{3}}{2}", [r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt3}2", r"\sqrt{3}/2"]),
    ("(1,2)", ["(1,2)", "(1, 2)", r"\left(1,2\right)", r"\left( 1, 2 \right)"]),
    ("[0,1)", ["[0,1)", "[0, 1)", r"\left[0,1\right)"]),
    ("x^2+1", ["x^2+1", "x^2 + 1", "1+x^2", "x^{2}+1"]),
    ("(x+1)(x-1)", ["(x+1)(x-1)", "(x-1)(x+1)", "x^2-1"]),
    (r"\pi", [r"\pi", "3.14159", r"1\pi"]),
    (r"3\pi", [r"3\pi", r"3 \pi", r"\pi\cdot 3"]),
    ("1,2,3", ["1,2,3", "1, 2, 3", "3,2,1", r"\{1,2,3\}"]),
    (r"\text{even}", [r"\text{even}", "even", r"\textbf{even}", r"\mathrm{even}"]),
    (
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        [r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"],
    ),
    ("5", ["x=5", "x = 5", "5", r"5\text{ units}", "5.", r"\boxed{5}"]),
    ("25\\%", ["25\\%", "25", "0.25"]),
    ("120^\\circ", ["120^\\circ", "120", r"120^{\circ}"]),
    ("1024", ["2^{10}", "1024", "1,024"]),
]
_WRONG = {
    r"\frac{3}{4}": [r"\frac{4}{3}", "0.7", "-3/4"], "12": ["21", "1.2", "120"], "-7": ["7", "-70"],
    r"\sqrt{2}": [r"\sqrt{3}", "2"], "(1,2)": ["(2,1)", "(1,2,3)", "(1,-2)"], "[0,1)": ["[0,1]", "(0,1)"],
    "x^2+1": ["x^2-1", "x+1", "x^2"], r"3\pi": ["3", r"\pi"], "1,2,3": ["1,2", "1,2,4"], r"\text{even}": ["odd"],
    "5": ["-5", "x=6", "50"], "1024": ["1025", "2^{9}"], r"2\sqrt{3}": [r"3\sqrt{2}", r"\sqrt{3}"],
    "10000": ["1000", "100,000"], r"\frac{1}{2}": ["2", r"\frac{1}{3}"], "(x+1)(x-1)": ["(x+1)^2", "x^2+1"],
}  # fmt: skip


def mathematics() -> list[dict]:
    """MATH-style: expressions in LaTeX, boxed, right in several forms and wrong in several ways."""
    pairs = [(answer, form) for answer, forms in _EQUAL for form in forms]
    pairs += [(answer, form) for answer, forms in _WRONG.items() for form in forms]
    frames = (
        "Thus the answer is $\\boxed{%s}$.",
        "We get \\[\\boxed{%s}\\]",
        "First $\\boxed{99}$? No: $\\boxed{%s}$.",
    )
    return [
        {"style": "math", "answer": answer, "response": frames[i % len(frames)] % form}
        for i, (answer, form) in enumerate(pairs)
    ]


def items() -> list[dict]:
    """All items, always the same."""
    return [*grade_school(random.Random(21)), *mathematics()]


def judged(item: dict) -> bool:
    """Return lm-eval's verdict."""
    import re

    from lm_eval.filters.extraction import RegexFilter
    from lm_eval.tasks.aime.utils import process_results

    if item["style"] == "math":
        return bool(process_results({"Answer": item["answer"]}, [item["response"]])["exact_match"])
    import lm_eval
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    path = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    task = yaml.load(path.read_text(), Loader)
    (flexible,) = [one for one in task["filter_list"] if one["name"] == "flexible-extract"]
    options = {key: value for key, value in flexible["filter"][0].items() if key != "function"}
    ((found,),) = RegexFilter(**options).apply([[item["response"]]], [item])
    left, right = found, item["answer"]
    for pattern in task["metric_list"][0]["regexes_to_ignore"]:
        left, right = re.sub(pattern, "", left), re.sub(pattern, "", right)
    return left.lower() == right.lower()


if __name__ == "__main__":
    rows = [{**item, "lm_eval": judged(item)} for item in items()]
    Path(sys.argv[1]).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} items, {sum(row['lm_eval'] for row in rows)} right by lm-eval")

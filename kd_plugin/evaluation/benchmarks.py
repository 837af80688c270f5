"""Known benchmarks by name: their questions and prompts as lm-eval has them, from the hub or from a local copy.

lm-eval, and not lighteval: it installs beside our verifier, where lighteval 0.13 pins an older latex2sympy2_extended
than math-verify 0.9 needs. It has no LiveCodeBench, whose rows are read here. Answers are verified as any task's are.
"""

from __future__ import annotations

import base64
import json
import pickletools
import random
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_plugin.errors import ConfigError, DataError, MissingDependencyError, nearest
from kd_plugin.inputs import load_rows

_CHOICE = r"(?:\(|boxed\{|[Aa]nswer(?: is)?:? *\**)\(?(?:\\text\{)?\(?([A-D])\b"
# Steps of a pickle that is one text; it is read step by step, and never run
_OF_A_TEXT = {"PROTO", "FRAME", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "MEMOIZE", "BINPUT", "STOP"}


@dataclass(frozen=True)
class Benchmark:
    """A set of questions that others use too.

    Attributes:
        name: as ``benchmark`` names it.
        dataset: its hub id.
        task: lm-eval's name of it; None where its rows are read here.
        split: in which its questions are.
        verify: what says which answers are right, in a task's form.
    """

    name: str
    dataset: str
    task: str | None
    split: str
    verify: Any = "math_verify"


BENCHMARKS = {
    one.name: one
    for one in (
        Benchmark("aime24", "Maxwell-Jia/AIME_2024", "aime24", "train"),
        Benchmark("math_500", "HuggingFaceH4/MATH-500", "hendrycks_math500", "test"),
        Benchmark(
            "gpqa",
            "Idavidrein/gpqa",
            "gpqa_diamond_cot_zeroshot",
            "train",
            {"kind": "regex", "pattern": _CHOICE, "column": "answer"},
        ),
        Benchmark("lcb", "livecodebench/code_generation_lite", None, "test", {"kind": "tests", "column": "tests"}),
    )
}


def benchmark(name: str) -> Benchmark:
    """Return the benchmark of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in BENCHMARKS:
        known = list(BENCHMARKS)
        raise ConfigError(f"Unknown benchmark {name!r}; expected one of {', '.join(known)}.{nearest(name, known)}")
    return BENCHMARKS[name]


def benchmark_rows(name: str, local: str | None = None) -> Any:
    """Return a benchmark's questions as rows with ``prompt`` and what its verifier reads.

    Args:
        name: of the benchmark.
        local: a .json, .jsonl or .parquet file with the columns of the hub's dataset, in the place of the hub.

    Raises:
        ConfigError: an unknown name.
        MissingDependencyError: lm-eval is not installed.
        DataError: the questions cannot be read.
    """
    from datasets import Dataset

    from kd_plugin.lineage.data import with_origin

    found = benchmark(name)
    rows = list(_coding(found, local) if found.task is None else _lm_eval(found, local))
    if not rows:
        raise DataError(f"{local or found.dataset} holds no question of {name}.")
    return with_origin(Dataset.from_list(rows), local or f"hf://datasets/{found.dataset}")


def _lm_eval(found: Benchmark, local: str | None) -> Iterator[dict[str, Any]]:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingDependencyError(
            f"benchmark {found.name} is read by lm-eval, which is not installed: pip install 'kd-plugin[benchmarks]'. "
            "Or give your own rows."
        ) from error
    manager = TaskManager()
    state = random.getstate()
    random.seed(0)  # its GPQA shuffles the choices by the global generator
    try:
        with tempfile.TemporaryDirectory() as directory:
            given = str(found.task) if local is None else _with_local(manager, found, local, Path(directory))
            (task,) = manager.load([given])["tasks"].values()
        if task.has_test_docs():
            docs = task.test_docs()
        else:
            docs = task.validation_docs() if task.has_validation_docs() else task.training_docs()
        for doc in docs:
            yield {"prompt": task.doc_to_text(doc), "answer": str(task.doc_to_target(doc)).strip("() ")}
    except (ValueError, KeyError, OSError, ConnectionError) as error:
        raise DataError(
            f"benchmark {found.name}: {local or found.dataset} cannot be read ({error}). Where the hub is out of "
            "reach, give a local copy of its file: rows: PATH."
        ) from error
    finally:
        random.setstate(state)


def _with_local(manager: Any, found: Benchmark, local: str, directory: Path) -> str:
    """Return lm-eval's task with a file in the place of the hub's dataset, as a file of its own form."""
    kind = "parquet" if local.endswith(".parquet") else "json"
    files = {"data_files": {found.split: str(Path(local).resolve())}}
    content: dict[str, Any] = {"include": str(manager.task_index[found.task].yaml_path), "task": f"{found.task}_local"}
    content |= {"dataset_path": kind, "dataset_name": None, "dataset_kwargs": files}
    path = directory / "local.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return str(path)


def _coding(found: Benchmark, local: str | None) -> Iterator[dict[str, Any]]:
    """Yield LiveCodeBench's problems that read from standard input; tests of functions need its own harness."""
    for row in load_rows(local or found.dataset, split=found.split):
        cases = [*_cases(row.get("public_test_cases")), *_cases(row.get("private_test_cases"))]
        if not cases or any(case.get("testtype", "stdin") != "stdin" for case in cases):
            continue
        asked = (
            f"{row['question_content']}\n\nWrite a Python program that reads from standard input and prints the answer."
        )
        yield {"prompt": asked, "tests": json.dumps([{"input": c["input"], "output": c["output"]} for c in cases])}


def _cases(given: Any) -> list[Mapping[str, Any]]:
    """Read test cases: JSON, or JSON in a pickled text, compressed, as the hub has the private ones."""
    if not given:
        return []
    try:
        return list(json.loads(given))
    except ValueError:
        pass
    try:
        read = [(step.name, value) for step, value, _ in pickletools.genops(zlib.decompress(base64.b64decode(given)))]
        others = {name for name, _ in read} - _OF_A_TEXT
        if others:
            raise ValueError(f"it holds more than a text: {', '.join(sorted(others))}")
        (text,) = [value for _, value in read if isinstance(value, str)]
        return list(json.loads(text))
    except (ValueError, TypeError, zlib.error) as error:
        raise DataError(f"lcb: private_test_cases cannot be read ({error}); expected the hub's own form.") from error

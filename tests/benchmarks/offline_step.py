"""What a step of offline KD costs against TRL's SFT step on the same batch, in time and in peak memory.

    python -m tests.benchmarks.offline_step --model DIR    # 96M parameters, 49152 tokens; minutes on 2 cores
    python -m tests.benchmarks.offline_step --quick        # a tiny student, seconds; checks that it runs

DIR holds a tokenizer of 49152 tokens, such as SmolLM2's. The student has SmolLM2's shape with 19 layers and random
weights. Each side is the whole trainer: its collator (which for offline KD reads the targets of a synthetic cache),
forward, loss, metrics and backward; without the optimizer, which is the same for both. All sides alternate within one
process, and the medians are compared. Memory is the peak resident set (VmHWM, reset before) of a process of its own a
side. Exit code 1 where a limit is missed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from kd_plugin.cache import Sampled, TeacherCache, TopK, example_id
from kd_plugin.cache.manifest import Part, Settings
from kd_plugin.cache.schema import CapturedRow, Example, Extracted, scored_positions, to_table
from kd_plugin.cache.store import Store
from kd_plugin.lineage import Source, outputs_record
from kd_plugin.trl import OfflineKDConfig, OfflineKDTrainer
from kd_plugin.vocab import Vocabulary
from tests.tiny import byte_tokenizer

SIDES = {"sft": None, "top-64": TopK(64), "50 draws": Sampled(50)}
TIME_LIMIT, MEMORY_LIMIT = 1.10, 1.15
DISTINCT = 21  # of 50 draws from a distribution of 3.4 nats
OWN = {"student": {"license": "own"}, "teachers": {"synthetic": {"license": "own"}}}


def student(arguments: argparse.Namespace, tokenizer: Any) -> LlamaForCausalLM:
    """Build a student of SmolLM2-135M's shape with fewer layers, or a tiny one."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    if not arguments.quick:
        shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=2 if arguments.quick else 19, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **shape,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rows(arguments: argparse.Namespace, tokenizer: Any) -> list[np.ndarray]:
    """Random token ids of equal length, so that neither side pads."""
    rng = np.random.default_rng(0)
    return [rng.integers(3, len(tokenizer), arguments.length).astype(np.int32) for _ in range(arguments.rows)]


def cache(directory: Path, targets: TopK | Sampled, texts: list[np.ndarray], tokenizer: Any) -> TeacherCache:
    """Fill a cache with random targets for ``texts``."""
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    about = Settings(
        "synthetic", None, "none", "float32", vocabulary.fingerprint, vocabulary.template_fingerprint, vocabulary.size,
        targets, 1.0, 0, None, None, len(texts), (),
    )  # fmt: skip
    lineage = outputs_record(Source("synthetic", license="own"))
    store = Store.create_or_join(directory, about, [Part("synthetic", len(texts), 0)], lineage, {})
    rng, captured = np.random.default_rng(1), []
    for ids in texts:
        mask = np.ones(len(ids), np.int8)
        captured.append(CapturedRow(Example(example_id(ids), ids, mask, scored_positions(mask), {}),
                                    _random(rng, len(ids) - 1, targets, vocabulary.size)))  # fmt: skip
    entries = sum(len(row.targets.ids) for row in captured)
    tokens = sum(len(row.targets.counts) for row in captured)
    store.commit(0, to_table(captured, (), targets), input_tokens=tokens, tokens=tokens, entries=entries)
    store.finish()
    return TeacherCache(directory)


def _random(rng: np.random.Generator, n: int, targets: TopK | Sampled, vocab: int) -> Extracted:
    width = targets.k if isinstance(targets, TopK) else DISTINCT
    ids = np.stack([np.sort(rng.choice(vocab, width, replace=False)) for _ in range(n)]).astype(np.int32).ravel()
    logprobs = (-np.sort(rng.random((n, width)) * 8, axis=1) - 4).astype(np.float16).ravel()
    counts, tail = np.full(n, width, np.int32), np.full(n, -0.5, np.float32)
    if isinstance(targets, TopK):
        return Extracted(counts, ids, logprobs, tail, None)
    draws = np.full((n, width), targets.draws // width, np.uint16)
    draws[:, 0] += targets.draws - draws[0].sum(dtype=np.uint16)
    return Extracted(counts, ids, logprobs, tail, draws.ravel(), np.full(n, -3.4, np.float32))


def trainer(side: str, arguments: argparse.Namespace, scratch: Path) -> tuple[Any, list[dict[str, Any]]]:
    """Return a side's trainer, and the rows of its batch."""
    tokenizer = byte_tokenizer() if arguments.quick else AutoTokenizer.from_pretrained(arguments.model)
    texts = rows(arguments, tokenizer)
    common: dict[str, Any] = {
        "output_dir": str(scratch / side), "per_device_train_batch_size": arguments.rows, "learning_rate": 1e-3,
        "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "max_length": None, "shuffle_dataset": False,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    data = Dataset.from_list([{"input_ids": ids.tolist()} for ids in texts])
    model = student(arguments, tokenizer)
    targets = SIDES[side]
    if targets is None:
        made: Any = SFTTrainer(model, SFTConfig(**common), train_dataset=data, processing_class=tokenizer)
    else:
        stored = cache(scratch / f"cache-{side}", targets, texts, tokenizer)
        made = OfflineKDTrainer(
            model, OfflineKDConfig(**common, lineage=OWN), train_dataset=data,
            processing_class=tokenizer, teacher_cache=stored,
        )  # fmt: skip
    return made, [made.train_dataset[i] for i in range(len(texts))]


def step(made: Any, examples: list[dict[str, Any]]) -> float:
    """Collate, forward and backward; seconds."""
    made.model.zero_grad(set_to_none=True)
    begun = time.perf_counter()
    batch = made.data_collator(examples)
    count = (batch["labels"][:, 1:] != -100).sum()
    made.training_step(made.model, batch, num_items_in_batch=count)
    return time.perf_counter() - begun


def peak(side: str, arguments: argparse.Namespace) -> float:
    """Peak MiB of a step, in a process of its own."""
    script = [sys.executable, "-m", "tests.benchmarks.offline_step", *sys.argv[1:], "--only", side]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak"])


def peak_here(side: str, arguments: argparse.Namespace) -> float:
    """Peak MiB of the second step of this process; the first one loads what is loaded once."""
    with tempfile.TemporaryDirectory() as scratch:
        made, examples = trainer(side, arguments, Path(scratch))
        step(made, examples)
        Path("/proc/self/clear_refs").write_text("5")
        step(made, examples)
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 1024


def main() -> int:
    """Measure, print a table, and hold it against the limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory with the tokenizer")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.quick and not arguments.model:
        parser.error("--model DIR or --quick is needed")
    if arguments.only:
        print(json.dumps({"peak": peak_here(arguments.only, arguments)}))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        made = {side: trainer(side, arguments, Path(scratch)) for side in SIDES}
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for side in SIDES:
            step(*made[side])
        for _ in range(arguments.rounds):
            for side in SIDES:
                seconds[side].append(step(*made[side]))
    median = {side: statistics.median(values) for side, values in seconds.items()}
    memory = {side: peak(side, arguments) for side in SIDES}
    print("| side | seconds | of SFT | peak MiB | of SFT |\n|---|---|---|---|---|")
    held = True
    for side in SIDES:
        ratios = median[side] / median["sft"], memory[side] / memory["sft"]
        print(f"| {side} | {median[side]:.3f} | {ratios[0]:.2f} | {memory[side]:.0f} | {ratios[1]:.2f} |")
        held = held and ratios[0] <= TIME_LIMIT and ratios[1] <= MEMORY_LIMIT
    print(f"limits {TIME_LIMIT} in time and {MEMORY_LIMIT} in memory: {'held' if held else 'MISSED'}")
    return 0 if held or arguments.quick else 1


if __name__ == "__main__":
    raise SystemExit(main())

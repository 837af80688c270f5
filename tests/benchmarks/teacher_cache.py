"""What the teacher cache costs to fill, to keep and to read.

python -m tests.benchmarks.teacher_cache read --examples 10000 --k 64
python -m tests.benchmarks.teacher_cache arrow --examples 2000 --length 128
python -m tests.benchmarks.teacher_cache capture --model DIR --dtype bfloat16
python -m tests.benchmarks.teacher_cache size --model DIR --text FILE
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from kd_plugin.cache import Sampled, TeacherCache, TopK, example_id
from kd_plugin.cache.manifest import Part, Settings
from kd_plugin.cache.schema import CapturedRow, Example, Extracted, scored_positions, to_table
from kd_plugin.cache.store import Store
from kd_plugin.capturing import capture
from kd_plugin.capturing.extract import extract
from kd_plugin.teachers import LocalTeacher
from kd_plugin.vocab import Vocabulary

VOCAB = 49_152


def synthetic(
    directory: Path, examples: int, length: int, k: int, vocabulary: Vocabulary | None = None, lineage: Any = None
) -> TeacherCache:
    """Fill a cache with random targets: only their number and size matter here."""
    tokenizer = "none" if vocabulary is None else vocabulary.fingerprint
    template = None if vocabulary is None else vocabulary.template_fingerprint
    size = VOCAB if vocabulary is None else vocabulary.size
    settings = Settings(
        "none", None, "none", "float32", tokenizer, template, size, TopK(k), 1.0, 0, None, None, 4096, ()
    )
    part = Part("synthetic", examples, 0)
    store = Store.create_or_join(directory, settings, [part], lineage or {"nodes": [], "edges": []}, {})
    for unit in store.missing():
        count, rng, rows = store.manifest.rows_of(unit)[2], np.random.default_rng(unit), []
        for _ in range(count):
            ids, mask = rng.integers(0, size, length).astype(np.int32), np.ones(length, np.int8)
            scored = scored_positions(mask)
            n = len(scored)
            targets = Extracted(
                counts=np.full(n, k, np.int32),
                ids=rng.integers(0, size, n * k).astype(np.int32),
                logprobs=(-np.sort(rng.random((n, k)) * 8, axis=1) - 3).astype(np.float16).ravel(),
                tail_logmass=np.full(n, -5, np.float32),
                draws=None,
            )
            rows.append(CapturedRow(Example(example_id(ids), ids, mask, scored, {}), targets))
        tokens = count * (length - 1)
        store.commit(unit, to_table(rows, (), TopK(k)), input_tokens=count * length, tokens=tokens, entries=tokens * k)
    store.finish()
    return TeacherCache(directory)


def read(arguments: argparse.Namespace) -> None:
    """Read the targets of random examples, as training does: first verifying, then verified."""
    with tempfile.TemporaryDirectory() as directory:
        cache = synthetic(Path(directory) / "cache", arguments.examples, arguments.length, arguments.k)
        before = private_megabytes()
        start = time.perf_counter()
        cache.dataset()
        print(f"materialised in {time.perf_counter() - start:.1f} s, {private_megabytes() - before:+d} MB")
        start = time.perf_counter()
        again = TeacherCache(cache.path)
        again.dataset()
        print(f"opened again in {time.perf_counter() - start:.2f} s")
        per_row, generator = arguments.length - 1, torch.Generator().manual_seed(0)

        def rate(batches: int) -> float:
            start, rows = time.perf_counter(), 0
            for _ in range(batches):
                chosen = torch.randint(0, arguments.examples, (64,), generator=generator)
                index = (chosen[:, None] * per_row + torch.arange(per_row)).flatten()
                again.signal(index)
                rows += len(index)
            return rows / (time.perf_counter() - start) / 1e6

        print(f"first touch (verifying) {rate(50):.2f} M targets/s")
        for start in range(0, cache.tokens, 4096):  # touch every block once
            again.signal(torch.arange(start, min(start + 4096, cache.tokens)))
        print(f"verified {max(rate(50) for _ in range(3)):.2f} M targets/s, {private_megabytes() - before:+d} MB")


def arrow(arguments: argparse.Namespace) -> None:
    """Read the targets of random examples from the cache's flat files, and from one memory-mapped Arrow file."""
    per_row, generator = arguments.length - 1, torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        cache = synthetic(Path(directory) / "cache", arguments.examples, arguments.length, arguments.k)
        path = Path(directory) / "targets.arrow"
        writer = None
        for start in range(0, cache.tokens, 65_536):
            signal = cache.signal(torch.arange(start, min(start + 65_536, cache.tokens)))
            ids, logprobs = (
                pa.FixedSizeListArray.from_arrays(values.numpy().ravel(), arguments.k)
                for values in (signal.ids.int(), signal.logprobs.half())
            )
            batch = pa.record_batch([ids, logprobs, signal.tail_logmass.numpy()], ["ids", "logprobs", "tail"])
            writer = writer or pa.ipc.new_file(str(path), batch.schema)
            writer.write_batch(batch)
        assert writer is not None
        writer.close()
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()

        def tensors(part: pa.Table) -> list[torch.Tensor]:
            ids, logprobs = (
                part[name].combine_chunks().flatten().to_numpy().reshape(-1, arguments.k)
                for name in ("ids", "logprobs")
            )
            tail = part["tail"].combine_chunks().to_numpy()
            return [torch.tensor(ids).long(), torch.tensor(logprobs).float(), torch.tensor(tail)]

        def taken(chosen: torch.Tensor) -> list[torch.Tensor]:
            index = (chosen[:, None] * per_row + torch.arange(per_row)).flatten()
            return tensors(table.take(pa.array(index.numpy())))

        def sliced(chosen: torch.Tensor) -> list[torch.Tensor]:
            return tensors(pa.concat_tables([table.slice(int(row) * per_row, per_row) for row in chosen]))

        def flat(chosen: torch.Tensor) -> list[torch.Tensor]:
            signal = cache._mapped.signal((chosen[:, None] * per_row + torch.arange(per_row)).flatten())
            return [signal.ids, signal.logprobs, signal.tail_logmass]

        flat(torch.arange(arguments.examples))  # every block verified, and all pages of either in memory
        sliced(torch.arange(arguments.examples))
        first = torch.arange(4)
        assert all(torch.equal(a, b) for a, b in zip(taken(first), sliced(first), strict=True))
        ways, best = {"flat files": flat, "Arrow, take": taken, "Arrow, a slice an example": sliced}, {}
        for _ in range(15):
            for name, way in ways.items():
                chosen = torch.randint(0, arguments.examples, (20, 8), generator=generator)
                start_time = time.perf_counter()
                for rows in chosen:
                    way(rows)
                seconds = time.perf_counter() - start_time
                best[name] = min(best.get(name, seconds), seconds)
        for name, seconds in best.items():
            print(f"{name}: {chosen.numel() * per_row / seconds / 1e6:.2f} M targets/s")


def throughput(arguments: argparse.Namespace) -> None:
    """Time scoring and extraction against the teacher's bare forward, interleaved, best of the rounds."""
    teacher = LocalTeacher(arguments.model, dtype=arguments.dtype)
    ids = torch.randint(0, teacher.vocabulary.size, (8, 256), generator=torch.Generator().manual_seed(0))
    attention, positions = torch.ones_like(ids), torch.arange(ids.numel())
    random = np.random.default_rng(0).random((ids.numel(), 50))
    model = teacher.model

    @torch.no_grad()
    def bare() -> None:
        model(input_ids=ids, attention_mask=attention, use_cache=False)

    def kept(targets: TopK | Sampled) -> None:
        signal = teacher.score(ids, attention, positions)
        extract(signal.hidden, signal.head, targets, uniforms=random)

    ways = {"bare forward": bare, "top-64": lambda: kept(TopK(64)), "50 draws": lambda: kept(Sampled(50))}
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - start)
    for name, seconds in best.items():
        share = best["bare forward"] / seconds
        print(f"{name}: {ids.numel() / seconds:.0f} tokens/s, {share:.2f} of the bare forward")


def size(arguments: argparse.Namespace) -> None:
    """Store what the teacher says about a text, and weigh the columns."""
    text = Path(arguments.text).read_text(encoding="utf-8")
    rows = [{"text": text[i : i + 1000]} for i in range(0, min(len(text), 20_000), 1000)]
    teacher = LocalTeacher(arguments.model, dtype=arguments.dtype)
    for targets in (TopK(64), Sampled(50)):
        with tempfile.TemporaryDirectory() as directory:
            cache = capture(rows, teacher, Path(directory) / "c", targets=targets, progress=False)
            metadata = pq.ParquetFile(cache.path / "data" / "00000.parquet").metadata
            sizes: dict[str, float] = {}
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                for column in map(group.column, range(group.num_columns)):
                    name = column.path_in_schema.split(".")[0]
                    sizes[name] = sizes.get(name, 0) + column.total_compressed_size / cache.tokens
            stored = sum(v for name, v in sizes.items() if name.startswith("target") or name == "tail_logmass")
            columns = ", ".join(f"{name} {value:.1f}" for name, value in sizes.items())
            print(f"{targets}: {stored:.0f} bytes a target over {cache.tokens} ({columns})")


def private_megabytes() -> int:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("RssAnon:") + 1]) // 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, way in (("read", read), ("arrow", arrow)):
        reading = commands.add_parser(name)
        reading.add_argument("--examples", type=int, default=10_000)
        reading.add_argument("--length", type=int, default=40)
        reading.add_argument("--k", type=int, default=64)
        reading.set_defaults(run=way)
    for name, run in (("capture", throughput), ("size", size)):
        command = commands.add_parser(name)
        command.add_argument("--model", required=True)
        command.add_argument("--dtype", default="bfloat16")
        command.add_argument("--rounds", type=int, default=4)
        command.add_argument("--text")
        command.set_defaults(run=run)
    torch.set_num_threads(1)
    chosen = parser.parse_args()
    chosen.run(chosen)

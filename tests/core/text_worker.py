"""A capture of text in a process of its own, which tests kill and measure."""

import resource
import time

from kd_plugin.teachers import client
from kd_plugin.text import ServerWriter, capture_text


def questions(count):
    return [
        {"prompt": f"What is {i}+{i}?", "answer": str(2 * i), "domain": "odd" if i % 2 else "even"}
        for i in range(count)
    ]


class Endless:
    """Rows that are made when they are read, so that none is held."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        for i in range(self.count):
            yield {"prompt": f"What is {i}+{i}? " + "x" * 2000, "answer": str(2 * i)}


def work(url, out, count, samples, report=None):
    client._FIRST_PAUSE = 0.01
    capture_text(
        questions(count), ServerWriter(url, license="mit", max_concurrency=8), out,
        completions=samples, verify="contains", shard_rows=16, progress=False,
    )  # fmt: skip


def measure(url, out, count, report):
    """Tell the seconds from the first request to the last answer, and the peak of this process's memory in MB."""
    writer = ServerWriter(url, license="mit")
    writer.check()
    began = time.monotonic()
    capture_text(Endless(count), writer, out, verify="contains", progress=False)
    report.put((time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))

"""E: files that bite. Each is read within bounds, and nothing outside a checkpoint is touched."""

import json
import threading
import time
from pathlib import Path

from kd_plugin.cli.lineage import main
from kd_plugin.errors import LineageError
from kd_plugin.lineage import Source
from kd_plugin.lineage.record import canonical
from tests.core.lineage_help import RUN, checkpoint, model_dir, run_of
from tests.lineage_attacks.attack import attack, checked, gate

SECONDS = 2.0  # that any file may take


def in_time(see):
    started = time.process_time()  # of this process: other work on the machine does not count
    found = see()
    return found if time.process_time() - started < SECONDS else "slow"


CARD = "E cards"
for name, front in (
    ("50,000 dashes", "x: " + "- " * 50_000),
    ("50,000 question marks", "? " * 50_000 + "x"),
    ("a number to the base of 60", "1:" * 200_000),
    ("the same as a value", "x: " + "1:" * 200_000),
    ("a number of 300,000 hexadecimal digits", "x: 0x" + "f" * 300_000),
    ("1,400 levels of indentation", "".join(" " * i + "a:\n" for i in range(1400))),
    ("50,000 brackets", "[" * 50_000),
    ("aliases that multiply", "a: &a [x]\nb: [*a, *a]"),
    ("200,000 keys", "".join(f"k{i}: 1\n" for i in range(80_000))),
    ("license twice", "license: mit\nlicense: llama2"),
):
    attack(CARD, f"front matter: {name}", "unknown", lambda d, f=front: in_time(
        lambda: gate(d, teacher=Source("t", ref=model_dir(d, "t", f if ":" in f else f"{f}\nx:")))))  # fmt: skip
attack(CARD, "front matter behind a byte-order mark", "block", lambda d: gate(d, teacher=_bom(d)))


def _bom(place: Path) -> Source:
    made = Path(model_dir(place, "t"))
    (made / "README.md").write_text("\ufeff---\nlicense: llama2\n---\n")
    return Source("t", ref=str(made))


LINK = "E links"


def saved(place: Path) -> tuple[Path, "object"]:
    place.mkdir(exist_ok=True)
    made, run = checkpoint(place), run_of(place, "mit")
    return made, run


def into_a_linked_folder(place: Path) -> str:
    made, run = saved(place)
    outside = place / "outside"
    outside.mkdir()
    (outside / "apache-2.0.txt").write_text("mine")
    (made / "LICENSES").symlink_to(outside)
    try:
        run.write(made, step=1)
    except LineageError:
        return "error" if [p.name for p in outside.iterdir()] == ["apache-2.0.txt"] else "written outside"
    return "written"


def over_a_linked_file(name: str):
    def see(place: Path) -> str:
        made, run = saved(place)
        outside = place / "outside.txt"
        outside.write_text("mine")
        (made / name).symlink_to(outside)
        run.write(made, step=1)
        return checked(made) if outside.read_text() == "mine" else "written outside"

    return see


def copied_from_a_linked_folder(place: Path) -> str:
    made, run = saved(place)
    run.write(made, step=1)
    (made / "LICENSES").rename(place / "elsewhere")
    (made / "LICENSES").symlink_to(place / "elsewhere")
    target = checkpoint(place / "target")
    try:
        run.copy_files(made, target)
    except LineageError:
        return "error"
    return "copied"


attack(LINK, "LICENSES/ is a link", "error", into_a_linked_folder)
for name in ("NOTICE", "README.md", "lineage.json", "bom.cdx.json"):
    attack(LINK, f"{name} is a link", "good", over_a_linked_file(name))
attack(LINK, "a copy from linked LICENSES/", "error", copied_from_a_linked_folder)

RECORD = "E records"


def edited(change):
    def see(place: Path) -> str:
        made, run = saved(place)
        run.write(made, step=1)
        record = json.loads((made / "lineage.json").read_text())
        change(record)
        (made / "lineage.json").write_bytes(canonical(record))
        codes = {main(["verify", str(made)]), main(["diff", str(made), str(made)])}
        codes |= {main(["export", str(made), "--format", form]) for form in ("cyclonedx", "spdx", "markdown")}
        return f"exit {sorted(codes)}"

    return see


def put(*path_and_value):
    *path, value = path_and_value

    def change(record):
        for step in path[:-1]:
            record = record[step]
        record[path[-1]] = value

    return change


for name, change in (
    ("sha256: null", put("subjects", 0, "sha256", None)),
    ("facts: []", put("policy", "facts", [])),
    ("subjects: [null]", put("subjects", [None])),
    ("size: '1'", put("subjects", 0, "size", "1")),
    ("edges: [1]", put("edges", [1])),
    ("terms: {mit: []}", put("terms", {"mit": []})),
    ("student.declared_license: 1", put("student", "declared_license", 1)),
    ("run.source: []", put("run", "source", [])),
    ("checkpoint.step: -1", put("checkpoint", "step", -1)),
    ("overrides: [[]]", put("overrides", [[]])),
    ("nodes[0].name: 3", put("nodes", 0, "name", 3)),
    ("effective.findings: [{}]", put("effective", "findings", [{}])),
):
    attack(RECORD, f"a record with {name}", "exit [2]", edited(change))

DATE = "E dates"
EXCEPTION = {
    "rule": "forbidden", "terms": "llama2", "cite": "x", "terms_sha256": "0" * 64, "subject": "t", "basis": "contract",
    "approved_by": "me", "approved_on": "2026-01-01", "expires": "2027-01-01", "scope": "all", "reason": "r",
}  # fmt: skip
for written in ("20261001", "2026-W40-4", "2026-10-1", "2026-13-01", "2026-10-01T00:00:00", "tomorrow", "٢٠٢٦-١٠-٠١"):
    attack(DATE, f"an exception that expires on {written!r}", "error", lambda d, w=written: gate(
        d, config={"overrides": [EXCEPTION | {"expires": w}]}))  # fmt: skip
for written in ("tomorrow", "20261124", "2026-11-31"):
    attack(DATE, f"run.date: {written!r}", "error", lambda d, w=written: gate(
        d, config={"run": RUN | {"date": w}}))  # fmt: skip


def from_file(place: Path, text: str) -> str:
    path = place / "lineage.yaml"
    path.write_text(text)
    return {0: "allow", 1: "refused", 2: "error", 3: "conditional"}[main(["check", str(path)])]


attack(DATE, "use given twice", "error", lambda d: from_file(
    d, "student: {license: mit}\nuse: {commercial: true}\nuse: {commercial: false}\n"))  # fmt: skip
attack(DATE, "a fact given twice", "error", lambda d: from_file(
    d, "student: {license: mit}\nuse: {commercial: true, commercial: false}\n"))  # fmt: skip

NOTICE = "E notices"


def carried(**notices: str):
    def see(place: Path) -> str:
        base = Path(model_dir(place, "student", "apache-2.0"))
        for name, text in notices.items():
            (base / name.replace("__", ".")).write_text(text)
        made, run = saved(place)
        run.write(made, step=1)
        there = (made / "NOTICE").read_text()
        lines = {line for text in notices.values() for line in text.splitlines()}
        return "carried" if all(f"| {line}" in there for line in lines) else "dropped"

    return see


attack(NOTICE, "NOTICE beside NOTICE.txt", "carried", carried(NOTICE="one", NOTICE__txt="two"))
attack(NOTICE, "notice.md", "carried", carried(notice__md="one"))
attack(NOTICE, "a NOTICE of 2 MB", "carried", carried(NOTICE="Copyright 2020 A\n" * 120_000))
attack(NOTICE, "a NOTICE of 9 MB", "unknown", lambda d: gate(d, teacher=_long_notice(d)))


def _long_notice(place: Path) -> Source:
    made = Path(model_dir(place, "t", "mit"))
    (made / "NOTICE").write_bytes(b"x" * (9 << 20))
    return Source("t", ref=str(made))


WRITING = "E writing"


def by_four_threads(place: Path) -> str:
    made, run = saved(place)
    runs = [run, *(run_of(place, "mit") for _ in range(3))]
    failed = []

    def work(one):
        for step in range(5):
            try:
                one.write(made, step=step)
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=work, args=(one,)) for one in runs]
    [t.start() for t in threads]
    [t.join() for t in threads]
    return checked(made) if not failed else f"{len(failed)} of 20 failed: {failed[0]}"


def card_kept(front: str, text: str = ""):
    def see(place: Path) -> str:
        made, run = saved(place)
        (made / "README.md").write_text(f"{text}---\n{front}---\n\n# mine\n", encoding="utf-8")
        for step in (1, 2):
            run.write(made, step=step)
        there = (made / "README.md").read_text(encoding="utf-8")
        kept = all(line in there.splitlines() for line in front.splitlines())
        return "kept" if kept and there.count("\n---\n") == 1 and there.startswith(f"{text}---\n") else there

    return see


attack(WRITING, "four threads write one directory", "good", by_four_threads)
for name, front, text in (
    ("1.10, yes: on and comments", "# my card\nversion: 1.10\nyes: on  # a word\n\n# numbers\noctal: 0o17\n", ""),
    ("behind a byte-order mark", "version: 1.10\n", "\ufeff"),
    ("lists, dates and block text", "tags:\n  - a  # first\n  - 1.10\nday: 2026-01-01\ntext: |\n  - no tag\n", ""),
    ("quoted keys", "'yes': on\n\"1\": 2\n", ""),
):
    attack(WRITING, f"a card's own words: {name}", "kept", card_kept(front, text))

"""Private names of other libraries are used in ``upstream.py`` alone, and each behaviour that is relied on has a test.

A behaviour is held by ``test_<name>`` in ``test_upstream.py``, or by a test elsewhere that ``ELSEWHERE`` names.
"""

import ast
import functools
import inspect
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import transformers
from torch import nn
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

import kd_plugin
from kd_plugin import upstream as core
from kd_plugin.lightning import upstream as lightning_host
from kd_plugin.trainers import upstream as trainers_room
from kd_plugin.trl import upstream as trl_host
from tests.contract import test_upstream

PACKAGE = Path(kd_plugin.__file__).parent
TESTS = Path(__file__).parents[1]
ROOMS = {"core": core, "lightning": lightning_host, "trainers": trainers_room, "trl": trl_host}
# Classes that a room's own classes inherit from, whose private names `self` has too
PARENTS = {
    "trl": (SFTTrainer, DistillationTrainer, SFTConfig, DistillationConfig),
    "trainers": (transformers.Trainer, transformers.TrainerCallback),
    "lightning": (pl.LightningModule, pl.LightningDataModule, pl.Callback),
}
ELSEWHERE = {
    "shuffle_leanly": "hosts/test_offline_order.py::test_the_order_is_that_of_sft",
    "LeanRandomSampler": "hosts/test_offline_order.py::test_ranks_get_the_batches_that_they_had",
    "divide_once": "lightning/test_strategies.py::test_two_ranks_take_the_steps_of_one",
    "prepare_for_zero3": "lightning/test_strategies.py::test_two_ranks_take_the_steps_of_one",
    "add_adapters_whole": "lightning/test_strategies.py::test_two_ranks_take_the_steps_of_one",
    "whole_parameters": "zero/test_fsdp.py::test_student_and_teachers_under_fsdp2_train_as_one_process",
    "unwrapped_for_generation":
        "hosts/test_panel_rollouts.py::test_interleaved_with_top_1_writes_the_teachers_greedy_text",
    "SummedLossMixin": "equivalence/test_offline_masks.py::test_the_assistants_turns_only",
    "TrlMetricsMixin": "hosts/test_evaluation.py::test_batch_sizes",
    "_metrics": "hosts/test_evaluation.py::test_batch_sizes",
    "_prepare_dataset": "equivalence/test_offline_packing.py::test_padding_free_and_packed_equal_padded",
    "_prepare_inputs": "equivalence/test_panel_equals_trl.py::test_default_settings_give_the_same_run",
    "_buffered_inputs": "hosts/test_panel_resume.py::test_bit_for_bit",
    "_step": "equivalence/test_panel_equals_trl.py::test_default_settings_give_the_same_run",
    "_generate_and_score_completions": "equivalence/test_panel_equals_trl.py::test_default_settings_give_the_same_run",
    "_generate_single_turn": "hosts/test_panel_rollouts.py::test_the_student_writes_what_it_writes_in_trl",
    "EpochSampler": "contract/test_trl_internals.py::test_rows_come_in_trls_order_from_any_epoch_on",
    "_get_train_sampler": "hosts/test_panel_text.py::test_a_run_goes_on_in_a_later_epoch",
    "_tool_call_loop": "zero/test_ranks.py::test_a_rank_whose_rows_call_fewer_tools_does_not_leave_the_others_waiting",
    "_compute_loss": "equivalence/test_panel_equals_trl.py::test_default_settings_give_the_same_run",
    "_tokenizer": "hosts/test_multimodal.py::test_the_panel_trains_as_trls_trainer",
}  # fmt: skip


def room_of(path: Path) -> str:
    room = path.relative_to(PACKAGE).parts[0]
    if room == "transformers":  # its private names are those of the room that it stands on
        return "trainers"
    return room if room in ROOMS else "core"


DOCUMENTED = {"_exit"}  # of os: its documentation names it, in spite of the underscore


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


@functools.cache
def own_names() -> frozenset[str]:
    """Private names that this package defines: functions, classes, and what is assigned to ``self`` or to a class."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name == "upstream.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_self(node):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return frozenset(found)


def of_self(node: ast.Attribute) -> bool:
    if isinstance(node.value, ast.Call):
        return getattr(node.value.func, "id", "") == "super"
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


@functools.cache
def inherited_names(room: str) -> frozenset[str]:
    """Private names of the classes that a room's classes inherit from; those that torch's modules have are aside."""
    found: set[str] = set()
    for parent in PARENTS.get(room, ()):
        found |= {name for name in dir(parent) if is_private(name)}
        for cls in parent.__mro__[:-1]:
            found |= set(re.findall(r"self\.(_[a-z]\w*)", inspect.getsource(cls)))
    return frozenset(found - set(dir(nn.Module)))


def foreign(source: str, room: str) -> set[str]:
    """Private names of other libraries, and patches of them, in a file that is no ``upstream.py``."""
    tree, found, imported = ast.parse(source), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            if module.startswith("kd_plugin") or module == "__future__":
                continue
            imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            parts = [*module.split("."), *(part for alias in node.names for part in alias.name.split("."))]
            found |= {part for part in parts if is_private(part)}
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in own_names() or (of_self(node) and node.attr in inherited_names(room)):
                found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            names = [argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)]
            found |= {name for name in names if is_private(name) and name not in own_names()}
        elif isinstance(node, ast.ClassDef):
            body = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
            body += [n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
            body += [t.id for n in node.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]
            found |= {name for name in body if is_private(name) and name in inherited_names(room)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            if isinstance(base, ast.Name) and base.id in imported - {"sys"}:  # a program's argv is its own
                found.add(f"a patch of {ast.unparse(node)}")
    return found - (set(trl_host.IN_TRAINERS) if room == "trl" else set())


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_private_names_are_used_in_upstream_files_alone(path):
    if path.name != "upstream.py":
        assert foreign(path.read_text(encoding="utf-8"), room_of(path)) == set()


@pytest.mark.parametrize(
    ("room", "source", "names"),
    [
        ("core", "model._tied_weights_keys", {"_tied_weights_keys"}),
        ("core", "from torch.nn.modules.dropout import _DropoutNd", {"_DropoutNd"}),
        ("core", "from transformers._x import y", {"_x"}),
        ("core", "getattr(config, '_name_or_path', None)", {"_name_or_path"}),
        ("core", "import peft\npeft.BaseTuner.inject_adapter = x", {"a patch of peft.BaseTuner.inject_adapter"}),
        ("trainers", "self._signature_columns.append(1)", {"_signature_columns"}),
        ("trainers", "class A:\n    def _save_checkpoint(self): ...", {"_save_checkpoint"}),
        ("trl", "super()._prepare_dataset(); self._textbook_name", {"_textbook_name"}),
        ("lightning", "checkpoint_io._executor", {"_executor"}),
        ("core", "self._vocabulary; trainer._vocabulary", set()),
    ],
)
def test_the_rule_can_fail(room, source, names):
    assert foreign(source, room) == names


def relied_on() -> set[str]:
    """What ``upstream.py`` files offer, and the names that TRL's trainers override."""
    found = set(trl_host.IN_TRAINERS) - {"_VALID_DICT_FIELDS", "_name", "_tag_names"} | {"card_and_fields"}
    for module in ROOMS.values():
        functions = [n for n, v in vars(module).items() if inspect.isfunction(v) or inspect.isclass(v)]
        found |= {n for n in functions if vars(module)[n].__module__ == module.__name__}
    return found


def test_every_behaviour_is_held_by_a_test():
    held = {name.removeprefix("test_") for name in vars(test_upstream) if name.startswith("test_")}
    assert relied_on() - held - ELSEWHERE.keys() == set()
    assert ELSEWHERE.keys() - relied_on() == set()
    for place in ELSEWHERE.values():
        file, _, test = place.partition("::")
        source = (TESTS / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in source, place


def test_no_name_is_listed_that_no_trainer_uses():
    text = "".join(path.read_text(encoding="utf-8") for path in (PACKAGE / "trl").glob("*.py"))
    assert [name for name in trl_host.IN_TRAINERS if not re.search(rf"(?<!\"){name}\b(?!\")", text)] == []

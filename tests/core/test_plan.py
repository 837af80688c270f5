"""``kd-plugin plan``: arithmetic that can be done by hand, verdicts, files, and contradictions."""

import json

import pytest
import torch
import yaml

from kd_plugin.cli.main import main
from kd_plugin.divergence import Divergence, PanelGroup, TeacherTerm, fused_panel_divergence, projection
from kd_plugin.errors import ConfigError
from kd_plugin.planner.architectures import architecture
from kd_plugin.planner.cost import bills, break_even, require_possible
from kd_plugin.planner.memory import Layout, activations, kv_cache, layer_activations, loss_buffers, memory, state_bytes
from kd_plugin.planner.run import GIB, Cluster, PlannedRun, PlannedTeacher, parse_teacher
from kd_plugin.planner.time import traffic
from kd_plugin.signals import HiddenSignal, OutputHead
from tests.tiny import save_tiny, tiny_llama

QWEN_32B, LLAMA_70B = "Qwen/Qwen2.5-32B", "meta-llama/Llama-3.1-70B"


def offline(student, **more):
    return PlannedRun(architecture(student), "offline", **more)


def plan(capsys, *argv):
    code = main(["plan", "--json", *argv])
    return code, json.loads(capsys.readouterr().out)


HEAD_32B = 152_064 * 5120


@pytest.mark.parametrize(("stage", "peak"), [(0, 1), (1, 1), (2, 2 / 8), (3, 1 / 8)])
def test_states_follow_the_zero_paper(stage, peak):
    run = offline(QWEN_32B)
    total, state = run.student.total, state_bytes(run, stage, ranks=8)
    assert state.weights == pytest.approx(2 * total / (8 if stage == 3 else 1), rel=1e-3)
    assert state.optimizer == pytest.approx(12 * total / (8 if stage else 1), rel=1e-6)
    # A part holds parameters that lie across its border whole: less than two of the largest more
    assert 0 <= state.gradients - 2 * total / (8 if stage else 1) < 2 * 2 * HEAD_32B
    passing = HEAD_32B if stage in (1, 2) else 0
    assert 2 * total * peak <= state.gradients_peak - 2 * passing < 2 * total * peak + 2 * 2 * 2 * HEAD_32B


def test_parts_hold_what_lies_across_their_borders_whole(tmp_path):
    """Two ranks: the matrices in their order make one row, the norms another; both are cut in the middle."""
    save_tiny(tmp_path / "model", hidden=32, layers=1)
    run = offline(str(tmp_path / "model"), accumulation=1)
    matrices = [259 * 32, 32 * 32, 32 * 16, 32 * 16, 32 * 32, 32 * 64, 32 * 64, 64 * 32]
    half, end = sum(matrices) / 2, 0
    touched = [2 * 32, 2 * 32]  # three norms of 32, cut in the middle of the second
    for size in matrices:
        touched[0] += size if end < half else 0
        end += size
        touched[1] += size if end > half else 0
    assert state_bytes(run, 2, ranks=2).gradients == 2 * max(touched)


def test_stage_2_adds_a_micro_batch_to_the_earlier_ones():
    one, two, many = (state_bytes(offline(QWEN_32B, accumulation=n), 2, ranks=8) for n in (1, 2, 8))
    assert two.gradients_peak - one.gradients_peak == one.gradients
    assert many == two


def test_stage_3_cuts_everything_and_keeps_small_parameters_whole():
    run = offline(QWEN_32B)
    state = state_bytes(run, 3, ranks=8)
    small = sum(p.numel for p in run.student.parameters if p.numel <= 51_200)
    assert state.weights == pytest.approx(2 * (run.student.total / 8 + small), rel=1e-6)
    assert state.gradients == pytest.approx(run.student.total / 4, rel=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_kl"])
@pytest.mark.parametrize(
    ("combine", "teachers"),
    [("route", 2), ("weighted_kl", 1), ("weighted_kl", 3), ("mixture", 2), ("confidence", 1), ("confidence", 2)],
)
@pytest.mark.parametrize("form", ["plain", "passes", "accelerator"], indirect=True)
def test_the_loss_keeps_as_many_buffers_as_planned(form, divergence, combine, teachers, monkeypatch):
    """Counts what the real loss asks of its workspace, on a vocabulary of 11 tokens."""
    made = []
    real = projection.Workspace.__init__
    monkeypatch.setattr(projection.Workspace, "__init__", lambda self, *args: (made.append(self), real(self, *args))[1])
    head = OutputHead(torch.randn(11, 4, requires_grad=True))
    signals = [HiddenSignal(torch.randn(6, 4), OutputHead(torch.randn(11, 4))) for _ in range(teachers)]
    if combine == "route":
        rows = torch.arange(6).chunk(teachers)
        groups = [
            PanelGroup(at, (TeacherTerm(HiddenSignal(s.hidden[at], s.head)),))
            for at, s in zip(rows, signals, strict=True)
        ]
    else:
        groups = [PanelGroup(None, tuple(TeacherTerm(s) for s in signals), combine)]
    fused_panel_divergence(torch.randn(6, 4, requires_grad=True), head, groups, Divergence(divergence))
    run = PlannedRun(
        architecture(QWEN_32B),
        teachers=tuple(PlannedTeacher(str(i), None, "sharded") for i in range(teachers)),
        combine=combine,
        divergence=divergence,
    )
    assert len(made[-1]._buffers) == loss_buffers(run, compiled=form != "plain")  # the last; first come a few rows


def test_layer_activations_are_what_autograd_keeps(tmp_path):
    """Holds the formula against the tensors that a real layer saves."""
    save_tiny(tmp_path / "model", hidden=64, layers=3)
    run = offline(str(tmp_path / "model"), precision="fp32", prompt_length=0, completion_length=128)
    model = tiny_llama(hidden=64, layers=3)
    parameters = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def saved(layers):
        kept.clear()
        model.model.layers = torch.nn.ModuleList(list(model.model.layers)[:layers])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model.model(input_ids=torch.ones(1, 128, dtype=torch.long), use_cache=False).last_hidden_state.sum()
        return sum(kept.values())

    difference = saved(3) - saved(2)
    assert layer_activations(run) == pytest.approx(difference, rel=0.25)


def test_checkpointing_keeps_one_input_a_layer():
    run = offline(QWEN_32B, completion_length=2048, prompt_length=0)
    inputs = 64 * 2048 * 5120 * 2
    assert activations(run, True) - layer_activations(run) == inputs
    assert activations(run, False) == 64 * layer_activations(run)


def test_kv_cache_counts_grouped_heads():
    run = PlannedRun(architecture(QWEN_32B), teachers=(parse_teacher("x:server"),), accumulation=4)
    assert kv_cache(run) == 2 * 64 * 8 * 128 * 2 * 4 * (512 + 2048)


def test_teachers_take_memory_where_they_are():
    student, shape = architecture(QWEN_32B), architecture(LLAMA_70B)
    size = 2 * shape.total

    def teachers(*placements):
        run = PlannedRun(student, teachers=tuple(PlannedTeacher(p, shape, p) for p in placements))
        held = memory(run, Layout(3), ranks=16)
        return held.teachers, held.host

    small = 2 * sum(p.numel for p in shape.parameters if p.numel <= 51_200)  # whole beside their parts
    assert teachers("sharded") == (size / 16 + small, 0)
    assert teachers("resident", "sharded") == (size + size / 16 + small, 0)
    assert teachers("offload", "offload") == (size, 2 * size)
    assert teachers("server", "cached") == (0, 0)


def test_more_ranks_and_offload_never_take_more():
    run = offline(QWEN_32B)
    for stage in (1, 2, 3):
        peaks = [memory(run, Layout(stage), ranks).peak for ranks in (1, 2, 8, 64)]
        assert peaks == sorted(peaks, reverse=True)
        assert memory(run, Layout(stage, "cpu"), 8).peak < memory(run, Layout(stage), 8).peak


def test_what_does_not_fit_exits_3_and_what_fits_writes_files(capsys, tmp_path):
    code, found = plan(capsys, "--student", LLAMA_70B, "--method", "offline", "--host_memory", "100")
    assert (code, found["recommended"]) == (3, None)
    fits = ["--student", QWEN_32B, "--method", "offline", "--completion_length", "3584"]
    code, found = plan(capsys, *fits, "--output", str(tmp_path / "out"))
    assert (code, found["recommended"]) == (0, "ZeRO-3")
    config = json.loads((tmp_path / "out" / "deepspeed.json").read_text())
    assert config["zero_optimization"]["stage"] == 3
    accelerate = yaml.safe_load((tmp_path / "out" / "accelerate.yaml").read_text())
    assert accelerate["num_processes"] == 8
    assert accelerate["deepspeed_config"]["deepspeed_config_file"] == str(tmp_path / "out" / "deepspeed.json")
    assert "torchrun --nnodes 1 --nproc_per_node 8 -m kd_plugin offline" in (tmp_path / "out" / "launch.sh").read_text()


def test_the_table_names_the_recommendation_and_warns_of_slow_generation(capsys):
    argv = ["plan", "--student", LLAMA_70B, "--teachers", f"[{LLAMA_70B}:sharded]", "--nodes", "4"]
    assert main(argv) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Recommended: ZeRO-3" in shown
    assert "ds3_gather_for_generation=False" in shown
    assert "fits, recommended" in shown


def test_the_chart_is_a_png(capsys, tmp_path):
    path = tmp_path / "charts" / "peaks.png"
    argv = ["--student", "qwen2.5-1.5b", "--teachers", "[qwen2.5-7b:sharded]", "--plot", str(path)]
    assert plan(capsys, *argv)[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_traffic_by_stage():
    run = offline(QWEN_32B, accumulation=4)
    size = 2 * run.student.total
    assert traffic(run, 0, 2).total == pytest.approx(size)
    assert traffic(run, 1, 2).total == pytest.approx(size)
    assert traffic(run, 2, 2).total == pytest.approx(size / 2 * 5)
    assert traffic(run, 3, 2).total == pytest.approx(size / 2 * 12, rel=1e-3)


def test_the_bill_of_offline_kd_has_the_teacher_once():
    run = PlannedRun(architecture("qwen2.5-1.5b"), teachers=(parse_teacher("qwen2.5-7b:sharded"),))
    once, twice = (bills(run, Cluster(), rows=1000, epochs=epochs) for epochs in (1, 2))
    assert twice[0].teacher_hours == once[0].teacher_hours
    assert twice[1].teacher_hours == pytest.approx(2 * once[1].teacher_hours)
    assert twice[0].student_flops == pytest.approx(2 * once[0].student_flops)
    assert once[0].student_flops == 1000 * 2560 * 8 * run.student.total


def test_own_gpus_pay_off_only_where_a_token_costs_less():
    run = PlannedRun(architecture("qwen2.5-1.5b"), teachers=(parse_teacher("qwen2.5-7b:sharded"),))
    dear = break_even(run, Cluster(), input_price=1.0, output_price=10.0)
    assert dear.tokens == pytest.approx(20 / (dear.api_per_million - dear.own_per_million))
    assert break_even(run, Cluster(), input_price=0.0, output_price=0.001).tokens is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--student", "Qwen/Qwen2.5-23B"], "Did you mean"),
        ([], "no student is named"),
        (["--student", QWEN_32B], "A panel needs a teacher"),
        (["--student", QWEN_32B, "--teachers", f"[{LLAMA_70B}:shard]"], "Did you mean 'sharded'"),
        (["--student", QWEN_32B, "--teachers", "[math:adapter]"], "the full student is trained and its base moves"),
        (["--student", QWEN_32B, "--method", "offline", "--micro_batch", "0"], "micro_batch is 0"),
        (["--student", QWEN_32B, "--methd", "offline"], "unknown option --methd"),
    ],
)
def test_contradictions_are_refused(argv, message, capsys):
    assert main(["plan", *argv]) == 2
    import re

    assert re.search(message, capsys.readouterr().err)


def test_offloaded_weights_need_stage_3():
    with pytest.raises(ConfigError, match="choose stage 3"):
        require_possible(offline("qwen2.5-0.5b"), Layout(2, offload_parameters="cpu"))


def test_usable_memory_leaves_a_reserve():
    assert Cluster(memory_gib=80).usable == int(80 * GIB * 0.92)

"""What is printed, and the one-line error for a program that does not fit."""

import dataclasses
from fractions import Fraction

import pytest

from jaxrl_stable import configs
from jaxrl_stable.aot.analysis import Figures, Part, step_seconds
from jaxrl_stable.aot.memory import Memory, Tensor
from jaxrl_stable.aot.report import advice, details, refusal, table
from jaxrl_stable.aot.roofline import Roofline
from jaxrl_stable.aot.sweep import plot_sweep, scaled, sweep_record, sweep_table
from jaxrl_stable.aot.topology import parse_topology
from jaxrl_stable.sharding import MeshShape
from jaxrl_stable.text import byte_size, duration

GiB = 2**30
LOGITS = Tensor("update/while/dot", "temporary", "f32[2048,151936]", "", 2 * GiB)
EMBEDDING = Tensor("model.embedding", "argument", "float32[8,8]", "over (fsdp, –)", GiB)


def part(name="update", seconds=2.0, sent=3 * GiB):
    times = Roofline(compute=seconds, hbm=1.0, ici=0.5, dcn=0.0)
    return Part(name, 4e14, 3e14, 5 * GiB, {"all-gather": sent}, times, 0.33, ())


def figures(name="update", temporaries=8, hbm=16, parts=None):
    memory = Memory(
        arguments=4 * GiB,
        temporaries=temporaries * GiB,
        outputs=3 * GiB,
        donated=3 * GiB,
        peak=9 * GiB,
        resident=GiB,
    )
    return Figures(name, 12.5, memory, hbm * GiB, parts or (part(name),), (LOGITS, EMBEDDING))


def test_a_chip_must_have_what_is_laid_out_once():
    """Memory of 4 + 8 + 3 GiB, of which 3 reuse arguments, and 1 GiB that is resident."""
    assert figures().memory.total == 13 * GiB
    assert figures(hbm=13).fits
    assert not figures(hbm=12).fits


def test_the_table_has_a_line_for_each_program_and_loop():
    rollout = figures("rollout", parts=(part("rollout"), part("decode", seconds=0.25)))
    header, update, first, loop = table([figures(), rollout]).splitlines()
    assert header.split()[:4] == ["program", "compile", "arguments", "temporary"]
    cells = [cell for cell in update.split("  ") if cell]
    assert [cell.strip() for cell in cells] == [
        "update", "12.5 s", "4.0 GiB", "8.0 GiB", "9.0 GiB", "13.0 GiB", "81%", "400", "300",
        "5.0 GiB", "3.0 GiB", "compute", "2 s", "33%",
    ]  # fmt: skip
    assert first.startswith("rollout ") and loop.startswith("  decode, per token ")
    strange = dataclasses.replace(part(), unknown=("kernel",))
    assert details([figures(parts=(strange,))]).splitlines() == [
        "update: all-gather 3.0 GiB",
        "update: without the FLOPs of kernel",
    ]


def test_a_step_decodes_every_token_and_updates_every_mini_batch():
    """One decode step takes one second of HBM time; rows are sampled in two groups."""
    rollout = figures("rollout", parts=(part("rollout"), part("decode", seconds=0.25)))
    rl = configs.Reinforcement(
        prompts=8,
        group_size=4,
        micro_batch_size=8,
        max_tokens=100,
        rollout_rows=16,
        objective=configs.Objective(mini_batches=4),
    )
    seconds = step_seconds([rollout, figures()], rl)
    assert seconds == {"rollout": 2.0 + 2 * 100 * 1.0, "update": 4 * 2.0}


def test_a_refusal_names_the_tensor_and_the_remedy_in_one_line():
    line = refusal(figures(hbm=12))
    assert "\n" not in line
    assert line.startswith("update needs 13.0 GiB on each chip, which has 12.0 GiB")
    assert "the largest is the temporary update/while/dot f32[2048,151936]: 2.00 GiB" in line
    assert line.endswith(advice(LOGITS)) and "Reinforcement.micro_batch_size" in line


@pytest.mark.parametrize(
    "name, kind, spread, remedy",
    [
        ("model.norm", "argument", "on every chip", "spread it: MeshShape.fsdp"),
        ("model.head", "resident", "over (fsdp, –)", "a larger MeshShape.fsdp"),
        ("batch.routing.experts", "argument", "over (–, data)", "fewer Reinforcement.prompts"),
        ("while/gather", "temporary", "", "ModelConfig.experts_rows"),
    ],
)
def test_advice_by_tensor(name, kind, spread, remedy):
    assert remedy in advice(Tensor(name, kind, "bf16[8]", spread, GiB))


def test_sizes_and_durations():
    assert [byte_size(n) for n in (12, 1536, 3 * GiB, 2**41)] == [
        "12.0 B",
        "1.5 KiB",
        "3.0 GiB",
        "2.0 TiB",
    ]
    assert [duration(t) for t in (3e-6, 0.02, 4.25, 1234.0)] == [
        "3 µs",
        "20 ms",
        "4.25 s",
        "1,234 s",
    ]


EXPERIMENT = configs.Experiment(
    reinforcement=configs.Reinforcement(
        prompts=8, group_size=4, micro_batch_size=8, objective=configs.Objective(mini_batches=1)
    )
)


def test_weak_scaling_grows_rows_and_not_their_parts():
    rl = scaled(EXPERIMENT, Fraction(4)).reinforcement
    assert (rl.prompts, rl.group_size, rl.micro_batch_size) == (32, 4, 32)
    with pytest.raises(ValueError, match="begin with the smallest slice"):
        scaled(EXPERIMENT, Fraction(1, 16))
    fixed = dataclasses.replace(EXPERIMENT, mesh=MeshShape(data=2))
    with pytest.raises(ValueError, match=r"MeshShape\.data = -1"):
        scaled(fixed, Fraction(2))


def test_a_sweep_says_how_the_cost_of_a_chip_changes(tmp_path):
    sizes = [
        (parse_topology("v5p:4x4x4"), [figures()]),
        (parse_topology("v5p:4x4x8"), [figures(temporaries=10, parts=(part(sent=4 * GiB),))]),
    ]
    header, memory, sent, time = sweep_table(sizes).splitlines()
    assert header.split()[-5:-3] == ["64", "128"]
    assert memory.split() == ["update:", "memory", "13.0", "GiB", "15.0", "GiB", "+15.4%"]
    assert sent.split() == ["update:", "sent", "3.0", "GiB", "4.0", "GiB", "+33.3%"]
    assert time.split() == ["update:", "time", "2", "s", "2", "s", "+0.0%"]
    assert [each["chips"] for each in sweep_record(sizes)] == [64, 128]
    plot_sweep(sizes, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000

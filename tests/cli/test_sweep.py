"""The sweep over numbers of GPUs."""

from __future__ import annotations

import itertools

import pytest

from autopar.cli.sweep import parse_counts
from autopar.errors import InputError
from tests.cli.helpers import MODEL, Cli

ON = ("wide.py", "--gpu", "h100-sxm-80gb", "--set", "width=4096", "--set", "batch=4096")
WIDE_MODEL = MODEL.replace("Linear(4, width)", "Linear(4, width), torch.nn.Linear(width, width)")


def test_each_point_is_the_plan_on_that_many_gpus(cli: Cli) -> None:
    cli.write("wide.py", WIDE_MODEL)
    content = cli("sweep", *ON, "--gpus", "4,1,2", "--objective", "energy", "--json").json
    points = content["points"]
    assert [point["num_gpus"] for point in points] == [1, 2, 4]
    for point in points:
        plan = cli("plan", *ON, "--gpus", str(point["num_gpus"]), "--use-all", "--objective", "energy", "--json").json
        for name in ("step_time_s", "energy_j", "average_power_w", "peak_power_w"):
            assert point[name] == plan["predicted"][name]


def test_derived_figures_follow_from_time_and_energy(cli: Cli) -> None:
    cli.write("wide.py", WIDE_MODEL)
    content = cli("sweep", *ON, "--gpus", "1,2,4", "--json").json
    points = content["points"]
    time_s, energy_j = ([point[name]["value"] for point in points] for name in ("step_time_s", "energy_j"))
    assert [p["speedup"] for p in points] == pytest.approx([time_s[0] / t for t in time_s])
    assert [p["efficiency"] for p in points] == pytest.approx(
        [time_s[0] / t / n for t, n in zip(time_s, (1, 2, 4), strict=True)]
    )
    assert points[0]["marginal_j_per_s"] is None
    for (t0, e0), (t1, e1), point in zip(
        *zip(*itertools.pairwise(zip(time_s, energy_j, strict=True)), strict=True), points[1:], strict=True
    ):
        expected = (e1 - e0) / (t0 - t1) if t0 > t1 else None
        assert point["marginal_j_per_s"] == (None if expected is None else pytest.approx(expected))
    assert content["least_at"]["energy"] == (1, 2, 4)[energy_j.index(min(energy_j))]
    assert content["least_at"]["time"] == (1, 2, 4)[time_s.index(min(time_s))]


def test_a_number_of_gpus_without_a_plan_is_told_apart(cli: Cli) -> None:
    cli.write("wide.py", WIDE_MODEL)
    content = cli("sweep", *ON, "--gpus", "1,2", "--memory", "300MiB", "--json").json
    assert [entry["num_gpus"] for entry in content["infeasible"]] == [1]
    assert [point["num_gpus"] for point in content["points"]] == [2]
    text = cli("sweep", *ON, "--gpus", "1,2", "--memory", "300MiB").out
    assert "no plan" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("text", ["", "0", "1,,2", "two", "1,-2", "1.5", ",".join(map(str, range(1, 70)))])
def test_counts_are_checked(text: str) -> None:
    with pytest.raises(InputError, match="--gpus"):
        parse_counts(text)

"""Published tables are read strictly: every fault names row and column, and the other rows are read all the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autopar.errors import InputError
from autopar.planner.configuration import configure, count_parameters, plausibility_faults
from autopar.planner.published import PublishedRow, TableRow, read_tables
from tests.planner.published_rows import row, write_table

FAULTS = {
    "not a number": (row(tp="two"), "tp"),
    "a remark in a number": (row(vpp="12 (default)"), "vpp"),
    "an underscore is no digit": (row(gbs="1_6"), "gbs"),
    "infinite": (row(iter_time_s="inf"), "iter_time_s"),
    "nan": (row(mem_gib="nan"), "mem_gib"),
    "negative": (row(seq="-128"), "seq"),
    "zero": (row(dp="0"), "dp"),
    "half a layer": (row(layers="4.5"), "layers"),
    "degrees against GPUs": (row(n_gpus="8"), "n_gpus"),
    "context parallel degree counts": (row(cp="2"), "n_gpus"),
    "heads against width": (row(heads="7"), "hidden"),
    "keys against heads": (row(kv_heads="3"), "heads"),
    "batch against microbatches": (row(gbs="12"), "gbs"),
    "accumulation": (row(ga="4"), "ga"),
    "more stages than layers": (row(pp="8", n_gpus="32"), "pp"),
    "milliseconds": (row(iter_time_s="50", tokens_per_s_per_gpu="10240"), "iter_time_s"),
    "kiloseconds": (row(iter_time_s="0.00005", tokens_per_s_per_gpu="10240"), "iter_time_s"),
    "status": (row(status="fine"), "status"),
    "quality": (row(config_quality="D"), "config_quality"),
}
IMPLAUSIBLE = {
    "milliseconds without a rate": (row(iter_time_s="50"), "iter_time_s"),
    "faster than the GPUs": (row(iter_time_s="0.000005"), "iter_time_s"),
    "rate beyond the peak": (row(tflops_per_gpu="400"), "tflops_per_gpu"),
    "parameters in millions": (row(params_b="13.1"), "params_b"),
    "parameters in units": (row(params_b="13100000"), "params_b"),
    "memory in MiB": (row(mem_gib="20480", mem_kind="peak allocated"), "mem_gib"),
    "memory in TiB": (row(mem_gib="0.002", mem_kind="peak allocated"), "mem_gib"),
    "power in mW": (row(power_w_per_gpu="350000"), "power_w_per_gpu"),
}


def only(tmp_path: Path, cells: dict[str, str]) -> TableRow:
    """The one row of a table of it."""
    (found,), _ = read_tables([write_table(tmp_path / "t.csv", [cells])])
    return found


def typed(tmp_path: Path, cells: dict[str, str]) -> PublishedRow:
    found = only(tmp_path, cells)
    assert found.row is not None, found.faults
    return found.row


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_names_row_and_column_and_the_others_are_read(name: str, tmp_path: Path) -> None:
    bad, column = FAULTS[name]
    bad["row_id"] = "T-bad"
    rows, _ = read_tables([write_table(tmp_path / "t.csv", [row(), bad, row(row_id="T-2")])])
    assert [r.name for r in rows] == ["T-0", "T-bad", "T-2"]
    assert [fault.column for fault in rows[1].faults] == [column]
    assert rows[1].row is None
    assert rows[0].row is not None
    assert rows[2].row is not None


@pytest.mark.parametrize("name", IMPLAUSIBLE)
def test_figures_that_model_or_gpu_rule_out_name_their_column(name: str, tmp_path: Path) -> None:
    cells, column = IMPLAUSIBLE[name]
    found = typed(tmp_path, cells)
    assert [fault.column for fault in plausibility_faults(found, configure(found))] == [column]


def test_a_sound_row_is_plausible(tmp_path: Path) -> None:
    sound = row(params_b="0.0136", mem_gib="3", mem_kind="peak allocated", power_w_per_gpu="350", tflops_per_gpu="150")
    found = typed(tmp_path, sound)
    assert plausibility_faults(found, configure(found)) == ()


def test_several_faults_are_all_named(tmp_path: Path) -> None:
    found = only(tmp_path, row(tp="x", status="?", mem_gib="-1"))
    assert sorted(fault.column for fault in found.faults) == ["mem_gib", "status", "tp"]


@pytest.mark.parametrize("column", ["tp", "iter_time_s", "hidden"])
def test_a_missing_column_is_a_fault_of_every_row(column: str, tmp_path: Path) -> None:
    rows, _ = read_tables([write_table(tmp_path / "t.csv", [row(), row(row_id="T-1")], without=[column])])
    assert [[fault.column for fault in r.faults] for r in rows] == [[column], [column]]


def test_a_missing_column_that_may_be_empty_is_noticed_once(tmp_path: Path) -> None:
    rows, notices = read_tables([write_table(tmp_path / "t.csv", [row(), row(row_id="T-1")], without=["fp8", "notes"])])
    assert all(r.row is not None for r in rows)
    assert len(notices) == 1
    assert "fp8, notes" in notices[0]


def test_a_row_id_counts_once_over_all_files(tmp_path: Path) -> None:
    paths = [write_table(tmp_path / name, [row()]) for name in ("a.csv", "b.csv")]
    first, second = read_tables(paths)[0]
    assert first.row is not None
    assert [str(fault) for fault in second.faults] == ["column row_id: 'T-0' is there twice, first in a, line 2"]


def test_short_and_long_rows_are_faults(tmp_path: Path) -> None:
    path = Path(write_table(tmp_path / "t.csv", [row(), row(row_id="T-1"), row(row_id="T-2")]))
    header, short, long, sound = path.read_text().splitlines()
    path.write_text("\n".join([header, short.rsplit(",", 2)[0], long + ",1,2", sound]) + "\n")
    rows, _ = read_tables([str(path)])
    assert ["cells" in str(r.faults) for r in rows] == [True, True, False]


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "no header"), ("a,b\n1,2\n", "no header"), ('n_gpus,tp\n"1,2\n', "not CSV"), ("tp,tp\n1,1\n", "twice")],
)
def test_a_file_that_is_no_table_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_tables([str(path)])
    with pytest.raises(InputError, match="cannot be read"):
        read_tables([str(tmp_path / "none.csv")])


def test_batch_and_microbatch_follow_from_each_other(tmp_path: Path) -> None:
    assert typed(tmp_path, row(gbs="", ga="2")).gbs == 16
    assert typed(tmp_path, row(mbs="", ga="2")).mbs == 4


def test_seconds_follow_from_tokens(tmp_path: Path) -> None:
    found = typed(tmp_path, row(iter_time_s="", tokens_per_s_per_gpu="10240"))
    assert found.step_s == 16 * 128 / (10240 * 4)


def test_tables_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    paths = [write_table(tmp_path / name / "t.csv", [row(row_id=name)]) for name in ("x", "y")]
    assert [r.source for r in read_tables(paths)[0]] == paths


def test_parameters_are_those_of_known_models(tmp_path: Path) -> None:
    found = typed(tmp_path, row())
    gpt3 = replace(found, layers=96, hidden=12288, heads=96, ffn=49152, vocab=51200)
    assert count_parameters(gpt3, "gpt") == pytest.approx(174.6e9, rel=2e-3)
    llama3_8b = replace(found, layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256)
    assert count_parameters(llama3_8b, "llama") == pytest.approx(8.03e9, rel=1e-3)

"""Plan and graph files: round trips, stable bytes, and that every damage is refused with one kind of error."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autopar.errors import InputError, PlanMismatchError
from autopar.ir.plan import SCHEMA_VERSION, Plan
from autopar.ir.serialize import (
    check_writable,
    dump_plan,
    load_plan,
    parse_plan,
    parse_strategy,
    plan_digest,
    save_plan,
)
from autopar.ir.serialize_graph import dump_graph, graph_hash, load_graph, parse_graph, save_graph
from autopar.ir.verify import check
from tests.planner.plans import plans, tiny_graph, tiny_plan

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(plans())
def test_parse_is_the_inverse_of_dump(plan: Plan) -> None:
    assert parse_plan(dump_plan(plan)) == plan


@quick
@given(plans())
def test_dump_is_stable_under_a_round_trip(plan: Plan) -> None:
    text = dump_plan(plan)
    assert dump_plan(parse_plan(text)) == text


@quick
@given(plans())
def test_order_of_mappings_does_not_change_the_bytes(plan: Plan) -> None:
    content = json.loads(dump_plan(plan))
    content["decisions"]["ops"] = dict(reversed(content["decisions"]["ops"].items()))
    assert dump_plan(parse_plan(json.dumps(content))) == dump_plan(plan)


def _paths(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in entries:
        found += _paths(item, (*path, key))
    return found


FREE_KEYS = ("options", "created", "energy_by_cause", "memory_by_cause", "sources", "rule_free_ops", "ops", "hubs")
FREE_KEYS += ("parameters", "alternatives", "notes")
CONTENT = json.loads(dump_plan(tiny_plan()))
PATHS = _paths(CONTENT)
FIXED = [path for path in PATHS if isinstance(path[-1], str) and (len(path) == 1 or path[-2] not in FREE_KEYS)]
JUNK = st.sampled_from([None, "junk", -1, 1.5, True, [], {}, [[]], "S0,,", 10**400, {"value": 1}])


def _parent(content: Any, path: tuple[str | int, ...]) -> Any:
    for key in path[:-1]:
        content = content[key]
    return content


@pytest.mark.parametrize("path", FIXED, ids=lambda p: ".".join(map(str, p)))
def test_a_missing_key_is_refused_by_its_path(path: tuple[str | int, ...]) -> None:
    content = copy.deepcopy(CONTENT)
    del _parent(content, path)[path[-1]]
    with pytest.raises(PlanMismatchError, match=str(path[-1])):
        parse_plan(json.dumps(content))


@pytest.mark.parametrize("path", FIXED, ids=lambda p: ".".join(map(str, p)))
def test_a_renamed_key_is_refused(path: tuple[str | int, ...]) -> None:
    content = copy.deepcopy(CONTENT)
    parent = _parent(content, path)
    parent[f"{path[-1]}x"] = parent.pop(path[-1])
    with pytest.raises(PlanMismatchError):
        parse_plan(json.dumps(content))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PATHS), JUNK)
def test_any_altered_value_is_read_or_refused_never_a_crash(path: tuple[str | int, ...], junk: Any) -> None:
    content = copy.deepcopy(CONTENT)
    _parent(content, path)[path[-1]] = junk
    try:
        parse_plan(json.dumps(content))
    except PlanMismatchError as error:
        assert "$" in str(error)  # noqa: PT017 - both outcomes are right; only the kind of error matters


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(dump_plan(tiny_plan())) - 2))
def test_a_truncated_file_is_refused(length: int) -> None:
    with pytest.raises(PlanMismatchError):
        parse_plan(dump_plan(tiny_plan())[:length])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "1",
        '{"schema_version": 2}',
        "[" * 100000,
        '{"a": NaN}',
        '{"a": 1, "a": 2}',
        "\x00",
        '"\\ud800"',
    ],
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(PlanMismatchError):
        parse_plan(text)


def test_a_newer_schema_says_to_upgrade() -> None:
    with pytest.raises(PlanMismatchError, match="upgrade autopar"):
        parse_plan(json.dumps({**CONTENT, "schema_version": SCHEMA_VERSION + 1}))


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("decisions", "num_microbatches"), 3, "does not divide"),
        (("decisions", "num_microbatches"), -2, "at least 1"),
        (("decisions", "mesh"), "dp=200,tp=1", "more GPUs"),
        (("decisions", "stages", 1, "start"), 0, "do not continue"),
        (("decisions", "schedule"), "zigzag", "expected one of"),
        (("predicted", "step_time_s", "value"), -1.0, "low <= value"),
        (("predicted", "energy_j", "unit"), "kWh", "expected 'J'"),
        (("predicted", "energy_j", "label"), "guessed", "unknown label"),
        (("decisions", "ops", "linear"), "batch: S0 -> S0", "1 labels on 2"),
    ],
)
def test_nonsense_is_refused_where_it_stands(path: tuple[Any, ...], value: Any, fault: str) -> None:
    content = copy.deepcopy(CONTENT)
    _parent(content, path)[path[-1]] = value
    with pytest.raises(PlanMismatchError, match=fault):
        _parse_and_check(json.dumps(content))


def _parse_and_check(text: str) -> None:
    check(parse_plan(text), tiny_graph())


def test_strategies_are_one_readable_line() -> None:
    assert CONTENT["decisions"]["ops"]["linear"] == "batch,replicate: S0,I; R,I -> S0,I"
    assert CONTENT["decisions"]["parameters"]["w"] == "replicated I/R/I, invariant I/I/I"
    assert parse_strategy("batch,replicate: S0,I; R,I -> S0,I") == tiny_plan().decisions.ops["linear"]


def test_digest_ignores_creation_and_wall_time() -> None:
    content = copy.deepcopy(CONTENT)
    content["created"]["date"], content["solver"]["wall_s"] = "later", 99.0
    assert plan_digest(parse_plan(json.dumps(content))) == plan_digest(tiny_plan())
    content["solver"]["gap"] = 0.5
    assert plan_digest(parse_plan(json.dumps(content))) != plan_digest(tiny_plan())


def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    save_plan(tiny_plan(), path)
    assert load_plan(path) == tiny_plan()
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match="No space left"):
        save_plan(tiny_plan(), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("name", ["missing/plan.json", "."])
def test_unwritable_paths_are_known_before_the_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot write"):
        check_writable(tmp_path / name)


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_unreadable_files_are_one_message(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"plan\.json"):
        load_plan(path)


def test_graph_round_trip(tmp_path: Path) -> None:
    save_graph(tiny_graph(), tmp_path / "graph.json")
    assert load_graph(tmp_path / "graph.json") == tiny_graph()


def test_graph_hash_depends_on_shapes_but_not_on_source_lines() -> None:
    moved = dump_graph(tiny_graph()).replace("tiny.py:3", "tiny.py:4")
    assert graph_hash(parse_graph(moved)) == graph_hash(tiny_graph())
    assert graph_hash(tiny_graph(16)) != graph_hash(tiny_graph())


GRAPH = json.loads(dump_graph(tiny_graph()))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(_paths(GRAPH)), JUNK)
def test_any_altered_graph_is_read_or_refused_never_a_crash(path: tuple[str | int, ...], junk: Any) -> None:
    content = copy.deepcopy(GRAPH)
    _parent(content, path)[path[-1]] = junk
    try:
        parse_graph(json.dumps(content))
    except PlanMismatchError as error:
        assert "$" in str(error)  # noqa: PT017 - both outcomes are right; only the kind of error matters

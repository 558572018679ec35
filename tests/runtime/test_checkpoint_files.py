"""Files of checkpoints are data: whatever stands in them, they load as they were written or give one clear error."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import InputError
from autopar.ir.run import RunSettings
from autopar.planner.assemble import make_serial_executor
from autopar.runtime.checkpoint import Saver, load
from autopar.runtime.checkpoint_store import CheckpointStore, read_manifest
from autopar.runtime.course import Course
from autopar.runtime.tensor_files import DTYPES, Planned, TensorFile, write_tensors
from autopar.runtime.weights import export_weights, import_weights
from tests.dist.checkpoint_worker import OPTIONS, POSITION, contents
from tests.dist.worker import Bench


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench("toy/conv", 2)


@pytest.fixture(scope="module")
def written(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 to 4 of which three are kept."""
    root = tmp_path_factory.mktemp("checkpoints")
    executor = make_serial_executor(bench.graph, bench.state, OPTIONS, num_microbatches=2)
    saver = Saver(CheckpointStore(root, keep=3), {})
    for step in range(1, 5):
        executor.step(bench.batch)
        saver.save(executor, _at(step))
    return root


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    for path in written.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(written)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path


def _at(step: int):  # type: ignore[no-untyped-def]
    return type(POSITION)(**{**POSITION.__dict__, "step": step})


def taken_up(bench: Bench, root: Path) -> Course:
    executor = make_serial_executor(bench.graph, bench.state, OPTIONS, num_microbatches=2)
    return Course(executor, RunSettings(steps=9, checkpoints=str(root)), _at(0), aliases={}, work=[])


def tensor_file(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}" / "rank_00000.safetensors"


def test_the_newest_are_kept_and_the_pointer_is_on_the_last(written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == [
        "latest", "step_00000002", "step_00000003", "step_00000004",
    ]  # fmt: skip
    assert (written / "latest").read_text() == "step_00000004\n"


def test_a_write_that_was_cut_short_leaves_the_previous_one(bench: Bench, root: Path) -> None:
    partial = root / "step_00000005.partial"
    partial.mkdir()
    (partial / "rank_00000.safetensors").write_bytes(b"half")
    assert taken_up(bench, root).position.step == 4
    CheckpointStore(root).begin(6)
    assert not partial.exists()


def test_a_damaged_byte_is_found_and_the_one_before_is_taken(bench: Bench, root: Path) -> None:
    path = tensor_file(root, 4)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    executor = make_serial_executor(bench.graph, bench.state, OPTIONS, num_microbatches=2)
    with pytest.raises(InputError, match=r"rank_00000.safetensors: damaged: the bytes \d+ to \d+"):
        load(executor, path.parent)
    course = taken_up(bench, root)
    assert course.position.step == 3
    assert any("damaged" in remark for remark in course.remarks)


@pytest.mark.parametrize("cut", [0, 5, 200, -1])
def test_a_truncated_file_is_found_and_the_one_before_is_taken(bench: Bench, root: Path, cut: int) -> None:
    path = tensor_file(root, 4)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="truncated or changed"):
        read_manifest(path.parent)
    assert taken_up(bench, root).position.step == 3


def test_a_pointer_to_nowhere_is_no_fault(bench: Bench, root: Path) -> None:
    (root / "latest").write_text("../../etc/passwd\n")
    assert taken_up(bench, root).position.step == 4


@pytest.mark.parametrize("name", ["../rank_00000.safetensors", "/etc/passwd", "a/../b", "rank_00000.pt", ""])
def test_names_of_files_cannot_leave_the_directory(root: Path, name: str) -> None:
    manifest = root / "step_00000004" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("rank_00000.safetensors", name))
    with pytest.raises(InputError, match="is no name of a file of a checkpoint"):
        read_manifest(manifest.parent)


@pytest.mark.parametrize("name", ["manifest.json", "rank_00000.safetensors"])
def test_links_are_not_followed(root: Path, name: str) -> None:
    path = root / "step_00000004" / name
    elsewhere = root / name
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"is a link|missing"):
        read_manifest(path.parent)


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os.mkdir, (str(self.path),)


def test_pickles_are_not_opened(root: Path, tmp_path: Path) -> None:
    struck = tmp_path / "struck"
    (root / "step_00000004" / "manifest.json").write_bytes(pickle.dumps(_Bomb(struck)))
    with pytest.raises(InputError, match=r"cannot be read|damaged or no checkpoint"):
        read_manifest(root / "step_00000004")
    saved = tmp_path / "weights.pt"
    torch.save({"weight": _Bomb(struck)}, saved)
    with pytest.raises(InputError, match="without executing code"):
        import_weights([saved], CheckpointStore(tmp_path / "new"), {}, {}, POSITION)
    assert not struck.exists()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_changed_manifest_is_read_or_refused(written: Path, tmp_path_factory: pytest.TempPathFactory, data) -> None:  # type: ignore[no-untyped-def]
    source = written / "step_00000004"
    text = (source / "manifest.json").read_text()
    target = tmp_path_factory.mktemp("fuzz")
    os.link(source / "rank_00000.safetensors", target / "rank_00000.safetensors")
    at = data.draw(st.integers(0, len(text) - 1))
    new = data.draw(
        st.sampled_from(["", "0", "9", "-1", "1e9", '"', "[", "}", "null", "99999999999999999999", "\\u0000"])
    )
    (target / "manifest.json").write_text(text[:at] + new + text[at + data.draw(st.integers(0, 3)) :])
    try:
        found = contents(target)
    except InputError:
        return
    assert found


@settings(max_examples=60, deadline=None)
@given(header=st.binary(max_size=80) | st.from_type(dict).map(lambda x: json.dumps({"a": str(x)}).encode()))
def test_any_header_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, header: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    try:
        found = TensorFile(path)
    except InputError:
        return
    assert not found.entries


def test_the_format_is_that_of_the_library(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    shapes = ((), (3,), (2, 0), (2, 3, 4))
    values = {f"{name}{i}": torch.arange(24.0).reshape(-1)[: torch.Size(shape).numel()].reshape(shape).to(dtype)
              for name, dtype in DTYPES.items() for i, shape in enumerate(shapes)}  # fmt: skip
    planned = {name: Planned(x.dtype, tuple(x.shape), lambda x=x: x) for name, x in values.items()}  # type: ignore[misc]
    write_tensors(tmp_path / "ours.safetensors", planned)
    library.save_file(values, tmp_path / "theirs.safetensors")
    read = library.load_file(tmp_path / "ours.safetensors")
    theirs = TensorFile(tmp_path / "theirs.safetensors")
    assert read.keys() == values.keys() == theirs.entries.keys()
    for name, expected in values.items():
        for found in (read[name], theirs.read(theirs.entries[name])):
            assert found.dtype == expected.dtype
            assert torch.equal(found.double(), expected.double())


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_weights_go_out_and_come_back(bench: Bench, written: Path, tmp_path: Path, ending: str) -> None:
    target = tmp_path / f"weights.{ending}"
    export_weights(written / "step_00000004", target)
    shapes = {f"parameter/{v.fqn}": tuple(v.meta.shape) for v in bench.graph.parameters}
    shapes |= {f"buffer/{v.fqn}": tuple(v.meta.shape) for v in bench.graph.outside("buffer")}
    store = CheckpointStore(tmp_path / "new")
    assert import_weights([target], store, shapes, {}, POSITION) == 0
    executor = make_serial_executor(bench.graph, bench.state, OPTIONS, num_microbatches=2)
    assert load(executor, store.path(0)).step == 0
    expected = contents(written / "step_00000004")
    assert {n: x for n, x in expected.items() if not n.startswith("optimizer/")}.keys() == shapes.keys()
    for value in bench.graph.parameters:
        assert torch.equal(executor.store.leaves[value.name].detach(), expected[f"parameter/{value.fqn}"])
    with pytest.raises(InputError, match="holds checkpoints already"):
        import_weights([target], store, shapes, {}, POSITION)


def test_another_model_is_refused(written: Path) -> None:
    other = Bench("toy/mlp", 2)
    executor = make_serial_executor(other.graph, other.state, OPTIONS, num_microbatches=2)
    with pytest.raises(InputError, match="of another model: it has parameter/"):
        load(executor, written / "step_00000004")

"""The Python interface. Oracle: a plain eager training loop with the same optimizer."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import autopar
from autopar.capture.source import load_source
from autopar.errors import InputError, PlanMismatchError
from autopar.ir.plan import Plan

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPAR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("AUTOPAR_PROFILE", str(tmp_path / "store.jsonl"))


class Net(torch.nn.Module):
    """Gives its loss."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.GELU(), torch.nn.Linear(width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


def example_batch(*, batch: int = 8) -> torch.Tensor:
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(0))


def eager_losses(model: torch.nn.Module, num_steps: int) -> list[float]:
    """Losses of a plain loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    losses = []
    for _ in range(num_steps):
        loss = model(example_batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_plan_of_a_class_a_module_and_a_file_agree() -> None:
    plans = [
        autopar.plan(Net, gpus=2, gpu="l4"),
        autopar.plan(Net(), gpus=2, gpu="l4", example_batch=example_batch()),
    ]
    assert plans[0].model.graph_hash == plans[1].model.graph_hash
    assert plans[0].decisions == plans[1].decisions
    assert isinstance(autopar.plan(str(ROOT / "examples/train_loop.py"), gpus=2, gpu="l4"), Plan)


def test_serial_session_follows_the_eager_loop() -> None:
    torch.manual_seed(0)
    model = Net()
    session = autopar.parallelize(copy.deepcopy(model), example_batch=example_batch(), learning_rate=1e-2)
    losses = [session.step(example_batch()) for _ in range(5)]
    assert losses == pytest.approx(eager_losses(model, 5), rel=1e-5)


def test_session_takes_a_step_in_two_halves() -> None:
    torch.manual_seed(0)
    model = Net()
    session = autopar.parallelize(copy.deepcopy(model), example_batch=example_batch())
    model(example_batch()).backward()
    session.compute_gradients(example_batch())
    found = [parameter.grad for parameter in session.parameters()]
    for mine, eager in zip(found, [p.grad for p in model.parameters()], strict=True):
        torch.testing.assert_close(mine, eager)
    before = next(session.parameters()).detach().clone()
    session.update()
    assert not torch.equal(before, next(session.parameters()).detach())
    assert len(session.optimizer.param_groups[0]["params"]) == len(found)


def test_decorated_train_step_follows_the_eager_loop() -> None:
    @autopar.autoparallel(gpus=2, learning_rate=1e-2)
    def train_step(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch)

    torch.manual_seed(0)
    model = Net()
    losses = [train_step(model, example_batch()) for _ in range(5)]
    assert losses == pytest.approx(eager_losses(copy.deepcopy(model), 5), rel=1e-5)
    with pytest.raises(InputError, match="another model"):
        train_step(Net(), example_batch())


def test_a_loop_goes_on_from_what_it_saved(tmp_path: Path) -> None:
    def decorated() -> autopar.api.TrainStep:
        @autopar.autoparallel(learning_rate=1e-2)
        def train_step(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
            return model(batch)

        return train_step

    def model() -> Net:
        torch.manual_seed(0)
        return Net()

    first, second, kept = decorated(), decorated(), str(tmp_path / "kept")
    with pytest.raises(InputError, match="nothing to save before its first step"):
        first.save(kept)
    net, again = model(), model()
    assert first.resume(net, example_batch(), kept) == 0
    losses = []
    for step in range(4):
        losses.append(first(net, example_batch()))
        if step == 1:
            first.save(kept)
    assert second.resume(again, example_batch(), kept) == 2
    assert [second(again, example_batch()) for _ in range(2)] == losses[2:]
    assert second.session is not None
    assert second.session.num_steps == 4


def test_a_checkpoint_of_other_random_streams_is_refused(tmp_path: Path) -> None:
    one, other = (autopar.parallelize(Net(), example_batch=example_batch(), seed=seed) for seed in (0, 3))
    one.step(example_batch())
    one.save(tmp_path)
    with pytest.raises(InputError, match="was written with seed 0, and this run has 3"):
        other.resume(tmp_path)


def test_decorated_builders_stay_what_they_are() -> None:
    @autopar.autoparallel
    def build_model(*, width: int = 4) -> Net:
        return Net(width)

    assert isinstance(build_model(), Net)
    assert autopar.autoparallel(gpus=4)(Net) is Net
    assert autopar.parallelize(Net).step(example_batch()) > 0


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    plan = autopar.plan(Net, gpus=1, gpu="l4")
    wider = Net(16)
    with pytest.raises(PlanMismatchError, match="another model"):
        autopar.parallelize(wider, plan, example_batch=example_batch())


def test_a_plan_in_bf16_trains_beside_a_copy_in_float32() -> None:
    example, options = str(ROOT / "examples" / "mlp.py"), {"inputs": "32", "hidden": "64", "layers": "2", "batch": "8"}
    plan = autopar.plan(example, gpus=1, gpu="cpu", options=options, precision="bf16")
    session = autopar.parallelize(example, plan, options=options)
    batch = load_source(example, options).raw_batch()
    losses = [session.step(batch) for _ in range(3)]
    assert losses[2] < losses[0]
    assert {parameter.dtype for parameter in session.parameters()} == {torch.float32}
    assert {leaf.dtype for leaf in session.executor.store.leaves.values()} == {torch.bfloat16}
    with pytest.raises(InputError, match="model of a source file"):
        autopar.plan(Net, gpus=1, precision="bf16")


def test_a_module_needs_an_example_batch() -> None:
    with pytest.raises(InputError, match="example_batch"):
        autopar.plan(Net(), gpus=1)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(InputError, match="not a model"):
        autopar.plan(3, gpus=1)


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(InputError, match="speed"):
        autopar.plan(Net, gpus=1, objective="speed")


def _losses_of(*command: str) -> list[float]:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step ")]


@pytest.mark.dist
def test_train_loop_under_torchrun_follows_the_serial_loss() -> None:
    serial = _losses_of("examples/train_loop.py")
    assert len(serial) == 50
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert _losses_of(*launcher, "examples/train_loop.py") == pytest.approx(serial, rel=1e-4, abs=2e-6)

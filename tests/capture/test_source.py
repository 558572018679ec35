"""Sources: options, decorated objects, Hugging Face configs, and every kind of bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from autopar.capture.export import capture
from autopar.capture.source import load_source
from autopar.errors import CaptureError, InputError

GOOD = """
import torch
from torch import nn

def build_model(width=4, bias=True, name="a", scale=1.0):
    return nn.Linear(4, width, bias=bias)

def example_batch(batch=8):
    return torch.ones(batch, 4)

def loss(output, batch):
    return (output - batch.sum(1, keepdim=True)).square().mean()
"""


def write(path: Path, text: str) -> str:
    file = path / "model.py"
    file.write_text(text)
    return str(file)


def test_options_are_converted_by_their_defaults(tmp_path: Path) -> None:
    source = load_source(write(tmp_path, GOOD), {"width": "8", "bias": "false", "batch": "2", "scale": "0.5"})
    model = source.build_model()
    assert model.out_features == 8
    assert model.bias is None
    assert source.batch_size == 2
    assert source.name == "model"
    (batch,), kwargs = source.example_batch()
    assert (tuple(batch.shape), kwargs) == ((2, 4), {})


def test_loading_twice_is_safe_and_leaves_the_path_alone(tmp_path: Path) -> None:
    text, before = write(tmp_path, GOOD), list(sys.path)
    assert load_source(text).build_model().out_features == 4
    write(tmp_path, GOOD.replace("width=4", "width=16"))
    assert load_source(text).build_model().out_features == 16
    assert sys.path == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("def build_model", "def make"), r"no model: define build_model\(\)"),
        (("def example_batch", "def batches"), r"no example_batch\(\)"),
        (("return torch.ones(batch, 4)", "return 3"), "must return a tensor, a tuple or a dict, not int"),
        (("return torch.ones(batch, 4)", "return {'x': 3}"), "holds no tensor"),
        (("return torch.ones(batch, 4)", "return torch.ones(())"), "no samples"),
        (("return nn.Linear(4, width, bias=bias)", "return 3"), "must return an nn.Module, not int"),
        (("return nn.Linear(4, width, bias=bias)", "raise OSError('gone')"), r"(?s)OSError: gone.*model.py:6: raise"),
        (("import torch\n", "import torch\nraise KeyError('x')\n"), r"(?s)raises at import: KeyError: 'x'.*model.py:3"),
        (("import torch\n", "import torch\nexit(3)\n"), r"exit\(3\)"),
        (("import torch\n", "import torch, nowhere_to_be_found\n"), "ModuleNotFoundError: No module named 'nowhere"),
        (("def build_model(", "def build_model(:"), r"not a Python file: .*\(line 5\)"),
        (("def build_model(width=4", "def build_model(depth, width=4"), "needs a value for depth"),
        (
            ("loss(output, batch):", "loss(output, batch):\n    return output"),
            r"loss\(output, batch\) returns a tensor",
        ),
        (("def loss", "def no_loss"), r"the model returns a tensor of shape \(8, 4\).*define loss\(output, batch\)"),
        (("def loss", "loss = 3\ndef no_loss"), "`loss` must be a function"),
    ],
)
def test_bad_files_give_one_clear_message(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(InputError, match=message) as caught:
        capture(load_source(write(tmp_path, GOOD.replace(*change))))
    assert "Traceback" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": "3"}, "unknown option depth; options of this model: batch, bias, name, scale, width"),
        ({"width": "wide"}, "option width=wide: not a int"),
        ({"bias": "perhaps"}, "option bias=perhaps: not a bool"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_source(write(tmp_path, GOOD), options)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_source(str(tmp_path / "absent.py"))
    with pytest.raises(InputError, match="is a directory"):
        load_source(str(tmp_path))
    (tmp_path / "binary.py").write_bytes(b"\x00\x01\xff")
    with pytest.raises(InputError, match="not a Python file"):
        load_source(str(tmp_path / "binary.py"))


def test_batch_that_does_not_fit_names_line_and_shapes(tmp_path: Path) -> None:
    text = write(tmp_path, GOOD.replace("torch.ones(batch, 4)", "torch.ones(batch, 5)"))
    with pytest.raises(CaptureError, match=r"(?s)\[8, 5\].*example batch: .*\(8, 5\)"):
        capture(load_source(text))


def test_batch_size_beyond_the_example(tmp_path: Path) -> None:
    source = load_source(write(tmp_path, GOOD))
    assert capture(source, batch_size=16).graph.batch_size == 16
    with pytest.raises(InputError, match="batch size 16 exceeds the 8 samples"):
        capture(source, batch_size=16, device="cpu")
    with pytest.raises(InputError, match="at least 1"):
        capture(source, batch_size=0)


DECORATED = """
import torch
from torch import nn

def autoparallel(found):
    found.__autopar__ = object()
    return found

@autoparallel
class Model(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(4, width)

    def forward(self, x, target):
        return (self.layer(x) - target).square().mean()

@autoparallel
def train_step(model, batch):
    return model(*batch)

def example_batch(batch=8, width=4):
    return torch.ones(batch, 4), torch.ones(batch, width)
"""


def test_decorated_class_is_the_model(tmp_path: Path) -> None:
    source = load_source(write(tmp_path, DECORATED), {"width": "8"})
    graph = capture(source).graph
    assert [v.meta.shape for v in graph.outside("input")] == [(8, 4), (8, 8)]
    assert [v.fqn for v in graph.outside("input")] == ["0", "1"]
    assert [v.fqn for v in graph.parameters] == ["layer.weight", "layer.bias"]


def test_model_built_from_numpy_is_built_in_memory_and_says_so(tmp_path: Path) -> None:
    body = "layer = nn.Linear(4, width)\n    layer.weight.data.numpy()\n    return layer"
    text = write(tmp_path, GOOD.replace("return nn.Linear(4, width, bias=bias)", body))
    captured = capture(load_source(text))
    assert "built in memory" in captured.notes[0]


def test_new_tensors_without_device_are_fine(tmp_path: Path) -> None:
    text = write(tmp_path, GOOD.replace("(output - batch", "(output * torch.arange(4) - batch"))
    assert capture(load_source(text)).graph.batch_size == 8


def test_nested_dict_batch(tmp_path: Path) -> None:
    model = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, data, weight):
        return (self.layer(data["x"]) * data["y"][0]).mean() * weight.sum()

def build_model():
    return Model()

def example_batch():
    return {"data": {"x": torch.ones(8, 4), "y": [torch.ones(8, 1)]}, "weight": torch.ones(3)}
"""
    graph = capture(load_source(write(tmp_path, model))).graph
    assert [(v.fqn, v.batch_dim) for v in graph.outside("input")] == [("data.x", 0), ("data.y.0", 0), ("weight", None)]


LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 128, "max_position_embeddings": 32,
}  # fmt: skip


def config(path: Path, **changes: Any) -> str:
    file = path / "config.json"
    file.write_text(json.dumps({**LLAMA, **changes}))
    return f"hf:{file}"


def test_hugging_face_config(tmp_path: Path) -> None:
    source = load_source(config(tmp_path), {"batch": "4", "num_hidden_layers": "3"})
    graph = capture(source).graph
    assert source.name == graph.name == "llama"
    assert graph.outside("input")[0].meta.shape == (4, 32)
    assert len(graph.blocks) == 5


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"model_type": "no-such-model"}, {}, "not a usable config of type no-such-model"),
        ({"architectures": ["LlamaModel"]}, {}, r"architectures is \['LlamaModel'\]"),
        ({"auto_map": {"AutoConfig": "x.Y"}}, {}, "remote code is never run"),
        ({}, {"depth": "3"}, "unknown option depth"),
        ({}, {"batch": "0"}, "must be at least 1"),
        ({"num_attention_heads": 5}, {}, "not a usable config of type llama: .*not a multiple of the number"),
    ],
)
def test_bad_configs(tmp_path: Path, changes: dict[str, Any], options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        capture(load_source(config(tmp_path, **changes), options))


def test_config_that_is_missing_or_not_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_source(f"hf:{tmp_path}/absent.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load_source(f"hf:{tmp_path}/config.json")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no model_type"):
        load_source(f"hf:{tmp_path}")


def test_example_batch_runs_on_the_device_that_is_asked_for(tmp_path: Path) -> None:
    captured = capture(load_source(write(tmp_path, GOOD)), device="cpu", batch_size=2)
    assert [t.device.type for t in captured.inputs] == ["cpu"]
    assert [tuple(t.shape) for t in captured.inputs] == [(2, 4)]
    assert all(isinstance(p, torch.nn.Parameter) for p in captured.module.parameters())

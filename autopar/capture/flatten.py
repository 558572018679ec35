"""From an exported program to a flat list of calls: submodules inlined, getitem folded, assertions dropped.

Values are named as in the graph IR: a single output has its call's name, output i of several is `name:i`. The bounds
of layers (`capture.markers`) pass their values on under the names that these have.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from typing import Any

import torch

from autopar import torch_adapter
from autopar.capture.calls import Call, ValueRef
from autopar.capture.markers import ENTER, LEAVE
from autopar.capture.user_code import capture_error, choose_frame
from autopar.errors import CaptureError

DROPPED = (
    "aten._assert_tensor_metadata.default",
    "aten._assert_async.default",
    "aten._assert_async.msg",
    "aten._assert_scalar.default",
)
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def source_frames(stack_trace: str | None) -> tuple[tuple[str, int], ...]:
    """(file, line) pairs of fx's textual stack trace, outermost first."""
    return tuple((m["file"], int(m["line"])) for m in _FRAME.finditer(stack_trace or ""))


class Flattener:
    """Walks a graph and its submodules; see the module docstring.

    Raises CaptureError for control flow operators, enabled autocast, or shapes that depend on data.
    """

    def __init__(self, user_file: str | None, scope_prefix: str) -> None:
        self.user_file = user_file
        self.scope_prefix = scope_prefix
        self.num_calls = 0

    def flatten(
        self, module: torch.fx.GraphModule, placeholders: list[Any], grad_enabled: bool = True
    ) -> tuple[list[Call], Any]:
        """Calls of the graph in order, and what its output node returns.

        Args:
            placeholders: a ValueRef or constant per placeholder node, in order.
        """
        env: dict[torch.fx.Node, Any] = {}
        calls: list[Call] = []
        waiting = iter(placeholders)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(waiting)
            elif node.op == "get_attr":
                env[node] = getattr(module, node.target)
            elif node.op == "output":
                return calls, self._lookup(node.args[0], env)
            else:
                calls.extend(self._call(node, env, grad_enabled))
        return calls, None

    def _lookup(self, args: Any, env: dict[torch.fx.Node, Any]) -> Any:
        if isinstance(args, torch.fx.Node):
            return env[args]
        if isinstance(args, tuple | list):
            return tuple(self._lookup(arg, env) for arg in args)
        if isinstance(args, slice):
            return slice(*(self._lookup(a, env) for a in (args.start, args.stop, args.step)))
        return args

    def _call(self, node: torch.fx.Node, env: dict[torch.fx.Node, Any], grad_enabled: bool) -> Iterator[Call]:
        if torch_adapter.target_name(node.target) in DROPPED:
            return
        args = self._lookup(node.args, env)
        kwargs = {key: self._lookup(arg, env) for key, arg in node.kwargs.items()}
        if node.target is operator.getitem:
            env[node] = args[0][args[1]]
            return
        if torch_adapter.higher_order_name(node.target):
            yield from self._inline(node, args, env, grad_enabled)
            return
        self._check(node)
        frames = source_frames(node.meta.get("stack_trace"))
        value = node.meta.get("val")
        num_outputs = len(value) if isinstance(value, tuple | list) else (-1 if value is not None else 0)
        call = Call(
            self._unique(node.name), node.target, args, kwargs, num_outputs, grad_enabled, self._scope(node), frames
        )
        refs = tuple(ValueRef(name) for name in call.outputs)
        env[node] = args[0] if call.target_name in (ENTER, LEAVE) else refs[0] if num_outputs == -1 else refs
        yield call

    def _inline(
        self, node: torch.fx.Node, args: tuple[Any, ...], env: dict[torch.fx.Node, Any], grad_enabled: bool
    ) -> list[Call]:
        kind = torch_adapter.higher_order_name(node.target)
        if kind == "wrap_with_set_grad_enabled":
            grad_enabled, inner, operands = bool(args[0]), args[1], args[2:]
        elif kind == "wrap_with_autocast" and not args[2]:
            inner, operands = args[4], args[5:]
        else:
            what = "torch.autocast in the model; build it in the wanted dtype instead" if "autocast" in kind else kind
            raise self._error(f"not supported: {what}", node)
        calls, output = self.flatten(inner, list(operands), grad_enabled)
        env[node] = output
        return calls

    def _check(self, node: torch.fx.Node) -> None:
        for value in torch_adapter.tree_leaves(node.meta.get("val")):
            sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
            if any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes):
                raise self._error("the result's shape or value depends on the data of a tensor", node)
        if not torch_adapter.is_op_overload(node.target):
            raise self._error("not a torch operator", node)

    def _error(self, problem: str, node: torch.fx.Node) -> CaptureError:
        """Names the node's line; a higher-order operator has none and takes the first one inside it."""
        inner = [arg for arg in node.args if isinstance(arg, torch.fx.Node) and arg.op == "get_attr"]
        graphs = [getattr(node.graph.owning_module, str(arg.target)).graph for arg in inner]
        nodes = [node, *(n for graph in graphs for n in graph.nodes)]
        traces = [n.meta["stack_trace"] for n in nodes if n.meta.get("stack_trace")]
        frames = list(source_frames(traces[0] if traces else None))
        return capture_error(problem, str(node.target), choose_frame(frames, self.user_file))

    def _unique(self, name: str) -> str:
        """`capture.expand.name_calls` gives the final names; until then a number keeps submodules' names apart."""
        self.num_calls += 1
        return f"{self.num_calls}/{name}"

    def _scope(self, node: torch.fx.Node) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        keys = list(stack.items())
        if not keys:
            return ""
        key, (path, _) = keys[-1]
        mark = "@" + key.rpartition("@")[2] if "@" in key and "@" not in path else ""
        prefix = self.scope_prefix
        if path == prefix.rstrip("."):
            return ""
        return str(path).removeprefix(prefix) + mark

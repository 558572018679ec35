"""Models of ten layers each, most of them out to deceive a capture that traces three layers and copies the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = 10
WIDTH = 4


class Layer(nn.Module):
    """Residual; subclasses change the inside."""

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.index = index
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.inner(x))


class Chain(nn.Module):
    """Layers of one class, one after the other."""

    def __init__(self, layer: Callable[[int], nn.Module] = Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(index) for index in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ReadsIndex(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.index != 4 else torch.sigmoid(x)


class ReadsIndexByTheBack(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if vars(self).get("index", 0) != 4 else torch.sigmoid(x)


class Counts(Layer):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Scales(Layer):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.scale = 1.0 + index / 8

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Alternates(Layer):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.window = 0 if index % 2 else 2

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.window else super().forward(x) * 0.5


class Normalises(Layer):
    """BatchNorm writes its buffers; dropout draws; the sum is in place."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.norm(self.inner(x)))
        y += x
        return y


class WritesArgument(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return super().forward(x)


class MakesConstant(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.tensor(2.0)


class Masked(Layer):
    mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.mask is None else super().forward(x) * self.mask


class DictChain(nn.Module):
    """Layers in a `ModuleDict`, as torchtitan has them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(index): Layer(index) for index in range(LAYERS)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


class Pair(Layer):
    """Takes and returns structures; one result is an argument."""

    def forward(self, x: Tensor, extra: dict[str, Any]) -> tuple[Tensor, None, dict[str, Any]]:
        return super().forward(x) * extra["factor"], None, extra


class FirstIsOther(Layer):
    """The first layer gets no bias and makes it, as in T5."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        made = x.detach() * 0.1 if bias is None else bias
        return super().forward(x) + made, made


class Tally:
    """State that all layers share."""

    count = 0


class CountsTogether(Chain):
    """The sixth call of any layer is different."""

    class Counting(Layer):
        def __init__(self, tally: Tally) -> None:
            super().__init__()
            self.tally = tally

        def forward(self, x: Tensor) -> Tensor:
            self.tally.count += 1
            return super().forward(x) if self.tally.count != 6 else torch.sigmoid(x)

    def __init__(self) -> None:
        tally = Tally()
        super().__init__(lambda _: self.Counting(tally))


class SkipsToTheEnd(Chain):
    def forward(self, x: Tensor) -> Tensor:
        first = x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(x)
        return x + first


class Collects(Chain):
    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return torch.stack(states).mean(0)


class KnowsItsLength(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / len(self.layers) if len(self.layers) > 8 else x


class ScalesByIndex(Chain):
    """Stochastic depth in expectation, by the model instead of the layer."""

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = x + (1 - index / 10) * layer(x) if index != 5 else layer(x)
        return x


class SetsMasks(Chain):
    def __init__(self) -> None:
        super().__init__(Masked)

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            layer.mask = x * index if index in (3, 4) else None
            x = layer(x)
            layer.mask = None
        return x


class SharesWeights(Chain):
    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers[1:]:
            layer.inner.weight = self.layers[0].inner.weight


class RegistersTwice(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.layers


class LooksInside(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.layers[4].inner.weight.sum()


class LooksInsideAndHidesIt(Chain):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x) + self.layers[4].inner.weight.sum()
        except RuntimeError:
            return super().forward(x)
        except Exception:
            return x


class CountsParameters(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / sum(1 for _ in self.parameters())


class CallsTwice(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class CallsBackwards(Chain):
    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = layer(x)
        return x


class SkipsOne(Chain):
    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.layers[:4], *self.layers[5:]]:
            x = layer(x)
        return x


class FreezesSome(Chain):
    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            with torch.set_grad_enabled(index not in (0, 1, 2)):
                x = layer(x)
        return x


class FrozenParameters(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.layers[4].requires_grad_(False)


class UnequalShapes(Chain):
    """Rows are dropped half-way, so that the later layers see other shapes."""

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x[1:] if index == 4 else x)
        return x


class PassesPairs(Chain):
    def __init__(self) -> None:
        super().__init__(Pair)

    def forward(self, x: Tensor) -> Tensor:
        extra: dict[str, Any] = {"factor": x.mean(), "name": "a"}
        for layer in self.layers:
            x, _, extra = layer(x, extra=extra)
        return x * extra["factor"]


class PassesBias(Chain):
    def __init__(self) -> None:
        super().__init__(FirstIsOther)

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for layer in self.layers:
            x, bias = layer(x, bias)
        return x


class PassesOneTensorTwice(Chain):
    """Layer 4 gets two tensors where the others get one twice."""

    class Two(Layer):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x) + y

    def __init__(self) -> None:
        super().__init__(self.Two)

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x, x.view_as(x) if index == 4 else x)
        return x


class FirstHalfThenRest(Chain):
    """Two lines of code call the layers, so that their ops have different sources."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:4]:
            x = layer(x)
        for layer in self.layers[4:]:
            x = layer(x)
        return x


Build = Callable[[], nn.Module]
SHORTENED: dict[str, Build] = {
    "chain": Chain,
    "sequential": lambda: nn.Sequential(*(Layer(i) for i in range(LAYERS))),
    "dict": DictChain,
    "alternates": lambda: Chain(Alternates),
    "normalises": lambda: Chain(Normalises),
    "writes argument": lambda: Chain(WritesArgument),
    "skips to the end": SkipsToTheEnd,
    "collects": Collects,
    "counts": lambda: Chain(Counts),
    "knows its length": KnowsItsLength,
    "scales by index": ScalesByIndex,
    "passes pairs": PassesPairs,
    "passes bias": PassesBias,
    "frozen parameters": FrozenParameters,
    "first half then rest": FirstHalfThenRest,
}
"""Models of which some layers are not traced."""

IN_FULL: dict[str, tuple[Build, str]] = {
    "reads index": (lambda: Chain(ReadsIndex), "ReadsIndex uses index"),
    "reads index by the back": (lambda: Chain(ReadsIndexByTheBack), "ReadsIndexByTheBack uses index"),
    "counts together": (CountsTogether, "changes attributes"),
    "makes constant": (lambda: Chain(MakesConstant), "neither its own nor an argument"),
    "sets masks": (SetsMasks, "changes attributes|does not compute"),
    "looks inside": (LooksInside, "looks into 1.layers.4"),
    "looks inside and hides it": (LooksInsideAndHidesIt, "looks into 1.layers.4"),
    "counts parameters": (CountsParameters, "looks into 1.layers.2"),
    "calls twice": (CallsTwice, "more than once"),
    "calls backwards": (CallsBackwards, "before the second"),
    "skips one": (SkipsOne, "is not called"),
    "freezes some": (FreezesSome, "other arguments"),
    "unequal shapes": (UnequalShapes, "other arguments"),
    "passes one tensor twice": (PassesOneTensorTwice, "in other places|other arguments"),
    "scales": (lambda: Chain(Scales), ""),
    "shares weights": (SharesWeights, ""),
    "registers twice": (RegistersTwice, ""),
}
"""Models that must be traced in full, and what the note says; "" where no layers look alike at all."""

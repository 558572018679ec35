"""From the calls of a shortened trace to those of the full one, and from fx's names to ours.

`expand` takes the markers of `capture.markers` out of the list and puts a renamed copy of the second layer's calls in
the place of each layer that was skipped. It is here that the calls are held against each other: those of the last
layer of each kind must be those of the second, and refer to nothing but the layer's arguments, its own parameters
and buffers, and each other.

`name_calls` numbers calls of one kind in their order (`linear`, `linear_1`, ...), whatever numbers fx gave out: a
shortened and a full trace of one model end in the same names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from autopar.capture.calls import Call, Frames, ValueRef, map_refs
from autopar.capture.markers import ENTER, LEAVE, MARKERS, SKIPPED
from autopar.capture.shorten import OWN_FILE, RefusedError, Shortened, Site

Rename = Callable[[ValueRef], ValueRef]
_NUMBER = re.compile(r"(_\d+)+$")


@dataclass(frozen=True)
class Owned:
    """Values of parameters and buffers: `fqn` by value name and back."""

    fqns: Mapping[str, str]

    @property
    def names(self) -> dict[str, str]:
        return {fqn: name for name, fqn in self.fqns.items()}


@dataclass(frozen=True)
class _Body:
    """The calls of one traced layer, with the values that it starts from and those that it returns."""

    site: Site
    inputs: tuple[str, ...]
    calls: tuple[Call, ...]
    outputs: tuple[str, ...]
    frames: Frames


def expand(
    calls: list[Call], results: Sequence[str], sites: Shortened, owned: Owned
) -> tuple[list[Call], tuple[str, ...]]:
    """Calls and results of the full trace. Raises RefusedError if the layers do not agree."""
    bodies = _bodies(calls, sites)
    models: dict[int, _Body] = {}
    for kind in sorted({site.kind for site in sites.sites}):
        model, check = bodies[sites.model_layer(kind)], bodies[sites.check_layer(kind)]
        if _normal_form(model, owned) != _normal_form(check, owned):
            raise RefusedError(f"{check.site.path} does not compute what {model.site.path} computes")
        models[kind] = model
    stands: dict[str, ValueRef] = {}

    def resolve(ref: ValueRef) -> ValueRef:
        return stands.get(ref.name, ref)

    names = owned.names
    full: list[Call] = []
    for call in calls:
        if call.target_name == SKIPPED:
            site = sites.sites[call.args[1]]
            arguments = tuple(resolve(ref).name for ref in call.args[0])
            copied, outputs = _copy(models[site.kind], site, arguments, call, names)
            full.extend(copied)
            stands.update(zip(call.outputs, outputs, strict=True))
        elif call.target_name not in MARKERS:
            full.append(_renamed(call, resolve))
    return full, tuple(resolve(ValueRef(name)).name for name in results)


def _renamed(call: Call, rename: Rename) -> Call:
    return replace(call, args=map_refs(rename, call.args), kwargs=map_refs(rename, call.kwargs))


def _bodies(calls: list[Call], sites: Shortened) -> dict[int, _Body]:
    """The traced layers by number."""
    found: dict[int, _Body] = {}
    entered: tuple[int, int] | None = None
    for position, call in enumerate(calls):
        if call.target_name == ENTER and entered is None:
            entered = call.args[1], position
        elif call.target_name in (ENTER, SKIPPED) and entered is not None:
            raise RefusedError(f"{sites.sites[entered[0]].path} calls another layer of its kind")
        elif call.target_name == LEAVE and entered is not None and entered[0] == call.args[1]:
            number, start = entered
            enter, inside = calls[start], tuple(calls[start + 1 : position])
            inputs, outputs = (tuple(ref.name for ref in marker.args[0]) for marker in (enter, call))
            found[number] = _Body(sites.sites[number], inputs, inside, outputs, _outer(enter.frames))
            entered = None
    expected = {number for number, site in enumerate(sites.sites) if site.is_traced}
    if found.keys() != expected:
        path = sites.sites[min(expected - found.keys())].path
        raise RefusedError(f"{path} takes no tensor, returns none, or nobody reads its result")
    return found


def _outer(frames: Frames) -> Frames:
    """The frames around the layer's call."""
    own = [index for index, (file, _) in enumerate(frames) if file == OWN_FILE]
    return frames[: own[0]] if own else frames


def _normal_form(body: _Body, owned: Owned) -> object:
    """Equal for two layers if and only if one is the other with its arguments and parameters exchanged."""
    stands = {name: ("made", i, j) for i, call in enumerate(body.calls) for j, name in enumerate(call.outputs)}
    stands |= {name: ("argument", body.inputs.index(name), 0) for name in body.inputs}

    def place(ref: ValueRef) -> object:
        if ref.name in stands:
            return stands[ref.name]
        fqn = owned.fqns.get(ref.name, "")
        if not fqn.startswith(f"{body.site.path}."):
            raise RefusedError(f"{body.site.path} reads {ref.name}, which is neither its own nor an argument")
        return ("own", fqn.removeprefix(body.site.path), 0)

    calls = [
        (
            call.target,
            repr(map_refs(place, call.args)),
            repr(map_refs(place, call.kwargs)),
            call.num_outputs,
            call.grad_enabled,
            _relative(call.scope, body.site),
            _inner(call.frames, body),
        )
        for call in body.calls
    ]
    equal_inputs = tuple(body.inputs.index(name) for name in body.inputs)
    return calls, equal_inputs, [place(ValueRef(name)) for name in body.outputs]


def _relative(scope: str, site: Site) -> str:
    """The part of a scope below the layer."""
    rest = scope.removeprefix(site.path)
    if rest == scope or rest[:1] not in ("", ".", "@"):
        raise RefusedError(f"{site.path} calls {scope or 'code'} from outside of it")
    return rest


def _inner(frames: Frames, body: _Body) -> Frames:
    if frames[: len(body.frames)] != body.frames:
        raise RefusedError(f"{body.site.path} is called from more than one place")
    return frames[len(body.frames) :]


def _copy(
    model: _Body, site: Site, arguments: tuple[str, ...], marker: Call, names: Mapping[str, str]
) -> tuple[list[Call], list[ValueRef]]:
    """The model layer's calls as those of `site`, called with `arguments`; and the values that it returns."""
    if tuple(map(model.inputs.index, model.inputs)) != tuple(map(arguments.index, arguments)):
        raise RefusedError(f"{site.path} gets one tensor in other places than {model.site.path}")
    stands = dict(zip(model.inputs, map(ValueRef, arguments), strict=True))
    outer = _outer(marker.frames)

    def rename(ref: ValueRef) -> ValueRef:
        return stands[ref.name]

    def call_name(call: Call) -> str:
        return f"{marker.name}/{call.name}"

    own = f"{model.site.path}."
    stands |= {
        name: ValueRef(names[f"{site.path}.{fqn.removeprefix(own)}"])
        for fqn, name in names.items()
        if fqn.startswith(own)
    }
    copies: list[Call] = []
    for call in model.calls:
        copied = replace(
            _renamed(call, rename),
            name=call_name(call),
            scope=site.path + _relative(call.scope, model.site),
            frames=outer + _inner(call.frames, model),
        )
        stands.update(zip(call.outputs, map(ValueRef, copied.outputs), strict=True))
        copies.append(copied)
    return copies, [rename(ValueRef(name)) for name in model.outputs]


def name_calls(calls: list[Call], results: Sequence[str], taken: Iterable[str]) -> tuple[list[Call], tuple[str, ...]]:
    """The calls with numbers in their order, and the results by their new names. `taken` are names of other values."""
    used = set(taken)
    counts: dict[str, int] = {}
    stands: dict[str, ValueRef] = {}
    named: list[Call] = []
    for call in calls:
        base = _NUMBER.sub("", call.name.rpartition("/")[2]) or call.name
        count = counts.get(base, 0)
        while (name := f"{base}_{count}" if count else base) in used:
            count += 1
        counts[base] = count + 1
        used.add(name)
        renamed = replace(_renamed(call, lambda ref: stands.get(ref.name, ref)), name=name)
        stands.update(zip(call.outputs, map(ValueRef, renamed.outputs), strict=True))
        named.append(renamed)
    return named, tuple(stands[name].name if name in stands else name for name in results)

"""Every error that autopar raises on purpose.

AutoparError                 exit code 1: our fault, unless a subclass says otherwise
├── InputError               exit 2: something the user gave is wrong (file, flag, batch, plan file)
│   ├── CaptureError         exit 2: the model cannot be traced; names the op and the line of the user's code
│   └── PlanMismatchError    exit 2: the plan belongs to another model, schema or cluster
├── InfeasibleError          exit 3: no plan satisfies the constraints; carries need, have and remedies
├── SolverLimitError         exit 1: a limit stopped the solver before any plan was found
├── VerifyError              exit 4: the distributed program disagrees with the serial model
├── ProfileError             exit 1: a measurement failed or cannot be trusted
├── RewriteError             exit 1: the plan cannot be turned into a program (a bug of ours)
└── WorkerError              exit 1: a process of a run died, hung or raised; names the rank
    ├── NetworkError         exit 1: ranks lost each other; names who waited, in which collective, and for whom
    └── StragglerError       exit 1: a rank makes the others wait, and the run is to go on without it
"""

from __future__ import annotations

from dataclasses import dataclass, field


class AutoparError(Exception):
    """Base of all deliberate errors. `kind` is for programs, the message for people."""

    kind = "internal"
    exit_code = 1


class InputError(AutoparError, ValueError):
    """Something the user gave is wrong."""

    kind = "input"
    exit_code = 2


class CaptureError(InputError):
    """The model cannot be traced."""

    kind = "capture"


class PlanMismatchError(InputError):
    """The plan file does not belong to this model, schema version or cluster."""

    kind = "plan-mismatch"


@dataclass(frozen=True)
class Remedy:
    """One computed way out of an infeasible problem: what to change and what it gives.

    Attributes:
        quantity, value: what is relaxed (a field of `Limits`, `memory_bytes` or `num_gpus`) and how far at least, where
            that is a number.
    """

    change: str
    effect: str
    quantity: str = ""
    value: float | None = None


@dataclass
class InfeasibleError(AutoparError):
    """No plan satisfies the constraints.

    Attributes:
        limit: what binds, e.g. "memory".
        need: what the least demanding plan needs, with its unit.
        have: what there is, with its unit.
        remedies: computed ways out, best first.
    """

    limit: str
    need: str
    have: str
    remedies: tuple[Remedy, ...] = field(default=())

    kind = "infeasible"
    exit_code = 3

    def __str__(self) -> str:
        verb = "bind" if " and " in self.limit else "binds"
        lines = [f"no plan fits: {self.limit} {verb}", f"  need  {self.need}", f"  have  {self.have}"]
        lines += [f"  {i}) {r.change}: {r.effect}" for i, r in enumerate(self.remedies, start=1)]
        return "\n".join(lines)


class SolverLimitError(AutoparError):
    """A limit stopped the solver before it found any plan."""

    kind = "solver-limit"


class VerifyError(AutoparError):
    """The distributed program disagrees with the serial model."""

    kind = "verify"
    exit_code = 4


class ProfileError(AutoparError):
    """A measurement failed or cannot be trusted."""

    kind = "profile"


class RewriteError(AutoparError):
    """A plan could not be turned into a program."""

    kind = "rewrite"


class WorkerError(AutoparError):
    """A worker process died, hung or raised.

    Attributes:
        rank: of the process, where one is known.
        is_lost: it is gone or silent, rather than that its code raised: another start may go well.
    """

    kind = "worker"
    is_lost = False

    def __init__(self, message: str = "", *, rank: int | None = None, is_lost: bool | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.is_lost = type(self).is_lost if is_lost is None else is_lost


class NetworkError(WorkerError):
    """Ranks lost each other, or never met.

    Attributes:
        rank: that the others have lost or wait for, where it is one.
        is_told: a process of this host has printed it, as each that a launcher started would.
    """

    kind = "network"
    is_lost = True
    is_told = False


class StragglerError(WorkerError):
    """A rank makes the others wait, and the run is to go on without it: its state is saved."""

    kind = "straggler"
    is_lost = True

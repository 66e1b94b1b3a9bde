"""The nouns of winnow: models, stages, probes, trials, objectives, and the errors that people see.

Imports neither torch nor transformers, so that `--help`, `--cfg job` and the search's own process stay quick.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from winnow.grammar import short

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from winnow.hardware.runtime import Served
    from winnow.hardware.work import Work
    from winnow.model.plan import Plan


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: shown as one line, exit code 2, nothing written."""


class MissingExtra(UserError):
    """An optional library is not installed; the message names the extra that brings it."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed; install it with: pip install 'winnow[{extra}]'")


class Unservable(UserError):
    """An artifact that its runtime cannot load, or that does not work when it is loaded."""


class Slot(enum.IntEnum):
    """The places of a pipeline, in the order in which stages must come."""

    PRUNE = 0
    RECOVER = 1
    QUANTIZE = 2
    ADAPT = 3
    CACHE = 4
    PROMPT = 5


@dataclass(frozen=True)
class Loading:
    """How weights come into memory."""

    dtype: str = "auto"
    attention: str = "auto"  # sdpa where the architecture knows it, else eager
    device: str = "cpu"
    trust_remote_code: bool = False
    allow_pickle: bool = False

    @property
    def attn_implementation(self) -> str | None:
        """As transformers is told; None leaves the choice to it."""
        return None if self.attention == "auto" else self.attention


class LM:
    """A causal language model in memory, on disk, or both; either is made from the other on first use.

    Attributes:
        path: the folder or hub id it was loaded from or saved to; None for a model that only exists in memory.
        manifest: where it comes from; written beside the weights when it is saved.
        served: the runtime that has it open, for as long as one has (`winnow.hardware.runtime.serving`).
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        manifest: Mapping[str, Any] | None = None,
        loading: Loading | None = None,
        name: str = "",
    ) -> None:
        if path is None and model is None:
            raise ValueError("an LM needs a path or a model")
        self.path = str(path) if path is not None else None
        self.manifest: dict[str, Any] = dict(manifest or {})
        self.loading = loading or Loading()
        self.name = name or (Path(self.path).name if self.path else "model")
        self.final = False  # True: `path` holds the very files to save
        self.served: Served | None = None
        self._model = model
        self._tokenizer = tokenizer

    @property
    def model(self) -> PreTrainedModel:
        if self._model is None:
            from winnow.model.load import load_model

            assert self.path is not None
            self._model = load_model(self.path, self.loading)
        return self._model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            from winnow.model.load import load_tokenizer

            assert self.path is not None
            self._tokenizer = load_tokenizer(self.path, self.loading)
        return self._tokenizer

    def sha256(self) -> str | None:
        """What the model is known by: of all its files, as they are now; a hub model's commit; None for one in memory only."""
        from winnow.model.load import identity

        return identity(self.path, self.loading) if self.path else None

    def compute_in(self, dtype: str) -> None:
        """Lets the weights come into memory in `dtype`, unless they are there already or `model.dtype` names a type."""
        if self._model is None and self.loading.dtype == "auto":
            self.loading = dataclasses.replace(self.loading, dtype=dtype)

    def release(self) -> None:
        """Lets go of the model in memory; it is read from `path` again when it is next asked for."""
        if self.path is not None:
            self._model = None

    def changed(self, model: PreTrainedModel) -> LM:
        """The same lineage with other weights in memory, not on disk yet."""
        return LM(model=model, tokenizer=self.tokenizer, manifest=self.manifest, loading=self.loading, name=self.name)

    def stored(self, folder: str | Path) -> LM:
        """The same lineage with its weights as files in `folder`, in the form in which they will be saved."""
        tokenizer, manifest = self.tokenizer, self.manifest
        lm = LM(folder, tokenizer=tokenizer, manifest=manifest, loading=self.loading, name=self.name)
        lm.final = True
        return lm


def check_seed(seed: int) -> None:
    """Raises UserError for a seed that the random generators of some library do not take."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} is out of range; give a whole number from 0 to {2**32 - 1:,}")


@dataclass(frozen=True)
class Run:
    """What a stage or a probe may use besides the model."""

    folder: Path  # scratch space and checkpoints; exists
    seed: int = 0
    device: str = "cpu"
    dtype: str = "auto"  # that is computed in; auto: what the device computes fastest
    log: Callable[[str], None] = print
    calibration: Calibration = field(default_factory=lambda: Calibration())
    base: str | None = None  # the folder or hub id of the model that the first stage was given
    devices: int = 1  # processes that a training is spread over, one a device
    memory_limit_bytes: int | None = None  # of each device; None: all that it has
    parallel: str = "auto"  # how devices share a training: ddp, fsdp, or auto, fsdp where one cannot hold the model
    tflops: float | None = None  # of one device, for forecasts of time; None: a processor is measured
    carbon_g_per_kwh: float = 475.0
    cache: Path | None = None  # what outlives a run: a teacher's targets, batch sizes; None: the run's own folder
    stage_cache_bytes: int = 0  # of `cache`, for what the first stages of pipelines made; 0: none of it is kept
    bars: bool = True  # whether to draw progress bars in a terminal
    curve: Callable[[int, Mapping[str, float]], None] = lambda step, figures: None  # a point of a training's curves

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def compute_dtype(self) -> str:
        """The type that is computed in, by torch's name."""
        from winnow.hardware.compute import fastest

        return fastest(self.device) if self.dtype == "auto" else self.dtype


@dataclass(frozen=True)
class Document:
    """A text to train on: the loss is on the completion, and on all of a document without a prompt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A conversation to train on: the loss is on what the assistant says."""

    messages: tuple[Mapping[str, str], ...]  # role and content of each


@dataclass(frozen=True)
class Calibration:
    """Text that methods calibrate on and recover with: a training split, never a benchmark's test items.

    `winnow.recovery.corpus` says which sources there are.
    """

    source: str = "nano"
    samples: int = 128
    max_length: int = 512
    split: str = "train"  # of a data set of the hub
    subset: str | None = None  # of a data set of the hub: its configuration
    data_dir: str | None = None  # where the files of a benchmark lie
    streaming: bool = False  # a data set of the hub: only what is read, every time; else all of it, once


@runtime_checkable
class Stage(Protocol):
    """A compression method: a frozen dataclass of knobs."""

    slot: ClassVar[Slot]

    def __call__(self, lm: LM, run: Run) -> LM: ...

    def check(self, plan: Plan, base: LM, run: Run) -> None: ...

    def predict(self, plan: Plan) -> Plan: ...

    def work(self, plan: Plan, calibration: Calibration) -> Work: ...


@runtime_checkable
class Probe(Protocol):
    """A benchmark or a meter: what it finds, as figures by name."""

    def __call__(self, lm: LM, run: Run) -> dict[str, float]: ...


class Benchmark(Probe, Protocol):
    """A probe whose figures are scores of items."""

    def scores(self) -> tuple[str, ...]:
        """The names of those in which more is better."""

    def __call__(self, lm: LM, run: Run, watch: Callable[[Sequence[Any], int], None] | None = None) -> Figures:
        """`watch` is shown all outcomes so far and how many are to come, from time to time; what it raises ends the scoring."""


DISTURBED = "disturbed"  # ends the source of a figure that was measured beside other work: `measured, disturbed`


class Figures(dict[str, float]):
    """What a probe found, by name; `sources` says of each where it came from, `measured` unless named otherwise."""

    def __init__(self, values: Mapping[str, float] | None = None, sources: Mapping[str, str] | None = None) -> None:
        super().__init__(values or {})
        self.sources: dict[str, str] = dict.fromkeys(self, "measured") | dict(sources or {})

    def disturbed(self) -> Figures:
        """The same figures, with sources that say that something disturbed their measurement."""
        return Figures(self, {name: f"{source}, {DISTURBED}" for name, source in self.sources.items()})

    def merge(self, other: Mapping[str, float]) -> None:
        self.update(other)
        self.sources |= getattr(other, "sources", dict.fromkeys(other, "measured"))


@dataclass(frozen=True)
class Objective:
    """A figure to optimise; the study keeps them as a vector, never as a weighted sum."""

    name: str
    maximize: bool
    unit: str = ""
    resolution: float = 0.0  # relative difference below which two values count as equal on the front

    @property
    def direction(self) -> str:
        return "maximize" if self.maximize else "minimize"


@dataclass(frozen=True)
class Strategy:
    """Methods in order, and their knobs as `method.<name>.<knob>: value`: nothing but a list of Hydra overrides."""

    methods: tuple[str, ...] = ()
    knobs: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def overrides(self) -> tuple[str, ...]:
        knobs = (f"{key}={short(value)}" for key, value in sorted(self.knobs.items()))
        return (f"method=[{','.join(self.methods)}]", *knobs)

    def __str__(self) -> str:
        """Short, for tables: `wanda(sparsity=0.5) + rtn(bits=4, group_size=64)`; `base` without methods."""
        parts = []
        for method in self.methods:
            prefix = f"method.{method}."
            knobs = [f"{k.removeprefix(prefix)}={_short(v)}" for k, v in self.knobs.items() if k.startswith(prefix)]
            parts.append(f"{method}({', '.join(knobs)})" if knobs else method)
        return " + ".join(parts) or "base"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Reason(enum.StrEnum):
    """Why a trial failed."""

    INVALID = "invalid"  # the settings were refused
    INFEASIBLE = "infeasible"  # known from the configuration: it does not fit the hardware, or breaks a constraint
    MISSING = "missing_dependency"
    OUT_OF_MEMORY = "out_of_memory"
    TIMEOUT = "timeout"
    CRASHED = "crashed"  # the process died
    ERROR = "error"  # an exception
    UNSERVABLE = "unservable"  # the artifact does not load, or does not work
    NOT_FINITE = "not_finite"  # an objective is NaN or infinite
    DISK_FULL = "disk_full"
    LOST = "lost"  # the search itself was killed while the trial ran
    HOPELESS = "hopeless"  # stopped: far off the base model, where one that is no worse elsewhere is near it
    DOMINATED = "dominated"  # stopped: by the items scored so far another is better, with confidence


STOPPED = (Reason.HOPELESS, Reason.DOMINATED)


class Stopped(Exception):
    """An evaluation was ended before its end, because more of it would not put the candidate on the front.

    Attributes:
        estimates: what was found by then: of each score its estimate, `<name>_low` and `<name>_high`, and `share_scored`.
    """

    def __init__(self, reason: Reason, message: str, estimates: Mapping[str, float]) -> None:
        super().__init__(message)
        self.reason, self.message, self.estimates = reason, message, dict(estimates)

    def to_json(self) -> dict[str, Any]:
        return {"reason": self.reason.value, "message": self.message, "estimates": self.estimates}


@dataclass(frozen=True)
class Trial:
    """A finished trial. One that is not complete has a reason; a stopped one keeps the figures found until then.

    Attributes:
        estimates: of a stopped trial: its scores so far, each with `<name>_low` and `<name>_high`, and `share_scored`.
        seconds: compress, evaluate and their parts, overhead, total.
        energy: `wh` and `co2_g` of the whole trial.
        stages: of each, `method`, `seconds`, and whether an earlier trial had made it (`reused`).
        commands: the compress.py and evaluate.py lines that make it again.
        decision: why it was proposed, and what retraces that.
    """

    number: int
    strategy: Strategy
    figures: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    reason: Reason | None = None
    message: str = ""
    estimates: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    energy: Mapping[str, float] = field(default_factory=dict)
    stages: Sequence[Mapping[str, Any]] = ()
    commands: tuple[str, ...] = ()
    proposed_by: str = ""
    decision: Mapping[str, Any] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return self.reason is None

    def disturbed(self, name: str) -> bool:
        """Whether something disturbed the measurement of this figure: no decision may rest on it."""
        return self.sources.get(name, "").endswith(DISTURBED)

    @property
    def stopped(self) -> bool:
        """Ended early because it could not reach the front: neither complete nor failed."""
        return self.reason in STOPPED

    @property
    def failed(self) -> bool:
        return not (self.complete or self.stopped)


@dataclass(frozen=True)
class Summary:
    """A study as its views see it (`front.json`, `report.html`, W&B): rebuilt from the study at any time."""

    name: str
    fingerprint: Mapping[str, Any]
    objectives: tuple[Objective, ...]
    trials: tuple[Trial, ...]  # finished ones, by number; trial 0 is the base model
    front: tuple[int, ...]  # numbers of the non-dominated complete trials
    hypervolume: tuple[float, ...]  # after each of `trials`, relative to the reference point
    confirmed: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # scores on items the search did not use
    unconfirmed: Mapping[int, str] = field(default_factory=dict)  # why some of the front have none
    energy: Mapping[str, float] = field(
        default_factory=dict
    )  # `wh` and `co2_g` of all that was done; else that of the trials

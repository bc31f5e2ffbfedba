"""Which engine runs on a device, and of MNN which component where and how precisely, with a reason each.

Data, not a fall-back: it is decided before anything runs, from one saved diagnosis, and told.
"""

import importlib.util
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from sa3_convert.bundle.reader import Bundle
from sa3_convert.components import Component
from sa3_convert.errors import BackendError, UsageError
from sa3_convert.lab.doctor.results import BAD, CONVERSION_SETTING, Diagnosis, described, setting_name
from sa3_convert.mnn.compatibility import require_backend
from sa3_convert.runtime.engines import ENGINE_OPTIONS, KINDS, Backend, EngineName, Level, kinds_of, without_slots
from sa3_convert.system.machine import integer_products

_LOW_PRECISION_PROBE = "softmax-low-precision"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a component runs, and why."""

    component: Component
    backend: Backend
    reason: str
    precision: Level


def engine_for(
    bundle: Bundle,
    backend: Backend = "cpu",
    options: Collection[str] = (),
    *,
    checkpoint: bool = False,
    before: str | None = None,
    adapters: bool = False,
) -> tuple[EngineName, str]:
    """Return the engine that runs a bundle fastest on a device, and why this one.

    Args:
        bundle: an open one.
        backend: the device.
        options: names of the settings that the engine has to have.
        checkpoint: whether there is one for torch.
        before: what made the audio that is to be made again: that engine is taken where it is.
        adapters: whether there are some, so that its models have to take them.

    Raises:
        BundleError: no engine's models take adapters.
        BackendError: none runs on the device; it says why of each.

    """
    kinds, settings = bundle.model_kinds, " and ".join(sorted(options))
    engines: tuple[EngineName, ...] = get_args(EngineName)
    able = [name for name in engines if set(options) <= set(ENGINE_OPTIONS[name])]
    there = [n for n in able if (kinds_of(n, adapters=adapters) <= kinds if n in KINDS else checkpoint)]
    if again := [name for name in there if name == before]:
        return again[0], "it made what is made again"
    if not able:
        raise UsageError(f"No engine has all of these settings: {settings}.")
    if len(able) == 1:
        return able[0], f"only it has the setting {settings}"
    if adapters and not there:
        raise without_slots(bundle)
    if adapters and "mnn" not in there:
        return there[0], "the models of mnn take no adapters here"
    if backend not in ("cpu", "cuda"):
        return "mnn", "no other runs there"
    if backend == "cuda":
        chosen, why = _for_cuda(there, checkpoint=checkpoint)
    else:
        chosen, why = _for_cpu(able, there, settings, adapters=adapters)
    return chosen, f"{why}, and its models take adapters" if adapters else why


def _for_cpu(able: Collection[str], there: Collection[str], settings: str, *, adapters: bool) -> tuple[EngineName, str]:
    """Return what is faster on this processor: ONNX Runtime in integers, or MNN."""
    instruction = integer_products()
    if instruction is None:
        return "mnn", "no instruction is known that makes onnxruntime-int8 faster on this processor"
    if "onnxruntime-int8" not in able:
        return "mnn", f"onnxruntime-int8, which is faster here, has no setting {settings}"
    if "onnxruntime-int8" not in there:
        what, how = (" that take adapters", " --adapter-slots") if adapters else ("", "")
        return (
            "mnn",
            f"no models of onnxruntime-int8{what}, which is faster here, are there; convert --with-ort-int8{how}",
        )
    if importlib.util.find_spec("onnxruntime") is None:
        return "mnn", "onnxruntime, which is faster here, is not installed"
    return "onnxruntime-int8", f"this processor multiplies 8-bit integers ({instruction})"


def _for_cuda(there: Collection[EngineName], *, checkpoint: bool) -> tuple[EngineName, str]:
    """Return the engine that has CUDA here, asked in the order of what is best proven."""
    try:
        require_backend("cuda")
        return "mnn", "this MNN has CUDA"
    except BackendError as error:
        problems = [str(error)]
    forms: tuple[EngineName, ...] = ("onnxruntime-fp16", "onnxruntime")
    form = next((name for name in forms if name in there), None)
    problem = onnxruntime_problem() if form else "The bundle has no ONNX; `convert --with-onnx fp16` makes some."
    if form and problem is None:
        return form, "this MNN has no CUDA, this ONNX Runtime has"
    problems += [problem or "", torch_problem() or ("" if checkpoint else "torch runs with --checkpoint DIR alone.")]
    if not problems[-1]:
        return "torch", f"neither MNN nor ONNX Runtime has CUDA ({problem})"
    raise BackendError(f"No engine runs on CUDA here. {' '.join(filter(None, problems))} Or use --device cpu.")


def onnxruntime_problem() -> str | None:
    """Return why ONNX Runtime cannot use CUDA, or None."""
    try:
        from sa3_convert.ort import cuda_problem
    except ImportError:
        return "ONNX Runtime is not installed."
    return cuda_problem()


def torch_problem() -> str | None:
    """Return why torch cannot use CUDA, or None."""
    try:
        import torch
    except ImportError:
        return "torch is not installed."
    return None if torch.cuda.is_available() else f"torch {torch.__version__} finds no CUDA device."


def placement(
    backend: Backend,
    diagnosis: Diagnosis | None,
    *,
    precision: Level = "high",
    memory: Level = "normal",
    overrides: Mapping[Component, Backend] | None = None,
    components: Iterable[Component] = tuple(Component),
    split: bool = False,
) -> tuple[Place, ...]:
    """Place each component on the backend that was asked for, unless a probe of it failed at this precision and memory.

    Without a diagnosis nothing was probed; what the user places in `overrides` is not questioned, except for memory low
    on a GPU, which is refused until its probes are right. Precision low is refused on CUDA, where Softmax is not known
    to be right with it. On the CPU normal takes the place of low where a probe failed, and what is wrong with that too
    is refused; the usual setting, by which conversions verify, is not questioned. `split` says that the DiT is run in
    parts.
    """
    given = overrides or {}
    setting = setting_name(precision, memory)
    places = []
    for component in components:
        where = given.get(component, backend)
        if memory == "low" and where != "cpu":
            _refuse_low_memory(component, where, diagnosis, setting)
        if component in given:
            places.append(Place(component, given[component], "placed with --place", precision))
        elif backend == "cpu":
            parted = split and component is Component.DIT
            places.append(_on_cpu(component, diagnosis, precision, memory, split=parted))
        else:
            _refuse_low_precision(backend, precision, diagnosis, setting)
            places.append(_probed(component, backend, diagnosis, precision, memory))
    return tuple(places)


def _on_cpu(
    component: Component, diagnosis: Diagnosis | None, precision: Level, memory: Level, *, split: bool
) -> Place:
    setting = setting_name(precision, memory)
    if diagnosis is None or setting == CONVERSION_SETTING:
        return Place(component, "cpu", "asked for", precision)
    failing = diagnosis.failing(component, setting, split=split)
    if not failing:
        return Place(component, "cpu", "its probes are right", precision)
    if precision == "low" and not diagnosis.failing(component, setting_name("normal", memory), split=split):
        return Place(component, "cpu", f"at precision normal: {described(failing, setting)}", "normal")
    raise UsageError(
        f"With {setting}, MNN {diagnosis.mnn} is wrong here on what {component.value} is made of: "
        f"{described(failing, setting)}. Leave --precision and --memory away."
    )


def _probed(
    component: Component, backend: Backend, diagnosis: Diagnosis | None, precision: Level, memory: Level
) -> Place:
    if diagnosis is None:
        return Place(component, backend, f"not probed; run `sa3-convert doctor --backend {backend}`", precision)
    setting = setting_name(precision, memory)
    if failing := diagnosis.failing(component, setting):
        return Place(component, "cpu", described(failing, setting), precision)
    fallen = [r.probe for r in diagnosis.results if component in r.needed_by and r.at(setting).outcome == "cpu"]
    reason = f"right, but partly on the CPU: {', '.join(fallen)}" if fallen else "its probes are right"
    return Place(component, backend, reason, precision)


def _refuse_low_precision(backend: Backend, precision: Level, diagnosis: Diagnosis | None, setting: str) -> None:
    if backend != "cuda" or precision != "low":
        return
    probe = None if diagnosis is None else diagnosis.result(_LOW_PRECISION_PROBE)
    if probe is None or probe.at(setting).outcome in BAD:
        raise UsageError(
            "From MNN 3.6.0 on, Softmax on CUDA reads half buffers as float with --precision low. Use normal or high, "
            "or show with `sa3-convert doctor --backend cuda` that this build does not."
        )


def _refuse_low_memory(component: Component, backend: Backend, diagnosis: Diagnosis | None, setting: str) -> None:
    known = diagnosis if diagnosis is not None and diagnosis.backend == backend else None
    failing = () if known is None else known.failing(component, setting)
    if known is None or failing:
        found = "it was not probed" if known is None else described(failing, setting)
        raise UsageError(
            f"--memory low on {backend} is not known to be right for {component.value}: {found}. MNN 3.5.0 to 3.6.1 "
            "read memory there that nothing has filled. Leave --memory away, or show with "
            f"`sa3-convert doctor --backend {backend}` that this build does not."
        )


def parse_places(texts: Sequence[str]) -> dict[Component, Backend]:
    """Read `--place COMPONENT=BACKEND` options."""
    backends: dict[str, Backend] = {"cpu": "cpu", "cuda": "cuda", "opencl": "opencl", "vulkan": "vulkan"}
    found: dict[Component, Backend] = {}
    for text in texts:
        name, _, backend = text.partition("=")
        if name not in {c.value for c in Component} or backend not in backends:
            raise UsageError(
                f"--place {text!r} is no placement; write COMPONENT=BACKEND, such as text_encoder=cpu. Components: "
                f"{', '.join(c.value for c in Component)}; backends: {', '.join(backends)}."
            )
        if Component(name) in found:
            raise UsageError(f"--place names {name} twice.")
        found[Component(name)] = backends[backend]
    return found

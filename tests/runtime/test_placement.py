"""Which component runs where, and why."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from sa3_convert.components import Component
from sa3_convert.errors import BackendError, BundleError, UsageError
from sa3_convert.lab.doctor.results import Answer, Diagnosis, Outcome, ProbeResult, setting_name
from sa3_convert.runtime import placement as module
from sa3_convert.runtime.placement import (
    Place,
    engine_for,
    onnxruntime_problem,
    parse_places,
    placement,
    torch_problem,
)

HIGH, LOW = setting_name("high", "normal"), setting_name("low", "normal")
TEXT, DIT = Component.TEXT_ENCODER, Component.DIT


def diagnosis(high: Outcome, low: Outcome = "works", softmax: Outcome = "works") -> Diagnosis:
    inputs = ProbeResult("int32-inputs", "a", {HIGH: Answer(high, 3.2), LOW: Answer(low)}, needed_by=(TEXT,))
    hazard = ProbeResult("int32-abs", "b", {HIGH: Answer("wrong", 0.0)}, hazard="integer-unary")
    half = ProbeResult("softmax-low-precision", "c", {LOW: Answer(softmax)}, hazard="softmax-low-precision")
    return Diagnosis("3.6.1", "cuda", "m", (inputs, hazard, half))


def placed(*places: Place) -> dict[Component, tuple[str, str]]:
    return {place.component: (place.backend, place.reason) for place in places}


def test_the_cpu_needs_no_probe() -> None:
    assert placed(*placement("cpu", None, components=(TEXT,))) == {TEXT: ("cpu", "asked for")}


def on_the_cpu(low: Outcome, normal: Outcome = "works", memory: Outcome = "works") -> Diagnosis:
    answers = {LOW: Answer(low, 1.8), setting_name("normal", "normal"): Answer(normal), HIGH: Answer("wrong", 2.0)}
    phases = ProbeResult("fourier-features", "a", answers, needed_by=(DIT,), ahead=True)
    linear = ProbeResult("linear", "b", {LOW: Answer("works"), HIGH: Answer("works")}, needed_by=(TEXT, DIT))
    stored = {LOW: Answer("works"), setting_name("high", "low"): Answer(memory, 9.0)}
    return Diagnosis("3.6.1", "cpu", "m", (phases, linear, ProbeResult("int8", "c", stored, needed_by=(TEXT,))))


def test_on_the_cpu_normal_takes_the_place_of_low_where_a_probe_failed() -> None:
    places = placement("cpu", on_the_cpu("wrong"), precision="low", components=(TEXT, DIT))
    assert [place.precision for place in places] == ["low", "normal"]
    assert places[1].reason == "at precision normal: probe fourier-features wrong (2 dB)"
    places = placement("cpu", on_the_cpu("works"), precision="low", components=(TEXT, DIT))
    assert [place.precision for place in places] == ["low", "low"]
    assert [place.precision for place in placement("cpu", None, precision="low")] == ["low"] * len(Component)


def test_a_dit_in_parts_has_its_phases_where_low_does_not_reach() -> None:
    (place,) = placement("cpu", on_the_cpu("wrong"), precision="low", components=(DIT,), split=True)
    assert place.precision == "low"


@pytest.mark.parametrize(
    ("found", "setting", "component"),
    [
        (on_the_cpu("wrong", normal="wrong"), {"precision": "low"}, DIT),
        (on_the_cpu("works", memory="wrong"), {"memory": "low"}, TEXT),
    ],
)
def test_what_is_wrong_on_the_cpu_as_it_is_asked_for_is_refused(
    found: Diagnosis, setting: dict[str, str], component: Component
) -> None:
    with pytest.raises(UsageError, match=f"{component.value} is made of: probe .* wrong.*Leave --precision and"):
        placement("cpu", found, components=(component,), **setting)  # type: ignore[arg-type]


def test_the_usual_setting_of_the_cpu_is_not_questioned() -> None:
    assert placed(*placement("cpu", on_the_cpu("wrong"), components=(DIT,))) == {DIT: ("cpu", "asked for")}


def test_without_a_diagnosis_the_request_counts_and_the_reason_says_so() -> None:
    backend, reason = placed(*placement("cuda", None, components=(DIT,)))[DIT]
    assert backend == "cuda"
    assert "not probed" in reason
    assert "doctor --backend cuda" in reason


def test_a_failed_probe_moves_the_components_that_need_it_and_no_others() -> None:
    found = placed(*placement("cuda", diagnosis("wrong"), components=(TEXT, DIT)))
    assert found == {TEXT: ("cpu", "probe int32-inputs wrong (3 dB)"), DIT: ("cuda", "its probes are right")}


def test_a_probe_counts_at_the_setting_that_is_used() -> None:
    assert placement("cuda", diagnosis("works", "wrong"), components=(TEXT,))[0].backend == "cuda"
    low = placement("cuda", diagnosis("works", "wrong"), precision="low", components=(TEXT,))
    assert low[0].backend == "cpu"


def test_a_hazard_that_no_graph_contains_moves_nothing() -> None:
    assert {place.backend for place in placement("cuda", diagnosis("works"))} == {"cuda"}


def test_an_operator_on_the_cpu_is_told() -> None:
    assert "partly on the CPU: int32-inputs" in placement("cuda", diagnosis("cpu"), components=(TEXT,))[0].reason


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_the_user_has_the_last_word(backend: str) -> None:
    found = placement("cuda", diagnosis("wrong"), overrides={TEXT: backend}, components=(TEXT,))  # type: ignore[dict-item]
    assert placed(*found) == {TEXT: (backend, "placed with --place")}


@pytest.mark.parametrize("known", [None, diagnosis("works", softmax="wrong")])
def test_precision_low_on_cuda_is_refused_unless_its_probe_is_right(known: Diagnosis | None) -> None:
    with pytest.raises(UsageError, match="half buffers"):
        placement("cuda", known, precision="low", components=(DIT,))
    assert placement("cuda", diagnosis("works"), precision="low", components=(DIT,))[0].backend == "cuda"


LOW_MEMORY = setting_name("high", "low")


def stored(outcome: Outcome, backend: str = "cuda") -> Diagnosis:
    probe = ProbeResult("linear-int8", "a", {HIGH: Answer("works"), LOW_MEMORY: Answer(outcome, 2.0)}, needed_by=(DIT,))
    return Diagnosis("3.6.1", backend, "m", (probe,))


@pytest.mark.parametrize(
    ("known", "said"),
    [
        (None, "not probed"),
        (stored("works", "vulkan"), "not probed"),
        (stored("wrong"), r"linear-int8 wrong \(2 dB\)"),
        (stored("fails"), "linear-int8 fails"),
    ],
)
@pytest.mark.parametrize("asked", ["device", "place"])
def test_memory_low_on_a_gpu_is_refused_unless_its_probes_are_right(
    known: Diagnosis | None, said: str, asked: str
) -> None:
    backend, places = ("cuda", {}) if asked == "device" else ("cpu", {DIT: "cuda"})
    with pytest.raises(UsageError, match=f"--memory low on cuda.*dit: .*{said}.*doctor --backend cuda"):
        placement(backend, known, memory="low", overrides=places, components=(DIT,))  # type: ignore[arg-type]


def test_memory_low_on_a_gpu_whose_probes_are_right_is_given() -> None:
    (place,) = placement("cuda", stored("works"), memory="low", components=(DIT,))
    assert (place.backend, place.reason) == ("cuda", "its probes are right")


def test_placements_are_read() -> None:
    assert parse_places(["text_encoder=cpu", "dit=cuda"]) == {TEXT: "cpu", DIT: "cuda"}


@pytest.mark.parametrize(
    "text", ["text_encoder", "text_encoder=", "=cpu", "piano=cpu", "dit=abacus", "dit=cpu=cuda", ""]
)
def test_what_is_no_placement_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="COMPONENT=BACKEND"):
        parse_places([text])


def test_a_component_is_placed_once() -> None:
    with pytest.raises(UsageError, match="twice"):
        parse_places(["dit=cpu", "dit=cuda"])


def with_kinds(*kinds: str) -> Any:
    """Return all that is asked of a bundle: which kinds of models it has."""
    return SimpleNamespace(model_kinds=set(kinds), path="BUNDLE")


ALL = ("mnn", "onnx", "onnx-int8")
ON_CPU = [
    # The processor's instruction; kinds of files; settings; what made it before; what is chosen, and why.
    ("avx512_vnni", ALL, (), None, "onnxruntime-int8", "avx512_vnni"),
    (None, ALL, (), None, "mnn", "no instruction"),
    ("avx512_vnni", ("mnn", "onnx"), (), None, "mnn", "--with-ort-int8"),
    ("avx512_vnni", ALL, ("memory",), None, "mnn", "memory"),
    ("avx512_vnni", ALL, ("split", "precision"), None, "mnn", "precision and split"),
    ("avx512_vnni", ALL, ("precision",), None, "mnn", "has no setting precision"),
    ("avx512_vnni", ALL, ("checkpoint",), None, "torch", "checkpoint"),
    ("avx512_vnni", ALL, (), "mnn", "mnn", "made again"),
    (None, ALL, (), "onnxruntime-int8", "onnxruntime-int8", "made again"),
    (None, ("mnn",), (), "onnxruntime-int8", "mnn", "no instruction"),
    ("avx512_vnni", ALL, (), "abacus", "onnxruntime-int8", "avx512_vnni"),
]


@pytest.mark.parametrize(("instruction", "kinds", "settings", "before", "chosen", "why"), ON_CPU)
def test_the_engine_of_a_processor_follows_from_facts(
    instruction: str | None,
    kinds: tuple[str, ...],
    settings: tuple[str, ...],
    before: str | None,
    chosen: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "integer_products", lambda: instruction)
    name, reason = engine_for(with_kinds(*kinds), "cpu", settings, before=before)
    assert name == chosen
    assert why in reason


WITH_ADAPTERS = [
    # The processor's instruction; kinds of models with slots; what made it before; what is chosen, and why.
    (
        "avx512_vnni",
        ("mnn", "onnx", "onnx-int8"),
        None,
        "onnxruntime-int8",
        "avx512_vnni), and its models take adapters",
    ),
    ("avx512_vnni", ("mnn", "onnx"), None, "mnn", "convert --with-ort-int8 --adapter-slots, and its models"),
    (None, ("mnn", "onnx", "onnx-int8"), None, "mnn", "and its models take adapters"),
    ("avx512_vnni", ("onnx",), None, "onnxruntime", "mnn take no adapters"),
    ("avx512_vnni", ("mnn",), "onnxruntime-int8", "mnn", "its models take adapters"),
    ("avx512_vnni", ("mnn", "onnx-int8"), "mnn", "mnn", "made again"),
]


@pytest.mark.parametrize(("instruction", "slotted", "before", "chosen", "why"), WITH_ADAPTERS)
def test_with_adapters_an_engine_is_chosen_whose_models_take_them(
    instruction: str | None,
    slotted: tuple[str, ...],
    before: str | None,
    chosen: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "integer_products", lambda: instruction)
    bundle = with_kinds(*ALL, *(f"{kind}-slots" for kind in slotted))
    name, reason = engine_for(bundle, before=before, adapters=True)
    assert name == chosen
    assert why in reason


def test_where_no_models_take_adapters_none_is_chosen() -> None:
    with pytest.raises(
        BundleError, match=r"BUNDLE has no models that take adapters\. Convert again with --adapter-slots"
    ):
        engine_for(with_kinds(*ALL), adapters=True)


def test_what_is_not_installed_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "integer_products", lambda: "i8mm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    name, reason = engine_for(with_kinds(*ALL))
    assert (name, "not installed" in reason) == ("mnn", True)


def test_settings_of_two_engines_have_none() -> None:
    with pytest.raises(UsageError, match="memory and padding"):
        engine_for(with_kinds(*ALL), "cpu", ("memory", "padding"))


CHOICES = [
    # MNN, ONNX Runtime, torch: what each lacks; kinds of files; a checkpoint; what is chosen.
    (None, None, None, ("mnn", "onnx-fp16"), True, "mnn"),
    ("x", None, None, ("mnn", "onnx", "onnx-fp16"), True, "onnxruntime-fp16"),
    ("x", None, None, ("mnn", "onnx"), True, "onnxruntime"),
    ("x", None, None, ("mnn",), True, "torch"),
    ("x", "y", None, ("mnn", "onnx"), True, "torch"),
    ("x", "y", None, ("mnn", "onnx"), False, None),
    ("x", "y", "z", ("mnn", "onnx"), True, None),
]


@pytest.mark.parametrize(("mnn", "ort", "torch", "kinds", "checkpoint", "chosen"), CHOICES)
def test_the_engine_of_a_device_is_the_first_that_is_there(
    mnn: str | None,
    ort: str | None,
    torch: str | None,
    kinds: tuple[str, ...],
    checkpoint: bool,
    chosen: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def require(backend: str) -> None:
        assert backend == "cuda"
        if mnn is not None:
            raise BackendError(mnn)

    monkeypatch.setattr(module, "require_backend", require)
    monkeypatch.setattr(module, "onnxruntime_problem", lambda: ort)
    monkeypatch.setattr(module, "torch_problem", lambda: torch)
    bundle = with_kinds(*kinds)
    if chosen is not None:
        assert engine_for(bundle, "cuda", checkpoint=checkpoint)[0] == chosen
        return
    with pytest.raises(BackendError) as caught:
        engine_for(bundle, "cuda", checkpoint=checkpoint)
    assert all(problem in str(caught.value) for problem in ("x", "y", torch or "--checkpoint"))


def test_what_cannot_be_imported_is_a_problem_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "sa3_convert.ort", None)
    assert torch_problem() == "torch is not installed."
    assert onnxruntime_problem() == "ONNX Runtime is not installed."

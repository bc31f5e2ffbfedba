"""What `contract.json` says is what the models are, and a client that has nothing else makes the pipeline's samples."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.config import read_layout
from sa3_convert.checkpoint.dimensions import FluxShift, FullShift, LogSnrShift, NoShift, Shift
from sa3_convert.checkpoint.published import model_config, text_encoder_config
from sa3_convert.checkpoint.variants import VARIANTS
from sa3_convert.components import Component
from sa3_convert.components import contract as ports_of
from sa3_convert.mnn.session import MnnSession
from sa3_convert.publish.contract import contract_of, golden_of
from sa3_convert.publish.export import export_bundles
from sa3_convert.runtime.conditioning import lengths
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest
from sa3_convert.runtime.sampling import sigmas
from sa3_convert.runtime.token_table import _prompts, tabulated
from tests.checkpoint.test_layout import write_configs
from tests.runtime.test_token_table import FORMS
from tests.runtime.test_token_table import encoder as tokenizer_of

EXAMPLES = Path(__file__).parents[2] / "examples"
STEP = 2.0**-15
"""Of 16 bits."""
# Noise, sigmas and chunks are the same up to float32's last bits, which eight steps make a little larger.
CLOSE = 2.0**-14
PROMPT = "warm analog pad"


@pytest.fixture(scope="module", params=["hub", "flat"])
def folder(toy_int8: Bundle, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    out = tmp_path_factory.mktemp("published") / "out"
    export_bundles([toy_int8], out, request.param, golden=golden_of)
    return Bundle.open(out).path


@pytest.fixture(scope="module")
def contract(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "contract.json").read_text(encoding="utf-8"))
    return data


def file_of(folder: Path, contract: dict[str, Any], component: str) -> Path:
    path: Path = folder / contract["base"] / contract["components"][component]["file"]
    return path


def test_it_says_which_components_are_right_at_precision_low(toy_int8: Bundle, contract: dict[str, Any]) -> None:
    for name, said in contract["components"].items():
        artifact = toy_int8.artifact(Component(name))
        assert (said["lowest_precision"], said["half_db"]) == (artifact.lowest_precision, artifact.half_db)
    low = [name for name, said in contract["components"].items() if said["lowest_precision"] == "low"]
    assert low == ["text_encoder", "decoder", "encoder"]


def test_its_inputs_are_those_that_the_files_declare(folder: Path, contract: dict[str, Any]) -> None:
    assert list(contract["components"]) == ["text_encoder", "number_conditioner", "dit", "decoder", "encoder"]
    for component, said in contract["components"].items():
        with MnnSession(file_of(folder, contract, component), threads=1) as session:
            declared = {name: (str(port.dtype), port.shape) for name, port in session.inputs.items()}
            assert list(session.outputs) == [port["name"] for port in said["outputs"]]
        shapes = {p["name"]: tuple(d if isinstance(d, int) else -1 for d in p["shape"]) for p in said["inputs"]}
        types = {p["name"]: p["type"] for p in said["inputs"]}
        assert declared == {name: (types[name], shapes[name]) for name in shapes}
        assert all(port["meaning"] for port in said["inputs"] + said["outputs"])


def golden(folder: Path, contract: dict[str, Any]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    data = json.loads((folder / contract["golden"]).read_text())
    arrays = {
        name: np.fromfile(folder / "golden" / f"{name}.bin", entry["type"]).reshape(entry["shape"])
        for name, entry in data["arrays"].items()
    }
    return data, arrays


def test_golden_inputs_give_golden_outputs(folder: Path, contract: dict[str, Any]) -> None:
    _, arrays = golden(folder, contract)
    for component in ("text_encoder", "number_conditioner", "dit"):
        said = contract["components"][component]
        feeds = {port["name"]: arrays[f"{component}.{port['name']}"] for port in said["inputs"]}
        with MnnSession(file_of(folder, contract, component), threads=1) as session:
            results = session.run(feeds)
        for name, array in results.items():
            np.testing.assert_allclose(array, arrays[f"{component}.{name}"], atol=1e-5, strict=True)


def client() -> Callable[..., NDArray[np.float32]]:
    spec = importlib.util.spec_from_file_location("client", EXAMPLES / "client.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    generate: Callable[..., NDArray[np.float32]] = module.generate
    return generate


@pytest.mark.parametrize(("seconds", "seed"), [(0.37, 7), (13.0, 1 << 33 | 5)])
def test_the_python_client_makes_the_samples_of_the_pipeline(folder: Path, seconds: float, seed: int) -> None:
    with Pipeline.from_bundle(folder) as pipeline:
        expected = pipeline.generate(GenerateRequest(PROMPT, seconds=seconds, seed=seed, peak="clip")).audio
        tokens = pipeline.tokens(PROMPT)
    made = client()(folder, tokens.ids[tokens.mask == 1].tolist(), seconds, seed)
    np.testing.assert_allclose(made, expected, atol=CLOSE, strict=True)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("shift", [NoShift(), LogSnrShift(rate=0.5), FluxShift(), FullShift()])
def test_another_shift_is_told_with_its_formula_and_no_numbers_of_the_usual_one(toy_int8: Bundle, shift: Shift) -> None:
    layout = replace(toy_int8.manifest.layout, sampling_shift=shift)
    schedule = contract_of(toy_int8.manifest.model_copy(update={"layout": layout}))["schedule"]
    assert schedule["shift"] == shift.model_dump()
    assert "logsnr_at_0" not in schedule
    assert all(re.search(rf"\b{name}\b", schedule["sigmas"]) for name in schedule["shift"] if name != "type")


def test_the_python_client_needs_mnn_and_numpy_alone() -> None:
    imported = re.findall(r"^(?:import|from) (\w+)", (EXAMPLES / "client.py").read_text(), re.MULTILINE)
    assert set(imported) == {"argparse", "itertools", "json", "math", "wave", "pathlib", "MNN", "numpy"}


def test_the_constants_of_the_cpp_client_are_those_of_the_contract(contract: dict[str, Any]) -> None:
    source = (EXAMPLES / "client.cpp").read_text()
    found = {name: float(value) for name, value in re.findall(r"(k[A-Z]\w+) = ([\d.]+)f?[,;]", source)}
    lengths, schedule = contract["lengths"], contract["schedule"]
    chunks = contract["autoencoder"]["chunks"]["decoder"]
    assert found == {
        "kSampleRate": lengths["sample_rate"],
        "kSamplesPerLatent": lengths["samples_per_latent"],
        "kAlign": lengths["align"],
        "kMaxSamples": lengths["max_samples"],
        "kPaddingSeconds": lengths["padding_seconds"],
        "kSteps": schedule["steps"],
        "kLogsnrAt0": schedule["logsnr_at_0"],
        "kLogsnrSpan": schedule["logsnr_span"],
        "kContextLeft": chunks["context_left"],
        "kContextRight": chunks["context_right"],
        "kAtMost": chunks["at_most"],
    }


ENCODER = """
#include "token_table.hpp"
#include <iostream>
int main(int, char** given) {
    const TokenTable table(given[1]);
    for (std::string prompt; std::getline(std::cin, prompt, '\\0');) {
        for (const int id : table.encode(prompt)) std::cout << id << ' ';
        std::cout << '\\n';
    }
}
"""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that reads prompts, each with a zero behind it, and says their ids."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "encoder.cpp").write_text(ENCODER)
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{EXAMPLES}", str(folder / "encoder.cpp")]
    subprocess.run([*command, "-o", str(folder / "encoder")], check=True, timeout=120)
    return folder / "encoder"


@pytest.mark.parametrize("form", FORMS)
def test_the_cpp_clients_token_ids_are_those_of_the_pipeline(encoder: Path, form: str, tmp_path: Path) -> None:
    table = tabulated(FORMS[form], tokenizer_of(FORMS[form]), (1, 0), (0,))
    (tmp_path / "tokenizer.table").write_bytes(table.to_bytes())
    tried = [*_prompts([*json.loads(FORMS[form])["model"]["vocab"], *table.added])]
    prompts = [prompt for prompt in tried if "\0" not in prompt]
    given = "".join(f"{prompt}\0" for prompt in prompts).encode()
    command = [str(encoder), str(tmp_path / "tokenizer.table")]
    done = subprocess.run(command, input=given, capture_output=True, check=True, timeout=60)
    found = [[int(word) for word in line.split()] for line in done.stdout.decode().splitlines()]
    assert found == [[1, 0, *table.encode(prompt), 0] for prompt in prompts]


@pytest.mark.parametrize("cut", [0, 10, -1])
def test_the_cpp_client_refuses_a_damaged_table(encoder: Path, cut: int, tmp_path: Path) -> None:
    whole = tabulated(FORMS["toy"], tokenizer_of(FORMS["toy"]), (), ()).to_bytes()
    (tmp_path / "tokenizer.table").write_bytes(whole[:cut])
    done = subprocess.run(
        [str(encoder), str(tmp_path / "tokenizer.table")], input=b"", capture_output=True, check=False
    )
    assert done.returncode != 0
    assert b"table" in done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ client, linked to MNN's library or to the one in its wheel, which is the same code."""
    compiler, home = shutil.which("c++"), os.environ.get("MNN_HOME")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    if home is None or not (Path(home) / "include" / "MNN" / "Interpreter.hpp").is_file():
        pytest.skip("MNN_HOME names no folder with MNN's include/MNN")
    if (Path(home) / "lib" / "libMNN.so").is_file():
        library = ["-L", f"{home}/lib", "-lMNN", f"-Wl,-rpath,{home}/lib"]
    else:
        if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
            pytest.skip("MNN_HOME has no lib/libMNN.so, and the library in MNN's wheel needs a shared libpython")
        wheel = importlib.util.find_spec("_mnncengine")
        assert wheel is not None
        assert wheel.origin is not None
        python = sysconfig.get_config_var("LIBDIR")
        library = [wheel.origin, "-Wl,--no-as-needed", "-Wl,--allow-shlib-undefined", f"-L{python}"]
        library += [f"-lpython{sysconfig.get_python_version()}", f"-Wl,-rpath,{python}:{Path(wheel.origin).parent}"]
    built = tmp_path_factory.mktemp("client") / "client"
    command = [compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", str(EXAMPLES / "client.cpp")]
    done = subprocess.run(
        [*command, f"-I{home}/include", *library, "-o", str(built)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return built


@pytest.mark.parametrize("seconds", [0.37, 13.0])
def test_the_cpp_client_makes_the_samples_of_the_pipeline(
    program: Path, folder: Path, contract: dict[str, Any], tmp_path: Path, seconds: float
) -> None:
    with Pipeline.from_bundle(folder) as pipeline:
        expected = pipeline.generate(GenerateRequest(PROMPT, seconds=seconds, seed=7, peak="clip")).audio
        tokens = pipeline.tokens(PROMPT)
    models = [str(file_of(folder, contract, c)) for c in ("text_encoder", "number_conditioner", "dit", "decoder")]
    ids = ",".join(map(str, tokens.ids[tokens.mask == 1].tolist()))
    table = str(folder / contract["base"] / contract["files"]["token_table"])
    wav = tmp_path / "out.wav"
    for words in ([ids, str(seconds), "7"], [table, str(seconds), "7", PROMPT]):
        done = subprocess.run([str(program), *models, str(wav), *words], check=False, timeout=60)
        assert done.returncode == 0
        made, rate = soundfile.read(wav, dtype="int16")
        assert rate == 44100
        np.testing.assert_allclose(made.T / 32767, expected, atol=CLOSE + STEP)


def test_true_sizes_have_no_golden_results(toy_int8: Bundle) -> None:
    auto = toy_int8.layout.autoencoder
    deeper = replace(auto, decoder=replace(auto.decoder, depth=auto.decoder.depth + 1))
    larger = toy_int8.manifest.model_copy(update={"layout": replace(toy_int8.layout, autoencoder=deeper)})
    assert golden_of(Bundle(toy_int8.path, larger)) == {}


def test_the_numbers_of_the_guide_for_apps_are_those_that_are_computed_with(tmp_path: Path) -> None:
    text = (EXAMPLES.parent / "docs" / "integrate.md").read_text(encoding="utf-8")
    flow = " ".join(text.split("## The flow, with its numbers")[1].split("\n## ")[0].split())
    variant = VARIANTS["small-music"]
    layout = read_layout(write_configs(tmp_path, model_config(variant, "full"), text_encoder_config(variant, "full")))
    found = lengths(layout, 10)
    assert f"`samples` = int(10 · 44100) = {found.samples}. " in flow
    assert f"is {found.latents - 1}, and to a multiple of 2: {found.latents};" in flow
    assert f"at most {layout.sample_size} / 4096 = {layout.sample_size // 4096}. " in flow
    assert f"= {found.valid}. " in flow
    assert f" {', '.join(f'{sigma:.6g}' for sigma in sigmas(8))}. " in flow
    for component in (Component.TEXT_ENCODER, Component.NUMBER_CONDITIONER, Component.DIT):
        for port in ports_of(component, layout).inputs + ports_of(component, layout).outputs:
            shape = str(["T" if not isinstance(d, int) else d for d in port.shape]).replace("'", "")
            assert shape in flow or port.name == "t", (component, port.name)

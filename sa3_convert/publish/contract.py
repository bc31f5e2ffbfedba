"""`contract.json`: all that an app has to know to run a bundle, as numbers and short sentences; of a toy, results too.

What is stated as a number is what the pipeline here computes with. A sentence says what a number cannot.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from numpy.typing import NDArray

from sa3_convert.arrays import Arrays, Session, free
from sa3_convert.bundle.manifest import SLOTS_OF, Artifact, Manifest
from sa3_convert.bundle.reader import Bundle
from sa3_convert.checkpoint.dimensions import CheckpointLayout, LogSnrShift, Shift
from sa3_convert.checkpoint.variants import defaults_of, size_of
from sa3_convert.components import SPECS, Component, Port, contract, slots
from sa3_convert.mnn.compatibility import OLDEST_KNOWN, version_numbers
from sa3_convert.runtime.autoencode import WINDOW, Reach
from sa3_convert.runtime.conditioning import PADDING_SECONDS, alignment
from sa3_convert.runtime.engines import Engine, OnHost, bundle_engine
from sa3_convert.runtime.noise import TorchGenerator
from sa3_convert.runtime.pipeline import Pipeline
from sa3_convert.runtime.request import GenerateRequest

CONTRACT: Final = "contract.json"
_GOLDEN: Final = "golden"
_MEANINGS: Final[Mapping[str, str]] = {
    "input_ids": "token ids of the prompt as tokenizer.json gives them, special ones too, cut to this length, 0 behind",
    "attention_mask": "1 at tokens, 0 behind them",
    "last_hidden_state": "embedding; where the mask is 0 it is the learned padding, which the model puts there itself",
    "seconds": "duration of the wanted audio, clamped and normalised inside",
    "embedding": "embedding of the duration",
    "x": "noised latents",
    "t": "time: the sigma of the step, 1 is noise, 0 is audio",
    "cross_attn_cond": "last_hidden_state, then embedding, joined along the tokens",
    "global_embed": "embedding without its middle dimension",
    "local_add_cond": "inpainting: mask (1 keeps, 0 generates), then mask · latents of what is kept; else all zeros",
    "padding_mask": "1 at the first `valid` latents, 0 at the padding behind them; attention does not see the latter",
    "adapter_inner": "zeros without adapters; for each layer at inner · (1 + rank): a factor less one for each input, "
    "then Aᵀ [fan_in, rank]",
    "adapter_outer": "zeros without adapters; for each layer at outer · (1 + rank): a factor less one for each output, "
    "then Bᵀ [rank, fan_out]; the layer computes output factors · W · (input factors · x) + B · A · x + bias",
    "out": "velocity v; x − t · v is the denoised estimate",
    "latents": "latents as the DiT makes them",
    "audio": "samples, left and right, within about ±1: clip them",
    "patched_audio": "audio folded: row c · patch + i of column p is sample p · patch + i of channel c",
    "encoder_latent": "before the bottleneck",
}


def contract_of(manifest: Manifest, golden: bool = False) -> dict[str, Any]:
    """Return the contract of a bundle as its manifest describes it, file names included."""
    layout = manifest.layout
    models = {a.component: a for a in manifest.artifacts if a.kind == "mnn" and a.component is not None}
    files: dict[str, str] = {a.kind: a.path for a in manifest.artifacts if a.kind in ("tokenizer", "bottleneck_params")}
    tables = [a.table.path for a in manifest.artifacts if a.table is not None]
    files |= {"token_table": tables[0]} if tables else {}
    components = {component.value: _model(artifact, layout) for component, artifact in models.items()}
    slotted = [a for a in manifest.artifacts if a.kind == SLOTS_OF["mnn"]]
    return {
        "schema": 1,
        "variant": manifest.variant,
        "recipe": manifest.recipe,
        "least_mnn": least_mnn(manifest),
        "base": manifest.base,
        "files": files,
        "components": components,
        **({"adapters": _adapters(slotted, layout)} if slotted else {}),
        **({} if layout.dit is None else _generation(layout)),
        "autoencoder": _autoencoder(layout),
        "golden": f"{_GOLDEN}/{_GOLDEN}.json" if golden else None,
    }


def _model(artifact: Artifact, layout: CheckpointLayout) -> dict[str, Any]:
    assert artifact.component is not None
    ports = contract(artifact.component, layout, artifact.rank)
    return {
        "file": artifact.path,
        "sha256": artifact.sha256,
        "weights": artifact.companion and {"file": artifact.companion.path, "sha256": artifact.companion.sha256},
        "stored_as": artifact.precision,
        "lowest_precision": artifact.lowest_precision,
        "half_db": artifact.half_db,
        "inputs": [_port(port) for port in ports.inputs],
        "outputs": [_port(port) for port in ports.outputs],
    }


_FILES: Final[Mapping[str, str]] = {
    "tensors": "of a published file: prefix + layer + .parametrizations.weight.0. + factor; lora_config in its header "
    "is JSON with rank, alpha, adapter_type",
    "filters": "include and exclude of lora_config, lists of texts where they are there: a layer is changed if prefix "
    "+ layer contains one of include, or there is none, and none of exclude; [2-5] in a text stands for each of 2 to 5",
    "lora": "A = lora_A [rank, fan_in], B = strength · alpha / rank · lora_B [fan_out, rank], factors 1; with "
    "use_rslora of lora_config alpha / √rank",
    "several": "with the adapters before it W' = diag(output factors) · W · diag(input factors) + B · A, the next one "
    "adds its columns to B and its rows to A; a rank above that of the slots has to be compressed to it",
    "dora-rows": "then f = magnitude / (norms of the rows of W' + 1e-12) multiplies output factors and rows of B",
    "dora-cols": "then f = magnitude / (norms of the columns of W' + 1e-12) multiplies input factors and columns of A",
    "bora": "as dora-rows with magnitude_r, then as dora-cols with magnitude_c, of norms taken anew",
    "inputs": "float32, zeros wherever no adapter changes a layer and at ranks that are not used; they can be others "
    "in every step",
}


def _adapters(slotted: Iterable[Artifact], layout: CheckpointLayout) -> dict[str, Any]:
    """Return the models that take adapters, where each layer's numbers go, and how they follow from a file's."""
    models: dict[str, Any] = {}
    for artifact in slotted:
        assert artifact.component is not None
        layers = [asdict(slot) for slot in slots(artifact.component, layout)]
        # Of a checkpoint's tensor a published file leaves the first word away.
        prefix = SPECS[artifact.component].weights[0].partition(".")[2]
        own = {"rank": artifact.rank, "prefix": prefix, "layers": layers}
        models[artifact.component.value] = _model(artifact, layout) | own
    return {"models": models, "files": dict(_FILES)}


def least_mnn(manifest: Manifest) -> str:
    """Return the oldest version of MNN that reads all of a bundle's models."""
    return max((a.target_mnn or OLDEST_KNOWN for a in manifest.artifacts), key=version_numbers, default=OLDEST_KNOWN)


def _port(port: Port) -> dict[str, Any]:
    shape = [d if isinstance(d, int) else "T" if d.factor == 1 else f"{d.factor}*T" for d in port.shape]
    return {"name": port.name, "type": port.dtype, "shape": shape, "meaning": _MEANINGS[port.name]}


def _generation(layout: CheckpointLayout) -> dict[str, Any]:
    defaults = defaults_of(layout)
    return {
        "lengths": {
            "sample_rate": layout.sample_rate,
            "samples_per_latent": layout.autoencoder.downsampling_ratio,
            "padding_seconds": PADDING_SECONDS,
            "align": alignment(layout),
            "max_samples": layout.sample_size,
            "samples": "int(seconds · sample_rate); of the audio that long is kept",
            "T": "int((seconds + padding_seconds) · sample_rate) / samples_per_latent rounded up, and that to a "
            "multiple of align; at most max_samples / samples_per_latent",
            "valid": "samples / samples_per_latent rounded up + "
            "int(padding_seconds · sample_rate / samples_per_latent); at most T",
        },
        "schedule": {
            "steps": defaults.steps,
            **_shift(layout.sampling_shift),
            "sigma_max": "1, or with given audio the noise level: "
            "start = (1 − sigma_max) · latents + sigma_max · noise",
        },
        "sampler": {
            "name": defaults.sampler,
            "guidance": defaults.guidance,
            "pingpong": "x = (1 − next) · (x − sigma · v) + next · noise, anew in every step, the last too",
            "euler": "x = x + (next − sigma) · v",
        },
        "noise": {
            "generator": "MT19937, seeded with the low 32 bits of the seed as its authors do (init_genrand)",
            "uniform": "low 24 bits of a draw · 2^-24, float32",
            "normal": "in blocks of 16 uniforms: sqrt(-2 · log(1 − u[i])) times cos and sin of 2π · u[i + 8] are "
            "numbers i and i + 8; a last block that is not full is drawn anew for the last 16 numbers",
            "order": "[1, C, T] for the start, then as the sampler asks",
        },
    }


_LINEAR = "of u = linspace(sigma_max, 0, steps + 1): {}, in float32; the first is sigma_max itself, the last 0"
_LENGTH = "samples / samples_per_latent rounded up"
_CLAMPED = f"n = {_LENGTH}, at least min_length, at most max_length"
_SIGMAS: Final[Mapping[str, str]] = {
    "none": "u",
    "logsnr": "1 / (1 + exp(logsnr_end − (logsnr_end − start) · u)), start = anchor_logsnr − rate · "
    f"log2(n / anchor_length), n = {_LENGTH}",
    "flux": "a · u / (1 + (a − 1) · u), a = alpha_min · (alpha_max / alpha_min)^(log(n / min_length) / "
    f"log(max_length / min_length)), {_CLAMPED}",
    "full": "s = 1 − w / (w + 1 / (1 − u) − 1), w = exp(−(base_shift + (max_shift − base_shift) · (n − min_length) / "
    f"(max_length − min_length))), {_CLAMPED}; with use_sine sin(s · π / 2)",
}


def _shift(shift: Shift) -> dict[str, Any]:
    """Return how noise levels follow from equal steps, with the numbers of it."""
    if isinstance(shift, LogSnrShift) and shift.rate == 0:
        numbers: dict[str, Any] = {
            "logsnr_at_0": shift.logsnr_end,
            "logsnr_span": shift.logsnr_end - shift.anchor_logsnr,
        }
        return numbers | {"sigmas": _LINEAR.format("1 / (1 + exp(logsnr_at_0 − logsnr_span · u))")}
    return {"shift": shift.model_dump(), "sigmas": _LINEAR.format(_SIGMAS[shift.type])}


def _autoencoder(layout: CheckpointLayout) -> dict[str, Any]:
    auto = layout.autoencoder
    reaches = {"decoder": Reach.of_decoder(auto.decoder), "encoder": Reach.of_encoder(auto.encoder)}
    return {
        "channels": auto.audio_channels,
        "patch_size": auto.patch_size,
        "latent_dim": auto.latent_dim,
        "chunks": {
            half: {"align": reach.align, "context_left": reach.left, "context_right": reach.right, "at_most": WINDOW}
            for half, reach in reaches.items()
        },
        "chunking": "runs on chunks that start and end at multiples of `align` latents are one run over all if each "
        "has so much context on both sides, whose output is dropped; an odd end is padded with zeros",
        "bottleneck": "encode: (encoder_latent · scaling_factor + bias) / running_std; decoding has it inside",
    }


def golden_of(bundle: Bundle) -> dict[str, bytes]:
    """Return one generation of a toy, file by file: what each model gets first and gives, the noise, the samples.

    Arrays are little-endian, row by row; `golden.json` has their shapes. Of a bundle of true size, or one that cannot
    generate, there is none.
    """
    whole = set(bundle.components) >= {c for c in Component if c is not Component.ENCODER}
    if not whole or size_of(bundle.layout) != "toy":
        return {}
    recorder = _Recorder(bundle_engine(bundle, "mnn", {"threads": 1}), {})
    with Pipeline.of(bundle, recorder) as pipeline:
        request = GenerateRequest("warm analog pad", seconds=0.5, seed=7, peak="clip")
        made = pipeline.generate(request)
        tokens = pipeline.tokens(request.prompt)
    report = made.report
    steps = report.request.steps or 0
    noise = TorchGenerator(request.seed)
    shape = report.latents.shape
    arrays: dict[str, NDArray[Any]] = {f"noise.{i}": noise.randn(shape) for i in range(steps + 1)}
    arrays |= recorder.recorded | {"samples": made.audio}
    data = {
        "prompt": request.prompt,
        "ids": tokens.ids[tokens.mask == 1].tolist(),
        "seconds": request.seconds,
        "seed": request.seed,
        "steps": steps,
        "arrays": {name: {"type": str(array.dtype), "shape": array.shape} for name, array in arrays.items()},
    }
    files = {f"{_GOLDEN}/{name}.bin": array.tobytes() for name, array in arrays.items()}
    return files | {f"{_GOLDEN}/{_GOLDEN}.json": (json.dumps(data, indent=2) + "\n").encode()}


@dataclass(frozen=True)
class _Recorder(OnHost):
    """An engine whose models note what they got and gave when they ran first; of the decoder what it got."""

    engine: Engine
    recorded: dict[str, NDArray[Any]]

    @property
    def name(self) -> Any:
        return self.engine.name

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.engine.settings

    def load(self, component: Component) -> Session:
        return _RecordedSession(self.engine.load(component), component, self.recorded)


@dataclass(frozen=True)
class _RecordedSession:
    session: Session
    component: Component
    recorded: dict[str, NDArray[Any]]

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        results = self.session.run(feeds)
        outputs = {} if self.component is Component.DECODER else results
        for name, array in {**feeds, **outputs}.items():
            self.recorded.setdefault(f"{self.component.value}.{name}", array.copy())
        return results

    def close(self) -> None:
        free(self.session)

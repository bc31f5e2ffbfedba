import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from sa3_convert.checkpoint.reader import Checkpoint
from sa3_convert.checkpoint.synthetic import synthesize
from sa3_convert.checkpoint.variants import VARIANTS
from sa3_convert.components import Component, components_of
from sa3_convert.errors import UsageError
from sa3_convert.system.files import sha256_file

PARTS = list(Component)


def hashes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_opens_as_what_it_was_made(name: str, tmp_path: Path) -> None:
    synthesize(tmp_path / name, name)
    checkpoint = Checkpoint.open(tmp_path / name)
    assert checkpoint.variant == VARIANTS[name]
    for component in components_of(checkpoint.layout):
        checkpoint.check_values(component)


def test_a_toy_is_a_few_megabytes_in_the_published_layout(small_toy: Path) -> None:
    assert sorted(hashes(small_toy)) == [
        "model.safetensors",
        "model_config.json",
        "source.json",
        "t5gemma-b-b-ul2/config.json",
        "t5gemma-b-b-ul2/model.safetensors",
        "t5gemma-b-b-ul2/tokenizer.json",
        "t5gemma-b-b-ul2/tokenizer_config.json",
    ]
    assert sum(p.stat().st_size for p in small_toy.rglob("*")) < 12_000_000


@pytest.mark.parametrize("weights", ["gaussian", "heavy-tailed"])
def test_the_same_seed_gives_the_same_bytes(weights: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        synthesize(tmp_path / name, "medium", "toy", 3, weights)  # type: ignore[arg-type]
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_it_says_that_its_weights_are_random(small_toy: Path) -> None:
    assert Checkpoint.open(small_toy).source.synthetic


def test_another_seed_gives_other_weights_and_the_same_configuration(small_toy: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "other", "small-music", seed=1)
    ours, theirs = hashes(small_toy), hashes(tmp_path / "other")
    assert {name for name in ours if ours[name] != theirs[name]} == {
        "model.safetensors",
        "t5gemma-b-b-ul2/model.safetensors",
    }


def test_one_seed_shares_what_the_published_variants_share(small_toy: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "sfx", "small-sfx")
    music, sfx = Checkpoint.open(small_toy), Checkpoint.open(tmp_path / "sfx")
    same = {part for part in PARTS if music.digest(part) == sfx.digest(part)}
    # The text encoders differ in their learned padding alone, as the published ones do.
    assert same == {Component.DECODER, Component.ENCODER}
    t5gemma = "t5gemma-b-b-ul2/model.safetensors"
    assert hashes(small_toy)[t5gemma] == hashes(tmp_path / "sfx")[t5gemma]


def test_an_autoencoder_alone_is_that_of_the_whole_checkpoint(small_toy: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "same-s", "same-s")
    alone, whole = Checkpoint.open(tmp_path / "same-s"), Checkpoint.open(small_toy)
    for part in (Component.DECODER, Component.ENCODER):
        assert alone.digest(part) == whole.digest(part)


def test_values_do_not_depend_on_the_size_of_the_pieces(
    small_toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sa3_convert.checkpoint.synthetic.PIECE_ELEMENTS", 1000)
    synthesize(tmp_path / "pieces", "small-music")
    assert hashes(tmp_path / "pieces") == hashes(small_toy)


def test_values_have_the_agreed_statistics(small_toy: Path) -> None:
    tensors = load_file(small_toy / "model.safetensors")
    frequencies = tensors["model.model.transformer.rotary_pos_emb.inv_freq"]
    np.testing.assert_allclose(frequencies, 10000.0 ** -(np.arange(16) / 16), rtol=1e-6)
    assert tensors["pretransform.model.bottleneck.noise_scaling_factor"].shape == (1, 0, 1)
    assert tensors["pretransform.model.bottleneck.running_std"].tolist() == [np.float32(0.83)]
    deviations = {
        "model.model.transformer.layers.0.self_attn.to_qkv.weight": 128**-0.5,
        "pretransform.model.decoder.layers.3.mapping.weight_v": (128 * 3) ** -0.5,
        "model.model.transformer.layers.0.to_scale_shift_gate": 0.1,
        "model.model.transformer.layers.0.ff.ff.0.proj.bias": 0.1,
        "pretransform.model.decoder.layers.3.transformers.0.pre_norm.beta": 0.1,
        "model.model.transformer.memory_tokens": 0.5,
        "pretransform.model.encoder.layers.0.new_tokens": 0.3,
    }
    for name, deviation in deviations.items():
        # Five times the standard error of a deviation.
        assert tensors[name].std() == pytest.approx(deviation, rel=5 / (2 * tensors[name].size) ** 0.5), name


@pytest.mark.parametrize(
    ("ending", "low", "high"), [("norm.alpha", 0.5, 1), ("weight_g", 0.5, 1.5), ("scaling_factor", 0.5, 1.5)]
)
def test_gains_fill_their_interval(small_toy: Path, ending: str, low: float, high: float) -> None:
    tensors = load_file(small_toy / "model.safetensors")
    values = np.concatenate([tensors[name].ravel() for name in tensors if name.endswith(ending)])
    assert low <= values.min() < low + 0.2 * (high - low)
    assert high - 0.2 * (high - low) < values.max() <= high


def test_norm_scales_are_about_one(small_toy: Path) -> None:
    tensors = load_file(small_toy / "model.safetensors")
    gamma = np.concatenate([tensors[name] for name in tensors if name.endswith("norm.gamma")])
    assert gamma.mean() == pytest.approx(1, abs=0.02)
    assert gamma.std() == pytest.approx(0.2, rel=0.1)


def test_the_text_encoder_has_the_agreed_statistics(small_toy: Path) -> None:
    tensors = load_file(small_toy / "t5gemma-b-b-ul2" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    norms = np.concatenate([tensors[name].astype(np.float32) for name in tensors if "norm" in name])
    embedding = tensors["model.encoder.embed_tokens.weight"].astype(np.float32)
    # 0.05 at the published width of 768; times √width it is the same everywhere.
    assert embedding.std() * embedding.shape[1] ** 0.5 == pytest.approx(0.05 * 768**0.5, rel=0.02)
    assert norms.std() == pytest.approx(0.1, rel=0.05)
    assert abs(norms.mean()) < 0.01


def test_the_tokenizer_stays_within_the_vocabulary_and_adds_nothing(small_toy: Path) -> None:
    folder = small_toy / "t5gemma-b-b-ul2"
    vocabulary = json.loads((folder / "config.json").read_text())["encoder"]["vocab_size"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = tokenizer.encode("warm analog synth pad, 90 BPM")
    assert tokenizer.get_vocab_size() <= vocabulary
    assert encoded.tokens[0].startswith("w")
    assert not {0, 1, 2, 3} & set(encoded.ids)
    assert tokenizer.decode(encoded.ids) == "warm analog synth pad, 90 BPM"
    assert tokenizer.encode("é").ids == [3]


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    synthesize(tmp_path / "a", "small-music", progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        synthesize(tmp_path, "small-music")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        synthesize(tmp_path / "file", "small-music")


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    synthesize(tmp_path / "empty", "same-s")
    assert Checkpoint.open(tmp_path / "empty").variant_name == "same-s"


def test_an_unknown_variant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no variant 'large'"):
        synthesize(tmp_path / "a", "large")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UsageError, match=r"needs 9\.\d GiB"):
        synthesize(tmp_path / "a", "medium", "full")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "a", "small-music", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_true_size_takes_little_memory(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from sa3_convert.checkpoint.synthetic import synthesize;"
        "synthesize(Path(sys.argv[1]), 'small-music', 'full', 0, 'heavy-tailed');"
        "sys.exit(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 300 * 1024)"
    )
    folder = tmp_path / "full"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=900)
    assert (folder / "model.safetensors").stat().st_size == 2_270_384_940
    assert Checkpoint.open(folder).variant_name == "small-music"

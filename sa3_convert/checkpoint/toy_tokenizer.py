"""A small BPE tokenizer in the form of the published one: spaces as ▁, pad 0, no BOS or EOS added.

Learned on the spot from a handful of words, so it splits text plausibly and costs nothing to ship. Synthesized
checkpoints use it at every size: its ids are below any vocabulary's size.
"""

from tokenizers import Tokenizer, decoders, models, normalizers, trainers

VOCABULARY = 384
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
_SPACE = "▁"
_ALPHABET = "".join(chr(code) for code in range(33, 127)) + _SPACE
_PROMPTS = (
    "a slow ambient pad with soft strings and distant bells, 70 bpm",
    "fast drum and bass with a deep sub bass, chopped breaks, 174 bpm",
    "lo-fi hip hop beat, dusty drums, electric piano, vinyl noise, 84 bpm",
    "warm analog synthesizer arpeggio, driving techno kick, 128 bpm",
    "solo acoustic guitar, gentle fingerpicking, major key, live recording",
    "orchestral trailer music with brass, timpani and a rising choir",
    "funky disco groove, slap bass, rhythm guitar, claps, 118 bpm",
    "jazz trio in a small club, upright bass, brushed snare, piano solo",
    "thunder and heavy rain on a metal roof, wind in the trees",
    "footsteps on gravel, a door creaks open, a dog barks far away",
    "glass breaking, explosion with debris, sci-fi laser shots",
    "crowd cheering in a stadium, whistle, applause, announcer",
    "high quality stereo music, instrumental, loop, clean mix",
    "melody, harmony, tempo, energetic, dark, bright, calm, happy, sad",
)


def toy_tokenizer() -> str:
    """Return the contents of `tokenizer.json`; the same bytes every time."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Replace(_SPACE, " ")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=list(_ALPHABET),
        max_token_length=8,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_PROMPTS, trainer)
    return tokenizer.to_str(pretty=True)

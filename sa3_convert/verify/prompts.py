"""The prompts of a full verification: music and sound effects, short to long, none at all, and not English."""

PROMPTS: tuple[str, ...] = (
    "warm analog synth pad",
    "Fast drum and bass with a rolling sub bass, chopped amen breaks and bright vocal stabs, 174 BPM",
    "A door creaks open in an empty stone hall, footsteps come closer, then silence",
    "dog bark",
    "",
    "Ruhige Klaviermelodie in Moll, leise Streicher, ein Sommerabend am See",
    "雨の夜、静かなジャズトリオ、ブラシのドラムとウッドベース",
    (
        "Epic orchestral film score in D minor: low strings begin alone with a slow ostinato, French horns enter with "
        "the main theme, the choir joins in the second half, timpani rolls build to a climax with full brass and "
        "cymbals, then a solo cello repeats the theme over a held chord while the hall's reverberation fades away; "
        "recorded in a large scoring stage, wide stereo image, natural dynamics, no percussion loop, 72 BPM"
    ),
)

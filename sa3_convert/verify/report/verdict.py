"""What a verification amounts to, in a sentence."""

from sa3_convert.verify.result import BundleFidelity, Verdict


def verdict_sentence(found: BundleFidelity) -> str:
    """Return whether the models passed, and the one that is closest to its floor, or those that fell short."""
    count = len(found.verdicts)
    if found.passed and count == 1:
        return f"Passed: the only model verified reaches its floor, {_stands(found.verdicts[0])}."
    if found.passed:
        closest = min(found.verdicts, key=_margin)
        return f"Passed: all {count} models reach their floors. Closest to its floor is {_stands(closest)}."
    failed = [verdict for verdict in found.verdicts if not verdict.passed]
    fall = "falls" if len(failed) == 1 else "fall"
    return f"Failed: {len(failed)} of {count} models {fall} short: {'; '.join(_stands(v) for v in failed)}."


def _margin(verdict: Verdict) -> float:
    return verdict.fidelity.worst.signal_to_noise_db - verdict.floor_db


def _stands(verdict: Verdict) -> str:
    worst = verdict.fidelity.worst.signal_to_noise_db
    stands = f"{verdict.fidelity.component.value} with {worst:.1f} dB, floor {verdict.floor_db:g} dB"
    if worst >= verdict.floor_db and not verdict.passed:
        return f"{stands}, whose manifest claims more than its file gives"
    return stands

"""What a verification amounts to, in a sentence."""

from sa3_convert.components import Component
from sa3_convert.verify.findings import Findings
from sa3_convert.verify.result import Verdict


def passed(findings: Findings, verdict: Verdict) -> bool:
    """Return whether a model passed on sampled inputs and, if the generations ran on its engine, in each of them."""
    component = verdict.fidelity.component
    return verdict.passed and not (verdict.engine == findings.engine and component in findings.short)


def floor_of(findings: Findings, component: Component) -> float:
    """Return the floor of the model that the generations ran on."""
    verdicts = findings.bundle.verdicts
    return next(v.floor_db for v in verdicts if v.fidelity.component is component and v.engine == findings.engine)


def verdict_sentence(findings: Findings) -> str:
    """Return whether the models passed, and the one that is closest to its floor, or those that fell short."""
    verdicts = findings.bundle.verdicts
    failed = [verdict for verdict in verdicts if not passed(findings, verdict)]
    if failed:
        fall = "falls" if len(failed) == 1 else "fall"
        stands = "; ".join(_fails(findings, verdict) for verdict in failed)
        return f"Failed: {len(failed)} of {len(verdicts)} models {fall} short: {stands}."
    if len(verdicts) == 1:
        return f"Passed: the only model verified reaches its floor, {_stands(verdicts[0])}."
    closest = min(verdicts, key=lambda verdict: verdict.fidelity.worst.signal_to_noise_db - verdict.floor_db)
    return f"Passed: all {len(verdicts)} models reach their floors. Closest to its floor is {_stands(closest)}."


def _stands(verdict: Verdict) -> str:
    worst = verdict.fidelity.worst.signal_to_noise_db
    return f"{verdict.fidelity.component.value} with {worst:.1f} dB, floor {verdict.floor_db:g} dB"


def _fails(findings: Findings, verdict: Verdict) -> str:
    component = verdict.fidelity.component
    if verdict.fidelity.worst.signal_to_noise_db < verdict.floor_db:
        return _stands(verdict)
    if not verdict.passed:
        return f"{_stands(verdict)}, whose manifest claims more than its file gives"
    worst = findings.short[component].summary.worst
    return f"{component.value} with {worst:.1f} dB in a generation, floor {verdict.floor_db:g} dB"

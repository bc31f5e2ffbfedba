"""Points judged by whole generations, each in a bundle whose other components are those of one recipe."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sa3_convert.bundle.reader import Bundle
from sa3_convert.check.reference_store import ReferenceStore
from sa3_convert.components import components_of
from sa3_convert.convert.code_digest import code_digest
from sa3_convert.convert.conversion import convert
from sa3_convert.convert.plan import ConvertRequest, stage_keys
from sa3_convert.errors import Sa3Error, UsageError, told_by_system
from sa3_convert.lab.common import Common, tokenizer_of
from sa3_convert.lab.generations.distribution import FREE_RUNNING, component_of
from sa3_convert.lab.generations.end_to_end import mean_cosine, mean_spectra
from sa3_convert.lab.generations.full import recognised, verify_fully
from sa3_convert.lab.generations.shared import AUDIBLE
from sa3_convert.lab.generations.trajectory import STEPS, GenerationCase
from sa3_convert.lab.miniature.judge import MODES
from sa3_convert.lab.sweep.points import Point
from sa3_convert.lab.sweep.result import Measured, Sweep, Whole, with_frontier
from sa3_convert.lab.sweep.tasks import make_on_workers
from sa3_convert.recipe import Recipe
from sa3_convert.scheduling import Runner
from sa3_convert.system.files import partial_folder
from sa3_convert.system.sealed import fingerprint, read_sealed, write_sealed

Report = Callable[[str, int, int], None]
"""(what is done of which point, how much, of how much)."""


@dataclass(frozen=True, slots=True)
class Suite:
    """What each point goes through."""

    common: Common
    base: Recipe
    """Of the components that are not a point's."""
    cases: tuple[GenerationCase, ...]
    runner: Runner | None = None
    """Of workers, which see the cache; None is this process."""

    def require(self) -> None:
        """Raise UsageError if it cannot be gone through."""
        if not set(components_of(self.common.open().layout)) >= AUDIBLE:
            raise UsageError("This checkpoint generates nothing, so --full has nothing to compare.")
        if self.common.store:
            raise UsageError("--full needs a --cache that all workers see; leave out --store.")

    def request(self, point: Point, out: Path) -> ConvertRequest:
        """Return what converts the bundle of a point; a sweep has left its own stages in the cache."""
        components = dict(self.base.components) | {point.component: point.recipe}
        recipe = self.base.model_copy(update={"components": components})
        common = self.common
        return ConvertRequest(common.open(), recipe, out, common.cache, threads=common.threads)

    def key(self, point: Point) -> str:
        """Return the hash of all that a point's figures depend on."""
        request = self.request(point, Path())
        stages = {one.value: stage_keys(request.job(one)) for one in request.selected()}
        return fingerprint(
            stages=stages,
            tokenizer=tokenizer_of(request.checkpoint),
            component=point.component.value,
            cases=[case.name for case in self.cases],
            code=code_digest(_figures),
            threads=self.common.threads,
        )


def with_generations(suite: Suite, points: Sequence[Point], found: Sweep, report: Report) -> Sweep:
    """Return a sweep whose points went through whole generations; one that fails there is missing, and says why."""
    by_name = {point.name: point for point in points}

    def judged(measured: Measured) -> Measured:
        if measured.problem:
            return measured
        update: dict[str, object]
        try:
            update = {"generations": _kept_or_made(suite, by_name[measured.name], report)}
        except Exception as error:
            known = error if isinstance(error, Sa3Error) else told_by_system(error)
            if known is None:
                raise
            update = {"problem": str(known), "exit_code": known.exit_code, "bytes": None, "fidelity": None}
        return measured.model_copy(update=update)

    return found.model_copy(update={"points": with_frontier([judged(one) for one in found.points])})


def _kept_or_made(suite: Suite, point: Point, report: Report) -> Whole:
    folder = suite.common.cache / "generations"
    kept = folder / f"{suite.key(point)[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        return Whole.model_validate_json(read_sealed(kept))
    folder.mkdir(parents=True, exist_ok=True)
    # The copies of a bundle take room for as long as they are looked at.
    with partial_folder(folder / point.name) as out:
        request = suite.request(point, out)
        if suite.runner is not None:
            make_on_workers(request, suite.common, suite.runner)
        made = convert(request, lambda event: None).bundle
        whole = _figures(suite, point, made, lambda what, *done: report(f"{point.name}: {what}", *done))
    write_sealed(kept, whole.model_dump_json().encode())
    return whole


def _figures(suite: Suite, point: Point, bundle: Bundle, report: Report) -> Whole:
    store = ReferenceStore(suite.common.cache / "references")
    found = verify_fully(
        bundle,
        cases=suite.cases,
        steps=STEPS,
        quick=True,
        store=store,
        threads=suite.common.threads,
        bisecting=False,
        report=report,
        runner=suite.runner,
    )
    assert found.generations is not None
    assert found.end_to_end is not None
    own = [
        one
        for one in found.generations.distributions
        if one.name != FREE_RUNNING and component_of(one.name) is point.component
    ]
    worst = min(own, key=lambda one: one.worst)
    heard = recognised(bundle, [found.engine], MODES[:1], report=report)
    target, chaos = ([getattr(c, side) for c in found.end_to_end.cases] for side in ("target", "chaos"))
    return Whole(
        worst_db=worst.worst,
        worst_case=worst.place,
        spectra_db=mean_spectra(target),
        chaos_db=mean_spectra(chaos),
        latent_cosine=mean_cosine(target),
        others=suite.base.name,
        recognised=next((one.recognised for one in heard), None),
    )

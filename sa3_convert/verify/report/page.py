"""The page: one HTML file with its styles, figures and audio, that needs no network and runs no script."""

from collections.abc import Mapping
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from sa3_convert.verify.report.drawing import Heard, draw
from sa3_convert.verify.report.schema import Bisection, ComponentReport, Operator, Report
from sa3_convert.verify.report.shown import shown_db, shown_floor, shown_name, shown_size

_HERE = files("sa3_convert.verify.report")
_AROUND = 4
_MOST_OPERATORS = 8
_TOOLS = ("sa3-convert", "MNN", "onnxruntime")


def render_page(report: Report, heard: Heard, sample_rate: int) -> str:
    """Return the page's HTML; the same arguments give the same text.

    Args:
        report: everything that is said.
        heard: audio of the end-to-end comparison by case and side; empty if none was kept.
        sample_rate: of the audio, in Hz.

    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "db": shown_db,
        "floor": shown_floor,
        "size": shown_size,
        "versions": _versions,
        "shown_name": shown_name,
        "shown_operators": shown_operators,
        "operators_label": _operators_label,
        "stored_types": _stored_types,
        "stored_bytes": _stored_bytes,
        "tool_names": _tool_names,
    }
    figures = draw(report, heard, sample_rate)
    style = Markup(_HERE.joinpath("style.css").read_text(encoding="utf-8"))
    template = environment.from_string(_HERE.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(report=report, figures=figures, clips=figures.clips, style=style) + "\n"


def shown_operators(found: Bisection) -> list[Operator]:
    """Return the operators around the one to blame, or those that make the most error of their own."""
    names = [operator.name for operator in found.operators]
    if found.suspect in names:
        at = names.index(found.suspect)
        return list(found.operators[max(0, at - _AROUND) : at + _AROUND + 1])
    return sorted(found.operators, key=lambda o: o.own_error_db)[:_MOST_OPERATORS]


def _operators_label(found: Bisection) -> str:
    which = "around the one to blame" if found.suspect is not None else "that make the most error"
    return f"Operators of {found.component.value} {which}"


def _versions(tools: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {tools[name]}" for name in _TOOLS if name in tools)


def _stored_types(report: Report) -> list[str]:
    """Return the stored types of all models, the most bytes first."""
    sizes: dict[str, int] = {}
    for component in report.components:
        for stored in component.stored:
            sizes[stored.type] = sizes.get(stored.type, 0) + stored.bytes
    return sorted(sizes, key=lambda kind: (-sizes[kind], kind))


def _stored_bytes(component: ComponentReport, kind: str) -> int:
    return sum(stored.bytes for stored in component.stored if stored.type == kind)


def _tool_names(report: Report) -> list[str]:
    return sorted(report.made.converted_with.keys() | report.made.verified_with.keys(), key=str.lower)

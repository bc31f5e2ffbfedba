"""Figures of a bisection: the error that each operator makes, and what has gathered up to there."""

from sa3_convert.verify.report.schema import Bisection
from sa3_convert.verify.report.theme import Ink, new_figure, styled, svg_of

_LEAST_DB = 140.0
"""Errors below this are rounding of float arithmetic; they get no bar."""


def layers_figure(found: Bisection, name: str, label: str) -> str:
    """Return a bar per operator in the graph's order; the higher, the more error."""
    figure = new_figure(190)
    operators = found.operators
    with styled():
        axes = figure.add_subplot()
        bottom = min(_LEAST_DB, max((o.own_error_db for o in operators if o.own_error_db < _LEAST_DB), default=60.0))
        bottom = max(bottom, 60.0) + 5
        for wanted, color in ((False, Ink.FIRST), (True, Ink.BAD)):
            bars = [i for i, o in enumerate(operators) if o.is_faulty is wanted and o.own_error_db < bottom]
            tops = [operators[i].own_error_db for i in bars]
            width = max(1.0, len(operators) / (150 if wanted else 250))
            # From the bottom up: the axis is turned round.
            axes.bar(bars, [top - bottom for top in tops], bottom=bottom, width=width, color=color, lw=0)
        gathered = [min(bottom, operator.error_out_db) for operator in operators]
        axes.plot(range(len(operators)), gathered, color=Ink.SECOND, lw=1.1)
        top = min([*gathered, *(o.own_error_db for o in operators)])
        axes.set_ylim(bottom, top - 5)
        axes.set_xlim(-1, len(operators))
        axes.set_xlabel("operators, in the order of the graph")
        axes.set_ylabel("dB below the signal")
        axes.grid(axis="y")
        axes.tick_params(length=0)
    return svg_of(figure, name, label)

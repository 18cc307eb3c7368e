"""Lines with error bars in panels side by side, as one self-contained SVG; no package is needed.

x is drawn by its square root, so that the first percent of uptraining has room. Colours are those of Okabe and Ito
(jfly.uni-koeln.de/color), as in a run's loss.svg: one for each pooling; what is added to it is told by the dashes.
"""

import math
from xml.sax.saxutils import escape

COLOURS = {"mean": "#0072B2", "first": "#D55E00", "random": "#CC79A7", "spectral": "#E69F00", "calibrated": "#009E73",
           "parent, trained on": "#555555"}
OTHERS = ["#56B4E9", "#000000"]
DASHES = {"similarity": "7 4", "uneven": "2 3"}
GREY = "#555555"

WIDTH, HEIGHT = 380, 360  # of a panel's axes, in pixels
LEFT, TOP, GAP, BOTTOM = 72, 84, 64, 120
LEGEND_ROW, LEGEND_COLUMN = 21, 260


def colour_of(name, order):
    return COLOURS.get(name.split("+")[0], OTHERS[order % len(OTHERS)])


def dashes_of(name):
    dashes = [DASHES[part] for part in name.split("+")[1:] if part in DASHES]
    return f' stroke-dasharray="{" ".join(dashes)}"' if dashes else ""


def ticks(low, high, count=6):
    """Round values within [low, high]."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    values = [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9) + (1 if step / power == 2.5 else 0))
    return [(value, f"{value:.{decimals}f}") for value in values]


class Axes:
    """From values to pixels, for one panel."""

    def __init__(self, left, largest_x, low, high):
        self.left, self.low, self.high = left, low, high
        self.largest = largest_x or 1.0

    def x(self, value):
        return self.left + 12 + math.sqrt(max(0.0, value) / self.largest) * (WIDTH - 24)

    def y(self, value):
        return TOP + HEIGHT - (value - self.low) / (self.high - self.low) * HEIGHT


def text(x, y, content, more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(content)}</text>'


def line(x1, y1, x2, y2, more):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {more}/>'


def frame(axes, title, x_values):
    """Grid, labels and title of a panel."""
    right, bottom = axes.left + WIDTH, TOP + HEIGHT
    yield text(axes.left + WIDTH / 2, TOP - 12, title, 'text-anchor="middle" font-weight="bold"')
    for value, label in ticks(axes.low, axes.high):
        yield line(axes.left, axes.y(value), right, axes.y(value), 'stroke="#e4e4e4"')
        yield text(axes.left - 8, axes.y(value) + 4, label, 'text-anchor="end"')
    taken = -math.inf
    for value in x_values:
        yield line(axes.x(value), bottom, axes.x(value), bottom + 5, f'stroke="{GREY}"')
        label = f"{value:g}"
        half = 3.6 * len(label)
        if axes.x(value) - half > taken:
            yield text(axes.x(value), bottom + 20, label, 'text-anchor="middle"')
            taken = axes.x(value) + half
    yield (f'<rect x="{axes.left:.1f}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="{GREY}"/>')
    yield text(axes.left + WIDTH / 2, bottom + 42, "alpha (share of the parent's steps)", 'text-anchor="middle"')


def drawn_series(axes, name, points, colour):
    """A line with markers and error bars."""
    path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y, _ in points)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes_of(name)}/>'
    for x, y, deviation in points:
        at = axes.x(x)
        if deviation > 0:
            low, high = axes.y(y - deviation), axes.y(y + deviation)
            yield line(at, low, at, high, f'stroke="{colour}"')
            for end in (low, high):
                yield line(at - 4, end, at + 4, end, f'stroke="{colour}"')
        yield f'<circle cx="{at:.1f}" cy="{axes.y(y):.1f}" r="3.2" fill="{colour}"/>'


def legend(entries, top, width):
    """Names with their lines, in columns."""
    columns = max(1, int((width - LEFT) // LEGEND_COLUMN))
    for i, (name, colour, dashes) in enumerate(entries):
        x, y = LEFT + i % columns * LEGEND_COLUMN, top + i // columns * LEGEND_ROW
        yield line(x, y - 4, x + 34, y - 4, f'stroke="{colour}" stroke-width="2"{dashes}')
        yield text(x + 42, y, name)


def extent(panels, parent, top):
    """The y range of all panels: that of the values, or up to `top`."""
    values = [y + sign * deviation for _, series in panels for _, points in series for _, y, deviation in points
              for sign in (-1, 1)]
    values += [parent] if math.isfinite(parent) else []
    low, high = min(values), top if top is not None else max(values)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high if top is not None else high + margin


def svg(title, panels, parent, top=None):
    """panels: [(title, [(name, [(x, y, deviation)])])]; parent: a dashed line; top: the largest y that is shown."""
    drawn = [points for _, series in panels for _, points in series]
    width = LEFT + len(panels) * (WIDTH + GAP)
    names = list(dict.fromkeys(name for _, series in panels for name, _ in series))
    colours = {name: colour_of(name, i) for i, name in enumerate(names)}
    height = TOP + HEIGHT + BOTTOM + LEGEND_ROW * (len(names) // 3)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
           "font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\" font-size=\"13\" fill=\"#222222\" "
           'role="img">',
           f"<title>{escape(title)}</title>", f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
           text(LEFT, 32, title, 'font-size="17" font-weight="bold"')]
    if not drawn:
        return "\n".join([*out, text(width / 2, height / 2, "no data", 'text-anchor="middle"'), "</svg>"]) + "\n"
    x_values = sorted({x for points in drawn for x, _, _ in points})
    low, high = extent(panels, parent, top)
    out.append(text(20, TOP + HEIGHT / 2, "held-out loss (nats per token)",
                    f'text-anchor="middle" transform="rotate(-90 20 {TOP + HEIGHT / 2})"'))
    for i, (name, series) in enumerate(panels):
        axes = Axes(LEFT + i * (WIDTH + GAP), x_values[-1], low, high)
        out.append(f'<clipPath id="panel{i}"><rect x="{axes.left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}"/>'
                   "</clipPath>")
        out += frame(axes, name, x_values)
        out.append(f'<g clip-path="url(#panel{i})">')
        if math.isfinite(parent):
            out.append(line(axes.left, axes.y(parent), axes.left + WIDTH, axes.y(parent),
                            f'stroke="{GREY}" stroke-dasharray="5 4"'))
        for method, points in series:
            out += drawn_series(axes, method, points, colours[method])
        out.append("</g>")
    entries = [(name, colours[name], dashes_of(name)) for name in names]
    if math.isfinite(parent):
        entries.append((f"parent {parent:.4f}", GREY, ' stroke-dasharray="5 4"'))
    out += legend(entries, TOP + HEIGHT + 78, width)
    return "\n".join([*out, "</svg>"]) + "\n"

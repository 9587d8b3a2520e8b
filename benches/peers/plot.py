"""Grouped bars as SVG, with nothing but strings. Colours that stand on light and dark pages."""

import html

WIDTH, PANEL, GAP = 860, 190, 22
LEFT, TOP, BOTTOM = 64, 78, 46
COLOURS = ["#3f83f8", "#93b8fb", "#e08a2c", "#f2c28d"]
INK = "#7a7f87"


def nice(most):
    """A round number not below `most`, and how many parts it has."""
    size = 1.0
    while size * 10 <= most:
        size *= 10
    for step, parts in ((1, 5), (1.5, 3), (2, 4), (3, 3), (4, 4), (5, 5), (6, 3), (8, 4), (10, 5)):
        if step * size >= most:
            return step * size, parts
    return 10 * size, 5


def bars(title, names, groups):
    """`groups`: (panel, label, [(median, all samples) per name]); neighbours of one panel share it."""
    panels = []
    for panel, label, values in groups:
        if not panels or panels[-1][0] != panel:
            panels.append((panel, []))
        panels[-1][1].append((label, values))
    columns = 2
    panel_width = (WIDTH - LEFT - GAP - (columns - 1) * (LEFT + GAP)) / columns
    rows = -(-len(panels) // columns)
    height = TOP + rows * (PANEL + BOTTOM + GAP) + 4
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}" role="img">',
        f"<title>{html.escape(title)}</title>",
        f'<text x="{LEFT - 44}" y="24" font-size="16" font-weight="600">{html.escape(title)}</text>',
    ]
    x = LEFT - 44
    for name, colour in zip(names, COLOURS):
        out.append(f'<rect x="{x}" y="38" width="12" height="12" rx="2" fill="{colour}"/>')
        out.append(f'<text x="{x + 18}" y="48">{html.escape(name)}</text>')
        x += 46 + 6.6 * len(name)
    for i, (panel, members) in enumerate(panels):
        left = LEFT + (i % columns) * (panel_width + LEFT + GAP)
        top = TOP + (i // columns) * (PANEL + BOTTOM + GAP)
        out += draw_panel(panel, members, left, top, panel_width)
    return "\n".join(out + ["</svg>", ""])


def draw_panel(panel, members, left, top, width):
    known = [m for _, values in members for m, samples in values if m for m in [m, *samples]]
    most, parts = nice(max(known, default=1.0))
    floor = top + PANEL
    y = lambda value: floor - (PANEL - 18) * value / most  # noqa: E731
    out = [f'<text x="{left}" y="{top + 4}" font-weight="600">{html.escape(panel)}</text>']
    for i in range(parts + 1):
        value = most * i / parts
        out.append(f'<line x1="{left}" x2="{left + width}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
                   f'stroke="{INK}" stroke-opacity="{1 if i == 0 else 0.25}"/>')  # fmt: skip
        out.append(f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end" font-size="11">{value:g}</text>')
    middle = (top + 18 + floor) / 2
    out.append(f'<text x="{left - 48}" y="{middle}" text-anchor="middle" font-size="11" '
               f'transform="rotate(-90 {left - 48} {middle})">tokens/s</text>')  # fmt: skip
    slot = width / len(members)
    for i, (label, values) in enumerate(members):
        bar = slot * 0.8 / len(values)
        start = left + slot * (i + 0.1)
        out.append(f'<text x="{left + slot * (i + 0.5):.1f}" y="{floor + 18}" text-anchor="middle">{html.escape(label)}</text>')
        for j, (median, samples) in enumerate(values):
            if median is not None:
                out += draw_bar(start + j * bar, bar, median, samples, y, COLOURS[j])
    return out


def draw_bar(x, width, median, samples, y, colour):
    middle = x + width / 2
    top = min([y(median), *(y(s) for s in samples)])
    out = [f'<rect x="{x + 1:.1f}" y="{y(median):.1f}" width="{width - 2:.1f}" '
           f'height="{y(0) - y(median):.1f}" rx="2" fill="{colour}"/>']  # fmt: skip
    if len(samples) > 1:
        out.append(f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{y(min(samples)):.1f}" '
                   f'y2="{y(max(samples)):.1f}" stroke="{INK}" stroke-width="1.5"/>')  # fmt: skip
    out.append(f'<text x="{middle:.1f}" y="{top - 4:.1f}" text-anchor="middle" font-size="10">{median:.0f}</text>')
    return out

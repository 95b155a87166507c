"""Draws docs/step-time.svg from what `coar-lab bench decode --json` printed for several contexts.

Usage: plot.py OUT.svg CONTEXT=FILE.json ...   (CONTEXT: tokens in the cache when the clock starts)
"""

import json
import sys

WIDTH, HEIGHT, LEFT, BOTTOM, GAP = 330, 240, 46, 34, 30
COLOURS = ["#1b6ca8", "#c1440e", "#3b7d3b", "#7a4fa3", "#8a6d00"]


def panel(x0, title, xlabel, lines):
    top = max(y for _, points in lines for _, y in points) * 1.08
    right = max(x for _, points in lines for x, _ in points)
    sx = lambda x: x0 + LEFT + x / right * (WIDTH - LEFT - 70)
    sy = lambda y: HEIGHT - BOTTOM - y / top * (HEIGHT - BOTTOM - 26)
    out = [f'<text x="{x0 + LEFT}" y="14" font-weight="bold">{title}</text>',
           f'<text x="{sx(right / 2)}" y="{HEIGHT - 4}" text-anchor="middle">{xlabel}</text>',
           f'<path d="M{sx(0)},{sy(top)}V{sy(0)}H{sx(right)}" fill="none" stroke="#444"/>']
    step = 10 ** len(str(int(top / 4))) / 2 if top >= 4 else 1
    tick = 0.0
    while tick <= top:
        out.append(f'<text x="{sx(0) - 5}" y="{sy(tick) + 4}" text-anchor="end">{tick:g}</text>'
                   f'<path d="M{sx(0) - 3},{sy(tick)}h3" stroke="#444"/>')
        tick += step
    for x in sorted({x for _, points in lines for x, _ in points}):
        out.append(f'<text x="{sx(x)}" y="{sy(0) + 14}" text-anchor="middle">{x:g}</text>')
    for (name, points), colour in zip(lines, COLOURS):
        path = "L".join(f"{sx(x):.1f},{sy(y):.1f}" for x, y in points)
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        out += [f'<circle cx="{sx(x):.1f}" cy="{sy(y):.1f}" r="2.4" fill="{colour}"/>' for x, y in points]
        out.append(f'<text x="{sx(points[-1][0]) + 6:.1f}" y="{sy(points[-1][1]) + 4:.1f}" fill="{colour}">{name}</text>')
    return out


def main():
    runs = {}
    for argument in sys.argv[2:]:
        context, file = argument.split("=", 1)
        steps = [s for s in json.load(open(file))["steps"] if not s["concept"]]
        runs[int(context)] = {s["rows"]: s["step_ms"] for s in steps}
    contexts, rows = sorted(runs), sorted(next(iter(runs.values())))
    by_rows = [(f"{c} tokens", [(r, runs[c][r]) for r in rows]) for c in contexts[::2]]
    by_context = [(f"{r} rows", [(c, runs[c][r]) for c in contexts]) for r in rows]
    body = panel(0, "step time in ms", "rows of the batch", by_rows)
    body += panel(WIDTH + GAP, "step time in ms", "tokens in the cache", by_context)
    with open(sys.argv[1], "w") as out:
        out.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH + GAP} {HEIGHT}" '
                  f'font-family="sans-serif" font-size="10"><rect width="100%" height="100%" fill="white"/>'
                  + "".join(body) + "</svg>\n")


main()

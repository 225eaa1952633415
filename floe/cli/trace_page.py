"""A timeline as one page of HTML: a waterfall that needs no script, no network and no build, in light and dark. Pure."""

from __future__ import annotations

import datetime as dt
from html import escape

from floe.cli.timeline import STALL, Span, Timeline

_LEAST = 0.25  # percent of the width that anything takes, so that it can be seen
STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #57606a; --line: #d0d7de; --ground: #ffffff; --band: #f6f8fa;
  --pull: #8250df; --layer: #0969da; --prepare: #1a7f37; --moment: #57606a; --stall: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --soft: #9198a1; --line: #3d444d; --ground: #0d1117;
  --band: #151b23; --pull: #ab7df8; --layer: #4493f8; --prepare: #3fb950; --moment: #9198a1; --stall: #f85149; } }
body { margin: 2rem auto; padding: 0 1rem; max-width: 80rem; background: var(--ground); color: var(--text);
  font: 14px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p, caption { color: var(--soft); text-align: left; } caption { padding-bottom: .5rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .5rem; }
dt { color: var(--soft); } dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; overflow-wrap: anywhere; }
tbody tr:nth-child(even) { background: var(--band); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { width: 6rem; } th.when { width: 40%; } th.cause { width: 11rem; }
.track { display: block; width: 100%; height: 1.1rem; } .bar { fill: var(--moment); }
.pull { fill: var(--pull); } .layer { fill: var(--layer); } .container { fill: var(--prepare); }
.stall { fill: var(--stall); } td.stalled { color: var(--stall); font-weight: 600; background: none; }
""".strip()


def page(found: Timeline) -> str:
    """The whole document."""
    start = found.start
    title = f"Start of {start.name or start.id}"
    when = dt.datetime.fromtimestamp(found.began, dt.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{STYLE}
</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p>{escape(start.key)}, {when}</p>
{parts(found)}
</main>
</body>
</html>
"""


def parts(found: Timeline, level: int = 2) -> str:
    """What the document shows below its title, for any page whose style has the classes of this one; `level` of its headings."""
    rows = "\n".join(_row(span, found.seconds) for span in found.spans)
    return f"""{_summary(found)}
{_stalls(found, level)}
<h{level}>Waterfall</h{level}>
<table class="waterfall">
<caption>{len(found.spans)} events over {found.seconds:.3f} s, in order; a bar is as long as the event took.</caption>
<thead><tr><th scope="col" class="number">at</th><th scope="col" class="number">takes</th><th scope="col" class="when">when</th><th scope="col">what</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>"""


def _summary(found: Timeline) -> str:
    stalls, end = found.stalls, found.start.end
    values = [
        ("whole", f"{found.seconds:.3f} s"),
        ("first read after", f"{end['first_read']:.3f} s" if end else "not known"),
        ("last new read after", f"{end['last_read']:.3f} s" if end else "not known"),
        ("stalls", str(len(stalls))),
        ("waited in them", f"{found.waited:.3f} s"),
        *((name.replace("_", " "), f"{value:,}") for name, value in found.meanwhile.items()),
    ]
    return "<dl>" + "".join(f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd></div>" for n, v in values) + "</dl>"


def _stalls(found: Timeline, level: int) -> str:
    if not found.stalls:
        return "<p>No read waited long.</p>"
    rows = "\n".join(
        f'<tr><td class="number">{span.seconds:.3f} s</td><td>{escape(span.cause or "")}</td>'
        f'<td class="number">{span.bytes}</td><td>{escape(", ".join(filter(None, (span.what, span.detail))))}</td></tr>'
        for span in found.stalls[:10]
    )
    return f"""<h{level}>Longest stalls</h{level}>
<table class="stalls">
<thead><tr><th scope="col" class="number">took</th><th scope="col" class="cause">cause</th><th scope="col" class="number">bytes</th><th scope="col">file</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>"""


def _row(span: Span, whole: float) -> str:
    left = min(100 - _LEAST, 100 * span.at / whole) if whole else 0.0
    width = min(100 - left, max(_LEAST, 100 * span.seconds / whole)) if whole else 100.0
    stalled = ' class="stalled"' if span.kind == STALL else ""
    takes = f"{span.seconds:.3f} s" if span.seconds else ""
    return (
        f'<tr><td class="number">{span.at:.3f} s</td><td class="number">{takes}</td>'
        f'<td><svg class="track" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"><rect class="bar {escape(span.kind.split()[0])}" x="{left:.3f}" y="1" width="{width:.3f}" height="8"/></svg></td>'
        f"<td{stalled}>{escape(span.kind)}: {escape(_what(span))}</td></tr>"
    )


def _what(span: Span) -> str:
    parts = [span.what, span.cause or "", f"{span.bytes} bytes" if span.bytes is not None else "", span.detail]
    return ", ".join(part for part in parts if part)

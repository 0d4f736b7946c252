"""How the page looks: one sheet of styles, for light and dark, for a wide window and a phone.

>>> SHEET.count("prefers-color-scheme"), policy("p{}").startswith("default-src 'none'; style-src 'sha256-")
(1, True)

Underneath: nothing of a library's.
  - Colours have names: a drawing says `var(--c0)`, and the sheet says what that is on white and on black.
  - They are Okabe and Ito's, which people who see fewer colours tell apart; each run has dashes of its own too.
  - The page may load nothing and run nothing: its policy names the hash of this sheet, and nothing else.

Proof: test_a_page_loads_nothing_and_runs_nothing, test_colours_can_be_told_apart in tests/report/test_page.py and
tests/report/test_style.py.
"""

from __future__ import annotations

import base64
import hashlib

# Okabe & Ito 2008, "Color Universal Design": on white its light ones are darker here, on black its dark ones lighter.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b5528f", "#b07900", "#2f9bd8", "#444444", "#8c8200")
DARK = ("#56b4e9", "#ff8a3d", "#2bc799", "#e39ac4", "#f0b429", "#a9dcff", "#cccccc", "#f0e442")
DASHES = ("", "6 3", "2 2", "8 3 2 3", "10 4", "4 2 1 2", "1 3", "12 2 2 2")  # one a run
SHADES = 10  # of a table's cells


def colours(paper: str, ink: str, faint: str, line: str, card: str, palette: tuple[str, ...]) -> str:
    """The variables of a theme."""
    named = {"paper": paper, "ink": ink, "faint": faint, "line": line, "card": card}
    return "".join(
        f"--{name}:{value};" for name, value in (named | {f"c{k}": c for k, c in enumerate(palette)}).items()
    )


DAY = colours("#ffffff", "#1a1d21", "#5c636b", "#d9dde2", "#f6f7f9", LIGHT)
NIGHT = colours("#14171a", "#e6e8ea", "#a0a7ae", "#3a4047", "#1d2125", DARK)
THEMES = f":root{{color-scheme:light dark;{DAY}}}\n@media (prefers-color-scheme:dark){{:root{{{NIGHT}}}}}\n"
SHEET = (
    THEMES
    + """*{box-sizing:border-box}
body{margin:0 auto;padding:1.25rem;max-width:76rem;background:var(--paper);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.5rem;margin:0 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .6rem;padding-top:.6rem;border-top:1px solid var(--line);overflow-wrap:anywhere}
h3{font-size:.95rem;margin:.2rem 0 .3rem}
p{margin:.3rem 0}
.faint,figcaption{color:var(--faint);font-size:.86rem}
.remark{border-left:3px solid var(--c1);padding:.2rem .7rem;margin:.5rem 0}
.tiles{display:flex;flex-wrap:wrap;gap:.6rem;margin:.9rem 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.5rem .9rem;min-width:7.5rem}
.tile b{display:block;font-size:1.45rem;font-weight:600;line-height:1.25;font-variant-numeric:tabular-nums}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:1rem 1.4rem;align-items:start}
.three{grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr))}
.grid>*{min-width:0}
figure{margin:0}
figure svg{display:block;width:100%;height:auto;max-width:38rem}
figure svg text{font-family:inherit;fill:var(--ink)}
figure svg *{stroke-linejoin:round;stroke-linecap:butt}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:.5rem 0 .9rem;padding:0;list-style:none}
.legend li{display:flex;align-items:center;gap:.4rem;overflow-wrap:anywhere;min-width:0}
.swatch{flex:none;width:34px;height:12px}
.wide{overflow-x:auto;max-width:100%;margin-bottom:.9rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.25rem .7rem .25rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{font-weight:600;white-space:nowrap}
td.n,th.n{text-align:right}
td{overflow-wrap:anywhere;max-width:22rem}table.words td{max-width:none}
.matrix td,.matrix th{padding:.35rem .6rem;border:1px solid var(--line)}
.matrix td{text-align:right;min-width:3.2rem}
.hard{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:.7rem;padding:0;
 margin:0;list-style:none}
.hard li{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.6rem .8rem;
 min-width:0;overflow-wrap:anywhere}
.hard q{display:block;quotes:none;margin-bottom:.3rem}
.bar{display:grid;grid-template-columns:minmax(3rem,9rem) 1fr 3.2rem;gap:.5rem;align-items:center;font-size:.86rem}
.bar span:first-child{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.bar meter{width:100%;height:.75rem}
.bar meter::-webkit-meter-optimum-value{background:var(--c0)}
.bar meter::-moz-meter-bar{background:var(--c0)}
.bar span:last-child{text-align:right;font-variant-numeric:tabular-nums}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--faint)}
@media (max-width:36rem){body{padding:.8rem;font-size:14px}th,td{padding-right:.45rem}.tile{flex:1 1 40%;min-width:0}
 table.words,table.words tbody,table.words tr,table.words td,table.words th{display:block}
 table.words td,table.words th{border:0;padding:0}table.words tr{border-bottom:1px solid var(--line);padding:.3rem 0}}
@media print{details>*{display:block}}
"""
    + "\n".join(
        f".s{k}{{background:color-mix(in srgb,var(--c0) {round(60 * k / SHADES)}%,transparent)}}"
        for k in range(1, SHADES + 1)
    )
    + "\n"
)


def policy(sheet: str) -> str:
    """The Content-Security-Policy of a page with this sheet of styles: nothing is loaded, nothing is run."""
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"

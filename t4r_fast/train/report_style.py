"""The style sheet of report.html: light and dark, wide and narrow, print."""

from __future__ import annotations

# model colours after Okabe and Ito: told apart by colour-blind readers, on white and on near-black
_TONES = {
    "gru_as_printed": ("#c77c02", "#f0ad3d"),
    "gru": ("#00805c", "#2fc79a"),
    "xlnet_mlm": ("#0069b4", "#5db4f0"),
    "xlnet_mlm_side": ("#b8326f", "#f07fae"),
    "popularity": ("#8b8f98", "#8b919e"),
    "markov": ("#4d515b", "#c3c8d2"),
    "bar": ("#6c7fa6", "#8597bd"),
}


def _variables(which: int) -> str:
    return "".join(f"--{name}:{pair[which]};" for name, pair in _TONES.items())


_RULES = "".join(f".tone-{name}{{--tone:var(--{name})}}" for name in _TONES)

CSS = (
    ":root{--bg:#fff;--panel:#f7f8fa;--ink:#1b1e24;--muted:#5a6170;--rule:#dfe2e8;"
    + _variables(0)
    + "}@media (prefers-color-scheme:dark){:root{--bg:#14161a;--panel:#1c1f25;--ink:#e8eaee;"
    "--muted:#a2a9b6;--rule:#343942;"
    + _variables(1)
    + "}}"
    + _RULES
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:2.2rem 1.25rem 4rem}
h1{font-size:1.75rem;line-height:1.2;letter-spacing:-.015em;margin:0 0 .6rem}
h2{font-size:1.15rem;margin:2.6rem 0 .8rem;padding-top:1.1rem;border-top:1px solid var(--rule)}
p{margin:.6rem 0;max-width:75ch}
.lead{font-size:1.05rem;color:var(--muted)} .lead strong{color:var(--ink)}
.note{font-size:.875rem;color:var(--muted)} .note strong{color:var(--ink)}
.scroll{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;width:100%;font-size:.9375rem;font-variant-numeric:tabular-nums}
th,td{padding:.45rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
thead th{font-weight:600;font-size:.8125rem;color:var(--muted)}
th:first-child,td:first-child{text-align:left;padding-left:0}
tbody th{font-weight:500}
tr.baseline th,tr.baseline td{color:var(--muted)}
td strong{font-weight:700;color:var(--ink)}
table.how th{vertical-align:top;color:var(--muted);width:8.5rem}
table.how td{text-align:left;white-space:normal;overflow-wrap:anywhere}
code{font:.875em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.swatch{display:inline-block;width:.7em;height:.7em;border-radius:2px;margin-right:.55em;
 background:var(--tone)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1.3rem;margin:.6rem 0;padding:0;
 font-size:.875rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:1.1rem;
 margin:1rem 0}
figure{margin:0;padding:.9rem .9rem .6rem;background:var(--panel);border:1px solid var(--rule);
 border-radius:8px;min-width:0}
figcaption{font-weight:600;font-size:.9rem;margin-bottom:.35rem}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-family:inherit;fill:var(--muted)}
.tick{font-size:12px} .axis{font-size:12.5px}
.grid{stroke:var(--rule);stroke-width:1}
.divider{stroke:var(--muted);stroke-width:1;stroke-dasharray:2 4;opacity:.55}
.line{fill:none;stroke:var(--tone);stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
.dashed{stroke-dasharray:5 5;stroke-width:1.8}
.mark{fill:var(--tone);stroke:var(--panel);stroke-width:1.2}
rect{fill:var(--tone)}
details{margin:1rem 0} summary{cursor:pointer;color:var(--muted);font-size:.9rem}
dl{margin:.8rem 0} dt{font-weight:600} dd{margin:0;color:var(--muted)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:.8rem}
.tiles div{background:var(--panel);border:1px solid var(--rule);border-radius:8px;
 padding:.6rem .9rem}
.tiles dt{font-weight:500;font-size:.8125rem;color:var(--muted)}
.tiles dd{font-size:1.35rem;font-weight:600;color:var(--ink);font-variant-numeric:tabular-nums}
.about div{margin:.7rem 0} .about dd{max-width:75ch;font-size:.9375rem}
@media (max-width:560px){body{font-size:15px} main{padding:1.4rem .9rem 3rem} h1{font-size:1.4rem}
 table.how th{width:6.5rem} .charts{gap:.8rem}}
@media print{main{max-width:none;padding:0} figure,tr{break-inside:avoid}}
"""
)

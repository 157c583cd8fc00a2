"""The page's style: light and dark as the reader's system is, on paper, and on a phone. Nothing is loaded."""

# Colours of Okabe and Ito, which people with any kind of colour vision tell apart; lighter ones on a dark ground.
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#a8508a", "#c98a00", "#4a4e57", "#56b4e9", "#8c6d1f")
_DARK = ("#58b1ec", "#f08a4b", "#35c79a", "#e59ac8", "#f2b632", "#a4a9b4", "#9ad4f7", "#d9bf6a")


def _palette(colors: tuple[str, ...]) -> str:
    return "".join(f"--c{n}:{color};" for n, color in enumerate(colors))


_CLASSES = "".join(
    f".s{n}{{stroke:var(--c{n})}}.f{n}{{fill:var(--c{n})}}.b{n}{{background:var(--c{n})}}" for n in range(len(_LIGHT))
)

STYLE = f"""
:root{{color-scheme:light dark;--ground:#f5f6f8;--card:#fff;--ink:#1c2128;--muted:#5b6472;--rule:#dfe3e9;--grid:#e9ecf1;
--good:#0a7a4b;--bad:#b3401a;--warn:#fff5e6;--wait:#9aa3b2;--measured:#8d96a5;{_palette(_LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{--ground:#14171c;--card:#1c2027;--ink:#e4e7ec;--muted:#9aa4b2;--rule:#323943;
--grid:#2a3039;--good:#46c28e;--bad:#f08a5d;--warn:#2f261a;--wait:#687385;--measured:#788394;{_palette(_DARK)}}}}}
"""
STYLE += """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:24px 16px 48px}
h1{font-size:1.6rem;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:0 0 12px}
h3{font-size:.95rem;margin:0;font-weight:600}
header p{margin:4px 0 20px;color:var(--muted);overflow-wrap:anywhere}
.badge{font-size:.75rem;font-weight:600;vertical-align:middle;padding:2px 9px;border-radius:99px;border:1px solid;
white-space:nowrap;color:var(--muted)}
.badge.good{color:var(--good)}.badge.bad{color:var(--bad)}
section{margin-top:32px}
.cards{display:grid;gap:10px;grid-template-columns:repeat(auto-fill,minmax(160px,1fr))}
.card,figure,dl,.warn,.panel{background:var(--card);border:1px solid var(--rule);border-radius:10px}
.card{padding:10px 14px;display:flex;flex-direction:column;min-width:0}
.card .name{font-size:.8rem;color:var(--muted)}
.card strong{font-size:1.3rem;font-weight:650;line-height:1.3;font-variant-numeric:tabular-nums}
.card .muted{font-size:.78rem}
.muted{color:var(--muted)}
p.muted{font-size:.85rem;margin:8px 0 0}
.unit{font-weight:400;color:var(--muted);font-size:.85rem}
.warn{background:var(--warn);padding:12px 16px;margin-top:20px}
.warn h2{font-size:1rem;margin-bottom:4px}.warn ul{margin:0;padding-left:20px;overflow-wrap:anywhere}
figure{margin:0 0 12px;padding:14px 16px;min-width:0;position:relative}
figcaption{display:flex;flex-wrap:wrap;gap:2px 18px;align-items:baseline;justify-content:space-between;
margin-bottom:6px}
.legend{list-style:none;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.8rem;color:var(--muted)}
.swatch.faint{opacity:.45}
.swatch{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:5px}
svg.chart{display:block;width:100%;height:auto;overflow:visible}
.grid{stroke:var(--grid)}.axis{stroke:var(--muted)}
.tick{font-size:10.5px;fill:var(--muted)}.end{text-anchor:end}.middle{text-anchor:middle}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.faint{stroke-width:1;opacity:.45}
.mark{stroke:var(--muted);stroke-dasharray:4 4}
.missing{fill:var(--bad)}.wait{fill:url(#hatch)}.measured{fill:var(--measured)}
.hatch{stroke:var(--wait);stroke-width:2}
.defs{position:absolute;width:0;height:0}
details{margin-top:8px;font-size:.85rem}
summary{cursor:pointer;color:var(--muted)}
.scroll{overflow-x:auto;margin-top:6px}
table{border-collapse:collapse;font-size:.82rem;font-variant-numeric:tabular-nums}
th,td{padding:3px 16px 3px 0;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}
th:first-child{text-align:left;font-weight:500}
thead th{color:var(--muted);font-weight:500}
td.hash{font:11.5px ui-monospace,"DejaVu Sans Mono",Menlo,monospace;text-align:left}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:0 0 12px;padding:14px 16px;font-size:.85rem}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere;white-space:pre-wrap}
.panel{padding:12px 16px;margin-bottom:12px}.panel>details:first-child{margin-top:0}
pre{margin:8px 0 0;font:12.5px/1.5 ui-monospace,"DejaVu Sans Mono",Menlo,monospace;white-space:pre-wrap;
overflow-wrap:anywhere;tab-size:4}
.prompt{color:var(--muted)}
code{font:.92em ui-monospace,"DejaVu Sans Mono",Menlo,monospace}
footer{margin-top:32px;color:var(--muted);font-size:.8rem}
.tip{position:fixed;z-index:2;pointer-events:none;background:var(--ink);color:var(--ground);border-radius:6px;
padding:5px 9px;font-size:.78rem;line-height:1.4;white-space:pre;font-variant-numeric:tabular-nums}
.cross{stroke:var(--muted);stroke-width:1;pointer-events:none}
.dot{pointer-events:none;stroke:var(--card);stroke-width:1.5}
@media (min-width:860px){.two{display:grid;grid-template-columns:1fr 1fr;gap:12px}.two figure{margin:0}
.two .tick{font-size:17px}.two .line{stroke-width:2.4}.two .faint{stroke-width:1.4}}
@media (max-width:560px){main{padding:16px 10px 32px}figure{padding:12px 10px}.tick{font-size:17px}
.cards{grid-template-columns:repeat(2,1fr)}.card{padding:8px 10px}.card strong{font-size:1.1rem}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}}
@media print{:root{--ground:#fff}body{font-size:11px}main{max-width:none;padding:0}
figure,.card,dl,.warn{break-inside:avoid}h2{break-after:avoid}.tip{display:none}}
"""
STYLE += _CLASSES

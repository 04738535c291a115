"""The page's style and its one script, which shows the values under a pointer."""

import base64
import hashlib

STYLE = """
:root { color-scheme:light dark; --ink:#1c2330; --soft:#5d6778; --line:#dfe4ec; --paper:#fff; --ground:#f4f6f9; --bad:#b3261e;
  --c0:#1f6feb; --c1:#d1570a; --c2:#0f8a5f; --c3:#a832a8; --c4:#8a6a00; --c5:#c2185b; --c6:#0089a8; --c7:#5c6470; --c8:#7048e8; --c9:#5b8c00 }
@media (prefers-color-scheme:dark) { :root { --ink:#e6e9ef; --soft:#9aa5b5; --line:#323a47; --paper:#1b2029; --ground:#12161c; --bad:#ff8a80;
  --c0:#6ea8ff; --c1:#ff9e5e; --c2:#4fd1a1; --c3:#e08be0; --c4:#e3c04b; --c5:#ff7eb0; --c6:#5fd3ee; --c7:#a7b0bd; --c8:#b197fc; --c9:#b5d957 } }
* { box-sizing:border-box } body { margin:0; background:var(--ground); color:var(--ink); font:15px/1.5 system-ui,sans-serif }
main { max-width:1240px; margin:0 auto; padding:24px 16px 60px } h1 { font-size:24px; margin:0; overflow-wrap:anywhere }
h2 { font-size:18px; margin:32px 0 10px } p.lead,p.note { color:var(--soft); margin:2px 0 12px; overflow-wrap:anywhere } p.note { font-size:12.5px; margin:4px 0 0 }
.cards { display:grid; grid-template-columns:repeat(auto-fill,minmax(150px,1fr)); gap:10px }
.card,figure,.panel { background:var(--paper); border:1px solid var(--line); border-radius:8px }
.card { padding:8px 12px } .card b { display:block; font-size:18px; overflow-wrap:anywhere; font-variant-numeric:tabular-nums } .card span { color:var(--soft); font-size:13px }
.card b + b { border-top:1px dashed var(--line) } .grid { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr)); gap:12px }
.wide { grid-column:1/-1 } figure { margin:0; padding:10px 14px 8px; min-width:0 } figcaption { font-weight:600; font-size:14px } figcaption small { color:var(--soft); font-weight:400; margin-left:8px }
.chart { position:relative; height:210px; margin:6px 0 0 46px; border-bottom:1px solid var(--line) } .chart svg { width:100%; height:100%; display:block; overflow:visible }
.ylabels { position:absolute; inset:0 auto 0 -46px; width:40px } .ylabel { position:absolute; right:0; transform:translateY(-50%); font-size:11px; color:var(--soft) }
.xlabels { display:flex; justify-content:space-between; margin-left:46px; font-size:11px; color:var(--soft) }
.gridline { stroke:var(--line); vector-effect:non-scaling-stroke } .curve { fill:none; stroke-width:1.8; stroke-linejoin:round; stroke-linecap:round; vector-effect:non-scaling-stroke }
.dashed { stroke-dasharray:5 4 } .cursor { position:absolute; top:0; bottom:0; width:1px; background:var(--soft); display:none; pointer-events:none }
.tip { position:absolute; top:4px; display:none; pointer-events:none; background:var(--paper); border:1px solid var(--line); border-radius:6px; padding:4px 8px;
  font-size:12px; line-height:1.45; width:max-content; max-width:calc(50% - 10px); overflow-wrap:anywhere; box-shadow:0 2px 8px #0003; z-index:2; font-variant-numeric:tabular-nums } .tip i { width:9px; height:9px }
.legend { list-style:none; display:flex; flex-wrap:wrap; gap:2px 14px; margin:4px 0 0; padding:0; font-size:12.5px } .legend li { overflow-wrap:anywhere }
i { display:inline-block; width:11px; height:11px; border-radius:3px; margin-right:5px; vertical-align:-1px } i.hollow { background:none!important; border:2px dashed currentColor }
.bar { display:flex; height:22px; border-radius:4px; overflow:hidden; background:var(--line); margin:6px 0 } .piece { display:block; height:100% } .barname { font-size:12.5px; color:var(--soft); overflow-wrap:anywhere }
.panel { overflow-x:auto; width:fit-content; max-width:100% } .sample.panel { width:auto } .pair { display:flex; flex-wrap:wrap; gap:0 28px } .pair > div { min-width:0; max-width:100% } table { border-collapse:collapse; font-size:13px; } td,th { border-bottom:1px solid var(--line); padding:4px 10px; text-align:right; font-variant-numeric:tabular-nums }
tr:last-child td { border-bottom:0 } th { color:var(--soft); font-weight:600 } td.t,th.t { text-align:left; overflow-wrap:anywhere; min-width:6.5em } .bad { color:var(--bad) } .best { font-weight:700 }
details { margin:8px 0 } summary { cursor:pointer } pre { margin:0; padding:10px 14px; font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace; overflow-x:auto }
.samples { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,260px),1fr)); gap:10px; margin:10px 0 } .sample { padding:10px 12px; font-size:12.5px; overflow-wrap:anywhere }
.sample img { display:inline-block; max-width:100%; max-height:130px; margin:6px 6px 0 0; border:1px solid var(--line); border-radius:4px } .sample b { font-size:13px } .sample p { margin:2px 0; color:var(--soft) }
""" + "".join(
    f".c{n} {{ stroke:var(--c{n}); color:var(--c{n}) }} .b{n} {{ background:var(--c{n}); color:var(--c{n}) }}"
    for n in range(10)
)

SCRIPT = """
'use strict';
function text(value) { return Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(3) : String(+value.toPrecision(5)); }
function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (points[middle][0] < x) low = middle; else high = middle; }
  return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
}
for (const chart of document.querySelectorAll('[data-chart]')) {
  const data = JSON.parse(chart.dataset.chart), cursor = chart.querySelector('.cursor'), tip = chart.querySelector('.tip');
  const [low, high] = data.x;
  const show = event => {
    const box = chart.getBoundingClientRect(), share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const x = low + share * (high - low);
    let step = null;
    const lines = [];
    for (const series of data.series) {
      const [at, value] = nearest(series.points, x);
      if (step === null || Math.abs(at - x) < Math.abs(step - x)) step = at;
      lines.push([series, at, value]);
    }
    tip.replaceChildren();
    tip.append('step ' + text(step));
    for (const [series, at, value] of lines) {
      const line = document.createElement('div'), mark = document.createElement('i');
      mark.className = 'b' + series.color + (series.dashed ? ' hollow' : '');
      line.append(mark, series.name + ': ' + text(value) + (data.unit ? ' ' + data.unit : '') + (at === step ? '' : ' (at ' + text(at) + ')'));
      tip.append(line);
    }
    const place = high > low ? 100 * (step - low) / (high - low) : 0;
    cursor.style.left = place + '%';
    cursor.style.display = tip.style.display = 'block';
    tip.style.left = place < 50 ? 'calc(' + place + '% + 8px)' : 'auto';
    tip.style.right = place < 50 ? 'auto' : 'calc(' + (100 - place) + '% + 8px)';
  };
  chart.addEventListener('pointermove', show);
  chart.addEventListener('pointerdown', show);
  chart.addEventListener('pointerleave', () => { cursor.style.display = tip.style.display = 'none'; });
}
"""

_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'"
"""The page may run this script and no other, and may reach nothing."""

"""Style of the pages: light and dark, wide and narrow, printed. Colours after Okabe and Ito, told apart by all eyes."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--page:#fff;--card:#f5f6f8;--text:#1a1d21;--faint:#59616b;--line:#d3d8de;--lane:#e9ecf0;
--k0:#0072b2;--k1:#e69f00;--k2:#009e73;--k3:#cc79a7;--k4:#d55e00;--k5:#56b4e9;--k6:#b8a800;--k7:#8d959e;--k8:#5b4a9e}
@media (prefers-color-scheme:dark){:root{--page:#14171a;--card:#1e2226;--text:#e8eaed;--faint:#a4adb8;--line:#3b424a;
--lane:#2a2f35;--k0:#3d9bdc;--k1:#e8ac30;--k2:#1fb58b;--k3:#d593b8;--k4:#ea7a35;--k5:#7cc6f0;--k6:#d8cb3c;--k7:#9aa3ad;
--k8:#9a8be0}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif;overflow-wrap:break-word}
main{max-width:1180px;margin:0 auto;padding:24px 20px 48px}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 4px}
h2{font-size:1.2rem;margin:40px 0 4px;padding-top:16px;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:20px 0 4px}
p{margin:4px 0 12px;max-width:52em}
.about,.remark{color:var(--faint)}
small,.remark{font-size:.82rem}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:2px 20px;margin:12px 0}
dt{grid-column:1;color:var(--faint)}
dd{grid-column:2;margin:0}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;margin:20px 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px}
.card b{display:block;font-size:1.45rem;line-height:1.3;font-variant-numeric:tabular-nums}
.card span{display:block;color:var(--faint);font-size:.85rem}
.label{display:inline-block!important;border:1px solid currentColor;border-radius:9px;padding:0 8px;font-size:.75rem}
.scroll{overflow-x:auto;margin:12px 0}
.scroll:focus-visible{outline:2px solid var(--k0)}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:4px 0}
th,td{padding:3px 16px 3px 0;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600}
tbody th{font-weight:400}
td small{display:block;color:var(--faint);font-size:.92em}
.word{text-align:left;white-space:normal}
td.word{max-width:34em}
td.word:last-child{min-width:9em}
tbody th.word{min-width:4em;max-width:26em}
.rows{display:grid;grid-template-columns:max-content minmax(0,1fr) max-content;gap:5px 12px;align-items:center;
margin:12px 0;font-size:.85rem;font-variant-numeric:tabular-nums}
.rows .end{text-align:right}
svg{display:block;width:100%}
svg text{fill:var(--faint);font-size:12px}
.key{list-style:none;display:flex;flex-wrap:wrap;gap:2px 18px;margin:8px 0;padding:0;font-size:.85rem}
.key svg{display:inline-block;width:12px;height:12px;margin-right:6px;vertical-align:-1px}
.dense rect{stroke:none}
.area{fill:var(--k0)}
.beside{fill:var(--k4)}
.lane{fill:var(--lane)}
.edge{fill:var(--text)}
.grid{stroke:var(--line);stroke-width:1}
.k0,.k1,.k2,.k3,.k4,.k5,.k6,.k7,.k8{stroke:var(--page);stroke-width:.6}
.k0{fill:var(--k0)}.k1{fill:var(--k1)}.k2{fill:var(--k2)}.k3{fill:var(--k3)}.k4{fill:var(--k4)}
.k5{fill:var(--k5)}.k6{fill:var(--k6)}.k7{fill:var(--k7)}.k8{fill:var(--k8)}
.s0{stroke:var(--k0);stroke-width:2}.s1{stroke:var(--k4);stroke-width:2;stroke-dasharray:6 4}
.s7{stroke:var(--k7);stroke-width:1.5;stroke-dasharray:2 4}
.plot{display:grid;grid-template-columns:76px minmax(0,1fr);margin:8px 0 16px}
.plot svg{overflow:visible}
footer{margin-top:40px;border-top:1px solid var(--line);padding-top:8px;color:var(--faint);font-size:.82rem}
@media (max-width:560px){main{padding:16px 14px 32px}h1{font-size:1.3rem}dl{grid-template-columns:minmax(0,1fr)}
dt,dd{grid-column:1}dd+dt{margin-top:6px}.rows{grid-template-columns:minmax(0,1fr) max-content;
grid-auto-flow:row dense;gap:2px 8px}.rows>svg{grid-column:1/-1;
margin-bottom:4px}.rows>div:empty{display:none}
.cards{grid-template-columns:1fr 1fr}
.card{padding:8px 10px}.card b{font-size:1.15rem}.plot{grid-template-columns:64px minmax(0,1fr)}}
@media print{:root{color-scheme:light;--page:#fff;--card:#f5f6f8;--text:#000;--faint:#444;--line:#bbb;--lane:#e9ecf0;
--k0:#0072b2;--k1:#e69f00;--k2:#009e73;--k3:#cc79a7;--k4:#d55e00;--k5:#56b4e9;--k6:#b8a800;--k7:#8d959e;--k8:#5b4a9e}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}main{max-width:none;padding:0}body{font-size:11pt}
.scroll{overflow:visible}table{font-size:7.5pt}th,td{white-space:normal;padding-right:8px}
tr,.card,.rows>*,figure{break-inside:avoid}h2,h3,.about,.key,caption{break-after:avoid}}
"""
"""Contains no `<`, so it needs no escape."""

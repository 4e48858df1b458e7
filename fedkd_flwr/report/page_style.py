"""The style sheet of the HTML report: light, dark, and on paper."""

STYLE = """
:root{--bg:#f7f8fa;--card:#fff;--ink:#1b2130;--soft:#5b6475;--rule:#dfe3ea;--good:#1a7f4b;--bad:#b42318;--warn:#8a5a00;
--c0:#2563eb;--c1:#d9730d;--c2:#15803d;--c3:#9333ea}
@media (prefers-color-scheme:dark){:root{--bg:#12151c;--card:#1a1f29;--ink:#e6e9ef;--soft:#9aa4b5;--rule:#2d3442;
--good:#4cc38a;--bad:#ff8a80;--warn:#e8b44c;--c0:#7aa7ff;--c1:#f2a65a;--c2:#5fce8c;--c3:#c79bff}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1160px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:17px;margin:0 0 12px}
header p{margin:0;color:var(--soft);overflow-wrap:anywhere}
section{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:18px 20px;margin-top:18px}
.status{font-size:13px;font-weight:600;vertical-align:middle;padding:2px 10px;border-radius:99px;border:1px solid;
color:var(--warn)}
.status.completed{color:var(--good)}.status.failed{color:var(--bad)}
.alert{border-left:4px solid var(--bad);background:var(--card);padding:10px 14px;margin:16px 0 0;overflow-wrap:anywhere}
.note,.small{color:var(--soft)}.small{font-size:13px;font-weight:400;margin:8px 0 0;white-space:nowrap}
.lines{margin:0;padding-left:18px}.lines li{margin:4px 0;overflow-wrap:anywhere}.lines li:first-child{font-weight:600}
.legend-text{color:var(--soft);font-size:13px;margin:8px 0 0}img{max-width:100%;height:auto;background:#fff}
p.small{white-space:normal}
bdi{overflow-wrap:anywhere}
.bad{color:var(--bad);font-weight:600}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px;margin:18px 0 0}
.tiles div{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:12px 14px;display:flex;
flex-direction:column-reverse;justify-content:flex-end}
.tiles dt{color:var(--soft);font-size:13px;line-height:1.35}.tiles dd{margin:0;font-size:24px;font-weight:600}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:22px}
figure{margin:0;min-width:0}figcaption{font-weight:600;margin-bottom:6px}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:12px}
.grid{stroke:var(--rule)}.line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}
.line.c1{stroke-dasharray:9 5}.line.c2{stroke-dasharray:3 5}.line.c3{stroke-dasharray:12 4 3 4}
.dot,.bar{fill:currentColor}.key{display:inline-block;width:14px;height:4px;border-radius:2px;margin-right:6px;
background:currentColor;vertical-align:middle}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 18px;
margin:4px 0 0;padding:0;color:var(--soft);font-size:13px}
.scroll{overflow:auto}.tall{max-height:560px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);font-size:13px;padding-bottom:6px}
th,td{padding:6px 12px 6px 0;text-align:right;border-bottom:1px solid var(--rule);vertical-align:top}
th:first-child{text-align:left;font-weight:500;min-width:10em;overflow-wrap:anywhere}
td{white-space:nowrap}
.words td:last-child,.words th:last-child{text-align:left;white-space:normal;overflow-wrap:anywhere;padding-left:28px;
min-width:18em}
thead th{color:var(--soft);font-size:13px;font-weight:600;position:sticky;top:0;background:var(--card);
white-space:nowrap}
td ul{margin:0;padding-left:18px}
pre{overflow:auto;font:13px/1.45 ui-monospace,Menlo,Consolas,monospace;margin:12px 0 0}
summary{cursor:pointer;font-weight:600}
:focus-visible{outline:2px solid var(--c0);outline-offset:2px}
@media print{:root{--bg:#fff;--card:#fff;--ink:#000;--soft:#444;--rule:#bbb;--c0:#1d4ed8;--c1:#b45309;--c2:#166534;
--c3:#7e22ce;--good:#166534;--bad:#991b1b;--warn:#7a4f00}body{font-size:11px}main{max-width:none;padding:0}
section{border:0;padding:0}.scroll,.tall{overflow:visible;max-height:none}figure,tr,.tiles{break-inside:avoid}
.bar,.key{print-color-adjust:exact;-webkit-print-color-adjust:exact}thead th{position:static}}
"""

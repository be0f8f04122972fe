"""The style sheet of the report page: system font, one accent colour, a light and a dark scheme."""

from __future__ import annotations

STYLE_SHEET = """
:root { color-scheme: light dark; --bg: #ffffff; --ink: #1c2330; --soft: #5d6675; --line: #dfe3e9; --track: #eef1f5;
  --accent: #1f5fd0; --bar: #98a3b3; --loss: #a8442b; --s1: #c8641b; --s2: #6b7686; --s3: #0f8a74; --s4: #9a4fb3; --s5: #a88a10; }
@media (prefers-color-scheme: dark) { :root { --bg: #14181f; --ink: #e6eaf0; --soft: #98a2b2; --line: #2c333f; --track: #222934;
  --accent: #77a8ff; --bar: #667285; --loss: #eb9a80; --s1: #f0a060; --s2: #a4aebc; --s3: #55c7b0; --s4: #cf98e4; --s5: #dcc35a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 48px 28px 72px; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 8px; font-weight: 650; }
h2 { font-size: 20px; margin: 0 0 6px; font-weight: 650; }
h3 { font-size: 15px; margin: 0 0 4px; font-weight: 600; }
p { margin: 0 0 12px; max-width: 74ch; }
section { margin-top: 56px; }
.lead { font-size: 18px; color: var(--soft); }
b { font-weight: 600; }
.muted, .label, .side { color: var(--soft); }
.label { margin: 0; font-size: 14px; }
.gain { color: var(--accent); font-weight: 600; }
.loss { color: var(--loss); font-weight: 600; }
.headline { margin-top: 36px; }
.hero { display: flex; flex-wrap: wrap; gap: 12px 48px; align-items: flex-end; margin-bottom: 18px; }
.hero-side { flex: 1 1 300px; max-width: 460px; padding-bottom: 8px; }
.hero-side .bar { display: block; width: 100%; }
.big { font-size: 76px; line-height: 1.05; font-weight: 680; margin: 0; color: var(--accent); letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.interval { margin: 8px 0 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 20px; margin-top: 24px; }
.fact { border-top: 2px solid var(--line); padding-top: 12px; }
.number { font-size: 28px; font-weight: 620; margin: 0 0 4px; font-variant-numeric: tabular-nums; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(272px, 1fr)); gap: 36px 28px; margin-top: 20px; }
figure { margin: 0; }
.pair { display: flex; gap: 8px; }
.pair > div { flex: 0 1 auto; }
img { display: block; max-width: 100%; border-radius: 4px; outline: 1px solid var(--line); }
img.pixels { width: 128px; image-rendering: pixelated; }
.side { margin: 4px 0 0; font-size: 13px; }
figcaption { margin-top: 6px; font-size: 14px; line-height: 1.45; }
.scroll { overflow-x: auto; margin-top: 14px; }
table { border-collapse: collapse; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); border-bottom: 1px solid var(--line); vertical-align: bottom; }
th, td { padding: 7px 22px 7px 0; }
td { border-bottom: 1px solid var(--line); vertical-align: middle; }
td + td, th + th { text-align: right; }
table.controls { width: 100%; }
table.controls td:nth-child(n+3) { white-space: nowrap; }
table.controls td:last-child { white-space: normal; text-align: left; width: 170px; padding-right: 0; }
table.controls th:last-child, table.plain td + td, table.plain th + th { text-align: left; }
table.plain td { overflow-wrap: anywhere; }
.bar { width: 240px; height: auto; display: block; }
.scale { display: flex; justify-content: space-between; width: 240px; font-size: 12px; color: var(--soft); }
.hero-side .scale { width: 100%; }
.scale i { font-style: normal; }
.bars .bar, .bars .scale { width: 190px; }
.bars td:first-child, .bars td:last-child { white-space: nowrap; }
.track { fill: var(--track); }
.fill { fill: var(--bar); }
.accent .fill { fill: var(--accent); }
.whisker { stroke: var(--ink); stroke-width: 1.5; fill: none; }
.reference { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 2 2; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 32px 36px; margin-top: 18px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 0 48px; }
.columns > section { min-width: 0; }
.chart { width: 100%; height: auto; display: block; }
.chart text { font-size: 12px; fill: var(--soft); font-family: inherit; }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
.series { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
.s1 { stroke: var(--s1); } .s2 { stroke: var(--s2); } .s3 { stroke: var(--s3); } .s4 { stroke: var(--s4); } .s5 { stroke: var(--s5); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0 0 6px; padding: 0; font-size: 13px; }
.key { width: 22px; height: 8px; margin-right: 6px; vertical-align: middle; }
footer { margin-top: 64px; font-size: 14px; }
"""

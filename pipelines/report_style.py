"""The style sheet of a report: light and dark, wide, narrow and printed.

Blue and orange are of the palette of Okabe and Ito (2008), which colour-blind readers can tell
apart; they differ in lightness too, and whatever they say is also said in words or numbers.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfb; --ink: #1c1e21; --muted: #5a5f66; --rule: #dcdcd6; --panel: #f3f3ee;
  --first: #0072b2; --second: #e69f00; --third: #8a9098; --mark: #1c1e21;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --ink: #e3e4e6; --muted: #9ba1a9; --rule: #2f343b; --panel: #1c1f24;
    --first: #4ba6dd; --second: #d99a1c; --third: #767d87; --mark: #f2f2f2;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 68rem;
  background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif;
  overflow-wrap: anywhere;
}
h1, h2, h3 { font-weight: 600; line-height: 1.25; text-wrap: balance; }
h1 { margin: 0.15rem 0 0.6rem; font-size: 1.75rem; letter-spacing: -0.01em; }
h2 { margin: 3rem 0 0.35rem; padding-top: 0.9rem; border-top: 1px solid var(--rule);
  font-size: 1.2rem; }
h3 { margin: 0 0 0.4rem; font-size: 1rem; }
p { margin: 0 0 0.8rem; max-width: 46rem; }
.over, .muted, caption, figcaption, .tile { color: var(--muted); }
.over { margin: 0; font-size: 0.8rem; letter-spacing: 0.08em; text-transform: uppercase; }
.small, figcaption { font-size: 0.87rem; }
code, .code { font: 0.92em ui-monospace, SFMono-Regular, Menlo, "Liberation Mono", monospace; }
.warning { margin: 0 0 0.5rem; padding: 0.5rem 0.8rem; border-left: 3px solid var(--second);
  background: var(--panel); }
table { border-collapse: collapse; width: 100%; font-size: 0.87rem; }
caption { padding: 0 0 0.35rem; text-align: left; font-size: 0.87rem; }
th, td { padding: 0.22rem 0.9rem 0.22rem 0; text-align: left; vertical-align: top; font-weight: 400;
  border-bottom: 1px solid var(--rule); }
thead th { color: var(--muted); vertical-align: bottom; }
th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap;
  overflow-wrap: normal; }
tfoot td, tfoot th { border-bottom: 0; font-weight: 600; }
.facts th { width: 11rem; color: var(--muted); }
.scroll { overflow-x: auto; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.6rem 2.4rem;
  margin-top: 1rem; align-items: start; }
figure { margin: 0; min-width: 0; }
figcaption { margin-top: 0.3rem; }
figure + .scroll { margin-top: 1.6rem; }
figcaption b { color: var(--ink); font-weight: 600; }
.key { margin: 0 0.3em; white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 0.7em; height: 0.7em;
  margin-right: 0.4em; }
.key.one::before { background: var(--first); }
.key.two::before { background: var(--second); }
.key.three::before { background: var(--third); }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit; font-size: 12px; fill: var(--muted); }
svg .label { fill: var(--ink); }
svg .strong { font-weight: 600; }
svg .number { font-variant-numeric: tabular-nums; }
svg .first { fill: var(--first); }
svg .second { fill: var(--second); }
svg .third { fill: var(--third); }
svg .point { fill: var(--paper); stroke: var(--mark); stroke-width: 1; }
svg .whisker { fill: none; stroke: var(--mark); stroke-width: 1.6; }
svg .dots { fill: var(--first); fill-opacity: 0.7; }
svg .curve { fill: none; stroke: var(--first); stroke-width: 1.8; stroke-linejoin: round; }
svg .track { fill: var(--panel); }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .axis { stroke: var(--muted); stroke-width: 1; }
svg .mark { stroke: var(--mark); stroke-width: 1.4; stroke-dasharray: 5 3; }
svg .mark-text { fill: var(--mark); font-weight: 600; }
svg .reference { stroke: var(--muted); stroke-width: 1.2; }
svg .halo { stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; paint-order: stroke;
  fill: var(--ink); }
.cluster { margin-top: 1.4rem; padding-top: 0.9rem; border-top: 1px solid var(--rule); }
.cluster dl { display: flex; flex-wrap: wrap; gap: 0.1rem 1.5rem; margin: 0 0 0.6rem;
  font-size: 0.87rem; }
.cluster dl div { display: flex; gap: 0.4rem; }
dt { color: var(--muted); }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.strips { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0.8rem 2.4rem; }
.strips > :only-child { grid-column: 1 / -1; }
.strip-name { margin: 0 0 0.35rem; font-size: 0.87rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr));
  gap: 0.9rem 0.8rem;
  margin: 0; padding: 0; list-style: none; }
.tiles.pairs { grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1.1rem 2rem; }
.tiles.pairs > li { display: grid; grid-template-columns: 1fr 1fr; gap: 0.5rem; }
.tile { font-size: 0.75rem; line-height: 1.35; min-width: 0; }
.tile img, .tile .blank { display: block; width: 100%; height: 96px; background: var(--panel);
  object-fit: contain; }
.tile .blank { display: grid; place-items: center; padding: 0 0.4rem; text-align: center; }
.tile .caption { display: -webkit-box; margin-top: 0.3rem; max-height: 5.4em; overflow: hidden;
  color: var(--ink); -webkit-box-orient: vertical; -webkit-line-clamp: 4; }
.tile .code { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(5rem, 1fr));
  gap: 0.9rem 0.6rem; margin: 0; padding: 0; list-style: none; }
.images .tile img, .images .tile .blank { height: auto; aspect-ratio: 1; margin-bottom: 2px; }
.images .small-image { image-rendering: pixelated; }
.wide { min-width: 46rem; overflow-wrap: break-word; }
.stack > * + * { margin-top: 1.6rem; }
.scores { margin-top: 0.5rem; }
h3 .muted { font-weight: 400; }
details { margin-top: 1.6rem; }
summary { cursor: pointer; }
pre { margin: 0 0 0.8rem; padding: 0.7rem 0.9rem; overflow-x: auto; background: var(--panel); }
footer { margin-top: 3rem; padding-top: 0.8rem; border-top: 1px solid var(--rule);
  font-size: 0.8rem; }
@media (max-width: 46rem) {
  body { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.4rem; }
  .pair, .strips { grid-template-columns: minmax(0, 1fr); }
  .facts th { width: 8.5rem; }
}
@media print {
  :root { --paper: #fff; --ink: #000; --muted: #444; --rule: #ccc; --panel: #f3f3f3; }
  figure, .cluster, li { break-inside: avoid; }
}
"""

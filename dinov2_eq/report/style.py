"""The style sheet of the pages: one column of text, panels that wrap, light and dark mode."""

CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #23272e; --soft: #656c77; --line: #dcdfe3; --wash: #f5f6f7; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16191d; --ink: #dde1e6; --soft: #98a0ab; --line: #363b42; --wash: #1f2328; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 0 20px 64px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header { padding: 44px 0 12px; }
header p, .claim { max-width: 70ch; margin: 0; }
h1 { margin: 4px 0 10px; font-size: clamp(26px, 5vw, 36px); line-height: 1.15; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { margin: 0 0 6px; font-size: 22px; line-height: 1.25; }
h3 { margin: 26px 0 8px; font-size: 16px; }
h4 { margin: 0 0 2px; font-size: 14px; }
.kicker, .claim, footer, figcaption, small { color: var(--soft); }
.kicker { font-size: 14px; }
nav { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 4px 20px; padding: 10px 0;
  background: var(--paper); border-bottom: 1px solid var(--line); font-size: 14px; }
section { padding-top: 44px; scroll-margin-top: 32px; }
.claim { margin-bottom: 18px; }
.verdict { margin: 0 0 12px; font-size: 19px; line-height: 1.4; }
.badge { display: inline-block; min-width: 1.55em; padding: 0 .35em; border-radius: 4px; color: #fff;
  text-align: center; font-size: .8em; line-height: 1.55; font-weight: 700; }
header a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: 3px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 28px 26px; }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption { font-size: 13px; line-height: 1.4; }
.last { display: block; margin-top: 3px; color: var(--ink); font-variant-numeric: tabular-nums; }
.last span { margin-right: .7em; white-space: nowrap; }
.columns { display: flex; flex-wrap: wrap; gap: 0 28px; }
.columns > div { max-width: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 18px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; }
.runs td, .runs thead th:not(:first-child) { min-width: 15ch; max-width: 34ch; }
.runs th:first-child { position: sticky; left: 0; background: var(--paper); }
.panels th, .panels td { padding-right: 10px; }
.setting td { color: var(--soft); }
tbody th { color: var(--soft); font-weight: 400; white-space: nowrap; }
thead th { font-weight: 600; vertical-align: bottom; }
.differs th::after { content: " \\25cf"; font-size: 9px; vertical-align: 2px; color: var(--ink); }
.differs td { font-weight: 600; }
.group th { padding-top: 18px; font-weight: 600; color: var(--ink); }
table.pictures { line-height: 1.3; }
.pictures th, .pictures td { padding: 4px 6px 4px 0; border: 0; font-size: 12px; white-space: nowrap; }
.pictures td[rowspan]:nth-child(3n) { padding-right: 20px; }
.pictures .first td, .pictures .first th { padding-top: 12px; }
.pictures tbody th { vertical-align: middle; padding-right: 12px; }
.pictures small { display: block; font-size: 12px; }
.pictures img { display: block; width: 96px; height: 96px; border-radius: 2px; }
.columns .pictures img { width: 84px; height: 84px; }
img.enlarged { image-rendering: pixelated; }
details { margin-top: 22px; }
summary { cursor: pointer; font-size: 14px; font-weight: 600; }
.missing { margin: 14px 0 0; padding: 8px 12px; background: var(--wash); border-radius: 4px; font-size: 14px;
  overflow-wrap: anywhere; }
code { font: .92em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { margin-top: 64px; padding-top: 14px; border-top: 1px solid var(--line); font-size: 13px; }
"""

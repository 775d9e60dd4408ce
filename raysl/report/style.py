"""The CSS of the reports: one column, for phones and desktops, light and dark."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2327; --soft: #5b666e; --line: #d9dee2;
  --paper: #fff; --shade: #f4f6f7; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ea; --soft: #a3adb4; --line: #3a444b; --paper: #14191c; --shade: #1f262a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 900px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 12px; padding-top: 16px; border-top: 1px solid var(--line); }
.lead { font-size: 1.1rem; margin: 0; overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: .9rem; }
.path { overflow-wrap: anywhere; }
img { display: block; max-width: 100%; height: auto; margin: 16px 0 0; background: #fff;
  border-radius: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 6px 16px 6px 0;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
.numbers { width: 100%; }
.numbers td, .numbers th + th { text-align: right; padding-right: 4px; padding-left: 12px; }
.numbers td { white-space: nowrap; }
.numbers tr:nth-child(2) { background: var(--shade); }
.even tr:nth-child(2) { background: none; }
.trials { border-collapse: separate; border-spacing: 0; font-size: .9rem; white-space: nowrap; }
.trials th, .trials td { padding: 4px 8px; }
.trials th[scope=col] { vertical-align: bottom; white-space: normal; }
.trials th:first-child { position: sticky; left: 0; background: var(--paper); padding-left: 0; }
.trials .n { text-align: right; }
.trials tr.best > * { background: var(--shade); font-weight: 600; }
@media (max-width: 560px) {
  .numbers, .trials { font-size: .85rem; }
  .numbers td, .numbers th + th { padding-left: 8px; }
  .wide img { max-width: none; }
}
pre { overflow-x: auto; padding: 12px; background: var(--shade); border-radius: 6px;
  font-size: .85rem; line-height: 1.45; }
.command { white-space: pre-wrap; overflow-wrap: anywhere; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
summary { cursor: pointer; padding: 6px 0; }
"""

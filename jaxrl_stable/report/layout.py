"""The frame of every page: one HTML file with its style, which cannot load or run anything."""

from __future__ import annotations

from collections.abc import Iterable

from jaxrl_stable.report.text import escape

POLICY = "default-src 'none'; style-src 'unsafe-inline'"

CSS = """
:root{--paper:#fff;--card:#f6f7f9;--ink:#24292e;--soft:#667080;--line:#d4d8de;--warm:217,121,47;
--cool:58,127,200;--good:#22805f;--bad:#b5333f;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--paper:#15181d;--card:#1d2127;--ink:#e3e6ea;--soft:#98a2b0;
--line:#363c45;--good:#4cc29a;--bad:#f0808a}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:28px 20px 60px;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:25px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:20px;margin:44px 0 12px}
p{margin:0 0 12px;max-width:75ch}
small,.soft,th,dt{color:var(--soft);font-size:13px;font-weight:400}
.grid{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr))}
.grid.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr))}
.cards{display:flex;flex-wrap:wrap;gap:12px;margin:20px 0}
.cards div{flex:1 0 auto;min-width:130px}
.cards div,figure,article{background:var(--card);border-radius:10px;padding:12px 14px;margin:0}
.cards b{display:block;font-size:20px;font-variant-numeric:tabular-nums;line-height:1.4}
figure svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
.note{margin-top:10px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
.other{width:auto}
th,td{text-align:left;padding:6px 14px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
th.n,td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
code,pre{font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
td code{white-space:nowrap}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:2px 0 10px;max-height:26em;overflow-y:auto}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 16px;margin:12px 0 24px;
font-size:14px}
dd{margin:0;overflow-wrap:anywhere}
article{margin-bottom:12px}
details{margin-bottom:12px}.good{color:var(--good)}.bad{color:var(--bad)}
summary{cursor:pointer}
.t{border-radius:3px}
.t.clipped{text-decoration:underline 2px var(--bad);text-underline-offset:3px}
.t.routed{box-shadow:inset 0 -1px var(--ink),inset 0 1px var(--ink)}
.t:hover{outline:1px solid var(--ink)}
.t:hover::after{content:attr(data-t);position:fixed;left:50%;bottom:16px;transform:translateX(-50%);
background:var(--ink);color:var(--paper);padding:6px 14px;border-radius:8px;
white-space:pre;z-index:9}
@media(max-width:600px){body{padding:18px 12px 50px}
.scroll tr{display:grid;grid-template-columns:1fr auto 36px;border-bottom:1px solid var(--line)}
.scroll td,.scroll th{border:0;padding:4px 8px 4px 0}.scroll td:last-child{grid-column:1/-1}
.scroll th:last-child,.scroll td:last-child:empty{display:none}
dl{grid-template-columns:1fr}dd{margin-bottom:6px}.hide{display:none}}
"""


def document(title: str, body: Iterable[str], style: str = "") -> str:
    """Returns a complete HTML page.

    Args:
      title: plain text; it is escaped here.
      body: parts of the body, as HTML.
      style: additional CSS.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}{style}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )

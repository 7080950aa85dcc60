"""The frame of a run's page: style for light and dark, wide and narrow, and the slider's few lines of script."""

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>TITLE</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<style>
:root{--ink:#1b1b1f;--paper:#fff;--soft:#6b7280;--line:#e5e5ea;--box:#f6f6f8;--neon:#c2185b;--good:#146c43}
@media (prefers-color-scheme:dark){:root{--ink:#ececf1;--paper:#16161a;--soft:#a3abb8;--line:#33333c;--box:#202027;
--neon:#ff6fa5;--good:#5fd39b}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:62rem;margin:2rem auto;
padding:0 1rem}
h1{font-weight:650;letter-spacing:-.01em;margin-bottom:0}h2{margin-top:2.2rem;font-size:1.15rem}
.small,figcaption,td small{color:var(--soft);font-size:.9rem}
.verdict{font-size:1.2rem;border-left:.3rem solid var(--soft);padding-left:.8rem;overflow-wrap:anywhere}
.helps,.edge{border-color:var(--good)}.worse,.failed{border-color:var(--neon)}
.plot{max-width:100%;height:auto}.wide{overflow-x:auto}
table{border-collapse:collapse}td,th{padding:.3rem .9rem .3rem 0;text-align:left;border-bottom:1px solid var(--line);
white-space:nowrap}th{font-weight:500;font-size:.85rem}
.grids{display:flex;gap:1.2rem;flex-wrap:wrap}figure{margin:0}.grids figure{flex:1 1 14rem;max-width:20rem}
.pixels{width:100%;height:auto;image-rendering:pixelated}.slides{max-width:28rem}
.slides input{width:60%;vertical-align:middle;margin:0 .6rem;accent-color:var(--neon)}
pre{overflow:auto;background:var(--box);padding:1rem;font-size:.8rem}code{overflow-wrap:anywhere}
</style></head><body>BODY<script>
const slider = document.getElementById("w");
if (slider) {
  const frames = JSON.parse(document.getElementById("frames").textContent);
  slider.addEventListener("input", () => {
    const frame = frames[slider.value], picture = document.getElementById("slide");
    picture.src = frame.src;
    picture.alt = "Samples at " + frame.label;
    document.getElementById("label").textContent = frame.label;
  });
}
</script></body></html>
"""

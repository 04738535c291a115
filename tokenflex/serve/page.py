"""The page to try a model on: plain HTML, one style and one script of its own, and a policy under which it can reach nothing else.

It asks `/v1/models` and `/v1/chat/completions` beside it. Whatever it shows of an answer or an error is set as text, never as HTML.
"""

import base64
import hashlib

STYLE = """
:root { color-scheme:light dark; --ink:#1c2330; --soft:#5d6778; --line:#dfe4ec; --paper:#fff; --ground:#f4f6f9; --bad:#b3261e; --mark:#1f6feb }
@media (prefers-color-scheme:dark) { :root { --ink:#e6e9ef; --soft:#9aa5b5; --line:#323a47; --paper:#1b2029; --ground:#12161c; --bad:#ff8a80; --mark:#6ea8ff } }
* { box-sizing:border-box } body { margin:0; background:var(--ground); color:var(--ink); font:15px/1.5 system-ui,sans-serif }
main { max-width:960px; margin:0 auto; padding:20px 16px 40px } h1 { font-size:22px; margin:0; overflow-wrap:anywhere }
p { margin:2px 0 12px; color:var(--soft) } form,section { background:var(--paper); border:1px solid var(--line); border-radius:8px; padding:12px 14px }
form { display:grid; grid-template-columns:1fr 2fr auto; gap:10px 14px; align-items:end } label { display:block; font-size:13px; color:var(--soft) }
input { width:100%; font:inherit; color:inherit } input[type=text],input[type=password] { padding:5px 8px; border:1px solid var(--line); border-radius:6px; background:var(--ground) }
button { font:inherit; padding:6px 18px; border:0; border-radius:6px; background:var(--mark); color:#fff; cursor:pointer } button:disabled { opacity:.5 }
#sides { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr)); gap:12px; margin-top:12px }
output { display:block; min-height:1.5em; overflow-wrap:anywhere } .count { font-weight:700; color:var(--ink) } .answer { font-size:19px; font-weight:600; white-space:pre-wrap; min-height:1.5em; margin-top:8px }
.bad { color:var(--bad); font-size:15px; font-weight:400 } .figures,.token { color:var(--soft); font-size:13px; min-height:1.5em } canvas { display:block; max-width:100%; margin-top:8px; border-radius:4px }
[hidden] { display:none!important }
"""

SCRIPT = """
'use strict';
const byId = id => document.getElementById(id);
const LONGEST = 420, sides = [];
let model = null, picture = null, url = '';

async function asked(path, body) {
  const headers = {'Content-Type': 'application/json'}, key = byId('key').value;
  if (key) headers.Authorization = 'Bearer ' + key;
  let answer;
  try { answer = await fetch(path, body ? {method: 'POST', headers, body: JSON.stringify(body)} : {headers}); }
  catch { throw new Error('the server does not answer; is it still running?'); }
  const found = await answer.json();
  if (answer.status === 401) byId('keys').hidden = false;
  if (!answer.ok) throw new Error(found.error.message);
  return found;
}

function stops(about) {
  const trained = about.trained_num_visual_tokens, last = Math.max(...trained), all = new Set(trained);
  for (let side = 1; side * side < last; side++) if (side * side >= Math.min(...trained)) all.add(side * side);
  const counts = [...all].sort((a, b) => a - b);
  return about.default_effort === null ? counts : ['auto', ...counts];
}

class Side {
  constructor(node, name, start) {
    this.part = part => node.querySelector('.' + part);
    this.stops = stops(model);
    this.slider = this.part('slider');
    this.slider.max = this.stops.length - 1;
    this.slider.value = start === 'last' ? this.stops.length - 1 : 0;
    this.slider.setAttribute('aria-label', name);
    this.part('effort').value = model.default_effort ?? 0;
    this.slider.oninput = this.part('effort').oninput = () => this.tell();
    this.part('grid').onpointermove = event => this.point(event);
    this.part('grid').onpointerleave = () => this.draw(null);
    this.seen = null;
    this.tell();
  }
  get count() { return this.stops[this.slider.value]; }
  tell() {
    const known = this.count === 'auto' || model.trained_num_visual_tokens.includes(this.count);
    this.part('count').textContent = this.count === 'auto'
      ? 'auto, effort ' + (+this.part('effort').value).toFixed(2) : this.count + (known ? '' : ' (never seen in training)');
    this.part('efforts').hidden = this.count !== 'auto';
  }
  async ask(question) {
    const answer = this.part('answer');
    this.clear();
    answer.textContent = '...';
    try {
      const content = picture ? [{type: 'image_url', image_url: {url}}] : [];
      const body = {model: model.id, messages: [{role: 'user', content: [...content, {type: 'text', text: question}]}]};
      if (picture) body.num_visual_tokens = this.count;
      if (picture && this.count === 'auto') body.effort = +this.part('effort').value;
      body.max_tokens = Math.min(64, model.limits.max_new_tokens);
      const begin = performance.now(), found = await asked('/v1/chat/completions', body), whole = (performance.now() - begin) / 1000;
      const {usage, tokenflex} = found, visual = usage.prompt_tokens_details.image_tokens;
      answer.textContent = found.choices[0].message.content || '(an empty answer)';
      this.part('figures').textContent = visual + ' visual tokens of ' + usage.prompt_tokens + ' in the prompt, '
        + usage.completion_tokens + ' written; ' + whole.toFixed(2) + ' s (image and prompt ' + tokenflex.seconds.prompt.toFixed(2)
        + ', answer ' + tokenflex.seconds.answer.toFixed(2) + ')';
      this.seen = tokenflex.images[0] ?? null;
    } catch (error) { answer.textContent = error.message; answer.classList.add('bad'); }
    this.draw(null);
  }
  clear() {
    this.seen = null;
    this.part('answer').classList.remove('bad');
    for (const name of ['answer', 'figures', 'token']) this.part(name).textContent = '';
    this.draw(null);
  }
  window(tile, row, column) {
    const {tiles: [down, across], row_windows, column_windows} = this.seen, canvas = this.part('grid');
    const top = Math.floor(tile / across), left = tile % across, height = canvas.height / down, width = canvas.width / across;
    const [y0, y1] = row_windows[row], [x0, x1] = column_windows[column];
    return [(left + x0) * width, (top + y0) * height, (x1 - x0) * width, (y1 - y0) * height];
  }
  draw(chosen) {
    const canvas = this.part('grid');
    canvas.hidden = !picture;
    if (!picture) return;
    const scale = LONGEST / Math.max(picture.width, picture.height), pen = canvas.getContext('2d');
    canvas.width = Math.max(1, Math.round(picture.width * scale));
    canvas.height = Math.max(1, Math.round(picture.height * scale));
    pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
    if (!this.seen) return;
    const {tiles: [down, across], rows, columns} = this.seen;
    for (const [style, width] of [['#0008', 3], ['#fff', 1]]) {
      pen.strokeStyle = style; pen.lineWidth = width;
      for (let tile = 0; tile < down * across; tile++)
        for (let row = 0; row < rows; row++)
          for (let column = 0; column < columns; column++) pen.strokeRect(...this.window(tile, row, column));
    }
    if (!chosen) return;
    pen.fillStyle = '#ffd60080'; pen.strokeStyle = '#ffd600'; pen.lineWidth = 3;
    pen.fillRect(...this.window(...chosen)); pen.strokeRect(...this.window(...chosen));
  }
  point(event) {
    if (!this.seen) return;
    const {tiles: [down, across], rows, columns, has_thumbnail, num_visual_tokens} = this.seen;
    const box = this.part('grid').getBoundingClientRect(), place = (value, number) => Math.min(number - 1, Math.max(0, Math.floor(value * number)));
    const y = (event.clientY - box.top) / box.height * down, x = (event.clientX - box.left) / box.width * across;
    const top = place(y / down, down), left = place(x / across, across), row = place(y - top, rows), column = place(x - left, columns);
    const tile = top * across + left, number = (tile * rows + row) * columns + column + 1;
    this.part('token').textContent = 'token ' + number + ' of ' + num_visual_tokens + ': row ' + (row + 1) + ', column ' + (column + 1)
      + (down * across > 1 ? ' of tile ' + (tile + 1) : '') + (has_thumbnail ? '; the last ' + rows * columns + ' see the whole image' : '');
    this.draw([tile, row, column]);
  }
}

async function take(file) {
  picture = null; url = '';
  byId('problem').textContent = '';
  for (const side of sides) side.clear();
  if (!file) return;
  try {
    if (file.size * 4 / 3 + 2000 > model.limits.max_body_bytes) throw new Error(file.name + ': ' + file.size + ' bytes; at most '
      + Math.floor((model.limits.max_body_bytes - 2000) * 3 / 4) + ' are taken');
    const data = await new Promise((done, failed) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result); reader.onerror = () => failed(new Error(file.name + ': cannot be read'));
      reader.readAsDataURL(file);
    });
    picture = await createImageBitmap(file).catch(() => { throw new Error(file.name + ': no image; wanted JPEG, PNG or WebP'); });
    url = data;
  } catch (error) { byId('problem').textContent = error.message; byId('image').value = ''; }
  for (const side of sides) side.clear();
}

async function start() {
  try { model = (await asked('/v1/models')).data[0]; }
  catch (error) { byId('problem').textContent = error.message; return; }
  byId('problem').textContent = '';
  byId('name').textContent = model.id;
  document.title = model.id;
  byId('trained').textContent = 'trained at ' + model.trained_num_visual_tokens.join(', ') + ' visual tokens per image'
    + (model.default_effort === null ? '; it has no router, so there is no "auto"' : '');
  byId('sides').replaceChildren();
  sides.length = 0;
  for (const [name, begin] of [['visual tokens, left', 'first'], ['visual tokens, right', 'last']]) {
    byId('sides').append(byId('side').content.cloneNode(true));
    sides.push(new Side(byId('sides').lastElementChild, name, begin));
  }
  byId('ask').disabled = false;
}

byId('image').onchange = event => take(event.target.files[0]);
byId('key').onchange = start;
byId('form').onsubmit = async event => {
  event.preventDefault();
  if (byId('ask').disabled) return;
  byId('ask').disabled = true;
  for (const side of sides) await side.ask(byId('question').value);  // one after another, so that neither waits for the other
  byId('ask').disabled = false;
};
start();
"""

BODY = """
<main><h1 id="name">...</h1><p id="trained"></p>
<form id="form"><label>image <input type="file" id="image" accept="image/jpeg,image/png,image/webp"></label>
<label>question <input type="text" id="question" required maxlength="4000" autocomplete="off"></label><button id="ask" disabled>Ask</button>
<label id="keys" hidden>API key of this server <input type="password" id="key" autocomplete="off"></label></form>
<output id="problem" class="bad"></output><div id="sides"></div>
<template id="side"><section><label>visual tokens: <span class="count"></span><input type="range" class="slider" min="0" step="1"></label>
<label class="efforts">effort, from few tokens to many<input type="range" class="effort" min="0" max="1" step="0.01"></label>
<output class="answer"></output><output class="figures"></output><canvas class="grid" hidden></canvas><output class="token"></output></section></template></main>
"""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = (
    f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; connect-src 'self'; img-src data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""This page's own style and script and the server that it came from: nothing else runs, loads or is asked."""

PAGE = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    f'<title>TokenFLEX</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body>{BODY}'
    f"<script>{SCRIPT}</script></body></html>"
)
"""What `/` answers with."""
PAGE_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""What goes with it."""

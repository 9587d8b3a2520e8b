'use strict';
// Reads /v1/cluster, its timeline and events, /metrics and, with an administrator's key, /admin/requests of
// the coordinator that serves this page, once a second, and talks to /v1/chat/completions. No library,
// nothing from elsewhere.
const $ = (id) => document.getElementById(id);
const HISTORY = 300, SHOWN = 50;
const state = { key: sessionStorage.getItem('millrace-key') || '', paused: false, model: '', last: null,
  series: {}, passages: [], timelineNow: 0, after: 0, events: [], heard: 0, plan: '', busy: [], requests: [], sees: true, open: '', chat: [], answering: null };

// ---- asking the coordinator
class Denied extends Error {}
function call(path, options = {}) {
  const headers = { authorization: `Bearer ${state.key}`, ...options.headers };
  return fetch(path, { ...options, headers, cache: 'no-store' });
}
async function ask(path, options) {
  const response = await call(path, options);
  if (response.status === 401 || response.status === 403) throw new Denied(await message(response));
  if (!response.ok) throw new Error(await message(response));
  return response;
}
async function message(response) {
  const text = await response.text();
  try { return JSON.parse(text).error.message; } catch { return text || `HTTP ${response.status}`; }
}

// ---- numbers
const number = (x, digits = 1) => x == null || !isFinite(x) ? '–'
  : x >= 1000 ? Math.round(x).toLocaleString('en') : x >= 100 ? x.toFixed(0) : x.toFixed(digits);
const time = (s) => s == null || !isFinite(s) ? '–' : s < 1e-3 ? `${number(s * 1e6, 0)} µs`
  : s < 1 ? `${number(s * 1e3)} ms` : `${number(s, 2)} s`;
const bytes = (b) => b >= 2 ** 30 ? `${number(b / 2 ** 30)} GiB` : `${number(b / 2 ** 20)} MiB`;
const count = (n, what) => `${number(n, 0)} ${what}${n === 1 ? '' : 's'}`;
const percent = (x) => x == null || !isFinite(x) ? '–' : `${Math.round(100 * x)} %`;

// Prometheus' text: sums of counters, buckets of histograms.
function parseMetrics(text) {
  const found = {};
  for (const line of text.split('\n')) {
    const match = /^([a-z_0-9]+)(\{[^}]*\})? (\S+)/.exec(line);
    if (!match) continue;
    const [, name, labels, value] = match;
    const le = /le="([^"]+)"/.exec(labels || '');
    const into = found[name] ||= { sum: 0, buckets: new Map() };
    if (le) into.buckets.set(le[1], (into.buckets.get(le[1]) || 0) + Number(value));
    else into.sum += Number(value);
  }
  return found;
}
function quantile(now, before, name, q) {
  const buckets = now[`${name}_bucket`]?.buckets, old = before?.[`${name}_bucket`]?.buckets;
  if (!buckets) return null;
  const all = [...buckets].map(([le, n]) => [le === '+Inf' ? Infinity : Number(le), n - (old?.get(le) || 0)]);
  const total = all.at(-1)?.[1] || 0;
  if (!total) return null;
  let below = [0, 0];
  for (const [le, n] of all) {
    if (n >= q * total) return le === Infinity ? below[0]
      : below[0] + (q * total - below[1]) / (n - below[1]) * (le - below[0]);
    below = [le, n];
  }
  return null;
}

// ---- the round of a second
async function tick() {
  if ($('login').open) return;
  if (!state.key) return login('');
  try {
    if (!state.model) {
      state.model = (await (await ask('v1/models')).json()).data[0]?.id || '';
      $('model').textContent = state.model;
    }
    const [status, text, timeline, chronicle, requests] = await Promise.all([
      ask('v1/cluster').then((r) => r.json()), ask('metrics').then((r) => r.text()),
      ask(`v1/cluster/timeline?after=${state.after}`).then((r) => r.json()),
      ask(`v1/cluster/events?after=${state.heard}`).then((r) => r.json()),
      // Not for every key: one that may not is not asked again.
      state.sees && call('admin/requests').then((r) => r.ok ? r.json() : r.status === 403 ? null : { data: [] })]);
    hear(chronicle);
    state.sees = Boolean(requests);
    state.requests = requests && requests.data.sort((a, b) => b.stuck - a.stuck || b.age_seconds - a.age_seconds);
    show(status, parseMetrics(text), timeline);
  } catch (error) {
    if (error instanceof Denied) return login(error.message);
    pill(`no answer: ${error.message}`, 'bad');
  }
}
function pill(text, kind) { $('state').textContent = text; $('state').className = `pill ${kind}`; }

function show(status, metrics, timeline) {
  const at = performance.now() / 1000, before = state.last;
  state.last = { at, status, metrics };
  state.after = timeline.last;
  state.timelineNow = timeline.now;
  state.passages = state.passages.concat(timeline.passages).slice(-4096);
  pill(status.ready ? 'serving' : status.detail || 'starting', status.ready ? 'good' : 'bad');
  const seconds = before ? at - before.at : null;
  const rate = (field) => seconds ? Math.max(0, status[field] - before.status[field]) / seconds : null;
  const same = before && before.status.epoch === status.epoch;
  state.busy = status.stages.map((stage, i) => {
    const old = same && before.status.stages[i];
    const wall = old ? stage.wall_seconds - old.wall_seconds : 0;
    // Nodes report several times a second: between two reports the last share stands.
    return wall > 0 ? (stage.busy_seconds - old.busy_seconds) / (wall * Math.max(1, stage.threads)) : state.busy[i];
  });
  const point = {
    'tokens/s': rate('generation_tokens'), 'prompt tokens/s': rate('prompt_tokens'),
    'requests': status.running + status.waiting, 'KV cache': status.kv_blocks ? status.kv_blocks_used / status.kv_blocks : 0,
    'time to first token': quantile(metrics, before?.metrics, 'millrace_time_to_first_token_seconds', .5),
    'between tokens': quantile(metrics, before?.metrics, 'millrace_inter_token_latency_seconds', .5),
  };
  for (const [name, value] of Object.entries(point)) {
    const series = state.series[name] ||= [];
    series.push(value);
    if (series.length > HISTORY) series.shift();
  }
  if (!state.paused) draw();
}

// ---- what happened, and the plan
function hear({ last, events, plan }) {
  // A coordinator that was started anew counts from 1.
  if (last < state.heard) state.events = [];
  if (last !== state.heard || plan !== state.plan) state.dirty = true;
  state.heard = last;
  state.plan = plan;
  state.events = state.events.concat(events).slice(-256);
}
function drawEvents() {
  if (!state.dirty) return;
  state.dirty = false;
  const [help, rest] = state.plan.split('\n').reduce(([a, b], line) => /^ *(would help most|then):/.test(line)
    ? [[...a, line.trim()], b] : [a, [...b, line]], [[], []]);
  $('plan').textContent = rest.join('\n').trim();
  if (state.plan) $('help').textContent = help.length ? help.join('; ') : 'Nothing that the planner knows would help much.';
  $('events').replaceChildren(...state.events.toReversed().map((event) => {
    const at = new Date(event.at_ms);
    return element('li', { class: event.kind }, element('time', { datetime: at.toISOString(), text: at.toLocaleTimeString() }),
      element('b', { text: event.kind }), element('span', { text: event.text }));
  }));
  if (!state.events.length) $('events').append(element('li', { class: 'muted', text: 'Nothing yet.' }));
}

// ---- drawing
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) name === 'text' ? made.textContent = value : made.setAttribute(name, value);
  made.append(...children);
  return made;
}
function draw() {
  if (!state.last) return;
  drawTiles(); drawMap(); drawTimeline(); drawCurves(); drawRequests(); drawEvents();
}
function drawTiles() {
  const { status } = state.last, now = (name) => state.series[name]?.at(-1);
  const cached = status.prefix_query_tokens ? status.prefix_hit_tokens / status.prefix_query_tokens : null;
  const tiles = [['tokens per second', number(now('tokens/s'))], ['prompt tokens per second', number(now('prompt tokens/s'))],
    ['requests running', status.running], ['requests waiting', status.waiting], ['KV cache in use', percent(now('KV cache'))],
    ['first token, median', time(now('time to first token'))], ['between tokens, median', time(now('between tokens'))],
    ['prompts found in cache', percent(cached)]];
  $('tiles').replaceChildren(...tiles.map(([name, value]) =>
    element('div', { class: 'tile' }, element('b', { text: value }), element('span', { text: name }))));
}
function drawMap() {
  const { status } = state.last, parts = [];
  const busiest = state.busy.reduce((best, b, i) => (b || 0) > (state.busy[best] || 0) ? i : best, 0);
  status.stages.forEach((stage, i) => {
    const layers = stage.end_layer > stage.first_layer ? `layers ${stage.first_layer}–${stage.end_layer - 1}` : 'no layers';
    const ends = [stage.embed && 'embedding', stage.head && 'head'].filter(Boolean).join(', ');
    const meter = element('div', { class: 'meter', role: 'meter', 'aria-label': 'busy', 'aria-valuenow': Math.round(100 * (state.busy[i] || 0)) }, element('i'));
    meter.firstChild.style.width = percent(Math.min(1, state.busy[i] || 0)).replace(' ', '');
    parts.push(element('div', { class: `stage${i === busiest && status.stages.length > 1 ? ' slowest' : ''}` },
      element('b', { text: stage.node_name }),
      element('small', { text: `stage ${i} · ${layers}${ends ? ` · ${ends}` : ''}` }), meter,
      element('small', { text: `${percent(state.busy[i])} busy · ${count(stage.threads, 'thread')} · ${bytes(stage.weight_bytes)}` })));
    if (i + 1 < status.stages.length) parts.push(element('div', { class: 'link' },
      `→`, element('br'), stage.round_trip == null ? '' : `${time(stage.round_trip)} there and back`, element('br'), `${stage.credits} credits`));
  });
  if (!parts.length) parts.push(element('p', { class: 'muted', text: status.detail || 'no pipeline yet' }));
  $('map').replaceChildren(...parts);
  const spare = status.nodes - status.stages.length;
  const balance = state.busy.length > 1 && state.busy.every((b) => b != null) && Math.max(...state.busy) > .2
    ? `${status.stages[busiest].node_name} is the busiest stage; the others could take ${percent(1 - state.busy.reduce((a, b) => a + b) / state.busy.length / Math.max(...state.busy))} more of its kind of work. ` : '';
  $('advice').textContent = `${balance}${count(status.nodes, 'node')} joined${spare > 0 ? `, ${spare} standing by` : ''} · epoch ${status.epoch}.`;
}
const colour = (id) => `hsl(${(id * 47) % 360} 62% 52%)`;
function canvas(target) {
  const scale = window.devicePixelRatio || 1, width = target.clientWidth, height = target.height0 ||= target.height;
  target.width = width * scale; target.height = height * scale; target.style.height = `${height}px`;
  const context = target.getContext('2d');
  context.scale(scale, scale);
  context.clearRect(0, 0, width, height);
  return [context, width, height];
}
// When each stage had the micro-batch: from its return backwards; what neither stages nor hops took is
// the coordinator's links, half before and half after.
function intervals(passage) {
  const spent = passage.stages.reduce((sum, s) => sum + s.hop + s.wait + s.step, 0);
  let at = passage.ended - passage.round_trip + Math.max(0, passage.round_trip - spent) / 2;
  return passage.stages.map((s) => {
    const begin = at + s.hop + s.wait;
    at = begin + s.step;
    return [begin, at];
  });
}
function drawTimeline() {
  const target = $('timeline'), stages = state.last.status.stages.length;
  target.height0 = Math.max(1, stages) * 30 + 26;
  const [context, width] = canvas(target), style = getComputedStyle(document.documentElement);
  const span = Number($('window').value), left = width < 500 ? 40 : 110, rows = 30;
  const newest = state.passages.at(-1)?.ended ?? state.timelineNow;
  const end = Math.max(state.timelineNow - newest < span ? newest : state.timelineNow, span), x = (t) => left + (t - end + span) / span * (width - left);
  state.boxes = [];
  const inside = state.passages.filter((p) => p.ended > end - span && p.stages.length === stages), busy = Array(stages).fill(0);
  context.font = '12px system-ui, sans-serif';
  for (let i = 0; i < stages; i++) {
    context.fillStyle = style.getPropertyValue('--bubble');
    context.fillRect(left, i * rows + 4, width - left, rows - 8);
    context.fillStyle = style.getPropertyValue('--text');
    context.fillText(width < 500 ? `${i}` : state.last.status.stages[i].node_name.slice(0, 15), 2, i * rows + 20);
  }
  for (const passage of inside) intervals(passage).forEach(([begin, stop], i) => {
    const from = Math.max(left, x(begin)), to = Math.min(width, x(stop));
    busy[i] += Math.max(0, Math.min(stop, end) - Math.max(begin, end - span));
    if (to <= left) return;
    context.fillStyle = colour(passage.id);
    context.fillRect(from, i * rows + 4, Math.max(1, to - from - .5), rows - 8);
    state.boxes.push({ from, to, row: i, passage });
  });
  context.fillStyle = style.getPropertyValue('--muted');
  for (let k = 0; k <= 4; k++) {
    if (width < 500 && k % 2) continue;
    const label = k === 4 ? 'now' : `−${time(span * (4 - k) / 4)}`;
    context.textAlign = k === 4 ? 'right' : 'left';
    context.fillText(label, left + k / 4 * (width - left), stages * rows + 16);
  }
  context.textAlign = 'left';
  const share = busy.map((b) => percent(Math.min(1, b / span)));
  $('timeline-text').textContent = !inside.length ? 'No micro-batch in this window: the pipeline is idle.'
    : `${inside.length} micro-batches, one colour each; grey is a stage that waits. Computing: ${share.map((s, i) => `stage ${i} ${s}`).join(', ')}.`;
}
const CURVES = { 'tokens/s': number, 'prompt tokens/s': number, 'requests': (x) => number(x, 0), 'KV cache': percent, 'time to first token': time, 'between tokens': time };
function drawCurves() {
  const style = getComputedStyle(document.documentElement);
  for (const [name, format] of Object.entries(CURVES)) {
    const id = `curve-${name.replace(/[^a-z]/g, '')}`;
    if (!$(id)) $('curves').append(element('figure', {}, element('figcaption', {}, element('span', { text: name }), element('b')), element('canvas', { id, height: 70, role: 'img', 'aria-label': name })));
    const target = $(id), series = state.series[name] || [], [context, width, height] = canvas(target);
    const most = Math.max(...series.map((v) => v || 0), name === 'KV cache' ? 1 : 1e-9);
    target.previousSibling.lastChild.textContent = `${format([...series].reverse().find((v) => v != null))} · at most ${format(most)}`;
    context.strokeStyle = style.getPropertyValue('--line');
    context.strokeRect(.5, .5, width - 1, height - 1);
    context.strokeStyle = style.getPropertyValue('--accent');
    context.lineWidth = 1.6;
    context.beginPath();
    let pen = false;
    series.forEach((value, i) => {
      if (value == null) { pen = false; return; }
      const px = width - (series.length - 1 - i) * width / (HISTORY - 1), py = height - 3 - value / most * (height - 8);
      pen ? context.lineTo(px, py) : context.moveTo(px, py);
      pen = true;
    });
    context.stroke();
  }
}

function drawRequests() {
  // What is chosen with the keyboard stays chosen, and what is being pressed stays where it is.
  if ($('requests').matches(':active')) return;
  const chosen = document.activeElement, held = chosen?.closest?.('#requests tr')?.dataset.id, all = state.requests || [];
  const row = (r) => {
    const ended = element('button', { title: `Cancel ${r.id}`, text: 'Cancel' });
    ended.addEventListener('click', (event) => { event.stopPropagation(); cancel(r); });
    const made = element('tr', { 'data-id': r.id, tabindex: 0, class: r.stuck ? 'stuck' : '', 'aria-expanded': r.id === state.open },
      element('td', { text: r.id, class: 'id' }), element('td', { text: r.state }), element('td', { text: time(r.for_seconds) }),
      element('td', { text: time(r.age_seconds) }), element('td', { text: number(r.prompt_tokens, 0) }),
      element('td', { text: number(r.generated_tokens, 0) }), element('td', {}, r.request ? ended : ''));
    const toggle = () => { state.open = state.open === r.id ? '' : r.id; setTimeout(drawRequests); };
    made.addEventListener('click', toggle);
    made.addEventListener('keydown', (event) => { if (event.target === made && event.key === 'Enter') toggle(); });
    const spent = r.spent.map(([what, seconds]) => `${what} ${time(seconds)}`).join(', ');
    return r.id === state.open ? [made, element('tr', { class: 'spent' }, element('td', { colspan: 7,
      text: `${spent || 'nothing yet'}${r.node ? ` · at ${r.node}` : ''}${r.restarts ? ` · computed anew ${r.restarts} times` : ''}` }))] : [made];
  };
  const head = element('tr', {}, ...['request', 'state', 'for', 'age', 'prompt', 'answer', ''].map((t) => element('th', { scope: 'col', text: t })));
  $('requests').replaceChildren(...all.length ? [element('thead', {}, head), element('tbody', {}, ...all.slice(0, SHOWN).flatMap(row))] : []);
  $('requests-text').textContent = !state.requests ? 'This key may not see the requests of others; an administrator\'s may.'
    : !all.length ? 'None runs or waits.' : all.length > SHOWN ? `and ${number(all.length - SHOWN, 0)} more` : '';
  if (held) $('requests').querySelector(`tr[data-id="${CSS.escape(held)}"]${chosen.tagName === 'BUTTON' ? ' button' : ''}`)?.focus();
}
async function cancel(request) {
  try {
    await ask(`v1/requests/${encodeURIComponent(request.request)}/cancel`, { method: 'POST' });
  } catch (error) {
    $('requests-text').textContent = `${request.id}: ${error.message}`;
  }
}

// ---- tips
function tip(event, ...content) {
  const box = $('tip');
  box.replaceChildren(...content);
  box.hidden = false;
  const at = event.target.getBoundingClientRect(), px = event.clientX ?? at.left, py = event.clientY ?? at.bottom;
  box.style.left = `${Math.max(4, Math.min(px + 12, innerWidth - box.offsetWidth - 8))}px`;
  box.style.top = `${py + 16 + box.offsetHeight > innerHeight ? Math.max(4, py - box.offsetHeight - 8) : py + 16}px`;
}
const noTip = () => { $('tip').hidden = true; };
$('timeline').addEventListener('mousemove', (event) => {
  const { offsetX: px, offsetY: py } = event, hit = state.boxes?.find((b) => b.row === Math.floor(py / 30) && px >= b.from && px <= Math.max(b.to, b.from + 3));
  if (!hit) return noTip();
  const s = hit.passage.stages[hit.row];
  tip(event, `micro-batch ${hit.passage.id}: ${count(hit.passage.rows, 'row')}, ${count(hit.passage.positions, 'position')}\nstep ${time(s.step)}, waited ${time(s.wait)}${s.hop ? `, hop ${time(s.hop)}` : ''}\nround trip ${time(hit.passage.round_trip)}`);
});
$('timeline').addEventListener('mouseleave', noTip);

// ---- playground
function turn(role, text = '') {
  const box = element('div', { class: `turn ${role}`, text });
  $('chat').append(box);
  return box;
}
function addToken(box, entry, text) {
  const p = Math.exp(entry.logprob), token = element('span', { class: 'token', text, tabindex: 0 });
  token.style.background = `hsl(${Math.round(120 * p)} 70% 50% / ${(.32 * (1 - p)).toFixed(3)})`;
  const show = (event) => tip(event, `“${entry.token}” ${(100 * p).toFixed(1)} %`, element('table', {},
    ...(entry.top_logprobs || []).map((t) => element('tr', {}, element('td', { text: JSON.stringify(t.token) }), element('td', { text: `${(100 * Math.exp(t.logprob)).toFixed(1)} %` })))));
  token.addEventListener('mousemove', show); token.addEventListener('focus', show);
  token.addEventListener('mouseleave', noTip); token.addEventListener('blur', noTip);
  box.append(token);
}
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split('\n\n');
    held = parts.pop();
    for (const part of parts) {
      const data = part.split('\n').filter((l) => l.startsWith('data:')).map((l) => l.slice(5).trim()).join('\n');
      if (data && data !== '[DONE]') yield JSON.parse(data);
    }
  }
}
async function send(text) {
  state.chat.push({ role: 'user', content: text });
  turn('user', text);
  const box = turn('assistant'), begun = performance.now(), stopper = new AbortController();
  state.answering = stopper;
  $('send').disabled = true; $('stop').disabled = false;
  let answer = '', count = 0, first = null, why = '';
  try {
    const body = { model: state.model, messages: state.chat, stream: true, logprobs: true, top_logprobs: 5, max_completion_tokens: Number($('tokens').value) || 200 };
    if ($('temperature').value !== '') body.temperature = Number($('temperature').value);
    if ($('seed').value !== '') body.seed = Number($('seed').value);
    const response = await ask('v1/chat/completions', { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body), signal: stopper.signal });
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      const text = choice.delta?.content || '', entries = choice.logprobs?.content || [];
      if (entries.length) { count += entries.length; first ??= performance.now() - begun; }
      answer += text;
      if (entries.length && text) addToken(box, entries.at(-1), text); else box.append(text);
      if (choice.finish_reason) why = choice.finish_reason;
    }
  } catch (error) {
    if (error.name === 'AbortError') why = 'stopped'; else box.append(element('p', { class: 'error', text: error.message }));
  }
  const took = (performance.now() - begun) / 1000, tail = count > 1 && first != null ? (count - 1) / (took - first / 1000) : null;
  box.append(element('footer', { text: `${count} tokens · first after ${first == null ? '–' : time(first / 1000)} · ${number(tail)} tokens/s${why ? ` · ${why}` : ''}` }));
  state.chat.push({ role: 'assistant', content: answer });
  state.answering = null;
  $('send').disabled = false; $('stop').disabled = true;
  $('prompt').focus();
}
$('ask').addEventListener('submit', (event) => {
  event.preventDefault();
  const text = $('prompt').value.trim();
  if (!text || state.answering) return;
  $('prompt').value = '';
  send(text);
});
$('prompt').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); $('ask').requestSubmit(); }
});
$('stop').addEventListener('click', () => state.answering?.abort());
$('clear').addEventListener('click', () => { state.answering?.abort(); state.chat = []; $('chat').replaceChildren(); });

// ---- key, theme, pause
function login(error) {
  pill('needs a key', 'bad');
  $('login-error').textContent = error;
  if (!$('login').open) $('login').showModal();
}
$('login').addEventListener('close', () => {
  const key = $('login-key').value.trim();
  $('login-key').value = '';
  if (key) { state.key = key; state.sees = true; sessionStorage.setItem('millrace-key', key); wake(); }
});
$('key').addEventListener('click', () => { sessionStorage.removeItem('millrace-key'); login(''); });
function theme(wanted) { document.documentElement.dataset.theme = wanted; localStorage.setItem('millrace-theme', wanted); draw(); }
$('theme').addEventListener('click', () => {
  const dark = matchMedia('(prefers-color-scheme: dark)').matches, now = document.documentElement.dataset.theme || (dark ? 'dark' : 'light');
  theme(now === 'dark' ? 'light' : 'dark');
});
$('pause').addEventListener('click', () => {
  state.paused = !state.paused;
  $('pause').setAttribute('aria-pressed', state.paused);
  $('pause').textContent = state.paused ? 'Go on' : 'Pause';
  if (!state.paused) draw();
});
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape') state.answering?.abort();
  if (/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === 'p') $('pause').click();
  if (event.key === 't') $('theme').click();
});
$('window').addEventListener('change', drawTimeline);
addEventListener('resize', draw);

const kept = localStorage.getItem('millrace-theme');
if (kept) document.documentElement.dataset.theme = kept;
let wake = () => {};
(async () => {
  for (;;) {
    await tick();
    await new Promise((done) => { wake = done; setTimeout(done, 1000); });
  }
})();

// The correction page. The caret in the answer decides which sentence and which segment is meant.
// Texts come from strangers: they are only ever set as text, never as HTML.

const $ = (id) => document.getElementById(id)
const [editor, stage] = [$('editor'), $('stage')]
const [IDLE, RETRY] = [60_000, 1000] // ms: until the clock stops; until a failed call is repeated
const annotator = new URLSearchParams(location.search).get('annotator') || 'anonymous'
const OUTBOX = `outbox ${annotator}` // in localStorage: the submission that is not yet saved
const draftOf = (id) => `draft ${annotator} ${id}`

const state = {
  answer: null, // {id, image, question, text}
  before: null, after: null, // ids of the annotator's neighbouring answers
  versions: [], version: -1, // its corrections, to adjudicate; the one in use
  parts: [], active: -1, // the corrected segments, from the server; the selected one
  typed: [], // {rejected: [start, end], type} of each
  past: [], future: [], // for undo and redo: {text, caret, typed}
  seconds: 0, busy: true,
}

// -------------------------------------------------------------------------------------- the server
function banner(text) { // screen readers read it aloud whenever it is set
  if ($('banner').textContent !== text) $('banner').textContent = text
}

// Calls the server until it answers; a refusal throws.
async function api(path, body) {
  const headers = { 'Content-Type': 'application/json' }
  const options = body && { method: 'POST', headers, body: JSON.stringify(body) }
  for (;;) {
    const reply = await fetch(path, options).catch(() => null)
    const found = await reply?.json().catch(() => null)
    if (found && reply.status < 500) {
      banner('')
      if (reply.ok) return found
      throw new Error(found.error)
    }
    banner(found ? `${found.error}. Your draft stays here; trying again …`
      : 'The server does not answer. Your draft stays in this browser, and what you submitted is '
        + 'sent as soon as the server is back.')
    await new Promise((done) => setTimeout(done, RETRY))
  }
}

async function load(id) {
  busy(true)
  const wanted = new URLSearchParams(id ? { annotator, id } : { annotator })
  await api(`item?${wanted}`).then(show, (error) => banner(error.message))
}

async function send(entry) {
  busy(true)
  localStorage.setItem(OUTBOX, JSON.stringify(entry))
  try {
    const next = await api('submit', entry)
    localStorage.removeItem(draftOf(entry.id))
    show(next)
    $('saved').textContent = `Saved: ${entry.status}.`
  } catch (error) { // refused, so a retry would not help; the draft stays
    if (state.answer) busy(false)
    else await load()
    banner(error.message)
  }
  localStorage.removeItem(OUTBOX)
}

let asking = null
// Fetches the diff of the current text; one request at a time, then one for edits made meanwhile.
function refresh() {
  const now = () => ({ id: state.answer?.id, chosen: editor.value })
  const ask = async () => {
    while (state.answer) {
      const asked = now()
      const found = await api('segments', asked)
      if (asked.id === now().id && asked.chosen === now().chosen) return showDiff(found)
    }
  }
  asking ||= ask().catch((error) => banner(error.message)).finally(() => { asking = null })
}

// ----------------------------------------------------------------------------------- what is shown
function busy(is) {
  state.busy = editor.readOnly = is
  const open = !is && state.answer
  const same = editor.value.trim() === state.answer?.text // then it can be accepted, else submitted
  const enabled = { back: !is && state.before, forward: !is && state.after, skip: open,
    accept: open && same, submit: open && !same }
  for (const [id, can] of Object.entries(enabled)) $(id).disabled = !can
}

function show(item) {
  const { answer, before, after, versions, done, total, own, median } = item
  Object.assign(state, { answer, before, after, versions, version: -1 })
  Object.assign(state, { parts: [], past: [], future: [] })
  const pace = median === null ? '' : ` · median ${Math.round(median)} s`
  $('progress').textContent = `${done} of ${total}${pace}`
  Object.assign($('bar'), { max: total, value: done })
  $('work').hidden = $('picture').hidden = !answer
  $('finished').hidden = Boolean(answer)
  $('saved').textContent = ''
  $('summary').textContent = `${done} of ${total} answers are done, ${own} of them by you.`
  answer ? showAnswer(item) : $('finished').focus()
  busy(false)
}

function showAnswer({ answer, line, ahead, units }) {
  const draft = JSON.parse(localStorage.getItem(draftOf(answer.id)))
  editor.value = draft?.text ?? line?.chosen ?? answer.text
  state.typed = draft?.typed ?? line?.segments ?? []
  state.seconds = draft?.seconds ?? 0
  $('done').textContent = line ? `Saved before: ${[line.status, line.reason].join(' ')}` : ''
  $('question').textContent = answer.question
  $('file').textContent = answer.image
  Object.assign($('image'), { alt: `Image ${answer.image}`, src: `image/${answer.id}` })
  $('diff').dataset.units = units
  for (const id of ahead) new Image().src = `image/${id}` // preload the next one
  zoom(0)
  $('versions').hidden = !state.versions.length
  $('versions').replaceChildren(...state.versions.flatMap(({ parts, segments }, i) => [
    make('button', `Use version ${i + 1}`, { onclick: () => useVersion(i) }),
    make('p', '', { className: 'diff' }, diffNodes(parts, segments))]))
  $('work').scrollTop = 0
  $('work').focus()
  placeCaret(0)
  refresh()
}

function make(tag, text, properties = {}, children = []) {
  const node = Object.assign(document.createElement(tag), { textContent: text }, properties)
  node.append(...children)
  return node
}

function showDiff({ parts, kept }) {
  const touches = (one, two) => one[0] <= two[1] && two[0] <= one[1]
  const before = state.typed
  let at = 0 // offset in the answer, as JavaScript counts
  for (const part of parts) part.span = [at, at += (part.same ?? part.new).length]
  state.parts = parts.filter((part) => 'old' in part)
  state.typed = state.parts.map(({ rejected }) => ({
    rejected, type: before.find((it) => it.type && touches(it.rejected, rejected))?.type || '' }))
  const focused = [...$('diff').children].indexOf(document.activeElement)
  $('diff').replaceChildren(...diffNodes(parts, state.typed, true))
  $('diff').children[focused]?.focus()
  const n = state.parts.length
  const count = state.parts.reduce((sum, { units }) => sum + units[0] + units[1], 0)
  $('counts').textContent = `segments: ${n}; ${$('diff').dataset.units}: ${count}`
  $('warning').textContent = kept >= 0.5 ? '' : `Only ${Math.round(100 * kept)} % of the original `
    + 'is left. A rewrite is not the model’s own text: it teaches style, not truth.'
  keepDraft()
  draw()
}

// Makes the nodes of a diff. White space at the edges of a segment stays outside its mark.
function diffNodes(parts, typed, live = false) {
  let n = 0
  return parts.flatMap((part) => {
    if ('same' in part) return [part.same]
    const index = n++
    const type = typed[index]?.type
    const node = make('span', '', { className: 'segment' })
    if (part.old) node.append(make('del', part.old.trim() || '␣'))
    if (part.new) node.append(make('ins', part.new.trim() || '␣'))
    if (part.end) node.append(make('small', '⏎', { title: 'includes the end of the answer' }))
    if (type) node.append(make('small', type))
    const select = () => index !== state.active && placeCaret(state.parts[index].span[0])
    if (live) {
      Object.assign(node, { tabIndex: 0, role: 'button', onclick: select, onfocus: select,
        ariaLabel: `Segment ${index + 1}: ${part.old.trim() || 'nothing'} becomes `
          + `${part.new.trim() || 'nothing'}; type: ${type || 'none'}` })
    }
    const [, left, right] = (part.new || part.old).match(/^(\s*)[^]*?(\s*)$/)
    return [left, node, right]
  })
}

// Draws what depends on the caret: the sentence, marked in a mirror behind the text, and the
// segment nearest to the sentence, then to the caret, whose type the keys 1 to 6 set.
function draw() {
  const { span: [start, end] } = sentence()
  const text = editor.value
  const mark = make('mark', text.slice(start, end).trimEnd())
  const rest = text.slice(start + mark.textContent.length)
  $('mirror').replaceChildren(text.slice(0, start), mark, `${rest}\u200b`)
  const apart = (one, two) => Math.max(0, one[0] - two[1], two[0] - one[1])
  const distances = state.parts.map(({ span }) => 1e6 * apart(span, [start, end - 1])
    + apart(span, [editor.selectionStart, editor.selectionEnd]))
  state.active = distances.indexOf(Math.min(...distances))
  const type = state.typed[state.active]?.type
  const nodes = [...$('diff').children]
  nodes.forEach((node, i) => node.classList.toggle('active', i === state.active))
  for (const button of $('types').children) {
    button.disabled = type === undefined
    button.ariaPressed = String(type === button.dataset.type)
  }
}

// ---------------------------------------------------------------------------------- edits and undo
const cutter = new Intl.Segmenter(undefined, { granularity: 'sentence' })
function sentence() {
  const cut = [...cutter.segment(editor.value)]
  const spans = cut.map(({ index, segment }) => [index, index + segment.length])
  const index = Math.max(0, spans.findLastIndex(([start]) => start <= editor.selectionStart))
  return { spans, index, span: spans[index] || [0, 0] }
}

function placeCaret(at) {
  editor.setSelectionRange(at, at)
  draw()
  $('mirror').querySelector('mark').scrollIntoView({ block: 'nearest' })
}

function move(step) {
  const { spans, index } = sentence()
  if (spans[index + step]) placeCaret(spans[index + step][0])
}

function deleteSentence() {
  const { spans, index, span: [caret, end] } = sentence()
  const text = editor.value.slice(0, caret) + editor.value.slice(end)
  change({ caret, text: index === spans.length - 1 ? text.trimEnd() : text })
}

async function setType(type) {
  await asking // for the segment that was just made
  const now = state.typed[state.active]
  const given = { ...now, type: now?.type === type ? '' : type }
  if (now) change({ typed: state.typed.with(state.active, given) })
}

function useVersion(version) {
  const { chosen: text, segments: typed } = state.versions[version]
  state.version = version
  change({ text, typed, caret: 0 })
}

const snapshot = () => ({ text: editor.value, caret: editor.selectionStart, typed: state.typed })
const remember = () => Object.assign(state, { past: [...state.past, snapshot()], future: [] })
const change = (what) => { remember(); restore({ ...snapshot(), ...what }) }
const undo = (from, to) => from.length && (to.push(snapshot()), restore(from.pop()))

function restore({ text, caret, typed }) {
  editor.value = text
  state.typed = typed
  placeCaret(caret)
  edited()
}

function edited() {
  draw()
  keepDraft()
  busy(false)
  refresh()
}

function keepDraft() {
  const draft = { text: editor.value, typed: state.typed, seconds: state.seconds }
  if (!state.busy) localStorage.setItem(draftOf(state.answer.id), JSON.stringify(draft))
}

let last = { kind: '', time: 0 } // consecutive typing or deleting is one step of undo
editor.addEventListener('beforeinput', (event) => {
  const [kind, time] = [event.inputType, Date.now()]
  if (kind.startsWith('history')) return event.preventDefault()
  if (kind !== last.kind || time - last.time > 1000 || event.data === ' ') remember()
  last = { kind, time }
})
editor.addEventListener('input', edited)
document.addEventListener('selectionchange', () => document.activeElement === editor && draw())

// -------------------------------------------------------------------------------------------- keys
function decide(status, reason = '') {
  const typed = state.typed.flatMap((one) => one.type ? [[one.rejected[0], one.type]] : [])
  keepDraft()
  send({ id: state.answer.id, annotator, status, reason, chosen: editor.value,
    seconds: state.seconds, types: Object.fromEntries(typed) })
}

const skip = (reason) => { $('skipping').close(); reason.trim() && decide('skipped', reason) }

const always = { // also if nothing is left to do
  '?': () => $('help').showModal(), '+': () => zoom(1.4), '-': () => zoom(0.7), 0: () => zoom(0),
  b: () => state.before && load(state.before), f: () => state.after && load(state.after),
}
const commands = {
  arrowup: () => move(-1), arrowdown: () => move(1), d: deleteSentence, delete: deleteSentence,
  e: () => editor.focus(), enter: () => editor.focus(),
  z: () => undo(state.past, state.future), y: () => undo(state.future, state.past),
  v: () => state.versions.length && useVersion((state.version + 1) % state.versions.length),
  a: () => $('accept').disabled || decide('accepted'), s: () => $('skipping').showModal(),
  submit: () => $('submit').disabled || decide('corrected'), ...always,
}
for (const { dataset: { key, type } } of $('types').children) commands[key] = () => setType(type)
const run = (key) => { // returns whether the key has a command
  const command = (state.busy || !state.answer ? always : commands)[key]
  return command && [command()]
}

document.addEventListener('keydown', (event) => {
  const { target, ctrlKey, metaKey, altKey, shiftKey } = event
  let key = (altKey ? event.code.replace(/^(Key|Digit)/, '') : event.key).toLowerCase()
  const dialog = document.querySelector('dialog[open]')
  if (dialog) {
    if (target.id === 'reason') return key === 'enter' && skip(target.value)
    return dialog.querySelectorAll('[data-reason]')[key - 1]?.click()
  }
  if (ctrlKey || metaKey) key = !altKey && { enter: 'submit', z: shiftKey ? 'y' : 'z', y: 'y' }[key]
  else if (target === editor && key === 'escape') return $('work').focus()
  else if (target === editor && !(altKey && /^(arrow(up|down)|d|[1-6])$/.test(key))) return
  else if (/^( |enter)$/.test(key) && target.matches('button, [role=button]')) return
  else if (target === stage && key.startsWith('arrow')) return // the browser scrolls
  if (run(key)) event.preventDefault()
})

document.addEventListener('click', ({ target }) => {
  const { dataset, id, className } = target.closest('button') || {}
  if (dataset?.key) run(dataset.key)
  if (dataset?.reason || id === 'own-reason') skip(dataset.reason || $('reason').value)
  if (className === 'close') target.closest('dialog').close()
})

let moved = Date.now()
const stir = () => { moved = Date.now() }
for (const kind of ['keydown', 'pointermove', 'wheel']) document.addEventListener(kind, stir, true)
setInterval(() => {
  if (!state.busy && !document.hidden && Date.now() - moved < IDLE) state.seconds += 0.5
}, 500)

// --------------------------------------------------------------------------------------- the image
let scale = 1
function zoom(factor, clientX, clientY) { // about a point of the window, or the middle
  const { left, top, width, height } = stage.getBoundingClientRect()
  const [x, y] = clientX === undefined ? [width / 2, height / 2] : [clientX - left, clientY - top]
  const larger = Math.min(Math.max(scale * factor, 1), 16) / scale
  scale *= larger
  const [newX, newY] = [(stage.scrollLeft + x) * larger - x, (stage.scrollTop + y) * larger - y]
  $('image').style.width = $('image').style.height = `${100 * scale}%`
  stage.scrollTo(newX, newY)
}

stage.addEventListener('wheel', (event) => {
  event.preventDefault()
  zoom(Math.exp(-event.deltaY / 400), event.clientX, event.clientY)
}, { passive: false })
stage.addEventListener('pointermove', ({ buttons, pointerType, movementX, movementY }) => {
  if (buttons & 1 && pointerType === 'mouse') stage.scrollBy(-movementX, -movementY)
})

$('annotator').textContent = annotator
localStorage.getItem(OUTBOX) ? send(JSON.parse(localStorage.getItem(OUTBOX))) : load()

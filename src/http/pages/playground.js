// The playground: asks for a streamed completion and colours every token by the experts it used.

import { $, ApiError, call, el, key, wireHeader } from './pages.js'
import { startLive } from './charts.js'

/** The routers of the README's table that name no file. `input` is the control that gives the argument, `value` what it begins with. */
const ROUTERS = [
  { label: 'as the server is started', rule: 'No router is asked for: the server uses its own.' },
  { name: 'native', label: 'native', rule: 'The checkpoint’s own: as many experts for every token as it was trained with.' },
  { name: 'topk', label: 'topk:K', input: 'count', value: 1, rule: 'Static: the K most probable experts.' },
  { name: 'dynk', label: 'dynk:τ', input: 'share', symbol: 'τ, share of the mass', value: 0.8, mass: true,
    rule: 'Dynamic: the fewest experts that gather a share τ of the mass, of native’s or of all experts (can cost more).' },
  { name: 'ratio', label: 'ratio:t', input: 'share', symbol: 't, of the best one’s probability', value: 0.5,
    rule: 'Dynamic: experts of at least t times the best one’s probability, at most as many as native.' },
  { name: 'threshold', label: 'threshold:θ', input: 'share', symbol: 'θ, probability', value: 0.2,
    rule: 'Dynamic: experts of at least probability θ, always the best one, at most as many as native.' },
  { name: 'skip', label: 'skip:β', input: 'share', symbol: 'β, of the best one’s probability', value: 0.5,
    rule: 'Dynamic: native experts of at least β times the best one’s probability.' },
  { name: 'complexity', label: 'complexity:ESTIMATOR', input: 'free', symbol: 'Estimator', value: 'router-margin',
    rule: 'Dynamic: more experts the harder the token, by an estimator such as router-margin, logit-lens or surprisal.' },
  { name: 'oea', label: 'oea:k’', input: 'count', value: 1,
    rule: 'By the batch: k’ experts of the token’s own, filled up from those that other tokens of the step use.' },
  { name: 'xbudget', label: 'xbudget:N', input: 'count', value: 4,
    rule: 'By the batch: at most N distinct experts per layer and step, those with most of the gate’s mass.' },
  { name: 'layers', label: 'layers:K,K,…', input: 'free', symbol: 'K of each layer', value: '1',
    rule: 'Static by layer: one K per MoE layer, or a single one for all.' },
  { name: 'uniform', label: 'uniform:K', input: 'count', value: 2, rule: 'K experts at random: a sanity check, not for use.' },
  { name: 'written', label: 'written out', input: 'free', symbol: 'Specification', value: 'dynk:0.8,min=1,max=2',
    rule: 'Any router in the grammar of --router: name:argument,key=value.' },
]
const INPUTS = ['share', 'count', 'free']
const EMPTY = 'The answer appears here, every token coloured by the number of experts it used.'
const INSPECT = 'Point at a token, or go to it with Tab and the arrow keys, to see how many experts each layer used for it.'
const TOP_LOGPROBS = 4

/** Whether the server reports experts per token; it is asked until it refuses. */
let traced = true
let running = null
let experts = null
let mostSeen = 0

const router = () => ROUTERS[$('router').selectedIndex]
const chat = () => document.querySelector('[name=mode]:checked').value === 'chat'

/** The chosen router in the server's grammar, or null for the server's own. */
function spec() {
  const { name, input, mass } = router()
  if (!name) return null
  if (name === 'written') return $('freevalue').value.trim()
  let text = name
  if (input) text += `:${$(`${input}value`).value.replaceAll(' ', '')}`
  if (mass && $('massvalue').value !== 'native') text += `,mass=${$('massvalue').value}`
  if ($('weightsvalue').value !== 'native') text += `,weights=${$('weightsvalue').value}`
  return text
}

function showRouter() {
  const { name, input, symbol, value, mass, rule } = router()
  for (const id of INPUTS) $(id).hidden = id !== input
  if (input) $(`${input}value`).value = value
  if (input && input !== 'count') $(`${input}label`).textContent = symbol
  $('mass').hidden = !mass
  $('weights').hidden = !name || name === 'written'
  $('rule').textContent = rule
  showRequest()
}

/** The request's body, for `router` (null is the server's own). */
function request(router, seed) {
  const text = $('prompt').value
  const max = Number($('max_tokens').value)
  return {
    ...(chat() ? { messages: [{ role: 'user', content: text }], max_completion_tokens: max } : { prompt: text, max_tokens: max }),
    temperature: Number($('temperature').value),
    ...(seed !== null && { seed }),
    ...(router !== null && { router }),
    ...(traced && { moe_trace: true }),
    ...($('logprobs').checked && (chat() ? { logprobs: true, top_logprobs: TOP_LOGPROBS } : { logprobs: TOP_LOGPROBS })),
    stream: true,
    stream_options: { include_usage: true },
  }
}

const path = () => (chat() ? '/v1/chat/completions' : '/v1/completions')
const seedGiven = () => ($('seed').value === '' ? null : Number($('seed').value))

function showRequest() {
  const body = JSON.stringify(request(spec(), seedGiven()), null, 2).replaceAll("'", String.raw`'\''`)
  const authorization = key.get() ? ' \\\n  -H "Authorization: Bearer $MOE_SERVE_API_KEY"' : ''
  $('curl').textContent = `curl -N ${location.origin}${path()}${authorization} \\\n  -H 'Content-Type: application/json' -d '${body}'`
}

/** The data of server-sent events. The stream may be cut anywhere, also within a character or a line end. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader()
  let [rest, data] = ['', []]
  try {
    for (;;) {
      const { value, done } = await reader.read()
      rest += value ?? ''
      // A carriage return at the very end may be the first half of a line end.
      const lines = rest.split(/\r\n|\n|\r(?!$)/)
      rest = lines.pop()
      for (const line of lines) {
        if (line.startsWith('data:')) data.push(line.slice(line[5] === ' ' ? 6 : 5))
        if (line === '' && data.length) {
          yield data.join('\n')
          data = []
        }
      }
      if (done) return
    }
  } finally {
    reader.cancel().catch(() => {})
  }
}

const mean = list => list.reduce((sum, x) => sum + x, 0) / list.length

/** Completions and chat report log probabilities in different shapes: one list of tokens for both. */
function tokenLogprobs(logprobs) {
  if (logprobs?.content) {
    const top = others => others.map(other => [other.token, other.logprob])
    return logprobs.content.map(t => ({ text: t.token, logprob: t.logprob, top: top(t.top_logprobs) }))
  }
  return (logprobs?.tokens ?? []).map((text, i) => (
    { text, logprob: logprobs.token_logprobs[i], top: Object.entries(logprobs.top_logprobs?.[i] ?? {}) }))
}

/** One answer: its text, and what it used. */
class Pane {
  constructor(title) {
    this.router = el('code', { class: 'muted' })
    const label = `${title}: tokens; arrow keys go from one to the next`
    this.text = el('div', { class: 'text', role: 'group', 'aria-label': label, 'data-empty': EMPTY })
    this.root = el('div', { class: 'pane' }, el('h3', {}, title, this.router), this.text)
    this.text.addEventListener('pointerover', event => event.target.token && inspect(event.target))
    this.text.addEventListener('focusin', event => event.target.token && inspect(event.target))
    this.text.addEventListener('keydown', event => this.walk(event))
    this.text.addEventListener('scroll', () => this.scrolled())
    $('panes').append(this.root)
    this.reset()
  }

  reset() {
    Object.assign(this, { usage: null, ended: '', tokens: 0, ks: [], pending: [], entry: null })
    Object.assign(this, { started: 0, first: 0, last: 0, top: 0, follow: true })
    this.text.replaceChildren()
  }

  start(router) {
    this.reset()
    this.router.textContent = router ?? 'server’s own'
    this.started = performance.now()
    if (!chat()) this.text.append(el('span', { class: 'prompt' }, $('prompt').value))
  }

  /** The text follows its end until the reader scrolls up. */
  scrolled() {
    const { scrollTop, clientHeight, scrollHeight } = this.text
    if (scrollTop < this.top) this.follow = false
    if (scrollTop + clientHeight > scrollHeight - 30) this.follow = true
    this.top = scrollTop
  }

  /** A piece of the stream: its tokens are shown one by one where it says how they divide the text. */
  take(choice) {
    const text = choice.text ?? choice.delta?.content ?? ''
    const ks = choice.moe_trace?.completion ?? []
    const logprobs = tokenLogprobs(choice.logprobs)
    this.last = performance.now()
    this.first ||= this.last
    this.ks.push(...ks.map(mean))
    this.tokens += Math.max(ks.length, logprobs.length, text ? 1 : 0)
    if (logprobs.length > 1 && logprobs.map(t => t.text).join('') === text) {
      const before = this.tokens - logprobs.length
      logprobs.forEach((token, i) => this.append(token.text, ks[i] ? [ks[i]] : [], [token], before + i + 1))
    } else if (text) {
      this.append(text, [...this.pending.splice(0), ...ks], logprobs)
    } else {
      // Half a character, or what may become a stop: its text comes with the next piece.
      this.pending.push(...ks)
    }
    if (choice.finish_reason) this.finish(choice.finish_reason)
  }

  finish(reason) {
    this.ended = { stop: 'end of text or a stop', length: 'max tokens reached', tool_calls: 'function call' }[reason] ?? reason
    if (this.pending.length && reason === 'stop') this.append('', this.pending.splice(0), []).classList.add('end')
  }

  append(text, ks, logprobs, at = this.tokens) {
    // The space before a word is left uncoloured: words stay apart, and no line ends with a sliver of colour.
    const [, space, word] = /^( ?)(.*)$/s.exec(text)
    const token = el('span', { class: 'tok', tabindex: this.entry ? -1 : 0 }, word ? word : space)
    if (word) this.text.append(space)
    this.entry ??= token
    token.token = { text, ks, logprobs, at }
    if (ks.length) {
      const k = mean(ks.map(mean))
      token.classList.add('k')
      token.style.setProperty('--k', k.toFixed(3))
      if (k > mostSeen) { mostSeen = k; showScale() }
    }
    this.text.append(token)
    return token
  }

  /** Arrow keys go from token to token; one of them at a time is a tab stop. */
  walk(event) {
    const { target } = event
    const all = this.text.querySelectorAll('.tok')
    const [next, before] = [target.nextElementSibling, target.previousElementSibling]
    const to = { ArrowRight: next, ArrowLeft: before, Home: all[0], End: all[all.length - 1] }[event.key]
    if (!target.token || !to?.token) return
    event.preventDefault()
    this.entry.tabIndex = -1
    this.entry = to
    to.tabIndex = 0
    to.focus()
  }
}

function logprobWords({ logprob, top }) {
  const share = x => `${(100 * Math.exp(x)).toFixed(1)} %`
  const words = [logprob === null ? '' : `probability ${share(logprob)} (log ${logprob.toFixed(3)})`]
  if (top.length) words.push(`likeliest: ${top.map(([text, x]) => `${JSON.stringify(text)} ${share(x)}`).join(', ')}`)
  return words
}

/** Shows what is known of a token below the panes. */
function inspect(node) {
  const { text, ks, logprobs, at } = node.token
  document.querySelector('.tok.shown')?.classList.remove('shown')
  node.classList.add('shown')
  const facts = [ks.length > 1 ? `${ks.length} tokens up to ${at}` : `token ${at}`]
  facts.push(ks.length ? `${mean(ks.map(mean)).toFixed(2)} experts per layer on average` : 'experts not reported')
  facts.push(...logprobs.flatMap(logprobWords).filter(Boolean))
  const chip = (k, layer) => {
    const node = el('span', { class: 'tok k', title: `layer ${layer}: ${k} experts` }, el('small', {}, `L${layer}`), String(k))
    node.style.setProperty('--k', k)
    return node
  }
  $('inspect').replaceChildren(
    el('p', { class: 'what small' }, el('code', {}, JSON.stringify(text)), ...facts.map(fact => el('span', {}, fact))),
    ...ks.map(row => el('div', { class: 'layers' }, ...row.map(chip))))
}

/** Sets what the strongest colour stands for, and draws the legend of it. */
function showScale() {
  const max = Math.max(2, $('scale').value === 'all' && experts ? experts : Math.ceil(mostSeen))
  if ($('swatches').dataset.max === String(max)) return
  $('swatches').dataset.max = max
  document.documentElement.style.setProperty('--max', max)
  const steps = max < 5 ? 4 : Math.min(max - 1, 8)
  const swatch = i => {
    const k = 1 + ((max - 1) * i) / steps
    const node = el('span', { class: 'tok k' }, String(max < 5 ? k : Math.round(k)))
    node.style.setProperty('--k', k)
    return node
  }
  $('swatches').replaceChildren(...Array.from({ length: steps + 1 }, (_, i) => swatch(i)))
}

function savingWords(x) {
  if (x === undefined) return '–'
  if (Math.abs(x) < 0.0005) return 'the same as native'
  return x > 0 ? `${(100 * x).toFixed(1)} % saved` : `costs ${(-100 * x).toFixed(1)} % more than native`
}

const seconds = ms => (ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(2)} s`)
const FIGURES = [
  ['Prompt tokens', p => p.usage && `${p.usage.prompt_tokens} (${p.usage.prompt_tokens_details?.cached_tokens ?? 0} cached)`],
  ['Completion tokens', p => p.usage?.completion_tokens ?? (p.tokens || null)],
  ['Experts per token', p => p.usage?.moe.experts_per_token.toFixed(3) ?? (p.ks.length ? `${mean(p.ks).toFixed(3)} so far` : null)],
  ['Expert FLOPs', p => savingWords(p.usage?.moe.expert_flops_saved)],
  ['Forward FLOPs', p => savingWords(p.usage?.moe.forward_flops_saved)],
  ['First token after', p => p.first && seconds(p.first - p.started)],
  ['Tokens per second', p => p.tokens > 1 && p.last > p.first && ((1000 * (p.tokens - 1)) / (p.last - p.first)).toFixed(1)],
  ['Ended by', p => p.ended],
]

function showFigures() {
  const shown = panes.filter(pane => !pane.root.hidden)
  $('figureshead').replaceChildren(el('td'), ...shown.map((pane, i) => el('th', { scope: 'col' }, i ? 'Native' : 'Chosen router')))
  $('figures').replaceChildren(...FIGURES.map(([name, of]) => el('tr', {}, el('th', { scope: 'row' }, name),
    ...shown.map(pane => String(of(pane) || '–')).map(text => el('td', { class: text.startsWith('costs') && 'cost' }, text)))))
  for (const pane of shown) if (pane.follow) pane.text.scrollTop = pane.text.scrollHeight
}

function notice(text, bad) {
  if ([...$('notices').children].some(node => node.textContent === text)) return
  $('notices').append(el('p', { class: bad ? 'notice bad small' : 'notice small' }, text))
}

/** What went wrong and what to do about it, in words. */
function explain(error) {
  if (!(error instanceof ApiError)) return `This page failed: ${error.message}`
  const { status, param, message } = error
  if (status === 400 && param === 'router' && /allow/i.test(message)) {
    error.advice = () => 'Choose “as the server is started” and do not compare, or start the server with --allow-request-router.'
  } else if (status === 400 && /chat.template/i.test(message)) {
    error.advice = () => 'This is a base model: use “Completion”, or start the server with --chat-template FILE.'
  }
  return error.words()
}

async function open(body, signal) {
  const send = () => call(path(), { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body), signal })
  try {
    return await send()
  } catch (error) {
    if (!body.moe_trace || error.status !== 400 || error.param !== 'moe_trace') throw error
    traced = false
    delete body.moe_trace
    return send()
  }
}

async function stream(pane, router, seed, signal) {
  pane.start(router)
  try {
    const response = await open(request(router, seed), signal)
    if (!traced) notice('Tokens are not coloured, because the server was started without --allow-moe-trace.', false)
    for await (const data of events(response.body)) {
      if (data === '[DONE]') return
      const chunk = JSON.parse(data)
      if (chunk.error) throw new ApiError(chunk.error.message, { status: 500 })
      pane.usage = chunk.usage ?? pane.usage
      chunk.choices.forEach(choice => pane.take(choice))
    }
    throw new ApiError('The answer broke off before its end.')
  } catch (error) {
    pane.ended = error.name === 'AbortError' ? 'you stopped it' : 'an error'
    if (error.name === 'AbortError') return
    // Reading fails with a TypeError when the connection is lost.
    notice(explain(error instanceof TypeError ? new ApiError('The connection to the server was lost.') : error), true)
  }
}

async function send() {
  if (running) return
  running = new AbortController()
  const { signal } = running
  $('notices').replaceChildren()
  $('send').disabled = true
  $('stop').disabled = false
  $('status').textContent = 'Streaming…'
  showPanes()
  // One seed for both panes, so that only the router differs.
  const seed = seedGiven() ?? ($('compare').checked ? Math.floor(Math.random() * 2 ** 31) : null)
  const began = performance.now()
  const active = panes.filter(pane => !pane.root.hidden)
  const frame = () => { showFigures(); if (running) requestAnimationFrame(frame) }
  const work = active.map((pane, i) => stream(pane, i ? 'native' : spec(), seed, signal))
  frame()
  await Promise.all(work)
  running = null
  $('send').disabled = false
  $('stop').disabled = true
  const tokens = active.reduce((sum, pane) => sum + (pane.usage?.completion_tokens ?? pane.tokens), 0)
  const how = signal.aborted ? 'Stopped' : active.every(pane => pane.usage) ? 'Done' : 'Failed'
  const seeded = seedGiven() === null && seed !== null ? `, both with seed ${seed}` : ''
  $('status').textContent = `${how}: ${tokens} tokens in ${seconds(performance.now() - began)}${seeded}.`
  showFigures()
}

function showPanes() {
  panes[1].root.hidden = !$('compare').checked
  $('panes').classList.toggle('two', $('compare').checked)
  showFigures()
}

async function showModel() {
  try {
    const [model] = (await (await call('/v1/models')).json()).data
    $('model').textContent = `${model.id} · context of ${model.max_model_len.toLocaleString('en')} tokens · router: ${model.router}`
  } catch (error) {
    $('model').textContent = error.advice?.() || error.message
  }
}

$('router').append(...ROUTERS.map(({ label }) => el('option', {}, label)))
const panes = [new Pane('Chosen router'), new Pane('Native')]
$('inspect').append(el('p', { class: 'muted small' }, INSPECT))
$('router').addEventListener('change', showRouter)
for (const id of INPUTS) $(`${id}value`).addEventListener('input', event => { router().value = event.target.value })
$('form').addEventListener('input', () => {
  $('shareout').textContent = Number($('sharevalue').value).toFixed(2)
  $('promptlabel').textContent = chat() ? 'Your message' : 'Prompt'
  $('modehint').textContent = chat() ? 'The message is put into the model’s chat template.' : 'The model continues the text as it stands.'
  showRequest()
})
$('form').addEventListener('submit', event => { event.preventDefault(); send() })
$('stop').addEventListener('click', () => running?.abort())
$('compare').addEventListener('change', () => running || showPanes())
$('scale').addEventListener('change', showScale)
addEventListener('keydown', event => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) $('form').requestSubmit()
  if (event.key === 'Escape') running?.abort()
})
const poll = startLive(shape => {
  experts = shape.experts
  $('countvalue').max = experts
  $('scale').options[1].textContent = `up to all ${experts} experts`
  showScale()
})
wireHeader(() => { showModel(); showRequest(); poll() })
showRouter()
showScale()
showPanes()
showModel()

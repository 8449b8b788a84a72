// The live side of the playground: polls /metrics, draws what happened between two polls, and the load of the experts.

import { $, call, el } from './pages.js'

const INTERVAL_MS = 1000
/** After a failure, so that a server without the right key is not asked every second. */
const RETRY_MS = 5000
/** What the charts show: little at first, so that a young page is not empty. */
const [WINDOW_S_MIN, WINDOW_S_MAX] = [30, 120]

const percent = x => `${(100 * x).toFixed(1).replace('-', '−')} %`
const saving = x => (x < -0.0005 ? `${percent(-x)} lost` : percent(Math.max(x, 0)))
const number = x => (x >= 100 ? Math.round(x).toLocaleString('en') : x.toFixed(x % 1 ? 1 : 0))

// Each series maps a sample to a value, or to null where nothing happened. `d` is the growth of a counter between two
// polls, `seconds` the time between them, `now` the value of a gauge.
const share = (d, ran, native) => (d(native) > 0 ? 1 - d(ran) / d(native) : null)
const flops = scope => ({ d }) => share(d, `moe_flops_total{scope="${scope}"}`, `moe_flops_native_total{scope="${scope}"}`)
const perToken = ({ d }) => (
  d('moe_experts_per_token_count') > 0 ? d('moe_experts_per_token_sum') / d('moe_experts_per_token_count') : null)
const bytes = ({ d }) => share(d, 'moe_expert_read_bytes_total', 'moe_expert_read_bytes_native_total')
const CHARTS = [
  { title: 'Experts per token', show: x => x.toFixed(2), low: 1, high: 2, series: [['mean over tokens and layers', perToken]] },
  { title: 'Generation', show: number, low: 0, high: 10, series: [
    ['tokens per second', ({ d, seconds }) => d('moe_generation_tokens_total') / seconds]] },
  { title: 'FLOPs saved', show: saving, axis: percent, low: 0, high: 0.1, series: [
    ['experts', flops('experts')], ['forward pass', flops('forward')]] },
  { title: 'Expert bytes saved', show: saving, axis: percent, low: 0, high: 0.1, series: [
    ['of the bytes steps read', bytes]] },
  { title: 'Requests', show: number, low: 0, high: 4, series: [
    ['running', ({ now }) => now('moe_requests_running')], ['waiting', ({ now }) => now('moe_requests_waiting')]] },
  { title: 'KV cache', show: percent, low: 0, high: 0.1, series: [['of its blocks in use', ({ now }) => now('moe_kv_cache_usage_ratio')]] },
]

/** Series of the Prometheus text format by name and labels; buckets and the vllm: aliases are left out. */
export function parseMetrics(text) {
  const series = new Map()
  for (const line of text.split('\n')) {
    const end = line.lastIndexOf(' ')
    if (line.startsWith('moe_') && !line.includes('_bucket{')) series.set(line.slice(0, end), Number(line.slice(end + 1)))
  }
  return series
}

/** Tokens per expert: rows are MoE layers, columns experts. */
function expertTokens(series) {
  const rows = []
  for (const [name, value] of series) {
    if (!name.startsWith('moe_expert_tokens_total{')) continue
    const [layer, expert] = [/layer="(\d+)"/, /expert="(\d+)"/].map(label => Number(label.exec(name)?.[1]))
    ;(rows[layer] ??= [])[expert] = value
  }
  return rows
}

class Chart {
  constructor(chart) {
    this.chart = chart
    const names = ['a', 'b'].slice(0, chart.series.length)
    this.svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg')
    const shape = (tag, attributes) => {
      const node = document.createElementNS(this.svg.namespaceURI, tag)
      for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value)
      this.svg.append(node)
      return node
    }
    this.svg.setAttribute('viewBox', '0 0 100 100')
    this.svg.setAttribute('preserveAspectRatio', 'none')
    this.svg.setAttribute('role', 'img')
    for (const y of [0, 100]) shape('line', { x1: 0, x2: 100, y1: y, y2: y })
    this.zero = shape('line', { x1: 0, x2: 100, visibility: 'hidden', class: 'zero' })
    this.paths = names.map(name => shape('path', { class: name }))
    this.values = names.map(() => el('b', {}, '–'))
    ;[this.high, this.low] = ['high', 'low'].map(end => el('span', { class: `axis ${end}` }))
    this.none = el('p', { class: 'none' }, 'no traffic yet')
    this.idle = el('small')
    const now = names.map((name, i) => el('div', {}, this.values[i], el('span', { class: name }, el('i'), chart.series[i][0])))
    $('charts').append(el('div', { class: 'card chart' }, el('h3', {}, chart.title, this.idle),
      el('div', { class: 'now' }, ...now), el('div', { class: 'plot' }, this.svg, this.high, this.low, this.none)))
  }

  draw(samples) {
    const { series, show, axis = show } = this.chart
    const lines = series.map((_, i) => samples.map(sample => [sample.time, sample.values.get(this.chart)[i]]))
    const known = lines.flat().map(point => point[1]).filter(value => value !== null)
    const low = Math.min(this.chart.low, ...known)
    const high = Math.max(this.chart.high, ...known)
    const end = samples.at(-1)?.time ?? 0
    const span = Math.max(WINDOW_S_MIN, end - (samples[0]?.time ?? 0))
    const x = time => 100 - (100 * (end - time)) / span
    const y = value => 100 - (100 * (value - low)) / (high - low)
    lines.forEach((line, i) => {
      let pen = 'M'
      const path = line.map(([time, value]) => {
        if (value === null) { pen = 'M'; return '' }
        // The step to itself makes a lone point visible.
        const step = `${pen}${x(time).toFixed(2)} ${y(value).toFixed(2)}h0`
        pen = 'L'
        return step
      })
      this.paths[i].setAttribute('d', path.join(''))
      const last = line.findLast(point => point[1] !== null)
      this.values[i].textContent = last ? show(last[1]) : '–'
      this.idle.textContent = last && last[0] !== end ? 'idle' : ''
    })
    this.zero.setAttribute('visibility', low < 0 ? 'visible' : 'hidden')
    for (const end of ['y1', 'y2']) this.zero.setAttribute(end, y(0))
    this.high.textContent = axis(high)
    this.low.textContent = axis(low)
    this.none.hidden = known.length > 0
    const values = series.map(([name], i) => `${this.values[i].textContent} ${name}`)
    this.svg.setAttribute('aria-label', `${this.chart.title}: ${values.join(', ')}`)
  }
}

/** Shares of each layer's tokens by expert, with the numbers where they fit. */
class HeatMap {
  canvas = $('heat')
  rows = []
  baseline = null
  at = null

  constructor() {
    new ResizeObserver(() => this.draw()).observe(this.canvas)
    addEventListener('themechange', () => this.draw())
    this.canvas.addEventListener('pointermove', event => this.select(...this.cellAt(event)))
    this.canvas.addEventListener('pointerleave', () => this.select(null))
    this.canvas.addEventListener('keydown', event => this.move(event))
    // Read out only to those who are on it: the numbers change all the time.
    this.canvas.addEventListener('focus', () => $('readout').setAttribute('aria-live', 'polite'))
    this.canvas.addEventListener('blur', () => { $('readout').setAttribute('aria-live', 'off'); this.select(null) })
    $('baseline').addEventListener('click', () => {
      this.baseline = this.baseline ? null : this.rows
      $('baseline').textContent = this.baseline ? 'Count from the start' : 'Count from now'
      this.draw()
    })
  }

  update(rows) {
    if (this.baseline && rows.some((row, l) => row.some((count, e) => count < this.baseline[l]?.[e]))) this.baseline = null
    this.rows = rows
    this.draw()
  }

  count = (l, e) => this.rows[l][e] - (this.baseline?.[l]?.[e] ?? 0)
  total = l => this.rows[l].reduce((sum, _, e) => sum + this.count(l, e), 0)
  share = (l, e) => this.count(l, e) / Math.max(this.total(l), 1)

  geometry() {
    const { clientWidth: width, clientHeight: height } = this.canvas
    const [left, bottom] = [30, 16]
    const [layers, experts] = [this.rows.length, this.rows[0].length]
    return { width, height, left, bottom, layers, experts, w: (width - left) / experts, h: (height - bottom) / layers }
  }

  cellAt(event) {
    if (!this.rows.length) return [null]
    const { left, layers, experts, w, h } = this.geometry()
    const [l, e] = [Math.floor(event.offsetY / h), Math.floor((event.offsetX - left) / w)]
    return l >= 0 && l < layers && e >= 0 && e < experts ? [l, e] : [null]
  }

  move(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key]
    if (!step || !this.rows.length) return
    event.preventDefault()
    const clamp = (x, size) => Math.min(Math.max(x, 0), size - 1)
    const [l, e] = this.at ? [this.at[0] + step[0], this.at[1] + step[1]] : [0, 0]
    this.select(clamp(l, this.rows.length), clamp(e, this.rows[0].length))
  }

  select(l, e) {
    this.at = l === null ? null : [l, e]
    this.draw()
  }

  draw() {
    if (!this.rows.length) return
    const shares = this.rows.map((row, l) => row.map((_, e) => this.share(l, e)))
    const most = Math.max(...shares.map(row => Math.max(...row)))
    this.paint(shares, most)
    const even = 1 / this.rows[0].length
    $('heatmax').textContent = most ? percent(most) : '–'
    $('heateven').textContent = `even: ${percent(even)}`
    this.tell(shares, most, even)
  }

  tell(shares, most, even) {
    const layers = `${this.rows.length} MoE layers of ${this.rows[0].length} experts`
    let text = `${layers}; ${this.baseline ? 'nothing was routed since you began to count' : 'no token was routed yet'}.`
    if (this.at) {
      const [l, e] = this.at
      text = `Layer ${l}, expert ${e}: ${percent(shares[l][e])} of the layer’s choices (${this.count(l, e).toLocaleString('en')} tokens).`
    } else if (most) {
      const l = shares.findIndex(row => row.includes(most))
      const busiest = `expert ${shares[l].indexOf(most)} of layer ${l}`
      text = `${layers}. Busiest: ${busiest} with ${percent(most)}, ${(most / even).toFixed(1)} times an even share.`
    }
    if ($('readout').textContent !== text) $('readout').textContent = text
  }

  paint(shares, most) {
    const { width, height, left, bottom, layers, experts, w, h } = this.geometry()
    const ratio = devicePixelRatio || 1
    this.canvas.width = width * ratio
    this.canvas.height = height * ratio
    const pen = this.canvas.getContext('2d')
    pen.scale(ratio, ratio)
    pen.font = '12px system-ui, sans-serif'
    pen.textBaseline = 'middle'
    const style = getComputedStyle(this.canvas)
    const stops = ['--lo', '--mid', '--hi'].map(name => style.getPropertyValue(name).match(/[\d.]+/g).map(Number))
    const [ink, muted] = ['.tok.k', '.muted'].map(like => getComputedStyle(document.querySelector(like)).color)
    const none = getComputedStyle(document.querySelector('.text')).backgroundColor
    const gap = Math.min(w, h) > 8 ? 1 : 0
    shares.forEach((row, l) => row.forEach((value, e) => {
      pen.fillStyle = most ? blend(stops, value / most) : none
      pen.fillRect(left + e * w, l * h, w - gap, h - gap)
      if (most && w > 30 && h > 16) {
        pen.fillStyle = ink
        pen.textAlign = 'center'
        pen.fillText(String(Math.round(100 * value)), left + (e + 0.5) * w, (l + 0.5) * h)
      }
    }))
    pen.fillStyle = muted
    const every = (size, room) => Math.max(1, Math.ceil(room / size))
    pen.textAlign = 'left'
    for (let l = 0; l < layers; l += every(h, 14)) pen.fillText(`L${l}`, 0, Math.max((l + 0.5) * h, 6))
    pen.textAlign = 'center'
    for (let e = 0; e < experts; e += every(w, 34)) {
      const x = left + (e + 0.5) * w
      if (x < width - 12) pen.fillText(`E${e}`, x, height - bottom / 2 + 2)
    }
    if (this.at) {
      pen.strokeStyle = style.color
      pen.lineWidth = 2
      pen.strokeRect(left + this.at[1] * w, this.at[0] * h + 1, w - gap, h - gap - 1)
    }
  }
}

/** The colour a share t of the way along `stops`. */
function blend(stops, t) {
  const at = Math.min(Math.max(t, 0), 1) * (stops.length - 1)
  const i = Math.min(Math.floor(at), stops.length - 2)
  return `rgb(${stops[i].map((c, n) => Math.round(c + (stops[i + 1][n] - c) * (at - i))).join(' ')})`
}

/** Polls and draws for as long as the page is open. `onShape` is told layers and experts once they are known. Returns
 * a function that polls at once, for when the key has changed. */
export function startLive(onShape) {
  const charts = CHARTS.map(chart => new Chart(chart))
  const heat = new HeatMap()
  let [samples, before, timer] = [[], null, 0]
  const take = series => {
    const time = performance.now() / 1000
    const rows = expertTokens(series)
    if (rows.length && !heat.rows.length) onShape({ layers: rows.length, experts: rows[0].length })
    if (before) {
      const d = name => (series.get(name) ?? 0) - (before.series.get(name) ?? 0)
      const view = { d, now: name => series.get(name) ?? null, seconds: time - before.time }
      // Counters fall when the server was started anew: there is no interval then.
      const restarted = d('moe_step_tokens_sum') < 0
      const values = new Map(CHARTS.map(chart => [chart, chart.series.map(([, of]) => (restarted ? null : of(view)))]))
      samples = [...samples.filter(sample => sample.time > time - WINDOW_S_MAX), { time, values }]
    }
    before = { time, series }
    charts.forEach(chart => chart.draw(samples))
    if (rows.length) heat.update(rows)
  }
  const poll = async () => {
    clearTimeout(timer)
    let wait = INTERVAL_MS
    // A page that no one sees need not ask.
    if (!document.hidden) {
      try {
        take(parseMetrics(await (await call('/metrics')).text()))
        $('livenotice').hidden = true
      } catch (error) {
        $('livenotice').textContent = `The metrics cannot be read. ${error.words?.() ?? error.message}`
        $('livenotice').hidden = false
        wait = RETRY_MS
      }
    }
    clearTimeout(timer)
    timer = setTimeout(poll, wait)
  }
  charts.forEach(chart => chart.draw(samples))
  poll()
  return poll
}

// Drives the playground and the API reference in a browser, asserts what they do and keeps screenshots.
//
//   node pages.mjs URL FOLDER
//
// Needs playwright-core (npm install playwright-core) and Chromium: CHROMIUM, or /usr/bin/chromium. The server must be
// started with --allow-request-router --allow-moe-trace. API_KEY is its key, if it has one.

import assert from 'node:assert/strict'
import { mkdirSync } from 'node:fs'
import { chromium } from 'playwright-core'

const [url, folder] = process.argv.slice(2)
if (!url || !folder) throw new Error('usage: node pages.mjs URL FOLDER')
const base = url.replace(/\/$/, '')
mkdirSync(folder, { recursive: true })

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync'],
})
const problems = []

/** A fresh page; what it writes to the console as an error fails the run, but for answers that are errors on purpose. */
async function open(path, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1440, height: 1000 }, ...options })
  const page = await context.newPage()
  page.setDefaultTimeout(10_000)
  page.on('pageerror', error => problems.push(`${path}: ${error.stack}`))
  page.on('console', message => {
    if (message.type() === 'error' && !message.text().startsWith('Failed to load resource')) problems.push(`${path}: ${message.text()}`)
  })
  if (process.env.API_KEY) await page.addInitScript(key => sessionStorage.setItem('api-key', key), process.env.API_KEY)
  await page.goto(base + path)
  return page
}

const shot = (page, name, options = {}) => page.screenshot({ path: `${folder}/${name}.png`, fullPage: true, ...options })
const COMPLETIONS = '**/v1/completions'
const done = page => page.waitForFunction(() => /^(Done|Failed|Stopped)/.test(document.getElementById('status').textContent))
const figure = (page, name, column = 0) => page.locator('#figures tr', { hasText: name }).locator('td').nth(column).textContent()

/** Fills the form's fields, sends, and returns the bodies of the requests made, once the answers are over. */
async function send(page, fields = {}) {
  for (const [id, value] of Object.entries(fields)) await page.fill(`#${id}`, String(value))
  const bodies = []
  const note = request => request.method() === 'POST' && bodies.push(request.postDataJSON())
  page.on('request', note)
  await page.click('#send')
  await done(page)
  page.off('request', note)
  return bodies
}

/** Answers the next completions with `reply` instead of the server. */
async function instead(page, reply, times = 1) {
  await page.route(COMPLETIONS, route => route.fulfill({ contentType: 'application/json', ...reply }), { times })
}
const refusal = (status, message, param = null, headers = {}) => (
  { status, headers, body: JSON.stringify({ error: { message, type: 'x', param, code: null } }) })

const steps = {
  async 'the empty page says what it is for'() {
    const page = await open('/')
    await page.waitForFunction(() => document.getElementById('model').textContent.includes('tokens'))
    assert.match(await page.locator('.text').first().evaluate(node => getComputedStyle(node, '::before').content), /appears here/)
    await shot(page, 'empty')
  },

  async 'tokens appear, coloured by what they used, without moving the page'() {
    const page = await open('/')
    await page.evaluate(() => {
      window.shift = 0
      new PerformanceObserver(list => list.getEntries().forEach(entry => { window.shift += entry.hadRecentInput ? 0 : entry.value }))
        .observe({ type: 'layout-shift' })
    })
    await page.waitForTimeout(1500)
    await page.evaluate(() => { window.shift = 0 })
    await page.selectOption('#router', { label: 'dynk:τ' })
    const [body] = await send(page, { max_tokens: 60, temperature: 0, seed: 7 })
    assert.deepEqual([body.router, body.moe_trace, body.stream, body.seed, body.max_tokens], ['dynk:0.8', true, true, 7, 60])
    assert.ok(await page.locator('.pane .tok.k').count() > 5)
    const colours = await page.locator('.pane .tok.k').evaluateAll(nodes => new Set(nodes.map(node => getComputedStyle(node).backgroundColor)).size)
    assert.ok(colours > 1, 'tokens with different numbers of experts have different colours')
    assert.match(await figure(page, 'Experts per token'), /^\d\.\d{3}$/)
    assert.match(await figure(page, 'Expert FLOPs'), /saved|costs|same/)
    assert.match(await figure(page, 'Prompt tokens'), /^\d+ \(\d+ cached\)$/)
    assert.ok(await page.evaluate(() => window.shift) < 0.02, 'nothing moves while tokens come')
  },

  async 'hover and keyboard show the experts of each layer'() {
    const page = await open('/')
    await page.check('#logprobs')
    await send(page, { max_tokens: 20, temperature: 0 })
    await page.locator('.pane .tok').nth(3).hover()
    assert.match(await page.textContent('#inspect'), /experts per layer on average.*probability.*L0/s)
    const chips = await page.locator('#inspect .layers .tok').count()
    assert.ok(chips > 0)
    await page.locator('.pane .tok').first().focus()
    await page.keyboard.press('ArrowRight')
    await page.keyboard.press('ArrowRight')
    assert.match(await page.textContent('#inspect'), /token 3/)
    await page.keyboard.press('Home')
    assert.match(await page.textContent('#inspect'), /token 1/)
    await shot(page, 'inspect')
  },

  async 'the router picker and its slider change the request'() {
    const page = await open('/')
    const asked = async (label, prepare = async () => {}) => {
      await page.selectOption('#router', { label })
      await prepare()
      return (await send(page, { max_tokens: 2 }))[0].router
    }
    assert.equal(await asked('native'), 'native')
    assert.equal(await asked('topk:K', () => page.fill('#countvalue', '2')), 'topk:2')
    assert.equal(await asked('dynk:τ', async () => {
      await page.focus('#sharevalue')
      for (let i = 0; i < 5; i++) await page.keyboard.press('ArrowLeft')
    }), 'dynk:0.75')
    assert.equal(await asked('dynk:τ', () => page.selectOption('#massvalue', 'full')), 'dynk:0.75,mass=full')
    assert.match(await page.textContent('#curl'), /"router": "dynk:0.75,mass=full"/)
    assert.equal(await asked('ratio:t', () => page.selectOption('#weightsvalue', 'keep')), 'ratio:0.5,weights=keep')
    await page.selectOption('#weightsvalue', 'native')
    assert.equal(await asked('threshold:θ'), 'threshold:0.2')
    assert.equal(await asked('layers:K,K,…'), 'layers:1')
    assert.equal(await asked('uniform:K'), 'uniform:2')
    assert.equal(await asked('as the server is started'), undefined)
  },

  async 'compare runs both routers with one seed'() {
    const page = await open('/')
    await page.selectOption('#router', { label: 'topk:K' })
    await page.check('#compare')
    await page.fill('#prompt', 'Once upon a time')
    const bodies = await send(page, { max_tokens: 80, temperature: 0 })
    assert.deepEqual(bodies.map(body => body.router), ['topk:1', 'native'])
    assert.equal(bodies[0].seed, bodies[1].seed)
    assert.equal(await figure(page, 'Expert FLOPs', 0), '50.0 % saved')
    assert.equal(await figure(page, 'Expert FLOPs', 1), 'the same as native')
    await page.locator('.pane').nth(1).locator('.tok').nth(2).hover()
    await page.waitForTimeout(1500)
    await shot(page, 'compare')
  },

  async 'a negative saving is a cost in words'() {
    const page = await open('/')
    await page.selectOption('#router', { label: 'dynk:τ' })
    await page.selectOption('#massvalue', 'full')
    await send(page, { max_tokens: 60, temperature: 0 })
    assert.match(await figure(page, 'Expert FLOPs'), /^costs \d+\.\d % more than native$/)
    await page.waitForTimeout(1500)
    await shot(page, 'cost')
  },

  async 'stop ends a request, by button and by key'() {
    const page = await open('/')
    for (const stop of [() => page.click('#stop'), () => page.keyboard.press('Escape')]) {
      await page.route(COMPLETIONS, route => setTimeout(() => route.continue().catch(() => {}), 5000), { times: 1 })
      await page.focus('#prompt')
      await page.keyboard.press('Control+Enter')
      await page.waitForFunction(() => !document.getElementById('stop').disabled)
      await stop()
      await done(page)
      assert.match(await page.textContent('#status'), /^Stopped/)
      assert.equal(await figure(page, 'Ended by'), 'you stopped it')
      assert.ok(await page.isEnabled('#send'))
    }
  },

  async 'streams are read however they are written, and text is never HTML'() {
    const page = await open('/')
    const chunk = choice => JSON.stringify({ choices: [{ index: 0, logprobs: null, finish_reason: null, ...choice }] })
    const pieces = [
      ': a comment\r\n\r\n', `data:${chunk({ text: ' <b>é' })}\n\n`, `data: ${chunk({ text: '☕</b>', moe_trace: { completion: [[1, 2], [2, 2]] } })}\r\n\r\n`,
      `event: x\nid: 3\ndata: ${chunk({ text: '', moe_trace: { completion: [[2, 1]] } }).replace('"index"', '\ndata: "index"')}\n\n`,
      `data: ${chunk({ text: '', finish_reason: 'stop' })}\r\r`, 'data: [DONE]\n\n',
    ]
    await instead(page, { contentType: 'text/event-stream', body: pieces.join('') })
    await send(page)
    assert.equal(await page.textContent('.text'), 'Once upon a time <b>é☕</b>')
    assert.equal(await page.locator('.tok.end').count(), 1, 'the end of text is a token too')
    assert.equal(await page.locator('.text b').count(), 0)
    assert.equal(await figure(page, 'Completion tokens'), '4')
  },

  async 'errors are said in words, with what to do'() {
    const page = await open('/')
    const says = async pattern => { await send(page); assert.match(await page.textContent('#notices'), pattern) }
    for (const [reply, pattern] of [
      [refusal(401, 'no key'), /no key.*under “API key”/],
      [refusal(429, 'queue full', null, { 'retry-after': '3' }), /queue full.*again in 3 s/],
      [refusal(503, 'draining'), /draining.*moment/],
      [refusal(400, 'router is not allowed: --allow-request-router', 'router'), /as the server is started/],
      [{ contentType: 'text/event-stream', body: 'data: {"error":{"message":"the engine stopped"}}\n\n' }, /the engine stopped.*log/],
      [{ contentType: 'text/event-stream', body: ': nothing\n\n' }, /broke off/],
    ]) {
      await instead(page, reply)
      await says(pattern)
    }
    await page.selectOption('#router', { label: 'written out' })
    await page.fill('#freevalue', 'nonsense:1')
    await says(/there is no such router/)
    await shot(page, 'error')
  },

  async 'without --allow-moe-trace the request is sent again without it'() {
    const page = await open('/')
    await instead(page, refusal(400, 'moe_trace is not allowed', 'moe_trace'))
    const bodies = await send(page, { max_tokens: 30, temperature: 0 })
    assert.deepEqual(bodies.map(body => body.moe_trace), [true, undefined])
    assert.match(await page.textContent('#notices'), /not coloured.*--allow-moe-trace/)
    assert.equal(await page.locator('.pane .tok.k').count(), 0)
    assert.ok(await page.locator('.pane .tok').count() > 3)
  },

  async 'chat is sent as messages, and a base model says that it has no template'() {
    const page = await open('/')
    await page.check('[name=mode][value=chat]')
    await page.route('**/v1/chat/completions', route => route.fulfill({ contentType: 'application/json',
      ...refusal(400, 'this model has no chat template') }), { times: 1 })
    const [body] = await send(page)
    assert.deepEqual(body.messages, [{ role: 'user', content: 'Once upon a time' }])
    assert.match(await page.textContent('#notices'), /base model: use “Completion”.*--chat-template/)
  },

  async 'charts and the heat map move'() {
    const page = await open('/')
    await page.waitForTimeout(1200)
    await send(page, { max_tokens: 200, temperature: 0 })
    await page.waitForFunction(() => [...document.querySelectorAll('.chart path')].every(path => path.getAttribute('d')))
    for (const value of await page.locator('.chart .now').allTextContents()) assert.match(value, /\d/)
    await page.focus('#heat')
    await page.keyboard.press('ArrowRight')
    await page.keyboard.press('ArrowDown')
    assert.match(await page.textContent('#readout'), /^Layer 1, expert 0: [\d.]+ %/)
    await page.waitForTimeout(1500)
    await page.click('#baseline')
    assert.match(await page.textContent('#readout'), /nothing was routed/)
  },

  async 'text is readable on every colour, in light and dark'() {
    for (const colorScheme of ['light', 'dark']) {
      const page = await open('/', { colorScheme })
      await page.selectOption('#router', { label: 'dynk:τ' })
      await page.check('#compare')
      await send(page, { max_tokens: 90, temperature: 0 })
      const contrasts = await page.locator('.tok.k').evaluateAll(nodes => {
        const pen = Object.assign(document.createElement('canvas'), { width: 1, height: 1 }).getContext('2d', { willReadFrequently: true })
        const light = colour => {
          pen.fillStyle = colour
          pen.fillRect(0, 0, 1, 1)
          const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map(c => c / 255).map(c => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
          return 0.2126 * r + 0.7152 * g + 0.0722 * b
        }
        return nodes.map(node => {
          const [a, b] = [getComputedStyle(node).color, getComputedStyle(node).backgroundColor].map(light).sort((x, y) => y - x)
          return (a + 0.05) / (b + 0.05)
        })
      })
      assert.ok(Math.min(...contrasts) >= 4.5, `${colorScheme}: contrast ${Math.min(...contrasts)}`)
      await page.waitForTimeout(1500)
      await shot(page, colorScheme)
      await page.click('#theme')
      assert.equal(await page.evaluate(() => document.documentElement.dataset.theme), colorScheme === 'dark' ? 'light' : 'dark')
    }
  },

  async 'a narrow screen has one column and nothing beyond its edge'() {
    for (const path of ['/', '/docs']) {
      const page = await open(path, { viewport: { width: 400, height: 800 } })
      if (path === '/') await send(page, { max_tokens: 40 })
      else await page.waitForSelector('article')
      assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), path)
      await shot(page, path === '/' ? 'narrow' : 'narrow-docs', { fullPage: path === '/' })
    }
  },

  async 'the reference lists every path, filters, and asks for a key'() {
    const page = await open('/docs')
    await page.waitForSelector('article')
    const document = await page.evaluate(() => fetch('/openapi.json', { headers: { Authorization: `Bearer ${sessionStorage.getItem('api-key')}` } }).then(r => r.json()))
    const headings = await page.locator('article h3').allTextContents()
    for (const path of Object.keys(document.paths)) assert.ok(headings.some(text => text.endsWith(` ${path}`)), path)
    for (const name of Object.keys(document.components.schemas)) assert.ok(headings.includes(name), name)
    for (const name of Object.keys(document.components.schemas.CompletionRequest.properties)) {
      assert.ok(await page.locator('#createCompletion td:first-child code', { hasText: new RegExp(`^${name}$`) }).count(), name)
    }
    const broken = await page.locator('a[href^="#"]').evaluateAll(links => links.filter(a => !window.document.getElementById(a.getAttribute('href').slice(1))).length)
    assert.equal(broken, 0, 'every link leads somewhere')
    await shot(page, 'docs', { fullPage: false })
    await page.locator('#createCompletion .fields').first().scrollIntoViewIfNeeded()
    await shot(page, 'docs-fields', { fullPage: false })
    await page.keyboard.press('/')
    await page.keyboard.type('detokenize')
    assert.ok(await page.locator('article:visible').count() < 6)
    await page.click('#theme')
    await shot(page, 'docs-filter', { fullPage: false })
    await page.route('**/openapi.json', route => route.fulfill({ contentType: 'application/json', ...refusal(401, 'this server needs a key') }), { times: 1 })
    await page.reload()
    await page.waitForFunction(() => window.document.getElementById('notice').textContent.includes('API key'))
    await page.fill('#key', 'secret')
    await page.keyboard.press('Tab')
    await page.waitForSelector('article').catch(error => { if (!process.env.API_KEY) throw error })
  },
}

let failed = 0
for (const [name, step] of Object.entries(steps)) {
  if (process.env.ONLY && !name.includes(process.env.ONLY)) continue
  try {
    await step()
    console.log(`ok      ${name}`)
  } catch (error) {
    failed++
    console.log(`FAILED  ${name}\n${error.stack}`)
  }
  await Promise.all(browser.contexts().map(context => context.close()))
}
await browser.close()
for (const problem of problems) console.log(`console  ${problem}`)
process.exit(failed || problems.length ? 1 : 0)

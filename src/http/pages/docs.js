// The API reference: draws /openapi.json. Text of the document is only ever inserted as text.

import { $, call, el, key, wireHeader } from './pages.js'

const METHODS = ['get', 'post', 'put', 'patch', 'delete']
let api = null

/** What a JSON pointer such as #/components/schemas/Usage names; anything else is returned as it is. */
function resolve(node) {
  if (!node?.$ref) return node
  return node.$ref.slice(2).split('/').reduce((at, part) => at[part], api)
}

const nameOf = node => node.$ref.split('/').at(-1)

/** Text whose `quoted` parts are code, as nodes. */
const prose = text => (text ?? '').split('`').map((part, i) => (i % 2 ? el('code', {}, part) : part))
const paragraphs = text => (text ?? '').split('\n\n').map(part => el('p', {}, ...prose(part)))

/** The type of a schema in words, with links to the schemas it is made of. In optional fields of a request null goes
 * without saying. */
function type(schema, optional = false) {
  if (!schema) return ['any']
  if (schema.$ref) return [el('a', { href: `#schema-${nameOf(schema)}` }, nameOf(schema))]
  const options = schema.anyOf ?? schema.oneOf
  if (options) return joined(options.filter(option => !optional || option.type !== 'null').map(option => type(option)))
  if ('const' in schema) return [JSON.stringify(schema.const)]
  if (schema.enum) {
    return [schema.enum.filter(value => !optional || value !== null).map(value => JSON.stringify(value)).join(' | ')]
  }
  return joined([schema.type ?? 'any'].flat().filter(name => !optional || name !== 'null').map(name => {
    if (name === 'array') return ['array of ', ...grouped(type(schema.items))]
    const values = schema.additionalProperties
    if (name === 'object' && typeof values === 'object') return ['object of ', ...grouped(type(values))]
    return [schema.format && name !== 'null' ? `${name} (${schema.format})` : name]
  }))
}

const joined = lists => lists.flatMap((list, i) => (i ? [' | ', ...list] : list))
const grouped = list => (list.includes(' | ') ? ['(', ...list, ')'] : list)

/** The limits of a schema in words; those of a 64-bit number are said by its format. */
function limits(schema) {
  const words = []
  const own = (low, high, unit) => {
    const [a, b] = [schema[low], schema[high]].map(x => x?.toLocaleString('en'))
    if (a !== undefined && b !== undefined) words.push(`${a} to ${b}${unit}`)
    else if (a !== undefined) words.push(`${a} or more${unit}`)
    else if (b !== undefined) words.push(`at most ${b}${unit}`)
  }
  if (schema.exclusiveMinimum !== undefined) words.push(`above ${schema.exclusiveMinimum}`)
  if (schema.format !== 'int64') own('minimum', 'maximum', '')
  own('minLength', 'maxLength', ' characters')
  own('minItems', 'maxItems', ' items')
  own('minProperties', 'maxProperties', ' entries')
  if (schema.pattern) words.push(`matches ${schema.pattern}`)
  const within = (name, part) => {
    if (part && typeof part === 'object' && !part.$ref) words.push(...limits(part).map(text => `${name}: ${text}`))
  }
  for (const option of schema.anyOf ?? []) within(option.type, { ...option, items: null })
  if (!schema.anyOf) within('each', schema.items ?? schema.additionalProperties)
  return [...new Set(words)]
}

function fields(schema) {
  const row = ([name, field]) => {
    const required = schema.required?.includes(name)
    return el('tr', {},
      el('td', {}, el('code', {}, name), ...(required ? [' ', el('span', { class: 'required' }, 'required')] : [])),
      el('td', { 'data-label': 'Type' }, ...type(field, schema.additionalProperties === false && !required)),
      el('td', { 'data-label': 'Default' }, (field.default ?? null) === null ? '' : el('code', {}, JSON.stringify(field.default))),
      el('td', { 'data-label': 'Limits' }, limits(field).join('; ')),
      el('td', {}, ...prose(field.description ?? resolve(field)?.description)))
  }
  const head = ['Field', 'Type', 'Default', 'Limits', 'What it is'].map(name => el('th', { scope: 'col' }, name))
  return el('div', { class: 'scroll' }, el('table', { class: 'fields' },
    el('thead', {}, el('tr', {}, ...head)), el('tbody', {}, ...Object.entries(schema.properties).map(row))))
}

/** A schema in full: a table of its fields, or its type. */
function body(schema) {
  const whole = resolve(schema)
  if (whole.properties) return [fields(whole)]
  const options = whole.oneOf ?? whole.anyOf
  if (options?.some(option => option.properties)) {
    return options.flatMap(option => [el('h4', {}, option.description ?? ''), ...body(option)])
  }
  return [el('p', {}, ...type(whole))]
}

/** What a schema is for, and all of it. */
const described = schema => [el('p', {}, ...prose(resolve(schema).description)), ...body(schema)]

function code(text) {
  const copy = el('button', { type: 'button', class: 'copy' }, 'Copy')
  copy.addEventListener('click', async () => {
    // Pages that did not come over https or from this machine may not write to the clipboard.
    const done = await navigator.clipboard?.writeText(text).then(() => true, () => false)
    copy.textContent = done ? 'Copied' : 'Select it and copy'
  })
  return el('pre', { tabindex: 0 }, copy, text)
}

function curl(path, method, example, open) {
  const parts = [`curl ${example?.stream ? '-N' : '-s'} ${location.origin}${path}`]
  if (!open && key.get()) parts.push('-H "Authorization: Bearer $MOE_SERVE_API_KEY"')
  if (example) parts.push("-H 'Content-Type: application/json'", `-d '${JSON.stringify(example).replaceAll("'", String.raw`'\''`)}'`)
  return code(parts.join(' \\\n  '))
}

function heading(level, id, ...children) {
  return el(level, {}, el('a', { href: `#${id}` }, ...children))
}

function responses(operation) {
  const rows = Object.entries(operation.responses).map(([status, given]) => {
    const response = resolve(given)
    const kinds = Object.entries(response.content ?? {}).flatMap(([kind, media], i) => [
      ...(i ? [el('br')] : []), el('code', {}, kind), ' ', ...type(media['x-event-schema'] ?? media.schema),
      media['x-event-schema'] ? ' per event' : ''])
    const headers = Object.keys(response.headers ?? {}).join(', ')
    return el('tr', {}, el('td', {}, el('code', {}, status)), el('td', { 'data-label': 'Content' }, ...kinds),
      el('td', { 'data-label': 'Headers' }, headers), el('td', {}, ...prose(response.description)))
  })
  const head = ['Status', 'Content', 'Headers', 'When'].map(name => el('th', { scope: 'col' }, name))
  return el('div', { class: 'scroll' }, el('table', { class: 'fields' }, el('thead', {}, el('tr', {}, ...head)), el('tbody', {}, ...rows)))
}

function sampleOf(operation) {
  const content = Object.values(resolve(operation.responses['200']).content ?? {})
  return content.filter(media => media.example !== undefined).map(media => el('details', {},
    el('summary', {}, media['x-event-schema'] ? 'An answer, streamed' : 'An answer'),
    code(typeof media.example === 'string' ? media.example : JSON.stringify(media.example, null, 2))))
}

function endpoint(path, method, operation) {
  const id = operation.operationId
  const content = operation.requestBody?.content['application/json']
  const examples = Object.values(content?.examples ?? {})
  const open = operation.security?.length === 0
  const parameters = { properties: {}, required: [] }
  for (const { name, schema, description, required } of operation.parameters ?? []) {
    parameters.properties[name] = { ...schema, description }
    if (required) parameters.required.push(name)
  }
  const concrete = (operation.parameters ?? []).reduce((at, { name, example }) => at.replace(`{${name}}`, example), path)
  const [first, ...more] = examples
  return el('article', { id, class: 'card', 'aria-label': `${method} ${path}` },
    heading('h3', id, el('span', { class: `method ${method}` }, method), ' ', path),
    el('p', {}, el('strong', {}, `${operation.summary}. `), ...prose(operation.description)),
    ...(parameters.required.length ? [el('h4', {}, 'In the path'), fields(parameters)] : []),
    el('h4', {}, first ? `Example: ${first.summary.toLowerCase()}` : 'Example'), curl(concrete, method, first?.value, open),
    ...more.map(example => el('details', {}, el('summary', {}, example.summary), curl(concrete, method, example.value, open))),
    ...(content ? [el('h4', {}, 'Request'), ...described(content.schema)] : []),
    el('h4', {}, 'Responses'), responses(operation), ...sampleOf(operation))
}

function schemaEntry([name, schema]) {
  const id = `schema-${name}`
  return el('article', { id, class: 'card', 'aria-label': name }, heading('h3', id, name), ...described(schema))
}

/** The operations as [path, method, operation]. */
const operations = () => Object.entries(api.paths).flatMap(([path, item]) => METHODS.filter(m => item[m]).map(m => [path, m, item[m]]))

function draw() {
  document.title = `API reference · ${api.info.title} ${api.info.version}`
  const title = el('h2', {}, `${api.info.title} ${api.info.version}`)
  const intro = el('article', { class: 'card', id: 'about', 'aria-label': 'About' }, title, ...paragraphs(api.info.description))
  const [entries, contents] = [[intro], []]
  const link = (id, ...label) => el('li', { 'data-for': id }, el('a', { href: `#${id}` }, ...label))
  for (const tag of api.tags) {
    const own = operations().filter(([, , operation]) => operation.tags.includes(tag.name))
    entries.push(...own.map(operation => endpoint(...operation)))
    contents.push(el('h2', {}, tag.name), el('ul', {}, ...own.map(([path, method, operation]) => (
      link(operation.operationId, el('span', { class: `method ${method}` }, method), el('span', {}, path))))))
  }
  const schemas = Object.entries(api.components.schemas)
  entries.push(...schemas.map(schemaEntry))
  contents.push(el('h2', {}, 'Schemas'), el('ul', {}, ...schemas.map(([name]) => link(`schema-${name}`, name))))
  $('entries').replaceChildren(...entries)
  $('contents').replaceChildren(...contents)
  filter()
  // The browser looked for the address's anchor before it was drawn.
  if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView()
}

function filter() {
  const words = $('filter').value.toLowerCase().split(/\s+/).filter(Boolean)
  let shown = 0
  for (const entry of $('entries').children) {
    const text = entry.textContent.toLowerCase()
    entry.hidden = !words.every(word => text.includes(word))
    shown += !entry.hidden
    const link = document.querySelector(`[data-for="${CSS.escape(entry.id)}"]`)
    if (link) link.hidden = entry.hidden
  }
  for (const list of $('contents').querySelectorAll('ul')) {
    list.previousElementSibling.hidden = ![...list.children].some(item => !item.hidden)
  }
  $('found').textContent = words.length ? `${shown} of ${$('entries').children.length} entries` : ''
}

async function load() {
  try {
    api = await (await call('/openapi.json')).json()
    $('notice').hidden = true
    draw()
  } catch (error) {
    $('notice').hidden = false
    $('notice').className = 'notice bad'
    $('notice').textContent = error.words?.() ?? error.message
    if (error.status === 401) $('key').focus()
  }
}

$('filter').addEventListener('input', filter)
addEventListener('keydown', event => {
  if (event.key === '/' && !event.target.closest('input, textarea, select')) {
    event.preventDefault()
    $('filter').focus()
  }
})
addEventListener('hashchange', () => {
  // A link may lead to an entry that the filter hides.
  if (document.getElementById(decodeURIComponent(location.hash.slice(1)))?.hidden) {
    $('filter').value = ''
    filter()
    document.getElementById(decodeURIComponent(location.hash.slice(1))).scrollIntoView()
  }
})
wireHeader(load)
load()

// What both pages share: the theme, the API key, making elements, and calling the server.

const root = document.documentElement

/** The theme that was chosen here before; without one, the system's. */
const theme = localStorage.getItem('theme')
if (theme === 'light' || theme === 'dark') root.dataset.theme = theme

/** An element with attributes and children. Strings become text nodes, so nothing from the server is read as HTML. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag)
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false) node.setAttribute(name, value === true ? '' : value)
  }
  node.append(...children)
  return node
}

export const $ = id => document.getElementById(id)

/** The key is forgotten with the tab. */
export const key = {
  get: () => sessionStorage.getItem('api-key') ?? '',
  set: text => (text ? sessionStorage.setItem('api-key', text) : sessionStorage.removeItem('api-key')),
}

/** A request that the server refused, or that never reached it. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, retryAfter = null } = {}) {
    super(message)
    Object.assign(this, { status, param, retryAfter })
  }

  /** What the server said and what can be done about it, in sentences. */
  words() {
    const said = this.status ? `The server says: ${this.message}` : this.message
    return `${said}${/[.!?]$/.test(said) ? '' : '.'} ${this.advice()}`
  }

  /** What can be done about it, or nothing. */
  advice() {
    if (this.status === 401) return 'Enter the key that the server was started with (--api-key) under “API key”.'
    if (this.status === 429) return `Too much is asked of it at once: try again in ${this.retryAfter ?? 'some'} s.`
    if (this.status === 503) return 'It is loading its model or shutting down: try again in a moment.'
    if (this.status === 500) return 'The server’s log says more.'
    if (this.status === 0) return 'Check that it still runs, and that this page came from it.'
    return ''
  }
}

/** fetch with the key; every failure is an ApiError, except an abort. */
export async function call(path, options = {}) {
  const headers = { ...options.headers }
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`
  let response
  try {
    response = await fetch(path, { ...options, headers })
  } catch (error) {
    if (error.name === 'AbortError') throw error
    throw new ApiError('The server cannot be reached.')
  }
  if (response.ok) return response
  const { status } = response
  const detail = (await response.json().catch(() => null))?.error
  const message = detail?.message ?? `The server answered with status ${status}.`
  throw new ApiError(message, { status, param: detail?.param, retryAfter: response.headers.get('retry-after') })
}

/** Wires the theme button and the key field, which both pages have. `changed` runs after the key did. */
export function wireHeader(changed) {
  const dark = matchMedia('(prefers-color-scheme: dark)')
  const isDark = () => (root.dataset.theme ? root.dataset.theme === 'dark' : dark.matches)
  const button = $('theme')
  const show = () => {
    button.textContent = isDark() ? 'Light' : 'Dark'
    dispatchEvent(new Event('themechange'))
  }
  button.addEventListener('click', () => {
    root.dataset.theme = isDark() ? 'light' : 'dark'
    localStorage.setItem('theme', root.dataset.theme)
    show()
  })
  dark.addEventListener('change', show)
  show()
  const field = $('key')
  field.value = key.get()
  field.addEventListener('change', () => {
    key.set(field.value.trim())
    changed()
  })
}

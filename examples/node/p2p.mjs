/* A host or guest of p2pserver in plain Node (18 or newer), without packages. docs/WIRE.md describes the datagrams.
 * It sends no P2P and is a plain peer: datagrams may be lost, doubled, reordered or forged, and the game copes.
 * A game should add: IPv6; private networks among the addresses to skip, and the budget over all sessions (WIRE.md,
 * Checks); the way back after a silence (Silence); a file for a host's peerId, to get its name back after a crash. */
import { createHmac, randomBytes } from 'node:crypto'
import { createSocket } from 'node:dgram'
import { EventEmitter, once } from 'node:events'

const REQUEST = 0x0001, SUCCESS = 0x0101, USERNAME = 0x0006, INTEGRITY = 0x0008, XOR_MAPPED_ADDRESS = 0x0020
const PRIORITY = 0x0024, USE_CANDIDATE = 0x0025, FINGERPRINT = 0x8028, CONTROLLED = 0x8029, CONTROLLING = 0x802a
const COOKIE = Buffer.from('2112a442', 'hex'), PEER_REFLEXIVE = Buffer.from('6effffff', 'hex')
const XOR_MASK = Buffer.from('000021122112a442', 'hex')       // for zero, family, port and IP address

const xor = value => value.map((byte, i) => byte ^ XOR_MASK[i])
const attribute = (type, value) =>
  Buffer.concat([Buffer.from([type >> 8, type, 0, value.length]), value, Buffer.alloc(-value.length & 3)])

function crc32(bytes) {
  let crc = ~0
  for (const byte of bytes) {
    crc ^= byte
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0)
  }
  return ~crc
}

/** HMAC-SHA1 over what comes before MESSAGE-INTEGRITY, with a length in the header that counts it already. */
function sign(head, key) {
  head.writeUInt16BE(head.length - 20 + 24, 2)
  return createHmac('sha1', key).update(head).digest()
}

/** A message. A question to a STUN server has no key. */
function encode(kind, transaction, attributes, key) {
  let message = Buffer.concat([Buffer.from([kind >> 8, kind, 0, 0]), COOKIE, transaction, ...attributes])
  if (key) message = Buffer.concat([message, attribute(INTEGRITY, sign(message, key))])
  message.writeUInt16BE(message.length - 20 + 8, 2)
  const crc = crc32(message) ^ 0x5354554e
  return Buffer.concat([message, attribute(FINGERPRINT, Buffer.from([crc >> 24, crc >> 16, crc >> 8, crc]))])
}

/** {kind, transaction, values by type, signed: what comes before MESSAGE-INTEGRITY}; null if it is the game's. */
function decode(datagram) {
  if (datagram.length < 20 || datagram[0] > 3 || !datagram.subarray(4, 8).equals(COOKIE)) return null
  const message = { kind: datagram.readUInt16BE(0), transaction: datagram.subarray(8, 20), values: {} }
  for (let at = 20; at + 4 <= datagram.length && !message.signed;) {
    const type = datagram.readUInt16BE(at), end = at + 4 + datagram.readUInt16BE(at + 2)
    if (type === INTEGRITY) message.signed = datagram.subarray(0, at)
    message.values[type] ??= datagram.subarray(at + 4, end)
    at = end + (-end & 3)
  }
  return message
}

/** Emits 'connected' and 'lost' with a session, and 'message' with a session and the data that came. */
export class Game extends EventEmitter {
  peerId = randomBytes(16).toString('hex')
  tieBreaker = randomBytes(8)
  question = randomBytes(12)        // the transaction with the STUN server
  sessions = new Map()              // by sessionId; a host has one for each guest

  /** Registers the game, or starts it. Throws what the server says against that. */
  async open(server, name, isHost) {
    Object.assign(this, { server: new URL(server), name, isHost })
    const probe = createSocket('udp4')      // tells from which address we reach the server
    await new Promise(done => probe.connect(this.server.port || 80, this.server.hostname, done))
    this.socket = createSocket('udp4', (data, { address, port }) => this.receive(data, `${address}:${port}`)).bind()
    this.socket.on('error', () => {})       // what cannot be sent is as good as lost
    await once(this.socket, 'listening')
    this.addresses = [`${probe.address().address}:${this.socket.address().port}`]
    probe.close()
    await this.call()
    this.timer = setInterval(() => this.update(Date.now()), 10)
  }

  /** Leaves, or takes the game off the list. A plain peer has no good-bye for the other: it falls silent. */
  async close() {
    clearInterval(this.timer)
    await (this.isHost ? this.request('DELETE', encodeURIComponent(this.name)) : this.request('POST', 'leave'))
    this.socket.close()
  }

  send(session, data, address = session.selected) {
    this.socket.send(data, ...address.split(':').reverse())     // port and IP address
  }

  async request(method, path, fields) {
    const body = JSON.stringify({ name: this.name, peerId: this.peerId, ...fields })
    const response = await fetch(new URL(`/games/${path}`, this.server),
      { method, body, headers: { 'Content-Type': 'application/json' }, signal: AbortSignal.timeout(15_000) })
    const answer = response.status === 204 ? {} : await response.json()
    if (!response.ok) throw Error(answer.detail)
    return response.headers.has('Preference-Applied') ? { ...answer, pollAfter: 0 } : answer      // it has waited
  }

  /** Registers, polls or starts, takes the sessions of the answer, and asks STUN, whose answer the next call tells. */
  async call() {
    const path = !this.isHost ? 'start' : this.cursor === undefined ? 'register' : 'poll'
    const fields = { addresses: this.addresses, after: this.cursor, wait: this.addresses[1] ? 10 : 0 }
    Object.assign(this, { cursor: undefined, callAt: Date.now() + 16_000 })       // unless an answer comes
    const answer = await this.request('POST', path, fields)
    Object.assign(this, { cursor: answer.cursor ?? 0, callAt: Date.now() + 1000 * answer.pollAfter })
    this.stunPort = answer.stun?.[0] ?? this.stunPort
    if (this.stunPort) this.socket.send(encode(REQUEST, this.question, []), this.stunPort, this.server.hostname)
    for (const { sessionId: id, sessionKey: key, addresses } of answer.guests ?? (answer.sessionId ? [answer] : [])) {
      const session = this.sessions.get(id) ?? { id, key, checks: new Map(), heard: new Set(), proven: new Set(),
        inbox: [], turn: 0, due: 0, answered: Date.now() }
      session.addresses = addresses.filter(address => /^\d+(\.\d+){3}:\d{4,5}$/.test(address))
      this.sessions.set(id, this.isHost ? Object.assign(session, { turn: 0, due: 0 }) : session)     // all told is new
    }
  }

  /** Does what is due. One check at a time keeps 5 ms between any two. */
  update(now) {
    if (now >= this.callAt) this.call().catch(() => {})
    const session = [...this.sessions.values()].find(each => now >= each.due)
    if (session) this.checkNext(session, now)
  }

  /** Five checks of a host open its router, whatever addresses a guest claims; those of the guest do the rest. */
  checkNext(session, now) {
    if (now > session.answered + 40_000) return this.sessions.delete(session.id) && this.emit('lost', session)
    const { selected, addresses, turn } = session, address = selected ?? addresses[turn % addresses.length]
    const wait = selected ? 4000 + 2000 * Math.random() : turn < (this.isHost ? 1 : 20) ? 50 : this.isHost ? 2000 : 170
    Object.assign(session, { due: now + wait, turn: turn + 1 })
    if (selected || (address && turn < (this.isHost ? 5 : 100))) this.check(session, address)
  }

  check(session, address) {
    const { id, key, nominated = address } = session, transaction = randomBytes(12)
    const attributes = [attribute(USERNAME, Buffer.from(`${id}:${id}`)),
      attribute(this.isHost ? CONTROLLED : CONTROLLING, this.tieBreaker), attribute(PRIORITY, PEER_REFLEXIVE)]
    if (!this.isHost && address === nominated) attributes.push(attribute(USE_CANDIDATE, Buffer.alloc(0)))
    session.checks.set(transaction.toString('hex'), address)
    this.send(session, encode(REQUEST, transaction, attributes, key), address)
  }

  receive(datagram, from) {
    const message = decode(datagram), sessions = [...this.sessions.values()]
    if (!message) return this.deliver(sessions.find(each => each.heard.has(from)), datagram)
    const { kind, transaction, values, signed } = message, id = transaction.toString('hex')
    if (kind === SUCCESS && transaction.equals(this.question)) {
      const value = xor(values[XOR_MAPPED_ADDRESS]), mapped = `${value.subarray(4).join('.')}:${value.readUInt16BE(2)}`
      if (mapped !== this.addresses[1]) Object.assign(this, { addresses: [this.addresses[0], mapped], callAt: 0 })
    }
    const isCheck = kind === REQUEST && values[this.isHost ? CONTROLLING : CONTROLLED]
    const session = isCheck ? this.sessions.get(String(values[USERNAME]).split(':')[0])
      : sessions.find(each => kind === SUCCESS && each.checks.get(id) === from)
    if (!session || !signed || !sign(signed, session.key).equals(values[INTEGRITY])) return
    session.heard.add(from)
    if (isCheck) {
      const [ip, port] = from.split(':')
      const mapped = attribute(XOR_MAPPED_ADDRESS, xor(Buffer.from([0, 1, port >> 8, port, ...ip.split('.')])))
      this.send(session, encode(SUCCESS, transaction, [mapped], session.key), from)
      if (this.isHost && values[USE_CANDIDATE]) session.nominated = from
      if (!session.proven.has(from)) this.check(session, from)
    } else {
      session.checks.delete(id)
      session.proven.add(from)
      session.answered = Date.now()
      if (!this.isHost) session.nominated ??= from
    }
    const { selected, nominated, proven } = session
    if (nominated === selected || !proven.has(nominated)) return
    Object.assign(session, { selected: nominated, due: 0 })       // which is checked at once, and so nominated
    if (!selected) this.emit('connected', session)
    this.deliver(session)
  }

  /** Hands over what has come, once there is a way to reply. */
  deliver(session, datagram) {
    if (datagram) session?.inbox.push(datagram)
    while (session?.selected && session.inbox.length) this.emit('message', session, session.inbox.shift())
  }
}

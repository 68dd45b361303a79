// A plain peer after docs/WIRE.md and docs/API.md, for Node 18 or newer, over IPv4. peer.mjs shows how a game uses it.
import dgram from "node:dgram";
import { createHmac, randomBytes } from "node:crypto";
import { once } from "node:events";
import { setTimeout as sleep } from "node:timers/promises";

const COOKIE = 0x2112a442, REQUEST = 0x0001, SUCCESS = 0x0101;
const USERNAME = 0x0006, INTEGRITY = 0x0008, MAPPED = 0x0020, PRIORITY = 0x0024, USE_CANDIDATE = 0x0025;
const FINGERPRINT = 0x8028, CONTROLLED = 0x8029, CONTROLLING = 0x802a;
const GAPS = [0, 50, 1000, 3000, 5000];     // milliseconds before each check of a host to an IP address that was not heard

const word = (value) => Buffer.from([value >>> 24, value >>> 16, value >>> 8, value]);
const sign = (key, ...bytes) => createHmac("sha1", key).update(Buffer.concat(bytes)).digest();      // the key is the text
const head = (kind, length, transaction) => Buffer.concat([word(kind << 16 | length), word(COOKIE), transaction]);
const attribute = (type, value) => Buffer.concat([word(type << 16 | value.length), value, Buffer.alloc(-value.length & 3)]);
const isAuthentic = ({ signed, attributes }, key) => signed && sign(key, ...signed).equals(attributes.get(INTEGRITY));
const ipOf = (address) => address.split(":")[0], portOf = (address) => +address.split(":")[1];
const ipWord = (address) => Buffer.from(ipOf(address).split(".")).readUInt32BE();
const packAddress = (address) => Buffer.concat([word(0x10000 | portOf(address) ^ COOKIE >>> 16), word(ipWord(address) ^ COOKIE)]);
const unpackAddress = ({ attributes }, value = attributes.get(MAPPED)) =>
  `${word(value.readUInt32BE(4) ^ COOKIE).join(".")}:${value.readUInt16BE(2) ^ COOKIE >>> 16}`;

function fingerprint(bytes) {       // CRC-32 of zlib, and XOR
  let crc = ~0;
  for (const byte of bytes) for (let bit = 0; bit < 8; bit++) crc = crc >>> 1 ^ ((crc ^ byte >> bit) & 1 ? 0xedb88320 : 0);
  return word(~crc ^ 0x5354554e);
}

function encode(kind, transaction, attributes, key) {
  let body = Buffer.concat(attributes.map(([type, value]) => attribute(type, value)));
  if (key) body = Buffer.concat([body, attribute(INTEGRITY, sign(key, head(kind, body.length + 24, transaction), body))]);
  const message = Buffer.concat([head(kind, body.length + 8, transaction), body]);
  return Buffer.concat([message, attribute(FINGERPRINT, fingerprint(message))]);
}

function decode(bytes) {        // undefined: it is the game's
  if (bytes.length < 20 || bytes.length % 4 || bytes[0] > 3 || bytes.readUInt32BE(4) !== COOKIE) return;
  const message = { kind: bytes.readUInt16BE(0), transaction: bytes.subarray(8, 20), attributes: new Map() };
  for (let at = 20; at < bytes.length;) {
    const type = bytes.readUInt16BE(at), size = bytes.readUInt16BE(at + 2), value = bytes.subarray(at + 4, at + 4 + size);
    if (type === FINGERPRINT) return value.equals(fingerprint(bytes.subarray(0, at))) ? message : undefined;
    if (!message.signed && !message.attributes.has(type)) message.attributes.set(type, value);
    if (type === INTEGRITY) message.signed ??= [head(message.kind, at + 4, message.transaction), bytes.subarray(20, at)];
    at += 4 + size + (-size & 3);
  }
  if (!message.signed) return message;      // the answer of a STUN server
}

class Session {     // with one other player
  remotes = []; urgent = []; waiting = []; heard = new Set(); proven = new Set(); pending = new Map(); unheard = new Map();
  began = Date.now(); due = 0; sent = 0; tieBreaker = randomBytes(8);
  constructor(endpoint, { sessionId, sessionKey, from }, isGuest) {
    Object.assign(this, { endpoint, id: sessionId, key: sessionKey, from, isGuest });
    endpoint.sessions.set(sessionId, this);
  }

  send(data) { this.endpoint.send(Buffer.from(data), this.selected); }
  learn(addresses) {
    const added = addresses.filter((each) => this.endpoint.isUsable(each) && !this.remotes.includes(each));
    this.remotes = [...added, ...this.remotes].slice(0, 16);
    if (this.selected) this.urgent.push(...added);
  }

  tick(now) {     // whether it has sent a check
    if (!this.selected && now - this.began > 15000) return this.end("no check got through in both directions");
    if (this.selected && now - this.answeredAt > 40000) return this.end("the other player has been silent for 40 seconds");
    this.due = now + (this.sent === 0 ? 10 : this.sent < Math.max(20, 3 * this.remotes.length) ? 50 : 170);
    const consent = this.selected && now >= this.consent;
    const address = consent ? this.selected : this.urgent.shift() ?? (this.selected ? null : this.remotes[this.sent % this.remotes.length]);
    if (consent) this.consent = now + 4000 + 2000 * Math.random();
    if (!address || !consent && this.sent++ >= 100 || !this.mayCheck(ipOf(address), now)) return false;
    const transaction = randomBytes(12), nominates = this.isGuest && (!this.selected || this.selected === address);
    if (nominates) this.nominated = address;
    this.pending.set(transaction.toString("hex"), address);
    this.endpoint.send(encode(REQUEST, transaction, [
      [USERNAME, Buffer.from(`${this.id}:${this.id}`)], [this.isGuest ? CONTROLLING : CONTROLLED, this.tieBreaker],
      [PRIORITY, word(0x6effffff)], ...nominates ? [[USE_CANDIDATE, Buffer.alloc(0)]] : []], this.key), address);
    return true;
  }

  mayCheck(ip, now) {     // a host is told by a guest whom to check: it may be anybody
    if (this.isGuest || ip === this.from || [...this.heard].some((each) => ipOf(each) === ip)) return true;
    const [count, latest] = this.unheard.get(ip) ?? [0, 0];
    return now >= latest + GAPS[count] && this.unheard.set(ip, [count + 1, now]);
  }

  requested(message, source) {
    if (!isAuthentic(message, this.key) || !message.attributes.has(this.isGuest ? CONTROLLED : CONTROLLING)) return;
    this.endpoint.send(encode(SUCCESS, message.transaction, [[MAPPED, packAddress(source)]], this.key), source);
    this.heard.add(source);
    if (!this.proven.has(source) && !this.urgent.includes(source)) [this.due] = [0, this.urgent.push(source)];
    if (!this.isGuest && message.attributes.has(USE_CANDIDATE)) this.select(this.nominated = source);
  }

  answered(message, source) {
    const transaction = message.transaction.toString("hex");
    if (this.pending.get(transaction) !== source || !isAuthentic(message, this.key)) return;
    this.pending.delete(transaction);
    this.heard.add(source);
    this.proven.add(source);
    if (source === this.selected) this.answeredAt = Date.now();
    else if (!this.isGuest) this.select(this.nominated);
    else if (!this.selected || Date.now() - this.answeredAt > 6000) this.select(source);
  }

  select(address) {
    if (!this.proven.has(address) || address === this.selected) return;
    const isFirst = !this.selected;
    [this.selected, this.answeredAt, this.consent] = [address, Date.now(), Date.now() + 5000];
    if (this.isGuest && this.nominated !== address) [this.due] = [0, this.urgent.unshift(address)];
    if (isFirst) this.endpoint.onConnect(this);
    for (const data of this.waiting.splice(0)) this.onMessage(data);
  }

  received(data) { this.selected ? this.onMessage(data) : this.waiting.length < 64 && this.waiting.push(data); }
  end(reason) { this.endpoint.sessions.delete(this.id) && this.endpoint.onEnd(reason); }
}

export class Endpoint {     // one UDP socket with all its sessions
  sessions = new Map(); peerId = randomBytes(24).toString("base64url"); socket = dgram.createSocket("udp4");
  async open(server) {
    this.server = new URL(server);
    const probe = dgram.createSocket("udp4");
    probe.connect(9, this.server.hostname);
    await once(probe, "connect");
    this.ip = probe.address().address;      // from which we reach the server
    probe.close();
    this.socket.on("message", (bytes, { address, port }) => this.take(bytes, `${address}:${port}`)).bind();
    await once(this.socket, "listening");
    setInterval(() => [...this.sessions.values()].some((each) => each.due <= Date.now() && each.tick(Date.now())), 5);
  }

  get addresses() { return [`${this.ip}:${this.socket.address().port}`, ...this.mapped ? [this.mapped] : []]; }
  session(told, isGuest) { return this.sessions.get(told.sessionId) ?? new Session(this, told, isGuest); }
  isUsable(text) {
    const [a, b, , , port] = /^(\d+)\.(\d+)\.(\d+)\.(\d+):(\d+)$/.exec(text)?.slice(1).map(Number) ?? [0];
    const isPrivate = a === 10 || a === 127 || a === 172 && b >> 4 === 1 || a === 192 && b === 168 || a === 100 && b >> 6 === 1;
    return a > 0 && a < 224 && !(a === 169 && b === 254) && (port > 1023 || port === 80 || port === 443)
      && (!isPrivate || this.ip.startsWith(`${a}.${b}.`));
  }

  send(bytes, address) { this.socket.send(bytes, portOf(address), ipOf(address), () => {}); }        // what cannot be sent is lost

  take(bytes, source) {
    const message = decode(bytes), sessions = [...this.sessions.values()];
    if (!message) sessions.reverse().find((each) => each.heard.has(source))?.received(bytes);
    else if (message.kind === REQUEST) this.sessions.get(message.attributes.get(USERNAME)?.toString().split(":")[0])?.requested(message, source);
    else if (message.kind === SUCCESS && this.question?.equals(message.transaction)) this.mapped = unpackAddress(message);
    else if (message.kind === SUCCESS) sessions.forEach((each) => each.answered(message, source));
  }

  async askStun([port]) {     // now, and every 15 seconds; a question that is lost is asked again
    const ask = () => this.socket.send(encode(REQUEST, this.question = randomBytes(12), []), port, this.server.hostname, () => {});
    if (port) setInterval(ask, 15000);
    for (const pause of port ? [200, 500, 1000] : []) if (!this.mapped) await sleep(pause, ask());
  }

  async call(path, body, method = "POST") {
    const response = await fetch(new URL(path, this.server), { method, headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ peerId: this.peerId, ...body }) });
    const answer = response.status === 204 ? {} : await response.json();
    if (!response.ok) throw Object.assign(new Error(answer.detail), { status: response.status });
    return { ...answer, pause: response.headers.has("preference-applied") ? 0 : 1000 * answer.pollAfter };
  }

  async keepCalling(path, name, take) {       // a poll or a start, held by the server until there is news
    for (let after, answer; ; await sleep(answer.pause)) {
      answer = await this.call(path, { name, addresses: this.addresses, after, wait: 25 }).catch((error) => {
        if (error.status < 500 && error.status !== 429) throw error;
        return { cursor: after, pause: 2000 };      // a server that is gone may come back
      });
      after = answer.cursor;
      if (answer.name) take(answer);
    }
  }
}

// The API on Express. The argument is the port.

import { randomBytes } from "node:crypto";
import express from "express";

const lease = { expiresIn: 60, pollAfter: 2 }; // seconds

class Problem extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

// ---- fields ----

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isText = (most) => (value) => typeof value === "string" && value.length > 0 && value.length <= most;
const optional = (right) => (value) => value === undefined || value === null || right(value);

const isName = (value) => isText(64)(value) && !value.includes("/");
const isPeerId = isText(128);
const areAddresses = (value) =>
  Array.isArray(value) && value.length <= 16 && value.every((item) => typeof item === "string" || isObject(item));
const isInfo = optional(isObject);
const isFlag = optional((value) => typeof value === "boolean");
const isCursor = optional((value) => Number.isSafeInteger(value) && value >= 0);

/** Middleware: the body must be an object with these fields. */
function fields(table) {
  const rows = Object.entries(table);
  return (request, response, next) => {
    const body = request.body;
    if (!isObject(body)) throw new Problem(400, "the body must be a JSON object");
    const faults = rows.filter(([name, right]) => !right(body[name])).map(([name]) => name);
    if (faults.length) throw new Problem(400, `missing or of the wrong type: ${faults.join(", ")}`);
    next();
  };
}

// ---- games ----

const games = new Map();
let cursor = 0;

function found(name) {
  const game = games.get(name);
  if (!game) throw new Problem(404, "there is no such game");
  return game;
}

function owned(name, peerId) {
  const game = found(name);
  if (game.owner !== peerId) throw new Problem(403, "the peerId is not the one that registered this game");
  return game;
}

function sameAddresses(one, other) {
  if (!one || one.length !== other.length) return false;
  return one.every((item, i) => item === other[i] || (isObject(item) && JSON.stringify(item) === JSON.stringify(other[i])));
}

const sessionOf = (guest) => ({ sessionId: guest.sessionId, sessionKey: guest.sessionKey, addresses: guest.addresses });

// ---- endpoints ----

const app = express();
app.disable("x-powered-by");
app.disable("etag");
app.use(express.json());

app.post("/games/register", fields({ name: isName, peerId: isPeerId, info: isInfo, listed: isFlag }), (request, response) => {
  const { name, peerId, info, listed } = request.body;
  let game = games.get(name);
  const created = !game;
  if (created) {
    game = { name, owner: peerId, info: {}, listed: true, addresses: [], offered: 0, guests: new Map(), changed: 0 };
    games.set(name, game);
  } else if (game.owner !== peerId) {
    throw new Problem(409, "the name is taken");
  }
  game.info = info ?? game.info;
  game.listed = listed ?? game.listed;
  response.status(created ? 201 : 200).json({ name, ...lease });
});

app.post("/games/poll", fields({ name: isName, peerId: isPeerId, addresses: areAddresses, after: isCursor }), (request, response) => {
  const { name, peerId, addresses, after } = request.body;
  const game = owned(name, peerId);
  if (!sameAddresses(game.addresses, addresses)) {
    game.addresses = addresses;
    game.offered = ++cursor;
  }
  const since = after ?? -1;
  const guests = [];
  for (const guest of game.guests.values()) {
    if (guest.changed > since) guests.push(sessionOf(guest));
  }
  response.json({ name, guests, cursor: game.changed, ...lease });
});

app.post("/games/start", fields({ name: isName, peerId: isPeerId, addresses: areAddresses }), (request, response) => {
  const { name, peerId, addresses } = request.body;
  const game = found(name);
  if (game.owner === peerId) throw new Problem(409, "a host cannot start its own game");
  let guest = game.guests.get(peerId);
  if (!guest) {
    guest = { sessionId: randomBytes(16).toString("hex"), sessionKey: randomBytes(16).toString("hex"), addresses: null, changed: 0 };
    game.guests.set(peerId, guest);
  }
  if (!sameAddresses(guest.addresses, addresses)) {
    guest.addresses = addresses;
    guest.changed = game.changed = ++cursor;
  }
  const body = { name, ...sessionOf(guest), addresses: game.addresses, cursor: game.offered, ...lease };
  response.status(game.addresses.length ? 200 : 202).json(body);
});

app.get("/games", (request, response) => {
  const listed = [...games.values()].filter((game) => game.listed);
  response.json({
    games: listed.map((game) => ({ name: game.name, info: game.info, guests: game.guests.size, ready: game.addresses.length > 0 })),
  });
});

app.delete("/games/:name", fields({ peerId: isPeerId }), (request, response) => {
  games.delete(owned(request.params.name, request.body.peerId).name);
  response.status(204).end();
});

// Four parameters tell Express that this one answers errors, those of express.json() too.
app.use((error, request, response, next) => {
  const status = error.status ?? 500;
  response.status(status).json({ status, detail: error.message });
});

app.listen(Number(process.argv[2]), "127.0.0.1", 511);

/* node peer.mjs host|join NAME [SERVER]: a host that sends everything back, or a guest that says hello five times. */
import { Game } from './p2p.mjs'

const [role, name, server = 'http://localhost:8000'] = process.argv.slice(2)
const game = new Game(), isHost = role === 'host'
const fail = why => { console.error(why); process.exit(1) }
const end = status => game.close().finally(() => process.exit(status))
let count = 1       // of the hello that is to come back

if (!name || !['host', 'join'].includes(role)) fail('usage: peer.mjs host|join NAME [SERVER]')
game.on('lost', () => isHost || end(1))
game.on('connected', session => {
  console.log(`connected to ${session.selected}`)
  if (!isHost) setInterval(() => game.send(session, `hello ${count}`), 100)
})
game.on('message', (session, data) => {
  if (isHost) game.send(session, data)
  else if (String(data) === `hello ${count}`) {
    console.log(`back came ${data}`)
    if (count++ === 5) end(0)
  }
})
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => end(0))
await game.open(server, name, isHost).catch(error => fail(error.cause ? `cannot reach ${server}` : error.message))
if (isHost) console.log(`${name} is on offer at ${server}`)

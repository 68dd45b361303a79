// node peer.mjs host|join NAME [SERVER]: a host that echoes what its guests say until Ctrl-C, or a guest that says hello five times.
import { Endpoint } from "./p2p.mjs";

const [, , role, name, server = "http://localhost:8000"] = process.argv;
const endpoint = new Endpoint(), path = role === "host" ? `/games/${encodeURIComponent(name)}` : "/games/leave";

async function leave(status) {
  process.exitCode = status;
  await endpoint.call(path, { name }, role === "host" ? "DELETE" : "POST").catch(() => {});
  process.exit();
}

async function host() {
  endpoint.onConnect = (guest) => {
    console.log(`a guest has connected: ${guest.selected}`);
    guest.onMessage = (data) => guest.send(data);
  };
  endpoint.onEnd = (reason) => console.log(`a guest is gone: ${reason}`);
  await endpoint.askStun((await endpoint.call("/games/register", { name })).stun);
  console.log(`${name} is on offer`);
  const take = (poll) => poll.guests.forEach((guest) => endpoint.session(guest, false).learn(guest.addresses));
  await endpoint.keepCalling("/games/poll", name, take);
}

async function join() {
  endpoint.onConnect = (host) => {
    console.log(`connected with ${host.selected}`);
    let number = 1;
    setInterval(() => host.send(`hello ${number}`), 100);       // until it comes back: a datagram may be lost
    host.onMessage = (data) => {
      if (`${data}` === `hello ${number}`) console.log(`back came ${data}`) || number++ === 5 && leave(0);
    };
  };
  endpoint.onEnd = (reason) => { console.error(reason); leave(1); };
  await endpoint.askStun((await endpoint.call("/games/start", { name, addresses: endpoint.addresses })).stun);
  const take = (start) => start.addresses.length && endpoint.session(start, true).learn(start.addresses);
  await endpoint.keepCalling("/games/start", name, take);
}

process.on("SIGINT", () => leave(0)).on("SIGTERM", () => leave(0));
endpoint.open(server).then(role === "host" ? host : join).catch((error) => {
  if (process.exitCode === undefined) [console.error(error.message), process.exit(1)];       // who has left is told so
});

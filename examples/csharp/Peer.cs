// mono peer.exe host|join NAME [SERVER]: a host that echoes what its guests say until Enter, or a guest that says hello five times.
using System;
using System.Linq;
using System.Text;
using System.Threading;
using System.Threading.Tasks;

static class Peer {
  static int Main(string[] arguments) {
    bool isHost = arguments[0] == "host", isOver = false;
    string name = arguments[1], reason = null;
    var endpoint = new Endpoint(arguments.Length > 2 ? arguments[2] : "http://localhost:8000");
    Session peer = null;
    int number = 1;
    double nextCall = 0, nextHello = 0;
    if (isHost) Task.Run(() => { Console.ReadLine(); isOver = true; });
    endpoint.OnConnect = session => Console.WriteLine("connected with " + (peer = session).Selected);
    endpoint.OnEnd = why => { if (isHost) Console.WriteLine("a guest is gone: " + why); else reason = why; };
    endpoint.OnMessage = (session, bytes) => {
      if (isHost) endpoint.Send(bytes, session.Selected);
      else if (Encoding.UTF8.GetString(bytes) == "hello " + number) Console.WriteLine("back came hello " + number++);
    };
    try {
      int stun = isHost ? endpoint.Call("POST", "/games/register", new Body { name = name }).stun.FirstOrDefault() : 0;
      for (double now = Endpoint.Now; !isOver && reason == null && number <= 5; now = Endpoint.Now) {
        var before = endpoint.Mapped;
        if (stun > 0) endpoint.AskStun(stun, now);
        endpoint.Step(now);
        if (now >= nextCall || !Equals(endpoint.Mapped, before)) { // poll or start, at the server's pace
          var answer = endpoint.Call("POST", isHost ? "/games/poll" : "/games/start", new Body { name = name, addresses = endpoint.Addresses });
          nextCall = now + answer.pollAfter;
          stun = answer.stun == null ? stun : answer.stun.FirstOrDefault();
          foreach (var guest in answer.guests ?? new Answer[0]) endpoint.Learn(guest, false);
          if (answer.sessionId != null && answer.addresses.Length > 0) endpoint.Learn(answer, true);
        }
        if (!isHost && peer != null && now >= nextHello) { // until it comes back: a datagram may be lost
          nextHello = now + 0.1;
          endpoint.Send(Encoding.UTF8.GetBytes("hello " + number), peer.Selected);
        }
        Thread.Sleep(5);
      }
      endpoint.Call(isHost ? "DELETE" : "POST", isHost ? "/games/" + Uri.EscapeDataString(name) : "/games/leave", new Body { name = name });
    } catch (Exception error) { reason = error.GetBaseException().Message; }
    if (reason != null) Console.Error.WriteLine(reason);
    return reason == null ? 0 : 1;
  }
}

// A plain peer after docs/WIRE.md and docs/API.md, for Mono and Unity, over IPv4. Peer.cs shows how a game uses it.
using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.Http;
using System.Net.Http.Headers;
using System.Net.Sockets;
using System.Runtime.Serialization;
using System.Runtime.Serialization.Json;
using System.Security.Cryptography;
using System.Text;
using System.Text.RegularExpressions;

[DataContract] public class Body { // what goes to the server; what is null is left out
  [DataMember(EmitDefaultValue = false)] public string name, peerId;
  [DataMember(EmitDefaultValue = false)] public string[] addresses;
}

[DataContract] public class Answer { // what comes from there, and each of its guests
  [DataMember] public string sessionId, sessionKey, from, detail;
  [DataMember] public object[] addresses;
  [DataMember] public Answer[] guests;
  [DataMember] public int[] stun;
  [DataMember] public double pollAfter;
}

public class Message { // of STUN
  public const int Cookie = 0x2112a442, Request = 1, Success = 0x101, Username = 6, Integrity = 8, Mapped = 0x20, Priority = 0x24;
  public const int UseCandidate = 0x25, Fingerprint = 0x8028, Controlled = 0x8029, Controlling = 0x802a;
  public int Kind;
  public byte[] Transaction, Signed;
  public Dictionary<int, byte[]> Attributes = new Dictionary<int, byte[]>();

  public static byte[] Join(params byte[][] parts) { return parts.SelectMany(part => part).ToArray(); }
  public static byte[] Word(long n) { return new[] { (byte)(n >> 24), (byte)(n >> 16), (byte)(n >> 8), (byte)n }; }
  public static int Half(byte[] bytes, int at) { return bytes[at] << 8 | bytes[at + 1]; }
  static byte[] Head(int kind, int length, byte[] transaction) { return Join(Word(kind * 65536L + length), Word(Cookie), transaction); }
  static byte[] Sign(string key, byte[] bytes) { using (var hmac = new HMACSHA1(Encoding.UTF8.GetBytes(key))) return hmac.ComputeHash(bytes); }

  public static byte[] Attribute(int type, byte[] value) {
    return Join(Word(type * 65536L + value.Length), value, new byte[-value.Length & 3]);
  }

  static byte[] Crc(IEnumerable<byte> bytes) { // that of zlib, and XOR
    uint crc = ~0u;
    foreach (var each in bytes)
      for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (((crc ^ (uint)each >> bit) & 1) * 0xedb88320);
    return Word(~crc ^ 0x5354554e);
  }

  public static byte[] Encode(int kind, byte[] transaction, byte[] body, string key = null) {
    if (key != null) body = Join(body, Attribute(Integrity, Sign(key, Join(Head(kind, body.Length + 24, transaction), body))));
    var message = Join(Head(kind, body.Length + 8, transaction), body);
    return Join(message, Attribute(Fingerprint, Crc(message)));
  }

  public static Message Decode(byte[] bytes) { // null: it is the game's
    if (bytes.Length < 20 || bytes.Length % 4 > 0 || bytes[0] > 3 || !bytes.Skip(4).Take(4).SequenceEqual(Word(Cookie))) return null;
    var message = new Message { Kind = Half(bytes, 0), Transaction = bytes.Skip(8).Take(12).ToArray() };
    for (int at = 20, size; at < bytes.Length; at += 4 + size + (-size & 3)) {
      int type = Half(bytes, at);
      size = Half(bytes, at + 2);
      var value = bytes.Skip(at + 4).Take(size).ToArray();
      if (type == Fingerprint) return value.SequenceEqual(Crc(bytes.Take(at))) ? message : null;
      if (message.Signed == null && !message.Attributes.ContainsKey(type)) message.Attributes[type] = value;
      if (type == Integrity && message.Signed == null)
        message.Signed = Join(Head(message.Kind, at + 4, message.Transaction), bytes.Skip(20).Take(at - 20).ToArray());
    }
    return message.Signed == null ? message : null; // the answer of a STUN server needs no FINGERPRINT
  }

  public bool IsAuthentic(string key) { return Signed != null && Sign(key, Signed).SequenceEqual(Attributes[Integrity]); }

  public static byte[] Pack(IPEndPoint address) {
    var mask = Word(Cookie);
    return Join(Word(0x10000 | address.Port ^ 0x2112), address.Address.GetAddressBytes().Select((each, i) => (byte)(each ^ mask[i])).ToArray());
  }

  public static IPEndPoint Unpack(byte[] value) {
    var mask = Word(Cookie);
    return new IPEndPoint(new IPAddress(value.Skip(4).Select((each, i) => (byte)(each ^ mask[i])).ToArray()), Half(value, 2) ^ 0x2112);
  }
}

public class Session { // with one other player; times in seconds
  public string Id, Key, From;
  public bool IsGuest;
  public double Began, Due, Consent, Answered;
  public int Sent;
  public IPEndPoint Selected, Nominated, Urgent;
  public byte[] TieBreaker = Endpoint.Random(8);
  public List<IPEndPoint> Remotes = new List<IPEndPoint>();
  public Queue<byte[]> Waiting = new Queue<byte[]>(); // datagrams that came before the connection
  public HashSet<IPEndPoint> Heard = new HashSet<IPEndPoint>(), Proven = new HashSet<IPEndPoint>();
  public Dictionary<string, IPEndPoint> Pending = new Dictionary<string, IPEndPoint>();
  Dictionary<IPAddress, Tuple<int, double>> unheard = new Dictionary<IPAddress, Tuple<int, double>>();

  public bool MayCheck(IPAddress ip, double now) { // a host is told by a guest whom to check: it may be anybody
    if (IsGuest || ip.ToString() == From || Heard.Any(each => each.Address.Equals(ip))) return true;
    var known = unheard.ContainsKey(ip) ? unheard[ip] : Tuple.Create(0, 0.0);
    if (known.Item1 >= 5 || now < known.Item2 + new[] { 0, 0.05, 1, 3, 5 }[known.Item1]) return false;
    unheard[ip] = Tuple.Create(known.Item1 + 1, now);
    return true;
  }
}

public class Endpoint { // one UDP socket with all its sessions; a game calls Step() in each of its frames
  public Action<Session> OnConnect;
  public Action<Session, byte[]> OnMessage;
  public Action<string> OnEnd;
  public IPEndPoint Mapped;
  readonly string server, peerId = BitConverter.ToString(Random(16));
  readonly IPAddress serverIp, ip;
  readonly UdpClient udp = new UdpClient(0, AddressFamily.InterNetwork);
  readonly HttpClient http = new HttpClient();
  readonly Dictionary<string, Session> sessions = new Dictionary<string, Session>();
  double nextCheck, nextQuestion;
  string question;

  public static double Now { get { return DateTime.UtcNow.Ticks / 1e7; } }
  public static byte[] Random(int count) { var bytes = new byte[count]; RandomNumberGenerator.Create().GetBytes(bytes); return bytes; }

  public Endpoint(string url) {
    server = url;
    serverIp = Dns.GetHostAddresses(new Uri(url).Host).First(each => each.AddressFamily == AddressFamily.InterNetwork);
    using (var probe = new UdpClient(serverIp.ToString(), 9)) ip = ((IPEndPoint)probe.Client.LocalEndPoint).Address; // where we are
  }

  public string[] Addresses { get {
    var own = new IPEndPoint(ip, ((IPEndPoint)udp.Client.LocalEndPoint).Port);
    return new[] { own, Mapped }.Where(each => each != null).Select(each => each.ToString()).ToArray();
  } }

  public Answer Call(string method, string path, Body body) { // HttpRequestException: why not. In Unity, await it instead
    body.peerId = peerId;
    var stream = new MemoryStream();
    new DataContractJsonSerializer(typeof(Body)).WriteObject(stream, body);
    var request = new HttpRequestMessage(new HttpMethod(method), server + path) { Content = new ByteArrayContent(stream.ToArray()) };
    request.Headers.TransferEncodingChunked = true;
    request.Content.Headers.ContentType = new MediaTypeHeaderValue("application/json");
    using (var response = http.SendAsync(request).Result) {
      var bytes = response.Content.ReadAsByteArrayAsync().Result;
      var answer = bytes.Length == 0 ? null : (Answer)new DataContractJsonSerializer(typeof(Answer)).ReadObject(new MemoryStream(bytes));
      if ((int)response.StatusCode >= 400 && (int)response.StatusCode < 500) throw new InvalidOperationException(answer.detail);
      return response.IsSuccessStatusCode ? answer : new Answer { pollAfter = 2 };
    }
  }

  IPEndPoint Usable(object text) { // null: nobody sends there
    var match = Regex.Match(text as string ?? "", @"^(\d+\.\d+\.\d+\.\d+):(\d{1,5})$");
    IPAddress address;
    if (!match.Success || !IPAddress.TryParse(match.Groups[1].Value, out address)) return null;
    byte[] bytes = address.GetAddressBytes(), own = ip.GetAddressBytes();
    int a = bytes[0], b = bytes[1], port = int.Parse(match.Groups[2].Value);
    bool isPrivate = a == 10 || a == 127 || a == 172 && b >> 4 == 1 || a == 192 && b == 168 || a == 100 && b >> 6 == 1;
    bool isRight = a > 0 && a < 224 && !(a == 169 && b == 254) && port < 65536 && (port > 1023 || port == 80 || port == 443);
    return isRight && (!isPrivate || a == own[0] && b == own[1]) ? new IPEndPoint(address, port) : null;
  }

  public void Learn(Answer told, bool isGuest) { // of a guest that a poll told of, or of the host in a start
    if (!sessions.ContainsKey(told.sessionId))
      sessions[told.sessionId] = new Session { Id = told.sessionId, Key = told.sessionKey, From = told.from, IsGuest = isGuest, Began = Now };
    var session = sessions[told.sessionId];
    foreach (var address in told.addresses.Select(Usable).Where(each => each != null && !session.Remotes.Contains(each))) {
      session.Remotes.Add(address);
      if (session.Selected != null) session.Urgent = address;
    }
  }

  public void Send(byte[] bytes, IPEndPoint address) {
    try { udp.Send(bytes, bytes.Length, address); } catch (SocketException) { } // it is lost
  }

  void Check(Session session, double now) { // the next one, if one may go out
    session.Due = now + (session.Sent == 0 ? 0.01 : session.Sent < Math.Max(20, 3 * session.Remotes.Count) ? 0.05 : 0.17);
    bool consents = session.Selected != null && now >= session.Consent;
    bool renominates = session.IsGuest && session.Selected != null && !session.Selected.Equals(session.Nominated);
    var address = consents || renominates ? session.Selected : session.Urgent;
    if (address == session.Urgent) session.Urgent = null;
    if (address == null && session.Selected == null && session.Remotes.Any()) address = session.Remotes[session.Sent % session.Remotes.Count];
    if (consents) session.Consent = now + 4 + 2 * new Random().NextDouble();
    if (address == null || !consents && session.Sent++ >= 100 || !session.MayCheck(address.Address, now)) return;
    var transaction = Random(12);
    bool nominates = session.IsGuest && (session.Selected ?? address).Equals(address);
    if (nominates) session.Nominated = address;
    session.Pending[BitConverter.ToString(transaction)] = address;
    nextCheck = now + 0.005;
    Send(Message.Encode(Message.Request, transaction, Message.Join(
      Message.Attribute(Message.Username, Encoding.UTF8.GetBytes(session.Id + ":" + session.Id)),
      Message.Attribute(session.IsGuest ? Message.Controlling : Message.Controlled, session.TieBreaker),
      Message.Attribute(Message.Priority, Message.Word(0x6effffff)),
      nominates ? Message.Attribute(Message.UseCandidate, new byte[0]) : new byte[0]), session.Key), address);
  }

  void Select(Session session, IPEndPoint source, double now) { // after each message that has come
    var address = !session.IsGuest ? session.Nominated : session.Selected == null || now - session.Answered > 6 ? source : null;
    if (address == null || !session.Proven.Contains(address) || address.Equals(session.Selected)) return;
    bool isFirst = session.Selected == null;
    session.Selected = address;
    session.Answered = now;
    session.Consent = now + 5;
    if (isFirst) OnConnect(session);
  }

  void Requested(Session session, Message message, IPEndPoint source, double now) {
    if (!message.IsAuthentic(session.Key) || !message.Attributes.ContainsKey(session.IsGuest ? Message.Controlled : Message.Controlling)) return;
    Send(Message.Encode(Message.Success, message.Transaction, Message.Attribute(Message.Mapped, Message.Pack(source)), session.Key), source);
    session.Heard.Add(source);
    if (!session.Proven.Contains(source)) { session.Urgent = source; session.Due = 0; }
    if (!session.IsGuest && message.Attributes.ContainsKey(Message.UseCandidate)) session.Nominated = source;
    Select(session, source, now);
  }

  void AnsweredBy(Session session, Message message, IPEndPoint source, double now) {
    var transaction = BitConverter.ToString(message.Transaction);
    if (!session.Pending.ContainsKey(transaction) || !session.Pending[transaction].Equals(source) || !message.IsAuthentic(session.Key)) return;
    session.Pending.Remove(transaction);
    session.Heard.Add(source);
    session.Proven.Add(source);
    if (source.Equals(session.Selected)) session.Answered = now;
    Select(session, source, now);
  }

  void Take(byte[] bytes, IPEndPoint source, double now) {
    var message = Message.Decode(bytes);
    foreach (var session in sessions.Values.ToList()) {
      if (message == null && session.Heard.Contains(source) && session.Waiting.Count < 64) session.Waiting.Enqueue(bytes);
      if (message != null && message.Kind == Message.Success) AnsweredBy(session, message, source, now);
      if (message != null && message.Kind == Message.Request && message.Attributes.ContainsKey(Message.Username)
          && Encoding.UTF8.GetString(message.Attributes[Message.Username]).Split(':')[0] == session.Id) Requested(session, message, source, now);
      while (session.Selected != null && session.Waiting.Any()) OnMessage(session, session.Waiting.Dequeue());
    }
    if (message != null && BitConverter.ToString(message.Transaction) == question && message.Attributes.ContainsKey(Message.Mapped))
      Mapped = Message.Unpack(message.Attributes[Message.Mapped]);
  }

  public void AskStun(int port, double now) { // every 15 seconds, until it has answered every half
    if (now < nextQuestion) return;
    var transaction = Random(12);
    question = BitConverter.ToString(transaction);
    nextQuestion = now + (Mapped == null ? 0.5 : 15);
    Send(Message.Encode(Message.Request, transaction, new byte[0]), new IPEndPoint(serverIp, port));
  }

  public void Step(double now) {
    while (udp.Available > 0) {
      var source = new IPEndPoint(IPAddress.Any, 0);
      try { Take(udp.Receive(ref source), source, now); } catch (SocketException) { } // an earlier one was refused
    }
    foreach (var session in sessions.Values.ToList()) {
      bool isOver = now - (session.Selected == null ? session.Began : session.Answered) > (session.Selected == null ? 15 : 40);
      if (isOver) sessions.Remove(session.Id);
      if (isOver) OnEnd(session.Selected == null ? "no check got through in both directions" : "the other player has been silent");
      else if (now >= Math.Max(nextCheck, session.Due)) Check(session, now);
    }
  }
}

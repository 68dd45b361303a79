// mono peer.exe host|join NAME [SERVER]: a host that sends everything back until Ctrl-C, or a guest that says hello
// five times, as docs/WIRE.md has it. It sends no P2P, is a plain peer: datagrams may be lost, doubled, reordered,
// forged. A game should add: IPv6; private networks among the addresses to skip, and the budget over all sessions
// (Checks); the way back after a silence (Silence); a file for a host's peerId. In Unity, each frame calls Update().
using System;
using System.Collections.Generic;
using System.Linq;
using System.Net;
using System.Net.Http;
using System.Net.Sockets;
using System.Runtime.Serialization.Json;
using System.Security.Cryptography;
using System.Text;
using System.Text.RegularExpressions;
using System.Threading.Tasks;

// What goes to the server and comes from it, as JSON. An address may be an object, which is for others.
public class Fields { public string name, peerId; public string[] addresses; public long after; public int wait; }
public class Told { public string sessionId, sessionKey, detail; public object[] addresses; }
public class Answer : Told { public Told[] guests; public int[] stun; public long cursor; public double pollAfter; }
public class Session {      // Sent: checks without an answer, by transaction and address
    public byte[] Key, User;
    public string[] Addresses;      // ip:port
    public string Selected, Nominated;
    public int Turn;
    public double Due, Answered = Peer.Now;
    public HashSet<string> Heard = new HashSet<string>(), Proven = new HashSet<string>(), Sent = new HashSet<string>();
    public Queue<byte[]> Inbox = new Queue<byte[]>();
}

public static class Peer {
    const int Request = 0x0001, Success = 0x0101, Username = 0x0006, Integrity = 0x0008, MappedAddress = 0x0020,
        Priority = 0x0024, UseCandidate = 0x0025, Fingerprint = 0x8028, Controlled = 0x8029, Controlling = 0x802a;
    static readonly byte[] Cookie = { 0x21, 0x12, 0xa4, 0x42 }, XorMask = { 0, 0, 0x21, 0x12, 0x21, 0x12, 0xa4, 0x42 };
    static readonly RandomNumberGenerator random = RandomNumberGenerator.Create();
    static readonly byte[] question = RandomBytes(12), tieBreaker = RandomBytes(8);
    static readonly Fields fields = new Fields { peerId = BitConverter.ToString(RandomBytes(16)), wait = 10 };
    static readonly Dictionary<string, Session> sessions = new Dictionary<string, Session>();   // by USERNAME
    static readonly HttpClient http = new HttpClient { Timeout = TimeSpan.FromSeconds(15) };
    static readonly UdpClient udp = new UdpClient(0, AddressFamily.InterNetwork);
    static readonly Regex usable = new Regex(@"^\d+(\.\d+){3}:\d{4,5}$");
    static bool isHost, isEnded;
    static string path, stun;
    static double callAt;
    static Task<Answer> call;
    public static double Now => Environment.TickCount / 1000.0;
    static void Send(byte[] data, string to) {      // what cannot be sent is as good as lost
        try { udp.Send(data, data.Length, to.Split(':')[0], int.Parse(to.Split(':')[1])); } catch (Exception) { }
    }
    static byte[] RandomBytes(int count) { var bytes = new byte[count]; random.GetBytes(bytes); return bytes; }
    static int Fail(string why) { Console.Error.WriteLine(why); return 1; }
    static byte[] Ascii(string text) => Encoding.ASCII.GetBytes(text);
    static byte[] Join(params byte[][] parts) => parts.SelectMany(part => part).ToArray();
    static byte[] UInt16(int number) => new[] { (byte)(number >> 8), (byte)number };
    static int ReadUInt16(byte[] bytes, int at) => bytes[at] << 8 | bytes[at + 1];
    static byte[] Xor(byte[] value) => value.Zip(XorMask, (a, b) => (byte)(a ^ b)).ToArray();
    static byte[] Attribute(int type, params byte[] value) =>
        Join(UInt16(type), UInt16(value.Length), value, new byte[-value.Length & 3]);
    static int Crc32(byte[] bytes) => (int)~bytes.Aggregate(~0u, (crc, each) =>
        Enumerable.Range(0, 8).Aggregate(crc ^ each, (rest, bit) => rest >> 1 ^ (rest & 1) * 0xedb88320));
    // MESSAGE-INTEGRITY and FINGERPRINT are over what comes before; the length in the header counts them already.
    static byte[] Extend(byte[] head, int by) { UInt16(head.Length - 20 + by).CopyTo(head, 2); return head; }
    static byte[] Sign(byte[] head, byte[] key) => new HMACSHA1(key).ComputeHash(Extend(head, 24));
    // A STUN message. A question to a STUN server has no key.
    static byte[] Encode(int kind, byte[] transaction, byte[] key, params byte[][] attributes) {
        var message = Join(UInt16(kind), new byte[2], Cookie, transaction, Join(attributes));
        if (key != null) message = Join(message, Attribute(Integrity, Sign(message, key)));
        var crc = Crc32(Extend(message, 8)) ^ 0x5354554e;
        return Join(message, Attribute(Fingerprint, Join(UInt16(crc >> 16), UInt16(crc))));
    }

    // The values by type, null if it is a datagram of the game; and what comes before MESSAGE-INTEGRITY.
    static Dictionary<int, byte[]> Decode(byte[] datagram, out byte[] signed) {
        var values = new Dictionary<int, byte[]>();
        signed = null;
        if (datagram.Length < 20 || datagram[0] > 3 || !datagram.Skip(4).Take(4).SequenceEqual(Cookie)) return null;
        for (var at = 20; at + 4 <= datagram.Length && signed == null;) {
            int type = ReadUInt16(datagram, at), length = ReadUInt16(datagram, at + 2);
            if (type == Integrity) signed = datagram.Take(at).ToArray();
            if (!values.ContainsKey(type)) values[type] = datagram.Skip(at + 4).Take(length).ToArray();
            at += 4 + length + (-length & 3);
        }
        return values;
    }

    static async Task<Answer> Ask(HttpMethod method, string path) {
        var body = new System.IO.MemoryStream();
        new DataContractJsonSerializer(typeof(Fields)).WriteObject(body, fields);
        var content = new StringContent(Encoding.UTF8.GetString(body.ToArray()), Encoding.UTF8, "application/json");
        var request = new HttpRequestMessage(method, "/games/" + path) { Content = content };
        request.Headers.TransferEncodingChunked = true;
        var response = await http.SendAsync(request);
        var stream = await response.Content.ReadAsStreamAsync();
        var answer = (Answer)new DataContractJsonSerializer(typeof(Answer)).ReadObject(stream);
        if (!response.IsSuccessStatusCode) throw new HttpRequestException(answer.detail);
        if (response.Headers.Contains("Preference-Applied")) answer.pollAfter = 0;      // it has waited
        return answer;
    }

    // Takes the sessions of an answer, and asks STUN, whose answer the next call tells.
    static void Take(Answer answer) {
        (path, fields.after, callAt) = (isHost ? "poll" : "start", answer.cursor, Now + answer.pollAfter);
        if (answer.stun?.Length > 0) stun = http.BaseAddress.Host + ":" + answer.stun[0];
        Send(Encode(Request, question, null), stun);
        foreach (var told in answer.guests ?? (answer.sessionId != null ? new[] { answer } : new Told[0])) {
            var user = told.sessionId + ":" + told.sessionId;
            if (!sessions.TryGetValue(user, out var session))
                sessions[user] = session = new Session { Key = Ascii(told.sessionKey), User = Ascii(user) };
            session.Addresses = told.addresses.OfType<string>().Where(each => usable.IsMatch(each)).ToArray();
            if (isHost) session.Due = session.Turn = 0;         // all told is new
        }
    }

    // Sends the next check. Five of a host open its router, whatever a guest claims; those of the guest do the rest.
    static void Check(Session session, string to = null) {
        int turn = session.Turn++, count = session.Addresses.Length, most = isHost ? 5 : 100;
        to = to ?? session.Selected ?? (count > 0 && turn < most ? session.Addresses[turn % count] : null);
        var wait = turn < (isHost ? 1 : 20) ? 0.05 : isHost ? 2 : 0.17;
        session.Due = Now + (session.Selected != null ? 4 + RandomBytes(1)[0] / 128.0 : wait);
        if (to == null) return;
        var transaction = RandomBytes(12);
        session.Sent.Add(BitConverter.ToString(transaction) + to);
        Send(Encode(Request, transaction, session.Key, Attribute(Username, session.User),
            Attribute(isHost ? Controlled : Controlling, tieBreaker), Attribute(Priority, 0x6e, 0xff, 0xff, 0xff),
            !isHost && to == (session.Nominated ?? to) ? Attribute(UseCandidate) : new byte[0]), to);
    }

    static void Receive(byte[] datagram, IPEndPoint sender) {
        var (from, values) = (sender.ToString(), Decode(datagram, out var signed));
        if (values == null) sessions.Values.FirstOrDefault(each => each.Heard.Contains(from))?.Inbox.Enqueue(datagram);
        if (values == null) return;
        var (kind, transaction) = (ReadUInt16(datagram, 0), datagram.Skip(8).Take(12).ToArray());
        if (kind == Success && transaction.SequenceEqual(question)) {
            var value = Xor(values[MappedAddress]);
            var addresses = new[] { fields.addresses[0], string.Join(".", value.Skip(4)) + ":" + ReadUInt16(value, 2) };
            (callAt, fields.addresses) = (addresses.SequenceEqual(fields.addresses) ? callAt : 0, addresses);
        }
        var check = BitConverter.ToString(transaction) + from;
        var session = sessions.Values.FirstOrDefault(each => kind == Success && each.Sent.Contains(check));
        var isCheck = kind == Request && values.ContainsKey(isHost ? Controlling : Controlled);
        if (isCheck) sessions.TryGetValue(Encoding.ASCII.GetString(values[Username]), out session);
        if (session == null || signed == null || !Sign(signed, session.Key).SequenceEqual(values[Integrity])) return;
        session.Heard.Add(from);
        if (isCheck) {
            var mapped = Xor(Join(new byte[] { 0, 1 }, UInt16(sender.Port), sender.Address.GetAddressBytes()));
            Send(Encode(Success, transaction, session.Key, Attribute(MappedAddress, mapped)), from);
            if (isHost && values.ContainsKey(UseCandidate)) session.Nominated = from;
            if (!session.Proven.Contains(from)) Check(session, from);
        } else {
            session.Sent.Remove(check);
            session.Proven.Add(from);
            (session.Answered, session.Nominated) = (Now, session.Nominated ?? (isHost ? null : from));
        }
        if (session.Selected == session.Nominated || !session.Proven.Contains(session.Nominated)) return;
        (session.Selected, session.Due) = (session.Nominated, 0);
    }

    // Does what is due. One check at a time keeps 5 ms between any two.
    static void Update() {
        if (Now >= callAt) (call, callAt) = (Ask(HttpMethod.Post, path), Now + 20);     // ends one that waits
        if (call?.IsCompleted == true) {
            if (call.Status == TaskStatus.RanToCompletion) Take(call.Result);
            else (path, callAt) = (isHost ? "register" : "start", Now + 5);
            call = null;
        }
        for (IPEndPoint from = null; udp.Available > 0;)    // what is malformed, or a closed port on Windows, throws
            try { Receive(udp.Receive(ref from), from); } catch (Exception) { }
        foreach (var each in sessions.ToArray()) {
            if (Now > each.Value.Answered + 40) sessions.Remove(each.Key);
            else if (Now >= each.Value.Due) { Check(each.Value); return; }
        }
    }

    public static int Main(string[] args) {
        if (args.Length < 2 || args[0] != "host" && args[0] != "join")
            return Fail("usage: peer.exe host|join NAME [SERVER]");
        (isHost, fields.name, path) = (args[0] == "host", args[1], args[0] == "host" ? "register" : "start");
        http.BaseAddress = new Uri(args.Length > 2 ? args[2] : "http://localhost:8000");
        var probe = new UdpClient(AddressFamily.InterNetwork);
        probe.Connect(http.BaseAddress.Host, 80);       // tells from which address we reach the server
        var own = ((IPEndPoint)probe.Client.LocalEndPoint).Address;
        fields.addresses = new[] { own + ":" + ((IPEndPoint)udp.Client.LocalEndPoint).Port };
        Console.CancelKeyPress += (_, pressed) => isEnded = pressed.Cancel = true;
        try { Take(Ask(HttpMethod.Post, path).Result); }
        catch (AggregateException error) { return Fail(error.InnerException.Message); }
        if (isHost) Console.WriteLine($"{args[1]} is on offer at {http.BaseAddress.OriginalString}");
        for (var turn = 1; !isEnded && (isHost || turn <= 5 && sessions.Count > 0); Task.Delay(10).Wait()) {
            Update();
            foreach (var session in sessions.Values.Where(each => each.Selected != null)) {
                if (!isHost && RandomBytes(1)[0] < 25) Send(Ascii("hello " + turn), session.Selected);  // ten a second
                foreach (var data in session.Inbox)
                    if (isHost) Send(data, session.Selected);
                    else if (data.SequenceEqual(Ascii("hello " + turn))) Console.WriteLine($"back came hello {turn++}");
                session.Inbox.Clear();
            }
        }
        Task.WaitAny(isHost ? Ask(HttpMethod.Delete, Uri.EscapeDataString(args[1])) : Ask(HttpMethod.Post, "leave"));
        return isHost || sessions.Count > 0 ? 0 : 1;
    }
}

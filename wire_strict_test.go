package grpcproxy_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// strict is an upstream that answers every call and checks all that a client may do wrong: each rule is one for which some
// server closes the connection.
type strict struct {
	*wiretest.Listener
	sorted bool // metadata must be in the order of its names

	mu     sync.Mutex
	broken []string
	last   uint32          // the highest stream
	open   map[uint32]bool // streams whose request has not ended
}

func newStrict(t *testing.T) *strict {
	// http.Header has no order. The client's is kept where there is one.
	s := &strict{open: make(map[uint32]bool), sorted: !onDirect(t)}
	s.Listener = wiretest.Listen(t, wiretest.Options{Inspect: s.inspect})
	s.Serve(func(c *wiretest.Conn) { <-t.Context().Done() })
	return s
}

func (s *strict) say(f wiretest.Frame, format string, args ...any) {
	s.broken = append(s.broken, fmt.Sprintf("%v on stream %d: %s\n\t%.300v", f.Type, f.Stream, fmt.Sprintf(format, args...), f.Fields))
}

// verdict returns what was broken so far, and forgets it.
func (s *strict) verdict() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.broken
	s.broken = nil
	return out
}

func (s *strict) inspect(c *wiretest.Conn, f wiretest.Frame) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch f.Type {
	case http2.FrameHeaders:
		if f.Stream%2 == 0 || f.Stream <= s.last {
			s.say(f, "no new stream of a client (the last one was %d): a second HEADERS, or trailers", s.last)
			return
		}
		s.last = f.Stream
		s.open[f.Stream] = true
		checkHead(f, s.sorted, func(format string, args ...any) { s.say(f, format, args...) })
	case http2.FrameData:
		if !s.open[f.Stream] {
			s.say(f, "the stream is not open")
			return
		}
	case http2.FrameContinuation:
		return
	case http2.FrameRSTStream:
		if f.Stream > s.last {
			s.say(f, "the stream is idle")
		}
		delete(s.open, f.Stream)
		return
	case http2.FrameWindowUpdate:
		if f.Stream > s.last || f.Increment == 0 {
			s.say(f, "the stream is idle, or the increment is 0")
		}
		return
	case http2.FrameSettings, http2.FramePing, http2.FrameGoAway:
		if f.Stream != 0 {
			s.say(f, "not on stream 0")
		}
		return
	default:
		s.say(f, "a frame that gRPC has no use for")
		return
	}
	if f.Length > 16384 {
		s.say(f, "%d bytes are more than SETTINGS_MAX_FRAME_SIZE", f.Length)
	}
	if f.EndStream() {
		delete(s.open, f.Stream)
		c.WriteHeaders(f.Stream, wiretest.Head(), false)
		c.WriteData(f.Stream, wiretest.Message([]byte("response")), false)
		c.WriteHeaders(f.Stream, wiretest.Fields("grpc-status", "0"), true)
	}
}

var (
	tokenName  = regexp.MustCompile("^[a-z0-9!#$%&'*+.^_`|~-]+$")
	legalPath  = regexp.MustCompile(`^/([A-Za-z0-9\-._~!$&'()*+,;=:@/\[\]]|%[0-9A-Fa-f]{2})*(\?([A-Za-z0-9\-._~!$&'()*+,;=:@/?\[\]]|%[0-9A-Fa-f]{2})*)?$`)
	legalHost  = regexp.MustCompile(`^([A-Za-z0-9\-._~!$&'()*+,;=]|%[0-9A-Fa-f]{2}|\[[0-9a-fA-F:.]+\])+(:[0-9]+)?$`)
	legalTime  = regexp.MustCompile(`^[0-9]{1,8}[HMSmun]$`)
	callFields = []string{"te", "content-type", "grpc-timeout", "grpc-message-type", "grpc-encoding", "grpc-accept-encoding", "user-agent"}
)

// checkHead holds a request head to RFC 9113 section 8 and to gRPC over HTTP/2, "Requests".
func checkHead(f wiretest.Frame, sorted bool, say func(format string, args ...any)) {
	pseudo := map[string]int{}
	count := map[string]int{}
	place := -1 // in callFields
	var before string
	size := 0
	for i, h := range f.Fields {
		size += len(h.Name) + len(h.Value) + 32
		if strings.ContainsFunc(h.Value, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) {
			say("control character in %s: %q", h.Name, h.Value)
		}
		if strings.Trim(h.Value, " \t") != h.Value {
			say("blank at an end of %s: %q", h.Name, h.Value)
		}
		if h.IsPseudo() {
			pseudo[h.Name]++
			if i >= 4 {
				say("%s after other fields", h.Name)
			}
			continue
		}
		count[h.Name]++
		if !tokenName.MatchString(h.Name) {
			say("the name %q is none", h.Name)
		}
		switch h.Name {
		case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade", "http2-settings", "host", "expect", "trailer", "content-length":
			say("the field %s", h.Name)
		}
		switch at := slices.Index(callFields, h.Name); {
		case sorted && at < 0 && h.Name < before:
			say("metadata is not in order: %s after %s", h.Name, before)
		case at < 0:
			place, before = len(callFields), h.Name
		case at < place:
			say("%s does not stand where it should", h.Name)
		default:
			place = at
		}
	}
	for _, name := range []string{":method", ":scheme", ":path", ":authority"} {
		if pseudo[name] != 1 {
			say("%d times %s", pseudo[name], name)
		}
		delete(pseudo, name)
	}
	if len(pseudo) > 0 {
		say("more pseudo-header fields: %v", pseudo)
	}
	if count["te"] != 1 || f.Get("te") != "trailers" || count["content-type"] != 1 || !strings.HasPrefix(strings.ToLower(f.Get("content-type")), "application/grpc") ||
		count["grpc-timeout"] > 1 || count["cookie"] > 1 {
		say("the fields of a call are not right")
	}
	if v := f.Get("grpc-timeout"); v != "" && !legalTime.MatchString(v) {
		say("grpc-timeout %q", v)
	}
	if f.Get(":method") != "POST" || f.Get(":scheme") != "http" || !legalPath.MatchString(f.Get(":path")) || !legalHost.MatchString(f.Get(":authority")) {
		say("the request line")
	}
	if size > 64<<10 {
		say("%d bytes of metadata", size)
	}
}

// Whatever a client puts on the wire: what comes of it at the upstream is legal, and the connection that all clients share
// lives on.
func TestWireAlwaysLegal(t *testing.T) {
	up := newStrict(t)
	r := newRig(t, rigOptions{Caddy: proxytest.Options{Site: "grpc_proxy " + up.Addr()}})
	message := wiretest.Message([]byte("request"))
	base := func(c *wiretest.Conn, more ...string) []hpack.HeaderField { return c.Request(wirePath, more...) }
	set := func(fields []hpack.HeaderField, name string, value string) []hpack.HeaderField {
		out := slices.Clone(fields)
		for i := range out {
			if out[i].Name == name {
				out[i].Value = value
			}
		}
		return out
	}
	type sends func(c *wiretest.Conn, fields []hpack.HeaderField) (id uint32)
	whole := func(c *wiretest.Conn, fields []hpack.HeaderField) uint32 {
		id := c.Open(fields, false)
		c.WriteData(id, message, true)
		return id
	}
	many := func(n int) (f []string) {
		for i := range n {
			f = append(f, fmt.Sprintf("x-%d", i), "v")
		}
		return f
	}
	type row struct {
		name   string
		fields func(c *wiretest.Conn) []hpack.HeaderField
		send   sends
		// served: the call must be answered by the upstream. Others may be, or are refused.
		served bool
		// unanswered: the client itself ends the call.
		unanswered bool
	}
	rows := []row{
		{name: "an ordinary call", served: true},
		{name: "trailers", served: true, send: func(c *wiretest.Conn, fields []hpack.HeaderField) uint32 {
			id := c.Open(fields, false)
			c.WriteData(id, message, false)
			c.WriteHeaders(id, wiretest.Fields("x-sum", "1", "grpc-status", "0"), true)
			return id
		}},
		{name: "trailers alone", served: true, send: func(c *wiretest.Conn, fields []hpack.HeaderField) uint32 {
			id := c.Open(fields, false)
			c.WriteHeaders(id, wiretest.Fields("x-sum", "1"), true)
			return id
		}},
		{
			name: "trailers that were announced", served: true, fields: func(c *wiretest.Conn) []hpack.HeaderField { return base(c, "trailer", "x-sum") },
			send: func(c *wiretest.Conn, fields []hpack.HeaderField) uint32 {
				id := c.Open(fields, false)
				c.WriteData(id, message, false)
				c.WriteHeaders(id, wiretest.Fields("x-sum", "1"), true)
				return id
			},
		},
		{name: "trailers that are malformed", send: func(c *wiretest.Conn, fields []hpack.HeaderField) uint32 {
			id := c.Open(fields, false)
			c.WriteData(id, message, false)
			c.WriteHeaders(id, wiretest.Fields("X-Sum", "a\x00b", ":path", "/"), true)
			return id
		}},
		{name: "a second head without an end", send: func(c *wiretest.Conn, fields []hpack.HeaderField) uint32 {
			id := c.Open(fields, false)
			c.WriteHeaders(id, fields, false)
			return id
		}},
		{name: "empty DATA frames", served: true, send: func(c *wiretest.Conn, fields []hpack.HeaderField) uint32 {
			id := c.Open(fields, false)
			for range 50 {
				c.WriteData(id, nil, false)
			}
			c.WriteData(id, message, false)
			c.WriteData(id, nil, true)
			return id
		}},
		{name: "padding", served: true, send: func(c *wiretest.Conn, fields []hpack.HeaderField) uint32 {
			id := c.Open(fields, false)
			c.WriteDataPadded(id, message, true, 200)
			return id
		}},
		{name: "no body at all", served: true, send: func(c *wiretest.Conn, fields []hpack.HeaderField) uint32 { return c.Open(fields, true) }},
		{name: "a body that is no message", served: true, send: func(c *wiretest.Conn, fields []hpack.HeaderField) uint32 {
			id := c.Open(fields, false)
			c.WriteData(id, []byte{0xff, 0xff}, true)
			return id
		}},
		{name: "a reset at once", unanswered: true, send: func(c *wiretest.Conn, fields []hpack.HeaderField) (id uint32) {
			c.Batch(func() {
				id = c.Open(fields, false)
				c.WriteReset(id, http2.ErrCodeCancel)
			})
			return id
		}},
		{name: "a reset after the end", unanswered: true, send: func(c *wiretest.Conn, fields []hpack.HeaderField) (id uint32) {
			c.Batch(func() {
				id = whole(c, fields)
				c.WriteReset(id, http2.ErrCodeNo)
			})
			return id
		}},
		{name: "a reset of an odd code", unanswered: true, send: func(c *wiretest.Conn, fields []hpack.HeaderField) uint32 {
			id := c.Open(fields, false)
			c.WriteData(id, message[:3], false)
			c.WriteReset(id, 0xdead)
			return id
		}},
		{name: "priorities", served: true, send: func(c *wiretest.Conn, fields []hpack.HeaderField) uint32 {
			id := c.Open(fields, false)
			c.WriteFrame(http2.FramePriority, 0, id, []byte{0x80, 0, 0, 0, 255})
			c.WriteFrame(http2.FrameType(0x10), 0, 0, append([]byte{0, 0, 0, byte(id)}, "u=0, i"...)) // PRIORITY_UPDATE
			c.WriteData(id, message, true)
			return id
		}},
		{name: "frames of unknown types", served: true, send: func(c *wiretest.Conn, fields []hpack.HeaderField) uint32 {
			id := c.Open(fields, false)
			c.WriteFrame(0xbe, 0xff, id, []byte("x"))
			c.WriteData(id, message, true)
			return id
		}},
		{name: "a content-length that is right", served: true, fields: func(c *wiretest.Conn) []hpack.HeaderField {
			return base(c, "content-length", fmt.Sprint(len(message)))
		}},
	}
	head := func(name string, served bool, fields func(c *wiretest.Conn) []hpack.HeaderField) {
		rows = append(rows, row{name: name, served: served, fields: fields})
	}
	with := func(name string, served bool, more ...string) {
		head(name, served, func(c *wiretest.Conn) []hpack.HeaderField { return base(c, more...) })
	}
	pseudo := func(name, field, value string, served bool) {
		head(name, served, func(c *wiretest.Conn) []hpack.HeaderField { return set(base(c), field, value) })
	}
	with("a content-length that is too large", false, "content-length", "1000")
	with("a content-length that is too small", false, "content-length", "1")
	with("a content-length that is no number", false, "content-length", "+12")
	with("two content-lengths", false, "content-length", "12", "content-length", "13")
	with("connection", false, "connection", "close, te")
	with("keep-alive, upgrade", false, "keep-alive", "timeout=5", "upgrade", "h2c", "http2-settings", "AAMAAABkAARAAAAA")
	with("transfer-encoding", false, "transfer-encoding", "chunked")
	with("proxy-connection", false, "proxy-connection", "keep-alive")
	with("te of its own", false, "te", "gzip")
	with("host as well", false, "host", r.H2C)
	with("another host", false, "host", "evil.example")
	with("two hosts", false, "host", "a", "host", "b")
	with("expect", true, "expect", "100-continue")
	with("another expect", false, "expect", "everything")
	with("names of one connection", true, "trailer", "x", "proxy-authorization", "Basic x", "proxy-authenticate", "y", "alt-svc", "clear")
	with("upper case", false, "X-Upper", "1")
	with("a blank in a name", false, "x y", "1")
	with("an empty name", false, "", "1")
	with("a colon in a name", false, "x:y", "1")
	with("a name of UTF-8", false, "x-größe", "1")
	with("every character of names", true, "x!#$%&'*+.^_`|~9", "1")
	with("control characters in a value", false, "x-bad", "a\x01b")
	with("NUL in a value", false, "x-bad", "a\x00b")
	with("a line break in a value", false, "x-bad", "a\r\nx-evil: 1")
	with("DEL in a value", false, "x-bad", "a\x7fb")
	with("blanks around a value", false, "x-blank", " a\t")
	with("a tab in a value", true, "x-tab", "a\tb")
	with("a value of any bytes", true, "x-latin", "caf\xe9 \xff\xfe")
	with("an empty value", true, "x-empty", "")
	with("the same name often", true, slices.Repeat([]string{"x-many", "1"}, 60)...)
	with("crumbs of cookies", true, "cookie", "a=1", "cookie", "b=2")
	with("80 fields", true, many(80)...)
	with("fields that look like another call", true, "grpc-status", "0", "grpc-message", "x", "grpc-previous-rpc-attempts", "x")
	with("two timeouts", true, "grpc-timeout", "1S", "grpc-timeout", "nonsense")
	with("a malformed timeout", false, "grpc-timeout", "-1S")
	with("a huge timeout", true, "grpc-timeout", "99999999H")
	with("two content-types", false, "content-type", "application/grpc")
	with("call fields after the metadata", true, "x-a", "1", "grpc-encoding", "gzip", "user-agent", "u", "grpc-accept-encoding", "gzip", "grpc-timeout", "5S", "grpc-message-type", "t")
	with("two user agents", true, "user-agent", "a", "user-agent", "b")
	with("priority", true, "priority", "u=0, i")
	with("forwarded fields", true, "x-forwarded-for", "\"; evil", "x-forwarded-host", "a b", "via", ",,,", "forwarded", "for=x")
	with("a pseudo-header field late", false, "x-a", "1", ":authority", "x")
	with("a pseudo-header field of answers", false, ":status", "200")
	with("a pseudo-header field that is none", false, ":evil", "1")
	with("extended CONNECT", false, ":protocol", "websocket")
	for i, path := range []string{
		"*", "", "Svc/M", "http://evil.example/Svc/M", "//Svc/M", "/a.B/", "/a/../b/M", "/a/./M", "/Svc/M?", "/Svc/M?q=a b", "/Svc/M?q=\xc3\xa4", "/Svc/M?<>\"{}|\\^`",
		"/Svc/M?%", "/Svc/M?%zz", "/Svc/M?%4", "/Svc/M#frag", "/Svc/M?q#frag", "/Svc/a b", "/Svc/\xff", "/Svc/M%00", "/Svc/M%0d%0aX:1", "/Svc/M%", "/Svc/M%zz", "/Svc/<M>",
		"/Svc/{M}", "/Svc/[M]", "/Svc/M;v=1", "/Svc/M\t", "/Svc/M\x00", "/Svc/M\r\nx: y", "/" + strings.Repeat("a", 4000) + "/M", "/Svc\\M/x", "/@/M", "/a:b/M",
	} {
		served := []bool{5: true}
		pseudo(fmt.Sprintf("path %d: %.20q", i, path), ":path", path, i < len(served) && served[i])
	}
	for _, a := range []string{"", "a b", "a/b", "user@host", "user:pw@host", "/tmp/x.sock", "%2Ftmp%2Fx.sock", "[::1]:80", "[", "a\x00", "a\r\nb", "\xc3\xa4.example", "a,b", "a:b:c", "host:99999"} {
		// RFC 9110 section 4.2.1 has an empty host rejected. Go's server does not mind.
		pseudo(fmt.Sprintf("authority %q", a), ":authority", a, a == "" && !onDirect(t) && !isOverHop(t) || a == "[::1]:80")
	}
	for _, s := range []string{"", "https", "ftp", "h t"} {
		pseudo(fmt.Sprintf("scheme %q", s), ":scheme", s, s == "https")
	}
	for _, m := range []string{"", "GET", "CONNECT", "post", "PO ST"} {
		pseudo(fmt.Sprintf("method %q", m), ":method", m, false)
	}
	for _, ct := range []string{"application/grpc+json", "application/grpc;a=\"b\"", "Application/GRPC", "application/grpc+\xc3\xa4", "application/grpc, text/html"} {
		pseudo(fmt.Sprintf("content-type %q", ct), "content-type", ct, ct == "Application/GRPC")
	}
	for _, row := range rows {
		r.run(row.name, func(t *testing.T, r *rig) {
			if row.fields == nil {
				row.fields = func(c *wiretest.Conn) []hpack.HeaderField { return base(c) }
			}
			if row.send == nil {
				row.send = whole
			}
			id := row.send(r.client, row.fields(r.client))
			switch {
			case row.served:
				if h := r.client.Collect(id); h.Get("grpc-status") != "0" {
					t.Errorf("the call was not served: %s %v %v", h.Sequence(), h.Head, h.Trailers)
				}
			case !row.unanswered:
				r.client.Expect("an answer, or the end", func(f wiretest.Frame) bool {
					return f.Type == http2.FrameGoAway || f.Stream == id && (f.EndStream() || f.Type == http2.FrameRSTStream)
				})
			}
			up.check(t, r)
		})
	}
	http1 := http1Rows(message)
	if onDirect(t) {
		http1 = nil
	}
	for name, request := range http1 {
		r.run("HTTP/1.1, "+name, func(t *testing.T, r *rig) {
			nc := wiretest.DialRaw(t, r.H2C)
			_ = nc.SetDeadline(time.Now().Add(timeout))
			_, _ = io.WriteString(nc, request)
			if name == "a body that is cut" {
				_ = nc.(*net.TCPConn).CloseWrite()
			}
			answer, err := io.ReadAll(nc) // all of them ask for the connection to be closed
			if err != nil && !errors.Is(err, syscall.ECONNRESET) {
				t.Fatalf("after %q: %v", answer, err)
			}
			if want := "200 OK"; strings.Contains(request, "x-served") && !strings.Contains(string(answer), want) {
				t.Errorf("the call was not served: %q", answer)
			}
			up.check(t, r)
		})
	}
	if n := up.Accepted(); n != 1 {
		t.Errorf("%d connections to the upstream, want 1", n)
	}
}

// check carries one whole call and makes sure that all was legal up to here.
func (s *strict) check(t *testing.T, r *rig) {
	t.Helper()
	c := wiretest.Dial(t, r.H2C, nil)
	id := c.Open(c.Request(wirePath), true)
	if h := c.Collect(id); h.Get("grpc-status") != "0" {
		t.Errorf("the next call: %s %v %v", h.Sequence(), h.Head, h.Trailers)
	}
	for _, v := range s.verdict() {
		t.Error(v)
	}
	if n := s.Accepted(); n != 1 {
		t.Fatalf("%d connections to the upstream, want 1", n)
	}
}

// http1Rows are requests of HTTP/1.1. Those with x-served must be answered by the upstream.
func http1Rows(message []byte) map[string]string {
	const line = "POST " + wirePath + " HTTP/1.1\r\n"
	const host = "Host: api.example.com\r\nContent-Type: application/grpc\r\nConnection: close\r\n"
	const chunked = "Transfer-Encoding: chunked\r\n"
	sized := fmt.Sprintf("Content-Length: %d\r\n", len(message))
	body := fmt.Sprintf("\r\n%x\r\n%s\r\n0\r\n", len(message), message)
	return map[string]string{
		"a call":                       line + host + sized + "X-Served: 1\r\n\r\n" + string(message),
		"chunks":                       line + host + chunked + "x-served: 1\r\n" + body + "\r\n",
		"trailers":                     line + host + chunked + "x-served: 1\r\n" + body + "X-Sum: 1\r\nGrpc-Status: 0\r\n\r\n",
		"trailers that were announced": line + host + chunked + "x-served: 1\r\nTrailer: X-Sum, Te\r\n" + body + "X-Sum: 1\r\nTe: gzip\r\n\r\n",
		"trailers alone":               line + host + chunked + "x-served: 1\r\n\r\n0\r\nX-Sum: 1\r\n\r\n",
		"malformed trailers":           line + host + chunked + body + "X Sum: 1\r\n\x00: 2\r\n\r\n",
		"chunk extensions":             line + host + chunked + fmt.Sprintf("x-served: 1\r\n\r\n%x;a=b\r\n%s\r\n0\r\n\r\n", len(message), message),
		"a body that is cut":           line + host + "Content-Length: 10000\r\n\r\n" + string(message),
		"no body":                      line + host + "x-served: 1\r\nContent-Length: 0\r\n\r\n",
		"the call's own fields in Connection": line + host + sized + "x-served: 1\r\nConnection: content-type, te, grpc-timeout, host, user-agent, x-mine\r\n" +
			"X-Mine: 1\r\nTE: trailers\r\nUser-Agent: u\r\nGrpc-Timeout: 5S\r\n\r\n" + string(message),
		"an upgrade":             line + host + sized + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAA\r\n\r\n" + string(message),
		"a websocket":            line + host + sized + "x-served: 1\r\nUpgrade: websocket\r\n\r\n" + string(message),
		"expect":                 line + host + sized + "x-served: 1\r\nExpect: 100-continue\r\n\r\n" + string(message),
		"no host":                line + "Content-Type: application/grpc\r\nConnection: close\r\n" + sized + "\r\n" + string(message),
		"an empty host":          line + "Host:\r\nContent-Type: application/grpc\r\nConnection: close\r\n" + sized + "\r\n" + string(message),
		"two hosts":              line + host + sized + "Host: b\r\n\r\n" + string(message),
		"HTTP/1.0":               "POST " + wirePath + " HTTP/1.0\r\nContent-Type: application/grpc\r\nx-served: 1\r\n" + sized + "\r\n" + string(message),
		"an absolute target":     "POST http://other.example" + wirePath + " HTTP/1.1\r\nx-served: 1\r\n" + host + sized + "\r\n" + string(message),
		"a query of anything":    "POST " + wirePath + "?\xe4|\"<>#% HTTP/1.1\r\nx-served: 1\r\n" + host + sized + "\r\n" + string(message),
		"a blank in the path":    "POST /a b/M HTTP/1.1\r\n" + host + sized + "\r\n" + string(message),
		"a field over two lines": line + host + sized + "x-served: 1\r\nX-Fold: a\r\n\tb\r\n\r\n" + string(message),
		"control characters":     line + host + sized + "X-Bad: a\x01b\x7f\r\n\r\n" + string(message),
		"names in upper case":    line + host + sized + "X-SERVED: x-served\r\nX-UPPER_Case.1: 1\r\nx-upper-case: 2\r\n\r\n" + string(message),
		"both lengths":           line + host + chunked + sized + body + "\r\n",
		"lf only":                strings.ReplaceAll(line+host+sized+"x-served: 1\r\n\r\n", "\r\n", "\n") + string(message),
	}
}

package grpcproxy_test

import (
	"bytes"
	"compress/gzip"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

const healthPath = "/grpc.health.v1.Health/"

// healthRig is a Caddy that answers the health service in front of one raw upstream.
func healthRig(t *testing.T) *rig {
	t.Helper()
	return newRig(t, rigOptions{Caddy: proxytest.Options{
		AccessLog: true,
		Site:      "route {\ngrpc_health\ngrpc_proxy UPSTREAMS {\ngroup users\n}\nrespond \"next\" 299\n}",
	}})
}

// ask makes a call of the health service with the request's bytes.
func (r *rig) ask(method string, data []byte, metadata ...string) *wiretest.Half {
	r.t.Helper()
	id := r.client.Open(r.client.Request(healthPath+method, metadata...), len(data) == 0)
	if len(data) > 0 {
		r.client.WriteData(id, data, true)
	}
	return r.client.CollectAll(id)
}

// about is a HealthCheckRequest in its frame.
func about(service string) []byte {
	if service == "" {
		return wiretest.Message(nil)
	}
	return wiretest.Message(append([]byte{0x0a, byte(len(service))}, service...))
}

// Check and List are answered as unary calls are: a head, one message, trailers with the status and nothing else.
func TestWireHealthAnswer(t *testing.T) {
	r := healthRig(t)
	for _, tt := range []struct {
		method string
		req    []byte
		want   string
	}{
		{"Check", about(""), "\x08\x01"},
		{"Check", about("users"), "\x08\x01"},
		{"Check", wiretest.Message([]byte{0x10, 0x07, 0x0a, 0x05, 'u', 's', 'e', 'r', 's'}), "\x08\x01"}, // a field that is not known
		{"List", about(""), "\x0a\x04\x12\x02\x08\x01" + "\x0a\x0b\x0a\x05users\x12\x02\x08\x01"},
	} {
		h := r.ask(tt.method, tt.req)
		if h.Sequence() != "HEADERS DATA HEADERS+END_STREAM" {
			t.Errorf("%s: frames %s", tt.method, h.Sequence())
		}
		sameFields(t, h.Head, wiretest.Head())
		sameFields(t, h.Trailers, wiretest.Fields("grpc-status", "0"))
		if string(h.Data) != string(wiretest.Message([]byte(tt.want))) {
			t.Errorf("%s: got %q, want %q", tt.method, h.Data, tt.want)
		}
	}
}

// What is wrong with a request is answered as Trailers-Only, with the code that gRPC has for it.
func TestWireHealthFailures(t *testing.T) {
	r := healthRig(t)
	compressed := func(b []byte) []byte {
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		if _, err := w.Write(b); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		m := wiretest.Message(z.Bytes())
		m[0] = 1
		return m
	}
	flagged := about("users")
	flagged[0] = 1
	for _, tt := range []struct {
		name, method string
		req          []byte
		metadata     []string
		code         string
		says         string
	}{
		{name: "unknown name", method: "Check", req: about("nope"), code: "5", says: `unknown service "nope"`},
		{name: "unknown method", method: "Probe", req: about(""), code: "12", says: "unknown method Probe for service grpc.health.v1.Health"},
		{name: "no message", method: "Check", code: "13", says: "no complete message"},
		{name: "no message to watch", method: "Watch", code: "13", says: "no complete message"},
		{name: "half a prefix", method: "Check", req: []byte{0, 0}, code: "13", says: "no complete message"},
		{name: "half a message", method: "List", req: []byte{0, 0, 0, 0, 9, 1}, code: "13", says: "no complete message"},
		{name: "not a request", method: "Check", req: wiretest.Message([]byte{0x0a, 0x7f}), code: "13", says: "not a grpc.health.v1.HealthCheckRequest"},
		{name: "not UTF-8", method: "Watch", req: about("\xff"), code: "13", says: "not a grpc.health.v1.HealthCheckRequest"},
		{name: "too large", method: "Check", req: []byte{0, 0, 1, 0, 0, 1}, code: "8", says: "larger than any question"},
		{name: "malformed timeout", method: "Check", req: about(""), metadata: []string{"grpc-timeout", "1x"}, code: "13", says: "grpc-timeout"},
		{name: "compressed somehow", method: "Check", req: flagged, metadata: []string{"grpc-encoding", "snappy"}, code: "12", says: `"snappy" is not supported`},
		{name: "compressed by nothing", method: "Check", req: flagged, code: "13", says: "there is no grpc-encoding"},
		{name: "not gzip", method: "Check", req: flagged, metadata: []string{"grpc-encoding", "gzip"}, code: "13", says: "decompressing"},
		{name: "gzip, unknown", method: "Check", req: compressed([]byte{0x0a, 0x01, 'x'}), metadata: []string{"grpc-encoding", "gzip"}, code: "5", says: `"x"`},
		{name: "gzip, a bomb", method: "Check", req: compressed(make([]byte, 1<<20)), metadata: []string{"grpc-encoding", "gzip"}, code: "8", says: "larger than any question"},
	} {
		r.run(tt.name, func(t *testing.T, r *rig) {
			h := r.ask(tt.method, tt.req, tt.metadata...)
			if !trailersOnly(h) || h.Get("grpc-status") != tt.code || !strings.Contains(grpcwire.DecodeMessage(h.Get("grpc-message")), tt.says) {
				t.Errorf("%s %v, want Trailers-Only with status %s and %q", h.Sequence(), h.Head, tt.code, tt.says)
			}
			if s, ct := wiretest.Get(h.Head, ":status"), wiretest.Get(h.Head, "content-type"); s != "200" || ct != "application/grpc" {
				t.Errorf(":status %q, content-type %q", s, ct)
			}
			if accept := wiretest.Get(h.Head, "grpc-accept-encoding"); (accept == "identity,gzip") != (tt.name == "compressed somehow") {
				t.Errorf("grpc-accept-encoding %q", accept)
			}
		})
	}
}

// A Watch sends its head and the first message at once, ends with the client's reset, and with a status at its deadline.
func TestWireHealthWatch(t *testing.T) {
	r := healthRig(t)
	for _, name := range []string{"", "nope"} {
		id := r.client.Open(r.client.Request(healthPath+"Watch"), false) // which need not be closed
		r.client.WriteData(id, about(name), false)
		if f := r.client.ExpectOn(id, http2.FrameHeaders); f.EndStream() || f.Get(":status") != "200" {
			t.Fatalf("head %v", f.Fields)
		}
		want := map[string]string{"": "\x08\x01", "nope": "\x08\x03"}[name]
		if f := r.client.ExpectOn(id, http2.FrameData); f.EndStream() || string(f.Data) != string(wiretest.Message([]byte(want))) {
			t.Errorf("%q: told %q, want %q", name, f.Data, want)
		}
		r.client.WriteReset(id, http2.ErrCodeCancel)
	}
	h := r.ask("Watch", about("users"), "grpc-timeout", "300m")
	if got := wiretest.Get(h.Trailers, "grpc-status"); got != "4" || string(h.Data) != string(wiretest.Message([]byte("\x08\x01"))) {
		t.Errorf("at the deadline: %s %q %v", h.Sequence(), h.Data, h.Trailers)
	}
	line := r.accessLog(3)
	for key, want := range map[string]any{"grpc_service": "grpc.health.v1.Health", "grpc_method": "Watch", "grpc_status": "DEADLINE_EXCEEDED"} {
		if line[key] != want {
			t.Errorf("access log: %s is %v, want %v", key, line[key], want)
		}
	}
}

// What is no call of the health service goes to the next handler.
func TestWireHealthPassesOn(t *testing.T) {
	r := healthRig(t)
	r.complete()
	for _, path := range []string{"/grpc.health.v1.Healthy/Check", "/x/grpc.health.v1.Health/Check", healthPath + "Check/x"} {
		id := r.client.Open(r.client.Request(path), true)
		c := &rpc{r: r, client: r.client, id: id}
		c.take(0)
		if got := c.req.Get(":path"); got != path {
			t.Errorf("path %q, want %q", got, path)
		}
		c.head()
		c.trailers()
		c.ok()
	}
	for name, change := range map[string]func([]hpack.HeaderField){
		"GET":  func(f []hpack.HeaderField) { f[0].Value = "GET" },
		"JSON": func(f []hpack.HeaderField) { f[4].Value = "application/json" },
	} {
		fields := r.client.Request(healthPath + "Check")
		change(fields)
		if h := r.client.CollectAll(r.client.Open(fields, true)); string(h.Data) != "next" {
			t.Errorf("%s: %v %q", name, h.Head, h.Data)
		}
	}
}

package grpcproxy_test

import (
	"encoding/base64"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/proxytest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
)

// The tests TestWire… put raw frames on both sides of a running Caddy: a client that is wiretest.Dial, upstreams that are
// wiretest.Listen, and grpc_proxy in between. Each test, or row of its table, proves one rule of the wire.

// wirePath is the method that the tests call.
const wirePath = "/test.Service/Method"

// timeout bounds every wait of the tests, quiet is how long nothing may happen where nothing must.
const (
	timeout = wiretest.Timeout
	quiet   = 20 * time.Millisecond
)

// TestMain keeps Caddy away from the user's home.
func TestMain(m *testing.M) { proxytest.Main(m) }

// rig is a client, a Caddy and its upstreams.
type rig struct {
	*proxytest.Proxy
	// H2C and TLS are where clients connect: to Caddy, or past it in TestDirect.
	H2C, TLS string

	t      *testing.T
	ups    []*peer
	client *wiretest.Conn
	hidden string // one more address that clients must not see
}

// peer is one upstream with the connection that the proxy has to it.
type peer struct {
	*wiretest.Listener
	t    *testing.T
	conn *wiretest.Conn
}

// rigOptions say what stands around the calls of a test.
type rigOptions struct {
	// Block has the lines of the grpc_proxy block.
	Block string
	// Upstreams is how many there are, 1 by default. Scheme stands in front of their addresses.
	Upstreams int
	Scheme    string
	// Up and Client change what the raw peers do by themselves.
	Up, Client wiretest.Options
	// Trusted are proxies in front that the server believes.
	Trusted []netip.Prefix
	// Caddy has the rest; if it has a Site, Block is not used, and UPSTREAMS in it stands for the addresses.
	Caddy proxytest.Options
}

// newRig runs all that a test needs, and makes sure that nothing of ours is left running after it.
func newRig(t *testing.T, o rigOptions) *rig {
	t.Helper()
	wiretest.CheckLeaks(t)
	r := &rig{t: t}
	var addrs []string
	for range max(o.Upstreams, 1) {
		p := &peer{Listener: wiretest.Listen(t, o.Up), t: t}
		r.ups = append(r.ups, p)
		addrs = append(addrs, o.Scheme+p.Addr())
	}
	to := strings.Join(addrs, " ")
	if o.Caddy.Site == "" {
		o.Caddy.Site = "grpc_proxy UPSTREAMS {\n" + o.Block + "\n}"
	}
	o.Caddy.Site = strings.ReplaceAll(o.Caddy.Site, "UPSTREAMS", to)
	if len(o.Trusted) > 0 {
		o.Caddy.Servers += "\ntrusted_proxies static " + strings.Trim(fmt.Sprint(o.Trusted), "[]")
	}
	if isOverHop(t) {
		o.Caddy.Servers += "\nlistener_wrappers {\n\tgrpc_relay\n}"
		o.Caddy.Global += "\nmetrics" // so that no call is direct
	}
	r.Proxy = proxytest.Start(t, o.Caddy)
	if r.H2C, r.TLS = r.Proxy.H2C, r.Proxy.TLS; onDirect(t) {
		r.listenDirect(o)
	}
	r.client = wiretest.Dial(t, r.H2C, nil, o.Client)
	return r
}

// run runs a row of a table, on a client connection of its own.
func (r *rig) run(name string, f func(t *testing.T, r *rig)) {
	r.t.Helper()
	r.t.Run(name, func(t *testing.T) {
		sub := *r
		sub.t = t
		sub.client = wiretest.Dial(t, r.H2C, nil)
		f(t, &sub)
	})
}

// failures are the lines of the log about calls whose status the upstream did not send. A call is counted wherever it is to be when
// its line is there.
func (r *rig) failures() (lines []map[string]any) {
	r.t.Helper()
	for _, line := range r.Log("http.handlers.grpc_proxy") {
		if line["msg"] == "call failed" {
			lines = append(lines, line)
		}
	}
	return lines
}

// current is the connection that the proxy has to the upstream; the next one after drop.
func (p *peer) current() *wiretest.Conn {
	p.t.Helper()
	if p.conn == nil {
		p.conn = p.Accept()
	}
	return p.conn
}

func (p *peer) drop() { p.conn = nil }

// rpc is one call as both ends see it.
type rpc struct {
	r      *rig
	client *wiretest.Conn
	id     uint32 // the client's stream
	up     *wiretest.Conn
	sid    uint32 // the upstream's stream
	req    wiretest.Frame
}

// open begins a call with more metadata, names and values in turn, and leaves the request open.
func (r *rig) open(metadata ...string) *rpc {
	r.t.Helper()
	return &rpc{r: r, client: r.client, id: r.client.Open(r.client.Request(wirePath, metadata...), false)}
}

// unary makes a call with one message and the end of the request, and takes it at the first upstream.
func (r *rig) unary(metadata ...string) *rpc {
	r.t.Helper()
	c := r.open(metadata...)
	c.client.WriteData(c.id, wiretest.Message([]byte("request")), true)
	c.take(0)
	if h := c.up.Collect(c.sid); h.Err != nil || string(h.Data) != string(wiretest.Message([]byte("request"))) {
		r.t.Fatalf("the upstream got %q (%v), not the request", h.Data, h.Err)
	}
	return c
}

// streaming begins a call whose request stays open, and takes it at the first upstream.
func (r *rig) streaming(metadata ...string) *rpc {
	r.t.Helper()
	c := r.open(metadata...)
	c.take(0)
	return c
}

// take waits for the call at the i-th upstream.
func (c *rpc) take(i int) {
	c.r.t.Helper()
	c.up = c.r.ups[i].current()
	c.req = c.up.ExpectHeaders()
	c.sid = c.req.Stream
}

// head answers with a response head, message with one message, trailers with OK or what is given.
func (c *rpc) head(metadata ...string) { c.up.WriteHeaders(c.sid, wiretest.Head(metadata...), false) }

func (c *rpc) message(text string) { c.up.WriteData(c.sid, wiretest.Message([]byte(text)), false) }

func (c *rpc) trailers(fields ...string) {
	if len(fields) == 0 {
		fields = []string{"grpc-status", "0"}
	}
	c.up.WriteHeaders(c.sid, wiretest.Fields(fields...), true)
}

// gotHead waits for the response head at the client, gotMessage for one message in a DATA frame of its own.
func (c *rpc) gotHead() wiretest.Frame {
	c.r.t.Helper()
	f := c.client.ExpectOn(c.id, http2.FrameHeaders)
	if f.Get(":status") != "200" || f.Get("content-type") != "application/grpc" || f.EndStream() {
		c.r.t.Fatalf("response head: %v %v", f, f.Fields)
	}
	return f
}

func (c *rpc) gotMessage(text string) {
	c.r.t.Helper()
	f := c.client.ExpectOn(c.id, http2.FrameData)
	if string(f.Data) != string(wiretest.Message([]byte(text))) {
		c.r.t.Fatalf("got DATA %q, want the message %q", f.Data, text)
	}
}

// result takes the whole answer at the client, with what comes after its end.
func (c *rpc) result() *wiretest.Half {
	c.r.t.Helper()
	return c.client.CollectAll(c.id)
}

// ok makes sure that the call ends with the status OK.
func (c *rpc) ok() *wiretest.Half {
	c.r.t.Helper()
	h := c.result()
	if got := h.Get("grpc-status"); got != "0" {
		c.r.t.Fatalf("grpc-status %q, want 0: %s %v %v", got, h.Sequence(), h.Head, h.Trailers)
	}
	return h
}

// complete carries one whole call, to show that the way is in order.
func (r *rig) complete() {
	r.t.Helper()
	c := r.unary()
	c.head()
	c.message("response")
	c.trailers()
	if h := c.ok(); string(h.Data) != string(wiretest.Message([]byte("response"))) {
		r.t.Fatalf("got %q", h.Data)
	}
}

// failure is what a status made by the proxy must be.
type failure struct {
	code   codes.Code
	reason string
	// says has parts of the message.
	says []string
	// attempts is how many upstreams were tried; 1 if it is 0, none if it is -1.
	attempts int
	// upstream is the address that must be named, with expose_upstream.
	upstream string
}

// hasDetails: "google.rpc.ErrorInfo only for failures that the proxy itself made (connect, no upstream, queue, limits, drain); never
// for the call's deadline, a bad path or timeout, or a status mapped from what the upstream sent".
func (f failure) hasDetails() bool {
	switch f.reason {
	case "DEADLINE_AT_PROXY", "MALFORMED_PATH", "MALFORMED_TIMEOUT", "REQUEST_LENGTH_MISMATCH", "CLIENT_GONE", "CALL_ABORTED",
		"UPSTREAM_STREAM_RESET", "UPSTREAM_GOAWAY", "UPSTREAM_PROTOCOL_ERROR", "UPSTREAM_HTTP_STATUS", "UPSTREAM_NOT_GRPC",
		"UPSTREAM_NO_TRAILERS", "UPSTREAM_INCOMPLETE_MESSAGE", "UPSTREAM_NO_STATUS", "UPSTREAM_MALFORMED_STATUS":
		return false
	}
	return true
}

// trailersOnly are the sequences of frames that an answer without messages may have: the second one where the request
// was still open when it was answered (RFC 9113 section 8.1), the third where the rest of the request crossed that.
func trailersOnly(h *wiretest.Half) bool {
	switch h.Sequence() {
	case "HEADERS+END_STREAM", "HEADERS+END_STREAM RST_STREAM(NO_ERROR)", "HEADERS+END_STREAM RST_STREAM(NO_ERROR) RST_STREAM(STREAM_CLOSED)":
		return true
	}
	return false
}

// checkFailure makes sure that an answer is a failure as gRPC wants it: one HEADERS frame, HTTP 200, nothing in it but
// the status.
func (r *rig) checkFailure(h *wiretest.Half, want failure) {
	r.t.Helper()
	if !trailersOnly(h) {
		r.t.Fatalf("frames %s, want Trailers-Only; %v %v, connection: %v", h.Sequence(), h.Head, h.Trailers, h.Err)
	}
	names := []string{":status", "content-type", "grpc-message", "grpc-status"}
	if want.hasDetails() {
		names = append(names, "grpc-status-details-bin")
	}
	if got := fieldNames(h.Head); !slices.Equal(got, names) {
		r.t.Errorf("fields %v", h.Head)
	}
	if s, ct := wiretest.Get(h.Head, ":status"), wiretest.Get(h.Head, "content-type"); s != "200" || ct != "application/grpc" {
		r.t.Errorf(":status %q, content-type %q; want 200, application/grpc", s, ct)
	}
	r.checkStatus(h.Head, want)
}

// checkStatus makes sure that a header block carries the status, with details that say the same.
func (r *rig) checkStatus(fields []hpack.HeaderField, want failure) {
	r.t.Helper()
	if got := wiretest.Values(fields, "grpc-status"); len(got) != 1 || got[0] != strconv.Itoa(int(want.code)) {
		r.t.Errorf("grpc-status %q, want %d (%v); message %q", got, want.code, want.code, wiretest.Get(fields, "grpc-message"))
	}
	message := grpcwire.DecodeMessage(wiretest.Get(fields, "grpc-message"))
	for _, part := range want.says {
		if !strings.Contains(message, part) {
			r.t.Errorf("grpc-message %q does not say %q", message, part)
		}
	}
	// gRPC: "grpc-retry-pushback-ms" is the server's to send; a proxy that knows nothing of its load must not.
	if wiretest.Values(fields, "grpc-retry-pushback-ms") != nil {
		r.t.Error("the proxy invented grpc-retry-pushback-ms")
	}
	details := wiretest.Get(fields, "grpc-status-details-bin")
	if !want.hasDetails() {
		if wiretest.Values(fields, "grpc-status-details-bin") != nil {
			r.t.Errorf("a status of reason %s has details: %q", want.reason, details)
		}
		r.checkAddresses(message, nil, want.upstream)
		return
	}
	st, info := decodeDetails(r.t, details)
	if codes.Code(st.Code) != want.code || st.Message != message {
		r.t.Errorf("grpc-status-details-bin has %d %q, the status %d %q", st.Code, st.Message, want.code, message)
	}
	attempts := want.attempts
	switch attempts {
	case 0:
		attempts = 1
	case -1:
		attempts = 0
	}
	if info.Reason != want.reason || info.Domain != "grpc_proxy" || info.Metadata["attempts"] != strconv.Itoa(attempts) {
		r.t.Errorf("ErrorInfo %v; want reason %q, domain grpc_proxy, attempts %d", info, want.reason, attempts)
	}
	r.checkAddresses(message, info, want.upstream)
}

// checkAddresses: "to clients, endpoint addresses appear only with expose_upstream on".
func (r *rig) checkAddresses(message string, info *errdetails.ErrorInfo, exposed string) {
	r.t.Helper()
	if exposed != "" {
		if !strings.Contains(message, exposed) || info != nil && info.Metadata["upstream"] != exposed {
			r.t.Errorf("with expose_upstream the message is %q and the details %v; want %s in both", message, info, exposed)
		}
		return
	}
	addrs := []string{r.hidden}
	for _, p := range r.ups {
		addrs = append(addrs, p.Addr())
	}
	for _, addr := range addrs {
		_, port, err := net.SplitHostPort(addr)
		if err != nil {
			continue // there is none
		}
		if all := message + fmt.Sprint(info.GetMetadata()); strings.Contains(all, port) || strings.Contains(all, "127.0.0.1") {
			r.t.Errorf("the upstream's address is in what the client is told: %q, %v", message, info)
		}
	}
}

func decodeDetails(t *testing.T, value string) (*statuspb.Status, *errdetails.ErrorInfo) {
	t.Helper()
	raw, err := base64.RawStdEncoding.DecodeString(value)
	if err != nil {
		t.Fatalf("grpc-status-details-bin %q: %v", value, err)
	}
	st, info := new(statuspb.Status), new(errdetails.ErrorInfo)
	if err := proto.Unmarshal(raw, st); err != nil {
		t.Fatalf("grpc-status-details-bin %q: %v", value, err)
	}
	if len(st.Details) != 1 {
		t.Fatalf("grpc-status-details-bin has %d details, want 1", len(st.Details))
	}
	if err := st.Details[0].UnmarshalTo(info); err != nil {
		t.Fatal(err)
	}
	return st, info
}

// fieldNames are the names of the fields, sorted.
func fieldNames(fields []hpack.HeaderField) []string {
	var names []string
	for _, f := range fields {
		names = append(names, f.Name)
	}
	slices.Sort(names)
	return names
}

// eventually waits until the condition holds.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(timeout)
	for pause := time.Millisecond; !ok(); pause = min(2*pause, 50*time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", timeout, what)
		}
		<-time.After(pause)
	}
}

package proxy

import (
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/cluster"
	"github.com/caddygrpc/caddy-grpc-proxy/grpcwire"
	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// Config is what one configured handler asks of its calls. Only Cluster is needed.
type Config struct {
	// Cluster has the endpoints.
	Cluster *cluster.Cluster

	// Retries is how many attempts a call may have beyond the first; 0: as many as there are endpoints.
	Retries int
	// TryDuration is for how long a call that has failed everywhere is tried again, every TryInterval (default 250 ms); 0: not at all.
	TryDuration, TryInterval time.Duration
	// ConnectTimeout is how long a call waits, from its start, for an endpoint of which it is not known yet how it is. Default 3 s.
	ConnectTimeout time.Duration

	// MaxTimeout bounds the calls' deadlines, StreamTimeout their life, StreamIdleTimeout how long nothing may move. 0: no bound.
	MaxTimeout, StreamTimeout, StreamIdleTimeout time.Duration
	// MaxMetadataBytes and MaxMetadataFields bound what is passed on of a call's metadata; 0: no bound.
	MaxMetadataBytes  int64
	MaxMetadataFields int

	// CancelBudget is how many sent calls a client may give up within CancelWindow before its calls get connections of their own;
	// 0: any number.
	CancelBudget int
	CancelWindow time.Duration
	// ClientConns: each client has connections of its own (PROXY protocol).
	ClientConns bool

	// QueueFull is the code for calls that find too many others waiting. Default UNAVAILABLE.
	QueueFull grpcwire.Code
	// ExposeUpstream lets clients read which upstream has failed.
	ExposeUpstream bool

	// Rules change metadata. Nil: nothing is changed.
	Rules Rules
	// Health judges endpoints by their attempts. Nil: nobody does.
	Health Health
	// Observers are told of calls that are over.
	Observers []Observer

	// Logger gets calls that fail, at Level. Default: none.
	Logger *zap.Logger
	Level  zapcore.Level
}

// Rules change a call's metadata on the way. They may panic: the call ends then.
type Rules interface {
	// Request returns the request's fields, without pseudo-header fields, and :authority as the upstream is to get them. It must neither
	// change nor keep fields. It is asked for each attempt, when Result names its endpoint.
	Request(c *call.Call, fields []h2.Field, authority string) ([]h2.Field, string)
	// Response returns the fields of the response head as the client is to get them. It may change fields.
	Response(c *call.Call, fields []h2.Field) []h2.Field
}

// Health judges endpoints by how attempts go.
type Health interface {
	// Observes tells whether attempts are judged, and whether the time to the first message is one of the reasons.
	Observes() (attempts, latency bool)
	// Responded tells that the answer of a call on trial has begun.
	Responded(s *upstream.State, t upstream.Trial)
	// Observe takes an attempt that is over. t is 0 unless it was on trial. The value belongs to the caller again on return.
	Observe(s *upstream.State, a *call.Attempt, t upstream.Trial)
}

// Observer is told of calls.
type Observer interface {
	// Over is called once for each call, when its Result is final. c is the next call's on return.
	Over(c *call.Call)
}

// Proxy carries calls from clients to the endpoints of one handler.
type Proxy struct {
	cfg      Config
	drain    drain
	cancels  cancels
	attempts bool // Health wants to know of attempts
	latency  bool // and of the time to the first message
}

// New makes a Proxy.
func New(cfg Config) *Proxy {
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = 3 * time.Second
	}
	if cfg.TryInterval == 0 {
		cfg.TryInterval = 250 * time.Millisecond
	}
	if cfg.QueueFull == grpcwire.OK {
		cfg.QueueFull = grpcwire.Unavailable
	}
	p := &Proxy{cfg: cfg, cancels: cancels{budget: cfg.CancelBudget, window: cfg.CancelWindow}}
	if cfg.Health != nil {
		p.attempts, p.latency = cfg.Health.Observes()
	}
	return p
}

// Request is the head of a call as the client has sent it.
type Request struct {
	// Path is :path to be sent on; the call's is decoded, and without a query.
	Path string
	// Fields are the regular fields, in lower case and legal (RFC 9113 section 8.2), what the next hop is told of the client
	// (x-forwarded-for, via) included. Fields of one connection (RFC 9110 section 7.6.1) may be among them.
	Fields []h2.Field
	// Refusal is why the call cannot be made, nil if it can.
	Refusal *Failure
	// PathHint follows the message about a malformed path.
	PathHint string
}

// Downstream is the client's side of one call, as the flight sees it. None of its methods blocks or keeps what it is given, and one
// runs at a time.
type Downstream interface {
	// Head sends the response head; the first field is :status. end: it is the whole answer (Trailers-Only).
	Head(fields []h2.Field, end bool)
	// Data sends a piece of messages. It tells how many bytes were taken; for the rest it calls Flight.Writable once when more can
	// be. sent: what was taken has left, or its room is bounded elsewhere; otherwise Flight.Sent tells when it has.
	Data(p []byte) (taken int, sent bool)
	// Trailers ends the answer. hurry: the call is cut off, so a client that does not read what was sent before is not waited for.
	Trailers(fields []h2.Field, hurry bool)
	// Consumed tells that so much of the request has gone on: the client may send more.
	Consumed(n int)
	// Flush lets what was sent leave. reader is the connection on whose reading goroutine this runs, nil if it is none.
	Flush(reader *h2.Conn)
	// Reset ends the call without a status: none can be sent any more, or nobody is there for it.
	Reset(code h2.ErrCode)
	// Done tells that the call is over, and its Result final. Nothing else is called afterwards.
	Done()
}

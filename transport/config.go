package transport

import (
	"context"
	"crypto/tls"
	"net"
	"time"

	"go.uber.org/zap"
)

// Config says how an endpoint is reached. Zero values get the defaults named at the fields.
type Config struct {
	// Identity tells apart endpoints of the same address that must not share connections (other TLS material, another limit of
	// streams). It is part of the pool's key.
	Identity string

	// DialTimeout bounds making a connection, from the name's look-up to the peer's first SETTINGS. Default 3 s.
	DialTimeout time.Duration
	// Dial makes what TLS and HTTP/2 are spoken on. Default: a net.Dialer's DialContext, with the three that follow.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// FallbackDelay is how long the first address family is tried before the other joins in (RFC 8305, Happy
	// Eyeballs). Default 300 ms; negative turns it off.
	FallbackDelay time.Duration
	// LocalAddr is the local address to dial from, nil for any.
	LocalAddr net.Addr
	// Resolver looks up names; nil for the system's.
	Resolver *net.Resolver

	// TLS is the client configuration, nil for plaintext. It is cloned; ServerName defaults to the endpoint's host,
	// NextProtos is always h2.
	TLS *tls.Config
	// CurrentTLS, if there is one, is what TLS has become when a connection is made: files may have been replaced. It
	// returns the same pointer as long as nothing has changed.
	CurrentTLS func(*zap.Logger) *tls.Config
	// TLSTimeout bounds the handshake within DialTimeout; 0 means DialTimeout alone does.
	TLSTimeout time.Duration

	// ProxyProtocol is the version, 1 or 2, of the PROXY protocol header that opens each connection; 0 for none. With
	// it a connection speaks for one client: see Endpoint.For.
	ProxyProtocol byte

	// MinConns is how many connections Preconnect is to be asked for.
	MinConns int
	// MaxConns is how many connections the endpoint may have. Default 10 (gRFC A105). It makes connections no different, and
	// neither do QueueSize and QueueTimeout: see Endpoint.Use.
	MaxConns int
	// MaxStreamsPerConn bounds the streams of one connection below the peer's own limit. 0: the peer's limit alone.
	MaxStreamsPerConn uint32
	// QueueSize is how many calls may wait for a stream when all are taken. Default 1,024; negative: none.
	QueueSize int
	// QueueTimeout bounds the wait of a call without a deadline. Default 5 s.
	QueueTimeout time.Duration

	// IdleTimeout closes a connection that had no stream for so long. Default 5 min; negative: never.
	IdleTimeout time.Duration
	// MaxAge retires a connection after so long (±10 %); its streams finish. 0: never.
	MaxAge time.Duration

	// PingInterval sends a PING when nothing was read for so long while streams are open. Default 5 min, which stock
	// gRPC servers tolerate (gRFC A8); negative: never.
	PingInterval time.Duration
	// PingTimeout ends the connection when the PING's answer takes longer; it is TCP_USER_TIMEOUT too (gRFC A18).
	// Default 20 s.
	PingTimeout time.Duration
	// PingWithoutStreams sends them on idle connections as well.
	PingWithoutStreams bool

	// MaxHeaderListSize bounds the header list of an answer. Default 1 MiB.
	MaxHeaderListSize uint32

	// Logger gets what happens to connections. Default: none.
	Logger *zap.Logger
}

// The defaults of Config.
const (
	DefaultDialTimeout  = 3 * time.Second
	DefaultMaxConns     = 10
	DefaultQueueSize    = 1024
	DefaultQueueTimeout = 5 * time.Second
	DefaultIdleTimeout  = 5 * time.Minute
	DefaultPingInterval = 5 * time.Minute
	DefaultPingTimeout  = 20 * time.Second
	DefaultMaxHeader    = 1 << 20

	backoffBase = 100 * time.Millisecond
	backoffMax  = 10 * time.Second
)

// NowTLS is the TLS configuration for a connection that is made now, nil for plaintext.
func (c *Config) NowTLS() *tls.Config {
	if c.TLS == nil || c.CurrentTLS == nil {
		return c.TLS
	}
	logger := c.Logger
	if logger == nil {
		logger = zap.NewNop()
	}
	now := c.CurrentTLS(logger).Clone()
	now.ServerName = c.TLS.ServerName // which is the endpoint's own
	return now
}

func orDefault[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

func (c Config) withDefaults() Config {
	orDefault(&c.DialTimeout, DefaultDialTimeout)
	orDefault(&c.MaxConns, DefaultMaxConns)
	orDefault(&c.QueueSize, DefaultQueueSize)
	orDefault(&c.QueueTimeout, DefaultQueueTimeout)
	orDefault(&c.IdleTimeout, DefaultIdleTimeout)
	orDefault(&c.PingInterval, DefaultPingInterval)
	orDefault(&c.PingTimeout, DefaultPingTimeout)
	orDefault(&c.MaxHeaderListSize, DefaultMaxHeader)
	if c.Logger == nil {
		c.Logger = zap.NewNop()
	}
	return c
}

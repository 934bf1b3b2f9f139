// Package route finds out which calls of a Caddy server go to a grpc_proxy without anything in between that would have to see an HTTP
// request. It does not know what matchers do: it asks them, once for all calls of the same host and path, and remembers the answer. Matchers
// that ask for metadata, or for the client's address, are asked for each call. Of handlers and matchers that it does not know it knows
// nothing, so calls that meet one are not direct.
package route

import (
	"context"
	"crypto/tls"
	"net/http"
	"net/url"
	"strings"
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddygrpc/caddy-grpc-proxy/inbound/direct"
)

// Handler is a handler that can take calls without a request.
type Handler interface {
	// Direct returns what takes them, or why it needs a request.
	Direct() (h *direct.Handler, why string)
}

// Matcher is a matcher of a plugin that may ask for nothing but host and path.
type Matcher interface {
	// PathOnly tells whether that is so. Else it asks for metadata as well, and for nothing more.
	PathOnly() bool
	// Patterns are those that metadata is compared with.
	Patterns() []string
}

// Decision is where calls go.
type Decision struct {
	// Handler takes them directly; nil: Caddy's server does.
	Handler *direct.Handler
	// Why the server has to, in words for its operator.
	Why string
}

// Table has the decisions for a server's calls.
type Table struct {
	srv *caddyhttp.Server
	why string // no call at all is direct

	mu        sync.RWMutex // LOCKS: guards what follows
	decisions map[key][]leaf
	asked     [4]bool // by what there are decisions: see asks
}

// leaf is where calls go of which matchers say so, that have to be asked for each call. The first leaf holds that fits.
type leaf struct {
	conds []cond
	Decision
}

// cond is a matcher, and what it says.
type cond struct {
	matcher any
	says    bool
}

// key is what calls have in common that go the same way.
type key struct {
	secure     bool
	host, path string // empty where routes do not ask for it
}

// asks is what the way of a call has depended on.
type asks uint8

const (
	byHost asks = 1 << iota
	byPath
)

func (a asks) key(secure bool, host, path string) key {
	k := key{secure: secure}
	if a&byHost != 0 {
		k.host = host
	}
	if a&byPath != 0 {
		k.path = path
	}
	return k
}

// maxDecisions is how many are remembered. Where there are more, any of them makes room: junk costs a look at the routes, and no memory.
const maxDecisions = 4096

// New makes the table of a server whose routes are provisioned. metrics: the server's calls are counted.
func New(srv *caddyhttp.Server, metrics bool) *Table {
	return &Table{srv: srv, why: never(srv, metrics), decisions: make(map[key][]leaf)}
}

// never says why no call of a server can be direct: what its requests go through besides the routes.
func never(srv *caddyhttp.Server, metrics bool) string {
	switch {
	case srv.Logs != nil:
		return "access logs are on"
	case metrics || srv.Metrics != nil:
		return "metrics are on"
	case len(srv.ExpectedUnderscoreHeaders) > 0 || len(srv.ExpectedDotHeaders) > 0:
		return "the server lets names of fields with underscores or dots through"
	case srv.ReadTimeout > 0 || srv.WriteTimeout > 0 || srv.ReadMinRate > 0 || srv.WriteMinRate > 0:
		return "the server has timeouts or rates for whole requests"
	}
	return ""
}

// Decide says where the calls of a host and a path go. state is that of the client's connection, nil without TLS. request makes the
// request of this call, if a matcher has to see its metadata or its client.
func (t *Table) Decide(host, path string, state *tls.ConnectionState, request func() *http.Request) Decision {
	if t.why != "" {
		return Decision{Why: t.why}
	}
	if !plain(host, path) {
		return Decision{Why: "the host or the path is unusual"}
	}
	leaves := t.leaves(host, path, state)
	if len(leaves) == 1 {
		return leaves[0].Decision
	}
	r := caddyhttp.PrepareRequest(request(), caddy.NewReplacer(), nil, t.srv)
	for i := range leaves {
		if leaves[i].fits(r) {
			return leaves[i].Decision
		}
	}
	return Decision{Why: "a matcher fails"}
}

func (l *leaf) fits(r *http.Request) bool {
	for _, c := range l.conds {
		if ok, err := (caddyhttp.MatcherSet{c.matcher}).MatchWithError(r); err != nil || ok != c.says {
			return false
		}
	}
	return true
}

// leaves are the ways of calls of a host and a path.
func (t *Table) leaves(host, path string, state *tls.ConnectionState) []leaf {
	if l := t.remembered(state != nil, host, path); l != nil {
		return l
	}
	leaves, asks := t.explore(host, path, state)
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.decisions) >= maxDecisions {
		for other := range t.decisions {
			delete(t.decisions, other)
			break
		}
	}
	t.asked[asks] = true
	t.decisions[asks.key(state != nil, host, path)] = leaves
	return leaves
}

func (t *Table) remembered(secure bool, host, path string) []leaf {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for a, asked := range t.asked {
		if asked {
			if l := t.decisions[asks(a).key(secure, host, path)]; l != nil {
				return l
			}
		}
	}
	return nil
}

// maxLeaves is how many ways calls of one host and path may take.
const maxLeaves = 16

// explore walks the routes once for each combination of what those matchers may say that are asked for each call.
func (t *Table) explore(host, path string, state *tls.ConnectionState) (leaves []leaf, asks asks) {
	var says []bool
	for len(leaves) < maxLeaves {
		w := walk{req: t.request(host, path, state), says: says}
		d := w.decide(t.srv.Routes)
		leaves = append(leaves, leaf{w.conds, d})
		asks |= w.asks
		says = says[:0]
		for _, c := range w.conds {
			says = append(says, c.says)
		}
		for len(says) > 0 && !says[len(says)-1] {
			says = says[:len(says)-1]
		}
		if len(says) == 0 {
			return leaves, asks
		}
		says[len(says)-1] = false
	}
	return []leaf{{Decision: Decision{Why: "too many matchers need metadata or the client's address"}}}, asks
}

// plain tells a host and a path that mean the same to everybody: what may be cleaned, decoded or refused on the way is not for here.
func plain(host, path string) bool {
	service, method, ok := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	return ok && path[0] == '/' && service != "" && method != "" && isPlain(service) && isPlain(method) && !strings.Contains(path, "..") &&
		host != "" && isPlain(host) && strings.Trim(host, ".") != ""
}

func isPlain(s string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case c == '.' || c == '-' || c == '_' || c == ':' || c == '[' || c == ']':
		default:
			return false
		}
	}
	return true
}

// request is one that stands for all calls of a host and a path.
func (t *Table) request(host, path string, state *tls.ConnectionState) *http.Request {
	r := (&http.Request{
		Method: http.MethodPost, Host: host, URL: &url.URL{Path: path}, RequestURI: path,
		Proto: "HTTP/2.0", ProtoMajor: 2, TLS: state, RemoteAddr: "192.0.2.1:1",
		Header: http.Header{"Content-Type": {"application/grpc"}, "Te": {"trailers"}}, Body: http.NoBody,
	}).WithContext(context.Background())
	return caddyhttp.PrepareRequest(r, caddy.NewReplacer(), nil, t.srv)
}

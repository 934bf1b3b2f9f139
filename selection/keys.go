package selection

import (
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"strings"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/cespare/xxhash/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
)

// HashKey says where the key comes from that a call is hashed by.
type HashKey struct {
	// What the key is:
	//
	// Source | The key
	// -------|--------
	// `header` | the request metadata called `name`; several values are joined by commas
	// `method` | the RPC's method, without its service
	// `service` | the RPC's service
	// `path` | both: `/pkg.Service/Method`
	// `uri` | the path as the client sent it, with a query, if there is one
	// `authority` | the host that the client named
	// `client_ip` | the client's IP address, as told by trusted proxies in front
	// `peer_ip` | the IP address at the other end of the connection
	// `tls_subject` | the subject of the client's certificate
	// `tls_san` | the name in the client's certificate: its first URI (the SPIFFE ID), else DNS name, else e-mail address, else IP address
	// `cookie` | the value of the cookie called `name`
	// `query` | the values of the query parameter `name`, joined by commas
	// `placeholder` | what the placeholders in `name` stand for
	//
	// A source that is missing in a call, or empty, is passed over.
	Source string `json:"source,omitempty"`

	// The metadata key, cookie, query parameter or text with placeholders that the source needs.
	Name string `json:"name,omitempty"`

	// Leave out the sources that follow if this one or one before it has a value: those that follow are only a
	// substitute then. Default: false; all sources together make the key.
	Terminal bool `json:"terminal,omitempty"`
}

type sourceKind uint8

const (
	fromHeader sourceKind = iota
	fromMethod
	fromService
	fromPath
	fromURI
	fromAuthority
	fromClientIP
	fromPeerIP
	fromTLSSubject
	fromTLSSAN
	fromCookie
	fromQuery
	fromPlaceholder
)

// sourceKinds are the sources by their names; named ones need a name.
var sourceKinds = map[string]struct {
	kind  sourceKind
	named bool
}{
	"header":      {fromHeader, true},
	"method":      {fromMethod, false},
	"service":     {fromService, false},
	"path":        {fromPath, false},
	"uri":         {fromURI, false},
	"authority":   {fromAuthority, false},
	"client_ip":   {fromClientIP, false},
	"peer_ip":     {fromPeerIP, false},
	"tls_subject": {fromTLSSubject, false},
	"tls_san":     {fromTLSSAN, false},
	"cookie":      {fromCookie, true},
	"query":       {fromQuery, true},
	"placeholder": {fromPlaceholder, true},
}

const sourceNames = "header, method, service, path, uri, authority, client_ip, peer_ip, tls_subject, tls_san, cookie, query, placeholder"

// parseKey reads a key's source from the rest of the line:
//
//	<source> [<name>] [terminal]
func parseKey(d *caddyfile.Dispenser) (HashKey, error) {
	args := d.RemainingArgs()
	if len(args) == 0 {
		return HashKey{}, d.Errf("key: the source is missing; it is one of %s", sourceNames)
	}
	k := HashKey{Source: args[0]}
	args = args[1:]
	if sourceKinds[k.Source].named && len(args) > 0 {
		k.Name, args = args[0], args[1:]
	}
	if len(args) > 0 && args[0] == "terminal" {
		k.Terminal, args = true, args[1:]
	}
	if _, err := k.source(); err != nil {
		return HashKey{}, d.Errf("key: %v", err)
	}
	if len(args) > 0 {
		return HashKey{}, d.Errf("key: unexpected argument %q", args[0])
	}
	return k, nil
}

// source checks the key and prepares it for use.
func (k HashKey) source() (source, error) {
	kind, ok := sourceKinds[k.Source]
	switch {
	case k.Source == "":
		return source{}, fmt.Errorf("the source is missing; it is one of %s", sourceNames)
	case !ok:
		return source{}, fmt.Errorf("there is no source %q; it is one of %s", k.Source, sourceNames)
	case kind.named && k.Name == "":
		return source{}, fmt.Errorf("source %s needs a name", k.Source)
	case !kind.named && k.Name != "":
		return source{}, fmt.Errorf("source %s takes no name, but %q is given", k.Source, k.Name)
	}
	s := source{kind: kind.kind, name: k.Name, terminal: k.Terminal}
	if s.kind == fromPlaceholder {
		if !strings.Contains(s.name, "{") {
			return source{}, fmt.Errorf("there is no placeholder in %q; write {http.request.header.X-User}, say", s.name)
		}
		// The value of such a placeholder is what the source header has, only slower.
		if name, ok := strings.CutPrefix(s.name, "{http.request.header."); ok && strings.IndexByte(name, '}') == len(name)-1 {
			s.kind, s.name = fromHeader, strings.TrimSuffix(name, "}")
		}
	}
	if s.kind == fromHeader {
		s.name = strings.ToLower(s.name)
		if s.name == "host" || s.name == ":authority" { // It is no metadata in any way a call comes.
			s.kind, s.name = fromAuthority, ""
			return s, nil
		}
		return s, checkMetadataKey(s.name)
	}
	return s, nil
}

// checkMetadataKey: gRPC over HTTP/2: "Header-Name → 1*( %x30-39 / %x61-7A / "_" / "-" / ".") ; 0-9 a-z _ - .".
func checkMetadataKey(key string) error {
	for i := range len(key) {
		c := key[i]
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && c != '_' && c != '-' && c != '.' {
			return fmt.Errorf("%q is not a metadata key: %q is none of a-z 0-9 _ . -", key, c)
		}
	}
	// gRFC A76 refuses request_hash_header values that end with -bin too: the same bytes are written in more than one way.
	if strings.HasSuffix(key, "-bin") {
		return fmt.Errorf("%q is binary metadata, which is written in more than one way and cannot be compared as text", key)
	}
	return nil
}

// sources are where a call's hash comes from.
type sources []source

func newSources(keys []HashKey) (sources, error) {
	if len(keys) == 0 {
		return nil, errors.New("keys: there is nothing to hash; write key header <name>, say")
	}
	list := make(sources, len(keys))
	for i, k := range keys {
		var err error
		if list[i], err = k.source(); err != nil {
			return nil, fmt.Errorf("keys: %w", err)
		}
	}
	return list, nil
}

// hash joins the hashes of the sources that the call has, as Envoy does for a list of RouteAction.HashPolicy: each is
// the XXH64 of the text, with the seed 0, and h = rotl(h, 1) ^ h_i, since without the rotation two equal ones would
// cancel each other out. A terminal one ends the list if there is a hash by then.
func (s sources) hash(c *call.Call) (h uint64, ok bool) {
	if c == nil {
		return 0, false
	}
	for i := range s {
		if g, has := s[i].hash(c); has {
			h, ok = bits.RotateLeft64(h, 1)^g, true
		}
		if ok && s[i].terminal {
			break
		}
	}
	return h, ok
}

// source is a HashKey, checked.
type source struct {
	kind     sourceKind
	terminal bool
	name     string
}

func (s *source) hash(c *call.Call) (uint64, bool) {
	switch s.kind {
	case fromHeader:
		if c.Metadata == nil {
			return 0, false
		}
		return hashValues(c.Metadata.Values(s.name))
	case fromMethod:
		return hashText(c.Method)
	case fromService:
		return hashText(c.Service)
	case fromPath:
		return hashText(c.Path)
	case fromURI:
		return hashText(c.URI)
	case fromAuthority:
		return hashText(c.Authority)
	case fromClientIP:
		return hashIP(c.ClientIP)
	case fromPeerIP:
		return hashIP(c.Peer.Addr())
	case fromTLSSubject:
		if cert := clientCertificate(c); cert != nil && len(cert.RawSubject) > 0 {
			return xxhash.Sum64(cert.RawSubject), true
		}
	case fromTLSSAN:
		return hashText(clientName(c))
	case fromCookie:
		return hashText(cookie(c, s.name))
	case fromQuery:
		return hashQuery(c.URI, s.name)
	case fromPlaceholder:
		if c.Placeholders != nil {
			return hashText(c.Placeholders.ReplaceAll(s.name, ""))
		}
	}
	return 0, false
}

func hashText(s string) (uint64, bool) {
	if s == "" {
		return 0, false
	}
	return xxhash.Sum64String(s), true
}

// hashValues hashes the values joined by commas, as gRFC A42 and A76 want it for headers with several.
func hashValues(values []string) (uint64, bool) {
	switch len(values) {
	case 0:
		return 0, false
	case 1:
		return hashText(values[0])
	}
	var d xxhash.Digest
	d.Reset()
	for i, v := range values {
		if i > 0 {
			_, _ = d.WriteString(",")
		}
		_, _ = d.WriteString(v)
	}
	return d.Sum64(), true
}

func hashIP(ip netip.Addr) (uint64, bool) {
	if !ip.IsValid() {
		return 0, false
	}
	var buf [64]byte
	return xxhash.Sum64(ip.Unmap().AppendTo(buf[:0])), true
}

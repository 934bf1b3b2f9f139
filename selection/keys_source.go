package selection

import (
	"crypto/x509"
	"net/url"
	"strings"

	"github.com/cespare/xxhash/v2"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
)

// clientCertificate is what the client showed of itself, nil if it showed none.
func clientCertificate(c *call.Call) *x509.Certificate {
	if c.TLS == nil || len(c.TLS.PeerCertificates) == 0 {
		return nil
	}
	return c.TLS.PeerCertificates[0]
}

// clientName is the subject alternative name of the client's certificate that says most about who it is.
func clientName(c *call.Call) string {
	cert := clientCertificate(c)
	switch {
	case cert == nil:
		return ""
	case len(cert.URIs) > 0:
		return cert.URIs[0].String()
	case len(cert.DNSNames) > 0:
		return cert.DNSNames[0]
	case len(cert.EmailAddresses) > 0:
		return cert.EmailAddresses[0]
	case len(cert.IPAddresses) > 0:
		return cert.IPAddresses[0].String()
	}
	return ""
}

// cookie returns the value of the call's first cookie of that name. The cookies may come in several fields (RFC 9113,
// section 8.2.3).
func cookie(c *call.Call, name string) string {
	if c.Metadata == nil {
		return ""
	}
	for _, line := range c.Metadata.Values("cookie") {
		for line != "" {
			var pair string
			pair, line, _ = strings.Cut(line, ";")
			if key, value, ok := strings.Cut(strings.TrimSpace(pair), "="); ok && key == name {
				if n := len(value); n > 1 && value[0] == '"' && value[n-1] == '"' {
					value = value[1 : n-1]
				}
				return value
			}
		}
	}
	return ""
}

// hashQuery hashes the values of a query parameter, joined by commas.
func hashQuery(uri, key string) (uint64, bool) {
	_, query, _ := strings.Cut(uri, "?")
	var d xxhash.Digest
	d.Reset()
	n, empty := 0, true
	for query != "" {
		var pair string
		pair, query, _ = strings.Cut(query, "&")
		k, v, _ := strings.Cut(pair, "=")
		if unescape(k) != key {
			continue
		}
		if n > 0 {
			_, _ = d.WriteString(",")
		}
		v = unescape(v)
		_, _ = d.WriteString(v)
		n++
		empty = empty && v == ""
	}
	return d.Sum64(), n > 1 || !empty
}

// unescape decodes a part of a query. What is not well-formed stays as it is: it is a key all the same.
func unescape(s string) string {
	if strings.IndexByte(s, '%') < 0 && strings.IndexByte(s, '+') < 0 {
		return s
	}
	if t, err := url.QueryUnescape(s); err == nil {
		return t
	}
	return s
}

package main

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"text/template"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// site is what the demo's Caddyfile is made from.
type site struct {
	TLSPort, H2CPort int
	Backends         []*backend
	Policy           string
	Dir              string // of everything that Caddy writes
}

// caddyfileTemplate serves both ports by one site block. Specific to gRPC are only grpc_proxy there and grpc_relay in front. The
// rest keeps Caddy to itself: no admin API, nothing written outside one directory, no certificate in a trust store, no port
// but the two, on loopback only. HTTP/3 is left out, since it would need a UDP port beside the TCP one.
var caddyfileTemplate = template.Must(template.New("Caddyfile").Funcs(template.FuncMap{"path": quotePath}).Parse(`{
	admin off
	persist_config off
	storage file_system {{path .Dir "storage"}}
	log {
		output file {{path .Dir "caddy.log"}}
		level ERROR
	}
	local_certs
	skip_install_trust
	auto_https disable_redirects
	default_bind 127.0.0.1
	grace_period 500ms
	servers {
		protocols h1 h2 h2c
		listener_wrappers {
			grpc_relay
		}
	}
}

https://localhost:{{.TLSPort}}, http://localhost:{{.H2CPort}} {
	grpc_proxy {{range .Backends}} 127.0.0.1:{{.Port}}{{end}} {
		lb_policy {{.Policy}}
	}
}
`))

// Port is where the backend listens, for the template.
func (b *backend) Port() int { return b.port }

// quotePath joins a path as one Caddyfile token. Slashes work on every system; backslashes would escape.
func quotePath(elem ...string) string {
	path := filepath.ToSlash(filepath.Join(elem...))
	if strings.ContainsAny(path, " \t\"") {
		return "`" + path + "`"
	}
	return path
}

// caddyfileOf returns the Caddyfile, formatted as `caddy fmt` would, and its JSON form. The adapter's warnings are
// errors here: the demo is to show a clean configuration.
func caddyfileOf(s site) (text, config []byte, err error) {
	var buf bytes.Buffer
	if err := caddyfileTemplate.Execute(&buf, s); err != nil {
		return nil, nil, fmt.Errorf("writing the Caddyfile: %w", err)
	}
	text = caddyfile.Format(buf.Bytes())
	adapter := caddyconfig.GetAdapter("caddyfile")
	if adapter == nil {
		return nil, nil, errors.New("this Caddy has no Caddyfile adapter")
	}
	config, warnings, err := adapter.Adapt(text, map[string]any{"filename": "Caddyfile"})
	if err != nil {
		return nil, nil, fmt.Errorf("adapting the Caddyfile: %w", err)
	}
	if len(warnings) > 0 {
		return nil, nil, fmt.Errorf("adapting the Caddyfile: %s", warnings[0])
	}
	return text, config, nil
}

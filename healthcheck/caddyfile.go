package healthcheck

import (
	"errors"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// CheckWords says what is wrong with settings that were read from a Caddyfile so far. They are copies: what is left out
// stays open. Provisioning would find the same, but could not name the word and its line.
func CheckWords(a Active, g GRPC, h HTTP) error {
	var none caddy.Context
	return errors.Join(a.check(), g.Provision(none), g.Validate(), h.Provision(none))
}

// parseAlone reads the name of a check that has no options of its own.
func parseAlone(d *caddyfile.Dispenser) error {
	d.Next() // The check's name.
	name := d.Val()
	if d.NextArg() {
		return d.Errf("%s: unexpected argument %q", name, d.Val())
	}
	if d.NextBlock(0) {
		return d.Errf("%s takes no block; its options are words of grpc_proxy, such as health_interval", name)
	}
	return nil
}

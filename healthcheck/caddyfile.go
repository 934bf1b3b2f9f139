package healthcheck

import "github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

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

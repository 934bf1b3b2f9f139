package selection

import (
	"strconv"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// parseAlone reads the name of a policy that has no options.
func parseAlone(d *caddyfile.Dispenser) error {
	d.Next() // The policy's name.
	return parseEnd(d, d.Val())
}

// parseCount reads the name of a policy and a number behind it, 0 if there is none.
func parseCount(d *caddyfile.Dispenser) (int, error) {
	d.Next() // The policy's name.
	name := d.Val()
	n := 0
	if d.NextArg() {
		var err error
		if n, err = strconv.Atoi(d.Val()); err != nil {
			return 0, d.Errf("%s: %q is not a number of endpoints to choose from", name, d.Val())
		}
		if err := checkCount(name, n); err != nil {
			return 0, d.Err(err.Error())
		}
	}
	return n, parseEnd(d, name)
}

// parseEnd makes sure that nothing more was written.
func parseEnd(d *caddyfile.Dispenser, name string) error {
	if d.NextArg() {
		return d.Errf("%s: unexpected argument %q", name, d.Val())
	}
	if d.NextBlock(0) {
		return d.Errf("%s takes no block", name)
	}
	return nil
}

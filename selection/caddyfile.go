package selection

import (
	"math"
	"strconv"

	"github.com/caddyserver/caddy/v2"
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
	return n, parseArgsEnd(d, name)
}

// parseArgsEnd makes sure that the line has ended.
func parseArgsEnd(d *caddyfile.Dispenser, name string) error {
	if d.NextArg() {
		return d.Errf("%s: unexpected argument %q", name, d.Val())
	}
	return nil
}

// parseOptions reads a policy that has no arguments, but options.
func parseOptions(d *caddyfile.Dispenser, o options) error {
	d.Next() // The policy's name.
	name := d.Val()
	if err := parseArgsEnd(d, name); err != nil {
		return err
	}
	return o.parse(d, name)
}

// parseEnd makes sure that nothing more was written.
func parseEnd(d *caddyfile.Dispenser, name string) error {
	if err := parseArgsEnd(d, name); err != nil {
		return err
	}
	if d.NextBlock(0) {
		return d.Errf("%s takes no block", name)
	}
	return nil
}

// optionalNumberOption reads a number from 0 on, where 0 is not the same as nothing.
func optionalNumberOption(to **float64) func(*caddyfile.Dispenser) error {
	return func(d *caddyfile.Dispenser) error {
		word := d.Val()
		value, err := oneArg(d)
		if err != nil {
			return err
		}
		x, err := strconv.ParseFloat(value, 64)
		if err != nil || !(x >= 0 && x <= math.MaxFloat64) {
			return d.Errf("%s: %q is not a number of 0 or more", word, value)
		}
		*to = &x
		return nil
	}
}

// durationOrOffOption reads a duration above 0, or the word off, which is written as -1.
func durationOrOffOption(to *caddy.Duration) func(*caddyfile.Dispenser) error {
	read := durationOption(to)
	return func(d *caddyfile.Dispenser) error {
		if d.NextArg() {
			if d.Val() == "off" {
				*to = -1
				return parseArgsEnd(d, "off")
			}
			d.Prev()
		}
		return read(d)
	}
}

package discovery

import (
	"fmt"
	"strconv"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// words reads the block of a source.
type words struct{ *caddyfile.Dispenser }

// text reads the one value of an option that may be given once.
func (w words) text(v *string) error {
	arg, err := w.once(*v != "")
	if err == nil {
		*v = arg
	}
	return err
}

// once reads the one value of an option.
func (w words) once(set bool) (string, error) {
	name := w.Val()
	args := w.RemainingArgs()
	switch {
	case len(args) != 1 || args[0] == "":
		return "", w.ArgErr()
	case set:
		return "", w.Errf("%s is given twice", name)
	}
	return args[0], nil
}

// flag reads an option without a value.
func (w words) flag(v *bool) error {
	if w.NextArg() {
		return w.ArgErr()
	}
	if *v {
		return w.Errf("%s is given twice", w.Val())
	}
	*v = true
	return nil
}

// duration reads a duration greater than zero.
func (w words) duration(v *caddy.Duration) error {
	name := w.Val()
	arg, err := w.once(*v != 0)
	if err != nil {
		return err
	}
	d, err := caddy.ParseDuration(arg)
	if err != nil {
		return w.Errf("%s: %q is not a duration; write 30s, say", name, arg)
	}
	if d <= 0 {
		return w.Errf("%s: %q is not positive", name, arg)
	}
	*v = caddy.Duration(d)
	return nil
}

// durationOrOff reads a duration greater than zero, or off, which is -1.
func (w words) durationOrOff(v *caddy.Duration) error {
	name := w.Val()
	arg, err := w.once(*v != 0)
	if err != nil {
		return err
	}
	if arg == "off" {
		*v = -1
		return nil
	}
	d, err := caddy.ParseDuration(arg)
	if err != nil || d <= 0 {
		return w.Errf("%s: %q is neither a positive duration, such as 300ms, nor off", name, arg)
	}
	*v = caddy.Duration(d)
	return nil
}

// integer reads a whole number; whether it is in range is the field's own check.
func (w words) integer() (int, error) {
	name := w.Val()
	arg, err := w.once(false)
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(arg)
	if err != nil {
		return 0, w.Errf("%s: %q is not a whole number", name, arg)
	}
	return n, nil
}

// checkRefresh refuses intervals that would only load the one who is asked.
func checkRefresh(refresh caddy.Duration) error {
	if d := time.Duration(refresh); d < minRefresh {
		return fmt.Errorf("refresh is %v; the shortest is %v", d, minRefresh)
	}
	return nil
}

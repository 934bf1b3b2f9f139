package selection

import (
	"encoding/json"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// options are the words of a policy's block, each with what reads the rest of its line.
type options map[string]func(d *caddyfile.Dispenser) error

// parse reads the block of the policy. The words that repeat may come more than once.
func (o options) parse(d *caddyfile.Dispenser, policy string, repeat ...string) error {
	seen := make(map[string]bool)
	for d.NextBlock(0) {
		word := d.Val()
		read, ok := o[word]
		if !ok {
			words := slices.Sorted(maps.Keys(o))
			return d.Errf("%s: unrecognized option %q; there is %s", policy, word, strings.Join(words, ", "))
		}
		if seen[word] && !slices.Contains(repeat, word) {
			return d.Errf("%s: %s is given twice", policy, word)
		}
		seen[word] = true
		if err := read(d); err != nil {
			return err
		}
	}
	return nil
}

// oneArg returns the only argument of the option that was read last.
func oneArg(d *caddyfile.Dispenser) (string, error) {
	word := d.Val()
	if !d.NextArg() {
		return "", d.Errf("%s: the value is missing", word)
	}
	value := d.Val()
	if d.NextArg() {
		return "", d.Errf("%s: unexpected argument %q", word, d.Val())
	}
	return value, nil
}

// textOption reads a text, which must not be empty.
func textOption(to *string) func(*caddyfile.Dispenser) error {
	return func(d *caddyfile.Dispenser) error {
		word := d.Val()
		value, err := oneArg(d)
		if err == nil && value == "" {
			err = d.Errf("%s: the value is empty", word)
		}
		*to = value
		return err
	}
}

// flagOption reads a word without a value.
func flagOption(to *bool) func(*caddyfile.Dispenser) error {
	return func(d *caddyfile.Dispenser) error {
		word := d.Val()
		*to = true
		if d.NextArg() {
			return d.Errf("%s: unexpected argument %q", word, d.Val())
		}
		return nil
	}
}

// numberOption reads a whole number above 0. Where a number means something special, the field's own check says so.
func numberOption[T int | uint64](to *T) func(*caddyfile.Dispenser) error { return unitOption(to, "") }

// percentOption reads a whole number above 0 that may have a % behind it.
func percentOption(to *int) func(*caddyfile.Dispenser) error { return unitOption(to, "%") }

func unitOption[T int | uint64](to *T, unit string) func(*caddyfile.Dispenser) error {
	return func(d *caddyfile.Dispenser) error {
		word := d.Val()
		value, err := oneArg(d)
		if err != nil {
			return err
		}
		n, err := strconv.ParseInt(strings.TrimSuffix(value, unit), 10, 64)
		if err != nil || n <= 0 {
			return d.Errf("%s: %q is not a positive whole number", word, value)
		}
		*to = T(n)
		return nil
	}
}

// factorOption reads a number above 0.
func factorOption(to *float64) func(*caddyfile.Dispenser) error { return fractionOption(to, "") }

// shareOption reads a number above 0 that may have a % behind it.
func shareOption(to *float64) func(*caddyfile.Dispenser) error { return fractionOption(to, "%") }

func fractionOption(to *float64, unit string) func(*caddyfile.Dispenser) error {
	return func(d *caddyfile.Dispenser) error {
		word := d.Val()
		value, err := oneArg(d)
		if err != nil {
			return err
		}
		x, err := strconv.ParseFloat(strings.TrimSuffix(value, unit), 64)
		if err != nil || !(x > 0) {
			return d.Errf("%s: %q is not a positive number", word, value)
		}
		*to = x
		return nil
	}
}

// durationOption reads a duration above 0.
func durationOption(to *caddy.Duration) func(*caddyfile.Dispenser) error {
	return func(d *caddyfile.Dispenser) error {
		word := d.Val()
		value, err := oneArg(d)
		if err != nil {
			return err
		}
		v, err := caddy.ParseDuration(value)
		if err != nil || v <= 0 {
			return d.Errf("%s: %q is not a positive duration; write 30m or 12h, say", word, value)
		}
		*to = caddy.Duration(v)
		return nil
	}
}

// policyOption reads a selection policy with its arguments and its block.
func policyOption(to *json.RawMessage) func(*caddyfile.Dispenser) error {
	return func(d *caddyfile.Dispenser) error {
		word := d.Val()
		if !d.NextArg() {
			return d.Errf("%s: the name of a selection policy is missing", word)
		}
		name := d.Val()
		id := namespace + name
		if _, err := caddy.GetModule(id); err != nil {
			return d.Errf("%s: there is no selection policy %q; available: %s", word, name, policyNames())
		}
		mod, err := caddyfile.UnmarshalModule(d, id)
		if err != nil {
			return err
		}
		policy, ok := mod.(Policy)
		if !ok {
			return d.Errf("%s: module %s (%T) is not a selection policy", word, id, mod)
		}
		*to = caddyconfig.JSONModuleObject(policy, "policy", name, nil)
		return nil
	}
}

func policyNames() string {
	modules := caddy.GetModules(strings.TrimSuffix(namespace, "."))
	names := make([]string, len(modules))
	for i, m := range modules {
		names[i] = m.ID.Name()
	}
	return strings.Join(names, ", ")
}

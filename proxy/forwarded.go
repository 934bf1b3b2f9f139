package proxy

import "github.com/caddygrpc/caddy-grpc-proxy/h2"

// Forwarded is what the next hop is told about a call's client, by the rules of reverse_proxy. The inbound fills in what it knows
// itself, gives Take the client's fields, and has AppendTo add the result.
type Forwarded struct {
	// For is the address of the connection's other end, without port and zone, Proto is http or https, and Host is what the client has
	// asked for. A field without a value is not sent. All are empty where nobody knows who the client is.
	For, Proto, Host string
	// Via is what this hop adds (RFC 9110 section 7.6.3).
	Via string
	// Trusted: the other end is a proxy that is believed what it says about its clients.
	Trusted bool

	priorFor, priorVia    valueList
	priorProto, priorHost string
}

// Take takes one of the client's fields. It returns false for those that travel on as they are.
func (f *Forwarded) Take(name, value string) bool {
	switch name {
	case "via":
		f.priorVia.add(value)
	case "x-forwarded-for":
		if f.Trusted {
			f.priorFor.add(value)
		}
	case "x-forwarded-proto":
		f.priorProto = value
	case "x-forwarded-host":
		f.priorHost = value
	default:
		return false
	}
	return true
}

// AppendTo appends the fields for the next hop. They replace those that Take has taken.
func (f *Forwarded) AppendTo(fields []h2.Field) []h2.Field {
	proto, host := f.Proto, f.Host
	if f.Trusted && f.priorProto != "" {
		proto = f.priorProto
	}
	if f.Trusted && f.priorHost != "" {
		host = f.priorHost
	}
	fields = addIfAny(fields, "x-forwarded-for", f.priorFor.with(f.For))
	fields = addIfAny(fields, "x-forwarded-proto", proto)
	fields = addIfAny(fields, "x-forwarded-host", host)
	return addIfAny(fields, "via", f.priorVia.with(f.Via))
}

func addIfAny(fields []h2.Field, name, value string) []h2.Field {
	if value == "" {
		return fields
	}
	return append(fields, h2.Field{Name: name, Value: value})
}

// valueList is a list of a field's values. Most have none or one, which costs no memory.
type valueList struct {
	first string
	more  []byte
}

func (l *valueList) add(value string) {
	switch {
	case value == "":
	case l.first == "":
		l.first = value
	default:
		l.more = append(append(l.more, ", "...), value...)
	}
}

// with is the list with one value more at its end.
func (l *valueList) with(last string) string {
	switch {
	case l.first == "":
		return last
	case last == "":
		return l.first + string(l.more)
	}
	return l.first + string(l.more) + ", " + last
}

package discovery

import (
	"fmt"
	"maps"
	"strings"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// maxEndpoints bounds what one source may list.
const maxEndpoints = 65_536

// maxPriority is the highest level; a DNS SRV record's (RFC 2782) has 16 bits.
const maxPriority = 65_535

// Entry is an endpoint in a list of endpoints: in the configuration, a file, or an answer over HTTP.
type Entry struct {
	// Where the endpoint is: `host:port`, or `unix//path/to/socket`. A port range, `host:8000-8003`, stands for one
	// endpoint per port. Required.
	Address string `json:"address,omitempty"`

	// The host name that TLS verifies the endpoint by. Default: the address's host.
	Name string `json:"name,omitempty"`

	// The endpoint's share relative to the others', from 1 to 65535. Default: `1`.
	Weight *int `json:"weight,omitempty"`

	// The endpoint's level, from 0 to 65535. A level is used when those with lower numbers cannot carry the load.
	// Default: `0`.
	Priority int `json:"priority,omitempty"`

	// Where the endpoint is, for policies that prefer what is near. Default: not known.
	Locality upstream.Locality `json:"locality,omitzero"`

	// What else there is to say about the endpoint, for policies that choose by it. `hash_key` takes the place of the
	// address in consistent hashing (gRFC A76). Default: nothing.
	Metadata map[string]string `json:"metadata,omitempty"`
}

// Endpoints returns what the entry stands for: one endpoint, or one for each port of a range. The errors name the
// entry's field, the value, and what to write instead. The scheme is the address's; lists have none.
func (e *Entry) Endpoints(origin string) ([]upstream.Endpoint, upstream.Scheme, error) {
	if e.Address == "" {
		return nil, "", fmt.Errorf("address is missing; write host:port, such as localhost:50051")
	}
	addrs, scheme, err := upstream.Parse(e.Address)
	if err != nil {
		return nil, "", fmt.Errorf("address: %w", err)
	}
	if err := e.check(); err != nil {
		return nil, "", err
	}
	list := make([]upstream.Endpoint, len(addrs))
	for i, a := range addrs {
		list[i] = upstream.Endpoint{
			Network: a.Network, Address: a.Dial, Name: e.Name, Priority: uint32(e.Priority),
			Locality: e.Locality, Metadata: maps.Clone(e.Metadata), Origin: origin,
		}
		if e.Weight != nil {
			list[i].Weight = uint32(*e.Weight)
		}
	}
	return list, scheme, nil
}

// check looks at everything but the address.
func (e *Entry) check() error {
	if e.Weight != nil && (*e.Weight < 1 || *e.Weight > upstream.MaxWeight) {
		return fmt.Errorf("weight is %d; write a number from 1 to %d, and leave the entry out to send nothing there", *e.Weight, upstream.MaxWeight)
	}
	if e.Priority < 0 || e.Priority > maxPriority {
		return fmt.Errorf("priority is %d; write a number from 0 to %d, 0 being used first", e.Priority, maxPriority)
	}
	if strings.ContainsAny(e.Name, "/:{}[] \t\r\n") {
		return fmt.Errorf("name %q is not a host name; write backend.example.com, say, without a port", e.Name)
	}
	if _, ok := e.Metadata[""]; ok {
		return fmt.Errorf("metadata has an empty key; give each value a name")
	}
	return nil
}

// endpointsOf returns what a list of entries stands for. where names an entry in errors.
func endpointsOf(entries []Entry, origin string, where func(i int) string) ([]upstream.Endpoint, error) {
	list := make([]upstream.Endpoint, 0, len(entries))
	for i := range entries {
		endpoints, scheme, err := entries[i].Endpoints(origin)
		if err == nil && scheme != upstream.SchemeNone {
			// Whether TLS is spoken is the handler's to say, once for all endpoints.
			err = fmt.Errorf("address: %q has a scheme; write host:port alone, and turn TLS on by the word tls (JSON: transport.tls)", entries[i].Address)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", where(i), err)
		}
		if len(list)+len(endpoints) > maxEndpoints {
			return nil, fmt.Errorf("%s: the list has more than %d endpoints; split it into several handlers", where(i), maxEndpoints)
		}
		list = append(list, endpoints...)
	}
	return list, nil
}

package discovery

import (
	"fmt"
	"net"
	"strings"
)

// Target reads a gRPC target of the scheme dns, which stands for a source of the kind a:
//
//	dns:///host[:port]   dns://server[:port]/host[:port]   dns:host[:port]
//
// The authority is the DNS server to ask. gRPC Name Resolution: "port is the port to return for each address. If not
// specified, 443 is used".
func Target(s string) (*A, error) {
	scheme, rest, _ := strings.Cut(s, ":")
	if !strings.EqualFold(scheme, "dns") {
		return nil, fmt.Errorf("target %q is not of the scheme dns; write dns:///host:port", s)
	}
	a := new(A)
	if after, ok := strings.CutPrefix(rest, "//"); ok {
		server, name, ok := strings.Cut(after, "/")
		if !ok {
			return nil, fmt.Errorf("target %q: what follows dns:// is the DNS server to ask; write dns:///%s", s, after)
		}
		if server != "" {
			a.Resolver = &Resolver{Addresses: []string{server}}
		}
		rest = name
	}
	var err error
	switch a.Name, a.Port, err = net.SplitHostPort(rest); {
	case rest == "":
		return nil, fmt.Errorf("target %q has no name; write dns:///host:port", s)
	case strings.Contains(rest, ","):
		return nil, fmt.Errorf("target %q contains a comma; separate addresses by blanks (in JSON each has its own entry)", s)
	case err != nil && strings.Contains(err.Error(), "missing port"):
		a.Name, a.Port = strings.Trim(rest, "[]"), "443"
	case err != nil:
		return nil, fmt.Errorf("target %q: %w; write dns:///host:port", s, err)
	case a.Port == "":
		return nil, fmt.Errorf("target %q ends with a colon; write the port behind it, or leave it out for 443", s)
	}
	if strings.ContainsAny(a.Name, "/?#@") || a.Name == "" {
		return nil, fmt.Errorf("target %q: %q is not a name; write dns:///host:port", s, a.Name)
	}
	return a, nil
}

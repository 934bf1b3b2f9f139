package discovery

import (
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// resolvConf is where systems other than Windows say which DNS servers there are.
const resolvConf = "/etc/resolv.conf"

// resolveOptions says how names are looked up: resolv.conf(5).
type resolveOptions struct {
	servers  []dnsServer
	search   []string
	ndots    int           // A name with fewer dots is looked for in the search domains first.
	timeout  time.Duration // How long one server may take for one answer.
	attempts int           // How many times the servers are asked.
	rotate   bool          // Whether questions are spread over the servers, instead of asking the first one first.
}

// dnsServer is host:port of a DNS server.
type dnsServer struct {
	network string // udp, whose truncated answers are asked for again by TCP, or tcp
	addr    string
}

// readResolvConf reads the file, whose settings have defaults as the resolver(5) page has them. ok is false if there is
// no such file.
func readResolvConf(file string) (o resolveOptions, ok bool) {
	o = resolveOptions{ndots: 1, timeout: 5 * time.Second, attempts: 2}
	raw, err := os.ReadFile(file) //nolint:gosec // the system's file
	if err != nil {
		return o, false
	}
	o.parse(string(raw))
	if len(o.servers) == 0 {
		// "If no nameserver entries are present, the default is to use the name server on the local machine."
		o.servers = []dnsServer{{"udp", "127.0.0.1:53"}, {"udp", "[::1]:53"}}
	}
	return o, true
}

func (o *resolveOptions) parse(text string) {
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, ";") || strings.HasPrefix(line, "#") {
			continue
		}
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			o.servers = append(o.servers, dnsServer{"udp", net.JoinHostPort(f[1], "53")})
		case "domain", "search":
			o.search = nil
			for _, domain := range f[1:] {
				if domain = dns.Fqdn(domain); domain != "." {
					o.search = append(o.search, domain)
				}
			}
		case "options":
			for _, option := range f[1:] {
				o.option(option)
			}
		}
	}
}

// option reads one of the options, within the limits that the C library has.
func (o *resolveOptions) option(s string) {
	name, value, _ := strings.Cut(s, ":")
	n, err := strconv.Atoi(value)
	switch {
	case name == "rotate":
		o.rotate = true
	case err != nil:
	case name == "ndots":
		o.ndots = min(max(n, 0), 15)
	case name == "timeout":
		o.timeout = time.Duration(min(max(n, 1), 30)) * time.Second
	case name == "attempts":
		o.attempts = min(max(n, 1), 5)
	}
}

// candidates are the full names that a name may stand for, in the order in which they are tried.
func (o *resolveOptions) candidates(name string) []string {
	if strings.HasSuffix(name, ".") {
		return []string{name}
	}
	full := name + "."
	var list []string
	for _, domain := range o.search {
		if len(full)+len(domain) <= 255 { // RFC 1035, section 2.3.4: "names 255 octets or less"
			list = append(list, full+domain)
		}
	}
	if strings.Count(name, ".") >= o.ndots {
		return append([]string{full}, list...)
	}
	return append(list, full)
}

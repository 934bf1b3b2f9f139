package discovery

import (
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// hostsFile is where the system keeps names of its own.
func hostsFile() string {
	if runtime.GOOS == "windows" {
		return filepath.Join(os.Getenv("SystemRoot"), `System32\drivers\etc\hosts`)
	}
	return "/etc/hosts"
}

// lookupHosts returns the addresses that a hosts file has for a name, of both families.
func lookupHosts(file, name string) []netip.Addr {
	name = strings.TrimSuffix(name, ".")
	var addrs []netip.Addr
	if raw, err := os.ReadFile(file); err == nil { //nolint:gosec // the system's file
		addrs = searchHosts(string(raw), name)
	}
	if len(addrs) == 0 && isLocalhost(name) {
		// RFC 6761, section 6.3: "Name resolution APIs and libraries SHOULD recognize localhost names as special and SHOULD
		// always return the IP loopback address for address queries".
		return []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	}
	return addrs
}

func isLocalhost(name string) bool {
	name = strings.ToLower(name)
	return name == "localhost" || strings.HasSuffix(name, ".localhost")
}

func searchHosts(text, name string) []netip.Addr {
	var addrs []netip.Addr
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		is := func(s string) bool { return strings.EqualFold(strings.TrimSuffix(s, "."), name) }
		addr, err := netip.ParseAddr(fields[0])
		if err == nil && slices.ContainsFunc(fields[1:], is) && !slices.Contains(addrs, addr) {
			addrs = append(addrs, addr)
		}
	}
	return addrs
}

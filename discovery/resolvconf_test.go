package discovery

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func writeFile(t *testing.T, name, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestResolvConf(t *testing.T) {
	o, ok := readResolvConf(writeFile(t, "resolv.conf", `# Kubernetes
; and more
domain ignored.example
search default.svc.cluster.local svc.cluster.local. .
nameserver 10.96.0.10
nameserver fd00::10
options ndots:5 timeout:2 attempts:3 rotate edns0
`))
	if got, want := fmt.Sprint(o, ok), "{[{udp 10.96.0.10:53} {udp [fd00::10]:53}] [default.svc.cluster.local. svc.cluster.local.] 5 2000000000 3 true} true"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	o, _ = readResolvConf(writeFile(t, "resolv.conf", "options ndots:99 timeout:0 attempts:100 ndots:x\nnameserver\n"))
	if got, want := fmt.Sprint(o), "{[{udp 127.0.0.1:53} {udp [::1]:53}] [] 15 1000000000 5 false}"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if o, ok := readResolvConf(filepath.Join(t.TempDir(), "none")); ok || o.ndots != 1 || o.timeout != 5*time.Second || o.attempts != 2 {
		t.Errorf("without a file: %+v, %v", o, ok)
	}
}

func TestCandidates(t *testing.T) {
	o := resolveOptions{ndots: 2, search: []string{"ns.svc.", "svc."}}
	for name, want := range map[string]string{
		"a":      "a.ns.svc. a.svc. a.",
		"a.b":    "a.b.ns.svc. a.b.svc. a.b.",
		"a.b.c":  "a.b.c. a.b.c.ns.svc. a.b.c.svc.",
		"a.":     "a.",
		"a.b.c.": "a.b.c.",
	} {
		if got := strings.Join(o.candidates(name), " "); got != want {
			t.Errorf("%s: got %s; want %s", name, got, want)
		}
	}
	long := strings.Repeat(strings.Repeat("a", 62)+".", 4)
	if got := o.candidates(strings.TrimSuffix(long, ".")); !slices.Equal(got, []string{long}) {
		t.Errorf("got %v; the search domains make it too long", got)
	}
}

func TestHosts(t *testing.T) {
	file := writeFile(t, "hosts", `127.0.0.1 localhost
10.0.0.1	Backend.example. backend # the one
10.0.0.2 backend
fe80::1%eth0 backend
10.0.0.2 backend
nonsense backend
10.0.0.3
# 10.0.0.4 backend
`)
	for name, want := range map[string]string{
		"backend":         "[10.0.0.1 10.0.0.2 fe80::1%eth0]",
		"BACKEND.example": "[10.0.0.1]",
		"backend.":        "[10.0.0.1 10.0.0.2 fe80::1%eth0]",
		"localhost":       "[127.0.0.1]",
		"x.localhost":     "[127.0.0.1 ::1]",
		"nobody":          "[]",
	} {
		if got := fmt.Sprint(lookupHosts(file, name)); got != want {
			t.Errorf("%s: got %s; want %s", name, got, want)
		}
	}
	addrs := []netip.Addr{netip.MustParseAddr("::ffff:10.0.0.1"), netip.MustParseAddr("::1")}
	if got := fmt.Sprint(families{v4: true}.of(addrs), families{v6: true}.of(addrs), families{}.of(addrs)); got != "[10.0.0.1] [::1] []" {
		t.Errorf("got %s", got)
	}
}

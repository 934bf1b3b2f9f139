package upstream

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for _, tc := range []struct {
		in     string
		want   string // addresses joined by a blank
		scheme Scheme
		err    string // part of the error
	}{
		{in: "localhost:50051", want: "localhost:50051"},
		{in: ":50051", want: "localhost:50051"},
		{in: "127.0.0.1:8000-8002", want: "127.0.0.1:8000 127.0.0.1:8001 127.0.0.1:8002"},
		{in: "[::1]:50051", want: "[::1]:50051"},
		{in: "tcp/10.0.0.1:1", want: "10.0.0.1:1"},
		{in: "unix//run/app.sock", want: "unix//run/app.sock"},
		{in: "unix/app.sock", want: "unix/app.sock"},
		{in: "unix+h2c//run/app.sock", want: "unix//run/app.sock", scheme: SchemePlain},
		{in: "h2c://a:1", want: "a:1", scheme: SchemePlain},
		{in: "http://a:8080", want: "a:8080", scheme: SchemePlain},
		{in: "grpc://a:1", want: "a:1", scheme: SchemePlain},
		{in: "grpcs://a:1", want: "a:1", scheme: SchemeTLS},
		{in: "https://a", want: "a:443", scheme: SchemeTLS},
		{in: "https://[::1]", want: "[::1]:443", scheme: SchemeTLS},
		{in: "https://a:8443/", want: "a:8443", scheme: SchemeTLS},
		{in: "h2c://a:8000-8001", want: "a:8000 a:8001", scheme: SchemePlain},

		{in: "", err: "write host:port"},
		{in: "localhost", err: `has no port; write localhost:50051`},
		{in: "50051", err: `"50051" is a port without a host; write localhost:50051, say`},
		{in: "h2c://50051", err: "write h2c://localhost:50051, say"},
		{in: "a:1,b:2", err: "separate addresses by blanks"},
		{in: "h2c://a:1,h2c://b:2", err: "separate addresses by blanks"},
		{in: "unix//run/a,b", want: "unix//run/a,b"},
		{in: "h2c://a", err: "has no port; write h2c://a:50051"},
		{in: "grpcs://a", err: "has no port"},
		{in: "h2c://a:443", err: "conflicts with port 443"},
		{in: "grpc://a:443", err: "write https://"},
		{in: "https://a:80", err: "write h2c://"},
		{in: "dns:///a:1", err: "write host:port"},
		{in: "xds:///a", err: "xDS is not supported"},
		{in: "ws://a:1", err: "WebSocket"},
		{in: "ftp://a:1", err: "unsupported scheme ftp://"},
		{in: "unix:///run/x", err: "write unix//path/to/socket"},
		{in: "unix/", err: "names no socket"},
		{in: "h2c://a:1/path", err: `remove "/path"`},
		{in: "https://user@a:1", err: "only scheme, host and port"},
		{in: "udp/a:1", err: `network "udp" is not supported`},
		{in: "a:0", err: "port 0"},
		{in: "a:70000", err: "a:70000"},
		{in: "a:9-8", err: "a:9-8"},
		{in: "a:1-60000", err: "at most 4096"},
		{in: "::1", err: "in brackets"},
		{in: "{nope}:1", err: "placeholder"},
		{in: "a b:1", err: "white space"},
	} {
		t.Run(tc.in, func(t *testing.T) {
			got, scheme, err := Parse(tc.in)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Fatalf("error %v, want one containing %q", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var s []string
			for _, a := range got {
				s = append(s, a.String())
			}
			if j := strings.Join(s, " "); j != tc.want || scheme != tc.scheme {
				t.Fatalf("got %q scheme %q, want %q scheme %q", j, scheme, tc.want, tc.scheme)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"localhost:1", "h2c://[::1]:8000-8003", "unix//x", "https://a", "dns:///a", "tcp/:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		addrs, _, err := Parse(s)
		if err != nil {
			return
		}
		if len(addrs) == 0 || len(addrs) > maxExpanded {
			t.Fatalf("%q: %d addresses", s, len(addrs))
		}
		for _, a := range addrs {
			again, _, err := Parse(a.String())
			if err != nil || len(again) != 1 || again[0] != a {
				t.Fatalf("%q: %q does not read back: %v %v", s, a, again, err)
			}
		}
	})
}

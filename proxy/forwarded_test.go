package proxy

import (
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
)

func TestForwarded(t *testing.T) {
	client := []string{
		"x-forwarded-for", "192.0.2.1", "x-forwarded-proto", "https", "x-forwarded-host", "shop.example", "via", "1.1 edge",
		"x-forwarded-for", "", "x-forwarded-for", "192.0.2.2", "x-forwarded-proto", "ftp", "via", "2.0 mid", "x-other", "1",
	}
	own := Forwarded{For: "127.0.0.1", Proto: "http", Host: "a.example", Via: "2.0 Caddy"}
	trusting := own
	trusting.Trusted = true
	for _, tt := range []struct {
		name string
		f    Forwarded
		sent []string
		want []string
	}{
		{"nothing sent", own, nil, []string{"x-forwarded-for", "127.0.0.1", "x-forwarded-proto", "http", "x-forwarded-host", "a.example", "via", "2.0 Caddy"}},
		{"nobody is believed", own, client, []string{
			"x-forwarded-for", "127.0.0.1", "x-forwarded-proto", "http", "x-forwarded-host", "a.example", "via", "1.1 edge, 2.0 mid, 2.0 Caddy",
		}},
		{"a proxy is", trusting, client, []string{
			"x-forwarded-for", "192.0.2.1, 192.0.2.2, 127.0.0.1", "x-forwarded-proto", "ftp", "x-forwarded-host", "shop.example", "via", "1.1 edge, 2.0 mid, 2.0 Caddy",
		}},
		{"a proxy says nothing", trusting, []string{"x-forwarded-proto", "", "x-forwarded-host", ""}, []string{
			"x-forwarded-for", "127.0.0.1", "x-forwarded-proto", "http", "x-forwarded-host", "a.example", "via", "2.0 Caddy",
		}},
		{"a proxy without an address", Forwarded{Proto: "http", Trusted: true, Via: "2.0 Caddy"}, client, []string{
			"x-forwarded-for", "192.0.2.1, 192.0.2.2", "x-forwarded-proto", "ftp", "x-forwarded-host", "shop.example", "via", "1.1 edge, 2.0 mid, 2.0 Caddy",
		}},
		{"nobody knows who it is", Forwarded{Via: "2.0 Caddy"}, client, []string{"via", "1.1 edge, 2.0 mid, 2.0 Caddy"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []h2.Field
			for i := 0; i < len(tt.sent); i += 2 {
				if taken := tt.f.Take(tt.sent[i], tt.sent[i+1]); taken == (tt.sent[i] == "x-other") {
					t.Errorf("%s: taken is %v", tt.sent[i], taken)
				}
			}
			got = tt.f.AppendTo(got)
			for i := 0; i < len(got) || 2*i < len(tt.want); i++ {
				if i >= len(got) || 2*i >= len(tt.want) || got[i].Name != tt.want[2*i] || got[i].Value != tt.want[2*i+1] {
					t.Fatalf("got %v, want %q", got, tt.want)
				}
			}
		})
	}
}

// The fields of an ordinary client need no memory but the block's.
func TestForwardedAllocs(t *testing.T) {
	block := make([]h2.Field, 0, 8)
	own := Forwarded{For: "127.0.0.1", Proto: "http", Via: "2.0 Caddy"}
	if n := testing.AllocsPerRun(100, func() {
		f := own
		f.Host = "a.example"
		f.Take("x-any", "1")
		block = f.AppendTo(block[:0])
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

package direct

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/caddygrpc/caddy-grpc-proxy/h2"
	"github.com/caddygrpc/caddy-grpc-proxy/proxy"
)

// head is a request's head with more fields, names and values in turn.
func head(more ...string) []h2.Field {
	fields := []h2.Field{
		{Name: ":method", Value: "POST"},
		{Name: ":scheme", Value: "http"},
		{Name: ":path", Value: "/a%2eB/M%zz?x=\xff"},
		{Name: ":authority", Value: "a.example"},
		{Name: "content-type", Value: "application/grpc"},
	}
	for i := 0; i < len(more); i += 2 {
		fields = append(fields, h2.Field{Name: more[i], Value: more[i+1]})
	}
	return fields
}

// Policies see the metadata as the client has sent it, the upstream what the proxy makes of it.
func TestDescribe(t *testing.T) {
	for _, trusted := range []bool{false, true} {
		from := &Client{
			peer:      netip.MustParseAddrPort("127.0.0.1:5000"),
			forwarded: proxy.Forwarded{For: "127.0.0.1", Proto: "http", Via: "2.0 Caddy", Trusted: trusted},
		}
		var st Stream
		if !st.describe(from, head("x-a", "1", "x-forwarded-for", "192.0.2.1", "x-a", "2", "via", "1.1 edge", "host", "a.example")) {
			t.Fatal("it is no gRPC")
		}
		if got := st.Values("x-a"); !slices.Equal(got, []string{"1", "2"}) {
			t.Errorf("x-a %q", got)
		}
		if got := st.Values("x-forwarded-for"); !slices.Equal(got, []string{"192.0.2.1"}) {
			t.Errorf("x-forwarded-for %q", got)
		}
		if got := st.Values("x-forwarded-proto"); got != nil {
			t.Errorf("x-forwarded-proto %q, which the client has not sent", got)
		}
		want, ip := "127.0.0.1", "127.0.0.1"
		if trusted {
			want, ip = "192.0.2.1, 127.0.0.1", "192.0.2.1"
		}
		if got := fmt.Sprint(st.Request.Fields); got != fmt.Sprint([]h2.Field{
			{Name: "content-type", Value: "application/grpc"},
			{Name: "x-a", Value: "1"},
			{Name: "x-a", Value: "2"},
			{Name: "x-forwarded-for", Value: want},
			{Name: "x-forwarded-proto", Value: "http"},
			{Name: "x-forwarded-host", Value: "a.example"},
			{Name: "via", Value: "1.1 edge, 2.0 Caddy"},
		}) {
			t.Errorf("trusted %v: the upstream gets %s", trusted, got)
		}
		if got := st.Call.ClientIP.String(); got != ip {
			t.Errorf("trusted %v: the client is %s, want %s", trusted, got, ip)
		}
		if c := &st.Call; c.Path != "/a.B/M%zz" || st.Request.Path != "/a%2eB/M%25zz?x=%FF" || c.URI != "/a%2eB/M%zz?x=\xff" || c.Authority != "a.example" {
			t.Errorf("path %q of %q, sent on as %q to %q", c.Path, c.URI, st.Request.Path, c.Authority)
		}
	}
}

// The client of a call that came through trusted proxies is the last one before them.
func TestClientIP(t *testing.T) {
	from := &Client{peer: netip.MustParseAddrPort("10.0.0.1:5000"), trusted: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
	for _, tt := range []struct {
		said []string
		want string
	}{
		{nil, "10.0.0.1"},
		{[]string{"192.0.2.1"}, "192.0.2.1"},
		{[]string{"198.51.100.9, 192.0.2.1"}, "192.0.2.1"},
		{[]string{"198.51.100.9", "192.0.2.1, 10.0.0.3", " 10.0.0.2 "}, "192.0.2.1"},
		{[]string{"10.0.0.3, 10.0.0.2"}, "10.0.0.3"},
		{[]string{"192.0.2.1, unknown, 10.0.0.2"}, "10.0.0.2"},
		{[]string{""}, "10.0.0.1"},
		{[]string{"2001:db8::1"}, "2001:db8::1"},
	} {
		if got := from.clientIP(tt.said).String(); got != tt.want {
			t.Errorf("%q: the client is %s, want %s", tt.said, got, tt.want)
		}
	}
}

package web

import (
	"net/http"
	"slices"
	"strings"
	"testing"
)

func TestHeaderMetadata(t *testing.T) {
	h := make(http.Header)
	long := strings.Repeat("long-", 30) + "key"
	for _, key := range []string{"x-user", "user-agent", "a", "x_y.z-9", "trace-bin", long} {
		h.Add(key, key+"-1")
		h.Add(key, key+"-2")
	}
	m := headerMetadata(h)
	for _, key := range []string{"x-user", "user-agent", "a", "x_y.z-9", "trace-bin", "X-User", "x-USER", long} {
		lower := strings.ToLower(key)
		if got := m.Values(key); !slices.Equal(got, []string{lower + "-1", lower + "-2"}) {
			t.Errorf("%q: %q", key, got)
		}
	}
	if got := m.Values("x-use"); got != nil {
		t.Errorf("x-use: %q", got)
	}
	if n := testing.AllocsPerRun(100, func() { m.Values("x-user") }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

package healthcheck

import (
	"context"
	"encoding/json"
	"math"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddygrpc/caddy-grpc-proxy/call"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/backendtest"
	"github.com/caddygrpc/caddy-grpc-proxy/internal/wiretest"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// load reads a configuration as Caddy does.
func load(t *testing.T, raw string) (*Config, error) {
	t.Helper()
	c := new(Config)
	if err := json.Unmarshal([]byte(raw), c); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := caddy.NewContext(caddy.Context{Context: context.Background()})
	t.Cleanup(cancel)
	return c, c.Provision(ctx)
}

func TestConfig(t *testing.T) {
	wiretest.CheckLeaks(t)
	c, err := load(t, `{
		"active": {"interval": "1h", "check": {"protocol": "grpc", "services": ["pkg.A"], "headers": {"X-A": ["b"]}}},
		"passive": {"fail_duration": "10s", "outlier_detection": {"latency": {}}},
		"slow_start": {"window": "1m"},
		"panic_threshold": 50
	}`)
	if err != nil {
		t.Fatal(err)
	}
	if attempts, latency := c.Observes(); !attempts || !latency || !slices.Equal(c.Services(), []string{"pkg.A"}) {
		t.Errorf("attempts %v, latency %v, services %q", attempts, latency, c.Services())
	}
	b := backendtest.Start(t, backendtest.Options{})
	events := make(chan string, 16)
	core, logs := observer.New(zap.DebugLevel)
	c.Start(Runtime{
		Transport: func(*upstream.Endpoint) transport.Config { return transport.Config{} },
		Logger:    zap.New(core),
		OnChange:  func(tr Transition) { events <- tr.Event() + " " + tr.Endpoint.Address },
	})
	info, end := endpoint(t, b.Addr())
	stop := c.Attend(info, end.Endpoint)
	next := func(want string) {
		t.Helper()
		select {
		case got := <-events:
			if got != want+" "+b.Addr() {
				t.Errorf("event %q, want %q", got, want)
			}
		case <-time.After(patience):
			t.Fatalf("no event %q", want)
		}
	}
	next("healthy")
	if st := end.State.Status(); st.Condition != upstream.ConditionWarming {
		t.Errorf("%+v with slow start", st)
	}
	b.Health.SetServingStatus("", notServes)
	next("unhealthy")
	b.Health.SetServingStatus("", isServing)
	next("healthy")
	end.State.Drain("maintenance")
	next("drained")
	end.State.Undrain()
	next("healthy")
	c.Observe(end.State, &call.Attempt{Code: 14}, 0)
	next("ejected")
	stop()
	if !end.State.Serves("pkg.A") {
		t.Error("the service is still not being served")
	}
	found := false
	for _, e := range logs.All() {
		if e.Message == "upstream unhealthy" && e.Level == zap.WarnLevel {
			f := e.ContextMap()
			found = f["upstream"] == b.Addr() && strings.Contains(f["reason"].(string), "NOT_SERVING") && f["condition"] == "unhealthy"
		}
	}
	if !found {
		t.Errorf("the log says %v", logs.All())
	}
}

func TestConfigDefault(t *testing.T) {
	c, err := load(t, `{"active": {}}`)
	if err != nil {
		t.Fatal(err)
	}
	a := c.Active
	g, ok := a.prober.(*GRPC)
	if !ok || g.Mode != ModeAuto || g.Unimplemented != UnimplementedHealthy || c.Services() != nil {
		t.Errorf("check %+v", a.prober)
	}
	if time.Duration(a.Interval) != 10*time.Second || time.Duration(a.Timeout) != 2*time.Second || a.Passes != 1 || a.Fails != 2 || a.Initial != InitialConnecting {
		t.Errorf("%+v", a)
	}
}

// What decides about meaning is told apart, what decides about times is not.
func TestIdentity(t *testing.T) {
	var none *Config
	ids := map[string]string{"": none.Identity()}
	for _, raw := range []string{`{}`, `{"active": {}}`, `{"active": {"port": 99}}`, `{"active": {"check": {"protocol": "tcp"}}}`, `{"active": {}, "passive": {"fail_duration": "1s"}}`, `{"passive": {"outlier_detection": {}}}`} {
		c, err := load(t, raw)
		if err != nil {
			t.Fatal(err)
		}
		ids[raw] = c.Identity()
	}
	seen := make(map[string]string)
	for raw, id := range ids {
		if other, ok := seen[id]; ok && raw+other != "{}" {
			t.Errorf("%s and %s have the same identity", raw, other)
		}
		seen[id] = raw
	}
	c, err := load(t, `{"active": {"interval": "5s", "timeout": "1s", "check": {"protocol": "grpc"}}}`)
	if err != nil {
		t.Fatal(err)
	}
	if c.Identity() != ids[`{"active": {}}`] {
		t.Error("the interval makes another identity")
	}
}

func TestConfigRefuses(t *testing.T) {
	for raw, text := range map[string]string{
		`{"panic_threshold": 101}`:                                      "panic_threshold is 101",
		`{"slow_start": {}}`:                                            "window is 0s",
		`{"slow_start": {"window": "1s", "aggression": -1}}`:            "aggression",
		`{"active": {"check": {"protocol": "smtp"}}}`:                   "smtp",
		`{"active": {"initial": "x"}}`:                                  `initial "x"`,
		`{"active": {"check": {"protocol": "grpc", "mode": "no"}}}`:     `mode "no"`,
		`{"active": {"check": {"protocol": "grpc", "services": [""]}}}`: `service "" is no name`,
		`{"active": {"check": {"protocol": "grpc", "per_rpc": false}}}`: "per_rpc is false",
		`{"active": {"check": {"protocol": "grpc", "mod": "no"}}}`:      "mod",
		`{"passive": {"max_fails": 2}}`:                                 "fail_duration",
	} {
		if _, err := load(t, raw); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: error %v, want %q in it", raw, err, text)
		}
	}
}

func TestNoConfig(t *testing.T) {
	var c *Config
	s := new(upstream.State)
	c.Start(Runtime{})
	c.Attend(nil, nil)()
	c.Observe(s, new(call.Attempt), 1)
	c.Responded(s, 1)
	if attempts, _ := c.Observes(); attempts || c.Services() != nil || c.Provision(caddy.Context{}) != nil {
		t.Error("no configuration does something")
	}
}

// An endpoint that cannot be connected to is no event at each of its dials.
func TestBackoffIsNoEvent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := 0
		m := &Monitor{OnChange: func(Transition) { n++ }}
		info, end := endpoint(t, "127.0.0.1:1")
		defer m.Attend(info, end.Endpoint)()
		for range 10 {
			end.State.Set(upstream.Backoff)
			end.State.Clear(upstream.Backoff)
		}
		if n != 0 {
			t.Errorf("%d events", n)
		}
	})
}

// Envoy's documentation of slow start: window 60 s, aggression 1 and 2.
func TestSlowStart(t *testing.T) {
	var off *SlowStart
	if off.Factor(0) != 1 {
		t.Error("slow start that is off weighs")
	}
	for _, tc := range []struct {
		aggression float64
		after      time.Duration
		want       float64
	}{
		{1, 0, 0.1},
		{1, 3 * time.Second, 0.1}, // below min_weight_percent
		{1, 15 * time.Second, 0.25},
		{1, 30 * time.Second, 0.5},
		{1, time.Minute, 1},
		{1, time.Hour, 1},
		{2, 0, math.Sqrt(1.0 / 60)}, // at least one second counts
		{2, 15 * time.Second, 0.5},
		{0.5, 30 * time.Second, 0.25},
	} {
		s := &SlowStart{Window: caddy.Duration(time.Minute), Aggression: tc.aggression}
		if err := s.Provision(caddy.Context{}); err != nil {
			t.Fatal(err)
		}
		if got := s.Factor(tc.after); math.Abs(got-tc.want) > 1e-9 {
			t.Errorf("aggression %g after %v: %g, want %g", tc.aggression, tc.after, got, tc.want)
		}
		now := time.Now()
		if got := s.FactorSince(now.Add(-tc.after), now); math.Abs(got-tc.want) > 1e-9 {
			t.Errorf("since %v: %g, want %g", tc.after, got, tc.want)
		}
		if s.FactorSince(time.Time{}, now) != 1 {
			t.Error("an endpoint that was always there is warming")
		}
	}
}

func TestPanic(t *testing.T) {
	for _, tc := range []struct {
		usable, all int
		threshold   float64
		want        bool
	}{
		{5, 10, 50, false},
		{4, 10, 50, true},
		{0, 10, 50, true},
		{0, 10, 0, false},
		{9, 10, 100, true},
		{10, 10, 100, false},
		{0, 0, 50, false},
	} {
		if got := Panic(tc.usable, tc.all, tc.threshold); got != tc.want {
			t.Errorf("%d of %d usable, threshold %g: %v", tc.usable, tc.all, tc.threshold, got)
		}
	}
}

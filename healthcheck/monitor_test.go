package healthcheck

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

// Whoever follows the events knows how an endpoint is, in whatever order reasons come and go.
func TestEvents(t *testing.T) {
	type step struct {
		set, clear upstream.Reason
	}
	set := func(r upstream.Reason) step { return step{set: r} }
	unset := func(r upstream.Reason) step { return step{clear: r} }
	const (
		backoff, unhealthy, ejected, failing = upstream.Backoff, upstream.Unhealthy, upstream.Ejected, upstream.Failing
		probation, draining, connecting      = upstream.Probation, upstream.Draining, upstream.Connecting
	)
	for name, tt := range map[string]struct {
		steps []step
		want  string
	}{
		"a check":                          {[]step{set(connecting), unset(connecting), set(unhealthy), unset(unhealthy)}, "healthy unhealthy healthy"},
		"from the start":                   {[]step{set(connecting), {unhealthy, connecting}, unset(unhealthy)}, "unhealthy healthy"},
		"no connection":                    {[]step{set(backoff), unset(backoff)}, ""},
		"no connection, then no answer":    {[]step{set(backoff), set(unhealthy), unset(unhealthy), unset(backoff)}, "unhealthy healthy"},
		"no answer, then no connection":    {[]step{set(unhealthy), set(backoff), unset(backoff), unset(unhealthy)}, "unhealthy healthy"},
		"well, but for a moment's backoff": {[]step{set(unhealthy), set(backoff), unset(unhealthy), set(unhealthy), unset(backoff), unset(unhealthy)}, "unhealthy healthy"},
		"ejected":                          {[]step{set(ejected), {probation, ejected}, unset(probation)}, "ejected readmitted"},
		"ejected again":                    {[]step{set(ejected), {probation, ejected}, {ejected, probation}, {probation, ejected}, unset(probation)}, "ejected ejected readmitted"},
		"ejected for two reasons":          {[]step{set(ejected), set(failing), unset(ejected), unset(failing)}, "ejected readmitted"},
		"failing and not connected":        {[]step{set(failing), set(backoff), unset(failing), unset(backoff)}, "ejected readmitted"},
		"on trial and not connected":       {[]step{set(ejected), {probation, ejected}, set(backoff), unset(probation), unset(backoff)}, "ejected readmitted"},
		"unhealthy on trial":               {[]step{set(ejected), {probation, ejected}, set(unhealthy), unset(probation), unset(unhealthy)}, "ejected unhealthy healthy"},
		"drained while unhealthy":          {[]step{set(unhealthy), set(draining), unset(draining), unset(unhealthy)}, "unhealthy drained unhealthy healthy"},
		"drained":                          {[]step{set(draining), unset(draining)}, "drained healthy"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var got []string
				conditions := []upstream.Condition{upstream.ConditionHealthy}
				m := &Monitor{OnChange: func(x Transition) {
					got = append(got, x.Event())
					conditions = append(conditions, x.To.Condition)
				}}
				info, end := endpoint(t, "127.0.0.1:1")
				stop := m.Attend(info, end.Endpoint)
				for _, s := range tt.steps {
					end.State.Change(s.set, s.clear, "")
					after(time.Second)
				}
				if g := strings.Join(got, " "); g != tt.want {
					t.Errorf("events %s, want %s", g, tt.want)
				}
				if last := conditions[len(conditions)-1]; last != upstream.ConditionHealthy && last != upstream.ConditionWarming {
					t.Errorf("the last is %v, the endpoint is %v", last, end.State.Status().Condition)
				}
				if slices.Contains(conditions, upstream.ConditionConnecting) {
					t.Error("connecting was told")
				}
				stop()
				end.State.Set(unhealthy)
				if g := strings.Join(got, " "); g != tt.want {
					t.Errorf("told after the end: %s", g)
				}
			})
		})
	}
}

// A monitor that comes to an endpoint which is ill, after a reload say, tells when it is well.
func TestEventsOfTheIll(t *testing.T) {
	for reason, want := range map[upstream.Reason]string{
		upstream.Unhealthy: "healthy", upstream.Ejected: "readmitted", upstream.Probation: "readmitted", upstream.Draining: "healthy", upstream.Backoff: "",
	} {
		info, end := endpoint(t, "127.0.0.1:1")
		end.State.Set(reason)
		var got []string
		m := &Monitor{OnChange: func(x Transition) { got = append(got, x.Event()) }}
		stop := m.Attend(info, end.Endpoint)
		end.State.Clear(reason)
		stop()
		if g := strings.Join(got, " "); g != want {
			t.Errorf("%v: events %q, want %q", reason, g, want)
		}
	}
}

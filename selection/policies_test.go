package selection_test

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/selection/selectiontest"
)

const namespace = "http.grpc_proxy.selection_policies."

// policy is one of the package's, for tests.
type policy struct {
	name   string
	new    func() selection.Policy
	traits selectiontest.Traits
}

// policies are all policies of the package. Other test files add theirs in init.
var policies = []policy{
	{"round_robin", func() selection.Policy { return new(selection.RoundRobin) }, selectiontest.Traits{Even: true, Exact: true, Weighted: true}},
	{"weighted_round_robin", func() selection.Policy { return &selection.WeightedRoundRobin{Weights: []int{1}} }, selectiontest.Traits{Even: true, Exact: true}},
	{"random", func() selection.Policy { return new(selection.Random) }, selectiontest.Traits{Even: true, Weighted: true}},
	{"least_request", func() selection.Policy { return new(selection.LeastRequest) }, selectiontest.Traits{Even: true, Least: true, Weighted: true}},
	{"least_request", func() selection.Policy { return &selection.LeastRequest{FullScan: true} }, selectiontest.Traits{Even: true, Least: true, Weighted: true}},
	{"random_choose", func() selection.Policy { return &selection.RandomChoose{Choose: 3} }, selectiontest.Traits{Even: true, Least: true, Weighted: true}},
	{"least_conn", func() selection.Policy { return new(selection.LeastConn) }, selectiontest.Traits{Even: true, Least: true, Weighted: true}},
	{"peak_ewma", func() selection.Policy { return new(selection.PeakEWMA) }, selectiontest.Traits{Even: true, Least: true, Weighted: true, Remembers: true}},
	{"orca", func() selection.Policy { return new(selection.ORCA) }, selectiontest.Traits{Even: true, Exact: true, Weighted: true, Remembers: true}},
	{"orca", func() selection.Policy { return &selection.ORCA{EnableOOBLoadReport: true} }, selectiontest.Traits{Even: true, Exact: true, Weighted: true, Remembers: true}},
	{"least_load", func() selection.Policy { return new(selection.LeastLoad) }, selectiontest.Traits{Even: true, Least: true, Weighted: true, Remembers: true}},
	{"first", func() selection.Policy { return new(selection.First) }, selectiontest.Traits{Ordered: true}},
}

// pick returns the index of what is picked.
func pick(p selection.Picker, in selection.PickInfo) (index int, ok bool) {
	picked, ok := p.Pick(in)
	return picked.Index, ok
}

func TestPolicies(t *testing.T) {
	for _, p := range policies {
		t.Run(p.name, func(t *testing.T) { selectiontest.Run(t, p.new, p.traits) })
	}
}

// No policy is forgotten above.
func TestAllRegistered(t *testing.T) {
	known := make(map[string]bool)
	for _, p := range policies {
		known[namespace+p.name] = true
		mod, ok := p.new().(caddy.Module)
		if !ok || string(mod.CaddyModule().ID) != namespace+p.name {
			t.Errorf("%s is no module of that name", p.name)
		}
	}
	for _, m := range caddy.GetModules(strings.TrimSuffix(namespace, ".")) {
		if !known[string(m.ID)] {
			t.Errorf("%s is not tested", m.ID)
		}
		if _, ok := m.New().(selection.Policy); !ok {
			t.Errorf("%s makes %T, which is no Policy", m.ID, m.New())
		}
		delete(known, string(m.ID))
	}
	if len(known) != 0 {
		t.Errorf("not registered: %v", known)
	}
}

// host loads a policy from JSON as the handler does.
type host struct {
	PolicyRaw json.RawMessage `json:"p" caddy:"namespace=http.grpc_proxy.selection_policies inline_key=policy"`
}

func load(t *testing.T, config string) (any, error) {
	t.Helper()
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	t.Cleanup(cancel)
	return ctx.LoadModule(&host{PolicyRaw: json.RawMessage(config)}, "PolicyRaw")
}

func TestCaddyfile(t *testing.T) {
	tests := []struct{ in, want string }{
		{"round_robin", `{"policy":"round_robin"}`},
		{"random", `{"policy":"random"}`},
		{"first", `{"policy":"first"}`},
		{"least_conn", `{"policy":"least_conn"}`},
		{"least_request", `{"policy":"least_request"}`},
		{"least_request 2", `{"choice_count":2,"policy":"least_request"}`},
		{"least_request 3", `{"choice_count":3,"policy":"least_request"}`},
		{"least_request 50", `{"choice_count":50,"policy":"least_request"}`},
		{"random_choose 5", `{"choose":5,"policy":"random_choose"}`},
		{"least_request {\n\tfull_scan\n\tactive_request_bias 0\n}", `{"active_request_bias":0,"full_scan":true,"policy":"least_request"}`},
		{"least_request 4 {\n\tactive_request_bias 1.5\n}", `{"active_request_bias":1.5,"choice_count":4,"policy":"least_request"}`},
		{"weighted_round_robin 5 0 1", `{"policy":"weighted_round_robin","weights":[5,0,1]}`},

		{"round_robin x", `round_robin: unexpected argument "x"`},
		{"first {\n\tx\n}", "first takes no block"},
		{"least_request 1", "least_request: 1 endpoints to choose from are too few, the least is 2"},
		{"least_request 0", "least_request: 0 endpoints to choose from are too few, the least is 2"},
		{"least_request -3", "too few"},
		{"least_request two", `least_request: "two" is not a number of endpoints to choose from`},
		{"least_request 3 4", `least_request: unexpected argument "4"`},
		{"least_request 3 {\n\tx\n}", `least_request: unrecognized option "x"; there is active_request_bias, full_scan`},
		{"least_request {\n\tfull_scan yes\n}", `full_scan: unexpected argument "yes"`},
		{"least_request {\n\tfull_scan\n\tfull_scan\n}", "full_scan is given twice"},
		{"least_request {\n\tactive_request_bias -1\n}", `active_request_bias: "-1" is not a number of 0 or more`},
		{"least_request {\n\tactive_request_bias NaN\n}", `active_request_bias: "NaN" is not a number of 0 or more`},
		{"least_request {\n\tactive_request_bias\n}", "active_request_bias: the value is missing"},
		{"weighted_round_robin", "weighted_round_robin: weights: none is given"},
		{"weighted_round_robin 1 x", `weighted_round_robin: weight "x" is not a whole number`},
		{"weighted_round_robin 1 -1", "weighted_round_robin: weights: number 2 is -1, which is not from 0 to 65535"},
		{"weighted_round_robin 65536", "weights: number 1 is 65536"},
		{"weighted_round_robin 0 0", "weights: all are 0"},
		{"weighted_round_robin 1 {\n\tx\n}", "weighted_round_robin takes no block"},
		{"random_choose", "wrong argument count or unexpected line ending after 'random_choose'"},
		{"random_choose 1", "too few"},
		{"random_choose 2 3", `random_choose: unexpected argument "3"`},
	}
	for _, tt := range tests {
		name, _, _ := strings.Cut(tt.in, " ")
		d := caddyfile.NewTestDispenser(tt.in)
		d.Next()
		mod, err := caddyfile.UnmarshalModule(d, namespace+name)
		if !strings.HasPrefix(tt.want, "{") {
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%q: error %v, want %q", tt.in, err, tt.want)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q: %v", tt.in, err)
			continue
		}
		got := string(caddyconfig.JSONModuleObject(mod, "policy", name, nil))
		if got != tt.want {
			t.Errorf("%q: %s, want %s", tt.in, got, tt.want)
		}
		if p, err := load(t, got); err != nil || !reflect.DeepEqual(p, mod) {
			t.Errorf("%s is loaded as %+v, %v; want %+v", got, p, err, mod)
		}
	}
}

func TestJSONErrors(t *testing.T) {
	for config, want := range map[string]string{
		`{"policy":"least_request","choice_count":1}`:                  "choice_count: 1 endpoints to choose from are too few",
		`{"policy":"least_request","choices":3}`:                       "unknown field",
		`{"policy":"random_choose","choose":-1}`:                       "choose: -1 endpoints",
		`{"policy":"least_request","choice_count":2,"full_scan":true}`: "choice_count: with full_scan",
		`{"policy":"least_request","active_request_bias":-0.5}`:        "active_request_bias: -0.5 is not a number of 0 or more",
		`{"policy":"weighted_round_robin"}`:                            "weights: none is given",
		`{"policy":"weighted_round_robin","weights":[0]}`:              "weights: all are 0",
		`{"policy":"weighted_round_robin","weights":[2,-3]}`:           "weights: number 2 is -3",
		`{"policy":"round_robin","x":1}`:                               "unknown field",
		`{"policy":"nope"}`:                                            "nope",
	} {
		if p, err := load(t, config); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v; want %q", config, p, err, want)
		}
	}
}
